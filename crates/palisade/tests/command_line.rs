//! Commands that need neither daemon nor root, run as an operator types them.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

const WEB: &str = "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: '80', protocol: TCP}]
";

const CONFIG: &str = "\
[[endpoint]]
name = \"front\"
interface = \"v1\"
addresses = [\"10.0.0.2\"]
labels = { app = \"front\" }
[[endpoint]]
name = \"web\"
interface = \"v2\"
addresses = [\"10.0.0.3\"]
labels = { app = \"web\" }
";

fn palisade(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_palisade"))
        .current_dir(dir)
        .args(args)
        .output()
        .unwrap()
}

fn texts(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

#[test]
fn validate_reports_each_error_with_its_location() {
    let broken = WEB
        .replace("fromEndpoints", "fromEndpoint")
        .replace("'80'", "'99999'");
    let dir = folder(&[
        ("web.yaml", WEB),
        ("broken.yaml", &broken),
        ("notes.txt", "not a policy"),
    ]);
    let (code, out, _) = texts(&palisade(dir.path(), &["policy", "validate", "web.yaml"]));
    assert_eq!(code, Some(0), "{out}");
    assert!(
        out.contains("1 file, 1 policy, 0 CIDR groups: 0 errors, 0 warnings"),
        "{out}"
    );
    let (code, out, _) = texts(&palisade(dir.path(), &["policy", "validate", "--quiet", "."]));
    assert_eq!(code, Some(1), "{out}");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 2, "{out}");
    assert!(lines[0].starts_with("./broken.yaml:7:5: "), "{out}");
    assert!(lines[1].starts_with("./broken.yaml:9:"), "{out}");
    let (code, _, error) = texts(&palisade(dir.path(), &["policy", "validate", "missing.yaml"]));
    assert_eq!(code, Some(4));
    assert!(error.contains("missing.yaml: No such file"), "{error}");
}

#[test]
fn validate_checks_the_secrets_that_policies_name() {
    let policy = WEB.replace(
        "protocol: TCP}]",
        "protocol: TCP}]\n      terminatingTLS: {secret: {namespace: shop, name: web}}",
    );
    let dir = folder(&[
        ("web.yaml", &policy),
        ("palisade.toml", "[tls]\nsecrets_dir = \"secrets\"\n"),
    ]);
    let validate = || {
        let arguments = ["policy", "validate", "--config", "palisade.toml", "web.yaml"];
        texts(&palisade(dir.path(), &arguments))
    };
    let (code, out, error) = validate();
    assert_eq!(code, Some(1), "{out}{error}");
    assert!(
        out.contains("terminatingTLS: secret shop/web is missing"),
        "{out}"
    );
    // Without a configuration the folder is not known.
    let (code, out, _) = texts(&palisade(dir.path(), &["policy", "validate", "web.yaml"]));
    assert_eq!(code, Some(0), "{out}");
    let secret = dir.path().join("secrets/shop/web");
    fs::create_dir_all(&secret).unwrap();
    fs::write(secret.join("tls.crt"), "-----BEGIN CERTIFICATE-----\n").unwrap();
    let (code, out, _) = validate();
    assert_eq!(code, Some(1), "{out}");
    let problem = "secrets/shop/web/tls.crt:1:1: the CERTIFICATE has no END: the file is truncated";
    assert!(out.contains(problem), "{out}");
}

#[test]
fn validate_continues_after_unreadable_paths() {
    let dir = folder(&[("web.yaml", WEB), ("copy.yaml", WEB)]);
    std::fs::write(dir.path().join("a.yaml"), b"a: \xff\n").unwrap();
    std::fs::create_dir(dir.path().join("more")).unwrap();
    // A file that is not UTF-8 is one error, and a resource in two files another.
    let (code, out, _) = texts(&palisade(
        dir.path(),
        &["policy", "validate", ".", "missing.yaml"],
    ));
    assert_eq!(code, Some(4), "{out}");
    assert!(
        out.contains("./a.yaml:1:4: the byte 0xff is no part of UTF-8 text"),
        "{out}"
    );
    assert!(
        out.contains("already in ./copy.yaml:1:1, which stays in force"),
        "{out}"
    );
    assert!(out.contains("note: subfolders are not read: more"), "{out}");
    assert!(
        out.contains("3 files, 2 policies, 0 CIDR groups: 2 errors"),
        "{out}"
    );
    let (code, _, error) = texts(&palisade(dir.path(), &["policy", "validate", "more"]));
    assert_eq!(code, Some(4));
    assert!(error.contains("more: there is no policy file"), "{error}");
}

#[test]
fn test_runs_case_files() {
    let case = |expect: &str| {
        format!(
            r#"{{"id":"c","policies":[{{"apiVersion":"cilium.io/v2","kind":"CiliumNetworkPolicy","metadata":{{"name":"p"}},"spec":{{"endpointSelector":{{}},"ingress":[{{}}]}}}}],"endpoints":{{"a":{{"labels":["k8s:app=a","k8s:io.kubernetes.pod.namespace=default"]}}}},"peers":{{}},"checks":[{{"subject":"a","direction":"ingress","peer":"192.0.2.7","protocol":"TCP","port":80,"expect":"{expect}"}}]}}"#
        )
    };
    let dir = folder(&[("good.jsonl", &case("deny")), ("bad.jsonl", &case("allow"))]);
    let (code, out, _) = texts(&palisade(dir.path(), &["policy", "test", "good.jsonl"]));
    assert_eq!((code, out.as_str()), (Some(0), "1 passed, 0 failed\n"));
    let (code, out, _) = texts(&palisade(
        dir.path(),
        &["policy", "test", "good.jsonl", "bad.jsonl"],
    ));
    assert_eq!(code, Some(1));
    assert!(out.ends_with("1 passed, 1 failed\n"), "{out}");
}

#[test]
fn trace_explains_without_a_daemon() {
    let dir = folder(&[("web.yaml", WEB), ("p.toml", CONFIG)]);
    let trace = |from: &str, port: &str| {
        let args = [
            "policy",
            "trace",
            "--config",
            "p.toml",
            "--policies",
            "web.yaml",
            "--to",
            "default/web",
        ];
        texts(&palisade(
            dir.path(),
            &[&args[..], &["--from", from, "--port", port]].concat(),
        ))
    };
    let (code, out, _) = trace("front", "80");
    assert_eq!(code, Some(0), "{out}");
    assert!(
        out.contains("policy default/web ingress rule 1 (web.yaml:7)"),
        "{out}"
    );
    let (code, out, _) = trace("192.0.2.7", "80/tcp");
    assert_eq!(code, Some(1), "{out}");
    assert!(
        out.contains("default deny of ingress by policy default/web"),
        "{out}"
    );
    let (code, _, error) = trace("nobody", "80");
    assert_eq!(code, Some(4));
    assert!(error.contains("\"nobody\" is not an endpoint"), "{error}");
}

const READ: &str = "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: '80', protocol: TCP}]
      rules: {http: [{method: GET, path: '/public/.*', headers: ['X-Team: blue']}, {host: 'health[.]test'}]}
    - ports: [{port: '443', protocol: TCP}]
      serverNames: ['*.example.com']
";

#[test]
fn trace_decides_requests_inside_tls() {
    let policy = READ.replace(
        "serverNames: ['*.example.com']",
        "serverNames: ['*.example.com']\n      terminatingTLS: {secret: {name: s}}\n      rules: {http: [{method: GET}]}",
    );
    let dir = folder(&[("web.yaml", &policy), ("p.toml", CONFIG)]);
    let trace = |args: &[&str]| {
        let ends = ["--from", "default/front", "--to", "default/web"];
        let policies = ["policy", "trace", "--config", "p.toml", "--policies", "web.yaml"];
        texts(&palisade(dir.path(), &[&policies[..], &ends, args].concat())).1
    };
    // Without an inspector or with one, the request and the port are those of TLS.
    for request in ["GET /x", "GET https://api.example.com/x"] {
        let answer = trace(&["--http", request, "--sni", "api.example.com"]);
        assert!(answer.starts_with("TCP port 443, GET "), "{answer}");
        assert!(
            answer.contains("at the server name api.example.com\n"),
            "{answer}"
        );
    }
    let answer = trace(&["--http", "GET https://api.example.com/x"]);
    assert!(answer.starts_with("TCP port 443, GET "), "{answer}");
}

#[test]
fn trace_decides_requests_and_server_names() {
    let dir = folder(&[("web.yaml", READ), ("p.toml", CONFIG)]);
    let trace = |args: &[&str]| {
        let ends = [
            "policy",
            "trace",
            "--config",
            "p.toml",
            "--policies",
            "web.yaml",
            "--from",
            "default/front",
            "--to",
            "default/web",
        ];
        texts(&palisade(dir.path(), &[&ends[..], args].concat()))
    };
    let get = |path: &'static str, header: &'static str| trace(&["--http", path, "--header", header]);
    for (answer, expected, text) in [
        (trace(&["--port", "80"]), 0, "verdict: INSPECTED"),
        (
            get("GET /public/a", "X-Team: blue"),
            0,
            "ALLOWED (a rule allows GET /public/a)\n  decided by policy default/web ingress rule 1 (web.yaml:7)",
        ),
        (
            get("GET /public/a", "X-Team: red"),
            1,
            "DENIED (no rule allows GET /public/a; the client gets 403)\n  decided by policy default/web ingress rule 1",
        ),
        (
            get("PUT /x", "Host: health.test"),
            0,
            "TCP port 80, PUT http://health.test/x\n",
        ),
        (
            trace(&["--http", "PUT http://health.test/x"]),
            0,
            "verdict: ALLOWED",
        ),
        (
            trace(&["--http", "PUT http://other.test/x"]),
            1,
            "verdict: DENIED",
        ),
        (
            trace(&["--http", "GET /public/a", "--port", "8080"]),
            1,
            "TCP port 8080, GET /public/a\n",
        ),
        (
            trace(&["--sni", "api.example.com"]),
            0,
            "TCP port 443, the server name api.example.com\n",
        ),
        (trace(&["--sni", "example.com"]), 1, "the connection is reset"),
        (
            trace(&["--sni", ""]),
            1,
            "no rule allows a hello without a server name",
        ),
        (
            trace(&["--sni", "api.example.com", "--port", "80"]),
            1,
            "it is inspected as http, and the server name api.example.com is another protocol",
        ),
    ] {
        let (code, out, error) = answer;
        assert_eq!(code, Some(expected), "{text}\n{out}{error}");
        assert!(out.contains(text), "{text}\n{out}");
    }
    // The path is normalised as the configuration says.
    let dotted = ["--http", "GET /public/../a", "--header", "X-Team: blue"];
    assert_eq!(trace(&dotted).0, Some(1));
    let raw = format!("[http]\npath_normalization = \"raw\"\n{CONFIG}");
    fs::write(dir.path().join("p.toml"), raw).unwrap();
    assert_eq!(trace(&dotted).0, Some(0));
    let (code, out, _) = trace(&["--http", "GET /x", "-o", "json"]);
    assert_eq!(code, Some(1));
    assert!(
        out.contains(r#""request": "GET /x""#) && out.contains(r#""verdict": "denied""#),
        "{out}"
    );
    let (code, _, error) = trace(&["--http", "/x"]);
    assert_eq!(code, Some(4));
    assert!(error.contains("like 'GET /x' or 'GET http://host/x'"), "{error}");
    for args in [
        &["--http", "GET /x", "--kafka", "fetch"][..],
        &["--header", "A: b", "--port", "80"],
        &["--dns", "a", "--http", "GET /x"],
    ] {
        assert_eq!(trace(args).0, Some(2), "{args:?}");
    }
}

#[test]
fn trace_decides_kafka_requests() {
    let text = READ.replace(
        "- ports: [{port: '443', protocol: TCP}]\n      serverNames: ['*.example.com']",
        "- ports: [{port: '9092', protocol: TCP}]\n      rules: {kafka: [{role: produce, topic: a}, {clientID: b}]}",
    );
    let dir = folder(&[("web.yaml", &text), ("p.toml", CONFIG)]);
    let trace = |args: &[&str]| {
        let ends = "policy trace --config p.toml --policies web.yaml --from default/front --to default/web";
        let ends: Vec<_> = ends.split(' ').collect();
        texts(&palisade(dir.path(), &[&ends, args].concat()))
    };
    for (args, expected, text) in [
        (
            &["--kafka", "produce/9 a"][..],
            0,
            "ALLOWED (a rule allows the Kafka request produce v9 of a)",
        ),
        (
            &["--kafka", "produce a other"],
            1,
            "of a, other; the client gets an authorization error)",
        ),
        (&["--kafka", "metadata"], 0, "verdict: ALLOWED"),
        (
            &["--kafka", "metadata/0"],
            1,
            "no rule allows the Kafka request metadata v0;",
        ),
        (&["--kafka", "fetch c"], 1, "verdict: DENIED"),
        (&["--kafka", "fetch c", "--client-id", "b"], 0, "verdict: ALLOWED"),
        (
            &["--kafka", "fetch c", "--port", "80"],
            1,
            "it is inspected as http",
        ),
    ] {
        let (code, out, error) = trace(args);
        assert_eq!(code, Some(expected), "{args:?}\n{out}{error}");
        assert!(out.contains(text), "{text}\n{out}");
    }
    for (args, expected) in [
        (&["--kafka", "nothing"][..], 4),
        (&["--client-id", "b", "--port", "9092"], 2),
        (&["--kafka", "fetch", "--sni", "a"], 2),
    ] {
        assert_eq!(trace(args).0, Some(expected), "{args:?}");
    }
}

#[test]
fn validate_reports_skipped_files() {
    let unread = READ.replace(
        "{http: [{method: GET, path: '/public/.*', headers: ['X-Team: blue']}, {host: 'health[.]test'}]}",
        "{l7proto: memcached, l7: [{command: get}]}",
    );
    let dir = folder(&[("read.yaml", READ), ("unread.yaml", &unread)]);
    let validate = |file: &str| texts(&palisade(dir.path(), &["policy", "validate", file]));
    let (code, out, _) = validate("read.yaml");
    assert_eq!(code, Some(0), "{out}");
    assert_eq!(out, "1 file, 1 policy, 0 CIDR groups: 0 errors, 0 warnings\n");
    let (code, out, _) = validate("unread.yaml");
    assert_eq!(code, Some(0), "{out}");
    assert!(out.contains("warning: there is no such parser yet"), "{out}");
}

#[test]
fn a_configuration_is_checked_without_running_it() {
    let broken = CONFIG.replace("interface = \"v2\"", "interfce = \"v2\"");
    let dir = folder(&[("good.toml", CONFIG), ("broken.toml", &broken)]);
    let check = |file: &str| {
        texts(&palisade(
            dir.path(),
            &["run", "--check-config", "--config", file],
        ))
    };
    let (code, out, _) = check("good.toml");
    assert_eq!(code, Some(0));
    assert_eq!(out, "good.toml: valid: 0 interfaces, 2 endpoints, 0 peers\n");
    let (code, _, error) = check("broken.toml");
    assert_eq!(code, Some(1));
    assert!(
        error.contains("broken.toml:8:1: unknown key 'interfce' in endpoint; did you mean 'interface'?"),
        "{error}"
    );
    let (code, _, error) = check("missing.toml");
    assert_eq!(code, Some(1));
    assert!(error.starts_with("missing.toml: cannot be read"), "{error}");
}

#[test]
fn listings_without_a_daemon_name_the_start_command() {
    let dir = folder(&[]);
    for args in [&["status"][..], &["endpoint", "list"], &["observe"], &["stop"]] {
        let args = [args, &["--socket", "palisade.sock"]].concat();
        let (code, out, error) = texts(&palisade(dir.path(), &args));
        assert_eq!((code, out.as_str()), (Some(3), ""), "{args:?}");
        assert!(
            error.contains("the daemon is not running") && error.contains("palisade run"),
            "{error}"
        );
    }
    let (code, _, error) = texts(&palisade(dir.path(), &["observe", "--to-port", "http"]));
    // A wrong value of a filter is wrong usage, as a wrong option is.
    assert_eq!(code, Some(2));
    assert!(error.contains("to-port"), "{error}");
}
