//! The corpus of the fuzz target `inspect`, and mutations of it for a few seconds, on any toolchain.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

#[path = "../../../tests/fuzz/harness/inspect.rs"]
mod body;

/// Duration of the mutations.
const TIME: Duration = Duration::from_secs(5);

/// A pseudo-random generator (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as usize % limit.max(1)
    }
}

/// Splits a history into its records.
fn records(mut history: &[u8]) -> Vec<Vec<u8>> {
    let mut records = vec![];
    while let Some(&[_, length0, length1]) = history.first_chunk() {
        let length = usize::from(u16::from_be_bytes([length0, length1])) + 3;
        let (record, rest) = history.split_at(length.min(history.len()));
        records.push(record.to_vec());
        history = rest;
    }
    records
}

#[test]
fn the_corpus_and_mutations_of_it() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/inspect");
    let mut paths: Vec<_> = fs::read_dir(corpus)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let histories: Vec<_> = paths
        .iter()
        .map(|path| {
            let history = fs::read(path).unwrap();
            body::run(&history);
            records(&history)
        })
        .collect();
    assert!(histories.len() >= 10);
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1;
    let mut random = Random(seed);
    let started = Instant::now();
    let mut runs = 0_u64;
    while started.elapsed() < TIME {
        // Records of several histories, some of them changed.
        let mut history = vec![];
        for _ in 0..=random.below(12) {
            let from = &histories[random.below(histories.len())];
            let mut record = from[random.below(from.len())].clone();
            if random.below(2) == 0 {
                record[0] = random.below(256) as u8;
            }
            for _ in 0..random.below(4) {
                let at = 3 + random.below(record.len() - 3);
                if let Some(byte) = record.get_mut(at) {
                    match random.below(3) {
                        0 => *byte ^= 1 << random.below(8),
                        1 => *byte = random.below(256) as u8,
                        _ => *byte = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
                    }
                }
            }
            history.extend(record);
        }
        runs += 1;
        let result = std::panic::catch_unwind(|| body::run(&history));
        assert!(result.is_ok(), "seed {seed}, run {runs}: {history:02x?}");
    }
    println!("{runs} histories");
}
