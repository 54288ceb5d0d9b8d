//! The verdicts of the original engine, case by case.

use palisade_policy::cases::run;

#[test]
fn verdicts_are_those_of_the_original_engine() {
    let text = include_str!("../../../tests/cases/policy-cases.jsonl");
    let report = run("policy-cases.jsonl", text);
    assert!(
        report.failed == 0,
        "{}\n{}",
        report.lines.join("\n"),
        report.summary()
    );
    assert_eq!(report.passed, 2335 + 10);
}
