//! Every member of the policy language on real traffic: the cases of `cases/netns/`, over IPv4 and IPv6, from and to
//! workloads, the node and the world, at each pair of hooks.

use palisade_testbed::daemon::{Hooks, Settings};
use palisade_tests::{World, cases, run_cases, setup::XDP_AT_THE_NIC};

/// XDP and clsact at the workloads, clsact at the NIC.
const CLSACT_AT_THE_NIC: Hooks = Hooks {
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
    peers_with_xdp_at_the_nic: "peers", XDP_AT_THE_NIC;
    peers_with_clsact_at_the_nic: "peers", CLSACT_AT_THE_NIC;
    ports_with_xdp_at_the_nic: "ports", XDP_AT_THE_NIC;
    ports_with_clsact_at_the_nic: "ports", CLSACT_AT_THE_NIC;
    deny_with_xdp_at_the_nic: "deny", XDP_AT_THE_NIC;
    deny_with_clsact_at_the_nic: "deny", CLSACT_AT_THE_NIC;
    kubernetes_with_xdp_at_the_nic: "kubernetes", XDP_AT_THE_NIC;
    kubernetes_with_clsact_at_the_nic: "kubernetes", CLSACT_AT_THE_NIC;
    host_with_xdp_at_the_nic: "host", XDP_AT_THE_NIC;
    host_with_clsact_at_the_nic: "host", CLSACT_AT_THE_NIC;
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
