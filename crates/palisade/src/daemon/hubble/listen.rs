//! The listeners of the flow API: which clients can connect, how many, and within which time.

use std::{
    collections::VecDeque, future::Future, io, net::SocketAddr,
    os::unix::net::UnixListener as StdUnixListener, pin::Pin, sync::Arc, time::Duration,
};

use nix::unistd::geteuid;
use palisade_hubble::{Api, Connection, ConnectionId, Origin, Places, serve};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tracing::{debug, error, info};

use super::{
    report::Reports,
    tls::{Certificates, Chain},
};
use crate::{
    config::{CertificateFiles, Hubble as Options},
    control::server::Bound,
};

/// Maximum number of connections of each listener. One connection carries several requests.
const MAX_CONNECTIONS: usize = 64;
/// Maximum number of connections in a TLS handshake.
const MAX_HANDSHAKES: usize = 64;
/// Connections that are accepted and not yet served.
const ACCEPT_BACKLOG: usize = 8;
/// Longest TLS handshake.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Pause after a failed attempt to accept or to listen.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// Bytes in both directions, over any transport.
trait Bytes: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Bytes for T {}

type Client = Connection<Pin<Box<dyn Bytes>>>;

/// Sends accepted connections to the server.
#[derive(Clone)]
struct Admission {
    clients: mpsc::Sender<io::Result<Client>>,
    places: Arc<Places<Chain>>,
    reports: Arc<Reports>,
}

impl Admission {
    fn new(clients: &mpsc::Sender<io::Result<Client>>, reports: &Arc<Reports>) -> Self {
        Self {
            clients: clients.clone(),
            places: Places::new(MAX_CONNECTIONS),
            reports: Arc::clone(reports),
        }
    }

    /// Passes a connection to the server, unless all places have clients with requests. `accepted` decides when the
    /// client has its place: from then on a change of the certificates closes the connection.
    async fn enter(
        &self,
        stream: impl Bytes + 'static,
        origin: Origin,
        chain: Chain,
        accepted: impl Fn(&Chain) -> bool,
    ) {
        let id = ConnectionId::new(origin);
        let place = self.places.enter(&id, chain.clone());
        let Some(place) = place.filter(|_| accepted(&chain)) else {
            self.reports.get().refused += 1;
            return;
        };
        let stream = Box::pin(stream) as Pin<Box<dyn Bytes>>;
        let client = Connection::new(stream, id, Some(Box::new(place)));
        // Sending fails only when the server ends.
        let _ = self.clients.send(Ok(client)).await;
    }
}

/// Connections in a TLS handshake. A client that does not end its handshake takes no place of the server. When there are too
/// many, the oldest handshake of the origin with the most ends, so that clients from other addresses can complete theirs.
#[derive(Default)]
struct Handshakes(VecDeque<(Origin, oneshot::Sender<()>)>);

impl Handshakes {
    /// Returns a receiver that is ready when the handshake must end. It is dropped when the handshake has ended.
    fn begin(&mut self, origin: Origin) -> oneshot::Receiver<()> {
        self.0.retain(|(_, handshake)| !handshake.is_closed());
        if self.0.len() >= MAX_HANDSHAKES {
            let shares = self.0.iter().map(|(origin, _)| {
                let same = self.0.iter().filter(|(other, _)| other == origin);
                same.count()
            });
            let first = shares.enumerate().rev().max_by_key(|(_, share)| *share);
            if let Some((first, _)) = first {
                self.0.remove(first);
            }
        }
        let (sender, evicted) = oneshot::channel();
        self.0.push_back((origin, sender));
        evicted
    }
}

/// Serves the API until `ended` is ready.
pub(super) async fn run(
    api: Api,
    socket: anyhow::Result<(StdUnixListener, Bound)>,
    options: Options,
    reports: Arc<Reports>,
    ended: oneshot::Receiver<()>,
) {
    let (clients, served) = mpsc::channel(ACCEPT_BACKLOG);
    // The socket is removed when this value is dropped.
    let _bound = match socket.and_then(|(listener, bound)| Ok((UnixListener::from_std(listener)?, bound))) {
        Ok((listener, bound)) => {
            info!(socket = %options.socket.display(), "the flow API is served");
            reports.get().socket = Some(options.socket.display().to_string());
            let anybody = options.group.is_some();
            tokio::spawn(accept_unix(listener, anybody, Admission::new(&clients, &reports)));
            Some(bound)
        }
        Err(problem) => {
            reports.set_problem("socket", Some(format!("{problem:#}")));
            None
        }
    };
    if let Some(address) = options.listen {
        let admission = Admission::new(&clients, &reports);
        let files = options.tls_certificate.zip(options.tls_key);
        let certificates = files.map(|(certificate, key)| {
            let files = CertificateFiles {
                certificate,
                key,
                client_ca: options.client_ca,
            };
            let certificates = Certificates::new(files, &reports);
            tokio::spawn(Arc::clone(&certificates).watch(Arc::clone(&admission.places)));
            certificates
        });
        tokio::spawn(accept_tcp(address, certificates, admission));
    }
    drop(clients);
    // Without a listener the stream of clients ends, and the server with it; agent events are collected all the same.
    // Connections of clients that follow flows do not end by themselves, so the server is dropped instead of shut down.
    tokio::select! {
        result = serve(api, ReceiverStream::new(served), std::future::pending()) => {
            if let Err(problem) = result {
                error!(error = %problem, "the flow API has ended");
                reports.set_problem("server", Some(format!("the flow API has ended: {problem}; restart the daemon")));
                let mut report = reports.get();
                report.socket = None;
                report.listen = None;
            }
        }
        _ = ended => {}
    }
}

/// Accepts clients of the unix socket. `anybody`: whether only the mode of the socket limits access.
async fn accept_unix(listener: UnixListener, anybody: bool, admission: Admission) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if !anybody && !is_own_or_root(&stream) {
                    admission.reports.get().refused += 1;
                    continue;
                }
                let process = stream.peer_cred().ok().and_then(|peer| peer.pid());
                let origin = process.map_or(Origin::Unknown, Origin::Process);
                admission.enter(stream, origin, Chain::new(), |_| true).await;
            }
            Err(problem) => pause("socket", &problem).await,
        }
    }
}

/// Returns whether the process of a client runs as root or as the user of the daemon. The kernel reports the user
/// (SO_PEERCRED), so the check does not depend on the mode of the socket.
fn is_own_or_root(stream: &UnixStream) -> bool {
    stream
        .peer_cred()
        .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == geteuid().as_raw())
}

/// Accepts clients of the TCP listener. With certificates, a connection is served only after the handshake.
async fn accept_tcp(address: SocketAddr, certificates: Option<Arc<Certificates>>, admission: Admission) {
    let listener = bind(address, &admission.reports).await;
    info!(%address, tls = certificates.is_some(), "the flow API is served");
    admission.reports.get().listen = Some(address.to_string());
    let mut handshakes = Handshakes::default();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                // Flows are sent as they happen.
                let _ = stream.set_nodelay(true);
                let origin = Origin::of_address(peer.ip());
                match &certificates {
                    None => admission.enter(stream, origin, Chain::new(), |_| true).await,
                    Some(certificates) => {
                        let (certificates, admission) = (Arc::clone(certificates), admission.clone());
                        let evicted = handshakes.begin(origin);
                        tokio::spawn(async move {
                            let result = tokio::select! {
                                result = handshake(stream, &certificates) => result,
                                _ = evicted => Err(io::Error::other("too many newer handshakes")),
                            };
                            match result {
                                Ok(stream) => {
                                    let chain = stream.get_ref().1.peer_certificates();
                                    let chain = chain.map(<[_]>::to_vec).unwrap_or_default();
                                    admission
                                        .enter(stream, origin, chain, |chain| certificates.accepts(chain))
                                        .await;
                                }
                                Err(problem) => {
                                    admission.reports.get().refused += 1;
                                    debug!(%peer, %problem, "a TLS handshake failed");
                                }
                            }
                        });
                    }
                }
            }
            Err(problem) => pause("listen", &problem).await,
        }
    }
}

fn handshake(
    stream: TcpStream,
    certificates: &Certificates,
) -> impl Future<Output = io::Result<TlsStream<TcpStream>>> + use<> {
    let config = certificates.config();
    async move {
        let config = config.ok_or_else(|| io::Error::other("no usable certificate"))?;
        let accept = TlsAcceptor::from(config).accept(stream);
        timeout(HANDSHAKE_DEADLINE, accept).await?
    }
}

/// Listens at an address. The address can appear later than the daemon starts, so the attempt is repeated.
async fn bind(address: SocketAddr, reports: &Reports) -> TcpListener {
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                reports.set_problem("listen", None);
                return listener;
            }
            Err(problem) => {
                reports.set_problem("listen", Some(format!("{address}: {problem}; trying again")));
                sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

async fn pause(listener: &str, problem: &io::Error) {
    error!(listener, error = %problem, "a client of the flow API cannot be accepted");
    // The process probably has no free file descriptor (EMFILE). An immediate retry would fail too.
    sleep(RETRY_INTERVAL).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_of_too_many_handshakes_ends() {
        let mut handshakes = Handshakes::default();
        let [here, there] = [Origin::Process(1), Origin::Process(2)];
        let mut first = handshakes.begin(here);
        let mut others: Vec<_> = (1..MAX_HANDSHAKES).map(|_| handshakes.begin(here)).collect();
        // One has ended, so there is room.
        others.pop();
        let mut new = handshakes.begin(there);
        assert_eq!(first.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        let _newer = handshakes.begin(there);
        assert_eq!(first.try_recv(), Err(oneshot::error::TryRecvError::Closed));
        // A flood from one address ends only handshakes from there.
        for _ in 0..1_000 {
            others.push(handshakes.begin(here));
        }
        assert_eq!(new.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        assert!(handshakes.0.len() <= MAX_HANDSHAKES);
    }
}
