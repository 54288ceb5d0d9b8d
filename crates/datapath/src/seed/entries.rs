//! Conntrack entries for seeded connections.

use std::collections::{BTreeMap, HashSet};

use palisade_abi::{Addr, Config, CtEntry, CtKey, ct_flags, protocol};

use super::connection::{Connection, Progress};

/// Addresses of the endpoints of this node.
#[derive(Clone, Debug, Default)]
pub struct LocalEndpoints {
    /// Endpoint id by address.
    pub addresses: BTreeMap<Addr, u16>,
    /// Endpoint id of the node itself.
    pub host: u16,
}

/// Endpoints for which a table of connections is trusted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Every endpoint of this node. This is the scope of nf_conntrack in the node's namespace: its entries come from
    /// packets that the node has processed, and a workload cannot write them.
    Node,
    /// One endpoint. This is the scope of the tables in the endpoint's namespace, which root in the workload can fill
    /// with foreign addresses.
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

/// Returns one conntrack entry for each end of a connection that is an endpoint in the scope of the table. If two
/// connections have the same key, the first connection is used.
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
            // Both addresses belong to the same endpoint, so the packets of the connection pass no guarded interface.
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
    use crate::seed::connection::fixtures::tcp;

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

    #[test]
    fn the_end_that_is_an_endpoint_has_an_entry_in_the_direction_of_the_flow() {
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
    fn sockets_of_a_namespace_seed_only_the_endpoint_of_that_namespace() {
        let known = endpoints(&[("10.0.0.1", 1), ("10.0.1.10", 7), ("10.0.2.10", 8)]);
        // Root in endpoint 7 has assigned 10.0.2.10, the address of endpoint 8, to its loopback.
        let forged = tcp("10.0.2.10:1000", "192.0.2.9:443");
        assert!(seeds(&[(Scope::Endpoint(7), forged)], &known, &config(), 0).is_empty());
        assert_eq!(
            seeds(&[(Scope::Endpoint(8), forged)], &known, &config(), 0).len(),
            1
        );
        // A connection between endpoints 7 and 8 is used only for the endpoint whose namespace has the table.
        let both = tcp("10.0.2.10:1000", "10.0.1.10:80");
        let out = seeds(&[(Scope::Endpoint(7), both)], &known, &config(), 0);
        assert_eq!(out.iter().map(|(key, _)| key.endpoint).collect::<Vec<_>>(), [7]);
        // The sockets of the node are not used for workloads.
        assert!(seeds(&[(Scope::Endpoint(1), forged)], &known, &config(), 0).is_empty());
    }

    #[test]
    fn a_connection_between_two_endpoints_has_two_entries() {
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
    fn other_hosts_and_loops_get_no_entry_and_the_first_duplicate_is_used() {
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
