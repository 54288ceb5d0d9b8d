//! HTTP/1: a request goes on if a rule allows it; its body and the answers do too, and long bodies are left to the
//! programs.

use std::sync::Arc;

pub use palisade_policy::l7::Paths;
use palisade_protocols::http1;

use crate::tcp::TcpLimits;

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
