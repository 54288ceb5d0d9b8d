//! Addresses that endpoints have learned by name.

use palisade_abi::{Identity, LearnedKey};

use crate::{Datapath, MapError};

impl Datapath {
    /// Learned addresses, in no order.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn learned(&self) -> Result<Vec<(LearnedKey, Identity)>, MapError> {
        self.learned.entries()
    }

    /// Adds or replaces learned addresses. All of them are in the map when this returns.
    ///
    /// # Errors
    /// If the map refuses; some may be in it then.
    pub fn put_learned(&self, entries: &[(LearnedKey, Identity)]) -> Result<(), MapError> {
        // The usual answer has one address: a batch call has more to set up.
        if let [(key, identity)] = entries {
            return self.learned.insert(key, identity);
        }
        self.learned.insert_all(entries)
    }

    /// Removes learned addresses; those that are not there are no error.
    ///
    /// # Errors
    /// If the map refuses; some may be gone then.
    pub fn remove_learned(&self, keys: &[LearnedKey]) -> Result<(), MapError> {
        self.learned.remove_all(keys)
    }
}
