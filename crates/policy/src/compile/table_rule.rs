//! Rules as input for a table: peers are identities, ports are classes.

use std::{collections::BTreeSet, sync::Arc};

use palisade_abi::{Class, Identity};
use palisade_model::learned_identities::SelectorNumber;

use super::{
    l7_policy::L7Policy,
    learned_index::{LearnedIdentity, LearnedRows},
    select::ResolvedSelector,
};
use crate::classes::PortSet;

/// Peers of a rule, resolved to identities.
#[derive(Clone, Debug)]
pub(super) enum Members {
    /// Any peer, even if its identity is in no table.
    Any,
    /// The identities that one of the peers selects.
    Of(Vec<Member>),
}

impl Members {
    /// Returns whether the rule is the one by which the node may always reach its workloads.
    pub(super) fn is_localhost(&self) -> bool {
        matches!(self, Self::Of(peers) if peers.iter().any(|member| member.peer == Member::LOCALHOST))
    }

    /// Returns the members, reduced to the given identities.
    pub(super) fn among(&self, identities: &Arc<BTreeSet<Identity>>) -> Self {
        Self::Of(match self {
            Self::Any => vec![Member {
                peer: Member::ANY,
                members: Arc::clone(identities),
                learned: Learned::Base,
            }],
            Self::Of(peers) => peers
                .iter()
                .map(|peer| Member {
                    peer: peer.peer,
                    members: Arc::new(peer.members.intersection(identities).copied().collect()),
                    learned: Learned::Base,
                })
                .filter(|peer| !peer.members.is_empty())
                .collect(),
        })
    }

    /// Returns the members without the given identities. `Any` cannot exclude identities; [`TableRule::except`] does.
    pub(super) fn without(&self, identities: &BTreeSet<Identity>) -> Self {
        match self {
            Self::Any => Self::Any,
            Self::Of(peers) => Self::Of(
                peers
                    .iter()
                    .map(|peer| Member {
                        members: Arc::new(peer.members.difference(identities).copied().collect()),
                        ..peer.clone()
                    })
                    .collect(),
            ),
        }
    }
}

/// A peer of a rule, resolved to identities.
#[derive(Clone, Debug)]
pub(super) struct Member {
    /// Number of the peer, so that equal peers can be recognised.
    pub(super) peer: u32,
    /// Ordinary identities that the peer selects.
    pub(super) members: Arc<BTreeSet<Identity>>,
    /// Learned identities that the peer selects.
    pub(super) learned: Learned,
}

/// The learned identities that a peer selects.
#[derive(Clone, Debug)]
pub(super) enum Learned {
    /// Learned identities whose base identity the peer selects.
    Base,
    /// Learned identities of a `toFQDNs` selector, and learned identities whose base identity the peer selects.
    Selector(SelectorNumber),
    /// Learned identities that match a label selector, which can require `fqdn` labels.
    Labels(Arc<ResolvedSelector>),
}

impl Member {
    pub(super) fn means(&self, identity: &LearnedIdentity) -> bool {
        match &self.learned {
            Learned::Base => self.members.contains(&identity.base),
            Learned::Selector(selector) => {
                identity.selectors.binary_search(selector).is_ok() || self.members.contains(&identity.base)
            }
            Learned::Labels(resolved) => resolved.matches(&identity.labels),
        }
    }

    /// Number of the peer of the rule by which the node may always reach its workloads.
    pub(super) const LOCALHOST: u32 = u32::MAX;

    /// Number of the peer "any" in rules that were split by identities because peers number a port name differently.
    pub(super) const ANY: u32 = u32::MAX - 1;

    /// Calls `name` with each learned identity of `rows` that the peer selects.
    pub(super) fn name_learned(&self, rows: &LearnedRows, mut name: impl FnMut(Identity)) {
        let mut by_base = || {
            for (base, identities) in &rows.by_base {
                if self.members.contains(base) {
                    identities.iter().for_each(|identity| name(*identity));
                }
            }
        };
        match &self.learned {
            Learned::Base => by_base(),
            Learned::Selector(selector) => {
                by_base();
                let identities = rows.by_selector.get(selector).into_iter().flatten();
                identities.for_each(|identity| name(*identity));
            }
            Learned::Labels(resolved) if !resolved.requires_key(|key| rows.texts.contains(key)) => by_base(),
            Learned::Labels(resolved) => {
                for (number, identity) in &rows.identities {
                    if resolved.matches(&identity.labels) {
                        name(*number);
                    }
                }
            }
        }
    }
}

/// A rule of one direction with peers and ports resolved.
#[derive(Clone, Debug)]
pub(super) struct TableRule {
    pub(super) id: u32,
    /// Whether the rule is a failsafe port, which allows before all other rules.
    pub(super) failsafe: bool,
    pub(super) denies: bool,
    /// Whether the policy is in audit mode.
    pub(super) audit: bool,
    pub(super) auth_required: bool,
    pub(super) members: Members,
    /// Identities to which this rule for any peer does not apply. They have a port of the name that the rule uses, so
    /// separate rules apply to them.
    pub(super) except: Option<Arc<BTreeSet<Identity>>>,
    pub(super) ports: Vec<TablePorts>,
}

impl TableRule {
    /// Returns whether the identity is in `except`: this rule is for any peer, but does not apply to that identity.
    pub(super) fn excepts(&self, identity: Identity) -> bool {
        self.except
            .as_ref()
            .is_some_and(|except| except.contains(&identity))
    }
}

/// Some ports of a rule.
#[derive(Clone, Debug)]
pub(super) struct TablePorts {
    pub(super) set: PortSet,
    /// Classes of the ports; `None` for every class.
    pub(super) classes: Option<Arc<[Class]>>,
    pub(super) l7: Option<Arc<L7Policy>>,
    /// Whether these are the UDP ports with the numbers of TCP ports at which the rule intercepts TLS: they allow nothing,
    /// and QUIC is denied there.
    pub(super) quic: bool,
}

/// Verdict of a direction where no rule matches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct DefaultVerdict {
    pub(super) allow: bool,
    /// Whether nothing is enforced in this direction.
    pub(super) unenforced: bool,
    /// Rule id that names the cause.
    pub(super) rule: u32,
    /// Whether all policies that cause the denial are in audit mode.
    pub(super) audit: bool,
}
