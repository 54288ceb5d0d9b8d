//! Owners of allowed names choose their answers: addresses of the node's own network, and many combinations of addresses,
//! which would make the tables grow without a bound.

use std::{fs, net::Ipv4Addr, time::Duration};

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    dns::{ReceivedQuery, Scripted, ScriptedResponse},
    topology::{FAMILIES, Family},
};
use palisade_tests::fixtures::dns::{Names, names, resolver, site};

fn daemon(names: &Names, tables: &str, policy: &str) -> Daemon {
    let settings = Settings {
        tables: tables.into(),
        ..Settings::default()
    };
    names
        .daemon(&settings, &[("client.yaml", policy)])
        .expect("daemon")
}

/// Returns the client's policy; `more` are further egress rules.
fn client(more: &str) -> String {
    format!(
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: client}}
spec:
  endpointSelector: {{matchLabels: {{app: client}}}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{{port: "53", protocol: ANY}}]
      rules:
        dns: [{{matchPattern: "*"}}]
  - toFQDNs: [{{matchPattern: "*"}}]
    toPorts: [{{ports: [{{port: "80"}}]}}]
{more}"#
    )
}

#[test]
fn special_purpose_addresses_are_reachable_by_name_only_if_they_are_listed() {
    let names = names();
    // The sites have documentation addresses, which the configuration does not allow.
    let daemon = daemon(&names, "[dns]\nallow_special = [\"192.0.2.0/24\"]\n", &client(""));
    for family in FAMILIES {
        // The answer is forwarded, but its address is not reachable.
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "www.example",
            site(10, family),
        );
        names.does_not_reach(&daemon, "client", 10, family);
    }
    let status = daemon.status().expect("status");
    assert!(status["names"]["special"].as_u64() >= Some(2), "{status:#}");
    assert_eq!(status["names"]["in_map"].as_u64(), Some(0), "{status:#}");

    // A rule for another port lists the prefix: the name may now resolve to it. A rule for the whole internet does not
    // count.
    let listed = "  - toCIDR: [\"203.0.113.0/24\", \"::/0\"]\n    toPorts: [{ports: [{port: \"9\"}]}]\n";
    daemon
        .apply(&[("client.yaml", &client(listed))])
        .expect("another policy");
    for family in FAMILIES {
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "www.example",
            site(10, family),
        );
    }
    names.reaches(&daemon, "client", 10, Family::V4);
    names.does_not_reach(&daemon, "client", 10, Family::V6);

    // Without that rule the learned address is removed.
    daemon
        .apply(&[("client.yaml", &client(""))])
        .expect("the first policy");
    for family in FAMILIES {
        names.does_not_reach(&daemon, "client", 10, family);
    }
}

/// Names of the policy. The address with number `m` belongs to the names whose bits `m` has.
const NAMES: u32 = 10;

fn combinations(asked: &ReceivedQuery) -> Vec<ScriptedResponse> {
    let number: Option<u32> = asked
        .name
        .strip_prefix('n')
        .and_then(|rest| rest.strip_suffix(".example")?.parse().ok());
    let records: Vec<String> = match number {
        Some(number) if asked.kind == 1 => (1..1_u32 << NAMES)
            .filter(|m| m >> number & 1 == 1)
            .map(|m| format!("{}. 8 IN A {}", asked.name, Ipv4Addr::from_bits(0x6440_0000 | m)))
            .collect(),
        _ => vec![format!("{}. 60 IN A {}", asked.name, site(10, Family::V4))],
    };
    vec![ScriptedResponse::records(&records)]
}

#[test]
fn a_dns_server_that_combines_names_does_not_control_the_size_of_the_tables() {
    let names = names();
    names
        .topology
        .internet
        .ip("addr add 192.0.2.77/32 dev lo")
        .expect("an address");
    let server = "192.0.2.77".parse().expect("an address");
    let _server = Scripted::start(&names.topology.internet, &[server], combinations).expect("a server");
    let selectors: String = (0..NAMES)
        .map(|n| {
            format!(
                "  - toFQDNs: [{{matchName: n{n}.example}}]\n    toPorts: [{{ports: [{{port: \"{}\"}}]}}]\n",
                2000 + n
            )
        })
        .collect();
    let hasty = "[dns]\nmin_ttl = \"8s\"\n[timeouts]\nsweep = \"500ms\"\n";
    let daemon = daemon(&names, hasty, &client(&selectors));
    let identities = || {
        daemon
            .json(&["identity", "list"])
            .expect("identities")
            .as_array()
            .map(Vec::len)
    };
    let before = identities().expect("a list");
    let mut withheld = 0;
    for n in 0..NAMES {
        let name = format!("n{n}.example");
        let dug = names.dig("client", server, &["+tcp", "+tries=1", "+timeout=5", &name, "A"]);
        withheld += usize::from(dug.answers.is_empty());
        assert!(
            identities().expect("a list") <= before + 256 + 16,
            "{}",
            daemon.report()
        );
    }
    assert!(withheld > 0, "all combinations were learned");
    let status = daemon.status().expect("status");
    assert!(
        status["names"]["identities_over_limit"].as_u64() > Some(0),
        "{status:#}"
    );
    // Other names of the same endpoint still work.
    names.resolves(
        &daemon,
        "client",
        resolver(Family::V4),
        "www.example",
        site(10, Family::V4),
    );
    names.reaches(&daemon, "client", 10, Family::V4);

    // Identities are removed with their expired addresses, and the state file does not keep them.
    palisade_testbed::ns::wait_until("identities are pruned", Duration::from_secs(60), || {
        identities().is_some_and(|now| now <= before + 64)
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    let state = daemon.config().with_file_name("state");
    let written: String = fs::read_dir(&state)
        .expect("the state directory")
        .filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok())
        .filter(|text| text.contains("next_local"))
        .collect();
    assert!(!written.is_empty());
    let largest = written.matches("fqdn:n").count();
    // Each name alone, combined with the IPv4 and the IPv6 world.
    assert!(
        largest <= 2 * NAMES as usize,
        "{largest} names in the kept identities"
    );
}
