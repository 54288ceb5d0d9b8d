//! Intercepted TLS: handshakes, requests, streams, memory and a large body; against no firewall and against proxies.

use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{
    Effort, progress,
    report::{Goal, Measure, Samples, Table, number},
    tls_path::{CONNECTIONS, H2_CONNECTIONS, OWN, PATTERNS, Path, Purpose, STREAMS, own_name},
    web::{self, Between, DENIED, ITEM, Load},
};

/// Samples of one row, one for each round.
#[derive(Default)]
struct Figures {
    name: String,
    rate: Samples,
    p50: Samples,
    p99: Samples,
}

impl Figures {
    fn of(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::default()
        }
    }

    fn push(&mut self, load: Load) {
        self.rate.push(load.rate);
        self.p50.push(load.p50);
        self.p99.push(load.p99);
    }
}

/// Returns a table without latencies. The first row is the one without a firewall, the second is Palisade's.
fn rates(caption: &str, what: &str, rows: &[Figures]) -> Table {
    let columns = [
        "between client and server",
        what,
        "against none",
        "spread",
        "Palisade against it",
    ];
    let mut table = Table::new(caption, &columns);
    for row in rows {
        let against = row.rate.against(&rows[0].rate);
        let ours = rows[1].rate.against(&row.rate);
        table.row(
            &row.name,
            &[
                row.rate.median(),
                against.median(),
                against.spread(),
                ours.median(),
            ],
        );
    }
    table
}

/// Returns a table with latencies. The first row is the one without a firewall, the second is Palisade's.
fn loads(caption: &str, what: &str, rows: &[Figures]) -> Table {
    let mut table = rates(caption, what, rows);
    let columns = [
        "p50, µs",
        "p99, µs",
        "p99 against none",
        "Palisade's p99 against it",
    ];
    table.columns.extend(columns.map(str::to_owned));
    for (line, row) in table.rows.iter_mut().zip(rows) {
        let figures = [
            row.p50.median(),
            row.p99.median(),
            row.p99.against(&rows[0].p99).median(),
            rows[1].p99.against(&row.p99).median(),
        ];
        line.values
            .extend(figures.map(|value| value.is_finite().then_some(value)));
    }
    table
}

fn reported(what: String, ratio: f64) -> Goal {
    Goal::reported(what, format!("{} ×", number(ratio)))
}

/// Returns what is compared: nothing first, then Palisade. Notes a proxy that cannot be installed.
fn variants(notes: &mut Vec<String>) -> Vec<Between> {
    let mut variants = vec![Between::Nothing, Between::Palisade, Between::Haproxy];
    match web::envoy() {
        Ok(_) => variants.push(Between::Envoy),
        Err(problem) => {
            progress(format_args!(
                "intercept: Envoy cannot be installed and is skipped: {problem:#}"
            ));
            notes.push(format!(
                "**Envoy was not measured**: it cannot be installed here ({problem:#})."
            ));
        }
    }
    variants
}

/// Runs the measure of downloads.
pub fn bodies(effort: Effort) -> Result<Measure> {
    let (starts, rounds) = effort.pick((2, 2), (7, 3));
    let blob: u64 = effort.pick(256 << 20, 1 << 30);
    let mut notes = Vec::new();
    let variants = variants(&mut notes);
    let mut rows: Vec<_> = variants
        .iter()
        .map(|between| Figures::of(between.name()))
        .collect();
    let mut ratios: Vec<_> = variants.iter().map(|_| Samples::new()).collect();
    for start in 1..=starts {
        let path =
            |between: &Between| Path::new(*between, Purpose::Web(blob)).with_context(|| between.name());
        let paths: Vec<_> = variants.iter().map(path).collect::<Result<_>>()?;
        let mut of_start: Vec<_> = variants.iter().map(|_| Samples::new()).collect();
        // The first round warms up.
        for round in 0..=rounds {
            for ((path, row), samples) in paths.iter().zip(&mut rows).zip(&mut of_start) {
                let rate = path.download()? / 1e6;
                if round > 0 {
                    row.rate.push(rate);
                    samples.push(rate);
                }
            }
        }
        for (samples, ratio) in of_start.iter().zip(&mut ratios) {
            ratio.push(of_start[1].against(samples).median());
        }
        progress(format_args!("intercept-bulk: start {start} of {starts}"));
    }
    let mut goals = Vec::new();
    for (at, between) in variants.iter().enumerate() {
        let ratio = rows[1].rate.against(&rows[at].rate).median();
        let what = format!(
            "download of {} MiB through interception, Palisade against {}",
            blob >> 20,
            between.name()
        );
        match between {
            Between::Palisade => {}
            Between::Nothing => goals.push(Goal::at_least(what, 0.6, ratio, " ×")),
            Between::Envoy => goals.push(Goal::at_least(what, 1.0, ratio, " ×")),
            Between::Haproxy | Between::Mitmproxy => goals.push(reported(what, ratio)),
        }
    }
    let mut of_starts = Table::new(
        "Palisade against it, by start of all processes",
        &["between client and server", "median", "spread"],
    );
    for (row, ratio) in rows.iter().zip(&ratios) {
        of_starts.row(&row.name, &[ratio.median(), ratio.spread()]);
    }
    Ok(Measure {
        name: "intercept-bulk",
        title: "A large body through interception",
        method: format!(
            "As \"TLS interception\", with curl, which gets {} MiB by HTTP/1.1. All processes are started {starts} times, because a start has a rate of its own; each time {rounds} rounds with the variants in turn, after one that is not counted.",
            blob >> 20
        ),
        goals,
        tables: vec![rates("Download", "MB/s", &rows), of_starts],
        plot: None,
        notes,
    })
}

/// Runs the measure.
pub fn measure(effort: Effort) -> Result<Measure> {
    let (rounds, seconds) = effort.pick((3, 1), (9, 3));
    let (idle_rounds, idle, busy) = effort.pick((1, 2_000, 200), (3, 2_000, 200));
    // Children inherit the limit.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;

    let mut notes = Vec::new();
    let variants = variants(&mut notes);
    let mut skipped = |what: &str, problem: &anyhow::Error| {
        progress(format_args!("intercept: {what} was not measured: {problem:#}"));
        notes.push(format!("**{what} was not measured**: {problem:#}."));
    };
    progress(format_args!(
        "intercept: {rounds} rounds of {seconds} s, {} variants",
        variants.len()
    ));

    // Before the other rows, and with new processes: memory that a load has left behind would be used again.
    let mut memory = Table::new(
        "Resident memory for a connection",
        &[
            "between client and server",
            "idle, KiB",
            "Palisade against it",
            "busy, KiB",
            "Palisade against it",
        ],
    );
    let mut sizes: Vec<_> = variants
        .iter()
        .map(|_| (Samples::new(), Samples::new()))
        .collect();
    for _ in 0..idle_rounds {
        for (between, (of_idle, of_busy)) in variants.iter().zip(&mut sizes).skip(1) {
            let path = || Path::new(*between, Purpose::Web(64 << 20));
            of_idle.push(path()?.idle_memory(idle)? / 1024.0);
            of_busy.push(path()?.busy_memory(busy)? / 1024.0);
        }
    }
    for (between, (of_idle, of_busy)) in variants.iter().zip(&sizes).skip(1) {
        let figures = [
            of_idle.median(),
            sizes[1].0.against(of_idle).median(),
            of_busy.median(),
            sizes[1].1.against(of_busy).median(),
        ];
        memory.row(own_name(*between), &figures);
    }

    let all = |purpose, variants: &[Between]| -> Result<Vec<Path>> {
        let path = |between: &Between| Path::new(*between, purpose).with_context(|| between.name());
        variants.iter().map(path).collect()
    };
    let paths = all(Purpose::Web(64 << 20), &variants)?;
    let names = Path::new(Between::Palisade, Purpose::NewNames)?;
    let mitmproxy = web::mitmproxy().and_then(|_| Path::new(Between::Mitmproxy, Purpose::Web(1 << 20)));
    let mitmproxy = mitmproxy
        .inspect_err(|problem| skipped("mitmproxy", problem))
        .ok();
    let callers: Vec<Between> = variants
        .iter()
        .copied()
        .filter(|between| *between != Between::Haproxy)
        .collect();
    let callees = web::grpcio().and_then(|_| all(Purpose::Calls, &callers));
    let callees = callees
        .inspect_err(|problem| skipped("gRPC", problem))
        .unwrap_or_default();
    let rows = || -> Vec<Figures> {
        paths
            .iter()
            .map(|path| Figures::of(path.between.name()))
            .collect()
    };
    let (mut requests, mut allowed, mut denied) = (rows(), rows(), rows());
    let mut calls: Vec<_> = callers
        .iter()
        .map(|between| Figures::of(between.name()))
        .collect();
    let mut fresh = [Figures::of("the same name"), Figures::of("new names")];
    requests.extend(mitmproxy.iter().map(|path| Figures::of(path.between.name())));
    let targets: Vec<(&Path, u16)> = paths
        .iter()
        .chain(&mitmproxy)
        .flat_map(|path| path.ports().iter().map(move |port| (path, *port)))
        .collect();
    let mut handshakes: Vec<_> = targets
        .iter()
        .map(|(path, port)| {
            Figures::of(match port {
                &OWN => own_name(path.between),
                _ => path.between.name(),
            })
        })
        .collect();
    let only_rate = |rate: f64| Load {
        rate,
        p50: f64::NAN,
        p99: f64::NAN,
    };
    // The first round warms up.
    for round in 0..=rounds {
        let keep = |row: &mut Figures, load: Load| {
            if round > 0 {
                row.push(load);
            }
        };
        for ((path, port), row) in targets.iter().zip(&mut handshakes) {
            let client = path.client(*port)?;
            let load = client.handshakes(Duration::from_secs(seconds.into()));
            keep(row, load.with_context(|| path.report())?);
        }
        let duration = Duration::from_secs(seconds.into());
        let client = names.client(web::HTTPS)?;
        keep(
            &mut fresh[0],
            client.handshakes(duration).with_context(|| names.report())?,
        );
        keep(
            &mut fresh[1],
            client.new_names(duration).with_context(|| names.report())?,
        );
        for (path, row) in callees.iter().zip(&mut calls) {
            keep(row, only_rate(path.calls(seconds)?));
        }
        for (path, row) in paths.iter().chain(&mitmproxy).zip(&mut requests) {
            keep(row, path.requests(seconds)?);
        }
        for (path, row) in paths.iter().zip(&mut allowed) {
            keep(row, only_rate(path.streams(ITEM, "2xx", seconds)?));
        }
        for (path, row) in paths.iter().zip(&mut denied) {
            let class = match path.between {
                Between::Nothing => "2xx",
                _ => "4xx",
            };
            keep(row, only_rate(path.streams(DENIED, class, seconds)?));
        }
        progress(format_args!("intercept: round {round} of {rounds}"));
    }

    let mut goals = Vec::new();
    for (row, (path, port)) in handshakes.iter().zip(&targets) {
        let ratio = handshakes[1].rate.against(&row.rate).median();
        let what = format!(
            "intercepted handshakes with one GET each, Palisade against {}",
            row.name
        );
        match (path.between, *port) {
            (Between::Palisade, _) => {}
            (Between::Envoy, OWN) => goals.push(Goal::at_least(what, 1.0, ratio, " ×")),
            _ => goals.push(reported(what, ratio)),
        }
    }
    let against = |rows: &[Figures], at: usize| rows[1].rate.against(&rows[at].rate).median();
    let mitmproxy = mitmproxy.map(|path| path.between);
    for (at, between) in variants.iter().chain(&mitmproxy).enumerate() {
        let name = between.name();
        let ratio = against(&requests, at);
        let what = format!("keep-alive requests/s over intercepted TLS, Palisade against {name}");
        let latency = requests[1].p99.against(&requests[at].p99).median();
        match between {
            Between::Palisade => {}
            Between::Nothing | Between::Mitmproxy => goals.push(reported(what, ratio)),
            Between::Envoy | Between::Haproxy => {
                goals.push(Goal::at_least(what, 1.0, ratio, " ×"));
                goals.push(Goal::at_most("the same, p99", 1.0, latency, " ×"));
            }
        }
    }
    for (at, between) in variants.iter().enumerate() {
        let what = format!(
            "HTTP/2 requests/s over intercepted TLS, Palisade against {}",
            between.name()
        );
        let ratio = against(&allowed, at);
        match between {
            Between::Palisade => {}
            Between::Envoy => goals.push(Goal::at_least(what, 1.0, ratio, " ×")),
            Between::Nothing | Between::Haproxy | Between::Mitmproxy => goals.push(reported(what, ratio)),
        }
    }
    if !callees.is_empty() {
        for (at, between) in callers.iter().enumerate().filter(|(at, _)| *at != 1) {
            let what = format!(
                "gRPC unary calls/s over intercepted TLS, Palisade against {}",
                between.name()
            );
            let ratio = against(&calls, at);
            goals.push(if *between == Between::Envoy {
                Goal::at_least(what, 1.0, ratio, " ×")
            } else {
                reported(what, ratio)
            });
        }
    }
    goals.push(Goal::reported(
        "certificates made for new names, with a handshake for each",
        format!("{}/s", number(fresh[1].rate.median())),
    ));
    goals.push(Goal::at_least(
        "HTTP/2 requests/s, denied against allowed, Palisade",
        1.0,
        denied[1].rate.against(&allowed[1].rate).median(),
        " ×",
    ));
    goals.push(Goal::reported(
        "memory for an idle intercepted connection",
        format!("{} KiB", number(sizes[1].0.median())),
    ));
    goals.push(Goal::reported(
        "memory for a busy intercepted connection",
        format!("{} KiB", number(sizes[1].1.median())),
    ));
    let mut made = Table::new(
        "Palisade with an interception CA: full handshakes of TLS 1.3 with one GET each",
        &["certificates", "connections/s", "against the same name"],
    );
    for row in &fresh {
        let ratio = row.rate.against(&fresh[0].rate).median();
        made.row(&row.name, &[row.rate.median(), ratio]);
    }
    let mut tables = vec![
        loads(
            "Full handshakes of TLS 1.3 with one GET each",
            "connections/s",
            &handshakes,
        ),
        made,
        loads("Connections that are kept, HTTP/1.1", "requests/s", &requests),
        rates("HTTP/2, allowed by policy", "requests/s", &allowed),
        rates(
            "HTTP/2, denied by policy (served by the server where there is no firewall)",
            "requests/s",
            &denied,
        ),
    ];
    if !callees.is_empty() {
        tables.push(rates("gRPC, unary calls", "calls/s", &calls));
    }
    tables.push(memory);

    Ok(Measure {
        name: "intercept",
        title: "TLS interception",
        method: format!(
            "A client in a workload, nginx with TLS 1.3 and without session tickets behind the NIC. Palisade intercepts what the workload sends (`terminatingTLS`, `originatingTLS`), with {PATTERNS} patterns of paths, the last of which matches; Envoy (an RBAC filter) and haproxy (a list of `path_reg`) run on the node, with their default number of threads, terminate TLS and open TLS to the server with the client's version of HTTP. The client connects to their address, and to that of the server otherwise; it trusts only the certificate that it should get. Every variant passes an allowed request and refuses another, by HTTP/1.1 and HTTP/2, before it is measured. \"One server connection for each client\" means: without a pool of connections to the server, as Palisade, which keeps the addresses and ports of both ends; otherwise the proxies share their connections among clients and need no handshake with the server. Handshakes: {CONNECTIONS} threads, each of which connects, makes a full handshake of TLS 1.3, gets an item, and reads until the server closes. Requests: wrk, {CONNECTIONS} connections, HTTP/1.1. Streams: h2load, {H2_CONNECTIONS} connections with {STREAMS} streams each. gRPC: as the streams, with POST of a message of 16 bytes, to a server of grpcio, which is the same for all variants and uses most of the CPU time. mitmproxy: reverse mode, an addon with the patterns. New names: an interception CA makes a certificate for the server name of each connection. {rounds} rounds of {seconds} s, the variants in turn. Memory: growth of VmRSS over {idle} idle connections with a request each, and over {busy} connections whose clients have stopped to read a large response, median of {idle_rounds} new processes, without the kernel's memory for sockets."
        ),
        goals,
        tables,
        plot: None,
        notes,
    })
}
