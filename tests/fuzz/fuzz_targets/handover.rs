//! States that a planned restart hands over. Run: `cargo +nightly fuzz run handover` in tests/.
#![no_main]

#[path = "../harness/handover.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
