//! Points in time: RFC 3339 in and out, and the stamp of the compact line. UTC throughout.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

const NANOS: i64 = 1_000_000_000;
const DAY: i64 = 86_400;

/// ns since 1970-01-01T00:00:00Z. Reaches to the year 2262.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Timestamp(pub i64);

/// Why a text is no RFC 3339 time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not an RFC 3339 time such as 2026-04-28T01:04:16Z")]
pub struct ParseTimeError;

/// A time of the Gregorian calendar, UTC.
struct Civil {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    nanos: u32,
}

impl Timestamp {
    /// Later than any other.
    pub const MAX: Self = Self(i64::MAX);

    /// So much earlier.
    #[must_use]
    pub fn before(self, time: std::time::Duration) -> Self {
        Self(
            self.0
                .saturating_sub(i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)),
        )
    }

    /// Now, by the system's clock.
    #[must_use]
    pub fn from_system_time(time: std::time::SystemTime) -> Self {
        let ns = match time.duration_since(std::time::UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |ns| -ns),
        };
        Self(ns)
    }

    /// `Apr 28 01:04:16.656`, the day padded with a space: how flow clients begin a line.
    #[must_use]
    pub fn stamp(self) -> String {
        const MONTHS: [&str; 12] = [
            "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
        ];
        let t = self.civil();
        let month = MONTHS[usize::from(t.month - 1)];
        let milli = t.nanos / 1_000_000;
        format!(
            "{month} {:2} {:02}:{:02}:{:02}.{milli:03}",
            t.day, t.hour, t.minute, t.second
        )
    }

    /// Days to a date by the 400-year cycle of the Gregorian calendar, whose years are counted from March so
    /// that the leap day is a year's last.
    fn civil(self) -> Civil {
        let seconds = self.0.div_euclid(NANOS);
        let of_day = seconds.rem_euclid(DAY);
        let days = seconds.div_euclid(DAY) + 719_468; // since 0000-03-01
        let era = days.div_euclid(146_097);
        let of_era = days.rem_euclid(146_097);
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * of_year + 2) / 153; // months since March
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        Civil {
            year: year_of_era + era * 400 + i64::from(month <= 2),
            month: month as u8,
            day: (of_year - (153 * shifted + 2) / 5 + 1) as u8,
            hour: (of_day / 3_600) as u8,
            minute: (of_day / 60 % 60) as u8,
            second: (of_day % 60) as u8,
            nanos: self.0.rem_euclid(NANOS) as u32,
        }
    }
}

fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let shifted = if month > 2 { month - 3 } else { month + 9 };
    let year = if month > 2 { year } else { year - 1 };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * shifted + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

fn days_in(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// RFC 3339 with 0, 3, 6 or 9 digits of a second, as the JSON form of protobuf timestamps has it.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let t = self.civil();
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}",
            t.year, t.month, t.day, t.hour, t.minute, t.second
        )?;
        match t.nanos {
            0 => {}
            n if n % 1_000_000 == 0 => write!(f, ".{:03}", n / 1_000_000)?,
            n if n % 1_000 == 0 => write!(f, ".{:06}", n / 1_000)?,
            n => write!(f, ".{n:09}")?,
        }
        f.write_str("Z")
    }
}

/// RFC 3339: `2026-04-28T01:04:16.5+02:00`; also a date alone (its midnight, UTC).
impl FromStr for Timestamp {
    type Err = ParseTimeError;

    fn from_str(s: &str) -> Result<Self, ParseTimeError> {
        parse(s).ok_or(ParseTimeError)
    }
}

fn parse(s: &str) -> Option<Timestamp> {
    let b = s.as_bytes();
    let punctuation = |at: usize, c: &[u8]| b.get(at).is_some_and(|have| c.contains(have));
    let (year, month, day) = (number(b, 0, 4)?, number(b, 5, 2)?, number(b, 8, 2)?);
    if !punctuation(4, b"-") || !punctuation(7, b"-") || !(1..=12).contains(&month) {
        return None;
    }
    if day < 1 || day > days_in(year, month) {
        return None;
    }
    let midnight = days_of(year, month, day).checked_mul(DAY)?;
    if b.len() == 10 {
        return midnight.checked_mul(NANOS).map(Timestamp);
    }
    let (hour, minute, second) = (number(b, 11, 2)?, number(b, 14, 2)?, number(b, 17, 2)?);
    if !punctuation(10, b"Tt ") || !punctuation(13, b":") || !punctuation(16, b":") {
        return None;
    }
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut at = 19;
    let mut nanos = 0;
    if punctuation(at, b".,") {
        let digits = b[at + 1..].iter().take_while(|c| c.is_ascii_digit()).count();
        if digits == 0 {
            return None;
        }
        nanos = number(b, at + 1, digits.min(9))? * 10_i64.pow(9 - digits.min(9) as u32);
        at += 1 + digits;
    }
    let offset = match b.get(at)? {
        b'Z' | b'z' if b.len() == at + 1 => 0,
        sign @ (b'+' | b'-') if b.len() == at + 6 && b[at + 3] == b':' => {
            let (h, m) = (number(b, at + 1, 2)?, number(b, at + 4, 2)?);
            if h > 23 || m > 59 {
                return None;
            }
            (h * 3_600 + m * 60) * if *sign == b'-' { -1 } else { 1 }
        }
        _ => return None,
    };
    let seconds = midnight + hour * 3_600 + minute * 60 + second - offset;
    seconds.checked_mul(NANOS)?.checked_add(nanos).map(Timestamp)
}

fn number(b: &[u8], at: usize, digits: usize) -> Option<i64> {
    b.get(at..at + digits)?
        .iter()
        .try_fold(0, |n, c| c.is_ascii_digit().then(|| n * 10 + i64::from(c - b'0')))
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_times() {
        for (ns, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400 * NANOS, "2000-02-29T00:00:00Z"),
            (-NANOS, "1969-12-31T23:59:59Z"),
            (1_777_338_256_656_000_000, "2026-04-28T01:04:16.656Z"),
            (1_777_338_256_000_001_000, "2026-04-28T01:04:16.000001Z"),
            (1_777_338_256_000_000_001, "2026-04-28T01:04:16.000000001Z"),
        ] {
            assert_eq!(Timestamp(ns).to_string(), text);
            assert_eq!(text.parse(), Ok(Timestamp(ns)));
        }
        assert_eq!(
            Timestamp(1_777_338_256_656_999_999).stamp(),
            "Apr 28 01:04:16.656"
        );
        assert_eq!(
            Timestamp(1_775_005_456_006_000_000).stamp(),
            "Apr  1 01:04:16.006"
        );
    }

    #[test]
    fn offsets_dates_and_nonsense() {
        let at = |s: &str| s.parse::<Timestamp>();
        assert_eq!(at("2026-04-28T03:04:16+02:00"), at("2026-04-28T01:04:16Z"));
        assert_eq!(at("2026-04-27T23:34:16-01:30"), at("2026-04-28T01:04:16Z"));
        assert_eq!(at("2026-04-28"), at("2026-04-28T00:00:00Z"));
        for bad in [
            "",
            "now",
            "2026-02-29",
            "2026-13-01",
            "2026-04-28T",
            "2026-04-28T01:04:16",
            "2026-04-28T25:00:00Z",
            "2026-04-28T01:04:16.Z",
            "2026-04-28T01:04:16+2",
            "2026-04-28T01:04:16Zx",
            "9999-01-01",
            "2026-04-é8",
        ] {
            assert_eq!(at(bad), Err(ParseTimeError), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(ns: i64) {
            let text = Timestamp(ns).to_string();
            // The earliest half second of the range has no seconds that fit.
            prop_assume!(ns > i64::MIN + NANOS);
            prop_assert_eq!(text.parse(), Ok(Timestamp(ns)));
        }
    }
}
