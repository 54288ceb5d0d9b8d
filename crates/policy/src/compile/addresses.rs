//! The identities that exist, and the addresses that have them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, Ipv6Addr},
    sync::Arc,
};

use ipnet::{IpNet, Ipv6Net};
use palisade_abi::{Addr, Identity, IpcacheEntry, PrefixKey, identity};
use palisade_model::{
    diagnostic::Diagnostic,
    identity::{cidr_label, prefix_labels},
    labels::Labels,
    rule::Location,
};

use super::{
    changes::Progress, compiler::Compiler, named_ports::NamedPortOwners, named_prefixes::is_world,
    select::ResolvedSelector,
};

impl Compiler {
    /// Recomputes identities, addresses and the members of selectors after the inventory or the groups of prefixes
    /// changed.
    pub(super) fn refresh_identities(&mut self, progress: &mut Progress) -> Result<(), Vec<Diagnostic>> {
        let mut wanted: BTreeMap<Identity, Labels> = BTreeMap::new();
        let mut addresses: HashMap<Addr, IpcacheEntry> = HashMap::new();
        let mut prefixes: HashMap<PrefixKey, IpcacheEntry> = HashMap::new();
        let options = self.inventory.options;

        // The label set of the node has the reserved identity HOST, even with further labels. If the inventory has no
        // node, the first peer with the label `reserved:host` stands for it.
        let node_labels = self
            .inventory
            .endpoints
            .iter()
            .find(|endpoint| endpoint.is_node())
            .map(|endpoint| &endpoint.labels)
            .or_else(|| {
                let peers = self.inventory.peers.iter().map(|peer| &peer.labels);
                peers.into_iter().find(|labels| labels.has_reserved("host"))
            })
            .cloned();
        let in_use: HashSet<Identity> = self.snapshot.identities.keys().copied().collect();
        let identities = &mut self.identities;
        let mut number = |labels: &Labels| -> Result<Identity, Vec<Diagnostic>> {
            if node_labels.as_ref() == Some(labels) {
                return Ok(identity::HOST);
            }
            let number = identities
                .number(labels, &|number| in_use.contains(&number))
                .map_err(|error| vec![Diagnostic::error(Location::default(), error.to_string())])?;
            Ok(number)
        };
        let mut put = |prefix: IpNet, entry: IpcacheEntry| match full_length(prefix) {
            Some(address) => {
                addresses.insert(address, entry);
            }
            None => {
                prefixes.insert(prefix_key(prefix), entry);
            }
        };

        let mut named_ports = NamedPortOwners::default();
        let families: &[bool] = if options.dual_stack {
            &[false, true]
        } else {
            &[false]
        };
        for v6 in families {
            let labels = options.world_labels(*v6);
            wanted.insert(number(&labels)?, labels);
        }
        if node_labels.is_none() {
            wanted.insert(identity::HOST, Labels::reserved("host"));
        }

        // Later entries replace earlier ones: first the prefixes of policies, then peers, then endpoints of this node.
        let mapped = IpNet::V6(V4_MAPPED);
        for prefix in self.prefixes.keys().filter(|prefix| prefix.prefix_len() > 0) {
            // The trie stores IPv4 prefixes within ::ffff:0:0/96, so an IPv6 prefix in that range would match IPv4
            // addresses. Such a prefix gets no entry.
            if mapped.contains(prefix) {
                continue;
            }
            if prefix.contains(&mapped) {
                put(mapped, entry(number(&options.world_labels(false))?, 0));
            }
            if self.named.shadows(*prefix) {
                continue;
            }
            let labels = prefix_labels(*prefix, &options);
            let identity = number(&labels)?;
            wanted.insert(identity, labels);
            put(*prefix, entry(identity, 0));
        }
        for peer in &self.inventory.peers {
            if peer.prefixes.is_empty() || !is_world(&peer.labels) {
                let identity = number(&peer.labels)?;
                named_ports.add(&peer.named_ports, identity);
                wanted.insert(identity, peer.labels.clone());
                for prefix in &peer.prefixes {
                    put(prefix.trunc(), entry(identity, 0));
                }
            } else {
                // A peer in the world also has the label of its prefix, so that rules about prefixes select it.
                for prefix in &peer.prefixes {
                    let labels = Labels::new(peer.labels.iter().cloned().chain([cidr_label(*prefix)]));
                    let identity = number(&labels)?;
                    named_ports.add(&peer.named_ports, identity);
                    wanted.insert(identity, labels);
                    put(prefix.trunc(), entry(identity, 0));
                }
            }
        }
        let mut of_endpoint: HashMap<u16, Identity> = HashMap::new();
        for endpoint in &self.inventory.endpoints {
            let identity = number(&endpoint.labels)?;
            named_ports.add(&endpoint.named_ports, identity);
            wanted.insert(identity, endpoint.labels.clone());
            of_endpoint.insert(endpoint.id, identity);
            for address in &endpoint.addresses {
                put(IpNet::from(*address), entry(identity, endpoint.id));
            }
        }
        if let Some(labels) = &node_labels {
            // A peer whose only label is `reserved:host` has the identity HOST too. The labels of the node take
            // precedence.
            wanted.insert(identity::HOST, labels.clone());
        }
        let world = |v6| number(&options.world_labels(v6));
        let [world_ipv4, world_ipv6] = [false, true].map(world);
        self.snapshot.world_ipv4 = world_ipv4?;
        self.snapshot.world_ipv6 = world_ipv6?;
        for subject in &mut self.subjects {
            for (id, identity) in &mut subject.endpoints {
                *identity = of_endpoint.get(id).copied().unwrap_or(0);
            }
        }

        self.named_ports = named_ports;

        let gone: Vec<Identity> = self
            .identity_index
            .labels()
            .iter()
            .filter(|(number, labels)| wanted.get(number) != Some(labels))
            .map(|(number, _)| *number)
            .collect();
        let new: Vec<(Identity, Labels)> = wanted
            .iter()
            .filter(|(number, labels)| self.identity_index.labels().get(number) != Some(labels))
            .map(|(number, labels)| (*number, labels.clone()))
            .collect();
        self.change_identities(&gone, &new, progress);
        // Forces `finish_names` to add the learned identities to the snapshot again.
        self.names.changed = true;
        if *self.snapshot.identities != wanted {
            self.snapshot.identities = Arc::new(wanted);
        }
        if *self.snapshot.addresses != addresses {
            self.snapshot.addresses = Arc::new(addresses);
        }
        if *self.snapshot.prefixes != prefixes {
            self.snapshot.prefixes = Arc::new(prefixes);
        }
        Ok(())
    }

    /// Adds the identities of prefixes that policies have started to name, and removes the identities of prefixes that
    /// policies no longer name. Falls back to [`Self::refresh_identities`] if a prefix is also in the inventory, or
    /// contains the IPv4-mapped range.
    pub(super) fn refresh_prefixes(&mut self, progress: &mut Progress) -> Result<(), Vec<Diagnostic>> {
        let mapped = IpNet::V6(V4_MAPPED);
        let involved = |prefix: &IpNet| prefix.contains(&mapped) || self.named.all.contains(prefix);
        if progress.prefixes.keys().any(involved) {
            return self.refresh_identities(progress);
        }
        let mut gone: Vec<Identity> = Vec::new();
        let mut new: Vec<(Identity, Labels)> = Vec::new();
        let changes: Vec<(IpNet, i8)> = progress
            .prefixes
            .iter()
            .map(|(prefix, step)| (*prefix, *step))
            .filter(|(prefix, _)| {
                prefix.prefix_len() > 0 && !mapped.contains(prefix) && !self.named.shadows(*prefix)
            })
            .collect();
        for (prefix, step) in changes {
            let labels = prefix_labels(prefix, &self.inventory.options);
            let known = &self.snapshot.identities;
            let identity = self
                .identities
                .number(&labels, &|number| known.contains_key(&number))
                .map_err(|error| vec![Diagnostic::error(Location::default(), error.to_string())])?;
            let identities = Arc::make_mut(&mut self.snapshot.identities);
            if step > 0 {
                identities.insert(identity, labels.clone());
                new.push((identity, labels));
            } else {
                identities.remove(&identity);
                gone.push(identity);
            }
            match full_length(prefix) {
                Some(address) => {
                    let addresses = Arc::make_mut(&mut self.snapshot.addresses);
                    if step > 0 {
                        addresses.insert(address, entry(identity, 0));
                    } else {
                        addresses.remove(&address);
                    }
                }
                None => {
                    let prefixes = Arc::make_mut(&mut self.snapshot.prefixes);
                    if step > 0 {
                        prefixes.insert(prefix_key(prefix), entry(identity, 0));
                    } else {
                        prefixes.remove(&prefix_key(prefix));
                    }
                }
            }
        }
        self.change_identities(&gone, &new, progress);
        Ok(())
    }

    /// Updates the members of selectors for identities that are gone and identities that are new, and marks the
    /// affected subjects as dirty.
    pub(super) fn change_identities(
        &mut self,
        gone: &[Identity],
        new: &[(Identity, Labels)],
        progress: &mut Progress,
    ) {
        if gone.is_empty() && new.is_empty() {
            return;
        }
        self.names.changed = true;
        progress
            .moved
            .extend(gone.iter().chain(new.iter().map(|(number, _)| number)));
        for number in gone {
            self.identity_index.remove(*number);
        }
        for (number, labels) in new {
            self.identity_index.add(*number, labels.clone());
        }
        for (at, subject) in self.subjects.iter().enumerate() {
            if subject.requires_something() {
                progress.dirty.insert(at);
            }
        }
        let mut changed: HashSet<u32> = HashSet::new();
        for (number, slot) in self.peers.slots.iter_mut().enumerate() {
            let Some(slot) = slot else { continue };
            if matches!(*slot.resolved, ResolvedSelector::Any) {
                continue;
            }
            let left: Vec<Identity> = gone
                .iter()
                .copied()
                .filter(|id| slot.members.contains(id))
                .collect();
            let joined: Vec<Identity> = new
                .iter()
                .filter(|(_, labels)| slot.resolved.matches(labels))
                .map(|(id, _)| *id)
                .collect();
            if !left.is_empty() || !joined.is_empty() {
                let members = Arc::make_mut(&mut slot.members);
                for id in left {
                    members.remove(&id);
                }
                members.extend(joined);
                changed.insert(number as u32);
            }
        }
        if !changed.is_empty() {
            for (key, unit) in &self.specs {
                let rules = unit.sections.iter().flatten();
                let mut numbers = rules.flat_map(|rule| rule.peers.numbers());
                let touched = numbers.any(|number| changed.contains(number));
                if touched {
                    for at in &unit.subjects {
                        if let Some(applied) = self.subjects[*at].specs.get_mut(key) {
                            applied.regrouped = true;
                        }
                        progress.dirty.insert(*at);
                    }
                }
            }
        }
    }
}

/// Prefix of IPv4-mapped IPv6 addresses (RFC 4291, section 2.5.5.2).
const V4_MAPPED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96);

const fn entry(identity: Identity, endpoint: u16) -> IpcacheEntry {
    IpcacheEntry {
        identity,
        endpoint,
        flags: 0,
    }
}

fn full_length(prefix: IpNet) -> Option<Addr> {
    (prefix.prefix_len() == prefix.max_prefix_len()).then(|| Addr::from(prefix.addr()))
}

/// Returns a prefix as a key of the trie.
#[must_use]
pub fn prefix_key(prefix: IpNet) -> PrefixKey {
    let shift = match prefix {
        IpNet::V4(_) => 96,
        IpNet::V6(_) => 0,
    };
    let network: IpAddr = prefix.network();
    PrefixKey {
        length: shift + u32::from(prefix.prefix_len()),
        addr: Addr::from(network),
    }
}
