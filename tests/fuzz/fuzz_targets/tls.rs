//! Both sides of a TLS handshake, cut at any byte. Run: `cargo +nightly fuzz run tls` in tests/.
#![no_main]

#[path = "../harness/tls.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
