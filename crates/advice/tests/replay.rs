//! Replays of recorded flows, and policies that are suggested for them.

use std::collections::BTreeMap;

use palisade_advice::{
    record::Recorded,
    replay::{Candidate, Effect, Replay, Report},
    suggest::Suggestion,
};
use palisade_inspect::Inspectors;
use palisade_policy::{compile::FileContent, parse::parse};
use proptest::prelude::*;
use serde_json::{Value, json};

/// A recorded flow in JSON.
#[derive(Clone, Debug)]
struct Line {
    verdict: &'static str,
    egress: bool,
    from: (&'static str, Vec<String>),
    to: (&'static str, Vec<String>),
    names: Vec<&'static str>,
    l4: Value,
    l7: Value,
    sni: Option<&'static str>,
}

fn workload(app: &str) -> Vec<String> {
    vec![
        format!("k8s:app={app}"),
        "k8s:io.kubernetes.pod.namespace=shop".into(),
        "k8s:pod-template-hash=5d8f".into(),
    ]
}

fn world(v6: bool) -> Vec<String> {
    vec![
        if v6 {
            "reserved:world-ipv6"
        } else {
            "reserved:world-ipv4"
        }
        .into(),
    ]
}

fn line(egress: bool, from: &str, to: &str, port: u16) -> Line {
    let end = |app: &str, address: [&'static str; 2]| (address[0], workload(app));
    Line {
        verdict: "FORWARDED",
        egress,
        from: end(from, ["10.0.0.2", ""]),
        to: end(to, ["10.0.0.3", ""]),
        names: Vec::new(),
        l4: json!({"TCP": {"destination_port": port}}),
        l7: Value::Null,
        sni: None,
    }
}

impl Line {
    fn json(&self) -> String {
        let end = |(_, labels): &(&str, Vec<String>)| json!({"labels": labels, "namespace": "shop"});
        let mut flow = json!({
            "verdict": self.verdict,
            "IP": {"source": self.from.0, "destination": self.to.0},
            "l4": self.l4,
            "source": end(&self.from),
            "destination": end(&self.to),
            "destination_names": self.names,
            "traffic_direction": if self.egress { "EGRESS" } else { "INGRESS" },
            "is_reply": false,
        });
        if self.verdict == "DROPPED" {
            flow["drop_reason"] = json!(133);
        }
        if !self.l7.is_null() {
            flow["l7"] = json!({"type": "REQUEST"});
            for (key, value) in self.l7.as_object().into_iter().flatten() {
                flow["l7"][key] = value.clone();
            }
        }
        if let Some(name) = self.sni {
            flow["palisade"] = json!({"tls": {"server_name": name}});
        }
        flow.to_string()
    }

    fn recorded(&self) -> Recorded {
        Recorded::parse(&self.json()).unwrap().unwrap()
    }

    fn http(mut self, method: &str, url: &str) -> Self {
        self.l7 = json!({"http": {"method": method, "url": url}});
        self
    }
}

fn content(policies: &str) -> BTreeMap<String, Option<FileContent>> {
    let parsed = parse("p.yaml", policies);
    assert!(!parsed.has_errors(), "{:?}\n{policies}", parsed.diagnostics);
    let content = FileContent {
        policies: parsed.policies,
        cidr_groups: parsed.cidr_groups,
    };
    BTreeMap::from([("p.yaml".to_owned(), Some(content))])
}

fn replay(policies: &str, flows: &[Line]) -> Report {
    let inspectors = Inspectors::default();
    let candidate = Candidate {
        files: content(policies),
        ..Candidate::default()
    };
    let mut replay = Replay::new(candidate, &inspectors);
    for flow in flows {
        replay.push(&flow.recorded()).unwrap();
    }
    replay.finish().unwrap()
}

const POLICY: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: back, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: '80', protocol: TCP}]
      rules: {http: [{method: GET}]}
    - ports: [{port: '81', protocol: TCP}]
";

#[test]
fn a_replay_shows_what_would_change_and_by_which_rule() {
    let mut dropped = line(false, "front", "back", 81);
    dropped.verdict = "DROPPED";
    let flows = [
        line(false, "front", "back", 80),
        line(false, "front", "back", 80).http("GET", "http://a/x"),
        line(false, "front", "back", 80).http("PUT", "http://a/x"),
        line(false, "db", "back", 81),
        line(false, "db", "back", 81),
        dropped,
        line(true, "front", "back", 80),
    ];
    let report = replay(POLICY, &flows);
    assert_eq!(
        (report.flows, report.evaluated, report.unchanged, report.changed),
        (7, 7, 3, 4)
    );
    assert_eq!(report.inspected, 1);
    let seen: Vec<_> = report
        .changes
        .iter()
        .map(|change| {
            (
                change.now,
                change.then,
                change.flows,
                change.port.as_str(),
                change.then_by.as_str(),
            )
        })
        .collect();
    let default_deny = "default deny of ingress by policy shop/back (p.yaml:1)";
    let rule = "policy shop/back ingress rule 1 (p.yaml:7)";
    assert!(
        seen.contains(&(Effect::Allowed, Effect::Denied, 2, "81/TCP", default_deny)),
        "{seen:?}"
    );
    assert!(
        seen.contains(&(Effect::Allowed, Effect::Denied, 1, "80/TCP", rule)),
        "{seen:?}"
    );
    assert!(
        seen.contains(&(Effect::Denied, Effect::Allowed, 1, "81/TCP", rule)),
        "{seen:?}"
    );
    let put = report
        .changes
        .iter()
        .find(|change| !change.requests.is_empty())
        .unwrap();
    assert_eq!(put.requests, ["PUT a/x"]);
    assert_eq!(
        (put.endpoint.as_str(), put.peer.as_str()),
        (
            "app=back,io.kubernetes.pod.namespace=shop",
            "app=front,io.kubernetes.pod.namespace=shop"
        )
    );
}

#[test]
fn learned_names_and_addresses_select_as_in_the_daemon() {
    let policy = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: front, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: front}}
  egress:
  - toFQDNs: [{matchPattern: '*.example.com'}]
    toPorts: [{ports: [{port: '443', protocol: TCP}]}]
  - toCIDR: ['2001:db8::/32']
    toPorts: [{ports: [{port: '443', protocol: TCP}]}]
  - toEntities: [host]
";
    let to = |address: &'static str, names: Vec<&'static str>, v6: bool| Line {
        to: (address, world(v6)),
        from: (if v6 { "fd00::2" } else { "10.0.0.2" }, workload("front")),
        names,
        ..line(true, "front", "back", 443)
    };
    let mut host = line(true, "front", "back", 22);
    host.to.1 = vec!["reserved:host".into()];
    let report = replay(
        policy,
        &[
            to("203.0.113.7", vec!["api.example.com"], false),
            to("203.0.113.8", vec!["other.test", "cdn.example.com"], false),
            to("2001:db8::7", vec![], true),
            host,
        ],
    );
    assert_eq!((report.unchanged, report.changed), (4, 0), "{report:#?}");
    let report = replay(
        policy,
        &[
            to("203.0.113.7", vec!["other.test"], false),
            to("2001:db9::7", vec![], true),
        ],
    );
    assert_eq!(report.changed, 2);
    assert!(
        report.changes.iter().any(|change| change.peer == "other.test"),
        "{report:#?}"
    );
}

#[test]
fn a_trace_changes_only_if_the_packet_would_be_denied() {
    let audited = POLICY.replace(
        "namespace: shop}",
        "namespace: shop, annotations: {palisade.io/audit: 'true'}}",
    );
    let flow = line(false, "db", "back", 81);
    assert_eq!(replay(&audited, std::slice::from_ref(&flow)).changed, 1);
    let mut trace: Value = serde_json::from_str(&flow.json()).unwrap();
    trace["event_type"] = json!({"type": 4});
    let trace = Recorded::parse(&trace.to_string()).unwrap().unwrap();
    let inspectors = Inspectors::default();
    for (policy, changed) in [(audited.as_str(), 0), (POLICY, 1)] {
        let candidate = Candidate {
            files: content(policy),
            ..Candidate::default()
        };
        let mut replay = Replay::new(candidate, &inspectors);
        replay.push(&trace).unwrap();
        assert_eq!(replay.finish().unwrap().changed, changed, "{policy}");
    }
}

#[test]
fn records_without_a_policy_decision_are_counted_apart() {
    let mut reply: Value = serde_json::from_str(&line(true, "front", "back", 80).json()).unwrap();
    reply["is_reply"] = json!(true);
    let inspectors = Inspectors::default();
    let mut replay = Replay::new(Candidate::default(), &inspectors);
    replay
        .push(&Recorded::parse(&reply.to_string()).unwrap().unwrap())
        .unwrap();
    let report = replay.finish().unwrap();
    assert_eq!((report.flows, report.evaluated), (1, 0));
    assert_eq!(report.skipped["replies, which conntrack passes"], 1);
}

#[test]
fn more_groups_than_a_batch_are_all_evaluated() {
    let inspectors = Inspectors::default();
    let candidate = Candidate {
        files: content(POLICY),
        ..Candidate::default()
    };
    let mut replay = Replay::new(candidate, &inspectors);
    let mut flow = line(false, "front", "back", 80)
        .http("PUT", "http://a/x")
        .recorded();
    const FLOWS: u64 = 40_000;
    for number in 0..FLOWS {
        flow.request.http.as_mut().unwrap().path = format!("/{number}");
        replay.push(&flow).unwrap();
    }
    let report = replay.finish().unwrap();
    assert_eq!(
        (report.evaluated, report.changed, report.changes.len()),
        (FLOWS, FLOWS, 1)
    );
    assert_eq!(report.changes[0].requests.len(), 3);
}

/// Returns the suggested policies, after checking that they allow every flow.
fn suggest(flows: &[Line]) -> String {
    suggest_with(flows, false)
}

fn suggest_with(flows: &[Line], with_dropped: bool) -> String {
    let inspectors = Inspectors::default();
    let mut suggestion = Suggestion::new(with_dropped);
    for flow in flows {
        suggestion.push(&flow.recorded());
    }
    for _ in 0..8 {
        let mut check = suggestion.replay(&inspectors).unwrap();
        for flow in flows {
            check.push(&suggestion, &flow.recorded()).unwrap();
        }
        if suggestion.widen(check).unwrap() == 0 {
            return suggestion.policies();
        }
    }
    panic!("not all flows are allowed:\n{}", suggestion.policies());
}

#[test]
fn policies_are_grouped_by_labels_ports_and_requests() {
    let mut flows = vec![
        line(false, "front", "back", 80),
        line(false, "front", "back", 80).http("GET", "http://back/items/17?q=secret"),
        line(false, "front", "back", 80).http("GET", "http://back/items/99"),
        line(false, "front", "back", 80).http("PUT", "http://back/u/0b6e1f3c-1111-2222-3333-444455556666"),
        line(false, "front", "back", 9090),
    ];
    flows[4].from.1[2] = "k8s:pod-template-hash=other".into();
    assert_eq!(
        suggest(&flows),
        "# 5 recorded flows
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: back
  namespace: shop
spec:
  endpointSelector:
    matchLabels:
      app: back
  ingress:
  # 5 flows, of them 3 requests
  - fromEndpoints:
    - matchLabels:
        app: front
    toPorts:
    - ports:
      - port: \"9090\"
        protocol: TCP
    - ports:
      - port: \"80\"
        protocol: TCP
      rules:
        http:
        - method: GET
          path: \"/items/[0-9]+([?].*)?\"
        - method: PUT
          path: \"/u/[0-9a-fA-F-]{36}\"
"
    );
}

fn candidate(policies: &str) -> Candidate {
    let parsed = parse("p.yaml", policies);
    assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
    let content = FileContent {
        policies: parsed.policies,
        cidr_groups: parsed.cidr_groups,
    };
    Candidate {
        files: BTreeMap::from([("p.yaml".to_owned(), Some(content))]),
        ..Candidate::default()
    }
}

/// A hello and requests inside TLS of one connection, as the proxy reports them.
fn intercepted() -> [Line; 4] {
    let mut hello = line(false, "front", "back", 443);
    hello.l7 = json!({});
    hello.sni = Some("back.example");
    [
        line(false, "front", "back", 443),
        hello,
        line(false, "front", "back", 443).http("GET", "https://back.example/items/1"),
        line(false, "front", "back", 443).http("POST", "https://back.example/items"),
    ]
}

#[test]
fn requests_inside_tls_get_rules_whose_secrets_have_to_be_named() {
    let yaml = suggest(&intercepted());
    for part in [
        "# 4 flows, of them 3 requests, of them 2 requests inside TLS: replace the names of the secrets",
        "      terminatingTLS:
        secret:
          namespace: tls-secrets
          name: replace-certificate
      originatingTLS:
        secret:
          namespace: tls-secrets
          name: replace-ca
      rules:
        http:
        - method: GET
          path: \"/items/[0-9]+\"
        - method: POST
          path: \"/items\"
",
    ] {
        assert!(yaml.contains(part), "{part}\n{yaml}");
    }
    assert!(!yaml.contains("serverNames"), "{yaml}");
    // The policies deny what was not recorded.
    let denied = line(false, "front", "back", 443).http("GET", "https://back.example/admin");
    let inspectors = Inspectors::default();
    let mut replay = Replay::new(candidate(&yaml), &inspectors);
    replay.push(&denied.recorded()).unwrap();
    assert_eq!(replay.finish().unwrap().changes[0].then, Effect::Denied);
}

#[test]
fn secrets_are_those_of_the_policies_that_intercept_now() {
    let policy = |port: u16, secret: &str| {
        format!(
            "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: back-{port}, namespace: shop}}
spec:
  endpointSelector: {{matchLabels: {{app: back}}}}
  ingress:
  - fromEntities: [all]
    toPorts:
    - ports: [{{port: \"{port}\", protocol: TCP}}]
      terminatingTLS: {{secret: {{namespace: infra, name: {secret}}}, certificate: chain.pem}}
      rules: {{http: [{{path: /.*}}]}}
"
        )
    };
    let suggest = |policies: &str| {
        let inspectors = Inspectors::default();
        let mut suggestion = Suggestion::new(false).with_secrets_of(&candidate(policies).files);
        for flow in intercepted() {
            suggestion.push(&flow.recorded());
        }
        let mut check = suggestion.replay(&inspectors).unwrap();
        for flow in intercepted() {
            check.push(&suggestion, &flow.recorded()).unwrap();
        }
        assert_eq!(suggestion.widen(check).unwrap(), 0, "{}", suggestion.policies());
        suggestion.policies()
    };
    let of = |secret: &str| {
        format!(
            "      terminatingTLS:
        secret:
          namespace: infra
          name: {secret}
        certificate: chain.pem
      rules:
"
        )
    };
    let two = [policy(443, "front"), policy(8443, "other")].join("---\n");
    for (policies, secret) in [
        (policy(443, "front"), "front"),
        // The only secret of the policies.
        (policy(8443, "other"), "other"),
        (two, "front"),
    ] {
        let yaml = suggest(&policies);
        assert!(yaml.contains(&of(secret)), "{yaml}");
        assert!(!yaml.contains("replace"), "{yaml}");
    }
    // Several secrets, none of this port.
    let yaml = suggest(&[policy(444, "front"), policy(8443, "other")].join("---\n"));
    assert!(yaml.contains("name: replace-certificate"), "{yaml}");
}

#[test]
fn requests_inside_tls_and_in_plain_text_at_one_port_get_no_rules() {
    let mut flows = intercepted().to_vec();
    flows.push(line(false, "front", "back", 443).http("GET", "http://back.example/items"));
    let yaml = suggest(&flows);
    assert!(
        yaml.contains("; without rules for 2 requests inside TLS"),
        "{yaml}"
    );
    assert!(
        !yaml.contains("http:") && !yaml.contains("terminatingTLS"),
        "{yaml}"
    );
}

#[test]
fn names_queries_entities_and_addresses() {
    let to = |address: &'static str, labels: Vec<String>, names: Vec<&'static str>, port: u16| Line {
        to: (address, labels),
        names,
        ..line(true, "front", "x", port)
    };
    let mut query = to("10.0.0.53", workload("dns"), vec![], 53);
    query.l4 = json!({"UDP": {"destination_port": 53}});
    query.l7 = json!({"dns": {"query": "api.example.com."}});
    let mut ping = to("203.0.113.9", world(false), vec![], 0);
    ping.l4 = json!({"ICMPv4": {"type": 8}});
    let mut hello = to("203.0.113.10", world(false), vec![], 443);
    hello.l7 = json!({});
    hello.sni = Some("Cdn.Example.com");
    let yaml = suggest(&[
        query,
        to("203.0.113.7", world(false), vec!["api.example.com"], 443),
        to("203.0.113.8", world(false), vec![], 25),
        to("10.0.0.1", vec!["reserved:host".into()], vec![], 22),
        to(
            "192.0.2.1",
            vec!["reserved:remote-node".into(), "k8s:zone=b".into()],
            vec![],
            4240,
        ),
        ping,
        hello,
    ]);
    for part in [
        "  - toFQDNs:\n    - matchName: api.example.com",
        "        dns:\n        - matchName: api.example.com",
        "  - toCIDR:\n    - \"203.0.113.8/32\"",
        "  - toEntities:\n    - host",
        "  - toEntities:\n    - remote-node",
        "    icmps:\n    - fields:\n      - family: IPv4\n        type: 8",
        "      serverNames:\n      - cdn.example.com",
    ] {
        assert!(yaml.contains(part), "{part}\n{yaml}");
    }
}

#[test]
fn names_need_queries() {
    let mut flow = line(true, "front", "x", 443);
    flow.to = ("203.0.113.7", world(false));
    flow.names = vec!["api.example.com"];
    let mut dns = line(true, "front", "dns", 53);
    dns.l4 = json!({"UDP": {"destination_port": 53}});
    let yaml = suggest(&[flow.clone()]);
    assert!(yaml.contains("# toFQDNs needs a rule with rules.dns"), "{yaml}");
    let yaml = suggest(&[flow, dns]);
    assert!(yaml.contains("dns:\n        - matchPattern: \"*\""), "{yaml}");
}

#[test]
fn only_what_passed_counts() {
    let mut dropped = line(false, "db", "back", 80);
    dropped.verdict = "DROPPED";
    let mut audited = line(false, "audited", "back", 80);
    audited.verdict = "AUDIT";
    let flows = [dropped, audited];
    let yaml = suggest(&flows);
    assert!(
        yaml.contains("app: audited") && !yaml.contains("app: db"),
        "{yaml}"
    );
    assert!(suggest_with(&flows, true).contains("app: db"));
}

#[test]
fn a_direction_that_was_only_denied_is_named_and_not_allowed() {
    let dropped = |egress, from: &str, to: &str, port| Line {
        verdict: "DROPPED",
        ..line(egress, from, to, port)
    };
    let evil = dropped(false, "db", "back", 80).http("GET", "http://a/x'\"}]: #\\u{0}\n- kind: Evil");
    let flows = [
        dropped(false, "db", "back", 80),
        evil,
        dropped(true, "front", "back", 80),
        line(false, "front", "shop", 81),
        dropped(false, "db", "shop", 81),
    ];
    let yaml = suggest(&flows);
    let (head, policies) = yaml.split_at(yaml.find("# 1 recorded flow\n").expect("a policy"));
    assert!(head.lines().all(|line| line.starts_with('#')), "{head}");
    assert!(
        head.contains("# ingress of app=back in namespace shop: all 2 recorded flows were denied"),
        "{head}"
    );
    assert!(
        head.contains("# egress of app=front in namespace shop: the only recorded flow was denied"),
        "{head}"
    );
    assert!(
        head.contains("#   - fromEndpoints:\n#     - matchLabels:\n#         app: db\n"),
        "{head}"
    );
    // Of a direction with allowed flows the rules say what was needed.
    assert!(!head.contains("app=shop") && !policies.contains("db"), "{yaml}");
    // Without any rule there are only comments, which are no policy.
    let yaml = suggest(&flows[..3]);
    assert!(
        yaml.lines().all(|line| line.starts_with('#')) && !yaml.is_empty(),
        "{yaml}"
    );
    assert_eq!(Suggestion::new(true).denied(), []);
    assert!(!suggest_with(&flows, true).contains("denied"));
    // A denied direction without any allowed flow has a bounded comment.
    let many: Vec<Line> = (0..2_000)
        .map(|n| dropped(false, &format!("peer-{n}"), "back", 80))
        .collect();
    let yaml = suggest(&many);
    assert!(
        yaml.contains("more rules") && yaml.lines().count() < 300,
        "{yaml}"
    );
}

#[test]
fn text_of_a_peer_cannot_break_out() {
    let evil = line(false, "front", "back", 80).http("GET", "http://a/x'\"}]: #\\u{0}\n- kind: Evil");
    let yaml = suggest(&[evil]);
    assert_eq!(yaml.matches("\nkind:").count(), 1, "{yaml}");
    let mut label = line(false, "front", "back", 80);
    label.from.1.push("k8s:a\n- b: {=x\ny".into());
    // A flow with a label that no policy can have gets no rule, and does not make the others invalid.
    let mut suggestion = Suggestion::default();
    suggestion.push(&label.recorded());
    suggestion.push(&line(false, "front", "back", 80).recorded());
    assert_eq!(
        suggestion.counts().skipped["flows with labels that no policy can select"],
        1
    );
    assert!(suggestion.replay(&Inspectors::default()).is_ok());
    assert_eq!(suggestion.counts().flows, 1);
}

#[test]
fn requests_that_no_rule_can_express_do_not_spoil_the_proposal() {
    let kafka = |topic: &str, port: u16| {
        let mut flow = line(false, "front", "back", port);
        flow.l7 = json!({"kafka": {"api_key": "fetch", "api_version": 8, "topic": topic}});
        flow
    };
    let query = |name: &str| {
        let mut flow = line(true, "front", "dns", 53);
        flow.l7 = json!({"dns": {"query": name}});
        flow
    };
    let long = format!("http://a/{}", "x/".repeat(5_000));
    let yaml = suggest(&[
        kafka("a b\u{1}}", 9092),
        kafka("orders", 9093),
        query("-_-."),
        query(&"a.".repeat(200)),
        line(false, "front", "back", 80).http("GET", &long),
        line(false, "front", "back", 81).http("G*T)(", "http://a/(((["),
        line(false, "front", "back", 82).http("GET", "http://a/%zz"),
    ]);
    assert!(yaml.contains("topic: orders") && yaml.len() < 4_000, "{yaml}");
}

#[test]
fn many_names_are_generalised() {
    let mut flows = Vec::new();
    for number in 0..300 {
        let name = Box::leak(format!("h{number}.example.com").into_boxed_str());
        flows.push(Line {
            to: ("203.0.113.7", world(false)),
            names: vec![name],
            ..line(true, "front", "x", 443)
        });
    }
    let yaml = suggest(&flows);
    assert!(
        yaml.contains("matchPattern: \"*.example.com\"") && yaml.lines().count() < 150,
        "{yaml}"
    );
}

#[test]
fn rules_are_bounded() {
    let mut flows = Vec::new();
    for number in 0..400 {
        flows.push(
            line(false, "front", "back", 80)
                .http("GET", &format!("http://a/v1/name{number}x/part{number}y/z")),
        );
        let mut query = line(true, "front", "dns", 53);
        query.l4 = json!({"UDP": {"destination_port": 53}});
        query.l7 = json!({"dns": {"query": format!("host{number}.example.com.")}});
        flows.push(query);
        flows.push(Line {
            from: (
                Box::leak(format!("203.0.113.{}", number % 250).into_boxed_str()),
                world(false),
            ),
            ..line(false, "x", "web", 1000 + number)
        });
    }
    let yaml = suggest(&flows);
    assert!(yaml.lines().count() < 200, "{yaml}");
    for part in [
        "path: \"/v1/.*\"",
        "matchPattern: \"*.example.com\"",
        "- world-ipv4",
    ] {
        assert!(yaml.contains(part), "{part}\n{yaml}");
    }
}

fn flow() -> impl Strategy<Value = Line> {
    let app = prop::sample::select(vec!["front", "back", "db"]);
    let request = prop::option::of(prop_oneof![
        ("GET|PUT|DELETE", "(/[a-z0-9.%-]{0,6}){1,4}([?][a-z=&]{0,5})?").prop_map(|(method, path)| (
            json!({"http": {"method": method, "url": format!("http://a.test{path}")}}),
            None
        )),
        "[a-z_-]{1,5}(\\.[a-z]{1,3}){0,2}"
            .prop_map(|name| (json!({"dns": {"query": format!("{name}.")}}), None)),
        prop::sample::select(vec!["a.test", "b.a.test", "", "192.0.2.1"])
            .prop_map(|name| (json!({}), Some(name))),
        prop::sample::select(vec!["orders", "bills"]).prop_map(|topic| (
            json!({"kafka": {"api_key": "fetch", "api_version": 8, "topic": topic}}),
            None
        )),
    ]);
    (
        any::<bool>(),
        app.clone(),
        app,
        0..4u8,
        prop::sample::select(vec![53u16, 80, 443]),
        0..5u8,
        request,
        prop::sample::select(vec!["FORWARDED", "AUDIT", "DROPPED"]),
    )
        .prop_map(|(egress, from, to, world_end, port, l4, request, verdict)| {
            let mut flow = Line {
                verdict,
                ..line(egress, from, to, port)
            };
            let (address, v6) = match world_end {
                0 => ("203.0.113.7", false),
                1 => ("2001:db8::7", true),
                _ => ("", false),
            };
            if !address.is_empty() {
                if egress {
                    flow.to = (address, world(v6));
                    flow.names = vec!["n.example.com"];
                } else {
                    flow.from = (address, world(v6));
                }
            }
            flow.l4 = match l4 {
                0 => json!({"UDP": {"destination_port": port}}),
                1 => json!({"ICMPv4": {"type": 8}}),
                _ => json!({"TCP": {"destination_port": port}}),
            };
            if let Some((l7, sni)) = request
                && l4 > 1
            {
                flow.l7 = l7;
                flow.sni = sni;
            }
            flow
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn suggested_policies_allow_every_flow(flows in prop::collection::vec(flow(), 1..24), with_dropped in any::<bool>()) {
        let yaml = suggest_with(&flows, with_dropped);
        if yaml.is_empty() {
            return Ok(());
        }
        let report = replay(&yaml, &flows);
        for change in &report.changes {
            let counted = change.now != Effect::Denied || with_dropped;
            prop_assert!(!counted || change.then != Effect::Denied, "{:?}\n{}", change, yaml);
        }
    }
}
