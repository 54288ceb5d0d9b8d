//! docs/METRICS.md lists every metric; the dashboard and the alert rules use only metrics that exist.

use std::{collections::BTreeSet, fmt::Write as _, fs, path::PathBuf};

use palisade_metrics::{Definition, HUBBLE, Kind, own};
use serde_json::Value;

/// If this variable is set, the test writes the tables of docs/METRICS.md instead of comparing them.
const WRITE: &str = "PALISADE_WRITE_DOCS";

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..").join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn table(definitions: &[&Definition]) -> String {
    let mut text = "| metric | type | labels | meaning |\n|---|---|---|---|\n".to_owned();
    for definition in definitions {
        let labels: Vec<String> = definition
            .labels
            .iter()
            .map(|label| format!("`{label}`"))
            .collect();
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} |",
            definition.name,
            definition.kind.name(),
            labels.join(", "),
            definition.help.trim_end_matches('.')
        );
    }
    text
}

#[test]
fn the_documentation_lists_every_metric() {
    let name = "docs/METRICS.md";
    let mut text = read(name);
    for (section, definitions) in [("own", own::ALL), ("hubble", HUBBLE)] {
        let (begin, end) = (
            format!("<!-- {section} -->\n"),
            format!("<!-- end of {section} -->\n"),
        );
        let start = text
            .find(&begin)
            .unwrap_or_else(|| panic!("{name} has no {begin}"))
            + begin.len();
        let length = text[start..]
            .find(&end)
            .unwrap_or_else(|| panic!("{name} has no {end}"));
        let wanted = table(definitions);
        if std::env::var_os(WRITE).is_some() {
            text.replace_range(start..start + length, &wanted);
            fs::write(path(name), &text).expect("the page can be written");
        } else {
            let found = &text[start..start + length];
            assert_eq!(found, wanted, "{name} is outdated: run this test with {WRITE}=1");
        }
    }
}

/// Returns the names of all time series that a scrape can have.
fn names() -> BTreeSet<String> {
    let all = own::ALL.iter().chain(HUBBLE);
    all.flat_map(|definition| {
        let suffixes: &[&str] = match definition.kind {
            Kind::Histogram => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        suffixes
            .iter()
            .map(|suffix| format!("{}{suffix}", definition.name))
    })
    .collect()
}

/// Returns the words of an expression that are names of metrics of this daemon.
fn used(expression: &str) -> BTreeSet<&str> {
    expression
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))
        .filter(|word| {
            let prefix = word.split('_').next().unwrap_or_default();
            word.contains('_') && ["palisade", "hubble", "process"].contains(&prefix)
        })
        .collect()
}

fn check(file: &str, expressions: &[&str]) {
    let names = names();
    let mut found = 0;
    for expression in expressions {
        let used = used(expression);
        assert!(
            !used.is_empty() || expression.starts_with("up{"),
            "{file}: {expression} uses no metric"
        );
        for name in used {
            assert!(
                names.contains(name),
                "{file}: {name} does not exist: {expression}"
            );
            found += 1;
        }
    }
    assert!(found > 10, "{file}: only {found} metrics are used");
}

fn expressions<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                match (key.as_str(), value.as_str()) {
                    ("expr", Some(expression)) => found.push(expression),
                    _ => expressions(value, found),
                }
            }
        }
        Value::Array(array) => array.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

#[test]
fn the_dashboard_uses_only_metrics_that_exist() {
    let name = "config/grafana/palisade.json";
    let dashboard: Value = serde_json::from_str(&read(name)).expect("JSON");
    let mut found = Vec::new();
    expressions(&dashboard, &mut found);
    check(name, &found);
    let panels = dashboard["panels"].as_array().expect("panels");
    let ids: BTreeSet<u64> = panels.iter().filter_map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(ids.len(), panels.len(), "each panel has a number of its own");
}

#[test]
fn the_alert_rules_use_only_metrics_that_exist_and_each_has_a_unit_test() {
    let name = "config/prometheus/palisade.rules.yml";
    let text = read(name);
    // An expression is on the line of its key, or on the more indented lines after `expr: |`.
    let mut expressions = Vec::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(rest) = line.trim_start().strip_prefix("expr:") else {
            continue;
        };
        if rest.trim() != "|" {
            expressions.push(rest.trim().to_owned());
            continue;
        }
        let indent = |line: &str| line.len() - line.trim_start().len();
        let mut expression = String::new();
        while let Some(next) = lines.next_if(|next| indent(next) > indent(line)) {
            expression.push_str(next.trim());
            expression.push(' ');
        }
        expressions.push(expression);
    }
    assert_eq!(expressions.len(), text.matches("- alert:").count());
    let borrowed: Vec<&str> = expressions.iter().map(String::as_str).collect();
    check(name, &borrowed);
    let tests = read("config/prometheus/palisade.rules.test.yml");
    for alert in text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
    {
        assert!(
            tests.contains(&format!("alertname: {alert}")),
            "{alert} has no unit test"
        );
    }
}
