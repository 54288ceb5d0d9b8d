//! Malicious texts: the parser refuses each after bounded work and does not crash.
//!
//! The work is counted: nodes created and copied, states of compiled expressions. Work without a counter (such as a
//! linear search for each key) is bounded by the CPU time of the thread.

use std::time::Duration;

use palisade_yaml::{MAX_ALIASED_NODES, work};
use proptest::prelude::*;

use super::{cnp, diagnostics_of};
use crate::parse::{
    parse, parse_rules_json,
    reader::{MAX_POLICY_COST, compiled},
    yaml_to_json,
};

/// Longest CPU time for a text of these tests, many times the usual time of a debug build.
const LONGEST: Duration = Duration::from_secs(20);

/// Returns the CPU time of this thread; zero if the kernel does not report it.
fn on_cpu() -> Duration {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat");
    let nanoseconds = told.ok().and_then(|text| text.split(' ').next()?.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or(0))
}

/// Parses a text and asserts the bounds of the work: each node is created once, except copies by aliases and anchors,
/// and expressions are compiled up to the bound of a policy. Returns the diagnostics and the cost of the compiled
/// expressions.
#[track_caller]
fn counted(text: &str) -> (Vec<String>, usize) {
    let _ = work::take();
    compiled::take();
    let start = on_cpu();
    let diagnostics = diagnostics_of(text);
    let (took, nodes, states) = (on_cpu() - start, work::take(), compiled::take());
    // A node has at least one byte of text, and nodes above the limit are counted before they are refused.
    let most = text.len() + 3 * MAX_ALIASED_NODES;
    assert!(nodes <= most, "{nodes} nodes of {} bytes", text.len());
    let most = MAX_POLICY_COST + palisade_protocols::http1::re2::MAX_COST;
    assert!(states <= most, "{states} states");
    assert!(took < LONGEST, "{took:?} on a CPU");
    (diagnostics, states)
}

/// Parses a text and asserts the bounds of the work. Returns the diagnostics.
#[track_caller]
fn soon(text: &str) -> Vec<String> {
    counted(text).0
}

#[test]
fn nesting_is_bounded() {
    for text in [
        "[".repeat(100_000),
        "{a: ".repeat(100_000),
        "- ".repeat(100_000),
        "? ".repeat(100_000),
    ] {
        let diagnostics = soon(&text);
        assert_eq!(diagnostics.len(), 1, "{diagnostics:?}");
        // The YAML parser has a limit of its own for brackets.
        let refused = ["nested deeper than 64 levels", "recursion limit exceeded"];
        assert!(
            refused.iter().any(|message| diagnostics[0].contains(message)),
            "{diagnostics:?}"
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
    let diagnostics = soon(&laughs);
    assert!(
        diagnostics[0].contains("expand to more than") || diagnostics[0].contains("hold more than"),
        "{diagnostics:?}"
    );

    let chain: String = (1..100)
        .map(|n| format!("a{n}: &a{n} {{x: *a{}}}\n", n - 1))
        .collect();
    let diagnostics = soon(&format!("a0: &a0 1\n{chain}"));
    assert!(diagnostics[0].contains("64 levels"), "{diagnostics:?}");
}

#[test]
fn large_objects_and_long_names_are_parsed_in_linear_time() {
    let many: String = (0..100_000).map(|n| format!("k{n}: v\n")).collect();
    assert_eq!(soon(&many), ["1:1: kind is missing: this is no resource"]);

    let unknown: String = (0..2_000).map(|n| format!("  k{n}: v\n")).collect();
    assert_eq!(soon(&cnp(&format!("  ingress: [{{}}]\n{unknown}"))).len(), 2_000);

    let long = "x".repeat(1_000_000);
    let diagnostics = soon(&cnp(&format!("  ingress: [{{}}]\n  {long}: v\n")));
    assert!(
        diagnostics.iter().all(|message| message.len() < 500),
        "a message shows a long name in part only"
    );
}

#[test]
fn control_characters_do_not_reach_a_message() {
    let diagnostics = diagnostics_of(&cnp("  ingress: [{fromEntities: [\"a\\e[31m\\nb\"]}]\n"));
    assert_eq!(diagnostics.len(), 1);
    assert!(
        !diagnostics[0].contains(|c: char| c.is_control()),
        "{diagnostics:?}"
    );
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

/// Returns a policy with an http rule for each path.
fn with_paths(paths: impl IntoIterator<Item = String>) -> String {
    let rules: String = paths
        .into_iter()
        .map(|path| format!("        - path: '{path}'\n"))
        .collect();
    cnp(&format!(
        "  egress:\n  - toPorts:\n    - ports: [{{port: '80', protocol: TCP}}]\n      rules:\n        http:\n{rules}"
    ))
}

/// 100 kB of expressions that are valid by themselves; compiling them took 30 s before costs were bounded.
#[test]
fn many_expensive_expressions_are_refused_before_they_are_compiled() {
    // The last digits make the expressions distinct.
    let many = |pattern: &str| with_paths((0..4_000).map(|n| format!("{pattern}{n}")));
    for pattern in [
        "\\pL{20}/",
        "[a-zé-\u{10000}]{200}/",
        "(a{30}|b{30}){8}/",
        "(?i)\\pL\\pL/",
    ] {
        let diagnostics = soon(&many(pattern));
        assert!(
            diagnostics[0].contains("the expressions of this policy up to here are too large together"),
            "{}",
            diagnostics[0]
        );
        assert!(
            diagnostics[0].contains(" is no valid regular expression: "),
            "{diagnostics:?}"
        );
    }
    // Single expressions: too many classes, too long, too many repetitions.
    for path in [
        "(?i)".to_owned() + &"\\pL".repeat(1_000),
        "x".repeat(9_000),
        "{".repeat(9_000),
        "\\pL{1000}".to_owned(),
        "((a{100}){100}){100}".to_owned(),
    ] {
        let (diagnostics, compiled) = counted(&with_paths([path.clone()]));
        assert!(
            diagnostics.len() == 1 && diagnostics[0].contains("it is"),
            "{path:.20}: {diagnostics:?}"
        );
        assert_eq!(compiled, 0, "{path:.20}: it was compiled");
    }
}

#[test]
fn hundreds_of_usual_expressions_are_accepted() {
    let usual = with_paths((0..400).map(|n| format!("/api/v[0-9]+/items/{n}(/.*)?")));
    assert_eq!(soon(&usual), [""; 0]);
    // An expression in many rules counts once.
    let same = with_paths((0..5_000).map(|_| "/[^/]{100}/\\pL{3}".to_owned()));
    assert_eq!(soon(&same), [""; 0]);
}

/// Texts composed of fragments of policies.
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

/// Any JSON value, with names of the policy language among others.
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
    fn any_text_is_parsed_or_refused(text in any::<String>()) {
        let _ = parse("f", &text);
    }

    #[test]
    fn any_text_like_a_policy_is_parsed_or_refused(text in fragments()) {
        let parsed = parse("f", &text);
        for diagnostic in &parsed.diagnostics {
            prop_assert!(diagnostic.location.line >= 1 && diagnostic.location.column >= 1, "{diagnostic}");
        }
    }

    #[test]
    fn any_json_is_parsed_or_refused(policies in json(), rules in json()) {
        let _ = parse_rules_json("c", Some(&policies), Some(&rules));
    }

    #[test]
    fn json_is_yaml(value in json()) {
        // YAML has no surrogate pairs and fewer notations of numbers than JSON.
        let text = value.to_string();
        if let Ok(documents) = yaml_to_json("f", &text) {
            prop_assert_eq!(documents.len(), 1);
        }
    }
}

const A_POLICY: &str = "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: a}
spec: {endpointSelector: {}, ingress: [{}]}
";

/// Asserts that the text has exactly one error, which begins with `expected`, and no policies.
#[track_caller]
fn refused(text: &str, expected: &str) {
    let diagnostics = diagnostics_of(text);
    let errors: Vec<&String> = diagnostics
        .iter()
        .filter(|line| !line.contains(": note: "))
        .collect();
    assert_eq!(errors.len(), 1, "{text:?}: {diagnostics:?}");
    assert!(errors[0].starts_with(expected), "{text:?}: {diagnostics:?}");
    assert!(parse("f", text).has_errors(), "{text:?}");
}

#[test]
fn rules_after_a_control_character_do_not_vanish() {
    let other = A_POLICY.replace("name: a", "name: b");
    for (character, says) in [
        ('\0', "5:4: a NUL byte"),
        ('\u{1}', "5:4: the control character U+0001"),
        ('\u{1a}', "5:4: the control character U+001A"),
        ('\u{7f}', "5:4: the control character U+007F"),
        ('\u{9b}', "5:4: the control character U+009B"),
        ('\u{85}', "5:4: the character U+0085 ends a line for some readers"),
        (
            '\u{2028}',
            "5:4: the character U+2028 ends a line for some readers",
        ),
        (
            '\u{2029}',
            "5:4: the character U+2029 ends a line for some readers",
        ),
    ] {
        refused(&format!("{A_POLICY}---{character}\n{other}"), says);
        // The character is also refused in a string, and in a comment, which it would end for some parsers.
        let commented = says.replace("5:4", "1:3");
        refused(&format!("# {character}{A_POLICY}"), &commented);
        let quoted = says.replace("5:4", "3:20");
        refused(
            &A_POLICY.replace("name: a", &format!("name: \"a{character}\"")),
            &quoted,
        );
    }
    refused(&"\0".repeat(4096), "1:1: a NUL byte");
    refused(&format!("{A_POLICY}{}", "\0".repeat(4096)), "5:1: a NUL byte");
    // An escape in double quotes is not a control character of the file.
    assert_eq!(
        diagnostics_of(&A_POLICY.replace("metadata: {", "metadata: {labels: {x: \"\\0\"}, ")).len(),
        0
    );
}

#[test]
fn line_and_document_ends_that_parsers_disagree_about() {
    let other = A_POLICY.replace("name: a", "name: b");
    for text in [
        format!("{A_POLICY}...\n{other}"),
        format!("{A_POLICY}... # end\n{other}"),
        format!("{A_POLICY}--- # next\n{other}"),
        format!("{A_POLICY}---\n{other}").replace('\n', "\r\n"),
        format!("# x\r{A_POLICY}---\n{other}"),
        format!("{A_POLICY}---\n{other}").replace('\n', "\r"),
        format!("{A_POLICY}---\n~\n---\n---\nnull\n---\n{other}"),
        format!("{A_POLICY}---\n\u{feff}{other}"),
        format!("{A_POLICY}\u{feff}---\n{other}"),
        format!("{A_POLICY}...\n# joined\n\u{feff}{other}"),
        format!("{A_POLICY}...\n%YAML 1.2\n---\n{other}"),
    ] {
        let parsed = parse("f", &text);
        assert_eq!(diagnostics_of(&text), [""; 0], "{text:?}");
        assert_eq!(parsed.policies.len(), 2, "{text:?}");
    }
    for (text, says) in [
        (
            format!("{A_POLICY}... junk\n{other}"),
            "5:5: invalid content after document end marker",
        ),
        (format!("{A_POLICY} ---\n{other}"), "5:2: "),
        (format!("{A_POLICY}---x\n{other}"), "6:1: "),
        (format!("{A_POLICY}--- |\n{other}"), "6:1: this must be an object"),
        (
            format!("{A_POLICY}%YAML 1.2\n---\n{other}"),
            "5:1: missing explicit document end marker",
        ),
        (format!("{A_POLICY}---\nb: [\n"), "7:1: "),
        (format!("{A_POLICY}---\nb: \"\n---\n{other}"), "6:4: "),
        (
            format!("{A_POLICY}\u{feff}{other}"),
            "5:1: a byte order mark (U+FEFF) in the middle of a document",
        ),
        (A_POLICY.replace("kind", "\u{feff}kind"), "2:1: a byte order mark"),
        (
            A_POLICY.replace("name: a", "name: a\u{feff}"),
            "3:19: a byte order mark",
        ),
        (
            A_POLICY.replace("{}]", "{}]#, egress: [{}]"),
            "4:43: comments must be separated",
        ),
        (
            A_POLICY.replace("metadata: {name: a}", "metadata:\n\tname: a"),
            "4:2: tabs disallowed",
        ),
        (A_POLICY.replace("[{}]}", "[{}"), "5:1: "),
    ] {
        refused(&text, says);
    }
}

#[test]
fn concatenated_json_objects() {
    let object = |name: &str| {
        format!(
            "{{\"apiVersion\": \"cilium.io/v2\", \"kind\": \"CiliumNetworkPolicy\", \"metadata\": {{\"name\": \"{name}\"}},\n \
             \"spec\": {{\"endpointSelector\": {{}}, \"ingress\": [{{}}]}}}}"
        )
    };
    for separator in ["", "\n", "\r\n", " \n\n\t", "\n---\n"] {
        let text = format!(
            "{}{separator}{}{separator}{}\n",
            object("a"),
            object("b"),
            object("c")
        );
        let parsed = parse("f", &text);
        assert_eq!(diagnostics_of(&text), [""; 0], "{separator:?}");
        assert_eq!(parsed.policies.len(), 3, "{separator:?}");
    }
    // The place counts from the start of the file.
    refused(
        &format!(
            "{}\n{}",
            object("a"),
            object("b").replace("\"ingress\"", "\"ingres\"")
        ),
        "4:35: unknown field",
    );
    refused(
        &format!("{}{}", object("a"), object("b").replace("kind", "knid")),
        "2:52: kind is missing",
    );
    refused(
        &format!("{}\n{}", object("a"), object("a")),
        "3:1: CiliumNetworkPolicy \"a\" is there twice, first in line 1",
    );
    refused(&format!("{}\n{} x", object("a"), object("b")), "3:1: ");
    refused(&format!("{}\n{}", object("a"), &object("b")[..60]), "3:1: ");
}

#[test]
fn tags_and_numbers_that_parsers_disagree_about() {
    refused(&A_POLICY.replace("spec: {", "spec: !!null {"), "4:14: the tag");
    refused(&A_POLICY.replace("[{}]", "!!set [{}]"), "4:45: the tag");
    assert_eq!(
        diagnostics_of(&A_POLICY.replace("[{}]", "!!seq [!!map {}]")),
        [""; 0]
    );
    let range = |last: &str| {
        cnp(&format!(
            "  egress: [{{toPorts: [{{ports: [{{port: '1', endPort: {last}}}]}}]}}]\n"
        ))
    };
    assert_eq!(diagnostics_of(&range("100")), [""; 0]);
    refused(
        &range("0100"),
        "6:53: endPort must be a number without leading zeros",
    );
    refused(
        &range("999999999999999999999999999999999999999999"),
        "6:53: endPort must be a number",
    );
    refused(&range("1e3"), "6:53: endPort must be a number");
}

#[test]
fn resources_that_look_like_policies_are_not_skipped() {
    for (text, says) in [
        (
            A_POLICY.replace("CiliumNetworkPolicy", "CiliumNetworkP\u{43e}licy"),
            "2:7: kind \"CiliumNetworkP\\u{43e}licy\"",
        ),
        (
            A_POLICY.replace("cilium.io", "c\u{456}lium.io"),
            "1:13: apiVersion \"c\\u{456}lium.io/v2\"",
        ),
        (
            A_POLICY.replace("cilium.io", "cillium.io"),
            "2:7: a CiliumNetworkPolicy is of apiVersion cilium.io/v2",
        ),
        (
            A_POLICY.replace("cilium.io", "example.org"),
            "2:7: a CiliumNetworkPolicy is of apiVersion cilium.io/v2",
        ),
        (
            A_POLICY.replace("ingress", "\u{456}ngress"),
            "4:30: unknown field",
        ),
        (
            A_POLICY.replace("ingress", "ingress\u{200b}"),
            "4:30: unknown field",
        ),
        (
            A_POLICY.replace("metadata: {name: a}", "metadata:\n  name: a\nSpec: {}"),
            "5:1: unknown field \"Spec\"",
        ),
        (
            "apiVersion: networking.k8s.i0/v1\nkind: NetworkPolicy\n".into(),
            "2:7: a NetworkPolicy is of apiVersion",
        ),
        ("apiVersion: v1\nkind: List\n".into(), "1:1: items is missing"),
        (
            "apiVersion: v1\nkind: List\nitems: []\nItems: [x]\n".into(),
            "4:1: unknown field \"Items\"",
        ),
        (
            format!("- {}", A_POLICY.trim_end().replace('\n', "\n  ")),
            "1:1: this must be an object",
        ),
    ] {
        refused(&text, says);
    }
    // Calico's policies have the same kind as the policies of Kubernetes.
    let foreign = diagnostics_of("apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\n");
    assert!(
        foreign.len() == 1 && foreign[0].contains("it is skipped"),
        "{foreign:?}"
    );
}

#[test]
fn a_null_member_is_warned_of() {
    for (text, says) in [
        (
            cnp("  ingress:\n  egress: [{}]\n"),
            "6:3: warning: ingress is null",
        ),
        (
            cnp("  egress: [{}]\n  egressDeny: ~\n"),
            "7:3: warning: egressDeny is null",
        ),
        (
            cnp("  egress: [{toEntities: [all], toPorts: }]\n"),
            "6:32: warning: toPorts is null",
        ),
        (
            cnp("  egress: [{toEndpoints: , toPorts: [{ports: [{port: '1'}]}]}]\n"),
            "6:13: warning: toEndpoints is null",
        ),
        (
            cnp("  egress: [{toPorts: [{ports: [{port: '1'}], rules: }]}]\n"),
            "6:46: warning: rules is null",
        ),
    ] {
        let diagnostics = diagnostics_of(&text);
        assert!(
            diagnostics.len() == 1 && diagnostics[0].starts_with(says),
            "{diagnostics:?}"
        );
    }
}

#[test]
fn an_unquoted_asterisk_is_explained() {
    for pattern in ["*.a.test", "*", " *.s3.a.test"] {
        let diagnostics = diagnostics_of(&cnp(&format!(
            "  egress:\n  - toFQDNs:\n    - matchPattern: {pattern}\n"
        )));
        let quoted = format!("must be quoted, like \"{}\"", pattern.trim());
        assert!(
            diagnostics.len() == 1 && diagnostics[0].contains(&quoted),
            "{diagnostics:?}"
        );
    }
}

#[test]
fn invalid_utf8_is_reported_with_its_place() {
    let decode = |bytes: &[u8]| crate::parse::decode("f", bytes.to_vec()).map_err(|error| error.to_string());
    assert_eq!(decode("a: ä\n".as_bytes()), Ok("a: ä\n".to_owned()));
    assert_eq!(
        decode(b"a: 1\n\xc3\xa4: \xff\n").unwrap_err(),
        "f:2:4: the byte 0xff is no part of UTF-8 text; save the file as UTF-8"
    );
    assert_eq!(
        decode(b"a: \xc3").unwrap_err(),
        "f:1:4: the byte 0xc3 is no part of UTF-8 text; save the file as UTF-8"
    );
    assert_eq!(
        decode(b"\xff\xfea\0").unwrap_err(),
        "f:1:1: this is UTF-16; save it as UTF-8"
    );
}
