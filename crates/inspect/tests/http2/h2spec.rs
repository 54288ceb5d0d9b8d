//! The cases of the conformance test h2spec, by its section and number, and where an intermediary's part of each is
//! shown.

/// Where a case is shown.
enum By {
    /// A row of the tables in `conformance.rs`, or a function of the named file.
    Shown(&'static str),
    /// The case does not concern an intermediary that leaves the matter to both peers: why.
    Peers(&'static str),
}

use By::{Peers, Shown};

const FILES: [(&str, &str); 6] = [
    ("attacks", include_str!("attacks.rs")),
    ("conformance", include_str!("conformance.rs")),
    ("peers", include_str!("peers.rs")),
    ("requests", include_str!("requests.rs")),
    ("settings", include_str!("settings.rs")),
    ("splits", include_str!("splits.rs")),
];

const ACKNOWLEDGES: &str =
    "the receiver of the frame acknowledges it; the frame and the acknowledgement pass";
const WINDOWS: &str = "windows are those of the peers: the sender of DATA waits for them and checks them";

const CASES: &[(&str, By)] = &[
    (
        "generic/1/1",
        Shown("peers::allowed_and_denied_requests_of_real_peers_share_a_connection"),
    ),
    ("generic/2/1", Shown("5.1 idle: PRIORITY")),
    ("generic/2/2", Shown("5.1 half-closed: WINDOW_UPDATE")),
    ("generic/2/3", Shown("5.1 half-closed: PRIORITY")),
    ("generic/2/4", Shown("5.1 half-closed: RST_STREAM")),
    (
        "generic/2/5",
        Shown("conformance::a_stream_that_both_peers_have_ended_is_closed"),
    ),
    ("generic/3.1/1", Shown("4.2 DATA of the maximum size")),
    ("generic/3.1/2", Shown("6.1 several DATA")),
    ("generic/3.1/3", Shown("6.1 DATA with padding")),
    (
        "generic/3.2/1",
        Shown("requests::an_allowed_request_and_its_response_pass"),
    ),
    (
        "generic/3.2/2",
        Shown("requests::padding_and_priority_of_a_request_are_read"),
    ),
    (
        "generic/3.2/3",
        Shown("requests::padding_and_priority_of_a_request_are_read"),
    ),
    ("generic/3.3/1", Shown("6.3 PRIORITY with weight 1")),
    ("generic/3.3/2", Shown("6.3 PRIORITY with weight 256")),
    ("generic/3.3/3", Shown("5.1 idle: PRIORITY")),
    ("generic/3.3/4", Shown("6.3 exclusive PRIORITY")),
    ("generic/3.3/5", Shown("5.1.1 PRIORITY of a higher stream")),
    ("generic/3.4/1", Shown("attacks::rapid_reset_ends_the_connection")),
    (
        "generic/3.5/1",
        Shown("settings::settings_are_rewritten_to_what_the_filter_can_follow"),
    ),
    (
        "generic/3.7/1",
        Shown("conformance::pings_and_goaway_pass_in_both_directions"),
    ),
    (
        "generic/3.8/1",
        Shown("conformance::pings_and_goaway_pass_in_both_directions"),
    ),
    (
        "generic/3.9/1",
        Shown("attacks::a_transfer_may_update_windows_after_each_frame"),
    ),
    (
        "generic/3.9/2",
        Shown("attacks::a_transfer_may_update_windows_after_each_frame"),
    ),
    (
        "generic/3.10/1",
        Shown("requests::a_verdict_waits_for_the_end_of_the_header_block"),
    ),
    (
        "generic/3.10/2",
        Shown("requests::a_verdict_waits_for_the_end_of_the_header_block"),
    ),
    (
        "generic/4/1",
        Shown("requests::an_allowed_request_and_its_response_pass"),
    ),
    (
        "generic/4/2",
        Shown("peers::allowed_and_denied_requests_of_real_peers_share_a_connection"),
    ),
    (
        "generic/4/3",
        Shown("requests::content_must_have_the_announced_length"),
    ),
    (
        "generic/4/4",
        Shown("requests::trailers_and_interim_responses_pass"),
    ),
    (
        "generic/5/1",
        Shown("settings::the_server_gets_the_size_update_that_its_setting_requires"),
    ),
    (
        "generic/5/2",
        Shown("RFC 7541 6.2.1 literal with incremental indexing, used again"),
    ),
    ("generic/5/3", Shown("RFC 7541 5.2 Huffman")),
    (
        "generic/5/4",
        Shown("RFC 7541 6.2.1 literal with incremental indexing, used again"),
    ),
    ("generic/5/5", Shown("RFC 7541 5.2 Huffman")),
    ("generic/5/6", Shown("RFC 7541 6.2.2 literal without indexing")),
    ("generic/5/7", Shown("RFC 7541 5.2 Huffman")),
    ("generic/5/8", Shown("RFC 7541 6.2.2 literal without indexing")),
    ("generic/5/9", Shown("RFC 7541 5.2 Huffman")),
    ("generic/5/10", Shown("requests::sensitive_fields_stay_sensitive")),
    ("generic/5/11", Shown("requests::sensitive_fields_stay_sensitive")),
    ("generic/5/12", Shown("requests::sensitive_fields_stay_sensitive")),
    ("generic/5/13", Shown("requests::sensitive_fields_stay_sensitive")),
    (
        "generic/5/14",
        Shown("settings::a_table_that_one_frame_shrinks_and_grows_again_is_emptied"),
    ),
    (
        "generic/5/15",
        Shown("settings::a_table_that_one_frame_shrinks_and_grows_again_is_emptied"),
    ),
    (
        "http2/3.5/1",
        Shown("conformance::the_first_frame_of_each_peer_is_settings"),
    ),
    (
        "http2/3.5/2",
        Shown("attacks::bytes_that_are_not_http2_end_the_connection"),
    ),
    ("http2/4.1/1", Shown("4.1 unknown frame type")),
    ("http2/4.1/2", Shown("4.1 undefined flags")),
    ("http2/4.1/3", Shown("4.1 reserved bit")),
    ("http2/4.2/1", Shown("4.2 DATA of the maximum size")),
    ("http2/4.2/2", Shown("4.2 DATA beyond the maximum size")),
    ("http2/4.2/3", Shown("4.2 HEADERS beyond the maximum size")),
    ("http2/4.3/1", Shown("4.3 invalid header block")),
    ("http2/4.3/2", Shown("4.3 PRIORITY within a block")),
    (
        "http2/4.3/3",
        Shown("4.3 HEADERS of another stream within a block"),
    ),
    ("http2/5.1/1", Shown("5.1 idle: DATA")),
    ("http2/5.1/2", Shown("5.1 idle: RST_STREAM")),
    ("http2/5.1/3", Shown("5.1 idle: WINDOW_UPDATE")),
    ("http2/5.1/4", Shown("5.1 idle: CONTINUATION")),
    ("http2/5.1/5", Shown("5.1 half-closed: DATA")),
    ("http2/5.1/6", Shown("5.1 half-closed: HEADERS")),
    ("http2/5.1/7", Shown("5.1 half-closed: CONTINUATION")),
    ("http2/5.1/8", Shown("5.1 closed by reset: DATA")),
    ("http2/5.1/9", Shown("5.1 closed by reset: HEADERS")),
    ("http2/5.1/10", Shown("5.1 closed by reset: CONTINUATION")),
    // A reset of the stream, as for a half-closed one: the peer may have sent the frame before it saw the response. h2spec
    // expects a connection error, as RFC 7540 did.
    (
        "http2/5.1/11",
        Shown("conformance::a_stream_that_both_peers_have_ended_is_closed"),
    ),
    (
        "http2/5.1/12",
        Shown("conformance::a_stream_that_both_peers_have_ended_is_closed"),
    ),
    (
        "http2/5.1/13",
        Shown("conformance::a_stream_that_both_peers_have_ended_is_closed"),
    ),
    ("http2/5.1.1/1", Shown("5.1.1 even stream")),
    ("http2/5.1.1/2", Shown("5.1.1 lower stream")),
    (
        "http2/5.1.2/1",
        Shown("requests::streams_beyond_the_limit_are_refused_and_can_be_retried"),
    ),
    ("http2/5.3.1/1", Shown("5.3.1 HEADERS depend on themselves")),
    ("http2/5.3.1/2", Shown("5.3.1 PRIORITY depends on itself")),
    ("http2/5.4.1/1", Shown("6.7 PING of 6 bytes")),
    ("http2/5.4.1/2", Shown("6.7 PING of 6 bytes")),
    ("http2/5.5/1", Shown("conformance::unknown_frames_are_dropped")),
    ("http2/5.5/2", Shown("4.3 unknown frame within a block")),
    ("http2/6.1/1", Shown("6.1 DATA on stream 0")),
    ("http2/6.1/2", Shown("5.1 half-closed: DATA")),
    ("http2/6.1/3", Shown("6.1 padding of DATA")),
    ("http2/6.2/1", Shown("4.3 PRIORITY within a block")),
    (
        "http2/6.2/2",
        Shown("4.3 HEADERS of another stream within a block"),
    ),
    ("http2/6.2/3", Shown("6.2 HEADERS on stream 0")),
    ("http2/6.2/4", Shown("6.2 padding of HEADERS")),
    ("http2/6.3/1", Shown("6.3 PRIORITY on stream 0")),
    ("http2/6.3/2", Shown("6.3 PRIORITY of 4 bytes")),
    ("http2/6.4/1", Shown("6.4 RST_STREAM on stream 0")),
    ("http2/6.4/2", Shown("5.1 idle: RST_STREAM")),
    ("http2/6.4/3", Shown("6.4 RST_STREAM of 3 bytes")),
    ("http2/6.5/1", Shown("6.5 acknowledgement with a payload")),
    ("http2/6.5/2", Shown("6.5 SETTINGS on a stream")),
    ("http2/6.5/3", Shown("6.5 SETTINGS of 5 bytes")),
    (
        "http2/6.5.2/1",
        Shown("settings::invalid_settings_end_the_connection"),
    ),
    (
        "http2/6.5.2/2",
        Shown("settings::invalid_settings_end_the_connection"),
    ),
    (
        "http2/6.5.2/3",
        Shown("settings::invalid_settings_end_the_connection"),
    ),
    (
        "http2/6.5.2/4",
        Shown("settings::invalid_settings_end_the_connection"),
    ),
    ("http2/6.5.2/5", Shown("6.5 unknown setting")),
    ("http2/6.5.3/1", Peers(WINDOWS)),
    ("http2/6.5.3/2", Peers(ACKNOWLEDGES)),
    ("http2/6.7/1", Peers(ACKNOWLEDGES)),
    ("http2/6.7/2", Peers(ACKNOWLEDGES)),
    ("http2/6.7/3", Shown("6.7 PING on a stream")),
    ("http2/6.7/4", Shown("6.7 PING of 6 bytes")),
    ("http2/6.8/1", Shown("6.8 GOAWAY on a stream")),
    ("http2/6.9/1", Shown("6.9 increment 0 of the connection")),
    ("http2/6.9/2", Shown("6.9 increment 0 of a stream")),
    ("http2/6.9/3", Shown("6.9 WINDOW_UPDATE of 3 bytes")),
    (
        "http2/6.9.1/1",
        Shown("requests::a_response_does_not_exceed_a_small_window_of_the_client"),
    ),
    (
        "http2/6.9.1/2",
        Shown("6.9.1 window of the connection beyond its maximum: the server refuses the update"),
    ),
    ("http2/6.9.1/3", Peers(WINDOWS)),
    ("http2/6.9.2/1", Peers(WINDOWS)),
    ("http2/6.9.2/2", Peers(WINDOWS)),
    (
        "http2/6.9.2/3",
        Shown("settings::invalid_settings_end_the_connection"),
    ),
    (
        "http2/6.10/1",
        Shown("requests::a_verdict_waits_for_the_end_of_the_header_block"),
    ),
    ("http2/6.10/2", Shown("6.10 DATA before CONTINUATION")),
    ("http2/6.10/3", Shown("6.10 CONTINUATION on stream 0")),
    ("http2/6.10/4", Shown("6.10 CONTINUATION after END_HEADERS")),
    (
        "http2/6.10/5",
        Shown("6.10 CONTINUATION after a CONTINUATION with END_HEADERS"),
    ),
    ("http2/6.10/6", Shown("6.10 CONTINUATION after DATA")),
    ("http2/7/1", Shown("7 GOAWAY with an unknown code")),
    ("http2/7/2", Shown("7 RST_STREAM with an unknown code")),
    ("http2/8.1/1", Shown("8.1 second HEADERS without END_STREAM")),
    ("http2/8.1.2/1", Shown("8.2.1 upper-case name")),
    ("http2/8.1.2.1/1", Shown("8.3 unknown pseudo-header field")),
    ("http2/8.1.2.1/2", Shown("8.3 pseudo-header field of responses")),
    ("http2/8.1.2.1/3", Shown("8.3 pseudo-header field in trailers")),
    ("http2/8.1.2.1/4", Shown("8.3 pseudo-header field after a field")),
    ("http2/8.1.2.2/1", Shown("8.2.2 Connection")),
    ("http2/8.1.2.2/2", Shown("8.2.2 TE")),
    ("http2/8.1.2.3/1", Shown("8.3.1 empty path")),
    ("http2/8.1.2.3/2", Shown("8.3.1 no method")),
    ("http2/8.1.2.3/3", Shown("8.3.1 no scheme")),
    ("http2/8.1.2.3/4", Shown("8.3.1 no path")),
    ("http2/8.1.2.3/5", Shown("8.3.1 two methods")),
    ("http2/8.1.2.3/6", Shown("8.3.1 two schemes")),
    ("http2/8.1.2.3/7", Shown("8.3.1 two paths")),
    ("http2/8.1.2.6/1", Shown("8.1.1 length differs")),
    ("http2/8.1.2.6/2", Shown("8.1.1 length of several DATA differs")),
    ("http2/8.2/1", Shown("6.6 PUSH_PROMISE")),
    ("hpack/2.3.3/1", Shown("RFC 7541 2.3.3 index beyond the tables")),
    (
        "hpack/2.3.3/2",
        Shown("RFC 7541 2.3.3 index of a name beyond the tables"),
    ),
    ("hpack/4.2/1", Shown("RFC 7541 4.2 size update at the end")),
    ("hpack/5.2/1", Shown("RFC 7541 5.2 padding of more than 7 bits")),
    ("hpack/5.2/2", Shown("RFC 7541 5.2 padding of zeros")),
    ("hpack/5.2/3", Shown("RFC 7541 5.2 end of string")),
    ("hpack/6.1/1", Shown("RFC 7541 6.1 index 0")),
    (
        "hpack/6.3/1",
        Shown("RFC 7541 6.3 size update beyond the setting"),
    ),
];

#[test]
fn each_case_that_concerns_an_intermediary_is_shown_by_a_row_or_a_test() {
    let conformance = FILES[1].1;
    for (case, by) in CASES {
        let (what, is_there) = match by {
            Peers(why) => (*why, !why.is_empty()),
            Shown(by) => match by.split_once("::") {
                Some((file, function)) => {
                    let (_, text) = FILES.iter().find(|(name, _)| name == &file).expect("a file");
                    (*by, text.contains(&format!("#[test]\nfn {function}()")))
                }
                None => (*by, conformance.contains(&format!("\"{by}\""))),
            },
        };
        assert!(is_there, "{case}: {what}");
    }
}
