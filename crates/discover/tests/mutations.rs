//! The corpus of the fuzz target `discover`, and mutations of it for a few seconds, on any toolchain.

use std::path::Path;

#[path = "../../../tests/fuzz/harness/discover.rs"]
mod body;
#[path = "../../../tests/fuzz/harness/mutate.rs"]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
mod mutate;

#[test]
fn answers_of_sources_and_mutations_of_them() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/discover");
    mutate::run(&corpus, body::run);
}
