//! Changes of the policies by commands: `palisade policy apply`, `confirm`, `cancel`, `rollback`, and the history of the
//! sets that were enforced.
//!
//! [`compare`], [`deadline`], [`history`] and [`plan`] are pure. [`journal`] makes a change of the folder atomic over
//! crashes; [`store`] is the thread that writes, [`queue`] its jobs. [`switch`] is the state, [`control`] the part on
//! the control thread: it enforces the files of a change from memory, and only then are they written into the folder,
//! so a half-written folder is never enforced. [`plan`] says before a change what it would do.

mod compare;
mod control;
mod deadline;
mod disk;
mod history;
mod journal;
mod plan;
mod queue;
mod store;
mod switch;

pub(super) use journal::{Recovered, Texts};
pub(super) use plan::{
    Candidate, PolicyBase, blank_before, changed_files, compile, denied_sessions, differences, rows,
};
pub(super) use queue::Preparation;
pub(super) use store::{Store, StoreEvent, Switch};
pub(super) use switch::Changes;
