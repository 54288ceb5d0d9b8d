//! Checks the walks of docs/WALKS.md, whose files and functions must exist and which visit no file twice, and the diagrams
//! of docs/ARCHITECTURE.md, whose functions must exist.

use std::{collections::BTreeSet, fs, path::Path};

/// Longest walk, in steps.
const MAX_STEPS: usize = 12;

/// Returns whether a source file defines a function of this name.
fn has_function(source: &str, name: &str) -> bool {
    source.lines().any(|line| {
        let code = line.split("//").next().unwrap_or_default();
        code.split_once(&format!("fn {name}"))
            .is_some_and(|(before, after)| {
                !before.contains('"')
                    && after.starts_with(['(', '<'])
                    && !before.ends_with(char::is_alphanumeric)
            })
    })
}

/// Returns the problems of a document's walks, one line each. `read` returns the text of a file of the repository.
fn problems(document: &str, read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut problems = Vec::new();
    let (mut walk, mut steps, mut visited) = ("", 0, BTreeSet::new());
    for line in document.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            (walk, steps) = (title, 0);
            visited.clear();
        }
        let Some((number, step)) = line.split_once(". ").filter(|(n, _)| n.parse::<usize>().is_ok()) else {
            continue;
        };
        let mut report = |problem: &str| problems.push(format!("{walk}, step {number}: {problem}"));
        steps += 1;
        if steps > MAX_STEPS {
            report("too many steps");
        }
        // [`FILE::FUNCTION`](../FILE), `FUNCTION` and `FUNCTION`: what happens there.
        let spans: Vec<&str> = step
            .split_once(": ")
            .map_or(step, |(names, _)| names)
            .split('`')
            .skip(1)
            .step_by(2)
            .collect();
        let Some((file, first)) = spans.first().and_then(|span| span.split_once(".rs::")) else {
            report("does not begin with a file and a function");
            continue;
        };
        let file = format!("{file}.rs");
        if !step.contains(&format!("](../{file})")) {
            report("the link does not lead to the file");
        }
        if !visited.insert(file.clone()) {
            report("the file was visited before");
        }
        let Some(source) = read(&file) else {
            report("there is no such file");
            continue;
        };
        for name in [first].iter().chain(&spans[1..]) {
            if !has_function(&source, name) {
                report(&format!("{file} has no function {name}"));
            }
        }
    }
    problems
}

#[test]
fn each_function_of_a_walk_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let document = fs::read_to_string(root.join("docs/WALKS.md")).unwrap();
    let found = problems(&document, |file| fs::read_to_string(root.join(file)).ok());
    assert!(found.is_empty(), "docs/WALKS.md\n{}", found.join("\n"));
    assert_eq!(document.matches("\n## ").count(), 2);
    assert!(document.matches(".rs::").count() > 20);
}

/// Returns each file and function that a text names as `FILE.rs::FUNCTION, FUNCTION`.
fn named_functions(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices(".rs::") {
        let is_path = |c: char| c.is_ascii_alphanumeric() || "/_-".contains(c);
        let start = text[..at].rfind(|c| !is_path(c)).map_or(0, |before| before + 1);
        let names = text[at + ".rs::".len()..]
            .split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || "_, ".contains(c)))
            .next()
            .unwrap_or_default();
        for name in names
            .split(", ")
            .take_while(|name| !name.is_empty() && !name.contains(' '))
        {
            found.push((format!("{}.rs", &text[start..at]), name.to_owned()));
        }
    }
    found
}

/// Returns each file that a text names in backticks without a function, by its path from the root of the repository.
fn named_files(text: &str) -> impl Iterator<Item = &str> {
    let spans = text.split('`').skip(1).step_by(2);
    spans.filter(|span| span.contains('/') && !span.contains("::") && span.ends_with(".rs"))
}

#[test]
fn each_file_and_function_of_the_architecture_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let document = fs::read_to_string(root.join("docs/ARCHITECTURE.md")).unwrap();
    let diagrams: Vec<&str> = document
        .split("```mermaid")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect();
    assert_eq!(diagrams.len(), 3);
    for diagram in diagrams {
        assert!(named_functions(diagram).len() > 8, "{diagram}");
    }
    let functions = named_functions(&document);
    assert!(functions.len() > 90, "{}", functions.len());
    let mut problems = BTreeSet::new();
    for (file, name) in functions {
        match fs::read_to_string(root.join(&file)) {
            Err(error) => problems.insert(format!("{file}: {error}")),
            Ok(source) if !has_function(&source, &name) => {
                problems.insert(format!("{file} has no function {name}"))
            }
            Ok(_) => continue,
        };
    }
    // Code blocks are fenced by three backticks, so spans alternate also behind them.
    for file in named_files(&document) {
        if !root.join(file).exists() {
            problems.insert(format!("there is no file {file}"));
        }
    }
    assert!(problems.is_empty(), "docs/ARCHITECTURE.md\n{problems:#?}");
}

#[test]
fn wrong_steps_are_reported() {
    let read =
        |file: &str| (file == "a.rs").then(|| "pub fn one<T>() {}\nfn two() {}\n// fn three()\n".to_owned());
    let walk = |steps: &str| problems(&format!("## Walk\n\n{steps}"), read);
    assert_eq!(
        walk("1. [`a.rs::one`](../a.rs), then `two`: it is `three`."),
        [""; 0]
    );
    for wrong in [
        "1. [`a.rs::three`](../a.rs): commented out",
        "1. [`a.rs::one`](../a.rs), `on`: a part of a name",
        "1. [`b.rs::one`](../b.rs): no such file",
        "1. [`a.rs::one`](../b.rs): another file",
        "1. `a.rs`: no function",
        "1. [`a.rs::one`](../a.rs): once\n2. [`a.rs::two`](../a.rs): twice",
    ] {
        assert_eq!(walk(wrong).len(), 1, "{wrong}: {:?}", walk(wrong));
    }
    let long: String = (1..=MAX_STEPS + 1)
        .map(|n| format!("{n}. [`a.rs::one`](../a.rs): x\n"))
        .collect();
    assert!(
        walk(&long)
            .iter()
            .any(|problem| problem.contains("too many steps"))
    );
}
