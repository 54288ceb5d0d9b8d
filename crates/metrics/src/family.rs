//! The values of metrics at one time.

use std::sync::Arc;

use crate::{Definition, Kind, own};

/// A distribution in buckets.
#[derive(Clone, PartialEq, Debug)]
pub struct Histogram {
    /// Upper bounds of the buckets, without infinity.
    bounds: &'static [f64],
    /// Number of observations in each bucket; the last is for values above all bounds.
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    /// Returns a histogram without observations. `bounds`: the upper bounds of the buckets in ascending order.
    #[must_use]
    pub fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: vec![0; bounds.len() + 1],
            sum: 0.0,
        }
    }

    /// Counts a value.
    pub fn observe(&mut self, value: f64) {
        self.observe_times(value, 1);
    }

    /// Counts a value `times` times.
    pub(crate) fn observe_times(&mut self, value: f64, times: u64) {
        let bucket = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += times;
        }
        self.sum += value * times as f64;
    }

    pub(crate) const fn sum(&self) -> f64 {
        self.sum
    }

    pub(crate) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Returns the buckets with their upper bounds; the last bound is infinity.
    pub(crate) fn buckets(&self) -> Vec<(f64, u64)> {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(self.counts.iter().copied()).collect()
    }
}

/// Value of a time series.
#[derive(Clone, PartialEq, Debug)]
pub enum Value {
    /// A whole number.
    Count(u64),
    /// Any number.
    Number(f64),
    /// A distribution.
    Histogram(Histogram),
}

impl From<u64> for Value {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<usize> for Value {
    fn from(count: usize) -> Self {
        Self::Count(count as u64)
    }
}

impl From<bool> for Value {
    fn from(is: bool) -> Self {
        Self::Count(is.into())
    }
}

impl From<f64> for Value {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

/// A time series: the values of the labels, and the value.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// Values of the labels, in the order of [`Family::labels`].
    pub labels: Box<[Box<str>]>,
    /// Value.
    pub value: Value,
}

/// A metric with all of its time series.
#[derive(Clone, PartialEq, Debug)]
pub struct Family {
    /// Description.
    pub definition: &'static Definition,
    /// Names of the labels.
    pub labels: Arc<[&'static str]>,
    /// Time series.
    pub rows: Vec<Row>,
}

impl Family {
    /// Returns a family without time series.
    #[must_use]
    pub fn new(definition: &'static Definition) -> Self {
        Self {
            definition,
            labels: definition.labels.into(),
            rows: Vec::new(),
        }
    }
}

/// Values of the metrics of [`crate::own`], collected for one scrape.
#[derive(Debug)]
pub struct Report(Vec<Family>);

impl Default for Report {
    /// Returns all metrics of [`own`] without time series, so that each scrape names all of them.
    fn default() -> Self {
        Self(
            own::ALL
                .iter()
                .map(|definition| Family::new(definition))
                .collect(),
        )
    }
}

impl Report {
    /// Adds a time series. `labels` are the values of the metric's labels, in the order of its definition.
    pub fn add(&mut self, definition: &'static Definition, labels: &[&str], value: impl Into<Value>) {
        debug_assert_eq!(labels.len(), definition.labels.len(), "{}", definition.name);
        let row = Row {
            labels: labels.iter().map(|label| Box::from(*label)).collect(),
            value: value.into(),
        };
        match self
            .0
            .iter_mut()
            .find(|family| family.definition.name == definition.name)
        {
            Some(family) => family.rows.push(row),
            None => self.0.push(Family {
                rows: vec![row],
                ..Family::new(definition)
            }),
        }
    }

    /// Adds an info metric, whose value is 1.
    pub fn info(&mut self, definition: &'static Definition, labels: &[&str]) {
        debug_assert_eq!(definition.kind, Kind::Info, "{}", definition.name);
        self.add(definition, labels, 1_u64);
    }

    /// Adds a metric with all of its time series.
    pub fn family(&mut self, family: Family) {
        let name = family.definition.name;
        match self.0.iter_mut().find(|known| known.definition.name == name) {
            Some(known) => *known = family,
            None => self.0.push(family),
        }
    }

    /// Returns the metrics.
    #[must_use]
    pub fn into_families(self) -> Vec<Family> {
        self.0
    }
}
