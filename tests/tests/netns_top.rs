//! `palisade top` on a live daemon: one screen for scripts, and a terminal.

use std::{
    process::{Command, Output, Stdio},
    time::Duration,
};

use palisade_testbed::{daemon::Settings, ns::wait_until, process::output};
use palisade_tests::{
    fixtures::back::{FROM_FRONT, ONLY_FRONT},
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
    let server = Tmux(dir.path().join("tmux").display().to_string());
    let tmux = |args: &[&str]| server.run(args);
    let top = daemon.command(&["top", "--interval", "200ms"]);
    let words: Vec<String> = std::iter::once(top.get_program())
        .chain(top.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let script = format!(
        "stty -a > {0}/before; {1}; echo ended $?; stty -a > {0}/after; sleep 600",
        dir.path().display(),
        words.join(" ")
    );
    let begun = tmux(&["new-session", "-d", "-x", "80", "-y", "24", &script]);
    assert!(begun.status.success(), "{begun:?}");
    let screen = || String::from_utf8_lossy(&tmux(&["capture-pane", "-p"]).stdout).into_owned();
    let wait = |what: &str, part: &str| {
        wait_until(what, TIMEOUT, || screen().contains(part))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", screen()));
    };
    wait("the screen", "q quit  p pause");
    world.expect(&daemon, ONLY_FRONT);
    wait("a talker", "default/db -> default/back");
    tmux(&["send-keys", "p"]);
    wait("a pause", "PAUSED");
    tmux(&["send-keys", "p"]);
    tmux(&["send-keys", "d"]);
    wait("another order", "DROPPED*");
    tmux(&["resize-window", "-x", "40", "-y", "10"]);
    wait("a small screen", "default/front -> defa");
    tmux(&["send-keys", "q"]);
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

/// A tmux server of its own, with the path of its socket. It ends with this value.
struct Tmux(String);

impl Tmux {
    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new("tmux");
        command.args(["-S", &self.0, "-f", "/dev/null"]).args(args);
        output(&mut command, TIMEOUT).expect("tmux")
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        self.run(&["kill-server"]);
    }
}
