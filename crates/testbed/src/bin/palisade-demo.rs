//! `scripts/demo`: real programs in network namespaces talk or are stopped, as the policies of `config/examples` say.

use std::{
    fs,
    io::IsTerminal,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{Command, ExitCode},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal};
use palisade_testbed::{
    Daemon, Ns, Topology,
    daemon::Settings,
    dns::{Server, dig},
    output,
    server::{Iperf3, Nginx},
    tls::certificate,
    topology::{FAMILIES, Family, WorkloadSpec},
    web::Web,
};
use serde_json::Value;

/// A signal has come: the thread that waits for signals ends the process.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// How long an attempt waits for an answer. What is dropped costs as much.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Who is behind the NIC: name, IPv4, IPv6.
const OUTSIDE: &[(&str, &str, &str)] = &[
    ("internet", "192.0.2.10", "2001:db8:1::10"),
    ("partner", "203.0.113.10", "2001:db8:a::10"),
    ("partner-lab", "203.0.113.66", "2001:db8:a:ff::66"),
    ("blocked", "192.0.2.66", "2001:db8:bad::66"),
    ("resolver", "192.0.2.53", "2001:db8:1::53"),
    ("payments", "198.18.0.10", "2001:db8:b::10"),
    ("tracker", "198.18.0.66", "2001:db8:b::66"),
];

/// What the resolver knows: name, and where it leads.
const NAMES: &[(&str, &str)] = &[("api.pay.example", "payments"), ("tracker.example", "tracker")];

/// The program that tries.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Program {
    Curl(u16),
    /// Asks for a path: method, port, path.
    Http(&'static str, u16, &'static str),
    /// Asks for a page of a server by its name, over TLS.
    Https(u16, &'static str),
    /// Asks for the addresses of a name.
    Dig(&'static str),
    Ping,
    Iperf3,
}

/// What is to come of it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Allowed,
    Denied,
    /// Somebody said no.
    Refused,
    Audited,
}

impl Verdict {
    const fn name(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Denied => "denied",
            Self::Refused => "refused",
            Self::Audited => "audited",
        }
    }
}

use Program::{Curl, Dig, Http, Https, Iperf3 as Iperf, Ping};
use Verdict::{Allowed, Audited, Denied, Refused};

type Attempt = (&'static str, &'static str, Program, Verdict);

/// Who, whom, by what, what is expected.
const ATTEMPTS: &[Attempt] = &[
    ("internet", "frontend", Curl(80), Allowed),
    ("internet", "frontend", Ping, Allowed),
    ("internet", "frontend", Curl(8080), Denied),
    ("internet", "backend", Curl(8080), Denied),
    ("internet", "database", Curl(5432), Denied),
    ("blocked", "frontend", Curl(80), Denied),
    ("blocked", "frontend", Ping, Denied),
    ("frontend", "backend", Curl(8080), Allowed),
    ("frontend", "backend", Curl(9090), Audited),
    ("frontend", "backend", Ping, Denied),
    ("frontend", "database", Curl(5432), Denied),
    ("frontend", "partner", Curl(443), Allowed),
    ("frontend", "partner", Curl(80), Denied),
    ("frontend", "partner-lab", Curl(443), Denied),
    ("frontend", "internet", Curl(443), Denied),
    ("backend", "database", Curl(5432), Allowed),
    ("backend", "database", Ping, Denied),
    ("backend", "internet", Curl(80), Denied),
    ("database", "backend", Curl(8080), Denied),
    ("database", "internet", Ping, Denied),
    ("internet", "node", Curl(22), Allowed),
    ("internet", "node", Curl(80), Denied),
    ("internet", "node", Ping, Allowed),
    ("node", "internet", Curl(443), Allowed),
    ("node", "backend", Curl(8080), Denied),
    ("frontend", "backend", Iperf, Allowed),
];

/// The same, one after the other: what was answered opens the way.
const BY_NAME: &[Attempt] = &[
    ("backend", "payments", Curl(443), Denied),
    ("backend", "resolver", Dig("tracker.example"), Refused),
    ("backend", "tracker", Curl(443), Denied),
    ("backend", "resolver", Dig("api.pay.example"), Allowed),
    ("backend", "payments", Curl(443), Allowed),
    ("backend", "payments", Curl(80), Denied),
    ("frontend", "payments", Curl(443), Denied),
];

/// What is asked for on ports that are open.
const INSIDE: &[Attempt] = &[
    ("frontend", "backend", Http("GET", 8081, "/products/7"), Allowed),
    ("frontend", "backend", Http("GET", 8081, "/admin"), Refused),
    (
        "frontend",
        "backend",
        Http("DELETE", 8081, "/products/7"),
        Refused,
    ),
    (
        "frontend",
        "backend",
        Http("GET", 8081, "/products/../admin"),
        Refused,
    ),
    ("frontend", "partner", Https(8443, "www.partner.example"), Allowed),
    ("frontend", "partner", Https(8443, "tracker.example"), Refused),
];

fn main() -> ExitCode {
    let verbose = match std::env::args().nth(1).as_deref() {
        None => false,
        Some("--verbose") => true,
        Some(other) => {
            eprintln!("demo: {other} is no option of mine; there is --verbose");
            return ExitCode::from(2);
        }
    };
    let outcome = clean_up_on_signals().and_then(|()| demo(verbose));
    while INTERRUPTED.load(Ordering::SeqCst) {
        // whatever came of it: the process ends when everything has been removed
        thread::park();
    }
    match outcome {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ctrl-C and SIGTERM end the demo, but not before everything that it made is gone.
fn clean_up_on_signals() -> Result<()> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    // before any other thread exists, so that all of them leave these signals to the one that waits for them
    set.thread_block()?;
    thread::spawn(move || {
        if let Ok(signal) = set.wait() {
            INTERRUPTED.store(true, Ordering::SeqCst);
            eprintln!("\ndemo: {signal}: cleaning up");
            palisade_testbed::ns::remove_own();
            std::process::exit(128 + signal as i32);
        }
    });
    Ok(())
}

/// How it is written: colours on a terminal, plain text in a log.
struct Style {
    color: bool,
}

impl Style {
    fn paint(&self, code: &str, text: &str) -> String {
        if self.color {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    fn heading(&self, text: &str) {
        println!("\n{}", self.paint("1", text));
    }
}

struct World {
    topology: Topology,
}

impl World {
    fn ns(&self, name: &str) -> &Ns {
        if OUTSIDE.iter().any(|(n, ..)| *n == name) {
            &self.topology.internet
        } else {
            self.topology.ns(name)
        }
    }

    fn addr(&self, name: &str, family: Family) -> Result<IpAddr> {
        Ok(match (OUTSIDE.iter().find(|(n, ..)| *n == name), family) {
            (Some((_, v4, _)), Family::V4) => v4.parse()?,
            (Some((_, _, v6)), Family::V6) => v6.parse()?,
            (None, _) => self.topology.addr(name, family),
        })
    }

    /// The address from which somebody speaks to somebody.
    fn source(&self, from: &str, to: &str, family: Family) -> Result<IpAddr> {
        if from == "node" && self.topology.all().any(|w| w.name == to) {
            return Ok(self.topology.get(to).gateway(family));
        }
        self.addr(from, family)
    }
}

/// The resolver of the internet: unbound, with [`NAMES`].
fn resolver(world: &World) -> Result<Server> {
    let mut records = Vec::new();
    for (name, host) in NAMES {
        for (family, kind) in FAMILIES.into_iter().zip(["A", "AAAA"]) {
            records.push(format!("{name}. 60 IN {kind} {}", world.addr(host, family)?));
        }
    }
    let addresses = [
        world.addr("resolver", Family::V4)?,
        world.addr("resolver", Family::V6)?,
    ];
    let records: Vec<&str> = records.iter().map(String::as_str).collect();
    Server::unbound(world.ns("resolver"), &addresses, &records)
}

/// How many attempts came out differently.
fn demo(verbose: bool) -> Result<usize> {
    let start = Instant::now();
    let style = Style {
        color: std::io::stdout().is_terminal(),
    };
    style.heading("Network namespaces");
    let workload = |name: &str| WorkloadSpec::new(name).namespace("shop").label("app", name);
    let addresses: Vec<&str> = OUTSIDE.iter().flat_map(|(_, v4, v6)| [*v4, *v6]).collect();
    let topology = Topology::new()?
        .workload(workload("frontend"))?
        .workload(workload("backend"))?
        .workload(workload("database").port("sql", "5432/TCP"))?
        .internet_addresses(&addresses)?;
    let world = World { topology };
    draw(&world)?;
    world.topology.meet()?;
    let _servers = [
        Nginx::start(world.ns("frontend"), "frontend", &[80, 8080], 1)?,
        Nginx::start(world.ns("backend"), "backend", &[8080, 8081, 9090], 1)?,
        Nginx::start(world.ns("database"), "database", &[5432], 1)?,
        Nginx::start(world.ns("internet"), "internet", &[80, 443], 1)?,
        Nginx::start(world.ns("node"), "node", &[22, 80], 1)?,
    ];
    let names = certificate(world.topology.dir(), &["www.partner.example"])?;
    let _partner = Web::start(world.ns("partner"), "internet", &[], &[8443], &names)?;
    let _resolver = resolver(&world)?;
    let _iperf = Iperf3::start(world.ns("backend"), 5201)?;

    let policies = examples()?;
    let borrowed: Vec<(&str, &str)> = policies.iter().map(|(n, c)| (n.as_str(), c.as_str())).collect();
    style.heading("Palisade");
    let daemon = Daemon::start(&world.topology, &Settings::default(), &borrowed)?;
    println!(
        "policies   {}",
        policies
            .iter()
            .map(|(n, _)| n.as_str())
            .collect::<Vec<_>>()
            .join("  ")
    );
    let status = daemon.status()?;
    for interface in status["interfaces"].as_array().into_iter().flatten() {
        let text = |key: &str| interface[key].as_str().unwrap_or("-").to_owned();
        println!(
            "attached   {:<14} {:<9} ingress {:<13} egress {}",
            text("name"),
            text("role"),
            text("ingress"),
            text("egress")
        );
    }

    style.heading("Who reaches whom");
    let rows = attempt_all(&world, &daemon)?;
    let mut different = show(&style, ATTEMPTS, &rows);
    style.heading("Where names lead, one attempt after the other");
    let by_name = attempt_in_turn(&world, &daemon, BY_NAME)?;
    different += show(&style, BY_NAME, &by_name);
    style.heading("What is asked for on ports that are open");
    let inside = attempt_in_turn(&world, &daemon, INSIDE)?;
    different += show(&style, INSIDE, &inside);

    style.heading("What was asked: palisade observe --type l7 --last 32");
    print!("{}", daemon.cli(&["observe", "--type", "l7", "--last", "32"])?);
    style.heading("What was seen: palisade observe --verdict DROPPED,AUDIT --last 12");
    print!(
        "{}",
        daemon.cli(&["observe", "--verdict", "DROPPED,AUDIT", "--last", "12"])?
    );
    if verbose {
        style.heading("The daemon's log");
        print!("{}", daemon.log());
    }
    let total = (rows.len() + by_name.len() + inside.len()) * FAMILIES.len();
    println!();
    if different == 0 {
        let ok = style.paint("32", "ok");
        println!(
            "{ok}: {total} attempts, all as the policies say, in {:.1} s",
            start.elapsed().as_secs_f64()
        );
    } else {
        let failed = style.paint("31", "FAILED");
        println!(
            "{failed}: {different} of {total} attempts came out differently\n{}",
            daemon.report()
        );
    }
    Ok(different)
}

/// The files of `config/examples`, by name.
fn examples() -> Result<Vec<(String, String)>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../config/examples");
    let mut policies = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        policies.push((
            name,
            fs::read_to_string(&path).with_context(|| path.display().to_string())?,
        ));
    }
    policies.sort();
    Ok(policies)
}

fn draw(world: &World) -> Result<()> {
    for name in [
        "frontend",
        "backend",
        "database",
        "node",
        "internet",
        "partner",
        "partner-lab",
        "blocked",
        "resolver",
        "payments",
        "tracker",
    ] {
        let (v4, v6) = (world.addr(name, Family::V4)?, world.addr(name, Family::V6)?);
        let place = match world.topology.all().find(|w| w.name == name) {
            Some(workload) => format!("behind {} of the node", workload.interface),
            None if name == "node" => "forwards between all of them".to_owned(),
            None => "behind nic0 of the node".to_owned(),
        };
        println!("{name:<12} {:<13} {:<18} {place}", v4.to_string(), v6.to_string());
    }
    Ok(())
}

/// What came back.
#[derive(Clone, PartialEq, Eq)]
enum Got {
    Nothing,
    /// A refusal in the words of the protocol.
    No,
    /// An answer, and what the program measured or learned.
    Answer(String),
}

/// What came of one attempt in one family.
struct Cell {
    verdict: Verdict,
    measured: String,
    /// Who decided; nobody: no flow was reported.
    deciders: Vec<String>,
}

type Row = [Cell; 2];

fn attempt_all(world: &World, daemon: &Daemon) -> Result<Vec<Row>> {
    let try_both = |a: &Attempt| -> Result<[Got; 2]> {
        Ok([attempt(world, a, Family::V4)?, attempt(world, a, Family::V6)?])
    };
    let mut got: Vec<Option<Result<[Got; 2]>>> = thread::scope(|scope| {
        let running: Vec<_> = ATTEMPTS
            .iter()
            .map(|a| (a.2 != Iperf).then(|| scope.spawn(move || try_both(a))))
            .collect();
        running.into_iter().map(|thread| thread?.join().ok()).collect()
    });
    // alone, so that its figure means something
    for (got, a) in got.iter_mut().zip(ATTEMPTS).filter(|(_, a)| a.2 == Iperf) {
        *got = Some(try_both(a));
    }
    let mut rows = Vec::new();
    for (got, a) in got.into_iter().zip(ATTEMPTS) {
        let [v4, v6] = got.context("an attempt broke off")??;
        rows.push([
            judge(world, daemon, a, Family::V4, v4, 0)?,
            judge(world, daemon, a, Family::V6, v6, 0)?,
        ]);
    }
    Ok(rows)
}

fn attempt_in_turn(world: &World, daemon: &Daemon, attempts: &[Attempt]) -> Result<Vec<Row>> {
    let one = |a: &Attempt, family| -> Result<Cell> {
        let known = flows_of(world, daemon, a, family)?.len();
        let got = attempt(world, a, family)?;
        judge(world, daemon, a, family, got, known)
    };
    let both = |a: &Attempt| -> Result<Row> {
        thread::scope(|scope| {
            let v6 = scope.spawn(|| one(a, Family::V6));
            let v4 = one(a, Family::V4)?;
            Ok([v4, v6.join().ok().context("an attempt broke off")??])
        })
    };
    attempts.iter().map(both).collect()
}

/// What an attempt has shown. `known`: how many flows of its kind there were before.
fn judge(
    world: &World,
    daemon: &Daemon,
    attempt: &Attempt,
    family: Family,
    got: Got,
    known: usize,
) -> Result<Cell> {
    let (audited, deciders) = deciding(world, daemon, attempt, family, known)?;
    let (verdict, measured) = match got {
        Got::Nothing => (Denied, String::new()),
        Got::No => (Refused, String::new()),
        Got::Answer(measured) => (if audited { Audited } else { Allowed }, measured),
    };
    Ok(Cell {
        verdict,
        measured,
        deciders,
    })
}

fn attempt(world: &World, (from, to, program, _): &Attempt, family: Family) -> Result<Got> {
    let (from, to, program) = (*from, *to, *program);
    let ns = world.ns(from);
    let source = world.source(from, to, family)?.to_string();
    let address = world.addr(to, family)?;
    let seconds = PATIENCE.as_secs_f64().to_string();
    let mut command: Command;
    match program {
        Curl(port) => {
            command = ns.command("curl");
            command.args(["-sS", "-m", &seconds, "--interface", &source]);
            command.arg(format!("http://{}/", SocketAddr::new(address, port)));
        }
        Http(method, port, path) => {
            command = ns.command("curl");
            command.args([
                "-sS",
                "-m",
                &seconds,
                "--interface",
                &source,
                "--fail",
                "--path-as-is",
            ]);
            command.args(["-X", method]);
            command.arg(format!("http://{}{path}", SocketAddr::new(address, port)));
        }
        Https(port, name) => {
            command = ns.command("curl");
            // the name in the hello is what counts; whose certificate it is does not
            command.args([
                "-sS",
                "-k",
                "-m",
                &seconds,
                "--interface",
                &source,
                "--connect-to",
            ]);
            command.arg(format!("::{}", SocketAddr::new(address, port)));
            command.arg(format!("https://{name}:{port}/"));
        }
        Dig(name) => {
            let kind = match family {
                Family::V4 => "A",
                Family::V6 => "AAAA",
            };
            let dug = dig(ns, address, &[name, kind])?;
            return Ok(match (dug.status.as_str(), dug.answers.last()) {
                ("NOERROR", Some(address)) => Got::Answer(address.clone()),
                ("", _) => Got::Nothing,
                _ => Got::No,
            });
        }
        Ping => {
            command = ns.command("ping");
            command.args([
                "-n",
                "-c",
                "1",
                "-W",
                &seconds,
                "-I",
                &source,
                &address.to_string(),
            ]);
        }
        Iperf => {
            command = ns.command("iperf3");
            command.args([
                "-c",
                &address.to_string(),
                "-t",
                "1",
                "-J",
                "--connect-timeout",
                "3000",
            ]);
        }
    }
    let out = output(&mut command, PATIENCE + Duration::from_secs(10))?;
    if !out.status.success() {
        // curl(1): 22, the answer is 400 or above; 35, TLS did not come about
        let refused = matches!(program, Http(..) | Https(..)) && matches!(out.status.code(), Some(22 | 35));
        return Ok(if refused { Got::No } else { Got::Nothing });
    }
    let said = String::from_utf8_lossy(&out.stdout);
    let measured = match program {
        Dig(_) => String::new(),
        Curl(_) | Http(..) | Https(..) => {
            let who = if OUTSIDE.iter().any(|(n, ..)| *n == to) {
                "internet"
            } else {
                to
            };
            ensure!(
                said.trim() == format!("hello from {who}"),
                "{from} -> {to}: {said}"
            );
            String::new()
        }
        Ping => {
            let time = said
                .split("time=")
                .nth(1)
                .and_then(|rest| rest.split(" ms").next());
            format!("{} ms", time.unwrap_or("?"))
        }
        Iperf => {
            let report: Value = serde_json::from_str(&said)?;
            if report["error"].is_string() {
                return Ok(Got::Nothing); // it exits with 0 all the same
            }
            let rate = report["end"]["sum_received"]["bits_per_second"]
                .as_f64()
                .unwrap_or(0.0);
            format!("{:.1} Gbit/s", rate / 1e9)
        }
    };
    Ok(Got::Answer(measured))
}

/// Prints the table; how many attempts differ.
fn show(style: &Style, attempts: &[Attempt], rows: &[Row]) -> usize {
    let mut table = vec![["WHO", "WHOM", "BY", "EXPECTED", "IPv4", "IPv6", "DECIDED BY"].map(str::to_owned)];
    let mut as_expected = vec![[true; 2]];
    for ((from, to, program, expected), row) in attempts.iter().zip(rows) {
        let good = row
            .each_ref()
            .map(|cell| cell.verdict == *expected && !cell.deciders.is_empty());
        let cells = row.each_ref().map(|cell| {
            format!("{} {}", cell.verdict.name(), cell.measured)
                .trim_end()
                .to_owned()
        });
        let decided = row.iter().flat_map(|cell| cell.deciders.clone());
        let mut unique: Vec<String> = Vec::new();
        for name in decided {
            if !unique.contains(&name) {
                unique.push(name);
            }
        }
        if unique.is_empty() {
            unique.push("(no flow was reported)".to_owned());
        }
        let by = match program {
            Curl(port) => format!("curl :{port}"),
            Http("GET", port, path) => format!("curl :{port}{path}"),
            Http(method, port, path) => format!("curl -X {method} :{port}{path}"),
            Https(port, name) => format!("curl https://{name}:{port}"),
            Dig(name) => format!("dig {name}"),
            Ping => "ping".to_owned(),
            Iperf => "iperf3 :5201".to_owned(),
        };
        let [v4, v6] = cells;
        let expected = expected.name().to_owned();
        table.push([
            (*from).to_owned(),
            (*to).to_owned(),
            by,
            expected,
            v4,
            v6,
            unique.join(", "),
        ]);
        as_expected.push(good);
    }
    let mut widths = [0; 7];
    for row in &table {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.len());
        }
    }
    for (n, (row, good)) in table.iter().zip(&as_expected).enumerate() {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            let padded = if column + 1 == row.len() {
                cell.clone()
            } else {
                format!("{cell:<width$}  ")
            };
            line.push_str(&match (n, column) {
                (0, _) => style.paint("1", &padded),
                (_, 4 | 5) if !good[column - 4] => style.paint("1;31", &padded),
                (_, 4 | 5) => style.paint(color_of(cell), &padded),
                _ => padded,
            });
        }
        println!("{line}");
    }
    as_expected.iter().flatten().filter(|good| !**good).count()
}

fn color_of(cell: &str) -> &'static str {
    match cell.split(' ').next() {
        Some("allowed") => "32",
        Some("audited") => "33",
        _ => "2",
    }
}

/// The flows of attempts of this kind, so far.
fn flows_of(
    world: &World,
    daemon: &Daemon,
    (from, to, program, _): &Attempt,
    family: Family,
) -> Result<Vec<Value>> {
    let source = world.source(from, to, family)?.to_string();
    let destination = world.addr(to, family)?.to_string();
    let mut filters = vec!["--from-ip".to_owned(), source, "--to-ip".to_owned(), destination];
    let more: &[&str] = match program {
        Curl(port) => &["--type", "policy-verdict", "--to-port", &port.to_string()],
        Iperf => &["--type", "policy-verdict", "--to-port", "5201"],
        Ping => &["--type", "policy-verdict", "--protocol", "icmp"],
        Dig(name) => &["--type", "l7", "--dns-query", &format!("^{name}")],
        Http(method, _, path) => &[
            "--type",
            "l7",
            "--http-method",
            method,
            "--http-path",
            &format!("^{path}$"),
        ],
        Https(_, name) => &["--type", "l7", "--sni", name],
    };
    filters.extend(more.iter().map(|filter| (*filter).to_owned()));
    let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
    daemon.flows(&filters)
}

/// Whether an attempt passed by audit only, and who decided about it, as the daemon's flows say.
fn deciding(
    world: &World,
    daemon: &Daemon,
    attempt: &Attempt,
    family: Family,
    known: usize,
) -> Result<(bool, Vec<String>)> {
    // the flows of the last attempts may still be on their way
    let mut flows = Vec::new();
    for _ in 0..40 {
        flows = flows_of(world, daemon, attempt, family)?;
        flows.drain(..known.min(flows.len()));
        if !flows.is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    let audited = flows.iter().any(|f| f["verdict"] == "AUDIT");
    // where somebody stopped or would have stopped it, that is who decided
    let stopped = |f: &&Value| f["verdict"] == "DROPPED" || f["verdict"] == "AUDIT";
    let relevant: Vec<&Value> = if flows.iter().any(|f| stopped(&f)) {
        flows.iter().filter(stopped).collect()
    } else {
        flows.iter().collect()
    };
    Ok((
        audited,
        relevant.into_iter().map(decision).collect::<Result<_>>()?,
    ))
}

/// `shop/backend (ingress)`; for a default deny, the policies that caused it.
fn decision(flow: &Value) -> Result<String> {
    let direction = flow["traffic_direction"].as_str().unwrap_or("?").to_lowercase();
    let rule = &flow["palisade"]["rule"];
    if rule.is_null() {
        bail!("a flow without a rule: {flow}");
    }
    let policies: Vec<&str> = rule["policies"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    Ok(match (policies.is_empty(), rule["default_deny"] == true) {
        (true, _) => format!("no policy ({direction})"),
        (false, true) => format!("default deny of {} ({direction})", policies.join(" + ")),
        (false, false) => format!("{} ({direction})", policies.join(" + ")),
    })
}
