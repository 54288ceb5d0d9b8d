//! The decoder against etherparse, and the BPF programs against the decoder in user space, on generated and mutated
//! frames.
//!
//! Where the decoder accepts a frame, etherparse must read the same addresses, protocol and ports from it. Where it
//! refuses one that etherparse reads, [`is_stricter`] must name the rule.

mod program;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use etherparse::{LaxSlicedPacket, NetSlice, SlicedPacket, TransportSlice, VlanSlice};
use palisade_abi::{Addr, Reason, protocol};
use palisade_packet::{Packet, Start, decode, flags, valid_tcp_flags};
use program::packets;
use program::{A_V4, HOST, HOST_V4, HOST_V6, Hook, NIC, WORLD_V4, WORLD_V6, World};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// Frames of each test. Half of them are mutated.
const FRAMES: u32 = 20_000;
/// Of them through the kernel as well, where a frame costs three system calls and more.
const FRAMES_IN_KERNEL: u32 = 4_000;

fn decoded(frame: &[u8]) -> (Packet, Result<(), Reason>) {
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
fn frames() -> impl Strategy<Value = Vec<u8>> {
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

fn runner(cases: u32) -> TestRunner {
    let config = Config {
        cases,
        failure_persistence: None,
        max_global_rejects: cases,
        ..Config::default()
    };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}

/// What etherparse reads.
struct Read {
    source: Addr,
    destination: Addr,
    protocol: u8,
    fragmented: bool,
    ports: Option<(u16, u16)>,
    tcp_flags: Option<u8>,
}

fn read_strictly(frame: &[u8]) -> Option<Read> {
    let sliced = SlicedPacket::from_ethernet(frame).ok()?;
    let (source, destination, payload) = match sliced.net.as_ref()? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            (
                Addr::from_v4(header.source()),
                Addr::from_v4(header.destination()),
                ip.payload(),
            )
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            (
                Addr::from_bytes(header.source()),
                Addr::from_bytes(header.destination()),
                ip.payload(),
            )
        }
        NetSlice::Arp(_) => return None,
    };
    let (mut ports, mut tcp_flags) = (None, None);
    match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            ports = Some((tcp.source_port(), tcp.destination_port()));
            tcp_flags = Some(tcp.slice()[13]);
        }
        Some(TransportSlice::Udp(udp)) => ports = Some((udp.source_port(), udp.destination_port())),
        Some(TransportSlice::Icmpv4(icmp)) => {
            ports = Some((u16::from(icmp.type_u8()), u16::from(icmp.code_u8())));
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            ports = Some((u16::from(icmp.type_u8()), u16::from(icmp.code_u8())));
        }
        _ => {}
    }
    Some(Read {
        source,
        destination,
        protocol: payload.ip_number.0,
        fragmented: payload.fragmented,
        ports,
        tcp_flags,
    })
}

/// The fault for which the IPv4 options of a frame are refused, which etherparse gives as bytes and does not read.
///
/// Every option but the two of one byte has a length that includes its type and length (RFC 791, 3.1). The decoder
/// reads at most twelve options, the end of the list included.
fn fault_of_options(frame: &[u8]) -> Option<&'static str> {
    const MOST: usize = 12;
    let sliced = SlicedPacket::from_ethernet(frame).ok()?;
    let Some(NetSlice::Ipv4(ip)) = &sliced.net else {
        return None;
    };
    let mut rest = ip.header().options();
    for _ in 0..MOST {
        rest = match rest {
            [] | [0, ..] => return None,
            [1, rest @ ..] => rest,
            [131 | 137, ..] => return Some("source route"),
            [_, length, ..] if (2..=rest.len()).contains(&usize::from(*length)) => {
                &rest[usize::from(*length)..]
            }
            _ => return Some("malformed option"),
        };
    }
    (!rest.is_empty()).then_some("too many options")
}

/// The rules by which a frame is refused that etherparse reads: everything it does not look at.
fn is_stricter(reason: Reason, packet: &Packet, read: &Read, frame: &[u8]) -> bool {
    match reason {
        // Three tags: etherparse reads as many as there are.
        Reason::TooManyVlans => LaxSlicedPacket::from_ethernet(frame).is_ok_and(|lax| {
            lax.vlan()
                .is_some_and(|vlan| matches!(vlan, VlanSlice::DoubleVlan(_)))
        }),
        // Flags, and the length of a UDP header in its own length field.
        Reason::CtInvalidHeader => {
            read.protocol == protocol::UDP || read.tcp_flags.is_none_or(|flags| !valid_tcp_flags(flags))
        }
        // ICMP of the other family.
        Reason::UnknownL4 => matches!(packet.protocol, protocol::ICMP | protocol::ICMPV6),
        // Options that are malformed, too many, or a source route.
        Reason::InvalidIpv4 => fault_of_options(frame).is_some(),
        // An address that is IPv4's.
        Reason::InvalidIpv6 => packet.source.is_v4() || packet.destination.is_v4(),
        // Order, number and kind of extension headers, routing headers of type 0.
        Reason::InvalidIpv6Extension => packet.is(flags::IPV6),
        // Fragments: etherparse does not look into them.
        Reason::InvalidFragment => packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER),
        // Headers that etherparse does not know: SCTP, the extension headers of RFC 7401 and RFC 5533 (read as
        // protocols); ICMP messages shorter than eight bytes.
        Reason::TruncatedL4 => {
            read.ports.is_none()
                || matches!(packet.protocol, protocol::ICMP | protocol::ICMPV6 | protocol::UDP)
        }
        Reason::TruncatedL3 => packet.is(flags::IPV6),
        _ => false,
    }
}

#[test]
fn decoder_and_etherparse_agree() {
    let seen = RefCell::new(BTreeMap::new());
    let count = |what: &'static str| *seen.borrow_mut().entry(what).or_insert(0) += 1;
    runner(FRAMES)
        .run(&frames(), |frame| {
            let (packet, result) = decoded(&frame);
            let read = read_strictly(&frame);
            let fault = fault_of_options(&frame);
            if let Some(fault) = fault {
                // No other fault of a frame that etherparse reads is found before those of the options.
                let expected = if result == Err(Reason::TooManyVlans) {
                    Reason::TooManyVlans
                } else {
                    Reason::InvalidIpv4
                };
                prop_assert_eq!(result, Err(expected), "{}", fault);
                count(fault);
            }
            match (result, read) {
                (Ok(()), Some(read)) if !packet.is(flags::NOT_IP) => {
                    prop_assert_eq!(
                        (packet.source, packet.destination),
                        (read.source, read.destination)
                    );
                    // Extension headers that etherparse takes for protocols, and reads no further.
                    if packet.is(flags::IPV6) && matches!(read.protocol, 135 | 139 | 140) {
                        count("etherparse stops");
                        return Ok(());
                    }
                    if !packet.is(flags::FRAGMENT_LATER) {
                        prop_assert_eq!(packet.protocol, read.protocol);
                    }
                    prop_assert_eq!(
                        read.fragmented,
                        packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER)
                    );
                    if let Some(ports) = read.ports {
                        prop_assert_eq!((packet.source_port, packet.destination_port), ports);
                    }
                    if let Some(tcp_flags) = read.tcp_flags {
                        prop_assert_eq!(packet.tcp_flags, tcp_flags);
                    }
                    count("both read");
                }
                // What etherparse refuses and the decoder lets through is nothing that it judges: no IP, an unknown
                // protocol, a later fragment.
                (Ok(()), None) => {
                    let harmless = packet.is(flags::NOT_IP)
                        || packet.is(flags::IPV6 | flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER)
                        || matches!(packet.protocol, protocol::UDP | 51);
                    prop_assert!(
                        harmless,
                        "etherparse: {:?}",
                        SlicedPacket::from_ethernet(&frame).err()
                    );
                    count("only the decoder");
                }
                (Err(reason), Some(read)) => {
                    prop_assert!(
                        is_stricter(reason, &packet, &read, &frame),
                        "{:?} {:?}",
                        reason,
                        packet
                    );
                    count("only etherparse");
                }
                _ => count("neither"),
            }
            Ok(())
        })
        .unwrap();
    let seen = seen.into_inner();
    println!("{seen:?}");
    assert!(seen["both read"] > FRAMES / 10, "{seen:?}");
    for fault in ["source route", "malformed option", "too many options"] {
        assert!(seen.get(fault).is_some_and(|n| *n > 20), "{fault}: {seen:?}");
    }
}

/// What the programs make of a frame: the reason for a malformed one, else what the event says.
#[test]
fn programs_and_decoder_agree() {
    let world = RefCell::new(World::new(NIC, HOST));
    // Everything reaches the policy, and its event: each packet is dropped there, and none tracked.
    world.borrow().config(|config| {
        config.events_per_second = 1_000_000;
        config.fragment = 0;
    });
    let judged = Cell::new(0);
    runner(FRAMES_IN_KERNEL)
        .run(&frames(), |frame| {
            let (packet, result) = decoded(&frame);
            for hook in [Hook::Xdp, Hook::TcIn] {
                // The kernel builds no socket buffer from half a network header.
                if hook == Hook::TcIn && frame.len() < 14 + 40 {
                    continue;
                }
                let got = world.borrow_mut().run(hook, &frame);
                if let Err(reason) = result {
                    prop_assert_eq!(got.reason, reason, "{:?}", hook);
                } else {
                    let malformed = matches!(
                        got.reason,
                        Reason::InvalidIpv4
                            | Reason::InvalidIpv6
                            | Reason::TruncatedL2
                            | Reason::TruncatedL3
                            | Reason::TruncatedL4
                            | Reason::TooManyVlans
                            | Reason::CtInvalidHeader
                            | Reason::InvalidIpv6Extension
                            | Reason::InvalidFragment
                            | Reason::UnknownL4
                            | Reason::PullFailed
                    );
                    prop_assert!(!malformed, "{:?}: {:?}", hook, got.reason);
                }
                for event in &got.events {
                    judged.set(judged.get() + 1);
                    prop_assert_eq!(
                        (event.source, event.destination),
                        (packet.source, packet.destination)
                    );
                    prop_assert_eq!(
                        (event.source_port, event.destination_port),
                        (packet.source_port, packet.destination_port)
                    );
                    prop_assert_eq!(
                        (event.protocol, event.tcp_flags),
                        (packet.protocol, packet.tcp_flags)
                    );
                    prop_assert_eq!(event.length, packet.length);
                }
            }
            Ok(())
        })
        .unwrap();
    assert!(judged.get() > FRAMES_IN_KERNEL, "{judged:?}");
}

/// Each fault of IPv4 options, and its nearest neighbour that is none.
#[test]
fn ipv4_options_are_refused_for_their_faults_only() {
    let with = |options: &[u8]| {
        let mut frame = packets::udp((WORLD_V4, 1), (HOST_V4, 2), &[]);
        frame[14] = 0x45 + (options.len() / 4) as u8;
        let total = u16::from_be_bytes([frame[16], frame[17]]) + options.len() as u16;
        frame[16..18].copy_from_slice(&total.to_be_bytes());
        frame.splice(34..34, options.iter().copied());
        frame
    };
    let behind_no_operations = |number: usize, option: &[u8]| [&vec![1; number], option].concat();
    for (options, fault) in [
        (vec![148, 4, 0, 0], None),
        (vec![148, 3, 0, 1], None),
        (vec![148, 3, 0, 2], Some("malformed option")),
        (vec![148, 5, 0, 0], Some("malformed option")),
        (vec![148, 1, 0, 0], Some("malformed option")),
        (vec![148, 0, 0, 0], Some("malformed option")),
        // Nothing behind the end is read.
        (vec![0, 131, 3, 4], None),
        (vec![131, 3, 4, 0], Some("source route")),
        (vec![1, 137, 3, 4], Some("source route")),
        // A record route is no source route.
        (vec![7, 3, 4, 0], None),
        (vec![1; 12], None),
        (behind_no_operations(11, &[68, 5, 5, 0, 0]), None),
        (behind_no_operations(12, &[68, 4, 5, 0]), Some("too many options")),
        // The end of the list is the thirteenth.
        (behind_no_operations(12, &[0; 4]), Some("too many options")),
        (vec![1; 40], Some("too many options")),
    ] {
        let frame = with(&options);
        assert!(read_strictly(&frame).is_some());
        assert_eq!(fault_of_options(&frame), fault, "{options:?}");
        let expected = fault.map_or(Ok(()), |_| Err(Reason::InvalidIpv4));
        assert_eq!(decoded(&frame).1, expected, "{options:?}");
    }
}

/// The mutations above rarely leave a packet that is right in all its parts.
#[test]
fn named_frames_are_read_alike() {
    for frame in [
        packets::tcp((WORLD_V4, 1), (HOST_V4, 2), packets::SYN),
        packets::udp((WORLD_V6, 3), (HOST_V6, 4), &[1, 2]),
        packets::echo(WORLD_V4, A_V4, 5, true),
        packets::tagged(&packets::echo(WORLD_V6, HOST_V6, 6, false), &[0x88a8, 0x8100]),
    ] {
        let (packet, result) = decoded(&frame);
        assert_eq!(result, Ok(()));
        let read = read_strictly(&frame).unwrap();
        assert_eq!(
            (packet.source, packet.destination),
            (read.source, read.destination)
        );
        assert_eq!(Some((packet.source_port, packet.destination_port)), read.ports);
    }
}
