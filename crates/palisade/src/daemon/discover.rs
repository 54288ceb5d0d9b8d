//! Workloads that are found (`[[discover]]`). A thread reads the sources and the interfaces, and leaves a [`Report`] for
//! the control thread when it has changed; `palisade_discover::find` makes endpoints of the report.
//!
//! Until a workload is an endpoint, its interface stays closed: the interface table of the programs does not have it,
//! and the nftables table drops by the patterns of interface names ([`super::interfaces`]). So how fast a report arrives
//! decides only when traffic begins.
//!
//! Depends on [`sources`] and [`engine`] for the sources, [`place`] and [`links`] for the interfaces. Start at
//! [`Discovery`]; the control thread's part is in `workloads.rs`.

mod containerd;
mod docker;
mod engine;
mod follow;
mod links;
mod place;
mod sources;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::AsFd as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        inotify::{AddWatchFlags, InitFlags, Inotify},
    },
};
use palisade_discover::{Found, Interface, Labelled, Outcome, Problem, Rule, Taken, Unknown, Workload, find};
use tracing::{info, warn};

use engine::Engine;
use place::Described;

use super::{network::Network, state::State};
use crate::{
    config::{Config, Discover, DiscoverSource},
    control::api::RefusedWorkloads,
};

/// Multicast groups of rtnetlink: links, IPv4 addresses, IPv6 addresses, and `RTNLGRP_NSID` (28).
const GROUPS: u32 = 0x1 | 0x10 | 0x100 | 1 << 27;
/// Wait after a notification, because a new workload causes a dozen of them.
const DEBOUNCE: Duration = Duration::from_millis(5);
/// Longest time between two reads.
const POLL_INTERVAL_MS: u16 = 2_000;
/// Time between two reads while a source has a name without its network namespace. The kernel sends no notification
/// when `ip netns add` mounts the namespace.
const UNSETTLED_INTERVAL_MS: u16 = 50;
/// After a read, the thread sleeps for this many times the duration of the read, so that changes without end (a
/// workload can add and remove addresses) use at most a quarter of a CPU.
const REST_FACTOR: u32 = 3;
/// Longest such sleep.
const MAX_REST: Duration = Duration::from_secs(2);
/// Number of attempts of the first read. It fails for example if links change while the kernel lists them.
const FIRST_READS: u32 = 5;
/// Time between these attempts.
const FIRST_READ_INTERVAL: Duration = Duration::from_millis(100);
/// Maximum number of problems that `status` shows.
const MAX_PROBLEMS_SHOWN: usize = 20;

/// What the sources and interfaces show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Report {
    /// Number of the configuration that was in force.
    generation: u64,
    /// Workloads of all sources.
    workloads: Vec<Workload>,
    /// Why sources cannot be read, for `status`.
    problems: Vec<String>,
    /// Sources, by kind and place, that have not answered since the daemon began, so that workloads of the last run
    /// stay.
    unanswered: BTreeSet<String>,
    /// Index of each interface of the node that leads into another network namespace, by name.
    links: BTreeMap<String, u32>,
    /// Names of all interfaces of the node, by index; `None` if they have not been read.
    present: Option<BTreeMap<u32, String>>,
    /// Interfaces that lead, or have led, to a workload of a source.
    labelled: Labelled,
    /// Those of `links` that a section with `unknown = "init"` is for, with the addresses inside.
    interfaces: Vec<Interface>,
}

/// Sections, wake-up and result of the thread.
#[derive(Debug)]
struct Shared {
    sections: Mutex<Sections>,
    /// The last report, until the control thread takes it. There is at most one: a workload can change its addresses
    /// faster than the control thread follows, and only the last state counts.
    reported: Mutex<Option<Report>>,
    wake: Arc<EventFd>,
}

/// The `[[discover]]` sections.
#[derive(Clone, Debug, Default)]
struct Sections {
    /// Number of the configuration.
    generation: u64,
    all: Arc<Vec<Discover>>,
    /// The engine of each section that has one.
    engines: Arc<Vec<Option<Arc<Engine>>>>,
}

impl Shared {
    fn sections(&self) -> Sections {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Sections> {
        self.sections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reported(&self) -> MutexGuard<'_, Option<Report>> {
        self.reported.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the engines of these sections; those that run already are used again.
    fn engines(&self, sections: &[Discover], limit: usize) -> io::Result<Vec<Option<Arc<Engine>>>> {
        let running = self.sections().engines;
        let engine = |section: &Discover| {
            let DiscoverSource::Engine { socket, api } = &section.source else {
                return Ok(None);
            };
            let same = running
                .iter()
                .flatten()
                .find(|engine| engine.is_for(socket, api, limit));
            match same {
                Some(engine) => Ok(Some(Arc::clone(engine))),
                None => follow::start(socket.clone(), api.clone(), limit, Arc::clone(&self.wake)).map(Some),
            }
        };
        let engines: Vec<Option<Arc<Engine>>> = sections.iter().map(engine).collect::<io::Result<_>>()?;
        for engine in running.iter().flatten() {
            if !engines.iter().flatten().any(|kept| Arc::ptr_eq(kept, engine)) {
                engine.end();
            }
        }
        Ok(engines)
    }
}

/// Finds workloads.
#[derive(Debug)]
pub(super) struct Discovery {
    shared: Arc<Shared>,
    report: Report,
    /// Workloads that are no endpoints.
    problems: BTreeSet<Problem>,
    /// Number of conflicts since the daemon began.
    conflicts: u64,
}

impl Discovery {
    /// Reads all sources, and starts a thread that reads them again at every change. It calls `changed` when there is a
    /// report for [`Self::take`] and the last one was taken, until `changed` returns false.
    ///
    /// # Errors
    /// The notifications of interfaces or the thread cannot be started.
    pub(super) fn start(
        sections: &[Discover],
        limit: usize,
        mut changed: impl FnMut() -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            sections: Mutex::default(),
            reported: Mutex::default(),
            wake: Arc::new(EventFd::from_flags(
                EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
            )?),
        });
        let engines = shared.engines(sections, limit)?;
        *shared.lock() = Sections {
            generation: 0,
            all: Arc::new(sections.to_vec()),
            engines: Arc::new(engines),
        };
        await_engines(&shared.sections());
        // The notifications are requested before the first read, so that no change is missed.
        let mut watch = Watch::start()?;
        watch.follow(sections);
        let (report, mut is_unsettled) = read_at_start(&shared);
        let mut known = report.clone();
        let of_thread = Arc::clone(&shared);
        thread::Builder::new().name("discover".into()).spawn(move || {
            loop {
                watch.wait(&of_thread.wake, is_unsettled);
                watch.follow(&of_thread.sections().all);
                let begun = Instant::now();
                let report;
                (report, is_unsettled) = read(&of_thread, &known);
                let rest = (begun.elapsed() * REST_FACTOR).min(MAX_REST);
                if report != known {
                    known = report.clone();
                    let is_taken = of_thread.reported().replace(report).is_none();
                    if is_taken && !changed() {
                        return;
                    }
                }
                thread::sleep(rest);
            }
        })?;
        Ok(Self {
            shared,
            report,
            problems: BTreeSet::new(),
            conflicts: 0,
        })
    }

    /// Replaces the sections, and reads the sources.
    ///
    /// # Errors
    /// The thread of an engine cannot be started, and the sections stay as they were.
    pub(super) fn configure(&mut self, sections: &[Discover], limit: usize) -> io::Result<()> {
        let engines = self.shared.engines(sections, limit)?;
        {
            let mut shared = self.shared.lock();
            let is_same = *shared.all == sections;
            shared.engines = Arc::new(engines);
            if is_same {
                return Ok(());
            }
            shared.generation = shared.generation.wrapping_add(1);
            shared.all = Arc::new(sections.to_vec());
        }
        // The thread follows the new sections. An error means that it is awake already.
        let _ = self.shared.wake.write(1);
        (self.report, _) = read(&self.shared, &self.report);
        Ok(())
    }

    /// Takes the report of the thread. Returns false if there is none, or if it was made with an earlier configuration,
    /// which numbers other rules.
    pub(super) fn take(&mut self) -> bool {
        let Some(report) = self.shared.reported().take() else {
            return false;
        };
        let is_current = report.generation == self.shared.sections().generation;
        if is_current {
            self.report = report;
        }
        is_current
    }

    /// Replaces the list of workloads that are no endpoints. Returns those that are new in it.
    pub(super) fn set_problems(&mut self, problems: &BTreeSet<Problem>) -> Vec<Problem> {
        let new: Vec<Problem> = problems.difference(&self.problems).cloned().collect();
        let conflicts = new.iter().filter(|problem| problem.is_conflict).count();
        self.conflicts = self.conflicts.saturating_add(conflicts as u64);
        self.problems.clone_from(problems);
        new
    }

    /// Returns the numbers of workloads that are no endpoints, and of conflicts.
    pub(super) fn refusals(&self) -> RefusedWorkloads {
        RefusedWorkloads {
            now: self.problems.iter().filter(|problem| !problem.is_pending).count(),
            conflicts_total: self.conflicts,
        }
    }

    /// Returns the problems for `status`. None of them makes the node unready, because a workload can cause each of them,
    /// and only its own traffic is denied.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut all: Vec<String> = self.report.problems.clone();
        let (conflicts, others): (Vec<_>, Vec<_>) =
            self.problems.iter().partition(|problem| problem.is_conflict);
        let (pending, others): (Vec<_>, Vec<_>) = others.into_iter().partition(|problem| problem.is_pending);
        // Two lists, so that workloads that are refused for other reasons do not hide a conflict.
        all.extend(refused(conflicts.into_iter()));
        all.extend(refused(others.into_iter()));
        if let Some(first) = pending.first() {
            let more = match pending.len() {
                1 => String::new(),
                n => format!(" (and {} more like it)", n - 1),
            };
            all.push(format!("{}; no endpoint yet{more}", shown(first)));
        }
        all.iter_mut().for_each(|text| text.insert_str(0, "discover: "));
        all
    }
}

fn shown(problem: &Problem) -> String {
    format!("{}: {}", problem.source, problem.message)
}

/// Returns the texts of some workloads that are denied, and the number of the others.
fn refused<'p>(problems: impl Iterator<Item = &'p Problem>) -> Vec<String> {
    let problems: Vec<&Problem> = problems.collect();
    let mut texts: Vec<String> = problems
        .iter()
        .take(MAX_PROBLEMS_SHOWN)
        .map(|problem| shown(problem))
        .collect();
    let more = problems.len().saturating_sub(MAX_PROBLEMS_SHOWN);
    if more > 0 {
        texts.push(format!("{more} more workloads are denied for such reasons"));
    }
    texts
}

/// Returns which endpoints result from a report, given those that were found before.
pub(super) fn resolve<C>(
    config: &Config,
    network: &Network,
    discovery: &Discovery,
    state: &State<C>,
) -> Outcome {
    let report = &discovery.report;
    let rules: Vec<Rule> = config
        .discover
        .iter()
        .map(|section| section.rule.clone())
        .collect();
    let mut taken = taken(config, network);
    let stays = |name: &String, found: &Found| {
        let is_there = report.links.get(&found.interface) == Some(&found.ifindex);
        let is_of_other = |address: &IpAddr| {
            let networks = &taken.networks;
            taken.addresses.contains_key(address) || networks.iter().any(|(of, _)| of.contains(address))
        };
        report.unanswered.contains(&found.origin)
            && is_there
            && !taken.names.contains(name)
            && !taken.interfaces.contains_key(&found.interface)
            && !found.addresses.iter().any(is_of_other)
    };
    let kept: BTreeMap<String, Found> = state
        .discovered
        .iter()
        .filter(|(name, found)| stays(name, found))
        .map(|(name, found)| (name.clone(), found.clone()))
        .collect();
    // A workload of a source that answers must not get what belongs to one of these.
    for (name, found) in &kept {
        let by = format!("{name} ({})", found.source());
        let addresses = found.addresses.iter();
        taken
            .addresses
            .extend(addresses.map(|address| (*address, by.clone())));
        taken.interfaces.insert(found.interface.clone(), by);
        taken.names.insert(name.clone());
    }
    let limit = config.limits.discovered as usize;
    let mut outcome = find(
        &rules,
        &report.workloads,
        &labelled(discovery, state).others(&report.interfaces),
        &taken,
        &state.discovered,
        limit.saturating_sub(kept.len()),
    );
    outcome.found.extend(kept);
    outcome
}

/// Returns the interfaces that lead, or have led, to a workload whose labels are known.
pub(super) fn labelled<C>(discovery: &Discovery, state: &State<C>) -> Labelled {
    let report = &discovery.report;
    let mut labelled = state.labelled.clone();
    labelled.add(&report.labelled);
    if let Some(present) = &report.present {
        labelled.keep_present(present);
    }
    labelled
}

fn taken(config: &Config, network: &Network) -> Taken {
    let mut taken = Taken::default();
    for interface in &config.interfaces {
        taken
            .interfaces
            .insert(interface.name.clone(), "an [[interface]]".to_owned());
    }
    let own = network.addresses.iter().chain(&config.node.addresses);
    taken
        .addresses
        .extend(own.map(|address| (*address, "the node".to_owned())));
    for endpoint in &config.endpoints {
        let name = endpoint.qualified_name();
        let by = format!("endpoint {name} of the configuration");
        taken.interfaces.insert(endpoint.interface.clone(), by.clone());
        taken
            .addresses
            .extend(endpoint.addresses.iter().map(|address| (*address, by.clone())));
        taken.names.insert(name);
    }
    for peer in &config.peers {
        let by = format!("peer {}", peer.name);
        taken
            .networks
            .extend(peer.addresses.iter().map(|network| (*network, by.clone())));
    }
    taken
}

/// Returns the endpoints of `outcome` that are the same run of the same workload as before.
pub(super) fn same_runs(outcome: &Outcome, before: &BTreeMap<String, Found>) -> BTreeMap<String, Found> {
    let is_same =
        |name: &String, found: &Found| before.get(name).is_some_and(|known| known.is_same_run(found));
    let found = outcome.found.iter();
    found
        .filter(|(name, found)| is_same(name, found))
        .map(|(name, found)| (name.clone(), found.clone()))
        .collect()
}

/// Removes from the state what was found by the last run of the daemon and is not there any more. Returns the numbers of
/// these endpoints, whose connections must be forgotten.
pub(super) fn take_over<C>(
    config: &Config,
    network: &Network,
    discovery: &Discovery,
    state: &mut State<C>,
) -> Vec<u16> {
    // The state file of an earlier version has only the endpoints.
    state.labelled.add_found(state.discovered.values());
    if let Some(present) = &discovery.report.present {
        state.labelled.keep_same(present);
    }
    state.labelled = labelled(discovery, state);
    let outcome = resolve(config, network, discovery, state);
    let kept = same_runs(&outcome, &state.discovered);
    let gone = state.discovered.keys().filter(|name| !kept.contains_key(*name));
    let numbers = gone
        .filter_map(|name| state.endpoints.get(name))
        .copied()
        .collect();
    state.discovered = kept;
    numbers
}

/// Waits a moment for engines that have just been started, so that a start of the daemon usually finds their containers
/// at once.
fn await_engines(sections: &Sections) {
    const LONGEST: Duration = Duration::from_secs(2);
    let begun = Instant::now();
    let is_waiting = |engine: &Arc<Engine>| {
        let table = engine.table();
        !table.has_answered && table.problem.is_none()
    };
    while sections.engines.iter().flatten().any(is_waiting) && begun.elapsed() < LONGEST {
        thread::sleep(DEBOUNCE);
    }
}

/// As [`read`], but a failed read is repeated a few times: endpoints that the last run of the daemon has found are closed
/// if it is not known that their interfaces are still there.
fn read_at_start(shared: &Shared) -> (Report, bool) {
    for _ in 1..FIRST_READS {
        let (report, is_unsettled) = read(shared, &Report::default());
        if report.present.is_some() || report.problems.is_empty() {
            return (report, is_unsettled);
        }
        thread::sleep(FIRST_READ_INTERVAL);
    }
    read(shared, &Report::default())
}

/// Reads the sources and the interfaces. Returns also whether a source has a name without its network namespace yet. If
/// they cannot be read, the result is that of `before` with the problem.
fn read(shared: &Shared, before: &Report) -> (Report, bool) {
    let sections = shared.sections();
    let mut report = Report {
        generation: sections.generation,
        ..Report::default()
    };
    if sections.all.is_empty() {
        return (report, false);
    }
    match read_workloads(&sections, &mut report) {
        Ok(is_unsettled) => {
            report.labelled.clone_from(&before.labelled);
            report.labelled.add_workloads(&report.workloads);
            if let Some(present) = &report.present {
                report.labelled.keep_present(present);
            }
            (report, is_unsettled)
        }
        Err(problem) => {
            let problem = format!("{problem}; what was found stays, and what is new stays denied");
            if before.generation == sections.generation {
                report = before.clone();
            } else {
                let origins = sections.all.iter().map(|section| section.source.to_string());
                report.unanswered = origins.collect();
                report.links.clone_from(&before.links);
                report.present.clone_from(&before.present);
                report.labelled.clone_from(&before.labelled);
            }
            report.problems = vec![problem];
            (report, true)
        }
    }
}

/// Number of the section, and name of the namespace or id of the container.
type Key = (usize, String);

fn read_workloads(sections: &Sections, report: &mut Report) -> io::Result<bool> {
    let mut listed = list(sections, report)?;
    let mut numbers = links::Numbers::open()?;
    let first = locate(&mut listed, &mut numbers);
    let (veths, present) = links::veths()?;
    // A number (nsid) is used again once its network namespace is gone, so a name counts only if it has the same
    // namespace and number after the interfaces were read.
    let again = locate(&mut listed, &mut numbers);
    report.links = veths
        .iter()
        .map(|veth| (veth.interface.clone(), veth.ifindex))
        .collect();
    report.present = Some(present);
    let mut inside = Namespaces::default();
    let mut is_unsettled = false;
    for (key, described) in listed {
        let mut workload = described.workload;
        workload.rule = key.0;
        let place = first.get(&key).filter(|place| again.get(&key) == Some(*place));
        is_unsettled |= place.is_none() && workload.problem.is_none();
        if let Some((inode, nsid)) = place {
            workload.netns = *inode;
            if let Some(nsid) = nsid {
                let of_namespace = inside.of(*nsid);
                if let Err(error) = of_namespace
                    && error.kind() == io::ErrorKind::QuotaExceeded
                {
                    workload.problem.get_or_insert(error.to_string());
                }
                // With another error the namespace is gone since the request for its number; its interfaces go too.
                workload.links = links::leading_to(&veths, *nsid, of_namespace.as_ref().ok());
            }
        }
        report.workloads.push(workload);
    }
    // The interface of a container that is missing in a table looks like one without a workload.
    let engines = sections.engines.iter().flatten();
    let is_complete = !engines.into_iter().any(|engine| engine.table().notice.is_some());
    let is_initial = |veth: &&links::Veth| {
        let mut sections = sections.all.iter().map(|section| &section.rule);
        is_complete
            && sections.any(|rule| {
                rule.unknown == Unknown::Init
                    && rule
                        .interfaces
                        .iter()
                        .any(|pattern| pattern.matches(&veth.interface))
            })
    };
    for veth in veths.iter().filter(is_initial) {
        report.interfaces.push(Interface {
            link: veth.link(inside.of(veth.nsid).as_ref().ok()),
            namespace: veth.nsid,
        });
    }
    Ok(is_unsettled)
}

/// Addresses inside of network namespaces, by the number of the namespace; each is requested once.
#[derive(Default)]
struct Namespaces(BTreeMap<i32, io::Result<links::Inside>>);

impl Namespaces {
    fn of(&mut self, nsid: i32) -> &io::Result<links::Inside> {
        self.0.entry(nsid).or_insert_with(|| links::addresses(nsid))
    }
}

/// Returns the workloads of all sources. A name belongs to the first section with its source that it matches.
fn list(sections: &Sections, report: &mut Report) -> io::Result<BTreeMap<Key, Described>> {
    let mut listed: BTreeMap<Key, Described> = BTreeMap::new();
    let mut seen: BTreeSet<(String, String)> = BTreeSet::new();
    for (rule, section) in sections.all.iter().enumerate() {
        let origin = section.source.to_string();
        let of_section = match &section.source {
            DiscoverSource::Netns(dir) => sources::namespaces(dir, &section.rule.names)?,
            DiscoverSource::Cni(dir) => {
                let (containers, problems) = sources::results(dir)?;
                report.problems.extend(problems);
                containers
            }
            DiscoverSource::Engine { socket, .. } => {
                let engine = sections.engines.get(rule).and_then(Option::as_ref);
                let table = engine.map(|engine| engine.table()).unwrap_or_default();
                if !table.has_answered {
                    report.unanswered.insert(origin.clone());
                }
                report.problems.extend(table.notice);
                report
                    .problems
                    .extend(table.problem.map(|(problem, since)| {
                        format!(
                            "{} does not answer since {since}: {problem}; what was found stays, and new containers stay \
                             denied",
                            socket.display()
                        )
                    }));
                BTreeMap::clone(&table.containers)
            }
        };
        for (key, mut described) in of_section {
            if described.is_for(&section.rule.names) && seen.insert((origin.clone(), key.clone())) {
                described.workload.origin.clone_from(&origin);
                listed.insert((rule, key), described);
            }
        }
    }
    Ok(listed)
}

/// Returns inode and number of the network namespace of each workload that has one.
fn locate(
    listed: &mut BTreeMap<Key, Described>,
    numbers: &mut links::Numbers,
) -> BTreeMap<Key, (u64, Option<i32>)> {
    let mut places = BTreeMap::new();
    for (key, described) in listed {
        match described.namespace.find(numbers) {
            Ok(place) => places.extend(place.map(|place| (key.clone(), place))),
            Err(problem) => described.workload.problem = Some(format!("its network namespace: {problem}")),
        }
    }
    places
}

/// Waits for changes of the sources and of interfaces, also of those inside the network namespaces.
struct Watch {
    links: Socket,
    files: Inotify,
    followed: BTreeSet<std::path::PathBuf>,
}

impl Watch {
    fn start() -> io::Result<Self> {
        let mut links = Socket::new(NETLINK_ROUTE)?;
        links.bind(&SocketAddr::new(0, GROUPS))?;
        // Needs CAP_NET_BROADCAST. Without it, changes inside of namespaces are found by the regular reads.
        if let Err(error) = links.set_listen_all_namespaces(true) {
            warn!(%error, "changes of links in other network namespaces are not reported to the daemon: found workloads are followed more slowly");
        }
        links.set_non_blocking(true)?;
        Ok(Self {
            links,
            files: Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?,
            followed: BTreeSet::new(),
        })
    }

    /// Watches the directories of these sections. A directory that does not exist is tried again at the next call.
    fn follow(&mut self, sections: &[Discover]) {
        for section in sections {
            let (DiscoverSource::Netns(dir) | DiscoverSource::Cni(dir)) = &section.source else {
                continue;
            };
            // Watching a directory again replaces its watch, and is needed if the directory was made again.
            let watched = self.files.add_watch(
                dir,
                AddWatchFlags::IN_CREATE
                    | AddWatchFlags::IN_DELETE
                    | AddWatchFlags::IN_MOVED_FROM
                    | AddWatchFlags::IN_MOVED_TO
                    | AddWatchFlags::IN_DELETE_SELF
                    | AddWatchFlags::IN_MOVE_SELF
                    | AddWatchFlags::IN_ONLYDIR,
            );
            if watched.is_ok() && self.followed.insert(dir.clone()) {
                info!(dir = %dir.display(), "workloads are found here");
            }
        }
    }

    fn wait(&self, wake: &EventFd, is_unsettled: bool) {
        let mut fds = [
            PollFd::new(self.links.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.files.as_fd(), PollFlags::POLLIN),
            PollFd::new(wake.as_fd(), PollFlags::POLLIN),
        ];
        let timeout = if is_unsettled {
            UNSETTLED_INTERVAL_MS
        } else {
            POLL_INTERVAL_MS
        };
        match poll(&mut fds, PollTimeout::from(timeout)) {
            Ok(0) => return,
            Ok(_) => thread::sleep(DEBOUNCE),
            Err(problem) => {
                warn!(error = %problem, "changes of workloads cannot be awaited");
                thread::sleep(Duration::from_secs(1));
            }
        }
        let _ = wake.read();
        // The contents do not matter: everything is read again. A bounded number of messages is discarded here, so that
        // a workload that causes messages without end does not keep the thread from reading; the rest ends the next
        // wait at once.
        for _ in 0..1_000 {
            let link = self.links.recv_from_full();
            let file = self.files.read_events();
            let is_lost = matches!(&link, Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENOBUFS as i32));
            if link.is_err() && !is_lost && file.is_err() {
                return;
            }
        }
    }
}
