//! The flow API ([`palisade_hubble`]): its threads, its listeners and its report in `status`. The API has threads of its
//! own with a low priority. It reads the flow ring and the published view; the control thread only notifies it.
//!
//! An API that cannot be served is reported and does not prevent enforcement.

mod events;
mod listen;
mod report;
mod tls;

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver},
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;
use palisade_flowlog::Ring;
use palisade_hubble::{Api, Limits, Node};
use palisade_secrets::Expiry;
use tokio::sync::oneshot;
use tracing::error;

pub(super) use self::events::{AgentEvents, AgentQueue};
use self::report::Reports;
use super::view::Shared;
use crate::{
    config::{Config, Hubble as Options},
    control::{api::HubbleStatus, server},
    priority,
};

/// Longest wait for the end of the listeners.
const CLOSE_GRACE_PERIOD: Duration = Duration::from_millis(300);
/// Threads that serve connections. More would take CPU time from the packet path.
const THREADS: usize = 2;

/// The running API.
pub(super) struct Hubble {
    api: Option<Api>,
    reports: Arc<Reports>,
    tls: bool,
    /// A warning if clients need no certificate.
    open_to: Option<String>,
    /// Ends the threads; `None` once they end.
    end: Mutex<Option<oneshot::Sender<()>>>,
    /// Disconnected when the sockets are closed.
    closed: Mutex<Option<Receiver<()>>>,
}

impl Hubble {
    /// Starts the API. What does not work is logged, and reported by [`Self::status`].
    pub(super) fn start(config: &Config, ring: &Arc<Ring>, shared: &Arc<Shared>, queue: AgentQueue) -> Self {
        let reports = Arc::<Reports>::default();
        let (end, ended) = oneshot::channel();
        let (api, closed) = match serve(config, ring, shared, queue, &reports, ended) {
            Ok((api, closed)) => (Some(api), Some(closed)),
            Err(problem) => {
                error!(error = format!("{problem:#}"), "the flow API cannot be served");
                reports.get().problems.push(("threads", format!("{problem:#}")));
                (None, None)
            }
        };
        Self {
            api,
            reports,
            tls: config.hubble.tls_certificate.is_some(),
            open_to: config.hubble.open_to_all(),
            end: Mutex::new(Some(end)),
            closed: Mutex::new(closed),
        }
    }

    /// Returns the services; `None` if they could not be started.
    pub(super) const fn api(&self) -> Option<&Api> {
        self.api.as_ref()
    }

    /// Closes the sockets, and removes the unix socket. Waits at most [`CLOSE_GRACE_PERIOD`].
    pub(super) fn close(&self) {
        drop(self.end.lock().unwrap_or_else(PoisonError::into_inner).take());
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(closed) = closed {
            // The result is an error in each case: nothing is ever sent.
            let _ = closed.recv_timeout(CLOSE_GRACE_PERIOD);
        }
    }

    /// Returns the certificates of the TCP listener in use, that of the server first.
    pub(super) fn certificates(&self) -> Vec<Expiry> {
        self.reports.get().certificates.clone()
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
        let mut problems: Vec<String> = problems
            .map(|(part, problem)| format!("[hubble] {part}: {problem}"))
            .collect();
        problems.extend(self.open_to.clone());
        (status, problems)
    }
}

fn serve(
    config: &Config,
    ring: &Arc<Ring>,
    shared: &Arc<Shared>,
    queue: AgentQueue,
    reports: &Arc<Reports>,
    ended: oneshot::Receiver<()>,
) -> anyhow::Result<(Api, Receiver<()>)> {
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
        .on_thread_start(priority::lower)
        .enable_all()
        .build()
        .context("the threads that serve connections")?;
    let (options, reports, of_thread) = (options.clone(), Arc::clone(reports), api.clone());
    let (open, closed) = mpsc::channel();
    thread::Builder::new()
        .name("hubble-main".into())
        .spawn(move || {
            priority::lower();
            runtime.block_on(listen::run(of_thread, socket, options, reports, ended));
            drop(open);
            // Connections of clients that follow flows do not end by themselves.
            runtime.shutdown_background();
        })
        .context("the thread of the listeners")?;
    Ok((api, closed))
}

fn node(config: &Config) -> Node {
    let options = &config.hubble;
    let address = match options.listen {
        // Another node cannot connect to the unspecified address.
        Some(listen) if listen.ip().is_unspecified() => {
            let mut own = config.node.addresses.iter();
            let own = own.find(|own| own.is_ipv4() == listen.is_ipv4());
            match own {
                Some(own) => SocketAddr::from((*own, listen.port())).to_string(),
                None => format!("{}:{}", config.node.name, listen.port()),
            }
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

/// Makes the unix socket. Only root, and the members of the configured group, can connect to it.
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn other_nodes_can_connect_to_the_address_of_the_node() {
        let tls = "tls_certificate = \"/c\"\ntls_key = \"/k\"\n";
        let addresses = "addresses = [\"192.0.2.1\", \"2001:db8::1\"]\n";
        for (own, hubble, address, tls_name) in [
            (
                "",
                "socket = \"/run/h.sock\"\n".to_owned(),
                "unix:///run/h.sock",
                None,
            ),
            (
                "",
                "listen = \"127.0.0.1:4244\"\n".to_owned(),
                "127.0.0.1:4244",
                None,
            ),
            (
                addresses,
                format!("listen = \"[2001:db8::7]:4244\"\n{tls}"),
                "[2001:db8::7]:4244",
                Some("n1"),
            ),
            (
                addresses,
                format!("listen = \"0.0.0.0:4244\"\n{tls}"),
                "192.0.2.1:4244",
                Some("n1"),
            ),
            (
                addresses,
                format!("listen = \"[::]:4244\"\n{tls}"),
                "[2001:db8::1]:4244",
                Some("n1"),
            ),
            (
                "",
                format!("listen = \"[::]:4244\"\n{tls}"),
                "n1:4244",
                Some("n1"),
            ),
        ] {
            let text = format!("[node]\nname = \"n1\"\n{own}[hubble]\n{hubble}");
            let config = Config::parse(Path::new("/p.toml"), &text)
                .unwrap_or_else(|errors| panic!("{text}: {errors:?}"));
            let node = node(&config);
            assert_eq!(
                (&*node.address, node.tls_name.as_deref()),
                (address, tls_name),
                "{text}"
            );
        }
    }
}
