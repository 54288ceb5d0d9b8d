//! Common programs through typical policies.

use std::{process::Command, time::Duration};

use palisade_testbed::{
    Daemon, Ns,
    daemon::{Hooks, Settings},
    output,
    process::timed_out,
    server::{Iperf3, Nginx, Program},
    topology::{FAMILIES, Family},
};
use palisade_tests::{World, world};

const POLICY: &str = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: back}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: \"8000\", protocol: TCP}, {port: \"5201\", protocol: ANY}, {port: \"7000\", protocol: ANY}]
  - fromEndpoints: [{matchLabels: {app: front}}]
    icmps:
    - fields: [{type: 8, family: IPv4}, {type: 128, family: IPv6}]
";

const HOOKS: [Hooks; 2] = [
    Hooks {
        endpoint: "tc",
        host: "xdp",
        tc: "tcx",
    },
    Hooks {
        endpoint: "xdp",
        host: "tc",
        tc: "clsact",
    },
];

fn daemon(world: &World, hooks: Hooks) -> Daemon {
    world
        .daemon(
            Settings {
                hooks,
                ..Settings::default()
            },
            &[("back.yaml", POLICY)],
        )
        .expect("daemon")
}

/// Returns exit code and output of a program that may fail; no code if it was killed.
fn run(ns: &Ns, program: &str, args: &[&str]) -> (Option<i32>, String) {
    let mut command: Command = ns.command(program);
    command.args(args);
    let out = output(&mut command, Duration::from_secs(15)).expect(program);
    assert!(!timed_out(&out), "{program} {args:?} does not end");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code(), text)
}

#[test]
fn curl_gets_pages_from_nginx_or_runs_into_its_timeout() {
    let world = world();
    let _nginx = Nginx::start(world.ns("back"), "back", &[8000], 3_000_000).expect("nginx");
    for hooks in HOOKS {
        let daemon = daemon(&world, hooks);
        for family in FAMILIES {
            let url = format!("http://{}/", world.at("back", family, 8000));
            let (code, text) = run(world.ns("front"), "curl", &["-sS", "-m", "5", &url]);
            assert_eq!(
                (code, text.as_str()),
                (Some(0), "hello from back\n"),
                "{}",
                daemon.report()
            );
            let big = world
                .ns("front")
                .run("curl", &["-sS", "-m", "10", &format!("{url}big")])
                .expect("curl");
            assert_eq!(big.len(), 3_000_000);
            for from in ["db", "pfront", "internet", "node"] {
                let (code, text) = run(world.ns(from), "curl", &["-sS", "-m", "0.4", &url]);
                assert_eq!(code, Some(28), "{from}: {text}\n{}", daemon.report());
            }
        }
    }
}

#[test]
fn ping_small_and_large() {
    let world = world();
    for hooks in HOOKS {
        let daemon = daemon(&world, hooks);
        for family in FAMILIES {
            let back = world.addr("back", family).to_string();
            for size in ["56", "1472", "4000", "30000"] {
                let (code, text) = run(
                    world.ns("front"),
                    "ping",
                    &["-c", "3", "-i", "0.01", "-W", "2", "-s", size, &back],
                );
                assert_eq!(code, Some(0), "{text}\n{}", daemon.report());
                assert!(text.contains("3 received"), "{text}");
                let (code, text) = run(
                    world.ns("db"),
                    "ping",
                    &["-c", "3", "-i", "0.01", "-W", "0.3", "-s", size, &back],
                );
                assert_eq!(code, Some(1), "{text}\n{}", daemon.report());
            }
        }
    }
}

#[test]
fn iperf3_carries_bulk_tcp_and_udp_both_ways() {
    let world = world();
    let _server = Iperf3::start(world.ns("back"), 5201).expect("iperf3");
    for hooks in HOOKS {
        let daemon = daemon(&world, hooks);
        for family in FAMILIES {
            let back = world.addr("back", family).to_string();
            for extra in [
                &["-n", "20M"][..],
                &["-n", "20M", "-R"],
                &["-u", "-b", "10M", "-n", "1M", "-l", "1200"],
            ] {
                let mut args = vec!["-c", &back, "-J", "--connect-timeout", "3000"];
                args.extend(extra);
                let (code, text) = run(world.ns("front"), "iperf3", &args);
                assert_eq!(code, Some(0), "{extra:?}: {text}\n{}", daemon.report());
                assert!(
                    text.contains("sum_received") && !text.contains("\"error\""),
                    "{text}"
                );
            }
            let (_, text) = run(
                world.ns("db"),
                "iperf3",
                &["-c", &back, "-n", "1M", "-J", "--connect-timeout", "400"],
            );
            assert!(
                !text.contains("sum_received") && text.contains("unable to connect"),
                "{text}"
            );
        }
    }
}

#[test]
fn netcat_talks_over_tcp_and_udp() {
    let world = world();
    let daemon = daemon(&world, HOOKS[0]);
    for family in FAMILIES {
        let (socat, back) = match family {
            Family::V4 => ("4", world.addr("back", family).to_string()),
            Family::V6 => ("6", world.addr("back", family).to_string()),
        };
        let _tcp = Program::start(
            world.ns("back"),
            "socat",
            &[&format!("TCP{socat}-LISTEN:7000,fork,reuseaddr"), "EXEC:cat"],
            Some(world.at("back", family, 7000)),
        )
        .expect("socat");
        let _udp = Program::start(
            world.ns("back"),
            "socat",
            &[&format!("UDP{socat}-RECVFROM:7000,fork"), "EXEC:cat"],
            None,
        )
        .expect("socat");
        for udp in [false, true] {
            let flag = if udp { "-u" } else { "-n" };
            let say = format!("echo said by nc | nc -n {flag} -w 1 {back} 7000");
            // The program does not report when its datagram socket is bound.
            let mut heard = String::new();
            for _ in 0..10 {
                heard = run(world.ns("front"), "sh", &["-c", &say]).1;
                if heard.contains("said by nc") {
                    break;
                }
            }
            assert!(
                heard.contains("said by nc"),
                "udp {udp}: {heard}\n{}",
                daemon.report()
            );
            let (_, denied) = run(world.ns("db"), "sh", &["-c", &say]);
            assert!(!denied.contains("said by nc"), "udp {udp}: {denied}");
        }
    }
}
