//! Commands about recorded flows and captures that need neither daemon nor root, run as an operator types them.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

/// Flows in the form in which `hubble observe -o jsonpb` of a Cilium cluster prints them.
const CILIUM: &str = include_str!("recorded/cilium.jsonl");
/// Records of Palisade: a forwarded and a dropped message of DNS (numbers 1 and 2), TLS (3, 4) and Kafka (5, 6).
const RECORDS: &str = include_str!("recorded/palisade.jsonl");

fn palisade(dir: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_palisade"))
        .current_dir(dir)
        .args(args)
        .output();
    let Output {
        status,
        stdout,
        stderr,
    } = output.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

/// Returns the UUID of one of [`RECORDS`].
fn uuid(number: u32) -> String {
    format!("01234567-89ab-8cde-bc00-{number:012x}")
}

#[test]
fn policies_suggested_from_a_cilium_cluster_allow_its_flows() {
    let dir = folder(&[("flows.jsonl", CILIUM)]);
    let (code, yaml, error) = palisade(dir.path(), &["policy", "suggest", "--input-file", "flows.jsonl"]);
    assert_eq!(code, Some(0), "{yaml}{error}");
    for part in [
        "    matchLabels:\n      app: backend\n",
        "  - fromEndpoints:\n    - matchLabels:\n        app: frontend\n",
        "path: \"/items/[0-9]+([?].*)?\"",
        "path: \"/orders\"",
        "- matchName: api.example.com",
        "k8s-app: kube-dns",
        "- host",
    ] {
        assert!(yaml.contains(part), "{part}\n{yaml}");
    }
    // The flow that Cilium has dropped gets no rule.
    assert!(!yaml.contains("\"25\""), "{yaml}");
    fs::write(dir.path().join("suggested.yaml"), &yaml).unwrap();
    let test = |policies: &str| {
        let args = [
            "policy",
            "test",
            "--flows",
            "flows.jsonl",
            "-o",
            "json",
            "--policies",
        ];
        let (code, out, error) = palisade(dir.path(), &[&args[..], &[policies]].concat());
        let report: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{error}"));
        (code, report)
    };
    let (code, report) = test("suggested.yaml");
    assert_eq!(
        (code, &report["changed"], &report["evaluated"]),
        (Some(0), &0.into(), &19.into()),
        "{report:#}\n{yaml}"
    );
    // Without one of its ports, flows would be denied.
    fs::write(dir.path().join("less.yaml"), yaml.replace("\"8080\"", "\"8081\"")).unwrap();
    let (code, report) = test("less.yaml");
    assert_eq!(code, Some(1), "{report:#}");
    assert!(
        report["changes"]
            .as_array()
            .unwrap()
            .iter()
            .any(|change| change["now"] == "ALLOWED" && change["then"] == "DENIED"),
        "{report:#}"
    );
}

const CLIENT: &str = "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEndpoints: [{matchLabels: {app: server}}]
    toPorts:
    - ports: [{port: '53', protocol: ANY}]
      rules: {dns: [{matchPattern: '*.example.com'}]}
    - ports: [{port: '443', protocol: TCP}]
      serverNames: ['*.example.com']
    - ports: [{port: '9092', protocol: TCP}]
      rules: {kafka: [{role: produce, topic: orders}]}
    - ports: [{port: '80', protocol: TCP}]
      rules: {http: [{method: GET, path: '/items/.*'}]}
";

const CONFIG: &str = "\
[[endpoint]]
name = \"client\"
namespace = \"shop\"
interface = \"v1\"
addresses = [\"10.0.1.10\"]
labels = { app = \"client\" }
[[endpoint]]
name = \"server\"
namespace = \"shop\"
interface = \"v2\"
addresses = [\"10.0.1.20\"]
labels = { app = \"server\" }
";

/// Explains a packet that `args` name. Expects that [`CLIENT`] denies the packet because of `nearly`, and that the
/// printed addition, which contains `rule`, allows the packet.
#[track_caller]
fn assert_addition(dir: &Path, args: &[&str], nearly: &str, rule: &str) {
    let explain = |policies: &[&str], more: &[&str]| {
        palisade(
            dir,
            &[&["explain"], args, more, &["--policies"], policies].concat(),
        )
    };
    let (code, out, error) = explain(&["client.yaml"], &[]);
    assert_eq!(code, Some(1), "{args:?}\n{out}{error}");
    for part in [
        "egress of shop/client: DENIED",
        "policy shop/client egress rule 1 (client.yaml:7)",
        nearly,
        rule,
        "with this addition it is ALLOWED",
    ] {
        assert!(out.contains(part), "{args:?}: {part}\n{out}");
    }
    let (_, out, error) = explain(&["client.yaml"], &["-o", "json"]);
    let answer: serde_json::Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}{error}"));
    let yaml = answer["addition"]["yaml"].as_str().unwrap();
    fs::write(dir.join("addition.yaml"), yaml).unwrap();
    let (code, out, error) = explain(&["client.yaml", "addition.yaml"], &[]);
    assert_eq!(code, Some(0), "{args:?}\n{yaml}\n{out}{error}");
}

#[test]
fn records_of_messages_in_a_file_are_explained() {
    let dir = folder(&[("flows.json", RECORDS), ("client.yaml", CLIENT)]);
    for (number, nearly, rule) in [
        (
            2,
            "query: evil.example.net is not *.example.com",
            "dns:\n        - matchName: evil.example.net",
        ),
        (
            4,
            "server name: evil.example.net is not *.example.com",
            "serverNames:\n      - evil.example.net",
        ),
        (
            6,
            "topic: the request must be about orders alone, and it is about secret",
            "topic: secret",
        ),
    ] {
        let allowed = [
            "explain",
            &uuid(number - 1),
            "--input-file",
            "flows.json",
            "--policies",
            "client.yaml",
        ];
        let (code, out, error) = palisade(dir.path(), &allowed);
        assert_eq!(code, Some(0), "{out}{error}");
        let denied = uuid(number);
        assert_addition(dir.path(), &[&denied, "--input-file", "flows.json"], nearly, rule);
    }
    // The ends of Hubble's records are identified by their labels too.
    fs::write(dir.path().join("hubble.json"), CILIUM).unwrap();
    let dropped = "6e0f6a3a-2b3f-4a5a-9c0d-000000000016";
    let args = ["explain", dropped, "--input-file", "hubble.json", "--policies"];
    let policy = CLIENT
        .replace("app: client", "app: backend")
        .replace("name: client", "name: backend");
    fs::write(dir.path().join("backend.yaml"), policy).unwrap();
    let (code, out, error) = palisade(dir.path(), &[&args[..], &["backend.yaml"]].concat());
    assert_eq!(code, Some(1), "{out}{error}");
    assert!(
        out.contains("DENIED") && out.contains("203.0.113.66/32") && out.contains("port: \"25\""),
        "{out}"
    );
}

#[test]
fn explain_names_what_is_missing() {
    let dir = folder(&[
        ("flows.json", RECORDS),
        ("client.yaml", CLIENT),
        ("p.toml", CONFIG),
    ]);
    let known = uuid(1);
    for (args, expected, text) in [
        (
            &["0", "--input-file", "flows.json", "--policies", "client.yaml"][..],
            4,
            "flows.json: there is no flow 0",
        ),
        (
            &[&known, "--input-file", "none.json", "--policies", "client.yaml"],
            4,
            "none.json: No such file",
        ),
        (
            &[&known, "--policies", "client.yaml"],
            4,
            "with --policies, name a file of flows (--input-file)",
        ),
        (
            &[
                "--config",
                "p.toml",
                "--from",
                "shop/client",
                "--policies",
                "client.yaml",
            ],
            4,
            "--from needs --to or --to-fqdn",
        ),
        (&["--policies", "client.yaml"], 2, "<UUID>"),
    ] {
        let (code, out, error) = palisade(dir.path(), &[&["explain"], args].concat());
        assert_eq!(code, Some(expected), "{args:?}\n{out}{error}");
        assert!(error.contains(text), "{args:?}: {text}\n{error}");
    }
}

#[test]
fn described_messages_are_explained_without_a_daemon() {
    let dir = folder(&[("client.yaml", CLIENT), ("p.toml", CONFIG)]);
    for (message, nearly, rule) in [
        (
            ["--http", "DELETE /items/7"],
            "method: DELETE does not match GET",
            "method: DELETE\n          path: \"/items/7\"",
        ),
        (
            ["--http", "GET /admin"],
            "path: /admin does not match",
            "path: \"/admin\"",
        ),
        (
            ["--dns", "evil.example.net"],
            "query: evil.example.net is not *.example.com",
            "matchName: evil.example.net",
        ),
        (
            ["--sni", "evil.example.net"],
            "server name: evil.example.net is not *.example.com",
            "- evil.example.net",
        ),
        (
            ["--kafka", "produce secret"],
            "topic: the request must be about orders alone, and it is about secret",
            "topic: secret",
        ),
    ] {
        let ends = "--config p.toml --from shop/client --to shop/server";
        let ends: Vec<_> = ends.split(' ').collect();
        assert_addition(dir.path(), &[&ends[..], &message].concat(), nearly, rule);
    }
}

/// Returns a frame of a TCP SYN from `client` to a port of `server`.
fn syn(port: u16) -> Vec<u8> {
    let mut frame = vec![0; 54];
    frame[12..14].copy_from_slice(&0x0800_u16.to_be_bytes());
    let ip = &mut frame[14..34];
    ip[0] = 0x45;
    ip[2..4].copy_from_slice(&40_u16.to_be_bytes());
    ip[8..10].copy_from_slice(&[64, 6]);
    ip[12..20].copy_from_slice(&[10, 0, 1, 10, 10, 0, 1, 20]);
    let words = ip
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let tcp = &mut frame[34..];
    tcp[..2].copy_from_slice(&40_000_u16.to_be_bytes());
    tcp[2..4].copy_from_slice(&port.to_be_bytes());
    tcp[12..14].copy_from_slice(&[0x50, 2]);
    frame
}

#[test]
fn a_truncated_capture_is_replayed_up_to_its_error() {
    // The header of a pcap file of Ethernet frames.
    let words = [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, 1];
    let mut file: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    let frame = syn(81);
    let length = frame.len() as u32;
    let head: Vec<u8> = [1_700_000_000, 0, length, length]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    file.extend([&head[..], &frame].concat());
    let begin = file.len();
    file.extend([&head[..], &frame[..20]].concat());
    let dir = folder(&[("client.yaml", CLIENT), ("p.toml", CONFIG)]);
    let replay = |name: &str| {
        let args = ["replay", name, "--policy", "client.yaml", "--config", "p.toml"];
        palisade(dir.path(), &args)
    };
    fs::write(dir.path().join("whole.pcap"), &file[..begin]).unwrap();
    let (code, whole, error) = replay("whole.pcap");
    assert_eq!(code, Some(0), "{whole}{error}");
    assert!(
        whole.contains("shop/server:81") && whole.contains("DROPPED"),
        "{whole}"
    );
    // What was decided before the error is printed.
    for cut in [file.len(), begin + 7] {
        fs::write(dir.path().join("cut.pcap"), &file[..cut]).unwrap();
        let (code, out, error) = replay("cut.pcap");
        assert_eq!((code, &out), (Some(1), &whole), "{error}");
        let message = format!("cut.pcap: at byte {begin}: the file ends within a packet");
        assert!(error.contains(&message), "{message}\n{error}");
    }
}
