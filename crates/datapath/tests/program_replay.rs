//! The model of the packet path in `palisade-replay`, compared with the programs: the same random packets under the same
//! compiled policies lead to the same verdicts and events.
#![allow(unsafe_code, reason = "system calls")]

#[path = "../../replay/tests/common/mod.rs"]
mod common;
mod program;

use palisade_abi::{Event, EventKind, Interface, role};
use palisade_replay::capture::PathHint;
use program::packets::*;
use program::{Hook, NIC, WORKLOAD};

/// Sets of policies: name, subject and rules.
const POLICIES: &[&[(&str, &str, &str)]] = &[
    &[],
    &[
        (
            "web",
            "b",
            "  ingress: [{fromEndpoints: [{matchLabels: {app: a}}], toPorts: [{ports: [{port: '80', protocol: TCP}, {port: '53', \
             protocol: UDP}]}]}]\n  egress: [{toCIDR: [192.0.2.0/24, '2001:db8::/64']}]",
        ),
        (
            "out",
            "a",
            "  egress: [{toEndpoints: [{matchLabels: {app: b}}]}, {toEntities: [host], toPorts: [{ports: [{port: '80', \
             protocol: ANY}]}]}]\n  egressDeny: [{toEndpoints: [{matchLabels: {app: b}}], toPorts: [{ports: [{port: '443', \
             protocol: TCP}]}]}]",
        ),
    ],
    &[
        (
            "all",
            "a",
            "  ingress: [{fromEntities: [all]}]\n  ingressDeny: [{fromCIDR: [192.0.2.0/24, '2001:db8::/64'], toPorts: [{ports: \
             [{port: '80', protocol: ANY}]}]}]\n  egress: [{toEntities: [all], toPorts: [{ports: [{port: '53', protocol: \
             UDP}], rules: {dns: [{matchPattern: '*'}]}}, {ports: [{port: '80', protocol: TCP}]}]}]",
        ),
        (
            "echo",
            "b",
            "  ingress: [{icmps: [{fields: [{type: 8, family: IPv4}, {type: 128, family: IPv6}]}]}]\n  egress: [{}]",
        ),
    ],
];

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as usize % limit
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

const PORTS: &[u16] = &[80, 443, 53, 4000, 4001];

/// Returns a packet, often one that continues, answers or quotes an earlier one.
fn packet(random: &mut Random, earlier: &[Vec<u8>]) -> Vec<u8> {
    let family = random.below(2);
    let addresses = [common::AS, common::BS, common::HOSTS, common::WORLDS].map(|pair| pair[family]);
    let (source, destination) = (random.one(&addresses), random.one(&addresses));
    let ends = ((source, random.one(PORTS)), (destination, random.one(PORTS)));
    match random.below(20) {
        0..=8 => {
            let flags = random.one(&[
                SYN,
                SYN,
                SYN | ACK,
                ACK,
                ACK,
                FIN | ACK,
                RST,
                RST | ACK,
                FIN | SYN,
            ]);
            tcp(ends.0, ends.1, flags)
        }
        9..=12 => udp(ends.0, ends.1, b"data"),
        13 | 14 => echo(source, destination, random.one(&[1, 2]), random.below(2) == 0),
        15 | 16 => {
            let quoted = earlier.get(random.below(earlier.len().max(1)));
            let quoted = quoted.filter(|quoted| (quoted[12] == 0x86) == (family == 1));
            match quoted {
                Some(quoted) if quoted.len() < 200 => unreachable(source, destination, quoted),
                _ => icmp(source, destination, random.one(&[3, 8, 11, 128, 1]), 64, &[0; 8]),
            }
        }
        17 => {
            let mut payload = ends.0.1.to_be_bytes().to_vec();
            payload.extend(ends.1.1.to_be_bytes());
            payload.extend([0, 40, 0, 0]);
            payload.resize(24, 0);
            fragment(source, destination, 17, random.one(&[7, 8]), 0, true, &payload)
        }
        18 => fragment(source, destination, 17, random.one(&[7, 8]), 3, false, &[0; 16]),
        _ => match random.below(4) {
            0 => arp(
                random.one(&[1, 2]),
                random.one(&[common::AS[0], common::BS[0], common::HOSTS[0]]),
                "10.0.1.1",
            ),
            1 => neighbour(
                random.one(&[135, 136]),
                random.one(&["fd00:1::10", "fe80::1"]),
                "ff02::1:ff00:1",
                "fd00:1::10",
            ),
            2 => mld_report("fe80::1", 1, &[0; 20]),
            _ => frame([255; 6], 0x88cc),
        },
    }
}

/// The part of an event that does not depend on clock and interface.
fn comparable(event: &Event) -> Event {
    Event {
        time: 0,
        ifindex: 0,
        ..*event
    }
}

fn compare(role: u8, endpoint: u16, hook: Hook) {
    let interface = match (role, endpoint) {
        (NIC, _) => "eth0",
        (_, common::A) => "veth-a",
        _ => "veth-b",
    };
    for (number, policies) in POLICIES.iter().enumerate() {
        let compiler = common::compile(policies);
        let mut world = program::World::with_conntrack(role, endpoint, 1 << 16);
        world.load(compiler.snapshot());
        world.config(|config| {
            config.events_per_second = 100_000;
            // As in the settings of the replay.
            config.tcp_established = 8_000_000_000_000;
        });
        world.set_interface(&Interface {
            ifindex: program::GUARDED,
            endpoint: common::B,
            role: role::ENDPOINT,
            link: program::GUARDED,
            ..Interface::default()
        });
        let mut model = common::World::of(common::replay_with(policies, |settings| settings.inspectors = 0));
        let mut random = Random(0x9e37_79b9 + number as u64);
        let mut earlier: Vec<Vec<u8>> = Vec::new();
        for turn in 0..300 {
            let frame = packet(&mut random, &earlier);
            let outbound = random.below(2) == 0;
            // The programs see which frame the node has generated itself; for ARP a capture does not show it.
            let is_arp = frame[12..14] == [8, 6];
            let is_own = is_arp
                || [common::HOSTS[0], common::HOSTS[1]]
                    .iter()
                    .any(|host| sent_by(&frame, host));
            let real = match outbound {
                true if is_own => world.run_local(&frame),
                true => world.run_entered(&frame, program::GUARDED),
                false => world.run(hook, &frame),
            };
            let hint = if outbound {
                PathHint::Outbound
            } else {
                PathHint::Inbound
            };
            let seen = model.send_at(interface, hint, &frame);
            let context = || {
                format!(
                    "policies {number}, packet {turn}, {interface} {hint:?}, {hook:?}: {}\nprograms: {:?}",
                    hex(&frame),
                    real.reason
                )
            };
            let expected: Vec<Event> = real.events.iter().map(comparable).collect();
            let found: Vec<Event> = seen.events.iter().map(comparable).collect();
            assert_eq!(found, expected, "{}", context());
            let drops = found.iter().any(|event| event.kind == EventKind::Drop as u8);
            assert_eq!(!drops, real.passed, "{}", context());
            earlier.push(frame);
        }
    }
}

/// Returns the bytes of a frame in hexadecimal digits.
fn hex(frame: &[u8]) -> String {
    frame.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns whether an address is the source of an IP packet.
fn sent_by(frame: &[u8], address: &str) -> bool {
    match address.parse().unwrap() {
        std::net::IpAddr::V4(address) => {
            frame[12..14] == [8, 0] && frame.get(26..30) == Some(&address.octets()[..])
        }
        std::net::IpAddr::V6(address) => {
            frame[12..14] == [0x86, 0xdd] && frame.get(22..38) == Some(&address.octets()[..])
        }
    }
}

#[test]
fn the_model_gives_the_verdicts_of_the_programs_at_a_workload() {
    for endpoint in [common::A, common::B] {
        for hook in program::ENTRIES {
            compare(WORKLOAD, endpoint, hook);
        }
    }
}

#[test]
fn the_model_gives_the_verdicts_of_the_programs_at_a_nic() {
    for hook in program::ENTRIES {
        compare(NIC, common::HOST, hook);
    }
}
