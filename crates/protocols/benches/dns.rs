//! Time to parse the DNS messages of the fuzzing corpus, compared with hickory-proto, and time to match a name against
//! 10 to 10,000 patterns.

use std::{hint::black_box, path::Path};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hickory_proto::op::Message;
use palisade_model::rule::FqdnPattern;
use palisade_protocols::dns::{Answer, Limits, Name, NameSet, Query, Rcode, reply};

fn corpus(file: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fuzz/corpus/dns")
        .join(file);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn parsing(c: &mut Criterion) {
    let mut group = c.benchmark_group("dns/parse");
    group.throughput(Throughput::Elements(1));
    for file in ["query-a", "query-edns"] {
        let bytes = corpus(file);
        group.bench_function(BenchmarkId::new("palisade", file), |b| {
            b.iter(|| Query::parse(black_box(&bytes), &Limits::QUERY).map(|query| query.id));
        });
        group.bench_function(BenchmarkId::new("hickory", file), |b| {
            b.iter(|| Message::from_vec(black_box(&bytes)).map(|message| message.metadata.id));
        });
    }
    for file in ["answer-a", "answer-cname", "answer-https"] {
        let bytes = corpus(file);
        let mut answer = Answer::default();
        group.bench_function(BenchmarkId::new("palisade", file), |b| {
            b.iter(|| answer.read(black_box(&bytes), &Limits::ANSWER));
        });
        group.bench_function(BenchmarkId::new("hickory", file), |b| {
            b.iter(|| Message::from_vec(black_box(&bytes)).map(|message| message.metadata.id));
        });
    }
    let bytes = corpus("query-edns");
    let mut out = [0; 512];
    group.bench_function("refused", |b| {
        b.iter(|| reply(black_box(&bytes), Rcode::Refused, &mut out))
    });
    group.finish();
}

fn matching(c: &mut Criterion) {
    let mut group = c.benchmark_group("dns/match");
    group.throughput(Throughput::Elements(1));
    for count in [10, 1000, 10_000] {
        let patterns: Vec<FqdnPattern> = (0..count)
            .map(|i| match i % 4 {
                0 => FqdnPattern::Name(format!("host-{i}.example.com")),
                1 => FqdnPattern::Pattern(format!("*.zone-{i}.example.com")),
                2 => FqdnPattern::Pattern(format!("api-{i}-*.example.net")),
                _ => FqdnPattern::Pattern(format!("**.deep-{i}.example.org")),
            })
            .collect();
        let set = NameSet::new(&patterns).expect("the patterns are good");
        for (case, text) in [
            ("exact", "host-8.example.com"),
            ("suffix", "www.zone-5.example.com"),
            ("prefix", "api-6-x.example.net"),
            ("none", "a.b.c.elsewhere.example.org"),
        ] {
            let name: Name = text.parse().expect("a name");
            group.bench_function(BenchmarkId::new(case, count), |b| {
                b.iter(|| set.first(black_box(&name)))
            });
        }
    }
    group.finish();
}

criterion_group!(benches, parsing, matching);
criterion_main!(benches);
