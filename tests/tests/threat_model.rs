//! docs/THREAT-MODEL.md names tests as evidence: each must exist in the file that is named.

use std::{fs, path::Path};

/// Returns the parts of a text between backticks.
fn code_spans(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Returns whether a source file has a test function of this name: `#[test]`, perhaps further attributes and comments,
/// `fn`.
fn has_test(source: &str, name: &str) -> bool {
    let start = format!("fn {name}(");
    let mut is_test = false;
    source.lines().map(str::trim).any(|line| {
        let found = is_test && line.strip_prefix("async ").unwrap_or(line).starts_with(&start);
        is_test = line == "#[test]"
            || line == "#[tokio::test]"
            || (is_test && (line.starts_with("#[") || line.starts_with("//")));
        found
    })
}

/// Returns the problems of a document's evidence, one line each: references that do not exist, and those that are not
/// written as `path/file.rs::function` in backticks. `read` returns the text of a file of the repository.
fn problems(document: &str, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut problems = Vec::new();
    let mut is_evidence = false;
    for (number, line) in (1..).zip(document.lines()) {
        let mut report = |problem: String| problems.push(format!("line {number}: {problem}"));
        if line.starts_with('|') && line.ends_with("| shown by |") {
            is_evidence = true;
        } else if !line.starts_with('|') {
            is_evidence = false;
        } else if is_evidence && !line.starts_with("|---") {
            let cell = line
                .trim_end_matches(['|', ' '])
                .rsplit(" | ")
                .next()
                .unwrap_or_default();
            let spans = code_spans(cell).count();
            let prose: String = cell.split('`').step_by(2).collect();
            if prose.contains("::") || prose.contains('_') || prose.contains(".rs") {
                report(format!("the evidence {prose:?} is not in backticks"));
            }
            if spans == 0 && prose != "-" {
                report("no evidence and no \"-\"".to_owned());
            }
            for span in code_spans(cell).filter(|span| !span.contains(".rs::")) {
                report(format!("`{span}` does not name a file and a test function"));
            }
        }
        for span in code_spans(line) {
            let Some((file, name)) = span.split_once(".rs::") else {
                continue;
            };
            let file = format!("{file}.rs");
            match read(&file) {
                None => report(format!("there is no file {file}")),
                Some(source) if has_test(&source, name) => {}
                Some(_) => report(format!("{file} has no test {name}")),
            }
        }
    }
    problems
}

#[test]
fn each_test_named_in_the_threat_model_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let document = fs::read_to_string(root.join("docs/THREAT-MODEL.md")).unwrap();
    let found = problems(&document, |file| fs::read_to_string(root.join(file)).ok());
    assert!(found.is_empty(), "docs/THREAT-MODEL.md\n{}", found.join("\n"));
    let references = code_spans(&document)
        .filter(|span| span.contains(".rs::"))
        .count();
    assert!(references > 100, "only {references} tests are named");
}

#[test]
fn wrong_evidence_is_reported() {
    let read = |file: &str| {
        (file == "a/b.rs").then(|| {
            "fn helper() {}\n#[test]\n// Why.\n#[ignore]\nfn holds() {}\n    #[test]\n    fn inner(x in 0..2) {}\n"
                .to_owned()
        })
    };
    let table =
        |cell: &str| format!("| actor | what holds | shown by |\n|---|---|---|\n| peer | all | {cell} |\n");
    for cell in [
        "`a/b.rs::holds`",
        "`a/b.rs::holds`, `a/b.rs::inner`; by hand under qemu",
        "-",
    ] {
        assert_eq!(problems(&table(cell), read), [] as [String; 0], "{cell}");
    }
    for (cell, problem) in [
        ("`a/b.rs::helper`", "a/b.rs has no test helper"),
        ("`a/b.rs::hold`", "a/b.rs has no test hold"),
        ("`a/c.rs::holds`", "there is no file a/c.rs"),
        ("a/b.rs::holds", "is not in backticks"),
        ("`a/b.rs::holds`, ::inner", "is not in backticks"),
        ("`b::tests::holds`", "does not name a file and a test function"),
        ("`a/b.rs`", "does not name a file and a test function"),
        ("by hand", "no evidence"),
    ] {
        let found = problems(&table(cell), read);
        assert!(
            found.iter().any(|line| line.contains(problem)),
            "{cell}: {found:?}"
        );
    }
    // Outside the tables too.
    assert_eq!(
        problems("See `a/b.rs::gone`.", read),
        ["line 1: a/b.rs has no test gone"]
    );
}
