//! Parser and formatter of durations such as `500ms`, `10s`, `1h30m` and `1.5h`. Configuration, flow filters and
//! command line share this grammar.
//!
//! The parser is hand-written: the crates `jiff` and `humantime` also accept spaces, signs, weeks and unit names such
//! as `minutes`, and their error texts contain no example.

use std::time::Duration;

const UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
];

/// Maximum number of decimal places that are evaluated: 10^18 times the nanoseconds of a day fits in 128 bits.
const FRACTION_DIGITS: usize = 18;

/// Error for a text that is not a duration.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DurationError {
    /// The text does not follow the grammar.
    #[error("'{0}' is not a duration: write a number and a unit, like 500ms, 10s, 5m or 1h30m")]
    Malformed(String),
    /// The number of seconds does not fit in 64 bits.
    #[error("'{0}' is too long a duration")]
    TooLong(String),
}

/// Parses one or more numbers, each with a unit (`d`, `h`, `m`, `s`, `ms`) and optional decimal places, without
/// spaces. Fractions of a nanosecond are truncated.
///
/// # Errors
/// [`DurationError::Malformed`] if the text does not follow this grammar, [`DurationError::TooLong`] if the duration
/// exceeds [`Duration::MAX`].
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    let malformed = || DurationError::Malformed(text.to_owned());
    let too_long = || DurationError::TooLong(text.to_owned());
    if text.is_empty() {
        return Err(malformed());
    }
    let mut rest = text;
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let (whole, after) = split_while(rest, |c| c.is_ascii_digit());
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => {
                let (fraction, after) = split_while(after, |c| c.is_ascii_digit());
                (Some(fraction), after)
            }
            None => (None, after),
        };
        let (unit, after) = split_while(after, |c| c.is_ascii_alphabetic());
        let (_, ns) = UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .ok_or_else(malformed)?;
        if whole.is_empty() || fraction.is_some_and(str::is_empty) {
            return Err(malformed());
        }
        // The text consists of digits, so parsing fails only if the number exceeds 64 bits.
        let whole: u64 = whole.parse().map_err(|_| too_long())?;
        total = total
            .saturating_add(u128::from(whole) * u128::from(*ns))
            .saturating_add(part(fraction.unwrap_or_default(), *ns));
        rest = after;
    }
    let seconds = u64::try_from(total / 1_000_000_000).map_err(|_| too_long())?;
    Ok(Duration::new(seconds, (total % 1_000_000_000) as u32))
}

/// Returns the decimal fraction 0.`digits` of a unit of time, ns. `ns`: length of the unit.
fn part(digits: &str, ns: u64) -> u128 {
    let mut numerator: u128 = 0;
    let mut denominator: u128 = 1;
    for digit in digits.bytes().take(FRACTION_DIGITS) {
        numerator = numerator * 10 + u128::from(digit - b'0');
        denominator *= 10;
    }
    numerator * u128::from(ns) / denominator
}

fn split_while(text: &str, belongs: impl Fn(char) -> bool) -> (&str, &str) {
    let end = text.find(|c| !belongs(c)).unwrap_or(text.len());
    text.split_at(end)
}

/// Returns a duration as text, with its largest unit and, if it is not zero, the next smaller one: `3h12m`, `42s`,
/// `7ms`. Milliseconds are written only for durations below a second.
#[must_use]
pub fn format(duration: Duration) -> String {
    let mut rest = duration.as_nanos();
    let mut text = String::new();
    let mut written = 0;
    for (unit, ns) in UNITS {
        let count = rest / u128::from(ns);
        // Milliseconds are negligible next to a larger unit.
        if count > 0 && !(unit == "ms" && written > 0) && written < 2 {
            text += &format!("{count}{unit}");
            written += 1;
        } else if written > 0 {
            break;
        }
        rest %= u128::from(ns);
    }
    if text.is_empty() {
        text += "0s";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_numbers_with_units() {
        for (text, ms) in [
            ("5ms", 5),
            ("10s", 10_000),
            ("1h30m", 5_400_000),
            ("1.5h", 5_400_000),
            ("1.25s", 1_250),
            ("0.5d1h", 46_800_000),
            ("0s", 0),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        assert_eq!(parse("0.0000015ms"), Ok(Duration::from_nanos(1)));
        assert_eq!(
            parse("0.99999999999999999999999999d"),
            Ok(Duration::from_nanos(86_399_999_999_999))
        );
    }

    #[test]
    fn refuses_what_is_not_a_duration() {
        for wrong in [
            "", "10", "s", "1.s", ".5s", "1.2.3s", "10 s", "-1s", "1w", "s10", "1h-1m", "1S", "1\u{e9}",
        ] {
            assert_eq!(parse(wrong), Err(DurationError::Malformed(wrong.to_owned())));
        }
        for long in ["99999999999999999999s", "18446744073709551615d"] {
            assert_eq!(parse(long), Err(DurationError::TooLong(long.to_owned())));
        }
    }

    #[test]
    fn formats_two_units_at_most() {
        let seconds = |n| format(Duration::from_secs(n));
        assert_eq!(seconds(0), "0s");
        assert_eq!(seconds(42), "42s");
        assert_eq!(seconds(3_600), "1h");
        assert_eq!(seconds(11_533), "3h12m");
        assert_eq!(seconds(86_400 + 61), "1d");
        assert_eq!(format(Duration::from_millis(1_007)), "1s");
        assert_eq!(format(Duration::from_millis(7)), "7ms");
        assert_eq!(format(Duration::from_micros(7)), "0s");
    }
}
