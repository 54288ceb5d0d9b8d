//! Interfaces that flap, appear and disappear under traffic: nothing denied passes, other workloads notice nothing, and
//! nothing is left behind.

use std::{collections::BTreeSet, fs, thread, time::Duration};

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    topology::{FAMILIES, WorkloadSpec},
};
use palisade_tests::{
    OPEN,
    fixtures::traffic::{Traffic, policy},
    with_peers, world,
};

#[test]
fn flaps_of_an_interface_leak_nothing_and_cost_no_tcp_connection() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("loads.yaml", &policy(0))])
        .expect("daemon");
    let traffic = FAMILIES.map(|family| Traffic::start(&world, family));
    traffic.iter().for_each(|t| t.moves(&daemon));
    for _ in 0..15 {
        for state in ["down", "up"] {
            // The kernel removes an interface's global IPv6 addresses when it goes down, unless told otherwise.
            world
                .topology
                .node
                .sysctl("ipv6/conf/veth-back/keep_addr_on_down", "1")
                .expect("sysctl");
            world
                .topology
                .node
                .ip(&format!("link set veth-back {state}"))
                .expect("ip");
            thread::sleep(Duration::from_millis(60));
        }
    }
    traffic.iter().for_each(|t| t.moves(&daemon));
    for t in traffic {
        let tcp = t.tcp.finish(OPEN);
        assert!(tcp.whole(), "{tcp:?}");
        for leak in [t.leak.finish(), t.leak_outside.finish()] {
            assert_eq!(leak.leaked, 0, "{leak:?}");
        }
        for udp in [t.udp.finish(), t.back.finish(), t.from_outside.finish()] {
            println!("lost while the interface was down: {}", udp.lost());
            assert_eq!((udp.duplicated, udp.changed), (0, 0), "{udp:?}");
        }
    }
}

#[test]
fn workloads_that_come_and_go_disturb_no_other_and_leave_no_pin() {
    const ROUNDS: usize = 40;
    let mut world = world();
    for n in 0..3 {
        world
            .topology
            .declare(WorkloadSpec::new(&format!("churn{n}")).label("app", "back"))
            .expect("declare");
    }
    let mut daemon = Daemon::prepare(
        &world.topology,
        &with_peers(Settings::default()),
        &[("loads.yaml", &policy(0))],
    )
    .expect("daemon");
    daemon.spawn().expect("spawn");
    daemon
        .wait_status("the others are attached", |s| {
            let interfaces = s["interfaces"].as_array().map(Vec::as_slice).unwrap_or_default();
            interfaces.iter().filter(|i| i["ingress"].is_string()).count() == 5
        })
        .expect("status");
    let traffic = FAMILIES.map(|family| Traffic::start(&world, family));
    for round in 0..ROUNDS {
        for n in 0..3 {
            world.topology.plug(&format!("churn{n}")).expect("plug");
        }
        if round % 8 == 0 {
            daemon.write("loads.yaml", &policy(round)).expect("policy");
        }
        for n in 0..3 {
            world.topology.unplug(&format!("churn{n}")).expect("unplug");
        }
    }
    traffic.iter().for_each(|t| t.moves(&daemon));
    let names = |dir: &str| -> BTreeSet<String> {
        fs::read_dir(daemon.pins().join(dir))
            .expect("pins")
            .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
            .collect()
    };
    daemon
        .wait_status("the pins of the removed interfaces are gone", |_| {
            names("links").len() == 5
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{:?}", names("links")));
    for t in traffic {
        t.finish("workloads that come and go");
    }
}
