//! The inventory of a node: its endpoints, its peers, and how strictly to enforce policies.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use crate::labels::{Labels, reserved};

/// Conditions under which a direction of an endpoint is subject to policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Enforcement {
    /// A policy that selects the endpoint has rules for the direction, or the labels of the endpoint are not known yet
    /// (`reserved:init`).
    #[default]
    Default,
    /// Always.
    Always,
    /// Never: policies have no effect.
    Never,
}

/// Settings of the whole node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Enforcement mode.
    pub enforcement: Enforcement,
    /// Whether the node is allowed to reach its workloads even without a rule. An explicit deny still applies.
    pub allow_localhost: bool,
    /// Whether IPv4 and IPv6 addresses of the world have different identities.
    pub dual_stack: bool,
    /// Whether the node is in audit mode: packets that policies deny pass and are reported.
    pub audit: bool,
    /// Whether the proxy, which reads HTTP/2 too, inspects connections with http rules that are in clear text. If not,
    /// the workers inspect them, and HTTP/2 is refused.
    pub clear_text_http2: bool,
    /// Whether the failsafe ports of the node are open at some of its NICs only.
    pub some_nics_closed: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            enforcement: Enforcement::Default,
            allow_localhost: false,
            dual_stack: true,
            audit: false,
            clear_text_http2: false,
            some_nics_closed: false,
        }
    }
}

/// Protocol and number of a named port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamedPort {
    /// IP protocol number; 0 if the name applies to every protocol.
    pub protocol: u8,
    /// Port number.
    pub port: u16,
}

/// Named ports, by name in lower case.
pub type NamedPorts = BTreeMap<String, NamedPort>;

/// An endpoint of this node: a workload, or the node itself (label `reserved:host`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Endpoint number on this node; never 0.
    pub id: u16,
    /// Name, for reports.
    pub name: String,
    /// Namespace; empty for the node.
    pub namespace: String,
    /// All labels, those of the namespace included.
    pub labels: Labels,
    /// Named ports of the endpoint.
    pub named_ports: NamedPorts,
    /// Addresses of the endpoint.
    pub addresses: Vec<IpAddr>,
    /// Whether the endpoint is in audit mode: packets that policies deny pass and are reported.
    pub audit: bool,
}

impl Endpoint {
    /// Returns whether the endpoint is the node itself.
    #[must_use]
    pub fn is_node(&self) -> bool {
        self.labels.has_reserved("host")
    }
}

/// A peer that the configuration declares: a labelled host or prefix outside this node, another node, or an entity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Name, for reports.
    pub name: String,
    /// All labels.
    pub labels: Labels,
    /// Named ports of the peer.
    pub named_ports: NamedPorts,
    /// Prefixes of the peer; a single address is a full-length prefix. Peers of case files can have none.
    pub prefixes: Vec<IpNet>,
}

/// The configured state of a node, policies excluded.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Inventory {
    /// Settings of the node.
    pub options: Options,
    /// Endpoints, the node itself included.
    pub endpoints: Vec<Endpoint>,
    /// Peers.
    pub peers: Vec<Peer>,
}

impl Options {
    /// Returns the labels of an address that nothing identifies: `reserved:world`; in dual stack `reserved:world-ipv6`
    /// if `v6` is set, else `reserved:world-ipv4`.
    #[must_use]
    pub fn world_labels(&self, v6: bool) -> Labels {
        Labels::new([reserved(match (self.dual_stack, v6) {
            (false, _) => "world",
            (true, false) => "world-ipv4",
            (true, true) => "world-ipv6",
        })])
    }
}
