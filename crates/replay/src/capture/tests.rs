//! Tests of capture files in both byte orders: pcap, pcapng, link types, and malformed files.

use std::io;

use super::*;

/// Byte order of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Order {
    Little,
    Big,
}

use Order::{Big, Little};

impl Order {
    fn u16(self, value: u16) -> [u8; 2] {
        if self == Big {
            value.to_be_bytes()
        } else {
            value.to_le_bytes()
        }
    }

    fn u32(self, value: u32) -> [u8; 4] {
        if self == Big {
            value.to_be_bytes()
        } else {
            value.to_le_bytes()
        }
    }
}

fn pcap(order: Order, magic: u32, link: u32) -> Vec<u8> {
    let mut file = order.u32(magic).to_vec();
    file.extend(order.u16(2));
    file.extend(order.u16(4));
    file.extend([0; 8]);
    file.extend(order.u32(262_144));
    file.extend(order.u32(link));
    file
}

fn record(order: Order, time: (u32, u32), length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [time.0, time.1, data.len() as u32, length] {
        bytes.extend(order.u32(word));
    }
    bytes.extend(data);
    bytes
}

fn block(order: Order, kind: u32, body: &[u8]) -> Vec<u8> {
    let padded = body.len().next_multiple_of(4);
    let length = order.u32(padded as u32 + 12);
    let mut bytes = order.u32(kind).to_vec();
    bytes.extend(length);
    bytes.extend(body);
    bytes.resize(8 + padded, 0);
    bytes.extend(length);
    bytes
}

fn section(order: Order) -> Vec<u8> {
    let mut body = order.u32(0x1a2b_3c4d).to_vec();
    body.extend(order.u16(1));
    body.extend(order.u16(0));
    body.extend([0xff; 8]);
    block(order, SECTION_HEADER, &body)
}

fn option(order: Order, code: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = order.u16(code).to_vec();
    bytes.extend(order.u16(value.len() as u16));
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn interface(order: Order, link: u16, options: &[Vec<u8>]) -> Vec<u8> {
    let mut body = order.u16(link).to_vec();
    body.extend([0; 2]);
    body.extend(order.u32(262_144));
    body.extend(options.concat());
    body.extend(option(order, 0, &[]));
    block(order, 1, &body)
}

fn enhanced(
    order: Order,
    interface: u32,
    stamp: u64,
    length: u32,
    data: &[u8],
    options: &[Vec<u8>],
) -> Vec<u8> {
    let mut body = Vec::new();
    for word in [
        interface,
        (stamp >> 32) as u32,
        stamp as u32,
        data.len() as u32,
        length,
    ] {
        body.extend(order.u32(word));
    }
    body.extend(data);
    body.resize(body.len().next_multiple_of(4), 0);
    body.extend(options.concat());
    block(order, 6, &body)
}

/// A packet of a file: time, interface, name of the interface, link type, direction, data, length.
type Seen = (Option<u64>, usize, String, i32, PathHint, Vec<u8>, u32);

/// Reads a file. Returns the packets, and the error with its offset.
fn read(file: &[u8]) -> (Vec<Seen>, Option<(u64, String)>) {
    let mut reader = Reader::new(Slow(file));
    let mut seen = Vec::new();
    loop {
        match reader.packet() {
            Ok(Some(packet)) => seen.push((
                packet.time,
                packet.interface,
                packet.interface_name.to_owned(),
                packet.link.0,
                packet.hint,
                packet.data.to_vec(),
                packet.length,
            )),
            Ok(None) => return (seen, None),
            Err(error) => {
                let found = (error.offset(), error.to_string());
                assert!(
                    matches!(reader.packet(), Ok(None)),
                    "nothing is read after an error"
                );
                return (seen, Some(found));
            }
        }
    }
}

/// A source that returns few bytes at a time, as a pipe can.
struct Slow<'a>(&'a [u8]);

impl Read for Slow<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let length = room.len().min(7).min(self.0.len());
        let (now, later) = self.0.split_at(length);
        room[..length].copy_from_slice(now);
        self.0 = later;
        Ok(length)
    }
}

#[test]
fn pcap_is_read_in_both_byte_orders_and_resolutions() {
    for order in [Little, Big] {
        for (magic, fraction) in [(0xa1b2_c3d4, 1_000), (0xa1b2_3c4d, 1)] {
            let mut file = pcap(order, magic, 1);
            file.extend(record(order, (5, 7), 3, b"abc"));
            file.extend(record(order, (6, 0), 90, b"de"));
            let (seen, error) = read(&file);
            assert_eq!(error, None);
            let name = String::new();
            let first = (5_000_000_000 + 7 * fraction, b"abc".to_vec(), 3);
            assert_eq!(
                seen,
                [first, (6_000_000_000, b"de".to_vec(), 90)].map(|(time, data, length)| (
                    Some(time),
                    0,
                    name.clone(),
                    1,
                    PathHint::Unknown,
                    data,
                    length
                ))
            );
        }
    }
}

#[test]
fn pcapng_is_read_with_its_interfaces_sections_and_directions() {
    for order in [Little, Big] {
        let flags = |value| option(order, 2, &order.u32(value));
        let mut file = section(order);
        file.extend(interface(
            order,
            1,
            &[option(order, 2, b"eth0"), option(order, 9, &[9])],
        ));
        file.extend(interface(order, 101, &[option(order, 2, b"tun0")]));
        // Another block is skipped.
        file.extend(block(order, 0x0bad, &[0; 20]));
        file.extend(enhanced(order, 0, 1_500_000_000, 60, b"abcd", &[flags(1)]));
        file.extend(enhanced(order, 1, 1_500_000, 3, b"abc", &[flags(2)]));
        // A section in the other byte order has interfaces of its own; its time stamps count in 2^-10 s, with 100 s more.
        let other = if order == Big { Little } else { Big };
        file.extend(section(other));
        let added = if other == Big {
            100_i64.to_be_bytes()
        } else {
            100_i64.to_le_bytes()
        };
        let options = [option(other, 9, &[0x8a]), option(other, 14, &added)];
        file.extend(interface(other, 276, &options));
        file.extend(enhanced(other, 0, 1536, 2, b"xy", &[]));
        let mut simple = other.u32(5).to_vec();
        simple.extend(b"hello");
        file.extend(block(other, 3, &simple));
        let (seen, error) = read(&file);
        assert_eq!(error, None);
        let none = String::new;
        assert_eq!(
            seen,
            [
                (
                    Some(1_500_000_000),
                    0,
                    "eth0".to_owned(),
                    1,
                    PathHint::Inbound,
                    b"abcd".to_vec(),
                    60
                ),
                (
                    Some(1_500_000_000),
                    1,
                    "tun0".to_owned(),
                    101,
                    PathHint::Outbound,
                    b"abc".to_vec(),
                    3
                ),
                (
                    Some(101_500_000_000),
                    2,
                    none(),
                    276,
                    PathHint::Unknown,
                    b"xy".to_vec(),
                    2
                ),
                (None, 2, none(), 276, PathHint::Unknown, b"hello".to_vec(), 5),
            ]
        );
    }
}

#[test]
fn an_error_names_its_offset_and_keeps_the_packets_before_it() {
    let mut file = pcap(Little, 0xa1b2_c3d4, 1);
    file.extend(record(Little, (1, 0), 3, b"abc"));
    let end = file.len() as u64;
    // Cut at every byte of the second packet.
    let second = record(Little, (2, 0), 4, b"wxyz");
    for cut in 1..second.len() {
        let mut file = file.clone();
        file.extend(&second[..cut]);
        let (seen, error) = read(&file);
        assert_eq!(seen.len(), 1);
        assert_eq!(
            error,
            Some((end, format!("at byte {end}: the file ends within a packet")))
        );
    }
    let mut endless = file.clone();
    endless.extend(record(Little, (2, 0), 0, &[]));
    let at = endless.len() - 8;
    endless[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    let (seen, error) = read(&endless);
    assert_eq!((seen.len(), error.map(|error| error.0)), (1, Some(end)));

    let mut file = section(Big);
    file.extend(interface(Big, 1, &[]));
    file.extend(enhanced(Big, 0, 0, 3, b"abc", &[]));
    let end = file.len() as u64;
    for (bad, text) in [
        (
            enhanced(Big, 7, 0, 3, b"abc", &[]),
            "an interface that the section does not describe",
        ),
        (block(Big, 3, &[]), "a block cannot be decoded"),
        (
            [[0, 0, 0, 6], [0, 0, 0, 13], [0; 4]].concat(),
            "the length of a block is not valid",
        ),
        (
            [[0, 0, 0, 6], [0x7f, 0, 0, 0], [0; 4]].concat(),
            "a block is longer than 16 MiB",
        ),
        (
            [[0x0a, 0x0d, 0x0d, 0x0a], [0, 0, 0, 28], [1; 4]].concat(),
            "byte-order magic",
        ),
        (
            enhanced(Big, 0, 0, 3, b"abc", &[])[..20].to_vec(),
            "ends within a block",
        ),
    ] {
        let mut file = file.clone();
        file.extend(bad);
        let (seen, error) = read(&file);
        let (offset, found) = error.unwrap();
        assert_eq!((seen.len(), offset), (1, end), "{text}");
        assert!(found.contains(text), "{found}");
    }
    // Options of four bytes each, of which a list would need several times the memory of the block.
    let many = vec![vec![0x99, 0x99, 0, 0]; (1 << 20) / 4 + 1];
    for bad in [interface(Big, 1, &many), enhanced(Big, 0, 0, 3, b"abc", &many)] {
        let (seen, error) = read(&[file.clone(), bad].concat());
        let wanted = format!("at byte {end}: the options of a block are longer than 1 MiB");
        assert_eq!((seen.len(), error), (1, Some((end, wanted))));
    }
    // The captured length exceeds the block.
    let mut lying = enhanced(Big, 0, 0, 3, b"abc", &[]);
    lying[20..24].copy_from_slice(&[0, 0, 1, 0]);
    file.extend(lying);
    assert_eq!(read(&file).1.unwrap().0, end);
}

#[test]
fn other_files_are_refused() {
    for file in [
        &b""[..],
        b"abc",
        b"\x1f\x8b\x08\0\0\0\0\0",
        b"#!/bin/sh\nexit 0, and some more text\n",
    ] {
        let (seen, error) = read(file);
        assert_eq!(seen, []);
        assert!(error.unwrap().1.contains("neither pcap nor pcapng"));
    }
    let (_, error) = read(&pcap(Little, 0xa1b2_c3d4, 1)[..20]);
    assert!(error.unwrap().1.contains("the header of the file"));
}

#[test]
fn link_headers_are_removed() {
    let frame = |link: i32, data: &[u8]| {
        let captured = Captured {
            time: None,
            interface: 0,
            interface_name: "",
            link: LinkType(link),
            hint: PathHint::Unknown,
            data,
            length: data.len() as u32 + 9,
        };
        captured
            .frame()
            .map(|frame| (frame.network, frame.data.to_vec(), frame.length, frame.hint))
    };
    let sll = |kind: u8, ether_type: u16| {
        let mut header = vec![0, kind, 0, 1, 0, 6, 2, 0, 0, 0, 0, 1, 0, 0];
        header.extend(ether_type.to_be_bytes());
        header.extend(b"ip");
        header
    };
    let sll2 = |kind: u8, ether_type: u16| {
        let mut header = ether_type.to_be_bytes().to_vec();
        header.extend([0, 0, 0, 0, 0, 3, 0, 1, kind, 6, 2, 0, 0, 0, 0, 1, 0, 0]);
        header.extend(b"ip");
        header
    };
    let ip = |hint| Some((Network::Ip, b"ip".to_vec(), 11, hint));
    assert_eq!(frame(113, &sll(0, 0x0800)), ip(PathHint::Inbound));
    assert_eq!(frame(113, &sll(4, 0x86dd)), ip(PathHint::Outbound));
    assert_eq!(frame(276, &sll2(4, 0x86dd)), ip(PathHint::Outbound));
    assert_eq!(
        frame(276, &sll2(1, 0x0806)),
        Some((Network::Other(0x0806), b"ip".to_vec(), 11, PathHint::Inbound))
    );
    for link in [12, 14, 101, 228, 229] {
        assert_eq!(frame(link, b"ip"), ip(PathHint::Unknown));
    }
    for family in [2, 10, 24, 28, 30] {
        for link in [0, 108] {
            assert_eq!(
                frame(link, &[&[0, 0, 0, family][..], b"ip"].concat()),
                ip(PathHint::Unknown)
            );
            assert_eq!(
                frame(link, &[&[family, 0, 0, 0][..], b"ip"].concat()),
                ip(PathHint::Unknown)
            );
        }
    }
    assert_eq!(frame(0, b"\0\0\0\x07ip").unwrap().0, Network::Other(0));
    for (link, data) in [(105, &b"wlan"[..]), (113, b"short"), (276, b"short"), (0, b"abc")] {
        assert_eq!(frame(link, data), None);
    }
}
