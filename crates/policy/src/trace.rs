//! One packet explained: the verdict of both ends, and the rules that led to it, in words.

use std::{fmt, net::IpAddr};

use palisade_abi::{Decision, Direction, Identity, PolicyEntry, entry_flags, protocol};
use serde::Serialize;

use crate::{
    compile::Compiler,
    labels::Labels,
    snapshot::{RuleKey, inspector_name},
};

/// A packet that somebody asks about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// An endpoint (`name`, `namespace/name` or its number; `host` for the node), a peer, an address, or a reserved
    /// identity by name.
    pub source: String,
    /// The same for where it goes.
    pub destination: String,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port, or type of ICMP; 0 where there is none.
    pub port: u16,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Trace {
    /// Where the packet comes from.
    pub source: End,
    /// Where it goes.
    pub destination: End,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port or ICMP type.
    pub port: u16,
    /// What it comes to.
    pub verdict: Outcome,
    /// The endpoints of this node that were asked: the source's egress first.
    pub sides: Vec<Side>,
}

/// One end of a packet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct End {
    /// As it was asked for.
    pub name: String,
    /// Numeric identity.
    pub identity: Identity,
    /// Labels of the identity.
    pub labels: Labels,
    /// The endpoint of this node that it is, if it is one.
    pub endpoint: Option<u16>,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It passes.
    Allowed,
    /// It passes once user space has read it.
    Inspected,
    /// It would be dropped, but for audit mode.
    Audited,
    /// It is dropped.
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

/// The verdict of one endpoint's policy.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Side {
    /// Endpoint id.
    pub endpoint: u16,
    /// `namespace/name`, or the name of the node.
    pub name: String,
    /// `ingress` or `egress`.
    pub direction: &'static str,
    /// The verdict.
    pub verdict: Outcome,
    /// Why, in words.
    pub reason: String,
    /// What decided it: policy, rule, `FILE:LINE`.
    pub decided_by: String,
    /// Its id, as in flows and counters.
    pub rule: u32,
    /// Every rule that matches the packet, with what it says.
    pub matching: Vec<Matching>,
}

/// A rule that matches a packet.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Matching {
    /// `allow`, `deny`, `inspect http`, ...
    pub effect: String,
    /// Policy, rule, `FILE:LINE`.
    pub rule: String,
    /// Its id.
    pub id: u32,
}

/// Explains a packet. An error says which end is not known.
pub fn trace(compiler: &Compiler, question: &Question) -> Result<Trace, String> {
    let source = end(compiler, &question.source)?;
    let destination = end(compiler, &question.destination)?;
    let mut sides = Vec::new();
    if let Some(endpoint) = source.endpoint {
        sides.push(side(
            compiler,
            endpoint,
            Direction::Egress,
            destination.identity,
            question,
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
            question,
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
    Ok(Trace {
        source,
        destination,
        protocol: question.protocol,
        port: question.port,
        verdict,
        sides,
    })
}

fn end(compiler: &Compiler, text: &str) -> Result<End, String> {
    let snapshot = compiler.snapshot();
    let world = compiler.world();
    let found = |identity: Identity, endpoint: Option<u16>| End {
        name: text.to_owned(),
        identity,
        labels: snapshot.identities.get(&identity).cloned().unwrap_or_default(),
        endpoint: endpoint.filter(|id| *id != 0),
    };
    let named = world.endpoints.iter().find(|endpoint| {
        endpoint.name == text || format!("{}/{}", endpoint.namespace, endpoint.name) == text
    });
    if let Some(endpoint) = named {
        let identity = snapshot
            .endpoints
            .get(&endpoint.id)
            .map_or(0, |state| state.identity);
        return Ok(found(identity, Some(endpoint.id)));
    }
    if let Some(peer) = world.peers.iter().find(|peer| peer.name == text) {
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
    let by_number = world
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
    let address: IpAddr = text.parse().map_err(|_| {
        format!(
            "{text:?} is not an endpoint, a peer, an address or a reserved identity in use (host, world-ipv4, \
             world-ipv6, ...); see `palisade endpoint list`"
        )
    })?;
    let entry = snapshot.identity_of(address);
    Ok(found(entry.identity, Some(entry.endpoint)))
}

fn side(
    compiler: &Compiler,
    endpoint: u16,
    direction: Direction,
    other: Identity,
    question: &Question,
) -> Result<Side, String> {
    let snapshot = compiler.snapshot();
    let entry = snapshot
        .judge(endpoint, direction, other, question.protocol, Some(question.port))
        .ok_or_else(|| format!("endpoint {endpoint} has no compiled policy"))?;
    let name = compiler
        .world()
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
    let (verdict, reason) = explain(compiler, &entry);
    Ok(Side {
        endpoint,
        name,
        direction: match direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        },
        verdict,
        reason,
        decided_by: describe(entry.rule),
        rule: entry.rule,
        matching,
    })
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
            "the ends would have to authenticate, and nobody can yet".into(),
        ),
        Decision::Allow => {
            let reason = match info.map(|info| &info.key) {
                Some(RuleKey::NotEnforced { .. }) => "nothing is enforced in this direction",
                Some(RuleKey::DefaultAllow { .. }) => "nothing denies it, and no policy denies by default",
                Some(RuleKey::LocalhostAlways) => "it comes from the node itself",
                _ => "a rule allows it",
            };
            (Outcome::Allowed, reason.into())
        }
        Decision::Inspect => (
            Outcome::Inspected,
            format!(
                "a rule allows what it says about {}",
                inspector_name(entry.inspector)
            ),
        ),
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
        writeln!(f, "{what}")?;
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
        }
        if self.sides.is_empty() {
            writeln!(
                f,
                "neither end is an endpoint of this node: nothing here judges it"
            )?;
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

    use super::*;
    use crate::{
        compile::{Changes, CompilerState, FileContent},
        labels::parse_label,
        parse::parse,
        world::{Endpoint, World},
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
                world: Some(World {
                    endpoints: vec![endpoint(1, "front"), endpoint(2, "web")],
                    ..World::default()
                }),
                files: BTreeMap::from([("web.yaml".into(), Some(content))]),
            })
            .unwrap();
        compiler
    }

    fn ask(source: &str, destination: &str, port: u16) -> Trace {
        let question = Question {
            source: source.into(),
            destination: destination.into(),
            protocol: protocol::TCP,
            port,
        };
        trace(&compiler(), &question).unwrap()
    }

    #[test]
    fn both_ends_are_asked_and_the_rule_is_named_with_its_line() {
        let answer = ask("front", "default/web", 80);
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
        let answer = ask("world-ipv4", "2", 81);
        assert_eq!(answer.source.identity, palisade_abi::identity::WORLD_IPV4);
        assert_eq!(answer.sides[0].name, "default/web");
        assert_eq!(answer.verdict, Outcome::Denied);
    }

    #[test]
    fn a_denial_names_its_cause() {
        let answer = ask("front", "10.0.0.2", 81);
        assert_eq!(answer.verdict, Outcome::Denied);
        assert_eq!(
            answer.sides[1].decided_by,
            "default deny of ingress by policy default/web (web.yaml:1)"
        );
        let answer = ask("192.0.2.7", "web", 80);
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
                    port: 1
                }
            )
            .unwrap_err()
            .contains("nobody")
        );
    }
}
