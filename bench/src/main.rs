//! Runs measures and writes the report.

use std::{
    fs,
    path::PathBuf,
    time::{Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use palisade_bench::{
    Effort, bulk, commit, compile, dns, footprint, forward, http, intercept, kafka, latency,
    machine::Machine,
    memory::Counting,
    parsers, program, progress, punt, replay,
    report::{Measure, Report},
    visibility,
};
use palisade_flowlog::Timestamp;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A measure: its name and its function.
type Entry = (&'static str, fn(Effort) -> Result<Measure>);

/// All measures, in the order in which they run.
const MEASURES: &[Entry] = &[
    ("compile", compile::measure),
    ("established", program::established),
    ("new-flow", program::new_flow),
    ("forward", forward::measure),
    ("bulk", bulk::measure),
    ("commit", commit::measure),
    ("parsers", parsers::measure),
    ("footprint", footprint::measure),
    ("punt", punt::measure),
    ("latency", latency::measure),
    ("dns", dns::throughput),
    ("committed", dns::committed),
    ("http", http::requests),
    ("http-bulk", http::bodies),
    ("http-rules", http::rules),
    ("tls", http::tls),
    ("kafka", kafka::measure),
    ("intercept", intercept::measure),
    ("intercept-bulk", intercept::bodies),
    ("visibility", visibility::packets),
    ("visibility-http", visibility::http),
    ("hubble", visibility::api::measure),
    ("soak-flows", visibility::soak::measure),
    ("flow-memory", visibility::memory),
    ("replay", replay::measure),
];

/// What the packet path, inspection and the policy compiler cost.
#[derive(Parser)]
struct Args {
    /// Measures to run; all if none is named
    names: Vec<String>,
    /// Fewer and shorter samples, fewer sizes.
    #[arg(long)]
    quick: bool,
    /// Folder for the report: latest.md, latest.json and plots
    #[arg(long, default_value = "bench/results")]
    out: PathBuf,
    /// Only parses something in memory, to count instructions
    #[arg(long, hide = true)]
    work: Option<String>,
    /// Number of repetitions
    #[arg(long, hide = true, default_value_t = 1)]
    times: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if let Some(work) = &args.work {
        return parsers::repeat(work, args.times);
    }
    let known = || {
        MEASURES
            .iter()
            .map(|(name, _)| *name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    if let Some(name) = args
        .names
        .iter()
        .find(|name| !MEASURES.iter().any(|(known, _)| known == name))
    {
        bail!("no measure is called {name}; there are {}", known());
    }
    let machine = Machine::here();
    progress(format_args!("{machine}"));

    let mut measures = Vec::new();
    for (name, run) in MEASURES {
        if !args.names.is_empty() && !args.names.iter().any(|wanted| wanted == name) {
            continue;
        }
        let begin = Instant::now();
        measures.push(run(Effort { quick: args.quick }).with_context(|| format!("measure {name}"))?);
        progress(format_args!(
            "{name}: done in {:.0} s",
            begin.elapsed().as_secs_f64()
        ));
    }

    let report = Report {
        date: Timestamp::from_system_time(SystemTime::now()).to_string(),
        quick: args.quick,
        machine,
        measures,
    };
    fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    fs::write(args.out.join("latest.md"), report.markdown())?;
    fs::write(
        args.out.join("latest.json"),
        format!("{}\n", serde_json::to_string_pretty(&report)?),
    )?;
    for measure in &report.measures {
        if let Some(plot) = &measure.plot {
            fs::write(args.out.join(format!("{}.svg", measure.name)), plot.svg())?;
        }
    }
    println!("{}", report.markdown());
    Ok(())
}
