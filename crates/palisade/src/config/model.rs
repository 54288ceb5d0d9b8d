//! Everything that the configuration says, as the daemon uses it.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use palisade_abi::ETHER_TYPES;
use palisade_inspect::{Ech, GetBodies, Paths};
use palisade_model::{
    inventory::{Enforcement, NamedPorts},
    labels::Labels,
    rule::Label,
};
use palisade_protocols::http1;
use palisade_worker::Mode;

/// Where the configuration is looked for if nobody says where.
pub(crate) const DEFAULT_PATH: &str = "/etc/palisade/palisade.toml";
/// Where links and maps are pinned.
pub(crate) const DEFAULT_PIN_DIR: &str = "/sys/fs/bpf/palisade";
/// Where what outlives the daemon is kept.
pub(crate) const DEFAULT_STATE_DIR: &str = "/var/lib/palisade";
/// Where the daemon listens for the command line.
pub(crate) const DEFAULT_SOCKET: &str = "/run/palisade/palisade.sock";

/// Everything the configuration says, validated, defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Config {
    /// The file it was read from.
    pub path: PathBuf,
    /// What the file said.
    pub text: Arc<str>,
    /// `[node]`.
    pub node: Node,
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
    /// `[tls]`.
    pub tls: Tls,
    /// `[worker]`.
    pub worker: Worker,
    /// `[[interface]]`.
    pub interfaces: Vec<Interface>,
    /// `[[endpoint]]`.
    pub endpoints: Vec<Endpoint>,
    /// `[[peer]]`.
    pub peers: Vec<Peer>,
}

/// `[node]`: this machine.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    /// How flows and reports name it.
    pub name: String,
    /// The node's labels, without `reserved:host`.
    pub labels: Vec<Label>,
    /// Addresses of the node beside those its interfaces have.
    pub addresses: Vec<IpAddr>,
    /// Where links and maps are pinned.
    pub pin_dir: PathBuf,
    /// Where identities, rule ids and the last good policies are kept.
    pub state_dir: PathBuf,
    /// The control socket.
    pub socket: PathBuf,
    /// What becomes of traffic whose policies cannot be had.
    pub on_failure: WithoutPolicies,
}

/// What becomes of traffic when policies that were there cannot be had at a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WithoutPolicies {
    /// What the other policies allow passes; without any, everything does.
    Open,
    /// Only what the other policies allow passes: every direction of every endpoint is denied by default.
    Closed,
}

/// `[policy]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Policy {
    /// The folder with the policy files.
    pub dir: PathBuf,
    /// When a direction of an endpoint is denied by default.
    pub enforcement: Enforcement,
    /// What would be dropped passes and is reported, everywhere.
    pub audit: bool,
    /// The node may always reach its workloads.
    pub allow_localhost: bool,
    /// How long the folder must be quiet before a change is read.
    pub debounce: Duration,
}

/// `[limits]`: sizes of maps, and what may be used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Connections.
    pub conntrack: u32,
    /// Entries of all policy tables together.
    pub policy: u32,
    /// Full-length addresses, and as many shorter prefixes.
    pub ipcache: u32,
    /// Addresses that endpoints have learned by name.
    pub learned: u32,
    /// Rules with counters of their own.
    pub rules: u32,
    /// Datagrams in fragments.
    pub fragments: u32,
    /// Events of one kind and reason that one CPU may send in a second.
    pub events_per_second: u32,
    /// Flows kept for `observe`.
    pub flows: u32,
}

/// `[timeouts]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Timeouts {
    /// TCP connection of which only one side has been heard.
    pub tcp_opening: Duration,
    /// TCP connection in use.
    pub tcp_established: Duration,
    /// TCP connection that was reset or closed by both sides.
    pub tcp_closing: Duration,
    /// UDP flow, and every other protocol with ports.
    pub udp: Duration,
    /// ICMP echo and protocols without ports.
    pub other: Duration,
    /// Ports of a fragmented datagram.
    pub fragment: Duration,
    /// A flow in use is reported at most this often; zero: never.
    pub trace_interval: Duration,
    /// How often dead connections are swept out.
    pub sweep: Duration,
}

/// `[dns]`: names that policies decide by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dns {
    /// The least time that an answer's addresses can be reached.
    pub min_ttl: Duration,
    /// The longest time that an answer can ask for.
    pub max_ttl: Duration,
    /// Addresses of one name that an endpoint keeps.
    pub addresses_per_name: u32,
    /// Addresses that an endpoint keeps.
    pub addresses_per_endpoint: u32,
    /// A selector that matches an alias on the way to the addresses counts too.
    pub follow_cname: bool,
    /// What a question gets that no rule allows.
    pub deny_answer: DenyAnswer,
    /// Names that policies give in full are resolved ahead.
    pub prefetch: bool,
    /// Whom to ask for that; empty: the node's own servers.
    pub servers: Vec<SocketAddr>,
    /// Special-purpose addresses (RFC 6890) in answers are not learned.
    pub refuse_special: bool,
    /// Except for those in these prefixes.
    pub allow_special: Vec<IpNet>,
}

/// What a question gets that no rule allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DenyAnswer {
    /// REFUSED.
    Refused,
    /// NXDOMAIN, for clients that go on with the next name of their search list only then.
    NxDomain,
}

/// `[http]`: requests that policies decide by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Http {
    /// In which form the path of a request is judged.
    pub paths: Paths,
    /// What becomes of a GET with a body.
    pub get_bodies: GetBodies,
    /// A head must be whole by then.
    pub header_timeout: Duration,
    /// What a head may be at most.
    pub head: http1::Limits,
    /// Names of the fields that flows show, in lower case.
    pub record_headers: Vec<String>,
}

/// `[tls]`: server names that policies decide by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tls {
    /// What becomes of a hello that carries an encrypted one.
    pub ech: Ech,
    /// A hello must be whole by then.
    pub hello_timeout: Duration,
    /// The address that is connected to must have been learned for the server name.
    pub verify_sni_address: bool,
}

/// `[worker]`: the threads that read what policies want read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Worker {
    /// How many; 0: one for each CPU, eight at most.
    pub threads: usize,
    /// How they wait for packets.
    pub mode: Mode,
    /// What becomes of packets that no worker can read.
    pub on_failure: OnFailure,
    /// Frames of each worker's socket.
    pub frames: u32,
    /// What the names of the punt link's two ends start with.
    pub interface: String,
}

/// What becomes of packets that must be read and cannot be, because no worker lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnFailure {
    /// They are dropped.
    Drop,
    /// They pass unread.
    Pass,
}

/// How the programs are attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attachment {
    /// Which hook stands at ingress.
    pub ingress: IngressHook,
    /// Mode of XDP.
    pub xdp_mode: XdpMode,
    /// How tc programs are attached.
    pub tc: TcHook,
}

/// Which hook stands at ingress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IngressHook {
    /// What is faster for the role.
    Auto,
    /// XDP.
    Xdp,
    /// tc.
    Tc,
}

/// Mode of XDP. Never chosen silently: what the driver cannot do is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum XdpMode {
    /// In the driver.
    Native,
    /// In the driver, or generic if the driver has none; which it is gets reported.
    Auto,
    /// Generic, after the kernel has made its packet buffer.
    Skb,
}

/// How tc programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TcHook {
    /// tcx where the kernel has it, else clsact.
    Auto,
    /// tcx (from Linux 6.6).
    Tcx,
    /// A clsact queueing discipline with a filter.
    Clsact,
}

/// `[[interface]]`: a NIC of this node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Interface {
    /// Its name.
    pub name: String,
    /// EtherTypes of frames that pass unjudged; 0: none.
    pub ether_types: [u16; ETHER_TYPES],
    /// How the programs are attached.
    pub attachment: Attachment,
}

/// `[[endpoint]]`: a workload behind the host side of a veth.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Endpoint {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// The host side of its veth.
    pub interface: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// All its labels, those of its namespace too.
    pub labels: Labels,
    /// Names of its ports.
    pub named_ports: NamedPorts,
    /// The network namespace of the workload, from which connections are seeded.
    pub netns: Option<PathBuf>,
    /// How the programs are attached.
    pub attachment: Attachment,
}

impl Endpoint {
    /// `namespace/name`: how reports name it, and what its id is kept under.
    pub(crate) fn qualified_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// `[[peer]]`: somebody who is not on this node.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Peer {
    /// Its name.
    pub name: String,
    /// Its addresses and prefixes.
    pub addresses: Vec<IpNet>,
    /// Its labels, those of the entity or the namespace too.
    pub labels: Labels,
}

/// Returns the value of `[policy] enforcement` as it is written in the configuration.
pub(crate) const fn enforcement_name(enforcement: Enforcement) -> &'static str {
    match enforcement {
        Enforcement::Default => "default",
        Enforcement::Always => "always",
        Enforcement::Never => "never",
    }
}
