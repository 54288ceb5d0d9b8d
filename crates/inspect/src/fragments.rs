//! Datagrams that came in fragments (RFC 791, 3.2; RFC 8200, 4.5). The fragments are held until the datagram can be
//! read whole; then they go on as they came, or none does.
//!
//! What receivers could put together in more than one way is dropped whole (RFC 5722), and so is what still comes of
//! it: only a fragment that says again what was said before is no contradiction.

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

/// Fragments of one datagram. The longest datagram has as many when each carries 1024 bytes.
const PIECES: usize = 64;

/// How much may be held of fragmented datagrams, and for how long. Of one worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FragmentLimits {
    /// Datagrams that are not complete.
    pub datagrams: usize,
    /// Of them, those of one endpoint.
    pub datagrams_per_endpoint: usize,
    /// Bytes of all of them.
    pub bytes: usize,
    /// Fragments of all of them: so many frames are held.
    pub fragments: usize,
    /// A datagram that is not complete so long after its first fragment is dropped.
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

/// What has happened so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FragmentStats {
    /// Fragments that came.
    pub fragments: u64,
    /// Datagrams that were put together.
    pub complete: u64,
    /// Datagrams whose fragments did not all come in time.
    pub incomplete: u64,
    /// Datagrams that were dropped because their fragments contradict each other.
    pub contradicting: u64,
    /// Fragments that were dropped because they came twice.
    pub duplicates: u64,
    /// Datagrams that were dropped because a limit is reached.
    pub limited: u64,
    /// Datagrams that wait now.
    pub held: u64,
}

/// Which datagram a fragment belongs to, for whose policy.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    endpoint: u16,
    ifindex: u32,
    hook: u8,
    /// IPv6: the fragment header, since only the first fragment says what the datagram is.
    protocol: u8,
    id: u32,
    source: Addr,
    destination: Addr,
}

/// Where a fragment's bytes stand in its frame, and in its datagram.
#[derive(Clone, Copy, Debug)]
struct Position {
    /// In the frame.
    from: usize,
    /// In the frame.
    to: usize,
    /// In the datagram.
    offset: usize,
    /// Others follow it.
    more: bool,
}

struct Datagram<F> {
    key: Key,
    frames: Vec<F>,
    buffers: Buffers,
    /// Bytes that have come.
    have: usize,
    /// How long it is, once the last fragment has come.
    total: Option<usize>,
    /// Of the first fragment.
    first: Option<First>,
    /// Nothing of it may pass: why.
    broken: Option<Reason>,
    audit: bool,
    record: Record,
}

#[derive(Clone, Copy)]
struct First {
    packet: Packet,
    slot: PuntRequest,
    /// Where in the datagram the transport header is: behind further IPv6 headers.
    transport: usize,
}

#[derive(Default)]
struct Buffers {
    bytes: Vec<u8>,
    /// From, to.
    pieces: Vec<(usize, usize)>,
}

/// A datagram whose fragments have all come.
pub(crate) struct Whole<F> {
    /// In the order in which they came.
    pub frames: Vec<F>,
    /// What the first fragment says.
    pub packet: Packet,
    /// Of the first fragment.
    pub slot: PuntRequest,
    buffers: Buffers,
    transport: usize,
}

impl<F> Whole<F> {
    /// From the transport header on.
    pub(crate) fn transport(&self) -> &[u8] {
        self.buffers.bytes.get(self.transport..).unwrap_or_default()
    }

    /// What it carries, if it is a UDP datagram whose length and checksum are right.
    ///
    /// # Errors
    /// Why it must not pass.
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
            // only IPv4 may do without
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

/// Puts fragmented datagrams together.
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

    /// Takes a fragment. Gives the datagram if that was the last one missing.
    ///
    /// # Errors
    /// Gives the fragment back with the reason why it must not pass.
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
        let key = Key {
            endpoint: view.slot.endpoint,
            ifindex: view.ifindex,
            hook: view.hook,
            protocol: if view.packet.is(flags::IPV6) {
                44
            } else {
                view.packet.protocol
            },
            id: view.packet.fragment_id,
            source: view.packet.source,
            destination: view.packet.destination,
        };
        let number = match self.numbers.get(&key) {
            Some(&number) => number,
            None => match self.begin(cx.now, view, key, cx.spare) {
                Some(number) => number,
                None => {
                    self.stats.limited += 1;
                    return Err((frame, Reason::InspectLimit));
                }
            },
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
                // the first of the two is held, so this one is not missed
                cx.sink.discard(frame, Reason::InvalidFragment);
                return Ok(None);
            }
            Err(reason) => {
                if reason == Reason::InspectLimit {
                    self.stats.limited += 1;
                } else {
                    self.stats.contradicting += 1;
                }
                self.spoil(number, reason, cx);
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
        if datagram.total != Some(datagram.have) {
            return Ok(None);
        }
        let Some(Datagram {
            first: Some(first),
            frames,
            buffers,
            ..
        }) = self.end(number)
        else {
            return Ok(None);
        };
        self.stats.complete += 1;
        Ok(Some(Whole {
            frames,
            packet: first.packet,
            slot: first.slot,
            buffers,
            transport: first.transport,
        }))
    }

    /// The buffers of a datagram that has been read. Its frames are given back before.
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

    fn end(&mut self, number: u64) -> Option<Datagram<F>> {
        let datagram = self.datagrams.remove(number)?;
        self.forget_key(&datagram);
        Some(datagram)
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

    /// Nothing of a datagram may pass, whatever comes of it.
    fn spoil<S: Sink<F>>(&mut self, number: u64, reason: Reason, cx: &mut Cx<'_, F, S>) {
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
        let_go(frames, audit, reason, cx);
    }

    /// What has not come by now is not waited for.
    pub(crate) fn tick<S: Sink<F>>(&mut self, cx: &mut Cx<'_, F, S>) {
        let Some(limit) = cx.now.checked_sub(self.limits.timeout) else {
            return;
        };
        while let Some(datagram) = self.datagrams.pop_since(limit) {
            self.give_up(datagram, cx);
        }
    }

    fn give_up<S: Sink<F>>(&mut self, datagram: Datagram<F>, cx: &mut Cx<'_, F, S>) {
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
        let_go(datagram.frames, datagram.audit, reason, cx);
    }

    pub(crate) fn deadline(&self) -> Option<Millis> {
        self.datagrams
            .since()
            .map(|since| since.saturating_add(self.limits.timeout))
    }

    /// Drops what is held of an endpoint, or of all.
    pub(crate) fn forget<S: Sink<F>>(&mut self, endpoint: Option<u16>, cx: &mut Cx<'_, F, S>) {
        while let Some(mut datagram) = self
            .datagrams
            .pop_if(|datagram| endpoint.is_none_or(|endpoint| datagram.key.endpoint == endpoint))
        {
            datagram.audit = false;
            self.give_up(datagram, cx);
        }
    }
}

/// Drops the fragments of a datagram, or forwards them in audit mode.
fn let_go<F, S: Sink<F>>(mut frames: Vec<F>, audit: bool, reason: Reason, cx: &mut Cx<'_, F, S>) {
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
    /// The same bytes were there already.
    Again,
}

impl<F> Datagram<F> {
    /// Puts a fragment where it belongs. `longest`: so many bytes may be held of this datagram.
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

/// Reads where a fragment belongs.
fn position(view: &PacketView<'_>) -> Option<Position> {
    /// IPv6 fragment header.
    const FRAGMENT: u8 = 44;
    /// IPv6 authentication header: its length counts in fours.
    const AUTHENTICATION: u8 = 51;
    let header = view.frame.get(view.network..)?;
    let to = view.network + view.packet.length as usize;
    let (from, word) = if view.packet.is(flags::IPV6) {
        let mut next = *header.get(6)?;
        let mut at = 40;
        // the decoder has followed them already
        for _ in 0..palisade_packet::MAX_EXTENSIONS {
            if next == FRAGMENT {
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
        if next != FRAGMENT {
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
