//! Server names during policy changes and restarts of the daemon, and in audit mode: allowed connections continue, denied
//! ones end.

use std::{
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    process::output_with_input,
    tls::Handshake,
    topology::{FAMILIES, Family},
    web::{Web, by_name, curl, random_file, sha256},
};
use palisade_tests::{
    OPEN,
    fixtures::apps::{Apps, Loop, apps, policy},
    flows::endpoint_id,
    opaque_tls::{self, Secret},
};

const PORT: u16 = 443;
/// Port of a server that does not speak TLS after the hello.
const SECRET: u16 = 8443;

fn names(names: &str) -> String {
    policy(
        "client",
        "egress",
        &[PORT, SECRET],
        &format!("      serverNames: [{names}]\n"),
    )
}

/// Returns whether curl gets a page for a name.
fn gets(apps: &Apps, family: Family, name: &str) -> bool {
    let args = by_name(name, apps.at("internet", family, PORT), "/");
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let got = curl(apps.ns("client"), &args, Duration::from_secs(3)).expect("curl");
    got.status == 200
}

#[track_caller]
fn moves(secret: &Secret, daemon: &Daemon) {
    assert!(
        secret.moves(30, OPEN) && !secret.is_broken(),
        "{} stands still\n{}",
        secret.local,
        daemon.report()
    );
}

fn secrets(apps: &Apps, name: &str) -> [Secret; 2] {
    FAMILIES.map(|family| {
        let to: SocketAddr = apps.at("internet", family, SECRET);
        Secret::open(apps.ns("client"), to, name).expect("connection")
    })
}

#[test]
fn a_changed_server_name_rule_resets_only_denied_connections() {
    let apps = apps();
    let _server = opaque_tls::server(apps.ns("internet"), &apps.both("internet"), &[SECRET]).expect("server");
    let daemon = apps
        .daemon(
            &Settings::default(),
            &[("a.yaml", &names("a.example, b.example"))],
        )
        .expect("daemon");
    let (a, b) = (secrets(&apps, "a.example"), secrets(&apps, "b.example"));
    for secret in a.iter().chain(&b) {
        moves(secret, &daemon);
    }
    // Another name in addition.
    daemon
        .apply(&[("b.yaml", &names("a.example, b.example, c.example"))])
        .expect("apply");
    for secret in a.iter().chain(&b) {
        moves(secret, &daemon);
    }
    // Another rule with the same effect for one of them.
    daemon
        .apply(&[("c.yaml", &names("\"*.example\""))])
        .expect("apply");
    for secret in a.iter().chain(&b) {
        moves(secret, &daemon);
    }
    // One of them is no longer allowed.
    daemon.apply(&[("d.yaml", &names("a.example"))]).expect("apply");
    for secret in &a {
        moves(secret, &daemon);
    }
    for secret in &b {
        assert!(
            secret.is_cut(OPEN),
            "{} continues\n{}",
            secret.local,
            daemon.report()
        );
    }
    // Nothing is inspected any more.
    daemon
        .apply(&[("e.yaml", &policy("client", "egress", &[SECRET], ""))])
        .expect("apply");
    for secret in &a {
        moves(secret, &daemon);
    }
    // Server names again, including this one: its hello was inspected before.
    daemon
        .apply(&[("f.yaml", &names("a.example, b.example"))])
        .expect("apply");
    // No rule for the port any more.
    daemon
        .apply(&[("g.yaml", &policy("client", "egress", &[PORT], ""))])
        .expect("apply");
    for secret in &a {
        let rounds = secret.rounds();
        thread::sleep(Duration::from_millis(300));
        assert!(
            secret.rounds() <= rounds + 2,
            "{} continues\n{}",
            secret.local,
            daemon.report()
        );
    }
}

#[test]
fn reload_under_load_loses_no_connection_that_is_allowed() {
    let apps = apps();
    let _web = Web::start(apps.ns("internet"), "internet", &[], &[PORT], &apps.certificate).expect("nginx");
    let server = opaque_tls::server(apps.ns("internet"), &apps.both("internet"), &[SECRET]).expect("server");
    let daemon = apps
        .daemon(&Settings::default(), &[("p.yaml", &names("a.example"))])
        .expect("daemon");
    let live = secrets(&apps, "a.example");
    let shared = std::sync::Arc::new(apps);
    let loops = FAMILIES.map(|family| {
        ["a.example", "evil.example"].map(|name| {
            let apps = shared.clone();
            Loop::start(move |_| gets(&apps, family, name))
        })
    });
    let begin = Instant::now();
    let mut n = 0;
    while begin.elapsed() < Duration::from_secs(5) {
        n += 1;
        let more: String = (0..n % 4).map(|m| format!(", x{n}-{m}.example")).collect();
        daemon
            .apply(&[("p.yaml", &names(&format!("a.example{more}")))])
            .expect("apply");
    }
    assert!(n >= 5, "only {n} reloads");
    for [good, bad] in loops {
        let (good, bad) = (good.finish(), bad.finish());
        assert!(
            good.len() > 20 && good.iter().all(|got| *got),
            "{good:?}\n{}",
            daemon.report()
        );
        assert!(bad.len() > 20 && !bad.iter().any(|got| *got), "{bad:?}");
    }
    for secret in &live {
        moves(secret, &daemon);
        assert!(
            secret.longest() < Duration::from_secs(1),
            "{:?}",
            secret.longest()
        );
    }
    drop(live);
    assert!(server.heard().len() >= 2);
}

#[test]
fn kill9_and_restart_keep_connections_and_pass_no_denied_name() {
    let apps = apps();
    let web = Web::start(apps.ns("internet"), "internet", &[], &[PORT], &apps.certificate).expect("nginx");
    let _server = opaque_tls::server(apps.ns("internet"), &apps.both("internet"), &[SECRET]).expect("server");
    let mut daemon = apps
        .daemon(&Settings::default(), &[("p.yaml", &names("a.example"))])
        .expect("daemon");
    let live = secrets(&apps, "a.example");
    let shared = std::sync::Arc::new(apps);
    let evil = {
        let apps = shared.clone();
        Loop::start(move |n| gets(&apps, FAMILIES[n % 2], "evil.example"))
    };
    for round in 0..2 {
        if round == 0 {
            daemon.kill9().expect("kill -9");
        } else {
            daemon.terminate().expect("SIGTERM");
        }
        for secret in &live {
            moves(secret, &daemon);
        }
        // Its hello is not inspected, so it does not pass.
        thread::sleep(Duration::from_millis(1200));
        assert!(
            !gets(&shared, Family::V4, "a.example"),
            "a hello has passed without inspection"
        );
        daemon.restart().expect("restart");
        for secret in &live {
            moves(secret, &daemon);
        }
        for family in FAMILIES {
            assert!(gets(&shared, family, "a.example"), "{}", daemon.report());
        }
    }
    let evil = evil.finish();
    assert!(evil.len() >= 3 && !evil.iter().any(|got| *got), "{evil:?}");
    for seen in web.seen() {
        assert_eq!(seen.server_name, "a.example", "{seen:?}");
    }
    // After the restart, a connection that is no longer allowed ends all the same.
    daemon
        .apply(&[("q.yaml", &names("other.example"))])
        .expect("apply");
    for secret in &live {
        assert!(
            secret.is_cut(OPEN),
            "{} continues\n{}",
            secret.local,
            daemon.report()
        );
    }
}

#[test]
fn a_new_server_name_policy_resets_connections_whose_hello_was_not_inspected() {
    let apps = apps();
    let _server = opaque_tls::server(apps.ns("internet"), &apps.both("internet"), &[SECRET]).expect("server");
    let daemon = apps
        .daemon(
            &Settings::default(),
            &[("p.yaml", &policy("client", "egress", &[SECRET], ""))],
        )
        .expect("daemon");
    // Their hellos were not inspected.
    let live = secrets(&apps, "a.example");
    for secret in &live {
        moves(secret, &daemon);
    }
    daemon.apply(&[("q.yaml", &names("a.example"))]).expect("apply");
    for secret in &live {
        assert!(
            secret.is_cut(OPEN),
            "{} continues\n{}",
            secret.local,
            daemon.report()
        );
    }
    for secret in &secrets(&apps, "a.example") {
        moves(secret, &daemon);
    }
}

/// Asserts that both names pass, and that what would be denied is reported.
#[track_caller]
fn is_audited(apps: &Apps, daemon: &Daemon) {
    for family in FAMILIES {
        for name in ["a.example", "evil.example"] {
            assert!(gets(apps, family, name), "{name} {family:?}\n{}", daemon.report());
        }
        // Bytes that are not TLS pass too.
        let at = apps.at("internet", family, PORT);
        let url = format!("http://{at}/");
        let got = curl(apps.ns("client"), &[&url], OPEN).expect("curl");
        assert_eq!(got.status, 400, "{got:?}\n{}", daemon.report());
        let to = at.ip().to_string();
        daemon
            .wait_flows(
                &["--type", "l7", "--verdict", "AUDIT", "--to-ip", &to],
                "it is reported",
                |flows| {
                    flows
                        .iter()
                        .any(|f| f["Summary"] == "TLS Hello evil.example (TLS 1.3)")
                        && flows.iter().any(|f| f["Summary"] == "Unreadable: not TLS")
                        && !flows
                            .iter()
                            .any(|f| f["Summary"] == "TLS Hello a.example (TLS 1.3)")
                },
            )
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    }
}

#[test]
fn audit_mode_globally_per_endpoint_and_per_policy() {
    let apps = apps();
    let _web = Web::start(apps.ns("internet"), "internet", &[], &[PORT], &apps.certificate).expect("nginx");
    let text = names("a.example");
    let settings = Settings {
        audit: true,
        ..Settings::default()
    };
    let daemon = apps.daemon(&settings, &[("p.yaml", &text)]).expect("daemon");
    is_audited(&apps, &daemon);
    drop(daemon);

    let daemon = apps
        .daemon(&Settings::default(), &[("p.yaml", &text)])
        .expect("daemon");
    assert!(!gets(&apps, Family::V4, "evil.example"));
    let id = endpoint_id(&daemon, "default/client");
    daemon
        .cli(&["endpoint", "config", &id, "PolicyAuditMode=Enabled"])
        .expect("endpoint config");
    is_audited(&apps, &daemon);
    daemon
        .cli(&["endpoint", "config", &id, "PolicyAuditMode=Disabled"])
        .expect("endpoint config");
    assert!(!gets(&apps, Family::V4, "evil.example"));
    drop(daemon);

    let text = text.replace(
        "metadata: {name: client-egress}",
        "metadata: {name: client-egress, annotations: {palisade.io/audit: \"true\"}}",
    );
    let daemon = apps
        .daemon(&Settings::default(), &[("p.yaml", &text)])
        .expect("daemon");
    is_audited(&apps, &daemon);
}

#[test]
fn lost_segments_are_retransmitted() {
    const LONG: usize = 6_000;
    let apps = apps();
    let web = Web::start(apps.ns("internet"), "internet", &[], &[PORT], &apps.certificate).expect("nginx");
    random_file(&web.files().join("down"), 200_000).expect("file");
    let sum = sha256(&web.files().join("down")).expect("sum");
    let daemon = apps
        .daemon(&Settings::default(), &[("p.yaml", &names("a.example"))])
        .expect("daemon");
    // Between the firewall and the server, in both directions.
    apps.ns("internet")
        .nft(&format!(
            "table inet loss {{\nchain i {{\ntype filter hook input priority 0;\n\
             tcp dport {PORT} numgen random mod 100 < 12 drop;\n}}\n\
             chain o {{\ntype filter hook output priority 0;\n\
             tcp sport {PORT} numgen random mod 100 < 12 drop;\n}}\n}}\n"
        ))
        .expect("nft");
    let apps = &apps;
    let long: String = vec!["x".repeat(200); LONG / 201].join(",") + ",http/1.1";
    thread::scope(|scope| {
        for n in 0..8 {
            let (sum, daemon, long) = (&sum, &daemon, &long);
            scope.spawn(move || {
                let family = FAMILIES[n % 2];
                let at = apps.at("internet", family, PORT);
                let path = apps.topology.dir().join(format!("got-{n}"));
                for name in ["a.example", "evil.example"] {
                    let mut args = by_name(name, at, "/files/down");
                    args.extend(["-o".into(), path.display().to_string()]);
                    let args: Vec<&str> = args.iter().map(String::as_str).collect();
                    let got = curl(apps.ns("client"), &args, Duration::from_secs(40)).expect("curl");
                    assert_eq!(got.code == 0, name == "a.example", "{got:?}\n{}", daemon.report());
                }
                assert_eq!(sha256(&path).expect("sum"), *sum);
                // A hello of several segments.
                let mut command = apps.ns("client").command("openssl");
                command.args(["s_client", "-connect"]).arg(match at {
                    SocketAddr::V4(_) => at.to_string(),
                    SocketAddr::V6(v6) => format!("[{}]:{}", v6.ip(), v6.port()),
                });
                command.args(["-servername", "a.example", "-alpn", long]);
                let out = output_with_input(&mut command, b"Q\n", Duration::from_secs(40)).expect("openssl");
                let shook = Handshake::of(&out);
                assert_eq!(shook.version, "TLSv1.3", "{}\n{}", shook.text, daemon.report());
            });
        }
    });
}
