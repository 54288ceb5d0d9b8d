//! Reads the TCP sockets of a network namespace by `inet_diag`.

use std::collections::HashSet;

use palisade_abi::{Addr, protocol};

use super::connection::{Connection, End, Progress, SeedError};
use crate::sys::netlink::{Request, Socket, u32_at};

/// States of a TCP socket (`net/tcp_states.h`).
mod socket_state {
    pub(super) const ESTABLISHED: u8 = 1;
    pub(super) const SYN_SENT: u8 = 2;
    pub(super) const SYN_RECV: u8 = 3;
    pub(super) const FIN_WAIT1: u8 = 4;
    pub(super) const FIN_WAIT2: u8 = 5;
    pub(super) const CLOSE_WAIT: u8 = 8;
    pub(super) const LAST_ACK: u8 = 9;
    pub(super) const LISTEN: u8 = 10;
    pub(super) const CLOSING: u8 = 11;
}

/// Socket as `inet_diag` reports it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct InetSocket {
    state: u8,
    local: End,
    remote: End,
}

pub(super) fn sockets() -> Result<Vec<Connection>, SeedError> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        // struct inet_diag_req_v2: all states, all addresses.
        let mut request = [0_u8; 56];
        request[0] = family as u8;
        request[1] = protocol::TCP;
        request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
        let answer = Socket::open(libc::NETLINK_SOCK_DIAG).and_then(|mut socket| {
            let request = Request::new(SOCK_DIAG_BY_FAMILY, 0).fixed(&request);
            socket.query(
                request,
                libc::NLM_F_DUMP,
                "SOCK_DIAG_BY_FAMILY",
                &mut |kind, payload| {
                    if kind == SOCK_DIAG_BY_FAMILY {
                        found.extend(parse_socket(payload));
                    }
                },
            )
        });
        match answer {
            // The kernel does not have the module tcp_diag.
            Err(e) if matches!(e.errno(), libc::ENOENT | libc::EPROTONOSUPPORT | libc::EINVAL) => {}
            other => other?,
        }
    }
    Ok(of_sockets(&found))
}

/// Parses a `struct inet_diag_msg`.
fn parse_socket(payload: &[u8]) -> Option<InetSocket> {
    let v4 = i32::from(*payload.first()?) == libc::AF_INET;
    let addr = |offset: usize| -> Option<Addr> {
        if v4 {
            Some(Addr::from_v4_word(u32_at(payload, offset)?))
        } else {
            Some(Addr::from_bytes(
                payload.get(offset..offset + 16)?.try_into().ok()?,
            ))
        }
    };
    let port = |offset: usize| {
        Some(u16::from_be_bytes(
            payload.get(offset..offset + 2)?.try_into().ok()?,
        ))
    };
    Some(InetSocket {
        state: *payload.get(1)?,
        local: End {
            addr: addr(8)?,
            port: port(4)?,
        },
        remote: End {
            addr: addr(24)?,
            port: port(6)?,
        },
    })
}

/// Returns the connections of these sockets. The peer counts as the opener if the socket is in SYN_RECV, or if a socket
/// listens on the local address and port and the socket is not in SYN_SENT.
fn of_sockets(sockets: &[InetSocket]) -> Vec<Connection> {
    let listeners: HashSet<End> = sockets
        .iter()
        .filter(|socket| socket.state == socket_state::LISTEN)
        .map(|socket| socket.local)
        .collect();
    let listens = |socket: &InetSocket| {
        let any_v4 = Addr::from_v4([0; 4]);
        let port = socket.local.port;
        [socket.local.addr, Addr::UNSPECIFIED, any_v4]
            .into_iter()
            .any(|addr| {
                (addr != any_v4 || socket.local.addr.is_v4()) && listeners.contains(&End { addr, port })
            })
    };
    sockets
        .iter()
        .filter_map(|socket| {
            let remote_opened = socket.state == socket_state::SYN_RECV
                || (socket.state != socket_state::SYN_SENT && listens(socket));
            let closed_by = |local: bool| {
                if local == remote_opened {
                    Progress::ResponderClosed
                } else {
                    Progress::OpenerClosed
                }
            };
            let progress = match socket.state {
                socket_state::ESTABLISHED | socket_state::SYN_RECV => Progress::Established,
                socket_state::SYN_SENT => Progress::Opening,
                socket_state::FIN_WAIT1 | socket_state::FIN_WAIT2 => closed_by(true),
                socket_state::CLOSE_WAIT => closed_by(false),
                socket_state::LAST_ACK | socket_state::CLOSING => Progress::Closed,
                _ => return None,
            };
            let (opener, responder) = if remote_opened {
                (socket.remote, socket.local)
            } else {
                (socket.local, socket.remote)
            };
            Some(Connection {
                opener,
                responder,
                progress,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::connection::fixtures::end;

    #[test]
    fn the_peer_of_a_listening_port_is_the_opener() {
        let socket = |state, local, remote| InetSocket {
            state,
            local: end(local),
            remote: end(remote),
        };
        use socket_state::*;
        let sockets = [
            socket(LISTEN, "0.0.0.0:80", "0.0.0.0:0"),
            socket(LISTEN, "[::]:443", "[::]:0"),
            socket(ESTABLISHED, "10.0.0.1:80", "192.0.2.1:5000"),
            socket(CLOSE_WAIT, "[::ffff:10.0.0.1]:443", "[::ffff:192.0.2.1]:5001"),
            socket(ESTABLISHED, "10.0.0.1:6000", "192.0.2.1:80"),
            socket(FIN_WAIT2, "[fd00::1]:80", "[fd00::2]:5002"),
            socket(6, "10.0.0.1:6001", "192.0.2.1:80"),
        ];
        let found = of_sockets(&sockets);
        let summary: Vec<_> = found
            .iter()
            .map(|c| (c.opener.port, c.responder.port, c.progress))
            .collect();
        assert_eq!(
            summary,
            [
                (5000, 80, Progress::Established),
                (5001, 443, Progress::OpenerClosed),
                (6000, 80, Progress::Established),
                // No socket listens on IPv6 port 80: 0.0.0.0 is IPv4 only.
                (80, 5002, Progress::OpenerClosed),
            ]
        );
        // An IPv4-mapped IPv6 address is the same end as the IPv4 address.
        assert!(found[1].responder.addr.is_v4());
    }
}
