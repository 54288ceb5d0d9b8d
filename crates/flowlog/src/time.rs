//! Timestamps of flow records, in UTC: RFC 3339, and the first column of the compact output.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Nanoseconds since 1970-01-01T00:00:00Z, up to the year 2262.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Timestamp(pub i64);

/// Error for a text that is not an RFC 3339 time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not an RFC 3339 time such as 2026-04-28T01:04:16Z")]
pub struct ParseTimeError;

impl Timestamp {
    /// Latest representable time.
    pub const MAX: Self = Self(i64::MAX);

    /// Returns the timestamp `time` before this one; saturates.
    #[must_use]
    pub fn before(self, time: std::time::Duration) -> Self {
        Self(
            self.0
                .saturating_sub(i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)),
        )
    }

    /// Converts a time of the system clock; saturates.
    #[must_use]
    pub fn from_system_time(time: std::time::SystemTime) -> Self {
        let ns = match time.duration_since(std::time::UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |ns| -ns),
        };
        Self(ns)
    }

    /// Returns a text such as `Apr 28 01:04:16.656`, UTC, with the day padded by a space: the first column of Hubble's
    /// compact output.
    #[must_use]
    pub fn stamp(self) -> String {
        self.calendar().strftime("%b %e %H:%M:%S%.3f").to_string()
    }

    fn calendar(self) -> jiff::Timestamp {
        // The default is never used: the range of `jiff`, years -9999 to 9999, contains every number of nanoseconds in
        // an `i64`.
        jiff::Timestamp::from_nanosecond(self.0.into()).unwrap_or_default()
    }
}

/// Formats a time by RFC 3339, with 0, 3, 6 or 9 decimal places of a second, as the JSON mapping of protobuf timestamps
/// requires.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = match self.0 {
            ns if ns % 1_000_000_000 == 0 => 0,
            ns if ns % 1_000_000 == 0 => 3,
            ns if ns % 1_000 == 0 => 6,
            _ => 9,
        };
        write!(f, "{:.digits$}", self.calendar())
    }
}

/// Parses a time in RFC 3339 (`2026-04-28T01:04:16.5+02:00`), or a date alone, which stands for 00:00 UTC of that day.
impl FromStr for Timestamp {
    type Err = ParseTimeError;

    fn from_str(s: &str) -> Result<Self, ParseTimeError> {
        // A date has 10 characters. `Date` would also accept a time without an offset, which is not RFC 3339.
        let time = if s.len() == 10 {
            let date: jiff::civil::Date = s.parse().map_err(|_| ParseTimeError)?;
            let midnight =
                jiff::tz::Offset::UTC.to_timestamp(date.to_datetime(jiff::civil::Time::midnight()));
            midnight.map_err(|_| ParseTimeError)?
        } else {
            s.parse().map_err(|_| ParseTimeError)?
        };
        let ns = i64::try_from(time.as_nanosecond()).map_err(|_| ParseTimeError)?;
        Ok(Self(ns))
    }
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
    fn formats_known_times() {
        for (ns, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400_000_000_000, "2000-02-29T00:00:00Z"),
            (-1_000_000_000, "1969-12-31T23:59:59Z"),
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
    fn parses_offsets_and_dates_and_refuses_others() {
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
        fn display_and_parse_are_inverse(ns: i64) {
            let text = Timestamp(ns).to_string();
            prop_assert_eq!(text.parse(), Ok(Timestamp(ns)));
        }
    }
}
