//! `palisade top` on a live daemon: one screen for scripts, and a terminal.

use std::{process::Stdio, time::Duration};

use palisade_testbed::{daemon::Settings, ns::wait_until, process::output};
use palisade_tests::{
    fixtures::back::{FROM_FRONT, ONLY_FRONT},
    tmux::Tmux,
    world,
};

const TIMEOUT: Duration = Duration::from_secs(60);

#[test]
fn one_screen_shows_flows_talkers_rules_and_drops() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("front.yaml", FROM_FRONT)])
        .expect("daemon");
    let mut command = daemon.command(&["top", "--once", "--interval", "4s"]);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("top");
    // The command counts flows from its start on, and a start takes a moment.
    for _ in 0..3 {
        world.expect(&daemon, ONLY_FRONT);
    }
    let out = child.wait_with_output().expect("top");
    let text = String::from_utf8(out.stdout).expect("UTF-8");
    assert!(
        out.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    assert!(!text.contains('\x1b'), "{text}");
    for part in [
        "palisade top  node1  up ",
        "  ready",
        "default/front -> default/back",
        "default/db -> default/back",
        "default/from-front ingress",
        "ingress Policy denied",
        "0 running",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }

    // Without a terminal there is no other form, and without a daemon none at all.
    let refused = daemon.try_cli(&["top"]).expect("top");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("--once"), "{said}");
    let mut nowhere = daemon.command(&["top", "--once"]);
    nowhere.args(["--socket", "/nowhere"]);
    let refused = output(&mut nowhere, TIMEOUT).expect("top");
    assert!(!refused.status.success());
}

#[test]
fn the_screen_of_a_terminal_changes_and_ends_by_a_key_with_the_terminal_restored() {
    let world = world();
    let daemon = world
        .daemon(Settings::default(), &[("front.yaml", FROM_FRONT)])
        .expect("daemon");
    let dir = tempfile::tempdir().expect("directory");
    let top = daemon.command(&["top", "--interval", "200ms"]);
    let script = format!(
        "stty -a > {0}/before; {1}; echo ended $?; stty -a > {0}/after; sleep 600",
        dir.path().display(),
        Tmux::words(&top)
    );
    let tmux = Tmux::start(dir.path(), &script);
    let wait = |what: &str, part: &str| tmux.wait(what, part);
    wait("the screen", "q quit  p pause");
    world.expect(&daemon, ONLY_FRONT);
    wait("a talker", "default/db -> default/back");
    tmux.run(&["send-keys", "p"]);
    wait("a pause", "PAUSED");
    tmux.run(&["send-keys", "p"]);
    tmux.run(&["send-keys", "d"]);
    wait("another order", "DROPPED*");
    tmux.run(&["resize-window", "-x", "40", "-y", "10"]);
    wait("a small screen", "default/front -> defa");
    tmux.run(&["send-keys", "q"]);
    wait("the end", "ended 0");
    wait_until("the shell", TIMEOUT, || dir.path().join("after").exists()).expect("the shell");
    let state = |name: &str| -> String {
        // Not the size, which has changed.
        let text = std::fs::read_to_string(dir.path().join(name)).expect("stty");
        text.lines().skip(1).collect()
    };
    wait_until("the state of the terminal", TIMEOUT, || {
        state("before") == state("after")
    })
    .expect("restored");
}
