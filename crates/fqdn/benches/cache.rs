//! Time to learn and commit an answer, with 10 and 10,000 selectors and up to 100,000 learned addresses; time of
//! sweeps, and of open questions.

use std::{hint::black_box, net::IpAddr, sync::Arc};

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use palisade_fqdn::{Cache, Config, Flow, SelectorId, Selectors, TrackLimits, Tracker};
use palisade_model::rule::FqdnPattern;
use palisade_protocols::dns::{Address, Answer, Question, Source, rtype};

fn answer(host: u32) -> Answer {
    let ip = IpAddr::from((0x0a00_0000 + host).to_be_bytes());
    Answer {
        question: Some(Question {
            name: format!("h{host}.zone-{}.test", host % 4096)
                .parse()
                .expect("a name"),
            rtype: rtype::A,
            class: 1,
        }),
        addresses: vec![Address {
            ip,
            ttl: 60,
            source: Source::Record,
        }],
        ttl: Some(60),
        ..Answer::default()
    }
}

/// Returns a cache with this number of selectors and learned addresses. Each name matches one selector.
fn filled(selectors: u32, addresses: u32) -> Cache {
    let patterns: Vec<_> = (0..selectors)
        .map(|i| {
            let text = if i == 0 {
                "**.test".to_owned()
            } else {
                format!("*.elsewhere-{i}.test")
            };
            (SelectorId(i), FqdnPattern::Pattern(text))
        })
        .collect();
    let compiled = Selectors::new(patterns.iter().map(|(id, p)| (*id, p))).expect("good patterns");
    let mut cache = Cache::new(Config {
        addresses_per_endpoint: 1_000_000,
        ..Config::default()
    });
    let update = cache.set_selectors(1, Arc::new(compiled));
    cache.written(update);
    for host in 0..addresses {
        release(&mut cache, &answer(host), 0);
    }
    cache
}

fn release(cache: &mut Cache, answer: &Answer, now: u64) -> u64 {
    let pending = cache.learn(1, answer, now);
    cache.commit(pending).map_or(0, |committed| committed.number())
}

fn learning(c: &mut Criterion) {
    let mut group = c.benchmark_group("fqdn/learn");
    for (selectors, addresses) in [(10, 1000), (10, 100_000), (10_000, 1000), (10_000, 100_000)] {
        let mut cache = filled(selectors, addresses);
        let case = format!("{selectors} selectors, {addresses} addresses");
        let mut host = addresses;
        group.bench_function(BenchmarkId::new("new", &case), |b| {
            b.iter_batched(
                || {
                    host += 1;
                    answer(host)
                },
                |answer| release(&mut cache, &answer, 0),
                BatchSize::SmallInput,
            );
        });
        let known = answer(7);
        group.bench_function(BenchmarkId::new("known", &case), |b| {
            b.iter(|| release(&mut cache, black_box(&known), 0));
        });
    }
    group.finish();
}

fn sweeping(c: &mut Criterion) {
    let mut group = c.benchmark_group("fqdn/sweep");
    group.sample_size(10);
    for addresses in [1000, 100_000] {
        let mut cache = filled(10, addresses);
        let memory = cache.memory();
        println!("{memory:?}: {} bytes an address", memory.bytes / memory.addresses);
        group.bench_function(BenchmarkId::from_parameter(addresses), |b| {
            b.iter(|| {
                let update = cache.sweep(1, 1);
                cache.written(update);
            });
        });
    }
    group.finish();
}

fn tracking(c: &mut Criterion) {
    let mut tracker = Tracker::new(TrackLimits::default());
    let flow = |port| Flow {
        endpoint: 1,
        tcp: false,
        client: ([10, 0, 0, 1], port).into(),
        resolver: ([10, 0, 0, 53], 53).into(),
    };
    let open = answer(1);
    let question = open.question.as_ref().expect("it has one");
    for port in 0..8000 {
        tracker
            .asked(flow(port), 1, question, (), 0)
            .expect("there is room");
    }
    let asked = Answer {
        id: 2,
        ..open.clone()
    };
    c.bench_function("fqdn/track, 8000 open", |b| {
        b.iter(|| {
            tracker
                .asked(flow(9), 2, black_box(question), (), 1)
                .and_then(|()| tracker.answered(flow(9), black_box(&asked), 2))
        });
    });
}

criterion_group!(benches, learning, sweeping, tracking);
criterion_main!(benches);
