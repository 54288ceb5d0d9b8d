//! Captures: turns the records of the programs into pcapng blocks, with the verdict in each packet's comment.
//!
//! Depends on `palisade-datapath` for the records and on `palisade-flowlog` for the filters. Start at [`Recorder`];
//! `handlers/capture.rs` reads the ring and sends the blocks.

mod headers;
mod held;
mod prefilter;

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt::Write as _,
    sync::Arc,
    time::Instant,
};

use palisade_abi::{
    CaptureHeader, CaptureSettings, Inspector, MAX_CAPTURED, captured_flags, event_flags, punt_hook,
};
use palisade_flowlog::{Cursor, Filters, Flow, Raw, Timestamp, filter::ApiFilters, flow::FlowType};
use palisade_inspect::record::Record;

use self::held::{Held, HeldPacket, Key};
use super::view::{EventNames, Shared};
use crate::pcapng::{self, LinkType, Packet, Statistics, Writer};

/// Largest number of interfaces that one capture describes; packets of further interfaces count as lost. Interfaces can
/// come and go while a capture runs, each with a new index.
const MAX_INTERFACES: usize = 4_096;
/// Bytes that are reserved for the statistics of each interface.
const STATISTICS_BYTES: u64 = 256;

/// Part of each packet that is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Snap {
    /// Headers up to the transport header, no payload.
    Headers,
    /// At most this number of bytes, payload included.
    Bytes(u32),
}

impl Snap {
    /// Returns the number of bytes that the programs copy.
    fn copied(self) -> u32 {
        match self {
            Self::Headers => headers::MAX_BYTES,
            Self::Bytes(bytes) => bytes.clamp(1, MAX_CAPTURED),
        }
    }
}

/// Limits of a capture.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Largest number of packets.
    pub(super) packets: u64,
    /// Largest total length of the blocks, bytes.
    pub(super) bytes: u64,
}

/// Returns the settings of the programs. `until`: ns of the monotonic clock.
pub(super) fn settings(
    filters: &ApiFilters,
    snap: Snap,
    until: u64,
    ifindex: impl Fn(&str) -> Option<u32>,
) -> CaptureSettings {
    CaptureSettings {
        conditions: prefilter::conditions(filters, ifindex),
        ..CaptureSettings::all(until, snap.copied())
    }
}

/// An interface that the capture has described.
struct Interface {
    number: u32,
    packets: u64,
}

/// Writes blocks for the packets that the filters accept.
pub(super) struct Recorder {
    writer: Writer,
    filters: Filters,
    snap: Snap,
    bounds: Bounds,
    shared: Arc<Shared>,
    names: EventNames,
    /// By interface index and type of the first header.
    interfaces: HashMap<(u32, bool), Interface>,
    /// Time of the last packet that was taken from the ring.
    last_taken: Option<Timestamp>,
    /// Packets that are not written yet.
    held: Held,
    /// Flow records of inspectors.
    records: Cursor,
    /// A verdict that was read before its packet.
    next: Option<Verdict>,
    /// The wall clock minus the monotonic clock, ns.
    clock_offset: i64,
    /// Start of the capture, ns since 1970.
    started: u64,
    /// Packets that were written.
    packets: u64,
    /// Bytes of all blocks that [`Self::take`] and [`Self::statistics`] have returned.
    bytes: u64,
    /// Packets that no interface description was left for.
    undescribed: u64,
    /// Whether a packet did not fit in the bounds.
    full: bool,
}

impl Recorder {
    /// Returns a recorder that has written the section header.
    pub(super) fn new(
        filters: Filters,
        snap: Snap,
        bounds: Bounds,
        shared: Arc<Shared>,
        clock_offset: i64,
        records: Cursor,
        description: &str,
    ) -> Self {
        let names = EventNames::new(shared.get());
        let mut writer = Writer::default();
        let os = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        writer.section(
            std::env::consts::ARCH,
            &format!("Linux {}", os.trim()),
            concat!("palisade ", env!("CARGO_PKG_VERSION")),
            description,
        );
        Self {
            writer,
            filters,
            snap,
            bounds,
            shared,
            names,
            interfaces: HashMap::new(),
            last_taken: None,
            held: Held::default(),
            records,
            next: None,
            clock_offset,
            started: wall_clock(),
            packets: 0,
            bytes: 0,
            undescribed: 0,
            full: false,
        }
    }

    /// Follows changes of names and of the clock. Called before each batch of records. Returns whether names have
    /// changed.
    pub(super) fn refresh(&mut self, clock_offset: i64) -> bool {
        self.clock_offset = clock_offset;
        let view = self.shared.get();
        if self.names.is_of(&view) {
            return false;
        }
        self.names = EventNames::new(view);
        true
    }

    /// Takes a packet, if the filters accept it. [`Self::write`] writes it.
    pub(super) fn record(&mut self, header: &CaptureHeader, bytes: &[u8]) {
        if self.is_full() {
            return;
        }
        let mut event = header.event;
        let is_layer3 = header.flags & captured_flags::LAYER3 != 0;
        if !is_layer3 && let Some((macs, _)) = bytes.split_first_chunk::<12>() {
            let [a, b, c, d, e, f, g, h, i, j, k, l] = *macs;
            event.destination_mac = [a, b, c, d, e, f];
            event.source_mac = [g, h, i, j, k, l];
        }
        let flow = Flow::from_event(&event, &self.names, self.clock_offset);
        self.last_taken = Some(flow.time);
        if !self.filters.matches(&flow) {
            return;
        }
        let (mut frame, length) = frame(header, bytes, is_layer3);
        let headers = headers::length(&frame, length, is_layer3);
        let kept = match self.snap {
            Snap::Headers => headers,
            Snap::Bytes(snap) => snap,
        };
        frame.truncate(usize::try_from(kept).unwrap_or(usize::MAX));
        let Some(interface) = self.interface(&flow, event.ifindex, is_layer3) else {
            self.undescribed += 1;
            return;
        };
        // An inspector decides about data, so an acknowledgement without data has no verdict of its own.
        let is_decided = header.flags & captured_flags::PUNTED != 0 && length > headers;
        let packet = HeldPacket {
            at: (event.ifindex, is_layer3),
            interface,
            time: flow.time,
            bytes: frame,
            length,
            direction: if header.hook == punt_hook::TC_EGRESS {
                pcapng::Direction::Outbound
            } else {
                pcapng::Direction::Inbound
            },
            comment: comment(&flow, header),
            key: is_decided.then(|| key_of_flow(&flow)).flatten(),
        };
        self.held.push(packet, Instant::now());
    }

    /// Adds the verdicts of inspectors to the packets that were taken. `until`: time before which all packets were taken;
    /// later verdicts are left for the next call.
    pub(super) fn decide(&mut self, until: Timestamp) {
        loop {
            if let Some(verdict) = self.next.take_if(|verdict| verdict.time < until) {
                self.held.decide(&verdict.key, verdict.time, &verdict.text);
            }
            if self.next.is_some() {
                return;
            }
            let (held, names) = (&self.held, &self.names);
            let wanted = |key: &Key, time| time >= until || held.waits_for(key);
            let read = self.records.read_raw(|raw| match raw {
                Raw::Record(record, time) => {
                    let key = key_of_record(record);
                    wanted(&key, time).then(|| Verdict::new(key, &Flow::from_record(record, names, time)))
                }
                Raw::Flow(flow) if flow.flow_type == FlowType::L7 => key_of_flow(flow)
                    .filter(|key| wanted(key, flow.time))
                    .map(|key| Verdict::new(key, flow)),
                Raw::Flow(_) | Raw::Lost(_) => None,
            });
            match read {
                Some(verdict) => self.next = verdict,
                None => return,
            }
        }
    }

    /// Writes the packets that need no further verdict; all packets if `all`.
    pub(super) fn write(&mut self, all: bool) {
        let now = Instant::now();
        while !self.is_full()
            && let Some(packet) = self.held.pop(now, all)
        {
            self.writer.packet(&Packet {
                interface: packet.interface,
                time: u64::try_from(packet.time.0).unwrap_or(0),
                bytes: &packet.bytes,
                length: packet.length,
                direction: packet.direction,
                id: self.packets,
                comment: &packet.comment,
            });
            self.packets += 1;
            if let Some(interface) = self.interfaces.get_mut(&packet.at) {
                interface.packets += 1;
            }
        }
    }

    /// Returns the time of the last packet that was taken, also if the filters do not choose it; `None` if none was.
    pub(super) const fn last_taken(&self) -> Option<Timestamp> {
        self.last_taken
    }

    /// Returns the number of an interface and describes it if it is new.
    fn interface(&mut self, flow: &Flow, ifindex: u32, is_layer3: bool) -> Option<u32> {
        let number = self.interfaces.len();
        let (link_type, copied) = (
            if is_layer3 {
                LinkType::Raw
            } else {
                LinkType::Ethernet
            },
            self.snap.copied(),
        );
        match self.interfaces.entry((ifindex, is_layer3)) {
            Entry::Occupied(known) => Some(known.get().number),
            Entry::Vacant(_) if number >= MAX_INTERFACES => None,
            Entry::Vacant(vacant) => {
                let name = flow
                    .interface
                    .as_ref()
                    .map(|interface| interface.name.to_string())
                    .filter(|name| !name.is_empty())
                    .unwrap_or_else(|| format!("interface {ifindex}"));
                self.writer.interface(link_type, &name, "", copied);
                let number = u32::try_from(number).ok()?;
                vacant.insert(Interface { number, packets: 0 });
                Some(number)
            }
        }
    }

    /// Returns the blocks that were written since the last call, as far as the bounds allow.
    pub(super) fn take(&mut self) -> Vec<u8> {
        let bytes = self.writer.take();
        let reserved = self.reserved();
        let left = self
            .bounds
            .bytes
            .saturating_sub(self.bytes.saturating_add(reserved));
        if bytes.len() as u64 <= left {
            self.bytes += bytes.len() as u64;
            return bytes;
        }
        // The last blocks exceed the limit. Descriptions of interfaces are kept, since the statistics refer to them.
        let (mut whole, mut kept) = (Vec::new(), left);
        for (kind, block) in pcapng::blocks(&bytes) {
            if kind != pcapng::block_type::PACKET {
                whole.extend_from_slice(block);
            } else if block.len() as u64 <= kept && !self.full {
                kept -= block.len() as u64;
                whole.extend_from_slice(block);
            } else {
                self.full = true;
                self.packets = self.packets.saturating_sub(1);
                let number = pcapng::interface_of(block);
                let counted = self.interfaces.values_mut().find(|i| Some(i.number) == number);
                if let Some(interface) = counted {
                    interface.packets = interface.packets.saturating_sub(1);
                }
            }
        }
        self.bytes += whole.len() as u64;
        whole
    }

    /// Returns whether a bound is reached.
    pub(super) fn is_full(&self) -> bool {
        self.full || self.packets >= self.bounds.packets
    }

    /// Returns the bytes that the statistics need.
    fn reserved(&self) -> u64 {
        STATISTICS_BYTES * (self.interfaces.len() as u64 + 1)
    }

    /// Returns the number of packets and bytes that were written.
    pub(super) fn written(&self) -> (u64, u64) {
        (self.packets, self.bytes)
    }

    /// Returns the number of packets that could not be written because there were too many interfaces.
    pub(super) fn undescribed(&self) -> u64 {
        self.undescribed
    }

    /// Returns the blocks with the statistics of each interface. `lost`: packets that did not fit in the ring, at all
    /// interfaces together.
    pub(super) fn statistics(&mut self, lost: u64) -> Vec<u8> {
        let comment = match lost {
            0 => String::new(),
            lost => format!("{lost} packets of all interfaces were lost: the buffer of the capture was full"),
        };
        let mut interfaces: Vec<&Interface> = self.interfaces.values().collect();
        interfaces.sort_by_key(|interface| interface.number);
        for interface in interfaces {
            self.writer.statistics(&Statistics {
                interface: interface.number,
                start: self.started,
                end: wall_clock(),
                received: interface.packets,
                // The programs count the lost packets of all interfaces together.
                lost: (lost == 0).then_some(0),
                comment: &comment,
            });
        }
        let bytes = self.writer.take();
        self.bytes += bytes.len() as u64;
        bytes
    }
}

/// Returns the frame as it came, as far as it was copied, and its length. A VLAN tag that the kernel has removed is put
/// back.
fn frame(header: &CaptureHeader, bytes: &[u8], is_layer3: bool) -> (Vec<u8>, u32) {
    if header.vlan_protocol == 0 || is_layer3 {
        return (bytes.to_vec(), header.frame_length);
    }
    let mut frame = bytes.to_vec();
    if let Some(at) = (frame.len() >= 12).then_some(12..12) {
        let [a, b] = header.vlan_protocol.to_be_bytes();
        let [c, d] = header.vlan_tci.to_be_bytes();
        frame.splice(at, [a, b, c, d]);
    }
    (frame, header.frame_length.saturating_add(4))
}

/// What an inspector has decided about a message.
struct Verdict {
    key: Key,
    time: Timestamp,
    /// Appended to the comment of the packet.
    text: String,
}

impl Verdict {
    /// `flow`: of the message. Its texts (URLs, names) are not taken over: they are payload.
    fn new(key: Key, flow: &Flow) -> Self {
        let message = if flow.is_reply == Some(true) {
            "response"
        } else {
            "request"
        };
        let mut text = format!(
            ", then {message} {}, reason {}",
            flow.verdict.as_ref(),
            flow.palisade.reason
        );
        push_rule(&mut text, flow);
        Self {
            key,
            time: flow.time,
            text,
        }
    }
}

fn key_of_record(record: &Record) -> Key {
    let end = |(address, port): (palisade_abi::Addr, u16)| (address.into(), port);
    Key {
        ifindex: record.ifindex,
        protocol: record.protocol,
        source: end(record.source),
        destination: end(record.destination),
    }
}

/// Returns the key of a flow record; `None` without ports.
fn key_of_flow(flow: &Flow) -> Option<Key> {
    let ip = flow.ip.as_ref()?;
    let (source_port, destination_port) = flow.l4?.ports()?;
    Some(Key {
        ifindex: flow.interface.as_ref().map_or(0, |interface| interface.index),
        protocol: flow.palisade.protocol,
        source: (ip.source, source_port),
        destination: (ip.destination, destination_port),
    })
}

/// Appends the deciding rule with its place.
fn push_rule(text: &mut String, flow: &Flow) {
    if let Some(rule) = &flow.palisade.rule {
        // Writing to a string does not fail.
        let _ = write!(text, ", {}", rule.text);
        if !rule.location.is_empty() {
            let _ = write!(text, " ({})", rule.location);
        }
    }
}

/// Returns the comment of a packet: verdict, reason, deciding rule with its place, direction, endpoint, hook.
fn comment(flow: &Flow, header: &CaptureHeader) -> String {
    let mut text = format!(
        "verdict {}, reason {}",
        flow.verdict.as_ref(),
        flow.palisade.reason
    );
    // Writing to a string does not fail.
    if header.flags & captured_flags::PUNTED != 0 {
        let _ = write!(text, ", punted to {}", inspector(header.inspector));
    }
    push_rule(&mut text, flow);
    let is_egress = header.event.flags & event_flags::EGRESS != 0;
    let own = if is_egress {
        &flow.source
    } else {
        &flow.destination
    };
    if !own.pod_name.is_empty() {
        let direction = if is_egress { "from" } else { "to" };
        let namespace = match &*own.namespace {
            "" => String::new(),
            namespace => format!("{namespace}/"),
        };
        let _ = write!(text, ", {direction} endpoint {namespace}{}", own.pod_name);
    }
    if flow.is_reply == Some(true) {
        text.push_str(", reply");
    }
    let hook = match header.hook {
        punt_hook::XDP_INGRESS => "XDP",
        punt_hook::TC_INGRESS => "tc ingress",
        _ => "tc egress",
    };
    let _ = write!(text, ", at {hook}");
    text
}

/// Returns the protocol of an inspector.
fn inspector(number: u8) -> &'static str {
    match number {
        n if n == Inspector::Http as u8 => "http",
        n if n == Inspector::Dns as u8 => "dns",
        n if n == Inspector::Tls as u8 => "tls",
        n if n == Inspector::Kafka as u8 => "kafka",
        n if n == Inspector::TlsTerminate as u8 => "the proxy",
        _ => "a worker",
    }
}

/// Returns the time, ns since 1970.
fn wall_clock() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use palisade_flowlog::Ring;

    use super::*;

    #[test]
    fn the_written_bytes_are_those_of_the_returned_blocks() {
        let filters = Filters::compile(&ApiFilters::default()).unwrap();
        let bounds = Bounds {
            packets: 10,
            bytes: 10_000,
        };
        let mut recorder = Recorder::new(
            filters,
            Snap::Headers,
            bounds,
            Arc::default(),
            0,
            Ring::new(1).follow(),
            "a test",
        );
        let mut returned = recorder.take().len();
        assert!(returned > 0);
        returned += recorder.statistics(0).len();
        assert_eq!(recorder.written(), (0, returned as u64));
    }
}
