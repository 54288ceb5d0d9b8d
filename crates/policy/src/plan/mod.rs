//! Plans: operations from one content of the maps to the next, in an order in which each packet gets its old or its new
//! verdict.
//!
//! A verdict comes from four lookups: the identity of the peer, the class of the port, the policy table of the
//! endpoint, and the entry of the table. A change can affect all four, but one write changes only one of them. [`plan`]
//! therefore orders the writes in four steps: make, switch, settle, break.
//!
//! Entries and prefixes are written from the most specific to the least specific, and deleted in the reverse order.

mod addresses;
mod choice;
mod tables;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use palisade_abi::{Class, EndpointState, Identity, PolicyEntry, PolicyKey, endpoint_flags};
use palisade_model::{
    op::Op,
    snapshot::{Snapshot, TableKey},
};

use addresses::{AddressChange, changed_addresses, contested, settle_addresses};
use choice::{Choices, ClassAxis, IdentityAxis, choose};
use tables::{TableChanges, difference, extend, table_changes};

/// Returns the operations that lead from one snapshot to another, in the order of execution.
///
/// The compiler guarantees that an endpoint whose table changes shares no policy id with an endpoint whose table stays.
#[must_use]
pub fn plan(old: &Snapshot, new: &Snapshot) -> Vec<Op> {
    let plan = Plan::new(old, new);
    let mut ops = Vec::new();
    plan.make(&mut ops);
    let settling = plan.settle();
    let states = plan.switch(!settling.is_empty(), &mut ops);
    ops.extend(settling);
    plan.break_old(&states, &mut ops);
    ops
}

/// Contents of tables by policy id. A table with copied entries is `Cow::Owned`.
type Contents<'a> = BTreeMap<u32, Cow<'a, BTreeMap<TableKey, PolicyEntry>>>;

/// The difference between two snapshots, and the numbers that addresses and ports have during the plan.
struct Plan<'a> {
    old: &'a Snapshot,
    new: &'a Snapshot,
    /// Changed addresses, prefixes and learned addresses, the most specific first.
    addresses: Vec<AddressChange>,
    /// Slots whose class changes: slot, old class, new class.
    slots: Vec<(u32, Class, Class)>,
    tables: TableChanges<'a>,
    identities: Choices<Identity>,
    classes: Choices<Class>,
    /// The old tables, with the copied entries that step 1 adds.
    old_tables: Contents<'a>,
    /// The new tables, with the copied entries that step 4 removes.
    new_tables: Contents<'a>,
}

impl<'a> Plan<'a> {
    fn new(old: &'a Snapshot, new: &'a Snapshot) -> Self {
        let addresses = changed_addresses(old, new);
        let slots = changed_slots(old, new);
        let tables = table_changes(old, new);

        let pairs: BTreeSet<_> = addresses.iter().filter_map(AddressChange::pair).collect();
        let contested = contested(&addresses, old, new);
        let identities = choose(&IdentityAxis { old, new }, &pairs, &contested, &tables);
        let pairs: BTreeSet<_> = slots.iter().map(|(_, from, to)| (*from, *to)).collect();
        let classes = choose(&ClassAxis { old, new }, &pairs, &BTreeSet::new(), &tables);

        let extended_old = old.tables.iter().map(|(id, table)| {
            let changes = tables.old.contains(id);
            let (identities, classes) = (identities.copies_in_old(changes), classes.copies_in_old(changes));
            (*id, extend(table, &identities, &classes))
        });
        let old_tables = extended_old.collect();
        let extended_new = new.tables.iter().map(|(id, table)| {
            let changes = tables.new.contains(id);
            let (identities, classes) = (identities.copies_in_new(changes), classes.copies_in_new(changes));
            (*id, extend(table, &identities, &classes))
        });
        let new_tables = extended_new.collect();
        Self {
            old,
            new,
            addresses,
            slots,
            tables,
            identities,
            classes,
            old_tables,
            new_tables,
        }
    }

    /// Appends step 1, "make". Addresses and ports whose number (identity or class) changes get the number that
    /// [`choose`] has chosen for the time of the switch. Copied entries are written first, so that the old tables decide
    /// as before.
    fn make(&self, ops: &mut Vec<Op>) {
        for (id, extended) in &self.old_tables {
            if let (Cow::Owned(extended), Some(table)) = (extended, self.old.tables.get(id)) {
                difference(*id, &table.entries, extended, ops);
            }
        }
        for change in &self.addresses {
            let between = change.between(&self.identities);
            if change.found != Some(between) {
                ops.push(change.key.put(between));
            }
        }
        let slots = self.slots.iter();
        let slots: Vec<(u32, Class)> = slots
            .map(|(slot, from, to)| (*slot, *from, self.classes.number(*from, *to)))
            .filter(|(_, from, number)| from != number)
            .map(|(slot, _, number)| (slot, number))
            .collect();
        if !slots.is_empty() {
            ops.push(Op::ClassPut(slots));
        }
    }

    /// Appends step 2, "switch". New tables are written under new policy ids, and one store of an endpoint state
    /// switches the endpoint to its new table. A table that changes little keeps its policy id and is changed in place:
    /// a packet's verdict changes once, when the entry that decides the new verdict is written, or when the entry that
    /// precedes it in the lookup is deleted.
    ///
    /// Returns the state that each endpoint of the new snapshot has after this step. `settles`: whether step 3 has
    /// operations.
    fn switch(&self, settles: bool, ops: &mut Vec<Op>) -> BTreeMap<u16, EndpointState> {
        let empty = BTreeMap::new();
        for (id, extended) in &self.new_tables {
            let before = self.old_tables.get(id).map_or(&empty, |before| &**before);
            difference(*id, before, extended, ops);
        }
        let mut states = self.old.endpoints.clone();
        for (id, state) in &self.new.endpoints {
            let before = self.old.endpoints.get(id);
            let switched = before.is_none_or(|before| {
                before.policy != state.policy
                    || before.identity != state.identity
                    || before.flags != state.flags
            });
            if !switched && !self.tables.new.contains(&state.policy) {
                continue;
            }
            let flags = before.map_or(state.flags, |before| before.flags);
            for state in switched_states(state, flags, settles) {
                if states.get(id) != Some(&state) {
                    ops.push(Op::EndpointPut(*id, state));
                    states.insert(*id, state);
                }
            }
        }
        let gone = self.old.endpoints.keys();
        for id in gone.filter(|id| !self.new.endpoints.contains_key(id)) {
            ops.push(Op::EndpointPut(*id, EndpointState::default()));
        }
        states
    }

    /// Returns step 3, "settle": addresses and ports get their final numbers.
    fn settle(&self) -> Vec<Op> {
        let mut ops = Vec::new();
        settle_addresses(&self.addresses, &self.identities, &mut ops);
        let slots = self.slots.iter();
        let slots: Vec<(u32, Class)> = slots
            .filter(|(_, from, to)| self.classes.number(*from, *to) != *to)
            .map(|(slot, _, to)| (*slot, *to))
            .collect();
        if !slots.is_empty() {
            ops.push(Op::ClassPut(slots));
        }
        ops
    }

    /// Appends step 4, "break": entries and tables that are no longer used are deleted, and revisions are raised so
    /// that flows are evaluated again.
    fn break_old(&self, states: &BTreeMap<u16, EndpointState>, ops: &mut Vec<Op>) {
        for (id, state) in &self.new.endpoints {
            if states.get(id) != Some(state) {
                ops.push(Op::EndpointPut(*id, *state));
            }
        }
        for (id, extended) in &self.new_tables {
            if let (Cow::Owned(extended), Some(table)) = (extended, self.new.tables.get(id)) {
                difference(*id, extended, &table.entries, ops);
            }
        }
        for (id, extended) in &self.old_tables {
            if self.new.tables.contains_key(id) {
                continue;
            }
            let keys: Vec<PolicyKey> = extended.keys().map(|key| key.with_policy(*id)).collect();
            if !keys.is_empty() {
                ops.push(Op::PolicyDelete(keys));
            }
        }
    }
}

/// Returns the two states that an endpoint gets in step 2, one after the other. `old_flags`: flags of the endpoint
/// before the plan; `settles`: whether step 3 has operations.
fn switched_states(state: &EndpointState, old_flags: u32, settles: bool) -> [EndpointState; 2] {
    // If step 3 has operations, step 4 raises the revision once more, so that flows are evaluated again. Step 4 also
    // raises the revision if the flag LEARNS (the programs look up learned addresses) changes, because a program can
    // have read the flag from one state and the policy id from the other.
    let learns_as_before = (old_flags ^ state.flags) & endpoint_flags::LEARNS == 0;
    let revision = if !settles && learns_as_before {
        state.revision
    } else {
        state.revision.wrapping_sub(1)
    };
    // A program that has read the old policy id can read the flags of the first of these two states. So in the first
    // state, LEARNS is set if the old or the new state has it. A PLAIN flag (no entry of the direction inspects or
    // denies explicitly) is set only if both states have it. Until step 3, learned addresses have identities for which
    // both the old and the new table have the right entries.
    let both = EndpointState {
        revision,
        flags: (state.flags | old_flags) & endpoint_flags::LEARNS
            | state.flags & old_flags & !endpoint_flags::LEARNS,
        ..*state
    };
    [both, EndpointState { revision, ..*state }]
}

/// Returns the slots whose class changes: slot, old class, new class.
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
