//! Capture files through reader and replay. Run: `cargo +nightly fuzz run replay` in tests/.
#![no_main]

#[path = "../harness/replay.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
