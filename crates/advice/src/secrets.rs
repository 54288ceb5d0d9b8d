//! Secrets of rules for requests inside TLS. Flows do not name them; the policies that intercept now do.

use std::collections::{BTreeMap, BTreeSet};

use palisade_model::rule::{L4Protocol, PortSpec, Ports, TlsContext};
use palisade_policy::compile::FileContent;

/// Names of the secrets while no policy is known that has them: of `terminatingTLS` and of `originatingTLS`.
const UNKNOWN: [&str; 2] = ["tls-secrets/replace-certificate", "tls-secrets/replace-ca"];

/// `terminatingTLS` and `originatingTLS` of an entry.
pub(crate) type TlsPair = (TlsContext, Option<TlsContext>);

/// The secrets of known policies.
#[derive(Debug, Default)]
pub(crate) struct Secrets(Vec<(Vec<PortSpec>, TlsPair)>);

impl Secrets {
    /// Collects the secrets of policies.
    pub(crate) fn of(files: &BTreeMap<String, Option<FileContent>>) -> Self {
        let policies = files.values().flatten().flat_map(|content| &content.policies);
        let specs = policies.flat_map(|policy| &policy.specs);
        let rules = specs
            .flat_map(|spec| [&spec.ingress, &spec.egress])
            .flatten()
            .flatten();
        let entries = rules.flat_map(|rule| match &rule.ports {
            Ports::OneOf(entries) => entries.as_slice(),
            Ports::Any => &[],
        });
        let pairs = entries.filter_map(|entry| {
            let terminating = entry.l7.terminating_tls.clone()?;
            Some((
                entry.ports.clone(),
                (terminating, entry.l7.originating_tls.clone()),
            ))
        });
        Self(pairs.collect())
    }

    /// Returns the secrets for a TCP port: those of the policies for this port, or else of all policies, if these have
    /// exactly one pair. Entries for the same port must have the same secrets, since their peers can overlap.
    pub(crate) fn of_port(&self, port: u16) -> TlsPair {
        let is_at_port = |spec: &PortSpec| {
            matches!(
                spec,
                PortSpec::Range {
                    protocol: L4Protocol::Tcp | L4Protocol::Any,
                    first,
                    last,
                } if (*first..=*last).contains(&port)
            )
        };
        let only = |at_port: bool| {
            let pairs = self
                .0
                .iter()
                .filter(|(ports, _)| !at_port || ports.iter().any(is_at_port));
            let pairs: BTreeSet<&TlsPair> = pairs.map(|(_, pair)| pair).collect();
            pairs.first().copied().filter(|_| pairs.len() == 1).cloned()
        };
        only(true).or_else(|| only(false)).unwrap_or_else(|| {
            let [terminating, originating] = UNKNOWN.map(|secret| TlsContext {
                secret: secret.to_owned(),
                ..TlsContext::default()
            });
            (terminating, Some(originating))
        })
    }
}

/// Returns whether the names of the secrets have to be replaced.
pub(crate) fn is_unknown((terminating, _): &TlsPair) -> bool {
    terminating.secret == UNKNOWN[0]
}
