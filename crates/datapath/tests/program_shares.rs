//! Floods: no endpoint takes the share of another one, and none loses established flows to its own flood.

mod program;

use palisade_abi::{CtKey, Decision, Direction, Reason, identity};
use program::packets::*;
use program::*;

const INGRESS: Direction = Direction::Ingress;
const EGRESS: Direction = Direction::Egress;

/// Entries of the conntrack map in these tests.
const ROOM: u32 = 1024;
/// Flows of a flood, several times the size of the map.
const FLOOD: u16 = 3 * ROOM as u16;

/// Addresses of one family: node, A, B, outside.
type Addresses = [&'static str; 4];
const FAMILIES: [Addresses; 2] = [[HOST_V4, A_V4, B_V4, WORLD_V4], [HOST_V6, A_V6, B_V6, WORLD_V6]];

/// Both workloads and the node may open connections to port 80 of every host, and every host to theirs.
fn open() -> World {
    let world = World::with_conntrack(WORKLOAD, A, ROOM);
    for endpoint in [HOST, A, B] {
        for direction in [INGRESS, EGRESS] {
            world.rule(endpoint, direction, identity::ANY, 5, entry(Decision::Allow, 7));
        }
    }
    world
}

/// Opens a connection from `local`, a workload, to port 80, with its handshake.
fn connect(world: &mut World, endpoint: u16, local: &str, remote: &str, port: u16) -> CtKey {
    world.interface(WORKLOAD, endpoint, 0);
    let (from, to) = ((local, port), (remote, 80));
    assert_eq!(world.run(Hook::TcIn, &tcp(from, to, SYN)).reason, Reason::Allowed);
    assert!(world.run(Hook::TcOut, &tcp(to, from, SYN | ACK)).passed);
    assert!(world.run(Hook::TcIn, &tcp(from, to, ACK)).passed);
    key(endpoint, 6, from, to)
}

/// Returns whether the next segment of the peer of such a connection passes. It passes only by its conntrack entry,
/// since the workloads allow ingress only to port 80.
fn lives(world: &mut World, endpoint: u16, flow: &CtKey, frame: &[u8]) {
    world.interface(WORKLOAD, endpoint, 0);
    assert!(world.flow(flow).is_some_and(|entry| entry.protected == 1));
    assert_eq!(world.run(Hook::TcOut, frame).reason, Reason::Established);
}

/// Floods of a workload: two packets for each flow, and complete handshakes.
fn floods(world: &mut World, local: &str, remote: &str) {
    world.interface(WORKLOAD, A, 0);
    let ends = || (0..FLOOD).map(|port| ((local, port + 1), (remote, 80)));
    // A request and a reply each; half-open; answered but not acknowledged.
    for (from, to) in ends() {
        world.flood(Hook::TcIn, [udp(from, to, &[1; 4])]);
        world.flood(Hook::TcOut, [udp(to, from, &[1; 4])]);
    }
    for (from, to) in ends() {
        world.flood(Hook::TcIn, [tcp(from, to, SYN)]);
        world.flood(Hook::TcOut, [tcp(to, from, SYN | ACK)]);
    }
    // Complete handshakes: more connections than the endpoint and the pool can protect.
    for (from, to) in ends() {
        world.flood(Hook::TcIn, [tcp(from, to, SYN)]);
        world.flood(Hook::TcOut, [tcp(to, from, SYN | ACK)]);
        world.flood(Hook::TcIn, [tcp(from, to, ACK)]);
    }
}

#[test]
fn a_flood_of_one_workload_evicts_no_protected_flow() {
    for [_, a, b, outside] in FAMILIES {
        let mut world = open();
        let mut own = Vec::new();
        let mut others = Vec::new();
        for port in 60_000..60_010 {
            own.push((connect(&mut world, A, a, outside, port), port));
            others.push((connect(&mut world, B, b, outside, port), port));
        }
        floods(&mut world, a, outside);
        for (flow, port) in &others {
            lives(&mut world, B, flow, &tcp((outside, 80), (b, *port), ACK));
        }
        for (flow, port) in &own {
            lives(&mut world, A, flow, &tcp((outside, 80), (a, *port), ACK));
        }
        assert!(world.flows().len() <= ROOM as usize);
        // The flood has a bounded number of protected flows; the other endpoints and the node still have their
        // guaranteed parts.
        let share = world.share(A, EGRESS);
        assert!(share.protected > i64::from(share.guaranteed), "{share:?}");
        for port in 50_000..50_000 + share.guaranteed as u16 / 2 {
            let flow = connect(&mut world, B, b, outside, port);
            lives(&mut world, B, &flow, &tcp((outside, 80), (b, port), ACK));
        }
    }
}

#[test]
fn a_flood_towards_an_endpoint_does_not_evict_its_own_flows() {
    for [_, a, _, outside] in FAMILIES {
        let mut world = open();
        let flow = connect(&mut world, A, a, outside, 60_000);
        // Half-open connections, and requests without a reply yet.
        let pending = tcp((a, 60_001), (outside, 80), SYN);
        let question = udp((a, 60_002), (outside, 80), &[]);
        assert!(world.run(Hook::TcIn, &pending).passed);
        assert!(world.run(Hook::TcIn, &question).passed);
        // From spoofed sources; the workload replies, and the acknowledgements are spoofed, too.
        for port in 0..FLOOD {
            let (from, to) = ((outside, port + 1), (a, 80));
            world.flood(Hook::TcOut, [tcp(from, to, SYN)]);
            world.flood(Hook::TcIn, [tcp(to, from, SYN | ACK)]);
            world.flood(Hook::TcOut, [tcp(from, to, ACK), udp(from, to, &[])]);
        }
        lives(&mut world, A, &flow, &tcp((outside, 80), (a, 60_000), ACK));
        let answer = tcp((outside, 80), (a, 60_001), SYN | ACK);
        assert_eq!(world.run(Hook::TcOut, &answer).reason, Reason::Established);
        let answer = udp((outside, 80), (a, 60_002), &[]);
        assert_eq!(world.run(Hook::TcOut, &answer).reason, Reason::Established);
    }
}

#[test]
fn a_flood_of_the_node_by_its_nic_evicts_no_other_flow() {
    for [host, a, _, outside] in FAMILIES {
        for hook in ENTRIES {
            let mut world = open();
            let flow = connect(&mut world, A, a, outside, 60_000);
            world.interface(NIC, HOST, 0);
            // An established connection of a client to the node.
            let (client, server) = ((outside, 60_000), (host, 80));
            assert!(world.run(hook, &tcp(client, server, SYN)).passed);
            assert!(world.run_local(&tcp(server, client, SYN | ACK)).passed);
            assert!(world.run(hook, &tcp(client, server, ACK)).passed);
            // A request of the node.
            let question = udp((host, 4000), (outside, 80), &[]);
            assert_eq!(world.run_local(&question).reason, Reason::Allowed);
            for port in 0..FLOOD {
                let (from, to) = ((outside, port + 1), server);
                world.flood(hook, [tcp(from, to, SYN), udp(from, to, &[])]);
            }
            let of_client = key(HOST, 6, server, client);
            assert!(world.flow(&of_client).is_some_and(|entry| entry.protected == 1));
            assert_eq!(
                world.run(hook, &tcp(client, server, ACK)).reason,
                Reason::Established
            );
            let answer = udp((outside, 80), (host, 4000), &[]);
            assert_eq!(world.run(hook, &answer).reason, Reason::Established);
            lives(&mut world, A, &flow, &tcp((outside, 80), (a, 60_000), ACK));
        }
    }
}

#[test]
fn closed_connections_release_their_share() {
    for [_, a, _, outside] in FAMILIES {
        let mut world = open();
        let before = world.share(A, EGRESS);
        for round in 0..2 {
            for port in 0..ROOM as u16 {
                let (from, to) = ((a, port + 1), (outside, 80));
                world.flood(Hook::TcIn, [tcp(from, to, SYN)]);
                world.flood(Hook::TcOut, [tcp(to, from, SYN | ACK)]);
                world.flood(Hook::TcIn, [tcp(from, to, ACK)]);
                assert!(world.share(A, EGRESS).protected >= 1);
                if port % 2 == 0 {
                    world.flood(Hook::TcIn, [tcp(from, to, FIN | ACK)]);
                    world.flood(Hook::TcOut, [tcp(to, from, FIN | ACK)]);
                } else {
                    world.flood(Hook::TcOut, [tcp(to, from, RST | ACK)]);
                }
                assert_eq!(world.share(A, EGRESS), before, "round {round}, port {port}");
            }
        }
        // A protected flow whose entry is overwritten because its ports are reused counts once.
        let flow = connect(&mut world, A, a, outside, 60_000);
        let mut dead = world.flow(&flow).unwrap();
        dead.expires = 0;
        world.set_flow(&flow, &dead);
        connect(&mut world, A, a, outside, 60_000);
        assert_eq!(world.share(A, EGRESS).protected, 1);
    }
}

#[test]
fn flows_without_a_handshake_are_protected_after_a_while() {
    for [_, a, _, outside] in FAMILIES {
        let mut world = open();
        let (from, to) = ((a, 60_000), (outside, 80));
        let echo_id = 60_000;
        world.rule(A, EGRESS, identity::ANY, 6, entry(Decision::Allow, 8));
        let protocol = if a.contains(':') { 58 } else { 1 };
        let keys = [key(A, 17, from, to), key(A, protocol, (a, echo_id), (outside, 0))];
        let there = [udp(from, to, &[]), echo(a, outside, echo_id, false)];
        let back = [udp(to, from, &[]), echo(outside, a, echo_id, true)];
        for (there, back) in there.iter().zip(&back) {
            assert_eq!(world.run(Hook::TcIn, there).reason, Reason::Allowed);
            assert_eq!(world.run(Hook::TcOut, back).reason, Reason::Established);
        }
        assert!(keys.iter().all(|key| world.flow(key).unwrap().protected == 0));
        std::thread::sleep(std::time::Duration::from_millis(2_100));
        for there in &there {
            assert_eq!(world.run(Hook::TcIn, there).reason, Reason::Established);
        }
        assert!(keys.iter().all(|key| world.flow(key).unwrap().protected == 1));
        floods(&mut world, a, outside);
        for back in &back {
            assert_eq!(world.run(Hook::TcOut, back).reason, Reason::Established);
        }
    }
}

#[test]
fn an_endpoint_without_a_share_opens_nothing() {
    let mut world = open();
    world.state(9, u32::from(A), 1, 3000);
    world.address(A_V4, 9, 3000);
    world.interface(WORKLOAD, 9, 0);
    let got = world.run(Hook::TcIn, &tcp((A_V4, 1), (WORLD_V4, 80), SYN));
    assert_eq!(got.reason, Reason::CtInsertionFailed);
}

/// The first 24 bytes of a UDP datagram of 40 to `port`.
fn udp_start(port: u16) -> Vec<u8> {
    let mut bytes = vec![0x0f, 0xa0];
    bytes.extend_from_slice(&port.to_be_bytes());
    bytes.extend_from_slice(&[0, 40, 0, 0]);
    bytes.resize(24, 1);
    bytes
}

#[test]
fn fragments_of_one_workload_do_not_evict_those_of_others() {
    for [_, a, b, outside] in FAMILIES {
        let mut world = open();
        world.interface(WORKLOAD, B, 0);
        let first = fragment(b, outside, 17, 1, 0, true, &udp_start(80));
        let later = fragment(b, outside, 17, 1, 3, false, &[2; 16]);
        assert_eq!(world.run(Hook::TcIn, &first).reason, Reason::Allowed);
        world.interface(WORKLOAD, A, 0);
        for id in 0..u32::from(FLOOD) {
            // Allowed, denied and spoofed fragments, also with the address of B.
            let frames = [
                fragment(a, outside, 17, id, 0, true, &udp_start(80)),
                fragment(a, outside, 17, id + 10_000, 0, true, &udp_start(81)),
                fragment(b, outside, 17, id, 0, true, &udp_start(80)),
                fragment(outside, a, 17, id, 0, true, &udp_start(80)),
            ];
            world.flood(Hook::TcIn, frames);
        }
        world.interface(WORKLOAD, B, 0);
        assert_eq!(world.run(Hook::TcIn, &later).reason, Reason::Established);
    }
}

#[test]
fn an_unevaluated_first_fragment_is_not_stored() {
    for [_, a, b, outside] in FAMILIES {
        let mut world = open();
        for source in [b, outside] {
            let first = fragment(source, outside, 17, 1, 0, true, &udp_start(80));
            assert_eq!(world.run(Hook::TcIn, &first).reason, Reason::InvalidSourceIp);
        }
        // Packets that the node forwards from a NIC are evaluated at the interface of the workload.
        world.interface(NIC, HOST, 0);
        for hook in ENTRIES {
            let first = fragment(outside, a, 17, 1, 0, true, &udp_start(80));
            assert_eq!(world.run(hook, &first).reason, Reason::Forwarded);
            let spoofed = fragment(a, outside, 17, 1, 0, true, &udp_start(80));
            assert_eq!(world.run(hook, &spoofed).reason, Reason::InvalidSourceIp);
        }
        assert_eq!(world.datagrams(), 0);
    }
}
