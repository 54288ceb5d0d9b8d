//! HTTP/1: a request goes on if a rule allows it; its body and the answers do too, and long bodies are left to the
//! programs.

#[cfg_attr(not(test), expect(dead_code, reason = "the reader of HTTP will use it"))]
mod redact;

use std::sync::Arc;

use palisade_protocols::http1;

use crate::tcp::TcpLimits;

/// In which form the path of a request is judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Paths {
    /// As sent, and as a server would resolve it: a rule must allow both.
    #[default]
    Both,
    /// As sent only.
    Raw,
}

/// How HTTP is judged, and how much may be held of it. Of one worker.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HttpLimits {
    /// Connections. Their deadline is that of a head that does not end.
    pub tcp: TcpLimits,
    /// What a head may be at most.
    pub head: http1::Limits,
    /// In which form a path is judged.
    pub paths: Paths,
    /// Names of the fields that records show, in any case. Those with secrets show that they were there.
    pub record_headers: Arc<[String]>,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            tcp: TcpLimits {
                bytes_per_direction: 256 << 10,
                window: 64 << 10,
                ..TcpLimits::default()
            },
            head: http1::Limits::default(),
            paths: Paths::default(),
            record_headers: Arc::default(),
        }
    }
}
