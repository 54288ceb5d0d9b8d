//! The programs enforce the contents of the maps without gaps.

mod common;

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use common::*;
use palisade_abi::Decision;
use palisade_datapath::{Hook, Role, TcMode, connections, monotonic_coarse, seeds};
use palisade_model::op::Op;

/// Counterpart of `replacing_programs_loses_no_packet`: no denied packet passes while programs and modes are
/// exchanged.
#[test]
fn replacing_programs_leaks_no_packet() {
    let world = World::new();
    let loadings = [world.open_with(Role::Endpoint, Decision::Deny), world.open()];
    // Neighbour discovery is allowed, so each echo request would be answered if there were no program for a moment.
    loadings[0].attach(&attachment(&world, &CASES[1])).unwrap();
    let count = 1000;
    let mut pings = world.start_pings(count);
    let mut times = 0;
    while pings.running() {
        // All changes of mode, including native to generic XDP and back.
        let case = &CASES[..5][times % 5];
        let attached = loadings[times % 2].attach(&attachment(&world, case)).unwrap();
        assert_eq!((attached.ingress, attached.egress), (Some(case.4), Some(case.5)));
        times += 1;
    }
    assert!(times > 7, "{times}");
    assert_eq!(pings.lost(), count, "after {times} replacements");
}

/// Measures when a program first uses a policy that one store has switched on.
#[test]
fn one_store_switches_the_policy_of_an_endpoint() {
    let world = World::new();
    let datapath = world.open_with(Role::Host, Decision::Allow);
    datapath
        .attach(&world.attachment(Role::Host, Hook::Auto, TcMode::Auto))
        .unwrap();
    assert_eq!(world.lost(2), 0);
    datapath
        .apply(&whole_policy(2, Role::Host, Decision::Deny))
        .unwrap();
    assert_eq!(world.lost(2), 2);
    let denied = datapath.counters().rule(1).unwrap();
    assert!(denied.packets >= 4, "{denied:?}");
    datapath
        .apply(&whole_policy(3, Role::Host, Decision::Allow))
        .unwrap();
    assert_eq!(world.lost(2), 0);
    let mut events = Vec::new();
    datapath
        .events()
        .unwrap()
        .drain(1000, |event| events.push(*event));
    assert!(
        events
            .iter()
            .any(|e| e.reason == palisade_abi::Reason::PolicyDenied as u8),
        "{events:?}"
    );
}

/// With more flows than entries the kernel evicts flows, and the counters show it.
#[test]
fn flows_that_the_kernel_evicts_are_counted() {
    let world = World::new();
    let datapath = world.open_with(Role::Host, Decision::Allow);
    datapath
        .attach(&world.attachment(Role::Host, Hook::Auto, TcMode::Auto))
        .unwrap();
    let flows = 3 * u64::from(world.options.limits.conntrack_entries);
    world.peer.enter(|| {
        let socket = std::net::UdpSocket::bind("10.0.0.2:7").unwrap();
        for sent in 0..flows {
            socket.send_to(b"x", ("10.0.0.1", 1000 + sent as u16)).unwrap();
            // A veth with XDP queues 256 packets for its peer and drops the rest.
            if sent % 128 == 127 {
                let deadline = Instant::now() + Duration::from_secs(10);
                while datapath.conntrack().counts().unwrap().made <= sent && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
        }
    });
    let counts = datapath.conntrack().counts().unwrap();
    assert!(counts.made >= flows, "{counts:?}");
    assert!(counts.present <= counts.max_entries, "{counts:?}");
    assert_eq!(counts.evicted, counts.made - counts.present, "{counts:?}");
    // Flows that a sweep removes do not count as evicted.
    let before = counts.evicted;
    let sweep = datapath.conntrack().remove_if(|_, _| true, |_, _, _| {}).unwrap();
    assert_eq!(sweep.removed, counts.present);
    let after = datapath.conntrack().counts().unwrap();
    assert_eq!((after.present, after.evicted), (0, before));
}

/// Two connections exist before the programs. The policy allows the one that the node opened and denies the one that
/// the peer opened: the first continues, the second is dropped, whichever end sends first.
#[test]
fn a_seeded_connection_continues_if_its_direction_is_allowed() {
    for node_sends_first in [true, false] {
        let world = World::new();
        let mut live = Live::new(&world);
        let datapath = world.open_with(Role::Host, Decision::Allow);
        datapath.apply(&egress_only()).unwrap();
        let entries = seeds(
            &connections(HOST_ENDPOINT).unwrap(),
            &endpoints(),
            &config(),
            monotonic_coarse(),
        );
        assert!(datapath.conntrack().seed(&entries).unwrap() >= 2);
        datapath
            .attach(&world.attachment(Role::Host, Hook::Auto, TcMode::Auto))
            .unwrap();

        let talk = |from: &mut TcpStream, to: &mut TcpStream| {
            from.write_all(b"palisade").unwrap();
            let timeout = Some(std::time::Duration::from_millis(700));
            to.set_read_timeout(timeout).unwrap();
            let mut buffer = [0; 8];
            to.read_exact(&mut buffer).is_ok()
        };
        let (ours, theirs) = (&mut live.outgoing.0, &mut live.outgoing.1);
        let alive = if node_sends_first {
            talk(ours, theirs)
        } else {
            talk(theirs, ours)
        };
        assert!(alive, "node first: {node_sends_first}");
        let (ours, theirs) = (&mut live.incoming.0, &mut live.incoming.1);
        let alive = if node_sends_first {
            talk(ours, theirs)
        } else {
            talk(theirs, ours)
        };
        assert!(!alive, "node first: {node_sends_first}");
    }
}

/// Allows egress to every address and no ingress.
fn egress_only() -> Vec<palisade_model::op::Op> {
    let mut ops = whole_policy(9, Role::Host, Decision::Allow);
    if let Op::PolicyPut(entries) = &mut ops[0] {
        for (key, entry) in entries {
            if key.direction == 0 {
                entry.decision = Decision::Deny as u8;
            }
        }
    }
    ops
}
