//! Policy cases and example policies can be parsed.

use std::{fs, path::Path};

use palisade_policy::parse::parse;
use palisade_tests::{cases, count_checks};

fn diagnostics(name: &str, text: &str) -> Vec<String> {
    parse(name, text)
        .diagnostics
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn every_case_is_a_valid_policy_with_valid_checks() {
    let mut all = 0;
    for folder in ["peers", "ports", "deny", "kubernetes", "host"] {
        for case in cases(folder).expect("cases") {
            // A warning may be what the case tests.
            assert!(
                !parse(&case.name, &case.policy).has_errors(),
                "{:#?}",
                diagnostics(&case.name, &case.policy)
            );
            all += count_checks(&case.checks).unwrap_or_else(|error| panic!("{}: {error:#}", case.name));
        }
    }
    assert!(all > 500, "{all}");
}

#[test]
fn the_example_policies_are_valid() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/examples");
    let mut files = 0;
    for entry in fs::read_dir(dir).expect("folder") {
        let path = entry.expect("entry").path();
        let text = fs::read_to_string(&path).expect("file");
        assert_eq!(diagnostics(&path.display().to_string(), &text), [""; 0]);
        files += 1;
    }
    assert!(files >= 5);
}
