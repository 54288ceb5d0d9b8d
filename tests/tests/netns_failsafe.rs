//! Failsafe ports: an operator keeps access to the node whatever the policy says, and nothing else is open.

use std::net::TcpStream;

use palisade_testbed::{
    Daemon, Outcome,
    daemon::Settings,
    probe::{exchange, open},
    topology::FAMILIES,
};
use palisade_tests::{OPEN, World, flows, world};
use serde_json::Value;

/// The node denies everything, by default and by deny rules.
const CLOSED: &str = "
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress:
  - {}
  ingressDeny:
  - fromEntities: [all]
  egress:
  - {}
  egressDeny:
  - toEntities: [all]
";

fn settings(failsafe: &str) -> Settings {
    Settings {
        tables: format!("[failsafe]\n{failsafe}\n"),
        ..Settings::default()
    }
}

const LISTS: &str = "inbound = [\n  \"tcp/22\",\n  \"tcp/443 from 203.0.113.10,2001:db8:a::10\",\n  \
    \"tcp/81 from 192.0.2.0/24,2001:db8:c::/48\",\n]\noutbound = [\"udp/53\"]";

fn connect(world: &World, from: &str, to: &str, port: u16) -> Vec<TcpStream> {
    FAMILIES
        .map(|family| {
            let to = world.at(to, family, port);
            let mut stream = open(world.ns(from), None, to, OPEN).expect("connection");
            assert_eq!(exchange(&mut stream, OPEN), Outcome::Open);
            stream
        })
        .into()
}

fn all_answer(streams: &mut [TcpStream], daemon: &Daemon) {
    for stream in streams {
        assert_eq!(exchange(stream, OPEN), Outcome::Open, "{}", daemon.report());
    }
}

fn texts(list: &Value) -> Vec<String> {
    let list = list.as_array();
    let texts = list.into_iter().flatten().filter_map(Value::as_str);
    texts.map(str::to_owned).collect()
}

const EXPECTED: &str = "far -> node tcp/22 open
     near -> node tcp/22 open
     far -> node tcp/80 drop
     far -> node udp/53 drop
     far -> node tcp/443 open
     near -> node tcp/443 drop
     remote-db -> node tcp/81 open
     node2 -> node tcp/81 open
     far -> node tcp/81 drop
     node -> far udp/53 open
     node -> far udp/80 drop
     node -> far tcp/22 drop
     front -> node tcp/22 drop
     node -> front udp/53 drop";

#[test]
fn a_node_that_denies_everything_stays_reachable_by_its_failsafe_ports_only() {
    let world = world();
    let mut sessions = connect(&world, "far", "node", 22);
    let _cut = connect(&world, "far", "node", 80);
    let mut daemon = world.daemon(settings(LISTS), &[]).expect("daemon");
    daemon.apply(&[("node.yaml", CLOSED)]).expect("apply");
    all_answer(&mut sessions, &daemon);
    world.expect(&daemon, EXPECTED);
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains("that are established"));
    let line = line.unwrap_or_else(|| panic!("{log}"));
    assert!(line.contains(":80 by ") && !line.contains(":22 by "), "{line}");
    flows::expect(&daemon, &world, ("far", "node"), 22, "FORWARDED", None);
    let flow = daemon
        .flows(&["--to-port", "22", "--verdict", "FORWARDED", "--last", "50"])
        .expect("flows");
    let text = serde_json::to_string(&flow).expect("json");
    assert!(text.contains("failsafe tcp/22 inbound"), "{text}");

    let rows = daemon.json(&["bpf", "policy", "get", "host"]).expect("rows");
    let rows = rows.as_array().expect("rows");
    let row = rows
        .iter()
        .find(|row| row["decided_by"].to_string().contains("failsafe tcp/22 inbound"));
    let row = row.expect("the entry of the failsafe port");
    assert!(row["packets"].as_u64() > Some(0), "{row}");

    let status = daemon.status().expect("status");
    let notes = texts(&status["notes"]);
    assert!(
        notes
            .iter()
            .any(|text| text.contains("node.yaml:") && text.contains("failsafe tcp/22 inbound")),
        "{notes:?}"
    );
    let traced = daemon
        .cli(&[
            "policy",
            "trace",
            "--from",
            "203.0.113.10",
            "--to",
            "host",
            "--port",
            "22",
        ])
        .expect("trace");
    assert!(
        traced.contains("ALLOWED (a failsafe port of the node"),
        "{traced}"
    );
    assert!(traced.contains("failsafe tcp/22 inbound"), "{traced}");

    // A daemon that dies or starts again changes nothing.
    daemon.kill9().expect("kill");
    all_answer(&mut sessions, &daemon);
    world.expect(
        &daemon,
        "far -> node tcp/22 open\n far -> node tcp/80 drop\n front -> node tcp/22 drop",
    );
    daemon.restart().expect("restart");
    all_answer(&mut sessions, &daemon);
    world.expect(&daemon, EXPECTED);
}

#[test]
fn a_reload_opens_and_closes_failsafe_ports() {
    let world = world();
    let daemon = world
        .daemon(settings("inbound = []"), &[("node.yaml", CLOSED)])
        .expect("daemon");
    world.expect(&daemon, "far -> node tcp/22 drop");
    let status = daemon.status().expect("status");
    assert!(
        texts(&status["warnings"])
            .iter()
            .any(|text| text.contains("no TCP connection from outside can reach this node")),
        "{status}"
    );
    daemon
        .configure(
            &world.topology,
            &palisade_tests::with_peers(settings("inbound = [\"tcp/22\"]")),
        )
        .expect("configure");
    daemon.cli(&["reload"]).expect("reload");
    world.expect(
        &daemon,
        "far -> node tcp/22 open\n far -> node tcp/80 drop\n front -> node tcp/22 drop",
    );
    daemon
        .configure(
            &world.topology,
            &palisade_tests::with_peers(settings("inbound = []")),
        )
        .expect("configure");
    daemon.cli(&["reload"]).expect("reload");
    world.expect(&daemon, "far -> node tcp/22 drop");
}

#[test]
fn failsafe_ports_hold_under_enforcement_always_and_are_not_needed_without_enforcement() {
    let world = world();
    let daemon = world
        .daemon(
            Settings {
                enforcement: "always",
                ..settings(LISTS)
            },
            &[],
        )
        .expect("daemon");
    world.expect(&daemon, EXPECTED);
}
