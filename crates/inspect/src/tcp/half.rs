//! One direction of a connection: which bytes of the sender have arrived, are allowed, were forwarded and are
//! acknowledged.

use std::collections::VecDeque;

mod handover;

use super::segment::{Link, Segment};
use crate::Millis;

/// Position in a stream: a sequence number that does not wrap. The SYN of the sender is at [`START`].
pub(super) type Position = u64;

/// Position of the SYN. High enough that positions one window below it do not underflow.
pub(super) const START: Position = 1 << 33;

/// Maximum payload of a generated packet, bytes: an IPv6 packet then has 1,500 bytes.
const LARGEST: u16 = 1_440;

/// Maximum payload after generated packets were lost (RFC 8899, 5.1.2), bytes: it fits the minimum MTU of IPv6 (RFC
/// 8200, 5).
const SMALLER: u16 = 1_220;
/// Maximum payload after further losses over IPv4, bytes: it fits the packet size that every host must accept (RFC
/// 1122, 3.3.2).
const SMALLEST_IPV4: u16 = 536;

/// Minimum size of a generated packet from the network header on, bytes, whatever MTU an ICMP error claims (RFC 1122,
/// 3.3.2; RFC 8200, 5).
const FLOOR_IPV4: u32 = 576;
const FLOOR_IPV6: u32 = 1_280;
/// Size of the headers of a generated packet without TCP options, bytes.
const HEADERS_IPV4: u32 = 40;
const HEADERS_IPV6: u32 = 60;
/// Packet sizes to try if the router reports no MTU, bytes (RFC 1191, 7.1).
const PLATEAUS: [u32; 2] = [1_492, 1_006];
/// Maximum number of ICMP errors that lower the size of packets to one end. Each such error causes retransmissions and
/// can be forged, so their number must be bounded. A path normally has fewer links with different MTUs.
const NARROWINGS: u8 = 8;

/// Minimum length of the range below the acknowledged position in which retransmissions are accepted, bytes.
const OLD: u64 = 1 << 16;

/// Maximum number of byte ranges that are kept at the same time.
const MAX_PIECES: usize = 8;

/// A packet that is held until its verdict.
pub(super) struct Held<F> {
    pub(super) frame: F,
    pub(super) start: Position,
    /// Position after the last byte or the FIN.
    pub(super) end: Position,
    /// Time of arrival, ms.
    pub(super) since: Millis,
}

/// A range of kept bytes. Skipped bytes lie between two pieces.
#[derive(Debug, Default)]
struct Piece {
    /// Position of the first kept byte.
    start: Position,
    bytes: Vec<u8>,
    /// Number of bytes at the front of `bytes` that lie below `start`.
    gone: usize,
    /// Ranges that have arrived, sorted and disjoint.
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

    /// Returns whether `data` equals the bytes that have arrived at its position.
    fn agrees(&self, start: Position, data: &[u8]) -> bool {
        let end = start + data.len() as u64;
        self.have.iter().all(|&(from, to)| {
            let (from, to) = (from.max(start), to.min(end));
            from >= to
                || data.get((from - start) as usize..(to - start) as usize) == Some(self.slice(from, to))
        })
    }

    /// Stores bytes. Returns whether any of them is new.
    fn store(&mut self, start: Position, data: &[u8]) -> bool {
        let end = start + data.len() as u64;
        if self.have.iter().any(|&(from, to)| from <= start && end <= to) {
            return false;
        }
        let at = self.gone + (start - self.start) as usize;
        if self.bytes.len() < at + data.len() {
            self.bytes.resize(at + data.len(), 0);
        }
        // If the buffer is too short, the bytes do not count as arrived, so their packet stays held until the deadline.
        let Some(room) = self.bytes.get_mut(at..at + data.len()) else {
            return false;
        };
        room.copy_from_slice(data);
        let (mut from, mut to) = (start, end);
        self.have.retain(|&(a, b)| {
            let is_apart = b < from || a > to;
            if !is_apart {
                from = from.min(a);
                to = to.max(b);
            }
            is_apart
        });
        let place = self.have.partition_point(|&(a, _)| a < from);
        self.have.insert(place, (from, to));
        true
    }

    /// Removes the bytes below a position.
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

    /// Removes the bytes from a position on.
    fn cut(&mut self, at: Position) {
        let keep = self.gone + (at.max(self.start) - self.start) as usize;
        self.bytes.truncate(keep);
        for range in &mut self.have {
            range.1 = range.1.min(at);
        }
        self.have.retain(|&(from, to)| from < to);
    }
}

/// Limit of what a sender may send (`connection/send_limit.rs`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SendLimit {
    /// Position after the last long message, which has an offload window.
    pub(super) end: Position,
    /// Number of bytes behind `end` that the sender may send: the head of the next message.
    pub(super) allowance: u64,
    /// Whether bytes behind `end` have a verdict, or a message behind it is not complete.
    pub(super) is_passed: bool,
}

/// An offload window of one direction.
#[derive(Clone, Copy, Debug)]
pub(super) struct OffloadWindow {
    pub(super) from: Position,
    pub(super) end: Position,
    /// [`palisade_abi::send_limit_code`]; 0: the sender is not limited.
    pub(super) code: u32,
}

/// Result of the comparison of a segment with the bytes that have arrived before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arrival {
    /// At least one byte is new.
    New,
    /// All bytes have arrived before, with the same values.
    Known,
    /// A byte has arrived before with another value.
    Differs,
}

/// One direction of a connection. In the comments, sender and receiver are the two ends in this direction.
pub(super) struct Half<F> {
    /// Sequence number of the sender's SYN, once that was seen.
    pub(super) isn: Option<u32>,
    /// Link header and route of the sender's packets.
    pub(super) link: Option<Link>,
    /// Window scale option of the sender's SYN.
    pub(super) scale: Option<u8>,
    /// MSS option of the sender's SYN, bytes.
    pub(super) mss: u16,
    /// Maximum payload of generated packets for the *sender*, bytes. ICMP errors and losses lower it.
    path: u16,
    /// Number of ICMP errors that have lowered `path`.
    narrowings: u8,
    /// Whether the sender's SYN had the timestamp option.
    pub(super) has_timestamps: bool,
    /// TS.Recent of the receiver: greatest timestamp of a segment that began at or before the next byte that the
    /// receiver expected (RFC 7323, 4.3).
    pub(super) recent: u32,
    /// Greatest timestamp of all accepted segments. Generated packets in the sender's place carry it: the receiver has
    /// possibly accepted that segment, and drops segments with an older timestamp (RFC 7323, 5.3). `recent` lags behind
    /// by the segments in flight.
    pub(super) latest: u32,
    /// Window field of the sender's last segment.
    pub(super) window: u16,
    /// Position below which all bytes have arrived or were skipped.
    pub(super) next: Position,
    /// Position below which the inspector has allowed all bytes.
    pub(super) allowed: Position,
    /// Position below which all bytes may be forwarded, even before the inspector has allowed them.
    pub(super) ahead: Position,
    /// Position after the last byte that was forwarded (SND.NXT as the receiver sees it).
    pub(super) sent: Position,
    /// Position after the last byte that has arrived.
    pub(super) highest: Position,
    /// Position below which the receiver has acknowledged all bytes (SND.UNA).
    pub(super) acked: Position,
    /// Position below which all bytes are acknowledged to the sender, by the receiver or on its behalf.
    pub(super) proxy_acked: Position,
    /// Time at which the held bytes are acknowledged on behalf of the receiver, ms.
    pub(super) ack_at: Option<Millis>,
    /// Time of the next retransmission of bytes acknowledged on behalf of the receiver, ms, and the number of timeouts
    /// so far.
    pub(super) again: Option<(Millis, u32)>,
    /// Position below which all bytes that the receiver has not acknowledged are presumed lost.
    pub(super) lost: Position,
    /// Position below which the bytes presumed lost were retransmitted.
    pub(super) resent: Position,
    /// Time since which the first byte without a verdict waits, ms.
    pub(super) since: Option<Millis>,
    /// Whether the inspector waits for the other side, so that no deadline runs.
    pub(super) awaits_peer: bool,
    /// Right edge of the receiver's window.
    pub(super) edge: Position,
    /// Right edge of the window in the newest segment of the receiver that was punted.
    pub(super) granted: Position,
    /// Maximum window that the receiver has offered, bytes.
    pub(super) widest: u64,
    /// Highest right edge of a window that was forwarded to the sender. [`Position::MAX`]: not known, because the
    /// programs have forwarded acknowledgements.
    pub(super) offered: Position,
    /// Limit of what the sender may send; `None`: only that of the receiver.
    pub(super) limit: Option<SendLimit>,
    /// Position of the FIN.
    pub(super) fin: Option<Position>,
    /// Whether the inspector has allowed the end of the stream.
    pub(super) end_read: bool,
    pieces: VecDeque<Piece>,
    /// Held packets in the order of the stream.
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
            allowed: FIRST,
            ahead: FIRST,
            sent: FIRST,
            highest: FIRST,
            acked: START,
            proxy_acked: START,
            ack_at: None,
            again: None,
            lost: START,
            resent: START,
            since: None,
            awaits_peer: false,
            edge: FIRST,
            granted: FIRST,
            widest: OLD,
            offered: FIRST,
            limit: None,
            fin: None,
            end_read: false,
            pieces: VecDeque::from([Piece::at(FIRST)]),
            held: VecDeque::new(),
        }
    }

    /// Returns the position of a sequence number: the one that is closest to `next`.
    pub(super) fn position(&self, seq: u32) -> Position {
        let near = self.next;
        near.wrapping_add_signed(i64::from(seq.wrapping_sub(self.seq(near)) as i32))
    }

    /// Returns the sequence number of a position.
    pub(super) fn seq(&self, position: Position) -> u32 {
        self.isn
            .unwrap_or(0)
            .wrapping_add(position.wrapping_sub(START) as u32)
    }

    /// Returns the position after the last byte or the FIN that has arrived or was forwarded.
    pub(super) fn arrived(&self) -> Position {
        let fin = self.fin.map_or(0, |fin| fin + 1);
        self.sent.max(self.highest).max(fin)
    }

    /// Returns the lowest position at which a segment, or an acknowledgement of this direction, is acceptable.
    pub(super) fn oldest(&self) -> Position {
        self.acked - self.widest.clamp(OLD, START / 2)
    }

    /// Updates the acknowledged position and the window from a segment of the receiver.
    pub(super) fn acknowledge(&mut self, position: Position, window: u64) {
        if position >= self.acked {
            self.granted = position + window;
        }
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
        let unneeded = self.acked.min(self.allowed).min(self.next);
        while self.pieces.get(1).is_some_and(|second| second.start <= unneeded) {
            self.pieces.pop_front();
        }
        if let Some(piece) = self.pieces.front_mut() {
            piece.forget(unneeded);
        }
    }

    /// Compares the bytes of a segment with those that have arrived before, and keeps new ones until they are
    /// acknowledged and allowed.
    pub(super) fn take(&mut self, start: Position, data: &[u8]) -> Arrival {
        let end = start + data.len() as u64;
        let mut last = None;
        for (index, piece) in self.pieces.iter().enumerate() {
            // Only the last piece grows. The bytes between two pieces were skipped and are not compared.
            let is_last = index + 1 == self.pieces.len();
            let from = start.max(piece.start);
            let to = if is_last { end } else { end.min(piece.end()) };
            if from >= to {
                continue;
            }
            let part = data.get((from - start) as usize..(to - start) as usize);
            let Some(part) = part.filter(|part| piece.agrees(from, part)) else {
                return Arrival::Differs;
            };
            if is_last {
                last = Some((from, part));
            }
        }
        let mut is_new = end > self.highest;
        if let Some((from, part)) = last
            && let Some(piece) = self.pieces.back_mut()
        {
            is_new |= piece.store(from, part);
        }
        self.highest = self.highest.max(end);
        self.advance();
        if is_new { Arrival::New } else { Arrival::Known }
    }

    /// Raises `next` to the end of the range that it lies in.
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

    /// Returns the highest acceptable end of a segment. `limit`: number of bytes that may be kept.
    pub(super) fn reach(&self, limit: u64) -> Position {
        let kept = self.kept() as u64;
        let unread = self.pieces.back().map_or(0, |piece| piece.end() - piece.start);
        self.pieces
            .back()
            .map_or(self.next, |piece| piece.start)
            .saturating_add(limit.saturating_sub(kept - unread))
    }

    /// Returns whether all bytes below `next` have arrived. Skipped bytes count as arrived once they are acknowledged.
    pub(super) fn is_contiguous(&self) -> bool {
        self.pieces
            .back()
            .is_some_and(|piece| piece.start <= self.proxy_acked.max(START + 1))
    }

    /// Returns at most `most` bytes, beginning at position `from`, that were acknowledged on behalf of the receiver and
    /// may be forwarded.
    pub(super) fn undelivered(&self, from: Position, most: usize) -> &[u8] {
        let Some(piece) = self
            .pieces
            .iter()
            .find(|piece| piece.start <= from && from < piece.end())
        else {
            return &[];
        };
        let to = self.proxy_acked.min(self.forward_limit()).min(piece.end());
        piece.slice(from, to.clamp(from, from + most as u64))
    }

    /// Presumes that all bytes in flight that were acknowledged on behalf of the receiver are lost.
    pub(super) fn lose(&mut self) {
        self.lost = self.delivered();
        self.resent = self.acked;
    }

    /// Returns whether bytes that were presumed lost are still unacknowledged.
    pub(super) fn is_recovering(&self) -> bool {
        self.acked < self.lost
    }

    /// Returns the start and end of the allowed bytes of the first held packet that were not forwarded yet, if the rest
    /// of that packet has no verdict.
    pub(super) fn part(&self) -> Option<(Position, Position)> {
        let held = self.held.front().filter(|held| held.end > self.allowed)?;
        let from = held.start.max(self.sent);
        (from < self.allowed).then_some((from, self.allowed))
    }

    /// Returns the kept bytes of a range, up to the end of the piece in which `from` lies.
    pub(super) fn bytes(&self, from: Position, to: Position) -> &[u8] {
        let piece = self
            .pieces
            .iter()
            .find(|piece| piece.start <= from && from < piece.end());
        piece.map_or(&[], |piece| piece.slice(from, to.clamp(from, piece.end())))
    }

    /// Returns the position up to which bytes acknowledged on behalf of the receiver were sent to the receiver.
    pub(super) fn delivered(&self) -> Position {
        self.sent.min(self.proxy_acked)
    }

    /// Returns whether the receiver has every byte that was acknowledged on its behalf.
    pub(super) fn is_drained(&self) -> bool {
        self.acked >= self.proxy_acked
    }

    /// Returns the maximum payload of a generated packet for the sender, bytes.
    pub(super) fn payload_size(&self, has_timestamps: bool) -> usize {
        usize::from(self.mss.clamp(64, self.path)) - if has_timestamps { 12 } else { 0 }
    }

    /// Lowers the size of generated packets for the sender, because such packets were lost.
    pub(super) fn shrink(&mut self, is_ipv6: bool) {
        self.path = if self.path > SMALLER || is_ipv6 {
            self.path.min(SMALLER)
        } else {
            self.path.min(SMALLEST_IPV4)
        };
    }

    /// Lowers the size of generated packets for the sender to `mtu`, the MTU of a link in bytes. An IPv4 router that
    /// does not report the MTU sends 0; the size is then lowered to the next of `PLATEAUS`. Returns whether the size
    /// has changed.
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

    /// Returns the time since which a packet or byte has waited for its verdict, ms; `None` if no deadline runs.
    pub(super) fn waits_since(&self) -> Option<Millis> {
        let held = self.held.front().map(|held| held.since);
        [held, self.since]
            .into_iter()
            .flatten()
            .min()
            .filter(|_| !self.awaits_peer)
    }

    /// Returns the time of the next timeout of this direction, ms.
    pub(super) fn due(&self, deadline: Millis) -> Option<Millis> {
        let waits = self.waits_since().map(|since| since.saturating_add(deadline));
        let again = self.again.map(|(at, _)| at);
        [waits, again, self.ack_at].into_iter().flatten().min()
    }

    /// Removes all kept bytes and held packets, and stops the timers.
    pub(super) fn clear(&mut self) {
        self.held = VecDeque::new();
        self.pieces = VecDeque::from([Piece::at(self.next)]);
        self.allowed = self.next;
        self.since = None;
        self.ack_at = None;
        self.again = None;
    }

    /// Returns the number of kept bytes.
    pub(super) fn kept(&self) -> usize {
        self.pieces
            .iter()
            .map(|piece| piece.bytes.len() - piece.gone)
            .sum()
    }

    /// Returns the bytes without a verdict, up to the first byte that has not arrived.
    pub(super) fn undecided(&self) -> &[u8] {
        match self.pieces.back() {
            Some(piece) if self.allowed < self.next && piece.start <= self.allowed => {
                piece.slice(self.allowed, self.next)
            }
            _ => &[],
        }
    }

    /// Returns whether the receiver has acknowledged the FIN.
    pub(super) fn is_ended(&self) -> bool {
        self.fin.is_some_and(|fin| self.acked > fin)
    }

    /// Returns whether all bytes up to the FIN have arrived.
    pub(super) fn is_whole(&self) -> bool {
        self.fin.is_some_and(|fin| self.next >= fin)
    }

    /// Marks the next `n` bytes as allowed. They are kept for comparison until they are acknowledged.
    pub(super) fn pass(&mut self, n: u64) {
        self.allowed += n;
        self.forget();
    }

    /// Marks the next `n` bytes as allowed and, if possible, exempts their retransmissions from the comparison. Returns
    /// whether they are exempt. At most `MAX_PIECES` ranges are kept, so the number of skipped ranges is bounded.
    pub(super) fn skip(&mut self, n: u64) -> bool {
        if self.pieces.len() >= MAX_PIECES {
            self.pass(n);
            return false;
        }
        let end = self.allowed.saturating_add(n);
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
        piece.cut(self.allowed);
        self.pieces.push_back(rest);
        self.allowed = end;
        self.next = self.next.max(end);
        self.sent = self.sent.max(end);
        // `highest` does not change: the range can extend beyond the end of the stream, and a FIN in it is valid.
        self.edge = self.edge.max(end + self.widest);
        self.advance();
        self.forget();
        true
    }

    /// Holds a packet.
    pub(super) fn hold(&mut self, held: Held<F>) {
        let place = self
            .held
            .partition_point(|other| (other.start, other.end) <= (held.start, held.end));
        self.held.insert(place, held);
    }

    /// Returns the position below which bytes may be forwarded.
    pub(super) fn forward_limit(&self) -> Position {
        self.allowed.max(self.ahead)
    }

    /// Removes and returns the next held packet that may be forwarded.
    pub(super) fn releasable(&mut self) -> Option<Held<F>> {
        let at = self
            .held
            .iter()
            .position(|held| held.end <= self.forward_limit())?;
        let held = self.held.remove(at)?;
        self.sent = self.sent.max(held.end);
        Some(held)
    }

    /// Returns whether the timestamp is older than TS.Recent (RFC 7323, 5.3). Updates `recent` and `latest`.
    pub(super) fn is_stale(&mut self, segment: &Segment<'_>, start: Position, is_agreed: bool) -> bool {
        let Some((value, _)) = segment.options.timestamp.filter(|_| is_agreed) else {
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
