//! Metrics in the formats of Prometheus: [`Hubble`] counts flow records under the names and labels of Cilium's Hubble,
//! [`own`] lists the metrics of Palisade itself, [`encode`] writes both as text.
//!
//! The crate does no I/O and reads no clock. The daemon passes the flows of its ring to [`Hubble`], and writes the
//! values of its own metrics into a [`Report`] when a client scrapes them. The number of time series of each metric
//! whose labels a peer can influence is bounded ([`Table`]).
//!
//! Depends on `palisade-flowlog` (flows) and `palisade-inspect` (records). Start at [`Hubble`] and [`own`].
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

mod definition;
mod family;
mod hubble;
mod identifier;
pub mod own;
mod table;
mod text;

pub use definition::{Definition, Kind};
pub use family::{Family, Histogram, Report, Row, Value};
pub use hubble::{ALL as HUBBLE, Batch, Ends, Hubble, HubbleMetric, Lost, Sample, check, reason_name};
pub use table::{OVERFLOW, Table};
pub use text::{Format, encode};
