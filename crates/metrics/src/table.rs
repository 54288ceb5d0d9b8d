//! The time series of one metric, bounded in number.
//!
//! Peers choose the values of some labels: addresses, ports, query names, HTTP methods. A new time series beyond the
//! limit is counted under [`OVERFLOW`] in all labels with values that are not from a fixed list.

use std::{
    borrow::Cow,
    hash::{BuildHasher as _, Hash as _, Hasher as _, RandomState},
    sync::Arc,
    time::Duration,
};

use hashbrown::HashTable;

use crate::{Definition, Family, Histogram, Row, Value, identifier::Identifier};

/// Value of labels in time series beyond the limit.
pub const OVERFLOW: &str = "_overflow";
/// Longest value of a label, bytes; longer ones are truncated.
const MAX_VALUE_BYTES: usize = 256;

/// A time series in a table.
#[derive(Debug)]
struct Series {
    row: Row,
    /// What the values of the last labels show; the labels before show nothing of an end.
    shows: Box<[Option<Identifier>]>,
    /// Time since which a value shows an end that does not exist.
    gone: Option<Duration>,
}

/// Time series of one metric, at most `limit`, and those with [`OVERFLOW`].
#[derive(Debug)]
pub struct Table {
    definition: &'static Definition,
    labels: Arc<[&'static str]>,
    /// For each label, whether its values are from a fixed list.
    fixed: Box<[bool]>,
    limit: usize,
    bounds: &'static [f64],
    series: HashTable<Series>,
    hasher: RandomState,
    /// Number of time series beyond the limit, with [`OVERFLOW`].
    beyond: usize,
    overflowed: u64,
    ended: u64,
}

impl Table {
    /// Returns an empty table. `labels`: the names of the labels, each with whether its values are from a fixed list.
    /// `bounds`: the bounds of the buckets of a histogram; empty for a counter.
    #[must_use]
    pub fn new(
        definition: &'static Definition,
        labels: &[(&'static str, bool)],
        limit: usize,
        bounds: &'static [f64],
    ) -> Self {
        Self {
            definition,
            labels: labels.iter().map(|(name, _)| *name).collect(),
            fixed: labels.iter().map(|(_, fixed)| *fixed).collect(),
            limit,
            bounds,
            series: HashTable::new(),
            hasher: RandomState::new(),
            beyond: 0,
            overflowed: 0,
            ended: 0,
        }
    }

    /// Increments a counter.
    pub fn increment(&mut self, labels: &[Cow<'_, str>]) {
        self.add(labels, 1);
    }

    /// Adds to a counter.
    pub fn add(&mut self, labels: &[Cow<'_, str>], more: u64) {
        self.add_to(labels, &[], more);
    }

    /// Like [`Self::add`]. `shows`: what the values of the last labels show.
    pub(crate) fn add_to(&mut self, labels: &[Cow<'_, str>], shows: &[Option<Identifier>], more: u64) {
        if let Value::Count(count) = self.value(labels, shows, more) {
            *count += more;
        }
    }

    /// Counts a value in a histogram, `times` times. `shows`: as for [`Self::add_to`].
    pub(crate) fn observe(
        &mut self,
        labels: &[Cow<'_, str>],
        shows: &[Option<Identifier>],
        value: f64,
        times: u64,
    ) {
        if let Value::Histogram(histogram) = self.value(labels, shows, times) {
            histogram.observe_times(value, times);
        }
    }

    /// Returns the name of the metric.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.definition.name
    }

    /// Returns how many times a time series beyond the limit was counted.
    #[must_use]
    pub const fn overflowed(&self) -> u64 {
        self.overflowed
    }

    /// Returns how many time series were ended ([`Self::end`]).
    pub(crate) const fn ended(&self) -> u64 {
        self.ended
    }

    /// Removes each time series of which a label shows, for at least `grace`, an end that does not exist. `now`: a clock
    /// that does not go backwards. `exists` returns whether an end exists of which an identifier shows this value.
    pub(crate) fn end(&mut self, now: Duration, grace: Duration, exists: impl Fn(Identifier, &str) -> bool) {
        let before = self.series.len();
        self.series.retain(|series| {
            let shown = series.row.labels.iter().rev().zip(series.shows.iter().rev());
            let mut shown = shown.filter_map(|(value, shows)| Some((shows.as_ref()?, value)));
            if shown.all(|(shows, value)| exists(*shows, value)) {
                series.gone = None;
                return true;
            }
            now.saturating_sub(*series.gone.get_or_insert(now)) < grace
        });
        self.ended += (before - self.series.len()) as u64;
    }

    /// Returns the time series, sorted by the values of their labels.
    #[must_use]
    pub fn family(&self) -> Family {
        let mut rows: Vec<Row> = self.series.iter().map(|series| series.row.clone()).collect();
        rows.sort_by(|a, b| a.labels.cmp(&b.labels));
        Family {
            definition: self.definition,
            labels: Arc::clone(&self.labels),
            rows,
        }
    }

    /// Returns the value of a time series. `times`: how many flows are counted in it.
    fn value(&mut self, labels: &[Cow<'_, str>], shows: &[Option<Identifier>], times: u64) -> &mut Value {
        let hash = self.hash(labels);
        let known = self.series.find(hash, |series| is(&series.row, labels)).is_some();
        if known || self.series.len() - self.beyond < self.limit {
            return self.entry(hash, labels, shows);
        }
        self.overflowed += times;
        let mut other = labels.to_vec();
        for (value, fixed) in other.iter_mut().zip(&self.fixed) {
            if !fixed {
                *value = Cow::Borrowed(OVERFLOW);
            }
        }
        let hash = self.hash(&other);
        let known = self.series.find(hash, |series| is(&series.row, &other));
        self.beyond += usize::from(known.is_none());
        self.entry(hash, &other, &[])
    }

    fn entry(&mut self, hash: u64, labels: &[Cow<'_, str>], shows: &[Option<Identifier>]) -> &mut Value {
        let Self {
            series,
            hasher,
            bounds,
            ..
        } = self;
        let entry = series.entry(
            hash,
            |series| is(&series.row, labels),
            |series| hash_of(hasher, series.row.labels.iter().map(|value| &**value)),
        );
        let series = entry.or_insert_with(|| Series {
            row: Row {
                labels: labels.iter().map(|value| Box::from(shortened(value))).collect(),
                value: if bounds.is_empty() {
                    Value::Count(0)
                } else {
                    Value::Histogram(Histogram::new(bounds))
                },
            },
            shows: shows.into(),
            gone: None,
        });
        &mut series.into_mut().row.value
    }

    fn hash(&self, labels: &[Cow<'_, str>]) -> u64 {
        hash_of(&self.hasher, labels.iter().map(|value| shortened(value)))
    }
}

fn is(row: &Row, labels: &[Cow<'_, str>]) -> bool {
    let values = row.labels.iter().map(|value| &**value);
    values.eq(labels.iter().map(|value| shortened(value)))
}

fn hash_of<'a>(hasher: &RandomState, values: impl Iterator<Item = &'a str>) -> u64 {
    let mut state = hasher.build_hasher();
    for value in values {
        value.hash(&mut state);
    }
    state.finish()
}

/// Returns the first [`MAX_VALUE_BYTES`] of a value, at a boundary of characters.
pub(crate) fn shortened(value: &str) -> &str {
    let mut end = value.len().min(MAX_VALUE_BYTES);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    value.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    static REQUESTS: Definition = Definition {
        name: "requests_total",
        help: "Requests.",
        kind: Kind::Counter,
        unit: None,
        labels: &["verdict", "peer"],
    };

    fn table(limit: usize) -> Table {
        Table::new(&REQUESTS, &[("verdict", true), ("peer", false)], limit, &[])
    }

    fn rows(table: &Table) -> Vec<(String, Value)> {
        let rows = table.family().rows.into_iter();
        rows.map(|row| (row.labels.join(" "), row.value)).collect()
    }

    #[test]
    fn series_beyond_the_limit_are_counted_under_overflow_by_their_fixed_labels() {
        let mut table = table(3);
        for n in 0..1_000 {
            let verdict = if n % 2 == 0 { "yes" } else { "no" };
            table.increment(&[verdict.into(), format!("peer{n}").into()]);
        }
        table.increment(&["yes".into(), "peer0".into()]);
        assert_eq!(
            rows(&table),
            [
                ("no _overflow".to_owned(), Value::Count(499)),
                ("no peer1".to_owned(), Value::Count(1)),
                ("yes _overflow".to_owned(), Value::Count(498)),
                ("yes peer0".to_owned(), Value::Count(2)),
                ("yes peer2".to_owned(), Value::Count(1)),
            ]
        );
        assert_eq!(table.overflowed(), 997);
    }

    #[test]
    fn values_of_a_peer_are_truncated_at_a_character() {
        let mut table = table(10);
        let long = "ä".repeat(1_000);
        table.increment(&["yes".into(), long.as_str().into()]);
        table.increment(&["yes".into(), format!("{long}x").into()]);
        let rows = rows(&table);
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].0, format!("yes {}", "ä".repeat(128)));
        assert_eq!(rows[0].1, Value::Count(2));
    }

    #[test]
    fn labels_with_the_same_concatenation_are_different_series() {
        let mut table = table(10);
        table.increment(&["a".into(), "bc".into()]);
        table.increment(&["ab".into(), "c".into()]);
        assert_eq!(rows(&table).len(), 2);
    }
}
