//! The proxy's TLS towards a client or a server whose records are cut, changed, removed and preceded by others: the proxy
//! takes only what the peer has sent, and a stream without a close_notify never ends cleanly.
//!
//! The first byte of the input selects the peer (1: server), TLS 1.2 (2) and how often the peer resumes its session (4:
//! once). Actions follow: kind, number, length, bytes.

use std::{
    io::{Read as _, Write as _},
    sync::{Arc, LazyLock},
};

use palisade_intercept::{
    Trust,
    fuzzing::{Configurations, Proxied},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
    pki_types::{PrivateKeyDer, ServerName},
    sign::{CertifiedKey, SingleCertAndKey},
    version::{TLS12, TLS13},
};

const NAME: &str = "a.test";
/// Largest number of bytes that the proxy has for a peer at once, besides the bytes that were queued: its longest flight
/// of a handshake, alerts, and the overhead of records.
const OUTPUT: usize = 16 << 10;

struct Fixture {
    certificate: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    configurations: Configurations,
    clients: [Arc<ClientConfig>; 2],
    servers: [Arc<ServerConfig>; 2],
}

static FIXTURE: LazyLock<Fixture> = LazyLock::new(|| {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let ca_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(params, ca_key);
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec![NAME.to_owned()]).unwrap();
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let certificate = CertifiedKey::from_der(vec![leaf.der().clone()], key, &provider).unwrap();
    let certificate = Arc::new(certificate);
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone()).unwrap();
    let roots = Arc::new(roots);
    let versions = [&TLS13, &TLS12];
    let clients = versions.map(|version| {
        let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(Arc::clone(&roots))
            .with_no_client_auth();
        Arc::new(client)
    });
    let servers = versions.map(|version| {
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&certificate))));
        Arc::new(server)
    });
    Fixture {
        certificate,
        roots,
        configurations: Configurations::default(),
        clients,
        servers,
    }
});

/// Runs one history.
pub fn run(input: &[u8]) {
    let Some((&kind, mut rest)) = input.split_first() else {
        return;
    };
    let mut play = Play::new(kind & 1 != 0, usize::from(kind & 2 != 0));
    if kind & 4 != 0 {
        // The session of a first connection can be resumed.
        play.exchange();
        play.check();
        play = Play::new(kind & 1 != 0, usize::from(kind & 2 != 0));
    }
    while let Some((&[action, number, length], after)) = rest.split_first_chunk::<3>() {
        let (bytes, after) = after.split_at(usize::from(length).min(after.len()));
        play.act(action % 9, usize::from(number), bytes);
        play.check();
        rest = after;
    }
    play.exchange();
    play.check();
    if !play.is_changed {
        play.check_complete();
    }
}

/// A peer and the proxy.
struct Play {
    peer: Connection,
    proxy: Proxied<'static>,
    /// Bytes of the peer that the proxy does not have yet.
    wire: Vec<u8>,
    /// Whether the bytes of the peer were changed on their way.
    is_changed: bool,
    has_failed: bool,
    peer_sent: Vec<u8>,
    peer_closed: bool,
    peer_received: Vec<u8>,
    proxy_sent: Vec<u8>,
    proxy_closed: bool,
}

impl Play {
    fn new(is_server: bool, version: usize) -> Self {
        let fixture = &*FIXTURE;
        let (peer, proxy) = if is_server {
            let peer = ServerConnection::new(Arc::clone(&fixture.servers[version])).unwrap();
            let trust = Trust {
                roots: Arc::clone(&fixture.roots),
                client: None,
            };
            let proxy = Proxied::towards_server(&fixture.configurations, &trust, NAME).unwrap();
            (Connection::from(peer), proxy)
        } else {
            let name = ServerName::try_from(NAME).unwrap();
            let peer = ClientConnection::new(Arc::clone(&fixture.clients[version]), name).unwrap();
            let certificate = Arc::clone(&fixture.certificate);
            let proxy = Proxied::towards_client(&fixture.configurations, certificate).unwrap();
            (Connection::from(peer), proxy)
        };
        Self {
            peer,
            proxy,
            wire: Vec::new(),
            is_changed: false,
            has_failed: false,
            peer_sent: Vec::new(),
            peer_closed: false,
            peer_received: Vec::new(),
            proxy_sent: Vec::new(),
            proxy_closed: false,
        }
    }

    fn act(&mut self, action: u8, number: usize, bytes: &[u8]) {
        match action {
            0 => self.exchange(),
            // A part of the peer's bytes, in two pieces.
            1 => {
                self.gather();
                let part: Vec<u8> = self.wire.drain(..number.min(self.wire.len())).collect();
                let (first, second) = part.split_at(part.len() / 2);
                self.feed(first);
                self.feed(second);
            }
            // Another bit.
            2 => {
                self.gather();
                if let Some(byte) = self.wire.get_mut(number) {
                    *byte ^= 1 << (bytes.len() % 8);
                    self.is_changed = true;
                }
            }
            // Bytes are missing.
            3 => {
                self.gather();
                self.is_changed |= !self.wire.is_empty() && number > 0;
                drop(self.wire.drain(..number.min(self.wire.len())));
            }
            // Bytes that the peer has not sent, now or between the peer's bytes.
            4 => {
                self.is_changed |= !bytes.is_empty();
                self.feed(bytes);
            }
            5 => {
                self.gather();
                self.is_changed |= !bytes.is_empty();
                let at = number.min(self.wire.len());
                self.wire.splice(at..at, bytes.iter().copied());
            }
            6 if !self.peer_closed => {
                // A peer that has refused the proxy's bytes sends nothing more.
                if self.peer.writer().write_all(bytes).is_ok() {
                    self.peer_sent.extend_from_slice(bytes);
                } else {
                    assert!(self.is_changed || self.has_failed);
                }
            }
            7 if self.proxy.is_open() && !self.has_failed && !self.proxy_closed => {
                // Short bytes wait for others, long ones do not.
                let all = bytes.repeat(number / 16 + 1);
                self.proxy.send(&all);
                self.proxy_sent.extend_from_slice(&all);
                self.deliver();
            }
            // Before the end of its handshake, the peer has bytes that would follow its close_notify.
            8 if number.is_multiple_of(3) && !self.peer.is_handshaking() => {
                self.peer.send_close_notify();
                self.peer_closed = true;
            }
            8 if number % 3 == 1 && self.proxy.is_open() && !self.has_failed => {
                self.proxy.finish();
                self.proxy_closed = true;
                self.deliver();
            }
            // New traffic keys, which only TLS 1.3 has.
            8 if !self.peer_closed => drop(self.peer.refresh_traffic_keys()),
            _ => {}
        }
    }

    /// Delivers the bytes of both until neither has any.
    fn exchange(&mut self) {
        loop {
            // The proxy is the first to send to a server.
            self.deliver();
            self.gather();
            let bytes = std::mem::take(&mut self.wire);
            if bytes.is_empty() || self.has_failed {
                return;
            }
            self.feed(&bytes);
        }
    }

    /// Takes the bytes that the peer has for the proxy.
    fn gather(&mut self) {
        while self.peer.wants_write() {
            self.peer.write_tls(&mut self.wire).unwrap();
        }
    }

    /// The proxy ends a connection whose bytes it refuses.
    fn feed(&mut self, bytes: &[u8]) {
        if self.has_failed || self.proxy.is_closed() || self.would_assert(self.proxy_closed) {
            return;
        }
        let was_open = self.proxy.is_open();
        if let Err(error) = self.proxy.feed(bytes) {
            // With TLS 1.3, the handshake of a server can end after that of its client. A close_notify within the
            // handshake is an error too.
            assert!(self.is_changed || (self.peer_closed && !was_open), "{error}");
            self.has_failed = true;
        }
        self.deliver();
    }

    /// rustls with debug assertions panics when an error follows its own close_notify. Without them it sends an alert.
    fn would_assert(&self, has_closed: bool) -> bool {
        cfg!(debug_assertions) && has_closed && (self.is_changed || self.has_failed)
    }

    /// Gives the proxy's bytes to the peer.
    fn deliver(&mut self) {
        let output = self.proxy.take_output();
        assert!(output.len() <= OUTPUT + 2 * self.proxy_sent.len());
        if self.would_assert(self.peer_closed) {
            return;
        }
        let mut rest = &output[..];
        while !rest.is_empty() {
            if self.peer.read_tls(&mut rest).unwrap() == 0 {
                // After the proxy's close_notify.
                return;
            }
            let Ok(state) = self.peer.process_new_packets() else {
                assert!(self.is_changed || self.has_failed);
                return;
            };
            let mut part = vec![0; state.plaintext_bytes_to_read()];
            self.peer.reader().read_exact(&mut part).unwrap();
            self.peer_received.extend_from_slice(&part);
        }
    }

    fn check(&self) {
        assert!(self.peer_sent.starts_with(self.proxy.received()));
        assert!(self.proxy_sent.starts_with(&self.peer_received));
        // The close_notify of another, or one that comes before bytes, is no clean end.
        if self.proxy.is_closed() {
            assert!(self.peer_closed);
            assert_eq!(self.proxy.received(), self.peer_sent);
        }
    }

    /// Nothing was changed, so everything has arrived.
    fn check_complete(&self) {
        assert!(self.proxy.is_open() || self.peer_closed);
        if self.proxy.is_open() && !self.has_failed {
            assert_eq!(self.proxy.received(), self.peer_sent);
            assert_eq!(self.proxy.is_closed(), self.peer_closed);
            assert_eq!(self.peer_received, self.proxy_sent);
        }
    }
}
