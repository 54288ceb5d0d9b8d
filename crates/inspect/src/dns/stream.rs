//! DNS over TCP (RFC 7766). Segments are taken in order only: what comes early is dropped and comes again. A segment of
//! queries goes on when every message in it is complete and judged; one with the end of an answer, when that is
//! committed. A message that must not pass ends the connection, on both sides.
//!
//! What was released is kept until it is acknowledged, and some of it longer: what is said again must be the same, also
//! if the other side claims to have had it. What is older than that is not passed again.

use std::collections::{HashMap, VecDeque};

use palisade_abi::{Addr, CarrySlot, Reason, carry_flags};
use palisade_packet::{Packet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};

use super::{AnswerVerdict, Dns, QueryVerdict, Waiting, is_audit};
use crate::{
    Millis, Route, Rules, Sink, View, build,
    build::Reset,
    engine::Spare,
    record::{Record, What},
};

/// TCP's urgent flag.
const TCP_URG: u8 = 32;
/// Length in front of a message.
const PREFIX: u64 = 2;
/// Longest query, as over UDP.
const LONGEST_QUERY: usize = 4096;
/// How often streams are looked at for what has waited too long.
const SWEEP: Millis = 250;

/// How much may be held of DNS over TCP, and for how long. Of one worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamLimits {
    /// Connections.
    pub streams: usize,
    /// Of them, those of one endpoint.
    pub streams_per_endpoint: usize,
    /// Bytes of one direction that are not acknowledged, and an eighth of that which is.
    pub bytes: usize,
    /// Segments of one direction that wait.
    pub segments: usize,
    /// A message that is not complete so long after its beginning ends the connection.
    pub deadline: Millis,
    /// A connection on which nothing happens is forgotten after this; what then comes of it ends it.
    pub idle: Millis,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            streams: 4096,
            streams_per_endpoint: 1024,
            bytes: 160 << 10,
            segments: 256,
            deadline: 10_000,
            idle: 120_000,
        }
    }
}

/// What has happened so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StreamStats {
    /// Connections seen from their start.
    pub begun: u64,
    /// Connections that were ended here.
    pub cut: u64,
    /// Segments that came before others, and were dropped.
    pub early: u64,
    /// Segments that say something else than was said before.
    pub contradicting: u64,
    /// Segments of connections that are older than their inspection.
    pub midstream: u64,
    /// Segments and connections that were dropped because a limit is reached.
    pub limited: u64,
    /// Connections now.
    pub open: u64,
    /// Segments that wait now.
    pub held: u64,
}

/// Between whom, as one endpoint sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct StreamKey {
    endpoint: u16,
    client: (Addr, u16),
    resolver: (Addr, u16),
}

/// Where an answer stands.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    key: StreamKey,
    /// Which connection of this key.
    number: u64,
    /// Where in the stream it ends.
    end: u64,
}

struct Segment<F> {
    frame: F,
    /// Where its bytes end in the stream.
    end: u64,
    fin: bool,
}

/// One direction. Places in it count from the first byte behind the SYN.
struct Half<F> {
    /// Sequence number of the first byte; none before the SYN.
    start: Option<u32>,
    /// What has come, from `base` on.
    bytes: Vec<u8>,
    base: u64,
    /// Where the first message that is not complete begins.
    parsed: u64,
    /// So far segments went on.
    released: u64,
    acknowledged: u64,
    waiting: VecDeque<Segment<F>>,
    /// Ends of messages from the first that is not committed on, and whether each is.
    pending: VecDeque<(u64, bool)>,
    /// Where everything before `pending` ends.
    cleared: u64,
    fin: Option<u64>,
    fin_released: bool,
    /// Since when a message is not complete.
    since: Millis,
}

impl<F> Default for Half<F> {
    fn default() -> Self {
        Self {
            start: None,
            bytes: Vec::new(),
            base: 0,
            parsed: 0,
            released: 0,
            acknowledged: 0,
            waiting: VecDeque::new(),
            pending: VecDeque::new(),
            cleared: 0,
            fin: None,
            fin_released: false,
            since: 0,
        }
    }
}

impl<F> Half<F> {
    fn next(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    /// Where a sequence number stands. Negative: before the first byte.
    fn place(&self, sequence: u32) -> Option<i64> {
        let next = self.next();
        let next_sequence = self.start?.wrapping_add(next as u32);
        Some(next as i64 + i64::from(sequence.wrapping_sub(next_sequence).cast_signed()))
    }

    /// The sequence number that the receiver waits for.
    fn released_sequence(&self) -> Option<u32> {
        let released = (self.released as u32).wrapping_add(u32::from(self.fin_released));
        Some(self.start?.wrapping_add(released))
    }

    /// So far segments may go on.
    ///
    /// Of a query nothing goes on before it is judged, but its length: some clients send that by itself, and wait.
    /// Of an answer everything but its last segment goes on, since a long one is not sent to its end before its
    /// beginning is acknowledged; without its end nobody takes it for an answer.
    fn limit(&self, is_reply: bool) -> u64 {
        if is_reply {
            return self.pending.front().map_or(self.next(), |(end, _)| end - 1);
        }
        if self.pending.is_empty() && self.next() - self.parsed <= PREFIX {
            self.next()
        } else {
            self.cleared
        }
    }

    /// The receiver says that it has everything up to here. So many bytes before it are kept.
    fn acknowledge(&mut self, place: i64, history: usize) {
        // a FIN counts one
        let place = (place.max(0) as u64).min(self.released);
        self.acknowledged = self.acknowledged.max(place);
        let keep = self.acknowledged.saturating_sub(history as u64).min(self.parsed);
        // in large steps, since what stays is moved
        let spent = keep.saturating_sub(self.base) as usize;
        if spent > history / 4 {
            self.bytes.drain(..spent);
            self.base += spent as u64;
        }
    }

    /// The next message if it is complete; what it must be not longer than is `longest`.
    fn message(&self, longest: usize) -> Result<Option<std::ops::Range<usize>>, ()> {
        let at = (self.parsed - self.base) as usize;
        let Some(prefix) = self.bytes.get(at..).and_then(|rest| rest.first_chunk::<2>()) else {
            return Ok(None);
        };
        let length = usize::from(u16::from_be_bytes(*prefix));
        if length < palisade_protocols::dns::HEADER_LEN || length > longest {
            return Err(());
        }
        let range = at + 2..at + 2 + length;
        Ok((range.end <= self.bytes.len()).then_some(range))
    }

    fn commit(&mut self, end: u64) {
        for pending in &mut self.pending {
            if pending.0 == end {
                pending.1 = true;
            }
        }
        while let Some(&(end, true)) = self.pending.front() {
            self.cleared = end;
            self.pending.pop_front();
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Everything is read.
    Read,
    /// It was ended: nothing passes any more.
    Cut(Reason),
    /// Audit mode lets pass what cannot be read any more.
    Unread,
}

struct Stream<F> {
    number: u64,
    state: State,
    slot: CarrySlot,
    /// What the SYN says, and what stands in front of it.
    packet: Packet,
    link: ([u8; 22], usize),
    ifindex: u32,
    hook: u8,
    /// From the client: `[0]`, from the resolver: `[1]`.
    halves: [Half<F>; 2],
    seen: Millis,
}

/// The connections of one worker.
pub(crate) struct Streams<F> {
    limits: StreamLimits,
    streams: HashMap<StreamKey, Box<Stream<F>>>,
    by_endpoint: HashMap<u16, usize>,
    numbers: u64,
    swept: Millis,
    out: Vec<u8>,
    stats: StreamStats,
}

/// What the header of a segment says.
#[derive(Clone, Copy)]
struct Header<'a> {
    sequence: u32,
    acknowledgment: u32,
    flags: u8,
    payload: &'a [u8],
}

impl<'a> Header<'a> {
    fn read(view: &View<'a>) -> Option<Self> {
        let end = view.network + view.packet.length as usize;
        let segment = view.frame.get(view.transport..end)?;
        let header: &[u8; 20] = segment.first_chunk()?;
        let word =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        Some(Self {
            sequence: word(4),
            acknowledgment: word(8),
            flags: header[13],
            payload: segment.get(usize::from(header[12] >> 4) * 4..)?,
        })
    }

    const fn is(&self, flags: u8) -> bool {
        self.flags & flags != 0
    }
}

impl<F> Streams<F> {
    pub(crate) fn new(limits: &StreamLimits) -> Self {
        Self {
            limits: *limits,
            streams: HashMap::new(),
            by_endpoint: HashMap::new(),
            numbers: 0,
            swept: 0,
            out: Vec::new(),
            stats: StreamStats::default(),
        }
    }

    pub(crate) fn stats(&self) -> StreamStats {
        let waiting = |stream: &Stream<F>| stream.halves.iter().map(|half| half.waiting.len()).sum::<usize>();
        StreamStats {
            open: self.streams.len() as u64,
            held: self.streams.values().map(|stream| waiting(stream)).sum::<usize>() as u64,
            ..self.stats
        }
    }

    /// A segment.
    #[expect(
        clippy::too_many_arguments,
        reason = "the engine's parts, each borrowed for itself"
    )]
    pub(crate) fn segment(
        &mut self,
        now: Millis,
        view: &View<'_>,
        frame: F,
        dns: &mut Dns<F>,
        rules: &Rules,
        spare: &mut Spare<F>,
        sink: &mut impl Sink<F>,
    ) {
        let Some(header) = Header::read(view) else {
            report(view, Reason::TcpInvalid, dns, sink);
            sink.discard(frame, Reason::TcpInvalid);
            return;
        };
        let packet = view.packet;
        let (source, destination) = (
            (packet.source, packet.source_port),
            (packet.destination, packet.destination_port),
        );
        let reply = view.slot.flags & carry_flags::REPLY != 0;
        let (client, resolver) = if reply {
            (destination, source)
        } else {
            (source, destination)
        };
        let key = StreamKey {
            endpoint: view.slot.endpoint,
            client,
            resolver,
        };
        if let Some(stream) = self.streams.get(&key)
            && (stream.slot.serial != view.slot.serial || stream.is_over() && header.is(TCP_SYN) && !reply)
        {
            // another connection between the same
            self.end(key, Reason::TcpInvalid, sink);
        }
        if !self.streams.contains_key(&key) {
            match self.begin(now, view, key, header, reply) {
                Ok(()) => sink.release(frame),
                Err(reason) => {
                    let passes = !report(view, reason, dns, sink);
                    if passes {
                        // from now on without a report for each packet
                        let _ = self.add(now, view, key, header, State::Unread);
                        sink.release(frame);
                        return;
                    }
                    sink.discard(frame, reason);
                    if reason == Reason::TcpMidstream && !header.is(TCP_RST) {
                        self.reset_unknown(view, header, sink);
                    }
                }
            }
            return;
        }
        let Some(stream) = self.streams.get_mut(&key) else {
            return;
        };
        stream.seen = now;
        match stream.state {
            State::Read => {}
            State::Unread => {
                sink.release(frame);
                return;
            }
            State::Cut(reason) => {
                sink.discard(frame, reason);
                if !header.is(TCP_RST) {
                    let resets = stream.resets();
                    stream.emit(resets[usize::from(reply)], !reply, &mut self.out, sink);
                }
                return;
            }
        }
        let taken = stream.take(now, frame, header, reply, &self.limits, &mut self.stats, sink);
        match taken {
            Taken::Done => {}
            Taken::Ends => self.end(key, Reason::TcpInvalid, sink),
            Taken::Breaks(reason) => {
                let audited = !report(view, reason, dns, sink);
                self.break_off(key, reason, audited, sink);
            }
            Taken::Read => {
                self.read(now, view, key, reply, dns, rules, spare, sink);
                self.resolve(dns, sink);
            }
        }
    }

    /// A connection is seen for the first time.
    fn begin(
        &mut self,
        now: Millis,
        view: &View<'_>,
        key: StreamKey,
        header: Header<'_>,
        reply: bool,
    ) -> Result<(), Reason> {
        let is_start = header.is(TCP_SYN) && !header.is(TCP_ACK | TCP_FIN | TCP_RST) && !reply;
        if !is_start {
            self.stats.midstream += 1;
            return Err(Reason::TcpMidstream);
        }
        // data in a SYN may be taken or not
        if !header.payload.is_empty() || header.is(TCP_URG) {
            return Err(Reason::TcpInvalid);
        }
        self.add(now, view, key, header, State::Read)
    }

    fn add(
        &mut self,
        now: Millis,
        view: &View<'_>,
        key: StreamKey,
        header: Header<'_>,
        state: State,
    ) -> Result<(), Reason> {
        let of_endpoint = self.by_endpoint.get(&key.endpoint).copied().unwrap_or(0);
        if self.streams.len() >= self.limits.streams || of_endpoint >= self.limits.streams_per_endpoint {
            self.stats.limited += 1;
            return Err(Reason::InspectLimit);
        }
        let mut link = [0; 22];
        let link_header = view.frame.get(..view.network).unwrap_or_default();
        let Some(room) = link.get_mut(..link_header.len()) else {
            return Err(Reason::TcpInvalid);
        };
        room.copy_from_slice(link_header);
        self.numbers += 1;
        let mut halves = [Half::default(), Half::default()];
        halves[0].start = Some(header.sequence.wrapping_add(1));
        let stream = Stream {
            number: self.numbers,
            state,
            slot: *view.slot,
            packet: *view.packet,
            link: (link, link_header.len()),
            ifindex: view.ifindex,
            hook: view.hook,
            halves,
            seen: now,
        };
        self.streams.insert(key, Box::new(stream));
        *self.by_endpoint.entry(key.endpoint).or_default() += 1;
        self.stats.begun += 1;
        Ok(())
    }

    /// Judges the messages that are complete now, and lets go what may.
    #[expect(clippy::too_many_arguments, reason = "as `segment`")]
    fn read(
        &mut self,
        now: Millis,
        view: &View<'_>,
        key: StreamKey,
        reply: bool,
        dns: &mut Dns<F>,
        rules: &Rules,
        spare: &mut Spare<F>,
        sink: &mut impl Sink<F>,
    ) {
        let Some(stream) = self.streams.get_mut(&key) else {
            return;
        };
        let number = stream.number;
        let half = &mut stream.halves[usize::from(reply)];
        let longest = if reply {
            usize::from(u16::MAX)
        } else {
            LONGEST_QUERY
        };
        let broken = loop {
            let range = match half.message(longest) {
                Ok(Some(range)) => range,
                Ok(None) => {
                    // a message that nobody will complete
                    break (half.fin == Some(half.next()) && half.parsed != half.next()).then(|| {
                        (
                            Reason::AppMalformed,
                            report(view, Reason::AppMalformed, dns, sink),
                        )
                    });
                }
                Err(()) => {
                    break Some((
                        Reason::AppMalformed,
                        report(view, Reason::AppMalformed, dns, sink),
                    ));
                }
            };
            half.since = now;
            let end = half.base + range.end as u64;
            let message = &half.bytes[range];
            let committed = if reply {
                match dns.answer(now, view, message, sink) {
                    AnswerVerdict::Pass => true,
                    AnswerVerdict::Refuse(reason) => break Some((reason, true)),
                    AnswerVerdict::Learn(answer, asked) => {
                        let place = Place { key, number, end };
                        dns.hold(now, view, answer, asked, Waiting::Stream(place), spare, sink);
                        false
                    }
                }
            } else {
                match dns.query(now, view, message, rules, sink) {
                    QueryVerdict::Pass => true,
                    QueryVerdict::Refuse(reason, _) => break Some((reason, true)),
                }
            };
            half.parsed = end;
            half.pending.push_back((end, committed));
            if committed {
                half.commit(end);
            }
        };
        match broken {
            Some((reason, refused)) => self.break_off(key, reason, !refused, sink),
            None => stream.release(usize::from(reply), sink),
        }
    }

    /// Tells the streams what became of their answers.
    pub(crate) fn resolve(&mut self, dns: &mut Dns<F>, sink: &mut impl Sink<F>) {
        while let Some(resolved) = dns.next_resolved() {
            let place = resolved.place;
            let Some(stream) = self
                .streams
                .get_mut(&place.key)
                .filter(|stream| stream.number == place.number && stream.state == State::Read)
            else {
                continue;
            };
            match resolved.passes {
                Ok(()) => {
                    stream.halves[1].commit(place.end);
                    stream.release(1, sink);
                }
                Err(reason) => self.break_off(place.key, reason, false, sink),
            }
        }
    }

    /// Nothing more is read of a connection: it ends, on both sides. `audited`: everything passes instead.
    fn break_off(&mut self, key: StreamKey, reason: Reason, audited: bool, sink: &mut impl Sink<F>) {
        let Some(stream) = self.streams.get_mut(&key) else {
            return;
        };
        if audited {
            stream.state = State::Unread;
        } else {
            self.stats.cut += 1;
            stream.state = State::Cut(reason);
        }
        for half in &mut stream.halves {
            for segment in half.waiting.drain(..) {
                if audited {
                    sink.release(segment.frame);
                } else {
                    sink.discard(segment.frame, reason);
                }
            }
        }
        if !audited {
            let [to_client, to_resolver] = stream.resets();
            stream.emit(to_client, true, &mut self.out, sink);
            stream.emit(to_resolver, false, &mut self.out, sink);
        }
        for half in &mut stream.halves {
            half.pending.clear();
            half.bytes = Vec::new();
        }
    }

    /// Forgets a connection; what it holds is dropped.
    fn end(&mut self, key: StreamKey, reason: Reason, sink: &mut impl Sink<F>) {
        let Some(mut stream) = self.streams.remove(&key) else {
            return;
        };
        for half in &mut stream.halves {
            for segment in half.waiting.drain(..) {
                sink.discard(segment.frame, reason);
            }
        }
        if let Some(count) = self.by_endpoint.get_mut(&key.endpoint) {
            *count -= 1;
            if *count == 0 {
                self.by_endpoint.remove(&key.endpoint);
            }
        }
    }

    /// Ends a connection that was not seen from its start: both sides begin anew.
    fn reset_unknown(&mut self, view: &View<'_>, header: Header<'_>, sink: &mut impl Sink<F>) {
        let link = view.frame.get(..view.network).unwrap_or_default();
        let length =
            header.payload.len() as u32 + u32::from(header.is(TCP_FIN)) + u32::from(header.is(TCP_SYN));
        let back = if header.is(TCP_ACK) {
            Reset {
                sequence: header.acknowledgment,
                acknowledgment: None,
            }
        } else {
            Reset {
                sequence: 0,
                acknowledgment: Some(header.sequence.wrapping_add(length)),
            }
        };
        let onward = Reset {
            sequence: header.sequence,
            acknowledgment: header.is(TCP_ACK).then_some(header.acknowledgment),
        };
        for (is_back, reset) in [(true, back), (false, onward)] {
            if build::reset(view.packet, link, is_back, reset, &mut self.out) {
                let route = Route {
                    ifindex: view.ifindex,
                    hook: view.hook,
                    back: is_back,
                };
                sink.emit(&self.out, route);
            }
        }
    }

    /// Ends what has waited too long, forgets what is idle.
    pub(crate) fn tick(&mut self, now: Millis, dns: &mut Dns<F>, sink: &mut impl Sink<F>) {
        self.resolve(dns, sink);
        if now < self.swept + SWEEP {
            return;
        }
        self.swept = now;
        let overdue = |stream: &Stream<F>| {
            stream.state == State::Read
                && stream.halves.iter().any(|half| {
                    half.parsed != half.next() && now.saturating_sub(half.since) >= self.limits.deadline
                })
        };
        let late: Vec<_> = (self.streams.iter())
            .filter(|(_, stream)| overdue(stream))
            .map(|(key, _)| *key)
            .collect();
        for key in late {
            if let Some(stream) = self.streams.get(&key) {
                let view = stream.view();
                let audited = !report(&view, Reason::InspectDeadline, dns, sink);
                self.break_off(key, Reason::InspectDeadline, audited, sink);
            }
        }
        let idle: Vec<_> = (self.streams.iter())
            .filter(|(_, stream)| now.saturating_sub(stream.seen) >= self.limits.idle)
            .map(|(key, _)| *key)
            .collect();
        for key in idle {
            self.end(key, Reason::InspectDeadline, sink);
        }
    }

    pub(crate) fn deadline(&self) -> Option<Millis> {
        (!self.streams.is_empty()).then(|| self.swept + SWEEP)
    }

    /// Drops what is held of an endpoint, or of all.
    pub(crate) fn forget(&mut self, endpoint: Option<u16>, dns: &mut Dns<F>, sink: &mut impl Sink<F>) {
        let gone: Vec<_> = (self.streams.keys())
            .filter(|key| endpoint.is_none_or(|endpoint| key.endpoint == endpoint))
            .copied()
            .collect();
        for key in gone {
            self.end(key, Reason::DnsUncommitted, sink);
        }
        self.resolve(dns, sink);
    }
}

/// Reports what cannot be read. False: audit mode lets it pass.
fn report<F>(view: &View<'_>, reason: Reason, dns: &mut Dns<F>, sink: &mut impl Sink<F>) -> bool {
    let what = What::Unreadable {
        detail: reason.text(),
    };
    dns.refused(is_audit(view.slot), Record::of(view, what), reason, sink)
}

/// What became of a segment.
enum Taken {
    /// It was released or dropped.
    Done,
    /// It waits, and there is something new to read.
    Read,
    /// The connection is over.
    Ends,
    /// The connection cannot go on.
    Breaks(Reason),
}

impl<F> Stream<F> {
    /// Whether both sides have said all, or it was ended here.
    fn is_over(&self) -> bool {
        matches!(self.state, State::Cut(_)) || self.halves.iter().all(|half| half.fin_released)
    }

    fn view(&self) -> View<'_> {
        View {
            slot: &self.slot,
            ifindex: self.ifindex,
            hook: self.hook,
            packet: &self.packet,
            frame: &[],
            network: 0,
            transport: 0,
            payload: (0, 0),
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the segment and the engine's parts")]
    fn take(
        &mut self,
        now: Millis,
        frame: F,
        header: Header<'_>,
        reply: bool,
        limits: &StreamLimits,
        stats: &mut StreamStats,
        sink: &mut impl Sink<F>,
    ) -> Taken {
        let [one, other] = &mut self.halves;
        let (half, against) = if reply { (other, one) } else { (one, other) };
        if header.is(TCP_RST) {
            // exactly what the receiver waits for; else it does not believe it, and nor is it believed here
            let place = half.place(header.sequence);
            let ends = place.is_none_or(|place| place == half.released as i64 || place == half.next() as i64);
            sink.release(frame);
            return if ends { Taken::Ends } else { Taken::Done };
        }
        if header.is(TCP_SYN) {
            let repeats = half
                .start
                .is_none_or(|start| start == header.sequence.wrapping_add(1));
            let answers = !reply || header.is(TCP_ACK) && against.start == Some(header.acknowledgment);
            if !repeats || !answers || header.is(TCP_ACK) != reply || !header.payload.is_empty() {
                sink.discard(frame, Reason::TcpInvalid);
                return Taken::Done;
            }
            half.start = Some(header.sequence.wrapping_add(1));
            sink.release(frame);
            return Taken::Done;
        }
        // without URG its field means nothing; with it, bytes leave the stream
        if header.is(TCP_URG) {
            sink.discard(frame, Reason::TcpInvalid);
            return Taken::Breaks(Reason::TcpInvalid);
        }
        let Some(place) = half.place(header.sequence) else {
            sink.discard(frame, Reason::TcpInvalid);
            return Taken::Done;
        };
        if header.is(TCP_ACK)
            && let Some(place) = against.place(header.acknowledgment)
        {
            against.acknowledge(place, limits.bytes / 8);
        }
        let fin = header.is(TCP_FIN);
        if header.payload.is_empty() && !fin {
            sink.release(frame);
            return Taken::Done;
        }
        half.take(now, frame, header.payload, place, fin, limits, stats, sink)
    }

    /// Lets go of one direction what may go.
    fn release(&mut self, half: usize, sink: &mut impl Sink<F>) {
        let is_reply = half == 1;
        let half = &mut self.halves[half];
        let limit = half.limit(is_reply);
        while let Some(segment) = half.waiting.pop_front_if(|segment| segment.end <= limit) {
            half.released = half.released.max(segment.end);
            half.fin_released |= segment.fin;
            sink.release(segment.frame);
        }
    }

    /// The resets to the client and to the resolver that they believe.
    fn resets(&self) -> [Option<Reset>; 2] {
        let [client, resolver] = &self.halves;
        let reset = |says: &Half<F>, hears: &Half<F>| {
            let acknowledgment = hears.start.map(|start| start.wrapping_add(hears.next() as u32));
            match says.released_sequence() {
                Some(sequence) => Some(Reset {
                    sequence,
                    acknowledgment,
                }),
                // the resolver has not said anything yet
                None => Some(Reset {
                    sequence: 0,
                    acknowledgment,
                }),
            }
        };
        [reset(resolver, client), reset(client, resolver)]
    }

    fn emit(&self, reset: Option<Reset>, back: bool, out: &mut Vec<u8>, sink: &mut impl Sink<F>) {
        let (link, length) = &self.link;
        let link = link.get(..*length).unwrap_or_default();
        if let Some(reset) = reset
            && build::reset(&self.packet, link, back, reset, out)
        {
            let route = Route {
                ifindex: self.ifindex,
                hook: self.hook,
                back,
            };
            sink.emit(out, route);
        }
    }
}

impl<F> Half<F> {
    /// Takes a segment with bytes or a FIN.
    #[expect(clippy::too_many_arguments, reason = "as `Stream::take`")]
    fn take(
        &mut self,
        now: Millis,
        frame: F,
        payload: &[u8],
        place: i64,
        fin: bool,
        limits: &StreamLimits,
        stats: &mut StreamStats,
        sink: &mut impl Sink<F>,
    ) -> Taken {
        let next = self.next();
        let end = place + payload.len() as i64;
        let mut refuse = |frame, reason| {
            sink.discard(frame, reason);
            Taken::Done
        };
        if place > next as i64 {
            stats.early += 1;
            return refuse(frame, Reason::TcpOutOfWindow);
        }
        let behind_fin = self
            .fin
            .is_some_and(|at| end > at as i64 || fin && end != at as i64);
        if behind_fin || fin && end < next as i64 {
            stats.contradicting += 1;
            return refuse(frame, Reason::TcpInvalid);
        }
        if place < self.base as i64 {
            return refuse(frame, Reason::TcpOutOfWindow);
        }
        // what was said before
        let known = place..end.min(next as i64);
        if known.start < known.end {
            let said = &self.bytes
                [(known.start - self.base as i64) as usize..(known.end - self.base as i64) as usize];
            let says = &payload[(known.start - place) as usize..(known.end - place) as usize];
            if said != says {
                stats.contradicting += 1;
                return refuse(frame, Reason::TcpOverlap);
            }
        }
        let fresh = usize::try_from(next as i64 - place)
            .ok()
            .and_then(|old| payload.get(old..))
            .unwrap_or_default();
        if fresh.is_empty() && (!fin || self.fin.is_some()) {
            if end <= self.released as i64 && (!fin || self.fin_released) {
                sink.release(frame);
                return Taken::Done;
            }
            // the first of its kind is held
            return refuse(frame, Reason::InspectDeadline);
        }
        if self.bytes.len() + fresh.len() > limits.bytes || self.waiting.len() >= limits.segments {
            stats.limited += 1;
            return refuse(frame, Reason::InspectLimit);
        }
        if self.parsed == next {
            self.since = now;
        }
        self.bytes.extend_from_slice(fresh);
        if fin {
            self.fin = Some(end as u64);
        }
        self.waiting.push_back(Segment {
            frame,
            end: end as u64,
            fin,
        });
        Taken::Read
    }
}
