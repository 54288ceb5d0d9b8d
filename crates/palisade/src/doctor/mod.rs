//! What `palisade doctor` knows about a node ([`facts`]) and what follows from it ([`findings()`]). Pure: facts are
//! collected by `command::doctor`.

mod facts;
mod findings;

pub(crate) use facts::{
    Clock, Configuration, DEFAULT_ATTACHMENT, DaemonState, Directory, Facts, Interface, Limits, Policies,
    Role, Service,
};
pub(crate) use findings::{Finding, Level, findings};
