//! Identity numbers of label sets. A number keeps its meaning as long as possible, because old events refer to it.

use std::collections::{BTreeMap, HashMap, HashSet};

use palisade_abi::{Identity, identity};
use palisade_model::{identity::is_combined, labels::Labels};
use serde::{Deserialize, Serialize};

/// Assigns identity numbers to label sets.
///
/// A set keeps its number, even while unused, until the number is released or the range is exhausted. The search for a
/// free number begins after the last assigned number, so that a number is reused late.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Allocator {
    numbers: HashMap<Labels, Identity>,
    taken: HashSet<Identity>,
    next_labels: Identity,
    next_local: Identity,
}

/// The part of an [`Allocator`] that the state file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllocatorState {
    /// Labels by identity number.
    pub identities: BTreeMap<Identity, Labels>,
    /// Number at which the next search of the label range begins.
    pub next_labels: Identity,
    /// Number at which the next search of the local range (prefixes, names) begins.
    pub next_local: Identity,
}

/// Error: all numbers of a range are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no identity left: more than {0} label sets or prefixes are in use at once")]
pub struct Exhausted(u32);

impl Allocator {
    /// Creates an allocator from a state file. Ignores numbers outside the range of their labels, and duplicates.
    #[must_use]
    pub fn from_state(state: &AllocatorState) -> Self {
        let mut allocator = Self {
            next_labels: state.next_labels,
            next_local: state.next_local,
            ..Self::default()
        };
        for (&number, labels) in &state.identities {
            let (first, last) = range(labels);
            if (first..=last).contains(&number)
                && fixed(labels).is_none()
                && !allocator.numbers.contains_key(labels)
            {
                allocator.numbers.insert(labels.clone(), number);
                allocator.taken.insert(number);
            }
        }
        allocator
    }

    /// Returns the state for [`Self::from_state`], without combined learned identities ([`is_combined`]), because DNS
    /// servers can cause any number of them. The state includes the positions of the search, so the number of such an
    /// identity is not reused soon after a restart.
    #[must_use]
    pub fn state(&self) -> AllocatorState {
        AllocatorState {
            identities: self
                .numbers
                .iter()
                .filter(|(labels, _)| !is_combined(labels))
                .map(|(labels, &number)| (number, labels.clone()))
                .collect(),
            next_labels: self.next_labels,
            next_local: self.next_local,
        }
    }

    /// Frees the number of a label set that no address has any more, so that the number can be assigned again.
    pub fn release(&mut self, labels: &Labels) {
        if let Some(number) = self.numbers.remove(labels) {
            self.taken.remove(&number);
        }
    }

    /// Reserves the local numbers among `numbers`, which the maps hold after a restart. The state file can lack some of
    /// these numbers. Without the reservation a new label set could get such a number, and old map entries would apply
    /// to it.
    pub fn avoid(&mut self, numbers: impl IntoIterator<Item = Identity>) {
        self.taken.extend(
            numbers
                .into_iter()
                .filter(|number| (identity::FIRST_LOCAL..=identity::LAST_LOCAL).contains(number)),
        );
    }

    /// Returns the number of a label set. `in_use` returns whether a number is in use; it is called only if the range
    /// is exhausted.
    ///
    /// # Errors
    /// All numbers of the range are in use.
    pub fn number(
        &mut self,
        labels: &Labels,
        in_use: &dyn Fn(Identity) -> bool,
    ) -> Result<Identity, Exhausted> {
        if let Some(number) = fixed(labels) {
            return Ok(number);
        }
        if let Some(&number) = self.numbers.get(labels) {
            return Ok(number);
        }
        let (first, last) = range(labels);
        let local = first == identity::FIRST_LOCAL;
        let start = if local { self.next_local } else { self.next_labels };
        let start = if (first..=last).contains(&start) {
            start
        } else {
            first
        };
        let size = last - first + 1;
        let free = |taken: &HashSet<Identity>| {
            if taken.len() < size as usize
                || taken.iter().filter(|n| (first..=last).contains(*n)).count() < size as usize
            {
                (0..size)
                    .map(|step| first + (start - first + step) % size)
                    .find(|number| !taken.contains(number))
            } else {
                None
            }
        };
        let number = match free(&self.taken) {
            Some(number) => number,
            None => {
                self.numbers
                    .retain(|_, number| !(first..=last).contains(number) || in_use(*number));
                self.taken = self.numbers.values().copied().collect();
                free(&self.taken).ok_or(Exhausted(size))?
            }
        };
        let next = if number == last { first } else { number + 1 };
        if local {
            self.next_local = next;
        } else {
            self.next_labels = next;
        }
        self.numbers.insert(labels.clone(), number);
        self.taken.insert(number);
        Ok(number)
    }
}

/// Returns the range of numbers for a label set. Sets with the label of a prefix, of a group of prefixes, of a name or
/// of the world use the local range.
fn range(labels: &Labels) -> (Identity, Identity) {
    let local = labels.iter().any(|label| {
        matches!(label.source.as_str(), "cidr" | "cidrgroup" | "fqdn")
            || (label.source == "reserved" && label.key.starts_with("world"))
    });
    if local {
        (identity::FIRST_LOCAL, identity::LAST_LOCAL)
    } else {
        (identity::FIRST_LABELS, identity::LAST_LABELS)
    }
}

/// Names and numbers of the reserved identities.
const RESERVED: [(&str, Identity); 10] = [
    ("host", identity::HOST),
    ("world", identity::WORLD),
    ("unmanaged", identity::UNMANAGED),
    ("health", identity::HEALTH),
    ("init", identity::INIT),
    ("remote-node", identity::REMOTE_NODE),
    ("kube-apiserver", identity::KUBE_APISERVER),
    ("ingress", identity::INGRESS),
    ("world-ipv4", identity::WORLD_IPV4),
    ("world-ipv6", identity::WORLD_IPV6),
];

/// Returns the fixed number of a set that consists of one reserved label; `None` for other sets.
fn fixed(labels: &Labels) -> Option<Identity> {
    let mut all = labels.iter();
    let label = all.next()?;
    if all.next().is_some() || label.source != "reserved" {
        return None;
    }
    RESERVED
        .iter()
        .find(|(name, _)| *name == label.key)
        .map(|(_, number)| *number)
}

/// Returns the label set of a reserved identity; `None` for other identities.
#[must_use]
pub fn reserved(number: Identity) -> Option<Labels> {
    let found = RESERVED.iter().find(|(_, fixed)| *fixed == number);
    found.map(|(name, _)| Labels::reserved(name))
}

#[cfg(test)]
mod tests {
    use palisade_model::{identity::prefix_labels, inventory::Options, labels::parse_label};

    use super::*;

    fn labels(texts: &[&str]) -> Labels {
        Labels::new(texts.iter().map(|text| parse_label(text)))
    }

    #[test]
    fn reserved_identities_have_one_label() {
        assert_eq!(reserved(identity::HOST), Some(labels(&["reserved:host"])));
        assert_eq!(reserved(identity::FIRST_LABELS), None);
        for (name, number) in RESERVED {
            assert_eq!(reserved(number).as_ref().and_then(fixed), Some(number), "{name}");
        }
    }

    #[test]
    fn numbers_stay_with_their_labels_over_a_restart() {
        let mut allocator = Allocator::default();
        let a = allocator.number(&labels(&["k8s:app=a"]), &|_| true).unwrap();
        let b = allocator.number(&labels(&["k8s:app=b"]), &|_| true).unwrap();
        let p = allocator
            .number(
                &prefix_labels("10.0.0.0/8".parse().unwrap(), &Options::default()),
                &|_| true,
            )
            .unwrap();
        assert_eq!((a, b, p), (256, 257, identity::FIRST_LOCAL));
        let text = serde_json::to_string(&allocator.state()).unwrap();
        let mut restarted = Allocator::from_state(&serde_json::from_str(&text).unwrap());
        assert_eq!(restarted, allocator);
        assert_eq!(restarted.number(&labels(&["k8s:app=b"]), &|_| true), Ok(b));
        assert_eq!(restarted.number(&labels(&["k8s:app=c"]), &|_| true), Ok(258));
        assert_eq!(
            restarted.number(&labels(&["reserved:world"]), &|_| true),
            Ok(identity::WORLD)
        );
    }

    #[test]
    fn a_number_is_reused_only_if_unused_and_the_range_is_exhausted() {
        let mut allocator = Allocator::default();
        for n in 0..=(identity::LAST_LABELS - identity::FIRST_LABELS) {
            allocator
                .number(&labels(&[&format!("k8s:n={n}")]), &|_| true)
                .unwrap();
        }
        let more = labels(&["k8s:one=more"]);
        assert!(allocator.number(&more, &|_| true).is_err());
        assert_eq!(allocator.number(&more, &|number| number != 700), Ok(700));
    }

    #[test]
    fn combined_learned_identities_are_not_saved_and_reused_late() {
        let mut allocator = Allocator::default();
        let one = labels(&["reserved:world", "fqdn:a.test"]);
        let two = labels(&["reserved:world", "fqdn:a.test", "fqdn:b.test"]);
        let prefix = labels(&["reserved:world", "cidr:192.0.2.0/24", "fqdn:a.test"]);
        let numbers = [&one, &two, &prefix].map(|set| allocator.number(set, &|_| true).unwrap());
        let state = allocator.state();
        assert_eq!(state.identities.keys().copied().collect::<Vec<_>>(), [numbers[0]]);
        let mut restarted = Allocator::from_state(&state);
        assert_eq!(restarted.number(&one, &|_| true), Ok(numbers[0]));
        // The maps can still hold the number of `two` after a restart.
        assert_eq!(restarted.number(&prefix, &|_| true), Ok(numbers[2] + 1));
        allocator.release(&two);
        assert_eq!(allocator.number(&two, &|_| true), Ok(numbers[2] + 1));
        assert!(!allocator.state().identities.values().any(is_combined));

        // The daemon was killed before it wrote the state: only the maps show which numbers are in use.
        let mut older = Allocator::default();
        older.avoid(numbers);
        assert_eq!(older.number(&two, &|_| true), Ok(numbers[2] + 1));
    }

    #[test]
    fn a_corrupt_state_assigns_no_number_twice() {
        let state: AllocatorState = serde_json::from_str(
            r#"{"identities":{"2":["k8s:app=a"],"300":["k8s:app=b"],"301":["k8s:app=b"]},"next_labels":0,"next_local":0}"#,
        )
        .unwrap();
        let mut allocator = Allocator::from_state(&state);
        assert_eq!(allocator.number(&labels(&["k8s:app=a"]), &|_| true), Ok(256));
        assert_eq!(allocator.number(&labels(&["k8s:app=b"]), &|_| true), Ok(300));
    }
}
