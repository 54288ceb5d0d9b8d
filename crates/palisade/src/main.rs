//! `palisade`: the daemon and its command line.
//!
//! Depends on every other crate. The command line is `cli` and `command`, the daemon `daemon` (start at
//! `daemon::startup::run`), the socket between the two `control`, the configuration file `config`.
#![forbid(unsafe_code)]
#![warn(unreachable_pub)]

mod cli;
mod command;
mod config;
mod control;
mod daemon;
mod table;
mod text;
mod trusted_path;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    command::execute(cli::Cli::parse())
}
