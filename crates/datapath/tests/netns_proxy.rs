//! Intercepted connections end to end.

mod proxy;

use std::{
    io::{Read as _, Write as _},
    time::Instant,
};

use palisade_abi::Reason;
use palisade_datapath::Hook;
use palisade_testbed::ns::wait_until;
use proxy::*;

#[test]
fn connections_are_intercepted_in_every_direction_with_their_addresses() {
    let mut world = World::new(Hook::Tc, Hook::Tc, &[]);
    let links = world.links();
    let relay = Relay::start(&links, flows(&world));
    for (revision, case) in (2..).zip(CASES) {
        world.policy(revision, case.2);
        for ipv6 in [false, true] {
            check(&world, &relay, case, ipv6, 1 << 20);
        }
    }
    assert_eq!(world.drops(Reason::NoProxy), 0);
    assert_eq!(world.drops(Reason::PuntForeign), 0);
}

/// In the default configuration the ingress hook of a NIC is XDP, and that of a workload tc.
#[test]
fn a_worker_carries_packets_of_xdp_hooks_to_the_proxy() {
    for (ingress, nic) in [(Hook::Auto, Hook::Auto), (Hook::Xdp, Hook::Xdp)] {
        let mut world = World::new(ingress, nic, &[]);
        let pool = world.worker();
        let links = world.links();
        let relay = Relay::start(&links, flows(&world));
        for (revision, case) in (2..).zip(CASES) {
            world.policy(revision, case.2);
            for ipv6 in [false, true] {
                check(&world, &relay, case, ipv6, 1 << 20);
            }
        }
        let carried: u64 = pool
            .counters()
            .iter()
            .map(|counters| counters.packets_out.get())
            .sum();
        assert_ne!(carried, 0);
        assert_eq!(world.drops(Reason::NoProxy), 0);
        assert_eq!(world.drops(Reason::PuntForeign), 0);
    }
}

#[test]
fn long_transfers_both_ways_are_correct() {
    let mut world = World::new(Hook::Tc, Hook::Tc, &[(A, EGRESS), (B, INGRESS)]);
    let links = world.links();
    let relay = Relay::start(&links, flows(&world));
    let case = CASES[2];
    check(&world, &relay, case, false, 64 << 20);
    check(&world, &relay, case, true, 64 << 20);
}

/// Measure on an idle machine: `cargo test --release -p palisade-datapath --test netns_proxy -- --ignored --nocapture`.
#[test]
#[ignore = "measures"]
fn bulk_through_the_proxy_against_direct() {
    const LENGTH: usize = 1 << 30;
    for (name, ingress, intercepting) in [
        ("direct", Hook::Tc, &[][..]),
        ("one proxy", Hook::Tc, &[(A, EGRESS)]),
        ("two proxies", Hook::Tc, &[(A, EGRESS), (B, INGRESS)]),
    ] {
        let mut world = World::new(ingress, Hook::Tc, intercepting);
        let links = world.links();
        let _relay = Relay::start(&links, flows(&world));
        let listener = world.listen(Place::B, false);
        let mut client = world.connect(Place::A, Place::B, false).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let begun = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let block = vec![7; 1 << 18];
                for _ in 0..LENGTH / block.len() {
                    client.write_all(&block).unwrap();
                }
            });
            let mut block = vec![0; 1 << 18];
            while server.read(&mut block).unwrap() != 0 {}
        });
        let seconds = begun.elapsed().as_secs_f64();
        println!("{name}: {:.0} MB/s", LENGTH as f64 / 1e6 / seconds);
    }
}

/// Without a listener or without the namespaces nothing passes, and the server is never reached.
#[test]
fn nothing_passes_without_the_proxy() {
    let (from, to, intercepting) = CASES[0];
    let mut world = World::new(Hook::Tc, Hook::Tc, intercepting);
    // No links yet.
    let listener = world.listen(to, false);
    listener.set_nonblocking(true).unwrap();
    let fails = |world: &World, what: &str| {
        assert!(world.connect(from, to, false).is_err(), "{what}");
        assert!(listener.accept().is_err(), "{what}");
    };
    fails(&world, "no links");
    assert_ne!(world.drops(Reason::NoProxy), 0);
    // Links without a listener.
    let links = world.links();
    fails(&world, "no listener");
    let relay = Relay::start(&links, flows(&world));
    drop(world.connect(from, to, false).unwrap());
    wait_until("the relayed connection", TIMEOUT, || listener.accept().is_ok()).unwrap();
    // The listeners are gone.
    drop(relay);
    fails(&world, "listeners gone");
    // The namespaces are gone, and the links with them.
    let [ingress, _] = links.ifindexes();
    assert_eq!(links.repair().unwrap(), Some(0));
    drop(links);
    wait_until("the end of the links", TIMEOUT, || {
        !world
            .node
            .run("ip", &["-o", "link"])
            .unwrap()
            .contains(&format!("{ingress}: {LINK}pi"))
    })
    .unwrap();
    fails(&world, "namespaces gone");
    // New links have other indexes.
    let links = world.links();
    let _relay = Relay::start(&links, flows(&world));
    drop(world.connect(from, to, false).unwrap());
    wait_until("the relayed connection", TIMEOUT, || listener.accept().is_ok()).unwrap();
}
