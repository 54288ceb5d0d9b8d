//! `palisade`: the daemon and its command line.
//!
//! The command line is in `cli` and `command`, the daemon in `daemon` (entry: `daemon::startup::run`), the socket
//! between the two in `control`, the configuration file in `config`.
#![forbid(unsafe_code)]
#![warn(unreachable_pub)]

mod cli;
mod command;
mod config;
mod control;
mod daemon;
mod doctor;
mod grpc;
mod init;
mod installation;
mod log;
mod pcapng;
mod priority;
mod survey;
mod table;
mod text;
mod trusted_path;

use std::process::ExitCode;

use clap::Parser as _;
use tikv_jemallocator::Jemalloc;

/// Records of requests are freed by other threads than those that allocate them, and glibc's arenas neither do that
/// cheaply nor return such memory. Unused memory goes back to the kernel after ten seconds, also that of idle threads.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

fn main() -> ExitCode {
    command::execute(cli::Cli::parse())
}
