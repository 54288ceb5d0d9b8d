//! An attacker uses TCP options, not sequence numbers, to change what the receiver reads.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    process::Command,
    time::Duration,
};

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    forge::{Forged, ReceivedSegment, Tcp, Wire, option},
    ns::serial,
    process::output_with_input,
    rawtcp::flags,
    recorder::Recorder,
    topology::{FAMILIES, Family, INNER, NIC},
};
use palisade_tests::{
    OPEN,
    fixtures::apps::{Apps, OK, answers_requests, apps, borrowed, policies},
};
use socket2::{Domain, Protocol, Socket, Type};

const PORT: u16 = 80;
const IPPROTO_MPTCP: i32 = 262;
const MPTCP: u8 = 30;
/// The attacker's key; its SHA-256 gives the first data sequence number (RFC 8684, section 3.1).
const KEY: [u8; 8] = *b"Palisade";

const PATHS: &str = "      rules:\n        http: [{method: GET, path: /public}]\n";
const NAMES: &str = "      serverNames: [good.example]\n";
const QUERIES: &str = "      rules:\n        dns: [{matchPattern: \"*.example\"}]\n";

/// Out of a workload and into one, into the node and out of it, and where two policies inspect one packet.
const PAIRS: &[(&str, &str)] = &[
    ("client", "internet"),
    ("internet", "server"),
    ("internet", "node"),
    ("node", "internet"),
    ("client", "server"),
    ("client", "node"),
];

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let out = output_with_input(&mut Command::new("sha256sum"), bytes, OPEN).expect("sha256sum");
    let text = String::from_utf8(out.stdout).expect("text");
    let mut sum = [0; 32];
    for (n, byte) in sum.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * n..2 * n + 2], 16).expect("hexadecimal");
    }
    sum
}

/// Returns the data sequence number of the first byte after the handshake, for a key.
fn first_data(key: &[u8]) -> u64 {
    let sum = sha256(key);
    u64::from_be_bytes(sum[24..].try_into().expect("eight bytes")).wrapping_add(1)
}

fn mptcp_socket(at: SocketAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(at);
    Socket::new(domain, Type::STREAM, Some(Protocol::from(IPPROTO_MPTCP)))
}

fn mptcp_listener(at: SocketAddr) -> io::Result<TcpListener> {
    let socket = mptcp_socket(at)?;
    socket.set_reuse_address(true)?;
    socket.bind(&at.into())?;
    socket.listen(16)?;
    Ok(socket.into())
}

/// Starts a server with MPTCP, at both addresses of a name.
fn recorder(apps: &Apps, name: &str) -> Recorder {
    let listeners = FAMILIES
        .into_iter()
        .map(|family| {
            let at = apps.at(name, family, PORT);
            apps.ns(name).enter(|| mptcp_listener(at)).expect("listener")
        })
        .collect();
    Recorder::on(listeners, answers_requests).expect("recorder")
}

struct World {
    // Declared first: the daemon must end before the namespaces are removed.
    daemon: Option<Daemon>,
    recorders: Vec<(&'static str, Recorder)>,
    apps: Apps,
    policies: usize,
}

impl World {
    fn new() -> Self {
        let apps = apps();
        for name in ["client", "server", "node", "internet"] {
            apps.ns(name).sysctl("mptcp/enabled", "1").expect("MPTCP");
        }
        let recorders = ["server", "node", "internet"].map(|name| (name, recorder(&apps, name)));
        Self {
            daemon: None,
            recorders: recorders.into(),
            apps,
            policies: 0,
        }
    }

    fn guarded(rules: &str) -> Self {
        Self::guarded_where(rules, |_| true)
    }

    /// Starts the daemon with the policies whose name is `wanted`.
    fn guarded_where(rules: &str, wanted: fn(&str) -> bool) -> Self {
        let mut world = Self::new();
        let mut policies = policies(&[PORT], rules);
        policies.retain(|(name, _)| wanted(name));
        world.policies = policies.len();
        let daemon = world.apps.daemon(&Settings::default(), &borrowed(&policies));
        world.daemon = Some(daemon.expect("daemon"));
        world
    }

    fn recorder(&self, name: &str) -> &Recorder {
        let found = self.recorders.iter().find(|(at, _)| *at == name);
        &found.expect("recorder").1
    }

    fn report(&self) -> String {
        self.daemon.as_ref().map(Daemon::report).unwrap_or_default()
    }

    fn wire(&self, from: &str, to: &str, family: Family) -> Wire {
        let topology = &self.apps.topology;
        let (interface, gateway) = match (from, to) {
            ("client", _) => (INNER, topology.get("client").gateway(family)),
            ("internet", _) => (INNER, topology.addr("node", family)),
            ("node", "internet") => (NIC, topology.addr("internet", family)),
            _ => panic!("no wire from {from} to {to}"),
        };
        Wire::open(self.apps.ns(from), interface, gateway).expect("wire")
    }

    /// Opens a connection, with MPTCP if the other end offers it.
    fn open(&self, from: &str, to: &str, family: Family, in_syn: &[u8]) -> Forged {
        let port = 20_000 + (serial() % 9_000) as u16;
        let local = SocketAddr::new(self.apps.source(from, to, family), port);
        let remote = self.apps.at(to, family, PORT);
        Forged::open(
            self.wire(from, to, family),
            local,
            remote,
            in_syn,
            |answer| match answer.option(MPTCP) {
                Some(data) if data.len() >= 10 => {
                    let server = data[2..10].try_into().expect("a key");
                    option::mp_capable(&[KEY, server], None)
                }
                _ => Vec::new(),
            },
        )
        .unwrap_or_else(|error| panic!("{from} -> {to} {family:?}: {error:#}\n{}", self.report()))
    }

    /// Waits until the server has received a text from an attacker, or for `timeout`. Returns all bytes that it has
    /// received.
    fn heard(&self, to: &str, from: SocketAddr, text: &str, timeout: Duration) -> Vec<u8> {
        let contains = |bytes: &[u8]| bytes.windows(text.len()).any(|w| w == text.as_bytes());
        let _ = self
            .recorder(to)
            .wait(from, text, timeout, |heard| contains(&heard.bytes));
        self.recorder(to).bytes(from)
    }
}

fn request(method: &str, path: &str) -> Vec<u8> {
    format!("{method} {path} HTTP/1.1\r\nHost: x.example\r\n\r\n").into()
}

/// Sends an allowed request, then its beginning again, mapped onto data that the receiver already has, and after it a
/// denied request at the following sequence number. Returns what the server has received.
fn remap(world: &World, from: &str, to: &str, family: Family) -> Vec<u8> {
    let syn = [option::mss(1_400), option::mp_capable(&[], None)].concat();
    let own = world.open(from, to, family, &syn);
    let data = first_data(&KEY);
    let public = request("GET", "/public");
    let server_key = own.syn_ack.option(MPTCP).map(|option| option[2..10].to_vec());
    let begin = match &server_key {
        Some(key) => {
            let keys = [KEY, key[..].try_into().expect("a key")];
            option::mp_capable(&keys, Some(public.len() as u16))
        }
        // Without MPTCP, the test still sends the denied request without a mapping.
        None => Vec::new(),
    };
    let at_isn = own.isn.wrapping_add(1);
    let end = at_isn.wrapping_add(public.len() as u32);
    let mut acked = false;
    for _ in 0..8 {
        own.send(&own.segment(1).option(&begin).payload(&public))
            .expect("request");
        acked = own
            .wait(Duration::from_millis(700), |heard| heard.ack == end)
            .is_some();
        if acked {
            break;
        }
    }
    assert!(acked, "{from} -> {to} {family:?}: no answer\n{}", world.report());
    world.heard(to, own.local, "/public", OPEN);
    let disguise = b"GET /public HTTP/1.1\r\nA: ";
    let denied = request("DELETE", "/admin");
    let first = 1 + public.len() as u32;
    let second = first + disguise.len() as u32;
    let old = option::dss(None, data, first, disguise.len() as u16, true);
    let new = option::dss(
        None,
        data + public.len() as u64,
        second,
        denied.len() as u16,
        true,
    );
    for _ in 0..3 {
        own.send(&own.segment(first).option(&old).payload(disguise))
            .expect("the disguise");
        own.send(&own.segment(second).option(&new).payload(&denied))
            .expect("the denied request");
        world.heard(to, own.local, "DELETE", Duration::from_millis(300));
    }
    world.recorder(to).bytes(own.local)
}

#[test]
fn without_http_rules_the_remapped_request_arrives() {
    // Without this, the test below would prove nothing.
    let world = World::new();
    for family in FAMILIES {
        let heard = remap(&world, "client", "internet", family);
        let expected = [request("GET", "/public"), request("DELETE", "/admin")].concat();
        assert_eq!(
            String::from_utf8_lossy(&heard),
            String::from_utf8_lossy(&expected)
        );
    }
}

#[test]
fn a_denied_request_mapped_by_mptcp_after_an_allowed_one_does_not_arrive() {
    let world = World::guarded(PATHS);
    for family in FAMILIES {
        for (from, to) in PAIRS {
            let heard = remap(&world, from, to, family);
            let text = String::from_utf8_lossy(&heard);
            assert!(
                text.starts_with("GET /public") && !text.contains("DELETE"),
                "{from} -> {to} {family:?}: {text}\n{}",
                world.report()
            );
        }
    }
}

#[test]
fn an_mptcp_client_and_an_mptcp_server_fall_back_to_tcp() {
    let world = World::guarded(PATHS);
    for family in FAMILIES {
        for (from, to) in PAIRS {
            let at = world.apps.at(to, family, PORT);
            let mut stream: TcpStream = world
                .apps
                .ns(from)
                .enter(|| -> io::Result<TcpStream> {
                    let socket = mptcp_socket(at)?;
                    socket.connect_timeout(&at.into(), OPEN)?;
                    Ok(socket.into())
                })
                .unwrap_or_else(|error| panic!("{from} -> {to}: {error}\n{}", world.report()));
            stream.set_read_timeout(Some(OPEN)).expect("timeout");
            for _ in 0..3 {
                stream.write_all(&request("GET", "/public")).expect("request");
                let mut answer = vec![0; OK.len()];
                stream
                    .read_exact(&mut answer)
                    .unwrap_or_else(|error| panic!("{from} -> {to}: {error}\n{}", world.report()));
                assert_eq!(answer, OK);
            }
        }
    }
}

#[test]
fn neither_end_sees_options_that_change_what_a_segment_means() {
    let world = World::guarded(PATHS);
    let odd = [
        option::mss(1_400),
        option::SACK_PERMITTED.into(),
        option::mp_capable(&[], None),
        option::fast_open(&[1, 2, 3, 4, 5, 6, 7, 8]),
        option::any(253, &[0xf9, 0x89]),
    ]
    .concat();
    for family in FAMILIES {
        for (from, to) in PAIRS {
            let own = world.open(from, to, family, &odd);
            let options = |kind| own.syn_ack.option(kind);
            assert!(options(2).is_some() && options(4).is_some(), "{:?}", own.syn_ack);
            for kind in [MPTCP, 34, 253, 254] {
                assert_eq!(options(kind), None, "{from} -> {to} {family:?}: {kind}");
            }
            // An option of an unknown kind is removed from a later segment, which is forwarded.
            let public = request("GET", "/public");
            let end = own.isn.wrapping_add(1 + public.len() as u32);
            own.send(&own.segment(1).option(&[172, 4, 1, 1]).payload(&public))
                .expect("request");
            let acked = own.wait(OPEN, |heard| heard.ack == end);
            assert!(acked.is_some(), "{from} -> {to} {family:?}\n{}", world.report());
        }
    }
}

#[test]
fn mptcp_is_disabled_on_inspected_connections() {
    // DNS rules are for egress only.
    let egress = |name: &str| name.contains("egress");
    for world in [World::guarded(NAMES), World::guarded_where(QUERIES, egress)] {
        let is_dns = world.policies == 2;
        for family in FAMILIES {
            for (from, to) in PAIRS.iter().filter(|(from, _)| !is_dns || *from != "internet") {
                let syn = [option::mss(1_400), option::mp_capable(&[], None)].concat();
                let own = world.open(from, to, family, &syn);
                assert_eq!(own.syn_ack.option(MPTCP), None, "{from} -> {to} {family:?}");
                let dss = option::dss(None, 1, 1, 5, false);
                own.send(&own.segment(1).option(&dss).payload(b"hello"))
                    .expect("data");
                let isn = own.isn;
                let acked = own.wait(Duration::from_millis(100), |heard| {
                    heard.ack != isn.wrapping_add(1)
                });
                assert!(acked.is_none(), "{from} -> {to} {family:?}: {acked:?}");
                assert!(world.recorder(to).bytes(own.local).is_empty());
            }
        }
    }
}

#[test]
fn multipath_and_signature_options_in_a_later_segment_are_refused() {
    let world = World::guarded(PATHS);
    for family in FAMILIES {
        for (from, to) in PAIRS {
            let own = world.open(from, to, family, &option::mss(1_400));
            let public = request("GET", "/public");
            for bad in [
                option::dss(None, 1, 1, public.len() as u16, false),
                option::any(MPTCP, &[0x80, 0, 0, 0]),
                option::md5([7; 16]),
                option::any(29, &[1, 1, 9, 9, 9, 9]),
                // A length that does not fit.
                vec![8, 4, 1, 1],
                vec![1, 1, 1, 30],
            ] {
                own.send(&own.segment(1).option(&bad).payload(&public))
                    .expect("request");
            }
            let heard = world.heard(to, own.local, "GET", Duration::from_millis(200));
            assert!(heard.is_empty(), "{from} -> {to} {family:?}\n{}", world.report());
            own.send(&own.segment(1).payload(&public)).expect("request");
            let heard = world.heard(to, own.local, "GET", OPEN);
            assert_eq!(heard, public, "{from} -> {to} {family:?}\n{}", world.report());
        }
    }
    let daemon = world.daemon.as_ref().expect("daemon");
    daemon
        .wait_flows(
            &["--verdict", "DROPPED"],
            "the reason is in the flow log",
            |flows| {
                let text = format!("{flows:?}");
                text.contains("MPTCP option") && text.contains("signature option")
            },
        )
        .expect("flows");
}

#[test]
fn data_in_a_syn_is_not_accepted_with_any_fast_open_cookie() {
    let world = World::guarded(PATHS);
    for name in ["server", "node", "internet"] {
        // For all listeners, without a cookie.
        world
            .apps
            .ns(name)
            .sysctl("ipv4/tcp_fastopen", "1538")
            .expect("fast open");
    }
    for family in FAMILIES {
        for (from, to) in PAIRS {
            for cookie in [
                option::fast_open(&[]),
                option::fast_open(&[7; 8]),
                option::any(254, &[0xf9, 0x89, 7, 7, 7, 7]),
            ] {
                let port = 20_000 + (serial() % 9_000) as u16;
                let local = SocketAddr::new(world.apps.source(from, to, family), port);
                let remote = world.apps.at(to, family, PORT);
                let wire = world.wire(from, to, family);
                let syn = Tcp::new(port, PORT)
                    .seq(7)
                    .flags(flags::SYN)
                    .option(&option::mss(1_400))
                    .option(&cookie)
                    .payload(&request("DELETE", "/admin"));
                wire.tcp(local.ip(), remote.ip(), &syn).expect("SYN");
                let acked =
                    |heard: &ReceivedSegment| heard.ack.wrapping_sub(7) > 1 && heard.flags & flags::RST == 0;
                let answer = wire.wait_tcp(Duration::from_millis(150), remote, local, acked);
                assert!(answer.is_none(), "{from} -> {to} {family:?}: {answer:?}");
                let heard = world.recorder(to).bytes(local);
                assert!(heard.is_empty(), "{from} -> {to} {family:?}");
            }
        }
    }
}
