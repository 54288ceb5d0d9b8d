//! A sender that contradicts itself, against receivers of two kinds. Run: `cargo +nightly fuzz run reassembly` in tests/.
#![no_main]

#[path = "../harness/reassembly.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
