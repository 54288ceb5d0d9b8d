//! The compiler. Its input is policies and an inventory, its output a snapshot. A change recompiles only the tables
//! that it affects.
//!
//! Between updates the compiler keeps the identities that each distinct peer selects and, for each subject (endpoints
//! with the same labels, named ports and audit mode), its policy table and the specs that select its endpoints. The
//! cost of a changed file grows with the number of its specs, with the subjects that these specs select, and, if a
//! prefix is new or gone, with the number of distinct peers.
//!
//! [`Compiler::update`] applies changes (`update.rs`). It compiles the dirty subjects (`tables.rs`) from rules whose
//! peers and ports are resolved (`rules.rs`, `ports.rs`), by the order of precedence (`precedence.rs`), and assembles
//! the snapshot (`finish.rs`).

mod addresses;
mod changes;
mod compiler;
mod conflict;
mod default_verdict;
mod finish;
mod l7_policy;
mod learned;
mod learned_index;
mod lockout;
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
pub use compiler::{Compiler, CompilerState, FAILSAFE_FILE, RuleMatch};
pub use conflict::conflicts;
pub(crate) use conflict::possible_conflicts;
pub use learned::LearnedUpdate;
pub use resource_name::{ResourceName, already_there};
pub use spec::FileContent;
