//! Heads, bodies and paths of HTTP/1, cut anywhere. Run: `cargo +nightly fuzz run http1` in tests/.
#![no_main]

#[path = "../harness/http1.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
