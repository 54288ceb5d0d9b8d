//! The text formats: OpenMetrics 1.0, written by `prometheus-client`, and Prometheus' own format 0.0.4, made from it.

use std::fmt::Write as _;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::MetricType,
    registry::{Registry, Unit},
};

use crate::{Family, Kind, Value};

/// A text format.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Format {
    /// Prometheus' text format, version 0.0.4.
    #[default]
    Text,
    /// OpenMetrics, version 1.0.0.
    OpenMetrics,
}

/// Media type of OpenMetrics.
const OPEN_METRICS: &str = "application/openmetrics-text";

impl Format {
    /// Returns the format that a client prefers by the header field `Accept` (RFC 9110, section 12.5.1). A client that
    /// does not name OpenMetrics gets the text format.
    #[must_use]
    pub fn of_accept(accept: &str) -> Self {
        let (mut open, mut text) = (0.0, 0.0_f32);
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let media = parts.next().unwrap_or_default();
            let quality = parts
                .filter_map(|parameter| parameter.split_once('='))
                .find(|(name, _)| name.trim().eq_ignore_ascii_case("q"))
                .and_then(|(_, value)| value.trim().parse::<f32>().ok())
                .unwrap_or(1.0);
            if media.eq_ignore_ascii_case(OPEN_METRICS) {
                open = quality.max(open);
            } else if media.eq_ignore_ascii_case("text/plain") {
                text = quality.max(text);
            }
        }
        if open > 0.0 && open >= text {
            Self::OpenMetrics
        } else {
            Self::Text
        }
    }

    /// Returns the value of the header field `Content-Type`.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Returns the metrics as text.
#[must_use]
pub fn encode(families: Vec<Family>, format: Format) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Families(families)));
    let mut text = String::new();
    // Writing to a string cannot fail, and no value of this crate fails to encode.
    let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
    match format {
        Format::OpenMetrics => text,
        Format::Text => plain(&text),
    }
}

#[derive(Debug)]
struct Families(Vec<Family>);

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for family in &self.0 {
            let definition = family.definition;
            let kind = match definition.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Histogram => MetricType::Histogram,
                Kind::Info => MetricType::Info,
            };
            let unit = definition.unit.map(|unit| Unit::Other(unit.to_owned()));
            let mut metric =
                encoder.encode_descriptor(definition.base(), definition.help, unit.as_ref(), kind)?;
            for row in &family.rows {
                let values = row.labels.iter().map(|value| &**value);
                let labels: Vec<(&str, &str)> = family.labels.iter().copied().zip(values).collect();
                if definition.kind == Kind::Info {
                    metric.encode_info(&labels)?;
                } else if labels.is_empty() {
                    Sample(definition.kind, &row.value).encode(metric_of(&mut metric)?)?;
                } else {
                    Sample(definition.kind, &row.value).encode(metric.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

/// Returns an encoder for a time series without labels.
fn metric_of<'a>(metric: &'a mut MetricEncoder<'_>) -> Result<MetricEncoder<'a>, std::fmt::Error> {
    metric.encode_family(&NO_LABELS)
}

const NO_LABELS: [(&str, &str); 0] = [];

#[derive(Debug)]
struct Sample<'a>(Kind, &'a Value);

impl EncodeMetric for Sample<'_> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        match (self.0, self.1) {
            (Kind::Counter, Value::Count(count)) => encoder.encode_counter::<NoLabelSet, _, u64>(count, None),
            (Kind::Counter, Value::Number(number)) => {
                encoder.encode_counter::<NoLabelSet, _, f64>(number, None)
            }
            (_, Value::Count(count)) => encoder.encode_gauge(count),
            (_, Value::Number(number)) => encoder.encode_gauge(number),
            (_, Value::Histogram(histogram)) => encoder.encode_histogram::<NoLabelSet>(
                histogram.sum(),
                histogram.count(),
                &histogram.buckets(),
                None,
            ),
        }
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Unknown
    }
}

/// Returns OpenMetrics in the text format 0.0.4. In it the name of a counter or info metric has its suffix also in
/// `HELP` and `TYPE`, the type `info` does not exist, and neither do `UNIT` and `EOF`.
fn plain(open: &str) -> String {
    let mut text = String::with_capacity(open.len());
    // The help line comes before the type, which determines the suffix of the name.
    let mut help = "";
    for line in open.lines() {
        let Some(comment) = line.strip_prefix("# ") else {
            text.push_str(line);
            text.push('\n');
            continue;
        };
        match comment.split_once(' ') {
            Some(("HELP", rest)) => help = rest,
            Some(("TYPE", rest)) => {
                let (name, kind) = rest.split_once(' ').unwrap_or((rest, ""));
                let (suffix, kind) = match kind {
                    "counter" => ("_total", kind),
                    "info" => ("_info", "gauge"),
                    _ => ("", kind),
                };
                let description = help.split_once(' ').map_or("", |(_, text)| text);
                let _ = writeln!(
                    text,
                    "# HELP {name}{suffix} {description}\n# TYPE {name}{suffix} {kind}"
                );
            }
            _ => {}
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Definition, Histogram, Report};

    static HITS: Definition = Definition {
        name: "hits_total",
        help: "Hits.",
        kind: Kind::Counter,
        unit: None,
        labels: &["name"],
    };
    static SENT: Definition = Definition {
        name: "sent_bytes_total",
        help: "Bytes.",
        kind: Kind::Counter,
        unit: Some("bytes"),
        labels: &[],
    };
    static WAIT: Definition = Definition {
        name: "wait_seconds",
        help: "Wait.",
        kind: Kind::Histogram,
        unit: Some("seconds"),
        labels: &[],
    };
    static BUILD: Definition = Definition {
        name: "build_info",
        help: "Build.",
        kind: Kind::Info,
        unit: None,
        labels: &["version"],
    };
    static LEVEL: Definition = Definition {
        name: "level",
        help: "Level.",
        kind: Kind::Gauge,
        unit: None,
        labels: &[],
    };

    fn families() -> Vec<Family> {
        let mut report = Report::default();
        report.add(&HITS, &["a\"b\\c\nhits_total 9"], 3_u64);
        report.add(&SENT, &[], 4_u64);
        let mut histogram = Histogram::new(&[0.5, 1.0]);
        for value in [0.25, 0.5, 7.0] {
            histogram.observe(value);
        }
        report.add(&WAIT, &[], Value::Histogram(histogram));
        report.info(&BUILD, &["1.2"]);
        report.add(&LEVEL, &[], 0.5);
        let all = report.into_families();
        all.into_iter().filter(|family| !family.rows.is_empty()).collect()
    }

    #[test]
    fn both_formats_name_every_sample_as_its_definition_does() {
        let samples = "hits_total{name=\"a\\\"b\\\\c\\nhits_total 9\"} 3\n";
        assert_eq!(
            encode(families(), Format::OpenMetrics),
            format!(
                "# HELP hits Hits.\n# TYPE hits counter\n{samples}\
                 # HELP sent_bytes Bytes.\n# TYPE sent_bytes counter\n# UNIT sent_bytes bytes\nsent_bytes_total 4\n\
                 # HELP wait_seconds Wait.\n# TYPE wait_seconds histogram\n# UNIT wait_seconds seconds\n\
                 wait_seconds_sum 7.75\nwait_seconds_count 3\nwait_seconds_bucket{{le=\"0.5\"}} 2\n\
                 wait_seconds_bucket{{le=\"1.0\"}} 2\nwait_seconds_bucket{{le=\"+Inf\"}} 3\n\
                 # HELP build Build.\n# TYPE build info\nbuild_info{{version=\"1.2\"}} 1\n\
                 # HELP level Level.\n# TYPE level gauge\nlevel 0.5\n# EOF\n"
            )
        );
        assert_eq!(
            encode(families(), Format::Text),
            format!(
                "# HELP hits_total Hits.\n# TYPE hits_total counter\n{samples}\
                 # HELP sent_bytes_total Bytes.\n# TYPE sent_bytes_total counter\nsent_bytes_total 4\n\
                 # HELP wait_seconds Wait.\n# TYPE wait_seconds histogram\n\
                 wait_seconds_sum 7.75\nwait_seconds_count 3\nwait_seconds_bucket{{le=\"0.5\"}} 2\n\
                 wait_seconds_bucket{{le=\"1.0\"}} 2\nwait_seconds_bucket{{le=\"+Inf\"}} 3\n\
                 # HELP build_info Build.\n# TYPE build_info gauge\nbuild_info{{version=\"1.2\"}} 1\n\
                 # HELP level Level.\n# TYPE level gauge\nlevel 0.5\n"
            )
        );
    }

    #[test]
    fn a_client_gets_open_metrics_only_if_it_prefers_it() {
        for (accept, format) in [
            ("", Format::Text),
            ("*/*", Format::Text),
            ("text/plain", Format::Text),
            ("application/openmetrics-text", Format::OpenMetrics),
            (
                "application/openmetrics-text;version=1.0.0;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                Format::OpenMetrics,
            ),
            (
                "text/plain;q=0.9, application/openmetrics-text; q=0.8",
                Format::Text,
            ),
            ("application/openmetrics-text;q=0", Format::Text),
            ("application/openmetrics-text;q=x", Format::OpenMetrics),
            (";;;,,=,q=,", Format::Text),
        ] {
            assert_eq!(Format::of_accept(accept), format, "{accept}");
        }
    }

    /// Returns the value of a label between its quotation marks. There must be no quotation mark without an escape.
    fn unescaped(text: &str) -> String {
        let mut value = String::new();
        let mut rest = text.chars();
        while let Some(character) = rest.next() {
            value.push(match character {
                '\\' => match rest.next() {
                    Some('n') => '\n',
                    Some(escaped @ ('\\' | '"')) => escaped,
                    other => panic!("{other:?} is escaped in {text}"),
                },
                '"' => panic!("{text}"),
                other => other,
            });
        }
        value
    }

    proptest::proptest! {
        #[test]
        fn no_value_of_a_label_adds_a_line_or_ends_its_quotation(values in proptest::collection::vec("(?s).*", 1..4)) {
            let mut report = Report::default();
            for value in &values {
                report.add(&HITS, &[value], 1_u64);
            }
            let all = report.into_families().into_iter().filter(|family| !family.rows.is_empty());
            let text = encode(all.collect(), Format::Text);
            let lines: Vec<&str> = text.split_terminator('\n').collect();
            assert_eq!(lines.len(), 2 + values.len(), "{text}");
            for (line, value) in lines[2..].iter().zip(&values) {
                let quoted = line.strip_prefix("hits_total{name=\"").and_then(|line| line.strip_suffix("\"} 1"));
                let quoted = quoted.unwrap_or_else(|| panic!("{line}"));
                assert_eq!(&unescaped(quoted), value);
            }
        }

        #[test]
        fn any_accept_field_has_a_format(accept in "(?s).*") {
            let _ = Format::of_accept(&accept);
        }
    }
}
