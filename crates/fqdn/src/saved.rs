//! The form in which learned names survive a restart: one JSON line for each name.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{EndpointId, Millis};

/// A learned name in the saved cache or its journal.
///
/// Times are stored as remaining lifetimes, because the monotonic clock starts again at a reboot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedName {
    /// The endpoint that has learned the name.
    pub endpoint: EndpointId,
    /// The name as text.
    pub name: String,
    /// The addresses of the name.
    pub addresses: Vec<SavedAddress>,
}

/// An address of a [`SavedName`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedAddress {
    /// The address.
    pub ip: IpAddr,
    /// Remaining lifetime, ms; 0 if the address has expired.
    pub left: Millis,
}
