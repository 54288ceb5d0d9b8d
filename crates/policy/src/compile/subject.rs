//! Subjects: endpoints that policies cannot distinguish. A subject has a policy table, and the specs that select its
//! endpoints.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use palisade_abi::Identity;
use palisade_model::{
    diagnostic::Diagnostic,
    inventory::NamedPorts,
    labels::Labels,
    rule::{Section, Selector},
    snapshot::Table,
};

use super::{
    learned_index::SubjectNames,
    spec::{CompiledSpec, SpecKey},
    table_rule::{DefaultVerdict, Members, TableRule},
};
use crate::classes::PortSet;

/// Endpoints that policies cannot distinguish.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) labels: Labels,
    pub(super) named_ports: NamedPorts,
    pub(super) audit: bool,
    pub(super) node: bool,
    /// Endpoint numbers with their identities.
    pub(super) endpoints: Vec<(u16, Identity)>,
    pub(super) specs: BTreeMap<SpecKey, AppliedSpec>,
    /// Specs that have stopped selecting the subject since the table was built.
    pub(super) retired: Vec<AppliedSpec>,
    /// Requirements of `fromRequires` and `toRequires` of all specs, by section in the order of [`Section::ALL`].
    pub(super) required: [Selector; 4],
    /// Default verdicts with which the table was built, by direction.
    pub(super) default_verdict: [Option<DefaultVerdict>; 2],
    pub(super) names: SubjectNames,
    pub(super) policy: u32,
    pub(super) table: Arc<Table>,
    /// Result of [`Table::plain`] for the table.
    pub(super) plain: u32,
}

impl Subject {
    /// Recomputes the requirements of the specs. Returns whether all rules of the subject must be resolved again.
    pub(super) fn renew_required(&mut self) -> bool {
        let required = Section::ALL.map(|section| Selector {
            requirements: self
                .specs
                .values()
                .flat_map(|applied| applied.unit.spec().rules(section))
                .flat_map(|rule| &rule.requires)
                .flat_map(|selector| selector.requirements.iter().cloned())
                .collect(),
        });
        let changed = self.required != required;
        self.required = required;
        changed || self.requires_something()
    }

    /// Returns whether any spec has requirements.
    pub(super) fn requires_something(&self) -> bool {
        self.required
            .iter()
            .any(|selector| !selector.requirements.is_empty())
    }

    pub(super) fn applied_specs(&self) -> impl Iterator<Item = (&SpecKey, &AppliedSpec)> {
        self.specs.iter()
    }
}

/// A spec that selects a subject, with its rules resolved for the subject.
#[derive(Clone, Debug)]
pub(super) struct AppliedSpec {
    pub(super) unit: Arc<CompiledSpec>,
    /// Whether `rules` must be resolved again.
    pub(super) stale: bool,
    /// Whether the members of the peers have changed since `rules` were resolved.
    pub(super) regrouped: bool,
    /// Resolved rules by direction.
    pub(super) rules: [Vec<TableRule>; 2],
    /// Port sets retained in [`Classes`](crate::classes::Classes).
    pub(super) sets: Vec<PortSet>,
    /// Warnings by direction.
    pub(super) remarks: [Vec<Diagnostic>; 2],
}

/// Rows of a table that a change can affect.
pub(super) enum DirtyRows {
    Everything,
    Only(BTreeSet<Identity>),
}

impl DirtyRows {
    /// Largest number of rows to rebuild one by one; if more rows change, the whole table is rebuilt.
    const MANY: usize = 64;

    /// Adds the rows of all identities that the rules select.
    pub(super) fn add(&mut self, rules: &[Vec<TableRule>; 2]) {
        for rule in rules.iter().flatten() {
            match &rule.members {
                Members::Any => *self = Self::Everything,
                Members::Of(peers) => {
                    for peer in peers {
                        self.add_identities(peer.members.iter().copied());
                    }
                }
            }
        }
    }

    pub(super) fn add_identities(&mut self, more: impl ExactSizeIterator<Item = Identity>) {
        match self {
            Self::Only(identities) if identities.len() + more.len() <= Self::MANY => identities.extend(more),
            _ => *self = Self::Everything,
        }
    }
}
