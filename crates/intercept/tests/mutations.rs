//! The corpus of the fuzz target `tls_records` and mutations of it, on any toolchain.

use std::path::Path;

#[path = "../../../tests/fuzz/harness/tls_records.rs"]
mod harness;
#[path = "../../../tests/fuzz/harness/mutate.rs"]
mod mutate;

#[test]
fn records_of_any_kind_are_taken_only_as_the_peer_has_sent_them() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/tls_records");
    mutate::run(&corpus, harness::run);
}
