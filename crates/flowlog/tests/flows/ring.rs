//! The ring against a plain list, and under several threads.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::world::{event, flow};
use palisade_flowlog::{Cursor, FilterBuilder, Filters, Flow, Next, Ring, Timestamp};
use proptest::prelude::*;

/// A flow that is known by its time.
fn numbered(number: u64) -> Flow {
    let mut flow = flow(&event());
    flow.time = Timestamp(number as i64);
    flow
}

fn number(flow: &Flow) -> u64 {
    flow.time.0 as u64
}

fn drain(cursor: &mut Cursor) -> (Vec<u64>, u64) {
    let (mut flows, mut lost) = (Vec::new(), 0);
    while let Some(next) = cursor.read() {
        match next {
            Next::Flow(flow) => flows.push(number(&flow)),
            Next::Lost(count) => lost += count,
        }
    }
    (flows, lost)
}

#[derive(Clone, Debug)]
enum Step {
    Push(u8),
    Read,
    Last(u8),
    Since(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..20_u8).prop_map(Step::Push),
        Just(Step::Read),
        (0..20_u8).prop_map(Step::Last),
        any::<u8>().prop_map(Step::Since),
    ]
}

proptest! {
    #[test]
    fn behaves_as_a_list_that_forgets(capacity in 1..12_usize, steps in prop::collection::vec(step(), 0..40)) {
        let ring = Ring::new(capacity);
        let mut model = VecDeque::new();
        let mut pushed = 0;
        let mut follower = ring.follow();
        let mut expected_at = 0;
        for step in steps {
            match step {
                Step::Push(count) => for _ in 0..count {
                    prop_assert_eq!(ring.push(numbered(pushed)), pushed);
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
fn last_counts_what_passes_the_filters() {
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
fn the_writer_does_not_wait_for_a_reader() {
    let ring = Ring::new(4);
    ring.push(numbered(0));
    let mut slow = ring.oldest();
    let Some(Next::Flow(held)) = slow.read() else {
        panic!("there is a flow")
    };
    // The reader keeps what it has read, and reads no further, while the writer goes round many times.
    for n in 1..=100 {
        ring.push(numbered(n));
    }
    assert_eq!(number(&held), 0);
    assert_eq!(slow.read(), Some(Next::Lost(96)));
    assert_eq!(drain(&mut slow), (vec![97, 98, 99, 100], 0));
}

#[test]
fn a_sleeper_is_woken() {
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
                                Next::Lost(count) => {
                                    next += count;
                                    total += count;
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
