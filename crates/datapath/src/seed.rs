//! The connections that were there before Palisade, from the kernel's own tables, so that they live on.
//!
//! | source | knows | who opened |
//! |---|---|---|
//! | nf_conntrack (`/proc` or ctnetlink) | what the node sends, receives and forwards, where a firewall or NAT rule has switched it on | told |
//! | sockets of a network namespace (`inet_diag`) | TCP connections and connected UDP sockets of that namespace | the other end, if something listens on the local port; else this end |
//!
//! The sockets of the node's own namespace know the flows of the node's endpoint. The flows of a workload are known
//! if nf_conntrack sees them, or if the configuration names the workload's namespace ([`connections_of_netns`]).
//! A flow that no table knows is judged by its first packet, whichever direction that has.
//!
//! A socket list is no proof: root of a workload, and for UDP any user, can make one that names foreign addresses or
//! that lets a flow look as if the other end had opened it. Therefore
//!
//! - a table speaks only for the endpoints in its [`Scope`]: the sockets of a namespace for the endpoint that lives in
//!   that namespace, and for no other endpoint, whatever addresses its sockets have;
//! - only TCP is seeded. UDP and SCTP packets do not show who opened a flow, so a seeded entry would be the only
//!   evidence for its direction. Without an entry such a flow goes on if the policy allows the direction of its next
//!   packet;
//! - the daemon seeds once, before it attaches the first program to the first interface (`daemon::guard`).
//!
//! A seeded entry has revision 0, which no endpoint has: its first packet has *the flow* judged, in the direction in
//! which it was opened. What the policy allows lives, what it denies is cut.

use std::{
    collections::{BTreeMap, HashSet},
    fs::File,
    io,
    net::IpAddr,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
};

use palisade_abi::{
    Addr, Config, CtEntry, CtKey, ct_flags, protocol,
    tcp_flags::{ACK, FIN, SYN},
};

use crate::{
    SyscallError,
    sys::netlink::{Request, Socket, find, u32_at},
};

/// The connections could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// A network namespace could not be entered.
    #[error("{path}: cannot enter the network namespace: {source}")]
    Netns {
        /// Where it is mounted.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A table could not be read.
    #[error("reading the kernel's connections: {0}")]
    Syscall(#[from] SyscallError),
}

/// One end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct End {
    /// Its address.
    pub addr: Addr,
    /// Its port.
    pub port: u16,
}

/// A TCP connection of the kernel's tables.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Connection {
    /// Who opened it.
    pub opener: End,
    /// Whom.
    pub responder: End,
    /// What TCP has done so far.
    pub progress: Progress,
}

/// How far a connection is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Progress {
    /// One side has sent.
    Opening,
    /// Both sides have sent.
    Established,
    /// The opener has sent FIN.
    OpenerClosed,
    /// The responder has sent FIN.
    ResponderClosed,
    /// Both have sent FIN.
    Closed,
}

impl Progress {
    /// The TCP flags that the opener and the responder must have sent.
    fn tcp_flags(self) -> (u8, u8) {
        match self {
            Self::Opening => (SYN, 0),
            Self::Established => (SYN | ACK, SYN | ACK),
            Self::OpenerClosed => (SYN | ACK | FIN, SYN | ACK),
            Self::ResponderClosed => (SYN | ACK, SYN | ACK | FIN),
            Self::Closed => (SYN | ACK | FIN, SYN | ACK | FIN),
        }
    }
}

/// The endpoints of this node by their addresses, and which of them is the node.
#[derive(Clone, Debug, Default)]
pub struct LocalEndpoints {
    /// Address -> endpoint id.
    pub addresses: BTreeMap<Addr, u16>,
    /// The node's own endpoint.
    pub host: u16,
}

/// The endpoints that a table of connections is evidence for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Every endpoint of this node: nf_conntrack of the node's namespace, which sees the packets themselves.
    Node,
    /// One endpoint: the sockets of its own namespace.
    Endpoint(u16),
}

impl Scope {
    const fn covers(self, endpoint: u16) -> bool {
        match self {
            Self::Node => true,
            Self::Endpoint(only) => only == endpoint,
        }
    }
}

/// Returns the conntrack entries of TCP connections: one for each end that is an endpoint in the scope of the table
/// that the connection stands in. Where two connections give the same key, the first counts.
#[must_use]
pub fn seeds(
    connections: &[(Scope, Connection)],
    endpoints: &LocalEndpoints,
    config: &Config,
    now: u64,
) -> Vec<(CtKey, CtEntry)> {
    let mut seen = HashSet::new();
    let mut entries = Vec::new();
    for (scope, connection) in connections {
        let Connection {
            opener, responder, ..
        } = *connection;
        let (of_opener, of_responder) = (
            endpoints.addresses.get(&opener.addr),
            endpoints.addresses.get(&responder.addr),
        );
        if of_opener.is_some() && of_opener == of_responder {
            // An endpoint with itself: no interface sees that.
            continue;
        }
        for (endpoint, other, local, remote, ingress) in [
            (of_opener, of_responder, opener, responder, false),
            (of_responder, of_opener, responder, opener, true),
        ] {
            let Some(&endpoint) = endpoint else { continue };
            if !scope.covers(endpoint) {
                continue;
            }
            let key = CtKey {
                local: local.addr,
                remote: remote.addr,
                local_port: local.port,
                remote_port: remote.port,
                endpoint,
                protocol: protocol::TCP,
                zero: 0,
            };
            if seen.insert(key) {
                entries.push((
                    key,
                    entry(connection, ingress, other.copied(), endpoints.host, config, now),
                ));
            }
        }
    }
    entries
}

fn entry(
    connection: &Connection,
    ingress: bool,
    other: Option<u16>,
    host: u16,
    config: &Config,
    now: u64,
) -> CtEntry {
    let mut flags = ct_flags::SEEDED;
    if ingress {
        flags |= ct_flags::INGRESS;
    }
    if connection.progress != Progress::Opening {
        flags |= ct_flags::REPLIED;
    }
    if let Some(other) = other {
        flags |= ct_flags::REMOTE_IS_LOCAL;
        if other == host {
            flags |= ct_flags::REMOTE_IS_HOST;
        }
    }
    let timeout = match connection.progress {
        Progress::Opening => config.tcp_opening,
        Progress::Closed => config.tcp_closing,
        Progress::Established | Progress::OpenerClosed | Progress::ResponderClosed => config.tcp_established,
    };
    let (forward_tcp, reply_tcp) = connection.progress.tcp_flags();
    CtEntry {
        expires: now.saturating_add(timeout),
        created: now,
        reported: now,
        flags,
        forward_tcp,
        reply_tcp,
        ..CtEntry::default()
    }
}

/// Returns the connections that the kernel knows of in the calling thread's network namespace, the node's: those of
/// nf_conntrack first, for every endpoint, then the sockets, for the endpoint `node` alone.
///
/// # Errors
/// If a table is there and cannot be read.
pub fn connections(node: u16) -> Result<Vec<(Scope, Connection)>, SeedError> {
    let tracked = tracked()?.into_iter().map(|connection| (Scope::Node, connection));
    let sockets = sockets()?
        .into_iter()
        .map(|connection| (Scope::Endpoint(node), connection));
    Ok(tracked.chain(sockets).collect())
}

/// Returns the connections that the kernel knows of in the network namespace (`/run/netns/NAME`, `/proc/PID/ns/net`)
/// of the endpoint with the number `endpoint`, for that endpoint alone.
///
/// # Errors
/// If the namespace cannot be entered, or a table is there and cannot be read.
pub fn connections_of_netns(path: &Path, endpoint: u16) -> Result<Vec<(Scope, Connection)>, SeedError> {
    let failed = |source| SeedError::Netns {
        path: path.to_owned(),
        source,
    };
    let namespace = File::open(path).map_err(failed)?;
    // In a thread of its own, which ends in there: no way back has to be found.
    let inside = std::thread::Builder::new()
        .name("seed-netns".into())
        .spawn(move || {
            // SAFETY: no pointers; the descriptor is open.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(tracked().and_then(|mut found| {
                found.extend(sockets()?);
                Ok(found)
            }))
        });
    let outcome = inside.map_err(failed)?.join();
    let found = outcome
        .map_err(|_| failed(io::Error::other("the reader panicked")))?
        .map_err(failed)??;
    let scope = Scope::Endpoint(endpoint);
    Ok(found.into_iter().map(|connection| (scope, connection)).collect())
}

fn tracked() -> Result<Vec<Connection>, SeedError> {
    // Of the calling thread: /proc/net is of the process's first thread.
    match std::fs::read_to_string("/proc/thread-self/net/nf_conntrack") {
        Ok(text) => Ok(text
            .lines()
            .filter_map(parse_tracked)
            .flatten()
            .flatten()
            .collect()),
        Err(_) => tracked_by_netlink(),
    }
}

/// One line of `/proc/net/nf_conntrack`: the connection as its opener sees it and, where addresses are translated, as
/// its responder does.
fn parse_tracked(line: &str) -> Option<[Option<Connection>; 2]> {
    let mut words = line.split_ascii_whitespace().skip(3);
    let protocol: u8 = words.next()?.parse().ok()?;
    let rest: Vec<_> = words.collect();
    if protocol != protocol::TCP {
        return None;
    }
    let progress = tcp_progress(rest.get(1)?)?;
    let fields = |name: &'static str| {
        rest.iter()
            .filter_map(move |word| word.strip_prefix(name)?.strip_prefix('='))
            .collect::<Vec<_>>()
    };
    let (sources, destinations) = (fields("src"), fields("dst"));
    let (source_ports, destination_ports) = (fields("sport"), fields("dport"));
    let end = |addresses: &[&str], ports: &[&str], i: usize| -> Option<End> {
        let addr: IpAddr = addresses.get(i)?.parse().ok()?;
        Some(End {
            addr: addr.into(),
            port: ports.get(i)?.parse().ok()?,
        })
    };
    let original = (
        end(&sources, &source_ports, 0)?,
        end(&destinations, &destination_ports, 0)?,
    );
    let reply = (
        end(&sources, &source_ports, 1)?,
        end(&destinations, &destination_ports, 1)?,
    );
    Some(both_views(progress, original, reply))
}

/// A connection whose tuples (source, destination) are given for both directions.
fn both_views(progress: Progress, original: (End, End), reply: (End, End)) -> [Option<Connection>; 2] {
    let of_opener = Connection {
        opener: original.0,
        responder: original.1,
        progress,
    };
    let of_responder = Connection {
        opener: reply.1,
        responder: reply.0,
        progress,
    };
    [
        Some(of_opener),
        (of_responder != of_opener).then_some(of_responder),
    ]
}

fn tcp_progress(state: &str) -> Option<Progress> {
    Some(match state {
        "SYN_SENT" | "SYN_SENT2" => Progress::Opening,
        // Which side closed first is not told.
        "SYN_RECV" | "ESTABLISHED" | "FIN_WAIT" | "CLOSE_WAIT" => Progress::Established,
        "LAST_ACK" | "TIME_WAIT" => Progress::Closed,
        _ => return None,
    })
}

const NFNL_SUBSYS_CTNETLINK: u16 = 1;
const IPCTNL_MSG_CT_NEW: u16 = 0;
const IPCTNL_MSG_CT_GET: u16 = 1;

fn tracked_by_netlink() -> Result<Vec<Connection>, SeedError> {
    let mut found = Vec::new();
    // struct nfgenmsg: any family, version 0.
    let request = Request::new(NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET, 0).fixed(&[0; 4]);
    let answer = Socket::open(libc::NETLINK_NETFILTER).and_then(|mut socket| {
        socket.query(
            request,
            libc::NLM_F_DUMP,
            "IPCTNL_MSG_CT_GET",
            &mut |kind, payload| {
                if kind == NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_NEW {
                    found.extend(
                        payload
                            .get(4..)
                            .and_then(parse_ctnetlink)
                            .into_iter()
                            .flatten()
                            .flatten(),
                    );
                }
            },
        )
    });
    match answer {
        // Neither nf_conntrack nor its netlink side is in this kernel: it tracks nothing.
        Err(e)
            if matches!(
                e.errno(),
                libc::EPROTONOSUPPORT | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOENT
            ) =>
        {
            Ok(Vec::new())
        }
        other => Ok(other.map(|()| found)?),
    }
}

/// The attributes of a conntrack message (`enum ctattr_type`).
fn parse_ctnetlink(attributes: &[u8]) -> Option<[Option<Connection>; 2]> {
    const CTA_TUPLE_ORIG: u16 = 1;
    const CTA_TUPLE_REPLY: u16 = 2;
    const CTA_PROTOINFO: u16 = 4;
    const CTA_PROTOINFO_TCP: u16 = 1;
    const CTA_PROTOINFO_TCP_STATE: u16 = 1;

    let original = parse_tuple(find(attributes, CTA_TUPLE_ORIG)?)?;
    let reply = parse_tuple(find(attributes, CTA_TUPLE_REPLY)?)?;
    let state = find(attributes, CTA_PROTOINFO)
        .and_then(|info| find(info, CTA_PROTOINFO_TCP))
        .and_then(|tcp| find(tcp, CTA_PROTOINFO_TCP_STATE))?;
    // enum tcp_conntrack
    let progress = match state.first()? {
        1 | 9 => Progress::Opening,
        2..=5 => Progress::Established,
        6 | 7 => Progress::Closed,
        _ => return None,
    };
    Some(both_views(progress, original, reply))
}

/// Returns source and destination of a TCP tuple (`enum ctattr_tuple`).
fn parse_tuple(tuple: &[u8]) -> Option<(End, End)> {
    const CTA_TUPLE_IP: u16 = 1;
    const CTA_TUPLE_PROTO: u16 = 2;
    let ip = find(tuple, CTA_TUPLE_IP)?;
    let proto = find(tuple, CTA_TUPLE_PROTO)?;
    let addr = |v4: u16, v6: u16| -> Option<Addr> {
        match find(ip, v4) {
            Some(bytes) => Some(Addr::from_v4(bytes.try_into().ok()?)),
            None => Some(Addr::from_bytes(find(ip, v6)?.try_into().ok()?)),
        }
    };
    let port = |kind: u16| Some(u16::from_be_bytes(find(proto, kind)?.try_into().ok()?));
    let number = *find(proto, 1)?.first()?;
    if number != protocol::TCP {
        return None;
    }
    let source = End {
        addr: addr(1, 3)?,
        port: port(2)?,
    };
    let destination = End {
        addr: addr(2, 4)?,
        port: port(3)?,
    };
    Some((source, destination))
}

/// States of a TCP socket (`net/tcp_states.h`).
mod socket_state {
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const SYN_RECV: u8 = 3;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const LISTEN: u8 = 10;
    pub const CLOSING: u8 = 11;
}

/// A socket as `inet_diag` shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct InetSocket {
    state: u8,
    local: End,
    remote: End,
}

fn sockets() -> Result<Vec<Connection>, SeedError> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        // struct inet_diag_req_v2: every state, any address.
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
            // The kernel has no module tcp_diag.
            Err(e) if matches!(e.errno(), libc::ENOENT | libc::EPROTONOSUPPORT | libc::EINVAL) => {}
            other => other?,
        }
    }
    Ok(of_sockets(&found))
}

/// `struct inet_diag_msg`.
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

/// The connections among sockets. The other end opened those whose local port somebody listens on.
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

    fn end(text: &str) -> End {
        let at: std::net::SocketAddr = text.parse().unwrap();
        End {
            addr: at.ip().into(),
            port: at.port(),
        }
    }

    fn config() -> Config {
        Config {
            tcp_opening: 1,
            tcp_established: 1000,
            tcp_closing: 10,
            udp: 100,
            other: 0,
            fragment: 0,
            trace_interval: 0,
            events_per_second: 0,
            host_endpoint: 1,
            world_ipv4: 0,
            world_ipv6: 0,
            rules: 0,
            ..Config::default()
        }
    }

    fn endpoints(list: &[(&str, u16)]) -> LocalEndpoints {
        let addresses = list
            .iter()
            .map(|&(a, id)| (a.parse::<IpAddr>().unwrap().into(), id))
            .collect();
        LocalEndpoints { addresses, host: 1 }
    }

    fn node(connection: Connection) -> (Scope, Connection) {
        (Scope::Node, connection)
    }

    fn tcp(opener: &str, responder: &str) -> Connection {
        Connection {
            opener: end(opener),
            responder: end(responder),
            progress: Progress::Established,
        }
    }

    #[test]
    fn the_end_that_is_an_endpoint_gets_an_entry_in_the_flows_direction() {
        let known = endpoints(&[("10.0.0.1", 1)]);
        let out = seeds(
            &[node(tcp("10.0.0.1:40000", "192.0.2.7:443"))],
            &known,
            &config(),
            5,
        );
        let [(key, entry)] = out[..] else {
            panic!("{out:?}")
        };
        assert_eq!((key.endpoint, key.local_port, key.remote_port), (1, 40000, 443));
        assert_eq!(entry.flags, ct_flags::SEEDED | ct_flags::REPLIED);
        assert_eq!(
            (entry.revision, entry.expires, entry.forward_tcp, entry.reply_tcp),
            (0, 1005, 18, 18)
        );

        let out = seeds(
            &[node(tcp("192.0.2.7:5555", "10.0.0.1:22"))],
            &known,
            &config(),
            5,
        );
        let [(key, entry)] = out[..] else {
            panic!("{out:?}")
        };
        assert_eq!((key.local_port, key.remote_port), (22, 5555));
        assert_eq!(
            entry.flags,
            ct_flags::SEEDED | ct_flags::REPLIED | ct_flags::INGRESS
        );
    }

    #[test]
    fn sockets_of_a_namespace_speak_for_the_endpoint_of_that_namespace_alone() {
        let known = endpoints(&[("10.0.0.1", 1), ("10.0.1.10", 7), ("10.0.2.10", 8)]);
        // Root of endpoint 7 has given 10.0.2.10, the address of endpoint 8, to its own loopback.
        let forged = tcp("10.0.2.10:1000", "192.0.2.9:443");
        assert!(seeds(&[(Scope::Endpoint(7), forged)], &known, &config(), 0).is_empty());
        assert_eq!(
            seeds(&[(Scope::Endpoint(8), forged)], &known, &config(), 0).len(),
            1
        );
        // A connection between both counts for the endpoint whose namespace it was found in.
        let both = tcp("10.0.2.10:1000", "10.0.1.10:80");
        let out = seeds(&[(Scope::Endpoint(7), both)], &known, &config(), 0);
        assert_eq!(out.iter().map(|(key, _)| key.endpoint).collect::<Vec<_>>(), [7]);
        // The node's sockets say nothing about workloads.
        assert!(seeds(&[(Scope::Endpoint(1), forged)], &known, &config(), 0).is_empty());
    }

    #[test]
    fn two_endpoints_have_an_entry_each() {
        let known = endpoints(&[("10.0.0.1", 1), ("10.0.1.10", 7), ("fd00::1", 8)]);
        let out = seeds(
            &[node(tcp("10.0.1.10:1000", "10.0.0.1:80"))],
            &known,
            &config(),
            0,
        );
        assert_eq!(out.len(), 2);
        assert_eq!(out[0].0.endpoint, 7);
        assert_ne!(out[0].1.flags & ct_flags::REMOTE_IS_HOST, 0);
        assert_eq!(out[0].1.flags & ct_flags::INGRESS, 0);
        assert_eq!(out[1].0.endpoint, 1);
        assert_eq!(
            out[1].1.flags & (ct_flags::REMOTE_IS_HOST | ct_flags::REMOTE_IS_LOCAL),
            ct_flags::REMOTE_IS_LOCAL
        );
        assert_ne!(out[1].1.flags & ct_flags::INGRESS, 0);
    }

    #[test]
    fn strangers_and_the_node_with_itself_get_none_and_the_first_of_two_counts() {
        let known = endpoints(&[("10.0.0.1", 1), ("10.0.0.2", 1)]);
        assert!(seeds(&[node(tcp("10.9.0.1:1", "10.9.0.2:2"))], &known, &config(), 0).is_empty());
        assert!(seeds(&[node(tcp("10.0.0.1:1", "10.0.0.2:2"))], &known, &config(), 0).is_empty());
        let twice = [
            node(tcp("192.0.2.7:5555", "10.0.0.1:22")),
            node(tcp("10.0.0.1:22", "192.0.2.7:5555")),
        ];
        let out = seeds(&twice, &known, &config(), 0);
        assert_eq!(out.len(), 1);
        assert_ne!(out[0].1.flags & ct_flags::INGRESS, 0);
    }

    #[test]
    fn proc_lines_with_and_without_translation() {
        let plain = "ipv4     2 tcp      6 431999 ESTABLISHED src=10.0.0.1 dst=10.0.0.2 sport=4000 dport=80 \
                     src=10.0.0.2 dst=10.0.0.1 sport=80 dport=4000 [ASSURED] mark=0 zone=0 use=2";
        let [first, second] = parse_tracked(plain).unwrap();
        assert_eq!(first, Some(tcp("10.0.0.1:4000", "10.0.0.2:80")));
        assert_eq!(second, None);

        let nat = "ipv4     2 tcp      6 20 SYN_SENT src=10.0.1.10 dst=192.0.2.7 sport=5000 dport=53 packets=1 bytes=60 \
                   [UNREPLIED] src=192.0.2.7 dst=198.51.100.1 sport=53 dport=6000 packets=0 bytes=0 mark=0 use=2";
        let [first, second] = parse_tracked(nat).unwrap();
        let (first, second) = (first.unwrap(), second.unwrap());
        assert_eq!(first.progress, Progress::Opening);
        assert_eq!(
            (first.opener, first.responder),
            (end("10.0.1.10:5000"), end("192.0.2.7:53"))
        );
        assert_eq!(
            (second.opener, second.responder),
            (end("198.51.100.1:6000"), end("192.0.2.7:53"))
        );

        let v6 = "ipv6     10 tcp      6 5 SYN_SENT src=fd00::1 dst=fd00::2 sport=1 dport=2 [UNREPLIED] \
                  src=fd00::2 dst=fd00::1 sport=2 dport=1 mark=0 use=2";
        assert_eq!(parse_tracked(v6).unwrap()[0].unwrap().progress, Progress::Opening);

        for other in [
            "",
            "ipv4 2 icmp 1 29 src=1.2.3.4 dst=1.2.3.5 type=8 code=0 id=7",
            "ipv4 2 tcp 6 9 CLOSE",
            "ipv4 2 udp 17 20 src=10.0.0.1 dst=10.0.0.2 sport=4000 dport=53 src=10.0.0.2 dst=10.0.0.1 sport=53 dport=4000",
        ] {
            assert!(parse_tracked(other).is_none(), "{other}");
        }
    }

    #[test]
    fn ctnetlink_messages() {
        let tuple = |request: Request, kind, src: [u8; 4], dst: [u8; 4], sport: u16, dport: u16| {
            request.nested(kind, |t| {
                t.nested(1, |ip| ip.attr(1, &src).attr(2, &dst)).nested(2, |p| {
                    p.attr(1, &[protocol::TCP])
                        .attr(2, &sport.to_be_bytes())
                        .attr(3, &dport.to_be_bytes())
                })
            })
        };
        let request = tuple(Request::new(0, 0), 1, [10, 0, 0, 1], [10, 0, 0, 2], 4000, 80);
        let request = tuple(request, 2, [10, 0, 0, 2], [10, 0, 0, 1], 80, 4000);
        let whole = request
            .attr(3, &8_u32.to_be_bytes())
            .nested(4, |i| i.nested(1, |t| t.attr(1, &[3])));
        let [first, second] = parse_ctnetlink(whole.payload()).unwrap();
        assert_eq!(first, Some(tcp("10.0.0.1:4000", "10.0.0.2:80")));
        assert_eq!(second, None);
        assert!(parse_ctnetlink(&[]).is_none());
    }

    #[test]
    fn a_kernel_that_tracks_nothing_or_not_by_netlink_is_no_error() {
        tracked_by_netlink().unwrap();
    }

    #[test]
    fn the_end_that_listens_was_called() {
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
                // Nothing listens on IPv6 port 80: 0.0.0.0 is IPv4 only.
                (80, 5002, Progress::OpenerClosed),
            ]
        );
        // A socket that serves IPv4 as mapped addresses is the same end as an IPv4 one.
        assert!(found[1].responder.addr.is_v4());
    }
}
