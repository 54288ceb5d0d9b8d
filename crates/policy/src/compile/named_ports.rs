//! Named ports in egress rules. Towards a peer, a name means the number that the peer gives it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use palisade_abi::Identity;
use palisade_model::inventory::{NamedPort, NamedPorts};

/// Identities that have a named port, by name and number.
#[derive(Clone, Debug, Default)]
pub(super) struct NamedPortOwners(BTreeMap<String, BTreeMap<NamedPort, BTreeSet<Identity>>>);

/// Meaning of a port name for one protocol.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Numbers {
    /// No endpoint and no peer has a port of this name and protocol.
    Unknown,
    /// All identities that have the port give it this number. The number also applies towards peers without such a
    /// port.
    Agreed(u16),
    /// Peers give the name different numbers.
    Own {
        /// Identities that give the name one number, by number.
        by_number: Vec<(u16, Arc<BTreeSet<Identity>>)>,
        /// Identities that give the name several numbers, by number. The endpoints or peers of such an identity have
        /// the same labels, so selectors cannot distinguish them.
        several: Vec<(u16, Arc<BTreeSet<Identity>>)>,
        /// All identities of `by_number` and `several`.
        owners: Arc<BTreeSet<Identity>>,
    },
}

impl NamedPortOwners {
    pub(super) fn add(&mut self, ports: &NamedPorts, identity: Identity) {
        for (name, port) in ports.iter().filter(|(_, port)| port.port != 0) {
            let owners = self.0.entry(name.clone()).or_default();
            owners.entry(*port).or_default().insert(identity);
        }
    }

    pub(super) fn knows(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub(super) fn numbers(&self, name: &str, protocol: u8) -> Numbers {
        let ports = self.0.get(name).into_iter().flatten();
        let ports = ports.filter(|(port, _)| port.protocol == 0 || port.protocol == protocol);
        let mut by_number: BTreeMap<u16, BTreeSet<Identity>> = BTreeMap::new();
        for (port, owners) in ports {
            by_number.entry(port.port).or_default().extend(owners);
        }
        match by_number.len() {
            0 => return Numbers::Unknown,
            1 => {
                return by_number
                    .keys()
                    .next()
                    .map_or(Numbers::Unknown, |port| Numbers::Agreed(*port));
            }
            _ => {}
        }
        let mut count: BTreeMap<Identity, usize> = BTreeMap::new();
        for identity in by_number.values().flatten() {
            *count.entry(*identity).or_default() += 1;
        }
        let of = |wanted: fn(usize) -> bool| -> Vec<(u16, Arc<BTreeSet<Identity>>)> {
            let chosen = by_number.iter().map(|(port, owners)| {
                let owners = owners.iter().filter(|identity| wanted(count[*identity]));
                (*port, Arc::new(owners.copied().collect::<BTreeSet<_>>()))
            });
            chosen.filter(|(_, owners)| !owners.is_empty()).collect()
        };
        Numbers::Own {
            several: of(|numbers| numbers > 1),
            owners: Arc::new(count.keys().copied().collect()),
            by_number: of(|numbers| numbers == 1),
        }
    }
}
