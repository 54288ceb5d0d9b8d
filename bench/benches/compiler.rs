//! The compiler under criterion: `scripts/bench criterion`.

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use palisade_bench::{
    compile::{full, read},
    policies::mixed,
};

fn compiler(criterion: &mut Criterion) {
    for (name, what) in [("read", false), ("compile", true)] {
        let mut group = criterion.benchmark_group(name);
        group.sample_size(10);
        for count in [10, 100, 1_000, 10_000] {
            let files = mixed(count);
            group.throughput(Throughput::Elements(count as u64));
            group.bench_with_input(BenchmarkId::from_parameter(count), &files, |bencher, files| {
                if what {
                    bencher.iter_batched(
                        || read(files).expect("the policies are right"),
                        full,
                        BatchSize::PerIteration,
                    );
                } else {
                    bencher.iter(|| read(files));
                }
            });
        }
        group.finish();
    }
}

criterion_group!(benches, compiler);
criterion_main!(benches);
