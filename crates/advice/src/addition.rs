//! The smallest addition to the policies that allows a packet.
//!
//! An addition is one policy for each direction that denies the packet. It selects only the endpoint and the peer of the
//! packet, as far as labels can tell them apart from others, and has only the port and the request of the packet.

use std::{collections::BTreeMap, net::IpAddr};

use palisade_abi::{Decision, Direction, Identity};
use palisade_model::{
    labels::Labels,
    request::RequestEvaluator,
    rule::{Location, Policy, PolicyKind, Section, Subject as SpecSubject},
    snapshot::Snapshot,
};
use palisade_policy::{
    compile::{Changes, Compiler, FileContent},
    parse::parse,
    trace::{self, Ends, Outcome, Question},
};
use serde::Serialize;

use crate::{
    document::{
        HttpForm, L7Form, Name, PeerForm, PortForm, Subject, can_be_peer, entity, resource_name, rule,
    },
    labels::{LabelSelector, is_world, namespace},
    near::{SideOf, packet_port},
    yaml::{Item, Yaml, list},
};

/// Name of the file of an addition, in messages.
const FILE: &str = "addition.yaml";
/// Largest number of identities that are named in a note.
const MAX_NAMED: usize = 3;

/// An addition to the policies that allows a packet. It has been compiled together with the policies in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Addition {
    /// The policies as YAML documents.
    pub yaml: String,
    /// Verdict on the packet with the addition.
    pub verdict: String,
    /// The rules of the addition as parts of policies that deny the packet now. Each has been checked as well.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub in_policies: Vec<InPolicy>,
    /// What else the addition would allow, if labels cannot tell it apart.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A rule to add to an existing policy, in place of a policy of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InPolicy {
    /// `namespace/name` of the policy.
    pub policy: String,
    /// `FILE:LINE` of the policy.
    pub location: String,
    /// Section to which the rule is added: `ingress` or `egress`.
    pub section: &'static str,
    /// The rule, as a list of one element.
    pub yaml: String,
}

/// One policy of the addition.
struct Part {
    direction: Direction,
    endpoint: u16,
    subject: Subject,
    rule: Yaml,
}

/// Returns the addition that allows the packet; `None` if nothing denies it.
///
/// # Errors
/// The reasons why no addition allows it.
pub(crate) fn addition(
    compiler: &Compiler,
    ends: &Ends<'_>,
    question: &Question,
    evaluator: &dyn RequestEvaluator,
) -> Result<Option<Addition>, Vec<String>> {
    let before = trace::trace_between(ends, question, evaluator).map_err(|error| vec![error])?;
    let mut parts = Vec::new();
    let mut obstacles = Vec::new();
    for side in &before.sides {
        if !matches!(side.verdict, Outcome::Denied | Outcome::Audited) {
            continue;
        }
        let (direction, other) = if side.direction == "egress" {
            (Direction::Egress, &ends.destination)
        } else {
            (Direction::Ingress, &ends.source)
        };
        let Some(endpoint) = ends
            .compiler
            .inventory()
            .endpoints
            .iter()
            .find(|known| known.id == side.endpoint)
        else {
            continue;
        };
        let of = SideOf {
            compiler: &ends.compiler,
            endpoint,
            direction,
            other,
            question,
        };
        match part(of) {
            Ok(part) => parts.push(part),
            Err(reason) => obstacles.push(format!("{} of {}: {reason}", side.direction, side.name)),
        }
    }
    if !obstacles.is_empty() {
        return Err(obstacles);
    }
    if parts.is_empty() {
        return Ok(None);
    }
    let yaml = documents(compiler, &parts, question);
    let trial = with_file(compiler, &yaml).map_err(|error| vec![error])?;
    let verdict = allowed(&trial, question, evaluator).map_err(|reason| vec![reason])?;
    let in_policies = parts
        .iter()
        .filter_map(|part| in_policy(compiler, part, &parts, question, evaluator))
        .collect();
    Ok(Some(Addition {
        notes: parts
            .iter()
            .filter_map(|part| also_allowed(compiler, &trial, part, ends, question))
            .collect(),
        yaml,
        verdict: verdict.to_string(),
        in_policies,
    }))
}

/// Returns the policy that allows the packet in one direction.
fn part(side: SideOf<'_>) -> Result<Part, String> {
    let snapshot = side.compiler.snapshot();
    let question = side.question;
    let entry = snapshot
        .policy_entry(
            side.endpoint.id,
            side.direction,
            side.other.identity,
            question.protocol,
            Some(question.port),
        )
        .ok_or("the endpoint has no compiled policy")?;
    match Decision::from_u8(entry.decision) {
        Decision::DenyExplicit => {
            let deciding = side.compiler.matching_rules(
                side.endpoint.id,
                side.direction,
                side.other.identity,
                question.protocol,
                question.port,
            );
            let rules: Vec<String> = deciding
                .into_iter()
                .filter(|(_, effect)| effect == "deny")
                .filter_map(|(id, _)| Some(snapshot.rules.get(&id)?.to_string()))
                .collect();
            return Err(format!(
                "no added rule allows it, since a deny rule outweighs every allow; change or remove {}",
                rules.join(" and ")
            ));
        }
        Decision::Inspect if question.request.is_empty() => {
            return Err("its inspector is not available".into());
        }
        _ => {}
    }
    let others = || {
        side.compiler
            .inventory()
            .endpoints
            .iter()
            .map(|known| &known.labels)
    };
    let subject = Subject::exact(&side.endpoint.labels, others());
    let peer = peer_form(side)?.yaml(side.direction, subject.namespace.as_deref());
    let port = PortForm {
        protocol: question.protocol,
        port: question.port,
    };
    let l7 = l7_form(side, &entry)?;
    let rule = rule(peer, &[port], &l7).ok_or_else(|| {
        format!(
            "policies have no name for {}: only a rule without toPorts allows it, and that opens every port",
            packet_port(question.protocol, question.port)
        )
    })?;
    Ok(Part {
        direction: side.direction,
        endpoint: side.endpoint.id,
        subject,
        rule,
    })
}

/// Returns the form of a peer that selects no other known identity, as far as possible.
fn peer_form(side: SideOf<'_>) -> Result<PeerForm, String> {
    let (other, question) = (side.other, side.question);
    let identities = &side.compiler.snapshot().identities;
    if is_world(&other.labels) {
        if side.direction == Direction::Egress
            && let Some(name) = &question.to_fqdn
        {
            return Ok(PeerForm::Names([Name::Exact(normal_name(name))].into()));
        }
        let text = match side.direction {
            Direction::Egress => &question.destination,
            Direction::Ingress => &question.source,
        };
        return match (text.parse::<IpAddr>(), entity(&other.labels)) {
            (Ok(address), _) => Ok(PeerForm::Address(address)),
            (Err(_), Some(entity)) => Ok(PeerForm::Entity(entity)),
            (Err(_), None) => Err(format!("no selector selects {}", other.name)),
        };
    }
    let others = || identities.values().filter(|labels| !is_world(labels));
    if let Some(entity) = entity(&other.labels)
        && others().filter(|labels| labels.has_reserved(entity)).count() <= 1
    {
        return Ok(PeerForm::Entity(entity));
    }
    let selector = LabelSelector::exact(&other.labels, others());
    if !can_be_peer(&selector) {
        return Err(format!(
            "{} has no namespace, so no selector of a policy selects it",
            other.name
        ));
    }
    Ok(PeerForm::Labels(selector))
}

/// Returns application rules that allow only the request of the packet.
fn l7_form(side: SideOf<'_>, entry: &palisade_abi::PolicyEntry) -> Result<L7Form, String> {
    let request = &side.question.request;
    let mut form = L7Form::default();
    if let Some(http) = &request.http {
        let escaped = |text: &str| Some(regex::escape(text)).filter(|text| !text.is_empty());
        form.http.insert(HttpForm {
            method: regex::escape(&http.method),
            path: escaped(&http.path),
            host: escaped(&http.host),
        });
        if let Some(name) = &request.tls {
            let set = side.compiler.snapshot().rulesets.get(&entry.ruleset);
            let terminating = set.and_then(|set| {
                let terminating = set.terminating_tls.clone()?;
                Some((terminating, set.originating_tls.clone()))
            });
            form.tls = Some(terminating.ok_or(
                "the request is inside TLS: only a rule with terminatingTLS and its secret, \
                 in an entry of its own, can allow requests there",
            )?);
            if !name.is_empty() && set.is_some_and(|set| !set.server_names.is_empty()) {
                form.server_names.insert(normal_name(name));
            }
        }
    } else if let Some(name) = &request.tls {
        if name.is_empty() {
            return Err(
                "no serverNames allow a hello without a name: only a rule without serverNames does".into(),
            );
        }
        form.server_names.insert(normal_name(name));
    } else if let Some(name) = &request.dns {
        if side.direction == Direction::Ingress {
            return Err("dns rules are for egress only".into());
        }
        form.dns.insert(Name::Exact(normal_name(name)));
    } else if let Some(kafka) = &request.kafka {
        let topics = kafka.topics.iter().map(|topic| Some(topic.clone()));
        let none = kafka.topics.is_empty().then_some(None);
        for topic in topics.chain(none) {
            form.kafka.insert((kafka.api_key, topic, kafka.client_id.clone()));
        }
    }
    Ok(form)
}

fn normal_name(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// Returns the parts as YAML documents, with names that no other policy has.
fn documents(compiler: &Compiler, parts: &[Part], question: &Question) -> String {
    let mut out = String::new();
    for (number, part) in parts.iter().enumerate() {
        if number > 0 {
            out.push_str("---\n");
        }
        let name = free_name(compiler, part, question);
        let rules = vec![Item {
            comment: String::new(),
            value: part.rule.clone(),
        }];
        let policy = match part.direction {
            Direction::Ingress => part.subject.policy(&name, rules, Vec::new()),
            Direction::Egress => part.subject.policy(&name, Vec::new(), rules),
        };
        out.push_str(&policy.emit());
    }
    out
}

fn free_name(compiler: &Compiler, part: &Part, question: &Question) -> String {
    let direction = direction_name(part.direction);
    let endpoint = compiler
        .inventory()
        .endpoints
        .iter()
        .find(|known| known.id == part.endpoint)
        .map_or("", |known| known.name.as_str());
    let port = packet_port(question.protocol, question.port);
    let name = resource_name(&["allow", endpoint, direction, &port]);
    let taken = |name: &str| {
        compiler.files().any(|(_, content)| {
            content
                .policies
                .iter()
                .any(|policy| policy.name == name && policy.namespace == part.subject.namespace)
        })
    };
    let numbered = (2..=u16::MAX).map(|number| format!("{name}-{number}"));
    std::iter::once(name.clone())
        .chain(numbered)
        .find(|name| !taken(name))
        .unwrap_or(name)
}

const fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

/// Returns a copy of the compiler with one more file.
fn with_file(compiler: &Compiler, yaml: &str) -> Result<Compiler, String> {
    let content = content_of(yaml)?;
    let mut trial = compiler.clone();
    trial
        .update(Changes {
            inventory: None,
            files: BTreeMap::from([(FILE.to_owned(), Some(content))]),
        })
        .map_err(|errors| {
            let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
            format!(
                "the addition conflicts with the policies in force: {}",
                lines.join("; ")
            )
        })?;
    Ok(trial)
}

fn content_of(yaml: &str) -> Result<FileContent, String> {
    let parsed = parse(FILE, yaml);
    if parsed.has_errors() {
        let lines: Vec<String> = parsed.diagnostics.iter().map(ToString::to_string).collect();
        return Err(format!("no valid policy expresses it: {}", lines.join("; ")));
    }
    Ok(FileContent {
        policies: parsed.policies,
        cidr_groups: parsed.cidr_groups,
    })
}

/// Returns the verdict on the packet, which must pass at both ends.
fn allowed(
    compiler: &Compiler,
    question: &Question,
    evaluator: &dyn RequestEvaluator,
) -> Result<Outcome, String> {
    let trace = trace::trace(compiler, question, evaluator)?;
    let denied = trace
        .sides
        .iter()
        .find(|side| matches!(side.verdict, Outcome::Denied | Outcome::Audited));
    match denied {
        Some(side) => Err(format!(
            "{} of {}: no added rule allows it: {}",
            side.direction, side.name, side.reason
        )),
        None => Ok(trace.verdict),
    }
}

/// Returns the part as a rule of the policy that denies by default, if that policy selects the same endpoints.
fn in_policy(
    compiler: &Compiler,
    part: &Part,
    parts: &[Part],
    question: &Question,
    evaluator: &dyn RequestEvaluator,
) -> Option<InPolicy> {
    let (file, policy, spec) = default_denying(compiler, part)?;
    // The other direction keeps its own policy.
    let rest: Vec<&Part> = parts
        .iter()
        .filter(|other| other.direction != part.direction)
        .collect();
    let rules = list([part.rule.clone()]);
    let yaml = rules.emit();
    let of_rule = part_content(part)?;
    let mut trial = compiler.clone();
    let mut content = FileContent::clone(trial.files().find(|(name, _)| *name == file)?.1);
    let [allow, _] = Section::of(part.direction);
    let target = &mut content
        .policies
        .iter_mut()
        .find(|known| {
            known.name == policy.name && known.namespace == policy.namespace && known.kind == policy.kind
        })?
        .specs[spec];
    let section = match part.direction {
        Direction::Ingress => &mut target.ingress,
        Direction::Egress => &mut target.egress,
    };
    section.get_or_insert_default().extend(
        of_rule
            .policies
            .first()?
            .specs
            .first()?
            .rules(allow)
            .iter()
            .cloned(),
    );
    let mut files = BTreeMap::from([(file.clone(), Some(content))]);
    if let [other] = rest.as_slice() {
        files.insert(FILE.into(), Some(part_content(other)?));
    }
    trial
        .update(Changes {
            inventory: None,
            files,
        })
        .ok()?;
    allowed(&trial, question, evaluator).ok()?;
    Some(InPolicy {
        policy: policy.qualified_name(),
        location: place(&policy.location),
        section: allow.name(),
        yaml,
    })
}

fn place(location: &Location) -> String {
    format!("{}:{}", location.file, location.line)
}

fn part_content(part: &Part) -> Option<FileContent> {
    let item = vec![Item {
        comment: String::new(),
        value: part.rule.clone(),
    }];
    let policy = match part.direction {
        Direction::Ingress => part.subject.policy("addition", item, Vec::new()),
        Direction::Egress => part.subject.policy("addition", Vec::new(), item),
    };
    content_of(&policy.emit()).ok()
}

/// Returns the policy that causes the default deny of a direction, if it is of the same kind and namespace as the part
/// and one of its specs selects exactly the endpoints that the part selects: its file, and the index of the spec.
fn default_denying<'c>(compiler: &'c Compiler, part: &Part) -> Option<(String, &'c Policy, usize)> {
    let kind = match part.subject.namespace {
        Some(_) => PolicyKind::Cnp,
        None => PolicyKind::Ccnp,
    };
    let endpoints = &compiler.inventory().endpoints;
    let by_part = |labels: &Labels| part.subject.selector.selects(labels);
    for (file, content) in compiler.files() {
        for policy in &content.policies {
            if policy.kind != kind || policy.namespace != part.subject.namespace {
                continue;
            }
            for (number, spec) in policy.specs.iter().enumerate() {
                let [allow, deny] = Section::of(part.direction);
                if spec.rules(allow).is_empty() && spec.rules(deny).is_empty() {
                    continue;
                }
                let same = endpoints.iter().all(|endpoint| {
                    let selected = match &spec.subject {
                        SpecSubject::Endpoints(selector) => {
                            !endpoint.is_node() && selector.matches(&endpoint.labels)
                        }
                        SpecSubject::Node(selector) => {
                            endpoint.is_node() && selector.matches(&endpoint.labels)
                        }
                    };
                    let wanted = endpoint.is_node() == part.subject.node
                        && by_part(&endpoint.labels)
                        && (part.subject.namespace.is_none()
                            || namespace(&endpoint.labels) == part.subject.namespace.as_deref());
                    selected == wanted
                });
                if same {
                    return Some((file.to_owned(), policy, number));
                }
            }
        }
    }
    None
}

/// Returns a note if the addition changes the verdict on other identities at the same port from a denial.
fn also_allowed(
    before: &Compiler,
    after: &Compiler,
    part: &Part,
    ends: &Ends<'_>,
    question: &Question,
) -> Option<String> {
    let target = match part.direction {
        Direction::Egress => &ends.destination.labels,
        Direction::Ingress => &ends.source.labels,
    };
    let denies = |snapshot: &Snapshot, identity: Identity| {
        let entry = snapshot.policy_entry(
            part.endpoint,
            part.direction,
            identity,
            question.protocol,
            Some(question.port),
        );
        entry.is_none_or(|entry| {
            !matches!(
                Decision::from_u8(entry.decision),
                Decision::Allow | Decision::Inspect
            )
        })
    };
    let opened: Vec<String> = before
        .snapshot()
        .identities
        .iter()
        .filter(|(_, labels)| *labels != target && !is_world(labels))
        .filter(|(identity, _)| {
            denies(before.snapshot(), **identity) && !denies(after.snapshot(), **identity)
        })
        .map(|(_, labels)| labels.to_string())
        .take(MAX_NAMED)
        .collect();
    (!opened.is_empty()).then(|| {
        format!(
            "it also allows {}: stable labels do not tell them apart",
            opened.join(" and ")
        )
    })
}
