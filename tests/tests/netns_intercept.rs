//! TLS interception with real programs: clients trust only the authority of the interception, and only the
//! interception trusts the authority of the servers.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Output,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        signal::{Signal, kill},
    },
    unistd::Pid,
};
use palisade_testbed::{
    Daemon, Outcome, Topology,
    daemon::Settings,
    dns::Server,
    ns::wait_until,
    probe::udp,
    process::output_with_input,
    server::Program,
    tls::{Handshake, certificate},
    topology::{FAMILIES, Family},
    web::{Caddy, Counted, Curl, Peer, Talk, Web, curl, h2load, random_file, sha256},
};
use palisade_tests::{
    CLOSED, OPEN,
    fixtures::{
        apps::{borrowed, policy},
        intercept::{HOSTS, Lab, RULES, Secrets, lab},
        pki::{Authority, Validity},
        python::{GrpcServer, Load, NodeServer, fault_peer, grpc, hold, packages, same_port, session},
        s3::{Aws, S3},
    },
    setup::{TCX, XDP_AND_CLSACT, XDP_AT_THE_NIC, daemon_with, tables},
};
use serde_json::Value;

const HTTPS: u16 = 443;
const OTHER: u16 = 8443;
const DENIED: &str = "Access denied";
/// Longest time of a request that the proxy itself ends after a timeout of its own.
const SLOW: Duration = Duration::from_secs(25);

#[track_caller]
fn is_denied(what: &str, got: &Curl, daemon: &Daemon) {
    assert!(
        got.status == 403 && got.body.contains(DENIED),
        "{what}: {got:?}\n{}",
        daemon.report()
    );
}

/// Starts the server that notes its requests, in the internet.
fn peer_at(lab: &Lab, port: u16) -> Peer {
    let addresses = lab.apps.both("internet");
    Peer::start_tls(lab.apps.ns("internet"), port, &addresses, &lab.server).expect("peer")
}

/// Asserts that a request has failed at the server's side, and that the client, flows, `clusters` and log name the reason.
#[track_caller]
fn is_reported(lab: &Lab, daemon: &Daemon, name: &str, at: SocketAddr, words: &[&str]) {
    is_reported_as(503, lab, daemon, name, at, words);
}

/// As [`is_reported`], with the status of the answer.
#[track_caller]
fn is_reported_as(status: u16, lab: &Lab, daemon: &Daemon, name: &str, at: SocketAddr, words: &[&str]) {
    let got = lab.ask_within(SLOW, "client", name, at, &["/allowed/why"], &["-i"]);
    let told = |text: &str| words.iter().any(|word| text.to_lowercase().contains(word));
    let header = got
        .body
        .lines()
        .find(|line| line.to_lowercase().starts_with("x-palisade-error:"));
    assert!(
        got.status == status && header.is_some_and(told),
        "{name} {at}, expected one of {words:?}: {got:?}\n{}",
        daemon.report()
    );
    let body = got.body.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    assert!(told(body), "{name} {at}: {got:?}");
    let address = at.ip().to_string();
    is_noted(daemon, name, &told);
    // The other family can have failed before in the same way.
    let flows = daemon.wait_flows(
        &["--type", "l7", "--to-ip", &address],
        "a flow to the address",
        |flows| {
            flows.iter().any(|flow| {
                let text = flow.to_string();
                text.contains(name) && told(&text)
            })
        },
    );
    flows.unwrap_or_else(|error| panic!("{name} {at}: {error:#}\n{}", daemon.report()));
    let clusters = daemon.json(&["intercept", "clusters"]).expect("clusters");
    let row = clusters
        .as_array()
        .into_iter()
        .flatten()
        .find(|row| row["name"] == name && row["address"] == at.to_string());
    assert!(
        row.is_some_and(
            |row| told(&row["failures_by_reason"].to_string()) || told(&row["last_failure"].to_string())
        ),
        "{name} {at}: {clusters:#}"
    );
}

/// Asserts that flows, `clusters` and log name the failure of a server.
#[track_caller]
fn is_noted(daemon: &Daemon, name: &str, told: &dyn Fn(&str) -> bool) {
    // A thread of the proxy logs at most ten failures per second.
    std::thread::sleep(Duration::from_millis(100));
    let about = |text: &str| text.contains(name) && told(text);
    let flows = daemon.wait_flows(&["--type", "l7"], "a flow that says why", |flows| {
        flows.iter().any(|flow| about(&flow.to_string()))
    });
    flows.unwrap_or_else(|error| panic!("{name}: {error:#}\n{}", daemon.report()));
    let clusters = daemon.json(&["intercept", "clusters"]).expect("clusters");
    assert!(about(&clusters.to_string()), "{name}: {clusters:#}");
    assert!(daemon.log().lines().any(about), "{name}: {}", daemon.log());
}

/// Runs `openssl s_client` from the client.
fn s_client(lab: &Lab, to: SocketAddr, args: &[&str]) -> Handshake {
    let at = match to {
        SocketAddr::V4(_) => to.to_string(),
        SocketAddr::V6(v6) => format!("[{}]:{}", v6.ip(), v6.port()),
    };
    let mut command = lab.apps.ns("client").command("openssl");
    command
        .args(["s_client", "-connect", &at, "-CAfile"])
        .arg(&lab.ours.cert)
        .args(args);
    Handshake::of(&output_with_input(&mut command, b"Q\n", OPEN).expect("openssl"))
}

// --- the story -----------------------------------------------------------------------------------------------------

/// Egress of `client`: DNS to the internet, and the bucket `data` without deletion.
const S3_POLICY: &str = r#"apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: s3}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns: [{matchPattern: "*"}]
  - toFQDNs:
    - matchPattern: "*.s3.test"
    - matchPattern: "*.s3v6.test"
    toPorts:
    - ports: [{port: "443", protocol: TCP}]
      serverNames: ["*.s3.test", "*.s3v6.test"]
      terminatingTLS: {secret: {namespace: default, name: shown}}
      originatingTLS: {secret: {namespace: default, name: trusted}}
      rules:
        http:
        - {method: "GET|HEAD|PUT", host: "(data|unknown|expired|other)\\.s3(v6)?\\.test"}
"#;
/// Addresses of the S3 service, and of a server that only some other names lead to.
const S3_AT: [&str; 2] = ["203.0.113.80", "2001:db8:a::80"];
const OTHERS_AT: [&str; 2] = ["203.0.113.81", "2001:db8:a::81"];

#[test]
fn aws_cli_uses_the_allowed_bucket_and_shows_why_a_server_refuses() {
    packages().expect("the packages");
    let topology = Topology::new()
        .expect("topology")
        .apps(&["client"])
        .expect("client");
    let topology = topology
        .internet_addresses(&[S3_AT, OTHERS_AT].concat())
        .expect("addresses");
    topology.meet().expect("neighbours");
    let dir = topology.dir();
    let (root, ours) = (
        Authority::root(dir, "amazon").expect("authority"),
        Authority::root(dir, "interception").expect("authority"),
    );
    let domains = ["s3.test", "s3v6.test"];
    let names = ["s3.test", "*.s3.test", "s3v6.test", "*.s3v6.test"];
    let made = |of: &Authority, name: &str, hosts: &[&str], validity: Validity| {
        of.server(name, hosts, validity, true).expect("certificate")
    };
    let secrets = Secrets::new(dir).expect("secrets");
    secrets
        .identity("shown", &made(&ours, "shown", &names, Validity::Now))
        .expect("secret");
    secrets.trust("trusted", &[&root]).expect("secret");

    let addresses = |texts: [&str; 2]| texts.map(|text| text.parse::<IpAddr>().expect("an address"));
    let s3 = S3::start(
        &topology.internet,
        &addresses(S3_AT),
        &domains,
        &[
            "data.s3.test",
            "secret.s3.test",
            "data.s3v6.test",
            "secret.s3v6.test",
        ],
        &made(&root, "s3", &names, Validity::Now),
    )
    .expect("S3");
    let others = addresses(OTHERS_AT);
    let _others = [
        (others[0], "expired", &names[..], Validity::Expired),
        (others[1], "other", &["www.elsewhere.test"], Validity::Now),
    ]
    .map(|(address, name, hosts, validity)| {
        let certificate = made(&root, name, hosts, validity);
        Peer::start_tls(&topology.internet, HTTPS, &[address], &certificate).expect("server")
    });
    let resolvers = FAMILIES.map(|family| topology.addr("internet", family));
    let mut records = Vec::new();
    for label in ["data", "secret", "unknown"] {
        records.push(format!("{label}.s3.test. 60 IN A {}", S3_AT[0]));
        records.push(format!("{label}.s3v6.test. 60 IN AAAA {}", S3_AT[1]));
    }
    records.push(format!("expired.s3.test. 60 IN A {}", OTHERS_AT[0]));
    records.push(format!("other.s3v6.test. 60 IN AAAA {}", OTHERS_AT[1]));
    let records: Vec<&str> = records.iter().map(String::as_str).collect();
    let _dns = Server::unbound(&topology.internet, &resolvers, &records).expect("unbound");
    let conf = dir.join("resolv.conf");
    fs::write(&conf, format!("nameserver {}\n", resolvers[0])).expect("resolv.conf");

    let settings = tables(&secrets.table("verify_sni_address = true\n"));
    let daemon = daemon_with(&topology, &settings, &[("s3.yaml", S3_POLICY)]);
    let aws = Aws {
        ns: topology.ns("client"),
        conf: conf.clone(),
        ca: &ours.cert,
        dir,
    };
    let run = |domain: &str, args: &[&str]| aws.run(domain, args).expect("aws");
    let said = |out: &Output| format!("{out:?}\n{}", daemon.report());
    let failure = |out: &Output| String::from_utf8_lossy(&out.stderr).into_owned();
    fs::write(dir.join("object"), "the contents\n").expect("object");
    for domain in domains {
        let (put, get) = (
            [
                "s3api",
                "put-object",
                "--bucket",
                "data",
                "--key",
                "k",
                "--body",
                "object",
            ],
            ["s3api", "get-object", "--bucket", "data", "--key", "k", "got"],
        );
        for args in [
            &["s3api", "create-bucket", "--bucket", "data"][..],
            &put,
            &get,
            &["s3api", "head-object", "--bucket", "data", "--key", "k"],
        ] {
            let out = run(domain, args);
            assert!(out.status.success(), "{args:?} {}", said(&out));
        }
        assert_eq!(
            fs::read_to_string(dir.join("got")).expect("got"),
            "the contents\n"
        );
        let listed = run(domain, &["s3", "ls", "s3://data"]);
        assert!(
            listed.status.success() && String::from_utf8_lossy(&listed.stdout).contains(" k"),
            "{}",
            said(&listed)
        );
        let deleted = run(
            domain,
            &["s3api", "delete-object", "--bucket", "data", "--key", "k"],
        );
        assert!(
            !deleted.status.success() && failure(&deleted).contains("403"),
            "{}",
            said(&deleted)
        );
        let other = run(domain, &["s3", "ls", "s3://secret"]);
        assert!(
            !other.status.success() && failure(&other).contains("403"),
            "{}",
            said(&other)
        );
    }
    let requests = s3.requests();
    assert!(requests.len() >= 8, "{requests:?}");
    assert!(
        !requests.iter().any(|line| line.contains("DELETE")),
        "{requests:?}"
    );

    // The check connects to an address that the client has learned by the name.
    let check = |name: &str| daemon.try_cli(&["intercept", "check", name, "--from", "default/client"]);
    for domain in domains {
        let out = check(&format!("data.{domain}")).expect("check");
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(
            out.status.success() && text.contains("CN=s3"),
            "{domain}: {}",
            said(&out)
        );
    }

    // Servers that refuse: a router without the name, and invalid certificates.
    for (name, words) in [
        ("unknown.s3.test", &["reset", "closed"][..]),
        ("unknown.s3v6.test", &["reset", "closed"]),
        ("expired.s3.test", &["expired"]),
        ("other.s3v6.test", &["name"]),
    ] {
        let mut command =
            palisade_testbed::dns::resolving(topology.ns("client"), "curl", &conf).expect("curl");
        command.args(["-sSv", "-m", "20", "--cacert"]).arg(&ours.cert);
        command.arg("-k").arg(format!("https://{name}/k"));
        let out = palisade_testbed::output(&mut command, SLOW).expect("curl");
        let text = String::from_utf8_lossy(&out.stderr).to_lowercase();
        let told = |text: &str| words.iter().any(|word| text.to_lowercase().contains(word));
        let header = text.lines().find(|line| line.starts_with("< x-palisade-error:"));
        assert!(
            text.contains("< http/1.1 503") && header.is_some_and(told),
            "{name}: {}",
            said(&out)
        );
        is_noted(&daemon, name, &told);
        let out = check(name).expect("check");
        assert!(
            out.status.code() == Some(1) && told(&String::from_utf8_lossy(&out.stdout)),
            "{name}: {}",
            said(&out)
        );
    }

    // A name of the policy at an address that the client has learned for another name only.
    let resolved = format!("data.s3.test:443:{}", OTHERS_AT[0]);
    let got = curl(
        topology.ns("client"),
        &["-k", "--resolve", &resolved, "https://data.s3.test/k"],
        OPEN,
    );
    let got = got.expect("curl");
    assert!(got.status == 0 && got.code == 35, "{got:?}\n{}", daemon.report());
}

// --- paths, programs, protocols --------------------------------------------------------------------------------------

/// Paths as (client, server) on which [`Lab::on_all_paths`] intercepts: out of a workload, into one, between two (at both
/// ends), and out of the node.
const PATHS: [(&str, &str); 4] = [
    ("client", "internet"),
    ("internet", "server"),
    ("client", "server"),
    ("node", "internet"),
];

fn every_path(hooks: palisade_testbed::daemon::Hooks) {
    let lab = lab();
    let apps = &lab.apps;
    let peers = ["internet", "server"].map(|name| {
        (
            name,
            Peer::start_tls(apps.ns(name), HTTPS, &apps.both(name), &lab.server).expect("peer"),
        )
    });
    let http2_peers = ["internet", "server"].map(|name| {
        let ports = [8001, OTHER, 8002];
        (
            name,
            NodeServer::start(apps.ns(name), ports, &apps.both(name), &lab.server).expect("peer"),
        )
    });
    let daemon = lab.on_all_paths(hooks, &[HTTPS, OTHER], RULES);
    for family in FAMILIES {
        for (from, to) in PATHS {
            let (_, peer) = peers.iter().find(|(name, _)| *name == to).expect("a peer");
            let (_, http2_peer) = http2_peers.iter().find(|(name, _)| *name == to).expect("a peer");
            let name = format!("{from}.web.example");
            for (port, version, option) in [(HTTPS, "1.1", "--http1.1"), (OTHER, "2", "--http2")] {
                let what = format!("{from} -> {to} {family:?} HTTP/{version}");
                let at = apps.at(to, family, port);
                let path = format!("/allowed/{from}/{family:?}");
                // Both ends' addresses and ports as the client sees them.
                let seen = "%{stderr}\nstatus:%{http_code}\nends:%{local_ip} %{local_port} %{remote_ip} %{remote_port} \
                            %{http_version}\n";
                let got = lab.ask(from, &name, at, &path, &[option, "-w", seen]);
                assert_eq!(got.status, 200, "{what}: {got:?}\n{}", daemon.report());
                let ends = got.error.lines().find_map(|line| line.strip_prefix("ends:"));
                let ends: Vec<&str> = ends.unwrap_or_default().split(' ').collect();
                let [ip, local_port, remote_ip, remote_port, seen_version] = ends[..] else {
                    panic!("{what}: {got:?}");
                };
                assert_eq!(
                    (ip, remote_ip, remote_port, seen_version),
                    (
                        apps.source(from, to, family).to_string().as_str(),
                        at.ip().to_string().as_str(),
                        port.to_string().as_str(),
                        version
                    ),
                    "{what}"
                );
                let requests = if port == HTTPS {
                    peer.requests()
                } else {
                    http2_peer.requests()
                };
                let request = requests.iter().find(|request| request["path"] == path.as_str());
                let request = request.unwrap_or_else(|| panic!("{what}: {requests:?}"));
                assert_eq!(
                    (&request["from"], &request["port"], &request["server_name"]),
                    (
                        &Value::from(ip),
                        &Value::from(local_port.parse::<u16>().expect("a port")),
                        &Value::from(name.as_str())
                    ),
                    "{what}: {request}"
                );
                is_denied(&what, &lab.ask(from, &name, at, "/denied", &[option]), &daemon);
                is_denied(
                    &what,
                    &lab.ask(from, &name, at, "/allowed", &[option, "-X", "DELETE"]),
                    &daemon,
                );
            }
            let at = apps.at(to, family, HTTPS);
            for (path, status, part) in [
                ("/allowed/ws", "HTTP/1.1 101", "echoed 351"),
                ("/denied", "HTTP/1.1 403", DENIED),
            ] {
                let said = peer
                    .websocket_tls(apps.ns(from), at, path, &name, &lab.ours.cert)
                    .expect("websocket");
                assert!(
                    said.starts_with(status) && said.contains(part),
                    "{from} -> {at} {path}: {said}\n{}",
                    daemon.report()
                );
            }
        }
    }
    let requests = peers.iter().map(|(name, peer)| (name, peer.requests()));
    for (name, requests) in requests.chain(http2_peers.iter().map(|(name, peer)| (name, peer.requests()))) {
        assert!(
            !requests.is_empty()
                && requests
                    .iter()
                    .all(|request| request["method"] == "GET" && request["path"] != "/denied"),
            "{name}: {requests:?}"
        );
    }
}

#[test]
fn every_path_keeps_addresses_ports_and_names_with_xdp_at_the_nic() {
    every_path(XDP_AT_THE_NIC);
}

#[test]
fn every_path_keeps_addresses_ports_and_names_with_tcx() {
    every_path(TCX);
}

#[test]
fn every_path_keeps_addresses_ports_and_names_with_xdp_and_clsact() {
    every_path(XDP_AND_CLSACT);
}

#[test]
fn curl_with_nginx_and_caddy_in_every_version() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let web = Web::start_http2(internet, "nginx", &[], &[HTTPS], &lab.server).expect("nginx");
    let _caddy = Caddy::start_http2(internet, "caddy", 8080, OTHER, &lab.server).expect("caddy");
    let daemon = lab.client_only(&[HTTPS, OTHER], RULES);
    for family in FAMILIES {
        for (port, server) in [(HTTPS, "nginx"), (OTHER, "caddy")] {
            let at = lab.apps.at("internet", family, port);
            for (protocol, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
                for tls in [&["--tls-max", "1.2"][..], &["--tlsv1.3"]] {
                    let what = format!("{server} {family:?} {protocol} {tls:?}");
                    let write = "%{stderr}\nstatus:%{http_code}\nversion:%{http_version}\n";
                    let args = [tls, &[protocol, "-w", write]].concat();
                    let got = lab.ask("client", "www.web.example", at, "/allowed", &args);
                    assert!(
                        got.status == 200
                            && got.body == format!("hello from {server}\n")
                            && got.error.contains(&format!("version:{version}\n")),
                        "{what}: {got:?}\n{}",
                        daemon.report()
                    );
                    is_denied(
                        &what,
                        &lab.ask("client", "www.web.example", at, "/denied", &args),
                        &daemon,
                    );
                }
            }
        }
    }
    let seen = web.seen();
    assert!(
        seen.len() == 8
            && seen.iter().all(
                |seen| seen.server_name == "www.web.example" && seen.request.starts_with("GET /allowed ")
            ),
        "{seen:?}"
    );
    for version in ["HTTP/1.1", "HTTP/2.0"] {
        let of = |seen: &&palisade_testbed::web::Seen| seen.request.ends_with(version);
        assert_eq!(seen.iter().filter(of).count(), 4, "{version}: {seen:?}");
    }
}

#[test]
fn openssl_clients_see_the_shown_certificate_and_the_servers_choice() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let _web = Web::start_http2(internet, "nginx", &[], &[HTTPS], &lab.server).expect("nginx");
    let (cert, key) = (
        lab.server.cert.display().to_string(),
        lab.server.key.display().to_string(),
    );
    // A server with one protocol version and one application protocol.
    let at = SocketAddr::new([127, 0, 0, 1].into(), OTHER);
    let args = [
        "s_server",
        "-accept",
        "8443",
        "-cert",
        &cert,
        "-cert_chain",
        &cert,
        "-key",
        &key,
        "-www",
        "-tls1_2",
        "-alpn",
        "http/1.1",
    ];
    let _old = Program::start(internet, "openssl", &args, Some(at)).expect("s_server");
    let daemon = lab.client_only(&[HTTPS, OTHER], RULES);
    for family in FAMILIES {
        let (at, old) = (
            lab.apps.at("internet", family, HTTPS),
            lab.apps.at("internet", family, OTHER),
        );
        for (at, args, version, alpn) in [
            (at, &["-alpn", "h2,http/1.1"][..], "TLSv1.3", "ALPN protocol: h2"),
            (at, &["-alpn", "http/1.1"], "TLSv1.3", "ALPN protocol: http/1.1"),
            (at, &["-tls1_2"], "TLSv1.2", "No ALPN negotiated"),
            // The versions of the two sides do not depend on each other, the application protocols do.
            (
                old,
                &["-alpn", "h2,http/1.1", "-tls1_3"],
                "TLSv1.3",
                "ALPN protocol: http/1.1",
            ),
        ] {
            let args = [&["-servername", "www.web.example", "-verify_return_error"], args].concat();
            let shook = s_client(&lab, at, &args);
            assert!(
                shook.version == version
                    && shook.text.contains(alpn)
                    && shook.text.contains("issuer=CN = interception")
                    && shook.text.contains("Verify return code: 0 (ok)"),
                "{at} {args:?}: {}\n{}",
                shook.text,
                daemon.report()
            );
        }
    }
}

#[test]
fn messages_of_every_kind_pass_in_both_directions() {
    let lab = lab();
    let client = lab.apps.ns("client");
    let peer = peer_at(&lab, HTTPS);
    let daemon = lab.client_only(&[HTTPS], RULES);
    let body = lab.apps.topology.dir().join("body");
    random_file(&body, 700_000).expect("file");
    let sum = sha256(&body).expect("sum");
    let (file, data) = (body.display().to_string(), format!("@{}", body.display()));
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        for (what, args) in [
            ("upload", &["-H", "Expect:", "--data-binary", &data][..]),
            (
                "expectation",
                &["-H", "Expect: 100-continue", "--data-binary", &data],
            ),
            ("chunks", &["-H", "Transfer-Encoding: chunked", "-T", &file]),
        ] {
            let got = lab.ask("client", "www.web.example", at, "/allowed/up", args);
            assert!(
                got.status == 200 && got.body.contains(&sum),
                "{what}: {got:?}\n{}",
                daemon.report()
            );
            is_denied(
                what,
                &lab.ask("client", "www.web.example", at, "/denied/up", args),
                &daemon,
            );
        }
        for (path, status, body) in [
            ("/allowed/nothing", 204, ""),
            ("/allowed/same", 304, ""),
            ("/allowed/hints", 200, "after hints\n"),
            ("/allowed/until-close", 200, "until the end\n"),
            ("/allowed/slow", 200, "slow\n"),
        ] {
            // Twice, so that the second response must be found behind the first where the connection persists.
            let got = lab.ask_within(OPEN, "client", "www.web.example", at, &[path, path], &[]);
            assert!(
                got.code == 0 && got.status == status && got.body == body.repeat(2),
                "{path}: {got:?}\n{}",
                daemon.report()
            );
        }
        let got = lab.ask(
            "client",
            "www.web.example",
            at,
            "/allowed/chunked?40,3000",
            &["-i"],
        );
        assert!(
            got.status == 200 && got.body.matches("AAA").count() > 900 && got.body.contains("X-Sum: "),
            "{got:?}\n{}",
            daemon.report()
        );
        let got = lab.ask_within(
            OPEN,
            "client",
            "www.web.example",
            at,
            &["/allowed/a", "/allowed/b"],
            &["-I"],
        );
        assert!(got.code == 0 && got.status == 200, "{got:?}\n{}", daemon.report());

        let said = peer
            .websocket_tls(client, at, "/allowed/ws", "www.web.example", &lab.ours.cert)
            .expect("websocket");
        assert!(
            said.starts_with("HTTP/1.1 101") && said.contains("echoed 351"),
            "{said}\n{}",
            daemon.report()
        );
        let said = peer
            .websocket_tls(client, at, "/denied/ws", "www.web.example", &lab.ours.cert)
            .expect("websocket");
        assert!(
            said.starts_with("HTTP/1.1 403") && said.contains(DENIED),
            "{said}\n{}",
            daemon.report()
        );
    }
    let requests = peer.requests();
    let denied = |request: &&Value| {
        request["path"]
            .as_str()
            .is_some_and(|path| path.starts_with("/denied"))
    };
    assert!(
        requests.len() > 20 && requests.iter().find(denied).is_none(),
        "{requests:?}"
    );
}

#[test]
fn python_requests_keeps_its_session() {
    packages().expect("the packages");
    let lab = lab();
    let peer = peer_at(&lab, HTTPS);
    let daemon = lab.client_only(&[HTTPS], RULES);
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        let said = session(lab.apps.ns("client"), "api.web.example", &lab.ours.cert, at).expect("session");
        assert_eq!(
            said,
            "get 200\nget 200\nget 200\npost True\nchunks True\nstream 2700000\ndenied 403\ndenied post 403\n\
             method 403\nget 200\n",
            "{}",
            daemon.report()
        );
    }
    let requests = peer.requests();
    assert!(
        requests.iter().all(|request| request["path"]
            .as_str()
            .is_some_and(|p| p.starts_with("/allowed"))),
        "{requests:?}"
    );
    // Requests of one session use one connection until a denied request ends it.
    let port = |n: usize| requests[n]["port"].as_u64();
    assert!(
        port(0).is_some() && (1..6).all(|n| port(n) == port(0)),
        "{requests:?}"
    );
}

#[test]
fn large_transfers_are_complete_in_both_directions() {
    let lab = lab();
    let web = Web::start(lab.apps.ns("internet"), "nginx", &[], &[HTTPS], &lab.server).expect("nginx");
    let daemon = lab.client_only(&[HTTPS], &RULES.replace("/allowed.*", "/files/.*"));
    let dir = lab.apps.topology.dir();
    let (up, down) = (dir.join("up"), web.files().join("down"));
    for file in [&up, &down] {
        random_file(file, 40_000_000).expect("file");
    }
    let sum = |path: &Path| sha256(path).expect("sum");
    for (n, family) in FAMILIES.into_iter().enumerate() {
        let at = lab.apps.at("internet", family, HTTPS);
        let (from, to) = (up.display().to_string(), dir.join("got").display().to_string());
        let path = format!("/files/up-{n}");
        let got = lab.ask("client", "www.web.example", at, &path, &["-T", &from]);
        assert_eq!((got.code, got.status), (0, 201), "{got:?}\n{}", daemon.report());
        assert_eq!(sum(&web.files().join(&path[7..])), sum(&up));
        let got = lab.ask("client", "www.web.example", at, "/files/down", &["-o", &to]);
        assert_eq!((got.code, got.status), (0, 200), "{got:?}\n{}", daemon.report());
        assert_eq!(sum(&dir.join("got")), sum(&down));
    }
}

#[test]
fn sessions_are_resumed_and_early_data_is_not_taken() {
    let lab = lab();
    let peer = peer_at(&lab, HTTPS);
    let daemon = lab.client_only(&[HTTPS], RULES);
    let dir = lab.apps.topology.dir();
    let (session, early) = (dir.join("session").display().to_string(), dir.join("early"));
    fs::write(
        &early,
        "GET /allowed/early HTTP/1.1\r\nHost: www.web.example\r\n\r\n",
    )
    .expect("early data");
    let early = early.display().to_string();
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        for version in ["-tls1_2", "-tls1_3"] {
            let name = ["-servername", "www.web.example", version];
            // Tickets of TLS 1.3 come behind the handshake, so the client waits for a response.
            let request = b"GET /allowed HTTP/1.1\r\nHost: www.web.example\r\nConnection: close\r\n\r\n";
            let run = |args: &[&str]| {
                let mut command = lab.apps.ns("client").command("openssl");
                command.args(["s_client", "-ign_eof", "-connect", &at.to_string(), "-CAfile"]);
                command.arg(&lab.ours.cert).args(name).args(args);
                Handshake::of(&output_with_input(&mut command, request, OPEN).expect("openssl")).text
            };
            let first = run(&["-sess_out", &session]);
            let second = run(&["-sess_in", &session]);
            for text in [&first, &second] {
                assert!(
                    text.contains("HTTP/1.1 200"),
                    "{version}: {text}\n{}",
                    daemon.report()
                );
            }
            if version == "-tls1_3" {
                let third = run(&["-sess_in", &session, "-early_data", &early]);
                assert!(!third.contains("Early data was accepted"), "{third}");
            }
        }
    }
    assert_eq!(peer.requests_for("/allowed/early"), 0);
}

#[test]
fn a_client_certificate_of_the_policy_is_shown_to_the_server() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let workload = lab
        .world
        .server("workload", &["workload.web.example"], Validity::Now, true)
        .expect("certificate");
    lab.secrets.identity("mutual", &workload).expect("secret");
    lab.secrets.trust("mutual", &[&lab.root]).expect("secret");
    let (cert, key, root) = (
        lab.server.cert.display().to_string(),
        lab.server.key.display().to_string(),
        lab.root.cert.display().to_string(),
    );
    let args = [
        "s_server",
        "-accept",
        "443",
        "-cert",
        &cert,
        "-cert_chain",
        &cert,
        "-key",
        &key,
        "-CAfile",
        &root,
        "-Verify",
        "3",
        "-verify_return_error",
        "-www",
    ];
    let _server = Program::start(internet, "openssl", &args, None).expect("s_server");
    let ready = || {
        palisade_testbed::probe::connect(internet, SocketAddr::new([127, 0, 0, 1].into(), HTTPS), OPEN)
            == palisade_testbed::Outcome::Open
    };
    wait_until("s_server accepts connections", OPEN, ready).expect("s_server");
    let rules = RULES.replace(
        "{secret: {namespace: default, name: trusted}}",
        "{secret: {namespace: default, name: mutual}, trustedCA: ca.crt, certificate: tls.crt, privateKey: tls.key}",
    );
    let mut daemon = lab.client_only(&[HTTPS], &rules);
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        let got = lab.ask("client", "www.web.example", at, "/allowed", &["--http1.1"]);
        assert!(
            got.status == 200 && got.body.contains("s_server"),
            "{got:?}\n{}",
            daemon.report()
        );
    }
    let checked = |daemon: &Daemon, family: Family| {
        let address = lab.apps.at("internet", family, HTTPS).ip().to_string();
        let args = [
            "intercept",
            "check",
            "www.web.example",
            "--from",
            "default/client",
            "--address",
            &address,
        ];
        let out = daemon.try_cli(&args).expect("palisade");
        (
            out.status.code(),
            String::from_utf8_lossy(&out.stdout).to_lowercase(),
        )
    };
    for family in FAMILIES {
        let (code, text) = checked(&daemon, family);
        assert!(
            code == Some(0) && text.contains("cn=server"),
            "{family:?}: {text}"
        );
    }
    // Without the certificate the server refuses.
    drop(daemon);
    daemon = lab.client_only(&[HTTPS], RULES);
    for family in FAMILIES {
        is_reported(
            &lab,
            &daemon,
            "www.web.example",
            lab.apps.at("internet", family, HTTPS),
            &["certificate_required", "certificate required", "handshake"],
        );
        let (code, text) = checked(&daemon, family);
        assert!(
            code == Some(1) && text.contains("failed") && text.contains("certificate_required"),
            "{family:?}: {text}"
        );
    }
}

#[test]
fn generated_certificates_name_what_the_client_asks_for() {
    let lab = lab();
    let peer = peer_at(&lab, HTTPS);
    let authority = palisade_testbed::tls::Certificate {
        cert: lab.ours.cert.clone(),
        key: lab.ours.key.clone(),
    };
    lab.secrets.identity("authority", &authority).expect("secret");
    let rules = RULES.replace("name: shown", "name: authority");
    let text = policy("client", "egress", &[HTTPS], &rules);
    let settings = lab.settings_with("interception_ca = \"default/authority\"\n");
    let daemon = lab.daemon(&settings, &[("client.yaml", &text)]);
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        for name in ["one.web.example", "two.web.example", "a.fault.example"] {
            let got = lab.ask("client", name, at, "/allowed", &[]);
            assert_eq!(got.status, 200, "{name}: {got:?}\n{}", daemon.report());
            is_denied(name, &lab.ask("client", name, at, "/denied", &[]), &daemon);
            let shook = s_client(
                &lab,
                at,
                &[
                    "-servername",
                    name,
                    "-verify_hostname",
                    name,
                    "-verify_return_error",
                ],
            );
            assert!(
                shook.text.contains("Verify return code: 0 (ok)"),
                "{}",
                shook.text
            );
        }
    }
    assert_eq!(peer.requests_for("/denied"), 0);
}

#[test]
fn datagrams_of_quic_are_denied_so_that_clients_use_tcp() {
    // Initial packets of QUIC have at least 1,200 bytes (RFC 9000, section 14.1).
    const INITIAL: usize = 1_200;
    const QUIC_DENIED: u8 = 208;
    const EVERYTHING: &str = "  - toEntities: [all]\n";
    let lab = lab();
    let intercepted = policy("client", "egress", &[HTTPS], RULES);
    // Also beside a rule that allows every port.
    for more in ["", EVERYTHING] {
        let file = intercepted.clone() + more;
        let daemon = lab.daemon(&lab.settings(), &[("client.yaml", &file)]);
        for family in FAMILIES {
            let at = lab.apps.at("internet", family, HTTPS);
            let outcome = udp(lab.apps.ns("client"), None, at, INITIAL, CLOSED);
            assert_eq!(outcome, Outcome::TimedOut, "{family:?} {more}");
            let to = at.ip().to_string();
            let flows = daemon.wait_flows(
                &["--verdict", "dropped", "--protocol", "udp", "--to-ip", &to],
                "the drop",
                |flows| flows.iter().any(|flow| flow["drop_reason"] == QUIC_DENIED),
            );
            flows.unwrap_or_else(|error| panic!("{family:?}: {error:#}\n{}", daemon.report()));
        }
    }
    // For a server, too: what its policy intercepts at its port is not open to QUIC.
    let daemon = lab.daemon(
        &lab.settings(),
        &[(
            "server.yaml",
            &(policy("server", "ingress", &[HTTPS], RULES) + "  - fromEntities: [all]\n"),
        )],
    );
    for family in FAMILIES {
        let at = lab.apps.at("server", family, HTTPS);
        let outcome = udp(lab.apps.ns("internet"), None, at, INITIAL, CLOSED);
        assert_eq!(outcome, Outcome::TimedOut, "{family:?}\n{}", daemon.report());
        let beside = lab.apps.at("server", family, HTTPS + 1);
        let outcome = udp(lab.apps.ns("internet"), None, beside, INITIAL, CLOSED);
        assert_eq!(outcome, Outcome::Refused, "{family:?}\n{}", daemon.report());
    }
}

// --- what operators see -------------------------------------------------------------------------------------------------

/// Returns the output of `palisade intercept ARGS` as text, and as JSON.
#[track_caller]
fn console(daemon: &Daemon, args: &[&str]) -> (String, Value) {
    let args = [&["intercept"], args].concat();
    let text = daemon.cli(&args).unwrap_or_else(|error| panic!("{error:#}"));
    (
        text,
        daemon.json(&args).unwrap_or_else(|error| panic!("{error:#}")),
    )
}

/// Returns the only element of an array that has these members.
#[track_caller]
fn row<'a>(rows: &'a Value, members: &[(&str, &str)]) -> &'a Value {
    let fits = |row: &&Value| members.iter().all(|(name, value)| row[name] == *value);
    let found: Vec<&Value> = rows.as_array().into_iter().flatten().filter(fits).collect();
    assert_eq!(found.len(), 1, "{members:?}: {rows:#}");
    found[0]
}

/// Asserts that each text is in one line of a table, in this order.
#[track_caller]
fn line_has(table: &str, cells: &[&str]) {
    let has = |line: &str| {
        cells
            .iter()
            .try_fold(line, |rest, cell| Some(rest.split_once(cell)?.1))
            .is_some()
    };
    assert!(table.lines().any(has), "{cells:?}: {table}");
}

#[test]
fn the_console_shows_policies_servers_certificates_counters_and_connections() {
    let lab = lab();
    let client = lab.apps.ns("client");
    let _web = Web::start_http2(lab.apps.ns("internet"), "nginx", &[], &[HTTPS], &lab.server).expect("nginx");
    let daemon = lab.client_only(&[HTTPS, OTHER], RULES);
    let at = |family: Family, port: u16| lab.apps.at("internet", family, port);
    let held = FAMILIES
        .map(|family| hold(client, "www.web.example", &lab.ours.cert, at(family, HTTPS), 1).expect("client"));
    for (family, held) in FAMILIES.into_iter().zip(&held) {
        assert_eq!(held.line("again").expect("responses"), "again 1");
        let got = lab.ask(
            "client",
            "refused.web.example",
            at(family, OTHER),
            "/allowed",
            &[],
        );
        assert_eq!(got.status, 503, "{got:?}");
        is_denied(
            "denied",
            &lab.ask("client", "www.web.example", at(family, HTTPS), "/denied", &[]),
            &daemon,
        );
    }

    let (text, rows) = console(&daemon, &["config"]);
    line_has(
        &text,
        &[
            "default/client",
            "egress",
            "default/shown",
            "default/trusted",
            "http",
            "any",
            "1",
            "in force",
        ],
    );
    for row in rows.as_array().expect("rows") {
        assert_eq!(
            [
                &row["endpoint_name"],
                &row["direction"],
                &row["terminating"],
                &row["originating"],
                &row["protocol"]
            ],
            [
                "default/client",
                "egress",
                "default/shown",
                "default/trusted",
                "http"
            ],
            "{rows:#}"
        );
        let decided_by = row["decided_by"].as_str().unwrap_or_default();
        assert!(
            decided_by.contains("client.yaml:") && row["problem"].is_null(),
            "{rows:#}"
        );
    }
    let ports = rows.to_string();
    assert!(ports.contains("443") && ports.contains("8443"), "{rows:#}");

    let (text, rows) = console(&daemon, &["clusters"]);
    for family in FAMILIES {
        let address = at(family, HTTPS).to_string();
        let good = row(&rows, &[("name", "www.web.example"), ("address", &address)]);
        let latency = |name: &str| good[name].as_f64().unwrap_or_default();
        assert!(
            good["successes"] == 2
                && good["failures"] == 0
                && good["open"] == 1
                && (0.0..1.0).contains(&latency("connect_seconds"))
                && (0.0001..1.0).contains(&latency("handshake_seconds")),
            "{rows:#}"
        );
        let handshake = format!("{:.1} ms", latency("handshake_seconds") * 1e3);
        line_has(
            &text,
            &["www.web.example", &address, "1", "2", "0", " ms", &handshake],
        );
        let address = at(family, OTHER).to_string();
        let bad = row(&rows, &[("name", "refused.web.example"), ("address", &address)]);
        assert!(
            bad["failures_by_reason"]["connection refused"] == 1
                && bad["successes"] == 0
                && bad["failures"] == 1,
            "{rows:#}"
        );
        line_has(
            &text,
            &[
                "refused.web.example",
                &address,
                "0",
                "0",
                "1",
                "1 connection refused",
            ],
        );
    }

    let (text, answer) = console(&daemon, &["certs"]);
    let rows = &answer["certificates"];
    assert_eq!(answer["problems"], Value::Array(Vec::new()), "{answer:#}");
    for (secret, key, subject, issuer, is_ca) in [
        ("default/shown", "tls.crt", "CN=shown", "CN=interception", false),
        ("default/trusted", "ca.crt", "CN=root", "CN=root", true),
        (
            "default/trusted",
            "ca.crt",
            "CN=interception",
            "CN=interception",
            true,
        ),
    ] {
        let row = row(rows, &[("secret", secret), ("key", key), ("subject", subject)]);
        let name = secret.trim_start_matches("default/");
        let file = lab.secrets.folder(name).join(key).display().to_string();
        assert_eq!(
            (&row["issuer"], &row["file"], &row["is_ca"]),
            (&issuer.into(), &file.as_str().into(), &is_ca.into())
        );
        // Two days, less the time since they were made.
        assert_eq!(
            row["remaining_seconds"].as_i64().expect("a number") / 86_400,
            1,
            "{row:#}"
        );
        let not_after = row["not_after"].as_str().expect("a time");
        let not_before = row["not_before"].as_str().expect("a time");
        assert!(not_before < not_after, "{row:#}");
        let expires = format!("{not_after} (1 days)");
        line_has(
            &text,
            &[
                secret,
                key,
                subject,
                issuer,
                if is_ca { "yes" } else { "no" },
                &expires,
                &file,
            ],
        );
    }
    let shown = row(rows, &[("secret", "default/shown")]);
    let sans = HOSTS.map(|host| format!("DNS:{host}"));
    assert_eq!(shown["sans"], Value::from(sans.to_vec()), "{shown:#}");
    assert!(HOSTS.iter().all(|host| text.contains(host)), "{text}");

    let (text, stats) = console(&daemon, &["stats"]);
    let counters = &stats["counters"]["connections"];
    for (name, count) in [
        ("requests", 8),
        ("denied", 2),
        ("client_handshakes", 6),
        ("limited", 0),
    ] {
        assert_eq!(counters[name], count, "{name}: {stats:#}");
        line_has(&text, &["connections", name, &count.to_string()]);
    }
    assert_eq!(
        stats["counters"]["upstream failures"]["connection refused"], 2,
        "{stats:#}"
    );
    line_has(&text, &["upstream failures", "connection refused", "2"]);
    let threads = stats["threads"].as_array().expect("threads");
    assert!(
        !threads.is_empty()
            && threads
                .iter()
                .all(|thread| thread["state"] == "running" && thread["restarts"] == 0),
        "{stats:#}"
    );
    line_has(&text, &["0", "running"]);

    let (text, rows) = console(&daemon, &["connections"]);
    for family in FAMILIES {
        let server = at(family, HTTPS).to_string();
        let open = row(&rows, &[("server", &server)]);
        let source = lab.apps.source("client", "internet", family);
        let client = open["client"].as_str().expect("an address");
        assert!(
            client
                .parse::<SocketAddr>()
                .is_ok_and(|client| client.ip() == source)
                && open["name"] == "www.web.example"
                && open["protocol"] == "http/1.1"
                && open["direction"] == "egress"
                && open["requests"] == 2,
            "{rows:#}"
        );
        for side in ["client_tls", "server_tls"] {
            let tls = &open[side];
            assert!(
                tls["version"] == "TLSv1.3"
                    && tls["alpn"] == "http/1.1"
                    && tls["cipher"]
                        .as_str()
                        .is_some_and(|cipher| cipher.starts_with("TLS13_")),
                "{rows:#}"
            );
        }
        let both = "TLSv1.3 TLS13_";
        line_has(
            &text,
            &[
                "egress",
                client,
                &server,
                "www.web.example",
                both,
                " http/1.1",
                both,
                " http/1.1",
                "2",
            ],
        );
    }

    for family in FAMILIES {
        let address = at(family, HTTPS).ip().to_string();
        let args = [
            "check",
            "www.web.example",
            "--from",
            "default/client",
            "--address",
            &address,
        ];
        let (text, check) = console(&daemon, &args);
        assert_eq!(check["ok"], true, "{check:#}");
        let steps: Vec<&str> = check["steps"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|step| step["text"].as_str())
            .collect();
        for words in [
            &["client.yaml:"][..],
            &[
                "the client gets the certificate of secret default/shown",
                "CN=shown",
                "CN=interception",
            ],
            &["ClientHello with server name www.web.example", "h2, http/1.1"],
            &[
                "certificate from the server",
                "CN=server",
                "*.web.example",
                "CN=world",
            ],
            &["issuer from the server", "CN=world", "CN=root"],
            &["the certificate is valid for www.web.example", "default/trusted"],
            &["TLSv1.3 with TLS13_", "application protocol h2"],
        ] {
            let has = |step: &&str| words.iter().all(|word| step.contains(word));
            assert!(steps.iter().any(has), "{words:?}: {check:#}");
            line_has(&text, &[&["ok"], words].concat());
        }
        // A server that refuses: the command fails, and both forms say why.
        let server = format!("refused.web.example:{OTHER}");
        let args = [
            "intercept",
            "check",
            &server,
            "--from",
            "default/client",
            "--address",
            &address,
        ];
        for form in [&[][..], &["-o", "json"]] {
            let out = daemon.try_cli(&[&args[..], form].concat()).expect("palisade");
            let text = String::from_utf8_lossy(&out.stdout);
            assert!(
                out.status.code() == Some(1) && text.contains("connection refused"),
                "{out:?}"
            );
        }
    }
    drop(held);
}

#[test]
fn a_check_opens_connections_to_workloads_between_them_and_from_the_node() {
    let lab = lab();
    let apps = &lab.apps;
    let peers = ["internet", "server"]
        .map(|name| Peer::start_tls(apps.ns(name), HTTPS, &apps.both(name), &lab.server).expect("peer"));
    for hooks in [XDP_AT_THE_NIC, TCX] {
        let daemon = lab.on_all_paths(hooks, &[HTTPS], RULES);
        let (_, config) = console(&daemon, &["config"]);
        let of_node = config.as_array().into_iter().flatten().find(|row| {
            row["decided_by"]
                .as_str()
                .is_some_and(|rule| rule.contains("node.yaml:"))
        });
        let node = of_node.and_then(|row| row["endpoint_name"].as_str());
        let node = node.unwrap_or_else(|| panic!("{config:#}"));
        for family in FAMILIES {
            // The kernel knows the MAC addresses of the workloads once packets were exchanged.
            let at = |name: &str| apps.at(name, family, HTTPS);
            let got = lab.ask(
                "internet",
                "www.web.example",
                at("server"),
                "/allowed/before",
                &[],
            );
            assert_eq!(got.status, 200, "{got:?}\n{}", daemon.report());
            let ip = |name: &str| at(name).ip().to_string();
            let world = apps.source("internet", "server", family).to_string();
            for (ends, policy, certificate) in [
                (
                    ["--to", "default/server", "--client", &world],
                    "server.yaml:",
                    "CN=server",
                ),
                (
                    ["--from", node, "--address", &ip("internet")],
                    "node.yaml:",
                    "CN=server",
                ),
                // The second interception shows its own certificate to the first.
                (
                    ["--from", "default/client", "--address", &ip("server")],
                    "client.yaml:",
                    "CN=shown",
                ),
            ] {
                let what = format!("{ends:?} {family:?}");
                let (text, check) = console(&daemon, &[&["check", "www.web.example"][..], &ends].concat());
                assert_eq!(check["ok"], true, "{what}: {check:#}\n{}", daemon.report());
                line_has(&text, &["policy", "ok", policy]);
                line_has(&text, &["ok", "certificate from the server", certificate]);
                line_has(&text, &["ok", "the certificate is valid for www.web.example"]);
            }
            let ends = ["--to", "default/client", "--client", &world];
            let args = [&["intercept", "check", "www.web.example"][..], &ends].concat();
            let out = daemon.try_cli(&args).expect("palisade");
            let text = String::from_utf8_lossy(&out.stdout);
            assert!(
                out.status.code() == Some(1) && text.contains("does not intercept connections from"),
                "{out:?}"
            );
        }
    }
    // A check sends no request.
    for peer in &peers {
        assert_eq!(peer.requests().len(), peer.requests_for("/allowed/before"));
    }
}

// --- failures at the server's side -------------------------------------------------------------------------------------

#[test]
fn invalid_certificates_of_servers_are_reported() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let dir = lab.apps.topology.dir();
    let made = |name: &str, hosts: &[&str], validity: Validity, with_chain: bool| {
        lab.world
            .server(name, hosts, validity, with_chain)
            .expect("certificate")
    };
    fs::create_dir(dir.join("alone")).expect("directory");
    let cases = [
        (
            "expired",
            made("expired", &HOSTS, Validity::Expired, true),
            &["expired"][..],
        ),
        (
            "not-yet",
            made("not-yet", &HOSTS, Validity::NotYet, true),
            &["not yet valid", "not valid yet"],
        ),
        (
            "other-name",
            made("other-name", &["www.elsewhere.test"], Validity::Now, true),
            &["name"],
        ),
        (
            "missing-intermediate",
            made("missing-intermediate", &HOSTS, Validity::Now, false),
            &["unknown ca", "issuer", "unknown authority"],
        ),
        (
            "self-signed",
            certificate(&dir.join("alone"), &HOSTS).expect("certificate"),
            &["unknown ca", "issuer", "unknown authority", "self-signed"],
        ),
    ];
    let ports: Vec<u16> = (0..cases.len()).map(|n| 8500 + n as u16).collect();
    let servers: Vec<Peer> = cases
        .iter()
        .zip(&ports)
        .map(|((_, certificate, _), port)| {
            Peer::start_tls(internet, *port, &lab.apps.both("internet"), certificate).expect("server")
        })
        .collect();
    let daemon = lab.client_only(&ports, RULES);
    for family in FAMILIES {
        for ((name, _, words), port) in cases.iter().zip(&ports) {
            let at = lab.apps.at("internet", family, *port);
            is_reported(&lab, &daemon, &format!("{name}.web.example"), at, words);
            let (server, address) = (format!("{name}.web.example:{port}"), at.ip().to_string());
            let args = [
                "intercept",
                "check",
                &server,
                "--from",
                "default/client",
                "--address",
                &address,
            ];
            let out = daemon.try_cli(&args).expect("palisade");
            let text = String::from_utf8_lossy(&out.stdout).to_lowercase();
            assert!(
                out.status.code() == Some(1) && words.iter().any(|word| text.contains(word)),
                "{name}: {out:?}"
            );
        }
    }
    for server in servers {
        assert_eq!(server.requests(), [Value::Null; 0]);
    }
}

/// Step and kind of the failure, see `fault_peer.py`, and words of which the message contains one.
const FAULTS: [(&str, &[&str]); 13] = [
    ("hello-reset", &["reset"]),
    ("hello-close", &["closed"]),
    ("hello-junk", &["tls"]),
    (
        "hello-alert112",
        &["unrecognized_name", "unrecognised_name", "unrecognized name"],
    ),
    ("hello-alert40", &["handshake_failure", "handshake failure"]),
    ("hello-alert70", &["protocol_version", "protocol version"]),
    (
        "hello-alert120",
        &[
            "no_application_protocol",
            "no shared protocol",
            "no application protocol",
        ],
    ),
    ("part-reset", &["reset"]),
    ("part-close", &["closed"]),
    ("shaken-reset", &["reset"]),
    ("request-reset", &["reset"]),
    ("request-close", &["closed"]),
    ("head-close", &["closed"]),
];

#[test]
fn a_server_that_breaks_off_at_any_step_is_reported() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let _peer = fault_peer(internet, HTTPS, &lab.apps.both("internet"), &lab.server).expect("peer");
    let daemon = lab.client_only(&[HTTPS, OTHER], RULES);
    for family in FAMILIES {
        for (fault, words) in FAULTS {
            let at = lab.apps.at("internet", family, HTTPS);
            is_reported(&lab, &daemon, &format!("{fault}.fault.example"), at, words);
        }
        is_reported(
            &lab,
            &daemon,
            "nowhere.web.example",
            lab.apps.at("internet", family, OTHER),
            &["refused"],
        );
        let at = lab.apps.at("internet", family, HTTPS);
        // Where the head was forwarded, only the end of the stream can show that the body is not complete. A reset can
        // overtake the head.
        for fault in ["body-reset", "body-close"] {
            let got = lab.ask("client", &format!("{fault}.fault.example"), at, "/allowed", &[]);
            assert!(
                got.status == 503 || (got.code != 0 && got.code != 28),
                "{fault}: {got:?}\n{}",
                daemon.report()
            );
        }
    }
}

#[test]
fn a_server_that_stalls_is_reported() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let _peer = fault_peer(internet, HTTPS, &lab.apps.both("internet"), &lab.server).expect("peer");
    internet
        .nft("table inet silent {\nchain i {\ntype filter hook input priority 0;\ntcp dport 8443 drop;\n}\n}\n")
        .expect("nft");
    let daemon = lab.client_only(&[HTTPS, OTHER], RULES);
    std::thread::scope(|scope| {
        for family in FAMILIES {
            for (name, port) in [
                ("hello-stall.fault.example", HTTPS),
                ("part-stall.fault.example", HTTPS),
                ("silent.web.example", OTHER),
            ] {
                let (lab, daemon, at) = (&lab, &daemon, lab.apps.at("internet", family, port));
                scope.spawn(move || {
                    is_reported(lab, daemon, name, at, &["timeout", "timed out", "no answer"])
                });
            }
        }
    });
}

#[test]
fn a_server_that_stalls_after_the_handshake_does_not_hold_its_client() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let _peer = fault_peer(internet, HTTPS, &lab.apps.both("internet"), &lab.server).expect("peer");
    let settings = Settings {
        tables: lab.secrets.table("idle_timeout = \"3s\"\n") + "[http]\nheader_timeout = \"3s\"\n",
        ..lab.settings()
    };
    let text = policy("client", "egress", &[HTTPS], RULES);
    let daemon = lab.daemon(&settings, &[("client.yaml", &text)]);
    std::thread::scope(|scope| {
        for family in FAMILIES {
            // The bytes of the response before the stall are forwarded only if its head is complete.
            for (fault, status) in [("shaken", 504), ("request", 504), ("head", 504), ("body", 200)] {
                let (lab, daemon) = (&lab, &daemon);
                scope.spawn(move || {
                    let at = lab.apps.at("internet", family, HTTPS);
                    let name = format!("{fault}-stall.fault.example");
                    let got = lab.ask_within(SLOW, "client", &name, at, &["/allowed/stalls"], &[]);
                    // 28 is curl's own timeout.
                    assert!(
                        got.status == status && (got.code != 0) == (fault == "body") && got.code != 28,
                        "{fault} {family:?}: {got:?}\n{}",
                        daemon.report()
                    );
                });
            }
        }
    });
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        let clusters = daemon.json(&["intercept", "clusters"]).expect("clusters");
        for (fault, words) in [
            ("shaken", "response timeout: no byte within 3s"),
            ("request", "response timeout: no byte within 3s"),
            (
                "head",
                "response timeout: the head of the response did not end within 3s",
            ),
            ("body", "stalled within response: no byte within 3s"),
        ] {
            let name = format!("{fault}-stall.fault.example");
            let is_about = |flow: &Value| {
                let text = flow.to_string();
                flow["drop_reason_desc"] == "INTERCEPTION_FAILED"
                    && text.contains(&name)
                    && text.contains(words)
            };
            daemon
                .wait_flows(
                    &["--verdict", "dropped", "--ip", &at.ip().to_string()],
                    "a flow about the stall",
                    |flows| flows.iter().any(is_about),
                )
                .unwrap_or_else(|error| panic!("{fault} {family:?}: {error:#}\n{}", daemon.report()));
            let row = row(&clusters, &[("name", &name), ("address", &at.to_string())]);
            assert!(row["last_failure"].to_string().contains(words), "{clusters:#}");
        }
    }
    let stats = daemon.json(&["intercept", "stats"]).expect("stats");
    let counters = &stats["counters"]["connections"];
    assert_eq!(
        (&counters["timeouts"], &counters["open"]),
        (&Value::from(8), &Value::from(0)),
        "{stats:#}"
    );
}

#[test]
fn a_response_that_does_not_begin_in_time_is_answered_and_reported() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let addresses = lab.apps.both("internet");
    let _peer = fault_peer(internet, HTTPS, &addresses, &lab.server).expect("peer");
    let server = GrpcServer::start(internet, OTHER, &addresses, Some(&lab.server)).expect("server");
    let settings = lab.settings_with("response_timeout = \"2s\"\n");
    let rules = RULES.replace("/allowed.*", "/(allowed|test.Echo).*");
    assert_ne!(rules, RULES);
    let daemon = lab.daemon(
        &settings,
        &[(
            "client.yaml",
            &policy("client", "egress", &[HTTPS, OTHER], &rules),
        )],
    );
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        let words = &["response timeout: no head of a response within 2s"];
        is_reported_as(504, &lab, &daemon, "request-stall.fault.example", at, words);
        // One call of a connection is late. A call whose response has begun is silent for longer, and goes on.
        let at = lab.apps.at("internet", family, OTHER);
        let ca = Some(lab.ours.cert.as_path());
        let said = grpc(lab.apps.ns("client"), "www.web.example", ca, at, &["late"]).expect("calls");
        assert_eq!(
            said.trim(),
            "late DEADLINE_EXCEEDED|response timeout: no head of a response within 2s|b'<0>' b'<1>'|cba",
            "{}",
            daemon.report()
        );
        // The server learns that nothing waits for its response.
        wait_until("the server stops", OPEN, || {
            server.calls().iter().any(|line| line == "given up")
        })
        .expect("a cancelled call");
    }
    let stats = daemon.json(&["intercept", "stats"]).expect("stats");
    assert!(stats.to_string().contains("\"response timeout\":4"), "{stats:#}");
}

// --- clients that do something else ------------------------------------------------------------------------------------

#[test]
fn clients_without_tls_without_a_name_or_that_break_off() {
    let lab = lab();
    let peer = peer_at(&lab, HTTPS);
    let daemon = lab.client_only(&[HTTPS], RULES);
    let client = lab.apps.ns("client");
    let hello = palisade_testbed::tls::Hello::to("www.web.example").bytes();
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        for (what, bytes) in [
            (
                "clear text",
                &b"GET /allowed HTTP/1.1\r\nHost: www.web.example\r\n\r\n"[..],
            ),
            (
                "HTTP/2 in clear text",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
            ),
            ("SSH", b"SSH-2.0-OpenSSH_9.2\r\n"),
            ("a hello that never ends", &[&hello[..40], &[0; 200][..]].concat()),
        ] {
            let mut talk = Talk::open(client, at, OPEN).expect("connection");
            // An error means that the connection was reset while the client sent, which is a valid end too.
            let _ = talk.send(bytes);
            if what != "a hello that never ends" {
                let _ = talk.receive(OPEN, |_| false);
            }
            assert!(!talk.text().contains("200 OK"), "{what}: {}", talk.text());
        }
        // Half a hello, and then the end.
        for half in [0, 1, 5, 60, hello.len() - 1] {
            let mut talk = Talk::open(client, at, OPEN).expect("connection");
            talk.send(&hello[..half]).expect("hello");
        }
        // The shown certificate is trusted but does not fit: the client breaks off.
        let got = lab.ask("client", "www.other.test", at, "/allowed", &[]);
        assert!(got.status == 0 && got.code == 60, "{got:?}\n{}", daemon.report());
        // After these connections, the proxy still serves others.
        let got = lab.ask("client", "www.web.example", at, "/allowed/after", &[]);
        assert_eq!(got.status, 200, "{got:?}\n{}", daemon.report());
    }
    assert_eq!(peer.requests().len(), peer.requests_for("/allowed/after"));
}

#[test]
fn a_missing_or_invalid_secret_denies_only_its_own_traffic() {
    let lab = lab();
    let peer = peer_at(&lab, HTTPS);
    lab.secrets
        .write("broken", "tls.crt", b"no certificate")
        .expect("secret");
    lab.secrets.write("broken", "tls.key", b"no key").expect("secret");
    let other = lab
        .world
        .server("another", &HOSTS, Validity::Now, true)
        .expect("certificate");
    lab.secrets.identity("mixed", &lab.server).expect("secret");
    lab.secrets
        .write("mixed", "tls.key", &fs::read(&other.key).expect("key"))
        .expect("secret");
    lab.secrets.write("lines", "value", b"a\nb").expect("secret");
    let with_header = |secret: &str| {
        RULES.replace(
            "path: \"/allowed.*\"}]",
            &format!(
                "path: \"/allowed.*\", headerMatches: [{{name: X-Token, secret: {{namespace: default, name: {secret}}}, \
                 mismatch: ADD}}]}}]"
            ),
        )
    };
    let with = |member: &str, secret: &str| match member {
        "terminatingTLS" => RULES.replace("name: shown", &format!("name: {secret}")),
        "originatingTLS" => RULES.replace("name: trusted", &format!("name: {secret}")),
        _ => with_header(secret),
    };
    let settings = lab.settings_with("interception_ca = \"default/no-ca\"\n");
    lab.secrets.identity("no-ca", &lab.server).expect("secret");
    // How curl ends: with an error because the connection is reset at once, or with a status.
    let cases = [
        ("terminatingTLS", "absent", 0),
        ("terminatingTLS", "broken", 0),
        ("terminatingTLS", "mixed", 0),
        ("terminatingTLS", "no-ca", 0),
        ("originatingTLS", "absent", 503),
        ("originatingTLS", "mixed", 503),
        ("headerMatches", "absent", 403),
        ("headerMatches", "mixed", 403),
        ("headerMatches", "lines", 403),
    ];
    // One policy and port for each case.
    let port_of = |n: usize| 8500 + n as u16;
    let ports: Vec<u16> = (0..cases.len()).map(port_of).collect();
    let web = Web::start(lab.apps.ns("internet"), "nginx", &[], &ports, &lab.server).expect("nginx");
    let mut policies = vec![(
        "good.yaml".to_owned(),
        policy("client", "egress", &[HTTPS], RULES),
    )];
    for (n, (member, name, _)) in cases.into_iter().enumerate() {
        let text = policy("client", "egress", &[port_of(n)], &with(member, name));
        policies.push((
            format!("bad-{n}.yaml"),
            text.replace("client-egress", &format!("client-bad-{n}")),
        ));
    }
    // The entry of `toPorts` is on the line of its ports.
    let entry = policies[0].1.lines().position(|line| line.contains("- ports:"));
    let line = 1 + entry.expect("the entry");
    let daemon = lab.daemon(&settings, &borrowed(&policies));
    for family in FAMILIES {
        let at = |port: u16| lab.apps.at("internet", family, port);
        let got = lab.ask("client", "www.web.example", at(HTTPS), "/allowed", &[]);
        assert_eq!(got.status, 200, "{got:?}\n{}", daemon.report());
        for (n, (member, name, status)) in cases.into_iter().enumerate() {
            let what = format!("{member} {name} {family:?}");
            let at = at(port_of(n));
            let got = lab.ask("client", "www.web.example", at, "/allowed", &["-k"]);
            assert!(
                got.status == status && (status != 0 || [35, 56].contains(&got.code)),
                "{what}: {got:?}\n{}",
                daemon.report()
            );
            let (address, port) = (at.ip().to_string(), at.port().to_string());
            let args = ["--verdict", "dropped", "--to-ip", &address, "--to-port", &port];
            let is_told = |flow: &Value| {
                flow["drop_reason_desc"] == "SECRET_NOT_USABLE"
                    && (status == 403 || flow.to_string().contains(&format!("default/{name}")))
            };
            daemon
                .wait_flows(&args, "a flow with the reason", |flows| flows.iter().any(is_told))
                .unwrap_or_else(|error| panic!("{what}: {error:#}\n{}", daemon.report()));
        }
        let got = lab.ask("client", "www.web.example", at(HTTPS), "/allowed", &[]);
        assert_eq!(got.status, 200, "{got:?}\n{}", daemon.report());
    }
    let json = |args: &[&str]| daemon.json(args).expect("palisade");
    let of = |value: &Value| -> Vec<String> {
        let texts = value.as_array().into_iter().flatten();
        texts.filter_map(Value::as_str).map(ToOwned::to_owned).collect()
    };
    let rows = json(&["intercept", "config"]);
    let row_of = |file: &str| {
        let mut rows = rows.as_array().into_iter().flatten();
        rows.find(|row| row["decided_by"].as_str().is_some_and(|rule| rule.contains(file)))
            .unwrap_or_else(|| panic!("{file}: {rows:#?}"))
    };
    assert!(row_of("good.yaml:")["problem"].is_null(), "{rows:#}");
    let places = [
        of(&json(&["intercept", "certs"])["problems"]),
        of(&json(&["status"])["warnings"]),
        daemon.log().lines().map(ToOwned::to_owned).collect(),
    ];
    for (n, (member, name, _)) in cases.into_iter().enumerate() {
        let secret = format!("default/{name}");
        let says =
            |text: &str, place: &str| text.contains(member) && text.contains(&secret) && text.contains(place);
        let problem = &row_of(&format!("bad-{n}.yaml:"))["problem"];
        assert!(
            problem.as_str().is_some_and(|problem| says(problem, "")),
            "{member} {name}: {rows:#}"
        );
        let place = format!("bad-{n}.yaml:{line}:");
        for told in &places {
            assert!(
                told.iter().any(|text| says(text, &place)),
                "{member} {name} {place}: {told:#?}"
            );
        }
    }
    assert!(web.seen().is_empty(), "{:?}", web.seen());
    assert_eq!(peer.requests().len(), 4);
}

#[test]
fn a_client_uses_its_port_again_while_the_server_still_closes() {
    /// The server gets no FIN, and its resets are lost: the proxy's connection stays open while it retransmits the FIN.
    const NO_FIN: &str = "table inet late {
        chain input { type filter hook input priority 0; tcp dport 443 tcp flags & fin == fin drop; }
        chain output { type filter hook output priority 0; tcp sport 443 tcp flags & rst == rst drop; }
    }
";
    let lab = lab();
    let (internet, client) = (lab.apps.ns("internet"), lab.apps.ns("client"));
    let web = Web::start(internet, "nginx", &[], &[HTTPS], &lab.server).expect("nginx");
    let daemon = lab.client_only(&[HTTPS], RULES);
    let twice = |family: Family, local_port: u16| {
        let at = lab.apps.at("internet", family, HTTPS);
        same_port(client, "www.web.example", &lab.ours.cert, at, local_port, 2).expect("client")
    };
    let said = |error: anyhow::Error| -> Vec<String> { panic!("{error:#}\n{}", daemon.report()) };
    for family in FAMILIES {
        internet.nft(NO_FIN).expect("nft");
        let requests = twice(family, 40_001);
        requests.lines("open", 2).unwrap_or_else(said);
        // The second connection begins before the server gets the FIN of the first one.
        wait_until("the second connection", OPEN, || {
            let all = daemon.json(&["intercept", "connections"]).unwrap_or_default();
            all.to_string().contains("connects to the server")
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
        internet.nft("delete table inet late\n").expect("nft");
        let lines = requests.lines("status", 2).unwrap_or_else(said);
        assert!(
            lines.iter().all(|line| line.starts_with("status 200")),
            "{family:?}: {lines:?}\n{}",
            daemon.report()
        );
    }
    assert_eq!(web.seen().len(), 4);
    // The first connection is not closed within the time for a connect.
    internet.nft(NO_FIN).expect("nft");
    let all = FAMILIES.map(|family| twice(family, 40_002));
    for requests in &all {
        let lines = requests.lines("status", 2).unwrap_or_else(said);
        assert!(
            lines[0].starts_with("status 200")
                && lines[1].starts_with("status 503 client port still in use")
                && lines[1].ends_with("is not closed yet"),
            "{lines:?}\n{}",
            daemon.report()
        );
    }
    is_noted(&daemon, "www.web.example", &|text| {
        text.contains("client port still in use")
    });
    assert_eq!(web.seen().len(), 6);
}

// --- change, load, death -------------------------------------------------------------------------------------------------

/// Returns the subject of the certificate that a client is shown.
fn shown(lab: &Lab, at: SocketAddr) -> String {
    let text = s_client(lab, at, &["-servername", "www.web.example"]).text;
    let line = text.lines().find_map(|line| line.strip_prefix("subject="));
    line.unwrap_or_default().to_owned()
}

#[test]
fn certificates_are_replaced_while_traffic_runs() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let _first = peer_at(&lab, HTTPS);
    // The second server has a certificate that the secret does not trust yet.
    let late = Authority::root(lab.apps.topology.dir(), "late").expect("authority");
    let certificate = late
        .server("late", &HOSTS, Validity::Now, true)
        .expect("certificate");
    let _second = Peer::start_tls(internet, OTHER, &lab.apps.both("internet"), &certificate).expect("peer");
    let daemon = lab.client_only(&[HTTPS, OTHER], RULES);
    let at = |family: Family, port: u16| lab.apps.at("internet", family, port);
    let loads = FAMILIES.map(|family| {
        let at = at(family, HTTPS);
        Load::start(lab.apps.ns("client"), "www.web.example", at, &lab.server, 2).expect("load")
    });
    for (family, load) in FAMILIES.into_iter().zip(&loads) {
        load.grows("allowed", 10).expect("traffic");
        is_reported(
            &lab,
            &daemon,
            "late.web.example",
            at(family, OTHER),
            &["unknown ca", "issuer", "unknown authority"],
        );
        assert_eq!(shown(&lab, at(family, HTTPS)), "CN = shown");
    }

    // The two files are replaced one after the other: while they do not fit, the old pair stays in use.
    let new = lab
        .ours
        .server("replaced", &HOSTS, Validity::Now, true)
        .expect("certificate");
    lab.secrets.identity("shown", &new).expect("secret");
    lab.secrets.trust("trusted", &[&lab.root, &late]).expect("secret");
    for (family, load) in FAMILIES.into_iter().zip(&loads) {
        let changed = || shown(&lab, at(family, HTTPS)) == "CN = replaced";
        wait_until("the new certificate is shown", OPEN, changed)
            .unwrap_or_else(|error| panic!("{family:?}: {error:#}\n{}", daemon.report()));
        let trusted = || {
            let got = lab.ask("client", "late.web.example", at(family, OTHER), "/allowed", &[]);
            got.status == 200
        };
        wait_until("the new authority is trusted", OPEN, trusted)
            .unwrap_or_else(|error| panic!("{family:?}: {error:#}\n{}", daemon.report()));
        load.grows("allowed", 10).expect("traffic");
        let counts = load.counts();
        assert!(
            counts["failed"] == 0 && counts["leaked"] == 0 && counts["unread"] == 0,
            "{family:?}: {counts}\n{}",
            daemon.report()
        );
    }
}

#[test]
fn a_policy_change_evaluates_the_next_request_and_cuts_what_is_no_longer_intercepted() {
    let lab = lab();
    let _peer = peer_at(&lab, HTTPS);
    let daemon = lab.client_only(&[HTTPS], RULES);
    let held = FAMILIES.map(|family| {
        let at = lab.apps.at("internet", family, HTTPS);
        hold(lab.apps.ns("client"), "www.web.example", &lab.ours.cert, at, 3).expect("clients")
    });
    for held in &held {
        assert_eq!(held.line("again").expect("responses"), "again 3");
    }
    let connections = || -> usize {
        let all = daemon.json(&["intercept", "connections"]).unwrap_or_default();
        all.as_array().map_or(0, Vec::len)
    };
    assert_eq!(connections(), 6, "{}", daemon.report());
    let text = policy(
        "client",
        "egress",
        &[HTTPS],
        &RULES.replace("/allowed.*", "/changed.*"),
    );
    daemon.apply(&[("client.yaml", &text)]).expect("policy");
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        is_denied(
            &format!("changed {family:?}"),
            &lab.ask("client", "www.web.example", at, "/allowed", &[]),
            &daemon,
        );
        let got = lab.ask("client", "www.web.example", at, "/changed", &[]);
        assert_eq!(got.status, 200, "{family:?}: {got:?}");
    }
    let text = policy("client", "egress", &[OTHER], RULES);
    daemon.apply(&[("client.yaml", &text)]).expect("policy");
    wait_until("the connections are cut", OPEN, || connections() == 0)
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

#[test]
fn a_kept_connection_follows_the_identity_that_a_policy_change_gives_its_server() {
    let lab = lab();
    let peer = peer_at(&lab, HTTPS);
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        let (all, one) = match family {
            Family::V4 => ("0.0.0.0/0", format!("{}/32", at.ip())),
            Family::V6 => ("::/0", format!("{}/128", at.ip())),
        };
        let base = policy("client", "egress", &[HTTPS], &RULES.replace("/allowed.*", "/.*"));
        let (head, rules) = base.split_once("  - toEntities: [all]\n").expect("the peers");
        let before = format!("{head}  - toCIDR: [\"{all}\"]\n{rules}");
        // The address of the server gets an identity of its own, with fewer paths.
        let after = format!(
            "{head}  - toCIDRSet: [{{cidr: \"{all}\", except: [\"{one}\"]}}]\n{rules}  - toCIDR: [\"{one}\"]\n{}",
            rules.replace("/.*", "/allowed.*")
        );
        let daemon = lab.daemon(&lab.settings(), &[("client.yaml", &before)]);
        let path = format!("/denied/{family:?}");
        let got = std::thread::scope(|scope| {
            let client = scope.spawn(|| {
                let paths = ["/allowed/first", &path];
                let codes = ["-w", "%{http_code} %{num_connects},", "--rate", "12/m"];
                let outputs = ["-o", "/dev/null"].repeat(paths.len());
                lab.ask_within(
                    SLOW,
                    "client",
                    "www.web.example",
                    at,
                    &paths,
                    &[&codes[..], &outputs].concat(),
                )
            });
            let first = || peer.requests_for("/allowed/first") > 0;
            wait_until("the first request", OPEN, first).expect("a request");
            daemon.apply(&[("client.yaml", &after)]).expect("policy");
            client.join().expect("the client")
        });
        assert_eq!(got.body, "200 1,403 0,", "{got:?}\n{}", daemon.report());
        assert_eq!(peer.requests_for(&path), 0);
    }
}

#[test]
fn an_idle_connection_ends_when_a_new_policy_denies_its_server_name() {
    let lab = lab();
    let _peer = peer_at(&lab, HTTPS);
    let rules = |name: &str| {
        let (tls, _) = RULES.split_once("rules:").expect("the http rules");
        format!("{tls}serverNames: [\"{name}\"]\n")
    };
    let daemon = lab.client_only(&[HTTPS], &rules("www.web.example"));
    let held = FAMILIES.map(|family| {
        let at = lab.apps.at("internet", family, HTTPS);
        hold(lab.apps.ns("client"), "www.web.example", &lab.ours.cert, at, 3).expect("clients")
    });
    for held in &held {
        assert_eq!(held.line("again").expect("responses"), "again 3");
    }
    // The connections send nothing more, so the programs do not evaluate their flows again.
    let text = policy("client", "egress", &[HTTPS], &rules("other.web.example"));
    daemon.apply(&[("client.yaml", &text)]).expect("policy");
    let connections = || daemon.json(&["intercept", "connections"]).unwrap_or_default();
    wait_until("the connections are cut", OPEN, || {
        connections().as_array().is_some_and(Vec::is_empty)
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

/// Sets the limit on open files, which child processes inherit, to this number if the system allows as many. Raising the
/// hard limit requires CAP_SYS_RESOURCE. Returns the limit.
fn limit_open_files(limit: u64) -> u64 {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).expect("limit");
    if setrlimit(Resource::RLIMIT_NOFILE, limit, most.max(limit)).is_ok() {
        return limit;
    }
    setrlimit(Resource::RLIMIT_NOFILE, most.min(limit), most).expect("limit");
    most.min(limit)
}

/// Returns the memory of the daemon, KiB.
fn memory(daemon: &Daemon) -> u64 {
    let pid = daemon.pid().expect("a daemon");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.expect("VmRSS").parse().expect("a number")
}

#[test]
fn many_connections_are_open_at_the_same_time() {
    let count: u32 = std::env::var("PALISADE_CONNECTIONS").map_or(2_000, |n| n.parse().expect("a number"));
    // Two for each connection, and those of the daemon itself.
    let needed = u64::from(count) * 2 + 2_048;
    let open_files = limit_open_files(needed.max(65_536));
    assert!(
        open_files >= needed,
        "{count} connections need a limit of {needed} open files; it is {open_files}, and only a process with \
         CAP_SYS_RESOURCE can raise it: set PALISADE_CONNECTIONS to at most {}",
        open_files.saturating_sub(2_048) / 2
    );
    let lab = lab();
    // The daemon raises the limit that it inherits.
    limit_open_files(1_024);
    // One endpoint may have all connections.
    let settings = lab.settings_with("max_connections_per_endpoint = 16384");
    let daemon = lab.daemon(
        &settings,
        &[("client.yaml", &policy("client", "egress", &[HTTPS], RULES))],
    );
    limit_open_files(open_files);
    let _web = Web::start(lab.apps.ns("internet"), "nginx", &[], &[HTTPS], &lab.server).expect("nginx");
    let at = lab.apps.at("internet", Family::V4, HTTPS);
    let held = hold(
        lab.apps.ns("client"),
        "www.web.example",
        &lab.ours.cert,
        at,
        count,
    )
    .expect("clients");
    // Software emulation opens at least three in a second.
    let patience = Duration::from_secs(90 + u64::from(count / 3));
    let line = |start: &str| held.line_within(start, patience).expect("a line");
    let (before, begin) = (memory(&daemon), Instant::now());
    assert_eq!(line("open"), format!("open {count}"), "{}", daemon.report());
    let (opened, again) = (begin.elapsed(), Instant::now());
    assert_eq!(line("again"), format!("again {count}"), "{}", daemon.report());
    let after = memory(&daemon);
    println!(
        "figures: {count} connections opened in {opened:.1?}, one more request on each in {:.1?}; memory of the daemon \
         {before} KiB before, {after} KiB with all ({:.1} KiB for each)",
        again.elapsed(),
        after.saturating_sub(before) as f64 / f64::from(count),
    );
    // One more client is served beside them.
    let at = lab.apps.at("internet", Family::V6, HTTPS);
    assert_eq!(
        lab.ask("client", "www.web.example", at, "/allowed", &[]).status,
        200
    );
    is_denied(
        "beside",
        &lab.ask("client", "www.web.example", at, "/denied", &[]),
        &daemon,
    );
}

#[test]
fn connections_beyond_the_share_of_an_endpoint_are_reset_with_a_reason() {
    let lab = lab();
    let peer = peer_at(&lab, HTTPS);
    let settings =
        lab.settings_with("proxy_threads = 1\nmax_connections = 4\nmax_connections_per_endpoint = 2\n");
    let text = policy("client", "egress", &[HTTPS], RULES);
    let daemon = lab.daemon(&settings, &[("client.yaml", &text)]);
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        let held = hold(lab.apps.ns("client"), "www.web.example", &lab.ours.cert, at, 2).expect("clients");
        assert_eq!(held.line("again").expect("responses"), "again 2");
        let got = lab.ask("client", "www.web.example", at, "/allowed/beyond", &[]);
        // The reset arrives before curl sees the connection as established (7), in the handshake (35) or after it (56).
        assert!(
            got.status == 0 && [7, 35, 56].contains(&got.code),
            "{got:?}\n{}",
            daemon.report()
        );
        let address = at.ip().to_string();
        let args = ["--verdict", "dropped", "--to-ip", &address];
        let is_told = |flow: &Value| {
            flow["drop_reason_desc"] == "INSPECTION_LIMIT_REACHED"
                && flow
                    .to_string()
                    .contains("has its share of the proxy's connections")
        };
        daemon
            .wait_flows(&args, "a flow with the reason", |flows| flows.iter().any(is_told))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
        let limited =
            daemon.json(&["intercept", "stats"]).expect("stats")["counters"]["connections"]["limited"]
                .clone();
        assert!(limited.as_u64() > Some(0), "{limited}");
        let warned = |status: &Value| {
            status["warnings"]
                .to_string()
                .contains("max_connections_per_endpoint")
        };
        daemon
            .wait_status("a warning about the limit", warned)
            .unwrap_or_else(|error| panic!("{error:#}"));
        drop(held);
        let none =
            || daemon.json(&["intercept", "connections"]).unwrap_or_default() == Value::Array(Vec::new());
        wait_until("the connections end", OPEN, none).expect("no connection");
    }
    assert_eq!(peer.requests_for("/allowed/beyond"), 0);
}

#[test]
fn connections_that_the_accept_queues_cannot_take_are_counted_and_told() {
    // The backlog of a listener is 4,096.
    const FLOOD: usize = 5_000;
    let open_files = limit_open_files(2 * FLOOD as u64 + 4_096);
    assert!(open_files > 2 * FLOOD as u64, "{open_files}");
    let lab = lab();
    let peer = peer_at(&lab, HTTPS);
    let settings = lab.settings_with("proxy_threads = 1\n");
    let text = policy("client", "egress", &[HTTPS], RULES);
    let daemon = lab.daemon(&settings, &[("client.yaml", &text)]);
    let overflows = || -> Option<u64> {
        let stats = daemon.json(&["intercept", "stats"]).ok()?;
        stats["counters"]["connections"]["accept_overflows"].as_u64()
    };
    assert_eq!(overflows(), Some(0));
    let pid = Pid::from_raw(daemon.pid().expect("a daemon") as i32);
    for (n, family) in FAMILIES.into_iter().enumerate() {
        let at = lab.apps.at("internet", family, HTTPS);
        // A thread that accepts nothing: the kernel completes the connections until the queue is full.
        kill(pid, Signal::SIGSTOP).expect("SIGSTOP");
        let flood = lab.apps.ns("client").enter(|| {
            let mut flood = Vec::new();
            let mut refused = 0;
            while flood.len() < FLOOD && refused < 3 {
                match std::net::TcpStream::connect_timeout(&at, Duration::from_millis(300)) {
                    Ok(stream) => flood.push(stream),
                    Err(_) => refused += 1,
                }
            }
            flood
        });
        kill(pid, Signal::SIGCONT).expect("SIGCONT");
        assert!(
            (4_096..FLOOD).contains(&flood.len()),
            "{family:?}: {}",
            flood.len()
        );
        drop(flood);
        let before = n as u64;
        wait_until("the overflows are counted", OPEN, || overflows() > Some(before))
            .unwrap_or_else(|error| panic!("{family:?}: {error:#}\n{}", daemon.report()));
        let warned = |status: &Value| {
            status["warnings"]
                .to_string()
                .contains("accept queues of the proxy were full")
        };
        daemon
            .wait_status("a warning about the accept queues", warned)
            .unwrap_or_else(|error| panic!("{error:#}"));
        let served = || {
            lab.ask("client", "www.web.example", at, "/allowed/after", &[])
                .status
                == 200
        };
        wait_until("the proxy serves again", OPEN, served)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    }
    assert!(
        daemon.log().contains("accept queues of the proxy were full"),
        "{}",
        daemon.log()
    );
    assert!(peer.requests_for("/allowed/after") >= 2);
}

#[test]
fn h2load_over_http_1_1_loses_no_request() {
    let lab = lab();
    let web = Web::start(lab.apps.ns("internet"), "nginx", &[], &[HTTPS], &lab.server).expect("nginx");
    let daemon = lab.client_only(&[HTTPS], RULES);
    for family in FAMILIES {
        let to = format!("--connect-to={}", lab.apps.at("internet", family, HTTPS));
        for (path, other) in [("/allowed", 0), ("/denied", 400)] {
            let url = format!("https://www.web.example{path}");
            let args = ["--h1", "-n", "400", "-c", "20", "-t", "1", &to, &url];
            let got = h2load(lab.apps.ns("client"), &args).expect("h2load");
            let expected = Counted {
                answered: 400,
                other_status: other,
                failed: 0,
            };
            assert_eq!(got, expected, "{path}\n{}", daemon.report());
        }
    }
    assert!(
        web.seen()
            .iter()
            .all(|seen| seen.request.starts_with("GET /allowed "))
    );
}
