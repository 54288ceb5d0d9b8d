//! The replay: passes each packet through decoder, path and inspectors.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use palisade_abi::{Event, EventKind, FlowCommand, Reason, event_flags, punt_hook};
use palisade_fqdn::SniAddressIndex;
use palisade_inspect::{
    CommitRequest, CommitResult, Limits,
    record::{Record, Verdict as Seen},
};
use palisade_model::snapshot::Snapshot;
use palisade_packet::{Bytes as _, Packet, Start, decode, flags};
use palisade_policy::compile::Compiler;

use crate::{
    capture::{Captured, Frame, LinkType, Network},
    inspection::{Inspected, Inspection, Prepare, Punted, RuleSets, Surroundings},
    names::{NamePolicy, Names},
    path::{Cx, Path, Site, Timeouts, Verdict},
    sites::{Interface, Sites},
    tables::Tables,
};

/// Maximum number of link types and of mid-stream flows that a summary lists.
const MAX_LISTED: usize = 16;
/// Latest time of a packet, ns since 1970: the latest time of a flow record.
const MAX_TIME: u64 = i64::MAX as u64;
/// Maximum number of sweeps that a gap of the capture causes.
const MAX_SWEEPS: u64 = 4;
/// Nanoseconds of a millisecond.
const MILLISECOND: u64 = 1_000_000;

/// Settings of a replay.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Number of the node's own endpoint.
    pub host: u16,
    /// Lifetimes of flows.
    pub timeouts: Timeouts,
    /// Maximum number of flows in the table.
    pub max_flows: usize,
    /// Maximum number of fragmented datagrams whose ports are stored.
    pub max_fragments: usize,
    /// Available inspectors: bit n for the [`palisade_abi::Inspector`] with number n.
    pub inspectors: u32,
    /// Configured interfaces.
    pub interfaces: Vec<Interface>,
    /// Limits and options of the inspectors.
    pub inspect: Limits,
    /// Limits of learned names.
    pub fqdn: palisade_fqdn::Config,
    /// The part of the policies that concerns names.
    pub names: NamePolicy,
    /// Whether an endpoint must have learned the address of a TLS connection by the connection's server name.
    pub verify_server_names: bool,
}

/// What the packet path reports about a packet.
#[derive(Clone, Debug)]
pub enum Report {
    /// An event of the programs. Its time is in ns since 1970.
    Event(Event),
    /// A record of an inspector.
    Record {
        /// Time of the packet that led to the record, ns since 1970.
        time: u64,
        /// The record.
        record: Box<Record>,
    },
}

/// Counters of a replay.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Summary {
    /// Packets of the capture.
    pub packets: u64,
    /// Bytes of these packets before the capture truncated them.
    pub bytes: u64,
    /// Time of the first and of the last packet, ns since 1970.
    pub time: Option<(u64, u64)>,
    /// Packets that the capture has truncated.
    pub truncated: u64,
    /// Packets whose headers the capture does not contain.
    pub undecodable: u64,
    /// Packets of link types that are not supported, by link type.
    pub unsupported: BTreeMap<LinkType, u64>,
    /// Packets that are older than an earlier packet.
    pub out_of_order: u64,
    /// Packets that are not IP and belong to no known interface.
    pub not_ip: u64,
    /// Packets of which no endpoint has an address.
    pub foreign: u64,
    /// Packets that the node forwards between others.
    pub forwarded: u64,
    /// Verdicts on packets that pass. A packet between two endpoints has two verdicts.
    pub passed: u64,
    /// Verdicts on packets that audit mode lets pass.
    pub audited: u64,
    /// Verdicts on packets that the programs drop, by reason.
    pub drops: BTreeMap<Reason, u64>,
    /// Flows that began, by verdict: allowed, audited, denied. Each denied packet counts, because it creates no flow.
    pub flows: [u64; 3],
    /// Flows whose first packet the capture does not contain.
    pub midstream: u64,
    /// Some of these flows: source and destination of their first captured packet.
    pub midstream_examples: Vec<((IpAddr, u16), (IpAddr, u16))>,
    /// Flows that were removed because the table was full.
    pub evicted: u64,
    /// Flows in the table at the end.
    pub open: usize,
    /// Requests, queries, answers and hellos, by verdict: forwarded, audited, dropped.
    pub records: [u64; 3],
    /// Counters of the inspection.
    pub inspected: Inspected,
    /// Packets that inspectors hold at the end: the capture ends before their verdict.
    pub held: usize,
    /// Packets that inspectors have built.
    pub built: u64,
    /// DNS answers whose addresses were learned, and were not learned.
    pub answers: [u64; 2],
}

/// Replays the packets of a capture.
pub struct Replay {
    path: Path,
    sites: Sites,
    inspection: Inspection,
    names: Names,
    /// Configured interface of each interface of the capture, once it is known.
    interfaces: Vec<Option<Option<Interface>>>,
    reports: Vec<Report>,
    /// Time of the conntrack, ns.
    now: u64,
    next_sweep: u64,
    summary: Summary,
}

/// The parts of a replay that the inspection uses.
struct Around<'a> {
    path: &'a mut Path,
    names: &'a mut Names,
    reports: &'a mut Vec<Report>,
    records: &'a mut [u64; 3],
    now: u64,
    time: u64,
}

impl Surroundings for Around<'_> {
    fn apply(&mut self, command: &FlowCommand) {
        self.path.apply(command, self.now);
    }

    fn learn(&mut self, request: CommitRequest) -> CommitResult {
        self.names
            .learn(request, self.now / MILLISECOND, &mut self.path.cx.tables)
    }

    fn changed_rulesets(&mut self) -> Option<Arc<RuleSets>> {
        let changed = std::mem::take(&mut self.names.rulesets_changed);
        changed.then(|| Arc::clone(&self.path.cx.tables.snapshot().rulesets))
    }

    fn epoch(&self) -> u64 {
        self.names.epoch
    }

    fn record(&mut self, record: &Record) {
        let slot = match record.verdict {
            Seen::Forwarded => 0,
            Seen::Audit => 1,
            Seen::Dropped => 2,
        };
        self.records[slot] += 1;
        self.reports.push(Report::Record {
            time: self.time,
            record: Box::new(*record),
        });
    }
}

impl Replay {
    /// Returns a replay with the policies of a compiler. `prepare` makes the rules of the inspectors.
    #[must_use]
    pub fn new(compiler: Compiler, prepare: Prepare, settings: Settings) -> Self {
        let snapshot = compiler.snapshot().clone();
        let index = settings
            .verify_server_names
            .then(|| Arc::new(SniAddressIndex::default()));
        let inspection = Inspection::new(&settings.inspect, prepare, &snapshot.rulesets, index.clone());
        let cx = Cx {
            tables: Tables::new(snapshot),
            timeouts: settings.timeouts,
            host: settings.host,
            inspectors: settings.inspectors,
            events: Vec::new(),
        };
        Self {
            path: Path::new(cx, settings.max_flows, settings.max_fragments),
            sites: Sites::new(settings.interfaces, settings.host),
            inspection,
            names: Names::new(compiler, &settings.names, settings.fqdn, index),
            interfaces: Vec::new(),
            reports: Vec::new(),
            now: 0,
            next_sweep: 0,
            summary: Summary::default(),
        }
    }

    /// Gives a packet its verdicts. [`Self::reports`] returns the events and records about it. `interface`: name of the
    /// configured interface at which the packet was captured, if the capture does not name it.
    pub fn packet(&mut self, captured: &Captured<'_>, interface: Option<&str>) {
        self.summary.packets += 1;
        self.summary.bytes += u64::from(captured.length);
        let time = captured.time.unwrap_or(self.now).min(MAX_TIME);
        self.advance(time);
        let Some(frame) = captured.frame() else {
            let known = self.summary.unsupported.len() < MAX_LISTED;
            if is_supported(captured.link) {
                self.summary.undecodable += 1;
            } else if known || self.summary.unsupported.contains_key(&captured.link) {
                *self.summary.unsupported.entry(captured.link).or_default() += 1;
            }
            return;
        };
        self.summary.truncated += u64::from(frame.is_truncated());
        let mut headers = Packet::default();
        let decoded = decode_frame(&frame, &mut headers);
        if decoded == Err(Reason::PullFailed) {
            self.summary.undecodable += 1;
            return;
        }
        let tables = &self.path.cx.tables;
        let configured = configured(&mut self.interfaces, captured, interface, &self.sites);
        let sites = match configured {
            Some(interface) => [Some(self.sites.at(interface, &headers, frame.hint, tables)), None],
            None => self.sites.deduce(&headers, tables),
        };
        if sites == [None, None] {
            let counter =
                if headers.is(flags::NOT_IP) || (decoded.is_err() && headers.destination == <_>::default()) {
                    &mut self.summary.not_ip
                } else {
                    &mut self.summary.foreign
                };
            *counter += 1;
            return;
        }
        for site in sites.into_iter().flatten() {
            let verdict = match decoded {
                Ok(()) => self.path.process(site, frame, headers, self.now, time),
                Err(reason) => self.path.malformed(site, frame, headers, reason, time),
            };
            self.count(&verdict);
            self.take_events();
            if verdict.reason.is_drop() {
                break;
            }
            if verdict.request_count > 0 {
                self.inspect(site, &frame, &verdict, time);
            }
        }
    }

    /// Moves the clock of the replay: sweeps expired flows, and handles the timeouts of the inspectors.
    fn advance(&mut self, time: u64) {
        let (first, last) = self.summary.time.unwrap_or((time, time));
        self.summary.time = Some((first.min(time), last.max(time)));
        if time < self.now {
            self.summary.out_of_order += 1;
            return;
        }
        self.now = time;
        if time >= self.next_sweep {
            let interval = self.path.cx.timeouts.sweep.max(MILLISECOND);
            let due = (time - self.next_sweep) / interval + 1;
            self.next_sweep = time.saturating_add(interval);
            self.path.sweep(time);
            self.take_events();
            // The daemon sweeps without packets too, and a learned address is removed only after several sweeps.
            for _ in 0..due.min(MAX_SWEEPS) {
                let Path { cx, flows, .. } = &mut self.path;
                self.names
                    .sweep(flows.peers(), time / MILLISECOND, &mut cx.tables);
            }
        }
        let mut around = Around {
            path: &mut self.path,
            names: &mut self.names,
            reports: &mut self.reports,
            records: &mut self.summary.records,
            now: time,
            time,
        };
        self.inspection.tick(time / MILLISECOND, &mut around);
    }

    fn inspect(&mut self, site: Site, frame: &Frame<'_>, verdict: &Verdict, time: u64) {
        let punted = Punted {
            frame: *frame,
            headers: &verdict.headers,
            requests: verdict.requests.get(..verdict.request_count).unwrap_or_default(),
            ifindex: site.ifindex.max(1),
            hook: if site.point.is_egress_hook() {
                punt_hook::TC_EGRESS
            } else {
                punt_hook::TC_INGRESS
            },
            now: self.now / MILLISECOND,
        };
        let mut around = Around {
            path: &mut self.path,
            names: &mut self.names,
            reports: &mut self.reports,
            records: &mut self.summary.records,
            now: self.now,
            time,
        };
        self.inspection.packet(&punted, &mut around);
        self.take_events();
    }

    fn count(&mut self, verdict: &Verdict) {
        let summary = &mut self.summary;
        match verdict.reason {
            Reason::Forwarded => summary.forwarded += 1,
            Reason::Audited => summary.audited += 1,
            reason if reason.is_drop() => *summary.drops.entry(reason).or_default() += 1,
            _ => summary.passed += 1,
        }
        if verdict.is_midstream {
            summary.midstream += 1;
            if summary.midstream_examples.len() < MAX_LISTED {
                let headers = &verdict.headers;
                summary.midstream_examples.push((
                    (headers.source.into(), headers.source_port),
                    (headers.destination.into(), headers.destination_port),
                ));
            }
        }
    }

    /// Moves the events of the path to the reports.
    fn take_events(&mut self) {
        for event in self.path.cx.events.drain(..) {
            if event.kind == EventKind::PolicyVerdict as u8 {
                let slot = if event.flags & event_flags::AUDIT != 0 {
                    1
                } else if Reason::is_drop_number(event.reason) {
                    2
                } else {
                    0
                };
                self.summary.flows[slot] += 1;
            }
            self.reports.push(Report::Event(event));
        }
    }

    /// Returns the reports about the packets so far, and removes them.
    pub fn reports(&mut self) -> std::vec::Drain<'_, Report> {
        self.reports.drain(..)
    }

    /// Returns whether there is a report.
    #[must_use]
    pub const fn has_reports(&self) -> bool {
        !self.reports.is_empty()
    }

    /// Returns the counters.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let flows = &self.path.flows;
        Summary {
            evicted: flows.evicted,
            open: flows.len(),
            inspected: self.inspection.counts.clone(),
            held: self.inspection.held(),
            built: self.inspection.built(),
            answers: [self.names.committed, self.names.refused],
            ..self.summary.clone()
        }
    }

    /// Returns the compiled policies, with the identities of learned names so far.
    #[must_use]
    pub const fn snapshot(&self) -> &Snapshot {
        self.path.cx.tables.snapshot()
    }

    /// Returns the name by which an endpoint has learned an address last.
    #[must_use]
    pub fn name_of(&self, endpoint: u16, address: IpAddr) -> Option<String> {
        self.names.name_of(endpoint, address)
    }

    /// Returns the time of the clock: that of the newest packet, ns since 1970.
    #[must_use]
    pub const fn now(&self) -> u64 {
        self.now
    }
}

/// Returns the configured interface at which a packet was captured.
fn configured<'a>(
    known: &'a mut Vec<Option<Option<Interface>>>,
    captured: &Captured<'_>,
    otherwise: Option<&str>,
    sites: &Sites,
) -> Option<&'a Interface> {
    let number = captured.interface;
    if number >= known.len() {
        known.resize(number + 1, None);
    }
    known
        .get_mut(number)?
        .get_or_insert_with(|| {
            let named = sites.interface(captured.interface_name);
            named.or_else(|| sites.interface(otherwise?)).cloned()
        })
        .as_ref()
}

/// Returns whether the frames of a link type can be decoded.
const fn is_supported(link: LinkType) -> bool {
    matches!(link.0, 0 | 1 | 12 | 14 | 101 | 108 | 113 | 228 | 229 | 276)
}

/// Decodes a frame.
fn decode_frame(frame: &Frame<'_>, headers: &mut Packet) -> Result<(), Reason> {
    match frame.network {
        Network::Ethernet => decode(frame, Start::Ethernet { tags_removed: 0 }, headers),
        Network::Ip => decode(frame, Start::Network, headers),
        Network::Other(ether_type) => {
            headers.flags = flags::NOT_IP;
            headers.ether_type = ether_type;
            headers.length = frame.len();
            Ok(())
        }
    }
}
