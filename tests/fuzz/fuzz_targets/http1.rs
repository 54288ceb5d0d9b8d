//! HTTP/1 heads, bodies and paths, cut at any byte. Run: `cargo +nightly fuzz run http1` in tests/.
#![no_main]

#[path = "../harness/http1.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
