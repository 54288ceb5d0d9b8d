//! Sites: the interfaces and hooks at which the packet path would have processed a packet of a capture.
//!
//! If the capture names an interface of the configuration, that interface is the site. Otherwise the addresses decide:
//! a packet is egress of the endpoint that has its source address, and ingress of the endpoint that has its destination
//! address. The node is an endpoint too.

use std::collections::HashMap;

use palisade_abi::ETHER_TYPES;
use palisade_packet::{Packet, flags};

use crate::{
    capture::PathHint,
    path::{HookPoint, Site, is_group},
    tables::Tables,
};

/// Role of a configured interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// A NIC of the node.
    Nic,
    /// The node's side of the veth pair of the endpoint with this number.
    Workload(u16),
}

/// A configured interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Interface {
    /// Name of the interface.
    pub name: String,
    /// Number of the interface in events; not 0.
    pub index: u32,
    /// Role of the interface.
    pub role: Role,
    /// EtherTypes of frames that pass without a verdict; 0 for unused slots.
    pub ether_types: [u16; ETHER_TYPES],
    /// Whether failsafe ports of the node do not pass at the interface.
    pub no_failsafe: bool,
}

/// The configured interfaces.
#[derive(Debug)]
pub(crate) struct Sites {
    interfaces: HashMap<String, Interface>,
    /// Interface of each workload.
    of_endpoint: HashMap<u16, u32>,
    /// Index of the NIC, if there is exactly one.
    nic: u32,
    /// Whether failsafe ports pass at no NIC.
    no_failsafe: bool,
    host: u16,
}

impl Sites {
    pub(crate) fn new(interfaces: Vec<Interface>, host: u16) -> Self {
        let mut of_endpoint = HashMap::new();
        let mut nics = Vec::new();
        let mut no_failsafe = true;
        for interface in &interfaces {
            match interface.role {
                Role::Nic => {
                    nics.push(interface.index);
                    no_failsafe &= interface.no_failsafe;
                }
                Role::Workload(endpoint) => drop(of_endpoint.insert(endpoint, interface.index)),
            }
        }
        Self {
            interfaces: interfaces
                .into_iter()
                .map(|interface| (interface.name.clone(), interface))
                .collect(),
            of_endpoint,
            nic: match nics.as_slice() {
                [one] => *one,
                _ => 0,
            },
            no_failsafe,
            host,
        }
    }

    /// Returns a configured interface.
    pub(crate) fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.get(name)
    }

    /// Returns the site of a packet at a configured interface.
    pub(crate) fn at(&self, interface: &Interface, packet: &Packet, hint: PathHint, tables: &Tables) -> Site {
        let is_ip = !packet.is(flags::NOT_IP);
        let from = if is_ip {
            tables.exact(packet.source).endpoint
        } else {
            0
        };
        let (inbound, outbound, endpoint) = match interface.role {
            Role::Nic => (HookPoint::NicIn, HookPoint::NicOut, self.host),
            Role::Workload(endpoint) => (HookPoint::FromWorkload, HookPoint::ToWorkload, endpoint),
        };
        let point = match (hint, interface.role) {
            (PathHint::Inbound, _) => inbound,
            (PathHint::Outbound, _) => outbound,
            // A packet with an address of this node leaves by a NIC.
            (PathHint::Unknown, Role::Nic) if from != 0 => outbound,
            (PathHint::Unknown, Role::Nic) => inbound,
            // A packet without an address of an endpoint as its source comes from elsewhere.
            (PathHint::Unknown, Role::Workload(endpoint)) if from == endpoint || !is_ip => inbound,
            (PathHint::Unknown, Role::Workload(_)) => outbound,
        };
        Site {
            ifindex: interface.index,
            endpoint,
            point,
            is_local: point.is_egress_hook() && from != 0 && from == self.host,
            ether_types: interface.ether_types,
            no_failsafe: interface.no_failsafe,
        }
    }

    /// Returns the sites of a packet by its addresses: first that of its source, then that of its destination.
    pub(crate) fn deduce(&self, packet: &Packet, tables: &Tables) -> [Option<Site>; 2] {
        if packet.is(flags::NOT_IP) {
            return [None, None];
        }
        let host = self.host;
        let from = tables.exact(packet.source).endpoint;
        let to = tables.exact(packet.destination).endpoint;
        let is_workload = |endpoint: u16| endpoint != 0 && endpoint != host;
        let workload = |endpoint: u16, point| Site {
            ifindex: self.of_endpoint.get(&endpoint).copied().unwrap_or_default(),
            endpoint,
            point,
            is_local: point == HookPoint::ToWorkload && from == host,
            ether_types: [0; ETHER_TYPES],
            no_failsafe: true,
        };
        let nic = |point| Site {
            ifindex: self.nic,
            endpoint: host,
            point,
            is_local: point == HookPoint::NicOut,
            ether_types: [0; ETHER_TYPES],
            no_failsafe: self.no_failsafe,
        };
        let source = if is_workload(from) {
            Some(workload(from, HookPoint::FromWorkload))
        } else if from != 0 && !is_workload(to) {
            Some(nic(HookPoint::NicOut))
        } else {
            None
        };
        let is_for_group = || is_group(packet.destination, packet.is(flags::IPV6));
        let destination = if is_workload(to) && to != from {
            Some(workload(to, HookPoint::ToWorkload))
        } else if from == 0 && ((to != 0 && to == host) || (to == 0 && is_for_group())) {
            Some(nic(HookPoint::NicIn))
        } else {
            None
        };
        [source, destination]
    }
}
