//! Mixed traffic for a long time, with a changed policy each second or with `palisade reload` each second too: memory,
//! descriptors and maps of the daemon stay flat, nothing denied passes, nothing allowed is lost. Ordinary runs have ten
//! seconds of reloads only; scripts/soak runs the tests for longer and prints the tables.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    load::{Leak, TcpLoad, UdpLoad},
    topology::{FAMILIES, INNER},
    web::{Web, curl},
};
use palisade_tests::{
    OPEN,
    fixtures::apps::{Loop, apps},
};

const HTTP: u16 = 80;
const TCP: u16 = 7001;
const UDP: u16 = 7002;
const DENIED: u16 = 9;

/// Returns one of several policies with the same effect; prefixes, rules and port classes differ.
fn policy(n: usize) -> String {
    format!(
        "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: soak}}
spec:
  endpointSelector: {{matchLabels: {{app: client}}}}
  egress:
  - toEntities: [all]
    toPorts:
    - ports: [{{port: \"{HTTP}\", protocol: TCP}}]
      rules:
        http: [{{method: GET, path: \"/open\"}}, {{method: GET, path: \"/never{}\"}}]
  - toEntities: [all]
    toPorts:
    - ports: [{{port: \"{TCP}\", endPort: {UDP}, protocol: ANY}}]
  - toCIDR: [198.51.100.{}/32]
    toPorts:
    - ports: [{{port: \"{}\", protocol: TCP}}]
",
        n % 50,
        n % 200,
        4000 + n % 300,
    )
}

struct Sample {
    resident_kib: u64,
    descriptors: usize,
    threads: u64,
    flows: u64,
    policy: u64,
    identities: u64,
}

fn sample(daemon: &Daemon) -> Sample {
    let pid = daemon.pid().expect("the daemon runs");
    let process = fs::read_to_string(format!("/proc/{pid}/status")).expect("/proc");
    let number = |name: &str| {
        let line = process
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_default();
        line.split_whitespace()
            .nth(1)
            .and_then(|n| n.parse().ok())
            .unwrap_or(0)
    };
    let status = daemon.status().expect("status");
    let map = |name: &str| {
        let maps = status["maps"].as_array().map(Vec::as_slice).unwrap_or_default();
        let found = maps.iter().find(|map| map["map"] == name);
        found.and_then(|map| map["entries"].as_u64()).unwrap_or(0)
    };
    Sample {
        resident_kib: number("VmRSS:"),
        descriptors: fs::read_dir(format!("/proc/{pid}/fd")).expect("/proc").count(),
        threads: number("Threads:"),
        flows: status["conntrack"]["entries"].as_u64().unwrap_or(0),
        policy: map("policy"),
        identities: map("ipcache"),
    }
}

/// How long a run is, and how much traffic it has.
struct Run {
    seconds: u64,
    /// Time between two blocks and two datagrams; between two denied packets it is five times as long.
    pace: Duration,
    /// Time between two HTTP requests.
    requests: Duration,
}

/// Returns a number of seconds from the environment.
fn seconds(variable: &str, otherwise: u64) -> u64 {
    let value = std::env::var(variable).ok();
    value.and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Runs traffic of both verdicts, and calls `change` each second with the number of the change, from 1. Returns the samples
/// of the daemon.
fn run(run: &Run, mut change: impl FnMut(&Daemon, usize)) -> Vec<Sample> {
    let apps = apps();
    let daemon = apps
        .daemon(&Settings::default(), &[("soak.yaml", &policy(0))])
        .expect("daemon");
    let _web = Web::start(apps.ns("internet"), "internet", &[HTTP], &[], &apps.certificate).expect("nginx");
    let (client, internet) = (apps.ns("client"), apps.ns("internet"));
    let loads: Vec<_> = FAMILIES
        .iter()
        .map(|&family| {
            let at = |port| apps.at("internet", family, port);
            let source = apps.source("client", "internet", family);
            (
                TcpLoad::start(client, internet, at(TCP), run.pace).expect("tcp"),
                UdpLoad::start(client, internet, at(UDP), run.pace).expect("udp"),
                Leak::start(client, source, (internet, INNER), at(DENIED), 5 * run.pace).expect("leak"),
            )
        })
        .collect();
    // New connections, each with an allowed and a denied request.
    let requests: Vec<_> = FAMILIES
        .iter()
        .map(|&family| {
            let (ns, at, pause) = (client.clone(), apps.at("internet", family, HTTP), run.requests);
            Loop::start(move |n| {
                thread::sleep(pause);
                let path = if n % 2 == 0 { "open" } else { "closed" };
                let status =
                    curl(&ns, &[&format!("http://{at}/{path}")], OPEN).map_or(0, |answer| answer.status);
                (n % 2 == 0, status)
            })
        })
        .collect();
    println!(
        "| s | resident KiB | descriptors | threads | flows | policy entries | identities of addresses |"
    );
    println!("|---|---|---|---|---|---|---|");
    let start = Instant::now();
    let mut samples = Vec::new();
    let mut changes = 0;
    let step = (run.seconds / 20).max(1);
    while start.elapsed().as_secs() < run.seconds {
        let until = start.elapsed() + Duration::from_secs(step);
        while start.elapsed() < until {
            changes += 1;
            let begun = Instant::now();
            change(&daemon, changes);
            thread::sleep(Duration::from_secs(1).saturating_sub(begun.elapsed()));
        }
        let now = sample(&daemon);
        println!(
            "| {} | {} | {} | {} | {} | {} | {} |",
            start.elapsed().as_secs(),
            now.resident_kib,
            now.descriptors,
            now.threads,
            now.flows,
            now.policy,
            now.identities
        );
        samples.push(now);
    }
    let mut answers = [0_usize; 2];
    for results in requests.into_iter().map(Loop::finish) {
        for (allowed, status) in results {
            // nginx has no such file: a response of the server itself, not of Palisade.
            let expected = if allowed { [200, 404] } else { [403, 403] };
            assert!(
                expected.contains(&status),
                "allowed: {allowed}, status {status}\n{}",
                daemon.report()
            );
            answers[usize::from(allowed)] += 1;
        }
    }
    let (mut blocks, mut datagrams, mut denied) = (0, 0, 0);
    for (tcp, udp, leak) in loads {
        let tcp = tcp.finish(OPEN);
        assert!(tcp.whole(), "{tcp:?}");
        blocks += tcp.returned;
        let received = udp.received();
        let udp = udp.finish();
        assert_eq!((udp.lost(), udp.duplicated, udp.changed), (0, 0, 0), "{udp:?}");
        datagrams += received;
        let leak = leak.finish();
        assert_eq!(leak.leaked, 0, "{leak:?}");
        denied += leak.tried;
    }
    println!(
        "\n{blocks} TCP blocks and {datagrams} datagrams echoed, none lost; {} requests answered and {} refused; {denied} \
         denied packets, none passed; {changes} policy changes",
        answers[1], answers[0]
    );
    samples
}

/// Asserts that nothing grows but what fills caches and the flow ring in the first quarter.
#[track_caller]
fn assert_flat(samples: &[Sample]) {
    let (settled, end) = (&samples[samples.len() / 4], &samples[samples.len() - 1]);
    assert!(end.descriptors <= settled.descriptors + 4, "descriptors grow");
    assert!(end.policy <= settled.policy + 16, "policy entries grow");
    assert!(end.identities <= settled.identities + 16, "addresses grow");
    assert!(
        end.resident_kib <= settled.resident_kib + settled.resident_kib / 4,
        "memory grows: {} to {} KiB",
        settled.resident_kib,
        end.resident_kib
    );
}

#[test]
#[ignore = "runs for minutes: scripts/soak"]
fn memory_descriptors_and_maps_stay_flat_under_mixed_traffic() {
    let samples = run(
        &Run {
            seconds: seconds("PALISADE_SOAK", 600),
            pace: Duration::from_millis(4),
            requests: Duration::from_millis(100),
        },
        |daemon, n| daemon.write("soak.yaml", &policy(n)).expect("policy"),
    );
    assert_flat(&samples);
}

/// PALISADE_RELOADS seconds, 10 without it. Few packets, so that hours of it do not need a CPU.
#[test]
fn a_changed_policy_and_a_reload_each_second_lose_nothing_and_leak_nothing() {
    let seconds = seconds("PALISADE_RELOADS", 10);
    let (mut longest, mut all) = (Duration::ZERO, Duration::ZERO);
    let mut last = 0;
    let samples = run(
        &Run {
            seconds,
            pace: Duration::from_millis(20),
            requests: Duration::from_secs(1),
        },
        |daemon, n| {
            daemon.write("soak.yaml", &policy(n)).expect("policy");
            let begun = Instant::now();
            daemon
                .cli(&["reload"])
                .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
            longest = longest.max(begun.elapsed());
            all += begun.elapsed();
            last = n;
        },
    );
    println!(
        "{last} times palisade reload: {:?} on average, the longest {longest:?}",
        all / u32::try_from(last).unwrap_or(1)
    );
    // A short run is over before the caches are full.
    if seconds >= 600 {
        assert_flat(&samples);
    }
}
