//! The ends of flows that exist. Time series of others end ([`super::Hubble::end`]).

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use palisade_flowlog::flow::Endpoint;

use super::context::value_of;
use crate::{identifier::Identifier, table::shortened};

/// Largest number of addresses of removed ends that are remembered.
const MAX_FORMER_ADDRESSES: usize = 65_536;
/// Beginning of the labels of identities that always exist.
const RESERVED: &str = "reserved:";

/// The ends of flows that exist: endpoints, peers and identities. For each identifier that a label shows, the values
/// that it has for them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ends {
    values: HashMap<Identifier, HashSet<Box<str>>>,
    /// Addresses of ends that existed. Other addresses are those of hosts in the world, of which the daemon does not know
    /// whether they exist.
    former: HashSet<Box<str>>,
}

impl Ends {
    pub(super) fn new(identifiers: impl Iterator<Item = Identifier>) -> Self {
        Self {
            values: identifiers
                .map(|identifier| (identifier, HashSet::new()))
                .collect(),
            former: HashSet::new(),
        }
    }

    /// Adds an end. What is empty is not shown.
    pub fn add(&mut self, end: &Endpoint) {
        for (identifier, values) in &mut self.values {
            let value = value_of(end, *identifier);
            let value = shortened(&value);
            if !values.contains(value) {
                values.insert(value.into());
            }
        }
    }

    /// Adds an address of an end.
    pub fn add_address(&mut self, address: IpAddr) {
        if let Some(addresses) = self.values.get_mut(&Identifier::Ip) {
            addresses.insert(address.to_string().into());
        }
    }

    /// Takes over the addresses of ends that existed `before` these ends, and that none of these has.
    pub fn follow(&mut self, before: Self) {
        let Some(now) = self.values.get(&Identifier::Ip) else {
            return;
        };
        let mut former = before.former;
        for (identifier, values) in before.values {
            if identifier == Identifier::Ip {
                former.extend(values);
            }
        }
        former.retain(|address| !now.contains(address));
        self.former = former.into_iter().take(MAX_FORMER_ADDRESSES).collect();
    }

    /// Returns whether an end exists of which the identifier shows this value, as far as that is known.
    pub(super) fn has(&self, identifier: Identifier, value: &str) -> bool {
        match identifier {
            Identifier::Ip => !self.former.contains(value),
            identifier if !identifier.can_end() => true,
            _ if value.is_empty() || value.starts_with(RESERVED) => true,
            identifier => {
                let values = self.values.get(&identifier);
                values.is_none_or(|values| values.contains(value))
            }
        }
    }
}
