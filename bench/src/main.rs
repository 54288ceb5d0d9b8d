//! Runs measures and writes the report.

use std::{fs, path::PathBuf, time::SystemTime};

use anyhow::Result;
use clap::Parser;
use palisade_bench::{Effort, forward, machine::Machine, report::Report};
use palisade_flowlog::Timestamp;

/// What the packet path and the policy compiler cost.
#[derive(Parser)]
struct Args {
    /// Fewer and shorter samples, fewer sizes.
    #[arg(long)]
    quick: bool,
    /// Where the report goes: latest.md, latest.json and plots.
    #[arg(long, default_value = "bench/results")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let machine = Machine::here();
    let measures = vec![forward::measure(Effort { quick: args.quick })?];
    let report = Report {
        date: Timestamp::from_system_time(SystemTime::now()).to_string(),
        quick: args.quick,
        machine,
        measures,
    };
    fs::create_dir_all(&args.out)?;
    println!("{}", report.markdown());
    Ok(())
}
