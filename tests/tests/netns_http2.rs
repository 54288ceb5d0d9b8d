//! HTTP/2 and gRPC with real programs: over intercepted TLS, and in clear text.

use std::{net::SocketAddr, path::Path};

use palisade_testbed::{
    Ns, output,
    topology::FAMILIES,
    web::{Caddy, Counted, Curl, Web, curl, h2load, random_file, sha256},
};
use palisade_tests::{
    OPEN,
    fixtures::{
        apps::policy,
        intercept::{Lab, RULES, lab},
        python::{GrpcServer, grpc, grpc_js, node, packages},
    },
};

const HTTPS: u16 = 443;
const CLEAR: u16 = 80;
const DENIED: &str = "Access denied";
/// Contents of an entry of `toPorts` without TLS. The proxy terminates connections only because a rule adds a field.
const CLEAR_RULES: &str = "      rules:
        http:
        - method: \"GET|HEAD|POST|PUT\"
          path: \"/allowed.*\"
          headerMatches: [{name: X-Added, value: by-policy, mismatch: ADD}]
";

/// Contents of an entry of `toPorts`: gRPC calls other than the denied ones.
fn grpc_rules(tls: bool) -> String {
    let plain = "      rules:\n        http: [{method: \"POST\", path: \"/allowed.*\"}]\n";
    let rules = if tls { RULES } else { plain };
    let methods = "/test\\\\.Echo/(Unary|Large|Wait|Fail|Count|Sum|Tick)";
    rules
        .replace("GET|HEAD|POST|PUT", "POST")
        .replace("/allowed.*", methods)
}

/// Requests many paths on one connection with curl, up to fifty at the same time.
fn parallel(lab: &Lab, at: SocketAddr, paths: &[String]) -> Curl {
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    let write = "%{stderr}\nstatus:%{http_code} %{http_version} %{num_connects}\n";
    let more = ["--http2", "-Z", "--parallel-max", "50", "-w", write];
    lab.ask_within(OPEN, "client", "www.web.example", at, &paths, &more)
}

#[test]
fn denied_streams_leave_the_others_of_their_connection_alone() {
    let lab = lab();
    let web = Web::start_http2(lab.apps.ns("internet"), "nginx", &[], &[HTTPS], &lab.server).expect("nginx");
    let daemon = lab.client_only(&[HTTPS], RULES);
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        let paths: Vec<String> = (0..200)
            .map(|n| format!("/{}/{n}", if n % 2 == 0 { "allowed" } else { "denied" }))
            .collect();
        let got = parallel(&lab, at, &paths);
        let count = |line: &str| got.error.lines().filter(|l| l.starts_with(line)).count();
        assert!(
            got.code == 0
                && (count("status:200 2 "), count("status:403 2 ")) == (100, 100)
                && got.body.matches("hello from nginx").count() == 100
                // Answers in the server's place have a body as long as the connection window has room for it.
                && got.body.contains(DENIED),
            "{got:?}\n{}",
            daemon.report()
        );
    }
    let seen = web.seen();
    assert!(
        seen.len() == 200
            && seen
                .iter()
                .all(|seen| seen.request.starts_with("GET /allowed/") && seen.request.ends_with("HTTP/2.0")),
        "{seen:?}"
    );
}

#[test]
fn transfers_over_http2_are_complete_in_both_directions() {
    let lab = lab();
    let web = Web::start_http2(lab.apps.ns("internet"), "nginx", &[], &[HTTPS], &lab.server).expect("nginx");
    let rules = RULES.replace("/allowed.*", "/files/ok-.*");
    let daemon = lab.client_only(&[HTTPS], &rules);
    let dir = lab.apps.topology.dir();
    let (up, down) = (dir.join("up"), web.files().join("ok-down"));
    for file in [&up, &down] {
        random_file(file, 20_000_000).expect("file");
    }
    let sum = |path: &Path| sha256(path).expect("sum");
    for (n, family) in FAMILIES.into_iter().enumerate() {
        let at = lab.apps.at("internet", family, HTTPS);
        let (from, to) = (up.display().to_string(), dir.join("got").display().to_string());
        let path = format!("/files/ok-up-{n}");
        let got = lab.ask("client", "www.web.example", at, &path, &["--http2", "-T", &from]);
        assert!([201, 204].contains(&got.status), "{got:?}\n{}", daemon.report());
        assert_eq!(sum(&web.files().join(&path[7..])), sum(&up));
        let got = lab.ask(
            "client",
            "www.web.example",
            at,
            "/files/ok-down",
            &["--http2", "-o", &to],
        );
        assert_eq!(got.status, 200, "{got:?}\n{}", daemon.report());
        assert_eq!(sum(&dir.join("got")), sum(&down));
        // A denied upload is far larger than the connection window, which the next upload needs again.
        let (denied, allowed) = (format!("/files/no-{n}"), format!("/files/ok-again-{n}"));
        let uploads = ["--http2", "-T", &from, "-T", &from, "-T", &from];
        let got = lab.ask_within(
            OPEN,
            "client",
            "www.web.example",
            at,
            &[&denied, &denied, &allowed],
            &uploads,
        );
        let statuses: Vec<&str> = got
            .error
            .lines()
            .filter_map(|line| line.strip_prefix("status:"))
            .collect();
        assert_eq!(statuses, ["403", "403", "201"], "{got:?}\n{}", daemon.report());
        assert_eq!(sum(&web.files().join(&allowed[7..])), sum(&up));
    }
    let names: Vec<String> = std::fs::read_dir(web.files())
        .expect("files")
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    assert!(!names.iter().any(|name| name.starts_with("no-")), "{names:?}");
}

/// Asserts that 1,000 requests by h2load, 50 at a time on each of four connections, have the same result.
#[track_caller]
fn counts(ns: &Ns, what: &str, url: &str, more: &[&str], other_status: u64) {
    let args = [&["-n", "1000", "-c", "4", "-m", "50", "-t", "1"], more, &[url]].concat();
    let got = h2load(ns, &args).expect("h2load");
    let expected = Counted {
        answered: 1_000,
        other_status,
        failed: 0,
    };
    assert_eq!(got, expected, "{what} {url}");
}

#[test]
fn h2load_loses_no_request() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let web = Web::start_http2(internet, "nginx", &[], &[HTTPS], &lab.server).expect("nginx");
    let _daemon = lab.client_only(&[HTTPS], RULES);
    let data = lab.apps.topology.dir().join("data");
    random_file(&data, 3_000).expect("file");
    let data = format!("--data={}", data.display());
    let ns = lab.apps.ns("client");
    for family in FAMILIES {
        let to = format!("--connect-to={}", lab.apps.at("internet", family, HTTPS));
        counts(ns, "GET", "https://www.web.example/allowed", &[&to], 0);
        counts(ns, "GET", "https://www.web.example/denied", &[&to], 1_000);
        counts(ns, "POST", "https://www.web.example/allowed", &[&to, &data], 0);
        counts(ns, "POST", "https://www.web.example/denied", &[&to, &data], 1_000);
    }
    let seen = web.seen();
    assert!(
        seen.len() == 4_000 && seen.iter().all(|seen| seen.request.contains(" /allowed ")),
        "{}",
        seen.len()
    );
}

/// Actions of the gRPC client, and what each prints behind intercepting rules.
const CALLS: [(&str, &str); 7] = [
    ("kinds", "ok"),
    ("large", "ok"),
    ("deadline", "DEADLINE_EXCEEDED"),
    ("cancel", "CANCELLED"),
    ("fail", "NOT_FOUND|no such thing: 100 %|from the server"),
    ("denied", "12 PERMISSION_DENIED"),
    ("many", "100 100"),
];

/// What the gRPC client in JavaScript prints.
const CALLS_JS: &str = "kinds ok
large ok
deadline 4
cancel 1
fail 5|no such thing: 100 %|from the server
denied 12 7
";

fn grpc_calls(tls: bool) {
    packages().expect("the packages");
    let lab = lab();
    let certificate = tls.then_some(&lab.server);
    let server = GrpcServer::start(
        lab.apps.ns("internet"),
        HTTPS,
        &lab.apps.both("internet"),
        certificate,
    )
    .expect("server");
    let mut settings = lab.settings();
    if !tls {
        settings.tables.push_str("[http]\nclear_text_http2 = true\n");
    }
    let text = policy("client", "egress", &[HTTPS], &grpc_rules(tls));
    let daemon = lab.daemon(&settings, &[("client.yaml", &text)]);
    let ca = tls.then_some(lab.ours.cert.as_path());
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        let actions = CALLS.map(|(action, _)| action);
        let said = grpc(lab.apps.ns("client"), "api.web.example", ca, at, &actions).expect("client");
        let expected: String = CALLS
            .iter()
            .map(|(action, result)| format!("{action} {result}\n"))
            .collect();
        assert_eq!(said, expected, "{}", daemon.report());
        let said = grpc_js(lab.apps.ns("client"), "api.web.example", ca, at).expect("node");
        assert_eq!(said, CALLS_JS, "{}", daemon.report());
        if let Some(ca) = ca {
            let said = node(lab.apps.ns("client"), "api.web.example", ca, at).expect("node");
            assert_eq!(
                said,
                "allowed 30\ndenied 30\nping ok\nafter 1\n",
                "{}",
                daemon.report()
            );
        }
    }
    let calls = server.calls();
    assert!(!calls.iter().any(|call| call.starts_with("Denied")), "{calls:?}");
    // The server learns that a caller has given up: at its deadline, and when it cancels.
    let count = |line: &str| calls.iter().filter(|call| *call == line).count();
    assert_eq!((count("waiting"), count("given up")), (8, 8), "{calls:?}");
    // The flow records name the methods, with their verdicts.
    for (verdict, path) in [("FORWARDED", "/test.Echo/Sum"), ("DROPPED", "/test.Echo/Denied")] {
        daemon
            .wait_flows(&["--type", "l7"], path, |flows| {
                flows
                    .iter()
                    .any(|flow| flow["verdict"] == verdict && flow["l7"].to_string().contains(path))
            })
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    }
}

#[test]
fn grpc_calls_of_every_kind_over_intercepted_tls() {
    grpc_calls(true);
}

#[test]
fn grpc_calls_of_every_kind_in_clear_text() {
    grpc_calls(false);
}

#[test]
fn a_server_that_refuses_connections_is_reported_over_http2_and_grpc() {
    packages().expect("the packages");
    let lab = lab();
    let client = lab.apps.ns("client");
    // Nothing listens at these ports.
    let rules = |port, tls| {
        policy("client", "egress", &[port], &grpc_rules(tls)).replace("-egress", &format!("-{port}"))
    };
    let mut settings = lab.settings();
    settings.tables.push_str("[http]\nclear_text_http2 = true\n");
    let daemon = lab.daemon(
        &settings,
        &[
            ("tls.yaml", &rules(HTTPS, true)),
            ("clear.yaml", &rules(CLEAR, false)),
        ],
    );
    for family in FAMILIES {
        let write = "%{stderr}\nstatus:%{http_code}\nversion:%{http_version}\n";
        let path = "/test.Echo/Unary";
        let at = lab.apps.at("internet", family, HTTPS);
        let clear = lab.apps.at("internet", family, CLEAR);
        let url = format!("http://{clear}{path}");
        let more = ["-i", "--http2-prior-knowledge", "-d", "", "-w", write, &url];
        let got = curl(client, &more, OPEN).expect("curl");
        let header = got
            .body
            .lines()
            .find(|line| line.starts_with("x-palisade-error:"));
        assert!(
            got.status == 503
                && got.error.contains("version:2")
                && header.is_some_and(|header| header.contains("refused")),
            "{got:?}\n{}",
            daemon.report()
        );
        // Clients that offer only HTTP/2, which the proxy selects without the server.
        let mut command = client.command("nghttp");
        command.args(["-v", "--data=/dev/null", &format!("https://{at}{path}")]);
        let out = output(&mut command, OPEN).expect("nghttp");
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(
            said.contains(":status: 503") && said.contains("x-palisade-error: connection refused"),
            "{said}\n{}",
            daemon.report()
        );
        for (at, ca) in [(at, Some(lab.ours.cert.as_path())), (clear, None)] {
            let said = grpc(client, "api.web.example", ca, at, &["echo"]).expect("client");
            assert!(
                // Not the message of the library about a connection of its own.
                said.starts_with("echo UNAVAILABLE: ")
                    && said.contains("connection refused")
                    && !said.contains("failed to connect"),
                "{said}\n{}",
                daemon.report()
            );
        }
    }
}

#[test]
fn http2_in_clear_text_by_prior_knowledge_and_by_upgrade() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let web = Web::start_http2(internet, "nginx", &[CLEAR], &[], &lab.server).expect("nginx");
    let _caddy = Caddy::start_http2(internet, "caddy", 8080, 8443, &lab.server).expect("caddy");
    let daemon = lab.client_only(&[CLEAR, 8080], CLEAR_RULES);
    let client = lab.apps.ns("client");
    for family in FAMILIES {
        for (port, server) in [(CLEAR, "nginx"), (8080, "caddy")] {
            let at = lab.apps.at("internet", family, port);
            for (path, status) in [("/allowed", 200), ("/denied", 403)] {
                let url = format!("http://{at}{path}");
                let write = "%{stderr}\nstatus:%{http_code}\nversion:%{http_version}\n";
                let args = ["--http2-prior-knowledge", "-w", write, &url];
                let got = curl(client, &args, OPEN).expect("curl");
                let body = if status == 200 { "hello from" } else { DENIED };
                assert!(
                    got.status == status && got.body.contains(body) && got.error.contains("version:2"),
                    "{server} {path}: {got:?}\n{}",
                    daemon.report()
                );
            }
        }
        // caddy would accept the upgrade to HTTP/2: no request may pass unread behind it.
        let at = lab.apps.at("internet", family, 8080);
        let (allowed, denied) = (format!("http://{at}/allowed"), format!("http://{at}/denied"));
        let got = curl(client, &["--http2", &denied], OPEN).expect("curl");
        assert_eq!(got.status, 403, "{got:?}\n{}", daemon.report());
        let got = curl(client, &["--http2", &allowed, &denied], OPEN).expect("curl");
        assert!(
            !got.body.contains("hello from caddy\nhello from caddy\n"),
            "{got:?}\n{}",
            daemon.report()
        );
        let url = format!("http://{}/allowed", lab.apps.at("internet", family, CLEAR));
        counts(client, "h2c", &url, &[], 0);
        let url = format!("http://{}/denied", lab.apps.at("internet", family, CLEAR));
        counts(client, "h2c", &url, &[], 1_000);
    }
    let seen = web.seen();
    assert!(
        seen.len() == 2_002 && seen.iter().all(|seen| seen.request.starts_with("GET /allowed ")),
        "{}",
        seen.len()
    );
}

#[test]
fn nghttp_in_clear_text() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let web = Web::start_http2(internet, "nginx", &[CLEAR], &[], &lab.server).expect("nginx");
    let _caddy = Caddy::start_http2(internet, "caddy", 8080, 8443, &lab.server).expect("caddy");
    let daemon = lab.client_only(&[CLEAR, 8080], CLEAR_RULES);
    let body = lab.apps.topology.dir().join("body");
    random_file(&body, 100_000).expect("file");
    let body = format!("--data={}", body.display());
    let run = |args: &[&str]| {
        let mut command = lab.apps.ns("client").command("nghttp");
        let out = output(command.arg("-v").args(args), OPEN).expect("nghttp");
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    for family in FAMILIES {
        let url = |port: u16, path: &str| format!("http://{}{path}", lab.apps.at("internet", family, port));
        let (allowed, denied) = (url(CLEAR, "/allowed/x"), url(CLEAR, "/denied/x"));
        // nghttp requests equal URLs once.
        let other = url(CLEAR, "/allowed/y");
        for args in [
            &[][..],
            &["--trailer=x-end: 1", &body],
            &["--continuation"],
            &["--padding=100", "--no-dep"],
        ] {
            let said = run(&[args, &[&allowed, &denied, &other]].concat());
            assert_eq!(
                (
                    said.matches(":status: 200").count(),
                    said.matches(":status: 403").count()
                ),
                (2, 1),
                "{args:?}: {said}\n{}",
                daemon.report()
            );
        }
        // Whether the upgrade is refused or read: behind it the rules apply.
        let said = run(&["-u", &url(8080, "/denied"), &url(8080, "/denied/more")]);
        assert!(!said.contains("hello from"), "{said}\n{}", daemon.report());
        let said = run(&["-u", &url(8080, "/allowed"), &url(8080, "/denied/more")]);
        assert!(
            said.matches("hello from").count() <= 1,
            "{said}\n{}",
            daemon.report()
        );
    }
    let seen = web.seen();
    assert!(
        seen.len() == 16 && seen.iter().all(|seen| seen.request.contains(" /allowed/")),
        "{seen:?}"
    );
}
