//! The FQDN manager: the addresses that endpoints have learned by name, and the map that holds the identities of these
//! addresses.

mod journal;
mod learned_map;
mod manager;
mod prefetch;

pub(super) use learned_map::{IdentityResolver, LearnedMap, Transition};
pub(super) use manager::{Change, ControlRequest, FqdnManager, Policy};
pub(super) use prefetch::{Prefetch, Targets, node_servers};
