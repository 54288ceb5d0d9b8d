//! Upgrade of the layout of the maps under traffic, crashes at each of its steps, and the refused downgrade. Nothing
//! allowed is lost or changed, nothing denied passes.
//!
//! The earlier version is the daemon under test with another number: its pin directory is renamed while no daemon runs.
//! The attached programs do not notice, because they hold their maps, and the next start finds what an earlier version
//! leaves. The layouts of versions 5 and 6 are the same in what is handed down (crates/datapath/src/upgrade.rs).

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    time::Duration,
};

use palisade_testbed::{
    Daemon, Outcome,
    daemon::{Hooks, Settings},
    ns::wait_until,
    probe::{exchange, open},
    topology::FAMILIES,
};
use palisade_tests::{
    OPEN,
    fixtures::traffic::{Traffic, policy},
    world,
};

/// `palisade_abi::VERSION`, which this crate does not depend on.
const OWN: u32 = 7;

/// Port of a server outside.
const OUTGOING: u16 = 7100;

const NEW_FLOWS: &str = "front -> back udp/80 drop
    far -> back tcp/80 drop
    db -> back tcp/80 drop
    back -> db tcp/80 open";

/// Renames the maps of a daemon that does not run.
fn rename(daemon: &Daemon, from: u32, to: u32) {
    let dir = |version| daemon.pins().join(format!("v{version}"));
    fs::rename(dir(from), dir(to)).expect("pins of the daemon");
}

#[track_caller]
fn only_own_maps(daemon: &Daemon) {
    let mut names: Vec<String> = fs::read_dir(daemon.pins())
        .expect("pins")
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with('v'))
        .collect();
    names.sort();
    assert_eq!(names, [format!("v{OWN}")], "{}", daemon.report());
}

fn upgrade_under_load(hooks: Hooks) {
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
    // `back` may not be reached from outside: a packet of the server passes only with the flow's conntrack entry.
    let mut outgoing = FAMILIES.map(|family| {
        let at = world.at("far", family, OUTGOING);
        let listener = world
            .ns("internet")
            .enter(|| TcpListener::bind(at))
            .expect("listener");
        let client = open(world.ns("back"), None, at, OPEN).expect("connection");
        client.set_read_timeout(Some(OPEN)).expect("option");
        (client, listener.accept().expect("connection").0)
    });
    let everyone = |daemon: &Daemon| traffic.iter().for_each(|t| t.moves(daemon));
    everyone(&daemon);
    for round in 0..2 {
        if round == 0 {
            daemon.kill9().expect("kill -9");
        } else {
            daemon.terminate().expect("SIGTERM");
            // The upgrade brings another policy.
            daemon.write("loads.yaml", &policy(3)).expect("policy");
        }
        rename(&daemon, OWN, OWN - 1);
        everyone(&daemon);
        daemon.restart().expect("restart");
        only_own_maps(&daemon);
        everyone(&daemon);
        world.expect(&daemon, NEW_FLOWS);
        for (client, server) in &mut outgoing {
            server.write_all(b"first").expect("server");
            let mut got = [0; 5];
            client
                .read_exact(&mut got)
                .unwrap_or_else(|error| panic!("{error}\n{}", daemon.report()));
            assert_eq!(&got, b"first");
        }
    }
    for t in traffic {
        t.finish("upgrade");
    }
}

#[test]
fn an_upgrade_of_the_layout_under_load_loses_and_leaks_nothing_with_tcx() {
    upgrade_under_load(Hooks {
        endpoint: "tc",
        host: "xdp",
        tc: "tcx",
    });
}

#[test]
fn an_upgrade_of_the_layout_under_load_loses_and_leaks_nothing_with_xdp_and_clsact() {
    upgrade_under_load(Hooks {
        endpoint: "xdp",
        host: "tc",
        tc: "clsact",
    });
}

#[test]
fn a_crash_at_any_step_of_an_upgrade_leaves_the_policy_enforced() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("loads.yaml", &policy(0))])
        .expect("daemon");
    let traffic = FAMILIES.map(|family| Traffic::start(&world, family));
    let everyone = |daemon: &Daemon| traffic.iter().for_each(|t| t.moves(daemon));
    everyone(&daemon);
    let closed = "front -> back udp/80 drop\nfar -> back tcp/80 drop\ndb -> back tcp/80 drop";
    daemon.kill9().expect("kill -9");
    rename(&daemon, OWN, OWN - 1);
    let dir = |daemon: &Daemon, name: String| daemon.pins().join(name).exists();
    type Reached = fn(&str, &dyn Fn(String) -> bool) -> bool;
    let steps: [(&str, Reached); 4] = [
        ("maps are made", |_, exists| exists(format!("v{OWN}_new"))),
        ("maps are filled", |log, _| log.contains("flows are taken over")),
        ("the first program is attached", |log, _| {
            log.contains("the interface is guarded")
        }),
        ("the old maps are removed", |_, exists| {
            !exists(format!("v{}", OWN - 1))
        }),
    ];
    for (step, reached) in steps {
        daemon.spawn().expect("spawn");
        let log = daemon.log().len();
        wait_until(step, Duration::from_secs(90), || {
            reached(daemon.log().get(log..).unwrap_or_default(), &|name| {
                dir(&daemon, name)
            })
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
        daemon.kill9().expect("kill -9");
        everyone(&daemon);
        assert_eq!(
            world.check(closed).expect("check"),
            [""; 0],
            "crash after: {step}"
        );
    }
    daemon.restart().expect("restart");
    only_own_maps(&daemon);
    everyone(&daemon);
    world.expect(&daemon, NEW_FLOWS);
    for t in traffic {
        t.finish("crashes during an upgrade");
    }
}

#[test]
fn an_earlier_version_refuses_the_maps_of_a_later_one_and_the_policy_stays_enforced() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("loads.yaml", &policy(0))])
        .expect("daemon");
    let traffic = FAMILIES.map(|family| Traffic::start(&world, family));
    daemon.terminate().expect("SIGTERM");
    rename(&daemon, OWN, OWN + 1);
    daemon.spawn().expect("spawn");
    let said = format!("{:#}", daemon.wait().expect_err("the start must fail"));
    for part in [
        "maps of a later version",
        "stays enforced",
        "palisade stop --detach",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    traffic.iter().for_each(|t| t.moves(&daemon));
    assert_eq!(world.check(NEW_FLOWS).expect("check"), [""; 0]);
    // The later version, or the remedy that the message names.
    rename(&daemon, OWN + 1, OWN);
    daemon.restart().expect("restart");
    for t in traffic {
        t.finish("refused downgrade");
    }
    daemon.terminate().expect("SIGTERM");
    rename(&daemon, OWN, OWN + 1);
    daemon.cli(&["stop", "--detach"]).expect("stop --detach");
    assert!(!daemon.pins().exists(), "pins are left");
    daemon.restart().expect("restart");
    world.expect(&daemon, NEW_FLOWS);
}

/// Sockets of a workload are no evidence of a flow's direction while the policy is in force: root in the workload can
/// make sockets that seem to have been opened by the peer.
#[test]
fn an_upgrade_from_an_unknown_layout_does_not_trust_the_sockets_of_workloads() {
    let world = world();
    let mut daemon = world
        .daemon(Settings::default(), &[("loads.yaml", &policy(0))])
        .expect("daemon");
    let mut outgoing = FAMILIES.map(|family| {
        let mut stream =
            open(world.ns("back"), None, world.at("far", family, 443), OPEN).expect("connection");
        assert_eq!(exchange(&mut stream, OPEN), Outcome::Open);
        stream
    });
    daemon.kill9().expect("kill -9");
    rename(&daemon, OWN, 1);
    daemon.restart().expect("restart");
    assert!(
        daemon
            .log()
            .contains("flows of an earlier version cannot be read"),
        "{}",
        daemon.log()
    );
    let seeded = daemon.status().expect("status")["conntrack"]["seeded"].as_u64();
    assert_eq!(seeded, Some(0), "{}", daemon.report());
    world.expect(&daemon, NEW_FLOWS);
    // The policy of `back` allows the direction of the next packet, so that the connections continue with it.
    for stream in &mut outgoing {
        let outcome = exchange(stream, OPEN);
        assert_eq!(outcome, Outcome::Open, "{}", daemon.report());
    }
}
