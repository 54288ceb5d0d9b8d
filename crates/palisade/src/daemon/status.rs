//! `palisade status`: state of the control thread, and counters of the maps and of the other threads.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use palisade_abi::{Decision, Direction, EventKind, MAX_PUNT_FRAME, MAX_PUNT_MSS, maps};
use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    inventory::Enforcement,
    snapshot::{RuleKey, Snapshot, inspector_name},
};

use super::{
    control::Control,
    handlers::{Handlers, map_error},
    message::ClientRequest,
    nat,
    workers::INSPECTORS,
};
use crate::{
    config::{enforcement_name, limit_hint},
    control::api::{
        ConntrackStatus, DropCount, InterfaceStatus, MapFill, MissingInspector, NamesStatus, PolicyFileState,
        Status,
    },
};

/// Interval at which rules that translate addresses are looked up again.
const NAT_CHECK_INTERVAL: Duration = Duration::from_secs(2);

impl Control {
    /// Returns a warning for each interface whose MTU exceeds the longest punted frame, if any traffic is inspected.
    pub(super) fn limited_interfaces(&self, interfaces: &[InterfaceStatus]) -> Vec<String> {
        if self.enforcer.compiler.snapshot().rulesets.is_empty() {
            return Vec::new();
        }
        let mtu = |interface: &InterfaceStatus| self.network.mtus.get(&interface.ifindex).copied();
        interfaces
            .iter()
            .filter_map(|interface| Some((&interface.name, mtu(interface)?)))
            .filter(|(_, mtu)| mtu + 14 > MAX_PUNT_FRAME)
            .map(|(name, mtu)| {
                format!(
                    "interface {name}: its MTU of {mtu} exceeds the longest punted frame ({MAX_PUNT_FRAME} bytes): inspected \
                     connections use segments of at most {MAX_PUNT_MSS} bytes, and longer packets that need \
                     inspection are dropped (232)"
                )
            })
            .collect()
    }

    /// Returns the part of the status that the control thread has.
    pub(super) fn status(&self) -> Status {
        let policy_files = self.files.report();
        let interfaces = self.interfaces.report(&self.datapath);
        let mut missing: Vec<String> = Vec::new();
        if let Some(problem) = &self.enforcer.problem {
            missing.push(format!("the last change is not in force: {problem}"));
        }
        for interface in &interfaces {
            if let Some(problem) = &interface.problem {
                missing.push(format!("interface {}: {problem}", interface.name));
            }
        }
        missing.extend(self.workers.missing());
        missing.extend(self.proxy_link.missing());
        missing.extend(self.interception.missing());
        let mut warnings = self.notes.clone();
        warnings.extend(self.start_notes.iter().cloned());
        if let Some(problem) = self.state.keeper.problem() {
            warnings.push(format!(
                "{problem}: changes since then are NOT KEPT and are lost at the next start; the write is retried"
            ));
        }
        warnings.extend(self.policy_changes.warnings());
        warnings.extend(self.names.journal_problem());
        if let Some(problem) = self.files.unknown() {
            let meaning = match (self.closed, self.config.policy.enforcement) {
                (true, Enforcement::Default) => "closed: everything that no policy allows is denied",
                _ => "open: everything that no other policy denies passes",
            };
            missing.push(format!("{problem}; [node] on_failure = {meaning}"));
        }
        warnings.extend(self.reload_problem.clone());
        warnings.extend(self.files.folder_problem().map(ToOwned::to_owned));
        warnings.extend(self.files.subfolder_warning());
        warnings.extend(self.translation_note());
        warnings.extend(self.netfilter.warnings());
        warnings.extend(self.interception.warnings());
        warnings.extend(self.discovery.warnings());
        if let Some(problem) = self.datapath.replacement_problem() {
            warnings.push(format!(
                "programs of a capture can still be attached: {problem}; they enforce the policy, and the replacement is retried"
            ));
        }
        let exports = self.exports.report();
        for export in &exports {
            if let Some(problem) = &export.problem {
                warnings.push(format!("export {}: {problem}", export.name));
            }
        }
        for file in &policy_files {
            match file.state {
                PolicyFileState::InForce => {}
                PolicyFileState::LastGood => {
                    warnings.push(format!(
                        "{}: broken; its last good content is in force",
                        file.file
                    ));
                }
                PolicyFileState::Unused => {
                    missing.push(format!("{}: broken; nothing of it is in force", file.file));
                }
            }
        }
        warnings.extend(self.limited_interfaces(&interfaces));
        let remarks = &self.enforcer.compiler.snapshot().diagnostics;
        let (notes, problems): (Vec<&Diagnostic>, Vec<&Diagnostic>) = remarks
            .iter()
            .partition(|remark| remark.severity == Severity::Note);
        warnings.extend(problems.into_iter().map(ToString::to_string));
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.config.node.name.clone(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            restarted: self.restarted.clone(),
            ready: missing.is_empty(),
            missing,
            warnings,
            notes: notes.into_iter().map(ToString::to_string).collect(),
            enforcement: enforcement_name(self.config.policy.enforcement).to_owned(),
            audit: self.config.policy.audit,
            revision: self.changes,
            last_change_seconds: self.last_change.as_secs_f64(),
            endpoints: self.endpoints_with(&interfaces),
            interfaces,
            policy_dir: self.config.policy.dir.display().to_string(),
            policy_files,
            pending_change: self.policy_changes.pending(),
            refused_workloads: self.discovery.refusals(),
            workers: self.workers.report(),
            exports,
            ..Status::default()
        }
    }

    /// Returns a note for the operator if this node translates addresses or redirects packets.
    pub(super) fn translation_note(&self) -> Option<String> {
        let mut known = self.translations.borrow_mut();
        if known
            .as_ref()
            .is_none_or(|(when, _)| when.elapsed() > NAT_CHECK_INTERVAL)
        {
            *known = Some((Instant::now(), nat::found()));
        }
        let (_, found) = known.as_ref()?;
        (!found.is_empty()).then(|| {
            format!(
                "this node translates or redirects ({}): policies see the addresses and ports of an incoming packet before DNAT, \
                 of an outgoing one after SNAT; `policy trace` does not know these rules",
                found.join("; ")
            )
        })
    }
}

impl Handlers {
    /// Returns the whole status: the part of the control thread, and the counters of maps and threads.
    pub(super) fn status(&self) -> Result<Status, String> {
        self.with_counters(self.look_up(ClientRequest::Status)?)
    }

    /// Adds the counters of maps and threads to the part of the status that the control thread has.
    pub(super) fn with_counters(&self, mut status: Status) -> Result<Status, String> {
        status.warnings.extend(self.measured.problems());
        status.capture = self.capturing.status();
        let conntrack = self.datapath.conntrack().counts().map_err(map_error)?;
        status.conntrack = ConntrackStatus {
            entries: conntrack.present,
            capacity: conntrack.max_entries,
            made: conntrack.made,
            seeded: conntrack.seeded,
            swept: conntrack.swept,
            evicted: conntrack.evicted,
            protected: conntrack.protected,
        };
        let exhausted = self.datapath.conntrack().exhausted();
        if !exhausted.is_empty() {
            let names: Vec<String> = exhausted.iter().map(ToString::to_string).collect();
            status.warnings.push(format!(
                "endpoints {} use their whole share of the conntrack map: a new connection evicts an older one of the same \
                 endpoint; raise [limits] conntrack",
                names.join(", ")
            ));
        }
        let fills = self.datapath.fill_levels().map_err(map_error)?;
        status.maps = fills
            .into_iter()
            .map(|fill| MapFill {
                map: fill.map.to_lowercase(),
                entries: fill.entries,
                capacity: fill.max_entries,
            })
            .collect();
        for map in &status.maps {
            // The conntrack map is expected to be full on a busy node: it then evicts flows.
            if map.map != maps::CONNTRACK.to_lowercase() && map.entries * 10 > map.capacity * 9 {
                let percent = (map.entries * 100).checked_div(map.capacity).unwrap_or(0);
                let hint = limit_hint(&map.map);
                status
                    .warnings
                    .push(format!("map {} is {percent}% full{hint}", map.map));
            }
        }
        // This list is computed on the thread of the client instead of the control thread, because policy tables can be
        // large.
        status.missing_inspectors = missing_inspectors(&self.shared.get().snapshot);
        let counters = self.datapath.counters();
        for (kind, _, budget) in counters.unsent_events().map_err(map_error)? {
            let (EventKind::PolicyVerdict | EventKind::Drop | EventKind::Trace) = kind;
            status.events.suppressed += budget.suppressed;
            status.events.lost += budget.lost;
        }
        let names = self.names.counts();
        status.names = NamesStatus {
            names: names.names,
            addresses: names.addresses,
            in_map: names.in_map,
            unwritten: names.unwritten,
            bytes: names.bytes,
            committed: names.committed,
            refused: names.refused,
            waited: names.waited,
            evicted: names.stats.evicted,
            over_limit: names.stats.refused,
            special: names.stats.special,
            identities_over_limit: names.over_limit,
            expired: names.stats.expired,
            failures: names.failures,
            failure: names.failure.clone(),
        };
        if let Some(problem) = names.failure {
            status.warnings.push(format!(
                "learned addresses cannot be written, so DNS answers with them are withheld: {problem}"
            ));
        }
        let (hubble, problems) = self.hubble.status();
        status.hubble = hubble;
        status.warnings.extend(problems);
        status.events.read = self.events.load(Ordering::Relaxed);
        status.events.slow_clients = self
            .server
            .get()
            .map_or(0, |counts| counts.slow.load(Ordering::Relaxed));
        // The nftables table counts its drops by the same reasons as the programs.
        let mut counts = counters.reasons().map_err(map_error)?;
        for (reason, direction, more) in self.netfilter.counts() {
            match counts
                .iter_mut()
                .find(|(known, at, _)| (*known, *at) == (reason, direction))
            {
                Some((.., count)) => {
                    count.packets += more.packets;
                    count.bytes += more.bytes;
                }
                None => counts.push((reason, direction, more)),
            }
        }
        counts.sort_by_key(|&(reason, direction, _)| (reason, direction));
        for (reason, direction, count) in counts {
            if reason.is_drop() {
                status.drops.push(DropCount {
                    reason: reason as u8,
                    text: reason.text().to_owned(),
                    direction: direction_name(direction).to_owned(),
                    packets: count.packets,
                    bytes: count.bytes,
                });
            }
        }
        Ok(status)
    }
}

/// Returns the kinds of inspection that policies need and no inspector implements, each with its policies.
fn missing_inspectors(snapshot: &Snapshot) -> Vec<MissingInspector> {
    let mut wanted: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for entry in snapshot.tables.values().flat_map(|table| table.entries.values()) {
        let read = INSPECTORS >> (entry.inspector & 31) & 1 != 0;
        if Decision::from_u8(entry.decision) == Decision::Inspect && !read {
            let policies = wanted.entry(inspector_name(entry.inspector)).or_default();
            if let Some(rule) = snapshot.rules.get(&entry.rule)
                && let RuleKey::Rule(place) = &rule.key
            {
                policies.insert(place.policy.to_string());
            }
        }
    }
    wanted
        .into_iter()
        .map(|(inspector, policies)| MissingInspector {
            inspector: inspector.to_owned(),
            policies: policies.into_iter().collect(),
        })
        .collect()
}

const fn direction_name(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}
