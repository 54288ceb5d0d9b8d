//! Link messages of rtnetlink: interfaces, their XDP programs, and the veth pairs of the punt link and the proxy links.

use std::os::fd::{AsRawFd as _, BorrowedFd};

use super::{
    SyscallError, kernel_release,
    netlink::{Request, Socket, find, text, u16_at, u32_at},
};

type Result<T> = std::result::Result<T, SyscallError>;

const IFLA_ADDRESS: u16 = 1;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_IFNAME: u16 = 3;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_LINKINFO: u16 = 18;
const IFLA_MTU: u16 = 4;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_NUM_RX_QUEUES: u16 = 32;
const IFLA_NUM_TX_QUEUES: u16 = 31;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_XDP_PROG_ID: u16 = 4;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const VETH_INFO_PEER: u16 = 1;
const XDP_ATTACHED_NONE: u8 = 0;
const XDP_ATTACHED_SKB: u8 = 2;

/// Interface of the network namespace of the calling thread, with its XDP program.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub ifindex: u32,
    pub name: String,
    /// Whether frames begin with an Ethernet header.
    pub ethernet: bool,
    /// Whether the interface is set up (IFF_UP).
    pub up: bool,
    /// Attached XDP program.
    pub xdp: Option<XdpOnDevice>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct XdpOnDevice {
    /// Id of the program; 0 if there are several (native and offloaded).
    pub prog_id: u32,
    pub generic: bool,
}

/// Returns an interface by its index; `None` if it does not exist.
pub(crate) fn device(ifindex: u32) -> Result<Option<Device>> {
    let mut info = [0_u8; 16];
    info[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    let call = format!("RTM_GETLINK of interface {ifindex}");
    let mut found = None;
    let answer = Socket::open(libc::NETLINK_ROUTE)?.query(
        Request::new(libc::RTM_GETLINK, 0).fixed(&info),
        0,
        &call,
        &mut |kind, payload| {
            if kind == libc::RTM_NEWLINK {
                found = parse(payload);
            }
        },
    );
    match answer {
        Ok(()) => Ok(found),
        Err(e) if e.errno() == libc::ENODEV => Ok(None),
        Err(e) => Err(e),
    }
}

fn parse(payload: &[u8]) -> Option<Device> {
    let hardware = u16_at(payload, 2)?;
    let ifindex = u32_at(payload, 4)?;
    let attributes = payload.get(16..)?;
    let xdp = find(attributes, IFLA_XDP).and_then(|xdp| {
        let attached = find(xdp, IFLA_XDP_ATTACHED)?.first().copied()?;
        (attached != XDP_ATTACHED_NONE).then(|| XdpOnDevice {
            prog_id: find(xdp, IFLA_XDP_PROG_ID)
                .and_then(|id| u32_at(id, 0))
                .unwrap_or(0),
            generic: attached == XDP_ATTACHED_SKB,
        })
    });
    Some(Device {
        ifindex,
        name: find(attributes, IFLA_IFNAME).map(text).unwrap_or_default(),
        up: u32_at(payload, 8)? & libc::IFF_UP as u32 != 0,
        ethernet: matches!(hardware, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK),
        xdp,
    })
}

/// Interface that is, or could be, an end of the punt link.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) ifindex: u32,
    pub(crate) name: String,
    pub(crate) kind: String,
    pub(crate) tx_queues: u32,
    pub(crate) rx_queues: u32,
    pub(crate) mtu: u32,
}

impl Link {
    /// Returns whether the interface is a veth end with `queues` queues in each direction and this MTU.
    pub(crate) fn is_veth(&self, queues: u32, mtu: u32) -> bool {
        self.kind == "veth" && self.tx_queues == queues && self.rx_queues == queues && self.mtu == mtu
    }
}

fn ifinfo(ifindex: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut info = [0; 16];
    info[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    info[8..12].copy_from_slice(&flags.to_ne_bytes());
    info[12..16].copy_from_slice(&change.to_ne_bytes());
    info
}

fn c_string(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

pub(crate) fn link(name: &str) -> Result<Option<Link>> {
    query(
        Request::new(libc::RTM_GETLINK, 0)
            .fixed(&ifinfo(0, 0, 0))
            .attr(IFLA_IFNAME, &c_string(name)),
        &format!("RTM_GETLINK of {name}"),
    )
}

pub(crate) fn link_by_index(ifindex: u32) -> Result<Option<Link>> {
    query(
        Request::new(libc::RTM_GETLINK, 0).fixed(&ifinfo(ifindex, 0, 0)),
        &format!("RTM_GETLINK of interface {ifindex}"),
    )
}

fn query(request: Request, call: &str) -> Result<Option<Link>> {
    let mut found = None;
    let answer = Socket::open(libc::NETLINK_ROUTE)?.query(request, 0, call, &mut |kind, payload| {
        if kind != libc::RTM_NEWLINK {
            return;
        }
        let attributes = payload.get(16..).unwrap_or_default();
        let number = |kind| find(attributes, kind).and_then(|v| u32_at(v, 0)).unwrap_or(0);
        let info = find(attributes, IFLA_LINKINFO).unwrap_or_default();
        found = u32_at(payload, 4).map(|ifindex| Link {
            ifindex,
            name: find(attributes, IFLA_IFNAME).map(text).unwrap_or_default(),
            kind: find(info, IFLA_INFO_KIND).map(text).unwrap_or_default(),
            tx_queues: number(IFLA_NUM_TX_QUEUES),
            rx_queues: number(IFLA_NUM_RX_QUEUES),
            mtu: number(IFLA_MTU),
        });
    });
    match answer {
        Ok(()) => Ok(found),
        Err(e) if e.errno() == libc::ENODEV => Ok(None),
        Err(e) => Err(e),
    }
}

pub(crate) fn create(node_end: &str, worker_end: &str, queues: u32, mtu: u32) -> Result<()> {
    let end = |request: Request, name: &str| {
        request
            .attr(IFLA_IFNAME, &c_string(name))
            .attr(IFLA_MTU, &mtu.to_ne_bytes())
            .attr(IFLA_NUM_TX_QUEUES, &queues.to_ne_bytes())
            .attr(IFLA_NUM_RX_QUEUES, &queues.to_ne_bytes())
    };
    let request =
        Request::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL).fixed(&ifinfo(0, 0, 0));
    let request = end(request, node_end).nested(IFLA_LINKINFO, |info| {
        info.attr(IFLA_INFO_KIND, b"veth\0")
            .nested(IFLA_INFO_DATA, |data| {
                data.nested(VETH_INFO_PEER, |peer| {
                    end(peer.fixed(&ifinfo(0, 0, 0)), worker_end)
                })
            })
    });
    let call = format!("RTM_NEWLINK of {node_end} and {worker_end}");
    Socket::open(libc::NETLINK_ROUTE)?
        .execute(request, &call)
        .map_err(without_veth)
}

/// End of a veth pair with a chosen index and MAC address.
pub(crate) struct ChosenEnd<'a> {
    pub(crate) name: &'a str,
    pub(crate) ifindex: u32,
    pub(crate) mac: [u8; 6],
}

/// Creates a veth pair with `end` in the network namespace of the calling thread, and the end `peer` in another
/// namespace. The kernel lets a request choose the index of the end in the request's own namespace only.
pub(crate) fn create_across(end: &ChosenEnd<'_>, peer: &str, netns: BorrowedFd<'_>, mtu: u32) -> Result<()> {
    let request = Request::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL)
        .fixed(&ifinfo(end.ifindex, 0, 0))
        .attr(IFLA_IFNAME, &c_string(end.name))
        .attr(IFLA_MTU, &mtu.to_ne_bytes())
        .attr(IFLA_ADDRESS, &end.mac)
        .nested(IFLA_LINKINFO, |info| {
            info.attr(IFLA_INFO_KIND, b"veth\0")
                .nested(IFLA_INFO_DATA, |data| {
                    data.nested(VETH_INFO_PEER, |message| {
                        message
                            .fixed(&ifinfo(0, 0, 0))
                            .attr(IFLA_IFNAME, &c_string(peer))
                            .attr(IFLA_MTU, &mtu.to_ne_bytes())
                            .attr(IFLA_NET_NS_FD, &netns.as_raw_fd().to_ne_bytes())
                    })
                })
        });
    let call = format!("RTM_NEWLINK of {peer}");
    Socket::open(libc::NETLINK_ROUTE)?
        .execute(request, &call)
        .map_err(without_veth)
}

/// Adds the name of the missing feature to an EOPNOTSUPP error, which the kernel returns for an unknown kind of
/// interface after it has tried to load the module.
fn without_veth(error: SyscallError) -> SyscallError {
    if error.errno() != libc::EOPNOTSUPP {
        return error;
    }
    SyscallError {
        call: format!(
            "Linux {} has no veth interfaces (module veth, CONFIG_VETH): {}",
            kernel_release(),
            error.call
        ),
        ..error
    }
}

/// Disables IPv6 and ARP, so that no protocol of this machine sends on the punt link. With IPv6 enabled, a node that
/// forwards IPv6 would send multicast listener reports for ff02::2 (RFC 3810) on the link.
pub(crate) fn set_quiet(end: &Link) -> Result<()> {
    set_no_link_local(end.ifindex)?;
    // If the file cannot be written (no IPv6, read-only /proc/sys), `palisade_punt_filter` drops the packets that IPv6
    // sends.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", end.name), "1");
    set_flags(end.ifindex, libc::IFF_NOARP as u32)
}

/// Stops the kernel from giving the interface a link-local IPv6 address.
pub(crate) fn set_no_link_local(ifindex: u32) -> Result<()> {
    let call = format!("RTM_NEWLINK of interface {ifindex}");
    let mut socket = Socket::open(libc::NETLINK_ROUTE)?;
    let quiet = Request::new(libc::RTM_NEWLINK, 0)
        .fixed(&ifinfo(ifindex, 0, 0))
        .nested(IFLA_AF_SPEC, |families| {
            families.nested(libc::AF_INET6 as u16, |family| {
                family.attr(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])
            })
        });
    match socket.execute(quiet, &call) {
        // The kernel has no IPv6, or it is disabled.
        Err(e) if matches!(e.errno(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL) => Ok(()),
        other => other,
    }
}

pub(crate) fn set_up(ifindex: u32) -> Result<()> {
    set_flags(ifindex, libc::IFF_UP as u32)
}

/// Sets flags of an interface (`IFF_*`).
pub(crate) fn set_flags(ifindex: u32, flags: u32) -> Result<()> {
    Socket::open(libc::NETLINK_ROUTE)?.execute(
        Request::new(libc::RTM_NEWLINK, 0).fixed(&ifinfo(ifindex, flags, flags)),
        &format!("RTM_NEWLINK of interface {ifindex}"),
    )
}

pub(crate) fn delete(ifindex: u32) -> Result<()> {
    let request = Request::new(libc::RTM_DELLINK, 0).fixed(&ifinfo(ifindex, 0, 0));
    match Socket::open(libc::NETLINK_ROUTE)?.execute(request, &format!("RTM_DELLINK of interface {ifindex}"))
    {
        // The kernel has deleted the interface together with the other end of the veth pair.
        Err(e) if e.errno() == libc::ENODEV => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_of_a_kernel_without_veth_names_the_missing_module() {
        let error = |errno| {
            without_veth(SyscallError {
                call: "RTM_NEWLINK of palisade0 and palisade1".into(),
                io_error: std::io::Error::from_raw_os_error(errno),
            })
            .to_string()
        };
        let said = error(libc::EOPNOTSUPP);
        for part in [
            kernel_release().as_str(),
            "has no veth interfaces (module veth, CONFIG_VETH)",
            "RTM_NEWLINK of palisade0 and palisade1",
        ] {
            assert!(said.contains(part), "{part}: {said}");
        }
        assert!(error(libc::EEXIST).starts_with("RTM_NEWLINK of palisade0"));
    }
}
