//! Inspected connections over interfaces with jumbo frames, whose MTU is larger than that of the punt link.

use std::time::Duration;

use palisade_testbed::{
    daemon::Hooks,
    rawtcp::{RawTcp, Segment},
    topology::{FAMILIES, Family, INNER, NIC},
    web::{curl, random_file, sha256},
};
use palisade_tests::{
    OPEN,
    fixtures::apps::{Apps, PAIRS, apps},
    setup::{on_all_pairs, webs},
};

const RULES: &str = "      rules:\n        http: [{path: /files/.*}]\n";
const PORT: u16 = 80;
/// A transfer is faster; a connection whose segments are dropped needs all of this time.
const LONG: Duration = Duration::from_secs(10);

/// Gives every interface a larger MTU than the punt link has.
fn with_jumbo_frames() -> Apps {
    let apps = apps();
    let node = apps.ns("node");
    for interface in ["veth-client", "veth-server", NIC] {
        node.ip(&format!("link set {interface} mtu 9000\n")).expect("MTU");
    }
    for name in ["client", "server", "internet"] {
        apps.ns(name)
            .ip(&format!("link set {INNER} mtu 9000\n"))
            .expect("MTU");
    }
    apps
}

fn jumbo_frames(hooks: Hooks) {
    let apps = with_jumbo_frames();
    let servers = ["internet", "server", "node"];
    let webs = webs(&apps, servers, &[PORT], &[]);
    let body = apps.topology.dir().join("body");
    random_file(&body, 300_000).expect("file");
    let sum = sha256(&body).expect("sum");
    for web in &webs {
        std::fs::copy(&body, web.files().join("down")).expect("copy");
    }
    let daemon = on_all_pairs(&apps, hooks, &[PORT], RULES);
    let status = daemon.status().expect("status");
    let limited = status["warnings"].to_string();
    for interface in ["veth-client", "veth-server", NIC] {
        assert!(
            limited.contains(&format!("interface {interface}: its MTU of 9000")),
            "{limited}"
        );
    }
    assert!(daemon.log().contains("its MTU of 9000"), "{}", daemon.log());
    let from_body = body.display().to_string();
    for (from, to) in PAIRS {
        let web = &webs[servers.iter().position(|name| name == to).expect("server")];
        for family in FAMILIES {
            let url = |path: &str| format!("http://{}{path}", apps.at(to, family, PORT));
            let got = apps.topology.dir().join("got");
            let args = [&url("/files/down"), "-o", got.to_str().expect("path")];
            let down = curl(apps.ns(from), &args, LONG).expect("curl");
            let right = down.status == 200 && sha256(&got).is_ok_and(|got| got == sum);
            assert!(
                right,
                "{from} > {to} {family:?}, down: {down:?}\n{}",
                daemon.report()
            );
            let args = ["-T", &from_body, "-H", "Expect:", &url("/files/up")];
            let up = curl(apps.ns(from), &args, LONG).expect("curl");
            let right =
                matches!(up.status, 201 | 204) && sha256(&web.files().join("up")).is_ok_and(|got| got == sum);
            assert!(right, "{from} > {to} {family:?}, up: {up:?}\n{}", daemon.report());
        }
    }
}

/// A frame of the greatest length that can be punted must also fit when it is reinjected with the flow command for the
/// length of the body.
#[test]
fn the_longest_punted_frame_is_reinjected_with_a_flow_command() {
    /// `palisade_abi::MAX_PUNT_FRAME`.
    const LONGEST: usize = 3_254;
    let apps = with_jumbo_frames();
    let servers = ["internet", "server", "node"];
    let _webs = webs(&apps, servers, &[PORT], &[]);
    let daemon = on_all_pairs(&apps, Hooks::default(), &[PORT], RULES);
    for (from, to) in PAIRS {
        for family in FAMILIES {
            let (source, at) = (apps.source(from, to, family), apps.at(to, family, PORT));
            let mut client = RawTcp::connect(apps.ns(from), source, at).expect("connection");
            let network = if family == Family::V4 { 20 } else { 40 };
            let mut bytes =
                format!("PUT /files/up HTTP/1.1\r\nHost: {to}.example\r\nContent-Length: 1000000\r\n\r\n")
                    .into_bytes();
            bytes.resize(LONGEST - 14 - network - 20, b'x');
            // Sent once: a retransmission would be reinjected without the command.
            client.send(&Segment::data(0, &bytes)).expect("segment");
            let end = i64::try_from(bytes.len()).expect("a length");
            let arrived = client
                .listen(OPEN, |client| client.acked() >= end)
                .expect("answers");
            assert!(arrived, "{from} > {to} {family:?}\n{}", daemon.report());
        }
    }
    daemon
        .wait_status("orders for the rest of the bodies", |status| {
            let windows = &status["workers"]["inspection"]["http.tcp"]["windows"];
            windows.as_u64() >= Some((PAIRS.len() * FAMILIES.len()) as u64)
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

#[test]
fn jumbo_frames_pass_on_inspected_connections_with_tcx() {
    jumbo_frames(Hooks {
        host: "tc",
        ..Hooks::default()
    });
}

#[test]
fn jumbo_frames_pass_on_inspected_connections_with_xdp_at_the_nic() {
    jumbo_frames(Hooks::default());
}
