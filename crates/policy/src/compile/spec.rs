//! Specs of policy files, with their peers resolved.

use std::sync::Arc;

use palisade_abi::Direction;
use palisade_model::{
    labels::Labels,
    learned_identities::SelectorNumber,
    rule::{CidrGroup, Policy, PolicyKind, Section, Selector, Spec, Subject as SpecSubject},
};

/// Content of one policy file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FileContent {
    /// Policies, in the order of the file.
    pub policies: Vec<Policy>,
    /// Groups of prefixes.
    pub cidr_groups: Vec<CidrGroup>,
}

/// Key of a spec, by which specs are ordered: policy name, kind, file and position.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct SpecKey {
    pub(super) policy: Arc<str>,
    pub(super) kind: PolicyKind,
    pub(super) file: Arc<str>,
    /// Index of the policy in the file, and of the spec in the policy.
    pub(super) position: (u32, u32),
}

/// A spec with its peers resolved.
#[derive(Clone, Debug)]
pub(super) struct CompiledSpec {
    pub(super) content: Arc<FileContent>,
    /// Index of the policy in the file.
    pub(super) policy: usize,
    pub(super) spec: usize,
    /// Rules by section, in the order of [`Section::ALL`].
    pub(super) sections: [Vec<CompiledRule>; 4],
    /// `toFQDNs` selectors of the egress rules.
    pub(super) selectors: Vec<SelectorNumber>,
    /// Whether a rule has application rules.
    pub(super) has_l7_rules: bool,
    /// Cost of the regular expressions of all http rules, in automaton states.
    pub(super) expressions: usize,
    /// Whether the policy is in audit mode.
    pub(super) audit: bool,
    /// Whether the spec denies by default, by direction; `None` for a direction without rules.
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
pub(super) struct CompiledRule {
    pub(super) id: u32,
    pub(super) peers: CompiledPeers,
}

#[derive(Clone, Debug)]
pub(super) enum CompiledPeers {
    Any,
    None,
    OneOf(Vec<u32>),
}

impl CompiledPeers {
    /// Returns the numbers of the peers in the list; an empty slice for `Any` and `None`.
    pub(super) fn numbers(&self) -> &[u32] {
        match self {
            Self::Any | Self::None => &[],
            Self::OneOf(numbers) => numbers,
        }
    }
}

/// Returns whether a spec selects an endpoint with these labels. `node`: whether the endpoint is the node.
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

/// Returns whether a spec denies by default in a direction; `None` if it has no rules for the direction.
pub(super) fn default_deny(spec: &Spec, direction: Direction) -> Option<bool> {
    let rules = Section::of(direction).map(|section| spec.rules(section).len());
    let denies = match direction {
        Direction::Ingress => spec.default_deny_ingress,
        Direction::Egress => spec.default_deny_egress,
    };
    (rules != [0, 0]).then_some(denies.unwrap_or(true))
}
