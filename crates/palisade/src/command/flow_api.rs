//! Client of the flow API: flows, nodes and namespaces of another node of Palisade or Cilium, or of a relay.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use hyper::{Uri, client::conn::http2::Builder, http::uri::PathAndQuery};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use palisade_hubble::{
    json,
    wire::{Codec, Encoded},
};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    runtime::Runtime,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tonic::{Streaming, client::Grpc};

use crate::{cli::ServerArgs, grpc::Connection};

/// Longest time for a connection and its handshakes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the next message of an answer that ends.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Time without a message after which a ping is sent, and longest wait for its answer.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// Where a server is.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Place {
    Unix(PathBuf),
    Tcp { host: String, port: u16, tls: bool },
}

impl Place {
    fn of(server: &ServerArgs) -> anyhow::Result<Self> {
        let text = server.server.as_deref().unwrap_or_default();
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') {
                bail!("--server {text}: write unix:///PATH");
            }
            if server.wants_tls() {
                bail!("--server {text}: a unix socket has no TLS");
            }
            return Ok(Self::Unix(path.into()));
        }
        let (address, tls) = match text.split_once("://") {
            Some(("tls", address)) => (address, true),
            Some(("tcp", address)) => (address, server.wants_tls()),
            Some((other, _)) => bail!("--server {text}: {other} is none of unix, tcp and tls"),
            None => (text, server.wants_tls()),
        };
        let wrong = || format!("--server {text}: write HOST:PORT, tls://HOST:PORT or unix:///PATH");
        let (host, port) = address.rsplit_once(':').with_context(wrong)?;
        let port = port.parse().ok().filter(|port| *port != 0).with_context(wrong)?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(host) => host,
            None if host.contains(':') => {
                bail!("--server {text}: write an IPv6 address in brackets: [{host}]:{port}")
            }
            None => host,
        };
        if host.is_empty() {
            bail!(wrong());
        }
        Ok(Self::Tcp {
            host: host.to_owned(),
            port,
            tls,
        })
    }
}

/// A connection to a server.
pub(super) struct FlowApi {
    runtime: Runtime,
    grpc: Grpc<Connection>,
    /// The address, for errors.
    server: String,
}

impl FlowApi {
    /// Connects to a server.
    ///
    /// # Errors
    /// The address or a file is wrong, or the server cannot be reached.
    pub(super) fn connect(server: &ServerArgs) -> anyhow::Result<Self> {
        let place = Place::of(server)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("the runtime of the connection")?;
        let address = server.server.clone().unwrap_or_default();
        let connected = runtime.block_on(async {
            timeout(CONNECT_TIMEOUT, connect(&place, server))
                .await
                .unwrap_or_else(|_| bail!("no connection after {CONNECT_TIMEOUT:?}"))
        });
        Ok(Self {
            grpc: connected.with_context(|| address.clone())?,
            runtime,
            server: address,
        })
    }

    /// Calls a method of the observer with one answer: `GetNodes` has the messages `observer.GetNodesRequest` and
    /// `observer.GetNodesResponse`.
    ///
    /// # Errors
    /// The server refuses the request or does not answer.
    pub(super) fn call(&mut self, method: &'static str) -> anyhow::Result<Value> {
        let request = self.request(method, &Value::Object(serde_json::Map::new()))?;
        let grpc = &mut self.grpc;
        let answer = async {
            grpc.ready().await.map_err(|error| error.to_string())?;
            let answer = grpc.unary(request, path(method)?, Codec::default()).await;
            answer
                .map(tonic::Response::into_inner)
                .map_err(|status| text(&status))
        };
        let answered = self
            .runtime
            .block_on(async { timeout(ANSWER_TIMEOUT, answer).await });
        let answer: Result<Encoded, String> = answered.unwrap_or_else(|_| Err("no answer".to_owned()));
        answer
            .and_then(|answer| json::decode(&format!("observer.{method}Response"), &answer))
            .map_err(|problem| anyhow::anyhow!("{}: {problem}", self.server))
    }

    /// Calls a method of the observer with a stream of answers, each of which is passed to `each` until it returns false.
    /// `follow`: the stream has no end.
    ///
    /// # Errors
    /// The server refuses the request, does not answer, or ends a stream without an end; or the first error of `each`.
    pub(super) fn stream(
        &mut self,
        method: &'static str,
        request: &Value,
        follow: bool,
        mut each: impl FnMut(Value) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let request = self.request(method, request)?;
        let problem = |problem: String| anyhow::anyhow!("{}: {problem}", self.server);
        let grpc = &mut self.grpc;
        let begin = async {
            grpc.ready().await.map_err(|error| error.to_string())?;
            let answer = grpc
                .server_streaming(request, path(method)?, Codec::default())
                .await;
            answer
                .map(tonic::Response::into_inner)
                .map_err(|status| text(&status))
        };
        let begun = self
            .runtime
            .block_on(async { timeout(ANSWER_TIMEOUT, begin).await });
        let begun: Result<Streaming<Encoded>, String> = begun.unwrap_or_else(|_| Err("no answer".to_owned()));
        let mut answers = begun.map_err(problem)?;
        let name = format!("observer.{method}Response");
        loop {
            let next = self.runtime.block_on(async {
                match follow {
                    true => Ok(answers.message().await),
                    false => timeout(ANSWER_TIMEOUT, answers.message()).await,
                }
            });
            let next = next.map_err(|_| problem("no answer".to_owned()))?;
            match next.map_err(|status| problem(text(&status)))? {
                Some(answer) => each(json::decode(&name, &answer).map_err(problem)?)?,
                None if follow => return Err(problem("the server has ended the stream".to_owned())),
                None => return Ok(()),
            }
        }
    }

    fn request(&self, method: &str, content: &Value) -> anyhow::Result<tonic::Request<Encoded>> {
        let message = json::encode(&format!("observer.{method}Request"), content).map_err(|problem| {
            anyhow::anyhow!("{}: the flow API has no such filter: {problem}", self.server)
        })?;
        Ok(tonic::Request::new(message))
    }
}

fn path(method: &str) -> Result<PathAndQuery, String> {
    PathAndQuery::try_from(format!("/observer.Observer/{method}")).map_err(|error| error.to_string())
}

fn text(status: &tonic::Status) -> String {
    match status.message() {
        "" => status.code().to_string(),
        message => format!("{} ({})", message, status.code()),
    }
}

async fn connect(place: &Place, server: &ServerArgs) -> anyhow::Result<Grpc<Connection>> {
    match place {
        Place::Unix(path) => http2(UnixStream::connect(path).await?).await,
        Place::Tcp { host, port, tls } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await?;
            stream.set_nodelay(true)?;
            if !tls {
                return http2(stream).await;
            }
            let config = client_config(server)?;
            let name = server.tls_server_name.as_ref().unwrap_or(host);
            let name = ServerName::try_from(name.clone())
                .with_context(|| format!("{name} is no name of a server; --tls-server-name"))?;
            http2(TlsConnector::from(Arc::new(config)).connect(name, stream).await?).await
        }
    }
}

async fn http2<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
    stream: S,
) -> anyhow::Result<Grpc<Connection>> {
    let (sender, connection) = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .handshake(TokioIo::new(stream))
        .await?;
    // The requests of the connection report its errors.
    tokio::spawn(async move { drop(connection.await) });
    Ok(Grpc::with_origin(
        Connection(sender),
        Uri::from_static("http://localhost"),
    ))
}

/// Returns the TLS settings of the options.
fn client_config(server: &ServerArgs) -> anyhow::Result<ClientConfig> {
    if server.tls_ca_cert_files.is_empty() {
        bail!("TLS needs the CAs that the server's certificate may be of: --tls-ca-cert-files FILE");
    }
    let mut roots = RootCertStore::empty();
    for path in &server.tls_ca_cert_files {
        for certificate in certificates(path)? {
            roots
                .add(certificate)
                .with_context(|| format!("{}: a certificate is no usable CA", path.display()))?;
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match (&server.tls_client_cert_file, &server.tls_client_key_file) {
        (Some(certificate), Some(key)) => {
            let private = PrivateKeyDer::from_pem_slice(&read(key)?)
                .map_err(|error| anyhow::anyhow!("{}: no private key in PEM: {error}", key.display()))?;
            builder
                .with_client_auth_cert(certificates(certificate)?, private)
                .with_context(|| format!("{}, {}", certificate.display(), key.display()))?
        }
        _ => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    let list =
        list.map_err(|error| anyhow::anyhow!("{}: no certificates in PEM: {error}", path.display()))?;
    if list.is_empty() {
        bail!("{}: there is no certificate in PEM", path.display());
    }
    Ok(list)
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_hubble() {
        let place = |text: &str| {
            Place::of(&ServerArgs {
                server: Some(text.to_owned()),
                ..ServerArgs::default()
            })
        };
        let tcp = |host: &str, port, tls| Place::Tcp {
            host: host.to_owned(),
            port,
            tls,
        };
        assert_eq!(place("localhost:4245").unwrap(), tcp("localhost", 4245, false));
        assert_eq!(place("tcp://10.0.0.1:80").unwrap(), tcp("10.0.0.1", 80, false));
        assert_eq!(place("tls://node1:4244").unwrap(), tcp("node1", 4244, true));
        assert_eq!(place("[fd00::1]:4244").unwrap(), tcp("fd00::1", 4244, false));
        for path in ["unix:///run/hubble.sock", "unix:/run/hubble.sock"] {
            assert_eq!(place(path).unwrap(), Place::Unix("/run/hubble.sock".into()));
        }
        for wrong in [
            "",
            "node1",
            ":4244",
            "node1:0",
            "node1:http",
            "fd00::1:4244",
            "unix://x",
            "http://a:1",
        ] {
            let error = place(wrong).unwrap_err().to_string();
            assert!(error.starts_with(&format!("--server {wrong}: ")), "{error}");
        }
        let with_ca = |text: &str| ServerArgs {
            server: Some(text.to_owned()),
            tls_ca_cert_files: vec!["ca.crt".into()],
            ..ServerArgs::default()
        };
        assert_eq!(Place::of(&with_ca("a:1")).unwrap(), tcp("a", 1, true));
        assert!(Place::of(&with_ca("unix:///a")).is_err());
        let tls = ServerArgs {
            server: Some("a:1".to_owned()),
            tls: true,
            ..ServerArgs::default()
        };
        let error = client_config(&tls).unwrap_err().to_string();
        assert!(error.contains("--tls-ca-cert-files"), "{error}");
    }
}
