//! Requests of clients. Module `maps` answers from the published view and the maps, module `control` on the control
//! thread. Module `observe` sends flows. This module dispatches the requests.

mod agent;
mod capture;
mod changes;
mod conntrack;
mod control;
mod explain;
mod intercept;
mod maps;
mod observe;
mod would_cut;

use std::{
    io,
    sync::{
        Arc, OnceLock,
        atomic::AtomicU64,
        mpsc::{RecvTimeoutError, Sender},
    },
    time::Duration,
};

use palisade_datapath::{Datapath, MapError, monotonic_coarse};
use palisade_flowlog::Ring;
use serde::Serialize;
use serde_json::Value;

use super::{
    capturing::CapturePlace,
    changes::{Store, rows},
    fqdn::FqdnManager,
    hubble::Hubble,
    interception,
    log_control::LogControl,
    measured::Measured,
    message::{ClientRequest, Message, Reply},
    netfilter,
    view::Shared,
    watchdog::{ControlActivity, WorkerHeartbeats, hanging},
};
use crate::{
    config::with_option,
    control::{
        api::{self, Request},
        server::{Counts, Handler, Sink},
    },
};

/// Longest wait for a change by the control thread. A compilation of thousands of policies takes seconds.
const CHANGE_DEADLINE: Duration = Duration::from_secs(60);
/// End of the error if the control thread has not answered within a deadline.
const NO_ANSWER: &str = "what is attached goes on enforcing the last policy; try again";
/// Longest wait for a lookup by the control thread.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(5);
/// Answers clients, each on a thread of its own. Requests that the published view or the maps can answer do not involve
/// the control thread, which can be busy with a compilation.
pub(super) struct Handlers {
    pub(super) control: Sender<Message>,
    pub(super) datapath: Arc<Datapath>,
    pub(super) shared: Arc<Shared>,
    pub(super) names: Arc<FqdnManager>,
    pub(super) ring: Arc<Ring>,
    /// The flow API.
    pub(super) hubble: Arc<Hubble>,
    /// Number of events read.
    pub(super) events: Arc<AtomicU64>,
    /// Current task of the control thread.
    pub(super) activity: Arc<ControlActivity>,
    /// Last heartbeat of each worker; `None` without workers.
    pub(super) heartbeats: Option<Arc<WorkerHeartbeats>>,
    /// The proxy threads and the secrets.
    pub(super) interception: Arc<interception::View>,
    /// The daemon's nftables table.
    pub(super) netfilter: netfilter::Place,
    /// Levels of the log.
    pub(super) log: LogControl,
    /// The capture that runs.
    pub(super) capturing: CapturePlace,
    /// Counters of the control socket's server, set once it runs.
    pub(super) server: OnceLock<Arc<Counts>>,
    /// The history of the policies.
    pub(super) policy_store: Arc<Store>,
    /// Values that the metrics need besides those of `status`.
    pub(super) measured: Arc<Measured>,
}

impl Handler for Handlers {
    fn handle(&self, request: Request, sink: &mut dyn Sink) -> io::Result<()> {
        let answer = match request {
            Request::Capture(request) => return self.capture(&request, sink),
            Request::Observe(request) => {
                return observe::observe(&self.ring, self.hubble.api(), &request, sink);
            }
            Request::Ping => Ok(Value::Null),
            Request::Status => json(self.status()),
            Request::Stop { detach } => {
                json(self.send(CHANGE_DEADLINE, |reply| Message::Stop { detach, reply }))
            }
            Request::Restart => json(self.send(CHANGE_DEADLINE, Message::Restart)),
            Request::Reload { sessions, force } => json(self.change(|reply| ClientRequest::Reload {
                sessions,
                force,
                reply,
            })),
            Request::PolicyGet { name } => json(self.policies(name)),
            Request::PolicySelectors => json(self.look_up(ClientRequest::Selectors)),
            Request::PolicyTrace(request) => json(self.look_up(|reply| ClientRequest::Trace(request, reply))),
            Request::Explain { request } => json(self.explain(request)),
            Request::WouldCut(request) => json(self.would_cut(request)),
            Request::DeniedConnections => json(self.denied_connections()),
            Request::PolicyPlan(request) => json(self.plan_policies(&request)),
            Request::PolicyApply(request) => json(self.apply_policies(request)),
            Request::PolicyConfirm { number } => {
                json(self.change(|reply| ClientRequest::PolicyConfirm(number, reply)))
            }
            Request::PolicyCancel {
                author,
                number,
                sessions,
            } => json(self.change(|reply| ClientRequest::PolicyCancel(author, number, sessions, reply))),
            Request::PolicyHistory => json(Ok(rows(&self.policy_store.history()))),
            Request::EndpointList => json(self.look_up(ClientRequest::Endpoints)),
            Request::EndpointGet { endpoint } => json(self.endpoint(endpoint)),
            Request::EndpointConfig {
                endpoint,
                options,
                sessions,
                force,
            } => json(self.change(|reply| ClientRequest::EndpointConfig {
                endpoint,
                options,
                sessions: if force { Vec::new() } else { sessions },
                reply,
            })),
            Request::IdentityList => json(Ok(self.identities())),
            Request::IdentityGet { identity } => json(self.identity(identity)),
            Request::BpfPolicyGet { endpoint } => json(self.policy_table(endpoint)),
            Request::BpfCtList(filter) => return self.list_connections(&filter, sink),
            Request::BpfCtFlush(filter) => json(self.flush_connections(&filter)),
            Request::BpfIpcacheList => json(self.ipcache()),
            Request::FqdnCacheList { endpoint } => json(self.learned_names(endpoint)),
            Request::FqdnCacheClean {
                endpoint,
                name,
                pattern,
            } => json(self.clean_names(endpoint, name, pattern)),
            Request::LogSet(request) => json(self.set_log(&request)),
            Request::LogReset => json(self.log.reset()),
            Request::LogGet => json(Ok(self.log.get())),
            Request::InterceptConfig => json(self.intercept_config()),
            Request::InterceptClusters => json(self.intercept_clusters()),
            Request::InterceptCerts => json(Ok(self.intercept_certs())),
            Request::InterceptStats => json(Ok(self.intercept_stats())),
            Request::InterceptConnections { limit } => json(self.intercept_connections(limit)),
            Request::InterceptCheck { name, port, ends } => json(self.intercept_check(&name, port, ends)),
        };
        sink.send(&match answer {
            Ok(value) => api::Answer::Ok(value),
            Err(message) => api::Answer::Error(message),
        })
    }
}

/// Returns an answer as the JSON value that is sent.
fn json<T: Serialize>(answer: Result<T, String>) -> Result<Value, String> {
    serde_json::to_value(answer?).map_err(|error| error.to_string())
}

/// Returns the text of an error; if a map is too small, with the `[limits]` option to raise.
pub(super) fn map_error(error: MapError) -> String {
    with_option(&error)
}

impl Handlers {
    fn set_log(&self, request: &api::LogSetRequest) -> Result<api::LogStatus, String> {
        let endpoint = request.endpoint.clone();
        let endpoint = endpoint.map(|endpoint| self.endpoint(endpoint)).transpose()?;
        self.log
            .set(request, endpoint.map(|endpoint| (endpoint.id, endpoint.name)))
    }

    /// Requests data from the control thread, within [`LOOKUP_DEADLINE`].
    pub(super) fn look_up<T>(&self, request: impl FnOnce(Reply<T>) -> ClientRequest) -> Result<T, String> {
        self.send(LOOKUP_DEADLINE, |reply| Message::Client(request(reply)))
    }

    /// Requests a change from the control thread, within [`CHANGE_DEADLINE`].
    fn change<T>(&self, request: impl FnOnce(Reply<T>) -> ClientRequest) -> Result<T, String> {
        self.send(CHANGE_DEADLINE, |reply| Message::Client(request(reply)))
    }

    /// Sends a message to the control thread and waits for the answer.
    pub(super) fn send<T>(
        &self,
        deadline: Duration,
        message: impl FnOnce(Reply<T>) -> Message,
    ) -> Result<T, String> {
        let (reply, receiver) = Reply::channel();
        let gone = || "the daemon is ending".to_owned();
        self.control.send(message(reply)).map_err(|_| gone())?;
        match receiver.recv_timeout(deadline) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => {
                let busy = hanging(
                    &self.activity,
                    self.heartbeats.as_deref(),
                    Duration::ZERO,
                    monotonic_coarse(),
                );
                Err(format!(
                    "{}; {NO_ANSWER}",
                    busy.unwrap_or_else(|| "the daemon is busy".to_owned())
                ))
            }
            Err(RecvTimeoutError::Disconnected) => Err(gone()),
        }
    }
}
