//! Makes certificates that an interception CA signs.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData,
};
use rustls::{
    SignatureScheme,
    crypto::aws_lc_rs::sign::any_supported_type,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
    sign::{CertifiedKey, SigningKey},
};
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroizing;

/// Lifetime of a certificate that is made on demand.
const LIFETIME: Duration = Duration::from_hours(7 * 24);
/// Time by which the validity of a certificate begins before its creation, for clients whose clocks are slow.
const BACKDATE: Duration = Duration::from_hours(24);

/// An interception CA, and the key of all certificates that it signs.
pub(crate) struct Authority {
    issuer: Issuer<'static, CaKey>,
    chain: Vec<CertificateDer<'static>>,
    /// Period in which the CA's certificate is valid, s since 1970.
    valid: (i64, i64),
    leaf: Zeroizing<KeyPair>,
    leaf_key: Arc<dyn SigningKey>,
}

impl Authority {
    /// # Errors
    /// A description of what is wrong with the CA.
    pub(crate) fn new(chain: &[CertificateDer<'static>], key: Arc<dyn SigningKey>) -> Result<Self, String> {
        let ca = chain.first().ok_or("no certificate")?;
        let (_, parsed) =
            X509Certificate::from_der(ca).map_err(|error| format!("CA certificate: {error}"))?;
        if !parsed.is_ca() {
            return Err("the certificate of the interception CA is not one of a CA".into());
        }
        let validity = parsed.validity();
        let valid = (validity.not_before.timestamp(), validity.not_after.timestamp());
        let public = parsed.public_key().subject_public_key.data.to_vec();
        let key = CaKey::new(key, public)?;
        let issuer = Issuer::from_ca_cert_der(ca, key).map_err(|error| format!("CA certificate: {error}"))?;
        let leaf = KeyPair::generate().map_err(|error| error.to_string())?;
        let leaf = Zeroizing::new(leaf);
        // The key is borrowed: a copy would not be overwritten when it is dropped.
        let der = PrivatePkcs8KeyDer::from(leaf.serialized_der());
        let leaf_key = any_supported_type(&der.into()).map_err(|error| error.to_string())?;
        Ok(Self {
            issuer,
            chain: chain.to_vec(),
            valid,
            leaf,
            leaf_key,
        })
    }

    /// Makes a certificate for a name or an address.
    ///
    /// # Errors
    /// A description of the problem, for example a name that no certificate can have.
    pub(crate) fn issue(&self, name: String, now: SystemTime) -> Result<CertifiedKey, String> {
        let mut params = CertificateParams::new(vec![name.clone()]).map_err(|error| error.to_string())?;
        params.distinguished_name = DistinguishedName::new();
        // The common name has at most 64 characters (RFC 5280, appendix A.1). Clients read the alternative names.
        if name.len() <= 64 {
            params.distinguished_name.push(DnType::CommonName, name);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let seconds = |time: SystemTime| {
            time.duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
        };
        let date = |seconds: i64| {
            time::OffsetDateTime::from_unix_timestamp(seconds).map_err(|error| error.to_string())
        };
        params.not_before = date(seconds(now - BACKDATE).max(self.valid.0))?;
        params.not_after = date(seconds(now + LIFETIME).min(self.valid.1))?;
        let certificate = params
            .signed_by(&*self.leaf, &self.issuer)
            .map_err(|error| error.to_string())?;
        let mut chain = vec![certificate.der().clone()];
        chain.extend_from_slice(&self.chain);
        Ok(CertifiedKey::new(chain, Arc::clone(&self.leaf_key)))
    }
}

/// The key of a CA. Signing through the TLS library supports every form of private key that the library reads.
struct CaKey {
    key: Arc<dyn SigningKey>,
    scheme: SignatureScheme,
    algorithm: &'static rcgen::SignatureAlgorithm,
    public: Vec<u8>,
}

impl CaKey {
    fn new(key: Arc<dyn SigningKey>, public: Vec<u8>) -> Result<Self, String> {
        let known: [(SignatureScheme, &'static rcgen::SignatureAlgorithm); 4] = [
            (
                SignatureScheme::ECDSA_NISTP256_SHA256,
                &rcgen::PKCS_ECDSA_P256_SHA256,
            ),
            (
                SignatureScheme::ECDSA_NISTP384_SHA384,
                &rcgen::PKCS_ECDSA_P384_SHA384,
            ),
            (SignatureScheme::ED25519, &rcgen::PKCS_ED25519),
            (SignatureScheme::RSA_PKCS1_SHA256, &rcgen::PKCS_RSA_SHA256),
        ];
        let (scheme, algorithm) = known
            .into_iter()
            .find(|(scheme, _)| key.choose_scheme(&[*scheme]).is_some())
            .ok_or("the key of the interception CA has an unknown algorithm")?;
        Ok(Self {
            key,
            scheme,
            algorithm,
            public,
        })
    }
}

impl PublicKeyData for CaKey {
    fn der_bytes(&self) -> &[u8] {
        &self.public
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        self.algorithm
    }
}

impl rcgen::SigningKey for CaKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.key
            .choose_scheme(&[self.scheme])
            .and_then(|signer| signer.sign(message).ok())
            .ok_or(rcgen::Error::RemoteKeyError)
    }
}
