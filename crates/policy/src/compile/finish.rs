//! The snapshot of the compiled subjects.

use std::sync::Arc;

use palisade_abi::{EndpointState, endpoint_flags};
use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    rule::Subject as SpecSubject,
    snapshot::Snapshot,
};

use super::compiler::Compiler;

impl Compiler {
    /// Assembles the snapshot from the compiled subjects.
    pub(super) fn finish(&mut self, before: Snapshot) {
        self.finish_names(&before);
        self.snapshot.classes = Arc::clone(self.classes.slots());
        self.snapshot.rules = Arc::clone(&self.rule_ids.infos);
        self.snapshot.rulesets = Arc::clone(&self.rulesets.sets);
        self.snapshot.tables = self
            .subjects
            .iter()
            .map(|subject| (subject.policy, Arc::clone(&subject.table)))
            .collect();
        // If identities of addresses changed, the peer of any flow can have another identity than before, so all flows
        // are evaluated again.
        let moved = !Arc::ptr_eq(&before.addresses, &self.snapshot.addresses)
            || !Arc::ptr_eq(&before.prefixes, &self.snapshot.prefixes);
        // A revision grows in steps of two: a plan can write the number in between first, and raise it once more at its
        // end.
        let revision = before.revision.wrapping_add(2);
        let mut used = false;
        self.snapshot.endpoints = self
            .subjects
            .iter()
            .flat_map(|subject| {
                let policy = subject.policy;
                let flags = if subject.names.selectors.is_empty() {
                    subject.plain
                } else {
                    // Rows of learned identities join the live egress table without a change of flags, and such a row
                    // can inspect or deny explicitly. So an endpoint that learns names never has the flag PLAIN_EGRESS
                    // (no egress entry inspects or denies explicitly).
                    endpoint_flags::LEARNS | (subject.plain & !endpoint_flags::PLAIN_EGRESS)
                };
                subject
                    .endpoints
                    .iter()
                    .map(move |(id, identity)| (*id, policy, *identity, flags))
            })
            .map(|(id, policy, identity, flags)| {
                let known = before.endpoints.get(&id);
                let same_table = || match (before.tables.get(&policy), self.snapshot.tables.get(&policy)) {
                    (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                    _ => false,
                };
                let keep = known.filter(|state| {
                    !moved
                        && state.policy == policy
                        && state.identity == identity
                        && state.flags == flags
                        && same_table()
                });
                let revision = keep.map_or_else(
                    || {
                        used = true;
                        revision
                    },
                    |state| state.revision,
                );
                let state = EndpointState {
                    policy,
                    revision,
                    identity,
                    flags,
                };
                (id, state)
            })
            .collect();
        if used {
            self.snapshot.revision = revision;
        }
        let mut remarks: Vec<Diagnostic> = self
            .subjects
            .iter()
            .flat_map(|subject| subject.specs.values())
            .flat_map(|applied| applied.remarks.iter().flatten().cloned())
            .collect();
        remarks.extend(self.unselected_nodes());
        remarks.extend(self.access_remarks());
        remarks.sort_by(|a, b| (&a.location, &a.message).cmp(&(&b.location, &b.message)));
        remarks.dedup();
        self.snapshot.diagnostics = remarks;
    }

    /// Returns warnings about node policies that do not select this node. This is normal on a node with other labels,
    /// but a typo in a label would leave the node without its policy, and nothing else reports that.
    fn unselected_nodes(&self) -> Vec<Diagnostic> {
        let Some(node) = self
            .inventory
            .endpoints
            .iter()
            .find(|endpoint| endpoint.is_node())
        else {
            return Vec::new();
        };
        let units = self
            .specs
            .values()
            .filter(|unit| unit.subjects.is_empty() && matches!(unit.spec().subject, SpecSubject::Node(_)));
        units
            .map(|unit| Diagnostic {
                severity: Severity::Warning,
                location: unit.spec().location.clone(),
                message: format!(
                    "policy {}: nodeSelector does not select this node, which has the labels {}",
                    unit.policy().qualified_name(),
                    node.labels
                ),
            })
            .collect()
    }
}
