//! Certificates of a TCP listener. Changed files are read again. Files that cannot be used change nothing: the last good
//! certificates stay in use, or no handshake succeeds if there were none.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};

use crate::config::CertificateFiles;

/// Interval at which the files should be checked for changes.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Longest file that is read, bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// What changes when a file is written or replaced: device, inode, length and the time of the last change.
type Version = Option<(u64, u64, u64, i64, i64)>;

/// Certificates in use, and their files.
#[derive(Debug)]
pub(super) struct Certificates {
    files: CertificateFiles,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    versions: Vec<Version>,
    config: Option<Arc<ServerConfig>>,
    problem: Option<String>,
}

impl Certificates {
    /// Reads the files.
    pub(super) fn new(files: CertificateFiles) -> Self {
        let certificates = Self {
            files,
            state: Mutex::default(),
        };
        certificates.refresh();
        certificates
    }

    /// Returns the configuration for a handshake; `None` if there never was a usable certificate.
    pub(super) fn config(&self) -> Option<Arc<ServerConfig>> {
        self.lock().config.clone()
    }

    /// Returns why the files cannot be used.
    pub(super) fn problem(&self) -> Option<String> {
        self.lock().problem.clone()
    }

    /// Reads the files again if they have changed.
    pub(super) fn refresh(&self) {
        let versions = self.files.versions();
        if self.lock().versions == versions {
            return;
        }
        let read = self.files.read();
        let mut state = self.lock();
        state.versions = versions;
        state.problem = None;
        match read {
            Ok(config) => state.config = Some(Arc::new(config)),
            Err(problem) => {
                let meaning = match state.config {
                    Some(_) => "the last good certificates stay in use",
                    None => "no client can connect",
                };
                state.problem = Some(format!("{problem}; {meaning}"));
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CertificateFiles {
    fn versions(&self) -> Vec<Version> {
        let version = |path: &PathBuf| {
            let file = fs::metadata(path).ok()?;
            Some((
                file.dev(),
                file.ino(),
                file.len(),
                file.mtime(),
                file.mtime_nsec(),
            ))
        };
        let files = [Some(&self.certificate), Some(&self.key), self.client_ca.as_ref()];
        files.into_iter().flatten().map(version).collect()
    }

    /// Reads the files.
    ///
    /// # Errors
    /// The file that cannot be used, and why.
    pub(super) fn read(&self) -> Result<ServerConfig, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let shown = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
                let mut roots = RootCertStore::empty();
                for certificate in certificates(path)? {
                    roots.add(certificate).map_err(|error| shown(&error))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().map_err(|error| shown(&error))?)
            }
        };
        let key = &self.key;
        let mode = fs::metadata(key)
            .map_err(|error| format!("{}: {error}", key.display()))?
            .mode();
        if mode & 0o007 != 0 {
            return Err(format!(
                "{0}: every user can use this private key (mode {1:04o}): run `chmod o= {0}`",
                key.display(),
                mode & 0o7777
            ));
        }
        let private = PrivateKeyDer::from_pem_slice(&contents(key)?)
            .map_err(|error| format!("{}: no private key in PEM form: {error}", key.display()))?;
        let mut config = builder
            .with_single_cert(certificates(&self.certificate)?, private)
            .map_err(|error| format!("{} and {}: {error}", self.certificate.display(), key.display()))?;
        // Without tickets no session is resumed, so each handshake checks the client's certificate anew.
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

fn contents(path: &Path) -> Result<Vec<u8>, String> {
    let shown = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let metadata = fs::metadata(path).map_err(|error| shown(&error))?;
    if !metadata.is_file() {
        // A FIFO would block the reader.
        return Err(shown(&"is not a regular file"));
    }
    if metadata.len() > MAX_FILE_BYTES {
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
