//! Runs the corpus of a fuzz target and mutations of it for a few seconds, on any toolchain.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

/// Seconds to run, unless PALISADE_FUZZ_SECONDS is set.
const SECONDS: u64 = 4;
/// Longest input, bytes.
const LONGEST: usize = 8_192;

/// Bytes with a meaning in the parsed protocols.
const ODD: &[u8] = b"\0\x01\x7f\x80\xff\r\n :;,/.%0A";

/// xorshift64*: statistical quality does not matter here.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as usize % limit.max(1)
    }

    /// Mutates an input: changes bytes, and removes, repeats or replaces ranges by those of another input.
    fn change(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.below(6) {
            let at = self.below(input.len());
            let end = (at + 1 + self.below(24)).min(input.len());
            match self.below(8) {
                0 | 1 => input[at] ^= 1 << self.below(8),
                2 => input[at] = self.below(256) as u8,
                3 => input[at] = ODD[self.below(ODD.len())],
                4 => drop(input.drain(at..end)),
                5 => {
                    let twice = input[at..end].to_vec();
                    input.splice(at..at, twice);
                }
                6 => {
                    let from = self.below(other.len());
                    let to = (from + 1 + self.below(64)).min(other.len());
                    input.splice(at..at, other[from..to].iter().copied());
                }
                _ => input.splice(at..at, [self.below(256) as u8]).for_each(drop),
            }
            if input.is_empty() {
                input.push(0);
            }
        }
        input.truncate(LONGEST);
    }
}

/// Runs `body` with every input of the corpus, then with mutations.
pub fn run(corpus: &Path, body: fn(&[u8])) {
    let mut paths: Vec<_> = fs::read_dir(corpus)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    let inputs: Vec<Vec<u8>> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(inputs.len() >= 5 && inputs.iter().all(|input| !input.is_empty()));
    for input in &inputs {
        body(input);
    }
    let seconds = std::env::var("PALISADE_FUZZ_SECONDS").ok();
    let time = Duration::from_secs(seconds.and_then(|text| text.parse().ok()).unwrap_or(SECONDS));
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1;
    let mut random = Random(seed);
    let started = Instant::now();
    let mut runs = 0_u64;
    while started.elapsed() < time {
        let mut input = inputs[random.below(inputs.len())].clone();
        let other = &inputs[random.below(inputs.len())];
        random.change(&mut input, other);
        runs += 1;
        let result = std::panic::catch_unwind(|| body(&input));
        assert!(result.is_ok(), "seed {seed}, run {runs}: {input:02x?}");
    }
    println!("{runs} inputs");
}
