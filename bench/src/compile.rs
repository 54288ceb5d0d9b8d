//! The policy compiler: all policies at once, and one changed file of many.

use std::{net::IpAddr, time::Instant};

use anyhow::{Result, bail};
use palisade_model::{
    inventory::{Endpoint, Inventory, NamedPorts, Options, Peer},
    labels::{Labels, parse_label},
    snapshot::Snapshot,
};
use palisade_policy::{
    compile::{Changes, Compiler, CompilerState, FileContent},
    parse::parse,
    plan::plan,
};

use crate::{
    Effort, memory,
    policies::{APPS, mixed},
    progress,
    report::{Goal, Measure, Plot, Samples, Table, number},
};

/// Number of the [`APPS`] workloads on this node; the others are peers.
const HERE: usize = 50;

/// Returns the inventory of a node with 50 workloads, and 150 elsewhere.
#[must_use]
pub fn inventory() -> Inventory {
    let labels = |n: usize| {
        let text = [
            format!("k8s:app=app-{n}"),
            format!("k8s:tier=tier-{}", n % 4),
            "k8s:io.kubernetes.pod.namespace=default".to_owned(),
        ];
        Labels::new(text.iter().map(|label| parse_label(label)))
    };
    let address = |n: usize| IpAddr::from([10, 0, (n / 200) as u8, (n % 200 + 10) as u8]);
    Inventory {
        options: Options::default(),
        endpoints: (0..HERE)
            .map(|n| Endpoint {
                id: (n + 1) as u16,
                name: format!("app-{n}"),
                namespace: "default".into(),
                labels: labels(n),
                named_ports: NamedPorts::new(),
                addresses: vec![address(n)],
                audit: false,
            })
            .collect(),
        peers: (HERE..APPS)
            .map(|n| Peer {
                name: format!("app-{n}"),
                labels: labels(n),
                named_ports: NamedPorts::new(),
                prefixes: vec![address(n).into()],
            })
            .collect(),
    }
}

/// Parses policy files; an error in one of them is a fault of the benchmark.
pub fn read(files: &[(String, String)]) -> Result<Changes> {
    let mut changes = Changes::default();
    for (name, text) in files {
        let parsed = parse(name, text);
        if parsed.has_errors() {
            bail!("{:?}", parsed.diagnostics);
        }
        let content = FileContent {
            policies: parsed.policies,
            cidr_groups: parsed.cidr_groups,
        };
        changes.files.insert(name.clone(), Some(content));
    }
    Ok(changes)
}

/// Returns a compiler that has compiled all policies.
pub fn full(mut changes: Changes) -> Result<Compiler> {
    changes.inventory = Some(inventory());
    let mut compiler = Compiler::new(&CompilerState::default());
    match compiler.update(changes) {
        Ok(_) => Ok(compiler),
        Err(errors) => bail!("{errors:?}"),
    }
}

/// Runs the measure.
pub fn measure(effort: Effort) -> Result<Measure> {
    const MIB: f64 = 1_048_576.0;
    let sizes: &[usize] = effort.pick(
        &[10, 100, 1_000, 10_000],
        &[10, 30, 100, 300, 1_000, 3_000, 10_000],
    );
    let rounds = effort.pick(3, 9);
    let columns = [
        "policies",
        "read, ms",
        "compile, ms",
        "plan, ms",
        "one file changed: compile, ms",
        "plan, ms",
        "entries",
        "kept, MiB",
        "peak, MiB",
    ];
    let mut table = Table::new("The whole policy path in user space", &columns);
    let mut curves: Vec<_> = [
        "read, ms",
        "compile, ms",
        "one file changed, ms",
        "kept, MiB",
        "peak, MiB",
    ]
    .map(|name| (name.to_owned(), Vec::new()))
    .into();
    let mut last = [f64::NAN; 7];
    for &count in sizes {
        progress(format_args!("compile: {count} policies, {rounds} rounds"));
        let files = mixed(count);
        let [
            mut reading,
            mut compiling,
            mut planning,
            mut changing,
            mut replanning,
        ] = [const { Samples::new() }; 5];
        let mut entries = 0;
        for round in 0..rounds {
            let begin = Instant::now();
            let changes = read(&files)?;
            reading.push(ms(begin));

            let begin = Instant::now();
            let mut compiler = full(changes)?;
            compiling.push(ms(begin));
            let begin = Instant::now();
            let steps = plan(&Snapshot::default(), compiler.snapshot());
            planning.push(ms(begin));
            drop(steps);
            entries = compiler
                .snapshot()
                .tables
                .values()
                .map(|table| table.entries.len())
                .sum();

            // One file gets the text of another one for the same workload, and then its own again.
            let (at, other) = ((round * 7) % count, (round * 7 + APPS) % count);
            for text in [&files[other].1, &files[at].1] {
                let change = read(&[(files[at].0.clone(), text.clone())])?;
                let before = compiler.snapshot().clone();
                let begin = Instant::now();
                if let Err(errors) = compiler.update(change) {
                    bail!("{errors:?}");
                }
                changing.push(ms(begin));
                let begin = Instant::now();
                let steps = plan(&before, compiler.snapshot());
                replanning.push(ms(begin));
                drop(steps);
            }
        }
        let (compiler, kept, peak) = memory::count(|| full(read(&files)?));
        drop(compiler?);
        last = [
            reading.median(),
            compiling.median(),
            planning.median(),
            changing.median(),
            replanning.median(),
            kept / MIB,
            peak / MIB,
        ];
        for (curve, value) in curves.iter_mut().zip(last) {
            curve.1.push((count as f64, value));
        }
        table.row(
            number(count as f64),
            &[
                last[0],
                last[1],
                last[2],
                last[3],
                last[4],
                entries as f64,
                last[5],
                last[6],
            ],
        );
    }
    let reported = |what: &str, measured: String| Goal {
        what: what.into(),
        reach: "reported".into(),
        measured,
        reached: None,
    };
    Ok(Measure {
        name: "compile",
        title: "Full compile",
        method: format!(
            "Policies in a file each (labels, expressions, ports and ranges, prefixes with exceptions, the world, denials) about {APPS} workloads, {HERE} of them on the node. \"Read\" is YAML to rules, \"compile\" is rules to tables, \"plan\" is the list of map operations from one state to the next (at first from nothing); then the same for a change of one of the files. Kept and peak: bytes at the allocator for reading and compiling together. Medians of {rounds} rounds."
        ),
        goals: vec![
            reported(
                "full compile of 10,000 policies",
                format!("{} ms, and {} ms to read them", number(last[1]), number(last[0])),
            ),
            reported(
                "memory for 10,000 policies",
                format!("{} MiB kept, {} MiB at most", number(last[5]), number(last[6])),
            ),
        ],
        tables: vec![table],
        plot: Some(Plot {
            x: "policies",
            y: "ms, MiB",
            curves,
        }),
        notes: Vec::new(),
    })
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
