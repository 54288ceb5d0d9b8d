//! Protocol between the command line and the daemon: a unix socket, one request per connection, JSON lines both ways.
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

/// Maximum length of a line of an answer, bytes. A listing is one line, and a table of a million entries must fit.
pub(crate) const MAX_ANSWER: usize = 1 << 30;
/// Maximum length of a request, bytes. The longest requests have the text of policy files.
pub(crate) const MAX_REQUEST: usize = 8 << 20;
/// Longest time between two lines to a client that follows flows. Without flows an `Alive` line is sent.
pub(crate) const ALIVE_INTERVAL: Duration = Duration::from_secs(2);
