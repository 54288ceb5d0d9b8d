//! The application rules of one entry of `toPorts`, and conflicts between the rules of two entries.

use palisade_abi::Inspector;
use palisade_model::{
    rule::{FqdnPattern, L7, L7Rules, Listener, TlsContext},
    snapshot::{Matcher, inspector_name},
};

/// The application rules of one `toPorts` entry, ready to be merged with others.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct L7Policy {
    /// Protocol that the inspector reads.
    pub(super) kind: Inspector,
    /// Priority of the protocol: if several protocols match a packet, the one with the lowest number is inspected.
    pub(super) priority: u8,
    /// Alternatives: a request passes if one of the matchers matches.
    pub(super) matchers: Vec<Matcher>,
    /// `serverNames` in addition to rules of another protocol.
    pub(super) server_names: Vec<FqdnPattern>,
    pub(super) terminating_tls: Option<TlsContext>,
    pub(super) originating_tls: Option<TlsContext>,
    pub(super) listener: Option<Listener>,
}

impl L7Policy {
    /// Returns the application rules of an entry; `None` if it has none.
    ///
    /// The default verdict of the endpoint decides requests that no rule matches ([`merge`](super::precedence)). If the
    /// default verdict is allow, application rules restrict nothing.
    pub(super) fn of(l7: &L7) -> Option<Self> {
        if l7.is_none() {
            return None;
        }
        let names = || l7.server_names.iter().cloned().map(Matcher::ServerName);
        let (kind, mut matchers): (Inspector, Vec<Matcher>) = match &l7.rules {
            L7Rules::Http(rules) => (
                Inspector::Http,
                rules.iter().cloned().map(Matcher::Http).collect(),
            ),
            L7Rules::Kafka(rules) => (
                Inspector::Kafka,
                rules.iter().cloned().map(Matcher::Kafka).collect(),
            ),
            L7Rules::Dns(rules) => (Inspector::Dns, rules.iter().cloned().map(Matcher::Dns).collect()),
            L7Rules::Generic { parser, rules } => (
                Inspector::Listener,
                rules
                    .iter()
                    .map(|rule| Matcher::Generic {
                        parser: parser.clone(),
                        rule: rule.clone(),
                    })
                    .collect(),
            ),
            L7Rules::None => (Inspector::Tls, names().collect()),
        };
        let alone = l7.rules == L7Rules::None;
        if matchers.is_empty() {
            matchers.push(Matcher::Everything);
        }
        let mut priority = match kind {
            Inspector::Http => 101,
            Inspector::Kafka => 106,
            Inspector::Tls | Inspector::TlsTerminate => 116,
            Inspector::Dns => 121,
            Inspector::None | Inspector::Listener => 111,
        };
        let mut kind = kind;
        if let Some(listener) = &l7.listener {
            kind = Inspector::Listener;
            priority = if listener.priority == 0 {
                126
            } else {
                listener.priority
            };
        }
        Some(Self {
            kind,
            priority,
            matchers,
            server_names: if alone {
                Vec::new()
            } else {
                l7.server_names.clone()
            },
            terminating_tls: l7.terminating_tls.clone(),
            originating_tls: l7.originating_tls.clone(),
            listener: l7.listener.clone(),
        })
    }

    /// Returns the reason why the application rules of two entries for the same peer and port exclude each other;
    /// `None` if the rules can be merged.
    pub(super) fn conflict(&self, other: &Self) -> Option<String> {
        let name = |l7: &Self| inspector_name(l7.kind as u8);
        // Server names combine with http or kafka rules only if TLS is terminated.
        let names = |l7: &Self| {
            let names = l7
                .matchers
                .iter()
                .any(|matcher| matches!(matcher, Matcher::ServerName(_)));
            names || !l7.server_names.is_empty()
        };
        let can_join = |outer: &Self, inner: &Self| {
            outer.kind == Inspector::Tls
                && matches!(inner.kind, Inspector::Http | Inspector::Kafka)
                && (outer.terminating_tls.is_some()
                    || inner.terminating_tls.is_some()
                    || !(names(outer) || names(inner)))
        };
        if self.kind != other.kind && !can_join(self, other) && !can_join(other, self) {
            return Some(format!(
                "{} and {} cannot both be inspected",
                name(self),
                name(other)
            ));
        }
        if let (Some(a), Some(b)) = (&self.listener, &other.listener)
            && self.priority == other.priority
            && (&a.kind, &a.resource, &a.name) != (&b.kind, &b.resource, &b.name)
        {
            return Some(format!(
                "listeners {} and {} have the same priority",
                a.name, b.name
            ));
        }
        if let (Matcher::Generic { parser: a, .. }, Matcher::Generic { parser: b, .. }) =
            (self.matchers.first()?, other.matchers.first()?)
            && a != b
        {
            return Some(format!("{a} and {b} cannot both be inspected"));
        }
        let differ = |a: &Option<TlsContext>, b: &Option<TlsContext>| a.is_some() && b.is_some() && a != b;
        if differ(&self.terminating_tls, &other.terminating_tls) {
            return Some("two different terminatingTLS".into());
        }
        if differ(&self.originating_tls, &other.originating_tls) {
            return Some("two different originatingTLS".into());
        }
        None
    }
}
