//! Replay of recorded flows against candidate policies.
//!
//! Flows are grouped as they arrive: those of equal ends, port and request are evaluated once. When a batch of groups is
//! full, it is evaluated and merged into coarser result rows, so the memory does not grow with the number of flows. Ends
//! are found by their recorded labels, or in a known inventory by name and address.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use palisade_abi::{Direction, Identity};
use palisade_model::{
    diagnostic::Diagnostic,
    inventory::Inventory,
    labels::Labels,
    learned_identities::{LearnedSet, SelectorNumber},
    request::{HttpOptions, Request, RequestEvaluator},
};
use palisade_policy::{
    compile::{Changes, Compiler, FileContent},
    l7::name_matches,
    trace::{self, Outcome, Question},
};
use serde::Serialize;

use crate::{
    labels::is_world,
    near::packet_port,
    query::RecordedInventory,
    record::{Happened, Recorded, RecordedEnd},
};

/// Largest number of groups of one batch.
const MAX_GROUPS: usize = 32_768;
/// Largest number of result rows; the flows of further rows are counted in one row.
const MAX_ROWS: usize = 10_000;
/// Largest number of denied flows that [`Replay::denied`] returns.
const MAX_DENIED: usize = 1_024;
/// Largest number of requests that a row lists.
const MAX_EXAMPLES: usize = 3;
/// Longest request in a row, characters.
const MAX_EXAMPLE: usize = 200;
/// Largest number of names of a destination that are compared with selectors.
const MAX_NAMES: usize = 16;

/// Candidate policies and the setting in which they are evaluated.
#[derive(Clone, Debug, Default)]
pub struct Candidate {
    /// The policies, by file name.
    pub files: BTreeMap<String, Option<FileContent>>,
    /// Known endpoints, peers and options; ends that it lacks are added by their labels.
    pub inventory: Inventory,
    /// Options for HTTP requests.
    pub http: HttpOptions,
}

/// Verdict of the candidate policies, or a recorded one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Effect {
    /// It passes.
    Allowed,
    /// It passes only because of audit mode.
    Audited,
    /// Its application requests decide.
    Inspected,
    /// It is dropped.
    Denied,
}

impl Effect {
    /// Returns the effect in capital letters.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Allowed => "ALLOWED",
            Self::Audited => "AUDITED",
            Self::Inspected => "INSPECTED",
            Self::Denied => "DENIED",
        }
    }
}

impl From<Outcome> for Effect {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Allowed => Self::Allowed,
            Outcome::Audited => Self::Audited,
            Outcome::Inspected => Self::Inspected,
            Outcome::Denied => Self::Denied,
        }
    }
}

impl From<Happened> for Effect {
    fn from(happened: Happened) -> Self {
        match happened {
            Happened::Forwarded | Happened::Passed | Happened::Unknown => Self::Allowed,
            Happened::Audited => Self::Audited,
            Happened::Inspected => Self::Inspected,
            Happened::Dropped => Self::Denied,
        }
    }
}

/// Returns whether policies decide about a flow otherwise than recorded. Packets of an inspected flow are recorded as
/// forwarded as well, and its requests have records of their own; so a flow that passed and one that is inspected do not
/// differ. A trace ([`Happened::Passed`]) does not show whether the flow passed because of audit mode, so only a denial
/// differs from it.
#[must_use]
pub fn differs(recorded: Happened, then: Effect) -> bool {
    if recorded == Happened::Passed {
        return then == Effect::Denied;
    }
    match (Effect::from(recorded), then) {
        (Effect::Allowed, Effect::Inspected) | (Effect::Inspected, Effect::Allowed) => false,
        (now, then) => now != then,
    }
}

/// Flows between two ends with one change of the verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// `ingress` or `egress`.
    pub direction: &'static str,
    /// Labels of the end whose policy decides, or its name if it has no labels.
    pub endpoint: String,
    /// Labels or names of the other end.
    pub peer: String,
    /// Port and protocol.
    pub port: String,
    /// Recorded verdict.
    pub now: Effect,
    /// Rule of the recorded verdict, if it is recorded.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub now_by: String,
    /// Verdict of the candidate policies.
    pub then: Effect,
    /// Rule of the candidate policies that decides, with `FILE:LINE`.
    pub then_by: String,
    /// Number of flows.
    pub flows: u64,
    /// Some of the requests.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub requests: Vec<String>,
}

/// Result of a replay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Flows that were read.
    pub flows: u64,
    /// Flows that were evaluated.
    pub evaluated: u64,
    /// Flows with the same verdict as recorded.
    pub unchanged: u64,
    /// Of the unchanged flows, those that an inspector would decide: the record has no request.
    pub inspected: u64,
    /// Flows with another verdict.
    pub changed: u64,
    /// Changed flows, most flows first.
    pub changes: Vec<Change>,
    /// Changed flows beyond the largest number of rows.
    #[serde(skip_serializing_if = "is_zero")]
    pub not_listed: u64,
    /// Flows that were not evaluated, by the reason.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub skipped: BTreeMap<String, u64>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde requires this form")]
const fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// Why a batch of flows could not be evaluated: errors of the candidate policies.
pub type Problems = Vec<Diagnostic>;

/// Key of flows that are evaluated together.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Group {
    direction: Direction,
    endpoint: u16,
    own: EndKey,
    peer: EndKey,
    names: Vec<String>,
    protocol: u8,
    port: u16,
    request: RequestKey,
    now: Happened,
    now_by: Arc<str>,
}

/// An end, by its labels; by its address only if the labels do not identify it.
#[derive(Clone, PartialEq, Eq, Hash)]
struct EndKey {
    labels: Labels,
    address: Option<IpAddr>,
    name: String,
}

impl EndKey {
    fn of(end: &RecordedEnd, is_known: bool) -> Self {
        // Labels do not identify an end without labels or in the world; and the configuration can have the end by its
        // address.
        let by_address = is_world(&end.labels) || is_known;
        Self {
            labels: end.labels.clone(),
            address: end.address.filter(|_| by_address),
            name: if end.labels.is_empty() {
                end.text()
            } else {
                String::new()
            },
        }
    }

    /// Returns the end in words, without its address.
    fn text(&self) -> String {
        let shown: Vec<String> = crate::labels::stable(&self.labels)
            .iter()
            .filter(|label| label.source != "cidr")
            .map(|label| match label.source.as_str() {
                "k8s" => format!("{}={}", label.key, label.value),
                _ => label.to_string(),
            })
            .collect();
        match (shown.is_empty(), self.address) {
            (false, _) => shown.join(","),
            (true, Some(address)) => address.to_string(),
            (true, None) => self.name.clone(),
        }
    }
}

/// A request, in a form that can be compared and hashed.
#[derive(Clone, PartialEq, Eq, Hash)]
struct RequestKey(String);

/// Replays recorded flows.
pub struct Replay<'e> {
    candidate: Candidate,
    evaluator: &'e dyn RequestEvaluator,
    ends: RecordedInventory,
    groups: HashMap<Group, (u64, Recorded)>,
    /// Some of the flows that the candidate policies deny; `None` if they are not collected.
    denied: Option<Vec<Recorded>>,
    rows: BTreeMap<RowKey, Row>,
    report: Report,
}

type RowKey = (
    &'static str,
    String,
    String,
    String,
    Effect,
    Effect,
    String,
    Arc<str>,
);

#[derive(Default)]
struct Row {
    flows: u64,
    requests: BTreeSet<String>,
}

impl<'e> Replay<'e> {
    /// Creates a replay against candidate policies. `evaluator` decides about requests.
    #[must_use]
    pub fn new(candidate: Candidate, evaluator: &'e dyn RequestEvaluator) -> Self {
        Self {
            ends: RecordedInventory::new(candidate.inventory.clone()),
            candidate,
            evaluator,
            groups: HashMap::new(),
            denied: None,
            rows: BTreeMap::new(),
            report: Report::default(),
        }
    }

    /// Adds a flow.
    ///
    /// # Errors
    /// Errors of the candidate policies.
    pub fn push(&mut self, flow: &Recorded) -> Result<(), Problems> {
        self.report.flows += 1;
        if let Some(reason) = flow.unusable {
            self.skip(reason);
            return Ok(());
        }
        let Some((direction, own, peer)) = flow.ends() else {
            self.skip("records without a traffic direction");
            return Ok(());
        };
        if self.groups.len() >= MAX_GROUPS || self.ends.is_full() {
            self.evaluate()?;
        }
        let known =
            !self.candidate.inventory.peers.is_empty() || !self.candidate.inventory.endpoints.is_empty();
        let endpoint = self.ends.endpoint(own);
        self.ends.peer(peer);
        let mut names: Vec<String> = match direction {
            Direction::Egress => flow.destination_names.iter().take(MAX_NAMES).cloned().collect(),
            Direction::Ingress => Vec::new(),
        };
        names.sort();
        let group = Group {
            direction,
            endpoint,
            own: EndKey::of(own, false),
            peer: EndKey::of(peer, known),
            names,
            protocol: flow.protocol,
            port: flow.port,
            request: RequestKey(request_text(&flow.request)),
            now: flow.verdict,
            now_by: flow.decided_by.as_str().into(),
        };
        let entry = self.groups.entry(group).or_insert_with(|| (0, flow.clone()));
        entry.0 += 1;
        Ok(())
    }

    /// Counts a line that is no flow.
    pub fn skip(&mut self, reason: &str) {
        *self.report.skipped.entry(reason.to_owned()).or_default() += 1;
    }

    /// Evaluates the rest, and returns the result.
    ///
    /// # Errors
    /// Errors of the candidate policies.
    pub fn finish(mut self) -> Result<Report, Problems> {
        self.evaluate()?;
        let mut changes: Vec<Change> = self
            .rows
            .into_iter()
            .map(
                |((direction, endpoint, peer, port, now, then, then_by, now_by), row)| Change {
                    direction,
                    endpoint,
                    peer,
                    port,
                    now,
                    now_by: now_by.to_string(),
                    then,
                    then_by,
                    flows: row.flows,
                    requests: row.requests.into_iter().collect(),
                },
            )
            .collect();
        changes.sort_by_key(|change| std::cmp::Reverse(change.flows));
        self.report.changes = changes;
        Ok(self.report)
    }

    /// Starts to collect flows that the candidate policies deny, for [`Self::denied`].
    #[must_use]
    pub(crate) fn collecting(mut self) -> Self {
        self.denied = Some(Vec::new());
        self
    }

    /// Evaluates the rest, and returns some of the flows that the candidate policies deny; none if they deny none.
    pub(crate) fn denied(mut self) -> Result<Vec<Recorded>, Problems> {
        self.evaluate()?;
        Ok(self.denied.unwrap_or_default())
    }

    /// Evaluates the groups of the batch, and starts a new one.
    fn evaluate(&mut self) -> Result<(), Problems> {
        let inventory = std::mem::replace(
            &mut self.ends,
            RecordedInventory::new(self.candidate.inventory.clone()),
        );
        let groups = std::mem::take(&mut self.groups);
        let mut compiler = Compiler::default();
        compiler.update(Changes {
            inventory: Some(inventory.inventory().clone()),
            files: self.candidate.files.clone(),
        })?;
        let peers = Peers::new(&mut compiler, groups.keys())?;
        for (group, (flows, sample)) in groups {
            let identity = peers.identity(&compiler, &group);
            let question = Question {
                request: sample.request.clone(),
                http: self.candidate.http,
                protocol: group.protocol,
                port: group.port,
                ..Question::default()
            };
            let side = trace::side(
                &compiler,
                group.endpoint,
                group.direction,
                identity,
                true,
                &question,
                self.evaluator,
            );
            match side {
                Ok(side) => {
                    if let Some(denied) = &mut self.denied
                        && side.verdict == Outcome::Denied
                        && denied.len() < MAX_DENIED
                    {
                        denied.push(sample);
                    }
                    self.count(&group, flows, &side);
                }
                Err(reason) => *self.report.skipped.entry(reason).or_default() += flows,
            }
        }
        Ok(())
    }

    fn count(&mut self, group: &Group, flows: u64, side: &trace::Side) {
        self.report.evaluated += flows;
        let then = Effect::from(side.verdict);
        if !differs(group.now, then) {
            self.report.unchanged += flows;
            if then == Effect::Inspected {
                self.report.inspected += flows;
            }
            return;
        }
        self.report.changed += flows;
        let peer = match group.names.first() {
            Some(name) => name.clone(),
            None => group.peer.text(),
        };
        let key = (
            side.direction,
            group.own.text(),
            peer,
            packet_port(group.protocol, group.port),
            Effect::from(group.now),
            then,
            side.decided_by.clone(),
            Arc::clone(&group.now_by),
        );
        if self.rows.len() >= MAX_ROWS && !self.rows.contains_key(&key) {
            self.report.not_listed += flows;
            return;
        }
        let row = self.rows.entry(key).or_default();
        row.flows += flows;
        if !group.request.0.is_empty() && row.requests.len() < MAX_EXAMPLES {
            row.requests
                .insert(group.request.0.chars().take(MAX_EXAMPLE).collect());
        }
    }
}

/// Returns a request as text. Equal texts stand for equal requests.
fn request_text(request: &Request) -> String {
    if let Some(http) = &request.http {
        let mut text = format!("{} {}{}", http.method, http.host, http.path);
        for (name, value) in &http.headers {
            text.push_str(&format!(" {name}: {value};"));
        }
        if let Some(name) = &request.tls {
            text.push_str(&format!(" at {name}"));
        }
        return text;
    }
    if let Some(name) = &request.dns {
        return format!("query {name}");
    }
    if let Some(kafka) = &request.kafka {
        return format!(
            "kafka {} v{} {} {}",
            kafka.api_key,
            kafka.api_version,
            kafka.topics.join(","),
            kafka.client_id.as_deref().unwrap_or_default()
        );
    }
    match &request.tls {
        Some(name) => format!("hello {name}"),
        None => String::new(),
    }
}

/// Identities of the peers of a batch.
struct Peers {
    by_labels: HashMap<Labels, Identity>,
}

impl Peers {
    /// Returns the identities, after the compiler has made those of learned names.
    fn new<'g>(compiler: &mut Compiler, groups: impl Iterator<Item = &'g Group>) -> Result<Self, Problems> {
        let mut wanted: BTreeSet<LearnedSet> = BTreeSet::new();
        for group in groups {
            let selectors = selectors_of(compiler, group);
            if let Some(address) = group.peer.address
                && !selectors.is_empty()
            {
                let names = &compiler.snapshot().names;
                if names.identity(address, &selectors).is_none() {
                    wanted.extend(names.set(address, &selectors));
                }
            }
        }
        if !wanted.is_empty() {
            compiler.learned(&wanted)?;
        }
        Ok(Self {
            by_labels: compiler
                .snapshot()
                .identities
                .iter()
                .map(|(number, labels)| (labels.clone(), *number))
                .collect(),
        })
    }

    fn identity(&self, compiler: &Compiler, group: &Group) -> Identity {
        let snapshot = compiler.snapshot();
        let world = |v6: bool| {
            if v6 {
                snapshot.world_ipv6
            } else {
                snapshot.world_ipv4
            }
        };
        if let Some(address) = group.peer.address {
            let selectors = selectors_of(compiler, group);
            let found = snapshot.names.identity(address, &selectors);
            let found = found.unwrap_or_else(|| snapshot.identity_of(address).identity);
            let of_world = [snapshot.world_ipv4, snapshot.world_ipv6].contains(&found);
            if !of_world || is_world(&group.peer.labels) {
                return found;
            }
        }
        match self.by_labels.get(&group.peer.labels) {
            Some(identity) => *identity,
            None => world(group.peer.labels.has_reserved("world-ipv6")),
        }
    }
}

/// Returns the `toFQDNs` selectors that match the names of a group, ascending.
fn selectors_of(compiler: &Compiler, group: &Group) -> Vec<SelectorNumber> {
    if group.names.is_empty() {
        return Vec::new();
    }
    compiler
        .snapshot()
        .fqdn
        .get(&group.endpoint)
        .into_iter()
        .flat_map(|list| list.iter())
        .filter(|(_, pattern)| group.names.iter().any(|name| name_matches(pattern, name)))
        .map(|(number, _)| *number)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flow_differs_unless_it_passes_as_before() {
        use Effect::{Allowed, Audited, Denied, Inspected};
        let all = [Allowed, Audited, Inspected, Denied];
        for (recorded, same) in [
            (Happened::Forwarded, &[Allowed, Inspected][..]),
            (Happened::Passed, &[Allowed, Audited, Inspected]),
            (Happened::Audited, &[Audited]),
            (Happened::Inspected, &[Allowed, Inspected]),
            (Happened::Dropped, &[Denied]),
        ] {
            for then in all {
                assert_eq!(
                    differs(recorded, then),
                    !same.contains(&then),
                    "{recorded:?} {then:?}"
                );
            }
        }
    }
}
