//! The listeners of the flow API: which clients can connect, how many, and within which time.

use std::{
    future::Future, io, net::SocketAddr, os::unix::net::UnixListener as StdUnixListener, pin::Pin, sync::Arc,
    time::Duration,
};

use nix::unistd::geteuid;
use palisade_hubble::{Api, Connection, serve};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tracing::{debug, error, info};

use super::{report::Reports, tls::Certificates};
use crate::{config::Hubble as Options, control::server::Bound};

/// Maximum number of connections of each listener. One connection carries several requests.
const MAX_CONNECTIONS: usize = 64;
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
struct Door {
    clients: mpsc::Sender<io::Result<Client>>,
    places: Arc<Semaphore>,
    reports: Arc<Reports>,
}

impl Door {
    /// Returns the place of a new connection; `None` if there are too many.
    fn place(&self) -> Option<OwnedSemaphorePermit> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok();
        if place.is_none() {
            self.reports.get().refused += 1;
        }
        place
    }

    async fn enter(&self, stream: impl Bytes + 'static, place: OwnedSemaphorePermit) {
        let client = Connection::new(Box::pin(stream) as Pin<Box<dyn Bytes>>, Some(Box::new(place)));
        // Sending fails only when the server ends.
        let _ = self.clients.send(Ok(client)).await;
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
    let door = || Door {
        clients: clients.clone(),
        places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        reports: Arc::clone(&reports),
    };
    // The socket is removed when this value is dropped.
    let _bound = match socket.and_then(|(listener, bound)| Ok((UnixListener::from_std(listener)?, bound))) {
        Ok((listener, bound)) => {
            info!(socket = %options.socket.display(), "the flow API is served");
            reports.get().socket = Some(options.socket.display().to_string());
            let anybody = options.group.is_some();
            tokio::spawn(accept_unix(listener, anybody, door()));
            Some(bound)
        }
        Err(problem) => {
            reports.set_problem("socket", Some(format!("{problem:#}")));
            None
        }
    };
    if let Some(address) = options.listen {
        let certificates = options
            .tls_certificate
            .as_ref()
            .zip(options.tls_key.as_ref())
            .map(|(chain, key)| {
                let certificates = Certificates::new(chain, key, options.client_ca.as_deref(), &reports);
                tokio::spawn(Arc::clone(&certificates).watch());
                certificates
            });
        tokio::spawn(accept_tcp(address, certificates, door()));
    }
    drop(clients);
    // Without a listener the stream of clients ends, and the server with it; agent events are collected all the same.
    // Connections of clients that follow flows do not end by themselves, so the server is dropped instead of shut down.
    tokio::select! {
        result = serve(api, ReceiverStream::new(served), std::future::pending()) => {
            if let Err(problem) = result {
                error!(error = %problem, "the flow API has ended");
            }
        }
        _ = ended => {}
    }
}

/// Accepts clients of the unix socket. `anybody`: whether only the mode of the socket limits access.
async fn accept_unix(listener: UnixListener, anybody: bool, door: Door) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                if !anybody && !is_own_or_root(&stream) {
                    door.reports.get().refused += 1;
                    continue;
                }
                if let Some(place) = door.place() {
                    door.enter(stream, place).await;
                }
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
async fn accept_tcp(address: SocketAddr, certificates: Option<Arc<Certificates>>, door: Door) {
    let listener = bind(address, &door.reports).await;
    info!(%address, tls = certificates.is_some(), "the flow API is served");
    door.reports.get().listen = Some(address.to_string());
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let Some(place) = door.place() else { continue };
                // Flows are sent as they happen.
                let _ = stream.set_nodelay(true);
                match &certificates {
                    None => door.enter(stream, place).await,
                    Some(certificates) => {
                        let (certificates, door) = (Arc::clone(certificates), door.clone());
                        tokio::spawn(async move {
                            match handshake(stream, &certificates).await {
                                Ok(stream) => door.enter(stream, place).await,
                                Err(problem) => {
                                    door.reports.get().refused += 1;
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
) -> impl Future<Output = io::Result<impl Bytes + use<>>> + use<> {
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
