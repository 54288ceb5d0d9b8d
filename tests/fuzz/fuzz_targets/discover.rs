//! Answers of container engines and results of CNI. Run: `cargo +nightly fuzz run discover` in tests/.
#![no_main]

#[path = "../harness/discover.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
