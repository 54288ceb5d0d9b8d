//! Both peers of an HTTP/2 connection, cut at any byte. Run: `cargo +nightly fuzz run http2` in tests/.
#![no_main]

#[path = "../harness/http2.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
