//! Certificates and keys of policies, as this crate needs them.

use std::sync::Arc;

use palisade_model::rule::TlsContext;
use palisade_secrets::Store;
use rustls::{RootCertStore, sign::CertifiedKey};

/// CAs that server certificates are checked against, and the certificate for servers that request one.
#[derive(Clone, Debug)]
pub struct Trust {
    /// The CAs.
    pub roots: Arc<RootCertStore>,
    /// Certificate and key for servers that request one.
    pub client: Option<Arc<CertifiedKey>>,
}

impl Trust {
    /// Returns an identifier that no other value has while this value is in memory.
    pub(crate) fn id(&self) -> (usize, usize) {
        let client = self.client.as_ref().map_or(0, |key| Arc::as_ptr(key).addr());
        (Arc::as_ptr(&self.roots).addr(), client)
    }
}

/// Source of the secrets that policies name. An unchanged secret must return the same objects each time, because TLS
/// configurations are kept by their addresses.
pub trait Secrets: Send + Sync {
    /// Returns the certificate that clients get.
    ///
    /// # Errors
    /// A description of the problem.
    fn identity(&self, context: &TlsContext) -> Result<Arc<CertifiedKey>, String>;
    /// Returns the CAs that servers are checked by.
    ///
    /// # Errors
    /// A description of the problem.
    fn trust(&self, context: &TlsContext) -> Result<Trust, String>;
}

impl Secrets for Store {
    fn identity(&self, context: &TlsContext) -> Result<Arc<CertifiedKey>, String> {
        let identity = Self::identity(self, context).map_err(|error| error.to_string())?;
        Ok(Arc::clone(identity.certified_key()))
    }

    fn trust(&self, context: &TlsContext) -> Result<Trust, String> {
        let trust = Self::trust(self, context).map_err(|error| error.to_string())?;
        Ok(Trust {
            roots: Arc::clone(trust.roots()),
            client: trust.client().map(|own| Arc::clone(own.certified_key())),
        })
    }
}
