//! Content of the maps as rows of an answer: of a daemon, or of a command that reads the maps while no daemon runs.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use palisade_abi::{
    Addr, Class, Counter, CtEntry, CtKey, Decision, Direction, INSIDE, Identity, IpcacheEntry, PolicyEntry,
    PolicyKey, PrefixKey, ct_flags, entry_flags, identity, protocol,
};
use palisade_model::snapshot::inspector_name;

use super::{
    cuts,
    view::{MapNames, class_names, prefix_text},
};
use crate::control::api::{ConnectionFilter, ConnectionRow, IpcacheRow, PolicyRow};

/// Returns the rows of the policy table with the number `policy`, in the order of their keys.
pub(super) fn policy_rows(
    mut entries: Vec<(PolicyKey, PolicyEntry)>,
    policy: u32,
    counters: &BTreeMap<u32, Counter>,
    classes: &[Class],
    names: &dyn MapNames,
) -> Vec<PolicyRow> {
    entries.retain(|(key, _)| key.policy == policy);
    entries.sort_by_key(|(key, _)| (key.direction, key.identity, key.class));
    let classes = class_names(classes);
    let row = |(key, entry): (PolicyKey, PolicyEntry)| {
        let decision = Decision::from_u8(entry.decision);
        let count = counters.get(&entry.rule).copied().unwrap_or_default();
        PolicyRow {
            policy: decision_name(decision).to_owned(),
            direction: match (
                key.direction & !INSIDE == Direction::Ingress as u8,
                key.direction & INSIDE != 0,
            ) {
                (true, false) => "Ingress",
                (false, false) => "Egress",
                (true, true) => "Ingress (inside)",
                (false, true) => "Egress (inside)",
            }
            .to_owned(),
            identity: key.identity,
            labels: if key.identity == identity::ANY {
                vec!["ANY".to_owned()]
            } else {
                known_or_number(names, key.identity)
            },
            ports: classes
                .get(&key.class)
                .cloned()
                .unwrap_or_else(|| vec![format!("class {}", key.class)]),
            inspector: (decision == Decision::Inspect).then(|| inspector_name(entry.inspector).to_owned()),
            auth: decision == Decision::AuthRequired,
            audit: entry.flags & entry_flags::AUDIT != 0 && !matches!(decision, Decision::Allow),
            rule: entry.rule,
            decided_by: names.rule(entry.rule),
            bytes: count.bytes,
            packets: count.packets,
        }
    };
    entries.into_iter().map(row).collect()
}

/// Returns the rows of the ipcache: addresses, then prefixes, each in ascending order.
pub(super) fn ipcache_rows(
    mut addresses: Vec<(Addr, IpcacheEntry)>,
    mut prefixes: Vec<(PrefixKey, IpcacheEntry)>,
    names: &dyn MapNames,
) -> Vec<IpcacheRow> {
    addresses.sort_by_key(|(address, _)| IpAddr::from(*address));
    prefixes.sort_by_key(|(key, _)| (IpAddr::from(key.addr), key.length));
    let addresses = addresses.into_iter().map(|(address, entry)| {
        let address = IpAddr::from(address);
        let length = if address.is_ipv4() { 32 } else { 128 };
        (format!("{address}/{length}"), entry)
    });
    let prefixes = prefixes.into_iter().map(|(key, entry)| (prefix_text(key), entry));
    addresses
        .chain(prefixes)
        .map(|(prefix, entry)| IpcacheRow {
            prefix,
            identity: entry.identity,
            endpoint: entry.endpoint,
            labels: names.labels(entry.identity),
        })
        .collect()
}

fn known_or_number(names: &dyn MapNames, identity: Identity) -> Vec<String> {
    let labels = names.labels(identity);
    if labels.is_empty() {
        vec![format!("identity {identity}")]
    } else {
        labels
    }
}

const fn decision_name(decision: Decision) -> &'static str {
    match decision {
        Decision::Allow => "Allow",
        Decision::Inspect => "Inspect",
        Decision::AuthRequired => "Auth",
        Decision::Deny | Decision::DenyExplicit | Decision::DenyQuic => "Deny",
    }
}

/// A [`ConnectionFilter`] with the number of its endpoint.
pub(super) struct Selected<'f> {
    pub filter: &'f ConnectionFilter,
    pub endpoint: Option<u16>,
}

impl Selected<'_> {
    /// Returns whether an entry matches.
    pub(super) fn has(&self, key: &CtKey, entry: &CtEntry) -> bool {
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

/// Returns the row of a conntrack entry. `now`: time of the coarse monotonic clock.
pub(super) fn connection_row(key: &CtKey, entry: &CtEntry, now: u64) -> ConnectionRow {
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
