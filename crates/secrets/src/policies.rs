//! The secrets that policies and rule sets name, checked against a store.

use palisade_model::{
    diagnostic::Diagnostic,
    rule::{HttpRule, L7Rules, Location, Policy, PortRule, Ports, TlsContext},
    snapshot::{Matcher, RuleSet},
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
        let rules = match &entry.l7.rules {
            L7Rules::Http(rules) => &rules[..],
            _ => &[],
        };
        let contexts = (
            entry.l7.terminating_tls.as_ref(),
            entry.l7.originating_tls.as_ref(),
        );
        for (what, error) in errors(contexts, rules.iter(), store, interception_ca) {
            let diagnostic = Diagnostic::error(entry.location.clone(), message(what, &error));
            if !found.contains(&diagnostic) {
                found.push(diagnostic);
            }
        }
    }
    found
}

/// Returns why a secret cannot be the interception CA; `None` if it can.
fn interception_ca_error(store: &Store, secret: &str) -> Option<SecretError> {
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

/// Returns why secrets that a rule set names cannot be used, each with the member of the policy that names the secret and
/// the error. The traffic of the rule set that needs them is denied. `interception_ca`: as for [`check_policies`].
#[must_use]
pub fn check_rule_set(set: &RuleSet, store: &Store, interception_ca: Option<&str>) -> Vec<String> {
    let rules = set
        .alternatives
        .iter()
        .filter_map(|alternative| match &alternative.matcher {
            Matcher::Http(rule) => Some(rule),
            _ => None,
        });
    let contexts = (set.terminating_tls.as_ref(), set.originating_tls.as_ref());
    let mut found: Vec<String> = Vec::new();
    for (what, error) in errors(contexts, rules, store, interception_ca) {
        let message = message(what, &error);
        if !found.contains(&message) {
            found.push(message);
        }
    }
    found
}

fn message(what: &str, error: &SecretError) -> String {
    format!("{what}: {error}; the traffic that needs it is denied")
}

/// `contexts`: `terminatingTLS` and `originatingTLS`.
fn errors<'a>(
    contexts: (Option<&TlsContext>, Option<&TlsContext>),
    rules: impl Iterator<Item = &'a HttpRule>,
    store: &Store,
    interception_ca: Option<&str>,
) -> Vec<(&'static str, SecretError)> {
    let mut errors = Vec::new();
    let (terminating, originating) = contexts;
    if let Some(context) = terminating {
        let error = if interception_ca == Some(context.secret.as_str()) {
            interception_ca_error(store, &context.secret)
        } else {
            store.identity(context).err()
        };
        errors.extend(error.map(|error| ("terminatingTLS", error)));
    }
    if let Some(context) = originating {
        errors.extend(store.trust(context).err().map(|error| ("originatingTLS", error)));
    }
    for header in rules.flat_map(|rule| &rule.header_matches) {
        // The value of the policy stands in for a secret without a value.
        if let Some(secret) = &header.secret
            && (header.value.is_none() || store.value(secret).is_some())
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
