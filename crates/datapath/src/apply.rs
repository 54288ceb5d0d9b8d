//! Executes the operations of a plan, in order.

use std::collections::HashSet;

use palisade_abi::{Addr, Identity, IpcacheEntry, LearnedKey, PrefixKey};
use palisade_model::op::Op;

use crate::{Datapath, MapError, shares::shares};

/// Error of a plan that was executed only in part. The steps before the failed one have changed the maps.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A map operation failed.
    #[error("step {step} of {steps} ({what}): {source}")]
    Map {
        /// Index of the failed step, from 0.
        step: usize,
        /// Number of steps of the plan.
        steps: usize,
        /// Description of the step.
        what: &'static str,
        /// Cause.
        #[source]
        source: MapError,
    },
    /// A step names a class slot that the map does not have.
    #[error("step {step} of {steps}: there is no class slot {slot}")]
    NoSuchSlot {
        /// Index of the failed step, from 0.
        step: usize,
        /// Number of steps of the plan.
        steps: usize,
        /// Class slot.
        slot: u32,
    },
}

impl ApplyError {
    /// Returns the index of the failed step, from 0.
    #[must_use]
    pub fn step(&self) -> usize {
        match self {
            Self::Map { step, .. } | Self::NoSuchSlot { step, .. } => *step,
        }
    }

    /// Returns the map that is too small for the step; `None` if the error has another cause.
    #[must_use]
    pub fn too_small(&self) -> Option<&str> {
        match self {
            Self::Map { source, .. } => source.too_small(),
            Self::NoSuchSlot { .. } => None,
        }
    }
}

impl Datapath {
    /// Executes a plan. Consecutive steps of one kind for addresses, prefixes or learned addresses are passed to the
    /// kernel together, in their order. After the last step, removes the flows of addresses that have left their
    /// endpoint.
    ///
    /// # Errors
    /// [`ApplyError`] of the first step that fails; later steps are not executed.
    pub fn apply(&self, ops: &[Op]) -> Result<(), ApplyError> {
        let switches = ops.iter().any(|op| matches!(op, Op::EndpointPut(..)));
        if switches {
            self.share_out(ops, false);
        }
        let moved = self.moved(ops).map_err(|source| ApplyError::Map {
            step: 0,
            steps: ops.len(),
            what: "read addresses",
            source,
        })?;
        self.carry_out(ops)?;
        if switches {
            self.share_out(ops, true);
        }
        if !moved.is_empty() {
            let ended = self
                .conntrack()
                .remove_if(|key, _| moved.contains(&(key.endpoint, key.local)), |_, _, _| {});
            ended.map_err(|source| ApplyError::Map {
                step: ops.len(),
                steps: ops.len(),
                what: "end flows of moved addresses",
                source,
            })?;
        }
        Ok(())
    }

    /// Writes the shares of all endpoints that have a policy or get one by `ops`. Endpoints that lose their policy by
    /// `ops` keep their share, unless `leaving` is set.
    fn share_out(&self, ops: &[Op], leaving: bool) {
        let mut endpoints = self.endpoints.with_policy();
        for op in ops {
            if let Op::EndpointPut(endpoint, state) = op {
                if state.policy != 0 {
                    endpoints.insert(*endpoint);
                } else if leaving {
                    endpoints.remove(endpoint);
                }
            }
        }
        if self.shares.present() != endpoints {
            self.shares.cut(&shares(&endpoints, self.sizes));
        }
    }

    /// Returns endpoint and address of each address that leaves its endpoint by `ops`. The flows of such an address
    /// must be removed: for a flow that is in conntrack, the programs do not look up again which endpoint its source
    /// address belongs to.
    fn moved(&self, ops: &[Op]) -> Result<HashSet<(u16, Addr)>, MapError> {
        let mut moved = HashSet::new();
        for op in ops {
            let (addr, after) = match op {
                Op::AddressPut(addr, entry) => (addr, entry.endpoint),
                Op::AddressDelete(addr) => (addr, 0),
                _ => continue,
            };
            if let Some(before) = self.ipcache.get(addr)?
                && before.endpoint != 0
            {
                if before.endpoint == after {
                    moved.remove(&(after, *addr));
                } else {
                    moved.insert((before.endpoint, *addr));
                }
            }
        }
        Ok(moved)
    }

    fn carry_out(&self, ops: &[Op]) -> Result<(), ApplyError> {
        let mut step = 0;
        while step < ops.len() {
            let failed = |source| ApplyError::Map {
                step,
                steps: ops.len(),
                what: describe(&ops[step]),
                source,
            };
            let rest = &ops[step..];
            step += match &ops[step] {
                Op::PolicyPut(entries) => {
                    self.policy.insert_all(entries).map_err(failed)?;
                    1
                }
                Op::PolicyDelete(keys) => {
                    self.policy.remove_all(keys).map_err(failed)?;
                    1
                }
                Op::ClassPut(slots) => {
                    for &(slot, class) in slots {
                        if !self.classes.set(slot, class) {
                            return Err(ApplyError::NoSuchSlot {
                                step,
                                steps: ops.len(),
                                slot,
                            });
                        }
                    }
                    1
                }
                Op::AddressPut(..) => {
                    let entries: Vec<(Addr, IpcacheEntry)> = run(rest, |op| match op {
                        Op::AddressPut(addr, entry) => Some((*addr, *entry)),
                        _ => None,
                    });
                    self.ipcache.insert_all(&entries).map_err(failed)?;
                    entries.len()
                }
                Op::AddressDelete(_) => {
                    let keys: Vec<Addr> = run(rest, |op| match op {
                        Op::AddressDelete(addr) => Some(*addr),
                        _ => None,
                    });
                    self.ipcache.remove_all(&keys).map_err(failed)?;
                    keys.len()
                }
                Op::PrefixPut(..) => {
                    let entries: Vec<(PrefixKey, IpcacheEntry)> = run(rest, |op| match op {
                        Op::PrefixPut(key, entry) => Some((*key, *entry)),
                        _ => None,
                    });
                    self.prefixes.insert_all(&entries).map_err(failed)?;
                    entries.len()
                }
                Op::PrefixDelete(_) => {
                    let keys: Vec<PrefixKey> = run(rest, |op| match op {
                        Op::PrefixDelete(key) => Some(*key),
                        _ => None,
                    });
                    self.prefixes.remove_all(&keys).map_err(failed)?;
                    keys.len()
                }
                Op::LearnedPut(..) => {
                    let entries: Vec<(LearnedKey, Identity)> = run(rest, |op| match op {
                        Op::LearnedPut(key, identity) => Some((*key, *identity)),
                        _ => None,
                    });
                    self.put_learned(&entries).map_err(failed)?;
                    entries.len()
                }
                Op::LearnedDelete(_) => {
                    let keys: Vec<LearnedKey> = run(rest, |op| match op {
                        Op::LearnedDelete(key) => Some(*key),
                        _ => None,
                    });
                    self.remove_learned(&keys).map_err(failed)?;
                    keys.len()
                }
                Op::EndpointPut(endpoint, state) => {
                    self.endpoints.set(*endpoint, *state);
                    1
                }
            };
        }
        Ok(())
    }
}

/// Returns the items that `pick` accepts from the beginning of `ops`, up to the first rejected one.
fn run<T>(ops: &[Op], pick: impl FnMut(&Op) -> Option<T>) -> Vec<T> {
    ops.iter().map_while(pick).collect()
}

fn describe(op: &Op) -> &'static str {
    match op {
        Op::PolicyPut(_) => "write policy entries",
        Op::PolicyDelete(_) => "delete policy entries",
        Op::ClassPut(_) => "write port classes",
        Op::AddressPut(..) => "write addresses",
        Op::AddressDelete(_) => "delete addresses",
        Op::PrefixPut(..) => "write prefixes",
        Op::PrefixDelete(_) => "delete prefixes",
        Op::LearnedPut(..) => "write learned addresses",
        Op::LearnedDelete(_) => "delete learned addresses",
        Op::EndpointPut(..) => "switch an endpoint",
    }
}
