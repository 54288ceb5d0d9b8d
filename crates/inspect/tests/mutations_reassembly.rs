//! The corpus of the fuzz target `reassembly`, and mutations of it for a few seconds, on any toolchain.

use std::path::Path;

#[path = "../../../tests/fuzz/harness/reassembly.rs"]
mod body;
#[path = "../../../tests/fuzz/harness/mutate.rs"]
mod mutate;

#[test]
fn senders_that_contradict_themselves() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/reassembly");
    mutate::run(&corpus, body::run);
}
