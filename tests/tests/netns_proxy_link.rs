//! The proxy links of the daemon: they are made, repaired, and end with the daemon.

use std::{thread, time::Duration};

use palisade_testbed::{Daemon, daemon::Settings, ns::wait_until};
use palisade_tests::{
    fixtures::apps::{Apps, apps},
    fixtures::dns::counted,
    setup::daemon,
};
use serde_json::Value;

const ENDS: [&str; 2] = ["palisadepi", "palisadepe"];
const FOREIGN: u64 = 233;
const NO_PROXY: u64 = 253;
const LONG: Duration = Duration::from_secs(60);

/// Returns the node's end of a link as `ip` shows it; `None` if it does not exist.
fn link(apps: &Apps, end: &str) -> Option<Value> {
    let args = ["-j", "-s", "link", "show", "dev", end];
    let shown = apps.ns("node").run("ip", &args).ok()?;
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    Some(shown[0].clone())
}

/// Returns the index of an end that is up with its programs; 0 if there is none.
fn index(apps: &Apps, end: &str) -> u64 {
    let up = link(apps, end).filter(|link| link["flags"].to_string().contains("\"UP\""));
    up.map_or(0, |link| link["ifindex"].as_u64().expect("index"))
}

#[test]
fn a_proxy_link_that_is_deleted_set_down_or_moved_is_repaired() {
    let apps = apps();
    let daemon = daemon(&apps.topology, &[]);
    let node = apps.ns("node");
    for end in ENDS {
        let before = index(&apps, end);
        assert_ne!(before, 0, "{}", daemon.report());
        node.ip(&format!("link set {end} down\n")).expect("ip");
        wait_until("the end is up", LONG, || index(&apps, end) == before).expect("set up");
        let other = apps.ns("server").name().to_owned();
        for damage in [
            format!("link del {end}\n"),
            format!("link set {end} netns {other}\n"),
        ] {
            let before = ENDS.map(|end| index(&apps, end));
            node.ip(&damage).expect("ip");
            wait_until("both links are made anew", LONG, || {
                let now = ENDS.map(|end| index(&apps, end));
                now.iter()
                    .zip(&before)
                    .all(|(now, before)| *now != 0 && now != before)
            })
            .unwrap_or_else(|error| panic!("{damage}: {error:#}\n{}", daemon.report()));
        }
    }
    let status = daemon
        .wait_status("ready", |status| status["ready"] == true)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    assert_eq!(status["missing"], Value::Array(Vec::new()));
    // Nothing of this makes the daemon repair what is whole.
    let settled = ENDS.map(|end| index(&apps, end));
    thread::sleep(Duration::from_secs(3));
    assert_eq!(ENDS.map(|end| index(&apps, end)), settled, "{}", daemon.report());
}

#[test]
fn an_idle_node_has_no_frames_on_the_proxy_links() {
    let apps = apps();
    apps.ns("node")
        .sysctl("ipv6/conf/all/forwarding", "1")
        .expect("sysctl");
    let daemon = daemon(&apps.topology, &[]);
    thread::sleep(Duration::from_secs(6));
    let status = daemon.status().expect("status");
    for reason in [FOREIGN, NO_PROXY] {
        assert_eq!(counted(&status, reason), 0, "{:#}", status["drops"]);
    }
    for end in ENDS {
        let link = link(&apps, end).expect("link");
        assert_eq!(link["stats64"]["tx"]["packets"], 0, "{end}: {link:#}");
        assert_eq!(link["stats64"]["rx"]["packets"], 0, "{end}: {link:#}");
    }
}

#[test]
fn the_proxy_links_end_with_the_daemon_and_come_back_with_it() {
    let apps = apps();
    let mut daemon = daemon(&apps.topology, &[]);
    let before = ENDS.map(|end| index(&apps, end));
    daemon.kill9().expect("kill");
    wait_until("the links are gone", LONG, || {
        ENDS.iter().all(|end| link(&apps, end).is_none())
    })
    .expect("gone");
    daemon.spawn().expect("spawn");
    daemon.wait().expect("ready");
    for (end, before) in ENDS.iter().zip(before) {
        let now = index(&apps, end);
        assert!(now != 0 && now != before, "{}", daemon.report());
    }
    daemon.detach().expect("detach");
    assert!(ENDS.iter().all(|end| link(&apps, end).is_none()));
}

#[test]
fn missing_proxy_links_are_made_once_their_name_is_free() {
    for taken in ENDS {
        let apps = apps();
        apps.ns("node")
            .ip(&format!("link add {taken} type bridge\nlink set {taken} up\n"))
            .expect("ip");
        let mut daemon = Daemon::prepare(&apps.topology, &Settings::default(), &[]).expect("daemon");
        daemon.spawn().expect("spawn");
        let told = wait_until("status says it", LONG, || {
            daemon.status().is_ok_and(|status| {
                let missing = status["missing"].to_string();
                missing.contains("no proxy links")
                    && missing.contains("no proxy threads: there are no proxy links")
                    && missing.contains("[worker] interface")
            })
        });
        told.unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
        apps.ns("node").ip(&format!("link del {taken}\n")).expect("ip");
        daemon
            .wait_status("the links are made", |status| {
                status["missing"] == Value::Array(Vec::new()) && ENDS.iter().all(|end| index(&apps, end) != 0)
            })
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    }
}
