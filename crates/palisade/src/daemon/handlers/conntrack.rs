//! The conntrack table: `palisade bpf ct list` and `palisade bpf ct flush`.

use std::{cell::RefCell, io, net::IpAddr, ops::ControlFlow};

use ipnet::IpNet;
use palisade_abi::{CtEntry, CtKey, ct_flags, protocol};
use palisade_datapath::{Fate, monotonic_coarse};
use palisade_policy::cuts::CutFinder;

use super::{Handlers, map_error};
use crate::{
    control::{
        api::{Answer, ConnectionFilter, ConnectionRow, Flushed},
        server::Sink,
    },
    daemon::{cuts, message::ClientRequest},
};

/// Largest number of connections in one line of an answer.
const ROWS_PER_LINE: usize = 512;

/// A [`ConnectionFilter`] with the number of its endpoint.
struct Selected<'f> {
    filter: &'f ConnectionFilter,
    endpoint: Option<u16>,
}

impl Selected<'_> {
    fn has(&self, key: &CtKey, entry: &CtEntry) -> bool {
        let filter = self.filter;
        let any = |list_is_empty: bool, found: bool| list_is_empty || found;
        let ends = [key.local, key.remote].map(|address| IpNet::from(IpAddr::from(address)));
        let ports = [key.local_port, key.remote_port];
        self.endpoint.is_none_or(|endpoint| endpoint == key.endpoint)
            && filter.protocol.is_none_or(|number| number == key.protocol)
            && filter
                .ingress
                .is_none_or(|ingress| ingress == (entry.flags & ct_flags::INGRESS != 0))
            && filter
                .identity
                .is_none_or(|identity| identity == entry.remote_identity)
            && any(
                filter.addresses.is_empty(),
                filter
                    .addresses
                    .iter()
                    .any(|prefix| ends.iter().any(|end| prefix.contains(end))),
            )
            && any(
                filter.ports.is_empty(),
                cuts::has_ports(key) && filter.ports.iter().any(|port| ports.contains(port)),
            )
    }
}

impl Handlers {
    fn selected<'f>(&self, filter: &'f ConnectionFilter) -> Result<Selected<'f>, String> {
        Ok(Selected {
            filter,
            endpoint: self.endpoint_number(filter.endpoint.clone())?,
        })
    }

    /// Sends the entries, in no particular order, while the table is read.
    pub(super) fn list_connections(&self, filter: &ConnectionFilter, sink: &mut dyn Sink) -> io::Result<()> {
        let selected = match self.selected(filter) {
            Ok(selected) => selected,
            Err(message) => return sink.send(&Answer::Error(message)),
        };
        let now = monotonic_coarse();
        let mut sent = Ok(());
        let walk = self.datapath.conntrack().for_each_chunk(|chunk| {
            let found = chunk.iter().filter(|(key, entry)| selected.has(key, entry));
            let rows: Vec<ConnectionRow> = found.map(|(key, entry)| row(key, entry, now)).collect();
            for rows in rows.chunks(ROWS_PER_LINE) {
                sent = sink.queue(&Answer::Connections(rows.to_vec()));
                if sent.is_err() {
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        });
        sent?;
        sink.send(&match walk {
            Ok(()) => Answer::Ok(serde_json::Value::Null),
            Err(error) => Answer::Error(map_error(error)),
        })
    }

    /// Removes entries. Those of flows that the policies in force deny stay: without its entry such a flow would get a
    /// verdict in the direction of its next packet, which the policies may allow.
    pub(super) fn flush_connections(&self, filter: &ConnectionFilter) -> Result<Flushed, String> {
        let selected = self.selected(filter)?;
        let conntrack = self.datapath.conntrack();
        let states = self.datapath.endpoint_states();
        let is_unsettled = |key: &CtKey, entry: &CtEntry| {
            selected.has(key, entry) && cuts::is_unsettled(&states, key, entry)
        };
        let mut has_unsettled = false;
        conntrack
            .for_each_chunk(|chunk| {
                has_unsettled = chunk.iter().any(|(key, entry)| is_unsettled(key, entry));
                if has_unsettled {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })
            .map_err(map_error)?;
        let compiler = match has_unsettled {
            true => Some(self.look_up(ClientRequest::Compiler)?.compiler),
            false => None,
        };
        let finder = RefCell::new(compiler.as_ref().map(CutFinder::new));
        let is_denied = |key: &CtKey, entry: &CtEntry| {
            is_unsettled(key, entry)
                && match &mut *finder.borrow_mut() {
                    Some(finder) => cuts::is_denied(finder, &self.names, key, entry),
                    // It was settled a moment ago: the policies have changed since.
                    None => true,
                }
        };
        let mut kept = 0;
        let outcome = conntrack
            .remove_if(
                |key, entry| selected.has(key, entry) && !is_denied(key, entry),
                |fate, key, entry| kept += u64::from(fate == Fate::Stays && is_unsettled(key, entry)),
            )
            .map_err(map_error)?;
        Ok(Flushed {
            flushed: outcome.removed,
            kept,
        })
    }
}

fn row(key: &CtKey, entry: &CtEntry, now: u64) -> ConnectionRow {
    let end = |address, port: u16| match IpAddr::from(address) {
        address if matches!(key.protocol, protocol::ICMP | protocol::ICMPV6) => address.to_string(),
        IpAddr::V4(address) => format!("{address}:{port}"),
        IpAddr::V6(address) => format!("[{address}]:{port}"),
    };
    let ingress = entry.flags & ct_flags::INGRESS != 0;
    let (local, remote) = (end(key.local, key.local_port), end(key.remote, key.remote_port));
    let (source, destination) = if ingress { (remote, local) } else { (local, remote) };
    let flags = [
        (ct_flags::AUDIT, "Audit"),
        (ct_flags::REPLIED, "Replied"),
        (ct_flags::SEEDED, "Seeded"),
        (ct_flags::MIDSTREAM, "Midstream"),
        (ct_flags::CLOSED, "Closed"),
    ];
    ConnectionRow {
        protocol: protocol_name(key.protocol),
        direction: if ingress { "IN" } else { "OUT" }.to_owned(),
        source,
        destination,
        endpoint: key.endpoint,
        expires_in_seconds: seconds_until(entry.expires, now),
        forward_packets: entry.forward_packets,
        forward_bytes: entry.forward_bytes,
        reply_packets: entry.reply_packets,
        reply_bytes: entry.reply_bytes,
        forward_tcp: entry.forward_tcp,
        reply_tcp: entry.reply_tcp,
        identity: entry.remote_identity,
        revision: entry.revision,
        rule: entry.rule,
        flags: flags
            .into_iter()
            .filter(|(bit, _)| entry.flags & bit != 0)
            .map(|(_, name)| name.to_owned())
            .collect(),
    }
}

fn seconds_until(time: u64, now: u64) -> i64 {
    let difference = i128::from(time) - i128::from(now);
    i64::try_from(difference / 1_000_000_000).unwrap_or(i64::MAX)
}

fn protocol_name(number: u8) -> String {
    match number {
        protocol::TCP => "TCP".to_owned(),
        protocol::UDP => "UDP".to_owned(),
        protocol::SCTP => "SCTP".to_owned(),
        protocol::ICMP => "ICMP".to_owned(),
        protocol::ICMPV6 => "ICMPv6".to_owned(),
        other => other.to_string(),
    }
}
