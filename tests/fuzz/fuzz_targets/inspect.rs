//! Whole packets through the decoder and the DNS inspector. Run: `cargo +nightly fuzz run inspect` in tests/.
#![no_main]

#[path = "../harness/inspect.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
