//! Tests of the loop with a port in memory.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use palisade_abi::{
    CtKey, FlowCommand, Inspector, PuntHeader, PuntRequest, Reason, ReinjectTrailer, flow_op, protocol,
    punt_hook, reinject_flags, reinject_path,
};
use palisade_inspect::{CommitResult, Millis, PacketView, Route, Sink, commit::commit_queue, record::Record};
use palisade_xsk::handoff;
use proptest::prelude::*;
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::*;
use crate::{
    context::{TimedRecord, WAKER, WorkerControl},
    header,
    held::Handle,
    queue, watch,
};

const COOKIE: u64 = 0x1234_5678_9abc_def0;
const CHUNK: usize = 4_096;
const FRAMES: usize = 64;

/// A [`Port`] whose rings and frames are in memory.
struct MemoryPort {
    chunks: Vec<Vec<u8>>,
    free: Vec<usize>,
    arriving: VecDeque<Vec<u8>>,
    sent: Vec<Vec<u8>>,
    /// Size of the transmit ring.
    tx_capacity: usize,
    /// Packets in the transmit ring.
    in_tx: usize,
    rx_capacity: usize,
    /// The interface is gone.
    gone: bool,
}

struct MemoryFrame {
    chunk: usize,
    length: usize,
}

impl MemoryPort {
    fn new(arriving: Vec<Vec<u8>>) -> Self {
        Self {
            chunks: vec![vec![0xee; CHUNK]; FRAMES],
            free: (0..FRAMES).collect(),
            arriving: arriving.into(),
            sent: Vec::new(),
            tx_capacity: FRAMES,
            in_tx: 0,
            rx_capacity: 1_024,
            gone: false,
        }
    }
}

impl Port for MemoryPort {
    type Frame = MemoryFrame;

    fn receive(&mut self, into: &mut VecDeque<MemoryFrame>, most: usize) -> io::Result<usize> {
        let mut got = 0;
        while got < most {
            let Some(chunk) = self.free.pop() else { break };
            let Some(bytes) = self.arriving.pop_front() else {
                self.free.push(chunk);
                break;
            };
            self.chunks[chunk][..bytes.len()].copy_from_slice(&bytes);
            into.push_back(MemoryFrame {
                chunk,
                length: bytes.len(),
            });
            got += 1;
        }
        Ok(got)
    }

    fn rx_available(&mut self) -> usize {
        self.arriving.len()
    }

    fn rx_capacity(&self) -> usize {
        self.rx_capacity
    }

    fn data<'a>(&'a self, frame: &'a MemoryFrame) -> &'a [u8] {
        &self.chunks[frame.chunk][..frame.length]
    }

    fn buffer_mut<'a>(&'a mut self, frame: &'a mut MemoryFrame) -> &'a mut [u8] {
        &mut self.chunks[frame.chunk]
    }

    fn set_length(&mut self, frame: &mut MemoryFrame, length: usize) {
        frame.length = length;
    }

    fn alloc(&mut self) -> Option<MemoryFrame> {
        self.free.pop().map(|chunk| MemoryFrame { chunk, length: 0 })
    }

    fn free(&mut self, frame: MemoryFrame) {
        self.free.push(frame.chunk);
    }

    fn transmit(&mut self, frame: MemoryFrame, start: usize, length: usize) -> Result<(), MemoryFrame> {
        if self.in_tx == self.tx_capacity {
            return Err(frame);
        }
        self.in_tx += 1;
        self.sent
            .push(self.chunks[frame.chunk][start..start + length].to_vec());
        self.free.push(frame.chunk);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<usize> {
        self.in_tx = 0;
        Ok(0)
    }

    fn check(&mut self) -> io::Result<()> {
        if self.gone {
            return Err(io::Error::other("gone"));
        }
        Ok(())
    }

    fn fd(&self) -> Option<std::os::fd::RawFd> {
        None
    }

    fn statistics(&mut self) -> io::Result<PortStatistics> {
        Ok(PortStatistics::default())
    }
}

/// Numbers of rule sets. Each selects what [`Script`] does with a packet.
mod does {
    pub(super) const RELEASE: u32 = 0;
    pub(super) const HOLD: u32 = 1;
    pub(super) const DENY: u32 = 2;
    pub(super) const ANSWER: u32 = 3;
    pub(super) const COMMAND: u32 = 4;
}

/// Number of a rule. For a slot with this rule and [`does::COMMAND`], [`Script`] requests a command that is sent with
/// the packet.
const REPLACES: u32 = 1_000;

/// An engine that does with a packet what the number of the rule set selects.
#[derive(Default)]
struct Script {
    held: Vec<Handle>,
    seen: Vec<(u16, Vec<u8>)>,
    rules: u32,
}

fn command(endpoint: u16) -> FlowCommand {
    FlowCommand {
        key: CtKey {
            endpoint,
            ..CtKey::default()
        },
        serial: 77,
        op: 1,
        ruleset: 0,
        punt_flags: 0,
        windows: [0; 4],
    }
}

impl Inspect for Script {
    /// A number. The rule sets with smaller numbers exist.
    type Rules = u32;

    fn set_rules(&mut self, rules: Arc<u32>) {
        self.rules = *rules;
    }

    fn knows(&self, ruleset: u32) -> bool {
        ruleset < self.rules
    }

    fn packet(&mut self, _: Millis, view: &PacketView<'_>, frame: Handle, sink: &mut impl Sink<Handle>) {
        self.seen.push((view.slot.endpoint, view.frame.to_vec()));
        match view.slot.ruleset {
            does::RELEASE => sink.release(frame),
            does::HOLD => self.held.push(frame),
            does::DENY => sink.discard(frame, Reason::AppDenied),
            does::ANSWER => {
                sink.discard(frame, Reason::AppDenied);
                let route = Route {
                    ifindex: view.ifindex,
                    hook: view.hook,
                    back: true,
                };
                sink.emit(&view.frame[..30], route);
            }
            does::COMMAND => {
                let mut command = command(view.slot.endpoint);
                if view.slot.rule == REPLACES {
                    command.op = flow_op::REPLACE;
                }
                sink.release_with(frame, &command);
            }
            other => panic!("rule set {other}"),
        }
    }

    fn committed(&mut self, _: Millis, _: CommitResult, _: &mut impl Sink<Handle>) {}

    fn tick(&mut self, _: Millis, sink: &mut impl Sink<Handle>) {
        for frame in self.held.drain(..) {
            sink.release(frame);
        }
    }

    fn deadline(&self) -> Option<Millis> {
        (!self.held.is_empty()).then_some(0)
    }

    fn forget_endpoint(&mut self, _: u16, sink: &mut impl Sink<Handle>) {
        for frame in self.held.drain(..) {
            sink.discard(frame, Reason::NoPolicy);
        }
    }

    fn flows(&self) -> u64 {
        0
    }
}

fn clock() -> u64 {
    1_000_000_000
}

/// The control plane's end of a test's worker.
type Control = watch::Sender<WorkerControl<u32>>;

fn context(number: usize, workers: usize) -> (WorkerContext<u32>, Control, queue::Receiver<TimedRecord>) {
    let (sender, control) = watch::watch(WorkerControl {
        rules: Arc::new(5),
        xdp: [9].into(),
        gone: Vec::new(),
    });
    let (records, received) = queue::queue(1_000);
    let poll = Poll::new().unwrap();
    let waker = Arc::new(mio::Waker::new(poll.registry(), WAKER).unwrap());
    let context = WorkerContext {
        number,
        workers,
        cookie: COOKIE,
        mode: Mode::Poll,
        clock,
        heartbeat: Arc::new(|_, _| {}),
        counters: Arc::default(),
        stop: Arc::default(),
        hand_over: Arc::default(),
        control,
        handoff_senders: (0..workers).map(|_| None).collect(),
        handoff_receivers: (0..workers).map(|_| None).collect(),
        wakers: vec![waker; workers],
        poll,
        commit_queue: commit_queue(4).0,
        max_commits: 4,
        records,
    };
    (context, sender, received)
}

/// A packet as its sender makes it, with valid checksums and with its VLAN tags in the frame.
#[derive(Clone, Debug)]
struct Sent {
    ipv6: bool,
    tcp: bool,
    tags: usize,
    fragment: u16,
    options: usize,
    payload: Vec<u8>,
    padding: usize,
    no_checksum: bool,
}

fn naive_sum(parts: &[&[u8]]) -> u16 {
    let mut total = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            total += (u32::from(pair[0]) << 8) | u32::from(*pair.get(1).unwrap_or(&0));
        }
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

impl Sent {
    fn number(&self) -> u8 {
        if self.tcp { protocol::TCP } else { protocol::UDP }
    }

    /// Returns the frame with the complete transport checksum, and the frame with only the sum of the pseudo header
    /// (`CHECKSUM_PARTIAL`).
    fn frames(&self) -> (Vec<u8>, Vec<u8>) {
        let mut segment = vec![0x30, 0x39, 0, 53];
        if self.tcp {
            segment.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x18, 0x10, 0, 0, 0, 0, 0]);
        } else {
            let length = 8 + self.payload.len() as u16;
            segment.extend(length.to_be_bytes());
            segment.extend([0, 0]);
        }
        segment.extend(&self.payload);
        let mut ip = Vec::new();
        if self.ipv6 {
            let extension = if self.fragment == 0 { 0 } else { 8 };
            ip.extend([0x60, 0, 0, 0]);
            ip.extend(((segment.len() + extension) as u16).to_be_bytes());
            ip.extend([if self.fragment == 0 { self.number() } else { 44 }, 64]);
            ip.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            ip.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 2]);
            if self.fragment != 0 {
                ip.extend([self.number(), 0]);
                ip.extend(((self.fragment & 0xfff8) | 1).to_be_bytes());
                ip.extend([1, 2, 3, 4]);
            }
        } else {
            let header = 20 + self.options * 4;
            ip.extend([0x40 | (header / 4) as u8, 0]);
            ip.extend(((header + segment.len()) as u16).to_be_bytes());
            ip.extend([7, 7]);
            let fragment = if self.fragment == 0 {
                0x4000
            } else {
                0x2000 | (self.fragment / 8)
            };
            ip.extend(fragment.to_be_bytes());
            ip.extend([64, self.number(), 0, 0, 10, 0, 0, 1, 10, 0, 255, 2]);
            // At most eight NOPs, then end-of-options and padding: the decoder refuses more than twelve options.
            let all = self.options * 4;
            ip.extend(std::iter::repeat_n(1, all.min(8)));
            ip.extend(std::iter::repeat_n(0, all - all.min(8)));
            let sum = !naive_sum(&[&ip]);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        let addresses = if self.ipv6 { &ip[8..40] } else { &ip[12..20] };
        let length = (segment.len() as u32).to_be_bytes();
        let pseudo = [addresses, &length, &[0, self.number()]];
        let at = if self.tcp { 16 } else { 6 };
        let partial = naive_sum(&pseudo);
        let full = match !naive_sum(&[addresses, &length, &[0, self.number()], &segment]) {
            0 if !self.tcp => 0xffff,
            sum => sum,
        };
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for tag in 0..self.tags {
            frame.extend([if tag == 0 && self.tags == 2 { 0x88 } else { 0x81 }]);
            frame.extend([
                if tag == 0 && self.tags == 2 { 0xa8 } else { 0 },
                0x20,
                5 + tag as u8,
            ]);
        }
        frame.extend(if self.ipv6 { [0x86, 0xdd] } else { [8, 0] });
        let with = |sum: u16| {
            let mut whole = frame.clone();
            whole.extend(&ip);
            let mut segment = segment.clone();
            segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
            whole.extend(segment);
            whole.extend(std::iter::repeat_n(0xaa, self.padding));
            whole
        };
        if self.no_checksum && !self.tcp && !self.ipv6 {
            (with(0), with(0))
        } else {
            (with(full), with(partial))
        }
    }
}

fn slot(endpoint: u16, ruleset: u32) -> PuntRequest {
    PuntRequest {
        endpoint,
        ruleset,
        inspector: Inspector::Dns as u8,
        ..PuntRequest::default()
    }
}

/// Returns the frame as the programs punt it. `stripped`: the outermost VLAN tag is in the punt header instead of in
/// the frame.
fn carry(frame: &[u8], stripped: bool, hook: u8, hash: u32, slots: [PuntRequest; 2]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    let (mut vlan, mut vlan_protocol) = (0, 0);
    if stripped {
        let tag: Vec<u8> = frame.drain(12..16).collect();
        vlan_protocol = u16::from_be_bytes([tag[0], tag[1]]);
        vlan = u16::from_be_bytes([tag[2], tag[3]]);
    }
    let punted = PuntHeader {
        cookie: COOKIE,
        ifindex: 7,
        hash,
        vlan,
        vlan_protocol,
        hook,
        zero: [0; 3],
        slots,
    };
    let mut bytes = punted.as_bytes().to_vec();
    bytes.extend(frame);
    bytes
}

/// Splits a sent frame into the packet, the trailer, and the flow command before the trailer.
fn split(bytes: &[u8]) -> (Vec<u8>, ReinjectTrailer, Option<FlowCommand>) {
    let (rest, released) = ReinjectTrailer::read_from_suffix(bytes).unwrap();
    assert_eq!(released.cookie, COOKIE);
    if released.flags & reinject_flags::COMMAND == 0 {
        return (rest.to_vec(), released, None);
    }
    let (rest, command) = FlowCommand::read_from_suffix(rest).unwrap();
    (rest.to_vec(), released, Some(command))
}

fn udp() -> Sent {
    Sent {
        ipv6: false,
        tcp: false,
        tags: 0,
        fragment: 0,
        options: 0,
        payload: b"a question".to_vec(),
        padding: 0,
        no_checksum: false,
    }
}

/// The longest frame that is punted still fits on the punt link when the worker sends it with the commands of two
/// policies and with the VLAN tag that the device has stripped. A frame that is one byte longer is dropped with a
/// reason; veth would drop the frame without a reason.
#[test]
fn the_longest_frame_is_forwarded_with_two_commands() {
    use palisade_abi::{MAX_ON_PUNT_LINK, MAX_PUNT_FRAME};

    for hook in [
        punt_hook::XDP_INGRESS,
        punt_hook::TC_INGRESS,
        punt_hook::TC_EGRESS,
    ] {
        for (ipv6, tags, more) in [false, true]
            .into_iter()
            .flat_map(|ipv6| [(ipv6, 0, 0), (ipv6, 1, 0), (ipv6, 1, 1)])
        {
            let mut sent = Sent {
                ipv6,
                tcp: true,
                tags,
                ..udp()
            };
            // The VLAN tag is in the punt header, not in the frame.
            let headers = sent.frames().0.len() - sent.payload.len() - 4 * tags;
            sent.payload = vec![7; MAX_PUNT_FRAME as usize - headers + more];
            let (frame, _) = sent.frames();
            assert_eq!(frame.len() - 4 * tags, MAX_PUNT_FRAME as usize + more);
            let mut slots = [slot(3, does::COMMAND), slot(1, does::COMMAND)];
            slots[0].rule = REPLACES;
            let (mut back, drops, _) = work(vec![carry(&frame, tags > 0, hook, 5, slots)]);
            if more > 0 {
                assert_eq!(drops, HashMap::from([(Reason::PuntUnsupported as u8, 1)]));
                continue;
            }
            assert_eq!(drops, HashMap::new());
            let whole = back.pop().unwrap();
            assert!(whole.len() <= MAX_ON_PUNT_LINK as usize, "{}", whole.len());
            let (rest, released, first) = split(&whole);
            assert_ne!(released.flags & reinject_flags::SECOND_COMMAND, 0);
            let (rest, second) = FlowCommand::read_from_suffix(&rest).unwrap();
            assert_eq!(first.map(|first| first.op), Some(flow_op::REPLACE));
            assert_eq!(second, command(1));
            assert_eq!(rest, frame);
        }
    }
}

/// Lets a new worker process packets. Returns the sent frames, the drops by reason, and the records.
fn work(arriving: Vec<Vec<u8>>) -> (Vec<Vec<u8>>, HashMap<u8, u64>, Vec<Record>) {
    let (mut context, _control, records) = context(0, 1);
    let counters = Arc::clone(&context.counters);
    let mut worker = Worker::new(&mut context, MemoryPort::new(arriving), Script::default(), FRAMES);
    for _ in 0..10 {
        worker.turn().unwrap();
    }
    assert_eq!(worker.port.free.len(), FRAMES, "every frame is freed");
    assert_eq!(worker.inspection.held(), 0);
    let sent = std::mem::take(&mut worker.port.sent);
    drop(worker);
    let mut received = Vec::new();
    while let Ok((_, record)) = records.try_recv() {
        received.push(record);
    }
    (sent, counters.drops().collect(), received)
}

prop_compose! {
    fn any_sent()(
        ipv6: bool,
        tcp: bool,
        tags in 0..=2usize,
        fragment in prop_oneof![3 => Just(0u16), 1 => (3..100u16).prop_map(|n| n * 8)],
        options in 0..=10usize,
        mut payload in proptest::collection::vec(any::<u8>(), 1..1_200),
        padding in 0..=20usize,
        no_checksum in proptest::bool::weighted(0.1),
    ) -> Sent {
        if fragment != 0 {
            payload.resize(payload.len().next_multiple_of(8) + if tcp { 4 } else { 0 }, 3);
        }
        Sent { ipv6, tcp, tags, fragment, options, payload, padding, no_checksum }
    }
}

proptest! {
    #[test]
    fn packets_are_forwarded_unchanged_except_for_completed_checksums(
        packets in proptest::collection::vec(
            (any_sent(), any::<bool>(), any::<bool>(), 1..=3u8, 0..=1u32, 0..=1u32, any::<bool>()),
            1..40,
        )
    ) {
        let mut arriving = Vec::new();
        let mut expected = Vec::new();
        for (sent, unfinished, stripped, hook, first, second, two) in packets {
            let (whole, partial) = sent.frames();
            let unfinished = unfinished && sent.fragment == 0;
            let slots = [slot(3, first), if two { slot(1, second) } else { PuntRequest::default() }];
            let frame = if unfinished { &partial } else { &whole };
            arriving.push(carry(frame, stripped && sent.tags > 0, hook, 5, slots));
            expected.push((whole, hook));
        }
        let (sent, drops, _) = work(arriving);
        prop_assert_eq!(drops, HashMap::new());
        let mut sent: Vec<_> = sent.iter().map(|bytes| {
            let (frame, released, command) = split(bytes);
            assert!(command.is_none());
            assert_eq!(released.ifindex, 7);
            (frame, released.path, released.flags)
        }).collect();
        let mut expected: Vec<_> = expected.into_iter().map(|(frame, hook)| {
            let (way, flags) = match hook {
                punt_hook::XDP_INGRESS => (reinject_path::INGRESS, 0),
                punt_hook::TC_INGRESS => (reinject_path::INGRESS, reinject_flags::MARK),
                _ => (reinject_path::EGRESS, reinject_flags::MARK),
            };
            (frame, way, flags)
        }).collect();
        // Held packets are forwarded later, so the order differs.
        sent.sort();
        expected.sort();
        prop_assert_eq!(sent, expected);
    }

    #[test]
    fn a_flipped_bit_is_detected(mut sent in any_sent(), at: prop::sample::Index, bit in 0..8u8) {
        (sent.fragment, sent.no_checksum, sent.padding, sent.ipv6) = (0, false, 0, false);
        let (whole, _) = sent.frames();
        let network = 14 + sent.tags * 4;
        let mut broken = whole.clone();
        let at = network + at.index(whole.len() - network);
        broken[at] ^= 1 << bit;
        // A flipped bit can make the checksum field of a datagram zero, which means that the datagram has no checksum.
        let field = network + 20 + sent.options * 4 + 6;
        prop_assume!(sent.tcp || broken[field..field + 2] != [0, 0]);
        let slots = [slot(3, does::RELEASE), PuntRequest::default()];
        let (sent, drops, records) = work(vec![carry(&broken, false, 2, 0, slots)]);
        prop_assert!(sent.is_empty());
        prop_assert_eq!(drops.values().sum::<u64>(), 1);
        prop_assert_eq!(records.len(), 1);
        prop_assert_eq!(drops.keys().copied().collect::<Vec<_>>(), [records[0].reason as u8]);
    }

    #[test]
    fn arbitrary_frames_on_the_punt_link_cause_no_panic_and_are_counted(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..300),
        valid_cookie: bool,
    ) {
        if valid_cookie && bytes.len() >= 8 {
            bytes[..8].copy_from_slice(&COOKIE.to_ne_bytes());
        }
        let (sent, drops, _) = work(vec![bytes]);
        prop_assert!(sent.len() + drops.values().sum::<u64>() as usize >= 1);
    }
}

#[test]
fn a_packet_of_two_policies_is_inspected_for_both_in_order_and_either_can_drop_it() {
    let (whole, partial) = udp().frames();
    let run = |first, second| {
        let slots = [slot(3, first), slot(1, second)];
        let (mut context, _control, _) = context(0, 1);
        let port = MemoryPort::new(vec![carry(&partial, false, punt_hook::TC_EGRESS, 0, slots)]);
        let mut worker = Worker::new(&mut context, port, Script::default(), FRAMES);
        for _ in 0..5 {
            worker.turn().unwrap();
        }
        assert_eq!(worker.port.free.len(), FRAMES);
        let sent: Vec<_> = worker.port.sent.iter().map(|bytes| split(bytes)).collect();
        for (_, frame) in &worker.inspection.engine().seen {
            assert_eq!(frame, &whole, "both inspectors see the completed checksum");
        }
        let seen: Vec<u16> = worker
            .inspection
            .engine()
            .seen
            .iter()
            .map(|(endpoint, _)| *endpoint)
            .collect();
        (seen, sent)
    };
    let (seen, sent) = run(does::RELEASE, does::RELEASE);
    assert_eq!((seen, sent.len()), (vec![3, 1], 1));
    assert_eq!(run(does::DENY, does::RELEASE), (vec![3], vec![]));
    assert_eq!(run(does::HOLD, does::DENY), (vec![3, 1], vec![]));
    let (seen, sent) = run(does::COMMAND, does::COMMAND);
    assert_eq!(seen, [3, 1]);
    let [(empty, first, first_command), (frame, last, last_command)] = sent.as_slice() else {
        panic!("{sent:?}");
    };
    assert_eq!(empty.len(), header::ETHERNET_HEADER);
    assert_eq!(first.path, reinject_path::NONE);
    assert_eq!(*first_command, Some(command(3)));
    assert_eq!(frame, &whole);
    assert_eq!(
        (last.path, last.flags),
        (
            reinject_path::EGRESS,
            reinject_flags::MARK | reinject_flags::COMMAND
        )
    );
    assert_eq!(*last_command, Some(command(1)));
}

#[test]
fn a_generated_response_takes_the_opposite_path() {
    let (whole, _) = udp().frames();
    let slots = [slot(3, does::ANSWER), PuntRequest::default()];
    let (sent, drops, _) = work(vec![carry(&whole, false, punt_hook::TC_EGRESS, 0, slots)]);
    assert_eq!(drops, [(Reason::AppDenied as u8, 1)].into());
    let (frame, released, _) = split(&sent[0]);
    assert_eq!(frame, &whole[..30]);
    assert_eq!(
        (released.path, released.flags),
        (reinject_path::INGRESS, reinject_flags::MARK)
    );
}

#[test]
fn new_rules_are_applied_before_a_packet_with_an_unknown_rule_set_is_dropped() {
    let (whole, _) = udp().frames();
    let packet = || {
        let slots = [slot(3, does::COMMAND), PuntRequest::default()];
        carry(&whole, false, punt_hook::TC_INGRESS, 0, slots)
    };
    let (mut context, control, _) = context(0, 1);
    control.modify(|control| control.rules = Arc::new(2));
    let counters = Arc::clone(&context.counters);
    let mut worker = Worker::new(
        &mut context,
        MemoryPort::new(vec![packet()]),
        Script::default(),
        FRAMES,
    );
    worker.turn().unwrap();
    assert_eq!(worker.port.sent.len(), 0);
    assert_eq!(
        counters.drops().collect::<Vec<_>>(),
        [(Reason::UnknownRuleset as u8, 1)]
    );
    // The rules change after the turn has read the control plane's settings, before the packet is inspected.
    control.modify(|control| control.rules = Arc::new(5));
    worker.port.arriving.push_back(packet());
    worker.rx.receive(&mut worker.port, clock()).unwrap();
    worker.inspect_batch();
    assert_eq!(worker.port.sent.len(), 1);
}

#[test]
fn the_held_packets_of_a_deleted_endpoint_are_dropped() {
    let (whole, _) = udp().frames();
    let slots = [slot(3, does::HOLD), PuntRequest::default()];
    let (mut context, control, _) = context(0, 1);
    let counters = Arc::clone(&context.counters);
    let port = MemoryPort::new(vec![carry(&whole, false, punt_hook::TC_INGRESS, 0, slots)]);
    let mut worker = Worker::new(&mut context, port, Script::default(), FRAMES);
    worker.rx.receive(&mut worker.port, clock()).unwrap();
    worker.inspect_batch();
    assert_eq!(worker.inspection.held(), 1);
    control.modify(|control| control.gone.push(3));
    worker.turn().unwrap();
    assert_eq!(worker.inspection.held(), 0);
    assert_eq!(
        counters.drops().collect::<Vec<_>>(),
        [(Reason::NoPolicy as u8, 1)]
    );
}

#[test]
fn a_packet_of_another_workers_flow_is_handed_off_to_that_worker() {
    let (whole, partial) = udp().frames();
    let slots = [slot(3, does::RELEASE), PuntRequest::default()];
    let packet = carry(&partial, false, punt_hook::XDP_INGRESS, 7, slots);
    let (mut first, _control, _) = context(0, 2);
    let (mut second, _other_control, _) = context(1, 2);
    let (sender, receiver) = handoff::ring(2, CHUNK);
    first.handoff_senders[1] = Some(sender);
    second.handoff_receivers[0] = Some(receiver);
    let (counts, other_counts) = (Arc::clone(&first.counters), Arc::clone(&second.counters));
    let mut first = Worker::new(
        &mut first,
        MemoryPort::new(vec![packet; 3]),
        Script::default(),
        FRAMES,
    );
    let mut second = Worker::new(&mut second, MemoryPort::new(vec![]), Script::default(), FRAMES);
    first.turn().unwrap();
    assert!(first.port.sent.is_empty() && first.inspection.engine().seen.is_empty());
    assert_eq!(first.port.free.len(), FRAMES);
    assert_eq!(counts.handoff_out.get(), 2);
    assert_eq!(
        counts.drops().collect::<Vec<_>>(),
        [(Reason::WorkerOverload as u8, 1)],
        "the hand-off ring has two slots"
    );
    assert!(second.turn().unwrap());
    assert_eq!(other_counts.handoff_in.get(), 2);
    assert_eq!(second.port.sent.len(), 2);
    assert_eq!(split(&second.port.sent[0]).0, whole);
    assert_eq!(second.port.free.len(), FRAMES);
}

#[test]
fn a_full_transmit_ring_loses_packets_but_no_frames() {
    let (whole, _) = udp().frames();
    let slots = [slot(3, does::RELEASE), PuntRequest::default()];
    let packet = carry(&whole, false, punt_hook::TC_INGRESS, 0, slots);
    let (mut context, _control, _) = context(0, 1);
    let counters = Arc::clone(&context.counters);
    let mut port = MemoryPort::new(vec![packet; 10]);
    port.tx_capacity = 4;
    let mut worker = Worker::new(&mut context, port, Script::default(), FRAMES);
    worker.turn().unwrap();
    assert_eq!((worker.port.sent.len(), worker.port.free.len()), (4, FRAMES));
    assert_eq!(counters.packets_out.get(), 4);
    assert_eq!(
        counters.drops().collect::<Vec<_>>(),
        [(Reason::WorkerOverload as u8, 6)]
    );
}

#[test]
fn overload_sheds_the_large_flow_and_not_the_small_one() {
    let (whole, _) = udp().frames();
    let packet = |hash, endpoint| {
        let slots = [slot(endpoint, does::RELEASE), PuntRequest::default()];
        carry(&whole, false, punt_hook::TC_INGRESS, hash, slots)
    };
    let mut arriving = Vec::new();
    for n in 0..1_000u32 {
        arriving.push(packet(1, 3));
        if n % 20 == 0 {
            arriving.push(packet(100 + n, 4));
        }
    }
    let (mut context, _control, _) = context(0, 1);
    let counters = Arc::clone(&context.counters);
    let mut port = MemoryPort::new(arriving);
    port.rx_capacity = FRAMES;
    let mut worker = Worker::new(&mut context, port, Script::default(), FRAMES);
    while worker.turn().unwrap() {}
    let read = |endpoint| {
        let seen = worker.inspection.engine().seen.iter();
        seen.filter(|(by, _)| *by == endpoint).count()
    };
    assert!(read(4) >= 45, "{} of 50", read(4));
    assert!(read(3) < 600, "{}", read(3));
    let shed: HashMap<u8, u64> = counters.drops().collect();
    assert_eq!(
        shed[&(Reason::WorkerOverload as u8)] as usize,
        1_050 - read(3) - read(4)
    );
}

#[test]
fn a_worker_whose_interface_is_gone_publishes_no_heartbeat() {
    let (mut context, _control, _records) = context(0, 1);
    let heartbeats = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = Arc::clone(&heartbeats);
    context.heartbeat = Arc::new(move |_, _| {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let mut port = MemoryPort::new(Vec::new());
    port.gone = true;
    let mut worker = Worker::new(&mut context, port, Script::default(), FRAMES);
    // Even the first heartbeat would make the programs punt to a socket that receives nothing.
    assert!(worker.turn().is_err());
    assert_eq!(heartbeats.load(Ordering::Relaxed), 0);
    worker.port.gone = false;
    assert!(worker.turn().is_ok());
    assert_eq!(heartbeats.load(Ordering::Relaxed), 1);
}
