//! Attackers behind HTTP rules: each request that a server parses must be one that was inspected.

use std::{
    fs,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon, Process,
    daemon::Settings,
    topology::FAMILIES,
    web::{Caddy, Talk, Web, curl},
};
use palisade_tests::{
    OPEN,
    fixtures::{
        apps::{Apps, apps},
        nasty::{HIDDEN, http1},
    },
    setup::{client_only, client_only_with},
};

const WEB: u16 = 80;
const CARELESS: u16 = 8081;
const CADDY: u16 = 8082;
const PORTS: &[u16] = &[WEB, CARELESS, CADDY];

/// Any method below `/allowed`.
const RULES: &str = "      rules:
        http:
        - {path: \"/allowed(/.*)?\"}
";
const DENIED: &str = "Access denied\r\n";

/// A server that parses requests in the ways that known attacks on firewalls rely on.
struct Careless {
    _process: Process,
    log: std::path::PathBuf,
}

impl Careless {
    fn start(apps: &Apps) -> Self {
        let dir = apps.topology.dir();
        let (script, log) = (dir.join("careless.py"), dir.join("careless.requests"));
        fs::write(&script, include_str!("careless.py")).expect("script");
        let mut command = apps.ns("internet").command("python3");
        command
            .arg(&script)
            .arg(&log)
            .arg(CARELESS.to_string())
            .args(apps.both("internet").map(|address| address.to_string()));
        let process = Process::spawn("careless", command, dir).expect("python3");
        let begin = Instant::now();
        while !process.log().contains("ready") {
            assert!(begin.elapsed() < Duration::from_secs(60), "{}", process.log());
            thread::sleep(Duration::from_millis(20));
        }
        Self {
            _process: process,
            log,
        }
    }

    fn noted(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits for a line of the log.
    #[track_caller]
    fn expect(&self, line: &str, daemon: &Daemon) {
        let begin = Instant::now();
        while !self.noted().iter().any(|noted| noted.contains(line)) {
            assert!(
                begin.elapsed() < OPEN,
                "no '{line}' in {:?}\n{}",
                self.noted(),
                daemon.report()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Sends bytes at once on a new connection. Returns what the server sent until it is silent or the connection ends.
fn said(apps: &Apps, to: SocketAddr, bytes: &[u8]) -> String {
    let mut talk = Talk::open(apps.ns("client"), to, OPEN).expect("connection");
    if talk.send(bytes).is_ok() {
        // A reset ends the connection like a FIN.
        let _ = talk.receive(Duration::from_millis(400), |_| false);
    }
    talk.text()
}

#[test]
fn every_request_that_a_server_parses_was_inspected() {
    let apps = apps();
    let web = Web::start(apps.ns("internet"), "internet", &[WEB], &[], &apps.certificate).expect("nginx");
    let careless = Careless::start(&apps);
    let _caddy = Caddy::start(apps.ns("internet"), "caddy", CADDY, 8443, &apps.certificate).expect("caddy");
    let daemon = client_only(&apps, PORTS, RULES);
    let streams = http1("x");
    for family in FAMILIES {
        thread::scope(|scope| {
            for port in PORTS {
                let (apps, streams, at) = (&apps, &streams, apps.at("internet", family, *port));
                // Four threads, because most of the time is spent waiting for silence.
                for part in 0..4 {
                    scope.spawn(move || {
                        for stream in streams.iter().skip(part).step_by(4) {
                            let answers = said(apps, at, stream);
                            assert!(
                                !answers.contains("denied/") && answers.matches("HTTP/1.1 200").count() <= 1,
                                "{at}: {:?}: {answers}",
                                String::from_utf8_lossy(stream)
                            );
                        }
                    });
                }
            }
        });
    }
    // The logs of both servers list the requests that they parsed; the flow log lists the inspected requests.
    let evaluated: Vec<String> = daemon
        .flows(&["--protocol", "http", "--verdict", "FORWARDED", "--reply", "false"])
        .expect("flows")
        .iter()
        .map(|flow| flow["l7"]["http"]["url"].as_str().unwrap_or_default().to_owned())
        .collect();
    assert!(evaluated.len() > 20, "{evaluated:?}");
    let seen = web.seen().into_iter().map(|seen| seen.request);
    let noted = careless.noted();
    let noted = noted
        .iter()
        .filter_map(|line| line.strip_prefix("request ").map(str::to_owned));
    let all: Vec<String> = seen.chain(noted).collect();
    assert!(all.len() > 20, "{all:?}");
    for request in all {
        let path = request.split(' ').nth(1).unwrap_or_default();
        assert!(
            path.contains("/allowed/") && evaluated.iter().any(|url| url.ends_with(path)),
            "{request} was not inspected: {evaluated:?}\n{}",
            daemon.report()
        );
    }
}

#[test]
fn a_get_may_have_a_body_if_configured() {
    let apps = apps();
    let careless = Careless::start(&apps);
    let body = "{\"query\": {}}";
    for (text, passes) in [("", false), ("[http]\nget_bodies = \"allow\"\n", true)] {
        let settings = Settings {
            tables: text.into(),
            ..Settings::default()
        };
        let daemon = client_only_with(&apps, &settings, PORTS, RULES);
        for family in FAMILIES {
            let url = format!("http://{}/allowed/_search", apps.at("internet", family, CARELESS));
            let got = curl(apps.ns("client"), &["-X", "GET", "-d", body, &url], OPEN).expect("curl");
            assert_eq!(
                got.status,
                if passes { 200 } else { 400 },
                "{got:?}\n{}",
                daemon.report()
            );
        }
    }
    drop(careless);
}

#[test]
fn a_server_that_accepts_an_upgrade_other_than_the_first_is_reset() {
    let apps = apps();
    let careless = Careless::start(&apps);
    let daemon = client_only(&apps, PORTS, RULES);
    let behind = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nDELETE /denied";
    for family in FAMILIES {
        let at = apps.at("internet", family, CARELESS);
        for fields in [
            "Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n",
            "Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\nUpgrade: websocket, h2c\r\n",
            "Connection: Upgrade\r\nUpgrade: h2c\r\n",
            "Upgrade: h2c\r\n",
            "Up-grade: h2c\r\n",
        ] {
            let head = format!("GET /allowed/up HTTP/1.1\r\nHost: x\r\n{fields}\r\n");
            let mut talk = Talk::open(apps.ns("client"), at, OPEN).expect("connection");
            talk.send(format!("{head}{behind}").as_bytes())
                .expect("a request");
            // Until the connection ends, or for as long as a server needs that has accepted the other protocol.
            let _ = talk.receive(Duration::from_secs(6), |_| false);
            assert!(
                !talk.text().contains("101"),
                "{fields}: {}\n{}",
                talk.text(),
                daemon.report()
            );
        }
        let head = "GET /allowed/ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        let mut talk = Talk::open(apps.ns("client"), at, OPEN).expect("connection");
        talk.send(format!("{head}frames {family:?}").as_bytes())
            .expect("a request");
        talk.receive(OPEN, |heard| heard.ends_with(b"\r\n\r\n"))
            .expect("101");
        assert!(
            talk.text().starts_with("HTTP/1.1 101"),
            "{}\n{}",
            talk.text(),
            daemon.report()
        );
        careless.expect(&format!("behind websocket b'frames {family:?}"), &daemon);
    }
    let noted = careless.noted();
    assert!(
        !noted.iter().any(|line| line.starts_with("behind h2c")),
        "{noted:?}"
    );
}

#[test]
fn the_end_of_an_upload_arrives_before_a_denied_request_in_its_packet_is_refused() {
    let apps = apps();
    let careless = Careless::start(&apps);
    let daemon = client_only(&apps, PORTS, RULES);
    for family in FAMILIES {
        let at = apps.at("internet", family, CARELESS);
        for (size, how) in [
            (100, "late"),
            (100, "early"),
            (400_000, "late"),
            (400_000, "early"),
        ] {
            let path = format!("/allowed/{family:?}-{size}/{how}");
            let head = format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n");
            let body = vec![b'x'; size];
            let (first, last) = body.split_at(size - 50);
            let mut talk = Talk::open(apps.ns("client"), at, OPEN).expect("connection");
            talk.send(&[head.as_bytes(), first].concat()).expect("an upload");
            if how == "early" {
                talk.receive(OPEN, |heard| heard.ends_with(b"ok\n"))
                    .expect("an early answer");
            }
            thread::sleep(Duration::from_millis(150));
            talk.send(&[last, HIDDEN.as_bytes()].concat()).expect("the end");
            let ended = talk.receive_all(OPEN).expect("answers");
            let text = talk.text();
            assert!(
                ended && text.starts_with("HTTP/1.1 200") && text.ends_with(DENIED),
                "{path}: {text}\n{:?}\n{}",
                careless.noted(),
                daemon.report()
            );
            careless.expect(&format!("body {path} {size}"), &daemon);
        }
    }
    assert!(!careless.noted().iter().any(|line| line.contains("denied")));
}

#[test]
fn an_oversized_head_gets_its_own_status_code() {
    let apps = apps();
    let _careless = Careless::start(&apps);
    let daemon = client_only(&apps, PORTS, RULES);
    let long = "a".repeat(20_000);
    for family in FAMILIES {
        let at = apps.at("internet", family, CARELESS);
        let field = format!("X-Long: {long}");
        for (args, path, status) in [
            (&["-H", field.as_str()][..], "/allowed/a".to_owned(), 431),
            (&[], format!("/allowed/{long}"), 414),
        ] {
            let url = format!("http://{at}{path}");
            let got = curl(apps.ns("client"), &[args, &[&url]].concat(), OPEN).expect("curl");
            assert_eq!(got.status, status, "{got:?}\n{}", daemon.report());
        }
    }
}
