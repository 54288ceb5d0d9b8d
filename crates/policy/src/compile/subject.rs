//! Subjects: endpoints that policies cannot tell apart, with the specs that apply to them and their table.

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

/// Endpoints that policies cannot tell apart.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) labels: Labels,
    pub(super) named_ports: NamedPorts,
    pub(super) audit: bool,
    pub(super) node: bool,
    /// Endpoint ids with their identity.
    pub(super) endpoints: Vec<(u16, Identity)>,
    pub(super) specs: BTreeMap<SpecKey, AppliedSpec>,
    /// Specs that do not select it any more, since the table was made.
    pub(super) retired: Vec<AppliedSpec>,
    /// What the specs require of the endpoints that rules select, by section in the order of [`Section::ALL`].
    pub(super) required: [Selector; 4],
    /// For each direction what the table was made with.
    pub(super) default_verdict: [Option<DefaultVerdict>; 2],
    pub(super) names: SubjectNames,
    pub(super) policy: u32,
    pub(super) table: Arc<Table>,
    /// [`Table::plain`] of it.
    pub(super) plain: u32,
}

impl Subject {
    /// Takes down what the specs require now. Returns whether every rule has to be looked at again for it.
    pub(super) fn renew_required(&mut self) -> bool {
        let required = Section::ALL.map(|section| Selector {
            requirements: self
                .specs
                .values()
                .flat_map(|selecting| selecting.unit.spec().rules(section))
                .flat_map(|rule| &rule.requires)
                .flat_map(|selector| selector.requirements.iter().cloned())
                .collect(),
        });
        let changed = self.required != required;
        self.required = required;
        changed || self.requires_something()
    }

    /// Whether any spec has requirements.
    pub(super) fn requires_something(&self) -> bool {
        self.required
            .iter()
            .any(|selector| !selector.requirements.is_empty())
    }

    pub(super) fn selecting(&self) -> impl Iterator<Item = (&SpecKey, &AppliedSpec)> {
        self.specs.iter()
    }
}

/// A spec as it applies to a subject.
#[derive(Clone, Debug)]
pub(super) struct AppliedSpec {
    pub(super) unit: Arc<CompiledSpec>,
    /// Whether `rules` are still to be made from it (they are of before).
    pub(super) stale: bool,
    /// Whether only its peers mean others than when `rules` were made.
    pub(super) regrouped: bool,
    /// By direction.
    pub(super) rules: [Vec<TableRule>; 2],
    /// Port sets held in [`Classes`].
    pub(super) sets: Vec<PortSet>,
    /// By direction.
    pub(super) remarks: [Vec<Diagnostic>; 2],
}

/// The rows of a table that a change may touch.
pub(super) enum DirtyRows {
    Everything,
    Only(BTreeSet<Identity>),
}

impl DirtyRows {
    /// More rows than this are not worth picking out.
    const MANY: usize = 64;

    /// Verdicts change towards whom the rules mean.
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
