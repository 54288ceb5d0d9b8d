//! Cost of matching an HTTP request against few and many rules, with criterion: `cargo bench -p palisade-bench --bench
//! rules`.

use std::{collections::BTreeMap, hint::black_box, sync::Arc};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use palisade_inspect::{HttpScratch, Paths, Rules};
use palisade_model::{
    rule::HttpRule,
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_protocols::http1::{HeaderBuffer, Request};

/// Number of different requests, so that branch predictors and caches do not learn one of them.
const REQUESTS: usize = 1000;

fn prepare(paths: impl Iterator<Item = String>) -> Rules {
    let alternatives = paths
        .map(|path| Alternative {
            rule: 1,
            matcher: Matcher::Http(HttpRule {
                method: Some("GET|HEAD".into()),
                path: Some(path),
                ..HttpRule::default()
            }),
        })
        .collect();
    let set = RuleSet {
        alternatives,
        ..RuleSet::default()
    };
    let rules = Rules::prepare(&BTreeMap::from([(1, Arc::new(set))]), None);
    assert!(rules.problems().is_empty(), "{:?}", rules.problems());
    rules
}

/// Of each kind: the pattern of a rule, and a path that matches it.
type Kind = (&'static str, fn(usize) -> String, fn(usize) -> String);
const KINDS: [Kind; 3] = [
    (
        "literal",
        |n| format!("/api/v1/service-{n}/health"),
        |n| format!("/api/v1/service-{n}/health"),
    ),
    (
        "prefix",
        |n| format!("/api/v1/service-{n}/.*"),
        |n| format!("/api/v1/service-{n}/item/4711?page=2"),
    ),
    (
        "expression",
        |n| format!("/api/v[0-9]+/[a-z]+/service-{n}(/[^/]+)*"),
        |n| format!("/api/v12/team/service-{n}/item/4711"),
    ),
];

fn evaluating(criterion: &mut Criterion) {
    for (name, pattern, path) in KINDS {
        let mut group = criterion.benchmark_group(format!("http rules, {name}"));
        for count in [10, 1_000] {
            let rules = prepare((0..count).map(pattern));
            let rules = rules.http(1).expect("the rules");
            let heads: Vec<String> = (0..REQUESTS)
                .map(|n| format!("GET {} HTTP/1.1\r\nHost: a.test\r\n\r\n", path(n * 7 % count)))
                .collect();
            let mut rooms: Vec<_> = heads.iter().map(|_| HeaderBuffer::new()).collect();
            let requests: Vec<_> = heads
                .iter()
                .zip(&mut rooms)
                .map(|(head, room)| Request::parse(head.as_bytes(), room).expect("a request"))
                .collect();
            let mut scratch = HttpScratch::default();
            for request in &requests {
                assert!(rules.evaluate(request, Paths::Both, &mut scratch).is_ok());
            }
            let mut turn = requests.iter().cycle();
            group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
                bencher.iter(|| {
                    let request = turn.next().expect("it has no end");
                    rules.evaluate(black_box(request), Paths::Both, &mut scratch)
                });
            });
        }
        group.finish();
    }
}

fn preparing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("preparing http rules");
    group.sample_size(10);
    for (name, pattern, _) in KINDS {
        group.bench_function(name, |bencher| {
            bencher.iter(|| prepare((0..1_000).map(pattern)));
        });
    }
    group.finish();
}

criterion_group!(benches, evaluating, preparing);
criterion_main!(benches);
