//! The server: state that all services share, and the dispatch of requests to services.

use std::{
    convert::Infallible,
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime},
};

use palisade_flowlog::{Ring, Timestamp};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_stream::Stream;
use tonic::{
    Status,
    body::Body,
    codegen::{Service, http},
    transport::{Server, server::Connected},
};

use crate::{
    agent::{AgentEvent, AgentRead, AgentRing},
    connection::{ConnectionId, OpenStream},
    namespaces::Namespaces,
    origin::greediest,
    proto::services::{
        health_server::HealthServer, observer_server::ObserverServer, peer_server::PeerServer,
    },
    readers::{Counts, Readers},
    stream::Shared as SharedResponses,
    wake::Wake,
};

/// Longest request, bytes.
const MAX_REQUEST_BYTES: usize = 64 << 10;
/// Longest list of header fields of a request, bytes.
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Maximum number of concurrent requests of one connection.
const MAX_STREAMS_PER_CONNECTION: u32 = 16;
/// Time within which a request must be complete. Until then its bytes are kept.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// Bytes that a client can send before the server reads them, of one request and of all requests of a connection.
const RECEIVE_WINDOWS: (u32, u32) = (16 << 10, 128 << 10);
/// Maximum number of streams that only wait for changes: of health and of peers.
const MAX_WATCHERS: usize = 256;
/// Maximum number of such streams of one connection.
const MAX_WATCHERS_PER_CONNECTION: usize = 8;
/// Interval of HTTP/2 pings, and the time within which a client must answer one.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));
/// Shortest time between two searches for namespaces in the ring.
const SEARCH_INTERVAL: Duration = Duration::from_secs(1);
/// Flows that [`Api::find_namespaces`] looks at before it lets other tasks run.
const TURN_FLOWS: usize = 512;

/// Name and address of this node.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// Name.
    pub name: Arc<str>,
    /// Version, such as `0.1.0`.
    pub version: String,
    /// Address of the API for other nodes: `HOST:PORT` or `unix://PATH`.
    pub address: String,
    /// Name in the certificate of the server; `None` without TLS.
    pub tls_name: Option<String>,
}

impl Node {
    pub(crate) fn long_version(&self) -> String {
        format!("palisade v{}", self.version)
    }
}

/// Limits of the server.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Maximum number of streams of flows and events.
    pub readers: usize,
}

struct Shared {
    node: Node,
    ring: Arc<Ring>,
    agent: Arc<AgentRing>,
    readers: Arc<Readers>,
    watchers: Arc<Mutex<Vec<Option<ConnectionId>>>>,
    wake: Arc<Wake>,
    namespaces: Arc<Namespaces>,
    responses: Arc<SharedResponses>,
    /// Time of the last search for namespaces. The lock serializes the searches.
    search: tokio::sync::Mutex<Option<Instant>>,
    started: Instant,
}

/// The services, and what they share.
#[derive(Clone)]
pub struct Api(Arc<Shared>);

impl Api {
    /// Returns the services over a ring of flows.
    ///
    /// # Errors
    /// Fails if the thread that waits for the ring cannot be started.
    pub fn new(ring: Arc<Ring>, node: Node, limits: Limits) -> io::Result<Self> {
        let readers = Readers::new(limits.readers);
        Ok(Self(Arc::new(Shared {
            wake: Wake::start(&ring, &readers)?,
            node,
            ring,
            agent: Arc::default(),
            readers,
            watchers: Arc::default(),
            namespaces: Arc::default(),
            responses: Arc::default(),
            search: tokio::sync::Mutex::default(),
            started: Instant::now(),
        })))
    }

    /// Adds an event of the daemon.
    pub fn report(&self, event: AgentEvent) {
        let now = Timestamp::from_system_time(SystemTime::now());
        self.0.agent.push(event, &self.0.node.name, now);
        self.0.wake.notify().notify_waiters();
    }

    /// Returns the events of the daemon that are kept, from the number `from` on.
    #[must_use]
    pub fn agent_events(&self, from: u64) -> AgentRead {
        self.0.agent.read(from)
    }

    /// Returns the counters of readers.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.0.readers.counts()
    }

    pub(crate) fn node(&self) -> &Node {
        &self.0.node
    }

    pub(crate) fn ring(&self) -> &Arc<Ring> {
        &self.0.ring
    }

    pub(crate) fn agent_ring(&self) -> &Arc<AgentRing> {
        &self.0.agent
    }

    pub(crate) fn readers(&self) -> &Arc<Readers> {
        &self.0.readers
    }

    pub(crate) fn wake(&self) -> &Arc<Wake> {
        &self.0.wake
    }

    pub(crate) fn namespaces(&self) -> &Arc<Namespaces> {
        &self.0.namespaces
    }

    pub(crate) fn shared_responses(&self) -> &Arc<SharedResponses> {
        &self.0.responses
    }

    pub(crate) fn uptime_ns(&self) -> u64 {
        u64::try_from(self.0.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Returns the place of a stream that only waits for changes. If there is none, a connection of the origin with the most
    /// such streams is closed.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` if there are too many, of the connection or of all.
    pub(crate) fn watcher(&self, connection: Option<ConnectionId>) -> Result<Watcher, Status> {
        let mut all = self.0.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        let own = all
            .iter()
            .flatten()
            .filter(|other| connection.as_ref().is_some_and(|own| own.is(other)));
        if own.count() >= MAX_WATCHERS_PER_CONNECTION {
            return Err(Status::resource_exhausted(format!(
                "{MAX_WATCHERS_PER_CONNECTION} streams of this connection watch already; end one of them"
            )));
        }
        if all.len() >= MAX_WATCHERS {
            let origin = |watcher: &Option<ConnectionId>| {
                watcher.as_ref().map(ConnectionId::origin).unwrap_or_default()
            };
            let greedy = greediest(
                all.iter().map(origin),
                connection.as_ref().map(ConnectionId::origin).unwrap_or_default(),
            );
            let Some(greedy) = greedy else {
                return Err(Status::resource_exhausted(format!(
                    "{MAX_WATCHERS} clients watch already; end one of them"
                )));
            };
            let closed = all
                .iter()
                .rfind(|watcher| origin(watcher) == greedy)
                .cloned()
                .flatten();
            if let Some(closed) = closed {
                closed.close();
                // Their streams end with the connection.
                all.retain(|watcher| !watcher.as_ref().is_some_and(|watcher| watcher.is(&closed)));
            }
        }
        all.push(connection.clone());
        drop(all);
        Ok(Watcher {
            all: Arc::clone(&self.0.watchers),
            _open: connection.as_ref().map(ConnectionId::open),
            connection,
        })
    }

    /// Notes the namespaces of all flows in the ring, unless that was done within [`SEARCH_INTERVAL`].
    pub(crate) async fn find_namespaces(&self) {
        let mut last = self.0.search.lock().await;
        if last.is_some_and(|last| last.elapsed() < SEARCH_INTERVAL) {
            return;
        }
        let ring = &self.0.ring;
        let numbers = ring.oldest_number()..ring.seen();
        for (number, looked) in numbers.zip(1_usize..) {
            if let Some(flow) = ring.get(number) {
                self.0.namespaces.note(&flow);
            }
            if looked.is_multiple_of(TURN_FLOWS) {
                tokio::task::yield_now().await;
            }
        }
        *last = Some(Instant::now());
    }
}

/// The place of one stream that waits for changes; free again when the value is dropped.
pub(crate) struct Watcher {
    all: Arc<Mutex<Vec<Option<ConnectionId>>>>,
    connection: Option<ConnectionId>,
    _open: Option<OpenStream>,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let own = all.iter().position(|watcher| match (watcher, &self.connection) {
            (Some(watcher), Some(own)) => watcher.is(own),
            (None, None) => true,
            _ => false,
        });
        // `None` if the connection has been closed in favour of another client.
        if let Some(own) = own {
            all.swap_remove(own);
        }
    }
}

/// Stream of one message, which then stays open without another one: what the message says does not change while the
/// server runs.
pub(crate) struct Held<T> {
    first: Option<T>,
    _watcher: Watcher,
}

impl<T> Held<T> {
    pub(crate) const fn new(first: T, watcher: Watcher) -> Self {
        Self {
            first: Some(first),
            _watcher: watcher,
        }
    }
}

impl<T: Unpin> Stream for Held<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        // The task is woken when the client closes the stream.
        self.first
            .take()
            .map_or(Poll::Pending, |first| Poll::Ready(Some(Ok(first))))
    }
}

/// Serves connections until `shutdown` is ready.
///
/// # Errors
/// Fails if the server cannot be set up. Errors of single connections end these only.
pub async fn serve<I, C>(
    api: Api,
    connections: I,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error>
where
    I: Stream<Item = io::Result<C>> + Send,
    C: AsyncRead + AsyncWrite + Connected<ConnectInfo = ConnectionId> + Unpin + Send + 'static,
{
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .initial_stream_window_size(RECEIVE_WINDOWS.0)
        .initial_connection_window_size(RECEIVE_WINDOWS.1)
        .serve_with_incoming_shutdown(Dispatch::new(&api), connections, shutdown)
        .await
}

/// Passes requests to the service that their path names.
#[derive(Clone)]
struct Dispatch {
    observer: ObserverServer<Api>,
    peer: PeerServer<Api>,
    health: HealthServer<Api>,
    /// Time within which a request must be complete.
    deadline: Duration,
    version: http::HeaderValue,
}

impl Dispatch {
    fn new(api: &Api) -> Self {
        let version = http::HeaderValue::from_str(&api.node().version);
        Self {
            observer: ObserverServer::new(api.clone()).max_decoding_message_size(MAX_REQUEST_BYTES),
            peer: PeerServer::new(api.clone()).max_decoding_message_size(MAX_REQUEST_BYTES),
            health: HealthServer::new(api.clone()).max_decoding_message_size(MAX_REQUEST_BYTES),
            deadline: REQUEST_DEADLINE,
            version: version.unwrap_or_else(|_| http::HeaderValue::from_static("unknown")),
        }
    }
}

impl Service<http::Request<Body>> for Dispatch {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let open = request.extensions().get().map(ConnectionId::open);
        let service = request.uri().path().trim_start_matches('/').split('/').next();
        let response: Self::Future = match service {
            Some("observer.Observer") => self.observer.call(request),
            Some("peer.Peer") => self.peer.call(request),
            Some("grpc.health.v1.Health") => self.health.call(request),
            _ => Box::pin(async { Ok(Status::unimplemented("no such service").into_http()) }),
        };
        let (version, deadline) = (self.version.clone(), self.deadline);
        Box::pin(async move {
            // The response begins when the request is complete. Its messages follow, without a deadline.
            let mut response = match tokio::time::timeout(deadline, response).await {
                Ok(response) => response?,
                Err(_) => Status::deadline_exceeded(format!(
                    "the request is not complete after {} s",
                    deadline.as_secs()
                ))
                .into_http(),
            };
            drop(open);
            response.headers_mut().insert("hubble-server-version", version);
            Ok(response)
        })
    }
}

#[cfg(test)]
mod tests {
    use tonic::{Code, codec::EncodeBody};

    use super::*;
    use crate::{
        origin::Origin,
        wire::{Encoded, Encoder},
    };

    fn api() -> Api {
        Api::new(Ring::new(16), Node::default(), Limits { readers: 2 }).unwrap()
    }

    #[tokio::test]
    async fn a_request_that_does_not_end_is_ended() {
        let mut dispatch = Dispatch::new(&api());
        dispatch.deadline = Duration::from_millis(20);
        let endless = tokio_stream::pending::<Result<Encoded, Status>>();
        let body = EncodeBody::new_client(Encoder::default(), endless, None, None);
        let connection = ConnectionId::default();
        let request = http::Request::post("/observer.Observer/GetFlows")
            .extension(connection.clone())
            .body(Body::new(body))
            .unwrap();
        let response = dispatch.call(request);
        assert!(!connection.is_idle());
        let response = tokio::time::timeout(Duration::from_secs(60), response).await;
        let response = response.unwrap().unwrap();
        let status = Status::from_header_map(response.headers()).unwrap();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert!(connection.is_idle());
    }

    #[tokio::test]
    async fn the_watchers_of_a_connection_and_of_all_are_bounded() {
        let api = api();
        let connection = ConnectionId::default();
        let watch = || api.watcher(Some(connection.clone()));
        let mut held: Vec<_> = (0..MAX_WATCHERS_PER_CONNECTION)
            .map(|_| watch().unwrap())
            .collect();
        let refused = watch().err().unwrap();
        assert!(
            refused.message().contains("8 streams of this connection"),
            "{refused}"
        );
        assert!(!connection.is_idle());
        held.pop();
        held.push(watch().unwrap());
        while held.len() < MAX_WATCHERS {
            held.push(api.watcher(None).unwrap());
        }
        assert!(api.watcher(None).is_err());
        drop(held);
        assert!(connection.is_idle());
        assert!(watch().is_ok());
        assert!(api.0.watchers.lock().unwrap().is_empty());

        // A client that has all places loses a connection to another client.
        let from = |number: i32| ConnectionId::new(Origin::Process(number));
        let greedy: Vec<_> = (0..MAX_WATCHERS / MAX_WATCHERS_PER_CONNECTION)
            .map(|_| from(1))
            .collect();
        let watches = greedy
            .iter()
            .flat_map(|connection| vec![connection.clone(); MAX_WATCHERS_PER_CONNECTION]);
        let held: Vec<_> = watches
            .map(|connection| api.watcher(Some(connection)).unwrap())
            .collect();
        assert!(api.watcher(Some(from(1))).is_err());
        let _other = api.watcher(Some(from(2))).unwrap();
        let closed = greedy.iter().filter(|connection| connection.is_closed());
        assert_eq!(closed.count(), 1);
        drop(held);
        assert_eq!(api.0.watchers.lock().unwrap().len(), 1);
    }
}
