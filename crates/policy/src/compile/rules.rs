//! Conversion of the rules of a spec to rules of a table.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use palisade_abi::{Class, Direction, Identity};
use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    rule::{Location, Peer, PolicyKind, PortSpec, Ports, Rule, Section, Selector},
};

use super::{
    compiler::Compiler,
    l7_policy::L7Policy,
    peers::PeerSlot,
    ports::{Resolved, quic_ports},
    select::ResolvedSelector,
    spec::{CompiledPeers, CompiledRule, CompiledSpec, SpecKey},
    subject::Subject,
    table_rule::{Learned, Member, Members, TablePorts, TableRule},
};
use crate::classes::PortSet;

/// Ports of a rule, split by the members towards which they apply.
#[derive(Default)]
struct RulePorts {
    /// Ports that apply towards all members of the rule.
    common: Vec<TablePorts>,
    /// Port names that peers number differently: each number applies only towards some members.
    distinct: Vec<DistinctPorts>,
}

/// One number of a port name, with the members towards which the number applies.
struct DistinctPorts {
    members: Members,
    except: Option<Arc<BTreeSet<Identity>>>,
    ports: TablePorts,
}

/// Input and output of the resolution of one spec and direction.
pub(super) struct RuleContext<'a> {
    pub(super) subject: &'a Subject,
    pub(super) key: &'a SpecKey,
    pub(super) direction: Direction,
    /// Classes of port sets, shared by all specs of the subject.
    pub(super) classes: &'a mut HashMap<PortSet, Option<Arc<[Class]>>>,
    pub(super) remarks: &'a mut Vec<Diagnostic>,
}

impl Compiler {
    /// Returns the rules of one spec and direction, in the order of the spec, with peers and ports resolved.
    pub(super) fn table_rules(&self, unit: &CompiledSpec, cx: &mut RuleContext<'_>) -> Vec<TableRule> {
        let mut rules = Vec::new();
        for section in Section::of(cx.direction) {
            let compiled = &unit.sections[section as usize];
            for (rule, compiled) in unit.spec().rules(section).iter().zip(compiled) {
                if rule.auth_required && !section.denies() {
                    cx.remarks.push(Diagnostic {
                        severity: Severity::Warning,
                        location: rule.location.clone(),
                        message: "authentication is required but not implemented: \
                                  what this rule allows is dropped (189)"
                            .into(),
                    });
                }
                let Some(members) = self.rule_members(rule, compiled, section, cx) else {
                    continue;
                };
                let RulePorts { common, distinct } = self.rule_ports(rule, &members, unit, section, cx);
                let table_rule = |members, except, ports| TableRule {
                    id: compiled.id,
                    failsafe: unit.policy().kind == PolicyKind::Failsafe,
                    denies: section.denies(),
                    audit: unit.audit,
                    auth_required: rule.auth_required,
                    members,
                    except,
                    ports,
                };
                rules.push(table_rule(members, None, common));
                rules.extend(
                    distinct
                        .into_iter()
                        .map(|part| table_rule(part.members, part.except, vec![part.ports])),
                );
            }
        }
        rules
    }

    /// Returns the members of a rule; `None` for [`CompiledPeers::None`].
    fn rule_members(
        &self,
        rule: &Rule,
        compiled: &CompiledRule,
        section: Section,
        cx: &mut RuleContext<'_>,
    ) -> Option<Members> {
        let peers = match &compiled.peers {
            CompiledPeers::None => return None,
            CompiledPeers::Any => return Some(Members::Any),
            CompiledPeers::OneOf(peers) => peers,
        };
        let required = &cx.subject.required[section as usize];
        let mut members = Vec::with_capacity(peers.len());
        let mut any = false;
        for number in peers {
            let Some(slot) = self.peers.slot(*number) else {
                continue;
            };
            if let Peer::Labels(selector) = &slot.peer
                && !required.requirements.is_empty()
            {
                members.push(self.narrowed_member(*number, selector, required));
                continue;
            }
            any |= matches!(*slot.resolved, ResolvedSelector::Any);
            cx.remarks.extend(missing_group(slot, &rule.location));
            members.push(Member {
                peer: *number,
                members: Arc::clone(&slot.members),
                learned: self.learned_of(slot),
            });
        }
        Some(if any { Members::Any } else { Members::Of(members) })
    }

    /// Returns the member for a label selector to which the `fromRequires` or `toRequires` of all specs of the subject
    /// are added.
    fn narrowed_member(&self, peer: u32, selector: &Selector, required: &Selector) -> Member {
        let requirements = selector.requirements.iter().chain(&required.requirements);
        let narrowed = Selector {
            requirements: requirements.cloned().collect(),
        };
        let resolved = ResolvedSelector::of(&Peer::Labels(narrowed), &[]);
        Member {
            peer,
            members: Arc::new(self.identity_index.select(&resolved)),
            learned: Learned::Labels(Arc::new(resolved)),
        }
    }

    /// Returns which learned identities a peer selects.
    fn learned_of(&self, slot: &PeerSlot) -> Learned {
        match &*slot.resolved {
            ResolvedSelector::Fqdn(text) => match self.names.selector_of(text) {
                Some(selector) => Learned::Selector(selector),
                None => Learned::Base,
            },
            ResolvedSelector::Labels(_) | ResolvedSelector::Nodes(_) => {
                Learned::Labels(Arc::clone(&slot.resolved))
            }
            _ => Learned::Base,
        }
    }

    /// Returns the ports of a rule with their classes and application rules.
    fn rule_ports(
        &self,
        rule: &Rule,
        members: &Members,
        unit: &CompiledSpec,
        section: Section,
        cx: &mut RuleContext<'_>,
    ) -> RulePorts {
        let mut out = RulePorts::default();
        let Ports::OneOf(entries) = &rule.ports else {
            out.common.push(TablePorts {
                set: PortSet::All,
                classes: None,
                l7: None,
                quic: false,
            });
            return out;
        };
        for entry in entries {
            let l7 = L7Policy::of(&entry.l7).map(Arc::new);
            for port in &entry.ports {
                let resolved = self.resolve(port, section, unit.policy().kind, &cx.subject.named_ports);
                let has_effect = self.add_ports(&resolved, l7.as_ref(), members, cx.classes, &mut out);
                if !has_effect && let PortSpec::Named { name, .. } = port {
                    cx.remarks.push(self.unresolved(name, &entry.location, cx));
                }
            }
        }
        out
    }

    /// Adds one resolved port to `out`. Returns whether the port matches anything.
    fn add_ports(
        &self,
        resolved: &Resolved,
        l7: Option<&Arc<L7Policy>>,
        members: &Members,
        classes: &mut HashMap<PortSet, Option<Arc<[Class]>>>,
        out: &mut RulePorts,
    ) -> bool {
        let intercepts = l7.is_some_and(|l7| l7.terminating_tls.is_some());
        let mut made = |set: PortSet| {
            let mut ports = |set: PortSet, quic: bool| TablePorts {
                set,
                classes: classes.entry(set).or_insert_with(|| self.classes.of(set)).clone(),
                l7: l7.filter(|_| !quic).cloned(),
                quic,
            };
            let of_quic = quic_ports(set).filter(|_| intercepts);
            [Some(ports(set, false)), of_quic.map(|set| ports(set, true))]
                .into_iter()
                .flatten()
        };
        let mut has_effect = !resolved.sets.is_empty();
        out.common.extend(resolved.sets.iter().flat_map(|set| made(*set)));
        for name in &resolved.apart {
            for (set, owners) in &name.own {
                let members = members.among(owners);
                if matches!(&members, Members::Of(peers) if peers.is_empty()) {
                    continue;
                }
                has_effect = true;
                out.distinct.extend(made(*set).map(|ports| DistinctPorts {
                    members: members.clone(),
                    except: None,
                    ports,
                }));
            }
            for set in &name.others {
                has_effect = true;
                out.distinct.extend(made(*set).map(|ports| DistinctPorts {
                    members: members.without(&name.owners),
                    except: matches!(members, Members::Any).then(|| Arc::clone(&name.owners)),
                    ports,
                }));
            }
        }
        has_effect
    }

    /// Returns the warning about a port name that resolves to no port in this rule.
    fn unresolved(&self, name: &str, location: &Location, cx: &RuleContext<'_>) -> Diagnostic {
        let whom = match cx.direction {
            Direction::Ingress => {
                let endpoint = cx.subject.endpoints.first().map(|(id, _)| *id);
                let endpoint = self.inventory.endpoints.iter().find(|e| Some(e.id) == endpoint);
                let endpoint = endpoint.map_or("", |endpoint| endpoint.name.as_str());
                format!("endpoint {endpoint} has no port of that name and protocol")
            }
            Direction::Egress if self.named_ports.knows(name) => {
                "endpoints number it differently and no peer of this rule has a port of that name, or they have it for \
                 another protocol"
                    .into()
            }
            Direction::Egress => "no endpoint has a port of that name".into(),
        };
        Diagnostic {
            severity: Severity::Warning,
            location: location.clone(),
            message: format!("policy {}: port {name:?} has no effect: {whom}", cx.key.policy),
        }
    }
}

/// Returns a warning if the peer refers by name to a group of prefixes that does not exist or is empty.
fn missing_group(slot: &PeerSlot, location: &Location) -> Option<Diagnostic> {
    match (&slot.peer, &*slot.resolved) {
        (Peer::CidrGroup { name, .. }, ResolvedSelector::Cidrs(rules)) if rules.is_empty() => {
            Some(Diagnostic {
                severity: Severity::Warning,
                location: location.clone(),
                message: format!(
                    "there is no CiliumCIDRGroup {name} with prefixes; the reference selects no peer"
                ),
            })
        }
        _ => None,
    }
}
