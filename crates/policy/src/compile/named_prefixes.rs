//! Prefixes and addresses of endpoints and peers.

use std::collections::{BTreeSet, HashSet};

use ipnet::IpNet;
use palisade_model::{inventory::Inventory, labels::Labels};

/// Prefixes and addresses of the inventory.
#[derive(Clone, Debug, Default)]
pub(super) struct NamedPrefixes {
    pub(super) all: HashSet<IpNet>,
    /// Prefixes of labelled peers outside the world.
    pub(super) labelled: HashSet<IpNet>,
    /// Address family (whether IPv6) and length of the prefixes in `labelled`.
    pub(super) lengths: BTreeSet<(bool, u8)>,
}

impl NamedPrefixes {
    pub(super) fn of(inventory: &Inventory) -> Self {
        let peers = |chosen: fn(&Labels) -> bool| {
            inventory
                .peers
                .iter()
                .filter(move |peer| chosen(&peer.labels))
                .flat_map(|peer| peer.prefixes.iter().map(IpNet::trunc))
        };
        let addresses = inventory
            .endpoints
            .iter()
            .flat_map(|endpoint| &endpoint.addresses);
        let labelled: HashSet<IpNet> = peers(|labels| !is_world(labels)).collect();
        Self {
            all: peers(|_| true)
                .chain(addresses.map(|address| IpNet::from(*address)))
                .collect(),
            lengths: labelled
                .iter()
                .map(|prefix| (matches!(prefix, IpNet::V6(_)), prefix.prefix_len()))
                .collect(),
            labelled,
        }
    }

    /// Returns whether a prefix of a labelled peer outside the world contains `prefix`. Addresses of the peer keep the
    /// identity of the peer, even if a policy names a narrower prefix.
    pub(super) fn shadows(&self, prefix: IpNet) -> bool {
        let v6 = matches!(prefix, IpNet::V6(_));
        self.lengths
            .iter()
            .filter(|(family, length)| *family == v6 && *length <= prefix.prefix_len())
            .any(|(_, length)| shorten(prefix, *length).is_some_and(|wider| self.labelled.contains(&wider)))
    }
}

pub(super) fn is_world(labels: &Labels) -> bool {
    ["world", "world-ipv4", "world-ipv6"]
        .iter()
        .any(|key| labels.has_reserved(key))
}

fn shorten(prefix: IpNet, length: u8) -> Option<IpNet> {
    IpNet::new(prefix.addr(), length).ok().map(|net| net.trunc())
}
