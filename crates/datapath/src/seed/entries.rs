//! Conntrack entries of connections.

use std::collections::{BTreeMap, HashSet};

use palisade_abi::{Addr, Config, CtEntry, CtKey, ct_flags, protocol};

use super::connection::{Connection, Progress};

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

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::End;

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
}
