//! Verdicts of the compiled table: against the rules themselves, and while the maps change.

mod maps;
mod naive;
mod plans;
mod properties;
mod random;
