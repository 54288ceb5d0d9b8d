//! Rules as a table is built from them: peers are identities, ports are classes.

use std::{collections::BTreeSet, sync::Arc};

use palisade_abi::{Class, Identity};
use palisade_model::learned_identities::SelectorNumber;

use super::{
    l7_policy::L7Policy,
    learned_index::{LearnedIdentity, LearnedRows},
    select::ResolvedSelector,
};
use crate::classes::PortSet;

/// Whom a rule is about, looked up.
#[derive(Clone, Debug)]
pub(super) enum Members {
    /// Everybody, known or not.
    Any,
    /// Whom one of its peers means.
    Of(Vec<Member>),
}

impl Members {
    /// Those of the members that are among some identities.
    pub(super) fn among(&self, identities: &Arc<BTreeSet<Identity>>) -> Self {
        Self::Of(match self {
            Self::Any => vec![Member {
                peer: Member::EVERYBODY,
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

    /// The members without some identities. Of everybody these cannot be taken away, see [`TableRule::except`].
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

/// A peer of a rule, looked up.
#[derive(Clone, Debug)]
pub(super) struct Member {
    /// Names the peer, so that equal peers can be recognised.
    pub(super) peer: u32,
    /// The ordinary identities that it means.
    pub(super) members: Arc<BTreeSet<Identity>>,
    /// Which identities of learned addresses it means.
    pub(super) learned: Learned,
}

/// Which identities of learned addresses a peer means.
#[derive(Clone, Debug)]
pub(super) enum Learned {
    /// Those whose base it means.
    Base,
    /// Those of a selector, and those whose base it means.
    Selector(SelectorNumber),
    /// Those that meet the requirements of a label selector; they may ask for names.
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

    /// Who of everybody has a port of some name: stands for everybody where peers are compared.
    pub(super) const EVERYBODY: u32 = u32::MAX - 1;

    /// The same for all that a subject can meet.
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
            Learned::Labels(resolved) if !resolved.asks_for(|key| rows.texts.contains(key)) => by_base(),
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

/// A rule (of one direction) with everything looked up.
#[derive(Clone, Debug)]
pub(super) struct TableRule {
    pub(super) id: u32,
    pub(super) denies: bool,
    /// The policy is in audit mode.
    pub(super) audit: bool,
    pub(super) auth_required: bool,
    pub(super) members: Members,
    /// Of everybody, those that the rule is not about: peers with a port of the name that the rule asks for under
    /// another number, for which there is a rule of its own.
    pub(super) except: Option<Arc<BTreeSet<Identity>>>,
    pub(super) ports: Vec<TablePorts>,
}

impl TableRule {
    /// Whether the rule is not about an identity although it is about everybody.
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
    /// `None`: whatever the class.
    pub(super) classes: Option<Arc<[Class]>>,
    pub(super) l7: Option<Arc<L7Policy>>,
}

/// What holds where no rule matches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct DefaultVerdict {
    pub(super) allow: bool,
    /// Nothing is enforced in this direction.
    pub(super) unenforced: bool,
    /// The id that names the cause.
    pub(super) rule: u32,
    /// All policies that cause the denial are in audit mode.
    pub(super) audit: bool,
}
