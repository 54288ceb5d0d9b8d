//! Reloads, crashes, restarts, connections older than Palisade, and a full conntrack map, under traffic. Nothing allowed is
//! lost or changed, nothing denied passes.

use std::{
    net::TcpStream,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon, Outcome,
    daemon::{Hooks, Settings},
    load::Leak,
    probe::{exchange, open},
    topology::{FAMILIES, Family, INNER},
};
use palisade_tests::{
    CLOSED, OPEN,
    fixtures::traffic::{DENIED, PACE, Traffic, policy},
    flows, world,
};

fn reload_under_load(hooks: Hooks) {
    let world = world();
    let daemon = world
        .daemon(
            Settings {
                hooks,
                ..Settings::default()
            },
            &[("loads.yaml", &policy(0))],
        )
        .expect("daemon");
    let traffic = FAMILIES.map(|family| Traffic::start(&world, family));
    let start = Instant::now();
    let mut n = 1;
    while n < 40 && start.elapsed() < Duration::from_secs(12) {
        daemon.apply(&[("loads.yaml", &policy(n))]).expect("apply");
        n += 1;
    }
    assert!(n >= 10, "only {n} reloads in {:?}", start.elapsed());
    for t in &traffic {
        t.moves(&daemon);
    }
    for t in traffic {
        t.finish(&format!("{n} reloads"));
    }
}

#[test]
fn reload_under_load_loses_and_leaks_nothing_with_tcx() {
    reload_under_load(Hooks {
        endpoint: "tc",
        host: "xdp",
        tc: "tcx",
    });
}

#[test]
fn reload_under_load_loses_and_leaks_nothing_with_xdp_and_clsact() {
    reload_under_load(Hooks {
        endpoint: "xdp",
        host: "tc",
        tc: "clsact",
    });
}

#[test]
fn a_policy_change_stops_and_resumes_a_live_connection() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("loads.yaml", &policy(0))])
        .expect("daemon");
    for family in FAMILIES {
        daemon.apply(&[("loads.yaml", &policy(0))]).expect("apply");
        let traffic = Traffic::start(&world, family);
        traffic.moves(&daemon);
        let deny = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: deny-front}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingressDeny:
  - fromEndpoints: [{matchLabels: {app: front}}]
";
        daemon
            .apply(&[("loads.yaml", &policy(0)), ("deny.yaml", deny)])
            .expect("apply");
        // Packets that were in flight when the policy was enforced.
        std::thread::sleep(Duration::from_millis(50));
        assert!(
            !traffic.tcp.moves(1, CLOSED),
            "TCP passes against the policy\n{}",
            daemon.report()
        );
        assert!(
            !traffic.udp.moves(1, CLOSED),
            "UDP passes against the policy\n{}",
            daemon.report()
        );
        assert!(traffic.from_outside.moves(10, OPEN), "others are not touched");
        daemon.apply(&[("loads.yaml", &policy(1))]).expect("apply");
        assert!(
            traffic.udp.moves(10, OPEN),
            "UDP is allowed again\n{}",
            daemon.report()
        );
        assert!(
            traffic.tcp.moves(10, OPEN),
            "TCP is allowed again, and has lost nothing\n{}",
            daemon.report()
        );
        let tcp = traffic.tcp.finish(OPEN);
        assert!(tcp.whole(), "{tcp:?}");
        assert_eq!(traffic.leak.finish().leaked, 0);
    }
}

fn kill9_and_restart_under_load(hooks: Hooks) {
    let world = world();
    let mut daemon = world
        .daemon(
            Settings {
                hooks,
                ..Settings::default()
            },
            &[("loads.yaml", &policy(0))],
        )
        .expect("daemon");
    let traffic = FAMILIES.map(|family| Traffic::start(&world, family));
    let everyone = |daemon: &Daemon| traffic.iter().for_each(|t| t.moves(daemon));
    everyone(&daemon);
    let new_flows = "front -> back udp/80 drop
        far -> back tcp/80 drop
        db -> back tcp/80 drop
        back -> db tcp/80 open";
    for round in 0..3 {
        daemon.kill9().expect("kill -9");
        everyone(&daemon);
        assert_eq!(
            world.check(new_flows).expect("check"),
            [""; 0],
            "while the daemon is dead"
        );
        if round == 1 {
            // The policy on disk differs from the one that is enforced.
            daemon.write("loads.yaml", &policy(3)).expect("policy");
        }
        daemon.restart().expect("restart");
        everyone(&daemon);
        world.expect(&daemon, new_flows);
    }
    daemon.terminate().expect("SIGTERM");
    everyone(&daemon);
    assert_eq!(world.check(new_flows).expect("check"), [""; 0], "after SIGTERM");
    daemon.restart().expect("restart");
    everyone(&daemon);
    for t in traffic {
        t.finish("kill -9 and restart");
    }
}

#[test]
fn kill9_and_restart_under_load_lose_and_leak_nothing_with_tcx() {
    kill9_and_restart_under_load(Hooks {
        endpoint: "tc",
        host: "xdp",
        tc: "tcx",
    });
}

#[test]
fn kill9_and_restart_under_load_lose_and_leak_nothing_with_xdp_and_clsact() {
    kill9_and_restart_under_load(Hooks {
        endpoint: "xdp",
        host: "tc",
        tc: "clsact",
    });
}

/// `back` allows ingress from `front` only; the node allows ingress from outside to ssh only.
const SEEDED: &str = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: back}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: db}
spec:
  endpointSelector: {matchLabels: {app: db}}
  egress:
  - {}
---
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress:
  - fromEntities: [world]
    toPorts:
    - ports: [{port: \"22\", protocol: TCP}]
";

#[test]
fn connections_older_than_palisade_keep_working_unless_the_policy_denies_their_direction() {
    let world = world();
    let connect = |from: &str, to: &str, family, port| -> TcpStream {
        let to = world.at(to, family, port);
        let mut stream = open(world.ns(from), None, to, OPEN).expect("connection");
        assert_eq!(exchange(&mut stream, OPEN), Outcome::Open);
        stream
    };
    let (mut kept, mut cut) = (Vec::new(), Vec::new());
    for family in FAMILIES {
        for (from, to, port) in [
            ("front", "back", 80), // Allowed.
            ("back", "far", 443),  // Egress is not restricted; the replies are ingress of `back`.
            ("back", "pfront", 80),
            ("back", "node", 80), // Denied by the node's policy: see below.
            ("far", "node", 22),
            ("node", "far", 80), // The replies are ingress of the node.
            ("node", "front", 80),
        ] {
            let stream = connect(from, to, family, port);
            let denied = (from, to) == ("back", "node");
            if denied { &mut cut } else { &mut kept }
                .push((format!("{family:?} {from} -> {to}:{port}"), stream));
        }
        for (from, to, port) in [
            ("pfront", "back", 80),
            ("internet", "back", 80),
            ("db", "far", 80),
            ("internet", "node", 80),
        ] {
            cut.push((
                format!("{family:?} {from} -> {to}:{port}"),
                connect(from, to, family, port),
            ));
        }
    }
    let daemon = world
        .daemon(Settings::default(), &[("seeded.yaml", SEEDED)])
        .expect("daemon");
    for (name, stream) in &mut kept {
        assert_eq!(
            exchange(stream, OPEN),
            Outcome::Open,
            "{name}\n{}",
            daemon.report()
        );
    }
    for (name, stream) in &mut cut {
        assert_eq!(
            exchange(stream, CLOSED),
            Outcome::TimedOut,
            "{name}\n{}",
            daemon.report()
        );
    }
    let seeded = daemon.status().expect("status")["conntrack"]["seeded"].as_u64();
    assert!(seeded >= Some(kept.len() as u64), "{seeded:?}");
    // A stream whose entry is in no table: its next packet is a reply without a flow.
    world.expect(&daemon, "far -> back tcp/80 drop\nback -> far tcp/80 open");
}

#[test]
fn conntrack_is_also_seeded_from_nf_conntrack() {
    let world = world();
    world.topology.track_connections().expect("conntrack");
    let mut streams: Vec<_> = FAMILIES
        .iter()
        .map(|family| {
            let mut stream =
                open(world.ns("back"), None, world.at("far", *family, 443), OPEN).expect("connection");
            assert_eq!(exchange(&mut stream, OPEN), Outcome::Open);
            stream
        })
        .collect();
    let daemon = world
        .daemon(
            Settings {
                seed: false,
                ..Settings::default()
            },
            &[("seeded.yaml", SEEDED)],
        )
        .expect("daemon");
    for stream in &mut streams {
        assert_eq!(exchange(stream, OPEN), Outcome::Open, "{}", daemon.report());
    }
}

#[test]
fn a_full_conntrack_map_is_reported_and_passes_nothing_denied() {
    let world = world();
    let settings = Settings {
        tables: "[limits]\nconntrack = 128\n".into(),
        ..Settings::default()
    };
    let daemon = world
        .daemon(settings, &[("loads.yaml", &policy(0))])
        .expect("daemon");
    let family = Family::V4;
    let leak = Leak::start(
        world.ns("front"),
        world.addr("front", family),
        (world.ns("back"), INNER),
        world.at("back", family, DENIED),
        2 * PACE,
    )
    .expect("leak prober");
    // Several times the capacity of the map, all allowed, all open at the same time.
    let mut streams: Vec<_> = (0..500)
        .map(|_| open(world.ns("front"), None, world.at("db", family, 80), OPEN).expect("connection"))
        .collect();
    let status = daemon
        .wait_status("evictions are counted", |s| {
            s["conntrack"]["evicted"].as_u64() > Some(100)
        })
        .expect("evictions");
    assert!(
        status["conntrack"]["entries"].as_u64() <= Some(128 * 2),
        "{status:#}"
    );
    for (n, stream) in streams.iter_mut().enumerate() {
        assert_eq!(
            exchange(stream, OPEN),
            Outcome::Open,
            "connection {n}\n{}",
            daemon.report()
        );
    }
    let report = leak.finish();
    assert!(report.tried > 100 && report.leaked == 0, "{report:?}");
    world.expect(
        &daemon,
        "front -> back tcp/81 drop\nfar -> back tcp/80 drop\nfront -> db tcp/80 open",
    );
    flows::expect(
        &daemon,
        &world,
        ("far", "back"),
        80,
        "DROPPED",
        Some("default/loads-0"),
    );
}
