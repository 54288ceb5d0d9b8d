//! Reads the values of all metrics.
//!
//! Counters of maps and threads are read by the thread of the scrape. Only one part comes from the control thread; if
//! that thread is busy, its last answer is used.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use hyper::body::Bytes;
use palisade_abi::{Direction, EventKind};
use palisade_datapath::monotonic_coarse;
use palisade_flowlog::DropReason;
use palisade_metrics::{Format, Lost, Report, Table, Value, encode, own};
use palisade_model::snapshot::{RuleInfo, RuleKey};
use palisade_secrets::Expiry;

use super::{
    super::{
        handlers::Handlers,
        measured::lock,
        message::{ClientRequest, Message},
        watchdog::hanging,
    },
    clients::Clients,
    control_part::ControlPart,
    counted::Counted,
    health::{self, Health},
    process,
};
use crate::control::api::{PolicyFileState, Status, Worker};

/// Age up to which a scrape gets the values of an earlier one.
const MAX_AGE: Duration = Duration::from_secs(1);
/// The same age as a multiple of the time that the read of the values took, so that frequent scrapes use at most a fiftieth
/// of a CPU: the entries of large maps are counted one by one.
const MAX_AGE_OF_READS: u32 = 50;
/// The greatest age, whatever time the read took: a usual interval of scrapes.
const GREATEST_AGE: Duration = Duration::from_secs(15);
/// Longest wait for the control thread.
const CONTROL_DEADLINE: Duration = Duration::from_secs(2);
/// Number under which the programs count rules whose number exceeds the map.
const BEYOND_LIMIT: u32 = 0;
/// Memory of one frame, bytes.
const FRAME_BYTES: u64 = 4_096;
/// Names of the inspectors' values that are gauges; all others are counters.
const ITEMS: [&str; 6] = [
    "bytes",
    "connections",
    "frames",
    "half_open",
    "held",
    "offloaded_flows",
];

/// Reads values for scrapes.
pub(super) struct Collector {
    handlers: Arc<Handlers>,
    counted: Arc<Mutex<Counted>>,
    clients: Arc<Clients>,
    series_per_metric: usize,
    /// Not part of the state of scrapes, so that `/readyz` does not wait for a scrape.
    control: Mutex<ControlPart>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Text of the last scrape in each format.
    texts: HashMap<Format, (Instant, Bytes)>,
    /// Time that the last read of all values took.
    read_in: Duration,
    /// Number of time series beyond the limit, by metrics that are collected at a scrape.
    overflows: BTreeMap<&'static str, u64>,
}

/// Returns the age up to which a scrape gets the values of an earlier one. `read_in`: the time that their read took.
fn age_of_scrape(read_in: Duration) -> Duration {
    read_in
        .saturating_mul(MAX_AGE_OF_READS)
        .clamp(MAX_AGE, GREATEST_AGE)
}

impl Collector {
    pub(super) fn new(
        handlers: Arc<Handlers>,
        counted: Arc<Mutex<Counted>>,
        clients: Arc<Clients>,
        series_per_metric: usize,
    ) -> Self {
        Self {
            handlers,
            counted,
            clients,
            series_per_metric,
            control: Mutex::default(),
            state: Mutex::default(),
        }
    }

    /// Sets or clears the problem of an option of `[metrics]`, for `status`.
    pub(super) fn set_problem(&self, option: &'static str, problem: Option<String>) {
        self.handlers.measured.set_problem(option, problem);
    }

    /// Sets the certificates of the server in use, its own first.
    pub(super) fn set_certificates(&self, certificates: Vec<Expiry>) {
        *lock(&self.handlers.measured.certificates) = certificates;
    }

    /// Returns the metrics as text, at most [`MAX_AGE`] old, or [`MAX_AGE_OF_READS`] times the duration of a read, if that
    /// is longer, but never older than [`GREATEST_AGE`].
    pub(super) fn scrape(&self, format: Format) -> Bytes {
        let mut state = lock(&self.state);
        if let Some((at, text)) = state.texts.get(&format)
            && at.elapsed() < age_of_scrape(state.read_in)
        {
            return text.clone();
        }
        let begun = Instant::now();
        let mut report = self.report(&mut state);
        state.read_in = begun.elapsed();
        report.add(&own::SCRAPE_SECONDS, &[], state.read_in.as_secs_f64());
        let mut families = report.into_families();
        {
            let counted = lock(&self.counted);
            families.extend(counted.hubble.families());
        }
        let text = Bytes::from(encode(families, format));
        state.texts.insert(format, (Instant::now(), text.clone()));
        text
    }

    /// Returns whether the control thread and the workers are alive.
    pub(super) fn alive(&self) -> Health {
        let handlers = &*self.handlers;
        let heartbeats = handlers.heartbeats.as_deref();
        health::alive(&handlers.activity, heartbeats, monotonic_coarse())
    }

    /// Returns whether everything is attached and in force, at most [`MAX_AGE`] ago.
    pub(super) fn ready(&self) -> Health {
        let (status, outcome) = self.ask_control();
        let missing = match (status, outcome) {
            (_, Err(problem)) => vec![problem],
            (Some(status), Ok(())) => status.missing,
            (None, Ok(())) => vec!["the daemon has no status".to_owned()],
        };
        health::ready(missing)
    }

    /// Returns the last answer of the control thread, and the outcome of the last request: why the thread has not
    /// answered it, if so. Sends a request unless the last one was sent within [`MAX_AGE`].
    fn ask_control(&self) -> (Option<Status>, Result<(), String>) {
        let handlers = &*self.handlers;
        let send = |reply| {
            let message = Message::Client(ClientRequest::Status(reply));
            handlers.control.send(message).is_ok()
        };
        let busy = || {
            let heartbeats = handlers.heartbeats.as_deref();
            hanging(&handlers.activity, heartbeats, Duration::ZERO, monotonic_coarse())
                .unwrap_or_else(|| "the control thread is busy".to_owned())
        };
        let mut control = lock(&self.control);
        let outcome = control.ask(MAX_AGE, CONTROL_DEADLINE, send, busy);
        (control.status.clone(), outcome)
    }

    fn report(&self, state: &mut State) -> Report {
        let handlers = &*self.handlers;
        let mut report = Report::default();
        report.info(&own::BUILD, &[env!("CARGO_PKG_VERSION")]);
        let (status, outcome) = self.ask_control();
        report.add(&own::CONTROL_UP, &[], outcome.is_ok());
        let busy = handlers
            .activity
            .busy()
            .map_or(0.0, |(time, _)| time.as_secs_f64());
        report.add(&own::CONTROL_BUSY, &[], busy);
        if let Some(status) = &status {
            of_control(status, &mut report);
            // An error means that a map cannot be read. The metrics of all maps are then missing from the scrape.
            if let Ok(status) = handlers.with_counters(status.clone()) {
                of_counters(&status, &mut report);
            }
        }
        let enforcement = lock(&handlers.measured.enforcement).clone();
        report.add(&own::POLICY_ENFORCEMENT, &[], Value::Histogram(enforcement));
        self.passed(&mut report);
        self.rules(state, &mut report);
        self.events(&mut report);
        self.certificates(state, &mut report);
        self.proxy(&mut report);
        self.servers(&mut report);
        {
            let counted = lock(&self.counted);
            let workers = status.as_ref().map_or(&[][..], |status| &status.workers.workers);
            let lost_by_workers: u64 = workers.iter().map(|worker| worker.records_lost).sum();
            let unsent = handlers.datapath.counters().unsent_events().unwrap_or_default();
            let lost = Lost {
                perf_event_ring_buffer: unsent.iter().map(|(.., budget)| budget.lost).sum(),
                observer_events_queue: lost_by_workers + handlers.interception.records_lost(),
                hubble_ring_buffer: counted.lost,
            };
            report.family(lost.family());
            for (metric, count) in counted.hubble.overflows() {
                report.add(&own::OVERFLOWS, &[metric], count);
            }
            for (metric, count) in counted.hubble.ended() {
                report.add(&own::ENDED, &[metric], count);
            }
        }
        for (metric, count) in &state.overflows {
            report.add(&own::OVERFLOWS, &[metric], *count);
        }
        process::report(&mut report);
        report
    }

    fn passed(&self, report: &mut Report) {
        let counts = self.handlers.datapath.counters().reasons().unwrap_or_default();
        for (reason, direction, count) in counts {
            if !reason.is_drop() {
                let direction = direction_name(direction);
                report.add(&own::PASS_PACKETS, &[reason.text(), direction], count.packets);
                report.add(&own::PASS_BYTES, &[reason.text(), direction], count.bytes);
            }
        }
    }

    fn rules(&self, state: &mut State, report: &mut Report) {
        let Ok(counts) = self.handlers.datapath.counters().rules() else {
            return;
        };
        let view = self.handlers.shared.get();
        let labels = own::RULE_PACKETS.labels;
        let columns: Vec<(&'static str, bool)> = labels.iter().map(|name| (*name, false)).collect();
        let table = |definition| Table::new(definition, &columns, self.series_per_metric, &[]);
        let (mut packets, mut bytes) = (table(&own::RULE_PACKETS), table(&own::RULE_BYTES));
        // The programs keep the counters of removed rules, and the snapshot their names.
        let entries = view
            .snapshot
            .tables
            .values()
            .flat_map(|table| table.entries.values());
        let in_force: HashSet<u32> = entries.map(|entry| entry.rule).collect();
        for (rule, count) in counts {
            let known = view
                .snapshot
                .rules
                .get(&rule)
                .filter(|_| in_force.contains(&rule));
            if known.is_none() && rule != BEYOND_LIMIT {
                continue;
            }
            let labels = [
                rule.to_string().into(),
                known.map_or("", |rule| policy_of(&rule.key)).into(),
                known.map_or_else(
                    || Cow::Borrowed("all rules beyond [limits] rules"),
                    |rule| description(rule).into(),
                ),
            ];
            packets.add(&labels, count.packets);
            bytes.add(&labels, count.bytes);
        }
        for table in [packets, bytes] {
            state.overflow(&table);
            report.family(table.family());
        }
    }

    fn events(&self, report: &mut Report) {
        let handlers = &*self.handlers;
        for (kind, reason, budget) in handlers.datapath.counters().unsent_events().unwrap_or_default() {
            let kind = match kind {
                EventKind::PolicyVerdict => "policy-verdict",
                EventKind::Drop => "drop",
                EventKind::Trace => "trace",
            };
            let reason = reason_name(reason as u8);
            report.add(&own::EVENTS_SUPPRESSED, &[kind, &reason], budget.suppressed);
            report.add(&own::EVENTS_LOST, &[kind, &reason], budget.lost);
        }
        report.add(&own::EVENTS_READ, &[], handlers.events.load(Ordering::Relaxed));
        report.add(&own::FLOWS_RECORDED, &[], handlers.ring.seen());
        report.add(&own::FLOW_RING_ENTRIES, &[], handlers.ring.len());
        report.add(&own::FLOW_RING_CAPACITY, &[], handlers.ring.capacity());
        report.add(
            &own::CAPTURE_RUNNING,
            &[],
            u64::from(handlers.capturing.status().is_some()),
        );
        report.add(&own::CAPTURED_PACKETS, &[], handlers.capturing.packets());
    }

    /// Adds the certificates that expire first: those of the secrets folder and of the listeners.
    fn certificates(&self, state: &mut State, report: &mut Report) {
        let handlers = &*self.handlers;
        let secrets = handlers.interception.secrets();
        let in_secrets = secrets.store.certificates().into_iter().map(|certificate| {
            let expiry = Expiry {
                subject: certificate.subject,
                not_after: certificate.not_after,
            };
            (certificate.secret, certificate.key, certificate.index, expiry)
        });
        let of_listeners = [
            ("[hubble]", handlers.hubble.certificates()),
            ("[metrics]", lock(&handlers.measured.certificates).clone()),
        ];
        let of_listeners = of_listeners.into_iter().flat_map(|(section, chain)| {
            let chain = chain.into_iter().enumerate();
            chain.map(|(index, expiry)| (section.to_owned(), "tls_certificate".to_owned(), index, expiry))
        });
        let mut certificates: Vec<_> = in_secrets.chain(of_listeners).collect();
        certificates.sort_by_key(|(.., expiry)| expiry.not_after);
        let left_out = certificates.len().saturating_sub(self.series_per_metric);
        *state.overflows.entry(own::CERTIFICATE_EXPIRY.name).or_default() += left_out as u64;
        for (secret, key, index, expiry) in certificates.iter().take(self.series_per_metric) {
            let labels = [&**secret, key, &index.to_string(), &expiry.subject];
            report.add(&own::CERTIFICATE_EXPIRY, &labels, expiry.not_after as f64);
        }
        let unusable = self.handlers.interception.unusable();
        report.add(
            &own::SECRET_PROBLEMS,
            &[],
            secrets.problems.len() + unusable.len(),
        );
    }

    fn proxy(&self, report: &mut Report) {
        let stats = self.handlers.intercept_stats();
        for thread in &stats.threads {
            let number = thread.number.to_string();
            report.add(&own::PROXY_CONNECTIONS, &[&number], thread.connections);
            report.add(&own::PROXY_UP, &[&number], thread.state == "running");
            report.add(&own::PROXY_RESTARTS, &[&number], thread.restarts);
        }
        for (group, counters) in &stats.counters {
            for (name, value) in counters {
                match (group.as_str(), name.as_str()) {
                    // Gauges and counters that the threads report by themselves.
                    ("connections", "open" | "restarts") => {}
                    ("connections", "bytes_from_clients") => {
                        report.add(&own::PROXY_BYTES, &["clients"], *value)
                    }
                    ("connections", "bytes_from_servers") => {
                        report.add(&own::PROXY_BYTES, &["servers"], *value)
                    }
                    ("connections", event) => report.add(&own::PROXY_EVENTS, &[event], *value),
                    (_, reason) => report.add(&own::PROXY_FAILURES, &[reason], *value),
                }
            }
        }
    }

    fn servers(&self, report: &mut Report) {
        if let Some(counts) = self.handlers.server.get() {
            report.add(
                &own::CONTROL_CLIENTS,
                &["connected"],
                counts.clients.load(Ordering::Relaxed),
            );
            report.add(
                &own::CONTROL_CLIENTS,
                &["following"],
                counts.followers.load(Ordering::Relaxed),
            );
            report.add(
                &own::CONTROL_CLIENTS_ENDED,
                &["slow"],
                counts.slow.load(Ordering::Relaxed),
            );
            report.add(
                &own::CONTROL_CLIENTS_ENDED,
                &["refused"],
                counts.refused.load(Ordering::Relaxed),
            );
        }
        report.add(&own::CLIENTS, &[], self.clients.connected());
        let (evicted, refused) = self.clients.ended();
        report.add(&own::CLIENTS_ENDED, &["evicted"], evicted);
        report.add(&own::CLIENTS_ENDED, &["refused"], refused);
    }
}

/// Adds the values of the control thread.
fn of_control(status: &Status, report: &mut Report) {
    report.add(&own::READY, &[], status.ready);
    report.add(&own::MISSING, &[], status.missing.len());
    report.add(&own::REFUSED_WORKLOADS, &[], status.refused_workloads.now);
    report.add(
        &own::WORKLOAD_CONFLICTS,
        &[],
        status.refused_workloads.conflicts_total,
    );
    report.add(&own::POLICY_REVISION, &[], status.revision);
    report.add(&own::POLICY_LAST_CHANGE, &[], status.last_change_seconds);
    let files = |state| {
        status
            .policy_files
            .iter()
            .filter(|file| file.state == state)
            .count()
    };
    for (name, state) in [
        ("in-force", PolicyFileState::InForce),
        ("last-good", PolicyFileState::LastGood),
        ("unused", PolicyFileState::Unused),
    ] {
        report.add(&own::POLICY_FILES, &[name], files(state));
    }
    let policies: usize = status.policy_files.iter().map(|file| file.policies).sum();
    report.add(&own::POLICIES, &[], policies);
    let mut endpoints: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for endpoint in &status.endpoints {
        for (direction, enforcement) in [
            ("ingress", &endpoint.ingress_enforcement),
            ("egress", &endpoint.egress_enforcement),
        ] {
            *endpoints.entry((direction, enforcement)).or_default() += 1;
        }
    }
    for ((direction, enforcement), count) in endpoints {
        report.add(&own::ENDPOINTS, &[direction, enforcement], count);
    }
    for interface in &status.interfaces {
        let labels = [&*interface.name, &interface.role];
        report.add(&own::INTERFACE_GUARDED, &labels, interface.problem.is_none());
    }
    for worker in &status.workers.workers {
        of_worker(worker, report);
    }
    for (group, values) in &status.workers.inspection {
        for (name, value) in values {
            let definition = if ITEMS.contains(&name.as_str()) {
                &own::INSPECTION_ITEMS
            } else {
                &own::INSPECTION_EVENTS
            };
            report.add(definition, &[group, name], *value);
        }
    }
    let keeps = status.workers.keeps;
    report.add(&own::INSPECTED_CONNECTIONS, &[], keeps.connections);
    report.add(&own::OFFLOADED_CONNECTIONS, &[], keeps.remembered);
    report.add(&own::INSPECTION_STREAM, &[], keeps.bytes);
    report.add(&own::INSPECTION_HELD, &[], keeps.packets);
}

fn of_worker(worker: &Worker, report: &mut Report) {
    let number = worker.number.to_string();
    report.add(&own::WORKER_UP, &[&number], worker.state == "running");
    for (definition, value) in [
        (&own::WORKER_RESTARTS, worker.restarts),
        (&own::WORKER_RECEIVED_PACKETS, worker.packets_in),
        (&own::WORKER_RECEIVED_BYTES, worker.bytes_in),
        (&own::WORKER_REINJECTED_PACKETS, worker.packets_out),
        (&own::WORKER_REINJECTED_BYTES, worker.bytes_out),
        (&own::WORKER_GENERATED, worker.generated),
        (&own::WORKER_GENERATED_LOST, worker.generated_lost),
        (&own::WORKER_ABSORBED, worker.absorbed),
        (&own::WORKER_OPTIONS, worker.options_rewritten),
        (&own::WORKER_HANDOFF_OUT, worker.handoff_out),
        (&own::WORKER_HANDOFF_IN, worker.handoff_in),
        (&own::WORKER_HELD, worker.held),
        (&own::WORKER_FRAMES, worker.frames),
        (&own::WORKER_MEMORY, worker.frames * FRAME_BYTES),
        (&own::WORKER_FLOWS, worker.flows),
        (&own::WORKER_RECORDS_LOST, worker.records_lost),
        (&own::WORKER_SLEEPS, worker.sleeps),
        (&own::WORKER_RING_STARVED, worker.ring.rx_fill_ring_empty),
    ] {
        report.add(definition, &[&number], value);
    }
    for drops in &worker.drops {
        let reason = reason_name(drops.reason);
        report.add(&own::WORKER_DROPPED, &[&number, &reason], drops.packets);
    }
    for (cause, count) in [
        ("rx-ring-full", worker.ring.rx_ring_full),
        ("dropped", worker.ring.rx_dropped),
        ("invalid-descriptor", worker.ring.invalid),
    ] {
        report.add(&own::WORKER_RING_LOST, &[&number, cause], count);
    }
}

/// Adds the counters of maps and of learned names.
fn of_counters(status: &Status, report: &mut Report) {
    report.add(&own::WARNINGS, &[], status.warnings.len());
    for drop in &status.drops {
        let labels = [&*reason_name(drop.reason), &drop.direction];
        report.add(&own::DROP_PACKETS, &labels, drop.packets);
        report.add(&own::DROP_BYTES, &labels, drop.bytes);
    }
    for map in &status.maps {
        report.add(&own::MAP_ENTRIES, &[&map.map], map.entries);
        report.add(&own::MAP_CAPACITY, &[&map.map], map.capacity);
    }
    let conntrack = status.conntrack;
    report.add(&own::MAP_ENTRIES, &["conntrack"], conntrack.entries);
    report.add(&own::MAP_CAPACITY, &["conntrack"], conntrack.capacity);
    report.add(&own::CONNTRACK_MADE, &[], conntrack.made);
    report.add(&own::CONNTRACK_SEEDED, &[], conntrack.seeded);
    report.add(&own::CONNTRACK_SWEPT, &[], conntrack.swept);
    report.add(&own::CONNTRACK_EVICTED, &[], conntrack.evicted);
    report.add(&own::CONNTRACK_PROTECTED, &[], conntrack.protected);
    let names = &status.names;
    report.add(&own::LEARNED_NAMES, &[], names.names);
    report.add(&own::LEARNED_ADDRESSES, &[], names.addresses);
    report.add(&own::LEARNED_IN_MAP, &[], names.in_map);
    report.add(&own::LEARNED_UNWRITTEN, &[], names.unwritten);
    report.add(&own::LEARNED_BYTES, &[], names.bytes);
    for (outcome, count) in [
        ("committed", names.committed),
        ("withheld", names.refused),
        ("withheld-identities", names.identities_over_limit),
        ("waited", names.waited),
    ] {
        report.add(&own::ANSWERS, &[outcome], count);
    }
    for (event, count) in [
        ("evicted", names.evicted),
        ("expired", names.expired),
        ("over-limit", names.over_limit),
        ("special", names.special),
    ] {
        report.add(&own::ADDRESSES, &[event], count);
    }
    report.add(&own::LEARNED_FAILURES, &[], names.failures);
}

/// Returns the name of a drop reason, as in flow records.
fn reason_name(number: u8) -> Cow<'static, str> {
    palisade_metrics::reason_name(DropReason(number))
}

/// Returns the policy of a rule; empty if no policy decides.
fn policy_of(key: &RuleKey) -> &str {
    match key {
        RuleKey::Rule(place) => &place.policy,
        RuleKey::DefaultDeny { policy, .. } | RuleKey::DefaultAllow { policy, .. } => policy,
        RuleKey::AlwaysEnforced { .. }
        | RuleKey::NotEnforced { .. }
        | RuleKey::LocalhostAlways
        | RuleKey::InitEndpoint { .. } => "",
    }
}

/// Returns the text of a rule without its location, because an edit above the rule in its file changes the location.
fn description(rule: &RuleInfo) -> String {
    RuleInfo {
        location: None,
        ..rule.clone()
    }
    .to_string()
}

const fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

impl State {
    fn overflow(&mut self, table: &Table) {
        *self.overflows.entry(table.name()).or_default() += table.overflowed();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use palisade_inspect::Stats;

    use super::*;

    #[test]
    fn a_scrape_gets_older_values_if_their_read_takes_longer() {
        for (read, age) in [
            (0, 1_000),
            (20, 1_000),
            (60, 3_000),
            (300, 15_000),
            (60_000, 15_000),
        ] {
            assert_eq!(
                age_of_scrape(Duration::from_millis(read)),
                Duration::from_millis(age)
            );
        }
    }

    #[test]
    fn the_values_that_are_gauges_are_those_of_the_inspectors() {
        let (mut gauges, mut counters) = (BTreeSet::new(), BTreeSet::new());
        Stats::default().visit(&mut |metric, _| {
            let names = if metric.now { &mut gauges } else { &mut counters };
            names.insert(metric.name);
        });
        assert_eq!(gauges, BTreeSet::from(ITEMS));
        assert!(gauges.is_disjoint(&counters));
    }
}
