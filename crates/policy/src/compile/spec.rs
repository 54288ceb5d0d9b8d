//! Specs of policy files, with their peers looked up.

use std::sync::Arc;

use palisade_abi::Direction;
use palisade_model::{
    labels::Labels,
    learned_identities::SelectorNumber,
    rule::{CidrGroup, Policy, PolicyKind, Section, Selector, Spec, Subject as SpecSubject},
};

/// What is in one policy file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileContent {
    /// Its policies, in their order.
    pub policies: Vec<Policy>,
    /// Its groups of prefixes.
    pub cidr_groups: Vec<CidrGroup>,
}

/// Where a spec stands; also the order in which rules are considered.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SpecKey {
    pub(super) policy: Arc<str>,
    pub(super) kind: PolicyKind,
    pub(super) file: Arc<str>,
    /// Of the policy in the file, and of the spec in the policy.
    pub(super) position: (u32, u32),
}

/// A spec with its peers looked up.
#[derive(Clone, Debug)]
pub(super) struct CompiledSpec {
    pub(super) content: Arc<FileContent>,
    /// Which policy of the file.
    pub(super) policy: usize,
    pub(super) spec: usize,
    /// By section in the order of [`Section::ALL`].
    pub(super) sections: [Vec<UnitRule>; 4],
    /// The `toFQDNs` selectors of its egress rules.
    pub(super) selectors: Vec<SelectorNumber>,
    /// Whether a rule asks for traffic to be read.
    pub(super) reads: bool,
    /// What the regular expressions of its http rules cost together, in states.
    pub(super) expressions: usize,
    /// The policy is in audit mode.
    pub(super) audit: bool,
    /// By direction: whether it denies by default; none without rules.
    pub(super) denies: [Option<bool>; 2],
    pub(super) subjects: Vec<usize>,
}

impl CompiledSpec {
    pub(super) fn policy(&self) -> &Policy {
        &self.content.policies[self.policy]
    }

    pub(super) fn spec(&self) -> &Spec {
        &self.policy().specs[self.spec]
    }
}

#[derive(Clone, Debug)]
pub(super) struct UnitRule {
    pub(super) id: u32,
    pub(super) peers: UnitPeers,
}

#[derive(Clone, Debug)]
pub(super) enum UnitPeers {
    Any,
    None,
    OneOf(Vec<u32>),
}

/// Whether a spec is about somebody with these labels.
pub(super) fn selects(subject: &SpecSubject, labels: &Labels, node: bool) -> bool {
    let matches = |selector: &Selector| selector.matches(labels);
    match subject {
        SpecSubject::Endpoints(selector) => !node && matches(selector),
        SpecSubject::Node(selector) => node && matches(selector),
    }
}

pub(super) fn spec_keys(file: &str, content: &FileContent) -> Vec<SpecKey> {
    let file: Arc<str> = file.into();
    let mut keys = Vec::new();
    for (policy_at, policy) in content.policies.iter().enumerate() {
        let name: Arc<str> = policy.qualified_name().into();
        for spec_at in 0..policy.specs.len() {
            keys.push(SpecKey {
                policy: Arc::clone(&name),
                kind: policy.kind,
                file: Arc::clone(&file),
                position: (policy_at as u32, spec_at as u32),
            });
        }
    }
    keys
}

/// Whether a spec denies by default in a direction; none if it has no rules for it.
pub(super) fn default_deny(spec: &Spec, direction: Direction) -> Option<bool> {
    let rules = Section::of(direction).map(|section| spec.rules(section).len());
    let denies = match direction {
        Direction::Ingress => spec.default_deny_ingress,
        Direction::Egress => spec.default_deny_egress,
    };
    (rules != [0, 0]).then_some(denies.unwrap_or(true))
}
