//! Requests and answers of the control socket. `-o json` prints answers in this form.

use std::{borrow::Cow, collections::BTreeMap};

use ipnet::IpNet;
use palisade_flowlog::{Flow, Lost, Timestamp, filter::ApiFilters};
use serde::{Deserialize, Serialize};

/// A request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// Checks that the daemon answers.
    Ping,
    /// Returns the [`Status`].
    Status,
    /// Ends the daemon; with `detach` everything that the daemon attached is removed.
    Stop { detach: bool },
    /// Executes the daemon's program again; inspected connections are handed over. Returns [`Restarting`].
    Restart,
    /// Reads the configuration and the policies again. Returns a [`ReloadAnswer`].
    Reload {
        /// TCP sessions of the client's user.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        sessions: Vec<Session>,
        /// Whether to use the configuration also if it denies a session.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
    },
    /// Returns the [`PolicySummary`] of the named policy or of every policy.
    PolicyGet { name: Option<String> },
    /// Returns the [`SelectorRow`]s.
    PolicySelectors,
    /// Returns a [`TraceAnswer`].
    PolicyTrace(TraceRequest),
    /// Returns an [`ExplainAnswer`].
    Explain { request: ExplainRequest },
    /// Returns [`WouldCut`]: the live connections that a change of policy files would cut. Nothing is put in force.
    WouldCut(WouldCutRequest),
    /// Returns all [`Endpoint`]s.
    EndpointList,
    /// Returns an [`Endpoint`], by number, name or address.
    EndpointGet { endpoint: String },
    /// Sets options of an endpoint. Returns all of its options by name.
    EndpointConfig {
        endpoint: String,
        options: BTreeMap<String, bool>,
        /// TCP sessions of the client's user.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        sessions: Vec<Session>,
        /// Whether to set them also if that denies a session.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        force: bool,
    },
    /// Returns the [`IdentityRow`]s.
    IdentityList,
    /// Returns an [`IdentityRow`].
    IdentityGet { identity: u32 },
    /// Returns the [`PolicyRow`]s of an endpoint.
    BpfPolicyGet { endpoint: String },
    /// Streams [`Answer::Connections`].
    BpfCtList(ConnectionFilter),
    /// Removes conntrack entries. Returns [`Flushed`].
    BpfCtFlush(ConnectionFilter),
    /// Returns the [`IpcacheRow`]s.
    BpfIpcacheList,
    /// Returns the [`FqdnRow`]s of one endpoint or of all.
    FqdnCacheList { endpoint: Option<String> },
    /// Removes learned names of one endpoint or of all: one name, the names that match a pattern, or all names. Returns
    /// the number of removed addresses.
    FqdnCacheClean {
        endpoint: Option<String>,
        name: Option<String>,
        pattern: Option<String>,
    },
    /// Returns the [`InterceptRow`]s.
    InterceptConfig,
    /// Returns the [`UpstreamRow`]s.
    InterceptClusters,
    /// Returns the [`CertificateRow`]s.
    InterceptCerts,
    /// Returns [`InterceptStats`].
    InterceptStats,
    /// Returns the [`InterceptedRow`]s, at most `limit`.
    InterceptConnections { limit: usize },
    /// Opens a connection as an intercepted connection of an endpoint would be opened, and returns
    /// [`InterceptCheck`].
    InterceptCheck {
        /// Name of the server.
        name: String,
        /// Port of the server.
        port: u16,
        /// The ends of the connection.
        ends: CheckEnds,
    },
    /// Streams [`Answer::Flow`]s.
    Observe(ObserveRequest),
    /// Sets levels of the log for a limited time. Returns the [`LogStatus`].
    LogSet(LogSetRequest),
    /// Ends the levels of the last [`Request::LogSet`]. Returns the [`LogStatus`].
    LogReset,
    /// Returns the [`LogStatus`].
    LogGet,
    /// Streams [`Answer::Capture`]s, then returns a [`CaptureSummary`].
    Capture(CaptureRequest),
    /// Compiles two sets of policies and changes nothing. Returns a [`PolicyPlan`].
    PolicyPlan(PlanRequest),
    /// Puts a set of policies in force. Returns a [`PolicyApplied`].
    PolicyApply(ApplyRequest),
    /// Keeps a change that waits for its confirmation. Returns the number of the change.
    PolicyConfirm {
        /// Number of the change; `None`: the one that waits.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        number: Option<u64>,
    },
    /// Rolls back a change that waits for its confirmation. Returns the number of the change.
    PolicyCancel {
        /// Who cancels.
        author: Author,
        /// Number of the change; `None`: the one that waits.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        number: Option<u64>,
        /// TCP sessions of the client's user. A rollback that would deny one is refused.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        sessions: Vec<Session>,
    },
    /// Returns the [`HistoryRow`]s.
    PolicyHistory,
    /// Returns [`DeniedConnections`].
    DeniedConnections,
}

/// A set of policies.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum PolicySet {
    /// The policies in force.
    Current,
    /// The policies in force with these files in place of those of the same name.
    With(BTreeMap<String, CandidateFile>),
    /// These files only.
    Only(BTreeMap<String, CandidateFile>),
    /// The set of this number in the history.
    Number(u64),
}

/// A policy file that is not in the policy folder yet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CandidateFile {
    /// Path that errors name.
    pub path: String,
    /// Content.
    pub text: String,
}

/// Request of `palisade policy diff`, and of the check before `palisade policy apply`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PlanRequest {
    /// The set that is compared.
    pub from: PolicySet,
    /// The set with which it is compared.
    pub to: PolicySet,
    /// TCP sessions of the client's user.
    #[serde(default)]
    pub sessions: Vec<Session>,
    /// Whether to evaluate recorded flows and live connections, and whether the set can be applied.
    pub dry_run: bool,
}

/// Request of `palisade policy apply` and `palisade policy rollback`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ApplyRequest {
    /// The set to put in force.
    pub set: PolicySet,
    /// Time within which the change must be confirmed, ms; `None`: it need not be confirmed.
    pub confirm_ms: Option<u64>,
    /// The author's message.
    pub message: String,
    /// Who applies it.
    pub author: Author,
    /// TCP sessions of the client's user.
    pub sessions: Vec<Session>,
    /// Whether to apply it also if it denies a session.
    pub force: bool,
    /// Number of the change in force for which [`PolicyPlan`] was computed; `None`: any.
    pub base: Option<u64>,
}

/// User that runs a command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Author {
    /// Number of the user.
    pub uid: u32,
    /// Name of the user.
    pub user: String,
    /// User that has become this user by sudo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sudo_user: Option<String>,
}

/// A TCP connection by which a user is logged in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Session {
    /// Address and port of the user's host.
    pub peer: std::net::SocketAddr,
    /// Address and port of this node.
    pub local: std::net::SocketAddr,
    /// Whether the node seems to have opened the connection: no socket listens at `local`. The programs' entry of the
    /// connection counts more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub outgoing: bool,
}

/// The end that opened the connection, and the other one.
impl std::fmt::Display for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (from, to) = match self.outgoing {
            false => (self.peer, self.local),
            true => (self.local, self.peer),
        };
        write!(f, "{from} -> {to}")
    }
}

/// What another set of policies would change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PolicyPlan {
    /// Number of the change in force in the history.
    pub number: u64,
    /// The entry of the history that is compared, if it was named by its number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<HistoryRow>,
    /// The entry of the history with which it is compared, if it was named by its number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<HistoryRow>,
    /// Errors, `FILE:LINE:COL: MESSAGE`. All other fields are empty if there are any.
    pub errors: Vec<String>,
    /// Why the set cannot be applied although it has no errors.
    pub refused: Option<String>,
    /// Files that differ.
    pub files: FileChanges,
    /// Policies that differ, by `namespace/name`.
    pub policies: PolicyChanges,
    /// Verdicts that differ.
    pub verdicts: Vec<VerdictChange>,
    /// Number of verdicts that differ and are not listed.
    pub not_listed: u64,
    /// Whether there were too many verdicts to compare all of them.
    pub incomplete: bool,
    /// Live connections that would be cut.
    pub cuts: Vec<CutRow>,
    /// Number of live connections that would be cut, those that are not listed included.
    pub cut: usize,
    /// Recorded flows of the last hour with another verdict.
    pub flows: Vec<FlowChange>,
    /// Number of recorded flows that were evaluated.
    pub flows_evaluated: u64,
    /// Time of the oldest recorded flow that was read, RFC 3339, at most an hour ago; without one, the time an hour ago.
    /// `None` if recorded flows were not read.
    #[serde(default)]
    pub flows_since: Option<String>,
    /// Number of flows since then that were lost before they could be read.
    #[serde(default)]
    pub flows_lost: u64,
    /// Sessions of the client's user that would be denied.
    pub denied_sessions: Vec<DeniedSession>,
}

/// Names of files that differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileChanges {
    /// New files.
    pub added: Vec<String>,
    /// Files with another content.
    pub changed: Vec<String>,
    /// Files that are gone.
    pub removed: Vec<String>,
}

impl FileChanges {
    /// Returns whether no file differs.
    pub(crate) fn is_empty(&self) -> bool {
        self.added.is_empty() && self.changed.is_empty() && self.removed.is_empty()
    }
}

/// Policies that differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PolicyChanges {
    /// New policies.
    pub added: Vec<String>,
    /// Policies with other rules.
    pub changed: Vec<String>,
    /// Policies that are gone.
    pub removed: Vec<String>,
    /// Policies with the same rules under another name: old and new name.
    pub renamed: Vec<(String, String)>,
}

/// Traffic with another verdict.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VerdictChange {
    /// Names of endpoints of this node.
    pub endpoints: Vec<String>,
    /// `ingress` or `egress`.
    pub direction: String,
    /// Peers: labels, a prefix, or `world`.
    pub peers: Vec<String>,
    /// Ports: `80/TCP`, `ANY`.
    pub ports: Vec<String>,
    /// Verdict of the first set.
    pub from: String,
    /// Verdict of the second set.
    pub to: String,
    /// Rule of the second set that decides.
    pub decided_by: String,
}

/// Recorded flows with another verdict.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FlowChange {
    /// `ingress` or `egress`.
    pub direction: String,
    /// The endpoint.
    pub endpoint: String,
    /// The peer.
    pub peer: String,
    /// Port and protocol.
    pub port: String,
    /// Recorded verdict.
    pub now: String,
    /// Verdict of the set.
    pub then: String,
    /// Rule of the set that decides.
    pub then_by: String,
    /// Number of flows.
    pub flows: u64,
}

/// A session that would be denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeniedSession {
    /// The session.
    pub session: Session,
    /// Rule that decides.
    pub decided_by: String,
}

/// A set that was put in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PolicyApplied {
    /// Number in the history.
    pub number: u64,
    /// Revision of the datapath.
    pub revision: u64,
    /// Time within which it must be confirmed, s; `None`: it need not be.
    pub confirm_within_seconds: Option<u64>,
    /// Files that differ.
    pub files: FileChanges,
    /// Paths under which files are kept that the daemon had not read, and that the change replaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aside: Vec<String>,
}

/// A change that waits for its confirmation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PendingChange {
    /// Number in the history.
    pub number: u64,
    /// Time until it is rolled back, s.
    pub remaining_seconds: u64,
    /// Who applied it.
    pub author: Author,
    /// The author's message.
    pub message: String,
}

/// What caused a policy set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ChangeKind {
    /// `palisade policy apply`.
    #[default]
    Apply,
    /// `palisade policy rollback`.
    Rollback,
    /// Files of the folder were changed directly.
    FileChange,
    /// A change was rolled back, because it was not confirmed or was cancelled.
    RolledBack,
}

/// Whether a policy set was confirmed or rolled back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ChangeState {
    /// It needed no confirmation.
    #[default]
    Enforced,
    /// It waits for its confirmation.
    Pending,
    /// It was confirmed.
    Confirmed,
    /// It was rolled back.
    RolledBack,
}

/// An entry of `palisade policy history`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HistoryRow {
    /// Number.
    pub number: u64,
    /// Time, RFC 3339.
    pub time: String,
    /// What caused it.
    pub kind: ChangeKind,
    /// Who caused it; `None` if the daemon does not know.
    pub author: Option<Author>,
    /// The author's message.
    pub message: String,
    /// Number of the entry that was put back, for a rollback.
    pub of: Option<u64>,
    /// Files that differ from the entry before.
    pub files: FileChanges,
    /// Revision of the datapath.
    pub revision: u64,
    /// Whether it was confirmed or rolled back.
    pub state: ChangeState,
    /// Whether this set is in force.
    pub in_force: bool,
}

/// A change of policy files that is not put in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct WouldCutRequest {
    /// New text of files, by file name in the policy folder; `None` for a file that would be removed.
    pub files: BTreeMap<String, Option<String>>,
    /// Whether the files in force that `files` does not name would be removed.
    pub replace_all: bool,
}

/// The live connections that a change of policy files would cut.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WouldCut {
    /// The connections, at most 1,000: first those that peers have opened to the node, then other TCP connections.
    pub connections: Vec<CutRow>,
    /// Number of all connections that would be cut.
    pub total: usize,
    /// Number of live connections of the node and its workloads.
    pub live: usize,
    /// Warnings of the compiler about the policies as they would be.
    pub warnings: Vec<String>,
}

/// Live connections that the policies in force deny.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DeniedConnections {
    /// The connections, at most ten: first those that peers have opened to the node, then other TCP connections.
    pub connections: Vec<CutRow>,
    /// Number of all of them.
    pub total: usize,
}

/// A live connection that would be cut.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CutRow {
    /// Number of the endpoint whose policy cuts.
    pub endpoint: u16,
    /// Name of the endpoint.
    pub endpoint_name: String,
    /// Whether the endpoint is the node.
    pub is_node: bool,
    /// `ingress` if the peer opened the connection, `egress` if the endpoint did.
    pub direction: String,
    /// Protocol: `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Address and port that opened the connection.
    pub source: String,
    /// Address and port to which the connection was opened.
    pub destination: String,
    /// `denied`: its packets would be dropped. `reset`: its inspection would begin in its middle.
    pub effect: String,
    /// The rule or policy that decides, with `FILE:LINE`.
    pub decided_by: String,
}

/// Traffic of an endpoint that is intercepted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct InterceptRow {
    /// Number of the endpoint.
    pub endpoint: u16,
    /// Name of the endpoint.
    pub endpoint_name: String,
    /// `ingress` or `egress`.
    pub direction: String,
    /// Labels of the peer, or `ANY`.
    pub peer: Vec<String>,
    /// Ports.
    pub ports: Vec<String>,
    /// Secret of `terminatingTLS`; `None`: the client's side is in clear text.
    pub terminating: Option<String>,
    /// Secret of `originatingTLS`; `None`: the server's side is in clear text.
    pub originating: Option<String>,
    /// Protocol inside: `http`, `tls` (only server names are checked).
    pub protocol: String,
    /// `serverNames`.
    pub server_names: Vec<String>,
    /// Number of application rules.
    pub rules: usize,
    /// Policy that requires the interception.
    pub decided_by: Option<String>,
    /// Why the traffic is denied although the policy allows it, for example a missing secret.
    pub problem: Option<String>,
}

/// A server to which intercepted connections were opened.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct UpstreamRow {
    /// Server name; empty if the client sent none.
    pub name: String,
    /// Address and port.
    pub address: String,
    /// Connections that were established, with the TLS handshake if there is one.
    pub successes: u64,
    /// Connections that failed.
    pub failures: u64,
    /// Failures by reason, in words.
    pub failures_by_reason: BTreeMap<String, u64>,
    /// The last failure, in words.
    pub last_failure: Option<String>,
    /// Mean time until the TCP connection was established, s.
    pub connect_seconds: f64,
    /// Mean time of the TLS handshake with the server, s.
    pub handshake_seconds: f64,
    /// Open connections.
    pub open: u64,
}

/// A certificate of the secrets folder.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct CertificateRow {
    /// `namespace/name` of the secret.
    pub secret: String,
    /// Key of the certificate in the secret.
    pub key: String,
    /// Subject.
    pub subject: String,
    /// Subject alternative names.
    pub sans: Vec<String>,
    /// Issuer.
    pub issuer: String,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// Begin of the validity, RFC 3339.
    pub not_before: String,
    /// End of the validity, RFC 3339.
    pub not_after: String,
    /// Time until the end of the validity, s; negative if it has passed.
    pub remaining_seconds: i64,
    /// SHA-256 of the certificate, hexadecimal.
    pub fingerprint: String,
    /// Whether the certificate belongs to a CA.
    pub is_ca: bool,
    /// File from which the certificate was read.
    pub file: String,
}

/// Certificates, and what is wrong with the secrets folder.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Certificates {
    /// The folder.
    pub dir: String,
    /// Certificates.
    pub certificates: Vec<CertificateRow>,
    /// Problems of the folder and of secrets that policies name.
    pub problems: Vec<String>,
}

/// Counters of the proxy threads.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct InterceptStats {
    /// The threads.
    pub threads: Vec<InterceptThread>,
    /// Counters by group and name.
    pub counters: BTreeMap<String, BTreeMap<String, u64>>,
    /// Why nothing is intercepted.
    pub problem: Option<String>,
}

/// A proxy thread.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct InterceptThread {
    /// Number of the thread.
    pub number: usize,
    /// `running` or `down`.
    pub state: String,
    /// Open connections.
    pub connections: u64,
    /// Number of restarts after a failure.
    pub restarts: u64,
    /// The last failure.
    pub problem: Option<String>,
}

/// A live intercepted connection.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct InterceptedRow {
    /// Number of the endpoint whose policy intercepts.
    pub endpoint: u16,
    /// `ingress` or `egress`.
    pub direction: String,
    /// Address and port of the client.
    pub client: String,
    /// Address and port of the server.
    pub server: String,
    /// Server name of the client's hello.
    pub name: String,
    /// State of the connection.
    pub state: String,
    /// Protocol inside: `http/1.1`, `h2`, or `bytes` if it is not inspected.
    pub protocol: String,
    /// TLS on the client's side: version, cipher suite, ALPN; `None`: clear text.
    pub client_tls: Option<TlsRow>,
    /// TLS on the server's side.
    pub server_tls: Option<TlsRow>,
    /// Bytes from the client, decrypted.
    pub client_bytes: u64,
    /// Bytes from the server, decrypted.
    pub server_bytes: u64,
    /// HTTP requests.
    pub requests: u64,
    /// Age, s.
    pub age_seconds: u64,
}

/// Parameters of a TLS connection.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct TlsRow {
    /// Version.
    pub version: String,
    /// Cipher suite.
    pub cipher: String,
    /// Protocol chosen by ALPN; empty for none.
    pub alpn: String,
}

/// Ends of the connection of `palisade intercept check`. Endpoints are given by number, name or address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum CheckEnds {
    /// A connection of an endpoint.
    From {
        /// The endpoint.
        endpoint: String,
        /// Address of the server; `None`: an address that the endpoint has learned by the name.
        server: Option<std::net::IpAddr>,
    },
    /// A connection to an endpoint.
    To {
        /// The endpoint.
        endpoint: String,
        /// Address of the client.
        client: std::net::IpAddr,
    },
}

/// Result of `palisade intercept check`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct InterceptCheck {
    /// Whether a connection of the endpoint would be established.
    pub ok: bool,
    /// What happened, in order.
    pub steps: Vec<CheckStep>,
}

/// A step of `palisade intercept check`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct CheckStep {
    /// What was done: `policy`, `address`, `connect`, `client side`, `server side`, `certificate`.
    pub step: String,
    /// Whether the step succeeded.
    pub ok: bool,
    /// Details in words.
    pub text: String,
}

/// Selection of flows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ObserveRequest {
    /// Filters and range of times.
    pub query: ApiFilters,
    /// Whether to continue with flows that arrive later.
    pub follow: bool,
    /// Number of oldest matching flows to send, instead of `last`.
    pub first: Option<usize>,
    /// Identifier of a flow after which to continue; if the ring does not have the flow, with its oldest one. Replaces
    /// `last`.
    pub after: Option<String>,
    /// Number of most recent matching flows to send; `None` for all.
    pub last: Option<usize>,
    /// With `follow`: also send the events of the daemon after this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_events: Option<Timestamp>,
}

/// An event of the daemon: a change of policies, endpoints, the ipcache or learned names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct AgentNotice {
    /// Time of the event.
    pub time: Timestamp,
    /// Kind of the event, as in `cilium monitor`.
    pub subtype: Cow<'static, str>,
    /// What has changed.
    pub message: serde_json::Value,
}

/// Levels of the log for a limited time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LogSetRequest {
    /// Level by component.
    pub levels: BTreeMap<String, String>,
    /// Only connections of this endpoint: number, name or address.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// Only connections with this address as client or server.
    #[serde(default)]
    pub address: Option<std::net::IpAddr>,
    /// Time after which the log has its usual levels again, s.
    pub seconds: u64,
}

/// Levels of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogStatus {
    /// Level of each component.
    pub components: Vec<LogComponent>,
    /// Name of the only endpoint whose connections are logged; `None` for all.
    pub endpoint: Option<String>,
    /// The only address whose connections are logged; `None` for all.
    pub address: Option<std::net::IpAddr>,
    /// Time until the log has its usual levels again, s; `None` if it has them.
    pub remaining_seconds: Option<u64>,
    /// Number of steps of connections that were logged since the levels were set.
    pub written: u64,
    /// Number of steps that were not logged, because there were too many.
    pub suppressed: u64,
}

/// Level of a component of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogComponent {
    /// Name of the component.
    pub component: String,
    /// `off`, `error`, `warn`, `info`, `debug` or `trace`.
    pub level: String,
    /// Whether `palisade log set` has set the level.
    pub is_set: bool,
}

/// Selection and limits of a capture.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct CaptureRequest {
    /// Flags of `palisade capture` that are filters, with their values, in the order of the command line.
    pub filters: Vec<(String, String)>,
    /// Bytes of each packet; `None` for headers only.
    pub snap_length: Option<u32>,
    /// Number of packets after which the capture ends.
    pub count: Option<u64>,
    /// Number of bytes that the capture does not exceed.
    pub max_bytes: Option<u64>,
    /// Time after which the capture ends, ms.
    pub duration_ms: u64,
}

/// End of a capture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CaptureSummary {
    /// Packets that were sent.
    pub packets: u64,
    /// Bytes of the pcapng blocks that were sent.
    pub bytes: u64,
    /// Packets that did not fit in the buffer, whether or not the filters accept them.
    pub lost: u64,
    /// Why the capture ended: `client`, `duration`, or `bound` (packets or bytes).
    pub ended: String,
}

/// Description of one packet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TraceRequest {
    /// Source: endpoint, peer, address, or a reserved identity.
    pub from: String,
    /// Destination. With `to_fqdn`: an address of that name, or empty.
    pub to: String,
    /// Name by which the source has learned the destination.
    #[serde(default)]
    pub to_fqdn: Option<String>,
    /// Name that the packet queries in DNS.
    #[serde(default)]
    pub dns: Option<String>,
    /// HTTP request on the connection.
    #[serde(default)]
    pub http: Option<TraceHttp>,
    /// Server name in the TLS ClientHello; empty for a ClientHello without one.
    #[serde(default)]
    pub tls: Option<String>,
    /// Kafka request on the connection.
    #[serde(default)]
    pub kafka: Option<Box<TraceKafka>>,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port, or ICMP type; 0 for protocols without either.
    pub port: u16,
}

/// Subject of an explanation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum ExplainRequest {
    /// A flow of the ring, by its UUID.
    Flow(String),
    /// A recorded flow as a line of JSON.
    Record(String),
    /// A packet that the operator describes.
    Packet(Box<TraceRequest>),
}

/// Description of an HTTP request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TraceHttp {
    /// Method.
    pub method: String,
    /// Path with query.
    pub path: String,
    /// Host, perhaps with a port; empty for a request without one.
    pub host: String,
    /// Header fields.
    pub headers: Vec<(String, String)>,
    /// Whether the version is HTTP/1.0 instead of HTTP/1.1.
    #[serde(default)]
    pub is_http10: bool,
}

/// Description of a Kafka request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TraceKafka {
    /// API key.
    pub api_key: i16,
    /// API version.
    pub api_version: i16,
    /// Client id; none for null.
    pub client_id: Option<String>,
    /// Topics.
    pub topics: Vec<String>,
}

/// A line of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Answer {
    /// The answer, or the end of a stream.
    Ok(serde_json::Value),
    /// The request failed, for this reason.
    Error(String),
    /// One flow of a stream.
    Flow(Box<Flow>),
    /// Flows that were lost, and where.
    Lost(Lost),
    /// An event of the daemon.
    Agent(Box<AgentNotice>),
    /// Whole pcapng blocks, in base64.
    Capture(String),
    /// Some conntrack entries.
    Connections(Vec<ConnectionRow>),
    /// The stream continues, but there is no flow to send.
    Alive,
}

/// [`Answer::Flow`] with a borrowed flow.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum FlowAnswer<'a> {
    /// One flow of a stream.
    Flow(&'a Flow),
}

/// Answer to [`Request::Restart`]: the daemon ends, and its program is executed again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Restarting {
    /// Name of the restart, which [`RestartStatus::token`] repeats.
    pub token: String,
}

/// A planned restart, and the connections that were being inspected.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RestartStatus {
    /// Name of the restart.
    pub token: String,
    /// Version of the program before.
    pub from: String,
    /// Connections whose inspection goes on.
    pub connections: u64,
    /// Connections that could not be handed over or taken over. They are reset when either end sends.
    pub cut: u64,
    /// Why no connection was taken over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Answer of `palisade status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Name of the node.
    pub node: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Time since the start of the daemon, s.
    pub uptime_seconds: u64,
    /// The planned restart with which the daemon began; `None` if it was started otherwise.
    #[serde(default)]
    pub restarted: Option<RestartStatus>,
    /// Whether everything is attached and enforced.
    pub ready: bool,
    /// Descriptions of everything that is not attached or enforced.
    pub missing: Vec<String>,
    /// Problems that do not affect what is enforced.
    pub warnings: Vec<String>,
    /// What needs no action: the policies that failsafe ports override.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Value of `[policy] enforcement`.
    pub enforcement: String,
    /// Value of `[policy] audit`.
    pub audit: bool,
    /// Number of changes that were put in force.
    pub revision: u64,
    /// Duration of the last change, from its beginning to the write of the last map entry, s.
    pub last_change_seconds: f64,
    /// Guarded interfaces.
    pub interfaces: Vec<InterfaceStatus>,
    /// Endpoints of this node.
    pub endpoints: Vec<Endpoint>,
    /// Path of the policy folder.
    pub policy_dir: String,
    /// Files of the policy folder.
    pub policy_files: Vec<PolicyFile>,
    /// Change of policies that waits for its confirmation.
    #[serde(default)]
    pub pending_change: Option<PendingChange>,
    /// Found workloads that are no endpoints.
    #[serde(default)]
    pub refused_workloads: RefusedWorkloads,
    /// Live connections that the policies in force deny; `None` if the list is not known. The command asks for them with
    /// a request of their own.
    #[serde(default)]
    pub denied_connections: Option<DeniedConnections>,
    /// Kinds of inspection that policies need and no inspector implements.
    pub missing_inspectors: Vec<MissingInspector>,
    /// Fill levels of the maps.
    pub maps: Vec<MapFill>,
    /// The workers.
    pub workers: Workers,
    /// The flow exports.
    #[serde(default)]
    pub exports: Vec<ExportStatus>,
    /// Counters of the conntrack map.
    pub conntrack: ConntrackStatus,
    /// Counters of events.
    pub events: EventStatus,
    /// Learned names.
    #[serde(default)]
    pub names: NamesStatus,
    /// The flow API.
    #[serde(default)]
    pub hubble: HubbleStatus,
    /// The capture that runs, if one does.
    #[serde(default)]
    pub capture: Option<CaptureStatus>,
    /// Packets dropped since the maps were made.
    pub drops: Vec<DropCount>,
}

/// State of a capture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CaptureStatus {
    /// Filters as options of `palisade capture`; empty if all packets are captured.
    pub filters: String,
    /// Start of the capture.
    pub since: Timestamp,
    /// Packets that were sent to the client.
    pub packets: u64,
    /// Bytes of the pcapng blocks that were sent.
    pub bytes: u64,
    /// Packets that did not fit in the buffer, whether or not the filters accept them.
    pub lost: u64,
}

/// State of a flow export.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExportStatus {
    /// `[[export]] name`.
    pub name: String,
    /// Path of the file.
    pub file: String,
    /// `running`, `failing` (the last write failed and is repeated) or `ended` (`[[export]] end` has passed).
    pub state: String,
    /// Number of lines written.
    pub written: u64,
    /// Number of flows that were overwritten in the ring before the export could read them.
    pub lost: u64,
    /// Number of failed writes.
    pub failed_writes: u64,
    /// Number of files that were full and renamed.
    pub rotations: u64,
    /// Why the last write failed, or why old files could not be removed.
    pub problem: Option<String>,
}

/// State of the flow API.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HubbleStatus {
    /// Path of the unix socket, if it is served.
    pub socket: Option<String>,
    /// Address of the TCP listener, if it is served.
    pub listen: Option<String>,
    /// Whether the TCP listener uses TLS.
    pub tls: bool,
    /// Streams of flows or events that clients read.
    pub readers: usize,
    /// Flows and events that clients have lost because they were too slow.
    pub lost: u64,
    /// Clients that were refused.
    pub refused: u64,
    /// Clients that were disconnected because they did not read.
    pub cut: u64,
}

/// Attachment of a configured interface.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct InterfaceStatus {
    /// Name of the interface.
    pub name: String,
    /// Index of the interface; 0 if it does not exist.
    pub ifindex: u32,
    /// `host` or `endpoint`.
    pub role: String,
    /// Number of the endpoint behind the interface.
    pub endpoint: u16,
    /// Hook at ingress: `xdp (native)`, `xdp (skb)`, `tcx`, `clsact`.
    pub ingress: Option<String>,
    /// Hook at egress.
    pub egress: Option<String>,
    /// Why the daemon has not used the hook that it prefers; `None` if it has.
    pub note: Option<String>,
    /// Why the interface is not guarded.
    pub problem: Option<String>,
}

/// An endpoint of this node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Endpoint {
    /// Number of the endpoint.
    pub id: u16,
    /// `namespace/name`.
    pub name: String,
    /// Identity of the endpoint.
    pub identity: u32,
    /// Labels of the identity.
    pub labels: Vec<String>,
    /// Addresses of the endpoint.
    pub addresses: Vec<String>,
    /// Interface of a workload; `None` for the node.
    pub interface: Option<String>,
    /// `Enabled`, `Disabled`, or `Disabled (Audit)`.
    pub ingress_enforcement: String,
    /// Enforcement at egress, with the same values.
    pub egress_enforcement: String,
    /// Number of the policy table.
    pub policy: u32,
    /// Revision of the policy.
    pub revision: u32,
    /// Names of the policies that select the endpoint.
    pub policies: Vec<String>,
    /// `ready`, or what the endpoint waits for.
    pub state: String,
    /// Where the endpoint comes from: `config`, or what it was found by, `netns:NAME`.
    #[serde(default)]
    pub source: String,
    /// Options by name.
    pub options: BTreeMap<String, bool>,
}

/// A file of the policy folder.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PolicyFile {
    /// Name of the file in the folder.
    pub file: String,
    /// Whether the present content is in force.
    pub state: PolicyFileState,
    /// Number of policies of the file that are in force.
    pub policies: usize,
    /// Diagnostics of the form `FILE:LINE:COL: message`.
    pub diagnostics: Vec<String>,
}

/// What a reload has found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ReloadAnswer {
    /// Remarks for the operator, for example changed options that need a restart.
    pub notes: Vec<String>,
    /// The errors of broken policy files, and what is in force instead.
    pub broken: Vec<String>,
}

/// Whether the present content of a file is in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PolicyFileState {
    /// The present content is in force.
    #[default]
    InForce,
    /// The file is broken; its last good content is in force.
    LastGood,
    /// The file is broken and has no last good content; none of its policies is in force.
    Unused,
}

/// A kind of inspection that policies need and no inspector implements.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct MissingInspector {
    /// Kind: http, dns, tls, kafka, listener, tls-terminate.
    pub inspector: String,
    /// Names of the policies.
    pub policies: Vec<String>,
}

/// Fill level of a map.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct MapFill {
    /// Name of the map.
    pub map: String,
    /// Number of entries.
    pub entries: u64,
    /// Maximum number of entries.
    pub capacity: u64,
}

/// State of all workers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Workers {
    /// Name of the node's end of the punt link; empty without workers.
    pub punt_link: String,
    /// `poll`, `spin` or `busy-poll`.
    pub mode: String,
    /// Treatment of packets that need inspection while no worker runs: `drop` or `pass`.
    pub on_failure: String,
    /// Why there are no workers.
    pub problem: Option<String>,
    /// State of each worker.
    pub workers: Vec<Worker>,
    /// Sums of the inspection metrics of all workers: by group (`dns`, `http.tcp`) and name.
    #[serde(default)]
    pub inspection: BTreeMap<String, BTreeMap<String, u64>>,
    /// Sums of the inspection state of all workers.
    #[serde(default)]
    pub keeps: Keeps,
}

/// State that workers hold for inspection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Keeps {
    /// Number of inspected connections.
    pub connections: u64,
    /// Number of offloaded connections, which are evaluated again if their rules change.
    pub remembered: u64,
    /// Bytes of streams that receivers have not acknowledged.
    pub bytes: u64,
    /// Number of packets that wait for a verdict.
    pub packets: u64,
}

/// State of a worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Worker {
    /// Number of the worker and of its queue.
    pub number: usize,
    /// `starting`, `running`, `down` or `ended`.
    pub state: String,
    /// Why the worker is down.
    pub problem: Option<String>,
    /// Number of restarts.
    pub restarts: u64,
    /// Number of received packets.
    pub packets_in: u64,
    /// Bytes of received packets.
    pub bytes_in: u64,
    /// Number of reinjected packets.
    pub packets_out: u64,
    /// Bytes of reinjected packets.
    pub bytes_out: u64,
    /// Packets that the worker generated and sent: responses, resets, acknowledgements, deliveries of held bytes.
    pub generated: u64,
    /// Generated packets that were not sent, for lack of a frame or of space in the TX ring.
    pub generated_lost: u64,
    /// Packets whose bytes were delivered in generated packets.
    #[serde(default)]
    pub absorbed: u64,
    /// Packets whose TCP options were rewritten.
    #[serde(default)]
    pub options_rewritten: u64,
    /// Packets handed off to the workers that own their flows.
    pub handoff_out: u64,
    /// Packets that other workers handed off to this one.
    pub handoff_in: u64,
    /// Number of packets that wait for a verdict.
    pub held: u64,
    /// Number of frames of the socket.
    pub frames: u64,
    /// Number of tracked flows.
    pub flows: u64,
    /// Records that were lost because the queue was full.
    pub records_lost: u64,
    /// Number of times that the worker slept.
    pub sleeps: u64,
    /// Dropped packets by reason.
    pub drops: Vec<WorkerDrops>,
    /// Packets that the rings of the socket have lost.
    pub ring: WorkerRing,
}

/// Packets that a worker dropped for one reason.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct WorkerDrops {
    /// Number of the reason.
    pub reason: u8,
    /// Text of the reason.
    pub text: String,
    /// Number of packets.
    pub packets: u64,
}

/// Counters of losses at the rings of a worker's socket (`struct xdp_statistics`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WorkerRing {
    /// Packets dropped for a reason other than a full ring.
    pub rx_dropped: u64,
    /// Packets dropped because the RX ring was full.
    pub rx_ring_full: u64,
    /// Number of times that the kernel found the fill ring empty.
    pub rx_fill_ring_empty: u64,
    /// Number of invalid descriptors.
    pub invalid: u64,
}

/// Numbers of found workloads that are no endpoints and stay denied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RefusedWorkloads {
    /// Workloads that are denied now, without those that are incomplete because they start.
    pub now: usize,
    /// Times that a workload claimed a name, an interface or an address of another, since the start of the daemon.
    pub conflicts_total: u64,
}

/// Counters of the conntrack map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConntrackStatus {
    /// Number of entries.
    pub entries: u64,
    /// Maximum number of entries.
    pub capacity: u64,
    /// Entries made by packets.
    pub made: u64,
    /// Entries made from the kernel's own tables when Palisade was first attached.
    pub seeded: u64,
    /// Entries that the daemon has removed because they had expired or their endpoint was removed.
    pub swept: u64,
    /// Entries evicted by newer flows of the same endpoint and direction, or by the kernel because the map was full.
    pub evicted: u64,
    /// Number of protected flows: both ends use them, so newer flows do not evict them.
    #[serde(default)]
    pub protected: u64,
}

/// Counters of events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EventStatus {
    /// Events that this daemon has read.
    pub read: u64,
    /// Events suppressed by the rate limit.
    pub suppressed: u64,
    /// Events lost because the ring was full.
    pub lost: u64,
    /// Clients that were disconnected because they did not send their request or read the answer in time.
    pub slow_clients: u64,
}

/// Counters of learned names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NamesStatus {
    /// Number of names, counted for each endpoint.
    pub names: usize,
    /// Number of addresses of names.
    pub addresses: usize,
    /// Number of addresses in the map.
    pub in_map: usize,
    /// Number of addresses whose map entry is missing, outdated, or unknown after a failed write.
    pub unwritten: usize,
    /// Memory of the names, bytes.
    pub bytes: usize,
    /// Number of committed answers.
    pub committed: u64,
    /// Number of answers withheld because the maps do not hold their addresses.
    pub refused: u64,
    /// Number of answers that waited for an identity.
    pub waited: u64,
    /// Number of addresses evicted by a limit.
    pub evicted: u64,
    /// Number of addresses that were not learned because a limit is reached and no other address can be evicted.
    pub over_limit: u64,
    /// Special-purpose addresses that were not learned.
    #[serde(default)]
    pub special: u64,
    /// Number of answers withheld because the endpoint has too many sets of selectors.
    #[serde(default)]
    pub identities_over_limit: u64,
    /// Number of addresses that expired unused.
    pub expired: u64,
    /// Number of failed writes to the map.
    pub failures: u64,
    /// Error of the last failed write.
    pub failure: Option<String>,
}

/// An address that an endpoint has learned.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct FqdnRow {
    /// Number of the endpoint.
    pub endpoint: u16,
    /// Name of the endpoint.
    pub endpoint_name: String,
    /// Name that was resolved.
    pub name: String,
    /// Address of the name.
    pub address: String,
    /// Selectors of the endpoint's policies that match the name.
    pub selectors: Vec<String>,
    /// Identity of the address in the map of learned addresses; 0 if the map has no entry for the endpoint and the
    /// address.
    pub identity: u32,
    /// Remaining lifetime, s; 0 if the address has expired.
    pub ttl_seconds: u64,
    /// `live`, `expired-in-use`, or `expired` (removed by one of the next sweeps).
    pub state: String,
    /// `answer`, `prefetch` or `restored`.
    pub source: String,
}

/// Packets dropped for one reason in one direction.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct DropCount {
    /// Number of the reason.
    pub reason: u8,
    /// Text of the reason.
    pub text: String,
    /// `ingress` or `egress`.
    pub direction: String,
    /// Number of packets.
    pub packets: u64,
    /// Bytes of these packets.
    pub bytes: u64,
}

/// A policy in force.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PolicySummary {
    /// `namespace/name`.
    pub name: String,
    /// Kind of the resource.
    pub kind: String,
    /// Location in the policy files: `FILE:LINE:COL`.
    pub location: String,
    /// Whether the policy is only reported and not enforced.
    pub audit: bool,
    /// Names of the endpoints of this node that the policy selects.
    pub endpoints: Vec<String>,
    /// Rules of the policy.
    pub rules: Vec<RuleSummary>,
    /// YAML document in force, if the policy was requested by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The same resource as JSON: `kind`, `metadata`, `spec`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource: Option<serde_json::Value>,
    /// Whether the file of the policy is broken now. The last good content of the file is then in force.
    #[serde(default)]
    pub file_broken: bool,
}

/// A rule of a policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct RuleSummary {
    /// Number of the rule in the maps; 0 if no policy table refers to the rule.
    pub id: u32,
    /// Text of the rule.
    pub rule: String,
    /// The rule as JSON: one element of `ingress`, `egressDeny` and so on. `None` unless the policy was requested by
    /// name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<serde_json::Value>,
    /// Number of packets that the rule has decided.
    pub packets: u64,
    /// Bytes of these packets.
    pub bytes: u64,
}

/// A selector of a policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct SelectorRow {
    /// Text of the selector.
    pub selector: String,
    /// Names of the policies with this selector.
    pub policies: Vec<String>,
    /// Number of rules with this selector.
    pub users: usize,
    /// Identities that the selector selects.
    pub identities: Vec<u32>,
}

/// Verdict on a described packet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct TraceAnswer {
    /// Whether the packet would arrive.
    pub passes: bool,
    /// Explanation as text.
    pub text: String,
    /// Explanation for scripts, as JSON.
    pub trace: serde_json::Value,
}

/// Explanation of a recorded flow or a described packet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ExplainAnswer {
    /// Whether the packet would arrive.
    pub passes: bool,
    /// Explanation as text.
    pub text: String,
    /// Explanation for scripts, as JSON.
    pub explanation: serde_json::Value,
}

/// An identity.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct IdentityRow {
    /// Number of the identity.
    pub id: u32,
    /// Labels of the identity.
    pub labels: Vec<String>,
}

/// An entry of a policy table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PolicyRow {
    /// `Allow`, `Deny`, `Inspect` or `Auth`.
    pub policy: String,
    /// `Ingress` or `Egress`; with ` (inside)`, the entry decides for a failsafe port at interfaces of workloads.
    pub direction: String,
    /// Identity of the peer; 0 for any.
    pub identity: u32,
    /// Labels of the peer; `ANY` for any.
    pub labels: Vec<String>,
    /// Ports: `80/TCP`, `8000-8999/TCP`, `ANY`.
    pub ports: Vec<String>,
    /// Inspector of the traffic.
    pub inspector: Option<String>,
    /// Whether both ends of the flow must authenticate.
    pub auth: bool,
    /// Whether drops are only reported (audit mode).
    pub audit: bool,
    /// Number of the deciding rule.
    pub rule: u32,
    /// Text of the deciding rule.
    pub decided_by: String,
    /// Bytes of packets that the rule has decided, over all policy table entries of the rule.
    pub bytes: u64,
    /// Packets that the rule has decided, over all policy table entries of the rule.
    pub packets: u64,
}

/// Which conntrack entries a request is about: all that match every member.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct ConnectionFilter {
    /// Number, name or address of the endpoint.
    pub endpoint: Option<String>,
    /// Prefixes of which one has the address of one end; empty for all addresses.
    pub addresses: Vec<IpNet>,
    /// Ports of which one is that of one end; empty for all ports.
    pub ports: Vec<u16>,
    /// IP protocol number.
    pub protocol: Option<u8>,
    /// Whether the peer opened the connection.
    pub ingress: Option<bool>,
    /// Identity of the peer.
    pub identity: Option<u32>,
}

impl ConnectionFilter {
    /// Returns whether all entries match.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Answer of `palisade bpf ct flush`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Flushed {
    /// Number of removed entries.
    pub flushed: u64,
    /// Number of entries that stay, because the policies in force deny their flows.
    pub kept: u64,
}

/// A conntrack entry.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ConnectionRow {
    /// Protocol: `TCP`, `UDP` and so on.
    pub protocol: String,
    /// `IN` if the peer opened the connection, `OUT` if the endpoint did.
    pub direction: String,
    /// Address that opened the connection, with port if the protocol has one.
    pub source: String,
    /// Address to which the connection was opened, with port if the protocol has one.
    pub destination: String,
    /// Number of the endpoint.
    pub endpoint: u16,
    /// Time to expiry, s; negative if the entry has expired and is not swept yet.
    pub expires_in_seconds: i64,
    /// Packets of the original direction.
    pub forward_packets: u64,
    /// Bytes of the original direction.
    pub forward_bytes: u64,
    /// Packets of the reply direction.
    pub reply_packets: u64,
    /// Bytes of the reply direction.
    pub reply_bytes: u64,
    /// TCP flags seen in the original direction.
    pub forward_tcp: u8,
    /// TCP flags seen in the reply direction.
    pub reply_tcp: u8,
    /// Identity of the peer.
    pub identity: u32,
    /// Revision of the policy at the last evaluation.
    pub revision: u32,
    /// Number of the rule that allows the connection.
    pub rule: u32,
    /// `Audit`, `Replied`, `Seeded`, `Midstream`, `Closed`.
    pub flags: Vec<String>,
}

/// An ipcache entry: a prefix and its identity.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct IpcacheRow {
    /// The prefix.
    pub prefix: String,
    /// Identity of the prefix.
    pub identity: u32,
    /// Number of the endpoint of this node that has this address; 0 if there is none.
    pub endpoint: u16,
    /// Labels of the identity.
    pub labels: Vec<String>,
}

#[cfg(test)]
mod tests {
    /// Returns the fields of the structs of this file as struct, documentation and name, without those of requests.
    fn fields() -> Vec<(String, String, String)> {
        let (mut of, mut docs) = (String::new(), String::new());
        let mut fields = Vec::new();
        for line in include_str!("api.rs").lines().map(str::trim) {
            if let Some(text) = line.strip_prefix("/// ") {
                docs.push_str(text);
                docs.push(' ');
            } else if let Some(rest) = line.strip_prefix("pub(crate) struct ") {
                of = rest.split([' ', '<', '(']).next().unwrap_or_default().to_owned();
                docs.clear();
            } else if let Some((name, _)) = line.strip_prefix("pub ").and_then(|rest| rest.split_once(": ")) {
                if !of.ends_with("Request") {
                    fields.push((of.clone(), std::mem::take(&mut docs), name.to_owned()));
                }
                docs.clear();
            } else if !line.starts_with("#[") {
                docs.clear();
            }
        }
        fields
    }

    #[test]
    fn names_of_durations_and_sizes_in_json_end_with_their_unit() {
        let fields = fields();
        assert!(fields.len() > 300, "{}", fields.len());
        let (mut durations, mut sizes) = (0, 0);
        for (of, docs, name) in &fields {
            let has = |unit: &str| {
                [";", ".", ","]
                    .iter()
                    .any(|end| docs.contains(&format!(", {unit}{end}")))
            };
            assert!(
                !["ms", "ns", "µs", "min", "h", "d"].into_iter().any(has),
                "{of}.{name}: durations are in seconds"
            );
            if has("s") {
                assert!(name.ends_with("_seconds"), "{of}.{name}: {docs}");
                durations += 1;
            }
            let is_size = docs.starts_with("Bytes ") || docs.starts_with("Number of bytes") || has("bytes");
            if is_size {
                assert!(name.split('_').any(|word| word == "bytes"), "{of}.{name}: {docs}");
                sizes += 1;
            }
        }
        assert!(durations > 5 && sizes > 10, "{durations} {sizes}");
    }
}
