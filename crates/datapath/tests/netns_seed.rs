//! Seeding from the kernel's own tables.

mod common;

use std::{net::UdpSocket, path::Path};

use common::*;
use palisade_abi::ct_flags;
use palisade_datapath::{Scope, connections, connections_of_netns, seeds};

/// Endpoint id of the workload.
const WORKLOAD: u16 = 9;

#[test]
fn sockets_of_the_node_and_of_a_workload_are_seeded() {
    let world = World::new();
    let live = Live::new(&world);
    let resolver = UdpSocket::bind("10.0.0.1:0").unwrap();
    resolver.connect("10.0.0.2:53").unwrap();

    let found = connections(HOST_ENDPOINT).unwrap();
    for connection in live.expected() {
        let expected = (Scope::Endpoint(HOST_ENDPOINT), connection);
        assert!(found.contains(&expected), "{connection:?} in {found:?}");
    }
    // A UDP socket does not show which end opened its flow.
    let port = resolver.local_addr().unwrap().port();
    assert!(
        found.iter().all(|(_, c)| c.opener != end(NODE_ADDR, port)),
        "{found:?}"
    );

    // The sockets of the peer have the same connections.
    let path = Path::new("/run/netns").join(world.peer.name());
    let theirs = connections_of_netns(&path, WORKLOAD).unwrap();
    for connection in live.expected() {
        let expected = (Scope::Endpoint(WORKLOAD), connection);
        assert!(theirs.contains(&expected), "{connection:?} in {theirs:?}");
    }
    // They are not used for flows of the node.
    assert!(seeds(&theirs, &endpoints(), &config(), 0).is_empty());
    // The calling thread has not changed its namespace.
    assert!(world.node.ifindex("v0").is_ok() && connections(HOST_ENDPOINT).unwrap().len() >= 2);
    let error = connections_of_netns(Path::new("/run/netns/palisade-none"), WORKLOAD).unwrap_err();
    assert!(error.to_string().contains("/run/netns/palisade-none"), "{error}");

    let entries = seeds(&found, &endpoints(), &config(), 0);
    let (_, incoming) = entries.iter().find(|(key, _)| key.local_port == 8080).unwrap();
    assert_ne!(incoming.flags & ct_flags::INGRESS, 0);
    let (_, outgoing) = entries.iter().find(|(key, _)| key.remote_port == 9090).unwrap();
    assert_eq!(outgoing.flags & ct_flags::INGRESS, 0);
}

#[test]
fn entries_of_nf_conntrack_are_seeded() {
    let world = World::new();
    world
        .node
        .nft("table inet t { chain c { type filter hook input priority 0; ct state new accept; }; }")
        .unwrap();
    let live = Live::new(&world);
    let found = connections(HOST_ENDPOINT).unwrap();
    let client = live.expected()[0];
    // One connection from nf_conntrack, one from the socket.
    assert_eq!(found.iter().filter(|(_, c)| *c == client).count(), 2, "{found:?}");
    let entries = seeds(&found, &endpoints(), &config(), 0);
    assert_eq!(
        entries.iter().filter(|(key, _)| key.local_port == 8080).count(),
        1
    );
}
