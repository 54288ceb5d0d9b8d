//! The interfaces that a connection of the node uses, as far as the kernel says so. Depends on [`super::network`].

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
};

use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::AddressMessage,
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage},
};

use super::network::{dump, own_address, request};

/// Returns the indices of the interfaces of a connection: that of the route to the peer, and those that have the local
/// address. `None` if they are not known: there is no route, or it leads into a tunnel, whose packets use another
/// interface.
pub(super) fn carriers(local: IpAddr, peer: IpAddr) -> Option<BTreeSet<u32>> {
    let mut all = BTreeSet::from([route(local, peer).ok()??]);
    dump(
        RouteNetlinkMessage::GetAddress(AddressMessage::default()),
        |message| {
            if let RouteNetlinkMessage::NewAddress(address) = message
                && own_address(&address.attributes) == Some(local)
            {
                all.insert(address.header.index);
            }
        },
    )
    .ok()?;
    let kinds = kinds().ok()?;
    let are_known = all.iter().all(|index| kinds.get(index).is_some_and(is_no_tunnel));
    are_known.then_some(all)
}

/// Returns the index of the interface by which packets to a peer leave.
fn route(local: IpAddr, peer: IpAddr) -> io::Result<Option<u32>> {
    let mut lookup = RouteMessage::default();
    let (family, length) = match peer {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    lookup.header.address_family = family;
    lookup.header.destination_prefix_length = length;
    lookup.header.source_prefix_length = length;
    let address = |address| match address {
        IpAddr::V4(v4) => RouteAddress::Inet(v4),
        IpAddr::V6(v6) => RouteAddress::Inet6(v6),
    };
    lookup.attributes = vec![
        RouteAttribute::Destination(address(peer)),
        RouteAttribute::Source(address(local)),
    ];
    let RouteNetlinkMessage::NewRoute(found) = request(RouteNetlinkMessage::GetRoute(lookup))? else {
        return Ok(None);
    };
    Ok(found.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    }))
}

/// Returns the kind of each interface; `None` for one of a device driver.
fn kinds() -> io::Result<BTreeMap<u32, Option<InfoKind>>> {
    let mut kinds = BTreeMap::new();
    dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
        if let RouteNetlinkMessage::NewLink(link) = message {
            let infos = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::LinkInfo(infos) => Some(infos),
                _ => None,
            });
            let kind = infos.into_iter().flatten().find_map(|info| match info {
                LinkInfo::Kind(kind) => Some(kind.clone()),
                _ => None,
            });
            kinds.insert(link.header.index, kind);
        }
    })?;
    Ok(kinds)
}

/// Returns whether packets of an interface of this kind use no other interface than those on which
/// [`super::network::Network::above`] knows it to be stacked.
fn is_no_tunnel(kind: &Option<InfoKind>) -> bool {
    match kind {
        None => true,
        Some(kind) => matches!(
            kind,
            InfoKind::Veth
                | InfoKind::Bridge
                | InfoKind::Bond
                | InfoKind::Vlan
                | InfoKind::MacVlan
                | InfoKind::MacVtap
                | InfoKind::IpVlan
                | InfoKind::Dummy
        ),
    }
}
