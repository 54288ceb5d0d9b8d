//! DNS rules against clients that resolve names in other ways than the policy's author expects.

use palisade_testbed::{daemon::Settings, topology::FAMILIES};
use palisade_tests::fixtures::dns::{names, resolver, site};

const CLIENT: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [world, host]
    toPorts:
    - ports: [{port: "53", protocol: ANY}]
      rules:
        dns: [{matchName: www.example}]
  - toFQDNs: [{matchName: www.example}]
    toPorts:
    - ports: [{port: "80", protocol: ANY}]
"#;

#[test]
fn denied_search_list_names_get_nxdomain_and_other_names_refused() {
    let names = names();
    let daemon = names
        .daemon(&Settings::default(), &[("client.yaml", CLIENT)])
        .expect("daemon");
    for family in FAMILIES {
        let server = resolver(family);
        for (name, status) in [
            ("www.example.corp.internal", "NXDOMAIN"),
            ("www.example.default.svc.cluster.local", "NXDOMAIN"),
            ("evil.example", "REFUSED"),
            ("evil.example.corp.internal", "REFUSED"),
        ] {
            for how in ["+notcp", "+tcp"] {
                let dug = names.dig("client", server, &[name, "A", how]);
                assert_eq!(
                    dug.status,
                    status,
                    "{name} {how}: {}\n{}",
                    dug.text,
                    daemon.report()
                );
                assert!(dug.answers.is_empty(), "{}", dug.text);
            }
            assert_eq!(names.questions(name), 0, "{name} has reached a server");
        }
        names.resolves(&daemon, "client", server, "www.example", site(10, family));
    }
}

#[test]
fn flows_are_shown_in_order_of_time() {
    let names = names();
    let daemon = names
        .daemon(&Settings::default(), &[("client.yaml", CLIENT)])
        .expect("daemon");
    for family in FAMILIES {
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "www.example",
            site(10, family),
        );
        names.reaches(&daemon, "client", 10, family);
    }
    let flows = daemon.flows(&[]).expect("flows");
    let times: Vec<&str> = flows.iter().filter_map(|flow| flow["time"].as_str()).collect();
    assert!(times.len() > 8 && times.is_sorted(), "{times:?}");
    for family in FAMILIES {
        let site = site(10, family).to_string();
        let answer = flows.iter().position(|flow| {
            flow["l7"]["type"] == "RESPONSE" && flow["l7"]["dns"].to_string().contains(&site)
        });
        let connection = flows
            .iter()
            .position(|flow| flow["IP"]["destination"] == site && flow["l4"]["TCP"].is_object());
        assert!(
            answer.is_some() && connection.is_some() && answer < connection,
            "{answer:?} {connection:?}\n{}",
            daemon.report()
        );
    }
}
