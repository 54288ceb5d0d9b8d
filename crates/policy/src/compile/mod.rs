//! Policies and a world to what the maps hold; a change recompiles only what it touches.
//!
//! What is kept between changes: for each peer of a rule the identities it means; for each subject (a set of
//! labels that an endpoint has, with its named ports) the specs that select it and its table. A changed file
//! costs its own specs, the subjects they select, and a look at the peers if a prefix appears or goes.

mod addresses;
mod changes;
mod compiler;
mod conflict;
mod default_verdict;
mod finish;
mod l7_policy;
mod learned;
mod learned_index;
mod named_ports;
mod named_prefixes;
mod numbers;
mod peers;
mod ports;
mod precedence;
mod resource_name;
mod resources;
mod rules;
mod select;
mod spec;
mod subject;
mod table_rule;
mod tables;
mod update;

pub use addresses::prefix_key;
pub use changes::Changes;
pub use compiler::{Compiler, CompilerState};
pub use conflict::conflicts;
pub(crate) use conflict::possible_conflicts;
pub use learned::LearnedUpdate;
pub use resource_name::{ResourceName, already_there};
pub use spec::FileContent;
