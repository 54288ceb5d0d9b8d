//! The content of the configuration, validated and with defaults.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use palisade_abi::ETHER_TYPES;
use palisade_flowlog::{Filters, Timestamp};
use palisade_inspect::{Ech, GetBodies, Paths};
use palisade_model::{
    inventory::{Enforcement, NamedPorts},
    labels::Labels,
    rule::Label,
};
use palisade_protocols::http1;
use palisade_worker::Mode;

use palisade_flowlog::FieldMask;

/// Path of the configuration without `--config`.
pub(crate) const DEFAULT_PATH: &str = "/etc/palisade/palisade.toml";
/// Directory of pinned links and maps.
pub(crate) const DEFAULT_PIN_DIR: &str = "/sys/fs/bpf/palisade";
/// Default directory of identities, rule numbers and last good policies.
pub(crate) const DEFAULT_STATE_DIR: &str = "/var/lib/palisade";
/// Path of the control socket.
pub(crate) const DEFAULT_SOCKET: &str = "/run/palisade/palisade.sock";

/// Default prefix of the names of punt link and proxy links, and default name of the nftables table.
pub(crate) const DEFAULT_INTERFACE: &str = "palisade";

/// The whole configuration.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    /// Path of the file.
    pub path: PathBuf,
    /// Text of the file.
    pub text: Arc<str>,
    /// `[node]`.
    pub node: Node,
    /// `[failsafe]`.
    pub failsafe: super::Failsafe,
    /// `[policy]`.
    pub policy: Policy,
    /// `[limits]`.
    pub limits: Limits,
    /// `[timeouts]`.
    pub timeouts: Timeouts,
    /// `[dns]`.
    pub dns: Dns,
    /// `[http]`.
    pub http: Http,
    /// `[kafka]`.
    pub kafka: Kafka,
    /// `[tls]`.
    pub tls: Tls,
    /// `[worker]`.
    pub worker: Worker,
    /// `[metrics]`.
    pub metrics: super::Metrics,
    /// `[hubble]`.
    pub hubble: super::Hubble,
    /// `[[interface]]`.
    pub interfaces: Vec<Interface>,
    /// `[[endpoint]]`.
    pub endpoints: Vec<Endpoint>,
    /// `[[peer]]`.
    pub peers: Vec<Peer>,
    /// `[[discover]]`.
    pub discover: Vec<super::Discover>,
    /// `[[export]]`.
    pub exports: Vec<Export>,
}

/// `[node]`: this machine.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    /// Name of the node in flows and reports.
    pub name: String,
    /// Labels of the node, without `reserved:host`.
    pub labels: Vec<Label>,
    /// Addresses of the node besides those of its interfaces.
    pub addresses: Vec<IpAddr>,
    /// Directory of pinned links and maps.
    pub pin_dir: PathBuf,
    /// Directory of identities, rule numbers and last good policies.
    pub state_dir: PathBuf,
    /// Path of the control socket.
    pub socket: PathBuf,
    /// Treatment of traffic while policies cannot be read.
    pub on_failure: WithoutPolicies,
}

/// Treatment of traffic if policies exist and cannot be read at a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WithoutPolicies {
    /// The readable policies are enforced; without any, everything passes.
    Open,
    /// The enforcement mode `default` acts as `always`: packets pass only if a policy that can be read allows them.
    Closed,
}

/// `[policy]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Policy {
    /// Folder of the policy files.
    pub dir: PathBuf,
    /// When a direction of an endpoint is denied by default.
    pub enforcement: Enforcement,
    /// Whether all drops are only reported and everything passes.
    pub audit: bool,
    /// Whether connections of the node to its workloads are always allowed.
    pub allow_localhost: bool,
    /// Time for which the folder must be unchanged before its changes are read.
    pub debounce: Duration,
}

/// `[limits]`: sizes of maps and rates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Connections of the conntrack map.
    pub conntrack: u32,
    /// Entries of all policy tables.
    pub policy: u32,
    /// Addresses, and the same number of shorter prefixes.
    pub ipcache: u32,
    /// Addresses that endpoints have learned by name.
    pub learned: u32,
    /// Rules with a counter.
    pub rules: u32,
    /// Fragmented datagrams.
    pub fragments: u32,
    /// Events per second of one kind and reason on one CPU.
    pub events_per_second: u32,
    /// Flows kept for `observe`.
    pub flows: u32,
    /// Endpoints that are found.
    pub discovered: u32,
}

/// `[timeouts]`: lifetimes of conntrack entries and intervals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timeouts {
    /// TCP connection with packets of only one side.
    pub tcp_opening: Duration,
    /// Established TCP connection.
    pub tcp_established: Duration,
    /// TCP connection that was reset or closed by both sides.
    pub tcp_closing: Duration,
    /// UDP flow, and flow of any other protocol with ports.
    pub udp: Duration,
    /// ICMP echo, and flow of a protocol without ports.
    pub other: Duration,
    /// Ports of a fragmented datagram.
    pub fragment: Duration,
    /// Shortest time between two reports of an active flow; zero for no reports.
    pub trace_interval: Duration,
    /// Interval between two sweeps of expired connections.
    pub sweep: Duration,
}

/// `[dns]`: policies on names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dns {
    /// Shortest lifetime of learned addresses, whatever their TTL.
    pub min_ttl: Duration,
    /// Longest lifetime of learned addresses, whatever their TTL.
    pub max_ttl: Duration,
    /// Maximum number of addresses of one name per endpoint.
    pub addresses_per_name: u32,
    /// Maximum number of addresses per endpoint.
    pub addresses_per_endpoint: u32,
    /// Whether selectors are also matched against the CNAMEs of an answer.
    pub follow_cname: bool,
    /// Response to a query that no rule allows.
    pub deny_answer: DenyAnswer,
    /// Whether the names in `matchName` selectors are resolved before clients ask.
    pub prefetch: bool,
    /// DNS servers for `prefetch`; empty for the node's own.
    pub servers: Vec<SocketAddr>,
    /// Whether special-purpose addresses (RFC 6890) in answers are not learned.
    pub refuse_special: bool,
    /// Special-purpose prefixes that are learned nevertheless.
    pub allow_special: Vec<IpNet>,
}

/// Response to a query that no rule allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DenyAnswer {
    /// REFUSED.
    Refused,
    /// NXDOMAIN. Some clients try the next name of their search list only after NXDOMAIN.
    NxDomain,
}

/// `[http]`: policies on HTTP requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Http {
    /// Forms of the path that rules match.
    pub paths: Paths,
    /// Treatment of a GET request with a body.
    pub get_bodies: GetBodies,
    /// Whether the proxy inspects requests in clear text, so that they may be HTTP/2.
    pub clear_text_http2: bool,
    /// Time within which a request head must be complete.
    pub header_timeout: Duration,
    /// Maximum length of a head and of a line.
    pub head: http1::Limits,
    /// Names of the header fields that flows show, in lower case.
    pub record_headers: Vec<String>,
}

/// `[kafka]`: policies on Kafka requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kafka {
    /// Longest request whose topics get a verdict, bytes.
    pub max_request: usize,
    /// Time within which a request must be complete.
    pub request_timeout: Duration,
    /// Whether names of topic ids count at all servers under the same rules.
    pub share_topic_ids: bool,
}

/// `[tls]`: policies on server names, and interception.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tls {
    /// Treatment of a ClientHello that contains an encrypted ClientHello.
    pub ech: Ech,
    /// Time within which a ClientHello must be complete.
    pub hello_timeout: Duration,
    /// Whether the endpoint must have learned the destination address of a connection by the connection's server name.
    pub verify_sni_address: bool,
    /// Folder of the secrets that policies name.
    pub secrets_dir: PathBuf,
    /// `namespace/name` of the secret with the interception CA.
    pub interception_ca: Option<String>,
    /// Treatment of an intercepted ClientHello without a server name.
    pub no_sni: NoSni,
    /// Time for the TLS handshake of the proxy with either side.
    pub handshake_timeout: Duration,
    /// Time for a TCP connection of the proxy to a server.
    pub connect_timeout: Duration,
    /// Time of a server for the head of a response after the whole request; zero: no such deadline.
    pub response_timeout: Duration,
    /// Time without any byte after which the proxy closes a connection.
    pub idle_timeout: Duration,
    /// Number of threads of the proxy; 0 for one per CPU, at most eight.
    pub proxy_threads: usize,
    /// Maximum number of connections of one thread of the proxy.
    pub max_connections: usize,
    /// Maximum number of connections of one endpoint in one thread of the proxy; not more than `max_connections`.
    pub max_connections_per_endpoint: usize,
}

/// Treatment of an intercepted ClientHello without a server name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoSni {
    /// The server gets no name either, and its certificate must be valid for its address.
    CheckAddress,
    /// The connection is refused.
    Refuse,
}

/// `[worker]`: the threads that inspect packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Worker {
    /// Number of workers; 0 for one per CPU, at most eight.
    pub threads: usize,
    /// How workers wait for packets.
    pub mode: Mode,
    /// Treatment of packets that need inspection while no worker runs.
    pub on_failure: OnFailure,
    /// Frames of each worker's socket.
    pub frames: u32,
    /// Name of the punt link without the digit of its end.
    pub interface: String,
}

/// Treatment of packets that need inspection while no worker runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnFailure {
    /// The packets are dropped.
    Drop,
    /// The packets pass without inspection (fail open).
    Pass,
}

/// How the programs are attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attachment {
    /// Hook at ingress.
    pub ingress: IngressHook,
    /// Mode of XDP.
    pub xdp_mode: XdpMode,
    /// Kind of tc attachment.
    pub tc: TcHook,
}

impl Attachment {
    /// The attachment without options.
    pub(crate) const AUTO: Self = Self {
        ingress: IngressHook::Auto,
        xdp_mode: XdpMode::Native,
        tc: TcHook::Auto,
    };
}

/// Hook at ingress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IngressHook {
    /// The faster one for the role of the interface.
    Auto,
    /// XDP.
    Xdp,
    /// tc.
    Tc,
}

/// Mode of XDP. If the interface does not support the configured mode, attaching fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum XdpMode {
    /// In the driver.
    Native,
    /// In the driver, or generic if the driver has no XDP; `status` reports which.
    Auto,
    /// Generic: after the kernel has allocated its packet buffer.
    Skb,
}

/// Kind of tc attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TcHook {
    /// tcx if the kernel has it, otherwise clsact.
    Auto,
    /// tcx (since Linux 6.6).
    Tcx,
    /// A clsact queueing discipline with a filter.
    Clsact,
}

/// `[[export]]`: a file to which flows are written.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Export {
    /// Name of the export.
    pub name: String,
    /// Path of the file.
    pub file: PathBuf,
    /// Which flows are written.
    pub filters: Filters,
    /// Fields of the flows that are written.
    pub field_mask: FieldMask,
    /// Size at which the file is renamed, bytes.
    pub max_size: u64,
    /// Number of renamed files that are kept.
    pub max_backups: usize,
    /// Time from which no flow is written.
    pub end: Option<Timestamp>,
}

/// `[[interface]]`: a NIC of this node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Interface {
    /// Name of the interface.
    pub name: String,
    /// EtherTypes of frames that pass without a verdict; 0 for unused slots.
    pub ether_types: [u16; ETHER_TYPES],
    /// How the programs are attached.
    pub attachment: Attachment,
}

/// `[[endpoint]]`: a workload behind the host side of a veth.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Endpoint {
    /// Name of the endpoint.
    pub name: String,
    /// Namespace of the endpoint.
    pub namespace: String,
    /// Host side of the veth.
    pub interface: String,
    /// Addresses of the endpoint.
    pub addresses: Vec<IpAddr>,
    /// Labels of the endpoint, including those of its namespace.
    pub labels: Labels,
    /// Ports by name.
    pub named_ports: NamedPorts,
    /// Network namespace of the workload, whose connections are seeded.
    pub netns: Option<PathBuf>,
    /// How the programs are attached.
    pub attachment: Attachment,
}

impl Endpoint {
    /// Returns `namespace/name`: the name in reports, and the key of the endpoint number in the state file.
    pub(crate) fn qualified_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// `[[peer]]`: a workload or network outside of this node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Peer {
    /// Name of the peer.
    pub name: String,
    /// Addresses and prefixes of the peer.
    pub addresses: Vec<IpNet>,
    /// Labels of the peer, including those of its entity or namespace.
    pub labels: Labels,
}

/// Returns the value of `[policy] enforcement` in the configuration's spelling.
pub(crate) const fn enforcement_name(enforcement: Enforcement) -> &'static str {
    match enforcement {
        Enforcement::Default => "default",
        Enforcement::Always => "always",
        Enforcement::Never => "never",
    }
}
