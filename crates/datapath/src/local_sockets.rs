//! The cgroup of the socket of a flow, by `inet_diag`. A program at a NIC sees no socket of an arriving packet, and a program
//! of cgroups would cost each packet; so user space asks when it makes a record.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use palisade_abi::protocol;

use crate::sys::{
    SyscallError,
    netlink::{Request, Socket, find},
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Attribute with the number of the socket's cgroup (`include/uapi/linux/inet_diag.h`, since Linux 5.8).
const INET_DIAG_CGROUP_ID: u16 = 21;
/// Length of `struct inet_diag_msg`; the attributes follow.
const MESSAGE: usize = 72;

/// Sockets of the network namespace in which the value was made.
pub struct LocalSockets(Socket);

impl LocalSockets {
    /// Opens a netlink socket in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel refuses the socket.
    pub fn open() -> io::Result<Self> {
        Socket::open(libc::NETLINK_SOCK_DIAG).map(Self).map_err(io_error)
    }

    /// Returns the number of the cgroup of the socket that receives packets from `remote` to `local`: of the connection, else
    /// of the one that listens. `None` if there is no such socket, for protocols other than TCP and UDP, and without cgroups.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn cgroup_of(
        &mut self,
        protocol: u8,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> io::Result<Option<u64>> {
        // `udp_diag` looks up the receiver of a packet whose source is the first end; `tcp_diag` takes the local end first.
        let ends = match protocol {
            protocol::TCP => [local, remote],
            protocol::UDP => [remote, local],
            _ => return Ok(None),
        };
        let mut found = None;
        let request = Request::new(SOCK_DIAG_BY_FAMILY, 0).fixed(&request(protocol, ends));
        let answer = self
            .0
            .query(request, 0, "SOCK_DIAG_BY_FAMILY", &mut |kind, payload| {
                if kind == SOCK_DIAG_BY_FAMILY {
                    found = cgroup(payload, local.port());
                }
            });
        match answer {
            Ok(()) => Ok(found),
            // No such socket, or no module for the protocol.
            Err(error) if matches!(error.errno(), libc::ENOENT | libc::EPROTONOSUPPORT | libc::EINVAL) => {
                Ok(None)
            }
            Err(error) => Err(io_error(error)),
        }
    }
}

fn io_error(error: SyscallError) -> io::Error {
    error.io_error
}

/// Returns a `struct inet_diag_req_v2` for one socket.
fn request(protocol: u8, [first, second]: [SocketAddr; 2]) -> [u8; 56] {
    let mut request = [0_u8; 56];
    request[0] = if first.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    } as u8;
    request[1] = protocol;
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    request[8..10].copy_from_slice(&first.port().to_be_bytes());
    request[10..12].copy_from_slice(&second.port().to_be_bytes());
    for (at, end) in [(12, first), (28, second)] {
        match end.ip() {
            IpAddr::V4(address) => request[at..at + 4].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => request[at..at + 16].copy_from_slice(&address.octets()),
        }
    }
    // INET_DIAG_NOCOOKIE: any socket with these ends.
    request[48..].fill(0xff);
    request
}

/// Returns the cgroup in a `struct inet_diag_msg` with attributes, if the socket has this local port.
fn cgroup(payload: &[u8], local_port: u16) -> Option<u64> {
    let port = u16::from_be_bytes(payload.get(4..6)?.try_into().ok()?);
    let number = find(payload.get(MESSAGE..)?, INET_DIAG_CGROUP_ID)?;
    let number = u64::from_ne_bytes(number.try_into().ok()?);
    (port == local_port && number != 0).then_some(number)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        net::{TcpListener, TcpStream, UdpSocket},
        os::unix::fs::MetadataExt as _,
        path::PathBuf,
    };

    use super::*;

    /// Returns the number of the cgroup of this process; `None` without cgroup2.
    fn own() -> Option<u64> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
        let root = PathBuf::from(mount.split(' ').nth(4)?);
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
        Some(fs::metadata(root.join(own)).ok()?.ino())
    }

    #[test]
    fn sockets_of_both_families_and_protocols_have_the_cgroup_of_their_process() {
        let Some(own) = own() else { return };
        let mut sockets = LocalSockets::open().unwrap();
        let mut of = |protocol, local, remote| sockets.cgroup_of(protocol, local, remote).unwrap();
        for (address, foreign) in [("127.0.0.1:0", "192.0.2.9:9"), ("[::1]:0", "[2001:db8::9]:9")] {
            let Ok(listener) = TcpListener::bind(address) else {
                continue;
            };
            let foreign: SocketAddr = foreign.parse().unwrap();
            let local = listener.local_addr().unwrap();
            assert_eq!(of(protocol::TCP, local, foreign), Some(own), "{address}: listens");
            let client = TcpStream::connect(local).unwrap();
            let own_end = client.local_addr().unwrap();
            assert_eq!(
                of(protocol::TCP, own_end, local),
                Some(own),
                "{address}: connected"
            );
            assert_eq!(
                of(protocol::TCP, foreign, local),
                None,
                "{address}: no such connection"
            );
            let socket = UdpSocket::bind(address).unwrap();
            let local = socket.local_addr().unwrap();
            assert_eq!(of(protocol::UDP, local, foreign), Some(own), "{address}: UDP");
            socket.connect(foreign).ok();
            let local = socket.local_addr().unwrap();
            assert_eq!(
                of(protocol::UDP, local, foreign),
                Some(own),
                "{address}: connected UDP"
            );
            assert_eq!(
                of(protocol::UDP, foreign, local),
                None,
                "{address}: no such UDP socket"
            );
            assert_eq!(of(protocol::ICMP, local, foreign), None);
        }
        // A socket for IPv6 that accepts IPv4, too.
        if let Ok(listener) = TcpListener::bind("[::]:0") {
            let local = SocketAddr::from(([127, 0, 0, 1], listener.local_addr().unwrap().port()));
            assert_eq!(
                of(protocol::TCP, local, "192.0.2.9:9".parse().unwrap()),
                Some(own)
            );
        }
    }
}
