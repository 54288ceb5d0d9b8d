//! The decoder against etherparse, on generated and mutated frames.
//!
//! Where the decoder accepts a frame, etherparse must read the same addresses, protocol and ports from it. Where it
//! refuses one that etherparse reads, [`is_stricter`] must name the rule. That the BPF programs read what the decoder reads
//! in user space is tested in `crates/datapath/tests/program_differential.rs`.

mod frames;
mod packets;

use std::cell::RefCell;
use std::collections::BTreeMap;

use etherparse::{LaxSlicedPacket, NetSlice, SlicedPacket, TransportSlice, VlanSlice};
use frames::{decoded, frames, runner};
use palisade_abi::{Addr, Reason, protocol};
use palisade_packet::{Packet, flags, valid_tcp_flags};
use proptest::prelude::*;

/// Frames that are tried. Half of them are mutated.
const FRAMES: u32 = 20_000;

const HOST_V4: &str = "10.0.0.1";
const HOST_V6: &str = "fd00::1";
const A_V4: &str = "10.0.1.10";
const WORLD_V4: &str = "192.0.2.7";
const WORLD_V6: &str = "2001:db8::7";

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
                // What etherparse refuses and the decoder lets through is nothing that it evaluates: no IP, an unknown
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
