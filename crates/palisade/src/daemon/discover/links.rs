//! Interfaces of the node that lead into other network namespaces, and the addresses inside (rtnetlink).
//!
//! The kernel numbers the network namespaces that a namespace has interfaces to (nsid). A veth shows the number of the
//! namespace of its peer (`IFLA_LINK_NETNSID`), and addresses can be requested for a number (`IFA_TARGET_NETNSID`), so
//! no namespace is entered.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use netlink_packet_core::{DefaultNla, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{LinkAttribute, LinkMessage},
    nsid::{NsidAttribute, NsidMessage},
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use palisade_discover::Link;

use super::super::network;

/// `IFA_TARGET_NETNSID` (linux/if_addr.h).
const TARGET_NETNSID: u16 = 10;

/// Host side of a veth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Veth {
    pub interface: String,
    pub ifindex: u32,
    /// Index of the peer in its own network namespace.
    inner: u32,
    /// Number of the network namespace of the peer.
    pub nsid: i32,
}

impl Veth {
    /// Returns the interface with the addresses of its peer.
    pub(super) fn link(&self, inside: Option<&Inside>) -> Link {
        let addresses = inside.and_then(|inside| inside.get(&self.inner));
        Link {
            interface: self.interface.clone(),
            ifindex: self.ifindex,
            inner: self.inner,
            addresses: addresses.cloned().unwrap_or_default(),
        }
    }
}

/// Addresses by the index of their interface.
pub(super) type Inside = BTreeMap<u32, Vec<IpAddr>>;

/// Returns the interfaces of the node whose peer is in another network namespace, and the names of all interfaces of the
/// node by index.
pub(super) fn veths() -> io::Result<(Vec<Veth>, BTreeMap<u32, String>)> {
    let mut veths = Vec::new();
    let mut all = BTreeMap::new();
    network::read_all(
        || RouteNetlinkMessage::GetLink(LinkMessage::default()),
        false,
        |message, is_first| {
            if is_first {
                veths.clear();
                all.clear();
            }
            if let RouteNetlinkMessage::NewLink(link) = message {
                let name = link.attributes.iter().find_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name.clone()),
                    _ => None,
                });
                all.insert(link.header.index, name.unwrap_or_default());
                veths.extend(veth(&link));
            }
            Ok(())
        },
    )?;
    Ok((veths, all))
}

fn veth(link: &LinkMessage) -> Option<Veth> {
    let (mut interface, mut inner, mut nsid) = (None, None, None);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface = Some(name.clone()),
            LinkAttribute::Link(index) => inner = Some(*index),
            LinkAttribute::LinkNetNsId(number) => nsid = Some(*number),
            _ => {}
        }
    }
    Some(Veth {
        interface: interface?,
        ifindex: link.header.index,
        inner: inner?,
        nsid: nsid.filter(|number| *number >= 0)?,
    })
}

/// Returns the veths that lead into a network namespace, with the addresses inside.
pub(super) fn leading_to(veths: &[Veth], nsid: i32, inside: Option<&Inside>) -> Vec<Link> {
    let veths = veths.iter().filter(|veth| veth.nsid == nsid);
    veths.map(|veth| veth.link(inside)).collect()
}

/// Largest number of addresses of one family that are read in a network namespace. Root in a workload can add any number,
/// and every read, by the control thread at a reload too, would take longer with each. An endpoint has far fewer.
pub(super) const MAX_READ: usize = 4_096;

/// Returns the addresses in the network namespace with this number.
///
/// # Errors
/// [`io::ErrorKind::QuotaExceeded`]: it has more than [`MAX_READ`]. Other errors: the namespace is gone.
pub(super) fn addresses(nsid: i32) -> io::Result<Inside> {
    let mut inside = Inside::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let request = || {
            let mut message = AddressMessage::default();
            message.header.family = family;
            let number = DefaultNla::new(TARGET_NETNSID, nsid.to_ne_bytes().to_vec());
            message.attributes.push(AddressAttribute::Other(number));
            RouteNetlinkMessage::GetAddress(message)
        };
        let mut of_family = Inside::new();
        let mut read = 0;
        network::read_all(request, true, |message, is_first| {
            if is_first {
                of_family.clear();
                read = 0;
            }
            read += 1;
            if read > MAX_READ {
                return Err(io::Error::new(
                    io::ErrorKind::QuotaExceeded,
                    format!("its network namespace has more than {MAX_READ} addresses"),
                ));
            }
            if let RouteNetlinkMessage::NewAddress(address) = message
                && let Some(own) = network::own_address(&address.attributes)
            {
                of_family.entry(address.header.index).or_default().push(own);
            }
            Ok(())
        })?;
        for (index, addresses) in of_family {
            inside.entry(index).or_default().extend(addresses);
        }
    }
    Ok(inside)
}

/// Looks up the numbers of network namespaces.
pub(super) struct Numbers(Socket);

impl Numbers {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Returns the number of an open network namespace; `None` if it has none, which is so until an interface leads
    /// there.
    ///
    /// # Errors
    /// The file is no network namespace (EINVAL), or the kernel refuses the request.
    pub(super) fn of(&mut self, namespace: BorrowedFd<'_>) -> io::Result<Option<i32>> {
        let mut message = NsidMessage::default();
        let descriptor = u32::try_from(namespace.as_raw_fd()).map_err(io::Error::other)?;
        message.attributes.push(NsidAttribute::Fd(descriptor));
        let request = RouteNetlinkMessage::GetNsId(message);
        let mut packet = NetlinkMessage::new(NetlinkHeader::default(), NetlinkPayload::from(request));
        packet.header.flags = NLM_F_REQUEST;
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let (received, _) = self.0.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&received)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
        match answer.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(message)) => {
                let number = message.attributes.iter().find_map(|attribute| match attribute {
                    NsidAttribute::Id(number) => Some(*number),
                    _ => None,
                });
                Ok(number.filter(|number| *number >= 0))
            }
            NetlinkPayload::Error(error) => Err(error.to_io()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}
