//! The demo shows the expected outcomes, and leaves nothing behind.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use palisade_testbed::{ns::wait_until, output};

fn demo() -> Command {
    Command::new(env!("CARGO_BIN_EXE_palisade-demo"))
}

/// Returns the names of namespaces, pin directories and temporary directories of a process.
fn left_of(pid: u32) -> Vec<String> {
    let temporary = std::env::temp_dir();
    let places = [
        (Path::new("/run/netns"), format!("pal-{pid}-")),
        (Path::new("/sys/fs/bpf"), format!("palisade-test-{pid}-")),
        (temporary.as_path(), format!("palisade-testbed-{pid}-")),
    ];
    let mut found = Vec::new();
    for (dir, prefix) in places {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&prefix) {
                found.push(name);
            }
        }
    }
    found
}

#[test]
fn the_demo_shows_the_outcomes_of_the_example_policies() {
    let out = output(&mut demo(), Duration::from_secs(90)).expect("demo");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{text}");
    for part in [
        "PROGRAM",
        "shop/backend (ingress)",
        "blocklist (ingress)",
        "audited",
        "DROPPED",
        "refused",
        "shop/payments (egress)",
        "dns-request proxy DROPPED (DNS Query tracker.example. A)",
        "http-request FORWARDED (HTTP/1.1 GET http://10.0.2.10:8081/products/7)",
        "http-request DROPPED (HTTP/1.1 GET http://10.0.2.10:8081/products/../admin)",
        "tls-request DROPPED (TLS Hello tracker.example (TLS 1.3))",
        "shop/api (ingress)",
        "shop/partner (egress)",
        "ok: 78 attempts",
    ] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
}

#[test]
fn nothing_is_left_after_ctrl_c() {
    for pause in [300, 1500, 2500] {
        let mut child = demo()
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("demo");
        wait_until("the demo has begun", Duration::from_secs(60), || {
            !left_of(child.id()).is_empty()
        })
        .expect("namespaces");
        thread::sleep(Duration::from_millis(pause));
        // The demo may have ended by now.
        let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT);
        let status = child.wait().expect("end");
        assert!(matches!(status.code(), Some(130 | 0)), "{status}");
        assert_eq!(left_of(child.id()), [""; 0], "after {pause} ms");
    }
}
