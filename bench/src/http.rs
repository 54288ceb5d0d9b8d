//! HTTP and TLS through policy: requests, new connections, bodies, rule sets; against no firewall and against proxies.

use anyhow::{Context, Result};

use crate::{
    Effort, progress,
    report::{Goal, Measure, Samples, Table, number},
    web::{self, Between, Load, Path},
};

/// Connections that wrk keeps open.
const CONNECTIONS: usize = 16;
/// Patterns in the usual rule set.
const PATTERNS: usize = 10;

/// Loads of one variant, one for each round.
#[derive(Default)]
struct Figures {
    rate: Samples,
    p50: Samples,
    p99: Samples,
}

impl Figures {
    fn push(&mut self, load: Load) {
        self.rate.push(load.rate);
        self.p50.push(load.p50);
        self.p99.push(load.p99);
    }

    fn row(&self, table: &mut Table, name: &str, against: &Self) {
        let rate = self.rate.against(&against.rate);
        table.row(
            name,
            &[
                self.rate.median(),
                rate.median(),
                rate.spread(),
                self.p50.median(),
                self.p50.against(&against.p50).median(),
                self.p99.median(),
                self.p99.against(&against.p99).median(),
            ],
        );
    }
}

/// Loads every variant in turn.
fn rounds(paths: &[Path], rounds: usize, load: impl Fn(&Path) -> Result<Load>) -> Result<Vec<Figures>> {
    let mut figures: Vec<_> = paths.iter().map(|_| Figures::default()).collect();
    for round in 0..=rounds {
        for (path, figures) in paths.iter().zip(&mut figures) {
            let load = load(path)?;
            if round > 0 {
                figures.push(load);
            }
        }
    }
    Ok(figures)
}

fn table(caption: &str, what: &str) -> Table {
    Table::new(
        caption,
        &[
            "between client and server",
            what,
            "against none",
            "spread",
            "p50, µs",
            "against none",
            "p99, µs",
            "against none",
        ],
    )
}

/// Measures requests on persistent and on new connections.
pub fn requests(effort: Effort) -> Result<Measure> {
    let (count, seconds) = effort.pick((3, 1), (9, 3));
    let mut notes = Vec::new();
    let mut variants = vec![Between::Nothing, Between::Palisade];
    match web::envoy() {
        Ok(_) => variants.push(Between::Envoy),
        Err(problem) => notes.push(format!(
            "**Envoy was not measured**: it is not to be had here ({problem:#})."
        )),
    }
    variants.push(Between::Haproxy);
    progress(format_args!(
        "http: {count} rounds of {seconds} s, persistent and new connections, {} variants",
        variants.len()
    ));
    let paths = variants
        .iter()
        .map(|between| Path::new(*between, PATTERNS, 1 << 20).with_context(|| between.name()))
        .collect::<Result<Vec<_>>>()?;
    let kept = rounds(&paths, count, |path| {
        path.load(CONNECTIONS, seconds, false, false)
    })?;
    let new = rounds(&paths, count, |path| path.load(CONNECTIONS, seconds, true, false))?;
    let mut tables = [
        table("Connections that are kept", "requests/s"),
        table("A new connection for each request", "requests/s"),
    ];
    for (table, figures) in tables.iter_mut().zip([&kept, &new]) {
        for (variant, of) in variants.iter().zip(figures) {
            of.row(table, variant.name(), &figures[0]);
        }
    }
    let mut goals = Vec::new();
    let ours = &kept[1];
    for (variant, other) in variants.iter().zip(&kept).skip(2) {
        goals.push(Goal::at_least(
            format!("HTTP keep-alive requests/s, Palisade against {}", variant.name()),
            1.0,
            ours.rate.against(&other.rate).median(),
            " ×",
        ));
        for (what, ours, other) in [("p50", &ours.p50, &other.p50), ("p99", &ours.p99, &other.p99)] {
            goals.push(Goal::at_most(
                format!("the same, {what}"),
                1.0,
                ours.against(other).median(),
                " ×",
            ));
        }
    }
    goals.push(Goal::at_least(
        "HTTP keep-alive requests/s, Palisade against none",
        0.8,
        ours.rate.against(&kept[0].rate).median(),
        " ×",
    ));
    for (variant, other) in variants.iter().zip(&new).skip(2) {
        let what = format!(
            "new HTTP connections/s with one request each, Palisade against {}",
            variant.name()
        );
        let ratio = new[1].rate.against(&other.rate).median();
        goals.push(if *variant == Between::Envoy {
            Goal::at_least(what, 1.0, ratio, " ×")
        } else {
            Goal::reported(what, format!("{} ×", number(ratio)))
        });
    }
    goals.push(Goal::reported(
        "new HTTP connections/s with one request each, Palisade against none",
        format!("{} ×", number(new[1].rate.against(&new[0].rate).median())),
    ));
    Ok(Measure {
        name: "http",
        title: "HTTP through policy",
        method: format!(
            "wrk behind the NIC, with {CONNECTIONS} connections, requests from nginx in a workload. {PATTERNS} patterns of paths, the last of which matches, are in a policy for the server's interface (Palisade), in an RBAC filter (Envoy) and in a list of `path_reg` (haproxy); both proxies run on the node with their default number of threads, and keep their connections to the server open. Each variant passes an allowed path and refuses another before it is measured. {count} rounds of {seconds} s, the variants in turn."
        ),
        goals,
        tables: tables.into(),
        plot: None,
        notes,
    })
}

/// Measures a large body in each direction.
pub fn bodies(effort: Effort) -> Result<Measure> {
    let (count, blob) = effort.pick((5, 256 << 20), (11, 1 << 30));
    progress(format_args!(
        "http-bulk: {count} rounds of {} MiB, both directions",
        blob >> 20
    ));
    let paths = [Between::Nothing, Between::Palisade]
        .map(|between| Path::new(between, PATTERNS, blob).with_context(|| between.name()))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let mut table = Table::new(
        "GB/s",
        &["direction", "no firewall", "Palisade", "against none", "spread"],
    );
    let mut goals = Vec::new();
    let variants = [
        ("download", Path::download as fn(&Path) -> Result<f64>),
        ("upload", Path::upload),
    ];
    for (name, transfer) in variants {
        let [mut none, mut ours] = [const { Samples::new() }; 2];
        for round in 0..=count {
            let speeds = [transfer(&paths[0])?, transfer(&paths[1])?];
            if round > 0 {
                none.push(speeds[0] / 1e9);
                ours.push(speeds[1] / 1e9);
            }
        }
        let against = ours.against(&none);
        table.row(
            name,
            &[none.median(), ours.median(), against.median(), against.spread()],
        );
        goals.push(Goal::at_least(
            format!("{} MiB {name} under an http rule against no firewall", blob >> 20),
            0.9,
            against.median(),
            " ×",
        ));
    }
    Ok(Measure {
        name: "http-bulk",
        title: "Bodies of HTTP through policy",
        method: format!(
            "curl behind the NIC gets a file of {} MiB from nginx in a workload, and sends one to a server that takes it, under an http rule; {count} times each, in turn with a node without a firewall. Rates are curl's.",
            blob >> 20
        ),
        goals,
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}

/// Measures requests under few and many rules.
pub fn rules(effort: Effort) -> Result<Measure> {
    const MANY: usize = 1_000;
    let (count, seconds) = effort.pick((3, 1), (9, 3));
    progress(format_args!(
        "http-rules: {count} rounds of {seconds} s with {PATTERNS} and {MANY} patterns"
    ));
    let paths = [
        Path::new(Between::Nothing, PATTERNS, 1 << 20)?,
        Path::new(Between::Palisade, PATTERNS, 1 << 20)?,
        Path::new(Between::Palisade, MANY, 1 << 20)?,
    ];
    let figures = rounds(&paths, count, |path| {
        path.load(CONNECTIONS, seconds, false, false)
    })?;
    let mut table = table("Connections that are kept", "requests/s");
    let names = ["no firewall", "10 patterns", "1,000 patterns"];
    for (name, of) in names.iter().zip(&figures) {
        of.row(&mut table, name, &figures[0]);
    }
    let slower = figures[1].rate.against(&figures[2].rate).median();
    Ok(Measure {
        name: "http-rules",
        title: "Few and many rules of HTTP",
        method: format!(
            "As \"HTTP through policy\", with {PATTERNS} and with {MANY} patterns of paths, the last of which matches."
        ),
        goals: vec![Goal::at_most(
            "HTTP requests/s, 10 path patterns against 1,000",
            1.5,
            slower,
            " ×",
        )],
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}

/// Measures new TLS connections.
pub fn tls(effort: Effort) -> Result<Measure> {
    let (count, seconds) = effort.pick((5, 1), (11, 3));
    progress(format_args!("tls: {count} rounds of {seconds} s, 2 variants"));
    let paths = [Between::Nothing, Between::Palisade]
        .map(|between| Path::new(between, PATTERNS, 1 << 20).with_context(|| between.name()))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let figures = rounds(&paths, count, |path| path.load(CONNECTIONS, seconds, true, true))?;
    let mut table = table("A new TLS connection for each request", "connections/s");
    for (name, of) in ["no firewall", "Palisade"].iter().zip(&figures) {
        of.row(&mut table, name, &figures[0]);
    }
    Ok(Measure {
        name: "tls",
        title: "TLS server names through policy",
        method: format!(
            "wrk behind the NIC opens connections to nginx in a workload, {CONNECTIONS} at a time, one request on each; the policy names the server name. {count} rounds of {seconds} s, in turn with a node without a firewall."
        ),
        goals: vec![Goal::at_least(
            "new TLS connections/s with serverNames against none",
            0.7,
            figures[1].rate.against(&figures[0].rate).median(),
            " ×",
        )],
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}
