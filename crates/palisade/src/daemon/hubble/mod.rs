//! The flow API ([`palisade_hubble`]): its threads, its listeners and its report in `status`. The API has threads of its
//! own with a low priority. It reads the flow ring and the published view; the control thread only notifies it.
//!
//! An API that cannot be served is reported and does not prevent enforcement.

mod events;
mod listen;
mod report;
mod threads;
mod tls;

use std::{io, sync::Arc, thread};

use anyhow::Context as _;
use palisade_flowlog::Ring;
use palisade_hubble::{Api, Limits, Node};
use tokio::sync::oneshot;
use tracing::error;

pub(super) use self::events::{AgentEvents, AgentQueue};
use self::{report::Reports, threads::lower_priority};
use super::view::Shared;
use crate::{
    config::{Config, Hubble as Options},
    control::{api::HubbleStatus, server},
};

/// Threads that serve connections. More would take CPU time from the packet path.
const THREADS: usize = 2;

/// The running API.
pub(super) struct Hubble {
    api: Option<Api>,
    reports: Arc<Reports>,
    tls: bool,
    /// Ends the threads when it is dropped.
    _end: oneshot::Sender<()>,
}

impl Hubble {
    /// Starts the API. What does not work is logged, and reported by [`Self::status`].
    pub(super) fn start(config: &Config, ring: &Arc<Ring>, shared: &Arc<Shared>, queue: AgentQueue) -> Self {
        let reports = Arc::<Reports>::default();
        let (end, ended) = oneshot::channel();
        let api = match serve(config, ring, shared, queue, &reports, ended) {
            Ok(api) => Some(api),
            Err(problem) => {
                error!(error = format!("{problem:#}"), "the flow API cannot be served");
                reports.get().problems.push(("threads", format!("{problem:#}")));
                None
            }
        };
        Self {
            api,
            reports,
            tls: config.hubble.tls_certificate.is_some(),
            _end: end,
        }
    }

    /// Returns the state of the API, and its problems.
    pub(super) fn status(&self) -> (HubbleStatus, Vec<String>) {
        let counts = self.api.as_ref().map(Api::counts).unwrap_or_default();
        let report = self.reports.get();
        let status = HubbleStatus {
            socket: report.socket.clone(),
            listen: report.listen.clone(),
            tls: self.tls,
            readers: counts.readers,
            lost: counts.lost,
            refused: counts.refused + report.refused,
            cut: counts.cut,
        };
        let problems = report.problems.iter();
        let problems = problems.map(|(part, problem)| format!("[hubble] {part}: {problem}"));
        (status, problems.collect())
    }
}

fn serve(
    config: &Config,
    ring: &Arc<Ring>,
    shared: &Arc<Shared>,
    queue: AgentQueue,
    reports: &Arc<Reports>,
    ended: oneshot::Receiver<()>,
) -> anyhow::Result<Api> {
    let options = &config.hubble;
    let limits = Limits {
        readers: options.max_readers,
    };
    let api = Api::new(Arc::clone(ring), node(config), limits).context("the thread that waits for flows")?;
    queue
        .serve(api.clone(), Arc::clone(shared))
        .context("the thread of agent events")?;
    let socket = unix_socket(options);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .max_blocking_threads(1)
        .thread_name("hubble")
        .on_thread_start(lower_priority)
        .enable_all()
        .build()
        .context("the threads that serve connections")?;
    let (options, reports, of_thread) = (options.clone(), Arc::clone(reports), api.clone());
    thread::Builder::new()
        .name("hubble-main".into())
        .spawn(move || {
            lower_priority();
            runtime.block_on(listen::run(of_thread, socket, options, reports, ended));
            // Connections of clients that follow flows do not end by themselves.
            runtime.shutdown_background();
        })
        .context("the thread of the listeners")?;
    Ok(api)
}

fn node(config: &Config) -> Node {
    let options = &config.hubble;
    let address = match options.listen {
        Some(listen) if listen.ip().is_unspecified() => {
            let own = config
                .node
                .addresses
                .iter()
                .find(|own| own.is_ipv4() == listen.is_ipv4());
            own.map_or(listen, |own| (*own, listen.port()).into()).to_string()
        }
        Some(listen) => listen.to_string(),
        None => format!("unix://{}", options.socket.display()),
    };
    Node {
        name: config.node.name.as_str().into(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        address,
        tls_name: options
            .tls_certificate
            .is_some()
            .then(|| config.node.name.clone()),
    }
}

/// Makes the unix socket. Nobody can connect to it with other rights than those that the configuration grants.
fn unix_socket(options: &Options) -> anyhow::Result<(std::os::unix::net::UnixListener, server::Bound)> {
    let group = options
        .group
        .as_ref()
        .map(|name| {
            let found = nix::unistd::Group::from_name(name)
                .with_context(|| format!("[hubble] group = \"{name}\""))?
                .with_context(|| format!("[hubble] group = \"{name}\": there is no such group"))?;
            anyhow::Ok(found.gid)
        })
        .transpose()?;
    let claim = server::claim(&options.socket, "[hubble] socket")?;
    let (listener, bound) = server::bind(claim, group)
        .and_then(|(listener, bound)| {
            listener.set_nonblocking(true)?;
            io::Result::Ok((listener, bound))
        })
        .with_context(|| options.socket.display().to_string())?;
    Ok((listener, bound))
}
