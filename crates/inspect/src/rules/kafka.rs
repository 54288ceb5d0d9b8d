//! Kafka rules, prepared for matching.

use std::sync::atomic::{AtomicU64, Ordering};

use foldhash::HashMap;
use palisade_model::{
    rule::KafkaRule,
    snapshot::{Matcher, RuleSet},
};
use palisade_protocols::kafka::{self, Header, Topics};

/// Index of an alternative and number of its rule.
type Place = (usize, u32);

/// Requests that clients may send.
#[derive(Debug, Default)]
pub struct KafkaRules {
    /// Conditions on the header, each with the topics of all alternatives that have the same condition.
    groups: Vec<Group>,
    /// First alternative that allows everything, also requests with an unknown API key.
    everything: Option<Place>,
    generation: u64,
}

/// Alternatives that differ only in the topic.
#[derive(Debug)]
struct Group {
    /// Condition on the header: a rule without its topic.
    header: KafkaRule,
    /// First alternative, with or without a topic.
    first: Place,
    /// First alternative without a topic.
    all_topics: Option<Place>,
    topics: HashMap<Box<[u8]>, Place>,
}

/// Verdict on a request by its header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KafkaVerdict {
    /// Allowed whatever its topics are.
    Allowed {
        /// Number of the rule.
        rule: u32,
        /// Whether the rule allows everything, so that nothing has to be known about the request.
        unrestricted: bool,
    },
    /// Allowed if the rules allow each topic of the request. The number is the rule that allows a request without topics.
    ByTopics(u32),
    /// No rule allows the request.
    Denied,
}

impl KafkaRules {
    pub(crate) fn prepare(set: &RuleSet) -> Self {
        static GENERATIONS: AtomicU64 = AtomicU64::new(1);
        let mut rules = Self {
            generation: GENERATIONS.fetch_add(1, Ordering::Relaxed),
            ..Self::default()
        };
        for (index, alternative) in set.alternatives.iter().enumerate() {
            let place = (index, alternative.rule);
            match &alternative.matcher {
                Matcher::Everything => {
                    rules.everything.get_or_insert(place);
                }
                Matcher::Kafka(rule) if *rule == KafkaRule::default() => {
                    rules.everything.get_or_insert(place);
                }
                Matcher::Kafka(rule) => rules.add(rule, place),
                _ => {}
            }
        }
        rules
    }

    /// Returns a number that differs between any two prepared rule sets of the process.
    #[must_use]
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    fn add(&mut self, rule: &KafkaRule, place: Place) {
        let header = KafkaRule {
            topic: None,
            ..rule.clone()
        };
        let known = self.groups.iter().position(|group| group.header == header);
        let index = known.unwrap_or_else(|| {
            self.groups.push(Group {
                header,
                first: place,
                all_topics: None,
                topics: HashMap::default(),
            });
            self.groups.len() - 1
        });
        let Some(group) = self.groups.get_mut(index) else {
            return;
        };
        match &rule.topic {
            Some(topic) => {
                group.topics.entry(topic.as_bytes().into()).or_insert(place);
            }
            None => {
                group.all_topics.get_or_insert(place);
            }
        }
    }

    fn matching<'a>(&'a self, header: &'a Header<'_>) -> impl Iterator<Item = &'a Group> {
        self.groups.iter().filter(|group| {
            let rule = &group.header;
            (rule.api_keys.is_empty() || rule.api_keys.contains(&header.key))
                && rule.api_version.is_none_or(|version| version == header.version)
                && rule
                    .client_id
                    .as_ref()
                    .is_none_or(|id| header.client == Some(id.as_bytes()))
        })
    }

    /// Evaluates a request by its header.
    #[must_use]
    pub fn evaluate(&self, header: &Header<'_>) -> KafkaVerdict {
        if let Some((_, rule)) = self.everything {
            return KafkaVerdict::Allowed {
                rule,
                unrestricted: true,
            };
        }
        if kafka::api_name(header.key).is_none() {
            return KafkaVerdict::Denied;
        }
        let all_topics = self.matching(header).filter_map(|group| group.all_topics).min();
        if let Some((_, rule)) = all_topics {
            return KafkaVerdict::Allowed {
                rule,
                unrestricted: false,
            };
        }
        let Some((_, rule)) = self.matching(header).map(|group| group.first).min() else {
            return KafkaVerdict::Denied;
        };
        match kafka::topics_of(header.key, header.version) {
            // A condition on the topic does not concern requests that cannot name one.
            Some(Topics::None) => KafkaVerdict::Allowed {
                rule,
                unrestricted: false,
            },
            Some(Topics::Admin) => {
                let naming = self
                    .matching(header)
                    .filter(|group| group.header.api_keys.contains(&header.key));
                match naming.map(|group| group.first).min() {
                    Some((_, rule)) => KafkaVerdict::Allowed {
                        rule,
                        unrestricted: false,
                    },
                    None => KafkaVerdict::Denied,
                }
            }
            Some(Topics::Read) => KafkaVerdict::ByTopics(rule),
            Some(Topics::Unread) | None => KafkaVerdict::Denied,
        }
    }

    /// Returns whether a rule has this topic.
    #[must_use]
    pub fn has_topic(&self, topic: &[u8]) -> bool {
        self.groups.iter().any(|group| group.topics.contains_key(topic))
    }

    /// Returns the rule that allows a request with this header to name `topic`.
    #[must_use]
    pub fn evaluate_topic(&self, header: &Header<'_>, topic: &[u8]) -> Option<u32> {
        self.matching(header)
            .filter_map(|group| group.topics.get(topic))
            .min()
            .map(|(_, rule)| *rule)
    }
}
