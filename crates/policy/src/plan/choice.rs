//! The numbers (identities and port classes) that addresses and ports have while the policy tables are switched.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    hash::Hash,
};

use palisade_abi::{Class, Identity, PolicyEntry, identity};
use palisade_model::snapshot::{Snapshot, Table, TableKey};

use super::tables::TableChanges;

/// How the number of an address or a port (identity or class) changes: whether the new number is written before or
/// after the switch to the new policy tables, and which tables have copied entries at the switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice<N> {
    /// The new number is written before the switch. No entries are copied.
    Early,
    /// The new number is written after the switch. No entries are copied.
    Late,
    /// The new number is written before the switch. The old tables first get copies of the old number's entries under
    /// the new number.
    Fresh,
    /// The new number is written after the switch. The new tables are written with copies of the new number's entries
    /// under the old number; step 4 of the plan removes the copies.
    Gone,
    /// This spare number is written before the switch, and the new number after the switch. Both the old and the new
    /// tables have copied entries under the spare number.
    By(N),
}

/// The choice for each pair of an old and a new number.
pub(super) struct Choices<N>(BTreeMap<(N, N), Choice<N>>);

impl<N: Copy + Ord> Choices<N> {
    /// Returns the number that an address or a port has while the tables are switched.
    pub(super) fn number(&self, from: N, to: N) -> N {
        match self.0.get(&(from, to)) {
            Some(Choice::Late | Choice::Gone) => from,
            Some(Choice::By(number)) => *number,
            Some(Choice::Early | Choice::Fresh) | None => to,
        }
    }

    /// Returns pairs (source, target) of numbers: an old table gets a copy of each entry of `source`, with the number
    /// `target`. `changes`: whether `TableChanges` lists the table.
    pub(super) fn copies_in_old(&self, changes: bool) -> Vec<(N, N)> {
        self.0
            .iter()
            .filter_map(|((from, to), choice)| match choice {
                Choice::Fresh if changes => Some((*from, *to)),
                Choice::By(number) => Some((if changes { *from } else { *to }, *number)),
                _ => None,
            })
            .collect()
    }

    /// Returns pairs (source, target) of numbers: a new table gets a copy of each entry of `source`, with the number
    /// `target`. `changes`: whether `TableChanges` lists the table.
    pub(super) fn copies_in_new(&self, changes: bool) -> Vec<(N, N)> {
        self.0
            .iter()
            .filter_map(|((from, to), choice)| match choice {
                Choice::Gone if changes => Some((*to, *from)),
                Choice::By(number) => Some((*to, *number)),
                _ => None,
            })
            .collect()
    }
}

/// Entries of a table by identity, or by class. Each has its direction, the rest of its key, and its content.
pub(super) type Lines<N> = HashMap<N, Vec<(u8, u32, PolicyEntry)>>;

/// An axis of the table: identities or classes.
pub(super) trait Axis {
    type Number: Copy + Ord + Hash;
    /// Returns the number of a key on this axis, and the rest of the key.
    fn split(key: &TableKey) -> (Self::Number, u32);
    /// Returns the numbers in use in the old and in the new snapshot.
    fn in_use(&self) -> (BTreeSet<Self::Number>, BTreeSet<Self::Number>);
    /// Returns the highest free number, below `below` if that is set; `None` if there is none. `used`: numbers in use.
    fn spare(&self, used: &BTreeSet<Self::Number>, below: Option<Self::Number>) -> Option<Self::Number>;

    fn lines(tables: &[&Table]) -> Vec<Lines<Self::Number>> {
        tables
            .iter()
            .map(|table| {
                let mut lines: Lines<Self::Number> = HashMap::new();
                for (key, entry) in &table.entries {
                    let (number, rest) = Self::split(key);
                    lines
                        .entry(number)
                        .or_default()
                        .push((key.direction, rest, *entry));
                }
                lines
            })
            .collect()
    }
}

/// Returns whether `a` and `b` have equal entries in each table.
pub(super) fn same<N: Copy + Ord + Hash>(lines: &[Lines<N>], a: N, b: N) -> bool {
    lines.iter().all(|lines| lines.get(&a) == lines.get(&b))
}

/// Returns a [`Choice`] for each pair of an old and a new number. Pairs in `apart` get a spare number if one is left.
pub(super) fn choose<A: Axis>(
    axis: &A,
    pairs: &BTreeSet<(A::Number, A::Number)>,
    apart: &BTreeSet<(A::Number, A::Number)>,
    tables: &TableChanges<'_>,
) -> Choices<A::Number> {
    let mut choices = BTreeMap::new();
    if pairs.is_empty() {
        return Choices(choices);
    }
    let old_lines = A::lines(&tables.old_tables);
    let (early, mut open): (Vec<_>, Vec<_>) = pairs
        .iter()
        .copied()
        .partition(|pair| !apart.contains(pair) && same(&old_lines, pair.0, pair.1));
    choices.extend(early.into_iter().map(|pair| (pair, Choice::Early)));
    if !open.is_empty() {
        let new_lines = A::lines(&tables.new_tables);
        let late;
        (late, open) = open
            .into_iter()
            .partition(|pair| !apart.contains(pair) && same(&new_lines, pair.0, pair.1));
        choices.extend(late.into_iter().map(|pair| (pair, Choice::Late)));
    }
    if open.is_empty() {
        return Choices(choices);
    }
    let mut origins: HashMap<A::Number, u32> = HashMap::new();
    let mut destinations: HashMap<A::Number, u32> = HashMap::new();
    for (from, to) in pairs {
        *destinations.entry(*from).or_default() += 1;
        *origins.entry(*to).or_default() += 1;
    }
    let (old, new) = axis.in_use();
    let mut used: BTreeSet<A::Number> = old.union(&new).copied().collect();
    let mut below = None;
    for (from, to) in open {
        let alone = !apart.contains(&(from, to));
        let choice = if alone && origins.get(&to) == Some(&1) && !old.contains(&to) {
            Choice::Fresh
        } else if alone && destinations.get(&from) == Some(&1) && !new.contains(&from) {
            Choice::Gone
        } else {
            match axis.spare(&used, below) {
                Some(number) => {
                    used.insert(number);
                    below = Some(number);
                    Choice::By(number)
                }
                // No spare number is left. The new number is written after the switch. Until that write, packets are
                // looked up in the new tables under the old number.
                None => Choice::Late,
            }
        };
        choices.insert((from, to), choice);
    }
    Choices(choices)
}

pub(super) struct IdentityAxis<'a> {
    pub(super) old: &'a Snapshot,
    pub(super) new: &'a Snapshot,
}

impl Axis for IdentityAxis<'_> {
    type Number = Identity;

    fn split(key: &TableKey) -> (Identity, u32) {
        (key.identity, u32::from(key.class))
    }

    fn in_use(&self) -> (BTreeSet<Identity>, BTreeSet<Identity>) {
        let all = |state: &Snapshot| {
            let addresses = state.addresses.values().map(|entry| entry.identity);
            let prefixes = state.prefixes.values().map(|entry| entry.identity);
            let learned = state.learned.entries.values().chain(&state.learned.others);
            addresses
                .chain(prefixes)
                .chain(learned.copied())
                .chain([state.world_ipv4, state.world_ipv6])
                .collect()
        };
        (all(self.old), all(self.new))
    }

    fn spare(&self, used: &BTreeSet<Identity>, below: Option<Identity>) -> Option<Identity> {
        let last = below.unwrap_or(identity::LAST_LOCAL + 1);
        let known = |number: &Identity| {
            used.contains(number)
                || self.old.identities.contains_key(number)
                || self.new.identities.contains_key(number)
        };
        (identity::FIRST_LOCAL..last).rev().find(|number| !known(number))
    }
}

pub(super) struct ClassAxis<'a> {
    pub(super) old: &'a Snapshot,
    pub(super) new: &'a Snapshot,
}

impl Axis for ClassAxis<'_> {
    type Number = Class;

    fn split(key: &TableKey) -> (Class, u32) {
        (key.class, key.identity)
    }

    fn in_use(&self) -> (BTreeSet<Class>, BTreeSet<Class>) {
        let all = |state: &Snapshot| -> BTreeSet<Class> {
            let distinct: HashSet<Class> = state.classes.iter().copied().collect();
            distinct.into_iter().chain([palisade_abi::CLASS_ANY]).collect()
        };
        (all(self.old), all(self.new))
    }

    fn spare(&self, used: &BTreeSet<Class>, below: Option<Class>) -> Option<Class> {
        let last = below.unwrap_or(Class::MAX);
        (1..=last).rev().find(|number| !used.contains(number))
    }
}
