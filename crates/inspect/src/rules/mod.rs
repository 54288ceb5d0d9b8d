//! Application rules, prepared for matching.

mod http;
mod kafka;
mod patterns;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use foldhash::HashMap;
use palisade_model::{
    rule::{FqdnPattern, HeaderMatch, is_header_value},
    secret_value::SecretValue,
    snapshot::{Matcher, RuleSet},
};
use palisade_protocols::dns::{Name, NameSet, PatternError};

pub use http::{HeaderEdit, HttpDenial, HttpRules, HttpScratch, HttpVerdict};
pub use kafka::{KafkaRules, KafkaVerdict};

/// Application rules of a snapshot, prepared for matching.
#[derive(Debug, Default)]
pub struct Rules {
    sets: HashMap<u32, Prepared>,
    problems: Vec<Problem>,
}

/// A pattern that could not be prepared. It matches nothing. Validation rejects invalid patterns, so the cause is a
/// bug, or a limit that the expressions of a rule set exceed only together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Number of the rule set.
    pub ruleset: u32,
    /// The pattern and the problem.
    pub error: String,
}

#[derive(Clone, Debug)]
struct Prepared {
    source: Arc<RuleSet>,
    dns: Arc<DnsRules>,
    tls: Arc<TlsRules>,
    http: Arc<HttpRules>,
    kafka: Arc<KafkaRules>,
    /// `serverNames` of a rule set that reads another protocol inside TLS; `None` if every name is allowed.
    server_names: Option<Arc<NameSet>>,
    /// The secrets that the rules name, with the values that the rules have been prepared with.
    secrets: Box<[(String, Option<SecretValue>)]>,
}

impl Rules {
    /// Prepares the rule sets of a snapshot as [`Self::prepare_with`] does, without secrets.
    #[must_use]
    pub fn prepare(sets: &BTreeMap<u32, Arc<RuleSet>>, previous: Option<&Self>) -> Self {
        Self::prepare_with(sets, previous, &|_| None)
    }

    /// Prepares the rule sets of a snapshot. Rule sets that have not changed, and whose secrets have not, are taken from
    /// `previous`. `secrets` returns the value of a secret (`namespace/name`) for a header. A rule without its value
    /// allows no request, and is among the [problems](Self::problems).
    #[must_use]
    pub fn prepare_with(
        sets: &BTreeMap<u32, Arc<RuleSet>>,
        previous: Option<&Self>,
        secrets: &dyn Fn(&str) -> Option<SecretValue>,
    ) -> Self {
        let mut rules = Self::default();
        for (&id, source) in sets {
            let known = previous
                .and_then(|previous| previous.sets.get(&id))
                .filter(|known| Arc::ptr_eq(&known.source, source) || known.source == *source)
                .filter(|known| known.secrets.iter().all(|(name, value)| secrets(name) == *value));
            let prepared = match known {
                Some(known) => Prepared {
                    source: source.clone(),
                    ..known.clone()
                },
                None => {
                    let mut problem = |error| rules.problems.push(Problem { ruleset: id, error });
                    let mut named = |error: PatternError| problem(error.to_string());
                    let dns = Arc::new(DnsRules::prepare(source, &mut named));
                    let tls = Arc::new(TlsRules::prepare(source, &mut named));
                    let server_names = server_names(source, &mut named);
                    let secret_values = secret_values(source, secrets);
                    for error in missing(source, &secret_values) {
                        problem(error);
                    }
                    let known_secrets = |wanted: &str| {
                        let found = secret_values.iter().find(|(name, _)| name == wanted);
                        found.and_then(|(_, value)| value.clone())
                    };
                    let expression =
                        |pattern: &str, error| problem(format!("regular expression \"{pattern}\": {error}"));
                    Prepared {
                        source: source.clone(),
                        dns,
                        tls,
                        http: Arc::new(HttpRules::prepare(source, &known_secrets, expression)),
                        kafka: Arc::new(KafkaRules::prepare(source)),
                        server_names,
                        secrets: secret_values,
                    }
                }
            };
            rules.sets.insert(id, prepared);
        }
        rules
    }

    /// Returns whether a rule set is known.
    #[must_use]
    pub fn knows(&self, ruleset: u32) -> bool {
        self.sets.contains_key(&ruleset)
    }

    /// Returns the DNS rules of a rule set.
    #[must_use]
    pub fn dns(&self, ruleset: u32) -> Option<&DnsRules> {
        self.sets.get(&ruleset).map(|set| &*set.dns)
    }

    /// Returns the TLS rules of a rule set.
    #[must_use]
    pub fn tls(&self, ruleset: u32) -> Option<&TlsRules> {
        self.sets.get(&ruleset).map(|set| &*set.tls)
    }

    /// Returns the HTTP rules of a rule set.
    #[must_use]
    pub fn http(&self, ruleset: u32) -> Option<&HttpRules> {
        self.sets.get(&ruleset).map(|set| &*set.http)
    }

    /// Returns the Kafka rules of a rule set.
    #[must_use]
    pub fn kafka(&self, ruleset: u32) -> Option<&KafkaRules> {
        self.sets.get(&ruleset).map(|set| &*set.kafka)
    }

    /// Returns the `serverNames` of a rule set that reads another protocol inside TLS; `None` if every name is allowed.
    #[must_use]
    pub fn server_names(&self, ruleset: u32) -> Option<&NameSet> {
        self.sets.get(&ruleset)?.server_names.as_deref()
    }

    /// Returns the rule set from which the rules were prepared.
    #[must_use]
    pub fn source(&self, ruleset: u32) -> Option<&Arc<RuleSet>> {
        self.sets.get(&ruleset).map(|set| &set.source)
    }

    /// Returns the problems of the rule sets that were not taken from `previous`.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

/// Returns the names of [`RuleSet::server_names`]; `None` if the list is empty. A pattern that cannot be prepared matches
/// nothing.
fn server_names(set: &RuleSet, problem: &mut impl FnMut(PatternError)) -> Option<Arc<NameSet>> {
    if set.server_names.is_empty() {
        return None;
    }
    let mut patterns: Vec<&FqdnPattern> = set.server_names.iter().collect();
    loop {
        match NameSet::new(patterns.iter().copied()) {
            Ok(names) => return Some(Arc::new(names)),
            Err(error) => {
                patterns.remove(error.index);
                problem(error);
            }
        }
    }
}

/// Returns the entries of `headerMatches` with secrets.
fn with_secrets(set: &RuleSet) -> impl Iterator<Item = (&HeaderMatch, &str)> {
    let rules = set
        .alternatives
        .iter()
        .filter_map(|alternative| match &alternative.matcher {
            Matcher::Http(rule) => Some(rule),
            _ => None,
        });
    rules
        .flat_map(|rule| &rule.header_matches)
        .filter_map(|header| Some((header, header.secret.as_deref()?)))
}

/// Returns the secrets that a rule set names, with their values.
fn secret_values(
    set: &RuleSet,
    secrets: &dyn Fn(&str) -> Option<SecretValue>,
) -> Box<[(String, Option<SecretValue>)]> {
    let names: BTreeSet<&str> = with_secrets(set).map(|(_, name)| name).collect();
    let value = |name: &str| (name.to_owned(), secrets(name));
    names.into_iter().map(value).collect()
}

/// Returns the errors about secrets: those without a value, and values that cannot be in a header.
fn missing(set: &RuleSet, values: &[(String, Option<SecretValue>)]) -> Vec<String> {
    let mut errors = Vec::new();
    for (name, value) in values {
        match value {
            Some(value) if is_header_value(value.reveal()) => {}
            Some(_) => errors.push(format!("the value of secret {name} cannot be in a header")),
            None if with_secrets(set).any(|(header, secret)| secret == name && header.value.is_none()) => {
                errors.push(format!(
                    "secret {name} of headerMatches is missing or has not exactly one value: its rules allow no request"
                ));
            }
            None => {}
        }
    }
    errors
}

/// Names that queries may ask for.
#[derive(Debug, Default)]
pub struct DnsRules(NameRules);

impl DnsRules {
    fn prepare(set: &RuleSet, problem: impl FnMut(PatternError)) -> Self {
        Self(NameRules::prepare(set, problem, |matcher| match matcher {
            Matcher::Dns(pattern) => Some(pattern),
            _ => None,
        }))
    }

    /// Returns the rule of the first alternative that allows a query for `name`.
    #[must_use]
    pub fn evaluate(&self, name: &Name) -> Option<u32> {
        self.0.evaluate(name)
    }
}

/// Server names to which clients may connect.
#[derive(Debug, Default)]
pub struct TlsRules(NameRules);

impl TlsRules {
    fn prepare(set: &RuleSet, problem: impl FnMut(PatternError)) -> Self {
        Self(NameRules::prepare(set, problem, |matcher| match matcher {
            Matcher::ServerName(pattern) => Some(pattern),
            _ => None,
        }))
    }

    /// Returns the rule of the first alternative that allows a connection with the server name `name`.
    #[must_use]
    pub fn evaluate(&self, name: &Name) -> Option<u32> {
        self.0.evaluate(name)
    }

    /// Returns the rule that allows every connection, including connections without a server name.
    #[must_use]
    pub fn allow_all(&self) -> Option<u32> {
        self.0.everything.map(|(_, rule)| rule)
    }
}

/// Names and patterns, with their rules.
#[derive(Debug, Default)]
struct NameRules {
    names: NameSet,
    /// Index of the alternative and number of the rule, for each name or pattern.
    places: Vec<(usize, u32)>,
    /// Index of the first alternative that allows everything, and number of its rule.
    everything: Option<(usize, u32)>,
}

impl NameRules {
    fn prepare(
        set: &RuleSet,
        mut problem: impl FnMut(PatternError),
        pattern_of: impl Fn(&Matcher) -> Option<&FqdnPattern>,
    ) -> Self {
        let mut patterns = Vec::new();
        let mut rules = Self::default();
        for (place, alternative) in set.alternatives.iter().enumerate() {
            if let Some(pattern) = pattern_of(&alternative.matcher) {
                patterns.push(pattern);
                rules.places.push((place, alternative.rule));
            } else if alternative.matcher == Matcher::Everything {
                rules.everything.get_or_insert((place, alternative.rule));
            }
        }
        loop {
            match NameSet::new(patterns.iter().copied()) {
                Ok(names) => {
                    rules.names = names;
                    return rules;
                }
                Err(error) => {
                    patterns.remove(error.index);
                    rules.places.remove(error.index);
                    problem(error);
                }
            }
        }
    }

    fn evaluate(&self, name: &Name) -> Option<u32> {
        let named = self
            .names
            .first(name)
            .and_then(|index| self.places.get(index).copied());
        match (named, self.everything) {
            (Some(named), Some(everything)) => Some(named.min(everything).1),
            (one, other) => one.or(other).map(|(_, rule)| rule),
        }
    }
}
