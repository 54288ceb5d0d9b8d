//! One direction of a connection: the bytes of a sender as far as they have come, been judged, and been released.

use std::collections::VecDeque;

use super::segment::{Link, Segment};
use crate::Millis;

/// Where in a stream: counts bytes without wrapping. The sender's SYN is at [`START`].
pub(super) type Position = u64;

/// Far enough from zero that nothing before it is below zero.
pub(super) const START: Position = 1 << 33;

/// Largest payload that is made here: what IPv6 leaves of 1,500 bytes.
const LARGEST: u16 = 1_440;

/// Smaller payloads, tried when the path loses what is made here (RFC 8899, 5.1.2): what an IPv6 link must carry (RFC
/// 8200, 5), then what every IPv4 host must take (RFC 1122, 3.3.2).
const SMALLER: u16 = 1_220;
const SMALLEST_IPV4: u16 = 536;

/// What every link and host takes, from the network header on: smaller packets are not made, whatever an ICMP error
/// claims (RFC 1122, 3.3.2; RFC 8200, 5).
const FLOOR_IPV4: u32 = 576;
const FLOOR_IPV6: u32 = 1_280;
/// Headers of a packet that is made here, without TCP options.
const HEADERS_IPV4: u32 = 40;
const HEADERS_IPV6: u32 = 60;
/// Sizes to try where a router does not say what its link takes (RFC 1191, 7.1).
const PLATEAUS: [u32; 2] = [1_492, 1_006];
/// How many ICMP errors can make the packets for one end smaller. Each has packets sent again, so their number has to be
/// bounded; a path has fewer links of different MTU.
const NARROWINGS: u8 = 8;

/// Bytes that were released may come again so far back, at the least.
const OLD: u64 = 1 << 16;

/// A packet that waits for a verdict.
pub(super) struct Held<F> {
    pub(super) frame: F,
    pub(super) start: Position,
    /// Behind its last byte, its FIN among them.
    pub(super) end: Position,
    pub(super) since: Millis,
}

/// Bytes that are kept, without a gap that is not to be filled.
#[derive(Debug, Default)]
struct Piece {
    start: Position,
    bytes: Vec<u8>,
    /// Bytes at the front that are not needed any more, and are not counted by `start`.
    gone: usize,
    /// What of it has come: sorted, apart from each other.
    have: Vec<(Position, Position)>,
}

impl Piece {
    fn at(start: Position) -> Self {
        Self {
            start,
            ..Self::default()
        }
    }

    fn slice(&self, from: Position, to: Position) -> &[u8] {
        let at = |position: Position| self.gone + (position - self.start) as usize;
        self.bytes.get(at(from)..at(to)).unwrap_or_default()
    }

    fn end(&self) -> Position {
        self.start + (self.bytes.len() - self.gone) as u64
    }

    /// Whether what has come of these bytes is the same.
    fn agrees(&self, start: Position, data: &[u8]) -> bool {
        let end = start + data.len() as u64;
        self.have.iter().all(|&(from, to)| {
            let (from, to) = (from.max(start), to.min(end));
            from >= to || self.slice(from, to) == &data[(from - start) as usize..(to - start) as usize]
        })
    }

    /// Keeps bytes. Whether any of them is new.
    fn store(&mut self, start: Position, data: &[u8]) -> bool {
        let end = start + data.len() as u64;
        if self.have.iter().any(|&(from, to)| from <= start && end <= to) {
            return false;
        }
        let at = self.gone + (start - self.start) as usize;
        if self.bytes.len() < at + data.len() {
            self.bytes.resize(at + data.len(), 0);
        }
        self.bytes[at..at + data.len()].copy_from_slice(data);
        let (mut from, mut to) = (start, end);
        self.have.retain(|&(a, b)| {
            let apart = b < from || a > to;
            if !apart {
                from = from.min(a);
                to = to.max(b);
            }
            apart
        });
        let place = self.have.partition_point(|&(a, _)| a < from);
        self.have.insert(place, (from, to));
        true
    }

    /// Forgets what is before a position.
    fn forget(&mut self, before: Position) {
        let before = before.min(self.end());
        if before <= self.start {
            return;
        }
        self.gone += (before - self.start) as usize;
        self.start = before;
        for range in &mut self.have {
            range.0 = range.0.max(before);
        }
        self.have.retain(|&(from, to)| from < to);
        if self.gone == self.bytes.len() {
            self.bytes.clear();
            self.gone = 0;
        } else if self.gone > self.bytes.len() / 2 {
            self.bytes.drain(..self.gone);
            self.gone = 0;
        }
        if self.bytes.is_empty() && self.bytes.capacity() > 4096 {
            self.bytes = Vec::new();
        }
    }

    /// Forgets what is at or behind a position.
    fn cut(&mut self, at: Position) {
        let keep = self.gone + (at.max(self.start) - self.start) as usize;
        self.bytes.truncate(keep);
        for range in &mut self.have {
            range.1 = range.1.min(at);
        }
        self.have.retain(|&(from, to)| from < to);
    }
}

/// What a new packet's bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arrival {
    /// Something of it has not been here before.
    New,
    /// All of it has.
    Known,
    /// It says something else than what was here before.
    Differs,
}

/// One direction.
pub(super) struct Half<F> {
    /// Sequence number of the SYN, once that was seen.
    pub(super) isn: Option<u32>,
    pub(super) link: Option<Link>,
    /// Options of the SYN.
    pub(super) scale: Option<u8>,
    pub(super) mss: u16,
    /// Largest payload that the path to this end takes, as far as is known.
    path: u16,
    /// How often an ICMP error has made that smaller.
    narrowings: u8,
    pub(super) has_timestamps: bool,
    /// Greatest timestamp of a segment that the receiver expected next (RFC 7323, 4.3).
    pub(super) recent: u32,
    /// Greatest timestamp of all segments that were taken in. Packets that are made in the place of this side carry it:
    /// the receiver may have taken the segment that had it, and drops what is older (RFC 7323, 5.3). `recent` lags
    /// behind by what is on its way and not acknowledged.
    pub(super) latest: u32,
    /// Window field of the last segment.
    pub(super) window: u16,
    /// All bytes before have come.
    pub(super) next: Position,
    /// All bytes before may go.
    pub(super) judged: Position,
    /// All bytes before may go unjudged.
    pub(super) ahead: Position,
    /// Behind the last byte that may have reached the receiver.
    pub(super) sent: Position,
    /// Behind the last byte that has come.
    pub(super) highest: Position,
    /// The receiver has acknowledged all bytes before.
    pub(super) acked: Position,
    /// All bytes before have been acknowledged to the sender: by the receiver, or here.
    pub(super) proxy_acked: Position,
    /// When what is held is acknowledged here.
    pub(super) promise_at: Option<Millis>,
    /// When what was promised is sent to the receiver again, and how often it has been.
    pub(super) again: Option<(Millis, u32)>,
    /// Of what was promised, everything before this may have been lost, and has been sent again up to `resent`.
    pub(super) lost: Position,
    pub(super) resent: Position,
    /// Since when the first byte that is not judged waits.
    pub(super) since: Option<Millis>,
    /// The reader waits for the other side.
    pub(super) is_patient: bool,
    /// Right edge of what the receiver takes.
    pub(super) edge: Position,
    /// Widest window that the receiver has offered.
    pub(super) widest: u64,
    /// Where the FIN stands.
    pub(super) fin: Option<Position>,
    /// The reader has been told of the end.
    pub(super) end_read: bool,
    pieces: VecDeque<Piece>,
    pub(super) held: VecDeque<Held<F>>,
}

impl<F> Half<F> {
    pub(super) fn new() -> Self {
        const FIRST: Position = START + 1;
        Self {
            isn: None,
            link: None,
            scale: None,
            mss: 536,
            path: LARGEST,
            narrowings: 0,
            has_timestamps: false,
            recent: 0,
            latest: 0,
            window: 0,
            next: FIRST,
            judged: FIRST,
            ahead: FIRST,
            sent: FIRST,
            highest: FIRST,
            acked: START,
            proxy_acked: START,
            promise_at: None,
            again: None,
            lost: START,
            resent: START,
            since: None,
            is_patient: false,
            edge: FIRST,
            widest: OLD,
            fin: None,
            end_read: false,
            pieces: VecDeque::from([Piece::at(FIRST)]),
            held: VecDeque::new(),
        }
    }

    /// The position that a sequence number means.
    pub(super) fn position(&self, seq: u32) -> Position {
        let near = self.next;
        near.wrapping_add_signed(i64::from(seq.wrapping_sub(self.seq(near)) as i32))
    }

    /// The sequence number of a position.
    pub(super) fn seq(&self, position: Position) -> u32 {
        self.isn
            .unwrap_or(0)
            .wrapping_add(position.wrapping_sub(START) as u32)
    }

    /// Oldest position that a segment of it may have, and an acknowledgement of it may name.
    pub(super) fn oldest(&self) -> Position {
        self.acked - self.widest.clamp(OLD, START / 2)
    }

    /// Takes what the receiver says in a segment of its own: what it has, and what it takes.
    pub(super) fn acknowledge(&mut self, position: Position, window: u64) {
        if position > self.acked {
            self.acked = position;
            self.proxy_acked = self.proxy_acked.max(position);
            self.again = None;
        }
        self.edge = self.edge.max(position + window);
        self.widest = self.widest.max(window);
        self.forget();
    }

    fn forget(&mut self) {
        let unneeded = self.acked.min(self.judged).min(self.next);
        while self.pieces.len() > 1 && self.pieces[1].start <= unneeded {
            self.pieces.pop_front();
        }
        if let Some(piece) = self.pieces.front_mut() {
            piece.forget(unneeded);
        }
    }

    /// Compares bytes with what was here before and keeps them, until they are acknowledged and judged.
    pub(super) fn take(&mut self, start: Position, data: &[u8]) -> Arrival {
        let end = start + data.len() as u64;
        let mut parts = [(0, 0); 8];
        let mut count = 0;
        for (index, piece) in self.pieces.iter().enumerate() {
            let behind = self.pieces.get(index + 1).map(|_| piece.end());
            let (from, to) = (start.max(piece.start), end.min(behind.unwrap_or(end)));
            if from >= to {
                continue;
            }
            let part = &data[(from - start) as usize..(to - start) as usize];
            if !piece.agrees(from, part) {
                return Arrival::Differs;
            }
            if let Some(slot) = parts.get_mut(count) {
                *slot = (index, from);
                count += 1;
            }
        }
        let mut new = end > self.highest;
        // Only the last piece grows; the others have all that there is of them.
        if let Some(&(index, from)) = parts[..count].last()
            && index + 1 == self.pieces.len()
            && let Some(piece) = self.pieces.get_mut(index)
        {
            new |= piece.store(from, &data[(from - start) as usize..]);
        }
        self.highest = self.highest.max(end);
        self.advance();
        if new { Arrival::New } else { Arrival::Known }
    }

    fn advance(&mut self) {
        if let Some(piece) = self.pieces.back()
            && let Some(&(_, to)) = piece
                .have
                .iter()
                .find(|&&(from, to)| from <= self.next && self.next < to)
        {
            self.next = to;
        }
    }

    /// How far bytes may lie behind those that have come, given how many may be kept.
    pub(super) fn reach(&self, limit: u64) -> Position {
        let kept: u64 = self.kept() as u64;
        let unread = self.pieces.back().map_or(0, |piece| piece.end() - piece.start);
        self.pieces
            .back()
            .map_or(self.next, |piece| piece.start)
            .saturating_add(limit.saturating_sub(kept - unread))
    }

    /// Whether all bytes before `next` have really come: those that were skipped are known to have when the receiver
    /// has acknowledged them.
    pub(super) fn is_contiguous(&self) -> bool {
        self.pieces
            .back()
            .is_some_and(|piece| piece.start <= self.proxy_acked.max(START + 1))
    }

    /// Bytes that the receiver has not acknowledged and the sender will not send again: up to `most` of them, from
    /// `from` on.
    pub(super) fn undelivered(&self, from: Position, most: usize) -> &[u8] {
        let Some(piece) = self
            .pieces
            .iter()
            .find(|piece| piece.start <= from && from < piece.end())
        else {
            return &[];
        };
        let to = self.proxy_acked.min(self.judged).min(piece.end());
        piece.slice(from, to.clamp(from, from + most as u64))
    }

    /// Everything that is on its way of what was promised may be lost.
    pub(super) fn lose(&mut self) {
        self.lost = self.delivered();
        self.resent = self.acked;
    }

    /// Whether some of what may be lost is still not acknowledged.
    pub(super) fn is_recovering(&self) -> bool {
        self.acked < self.lost
    }

    /// The part of the first packet that waits which may go and has not gone: where that part begins and ends.
    pub(super) fn part(&self) -> Option<(Position, Position)> {
        let held = self.held.front().filter(|held| held.end > self.judged)?;
        let from = held.start.max(self.sent);
        (from < self.judged).then_some((from, self.judged))
    }

    /// Bytes that are kept: those of one piece at most.
    pub(super) fn bytes(&self, from: Position, to: Position) -> &[u8] {
        let piece = self
            .pieces
            .iter()
            .find(|piece| piece.start <= from && from < piece.end());
        piece.map_or(&[], |piece| piece.slice(from, to.clamp(from, piece.end())))
    }

    /// How far what was promised has been sent on.
    pub(super) fn delivered(&self) -> Position {
        self.sent.min(self.proxy_acked)
    }

    /// Whether the receiver has all that was promised.
    pub(super) fn is_drained(&self) -> bool {
        self.acked >= self.proxy_acked
    }

    /// Bytes of a packet made for this side.
    pub(super) fn payload_size(&self, has_timestamps: bool) -> usize {
        usize::from(self.mss.clamp(64, self.path)) - if has_timestamps { 12 } else { 0 }
    }

    /// Packets made for this side get lost: the next ones are smaller.
    pub(super) fn shrink(&mut self, is_ipv6: bool) {
        self.path = if self.path > SMALLER || is_ipv6 {
            self.path.min(SMALLER)
        } else {
            self.path.min(SMALLEST_IPV4)
        };
    }

    /// A link on the path to this side takes packets of `mtu` bytes only; 0: its router does not say. Returns whether
    /// packets made for this side become smaller by that.
    pub(super) fn narrow(&mut self, mtu: u32, is_ipv6: bool) -> bool {
        let (floor, headers) = if is_ipv6 {
            (FLOOR_IPV6, HEADERS_IPV6)
        } else {
            (FLOOR_IPV4, HEADERS_IPV4)
        };
        let now = self.mss.clamp(64, self.path);
        let mtu = if mtu == 0 && !is_ipv6 {
            let size = u32::from(now) + headers;
            PLATEAUS.into_iter().find(|plateau| *plateau < size).unwrap_or(0)
        } else {
            mtu
        };
        let payload = u16::try_from(mtu.max(floor) - headers).unwrap_or(u16::MAX);
        if payload >= now || self.narrowings == NARROWINGS {
            return false;
        }
        self.path = payload;
        self.narrowings += 1;
        true
    }

    /// Since when something waits for a verdict that has to come in time.
    pub(super) fn waits_since(&self) -> Option<Millis> {
        let held = self.held.front().map(|held| held.since);
        [held, self.since]
            .into_iter()
            .flatten()
            .min()
            .filter(|_| !self.is_patient)
    }

    /// When this direction wants to be looked at again.
    pub(super) fn due(&self, deadline: Millis) -> Option<Millis> {
        let waits = self.waits_since().map(|since| since.saturating_add(deadline));
        let again = self.again.map(|(at, _)| at);
        [waits, again, self.promise_at].into_iter().flatten().min()
    }

    /// Lets go of everything that is kept.
    pub(super) fn clear(&mut self) {
        self.held = VecDeque::new();
        self.pieces = VecDeque::from([Piece::at(self.next)]);
        self.judged = self.next;
        self.since = None;
        self.promise_at = None;
        self.again = None;
    }

    /// Bytes that are kept.
    pub(super) fn kept(&self) -> usize {
        self.pieces
            .iter()
            .map(|piece| piece.bytes.len() - piece.gone)
            .sum()
    }

    /// What has come and is not judged.
    pub(super) fn unjudged(&self) -> &[u8] {
        match self.pieces.back() {
            Some(piece) if self.judged < self.next && piece.start <= self.judged => {
                piece.slice(self.judged, self.next)
            }
            _ => &[],
        }
    }

    /// All bytes have come.
    pub(super) fn is_whole(&self) -> bool {
        self.fin.is_some_and(|fin| self.next >= fin)
    }

    /// The first bytes that are not judged may go. They stay to be compared until they are acknowledged.
    pub(super) fn pass(&mut self, n: u64) {
        self.judged += n;
        self.forget();
    }

    /// So many bytes may go unread and uncompared, whatever they are. False: they may go, and will be compared,
    /// because too many others like them are not acknowledged.
    pub(super) fn skip(&mut self, n: u64) -> bool {
        const MOST: usize = 8;
        if self.pieces.len() >= MOST {
            self.pass(n);
            return false;
        }
        let end = self.judged.saturating_add(n);
        let Some(piece) = self.pieces.back_mut() else {
            return false;
        };
        let mut rest = Piece::at(end);
        for &(from, to) in &piece.have {
            let from = from.max(end);
            if from < to {
                rest.store(from, piece.slice(from, to));
            }
        }
        piece.cut(self.judged);
        self.pieces.push_back(rest);
        self.judged = end;
        self.next = self.next.max(end);
        self.sent = self.sent.max(end);
        // Not `highest`: who skips to the end of the stream does not know where that is, and a FIN may come before.
        self.edge = self.edge.max(end + self.widest);
        self.advance();
        self.forget();
        true
    }

    /// Keeps a packet; in the order of the stream.
    pub(super) fn hold(&mut self, held: Held<F>) {
        let place = self
            .held
            .partition_point(|other| (other.start, other.end) <= (held.start, held.end));
        self.held.insert(place, held);
    }

    /// All bytes before may go, judged or not.
    pub(super) fn forward_limit(&self) -> Position {
        self.judged.max(self.ahead)
    }

    /// Takes out the next packet that may go.
    pub(super) fn releasable(&mut self) -> Option<Held<F>> {
        let at = self
            .held
            .iter()
            .position(|held| held.end <= self.forward_limit())?;
        let held = self.held.remove(at)?;
        self.sent = self.sent.max(held.end);
        Some(held)
    }

    /// The timestamp is older than one that the receiver has taken (RFC 7323, 5).
    pub(super) fn is_stale(&mut self, segment: &Segment<'_>, start: Position, agreed: bool) -> bool {
        let Some((value, _)) = segment.options.timestamp.filter(|_| agreed) else {
            return false;
        };
        let newer = value.wrapping_sub(self.recent) as i32;
        if newer > 0 && start <= self.acked {
            self.recent = value;
        }
        if newer >= 0 && value.wrapping_sub(self.latest) as i32 > 0 {
            self.latest = value;
        }
        newer < 0
    }
}
