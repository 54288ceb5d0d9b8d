//! The secrets that policies name, checked against a store.

use palisade_model::{
    diagnostic::Diagnostic,
    rule::{HttpRule, L7, L7Rules, Location, Policy, PortRule, Ports, TlsContext},
};

use crate::{certificate, error::SecretError, store::Store};

/// Returns an error for each secret that a policy names and that cannot be used, at the place of the `toPorts` entry.
/// The traffic that needs the secret is denied. `interception_ca`: `namespace/name` of the secret with the interception
/// CA.
#[must_use]
pub fn check_policies<'a>(
    policies: impl IntoIterator<Item = &'a Policy>,
    store: &Store,
    interception_ca: Option<&str>,
) -> Vec<Diagnostic> {
    let mut found: Vec<Diagnostic> = Vec::new();
    for entry in policies.into_iter().flat_map(entries) {
        for (what, error) in errors(&entry.l7, store, interception_ca) {
            let message = format!("{what}: {error}; the traffic that needs it is denied");
            let diagnostic = Diagnostic::error(entry.location.clone(), message);
            if !found.contains(&diagnostic) {
                found.push(diagnostic);
            }
        }
    }
    found
}

/// Returns why a secret cannot be the interception CA; `None` if it can.
#[must_use]
pub fn interception_ca_error(store: &Store, secret: &str) -> Option<SecretError> {
    let context = TlsContext {
        secret: secret.to_owned(),
        ..TlsContext::default()
    };
    let identity = match store.identity(&context) {
        Ok(identity) => identity,
        Err(error) => return Some(error),
    };
    let is_ca = identity
        .chain()
        .first()
        .and_then(|first| certificate::parse(first).ok())
        .is_some_and(|first| first.is_ca);
    (!is_ca).then(|| SecretError::NoCa {
        secret: secret.to_owned(),
    })
}

fn entries(policy: &Policy) -> impl Iterator<Item = &PortRule> {
    let rules = policy
        .specs
        .iter()
        .flat_map(palisade_model::rule::Spec::all_rules);
    rules.flat_map(|rule| match &rule.ports {
        Ports::Any => &[][..],
        Ports::OneOf(entries) => entries,
    })
}

fn errors(l7: &L7, store: &Store, interception_ca: Option<&str>) -> Vec<(&'static str, SecretError)> {
    let mut errors = Vec::new();
    if let Some(context) = &l7.terminating_tls {
        let error = if interception_ca == Some(context.secret.as_str()) {
            interception_ca_error(store, &context.secret)
        } else {
            store.identity(context).err()
        };
        errors.extend(error.map(|error| ("terminatingTLS", error)));
    }
    if let Some(context) = &l7.originating_tls {
        errors.extend(store.trust(context).err().map(|error| ("originatingTLS", error)));
    }
    if let L7Rules::Http(rules) = &l7.rules {
        let headers = rules.iter().flat_map(|rule: &HttpRule| &rule.header_matches);
        for secret in headers
            .filter(|header| header.value.is_none())
            .filter_map(|header| header.secret.as_deref())
        {
            errors.extend(store.value_error(secret).map(|error| ("headerMatches", error)));
        }
    }
    errors
}

impl From<&crate::Problem> for Diagnostic {
    fn from(problem: &crate::Problem) -> Self {
        Self {
            severity: problem.severity,
            location: Location {
                file: problem.file.display().to_string().into(),
                line: problem.line.max(1),
                column: 1,
            },
            message: problem.text.clone(),
        }
    }
}
