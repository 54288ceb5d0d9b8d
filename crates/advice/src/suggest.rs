//! Policies that recorded flows need.
//!
//! [`Suggestion::push`] collects the flows by subject, peer and port. [`Suggestion::policies`] makes the policies.
//! Because a policy can turn out to deny one of the flows (a path that a server would resolve differently, rules of two
//! protocols on one port), the caller replays the flows against it ([`Suggestion::replay`]) and returns those that it
//! denies ([`Suggestion::widen`]), until none is denied.
//!
//! For a direction of a subject of which policies have denied every flow there is no rule, since a proposal must not allow
//! what was denied without being asked. A comment says so, with the rules that would allow the flows
//! ([`Suggestion::denied`]).
//!
//! Every collection is bounded. A collection that is full is generalised: paths to shorter patterns, names to patterns of
//! their domain, addresses to the world, ports to every port.

use std::collections::{BTreeMap, BTreeSet};

use palisade_abi::{Direction, protocol};
use palisade_model::{labels::Labels, request::Request, rule::Label};
use palisade_policy::{compile::FileContent, parse::parse};
use palisade_protocols::{http1::resolved, kafka::api_name};
use serde::Serialize;

use crate::{
    document::{
        HttpForm, L7Form, Name, PeerForm, PortForm, Subject, can_be_peer, entity, entry, resource_name,
    },
    labels::{LabelSelector, is_world, namespace, stable},
    record::{Happened, Recorded, RecordedEnd},
    replay::{Candidate, Problems, Replay},
    secrets::{Secrets, TlsPair, is_unknown},
    yaml::{Item, Yaml, comment, list, map},
};

/// Largest number of policies.
const MAX_SUBJECTS: usize = 4_096;
/// Largest number of different peers of one subject and direction.
const MAX_PEERS: usize = 1_024;
/// Largest number of addresses of the world of one subject and direction. More stand for the whole world.
const MAX_ADDRESSES: usize = 32;
/// Largest number of learned names of one subject, before new names are generalised.
const MAX_NAMES: usize = 64;
/// Longest pattern of a path, bytes. Regular expressions have a bounded cost.
const MAX_PATTERN: usize = 512;
/// Largest number of ports of one peer. More stand for every port.
const MAX_PORTS: usize = 64;
/// Largest number of application rules of one port before they are generalised.
const MAX_RULES: usize = 32;
/// Longest segment of a path that is taken over, bytes.
const MAX_SEGMENT: usize = 64;
/// Labels whose value names a workload, the most usual first.
const NAMING: [&str; 5] = ["app.kubernetes.io/name", "app", "k8s-app", "name", "component"];
/// Largest number of rules in a comment about denied flows.
const MAX_DENIED_RULES: usize = 16;
/// Name of the file of the policies, in messages.
const FILE: &str = "suggested.yaml";
/// Collects recorded flows, and makes the policies that allow them.
#[derive(Debug, Default)]
pub struct Suggestion {
    with_dropped: bool,
    subjects: Subjects,
    /// Flows that policies have dropped, unless they count as well.
    denied: Subjects,
    counts: Counts,
    secrets: Secrets,
}

type Subjects = BTreeMap<Subject, [Direct; 2]>;

/// A direction of which policies have denied every flow, so that no rule is proposed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeniedDirection {
    /// The endpoints, by namespace and labels.
    pub endpoints: String,
    /// `ingress` or `egress`.
    pub direction: &'static str,
    /// Number of flows.
    pub flows: u64,
    /// The section of a policy that would allow the flows, as YAML. It is not checked by a replay.
    pub yaml: String,
}

/// Numbers of flows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Flows for which there is a rule.
    pub flows: u64,
    /// Flows for which there is none, by the reason.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub skipped: BTreeMap<String, u64>,
}

/// Traffic of one subject and direction.
#[derive(Debug, Default)]
struct Direct {
    peers: BTreeMap<PeerForm, Traffic>,
    /// Whether all addresses of IPv4 and of IPv6 stand for the world.
    all_addresses: [bool; 2],
}

/// Traffic between a subject and a peer.
#[derive(Clone, Debug, Default)]
struct Traffic {
    flows: u64,
    ports: BTreeMap<PortForm, PortTraffic>,
    /// Whether every port is allowed.
    any_port: bool,
}

/// Traffic at one port.
#[derive(Clone, Debug, Default)]
struct PortTraffic {
    flows: u64,
    requests: u64,
    /// Requests inside TLS.
    inside_tls: u64,
    l7: L7Form,
    /// How far paths are generalised.
    path_level: usize,
    /// Whether no application rule is made.
    plain: bool,
}

impl Suggestion {
    /// Creates an empty collection. `with_dropped`: whether flows that policies have dropped count as well.
    #[must_use]
    pub fn new(with_dropped: bool) -> Self {
        Self {
            with_dropped,
            ..Self::default()
        }
    }

    /// Takes the secrets of rules for requests inside TLS from these policies. Without them the rules have names that must
    /// be replaced.
    #[must_use]
    pub fn with_secrets_of(self, files: &BTreeMap<String, Option<FileContent>>) -> Self {
        Self {
            secrets: Secrets::of(files),
            ..self
        }
    }

    /// Adds a flow.
    pub fn push(&mut self, flow: &Recorded) {
        match self.add(flow) {
            Ok(()) => self.counts.flows += 1,
            Err(reason) => self.skip(reason),
        }
    }

    /// Counts a line that is no flow, or a flow without a rule.
    pub fn skip(&mut self, reason: &str) {
        *self.counts.skipped.entry(reason.to_owned()).or_default() += 1;
    }

    /// Returns the numbers of flows.
    #[must_use]
    pub const fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Returns whether the flow counts: it passed, or dropped flows count as well.
    ///
    /// # Errors
    /// The reason why it does not.
    fn counts_flow(&self, flow: &Recorded) -> Result<(Direction, Subject), &'static str> {
        if self.is_denied(flow) {
            return Err("dropped flows");
        }
        subject_of(flow)
    }

    fn is_denied(&self, flow: &Recorded) -> bool {
        flow.unusable.is_none() && flow.verdict == Happened::Dropped && !self.with_dropped
    }

    fn add(&mut self, flow: &Recorded) -> Result<(), &'static str> {
        if self.is_denied(flow) {
            // Whether it could be added makes no difference: there is no rule for it.
            let _ = note(&mut self.denied, &self.secrets, flow);
        }
        self.counts_flow(flow)?;
        note(&mut self.subjects, &self.secrets, flow)
    }

    /// Returns the directions of which policies have denied every flow.
    #[must_use]
    pub fn denied(&self) -> Vec<DeniedDirection> {
        let mut found = Vec::new();
        for (subject, denied) in &self.denied {
            for direction in [Direction::Ingress, Direction::Egress] {
                let direct = &denied[direction as usize];
                let passed = self.subjects.get(subject);
                if direct.peers.is_empty()
                    || passed.is_some_and(|passed| !passed[direction as usize].peers.is_empty())
                {
                    continue;
                }
                let mut rules = direct.rules(direction, subject.namespace.as_deref());
                let more = rules.len().saturating_sub(MAX_DENIED_RULES);
                rules.truncate(MAX_DENIED_RULES);
                let section = match direction {
                    Direction::Ingress => "ingress",
                    Direction::Egress => "egress",
                };
                let mut yaml = map([(section, Yaml::List(rules))]).emit();
                if more > 0 {
                    yaml.push_str(&comment(&format!("and {}", count(more as u64, "more rule"))));
                }
                found.push(DeniedDirection {
                    endpoints: subject.text(),
                    direction: section,
                    flows: direct.peers.values().map(|traffic| traffic.flows).sum(),
                    yaml,
                });
            }
        }
        found
    }

    /// Returns the policies as YAML documents, after comments about what was denied only; empty without flows.
    #[must_use]
    pub fn policies(&self) -> String {
        let mut comments = String::new();
        for denied in self.denied() {
            let what = format!(
                "{} of {}: {} denied, and no rule allows them. --include-dropped adds rules such as:",
                denied.direction,
                denied.endpoints,
                match denied.flows {
                    1 => "the only recorded flow was".to_owned(),
                    flows => format!("all {flows} recorded flows were"),
                }
            );
            comments.push_str(&comment(&what));
            // Each line of the emitter is one line, whatever a peer has put into a name.
            for line in denied.yaml.lines() {
                comments.push_str(&format!("#   {line}\n"));
            }
        }
        let mut out = String::new();
        let mut names: BTreeSet<(Option<String>, String)> = BTreeSet::new();
        for (subject, directions) in &self.subjects {
            let [ingress, egress] = [Direction::Ingress, Direction::Egress].map(|direction| {
                directions[direction as usize].rules(direction, subject.namespace.as_deref())
            });
            if ingress.is_empty() && egress.is_empty() {
                continue;
            }
            if !out.is_empty() {
                out.push_str("---\n");
            }
            let flows: u64 = directions
                .iter()
                .flat_map(|direct| direct.peers.values())
                .map(|traffic| traffic.flows)
                .sum();
            out.push_str(&comment(&count(flows, "recorded flow")));
            if directions[Direction::Egress as usize].names_without_dns() {
                out.push_str(&comment(
                    "toFQDNs needs a rule with rules.dns for the resolver, and no query to one was recorded",
                ));
            }
            let name = name_of(subject.selector.labels());
            let numbered = (2..).map(|number: u32| format!("{name}-{number}"));
            let name = std::iter::once(name.clone())
                .chain(numbered)
                .find(|name| names.insert((subject.namespace.clone(), name.clone())))
                .unwrap_or(name);
            out.push_str(&subject.policy(&name, ingress, egress).emit());
        }
        comments + &out
    }

    /// Returns a replay of flows against the policies. Add the same flows, and pass the replay to [`Self::widen`].
    ///
    /// # Errors
    /// The policies are invalid.
    pub fn replay<'e>(
        &self,
        evaluator: &'e dyn palisade_model::request::RequestEvaluator,
    ) -> Result<Check<'e>, Problems> {
        let parsed = parse(FILE, &self.policies());
        if parsed.has_errors() {
            return Err(parsed.diagnostics);
        }
        let content = FileContent {
            policies: parsed.policies,
            cidr_groups: parsed.cidr_groups,
        };
        let candidate = Candidate {
            files: BTreeMap::from([(FILE.to_owned(), Some(content))]),
            ..Candidate::default()
        };
        Ok(Check {
            replay: Replay::new(candidate, evaluator).collecting(),
        })
    }

    /// Widens the policies for the flows that they deny. Returns the number of groups of flows that they deny; 0 if they
    /// allow all of them.
    ///
    /// # Errors
    /// Errors of the policies, after all application rules have been dropped.
    pub fn widen(&mut self, check: Check<'_>) -> Result<usize, Problems> {
        match check.replay.denied() {
            Ok(denied) => {
                for flow in &denied {
                    self.widen_for(flow);
                }
                Ok(denied.len())
            }
            // The application rules of overlapping peers contradict each other.
            Err(problems) => {
                let mut any = false;
                for port in self
                    .subjects
                    .values_mut()
                    .flatten()
                    .flat_map(|direct| direct.peers.values_mut())
                    .flat_map(|traffic| traffic.ports.values_mut())
                {
                    any |= !port.l7.is_empty();
                    port.make_plain();
                }
                if any { Ok(1) } else { Err(problems) }
            }
        }
    }

    fn widen_for(&mut self, flow: &Recorded) {
        let Ok((direction, subject)) = self.counts_flow(flow) else {
            return;
        };
        let Some(directions) = self.subjects.get_mut(&subject) else {
            return;
        };
        let direct = &mut directions[direction as usize];
        let Ok(peer) = direct.peer(direction, flow) else {
            return;
        };
        let port = PortForm {
            protocol: flow.protocol,
            port: flow.port,
        };
        let Some(traffic) = direct.peers.get_mut(&peer) else {
            return;
        };
        match traffic.ports.get_mut(&port) {
            Some(known) if !known.plain => known.make_plain(),
            _ => {
                // A name that no rule can express: the address remains.
                if let (PeerForm::Names(_), Some(address)) = (&peer, flow.destination.address) {
                    let copy = traffic.clone();
                    direct.peers.insert(PeerForm::Address(address), copy);
                } else {
                    traffic.any_port = true;
                }
            }
        }
    }
}

/// Returns the subject whose policy decides about a flow, and the direction.
///
/// # Errors
/// The reason why no policy can select the ends.
fn subject_of(flow: &Recorded) -> Result<(Direction, Subject), &'static str> {
    if let Some(reason) = flow.unusable {
        return Err(reason);
    }
    let (direction, own, _) = flow.ends().ok_or("records without a traffic direction")?;
    let is_node = own.labels.has_reserved("host");
    if is_world(&own.labels) || (namespace(&own.labels).is_none() && !is_node) {
        return Err("flows whose endpoint has no labels of a workload");
    }
    let can_select =
        |end: &RecordedEnd| is_world(&end.labels) || stable(&end.labels).iter().all(is_expressible);
    if !can_select(&flow.source) || !can_select(&flow.destination) {
        return Err("flows with labels that no policy can select");
    }
    Ok((direction, Subject::stable(&own.labels)))
}

/// Adds a flow to the traffic of its subject.
///
/// # Errors
/// The reason why there can be no rule for it.
fn note(subjects: &mut Subjects, secrets: &Secrets, flow: &Recorded) -> Result<(), &'static str> {
    let (direction, subject) = subject_of(flow)?;
    if subjects.len() >= MAX_SUBJECTS && !subjects.contains_key(&subject) {
        return Err("flows of further workloads than can be handled at once");
    }
    let direct = &mut subjects.entry(subject).or_default()[direction as usize];
    let peer = direct.peer(direction, flow)?;
    let traffic = direct.peers.entry(peer).or_default();
    traffic.flows += 1;
    let port = PortForm {
        protocol: flow.protocol,
        port: flow.port,
    };
    if port.yaml().is_none() || (traffic.ports.len() >= MAX_PORTS && !traffic.ports.contains_key(&port)) {
        traffic.any_port = true;
        return Ok(());
    }
    traffic
        .ports
        .entry(port)
        .or_default()
        .add(direction, &flow.request, || secrets.of_port(flow.port));
    Ok(())
}

/// A replay of the flows against the suggested policies.
pub struct Check<'e> {
    replay: Replay<'e>,
}

impl Check<'_> {
    /// Adds a flow. Flows that do not count are ignored.
    ///
    /// # Errors
    /// Errors of the policies.
    pub fn push(&mut self, suggestion: &Suggestion, flow: &Recorded) -> Result<(), Problems> {
        if suggestion.counts_flow(flow).is_ok() {
            self.replay.push(flow)?;
        }
        Ok(())
    }
}

impl Direct {
    /// Returns the form of the other end of a flow.
    fn peer(&mut self, direction: Direction, flow: &Recorded) -> Result<PeerForm, &'static str> {
        let other: &RecordedEnd = match direction {
            Direction::Ingress => &flow.source,
            Direction::Egress => &flow.destination,
        };
        let peer = if !is_world(&other.labels) {
            let selector = LabelSelector::stable(&other.labels);
            match entity(&other.labels) {
                Some(entity) => PeerForm::Entity(entity),
                None if can_be_peer(&selector) => PeerForm::Labels(selector),
                None => return Err("flows with a peer whose labels no selector of a policy selects"),
            }
        } else if direction == Direction::Egress
            && let Some(name) = flow
                .destination_names
                .iter()
                .map(|name| normal_name(name))
                .filter(|name| looks_like_a_name(name))
                .min()
            && let Some(peer) = self.name_peer(name)
        {
            peer
        } else if let Some(address) = other.address {
            let v6 = address.is_ipv6();
            let known = PeerForm::Address(address);
            let is_new = !self.all_addresses[usize::from(v6)] && !self.peers.contains_key(&known);
            let of_family =
                |peer: &&PeerForm| matches!(peer, PeerForm::Address(known) if known.is_ipv6() == v6);
            if is_new && self.peers.keys().filter(of_family).count() >= MAX_ADDRESSES {
                self.all_addresses[usize::from(v6)] = true;
                self.join_addresses(v6);
            }
            if self.all_addresses[usize::from(v6)] {
                PeerForm::Entity(if v6 { "world-ipv6" } else { "world-ipv4" })
            } else {
                known
            }
        } else {
            return Err("flows of the world without an address");
        };
        if self.peers.len() >= MAX_PEERS && !self.peers.contains_key(&peer) {
            return Err("flows with further peers than can be handled at once");
        }
        Ok(peer)
    }

    /// Returns the form of a learned name. If there are many, new names are generalised: first to their domain, then to
    /// every name. Returns `None` if no policy can have the name.
    fn name_peer(&self, name: String) -> Option<PeerForm> {
        let exact = PeerForm::Names([Name::Exact(name.clone())].into());
        if self.peers.contains_key(&exact) {
            return Some(exact);
        }
        let names = self
            .peers
            .keys()
            .filter(|peer| matches!(peer, PeerForm::Names(_)))
            .count();
        if names < MAX_NAMES {
            return is_name(&name).then_some(exact);
        }
        let pattern = match domain_pattern(&name) {
            Some(pattern) if names < 2 * MAX_NAMES => pattern,
            _ => Name::Pattern("*".into()),
        };
        Some(PeerForm::Names([pattern].into()))
    }

    /// Replaces the addresses of a family by the world.
    fn join_addresses(&mut self, v6: bool) {
        let addresses: Vec<PeerForm> = self
            .peers
            .keys()
            .filter(|peer| matches!(peer, PeerForm::Address(known) if known.is_ipv6() == v6))
            .cloned()
            .collect();
        let mut all = Traffic::default();
        for peer in addresses {
            if let Some(traffic) = self.peers.remove(&peer) {
                all.join(traffic);
            }
        }
        self.peers
            .entry(PeerForm::Entity(if v6 { "world-ipv6" } else { "world-ipv4" }))
            .or_default()
            .join(all);
    }

    /// Returns whether there are names, but no queries by which they could be learned.
    fn names_without_dns(&self) -> bool {
        let has_names = self.peers.keys().any(|peer| matches!(peer, PeerForm::Names(_)));
        has_names
            && !self
                .peers
                .values()
                .any(|traffic| traffic.ports.keys().any(|port| port.port == 53))
    }

    /// Returns the rules: one for each peer, or for several names or addresses with the same ports.
    fn rules(&self, direction: Direction, implied: Option<&str>) -> Vec<Item> {
        let has_names = self.peers.keys().any(|peer| matches!(peer, PeerForm::Names(_)));
        // Rules of two protocols on one port contradict each other if their peers overlap.
        let mut kinds: BTreeMap<PortForm, BTreeSet<u8>> = BTreeMap::new();
        for (port, traffic) in self.peers.values().flat_map(|traffic| &traffic.ports) {
            kinds.entry(*port).or_default().extend(traffic.kind());
        }
        // Keyed by member, then by the ports: names and addresses with equal ports are one rule.
        let mut rules: BTreeMap<(String, Vec<Yaml>), MergedRule> = BTreeMap::new();
        for (peer, traffic) in &self.peers {
            let mut entries = Vec::new();
            let mut icmp = Vec::new();
            let mut plain = Vec::new();
            let mut inside = InsideTls::default();
            let mut requests = 0;
            for (port, at) in &traffic.ports {
                let Some(element) = port.yaml() else {
                    continue;
                };
                requests += at.requests;
                let mixed = kinds.get(port).is_some_and(|kinds| kinds.len() > 1);
                let mut l7 = if mixed || at.plain {
                    L7Form::default()
                } else {
                    at.l7.clone()
                };
                // Names are learned from the answers to inspected queries only.
                let is_dns = port.port == 53 && matches!(port.protocol, protocol::UDP | protocol::TCP);
                if has_names && is_dns && l7.is_empty() && !at.plain && !mixed {
                    l7.dns.insert(Name::Pattern("*".into()));
                }
                inside.note(at.inside_tls, &l7);
                if port.is_icmp() {
                    icmp.push(element);
                } else if l7.is_empty() {
                    plain.push(element);
                } else {
                    entries.push(entry(vec![element], &l7));
                }
            }
            if !plain.is_empty() {
                entries.insert(0, entry(plain, &L7Form::default()));
            }
            let (member, peers) = peer.yaml(direction, implied);
            let separate = match peer {
                PeerForm::Names(_) | PeerForm::Address(_) => String::new(),
                PeerForm::Labels(_) | PeerForm::Entity(_) => peers.emit(),
            };
            let mut put = |ports: Vec<Yaml>, flows: u64, requests: u64, inside: InsideTls| {
                let key = (format!("{member}\0{separate}"), ports);
                let rule = rules.entry(key).or_default();
                if let Yaml::List(items) = &peers {
                    rule.peers.extend(items.iter().cloned());
                }
                rule.flows += flows;
                rule.requests += requests;
                rule.inside_tls.add(inside);
            };
            let of = |wanted: bool| -> u64 {
                let ports = traffic.ports.iter();
                ports
                    .filter(|(port, _)| port.is_icmp() == wanted)
                    .map(|(_, at)| at.flows)
                    .sum()
            };
            if traffic.any_port {
                put(Vec::new(), traffic.flows, requests, inside);
                continue;
            }
            if !entries.is_empty() {
                let ports = vec![map([("toPorts", list(entries))])];
                put(ports, of(false), requests, inside);
            }
            if !icmp.is_empty() {
                put(
                    vec![map([("icmps", list([map([("fields", list(icmp))])]))])],
                    of(true),
                    0,
                    InsideTls::default(),
                );
            }
        }
        rules
            .into_iter()
            .map(
                |(
                    (member, ports),
                    MergedRule {
                        peers,
                        flows,
                        requests,
                        inside_tls,
                    },
                )| {
                    let member = member.split('\0').next().unwrap_or_default().to_owned();
                    let mut members = vec![(member, Yaml::List(peers))];
                    let mut remark = count(flows, "flow");
                    if requests > 0 {
                        remark.push_str(&format!(", of them {}", count(requests, "request")));
                    }
                    inside_tls.remark(&mut remark);
                    if ports.is_empty() {
                        remark.push_str(
                        "; every port, since policies cannot name the protocol or there are too many ports",
                    );
                    }
                    for part in ports {
                        if let Yaml::Map(entries) = part {
                            members.extend(entries);
                        }
                    }
                    Item {
                        comment: remark,
                        value: Yaml::Map(members),
                    }
                },
            )
            .collect()
    }
}

/// A rule for peers with the same ports.
#[derive(Default)]
struct MergedRule {
    peers: Vec<Item>,
    flows: u64,
    requests: u64,
    inside_tls: InsideTls,
}

/// Requests inside TLS of a rule.
#[derive(Clone, Copy, Default)]
struct InsideTls {
    /// Those without http rules.
    without_rules: u64,
    /// Those of rules whose secrets are not known.
    without_secrets: u64,
}

impl InsideTls {
    fn note(&mut self, requests: u64, l7: &L7Form) {
        match &l7.tls {
            None => self.without_rules += requests,
            Some(pair) if is_unknown(pair) => self.without_secrets += requests,
            Some(_) => {}
        }
    }

    fn add(&mut self, other: Self) {
        self.without_rules += other.without_rules;
        self.without_secrets += other.without_secrets;
    }

    fn remark(self, remark: &mut String) {
        if self.without_secrets > 0 {
            remark.push_str(&format!(
                ", of them {} inside TLS: replace the names of the secrets, which flows do not name",
                count(self.without_secrets, "request")
            ));
        }
        if self.without_rules > 0 {
            remark.push_str(&format!(
                "; without rules for {} inside TLS",
                count(self.without_rules, "request")
            ));
        }
    }
}

impl Traffic {
    fn join(&mut self, other: Self) {
        self.flows += other.flows;
        self.any_port |= other.any_port;
        for (port, traffic) in other.ports {
            if self.ports.len() >= MAX_PORTS && !self.ports.contains_key(&port) {
                self.any_port = true;
                continue;
            }
            let known = self.ports.entry(port).or_default();
            let kinds: BTreeSet<u8> = known.kind().chain(traffic.kind()).collect();
            known.flows += traffic.flows;
            known.requests += traffic.requests;
            known.inside_tls += traffic.inside_tls;
            known.path_level = known.path_level.max(traffic.path_level);
            known.plain |= traffic.plain;
            known.l7.http.extend(traffic.l7.http);
            known.l7.dns.extend(traffic.l7.dns);
            known.l7.server_names.extend(traffic.l7.server_names);
            known.l7.kafka.extend(traffic.l7.kafka);
            known.l7.tls = known.l7.tls.take().or(traffic.l7.tls);
            if kinds.len() > 1 || known.plain {
                known.make_plain();
            }
            known.bound();
        }
    }
}

impl PortTraffic {
    fn make_plain(&mut self) {
        self.plain = true;
        self.l7 = L7Form::default();
    }

    /// Returns a number for each protocol of which there are rules. Rules for requests inside TLS are of TLS.
    fn kind(&self) -> impl Iterator<Item = u8> {
        let inside_tls = self.l7.tls.is_some();
        [
            (0, !self.l7.http.is_empty() && !inside_tls),
            (1, !self.l7.dns.is_empty()),
            (2, !self.l7.server_names.is_empty() || inside_tls),
            (3, !self.l7.kafka.is_empty()),
        ]
        .into_iter()
        .filter(|(_, there)| *there)
        .map(|(kind, _)| kind)
    }

    /// `secrets`: for a rule that allows requests inside TLS at this port.
    fn add(&mut self, direction: Direction, request: &Request, secrets: impl FnOnce() -> TlsPair) {
        self.flows += 1;
        if request.is_empty() {
            return;
        }
        self.requests += 1;
        let is_inside_tls = request.http.is_some() && request.tls.is_some();
        self.inside_tls += u64::from(is_inside_tls);
        if self.plain {
            return;
        }
        match request {
            // An entry has rules for requests inside TLS or in plain text, not for both.
            Request { http: Some(_), .. }
                if is_inside_tls != self.l7.tls.is_some() && !self.l7.http.is_empty() =>
            {
                self.make_plain();
            }
            Request { http: Some(http), .. } => {
                if is_inside_tls && self.l7.tls.is_none() {
                    self.l7.tls = Some(secrets());
                    // The http rules decide.
                    self.l7.server_names.clear();
                }
                for path in path_patterns(&http.path, self.path_level) {
                    let rule = HttpForm {
                        method: regex::escape(&http.method),
                        path,
                        host: None,
                    };
                    self.put(rule, |l7| &mut l7.http);
                }
            }
            Request { dns: Some(name), .. } => {
                let name = normal_name(name);
                let covered = domain_pattern(&name).is_some_and(|pattern| self.l7.dns.contains(&pattern))
                    || self.l7.dns.contains(&Name::Pattern("*".into()));
                if direction == Direction::Egress && covered {
                } else if direction == Direction::Egress && looks_like_a_name(&name) {
                    self.put(Name::Exact(name), |l7| &mut l7.dns);
                } else {
                    self.make_plain();
                }
            }
            Request { tls: Some(_), .. } if self.l7.tls.is_some() => {}
            Request { tls: Some(name), .. } => {
                let name = normal_name(name);
                if looks_like_a_name(&name) {
                    self.put(name, |l7| &mut l7.server_names);
                } else {
                    self.make_plain();
                }
            }
            Request {
                kafka: Some(kafka), ..
            } if api_name(kafka.api_key).is_none() => self.make_plain(),
            Request {
                kafka: Some(kafka), ..
            } => {
                let topics = kafka.topics.iter().map(|topic| Some(topic.clone()));
                let none = kafka.topics.is_empty().then_some(None);
                for topic in topics.chain(none) {
                    self.put((kafka.api_key, topic, None), |l7| &mut l7.kafka);
                }
            }
            _ => {}
        }
        if self.kind().count() > 1 {
            self.make_plain();
        }
        self.bound();
    }

    /// Adds a rule. If no policy can have the rule, the port gets no application rules.
    fn put<T: Ord + Clone>(&mut self, rule: T, set: impl Fn(&mut L7Form) -> &mut BTreeSet<T>) {
        if self.plain || set(&mut self.l7).contains(&rule) {
            return;
        }
        let mut alone = L7Form::default();
        set(&mut alone).insert(rule.clone());
        if is_valid(&alone) {
            set(&mut self.l7).insert(rule);
        } else {
            self.make_plain();
        }
    }

    /// Removes rules that others include, and generalises rules that are too many.
    fn bound(&mut self) {
        let with_query = |rule: &HttpForm| HttpForm {
            path: rule.path.as_ref().map(|path| format!("{path}{QUERY}")),
            ..rule.clone()
        };
        let included: Vec<HttpForm> = self
            .l7
            .http
            .iter()
            .filter(|rule| rule.path.is_some() && self.l7.http.contains(&with_query(rule)))
            .cloned()
            .collect();
        for rule in included {
            self.l7.http.remove(&rule);
        }
        while self.l7.http.len() > MAX_RULES && self.path_level < LAST_PATH_LEVEL {
            self.path_level += 1;
            let level = self.path_level;
            self.l7.http = std::mem::take(&mut self.l7.http)
                .into_iter()
                .map(|rule| HttpForm {
                    path: rule.path.map(|pattern| shorten(&pattern, level)),
                    ..rule
                })
                .collect();
        }
        if self.l7.http.len() > MAX_RULES {
            self.make_plain();
        }
        if self.l7.dns.len() > MAX_RULES {
            self.l7.dns = generalised(self.l7.dns.iter());
        }
        if self.l7.server_names.len() > MAX_RULES {
            let names: BTreeSet<Name> = self.l7.server_names.iter().cloned().map(Name::Exact).collect();
            self.l7.server_names = generalised(names.iter())
                .into_iter()
                .map(|name| match name {
                    Name::Exact(text) | Name::Pattern(text) => text,
                })
                .collect();
        }
        if self.l7.kafka.len() > MAX_RULES {
            self.l7.kafka = self.l7.kafka.iter().map(|(key, ..)| (*key, None, None)).collect();
        }
    }
}

/// Last level of [`shorten`].
const LAST_PATH_LEVEL: usize = 3;
/// Pattern of an optional query.
const QUERY: &str = "([?].*)?";

/// Returns the patterns for a path: as sent and as a server would resolve it, since rules must allow both. `None` stands
/// for a rule without a path.
fn path_patterns(path: &str, level: usize) -> BTreeSet<Option<String>> {
    if path.is_empty() {
        return [None].into();
    }
    let mut buffer = Vec::new();
    match resolved(path, &mut buffer) {
        Ok(()) => [path.to_owned(), String::from_utf8_lossy(&buffer).into_owned()]
            .into_iter()
            .map(|path| Some(shorten(&path_pattern(&path), level)))
            .collect(),
        Err(_) => [None].into(),
    }
}

/// Returns the pattern of a path: numbers, UUIDs and long hexadecimal numbers as segments stand for all of their kind.
/// The query is not taken over, since its values can be secrets.
fn path_pattern(path: &str) -> String {
    let (path, query) = match path.split_once('?') {
        Some((path, _)) => (path, QUERY),
        None => (path, ""),
    };
    let segments: Vec<String> = path.split('/').map(segment_pattern).collect();
    let pattern = format!("{}{query}", segments.join("/"));
    if pattern.len() > MAX_PATTERN {
        return shorten(&pattern, LAST_PATH_LEVEL);
    }
    pattern
}

fn segment_pattern(segment: &str) -> String {
    let is_hex = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let groups: Vec<&str> = segment.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    if !segment.is_empty() && segment.bytes().all(|byte| byte.is_ascii_digit()) {
        return "[0-9]+".into();
    }
    if lengths == [8, 4, 4, 4, 12] && groups.iter().all(|group| is_hex(group)) {
        return "[0-9a-fA-F-]{36}".into();
    }
    if segment.len() >= 16 && is_hex(segment) {
        return "[0-9a-fA-F]+".into();
    }
    if segment.len() > MAX_SEGMENT || segment.contains(char::REPLACEMENT_CHARACTER) {
        return "[^/]+".into();
    }
    regex::escape(segment)
}

/// Shortens a pattern: level 1 keeps three segments, level 2 one, level 3 none.
fn shorten(pattern: &str, level: usize) -> String {
    let kept = match level {
        0 => return pattern.to_owned(),
        1 => 3,
        2 => 1,
        _ => return "/.*".into(),
    };
    let path = pattern.strip_suffix(QUERY).unwrap_or(pattern);
    // The only slashes inside a class are those of `[^/]+`, which has no other one before it.
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    if segments.len() <= kept || path.contains("[^/]") {
        return if path.contains("[^/]") {
            "/.*".into()
        } else {
            pattern.to_owned()
        };
    }
    format!("/{}/.*", segments[..kept].join("/"))
}

/// Returns patterns for the domains of names, or the pattern of every name.
fn generalised<'n>(names: impl Iterator<Item = &'n Name>) -> BTreeSet<Name> {
    let patterns: BTreeSet<Name> = names
        .map(|name| match name {
            Name::Exact(exact) => domain_pattern(exact).unwrap_or_else(|| name.clone()),
            Name::Pattern(pattern) => Name::Pattern(pattern.clone()),
        })
        .collect();
    if patterns.len() > MAX_RULES {
        [Name::Pattern("*".into())].into()
    } else {
        patterns
    }
}

/// Returns the pattern for all names of the domain of a name; `None` if the domain is a top-level one.
fn domain_pattern(name: &str) -> Option<Name> {
    let (_, domain) = name.split_once('.')?;
    domain.contains('.').then(|| Name::Pattern(format!("*.{domain}")))
}

fn normal_name(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// Returns whether a selector can have the label, by the rules of Kubernetes.
fn is_expressible(label: &Label) -> bool {
    let is_text = |text: &str| {
        let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = text.as_bytes();
        bytes.len() <= 63
            && ends(bytes.first())
            && ends(bytes.last())
            && bytes
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
    };
    let (prefix, name) = label.key.rsplit_once('/').unwrap_or(("", &label.key));
    is_text(name)
        && prefix.len() <= 240
        && (prefix.is_empty()
            || prefix
                .split('.')
                .all(|part| is_text(part) && !part.bytes().any(|b| b.is_ascii_uppercase())))
        && (label.value.is_empty() || is_text(&label.value))
        && label.source.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// Returns whether a policy can have these application rules. A peer has chosen the texts in them: without this check
/// one request could make the whole proposal invalid.
fn is_valid(l7: &L7Form) -> bool {
    let port = map([("port", "80".into()), ("protocol", "TCP".into())]);
    let rule = map([
        ("toEntities", list(["all".into()])),
        ("toPorts", list([entry(vec![port], l7)])),
    ]);
    let subject = Subject::stable(&Labels::default());
    let rules = vec![Item {
        comment: String::new(),
        value: rule,
    }];
    !parse(FILE, &subject.policy("check", Vec::new(), rules).emit()).has_errors()
}

/// Returns whether a policy can have the name as `matchName`.
fn is_name(name: &str) -> bool {
    looks_like_a_name(name) && {
        let names = [Name::Exact(name.to_owned())].into();
        let (member, peers) = PeerForm::Names(names).yaml(Direction::Egress, None);
        let rules = vec![Item {
            comment: String::new(),
            value: Yaml::Map(vec![(member, peers)]),
        }];
        let subject = Subject::stable(&Labels::default());
        !parse(FILE, &subject.policy("check", Vec::new(), rules).emit()).has_errors()
    }
}

fn looks_like_a_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 253
        && name.parse::<std::net::IpAddr>().is_err()
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| {
                    byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_')
                })
        })
}

/// Returns the name of the policy of a workload.
fn name_of(labels: &Labels) -> String {
    let named = NAMING.iter().find_map(|key| labels.get("k8s", key));
    let named = named.filter(|value| !value.is_empty());
    let first = || {
        labels
            .iter()
            .find(|label| {
                label.source == "k8s" && label.key != crate::labels::NAMESPACE && !label.value.is_empty()
            })
            .map(|label| label.value.as_str())
    };
    let node = || labels.has_reserved("host").then_some("node");
    resource_name(&[named.or_else(node).or_else(first).unwrap_or("workload")])
}

fn count(number: u64, what: &str) -> String {
    if number == 1 {
        format!("1 {what}")
    } else {
        format!("{number} {what}s")
    }
}
