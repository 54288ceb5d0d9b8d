//! Description of a metric.

/// Type of a metric.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// A number that only grows while the daemon, or what it counts, exists.
    Counter,
    /// A number that can fall.
    Gauge,
    /// A distribution in buckets.
    Histogram,
    /// Text in labels; the value is 1.
    Info,
}

impl Kind {
    /// Returns the type's name in the text format.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Info => "info",
        }
    }
}

/// Name, help text, type, unit and labels of a metric.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Definition {
    /// Name with unit and suffix, for example `palisade_drop_bytes_total`.
    pub name: &'static str,
    /// Help text.
    pub help: &'static str,
    /// Type.
    pub kind: Kind,
    /// Base unit, if the name has one: `seconds`, `bytes`, `ratio`.
    pub unit: Option<&'static str>,
    /// Names of the labels. Metrics of Hubble have further labels by configuration.
    pub labels: &'static [&'static str],
}

impl Definition {
    /// Returns the name without the suffix that the OpenMetrics format adds to samples (`_total`, `_info`), and without
    /// the unit.
    pub(crate) fn base(&self) -> &'static str {
        let suffix = match self.kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        };
        let base = self.name.strip_suffix(suffix).unwrap_or(self.name);
        match self.unit {
            Some(unit) => base
                .strip_suffix(unit)
                .and_then(|base| base.strip_suffix('_'))
                .unwrap_or(base),
            None => base,
        }
    }
}
