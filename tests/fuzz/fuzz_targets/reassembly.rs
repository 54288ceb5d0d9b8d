//! A sender whose segments contradict each other, against two models of receivers. Run: `cargo +nightly fuzz run
//! reassembly` in tests/.
#![no_main]

#[path = "../harness/reassembly.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
