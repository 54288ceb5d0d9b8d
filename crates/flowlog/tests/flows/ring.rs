//! The ring compared with a plain list, and used by several threads.

use std::{
    collections::VecDeque,
    net::IpAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::world::{WEB, World, address, event, flow};
use palisade_abi::{Reason, protocol};
use palisade_flowlog::{
    Cursor, FilterBuilder, Filters, Flow, FlowResolver, Item, Lost, LostSource, Next, Ordered, Owner, Raw,
    Resolver, Ring, RuleInfo, Timestamp,
};
use palisade_inspect::record::{Record, Verdict, What};
use proptest::prelude::*;

/// Returns a flow that its time identifies.
fn numbered(number: u64) -> Flow {
    let mut flow = flow(&event());
    flow.time = Timestamp(number as i64);
    flow
}

/// Returns a record of an inspector about the web server.
fn record() -> Record {
    Record {
        endpoint: 11,
        ingress: false,
        reply: false,
        source: (address("10.0.1.10"), 54006),
        destination: (address("10.0.1.20"), 80),
        protocol: protocol::TCP,
        remote_identity: WEB,
        ifindex: 5,
        verdict: Verdict::Dropped,
        reason: Reason::AppDenied,
        rule: 0,
        latency: None,
        what: What::Unreadable { detail: "test" },
    }
}

proptest! {
    #[test]
    fn flows_are_followed_in_the_order_of_their_times(late in prop::collection::vec(0..40_u64, 1..60)) {
        // One flow arrives per millisecond, with a time up to 40 ms in the past.
        let window = Duration::from_millis(50);
        let begin = Instant::now();
        let mut ordered = Ordered::new(window, 100);
        let mut given = Vec::new();
        for (n, late) in late.iter().enumerate() {
            let now = begin + Duration::from_millis(n as u64);
            ordered.push(Arc::new(numbered(1_000 + n as u64 - late)), now);
            while let Some(flow) = ordered.due(now) {
                given.push(number(&flow));
            }
        }
        let end = begin + Duration::from_secs(1);
        while let Some(flow) = ordered.due(end) {
            given.push(number(&flow));
        }
        prop_assert!(ordered.is_empty() && given.len() == late.len());
        prop_assert!(given.is_sorted(), "{:?}", given);
    }
}

#[test]
fn delayed_flows_are_bounded_and_ordered() {
    let mut ordered = Ordered::new(Duration::from_secs(1), 2);
    let now = Instant::now();
    for time in [5, 5, 3] {
        ordered.push(Arc::new(numbered(time)), now);
    }
    assert_eq!(ordered.due(now).map(|flow| number(&flow)), Some(3));
    assert!(ordered.due(now).is_none());
    // A clock that was set back delays flows no longer than the window.
    let later = now + Duration::from_secs(1);
    assert!(ordered.due(later).is_some() && ordered.due(later).is_some() && ordered.is_empty());
}

fn number(flow: &Flow) -> u64 {
    flow.time.0 as u64
}

fn drain(cursor: &mut Cursor) -> (Vec<u64>, u64) {
    let (mut flows, mut lost) = (Vec::new(), 0);
    while let Some(next) = cursor.read() {
        match next {
            Next::Flow(flow) => flows.push(number(&flow)),
            Next::Lost(report) => lost += report.count,
        }
    }
    (flows, lost)
}

#[derive(Clone, Debug)]
enum Step {
    Push(u8),
    Record(u8),
    Settle,
    Read,
    Last(u8),
    Since(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..20_u8).prop_map(Step::Push),
        (0..20_u8).prop_map(Step::Record),
        Just(Step::Settle),
        Just(Step::Read),
        (0..20_u8).prop_map(Step::Last),
        any::<u8>().prop_map(Step::Since),
    ]
}

proptest! {
    #[test]
    fn behaves_as_a_bounded_list(capacity in 1..12_usize, steps in prop::collection::vec(step(), 0..40)) {
        let ring = Ring::new(capacity);
        let names: Resolver = Arc::new(World);
        let mut model = VecDeque::new();
        let mut pushed = 0;
        let mut follower = ring.follow();
        let mut expected_at = 0;
        for step in steps {
            match step {
                Step::Settle => ring.settle(Timestamp(pushed as i64)),
                Step::Push(count) | Step::Record(count) => for _ in 0..count {
                    let number = if matches!(step, Step::Push(_)) {
                        ring.push(numbered(pushed))
                    } else {
                        ring.push_record(&record(), &names, Timestamp(pushed as i64))
                    };
                    prop_assert_eq!(number, pushed);
                    model.push_back(pushed);
                    if model.len() > capacity {
                        model.pop_front();
                    }
                    pushed += 1;
                },
                Step::Read => {
                    let first = pushed - model.len() as u64;
                    let lost = first.saturating_sub(expected_at);
                    let flows: Vec<u64> = model.iter().copied().filter(|n| *n >= expected_at).collect();
                    prop_assert_eq!(drain(&mut follower), (flows, lost));
                    expected_at = pushed;
                }
                Step::Last(count) => {
                    let (flows, mut cursor) = ring.last(count.into(), &Filters::default());
                    let flows: Vec<u64> = flows.iter().map(|flow| number(flow)).collect();
                    let skip = model.len().saturating_sub(count.into());
                    prop_assert_eq!(flows, model.iter().copied().skip(skip).collect::<Vec<_>>());
                    prop_assert_eq!(cursor.read(), None);
                }
                Step::Since(time) => {
                    let (flows, lost) = drain(&mut ring.since(Timestamp(time.into())));
                    prop_assert_eq!(lost, 0);
                    prop_assert_eq!(flows, model.iter().copied().filter(|n| *n >= time.into()).collect::<Vec<_>>());
                }
            }
            prop_assert_eq!(ring.len(), model.len());
            prop_assert_eq!(ring.seen(), pushed);
        }
    }
}

#[test]
fn last_counts_flows_that_pass_the_filters() {
    let ring = Ring::new(100);
    for n in 0..50 {
        let mut flow = numbered(n);
        flow.source.identity = (n % 5) as u32;
        ring.push(flow);
    }
    let mut builder = FilterBuilder::new(Timestamp(0));
    builder.flag("from-identity", "3").expect("a filter");
    let (flows, mut cursor) = ring.last(4, &builder.finish().expect("filters"));
    assert_eq!(
        flows.iter().map(|flow| number(flow)).collect::<Vec<_>>(),
        [33, 38, 43, 48]
    );
    ring.push(numbered(50));
    assert_eq!(drain(&mut cursor), (vec![50], 0));
}

#[test]
fn a_slow_reader_does_not_block_the_writer() {
    let ring = Ring::new(4);
    ring.push(numbered(0));
    let mut slow = ring.oldest();
    let Some(Next::Flow(held)) = slow.read() else {
        panic!("there is a flow")
    };
    // The reader keeps a flow and reads no further, while the writer overwrites the ring many times.
    for n in 1..=100 {
        ring.push(numbered(n));
    }
    assert_eq!(number(&held), 0);
    let lost = Lost {
        source: LostSource::HubbleRingBuffer,
        count: 96,
    };
    assert_eq!(slow.read(), Some(Next::Lost(lost)));
    assert_eq!(drain(&mut slow), (vec![97, 98, 99, 100], 0));
}

#[test]
fn a_report_of_lost_flows_reaches_every_reader_in_its_place_and_is_no_flow() {
    let ring = Ring::new(4);
    let mut readers = [ring.follow(), ring.follow()];
    let lost = Lost {
        source: LostSource::PerfEventRingBuffer,
        count: 7,
    };
    ring.push(numbered(0));
    let at = ring.push_lost(lost, Timestamp(1));
    ring.push(numbered(2));
    for reader in &mut readers {
        assert!(matches!(reader.read(), Some(Next::Flow(_))));
        assert_eq!(reader.read(), Some(Next::Lost(lost)));
        assert!(matches!(reader.read(), Some(Next::Flow(_))));
        assert_eq!(reader.read(), None);
    }
    assert_eq!(ring.item(at), Some(Item::Lost(lost, Timestamp(1))));
    assert!(ring.get(at).is_none());
    assert_eq!(ring.last(10, &Filters::default()).0.len(), 2);
    ring.settle(Timestamp::MAX);
    let raw = ring
        .since(Timestamp(1))
        .read_raw(|raw| matches!(raw, Raw::Lost(found) if found == lost));
    assert_eq!(raw, Some(true));
    let text = serde_json::to_string(&lost).unwrap();
    assert_eq!(text, r#"{"source":"PERF_EVENT_RING_BUFFER","count":7}"#);
}

#[test]
fn flows_gather_without_a_wake_up() {
    let ring = Ring::new(1_024);
    let cursor = ring.follow();
    assert!(!cursor.gather(Duration::from_millis(1)));
    ring.push(numbered(0));
    assert!(cursor.gather(Duration::from_millis(1)));
    for n in 1..=1_024 {
        ring.push(numbered(n));
    }
    // Most of the ring is unread, so that the reader does not sleep.
    assert!(cursor.gather(Duration::from_secs(1_000_000)));
}

#[test]
fn a_waiting_reader_is_woken() {
    let ring = Ring::new(4);
    let cursor = ring.follow();
    let begin = Instant::now();
    assert!(!cursor.wait(Duration::from_millis(20)));
    assert!(begin.elapsed() >= Duration::from_millis(20));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| cursor.wait(Duration::from_secs(30)));
        std::thread::sleep(Duration::from_millis(20));
        ring.push(numbered(0));
        assert!(waiter.join().expect("the waiter ends"));
    });
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn readers_see_every_flow_once_or_as_lost() {
    const COUNT: u64 = 50_000;
    let ring = Ring::new(64);
    let done = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                let (mut cursor, done) = (ring.follow(), Arc::clone(&done));
                scope.spawn(move || {
                    let (mut next, mut total) = (0, 0);
                    loop {
                        let over = done.load(Ordering::SeqCst);
                        while let Some(read) = cursor.read() {
                            match read {
                                Next::Lost(lost) => {
                                    next += lost.count;
                                    total += lost.count;
                                }
                                Next::Flow(flow) => {
                                    assert_eq!(number(&flow), next, "in order, none twice");
                                    next += 1;
                                    total += 1;
                                }
                            }
                        }
                        if over {
                            return total;
                        }
                        cursor.wait(Duration::from_millis(5));
                    }
                })
            })
            .collect();
        for n in 0..COUNT {
            ring.push(numbered(n));
        }
        done.store(true, Ordering::SeqCst);
        for reader in readers {
            assert_eq!(reader.join().expect("the reader ends"), COUNT);
        }
    });
}

/// Resolver with one name, which changes.
struct Renamed {
    name: Mutex<&'static str>,
    asked: AtomicUsize,
}

impl FlowResolver for Renamed {
    fn node(&self) -> Arc<str> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        (*self.name.lock().unwrap()).into()
    }

    fn labels(&self, _: u32) -> Option<Arc<[Arc<str>]>> {
        None
    }

    fn endpoint(&self, _: u16) -> Option<Owner> {
        None
    }

    fn address(&self, _: IpAddr) -> Option<Owner> {
        None
    }

    fn rule(&self, _: u32) -> Option<RuleInfo> {
        None
    }

    fn interface(&self, _: u32) -> Option<Arc<str>> {
        None
    }
}

#[test]
fn a_record_becomes_a_flow_once_with_the_names_of_its_time() {
    let names = Arc::new(Renamed {
        name: Mutex::new("before"),
        asked: AtomicUsize::new(0),
    });
    let resolver: Resolver = names.clone();
    let asked = || names.asked.load(Ordering::Relaxed);
    let ring = Ring::new(4);
    for time in 0..6 {
        ring.push_record(&record(), &resolver, Timestamp(time));
    }
    assert_eq!(asked(), 0, "nobody has looked");
    let look = |count| ring.last(count, &Filters::default()).0;
    assert!(
        Arc::ptr_eq(&look(1)[0], &look(1)[0]),
        "who looks twice sees the same"
    );
    assert_eq!(asked(), 1);
    ring.settle(Timestamp(4));
    assert_eq!(asked(), 3, "of those that are old enough");
    ring.settle(Timestamp::MAX);
    ring.settle(Timestamp::MAX);
    assert_eq!(asked(), 4, "of those that are still there, once each");
    assert_eq!(
        Arc::strong_count(&names),
        2,
        "the ring has let go of who knows the names"
    );
    *names.name.lock().unwrap() = "after";
    assert!(look(4).iter().all(|flow| &*flow.node_name == "before"));
    ring.push_record(&record(), &resolver, Timestamp(6));
    assert_eq!(&*look(1)[0].node_name, "after");
}

#[test]
fn identifiers_find_their_flows_while_these_are_in_the_ring() {
    let names: Resolver = Arc::new(World);
    let (ring, other) = (Ring::new(4), Ring::new(4));
    assert!(ring.get_by_uuid("00000000-0000-8000-8000-000000000000").is_none());
    let mut cursor = ring.oldest();
    for n in 0..4 {
        other.push(numbered(n));
        if n % 2 == 0 {
            ring.push(numbered(n));
        } else {
            ring.push_record(&record(), &names, Timestamp(n as i64));
        }
    }
    let mut uuids = Vec::new();
    while let Some(Next::Flow(flow)) = cursor.read() {
        let uuid = flow.uuid.to_string();
        let found = ring.get_by_uuid(&uuid.to_uppercase()).expect("the flow");
        assert_eq!((number(&found), &found.uuid), (number(&flow), &flow.uuid));
        assert!(
            other.get_by_uuid(&uuid).is_none(),
            "another ring has other identifiers"
        );
        uuids.push(uuid);
    }
    assert_eq!(uuids.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
    // A record has the same identifier before and after it is converted.
    ring.settle(Timestamp::MAX);
    for (n, uuid) in uuids.iter().enumerate() {
        assert_eq!(ring.get_by_uuid(uuid).map(|flow| number(&flow)), Some(n as u64));
    }
    let filter = |uuid: &str| {
        let mut builder = FilterBuilder::new(Timestamp(0));
        builder.flag("uuid", uuid).expect("a UUID");
        builder.finish().expect("filters")
    };
    let (found, _) = ring.last(9, &filter(&uuids[1]));
    assert_eq!(found.len(), 1);
    ring.push(numbered(9));
    assert!(ring.get_by_uuid(&uuids[0]).is_none(), "overwritten");
    assert!(ring.get_by_uuid("x").is_none());
}

#[test]
fn a_reader_continues_after_a_flow() {
    let ring = Ring::new(4);
    let mut uuids = Vec::new();
    for n in 0..3 {
        ring.push(numbered(n));
        let (last, _) = ring.last(1, &Filters::default());
        uuids.push(last[0].uuid.to_string());
    }
    let mut cursor = ring.after(&uuids[0]).expect("a cursor");
    assert_eq!(drain(&mut cursor), (vec![1, 2], 0));
    assert_eq!(drain(&mut ring.after(&uuids[2]).expect("a cursor")), (vec![], 0));
    for n in 3..9 {
        ring.push(numbered(n));
    }
    // Flows 1 to 4 are overwritten.
    assert_eq!(
        drain(&mut ring.after(&uuids[0]).expect("a cursor")),
        (vec![5, 6, 7, 8], 4)
    );
    assert!(Ring::new(4).after(&uuids[0]).is_none(), "of another ring");
    let future = palisade_flowlog::Uuid::parse(&uuids[2]).and_then(|uuid| uuid.number());
    assert_eq!(future, Some(2));
    assert!(ring.after("").is_none());
}

#[test]
fn the_first_flows_are_the_oldest() {
    let ring = Ring::new(8);
    for n in [2, 1, 4, 3, 6, 5] {
        ring.push(numbered(n));
    }
    let first = |count| -> Vec<u64> {
        let flows = ring.first(count, &Filters::default());
        flows.iter().map(|flow| number(flow)).collect()
    };
    assert_eq!(first(3), [1, 2, 3]);
    assert!(first(0).is_empty());
    assert_eq!(first(usize::MAX), [1, 2, 3, 4, 5, 6]);
}
