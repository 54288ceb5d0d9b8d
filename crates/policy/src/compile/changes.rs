//! Changes of the input of the compiler, and the progress of one update.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ipnet::IpNet;
use palisade_abi::Identity;
use palisade_model::inventory::Inventory;

use super::spec::FileContent;

/// Changes of the input since the last [`Compiler::update`](super::Compiler::update).
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// The new inventory, if it has changed.
    pub inventory: Option<Inventory>,
    /// New contents of changed files, by file name; `None` if a file was removed.
    pub files: BTreeMap<String, Option<FileContent>>,
}

/// [`Changes`] with shared contents, so that an update can be rolled back.
pub(super) struct SharedChanges {
    pub(super) inventory: Option<Inventory>,
    pub(super) files: BTreeMap<String, Option<Arc<FileContent>>>,
}

/// Subjects, identities and prefixes that one update affects.
#[derive(Default)]
pub(super) struct Progress {
    /// Subjects to compile again.
    pub(super) dirty: BTreeSet<usize>,
    /// Identities that are new or gone.
    pub(super) moved: BTreeSet<Identity>,
    /// Prefixes that policies start to name (positive) or no longer name (negative) with this update.
    pub(super) prefixes: BTreeMap<IpNet, i8>,
}

impl Progress {
    pub(super) fn prefix(&mut self, prefix: IpNet, step: i8) {
        let sum = self.prefixes.entry(prefix).or_insert(0);
        *sum += step;
        if *sum == 0 {
            self.prefixes.remove(&prefix);
        }
    }
}
