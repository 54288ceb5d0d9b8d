//! Servers, proxies and clients of intercepted TLS, in the namespaces of a testbed.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Path as FilePath, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt::RcvBuf};
use palisade_testbed::{
    Ns, Topology,
    daemon::{Daemon, Settings},
    ns::temp_dir,
    server::Program,
    topology::{INTERNET_V4, NODE_V4, WorkloadSpec},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, ProtocolVersion, RootCertStore, StreamOwned,
    client::Resumption, crypto::aws_lc_rs, pki_types::ServerName, version::TLS13,
};
use tempfile::TempDir;

use crate::{
    memory::resident,
    report::Samples,
    web::{self, BLOB, Between, DENIED, HTTPS, ITEM, Load, NAME, patterns, run},
};

/// Port of a proxy at which each client's connection gets its own connection to the server.
pub(crate) const OWN: u16 = 8_443;
/// Patterns in the rule set.
pub(crate) const PATTERNS: usize = 10;
/// Connections of wrk, and threads that make handshakes.
pub(crate) const CONNECTIONS: usize = 16;
/// Connections of h2load.
pub(crate) const H2_CONNECTIONS: usize = 4;
/// Concurrent streams of one of h2load's connections.
pub(crate) const STREAMS: usize = 100;
/// Body of an allowed response.
const BODY: &str = "an item\n";
/// Method of the gRPC server: an allowed path.
const METHOD: &str = "/api/v1/items/call";
/// A message of gRPC: not compressed, 16 bytes.
const MESSAGE: &[u8] = b"\0\0\0\0\x10sixteen bytes ok";
/// Options of curl and h2load for the fields of a call.
const CALL_FIELDS: [&str; 4] = ["-H", "content-type: application/grpc", "-H", "te: trailers"];
/// The gRPC server.
const CALL_SERVER: &str = include_str!("call_server.py");
/// The addon of mitmproxy that refuses requests.
const REFUSE: &str = include_str!("refuse.py");
/// Bytes of the body that a client of a busy connection reads before it stops.
const READ: usize = 256 << 10;
/// Timeout of one exchange.
const WAIT: Duration = Duration::from_secs(20);

/// Returns the name of a variant without a pool of connections to the server.
pub(crate) const fn own_name(between: Between) -> &'static str {
    match between {
        Between::Nothing | Between::Palisade => between.name(),
        Between::Envoy => "Envoy, one server connection for each client",
        Between::Haproxy => "haproxy, one server connection for each client",
        Between::Mitmproxy => between.name(),
    }
}

/// A certificate authority and a certificate of the server's name that it has signed.
struct Pki {
    authority: rcgen::Certificate,
    authority_key: String,
    certificate: String,
    key: String,
}

impl Pki {
    fn new(name: &str) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate()?;
        let authority = params.self_signed(&key)?;
        let authority_key = key.serialize_pem();
        let issuer = Issuer::new(params, key);
        let mut params = CertificateParams::new(vec![NAME.to_owned(), format!("*.{NAME}")])?;
        params.distinguished_name.push(DnType::CommonName, NAME);
        let key = KeyPair::generate()?;
        Ok(Self {
            authority,
            authority_key,
            certificate: params.signed_by(&key, &issuer)?.pem(),
            key: key.serialize_pem(),
        })
    }
}

/// Writes a file that only root can read.
fn private(path: &FilePath, contents: &str) -> Result<()> {
    let mut options = File::options();
    let file = options
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(path);
    let mut file = file.with_context(|| path.display().to_string())?;
    Ok(file.write_all(contents.as_bytes())?)
}

/// Writes the secrets `default/shown` and `default/trusted`. Returns their folder.
/// With `made`, `shown` is the authority.
fn secrets(dir: &FilePath, world: &Pki, shown: &Pki, made: bool) -> Result<PathBuf> {
    let folder = dir.join("secrets");
    let authority = shown.authority.pem();
    let (certificate, key) = if made {
        (&authority, &shown.authority_key)
    } else {
        (&shown.certificate, &shown.key)
    };
    let files = [
        ("shown", "tls.crt", certificate),
        ("shown", "tls.key", key),
        ("trusted", "ca.crt", &world.authority.pem()),
    ];
    for (secret, file, contents) in files {
        let secret = folder.join("default").join(secret);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&secret)?;
        private(&secret.join(file), contents)?;
    }
    Ok(folder)
}

fn policy() -> String {
    let mut text = format!(
        "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: client}}
spec:
  endpointSelector: {{matchLabels: {{app: client}}}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{{port: \"{HTTPS}\", protocol: TCP}}]
      terminatingTLS: {{secret: {{namespace: default, name: shown}}}}
      originatingTLS: {{secret: {{namespace: default, name: trusted}}}}
      rules:
        http:
"
    );
    for pattern in patterns(PATTERNS) {
        let _ = writeln!(text, "        - {{method: \"GET|POST\", path: {pattern:?}}}");
    }
    text
}

fn envoy_configuration(dir: &FilePath) -> String {
    let dir = dir.display();
    let policies = web::rbac_policies(PATTERNS);
    let mut text = String::from("static_resources:\n  listeners:\n");
    for (port, cluster) in [(HTTPS, "shared"), (OWN, "own")] {
        let _ = write!(
            text,
            "  - address: {{socket_address: {{address: {NODE_V4}, port_value: {port}}}}}
    filter_chains:
    - transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            alpn_protocols: [h2, http/1.1]
            tls_certificates:
            - {{certificate_chain: {{filename: {dir}/shown.pem}}, private_key: {{filename: {dir}/shown.pem}}}}
      filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: {cluster}
          route_config:
            virtual_hosts:
            - name: all
              domains: [\"*\"]
              routes:
              - match: {{prefix: \"/\"}}
                route: {{cluster: {cluster}, timeout: 0s}}
          http_filters:
          - name: envoy.filters.http.rbac
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
              rules:
                action: ALLOW
                policies:{policies}
          - name: envoy.filters.http.router
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
"
        );
    }
    text.push_str("  clusters:\n");
    for (cluster, own) in [("shared", false), ("own", true)] {
        // The default limits of a cluster are below the number of idle connections that the measure opens.
        let _ = write!(
            text,
            "  - name: {cluster}
    type: STATIC
    connection_pool_per_downstream_connection: {own}
    circuit_breakers:
      thresholds:
      - {{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000}}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        use_downstream_protocol_config: {{http_protocol_options: {{}}, http2_protocol_options: {{}}}}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: {NAME}
        max_session_keys: 0
        common_tls_context:
          tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
          validation_context:
            trusted_ca: {{filename: {dir}/world.pem}}
            match_typed_subject_alt_names: [{{san_type: DNS, matcher: {{exact: {NAME}}}}}]
    load_assignment:
      cluster_name: {cluster}
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: {INTERNET_V4}, port_value: {HTTPS}}}}}}}
"
        );
    }
    text
}

fn haproxy_configuration(dir: &FilePath) -> String {
    let dir = dir.display();
    let list = web::path_list(PATTERNS);
    let mut text = String::from(
        "\
global
    maxconn 8192
defaults
    mode http
    timeout connect 10s
    timeout client 10m
    timeout server 10m
",
    );
    for (port, pool) in [(HTTPS, "shared"), (OWN, "own")] {
        let _ = write!(
            text,
            "\
frontend {pool}
    bind {NODE_V4}:{port} ssl crt {dir}/shown.pem alpn h2,http/1.1
{list}    use_backend {pool}-h2 if {{ ssl_fc_alpn h2 }}
    default_backend {pool}-h1
"
        );
        let reuse = if pool == "own" { "never" } else { "always" };
        for (name, protocol) in [("h1", "http/1.1"), ("h2", "h2")] {
            let _ = write!(
                text,
                "\
backend {pool}-{name}
    http-reuse {reuse}
    server server {INTERNET_V4}:{HTTPS} ssl verify required ca-file {dir}/world.pem sni str({NAME}) verifyhost {NAME} alpn {protocol} no-ssl-reuse
"
            );
        }
    }
    text
}

/// Starts the gRPC server.
fn call_server(ns: &Ns, dir: &FilePath, world: &Pki) -> Result<Program> {
    let file = |name: &str| dir.join(name).display().to_string();
    private(&dir.join("server.crt"), &world.certificate)?;
    private(&dir.join("server.key"), &world.key)?;
    fs::write(file("call_server.py"), CALL_SERVER)?;
    let python = web::grpcio()?.display().to_string();
    let (address, port) = (INTERNET_V4.to_string(), HTTPS.to_string());
    let args = [
        &file("call_server.py"),
        &file("server.crt"),
        &file("server.key"),
        &address,
        &port,
    ];
    let args = [&args.map(String::as_str)[..], &[METHOD]].concat();
    let at = Some(SocketAddr::new(INTERNET_V4.into(), HTTPS));
    Program::start(ns, &python, &args, at).context("the gRPC server")
}

fn nginx(ns: &Ns, dir: &FilePath, world: &Pki, blob: u64) -> Result<Program> {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    // nginx closes an HTTP/2 connection that opens more than twice `http2_max_concurrent_streams` in one turn of its event
    // loop, against rapid reset. With the default of 128, a proxy that shares one connection among clients can exceed that.
    let file = dir.join(BLOB.trim_start_matches('/'));
    fs::create_dir_all(file.parent().context("a folder")?)?;
    File::create(&file)?.set_len(blob)?;
    private(&dir.join("server.pem"), &(world.certificate.clone() + &world.key))?;
    let configuration = format!(
        "\
master_process off;
daemon off;
pid {0}/nginx.pid;
error_log stderr;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  sendfile on;
  keepalive_requests 100000000;
  keepalive_timeout 600s;
  client_body_temp_path {0}/body; proxy_temp_path {0}/proxy; fastcgi_temp_path {0}/fastcgi;
  uwsgi_temp_path {0}/uwsgi; scgi_temp_path {0}/scgi;
  server {{
    listen {INTERNET_V4}:{HTTPS} ssl http2 backlog=4096;
    http2_max_concurrent_streams 1024;
    ssl_certificate {0}/server.pem;
    ssl_certificate_key {0}/server.pem;
    ssl_protocols TLSv1.3;
    ssl_session_tickets off;
    root {0};
    location = {BLOB} {{ }}
    location / {{ return 200 \"an item\\n\"; }}
  }}
}}
",
        dir.display()
    );
    let path = |name: &str| dir.join(name).display().to_string();
    fs::write(path("nginx.conf"), configuration)?;
    Program::start(
        ns,
        "nginx",
        &["-e", "stderr", "-p", &path(""), "-c", &path("nginx.conf")],
        Some(SocketAddr::new(INTERNET_V4.into(), HTTPS)),
    )
}

/// Starts mitmproxy in front of the server.
fn mitmproxy(ns: &Ns, dir: &FilePath) -> Result<Program> {
    let file = |name: &str| dir.join(name).display().to_string();
    fs::write(file("refuse.py"), REFUSE)?;
    let list: Vec<String> = patterns(PATTERNS).collect();
    let variable = format!("PALISADE_BENCH_PATTERNS={}", list.join("\n"));
    let program = web::mitmproxy()?.display().to_string();
    let (server, certificate) = (
        format!("reverse:https://{INTERNET_V4}:{HTTPS}"),
        format!("certs=*={}", file("shown.pem")),
    );
    let (trusted, state) = (
        format!("ssl_verify_upstream_trusted_ca={}", file("world.pem")),
        format!("confdir={}", file("mitmproxy")),
    );
    let (address, port) = (NODE_V4.to_string(), HTTPS.to_string());
    let args = [
        &variable,
        &program,
        "-q",
        "--mode",
        &server,
        "--listen-host",
        &address,
        "--listen-port",
        &port,
        "--set",
        &certificate,
        "--set",
        &trusted,
        "--set",
        &state,
        "--set",
        "keep_host_header=true",
        "--set",
        "stream_large_bodies=1m",
        "-s",
        &file("refuse.py"),
    ];
    Program::start(ns, "env", &args, Some(SocketAddr::new(NODE_V4.into(), HTTPS)))
}

/// A client of TLS 1.3 that resumes no session and checks the certificate.
#[derive(Clone)]
pub(crate) struct Client {
    ns: Ns,
    tls: Arc<ClientConfig>,
    at: SocketAddr,
}

impl Client {
    fn new(ns: &Ns, at: SocketAddr, trusted: &Pki) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(trusted.authority.der().clone())?;
        let mut tls = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.resumption = Resumption::disabled();
        Ok(Self {
            ns: ns.clone(),
            tls: Arc::new(tls),
            at,
        })
    }

    /// Connects. The calling thread must be in the client's namespace.
    fn connect(&self, name: String) -> Result<StreamOwned<ClientConnection, TcpStream>> {
        let socket = TcpStream::connect_timeout(&self.at, WAIT)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(WAIT))?;
        socket.set_write_timeout(Some(WAIT))?;
        let tls = ClientConnection::new(Arc::clone(&self.tls), ServerName::try_from(name)?)?;
        Ok(StreamOwned::new(tls, socket))
    }

    /// Connects, requests the large file, and stops after the first bytes of its body.
    fn stall(&self) -> Result<StreamOwned<ClientConnection, TcpStream>> {
        let mut stream = self.connect(NAME.to_owned())?;
        // The kernel's memory does not count, so little of it is needed.
        setsockopt(&stream.sock, RcvBuf, &(64 << 10))?;
        write!(stream, "GET {BLOB} HTTP/1.1\r\nHost: {NAME}\r\n\r\n")?;
        let mut body = vec![0; READ];
        stream.read_exact(&mut body)?;
        ensure!(body.starts_with(b"HTTP/1.1 200"), "not the large file");
        Ok(stream)
    }

    /// Connects and gets one item. With `close`, reads to the end of the connection, which the server closes. The calling
    /// thread must be in the client's namespace.
    fn exchange(&self, name: String, close: bool) -> Result<StreamOwned<ClientConnection, TcpStream>> {
        let mut stream = self.connect(name)?;
        let connection = if close { "close" } else { "keep-alive" };
        write!(
            stream,
            "GET {ITEM} HTTP/1.1\r\nHost: {NAME}\r\nConnection: {connection}\r\n\r\n"
        )?;
        let (mut response, mut part) = (Vec::new(), [0; 4096]);
        while close || !response.ends_with(BODY.as_bytes()) {
            match stream.read(&mut part) {
                Ok(0) => break,
                Ok(count) => response.extend_from_slice(&part[..count]),
                // Without close_notify; what counts is whether the response is complete.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(error.into()),
            }
        }
        ensure!(
            response.starts_with(b"HTTP/1.1 200") && response.ends_with(BODY.as_bytes()),
            "not the item: {:?}",
            String::from_utf8_lossy(&response)
        );
        ensure!(
            stream.conn.handshake_kind() == Some(HandshakeKind::Full)
                || stream.conn.handshake_kind() == Some(HandshakeKind::FullWithHelloRetryRequest),
            "not a full handshake"
        );
        ensure!(
            stream.conn.protocol_version() == Some(ProtocolVersion::TLSv1_3),
            "not TLS 1.3"
        );
        Ok(stream)
    }

    /// Runs `work` on threads in the namespace. Returns the results.
    fn threads<T: Send>(&self, count: usize, work: impl Fn() -> Result<Vec<T>> + Sync) -> Result<Vec<T>> {
        thread::scope(|scope| {
            let one = || {
                self.ns.join()?;
                work()
            };
            let threads: Vec<_> = (0..count).map(|_| scope.spawn(one)).collect();
            let mut all = Vec::new();
            for thread in threads {
                all.extend(thread.join().map_err(|_| anyhow!("a thread has panicked"))??);
            }
            Ok(all)
        })
    }

    /// Makes full handshakes with one request each, [`CONNECTIONS`] at a time.
    pub(crate) fn handshakes(&self, duration: Duration) -> Result<Load> {
        self.handshakes_with(duration, || NAME.to_owned())
    }

    /// As [`Self::handshakes`], but each connection is for a name of its own.
    pub(crate) fn new_names(&self, duration: Duration) -> Result<Load> {
        // A proxy that has seen names in an earlier round keeps their certificates.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        self.handshakes_with(duration, || format!("{}.{NAME}", NEXT.fetch_add(1, Relaxed)))
    }

    fn handshakes_with(&self, duration: Duration, name: impl Fn() -> String + Sync) -> Result<Load> {
        let begin = Instant::now();
        let times = self.threads(CONNECTIONS, || {
            let mut times = Vec::new();
            while begin.elapsed() < duration {
                let begin = Instant::now();
                self.exchange(name(), true)?;
                times.push(begin.elapsed().as_secs_f64() * 1e6);
            }
            Ok(times)
        })?;
        let seconds = begin.elapsed().as_secs_f64();
        let mut samples = Samples::new();
        times.into_iter().for_each(|time| samples.push(time));
        Ok(Load {
            rate: samples.len() as f64 / seconds,
            p50: samples.median(),
            p99: samples.quantile(0.99),
        })
    }

    /// Opens connections, gets an item on each, and leaves them open.
    fn idle(&self, count: usize) -> Result<Vec<StreamOwned<ClientConnection, TcpStream>>> {
        self.open(count, || self.exchange(NAME.to_owned(), false))
    }

    /// Opens connections on each of which a response waits for its client.
    fn busy(&self, count: usize) -> Result<Vec<StreamOwned<ClientConnection, TcpStream>>> {
        self.open(count, || self.stall())
    }

    fn open<T: Send>(&self, count: usize, one: impl Fn() -> Result<T> + Sync) -> Result<Vec<T>> {
        const THREADS: usize = 8;
        self.threads(THREADS, || (0..count / THREADS).map(|_| one()).collect())
    }
}

/// Returns requests a second in h2load's output, of which all must have a status of this class.
fn streams(text: &str, class: &str, seconds: u32) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("status codes: "));
    let mut rate = None;
    for part in line.context("no status codes")?.split(", ") {
        let (count, of) = part.split_once(' ').context("no class")?;
        let count: f64 = count.parse()?;
        if of == class {
            rate = Some(count / f64::from(seconds));
        } else {
            ensure!(count == 0.0, "statuses that are not {class}");
        }
    }
    ensure!(
        text.contains("TLS Protocol: TLSv1.3") && text.contains("Application protocol: h2"),
        "not HTTP/2 over TLS 1.3"
    );
    rate.filter(|rate| *rate > 0.0).context("no request")
}

/// What a path is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// nginx with a large file of this size.
    Web(u64),
    /// nginx. Palisade makes a certificate for each name.
    NewNames,
    /// A gRPC server.
    Calls,
}

/// A client in a workload, a server behind the NIC, and what is between them.
pub(crate) struct Path {
    pub(crate) between: Between,
    topology: Topology,
    daemon: Option<Daemon>,
    proxy: Option<Program>,
    server: Program,
    trusted: Pki,
    purpose: Purpose,
    dir: TempDir,
}

impl Path {
    pub(crate) fn new(between: Between, purpose: Purpose) -> Result<Self> {
        let topology = Topology::new()?.workload(WorkloadSpec::new("client").label("app", "client"))?;
        topology.meet()?;
        for ns in [&topology.get("client").ns, &topology.node] {
            // Connections that have ended occupy a port for a minute.
            ns.sysctl("ipv4/ip_local_port_range", "10000 65535")?;
            ns.sysctl("ipv4/tcp_tw_reuse", "1")?;
        }
        let dir = temp_dir("intercept")?;
        let (world, shown) = (Pki::new("world")?, Pki::new("interception")?);
        let server = match purpose {
            Purpose::Web(blob) => nginx(&topology.internet, dir.path(), &world, blob)?,
            Purpose::NewNames => nginx(&topology.internet, dir.path(), &world, 1)?,
            Purpose::Calls => call_server(&topology.internet, dir.path(), &world)?,
        };
        let file = |name: &str| dir.path().join(name);
        fs::write(file("world.pem"), world.authority.pem())?;
        private(&file("shown.pem"), &(shown.certificate.clone() + &shown.key))?;
        let configuration = file("proxy.yaml");
        let name = configuration.display().to_string();
        let at = Some(SocketAddr::new(NODE_V4.into(), HTTPS));
        let (mut daemon, mut proxy) = (None, None);
        match between {
            Between::Nothing => {}
            Between::Palisade => {
                let made = purpose == Purpose::NewNames;
                let folder = secrets(dir.path(), &world, &shown, made)?;
                let authority = if made {
                    "interception_ca = \"default/shown\"\n"
                } else {
                    ""
                };
                let settings = Settings {
                    nic: false,
                    tables: format!("[tls]\nsecrets_dir = {folder:?}\n{authority}"),
                    ..Settings::default()
                };
                daemon = Some(Daemon::start(
                    &topology,
                    &settings,
                    &[("client.yaml", &policy())],
                )?);
            }
            Between::Envoy => {
                fs::write(&configuration, envoy_configuration(dir.path()))?;
                let program = web::envoy()?.display().to_string();
                let args = ["--disable-hot-restart", "-l", "error", "--config-path", &name];
                proxy = Some(Program::start(&topology.node, &program, &args, at).context("Envoy")?);
            }
            Between::Haproxy => {
                fs::write(&configuration, haproxy_configuration(dir.path()))?;
                let args = ["-db", "-f", &name];
                proxy = Some(Program::start(&topology.node, "haproxy", &args, at).context("haproxy")?);
            }
            Between::Mitmproxy => {
                proxy = Some(mitmproxy(&topology.node, dir.path()).context("mitmproxy")?);
            }
        }
        // The client trusts only the certificate of this variant, so a response proves that this variant has sent it.
        let trusted = if between == Between::Nothing { world } else { shown };
        fs::write(file("trusted.pem"), trusted.authority.pem())?;
        let path = Self {
            between,
            topology,
            daemon,
            proxy,
            server,
            trusted,
            purpose,
            dir,
        };
        fs::write(
            path.dir.path().join("hosts"),
            format!("127.0.0.1 localhost\n{} {NAME}\n", path.target()),
        )?;
        path.check().with_context(|| path.report())?;
        Ok(path)
    }

    /// Returns the address that the client connects to.
    fn target(&self) -> Ipv4Addr {
        match self.between {
            Between::Nothing | Between::Palisade => INTERNET_V4,
            Between::Envoy | Between::Haproxy | Between::Mitmproxy => NODE_V4,
        }
    }

    /// Returns the ports at which the variant serves.
    pub(crate) fn ports(&self) -> &'static [u16] {
        match self.between {
            Between::Envoy | Between::Haproxy => &[HTTPS, OWN],
            Between::Nothing | Between::Palisade | Between::Mitmproxy => &[HTTPS],
        }
    }

    pub(crate) fn client(&self, port: u16) -> Result<Client> {
        let at = SocketAddr::new(self.target().into(), port);
        Client::new(&self.topology.get("client").ns, at, &self.trusted)
    }

    fn curl(&self, port: u16, path: &str, args: &[&str]) -> Result<String> {
        let mut command = self.topology.get("client").ns.command("curl");
        command
            .args(["-s", "-S", "-o", "/dev/null", "--cacert"])
            .arg(self.dir.path().join("trusted.pem"))
            .args(["--resolve", &format!("{NAME}:{port}:{}", self.target())])
            .args(args)
            .arg(format!("https://{NAME}:{port}{path}"));
        run(&mut command)
    }

    /// Fails unless an allowed request passes and a denied one is refused, by both versions of HTTP.
    fn check(&self) -> Result<()> {
        if self.purpose == Purpose::Calls {
            return self.check_call();
        }
        let refused = if self.between == Between::Nothing {
            200
        } else {
            403
        };
        for port in self.ports() {
            for (option, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
                for (path, status) in [(ITEM, 200), (DENIED, refused)] {
                    let answer = self.curl(
                        *port,
                        path,
                        &[option, "-m", "10", "-w", "%{http_code} %{http_version}"],
                    )?;
                    ensure!(
                        answer == format!("{status} {version}"),
                        "{path} at port {port} is answered by {answer}, not {status} {version}"
                    );
                }
            }
        }
        Ok(())
    }

    /// Returns logs and status, for errors.
    pub(crate) fn report(&self) -> String {
        let palisade = self.daemon.as_ref().map_or_else(String::new, Daemon::report);
        let proxy = self
            .proxy
            .as_ref()
            .map_or_else(String::new, |proxy| proxy.process.log());
        let server = self.server.process.log();
        format!("{}: {palisade}{proxy}{server}", self.between.name())
    }

    /// Runs wrk with persistent connections.
    pub(crate) fn requests(&self, seconds: u32) -> Result<Load> {
        let mut command = self.with_hosts();
        command
            .args(["wrk", "-t", "1", "--latency", "--timeout", "10"])
            .args(["-c", &CONNECTIONS.to_string(), "-d", &seconds.to_string()])
            .arg(format!("https://{NAME}{ITEM}"));
        let text = run(&mut command).with_context(|| self.report())?;
        ensure!(
            !text.contains("Non-2xx") && !text.contains("Socket errors"),
            "{text}\n{}",
            self.report()
        );
        web::load(&text).with_context(|| format!("wrk: {text}"))
    }

    fn with_hosts(&self) -> Command {
        web::with_hosts(&self.topology.get("client").ns, &self.dir.path().join("hosts"))
    }

    /// Runs h2load. Returns requests a second, all of which must have a status of this class.
    pub(crate) fn streams(&self, path: &str, class: &str, seconds: u32) -> Result<f64> {
        self.load_streams(path, class, seconds, &[])
    }

    fn load_streams(&self, path: &str, class: &str, seconds: u32, more: &[&str]) -> Result<f64> {
        let mut command = self.with_hosts();
        command
            .args(["h2load", "-t", "1", "-c", &H2_CONNECTIONS.to_string()])
            .args(["-m", &STREAMS.to_string(), "-D", &seconds.to_string()])
            .args(more)
            .arg(format!("https://{NAME}{path}"));
        let text = run(&mut command).with_context(|| self.report())?;
        streams(&text, class, seconds).with_context(|| format!("{text}\n{}", self.report()))
    }

    /// Fails unless a call of the gRPC server succeeds.
    fn check_call(&self) -> Result<()> {
        let file = |name: &str| self.dir.path().join(name).display().to_string();
        fs::write(file("message"), MESSAGE)?;
        let (data, heads) = (format!("@{}", file("message")), file("heads"));
        let args = [
            &["--http2", "-m", "10", "-D", &heads][..],
            &CALL_FIELDS,
            &["--data-binary", &data, "-w", "%{size_download}"],
        ]
        .concat();
        let size = self.curl(HTTPS, METHOD, &args)?;
        let fields = fs::read_to_string(&heads)?;
        // gRPC sends its status in the trailers.
        let has_succeeded = fields.lines().any(|line| line.trim() == "grpc-status: 0");
        ensure!(
            size == MESSAGE.len().to_string() && has_succeeded,
            "not an answer of gRPC: {size} bytes, {fields}"
        );
        Ok(())
    }

    /// Runs h2load with unary calls. Returns calls a second.
    pub(crate) fn calls(&self, seconds: u32) -> Result<f64> {
        let data = format!("--data={}", self.dir.path().join("message").display());
        self.load_streams(METHOD, "2xx", seconds, &[&CALL_FIELDS[..], &[&data]].concat())
    }

    /// Downloads the large file. Returns bytes per second.
    pub(crate) fn download(&self) -> Result<f64> {
        let format = "%{http_code} %{size_download} %{speed_download}";
        let text = self
            .curl(HTTPS, BLOB, &["--http1.1", "-m", "300", "-w", format])
            .with_context(|| self.report())?;
        let Purpose::Web(blob) = self.purpose else {
            bail!("there is no large file");
        };
        let speed = text.strip_prefix(&format!("200 {blob} "));
        let speed = speed.with_context(|| format!("{text}: not all {blob} bytes"))?;
        Ok(speed.parse()?)
    }

    /// Returns bytes of resident memory for an idle connection.
    pub(crate) fn idle_memory(&self, connections: usize) -> Result<f64> {
        self.memory(connections, Client::idle)
    }

    /// Returns bytes of resident memory for a connection whose client does not read the rest of a response.
    pub(crate) fn busy_memory(&self, connections: usize) -> Result<f64> {
        self.memory(connections, Client::busy)
    }

    fn memory<T>(&self, connections: usize, open: impl Fn(&Client, usize) -> Result<Vec<T>>) -> Result<f64> {
        let daemon = self.daemon.as_ref().and_then(Daemon::pid);
        let proxy = self.proxy.as_ref().map(|proxy| proxy.process.pid());
        let pid = daemon.or(proxy).context("nothing is between")?;
        let client = self.client(*self.ports().last().context("no port")?)?;
        let open = |count| open(&client, count).with_context(|| self.report());
        // Memory that is in use after the first connections does not belong to a connection.
        drop(open(64)?);
        let before = resident(pid)?;
        let held = open(connections)?;
        // The buffers of the proxy fill up first.
        thread::sleep(Duration::from_millis(500));
        Ok((resident(pid)? - before) / held.len() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "TLS Protocol: TLSv1.3\nApplication protocol: h2\n\
                          status codes: 3000 2xx, 0 3xx, 0 4xx, 0 5xx\n";

    #[test]
    fn what_h2load_says_is_read() {
        assert_eq!(streams(OUTPUT, "2xx", 3).expect("all of it"), 1_000.0);
    }

    #[test]
    fn a_status_of_another_class_is_an_error() {
        assert!(streams(OUTPUT, "4xx", 3).is_err());
        let mixed = OUTPUT.replace("0 5xx", "1 5xx");
        assert!(streams(&mixed, "2xx", 3).is_err());
    }
}
