//! Rules of a spec to rules of a table.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use palisade_abi::{Class, Direction, Identity};
use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    rule::{Location, Peer, PortSpec, Ports, Section},
};

use super::{
    compiler::Compiler,
    l7_policy::L7Policy,
    peers::PeerSlot,
    select::ResolvedSelector,
    spec::{SpecKey, UnitPeers},
    subject::{AppliedSpec, Subject},
    table_rule::{Learned, Member, Members, TablePorts, TableRule},
};
use crate::classes::PortSet;

/// The part of a rule about a name of a port that peers number differently, towards some of them.
struct DistinctPorts {
    members: Members,
    except: Option<Arc<BTreeSet<Identity>>>,
    ports: TablePorts,
}

impl Compiler {
    /// The rules of one spec and direction, in their order, with everything looked up.
    pub(super) fn table_rules(
        &self,
        subject: &Subject,
        key: &SpecKey,
        selecting: &AppliedSpec,
        direction: Direction,
        classes: &mut HashMap<PortSet, Option<Arc<[Class]>>>,
        remarks: &mut Vec<Diagnostic>,
    ) -> Vec<TableRule> {
        let unit = &selecting.unit;
        let spec = unit.spec();
        let mut rules = Vec::new();
        for section in Section::of(direction) {
            let looked_up = &unit.sections[section as usize];
            for (rule, looked_up) in spec.rules(section).iter().zip(looked_up) {
                if rule.auth_required && !section.denies() {
                    remarks.push(Diagnostic {
                        severity: Severity::Warning,
                        location: rule.location.clone(),
                        message: "authentication is required, and nobody can authenticate yet: \
                                  what this rule allows is dropped (189)"
                            .into(),
                    });
                }
                let members = match &looked_up.peers {
                    UnitPeers::Nobody => continue,
                    UnitPeers::Everybody => Members::Everybody,
                    UnitPeers::OneOf(peers) => {
                        let slots = peers
                            .iter()
                            .filter_map(|number| Some((*number, self.peers.slot(*number)?)));
                        let mut members = Vec::with_capacity(peers.len());
                        let mut everybody = false;
                        let required = &subject.required[section as usize];
                        for (number, slot) in slots {
                            if let Peer::Labels(selector) = &slot.peer
                                && !required.requirements.is_empty()
                            {
                                let mut narrowed = selector.clone();
                                narrowed
                                    .requirements
                                    .extend(required.requirements.iter().cloned());
                                let resolved = ResolvedSelector::of(&Peer::Labels(narrowed), &[]);
                                members.push(Member {
                                    peer: number,
                                    members: Arc::new(self.identity_index.select(&resolved)),
                                    learned: Learned::Labels(Arc::new(resolved)),
                                });
                                continue;
                            }
                            everybody |= matches!(*slot.resolved, ResolvedSelector::Everybody);
                            remarks.extend(self.missing_group(slot, &rule.location));
                            let selector = match &*slot.resolved {
                                ResolvedSelector::Fqdn(text) => self.names.selector_of(text),
                                _ => None,
                            };
                            let learned = match (&*slot.resolved, selector) {
                                (_, Some(selector)) => Learned::Selector(selector),
                                (ResolvedSelector::Labels(_) | ResolvedSelector::Nodes(_), _) => {
                                    Learned::Labels(Arc::clone(&slot.resolved))
                                }
                                _ => Learned::Base,
                            };
                            members.push(Member {
                                peer: number,
                                members: Arc::clone(&slot.members),
                                learned,
                            });
                        }
                        if everybody {
                            Members::Everybody
                        } else {
                            Members::Of(members)
                        }
                    }
                };
                // Rules of their own for names that peers number differently.
                let mut apart: Vec<DistinctPorts> = Vec::new();
                let mut ports = Vec::new();
                match &rule.ports {
                    Ports::Any => ports.push(TablePorts {
                        set: PortSet::All,
                        classes: None,
                        l7: None,
                    }),
                    Ports::OneOf(list) => {
                        for entry in list {
                            let l7 = L7Policy::of(&entry.l7).map(Arc::new);
                            for port in &entry.ports {
                                let resolved =
                                    self.resolve(port, section, unit.policy().kind, &subject.named_ports);
                                let mut made = |set: PortSet| TablePorts {
                                    set,
                                    classes: classes
                                        .entry(set)
                                        .or_insert_with(|| self.classes.of(set))
                                        .clone(),
                                    l7: l7.clone(),
                                };
                                let mut has_effect = !resolved.sets.is_empty();
                                ports.extend(resolved.sets.iter().map(|set| made(*set)));
                                for name in &resolved.apart {
                                    for (set, owners) in &name.own {
                                        let members = members.among(owners);
                                        if !matches!(&members, Members::Of(peers) if peers.is_empty()) {
                                            has_effect = true;
                                            apart.push(DistinctPorts {
                                                members,
                                                except: None,
                                                ports: made(*set),
                                            });
                                        }
                                    }
                                    for set in &name.others {
                                        has_effect = true;
                                        let except = matches!(members, Members::Everybody)
                                            .then(|| Arc::clone(&name.owners));
                                        apart.push(DistinctPorts {
                                            members: members.without(&name.owners),
                                            except,
                                            ports: made(*set),
                                        });
                                    }
                                }
                                if !has_effect && let PortSpec::Named { name, .. } = port {
                                    remarks.push(self.unresolved(
                                        name,
                                        direction,
                                        key,
                                        &entry.location,
                                        subject,
                                    ));
                                }
                            }
                        }
                    }
                }
                rules.push(TableRule {
                    id: looked_up.id,
                    denies: section.denies(),
                    audit: unit.audit,
                    auth_required: rule.auth_required,
                    members,
                    except: None,
                    ports,
                });
                rules.extend(apart.into_iter().map(
                    |DistinctPorts {
                         members,
                         except,
                         ports,
                     }| TableRule {
                        id: looked_up.id,
                        denies: section.denies(),
                        audit: unit.audit,
                        auth_required: rule.auth_required,
                        members,
                        except,
                        ports: vec![ports],
                    },
                ));
            }
        }
        rules
    }

    /// A remark about a group of prefixes by name that does not exist, or is empty.
    pub(super) fn missing_group(&self, slot: &PeerSlot, location: &Location) -> Option<Diagnostic> {
        match (&slot.peer, &*slot.resolved) {
            (Peer::CidrGroup { name, .. }, ResolvedSelector::Cidrs(rules)) if rules.is_empty() => {
                Some(Diagnostic {
                    severity: Severity::Warning,
                    location: location.clone(),
                    message: format!(
                        "there is no CiliumCIDRGroup {name} with prefixes; the reference means nobody"
                    ),
                })
            }
            _ => None,
        }
    }

    pub(super) fn unresolved(
        &self,
        name: &str,
        direction: Direction,
        key: &SpecKey,
        location: &Location,
        subject: &Subject,
    ) -> Diagnostic {
        let whom = match direction {
            Direction::Ingress => {
                let endpoint = subject.endpoints.first().map(|(id, _)| *id);
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
            message: format!("policy {}: port {name:?} has no effect: {whom}", key.policy),
        }
    }
}
