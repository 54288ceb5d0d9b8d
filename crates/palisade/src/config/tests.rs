//! Tests of the configuration: what is accepted, the text and place of each error, and the options that other texts name.

use std::time::Duration;

use palisade_inspect::{Ech, GetBodies, Paths};
use palisade_model::inventory::{Enforcement, NamedPort};
use palisade_protocols::http1;

use super::{labels::NAMESPACE_LABEL, *};

fn errors(text: &str) -> Vec<String> {
    Config::parse(Path::new("p.toml"), text)
        .expect_err("accepted")
        .iter()
        .map(ToString::to_string)
        .collect()
}

fn parsed(text: &str) -> Config {
    Config::parse(Path::new("/etc/palisade/p.toml"), text).unwrap_or_else(|errors| panic!("{errors:#?}"))
}

const FULL: &str = r#"
[node]
name = "node1"
labels = { "node-role.kubernetes.io/worker" = "" }
pin_dir = "/sys/fs/bpf/x"

[policy]
dir = "policies.d"
enforcement = "always"
audit = true
allow_localhost = "always"
debounce = "20ms"

[limits]
conntrack = 1_000

[timeouts]
udp = "1m30s"

[http]
path_normalization = "raw"
get_bodies = "allow"
clear_text_http2 = true
header_timeout = "5s"
max_line = 4_096
max_head = 8_192
record_headers = ["User-Agent", "traceparent"]

[tls]
ech = "deny"
hello_timeout = "2s"
verify_sni_address = true
secrets_dir = "secrets"
interception_ca = "infra/ca"
no_sni = "refuse"
handshake_timeout = "3s"
connect_timeout = "4s"
response_timeout = "2m"
idle_timeout = "5m"
proxy_threads = 3
max_connections = 100
max_connections_per_endpoint = 10

[[namespace]]
name = "prod"
labels = { env = "production" }

[[interface]]
name = "eth0"
role = "host"
xdp_mode = "skb"

[[endpoint]]
name = "frontend"
namespace = "prod"
interface = "veth-front"
addresses = ["10.0.1.10", "fd00:1::10/128"]
labels = { app = "frontend", "container:tier" = "web" }
named_ports = { http = "8080/TCP", DNS = "53/udp", ssh = "22" }
netns = "front"
tc = "clsact"

[[peer]]
name = "db-1"
addresses = ["10.0.9.5", "10.0.10.0/24"]
labels = { app = "database" }

[[peer]]
name = "node2"
addresses = ["192.0.2.2"]
entity = "remote-node"
labels = { role = "worker" }
"#;

#[test]
fn every_option_is_parsed() {
    let config = parsed(FULL);
    assert_eq!(config.node.name, "node1");
    assert_eq!(
        config.node.labels[0].to_string(),
        "k8s:node-role.kubernetes.io/worker"
    );
    assert_eq!(config.node.pin_dir, Path::new("/sys/fs/bpf/x"));
    assert_eq!(config.node.socket, Path::new(DEFAULT_SOCKET));
    assert_eq!(config.policy.dir, Path::new("/etc/palisade/policies.d"));
    assert_eq!(config.policy.enforcement, Enforcement::Always);
    assert!(config.policy.audit && config.policy.allow_localhost);
    assert_eq!(config.policy.debounce, Duration::from_millis(20));
    assert_eq!(config.limits.conntrack, 1_000);
    assert_eq!(config.limits.rules, 65_536);
    assert_eq!(config.timeouts.udp, Duration::from_secs(90));
    assert_eq!(
        config.http,
        Http {
            paths: Paths::Raw,
            get_bodies: GetBodies::Allow,
            clear_text_http2: true,
            header_timeout: Duration::from_secs(5),
            head: http1::Limits {
                line: 4_096,
                block: 8_192
            },
            record_headers: vec!["user-agent".to_owned(), "traceparent".to_owned()],
        }
    );
    assert_eq!(
        config.tls,
        Tls {
            ech: Ech::Deny,
            hello_timeout: Duration::from_secs(2),
            verify_sni_address: true,
            secrets_dir: "/etc/palisade/secrets".into(),
            interception_ca: Some("infra/ca".to_owned()),
            no_sni: NoSni::Refuse,
            handshake_timeout: Duration::from_secs(3),
            connect_timeout: Duration::from_secs(4),
            response_timeout: Duration::from_secs(120),
            idle_timeout: Duration::from_secs(300),
            proxy_threads: 3,
            max_connections: 100,
            max_connections_per_endpoint: 10,
        }
    );
    assert_eq!(config.interfaces[0].attachment.xdp_mode, XdpMode::Skb);
    let endpoint = &config.endpoints[0];
    assert_eq!(endpoint.qualified_name(), "prod/frontend");
    assert_eq!(
        endpoint.labels.to_string(),
        "container:tier=web,k8s:app=frontend,\
         k8s:io.cilium.k8s.namespace.labels.env=production,\
         k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=prod,\
         k8s:io.kubernetes.pod.namespace=prod"
    );
    assert_eq!(endpoint.addresses.len(), 2);
    assert_eq!(endpoint.netns.as_deref(), Some(Path::new("/run/netns/front")));
    assert_eq!(endpoint.attachment.tc, TcHook::Clsact);
    assert_eq!(
        endpoint.named_ports["http"],
        NamedPort {
            protocol: 6,
            port: 8080
        }
    );
    assert_eq!(
        endpoint.named_ports["dns"],
        NamedPort {
            protocol: 17,
            port: 53
        }
    );
    assert_eq!(
        endpoint.named_ports["ssh"],
        NamedPort {
            protocol: 6,
            port: 22
        }
    );
    assert_eq!(config.peers[0].addresses[0].to_string(), "10.0.9.5/32");
    assert!(config.peers[0].labels.get("k8s", NAMESPACE_LABEL) == Some("default"));
    assert_eq!(
        config.peers[1].labels.to_string(),
        "k8s:role=worker,reserved:remote-node"
    );
}

#[test]
fn damaged_and_empty_files_are_refused() {
    let good = "[node]\nname = \"n\"\n";
    for (text, line) in [
        (format!("{good}\0[policy]\naudit = true\n"), 3),
        (format!("{good}# \0\n[policy]\naudit = true\n"), 3),
        ("\0".repeat(512), 1),
        (format!("{good}\u{feff}[policy]\naudit = true\n"), 3),
        (format!("{good}\u{1}"), 3),
    ] {
        let errors = Config::parse(Path::new("c.toml"), &text).unwrap_err();
        assert_eq!(errors[0].line, line, "{text:?}: {errors:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    for text in ["", "\n \n", "\u{feff}", "\0\0"] {
        std::fs::write(&path, text).unwrap();
        assert!(
            Config::load(&path).unwrap_err()[0].message.contains("is empty"),
            "{text:?}"
        );
    }
    std::fs::write(&path, "# nothing\n").unwrap();
    assert!(Config::load(&path).is_ok());
    std::fs::write(&path, b"[node]\nname = \"\xff\"\n").unwrap();
    assert!(Config::load(&path).is_err());
}

#[test]
fn an_empty_file_is_a_node_without_endpoints() {
    let config = parsed("");
    assert_eq!(config.policy.dir, Path::new("/etc/palisade/policies.d"));
    assert_eq!(config.policy.enforcement, Enforcement::Default);
    assert!(config.endpoints.is_empty());
    assert!(!config.node.name.is_empty());
    assert_eq!(config.http.paths, Paths::Both);
    assert_eq!(config.http.get_bodies, GetBodies::Refuse);
    assert!(!config.http.clear_text_http2);
    assert_eq!(config.http.header_timeout, Duration::from_secs(30));
    assert_eq!(config.http.head, http1::Limits::default());
    assert_eq!(
        config.http.record_headers,
        ["content-type", "user-agent", "x-request-id"]
    );
    assert_eq!(config.tls.ech, Ech::AllowOuter);
    assert_eq!(config.tls.hello_timeout, Duration::from_secs(10));
    assert!(!config.tls.verify_sni_address);
    assert_eq!(config.tls.secrets_dir, Path::new("/etc/palisade/secrets"));
    assert_eq!(config.tls.interception_ca, None);
    assert_eq!(config.tls.no_sni, NoSni::CheckAddress);
    assert_eq!(config.tls.idle_timeout, Duration::from_secs(3_600));
    assert_eq!(config.tls.response_timeout, Duration::from_secs(3_600));
    assert_eq!(
        (
            config.tls.max_connections,
            config.tls.max_connections_per_endpoint
        ),
        (16_384, 8_192)
    );
    assert_eq!(
        parsed("[tls]\nmax_connections = 7")
            .tls
            .max_connections_per_endpoint,
        4
    );
    assert_eq!(
        parsed("[http]\nrecord_headers = []\nmax_head = 1024").http,
        Http {
            head: http1::Limits {
                line: 1_024,
                block: 1_024
            },
            record_headers: Vec::new(),
            ..config.http
        }
    );
}

#[test]
fn the_shipped_configuration_is_valid() {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../config/palisade.toml"));
    Config::load(path).unwrap_or_else(|errors| panic!("{errors:#?}"));
}

#[test]
fn unknown_keys_are_found_everywhere_with_their_place() {
    let found = errors(
        "[node]\nnaem = \"x\"\n\n[polcy]\ndir = \"/x\"\n[[endpoint]]\nname = \"a\"\n  interfase = \"v\"\naddresses = [\"10.0.0.1\"]\ninterface = \"v\"\n",
    );
    assert_eq!(found.len(), 3, "{found:#?}");
    assert!(
        found[0].starts_with("p.toml:2:1: unknown key 'naem' in node; did you mean 'name'?"),
        "{}",
        found[0]
    );
    assert!(
        found[1].starts_with("p.toml:4:2: unknown key 'polcy' at the top level; did you mean 'policy'?"),
        "{}",
        found[1]
    );
    assert!(
        found[2].starts_with("p.toml:8:3: unknown key 'interfase' in endpoint; did you mean 'interface'?"),
        "{}",
        found[2]
    );
}

#[test]
fn every_wrong_value_is_named_with_its_place() {
    let cases = [
        (
            "[policy]\nenforcement = \"allways\"",
            "p.toml:2:15: policy.enforcement cannot be 'allways': it is one of default, always, never; did you mean 'always'?",
        ),
        (
            "[policy]\naudit = \"yes\"",
            "p.toml:2:9: policy.audit must be true or false, not a string",
        ),
        (
            "[policy]\ndebounce = \"5\"",
            "p.toml:2:12: policy.debounce: '5' is not a duration: write a number and a unit, like 500ms, 10s, 5m or 1h30m",
        ),
        (
            "[limits]\nconntrack = 1",
            "p.toml:2:13: limits.conntrack must be between 64 and 134217727",
        ),
        (
            "[limits]\nrules = -1",
            "p.toml:2:9: limits.rules must be between 64 and 134217727",
        ),
        (
            "[timeouts]\nudp = \"1ms\"",
            "p.toml:2:7: timeouts.udp must be at least 100ms and less than 30d",
        ),
        (
            "[node]\npin_dir = \"bpf\"",
            "p.toml:2:11: node.pin_dir must be an absolute path",
        ),
        (
            "[node]\naddresses = [\"10.0.0.1\", \"10.0.0.0/24\"]",
            "p.toml:2:26: node.addresses: '10.0.0.0/24' is a prefix; an address is wanted",
        ),
        (
            "node = 1",
            "p.toml:1:8: node must be a table: [node], not a whole number",
        ),
        (
            "[endpoint]\nname = \"x\"",
            "p.toml:1:1: endpoint must be a list of tables: [[endpoint]], not a table",
        ),
        (
            "[[interface]]\nname = \"a-name-that-is-too-long\"",
            "p.toml:2:8: 'a-name-that-is-too-long' cannot be the name of an interface (at most 15 bytes, no '/', ':' or space)",
        ),
        (
            "[[interface]]\nrole = \"host\"",
            "p.toml:1:1: [[interface]] needs name = \"eth0\"",
        ),
        (
            "[[interface]]\nname = \"e\"\nrole = \"endpoint\"",
            "p.toml:3:8: the interface of a workload is named by its [[endpoint]]: interface = \"...\"",
        ),
        (
            "[[peer]]\nname = \"p\"\naddresses = [\"10.0.0.1/24\"]\nlabels = { a = \"b\" }",
            "p.toml:3:14: peer.addresses: '10.0.0.1/24' has bits set after the prefix: write 10.0.0.0/24",
        ),
        (
            "[[peer]]\nname = \"p\"\naddresses = [\"10.0.0.1\"]",
            "p.toml:1:1: [[peer]] needs labels = { app = \"database\" } or entity = \"remote-node\"",
        ),
        (
            "[[peer]]\nname = \"p\"\naddresses = [\"10.0.0.1\"]\nlabels = { \"reserved:host\" = \"\" }\nentity = \"health\"",
            "p.toml:4:12: labels of source 'reserved' are given by Palisade and cannot be configured",
        ),
        (
            "[http]\npath_normalization = \"bth\"",
            "p.toml:2:22: http.path_normalization cannot be 'bth': it is one of both, raw; did you mean 'both'?",
        ),
        (
            "[http]\nheader_timeout = \"0s\"",
            "p.toml:2:18: http.header_timeout must be at least 100ms and less than 1h",
        ),
        (
            "[http]\nmax_head = 131073",
            "p.toml:2:12: http.max_head must be between 256 and 131072",
        ),
        (
            "[http]\nmax_head = 1024\nmax_line = 2048",
            "p.toml:1:1: http.max_line is more than http.max_head",
        ),
        (
            "[http]\nrecord_headers = [\"a\", \"user agent\"]",
            "p.toml:2:24: http.record_headers: 'user agent' cannot be the name of a header (letters, digits and '-', at most 64); write for example \"user-agent\"",
        ),
        (
            "[http]\nrecord_headers = [\"host\", \"Host\"]",
            "p.toml:2:27: http.record_headers: 'host' is there twice",
        ),
        (
            "[http]\nrecord_headers = [\"h0\", \"h1\", \"h2\", \"h3\", \"h4\", \"h5\", \"h6\", \"h7\", \"h8\", \"h9\", \"h10\", \"h11\", \"h12\", \"h13\", \"h14\", \"h15\", \"h16\"]",
            "p.toml:2:121: http.record_headers has more than 16 names",
        ),
        (
            "[http]\npath_normalisation = \"both\"",
            "p.toml:2:1: unknown key 'path_normalisation' in http; did you mean 'path_normalization'?; known here: clear_text_http2, get_bodies, header_timeout, max_head, max_line, path_normalization, record_headers",
        ),
        (
            "[tls]\nech = \"allow\"",
            "p.toml:2:7: tls.ech cannot be 'allow': it is one of allow-outer, deny",
        ),
        (
            "[tls]\nverify_sni_address = 1",
            "p.toml:2:22: tls.verify_sni_address must be true or false, not a whole number",
        ),
        (
            "[tls]\ninterception_ca = \"ca\"",
            "p.toml:2:19: 'ca' names no secret: write \"NAMESPACE/NAME\"",
        ),
        (
            "[tls]\nno_sni = \"pass\"",
            "p.toml:2:10: tls.no_sni cannot be 'pass': it is one of check-address, refuse",
        ),
        (
            "[tls]\nidle_timeout = \"0s\"",
            "p.toml:2:16: tls.idle_timeout must be at least 1s and less than 7d",
        ),
        (
            "[tls]\nmax_connections = 10\nmax_connections_per_endpoint = 11",
            "p.toml:1:1: tls.max_connections_per_endpoint is more than tls.max_connections",
        ),
        (
            "[tls]\nproxy_threads = 1000",
            "p.toml:2:17: tls.proxy_threads must be between 0 and 64",
        ),
        (
            "x = \n",
            "p.toml:1:5: string values must be quoted, expected literal string",
        ),
    ];
    for (text, expected) in cases {
        let found = errors(text);
        assert!(
            found.iter().any(|error| error == expected),
            "{text:?}\n wanted {expected}\n found {found:#?}"
        );
    }
}

#[test]
fn duplicate_names_addresses_and_interfaces_are_refused() {
    let endpoint = |name: &str, interface: &str, address: &str| {
        format!("[[endpoint]]\nname = \"{name}\"\ninterface = \"{interface}\"\naddresses = [\"{address}\"]\n")
    };
    let two = |second: String| errors(&(endpoint("a", "v1", "10.0.0.1") + &second));
    assert_eq!(
        two(endpoint("b", "v1", "10.0.0.2")),
        ["p.toml:7:13: interface v1 belongs to endpoint default/a already"]
    );
    assert_eq!(
        two(endpoint("b", "v2", "10.0.0.1")),
        ["p.toml:8:14: 10.0.0.1 belongs to endpoint default/a already"]
    );
    assert_eq!(
        two(endpoint("b", "v2", "::ffff:10.0.0.1")),
        ["p.toml:8:14: 10.0.0.1 belongs to endpoint default/a already"]
    );
    assert_eq!(
        two(endpoint("a", "v2", "10.0.0.2")),
        ["p.toml:6:8: there is another endpoint default/a"]
    );
}

/// Returns each "[section] key" or "[[section]] key" that a text names.
fn hinted_keys(text: &str) -> Vec<(String, String)> {
    const SECTIONS: [&str; 12] = [
        "node",
        "policy",
        "limits",
        "timeouts",
        "dns",
        "http",
        "tls",
        "worker",
        "namespace",
        "interface",
        "endpoint",
        "peer",
    ];
    // Words that follow a section name in a sentence about the section itself.
    const NO_KEYS: [&str; 2] = ["needs", "is"];
    let mut found = Vec::new();
    for section in SECTIONS {
        for (at, name) in text.match_indices(&format!("[{section}]")) {
            let rest = text[at + name.len()..].trim_start_matches(']');
            let Some(rest) = rest.strip_prefix(' ') else {
                continue;
            };
            let end = rest
                .find(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit() && c != '_')
                .unwrap_or(rest.len());
            if end > 0 && !NO_KEYS.contains(&&rest[..end]) {
                found.push((section.to_owned(), rest[..end].to_owned()));
            }
        }
    }
    found
}

/// Returns whether the configuration has such a key, whatever its type.
fn is_known(section: &str, key: &str) -> bool {
    let list = matches!(
        section,
        "namespace" | "interface" | "endpoint" | "peer" | "export"
    );
    let head = if list {
        format!("[[{section}]]")
    } else {
        format!("[{section}]")
    };
    let unknown = format!("unknown key '{key}'");
    match Config::parse(Path::new("p.toml"), &format!("{head}\n{key} = 100000\n")) {
        Ok(_) => true,
        Err(errors) => !errors.iter().any(|error| error.to_string().contains(&unknown)),
    }
}

#[test]
fn every_option_that_a_document_names_exists() {
    assert!(is_known("limits", "policy") && !is_known("limits", "policy_entries"));
    assert_eq!(
        hinted_keys("raise [limits] policy; [[endpoint]] needs a name; [[interface]] mtu=1"),
        [
            ("limits".to_owned(), "policy".to_owned()),
            ("interface".to_owned(), "mtu".to_owned())
        ]
    );
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut texts = vec![root.join("README.md"), root.join("config/palisade.toml")];
    let mut dirs = vec![root.join("crates"), root.join("docs")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if !matches!(name.as_str(), "tests" | "benches" | "target") {
                    dirs.push(path);
                }
            } else if name != "tests.rs" && (name.ends_with(".rs") || name.ends_with(".md")) {
                texts.push(path);
            }
        }
    }
    let mut keys = 0;
    for path in texts {
        for (section, key) in hinted_keys(&fs::read_to_string(&path).unwrap()) {
            keys += 1;
            assert!(is_known(&section, &key), "{}: [{section}] {key}", path.display());
        }
    }
    assert!(keys > 20, "{keys}");
}

#[test]
fn each_limits_option_sets_the_size_of_its_map() {
    use palisade_abi::maps;
    let default = parsed("").limits;
    for map in [
        maps::CONNTRACK,
        maps::FRAGMENTS,
        maps::POLICY,
        maps::IPCACHE,
        maps::PREFIXES,
        maps::LEARNED,
        maps::RULES,
    ] {
        let option = limit_option::limit_option(map).unwrap_or_else(|| panic!("{map}"));
        let text = format!("[limits]\n{option} = 54321\n");
        assert_ne!(parsed(&text).limits, default, "{map}: {option}");
        assert_eq!(
            limit_hint(&map.to_lowercase()),
            format!("; raise [limits] {option}")
        );
    }
    // No option sizes the event ring, so errors must not name one.
    assert_eq!(limit_hint(maps::EVENTS), "");
}

#[test]
fn a_full_map_is_reported_with_the_option_to_raise() {
    let full = palisade_datapath::MapError::Full {
        map: "prefixes".to_owned(),
        present: 7,
        max_entries: 7,
    };
    assert_eq!(
        with_option(&full),
        "prefixes map full: 7 of 7 entries; raise [limits] ipcache"
    );
    let ring = palisade_datapath::OpenError::BadLimit {
        map: "events".to_owned(),
        value: 3,
        why: "too small",
    };
    assert_eq!(with_option(&ring), "events map of size 3: too small");
}

/// Returns the code blocks of a language in a document, without the indentation of their fences.
fn code_blocks(document: &str, language: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut lines = document.lines();
    while let Some(line) = lines.next() {
        let indentation = line.len() - line.trim_start().len();
        if line.trim() == format!("```{language}") {
            let block = lines.by_ref().take_while(|line| line.trim() != "```");
            let block: Vec<&str> = block
                .map(|line| line.get(indentation..).unwrap_or_default())
                .collect();
            blocks.push(block.join("\n"));
        }
    }
    blocks
}

#[test]
fn configurations_in_the_documents_are_valid() {
    let read = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(name);
        fs::read_to_string(path).unwrap()
    };
    let configurations = code_blocks(&read("README.md"), "toml");
    assert_eq!(configurations.len(), 1);
    assert_eq!(parsed(&configurations[0]).endpoints.len(), 1);
    let start = read("docs/QUICKSTART.md");
    let audit: Vec<bool> = code_blocks(&start, "toml")
        .iter()
        .map(|text| parsed(text).policy.audit)
        .collect();
    assert_eq!(audit, [true, false]);
    for (name, count) in [
        ("docs/QUICKSTART.md", 1),
        ("docs/FROM-NFTABLES.md", 2),
        ("docs/FROM-CILIUM.md", 1),
        ("docs/INTERFACES.md", 3),
    ] {
        let policies = code_blocks(&read(name), "yaml");
        assert_eq!(policies.len(), count, "{name}");
        for text in policies {
            let diagnostics = palisade_policy::parse::parse(name, &text).diagnostics;
            assert!(diagnostics.is_empty(), "{name}: {diagnostics:?}");
        }
    }
}

#[test]
fn ether_types_are_names_and_numbers_and_none_that_policies_decide_on() {
    let types = |list: &str| {
        let config = parsed(&format!(
            "[node]\nname = \"n\"\n[[interface]]\nname = \"eth0\"\n{list}"
        ));
        let types = config.interfaces[0].ether_types;
        types
            .into_iter()
            .filter(|number| *number != 0)
            .collect::<Vec<u16>>()
    };
    // The default: time synchronisation and port authentication.
    assert_eq!(types(""), [0x88f7, 0x888e]);
    assert_eq!(types("allow_ethertypes = []"), [0_u16; 0]);
    assert_eq!(
        types("allow_ethertypes = [\"lldp\", \"0x88a4\", \"34978\", \"llc\"]"),
        [0x88cc, 0x88a4, 34_978, palisade_abi::ETHER_TYPE_LLC]
    );
    let said = |value: &str| {
        errors(&format!(
            "[node]\nname = \"n\"\n[[interface]]\nname = \"eth0\"\nallow_ethertypes = {value}"
        ))
    };
    for (value, expected) in [
        (
            "\"ptp\"",
            "p.toml:5:20: interface.allow_ethertypes must be a list of EtherTypes by name or number: [\"ptp\", \"0x8863\"], not a string",
        ),
        (
            "[35063]",
            "p.toml:5:21: interface.allow_ethertypes must be a list of EtherTypes by name or number: [\"ptp\", \"0x8863\"], not a whole number",
        ),
        (
            "[\"ptp\", \"0x86dd\"]",
            "p.toml:5:28: interface.allow_ethertypes: '0x86dd' is IPv4, IPv6, ARP or a VLAN tag: policies decide on these, never a list",
        ),
        (
            "[\"1500\"]",
            "p.toml:5:21: interface.allow_ethertypes: '1500' is less than 0x0600 and so no EtherType; frames with a length instead are \"llc\"",
        ),
    ] {
        assert_eq!(said(value), [expected]);
    }
    let unknown = said("[\"ldp\"]");
    assert!(
        unknown.len() == 1
            && unknown[0].starts_with("p.toml:5:21: interface.allow_ethertypes: 'ldp' is neither a number")
            && unknown[0].ends_with("did you mean 'lldp'?"),
        "{unknown:?}"
    );
    let many: Vec<String> = (0..17).map(|n| format!("\"{}\"", 0x9000 + n)).collect();
    assert!(types(&format!("allow_ethertypes = [{}]", many[..16].join(", "))).len() == 16);
    let many = said(&format!("[{}]", many.join(", ")));
    assert!(
        many.len() == 1 && many[0].ends_with("allow_ethertypes: at most 16"),
        "{many:?}"
    );
}

fn discover_errors(section: &str) -> String {
    let text = format!("[[interface]]\nname = \"vethnic\"\n[[discover]]\n{section}");
    let errors = Config::parse(Path::new("/p.toml"), &text)
        .err()
        .unwrap_or_default();
    let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

#[test]
fn workloads_can_be_found_by_four_sources() {
    let text = "[[discover]]\nkind = \"netns\"\nnames = [\"web-*\"]\naddresses = [\"10.0.0.0/8\"]\nlabels = { app = \"{1}\" }\n\
                [[discover]]\nkind = \"docker\"\ncontainer_labels = [\"app\"]\nlabels = { image = \"{image}\" }\n\
                [[discover]]\nkind = \"containerd\"\n\
                [[discover]]\nkind = \"cni\"\ninterfaces = [\"cali*\", \"veth0\"]\n";
    let config = Config::parse(Path::new("/p.toml"), text).unwrap();
    let sources: Vec<String> = config
        .discover
        .iter()
        .map(|section| section.source.to_string())
        .collect();
    assert_eq!(
        sources,
        [
            "netns /run/netns",
            "docker /var/run/docker.sock",
            "containerd /run/containerd/containerd.sock",
            "cni /var/lib/cni/results"
        ]
    );
    assert_eq!(config.discover[0].rule.interfaces[0].to_string(), "veth*");
    let unknown = |text: &str| {
        Config::parse(Path::new("/p.toml"), text).unwrap().discover[0]
            .rule
            .unknown
    };
    assert_eq!(unknown(text), palisade_discover::Unknown::Deny);
    let init = text.replacen("names", "unknown = \"init\"\nnames", 1);
    assert_eq!(unknown(&init), palisade_discover::Unknown::Init);
}

#[test]
fn options_of_found_workloads_are_checked_with_their_place() {
    for (section, message) in [
        ("", "needs kind"),
        ("kind = \"x\"", "one of netns, docker, containerd, cni"),
        (
            "kind = \"docker\"\ncontainerd_namespaces = [\"moby\"]",
            "discover.containerd_namespaces has no meaning",
        ),
        (
            "kind = \"containerd\"\ncontainerd_namespaces = []",
            "has 0 names: 1 to 16 are possible",
        ),
        (
            "kind = \"containerd\"\ncontainerd_namespaces = [\"a b\"]",
            "'a b' cannot be a namespace of containerd",
        ),
        (
            "kind = \"netns\"\ninterfaces = [\"v*\"]",
            "matches vethnic, an [[interface]]",
        ),
        (
            "kind = \"docker\"",
            "the default interfaces = [\"veth*\"] matches vethnic",
        ),
        (
            "kind = \"docker\"\ninterfaces = [\"pal*\"]",
            "a link of Palisade's own",
        ),
        ("kind = \"docker\"\ninterfaces = [\"*\"]", "/p.toml:5:15: "),
        ("kind = \"docker\"\ninterfaces = [\"l*\"]", "loopback"),
        (
            "kind = \"netns\"\ninterfaces = [\"x*\"]\nnames = [\"a\"]",
            "needs addresses",
        ),
        ("kind = \"netns\"\ninterfaces = [\"x*\"]", "needs names"),
        (
            "kind = \"netns\"\nsocket = \"/x\"",
            "discover.socket has no meaning",
        ),
        ("kind = \"docker\"\nname = \"{x}\"", "{name}, {id}"),
        (
            "kind = \"docker\"\nlabels = { \"reserved:host\" = \"\" }",
            "labels of source 'reserved'",
        ),
        (
            "kind = \"docker\"\nlabels = { app = \"a,b\" }",
            "value of a label",
        ),
        ("kind = \"docker\"\nunknown = \"pass\"", "one of deny, init"),
        (
            "kind = \"docker\"\nunknown = \"init\"",
            "discover.unknown = \"init\" needs addresses",
        ),
    ] {
        let errors = discover_errors(section);
        assert!(errors.contains(message), "{section}: {errors}");
    }
}
