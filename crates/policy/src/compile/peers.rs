//! The identities that each distinct peer of the rules selects.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use palisade_abi::Identity;
use palisade_model::rule::{CidrGroup, Peer};

use super::select::{IdentityIndex, ResolvedSelector};

/// Distinct peers, each with the identities that it selects and the number of its uses in rules.
#[derive(Clone, Debug, Default)]
pub(super) struct PeerCache {
    pub(super) numbers: HashMap<Peer, u32>,
    pub(super) slots: Vec<Option<PeerSlot>>,
    pub(super) free: Vec<u32>,
}

#[derive(Clone, Debug)]
pub(super) struct PeerSlot {
    pub(super) peer: Peer,
    pub(super) resolved: Arc<ResolvedSelector>,
    pub(super) members: Arc<BTreeSet<Identity>>,
    pub(super) users: u32,
}

impl PeerCache {
    pub(super) fn slot(&self, number: u32) -> Option<&PeerSlot> {
        self.slots.get(number as usize).and_then(Option::as_ref)
    }

    /// Counts one more use of a peer. Returns the number of the peer, and whether the peer is new.
    pub(super) fn retain(
        &mut self,
        peer: &Peer,
        groups: &[&CidrGroup],
        index: &IdentityIndex,
    ) -> (u32, bool) {
        if let Some(&number) = self.numbers.get(peer) {
            if let Some(Some(slot)) = self.slots.get_mut(number as usize) {
                slot.users += 1;
            }
            return (number, false);
        }
        let resolved = Arc::new(ResolvedSelector::of(peer, groups));
        let slot = PeerSlot {
            peer: peer.clone(),
            members: Arc::new(index.select(&resolved)),
            resolved,
            users: 1,
        };
        let number = match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = Some(slot);
                number
            }
            None => {
                self.slots.push(Some(slot));
                (self.slots.len() - 1) as u32
            }
        };
        self.numbers.insert(peer.clone(), number);
        (number, true)
    }

    /// Counts one use less of a peer. Removes the peer after its last use, and returns its resolved selector.
    pub(super) fn release(&mut self, number: u32) -> Option<Arc<ResolvedSelector>> {
        let entry = self.slots.get_mut(number as usize)?;
        let slot = entry.as_mut()?;
        slot.users -= 1;
        if slot.users > 0 {
            return None;
        }
        let slot = entry.take()?;
        self.numbers.remove(&slot.peer);
        self.free.push(number);
        Some(slot.resolved)
    }
}
