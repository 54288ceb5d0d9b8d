//! Link-local traffic, and sources and destinations of packets.

mod program;

use std::process::Command;

use palisade_abi::{
    Decision, Direction, ETHER_TYPE_LLC, EventKind, Interface, Reason, entry_flags, identity, role,
};
use program::packets::*;
use program::*;

const INGRESS: Direction = Direction::Ingress;
const EGRESS: Direction = Direction::Egress;
const SPOOFED: Reason = Reason::InvalidSourceIp;

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Adds another link, which is the route of the node to everything outside. Returns its index.
fn other_link() -> u32 {
    ip("link add out0 index 90 type veth peer name out1");
    for link in ["out0", "out1"] {
        ip(&format!("link set {link} up"));
    }
    ip("-6 route add 2001:db8::/32 dev out0");
    ip("route add 192.0.2.0/24 dev out0");
    std::fs::write("/proc/sys/net/ipv6/conf/out0/forwarding", "1").unwrap();
    90
}

#[test]
fn forwarded_neighbour_discovery_is_evaluated_by_the_policy() {
    let mut world = World::new(WORKLOAD, A);
    other_link();
    let long = [neighbour(135, A_V6, HOST_V6, HOST_V6)[62..].to_vec(), vec![0; 64]].concat();
    let leaving = [
        neighbour(135, A_V6, WORLD_V6, WORLD_V6),
        neighbour(136, A_V6, WORLD_V6, A_V6),
        icmp(A_V6, WORLD_V6, 133, 255, &[]),
        icmp(A_V6, WORLD_V6, 134, 255, &[0; 8]),
        icmp(A_V6, WORLD_V6, 137, 255, &[0; 32]),
        neighbour(135, A_V6, "ff05::1", HOST_V6),
        // With hop limit 255, but longer than the message type allows.
        icmp(A_V6, HOST_V6, 135, 255, &long),
        icmp(A_V6, "ff02::2", 133, 255, &[0; 64]),
    ];
    for hook in ENTRIES {
        for frame in &leaving {
            let got = world.run(hook, frame);
            assert_eq!(got.reason, Reason::PolicyDenied, "{hook:?} {frame:?}");
        }
        // A source that the workload must not use, with any hop limit.
        for source in [B_V6, HOST_V6, WORLD_V6] {
            for kind in [133, 135, 136] {
                let got = world.run(hook, &neighbour(kind, source, WORLD_V6, A_V6));
                assert_eq!(got.reason, SPOOFED, "{source} {kind}");
            }
        }
        let on_the_link = [
            neighbour(135, A_V6, "ff02::1:ff00:1", HOST_V6),
            neighbour(135, A_V6, HOST_V6, HOST_V6),
            neighbour(136, A_V6, HOST_V6, A_V6),
            neighbour(136, A_V6, "fe80::9", A_V6),
            neighbour(135, "::", "ff02::1:ff00:10", A_V6),
            neighbour(135, "fe80::1", "ff02::1:ff00:1", "fe80::2"),
            icmp("fe80::1", "ff02::2", 133, 255, &[]),
        ];
        for frame in &on_the_link {
            let got = world.run(hook, frame);
            assert_eq!(got.reason, Reason::LinkControl, "{hook:?} {frame:?}");
        }
    }
    // From a NIC to a host behind the node: forwarded like any packet, without policy evaluation.
    world.interface(NIC, HOST, 0);
    let got = world.run(Hook::TcIn, &neighbour(135, "fe80::1", A_V6, A_V6));
    assert_eq!(got.reason, Reason::Forwarded);
}

#[test]
fn multicast_reports_of_a_workload_have_bounded_length() {
    let mut world = World::new(WORKLOAD, A);
    let igmp = |source, body: &[u8]| raw(source, "224.0.0.22", 2, 1, body);
    let report = [0x22, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0, 0, 224, 1, 2, 3];
    for hook in ENTRIES {
        let got = world.run(hook, &igmp(A_V4, &report));
        assert_eq!(got.reason, Reason::LinkControl);
        let got = world.run(hook, &igmp(A_V4, &[&report[..], &[0; 512]].concat()));
        assert_eq!(got.reason, Reason::PolicyDenied);
        for source in [B_V4, HOST_V4, WORLD_V4] {
            assert_eq!(
                world.run(hook, &igmp(source, &report)).reason,
                SPOOFED,
                "{source}"
            );
        }
        let got = world.run(hook, &mld_report("fe80::1", 1, &[0; 20]));
        assert_eq!(got.reason, Reason::LinkControl);
        // No rule allows it, and its source is not a valid address.
        let got = world.run(hook, &mld_report("fe80::1", 1, &[0; 512]));
        assert_eq!(got.reason, SPOOFED);
        let got = world.run(hook, &icmp("fe80::1", WORLD_V6, 131, 1, &[0; 16]));
        assert_eq!(got.reason, SPOOFED);
    }
}

#[test]
fn a_workload_advertises_only_its_own_addresses() {
    let mut world = World::new(WORKLOAD, A);
    world.set_address("fe80::77", HOST, identity::HOST);
    // The same without enforcement.
    for direction in [INGRESS, EGRESS] {
        world.rule(A, direction, identity::ANY, 0, entry(Decision::Allow, 7));
    }
    for hook in ENTRIES {
        for operation in [1, 2] {
            let got = world.run(hook, &arp(operation, A_V4, HOST_V4));
            assert_eq!(got.reason, Reason::LinkControl);
            for other in [HOST_V4, B_V4, WORLD_V4] {
                let got = world.run(hook, &arp(operation, other, A_V4));
                assert_eq!(got.reason, SPOOFED, "{other}");
            }
        }
        assert_eq!(
            world.run(hook, &arp(1, "0.0.0.0", A_V4)).reason,
            Reason::LinkControl
        );
        let mut other_mac = arp(2, A_V4, HOST_V4);
        other_mac[24] = 9;
        assert_eq!(world.run(hook, &other_mac).reason, SPOOFED);
        let mut long = arp(2, A_V4, HOST_V4);
        long.extend_from_slice(&[0; 200]);
        assert_eq!(world.run(hook, &long).reason, Reason::InvalidPacket);
        for other in [HOST_V6, B_V6, WORLD_V6, "fe80::77"] {
            let got = world.run(hook, &neighbour(136, A_V6, "ff02::1", other));
            assert_eq!(got.reason, SPOOFED, "{other}");
            let got = world.run(hook, &neighbour(135, other, "ff02::1:ff00:1", HOST_V6));
            assert_eq!(got.reason, SPOOFED, "{other}");
            let got = world.run(hook, &neighbour(135, "::", "ff02::1:ff00:1", other));
            assert_eq!(got.reason, SPOOFED, "{other}");
        }
        let mut other_mac = neighbour(136, A_V6, "ff02::1", A_V6);
        *other_mac.last_mut().unwrap() ^= 1;
        assert_eq!(world.run(hook, &other_mac).reason, SPOOFED);
    }
    // Advertisements of a workload's or the node's address must come from the interface that has the address.
    world.interface(WORKLOAD, B, 0);
    world.set_interface(&interface(GUARDED, WORKLOAD, A));
    world.set_interface(&interface(8, NIC, HOST));
    for (origin, about_a, about_node) in [
        (0, true, true),
        (GUARDED, true, false),
        (8, false, false),
        (9, false, false),
    ] {
        for (frame, passes) in [
            (arp(2, A_V4, B_V4), about_a),
            (arp(2, HOST_V4, B_V4), about_node),
            (neighbour(136, "fe80::9", "ff02::1", A_V6), about_a),
            (neighbour(136, "fe80::9", "ff02::1", HOST_V6), about_node),
            (arp(2, WORLD_V4, B_V4), true),
        ] {
            let got = world.run_entered(&frame, origin);
            assert_eq!(got.passed, passes, "from {origin}: {frame:?} {:?}", got.reason);
        }
    }
    // No host on the link of a NIC has a workload's address. Advertisements of the node's own address pass, so that
    // the kernel detects the conflict.
    world.interface(NIC, HOST, 0);
    for hook in ENTRIES {
        for (frame, passes) in [
            (arp(2, A_V4, HOST_V4), false),
            (neighbour(136, "fe80::9", "ff02::1", A_V6), false),
            (arp(2, HOST_V4, HOST_V4), true),
            (neighbour(136, "fe80::9", "ff02::1", HOST_V6), true),
            (arp(1, WORLD_V4, HOST_V4), true),
        ] {
            assert_eq!(world.run(hook, &frame).passed, passes, "{frame:?}");
        }
    }
}

#[test]
fn a_workload_receives_only_its_own_packets_and_answers_for_no_other() {
    for (v6, a, b, outside) in [(false, A_V4, B_V4, WORLD_V4), (true, A_V6, B_V6, WORLD_V6)] {
        let mut world = World::new(WORKLOAD, A);
        for direction in [INGRESS, EGRESS] {
            world.rule(A, direction, identity::ANY, 0, entry(Decision::Allow, 7));
        }
        world.set_interface(&interface(8, NIC, HOST));
        // A bridge with a wrong forwarding entry delivers packets of another endpoint here.
        for other in [b, if v6 { "2001:db8::99" } else { "192.0.2.99" }] {
            let got = world.run_entered(&udp((outside, 53), (other, 4000), &[0; 8]), 8);
            assert_eq!(got.reason, Reason::NotTheEndpoints, "{other}");
            for hook in ENTRIES {
                let got = world.run(hook, &udp((other, 4000), (outside, 53), &[0; 8]));
                assert_eq!(got.reason, SPOOFED, "{other}");
            }
        }
        let got = world.run_entered(&udp((outside, 53), (a, 4000), &[0; 8]), 8);
        assert_eq!(got.reason, Reason::Allowed);
        // Packets to a group are evaluated one by one, since no reply has the group as its source.
        for group in if v6 {
            vec!["ff02::fb"]
        } else {
            vec!["224.0.0.251", "255.255.255.255"]
        } {
            let to_group = udp((outside, 5353), (group, 5353), &[0; 8]);
            assert_eq!(world.run_entered(&to_group, 8).reason, Reason::Allowed, "{group}");
            let got = world.run(Hook::TcIn, &udp((group, 5353), (outside, 5353), &[0; 8]));
            assert_eq!(got.reason, SPOOFED, "{group}");
        }
        // The configuration assigns the address to another endpoint: flows of the former one are no longer allowed.
        world.set_address(a, B, B_IDENTITY);
        world.state(A, u32::from(A), 2, A_IDENTITY);
        let got = world.run_entered(&udp((outside, 53), (a, 4000), &[0; 8]), 8);
        assert_eq!(got.reason, SPOOFED);
    }
    // A subnet broadcast is recognized by the destination MAC address.
    let mut world = World::new(WORKLOAD, A);
    world.rule(A, INGRESS, identity::ANY, 0, entry(Decision::Allow, 7));
    let mut frame = udp((WORLD_V4, 53), ("10.0.1.255", 53), &[0; 8]);
    assert_eq!(world.run(Hook::TcOut, &frame).reason, Reason::NotTheEndpoints);
    frame[..6].fill(255);
    assert_eq!(world.run(Hook::TcOut, &frame).reason, Reason::Allowed);
}

#[test]
fn link_local_addresses_are_distinct_on_each_link() {
    let mut world = World::new(NIC, HOST);
    // The node has the address on one link; on the link of the NIC a router has it.
    world.set_address("fe80::1", HOST, identity::HOST);
    world.rule(HOST, INGRESS, identity::WORLD_IPV6, 0, entry(Decision::Allow, 7));
    for hook in ENTRIES {
        let got = world.run(hook, &udp(("fe80::1", 1), (HOST_V6, hook as u16 + 1), &[0; 8]));
        assert_eq!(got.reason, Reason::Allowed, "{hook:?}");
        let verdict = got.event(EventKind::PolicyVerdict).unwrap();
        assert_eq!(verdict.source_identity, identity::WORLD_IPV6);
    }
    // The node sends to the router and receives the reply, also after a policy change in between.
    world.rule(HOST, EGRESS, identity::WORLD_IPV6, 0, entry(Decision::Allow, 8));
    let got = world.run_local(&udp(("fe80::5", 4000), ("fe80::1", 53), &[0; 8]));
    assert_eq!(got.reason, Reason::Allowed);
    for revision in [1, 2] {
        world.state(HOST, u32::from(HOST), revision, identity::HOST);
        let got = world.run(Hook::Xdp, &udp(("fe80::1", 53), ("fe80::5", 4000), &[0; 8]));
        assert_eq!(got.reason, Reason::Established);
    }
    // At a workload's interface the source is the node only if the node sent the packet.
    world.interface(WORKLOAD, A, 0);
    world.set_interface(&interface(8, NIC, HOST));
    world.rule(A, INGRESS, identity::HOST, 0, entry(Decision::Allow, 9));
    let frame = udp(("fe80::1", 1), (A_V6, 1), &[0; 8]);
    assert_eq!(world.run_entered(&frame, 8).reason, Reason::PolicyDenied);
    assert!(!world.run_local(&frame).passed, "the node's own policy denies it");
    world.rule(HOST, EGRESS, A_IDENTITY, 0, entry(Decision::Allow, 10));
    assert_eq!(world.run_local(&frame).reason, Reason::Allowed);
}

#[test]
fn packets_from_interfaces_without_programs_are_not_forwarded() {
    for (a, b, outside) in [(A_V4, B_V4, WORLD_V4), (A_V6, B_V6, WORLD_V6)] {
        let mut world = World::new(NIC, HOST);
        world.set_interface(&interface(8, NIC, HOST));
        world.set_interface(&interface(9, role::SEEN, 0));
        world.set_interface(&interface(10, role::LINK, 0));
        world.set_interface(&interface(GUARDED, WORKLOAD, A));
        let unguarded = Reason::Unguarded;
        // 66: an interface that is not in the interface table.
        for (origin, from_workload, from_others) in [
            (66, unguarded, unguarded),
            (8, unguarded, Reason::Forwarded),
            (9, unguarded, Reason::Forwarded),
            (10, Reason::Forwarded, Reason::Forwarded),
            (GUARDED, Reason::Forwarded, Reason::Forwarded),
        ] {
            let got = world.run_entered(&udp((a, 1), (outside, 9), &[0; 8]), origin);
            assert_eq!(got.reason, from_workload, "from {origin}");
            let got = world.run_entered(&udp((b, 1), (outside, 9), &[0; 8]), origin);
            assert_eq!(got.reason, from_workload, "from {origin}");
            let other = if a.contains(':') {
                "2001:db8:9::1"
            } else {
                "203.0.113.9"
            };
            let got = world.run_entered(&udp((other, 1), (outside, 9), &[0; 8]), origin);
            assert_eq!(got.reason, from_others, "from {origin}");
        }
        // Masqueraded: the packet has the address of the node as source, but is not from the node.
        let host = if a.contains(':') { HOST_V6 } else { HOST_V4 };
        let got = world.run_entered(&udp((host, 1), (outside, 9), &[0; 8]), 66);
        assert_eq!(got.reason, unguarded);
        // To another workload, also within an allowed flow.
        world.interface(WORKLOAD, B, 0);
        world.rule(B, INGRESS, identity::ANY, 0, entry(Decision::Allow, 7));
        let frame = udp((a, 1), (b, 9), &[0; 8]);
        for origin in [66, 8, 9] {
            assert_eq!(
                world.run_entered(&frame, origin).reason,
                unguarded,
                "from {origin}"
            );
        }
        assert_eq!(world.run_entered(&frame, GUARDED).reason, Reason::Allowed);
        assert_eq!(world.run_entered(&frame, GUARDED).reason, Reason::Established);
        for origin in [66, 8, 9] {
            assert_eq!(
                world.run_entered(&frame, origin).reason,
                unguarded,
                "from {origin}"
            );
        }
        let got = world.run_entered(&udp((outside, 1), (b, 9), &[0; 8]), 66);
        assert_eq!(got.reason, unguarded);
    }
}

#[test]
fn packets_to_workloads_by_interfaces_without_programs_are_not_forwarded() {
    let mut world = World::new(NIC, HOST);
    let out = other_link();
    ip("route add 10.0.1.10/32 dev out0");
    ip("-6 route add fd00:1::10/128 dev out0");
    for (a, b, outside) in [(A_V4, B_V4, "203.0.113.9"), (A_V6, B_V6, "2001:db8:9::1")] {
        for (role, reason, from_b) in [
            (role::NONE, Reason::Unguarded, Reason::Unguarded),
            (role::SEEN, Reason::Unguarded, Reason::Unguarded),
            (role::LINK, Reason::Forwarded, Reason::Allowed),
            (WORKLOAD, Reason::Forwarded, Reason::Allowed),
        ] {
            world.set_interface(&interface(out, role, A));
            for hook in ENTRIES {
                world.interface(NIC, HOST, 0);
                let got = world.run(hook, &udp((outside, 1), (a, 9), &[0; 8]));
                assert_eq!(got.reason, reason, "{a} role {role}");
                world.interface(WORKLOAD, B, 0);
                world.rule(B, EGRESS, identity::ANY, 0, entry(Decision::Allow, 7));
                let port = 100 + u16::from(role) * 10 + hook as u16;
                let got = world.run(hook, &udp((b, port), (a, 9), &[0; 8]));
                assert_eq!(got.reason, from_b, "{a} role {role}");
            }
        }
    }
}

#[test]
fn frames_other_than_ip_pass_without_enforcement_or_by_configuration() {
    const PPPOE: u16 = 0x8863;
    let mut world = World::new(NIC, HOST);
    let frames = [
        ("PTP", frame([1, 0x1b, 0x19, 0, 0, 0], 0x88f7)),
        ("PPPoE", frame([255; 6], PPPOE)),
        ("LLC", frame([1, 0, 0x0c, 0xcc, 0xcc, 0xcc], 46)),
        ("RARP", frame([255; 6], 0x8035)),
        ("MPLS", frame([2; 6], 0x8847)),
        ("tagged PPPoE", tagged(&frame([255; 6], PPPOE), &[0x8100])),
    ];
    let hooks = [Hook::Xdp, Hook::TcIn, Hook::TcOut];
    for hook in hooks {
        for (name, frame) in &frames {
            assert_eq!(world.run(hook, frame).reason, Reason::UnsupportedL3, "{name}");
        }
    }
    let mut nic = interface(IFINDEX, NIC, HOST);
    nic.ether_types[0] = PPPOE;
    nic.ether_types[15] = ETHER_TYPE_LLC;
    world.set_interface(&nic);
    for hook in hooks {
        for (name, frame) in &frames {
            let named = name.contains("PPPoE") || *name == "LLC";
            let got = world.run(hook, frame);
            assert_eq!(
                got.reason == Reason::LinkControl,
                named,
                "{name}: {:?}",
                got.reason
            );
            assert_eq!(got.passed, named, "{name}");
        }
    }
    world.set_interface(&interface(IFINDEX, NIC, HOST));
    let mut audited = entry(Decision::Deny, 1);
    audited.flags = entry_flags::AUDIT;
    let mut unenforced = entry(Decision::Allow, 2);
    unenforced.flags = entry_flags::UNENFORCED;
    for (entry, reason) in [(audited, Reason::Audited), (unenforced, Reason::Allowed)] {
        for direction in [INGRESS, EGRESS] {
            world.rule(HOST, direction, identity::ANY, 0, entry);
        }
        for hook in hooks {
            for (name, frame) in &frames {
                let got = world.run(hook, frame);
                assert_eq!(got.reason, reason, "{name}");
                assert_eq!(
                    got.event(EventKind::PolicyVerdict).is_some(),
                    reason == Reason::Audited,
                    "{name}"
                );
            }
        }
    }
    // A rule that allows all addresses and ports does not cover frames without them.
    world.rule(HOST, INGRESS, identity::ANY, 0, entry(Decision::Allow, 3));
    assert_eq!(world.run(Hook::Xdp, &frames[0].1).reason, Reason::UnsupportedL3);
    // At the interface of a workload the policy of the node counts as well, since the frame may be for the node.
    world.set_interface(&Interface {
        ether_types: nic.ether_types,
        ..interface(IFINDEX, WORKLOAD, A)
    });
    world.rule(A, EGRESS, identity::ANY, 0, unenforced);
    assert_eq!(world.run(Hook::TcIn, &frames[1].1).reason, Reason::UnsupportedL3);
    world.rule(HOST, INGRESS, identity::ANY, 0, unenforced);
    assert_eq!(world.run(Hook::TcIn, &frames[1].1).reason, Reason::Allowed);
}

#[test]
fn replies_to_packets_that_nat_directed_to_the_node_are_dropped() {
    for (vip, a, outside, untold) in [
        ("203.0.113.77", A_V4, WORLD_V4, "10.0.0.99"),
        ("2001:db8:9::77", A_V6, WORLD_V6, "fd00::99"),
    ] {
        let mut world = World::new(NIC, HOST);
        world.rule(HOST, EGRESS, identity::ANY, 0, entry(Decision::Allow, 7));
        let answers = [
            udp((vip, 53), (outside, 4000), &[0; 8]),
            tcp((vip, 53), (outside, 4000), ACK),
            echo(vip, outside, 1, true),
        ];
        for frame in &answers {
            assert_eq!(world.run_local(frame).reason, Reason::Translated, "{vip}");
        }
        // An address of the node that is not in the maps; no address yet; a forwarded packet.
        assert_eq!(
            world
                .run_local(&udp((untold, 53), (outside, 4000), &[0; 8]))
                .reason,
            Reason::Allowed
        );
        if !vip.contains(':') {
            let got = world.run_local(&udp(("0.0.0.0", 68), ("255.255.255.255", 67), &[0; 8]));
            assert_eq!(got.reason, Reason::Allowed);
        }
        let got = world.run_entered(&answers[0], IFINDEX);
        assert_eq!(got.reason, Reason::Forwarded);
        // A workload sends to the service address, and the node replies in the place of the host that has it.
        world.interface(WORKLOAD, A, 0);
        world.rule(A, EGRESS, identity::ANY, 0, entry(Decision::Allow, 8));
        let got = world.run(Hook::TcIn, &udp((a, 4000), (vip, 53), &[0; 8]));
        assert_eq!(got.reason, Reason::Allowed);
        let answer = udp((vip, 53), (a, 4000), &[0; 8]);
        assert_eq!(world.run_local(&answer).reason, Reason::Translated);
        assert_eq!(world.run_entered(&answer, IFINDEX).reason, Reason::Established);
        // If all ingress of the node is allowed, no policy is bypassed.
        let mut unenforced = entry(Decision::Allow, 2);
        unenforced.flags = entry_flags::UNENFORCED;
        world.rule(HOST, INGRESS, identity::ANY, 0, unenforced);
        assert_eq!(world.run_local(&answer).reason, Reason::Established);
    }
}
