//! Live connections from the conntrack map, and the report of those that a set of policies would cut.
//!
//! `palisade_policy::cuts` decides. Start at [`live`] and [`report`].

use std::collections::HashSet;

use palisade_abi::{CtEntry, CtKey, Direction, ct_flags, protocol};
use palisade_datapath::{Datapath, MapError};
use palisade_policy::{
    compile::Compiler,
    cuts::{Connection, Cut, CutReason, cuts},
};

use super::{fqdn::FqdnManager, state::NODE, view::View};
use crate::control::api::{CutRow, WouldCut};

/// Largest number of connections in a report.
const MAX_ROWS: usize = 1_000;

/// Returns the live connections of all endpoints: those that both ends have used and that pass now. `now`: ns of the coarse
/// monotonic clock.
pub(super) fn live(datapath: &Datapath, names: &FqdnManager, now: u64) -> Result<Vec<Connection>, MapError> {
    let entries = datapath.conntrack().entries()?;
    let live = entries.iter().filter(|(key, entry)| is_live(key, entry, now));
    Ok(live
        .map(|(key, entry)| {
            connection(key, entry, |address| {
                let names = names.names_of(key.endpoint, address);
                names.iter().map(|name| name.to_string()).collect()
            })
        })
        .collect())
}

/// Returns the connections that both ends have used and that have not ended, without those that the programs have passed
/// under the policy in force. `now`: ns of the coarse monotonic clock.
pub(super) fn not_passed(
    datapath: &Datapath,
    names: &FqdnManager,
    now: u64,
) -> Result<Vec<Connection>, MapError> {
    let states = datapath.endpoint_states();
    let entries = datapath.conntrack().entries()?;
    let suspects = entries.iter().filter(|(key, entry)| {
        let in_force = states.get(&key.endpoint).map_or(0, |state| state.revision);
        (entry.revision == 0 || entry.revision != in_force) && is_live(key, &evaluated(entry), now)
    });
    Ok(suspects
        .map(|(key, entry)| {
            connection(key, entry, |address| {
                let names = names.names_of(key.endpoint, address);
                names.iter().map(|name| name.to_string()).collect()
            })
        })
        .collect())
}

/// Returns an entry as if the policy had not denied the connection since.
fn evaluated(entry: &CtEntry) -> CtEntry {
    CtEntry {
        revision: 1,
        ..*entry
    }
}

/// Returns the connections that the policies of `compiler` cut, as indices.
pub(super) fn cut_numbers(compiler: &Compiler, connections: &[Connection]) -> HashSet<usize> {
    cuts(compiler, connections)
        .into_iter()
        .map(|cut| cut.connection)
        .collect()
}

/// Returns the report on the connections that the policies of `compiler` cut. `before`: connections that the policies in
/// force cut as well, which are left out.
pub(super) fn report(
    compiler: &Compiler,
    view: &View,
    connections: &[Connection],
    before: &HashSet<usize>,
) -> WouldCut {
    let mut cut: Vec<(Cut, &Connection)> = cuts(compiler, connections)
        .into_iter()
        .filter(|cut| !before.contains(&cut.connection))
        .filter_map(|cut| {
            let connection = connections.get(cut.connection)?;
            Some((cut, connection))
        })
        .collect();
    let total = cut.len();
    cut.sort_by_key(|(_, connection)| {
        let to_node = connection.endpoint == NODE && connection.direction == Direction::Ingress;
        let is_tcp = connection.protocol == protocol::TCP;
        (
            !is_tcp,
            !to_node,
            connection.endpoint,
            connection.remote,
            connection.port(),
        )
    });
    cut.truncate(MAX_ROWS);
    let snapshot = compiler.snapshot();
    WouldCut {
        connections: cut
            .iter()
            .map(|(cut, connection)| row(view, cut, connection))
            .collect(),
        total,
        live: connections.len(),
        warnings: snapshot.diagnostics.iter().map(ToString::to_string).collect(),
    }
}

/// Returns the TCP connections that peers have opened to the node and that its policies deny, in words: at most five, and
/// their number. They keep their conntrack entries, so this holds after the policy is in force, too.
pub(super) fn cut_sessions(
    datapath: &Datapath,
    compiler: &Compiler,
    now: u64,
) -> Result<(Vec<String>, usize), MapError> {
    const NAMED: usize = 5;
    let entries = datapath.conntrack().entries()?;
    let sessions: Vec<Connection> = entries
        .iter()
        .filter(|(key, entry)| is_session(key, entry, now))
        .map(|(key, entry)| connection(key, entry, |_| Vec::new()))
        .collect();
    let cut = cuts(compiler, &sessions);
    let named = cut.iter().take(NAMED).filter_map(|cut| {
        let [peer, node] = sessions.get(cut.connection)?.opener_and_responder();
        Some(format!("{peer} -> {node} by {}", cut.decided_by))
    });
    Ok((named.collect(), cut.len()))
}

/// Returns whether the flow is a TCP connection that a peer has opened to the node and that has not ended.
fn is_session(key: &CtKey, entry: &CtEntry, now: u64) -> bool {
    key.endpoint == NODE
        && key.protocol == protocol::TCP
        && entry.flags & ct_flags::INGRESS != 0
        && is_live(key, &evaluated(entry), now)
}

fn is_live(key: &CtKey, entry: &CtEntry, now: u64) -> bool {
    let is_used = entry.flags & (ct_flags::REPLIED | ct_flags::SEEDED) != 0;
    let passes = entry.revision != 0 && entry.flags & ct_flags::CLOSED == 0;
    let has_ports = matches!(key.protocol, protocol::TCP | protocol::UDP | protocol::SCTP);
    has_ports && is_used && passes && entry.expires > now
}

fn connection(
    key: &CtKey,
    entry: &CtEntry,
    names: impl FnOnce(std::net::IpAddr) -> Vec<String>,
) -> Connection {
    let direction = if entry.flags & ct_flags::INGRESS != 0 {
        Direction::Ingress
    } else {
        Direction::Egress
    };
    let remote = key.remote.into();
    Connection {
        endpoint: key.endpoint,
        direction,
        protocol: key.protocol,
        local: key.local.into(),
        local_port: key.local_port,
        remote,
        remote_port: key.remote_port,
        inspector: entry.inspector,
        names: match direction {
            Direction::Egress => names(remote),
            Direction::Ingress => Vec::new(),
        },
    }
}

fn row(view: &View, cut: &Cut, connection: &Connection) -> CutRow {
    let [source, destination] = connection.opener_and_responder();
    CutRow {
        endpoint: connection.endpoint,
        endpoint_name: view.owner(connection.endpoint).map_or_else(
            || connection.endpoint.to_string(),
            |owner| match &*owner.namespace {
                "" => owner.name.to_string(),
                namespace => format!("{namespace}/{}", owner.name),
            },
        ),
        is_node: connection.endpoint == NODE,
        direction: match connection.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        }
        .to_owned(),
        protocol: match connection.protocol {
            protocol::TCP => "TCP",
            protocol::UDP => "UDP",
            _ => "SCTP",
        }
        .to_owned(),
        source: source.to_string(),
        destination: destination.to_string(),
        effect: match cut.reason {
            CutReason::Denied => "denied",
            CutReason::Reset => "reset",
        }
        .to_owned(),
        decided_by: cut.decided_by.clone(),
    }
}

#[cfg(test)]
mod tests {
    use palisade_abi::Addr;

    use super::*;

    fn entry(flags: u8) -> CtEntry {
        CtEntry {
            expires: 100,
            revision: 3,
            flags,
            ..CtEntry::default()
        }
    }

    #[test]
    fn only_answered_connections_that_pass_now_are_live() {
        let key = CtKey {
            protocol: protocol::TCP,
            ..CtKey::default()
        };
        assert!(is_live(&key, &entry(ct_flags::REPLIED), 99));
        assert!(is_live(&key, &entry(ct_flags::SEEDED), 99));
        assert!(!is_live(&key, &entry(0), 99), "an unanswered SYN is live");
        assert!(
            !is_live(&key, &entry(ct_flags::REPLIED), 100),
            "an expired one is live"
        );
        assert!(!is_live(&key, &entry(ct_flags::REPLIED | ct_flags::CLOSED), 99));
        let denied = CtEntry {
            revision: 0,
            ..entry(ct_flags::REPLIED)
        };
        assert!(!is_live(&key, &denied, 99), "a denied one is live");
        let echo = CtKey {
            protocol: protocol::ICMP,
            ..key
        };
        assert!(!is_live(&echo, &entry(ct_flags::REPLIED), 99));
    }

    #[test]
    fn the_end_that_opened_a_connection_is_its_source() {
        let key = CtKey {
            local: Addr::from_v4([192, 0, 2, 1]),
            remote: Addr::from_v4([198, 51, 100, 7]),
            local_port: 22,
            remote_port: 40_000,
            endpoint: NODE,
            protocol: protocol::TCP,
            zero: 0,
        };
        let ends = |flags| {
            let connection = connection(&key, &entry(flags), |_| vec!["example.com".to_owned()]);
            let [source, destination] = connection.opener_and_responder();
            (
                source.to_string(),
                destination.to_string(),
                connection.names.len(),
            )
        };
        let (node, peer) = ("192.0.2.1:22".to_owned(), "198.51.100.7:40000".to_owned());
        assert_eq!(ends(ct_flags::INGRESS), (peer.clone(), node.clone(), 0));
        assert_eq!(ends(0), (node, peer, 1));
    }
}
