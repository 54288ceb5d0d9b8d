//! X.509 certificates (RFC 5280) as texts for people, and their dates.

use std::path::PathBuf;

use serde::Serialize;
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    parse_x509_certificate,
};

/// Seconds of a day.
const DAY: i64 = 86_400;

/// A certificate of the folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Certificate {
    /// `namespace/name` of the secret.
    pub secret: String,
    /// Key of the value in the secret.
    pub key: String,
    /// Index in the value; 0 is the first certificate.
    pub index: usize,
    /// File.
    pub file: PathBuf,
    /// Line in the file.
    pub line: u32,
    /// Subject.
    pub subject: String,
    /// Subject alternative names: `DNS:NAME`, `IP:ADDRESS`, `URI:URI`, `email:ADDRESS`.
    pub names: Vec<String>,
    /// Issuer.
    pub issuer: String,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// First second of validity, Unix time.
    pub not_before: i64,
    /// Last second of validity, Unix time.
    pub not_after: i64,
    /// SHA-256 of the certificate, hexadecimal.
    pub fingerprint: String,
    /// Whether the certificate may sign others (basic constraints).
    pub is_ca: bool,
}

/// Validity of a certificate at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Validity {
    /// Valid.
    Valid,
    /// Not yet valid.
    Future,
    /// No longer valid.
    Expired,
}

impl Certificate {
    /// Returns the validity at a time (Unix time, s).
    #[must_use]
    pub const fn validity(&self, now: i64) -> Validity {
        if now < self.not_before {
            Validity::Future
        } else if now > self.not_after {
            Validity::Expired
        } else {
            Validity::Valid
        }
    }
}

/// Returns whether a certificate with this end (`not_after`, Unix time, s) has expired, or expires within `days`.
#[must_use]
pub const fn expires_within(not_after: i64, now: i64, days: u32) -> bool {
    not_after < now.saturating_add(days as i64 * DAY)
}

/// End of the validity of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expiry {
    /// Subject of the certificate.
    pub subject: String,
    /// Last second of validity, Unix time.
    pub not_after: i64,
}

/// Returns the end of the validity of a certificate in DER.
///
/// # Errors
/// The reason as text.
pub fn expiry(der: &[u8]) -> Result<Expiry, String> {
    let Parsed {
        subject, not_after, ..
    } = parse(der)?;
    Ok(Expiry { subject, not_after })
}

/// The parts of a certificate that this crate uses.
pub(crate) struct Parsed {
    pub subject: String,
    pub issuer: String,
    pub names: Vec<String>,
    pub serial: String,
    pub not_before: i64,
    pub not_after: i64,
    pub is_ca: bool,
}

impl Parsed {
    /// Returns whether subject and issuer are equal, as in a root certificate.
    pub(crate) fn is_self_issued(&self) -> bool {
        same_name(&self.subject, &self.issuer)
    }

    /// Returns whether the issuer of this certificate is the subject of another.
    pub(crate) fn is_issued_by(&self, other: &Self) -> bool {
        same_name(&self.issuer, &other.subject)
    }
}

/// Compares names without regard to case, as RFC 5280, section 7.1, requires for the usual string types.
fn same_name(a: &str, b: &str) -> bool {
    a.to_lowercase() == b.to_lowercase()
}

/// Parses a certificate.
///
/// # Errors
/// The reason as text.
pub(crate) fn parse(der: &[u8]) -> Result<Parsed, String> {
    let (rest, certificate) =
        parse_x509_certificate(der).map_err(|error| format!("no valid certificate: {error}"))?;
    if !rest.is_empty() {
        return Err("no valid certificate: bytes after its end".into());
    }
    Ok(Parsed {
        subject: printable(&certificate.subject().to_string()),
        issuer: printable(&certificate.issuer().to_string()),
        names: names(&certificate),
        serial: hex(certificate.raw_serial()),
        not_before: certificate.validity().not_before.timestamp(),
        not_after: certificate.validity().not_after.timestamp(),
        is_ca: certificate.is_ca(),
    })
}

fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let mut names = Vec::new();
    for extension in certificate.extensions() {
        if let ParsedExtension::SubjectAlternativeName(alternative) = extension.parsed_extension() {
            names.extend(alternative.general_names.iter().filter_map(|name| match name {
                GeneralName::DNSName(name) => Some(format!("DNS:{}", printable(name))),
                GeneralName::URI(uri) => Some(format!("URI:{}", printable(uri))),
                GeneralName::RFC822Name(address) => Some(format!("email:{}", printable(address))),
                GeneralName::IPAddress(bytes) => Some(match <[u8; 4]>::try_from(*bytes) {
                    Ok(v4) => format!("IP:{}", std::net::Ipv4Addr::from(v4)),
                    Err(_) => match <[u8; 16]>::try_from(*bytes) {
                        Ok(v6) => format!("IP:{}", std::net::Ipv6Addr::from(v6)),
                        Err(_) => format!("IP:{}", hex(bytes)),
                    },
                }),
                _ => None,
            }));
        }
    }
    names
}

/// Returns the SHA-256 of a certificate, hexadecimal.
pub(crate) fn fingerprint(der: &[u8]) -> String {
    let hash = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256
        .tls13()
        .map(|suite| suite.common.hash_provider.hash(der));
    hash.map_or_else(String::new, |hash| hex(hash.as_ref()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Escapes control characters: the text goes to terminals and logs.
fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let escape = c.is_control();
            escape
                .then(|| c.escape_default())
                .into_iter()
                .flatten()
                .chain((!escape).then_some(c))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_expires_within_days() {
        assert!(!expires_within(100 * DAY, 69 * DAY, 30));
        assert!(!expires_within(100 * DAY, 70 * DAY, 30));
        assert!(expires_within(100 * DAY, 70 * DAY + 1, 30));
        assert!(expires_within(0, DAY, 0));
        assert!(!expires_within(i64::MAX, i64::MAX, u32::MAX));
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(printable("CN=a\u{1b}[0m"), "CN=a\\u{1b}[0m");
    }
}
