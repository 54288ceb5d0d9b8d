//! Descriptions of certificate chains, and a check of server certificates that keeps the details of its last failure.

use std::{
    cell::RefCell,
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::printable::printable;

/// Maximum number of certificates of a chain that are followed.
const LONGEST: usize = 10;

thread_local! {
    /// Details of the last failure of a check on this thread. The TLS library calls the check, and its caller on the
    /// same thread learns only the kind of the failure.
    static DETAIL: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Returns the details of the last failure of a check on this thread, and forgets them.
pub(crate) fn take_detail() -> Option<String> {
    DETAIL.take()
}

/// The check of server certificates against the CAs of one secret.
#[derive(Debug)]
pub(crate) struct Verifier {
    pub(crate) inner: Arc<WebPkiServerVerifier>,
    /// Takes the certificates that the server has sent.
    pub(crate) seen: Option<Arc<Mutex<Vec<CertificateDer<'static>>>>>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(seen) = &self.seen {
            let chain = std::iter::once(end_entity).chain(intermediates).take(LONGEST);
            *seen.lock().unwrap_or_else(PoisonError::into_inner) =
                chain.map(|der| der.clone().into_owned()).collect();
        }
        let verdict =
            self.inner
                .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        if let Err(Error::InvalidCertificate(CertificateError::UnknownIssuer)) = verdict {
            DETAIL.set(missing_issuer(end_entity, intermediates));
        }
        verdict
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        self.inner.root_hint_subjects()
    }
}

/// Returns in words which certificate of a chain has no issuer among those that the server has sent.
fn missing_issuer(end_entity: &CertificateDer<'_>, intermediates: &[CertificateDer<'_>]) -> Option<String> {
    let (_, mut top) = X509Certificate::from_der(end_entity).ok()?;
    let others: Vec<X509Certificate<'_>> = intermediates
        .iter()
        .take(LONGEST)
        .filter_map(|der| X509Certificate::from_der(der).ok())
        .map(|(_, certificate)| certificate)
        .collect();
    for _ in 0..LONGEST {
        if top.issuer() == top.subject() {
            return Some(format!("\"{}\" is self-signed and not trusted", top.subject()));
        }
        match others.iter().find(|other| other.subject() == top.issuer()) {
            Some(other) => top = other.clone(),
            None => break,
        }
    }
    Some(format!(
        "the issuer \"{}\" is not trusted, and the server has sent no certificate of it",
        top.issuer()
    ))
}

/// Returns subject, issuer, names and period of a certificate in one line.
pub(crate) fn describe(der: &CertificateDer<'_>) -> String {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else {
        return "a certificate that cannot be parsed".to_owned();
    };
    let mut names = Vec::new();
    if let Ok(Some(list)) = certificate.subject_alternative_name() {
        names.extend(list.value.general_names.iter().take(16).map(|name| match name {
            x509_parser::extensions::GeneralName::DNSName(name) => (*name).to_owned(),
            other => other.to_string(),
        }));
    }
    let validity = certificate.validity();
    let text = format!(
        "subject \"{}\", names {}, issuer \"{}\", valid from {} to {}",
        certificate.subject(),
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        },
        certificate.issuer(),
        validity.not_before,
        validity.not_after
    );
    printable(&text)
}
