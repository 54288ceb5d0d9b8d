//! Verdicts of the compiled table, compared with the rules themselves, and during changes of the maps.

mod maps;
mod naive;
mod plans;
mod properties;
mod random;
