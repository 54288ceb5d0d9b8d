//! Verdicts of the case files.

use palisade_policy::{cases::run, l7::Plain};

fn all_pass(file: &str, text: &str, count: usize) {
    let report = run(file, text, &Plain);
    assert!(
        report.failed == 0,
        "{}\n{}",
        report.lines.join("\n"),
        report.summary()
    );
    assert_eq!(report.passed, count);
}

#[test]
fn verdicts_equal_those_of_cilium() {
    let text = include_str!("../../../tests/cases/policy-cases.jsonl");
    all_pass("policy-cases.jsonl", text, 2335 + 10);
}

/// One behaviour per case, named by its id. `err-` cases are refused by Cilium, `ok-` cases are accepted although they
/// look wrong (both from its sources). Others cover precedence, default deny, empty forms, scoping and conflicts.
#[test]
fn each_behaviour_equals_that_of_cilium() {
    let text = include_str!("../../../tests/cases/semantics.jsonl");
    all_pass("semantics.jsonl", text, 467);
}

#[test]
fn selectors_that_only_exclude_namespaces_select_endpoints() {
    let text = include_str!("../../../tests/cases/negative-namespace-selectors.yaml");
    all_pass("negative-namespace-selectors.yaml", text, 28);
}

#[test]
fn application_rules_without_default_deny_restrict_where_something_else_denies() {
    let text = include_str!("../../../tests/cases/no-default-deny-with-application-rules.yaml");
    all_pass("no-default-deny-with-application-rules.yaml", text, 16);
}

#[test]
fn a_port_name_stands_for_the_number_of_each_peer() {
    let text = include_str!("../../../tests/cases/port-names-with-several-numbers.yaml");
    all_pass("port-names-with-several-numbers.yaml", text, 26);
}
