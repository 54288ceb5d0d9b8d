//! The testbed itself, to show that tests can rely on it.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
    time::Duration,
};

use palisade_testbed::{
    Ns, Outcome, Topology,
    capture::Capture,
    load::{Leak, TcpLoad, UdpLoad},
    ns::wait_until,
    packet::{self, protocol},
    probe::{self, Kind, Probe, connect, exchange, run_all, send_raw},
    server::{Echo, Iperf3, Nginx},
    topology::{FAMILIES, Family, INNER, WorkloadSpec},
};

const SOON: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(5);

fn topology() -> Topology {
    Topology::new()
        .and_then(|t| t.apps(&["front", "back"]))
        .and_then(|t| t.internet_addresses(&["203.0.113.10", "2001:db8:a::10"]))
        .expect("topology")
}

fn far(family: Family) -> IpAddr {
    match family {
        Family::V4 => [203, 0, 113, 10].into(),
        Family::V6 => "2001:db8:a::10".parse().expect("address"),
    }
}

#[test]
fn all_workloads_connect_and_probes_distinguish_open_refused_and_dropped() {
    let t = topology();
    let mut probes = Vec::new();
    let mut expected = Vec::new();
    let mut servers = Vec::new();
    for family in FAMILIES {
        let back = t.addr("back", family);
        servers.push(Echo::start(t.ns("back"), &[back], &[80], &[53]).expect("echo"));
        servers.push(
            Echo::start(
                &t.internet,
                &[t.addr("internet", family), far(family)],
                &[80],
                &[53],
            )
            .expect("echo"),
        );
        servers.push(Echo::start(&t.node, &[t.addr("node", family)], &[80], &[53]).expect("echo"));
        for (from, to) in [
            ("front", back),
            ("front", far(family)),
            ("front", t.addr("node", family)),
            ("node", back),
            ("internet", back),
            ("internet", t.addr("node", family)),
        ] {
            for (kind, port) in [
                (Kind::Tcp, 80),
                (Kind::Udp(64), 53),
                (Kind::Udp(4000), 53),
                (Kind::Ping(4000), 0),
            ] {
                let probe = Probe {
                    from: t.ns(from).clone(),
                    source: None,
                    to: SocketAddr::new(to, port),
                    kind,
                };
                probes.push((probe, LONG));
                expected.push(Outcome::Open);
            }
        }
        let from_far = |kind, port| Probe {
            from: t.internet.clone(),
            source: Some(far(family)),
            to: SocketAddr::new(back, port),
            kind,
        };
        probes.push((from_far(Kind::Tcp, 80), LONG));
        expected.push(Outcome::Open);
        probes.push((from_far(Kind::Tcp, 81), LONG));
        expected.push(Outcome::Refused);
        probes.push((from_far(Kind::Udp(64), 54), LONG));
        expected.push(Outcome::Refused);
    }
    assert_eq!(run_all(&probes), expected, "{probes:#?}");
    let reached = servers[0].reached(far(Family::V4), SocketAddr::new(t.addr("back", Family::V4), 80));
    assert_eq!(
        reached, 1,
        "the server saw the connection from the bound source address"
    );

    t.node
        .nft("table inet f { chain c { type filter hook forward priority 0; policy drop; }; }")
        .expect("nft");
    for (probe, timeout) in &mut probes {
        *timeout = SOON;
        probe.from = t.ns("front").clone();
        probe.source = None;
    }
    let to_back = |p: &Probe| FAMILIES.iter().any(|f| p.to.ip() == t.addr("back", *f));
    probes.retain(|(p, _)| to_back(p));
    assert!(probes.len() > 10);
    assert_eq!(run_all(&probes), vec![Outcome::TimedOut; probes.len()]);
}

#[test]
fn server_and_client_programs_work_in_namespaces() {
    let t = topology();
    let _nginx = Nginx::start(t.ns("back"), "back", &[80, 8080], 100_000).expect("nginx");
    let _iperf = Iperf3::start(t.ns("back"), 5201).expect("iperf3");
    for family in FAMILIES {
        let back = t.addr("back", family);
        let url = format!("http://{}/", SocketAddr::new(back, 8080));
        assert_eq!(
            t.ns("front")
                .run("curl", &["-sS", "-m", "5", &url])
                .expect("curl"),
            "hello from back\n"
        );
        let big = t
            .ns("front")
            .run("curl", &["-sS", "-m", "5", &format!("{url}big")])
            .expect("curl");
        assert_eq!(big.len(), 100_000);
        let json = t
            .ns("front")
            .run(
                "iperf3",
                &[
                    "-c",
                    &back.to_string(),
                    "-n",
                    "1M",
                    "-J",
                    "--connect-timeout",
                    "3000",
                ],
            )
            .expect("iperf3");
        assert!(json.contains("sum_received"), "{json}");
    }
}

#[test]
fn loads_count_lost_and_received_data() {
    let t = topology();
    let (front, back) = (t.ns("front"), t.ns("back"));
    for family in FAMILIES {
        let at = |port| SocketAddr::new(t.addr("back", family), port);
        let tcp = TcpLoad::start(front, back, at(7001), Duration::from_millis(1)).expect("tcp load");
        let udp = UdpLoad::start(front, back, at(7002), Duration::from_millis(1)).expect("udp load");
        assert!(tcp.moves(50, LONG) && udp.moves(50, LONG));
        let (tcp, udp) = (tcp.finish(LONG), udp.finish());
        assert!(tcp.whole() && tcp.sent >= 50, "{tcp:?}");
        assert_eq!((udp.lost(), udp.duplicated, udp.changed), (0, 0, 0), "{udp:?}");
    }
    // One datagram of twenty is dropped. If the count did not show that, tests that rely on it would prove nothing.
    t.node
        .nft(
            "table inet f { chain c { type filter hook forward priority 0; udp dport 7002 numgen inc mod 20 0 drop; \
             tcp dport 7001 numgen inc mod 50 0 drop; }; }",
        )
        .expect("nft");
    let at = |port| SocketAddr::new(t.addr("back", Family::V4), port);
    let tcp = TcpLoad::start(front, back, at(7001), Duration::from_millis(1)).expect("tcp load");
    let udp = UdpLoad::start(front, back, at(7002), Duration::from_millis(1)).expect("udp load");
    assert!(tcp.moves(100, LONG) && udp.moves(100, LONG));
    let (tcp, udp) = (tcp.finish(LONG), udp.finish());
    assert!(udp.lost() >= 5 && udp.lost() <= udp.sent / 20 + 1, "{udp:?}");
    assert!(tcp.whole() && tcp.retransmitted > 0, "{tcp:?}");
    // A blocked connection transfers nothing, and `finish` returns nevertheless.
    let tcp = TcpLoad::start(front, back, at(7003), Duration::from_millis(1)).expect("tcp load");
    assert!(tcp.moves(10, LONG));
    t.node
        .nft("table inet g { chain c { type filter hook forward priority 0; tcp dport 7003 drop; }; }")
        .expect("nft");
    assert!(!tcp.moves(300, SOON));
    let report = tcp.finish(SOON);
    assert!(!report.whole() && report.changed == 0, "{report:?}");
}

#[test]
fn the_leak_probe_sees_packets_only_if_they_pass() {
    let t = topology();
    for family in FAMILIES {
        let to = SocketAddr::new(t.addr("back", family), 9);
        let start = || {
            Leak::start(
                t.ns("front"),
                t.addr("front", family),
                (t.ns("back"), INNER),
                to,
                Duration::from_millis(2),
            )
            .expect("leak prober")
        };
        let open = start();
        open.keep_trying(20, LONG).expect("attempts");
        let report = open.finish();
        assert!(report.leaked as u64 >= report.tried / 2, "{report:?}");
        t.node
            .nft("table inet f { chain c { type filter hook forward priority 0; policy drop; }; }")
            .expect("nft");
        let closed = start();
        closed.keep_trying(50, LONG).expect("attempts");
        let report = closed.finish();
        assert_eq!(report.leaked, 0, "{report:?}");
        t.node.nft("delete table inet f").expect("nft");
    }
}

#[test]
fn open_connections_last_and_raw_packets_and_fragments_are_captured() {
    let t = topology();
    for family in FAMILIES {
        let back = t.addr("back", family);
        let _echo = Echo::start(t.ns("back"), &[back], &[80], &[53]).expect("echo");
        let mut stream =
            probe::open(t.ns("front"), None, SocketAddr::new(back, 80), LONG).expect("connection");
        assert_eq!(exchange(&mut stream, LONG), Outcome::Open);
        let capture = Capture::start(t.ns("back"), INNER).expect("capture");
        send_raw(
            t.ns("front"),
            None,
            back,
            protocol::SCTP,
            &packet::sctp_init(5000, 2905),
        )
        .expect("raw");
        capture
            .wait("the SCTP packet", LONG, |p| {
                p.protocol == protocol::SCTP && p.ports == Some((5000, 2905))
            })
            .expect("seen");
        assert_eq!(
            probe::udp(t.ns("front"), None, SocketAddr::new(back, 53), 4000, LONG),
            Outcome::Open
        );
        capture
            .wait_for(3, "fragments", LONG, |p| {
                !p.outgoing && p.fragment && p.protocol == protocol::UDP
            })
            .expect("seen");
        assert_eq!(exchange(&mut stream, LONG), Outcome::Open);
    }
}

#[test]
fn workloads_can_be_plugged_and_unplugged() {
    let mut t = topology();
    t.declare(WorkloadSpec::new("late").label("app", "late"))
        .expect("declare");
    assert!(t.node.ifindex("veth-late").is_err());
    t.plug("late").expect("plug");
    let late = t.addr("late", Family::V4);
    assert_eq!(probe::ping(t.ns("front"), None, late, 56, LONG), Outcome::Open);
    t.unplug("late").expect("unplug");
    assert_ne!(probe::ping(t.ns("front"), None, late, 56, SOON), Outcome::Open);
    t.plug("late").expect("plug");
    assert_eq!(probe::ping(t.ns("front"), None, late, 56, LONG), Outcome::Open);
}

#[test]
fn nothing_is_left_after_a_panic_or_a_killed_process() {
    let exists = |name: &str| Path::new("/run/netns").join(name).exists();
    let (name, pid) = {
        let ns = Ns::new("gone").expect("namespace");
        let mut child = ns.command("sleep").arg("1000").spawn().expect("sleep");
        let pid = child.id();
        let name = ns.name().to_owned();
        assert!(exists(&name));
        drop(ns);
        child.wait().expect("killed with its namespace");
        (name, pid)
    };
    assert!(!exists(&name) && !Path::new(&format!("/proc/{pid}")).exists());

    let (send, receive) = std::sync::mpsc::channel();
    let panicked = std::thread::spawn(move || {
        let ns = Ns::new("panic").expect("namespace");
        send.send(ns.name().to_owned()).expect("receiver");
        panic!("on purpose");
    });
    let name = receive.recv().expect("name");
    assert!(panicked.join().is_err());
    assert!(!exists(&name));

    // A namespace of a process that has ended: `true` had this pid.
    let mut dead = Command::new("true").spawn().expect("true");
    let dead_pid = dead.id();
    dead.wait().expect("true");
    let orphan = format!("pal-{dead_pid}-0-orphan");
    assert!(
        Command::new("ip")
            .args(["netns", "add", &orphan])
            .status()
            .expect("ip")
            .success()
    );
    let mut left = Command::new("nsenter")
        .args([&format!("--net=/run/netns/{orphan}"), "sleep", "1000"])
        .spawn()
        .expect("nsenter");
    let alive = Ns::new("alive").expect("namespace");
    palisade_testbed::ns::sweep();
    left.wait().expect("killed");
    assert!(!exists(&orphan), "swept");
    assert!(exists(alive.name()), "the living are left alone");
}

#[test]
fn a_child_is_killed_when_its_thread_ends() {
    let ns = Ns::new("deathsig").expect("namespace");
    let pid = std::thread::scope(|s| {
        s.spawn(|| ns.command("sleep").arg("1000").spawn().expect("sleep").id())
            .join()
            .expect("thread")
    });
    wait_until("sleep is gone", LONG, || {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| s.contains(") Z ")) // A zombie.
    })
    .expect("killed");
    let back = SocketAddr::new([127, 0, 0, 1].into(), 1);
    assert_eq!(connect(&ns, back, LONG), Outcome::Refused);
}
