//! `palisade bpf ct list` and `palisade bpf ct flush`, with real connections.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::TcpStream,
    process::Output,
};

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    probe::{Outcome, exchange, open},
    topology::{FAMILIES, Family},
};
use palisade_tests::{
    OPEN, World,
    fixtures::{
        apps::apps,
        back::{FROM_FRONT, from_db},
    },
    setup::{client_only, webs},
    world,
};
use serde_json::Value;

const WEB: u16 = 80;
/// Rules under which requests are inspected.
const RULES: &str = "      rules:\n        http:\n        - {path: \"/allowed\"}\n";

fn list(daemon: &Daemon, filters: &[&str]) -> Vec<Value> {
    let rows = daemon.json(&[&["bpf", "ct", "list"], filters].concat());
    rows.expect("list").as_array().cloned().expect("rows")
}

fn flush(daemon: &Daemon, filters: &[&str]) -> (u64, u64) {
    let flushed = daemon.json(&[&["bpf", "ct", "flush"], filters].concat());
    let flushed = flushed.unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    let number = |name: &str| flushed[name].as_u64().expect("a number");
    (number("flushed"), number("kept"))
}

fn sessions(world: &World) -> [TcpStream; 2] {
    FAMILIES.map(|family| {
        let to = world.at("back", family, WEB);
        open(world.ns("front"), None, to, OPEN).expect("session")
    })
}

fn echo(sessions: &mut [TcpStream; 2]) {
    for session in sessions {
        assert_eq!(exchange(session, OPEN), Outcome::Open, "{session:?}");
    }
}

#[test]
fn a_flush_removes_what_its_filters_select_and_allowed_connections_go_on() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("back.yaml", FROM_FRONT)])
        .expect("daemon");
    let mut open = sessions(&world);
    echo(&mut open);
    let [v4, v6] = FAMILIES.map(|family| world.topology.addr("front", family).to_string());
    let of = |address: &str| list(&daemon, &["default/back", "--address", address, "--port", "80"]).len();
    assert_eq!((of(&v4), of(&v6)), (1, 1), "{}", daemon.report());

    // Each filter selects, alone and with others.
    let port = open[0].local_addr().expect("address").port().to_string();
    for (filters, rows) in [
        (&["--endpoint", "default/back", "--address", &v4][..], 1),
        (&["default/back", "--port", &port], 1),
        (&["default/back", "--port", "80", "--protocol", "tcp"], 2),
        (&["default/back", "--port", "80", "--protocol", "udp"], 0),
        (&["default/back", "--port", "80", "--direction", "ingress"], 2),
        (&["default/back", "--port", "80", "--direction", "egress"], 0),
        (&["default/back", "--port", "80", "--identity", "1"], 0),
        (&["default/back", "--port", "81"], 0),
        (&["global", "--port", &port, "--address", &v4], 2),
    ] {
        assert_eq!(list(&daemon, filters).len(), rows, "{filters:?}");
    }
    let unknown = daemon
        .try_cli(&["bpf", "ct", "flush", "default/none"])
        .expect("command");
    assert!(!unknown.status.success());

    // What is not selected stays.
    assert_eq!(
        flush(&daemon, &["default/back", "--address", &v4, "--port", "80"]),
        (1, 0)
    );
    assert_eq!((of(&v4), of(&v6)), (0, 1));
    echo(&mut open);
    assert_eq!((of(&v4), of(&v6)), (1, 1));

    // Everything is removed only after a yes.
    let text = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    for args in [&["bpf", "ct", "flush"][..], &["bpf", "ct", "flush", "global"]] {
        let asked = daemon.try_cli(args).expect("command");
        assert!(
            !asked.status.success() && text(&asked).contains("--yes"),
            "{}",
            text(&asked)
        );
    }
    assert_eq!((of(&v4), of(&v6)), (1, 1));
    let (flushed, kept) = flush(&daemon, &["global", "--yes"]);
    assert!(flushed >= 4 && kept == 0, "{flushed} {kept}");
    assert_eq!((of(&v4), of(&v6)), (0, 0));
    echo(&mut open);
}

/// Without its entry, a denied connection would get a verdict in the direction of its next packet.
#[test]
fn a_flush_keeps_the_entries_of_connections_that_the_policies_deny() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("back.yaml", FROM_FRONT)])
        .expect("daemon");
    let mut open = sessions(&world);
    echo(&mut open);
    for family in FAMILIES {
        let to = world.topology.addr("back", family).to_string();
        let ping = world.ns("front").run("ping", &["-c1", "-W5", &to]);
        ping.expect("ping");
    }
    daemon.write("back.yaml", &from_db()).expect("write");
    daemon.settle().expect("settle");
    // No packet of these flows has got a verdict since.
    for protocol in ["icmp", "icmpv6"] {
        let filters = ["default/back", "--protocol", protocol, "--direction", "ingress"];
        let (flushed, kept) = flush(&daemon, &filters);
        assert!(
            flushed == 0 && kept >= 1,
            "{protocol}: {flushed} {kept}\n{}",
            daemon.report()
        );
    }
    // One is idle since, and of the other one a packet has been dropped.
    open[0].write_all(b"more").expect("write");
    let filters = ["default/back", "--port", "80", "--direction", "ingress"];
    assert_eq!(flush(&daemon, &filters), (0, 2), "{}", daemon.report());
    assert_eq!(list(&daemon, &filters).len(), 2);
    // The entries at the other end are of flows that its policies allow.
    assert_eq!(flush(&daemon, &["default/front", "--port", "80"]), (2, 0));
    daemon.write("back.yaml", FROM_FRONT).expect("write");
    daemon.settle().expect("settle");
    assert_eq!(flush(&daemon, &filters), (2, 0), "{}", daemon.report());
}

fn get(stream: &mut TcpStream) -> std::io::Result<bool> {
    stream.set_read_timeout(Some(OPEN))?;
    stream.write_all(b"GET /allowed HTTP/1.1\r\nHost: web\r\n\r\n")?;
    let mut all = Vec::new();
    let mut buffer = [0; 4_096];
    while !all.ends_with(b"hello from internet\n") {
        match stream.read(&mut buffer)? {
            0 => return Ok(false),
            n => all.extend_from_slice(&buffer[..n]),
        }
    }
    Ok(true)
}

/// The inspector does not know what has passed before: the connection could have been opened by either end.
#[test]
fn a_flush_resets_inspected_connections() {
    let apps = apps();
    let _webs = webs(&apps, ["internet"], &[WEB], &[]);
    let daemon = client_only(&apps, &[WEB], RULES);
    for family in FAMILIES {
        let to = apps.at("internet", family, WEB);
        let mut stream = open(apps.ns("client"), None, to, OPEN).expect("connection");
        for _ in 0..2 {
            assert!(get(&mut stream).expect("response"), "{}", daemon.report());
        }
        let address = to.ip().to_string();
        let (flushed, _) = flush(&daemon, &["default/client", "--address", &address]);
        assert_eq!(flushed, 1, "{}", daemon.report());
        let ended = get(&mut stream);
        assert!(
            ended
                .as_ref()
                .is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
            "{family:?}: {ended:?}\n{}",
            daemon.report()
        );
        let mut again = open(apps.ns("client"), None, to, OPEN).expect("connection");
        assert!(get(&mut again).expect("response"), "{}", daemon.report());
        if family == Family::V6 {
            assert!(!list(&daemon, &["default/client"]).is_empty());
        }
    }
}
