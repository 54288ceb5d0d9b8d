//! From a recorded flow to a question of `palisade_policy::trace`, and an inventory with the ends of recorded flows.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use palisade_abi::Direction;
use palisade_model::{
    inventory::{Endpoint, Inventory, NamedPorts, Options, Peer},
    labels::Labels,
    request::HttpOptions,
};
use palisade_policy::trace::Question;

use crate::{
    labels::{is_world, namespace},
    record::{Recorded, RecordedEnd},
};

/// Returns the question about a recorded flow, for the inventory that recorded its ends: ends are addresses, or
/// endpoints and peers by their names.
///
/// # Errors
/// Why the flow cannot be explained.
pub fn question(recorded: &Recorded, inventory: &Inventory) -> Result<Question, String> {
    if let Some(unusable) = recorded.unusable {
        return Err(format!("policies do not decide about {unusable}"));
    }
    let source = end_text(&recorded.source, inventory)?;
    let destination = end_text(&recorded.destination, inventory)?;
    let is_address = destination.parse::<IpAddr>().is_ok();
    let is_endpoint = inventory.endpoints.iter().any(|endpoint| {
        endpoint.name == source
            || format!("{}/{}", endpoint.namespace, endpoint.name) == source
            || source
                .parse()
                .is_ok_and(|address| endpoint.addresses.contains(&address))
    });
    let mut names = recorded
        .destination_names
        .iter()
        .filter(|_| is_address && is_endpoint)
        .cloned();
    Ok(Question {
        to_fqdn: names.next(),
        more_names: names.collect(),
        source,
        destination,
        request: recorded.request.clone(),
        http: HttpOptions::default(),
        readers: None,
        protocol: recorded.protocol,
        port: recorded.port,
    })
}

fn end_text(end: &RecordedEnd, inventory: &Inventory) -> Result<String, String> {
    if let Some(address) = end.address
        && inventory
            .endpoints
            .iter()
            .any(|known| known.addresses.contains(&address))
    {
        return Ok(address.to_string());
    }
    let by_name = inventory
        .endpoints
        .iter()
        .find(|known| !end.name.is_empty() && known.name == end.name && (known.namespace == end.namespace));
    if let Some(endpoint) = by_name {
        return Ok(match endpoint.namespace.as_str() {
            "" => endpoint.name.clone(),
            namespace => format!("{namespace}/{}", endpoint.name),
        });
    }
    let by_labels = || {
        inventory
            .peers
            .iter()
            .find(|peer| !is_world(&end.labels) && peer.prefixes.is_empty() && peer.labels == end.labels)
            .map(|peer| peer.name.clone())
    };
    by_labels()
        .or_else(|| Some(end.address?.to_string()))
        .ok_or_else(|| "the record has no address".to_owned())
}

/// Largest number of endpoints or peers of a recorded inventory that have different labels.
pub const MAX_ENDS: usize = 16_384;

/// An inventory that is made of the ends of recorded flows, or completed by them.
#[derive(Clone, Debug, Default)]
pub struct RecordedInventory {
    inventory: Inventory,
    /// Known endpoints by namespace and name, and by address.
    by_name: HashMap<(String, String), u16>,
    by_address: HashMap<IpAddr, u16>,
    /// Endpoints and peers that were added, by their labels.
    endpoints: HashMap<Labels, u16>,
    peers: HashSet<Labels>,
    last: u16,
}

impl RecordedInventory {
    /// Returns an inventory that begins with `known`, its options included.
    #[must_use]
    pub fn new(known: Inventory) -> Self {
        let endpoints = &known.endpoints;
        Self {
            last: endpoints.iter().map(|endpoint| endpoint.id).max().unwrap_or(0),
            by_name: endpoints
                .iter()
                .map(|known| ((known.namespace.clone(), known.name.clone()), known.id))
                .collect(),
            by_address: endpoints
                .iter()
                .flat_map(|known| known.addresses.iter().map(|address| (*address, known.id)))
                .collect(),
            endpoints: HashMap::new(),
            peers: HashSet::new(),
            inventory: known,
        }
    }

    /// Returns the inventory.
    #[must_use]
    pub const fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// Returns whether no more ends should be added.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.endpoints.len() >= MAX_ENDS || self.peers.len() >= MAX_ENDS
    }

    /// Returns the number of the endpoint whose policy decided, after adding it if the inventory has none of its name,
    /// address or labels; 0 if no number is left.
    pub fn endpoint(&mut self, end: &RecordedEnd) -> u16 {
        let name = (end.namespace.clone(), end.name.clone());
        let known = self
            .by_name
            .get(&name)
            .or_else(|| self.by_address.get(&end.address?))
            .or_else(|| self.endpoints.get(&end.labels));
        if let Some(id) = known {
            return *id;
        }
        let Some(id) = self.last.checked_add(1) else {
            return 0;
        };
        self.last = id;
        self.inventory.endpoints.push(Endpoint {
            id,
            // Flows of several instances have the same labels: the name of one of them would mislead.
            name: format!("endpoint-{id}"),
            namespace: namespace(&end.labels).unwrap_or_default().to_owned(),
            labels: end.labels.clone(),
            named_ports: NamedPorts::new(),
            addresses: Vec::new(),
            audit: false,
        });
        self.endpoints.insert(end.labels.clone(), id);
        id
    }

    /// Adds a peer, if its labels are not those of addresses of the world.
    pub fn peer(&mut self, end: &RecordedEnd) {
        if is_world(&end.labels) || !self.peers.insert(end.labels.clone()) {
            return;
        }
        self.inventory.peers.push(Peer {
            name: format!("recorded-peer-{}", self.peers.len()),
            labels: end.labels.clone(),
            named_ports: NamedPorts::new(),
            prefixes: Vec::new(),
        });
    }
}

/// Returns the inventory of one recorded flow, with the end whose policy decided as its endpoint.
#[must_use]
pub fn inventory_of(recorded: &Recorded, options: Options) -> Inventory {
    let mut made = RecordedInventory::new(Inventory {
        options,
        ..Inventory::default()
    });
    for (direction, end) in [
        (Direction::Egress, &recorded.source),
        (Direction::Ingress, &recorded.destination),
    ] {
        if recorded.direction == Some(direction) {
            let id = made.endpoint(end);
            if let (Some(address), Some(endpoint)) = (
                end.address,
                made.inventory.endpoints.iter_mut().find(|known| known.id == id),
            ) {
                endpoint.addresses.push(address);
                endpoint.name.clone_from(&end.name);
            }
        } else {
            made.peer(end);
        }
    }
    made.inventory
}
