//! The configuration: `/etc/palisade/palisade.toml`.

mod limit_option;
mod reader;
mod suggest;

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
pub(crate) use limit_option::{limit_hint, with_option};
use palisade_abi::{ETHER_TYPES, MAX_WORKERS};
use palisade_inspect::{Ech, GetBodies, Paths};
use palisade_model::{
    inventory::{Enforcement, NamedPort, NamedPorts},
    labels::{self, Labels},
    rule::Label,
};
use palisade_protocols::http1;
use palisade_worker::Mode;
pub(crate) use reader::ConfigError;
use reader::{At, Reader, Section};
use toml::de::DeTable;

/// Where the configuration is looked for if nobody says where.
pub(crate) const DEFAULT_PATH: &str = "/etc/palisade/palisade.toml";
/// Where links and maps are pinned.
pub(crate) const DEFAULT_PIN_DIR: &str = "/sys/fs/bpf/palisade";
/// Where what outlives the daemon is kept.
pub(crate) const DEFAULT_STATE_DIR: &str = "/var/lib/palisade";
/// Where the daemon listens for the command line.
pub(crate) const DEFAULT_SOCKET: &str = "/run/palisade/palisade.sock";

/// The label that says in which namespace an endpoint is.
const NAMESPACE_LABEL: &str = "io.kubernetes.pod.namespace";
/// What the labels of an endpoint's namespace start with among its own.
const NAMESPACE_LABEL_PREFIX: &str = "io.cilium.k8s.namespace.labels.";
/// The label that every Kubernetes namespace has: its name.
const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";
/// Sources that are Palisade's own to give.
const RESERVED_SOURCES: [&str; 5] = ["reserved", "cidr", "cidrgroup", "fqdn", "any"];

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

/// What passes a NIC where nothing else is configured, besides the link-local control group: the time protocol that a NIC's
/// clock is set by (IEEE 1588), and the authentication that opens a switch port (IEEE 802.1X sends it to single addresses
/// too). Neither carries packets of others.
const DEFAULT_ETHER_TYPES: [u16; 2] = [0x88f7, 0x888e];

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

impl Config {
    /// Reads and validates a file.
    pub(crate) fn load(path: &Path) -> Result<Self, Vec<ConfigError>> {
        let text = fs::read_to_string(path).map_err(|error| {
            let hint = if error.kind() == std::io::ErrorKind::NotFound {
                "; name the file with --config, or start from the config/palisade.toml that comes with Palisade"
            } else {
                ""
            };
            vec![ConfigError {
                file: path.display().to_string(),
                line: 0,
                column: 0,
                message: format!("cannot be read: {error}{hint}"),
            }]
        })?;
        if palisade_policy::parse::is_blank(&text) {
            // What a power failure leaves of a file that was just written. It would be a valid configuration that
            // guards nothing.
            return Err(vec![ConfigError {
                file: path.display().to_string(),
                line: 0,
                column: 0,
                message:
                    "is empty, and so would have nothing guarded; start from the config/palisade.toml that \
                          comes with Palisade"
                        .to_owned(),
            }]);
        }
        Self::parse(path, &text)
    }

    /// A path of `[node]` in a text that may be wrong elsewhere, as far as it can be read.
    pub(crate) fn node_path(text: &str, key: &str) -> Option<PathBuf> {
        let (table, _) = DeTable::parse_recoverable(text);
        let node = table.get_ref().get("node")?.get_ref().as_table()?;
        let path = PathBuf::from(node.get(key)?.get_ref().as_str()?);
        path.is_absolute().then_some(path)
    }

    /// Validates a text; `path` is how messages name it and what a relative policy folder is relative to.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self, Vec<ConfigError>> {
        let file = path.display().to_string();
        let reader = Reader::new(&file, text);
        let (table, syntax) = DeTable::parse_recoverable(text);
        if !syntax.is_empty() {
            for error in syntax {
                reader.error(error.span().map_or(0, |span| span.start), error.message());
            }
            return Err(reader.into_errors());
        }
        let mut config = read(path, &reader, table.get_ref());
        config.text = text.into();
        let errors = reader.into_errors();
        if errors.is_empty() {
            Ok(config)
        } else {
            Err(errors)
        }
    }
}

fn read(path: &Path, reader: &Reader<'_>, table: &DeTable<'_>) -> Config {
    let root = Section::root(reader, table);
    let mut config = Config {
        path: path.to_owned(),
        text: Arc::default(),
        node: node(root.table("node")),
        policy: policy(root.table("policy"), path),
        limits: limits(root.table("limits")),
        timeouts: timeouts(root.table("timeouts")),
        dns: dns(root.table("dns")),
        http: http(root.table("http")),
        tls: tls(root.table("tls")),
        worker: worker(root.table("worker")),
        interfaces: Vec::new(),
        endpoints: Vec::new(),
        peers: Vec::new(),
    };
    let namespaces = namespaces(root.tables("namespace"));
    let mut taken = Taken::default();
    for end in ["0", "1"] {
        let name = format!("{}{end}", config.worker.interface);
        taken
            .interfaces
            .insert(name, "the punt link ([worker] interface)".to_owned());
    }
    for address in &config.node.addresses {
        taken
            .addresses
            .insert(IpNet::from(*address), "the node".to_owned());
    }
    for section in root.tables("interface") {
        config.interfaces.extend(interface(section, &mut taken));
    }
    for section in root.tables("endpoint") {
        config
            .endpoints
            .extend(endpoint(section, &namespaces, &mut taken));
    }
    for section in root.tables("peer") {
        config.peers.extend(peer(section, &namespaces, &mut taken));
    }
    root.finish();
    config
}

/// Returns the value of `[policy] enforcement` as it is written in the configuration.
pub(crate) const fn enforcement_name(enforcement: Enforcement) -> &'static str {
    match enforcement {
        Enforcement::Default => "default",
        Enforcement::Always => "always",
        Enforcement::Never => "never",
    }
}

/// Returns every option that the configuration has, as `section.option`.
#[cfg(test)]
pub(crate) fn option_names() -> std::collections::BTreeSet<String> {
    let text = "[[namespace]]\n[[interface]]\n[[endpoint]]\n[[peer]]\n";
    let reader = Reader::new("p.toml", text);
    let (table, _) = DeTable::parse_recoverable(text);
    read(Path::new("p.toml"), &reader, table.get_ref());
    let asked = reader.asked.into_inner();
    asked.into_iter().filter(|path| path.contains('.')).collect()
}

/// What may be there only once.
#[derive(Default)]
struct Taken {
    interfaces: HashMap<String, String>,
    names: HashSet<String>,
    addresses: HashMap<IpNet, String>,
}

impl Taken {
    fn interface(&mut self, section: &Section<'_, '_>, name: &At<String>, by: &str) {
        if let Some(other) = self.interfaces.insert(name.value.clone(), by.to_owned()) {
            section.error_at(
                name.offset,
                format!("interface {} belongs to {other} already", name.value),
            );
        }
    }

    fn name(&mut self, section: &Section<'_, '_>, name: &At<String>, qualified: &str) {
        if !self.names.insert(qualified.to_owned()) {
            section.error_at(name.offset, format!("there is another {qualified}"));
        }
    }

    fn address(&mut self, section: &Section<'_, '_>, net: IpNet, offset: usize, by: &str) {
        if let Some(other) = self.addresses.insert(net, by.to_owned()) {
            let shown = if net.prefix_len() == net.max_prefix_len() {
                net.addr().to_string()
            } else {
                net.to_string()
            };
            section.error_at(offset, format!("{shown} belongs to {other} already"));
        }
    }
}

fn node(section: Section<'_, '_>) -> Node {
    let name = section.string("name").map(|at| at.value);
    let node = Node {
        name: name.filter(|name| !name.is_empty()).unwrap_or_else(host_name),
        labels: own_labels(&section),
        addresses: unique_addresses(&section)
            .into_iter()
            .map(|at| at.value)
            .collect(),
        pin_dir: section
            .absolute_path("pin_dir")
            .unwrap_or_else(|| DEFAULT_PIN_DIR.into()),
        state_dir: section
            .absolute_path("state_dir")
            .unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
        socket: section
            .absolute_path("socket")
            .unwrap_or_else(|| DEFAULT_SOCKET.into()),
        on_failure: section
            .choice(
                "on_failure",
                &[
                    ("open", WithoutPolicies::Open),
                    ("closed", WithoutPolicies::Closed),
                ],
            )
            .unwrap_or(WithoutPolicies::Open),
    };
    section.finish();
    node
}

fn host_name() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "node".to_owned())
}

fn policy(section: Section<'_, '_>, config: &Path) -> Policy {
    let dir = section.string("dir").map_or_else(
        || PathBuf::from("/etc/palisade/policies.d"),
        |at| config.parent().unwrap_or(Path::new("/")).join(at.value),
    );
    let enforcement = [
        ("default", Enforcement::Default),
        ("always", Enforcement::Always),
        ("never", Enforcement::Never),
    ];
    let policy = Policy {
        dir,
        enforcement: section
            .choice("enforcement", &enforcement)
            .unwrap_or(Enforcement::Default),
        audit: section.boolean("audit").unwrap_or(false),
        allow_localhost: section
            .choice("allow_localhost", &[("policy", false), ("always", true)])
            .unwrap_or(false),
        debounce: section
            .duration("debounce", Duration::ZERO..Duration::from_secs(60))
            .unwrap_or(Duration::from_millis(5)),
    };
    section.finish();
    policy
}

fn limits(section: Section<'_, '_>) -> Limits {
    let entries = |key, default: u32, least: u64| {
        let asked = section.integer(key, least..(1 << 27));
        asked.and_then(|n| u32::try_from(n).ok()).unwrap_or(default)
    };
    let limits = Limits {
        conntrack: entries("conntrack", 262_144, 64),
        policy: entries("policy", 1_048_576, 64),
        ipcache: entries("ipcache", 262_144, 64),
        learned: entries("learned", 262_144, 64),
        rules: entries("rules", 65_536, 64),
        fragments: entries("fragments", 8_192, 16),
        events_per_second: entries("events_per_second", 1_000, 1),
        flows: entries("flows", 16_384, 16),
    };
    section.finish();
    limits
}

fn dns(section: Section<'_, '_>) -> Dns {
    const MAX: Duration = Duration::from_secs(30 * 86_400);
    let count = |key, default: u32| {
        let asked = section.integer(key, 1..(1 << 24));
        asked.and_then(|n| u32::try_from(n).ok()).unwrap_or(default)
    };
    let answers = [
        ("refused", DenyAnswer::Refused),
        ("nxdomain", DenyAnswer::NxDomain),
    ];
    let dns = Dns {
        min_ttl: section
            .duration("min_ttl", Duration::from_secs(1)..MAX)
            .unwrap_or(Duration::from_secs(30)),
        max_ttl: section
            .duration("max_ttl", Duration::from_secs(1)..MAX)
            .unwrap_or(Duration::from_secs(7 * 86_400)),
        addresses_per_name: count("addresses_per_name", 1_000),
        addresses_per_endpoint: count("addresses_per_endpoint", 100_000),
        follow_cname: section.boolean("follow_cname").unwrap_or(false),
        deny_answer: section
            .choice("deny_answer", &answers)
            .unwrap_or(DenyAnswer::Refused),
        prefetch: section.boolean("prefetch").unwrap_or(false),
        servers: section
            .servers("servers", 53)
            .unwrap_or_default()
            .into_iter()
            .map(|at| at.value)
            .collect(),
        refuse_special: section.boolean("refuse_special").unwrap_or(true),
        allow_special: allow_special(&section),
    };
    if dns.max_ttl < dns.min_ttl {
        section.error("dns.max_ttl is less than dns.min_ttl");
    }
    section.finish();
    dns
}

fn allow_special(section: &Section<'_, '_>) -> Vec<IpNet> {
    let mut prefixes = Vec::new();
    for at in section.prefixes("allow_special").unwrap_or_default() {
        if palisade_fqdn::is_special_prefix(&at.value) {
            prefixes.push(at.value);
        } else {
            section.error_at(
                at.offset,
                format!(
                    "{} does not lie in a special-purpose block (RFC 6890); name the block or a part of it",
                    at.value
                ),
            );
        }
    }
    prefixes
}

fn http(section: Section<'_, '_>) -> Http {
    // Heads are held whole; what is kept of one direction of a connection is twice that.
    const MAX_HEAD_BYTES: u64 = 128 << 10;
    let forms = [("both", Paths::Both), ("raw", Paths::Raw)];
    let bodies = [("refuse", GetBodies::Refuse), ("allow", GetBodies::Allow)];
    let default = http1::Limits::default();
    let bytes = |key, default: usize| {
        let asked = section.integer(key, 256..MAX_HEAD_BYTES + 1);
        asked.and_then(|n| usize::try_from(n).ok()).unwrap_or(default)
    };
    let block = bytes("max_head", default.block);
    let http = Http {
        paths: section.choice("path_normalization", &forms).unwrap_or_default(),
        get_bodies: section.choice("get_bodies", &bodies).unwrap_or_default(),
        header_timeout: handshake(&section, "header_timeout", 30),
        head: http1::Limits {
            line: bytes("max_line", default.line.min(block)),
            block,
        },
        record_headers: record_headers(&section),
    };
    if http.head.line > http.head.block {
        section.error("http.max_line is more than http.max_head");
    }
    section.finish();
    http
}

/// `record_headers`. A record has a few hundred bytes for them.
fn record_headers(section: &Section<'_, '_>) -> Vec<String> {
    const MAX_NAMES: usize = 16;
    const DEFAULT: [&str; 3] = ["content-type", "user-agent", "x-request-id"];
    let Some(asked) = section.header_names("record_headers") else {
        return DEFAULT.map(str::to_owned).to_vec();
    };
    let mut names: Vec<String> = Vec::new();
    for (position, at) in asked.into_iter().enumerate() {
        if position == MAX_NAMES {
            section.error_at(
                at.offset,
                format!("http.record_headers has more than {MAX_NAMES} names"),
            );
        }
        if names.contains(&at.value) {
            section.error_at(
                at.offset,
                format!("http.record_headers: '{}' is there twice", at.value),
            );
        } else {
            names.push(at.value);
        }
    }
    names
}

fn tls(section: Section<'_, '_>) -> Tls {
    let choices = [("allow-outer", Ech::AllowOuter), ("deny", Ech::Deny)];
    let tls = Tls {
        ech: section.choice("ech", &choices).unwrap_or_default(),
        hello_timeout: handshake(&section, "hello_timeout", 10),
        verify_sni_address: section.boolean("verify_sni_address").unwrap_or(false),
    };
    section.finish();
    tls
}

/// How long somebody may take to say what they want.
fn handshake(section: &Section<'_, '_>, key: &'static str, default: u64) -> Duration {
    section
        .duration(key, Duration::from_millis(100)..Duration::from_secs(3_600))
        .unwrap_or(Duration::from_secs(default))
}

fn timeouts(section: Section<'_, '_>) -> Timeouts {
    const MAX: Duration = Duration::from_secs(30 * 86_400);
    let of = |key, default: u64| {
        let asked = section.duration(key, Duration::from_millis(100)..MAX);
        asked.unwrap_or(Duration::from_secs(default))
    };
    let timeouts = Timeouts {
        tcp_opening: of("tcp_opening", 60),
        tcp_established: of("tcp_established", 8_000),
        tcp_closing: of("tcp_closing", 10),
        udp: of("udp", 60),
        other: of("other", 60),
        fragment: of("fragment", 10),
        trace_interval: section
            .duration("trace_interval", Duration::ZERO..MAX)
            .unwrap_or(Duration::from_secs(5)),
        sweep: of("sweep", 10),
    };
    section.finish();
    timeouts
}

fn worker(section: Section<'_, '_>) -> Worker {
    let modes = [
        ("poll", Mode::Poll),
        ("spin", Mode::Spin),
        ("busy-poll", Mode::BusyPoll),
    ];
    let failures = [("drop", OnFailure::Drop), ("pass", OnFailure::Pass)];
    let threads = section.integer("threads", 0..MAX_WORKERS as u64 + 1);
    // The rings of a socket have such sizes.
    let frames = section.integer("frames", 256..(1 << 17) + 1).filter(|frames| {
        let fits = frames.is_power_of_two();
        if !fits {
            section.error(format!("frames = {frames} must be a power of two"));
        }
        fits
    });
    let interface = section.string("interface").map(|at| {
        // One byte is left for the number of the end.
        if at.value.len() > 14 || !is_interface_name(&at.value) {
            section.error_at(
                at.offset,
                format!(
                    "'{}' cannot be the beginning of an interface's name (at most 14 bytes)",
                    at.value
                ),
            );
        }
        at.value
    });
    let worker = Worker {
        threads: threads.and_then(|n| usize::try_from(n).ok()).unwrap_or(0),
        mode: section.choice("mode", &modes).unwrap_or(Mode::Poll),
        on_failure: section.choice("on_failure", &failures).unwrap_or(OnFailure::Drop),
        frames: frames.and_then(|n| u32::try_from(n).ok()).unwrap_or(4_096),
        interface: interface.unwrap_or_else(|| "palisade".to_owned()),
    };
    section.finish();
    worker
}

fn attachment(section: &Section<'_, '_>) -> Attachment {
    let hooks = [
        ("auto", IngressHook::Auto),
        ("xdp", IngressHook::Xdp),
        ("tc", IngressHook::Tc),
    ];
    let modes = [
        ("native", XdpMode::Native),
        ("auto", XdpMode::Auto),
        ("skb", XdpMode::Skb),
    ];
    let tc = [
        ("auto", TcHook::Auto),
        ("tcx", TcHook::Tcx),
        ("clsact", TcHook::Clsact),
    ];
    Attachment {
        ingress: section.choice("ingress", &hooks).unwrap_or(IngressHook::Auto),
        xdp_mode: section.choice("xdp_mode", &modes).unwrap_or(XdpMode::Native),
        tc: section.choice("tc", &tc).unwrap_or(TcHook::Auto),
    }
}

fn interface(section: Section<'_, '_>, taken: &mut Taken) -> Option<Interface> {
    let name = interface_name(&section, "name", "\"eth0\"");
    if let Some(role) = section.string("role") {
        match role.value.as_str() {
            "host" => {}
            "endpoint" => section.error_at(
                role.offset,
                "the interface of a workload is named by its [[endpoint]]: interface = \"...\"",
            ),
            other => section.error_at(role.offset, format!("role '{other}' is not known; it is host")),
        }
    }
    let attachment = attachment(&section);
    let mut ether_types = [0; ETHER_TYPES];
    match section.ether_types("allow_ethertypes") {
        None => ether_types[..2].copy_from_slice(&DEFAULT_ETHER_TYPES),
        Some(list) => {
            if let Some(first_too_many) = list.get(ETHER_TYPES) {
                section.error_at(
                    first_too_many.offset,
                    format!("allow_ethertypes: at most {ETHER_TYPES}"),
                );
            }
            for (to, from) in ether_types.iter_mut().zip(&list) {
                *to = from.value;
            }
        }
    }
    if let Some(name) = &name {
        taken.interface(&section, name, "another [[interface]]");
    }
    section.finish();
    Some(Interface {
        name: name?.value,
        ether_types,
        attachment,
    })
}

/// The kernel's rule for names of interfaces: 1 to 15 bytes, no slash, no white space, not a dot or two.
fn interface_name(section: &Section<'_, '_>, key: &'static str, example: &str) -> Option<At<String>> {
    let at = section.required_string(key, example)?;
    let name = &at.value;
    if !is_interface_name(name) {
        section.error_at(
            at.offset,
            format!("'{name}' cannot be the name of an interface (at most 15 bytes, no '/', ':' or space)"),
        );
        return None;
    }
    Some(at)
}

fn is_interface_name(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace())
}

/// The labels of each `[[namespace]]`, beside its name.
fn namespaces(sections: Vec<Section<'_, '_>>) -> HashMap<String, Vec<Label>> {
    let mut namespaces = HashMap::new();
    for section in sections {
        let name = dns_name(&section, "name", "\"prod\"");
        let labels = own_labels(&section);
        if let Some(name) = name
            && namespaces.insert(name.value.clone(), labels).is_some()
        {
            section.error_at(name.offset, format!("there is another namespace {}", name.value));
        }
        section.finish();
    }
    namespaces
}

/// A name that may stand in `namespace/name` and in a label's value.
fn dns_name(section: &Section<'_, '_>, key: &'static str, example: &str) -> Option<At<String>> {
    let at = section.required_string(key, example)?;
    if valid_name(&at.value) {
        return Some(at);
    }
    section.error_at(
        at.offset,
        format!(
            "'{}' cannot be a name: letters, digits, '-', '_' and '.', at most 253 of them",
            at.value
        ),
    );
    None
}

fn valid_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

fn namespace_of(section: &Section<'_, '_>) -> Option<String> {
    let at = section.string("namespace")?;
    if !valid_name(&at.value) {
        section.error_at(at.offset, format!("'{}' cannot be a namespace", at.value));
        return None;
    }
    Some(at.value)
}

/// `labels`, as they were written.
fn own_labels(section: &Section<'_, '_>) -> Vec<Label> {
    let mut list = Vec::new();
    for (name, value) in section.strings("labels") {
        let label = labels::parse_label(&format!("{}={}", name.value, value.value));
        if name.value.is_empty() || label.key.is_empty() || name.value.contains(['=', ' ']) {
            section.error_at(
                name.offset,
                format!("'{}' cannot be the key of a label", name.value),
            );
        } else if RESERVED_SOURCES.contains(&label.source.as_str()) {
            section.error_at(
                name.offset,
                format!(
                    "labels of source '{}' are given by Palisade and cannot be configured",
                    label.source
                ),
            );
        } else {
            list.push(label);
        }
    }
    list
}

/// The labels that being in a namespace means.
fn namespace_labels(namespace: &str, namespaces: &HashMap<String, Vec<Label>>) -> Vec<Label> {
    let k8s = |key: String, value: &str| Label {
        source: "k8s".into(),
        key,
        value: value.to_owned(),
    };
    let mut list = vec![
        k8s(NAMESPACE_LABEL.into(), namespace),
        k8s(
            format!("{NAMESPACE_LABEL_PREFIX}{NAMESPACE_NAME_LABEL}"),
            namespace,
        ),
    ];
    for label in namespaces.get(namespace).into_iter().flatten() {
        list.push(k8s(
            format!("{NAMESPACE_LABEL_PREFIX}{}", label.key),
            &label.value,
        ));
    }
    list
}

/// `addresses` of an endpoint or of the node; each once, IPv4 as IPv4.
fn unique_addresses(section: &Section<'_, '_>) -> Vec<At<IpAddr>> {
    let mut list: Vec<At<IpAddr>> = Vec::new();
    for mut at in section.addresses("addresses").unwrap_or_default() {
        at.value = at.value.to_canonical();
        if list.iter().any(|other| other.value == at.value) {
            section.error_at(at.offset, format!("{} is there twice", at.value));
        } else {
            list.push(at);
        }
    }
    list
}

fn endpoint(
    section: Section<'_, '_>,
    namespaces: &HashMap<String, Vec<Label>>,
    taken: &mut Taken,
) -> Option<Endpoint> {
    let name = dns_name(&section, "name", "\"frontend\"");
    let namespace = namespace_of(&section).unwrap_or_else(|| "default".to_owned());
    let by = name.as_ref().map_or_else(
        || "another [[endpoint]]".to_owned(),
        |name| format!("endpoint {namespace}/{}", name.value),
    );
    let interface = interface_name(
        &section,
        "interface",
        "\"veth-front\" (the host side of its veth)",
    );
    if let Some(interface) = &interface {
        taken.interface(&section, interface, &by);
    }
    if let Some(name) = &name {
        taken.name(&section, name, &format!("endpoint {namespace}/{}", name.value));
    }
    let addresses = unique_addresses(&section);
    for at in &addresses {
        taken.address(&section, IpNet::from(at.value), at.offset, &by);
    }
    if addresses.is_empty() {
        section
            .error("[[endpoint]] needs addresses = [\"10.0.1.10\"]: what it sends from any other is dropped");
    }
    let mut all = namespace_labels(&namespace, namespaces);
    all.extend(own_labels(&section));
    let mut named_ports = NamedPorts::new();
    for (name, value) in section.strings("named_ports") {
        match named_port(&value.value) {
            Ok(port) => {
                named_ports.insert(name.value.to_ascii_lowercase(), port);
            }
            Err(message) => section.error_at(value.offset, message),
        }
    }
    let netns = section.string("netns").map(|at| {
        if at.value.contains('/') {
            PathBuf::from(at.value)
        } else {
            // Where iproute2 keeps namespaces that have a name.
            Path::new("/run/netns").join(at.value)
        }
    });
    let attachment = attachment(&section);
    section.finish();
    Some(Endpoint {
        name: name?.value,
        namespace,
        interface: interface?.value,
        addresses: addresses.into_iter().map(|at| at.value).collect(),
        labels: Labels::new(all),
        named_ports,
        netns,
        attachment,
    })
}

/// `8080/TCP`; without a protocol it is TCP, as in a container's ports.
fn named_port(text: &str) -> Result<NamedPort, String> {
    let (port, protocol) = text.split_once('/').unwrap_or((text, "TCP"));
    let protocol = match protocol.to_ascii_uppercase().as_str() {
        "TCP" => palisade_abi::protocol::TCP,
        "UDP" => palisade_abi::protocol::UDP,
        "SCTP" => palisade_abi::protocol::SCTP,
        _ => {
            return Err(format!(
                "'{protocol}' is no protocol with ports: TCP, UDP or SCTP"
            ));
        }
    };
    match port.parse() {
        Ok(port @ 1..) => Ok(NamedPort { protocol, port }),
        _ => Err(format!("'{text}' is not a port: write \"8080/TCP\"")),
    }
}

fn peer(
    section: Section<'_, '_>,
    namespaces: &HashMap<String, Vec<Label>>,
    taken: &mut Taken,
) -> Option<Peer> {
    const ENTITIES: [(&str, &str); 6] = [
        ("remote-node", "remote-node"),
        ("kube-apiserver", "kube-apiserver"),
        ("health", "health"),
        ("ingress", "ingress"),
        ("unmanaged", "unmanaged"),
        ("init", "init"),
    ];
    let name = dns_name(&section, "name", "\"db-1\"");
    let by = name.as_ref().map_or_else(
        || "another [[peer]]".to_owned(),
        |name| format!("peer {}", name.value),
    );
    if let Some(name) = &name {
        taken.name(&section, name, &by);
    }
    let mut addresses = Vec::new();
    for at in section.prefixes("addresses").unwrap_or_default() {
        taken.address(&section, at.value, at.offset, &by);
        addresses.push(at.value);
    }
    if addresses.is_empty() {
        section.error("[[peer]] needs addresses = [\"10.0.9.5/32\"]");
    }
    let entity = section.choice("entity", &ENTITIES);
    let namespace = namespace_of(&section);
    let own = own_labels(&section);
    let mut all = Vec::new();
    match entity {
        // Nodes and the like are in no namespace.
        Some(entity) => {
            if namespace.is_some() {
                section.error("an entity is in no namespace: leave out one of entity and namespace");
            }
            all.push(labels::reserved(entity));
        }
        None => {
            if own.is_empty() {
                section.error("[[peer]] needs labels = { app = \"database\" } or entity = \"remote-node\"");
            }
            all.extend(namespace_labels(
                namespace.as_deref().unwrap_or("default"),
                namespaces,
            ));
        }
    }
    all.extend(own);
    section.finish();
    Some(Peer {
        name: name?.value,
        addresses,
        labels: Labels::new(all),
    })
}

#[cfg(test)]
mod tests;
