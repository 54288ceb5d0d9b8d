//! Reassembly of fragmented datagrams (RFC 791, 3.2; RFC 8200, 4.5). Fragments are held until the datagram is complete
//! and has a verdict. Then all of them are forwarded unchanged, or all are dropped.
//!
//! If fragments overlap, receivers can reassemble different datagrams. So the whole datagram is dropped, and every
//! further fragment of it (RFC 5722). An exact duplicate of a fragment is not treated as an overlap.

use foldhash::{HashMap, HashMapExt as _};

use palisade_abi::{Addr, PuntRequest, Reason, protocol, punt_flags};
use palisade_packet::{Packet, flags};

use crate::{
    Millis, PacketView, Sink,
    context::Cx,
    expiry_queue::ExpiryQueue,
    frames::Spare,
    packet_builder::Sum,
    record::{Record, Verdict, What},
};

/// Number of the IPv6 fragment header.
const FRAGMENT_HEADER: u8 = 44;
/// Maximum number of fragments of one datagram: 64 KiB in fragments of 1,024 bytes.
const PIECES: usize = 64;

/// Limits of reassembly, per worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FragmentLimits {
    /// Maximum number of incomplete datagrams.
    pub datagrams: usize,
    /// Maximum number of incomplete datagrams of one endpoint.
    pub datagrams_per_endpoint: usize,
    /// Maximum number of bytes of all incomplete datagrams.
    pub bytes: usize,
    /// Maximum number of held fragments.
    pub fragments: usize,
    /// Time from the first fragment after which an incomplete datagram is dropped, ms.
    pub timeout: u64,
}

impl Default for FragmentLimits {
    fn default() -> Self {
        Self {
            datagrams: 256,
            datagrams_per_endpoint: 64,
            bytes: 4 << 20,
            fragments: 512,
            timeout: 5000,
        }
    }
}

/// Counters of reassembly.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FragmentStats {
    /// Fragments that have arrived.
    pub fragments: u64,
    /// Datagrams that were completed.
    pub complete: u64,
    /// Datagrams of which fragments were still missing when they were removed.
    pub incomplete: u64,
    /// Datagrams with an overlap or an inconsistent length.
    pub contradicting: u64,
    /// Fragments that were dropped as exact duplicates.
    pub duplicates: u64,
    /// Datagrams and fragments that were dropped because of a limit.
    pub limited: u64,
    /// Incomplete datagrams now.
    pub held: u64,
}

/// Identifies the datagram of a fragment, for one endpoint.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    endpoint: u16,
    ifindex: u32,
    hook: u8,
    /// Protocol of the IPv4 header. For IPv6, always 44, the number of the fragment header: the fragments of one
    /// datagram can differ in their next header, and only the next header of the first fragment is used (RFC 8200,
    /// 4.5).
    protocol: u8,
    id: u32,
    source: Addr,
    destination: Addr,
}

impl Key {
    fn of(view: &PacketView<'_>) -> Self {
        let packet = view.packet;
        Self {
            endpoint: view.slot.endpoint,
            ifindex: view.ifindex,
            hook: view.hook,
            protocol: if packet.is(flags::IPV6) {
                FRAGMENT_HEADER
            } else {
                packet.protocol
            },
            id: packet.fragment_id,
            source: packet.source,
            destination: packet.destination,
        }
    }
}

/// Position of a fragment's payload in its frame and in its datagram, bytes.
#[derive(Clone, Copy, Debug)]
struct Position {
    /// Start in the frame.
    from: usize,
    /// End in the frame.
    to: usize,
    /// Start in the datagram.
    offset: usize,
    /// Whether the more-fragments flag is set.
    more: bool,
}

struct Datagram<F> {
    key: Key,
    frames: Vec<F>,
    buffers: Buffers,
    /// Number of bytes that have arrived.
    have: usize,
    /// Length of the datagram, once the last fragment has arrived.
    total: Option<usize>,
    first: Option<First>,
    /// Reason for which every fragment of the datagram is dropped.
    broken: Option<Reason>,
    audit: bool,
    record: Record,
}

/// Data of the first fragment.
#[derive(Clone, Copy)]
struct First {
    packet: Packet,
    slot: PuntRequest,
    /// Offset of the transport header in the datagram, bytes: IPv6 extension headers can precede it.
    transport: usize,
}

#[derive(Default)]
struct Buffers {
    bytes: Vec<u8>,
    /// Start and end of each fragment in `bytes`.
    pieces: Vec<(usize, usize)>,
}

/// A complete datagram.
pub(crate) struct Whole<F> {
    /// Frames of the fragments in order of arrival.
    pub frames: Vec<F>,
    /// Decoded headers of the first fragment.
    pub packet: Packet,
    /// Punt request of the first fragment.
    pub slot: PuntRequest,
    buffers: Buffers,
    transport: usize,
}

impl<F> Whole<F> {
    /// Returns the datagram from its transport header on.
    pub(crate) fn transport(&self) -> &[u8] {
        self.buffers.bytes.get(self.transport..).unwrap_or_default()
    }

    /// Returns the payload of a UDP datagram.
    ///
    /// # Errors
    /// Returns the reason if the datagram is malformed or its checksum is wrong.
    pub(crate) fn message(&self) -> Result<&[u8], Reason> {
        let bytes = self.transport();
        let Some(&[_, _, _, _, length0, length1, sum0, sum1]) = bytes.first_chunk::<8>() else {
            return Err(Reason::InvalidFragment);
        };
        let length = usize::from(u16::from_be_bytes([length0, length1]));
        let datagram = bytes
            .get(..length)
            .filter(|datagram| datagram.len() >= 8)
            .ok_or(Reason::AppMalformed)?;
        let has_none = [sum0, sum1] == [0, 0];
        let right = if has_none {
            // The checksum is optional over IPv4 only (RFC 768; RFC 8200, 8.1).
            !self.packet.is(flags::IPV6)
        } else {
            let Packet {
                source, destination, ..
            } = self.packet;
            Sum::pseudo(source, destination, protocol::UDP, length)
                .add(datagram)
                .fold()
                == 0xffff
        };
        if right {
            datagram.get(8..).ok_or(Reason::AppMalformed)
        } else {
            Err(Reason::BadChecksum)
        }
    }
}

/// Reassembles fragmented datagrams.
pub(crate) struct Reassembler<F> {
    limits: FragmentLimits,
    datagrams: ExpiryQueue<Datagram<F>>,
    numbers: HashMap<Key, u64>,
    by_endpoint: HashMap<u16, usize>,
    bytes: usize,
    fragments: usize,
    spare: Vec<Buffers>,
    stats: FragmentStats,
}

impl<F> Reassembler<F> {
    pub(crate) fn new(limits: &FragmentLimits) -> Self {
        Self {
            limits: *limits,
            datagrams: ExpiryQueue::new(),
            numbers: HashMap::new(),
            by_endpoint: HashMap::new(),
            bytes: 0,
            fragments: 0,
            spare: Vec::new(),
            stats: FragmentStats::default(),
        }
    }

    pub(crate) fn stats(&self) -> FragmentStats {
        FragmentStats {
            held: self.datagrams.len() as u64,
            ..self.stats
        }
    }

    /// Adds a fragment. Returns the datagram if it is complete now.
    ///
    /// # Errors
    /// Returns the frame and the reason if the caller must drop the fragment.
    pub(crate) fn take<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        frame: F,
        cx: &mut Cx<'_, F, S>,
    ) -> Result<Option<Whole<F>>, (F, Reason)> {
        self.stats.fragments += 1;
        let Some(position) = position(view) else {
            return Err((frame, Reason::InvalidFragment));
        };
        let key = Key::of(view);
        let known = self.numbers.get(&key).copied();
        let Some(number) = known.or_else(|| self.begin(cx.now, view, key, cx.spare)) else {
            self.stats.limited += 1;
            return Err((frame, Reason::InspectLimit));
        };
        let Some(datagram) = self.datagrams.get_mut(number) else {
            return Err((frame, Reason::InvalidFragment));
        };
        if let Some(reason) = datagram.broken {
            return Err((frame, reason));
        }
        let bytes = view.frame.get(position.from..position.to).unwrap_or_default();
        let before = datagram.buffers.bytes.len();
        let room = self.limits.bytes.saturating_sub(self.bytes);
        let added = if self.fragments >= self.limits.fragments {
            Err(Reason::InspectLimit)
        } else {
            datagram.add(position, bytes, before + room)
        };
        match added {
            Ok(Added::New) => {}
            Ok(Added::Again) => {
                self.stats.duplicates += 1;
                // A duplicate needs no record, because the first copy is held.
                cx.sink.discard(frame, Reason::InvalidFragment);
                return Ok(None);
            }
            Err(reason) => {
                if reason == Reason::InspectLimit {
                    self.stats.limited += 1;
                } else {
                    self.stats.contradicting += 1;
                }
                self.invalidate(number, reason, cx);
                return Err((frame, reason));
            }
        }
        self.bytes += datagram.buffers.bytes.len() - before;
        self.fragments += 1;
        datagram.frames.push(frame);
        if position.offset == 0 {
            datagram.first = Some(First {
                packet: *view.packet,
                slot: *view.slot,
                transport: view.transport.saturating_sub(position.from),
            });
        }
        if datagram.total != Some(datagram.have) || datagram.first.is_none() {
            return Ok(None);
        }
        Ok(self.complete(number))
    }

    /// Removes a complete datagram and returns it.
    fn complete(&mut self, number: u64) -> Option<Whole<F>> {
        let datagram = self.datagrams.remove(number)?;
        self.forget_key(&datagram);
        self.stats.complete += 1;
        let first = datagram.first?;
        Some(Whole {
            frames: datagram.frames,
            packet: first.packet,
            slot: first.slot,
            buffers: datagram.buffers,
            transport: first.transport,
        })
    }

    /// Takes back the buffers of a datagram. The frames must have been removed from `whole` before.
    pub(crate) fn recycle(&mut self, whole: Whole<F>) {
        self.recycle_buffers(whole.buffers);
    }

    fn recycle_buffers(&mut self, mut buffers: Buffers) {
        const KEPT: usize = 16;
        if self.spare.len() < KEPT && buffers.bytes.capacity() > 0 {
            buffers.bytes.clear();
            buffers.pieces.clear();
            self.spare.push(buffers);
        }
    }

    fn begin(&mut self, now: Millis, view: &PacketView<'_>, key: Key, spare: &mut Spare<F>) -> Option<u64> {
        let by_endpoint = self.by_endpoint.get(&key.endpoint).copied().unwrap_or(0);
        if self.datagrams.len() >= self.limits.datagrams || by_endpoint >= self.limits.datagrams_per_endpoint
        {
            return None;
        }
        let datagram = Datagram {
            key,
            frames: spare.take(),
            buffers: self.spare.pop().unwrap_or_default(),
            have: 0,
            total: None,
            first: None,
            broken: None,
            audit: view.slot.flags & punt_flags::AUDIT != 0,
            record: Record::of(
                view,
                What::Unreadable {
                    detail: Reason::FragmentsIncomplete.text(),
                },
            ),
        };
        let number = self.datagrams.push(datagram, now);
        self.numbers.insert(key, number);
        *self.by_endpoint.entry(key.endpoint).or_default() += 1;
        Some(number)
    }

    fn forget_key(&mut self, datagram: &Datagram<F>) {
        self.numbers.remove(&datagram.key);
        self.bytes -= datagram.buffers.bytes.len();
        self.fragments -= datagram.frames.len();
        if let Some(count) = self.by_endpoint.get_mut(&datagram.key.endpoint) {
            *count -= 1;
            if *count == 0 {
                self.by_endpoint.remove(&datagram.key.endpoint);
            }
        }
    }

    /// Drops the held fragments of a datagram, or forwards them in audit mode, and marks the datagram so that later
    /// fragments get the same verdict.
    fn invalidate<S: Sink<F>>(&mut self, number: u64, reason: Reason, cx: &mut Cx<'_, F, S>) {
        let Some(datagram) = self.datagrams.get_mut(number) else {
            return;
        };
        datagram.broken = Some(reason);
        let buffers = std::mem::take(&mut datagram.buffers);
        let frames = std::mem::take(&mut datagram.frames);
        let audit = datagram.audit;
        self.bytes -= buffers.bytes.len();
        self.fragments -= frames.len();
        self.recycle_buffers(buffers);
        drop_fragments(frames, audit, reason, cx);
    }

    /// Drops the datagrams whose timeout is over.
    pub(crate) fn tick<S: Sink<F>>(&mut self, cx: &mut Cx<'_, F, S>) {
        let Some(limit) = cx.now.checked_sub(self.limits.timeout) else {
            return;
        };
        while let Some(datagram) = self.datagrams.pop_since(limit) {
            self.expire(datagram, cx);
        }
    }

    fn expire<S: Sink<F>>(&mut self, datagram: Datagram<F>, cx: &mut Cx<'_, F, S>) {
        self.forget_key(&datagram);
        if datagram.broken.is_some() {
            return;
        }
        self.stats.incomplete += 1;
        let reason = Reason::FragmentsIncomplete;
        cx.sink.record(&Record {
            verdict: if datagram.audit {
                Verdict::Audit
            } else {
                Verdict::Dropped
            },
            reason,
            ..datagram.record
        });
        self.recycle_buffers(datagram.buffers);
        drop_fragments(datagram.frames, datagram.audit, reason, cx);
    }

    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.datagrams
            .since()
            .map(|since| since.saturating_add(self.limits.timeout))
    }

    /// Drops the held fragments of one endpoint, or all held fragments, even in audit mode.
    pub(crate) fn forget<S: Sink<F>>(&mut self, endpoint: Option<u16>, cx: &mut Cx<'_, F, S>) {
        while let Some(mut datagram) = self
            .datagrams
            .pop_if(|datagram| endpoint.is_none_or(|endpoint| datagram.key.endpoint == endpoint))
        {
            datagram.audit = false;
            self.expire(datagram, cx);
        }
    }
}

/// Drops the fragments of a datagram, or forwards them in audit mode.
fn drop_fragments<F, S: Sink<F>>(mut frames: Vec<F>, audit: bool, reason: Reason, cx: &mut Cx<'_, F, S>) {
    for frame in frames.drain(..) {
        if audit {
            cx.sink.release(frame);
        } else {
            cx.sink.discard(frame, reason);
        }
    }
    cx.spare.give(frames);
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Added {
    New,
    /// The fragment is an exact duplicate.
    Again,
}

impl<F> Datagram<F> {
    /// Adds a fragment. `longest`: maximum length of the datagram that the byte limit allows.
    fn add(&mut self, position: Position, bytes: &[u8], longest: usize) -> Result<Added, Reason> {
        let (from, to) = (position.offset, position.offset + bytes.len());
        let again = self.buffers.pieces.contains(&(from, to))
            && self.buffers.bytes.get(from..to) == Some(bytes)
            && position.more != (self.total == Some(to));
        if again {
            return Ok(Added::Again);
        }
        let overlaps = self
            .buffers
            .pieces
            .iter()
            .any(|piece| from < piece.1 && piece.0 < to);
        let beyond = match self.total {
            Some(total) => !position.more || to >= total,
            None => !position.more && self.buffers.bytes.len() > to,
        };
        if overlaps || beyond {
            return Err(Reason::InvalidFragment);
        }
        if self.buffers.pieces.len() >= PIECES || to > longest {
            return Err(Reason::InspectLimit);
        }
        if self.buffers.bytes.len() < to {
            self.buffers.bytes.resize(to, 0);
        }
        let Some(room) = self.buffers.bytes.get_mut(from..to) else {
            return Err(Reason::InspectLimit);
        };
        room.copy_from_slice(bytes);
        self.buffers.pieces.push((from, to));
        self.have += bytes.len();
        if !position.more {
            self.total = Some(to);
        }
        Ok(Added::New)
    }
}

/// Returns the position of a fragment, or `None` if the fragment is invalid.
fn position(view: &PacketView<'_>) -> Option<Position> {
    /// Number of the authentication header. Its length field counts units of 4 bytes (RFC 4302, 2.2), not of 8 bytes.
    const AUTHENTICATION: u8 = 51;
    let header = view.frame.get(view.network..)?;
    let to = view.network + view.packet.length as usize;
    let (from, word) = if view.packet.is(flags::IPV6) {
        let mut next = *header.get(6)?;
        let mut at = 40;
        // The decoder has accepted this chain of extension headers.
        for _ in 0..palisade_packet::MAX_EXTENSIONS {
            if next == FRAGMENT_HEADER {
                break;
            }
            let [following, length] = *header.get(at..)?.first_chunk()?;
            let length = usize::from(length);
            at += match next {
                AUTHENTICATION => (length + 2) * 4,
                _ => (length + 1) * 8,
            };
            next = following;
        }
        let fragment: &[u8; 8] = header.get(at..)?.first_chunk()?;
        if next != FRAGMENT_HEADER {
            return None;
        }
        let word = u16::from_be_bytes([fragment[2], fragment[3]]);
        (view.network + at + 8, (word >> 3, word & 1 != 0))
    } else {
        let [first, _, _, _, _, _, high, low, ..] = *header.first_chunk::<20>()?;
        let word = u16::from_be_bytes([high, low]);
        let length = usize::from(first & 15) * 4;
        (view.network + length, (word & 0x1fff, word & 0x2000 != 0))
    };
    let (offset, more) = (usize::from(word.0) * 8, word.1);
    let length = to.checked_sub(from)?;
    let fits =
        length > 0 && (!more || length % 8 == 0) && offset + length <= 65_535 && to <= view.frame.len();
    fits.then_some(Position {
        from,
        to,
        offset,
        more,
    })
}
