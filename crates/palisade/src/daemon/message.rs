//! Messages from other threads to the control thread.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::mpsc::{self, Receiver, SyncSender},
};

use palisade_datapath::CapturePrograms;
use palisade_policy::compile::Compiler;
use signal_hook::consts::SIGHUP;

use super::{
    changes::{PolicyBase, StoreEvent, Switch},
    fqdn::ControlRequest,
    interception::Secrets,
    netfilter,
    network::Network,
    watcher::Changes,
};
use crate::{
    config,
    control::api::{
        Author, Endpoint, PolicyApplied, PolicySummary, ReloadAnswer, Restarting, SelectorRow, Session,
        Status, TraceAnswer, TraceRequest,
    },
};

/// A message to the control thread.
pub(super) enum Message {
    /// Files of the policy folder have changed.
    Policies(Changes),
    /// The thread that writes changes of the policies has done a job.
    Store(StoreEvent),
    /// Interfaces or addresses of the node have changed.
    Network(Network),
    /// Workloads, or what is known about them, have changed; [`super::discover::Discovery`] has the report.
    Workloads,
    /// The nftables rule set has changed.
    Netfilter(netfilter::Change),
    /// The process has received this signal.
    Signal(i32),
    /// The FQDN manager needs the compiler.
    Fqdn(ControlRequest),
    /// The secrets have changed.
    Secrets(Secrets),
    /// A worker has ended. It starts again by itself.
    WorkerEnded,
    /// A client requests the end of the daemon; with `detach` everything that the daemon attached is removed first.
    Stop { detach: bool, reply: Reply<()> },
    /// A client requests a planned restart. The answer is the name of the restart.
    Restart(Reply<Restarting>),
    /// A request that only the control thread can answer.
    Client(ClientRequest),
}

impl Message {
    /// Returns the task of the control thread for this message, for reports of a busy or hanging thread.
    pub(super) const fn task(&self) -> &'static str {
        match self {
            Self::Policies(_) | Self::Store(_) => "putting changed policies in force",
            Self::Network(_) => "following a change of interfaces or addresses",
            Self::Workloads => "putting found workloads in force",
            Self::Netfilter(_) => "following a change of nftables",
            Self::Signal(SIGHUP) | Self::Client(ClientRequest::Reload { .. }) => {
                "reading the configuration again"
            }
            Self::Signal(_) | Self::Stop { .. } | Self::Restart(_) => "ending",
            Self::Secrets(_) => "replacing the secrets",
            Self::Fqdn(_) => "making identities of learned names",
            Self::WorkerEnded => "repairing the punt link",
            Self::Client(_) => "answering a command",
        }
    }
}

/// Requests that only the control thread can answer. The client's own thread answers all others ([`super::handlers`]).
pub(super) enum ClientRequest {
    /// The part of the status that the control thread has.
    Status(Reply<Status>),
    /// Reads the configuration and the policies again, unless the configuration denies one of the sessions.
    Reload {
        sessions: Vec<Session>,
        force: bool,
        reply: Reply<ReloadAnswer>,
    },
    /// One policy, or all.
    Policies {
        name: Option<String>,
        reply: Reply<Vec<PolicySummary>>,
    },
    /// The selectors of all policies.
    Selectors(Reply<Vec<SelectorRow>>),
    /// Explains the verdict on a packet that a client describes.
    Trace(TraceRequest, Reply<TraceAnswer>),
    /// A copy of the compiler, for a compilation on the client's own thread.
    Compiler(Reply<Box<CompilerCopy>>),
    /// A copy of the policies in force, for a change on the client's own thread.
    PolicyBase(Reply<Box<PolicyBase>>),
    /// Puts a prepared change of the policies in force.
    PolicySwitch(Box<Switch>, Reply<PolicyApplied>),
    /// Keeps the change that waits for its confirmation.
    PolicyConfirm(Option<u64>, Reply<u64>),
    /// Rolls back the change that waits for its confirmation.
    PolicyCancel(Author, Option<u64>, Vec<Session>, Reply<u64>),
    /// All endpoints.
    Endpoints(Reply<Vec<Endpoint>>),
    /// One endpoint, by number, name or address.
    Endpoint {
        endpoint: String,
        reply: Reply<Endpoint>,
    },
    /// Sets options of an endpoint. The answer is all of its options.
    EndpointConfig {
        endpoint: String,
        options: BTreeMap<String, bool>,
        /// TCP sessions that the options must not deny.
        sessions: Vec<Session>,
        reply: Reply<BTreeMap<String, bool>>,
    },
    /// Attaches the programs of a capture.
    BeginCapture(CapturePrograms, Reply<()>),
    /// Attaches the ordinary programs again.
    EndCapture(Reply<()>),
}

/// The compiler with the policies in force, and the settings that decide about requests.
pub(super) struct CompilerCopy {
    pub(super) compiler: Compiler,
    pub(super) http: config::Http,
    /// Folder of the policy files.
    pub(super) policy_dir: PathBuf,
}

/// Sender of one answer.
pub(super) struct Reply<T>(SyncSender<Result<T, String>>);

impl<T> Reply<T> {
    /// Returns a reply and the receiver of its answer.
    pub(super) fn channel() -> (Self, Receiver<Result<T, String>>) {
        let (sender, receiver) = mpsc::sync_channel(1);
        (Self(sender), receiver)
    }

    /// Sends the answer. An error is ignored: it means that the client no longer waits.
    pub(super) fn send(self, answer: Result<T, String>) {
        let _ = self.0.send(answer);
    }
}
