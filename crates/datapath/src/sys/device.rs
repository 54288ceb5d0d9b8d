//! What rtnetlink knows of a network interface.

use super::{
    SyscallError,
    netlink::{Request, Socket, find, text, u16_at, u32_at},
};

const IFLA_IFNAME: u16 = 3;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFLA_XDP_PROG_ID: u16 = 4;
const XDP_ATTACHED_NONE: u8 = 0;
const XDP_ATTACHED_SKB: u8 = 2;

/// An interface of the calling thread's network namespace.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub ifindex: u32,
    pub name: String,
    /// Whether frames begin with an Ethernet header.
    pub ethernet: bool,
    /// The XDP program on it.
    pub xdp: Option<XdpOnDevice>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct XdpOnDevice {
    /// 0 if there are several (native and offloaded).
    pub prog_id: u32,
    pub generic: bool,
}

/// Looks an interface up; `None` if there is none of that index.
pub(crate) fn device(ifindex: u32) -> Result<Option<Device>, SyscallError> {
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
        ethernet: matches!(hardware, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK),
        xdp,
    })
}
