//! Policy tables that change, and the writes from one content of a table to another.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use palisade_abi::{Class, INSIDE, Identity, PolicyEntry, PolicyKey, identity};
use palisade_model::{
    op::Op,
    snapshot::{Snapshot, Table, TableKey, differing},
};

/// Policy ids and contents of the old and new tables that differ between the snapshots, or that an endpoint stops or
/// starts using.
pub(super) struct TableChanges<'a> {
    pub(super) old: BTreeSet<u32>,
    pub(super) new: BTreeSet<u32>,
    pub(super) old_tables: Vec<&'a Table>,
    pub(super) new_tables: Vec<&'a Table>,
}

pub(super) fn table_changes<'a>(old: &'a Snapshot, new: &'a Snapshot) -> TableChanges<'a> {
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

/// Returns the entries of a table with copies: for each pair (from, to), the entries of `from` replace those of `to`.
pub(super) fn extend<'a>(
    table: &'a Table,
    identities: &[(Identity, Identity)],
    classes: &[(Class, Class)],
) -> Cow<'a, BTreeMap<TableKey, PolicyEntry>> {
    if identities.is_empty() && classes.is_empty() {
        return Cow::Borrowed(&table.entries);
    }
    let mut extended = table.clone();
    for (from, to) in identities {
        let directions = palisade_abi::DIRECTIONS.map(|direction| direction as u8);
        for direction in directions
            .into_iter()
            .flat_map(|direction| [direction, direction | INSIDE])
        {
            let stale: Vec<TableKey> = extended.row(direction, *to).map(|(key, _)| *key).collect();
            for key in stale {
                extended.entries.remove(&key);
            }
            // Copies come from the unmodified table, because the entries of `from` can themselves be replaced by
            // copies.
            for (key, entry) in table.row(direction, *from) {
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

/// Appends the writes from one content of a table to another. A packet's verdict changes at most once.
pub(super) fn difference(
    policy: u32,
    old: &BTreeMap<TableKey, PolicyEntry>,
    new: &BTreeMap<TableKey, PolicyEntry>,
    ops: &mut Vec<Op>,
) {
    if std::ptr::eq(old, new) {
        return;
    }
    // Rank of a key in the lookup: 3 for the key that the programs look up first, 0 for the last.
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
