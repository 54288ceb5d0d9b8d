//! Probes of kernel features, for `palisade doctor`. A probe attaches nothing: it makes at most a map or a socket, which
//! it closes again.

use std::{io, path::Path};

use crate::{
    SyscallError,
    sys::{bpf, ethtool, netlink::Socket, nft},
};

/// Feature of the kernel.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Feature {
    /// bpf(2).
    Bpf,
    /// Type information of the kernel (`/sys/kernel/btf/vmlinux`).
    Btf,
    /// Ring buffer for events.
    RingBuffer,
    /// Maps of sockets: XSKMAP of the workers, SOCKMAP of the proxy (sk_lookup).
    SocketMaps,
    /// AF_XDP sockets.
    AfXdp,
    /// tcx, the tc hook with links.
    Tcx,
    /// nf_tables.
    NfTables,
}

impl Feature {
    /// All features.
    pub const ALL: [Self; 7] = [
        Self::Bpf,
        Self::Btf,
        Self::RingBuffer,
        Self::SocketMaps,
        Self::AfXdp,
        Self::Tcx,
        Self::NfTables,
    ];
}

/// Result of a probe.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Answer {
    /// The kernel has the feature.
    Yes,
    /// The kernel does not have the feature; with the kernel's error.
    No(String),
    /// The probe needs root.
    NeedsRoot,
}

/// Returns whether the kernel has a feature.
#[must_use]
pub fn probe(feature: Feature) -> Answer {
    /// Interface index of the loopback, 1 in every network namespace.
    const LOOPBACK: u32 = 1;
    // `enum bpf_map_type`.
    const ARRAY: u32 = 2;
    const SOCKMAP: u32 = 15;
    const XSKMAP: u32 = 17;
    const RINGBUF: u32 = 27;
    let map =
        |kind, key, value, entries| bpf::map_create("palisade_probe", kind, key, value, entries, 0).map(drop);
    let outcome = match feature {
        Feature::Bpf => map(ARRAY, 4, 4, 1),
        Feature::Btf if Path::new("/sys/kernel/btf/vmlinux").exists() => Ok(()),
        Feature::Btf => {
            return Answer::No("/sys/kernel/btf/vmlinux does not exist".to_owned());
        }
        // The size of a ring is a multiple of the page size, at most 64 KiB.
        Feature::RingBuffer => map(RINGBUF, 0, 0, 64 << 10),
        Feature::SocketMaps => map(XSKMAP, 4, 4, 1).and_then(|()| map(SOCKMAP, 4, 8, 1)),
        Feature::AfXdp => xdp_socket(),
        Feature::Tcx => match bpf::has_tcx(LOOPBACK) {
            Ok(true) => Ok(()),
            Ok(false) => return Answer::No("BPF_PROG_QUERY of tcx: Invalid argument".to_owned()),
            Err(error) => Err(error),
        },
        Feature::NfTables => Socket::open(libc::NETLINK_NETFILTER).and_then(|mut socket| {
            socket.query(
                nft::get_tables(),
                libc::NLM_F_DUMP,
                "listing the nftables tables",
                &mut |_, _| {},
            )
        }),
    };
    match outcome {
        Ok(()) => Answer::Yes,
        Err(error) if matches!(error.errno(), libc::EPERM | libc::EACCES) => Answer::NeedsRoot,
        Err(error) => Answer::No(error.to_string()),
    }
}

fn xdp_socket() -> Result<(), SyscallError> {
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(SyscallError::new("socket(AF_XDP)", io::Error::last_os_error()));
    }
    // SAFETY: `fd` was just opened and is closed once.
    unsafe { libc::close(fd) };
    Ok(())
}

/// Driver of an interface, and offloads that change the frames that programs see.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Offloads {
    /// Name of the driver; empty if it is unknown.
    pub driver: String,
    /// Whether the NIC merges TCP segments before the kernel sees them (LRO).
    pub lro: bool,
    /// Whether the NIC removes VLAN tags from frames that it receives.
    pub rx_vlan: bool,
}

/// Returns driver and offloads of an interface of the network namespace of the calling thread. Values that cannot be
/// read are empty.
#[must_use]
pub fn offloads(name: &str) -> Offloads {
    let flags = ethtool::flags(name).unwrap_or(0);
    Offloads {
        driver: ethtool::driver(name).unwrap_or_default(),
        lro: flags & ethtool::FLAG_LRO != 0,
        rx_vlan: flags & ethtool::FLAG_RX_VLAN != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_probe_has_an_answer_and_an_unknown_interface_has_no_driver() {
        for feature in Feature::ALL {
            // Without root the answer is that root is needed; with root it depends on the kernel.
            let _ = probe(feature);
        }
        assert_eq!(offloads("no-such-device-x"), Offloads::default());
        assert_eq!(offloads("a name that is much too long"), Offloads::default());
    }
}
