//! Metrics and health of a daemon with traffic: values, formats, bad clients, and a real Prometheus.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, Permissions},
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use palisade_testbed::{
    Daemon, Ns, Process,
    daemon::Settings,
    dns::Server,
    ns::{temp_dir, wait_until},
    output,
    process::output_with_input,
    tls::Certificate,
    topology::{FAMILIES, Family},
    web::{Curl, Peer, curl},
};
use palisade_tests::{
    OPEN,
    fixtures::{
        apps::{Apps, apps, policy},
        intercept::{HOSTS, RULES as INTERCEPTED, Secrets, lab},
        pki::{Authority, Validity},
    },
    opaque_tls::{self, Secret},
    setup::{client_only_with, daemon_with, question, remove_endpoint, tables, webs},
};
use serde_json::Value;

const WEB: u16 = 80;
const METRICS: &str = "[metrics]\nlisten = \"127.0.0.1:9965\"\n\
                       hubble = [\"dns\", \"drop\", \"flow\", \"http\", \"icmp\", \"policy\", \"port-distribution\", \"tcp\"]\n";
const RULES: &str = "      rules:
        http:
        - {method: GET, path: \"/allowed\"}
";

const DNS: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: dns}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [all]
    toPorts:
    - ports: [{port: "53", protocol: UDP}]
      rules:
        dns: [{matchName: www.example}]
"#;

/// Returns the answer to a request to the metrics server.
fn get(node: &Ns, path: &str, args: &[&str]) -> Curl {
    let url = format!("http://127.0.0.1:9965{path}");
    curl(node, &[args, &[&url]].concat(), OPEN).expect("curl")
}

/// Returns the samples of a scrape: name and labels as written, and the value.
fn scrape(node: &Ns) -> BTreeMap<String, f64> {
    let got = get(node, "/metrics", &[]);
    assert_eq!((got.code, got.status), (0, 200), "{got:?}");
    got.body
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').expect("a value");
            (name.to_owned(), value.parse().expect("a number"))
        })
        .collect()
}

/// Waits until a scrape has these values, and returns all of it.
#[track_caller]
fn expect(daemon: &Daemon, node: &Ns, wanted: &[(&str, f64)]) -> BTreeMap<String, f64> {
    let mut last = BTreeMap::new();
    let met = wait_until("the values", OPEN, || {
        last = scrape(node);
        wanted.iter().all(|(name, value)| last.get(*name) == Some(value))
    });
    if met.is_err() {
        for (name, value) in wanted {
            let found = last.get(*name);
            if found != Some(value) {
                eprintln!("{name}: {found:?} instead of {value}");
            }
        }
        let near: Vec<_> = last
            .iter()
            .filter(|(name, _)| name.starts_with("hubble_") || name.starts_with("palisade_drop"))
            .collect();
        panic!("{near:#?}\n{}", daemon.report());
    }
    last
}

/// Metric of the ends of certificates.
const EXPIRY: &str = "palisade_certificate_expiry_timestamp_seconds";

/// Returns the end of the validity of a certificate, Unix time, s.
fn end_of(certificate: &Path) -> f64 {
    let said = |command: &mut Command| {
        let out = output(command, OPEN).expect("the end of a certificate");
        assert!(out.status.success(), "{out:?}");
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    };
    let mut openssl = Command::new("openssl");
    let end = said(
        openssl
            .args(["x509", "-noout", "-enddate", "-in"])
            .arg(certificate),
    );
    let end = end.strip_prefix("notAfter=").expect("a date").to_owned();
    let seconds = said(Command::new("date").args(["-u", "+%s", "-d", &end]));
    seconds.parse().expect("a number")
}

/// Returns what promtool finds wrong with metrics.
fn promtool_check(text: &str) -> String {
    let mut command = Command::new("promtool");
    command.args(["check", "metrics"]);
    let out = output_with_input(&mut command, text.as_bytes(), OPEN).expect("promtool");
    let failed = if out.status.success() { "" } else { "failed\n" };
    let (said, problems) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    format!("{failed}{said}{problems}")
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// Sends single datagrams of `client`, which are never retransmitted.
fn datagrams(apps: &Apps, family: Family, port: u16, count: usize) {
    datagrams_of("client", apps, family, port, count);
}

/// Like [`datagrams`], of any workload.
fn datagrams_of(name: &str, apps: &Apps, family: Family, port: u16, count: usize) {
    let to = apps.at("internet", family, port);
    let any = match family {
        Family::V4 => "0.0.0.0:0",
        Family::V6 => "[::]:0",
    };
    apps.ns(name).enter(|| {
        let socket = UdpSocket::bind(any).expect("socket");
        for _ in 0..count {
            socket.send_to(b"x", to).expect("send");
        }
    });
}

#[test]
fn a_scrape_counts_exactly_the_traffic_that_was_made() {
    let apps = apps();
    let node = apps.ns("node");
    let _webs = webs(&apps, ["internet"], &[WEB], &[]);
    let _dns = Server::dnsmasq(
        apps.ns("internet"),
        &apps.both("internet"),
        &["www.example. 60 IN A 192.0.2.9"],
    )
    .expect("dnsmasq");
    let daemon = daemon_with(
        &apps.topology,
        &tables(METRICS),
        &[
            ("web.yaml", &policy("client", "egress", &[WEB], RULES)),
            ("dns.yaml", DNS),
        ],
    );
    for family in FAMILIES {
        let at = apps.at("internet", family, WEB);
        for (path, status) in [("/allowed", 200), ("/allowed", 200), ("/denied", 403)] {
            let got = curl(apps.ns("client"), &[&format!("http://{at}{path}")], OPEN).expect("curl");
            assert_eq!(got.status, status, "{got:?}");
        }
        for name in ["www.example", "www.example", "evil.example"] {
            let _ = question(&apps, family, name);
        }
        datagrams(&apps, family, 4_000, 5);
    }
    let wanted = [
        (
            r#"hubble_http_requests_total{method="GET",protocol="HTTP/1.1",reporter="client"}"#,
            6.0,
        ),
        (
            r#"hubble_http_responses_total{method="GET",protocol="HTTP/1.1",status="200",reporter="client"}"#,
            4.0,
        ),
        (
            r#"hubble_http_request_duration_seconds_count{method="GET",reporter="client"}"#,
            4.0,
        ),
        (
            r#"hubble_dns_queries_total{rcode="",qtypes="A",ips_returned="0"}"#,
            4.0,
        ),
        (
            r#"hubble_dns_queries_total{rcode="Policy denied",qtypes="A",ips_returned="0"}"#,
            2.0,
        ),
        (
            r#"hubble_dns_responses_total{rcode="No Error",qtypes="A",ips_returned="1"}"#,
            4.0,
        ),
        (r#"hubble_dns_response_types_total{type="A",qtypes="A"}"#, 4.0),
        (
            r#"hubble_drop_total{reason="POLICY_DENIED",protocol="UDP"}"#,
            20.0,
        ),
        (
            r#"hubble_drop_total{reason="DENIED_BY_APPLICATION_RULES",protocol="HTTP"}"#,
            2.0,
        ),
        (
            r#"hubble_drop_total{reason="DENIED_BY_APPLICATION_RULES",protocol="DNS"}"#,
            2.0,
        ),
        (
            r#"hubble_flows_processed_total{protocol="UDP",type="Drop",subtype="",verdict="DROPPED"}"#,
            10.0,
        ),
        (
            r#"hubble_flows_processed_total{protocol="HTTP",type="L7",subtype="HTTP",verdict="FORWARDED"}"#,
            8.0,
        ),
        (
            r#"hubble_policy_verdicts_total{direction="egress",match="none",action="dropped"}"#,
            10.0,
        ),
        (
            r#"hubble_policy_verdicts_total{direction="egress",match="l7/http",action="dropped"}"#,
            2.0,
        ),
        (r#"hubble_lost_events_total{source="hubble_ring_buffer"}"#, 0.0),
        (
            r#"palisade_drop_packets_total{reason="POLICY_DENIED",direction="egress"}"#,
            10.0,
        ),
        // An IPv4 header of 20 bytes, an IPv6 header of 40 bytes, a UDP header, and one byte.
        (
            r#"palisade_drop_bytes_total{reason="POLICY_DENIED",direction="egress"}"#,
            390.0,
        ),
        (
            r#"palisade_inspection_events_total{group="http",event="requests"}"#,
            6.0,
        ),
        (
            r#"palisade_inspection_events_total{group="http",event="denied"}"#,
            2.0,
        ),
        (
            r#"palisade_inspection_events_total{group="dns",event="queries"}"#,
            6.0,
        ),
        (r#"palisade_policy_files{state="in-force"}"#, 2.0),
        ("palisade_policies", 2.0),
        ("palisade_ready", 1.0),
        ("palisade_missing", 0.0),
        ("palisade_control_thread_up", 1.0),
    ];
    let found = expect(&daemon, node, &wanted);
    let rules: f64 = sum(&found, "palisade_rule_packets_total{");
    assert!(rules >= 10.0, "{rules}");
    // The status reports the same.
    let status = daemon.json(&["status"]).expect("status");
    let conntrack = found["palisade_map_max_entries{map=\"conntrack\"}"];
    assert_eq!(status["conntrack"]["capacity"].as_f64(), Some(conntrack));
    assert_eq!(
        status["revision"].as_f64(),
        Some(found["palisade_policy_revision"])
    );

    // A changed file is a change in force, with its time.
    let count = "palisade_policy_enforcement_delay_seconds_count";
    let before = found[count];
    daemon
        .write("dns.yaml", &DNS.replace("www.example", "mail.example"))
        .expect("a file");
    expect(&daemon, node, &[(count, before + 1.0)]);

    let text = get(node, "/metrics", &[]);
    assert_eq!(promtool_check(&text.body), "");
    let open = get(node, "/metrics", &["-H", "Accept: application/openmetrics-text"]);
    assert!(open.body.ends_with("# EOF\n"), "{}", open.body);
}

/// Rules with an inspector of each kind, and a name that is learned.
const INSPECTED: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [all]
    toPorts:
    - ports: [{port: "80", protocol: TCP}]
      rules:
        http: [{method: GET, path: /allowed}]
  - toEntities: [all]
    toPorts:
    - ports: [{port: "8443", protocol: TCP}]
      serverNames: [good.example]
  - toEntities: [all]
    toPorts:
    - ports: [{port: "53", protocol: UDP}]
      rules:
        dns: [{matchName: www.example}]
  - toFQDNs: [{matchName: www.example}]
    toPorts:
    - ports: [{port: "9999", protocol: TCP}]
"#;

#[test]
fn metrics_of_workers_rules_events_names_and_secrets_have_their_values() {
    const DENIED: usize = 50;
    const BEGINNING: &str = "GET /allowed HTTP/1.1\r\nHost: ";
    let apps = apps();
    let node = apps.ns("node");
    let _webs = webs(&apps, ["internet"], &[WEB], &[]);
    let _opaque =
        opaque_tls::server(apps.ns("internet"), &apps.both("internet"), &[OPAQUE]).expect("a TLS server");
    let _dns = Server::dnsmasq(
        apps.ns("internet"),
        &apps.both("internet"),
        &["www.example. 60 IN A 192.0.2.9"],
    )
    .expect("dnsmasq");
    let dir = temp_dir("secrets").expect("a directory");
    let secrets = Secrets::new(dir.path()).expect("secrets");
    secrets.identity("shown", &apps.certificate).expect("a secret");
    let settings = tables(&format!(
        "{METRICS}[limits]\nevents_per_second = 1\n{}",
        secrets.table("")
    ));
    let daemon = daemon_with(&apps.topology, &settings, &[("client.yaml", INSPECTED)]);
    let of_workers =
        |found: &BTreeMap<String, f64>, name: &str| sum(found, &format!("palisade_worker_{name}{{"));
    let mut opaque = Vec::new();
    for family in FAMILIES {
        let url = format!("http://{}/allowed", apps.at("internet", family, WEB));
        assert_eq!(curl(apps.ns("client"), &[&url], OPEN).expect("curl").status, 200);
        assert_eq!(question(&apps, family, "www.example"), Some(0));
        datagrams(&apps, family, 4_000, DENIED);
        let to = apps.at("internet", family, OPAQUE);
        opaque.push(Secret::open(apps.ns("client"), to, "good.example").expect("a connection"));
    }
    let denied = 2.0 * DENIED as f64;
    let found = expect(
        &daemon,
        node,
        &[
            (
                r#"palisade_drop_packets_total{reason="POLICY_DENIED",direction="egress"}"#,
                denied,
            ),
            // One name of one endpoint, with one address.
            ("palisade_learned_names", 1.0),
            ("palisade_learned_addresses", 1.0),
            ("palisade_learned_addresses_in_map", 1.0),
            ("palisade_learned_addresses_unwritten", 0.0),
            ("palisade_learned_write_failures_total", 0.0),
            (r#"palisade_dns_answers_total{outcome="committed"}"#, 2.0),
            (r#"palisade_dns_answers_total{outcome="withheld"}"#, 0.0),
            ("palisade_offloaded_connections", 2.0),
            (
                r#"palisade_inspection_events_total{group="tls.tcp",event="offloaded"}"#,
                2.0,
            ),
            ("palisade_secret_problems", 0.0),
            ("palisade_inspection_held_packets", 0.0),
        ],
    );
    assert!(found["palisade_learned_names_bytes"] > 0.0);
    let expiry = found
        .iter()
        .find(|(name, _)| name.starts_with(&format!("{EXPIRY}{{secret=\"default/shown\",key=\"tls.crt\"")));
    assert_eq!(
        expiry.expect("the certificate").1,
        &end_of(&apps.certificate.cert)
    );

    // Each denied packet has an event, or is counted because it has none.
    let drops = r#"hubble_flows_processed_total{protocol="UDP",type="Drop",subtype="",verdict="DROPPED"}"#;
    let unsent = [
        r#"palisade_events_suppressed_total{kind="drop",reason="POLICY_DENIED"}"#,
        r#"palisade_events_lost_total{kind="drop",reason="POLICY_DENIED"}"#,
    ];
    let mut last = BTreeMap::new();
    let met = wait_until("all events", OPEN, || {
        last = scrape(node);
        let value = |name: &str| last.get(name).copied().unwrap_or_default();
        value(drops) + value(unsent[0]) + value(unsent[1]) == denied
    });
    assert!(met.is_ok(), "{last:#?}");
    // At most one event in each second of each CPU is sent.
    assert!(last[unsent[0]] > 0.0 && last[drops] > 0.0, "{last:#?}");

    // The denied packets are those of the default deny: IPv4 and IPv6 headers, UDP headers, and one byte each.
    let of_rule = |name: &str| {
        let prefix = format!("palisade_rule_{name}_total{{");
        let rules = found.iter().filter(|(rule, _)| rule.starts_with(&prefix));
        let denying = rules.filter(|(rule, _)| rule.contains("default deny of egress"));
        denying.map(|(_, value)| value).sum::<f64>()
    };
    assert_eq!(
        (of_rule("packets"), of_rule("bytes")),
        (denied, (DENIED * (29 + 49)) as f64),
        "{found:#?}"
    );

    // Two messages of each query, and at least the handshake and a message of each TCP connection.
    assert!(
        of_workers(&found, "punted_packets_total") >= 2.0 * (2.0 + 4.0 + 4.0),
        "{found:#?}"
    );
    assert!(
        of_workers(&found, "reinjected_packets_total") >= 2.0 * (2.0 + 4.0 + 4.0),
        "{found:#?}"
    );
    let status = daemon.status().expect("status");
    let workers = status["workers"]["workers"].as_array().expect("workers");
    let reported = |field: fn(&Value) -> &Value| -> f64 {
        workers.iter().filter_map(|worker| field(worker).as_f64()).sum()
    };
    let found = scrape(node);
    let frames = of_workers(&found, "frames");
    assert!(
        frames > 0.0 && frames == reported(|worker| &worker["frames"]),
        "{status:#}"
    );
    assert_eq!(of_workers(&found, "umem_bytes"), frames * 4_096.0);
    assert_eq!(
        of_workers(&found, "fill_ring_empty_total"),
        reported(|worker| &worker["ring"]["rx_fill_ring_empty"])
    );
    assert_eq!(of_workers(&found, "held_frames"), 0.0);
    let up = found
        .keys()
        .filter(|name| name.starts_with("palisade_worker_up{"));
    assert_eq!(up.count(), workers.len());
    assert_eq!(of_workers(&found, "up"), workers.len() as f64);

    // Entries of the conntrack map, while no connection begins or ends.
    let mut pair = (0.0, 0);
    wait_until("the entries of the map", OPEN, || {
        let listed = daemon.json(&["bpf", "ct", "list"]).expect("list");
        let listed = listed.as_array().map_or(0, Vec::len);
        pair = (scrape(node)["palisade_map_entries{map=\"conntrack\"}"], listed);
        pair.0 == listed as f64 && listed >= 6
    })
    .unwrap_or_else(|error| panic!("{error:#}: {pair:?}"));

    // The beginning of a request is kept until the request is complete.
    let at = apps.at("internet", Family::V4, WEB);
    let mut client = apps
        .ns("client")
        .enter(|| TcpStream::connect(at).expect("a connection"));
    let kept = "palisade_inspection_unacknowledged_bytes";
    client.write_all(BEGINNING.as_bytes()).expect("written");
    expect(&daemon, node, &[(kept, BEGINNING.len() as f64)]);
    client
        .write_all(b"a\r\nConnection: close\r\n\r\n")
        .expect("written");
    let mut answer = String::new();
    client.set_read_timeout(Some(OPEN)).expect("a timeout");
    client.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    expect(&daemon, node, &[(kept, 0.0)]);
}

/// Port of a server that does not speak TLS after the hello.
const OPAQUE: u16 = 8443;

#[test]
fn series_of_removed_rules_are_gone_and_those_of_others_continue() {
    let apps = apps();
    let node = apps.ns("node");
    let changing = |n: usize| {
        DNS.replace("{name: dns}", &format!("{{name: changing-{n}}}"))
            .replace("\"53\"", "\"4000\"")
            .split("      rules:")
            .next()
            .expect("a policy")
            .to_owned()
    };
    let policies = [("dns.yaml", DNS), ("changing.yaml", &*changing(0))];
    let daemon = daemon_with(&apps.topology, &tables(METRICS), &policies);
    for n in 0..4 {
        if n > 0 {
            let changes = "palisade_policy_enforcement_delay_seconds_count";
            let before = scrape(node)[changes];
            daemon.write("changing.yaml", &changing(n)).expect("a file");
            expect(&daemon, node, &[(changes, before + 1.0)]);
        }
        for family in FAMILIES {
            datagrams(&apps, family, 4_000, 3);
            datagrams(&apps, family, 53, 1);
        }
        // Each change makes a rule, which counts the datagrams, and ICMP errors about them. The rule that stays has
        // counted the packets of all rounds.
        let wanted = (
            BTreeSet::from([format!("default/changing-{n}")]),
            2.0 * (n + 1) as f64,
        );
        let mut counted = 0.0;
        let mut found = Default::default();
        wait_until("the rules in force", OPEN, || {
            let samples = scrape(node);
            let of_policy = |name: &str| -> Vec<(String, f64)> {
                let rules = samples
                    .iter()
                    .filter(|(rule, _)| rule.starts_with("palisade_rule_packets_total{"));
                rules
                    .filter_map(|(rule, value)| {
                        let (_, policy) = rule.split_once("policy=\"")?;
                        let (policy, _) = policy.split_once('"')?;
                        (policy.starts_with(name) && rule.contains("egress rule 1"))
                            .then(|| (policy.to_owned(), *value))
                    })
                    .collect()
            };
            let (changing, dns) = (of_policy("default/changing-"), of_policy("default/dns"));
            found = (
                changing.iter().map(|(policy, _)| policy.clone()).collect(),
                dns.iter().map(|(_, value)| value).sum::<f64>(),
            );
            counted = changing.iter().map(|(_, value)| value).sum::<f64>();
            found == wanted && counted >= 6.0
        })
        .unwrap_or_else(|error| {
            panic!(
                "{error:#}: {found:?} and {counted}, not {wanted:?}\n{}",
                get(node, "/metrics", &[]).body
            )
        });
        let text = get(node, "/metrics", &[]).body;
        assert!(!text.contains("no rule of"), "{text}");
    }
}

fn sum(samples: &BTreeMap<String, f64>, prefix: &str) -> f64 {
    samples
        .iter()
        .filter(|(name, _)| name.starts_with(prefix))
        .map(|(_, value)| value)
        .sum()
}

#[test]
fn dashboard_and_alert_rules_use_only_metrics_of_a_scrape() {
    let apps = apps();
    let all = METRICS.replace("\"drop\"", "\"drop\", \"flows-to-world\", \"kafka\"");
    let _daemon = client_only_with(&apps, &tables(&all), &[WEB], RULES);
    let scraped = get(apps.ns("node"), "/metrics", &[]).body;
    let types: BTreeSet<&str> = scraped
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    let mut used = 0;
    for file in [
        "config/grafana/palisade.json",
        "config/prometheus/palisade.rules.yml",
    ] {
        let text = fs::read_to_string(repository(file)).expect("file");
        let expressions = text.lines().filter(|line| !line.trim_start().starts_with('#'));
        for word in
            expressions.flat_map(|line| line.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')))
        {
            let is_metric = ["palisade_", "hubble_", "process_"]
                .iter()
                .any(|prefix| word.starts_with(prefix));
            let name = ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|suffix| word.strip_suffix(suffix))
                .unwrap_or(word);
            if is_metric {
                assert!(types.contains(name), "{file}: {word} is not in a scrape");
                used += 1;
            }
        }
    }
    assert!(used > 70, "{used}");
    for (command, file) in [
        ("check", "palisade.rules.yml"),
        ("test", "palisade.rules.test.yml"),
    ] {
        let mut promtool = Command::new("promtool");
        promtool
            .args([command, "rules"])
            .arg(repository("config/prometheus").join(file));
        let out = output(&mut promtool, OPEN).expect("promtool");
        assert!(out.status.success(), "{out:?}");
    }
}

/// Returns the end of the validity of a certificate as openssl says it, Unix time.
fn expiry(certificate: &Path) -> f64 {
    let script = "date -u -d \"$(openssl x509 -noout -enddate -in \"$0\" | cut -d= -f2)\" +%s";
    let out = output(Command::new("sh").args(["-c", script]).arg(certificate), OPEN).expect("openssl");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.trim().parse().unwrap_or_else(|_| panic!("{out:?}"))
}

#[test]
fn certificates_secrets_and_intercepted_connections_are_measured() {
    const HTTPS: u16 = 443;
    const REFUSED: u16 = 8443;
    const WITHOUT_SECRET: u16 = 8444;
    let lab = lab();
    let node = lab.apps.ns("node");
    let internet = lab.apps.both("internet");
    let _peer = Peer::start_tls(lab.apps.ns("internet"), HTTPS, &internet, &lab.server).expect("peer");
    let settings = Settings {
        tables: lab.secrets.table("proxy_threads = 1\n") + METRICS,
        ..Settings::default()
    };
    let good = policy("client", "egress", &[HTTPS, REFUSED], INTERCEPTED);
    let absent = INTERCEPTED.replace("name: shown", "name: absent");
    let bad = policy("client", "egress", &[WITHOUT_SECRET], &absent).replace("client-egress", "client-bad");
    let daemon = lab.daemon(&settings, &[("good.yaml", &good), ("bad.yaml", &bad)]);
    for family in FAMILIES {
        let at = |port: u16| lab.apps.at("internet", family, port);
        for (port, path, status) in [
            (HTTPS, "/allowed", 200),
            (HTTPS, "/denied", 403),
            (REFUSED, "/allowed", 503),
        ] {
            let got = lab.ask("client", "www.web.example", at(port), path, &[]);
            assert_eq!(got.status, status, "{got:?}\n{}", daemon.report());
        }
    }
    // The lab's certificates are valid for two days.
    let shown = lab.secrets.folder("shown").join("tls.crt");
    let soon = "the certificate tls.crt of secret default/shown expires in 1 day";
    let samples = expect(
        &daemon,
        node,
        &[
            (
                "palisade_certificate_expiry_timestamp_seconds{secret=\"default/shown\",key=\"tls.crt\",index=\"0\",\
                 subject=\"CN=shown\"}",
                expiry(&shown),
            ),
            ("palisade_secret_problems", 1.0),
            (
                "palisade_proxy_failures_total{reason=\"connection refused\"}",
                2.0,
            ),
            ("palisade_proxy_failures_total{reason=\"connect timeout\"}", 0.0),
            ("palisade_proxy_events_total{event=\"requests\"}", 6.0),
            ("palisade_proxy_events_total{event=\"denied\"}", 2.0),
            ("palisade_proxy_events_total{event=\"client_handshakes\"}", 6.0),
            ("palisade_proxy_events_total{event=\"upstream_handshakes\"}", 4.0),
            ("palisade_proxy_events_total{event=\"accept_overflows\"}", 0.0),
            ("palisade_proxy_connections{thread=\"0\"}", 0.0),
            ("palisade_proxy_thread_up{thread=\"0\"}", 1.0),
            ("palisade_proxy_restarts_total{thread=\"0\"}", 0.0),
        ],
    );
    for from in ["clients", "servers"] {
        let bytes = samples[&format!("palisade_proxy_bytes_total{{from=\"{from}\"}}")];
        assert!(bytes > 0.0, "{from}: {bytes}");
    }
    let status = daemon.status().expect("status");
    let warnings = status["warnings"].to_string();
    assert!(
        warnings.contains(soon) && warnings.contains("secret default/absent is missing"),
        "{status:#}"
    );
    let text = daemon.cli(&["status"]).expect("status");
    assert!(text.contains(soon), "{text}");

    // The missing secret comes, and one with an expired certificate.
    let made = |name: &str, validity| {
        lab.ours
            .server(name, &HOSTS, validity, true)
            .expect("certificate")
    };
    lab.secrets
        .identity("absent", &made("late", Validity::Now))
        .expect("secret");
    expect(&daemon, node, &[("palisade_secret_problems", 0.0)]);
    let old = made("old", Validity::Expired);
    lab.secrets.identity("old", &old).expect("secret");
    let old_expiry = "palisade_certificate_expiry_timestamp_seconds{secret=\"default/old\",key=\"tls.crt\",index=\"0\",\
                      subject=\"CN=old\"}";
    expect(
        &daemon,
        node,
        &[("palisade_secret_problems", 1.0), (old_expiry, expiry(&old.cert))],
    );
    daemon
        .wait_status("a warning about the expired certificate", |status| {
            let warnings = status["warnings"].to_string();
            warnings.contains("the certificate tls.crt of secret default/old has expired")
                && !warnings.contains("absent is missing")
        })
        .unwrap_or_else(|error| panic!("{error:#}"));
}

#[test]
fn a_prometheus_scrapes_the_daemon_and_answers_a_query() {
    let apps = apps();
    let node = apps.ns("node");
    let daemon = client_only_with(&apps, &tables(METRICS), &[WEB], RULES);
    for family in FAMILIES {
        datagrams(&apps, family, 4_000, 3);
    }
    let dir = temp_dir("prometheus").expect("a directory");
    let job = fs::read_to_string(repository("config/prometheus/prometheus.yml")).expect("file");
    let rules = repository("config/prometheus/palisade.rules.yml");
    let job = job
        .replace(
            "scrape_interval: 15s",
            "scrape_interval: 1s\n  evaluation_interval: 1s",
        )
        .replace("palisade.rules.yml", &rules.display().to_string());
    let config = dir.path().join("prometheus.yml");
    fs::write(&config, job).expect("a file");
    let mut command = node.command("prometheus");
    command
        .arg(format!("--config.file={}", config.display()))
        .arg(format!(
            "--storage.tsdb.path={}",
            dir.path().join("data").display()
        ))
        .arg("--web.listen-address=127.0.0.1:9091");
    let prometheus = Process::spawn("prometheus", command, dir.path()).expect("prometheus");
    let ask = |path: &str| -> Value {
        let url = format!("http://127.0.0.1:9091/api/v1/{path}");
        let got = curl(node, &[&url], OPEN).expect("curl");
        serde_json::from_str(&got.body).unwrap_or_default()
    };
    let value = |query: &str| {
        let answer = ask(&format!("query?query={query}"));
        answer["data"]["result"][0]["value"][1]
            .as_str()
            .map(str::to_owned)
    };
    for (query, wanted) in [
        ("up%7Bjob=%22palisade%22%7D", "1"),
        ("palisade_ready", "1"),
        (
            "sum(palisade_drop_packets_total%7Breason=%22POLICY_DENIED%22%7D)",
            "6",
        ),
        ("sum(hubble_flows_processed_total%7Btype=%22Drop%22%7D)", "6"),
        ("count(palisade_policy_enforcement_delay_seconds_bucket)", "14"),
    ] {
        let mut found = None;
        let met = wait_until(query, OPEN, || {
            found = value(query);
            found.as_deref() == Some(wanted)
        });
        assert!(
            met.is_ok(),
            "{query}: {found:?}\n{}\n{}",
            prometheus.log(),
            daemon.report()
        );
    }
    // Prometheus understands every expression of the dashboard.
    let dashboard = fs::read_to_string(repository("config/grafana/palisade.json")).expect("file");
    let mut panels = 0;
    for line in dashboard
        .lines()
        .filter_map(|line| line.trim().strip_prefix("\"expr\": "))
    {
        let expression: String = serde_json::from_str(line.trim_end_matches(',')).expect("a text");
        let expression = expression
            .replace("$__rate_interval", "1m")
            .replace("$instance", ".*");
        let query = format!("query={expression}");
        let url = "http://127.0.0.1:9091/api/v1/query";
        let got = curl(node, &["--data-urlencode", &query, url], OPEN).expect("curl");
        let answer: Value = serde_json::from_str(&got.body).unwrap_or_default();
        assert_eq!(answer["status"], "success", "{expression}: {got:?}");
        panels += 1;
    }
    assert!(panels > 50, "{panels}");
    let targets = ask("targets");
    assert_eq!(
        targets["data"]["activeTargets"][0]["lastError"], "",
        "{targets:#}"
    );
    let groups = ask("rules");
    let evaluated = groups["data"]["groups"][0]["rules"].as_array().expect("rules");
    assert!(evaluated.len() >= 16, "{groups:#}");
    for rule in evaluated {
        assert_ne!(rule["health"], "err", "{rule:#}");
        assert_eq!(rule["state"], "inactive", "{rule:#}");
    }
}

#[test]
fn slow_idle_and_malformed_clients_do_not_keep_a_scrape_from_working() {
    let apps = apps();
    let node = apps.ns("node");
    let daemon = client_only_with(&apps, &tables(METRICS), &[WEB], RULES);
    let connect = || TcpStream::connect("127.0.0.1:9965").expect("a connection");
    let mut idle: Vec<TcpStream> = node.enter(|| (0..200).map(|_| connect()).collect());
    // A client that sends a request head byte by byte, and one that does not read its answers.
    let slow = node.enter(connect);
    let mut deaf = node.enter(connect);
    let request = "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n".repeat(50);
    let _ = deaf.write_all(request.as_bytes());
    let sender = thread::spawn(move || {
        let mut slow = slow;
        for byte in b"GET /metrics HTTP/1.1\r\nX: ".iter().chain([b'a'; 1_000].iter()) {
            if slow.write_all(&[*byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    for _ in 0..5 {
        let found = scrape(node);
        assert!(
            found["palisade_metrics_clients"] <= 64.0,
            "{}",
            found["palisade_metrics_clients"]
        );
        idle.extend(node.enter(|| (0..20).map(|_| connect()).collect::<Vec<_>>()));
    }
    expect(&daemon, node, &[("palisade_ready", 1.0)]);
    let found = scrape(node);
    assert!(found["palisade_metrics_clients_ended_total{cause=\"evicted\"}"] > 100.0);
    assert_eq!(get(node, "/healthz", &[]).status, 200);
    drop(idle);
    sender.join().expect("the slow client");

    let long = format!("X-Long: {}", "a".repeat(60_000));
    for (path, args, status) in [
        ("/metrics", &["-X", "POST", "-d", "x"][..], 405),
        ("/metrics", &["-X", "DELETE"], 405),
        ("/", &[], 404),
        ("/metrics/../etc/passwd", &[], 404),
        ("/metrics", &["-H", &long], 431),
        ("/metrics", &["-I"], 200),
        ("/readyz", &["-I"], 200),
    ] {
        let got = get(node, path, args);
        assert_eq!(got.status, status, "{path} {args:?}: {got:?}");
    }
    for garbage in [
        &b"\x00\x01\x02\r\n\r\n"[..],
        b"GET /metrics HTTP/9\r\n\r\n",
        &[b'\n'; 5_000],
    ] {
        let mut stream = node.enter(connect);
        let _ = stream.write_all(garbage);
        let _ = stream.set_read_timeout(Some(OPEN));
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(
            !answer.starts_with(b"HTTP/1.1 200"),
            "{}",
            String::from_utf8_lossy(&answer)
        );
    }
    scrape(node);
}

#[test]
fn readyz_reports_broken_policies_and_missing_interfaces() {
    let mut apps = apps();
    let text = policy("client", "egress", &[WEB], RULES);
    let broken = text.replace("http:", "htpt:");
    let mut daemon =
        Daemon::prepare(&apps.topology, &tables(METRICS), &[("client.yaml", &broken)]).expect("daemon");
    daemon.spawn().expect("daemon");
    let node = apps.ns("node").clone();
    let wait_for = |status: u16, part: &str| {
        let mut got = None;
        let met = wait_until("the answer", Duration::from_secs(90), || {
            let url = "http://127.0.0.1:9965/readyz";
            let found = curl(&node, &[url], OPEN).expect("curl");
            let met = found.status == status && found.body.contains(part);
            got = Some(found);
            met
        });
        assert!(met.is_ok(), "{status} {part}: {got:?}\n{}", daemon.log());
    };
    wait_for(503, "client.yaml: broken");
    // The threads are alive all the same.
    let alive = get(&node, "/healthz", &[]);
    assert_eq!(
        (alive.status, alive.body.as_str()),
        (200, "{\"status\":\"alive\",\"missing\":[]}\n")
    );
    assert_eq!(scrape(&node)["palisade_ready"], 0.0);
    daemon.write("client.yaml", &text).expect("a file");
    wait_for(200, "{\"status\":\"ready\",\"missing\":[]}");
    apps.topology.unplug("client").expect("unplug");
    wait_for(503, "interface ");
    apps.topology.plug("client").expect("plug");
    wait_for(200, "ready");
}

#[test]
fn the_ends_of_flows_are_labels_and_flows_that_were_overwritten_are_counted_as_lost() {
    let apps = apps();
    let node = apps.ns("node");
    // A ring of 16 flows, and a limit of events that no burst of this test reaches.
    let settings = tables(
        "[limits]\nflows = 16\nevents_per_second = 100000\n\
         [metrics]\nlisten = \"127.0.0.1:9965\"\nseries_per_metric = 2\nhubble = [\n  \
         \"drop:sourceContext=pod;destinationContext=dns|reserved-identity|ip;labelsContext=source_app,traffic_direction\",\n  \
         \"flow\", \"flows-to-world:port\",\n]\n",
    );
    let daemon = client_only_with(&apps, &settings, &[WEB], RULES);
    for family in FAMILIES {
        datagrams(&apps, family, 4_000, 2);
    }
    let common = r#"reason="POLICY_DENIED",protocol="UDP",source_app="client",traffic_direction="egress",source="default/client""#;
    let by_family = ["reserved:world-ipv4", "reserved:world-ipv6"]
        .map(|world| format!("hubble_drop_total{{{common},destination=\"{world}\"}}"));
    let mut wanted: Vec<(&str, f64)> = by_family.iter().map(|name| (name.as_str(), 4.0)).collect();
    wanted.push((
        r#"hubble_flows_to_world_total{protocol="UDP",verdict="DROPPED",port="4000"}"#,
        8.0,
    ));
    expect(&daemon, node, &wanted);

    // More ports than time series; and more flows at a time than the ring holds.
    for port in 5_000..5_010 {
        datagrams(&apps, Family::V4, port, 300);
    }
    let (sent, made) = (10.0 * 300.0, "palisade_flows_recorded_total");
    let lost = r#"hubble_lost_events_total{source="hubble_ring_buffer"}"#;
    let mut last = BTreeMap::new();
    let met = wait_until("all flows", OPEN, || {
        last = scrape(node);
        let counted = sum(&last, "hubble_flows_processed_total{");
        last[lost] > 0.0 && last[made] >= 2.0 * sent && counted + last[lost] == last[made]
    });
    assert!(met.is_ok(), "{last:#?}");
    assert_eq!(
        last[r#"palisade_drop_packets_total{reason="POLICY_DENIED",direction="egress"}"#],
        sent + 4.0
    );
    let overflow = r#"hubble_flows_to_world_total{protocol="UDP",verdict="DROPPED",port="_overflow"}"#;
    let overflows = last[r#"palisade_metrics_overflows_total{metric="hubble_flows_to_world_total"}"#];
    assert!(overflows > 0.0 && last[overflow] == overflows, "{last:#?}");
    let series = last
        .keys()
        .filter(|name| name.starts_with("hubble_flows_to_world_total{"))
        .count();
    assert_eq!(series, 3);
}

#[test]
fn series_of_a_removed_endpoint_end_after_the_grace_time_and_those_of_others_continue() {
    const OF_DROPS: &str = "hubble_drop_total{reason=\"POLICY_DENIED\",protocol=\"UDP\",";
    let apps = apps();
    let node = apps.ns("node");
    let settings = tables(
        "[metrics]\nlisten = \"127.0.0.1:9965\"\nseries_grace = \"4s\"\nhubble = [\n  \
         \"drop:labelsContext=source_pod,source_app;sourceContext=ip\",\n  \"flow:sourceContext=identity\",\n]\n",
    );
    let [client, server] = ["client", "server"].map(|name| policy(name, "egress", &[WEB], RULES));
    let daemon = daemon_with(
        &apps.topology,
        &settings,
        &[("client.yaml", &client), ("server.yaml", &server)],
    );
    let send = |name: &str| {
        for family in FAMILIES {
            datagrams_of(name, &apps, family, 4_000, 1);
        }
    };
    // A datagram has an event of its verdict and one of its drop.
    let series = |name: &str, family: Family| {
        let address = apps.topology.addr(name, family);
        format!("{OF_DROPS}source_pod=\"{name}\",source_app=\"{name}\",source=\"{address}\"}}")
    };
    let all: Vec<String> = ["client", "server"]
        .into_iter()
        .flat_map(|name| FAMILIES.map(|family| series(name, family)))
        .collect();
    send("client");
    send("server");
    let wanted: Vec<(&str, f64)> = all.iter().map(|name| (name.as_str(), 2.0)).collect();
    let found = expect(&daemon, node, &wanted);
    let of = |found: &BTreeMap<String, f64>, text: &str| {
        found
            .keys()
            .filter(|name| name.starts_with("hubble_") && name.contains(text))
            .count()
    };
    let client_series = of(&found, "client");
    assert!(client_series > 2, "{found:#?}");

    remove_endpoint(&daemon, "client");
    // The final values remain for the grace time.
    expect(&daemon, node, &wanted);
    wait_until("the series end", OPEN, || of(&scrape(node), "client") == 0)
        .unwrap_or_else(|error| panic!("{error:#}\n{:#?}", scrape(node)));
    send("server");
    let [_, _, v4, v6] = &all[..] else {
        panic!("{all:?}")
    };
    let found = expect(&daemon, node, &[(v4, 4.0), (v6, 4.0)]);
    assert_eq!(of(&found, "client"), 0, "{found:#?}");
    let ended = sum(&found, "palisade_metrics_ended_series_total{");
    assert_eq!(ended, client_series as f64);
}

#[test]
fn an_address_in_use_is_a_warning_and_not_the_end_of_the_daemon() {
    let apps = apps();
    let node = apps.ns("node");
    let taken = node.enter(|| TcpListener::bind("127.0.0.1:9965").expect("a listener"));
    let daemon = client_only_with(&apps, &tables(METRICS), &[WEB], RULES);
    let warned = || {
        let status = daemon.json(&["status"]).expect("status");
        status["warnings"]
            .to_string()
            .contains("[metrics] listen: 127.0.0.1:9965: Address already in use")
    };
    wait_until("the warning", OPEN, warned).expect("a warning");
    drop(taken);
    wait_until("the end of the warning", OPEN, || !warned()).expect("no warning");
    scrape(node);
}

#[test]
fn with_tls_only_clients_with_a_certificate_read_metrics_and_changed_files_are_read_again() {
    let apps = apps();
    let node = apps.ns("node");
    let dir = temp_dir("certificates").expect("a directory");
    let [ours, theirs] =
        ["ours", "theirs"].map(|name| Authority::root(dir.path(), name).expect("an authority"));
    let host = "metrics.example";
    let made = |authority: &Authority, name: &str| {
        let made = authority
            .server(name, &[host], Validity::Now, false)
            .expect("a certificate");
        fs::set_permissions(&made.key, Permissions::from_mode(0o600)).expect("permissions");
        made
    };
    let (first, second) = (made(&ours, "first"), made(&ours, "second"));
    let (client, stranger) = (made(&ours, "client"), made(&theirs, "stranger"));
    let path = |name: &str| dir.path().join(name);
    let put = |from: &Path, to: &str| {
        fs::copy(from, path("new")).expect("a copy");
        fs::rename(path("new"), path(to)).expect("a file");
    };
    put(&first.cert, "tls.crt");
    put(&first.key, "tls.key");
    let files = format!(
        "tls_certificate = {:?}\ntls_key = {:?}\nclient_ca = {:?}\n",
        path("tls.crt"),
        path("tls.key"),
        ours.cert
    );
    let tls = format!("[metrics]\nlisten = \"[::]:9965\"\n{files}[hubble]\nlisten = \"[::]:4244\"\n{files}");
    let daemon = client_only_with(&apps, &tables(&tls), &[WEB], RULES);
    let ca = ours.cert.to_str().expect("a path");
    let ask = |family: Family, certificate: Option<&Certificate>| {
        let address = apps.topology.get("client").gateway(family);
        let address = match family {
            Family::V4 => address.to_string(),
            Family::V6 => format!("[{address}]"),
        };
        let to = format!("{host}:9965:{address}:9965");
        let url = format!("https://{host}:9965/metrics");
        let mut args = vec!["--cacert", ca, "--connect-to", &to];
        if let Some(certificate) = certificate {
            args.extend(["--cert", certificate.cert.to_str().expect("a path")]);
            args.extend(["--key", certificate.key.to_str().expect("a path")]);
        }
        args.extend(["-v", &url]);
        curl(node, &args, OPEN).expect("curl")
    };
    for family in FAMILIES {
        let got = ask(family, Some(&client));
        assert!(
            got.status == 200 && got.body.contains("palisade_ready 1"),
            "{got:?}\n{}",
            daemon.log()
        );
        for certificate in [None, Some(&stranger)] {
            let got = ask(family, certificate);
            assert!(got.status == 0 && got.body.is_empty(), "{got:?}");
        }
        // Clear text.
        let got = curl(node, &["http://127.0.0.1:9965/metrics"], OPEN).expect("curl");
        assert_eq!((got.status, got.body.as_str()), (0, ""), "{got:?}");
    }
    assert!(ask(Family::V4, Some(&client)).error.contains("CN=first"));
    // The certificates of both listeners, until they are replaced.
    let expires = |certificate: &Certificate, name: &str| {
        let end = end_of(&certificate.cert);
        let met = wait_until(name, OPEN, || {
            let body = ask(Family::V4, Some(&client)).body;
            let all = body
                .lines()
                .filter_map(|line| line.strip_prefix(EXPIRY)?.rsplit_once(' '));
            let all: BTreeMap<&str, f64> = all
                .map(|(labels, value)| (labels, value.parse().expect("a number")))
                .collect();
            let wanted = ["hubble", "metrics"].map(|section| {
                format!(
                    "{{secret=\"[{section}]\",key=\"tls_certificate\",index=\"0\",subject=\"CN={name}\"}}"
                )
            });
            all.len() == 2 && wanted.iter().all(|labels| all.get(&**labels) == Some(&end))
        });
        met.unwrap_or_else(|error| panic!("{error:#}: {end}: {}", ask(Family::V4, Some(&client)).body));
    };
    expires(&first, "first");

    // A key that does not fit: the first certificate stays in use, and the status says why.
    put(&second.key, "tls.key");
    let warnings = || daemon.json(&["status"]).expect("status")["warnings"].to_string();
    let warned = || warnings().contains("[metrics] tls_certificate: ");
    wait_until("a warning", OPEN, warned).unwrap_or_else(|_| panic!("{}", warnings()));
    assert!(
        warnings().contains("the last good certificates stay in use"),
        "{}",
        warnings()
    );
    assert!(ask(Family::V4, Some(&client)).error.contains("CN=first"));
    put(&second.cert, "tls.crt");
    wait_until("the second certificate", OPEN, || {
        ask(Family::V6, Some(&client)).error.contains("CN=second")
    })
    .expect("the second certificate");
    wait_until("no warning", OPEN, || !warned()).expect("no warning");
    expires(&second, "second");

    // Clients that begin no handshake do not keep others from scraping.
    let connect = || TcpStream::connect("127.0.0.1:9965").expect("a connection");
    let idle: Vec<TcpStream> = node.enter(|| (0..200).map(|_| connect()).collect());
    assert_eq!(ask(Family::V4, Some(&client)).status, 200);
    drop(idle);

    // --check-config names what is wrong with the files.
    fs::set_permissions(path("tls.key"), Permissions::from_mode(0o644)).expect("permissions");
    let config = daemon.config().display().to_string();
    let out = daemon.try_cli(&["run", "--check-config"]).expect("palisade");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(
        said.contains("every user can use this private key (mode 0644)"),
        "{config}: {said}"
    );
}
