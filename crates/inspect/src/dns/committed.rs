//! The fast path for DNS answers whose addresses are in the maps already.
//!
//! Most answers repeat an earlier one. Without this table each of them would be held until the FQDN manager, another
//! thread, has confirmed its addresses again.

use std::{
    hash::{BuildHasher as _, Hash as _, Hasher as _},
    net::IpAddr,
};

use foldhash::{HashMap, HashMapExt as _, quality::RandomState};
use palisade_protocols::dns::{Answer, Name};

use crate::{Lease, Millis};

/// Maximum number of entries. An entry is one address of a name for one endpoint. A full table is cleared, and each
/// answer is then committed once more.
const MAX_ENTRIES: usize = 16_384;
/// Time before the end of a lease at which an entry of this table expires, ms: the refresh must reach the FQDN manager
/// before the lease ends.
const MARGIN: Millis = 5_000;

#[derive(Clone, Copy, Debug)]
struct LeaseEnd {
    time: Millis,
    epoch: u64,
}

/// Addresses that are in the maps, each with its endpoint and name, as keyed 64-bit hashes. After a hash collision an
/// answer is forwarded although its addresses are not in the maps, so the client cannot reach them (fails closed).
#[derive(Debug)]
pub(super) struct CommittedAnswers {
    hashes: RandomState,
    until: HashMap<u64, LeaseEnd>,
}

impl CommittedAnswers {
    pub(super) fn new() -> Self {
        Self {
            hashes: RandomState::default(),
            until: HashMap::new(),
        }
    }

    /// Records that the addresses of an answer are in the maps until shortly before the lease ends.
    pub(super) fn note(&mut self, endpoint: u16, answer: &Answer, lease: Lease, now: Millis) {
        let Some(good_for) = lease.good_for.checked_sub(MARGIN) else {
            return;
        };
        let until = LeaseEnd {
            time: now.saturating_add(good_for),
            epoch: lease.epoch,
        };
        if self.until.len() + answer.addresses.len() > MAX_ENTRIES {
            self.until.clear();
        }
        let name = self.name(endpoint, answer);
        for address in answer.addresses.iter().take(MAX_ENTRIES) {
            self.until.insert(self.pair(name, address.ip), until);
        }
    }

    /// Returns whether every address of an answer is in the maps, with a lease of this epoch that lasts beyond `now`.
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

    /// Returns the hash of the endpoint, the response code, the class and name of the question, and the aliases. The
    /// aliases count, because each of them can match another selector.
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
    fn a_commit_counts_for_one_endpoint_and_one_chain_of_names() {
        let mut committed = CommittedAnswers::new();
        let first = answer("a.example", &[], &["192.0.2.1", "2001:db8::1"]);
        assert!(!committed.has(7, &first, 3, 100));
        committed.note(7, &first, LEASE, 100);
        assert!(committed.has(7, &first, 3, 100));
        // The same addresses in another order, or a part of them.
        assert!(committed.has(
            7,
            &answer("A.example", &[], &["2001:db8::1", "192.0.2.1"]),
            3,
            100
        ));
        assert!(committed.has(7, &answer("a.example", &[], &["192.0.2.1"]), 3, 100));
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
            assert!(!committed.has(endpoint, &other, 3, 100), "{endpoint} {other:?}");
        }
    }

    #[test]
    fn an_entry_ends_with_its_epoch_and_before_its_lease() {
        let mut committed = CommittedAnswers::new();
        let first = answer("a.example", &[], &["192.0.2.1"]);
        committed.note(7, &first, LEASE, 100);
        assert!(!committed.has(7, &first, 4, 100), "another epoch");
        assert!(committed.has(7, &first, 3, 25_099));
        assert!(!committed.has(7, &first, 3, 25_100));
        let short = Lease {
            good_for: MARGIN - 1,
            ..LEASE
        };
        let other = answer("b.example", &[], &["192.0.2.1"]);
        committed.note(7, &other, short, 100);
        assert!(
            !committed.has(7, &other, 3, 100),
            "the lease is shorter than the margin"
        );
    }

    #[test]
    fn the_table_is_bounded() {
        let mut committed = CommittedAnswers::new();
        for n in 0..3 * MAX_ENTRIES {
            committed.note(
                7,
                &answer(&format!("n{n}.example"), &[], &["192.0.2.1"]),
                LEASE,
                100,
            );
            assert!(committed.until.len() <= MAX_ENTRIES);
        }
        let last = answer(&format!("n{}.example", 3 * MAX_ENTRIES - 1), &[], &["192.0.2.1"]);
        assert!(committed.has(7, &last, 3, 100));
    }
}
