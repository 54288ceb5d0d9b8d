//! Counts records that are equal for the metrics together. An HTTP server under load causes thousands of records per
//! second that differ only in what no metric shows: the URL and the port of the client.

use palisade_inspect::record::{Record, What};

use super::{Hubble, Sample};

/// Largest number of different records that are counted together.
const MAX_GROUPS: usize = 16;

/// Records that are not counted yet: the first of each group of equal ones, and their number. [`Self::finish`] counts
/// them.
#[derive(Debug, Default)]
pub struct Batch(Vec<(Record, u64)>);

impl Batch {
    /// Adds a record. Counts it at once if it can be equal to no other one. Only for metrics that need no names
    /// ([`Hubble::needs_names`]).
    pub fn add(&mut self, record: &Record, hubble: &mut Hubble) {
        if let Some((_, times)) = self.0.iter_mut().find(|(known, _)| are_equal(known, record)) {
            *times += 1;
            return;
        }
        if !is_http(record) {
            hubble.count(&Sample::of_record(record));
            return;
        }
        if self.0.len() >= MAX_GROUPS {
            self.finish(hubble);
        }
        self.0.push((*record, 1));
    }

    /// Counts all records that were added.
    pub fn finish(&mut self, hubble: &mut Hubble) {
        for (record, times) in self.0.drain(..) {
            hubble.count(&Sample {
                times,
                ..Sample::of_record(&record)
            });
        }
    }
}

const fn is_http(record: &Record) -> bool {
    matches!(record.what, What::HttpRequest { .. } | What::HttpResponse { .. })
}

/// Returns whether both records are of HTTP and all metrics count them in the same time series.
fn are_equal(a: &Record, b: &Record) -> bool {
    let of_message = match (&a.what, &b.what) {
        (
            What::HttpRequest { method, version, .. },
            What::HttpRequest {
                method: other_method,
                version: other_version,
                ..
            },
        ) => method == other_method && version == other_version,
        (
            What::HttpResponse {
                method,
                version,
                status,
                ..
            },
            What::HttpResponse {
                method: other_method,
                version: other_version,
                status: other_status,
                ..
            },
        ) => method == other_method && version == other_version && status == other_status,
        _ => false,
    };
    let of_record = |record: &Record| {
        (
            (record.ingress, record.reply),
            record.protocol,
            record.verdict,
            record.reason,
            record.latency,
            (record.source.0, record.destination.0),
            // The destination port of a reply is that of the client, which no metric shows.
            (!record.reply).then_some(record.destination.1),
        )
    };
    of_message && of_record(a) == of_record(b)
}
