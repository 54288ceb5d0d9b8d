//! The form in which a learned name survives a restart: one JSON line of the daemon's journal.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{EndpointId, Millis};

/// What is kept of a name over a restart: a line of the saved cache or of its journal.
///
/// Times are kept as what is left, because clocks do not survive a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedName {
    /// Who learned it.
    pub endpoint: EndpointId,
    /// The name, as people write it.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<SavedAddress>,
}

/// An address of a [`SavedName`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedAddress {
    /// The address.
    pub ip: IpAddr,
    /// Milliseconds until it expires; 0: it has, and lives on because it may be in use.
    pub left: Millis,
}
