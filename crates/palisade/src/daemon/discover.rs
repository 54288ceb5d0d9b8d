//! Workloads that are found (`[[discover]]`). A thread reads the sources and the interfaces, and sends a [`Report`] to
//! the control thread when it has changed; `palisade_discover::find` makes endpoints of the report.
//!
//! Until a workload is an endpoint, its interface stays closed: the interface table of the programs does not have it,
//! and the nftables table drops by the patterns of interface names ([`super::interfaces`]). So how fast a report arrives
//! decides only when traffic begins.
//!
//! Depends on [`netns`] for the sources and [`links`] for the interfaces. Start at [`Discovery`]; the control thread's
//! part is in `workloads.rs`.

mod links;
mod netns;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
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
use palisade_discover::{Found, Outcome, Problem, Rule, Taken, Workload, find};
use tracing::{info, warn};

use super::{network::Network, state::State};
use crate::config::{Config, Discover, DiscoverSource};

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
/// Maximum number of problems that `status` shows.
const MAX_PROBLEMS_SHOWN: usize = 20;

/// What the sources and interfaces show.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Report {
    /// Number of the configuration that was in force.
    generation: u64,
    /// Workloads of all sources.
    workloads: Vec<Workload>,
    /// Why sources cannot be read, for `status`.
    problems: Vec<String>,
    /// Kinds of sources that have not answered since the daemon began, so that workloads of the last run stay.
    unanswered: BTreeSet<String>,
    /// Index of each interface of the node that leads into another network namespace, by name.
    links: BTreeMap<String, u32>,
}

/// Sections and wake-up of the thread.
#[derive(Debug)]
struct Shared {
    sections: Mutex<(u64, Arc<Vec<Discover>>)>,
    wake: EventFd,
}

impl Shared {
    fn sections(&self) -> (u64, Arc<Vec<Discover>>) {
        let sections = self.lock();
        (sections.0, Arc::clone(&sections.1))
    }

    fn lock(&self) -> MutexGuard<'_, (u64, Arc<Vec<Discover>>)> {
        self.sections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Finds workloads.
#[derive(Debug)]
pub(super) struct Discovery {
    shared: Arc<Shared>,
    report: Report,
    /// Workloads that are no endpoints.
    problems: BTreeSet<Problem>,
}

impl Discovery {
    /// Reads all sources, and starts a thread that passes every later report to `changed` until `changed` returns false.
    ///
    /// # Errors
    /// The notifications of interfaces or the thread cannot be started.
    pub(super) fn start(
        sections: &[Discover],
        mut changed: impl FnMut(Report) -> bool + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            sections: Mutex::new((0, Arc::new(sections.to_vec()))),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        });
        // The notifications are requested before the first read, so that no change is missed.
        let mut watch = Watch::start()?;
        watch.follow(sections);
        let (report, mut is_unsettled) = read(&shared);
        let mut known = report.clone();
        let of_thread = Arc::clone(&shared);
        thread::Builder::new().name("discover".into()).spawn(move || {
            loop {
                watch.wait(&of_thread.wake, is_unsettled);
                let (_, sections) = of_thread.sections();
                watch.follow(&sections);
                let begun = Instant::now();
                let report;
                (report, is_unsettled) = read(&of_thread);
                let rest = (begun.elapsed() * REST_FACTOR).min(MAX_REST);
                if report != known {
                    known = report.clone();
                    if !changed(report) {
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
        })
    }

    /// Replaces the sections, and reads the sources.
    pub(super) fn configure(&mut self, sections: &[Discover]) {
        {
            let mut shared = self.shared.lock();
            if *shared.1 == sections {
                return;
            }
            *shared = (shared.0.wrapping_add(1), Arc::new(sections.to_vec()));
        }
        // The thread follows the new sources. An error means that it is awake already.
        let _ = self.shared.wake.write(1);
        (self.report, _) = read(&self.shared);
    }

    /// Takes a report of the thread. Returns false if it was made with an earlier configuration, which numbers other
    /// rules.
    pub(super) fn take(&mut self, report: Report) -> bool {
        let is_current = report.generation == self.shared.sections().0;
        if is_current {
            self.report = report;
        }
        is_current
    }

    /// Replaces the list of workloads that are no endpoints. Returns those that are new in it.
    pub(super) fn set_problems(&mut self, problems: &BTreeSet<Problem>) -> Vec<Problem> {
        let new = problems.difference(&self.problems).cloned().collect();
        self.problems.clone_from(problems);
        new
    }

    /// Returns the problems for `status`.
    pub(super) fn warnings(&self) -> Vec<String> {
        let mut all: Vec<String> = self.report.problems.clone();
        let (pending, refused): (Vec<_>, Vec<_>) = self.problems.iter().partition(|p| p.is_pending);
        let shown = |problem: &&Problem| format!("{}: {}", problem.source, problem.message);
        all.extend(refused.iter().take(MAX_PROBLEMS_SHOWN).map(shown));
        if let Some(more) = refused.len().checked_sub(MAX_PROBLEMS_SHOWN)
            && more > 0
        {
            all.push(format!("{more} more workloads are denied for such reasons"));
        }
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
    let taken = taken(config, network);
    let mut outcome = find(
        &rules,
        &report.workloads,
        &taken,
        &state.discovered,
        config.limits.discovered as usize,
    );
    for (name, found) in &state.discovered {
        let is_there = report.links.get(&found.interface) == Some(&found.ifindex);
        let is_free = !taken.names.contains(name)
            && !taken.interfaces.contains_key(&found.interface)
            && !found.addresses.iter().any(|a| taken.addresses.contains_key(a));
        if report.unanswered.contains(&found.kind) && is_there && is_free {
            outcome.found.entry(name.clone()).or_insert_with(|| found.clone());
        }
    }
    outcome
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

/// Reads the sources and the interfaces. Returns also whether a source has a name without its network namespace yet.
fn read(shared: &Shared) -> (Report, bool) {
    let (generation, sections) = shared.sections();
    let mut report = Report {
        generation,
        ..Report::default()
    };
    if sections.is_empty() {
        return (report, false);
    }
    let mut is_unsettled = false;
    match read_workloads(&sections, &mut report, &mut is_unsettled) {
        Ok(()) => {}
        Err(problem) => {
            report.problems.push(format!(
                "interfaces cannot be read: {problem}; what was found stays"
            ));
            report.unanswered.extend(kinds(&sections));
        }
    }
    (report, is_unsettled)
}

fn kinds(sections: &[Discover]) -> impl Iterator<Item = String> + '_ {
    sections.iter().map(|section| section.source.kind().to_owned())
}

fn read_workloads(sections: &[Discover], report: &mut Report, is_unsettled: &mut bool) -> io::Result<()> {
    let mut numbers = links::Numbers::open()?;
    let names = netns::read(sections, &mut numbers)?;
    let veths = links::veths()?;
    // A number (nsid) is used again once its network namespace is gone, so a name counts only if it has the same
    // namespace and number after the interfaces were read.
    let again = netns::read(sections, &mut numbers)?;
    report.links = veths
        .iter()
        .map(|veth| (veth.interface.clone(), veth.ifindex))
        .collect();
    let mut inside = BTreeMap::new();
    for name in &names.found {
        *is_unsettled |= !again.found.contains(name);
        let mut workload = Workload {
            rule: name.rule,
            name: name.name.clone(),
            netns: name.inode,
            ..Workload::default()
        };
        if let Some(nsid) = name.nsid
            && again.found.contains(name)
        {
            if let std::collections::btree_map::Entry::Vacant(vacant) = inside.entry(nsid) {
                // The namespace can go between two requests; then its interfaces go too.
                vacant.insert(links::addresses(nsid).unwrap_or_default());
            }
            workload.links = links::leading_to(&veths, nsid, inside.get(&nsid));
        }
        report.workloads.push(workload);
    }
    *is_unsettled |= names.is_unsettled || again.is_unsettled;
    report.problems.extend(again.problems);
    Ok(())
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
        links.set_listen_all_namespaces(true)?;
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
            let DiscoverSource::Netns(dir) = &section.source;
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
                info!(dir = %dir.display(), "network namespaces are found here");
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
