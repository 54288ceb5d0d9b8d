//! The corpus of the fuzz target `handover`, and mutations of it for a few seconds, on any toolchain.

use std::path::Path;

#[path = "../../../tests/fuzz/harness/handover.rs"]
mod body;
#[path = "../../../tests/fuzz/harness/mutate.rs"]
mod mutate;

#[test]
fn states_and_mutations_of_them() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/handover");
    mutate::run(&corpus, body::run);
}
