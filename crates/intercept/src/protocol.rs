//! The protocol inside a connection.

use palisade_inspect::{
    http2::{Buffers, Filter, Http2Limits, Http2Stats, Output},
    stream::{HttpSession, StreamContext, StreamScratch},
};

use crate::{settings::Settings, unavailable::Unavailable};

/// What is inspected.
pub(crate) enum Protocol {
    /// Bytes are forwarded without inspection.
    Bytes,
    /// HTTP; the first bytes of the client decide about the version.
    Unknown,
    /// HTTP/1.
    Http1(HttpSession),
    /// HTTP/2.
    Http2(Box<Http2>),
}

/// State of an HTTP/2 connection.
pub(crate) struct Http2 {
    pub(crate) filter: Filter,
    /// The server in the place of one that cannot be reached.
    pub(crate) unavailable: Option<Unavailable>,
}

/// Buffers and counters of one thread, for all protocols.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) stream: StreamScratch,
    pub(crate) buffers: Buffers,
    pub(crate) http2: Http2Stats,
    pub(crate) output: Output,
}

impl Protocol {
    pub(crate) fn http1(context: &StreamContext, is_secure: bool) -> Self {
        Self::Http1(HttpSession::new(context, is_secure))
    }

    pub(crate) fn http2(settings: &Settings, is_secure: bool) -> Self {
        Self::Http2(Box::new(Http2 {
            filter: Filter::new(&Http2Limits::of(&settings.http), is_secure),
            unavailable: None,
        }))
    }

    /// Returns the name for people.
    pub(crate) const fn text(&self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Unknown => "http",
            Self::Http1(_) => "http/1.1",
            Self::Http2(_) => "h2",
        }
    }
}
