//! Application rules in the form that traffic is judged by.

mod http;
mod patterns;

use std::{collections::BTreeMap, sync::Arc};

use foldhash::HashMap;
use palisade_model::{
    rule::FqdnPattern,
    snapshot::{Matcher, RuleSet},
};
use palisade_protocols::dns::{Name, NameSet, PatternError};

pub use http::{HttpDenial, HttpRules, HttpScratch, HttpVerdict};

/// The application rules of a snapshot, in the form that traffic is judged by.
#[derive(Debug, Default)]
pub struct Rules {
    sets: HashMap<u32, Prepared>,
    problems: Vec<Problem>,
}

/// A pattern that could not be prepared. It matches nothing. Validation refuses such patterns, so this is a bug, or
/// the expressions of a rule set are too large together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The set of rules.
    pub ruleset: u32,
    /// Which pattern, and what is wrong with it.
    pub error: String,
}

#[derive(Clone, Debug)]
struct Prepared {
    source: Arc<RuleSet>,
    dns: Arc<DnsRules>,
    tls: Arc<TlsRules>,
    http: Arc<HttpRules>,
}

impl Rules {
    /// Prepares the rule sets of a snapshot. Those that `previous` has too are taken from there.
    #[must_use]
    pub fn prepare(sets: &BTreeMap<u32, Arc<RuleSet>>, previous: Option<&Self>) -> Self {
        let mut rules = Self::default();
        for (&id, source) in sets {
            let known = previous
                .and_then(|previous| previous.sets.get(&id))
                .filter(|known| Arc::ptr_eq(&known.source, source) || known.source == *source);
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
                    let expression =
                        |pattern: &str, error| problem(format!("regular expression \"{pattern}\": {error}"));
                    Prepared {
                        source: source.clone(),
                        dns,
                        tls,
                        http: Arc::new(HttpRules::prepare(source, expression)),
                    }
                }
            };
            rules.sets.insert(id, prepared);
        }
        rules
    }

    /// Whether a set of rules is known.
    #[must_use]
    pub fn knows(&self, ruleset: u32) -> bool {
        self.sets.contains_key(&ruleset)
    }

    /// How DNS queries are judged by a set of rules.
    #[must_use]
    pub fn dns(&self, ruleset: u32) -> Option<&DnsRules> {
        self.sets.get(&ruleset).map(|set| &*set.dns)
    }

    /// How server names are judged by a set of rules.
    #[must_use]
    pub fn tls(&self, ruleset: u32) -> Option<&TlsRules> {
        self.sets.get(&ruleset).map(|set| &*set.tls)
    }

    /// How HTTP requests are judged by a set of rules.
    #[must_use]
    pub fn http(&self, ruleset: u32) -> Option<&HttpRules> {
        self.sets.get(&ruleset).map(|set| &*set.http)
    }

    /// The rules as they were given.
    #[must_use]
    pub fn source(&self, ruleset: u32) -> Option<&Arc<RuleSet>> {
        self.sets.get(&ruleset).map(|set| &set.source)
    }

    /// What could not be prepared of the sets that are new.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

/// The names that may be asked for.
#[derive(Debug, Default)]
pub struct DnsRules(NameRules);

impl DnsRules {
    fn prepare(set: &RuleSet, problem: impl FnMut(PatternError)) -> Self {
        Self(NameRules::prepare(set, problem, |matcher| match matcher {
            Matcher::Dns(pattern) => Some(pattern),
            _ => None,
        }))
    }

    /// The rule that lets a name be asked for: that of the first alternative that matches.
    #[must_use]
    pub fn judge(&self, name: &Name) -> Option<u32> {
        self.0.judge(name)
    }
}

/// The server names that may be connected to.
#[derive(Debug, Default)]
pub struct TlsRules(NameRules);

impl TlsRules {
    fn prepare(set: &RuleSet, problem: impl FnMut(PatternError)) -> Self {
        Self(NameRules::prepare(set, problem, |matcher| match matcher {
            Matcher::ServerName(pattern) => Some(pattern),
            _ => None,
        }))
    }

    /// The rule that lets a connection to a server name pass: that of the first alternative that matches.
    #[must_use]
    pub fn judge(&self, name: &Name) -> Option<u32> {
        self.0.judge(name)
    }

    /// The rule that lets a connection pass whatever its server name, also without one.
    #[must_use]
    pub fn anyone(&self) -> Option<u32> {
        self.0.everything.map(|(_, rule)| rule)
    }
}

/// Names, and the rules that they stand in.
#[derive(Debug, Default)]
struct NameRules {
    names: NameSet,
    /// For each name or pattern: its place among the alternatives, and the rule that it stands in.
    places: Vec<(usize, u32)>,
    /// The first alternative that lets everything pass.
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

    fn judge(&self, name: &Name) -> Option<u32> {
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
