//! Open DNS questions. An answer is accepted only if its id, addresses, ports and question match an open question (RFC
//! 5452). [`Tracker`] has a limit per endpoint and a limit for all endpoints, and does not allocate in the steady
//! state.
//!
//! The questions are in a vector with a free list, linked by age and by key. The similar queue of `inspect`
//! (`expiry_queue.rs`) links values by age only, so it is not used here.

use std::{
    collections::{
        HashMap,
        hash_map::{DefaultHasher, RandomState},
    },
    fmt,
    hash::{BuildHasher, Hasher as _},
    net::SocketAddr,
};

use palisade_protocols::dns::{Answer, Question};

use crate::{EndpointId, Millis};

/// The client and the resolver of questions and answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// The endpoint that sends or receives the questions.
    pub endpoint: EndpointId,
    /// Whether the transport is TCP; otherwise it is UDP.
    pub tcp: bool,
    /// Address and port of the client.
    pub client: SocketAddr,
    /// Address and port of the resolver.
    pub resolver: SocketAddr,
}

/// Limits on open questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackLimits {
    /// Maximum number of open questions of all endpoints together.
    pub total: usize,
    /// Maximum number of open questions of one endpoint.
    pub per_endpoint: usize,
    /// Time after which a question without an answer is closed, ms.
    pub timeout: Millis,
}

impl Default for TrackLimits {
    fn default() -> Self {
        Self {
            total: 65_536,
            per_endpoint: 8192,
            timeout: 10_000,
        }
    }
}

/// An open question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenQuestion<T> {
    /// Time of the last query with the question.
    pub at: Millis,
    /// Data of the caller.
    pub note: T,
}

/// The reason why a query or an answer is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unsolicited {
    /// No open question matches the answer.
    NoQuestion,
    /// The question was answered before.
    Duplicate,
    /// The endpoint has too many open questions.
    EndpointFull,
    /// All endpoints together have too many open questions, or the flow has too many with the same id.
    Full,
}

impl Unsolicited {
    /// All reasons.
    pub const ALL: &[Self] = &[Self::NoQuestion, Self::Duplicate, Self::EndpointFull, Self::Full];

    /// Returns the text of the reason, as logs and metrics show it.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::NoQuestion => "answer that no query asked for",
            Self::Duplicate => "second answer to a query",
            Self::EndpointFull => "too many open queries of the endpoint",
            Self::Full => "too many open queries",
        }
    }
}

impl fmt::Display for Unsolicited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl std::error::Error for Unsolicited {}

/// Flow and message id. Almost all keys have one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    flow: Flow,
    id: u16,
}

/// A hash with a random key, which can be handed over to another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuestionKey(pub [u64; 2]);

impl QuestionKey {
    /// Returns a random key.
    fn random() -> Self {
        // The standard library has no other source of random numbers.
        let random = RandomState::new();
        Self([random.hash_one(0_u8), random.hash_one(1_u8)])
    }
}

impl BuildHasher for QuestionKey {
    type Hasher = DefaultHasher;

    fn build_hasher(&self) -> DefaultHasher {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.0[0]);
        hasher.write_u64(self.0[1]);
        hasher
    }
}

/// An open question, as it is handed over to another process. Its name is hashed with the [`QuestionKey`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandedOverQuestion<T> {
    /// Client and resolver.
    pub flow: Flow,
    /// Message id.
    pub id: u16,
    /// Hash of the question.
    pub question: u64,
    /// Time and data of the question.
    pub asked: OpenQuestion<T>,
}

const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Slot<T> {
    key: Key,
    /// Hash of name, type and class with a random key, so that a resolver cannot construct a name that collides.
    question: u64,
    asked: OpenQuestion<T>,
    /// The next slot with the same key, or [`NONE`].
    same: u32,
    /// The previous and the next slot by age, or [`NONE`]. In a free slot, `newer` is the next free slot.
    older: u32,
    newer: u32,
}

/// The open questions. A retransmitted query (same flow, id and question) replaces its earlier copy.
///
/// The tables grow to the largest number of open questions so far; apart from that nothing is allocated.
#[derive(Debug)]
pub struct Tracker<T> {
    limits: TrackLimits,
    hasher: QuestionKey,
    /// The first slot of each key.
    keys: HashMap<Key, u32>,
    open: usize,
    endpoints: HashMap<EndpointId, usize>,
    slots: Vec<Slot<T>>,
    free: u32,
    oldest: u32,
    newest: u32,
    /// Hashes of recently answered questions. They distinguish a duplicate answer from an answer without a question.
    answered: Box<[u64]>,
    timeouts: u64,
}

/// Number of answered questions that are remembered; a power of two.
const ANSWERED: usize = 4096;
/// Maximum number of open questions with the same id on one flow.
const SAME_ID: usize = 4;

impl<T: Copy> Tracker<T> {
    /// Creates a tracker without open questions.
    #[must_use]
    pub fn new(limits: TrackLimits) -> Self {
        Self {
            limits,
            hasher: QuestionKey::random(),
            keys: HashMap::new(),
            open: 0,
            endpoints: HashMap::new(),
            slots: Vec::new(),
            free: NONE,
            oldest: NONE,
            newest: NONE,
            answered: vec![0; ANSWERED].into_boxed_slice(),
            timeouts: 0,
        }
    }

    /// Opens a question.
    ///
    /// # Errors
    /// [`Unsolicited::EndpointFull`] or [`Unsolicited::Full`]: the query must be dropped, because its answer would be
    /// refused.
    pub fn asked(
        &mut self,
        flow: Flow,
        id: u16,
        question: &Question,
        note: T,
        now: Millis,
    ) -> Result<(), Unsolicited> {
        self.expire(now);
        let question = self.hash(question);
        self.insert(Key { flow, id }, question, OpenQuestion { at: now, note })
    }

    fn insert(&mut self, key: Key, question: u64, asked: OpenQuestion<T>) -> Result<(), Unsolicited> {
        if let Some(slot) = self.find(key, question) {
            self.remove(slot);
        }
        if self.open >= self.limits.total || self.chain(key).count() >= SAME_ID {
            return Err(Unsolicited::Full);
        }
        let open = self.endpoints.entry(key.flow.endpoint).or_default();
        if *open >= self.limits.per_endpoint {
            return Err(Unsolicited::EndpointFull);
        }
        *open += 1;
        let slot = Slot {
            key,
            question,
            asked,
            same: self.keys.get(&key).copied().unwrap_or(NONE),
            older: self.newest,
            newer: NONE,
        };
        let at = match self.slots.get_mut(self.free as usize) {
            Some(free) => {
                let at = self.free;
                self.free = free.newer;
                *free = slot;
                at
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        };
        match self.slots.get_mut(self.newest as usize) {
            Some(newest) => newest.newer = at,
            None => self.oldest = at,
        }
        self.newest = at;
        self.keys.insert(key, at);
        self.open += 1;
        let hash = self.hasher.hash_one((key, question));
        if let Some(remembered) = self.answered.get_mut(hash as usize % ANSWERED)
            && *remembered == hash
        {
            *remembered = 0;
        }
        Ok(())
    }

    /// Closes the question of an answer and returns it.
    ///
    /// # Errors
    /// [`Unsolicited::NoQuestion`] or [`Unsolicited::Duplicate`]: the answer must be dropped.
    pub fn answered(
        &mut self,
        flow: Flow,
        answer: &Answer,
        now: Millis,
    ) -> Result<OpenQuestion<T>, Unsolicited> {
        self.expire(now);
        let key = Key { flow, id: answer.id };
        let Some(question) = &answer.question else {
            // Some error responses omit the question. Such a response gives no addresses, and closes the newest open
            // question of the flow with the same id.
            let newest = self.chain(key).next().filter(|_| answer.rcode != 0);
            return newest
                .and_then(|at| self.close(at))
                .ok_or(Unsolicited::NoQuestion);
        };
        let question = self.hash(question);
        if let Some(open) = self.find(key, question).and_then(|at| self.close(at)) {
            return Ok(open);
        }
        let hash = self.hasher.hash_one((key, question));
        let known = self.answered.get(hash as usize % ANSWERED) == Some(&hash);
        Err(if known {
            Unsolicited::Duplicate
        } else {
            Unsolicited::NoQuestion
        })
    }

    /// Closes the questions that have timed out. [`Tracker::asked`] and [`Tracker::answered`] do this too; the caller
    /// uses this method while no DNS messages arrive.
    pub fn expire(&mut self, now: Millis) {
        while let Some(slot) = self.slots.get(self.oldest as usize)
            && now.saturating_sub(slot.asked.at) > self.limits.timeout
        {
            self.remove(self.oldest);
            self.timeouts += 1;
        }
    }

    /// Returns the number of open questions.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open
    }

    /// Returns the key of the hashes, and the open questions, the oldest first.
    pub fn hand_over(&self) -> (QuestionKey, impl Iterator<Item = HandedOverQuestion<T>> + '_) {
        let next = |at: &u32| self.slots.get(*at as usize).map(|slot| slot.newer);
        let ages = std::iter::successors(Some(self.oldest), next);
        let slots = ages.map_while(|at| self.slots.get(at as usize));
        let questions = slots.map(|slot| HandedOverQuestion {
            flow: slot.key.flow,
            id: slot.key.id,
            question: slot.question,
            asked: slot.asked,
        });
        (self.hasher, questions)
    }

    /// Uses the key of another tracker, whose questions [`Tracker::take_over`] adds. Must be called before the first
    /// question.
    pub fn use_key(&mut self, key: QuestionKey) {
        if self.open == 0 {
            self.hasher = key;
        }
    }

    /// Adds an open question of another tracker. Questions must be added by age, the oldest first.
    ///
    /// # Errors
    /// As [`Tracker::asked`].
    pub fn take_over(&mut self, question: &HandedOverQuestion<T>) -> Result<(), Unsolicited> {
        let HandedOverQuestion {
            flow,
            id,
            question,
            asked,
        } = *question;
        self.insert(Key { flow, id }, question, asked)
    }

    /// Returns the number of questions that have timed out so far.
    #[must_use]
    pub fn timeouts(&self) -> u64 {
        self.timeouts
    }

    /// Removes the questions of a deleted endpoint.
    pub fn remove_endpoint(&mut self, endpoint: EndpointId) {
        let mut at = self.oldest;
        while let Some(slot) = self.slots.get(at as usize) {
            let newer = slot.newer;
            if slot.key.flow.endpoint == endpoint {
                self.remove(at);
            }
            at = newer;
        }
    }

    fn hash(&self, question: &Question) -> u64 {
        self.hasher
            .hash_one((question.name.wire(), question.rtype, question.class))
    }

    /// Returns the slots of a key, newest first.
    fn chain(&self, key: Key) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(self.keys.get(&key).copied(), |&at| {
            self.slots
                .get(at as usize)
                .map(|slot| slot.same)
                .filter(|&same| same != NONE)
        })
    }

    fn find(&self, key: Key, question: u64) -> Option<u32> {
        self.chain(key).find(|&at| {
            let slot = self.slots.get(at as usize);
            slot.is_some_and(|slot| slot.question == question)
        })
    }

    /// Removes an answered question and remembers its hash.
    fn close(&mut self, at: u32) -> Option<OpenQuestion<T>> {
        let slot = self.slots.get(at as usize)?;
        let hash = self.hasher.hash_one((slot.key, slot.question));
        if let Some(remembered) = self.answered.get_mut(hash as usize % ANSWERED) {
            *remembered = hash;
        }
        self.remove(at)
    }

    fn remove(&mut self, at: u32) -> Option<OpenQuestion<T>> {
        let Slot {
            key,
            asked,
            same,
            older,
            newer,
            ..
        } = *self.slots.get(at as usize)?;
        let before = self.chain(key).find(|&other| {
            let slot = self.slots.get(other as usize);
            slot.is_some_and(|slot| slot.same == at)
        });
        match before.and_then(|before| self.slots.get_mut(before as usize)) {
            Some(before) => before.same = same,
            None if same == NONE => {
                self.keys.remove(&key);
            }
            None => {
                self.keys.insert(key, same);
            }
        }
        match self.slots.get_mut(older as usize) {
            Some(slot) => slot.newer = newer,
            None => self.oldest = newer,
        }
        match self.slots.get_mut(newer as usize) {
            Some(slot) => slot.older = older,
            None => self.newest = older,
        }
        if let Some(slot) = self.slots.get_mut(at as usize) {
            slot.newer = self.free;
            self.free = at;
        }
        self.open -= 1;
        if let Some(open) = self.endpoints.get_mut(&key.flow.endpoint) {
            *open -= 1;
            if *open == 0 {
                self.endpoints.remove(&key.flow.endpoint);
            }
        }
        Some(asked)
    }
}

#[cfg(test)]
mod tests {
    use palisade_protocols::dns::{Name, rtype};
    use proptest::prelude::*;

    use super::*;

    const LIMITS: TrackLimits = TrackLimits {
        total: 6,
        per_endpoint: 4,
        timeout: 1000,
    };

    fn flow(endpoint: EndpointId, port: u16) -> Flow {
        Flow {
            endpoint,
            tcp: false,
            client: ([10, 0, 0, endpoint as u8], port).into(),
            resolver: ([10, 0, 0, 53], 53).into(),
        }
    }

    fn question(name: &str) -> Question {
        Question {
            name: name.parse::<Name>().unwrap(),
            rtype: rtype::A,
            class: 1,
        }
    }

    fn answer(id: u16, name: &str) -> Answer {
        Answer {
            id,
            question: Some(question(name)),
            ..Answer::default()
        }
    }

    #[test]
    fn an_answer_is_accepted_once_and_only_for_an_open_question() {
        let mut tracker = Tracker::new(LIMITS);
        tracker
            .asked(flow(1, 4000), 7, &question("a.test"), "note", 10)
            .unwrap();
        for (flow, id, name) in [
            (flow(1, 4001), 7, "a.test"),
            (flow(2, 4000), 7, "a.test"),
            (
                Flow {
                    tcp: true,
                    ..flow(1, 4000)
                },
                7,
                "a.test",
            ),
            (
                Flow {
                    resolver: ([10, 0, 0, 54], 53).into(),
                    ..flow(1, 4000)
                },
                7,
                "a.test",
            ),
            (flow(1, 4000), 8, "a.test"),
            (flow(1, 4000), 7, "b.test"),
        ] {
            assert_eq!(
                tracker.answered(flow, &answer(id, name), 20),
                Err(Unsolicited::NoQuestion)
            );
        }
        let mut other_type = answer(7, "a.test");
        other_type.question.as_mut().unwrap().rtype = rtype::AAAA;
        assert_eq!(
            tracker.answered(flow(1, 4000), &other_type, 20),
            Err(Unsolicited::NoQuestion)
        );
        let a = answer(7, "A.test");
        assert_eq!(
            tracker.answered(flow(1, 4000), &a, 25),
            Ok(OpenQuestion { at: 10, note: "note" })
        );
        assert_eq!(
            tracker.answered(flow(1, 4000), &a, 25),
            Err(Unsolicited::Duplicate)
        );
        // A repeated question may be answered again.
        tracker
            .asked(flow(1, 4000), 7, &question("a.test"), "again", 30)
            .unwrap();
        assert_eq!(tracker.answered(flow(1, 4000), &a, 35).unwrap().note, "again");
        assert_eq!(tracker.open(), 0);
    }

    #[test]
    fn errors_without_a_question_close_the_newest_question_with_their_id() {
        let mut tracker = Tracker::new(LIMITS);
        let mut bare = Answer {
            id: 7,
            ..Answer::default()
        };
        tracker
            .asked(flow(1, 4000), 7, &question("a.test"), 1, 0)
            .unwrap();
        tracker
            .asked(flow(1, 4000), 7, &question("b.test"), 2, 0)
            .unwrap();
        assert_eq!(
            tracker.answered(flow(1, 4000), &bare, 1),
            Err(Unsolicited::NoQuestion)
        );
        bare.rcode = 1;
        assert_eq!(tracker.answered(flow(1, 4000), &bare, 1).unwrap().note, 2);
        assert_eq!(
            tracker
                .answered(flow(1, 4000), &answer(7, "a.test"), 1)
                .unwrap()
                .note,
            1
        );
        assert_eq!(
            tracker.answered(flow(1, 4000), &bare, 1),
            Err(Unsolicited::NoQuestion)
        );
    }

    #[test]
    fn a_flood_of_one_endpoint_does_not_use_up_the_limit_of_others() {
        let mut tracker = Tracker::new(LIMITS);
        for id in 0..4 {
            tracker
                .asked(flow(1, 4000), id, &question("a.test"), (), 0)
                .unwrap();
        }
        assert_eq!(
            tracker.asked(flow(1, 4000), 9, &question("a.test"), (), 0),
            Err(Unsolicited::EndpointFull)
        );
        // A retransmitted query takes no additional slot.
        tracker
            .asked(flow(1, 4000), 3, &question("a.test"), (), 0)
            .unwrap();
        tracker
            .asked(flow(2, 4000), 1, &question("a.test"), (), 0)
            .unwrap();
        tracker
            .asked(flow(3, 4000), 1, &question("a.test"), (), 0)
            .unwrap();
        assert_eq!(
            tracker.asked(flow(4, 4000), 1, &question("a.test"), (), 0),
            Err(Unsolicited::Full)
        );
        tracker.remove_endpoint(1);
        assert_eq!(tracker.open(), 2);
        tracker
            .asked(flow(4, 4000), 1, &question("a.test"), (), 0)
            .unwrap();
        tracker.expire(1001);
        assert_eq!((tracker.open(), tracker.timeouts()), (0, 3));
    }

    #[test]
    fn questions_with_the_same_id_are_limited() {
        let mut tracker = Tracker::new(TrackLimits {
            per_endpoint: 100,
            total: 100,
            timeout: 1000,
        });
        for (i, name) in ["a.test", "b.test", "c.test", "d.test"].iter().enumerate() {
            tracker.asked(flow(1, 4000), 7, &question(name), i, 0).unwrap();
        }
        assert_eq!(
            tracker.asked(flow(1, 4000), 7, &question("e.test"), 9, 0),
            Err(Unsolicited::Full)
        );
        for (i, name) in ["b.test", "d.test", "a.test", "c.test"]
            .iter()
            .zip([1, 3, 0, 2])
            .map(|(n, i)| (i, n))
        {
            assert_eq!(
                tracker.answered(flow(1, 4000), &answer(7, name), 0).unwrap().note,
                i
            );
        }
        assert!(tracker.keys.is_empty() && tracker.endpoints.is_empty());
    }

    proptest! {
        /// Compares the tracker with a list that is searched linearly.
        #[test]
        fn random_histories(steps in prop::collection::vec(
            (any::<bool>(), 0..3_u16, 0..3_u16, 0..3_u16, 0..3_usize, 0..400_u64), 0..200,
        )) {
            let mut tracker = Tracker::new(LIMITS);
            let mut open: Vec<(u16, u16, u16, usize, u64)> = vec![];
            let mut now = 0;
            for (asks, endpoint, port, id, name, pause) in steps {
                now += pause;
                open.retain(|entry| now - entry.4 <= LIMITS.timeout);
                let text = ["a.test", "b.test", "c.test"][name];
                let same = open.iter().position(|e| (e.0, e.1, e.2, e.3) == (endpoint, port, id, name));
                if asks {
                    if let Some(at) = same {
                        open.remove(at);
                    }
                    let expected = if open.len() >= LIMITS.total {
                        Err(Unsolicited::Full)
                    } else if open.iter().filter(|e| e.0 == endpoint).count() >= LIMITS.per_endpoint {
                        Err(Unsolicited::EndpointFull)
                    } else {
                        open.push((endpoint, port, id, name, now));
                        Ok(())
                    };
                    let result = tracker.asked(flow(endpoint, port), id, &question(text), now, now);
                    prop_assert_eq!(result, expected);
                } else {
                    let result = tracker.answered(flow(endpoint, port), &answer(id, text), now);
                    match same {
                        Some(at) => {
                            let at = open.remove(at).4;
                            prop_assert_eq!(result, Ok(OpenQuestion { at, note: at }));
                        }
                        None => prop_assert!(result.is_err()),
                    }
                }
                prop_assert_eq!(tracker.open(), open.len());
            }
        }
    }
}
