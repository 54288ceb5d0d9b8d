//! The corpus of the fuzz target `replay`, and mutations of it.

#[path = "../../../tests/fuzz/harness/replay.rs"]
mod body;
#[path = "../../../tests/fuzz/harness/mutate.rs"]
mod mutate;

use std::path::Path;

#[test]
fn mutated_captures_are_replayed_without_a_panic() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/replay");
    mutate::run(&corpus, body::run);
}
