//! Fetch sessions (KIP-227): a Fetch request that continues a session does not repeat its topics.

use std::collections::BTreeSet;

use palisade_protocols::kafka::Header;

use crate::{
    handover::wire::{Reader, Wire},
    rules::KafkaRules,
};

/// Maximum cost of a fetch session, bytes.
const MAX_COST: usize = 128 << 10;
/// Cost of a topic beside its name, bytes: the set and the allocator need about that many.
const ENTRY: usize = 64;

/// Topics of a fetch session, each once.
#[derive(Clone, Debug, Default)]
pub(super) struct SessionTopics {
    names: BTreeSet<Box<[u8]>>,
    cost: usize,
}

impl SessionTopics {
    /// Adds a topic. A topic beyond the limit is not kept, and [`Self::is_complete`] is false from then on.
    pub(super) fn add(&mut self, name: &[u8]) {
        if !self.is_complete() || self.names.contains(name) {
            return;
        }
        self.cost += ENTRY + name.len();
        if self.is_complete() {
            self.names.insert(name.into());
        }
    }

    /// Returns whether all added topics are kept.
    pub(super) const fn is_complete(&self) -> bool {
        self.cost <= MAX_COST
    }

    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    pub(super) fn first(&self) -> Option<&[u8]> {
        self.names.first().map(|name| &**name)
    }
}

/// What the verdict on the topics of a session depends on beside the topics.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Basis {
    rules: u64,
    version: i16,
    client: Option<Box<[u8]>>,
}

impl Basis {
    fn is(&self, rules: &KafkaRules, header: &Header<'_>) -> bool {
        self.rules == rules.generation()
            && self.version == header.version
            && self.client.as_deref() == header.client
    }
}

/// A fetch session of a connection.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: i32,
    topics: SessionTopics,
    /// Basis of the last verdict that allowed all topics.
    allowed: Option<Basis>,
}

impl Session {
    pub(super) const fn new(id: i32, topics: SessionTopics) -> Self {
        Self {
            id,
            topics,
            allowed: None,
        }
    }

    pub(super) fn topics(&self) -> &SessionTopics {
        &self.topics
    }

    /// Returns a topic that a request with this header must not name. The topics get a verdict again only if the rules or
    /// the header have changed, because a client can send continuing requests at a high rate.
    pub(super) fn denied_topic(&mut self, rules: &KafkaRules, header: &Header<'_>) -> Option<&[u8]> {
        if self.allowed.as_ref().is_some_and(|basis| basis.is(rules, header)) {
            return None;
        }
        let mut names = self.topics.names.iter().map(|name| &**name);
        if let Some(name) = names.find(|name| rules.evaluate_topic(header, name).is_none()) {
            return Some(name);
        }
        self.allowed = Some(Basis {
            rules: rules.generation(),
            version: header.version,
            client: header.client.map(Into::into),
        });
        None
    }

    /// Adds the topics of a continuing request that was allowed. Returns whether all are kept.
    pub(super) fn extend(&mut self, topics: &SessionTopics) -> bool {
        for name in &topics.names {
            self.topics.add(name);
        }
        topics.is_complete() && self.topics.is_complete()
    }
}

impl Wire for SessionTopics {
    fn write(&self, out: &mut Vec<u8>) {
        self.is_complete().write(out);
        (self.names.len() as u32).write(out);
        for name in &self.names {
            name.write(out);
        }
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let is_complete = bool::read(from)?;
        let mut topics = Self::default();
        for _ in 0..u32::read(from)? {
            topics.add(&Box::<[u8]>::read(from)?);
        }
        if !is_complete {
            topics.cost = MAX_COST + 1;
        }
        Some(topics)
    }
}

/// The last verdict on the topics is not handed over: the next request gets one by the rules in force then.
impl Wire for Session {
    fn write(&self, out: &mut Vec<u8>) {
        self.id.write(out);
        self.topics.write(out);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self::new(Wire::read(from)?, Wire::read(from)?))
    }
}

#[cfg(test)]
mod tests {
    use palisade_model::{
        rule::KafkaRule,
        snapshot::{Alternative, Matcher, RuleSet},
    };
    use palisade_protocols::kafka::FETCH;

    use super::*;

    fn rules(client: Option<&str>, topics: &[&str]) -> KafkaRules {
        KafkaRules::prepare(&RuleSet {
            alternatives: topics
                .iter()
                .map(|topic| Alternative {
                    rule: 1,
                    matcher: Matcher::Kafka(KafkaRule {
                        topic: Some((*topic).into()),
                        client_id: client.map(Into::into),
                        ..KafkaRule::default()
                    }),
                })
                .collect(),
            ..RuleSet::default()
        })
    }

    fn header(client: &str) -> Header<'_> {
        Header {
            key: FETCH,
            version: 11,
            correlation: 1,
            client: Some(client.as_bytes()),
        }
    }

    #[test]
    fn a_fetch_session_keeps_each_topic_once() {
        let mut topics = SessionTopics::default();
        for _ in 0..65_000 {
            topics.add(b"a");
            topics.add(b"");
        }
        assert!(topics.is_complete());
        assert_eq!((topics.names.len(), topics.cost), (2, 2 * ENTRY + 1));
        let mut session = Session::new(1, topics.clone());
        assert!(session.extend(&topics));
        assert_eq!(session.topics.names.len(), 2);
    }

    #[test]
    fn a_fetch_session_of_many_short_topics_is_not_kept() {
        let mut topics = SessionTopics::default();
        for number in 0..65_000_u32 {
            topics.add(&number.to_be_bytes());
        }
        assert!(!topics.is_complete());
        assert!(topics.names.len() <= MAX_COST / ENTRY, "{}", topics.names.len());
        assert!(!Session::new(1, SessionTopics::default()).extend(&topics));
    }

    #[test]
    fn a_fetch_session_is_evaluated_again_if_the_rules_or_the_header_change() {
        let mut topics = SessionTopics::default();
        topics.add(b"a");
        topics.add(b"b");
        let mut session = Session::new(1, topics);
        let (both, one) = (rules(Some("c"), &["a", "b"]), rules(Some("c"), &["a"]));
        assert_eq!(session.denied_topic(&both, &header("c")), None);
        assert!(session.allowed.as_ref().unwrap().is(&both, &header("c")));
        assert_eq!(session.denied_topic(&one, &header("c")), Some(&b"b"[..]));
        assert_eq!(session.denied_topic(&both, &header("other")), Some(&b"a"[..]));
        assert_eq!(session.denied_topic(&both, &header("c")), None);
    }
}
