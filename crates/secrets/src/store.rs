//! All secrets of the folder.

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use palisade_model::{
    rule::{TlsContext, is_header_value},
    secret_value::SecretValue,
};

use crate::{
    certificate::Certificate,
    error::SecretError,
    folder,
    identity::{Identity, Trust},
    problem::Problem,
    raw::Found,
    secret::{Secret, or},
};

/// The secrets of a folder at one time.
#[derive(Clone, Default)]
pub struct Store {
    secrets: BTreeMap<String, Arc<Secret>>,
    /// The first error of each secret that has one, also if its last good content is in use.
    broken: BTreeMap<String, Problem>,
}

impl Store {
    /// Reads a folder. Returns the secrets, and the problems in the order of the files.
    ///
    /// A secret with an error keeps the content that it has in `previous`, and so does every secret of a file that cannot
    /// be read. A secret that is no longer in the folder is gone. An unchanged secret stays the same object, so that
    /// [`Self::identity`] and [`Self::trust`] return the same [`Arc`].
    #[must_use]
    pub fn load(dir: &Path, previous: Option<&Self>) -> (Self, Vec<Problem>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::of(
            folder::read(dir),
            previous,
            i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
        )
    }

    fn of(found: Found, previous: Option<&Self>, now: i64) -> (Self, Vec<Problem>) {
        let Found {
            secrets,
            mut problems,
        } = found;
        let mut store = Self::default();
        let old = |name: &str| previous.and_then(|previous| previous.secrets.get(name));
        let mut candidates: BTreeMap<String, Vec<_>> = BTreeMap::new();
        for raw in secrets {
            candidates.entry(raw.name.clone()).or_default().push(raw);
        }
        for (name, mut raws) in candidates {
            // If several files contain the secret, the file of its previous content is used, otherwise the first file.
            let kept = old(&name).and_then(|old| raws.iter().position(|raw| *raw.source == *old.source()));
            let raw = raws.swap_remove(kept.unwrap_or(0));
            for other in raws {
                let text = format!("secret {name} is also in {}, which is used", raw.source.display());
                problems.push(Problem::warning(&other.source, 0, text).of(&name));
            }
            let checked = Secret::new(raw).and_then(|secret| Ok((secret.check(now)?, secret)));
            match checked {
                Ok((warnings, secret)) => {
                    problems.extend(warnings);
                    let secret = match old(&name) {
                        Some(old) if old.is_same(&secret) => Arc::clone(old),
                        _ => Arc::new(secret),
                    };
                    store.secrets.insert(name, secret);
                }
                Err(problem) => problems.push(problem),
            }
        }
        for problem in problems.iter_mut().filter(|problem| problem.is_error()) {
            match &problem.secret {
                Some(name) => {
                    store
                        .broken
                        .entry(name.clone())
                        .or_insert_with(|| problem.clone());
                    if !store.secrets.contains_key(name)
                        && let Some(old) = old(name)
                    {
                        store.secrets.insert(name.clone(), Arc::clone(old));
                    }
                }
                None => {
                    for (name, old) in previous.iter().flat_map(|previous| &previous.secrets) {
                        if old.source().starts_with(&problem.file) {
                            store
                                .broken
                                .entry(name.clone())
                                .or_insert_with(|| problem.clone());
                            store
                                .secrets
                                .entry(name.clone())
                                .or_insert_with(|| Arc::clone(old));
                        }
                    }
                }
            }
        }
        problems.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
        (store, problems)
    }

    fn secret(&self, name: &str) -> Result<&Arc<Secret>, SecretError> {
        self.secrets.get(name).ok_or_else(|| match self.broken.get(name) {
            Some(problem) => SecretError::Broken(problem.clone()),
            None => SecretError::Missing {
                secret: name.to_owned(),
            },
        })
    }

    /// Returns the certificate chain and private key of `terminatingTLS`. Empty key names mean `tls.crt` and `tls.key`.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn identity(&self, context: &TlsContext) -> Result<Arc<Identity>, SecretError> {
        self.secret(&context.secret)?.identity(
            or(&context.certificate, "tls.crt"),
            or(&context.private_key, "tls.key"),
        )
    }

    /// Returns the trusted CAs of `originatingTLS` with its client certificate. An empty `trustedCA` means `ca.crt`. The
    /// usual names `tls.crt` and `tls.key` are the client certificate if the secret has both; other names must exist.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn trust(&self, context: &TlsContext) -> Result<Arc<Trust>, SecretError> {
        self.secret(&context.secret)?.trust(
            or(&context.trusted_ca, "ca.crt"),
            &context.certificate,
            &context.private_key,
        )
    }

    /// Returns the value of a secret (`namespace/name`) for a header; `None` if the secret is missing or does not have
    /// exactly one value.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<SecretValue> {
        self.secrets.get(name)?.value()
    }

    /// Returns why [`Self::value`] has no value, or one that cannot be in a header; `None` if it can be used.
    #[must_use]
    pub fn value_error(&self, name: &str) -> Option<SecretError> {
        match self.secret(name) {
            Err(error) => Some(error),
            Ok(secret) => {
                let text = match secret.value() {
                    None => format!("secret {name} must have exactly one value"),
                    Some(value) if !is_header_value(value.reveal()) => {
                        format!(
                            "the value of secret {name} cannot be in a header: it has a control character"
                        )
                    }
                    Some(_) => return None,
                };
                Some(SecretError::Unfit(
                    Problem::error(secret.source(), 0, text).of(name),
                ))
            }
        }
    }

    /// Returns all certificates, in the order of secrets and keys.
    #[must_use]
    pub fn certificates(&self) -> Vec<Certificate> {
        self.secrets
            .values()
            .flat_map(|secret| secret.certificates())
            .collect()
    }

    /// Returns the names (`namespace/name`) of the secrets that can be used.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.secrets.keys().map(String::as_str)
    }

    /// Returns whether both stores hold the same objects, so that nothing that depends on secrets needs to be made
    /// again.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.broken == other.broken
            && self.secrets.len() == other.secrets.len()
            && self
                .secrets
                .iter()
                .zip(&other.secrets)
                .all(|((name, a), (other, b))| name == other && Arc::ptr_eq(a, b))
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store")
            .field("secrets", &self.secrets.keys())
            .finish_non_exhaustive()
    }
}
