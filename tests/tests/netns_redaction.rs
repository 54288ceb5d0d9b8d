//! Secrets in requests and responses: no output of the daemon or of a command contains them.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::sys::signal::Signal;
use palisade_testbed::{
    Daemon,
    ns::wait_until,
    process::{Process, output},
    topology::FAMILIES,
    web::{Talk, curl},
};
use palisade_tests::fixtures::{
    hubble::{call, calls, socket},
    intercept::{Lab, lab},
    python::{self, NodeServer},
};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(60);
const CLEAR: u16 = 80;
const HTTPS: u16 = 443;
const H2C: u16 = 8080;
const NAME: &str = "www.web.example";
const METRICS: &str = "http://127.0.0.1:9965/metrics";

/// Part of every secret, and the last one's form in the field Authorization of basic authentication (`user4711zz:pw`).
const SECRETS: [&str; 2] = ["4711zz", "dXNlcjQ3MTF6ejpwdw"];
/// Value of the secret of the policy.
const KEY: &str = "key4711zz";

const TABLES: &str = "[http]
record_headers = [\"user-agent\", \"authorization\", \"cookie\", \"set-cookie\", \"location\", \"referer\", \"x-api-key\", \
                      \"x-auth-token\", \"proxy-authorization\"]
[metrics]
listen = \"127.0.0.1:9965\"
hubble = [\"dns\", \"drop\", \"flow\", \"httpV2\", \"icmp\", \"policy\", \"port-distribution\", \"tcp\"]
";

/// The proxy inspects port 443; the workers inspect the others, or with `[http] clear_text_http2` the proxy.
const POLICY: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [all]
    toPorts:
    - ports: [{port: \"443\", protocol: TCP}]
      terminatingTLS: {secret: {namespace: default, name: shown}}
      originatingTLS: {secret: {namespace: default, name: trusted}}
      rules:
        http:
        - {method: GET, path: \"/allowed.*\"}
        - {method: GET, path: \"/keyed.*\", headerMatches: [{name: X-Api-Key, secret: {namespace: default, name: key}}]}
  - toEntities: [all]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}, {port: \"8080\", protocol: TCP}]
      rules:
        http: [{method: GET, path: \"/allowed.*\"}]
";

/// Header fields with secrets.
const FIELDS: [&str; 6] = [
    "Authorization: Bearer bearer4711zz",
    "Cookie: session=cookie4711zz; other=4711zz",
    "Proxy-Authorization: Basic proxy4711zz",
    "X-Auth-Token: auth4711zz",
    "X-Api-Key: key4711zz",
    "Referer: http://user4711zz:pw4711zz@other.example/a?token=referer4711zz",
];

/// Requests with a secret in a place that an inspector may quote when it refuses them.
const BROKEN: [&str; 7] = [
    "GET /allowed?token=4711zz HTTP/9.9\r\nHost: www.web.example\r\n\r\n",
    "GET /allowed HTTP/1.1\r\nHost: www.web.example\r\nAuthorization : Bearer 4711zz\r\n\r\n",
    "GET /allowed HTTP/1.1\r\nHost: www.web.example\r\nCookie: session=4711zz\r\n folded4711zz\r\n\r\n",
    "GET /allowed HTTP/1.1\r\nHost: www.web.example\r\nAuthorization\r\nX-Api-Key: 4711zz\r\n\r\n",
    "GET http://user4711zz:pw4711zz@www.web.example/denied?token=4711zz HTTP/1.1\r\nHost: www.web.example\r\n\r\n",
    "GET /allowed HTTP/1.1\r\nHost: user4711zz:pw4711zz@www.web.example\r\nContent-Length: 4711zz\r\n\r\n",
    "GET /allowed\u{1b}?token=4711zz HTTP/1.1\r\nHost: www.web.example\r\nX-Auth-Token: \u{7}4711zz\r\n\r\n",
];

/// Requests a path of a server. The address is the name of the server in URLs without TLS.
fn ask(lab: &Lab, at: SocketAddr, path: &str, more: &[&str]) -> u16 {
    if at.port() == HTTPS {
        return lab.ask("client", NAME, at, path, more).status;
    }
    let url = format!("http://{at}{path}");
    let got = curl(lab.apps.ns("client"), &[more, &[&url]].concat(), LONG);
    got.expect("curl").status
}

/// Sends allowed, denied and malformed requests with secrets, in each version of HTTP, and over both families.
fn send_secrets(lab: &Lab, daemon: &Daemon, clear_text_http2: bool) {
    let fields: Vec<&str> = FIELDS.iter().flat_map(|field| ["-H", field]).collect();
    for family in FAMILIES {
        for (port, version) in [
            (CLEAR, "--http1.1"),
            (H2C, "--http2-prior-knowledge"),
            (HTTPS, "--http1.1"),
            (HTTPS, "--http2"),
        ] {
            if port == H2C && !clear_text_http2 {
                continue;
            }
            let at = lab.apps.at("internet", family, port);
            let options = [&[version][..], &fields].concat();
            for (path, status) in [
                ("/allowed/b?token=4711zz&a=1&access_key=4711zz", 200),
                ("/allowed/set?set_token=set4711zz", 200),
                ("/allowed;jsessionid=4711zz?next=%2Fa%3Fpassword%3D4711zz", 200),
                ("/keyed?token=4711zz", if port == HTTPS { 200 } else { 403 }),
                ("/denied?token=4711zz&a=1&sig=4711zz", 403),
            ] {
                let got = ask(lab, at, path, &options);
                assert_eq!(got, status, "{version} {at} {path}\n{}", daemon.report());
            }
            let other = [version, "-H", "X-Api-Key: other4711zz", "-u", "user4711zz:pw"];
            assert_eq!(ask(lab, at, "/keyed", &other), 403, "{version} {at}");
            assert_eq!(ask(lab, at, "/allowed", &other), 200, "{version} {at}");
        }
        let clear = lab.apps.at("internet", family, CLEAR);
        for broken in BROKEN {
            let mut talk = Talk::open(lab.apps.ns("client"), clear, LONG).expect("a connection");
            let _ = talk.send(broken.as_bytes());
            // The answer, a reset, or nothing.
            let _ = talk.receive(Duration::from_secs(1), |heard| !heard.is_empty());
        }
        let streams: Vec<_> = BROKEN.iter().map(|broken| (None, broken.as_bytes())).collect();
        let at = lab.apps.at("internet", family, HTTPS);
        python::raw(lab.apps.ns("client"), NAME, &lab.ours.cert, at, &streams).expect("raw requests");
    }
}

/// Outputs by name.
type Outputs = Vec<(String, Vec<u8>)>;

/// Adds the output of a command.
#[track_caller]
fn run(outputs: &mut Outputs, daemon: &Daemon, args: &[&str]) {
    let out = daemon.try_cli(args).expect("a command");
    let all = [out.stdout, out.stderr].concat();
    assert!(!all.is_empty(), "{args:?}: {}", out.status);
    assert!(
        out.status.code().is_some_and(|code| code < 2),
        "{args:?}: {}: {}",
        out.status,
        String::from_utf8_lossy(&all)
    );
    outputs.push((args.join(" "), all));
}

/// Returns all files below a folder, except in the folders of secrets.
fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").path());
    let mut all = Vec::new();
    for path in entries {
        if path.is_dir() {
            all.extend(files(&path));
        } else if path.is_file() {
            all.push(path);
        }
    }
    all
}

/// Starts a capture, and waits until its programs are attached.
fn capture(daemon: &Daemon, file: &str, more: &[&str]) -> Process {
    let command = daemon.command(&[&["capture", "-w", file], more].concat());
    let dir = Path::new(file).parent().expect("a folder");
    let mut process = Process::spawn("capture", command, dir).expect("capture");
    let begun = wait_until("the capture", LONG, || {
        fs::metadata(file).is_ok_and(|file| file.len() > 0) || process.exited().is_ok_and(|end| end.is_some())
    });
    begun.unwrap_or_else(|error| panic!("{error:#}: {}", process.log()));
    process
}

fn end(mut process: Process) -> Vec<u8> {
    process.signal(Signal::SIGINT).expect("a signal");
    let status = process.wait(LONG).expect("the end");
    assert!(status.success(), "{status}: {}", process.log());
    process.log().into_bytes()
}

#[test]
fn no_output_has_what_redaction_removed() {
    check(false);
}

#[test]
fn no_output_has_what_redaction_removed_from_requests_to_the_proxy() {
    check(true);
}

/// Sends secrets, and looks for them in all outputs.
fn check(clear_text_http2: bool) {
    let lab = lab();
    lab.secrets
        .write("key", "value", KEY.as_bytes())
        .expect("a secret");
    let _server = NodeServer::start(
        lab.apps.ns("internet"),
        [CLEAR, HTTPS, H2C],
        &lab.apps.both("internet"),
        &lab.server,
    )
    .expect("a server");
    let dir = tempfile::tempdir().expect("a folder");
    let file = |name: &str| dir.path().join(name).display().to_string();
    let exported = file("flows.log");
    let mut settings = lab.settings();
    let option = format!("[http]\nclear_text_http2 = {clear_text_http2}\n");
    settings.tables.push_str(&TABLES.replace("[http]\n", &option));
    settings
        .tables
        .push_str(&format!("[[export]]\nname = \"flows\"\nfile = \"{exported}\"\n"));
    let daemon = lab.daemon(&settings, &[("web.yaml", POLICY)]);
    // The most detailed level of each component.
    let components = daemon.json(&["log", "get"]).expect("the levels");
    let levels: Vec<String> = components["components"]
        .as_array()
        .expect("components")
        .iter()
        .map(|component| format!("{}=trace", component["component"].as_str().expect("a name")))
        .collect();
    assert!(levels.len() > 5, "{levels:?}");
    daemon
        .cli(&["log", "set", &levels.join(",")])
        .expect("the levels");
    let follow = |name: &str, args: &[&str]| {
        Process::spawn(name, daemon.command(args), dir.path()).unwrap_or_else(|error| panic!("{error:#}"))
    };
    let followed = [
        follow("monitor", &["monitor", "-v"]),
        follow("monitor-json", &["monitor", "-o", "json"]),
        follow("observe", &["observe", "--follow", "-o", "dict", "--rules"]),
    ];
    let headers = file("headers.pcapng");
    let capturing = capture(&daemon, &headers, &[]);
    send_secrets(&lab, &daemon, clear_text_http2);
    let mut outputs: Outputs = vec![("capture, printed".to_owned(), end(capturing))];
    outputs.push(("capture".to_owned(), fs::read(&headers).expect("the capture")));

    // With --snaplen the packets themselves contain the secrets, but nothing else in the file does.
    let whole = file("whole.pcapng");
    let capturing = capture(&daemon, &whole, &["--snaplen", "3000", "--port", "80"]);
    send_secrets(&lab, &daemon, clear_text_http2);
    outputs.push(("whole capture, printed".to_owned(), end(capturing)));
    let bytes = fs::read(&whole).expect("the capture");
    assert!(
        String::from_utf8_lossy(&bytes).contains(SECRETS[0]),
        "the capture has no payload"
    );
    let mut tshark = Command::new("tshark");
    tshark.args([
        "-r",
        &whole,
        "-T",
        "fields",
        "-e",
        "frame.comment",
        "-e",
        "frame.interface_name",
    ]);
    tshark.args(["-e", "frame.interface_description"]);
    let comments = output(&mut tshark, LONG).expect("tshark").stdout;
    assert!(
        String::from_utf8_lossy(&comments).contains("then request DROPPED"),
        "no verdict of a request"
    );
    outputs.push(("comments".to_owned(), comments));

    let shown = ["--http-url", "token=", "--verdict", "dropped"];
    let denied = daemon
        .wait_flows(&shown, "the denied requests", |flows| flows.len() >= 6)
        .expect("records");
    let redacted = |text: &str| text.matches("token=[redacted]").count();
    wait_until("the export", LONG, || {
        redacted(&fs::read_to_string(&exported).unwrap_or_default()) >= 12
    })
    .expect("the export");
    wait_until("the steps of the inspection", LONG, || {
        redacted(&daemon.log()) >= 4
    })
    .expect("the log");
    for format in ["compact", "dict", "table", "json"] {
        run(
            &mut outputs,
            &daemon,
            &[
                "observe",
                "--all",
                "-o",
                format,
                "--rules",
                "--print-policy-names",
            ],
        );
    }
    run(
        &mut outputs,
        &daemon,
        &["observe", "--input-file", &exported, "-o", "dict"],
    );
    run(
        &mut outputs,
        &daemon,
        &["observe", "--input-file", &exported, "-o", "json"],
    );
    let policies = daemon.policies().display().to_string();
    let config = daemon.config().display().to_string();
    for flow in &denied {
        let uuid = flow["uuid"].as_str().expect("an identifier");
        run(&mut outputs, &daemon, &["explain", uuid]);
        run(&mut outputs, &daemon, &["explain", uuid, "-o", "json"]);
        run(
            &mut outputs,
            &daemon,
            &[
                "explain",
                uuid,
                "--input-file",
                &exported,
                "--policies",
                &policies,
            ],
        );
    }
    for format in ["yaml", "json"] {
        run(
            &mut outputs,
            &daemon,
            &["policy", "suggest", "-o", format, "--include-dropped"],
        );
        run(
            &mut outputs,
            &daemon,
            &["policy", "suggest", "-o", format, "--input-file", &exported],
        );
    }
    // Other policies, under which every verdict changes.
    let candidate = file("candidate.yaml");
    fs::write(&candidate, POLICY.replace("GET", "POST")).expect("a file");
    for format in ["table", "json"] {
        run(
            &mut outputs,
            &daemon,
            &[
                "policy",
                "test",
                "--flows",
                &exported,
                "--policies",
                &candidate,
                "-o",
                format,
            ],
        );
        run(&mut outputs, &daemon, &["policy", "get", "-o", format]);
        for command in ["config", "clusters", "certs", "stats", "connections"] {
            run(&mut outputs, &daemon, &["intercept", command, "-o", format]);
        }
        for command in [
            &["status"][..],
            &["endpoint", "list"],
            &["endpoint", "get", "client"],
            &["identity", "list"],
            &["bpf", "ct", "list"],
            &["log", "get"],
            &["config", "view"],
            &["policy", "selectors"],
            &["bpf", "policy", "get", "--all"],
        ] {
            run(&mut outputs, &daemon, &[command, &["-o", format]].concat());
        }
    }
    run(&mut outputs, &daemon, &["top", "--once"]);
    for format in ["compact", "dict", "json"] {
        run(
            &mut outputs,
            &daemon,
            &["replay", &whole, "--policy", &policies, "-o", format, "--rules"],
        );
    }
    let node = lab.apps.ns("node");
    let metrics = curl(node, &[METRICS], LONG).expect("curl").body;
    assert!(metrics.contains("hubble_http_requests_total{"), "{metrics}");
    outputs.push(("metrics".to_owned(), metrics.into_bytes()));
    let asked = [
        "GetFlows",
        "GetAgentEvents",
        "ServerStatus",
        "GetNodes",
        "GetNamespaces",
    ];
    let list: Vec<Value> = asked
        .iter()
        .map(|method| call(method, method, json!({})))
        .collect();
    let said = calls(node, &socket(&daemon), None, &list).expect("the flow API");
    outputs.push(("flow API".to_owned(), format!("{said:?}").into_bytes()));
    for process in &followed {
        outputs.push(("a follower".to_owned(), process.log().into_bytes()));
    }
    // The log, the state and the configuration.
    for path in files(Path::new(&config).parent().expect("a folder")) {
        outputs.push((path.display().to_string(), fs::read(&path).expect("a file")));
    }
    outputs.push(("export".to_owned(), fs::read(&exported).expect("the export")));

    let mut leaks = Vec::new();
    let mut with_url = Vec::new();
    for (name, bytes) in &outputs {
        let all = String::from_utf8_lossy(bytes);
        for secret in SECRETS {
            for line in all.lines().filter(|line| line.contains(secret)).take(3) {
                leaks.push(format!(
                    "{name}: {}",
                    line.chars().take(2_000).collect::<String>()
                ));
            }
        }
        if all.contains("token=[redacted]") {
            with_url.push(name.as_str());
        }
    }
    assert!(leaks.is_empty(), "{leaks:#?}");
    // The outputs that have URLs have them without the values.
    for name in [
        "flow API",
        "export",
        "a follower",
        "palisade.log",
        "observe",
        "explain",
        "replay",
        "policy test",
    ] {
        // A replay of a capture does not see the requests to the proxy.
        if name == "replay" && clear_text_http2 {
            continue;
        }
        assert!(
            with_url.iter().any(|with| with.contains(name)),
            "{name}: {with_url:#?}"
        );
    }
}
