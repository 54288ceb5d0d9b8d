//! Map of learned addresses.

use palisade_abi::{Identity, LearnedKey};

use crate::{Datapath, MapError};

impl Datapath {
    /// Returns the learned addresses, in no particular order.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn learned(&self) -> Result<Vec<(LearnedKey, Identity)>, MapError> {
        self.learned.entries()
    }

    /// Adds or replaces learned addresses. If the function succeeds, the map has all of them.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be written. Some of the addresses can then be in the map.
    pub fn put_learned(&self, entries: &[(LearnedKey, Identity)]) -> Result<(), MapError> {
        // Most DNS answers have one address, for which a single update is faster than a batch.
        if let [(key, identity)] = entries {
            return self.learned.insert(key, identity);
        }
        self.learned.insert_all(entries)
    }

    /// Removes learned addresses. Keys without an entry are ignored.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be written. Some of the addresses can then be missing in the map.
    pub fn remove_learned(&self, keys: &[LearnedKey]) -> Result<(), MapError> {
        self.learned.remove_all(keys)
    }
}
