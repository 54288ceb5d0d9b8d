//! The parsers under criterion: `scripts/bench criterion`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use palisade_bench::parsers::works;

fn parsers(criterion: &mut Criterion) {
    for mut work in works() {
        let mut group = criterion.benchmark_group(work.what);
        group.throughput(Throughput::Bytes(work.bytes as u64));
        group.bench_function(BenchmarkId::from_parameter(work.who), |bencher| {
            bencher.iter(&mut work.run);
        });
        group.finish();
    }
}

criterion_group!(benches, parsers);
criterion_main!(benches);
