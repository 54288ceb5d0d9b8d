//! Kafka messages. Run: `cargo +nightly fuzz run kafka` in tests/.
#![no_main]

#[path = "../harness/kafka.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
