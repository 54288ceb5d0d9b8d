//! `palisade top`.

use std::time::Duration;

use clap::Args;
use palisade_flowlog::duration;

/// Flags of `palisade top`.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Time between two screens.
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = duration::parse)]
    pub interval: Duration,
    /// Print one screen of 80 columns after one interval, without control sequences.
    #[arg(long)]
    pub once: bool,
}
