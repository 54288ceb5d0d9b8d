//! What clients ask for.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Sender},
    },
    time::{Duration, Instant, SystemTime},
};

use palisade_abi::{
    CLASS_ANY, Counter, Decision, Direction, EventKind, Identity, LearnedKey, ct_flags, entry_flags,
    identity, maps, protocol,
};
use palisade_datapath::{Datapath, MapError, monotonic_coarse};
use palisade_flowlog::{FilterBuilder, Next, Ordered, Ring, Timestamp};
use palisade_fqdn::{SelectorId, Selectors};
use palisade_inspect::Inspectors;
use palisade_model::{
    inventory::{Endpoint as WorldEndpoint, Enforcement},
    request::{self, HttpOptions},
    rule::{FqdnPattern, Peer, Policy},
    snapshot::{RuleKey, RulePlace, Snapshot, TableKey, inspector_name},
};
use palisade_policy::{
    compile::Compiler,
    parse::yaml_to_json,
    trace::{self, Outcome, Question},
};
use palisade_protocols::dns::Name;
use serde::Serialize;
use serde_json::Value;

use super::{
    control::{Answer, Control, Message},
    fqdn::FqdnManager,
    netfilter,
    selector_text::peer_text,
    view::{Shared, View, class_names, kind_name, prefix_text},
    watchdog::{ControlActivity, WorkerHeartbeats, hanging},
    workers::INSPECTORS,
};
use crate::config::{Config, limit_hint, with_option};
use crate::control::{
    ALIVE_INTERVAL,
    api::{
        self, ConnectionRow, ConntrackStatus, DropCount, Endpoint, FqdnRow, IdentityRow, InterfaceStatus,
        IpcacheRow, MapFill, MissingInspector, NamesStatus, ObserveRequest, PolicyFileState, PolicyRow,
        PolicySummary, Request, RuleSummary, SelectorRow, Status, TraceAnswer, TraceRequest,
    },
    server::{Counts, Handler, Sink},
};

/// The control thread does what it is asked to do by then, or something is very wrong.
const CONTROL_DEADLINE: Duration = Duration::from_secs(60);
/// It answers what it only has to look up by then, or it is busy, and that is the answer.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(5);
/// A client that follows is looked after so often when nothing happens.
const FOLLOW_POLL_INTERVAL: Duration = Duration::from_millis(250);
/// Records of workers come to the ring so much later than events of the programs, at most (a tick of the coarse clock,
/// and what the threads wait for their turn). Flows that are followed are put in order within that time.
const REORDER_WINDOW: Duration = Duration::from_millis(50);
/// So many of them, at most.
const MAX_REORDERED_FLOWS: usize = 4_096;

/// Answers clients, each on a thread of its own: what can be read without the control thread is.
pub struct Handlers {
    pub control: Sender<Message>,
    pub datapath: Arc<Datapath>,
    pub shared: Arc<Shared>,
    pub names: Arc<FqdnManager>,
    pub ring: Arc<Ring>,
    /// Events read so far.
    pub events: Arc<AtomicU64>,
    /// What the control thread is at.
    pub activity: Arc<ControlActivity>,
    /// When workers have said last that they live.
    pub heartbeats: Option<Arc<WorkerHeartbeats>>,
    /// The daemon's nftables table.
    pub netfilter: netfilter::Place,
    /// The server's own counts, once it runs.
    pub server: OnceLock<Arc<Counts>>,
}

impl Handler for Handlers {
    fn handle(&self, request: Request, sink: &mut dyn Sink) -> io::Result<()> {
        let answer = match request {
            Request::Observe(request) => return self.observe(&request, sink),
            Request::Ping => Ok(Value::Null),
            Request::Status => self.status(),
            Request::PolicyGet { name } => self.policies(name),
            Request::IdentityList => to_value(&self.identities()),
            Request::IdentityGet { identity } => self.identity(identity),
            Request::BpfPolicyGet { endpoint } => self.policy_table(endpoint),
            Request::BpfCtList => self.connections(),
            Request::BpfIpcacheList => self.ipcache(),
            Request::FqdnCacheList { endpoint } => self.learned_names(endpoint),
            Request::FqdnCacheClean {
                endpoint,
                name,
                pattern,
            } => self.clean_names(endpoint, name, pattern),
            other => self.ask(other),
        };
        sink.send(&match answer {
            Ok(value) => api::Answer::Ok(value),
            Err(message) => api::Answer::Error(message),
        })
    }
}

fn to_value<T: Serialize>(value: &T) -> Answer {
    serde_json::to_value(value).map_err(|error| error.to_string())
}

fn from_value<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, String> {
    serde_json::from_value(value).map_err(|error| error.to_string())
}

fn map_error(error: MapError) -> String {
    with_option(&error)
}

impl Handlers {
    /// Asks the control thread.
    fn ask(&self, request: Request) -> Answer {
        let (sender, receiver) = mpsc::sync_channel(1);
        let gone = || "the daemon is ending".to_owned();
        let changes = matches!(
            request,
            Request::Stop { .. } | Request::Reload | Request::EndpointConfig { .. }
        );
        let deadline = if changes {
            CONTROL_DEADLINE
        } else {
            LOOKUP_DEADLINE
        };
        self.control
            .send(Message::Ask(request, sender))
            .map_err(|_| gone())?;
        match receiver.recv_timeout(deadline) {
            Ok(answer) => answer,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let busy = hanging(
                    &self.activity,
                    self.heartbeats.as_deref(),
                    Duration::ZERO,
                    monotonic_coarse(),
                );
                Err(format!(
                    "{}; what is attached goes on enforcing the last policy; try again",
                    busy.unwrap_or_else(|| "the daemon is busy".to_owned())
                ))
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(gone()),
        }
    }

    fn observe(&self, request: &ObserveRequest, sink: &mut dyn Sink) -> io::Result<()> {
        let mut builder = FilterBuilder::new(Timestamp::from_system_time(SystemTime::now()));
        let built = request
            .filters
            .iter()
            .try_for_each(|(flag, value)| builder.flag(flag, value))
            .and_then(|()| builder.finish());
        let filters = match built {
            Ok(filters) => filters,
            Err(error) => return sink.send(&api::Answer::Error(error.to_string())),
        };
        let (mut flows, mut cursor) = self.ring.last(request.last.unwrap_or(usize::MAX), &filters);
        flows.sort_by_key(|flow| flow.time);
        for flow in flows {
            sink.queue(&api::Answer::Flow(Box::new((*flow).clone())))?;
        }
        sink.flush()?;
        if !request.follow {
            return sink.send(&api::Answer::Ok(Value::Null));
        }
        if !sink.follow() {
            let why = "too many clients follow flows at the same time; end one of them".to_owned();
            return sink.send(&api::Answer::Error(why));
        }
        let mut said = Instant::now();
        let mut ordered = Ordered::new(REORDER_WINDOW, MAX_REORDERED_FLOWS);
        loop {
            while let Some(next) = cursor.read() {
                match next {
                    Next::Flow(flow) if filters.matches(&flow) => ordered.push(flow, Instant::now()),
                    Next::Flow(_) => {}
                    Next::Lost(count) => sink.queue(&api::Answer::Lost(count))?,
                }
            }
            while let Some(flow) = ordered.due(Instant::now()) {
                sink.queue(&api::Answer::Flow(Box::new((*flow).clone())))?;
            }
            sink.flush()?;
            let patience = if ordered.is_empty() {
                FOLLOW_POLL_INTERVAL
            } else {
                REORDER_WINDOW
            };
            if !cursor.wait(patience) && sink.closed() {
                return Ok(());
            }
            if said.elapsed() >= ALIVE_INTERVAL {
                sink.send(&api::Answer::Alive)?;
                said = Instant::now();
            }
        }
    }

    fn status(&self) -> Answer {
        let mut status: Status = from_value(self.ask(Request::Status)?)?;
        let conntrack = self.datapath.conntrack().counts().map_err(map_error)?;
        status.conntrack = ConntrackStatus {
            entries: conntrack.present,
            capacity: conntrack.max_entries,
            made: conntrack.made,
            seeded: conntrack.seeded,
            swept: conntrack.swept,
            evicted: conntrack.evicted,
            protected: conntrack.protected,
        };
        let exhausted = self.datapath.conntrack().exhausted();
        if !exhausted.is_empty() {
            let names: Vec<String> = exhausted.iter().map(ToString::to_string).collect();
            status.warnings.push(format!(
                "endpoints {} have as many connections as the conntrack map has room for: further ones give way to \
                 newer ones of the same endpoint; raise [limits] conntrack",
                names.join(", ")
            ));
        }
        let fills = self.datapath.fill_levels().map_err(map_error)?;
        status.maps = fills
            .into_iter()
            .map(|fill| MapFill {
                map: fill.map.to_lowercase(),
                entries: fill.entries,
                capacity: fill.max_entries,
            })
            .collect();
        for map in &status.maps {
            // The conntrack map may be full: the oldest flow makes room. The others refuse.
            if map.map != maps::CONNTRACK.to_lowercase() && map.entries * 10 > map.capacity * 9 {
                let percent = (map.entries * 100).checked_div(map.capacity).unwrap_or(0);
                let hint = limit_hint(&map.map);
                status
                    .warnings
                    .push(format!("map {} is {percent}% full{hint}", map.map));
            }
        }
        // Not by the control thread: tables may be large.
        status.missing_inspectors = missing_inspectors(&self.shared.get().snapshot);
        let counters = self.datapath.counters();
        for (kind, _, budget) in counters.unsent_events().map_err(map_error)? {
            let (EventKind::PolicyVerdict | EventKind::Drop | EventKind::Trace) = kind;
            status.events.suppressed += budget.suppressed;
            status.events.lost += budget.lost;
        }
        let names = self.names.counts();
        status.names = NamesStatus {
            names: names.names,
            addresses: names.addresses,
            in_map: names.in_map,
            unwritten: names.unwritten,
            bytes: names.bytes,
            committed: names.committed,
            refused: names.refused,
            waited: names.waited,
            evicted: names.stats.evicted,
            over_limit: names.stats.refused,
            special: names.stats.special,
            identities_over_limit: names.over_limit,
            expired: names.stats.expired,
            failures: names.failures,
            failure: names.failure.clone(),
        };
        if let Some(problem) = names.failure {
            status.warnings.push(format!(
                "learned addresses cannot be written, and their answers are withheld: {problem}"
            ));
        }
        status.events.read = self.events.load(Ordering::Relaxed);
        status.events.slow_clients = self
            .server
            .get()
            .map_or(0, |counts| counts.slow.load(Ordering::Relaxed));
        // What the nftables table drops has the reasons that the programs have for the same.
        let mut counts = counters.reasons().map_err(map_error)?;
        for (reason, direction, more) in self.netfilter.counts() {
            match counts
                .iter_mut()
                .find(|(known, at, _)| (*known, *at) == (reason, direction))
            {
                Some((.., count)) => {
                    count.packets += more.packets;
                    count.bytes += more.bytes;
                }
                None => counts.push((reason, direction, more)),
            }
        }
        counts.sort_by_key(|&(reason, direction, _)| (reason, direction));
        for (reason, direction, count) in counts {
            if reason.is_drop() {
                status.drops.push(DropCount {
                    reason: reason as u8,
                    text: reason.text().to_owned(),
                    direction: direction_name(direction).to_owned(),
                    packets: count.packets,
                    bytes: count.bytes,
                });
            }
        }
        to_value(&status)
    }

    fn policies(&self, name: Option<String>) -> Answer {
        let mut policies: Vec<PolicySummary> = from_value(self.ask(Request::PolicyGet { name })?)?;
        let counters = self.datapath.counters().rules().map_err(map_error)?;
        for rule in policies.iter_mut().flat_map(|policy| &mut policy.rules) {
            let Counter { packets, bytes } = counters.get(&rule.id).copied().unwrap_or_default();
            (rule.packets, rule.bytes) = (packets, bytes);
        }
        to_value(&policies)
    }

    fn identities(&self) -> Vec<IdentityRow> {
        let view = self.shared.get();
        let row = |id: &Identity| IdentityRow {
            id: *id,
            labels: view.labels(*id),
        };
        view.snapshot.identities.keys().map(row).collect()
    }

    fn identity(&self, identity: Identity) -> Answer {
        let view = self.shared.get();
        if !view.snapshot.identities.contains_key(&identity) {
            return Err(format!(
                "identity {identity} is not in use; `palisade identity list` shows which are"
            ));
        }
        to_value(&IdentityRow {
            id: identity,
            labels: view.labels(identity),
        })
    }

    fn policy_table(&self, endpoint: String) -> Answer {
        let endpoint: Endpoint = from_value(self.ask(Request::EndpointGet { endpoint })?)?;
        let view = self.shared.get();
        let states = self.datapath.endpoint_states();
        let Some(state) = states.get(&endpoint.id) else {
            return Err(format!("endpoint {} has no policy table yet", endpoint.id));
        };
        let mut entries = self.datapath.policy_entries().map_err(map_error)?;
        entries.retain(|(key, _)| key.policy == state.policy);
        entries.sort_by_key(|(key, _)| (key.direction, key.identity, key.class));
        let counters = self.datapath.counters().rules().map_err(map_error)?;
        let classes = class_names(&view.snapshot.classes);
        let rows: Vec<PolicyRow> = entries
            .into_iter()
            .map(|(key, entry)| {
                let decision = Decision::from_u8(entry.decision);
                let count = counters.get(&entry.rule).copied().unwrap_or_default();
                PolicyRow {
                    policy: decision_name(decision).to_owned(),
                    direction: if key.direction == Direction::Ingress as u8 {
                        "Ingress"
                    } else {
                        "Egress"
                    }
                    .to_owned(),
                    identity: key.identity,
                    labels: if key.identity == identity::ANY {
                        vec!["ANY".to_owned()]
                    } else {
                        known_or_number(&view, key.identity)
                    },
                    ports: classes
                        .get(&key.class)
                        .cloned()
                        .unwrap_or_else(|| vec![format!("class {}", key.class)]),
                    inspector: (decision == Decision::Inspect)
                        .then(|| inspector_name(entry.inspector).to_owned()),
                    auth: decision == Decision::AuthRequired,
                    audit: entry.flags & entry_flags::AUDIT != 0 && !matches!(decision, Decision::Allow),
                    rule: entry.rule,
                    decided_by: view.rule(entry.rule),
                    bytes: count.bytes,
                    packets: count.packets,
                }
            })
            .collect();
        to_value(&rows)
    }

    fn connections(&self) -> Answer {
        let mut entries = self.datapath.conntrack().entries().map_err(map_error)?;
        entries.sort_by_key(|(key, _)| (key.endpoint, key.protocol, key.local, key.local_port, key.remote));
        let now = monotonic_coarse();
        let rows: Vec<ConnectionRow> = entries
            .into_iter()
            .map(|(key, entry)| {
                let end = |address, port: u16| {
                    let address = IpAddr::from(address);
                    match (address, key.protocol) {
                        (address, protocol::ICMP | protocol::ICMPV6) => address.to_string(),
                        (IpAddr::V4(address), _) => format!("{address}:{port}"),
                        (IpAddr::V6(address), _) => format!("[{address}]:{port}"),
                    }
                };
                let ingress = entry.flags & ct_flags::INGRESS != 0;
                let (local, remote) = (end(key.local, key.local_port), end(key.remote, key.remote_port));
                let (source, destination) = if ingress { (remote, local) } else { (local, remote) };
                let flags = [
                    (ct_flags::AUDIT, "Audit"),
                    (ct_flags::REPLIED, "Replied"),
                    (ct_flags::SEEDED, "Seeded"),
                    (ct_flags::MIDSTREAM, "Midstream"),
                    (ct_flags::CLOSED, "Closed"),
                ];
                ConnectionRow {
                    protocol: protocol_name(key.protocol),
                    direction: if ingress { "IN" } else { "OUT" }.to_owned(),
                    source,
                    destination,
                    endpoint: key.endpoint,
                    expires: seconds_until(entry.expires, now),
                    forward_packets: entry.forward_packets,
                    forward_bytes: entry.forward_bytes,
                    reply_packets: entry.reply_packets,
                    reply_bytes: entry.reply_bytes,
                    forward_tcp: entry.forward_tcp,
                    reply_tcp: entry.reply_tcp,
                    identity: entry.remote_identity,
                    revision: entry.revision,
                    rule: entry.rule,
                    flags: flags
                        .into_iter()
                        .filter(|(bit, _)| entry.flags & bit != 0)
                        .map(|(_, name)| name.to_owned())
                        .collect(),
                }
            })
            .collect();
        to_value(&rows)
    }

    /// The number of an endpoint, given by number, name or address.
    fn endpoint_number(&self, endpoint: Option<String>) -> Result<Option<u16>, String> {
        let Some(endpoint) = endpoint else { return Ok(None) };
        let endpoint: Endpoint = from_value(self.ask(Request::EndpointGet { endpoint })?)?;
        Ok(Some(endpoint.id))
    }

    fn learned_names(&self, endpoint: Option<String>) -> Answer {
        let endpoint = self.endpoint_number(endpoint)?;
        let endpoints: Vec<Endpoint> = from_value(self.ask(Request::EndpointList)?)?;
        let view = self.shared.get();
        let identities = self.names.identities();
        let mut rows = Vec::new();
        for (name, sources) in self.names.list(endpoint) {
            let list = view.snapshot.fqdn.get(&name.endpoint);
            let text = |selector: &SelectorId| {
                let patterns = list.into_iter().flat_map(|list| list.iter());
                let mut found = patterns.filter(|(number, _)| *number == selector.0);
                found.next().map_or_else(
                    || format!("selector {}", selector.0),
                    |(_, pattern)| match pattern {
                        FqdnPattern::Name(text) | FqdnPattern::Pattern(text) => text.clone(),
                    },
                )
            };
            let selectors: Vec<String> = name.selectors.iter().map(text).collect();
            let mut owners = endpoints.iter().filter(|owner| owner.id == name.endpoint);
            let owner = owners.next().map(|owner| owner.name.clone()).unwrap_or_default();
            for (address, source) in name.addresses.iter().zip(sources) {
                let key = LearnedKey {
                    addr: address.ip.into(),
                    endpoint: name.endpoint.into(),
                };
                rows.push(FqdnRow {
                    endpoint: name.endpoint,
                    endpoint_name: owner.clone(),
                    name: name.name.clone(),
                    address: address.ip.to_string(),
                    selectors: selectors.clone(),
                    identity: identities.get(&key).copied().unwrap_or_default(),
                    ttl: address.left.map_or(0, |left| left.div_ceil(1_000)),
                    state: match (address.left, address.in_use) {
                        (Some(_), _) => "live",
                        (None, true) => "expired-in-use",
                        (None, false) => "expired",
                    }
                    .to_owned(),
                    source: source.text().to_owned(),
                });
            }
        }
        to_value(&rows)
    }

    fn clean_names(&self, endpoint: Option<String>, name: Option<String>, pattern: Option<String>) -> Answer {
        let endpoint = self.endpoint_number(endpoint)?;
        let pattern = match (name, pattern) {
            (Some(name), _) => Some(FqdnPattern::Name(name)),
            (None, Some(pattern)) => Some(FqdnPattern::Pattern(pattern)),
            (None, None) => None,
        };
        let filter = match &pattern {
            Some(pattern) => {
                let selectors = Selectors::new([(SelectorId(0), pattern)]);
                Some(selectors.map_err(|error| error.to_string())?)
            }
            None => None,
        };
        let wanted = |name: &Name| {
            filter
                .as_ref()
                .is_none_or(|filter| !filter.matching(name).is_empty())
        };
        to_value(&self.names.clean(endpoint, wanted))
    }

    fn ipcache(&self) -> Answer {
        let view = self.shared.get();
        let mut rows = Vec::new();
        let mut addresses = self.datapath.addresses().map_err(map_error)?;
        addresses.sort_by_key(|(address, _)| IpAddr::from(*address));
        for (address, entry) in addresses {
            let address = IpAddr::from(address);
            let length = if address.is_ipv4() { 32 } else { 128 };
            rows.push((format!("{address}/{length}"), entry));
        }
        let mut prefixes = self.datapath.prefixes().map_err(map_error)?;
        prefixes.sort_by_key(|(key, _)| (IpAddr::from(key.addr), key.length));
        rows.extend(prefixes.into_iter().map(|(key, entry)| (prefix_text(key), entry)));
        let rows: Vec<IpcacheRow> = rows
            .into_iter()
            .map(|(prefix, entry)| IpcacheRow {
                prefix,
                identity: entry.identity,
                endpoint: entry.endpoint,
                labels: view.labels(entry.identity),
            })
            .collect();
        to_value(&rows)
    }
}

/// Kinds of inspection that policies want, with the policies.
fn missing_inspectors(snapshot: &Snapshot) -> Vec<MissingInspector> {
    let mut wanted: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for entry in snapshot.tables.values().flat_map(|table| table.entries.values()) {
        let read = INSPECTORS >> (entry.inspector & 31) & 1 != 0;
        if Decision::from_u8(entry.decision) == Decision::Inspect && !read {
            let policies = wanted.entry(inspector_name(entry.inspector)).or_default();
            if let Some(rule) = snapshot.rules.get(&entry.rule)
                && let RuleKey::Rule(place) = &rule.key
            {
                policies.insert(place.policy.to_string());
            }
        }
    }
    wanted
        .into_iter()
        .map(|(inspector, policies)| MissingInspector {
            inspector: inspector.to_owned(),
            policies: policies.into_iter().collect(),
        })
        .collect()
}

/// Explains a packet.
pub fn trace(compiler: &Compiler, config: &Config, request: &TraceRequest) -> Result<TraceAnswer, String> {
    let question = Question {
        source: request.from.clone(),
        destination: request.to.clone(),
        to_fqdn: request.to_fqdn.clone(),
        request: asked(request),
        http: HttpOptions {
            paths: config.http.paths,
            get_bodies: config.http.get_bodies,
        },
        readers: Some(INSPECTORS),
        protocol: request.protocol,
        port: request.port,
    };
    let judge = Inspectors {
        head: config.http.head,
    };
    let trace = trace::trace(compiler, &question, &judge)?;
    Ok(TraceAnswer {
        passes: trace.verdict != Outcome::Denied,
        text: trace.to_string(),
        trace: to_value(&trace)?,
    })
}

/// What the flow asks for, as policies judge it.
fn asked(request: &TraceRequest) -> request::Request {
    request::Request {
        http: request.http.as_ref().map(|http| request::HttpRequest {
            method: http.method.clone(),
            path: http.path.clone(),
            host: http.host.clone(),
            headers: http.headers.clone(),
            is_http10: http.is_http10,
        }),
        dns: request.dns.clone(),
        tls: request.tls.clone(),
        kafka: None,
    }
}

fn known_or_number(view: &View, identity: Identity) -> Vec<String> {
    let labels = view.labels(identity);
    if labels.is_empty() {
        vec![format!("identity {identity}")]
    } else {
        labels
    }
}

fn seconds_until(time: u64, now: u64) -> i64 {
    let difference = i128::from(time) - i128::from(now);
    i64::try_from(difference / 1_000_000_000).unwrap_or(i64::MAX)
}

const fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

const fn decision_name(decision: Decision) -> &'static str {
    match decision {
        Decision::Allow => "Allow",
        Decision::Inspect => "Inspect",
        Decision::AuthRequired => "Auth",
        Decision::Deny | Decision::DenyExplicit => "Deny",
    }
}

fn protocol_name(number: u8) -> String {
    match number {
        protocol::TCP => "TCP".to_owned(),
        protocol::UDP => "UDP".to_owned(),
        protocol::SCTP => "SCTP".to_owned(),
        protocol::ICMP => "ICMP".to_owned(),
        protocol::ICMPV6 => "ICMPv6".to_owned(),
        other => other.to_string(),
    }
}

/// As it is written in the configuration.
pub const fn enforcement_name(enforcement: Enforcement) -> &'static str {
    match enforcement {
        Enforcement::Default => "default",
        Enforcement::Always => "always",
        Enforcement::Never => "never",
    }
}

impl Control {
    /// Answers what only the control thread knows or does.
    pub fn answer(&mut self, request: Request) -> Answer {
        match request {
            Request::Status => to_value(&self.status()),
            Request::Reload => {
                self.reload()?;
                to_value(&self.reload_notes())
            }
            Request::PolicyGet { name } => self.policy_summaries(name.as_deref()),
            Request::PolicySelectors => to_value(&self.selectors()),
            Request::PolicyTrace(request) => {
                let mut answer = trace(&self.enforcer.compiler, &self.config, &request)?;
                if let Some(note) = self.translation_note() {
                    answer.text.push_str("\nnote: ");
                    answer.text.push_str(&note);
                    if let Some(trace) = answer.trace.as_object_mut() {
                        let notes = trace.entry("notes").or_insert_with(|| Value::Array(Vec::new()));
                        notes
                            .as_array_mut()
                            .into_iter()
                            .for_each(|notes| notes.push(note.as_str().into()));
                    }
                }
                to_value(&answer)
            }
            Request::EndpointList => to_value(&self.endpoints()),
            Request::EndpointGet { endpoint } => to_value(&self.endpoint(
                self.find_endpoint(&endpoint)?,
                &self.interfaces.report(&self.datapath),
            )),
            Request::EndpointConfig { endpoint, options } => {
                let found = self.find_endpoint(&endpoint)?;
                let name = full_name(found);
                for (option, enabled) in options {
                    if option != "PolicyAuditMode" {
                        return Err(format!("there is no option '{option}'"));
                    }
                    self.set_audit(name.clone(), enabled)?;
                }
                to_value(&self.audit_options(&name))
            }
            Request::Stop { .. }
            | Request::Ping
            | Request::IdentityList
            | Request::IdentityGet { .. }
            | Request::BpfPolicyGet { .. }
            | Request::BpfCtList
            | Request::BpfIpcacheList
            | Request::FqdnCacheList { .. }
            | Request::FqdnCacheClean { .. }
            | Request::Observe(_) => Err("answered elsewhere".to_owned()),
        }
    }

    /// By number, name or address.
    fn find_endpoint(&self, wanted: &str) -> Result<&WorldEndpoint, String> {
        let endpoints = &self.enforcer.compiler.inventory().endpoints;
        let number = wanted.parse::<u16>().ok();
        let address = wanted
            .parse::<IpAddr>()
            .ok()
            .map(|address| address.to_canonical());
        let exact = endpoints.iter().find(|endpoint| {
            number == Some(endpoint.id)
                || address.is_some_and(|address| endpoint.addresses.contains(&address))
                || full_name(endpoint) == wanted
        });
        if let Some(found) = exact {
            return Ok(found);
        }
        let mut by_name = endpoints
            .iter()
            .filter(|endpoint| endpoint.name == wanted || (wanted == "host" && endpoint.is_node()));
        match (by_name.next(), by_name.next()) {
            (Some(found), None) => Ok(found),
            (Some(one), Some(other)) => Err(format!(
                "there is {} and {}: say which",
                full_name(one),
                full_name(other)
            )),
            (None, _) => Err(format!(
                "there is no endpoint '{wanted}'; `palisade endpoint list` shows which there are"
            )),
        }
    }

    /// Every endpoint, the node first.
    fn endpoints(&self) -> Vec<Endpoint> {
        self.endpoints_with(&self.interfaces.report(&self.datapath))
    }

    /// The same, given the state of the interfaces.
    pub fn endpoints_with(&self, interfaces: &[InterfaceStatus]) -> Vec<Endpoint> {
        let world = self.enforcer.compiler.inventory();
        let endpoints = world.endpoints.iter();
        endpoints
            .map(|endpoint| self.endpoint(endpoint, interfaces))
            .collect()
    }

    fn endpoint(&self, endpoint: &WorldEndpoint, interfaces: &[InterfaceStatus]) -> Endpoint {
        let snapshot = self.enforcer.compiler.snapshot();
        let state = snapshot.endpoints.get(&endpoint.id).copied().unwrap_or_default();
        let enforcement = |direction: Direction| {
            let otherwise = TableKey {
                direction: direction as u8,
                identity: identity::ANY,
                class: CLASS_ANY,
            };
            let entry = snapshot
                .tables
                .get(&state.policy)
                .and_then(|table| table.entries.get(&otherwise));
            let audit = endpoint.audit || self.config.policy.audit;
            match entry {
                Some(entry) if entry.flags & entry_flags::UNENFORCED != 0 => "Disabled",
                // As people know it: nothing is enforced, but what would be is reported.
                _ if audit => "Disabled (Audit)",
                _ => "Enabled",
            }
            .to_owned()
        };
        let name = full_name(endpoint);
        let guarded = interfaces
            .iter()
            .find(|status| status.endpoint == endpoint.id && !endpoint.is_node());
        let interface = guarded.map(|status| status.name.clone());
        let unguarded = guarded.is_some_and(|status| status.problem.is_some());
        Endpoint {
            id: endpoint.id,
            identity: state.identity,
            labels: endpoint.labels.iter().map(ToString::to_string).collect(),
            addresses: endpoint.addresses.iter().map(ToString::to_string).collect(),
            interface,
            ingress_enforcement: enforcement(Direction::Ingress),
            egress_enforcement: enforcement(Direction::Egress),
            policy: state.policy,
            revision: state.revision,
            policies: self
                .enforcer
                .compiler
                .policies_of(endpoint.id)
                .iter()
                .map(|policy| policy.qualified_name())
                .collect(),
            state: if unguarded {
                "waiting for its interface"
            } else {
                "ready"
            }
            .to_owned(),
            options: self.audit_options(&name),
            name,
        }
    }

    fn policy_summaries(&self, name: Option<&str>) -> Answer {
        let compiler = &self.enforcer.compiler;
        let mut selected: BTreeMap<*const Policy, Vec<String>> = BTreeMap::new();
        for endpoint in &compiler.inventory().endpoints {
            for policy in compiler.policies_of(endpoint.id) {
                selected
                    .entry(std::ptr::from_ref(policy))
                    .or_default()
                    .push(full_name(endpoint));
            }
        }
        /// The rules of a policy, by its file, kind and name.
        type RulesByPolicy<'a> = BTreeMap<(&'a str, &'a str, &'a str), Vec<(&'a RulePlace, RuleSummary)>>;
        let mut rules: RulesByPolicy<'_> = BTreeMap::new();
        for (id, rule) in &*compiler.snapshot().rules {
            if let RuleKey::Rule(place) = &rule.key
                && let Some(location) = &rule.location
            {
                rules
                    .entry((&*location.file, kind_name(place.kind), &*place.policy))
                    .or_default()
                    .push((
                        place,
                        RuleSummary {
                            id: *id,
                            rule: rule.to_string(),
                            ..RuleSummary::default()
                        },
                    ));
            }
        }
        let mut summaries = Vec::new();
        let broken: BTreeSet<String> = self
            .files
            .report()
            .into_iter()
            .filter(|file| file.state == PolicyFileState::LastGood)
            .map(|file| file.file)
            .collect();
        for (file, content) in compiler.files() {
            for policy in &content.policies {
                let qualified = policy.qualified_name();
                if name.is_some_and(|name| name != qualified && name != policy.name) {
                    continue;
                }
                // What is in force, which is not what the file says if that is broken now.
                let text = name.and_then(|_| self.files.text_in_force(file));
                let resource = text.as_ref().and_then(|text| resource_of(text, policy));
                let own = rules.get(&(&*policy.location.file, kind_name(policy.kind), qualified.as_str()));
                summaries.push(PolicySummary {
                    kind: kind_name(policy.kind).to_owned(),
                    location: policy.location.to_string(),
                    audit: policy.audit,
                    endpoints: selected
                        .get(&std::ptr::from_ref(policy))
                        .cloned()
                        .unwrap_or_default(),
                    rules: own
                        .into_iter()
                        .flatten()
                        .map(|(place, rule)| RuleSummary {
                            spec: resource
                                .as_ref()
                                .and_then(|resource| rule_at(resource, place))
                                .cloned(),
                            ..rule.clone()
                        })
                        .collect(),
                    text: text.map(|text| document_at(&text, policy.location.line).to_owned()),
                    resource,
                    file_broken: broken.contains(file),
                    name: qualified,
                });
            }
        }
        match name {
            Some(name) if summaries.is_empty() => Err(format!(
                "there is no policy '{name}'; `palisade policy get` shows which there are"
            )),
            _ => to_value(&summaries),
        }
    }

    fn selectors(&self) -> Vec<SelectorRow> {
        let compiler = &self.enforcer.compiler;
        let mut users: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for policy in compiler.files().flat_map(|(_, content)| &content.policies) {
            for peer in policy.specs.iter().flat_map(peers_of) {
                users
                    .entry(peer_text(peer))
                    .or_default()
                    .insert(policy.qualified_name());
            }
        }
        let rows = compiler.selectors().map(|(peer, count, identities)| {
            let selector = peer_text(peer);
            SelectorRow {
                policies: users.get(&selector).into_iter().flatten().cloned().collect(),
                users: count as usize,
                identities: identities.into_iter().collect(),
                selector,
            }
        });
        let mut rows: Vec<SelectorRow> = rows.collect();
        rows.sort_by(|a, b| a.selector.cmp(&b.selector));
        rows
    }
}

fn peers_of(spec: &palisade_model::rule::Spec) -> impl Iterator<Item = &Peer> {
    [&spec.ingress, &spec.ingress_deny, &spec.egress, &spec.egress_deny]
        .into_iter()
        .flatten()
        .flatten()
        .flat_map(|rule| match &rule.peers {
            palisade_model::rule::Peers::OneOf(peers) => peers.as_slice(),
            palisade_model::rule::Peers::Any | palisade_model::rule::Peers::Nobody => &[],
        })
}

/// Returns the resource of a policy in the text of its file, also one among the items of a list.
fn resource_of(text: &str, policy: &Policy) -> Option<Value> {
    fn find<'v>(value: &'v Value, policy: &Policy) -> Option<&'v Value> {
        if let Some(items) = value["items"].as_array() {
            return items.iter().find_map(|item| find(item, policy));
        }
        let metadata = &value["metadata"];
        let is_named = value["kind"] == kind_name(policy.kind) && metadata["name"] == policy.name.as_str();
        let namespace = match metadata["namespace"].as_str() {
            None | Some("") => "default",
            Some(namespace) => namespace,
        };
        let is_here = policy
            .namespace
            .as_deref()
            .is_none_or(|wanted| wanted == namespace);
        (is_named && is_here).then_some(value)
    }
    let documents = yaml_to_json(&policy.location.file, text).ok()?;
    documents
        .iter()
        .find_map(|document| find(document, policy))
        .cloned()
}

/// Returns a rule of a resource. A direction that a NetworkPolicy denies without a rule has none.
fn rule_at<'v>(resource: &'v Value, place: &RulePlace) -> Option<&'v Value> {
    let one = Some(&resource["spec"]).filter(|spec| spec.is_object());
    let several = resource["specs"].as_array().into_iter().flatten();
    let spec = one.into_iter().chain(several).nth(place.spec as usize)?;
    spec.get(place.section.name())?.get(place.index as usize)
}

/// The document of a YAML text that a line is in; of other texts all.
fn document_at(text: &str, line: u32) -> &str {
    let is_separator = |line: &str| {
        ["---", "..."].iter().any(|marker| {
            line.strip_prefix(marker)
                .is_some_and(|rest| rest.trim().is_empty())
        })
    };
    let (mut start, mut at) = (0, 0);
    for (number, this) in text.split_inclusive('\n').enumerate() {
        let end = at + this.len();
        if is_separator(this) {
            if number as u64 + 1 > u64::from(line) {
                return &text[start..at];
            }
            start = end;
        }
        at = end;
    }
    &text[start..]
}

/// `namespace/name`; the node has no namespace.
fn full_name(endpoint: &WorldEndpoint) -> String {
    if endpoint.namespace.is_empty() {
        endpoint.name.clone()
    } else {
        format!("{}/{}", endpoint.namespace, endpoint.name)
    }
}

#[cfg(test)]
mod tests {
    use palisade_model::snapshot::Section;
    use palisade_policy::parse::parse;

    use super::*;

    #[test]
    fn a_policy_is_shown_as_its_document() {
        let text = "# first\na: 1\n---\nb: 2\n--- \n# third\nc: 3\n...\n";
        assert_eq!(document_at(text, 2), "# first\na: 1\n");
        assert_eq!(document_at(text, 4), "b: 2\n");
        assert_eq!(document_at(text, 7), "# third\nc: 3\n");
        assert_eq!(document_at("{}", 1), "{}");
    }

    #[test]
    fn rules_are_found_in_their_resource() {
        let text = r#"
apiVersion: v1
kind: List
items:
- apiVersion: cilium.io/v2
  kind: CiliumNetworkPolicy
  metadata: {name: other}
  spec: {endpointSelector: {}, ingress: [{fromEntities: [all]}]}
- apiVersion: cilium.io/v2
  kind: CiliumNetworkPolicy
  metadata: {name: web, namespace: shop}
  spec:
    endpointSelector: {}
    ingress:
    - fromEntities: [host]
    - fromCIDR: &nets [192.0.2.0/24]
  specs:
  - endpointSelector: {}
    egressDeny: [{toCIDR: *nets}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {}, policyTypes: [Ingress]}
"#;
        let parsed = parse("p.yaml", text);
        assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
        let rule = |policy: &Policy, spec: u32, section: Section, index: u32| {
            let place = RulePlace {
                kind: policy.kind,
                policy: policy.qualified_name().into(),
                spec,
                section,
                index,
            };
            let resource = resource_of(text, policy).unwrap();
            rule_at(&resource, &place).cloned()
        };
        let [other, web, plain] = parsed.policies.as_slice() else {
            panic!("{:?}", parsed.policies);
        };
        let is = |text: &str| Some(serde_json::from_str::<Value>(text).unwrap());
        assert_eq!(
            rule(other, 0, Section::Ingress, 0),
            is(r#"{"fromEntities": ["all"]}"#)
        );
        assert_eq!(
            rule(web, 0, Section::Ingress, 1),
            is(r#"{"fromCIDR": ["192.0.2.0/24"]}"#)
        );
        assert_eq!(
            rule(web, 1, Section::EgressDeny, 0),
            is(r#"{"toCIDR": ["192.0.2.0/24"]}"#)
        );
        // What is denied without a rule.
        assert_eq!(rule(plain, 0, Section::Ingress, 0), None);
        assert_eq!(resource_of(text, plain).unwrap()["kind"], "NetworkPolicy");
        assert_eq!(resource_of("a: [", web), None);
    }
}
