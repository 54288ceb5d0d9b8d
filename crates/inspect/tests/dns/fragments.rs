//! DNS datagrams in IP fragments.

use std::collections::BTreeMap;

use palisade_abi::{PuntRequest, Reason};
use palisade_inspect::{FragmentLimits, Limits, record::Verdict};
use proptest::prelude::*;

use crate::common::*;

const INCOMPLETE: Fate = Fate::Discarded(Reason::FragmentsIncomplete);
const INVALID: Fate = Fate::Discarded(Reason::InvalidFragment);
const LIMIT: Fate = Fate::Discarded(Reason::InspectLimit);

/// Returns the frames of a datagram that is fragmented at these offsets.
fn cut(udp: &Udp, id: u16, cuts: &[usize]) -> Vec<Vec<u8>> {
    let bytes = udp.datagram();
    let mut from = 0;
    let mut frames = vec![];
    for to in cuts.iter().copied().chain([bytes.len()]) {
        frames.push(udp.around(&bytes[from..to], Some((from, to < bytes.len(), id))));
        from = to;
    }
    frames
}

/// Returns an answer with many addresses.
fn long_answer(id: u16) -> Vec<u8> {
    let addresses: Vec<[u8; 4]> = (0..100).map(|n| [192, 0, 2, n]).collect();
    let records: Vec<_> = addresses
        .iter()
        .map(|data| ("allowed.test", A, 60, &data[..]))
        .collect();
    answer(id, "allowed.test", A, 0, &records)
}

fn world() -> World {
    World::new(&Limits::default())
}

fn ask(world: &mut World, id: u16) {
    let udp = to_server(4000, &query(id, "allowed.test", A));
    world.send(&asks(1), &udp.frame());
    world.send(&asks(1), &udp.v6().frame());
}

#[test]
fn a_fragmented_answer_is_held_until_its_commit() {
    for v6 in [false, true] {
        let mut world = world();
        ask(&mut world, 7);
        let answer = to_client(4000, &long_answer(7));
        let answer = if v6 { answer.v6() } else { answer };
        let frames = cut(&answer, 99, &[1200, 2400]);
        let sent: Vec<_> = [2, 0, 1]
            .into_iter()
            .map(|at| {
                assert!(world.sink.learns.is_empty());
                world.send(&is_told(1), &frames[at])
            })
            .collect();
        assert_eq!(world.engine.stats().fragments.held, 0);
        assert_eq!(world.sink.learns[0].answer.addresses.len(), 100);
        assert!(sent.iter().all(|frame| world.fate(*frame).is_none()));
        world.sink.released.clear();
        world.committed(true);
        assert_eq!(world.sink.released, sent);
        // The ports are those of the first fragment.
        assert_eq!((world.last().source.1, world.last().destination.1), (53, 4000));
        assert_eq!(world.verdict(), (Verdict::Forwarded, Reason::Allowed, 41));
        let stats = world.engine.stats().fragments;
        assert_eq!((stats.fragments, stats.complete), (3, 1));
        world.end();
    }
}

#[test]
fn a_fragmented_query_is_evaluated_as_a_whole() {
    let mut world = world();
    for (name, fate) in [
        ("a-name-that-is-long.wild.test", Fate::Released),
        (
            "a-name-that-is-long.denied.test",
            Fate::Discarded(Reason::AppDenied),
        ),
    ] {
        let asked = to_server(4000, &query(7, name, A));
        for frame in cut(&asked, 5, &[8, 24]) {
            world.send(&asks(1), &frame);
        }
        for frame in world.sent - 3..world.sent {
            assert_eq!(world.fate(frame), Some(&fate));
        }
    }
    let (reply, _) = &world.sink.emitted[0];
    assert_eq!(
        udp_sum([10, 0, 0, 53].into(), [10, 0, 0, 1].into(), &reply[34..]),
        0
    );
    world.end();
}

#[test]
fn headers_behind_the_fragment_header_are_part_of_the_datagram() {
    let mut world = world();
    let asked = to_server(4000, &query(7, "allowed.test", A)).v6();
    let mut frames = cut(&asked, 5, &[16]);
    // Destination options of 8 bytes between the fragment header and UDP.
    let at = 14 + 40 + 8;
    frames[0].splice(at..at, [17, 0, 1, 4, 0, 0, 0, 0]);
    frames[0][14 + 40] = 60;
    frames[0][14 + 5] += 8;
    frames[1][14 + 40 + 3] += 8;
    for frame in frames {
        world.send(&asks(1), &frame);
    }
    assert_eq!(world.sink.released, [0, 1]);
    world.end();
}

#[test]
fn an_incomplete_datagram_is_dropped_at_its_timeout() {
    let mut world = world();
    ask(&mut world, 7);
    let frames = cut(&to_client(4000, &long_answer(7)), 99, &[1200]);
    let first = world.send(&is_told(1), &frames[0]);
    assert_eq!(world.engine.deadline(), Some(world.now + 5000));
    world.wait(4999);
    assert_eq!(world.fate(first), None);
    world.wait(1);
    assert_eq!(world.fate(first), Some(&INCOMPLETE));
    assert_eq!(
        world.verdict(),
        (Verdict::Dropped, Reason::FragmentsIncomplete, ASKING)
    );
    let second = world.send(&is_told(1), &frames[1]);
    assert_eq!(world.fate(second), None);
    assert_eq!(world.engine.stats().fragments.incomplete, 1);
    // In audit mode.
    let audited = world.send(&audit(is_told(2)), &frames[0]);
    world.wait(5000);
    assert_eq!(world.fate(second), Some(&INCOMPLETE));
    assert_eq!(world.fate(audited), Some(&Fate::Released));
    assert_eq!(world.last().verdict, Verdict::Audit);
    world.end();
}

#[test]
fn an_overlap_drops_the_datagram_and_later_fragments() {
    let answer = to_client(4000, &long_answer(7));
    let bytes = answer.datagram();
    let part = |from: usize, to: usize| answer.around(&bytes[from..to], Some((from, to < bytes.len(), 9)));
    let end = bytes.len();
    for overlapping in [
        // The same bytes, but not the same fragment.
        part(1192, 2400),
        part(800, 1200),
        part(0, 8),
        // A second last fragment, and bytes behind the end.
        answer.around(&bytes[2400..2800], Some((2400, false, 9))),
        answer.around(&bytes[..8], Some((end.next_multiple_of(8), true, 9))),
        answer.around(&[1; 8], Some((2400, true, 9))),
        // The same fragment with other bytes.
        answer.around(&[1; 1200], Some((0, true, 9))),
        answer.around(&[1; 8], Some((end / 8 * 8, false, 9))),
    ] {
        let mut world = world();
        ask(&mut world, 7);
        let frames = [part(0, 1200), part(2400, end), overlapping, part(1200, 2400)];
        for (number, frame) in frames.iter().enumerate() {
            let sent = world.send(&is_told(1), frame);
            assert_eq!(world.fate(sent), (number >= 2).then_some(&INVALID), "{number}");
        }
        for sent in 2..6 {
            assert_eq!(world.fate(sent), Some(&INVALID));
        }
        let stats = world.engine.stats().fragments;
        assert_eq!((stats.contradicting, stats.complete), (1, 0));
        // After the timeout the identification can be used again.
        world.wait(5000);
        assert_eq!(world.engine.stats().fragments.held, 0);
        world.end();
    }
}

#[test]
fn a_duplicate_fragment_is_dropped() {
    let mut world = world();
    ask(&mut world, 7);
    let frames = cut(&to_client(4000, &long_answer(7)), 99, &[1200]);
    let first = world.send(&is_told(1), &frames[0]);
    let again = world.send(&is_told(1), &frames[0]);
    assert_eq!((world.fate(first), world.fate(again)), (None, Some(&INVALID)));
    let second = world.send(&is_told(1), &frames[1]);
    world.committed(true);
    assert_eq!(world.fate(first), Some(&Fate::Released));
    assert_eq!(world.fate(second), Some(&Fate::Released));
    assert_eq!(world.engine.stats().fragments.duplicates, 1);
    world.end();
}

#[test]
fn checksum_and_length_are_checked_over_the_datagram() {
    let asked = to_server(4000, &query(7, "a-name-that-is-long.wild.test", A));
    let change = |udp: &Udp, at: usize, bytes: &[u8]| {
        let mut frames = cut(udp, 5, &[16]);
        let at = if udp.source.0.is_ipv6() { 62 + at } else { 34 + at };
        frames[0][at..at + bytes.len()].copy_from_slice(bytes);
        frames
    };
    let v6 = asked.clone().v6();
    let bad = Fate::Discarded(Reason::BadChecksum);
    for (frames, fate) in [
        (change(&asked, 6, &[0xde, 0xad]), bad.clone()),
        (change(&v6, 6, &[0xde, 0xad]), bad.clone()),
        // Without a checksum: allowed over IPv4, not over IPv6.
        (change(&asked, 6, &[0, 0]), Fate::Released),
        (change(&v6, 6, &[0, 0]), bad),
        // The length field exceeds the datagram.
        (change(&asked, 4, &[1, 0]), Fate::Discarded(Reason::AppMalformed)),
    ] {
        let mut world = world();
        for frame in frames {
            let sent = world.send(&asks(1), &frame);
            assert!(
                sent == 0 || world.fate(sent) == Some(&fate),
                "{:?}",
                world.fate(sent)
            );
        }
        assert_eq!(world.fate(0), Some(&fate));
        world.end();
    }
}

#[test]
fn limits_hold() {
    let limits = FragmentLimits {
        datagrams: 3,
        datagrams_per_endpoint: 2,
        bytes: 4000,
        fragments: 5,
        timeout: 1000,
    };
    let mut world = World::new(&Limits {
        fragments: limits,
        ..Limits::default()
    });
    let datagram = to_client(4000, &long_answer(7));
    let first = |id| cut(&datagram, id, &[1200]).swap_remove(0);
    let send = |world: &mut World, endpoint, id| {
        let frame = first(id);
        world.send(&is_told(endpoint), &frame)
    };
    for (endpoint, id, fate) in [
        (1, 1, None),
        (1, 2, None),
        (1, 3, Some(&LIMIT)),
        (2, 4, None),
        (3, 5, Some(&LIMIT)),
    ] {
        let sent = send(&mut world, endpoint, id);
        assert_eq!(world.fate(sent), fate, "{id}");
    }
    // The limit of bytes: 3,600 are held.
    let bytes = datagram.datagram();
    let more = datagram.around(&bytes[1200..1608], Some((1200, true, 1)));
    let sent = world.send(&is_told(1), &more);
    assert_eq!(world.fate(sent), Some(&LIMIT));
    // The rest of its datagram was dropped with it.
    assert_eq!(world.fate(0), Some(&LIMIT));
    // The limit of frames: two of five are held.
    for (number, at) in [1200, 1208, 1216, 1224].into_iter().enumerate() {
        let more = datagram.around(&bytes[at..at + 8], Some((at, true, 2)));
        let sent = world.send(&is_told(1), &more);
        assert_eq!(world.fate(sent), (number == 3).then_some(&LIMIT));
    }
    assert_eq!(world.engine.stats().fragments.limited, 4);
    world.wait(1000);
    for (id, endpoint) in [(6, 1), (7, 1), (8, 2)] {
        let sent = send(&mut world, endpoint, id);
        assert_eq!(world.fate(sent), None);
    }
    world.engine.forget_endpoint(1, &mut world.sink);
    assert_eq!(world.engine.stats().fragments.held, 1);
    world.end();
}

/// A fragment and its sender.
#[derive(Clone, Debug)]
struct Piece {
    id: u16,
    endpoint: u16,
    from: usize,
    bytes: Vec<u8>,
    more: bool,
}

/// A naive model of the reassembler, byte by byte.
#[derive(Default)]
struct Model {
    datagrams: BTreeMap<(u16, u16), Naive>,
}

#[derive(Default)]
struct Naive {
    pieces: Vec<(Piece, usize)>,
    bytes: BTreeMap<usize, u8>,
    total: Option<usize>,
    broken: bool,
}

impl Model {
    /// Returns the verdicts of handles. A complete datagram is forwarded if it is `right`.
    fn take(&mut self, piece: &Piece, handle: usize, right: &[u8]) -> Vec<(usize, Fate)> {
        let key = (piece.endpoint, piece.id);
        let naive = self.datagrams.entry(key).or_default();
        let to = piece.from + piece.bytes.len();
        let same = |(known, _): &(Piece, usize)| {
            known.from == piece.from && known.bytes == piece.bytes && known.more == piece.more
        };
        if naive.broken || naive.pieces.iter().any(same) {
            return vec![(handle, INVALID)];
        }
        let covered = (piece.from..to).any(|at| naive.bytes.contains_key(&at));
        let behind = naive
            .total
            .is_some_and(|total| to > total || to == total && piece.more);
        let second_end = !piece.more && naive.total.is_some();
        let before = !piece.more && naive.bytes.keys().any(|at| *at >= to);
        if covered || behind || second_end || before {
            naive.broken = true;
            let mut fates = vec![(handle, INVALID)];
            fates.extend(naive.pieces.drain(..).map(|(_, handle)| (handle, INVALID)));
            return fates;
        }
        naive.pieces.push((piece.clone(), handle));
        naive
            .bytes
            .extend((piece.from..to).zip(piece.bytes.iter().copied()));
        if !piece.more {
            naive.total = Some(to);
        }
        if naive
            .total
            .is_none_or(|total| (0..total).any(|at| !naive.bytes.contains_key(&at)))
        {
            return vec![];
        }
        let naive = self.datagrams.remove(&key).unwrap();
        let whole: Vec<u8> = naive.bytes.into_values().collect();
        let fate = if whole == right {
            Fate::Released
        } else {
            Fate::Discarded(Reason::BadChecksum)
        };
        naive
            .pieces
            .into_iter()
            .map(|(_, handle)| (handle, fate.clone()))
            .collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn as_a_naive_model_does(
        v6 in any::<bool>(),
        cuts in prop::collection::btree_set(1_usize..8, 0..5),
        strays in prop::collection::vec((0_usize..9, 1_usize..6, any::<bool>(), any::<bool>()), 0..3),
        order in prop::collection::vec((any::<prop::sample::Index>(), 0_u16..2, 1_u16..3), 1..40),
    ) {
        let asked = to_server(4000, &query(7, "a-name-that-is-longer-than-that.wild.test", A));
        let asked = if v6 { asked.v6() } else { asked };
        let bytes = asked.datagram();
        let piece = |from: usize, to: usize, more| Piece {
            id: 0,
            endpoint: 0,
            from,
            bytes: bytes[from..to].to_vec(),
            more,
        };
        let mut pieces = vec![];
        let mut from = 0;
        for to in cuts.iter().map(|cut| cut * 8).chain([bytes.len()]) {
            if to > from && to <= bytes.len() {
                pieces.push(piece(from, to, to < bytes.len()));
                from = to;
            }
        }
        for (number, (from, length, changed, last)) in strays.into_iter().enumerate() {
            let from = (from * 8).min(bytes.len() / 8 * 8 - 8);
            let to = (from + length * 8).min(bytes.len() / 8 * 8);
            let mut stray = piece(from, to, !last);
            if changed {
                // Different bits, so that two changes do not cancel out in the checksum.
                *stray.bytes.last_mut().unwrap() ^= 1 << number;
            }
            pieces.push(stray);
        }
        let mut world = World::new(&Limits::default());
        let mut model = Model::default();
        for (index, id, endpoint) in order {
            let piece = Piece { id, endpoint, ..index.get(&pieces).clone() };
            if piece.from == 0 && !piece.more {
                // A whole packet is no fragment.
                continue;
            }
            let frame = asked.around(&piece.bytes, Some((piece.from, piece.more, id)));
            let slot: PuntRequest = asks(endpoint);
            let before = world.sink.fates.len();
            let handle = world.send(&slot, &frame);
            let expected = model.take(&piece, handle, &bytes);
            prop_assert_eq!(world.sink.fates.len() - before, expected.len(), "{:?}", piece);
            for (handle, fate) in expected {
                let same = world.fate(handle) == Some(&fate)
                    // A first fragment with a changed length or checksum is dropped for that reason instead.
                    || matches!((world.fate(handle), &fate), (Some(Fate::Discarded(_)), Fate::Discarded(Reason::BadChecksum)));
                prop_assert!(same, "{:?} instead of {:?}", world.fate(handle), fate);
            }
        }
        world.end();
    }
}
