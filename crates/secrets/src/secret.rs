//! Secrets whose content has been checked.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use palisade_model::secret_value::SecretValue;
use rustls::pki_types::CertificateDer;

use crate::{
    certificate::{self, Certificate, Parsed, Validity},
    error::SecretError,
    identity::{Identity, Trust},
    pem::{self, Section},
    problem::Problem,
    raw::{Item, Raw},
};

/// Largest number of certificates in the chain of an identity.
const MAX_CHAIN: usize = 16;

/// Identities and trusts that have been made from a secret, or why they cannot be made, so that each connection finds them
/// ready. The keys are those that policies name.
#[derive(Default)]
struct Made {
    identities: HashMap<(String, String), Result<Arc<Identity>, SecretError>>,
    trusts: HashMap<(String, String, String), Result<Arc<Trust>, SecretError>>,
    value: Option<SecretValue>,
}

/// A secret.
pub(crate) struct Secret {
    raw: Raw,
    /// Sections of each value that is PEM.
    pem: BTreeMap<String, Vec<Section>>,
    made: Mutex<Made>,
}

impl Secret {
    /// Parses the values that are PEM.
    pub(crate) fn new(raw: Raw) -> Result<Self, Problem> {
        let mut parsed = BTreeMap::new();
        for (key, item) in raw.items.iter().filter(|(_, item)| pem::is_pem(&item.bytes)) {
            let sections = pem::sections(&item.bytes).map_err(|error| {
                Problem::error(&item.file, item.line(error.line), error.text).of(&raw.name)
            })?;
            parsed.insert(key.clone(), sections);
        }
        Ok(Self {
            raw,
            pem: parsed,
            made: Mutex::default(),
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.raw.name
    }

    pub(crate) fn source(&self) -> &Path {
        &self.raw.source
    }

    /// Returns whether another secret has the same values at the same places.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let same = |a: &Item, b: &Item| a.bytes == b.bytes && a.line == b.line && a.file == b.file;
        self.raw.items.len() == other.raw.items.len()
            && self
                .raw
                .items
                .iter()
                .zip(&other.raw.items)
                .all(|((key, a), (other, b))| key == other && same(a, b))
    }

    /// Checks everything that is known without a policy: that certificates can be parsed, and that each `X.crt` and
    /// `X.key` fit. Returns the warnings.
    ///
    /// # Errors
    /// The first error.
    pub(crate) fn check(&self, now: i64) -> Result<Vec<Problem>, Problem> {
        let mut warnings = Vec::new();
        for (key, item, section) in self.certificate_sections() {
            let at = |text| Problem::warning(&item.file, item.line(section.line), text).of(self.name());
            let certificate = self.parse(item, section)?;
            match validity(&certificate, now) {
                Validity::Valid => {}
                Validity::Future => warnings.push(at(format!(
                    "the certificate of {} is not valid yet",
                    certificate.subject
                ))),
                Validity::Expired => {
                    warnings.push(at(format!(
                        "the certificate of {} has expired",
                        certificate.subject
                    )));
                }
            }
            if key == "tls.crt" && section.line == self.last_line(key) {
                warnings.extend(self.missing_issuer(&certificate).map(at));
            }
        }
        for key in self.pem.keys() {
            if let Some(stem) = key.strip_suffix(".crt") {
                let private = format!("{stem}.key");
                if self.raw.items.contains_key(&private) {
                    self.identity(key, &private).map_err(|error| match error {
                        SecretError::Unfit(problem) | SecretError::Broken(problem) => problem,
                        SecretError::Missing { .. }
                        | SecretError::NoKey { .. }
                        | SecretError::NoCa { .. } => Problem::error(self.source(), 0, error.to_string()),
                    })?;
                }
            }
        }
        Ok(warnings)
    }

    /// Returns the text of a warning if the last certificate of `tls.crt` has an issuer that `ca.crt` does not hold.
    fn missing_issuer(&self, last: &Parsed) -> Option<String> {
        let roots: Vec<_> = self
            .certificate_sections()
            .filter(|(key, ..)| *key == "ca.crt")
            .filter_map(|(_, _, section)| certificate::parse(&section.der).ok())
            .collect();
        let known = roots.iter().any(|root| last.is_issued_by(root));
        (!roots.is_empty() && !known && !last.is_self_issued()).then(|| {
            format!(
                "an intermediate certificate is missing: neither tls.crt nor ca.crt has the issuer {}",
                last.issuer
            )
        })
    }

    fn last_line(&self, key: &str) -> u32 {
        let last = self
            .pem
            .get(key)
            .and_then(|sections| sections.iter().rfind(|section| section.is_certificate()));
        last.map_or(0, |section| section.line)
    }

    fn certificate_sections(&self) -> impl Iterator<Item = (&str, &Item, &Section)> {
        self.pem.iter().flat_map(|(key, sections)| {
            let item = self.raw.items.get(key);
            let certificates = sections.iter().filter(|section| section.is_certificate());
            certificates.filter_map(move |section| Some((key.as_str(), item?, section)))
        })
    }

    fn parse(&self, item: &Item, section: &Section) -> Result<Parsed, Problem> {
        certificate::parse(&section.der)
            .map_err(|text| Problem::error(&item.file, item.line(section.line), text).of(self.name()))
    }

    /// Returns the certificates for people.
    pub(crate) fn certificates(&self) -> Vec<Certificate> {
        let mut all: Vec<Certificate> = Vec::new();
        for (key, item, section) in self.certificate_sections() {
            let Ok(parsed) = certificate::parse(&section.der) else {
                continue;
            };
            let index = all
                .last()
                .filter(|last| last.key == key)
                .map_or(0, |last| last.index + 1);
            all.push(Certificate {
                secret: self.name().to_owned(),
                key: key.to_owned(),
                index,
                file: item.file.to_path_buf(),
                line: item.line(section.line),
                subject: parsed.subject,
                names: parsed.names,
                issuer: parsed.issuer,
                serial: parsed.serial,
                not_before: parsed.not_before,
                not_after: parsed.not_after,
                fingerprint: certificate::fingerprint(&section.der),
                is_ca: parsed.is_ca,
            });
        }
        all
    }

    /// Returns the value for a header: the secret's only value, without white space at its end.
    pub(crate) fn value(&self) -> Option<SecretValue> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if made.value.is_none() {
            let mut items = self.raw.items.values();
            let (item, None) = (items.next()?, items.next()) else {
                return None;
            };
            made.value = Some(SecretValue::new(item.bytes.trim_ascii_end().to_vec()));
        }
        made.value.clone()
    }

    /// Returns the value of a key that must be PEM.
    fn sections(&self, key: &str) -> Result<(&Item, &[Section]), SecretError> {
        let item = self.raw.items.get(key).ok_or_else(|| SecretError::NoKey {
            secret: self.name().to_owned(),
            key: key.to_owned(),
        })?;
        match self.pem.get(key) {
            Some(sections) => Ok((item, sections)),
            None => Err(self.unfit(item, 1, format!("{key} is not PEM: no -----BEGIN line"))),
        }
    }

    fn unfit(&self, item: &Item, line: u32, text: String) -> SecretError {
        SecretError::Unfit(Problem::error(&item.file, item.line(line), text).of(self.name()))
    }

    /// Returns the certificate chain with the private key that fits.
    pub(crate) fn identity(&self, certificate: &str, key: &str) -> Result<Arc<Identity>, SecretError> {
        let made_as = (certificate.to_owned(), key.to_owned());
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(identity) = made.identities.get(&made_as) {
            return identity.clone();
        }
        let identity = self.make_identity(certificate, key).map(Arc::new);
        made.identities.insert(made_as, identity.clone());
        identity
    }

    fn make_identity(&self, certificate: &str, key: &str) -> Result<Identity, SecretError> {
        let (item, sections) = self.sections(certificate)?;
        let chain: Vec<&Section> = sections
            .iter()
            .filter(|section| section.is_certificate())
            .collect();
        let Some(first) = chain.first() else {
            return Err(self.unfit(item, 1, format!("{certificate} has no certificate")));
        };
        if chain.len() > MAX_CHAIN {
            let text = format!(
                "{certificate} has more than {MAX_CHAIN} certificates: a chain is needed, not a bundle"
            );
            return Err(self.unfit(item, first.line, text));
        }
        let mut above: Option<Parsed> = None;
        for (index, section) in chain.iter().enumerate() {
            let parsed = self.parse(item, section).map_err(SecretError::Unfit)?;
            if let Some(above) = &above
                && !above.is_issued_by(&parsed)
            {
                let text = format!(
                    "certificate {} ({}) is not the issuer of the one before it ({}): the order is server, \
                     intermediates, root",
                    index + 1,
                    parsed.subject,
                    above.issuer
                );
                return Err(self.unfit(item, section.line, text));
            }
            above = Some(parsed);
        }
        let (key_item, key_sections) = self.sections(key)?;
        let mut keys = key_sections.iter().filter(|section| section.is_private_key());
        let (Some(private), None) = (keys.next(), keys.next()) else {
            return Err(self.unfit(key_item, 1, format!("{key} must have exactly one private key")));
        };
        let chain = chain
            .iter()
            .map(|section| CertificateDer::from(section.der.to_vec()))
            .collect();
        Identity::new(chain, &private.label, &private.der).map_err(|error| {
            if error.in_certificate {
                self.unfit(item, first.line, error.text)
            } else {
                self.unfit(key_item, private.line, error.text)
            }
        })
    }

    /// Returns the trusted CAs, and the client certificate if the secret has one. `certificate` and `key`: names of its
    /// values; empty for `tls.crt` and `tls.key`.
    pub(crate) fn trust(&self, ca: &str, certificate: &str, key: &str) -> Result<Arc<Trust>, SecretError> {
        let made_as = (ca.to_owned(), certificate.to_owned(), key.to_owned());
        let known = {
            let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
            made.trusts.get(&made_as).cloned()
        };
        if let Some(trust) = known {
            return trust;
        }
        let trust = self.make_trust(ca, certificate, key).map(Arc::new);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.trusts.insert(made_as, trust.clone());
        trust
    }

    fn make_trust(&self, ca: &str, certificate: &str, key: &str) -> Result<Trust, SecretError> {
        let (item, sections) = self.sections(ca)?;
        let roots: Vec<CertificateDer<'static>> = sections
            .iter()
            .filter(|section| section.is_certificate())
            .map(|section| CertificateDer::from(section.der.to_vec()))
            .collect();
        // A name that the policy gives must exist; the usual names are used if both exist.
        let named = !certificate.is_empty() || !key.is_empty();
        let (certificate, key) = (or(certificate, "tls.crt"), or(key, "tls.key"));
        let both = [certificate, key]
            .iter()
            .all(|key| self.raw.items.contains_key(*key));
        let client = (named || both)
            .then(|| self.identity(certificate, key))
            .transpose()?;
        Trust::new(roots, client).map_err(|text| self.unfit(item, 1, format!("{ca}: {text}")))
    }
}

/// Returns the text, or the other one if it is empty.
pub(crate) fn or<'a>(text: &'a str, other: &'a str) -> &'a str {
    if text.is_empty() { other } else { text }
}

fn validity(certificate: &Parsed, now: i64) -> Validity {
    if now < certificate.not_before {
        Validity::Future
    } else if now > certificate.not_after {
        Validity::Expired
    } else {
        Validity::Valid
    }
}
