//! Timestamps of flow records: RFC 3339 in UTC for JSON, and the formats of Hubble's command line in any time zone.

use std::{fmt, str::FromStr};

use jiff::{civil, fmt::rfc2822, tz::TimeZone};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use strum::{AsRefStr, EnumString, VariantArray};

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

    /// Returns the time as text in this format and time zone.
    #[must_use]
    pub fn text(self, format: TimeFormat, zone: &TimeZone) -> String {
        let time = self.calendar().to_zoned_datetime(zone.clone());
        let offset = if time.offset().is_zero() {
            "Z".to_owned()
        } else {
            time.strftime("%:z").to_string()
        };
        let until_seconds = |digits: usize| {
            let fraction = format!("{:09}", time.subsec_nanosecond());
            let fraction = fraction[..digits].trim_end_matches('0');
            let dot = if fraction.is_empty() { "" } else { "." };
            format!("{}{dot}{fraction}{offset}", time.strftime("%Y-%m-%dT%H:%M:%S"))
        };
        match format {
            TimeFormat::StampMilli => time.strftime("%b %e %H:%M:%S%.3f").to_string(),
            TimeFormat::YearMonthDay => time.strftime("%Y-%m-%d").to_string(),
            TimeFormat::YearMonthDayHour => format!("{}{offset}", time.strftime("%Y-%m-%dT%H")),
            TimeFormat::YearMonthDayHourMinute => format!("{}{offset}", time.strftime("%Y-%m-%dT%H:%M")),
            TimeFormat::Rfc3339 => until_seconds(0),
            TimeFormat::Rfc3339Milli => until_seconds(3),
            TimeFormat::Rfc3339Micro => until_seconds(6),
            TimeFormat::Rfc3339Nano => until_seconds(9),
            TimeFormat::Rfc1123Z => time.strftime("%a, %d %b %Y %H:%M:%S %z").to_string(),
        }
    }

    /// Parses a time in any of the formats that [`Timestamp::text`] writes, and dates and times as in `2026-04-28
    /// 01:04:16`. A text without an offset is in `zone`; without a year, the time is the last one before the end of the
    /// day `now`.
    ///
    /// # Errors
    /// [`ParseTimeError`] if the text has none of these formats.
    pub fn parse_in(text: &str, now: Self, zone: &TimeZone) -> Result<Self, ParseTimeError> {
        let text = text.trim();
        let in_zone = |time: civil::DateTime| {
            let time = time.to_zoned_datetime(zone.clone()).map_err(|_| ParseTimeError)?;
            Self::from_jiff(time.timestamp())
        };
        if let Ok(time) = text.parse::<jiff::Timestamp>() {
            return Self::from_jiff(time);
        }
        if let Ok(time) = rfc2822::parse(text) {
            return Self::from_jiff(time.timestamp());
        }
        if text.starts_with(|first: char| first.is_ascii_digit()) {
            return in_zone(text.parse().map_err(|_| ParseTimeError)?);
        }
        let parsed = jiff::fmt::strtime::parse("%b %d %H:%M:%S%.f", text)
            .or_else(|_| jiff::fmt::strtime::parse("%b %d %H:%M:%S", text))
            .map_err(|_| ParseTimeError)?;
        let clock = parsed.to_time().map_err(|_| ParseTimeError)?;
        let (month, day) = parsed.month().zip(parsed.day()).ok_or(ParseTimeError)?;
        let today = now.calendar().to_zoned_datetime(zone.clone()).date();
        // 29 February may be up to eight years ago.
        let dates = (0..=8).filter_map(|years| civil::Date::new(today.year() - years, month, day).ok());
        let date = dates.filter(|date| *date <= today).max().ok_or(ParseTimeError)?;
        in_zone(date.to_datetime(clock))
    }

    fn from_jiff(time: jiff::Timestamp) -> Result<Self, ParseTimeError> {
        i64::try_from(time.as_nanosecond())
            .map(Self)
            .map_err(|_| ParseTimeError)
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
        Self::from_jiff(time)
    }
}

/// Format of printed times. Names and formats are those of Hubble's `--time-format`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, AsRefStr, EnumString, VariantArray)]
#[strum(ascii_case_insensitive)]
pub enum TimeFormat {
    /// `Apr 28 01:04:16.656`, with the day padded by a space.
    #[default]
    StampMilli,
    /// `2026-04-28`.
    YearMonthDay,
    /// `2026-04-28T01Z`; here and below, the offset of UTC is `Z`, and that of others `+02:00`.
    YearMonthDayHour,
    /// `2026-04-28T01:04Z`.
    YearMonthDayHourMinute,
    /// `2026-04-28T01:04:16Z`.
    #[strum(serialize = "RFC3339")]
    Rfc3339,
    /// `2026-04-28T01:04:16.656Z`, without zeros at the end of the fraction; the same below.
    #[strum(serialize = "RFC3339Milli")]
    Rfc3339Milli,
    /// `2026-04-28T01:04:16.656789Z`.
    #[strum(serialize = "RFC3339Micro")]
    Rfc3339Micro,
    /// `2026-04-28T01:04:16.656789012Z`.
    #[strum(serialize = "RFC3339Nano")]
    Rfc3339Nano,
    /// `Tue, 28 Apr 2026 01:04:16 +0000`.
    #[strum(serialize = "RFC1123Z")]
    Rfc1123Z,
}

impl TimeFormat {
    /// Returns the names of all formats.
    pub fn names() -> impl Iterator<Item = &'static str> {
        Self::VARIANTS.iter().map(AsRef::as_ref)
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
        let stamp = |ns| Timestamp(ns).text(TimeFormat::StampMilli, &TimeZone::UTC);
        assert_eq!(stamp(1_777_338_256_656_999_999), "Apr 28 01:04:16.656");
        assert_eq!(stamp(1_775_005_456_006_000_000), "Apr  1 01:04:16.006");
    }

    fn berlin_in_summer() -> TimeZone {
        TimeZone::fixed(jiff::tz::offset(2))
    }

    #[test]
    fn formats_are_those_of_hubble_and_are_read_back() {
        let time = Timestamp(1_777_338_256_650_000_000);
        let now = Timestamp(time.0 + 86_400_000_000_000);
        for (format, utc, summer, unit) in [
            (
                TimeFormat::StampMilli,
                "Apr 28 01:04:16.650",
                "Apr 28 03:04:16.650",
                1,
            ),
            (TimeFormat::YearMonthDay, "2026-04-28", "2026-04-28", 0),
            (
                TimeFormat::YearMonthDayHour,
                "2026-04-28T01Z",
                "2026-04-28T03+02:00",
                3_600,
            ),
            (
                TimeFormat::YearMonthDayHourMinute,
                "2026-04-28T01:04Z",
                "2026-04-28T03:04+02:00",
                60,
            ),
            (
                TimeFormat::Rfc3339,
                "2026-04-28T01:04:16Z",
                "2026-04-28T03:04:16+02:00",
                1,
            ),
            (
                TimeFormat::Rfc3339Milli,
                "2026-04-28T01:04:16.65Z",
                "2026-04-28T03:04:16.65+02:00",
                1,
            ),
            (
                TimeFormat::Rfc3339Micro,
                "2026-04-28T01:04:16.65Z",
                "2026-04-28T03:04:16.65+02:00",
                1,
            ),
            (
                TimeFormat::Rfc3339Nano,
                "2026-04-28T01:04:16.65Z",
                "2026-04-28T03:04:16.65+02:00",
                1,
            ),
            (
                TimeFormat::Rfc1123Z,
                "Tue, 28 Apr 2026 01:04:16 +0000",
                "Tue, 28 Apr 2026 03:04:16 +0200",
                1,
            ),
        ] {
            for (zone, text) in [(TimeZone::UTC, utc), (berlin_in_summer(), summer)] {
                assert_eq!(time.text(format, &zone), text);
                let read = Timestamp::parse_in(text, now, &zone).expect(text);
                if unit > 0 {
                    assert!(
                        (time.0 - read.0) < unit * 1_000_000_000 && read <= time,
                        "{text}: {read}"
                    );
                }
            }
            assert_eq!(format.as_ref().to_lowercase().parse(), Ok(format));
        }
    }

    #[test]
    fn a_time_without_a_year_is_the_last_one() {
        let at = |text: &str, now: &str| {
            let now = now.parse().expect(now);
            Timestamp::parse_in(text, now, &TimeZone::UTC).map(|time| time.to_string())
        };
        let now = "2026-03-01T00:00:01Z";
        assert_eq!(
            at("Feb 28 01:04:16.5", now).as_deref(),
            Ok("2026-02-28T01:04:16.500Z")
        );
        assert_eq!(at("Mar  1 23:00:00", now).as_deref(), Ok("2026-03-01T23:00:00Z"));
        assert_eq!(
            at("Dec 31 23:59:59.999", now).as_deref(),
            Ok("2025-12-31T23:59:59.999Z")
        );
        assert_eq!(at("Feb 29 00:00:00", now).as_deref(), Ok("2024-02-29T00:00:00Z"));
        for bad in [
            "Feb 30 00:00:00",
            "Febr 1 00:00:00",
            "Feb 1",
            "Feb 1 25:00:00",
            "Feb",
            "2026-02-30",
            "",
        ] {
            assert_eq!(at(bad, now), Err(ParseTimeError), "{bad}");
        }
    }

    #[test]
    fn times_without_an_offset_are_in_the_zone() {
        let at =
            |text| Timestamp::parse_in(text, Timestamp(0), &berlin_in_summer()).map(|time| time.to_string());
        assert_eq!(at("2026-04-28").as_deref(), Ok("2026-04-27T22:00:00Z"));
        assert_eq!(
            at("2026-04-28 03:04:16.25").as_deref(),
            Ok("2026-04-28T01:04:16.250Z")
        );
        assert_eq!(at("2026-04-28T03:04").as_deref(), Ok("2026-04-28T01:04:00Z"));
        assert_eq!(at("2026-04-28T03:04Z").as_deref(), Ok("2026-04-28T03:04:00Z"));
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
