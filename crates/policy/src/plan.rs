//! From one state of the maps to the next without a packet noticing: what is done, in which order.
//!
//! A verdict comes from four lookups: who the other end is, which class its port has, which table the endpoint
//! has, what the table says. A change may touch all of them; each write changes one. So that in between no
//! packet finds anything but its old or its new verdict:
//!
//! 1. **Make.** Where an address changes from identity `a` to `b`, or a port from class `c` to `d`, it first gets
//!    a number for which the old tables say what they say of `a` (or `c`): `b` itself if the old tables do not
//!    tell the two apart or if nobody has `b` yet (then `a`'s entries are copied to it); `a` (it waits for step
//!    3) if the *new* tables do not tell them apart or if nobody keeps `a`; else a number that is used only here.
//! 2. **Switch.** The new tables, with entries for what is still waiting, are written under new policy ids, and each
//!    endpoint is switched by one store. A table that changes little is changed in place: first the entries that
//!    are added or replaced, the most specific first, then those that go, the least specific first. A packet's
//!    verdict then changes exactly once, when the entry that decides it is written or uncovered.
//! 3. **Settle.** Addresses and ports get their final numbers, for which the new tables say the same.
//! 4. **Break.** What nobody uses any more is deleted; revisions are raised where flows have to be judged again.
//!
//! Prefixes are written like entries: the longest first; removed: the shortest first.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    hash::Hash,
    sync::Arc,
};

use palisade_abi::{
    Addr, Class, EndpointState, Identity, IpcacheEntry, LearnedKey, PolicyEntry, PolicyKey, PrefixKey,
    endpoint_flags, identity,
};
use palisade_model::{
    op::Op,
    snapshot::{Snapshot, Table, TableKey, differing},
};

/// The steps from one state to another, in their order.
///
/// An endpoint that has another table afterwards must not share a policy id with one that keeps it (the compiler
/// sees to that).
#[must_use]
pub fn plan(old: &Snapshot, new: &Snapshot) -> Vec<Op> {
    let addresses = changed_addresses(old, new);
    let slots = changed_slots(old, new);
    let changes = table_changes(old, new);

    let pairs: BTreeSet<(Identity, Identity)> = addresses.iter().filter_map(AddressChange::pair).collect();
    let contested = contested(&addresses, old, new);
    let identities = choose(&IdentityAxis { old, new }, &pairs, &contested, &changes);
    let pairs: BTreeSet<(Class, Class)> = slots.iter().map(|(_, from, to)| (*from, *to)).collect();
    let classes = choose(&ClassAxis { old, new }, &pairs, &BTreeSet::new(), &changes);

    let mut ops = Vec::new();

    // Make.
    let olds: BTreeMap<u32, Cow<'_, BTreeMap<TableKey, PolicyEntry>>> = old
        .tables
        .iter()
        .map(|(id, table)| {
            let changes_too = changes.old.contains(id);
            (
                *id,
                extend(
                    table,
                    &identities.copies_in_old(changes_too),
                    &classes.copies_in_old(changes_too),
                ),
            )
        })
        .collect();
    for (id, extended) in &olds {
        if let (Cow::Owned(extended), Some(table)) = (extended, old.tables.get(id)) {
            difference(*id, &table.entries, extended, &mut ops);
        }
    }
    for change in &addresses {
        let between = change.between(&identities);
        if change.found != Some(between) {
            ops.push(change.key.put(between));
        }
    }
    let first: Vec<(u32, Class)> = slots
        .iter()
        .map(|(slot, from, to)| (*slot, *from, classes.number(*from, *to)))
        .filter(|(_, from, number)| from != number)
        .map(|(slot, _, number)| (slot, number))
        .collect();
    if !first.is_empty() {
        ops.push(Op::ClassPut(first));
    }

    // Switch.
    let mut settle = Vec::new();
    settle_addresses(&addresses, &identities, &mut settle);
    let last: Vec<(u32, Class)> = slots
        .iter()
        .filter(|(_, from, to)| classes.number(*from, *to) != *to)
        .map(|(slot, _, to)| (*slot, *to))
        .collect();
    if !last.is_empty() {
        settle.push(Op::ClassPut(last));
    }
    let news: BTreeMap<u32, Cow<'_, BTreeMap<TableKey, PolicyEntry>>> = new
        .tables
        .iter()
        .map(|(id, table)| {
            let changes_too = changes.new.contains(id);
            (
                *id,
                extend(
                    table,
                    &identities.copies_in_new(changes_too),
                    &classes.copies_in_new(changes_too),
                ),
            )
        })
        .collect();
    for (id, extended) in &news {
        match olds.get(id) {
            Some(before) => difference(*id, before, extended, &mut ops),
            None => difference(*id, &BTreeMap::new(), extended, &mut ops),
        }
    }
    let mut states: BTreeMap<u16, EndpointState> = old.endpoints.clone();
    for (id, state) in &new.endpoints {
        let before = old.endpoints.get(id);
        let flags = before.map_or(state.flags, |before| before.flags);
        let switched = before.is_none_or(|before| {
            before.policy != state.policy || before.identity != state.identity || before.flags != state.flags
        });
        let rewritten = !switched && changes.new.contains(&state.policy);
        if switched || rewritten {
            // If numbers are still to settle, flows are judged again once more when they have.
            // The same where a program may still have read another LEARNS than it read of the policy.
            let learns_as_before = (flags ^ state.flags) & endpoint_flags::LEARNS == 0;
            let revision = if settle.is_empty() && learns_as_before {
                state.revision
            } else {
                state.revision.wrapping_sub(1)
            };
            // As long as the old policy may judge, what was learned counts if it did. What learned addresses are in
            // between is right by either policy, so it can end before they settle. A table is plain only if both are.
            let both = EndpointState {
                revision,
                flags: (state.flags | flags) & endpoint_flags::LEARNS
                    | state.flags & flags & !endpoint_flags::LEARNS,
                ..*state
            };
            let state = EndpointState { revision, ..*state };
            for state in [both, state] {
                if states.get(id) != Some(&state) {
                    ops.push(Op::EndpointPut(*id, state));
                    states.insert(*id, state);
                }
            }
        }
    }
    for id in old.endpoints.keys().filter(|id| !new.endpoints.contains_key(id)) {
        ops.push(Op::EndpointPut(*id, EndpointState::default()));
    }

    // Settle.
    ops.append(&mut settle);

    // Break.
    for (id, state) in &new.endpoints {
        if states.get(id) != Some(state) {
            ops.push(Op::EndpointPut(*id, *state));
        }
    }
    for (id, extended) in &news {
        if let (Cow::Owned(extended), Some(table)) = (extended, new.tables.get(id)) {
            difference(*id, extended, &table.entries, &mut ops);
        }
    }
    for (id, extended) in &olds {
        if !new.tables.contains_key(id) {
            let keys: Vec<PolicyKey> = extended.keys().map(|key| key.with_policy(*id)).collect();
            if !keys.is_empty() {
                ops.push(Op::PolicyDelete(keys));
            }
        }
    }
    ops
}

/// A place where addresses are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum AddressKey {
    Address(Addr),
    Prefix(PrefixKey),
    /// Counts for one endpoint only. That is not told apart where numbers are chosen: a table that no packet of such
    /// an address is judged by may then be held to more than it has to.
    Learned(LearnedKey),
}

impl AddressKey {
    /// Bits that count; more is more specific.
    fn length(&self) -> u32 {
        match self {
            Self::Learned(_) => 130,
            Self::Address(_) => 129,
            Self::Prefix(key) => key.length,
        }
    }

    fn put(self, entry: IpcacheEntry) -> Op {
        match self {
            Self::Address(addr) => Op::AddressPut(addr, entry),
            Self::Prefix(key) => Op::PrefixPut(key, entry),
            Self::Learned(key) => Op::LearnedPut(key, entry.identity),
        }
    }

    fn delete(self) -> Op {
        match self {
            Self::Address(addr) => Op::AddressDelete(addr),
            Self::Prefix(key) => Op::PrefixDelete(key),
            Self::Learned(key) => Op::LearnedDelete(key),
        }
    }

    /// What is kept at this very place.
    fn kept(self, in_state: &Snapshot) -> Option<IpcacheEntry> {
        match self {
            Self::Address(addr) => in_state.addresses.get(&addr).copied(),
            Self::Prefix(key) => in_state.prefixes.get(&key).copied(),
            Self::Learned(key) => in_state
                .learned
                .entries
                .get(&key)
                .map(|&identity| learned_entry(identity)),
        }
    }

    /// What an address finds that nothing more specific than this place knows.
    fn effective(self, in_state: &Snapshot) -> IpcacheEntry {
        let (addr, below) = match self {
            Self::Address(addr) => (addr, 128),
            Self::Prefix(key) => (key.addr, key.length),
            Self::Learned(key) => {
                let otherwise = || learned_entry(Self::Address(key.addr).effective(in_state).identity);
                let somebody = in_state.addresses.get(&key.addr).is_some_and(hides_learned);
                if somebody || !learns(in_state, key) {
                    return otherwise();
                }
                return self.kept(in_state).unwrap_or_else(otherwise);
            }
        };
        self.kept(in_state)
            .or_else(|| in_state.longest_prefix(addr, below))
            .unwrap_or(IpcacheEntry {
                identity: if addr.is_v4() && below >= 96 {
                    in_state.world_ipv4
                } else {
                    in_state.world_ipv6
                },
                ..IpcacheEntry::default()
            })
    }
}

/// The map of learned addresses holds identities only.
fn learned_entry(identity: Identity) -> IpcacheEntry {
    IpcacheEntry {
        identity,
        ..IpcacheEntry::default()
    }
}

/// Whether the programs take an address for this before they look at what was learned.
fn hides_learned(entry: &IpcacheEntry) -> bool {
    entry.identity < identity::FIRST_LOCAL
}

/// Whether what the endpoint of a learned address has learned counts.
fn learns(state: &Snapshot, key: LearnedKey) -> bool {
    let endpoint = u16::try_from(key.endpoint).ok();
    endpoint
        .and_then(|id| state.endpoints.get(&id))
        .is_some_and(|state| state.flags & endpoint_flags::LEARNS != 0)
}

/// The pairs of identities of addresses that someone has learned, where one of them hides what was learned. In
/// between such an address must have a number that does not: who learned it has a way of its own from one to the other.
fn contested(addresses: &[AddressChange], old: &Snapshot, new: &Snapshot) -> BTreeSet<(Identity, Identity)> {
    let learned = || old.learned.entries.keys().chain(new.learned.entries.keys());
    let addrs: HashSet<Addr> = learned().map(|key| key.addr).collect();
    addresses
        .iter()
        .filter(|change| matches!(change.key, AddressKey::Address(addr) if addrs.contains(&addr)))
        .filter_map(AddressChange::pair)
        .filter(|(from, to)| *from < identity::FIRST_LOCAL || *to < identity::FIRST_LOCAL)
        .collect()
}

/// A place where something else is kept, or found, afterwards.
#[derive(Debug)]
struct AddressChange {
    key: AddressKey,
    found: Option<IpcacheEntry>,
    wanted: Option<IpcacheEntry>,
    from: IpcacheEntry,
    to: IpcacheEntry,
}

impl AddressChange {
    fn pair(&self) -> Option<(Identity, Identity)> {
        let pair = (self.from.identity, self.to.identity);
        (pair.0 != pair.1).then_some(pair)
    }

    /// What is kept here while the tables are switched.
    fn between(&self, choices: &Choices<Identity>) -> IpcacheEntry {
        let Some((from, to)) = self.pair() else {
            return self.to;
        };
        let number = choices.number(from, to);
        IpcacheEntry {
            identity: number,
            ..if number == from { self.from } else { self.to }
        }
    }
}

/// The places that differ, the most specific first.
fn changed_addresses(old: &Snapshot, new: &Snapshot) -> Vec<AddressChange> {
    let mut keys: Vec<AddressKey> = Vec::new();
    if !Arc::ptr_eq(&old.addresses, &new.addresses) {
        let all = old.addresses.keys().chain(
            new.addresses
                .keys()
                .filter(|key| !old.addresses.contains_key(key)),
        );
        keys.extend(all.map(|addr| AddressKey::Address(*addr)));
    }
    if !Arc::ptr_eq(&old.prefixes, &new.prefixes) {
        let all = old
            .prefixes
            .keys()
            .chain(new.prefixes.keys().filter(|key| !old.prefixes.contains_key(key)));
        keys.extend(all.map(|key| AddressKey::Prefix(*key)));
    }
    let all = old.learned.entries.keys().chain(
        new.learned
            .entries
            .keys()
            .filter(|key| !old.learned.entries.contains_key(key)),
    );
    keys.extend(all.map(|key| AddressKey::Learned(*key)));
    let mut changes: Vec<AddressChange> = keys
        .into_iter()
        .map(|key| AddressChange {
            key,
            found: key.kept(old),
            wanted: key.kept(new),
            from: key.effective(old),
            to: key.effective(new),
        })
        // What was learned can also come to count, or not to, by what else changes.
        .filter(|change| {
            change.found != change.wanted
                || (matches!(change.key, AddressKey::Learned(_)) && change.pair().is_some())
        })
        .collect();
    changes.sort_by_key(|change| std::cmp::Reverse(change.key.length()));
    changes
}

fn settle_addresses(addresses: &[AddressChange], choices: &Choices<Identity>, ops: &mut Vec<Op>) {
    for change in addresses {
        if let Some(wanted) = change.wanted
            && wanted != change.between(choices)
        {
            ops.push(change.key.put(wanted));
        }
    }
    for change in addresses.iter().rev().filter(|change| change.wanted.is_none()) {
        ops.push(change.key.delete());
    }
}

/// Slots with another class: slot, old class, new class.
fn changed_slots(old: &Snapshot, new: &Snapshot) -> Vec<(u32, Class, Class)> {
    if Arc::ptr_eq(&old.classes, &new.classes) {
        return Vec::new();
    }
    new.classes
        .iter()
        .enumerate()
        .map(|(slot, to)| {
            let from = old
                .classes
                .get(slot)
                .copied()
                .unwrap_or(palisade_abi::CLASS_UNKNOWN);
            (slot as u32, from, *to)
        })
        .filter(|(_, from, to)| from != to)
        .collect()
}

/// The tables that endpoints leave or enter, and those that change in place.
struct TableChanges<'a> {
    old: BTreeSet<u32>,
    new: BTreeSet<u32>,
    old_tables: Vec<&'a Table>,
    new_tables: Vec<&'a Table>,
}

fn table_changes<'a>(old: &'a Snapshot, new: &'a Snapshot) -> TableChanges<'a> {
    let same = |id: &u32| match (old.tables.get(id), new.tables.get(id)) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a == b,
        _ => false,
    };
    let mut olds: BTreeSet<u32> = old.tables.keys().copied().filter(|id| !same(id)).collect();
    let mut news: BTreeSet<u32> = new.tables.keys().copied().filter(|id| !same(id)).collect();
    for (id, state) in &new.endpoints {
        if let Some(before) = old.endpoints.get(id)
            && before.policy != state.policy
        {
            olds.insert(before.policy);
            news.insert(state.policy);
        }
    }
    TableChanges {
        old_tables: olds
            .iter()
            .filter_map(|id| old.tables.get(id))
            .map(|table| &**table)
            .collect(),
        new_tables: news
            .iter()
            .filter_map(|id| new.tables.get(id))
            .map(|table| &**table)
            .collect(),
        old: olds,
        new: news,
    }
}

/// How one number becomes another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice<N> {
    /// At once, before the tables are switched.
    Early,
    /// After the tables have been switched.
    Late,
    /// Early; the old tables say of the new number what they say of the old one.
    Fresh,
    /// Late; the new tables say of the old number what they say of the new one.
    Gone,
    /// By way of a number that both know.
    By(N),
}

/// The choice for each pair of numbers.
struct Choices<N>(BTreeMap<(N, N), Choice<N>>);

impl<N: Copy + Ord> Choices<N> {
    /// The number between the old and the new one.
    fn number(&self, from: N, to: N) -> N {
        match self.0.get(&(from, to)) {
            Some(Choice::Late | Choice::Gone) => from,
            Some(Choice::By(number)) => *number,
            Some(Choice::Early | Choice::Fresh) | None => to,
        }
    }

    /// What is copied to what in an old table: its own entries.
    fn copies_in_old(&self, changes: bool) -> Vec<(N, N)> {
        self.0
            .iter()
            .filter_map(|((from, to), choice)| match choice {
                Choice::Fresh if changes => Some((*from, *to)),
                Choice::By(number) => Some((if changes { *from } else { *to }, *number)),
                _ => None,
            })
            .collect()
    }

    /// What is copied to what in a new table.
    fn copies_in_new(&self, changes: bool) -> Vec<(N, N)> {
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

/// What a table says of each number of an axis.
type Lines<N> = HashMap<N, Vec<(u8, u32, PolicyEntry)>>;

/// Identities or classes: what can be asked about their numbers.
trait Axis {
    type Number: Copy + Ord + Hash;
    /// The number in a key, and the rest of the key.
    fn split(key: &TableKey) -> (Self::Number, u32);
    /// The numbers that something has in the old state, in the new state.
    fn in_use(&self) -> (BTreeSet<Self::Number>, BTreeSet<Self::Number>);
    /// A number that neither state has, below the given one.
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

/// Whether no table tells two numbers apart.
fn same<N: Copy + Ord + Hash>(lines: &[Lines<N>], a: N, b: N) -> bool {
    lines.iter().all(|lines| lines.get(&a) == lines.get(&b))
}

/// `apart`: pairs that need a number of their own.
fn choose<A: Axis>(
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
                // Every number is in use. Nothing is lost by switching late but the promise for this moment.
                None => Choice::Late,
            }
        };
        choices.insert((from, to), choice);
    }
    Choices(choices)
}

struct IdentityAxis<'a> {
    old: &'a Snapshot,
    new: &'a Snapshot,
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

struct ClassAxis<'a> {
    old: &'a Snapshot,
    new: &'a Snapshot,
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

/// A table with rows and columns copied: the entries of the first number, instead of its own, for the second.
fn extend<'a>(
    table: &'a Table,
    identities: &[(Identity, Identity)],
    classes: &[(Class, Class)],
) -> Cow<'a, BTreeMap<TableKey, PolicyEntry>> {
    if identities.is_empty() && classes.is_empty() {
        return Cow::Borrowed(&table.entries);
    }
    let mut extended = table.clone();
    for (from, to) in identities {
        for direction in palisade_abi::DIRECTIONS {
            let stale: Vec<TableKey> = extended.row(direction as u8, *to).map(|(key, _)| *key).collect();
            for key in stale {
                extended.entries.remove(&key);
            }
            // From the table as it was: a number may be copied from that is copied to as well.
            for (key, entry) in table.row(direction as u8, *from) {
                extended.entries.insert(
                    TableKey {
                        identity: *to,
                        ..*key
                    },
                    *entry,
                );
            }
        }
    }
    if !classes.is_empty() {
        let source = extended.entries.clone();
        let targets: HashSet<Class> = classes.iter().map(|(_, to)| *to).collect();
        extended.entries.retain(|key, _| !targets.contains(&key.class));
        let mut copies: HashMap<Class, Vec<Class>> = HashMap::new();
        for (from, to) in classes {
            copies.entry(*from).or_default().push(*to);
        }
        for (key, entry) in source {
            for to in copies.get(&key.class).into_iter().flatten() {
                extended.entries.insert(TableKey { class: *to, ..key }, entry);
            }
        }
    }
    Cow::Owned(extended.entries)
}

/// The writes from one content of a table to another, such that each packet's verdict changes once at most.
fn difference(
    policy: u32,
    old: &BTreeMap<TableKey, PolicyEntry>,
    new: &BTreeMap<TableKey, PolicyEntry>,
    ops: &mut Vec<Op>,
) {
    if std::ptr::eq(old, new) {
        return;
    }
    // How many fields of the key are fixed, the order in which the programs look.
    let level = |key: &TableKey| {
        2 * usize::from(key.identity != identity::ANY) + usize::from(key.class != palisade_abi::CLASS_ANY)
    };
    let mut puts: [Vec<(PolicyKey, PolicyEntry)>; 4] = Default::default();
    let mut deletes: [Vec<PolicyKey>; 4] = Default::default();
    for (key, _, wanted) in differing(old, new) {
        match wanted {
            Some(entry) => puts[level(key)].push((key.with_policy(policy), *entry)),
            None => deletes[level(key)].push(key.with_policy(policy)),
        }
    }
    ops.extend(
        puts.into_iter()
            .rev()
            .filter(|list| !list.is_empty())
            .map(Op::PolicyPut),
    );
    ops.extend(
        deletes
            .into_iter()
            .filter(|list| !list.is_empty())
            .map(Op::PolicyDelete),
    );
}
