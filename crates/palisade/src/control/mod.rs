//! Between the command line and the daemon: a unix socket, one request a connection, JSON lines both ways.
//!
//! ```text
//! -> {"command":"endpoint-get","endpoint":"default/web"}
//! <- {"ok":{...}}                                    or {"error":"..."}
//! -> {"command":"observe","filters":[["to-port","80"]],"follow":true}
//! <- {"flow":{...}}   {"lost":12}   ...              until {"ok":null}, {"error":"..."} or one side closes
//! ```

use std::time::Duration;

pub(crate) mod api;
pub(crate) mod client;
pub(crate) mod server;

/// The longest line that either side takes. A listing is one line: a table of a million entries has to fit.
pub(crate) const MAX_ANSWER: usize = 1 << 30;
/// The longest request: filters and trace descriptions are short.
pub(crate) const MAX_REQUEST: usize = 64 * 1024;
/// Longest time between two lines to a following client: without flows, the line only says that the daemon lives.
pub(crate) const ALIVE_INTERVAL: Duration = Duration::from_secs(2);
