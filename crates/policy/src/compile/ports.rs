//! Resolution of the ports of rules, port names included, to port sets.

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use palisade_abi::{Direction, Identity, protocol};
use palisade_model::{
    inventory::NamedPorts,
    rule::{L4Protocol, PolicyKind, PortSpec, Ports, Section},
};

use super::{compiler::Compiler, named_ports::Numbers, spec::CompiledSpec};
use crate::classes::PortSet;

/// The port sets that a port of a rule resolves to.
#[derive(Default)]
pub(super) struct Resolved {
    /// Port sets towards every peer.
    pub(super) sets: Vec<PortSet>,
    /// Port names that peers number differently, with one element for each protocol.
    pub(super) apart: Vec<NumberedDistinctPorts>,
}

/// A port name that peers number differently.
pub(super) struct NumberedDistinctPorts {
    /// For each number of the name: the port set, and the identities of the peers to which the number applies.
    pub(super) own: Vec<(PortSet, Arc<BTreeSet<Identity>>)>,
    /// All peers that have the name.
    pub(super) owners: Arc<BTreeSet<Identity>>,
    /// Port sets towards all other peers.
    pub(super) others: Vec<PortSet>,
}

impl NumberedDistinctPorts {
    fn sets(&self) -> impl Iterator<Item = PortSet> {
        self.own
            .iter()
            .map(|(set, _)| *set)
            .chain(self.others.iter().copied())
    }
}

/// Returns the UDP ports with the same numbers as TCP ports; `None` for other ports.
pub(super) fn quic_ports(set: PortSet) -> Option<PortSet> {
    match set {
        PortSet::Range {
            protocol: protocol::TCP,
            first,
            last,
        } => Some(PortSet::Range {
            protocol: protocol::UDP,
            first,
            last,
        }),
        PortSet::All | PortSet::Protocol(_) | PortSet::Range { .. } => None,
    }
}

impl Compiler {
    /// Returns the port sets that the rules of a spec use.
    pub(super) fn port_sets(&self, unit: &CompiledSpec, own: &NamedPorts) -> Vec<PortSet> {
        let mut sets: HashSet<PortSet> = HashSet::new();
        for section in Section::ALL {
            for rule in unit.spec().rules(section) {
                let Ports::OneOf(entries) = &rule.ports else {
                    continue;
                };
                for entry in entries {
                    let intercepts = entry.l7.terminating_tls.is_some();
                    for spec in &entry.ports {
                        let resolved = self.resolve(spec, section, unit.policy().kind, own);
                        let apart = resolved.apart.iter().flat_map(NumberedDistinctPorts::sets);
                        for set in resolved.sets.iter().copied().chain(apart) {
                            sets.insert(set);
                            sets.extend(quic_ports(set).filter(|_| intercepts));
                        }
                    }
                }
            }
        }
        sets.into_iter().collect()
    }

    /// Resolves a port of a rule. For ingress, names are looked up among the subject's own ports; for egress, among
    /// those of the peers.
    ///
    /// Bare rules of case files follow Cilium 1.19, where an allow by a name that peers number differently matches
    /// nothing.
    pub(super) fn resolve(
        &self,
        spec: &PortSpec,
        section: Section,
        kind: PolicyKind,
        own: &NamedPorts,
    ) -> Resolved {
        let protocols = |wanted: L4Protocol| -> Vec<u8> {
            match wanted {
                L4Protocol::Any => vec![protocol::TCP, protocol::UDP, protocol::SCTP],
                L4Protocol::Tcp => vec![protocol::TCP],
                L4Protocol::Udp => vec![protocol::UDP],
                L4Protocol::Sctp => vec![protocol::SCTP],
                L4Protocol::Other(number) => vec![number],
            }
        };
        let range = |protocol: u8, first: u16, last: u16| {
            let with_ports = matches!(protocol, protocol::TCP | protocol::UDP | protocol::SCTP);
            if (first == 0 && last == u16::MAX) || !with_ports {
                PortSet::Protocol(protocol)
            } else {
                PortSet::Range {
                    protocol,
                    first,
                    last,
                }
            }
        };
        let sets = match spec {
            PortSpec::Range {
                protocol,
                first,
                last,
            } => protocols(*protocol)
                .into_iter()
                .map(|protocol| range(protocol, *first, *last))
                .collect(),
            PortSpec::Icmp { v6, kind } => vec![PortSet::Range {
                protocol: if *v6 { protocol::ICMPV6 } else { protocol::ICMP },
                first: u16::from(*kind),
                last: u16::from(*kind),
            }],
            PortSpec::Named { protocol, name, last } if section.direction() == Direction::Ingress => {
                let port = own.get(name).filter(|port| port.port != 0);
                protocols(*protocol)
                    .into_iter()
                    .filter_map(|protocol| {
                        let port = port.filter(|port| port.protocol == 0 || port.protocol == protocol)?;
                        Some(range(protocol, port.port, port.port.max(*last)))
                    })
                    .collect()
            }
            PortSpec::Named { protocol, name, last } => {
                let mut resolved = Resolved::default();
                for protocol in protocols(*protocol) {
                    let set = |port: u16| range(protocol, port, port.max(*last));
                    match self.named_ports.numbers(name, protocol) {
                        Numbers::Unknown => {}
                        Numbers::Agreed(port) => resolved.sets.push(set(port)),
                        Numbers::Own { .. } if kind == PolicyKind::Raw && !section.denies() => {}
                        Numbers::Own {
                            by_number,
                            several,
                            owners,
                        } => {
                            let mut own: Vec<_> = by_number
                                .into_iter()
                                .map(|(port, owners)| (set(port), owners))
                                .collect();
                            // The endpoints of one identity can give the name several numbers. An allow must not open a
                            // port of an endpoint that gives the name another number, so an allow uses none of these
                            // numbers. A deny uses all of them.
                            let mut others = Vec::new();
                            if section.denies() {
                                own.extend(several.into_iter().map(|(port, owners)| (set(port), owners)));
                                others = own.iter().map(|(set, _)| *set).collect();
                                others.sort_unstable();
                                others.dedup();
                            }
                            resolved.apart.push(NumberedDistinctPorts { own, owners, others });
                        }
                    }
                }
                return resolved;
            }
        };
        Resolved {
            sets,
            apart: Vec::new(),
        }
    }
}
