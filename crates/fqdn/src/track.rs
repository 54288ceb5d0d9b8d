//! Open DNS questions: an answer counts only if its id, addresses, ports and question belong to one. [`Tracker`] has
//! limits for each endpoint and for all, and allocates nothing in the steady state.
//!
//! The questions are in a vector with a free list, linked by age and by key. `inspect` has a similar queue for values
//! that expire in order (`expiry_queue.rs`). It is not used here: each slot is also in the chain of its key, so that an
//! answer finds its question by id, and a removal must update both lists.

use std::{
    collections::{HashMap, hash_map::RandomState},
    fmt,
    hash::BuildHasher,
    net::SocketAddr,
};

use palisade_protocols::dns::{Answer, Question};

use crate::{EndpointId, Millis};

/// Between whom questions and answers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Whose questions.
    pub endpoint: EndpointId,
    /// Over TCP; else UDP.
    pub tcp: bool,
    /// Where the endpoint asks from.
    pub client: SocketAddr,
    /// Whom it asks.
    pub resolver: SocketAddr,
}

/// How many questions may be open, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackLimits {
    /// Open questions of all endpoints.
    pub total: usize,
    /// Open questions of one endpoint.
    pub per_endpoint: usize,
    /// A question without an answer is forgotten after this.
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

/// A question that is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenQuestion<T> {
    /// When it was asked.
    pub at: Millis,
    /// What the caller noted with it.
    pub note: T,
}

/// Why a question or an answer is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unsolicited {
    /// Nobody asked this: another id, port, address, question, or too late.
    NoQuestion,
    /// It was answered before.
    Duplicate,
    /// Too many questions of the endpoint are open.
    EndpointFull,
    /// Too many questions are open, or too many with this id on this flow.
    Full,
}

impl Unsolicited {
    /// All of them.
    pub const ALL: &[Self] = &[Self::NoQuestion, Self::Duplicate, Self::EndpointFull, Self::Full];

    /// The text that people read.
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

/// Flow and id: almost always one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    flow: Flow,
    id: u16,
}

const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Slot<T> {
    key: Key,
    /// What is asked, as a hash with a random key: who answers cannot find a name that collides.
    question: u64,
    asked: OpenQuestion<T>,
    /// The next slot with the same key.
    same: u32,
    /// Neighbours by age: `older` was asked before. In a free slot `newer` is the next free one.
    older: u32,
    newer: u32,
}

/// The questions that are open. A second question with the same id and content (a client that tries again) is the
/// same question asked later.
///
/// Nothing is allocated once the tables have grown to what is needed.
#[derive(Debug)]
pub struct Tracker<T> {
    limits: TrackLimits,
    hasher: RandomState,
    /// The first slot of a key.
    keys: HashMap<Key, u32>,
    open: usize,
    endpoints: HashMap<EndpointId, usize>,
    slots: Vec<Slot<T>>,
    free: u32,
    oldest: u32,
    newest: u32,
    /// Hashes of the questions that were answered last, which tell a duplicate answer from an unsolicited one.
    answered: Box<[u64]>,
    timeouts: u64,
}

/// How many answered questions are remembered; a power of two.
const ANSWERED: usize = 4096;
/// How many different questions with one id a flow may have open.
const SAME_ID: usize = 4;

impl<T: Copy> Tracker<T> {
    /// No question is open.
    #[must_use]
    pub fn new(limits: TrackLimits) -> Self {
        Self {
            limits,
            hasher: RandomState::new(),
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

    /// A question goes out.
    ///
    /// # Errors
    /// If too many are open: then it must not go out, because its answer could not be taken.
    pub fn asked(
        &mut self,
        flow: Flow,
        id: u16,
        question: &Question,
        note: T,
        now: Millis,
    ) -> Result<(), Unsolicited> {
        self.expire(now);
        let key = Key { flow, id };
        let question = self.hash(question);
        if let Some(slot) = self.find(key, question) {
            self.remove(slot);
        }
        if self.open >= self.limits.total || self.chain(key).count() >= SAME_ID {
            return Err(Unsolicited::Full);
        }
        let open = self.endpoints.entry(flow.endpoint).or_default();
        if *open >= self.limits.per_endpoint {
            return Err(Unsolicited::EndpointFull);
        }
        *open += 1;
        let slot = Slot {
            key,
            question,
            asked: OpenQuestion { at: now, note },
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

    /// An answer comes in: gives its question, which is closed then.
    ///
    /// # Errors
    /// If there is none: the answer must not be read.
    pub fn answered(
        &mut self,
        flow: Flow,
        answer: &Answer,
        now: Millis,
    ) -> Result<OpenQuestion<T>, Unsolicited> {
        self.expire(now);
        let key = Key { flow, id: answer.id };
        let Some(question) = &answer.question else {
            // some errors come without the question; they carry no records, and answer the newest with their id
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

    /// Forgets what has waited too long. Every call does; this is for quiet times.
    pub fn expire(&mut self, now: Millis) {
        while let Some(slot) = self.slots.get(self.oldest as usize)
            && now.saturating_sub(slot.asked.at) > self.limits.timeout
        {
            self.remove(self.oldest);
            self.timeouts += 1;
        }
    }

    /// How many questions are open.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open
    }

    /// How many questions were never answered.
    #[must_use]
    pub fn timeouts(&self) -> u64 {
        self.timeouts
    }

    /// Forgets the questions of an endpoint that is no more.
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

    /// The slots of a key, the newest first.
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

    /// Removes a question that was answered, and remembers that it was.
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
    fn an_answer_must_be_asked_for_and_comes_once() {
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
        // asked again it may be answered again
        tracker
            .asked(flow(1, 4000), 7, &question("a.test"), "again", 30)
            .unwrap();
        assert_eq!(tracker.answered(flow(1, 4000), &a, 35).unwrap().note, "again");
        assert_eq!(tracker.open(), 0);
    }

    #[test]
    fn errors_without_a_question_close_the_newest_of_their_id() {
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
    fn a_flood_of_one_endpoint_leaves_room_for_others() {
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
        // the same question again takes no more room
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
    fn one_id_for_many_questions_is_bounded() {
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
        /// Against a list that is searched from one end to the other.
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
