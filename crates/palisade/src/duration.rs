//! Durations as people write them: `5ms`, `10s`, `1h30m`.

use std::time::Duration;

const UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

/// Reads one or more numbers with a unit (`d`, `h`, `m`, `s`, `ms`), without spaces.
pub fn parse(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("'{text}' is not a duration: write a number and a unit, like 500ms, 10s, 5m or 1h30m");
    let mut rest = text;
    let mut total: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, after) = rest.split_at(digits);
        let letters = after.len() - after.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
        let (unit, after) = after.split_at(letters);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let (_, milliseconds) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?;
        total = number
            .checked_mul(*milliseconds)
            .and_then(|n| total.checked_add(n))
            .ok_or_else(|| format!("'{text}' is too long a duration"))?;
        rest = after;
    }
    if text.is_empty() {
        return Err(wrong());
    }
    Ok(Duration::from_millis(total))
}

/// The two largest units: `3h12m`, `42s`, `7ms`.
#[must_use]
pub fn format(duration: Duration) -> String {
    let mut rest = duration.as_millis();
    if rest == 0 {
        return "0s".to_owned();
    }
    let mut text = String::new();
    let mut written = 0;
    for (unit, milliseconds) in UNITS {
        let count = rest / u128::from(milliseconds);
        // Milliseconds beside anything longer would only be noise.
        if count > 0 && !(unit == "ms" && written > 0) && written < 2 {
            text += &format!("{count}{unit}");
            written += 1;
        } else if written > 0 {
            break;
        }
        rest %= u128::from(milliseconds);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_people_write() {
        assert_eq!(parse("5ms").unwrap(), Duration::from_millis(5));
        assert_eq!(parse("10s").unwrap(), Duration::from_secs(10));
        assert_eq!(parse("1h30m").unwrap(), Duration::from_secs(5_400));
        assert_eq!(parse("0s").unwrap(), Duration::ZERO);
        for wrong in [
            "",
            "10",
            "s",
            "1.5s",
            "10 s",
            "-1s",
            "1w",
            "s10",
            "99999999999999999999s",
            "1h-1m",
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?} was read");
        }
        assert!(parse("18446744073709551615d").unwrap_err().contains("too long"));
    }

    #[test]
    fn writes_two_units_at_most() {
        let seconds = |n| format(Duration::from_secs(n));
        assert_eq!(seconds(0), "0s");
        assert_eq!(seconds(42), "42s");
        assert_eq!(seconds(3_600), "1h");
        assert_eq!(seconds(11_533), "3h12m");
        assert_eq!(seconds(86_400 + 61), "1d");
        assert_eq!(format(Duration::from_millis(1_007)), "1s");
        assert_eq!(format(Duration::from_millis(7)), "7ms");
    }
}
