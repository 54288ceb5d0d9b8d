//! Live connections from the conntrack map, and the report of those that a set of policies would cut.
//!
//! `palisade_policy::cuts` decides. Start at [`would_cut`] and [`denied`].

use std::collections::BTreeMap;

use palisade_abi::{CtEntry, CtKey, Direction, EndpointState, ct_flags, protocol};
use palisade_datapath::{Datapath, MapError};
use palisade_policy::{
    compile::Compiler,
    cuts::{Connection, Cut, CutFinder, CutReason},
};

use super::{fqdn::FqdnManager, state::NODE, view::View};
use crate::control::api::{CutRow, Session, WouldCut};

/// Largest number of connections in a report.
const MAX_ROWS: usize = 1_000;

/// Returns the live connections that the policies of `after` cut and those of `before` do not. Live are the connections of
/// all endpoints that both ends have used and that pass now. `now`: ns of the coarse monotonic clock.
pub(super) fn would_cut(
    datapath: &Datapath,
    names: &FqdnManager,
    view: &View,
    [before, after]: [&Compiler; 2],
    now: u64,
) -> Result<WouldCut, MapError> {
    let (mut cut_before, mut cut_after) = (CutFinder::new(before), CutFinder::new(after));
    let mut report = Report::default();
    datapath.conntrack().for_each(|key, entry| {
        if !is_live(&key, &entry, now) {
            return;
        }
        report.live += 1;
        let connection = with_names(&key, &entry, names);
        if let Some(cut) = cut_after.find(0, &connection)
            && !cut_before.is_cut(&connection)
        {
            report.add(cut, connection);
        }
    })?;
    Ok(report.finish(view, after))
}

/// Returns the connections that the policies of `compiler` cut, of those that both ends have used and that have not ended,
/// without those that the programs have passed under the policy in force. `compiler` is called only if there is such a
/// connection. `now`: ns of the coarse monotonic clock.
///
/// # Errors
/// The map cannot be read, or `compiler` fails.
pub(super) fn denied<C: AsRef<Compiler>>(
    datapath: &Datapath,
    names: &FqdnManager,
    view: &View,
    compiler: impl FnOnce() -> Result<C, String>,
    now: u64,
) -> Result<WouldCut, String> {
    let states = datapath.endpoint_states();
    let is_suspect = |key: &CtKey, entry: &CtEntry| {
        is_unsettled(&states, key, entry) && is_live(key, &evaluated(entry), now)
    };
    let error = |error: MapError| error.to_string();
    let mut has_suspects = false;
    let conntrack = datapath.conntrack();
    conntrack
        .for_each(|key, entry| has_suspects = has_suspects || is_suspect(&key, &entry))
        .map_err(error)?;
    if !has_suspects {
        return Ok(WouldCut::default());
    }
    let compiler = compiler()?;
    let mut finder = CutFinder::new(compiler.as_ref());
    let mut report = Report::default();
    conntrack
        .for_each(|key, entry| {
            if !is_suspect(&key, &entry) {
                return;
            }
            report.live += 1;
            let connection = with_names(&key, &entry, names);
            if let Some(cut) = finder.find(0, &connection) {
                report.add(cut, connection);
            }
        })
        .map_err(error)?;
    Ok(report.finish(view, compiler.as_ref()))
}

/// Returns whether the programs have not passed a flow under the policy in force, so that it can be denied. `states`: those
/// of all endpoints.
pub(super) fn is_unsettled(states: &BTreeMap<u16, EndpointState>, key: &CtKey, entry: &CtEntry) -> bool {
    let in_force = states.get(&key.endpoint).map_or(0, |state| state.revision);
    entry.revision == 0 || entry.revision != in_force
}

/// Returns whether the policies of `finder` deny an unsettled flow. A flow of a protocol without ports counts as denied, since
/// only the programs evaluate such flows.
pub(super) fn is_denied(
    finder: &mut CutFinder<'_>,
    names: &FqdnManager,
    key: &CtKey,
    entry: &CtEntry,
) -> bool {
    if !has_ports(key) {
        return true;
    }
    let cut = finder.find(0, &with_names(key, entry, names));
    cut.is_some_and(|cut| cut.reason == CutReason::Denied)
}

/// Returns whether the protocol of a flow has ports.
pub(super) const fn has_ports(key: &CtKey) -> bool {
    matches!(key.protocol, protocol::TCP | protocol::UDP | protocol::SCTP)
}

/// Returns an entry as if the policy had not denied the connection since.
fn evaluated(entry: &CtEntry) -> CtEntry {
    CtEntry {
        revision: 1,
        ..*entry
    }
}

/// Connections that are cut: their number, and at most [`MAX_ROWS`] of them with their reasons, so that the memory does
/// not depend on the size of the conntrack map.
#[derive(Default)]
struct Report {
    cut: Vec<(Cut, Connection)>,
    total: usize,
    live: usize,
}

impl Report {
    fn add(&mut self, cut: Cut, connection: Connection) {
        self.total += 1;
        self.cut.push((cut, connection));
        if self.cut.len() >= 2 * MAX_ROWS {
            self.keep_first();
        }
    }

    /// Keeps the connections that are shown first: TCP connections, and of these the ones to the node.
    fn keep_first(&mut self) {
        self.cut.sort_by_key(|(_, connection)| {
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
        self.cut.truncate(MAX_ROWS);
    }

    fn finish(mut self, view: &View, compiler: &Compiler) -> WouldCut {
        self.keep_first();
        let diagnostics = &compiler.snapshot().diagnostics;
        WouldCut {
            connections: self
                .cut
                .iter()
                .map(|(cut, connection)| row(view, cut, connection))
                .collect(),
            total: self.total,
            live: self.live,
            warnings: diagnostics.iter().map(ToString::to_string).collect(),
        }
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
    let mut finder = CutFinder::new(compiler);
    let (mut named, mut total) = (Vec::new(), 0);
    datapath.conntrack().for_each(|key, entry| {
        if !is_session(&key, &entry, now) {
            return;
        }
        let connection = connection(&key, &entry, |_| Vec::new());
        if named.len() >= NAMED {
            total += usize::from(finder.is_cut(&connection));
        } else if let Some(cut) = finder.find(0, &connection) {
            total += 1;
            let [peer, node] = connection.opener_and_responder();
            named.push(format!("{peer} -> {node} by {}", cut.decided_by));
        }
    })?;
    Ok((named, total))
}

/// Returns the connection of a TCP session of an endpoint, as the programs know it; `None` if they do not.
pub(super) fn of_session(
    datapath: &Datapath,
    names: &FqdnManager,
    endpoint: u16,
    session: &Session,
    now: u64,
) -> Option<Connection> {
    let key = CtKey {
        local: session.local.ip().to_canonical().into(),
        remote: session.peer.ip().to_canonical().into(),
        local_port: session.local.port(),
        remote_port: session.peer.port(),
        endpoint,
        protocol: protocol::TCP,
        zero: 0,
    };
    let entry = datapath.conntrack().get(&key).ok()??;
    is_live(&key, &evaluated(&entry), now).then(|| with_names(&key, &entry, names))
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
    has_ports(key) && is_used && passes && entry.expires > now
}

fn with_names(key: &CtKey, entry: &CtEntry, names: &FqdnManager) -> Connection {
    connection(key, entry, |address| {
        let names = names.names_of(key.endpoint, address);
        names.iter().map(|name| name.to_string()).collect()
    })
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

    #[test]
    fn a_report_of_a_million_connections_keeps_the_first_rows_and_the_number() {
        const ALL: u32 = 1_000_000;
        let mut report = Report::default();
        for n in (0..ALL).rev() {
            let cut = Cut {
                connection: 0,
                reason: CutReason::Denied,
                decided_by: String::new(),
                location: None,
            };
            let connection = Connection {
                endpoint: 2,
                direction: Direction::Egress,
                protocol: protocol::TCP,
                local: std::net::Ipv4Addr::new(192, 0, 2, 1).into(),
                local_port: 40_000,
                remote: std::net::Ipv4Addr::from(n).into(),
                remote_port: 443,
                inspector: 0,
                names: Vec::new(),
            };
            report.add(cut, connection);
            assert!(report.cut.len() < 2 * MAX_ROWS);
        }
        report.keep_first();
        assert_eq!((report.total, report.cut.len()), (ALL as usize, MAX_ROWS));
        let kept: Vec<std::net::IpAddr> = report.cut.iter().map(|(_, kept)| kept.remote).collect();
        let first: Vec<std::net::IpAddr> = (0..MAX_ROWS as u32)
            .map(|n| std::net::Ipv4Addr::from(n).into())
            .collect();
        assert_eq!(kept, first);
    }
}
