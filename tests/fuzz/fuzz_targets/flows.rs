//! Whole packets through the decoder and the inspectors of HTTP and TLS. Run: `cargo +nightly fuzz run flows` in tests/.
#![no_main]

#[path = "../harness/flows.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
