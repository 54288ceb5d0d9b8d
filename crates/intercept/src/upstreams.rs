//! Results of connections to servers, by server, for the diagnosis of failures. The number of servers is bounded.

use std::net::SocketAddr;

use palisade_inspect::Millis;

use crate::{failure::Failure, failure::FailureKind, lru::Lru, tls::PeerName};

/// Maximum number of servers whose results one thread keeps.
const KEPT: usize = 1024;

/// Results of the connections to one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    /// Server name, or the address if the clients have sent no name.
    pub name: String,
    /// Address and port.
    pub address: SocketAddr,
    /// Connections that were ready for requests.
    pub successes: u64,
    /// Failures, by [`FailureKind`].
    pub failures: [u64; FailureKind::ALL.len()],
    /// The last failure in words.
    pub last_failure: Option<String>,
    /// Sum of the times until the connections were open, ms.
    pub connect_ms: u64,
    /// Sum of the durations of the TLS handshakes, ms.
    pub handshake_ms: u64,
    /// Number of TLS handshakes in `handshake_ms`.
    pub handshakes: u64,
}

/// Results of all servers of one thread.
pub(crate) struct Upstreams(Lru<(PeerName, SocketAddr), Upstream>);

impl Upstreams {
    pub(crate) fn new() -> Self {
        Self(Lru::new(KEPT))
    }

    fn of(&mut self, name: &PeerName, address: SocketAddr) -> Option<&mut Upstream> {
        let key = (name.clone(), address);
        if self.0.get(&key).is_none() {
            let new = Upstream {
                name: name.to_string(),
                address,
                successes: 0,
                failures: [0; _],
                last_failure: None,
                connect_ms: 0,
                handshake_ms: 0,
                handshakes: 0,
            };
            self.0.insert(key.clone(), new);
        }
        self.0.get_mut(&key)
    }

    /// Notes a connection that is ready. `handshake`: duration of the TLS handshake, if there was one.
    pub(crate) fn note_success(
        &mut self,
        name: &PeerName,
        address: SocketAddr,
        connect: Millis,
        handshake: Option<Millis>,
    ) {
        if let Some(upstream) = self.of(name, address) {
            upstream.successes += 1;
            upstream.connect_ms += connect;
            upstream.handshake_ms += handshake.unwrap_or(0);
            upstream.handshakes += u64::from(handshake.is_some());
        }
    }

    pub(crate) fn note_failure(&mut self, name: &PeerName, address: SocketAddr, failure: &Failure) {
        if let Some(upstream) = self.of(name, address) {
            if let Some(count) = upstream.failures.get_mut(failure.kind as usize) {
                *count += 1;
            }
            upstream.last_failure = Some(failure.to_string());
        }
    }

    pub(crate) fn all(&self) -> Vec<Upstream> {
        self.0.values().cloned().collect()
    }
}

impl Upstream {
    /// Adds the results of another thread for the same server.
    pub(crate) fn add(&mut self, other: &Self) {
        self.successes += other.successes;
        for (sum, count) in self.failures.iter_mut().zip(&other.failures) {
            *sum += count;
        }
        if self.last_failure.is_none() {
            self.last_failure.clone_from(&other.last_failure);
        }
        self.connect_ms += other.connect_ms;
        self.handshake_ms += other.handshake_ms;
        self.handshakes += other.handshakes;
    }
}
