//! Certificates of the TCP listener. Changed files are read again. Files that cannot be used change nothing: the last
//! good certificates stay, or no handshake succeeds if there were none.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::time::sleep;
use tracing::info;

use super::report::Reports;

/// Interval at which the files are checked for changes.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Longest file that is read, bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Certificates in use, and their files.
#[derive(Debug)]
pub(super) struct Certificates {
    chain: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
    reports: Arc<Reports>,
    config: RwLock<Option<Arc<ServerConfig>>>,
}

/// What changes when a file is written or replaced: device, inode, length and the time of the last change.
type Version = Option<(u64, u64, u64, i64, i64)>;

impl Certificates {
    pub(super) fn new(
        chain: &Path,
        key: &Path,
        client_ca: Option<&Path>,
        reports: &Arc<Reports>,
    ) -> Arc<Self> {
        let certificates = Self {
            chain: chain.to_owned(),
            key: key.to_owned(),
            client_ca: client_ca.map(Path::to_owned),
            reports: Arc::clone(reports),
            config: RwLock::default(),
        };
        certificates.load();
        Arc::new(certificates)
    }

    /// Returns the configuration for a handshake; `None` if there never was a usable certificate.
    pub(super) fn config(&self) -> Option<Arc<ServerConfig>> {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the files again whenever they change.
    pub(super) async fn watch(self: Arc<Self>) {
        let mut known = self.versions();
        loop {
            sleep(CHECK_INTERVAL).await;
            let now = self.versions();
            if now != known {
                known = now;
                self.load();
            }
        }
    }

    fn files(&self) -> impl Iterator<Item = &Path> {
        [Some(&self.chain), Some(&self.key), self.client_ca.as_ref()]
            .into_iter()
            .flatten()
            .map(PathBuf::as_path)
    }

    fn versions(&self) -> Vec<Version> {
        let version = |path: &Path| {
            let file = fs::metadata(path).ok()?;
            Some((
                file.dev(),
                file.ino(),
                file.len(),
                file.mtime(),
                file.mtime_nsec(),
            ))
        };
        self.files().map(version).collect()
    }

    fn load(&self) {
        match self.read() {
            Ok(config) => {
                *self.config.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(config));
                self.reports.set_problem("tls_certificate", None);
                info!(certificate = %self.chain.display(), "the certificate of the flow API is read");
            }
            Err(problem) => {
                let meaning = match self.config() {
                    Some(_) => "the last good certificates stay in use",
                    None => "no client can connect by TCP",
                };
                self.reports
                    .set_problem("tls_certificate", Some(format!("{problem}; {meaning}")));
            }
        }
    }

    fn read(&self) -> Result<ServerConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path)? {
                    roots
                        .add(certificate)
                        .map_err(|error| format!("{}: {error}", path.display()))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .build()
                    .map_err(|error| format!("{}: {error}", path.display()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let metadata = fs::metadata(&self.key).map_err(|error| format!("{}: {error}", self.key.display()))?;
        if metadata.mode() & 0o007 != 0 {
            return Err(format!(
                "{}: every user can use this private key (mode {:04o}): run `chmod o= {}`",
                self.key.display(),
                metadata.mode() & 0o7777,
                self.key.display()
            ));
        }
        let key = PrivateKeyDer::from_pem_slice(&contents(&self.key)?)
            .map_err(|error| format!("{}: no private key in PEM form: {error}", self.key.display()))?;
        let mut config = builder
            .with_single_cert(certificates(&self.chain)?, key)
            .map_err(|error| format!("{} and {}: {error}", self.chain.display(), self.key.display()))?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // Without tickets no session is resumed, so each handshake checks the client's certificate anew.
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

fn contents(path: &Path) -> Result<Vec<u8>, String> {
    let shown = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let length = fs::metadata(path).map_err(|error| shown(&error))?.len();
    if length > MAX_FILE_BYTES {
        return Err(shown(&format!("is longer than {MAX_FILE_BYTES} bytes")));
    }
    fs::read(path).map_err(|error| shown(&error))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let bytes = contents(path)?;
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let list = list.map_err(|error| format!("{}: {error}", path.display()))?;
    if list.is_empty() {
        return Err(format!("{}: no certificate in PEM form", path.display()));
    }
    Ok(list)
}
