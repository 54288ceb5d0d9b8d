//! HTTP server (`hyper`) of `/metrics`, `/healthz` and `/readyz`, on a thread of its own.
//!
//! Clients are not trusted to behave: the number of connections is bounded, a request head must arrive in time, and
//! when the limit is reached, the oldest connection without a request is closed for a new one. Values are read on at
//! most [`MAX_READERS`] further threads, so a slow read does not delay the other answers.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    thread,
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ACCEPT, ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use palisade_metrics::Format;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    runtime,
    sync::Semaphore,
    time,
};
use tokio_rustls::TlsAcceptor;
use tracing::{error, info, warn};

use super::{
    super::certificate_files::{CHECK_INTERVAL, Certificates},
    clients::{Activity, Clients},
    collect::Collector,
    health::Health,
    write_deadline::WriteDeadline,
};
use crate::config::CertificateFiles;

/// Largest number of threads that read values for answers.
const MAX_READERS: usize = 2;
/// Time for a TLS handshake, and for the head of a request.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);
/// Longest request head, bytes.
const MAX_HEAD: usize = 16 * 1024;
/// Time within which an answer must be ready.
const ANSWER_DEADLINE: Duration = Duration::from_secs(15);
/// Time within which a client must accept a whole answer. It also bounds how long a slow client keeps the text of an
/// old scrape in memory.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);
/// Life of a connection after which it ends with its present answer.
const MAX_LIFETIME: Duration = Duration::from_secs(600);
/// Interval between two attempts to listen.
const LISTEN_RETRY: Duration = Duration::from_secs(5);

/// Starts the thread of the server. If the address cannot be used, the thread tries it again until it can: a metrics
/// server that does not listen must not keep the daemon from enforcing.
pub(super) fn run(
    address: SocketAddr,
    tls: Option<CertificateFiles>,
    collector: Arc<Collector>,
    clients: Arc<Clients>,
) -> io::Result<()> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_READERS)
        .thread_name("metrics-read")
        .build()?;
    thread::Builder::new().name("metrics".into()).spawn(move || {
        runtime.block_on(async {
            let certificates = tls.map(|files| Arc::new(Certificates::new(files)));
            if let Some(certificates) = &certificates {
                tokio::spawn(watch(Arc::clone(certificates), Arc::clone(&collector)));
            }
            let listener = listen(address, &collector).await;
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => accept(stream, certificates.as_ref(), &collector, &clients),
                    Err(error) => {
                        warn!(%error, "a client of the metrics server cannot be accepted");
                        // The process probably has no free file descriptor (EMFILE). An immediate retry would fail too.
                        time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        });
    })?;
    Ok(())
}

async fn listen(address: SocketAddr, collector: &Collector) -> TcpListener {
    let mut reported = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                collector.set_problem("listen", None);
                info!(%address, "metrics are served");
                return listener;
            }
            Err(error) => {
                if !reported {
                    error!(%address, %error, "the metrics server cannot listen; it tries again");
                    reported = true;
                }
                let problem = format!("{address}: {error}; metrics are not served");
                collector.set_problem("listen", Some(problem));
                time::sleep(LISTEN_RETRY).await;
            }
        }
    }
}

/// Reports problems of the certificates, and reads changed files.
async fn watch(certificates: Arc<Certificates>, collector: Arc<Collector>) {
    loop {
        collector.set_problem("tls_certificate", certificates.problem());
        collector.set_certificates(certificates.expiries());
        loop {
            time::sleep(CHECK_INTERVAL).await;
            if certificates.refresh() {
                break;
            }
        }
    }
}

fn accept(
    stream: TcpStream,
    certificates: Option<&Arc<Certificates>>,
    collector: &Arc<Collector>,
    clients: &Arc<Clients>,
) {
    let collector = Arc::clone(collector);
    let certificates = certificates.map(Arc::clone);
    clients.admit(|activity| async move {
        let Some(certificates) = certificates else {
            serve(stream, collector, activity).await;
            return;
        };
        // Without a usable certificate the connection is closed.
        let Some(config) = certificates.config() else {
            return;
        };
        let handshake = TlsAcceptor::from(config).accept(stream);
        if let Ok(Ok(stream)) = time::timeout(HEAD_DEADLINE, handshake).await {
            serve(stream, collector, activity).await;
        }
    });
}

async fn serve<S>(stream: S, collector: Arc<Collector>, activity: Arc<Activity>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    activity.is_established.store(true, Ordering::SeqCst);
    let service = service_fn(|request| {
        let (collector, activity) = (Arc::clone(&collector), Arc::clone(&activity));
        async move {
            // Cleared by the stream when the peer has accepted the answer.
            activity.is_busy.store(true, Ordering::SeqCst);
            Ok::<_, Infallible>(answer(&request, collector).await)
        }
    });
    let stream = WriteDeadline::new(stream, WRITE_DEADLINE, Arc::clone(&activity));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    // An error means that the client broke the protocol, was slow or has gone; the connection ends in each case.
    if time::timeout(MAX_LIFETIME, connection.as_mut()).await.is_err() {
        connection.as_mut().graceful_shutdown();
        let _ = time::timeout(ANSWER_DEADLINE, connection).await;
    }
}

type Answer = Response<Full<Bytes>>;

async fn answer(request: &Request<Incoming>, collector: Arc<Collector>) -> Answer {
    let path = request.uri().path();
    if !["/metrics", "/healthz", "/readyz"].contains(&path) {
        return text(
            StatusCode::NOT_FOUND,
            "there are /metrics, /healthz and /readyz\n",
        );
    }
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are possible\n");
        response
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match path {
        "/healthz" => of_health(collector.alive()),
        "/readyz" => match read(move || collector.ready()).await {
            Some(health) => of_health(health),
            None => late(),
        },
        _ => {
            let accept: Vec<&str> = request
                .headers()
                .get_all(ACCEPT)
                .iter()
                .filter_map(|value| value.to_str().ok())
                .collect();
            let format = Format::of_accept(&accept.join(","));
            match scrape(collector, format).await {
                Some(metrics) => response(StatusCode::OK, format.content_type(), metrics),
                None => late(),
            }
        }
    }
}

/// Returns the metrics as text. Reads them for one client at a time, so that scrapes never occupy all of the
/// [`MAX_READERS`] threads and `/readyz` is answered meanwhile.
async fn scrape(collector: Arc<Collector>, format: Format) -> Option<Bytes> {
    static TURN: Semaphore = Semaphore::const_new(1);
    let turn = time::timeout(ANSWER_DEADLINE, TURN.acquire()).await.ok()?.ok()?;
    read(move || {
        // Held until the values are read, also if the client does not wait for them.
        let _turn = turn;
        collector.scrape(format)
    })
    .await
}

/// Runs a function that can wait, on another thread. Returns `None` if its result is late.
async fn read<T: Send + 'static>(function: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let result = time::timeout(ANSWER_DEADLINE, tokio::task::spawn_blocking(function)).await;
    result.ok()?.ok()
}

fn late() -> Answer {
    text(
        StatusCode::SERVICE_UNAVAILABLE,
        "the values could not be read in time\n",
    )
}

fn of_health(health: Health) -> Answer {
    let status = if health.is_good {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    response(status, "application/json", format!("{}\n", health.body).into())
}

fn text(status: StatusCode, text: &'static str) -> Answer {
    response(
        status,
        "text/plain; charset=utf-8",
        Bytes::from_static(text.as_bytes()),
    )
}

fn response(status: StatusCode, content_type: &'static str, body: Bytes) -> Answer {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_status_of_an_answer_says_whether_the_daemon_is_healthy() {
        for (is_good, status) in [(true, 200), (false, 503)] {
            let answer = of_health(Health {
                is_good,
                body: json!({"status": "x"}),
            });
            assert_eq!(answer.status().as_u16(), status);
            assert_eq!(answer.headers()[CONTENT_TYPE], "application/json");
        }
    }
}
