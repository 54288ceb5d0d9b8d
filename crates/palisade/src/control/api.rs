//! What can be asked, and the shapes of the answers (which are also what `-o json` prints).

use std::collections::BTreeMap;

use palisade_flowlog::Flow;
use serde::{Deserialize, Serialize};

/// A request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// Nothing: whether anything is answered at all.
    Ping,
    /// [`Status`].
    Status,
    /// Ends the daemon; with `detach` everything that it attached goes too.
    Stop { detach: bool },
    /// The configuration is read again.
    Reload,
    /// [`PolicySummary`] of one policy or of all.
    PolicyGet { name: Option<String> },
    /// [`SelectorRow`]s.
    PolicySelectors,
    /// [`TraceAnswer`].
    PolicyTrace(TraceRequest),
    /// [`Endpoint`]s.
    EndpointList,
    /// An [`Endpoint`], by number, name or address.
    EndpointGet { endpoint: String },
    /// Sets options of an endpoint; answers all of them by name.
    EndpointConfig {
        endpoint: String,
        options: BTreeMap<String, bool>,
    },
    /// [`IdentityRow`]s.
    IdentityList,
    /// An [`IdentityRow`].
    IdentityGet { identity: u32 },
    /// [`PolicyRow`]s of an endpoint.
    BpfPolicyGet { endpoint: String },
    /// [`ConnectionRow`]s.
    BpfCtList,
    /// [`IpcacheRow`]s.
    BpfIpcacheList,
    /// [`FqdnRow`]s, of one endpoint or of all.
    FqdnCacheList { endpoint: Option<String> },
    /// Forgets names: of one endpoint or of all, one name, those of a pattern or all. Answers how many addresses.
    FqdnCacheClean {
        endpoint: Option<String>,
        name: Option<String>,
        pattern: Option<String>,
    },
    /// A stream of [`Answer::Flow`].
    Observe(ObserveRequest),
}

/// Which flows, and how many.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ObserveRequest {
    /// Flags of `palisade observe` and their values, in their order.
    pub filters: Vec<(String, String)>,
    /// Go on with what comes.
    pub follow: bool,
    /// The last so many that pass; `None`: all there are.
    pub last: Option<usize>,
}

/// One packet described by hand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TraceRequest {
    /// Who sends: endpoint, peer, address, or a reserved identity.
    pub from: String,
    /// Who receives; with `to_fqdn` its address, or nothing.
    pub to: String,
    /// The sender has learned the receiver by this name.
    #[serde(default)]
    pub to_fqdn: Option<String>,
    /// The packet asks DNS for this name.
    #[serde(default)]
    pub dns: Option<String>,
    /// The connection carries this HTTP request.
    #[serde(default)]
    pub http: Option<TraceHttp>,
    /// The connection begins with a TLS hello for this server name; empty: without one.
    #[serde(default)]
    pub tls: Option<String>,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port, or the ICMP type; 0 where the protocol has none.
    pub port: u16,
}

/// An HTTP request described by hand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TraceHttp {
    /// Method.
    pub method: String,
    /// Path with query.
    pub path: String,
    /// Host, with its port if one is given; empty: none.
    pub host: String,
    /// Header fields.
    pub headers: Vec<(String, String)>,
    /// HTTP/1.0; else HTTP/1.1.
    #[serde(default)]
    pub is_http10: bool,
}

/// A line of the daemon's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Answer {
    /// The answer, or the end of a stream.
    Ok(serde_json::Value),
    /// Nothing was done.
    Error(String),
    /// One flow of a stream.
    Flow(Box<Flow>),
    /// So many flows were overwritten before this client could read them.
    Lost(u64),
    /// The stream goes on, there is just nothing to send.
    Alive,
}

/// What `palisade status` shows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// Of the daemon.
    pub version: String,
    /// Name of the node.
    pub node: String,
    /// Of the daemon.
    pub pid: u32,
    /// Since when the daemon runs, seconds.
    pub uptime: u64,
    /// Everything is attached and enforced.
    pub ready: bool,
    /// What is missing for that.
    pub missing: Vec<String>,
    /// What an operator should look at, though what can be enforced is enforced.
    pub warnings: Vec<String>,
    /// `[policy] enforcement`.
    pub enforcement: String,
    /// `[policy] audit`.
    pub audit: bool,
    /// Counts the changes that were put in force.
    pub revision: u64,
    /// How long the last of them took, from reading the files to the last map entry, ms.
    pub last_change_ms: f64,
    /// Guarded interfaces.
    pub interfaces: Vec<InterfaceStatus>,
    /// Endpoints of this node.
    pub endpoints: Vec<Endpoint>,
    /// The folder of policies.
    pub policy_dir: String,
    /// Its files.
    pub policy_files: Vec<PolicyFile>,
    /// Kinds of inspection that policies want and nobody does yet.
    pub missing_inspectors: Vec<MissingInspector>,
    /// Fill levels.
    pub maps: Vec<MapFill>,
    /// The threads that read packets.
    pub workers: Workers,
    /// Connections.
    pub conntrack: ConntrackStatus,
    /// Events.
    pub events: EventStatus,
    /// Learned names.
    #[serde(default)]
    pub names: NamesStatus,
    /// Drops since the maps were made.
    pub drops: Vec<DropCount>,
}

/// An interface that is to be guarded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct InterfaceStatus {
    /// Its name.
    pub name: String,
    /// Its index, 0 if it is not there.
    pub ifindex: u32,
    /// host or endpoint.
    pub role: String,
    /// Number of the endpoint behind it.
    pub endpoint: u16,
    /// What stands at ingress, as it was got: `xdp (native)`, `xdp (skb)`, `tcx`, `clsact`.
    pub ingress: Option<String>,
    /// What stands at egress.
    pub egress: Option<String>,
    /// Why it is not guarded as was asked for first.
    pub note: Option<String>,
    /// Why it is not guarded.
    pub problem: Option<String>,
}

/// An endpoint of this node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Endpoint {
    /// Its number.
    pub id: u16,
    /// `namespace/name`.
    pub name: String,
    /// Its identity.
    pub identity: u32,
    /// Labels of the identity.
    pub labels: Vec<String>,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// Its interface; none for the node.
    pub interface: Option<String>,
    /// Enabled, Disabled, or either with (Audit).
    pub ingress_enforcement: String,
    /// The same for egress.
    pub egress_enforcement: String,
    /// The table that judges it.
    pub policy: u32,
    /// Of its policy.
    pub revision: u32,
    /// Policies that select it.
    pub policies: Vec<String>,
    /// ready, or what it waits for.
    pub state: String,
    /// Options by name.
    pub options: BTreeMap<String, bool>,
}

/// A file of the policy folder.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PolicyFile {
    /// Its name within the folder.
    pub file: String,
    /// Whether what is in force is what the file says now.
    pub state: PolicyFileState,
    /// Policies of it in force.
    pub policies: usize,
    /// `FILE:LINE:COL: message`.
    pub diagnostics: Vec<String>,
}

/// How what a file says and what is in force go together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PolicyFileState {
    /// The same.
    #[default]
    InForce,
    /// The file is broken; what it said before is in force.
    LastGood,
    /// The file is broken and never was good: nothing of it is in force.
    Unused,
}

/// A kind of inspection that policies want and nobody does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct MissingInspector {
    /// http, dns, tls, kafka, listener, tls-terminate.
    pub inspector: String,
    /// The policies.
    pub policies: Vec<String>,
}

/// How full a map is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct MapFill {
    /// Its name.
    pub map: String,
    /// Entries in it.
    pub entries: u64,
    /// Entries it can have.
    pub capacity: u64,
}

/// The threads that read packets.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Workers {
    /// The punt link's end at the node; empty if there is no punt link.
    pub punt_link: String,
    /// poll, spin, busy-poll.
    pub mode: String,
    /// What becomes of packets that no worker can read: drop or pass.
    pub on_failure: String,
    /// Why there are none.
    pub problem: Option<String>,
    /// Each of them.
    pub workers: Vec<Worker>,
    /// What they have counted of what they read, all together: numbers by name, for `dns`, `http.tcp`, ...
    #[serde(default)]
    pub inspection: BTreeMap<String, BTreeMap<String, u64>>,
    /// What they keep for that now, all together.
    #[serde(default)]
    pub keeps: Keeps,
}

/// What workers keep to read traffic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Keeps {
    /// Connections that are read.
    pub connections: u64,
    /// Connections that are not read any more, and are judged again if their rules change.
    pub remembered: u64,
    /// Bytes of streams that receivers have not acknowledged yet.
    pub bytes: u64,
    /// Packets that wait for a verdict.
    pub packets: u64,
}

/// A thread that reads packets.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Worker {
    /// Its number, which is that of its queue.
    pub number: usize,
    /// starting, running, down, ended.
    pub state: String,
    /// Why it is down.
    pub problem: Option<String>,
    /// Times that it was started again.
    pub restarts: u64,
    /// Packets that came in.
    pub packets_in: u64,
    /// Bytes of them.
    pub bytes_in: u64,
    /// Packets that went on.
    pub packets_out: u64,
    /// Bytes of them.
    pub bytes_out: u64,
    /// Packets that it made and sent: refusals, resets, acknowledgements, redelivered bytes.
    pub generated: u64,
    /// Packets that it made and could not send for want of a frame or of room in the transmit ring.
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
    /// Packets that wait for a verdict.
    pub held: u64,
    /// Frames of its socket.
    pub frames: u64,
    /// Flows that it knows.
    pub flows: u64,
    /// Records that were lost because nobody took them.
    pub records_lost: u64,
    /// Times that it slept.
    pub sleeps: u64,
    /// What it dropped.
    pub drops: Vec<WorkerDrops>,
    /// What the rings of its sockets have lost.
    pub ring: WorkerRing,
}

/// Packets that a worker dropped for a reason.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct WorkerDrops {
    /// The reason's number.
    pub reason: u8,
    /// The reason in words.
    pub text: String,
    /// How many.
    pub packets: u64,
}

/// What the rings of a worker's sockets have lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WorkerRing {
    /// Dropped for another reason than a full ring.
    pub rx_dropped: u64,
    /// Dropped because the receive ring was full.
    pub rx_ring_full: u64,
    /// Dropped because there was no frame for them.
    pub rx_fill_ring_empty: u64,
    /// Descriptors that were not valid.
    pub invalid: u64,
}

/// Connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConntrackStatus {
    /// In the map.
    pub entries: u64,
    /// The map can have.
    pub capacity: u64,
    /// Made by packets.
    pub made: u64,
    /// Made from the kernel's own tables when Palisade was first attached.
    pub seeded: u64,
    /// Taken out because they were dead.
    pub swept: u64,
    /// Pushed out by newer flows of the same endpoint and direction, or by the kernel because the map was full.
    pub evicted: u64,
    /// In use by both ends: newer flows do not push these out.
    #[serde(default)]
    pub protected: u64,
}

/// Events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EventStatus {
    /// Read by this daemon.
    pub read: u64,
    /// Not sent: rate limit.
    pub suppressed: u64,
    /// Not sent: the ring was full.
    pub lost: u64,
    /// Clients of `observe` that were cut off because they did not read.
    pub slow_clients: u64,
}

/// Learned names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NamesStatus {
    /// Names that are known, each endpoint's for itself.
    pub names: usize,
    /// Addresses of names.
    pub addresses: usize,
    /// Addresses in the map.
    pub in_map: usize,
    /// Addresses that the map does not hold as it should.
    pub unwritten: usize,
    /// Bytes that the names take.
    pub bytes: usize,
    /// Answers that were released.
    pub committed: u64,
    /// Answers that were not, because the maps do not hold what they imply.
    pub refused: u64,
    /// Answers that had to wait for an identity.
    pub waited: u64,
    /// Addresses that a limit has pushed out.
    pub evicted: u64,
    /// Addresses that were not learned: the limit is reached, and all are in use.
    pub over_limit: u64,
    /// Special-purpose addresses that were not learned.
    #[serde(default)]
    pub special: u64,
    /// Answers that were withheld because their endpoint has as many combinations of names as it may.
    #[serde(default)]
    pub identities_over_limit: u64,
    /// Addresses that expired unused.
    pub expired: u64,
    /// Writes that failed.
    pub failures: u64,
    /// Why the last one did, if it did.
    pub failure: Option<String>,
}

/// An address that an endpoint has learned.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct FqdnRow {
    /// The endpoint's number.
    pub endpoint: u16,
    /// The endpoint's name.
    pub endpoint_name: String,
    /// The name that was asked for.
    pub name: String,
    /// The address.
    pub address: String,
    /// Selectors of the endpoint's policies that the name matches.
    pub selectors: Vec<String>,
    /// The identity that the address has for the endpoint; 0: none by name.
    pub identity: u32,
    /// Seconds until it expires; 0: it has.
    pub ttl: u64,
    /// live, or expired-in-use, or expired (goes with one of the next sweeps).
    pub state: String,
    /// answer, prefetch or restored.
    pub source: String,
}

/// Packets dropped for a reason.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct DropCount {
    /// The reason's number.
    pub reason: u8,
    /// The reason in words.
    pub text: String,
    /// ingress or egress.
    pub direction: String,
    /// How many.
    pub packets: u64,
    /// How long together.
    pub bytes: u64,
}

/// A policy in force.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PolicySummary {
    /// `namespace/name`.
    pub name: String,
    /// The resource's kind.
    pub kind: String,
    /// Where it is written.
    pub location: String,
    /// Only reported, not enforced.
    pub audit: bool,
    /// Endpoints of this node that it selects, by name.
    pub endpoints: Vec<String>,
    /// Its rules.
    pub rules: Vec<RuleSummary>,
    /// Its document as it is in force, if the policy was asked for by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The same resource as the YAML reader reads it: `kind`, `metadata`, `spec`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource: Option<serde_json::Value>,
    /// The file is broken now: it does not say what is in force any more.
    #[serde(default)]
    pub file_broken: bool,
}

/// A rule of a policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct RuleSummary {
    /// Its number in the maps; 0 if no table has it.
    pub id: u32,
    /// In words.
    pub rule: String,
    /// The rule itself, if the policy was asked for by name: the entry of `ingress`, `egressDeny`, ...
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<serde_json::Value>,
    /// Packets that it decided.
    pub packets: u64,
    /// Their length together.
    pub bytes: u64,
}

/// A selector of a policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct SelectorRow {
    /// As it would be written.
    pub selector: String,
    /// The policies that have it.
    pub policies: Vec<String>,
    /// How many rules have it.
    pub users: usize,
    /// Whom it selects.
    pub identities: Vec<u32>,
}

/// What would happen to a packet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct TraceAnswer {
    /// Whether it would arrive.
    pub passes: bool,
    /// How that comes, in words.
    pub text: String,
    /// The same for programs.
    pub trace: serde_json::Value,
}

/// An identity.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct IdentityRow {
    /// Its number.
    pub id: u32,
    /// Its labels.
    pub labels: Vec<String>,
}

/// An entry of a policy table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PolicyRow {
    /// Allow, Deny, Inspect, Auth.
    pub policy: String,
    /// Ingress or Egress.
    pub direction: String,
    /// Of the other end; 0: anybody.
    pub identity: u32,
    /// Labels of the other end; ANY for anybody.
    pub labels: Vec<String>,
    /// `80/TCP`, `8000-8999/TCP`, `ANY`, ...
    pub ports: Vec<String>,
    /// Who reads the traffic; none if nobody does.
    pub inspector: Option<String>,
    /// Whether the ends have to authenticate.
    pub auth: bool,
    /// Dropped only in name: audit mode.
    pub audit: bool,
    /// The deciding rule's number.
    pub rule: u32,
    /// The deciding rule in words.
    pub decided_by: String,
    /// Bytes that the rule decided, all its entries together.
    pub bytes: u64,
    /// Packets that the rule decided, all its entries together.
    pub packets: u64,
}

/// A connection.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ConnectionRow {
    /// TCP, UDP, ...
    pub protocol: String,
    /// IN: the other end opened it. OUT: the endpoint did.
    pub direction: String,
    /// Who opened it, with port where there is one.
    pub source: String,
    /// Whom, with port where there is one.
    pub destination: String,
    /// The endpoint, by number.
    pub endpoint: u16,
    /// Seconds from now on; negative: dead, not swept yet.
    pub expires: i64,
    /// From the side that opened it.
    pub forward_packets: u64,
    /// From the side that opened it.
    pub forward_bytes: u64,
    /// From the other side.
    pub reply_packets: u64,
    /// From the other side.
    pub reply_bytes: u64,
    /// TCP flags seen from the side that opened it.
    pub forward_tcp: u8,
    /// TCP flags seen from the other side.
    pub reply_tcp: u8,
    /// Of the other end.
    pub identity: u32,
    /// Of the policy under which it was judged.
    pub revision: u32,
    /// The rule that let it through.
    pub rule: u32,
    /// Audit, Replied, Seeded, Midstream, Closed.
    pub flags: Vec<String>,
}

/// Who an address is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct IpcacheRow {
    /// Prefix.
    pub prefix: String,
    /// Its identity.
    pub identity: u32,
    /// The endpoint of this node that has it; 0: none.
    pub endpoint: u16,
    /// Labels of the identity.
    pub labels: Vec<String>,
}
