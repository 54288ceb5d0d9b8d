//! Captures that are made while the daemon enforces, replayed off-line: the verdicts are those that were enforced.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use palisade_testbed::{
    Daemon, Ns, Outcome,
    daemon::Settings,
    dns::{self, ask, query, rtype},
    ns::wait_until,
    probe::connect,
    process::Process,
    tls::certificate,
    topology::{FAMILIES, Family, INNER, Topology},
    web::{Web, by_name, curl},
};
use palisade_tests::{
    CLOSED, OPEN,
    fixtures::{
        apps::apps,
        dns::{names, resolver, site},
        kafka::{Broker, client as kafka_client},
        python::packages,
    },
    setup::webs,
};
use serde_json::Value;

/// tcpdump on an interface of a namespace.
struct Tcpdump {
    process: Process,
    file: PathBuf,
}

impl Tcpdump {
    fn start(topology: &Topology, ns: &Ns, name: &str) -> Self {
        let file = topology.dir().join(format!("{name}.pcap"));
        let mut command = ns.command("tcpdump");
        command.args([
            "-i",
            INNER,
            "-U",
            "--immediate-mode",
            "-s",
            "0",
            "-Z",
            "root",
            "-w",
        ]);
        command.arg(&file);
        let process = Process::spawn(name, command, topology.dir()).expect("tcpdump");
        wait_until("tcpdump listens", OPEN, || process.log().contains("listening on")).expect("tcpdump");
        Self { process, file }
    }

    /// Ends tcpdump and returns the file.
    fn finish(mut self) -> PathBuf {
        self.process.terminate(OPEN).expect("tcpdump ends");
        self.file
    }
}

/// What is compared of a flow: its kind, verdict, ends, request, and why.
type Key = (u64, String, SocketAddr, SocketAddr, String, String);

fn key(flow: &Value) -> Option<Key> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let ip = |end: &str| flow["IP"][end].as_str()?.parse::<IpAddr>().ok();
    let l4 = ["TCP", "UDP"].iter().find_map(|name| flow["l4"].get(name))?;
    let port = |end: &str| l4[end].as_u64().and_then(|port| u16::try_from(port).ok());
    let kind = flow["event_type"]["type"].as_u64()?;
    // Policy verdicts and requests. Drops and traces accompany them.
    if !matches!(kind, 5 | 129) {
        return None;
    }
    Some((
        kind,
        text(&flow["verdict"]),
        SocketAddr::new(ip("source")?, port("source_port")?),
        SocketAddr::new(ip("destination")?, port("destination_port")?),
        without_latency(&text(&flow["Summary"])),
        format!(
            "{} {}",
            text(&flow["palisade"]["reason"]),
            flow["palisade"]["rule"]["text"]
        ),
    ))
}

/// Returns a summary without the time between request and response, which the capture measures elsewhere.
fn without_latency(summary: &str) -> String {
    let words = summary.split(' ');
    let kept: Vec<&str> = words
        .filter(|word| {
            word.strip_suffix("ms")
                .is_none_or(|number| number.parse::<u64>().is_err())
        })
        .collect();
    kept.join(" ")
}

fn keys<'a>(flows: impl IntoIterator<Item = &'a Value>, of: [IpAddr; 2]) -> BTreeSet<Key> {
    let mine = |key: &Key| of.contains(&key.2.ip()) || of.contains(&key.3.ip());
    flows.into_iter().filter_map(key).filter(mine).collect()
}

/// Replays a capture without the daemon, and compares the result with what the daemon has reported.
#[track_caller]
fn assert_replayed(daemon: &Daemon, file: &Path, client: [IpAddr; 2], at_least: usize) {
    let live = keys(&daemon.flows(&[]).expect("flows"), client);
    let policies = daemon.policies();
    let out = daemon
        .try_cli(&[
            "replay",
            &file.display().to_string(),
            "--policy",
            &policies.display().to_string(),
            "-o",
            "json",
        ])
        .expect("replay");
    let summary = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{summary}");
    let flows: Vec<Value> = String::from_utf8(out.stdout)
        .expect("text")
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["flow"].clone())
        .collect();
    let replayed = keys(&flows, client);
    let missing: Vec<_> = live.difference(&replayed).collect();
    let added: Vec<_> = replayed.difference(&live).collect();
    assert!(
        missing.is_empty() && added.is_empty(),
        "only live: {missing:#?}\nonly replayed: {added:#?}\n{summary}\n{}",
        daemon.report()
    );
    assert!(live.len() >= at_least, "{live:#?}");
}

const WEB: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [all]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}]
      rules:
        http: [{method: GET, path: \"/allowed.*\"}]
  - toEntities: [all]
    toPorts:
    - ports: [{port: \"443\", protocol: TCP}]
      serverNames: [www.allowed.example]
  - toEntities: [all]
    toPorts:
    - ports: [{port: \"8080\", protocol: TCP}]
";

#[test]
fn requests_and_server_names_get_the_verdicts_that_were_enforced() {
    let apps = apps();
    let _servers = webs(&apps, ["internet"], &[80, 8080], &[443]);
    let daemon = apps
        .daemon(&Settings::default(), &[("web.yaml", WEB)])
        .expect("daemon");
    let client = apps.ns("client");
    let dump = Tcpdump::start(&apps.topology, client, "client-web");
    for family in FAMILIES {
        let at = |port| apps.at("internet", family, port);
        let status = |args: &[String]| {
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            curl(client, &args, OPEN).expect("curl").status
        };
        for (path, expected) in [("/allowed", 200), ("/denied", 403), ("/allowed/2", 200)] {
            assert_eq!(status(&[format!("http://{}{path}", at(80))]), expected, "{path}");
        }
        assert_eq!(status(&[format!("http://{}/any", at(8080))]), 200);
        assert_eq!(status(&by_name("www.allowed.example", at(443), "/")), 200);
        assert_eq!(status(&by_name("evil.example", at(443), "/")), 0);
        assert_eq!(connect(client, at(81), CLOSED), Outcome::TimedOut);
    }
    let seen = |flow: &Value| flow["verdict"] == "DROPPED" && flow["l4"]["TCP"]["destination_port"] == 81;
    daemon
        .wait_flows(&["--to-port", "81"], "the last denied packets", |flows| {
            flows.iter().filter(|flow| seen(flow)).count() >= 2
        })
        .expect("flows");
    std::thread::sleep(CLOSED);
    let file = dump.finish();
    assert_replayed(&daemon, &file, apps.both("client"), 16);
}

#[test]
fn http2_gets_the_verdicts_that_were_enforced() {
    let apps = apps();
    let names = certificate(apps.topology.dir(), &["www.allowed.example"]).expect("certificate");
    let web = Web::start_http2(apps.ns("internet"), "nginx", &[80, 8080], &[], &names).expect("nginx");
    let daemon = apps
        .daemon(&Settings::default(), &[("web.yaml", WEB)])
        .expect("daemon");
    let client = apps.ns("client");
    let dump = Tcpdump::start(&apps.topology, client, "client-http2");
    for family in FAMILIES {
        let status = |port: u16, path: &str| {
            let url = format!("http://{}{path}", apps.at("internet", family, port));
            let args = ["--http2-prior-knowledge", &url];
            curl(client, &args, OPEN).expect("curl").status
        };
        // Rules for requests that the proxy does not evaluate are for HTTP/1: the connection is reset.
        assert_eq!(status(80, "/allowed"), 0);
        // Without such rules the connection is not inspected.
        assert_eq!(status(8080, "/any"), 200);
    }
    assert_eq!(web.seen().len(), FAMILIES.len());
    let filters = ["--to-port", "80", "--type", "l7", "--verdict", "DROPPED"];
    daemon
        .wait_flows(&filters, "refused connections", |flows| {
            flows.len() >= FAMILIES.len()
        })
        .expect("flows");
    std::thread::sleep(CLOSED);
    let file = dump.finish();
    assert_replayed(&daemon, &file, apps.both("client"), 6);
}

const TOPICS: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [all]
    toPorts:
    - ports: [{port: \"9092\", protocol: TCP}]
      rules:
        kafka: [{role: produce, topic: orders}, {role: consume, topic: orders}]
";

#[test]
fn kafka_requests_get_the_verdicts_that_were_enforced() {
    packages().expect("the packages");
    let apps = apps();
    let brokers = FAMILIES.map(|family| {
        let at = apps.at("internet", family, 9092);
        let broker = Broker::start(apps.ns("internet"), at, &["orders", "secret"]).expect("broker");
        (at, broker)
    });
    let daemon = apps
        .daemon(&Settings::default(), &[("topics.yaml", TOPICS)])
        .expect("daemon");
    let client = apps.ns("client");
    let dump = Tcpdump::start(&apps.topology, client, "client-kafka");
    for (at, _) in &brokers {
        let ask = |action: &str, topic: &str| {
            kafka_client(client, "confluent", action, *at, topic, "hello").expect("client")
        };
        assert_eq!(ask("produce", "orders"), "ok", "{}", daemon.report());
        assert_eq!(ask("consume", "orders"), "hello", "{}", daemon.report());
        assert_eq!(
            ask("produce", "secret"),
            "TOPIC_AUTHORIZATION_FAILED",
            "{}",
            daemon.report()
        );
    }
    let filters = ["--protocol", "kafka", "--verdict", "DROPPED"];
    daemon
        .wait_flows(&filters, "denied requests", |flows| {
            let secret = |flow: &&Value| flow["l7"]["kafka"]["topic"] == "secret";
            flows.iter().filter(secret).count() >= brokers.len()
        })
        .expect("flows");
    std::thread::sleep(CLOSED);
    let file = dump.finish();
    assert_replayed(&daemon, &file, apps.both("client"), 20);
}

const NAMES: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: \"53\", protocol: ANY}]
      rules:
        dns: [{matchName: www.example}, {matchName: mail.example}]
  - toFQDNs: [{matchName: www.example}]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}]
";

#[test]
fn names_are_learned_from_the_capture_as_they_were_live() {
    let names = names();
    let daemon =
        Daemon::start(&names.topology, &Settings::default(), &[("names.yaml", NAMES)]).expect("daemon");
    let client = names.topology.ns("client");
    let dump = Tcpdump::start(&names.topology, client, "client-names");
    for family in FAMILIES {
        let any: IpAddr = match family {
            Family::V4 => [0; 4].into(),
            Family::V6 => [0; 16].into(),
        };
        let server = SocketAddr::new(resolver(family), dns::PORT);
        let kind = match family {
            Family::V4 => rtype::A,
            Family::V6 => rtype::AAAA,
        };
        let www = SocketAddr::new(site(10, family), 80);
        assert_eq!(connect(client, www, CLOSED), Outcome::TimedOut);
        for name in ["www.example", "mail.example", "evil.example"] {
            let question = query(7, &[(name, kind)]);
            let from = SocketAddr::new(any, 0);
            let reply = ask(client, from, server, &question, Duration::from_secs(1)).expect("ask");
            assert!(!reply.is_empty(), "{name}");
        }
        assert_eq!(connect(client, www, OPEN), Outcome::Open);
    }
    std::thread::sleep(CLOSED);
    let file = dump.finish();
    let addresses = FAMILIES.map(|family| names.topology.addr("client", family));
    assert_replayed(&daemon, &file, addresses, 12);
}
