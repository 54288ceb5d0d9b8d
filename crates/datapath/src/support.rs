//! Features of the kernel and of drivers, for `palisade status`.

use std::path::Path;

use crate::{
    pin::is_on_bpffs,
    sys::{
        SyscallError, bpf, kernel_release,
        netlink::{Request, Socket, find, u16_at},
    },
};

/// Features of the kernel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Support {
    /// Kernel release.
    pub kernel: String,
    /// Whether the pin directory is on a bpffs.
    pub bpffs: bool,
    /// Whether the kernel has tcx; if not, programs are attached by clsact. `None` if the query fails.
    pub tcx: Option<bool>,
}

/// XDP support of the driver of an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum XdpSupport {
    /// Native XDP.
    Native,
    /// Generic XDP only.
    Generic,
    /// Not reported, for example by kernels before 6.3. Only an attempt to attach a program shows whether native XDP
    /// works.
    Unknown,
}

/// Returns the features of the kernel.
#[must_use]
pub fn support(pin_dir: &Path) -> Support {
    // Interface index of the loopback, 1 in every network namespace.
    const LOOPBACK: u32 = 1;
    Support {
        kernel: kernel_release(),
        bpffs: is_on_bpffs(pin_dir).unwrap_or(false),
        tcx: bpf::has_tcx(LOOPBACK).ok(),
    }
}

/// Returns the XDP support of an interface, as the netdev family of generic netlink reports it.
#[must_use]
pub fn xdp_support(ifindex: u32) -> XdpSupport {
    match xdp_features(ifindex) {
        Ok(Some(features)) if features & NETDEV_XDP_ACT_BASIC != 0 => XdpSupport::Native,
        Ok(Some(_)) => XdpSupport::Generic,
        Ok(None) | Err(_) => XdpSupport::Unknown,
    }
}

const NETDEV_XDP_ACT_BASIC: u64 = 1;

fn xdp_features(ifindex: u32) -> Result<Option<u64>, SyscallError> {
    const GENL_ID_CTRL: u16 = 16;
    const CTRL_CMD_GETFAMILY: u8 = 3;
    const CTRL_ATTR_FAMILY_ID: u16 = 1;
    const CTRL_ATTR_FAMILY_NAME: u16 = 2;
    const NETDEV_CMD_DEV_GET: u8 = 1;
    const NETDEV_A_DEV_IFINDEX: u16 = 1;
    const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;

    let mut socket = Socket::open(libc::NETLINK_GENERIC)?;
    let mut family = None;
    let request = Request::new(GENL_ID_CTRL, 0)
        .fixed(&[CTRL_CMD_GETFAMILY, 1, 0, 0])
        .attr(CTRL_ATTR_FAMILY_NAME, b"netdev\0");
    socket.query(request, 0, "CTRL_CMD_GETFAMILY of netdev", &mut |_, payload| {
        family = payload
            .get(4..)
            .and_then(|a| find(a, CTRL_ATTR_FAMILY_ID))
            .and_then(|id| u16_at(id, 0));
    })?;
    let Some(family) = family else { return Ok(None) };
    let mut features = None;
    let request = Request::new(family, 0)
        .fixed(&[NETDEV_CMD_DEV_GET, 1, 0, 0])
        .attr(NETDEV_A_DEV_IFINDEX, &ifindex.to_ne_bytes());
    socket.query(request, 0, "NETDEV_CMD_DEV_GET", &mut |_, payload| {
        features = payload
            .get(4..)
            .and_then(|a| find(a, NETDEV_A_DEV_XDP_FEATURES))
            .and_then(|v| Some(u64::from_ne_bytes(v.try_into().ok()?)));
    })?;
    Ok(features)
}
