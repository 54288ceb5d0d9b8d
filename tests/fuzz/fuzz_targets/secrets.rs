//! Secrets in YAML, PEM texts, certificates and keys. Run: `cargo +nightly fuzz run secrets` in tests/.
#![no_main]

#[path = "../harness/secrets.rs"]
mod body;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| body::run(bytes));
