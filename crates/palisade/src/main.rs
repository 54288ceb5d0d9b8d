//! `palisade`: the daemon and its command line.
#![forbid(unsafe_code)]

mod cli;
mod command;
mod config;
mod control;
mod daemon;
mod duration;
mod table;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    command::execute(cli::Cli::parse())
}
