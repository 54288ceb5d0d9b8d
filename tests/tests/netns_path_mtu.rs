//! Paths with a smaller MTU than the links at both ends: Palisade delivers all bytes that it has acknowledged on behalf of
//! the receiver.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon, Ns,
    daemon::Settings,
    forge::{self, Forged, Wire},
    ns::wait_until,
    packet::{Packet, protocol},
    recorder::Recorder,
    topology::{FAMILIES, Family, INNER},
};
use palisade_tests::fixtures::apps::{Apps, OK, answers_requests, apps, borrowed, policies, policy};

const PORT: u16 = 80;
const RULES: &str = "      rules:\n        http: [{method: GET, path: \"/.*\"}]\n";
const TIMEOUT: Duration = Duration::from_secs(6);

/// The internet is a router here, with a host behind it.
struct Far {
    apps: Apps,
    far: Ns,
    addresses: [IpAddr; 2],
}

impl Far {
    fn new() -> Self {
        let apps = apps();
        let far = Ns::new("far").expect("namespace");
        let internet = apps.ns("internet");
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            // No rate limit for the errors of the router.
            ("ipv4/icmp_ratelimit", "0"),
            ("ipv6/icmp/ratelimit", "0"),
        ] {
            internet.sysctl(key, value).expect("sysctl");
        }
        internet
            .ip(&format!(
                "link add far0 type veth peer name eth0 netns {}\n\
                 addr add 203.0.113.1/24 dev far0\n\
                 addr add 2001:db8:a::1/64 dev far0 nodad\n\
                 link set far0 up\n",
                far.name()
            ))
            .expect("link");
        far.ip("addr add 203.0.113.10/24 dev eth0\n\
             addr add 2001:db8:a::10/64 dev eth0 nodad\n\
             link set eth0 up\n\
             route add default via 203.0.113.1\n\
             route add default via 2001:db8:a::1\n")
            .expect("link");
        Self {
            apps,
            far,
            addresses: [
                [203, 0, 113, 10].into(),
                "2001:db8:a::10".parse().expect("address"),
            ],
        }
    }

    fn recorder(&self) -> Recorder {
        Recorder::start(&self.far, &self.addresses, &[PORT], answers_requests).expect("recorder")
    }

    fn set_mtu(&self, mtu: u32) {
        self.apps
            .ns("internet")
            .ip(&format!("link set far0 mtu {mtu}\n"))
            .expect("mtu");
    }
}

fn connect(from: &Ns, to: SocketAddr) -> TcpStream {
    let stream = from
        .enter(|| TcpStream::connect_timeout(&to, Duration::from_secs(5)))
        .expect("connection");
    stream.set_nodelay(true).expect("option");
    stream
}

/// Returns a head that needs four packets or more.
fn head(first_line: &str) -> String {
    let filler = "X-Filler: 0123456789012345678901234567890123456789\r\n".repeat(100);
    format!("{first_line}\r\nHost: x.example\r\n{filler}\r\n")
}

#[test]
fn bytes_acknowledged_on_behalf_arrive_over_paths_with_a_small_mtu() {
    let world = Far::new();
    let recorder = world.recorder();
    let daemon = world
        .apps
        .daemon(
            &Settings::default(),
            &[("p.yaml", &policy("client", "egress", &[PORT], RULES))],
        )
        .expect("daemon");
    // The router reports packets that are too big, or is silent.
    for silent in [false, true] {
        if silent {
            world
                .apps
                .ns("internet")
                .nft(
                    "table inet silent {\nchain o {\ntype filter hook output priority 0;\n\
                     icmp type destination-unreachable drop;\nicmpv6 type packet-too-big drop;\n}\n}\n",
                )
                .expect("nft");
        }
        for mtu in [1_280, 1_420, 1_492] {
            world.set_mtu(mtu);
            for (address, family) in world.addresses.iter().zip(FAMILIES) {
                let mut stream = connect(world.apps.ns("client"), SocketAddr::new(*address, PORT));
                let head = head("GET /a HTTP/1.1");
                let (begin, end) = head.as_bytes().split_at(head.len() - 4);
                // Held until the head is complete, so these bytes are acknowledged on behalf of the server.
                stream.write_all(begin).expect("head");
                thread::sleep(Duration::from_millis(100));
                stream.write_all(end).expect("head");
                let since = Instant::now();
                let own = stream.local_addr().expect("address");
                let heard = recorder.wait(own, "the head", TIMEOUT, |heard| heard.bytes.len() >= head.len());
                let heard = heard.unwrap_or_else(|error| {
                    panic!(
                        "{family:?}, MTU {mtu}, silent {silent}: {error:#}\n{}",
                        daemon.report()
                    )
                });
                assert!(heard.bytes == head.as_bytes());
                println!("{family:?}, MTU {mtu}, silent {silent}: {:?}", since.elapsed());
            }
        }
    }
}

/// Returns a counter of the HTTP inspectors' connections.
fn counted(status: &serde_json::Value, name: &str) -> u64 {
    let number = &status["workers"]["inspection"]["http.tcp"][name];
    number.as_u64().unwrap_or_else(|| panic!("{name}: {status:#}"))
}

/// Sends a head in two parts, so that Palisade acknowledges the first on behalf of the server and then delivers it.
fn send_held(from: &Ns, stream: &mut TcpStream, head: &str) {
    let (begin, end) = head.as_bytes().split_at(head.len() - 4);
    stream.write_all(begin).expect("head");
    let port = stream.local_addr().expect("address").port();
    wait_until("the acknowledgement", TIMEOUT, || {
        let shown = from
            .run("ss", &["-Htn", "sport", "=", &format!(":{port}")])
            .expect("ss");
        // State, receive queue, send queue (bytes not acknowledged).
        shown.split_whitespace().nth(2) == Some("0")
    })
    .expect("acknowledgement");
    stream.write_all(end).expect("head");
}

/// Opens a connection on which Palisade delivers a head: out of the workload `client`, out of the node, or as the response
/// of the workload `server`.
fn deliver(world: &Far, recorder: &Recorder, listener: &TcpListener, way: &str, family: Family) {
    let address = world.addresses[usize::from(family == FAMILIES[1])];
    if way != "server" {
        let from = world.apps.ns(way);
        let mut stream = connect(from, SocketAddr::new(address, PORT));
        let head = head("GET /a HTTP/1.1");
        send_held(from, &mut stream, &head);
        let own = stream.local_addr().expect("address");
        let heard = recorder
            .wait(own, "the head", TIMEOUT, |heard| heard.bytes.len() >= head.len())
            .expect("head");
        assert!(heard.bytes == head.as_bytes());
        return;
    }
    let mut client = connect(&world.far, world.apps.at("server", family, PORT));
    client
        .write_all(b"GET /a HTTP/1.1\r\nHost: x.example\r\n\r\n")
        .expect("request");
    let (mut stream, _) = listener.accept().expect("connection");
    stream.set_nodelay(true).expect("option");
    assert!(stream.read(&mut [0; 256]).expect("request") > 0);
    let head = head("HTTP/1.1 204 No Content");
    send_held(world.apps.ns("server"), &mut stream, &head);
    let mut heard = vec![0; head.len()];
    client.set_read_timeout(Some(TIMEOUT)).expect("option");
    client.read_exact(&mut heard).expect("answer");
    assert!(heard == head.as_bytes());
}

/// The router's errors quote packets that Palisade made. They are addressed to the end whose source address these packets
/// have, and take effect on their way, before a retransmission timeout.
#[test]
fn packets_sent_on_behalf_shrink_to_the_mtu_that_a_router_reports() {
    let world = Far::new();
    let recorder = world.recorder();
    let listeners = FAMILIES.map(|family| {
        let at = world.apps.at("server", family, PORT);
        world
            .apps
            .ns("server")
            .enter(|| TcpListener::bind(at))
            .expect("listener")
    });
    let policies = policies(&[PORT], RULES);
    let daemon: Daemon = world
        .apps
        .daemon(&Settings::default(), &borrowed(&policies))
        .expect("daemon");
    for way in ["client", "node", "server"] {
        for mtu in [1_280, 1_420] {
            world.set_mtu(mtu);
            for (listener, family) in listeners.iter().zip(FAMILIES) {
                // Repeated, because a busy machine may delay packets beyond the retransmission timeout.
                let is_heard = (0..5).any(|_| {
                    let before = daemon.status().expect("status");
                    deliver(&world, &recorder, listener, way, family);
                    let narrowed = counted(&before, "icmp_narrowed") + 1;
                    let after = daemon
                        .wait_status("the router is heard", |status| {
                            counted(status, "icmp_narrowed") >= narrowed
                        })
                        .unwrap_or_else(|error| panic!("{way} {family:?} {mtu}: {error:#}"));
                    let more = |name| counted(&after, name) - counted(&before, name);
                    println!(
                        "{way} {family:?} {mtu}: {} errors, {} packets made, {} times repeated",
                        more("icmp_errors"),
                        more("delivered"),
                        more("repeated")
                    );
                    more("repeated") == 0
                });
                assert!(is_heard, "{way} {family:?} {mtu}: it was repeated each time");
            }
        }
    }
}

/// Returns the sequence number that an ICMP error quotes.
fn quoted_seq(packet: &Packet) -> Option<u32> {
    let (is_error, at) = if packet.source.is_ipv6() {
        (
            packet.protocol == protocol::ICMPV6 && packet.icmp?.0 < 128,
            8 + 40 + 4,
        )
    } else {
        (
            packet.protocol == protocol::ICMP && packet.icmp?.0 == 3,
            8 + 20 + 4,
        )
    };
    let bytes = packet.payload.get(at..at + 4).filter(|_| is_error)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// Sends forged errors about segments from `quoted.0` to `quoted.1`, and then one about a segment in flight. The first that
/// arrives at `to` must be that one.
fn flood(from: &Wire, router: IpAddr, to: &Wire, quoted: [SocketAddr; 2], forged: &[u32], under_way: u32) {
    let send = |seq: u32| {
        let [source, destination] = quoted;
        let segment = forge::Tcp::new(source.port(), destination.port()).seq(seq);
        let segment = segment.payload(&[7; 1_400]).bytes(source.ip(), destination.ip());
        let packet = forge::ip(source.ip(), destination.ip(), protocol::TCP, 64, &segment);
        let error = forge::too_big(router, source.ip(), 1_300, &packet[..packet.len().min(500)]);
        from.icmp(router, source.ip(), &error).expect("error");
    };
    to.drain();
    for seq in forged {
        send(*seq);
    }
    // A busy machine may lose some.
    let arrived = (0..20).find_map(|_| {
        send(under_way);
        to.wait(Duration::from_millis(500), quoted_seq)
    });
    assert_eq!(arrived, Some(under_way), "{quoted:?}");
    while let Some(seq) = to.wait(Duration::ZERO, quoted_seq) {
        assert_eq!(seq, under_way, "{quoted:?}");
    }
}

#[test]
fn forged_icmp_errors_reach_no_end_and_change_nothing() {
    const REQUEST: &[u8] = b"GET /a HTTP/1.1\r\nHost: x.example\r\n\r\n";
    let apps = apps();
    let recorder = Recorder::start(
        apps.ns("internet"),
        &apps.both("internet"),
        &[PORT],
        answers_requests,
    )
    .expect("recorder");
    let daemon = apps
        .daemon(&Settings::default(), &borrowed(&policies(&[PORT], RULES)))
        .expect("daemon");
    for family in FAMILIES {
        let gateway = apps.topology.get("client").gateway(family);
        let wire = || Wire::open(apps.ns("client"), INNER, gateway).expect("wire");
        let own = SocketAddr::new(apps.topology.addr("client", family), 24_321);
        let server = apps.at("internet", family, PORT);
        let client = Forged::open(wire(), own, server, &[], |_| Vec::new()).expect("connection");
        client.send(&client.segment(1).payload(REQUEST)).expect("request");
        let answer = |heard: &forge::ReceivedSegment| heard.payload == OK;
        client.wait(TIMEOUT, answer).expect("answer");
        // The server has received all bytes of the client, so only a bare acknowledgement can be in flight.
        let next = client.isn.wrapping_add(1 + REQUEST.len() as u32);
        let spread = |near: u32, except: std::ops::RangeInclusive<u32>| -> Vec<u32> {
            let wide = (0..1_000).map(|n: u32| n.wrapping_mul(0x0041_c64d));
            let close = (0..100).chain((0..100).map(|n: u32| n.wrapping_neg()));
            let forged = wide.chain(close).filter(|n| !except.contains(n));
            forged.map(|n| near.wrapping_add(n)).collect()
        };
        let internet =
            Wire::open(apps.ns("internet"), INNER, apps.topology.addr("node", family)).expect("wire");
        let router: IpAddr = match family {
            Family::V4 => [203, 0, 113, 9].into(),
            Family::V6 => "2001:db8:a::9".parse().expect("address"),
        };
        let forged = spread(next, 0..=0);
        flood(&internet, router, &client.wire, [own, server], &forged, next);
        // The response is in flight until the client acknowledges it, which it never does.
        let first = client.syn_ack.seq.wrapping_add(1);
        let forged = spread(first, 0..=OK.len() as u32);
        flood(
            &wire(),
            own.ip(),
            &internet,
            [server, own],
            &forged,
            first.wrapping_add(10),
        );
        // The connection continues.
        let request = client.segment(1 + REQUEST.len() as u32);
        let request = request.ack(first.wrapping_add(OK.len() as u32));
        client.send(&request.payload(REQUEST)).expect("request");
        client
            .wait(TIMEOUT, |heard| answer(heard) && heard.seq != first)
            .expect("answer");
        assert_eq!(recorder.bytes(own), REQUEST.repeat(2));
    }
    let status = daemon
        .wait_status("the errors", |status| counted(status, "icmp_unrelated") > 0)
        .expect("status");
    println!(
        "{} errors, {} of them about nothing under way",
        counted(&status, "icmp_errors"),
        counted(&status, "icmp_unrelated")
    );
    let records = daemon.cli(&["observe", "--last", "4000"]).expect("records");
    let records: Vec<_> = records
        .lines()
        .filter(|line| line.contains("not in flight"))
        .collect();
    println!("{}", records.join("\n"));
    assert!((1..200).contains(&records.len()), "{}", records.len());
}

/// A long body is offloaded, but errors about it are not lost: the server learns of a smaller MTU.
#[test]
fn icmp_errors_about_an_offloaded_body_reach_its_sender() {
    const LENGTH: usize = 4 << 20;
    let world = Far::new();
    let daemon = world
        .apps
        .daemon(
            &Settings::default(),
            &[("p.yaml", &policy("server", "ingress", &[PORT], RULES))],
        )
        .expect("daemon");
    world.set_mtu(1_300);
    for family in FAMILIES {
        let at = world.apps.at("server", family, PORT);
        let server = world.apps.ns("server");
        let listener = server.enter(|| TcpListener::bind(at)).expect("listener");
        let sender = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("connection");
            assert!(stream.read(&mut [0; 256]).expect("request") > 0);
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {LENGTH}\r\n\r\n");
            stream.write_all(head.as_bytes()).expect("head");
            stream.write_all(&vec![b'b'; LENGTH]).expect("body");
            head.len()
        });
        let mut client = connect(&world.far, at);
        client
            .write_all(b"GET /a HTTP/1.1\r\nHost: x.example\r\n\r\n")
            .expect("request");
        client.set_read_timeout(Some(TIMEOUT)).expect("option");
        let mut heard = Vec::new();
        let mut block = [0; 1 << 16];
        while heard.len() < LENGTH {
            let n = client.read(&mut block).unwrap_or_else(|error| {
                panic!("{family:?}: {error}, {} bytes\n{}", heard.len(), daemon.report())
            });
            assert!(n > 0);
            heard.extend_from_slice(&block[..n]);
        }
        let head = sender.join().expect("server");
        client
            .read_exact(&mut block[..LENGTH + head - heard.len()])
            .expect("the rest");
        assert!(heard[head..].iter().all(|byte| *byte == b'b'));
    }
    let status = daemon
        .wait_status("the window", |status| {
            counted(status, "windows") >= 2 && counted(status, "icmp_errors") >= 2
        })
        .expect("status");
    let unrelated = counted(&status, "icmp_unrelated");
    println!(
        "{} errors, {unrelated} of them unrelated",
        counted(&status, "icmp_errors")
    );
}
