use std::{fs, path::Path};

use palisade_policy::parse::parse;

use super::*;
use crate::{
    config::Config,
    init::{Outgoing, Session},
    survey::Route,
};

fn link(index: u32, name: &str, kind: &str, addresses: &[&str]) -> Link {
    Link {
        index,
        name: name.to_owned(),
        kind: kind.to_owned(),
        up: true,
        mtu: 1_500,
        addresses: addresses
            .iter()
            .map(|net| {
                let (address, length) = net.split_once('/').unwrap();
                (address.parse().unwrap(), length.parse().unwrap())
            })
            .collect(),
        ..Link::default()
    }
}

fn listener(transport: Transport, at: &str, port: u16, process: &str) -> Listener {
    Listener {
        transport,
        port,
        address: at.parse().unwrap(),
        processes: vec![process.to_owned()],
    }
}

/// A server with a NIC, a web server and an ssh session.
fn server() -> NodeFacts {
    let mut eth0 = link(
        2,
        "eth0",
        "",
        &["198.51.100.7/24", "2001:db8::7/64", "fe80::1/64"],
    );
    eth0.default_route = true;
    let mut lo = link(1, "lo", "", &["127.0.0.1/8", "::1/128"]);
    lo.loopback = true;
    NodeFacts {
        hostname: "server1".to_owned(),
        links: vec![lo, eth0],
        listeners: vec![
            listener(Transport::Tcp, "0.0.0.0", 22, "sshd"),
            listener(Transport::Tcp, "::", 22, "sshd"),
            listener(Transport::Tcp, "0.0.0.0", 443, "nginx"),
            listener(Transport::Tcp, "127.0.0.1", 5432, "postgres"),
            listener(Transport::Tcp, "::ffff:127.0.0.1", 8005, "java"),
            listener(Transport::Udp, "127.0.0.53", 53, "systemd-resolve"),
            listener(Transport::Udp, "0.0.0.0", 68, "dhclient"),
            listener(Transport::Udp, "0.0.0.0", 40_123, "avahi-daemon"),
        ],
        first_ephemeral_port: 32_768,
        session: Some(Session {
            client: "203.0.113.9".parse().unwrap(),
            port: 22,
        }),
        dns_servers: vec!["192.0.2.53".parse().unwrap(), "127.0.0.53".parse().unwrap()],
        outgoing: vec![Outgoing {
            transport: Transport::Tcp,
            port: 443,
            processes: vec!["backup".to_owned()],
        }],
        ..NodeFacts::default()
    }
}

/// A node with a bond, a bridge, a VLAN, containers and a firewall.
fn router() -> NodeFacts {
    let mut facts = server();
    facts.session = None;
    facts.links = vec![
        link(2, "eth0", "", &[]),
        link(3, "eth1", "", &[]),
        link(4, "bond0", "bond", &["10.0.0.1/24"]),
        link(5, "bond0.7", "vlan", &["10.7.0.1/24"]),
        link(6, "docker0", "bridge", &["172.17.0.1/16"]),
        link(7, "veth1234", "veth", &[]),
        link(8, "wg0", "wireguard", &["10.9.0.1/24"]),
    ];
    for port in 0..2 {
        facts.links[port].master = Some(4);
    }
    facts.links[2].default_route = true;
    facts.firewall = vec!["nftables: nat chains with rules (2)".to_owned()];
    facts.engines = vec![
        engine("docker", "docker", "/run/docker.sock"),
        engine("containerd", "containerd", "/run/containerd/containerd.sock"),
        engine("podman", "docker", "/run/podman/podman.sock"),
    ];
    facts.routes = vec![
        Route {
            network: "10.20.0.0/16".parse().unwrap(),
            gateway: Some("10.0.0.254".parse().unwrap()),
            interface: 4,
        },
        Route {
            network: "fd00:20::/32".parse().unwrap(),
            gateway: None,
            interface: 8,
        },
    ];
    facts.accept_rules = vec![
        "inet filter input: ct state established,related accept".to_owned(),
        "inet filter input: tcp dport { 22, 443 } accept".to_owned(),
    ];
    facts.namespaces = vec!["blue".to_owned(), "green".to_owned()];
    facts
}

fn engine(name: &str, kind: &'static str, socket: &str) -> Engine {
    Engine {
        name: name.to_owned(),
        kind,
        socket: socket.to_owned(),
    }
}

/// Compares a text with a file of `golden`. With PALISADE_BLESS=1 the file is written instead.
#[track_caller]
fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/init/golden")
        .join(name);
    if std::env::var_os("PALISADE_BLESS").is_some() {
        fs::write(&path, text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "{}; PALISADE_BLESS=1 writes it", path.display());
}

/// Checks that the texts are valid, and returns the configuration.
#[track_caller]
fn valid(generated: &Generated) -> Config {
    let parsed = parse(POLICY_FILE, &generated.policy);
    let diagnostics: Vec<String> = parsed.diagnostics.iter().map(ToString::to_string).collect();
    assert_eq!(diagnostics, [""; 0], "{}", generated.policy);
    Config::parse(Path::new("/etc/palisade/palisade.toml"), &generated.config)
        .unwrap_or_else(|errors| panic!("{errors:#?}\n{}", generated.config))
}

#[test]
fn a_server_gets_its_nic_and_its_reachable_ports() {
    let generated = generate(&server(), "/etc/palisade/policies.d", false);
    let config = valid(&generated);
    assert!(config.policy.audit);
    assert_eq!(config.interfaces.len(), 1);
    assert_eq!(generated.ports, 2);
    assert!(!generated.policy.contains("5432") && !generated.policy.contains("8005"));
    golden("server.toml", &generated.config);
    golden("server.yaml", &generated.policy);
}

#[test]
fn a_router_gets_its_bond_and_tunnel_and_explanations_of_the_rest() {
    let generated = generate(&router(), "policies.d", true);
    let config = valid(&generated);
    assert!(config.discover.is_empty());
    let names: Vec<&str> = config
        .interfaces
        .iter()
        .map(|interface| interface.name.as_str())
        .collect();
    assert_eq!(names, ["bond0", "wg0"]);
    golden("router.toml", &generated.config);
    golden("router.yaml", &generated.policy);
}

#[test]
fn the_proposed_sections_are_valid_without_their_number_signs() {
    let mut facts = router();
    // A veth pair to a named namespace.
    facts
        .links
        .push(link(9, "veth5", "veth", &["10.5.0.1/24", "fe80::5/64"]));
    facts.namespaces.push("a*\"b".to_owned());
    let mut generated = generate(&facts, "policies.d", false);
    let mut inside = false;
    let lines = generated.config.lines().map(|line| {
        inside = line == "# [[discover]]" || (inside && !line.is_empty());
        line.strip_prefix("# ").filter(|_| inside).unwrap_or(line)
    });
    generated.config = lines.collect::<Vec<_>>().join("\n");
    let config = valid(&generated);
    let kinds: Vec<&str> = config.discover.iter().map(|section| section.rule.kind).collect();
    assert_eq!(kinds, ["docker", "containerd", "docker", "netns"]);
    assert!(
        generated.config.contains("names = [\"blue\", \"green\"]")
            && generated.config.contains("addresses = [\"10.5.0.0/24\"]"),
        "{}",
        generated.config
    );
}

#[test]
fn the_port_of_the_session_is_open_without_a_socket() {
    let mut facts = server();
    facts.listeners.clear();
    facts.session = Some(Session {
        client: "2001:db8:f::1".parse().unwrap(),
        port: 2_222,
    });
    let generated = generate(&facts, "p", false);
    valid(&generated);
    assert!(
        generated.policy.contains("port: \"2222\""),
        "{}",
        generated.policy
    );
}

#[test]
fn names_of_the_system_cannot_leave_their_comment() {
    let mut facts = server();
    let evil = "x\n  - fromEntities: [world]\r\u{85}";
    for one in &mut facts.listeners {
        one.processes = vec![evil.to_owned()];
    }
    facts.outgoing[0].processes = vec![evil.to_owned()];
    facts.hostname = "h\n[[interface]]\nname = \"lo\"".to_owned();
    facts.engines = vec![
        engine("\n[policy]", "docker", "/run/docker.sock"),
        engine("docker", "docker", "/run/x\n[policy]"),
    ];
    facts.accept_rules = vec![evil.to_owned()];
    facts.links[1].kind = "veth\n[x]".to_owned();
    facts.namespaces = vec!["a\nb = 1".repeat(100)];
    let before = generate(&server(), "p", true);
    let generated = generate(&facts, "p", true);
    valid(&generated);
    let rules = |text: &str| text.lines().filter(|line| line.starts_with("  - ")).count();
    assert_eq!(rules(&generated.policy), rules(&before.policy));
}

#[test]
fn a_node_without_anything_still_gets_valid_files() {
    let generated = generate(&NodeFacts::default(), "p", true);
    assert_eq!((generated.interfaces, generated.ports), (0, 0));
    let parsed = parse(POLICY_FILE, &generated.policy);
    assert!(!parsed.has_errors());
    assert!(Config::parse(Path::new("/x/palisade.toml"), &generated.config).is_ok());
}
