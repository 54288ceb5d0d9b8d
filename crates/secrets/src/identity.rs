//! Certificates with their private key, and trusted CAs, in the forms that rustls uses.

use std::{fmt, sync::Arc};

use rustls::{
    RootCertStore,
    crypto::aws_lc_rs::sign::any_supported_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs1KeyDer, PrivatePkcs8KeyDer, PrivateSec1KeyDer},
    sign::CertifiedKey,
};

/// A certificate chain with the private key of its first certificate.
pub struct Identity {
    certified: Arc<CertifiedKey>,
}

/// Encoding of a private key.
#[derive(Clone, Copy)]
enum Form {
    Pkcs1,
    Sec1,
    Pkcs8,
}

impl Form {
    fn with(self, der: &[u8]) -> PrivateKeyDer<'_> {
        match self {
            Self::Pkcs1 => PrivatePkcs1KeyDer::from(der).into(),
            Self::Sec1 => PrivateSec1KeyDer::from(der).into(),
            Self::Pkcs8 => PrivatePkcs8KeyDer::from(der).into(),
        }
    }
}

/// Why certificate and key are no identity.
pub(crate) struct Unfit {
    /// Whether the error is in the certificate; otherwise it is in the key.
    pub in_certificate: bool,
    pub text: String,
}

impl Identity {
    pub(crate) fn new(chain: Vec<CertificateDer<'static>>, label: &str, key: &[u8]) -> Result<Self, Unfit> {
        let unfit = |in_certificate, text| Unfit { in_certificate, text };
        let form = match label {
            "PRIVATE KEY" => Form::Pkcs8,
            "RSA PRIVATE KEY" => Form::Pkcs1,
            "EC PRIVATE KEY" => Form::Sec1,
            _ => {
                return Err(unfit(
                    false,
                    format!("a {label} cannot be used; `openssl pkey` converts it"),
                ));
            }
        };
        // The key is borrowed: rustls would drop a copy of its own without overwriting it.
        let signer = any_supported_type(&form.with(key))
            .map_err(|error| unfit(false, format!("the private key cannot be used: {error}")))?;
        let certified = CertifiedKey::new(chain, signer);
        certified.keys_match().map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                unfit(false, "the private key does not fit the certificate".into())
            }
            other => unfit(true, format!("the certificate cannot be used: {other}")),
        })?;
        Ok(Self {
            certified: Arc::new(certified),
        })
    }

    /// Returns the certificate chain. The first certificate is that of the private key; each further certificate is the
    /// issuer of its predecessor.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// Returns chain and key as rustls uses them.
    #[must_use]
    pub fn certified_key(&self) -> &Arc<CertifiedKey> {
        &self.certified
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("certificates", &self.chain().len())
            .finish_non_exhaustive()
    }
}

/// The CAs that a server's certificate is checked by.
#[derive(Clone, Debug)]
pub struct Trust {
    roots: Arc<RootCertStore>,
    certificates: Vec<CertificateDer<'static>>,
    client: Option<Arc<Identity>>,
}

impl Trust {
    pub(crate) fn new(
        certificates: Vec<CertificateDer<'static>>,
        client: Option<Arc<Identity>>,
    ) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        let (used, _) = roots.add_parsable_certificates(certificates.iter().cloned());
        if used == 0 {
            return Err("no certificate that can be trusted".into());
        }
        Ok(Self {
            roots: Arc::new(roots),
            certificates,
            client,
        })
    }

    /// Returns the CAs as rustls uses them.
    #[must_use]
    pub fn roots(&self) -> &Arc<RootCertStore> {
        &self.roots
    }

    /// Returns the certificates of the CAs.
    #[must_use]
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// Returns the certificate and key that a server may ask for; `None` if the secret has none.
    #[must_use]
    pub fn client(&self) -> Option<&Arc<Identity>> {
        self.client.as_ref()
    }
}
