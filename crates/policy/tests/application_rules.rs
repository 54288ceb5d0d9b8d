//! Application rules of several policies: which are merged, which protocol is inspected, and what audit mode reports.

use std::collections::BTreeMap;

use palisade_abi::{Decision, Direction, Inspector, PolicyEntry, endpoint_flags, entry_flags, identity};
use palisade_model::{
    inventory::{Endpoint, Inventory, Options},
    labels::{Labels, parse_label},
    request::{HttpRequest, Request},
    snapshot::{Matcher, RuleKey, RuleSet},
};
use palisade_policy::{
    compile::{Changes, Compiler, CompilerState, FileContent},
    l7::passing,
    parse::parse,
};

fn endpoint(id: u16, app: &str) -> Endpoint {
    let labels = [
        format!("k8s:app={app}"),
        "k8s:io.kubernetes.pod.namespace=default".into(),
    ];
    Endpoint {
        id,
        name: app.into(),
        namespace: "default".into(),
        labels: Labels::new(labels.iter().map(|text| parse_label(text))),
        named_ports: BTreeMap::new(),
        addresses: vec![format!("10.0.0.{id}").parse().unwrap()],
        audit: false,
    }
}

/// Returns a policy for the web server. A name that ends with `!` is in audit mode.
fn policy(name: &str, spec: &str) -> FileContent {
    let (name, audit) = match name.strip_suffix('!') {
        Some(name) => (name, "\n  annotations: {palisade.io/audit: 'true'}"),
        None => (name, ""),
    };
    let text = format!(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata:\n  name: {name}{audit}\nspec:\n  \
         endpointSelector: {{matchLabels: {{app: web}}}}\n{spec}\n"
    );
    let parsed = parse(name, &text);
    assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
    FileContent {
        policies: parsed.policies,
        cidr_groups: parsed.cidr_groups,
    }
}

fn inventory() -> Inventory {
    Inventory {
        endpoints: vec![endpoint(1, "web"), endpoint(2, "front"), endpoint(3, "back")],
        ..Inventory::default()
    }
}

/// A compiler with the policies of a test.
struct Compiled(Compiler);

fn compile(inventory: Inventory, policies: &[(&str, &str)]) -> Result<Compiled, Vec<String>> {
    let mut compiler = Compiler::new(&CompilerState::default());
    let files = policies
        .iter()
        .map(|(name, spec)| ((*name).to_owned(), Some(policy(name, spec))))
        .collect();
    let changes = Changes {
        inventory: Some(inventory),
        files,
    };
    match compiler.update(changes) {
        Ok(_) => Ok(Compiled(compiler)),
        Err(errors) => Err(errors.iter().map(|error| error.message.clone()).collect()),
    }
}

fn compiled(policies: &[(&str, &str)]) -> Compiled {
    compile(inventory(), policies).unwrap_or_else(|errors| panic!("{errors:?}"))
}

impl Compiled {
    /// Compiles again with other options.
    fn set_options(&mut self, set: impl FnOnce(&mut Options)) {
        let mut inventory = self.0.inventory().clone();
        set(&mut inventory.options);
        let changes = Changes {
            inventory: Some(inventory),
            files: BTreeMap::new(),
        };
        self.0.update(changes).unwrap();
    }

    /// Returns the entry for `app` and TCP port 80 of the web server.
    fn entry(&self, app: &str) -> PolicyEntry {
        let snapshot = self.0.snapshot();
        let address = inventory()
            .endpoints
            .iter()
            .find_map(|endpoint| (endpoint.name == app).then(|| endpoint.addresses[0]));
        let other = snapshot.identity_of(address.unwrap()).identity;
        snapshot
            .policy_entry(1, Direction::Ingress, other, 6, Some(80))
            .unwrap()
    }

    fn rules(&self, app: &str) -> &RuleSet {
        let entry = self.entry(app);
        assert_eq!(entry.decision, Decision::Inspect as u8, "{entry:?}");
        &self.0.snapshot().rulesets[&entry.ruleset]
    }

    fn policy_of(&self, rule: u32) -> &str {
        match &self.0.snapshot().rules[&rule].key {
            RuleKey::Rule(place) => place.policy.strip_prefix("default/").unwrap(),
            RuleKey::DefaultAllow { .. } => "(default allow)",
            other => panic!("{other:?}"),
        }
    }

    /// Returns the policy that allows a request of `app`.
    fn allowing_policy(&self, app: &str, path: &str) -> Option<&str> {
        let request = Request {
            http: Some(HttpRequest {
                method: "GET".into(),
                path: path.into(),
                host: "web".into(),
                ..HttpRequest::default()
            }),
            ..Request::default()
        };
        passing(self.rules(app), &request).map(|alternative| self.policy_of(alternative.rule))
    }

    /// Returns the policy that allows a connection to a server name.
    fn connects(&self, app: &str, name: &str) -> Option<&str> {
        let request = Request {
            tls: Some(name.into()),
            ..Request::default()
        };
        passing(self.rules(app), &request).map(|alternative| self.policy_of(alternative.rule))
    }

    fn is_read_as(&self, app: &str, inspector: Inspector) -> bool {
        self.rules(app).reads == inspector as u8 && self.entry(app).inspector == inspector as u8
    }

    fn is_audited(&self, app: &str) -> bool {
        self.entry(app).flags & entry_flags::AUDIT != 0
    }
}

fn http(peer: &str, path: &str) -> String {
    format!(
        "  ingress:\n  - {peer}\n    toPorts:\n    - ports: [{{port: '80', protocol: TCP}}]\n      \
         rules: {{http: [{{path: '{path}'}}]}}"
    )
}

fn names(peer: &str, names: &str) -> String {
    format!(
        "  ingress:\n  - {peer}\n    toPorts:\n    - ports: [{{port: '80', protocol: TCP}}]\n      \
         serverNames: [{names}]"
    )
}

const FRONT: &str = "fromEndpoints: [{matchLabels: {app: front}}]";
const ALL: &str = "fromEntities: [all]";
const PLAIN_80: &str = "toPorts: [{ports: [{port: '80', protocol: TCP}]}]";

#[test]
fn application_rules_of_several_policies_are_merged() {
    let all = compiled(&[
        ("a", &http(FRONT, "/a.*")),
        ("b", &http(FRONT, "/b.*")),
        ("c", &http(ALL, "/c.*")),
    ]);
    assert!(all.is_read_as("front", Inspector::Http) && all.is_read_as("back", Inspector::Http));
    assert_eq!(all.allowing_policy("front", "/a1"), Some("a"));
    assert_eq!(all.allowing_policy("front", "/b1"), Some("b"));
    assert_eq!(all.allowing_policy("front", "/c1"), Some("c"));
    assert_eq!(all.allowing_policy("front", "/d"), None);
    assert_eq!(all.allowing_policy("back", "/a1"), None);
    assert_eq!(all.allowing_policy("back", "/c1"), Some("c"));
}

#[test]
fn a_plain_allow_for_the_same_peer_and_port_allows_every_inspected_request() {
    let plain = format!("  ingress:\n  - {FRONT}\n    {PLAIN_80}");
    let all = compiled(&[("a", &http(FRONT, "/a.*")), ("plain", &plain)]);
    assert!(all.is_read_as("front", Inspector::Http));
    assert_eq!(all.allowing_policy("front", "/a"), Some("a"));
    assert_eq!(all.allowing_policy("front", "/x"), Some("plain"));
    assert!(!all.is_audited("front"));
    assert_eq!(all.entry("back").decision, Decision::Deny as u8);
}

#[test]
fn a_broader_allow_allows_requests_that_no_rule_of_the_port_allows() {
    for (name, broad) in [
        ("every port", format!("  ingress:\n  - {FRONT}")),
        ("every peer", format!("  ingress:\n  - {PLAIN_80}")),
        ("everything", format!("  ingress:\n  - {ALL}")),
        (
            "a range",
            format!(
                "  ingress:\n  - {FRONT}\n    toPorts: [{{ports: [{{port: '1', endPort: 100, protocol: TCP}}]}}]"
            ),
        ),
        (
            "every protocol",
            format!("  ingress:\n  - {FRONT}\n    toPorts: [{{ports: [{{port: '80', protocol: ANY}}]}}]"),
        ),
    ] {
        let all = compiled(&[("a", &http(FRONT, "/a.*")), ("broad", &broad)]);
        assert!(all.is_read_as("front", Inspector::Http), "{name}");
        assert_eq!(all.allowing_policy("front", "/a"), Some("a"), "{name}");
        assert_eq!(all.allowing_policy("front", "/x"), Some("broad"), "{name}");
    }
    // The same with the roles exchanged: application rules for any peer apply to a peer that a plain rule allows.
    let plain = format!("  ingress:\n  - {FRONT}\n    {PLAIN_80}");
    let all = compiled(&[("a", &http(ALL, "/a.*")), ("plain", &plain)]);
    assert!(all.is_read_as("front", Inspector::Http));
    assert_eq!(all.allowing_policy("front", "/x"), Some("plain"));
    assert_eq!(all.allowing_policy("back", "/x"), None);
}

#[test]
fn a_deny_wins_over_application_rules() {
    let deny = format!("  ingressDeny:\n  - {FRONT}");
    let all = compiled(&[
        ("a", &http(FRONT, "/a.*")),
        ("deny", &deny),
        ("b", &http(ALL, "/b.*")),
    ]);
    let entry = all.entry("front");
    assert_eq!(entry.decision, Decision::DenyExplicit as u8);
    assert_eq!(all.policy_of(entry.rule), "deny");
    assert_eq!(all.allowing_policy("back", "/b"), Some("b"));
}

#[test]
fn of_several_protocols_only_the_first_is_inspected() {
    let all = compiled(&[("a", &names(ALL, "a.test")), ("b", &http(FRONT, "/b.*"))]);
    assert!(all.is_read_as("front", Inspector::Http) && all.is_read_as("back", Inspector::Tls));
    assert_eq!(all.allowing_policy("front", "/b"), Some("b"));
    assert_eq!(all.allowing_policy("front", "/x"), None);
    assert_eq!(all.connects("back", "a.test"), Some("a"));
    assert_eq!(all.connects("front", "a.test"), None, "it is read as HTTP");
}

#[test]
fn conflicting_protocols_are_refused_with_both_policies_named() {
    for (one, other) in [
        (http(FRONT, "/a.*"), names(FRONT, "a.test")),
        (
            http(FRONT, "/a.*"),
            format!(
                "  ingress:\n  - {FRONT}\n    toPorts:\n    - ports: [{{port: '80', protocol: TCP}}]\n      \
                 rules: {{kafka: [{{topic: t}}]}}"
            ),
        ),
    ] {
        let errors = compile(inventory(), &[("one", &one), ("other", &other)])
            .err()
            .unwrap();
        assert!(
            errors[0].contains("one") && errors[0].contains("other"),
            "{errors:?}"
        );
    }
    let terminating = |secret: &str| {
        format!(
            "{}\n      terminatingTLS: {{secret: {{name: {secret}}}}}",
            http(FRONT, "/a.*")
        )
    };
    let errors = compile(
        inventory(),
        &[("one", &terminating("a")), ("other", &terminating("b"))],
    )
    .err()
    .unwrap();
    assert!(errors[0].contains("terminatingTLS"), "{errors:?}");
    assert!(
        compile(
            inventory(),
            &[("one", &terminating("a")), ("other", &terminating("a"))]
        )
        .is_ok()
    );
}

#[test]
fn rules_that_change_requests_go_through_the_proxy() {
    let with = |members: &str| {
        format!(
            "  ingress:\n  - {FRONT}\n    toPorts:\n    - ports: [{{port: '80', protocol: TCP}}]\n      rules: {{http: \
             [{{path: /a, headerMatches: [{{name: X-A, {members}}}]}}]}}"
        )
    };
    for (members, inspector) in [
        ("value: a", Inspector::Http),
        ("value: a, mismatch: LOG", Inspector::Http),
        ("value: a, mismatch: ADD", Inspector::TlsTerminate),
        ("value: a, mismatch: DELETE", Inspector::TlsTerminate),
        ("value: a, mismatch: REPLACE", Inspector::TlsTerminate),
        ("secret: {name: s}", Inspector::TlsTerminate),
    ] {
        let all = compiled(&[("one", &with(members)), ("other", &http(FRONT, "/b"))]);
        assert_eq!(all.entry("front").inspector, inspector as u8, "{members}");
        let rules = all.rules("front");
        assert_eq!(rules.reads, Inspector::Http as u8);
        assert!(rules.terminating_tls.is_none() && rules.originating_tls.is_none());
        // Other peers are inspected as before.
        let back = "fromEndpoints: [{matchLabels: {app: back}}]";
        let all = compiled(&[("one", &with(members)), ("other", &http(back, "/b"))]);
        assert!(all.is_read_as("back", Inspector::Http));
    }
}

#[test]
fn quic_to_an_intercepted_port_is_denied_to_all_but_the_node() {
    const UDP: u8 = 17;
    let spec = "  ingress:\n  - fromEntities: [all]\n    toPorts:\n    - ports: [{port: '80', protocol: TCP}]\n      \
                terminatingTLS: {secret: {name: a}}\n  - fromEntities: [all]";
    let mut all = compiled(&[("one", spec)]);
    let decision = |all: &Compiled, identity, port| {
        let snapshot = all.0.snapshot();
        let entry = snapshot.policy_entry(1, Direction::Ingress, identity, UDP, Some(port));
        Decision::from_u8(entry.unwrap().decision)
    };
    for allow_localhost in [true, false] {
        all.set_options(|options| options.allow_localhost = allow_localhost);
        let from_node = if allow_localhost {
            Decision::Allow
        } else {
            Decision::DenyQuic
        };
        assert_eq!(decision(&all, identity::HOST, 80), from_node);
        assert_eq!(decision(&all, identity::WORLD, 80), Decision::DenyQuic);
        assert_eq!(decision(&all, identity::WORLD, 81), Decision::Allow);
    }
}

#[test]
fn http_rules_go_through_the_proxy_if_http2_in_clear_text_is_inspected() {
    let text = http(FRONT, "/a");
    let mut all = compiled(&[("one", &text)]);
    assert!(all.is_read_as("front", Inspector::Http));
    all.set_options(|options| options.clear_text_http2 = true);
    assert_eq!(all.entry("front").inspector, Inspector::TlsTerminate as u8);
    assert_eq!(all.rules("front").reads, Inspector::Http as u8);
    all.set_options(|options| options.clear_text_http2 = false);
    assert!(all.is_read_as("front", Inspector::Http));
}

#[test]
fn server_names_are_merged_and_apply_to_all_traffic_of_the_peer_and_port() {
    let plain = format!("  ingress:\n  - {FRONT}\n    {PLAIN_80}");
    let all = compiled(&[
        ("a", &names(FRONT, "a.test")),
        ("b", &names(FRONT, "'*.b.test'")),
        ("plain", &plain),
    ]);
    assert_eq!(all.connects("front", "a.test"), Some("a"));
    assert_eq!(all.connects("front", "x.b.test"), Some("b"));
    assert_eq!(all.connects("front", "c.test"), None);
    // A broader allow does not require server names.
    let broad = format!("  ingress:\n  - {FRONT}");
    let all = compiled(&[("a", &names(FRONT, "a.test")), ("broad", &broad)]);
    assert_eq!(all.connects("front", "c.test"), Some("broad"));
}

#[test]
fn a_plain_allow_of_the_same_policy_counts_as_any_other() {
    let both = format!("{}\n  - {FRONT}\n    {PLAIN_80}", http(FRONT, "/a.*"));
    let all = compiled(&[("both", &both)]);
    assert_eq!(all.allowing_policy("front", "/x"), Some("both"));
    assert_eq!(
        all.rules("front").alternatives.last().unwrap().matcher,
        Matcher::Everything
    );
}

#[test]
fn without_default_deny_every_request_passes() {
    let lenient = format!("  enableDefaultDeny: {{ingress: false}}\n{}", http(FRONT, "/a.*"));
    let all = compiled(&[("a", &lenient)]);
    assert!(all.is_read_as("front", Inspector::Http));
    assert_eq!(all.allowing_policy("front", "/a"), Some("a"));
    assert!(all.allowing_policy("front", "/x").is_some());
}

#[test]
fn audit_mode_of_node_or_endpoint_applies_to_requests() {
    let rule = http(FRONT, "/a.*");
    let policies = [("a", rule.as_str())];
    assert!(!compiled(&policies).is_audited("front"));
    let everywhere = Inventory {
        options: Options {
            audit: true,
            ..Options::default()
        },
        ..inventory()
    };
    let mut one = inventory();
    one.endpoints[0].audit = true;
    for inventory in [everywhere, one] {
        let all = compile(inventory, &policies).ok().unwrap();
        assert!(all.is_audited("front"));
        assert_eq!(
            all.allowing_policy("front", "/x"),
            None,
            "it would be denied, and that is told"
        );
    }
}

#[test]
fn audit_mode_of_a_policy_applies_to_requests_that_only_it_denies() {
    let plain = format!("  ingress:\n  - {FRONT}\n    {PLAIN_80}");
    let elsewhere = "  ingress:\n  - toPorts: [{ports: [{port: '22', protocol: TCP}]}]";
    let lenient = "  enableDefaultDeny: {ingress: false}\n  ingress:\n  - toPorts: [{ports: [{port: '22'}]}]";

    let all = compiled(&[("a!", &http(FRONT, "/a.*"))]);
    assert!(all.is_audited("front"), "the only policy");
    assert_eq!(all.allowing_policy("front", "/x"), None);

    let all = compiled(&[("a!", &http(FRONT, "/a.*")), ("b!", elsewhere)]);
    assert!(all.is_audited("front"), "all are in audit mode");

    let all = compiled(&[("a!", &http(FRONT, "/a.*")), ("b", lenient)]);
    assert!(all.is_audited("front"), "nobody else denies by default");

    let all = compiled(&[("a!", &http(FRONT, "/a.*")), ("b", elsewhere)]);
    assert!(
        !all.is_audited("front"),
        "without it the other would deny everything"
    );

    let all = compiled(&[("a", &http(FRONT, "/a.*")), ("b!", &http(FRONT, "/b.*"))]);
    assert!(!all.is_audited("front"));
    assert_eq!(
        all.allowing_policy("front", "/b"),
        Some("b"),
        "what it allows is allowed"
    );

    // Without the policy in audit mode nothing would be inspected.
    let all = compiled(&[("a!", &http(FRONT, "/a.*")), ("plain", &plain)]);
    assert!(all.is_audited("front"));
    let all = compiled(&[("a!", &names(FRONT, "a.test")), ("plain", &plain)]);
    assert!(all.is_audited("front"));
    assert_eq!(
        all.connects("front", "b.test"),
        None,
        "it is told that it would be denied"
    );

    // Another policy, which is enforced, requires server names: they apply to traffic that a plain rule allows.
    let all = compiled(&[
        ("a!", &names(FRONT, "a.test")),
        ("b", &names(FRONT, "b.test")),
        ("plain", &plain),
    ]);
    assert!(!all.is_audited("front"));
    assert_eq!(all.connects("front", "c.test"), None);

    // `serverNames` in audit mode do not restrict what other policies allow.
    let all = compiled(&[
        ("a!", &names(FRONT, "a.test")),
        ("b", &names("fromEntities: [cluster]", "b.test")),
        ("plain", &plain),
    ]);
    assert!(!all.is_audited("front"));
    assert_eq!(all.connects("front", "c.test"), Some("plain"));
}

/// The policies are each within their bound, but the expressions of all policies of one endpoint are bounded as well.
#[test]
fn the_expressions_of_an_endpoint_are_bounded_together() {
    // About 3,000 states an expression, 200,000 a policy.
    let rules = |policy: usize| {
        let paths = (0..66).map(|n| format!("        - path: '/[a-z]{{1000}}/{policy}/{n}'\n"));
        let paths: String = paths.collect();
        format!(
            "  ingress:\n  - fromEntities: [all]\n    toPorts:\n    - ports: [{{port: '80', protocol: TCP}}]\n      \
             rules:\n        http:\n{paths}"
        )
    };
    let specs: Vec<String> = (0..6).map(rules).collect();
    let names: Vec<String> = (0..6).map(|n| format!("p{n}")).collect();
    let policies: Vec<(&str, &str)> = names
        .iter()
        .zip(&specs)
        .map(|(name, spec)| (name.as_str(), spec.as_str()))
        .collect();
    assert!(compile(inventory(), &policies[..4]).is_ok());
    let Err(errors) = compile(inventory(), &policies) else {
        panic!("expressions of more than a million states together are taken");
    };
    assert_eq!(errors.len(), 1, "{errors:?}");
    for part in [
        "policy default/p",
        "the regular expressions of the policies that select endpoint web are too large together: they need about 1",
        " states, of at most 1000000",
    ] {
        assert!(errors[0].contains(part), "{part}: {errors:?}");
    }
    // Policies of another endpoint do not count.
    let elsewhere = specs[4].clone();
    let mut compiler = compile(inventory(), &policies[..4])
        .unwrap_or_else(|errors| panic!("{errors:?}"))
        .0;
    let parsed = parse(
        "front",
        &format!(
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: front}}\nspec:\n  endpointSelector: \
             {{matchLabels: {{app: front}}}}\n{elsewhere}"
        ),
    );
    let content = FileContent {
        policies: parsed.policies,
        cidr_groups: parsed.cidr_groups,
    };
    let changes = Changes {
        inventory: None,
        files: BTreeMap::from([("front".to_owned(), Some(content))]),
    };
    assert!(compiler.update(changes).is_ok());
}

#[test]
fn a_table_is_plain_without_inspection_and_explicit_denies() {
    let (ingress, egress) = (endpoint_flags::PLAIN_INGRESS, endpoint_flags::PLAIN_EGRESS);
    let read =
        "  ingress:\n  - toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{path: /a}]}}]";
    let denied = "  egressDeny:\n  - toCIDR: [192.0.2.0/24]";
    let allowed = "  ingress: [{fromEntities: [world]}]\n  egress: [{toCIDR: [192.0.2.0/24]}]";
    for (spec, plain) in [(read, egress), (denied, ingress), (allowed, ingress | egress)] {
        let Compiled(compiler) = compile(inventory(), &[("a", spec)]).unwrap();
        let endpoints = &compiler.snapshot().endpoints;
        assert_eq!(endpoints[&1].flags, plain, "{spec}");
        assert_eq!(endpoints[&2].flags, ingress | egress);
    }
    // The same after a policy was added and removed.
    let Compiled(mut compiler) = compile(inventory(), &[("a", allowed)]).unwrap();
    for (content, plain) in [
        (Some(policy("b", read)), egress),
        (Some(policy("b", denied)), ingress),
        (None, ingress | egress),
    ] {
        let files = BTreeMap::from([("b".to_owned(), content)]);
        compiler
            .update(Changes {
                inventory: None,
                files,
            })
            .unwrap();
        assert_eq!(compiler.snapshot().endpoints[&1].flags, plain);
    }
}
