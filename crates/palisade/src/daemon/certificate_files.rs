//! Certificates of a TCP listener. Changed files are read again. A certificate or key that cannot be used changes
//! nothing: the last good ones stay in use, or no handshake succeeds if there were none. If the authorities of clients
//! cannot be used, no handshake succeeds: the last good ones can include an authority that was removed.

use std::{
    fs::{self, OpenOptions},
    io::Read as _,
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nix::fcntl::OFlag;
use palisade_secrets::{Expiry, expiry};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::{CertifiedKey, SingleCertAndKey},
};

use crate::config::CertificateFiles;

/// Interval at which the files should be checked for changes.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Longest file that is read, bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// What changes when a file is written or replaced. A program can set the time of the last modification, but not that of
/// the last change of the inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Version {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// Verifier of the certificates of clients; `None` if clients need none.
type Verifier = Option<Arc<dyn ClientCertVerifier>>;

/// Certificates in use, and their files.
#[derive(Debug)]
pub(super) struct Certificates {
    files: CertificateFiles,
    /// Application protocols of the handshake (RFC 7301); without any, none is negotiated.
    protocols: Vec<Vec<u8>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Empty before the files are read for the first time.
    versions: Vec<Option<Version>>,
    /// The last good certificate of the server.
    own: Option<Arc<CertifiedKey>>,
    /// Verifier of the files as they are now; `None` if their authorities cannot be used.
    verifier: Option<Verifier>,
    config: Option<Arc<ServerConfig>>,
    problem: Option<String>,
}

impl Certificates {
    /// Reads the files.
    pub(super) fn new(files: CertificateFiles) -> Self {
        Self::with_protocols(files, Vec::new())
    }

    /// Reads the files. `protocols`: the application protocols of the handshake.
    pub(super) fn with_protocols(files: CertificateFiles, protocols: Vec<Vec<u8>>) -> Self {
        let certificates = Self {
            files,
            protocols,
            state: Mutex::default(),
        };
        certificates.refresh();
        certificates
    }

    /// Returns the configuration for a handshake; `None` if there never was a usable certificate, or if the authorities
    /// of clients cannot be used.
    pub(super) fn config(&self) -> Option<Arc<ServerConfig>> {
        self.lock().config.clone()
    }

    /// Returns why the files cannot be used.
    pub(super) fn problem(&self) -> Option<String> {
        self.lock().problem.clone()
    }

    /// Returns the ends of the validity of the server's certificates in use, its own first. A certificate that cannot be
    /// parsed is left out.
    pub(super) fn expiries(&self) -> Vec<Expiry> {
        let own = self.lock().own.clone();
        let chain = own.iter().flat_map(|own| own.cert.iter());
        chain.filter_map(|certificate| expiry(certificate).ok()).collect()
    }

    /// Returns whether a client with these certificates, its own first, could connect now.
    pub(super) fn accepts(&self, chain: &[CertificateDer<'_>]) -> bool {
        let verifier = self.lock().verifier.clone();
        match (verifier, chain) {
            (None, _) => false,
            (Some(None), _) => true,
            (Some(Some(_)), []) => false,
            (Some(Some(verifier)), [own, others @ ..]) => {
                verifier.verify_client_cert(own, others, UnixTime::now()).is_ok()
            }
        }
    }

    /// Reads the files again if they have changed. Returns whether they have.
    pub(super) fn refresh(&self) -> bool {
        // The versions are taken before the files are read, so that a later change is noticed the next time.
        let versions = self.files.versions();
        if self.lock().versions == versions {
            return false;
        }
        let (own, verifier) = (self.files.own(), self.files.verifier());
        let mut state = self.lock();
        let mut problems = Vec::new();
        match own {
            Ok(own) => state.own = Some(Arc::new(own)),
            Err(problem) => problems.push(match state.own {
                Some(_) => format!("{problem}; the last good certificates stay in use"),
                None => format!("{problem}; no client can connect"),
            }),
        }
        state.versions = versions;
        state.config = None;
        state.verifier = None;
        match verifier {
            Ok(verifier) => {
                if let Some(own) = &state.own {
                    match server_config(Arc::clone(own), verifier.clone()) {
                        Ok(mut config) => {
                            config.alpn_protocols.clone_from(&self.protocols);
                            state.config = Some(Arc::new(config));
                        }
                        Err(problem) => problems.push(format!("{problem}; no client can connect")),
                    }
                }
                state.verifier = Some(verifier);
            }
            Err(problem) => problems.push(format!("{problem}; no client can connect")),
        }
        state.problem = (!problems.is_empty()).then(|| problems.join("; "));
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CertificateFiles {
    fn versions(&self) -> Vec<Option<Version>> {
        let version = |path: &PathBuf| {
            let file = fs::metadata(path).ok()?;
            Some(Version {
                device: file.dev(),
                inode: file.ino(),
                length: file.len(),
                modified: (file.mtime(), file.mtime_nsec()),
                changed: (file.ctime(), file.ctime_nsec()),
            })
        };
        let files = [Some(&self.certificate), Some(&self.key), self.client_ca.as_ref()];
        files.into_iter().flatten().map(version).collect()
    }

    /// Reads the files.
    ///
    /// # Errors
    /// The file that cannot be used, and why.
    pub(super) fn read(&self) -> Result<ServerConfig, String> {
        let verifier = self.verifier()?;
        server_config(Arc::new(self.own()?), verifier)
    }

    /// Reads the certificate of the server and its key.
    fn own(&self) -> Result<CertifiedKey, String> {
        let key = &self.key;
        let file = contents(key)?;
        if file.mode & 0o007 != 0 {
            return Err(format!(
                "{0}: every user can use this private key (mode {1:04o}): run `chmod o= {0}`",
                key.display(),
                file.mode & 0o7777
            ));
        }
        let private = PrivateKeyDer::from_pem_slice(&file.bytes)
            .map_err(|error| format!("{}: no private key in PEM form: {error}", key.display()))?;
        CertifiedKey::from_der(certificates(&self.certificate)?, private, &provider())
            .map_err(|error| format!("{} and {}: {error}", self.certificate.display(), key.display()))
    }

    /// Reads the authorities of clients.
    fn verifier(&self) -> Result<Verifier, String> {
        let Some(path) = &self.client_ca else {
            return Ok(None);
        };
        let shown = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let mut roots = RootCertStore::empty();
        for certificate in certificates(path)? {
            roots.add(certificate).map_err(|error| shown(&error))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(provider()));
        Ok(Some(verifier.build().map_err(|error| shown(&error))?))
    }
}

fn provider() -> CryptoProvider {
    rustls::crypto::aws_lc_rs::default_provider()
}

fn server_config(own: Arc<CertifiedKey>, verifier: Verifier) -> Result<ServerConfig, String> {
    let builder = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())?;
    let builder = match verifier {
        None => builder.with_no_client_auth(),
        Some(verifier) => builder.with_client_cert_verifier(verifier),
    };
    let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(own)));
    // Without tickets every client proves anew that it has a certificate.
    config.send_tls13_tickets = 0;
    Ok(config)
}

struct Contents {
    bytes: Vec<u8>,
    mode: u32,
}

fn contents(path: &Path) -> Result<Contents, String> {
    let shown = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    // O_NONBLOCK: the open of a FIFO without a writer must not block.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)
        .map_err(|error| shown(&error))?;
    let metadata = file.metadata().map_err(|error| shown(&error))?;
    if !metadata.is_file() {
        return Err(shown(&"is not a regular file"));
    }
    let mut bytes = Vec::new();
    // The file can grow while it is read.
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| shown(&error))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(shown(&format!("is longer than {MAX_FILE_BYTES} bytes")));
    }
    Ok(Contents {
        bytes,
        mode: metadata.mode(),
    })
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let file = contents(path)?;
    let list: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&file.bytes).collect();
    let list = list.map_err(|error| format!("{}: {error}", path.display()))?;
    if list.is_empty() {
        return Err(format!("{}: no certificate in PEM form", path.display()));
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn only_regular_files_of_a_bounded_length_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        let problem = contents(&fifo).err().unwrap();
        assert!(problem.contains("is not a regular file"), "{problem}");
        let long = dir.path().join("long");
        fs::File::create(&long)
            .unwrap()
            .set_len(MAX_FILE_BYTES + 1)
            .unwrap();
        let problem = contents(&long).err().unwrap();
        assert!(problem.contains("is longer than"), "{problem}");
    }

    #[test]
    fn without_usable_authorities_no_client_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let files = |client_ca| CertificateFiles {
            certificate: dir.path().join("tls.crt"),
            key: dir.path().join("tls.key"),
            client_ca,
        };
        let chain = [CertificateDer::from(vec![0; 10])];
        let certificates = Certificates::new(files(Some(dir.path().join("ca.crt"))));
        assert!(certificates.config().is_none());
        assert!(!certificates.accepts(&chain) && !certificates.accepts(&[]));
        let problem = certificates.problem().unwrap();
        assert!(
            problem.contains("ca.crt") && problem.contains("no client can connect"),
            "{problem}"
        );
        // Clients need no certificate.
        assert!(Certificates::new(files(None)).accepts(&[]));
    }

    #[test]
    fn a_file_that_was_written_again_with_its_old_times_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tls.crt");
        fs::write(&path, "one").unwrap();
        let files = CertificateFiles {
            certificate: path.clone(),
            key: path.clone(),
            client_ca: None,
        };
        let before = files.versions();
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        std::io::Write::write_all(&mut &file, b"two").unwrap();
        file.set_modified(modified).unwrap();
        assert_ne!(files.versions(), before);
    }
}
