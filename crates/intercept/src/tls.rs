//! TLS configurations: built once for each secret, with certificates made on demand for an interception CA.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use rustls::{
    ClientConfig, ClientConnection, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName},
    server::{NoServerSessionStorage, ProducesTickets},
    sign::{CertifiedKey, SingleCertAndKey},
};

use crate::{authority::Authority, chain::Verifier, lru::Lru, secrets::Trust};

/// Maximum number of secrets whose configurations are kept.
const KEPT_SECRETS: usize = 256;
/// Maximum number of certificates that are kept for one interception CA.
const KEPT_LEAVES: usize = 1024;
/// Maximum number of sessions with servers that are kept for one secret.
const KEPT_SESSIONS: usize = 1024;
/// A certificate that was made on demand is replaced after this time.
const LEAF_REUSE: Duration = Duration::from_hours(24);

/// Name of the server that a client has connected to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PeerName {
    /// The server name of the client's hello.
    Dns(Box<str>),
    /// The client has sent no server name: the address of the server.
    Address(IpAddr),
}

impl std::fmt::Display for PeerName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dns(name) => f.write_str(name),
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

/// TLS configurations of all threads.
pub(crate) struct Contexts {
    provider: Arc<CryptoProvider>,
    tickets: Option<Arc<dyn ProducesTickets>>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    /// Configurations by the address of the secret. The secret is kept alive, so that its address stays unique.
    servers: HashMap<usize, Arc<ServerSide>>,
    clients: HashMap<(usize, usize), (Trust, Arc<ClientConfig>)>,
}

/// Configuration and certificates that clients get for one secret.
struct ServerSide {
    config: ServerConfig,
    /// Certificate and key of the secret. They stay in memory, so that no other secret has their address.
    own: Arc<CertifiedKey>,
    authority: Option<(Authority, Mutex<Leaves>)>,
}

impl ServerSide {
    /// Returns the certificate for a name. An interception CA issues it unless an earlier certificate is kept.
    fn shown(&self, name: &PeerName) -> Result<Arc<CertifiedKey>, String> {
        match &self.authority {
            None => Ok(Arc::clone(&self.own)),
            Some((authority, leaves)) => {
                let now = SystemTime::now();
                let mut leaves = leaves.lock().unwrap_or_else(PoisonError::into_inner);
                match leaves.get(name) {
                    Some((made, key)) if now.duration_since(*made).is_ok_and(|age| age < LEAF_REUSE) => {
                        Ok(Arc::clone(key))
                    }
                    _ => {
                        let key = Arc::new(authority.issue(name.to_string(), now)?);
                        leaves.insert(name.clone(), (now, Arc::clone(&key)));
                        Ok(key)
                    }
                }
            }
        }
    }
}

/// Certificates that were made on demand, and when.
type Leaves = Lru<PeerName, (SystemTime, Arc<CertifiedKey>)>;

impl Contexts {
    pub(crate) fn new() -> Self {
        Self {
            provider: Arc::new(rustls::crypto::aws_lc_rs::default_provider()),
            // Without random bytes no tickets are issued, and each handshake is a full one.
            tickets: rustls::crypto::aws_lc_rs::Ticketer::new().ok(),
            kept: Mutex::default(),
        }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the configuration for the handshake with a client. `issue`: whether the secret is a CA that signs a
    /// certificate for `name`. `protocol`: the application protocol that the client gets.
    ///
    /// # Errors
    /// A description of what is wrong with the secret.
    pub(crate) fn server(
        &self,
        secret: &Arc<CertifiedKey>,
        issue: bool,
        name: &PeerName,
        protocol: Option<&[u8]>,
    ) -> Result<Arc<ServerConfig>, String> {
        let side = self.server_side(secret, issue)?;
        let mut config = side.config.clone();
        config.cert_resolver = Arc::new(SingleCertAndKey::from(side.shown(name)?));
        config.alpn_protocols = protocol.map(<[u8]>::to_vec).into_iter().collect();
        Ok(Arc::new(config))
    }

    /// Returns the certificate that a client of the server `name` gets.
    ///
    /// # Errors
    /// As for [`Self::server`].
    pub(crate) fn shown(
        &self,
        secret: &Arc<CertifiedKey>,
        issue: bool,
        name: &PeerName,
    ) -> Result<Arc<CertifiedKey>, String> {
        self.server_side(secret, issue)?.shown(name)
    }
    fn server_side(&self, secret: &Arc<CertifiedKey>, issue: bool) -> Result<Arc<ServerSide>, String> {
        let address = Arc::as_ptr(secret).addr() ^ usize::from(issue);
        if let Some(side) = self.kept().servers.get(&address) {
            return Ok(Arc::clone(side));
        }
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .map_err(|error| error.to_string())?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(secret))));
        // Sessions are resumed by tickets only, so that no state is kept for a client.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        if let Some(tickets) = &self.tickets {
            config.ticketer = Arc::clone(tickets);
        }
        config.send_tls13_tickets = 1;
        let authority = if issue {
            let authority = Authority::new(&secret.cert, Arc::clone(&secret.key))?;
            Some((authority, Mutex::new(Lru::new(KEPT_LEAVES))))
        } else {
            None
        };
        let side = Arc::new(ServerSide {
            config,
            own: Arc::clone(secret),
            authority,
        });
        let mut kept = self.kept();
        if kept.servers.len() >= KEPT_SECRETS {
            kept.servers.clear();
        }
        kept.servers.insert(address, Arc::clone(&side));
        Ok(side)
    }

    /// Starts TLS with a server. `protocols`: the application protocols to offer.
    ///
    /// # Errors
    /// A description of what is wrong with the secret.
    pub(crate) fn client(
        &self,
        trust: &Trust,
        name: &PeerName,
        protocols: Vec<Vec<u8>>,
    ) -> Result<ClientConnection, String> {
        let mut config = (*self.client_config(trust)?).clone();
        config.alpn_protocols = protocols;
        connection(config, name)
    }

    /// As [`Self::client`], but sessions are not resumed, and `seen` gets the certificates of the server.
    ///
    /// # Errors
    /// As for [`Self::client`].
    pub(crate) fn observed_client(
        &self,
        trust: &Trust,
        name: &PeerName,
        protocols: Vec<Vec<u8>>,
        seen: &Arc<Mutex<Vec<CertificateDer<'static>>>>,
    ) -> Result<ClientConnection, String> {
        let mut config = (*self.client_config(trust)?).clone();
        config.alpn_protocols = protocols;
        config.resumption = Resumption::disabled();
        let verifier = Verifier {
            inner: self.verifier(trust)?,
            seen: Some(Arc::clone(seen)),
        };
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        connection(config, name)
    }

    fn client_config(&self, trust: &Trust) -> Result<Arc<ClientConfig>, String> {
        let id = trust.id();
        if let Some((_, config)) = self.kept().clients.get(&id) {
            return Ok(Arc::clone(config));
        }
        let verifier = self.verifier(trust)?;
        let config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Verifier {
                inner: verifier,
                seen: None,
            }));
        let mut config = match &trust.client {
            Some(own) => config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(own)))),
            None => config.with_no_client_auth(),
        };
        config.resumption = Resumption::in_memory_sessions(KEPT_SESSIONS);
        let config = Arc::new(config);
        let mut kept = self.kept();
        if kept.clients.len() >= KEPT_SECRETS {
            kept.clients.clear();
        }
        kept.clients.insert(id, (trust.clone(), Arc::clone(&config)));
        Ok(config)
    }

    /// Returns the check of server certificates for a secret.
    ///
    /// # Errors
    /// A description of what is wrong with the CA certificates.
    fn verifier(&self, trust: &Trust) -> Result<Arc<WebPkiServerVerifier>, String> {
        WebPkiServerVerifier::builder_with_provider(Arc::clone(&trust.roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| error.to_string())
    }
}

fn connection(config: ClientConfig, name: &PeerName) -> Result<ClientConnection, String> {
    let name = match name {
        PeerName::Dns(name) => {
            ServerName::try_from(name.to_string()).map_err(|_| "not a valid server name".to_owned())?
        }
        PeerName::Address(address) => ServerName::from(*address),
    };
    let mut connection = ClientConnection::new(Arc::new(config), name).map_err(|error| error.to_string())?;
    connection.set_buffer_limit(None);
    Ok(connection)
}
