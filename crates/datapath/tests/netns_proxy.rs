//! Intercepted connections end to end.

mod proxy;

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
    assert!(links.exist().unwrap());
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
