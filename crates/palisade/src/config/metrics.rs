//! `[metrics]`: the HTTP server of metrics and health.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use palisade_metrics::HubbleMetric;

use super::reader::{At, Section};

/// Metrics of Hubble without the option `hubble`.
const DEFAULT_HUBBLE: [&str; 6] = ["dns", "drop", "tcp", "flow", "icmp", "http"];
/// Largest value of `series_per_metric`.
const MAX_SERIES: u64 = 1_000_000;
/// Bounds of `series_grace`.
const MIN_SERIES_GRACE: Duration = Duration::from_secs(1);
const MAX_SERIES_GRACE: Duration = Duration::from_secs(86_400);
/// `series_grace` if it is not set: two intervals between scrapes with the default of Prometheus.
const DEFAULT_SERIES_GRACE: Duration = Duration::from_secs(120);

/// Paths of the certificates of a TCP listener, PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CertificateFiles {
    /// Certificate of the server, and the certificates up to its root.
    pub certificate: PathBuf,
    /// Private key of the certificate.
    pub key: PathBuf,
    /// Certificates of the authorities of clients; `None`: clients need no certificate.
    pub client_ca: Option<PathBuf>,
}

/// `[metrics]`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Metrics {
    /// Address of the server; `None` for no server.
    pub listen: Option<SocketAddr>,
    /// Certificates of the server; `None`: clear text.
    pub tls: Option<CertificateFiles>,
    /// Metrics of Hubble.
    pub hubble: Vec<HubbleMetric>,
    /// Largest number of time series of one metric whose labels peers can choose.
    pub series_per_metric: usize,
    /// Time for which time series of removed ends of flows remain.
    pub series_grace: Duration,
}

pub(super) fn read(section: Section<'_, '_>) -> Metrics {
    let tls = tls(&section);
    let metrics = Metrics {
        listen: listen(&section, tls.is_some()),
        tls,
        hubble: hubble(&section),
        series_per_metric: section
            .integer("series_per_metric", 1..MAX_SERIES + 1)
            .and_then(|limit| usize::try_from(limit).ok())
            .unwrap_or(2_000),
        series_grace: section
            .duration("series_grace", MIN_SERIES_GRACE..MAX_SERIES_GRACE)
            .unwrap_or(DEFAULT_SERIES_GRACE),
    };
    section.finish();
    metrics
}

fn tls(section: &Section<'_, '_>) -> Option<CertificateFiles> {
    let certificate = section.absolute_path("tls_certificate");
    let key = section.absolute_path("tls_key");
    let client_ca = section.absolute_path("client_ca");
    match (certificate, key) {
        (Some(certificate), Some(key)) => Some(CertificateFiles {
            certificate,
            key,
            client_ca,
        }),
        (None, None) => {
            if client_ca.is_some() {
                section.error("metrics.client_ca needs metrics.tls_certificate and metrics.tls_key");
            }
            None
        }
        _ => {
            section.error("metrics.tls_certificate and metrics.tls_key belong together: set both or none");
            None
        }
    }
}

fn listen(section: &Section<'_, '_>, with_tls: bool) -> Option<SocketAddr> {
    let at = section.string("listen")?;
    let address = match at.value.parse::<SocketAddr>() {
        Ok(address) => address,
        Err(error) => {
            section.error_at(
                at.offset,
                format!(
                    "metrics.listen: '{}' is no address with a port ({error}); write for example \"127.0.0.1:9965\" or \
                     \"[::1]:9965\"",
                    at.value
                ),
            );
            return None;
        }
    };
    if !address.ip().is_loopback() && !with_tls {
        section.error_at(
            at.offset,
            format!(
                "metrics.listen: {address} is not a loopback address, and names of policies, endpoints and peers would \
                 cross the network in clear text: set metrics.tls_certificate and metrics.tls_key, or use 127.0.0.1 or [::1]"
            ),
        );
        return None;
    }
    Some(address)
}

fn hubble(section: &Section<'_, '_>) -> Vec<HubbleMetric> {
    let wanted = "a list of metrics: [\"drop\", \"dns:query;ignoreAAAA\"]";
    let metrics: Vec<At<HubbleMetric>> = match section.list("hubble", wanted, str::parse) {
        Some(metrics) => metrics,
        None => {
            let defaults = DEFAULT_HUBBLE.iter().filter_map(|name| name.parse().ok());
            return defaults.collect();
        }
    };
    let offsets: Vec<usize> = metrics.iter().map(|at| at.offset).collect();
    let metrics: Vec<HubbleMetric> = metrics.into_iter().map(|at| at.value).collect();
    if let Err((index, problem)) = palisade_metrics::check(&metrics) {
        let offset = offsets.get(index).copied().unwrap_or_default();
        section.error_at(offset, format!("metrics.hubble: {problem}"));
    }
    metrics
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::config::Config;

    fn errors(text: &str) -> Vec<String> {
        let errors = Config::parse(Path::new("/p.toml"), text)
            .err()
            .unwrap_or_default();
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn metrics_are_off_by_default_and_on_at_loopback_addresses() {
        let parse = |text: &str| Config::parse(Path::new("/p.toml"), text).unwrap().metrics;
        assert_eq!(parse("[node]\nname = \"n\"\n").listen, None);
        for address in ["127.0.0.1:9965", "127.3.2.1:1", "[::1]:9965"] {
            let metrics = parse(&format!("[metrics]\nlisten = \"{address}\"\n"));
            assert_eq!(metrics.listen, Some(address.parse().unwrap()));
            assert_eq!((metrics.hubble.len(), metrics.series_per_metric), (6, 2_000));
            assert_eq!(metrics.series_grace.as_secs(), 120);
        }
        assert!(parse("[metrics]\nhubble = []\n").hubble.is_empty());
        let tls = "listen = \"0.0.0.0:1\"\ntls_certificate = \"/c\"\ntls_key = \"/k\"\n";
        assert!(parse(&format!("[metrics]\n{tls}")).listen.is_some());
    }

    #[test]
    fn errors_have_the_place_of_the_value() {
        for (line, wanted) in [
            (
                "listen = \"0.0.0.0:9965\"",
                "/p.toml:2:10: metrics.listen: 0.0.0.0:9965 is not a loopback address",
            ),
            ("listen = \"[::]:9965\"", "[::]:9965 is not a loopback address"),
            (
                "listen = \"[::ffff:127.0.0.1]:9965\"",
                "is not a loopback address",
            ),
            (
                "listen = \"localhost:9965\"",
                "'localhost:9965' is no address with a port",
            ),
            ("listen = 9965", "metrics.listen must be a string"),
            (
                "hubble = [\"drop\", \"flows\"]",
                "/p.toml:2:19: metrics.hubble: 'flows' is no metric",
            ),
            (
                "hubble = [\"http\", \"httpV2\"]",
                "/p.toml:2:19: metrics.hubble: 'httpV2' counts the same",
            ),
            ("hubble = \"drop\"", "metrics.hubble must be a list of metrics"),
            (
                "series_per_metric = 0",
                "metrics.series_per_metric must be between 1 and 1000000",
            ),
            ("series_grace = \"100ms\"", "metrics.series_grace must be"),
            ("colour = 1", "colour"),
            ("tls_key = \"/k\"", "belong together: set both or none"),
            (
                "client_ca = \"/c\"",
                "metrics.client_ca needs metrics.tls_certificate",
            ),
            (
                "tls_certificate = \"c\"",
                "metrics.tls_certificate must be an absolute path",
            ),
        ] {
            let errors = errors(&format!("[metrics]\n{line}\n"));
            assert!(
                errors.len() == 1 && errors[0].contains(wanted),
                "{line}: {errors:?}"
            );
        }
    }
}
