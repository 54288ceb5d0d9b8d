//! The corpus of the fuzz target `http2`, and mutations of it for a few seconds, on any toolchain.

use std::path::Path;

#[path = "../../../tests/fuzz/harness/http2.rs"]
mod http2;
#[path = "../../../tests/fuzz/harness/mutate.rs"]
mod mutate;

#[test]
fn no_mutated_http2_connection_shows_the_server_a_denied_request() {
    mutate::run(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/http2"),
        http2::run,
    );
}
