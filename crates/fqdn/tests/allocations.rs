//! Parsing a question, matching it against patterns, tracking it and parsing its answer allocate nothing once the
//! tables have grown.
#![allow(unsafe_code, reason = "a counting allocator")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use palisade_fqdn::{Cache, Config, Flow, SelectorId, Selectors, TrackLimits, Tracker};
use palisade_model::rule::FqdnPattern;
use palisade_protocols::dns::{
    Address, Answer, Limits, NameSet, Query, Question, Rcode, Source, first_message, reply,
};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
    static BYTES: Cell<isize> = const { Cell::new(0) };
}

// SAFETY: all calls are passed on to the system allocator unchanged. Counting accesses a thread-local without a
// destructor, which does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        BYTES.set(BYTES.get() + layout.size() as isize);
        // SAFETY: the caller upholds the contract of this method, which is that of the system allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        BYTES.set(BYTES.get() - layout.size() as isize);
        // SAFETY: the block was allocated by `alloc` above, that is, by the system allocator.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocations(f: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    f();
    ALLOCATIONS.get() - before
}

const QUERY: &[u8] =
    b"\x00\x07\x01\x20\x00\x01\x00\x00\x00\x00\x00\x01\x03wWw\x04shop\x04test\x00\x00\x01\x00\x01\
    \x00\x00\x29\x10\x00\x00\x00\x80\x00\x00\x00";
const ANSWER: &[u8] =
    b"\x00\x07\x81\x80\x00\x01\x00\x03\x00\x00\x00\x00\x03www\x04shop\x04test\x00\x00\x01\x00\x01\
    \xc0\x0c\x00\x05\x00\x01\x00\x00\x00\x3c\x00\x06\x03cdn\xc0\x15\
    \xc0\x2b\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\xc0\x00\x02\x01\
    \xc0\x2b\x00\x01\x00\x01\x00\x00\x00\x3c\x00\x04\xc0\x00\x02\x02";

#[test]
fn tracking_in_the_steady_state_allocates_nothing() {
    let patterns = [
        "a.test",
        "*.shop.test",
        "**.other.test",
        "w*.x.test",
        "*-b.shop.test",
        "*o*.test",
    ]
    .map(|text| {
        let text = text.to_owned();
        if text.contains('*') {
            FqdnPattern::Pattern(text)
        } else {
            FqdnPattern::Name(text)
        }
    });
    let rules = NameSet::new(&patterns).unwrap();
    let mut tracker = Tracker::new(TrackLimits::default());
    let mut answer = Answer::default();
    let framed = [&(QUERY.len() as u16).to_be_bytes(), QUERY].concat();
    let flow = Flow {
        endpoint: 1,
        tcp: false,
        client: ([10, 0, 0, 1], 4000).into(),
        resolver: ([10, 0, 0, 53], 53).into(),
    };
    let mut round = |now| {
        let query = Query::parse(QUERY, &Limits::QUERY).unwrap();
        assert_eq!(rules.first(&query.question.name), Some(1));
        tracker.asked(flow, query.id, &query.question, (), now).unwrap();
        answer.read(ANSWER, &Limits::ANSWER).unwrap();
        assert_eq!(answer.addresses.len(), 2);
        tracker.answered(flow, &answer, now).unwrap();
        let mut out = [0; 512];
        reply(QUERY, Rcode::Refused, &mut out).unwrap();
        assert!(first_message(&framed, 4096).unwrap().is_some());
        assert!(Query::parse(&QUERY[..20], &Limits::QUERY).is_err());
    };
    assert!(allocations(|| round(0)) > 0, "the count must count");
    assert_eq!(allocations(|| (1..1000).for_each(round)), 0);
}

#[test]
fn the_reported_memory_matches_the_allocations() {
    let pattern = FqdnPattern::Pattern("*.hosts.test".to_owned());
    let selectors = Selectors::new([(SelectorId(1), &pattern)]).unwrap();
    let mut cache = Cache::new(Config::default());
    let update = cache.set_selectors(1, std::sync::Arc::new(selectors));
    cache.written(update);
    let before = BYTES.get();
    for host in 0..20_000_u32 {
        let ip = std::net::IpAddr::from((0x0a00_0000 + host).to_be_bytes());
        let name = format!("h{host}.hosts.test").parse().unwrap();
        let answer = Answer {
            question: Some(Question {
                name,
                rtype: 1,
                class: 1,
            }),
            addresses: vec![Address {
                ip,
                ttl: 60,
                source: Source::Record,
            }],
            ttl: Some(60),
            ..Answer::default()
        };
        let pending = cache.learn(1, &answer, 0);
        assert!(cache.commit(pending).is_ok());
    }
    let asked_for = (BYTES.get() - before) as usize;
    let memory = cache.memory();
    // The report includes the overhead of the allocator for each block.
    let range = asked_for..asked_for * 5 / 4;
    assert!(range.contains(&memory.bytes), "{memory:?}, asked for {asked_for}");
}
