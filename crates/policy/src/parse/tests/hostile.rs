//! Texts that mean harm: they are refused, soon, and never end the process.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{cnp, said};
use crate::parse::{parse, parse_rules_json, yaml_to_json};

/// Reads a text, which must not take long.
#[track_caller]
fn soon(text: &str) -> Vec<String> {
    let start = Instant::now();
    let said = said(text);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    said
}

#[test]
fn nesting_is_bounded() {
    for text in [
        "[".repeat(100_000),
        "{a: ".repeat(100_000),
        "- ".repeat(100_000),
        "? ".repeat(100_000),
    ] {
        let said = soon(&text);
        assert_eq!(said.len(), 1, "{said:?}");
        // The YAML parser has a limit of its own for what stands in brackets.
        let refused = ["nested deeper than 64 levels", "recursion limit exceeded"];
        assert!(
            refused.iter().any(|message| said[0].contains(message)),
            "{said:?}"
        );
    }
    let mut deep = String::new();
    for level in 0..1000 {
        deep.push_str(&format!("{}a:\n", " ".repeat(level)));
    }
    assert!(soon(&deep)[0].contains("nested deeper than 64 levels"));
}

#[test]
fn aliases_cannot_multiply_without_end() {
    let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for n in 1..20 {
        let items = vec![format!("*a{}", n - 1); 9].join(", ");
        laughs.push_str(&format!("a{n}: &a{n} [{items}]\n"));
    }
    let said = soon(&laughs);
    assert!(
        said[0].contains("expand to more than") || said[0].contains("hold more than"),
        "{said:?}"
    );

    let chain: String = (1..100)
        .map(|n| format!("a{n}: &a{n} {{x: *a{}}}\n", n - 1))
        .collect();
    let said = soon(&format!("a0: &a0 1\n{chain}"));
    assert!(said[0].contains("64 levels"), "{said:?}");
}

#[test]
fn large_objects_and_long_names_are_read_soon() {
    let many: String = (0..100_000).map(|n| format!("k{n}: v\n")).collect();
    assert_eq!(soon(&many), ["1:1: kind is missing: this is no resource"]);

    let unknown: String = (0..2_000).map(|n| format!("  k{n}: v\n")).collect();
    assert_eq!(soon(&cnp(&format!("  ingress: [{{}}]\n{unknown}"))).len(), 2_000);

    let long = "x".repeat(1_000_000);
    let said = soon(&cnp(&format!("  ingress: [{{}}]\n  {long}: v\n")));
    assert!(
        said.iter().all(|message| message.len() < 500),
        "a message shows a long name in part only"
    );
}

#[test]
fn control_characters_do_not_reach_a_message() {
    let said = said(&cnp("  ingress: [{fromEntities: [\"a\\e[31m\\nb\"]}]\n"));
    assert_eq!(said.len(), 1);
    assert!(!said[0].contains(|c: char| c.is_control()), "{said:?}");
}

#[test]
fn expressions_are_bounded() {
    let rule = |path: &str| {
        format!(
            "  egress:\n  - toPorts: [{{ports: [{{port: '80', protocol: TCP}}], rules: {{http: [{{path: '{path}'}}]}}}}]\n"
        )
    };
    for path in [
        "((a{1000}){1000}){1000}".to_owned(),
        "(".repeat(10_000),
        format!("{}{}", "(".repeat(5_000), ")".repeat(5_000)),
    ] {
        assert!(
            soon(&cnp(&rule(&path)))
                .iter()
                .any(|message| message.contains("no valid regular expression"))
        );
    }
}

/// Texts made of what policies are made of.
fn fragments() -> impl Strategy<Value = String> {
    let words = [
        "apiVersion: cilium.io/v2\n",
        "kind: CiliumNetworkPolicy\n",
        "metadata: {name: p}\n",
        "spec:\n",
        "  ",
        "- ",
        "endpointSelector: {}\n",
        "ingress:\n",
        "egress:",
        "toPorts:",
        "ports: [{port: '80'}]\n",
        "{",
        "}",
        "[",
        "]",
        ", ",
        ": ",
        "\n",
        "toCIDR: ['",
        "10.0.0.0/8",
        "'",
        "\"",
        "&a ",
        "*a",
        "<<: ",
        "---\n",
        "...\n",
        "# ",
        "| ",
        "> ",
        "!!str ",
        "\t",
        "~",
        "null",
        "true",
        "0",
        "-1",
        "rules: {http: [{path: '",
        "toFQDNs:",
        "matchName: ",
        "é",
        "\u{2028}",
        "\u{0}",
        "\\",
        "%YAML 1.2\n",
        "%TAG ! x\n",
        "?",
        "@",
    ];
    prop::collection::vec(prop::sample::select(words.to_vec()), 0..60).prop_map(|words| words.concat())
}

/// Any JSON value, of the names of the language among others.
fn json() -> impl Strategy<Value = serde_json::Value> {
    let names = prop::sample::select(vec![
        "apiVersion",
        "kind",
        "metadata",
        "name",
        "spec",
        "specs",
        "endpointSelector",
        "nodeSelector",
        "matchLabels",
        "matchExpressions",
        "key",
        "operator",
        "values",
        "ingress",
        "egressDeny",
        "egress",
        "fromEndpoints",
        "toCIDR",
        "toCIDRSet",
        "cidr",
        "except",
        "toPorts",
        "ports",
        "port",
        "protocol",
        "endPort",
        "rules",
        "http",
        "dns",
        "kafka",
        "path",
        "icmps",
        "fields",
        "type",
        "family",
        "serverNames",
        "listener",
        "toFQDNs",
        "items",
        "other",
    ]);
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        prop::sample::select(vec![
            "cilium.io/v2",
            "networking.k8s.io/v1",
            "CiliumNetworkPolicy",
            "NetworkPolicy",
            "List",
            "a",
            "10.0.0.0/8",
            "80",
            "TCP",
            "In",
            "all",
            "*.a",
            "",
        ])
        .prop_map(Into::into),
        "\\PC*".prop_map(Into::into),
    ];
    leaf.prop_recursive(8, 128, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
            prop::collection::vec((names.clone(), inner), 0..6).prop_map(|members| members
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect()),
        ]
    })
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in any::<String>()) {
        let _ = parse("f", &text);
    }

    #[test]
    fn any_text_of_the_language_is_read_or_refused(text in fragments()) {
        let parsed = parse("f", &text);
        for diagnostic in &parsed.diagnostics {
            prop_assert!(diagnostic.location.line >= 1 && diagnostic.location.column >= 1, "{diagnostic}");
        }
    }

    #[test]
    fn any_json_is_read_or_refused(policies in json(), rules in json()) {
        let _ = parse_rules_json("c", Some(&policies), Some(&rules));
    }

    #[test]
    fn json_is_yaml(value in json()) {
        // A text of YAML cannot hold what JSON writes as a pair of surrogates, nor numbers of another notation.
        let text = value.to_string();
        if let Ok(documents) = yaml_to_json("f", &text) {
            prop_assert_eq!(documents.len(), 1);
        }
    }
}
