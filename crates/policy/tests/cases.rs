//! Verdicts case by case.

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
fn verdicts_are_those_of_the_original_engine() {
    let text = include_str!("../../../tests/cases/policy-cases.jsonl");
    all_pass("policy-cases.jsonl", text, 2335 + 10);
}

/// One behaviour a case, named by its id: what the original refuses (`err-`) and what it takes for all that it looks
/// odd (`ok-`), read from its sources; then precedence, default deny, empty forms, scoping, conflicts.
#[test]
fn each_behaviour_is_as_in_the_original() {
    let text = include_str!("../../../tests/cases/semantics.jsonl");
    all_pass("semantics.jsonl", text, 467);
}

#[test]
fn selectors_that_only_exclude_namespaces_mean_endpoints() {
    let text = include_str!("../../../tests/cases/negative-namespace-selectors.yaml");
    all_pass("negative-namespace-selectors.yaml", text, 28);
}

#[test]
fn application_rules_without_default_deny_restrict_where_something_else_denies() {
    let text = include_str!("../../../tests/cases/no-default-deny-with-application-rules.yaml");
    all_pass("no-default-deny-with-application-rules.yaml", text, 16);
}

#[test]
fn a_port_name_means_the_number_of_each_peer() {
    let text = include_str!("../../../tests/cases/port-names-with-several-numbers.yaml");
    all_pass("port-names-with-several-numbers.yaml", text, 26);
}
