//! The scene of the demo: workloads, hosts and servers, and the attempts of real programs to reach each other, with the
//! outcome that the policies of `config/examples` give them. `scripts/demo` shows the attempts; a test repeats them under
//! policies that were suggested from the recorded flows.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{
    Daemon, Ns, Topology,
    dns::{Server, dig},
    output,
    server::{Iperf3, Nginx},
    tls::certificate,
    topology::{FAMILIES, Family, WorkloadSpec},
    web::Web,
};

/// Timeout of curl and ping. Their attempts take this long if the packets are dropped.
const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(1500);

/// The hosts behind the NIC: name, IPv4 and IPv6 address.
const OUTSIDE: &[(&str, &str, &str)] = &[
    ("internet", "192.0.2.10", "2001:db8:1::10"),
    ("partner", "203.0.113.10", "2001:db8:a::10"),
    ("partner-lab", "203.0.113.66", "2001:db8:a:ff::66"),
    ("blocked", "192.0.2.66", "2001:db8:bad::66"),
    ("resolver", "192.0.2.53", "2001:db8:1::53"),
    ("payments", "198.18.0.10", "2001:db8:b::10"),
    ("tracker", "198.18.0.66", "2001:db8:b::66"),
];

/// The records of the resolver: name, and the host in [`OUTSIDE`] whose addresses the name has.
const NAMES: &[(&str, &str)] = &[("api.pay.example", "payments"), ("tracker.example", "tracker")];

/// The program that makes an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// curl with a port.
    Curl(u16),
    /// curl with method, port and path.
    Http(&'static str, u16, &'static str),
    /// curl over TLS with port and server name.
    Https(u16, &'static str),
    /// dig for the addresses of a name.
    Dig(&'static str),
    /// ping, one request.
    Ping,
    /// iperf3 for a second.
    Iperf3,
}

/// The outcome of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The client received a response.
    Allowed,
    /// The client received nothing.
    Denied,
    /// The client received a refusal: a DNS response without an address (REFUSED), an HTTP status of 400 or above
    /// (403), or a failed TLS handshake.
    Refused,
    /// As [`Verdict::Allowed`], and a flow record has the verdict AUDIT.
    Audited,
}

impl Verdict {
    /// Returns the name, for tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
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

/// An attempt: source, destination, program, expected outcome.
pub type Attempt = (&'static str, &'static str, Program, Verdict);

/// Attempts that run concurrently.
pub const ATTEMPTS: &[Attempt] = &[
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

/// Attempts that run in order, because a DNS answer allows later connections to the addresses in it.
pub const BY_NAME: &[Attempt] = &[
    ("backend", "payments", Curl(443), Denied),
    ("backend", "resolver", Dig("tracker.example"), Refused),
    ("backend", "tracker", Curl(443), Denied),
    ("backend", "resolver", Dig("api.pay.example"), Allowed),
    ("backend", "payments", Curl(443), Allowed),
    ("backend", "payments", Curl(80), Denied),
    ("frontend", "payments", Curl(443), Denied),
];

/// Attempts on ports with HTTP and TLS rules.
pub const INSIDE: &[Attempt] = &[
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

/// The namespaces of the demo.
#[derive(Debug)]
pub struct World {
    /// The node, its workloads, and the internet.
    pub topology: Topology,
}

/// The servers of the demo. Dropping the value ends them.
#[derive(Debug)]
pub struct Servers {
    _nginx: [Nginx; 5],
    _partner: Web,
    _resolver: Server,
    _iperf: Iperf3,
}

impl World {
    /// Creates the namespaces.
    pub fn new() -> Result<Self> {
        let workload = |name: &str| WorkloadSpec::new(name).namespace("shop").label("app", name);
        let addresses: Vec<&str> = OUTSIDE.iter().flat_map(|(_, v4, v6)| [*v4, *v6]).collect();
        let topology = Topology::new()?
            .workload(workload("frontend"))?
            .workload(workload("backend"))?
            .workload(workload("database").port("sql", "5432/TCP"))?
            .internet_addresses(&addresses)?;
        Ok(Self { topology })
    }

    /// Starts the servers.
    pub fn serve(&self) -> Result<Servers> {
        self.topology.meet()?;
        let names = certificate(self.topology.dir(), &["www.partner.example"])?;
        Ok(Servers {
            _nginx: [
                Nginx::start(self.ns("frontend"), "frontend", &[80, 8080], 1)?,
                Nginx::start(self.ns("backend"), "backend", &[8080, 8081, 9090], 1)?,
                Nginx::start(self.ns("database"), "database", &[5432], 1)?,
                Nginx::start(self.ns("internet"), "internet", &[80, 443], 1)?,
                Nginx::start(self.ns("node"), "node", &[22, 80], 1)?,
            ],
            _partner: Web::start(self.ns("partner"), "internet", &[], &[8443], &names)?,
            _resolver: resolver(self)?,
            _iperf: Iperf3::start(self.ns("backend"), 5201)?,
        })
    }

    fn ns(&self, name: &str) -> &Ns {
        if OUTSIDE.iter().any(|(n, ..)| *n == name) {
            &self.topology.internet
        } else {
            self.topology.ns(name)
        }
    }

    /// Returns the address of a workload or a host.
    pub fn addr(&self, name: &str, family: Family) -> Result<IpAddr> {
        Ok(match (OUTSIDE.iter().find(|(n, ..)| *n == name), family) {
            (Some((_, v4, _)), Family::V4) => v4.parse()?,
            (Some((_, _, v6)), Family::V6) => v6.parse()?,
            (None, _) => self.topology.addr(name, family),
        })
    }

    /// Returns the source address of connections from `from` to `to`.
    fn source(&self, from: &str, to: &str, family: Family) -> Result<IpAddr> {
        if from == "node" && self.topology.all().any(|w| w.name == to) {
            return Ok(self.topology.get(to).gateway(family));
        }
        self.addr(from, family)
    }
}

/// Starts the resolver of the internet: unbound, with [`NAMES`].
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

/// Returns names and contents of the files of `config/examples`, sorted by name.
pub fn examples() -> Result<Vec<(String, String)>> {
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

/// The response to an attempt.
#[derive(Clone, PartialEq, Eq)]
enum Got {
    Nothing,
    /// A refusal, see [`Verdict::Refused`].
    No,
    /// A response, with the measurement or the address that the program printed.
    Answer(String),
}

/// The result of one attempt in one address family.
#[derive(Debug)]
pub struct Cell {
    /// The outcome.
    pub verdict: Verdict,
    /// What the program printed: a latency, an address, a rate.
    pub measured: String,
    /// The policies that decided; empty if no flow was reported.
    pub deciders: Vec<String>,
}

/// The results of an attempt over IPv4 and IPv6.
pub type Row = [Cell; 2];

/// Makes the attempts of [`ATTEMPTS`].
pub fn attempt_all(world: &World, daemon: &Daemon) -> Result<Vec<Row>> {
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
    // Run iperf3 alone, so that other attempts do not affect its measurement.
    for (got, a) in got.iter_mut().zip(ATTEMPTS).filter(|(_, a)| a.2 == Iperf) {
        *got = Some(try_both(a));
    }
    let mut rows = Vec::new();
    for (got, a) in got.into_iter().zip(ATTEMPTS) {
        let [v4, v6] = got.context("an attempt broke off")??;
        rows.push([
            cell_of(world, daemon, a, Family::V4, v4, 0)?,
            cell_of(world, daemon, a, Family::V6, v6, 0)?,
        ]);
    }
    Ok(rows)
}

/// Makes attempts one after the other.
pub fn attempt_in_turn(world: &World, daemon: &Daemon, attempts: &[Attempt]) -> Result<Vec<Row>> {
    let one = |a: &Attempt, family| -> Result<Cell> {
        let known = flows_of(world, daemon, a, family)?.len();
        let got = attempt(world, a, family)?;
        cell_of(world, daemon, a, family, got, known)
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

/// Returns the result of an attempt. `known`: number of matching flow records before the attempt.
fn cell_of(
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
    let seconds = ATTEMPT_TIMEOUT.as_secs_f64().to_string();
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
            // The rule is about the server name in the ClientHello, so the certificate is not verified.
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
    let out = output(&mut command, ATTEMPT_TIMEOUT + Duration::from_secs(10))?;
    if !out.status.success() {
        // curl exits with 22 after a status of 400 or above, and with 35 after a failed TLS handshake (curl(1)).
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
                // iperf3 exits with 0 even after an error.
                return Ok(Got::Nothing);
            }
            let rate = report["end"]["sum_received"]["bits_per_second"]
                .as_f64()
                .unwrap_or(0.0);
            format!("{:.1} Gbit/s", rate / 1e9)
        }
    };
    Ok(Got::Answer(measured))
}

/// Returns the flow records so far that match an attempt.
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

/// Returns whether a flow record of an attempt has the verdict AUDIT, and the policies that decided the attempt's
/// verdict. `known`: number of matching flow records before the attempt.
fn deciding(
    world: &World,
    daemon: &Daemon,
    attempt: &Attempt,
    family: Family,
    known: usize,
) -> Result<(bool, Vec<String>)> {
    // Repeat the query: the daemon receives the events of an attempt asynchronously.
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
    // If any flow record has the verdict DROPPED or AUDIT, only the policies of such records decided.
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

/// Returns the policies that decided the verdict in a flow record, with the direction, as text: for example
/// `shop/backend (ingress)`.
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
