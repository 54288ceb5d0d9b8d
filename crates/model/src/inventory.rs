//! What a node knows besides its policies: who is here, who is elsewhere, and how strictly to enforce.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;

use crate::labels::{Labels, reserved};

/// When an endpoint's traffic is denied by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Enforcement {
    /// As soon as a policy selects it, for the directions the policy has.
    #[default]
    Default,
    /// Always.
    Always,
    /// Never: policies have no effect.
    Never,
}

/// The switches that hold for the whole node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Enforcement mode.
    pub enforcement: Enforcement,
    /// Whether the node may reach its workloads without a rule (an explicit deny still holds).
    pub allow_localhost: bool,
    /// Whether the IPv4 and the IPv6 world are told apart.
    pub dual_stack: bool,
    /// Whether everything that would be dropped passes, and is reported.
    pub audit: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            enforcement: Enforcement::Default,
            allow_localhost: false,
            dual_stack: true,
            audit: false,
        }
    }
}

/// Protocol (IP number; 0: any) and port of a named port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamedPort {
    /// IP protocol number, 0 if the name holds for every protocol.
    pub protocol: u8,
    /// The port.
    pub port: u16,
}

/// Ports by name, the names in lower case.
pub type NamedPorts = BTreeMap<String, NamedPort>;

/// Something on this node that policies are enforced for: a workload, or the node itself (label `reserved:host`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Number of the endpoint on this node, never 0.
    pub id: u16,
    /// Name, as people and flows say it.
    pub name: String,
    /// Namespace; empty for the node.
    pub namespace: String,
    /// All labels, the namespace's among them.
    pub labels: Labels,
    /// Its own ports by name.
    pub named_ports: NamedPorts,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether what would be dropped for it passes, and is reported.
    pub audit: bool,
}

impl Endpoint {
    /// Whether it is the node itself.
    #[must_use]
    pub fn is_node(&self) -> bool {
        self.labels.has_reserved("host")
    }
}

/// A labelled host or prefix that is not on this node; another node; an entity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Name, as people and flows say it.
    pub name: String,
    /// All labels.
    pub labels: Labels,
    /// Its ports by name.
    pub named_ports: NamedPorts,
    /// Its prefixes (a single address is a full-length prefix). None: only known by name (case files).
    pub prefixes: Vec<IpNet>,
}

/// Everything a node knows besides its policies.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Inventory {
    /// The switches.
    pub options: Options,
    /// What is on this node, the node itself among them.
    pub endpoints: Vec<Endpoint>,
    /// What is elsewhere.
    pub peers: Vec<Peer>,
}

impl Options {
    /// The labels of an address that nobody knows: `reserved:world`, or the family's own in dual stack.
    #[must_use]
    pub fn world_labels(&self, v6: bool) -> Labels {
        Labels::new([reserved(match (self.dual_stack, v6) {
            (false, _) => "world",
            (true, false) => "world-ipv4",
            (true, true) => "world-ipv6",
        })])
    }
}
