//! The proxy's TLS and a peer whose records are cut and changed. Run: `cargo +nightly fuzz run tls_records` in tests/.
#![no_main]

#[path = "../harness/tls_records.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
