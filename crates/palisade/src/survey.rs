//! Interfaces, addresses and default routes of this network namespace, read once, for `palisade doctor` and
//! `palisade init`. Reads only.

use std::{collections::BTreeMap, io, net::IpAddr};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    route::{RouteAttribute, RouteMessage, RouteType},
};

use crate::daemon::dump_routing;

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Kind of a virtual interface, in the words of `ip link`; empty for a NIC.
    pub kind: String,
    /// Whether it is set up.
    pub up: bool,
    /// Whether it is a loopback interface.
    pub loopback: bool,
    /// MTU, bytes.
    pub mtu: u32,
    /// Index of the bridge, bond or VRF of which it is a port.
    pub master: Option<u32>,
    /// Index of the interface below a VLAN; of a veth: of the other end.
    pub lower: Option<u32>,
    /// Whether `lower` is in another network namespace.
    pub lower_elsewhere: bool,
    /// Addresses with the lengths of their prefixes.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Whether a default route leads through it.
    pub default_route: bool,
}

impl Link {
    /// Returns whether it has an address that is not link-local.
    pub(crate) fn has_addresses(&self) -> bool {
        self.addresses.iter().any(|(address, _)| !is_link_local(*address))
    }
}

/// Returns whether an address is link-local.
pub(crate) fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

/// Returns the interfaces by their index.
///
/// # Errors
/// A netlink request fails.
pub(crate) fn links() -> io::Result<BTreeMap<u32, Link>> {
    let mut links = BTreeMap::new();
    dump_routing(RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
        if let RouteNetlinkMessage::NewLink(message) = message {
            links.insert(message.header.index, link(message));
        }
    })?;
    dump_routing(
        RouteNetlinkMessage::GetAddress(AddressMessage::default()),
        |message| {
            if let RouteNetlinkMessage::NewAddress(message) = message
                && let Some(link) = links.get_mut(&message.header.index)
                && let Some(address) = own_address(&message.attributes)
            {
                link.addresses.push((address, message.header.prefix_len));
            }
        },
    )?;
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        /// `RT_TABLE_MAIN`.
        const MAIN: u8 = 254;
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        request.header.table = MAIN;
        let outcome = dump_routing(RouteNetlinkMessage::GetRoute(request), |message| {
            let RouteNetlinkMessage::NewRoute(route) = message else {
                return;
            };
            if route.header.destination_prefix_length != 0 || route.header.kind != RouteType::Unicast {
                return;
            }
            for attribute in &route.attributes {
                let indexes = match attribute {
                    RouteAttribute::Oif(index) => vec![*index],
                    RouteAttribute::MultiPath(hops) => hops.iter().map(|hop| hop.interface_index).collect(),
                    _ => continue,
                };
                for index in indexes {
                    if let Some(link) = links.get_mut(&index) {
                        link.default_route = true;
                    }
                }
            }
        });
        // A disabled address family has no table (ENOENT).
        if let Err(error) = outcome
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
    }
    Ok(links)
}

fn link(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        ..Link::default()
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Controller(master) if master != 0 => link.master = Some(master),
            LinkAttribute::Link(lower) => link.lower = Some(lower),
            LinkAttribute::LinkNetNsId(_) => link.lower_elsewhere = true,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Kind(kind) = info {
                        link.kind = kind.to_string();
                    }
                }
            }
            _ => {}
        }
    }
    link
}

fn own_address(attributes: &[AddressAttribute]) -> Option<IpAddr> {
    let local = attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    local.or(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_found_with_its_address() {
        let links = links().unwrap();
        let lo = links.values().find(|link| link.loopback).unwrap();
        assert_eq!(lo.name, "lo");
        assert!(!lo.default_route && lo.kind.is_empty());
    }
}
