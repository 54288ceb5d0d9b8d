//! Requests that are answered on the control thread, which has the compiler and the configuration.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Instant,
};

use palisade_abi::{CLASS_ANY, Direction, entry_flags, identity};
use palisade_model::{
    inventory::Endpoint as WorldEndpoint,
    rule::{Peer, Policy},
    snapshot::{RuleKey, RulePlace, TableKey},
};
use palisade_policy::parse::yaml_to_json;
use serde_json::Value;
use tracing::{error, info, warn};

use super::super::{
    control::Control,
    message::{ClientRequest, CompilerCopy},
    selector_text::peer_text,
    trace::trace,
    view::kind_name,
};
use crate::{
    control::api::{
        Endpoint, InterfaceStatus, PolicyFileState, PolicySummary, RuleSummary, SelectorRow, Session,
        TraceAnswer, TraceRequest,
    },
    text::{chain, milliseconds},
};

impl Control {
    /// Answers a request of a client.
    pub(in crate::daemon) fn answer(&mut self, request: ClientRequest) {
        match request {
            ClientRequest::Status(reply) => {
                self.interception.watch_limits();
                reply.send(Ok(self.status()));
            }
            ClientRequest::Reload {
                sessions,
                force,
                reply,
            } => {
                let checked = if force { &[][..] } else { &sessions };
                reply.send(self.reload(checked));
            }
            ClientRequest::Policies { name, reply } => reply.send(self.policy_summaries(name.as_deref())),
            ClientRequest::Selectors(reply) => reply.send(Ok(self.selectors())),
            ClientRequest::Trace(request, reply) => reply.send(self.trace(&request)),
            ClientRequest::Compiler(reply) => reply.send(Ok(Box::new(CompilerCopy {
                compiler: self.enforcer.compiler.clone(),
                http: self.config.http.clone(),
                policy_dir: self.config.policy.dir.clone(),
            }))),
            ClientRequest::PolicyBase(reply) => reply.send(Ok(Box::new(self.policy_base()))),
            ClientRequest::PolicySwitch(switch, reply) => self.begin_change(*switch, reply),
            ClientRequest::PolicyConfirm(number, reply) => self.confirm_change(number, reply),
            ClientRequest::PolicyCancel(author, number, sessions, reply) => {
                self.cancel_change(author, number, &sessions, reply);
            }
            ClientRequest::Endpoints(reply) => reply.send(Ok(self.endpoints())),
            ClientRequest::Endpoint { endpoint, reply } => reply.send(
                self.find_endpoint(&endpoint)
                    .map(|found| self.endpoint(found, &self.interfaces.report(&self.datapath))),
            ),
            ClientRequest::EndpointConfig {
                endpoint,
                options,
                sessions,
                reply,
            } => reply.send(self.configure_endpoint(&endpoint, options, &sessions)),
            ClientRequest::BeginCapture(programs, reply) => {
                let begun = self.datapath.begin_capture(programs);
                if begun.is_err()
                    && let Some(problem) = self.datapath.replacement_problem()
                {
                    error!(
                        error = problem,
                        "the programs of a capture that failed to begin could not be replaced; they enforce the policy, and \
                         the replacement is retried"
                    );
                }
                reply.send(begun.map_err(|error| error.to_string()));
            }
            ClientRequest::EndCapture(reply) => {
                reply.send(self.datapath.end_capture().map_err(|error| error.to_string()));
            }
        }
    }

    fn trace(&self, request: &TraceRequest) -> Result<TraceAnswer, String> {
        let mut answer = trace(&self.enforcer.compiler, &self.config, request)?;
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
        Ok(answer)
    }

    fn configure_endpoint(
        &mut self,
        endpoint: &str,
        options: BTreeMap<String, bool>,
        sessions: &[Session],
    ) -> Result<BTreeMap<String, bool>, String> {
        let name = full_name(self.find_endpoint(endpoint)?);
        for (option, enabled) in options {
            if option != "PolicyAuditMode" {
                return Err(format!("there is no option '{option}'"));
            }
            if !enabled && let Some(denied) = self.sessions_denied_without_audit(&name, sessions) {
                warn!(endpoint = name, denied, "the end of the audit mode was refused");
                return Err(format!(
                    "nothing was changed: without PolicyAuditMode the policies DENY YOUR OWN SESSION {denied}; allow the \
                     session, or use --force"
                ));
            }
            self.set_audit(name.clone(), enabled)?;
        }
        Ok(self.audit_options(&name))
    }

    /// Returns the endpoint with this number, name or address.
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

    /// Returns every endpoint, the node first.
    fn endpoints(&self) -> Vec<Endpoint> {
        self.endpoints_with(&self.interfaces.report(&self.datapath))
    }

    /// Returns every endpoint, given the state of the interfaces.
    pub(in crate::daemon) fn endpoints_with(&self, interfaces: &[InterfaceStatus]) -> Vec<Endpoint> {
        let inventory = self.enforcer.compiler.inventory();
        let endpoints = inventory.endpoints.iter();
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
                // Cilium's wording: nothing is enforced, but would-be drops are reported.
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
            source: self.source_of(endpoint.id, &name),
            name,
        }
    }

    fn policy_summaries(&self, name: Option<&str>) -> Result<Vec<PolicySummary>, String> {
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
        /// Rules of a policy, by file, kind and name of the policy.
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
                // The text in force, not the present content of the file: the two differ while the file is broken.
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
            _ => Ok(summaries),
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

    /// Switches audit mode of an endpoint.
    ///
    /// # Errors
    /// The option cannot be put in force, or the state cannot be written. In the second case the option is in force,
    /// but is lost at the next start unless a retry of the write succeeds.
    fn set_audit(&mut self, name: String, audit: bool) -> Result<(), String> {
        let begun = Instant::now();
        let changed = if audit {
            self.state.state.audit.insert(name.clone())
        } else {
            self.state.state.audit.remove(&name)
        };
        if changed {
            self.update_inventory(begun).map_err(|problem| chain(&problem))?;
            info!(
                event = "audit",
                endpoints = name,
                audit,
                revision = self.changes,
                enforced_after_ms = milliseconds(begun.elapsed()),
                "PolicyAuditMode was switched"
            );
        }
        // The state is saved even if the option has not changed, because it is not certain that an earlier write
        // succeeded.
        self.save();
        self.state.keeper.flush().map_err(|problem| {
            format!(
                "{problem}: the option is in force now but NOT KEPT, so it is lost at the next start; it is written \
                 when that is possible, see `palisade status`"
            )
        })
    }

    /// Returns the options of an endpoint by name.
    fn audit_options(&self, name: &str) -> BTreeMap<String, bool> {
        [(
            "PolicyAuditMode".to_owned(),
            self.state.state.audit.contains(name),
        )]
        .into()
    }
}

fn peers_of(spec: &palisade_model::rule::Spec) -> impl Iterator<Item = &Peer> {
    [&spec.ingress, &spec.ingress_deny, &spec.egress, &spec.egress_deny]
        .into_iter()
        .flatten()
        .flatten()
        .flat_map(|rule| match &rule.peers {
            palisade_model::rule::Peers::OneOf(peers) => peers.as_slice(),
            palisade_model::rule::Peers::Any | palisade_model::rule::Peers::None => &[],
        })
}

/// Returns the resource of a policy from the text of its file. The resource can be an item of a list.
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

/// Returns a rule from a resource; `None` if the rule has no entry there, as in a NetworkPolicy that denies a direction
/// by listing no rules for it.
fn rule_at<'v>(resource: &'v Value, place: &RulePlace) -> Option<&'v Value> {
    let one = Some(&resource["spec"]).filter(|spec| spec.is_object());
    let several = resource["specs"].as_array().into_iter().flatten();
    let spec = one.into_iter().chain(several).nth(place.spec as usize)?;
    spec.get(place.section.name())?.get(place.index as usize)
}

/// Returns the YAML document that contains a line. A text without separators is returned whole.
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

/// Returns `namespace/name`; the node has no namespace.
fn full_name(endpoint: &WorldEndpoint) -> String {
    if endpoint.namespace.is_empty() {
        endpoint.name.clone()
    } else {
        format!("{}/{}", endpoint.namespace, endpoint.name)
    }
}

#[cfg(test)]
mod tests {
    use palisade_model::rule::Section;
    use palisade_policy::parse::parse;

    use super::*;

    #[test]
    fn a_policy_is_shown_as_its_yaml_document() {
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
        // This policy denies ingress without any rule.
        assert_eq!(rule(plain, 0, Section::Ingress, 0), None);
        assert_eq!(resource_of(text, plain).unwrap()["kind"], "NetworkPolicy");
        assert_eq!(resource_of("a: [", web), None);
    }
}
