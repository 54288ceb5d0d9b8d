//! Explanation of one packet: the verdicts at both ends, and the rules that led to them, in words.

use std::{borrow::Cow, fmt, net::IpAddr};

use palisade_abi::{Decision, Direction, Identity, Inspector, PolicyEntry, entry_flags, protocol};
use palisade_model::{
    inventory::Enforcement,
    labels::Labels,
    learned_identities::{LearnedIdentities, SelectorNumber},
    request::{Denial, HttpOptions, Request, RequestEvaluator},
    rule::FqdnPattern,
    snapshot::{RuleKey, Snapshot, inspector_name},
};
use serde::Serialize;

use crate::{
    compile::Compiler,
    l7::{accepts_hello, decide, name_matches},
};

/// The packet to explain.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Question {
    /// Source: an endpoint (`name`, `namespace/name` or its number; `host` for the node), a peer, an address, or a
    /// reserved identity by name.
    pub source: String,
    /// Destination, in the forms of `source`. With `to_fqdn`: an address to which the name resolves, or empty to assume
    /// an IPv4 address outside all prefixes of policies and peers.
    pub destination: String,
    /// DNS name by which the source has learned the address of the destination.
    pub to_fqdn: Option<String>,
    /// Further DNS names by which the source has learned the address. Without `to_fqdn` they have no effect.
    pub more_names: Vec<String>,
    /// Request of the flow, for inspected traffic.
    pub request: Request,
    /// Options for HTTP requests.
    pub http: HttpOptions,
    /// Available inspectors: a bit for each [`palisade_abi::Inspector`]; `None` for all.
    pub readers: Option<u32>,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port or ICMP type; 0 for protocols without either.
    pub port: u16,
}

/// The explanation of a packet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Trace {
    /// Source of the packet.
    pub source: End,
    /// Destination of the packet.
    pub destination: End,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port or ICMP type.
    pub port: u16,
    /// Request of the flow, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// Overall verdict.
    pub verdict: Outcome,
    /// Verdicts of the endpoints of this node: egress of the source, then ingress of the destination.
    pub sides: Vec<Side>,
    /// Circumstances that the verdict does not cover, such as address translation.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// One end of a packet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct End {
    /// Name, as in the question.
    pub name: String,
    /// Numeric identity.
    pub identity: Identity,
    /// Labels of the identity.
    pub labels: Labels,
    /// Endpoint number, if the end is an endpoint of this node.
    pub endpoint: Option<u16>,
}

/// Verdict on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The packet passes.
    Allowed,
    /// The packet passes once an inspector has read it.
    Inspected,
    /// The packet would be dropped, but passes in audit mode.
    Audited,
    /// The packet is dropped.
    Denied,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allowed => "ALLOWED",
            Self::Inspected => "INSPECTED",
            Self::Audited => "AUDITED",
            Self::Denied => "DENIED",
        })
    }
}

/// Verdict of the policy of one endpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Side {
    /// Endpoint number.
    pub endpoint: u16,
    /// `namespace/name`, or the name of the node.
    pub name: String,
    /// `ingress` or `egress`.
    pub direction: &'static str,
    /// Verdict.
    pub verdict: Outcome,
    /// Reason, in words.
    pub reason: String,
    /// The rule or policy that decides, with `FILE:LINE`.
    pub decided_by: String,
    /// Id of the deciding rule, as in flows and counters.
    pub rule: u32,
    /// All rules that match the packet, each with its effect.
    pub matching: Vec<Matching>,
    /// Warnings about the endpoint's policies for this direction, such as port names without effect.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remarks: Vec<String>,
}

/// A rule that matches a packet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Matching {
    /// Effect: `allow`, `deny`, `inspect http`, ...
    pub effect: String,
    /// Policy, rule and `FILE:LINE`.
    pub rule: String,
    /// Rule id.
    pub id: u32,
}

/// Explains the verdict on the packet that `question` describes. If the traffic is inspected, `evaluator` decides about
/// the request of the question.
///
/// # Errors
/// A message if there can be no verdict, for example because the source or the destination is unknown.
pub fn trace(
    compiler: &Compiler,
    question: &Question,
    evaluator: &dyn RequestEvaluator,
) -> Result<Trace, String> {
    trace_between(&ends(compiler, question)?, question, evaluator)
}

/// The ends of a packet, and the compiler that has the identities of both.
#[derive(Clone, Debug)]
pub struct Ends<'c> {
    /// The compiler of the question, or a copy with an identity for the learned names of the destination.
    pub compiler: Cow<'c, Compiler>,
    /// Source of the packet.
    pub source: End,
    /// Destination of the packet.
    pub destination: End,
}

/// Returns the ends of the packet that `question` describes.
///
/// # Errors
/// A message if the source or the destination is unknown, or the names contradict the ends.
pub fn ends<'c>(compiler: &'c Compiler, question: &Question) -> Result<Ends<'c>, String> {
    let source = end(compiler, &question.source)?;
    let Some(name) = &question.to_fqdn else {
        let destination = end(compiler, &question.destination)?;
        return Ok(Ends {
            compiler: Cow::Borrowed(compiler),
            source,
            destination,
        });
    };
    let address: IpAddr = match question.destination.as_str() {
        "" => IpAddr::from([0, 0, 0, 0]),
        text => text
            .parse()
            .map_err(|_| format!("{text:?} is not an address: give an address of {name}, or none"))?,
    };
    let endpoint = source.endpoint.ok_or_else(|| {
        format!(
            "{} is not an endpoint of this node: it learns no names",
            source.name
        )
    })?;
    let mut compiler = Cow::Borrowed(compiler);
    let names: Vec<&str> = std::iter::once(name)
        .chain(&question.more_names)
        .map(String::as_str)
        .collect();
    let known = (!question.destination.is_empty()).then_some(address);
    let identity = learned_identity(&mut compiler, endpoint, known, &names)?;
    let snapshot = compiler.snapshot();
    let destination = End {
        name: match question.destination.as_str() {
            "" => name.clone(),
            address => format!("{name} at {address}"),
        },
        identity,
        labels: snapshot.identities.get(&identity).cloned().unwrap_or_default(),
        endpoint: match question.destination.as_str() {
            "" => None,
            _ => Some(snapshot.identity_of(address).endpoint).filter(|id| *id != 0),
        },
    };
    Ok(Ends {
        compiler,
        source,
        destination,
    })
}

/// Returns the identity of an address that an endpoint has learned by the names. `address`: `None` for an IPv4 address
/// outside all prefixes of policies and peers. If the combination of selectors has no identity yet, a copy of the compiler
/// creates one.
///
/// # Errors
/// A message if there is no identity left.
pub(crate) fn learned_identity(
    compiler: &mut Cow<'_, Compiler>,
    endpoint: u16,
    address: Option<IpAddr>,
    names: &[&str],
) -> Result<Identity, String> {
    let snapshot = compiler.snapshot();
    let names_match = |pattern: &FqdnPattern| names.iter().any(|name| name_matches(pattern, name));
    let selectors: Vec<SelectorNumber> = snapshot
        .fqdn
        .get(&endpoint)
        .into_iter()
        .flat_map(|list| list.iter())
        .filter(|(_, pattern)| names_match(pattern))
        .map(|(number, _)| *number)
        .collect();
    let known = snapshot.names.clone();
    let learn = |known: &LearnedIdentities| match address {
        None => known.identity_in_world(&selectors),
        Some(address) => known.identity(address, &selectors),
    };
    if learn(&known).is_none() {
        let set = match address {
            None => known.set_in_world(&selectors),
            Some(address) => known.set(address, &selectors),
        };
        let mut wanted = compiler.wanted().clone();
        wanted.extend(set);
        compiler.to_mut().learned(&wanted).map_err(|errors| {
            errors
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join("\n")
        })?;
    }
    learn(&compiler.snapshot().names).ok_or_else(|| format!("{} has no identity", names.join(", ")))
}

/// Explains the verdict on the packet that `question` describes, between ends that [`ends`] has returned.
///
/// # Errors
/// A message if there can be no verdict.
pub fn trace_between(
    ends: &Ends<'_>,
    question: &Question,
    evaluator: &dyn RequestEvaluator,
) -> Result<Trace, String> {
    let compiler = &*ends.compiler;
    let (source, destination) = (ends.source.clone(), ends.destination.clone());
    let mut sides = Vec::new();
    if let Some(endpoint) = source.endpoint {
        sides.push(side(
            compiler,
            endpoint,
            Direction::Egress,
            destination.identity,
            destination.endpoint.is_none(),
            question,
            evaluator,
        )?);
    }
    if let Some(endpoint) = destination.endpoint
        && source.endpoint != Some(endpoint)
    {
        sides.push(side(
            compiler,
            endpoint,
            Direction::Ingress,
            source.identity,
            source.endpoint.is_none(),
            question,
            evaluator,
        )?);
    }
    let worst = |outcome: Outcome| match outcome {
        Outcome::Allowed => 0,
        Outcome::Audited => 1,
        Outcome::Inspected => 2,
        Outcome::Denied => 3,
    };
    let verdict = sides
        .iter()
        .map(|side| side.verdict)
        .max_by_key(|outcome| worst(*outcome))
        .unwrap_or(Outcome::Allowed);
    let notes = address_translation_notes(compiler, question, evaluator, &source, &destination);
    Ok(Trace {
        notes,
        source,
        destination,
        protocol: question.protocol,
        port: question.port,
        request: request_text(&question.request),
        verdict,
        sides,
    })
}

/// Returns notes on address translation. The node can masquerade the packets of a workload, or publish a port of the
/// workload. Such packets have the node's address at the NIC, so the node's policy applies to them as well.
fn address_translation_notes(
    compiler: &Compiler,
    question: &Question,
    evaluator: &dyn RequestEvaluator,
    source: &End,
    destination: &End,
) -> Vec<String> {
    let endpoints = &compiler.inventory().endpoints;
    let Some(node) = endpoints.iter().find(|endpoint| endpoint.is_node()) else {
        return Vec::new();
    };
    let is_workload = |end: &End| end.endpoint.is_some_and(|id| id != node.id);
    let (direction, other) = match (is_workload(source), is_workload(destination)) {
        (true, false) if destination.endpoint.is_none() => (Direction::Egress, destination),
        (false, true) if source.endpoint.is_none() => (Direction::Ingress, source),
        _ => return Vec::new(),
    };
    let enforced = compiler.policies_of(node.id).iter().any(|policy| {
        policy.specs.iter().any(|spec| match direction {
            Direction::Egress => spec.egress.is_some() || spec.egress_deny.is_some(),
            Direction::Ingress => spec.ingress.is_some() || spec.ingress_deny.is_some(),
        })
    });
    let always = compiler.inventory().options.enforcement == Enforcement::Always;
    if !enforced && !always {
        return Vec::new();
    }
    let note = match (
        direction,
        side(
            compiler,
            node.id,
            direction,
            other.identity,
            true,
            question,
            evaluator,
        ),
    ) {
        (Direction::Egress, Ok(side)) => format!(
            "if the node masquerades it, egress of {} applies too: {} ({}), decided by {}",
            side.name, side.verdict, side.reason, side.decided_by
        ),
        (Direction::Ingress, _) => format!(
            "if it comes by a port that the node publishes for the workload, ingress of {} applies to that port too; trace it \
             with --to {} and the published port",
            node.name, node.name
        ),
        (Direction::Egress, Err(_)) => return Vec::new(),
    };
    vec![note]
}

fn end(compiler: &Compiler, text: &str) -> Result<End, String> {
    let snapshot = compiler.snapshot();
    let inventory = compiler.inventory();
    let found = |identity: Identity, endpoint: Option<u16>| End {
        name: text.to_owned(),
        identity,
        labels: snapshot.identities.get(&identity).cloned().unwrap_or_default(),
        endpoint: endpoint.filter(|id| *id != 0),
    };
    let named = inventory.endpoints.iter().find(|endpoint| {
        endpoint.name == text || format!("{}/{}", endpoint.namespace, endpoint.name) == text
    });
    if let Some(endpoint) = named {
        let identity = snapshot
            .endpoints
            .get(&endpoint.id)
            .map_or(0, |state| state.identity);
        return Ok(found(identity, Some(endpoint.id)));
    }
    if let Some(peer) = inventory.peers.iter().find(|peer| peer.name == text) {
        let identity = match peer.prefixes.first() {
            Some(prefix) => snapshot.identity_of(prefix.addr()).identity,
            None => snapshot
                .identities
                .iter()
                .find(|(_, labels)| **labels == peer.labels)
                .map_or(0, |(number, _)| *number),
        };
        return Ok(found(identity, None));
    }
    let number = text.parse::<u16>().ok();
    let by_number = inventory
        .endpoints
        .iter()
        .find(|endpoint| Some(endpoint.id) == number || (text == "host" && endpoint.is_node()));
    if let Some(endpoint) = by_number {
        let state = snapshot.endpoints.get(&endpoint.id);
        return Ok(found(state.map_or(0, |state| state.identity), Some(endpoint.id)));
    }
    let reserved = Labels::reserved(text.strip_prefix("reserved:").unwrap_or(text));
    if let Some((number, _)) = snapshot
        .identities
        .iter()
        .find(|(_, labels)| **labels == reserved)
    {
        return Ok(found(*number, None));
    }
    let address: IpAddr = text.parse().map_err(|_| unknown(text))?;
    let entry = snapshot.identity_of(address);
    Ok(found(entry.identity, Some(entry.endpoint)))
}

/// Returns the message about an end that nothing has. The policy tables have only identities in use, so nothing can be
/// said about a reserved one that no address has.
fn unknown(text: &str) -> String {
    match text.strip_prefix("reserved:").unwrap_or(text) {
        "world" => {
            "\"world\" has two identities, one for each address family: write world-ipv4, world-ipv6 or an address".to_owned()
        }
        name @ ("remote-node" | "kube-apiserver" | "health" | "ingress" | "unmanaged" | "init") => format!(
            "no endpoint and no peer has the identity {name}; a peer of the configuration with entity = \"{name}\" has it"
        ),
        _ => format!(
            "{text:?} is not an endpoint, a peer, an address or a reserved identity in use (host, world-ipv4, \
             world-ipv6, ...); see `palisade endpoint list`"
        ),
    }
}

/// Returns the verdict of the policy of one endpoint about a peer with the identity `other`. The ends of `question` are
/// ignored. `at_nic`: whether the packet passes a NIC, so that failsafe ports apply.
///
/// # Errors
/// A message if the endpoint has no compiled policy.
pub fn side(
    compiler: &Compiler,
    endpoint: u16,
    direction: Direction,
    other: Identity,
    at_nic: bool,
    question: &Question,
    evaluator: &dyn RequestEvaluator,
) -> Result<Side, String> {
    let snapshot = compiler.snapshot();
    let look_up = if at_nic {
        Snapshot::policy_entry
    } else {
        Snapshot::policy_entry_inside
    };
    let (protocol, port) = (question.protocol, Some(question.port));
    let entry = look_up(snapshot, endpoint, direction, other, protocol, port)
        .ok_or_else(|| format!("endpoint {endpoint} has no compiled policy"))?;
    let name = compiler
        .inventory()
        .endpoints
        .iter()
        .find(|known| known.id == endpoint)
        .map(|known| match known.namespace.as_str() {
            "" => known.name.clone(),
            namespace => format!("{namespace}/{}", known.name),
        })
        .unwrap_or_default();
    let describe = |rule: u32| {
        snapshot
            .rules
            .get(&rule)
            .map_or_else(|| format!("rule {rule}"), |info| info.to_string())
    };
    let matching = compiler
        .matching_rules(endpoint, direction, other, question.protocol, question.port)
        .into_iter()
        .map(|(id, effect)| Matching {
            effect,
            rule: describe(id),
            id,
        })
        .collect();
    let (mut verdict, mut reason) = explain(compiler, &entry);
    if entry.flags & entry_flags::FAILSAFE != 0
        && compiler.inventory().options.some_nics_closed
        && let Some(inside) = snapshot.policy_entry_inside(endpoint, direction, other, protocol, port)
    {
        let (elsewhere, why) = explain(compiler, &inside);
        let by = describe(inside.rule);
        reason = format!(
            "{reason}, at interfaces of [failsafe] only; elsewhere {elsewhere} ({why}), decided by {by}"
        );
    }
    let mut rule = entry.rule;
    let inspected = Decision::from_u8(entry.decision) == Decision::Inspect;
    let refused = if entry.flags & entry_flags::AUDIT == 0 {
        Outcome::Denied
    } else {
        Outcome::Audited
    };
    if inspected
        && question
            .readers
            .is_some_and(|readers| readers >> (entry.inspector & 31) & 1 == 0)
    {
        let inspector = inspector_name(entry.inspector);
        (verdict, reason) = (
            refused,
            format!("it would have to be inspected as {inspector}, which is not implemented"),
        );
    } else if inspected
        && let Some(what) = request_text(&question.request)
        && let Some(set) = snapshot.rulesets.get(&entry.ruleset)
    {
        let hello = accepts_hello(set, &question.request);
        let evaluated = match set.reads {
            _ if hello == Some(true) => Ok(entry.rule),
            _ if hello == Some(false) => Err(format!("no rule allows {what}; the connection is reset")),
            reads if reads != question.request.inspector() => {
                let reads = inspector_name(reads);
                Err(format!(
                    "it is inspected as {reads}, and {what} is another protocol"
                ))
            }
            _ => decide(evaluator, set, &question.request, question.http).map_err(|denial| match denial {
                Denial::NoRule => format!("no rule allows {what}; {}", effect(&question.request)),
                Denial::Refused { why, effect } => format!("{what} is refused: {why}; {effect}"),
            }),
        };
        (verdict, reason) = match evaluated {
            Ok(_) if hello.is_some() => (
                Outcome::Inspected,
                format!(
                    "the proxy accepts {what}, and a rule allows what it says about {} inside TLS",
                    inspector_name(set.reads)
                ),
            ),
            Ok(allowing) => {
                rule = allowing;
                (Outcome::Allowed, format!("a rule allows {what}"))
            }
            Err(reason) => (refused, reason),
        };
    }
    Ok(Side {
        endpoint,
        name,
        direction: match direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        },
        verdict,
        reason,
        decided_by: describe(rule),
        rule,
        matching,
        remarks: compiler
            .remarks_of(endpoint, direction)
            .map(ToString::to_string)
            .collect(),
    })
}

/// Returns the request in words; `None` for an empty request.
fn request_text(request: &Request) -> Option<String> {
    if let Some(http) = &request.http {
        let on = match (http.host.as_str(), &request.tls) {
            ("", _) => "",
            (_, Some(_)) => "https://",
            (_, None) => "http://",
        };
        let name = match request.tls.as_deref() {
            None => String::new(),
            Some("") => " without a server name".to_owned(),
            Some(name) => format!(" at the server name {name}"),
        };
        return Some(format!("{} {on}{}{}{name}", http.method, http.host, http.path));
    }
    if let Some(name) = &request.tls {
        return Some(match name.as_str() {
            "" => "a hello without a server name".into(),
            name => format!("the server name {name}"),
        });
    }
    let dns = request.dns.as_ref().map(|name| format!("a query for {name}"));
    let kafka = || {
        let kafka = request.kafka.as_ref()?;
        let name = palisade_protocols::kafka::api_name(kafka.api_key);
        let name = name.map_or_else(|| format!("API key {}", kafka.api_key), str::to_owned);
        let version = kafka.api_version;
        Some(match kafka.topics.as_slice() {
            [] => format!("the Kafka request {name} v{version}"),
            topics => format!("the Kafka request {name} v{version} of {}", topics.join(", ")),
        })
    };
    dns.or_else(kafka)
}

/// Returns what happens to the client or the connection if no rule allows the request.
const fn effect(request: &Request) -> &'static str {
    match request {
        Request { http: Some(_), .. } => "the client gets 403",
        Request { dns: Some(_), .. } => "the client gets REFUSED",
        Request { kafka: Some(_), .. } => "the client gets an authorization error",
        _ => "the connection is reset",
    }
}

fn explain(compiler: &Compiler, entry: &PolicyEntry) -> (Outcome, String) {
    let denied = if entry.flags & entry_flags::AUDIT == 0 {
        Outcome::Denied
    } else {
        Outcome::Audited
    };
    let info = compiler.snapshot().rules.get(&entry.rule);
    match Decision::from_u8(entry.decision) {
        Decision::Deny => (denied, "nothing allows it".into()),
        Decision::DenyExplicit => (denied, "a deny rule names it; no allow outweighs that".into()),
        Decision::AuthRequired => (
            denied,
            "a rule requires authentication, which is not implemented".into(),
        ),
        Decision::DenyQuic => (
            denied,
            "the proxy intercepts TLS at this port, and QUIC would not be inspected".into(),
        ),
        Decision::Allow => {
            let reason = match info.map(|info| &info.key) {
                _ if entry.flags & entry_flags::FAILSAFE != 0 => {
                    "a failsafe port of the node: it passes before the policy"
                }
                Some(RuleKey::NotEnforced { .. }) => "nothing is enforced in this direction",
                Some(RuleKey::DefaultAllow { .. }) => "nothing denies it, and no policy denies by default",
                Some(RuleKey::LocalhostAlways) => "it comes from the node itself",
                _ => "a rule allows it",
            };
            (Outcome::Allowed, reason.into())
        }
        Decision::Inspect => {
            let set = compiler.snapshot().rulesets.get(&entry.ruleset);
            let reads = inspector_name(set.map_or(entry.inspector, |set| set.reads));
            let reason = if entry.inspector == Inspector::TlsTerminate as u8 {
                format!("the proxy intercepts it, and a rule allows what it says about {reads}")
            } else {
                format!("a rule allows what it says about {reads}")
            };
            (Outcome::Inspected, reason)
        }
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.protocol {
            protocol::TCP => format!("TCP port {}", self.port),
            protocol::UDP => format!("UDP port {}", self.port),
            protocol::SCTP => format!("SCTP port {}", self.port),
            protocol::ICMP => format!("ICMP type {}", self.port),
            protocol::ICMPV6 => format!("ICMPv6 type {}", self.port),
            other => format!("protocol {other}"),
        };
        match &self.request {
            Some(request) => writeln!(f, "{what}, {request}")?,
            None => writeln!(f, "{what}")?,
        }
        writeln!(f, "  from {}", self.source)?;
        writeln!(f, "  to   {}", self.destination)?;
        for side in &self.sides {
            writeln!(
                f,
                "{} of {}: {} ({})",
                side.direction, side.name, side.verdict, side.reason
            )?;
            writeln!(f, "  decided by {}", side.decided_by)?;
            for matching in &side.matching {
                writeln!(f, "  matches: {}: {}", matching.effect, matching.rule)?;
            }
            for remark in &side.remarks {
                writeln!(f, "  {remark}")?;
            }
        }
        if self.sides.is_empty() {
            writeln!(
                f,
                "neither end is an endpoint of this node: no policy of this node applies"
            )?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        write!(f, "verdict: {}", self.verdict)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (identity {}: {})", self.name, self.identity, self.labels)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use palisade_model::{
        inventory::{Endpoint, Inventory},
        labels::parse_label,
        request::HttpRequest,
    };

    use super::*;
    use crate::{
        compile::{Changes, CompilerState, FileContent},
        l7::Plain,
        parse::parse,
    };

    const POLICY: &str = "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: '80', protocol: TCP}]
  ingressDeny:
  - fromCIDR: [192.0.2.0/24]
";

    fn compiler() -> Compiler {
        let endpoint = |id: u16, app: &str| Endpoint {
            id,
            name: app.into(),
            namespace: "default".into(),
            labels: Labels::new(
                [
                    &format!("k8s:app={app}"),
                    "k8s:io.kubernetes.pod.namespace=default",
                ]
                .map(parse_label),
            ),
            named_ports: BTreeMap::new(),
            addresses: vec![IpAddr::from([10, 0, 0, id as u8])],
            audit: false,
        };
        let parsed = parse("web.yaml", POLICY);
        let content = FileContent {
            policies: parsed.policies,
            cidr_groups: Vec::new(),
        };
        let mut compiler = Compiler::new(&CompilerState::default());
        compiler
            .update(Changes {
                inventory: Some(Inventory {
                    endpoints: vec![endpoint(1, "front"), endpoint(2, "web")],
                    ..Inventory::default()
                }),
                files: BTreeMap::from([("web.yaml".into(), Some(content))]),
            })
            .unwrap();
        compiler
    }

    fn trace_tcp(source: &str, destination: &str, port: u16) -> Trace {
        let question = Question {
            source: source.into(),
            destination: destination.into(),
            protocol: protocol::TCP,
            port,
            ..Question::default()
        };
        trace(&compiler(), &question, &Plain).unwrap()
    }

    #[test]
    fn both_ends_have_a_verdict_with_rule_and_line() {
        let answer = trace_tcp("front", "default/web", 80);
        assert_eq!(answer.verdict, Outcome::Allowed);
        assert_eq!(answer.sides.len(), 2);
        assert_eq!(
            answer.sides[1].decided_by,
            "policy default/web ingress rule 1 (web.yaml:7)"
        );
        let text = answer.to_string();
        assert!(
            text.contains("egress of default/front: ALLOWED (nothing is enforced in this direction)"),
            "{text}"
        );
        assert!(
            text.contains("  matches: allow: policy default/web ingress rule 1 (web.yaml:7)"),
            "{text}"
        );
    }

    #[test]
    fn ends_are_also_numbers_and_reserved_names() {
        let answer = trace_tcp("world-ipv4", "2", 81);
        assert_eq!(answer.source.identity, palisade_abi::identity::WORLD_IPV4);
        assert_eq!(answer.sides[0].name, "default/web");
        assert_eq!(answer.verdict, Outcome::Denied);
    }

    #[test]
    fn a_reserved_identity_that_no_address_has_is_named_with_what_would_have_it() {
        for (source, expected) in [
            ("remote-node", "with entity = \"remote-node\" has it"),
            ("reserved:init", "with entity = \"init\" has it"),
            ("world", "write world-ipv4, world-ipv6 or an address"),
            ("nobody", "is not an endpoint, a peer"),
        ] {
            let question = Question {
                source: source.into(),
                destination: "web".into(),
                protocol: 6,
                port: 80,
                ..Question::default()
            };
            let error = trace(&compiler(), &question, &Plain).unwrap_err();
            assert!(error.contains(expected), "{source}: {error}");
        }
    }

    #[test]
    fn a_denial_names_its_cause() {
        let answer = trace_tcp("front", "10.0.0.2", 81);
        assert_eq!(answer.verdict, Outcome::Denied);
        assert_eq!(
            answer.sides[1].decided_by,
            "default deny of ingress by policy default/web (web.yaml:1)"
        );
        let answer = trace_tcp("192.0.2.7", "web", 80);
        assert_eq!(
            answer.sides[0].decided_by,
            "policy default/web ingressDeny rule 1 (web.yaml:11)"
        );
        assert!(
            trace(
                &compiler(),
                &Question {
                    source: "nobody".into(),
                    destination: "web".into(),
                    protocol: 6,
                    port: 1,
                    ..Question::default()
                },
                &Plain
            )
            .unwrap_err()
            .contains("nobody")
        );
    }

    const NAMES: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: names}
spec:
  endpointSelector: {matchLabels: {app: front}}
  egress:
  - toCIDR: [198.51.100.53/32]
    toPorts:
    - ports: [{port: '53', protocol: UDP}]
      rules: {dns: [{matchPattern: '*.example.com'}]}
  - toFQDNs: [{matchPattern: '*.example.com'}]
    toPorts:
    - ports: [{port: '443', protocol: TCP}]
  - toCIDR: [203.0.113.0/24]
    toPorts:
    - ports: [{port: '22', protocol: TCP}]
  egressDeny:
  - toFQDNs: [{matchName: bad.example.com}]
";

    fn compiler_with(name: &str, policies: &str) -> Compiler {
        let mut compiler = compiler();
        let parsed = parse(name, policies);
        assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
        let content = FileContent {
            policies: parsed.policies,
            cidr_groups: Vec::new(),
        };
        compiler
            .update(Changes {
                inventory: None,
                files: BTreeMap::from([(name.into(), Some(content))]),
            })
            .unwrap();
        compiler
    }

    fn trace_by_name(question: Question) -> Result<Trace, String> {
        trace(&compiler_with("names.yaml", NAMES), &question, &Plain)
    }

    fn to_name(name: &str, address: &str, port: u16) -> Question {
        Question {
            source: "front".into(),
            destination: address.into(),
            to_fqdn: Some(name.into()),
            protocol: protocol::TCP,
            port,
            ..Question::default()
        }
    }

    #[test]
    fn destinations_by_name() {
        let answer = trace_by_name(to_name("API.example.com.", "", 443)).unwrap();
        assert_eq!(answer.verdict, Outcome::Allowed, "{answer}");
        assert_eq!(
            answer.sides[0].decided_by,
            "policy default/names egress rule 2 (names.yaml:11)"
        );
        assert!(answer.destination.labels.has("fqdn", "*.example.com"));
        // The address is in a prefix that a policy names: the combination has no identity yet.
        let answer = trace_by_name(to_name("api.example.com", "203.0.113.9", 22)).unwrap();
        assert_eq!(answer.verdict, Outcome::Allowed, "{answer}");
        assert!(answer.destination.labels.has("cidr", "203.0.113.0/24"));
        assert!(answer.destination.labels.has("fqdn", "*.example.com"));
        for (name, address) in [("a.other", ""), ("a.b.example.com", "192.0.2.1")] {
            let answer = trace_by_name(to_name(name, address, 443)).unwrap();
            assert_eq!(answer.verdict, Outcome::Denied, "{answer}");
        }
        // Two selectors match, and one of them denies: the combination has an identity of its own.
        let answer = trace_by_name(to_name("bad.example.com", "192.0.2.1", 443)).unwrap();
        assert_eq!(answer.verdict, Outcome::Denied, "{answer}");
        assert!(
            answer.sides[0].decided_by.contains("egressDeny rule 1"),
            "{answer}"
        );
        let unlabelled = Question {
            source: "192.0.2.1".into(),
            ..to_name("api.example.com", "", 443)
        };
        assert!(trace_by_name(unlabelled).unwrap_err().contains("learns no names"));
    }

    #[test]
    fn dns_queries() {
        let query = |name: &str| {
            let question = Question {
                source: "front".into(),
                destination: "198.51.100.53".into(),
                request: Request {
                    dns: Some(name.into()),
                    ..Request::default()
                },
                protocol: protocol::UDP,
                port: 53,
                ..Question::default()
            };
            trace_by_name(question).unwrap()
        };
        let answer = query("api.example.com");
        assert_eq!(answer.verdict, Outcome::Allowed, "{answer}");
        assert!(answer.sides[0].decided_by.contains("egress rule 1"), "{answer}");
        let answer = query("example.org");
        assert_eq!(answer.verdict, Outcome::Denied);
        assert!(answer.to_string().contains("gets REFUSED"), "{answer}");
    }
    const REQUESTS: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: requests}
spec:
  endpointSelector: {matchLabels: {app: front}}
  egress:
  - toCIDR: [198.51.100.80/32]
    toPorts:
    - ports: [{port: '80', protocol: TCP}]
      rules:
        http:
        - {method: GET, path: '/public/.*', host: 'a\\.test', headers: ['X-Team: blue']}
    - ports: [{port: '443', protocol: TCP}]
      serverNames: ['*.example.com']
  - toCIDR: [198.51.100.80/32]
    toPorts:
    - ports: [{port: '80', protocol: TCP}]
      rules: {http: [{method: HEAD}]}
";

    const TRIED: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: tried, annotations: {palisade.io/audit: 'true'}}
spec:
  endpointSelector: {matchLabels: {app: front}}
  egress:
  - toCIDR: [198.51.100.80/32]
    toPorts:
    - ports: [{port: '80', protocol: TCP}]
      rules: {http: [{method: GET}]}
";

    fn trace_request(port: u16, request: Request) -> Trace {
        trace_request_with(REQUESTS, port, request)
    }

    fn trace_request_with(policies: &str, port: u16, request: Request) -> Trace {
        let question = Question {
            source: "front".into(),
            destination: "198.51.100.80".into(),
            request,
            protocol: protocol::TCP,
            port,
            ..Question::default()
        };
        trace(&compiler_with("requests.yaml", policies), &question, &Plain).unwrap()
    }

    fn http(method: &str, path: &str, team: &str) -> Request {
        Request {
            http: Some(HttpRequest {
                method: method.into(),
                path: path.into(),
                host: "a.test".into(),
                headers: vec![("x-team".into(), team.into())],
                ..HttpRequest::default()
            }),
            ..Request::default()
        }
    }

    fn hello(name: &str) -> Request {
        Request {
            tls: Some(name.into()),
            ..Request::default()
        }
    }

    #[test]
    fn requests() {
        let answer = trace_request(80, Request::default());
        assert_eq!(answer.verdict, Outcome::Inspected, "{answer}");
        assert_eq!(answer.request, None);

        let answer = trace_request(80, http("GET", "/public/x", "blue"));
        assert_eq!(answer.verdict, Outcome::Allowed, "{answer}");
        assert_eq!(
            answer.sides[0].decided_by,
            "policy default/requests egress rule 1 (requests.yaml:7)"
        );
        let text = answer.to_string();
        assert!(
            text.starts_with("TCP port 80, GET http://a.test/public/x\n")
                && text.contains("ALLOWED (a rule allows GET http://a.test/public/x)"),
            "{text}"
        );
        let answer = trace_request(80, http("HEAD", "/secret", "red"));
        assert_eq!(answer.verdict, Outcome::Allowed, "{answer}");
        assert_eq!(
            answer.sides[0].decided_by,
            "policy default/requests egress rule 2 (requests.yaml:15)"
        );
        for request in [
            http("PUT", "/public/x", "blue"),
            http("GET", "/secret", "blue"),
            http("GET", "/public/x", "red"),
            http("GET", "/public/../secret", "blue"),
        ] {
            let answer = trace_request(80, request);
            assert_eq!(answer.verdict, Outcome::Denied, "{answer}");
            assert!(
                answer.sides[0].reason.ends_with("; the client gets 403"),
                "{answer}"
            );
        }
    }

    #[test]
    fn traffic_without_an_inspector_is_denied() {
        for (readers, verdict) in [
            (None, Outcome::Inspected),
            (Some(1 << Inspector::Http as u32), Outcome::Inspected),
            (Some(1 << Inspector::Tls as u32), Outcome::Denied),
        ] {
            let question = Question {
                source: "front".into(),
                destination: "198.51.100.80".into(),
                protocol: protocol::TCP,
                port: 80,
                readers,
                ..Question::default()
            };
            let answer = trace(&compiler_with("requests.yaml", REQUESTS), &question, &Plain).unwrap();
            assert_eq!(answer.verdict, verdict, "{answer}");
            let names_missing_inspector =
                answer.sides[0].reason == "it would have to be inspected as http, which is not implemented";
            assert_eq!(names_missing_inspector, verdict == Outcome::Denied, "{answer}");
        }
    }

    #[test]
    fn requests_in_audit_mode() {
        let answer = trace_request_with(TRIED, 80, http("GET", "/", ""));
        assert_eq!(answer.verdict, Outcome::Allowed, "{answer}");
        let answer = trace_request_with(TRIED, 80, http("PUT", "/", ""));
        assert_eq!(answer.verdict, Outcome::Audited, "{answer}");
    }

    #[test]
    fn server_names() {
        let answer = trace_request(443, hello("API.example.com."));
        assert_eq!(answer.verdict, Outcome::Allowed, "{answer}");
        assert!(answer.sides[0].decided_by.contains("egress rule 1"), "{answer}");
        for (name, text) in [
            (
                "example.com",
                "no rule allows the server name example.com; the connection is reset",
            ),
            (
                "",
                "no rule allows a hello without a server name; the connection is reset",
            ),
        ] {
            let answer = trace_request(443, hello(name));
            assert_eq!(answer.verdict, Outcome::Denied, "{answer}");
            assert_eq!(answer.sides[0].reason, text);
        }
    }

    #[test]
    fn requests_of_another_protocol_are_denied() {
        let answer = trace_request(443, http("GET", "/", ""));
        assert_eq!(answer.verdict, Outcome::Denied, "{answer}");
        assert_eq!(
            answer.sides[0].reason,
            "it is inspected as tls, and GET http://a.test/ is another protocol"
        );
        let answer = trace_request(80, hello("api.example.com"));
        assert_eq!(answer.verdict, Outcome::Denied, "{answer}");
        // Where traffic is not inspected, the request does not matter.
        let answer = trace_request(22, http("GET", "/", ""));
        assert_eq!(answer.verdict, Outcome::Denied, "{answer}");
        assert!(answer.sides[0].reason.contains("nothing allows it"), "{answer}");
    }

    #[test]
    fn requests_inside_tls() {
        let policies = REQUESTS.replace(
            "serverNames: ['*.example.com']",
            "serverNames: ['*.example.com']\n      terminatingTLS: {secret: {name: s}}\n      rules: {http: [{method: GET}]}",
        );
        let inside = |method: &str, name: &str| Request {
            tls: Some(name.into()),
            ..http(method, "/", "")
        };
        let side = |request: Request| {
            let answer = trace_request_with(&policies, 443, request);
            (answer.verdict, answer.sides[0].reason.clone())
        };
        assert_eq!(
            side(Request::default()),
            (
                Outcome::Inspected,
                "the proxy intercepts it, and a rule allows what it says about http".into()
            )
        );
        assert_eq!(
            side(inside("GET", "a.example.com")),
            (
                Outcome::Allowed,
                "a rule allows GET https://a.test/ at the server name a.example.com".into()
            )
        );
        assert_eq!(side(inside("GET", "example.com")).0, Outcome::Denied);
        assert_eq!(side(inside("PUT", "a.example.com")).0, Outcome::Denied);
        assert_eq!(
            side(hello("a.example.com")),
            (
                Outcome::Inspected,
                "the proxy accepts the server name a.example.com, and a rule allows what it says about http inside TLS"
                    .into()
            )
        );
        assert_eq!(
            side(hello("")),
            (
                Outcome::Denied,
                "no rule allows a hello without a server name; the connection is reset".into()
            )
        );
    }
}
