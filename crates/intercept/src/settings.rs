//! Settings and interfaces that the daemon passes to the proxy.

use std::{
    io,
    net::SocketAddr,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use palisade_abi::{Direction, PuntRequest};
use palisade_inspect::{Ech, HttpLimits, Rules, SniAddressIndex, record::Record};

use crate::secrets::Secrets;

/// Network namespace of one direction.
#[derive(Debug)]
pub struct Namespace {
    /// Direction of the verdict of the flows that arrive there.
    pub direction: Direction,
    /// File descriptor of the namespace.
    pub fd: OwnedFd,
}

/// An intercepted flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// The request of the policy.
    pub request: PuntRequest,
    /// Index of the interface that the flow uses.
    pub ifindex: u32,
    /// Whether the programs have evaluated the flow under the policy in force. Otherwise the next packet of the flow can
    /// change its request, for example because the peer's address has another identity now.
    pub is_evaluated: bool,
}

/// Finds intercepted flows.
pub trait Flows: Send + Sync {
    /// Returns the flow between two addresses; `None` if it is not intercepted.
    fn find(&self, direction: Direction, client: SocketAddr, server: SocketAddr) -> Option<Flow>;

    /// Returns a number that is raised after each removal of flows. While it is the same, and no lookup of all
    /// connections was requested, [`Self::find`] returns an evaluated flow unchanged, so that a request costs no lookup.
    /// Only an entry that was evicted can be made again with another request.
    fn removals(&self) -> u64;
}

/// Registers listeners with the programs of the namespaces.
pub trait Listeners {
    /// Makes the programs of the namespace of `direction` assign connections to a listener.
    ///
    /// # Errors
    /// The error of the map.
    fn register(&self, direction: Direction, listener: BorrowedFd<'_>, is_v6: bool) -> io::Result<()>;
}

/// Receives the records of the proxy.
pub trait Reports: Send + Sync {
    /// Handles a record. Called by the threads of the proxy, so it must not block.
    fn record(&self, record: &Record);
}

/// Limits and deadlines.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of threads.
    pub threads: usize,
    /// Maximum number of connections of one thread.
    pub connections: usize,
    /// Maximum number of connections of one thread that one endpoint can have.
    pub endpoint_connections: usize,
    /// Time for the connection to a server.
    pub connect: Duration,
    /// Time for the TLS handshake with either side.
    pub handshake: Duration,
    /// Time for a message head.
    pub head: Duration,
    /// Time for the head of a response after the whole request; zero: no deadline but that of an idle connection.
    pub response: Duration,
    /// Time without any byte after which a connection is closed.
    pub idle: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            threads: 2,
            connections: 16_384,
            endpoint_connections: 8_192,
            connect: Duration::from_secs(10),
            handshake: Duration::from_secs(10),
            head: Duration::from_secs(30),
            response: Duration::from_secs(3_600),
            idle: Duration::from_secs(8_000),
        }
    }
}

/// The rules and secrets in force. Replaced as a whole.
#[derive(Clone)]
pub struct Settings {
    /// The rule sets.
    pub rules: Arc<Rules>,
    /// The secrets.
    pub secrets: Arc<dyn Secrets>,
    /// `namespace/name` of the secret with the interception CA.
    pub interception_ca: Option<String>,
    /// Limits and options of HTTP inspection.
    pub http: HttpLimits,
    /// Handling of hellos that carry an encrypted ClientHello.
    pub ech: Ech,
    /// Learned addresses, if the server's address must have been learned for the server name
    /// (`[tls] verify_sni_address`).
    pub names: Option<Arc<SniAddressIndex>>,
    /// Whether a hello without a server name is refused.
    pub refuse_nameless: bool,
}

impl std::fmt::Debug for Settings {
    /// Shows no secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings")
            .field("interception_ca", &self.interception_ca)
            .finish_non_exhaustive()
    }
}
