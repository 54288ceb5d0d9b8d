//! Connections from the kernel's own tables.

mod common;

use std::{net::UdpSocket, path::Path};

use common::*;
use palisade_abi::{ct_flags, protocol};
use palisade_datapath::{connections, connections_of_netns, seeds};

#[test]
fn sockets_of_the_node_and_of_a_workload() {
    let world = World::new();
    let live = Live::new(&world);
    let resolver = UdpSocket::bind("10.0.0.1:0").unwrap();
    resolver.connect("10.0.0.2:53").unwrap();

    let found = connections().unwrap();
    for connection in live.expected() {
        assert!(found.contains(&connection), "{connection:?} in {found:?}");
    }
    let port = resolver.local_addr().unwrap().port();
    assert!(
        found
            .iter()
            .any(|c| c.protocol == protocol::UDP && c.opener == end(NODE_ADDR, port)),
        "{found:?}"
    );

    // The other end tells the same story.
    let path = Path::new("/run/netns").join(world.peer.name());
    let theirs = connections_of_netns(&path).unwrap();
    for connection in live.expected() {
        assert!(theirs.contains(&connection), "{connection:?} in {theirs:?}");
    }
    // And this thread is still where it was.
    assert!(world.node.ifindex("v0").is_ok() && connections().unwrap().len() >= 3);
    let error = connections_of_netns(Path::new("/run/netns/palisade-none")).unwrap_err();
    assert!(error.to_string().contains("/run/netns/palisade-none"), "{error}");

    let entries = seeds(&found, &endpoints(), &config(), 0);
    let (_, incoming) = entries.iter().find(|(key, _)| key.local_port == 8080).unwrap();
    assert_ne!(incoming.flags & ct_flags::INGRESS, 0);
    let (_, outgoing) = entries.iter().find(|(key, _)| key.remote_port == 9090).unwrap();
    assert_eq!(outgoing.flags & ct_flags::INGRESS, 0);
}

#[test]
fn what_the_kernel_tracks() {
    let world = World::new();
    world
        .node
        .nft("table inet t { chain c { type filter hook input priority 0; ct state new accept; }; }")
        .unwrap();
    let live = Live::new(&world);
    let found = connections().unwrap();
    let client = live.expected()[0];
    // Once from the table, once from the socket.
    assert_eq!(found.iter().filter(|c| **c == client).count(), 2, "{found:?}");
    let entries = seeds(&found, &endpoints(), &config(), 0);
    assert_eq!(
        entries.iter().filter(|(key, _)| key.local_port == 8080).count(),
        1
    );
}
