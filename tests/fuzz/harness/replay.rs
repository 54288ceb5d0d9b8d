//! Capture files through the reader, the model of the packet path and the inspectors.
//!
//! The input is a capture file. For every input nothing panics, an error names an offset within the input, and every
//! packet before the error is counted.

#[path = "../../../crates/replay/tests/common/mod.rs"]
mod common;

use palisade_replay::Reader;

/// Rules for every inspector, for names and for plain ports.
const POLICIES: &[(&str, &str, &str)] = &[
    (
        "a",
        "a",
        "  egress:\n  - toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{method: GET, path: '/public/.*'}]}}]\n  \
         - toPorts: [{ports: [{port: '53', protocol: ANY}], rules: {dns: [{matchPattern: '*'}]}}]\n  - toPorts: [{ports: \
         [{port: '443', protocol: TCP}], serverNames: ['*.test']}]\n  - toFQDNs: [{matchPattern: '*.test'}]",
    ),
    (
        "b",
        "b",
        "  ingress: [{fromEndpoints: [{matchLabels: {app: a}}]}]\n  ingressDeny: [{toPorts: [{ports: [{port: '22', protocol: \
         TCP}]}]}]",
    ),
];

/// Replays one capture file.
pub fn run(bytes: &[u8]) {
    let mut replay = common::replay_with(POLICIES, |settings| {
        settings.max_flows = 64;
        settings.max_fragments = 16;
    });
    let mut reader = Reader::new(bytes);
    let mut packets = 0;
    loop {
        match reader.packet() {
            Ok(Some(packet)) => replay.packet(&packet, None),
            Ok(None) => break,
            Err(error) => {
                assert!(error.offset() <= bytes.len() as u64, "{error}");
                assert!(matches!(reader.packet(), Ok(None)));
                break;
            }
        }
        packets += 1;
        replay.reports().for_each(drop);
    }
    let summary = replay.summary();
    assert_eq!(summary.packets, packets);
    assert!(summary.open <= 64, "{}", summary.open);
}
