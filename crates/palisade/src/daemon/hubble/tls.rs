//! Certificates of the TCP listener ([`certificate_files`]). A connection is closed when
//! the certificate of its client is no longer accepted: since it has expired, or since the authorities have changed.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use palisade_hubble::Places;
use rustls::{ServerConfig, pki_types::CertificateDer};
use tokio::time::sleep;
use tracing::info;

use super::{
    super::certificate_files::{self, CHECK_INTERVAL},
    report::Reports,
};
use crate::config::CertificateFiles;

/// Interval at which the certificates of connected clients are verified again while the files do not change.
const VERIFY_INTERVAL: Duration = Duration::from_secs(30);

/// Certificates of a client, its own first; none without TLS.
pub(super) type Chain = Vec<CertificateDer<'static>>;

/// Certificates in use.
#[derive(Debug)]
pub(super) struct Certificates {
    files: certificate_files::Certificates,
    reports: Arc<Reports>,
}

impl Certificates {
    pub(super) fn new(files: CertificateFiles, reports: &Arc<Reports>) -> Arc<Self> {
        let certificates = Self {
            files: certificate_files::Certificates::with_protocols(files, vec![b"h2".to_vec()]),
            reports: Arc::clone(reports),
        };
        certificates.report();
        Arc::new(certificates)
    }

    /// Returns the configuration for a handshake; `None` if no client can connect.
    pub(super) fn config(&self) -> Option<Arc<ServerConfig>> {
        self.files.config()
    }

    /// Returns whether a client with these certificates could connect now.
    pub(super) fn accepts(&self, chain: &Chain) -> bool {
        self.files.accepts(chain)
    }

    /// Reads the files again whenever they change, and closes the connections of clients that are no longer accepted.
    pub(super) async fn watch(self: Arc<Self>, places: Arc<Places<Chain>>) {
        let mut verified = Instant::now();
        loop {
            sleep(CHECK_INTERVAL).await;
            let changed = self.files.refresh();
            if changed {
                self.report();
            }
            if changed || verified.elapsed() >= VERIFY_INTERVAL {
                verified = Instant::now();
                let closed = places.close_unless(|chain| self.accepts(chain));
                if closed > 0 {
                    info!(
                        connections = closed,
                        "connections of the flow API are closed: the certificates of their clients are no longer accepted"
                    );
                }
            }
        }
    }

    fn report(&self) {
        self.reports.get().certificates = self.files.expiries();
        let problem = self.files.problem();
        if problem.is_none() {
            info!("the certificates of the flow API are read");
        }
        self.reports.set_problem("tls_certificate", problem);
    }
}
