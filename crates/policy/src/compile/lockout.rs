//! Remarks about access to the node: policies that failsafe ports override, and a node without an open port.

use std::collections::{BTreeMap, BTreeSet};

use palisade_abi::{
    CLASS_ANY, CLASS_SLOTS, Class, DIRECTIONS, Decision, Direction, Identity, PolicyEntry, class_slot,
    entry_flags, identity, protocol,
};
use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    rule::Location,
    snapshot::{RuleKey, Table},
};

use super::{compiler::Compiler, subject::Subject};

impl Compiler {
    /// Returns the remarks about access to the node, in no order.
    pub(super) fn access_remarks(&self) -> Vec<Diagnostic> {
        let mut remarks = Vec::new();
        for subject in self.subjects.iter().filter(|subject| subject.node) {
            for direction in DIRECTIONS {
                self.overridden(&subject.table, direction, &mut remarks);
            }
            remarks.extend(self.closed(subject));
        }
        remarks
    }

    /// Notes for each rule or policy the failsafe ports that pass although the rule or policy denies or inspects them.
    fn overridden(&self, table: &Table, direction: Direction, remarks: &mut Vec<Diagnostic>) {
        let failsafe = |entry: &PolicyEntry| entry.flags & entry_flags::FAILSAFE != 0;
        let classes: BTreeSet<Class> = table
            .entries
            .iter()
            .filter(|(key, entry)| key.direction == direction as u8 && failsafe(entry))
            .map(|(key, _)| key.class)
            .collect();
        if classes.is_empty() {
            return;
        }
        let identities: BTreeSet<Identity> = table.entries.keys().map(|key| key.identity).collect();
        let mut found: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
        for identity in identities {
            for class in &classes {
                let Some(outside) = table.lookup(direction, identity, *class).filter(|e| failsafe(e)) else {
                    continue;
                };
                let inside = table.lookup_inside(direction, identity, *class);
                let passes = inside.is_none_or(|entry| {
                    entry.decision == Decision::Allow as u8 || entry.flags & entry_flags::AUDIT != 0
                });
                if !passes && let Some(inside) = inside {
                    found.entry(inside.rule).or_default().insert(outside.rule);
                }
            }
        }
        let rules = &self.rule_ids.infos;
        let place = |rule: u32| rules.get(&rule).and_then(|info| info.location.clone());
        for (rule, ports) in found {
            let Some(info) = rules.get(&rule) else { continue };
            let ports: Vec<String> = ports.iter().map(|port| self.rule_name(*port)).collect();
            let what = match info.key {
                RuleKey::Rule(_) => "denies or inspects",
                _ => "does not allow",
            };
            let (verb, it) = if ports.len() == 1 {
                ("passes", "it")
            } else {
                ("pass", "them")
            };
            remarks.push(Diagnostic {
                severity: Severity::Note,
                location: place(rule).unwrap_or_default(),
                message: format!(
                    "{} {verb} although {} {what} {it} ([failsafe] of the configuration)",
                    ports.join(", "),
                    self.rule_name(rule),
                ),
            });
        }
    }

    /// Returns the name of a rule without its place.
    fn rule_name(&self, rule: u32) -> String {
        match self.rule_ids.infos.get(&rule) {
            Some(info) => {
                let mut info = (**info).clone();
                info.location = None;
                info.to_string()
            }
            None => format!("rule {rule}"),
        }
    }

    /// Returns the warning that no TCP connection from outside can reach the node; `None` if one can.
    fn closed(&self, subject: &Subject) -> Option<Diagnostic> {
        let direction = Direction::Ingress;
        let passes = |entry: &PolicyEntry| {
            matches!(
                Decision::from_u8(entry.decision),
                Decision::Allow | Decision::Inspect
            ) || entry.flags & entry_flags::AUDIT != 0
        };
        let default = subject.table.lookup(direction, identity::ANY, CLASS_ANY)?;
        if passes(default) {
            return None;
        }
        let slots = self.classes.slots();
        let tcp: BTreeSet<Class> = (0..=u16::MAX)
            .map(|port| class_slot(protocol::TCP, port) as usize)
            .filter(|slot| *slot < CLASS_SLOTS)
            .filter_map(|slot| slots.get(slot).copied())
            .collect();
        let own: BTreeSet<Identity> = self
            .subjects
            .iter()
            .flat_map(|subject| subject.endpoints.iter().map(|(_, identity)| *identity))
            .collect();
        let is_open = subject.table.entries.iter().any(|(key, entry)| {
            key.direction == direction as u8
                && passes(entry)
                && !own.contains(&key.identity)
                && (key.class == CLASS_ANY || tcp.contains(&key.class))
        });
        if is_open {
            return None;
        }
        let location: Option<Location> = self
            .rule_ids
            .infos
            .get(&default.rule)
            .and_then(|info| info.location.clone());
        Some(Diagnostic {
            severity: Severity::Warning,
            location: location.unwrap_or_default(),
            message: "no TCP connection from outside can reach this node, SSH included: allow a port from outside, or open \
                      one under [failsafe] inbound"
                .to_owned(),
        })
    }
}
