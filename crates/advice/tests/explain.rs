//! Explanations: what nearly matches, and additions that allow exactly the packet.

use std::{collections::BTreeMap, net::IpAddr};

use palisade_abi::protocol;
use palisade_advice::explain::{Explanation, explain};
use palisade_inspect::Inspectors;
use palisade_model::{
    inventory::{Endpoint, Inventory, NamedPort, NamedPorts, Options, Peer},
    labels::{Labels, parse_label},
    request::{HttpRequest, KafkaRequest, Request},
};
use palisade_policy::{
    compile::{Changes, Compiler, FileContent},
    parse::parse,
    trace::{self, Outcome, Question},
};
use proptest::prelude::*;

fn labels(texts: &[&str]) -> Labels {
    Labels::new(texts.iter().map(|text| parse_label(text)))
}

fn endpoint(id: u16, name: &str, texts: &[&str]) -> Endpoint {
    let in_namespace = ["io.kubernetes.pod.namespace=shop"];
    Endpoint {
        id,
        name: name.into(),
        namespace: "shop".into(),
        labels: labels(&[texts, &in_namespace].concat()),
        named_ports: NamedPorts::from([(
            "web".into(),
            NamedPort {
                protocol: protocol::TCP,
                port: 8080,
            },
        )]),
        addresses: vec![
            IpAddr::from([10, 0, 0, id as u8]),
            format!("fd00::{id}").parse().unwrap(),
        ],
        audit: false,
    }
}

fn inventory() -> Inventory {
    let node = Endpoint {
        id: 1,
        name: "n1".into(),
        namespace: String::new(),
        labels: labels(&["reserved:host", "zone=a"]),
        named_ports: NamedPorts::new(),
        addresses: vec![IpAddr::from([10, 0, 0, 1])],
        audit: false,
    };
    Inventory {
        options: Options::default(),
        endpoints: vec![
            node,
            endpoint(2, "front", &["app=front", "tier=edge", "pod-template-hash=1"]),
            endpoint(3, "canary", &["app=front", "tier=edge", "track=canary"]),
            endpoint(4, "back", &["app=back"]),
            endpoint(5, "db", &["app=db", "tier=store"]),
        ],
        peers: vec![Peer {
            name: "billing".into(),
            labels: labels(&["app=billing", "io.kubernetes.pod.namespace=money"]),
            named_ports: NamedPorts::new(),
            prefixes: vec!["10.9.0.0/24".parse().unwrap()],
        }],
    }
}

fn compiler(policies: &str) -> Compiler {
    compiler_with(inventory(), policies)
}

fn compiler_with(inventory: Inventory, policies: &str) -> Compiler {
    let parsed = parse("p.yaml", policies);
    assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
    let mut compiler = Compiler::default();
    compiler
        .update(Changes {
            inventory: Some(inventory),
            files: BTreeMap::from([(
                "p.yaml".into(),
                Some(FileContent {
                    policies: parsed.policies,
                    cidr_groups: parsed.cidr_groups,
                }),
            )]),
        })
        .unwrap();
    compiler
}

fn packet(from: &str, to: &str, port: u16) -> Question {
    Question {
        source: from.into(),
        destination: to.into(),
        protocol: protocol::TCP,
        port,
        ..Question::default()
    }
}

fn answer(policies: &str, question: &Question) -> Explanation {
    let compiler = compiler(policies);
    let answer = explain(&compiler, question, &Inspectors::default()).unwrap();
    // The explanation never contradicts the trace.
    assert_eq!(
        answer.trace,
        trace::trace(&compiler, question, &Inspectors::default()).unwrap()
    );
    if let Some(addition) = &answer.addition {
        assert!(allowed_with(policies, &addition.yaml, question), "{answer}");
    }
    answer
}

fn allowed_with(policies: &str, addition: &str, question: &Question) -> bool {
    let both = if policies.is_empty() {
        addition.to_owned()
    } else {
        format!("{policies}---\n{addition}")
    };
    let outcome = trace::trace(&compiler(&both), question, &Inspectors::default())
        .unwrap()
        .verdict;
    matches!(outcome, Outcome::Allowed | Outcome::Inspected)
}

const BACK: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: back, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front, tier: edge}}]
    toPorts:
    - ports: [{port: '80', protocol: TCP}, {port: web, protocol: TCP}]
  - fromCIDR: [192.0.2.0/24]
    toPorts:
    - ports: [{port: '443', protocol: TCP}]
";

#[test]
fn a_wrong_port_is_the_nearest_miss() {
    let answer = answer(BACK, &packet("front", "back", 81));
    let side = &answer.trace.sides[1];
    assert_eq!(side.verdict, Outcome::Denied);
    assert_eq!(
        side.decided_by,
        "default deny of ingress by policy shop/back (p.yaml:1)"
    );
    let near = &answer.details[1].nearly[0];
    assert_eq!(near.rule, "policy shop/back ingress rule 1 (p.yaml:7)");
    assert_eq!(near.failed.len(), 1);
    assert_eq!(
        (near.failed[0].requirement, near.failed[0].text.as_str()),
        ("port", "81/TCP is not 80/TCP")
    );
    let addition = answer.addition.as_ref().unwrap();
    assert_eq!(
        addition.yaml,
        "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: allow-back-ingress-81-tcp
  namespace: shop
spec:
  endpointSelector:
    matchLabels:
      app: back
  ingress:
  - fromEndpoints:
    - matchLabels:
        app: front
        tier: edge
      matchExpressions:
      - key: track
        operator: DoesNotExist
    toPorts:
    - ports:
      - port: \"81\"
        protocol: TCP
"
    );
    assert_eq!(addition.in_policies.len(), 1);
    assert_eq!(addition.in_policies[0].policy, "shop/back");
    assert!(
        answer
            .to_string()
            .contains("  nearly: policy shop/back ingress rule 1 (p.yaml:7)\n    port: 81/TCP is not 80/TCP")
    );
}

fn failures(policies: &str, question: &Question) -> Vec<(&'static str, String)> {
    let answer = answer(policies, question);
    let detail = answer.details.iter().find(|detail| !detail.nearly.is_empty());
    let near = &detail.unwrap_or_else(|| panic!("{answer}")).nearly[0];
    near.failed
        .iter()
        .map(|failed| (failed.requirement, failed.text.clone()))
        .collect()
}

#[test]
fn each_requirement_of_level_3_and_4_is_named() {
    let said = |question: &Question| failures(BACK, question);
    assert_eq!(
        said(&Question {
            protocol: protocol::UDP,
            ..packet("front", "back", 80)
        }),
        [("protocol", "80/UDP is not 80/TCP".to_owned())]
    );
    assert_eq!(
        said(&packet("10.0.0.5", "back", 80)),
        [
            ("selector", "the rule requires app=front, and it is db".to_owned()),
            (
                "selector",
                "the rule requires tier=edge, and it is store".to_owned()
            ),
        ]
    );
    assert_eq!(
        said(&packet("198.51.100.7", "back", 443)),
        [("cidr", "198.51.100.7 is not in 192.0.2.0/24".to_owned())]
    );
    assert_eq!(
        said(&packet("192.0.2.7", "back", 444)),
        [("port", "444/TCP is not 443/TCP".to_owned())]
    );
    // A port by name that the endpoint has.
    assert!(answer(BACK, &packet("front", "back", 8080)).addition.is_none());
    let node = BACK.replace("fromCIDR: [192.0.2.0/24]", "fromEntities: [host]");
    assert_eq!(
        failures(&node, &packet("2001:db8::1", "back", 443)),
        [("entity", "2001:db8::1 is not of the entity host".to_owned())]
    );
    // A policy whose subject differs in one label.
    let other = format!(
        "{}---\n{}",
        BACK,
        BACK.replace("app: back", "app: bak")
            .replace("name: back", "name: bak")
            .replace("'80'", "'99'")
    );
    let misses = &answer(&other, &packet("front", "back", 99)).details[1].nearly;
    assert!(
        misses.iter().any(|near| near.failed.len() == 1
            && near.failed[0].requirement == "subject"
            && near.failed[0].text == "the policy selects endpoints with app=bak, and it is back"),
        "{misses:#?}"
    );
}

#[test]
fn near_misses_are_bounded_and_ordered() {
    let mut rules = String::from(&BACK[..BACK.find("  - fromCIDR").unwrap()]);
    for port in 1000..1100 {
        rules.push_str(&format!(
            "  - fromEndpoints: [{{matchLabels: {{app: front}}}}]\n    toPorts: [{{ports: [{{port: '{port}', protocol: TCP}}]}}]\n"
        ));
    }
    let nearly = &answer(&rules, &packet("front", "back", 81)).details[1].nearly;
    assert_eq!(nearly.len(), 5);
    assert!(nearly.is_sorted_by_key(|near| near.distance));
}

#[test]
fn a_deny_rule_is_named_and_nothing_is_added() {
    let denied = format!("{BACK}  ingressDeny:\n  - fromEndpoints: [{{matchLabels: {{app: db}}}}]\n");
    let answer = answer(&denied, &packet("db", "back", 80));
    assert_eq!(answer.addition, None);
    assert_eq!(
        answer.obstacles,
        [
            "ingress of shop/back: no added rule allows it, since a deny rule outweighs every allow; change or remove \
          policy shop/back ingressDeny rule 1 (p.yaml:14)"
        ]
    );
}

#[test]
fn both_directions_get_a_policy_each() {
    let policies = format!(
        "{BACK}---\napiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: front, namespace: shop}}\n\
         spec:\n  endpointSelector: {{matchLabels: {{app: front}}}}\n  egress: [{{}}]\n"
    );
    let answer = answer(&policies, &packet("front", "back", 81));
    let addition = answer.addition.unwrap();
    assert_eq!(addition.yaml.matches("kind: CiliumNetworkPolicy").count(), 2);
    assert!(addition.yaml.contains("toEndpoints"), "{}", addition.yaml);
}

#[test]
fn audit_mode_counts_as_denied() {
    let audited = BACK.replace(
        "namespace: shop}",
        "namespace: shop, annotations: {palisade.io/audit: 'true'}}",
    );
    let answer = answer(&audited, &packet("db", "back", 80));
    assert_eq!(answer.trace.verdict, Outcome::Audited);
    assert_eq!(answer.addition.unwrap().verdict, "ALLOWED");
}

#[test]
fn peers_without_labels_become_entities_and_addresses() {
    for (from, text) in [
        ("198.51.100.7", "fromCIDR:\n    - \"198.51.100.7/32\""),
        ("2001:db8::7", "fromCIDR:\n    - \"2001:db8::7/128\""),
        ("host", "fromEntities:\n    - host"),
        ("world-ipv6", "fromEntities:\n    - world-ipv6"),
        (
            "billing",
            "app: billing\n        \"k8s:io.kubernetes.pod.namespace\": money",
        ),
    ] {
        let answer = answer(BACK, &packet(from, "back", 22));
        let yaml = &answer
            .addition
            .as_ref()
            .unwrap_or_else(|| panic!("{answer}"))
            .yaml;
        assert!(yaml.contains(text), "{yaml}");
    }
}

#[test]
fn the_node_gets_a_cluster_wide_policy() {
    let node = "apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress: [{}]
";
    let answer = answer(node, &packet("198.51.100.7", "n1", 22));
    let yaml = answer.addition.unwrap().yaml;
    assert!(
        yaml.contains("kind: CiliumClusterwideNetworkPolicy") && yaml.contains("nodeSelector"),
        "{yaml}"
    );
}

#[test]
fn icmp_and_protocols_without_ports() {
    let icmp = |number: u8, port: u16, from: &str| {
        answer(
            BACK,
            &Question {
                protocol: number,
                ..packet(from, "back", port)
            },
        )
    };
    assert!(
        icmp(protocol::ICMP, 8, "db")
            .addition
            .unwrap()
            .yaml
            .contains("family: IPv4\n        type: 8")
    );
    assert!(icmp(protocol::ICMPV6, 128, "fd00::5").addition.is_some());
    assert!(
        icmp(112, 0, "db")
            .addition
            .unwrap()
            .yaml
            .contains("protocol: VRRP")
    );
    let gre = icmp(47, 0, "db");
    assert!(
        gre.addition.is_none() && gre.obstacles[0].contains("policies have no name for protocol 47"),
        "{gre}"
    );
}

const EGRESS: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: front, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: front}}
  egress:
  - toCIDR: [198.51.100.53/32]
    toPorts:
    - ports: [{port: '53', protocol: UDP}]
      rules: {dns: [{matchPattern: '*.example.com'}]}
  - toFQDNs: [{matchName: api.example.com}]
    toPorts:
    - ports: [{port: '443', protocol: TCP}]
  - toCIDR: [198.51.100.80/32]
    toPorts:
    - ports: [{port: '80', protocol: TCP}]
      rules:
        http: [{method: GET, path: '/public/.*', host: 'a\\.test', headers: ['X-Team: blue']}]
    - ports: [{port: '443', protocol: TCP}]
      serverNames: ['*.example.com']
    - ports: [{port: '9092', protocol: TCP}]
      rules: {kafka: [{apiKey: produce, topic: orders, clientID: shop}]}
";

fn http(method: &str, path: &str, host: &str, team: &str) -> Request {
    Request {
        http: Some(HttpRequest {
            method: method.into(),
            path: path.into(),
            host: host.into(),
            headers: vec![("x-team".into(), team.into())],
            ..HttpRequest::default()
        }),
        ..Request::default()
    }
}

fn with(port: u16, request: Request) -> Question {
    Question {
        request,
        ..packet("front", "198.51.100.80", port)
    }
}

#[test]
fn each_part_of_a_request_is_named() {
    let kinds = |question: &Question| -> Vec<&'static str> {
        failures(EGRESS, question)
            .into_iter()
            .map(|(kind, _)| kind)
            .collect()
    };
    assert_eq!(
        kinds(&with(80, http("PUT", "/public/x", "a.test", "blue"))),
        ["method"]
    );
    assert_eq!(
        kinds(&with(80, http("GET", "/secret", "a.test", "blue"))),
        ["path"]
    );
    assert_eq!(
        kinds(&with(80, http("GET", "/public/x", "b.test", "blue"))),
        ["host"]
    );
    assert_eq!(
        kinds(&with(80, http("GET", "/public/x", "a.test", "red"))),
        ["header"]
    );
    let hello = |name: &str| Request {
        tls: Some(name.into()),
        ..Request::default()
    };
    assert_eq!(kinds(&with(443, hello("other.test"))), ["server name"]);
    let kafka = |key: i16, topic: &str, client: &str| Request {
        kafka: Some(KafkaRequest {
            api_key: key,
            api_version: 8,
            client_id: Some(client.into()),
            topics: vec![topic.into()],
        }),
        ..Request::default()
    };
    assert_eq!(kinds(&with(9092, kafka(0, "bills", "shop"))), ["topic"]);
    assert_eq!(kinds(&with(9092, kafka(1, "orders", "shop"))), ["api key"]);
    assert_eq!(kinds(&with(9092, kafka(0, "orders", "other"))), ["client id"]);
    let query = Question {
        protocol: protocol::UDP,
        request: Request {
            dns: Some("evil.test".into()),
            ..Request::default()
        },
        ..packet("front", "198.51.100.53", 53)
    };
    assert_eq!(kinds(&query), ["query"]);
    let fqdn = Question {
        to_fqdn: Some("cdn.example.com".into()),
        ..packet("front", "203.0.113.9", 443)
    };
    assert_eq!(
        failures(EGRESS, &fqdn),
        [(
            "dns name",
            "api.example.com does not match cdn.example.com".to_owned()
        )]
    );
    assert!(
        answer(EGRESS, &fqdn)
            .addition
            .unwrap()
            .yaml
            .contains("- matchName: cdn.example.com")
    );
}

#[test]
fn an_allowed_request_has_only_its_own_rule() {
    for (question, text) in [
        (
            with(80, http("GET", "/a.b?c=1", "a.test", "red")),
            "http:\n        - method: GET\n          path: \"/a\\\\.b\\\\?c=1\"\n          host: \"a\\\\.test\"",
        ),
        (
            with(
                443,
                Request {
                    tls: Some("x.test".into()),
                    ..Request::default()
                },
            ),
            "serverNames:\n      - x.test",
        ),
        (
            with(
                9092,
                Request {
                    kafka: Some(KafkaRequest {
                        api_key: 1,
                        api_version: 8,
                        client_id: None,
                        topics: vec!["bills".into()],
                    }),
                    ..Request::default()
                },
            ),
            "kafka:\n        - apiKey: fetch\n          topic: bills",
        ),
        (
            Question {
                protocol: protocol::UDP,
                request: Request {
                    dns: Some("evil.test.".into()),
                    ..Request::default()
                },
                ..packet("front", "198.51.100.53", 53)
            },
            "dns:\n        - matchName: evil.test",
        ),
    ] {
        let answer = answer(EGRESS, &question);
        let yaml = &answer
            .addition
            .as_ref()
            .unwrap_or_else(|| panic!("{answer}"))
            .yaml;
        assert!(yaml.contains(text), "{yaml}");
        // Another request stays denied.
        let other = with(80, http("PUT", "/a.b?c=1", "a.test", "red"));
        assert!(!allowed_with(EGRESS, yaml, &other), "{yaml}");
    }
}

#[test]
fn requests_that_no_rule_can_allow_get_no_addition() {
    let nameless = answer(
        EGRESS,
        &with(
            443,
            Request {
                tls: Some(String::new()),
                ..Request::default()
            },
        ),
    );
    assert!(
        nameless.addition.is_none() && !nameless.obstacles.is_empty(),
        "{nameless}"
    );
    let inside = Request {
        tls: Some("a.example.com".into()),
        ..http("GET", "/", "a.example.com", "")
    };
    let inside = answer(EGRESS, &with(443, inside));
    assert!(
        inside.addition.is_none() && inside.obstacles[0].contains("terminatingTLS"),
        "{inside}"
    );
}

#[test]
fn attacker_text_does_not_break_out_of_the_yaml() {
    let evil = http("GET", "/x'\"\\\u{7f}#: [{}]", "a.test", "");
    let answer = answer(EGRESS, &with(80, evil));
    if let Some(addition) = &answer.addition {
        assert!(!parse("a.yaml", &addition.yaml).has_errors());
    }
}

#[derive(Clone, Debug)]
struct Case {
    rules: Vec<(bool, usize, usize, u16, bool)>,
    from: usize,
    to: usize,
    port: u16,
}

const ENDS: [&str; 7] = [
    "front",
    "canary",
    "back",
    "db",
    "billing",
    "198.51.100.7",
    "2001:db8::7",
];
const PORTS: [u16; 3] = [80, 81, 443];

fn case() -> impl Strategy<Value = Case> {
    let rule = (
        any::<bool>(),
        0..4usize,
        0..6usize,
        0..3usize,
        prop::bool::weighted(0.15),
    )
        .prop_map(|(egress, subject, peer, port, deny)| (egress, subject, peer, PORTS[port], deny));
    (
        prop::collection::vec(rule, 1..6),
        0..ENDS.len(),
        0..4usize,
        0..3usize,
    )
        .prop_map(|(rules, from, to, port)| Case {
            rules,
            from,
            to,
            port: PORTS[port],
        })
}

fn policies(case: &Case) -> String {
    let apps = ["front", "front", "back", "db"];
    let peers = [
        "Endpoints: [{matchLabels: {app: front}}]",
        "Endpoints: [{matchLabels: {track: canary}}]",
        "Endpoints: [{matchLabels: {app: db}}]",
        "Endpoints: [{matchLabels: {'k8s:io.kubernetes.pod.namespace': money}}]",
        "CIDR: [198.51.100.0/24]",
        "Entities: [cluster]",
    ];
    case.rules
        .iter()
        .enumerate()
        .map(|(number, (egress, subject, peer, port, deny))| {
            let (section, word) = if *egress { ("egress", "to") } else { ("ingress", "from") };
            let deny = if *deny { "Deny" } else { "" };
            format!(
                "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: p{number}, namespace: shop}}\n\
                 spec:\n  endpointSelector: {{matchLabels: {{app: {}}}}}\n  {section}{deny}:\n  - {word}{}\n    toPorts:\n\
                 \x20   - ports: [{{port: '{port}', protocol: TCP}}]\n",
                apps[*subject], peers[*peer]
            )
        })
        .collect::<Vec<_>>()
        .join("---\n")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn an_addition_allows_the_packet_and_nothing_else(case in case()) {
        let text = policies(&case);
        let question = packet(ENDS[case.from], ENDS[case.to], case.port);
        prop_assume!(case.from != case.to);
        let before = compiler(&text);
        let found = explain(&before, &question, &Inspectors::default()).unwrap();
        let outcome = |compiler: &Compiler, from: &str, to: &str, port: u16| {
            trace::trace(compiler, &packet(from, to, port), &Inspectors::default()).unwrap()
        };
        let Some(addition) = &found.addition else {
            let denied = found.trace.verdict == Outcome::Denied;
            prop_assert_eq!(denied, !found.obstacles.is_empty());
            for obstacle in &found.obstacles {
                prop_assert!(obstacle.contains("Deny rule"), "{}", obstacle);
            }
            return Ok(());
        };
        let after = compiler(&format!("{text}---\n{}", addition.yaml));
        prop_assert_eq!(outcome(&after, ENDS[case.from], ENDS[case.to], case.port).verdict, Outcome::Allowed);
        for from in ENDS.iter().chain(&["198.51.100.8", "2001:db8::8", "n1"]) {
            for to in ENDS.iter().chain(&["198.51.100.8", "n1"]) {
                for port in PORTS {
                    if (*from, *to, port) == (ENDS[case.from], ENDS[case.to], case.port) || from == to {
                        continue;
                    }
                    let (old, new) = (outcome(&before, from, to, port), outcome(&after, from, to, port));
                    for (old, new) in old.sides.iter().zip(&new.sides) {
                        prop_assert!(
                            old.verdict == new.verdict,
                            "{} -> {} {}: {:?} {:?}\n{}", from, to, port, old, new, addition.yaml
                        );
                    }
                }
            }
        }
    }
}
