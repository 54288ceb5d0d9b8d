//! The corpora of the fuzz targets `http1`, `kafka` and `tls`, and mutations of them for a few seconds, on any toolchain.

use std::path::Path;

#[path = "../../../tests/fuzz/harness/http1.rs"]
mod http1;
#[path = "../../../tests/fuzz/harness/kafka.rs"]
mod kafka;
#[path = "../../../tests/fuzz/harness/mutate.rs"]
mod mutate;
#[path = "../../../tests/fuzz/harness/tls.rs"]
mod tls;

fn corpus(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fuzz/corpus")
        .join(name)
}

#[test]
fn mutated_http1_streams_never_panic_and_parse_equally_when_cut() {
    mutate::run(&corpus("http1"), http1::run);
}

#[test]
fn mutated_kafka_messages_never_panic_and_are_denied_in_their_own_form() {
    mutate::run(&corpus("kafka"), kafka::run);
}

#[test]
fn mutated_tls_streams_never_panic_and_parse_equally_when_cut() {
    mutate::run(&corpus("tls"), tls::run);
}
