//! The FQDN manager: which addresses endpoints have learned by name, and the map that holds their identities.

mod journal;
mod learned_map;
mod manager;
mod prefetch;

pub use learned_map::{IdentityResolver, LearnedMap, Transition};
pub use manager::{ControlRequest, FqdnManager, Policy};
pub use prefetch::{Prefetch, Targets, node_servers};
