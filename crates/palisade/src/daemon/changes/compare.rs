//! Compares the verdicts of two compiled sets of policies: for each endpoint, direction, peer and port. Pure.
//!
//! Both compilers have the same endpoints and peers. Port classes and identities of prefixes have other numbers in the
//! two sets, so classes are compared slot by slot, and prefixes by the lookup that the programs do.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use palisade_abi::{
    CLASS_SLOTS, Class, Decision, Direction, Identity, PolicyEntry, PrefixKey, entry_flags, identity,
};
use palisade_model::{
    labels::Labels,
    snapshot::{Matcher, RuleSet, Snapshot, Table, inspector_name},
};
use palisade_policy::compile::Compiler;

use crate::{
    control::api::VerdictChange,
    daemon::{
        enforcer::endpoint_names,
        state::NODE,
        view::{class_names, prefix_text},
    },
};

/// Largest number of rows.
const MAX_ROWS: usize = 500;
/// Largest number of peers and of endpoints that a row names.
const MAX_NAMES: usize = 64;
/// Largest number of verdicts that are compared.
const MAX_CELLS: usize = 16 << 20;

/// The verdicts that differ.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    /// Rows; those with new denials first.
    pub rows: Vec<VerdictChange>,
    /// Number of rows that are not listed.
    pub not_listed: u64,
    /// Whether there were too many verdicts to compare all.
    pub incomplete: bool,
}

/// A peer: its identity in both sets.
type Peer = (Identity, Identity);

/// A joint class: the classes of some slots in both sets.
type Joint = (Class, Class);

/// Key of a row: policy tables of the endpoints, direction, verdicts, joint classes.
type RowKey = ((u32, u32), u8, String, String, BTreeSet<usize>);

/// Compares two sets.
pub(super) fn compare(from: &Compiler, to: &Compiler) -> Comparison {
    let (old, new) = (from.snapshot(), to.snapshot());
    let (joints, of_slot) = joint_classes(old, new);
    let mut groups: BTreeMap<(u32, u32), Vec<u16>> = BTreeMap::new();
    for (id, state) in &new.endpoints {
        let before = old.endpoints.get(id).map_or(0, |state| state.policy);
        groups.entry((before, state.policy)).or_default().push(*id);
    }
    let peers = peers(old, new);
    let empty = Table::default();
    let mut cells = 0_usize;
    let mut comparison = Comparison::default();
    let mut rows: BTreeMap<RowKey, (Vec<&str>, u32)> = BTreeMap::new();
    'all: for tables in groups.keys() {
        let table = |snapshot: &'_ Snapshot, id: u32| snapshot.tables.get(&id).cloned();
        let (before, after) = (table(old, tables.0), table(new, tables.1));
        let (before, after) = (
            before.as_deref().unwrap_or(&empty),
            after.as_deref().unwrap_or(&empty),
        );
        for direction in [Direction::Ingress, Direction::Egress] {
            for ((was, is), name) in &peers {
                cells = cells.saturating_add(joints.len());
                if cells > MAX_CELLS {
                    comparison.incomplete = true;
                    break 'all;
                }
                let mut differing: BTreeMap<(String, String), (BTreeSet<usize>, u32)> = BTreeMap::new();
                for (number, (class, now)) in joints.iter().enumerate() {
                    let left = before.lookup(direction, *was, *class);
                    let right = after.lookup(direction, *is, *now);
                    if left == right && left.is_none_or(|entry| entry.ruleset == 0) {
                        continue;
                    }
                    let (left_verdict, right_verdict) = (verdict(left), verdict(right));
                    let rule = right.map_or(0, |entry| entry.rule);
                    let pair = if left_verdict != right_verdict {
                        (left_verdict, right_verdict)
                    } else if rules(old, left) != rules(new, right) {
                        let other = format!("{right_verdict} (other rules)");
                        (left_verdict, other)
                    } else {
                        continue;
                    };
                    let place = differing.entry(pair).or_insert_with(|| (BTreeSet::new(), rule));
                    place.0.insert(number);
                }
                for ((left, right), (classes, rule)) in differing {
                    let key = (*tables, direction as u8, left, right, classes);
                    let row = rows.entry(key).or_insert_with(|| (Vec::new(), rule));
                    row.0.push(name);
                }
            }
        }
    }
    let names = endpoint_names(to.inventory());
    let mut sorted: Vec<(RowKey, (Vec<&str>, u32))> = rows.into_iter().collect();
    let of_node = |tables: &(u32, u32)| groups.get(tables).is_some_and(|ids| ids.contains(&NODE));
    sorted.sort_by_key(|((tables, _, _, to, _), _)| (to != "deny", !of_node(tables)));
    comparison.not_listed = sorted.len().saturating_sub(MAX_ROWS) as u64;
    sorted.truncate(MAX_ROWS);
    let mut texts: HashMap<BTreeSet<usize>, Vec<String>> = HashMap::new();
    comparison.rows = sorted
        .into_iter()
        .map(|((tables, direction, from, to, classes), (peers, rule))| {
            let endpoints = groups.get(&tables).into_iter().flatten();
            let endpoints = endpoints.filter_map(|id| names.get(id).cloned());
            VerdictChange {
                endpoints: bounded(endpoints.collect()),
                direction: match direction {
                    0 => "ingress",
                    _ => "egress",
                }
                .to_owned(),
                peers: bounded(peers.into_iter().map(ToOwned::to_owned).collect()),
                ports: texts
                    .entry(classes)
                    .or_insert_with_key(|classes| ports(classes, joints.len(), &of_slot))
                    .clone(),
                from,
                to,
                decided_by: new
                    .rules
                    .get(&rule)
                    .map_or_else(String::new, |info| info.to_string()),
            }
        })
        .collect();
    comparison
}

/// Shortens a list of names.
fn bounded(mut names: Vec<String>) -> Vec<String> {
    let more = names.len().saturating_sub(MAX_NAMES);
    if more > 0 {
        names.truncate(MAX_NAMES);
        names.push(format!("and {more} more"));
    }
    names
}

/// Returns the joint classes, and the number of the joint class of each slot.
fn joint_classes(old: &Snapshot, new: &Snapshot) -> (Vec<Joint>, Vec<Class>) {
    let mut numbers: HashMap<Joint, usize> = HashMap::new();
    let mut joints = Vec::new();
    let class = |snapshot: &Snapshot, slot: usize| snapshot.classes.get(slot).copied().unwrap_or_default();
    let of_slot = (0..CLASS_SLOTS).map(|slot| {
        let joint = (class(old, slot), class(new, slot));
        let number = *numbers.entry(joint).or_insert_with(|| {
            joints.push(joint);
            joints.len() - 1
        });
        Class::try_from(number).unwrap_or(Class::MAX)
    });
    let of_slot = of_slot.collect();
    (joints, of_slot)
}

/// Returns the ports of joint classes.
fn ports(classes: &BTreeSet<usize>, all: usize, of_slot: &[Class]) -> Vec<String> {
    if classes.len() == all {
        return vec!["ANY".to_owned()];
    }
    let marked: Vec<Class> = of_slot
        .iter()
        .map(|number| {
            if classes.contains(&usize::from(*number)) {
                1
            } else {
                2
            }
        })
        .collect();
    bounded(class_names(&marked).remove(&1).unwrap_or_default())
}

/// Returns the peers with their names: every label set, every prefix, the world, and learned names.
fn peers(old: &Snapshot, new: &Snapshot) -> BTreeMap<Peer, String> {
    let mut peers: BTreeMap<Peer, String> = BTreeMap::new();
    for (was, is, name) in [
        (old.world_ipv4, new.world_ipv4, "world-ipv4"),
        (old.world_ipv6, new.world_ipv6, "world-ipv6"),
    ] {
        peers.entry((was, is)).or_insert_with(|| name.to_owned());
    }
    let is_local = |id: Identity| (identity::FIRST_LOCAL..=identity::LAST_LOCAL).contains(&id);
    let text = |labels: &Labels| {
        let shown: Vec<String> = labels
            .iter()
            .filter(|label| label.source != "cidr")
            .map(|label| match label.source.as_str() {
                "k8s" => format!("{}={}", label.key, label.value),
                "reserved" => label.key.clone(),
                _ => label.to_string(),
            })
            .collect();
        shown.join(",")
    };
    for (id, labels) in new.identities.iter().filter(|(id, _)| !is_local(**id)) {
        if old.identities.get(id) == Some(labels) {
            peers.entry((*id, *id)).or_insert_with(|| text(labels));
        }
    }
    let world = |snapshot: &Snapshot, key: PrefixKey| {
        if key.addr.is_v4() {
            snapshot.world_ipv4
        } else {
            snapshot.world_ipv6
        }
    };
    let of_prefix = |snapshot: &Snapshot, key: PrefixKey| {
        snapshot
            .longest_prefix(key.addr, key.length)
            .map_or_else(|| world(snapshot, key), |entry| entry.identity)
    };
    let mut keys: Vec<&PrefixKey> = old.prefixes.keys().chain(new.prefixes.keys()).collect();
    keys.sort_by_key(|key| (key.addr, key.length));
    keys.dedup();
    let mut named: BTreeSet<Identity> = BTreeSet::new();
    let mut prefix = |was: Identity, is: Identity, name: String| {
        named.extend([was, is]);
        if is_local(was) || is_local(is) {
            peers
                .entry((was, is))
                .and_modify(|known| {
                    if known.len() < 200 && !known.split(',').any(|known| known == name) {
                        known.push(',');
                        known.push_str(&name);
                    }
                })
                .or_insert(name);
        }
    };
    for key in keys {
        prefix(of_prefix(old, *key), of_prefix(new, *key), prefix_text(*key));
    }
    let mut addresses: Vec<_> = old.addresses.keys().chain(new.addresses.keys()).collect();
    addresses.sort();
    addresses.dedup();
    for address in addresses {
        let address = std::net::IpAddr::from(*address);
        let (was, is) = (
            old.identity_of(address).identity,
            new.identity_of(address).identity,
        );
        prefix(was, is, address.to_string());
    }
    // Learned names have identities that no prefix has.
    let by_labels: HashMap<&Labels, Identity> =
        old.identities.iter().map(|(id, labels)| (labels, *id)).collect();
    for (id, labels) in new.identities.iter().filter(|(id, _)| is_local(**id)) {
        if !named.contains(id) {
            let was = by_labels.get(labels).copied().unwrap_or(old.world_ipv4);
            peers.entry((was, *id)).or_insert_with(|| text(labels));
        }
    }
    let still: BTreeSet<&Labels> = new.identities.values().collect();
    for (id, labels) in old.identities.iter().filter(|(id, _)| is_local(**id)) {
        if !named.contains(id) && !still.contains(labels) {
            peers.entry((*id, new.world_ipv4)).or_insert_with(|| text(labels));
        }
    }
    peers
}

/// Returns the verdict of an entry, in words.
fn verdict(entry: Option<&PolicyEntry>) -> String {
    let Some(entry) = entry else {
        return "deny".to_owned();
    };
    let text = match Decision::from_u8(entry.decision) {
        Decision::Allow => return "allow".to_owned(),
        Decision::Deny | Decision::DenyExplicit | Decision::DenyQuic => "deny".to_owned(),
        Decision::AuthRequired => "auth".to_owned(),
        Decision::Inspect => format!("inspect {}", inspector_name(entry.inspector)),
    };
    if entry.flags & entry_flags::AUDIT == 0 {
        text
    } else {
        format!("audit ({text})")
    }
}

/// Returns the application rules of an entry, without the numbers of the rules that they come from.
fn rules<'s>(snapshot: &'s Snapshot, entry: Option<&PolicyEntry>) -> Option<(RuleSet, Vec<&'s Matcher>)> {
    let entry = entry.filter(|entry| entry.ruleset != 0)?;
    let set = snapshot.rulesets.get(&entry.ruleset)?;
    let matchers = set.alternatives.iter().map(|alternative| &alternative.matcher);
    let without = RuleSet {
        alternatives: Vec::new(),
        ..(**set).clone()
    };
    Some((without, matchers.collect()))
}
