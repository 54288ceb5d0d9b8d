//! Reads the interfaces and addresses of this network namespace and watches them for changes (rtnetlink).

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    thread,
    time::Duration,
};

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{InfoKind, InfoPortKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, Prop},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteType},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use tracing::warn;

/// Multicast groups of rtnetlink (linux/rtnetlink.h): links, IPv4 addresses, IPv6 addresses.
const GROUPS: u32 = 0x1 | 0x10 | 0x100;
/// Wait after a message, because a veth pair with addresses causes a dozen messages.
const DEBOUNCE: Duration = Duration::from_millis(5);

/// Interfaces and addresses of the network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Network {
    /// Index of every interface, by name.
    pub links: BTreeMap<String, u32>,
    /// Index of every interface, by alternative name (`ip link property add altname`).
    pub alternatives: BTreeMap<String, u32>,
    /// Index of the bridge, VRF or bond, by the index of its port.
    pub masters: BTreeMap<u32, u32>,
    /// Indices of ports of a bridge.
    pub bridge_ports: BTreeSet<u32>,
    /// Index of the lower interface, by the index of a VLAN, macvlan or ipvlan.
    pub lowers: BTreeMap<u32, u32>,
    /// Indices of interfaces that are down.
    pub down: BTreeSet<u32>,
    /// MTU of every interface by its index, bytes.
    pub mtus: BTreeMap<u32, u32>,
    /// Addresses of this node, without loopback addresses.
    pub addresses: BTreeSet<IpAddr>,
}

/// Reads interfaces and addresses.
pub(super) fn read() -> io::Result<Network> {
    let mut network = Network::default();
    dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
        if let RouteNetlinkMessage::NewLink(link) = message {
            network.add_link(link);
        }
    })?;
    dump(
        RouteNetlinkMessage::GetAddress(AddressMessage::default()),
        |message| {
            if let RouteNetlinkMessage::NewAddress(address) = message {
                network.addresses.extend(own_address(&address.attributes));
            }
        },
    )?;
    Ok(network)
}

impl Network {
    /// Returns the index of the interface with this name or alternative name.
    pub(super) fn ifindex(&self, name: &str) -> Option<u32> {
        self.links
            .get(name)
            .or_else(|| self.alternatives.get(name))
            .copied()
    }

    /// Returns the interfaces that are stacked on `ports`: bridges and VRFs of these ports, VLANs on them, and so on.
    /// Packets that enter by one of the ports pass through these interfaces to the node's stack.
    pub(super) fn above(&self, ports: &BTreeSet<u32>) -> BTreeSet<u32> {
        let mut all = ports.clone();
        loop {
            let masters = all.iter().filter_map(|port| self.masters.get(port));
            let uppers = self.lowers.iter().filter(|(_, lower)| all.contains(lower));
            let more: Vec<u32> = masters.chain(uppers.map(|(upper, _)| upper)).copied().collect();
            let before = all.len();
            all.extend(more);
            if all.len() == before {
                return all.difference(ports).copied().collect();
            }
        }
    }

    fn add_link(&mut self, link: LinkMessage) {
        let index = link.header.index;
        if !link.header.flags.contains(LinkFlags::Up) {
            self.down.insert(index);
        }
        let (mut lower, mut is_elsewhere, mut stands_on_another) = (None, false, false);
        for attribute in link.attributes {
            match attribute {
                LinkAttribute::IfName(name) => {
                    self.links.insert(name, index);
                }
                LinkAttribute::Mtu(mtu) => {
                    self.mtus.insert(index, mtu);
                }
                LinkAttribute::PropList(properties) => {
                    for property in properties {
                        if let Prop::AltIfName(name) = property {
                            self.alternatives.insert(name, index);
                        }
                    }
                }
                LinkAttribute::Controller(master) => {
                    self.masters.insert(index, master);
                }
                LinkAttribute::Link(link) => lower = Some(link),
                LinkAttribute::LinkNetNsId(_) => is_elsewhere = true,
                LinkAttribute::LinkInfo(infos) => {
                    if infos.contains(&LinkInfo::PortKind(InfoPortKind::Bridge)) {
                        self.bridge_ports.insert(index);
                    }
                    stands_on_another = infos.iter().any(|info| {
                        matches!(
                            info,
                            LinkInfo::Kind(
                                InfoKind::Vlan | InfoKind::MacVlan | InfoKind::MacVtap | InfoKind::IpVlan
                            )
                        )
                    });
                }
                _ => {}
            }
        }
        // A veth has the index of its peer in `IFLA_LINK`, so this attribute is used only for kinds that have a lower
        // interface.
        if let Some(lower) = lower
            && stands_on_another
            && !is_elsewhere
        {
            self.lowers.insert(index, lower);
        }
    }
}

/// Returns the prefixes of the local routing table (`RT_TABLE_LOCAL`): local, broadcast and anycast routes.
pub(super) fn local_routes() -> BTreeSet<IpNet> {
    /// `RT_TABLE_LOCAL`.
    const LOCAL: u8 = 255;
    let mut routes = BTreeSet::new();
    for (family, any) in [
        (AddressFamily::Inet, IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)),
        (AddressFamily::Inet6, IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)),
    ] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        request.header.table = LOCAL;
        let outcome = dump(RouteNetlinkMessage::GetRoute(request), |message| {
            let RouteNetlinkMessage::NewRoute(route) = message else {
                return;
            };
            let is_local = matches!(
                route.header.kind,
                RouteType::Local | RouteType::Broadcast | RouteType::Anycast
            );
            if route.header.table != LOCAL || !is_local {
                return;
            }
            let to = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
                RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
                _ => None,
            });
            let prefix = IpNet::new(to.unwrap_or(any), route.header.destination_prefix_length);
            routes.extend(prefix.ok());
        });
        // A disabled address family has no local table (ENOENT).
        if let Err(error) = outcome
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(%error, "the local routes cannot be read");
        }
    }
    routes
}

/// Returns the node's own address from the attributes of an address message; `None` for a loopback address. On a
/// point-to-point interface `IFA_LOCAL` is the node's address and `IFA_ADDRESS` that of the remote end. On other
/// interfaces both are equal, or `IFA_LOCAL` is absent (IPv6).
pub(super) fn own_address(attributes: &[AddressAttribute]) -> Option<IpAddr> {
    let local = attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    local.or(address).filter(|address| !address.is_loopback())
}

/// Passes the messages of a dump to `each`, again and again while a change interrupts the dump (`NLM_F_DUMP_INTR`). The
/// flag is true for the first message of a dump. An error of `each` ends the dump. With `is_strict` the kernel uses the
/// attributes of the request.
pub(super) fn read_all(
    request: impl Fn() -> RouteNetlinkMessage,
    is_strict: bool,
    mut each: impl FnMut(RouteNetlinkMessage, bool) -> io::Result<()>,
) -> io::Result<()> {
    /// Workloads that change without end must not keep the caller here.
    const MAX_ATTEMPTS: usize = 20;
    for _ in 0..MAX_ATTEMPTS {
        let mut is_first = true;
        match dump_with(request(), is_strict, |message| {
            each(message, std::mem::take(&mut is_first))
        }) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => thread::sleep(DEBOUNCE),
            other => return other,
        }
    }
    Err(io::Error::other("the interfaces change without end"))
}

/// Sends a dump request of rtnetlink and passes each message of the answer to `each`.
///
/// # Errors
/// [`io::ErrorKind::Interrupted`] if a change has interrupted the dump; other errors of the socket and the kernel.
pub(crate) fn dump(
    request: RouteNetlinkMessage,
    mut each: impl FnMut(RouteNetlinkMessage),
) -> io::Result<()> {
    // With strict checking (`NETLINK_GET_STRICT_CHK`) the kernel dumps only the requested table. A router can have a
    // million routes in other tables.
    let is_strict = matches!(request, RouteNetlinkMessage::GetRoute(_));
    dump_with(request, is_strict, |message| {
        each(message);
        Ok(())
    })
}

fn dump_with(
    request: RouteNetlinkMessage,
    is_strict: bool,
    mut each: impl FnMut(RouteNetlinkMessage) -> io::Result<()>,
) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    if is_strict {
        socket.set_netlink_get_strict_chk(true)?;
    }
    let mut packet = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(request));
    packet.header.flags = NLM_F_DUMP | NLM_F_REQUEST;
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut interrupted = false;
    loop {
        let (received, _) = socket.recv_from_full()?;
        let mut rest = received.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
            // Messages are aligned to four bytes; the last one can lack its padding.
            let length = (message.header.length as usize)
                .next_multiple_of(4)
                .clamp(4, rest.len());
            rest = &rest[length..];
            match message.payload {
                NetlinkPayload::Done(_) if interrupted => return Err(io::ErrorKind::Interrupted.into()),
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(message) => each(message)?,
                _ => {}
            }
        }
    }
}

/// Sends a request of rtnetlink that has one answer.
///
/// # Errors
/// Those of the socket and the kernel, for example if there is no route.
pub(super) fn request(request: RouteNetlinkMessage) -> io::Result<RouteNetlinkMessage> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut packet = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(request));
    packet.header.flags = NLM_F_REQUEST;
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let (received, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&received)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
    match answer.payload {
        NetlinkPayload::InnerMessage(message) => Ok(message),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Reads interfaces and addresses, again and again while a change interrupts the dump (`NLM_F_DUMP_INTR`).
fn read_whole() -> io::Result<Network> {
    loop {
        match read() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => thread::sleep(DEBOUNCE),
            other => return other,
        }
    }
}

/// Returns the current interfaces and addresses, and starts a thread that passes every later state to `changed` until
/// `changed` returns false.
pub(super) fn watch(mut changed: impl FnMut(Network) -> bool + Send + 'static) -> io::Result<Network> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind(&SocketAddr::new(0, GROUPS))?;
    // The socket is bound before the first dump, so that no change is missed.
    let first = read_whole()?;
    let mut known = first.clone();
    thread::Builder::new().name("network".into()).spawn(move || {
        loop {
            // The content of a message is ignored: messages are lost when many arrive (ENOBUFS), but a dump is
            // complete.
            if let Err(error) = socket.recv_from_full()
                && error.raw_os_error() != Some(nix::errno::Errno::ENOBUFS as i32)
            {
                warn!(%error, "notifications of interface changes cannot be received");
                thread::sleep(Duration::from_secs(1));
            }
            thread::sleep(DEBOUNCE);
            if socket.set_non_blocking(true).is_ok() {
                while socket.recv_from_full().is_ok() {}
                let _ = socket.set_non_blocking(false);
            }
            match read_whole() {
                Ok(network) if network != known => {
                    known = network.clone();
                    if !changed(network) {
                        return;
                    }
                }
                Ok(_) => {}
                Err(error) => warn!(%error, "interfaces and addresses cannot be read"),
            }
        }
    })?;
    Ok(first)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn loopback_addresses_do_not_belong_to_the_node() {
        let network = read_whole().unwrap();
        let lo = network.links.get("lo");
        assert!(lo.is_some_and(|lo| network.mtus[lo] >= 1_280), "{network:?}");
        assert!(network.addresses.iter().all(|address| !address.is_loopback()));
    }

    #[test]
    fn upper_interfaces_are_found_through_bridges_and_vlans() {
        let network = Network {
            // Port 5 of bridge 10, VLAN 11 on the bridge, in VRF 12; VLAN 20 on the NIC 2.
            masters: [(5, 10), (6, 10), (11, 12)].into(),
            lowers: [(11, 10), (20, 2)].into(),
            ..Network::default()
        };
        assert_eq!(network.above(&[5].into()), [10, 11, 12].into());
        assert_eq!(network.above(&[7].into()), [].into());
    }

    #[test]
    fn the_local_address_of_a_point_to_point_link_is_the_nodes() {
        let v4 = |n| IpAddr::from(Ipv4Addr::new(192, 0, 2, n));
        let both = [AddressAttribute::Address(v4(2)), AddressAttribute::Local(v4(1))];
        assert_eq!(own_address(&both), Some(v4(1)));
        let v6 = IpAddr::from("2001:db8::1".parse::<Ipv6Addr>().unwrap());
        assert_eq!(own_address(&[AddressAttribute::Address(v6)]), Some(v6));
        assert_eq!(
            own_address(&[AddressAttribute::Local(Ipv4Addr::LOCALHOST.into())]),
            None
        );
    }
}
