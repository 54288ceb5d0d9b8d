//! Clients that attack the flow API, the metrics server and the control socket: others get their answers, the packet path goes
//! on, and memory does not grow.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::{Duration, Instant},
};

use palisade_testbed::{Daemon, daemon::Settings, ns::wait_until, topology::FAMILIES, web::curl};
use palisade_tests::{
    World,
    fixtures::{
        hubble::{call, calls, credentials, replies, socket, start},
        pki::{Authority, Validity},
        python::{self, Script},
    },
    setup::tables,
    world,
};
use serde_json::json;

const LONG: Duration = Duration::from_secs(60);
const FLOW_API: &str = "127.0.0.1:4245";
const METRICS: &str = "127.0.0.1:9965";
const SETTINGS: &str = "[hubble]\nlisten = \"127.0.0.1:4245\"\n[metrics]\nlisten = \"127.0.0.1:9965\"\nhubble = [\"drop\", \"flow\"]\n\
                        [limits]\nflows = 4096\n";

const POLICIES: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: allow-front}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}]
";

const TRAFFIC: &str = "front -> back tcp/80 open
     db -> back tcp/80 drop";

struct Target {
    world: World,
    daemon: Daemon,
    followers: Vec<Script>,
}

impl Target {
    fn start(settings: &Settings) -> Self {
        let world = world();
        let daemon = world
            .daemon(settings.clone(), &[("p.yaml", POLICIES)])
            .unwrap_or_else(|error| panic!("{error:#}"));
        let mut target = Self {
            world,
            daemon,
            followers: Vec::new(),
        };
        for at in [FLOW_API.to_owned(), socket(&target.daemon)] {
            let mut follow = call(
                "f",
                "GetFlows",
                json!({"follow": true, "whitelist": [{"destination_port": ["80"]}]}),
            );
            follow["timeout"] = json!(600);
            let follower = start(target.world.ns("node"), &at, None, &[follow]).expect("a client");
            target.followers.push(follower);
        }
        wait_until("the followers", LONG, || {
            target.world.expect(&target.daemon, TRAFFIC);
            target.heard().iter().all(|heard| *heard > 0)
        })
        .expect("flows");
        target
    }

    /// Returns the number of responses that each follower has got.
    fn heard(&self) -> Vec<usize> {
        let of = |script: &Script| replies(&script.log()).remove("f").unwrap_or_default();
        self.followers
            .iter()
            .map(|script| of(script).responses.len())
            .collect()
    }

    /// Resident memory of the daemon, KiB.
    fn memory(&self) -> u64 {
        let pid = self.daemon.pid().expect("the daemon");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .expect("a line");
        line.split_whitespace()
            .nth(1)
            .and_then(|number| number.parse().ok())
            .expect("a number")
    }

    /// Times until another client has an answer of each server and the followers have a new flow.
    fn times(&self) -> Vec<(&'static str, Duration, bool)> {
        let node = self.world.ns("node");
        let mut times = Vec::new();
        let mut measure = |what, run: &mut dyn FnMut() -> bool| {
            let begun = Instant::now();
            let good = run();
            times.push((what, begun.elapsed(), good));
        };
        measure("status", &mut || self.daemon.cli(&["status"]).is_ok());
        measure("scrape", &mut || {
            let got = curl(node, &[&format!("http://{METRICS}/metrics")], LONG).expect("curl");
            got.status == 200
        });
        for (what, at) in [("tcp", FLOW_API.to_owned()), ("unix", socket(&self.daemon))] {
            measure(what, &mut || {
                let list = [
                    call("s", "ServerStatus", json!({})),
                    call("g", "GetFlows", json!({"number": "1"})),
                ];
                let said = calls(node, &at, None, &list);
                said.is_ok_and(|said| said["s"].code == "OK" && said["g"].code == "OK")
            });
        }
        let before = self.heard();
        measure("packets", &mut || {
            self.world.check(TRAFFIC).is_ok_and(|wrong| wrong.is_empty())
        });
        measure("followers", &mut || {
            wait_until("flows", Duration::from_secs(20), || {
                self.heard().iter().zip(&before).all(|(now, before)| now > before)
            })
            .is_ok()
        });
        times
    }
}

/// Longest time until another client has its answer. It is much longer than the times on an idle machine.
const ANSWER: Duration = Duration::from_secs(10);
/// Most memory that the daemon may need for all attacks, KiB.
const GROWTH: u64 = 96 << 10;

/// Runs attacks one after the other. During each, other clients get their answers, except new ones that are `refused`, flows are
/// followed, and packets pass or are denied as before.
fn withstands(target: &Target, at: &str, attacks: &[&str], refused: &[&str]) {
    let before = target.memory();
    for attack in attacks {
        let script = python::attack(target.world.ns("node"), attack, at, 80, &[]).expect("an attack");
        std::thread::sleep(Duration::from_secs(1));
        for (what, time, good) in target.times() {
            assert!(
                good && time < ANSWER || refused.contains(&what),
                "{attack} at {at}: {what} after {time:?}: {good}\n{}",
                target.daemon.report()
            );
        }
        let memory = target.memory();
        assert!(
            memory < before + GROWTH,
            "{attack} at {at}: {before} -> {memory} KiB"
        );
        script.end().expect("the attack");
    }
    let status = target.daemon.status().expect("status");
    assert_eq!(status["ready"], true, "{status:#}");
}

#[test]
fn floods_and_nonsense_at_the_flow_api_change_nothing_for_others() {
    let target = Target::start(&tables(SETTINGS));
    // Frames that the server must answer or forget, and requests that it must refuse.
    let floods = [
        "settings",
        "deaf-settings",
        "made-resets",
        "rapid",
        "continuation",
        "hpack-bomb",
        "compressed",
        "garbage",
        "unknown",
    ];
    withstands(&target, FLOW_API, &floods, &[]);
}

#[test]
fn a_client_that_takes_all_places_of_the_flow_api_makes_room_for_others() {
    let target = Target::start(&tables(SETTINGS));
    // All clients of the loopback address are one, so only those of the unix socket are others.
    let greedy = [
        "followers",
        "frozen",
        "deaf",
        "watchers",
        "huge",
        "costly-filters",
    ];
    withstands(&target, FLOW_API, &greedy, &["tcp"]);
    withstands(&target, &socket(&target.daemon), &["followers", "watchers"], &[]);
    let cut = target.daemon.status().expect("status")["hubble"]["cut"].as_u64();
    assert!(cut.is_some_and(|cut| cut > 0), "no stream gave way");
}

#[test]
fn attackers_of_the_metrics_server_and_the_control_socket_keep_no_other_client_waiting() {
    let target = Target::start(&tables(SETTINGS));
    withstands(
        &target,
        METRICS,
        &["deaf-scrape", "slow-head", "long-head", "pipelined", "body"],
        &[],
    );
    let control = format!("unix:{}", target.daemon.socket().display());
    withstands(
        &target,
        &control,
        &["half-line", "deaf-observe", "long-line", "nested"],
        &[],
    );
}

#[test]
fn floods_of_handshakes_keep_no_client_of_another_address_out() {
    let world = world();
    let dir = tempfile::tempdir().expect("a folder");
    let ca = Authority::root(dir.path(), "ca").expect("an authority");
    let made = |name: &str| {
        ca.server(name, &[name], Validity::Now, true)
            .expect("a certificate")
    };
    let (own, client) = (made("node1"), made("client"));
    fs::set_permissions(&own.key, fs::Permissions::from_mode(0o600)).expect("private");
    let section = format!(
        "[hubble]\nlisten = \"[::]:4244\"\ntls_certificate = {:?}\ntls_key = {:?}\nclient_ca = {:?}\n",
        own.cert, own.key, ca.cert
    );
    let daemon = world
        .daemon(tables(&section), &[("p.yaml", POLICIES)])
        .unwrap_or_else(|error| panic!("{error:#}"));
    let mine = credentials("node1", &ca.cert, Some((&client.cert, &client.key)));
    for family in FAMILIES {
        let at = world.at("node", family, 4244).to_string();
        let ask = || {
            let list = [call("s", "ServerStatus", json!({}))];
            calls(world.ns("node"), &at, Some(&mine), &list).is_ok_and(|said| said["s"].code == "OK")
        };
        wait_until("the listener", LONG, ask)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
        // The begins of handshakes, held or as many as possible; no TLS at all; no certificate.
        for attack in ["tls-half", "tls-flood", "tls-plain", "tls-full"] {
            let files = [Path::new("node1"), &ca.cert];
            let script = python::attack(world.ns("far"), attack, &at, 80, &files).expect("an attack");
            std::thread::sleep(Duration::from_millis(500));
            for _ in 0..3 {
                let begun = Instant::now();
                assert!(
                    ask() && begun.elapsed() < ANSWER,
                    "{attack} at {at}\n{}",
                    daemon.report()
                );
            }
            script.end().expect("the attack");
            world.expect(&daemon, TRAFFIC);
        }
    }
}
