//! `-o` of the listings.

use clap::{Args, ValueEnum};

/// Format of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Default)]
pub(crate) enum Output {
    /// Table for reading.
    #[default]
    Table,
    /// JSON for programs.
    Json,
}

/// `-o` of the listings.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct OutputArgs {
    /// Output format.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}
