//! Packets of a capture that wait for what an inspector decides about them.
//!
//! The programs only know that a packet is punted. The verdict of its message is in a record of the flow ring, which
//! arrives a little later. Packets wait in the order in which they came, so that the file stays in order. Start at
//! [`Held`].

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    time::{Duration, Instant},
};

use palisade_abi::protocol;
use palisade_flowlog::Timestamp;

use crate::pcapng::Direction;

/// Longest time for which a punted packet waits for its verdict. A message whose head arrives over a longer
/// time has no verdict at its first packets.
const MAX_WAIT: Duration = Duration::from_millis(500);
/// Largest number of packets that wait.
const MAX_PACKETS: usize = 8_192;
/// Largest number of bytes of packets that wait.
const MAX_BYTES: usize = 16 << 20;
/// Largest number of verdicts in the comment of one packet.
const MAX_VERDICTS: u8 = 4;

/// Packets of one direction of a flow that were punted at one interface.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Key {
    pub(super) ifindex: u32,
    pub(super) protocol: u8,
    pub(super) source: (IpAddr, u16),
    pub(super) destination: (IpAddr, u16),
}

/// A packet that is ready to be written, except for its comment.
#[derive(Debug)]
pub(super) struct HeldPacket {
    /// Index of the interface, and whether the frame begins with the network header.
    pub(super) at: (u32, bool),
    /// Number of the interface in the file.
    pub(super) interface: u32,
    pub(super) time: Timestamp,
    pub(super) bytes: Vec<u8>,
    pub(super) length: u32,
    pub(super) direction: Direction,
    pub(super) comment: String,
    /// `None` if no inspector decides.
    pub(super) key: Option<Key>,
}

#[derive(Debug)]
struct Entry {
    packet: HeldPacket,
    since: Instant,
    verdicts: u8,
}

impl Entry {
    fn add(&mut self, verdict: &str) {
        self.packet.comment.push_str(verdict);
        self.verdicts += 1;
    }
}

/// Packets in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Held {
    entries: VecDeque<Entry>,
    /// Number of the first entry; the others have the following numbers.
    first: u64,
    /// Numbers of the entries with a key, in ascending order.
    waiting: HashMap<Key, VecDeque<u64>>,
    bytes: usize,
}

impl Held {
    pub(super) fn push(&mut self, packet: HeldPacket, now: Instant) {
        self.bytes += packet.bytes.len();
        if let Some(key) = packet.key {
            let number = self.first + self.entries.len() as u64;
            self.waiting.entry(key).or_default().push_back(number);
        }
        self.entries.push_back(Entry {
            packet,
            since: now,
            verdicts: 0,
        });
    }

    /// Returns whether packets wait for a verdict with this key.
    pub(super) fn waits_for(&self, key: &Key) -> bool {
        self.waiting.contains_key(key)
    }

    /// Adds a verdict of an inspector to the comments of the packets that it is about. `time`: of the record.
    ///
    /// A message of a TCP stream can have several packets, and a packet several messages: the verdict is that of all
    /// packets without one that came before it, or else of the last packet. A datagram is one message.
    pub(super) fn decide(&mut self, key: &Key, time: Timestamp, verdict: &str) {
        let is_stream = key.protocol == protocol::TCP;
        let mut last = None;
        let mut found = false;
        for number in self.waiting.get(key).into_iter().flatten() {
            let at = usize::try_from(number - self.first).unwrap_or(usize::MAX);
            let Some(entry) = self.entries.get_mut(at).filter(|entry| entry.packet.time <= time) else {
                break;
            };
            if entry.verdicts == 0 && (is_stream || !found) {
                entry.add(verdict);
                found = true;
            }
            last = Some(at);
        }
        if !found
            && is_stream
            && let Some(entry) = last.and_then(|at| self.entries.get_mut(at))
            && entry.verdicts < MAX_VERDICTS
        {
            entry.add(verdict);
        }
    }

    /// Returns the next packet if it has its verdict, needs none, or has waited too long; every packet if `all`.
    pub(super) fn pop(&mut self, now: Instant, all: bool) -> Option<HeldPacket> {
        let first = self.entries.front()?;
        let is_over = all
            || self.entries.len() > MAX_PACKETS
            || self.bytes > MAX_BYTES
            || now.saturating_duration_since(first.since) >= MAX_WAIT;
        if first.packet.key.is_some() && first.verdicts == 0 && !is_over {
            return None;
        }
        let packet = self.entries.pop_front()?.packet;
        self.first += 1;
        self.bytes -= packet.bytes.len();
        if let Some(key) = packet.key
            && let Some(numbers) = self.waiting.get_mut(&key)
        {
            numbers.pop_front();
            if numbers.is_empty() {
                self.waiting.remove(&key);
            }
        }
        Some(packet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(protocol: u8) -> Key {
        let end = |port| (IpAddr::from([192, 0, 2, 1]), port);
        Key {
            ifindex: 3,
            protocol,
            source: end(1_000),
            destination: end(80),
        }
    }

    fn packet(time: i64, key: Option<Key>) -> HeldPacket {
        HeldPacket {
            at: (3, false),
            interface: 0,
            time: Timestamp(time),
            bytes: vec![0; 10],
            length: 10,
            direction: Direction::Inbound,
            comment: time.to_string(),
            key,
        }
    }

    fn drain(held: &mut Held, now: Instant, all: bool) -> Vec<String> {
        std::iter::from_fn(|| held.pop(now, all))
            .map(|packet| packet.comment)
            .collect()
    }

    #[test]
    fn packets_stay_in_order_and_wait_for_the_verdict_of_the_first() {
        let (mut held, now) = (Held::default(), Instant::now());
        held.push(packet(1, None), now);
        held.push(packet(2, Some(key(protocol::TCP))), now);
        held.push(packet(3, None), now);
        assert_eq!(drain(&mut held, now, false), ["1"]);
        let other = Key {
            ifindex: 4,
            ..key(protocol::TCP)
        };
        assert!(held.waits_for(&key(protocol::TCP)) && !held.waits_for(&other));
        held.decide(&other, Timestamp(9), " other");
        assert_eq!(drain(&mut held, now, false), [""; 0]);
        held.decide(&key(protocol::TCP), Timestamp(9), " denied");
        assert_eq!(drain(&mut held, now, false), ["2 denied", "3"]);
        assert_eq!((held.bytes, held.waiting.len()), (0, 0));
    }

    #[test]
    fn a_verdict_is_of_all_packets_of_a_message_and_of_none_that_came_later() {
        let (mut held, now) = (Held::default(), Instant::now());
        let tcp = Some(key(protocol::TCP));
        for time in [1, 2, 5] {
            held.push(packet(time, tcp), now);
        }
        held.decide(&key(protocol::TCP), Timestamp(3), " a");
        // The second message of the same packet.
        held.decide(&key(protocol::TCP), Timestamp(4), " b");
        held.decide(&key(protocol::TCP), Timestamp(6), " c");
        assert_eq!(drain(&mut held, now, false), ["1 a", "2 a b", "5 c"]);
    }

    #[test]
    fn each_datagram_has_its_own_verdict() {
        let (mut held, now) = (Held::default(), Instant::now());
        let udp = Some(key(protocol::UDP));
        held.push(packet(1, udp), now);
        held.push(packet(2, udp), now);
        held.decide(&key(protocol::UDP), Timestamp(3), " a");
        held.decide(&key(protocol::UDP), Timestamp(4), " b");
        held.decide(&key(protocol::UDP), Timestamp(5), " c");
        assert_eq!(drain(&mut held, now, false), ["1 a", "2 b"]);
    }

    #[test]
    fn the_wait_is_bounded_in_time_and_number() {
        let (mut held, now) = (Held::default(), Instant::now());
        held.push(packet(1, Some(key(protocol::TCP))), now);
        assert_eq!(drain(&mut held, now, false), [""; 0]);
        assert_eq!(drain(&mut held, now + MAX_WAIT, false), ["1"]);
        for time in 0..=MAX_PACKETS as i64 {
            held.push(packet(time, Some(key(protocol::TCP))), now);
        }
        assert_eq!(drain(&mut held, now, false), ["0"]);
        assert_eq!(drain(&mut held, now, true).len(), MAX_PACKETS);
        assert_eq!(held.bytes, 0);
    }
}
