//! Answers in the server's place.

use crate::failure::Failure;

/// Response 421 to a request for a host whose certificate was not checked (RFC 9110, section 15.5.20).
pub(crate) const MISDIRECTED: &[u8] = b"HTTP/1.1 421 Misdirected Request\r\ncontent-type: text/plain\r\n\
    content-length: 21\r\nconnection: close\r\n\r\nMisdirected request\r\n";

/// Returns a response with the reason why there is none of the server. `is_head`: whether the request is HEAD; a
/// response to HEAD has no body.
pub(crate) fn unavailable(failure: &Failure, is_head: bool) -> Vec<u8> {
    let body = body(failure);
    let (status, phrase) = failure.status();
    format!(
        "HTTP/1.1 {status} {phrase}\r\ncontent-type: text/plain; charset=utf-8\r\nx-palisade-error: {}\r\n\
         content-length: {}\r\nconnection: close\r\n\r\n{}",
        header(failure),
        body.len(),
        if is_head { "" } else { &body }
    )
    .into_bytes()
}

/// Returns the body of the answer to a failure.
pub(crate) fn body(failure: &Failure) -> String {
    format!("Palisade could not get a response from the server.\r\n{failure}\r\n")
}

/// Returns the value of the `x-palisade-error` field. Details can quote bytes of the server, so characters other than
/// visible ASCII and spaces are replaced.
pub(crate) fn header(failure: &Failure) -> String {
    failure
        .to_string()
        .chars()
        .map(|letter| if matches!(letter, ' '..='~') { letter } else { '?' })
        .take(512)
        .collect()
}
