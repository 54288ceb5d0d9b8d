//! A proxy on loopback with a server behind it, certificates, rules, and a client.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_abi::{Direction, Inspector, PuntRequest};
use palisade_inspect::{Ech, HttpLimits, Rules, record::Record};
use palisade_intercept::{Flow, Flows, Options, Proxy, Reports, Secrets, Settings, Trust};
use palisade_model::{
    rule::{HttpRule, TlsContext},
    snapshot::{Alternative, Matcher, RuleSet},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    sign::{CertifiedKey, SingleCertAndKey},
};

/// Time after which a test gives up. It never decides about the result of a test that passes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// Name of the server.
pub(crate) const NAME: &str = "api.example.test";

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// A CA.
pub(crate) struct Ca {
    pub(crate) der: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    pub(crate) key: PrivateKeyDer<'static>,
}

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        Self::with(name, None)
    }

    fn with(name: &str, parent: Option<&Self>) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![]).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let der = match parent {
            None => params.self_signed(&key),
            Some(parent) => params.signed_by(&key, &parent.issuer),
        };
        let der = der.expect("a certificate").der().clone();
        Self {
            der,
            key: PrivateKeyDer::try_from(key.serialize_der()).expect("a key"),
            issuer: Issuer::new(params, key),
        }
    }

    /// Makes a CA that this one signs.
    pub(crate) fn intermediate(&self, name: &str) -> Self {
        Self::with(name, Some(self))
    }

    /// Makes a certificate for a name or address; `change` can change its contents.
    pub(crate) fn issue(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Arc<CertifiedKey> {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let chain = vec![certificate.der().clone()];
        Arc::new(CertifiedKey::from_der(chain, key, &provider()).expect("a key that fits"))
    }

    /// Returns the CA's own certificate and key.
    pub(crate) fn identity(&self) -> Arc<CertifiedKey> {
        let chain = vec![self.der.clone()];
        Arc::new(CertifiedKey::from_der(chain, self.key.clone_key(), &provider()).expect("a key that fits"))
    }

    pub(crate) fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.der.clone()).expect("a root");
        Arc::new(roots)
    }

    pub(crate) fn trust(&self) -> Trust {
        Trust {
            roots: self.roots(),
            client: None,
        }
    }
}

/// Secrets by the name of the secret.
#[derive(Clone, Default)]
pub(crate) struct TestSecrets {
    pub(crate) identities: BTreeMap<String, Arc<CertifiedKey>>,
    pub(crate) trusts: BTreeMap<String, Trust>,
}

impl Secrets for TestSecrets {
    fn identity(&self, context: &TlsContext) -> Result<Arc<CertifiedKey>, String> {
        self.identities
            .get(&context.secret)
            .cloned()
            .ok_or("no such secret".into())
    }

    fn trust(&self, context: &TlsContext) -> Result<Trust, String> {
        self.trusts
            .get(&context.secret)
            .cloned()
            .ok_or("no such secret".into())
    }
}

/// The flows, and the endpoint that each client belongs to.
pub(crate) struct TestFlows {
    /// `None`: no flow is intercepted.
    pub(crate) request: Mutex<Option<PuntRequest>>,
    /// Number of lookups.
    pub(crate) lookups: AtomicUsize,
    /// Whether the programs have not evaluated the flows under the policy in force.
    pub(crate) is_stale: AtomicBool,
    /// Number of removals of flows.
    pub(crate) removals: AtomicU64,
    /// Endpoint of the clients whose port is in the set.
    pub(crate) endpoints: Mutex<BTreeMap<u16, u16>>,
}

impl Flows for TestFlows {
    fn removals(&self) -> u64 {
        self.removals.load(Ordering::SeqCst)
    }

    fn find(&self, _: Direction, client: SocketAddr, _: SocketAddr) -> Option<Flow> {
        self.lookups.fetch_add(1, Ordering::SeqCst);
        let mut request = (*self.request.lock().expect("the flows"))?;
        if let Some(endpoint) = self.endpoints.lock().expect("the endpoints").get(&client.port()) {
            request.endpoint = *endpoint;
        }
        Some(Flow {
            request,
            ifindex: 3,
            is_evaluated: !self.is_stale.load(Ordering::SeqCst),
        })
    }
}

#[derive(Default)]
pub(crate) struct TestReports(pub(crate) Mutex<Vec<Record>>);

impl Reports for TestReports {
    fn record(&self, record: &Record) {
        self.0.lock().expect("the records").push(*record);
    }
}

/// A rule set with HTTP rules, and TLS towards both sides.
pub(crate) fn http_rules(paths: &[&str]) -> RuleSet {
    RuleSet {
        reads: Inspector::Http as u8,
        alternatives: paths
            .iter()
            .enumerate()
            .map(|(rule, path)| Alternative {
                rule: rule as u32 + 7,
                matcher: Matcher::Http(HttpRule {
                    path: Some((*path).into()),
                    ..HttpRule::default()
                }),
            })
            .collect(),
        terminating_tls: Some(TlsContext {
            secret: "ns/shown".into(),
            ..TlsContext::default()
        }),
        originating_tls: Some(TlsContext {
            secret: "ns/trusted".into(),
            ..TlsContext::default()
        }),
        ..RuleSet::default()
    }
}

/// Everything around one proxy.
pub(crate) struct World {
    pub(crate) proxy: Proxy,
    pub(crate) flows: Arc<TestFlows>,
    pub(crate) reports: Arc<TestReports>,
    pub(crate) settings: Settings,
    pub(crate) secrets: TestSecrets,
    /// CA that the client trusts, and that issues what the proxy shows.
    pub(crate) client_ca: Ca,
    /// CA that the proxy trusts for servers.
    pub(crate) server_ca: Ca,
    pub(crate) sets: BTreeMap<u32, Arc<RuleSet>>,
    server: Arc<Mutex<SocketAddr>>,
}

impl World {
    pub(crate) fn new(set: RuleSet) -> Self {
        Self::with(set, |_, _| {})
    }

    pub(crate) fn with(set: RuleSet, change: impl FnOnce(&mut Settings, &mut Options)) -> Self {
        let (client_ca, server_ca) = (Ca::new("client ca"), Ca::new("server ca"));
        let mut secrets = TestSecrets::default();
        secrets
            .identities
            .insert("ns/shown".into(), client_ca.issue(NAME, |_| {}));
        secrets.identities.insert("ns/ca".into(), client_ca.identity());
        secrets.trusts.insert("ns/trusted".into(), server_ca.trust());
        let sets = BTreeMap::from([(1, Arc::new(set))]);
        let mut settings = Settings {
            rules: Arc::new(Rules::prepare(&sets, None)),
            secrets: Arc::new(secrets.clone()),
            interception_ca: Some("ns/ca".into()),
            http: HttpLimits::default(),
            ech: Ech::default(),
            names: None,
            refuse_nameless: false,
        };
        let mut options = Options {
            threads: 1,
            ..Options::default()
        };
        change(&mut settings, &mut options);
        let request = PuntRequest {
            rule: 5,
            ruleset: 1,
            endpoint: 9,
            inspector: Inspector::TlsTerminate as u8,
            ..PuntRequest::default()
        };
        let flows = Arc::new(TestFlows {
            request: Mutex::new(Some(request)),
            lookups: AtomicUsize::new(0),
            is_stale: AtomicBool::new(false),
            removals: AtomicU64::new(0),
            endpoints: Mutex::default(),
        });
        let reports = Arc::new(TestReports::default());
        let server = Arc::new(Mutex::new(SocketAddr::from(([127, 0, 0, 1], 1))));
        let target = Arc::clone(&server);
        let proxy = Proxy::start_on_loopback(
            options,
            Direction::Egress,
            Arc::new(move |_| Some(*target.lock().expect("the server"))),
            flows.clone(),
            reports.clone(),
            settings.clone(),
        )
        .expect("the proxy starts");
        Self {
            proxy,
            flows,
            reports,
            settings,
            secrets,
            client_ca,
            server_ca,
            sets,
            server,
        }
    }

    /// Starts a server. `serve` is called for each connection, in a thread of its own.
    pub(crate) fn server(&self, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let address = listener.local_addr().expect("an address");
        *self.server.lock().expect("the server") = address;
        let serve = Arc::new(serve);
        thread::spawn(move || {
            for socket in listener.incoming() {
                let Ok(socket) = socket else { return };
                let serve = Arc::clone(&serve);
                thread::spawn(move || {
                    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
                    socket.set_nodelay(true).expect("the option");
                    serve(socket);
                });
            }
        });
        address
    }

    pub(crate) fn set_server(&self, address: SocketAddr) {
        *self.server.lock().expect("the server") = address;
    }

    /// Starts a TLS server with a certificate of the trusted CA.
    pub(crate) fn tls_server(&self, serve: impl Fn(&mut TlsServer) + Send + Sync + 'static) -> SocketAddr {
        let config = server_config(self.server_ca.issue(NAME, |_| {}));
        self.server(move |socket| serve(&mut accept(config.clone(), socket)))
    }

    /// Starts an HTTP server that answers each request with its method and path.
    pub(crate) fn http_server(&self) -> SocketAddr {
        self.tls_server(serve_http)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.proxy.addresses()[0].1
    }

    pub(crate) fn socket(&self) -> TcpStream {
        self.socket_or_reset().expect("the proxy accepts")
    }

    /// Connects to a proxy that can refuse the connection. `None` if the reset has arrived before `connect` returned.
    pub(crate) fn socket_or_reset(&self) -> Option<TcpStream> {
        match TcpStream::connect(self.address()) {
            Ok(socket) => {
                socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
                Some(socket)
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) fn client_config(&self) -> ClientConfig {
        ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .expect("versions")
            .with_root_certificates(self.client_ca.roots())
            .with_no_client_auth()
    }

    /// Connects through the proxy with TLS.
    pub(crate) fn client(&self) -> TlsClient {
        self.client_with(self.client_config(), NAME)
    }

    pub(crate) fn client_with(&self, config: ClientConfig, name: &str) -> TlsClient {
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let tls = ClientConnection::new(Arc::new(config), name).expect("a client");
        StreamOwned::new(tls, self.socket())
    }

    /// Waits until a record satisfies `wanted`.
    pub(crate) fn record(&self, what: &str, wanted: impl Fn(&Record) -> bool) -> Record {
        let until = Instant::now() + PATIENCE;
        loop {
            let records = self.reports.0.lock().expect("the records").clone();
            if let Some(record) = records.iter().find(|record| wanted(record)) {
                return *record;
            }
            assert!(Instant::now() < until, "no record of {what}: {records:#?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until a condition holds.
    pub(crate) fn wait(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !holds(self) {
            assert!(Instant::now() < until, "{what}: {:?}", self.proxy.stats());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

pub(crate) type TlsClient = StreamOwned<ClientConnection, TcpStream>;
pub(crate) type TlsServer = StreamOwned<ServerConnection, TcpStream>;

pub(crate) fn server_config(own: Arc<CertifiedKey>) -> ServerConfig {
    ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(rustls::ALL_VERSIONS)
        .expect("versions")
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(own)))
}

pub(crate) fn accept(config: ServerConfig, socket: TcpStream) -> TlsServer {
    StreamOwned::new(ServerConnection::new(Arc::new(config)).expect("a server"), socket)
}

/// Reads up to the empty line. Returns `None` at the end of the stream.
pub(crate) fn read_head(stream: &mut impl Read) -> Option<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ if head.is_empty() => return None,
            other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&head)),
        }
    }
    Some(String::from_utf8(head).expect("a head in ASCII"))
}

/// A response: the head, and the body as its content-length says.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

/// Reads one response.
pub(crate) fn read_answer(stream: &mut impl Read) -> Answer {
    let head = read_head(stream).expect("a response");
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .expect("a status");
    let length = field(&head, "content-length").map_or(0, |length| length.parse().expect("a length"));
    let mut body = vec![0; length];
    stream.read_exact(&mut body).expect("the body");
    Answer {
        status,
        head,
        body: String::from_utf8_lossy(&body).into_owned(),
    }
}

/// Returns the value of a field.
pub(crate) fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (field, value) = line.split_once(": ")?;
        field.eq_ignore_ascii_case(name).then_some(value)
    })
}

pub(crate) fn get(stream: &mut (impl Read + Write), path: &str) -> Answer {
    send(stream, format!("GET {path} HTTP/1.1\r\nHost: {NAME}\r\n\r\n"));
    read_answer(stream)
}

pub(crate) fn send(stream: &mut impl Write, text: impl AsRef<[u8]>) {
    stream.write_all(text.as_ref()).expect("the bytes are sent");
    stream.flush().expect("the bytes are sent");
}

/// Answers each request with its method and path, after its body.
pub(crate) fn serve_http(stream: &mut (impl Read + Write)) {
    while let Some(head) = read_head(stream) {
        let length = field(&head, "content-length").map_or(0, |length| length.parse().expect("a length"));
        let mut body = vec![0; length];
        stream.read_exact(&mut body).expect("the body");
        let line = head.lines().next().expect("a request line");
        let (method, path) = line
            .rsplit_once(' ')
            .expect("a version")
            .0
            .split_once(' ')
            .expect("a path");
        let text = format!("{method} {path} {length}");
        let shown = if method == "HEAD" { "" } else { &text };
        send(
            stream,
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{shown}", text.len()),
        );
    }
}

/// Reads to the end. Returns the bytes, and whether the end was clean.
pub(crate) fn read_to_end(stream: &mut impl Read) -> (Vec<u8>, io::Result<()>) {
    let mut all = Vec::new();
    let result = stream.read_to_end(&mut all).map(|_| ());
    (all, result)
}
