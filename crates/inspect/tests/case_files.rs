//! Case files, with requests evaluated by the inspectors.

use palisade_inspect::Inspectors;
use palisade_policy::{
    cases::{Report, run},
    l7::Plain,
};

fn all_pass(file: &str, text: &str, count: usize) {
    let report = run(file, text, &Inspectors::default());
    assert_eq!(report.lines, [] as [String; 0]);
    assert_eq!((report.passed, report.failed), (count, 0));
}

#[test]
fn what_an_inspector_refuses_is_denied_whatever_the_rules_say() {
    let text = include_str!("../../../tests/cases/refused-requests.yaml");
    all_pass("refused-requests.yaml", text, 14);
    // The rules alone would allow these requests.
    let Report { failed, .. } = run("refused-requests.yaml", text, &Plain);
    assert_eq!(failed, 6);
}

#[test]
fn requests_of_the_other_case_files_are_evaluated_the_same() {
    let text = include_str!("../../../tests/cases/no-default-deny-with-application-rules.yaml");
    all_pass("no-default-deny-with-application-rules.yaml", text, 16);
    let text = include_str!("../../../tests/cases/kafka-requests.yaml");
    all_pass("kafka-requests.yaml", text, 16);
    let text = include_str!("../../../tests/cases/intercepted-requests.yaml");
    all_pass("intercepted-requests.yaml", text, 35);
    let text = include_str!("../../../tests/cases/semantics.jsonl");
    all_pass("semantics.jsonl", text, 467);
}

#[test]
fn a_refused_request_is_named_with_what_is_wrong_with_it() {
    let text = include_str!("../../../tests/cases/refused-requests.yaml");
    let wrong = text.replacen("expect: deny", "expect: allow", 1);
    let report = run("refused-requests.yaml", &wrong, &Inspectors::default());
    assert_eq!(report.lines.len(), 1);
    assert!(
        report.lines[0].ends_with(": header name that some servers read as a framing header"),
        "{}",
        report.lines[0]
    );
}

#[test]
fn options_that_are_not_known_are_errors() {
    let text = include_str!("../../../tests/cases/refused-requests.yaml");
    for (known, wrong, message) in [
        (
            "getBodies: allow",
            "getBodies: some",
            "getBodies \"some\" is neither refuse nor allow",
        ),
        (
            "pathNormalization: raw",
            "pathNormalization: none",
            "pathNormalization \"none\" is neither both nor raw",
        ),
    ] {
        let report = run("c.yaml", &text.replace(known, wrong), &Inspectors::default());
        assert_eq!(report.failed, 1);
        assert!(report.lines[0].ends_with(message), "{}", report.lines[0]);
    }
}
