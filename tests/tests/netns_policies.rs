//! Every member of the policy language on real traffic: the cases of `cases/netns/`, over IPv4 and IPv6, from and to
//! workloads, the node and the world, at each pair of hooks.

use palisade_testbed::daemon::{Hooks, Settings};
use palisade_tests::{World, cases, run_cases};

/// tcx at the workloads, XDP at the NIC.
const TCX: Hooks = Hooks {
    endpoint: "tc",
    host: "xdp",
    tc: "tcx",
};
/// XDP and clsact at the workloads, clsact at the NIC.
const CLSACT: Hooks = Hooks {
    endpoint: "xdp",
    host: "tc",
    tc: "clsact",
};

fn run(folder: &str, hooks: Hooks) {
    let world = World::new().expect("world");
    let daemon = world
        .daemon(
            Settings {
                hooks,
                ..Settings::default()
            },
            &[],
        )
        .expect("daemon");
    let report = run_cases(&world, &daemon, &cases(folder).expect("cases")).expect("run");
    assert!(report.is_empty(), "{report}");
}

macro_rules! groups {
    ($($name:ident: $folder:literal, $hooks:ident;)*) => {
        $(#[test]
        fn $name() {
            run($folder, $hooks);
        })*
    };
}

groups! {
    peers_by_tcx: "peers", TCX;
    peers_by_xdp_and_clsact: "peers", CLSACT;
    ports_by_tcx: "ports", TCX;
    ports_by_xdp_and_clsact: "ports", CLSACT;
    deny_by_tcx: "deny", TCX;
    deny_by_xdp_and_clsact: "deny", CLSACT;
    kubernetes_by_tcx: "kubernetes", TCX;
    kubernetes_by_xdp_and_clsact: "kubernetes", CLSACT;
    host_by_xdp: "host", TCX;
    host_by_clsact: "host", CLSACT;
}

#[test]
fn without_palisade_everything_is_open() {
    // Without this the checks would prove nothing: only Palisade may drop packets.
    let world = World::new().expect("world");
    let mut lines = String::new();
    for from in [
        "front",
        "back",
        "pfront",
        "node",
        "far",
        "near",
        "internet",
        "node2",
        "api",
        "remote-db",
    ] {
        for to in ["front", "back", "db", "node", "far", "near"] {
            let inside = |name: &str| ["front", "back", "db", "pfront", "node"].contains(&name);
            if from == to || !inside(from) && !inside(to) {
                continue;
            }
            for what in ["tcp/80", "udp/53", "udp/53/4000", "ping"] {
                lines.push_str(&format!("{from} -> {to} {what} open\n"));
            }
        }
    }
    for what in ["sctp/2905", "proto/112", "proto/47", "ping/4000", "tcp/8085"] {
        lines.push_str(&format!("front -> back {what} open\nfar -> back {what} open\n"));
    }
    lines
        .push_str("4 front -> back icmp/13 open\n6 front -> back icmp/139 open\nnode -> back sctp/80 open\n");
    let failures = world.check(&lines).expect("check");
    assert!(failures.is_empty(), "{failures:#?}");
}
