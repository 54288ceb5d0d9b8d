//! Reads each section of the configuration into its type of [`super::model`].

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use palisade_abi::{ETHER_TYPES, MAX_WORKERS};
use palisade_inspect::{Ech, GetBodies, Paths};
use palisade_model::{
    inventory::{Enforcement, NamedPort, NamedPorts},
    labels::{self, Labels},
    rule::Label,
};
use palisade_protocols::http1;
use palisade_worker::Mode;
use toml::de::DeTable;

use super::{
    hubble::hubble,
    labels::{dns_name, namespace_labels, namespace_of, namespaces, own_labels, valid_name},
    model::{
        Attachment, Config, DEFAULT_INTERFACE, DEFAULT_PIN_DIR, DEFAULT_SOCKET, DEFAULT_STATE_DIR,
        DenyAnswer, Dns, Endpoint, Http, IngressHook, Interface, Kafka, Limits, NoSni, Node, OnFailure, Peer,
        Policy, TcHook, Timeouts, Tls, WithoutPolicies, Worker, XdpMode,
    },
    reader::{At, Reader, Section},
};

/// Default of `allow_ethertypes`: frames of these EtherTypes pass, besides frames to the link-local control group. PTP
/// (IEEE 1588) sets the clock of a NIC. EAPOL (IEEE 802.1X) opens a switch port and can be sent to unicast addresses.
/// Neither carries packets of other protocols.
const DEFAULT_ETHER_TYPES: [u16; 2] = [0x88f7, 0x888e];

pub(super) fn read(path: &Path, reader: &Reader<'_>, table: &DeTable<'_>) -> Config {
    let root = Section::root(reader, table);
    let node = node(root.table("node"));
    let mut config = Config {
        path: path.to_owned(),
        text: Arc::default(),
        hubble: hubble(root.table("hubble"), &node.socket),
        node,
        failsafe: super::Failsafe::default(),
        policy: policy(root.table("policy"), path),
        limits: limits(root.table("limits")),
        timeouts: timeouts(root.table("timeouts")),
        dns: dns(root.table("dns")),
        http: http(root.table("http")),
        kafka: kafka(root.table("kafka")),
        tls: tls(root.table("tls"), path),
        worker: worker(root.table("worker")),
        metrics: super::metrics::read(root.table("metrics")),
        interfaces: Vec::new(),
        endpoints: Vec::new(),
        peers: Vec::new(),
        discover: Vec::new(),
        exports: Vec::new(),
    };
    let namespaces = namespaces(root.tables("namespace"));
    let mut taken = Taken::default();
    for (end, link) in [
        ("0", "the punt link"),
        ("1", "the punt link"),
        ("pi", "a proxy link"),
        ("pe", "a proxy link"),
    ] {
        let name = format!("{}{end}", config.worker.interface);
        taken
            .interfaces
            .insert(name, format!("{link} ([worker] interface)"));
    }
    for address in &config.node.addresses {
        taken
            .addresses
            .insert(IpNet::from(*address), "the node".to_owned());
    }
    for section in root.tables("interface") {
        config.interfaces.extend(interface(section, &mut taken));
    }
    let nics: Vec<&str> = config.interfaces.iter().map(|nic| nic.name.as_str()).collect();
    config.failsafe = super::failsafe::read(root.table("failsafe"), &nics);
    for section in root.tables("endpoint") {
        config
            .endpoints
            .extend(endpoint(section, &namespaces, &mut taken));
    }
    for section in root.tables("peer") {
        config.peers.extend(peer(section, &namespaces, &mut taken));
    }
    let links = ["0", "1", "pi", "pe"].map(|end| format!("{}{end}", config.worker.interface));
    let links = links
        .into_iter()
        .map(|name| (name, "a link of Palisade's own".to_owned()));
    let nics = config
        .interfaces
        .iter()
        .map(|interface| (interface.name.clone(), "an [[interface]]".to_owned()));
    let reserved: Vec<(String, String)> = nics.chain(links).collect();
    config.discover = super::discover::read(root.tables("discover"), &namespaces, &reserved);
    config.exports = super::export::read(root.tables("export"), reader);
    root.finish();
    config
}

/// Interfaces, names and addresses that must be unique. The values of the maps are the sections that have the interface
/// or address.
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

/// Maximum of `[limits] discovered`: endpoint numbers have 16 bits.
const MAX_DISCOVERED: u64 = 60_000;

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
        discovered: section
            .integer("discovered", 1..MAX_DISCOVERED + 1)
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(4_096),
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
    // A request head is buffered completely. A connection can buffer 256 KiB per direction, twice this limit.
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
        clear_text_http2: section.boolean("clear_text_http2").unwrap_or(false),
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

/// Returns `record_headers`. A record has room for a few hundred bytes of header fields, so the list is limited.
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

fn kafka(section: Section<'_, '_>) -> Kafka {
    const DEFAULT: usize = 2 << 20;
    // A connection keeps a request of this length.
    const MAX_REQUEST_BYTES: u64 = 16 << 20;
    let max_request = section.integer("max_request", (64 << 10)..MAX_REQUEST_BYTES + 1);
    let kafka = Kafka {
        max_request: max_request
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or(DEFAULT),
        request_timeout: handshake(&section, "request_timeout", 30),
        share_topic_ids: section.boolean("share_topic_ids").unwrap_or(true),
    };
    section.finish();
    kafka
}

fn tls(section: Section<'_, '_>, config: &Path) -> Tls {
    const MAX_CONNECTIONS: u64 = 1 << 20;
    let choices = [("allow-outer", Ech::AllowOuter), ("deny", Ech::Deny)];
    let nameless = [("check-address", NoSni::CheckAddress), ("refuse", NoSni::Refuse)];
    let secrets_dir = section.string("secrets_dir").map_or_else(
        || PathBuf::from("/etc/palisade/secrets"),
        |at| config.parent().unwrap_or(Path::new("/")).join(at.value),
    );
    let interception_ca = section.string("interception_ca").and_then(|at| {
        let is_secret = at
            .value
            .split_once('/')
            .is_some_and(|(namespace, name)| valid_name(namespace) && valid_name(name));
        if is_secret {
            return Some(at.value);
        }
        section.error_at(
            at.offset,
            format!("'{}' names no secret: write \"NAMESPACE/NAME\"", at.value),
        );
        None
    });
    let count = |key, bounds| {
        section
            .integer(key, bounds)
            .and_then(|n: u64| usize::try_from(n).ok())
    };
    let max_connections = count("max_connections", 1..MAX_CONNECTIONS + 1).unwrap_or(16_384);
    let of_endpoint = count("max_connections_per_endpoint", 1..MAX_CONNECTIONS + 1);
    if of_endpoint.is_some_and(|of_endpoint| of_endpoint > max_connections) {
        section.error("tls.max_connections_per_endpoint is more than tls.max_connections");
    }
    let tls = Tls {
        ech: section.choice("ech", &choices).unwrap_or_default(),
        hello_timeout: handshake(&section, "hello_timeout", 10),
        verify_sni_address: section.boolean("verify_sni_address").unwrap_or(false),
        secrets_dir,
        interception_ca,
        no_sni: section.choice("no_sni", &nameless).unwrap_or(NoSni::CheckAddress),
        handshake_timeout: handshake(&section, "handshake_timeout", 10),
        connect_timeout: handshake(&section, "connect_timeout", 10),
        response_timeout: section
            .duration(
                "response_timeout",
                Duration::ZERO..Duration::from_secs(7 * 86_400),
            )
            .unwrap_or(Duration::from_secs(3_600)),
        idle_timeout: section
            .duration(
                "idle_timeout",
                Duration::from_secs(1)..Duration::from_secs(7 * 86_400),
            )
            .unwrap_or(Duration::from_secs(3_600)),
        proxy_threads: count("proxy_threads", 0..MAX_WORKERS as u64 + 1).unwrap_or(0),
        max_connections,
        // So that one endpoint cannot keep out the others.
        max_connections_per_endpoint: of_endpoint.unwrap_or(max_connections.div_ceil(2)),
    };
    section.finish();
    tls
}

/// Returns the time within which a client must complete its request head or ClientHello.
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
    // The number of descriptors of an AF_XDP ring must be a power of two (`xsk_init_queue`).
    let frames = section.integer("frames", 256..(1 << 17) + 1).filter(|frames| {
        let fits = frames.is_power_of_two();
        if !fits {
            section.error(format!("frames = {frames} must be a power of two"));
        }
        fits
    });
    let interface = section.string("interface").map(|at| {
        // Of the 15 bytes of an interface name, two are reserved for the end of a proxy link.
        if at.value.len() > 13 || !is_interface_name(&at.value) {
            section.error_at(
                at.offset,
                format!(
                    "'{}' cannot be the beginning of an interface's name (at most 13 bytes)",
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
        interface: interface.unwrap_or_else(|| DEFAULT_INTERFACE.to_owned()),
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
            other => section.error_at(
                role.offset,
                format!("role '{other}' is not known; write role = \"host\""),
            ),
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

/// Returns an interface name that is valid by the kernel's rule (`dev_valid_name`): 1 to 15 bytes, no slash, colon or
/// white space, and neither `.` nor `..`.
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
    if name == "lo" {
        section.error_at(
            at.offset,
            "the loopback cannot be guarded: programs of the node reach each other by it, and policy would cut 127.0.0.1",
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

/// Returns the `addresses` of an endpoint or of the node without duplicates. IPv4-mapped addresses are returned as
/// IPv4.
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
            // iproute2 mounts named network namespaces in this directory.
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

/// Parses `8080/TCP`; TCP without a protocol, as in a container's ports.
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
        // Nodes and other entities have no namespace.
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
