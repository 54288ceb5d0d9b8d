//! Answers that were told before: what they teach is in the maps already.
//!
//! Most answers repeat another one. To wait until what they teach is committed, when it has long been, would cost each
//! of them a way to another thread and back.

use std::{
    hash::{BuildHasher as _, Hash as _, Hasher as _},
    net::IpAddr,
};

use foldhash::{HashMap, HashMapExt as _, quality::RandomState};
use palisade_protocols::dns::{Answer, Name};

use crate::{Lease, Millis};

/// Addresses of names that are remembered; then all are forgotten, and found out anew.
const MOST: usize = 16_384;
/// Before the lease ends by so much, an answer is not taken for known any more: what it says has to get to who keeps
/// the time, before that does what is due then. Milliseconds.
const MARGIN: Millis = 5_000;

#[derive(Clone, Copy, Debug)]
struct Until {
    time: Millis,
    epoch: u64,
}

/// What is known to be in the maps: by hashes with a key that nobody else has. If two names had the same, a
/// connection would be refused that should not be; the other way round nothing can go wrong.
#[derive(Debug)]
pub(super) struct Told {
    hashes: RandomState,
    until: HashMap<u64, Until>,
}

impl Told {
    pub(super) fn new() -> Self {
        Self {
            hashes: RandomState::default(),
            until: HashMap::new(),
        }
    }

    /// Takes note that an answer has been committed.
    pub(super) fn note(&mut self, endpoint: u16, answer: &Answer, lease: Lease, now: Millis) {
        let Some(good_for) = lease.good_for.checked_sub(MARGIN) else {
            return;
        };
        let until = Until {
            time: now.saturating_add(good_for),
            epoch: lease.epoch,
        };
        if self.until.len() + answer.addresses.len() > MOST {
            self.until.clear();
        }
        let name = self.name(endpoint, answer);
        for address in answer.addresses.iter().take(MOST) {
            self.until.insert(self.pair(name, address.ip), until);
        }
    }

    /// Whether all that an answer teaches is in the maps, and will be for some time.
    pub(super) fn has(&self, endpoint: u16, answer: &Answer, epoch: u64, now: Millis) -> bool {
        if self.until.is_empty() {
            return false;
        }
        let name = self.name(endpoint, answer);
        answer.addresses.iter().all(|address| {
            self.until
                .get(&self.pair(name, address.ip))
                .is_some_and(|until| until.epoch == epoch && now < until.time)
        })
    }

    /// Who asked, and for what: the aliases on the way may teach something too.
    fn name(&self, endpoint: u16, answer: &Answer) -> u64 {
        let mut hasher = self.hashes.build_hasher();
        endpoint.hash(&mut hasher);
        answer.rcode.hash(&mut hasher);
        if let Some(question) = &answer.question {
            question.class.hash(&mut hasher);
            question.name.wire().hash(&mut hasher);
        }
        for alias in &answer.aliases {
            Name::wire(alias).hash(&mut hasher);
        }
        hasher.finish()
    }

    fn pair(&self, name: u64, address: IpAddr) -> u64 {
        self.hashes.hash_one((name, address))
    }
}

#[cfg(test)]
mod tests {
    use palisade_protocols::dns::{Address, CLASS_IN, Question, Source, rtype};

    use super::*;

    const LEASE: Lease = Lease {
        good_for: 30_000,
        epoch: 3,
    };

    fn answer(name: &str, aliases: &[&str], addresses: &[&str]) -> Answer {
        let address = |ip: &&str| Address {
            ip: ip.parse().unwrap(),
            ttl: 60,
            source: Source::Record,
        };
        Answer {
            question: Some(Question {
                name: name.parse().unwrap(),
                rtype: rtype::A,
                class: CLASS_IN,
            }),
            aliases: aliases.iter().map(|alias| alias.parse().unwrap()).collect(),
            addresses: addresses.iter().map(address).collect(),
            ttl: Some(60),
            ..Answer::default()
        }
    }

    #[test]
    fn only_what_was_told_to_this_endpoint_by_this_name_is_known() {
        let mut told = Told::new();
        let first = answer("a.example", &[], &["192.0.2.1", "2001:db8::1"]);
        assert!(!told.has(7, &first, 3, 100));
        told.note(7, &first, LEASE, 100);
        assert!(told.has(7, &first, 3, 100));
        // In another order, or not all of them: nothing new either.
        assert!(told.has(
            7,
            &answer("A.example", &[], &["2001:db8::1", "192.0.2.1"]),
            3,
            100
        ));
        assert!(told.has(7, &answer("a.example", &[], &["192.0.2.1"]), 3, 100));
        for (endpoint, other) in [
            (8, first.clone()),
            (7, answer("b.example", &[], &["192.0.2.1"])),
            (7, answer("a.example", &[], &["192.0.2.1", "192.0.2.2"])),
            (7, answer("a.example", &["c.example"], &["192.0.2.1"])),
            (
                7,
                Answer {
                    rcode: 3,
                    ..first.clone()
                },
            ),
        ] {
            assert!(!told.has(endpoint, &other, 3, 100), "{endpoint} {other:?}");
        }
    }

    #[test]
    fn it_is_known_until_something_is_taken_out_or_its_time_comes_near() {
        let mut told = Told::new();
        let first = answer("a.example", &[], &["192.0.2.1"]);
        told.note(7, &first, LEASE, 100);
        assert!(!told.has(7, &first, 4, 100), "another epoch");
        assert!(told.has(7, &first, 3, 25_099));
        assert!(!told.has(7, &first, 3, 25_100));
        let short = Lease {
            good_for: MARGIN - 1,
            ..LEASE
        };
        let other = answer("b.example", &[], &["192.0.2.1"]);
        told.note(7, &other, short, 100);
        assert!(!told.has(7, &other, 3, 100), "its lease is too short to rely on");
    }

    #[test]
    fn it_is_bounded() {
        let mut told = Told::new();
        for n in 0..3 * MOST {
            told.note(
                7,
                &answer(&format!("n{n}.example"), &[], &["192.0.2.1"]),
                LEASE,
                100,
            );
            assert!(told.until.len() <= MOST);
        }
        let last = answer(&format!("n{}.example", 3 * MOST - 1), &[], &["192.0.2.1"]);
        assert!(told.has(7, &last, 3, 100));
    }
}
