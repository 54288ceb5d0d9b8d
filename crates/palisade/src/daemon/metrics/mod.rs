//! Metrics and health, on threads of their own: [`flows`] counts the flows of the ring, [`server`] answers HTTP clients
//! with values that [`collect`] reads, at most once per second.

mod clients;
mod collect;
mod control_part;
mod counted;
mod ends;
mod flows;
mod health;
mod process;
mod server;
mod write_deadline;

use std::{io, sync::Arc};

use super::handlers::Handlers;
use crate::config::Metrics;

/// Starts the threads, if the configuration has an address.
pub(super) fn start(config: &Metrics, handlers: Arc<Handlers>) -> io::Result<()> {
    let Some(address) = config.listen else {
        return Ok(());
    };
    let counted = flows::run(config, &handlers.ring, &handlers.shared)?;
    let clients = Arc::<clients::Clients>::default();
    let collector =
        collect::Collector::new(handlers, counted, Arc::clone(&clients), config.series_per_metric);
    server::run(address, config.tls.clone(), Arc::new(collector), clients)
}
