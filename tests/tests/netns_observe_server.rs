//! `palisade observe --server` and `palisade list`: the flow API, read by Palisade's own command line from another machine.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use palisade_testbed::{
    Daemon, Ns,
    ns::wait_until,
    output,
    process::Process,
    topology::{FAMILIES, Family},
};
use palisade_tests::{
    World,
    fixtures::{
        back::{FROM_FRONT, ONLY_FRONT},
        hubble::socket,
        pki::{Authority, Validity},
    },
    setup::tables,
    world,
};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(60);

/// A command of `palisade` in a network namespace, without a configuration.
fn palisade(daemon: &Daemon, ns: &Ns, args: &[&str]) -> Command {
    let mut command = ns.command(daemon.command(&[]).get_program());
    command.args(args);
    command
}

fn run(daemon: &Daemon, ns: &Ns, args: &[&str]) -> Output {
    output(&mut palisade(daemon, ns, args), LONG).expect("palisade")
}

/// The flows that a command prints as JSON.
#[track_caller]
fn flows(out: &Output) -> Vec<Value> {
    assert!(out.status.success(), "{}", said(out));
    let text = String::from_utf8_lossy(&out.stdout);
    let line = |line: &str| serde_json::from_str::<Value>(line).expect("JSON")["flow"].clone();
    text.lines().map(line).collect()
}

fn uuids(flows: &[Value]) -> Vec<&str> {
    flows.iter().filter_map(|flow| flow["uuid"].as_str()).collect()
}

fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn started(world: &World, section: &str) -> Daemon {
    let daemon = world
        .daemon(tables(section), &[("front.yaml", FROM_FRONT)])
        .expect("daemon");
    world.expect(&daemon, ONLY_FRONT);
    daemon
}

#[test]
fn flows_of_another_node_are_those_that_it_shows_itself() {
    let world = world();
    let dir = tempfile::tempdir().expect("a directory");
    let ca = Authority::root(dir.path(), "ca").expect("an authority");
    let other = Authority::root(dir.path(), "other").expect("an authority");
    let certificate = |name: &str| {
        let made = ca
            .server(name, &[name], Validity::Now, true)
            .expect("a certificate");
        fs::set_permissions(&made.key, fs::Permissions::from_mode(0o600)).expect("private");
        made
    };
    let (node, client) = (certificate("node1"), certificate("client"));
    let daemon = started(
        &world,
        &format!(
            "[hubble]\nlisten = \"[::]:4244\"\ntls_certificate = {:?}\ntls_key = {:?}\nclient_ca = {:?}\n",
            node.cert, node.key, ca.cert
        ),
    );
    let far = world.ns("far");
    let text = |path: &Path| path.to_str().expect("text").to_owned();
    for family in FAMILIES {
        let at: SocketAddr = world.at("node", family, 4244);
        let address = format!("tls://{at}");
        let with = |ca: &Path, more: &[&str]| {
            let (ca, cert, key) = (text(ca), text(&client.cert), text(&client.key));
            let mut args = vec!["observe", "--server", &address, "--tls-server-name", "node1"];
            args.extend(["--tls-ca-cert-files", &ca, "--tls-client-cert-file", &cert]);
            args.extend(["--tls-client-key-file", &key]);
            args.extend(more);
            run(&daemon, far, &args)
        };
        wait_until("the listener", LONG, || with(&ca.cert, &[]).status.success())
            .unwrap_or_else(|error| panic!("{error:#}: {}\n{}", said(&with(&ca.cert, &[])), daemon.report()));
        for filters in [
            &["--last", "7"][..],
            &["--first", "3"],
            &["--all", "--verdict", "dropped"],
            &["--all", "--not", "--verdict", "dropped", "--ip-version", "4"],
            &["--all", "--since", "1h", "--to-port", "80"],
        ] {
            // The connection to the server is recorded, too.
            let args = [filters, &["--pod", "back", "-o", "json"]].concat();
            let (mut there, mut here) = (Vec::new(), Vec::new());
            // A denied end repeats its packets meanwhile.
            let are_same = wait_until("the same flows", LONG, || {
                there = flows(&with(&ca.cert, &args));
                here = flows(
                    &daemon
                        .try_cli(&[&["observe"][..], &args].concat())
                        .expect("palisade"),
                );
                !here.is_empty() && uuids(&there) == uuids(&here)
            });
            assert!(are_same.is_ok(), "{filters:?}: {there:#?} {here:#?}");
            for key in [
                "verdict",
                "drop_reason_desc",
                "source",
                "destination",
                "IP",
                "l4",
                "Summary",
            ] {
                assert_eq!(there[0][key], here[0][key], "{filters:?}: {key}");
            }
        }
        let compact = with(&ca.cert, &["--last", "1", "--pod", "back"]);
        assert!(
            String::from_utf8_lossy(&compact.stdout).contains("back"),
            "{compact:?}"
        );
        // A filter that the API does not have is refused before anything is shown.
        let refused = with(&ca.cert, &["--sni", "a"]);
        assert!(
            !refused.status.success() && said(&refused).contains("sni"),
            "{}",
            said(&refused)
        );
        let stranger = with(&other.cert, &[]);
        assert!(
            !stranger.status.success() && said(&stranger).contains("certificate"),
            "{}",
            said(&stranger)
        );
        let plain = run(&daemon, far, &["observe", "--server", &at.to_string()]);
        assert!(!plain.status.success() && plain.stdout.is_empty());
    }
    let closed = world.at("node", Family::V4, 4243).to_string();
    let refused = run(&daemon, far, &["observe", "--server", &closed]);
    assert!(
        !refused.status.success() && said(&refused).contains(&closed),
        "{}",
        said(&refused)
    );
}

#[test]
fn a_follower_of_a_server_gets_flows_as_they_arrive_and_its_end() {
    let world = world();
    let mut daemon = started(&world, "");
    let address = format!(
        "unix://{}",
        socket(&daemon)
            .trim_start_matches("unix:")
            .trim_start_matches("//")
    );
    let dir = tempfile::tempdir().expect("a directory");
    let args = [
        "observe",
        "--server",
        &address,
        "--follow",
        "--verdict",
        "dropped",
        "-o",
        "json",
    ];
    let mut follower =
        Process::spawn("follower", palisade(&daemon, world.ns("node"), &args), dir.path()).expect("palisade");
    wait_until("a flow", LONG, || {
        world.check(ONLY_FRONT).expect("check");
        follower.log().contains("\"DROPPED\"")
    })
    .unwrap_or_else(|error| panic!("{error}: {}", follower.log()));
    let list = |what: &str| -> Value {
        let out = run(
            &daemon,
            world.ns("node"),
            &["list", what, "--server", &address, "-o", "json"],
        );
        assert!(out.status.success(), "{}", said(&out));
        serde_json::from_slice(&out.stdout).expect("JSON")
    };
    let nodes = list("nodes");
    assert_eq!(
        (nodes.as_array().map(Vec::len), &nodes[0]["name"]),
        (Some(1), &"node1".into()),
        "{nodes}"
    );
    let namespaces = list("namespaces");
    assert!(namespaces.to_string().contains("\"default\""), "{namespaces}");
    // Without --server, the socket is that of the configuration.
    let table = daemon.cli(&["list", "nodes"]).expect("palisade list nodes");
    assert!(table.contains("node1") && table.contains("Connected"), "{table}");
    daemon.terminate().expect("the end of the daemon");
    wait_until("the follower ends", LONG, || {
        follower.exited().expect("state").is_some()
    })
    .expect("its end");
    assert!(follower.log().contains(&address), "{}", follower.log());
}
