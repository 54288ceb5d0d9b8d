//! Interfaces, addresses and default routes of this network namespace, read once, for `palisade doctor` and
//! `palisade init`. Reads only.

use std::{collections::BTreeMap, io, net::IpAddr};

use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType},
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

/// A route of the main table that is neither a default route nor that of an interface's own network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Route {
    /// Destination.
    pub network: IpNet,
    /// Next hop; `None` if the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// Index of the interface.
    pub interface: u32,
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
    unicast_routes(|route| {
        if route.header.destination_prefix_length != 0 {
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
    })?;
    Ok(links)
}

/// Returns the routes that were added to those that the kernel makes for the networks of the interfaces, without default
/// routes.
///
/// # Errors
/// A netlink request fails.
pub(crate) fn routes() -> io::Result<Vec<Route>> {
    let mut routes = Vec::new();
    unicast_routes(|message| {
        if message.header.destination_prefix_length != 0 && message.header.protocol != RouteProtocol::Kernel {
            routes.extend(route(&message));
        }
    })?;
    routes.sort();
    routes.dedup();
    Ok(routes)
}

/// Passes the unicast routes of the main table to `each`.
fn unicast_routes(mut each: impl FnMut(RouteMessage)) -> io::Result<()> {
    /// `RT_TABLE_MAIN`.
    const MAIN: u8 = 254;
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        request.header.table = MAIN;
        let outcome = dump_routing(RouteNetlinkMessage::GetRoute(request), |message| {
            if let RouteNetlinkMessage::NewRoute(route) = message
                && route.header.kind == RouteType::Unicast
                && route.header.table == MAIN
            {
                each(route);
            }
        });
        // A disabled address family has no table (ENOENT).
        if let Err(error) = outcome
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
    }
    Ok(())
}

fn route(message: &RouteMessage) -> Option<Route> {
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    };
    let (mut destination, mut gateway, mut interface) = (None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => destination = address(to),
            RouteAttribute::Gateway(hop) => gateway = address(hop),
            RouteAttribute::Oif(index) => interface = *index,
            // The first of several next hops stands for all.
            RouteAttribute::MultiPath(hops) => {
                interface = hops.first().map_or(0, |hop| hop.interface_index);
            }
            _ => {}
        }
    }
    Some(Route {
        network: IpNet::new(destination?, message.header.destination_prefix_length).ok()?,
        gateway,
        interface,
    })
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
