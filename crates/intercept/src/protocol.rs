//! The protocol inside a connection.

use palisade_inspect::stream::{HttpSession, StreamContext};

/// What is inspected.
pub(crate) enum Protocol {
    /// Bytes are forwarded without inspection.
    Bytes,
    /// HTTP; the first bytes of the client decide about the version.
    Unknown,
    /// HTTP/1.
    Http1(HttpSession),
}

impl Protocol {
    pub(crate) fn http1(context: &StreamContext, is_secure: bool) -> Self {
        Self::Http1(HttpSession::new(context, is_secure))
    }

    /// Returns the name for people.
    pub(crate) const fn text(&self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Unknown => "http",
            Self::Http1(_) => "http/1.1",
        }
    }
}
