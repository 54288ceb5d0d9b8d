//! Frames for tests of the decoder, also for those that send them through the kernel
//! (`crates/datapath/tests/program_differential.rs`).

use palisade_abi::{Reason, protocol};
use palisade_packet::{Packet, Start, decode};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Returns what the decoder reads of a frame.
pub fn decoded(frame: &[u8]) -> (Packet, Result<(), Reason>) {
    let mut packet = Packet::default();
    let result = decode(frame, Start::Ethernet { tags_removed: 0 }, &mut packet);
    (packet, result)
}

/// A payload that begins like the transport header of a protocol.
fn transport() -> impl Strategy<Value = (u8, Vec<u8>)> {
    let protocol = prop_oneof![
        3 => Just(protocol::TCP),
        3 => Just(protocol::UDP),
        1 => Just(protocol::SCTP),
        2 => Just(protocol::ICMP),
        2 => Just(protocol::ICMPV6),
        1 => any::<u8>(),
    ];
    (protocol, prop::collection::vec(any::<u8>(), 0..64), any::<bool>()).prop_map(
        |(protocol, mut payload, sane)| {
            let length = payload.len();
            if sane && protocol == protocol::TCP && length >= 20 {
                payload[12] = 0x50;
                payload[13] = [0x02, 0x12, 0x10, 0x18, 0x11, 0x04][usize::from(payload[13] % 6)];
            }
            if sane && protocol == protocol::UDP && length >= 8 {
                payload[4..6].copy_from_slice(&(length as u16).to_be_bytes());
            }
            (protocol, payload)
        },
    )
}

/// The options of an IPv4 header, not padded: none, random bytes, or mostly well-formed options up to more than a header may
/// have.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let option = prop_oneof![
        16 => Just(vec![1]),
        6 => (2u8..=5, any::<[u8; 3]>()).prop_map(|(length, data)| {
            let mut option = vec![68, length];
            option.extend_from_slice(&data[..usize::from(length) - 2]);
            option
        }),
        1 => prop_oneof![Just(131), Just(137)].prop_map(|kind| vec![kind, 3, 4]),
        1 => Just(vec![0]),
    ];
    prop_oneof![
        1 => Just(vec![]),
        1 => prop::collection::vec(any::<u8>(), 0..=10),
        1 => prop::collection::vec(option, 0..=20).prop_map(|options| options.concat()),
    ]
}

/// Frames with up to three tags, IPv4 with options, IPv6 with extension headers, fragments; and what becomes of them
/// when bytes change or are missing.
pub fn frames() -> impl Strategy<Value = Vec<u8>> {
    let v4 = (transport(), any::<[u8; 8]>(), options(), 0u16..6, any::<bool>()).prop_map(
        |((protocol, payload), addrs, options, fragment, more)| {
            let options = &options[..options.len().min(40) / 4 * 4];
            let total = 20 + options.len() + payload.len();
            let mut ip = vec![0x45 + (options.len() / 4) as u8, 0];
            ip.extend_from_slice(&(total as u16).to_be_bytes());
            let field = match fragment {
                0..3 => 0,
                3 => 0x2000,
                _ => (fragment * 3) | (u16::from(more) << 13),
            };
            ip.extend_from_slice(&[0, 9]);
            ip.extend_from_slice(&field.to_be_bytes());
            ip.extend_from_slice(&[64, protocol, 0, 0]);
            ip.extend_from_slice(&addrs);
            ip.extend_from_slice(options);
            ip.extend_from_slice(&payload);
            (0x0800u16, ip)
        },
    );
    let extension = prop_oneof![
        Just(0u8),
        Just(43),
        Just(44),
        Just(51),
        Just(60),
        Just(135),
        Just(139),
        Just(140)
    ];
    let v6 = (
        transport(),
        any::<[u8; 32]>(),
        prop::collection::vec((extension, 0u8..3, any::<[u8; 6]>()), 0..5),
    )
        .prop_map(|((protocol, payload), addrs, extensions)| {
            let kinds: Vec<u8> = extensions
                .iter()
                .map(|(kind, ..)| *kind)
                .chain([protocol])
                .collect();
            let mut body = Vec::new();
            for ((kind, units, bytes), next) in extensions.iter().zip(&kinds[1..]) {
                let (length_field, length) = match kind {
                    44 => (0, 8),
                    51 => (*units + 1, (usize::from(*units) + 3) * 4),
                    _ => (*units, (usize::from(*units) + 1) * 8),
                };
                let mut header = vec![*next, length_field];
                header.extend_from_slice(bytes);
                // Mostly whole packets: few chains would be read to their end otherwise.
                if *kind == 44 && bytes[5] < 128 {
                    header[2..4].fill(0);
                }
                header.resize(length, 0);
                body.extend_from_slice(&header);
            }
            body.extend_from_slice(&payload);
            let mut ip = vec![0x60, 0, 0, 0];
            ip.extend_from_slice(&(body.len() as u16).to_be_bytes());
            ip.extend_from_slice(&[kinds[0], 64]);
            ip.extend_from_slice(&addrs);
            ip.extend_from_slice(&body);
            (0x86ddu16, ip)
        });
    let tags = prop::collection::vec(prop_oneof![Just(0x8100u16), Just(0x88a8)], 0..4);
    let mutations = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
    let net = prop_oneof![v4, v6];
    (net, tags, mutations, any::<bool>(), 0usize..80, 0usize..8).prop_map(
        |((ether_type, ip), tags, mutations, mutate, cut, padding)| {
            let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
            for tag in tags.iter().take(if mutate { 3 } else { 2 }) {
                frame.extend_from_slice(&tag.to_be_bytes());
                frame.extend_from_slice(&[0, 7]);
            }
            frame.extend_from_slice(&ether_type.to_be_bytes());
            frame.extend_from_slice(&ip);
            frame.resize(frame.len() + padding, 0);
            if mutate {
                for (at, value) in &mutations {
                    let at = at.index(frame.len());
                    frame[at] = *value;
                }
                if cut < frame.len() && cut > 14 {
                    frame.truncate(frame.len() - cut / 2);
                }
            }
            frame
        },
    )
}

/// Returns a runner that tries the same cases each time.
pub fn runner(cases: u32) -> TestRunner {
    let config = Config {
        cases,
        failure_persistence: None,
        max_global_rejects: cases,
        ..Config::default()
    };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}
