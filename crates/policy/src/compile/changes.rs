//! Changes of the input, and what one update has touched.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use ipnet::IpNet;
use palisade_abi::Identity;
use palisade_model::inventory::Inventory;

use super::spec::FileContent;

/// What has changed since the last [`Compiler::update`].
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// The world as it is now, if it has changed.
    pub inventory: Option<Inventory>,
    /// Files as they are now, by name; `None`: the file is gone.
    pub files: BTreeMap<String, Option<FileContent>>,
}

/// [`Changes`], with the contents shared.
pub(super) struct SharedChanges {
    pub(super) inventory: Option<Inventory>,
    pub(super) files: BTreeMap<String, Option<Arc<FileContent>>>,
}

/// What went on during one update.
#[derive(Default)]
pub(super) struct Progress {
    /// Subjects to compile again.
    pub(super) dirty: BTreeSet<usize>,
    /// Identities that came or went.
    pub(super) moved: BTreeSet<Identity>,
    /// Prefixes that policies mention and did not before (or the other way round).
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
