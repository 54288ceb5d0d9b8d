//! The convention for units in the JSON output of commands: durations are numbers of seconds whose names end with
//! `_seconds`, times are RFC 3339, sizes have `bytes` in their names.

use anyhow::{Result, ensure};
use serde_json::Value;

/// Last words of names of numbers that have another unit, or no unit.
const WRONG: [&str; 30] = [
    "age", "days", "delay", "duration", "elapsed", "expires", "gb", "hours", "interval", "kb", "kib",
    "latency", "left", "lifetime", "mb", "mib", "millis", "minutes", "ms", "ns", "s", "sec", "secs", "size",
    "timeout", "ttl", "uptime", "us", "wait", "memory",
];
/// Last words of names of times.
const TIMES: [&str; 7] = ["time", "since", "until", "at", "before", "after", "timestamp"];

/// Checks an output: one JSON document, or one in each line. Other lines are not checked.
///
/// # Errors
/// A member violates the convention.
pub fn check_output(text: &str) -> Result<()> {
    if let Ok(value) = serde_json::from_str(text) {
        return check(&value);
    }
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .try_for_each(|value| check(&value))
}

/// Checks the names and forms of all members of a JSON document. Members of flows have the names of Hubble's flow API.
///
/// # Errors
/// A member violates the convention.
pub fn check(value: &Value) -> Result<()> {
    match value {
        Value::Array(elements) => elements.iter().try_for_each(check),
        Value::Object(members) => members.iter().try_for_each(|(name, value)| {
            if name == "flow" {
                return Ok(());
            }
            let last = name.rsplit('_').next().unwrap_or_default();
            ensure!(
                !(value.is_number() && (WRONG.contains(&last) || TIMES.contains(&last))),
                "{name}: {value} has no unit: durations end with _seconds, sizes with bytes, times are RFC 3339"
            );
            if let (true, Some(text)) = (TIMES.contains(&last), value.as_str()) {
                ensure!(is_time(text), "{name}: '{text}' is not a time as in RFC 3339");
            }
            check(value)
        }),
        _ => Ok(()),
    }
}

/// Returns whether a text has the form `2026-04-28T01:04:16.656Z`, with or without a fraction.
fn is_time(text: &str) -> bool {
    let form: String = text
        .chars()
        .map(|c| if c.is_ascii_digit() { '0' } else { c })
        .collect();
    let Some(rest) = form.strip_prefix("0000-00-00T00:00:00") else {
        return false;
    };
    let rest = rest
        .strip_prefix('.')
        .map_or(rest, |fraction| fraction.trim_start_matches('0'));
    rest == "Z" || rest == "+00:00" || rest == "-00:00"
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn units_are_in_names_and_times_are_rfc_3339() {
        for good in [
            json!({"uptime_seconds": 3, "bytes": 4, "client_bytes": 5, "left": null, "state": "ttl"}),
            json!([{"since": "2026-04-28T01:04:16.656Z", "not_after": "2026-04-28T01:04:16Z"}]),
            json!({"flow": {"l7": {"latency_ns": 1, "dns": {"ttl": 60}}}}),
        ] {
            check(&good).unwrap();
        }
        for bad in [
            json!({"uptime": 3}),
            json!({"rows": [{"connect_ms": 0.1}]}),
            json!({"a": {"days_left": 1}}),
            json!({"since": 1_700_000_000}),
            json!({"time": "Apr 28 03:04:16.656"}),
        ] {
            assert!(check(&bad).is_err(), "{bad}");
        }
    }
}
