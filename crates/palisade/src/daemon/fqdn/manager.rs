//! Learned names. A DNS answer is forwarded only when the maps hold all addresses that the endpoint learns from it.
//!
//! ```text
//! workers ── CommitRequest ──> names thread: cache ─ changes ─> identities ─> LEARNED ─> commit ── CommitResult ──> workers
//!                          │ an identity that was not made yet             ▲
//!                          └─> control thread: compile, plan, apply ───────┘
//! ```
//!
//! One lock protects the state. The names thread holds the lock while it settles a batch of answers, the control thread
//! from the plan of a policy change to the end of the change. Every answer therefore meets either the old policy or the
//! new one.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt, io,
    net::IpAddr,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_abi::{Identity, LearnedKey};
use palisade_datapath::Datapath;
use palisade_fqdn::{
    Cache, CachedName, ChangeKind, EndpointId, ListedPrefixes, Millis, Pending, SavedName, SelectorId,
    Selectors, Stats, Update,
};
use palisade_inspect::{
    Lease,
    commit::{CommitReceiver, CommitTask, Epoch},
};
use palisade_protocols::dns::{Answer, Name};
use tracing::{error, info, trace};

#[cfg(test)]
use super::learned_map::key;
use super::{
    journal::{self, Journal},
    learned_map::{IdentityResolver, LearnedMap, Outcome, Set, Transition, Writer},
};
use crate::config::with_option;

/// Maximum number of answers that are settled without releasing the lock.
const MAX_BATCH: usize = 64;
/// Longest time that an answer waits for an identity. The worker that holds the packet gives up at about the same time.
const IDENTITY_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval at which the names thread checks for answers that have waited too long.
const TIMEOUT_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Longest sleep of the names thread while no answer waits.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);

/// Takes endpoint, name and address of each address that an endpoint has newly learned.
type OnLearned = Box<dyn Fn(EndpointId, &str, IpAddr) + Send + Sync>;

/// Resolver of the policy in force.
pub(super) type View = Arc<dyn IdentityResolver + Send + Sync>;

/// How an endpoint has learned an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// From a DNS answer to the endpoint.
    Answer,
    /// From a query of this daemon.
    Prefetch,
    /// From the journal after a restart.
    Restored,
}

impl Source {
    /// Returns the name of the source in listings.
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Answer => "answer",
            Self::Prefetch => "prefetch",
            Self::Restored => "restored",
        }
    }
}

/// Request of the FQDN manager to the control thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ControlRequest {
    /// Make the identities that pending answers need and that the policy in force does not have.
    Identities,
    /// Evaluate connections again: see [`FqdnManager::take_reevaluated`].
    Reevaluate,
    /// Remove the identities that no learned address uses any more. Requested after each sweep.
    Prune,
}

/// The learned names of all endpoints, shared by all threads.
pub(crate) struct FqdnManager {
    state: Mutex<State>,
    writer: Box<dyn Writer + Send + Sync>,
    on_request: Box<dyn Fn(ControlRequest) + Send + Sync>,
    /// For each kind of request, whether one waits for the control thread. A second request of the same kind would be
    /// redundant.
    requested: [AtomicBool; 3],
    journal: Option<Journal>,
    known_as: RwLock<HashMap<(EndpointId, IpAddr), KnownAs>>,
    start: Instant,
    answers: Answers,
    /// Epoch of the leases of committed answers.
    epoch: OnceLock<Epoch>,
    /// Takes reports of learned addresses.
    on_learned: OnceLock<OnLearned>,
}

/// Counters of answers.
#[derive(Debug, Default)]
struct Answers {
    committed: AtomicU64,
    refused: AtomicU64,
    waited: AtomicU64,
    /// Refused answers of endpoints that have too many sets of selectors.
    over_limit: AtomicU64,
}

#[derive(Clone, Debug)]
struct KnownAs {
    names: Arc<[Arc<str>]>,
    source: Source,
}

impl fmt::Debug for FqdnManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FqdnManager")
    }
}

/// State that the lock protects.
pub(crate) struct State {
    /// Learned names and addresses, and the content of the map.
    pub learned_map: LearnedMap,
    /// Resolver of the policy in force.
    pub view: View,
    /// Selectors of the policy in force.
    selectors: BTreeMap<EndpointId, Arc<Selectors>>,
    /// Selectors in deny rules, by endpoint.
    denied: HashSet<(EndpointId, SelectorId)>,
    /// Names of endpoints by number.
    endpoints: BTreeMap<EndpointId, String>,
    waiting: Vec<Waiting>,
    reevaluate: BTreeSet<EndpointId>,
}

/// An answer that waits for an identity.
struct Waiting {
    since: Instant,
    pending: Pending,
    /// The worker's request; `None` for an answer to a query of this daemon.
    task: Option<CommitTask>,
}

/// The resolver before the first policy: no address has an identity.
struct NoIdentities;

impl IdentityResolver for NoIdentities {
    fn identity(&self, _: IpAddr, _: &[SelectorId]) -> Option<Identity> {
        None
    }
}

impl IdentityResolver for View {
    fn identity(&self, address: IpAddr, selectors: &[SelectorId]) -> Option<Identity> {
        (**self).identity(address, selectors)
    }
}

impl Writer for Arc<Datapath> {
    fn put(&self, entries: &[(LearnedKey, Identity)]) -> Result<(), String> {
        self.put_learned(entries).map_err(|problem| with_option(&problem))
    }

    fn remove(&self, keys: &[LearnedKey]) -> Result<(), String> {
        self.remove_learned(keys).map_err(|problem| problem.to_string())
    }
}

impl Writer for Box<dyn Writer + Send + Sync> {
    fn put(&self, entries: &[(LearnedKey, Identity)]) -> Result<(), String> {
        (**self).put(entries)
    }

    fn remove(&self, keys: &[LearnedKey]) -> Result<(), String> {
        (**self).remove(keys)
    }
}

/// The part of a policy that concerns names.
#[derive(Clone, Debug, Default)]
pub(crate) struct Policy {
    /// Selectors by endpoint. Endpoints without selectors can be missing.
    pub selectors: BTreeMap<EndpointId, Arc<Selectors>>,
    /// Selectors in deny rules, by endpoint.
    pub denied: HashSet<(EndpointId, SelectorId)>,
    /// Special-purpose addresses that the policy of an endpoint lists as prefixes.
    pub listed: BTreeMap<EndpointId, Arc<ListedPrefixes>>,
}

/// A policy change in progress; see [`FqdnManager::change`].
pub(crate) struct Change<'a> {
    names: &'a FqdnManager,
    /// The locked state.
    pub state: MutexGuard<'a, State>,
    updates: Vec<Update>,
    before: Policy,
    all: bool,
}

impl FqdnManager {
    /// Returns a manager with the given cache, and `found` as the content of the map.
    pub(crate) fn new(
        cache: Cache,
        found: Vec<(LearnedKey, Identity)>,
        writer: impl Writer + Send + Sync + 'static,
        on_request: impl Fn(ControlRequest) + Send + Sync + 'static,
    ) -> Self {
        Self {
            state: Mutex::new(State {
                learned_map: LearnedMap::new(cache, found),
                view: Arc::new(NoIdentities),
                selectors: BTreeMap::new(),
                denied: HashSet::new(),
                endpoints: BTreeMap::new(),
                waiting: Vec::new(),
                reevaluate: BTreeSet::new(),
            }),
            writer: Box::new(writer),
            on_request: Box::new(on_request),
            requested: Default::default(),
            journal: None,
            known_as: RwLock::default(),
            start: Instant::now(),
            answers: Answers::default(),
            epoch: OnceLock::new(),
            on_learned: OnceLock::new(),
        }
    }

    /// Restores the names of the journal and starts a new journal.
    ///
    /// # Errors
    /// The thread of the journal cannot be started.
    pub(crate) fn remember(&mut self, dir: &Path, endpoints: BTreeMap<EndpointId, String>) -> io::Result<()> {
        let found = journal::read(dir, &endpoints).unwrap_or_else(|problem| {
            error!(dir = %dir.display(), error = %problem, "the journal of learned names cannot be read");
            Default::default()
        });
        let now = self.now();
        let all = {
            let mut state = self.lock();
            for (name, ago) in &found.names {
                // No endpoint has selectors yet, so restoring changes nothing in the map.
                if let Err(problem) = state.learned_map.cache.restore(name, *ago, now).map(drop) {
                    error!(name = name.name, error = %problem, "a learned name cannot be restored");
                }
            }
            state.endpoints.clone_from(&endpoints);
            let all: Vec<SavedName> = state.learned_map.cache.save(now).collect();
            all
        };
        for name in &all {
            let addresses = name.addresses.iter().map(|address| address.ip);
            self.known_as(name.endpoint, &name.name, addresses, Source::Restored);
        }
        if !found.names.is_empty() || found.orphaned > 0 {
            info!(
                names = all.len(),
                of_removed_endpoints = found.orphaned,
                "learned names are restored from the journal"
            );
        }
        self.journal = Some(Journal::begin(dir, endpoints, all)?);
        Ok(())
    }

    /// Returns the time of the cache's clock: ms since this manager was made.
    pub(crate) fn now(&self) -> Millis {
        Millis::try_from(self.start.elapsed().as_millis()).unwrap_or(Millis::MAX)
    }

    /// Locks the state.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn request(&self, request: ControlRequest) {
        if !self.requested[request as usize].swap(true, Ordering::AcqRel) {
            (self.on_request)(request);
        }
    }

    /// Allows the next request of this kind. The control thread calls this function when it begins to handle a request.
    pub(crate) fn rearm(&self, request: ControlRequest) {
        self.requested[request as usize].store(false, Ordering::Release);
    }

    /// Starts the names thread. It settles the workers' requests until all workers have ended.
    pub(crate) fn serve(self: &Arc<Self>, commits: CommitReceiver) -> io::Result<()> {
        self.set_epoch(commits.epoch());
        let names = Arc::clone(self);
        thread::Builder::new().name("names".into()).spawn(move || {
            let mut batch = Vec::with_capacity(MAX_BATCH);
            let mut waiting = false;
            loop {
                match commits.wait(if waiting {
                    TIMEOUT_CHECK_INTERVAL
                } else {
                    IDLE_INTERVAL
                }) {
                    Ok(first) => batch.extend(first),
                    Err(_) => return,
                }
                while batch.len() < MAX_BATCH
                    && let Some(next) = commits.next_waiting()
                {
                    batch.push(next);
                }
                waiting = names.commit_answers(&mut batch);
            }
        })?;
        Ok(())
    }

    /// Sets the epoch that [`Self::end_epoch`] ends.
    fn set_epoch(&self, epoch: Epoch) {
        // Called once, because a daemon has one commit queue.
        let _ = self.epoch.set(epoch);
    }

    /// Ends all leases. Must be called when a committed address leaves the map, or can have left it, before the lease
    /// of its answer ends.
    fn end_epoch(&self) {
        if let Some(epoch) = self.epoch.get() {
            epoch.end();
        }
    }

    /// Adds an answer to the cache without writing the map.
    fn learn(&self, state: &mut State, endpoint: EndpointId, answer: &Answer, now: Millis) -> Pending {
        let before = state.learned_map.cache.stats().evicted;
        let pending = state.learned_map.cache.learn(endpoint, answer, now);
        if state.learned_map.cache.stats().evicted != before {
            self.end_epoch();
        }
        pending
    }

    /// Settles a batch of answers and refuses answers that have waited too long. Returns whether any answer is still
    /// pending.
    pub(crate) fn commit_answers(&self, batch: &mut Vec<CommitTask>) -> bool {
        let now = self.now();
        let mut lines = Vec::new();
        let mut guard = self.lock();
        let state = &mut *guard;
        for task in batch.drain(..) {
            let endpoint = task.request.endpoint;
            let pending = self.learn(state, endpoint, &task.request.answer, now);
            self.note_names(
                &state.learned_map.cache,
                endpoint,
                &task.request.answer,
                Source::Answer,
            );
            self.finish(state, pending, Some(task), None, now, &mut lines);
        }
        let late = |waiting: &mut Waiting| waiting.since.elapsed() > IDENTITY_TIMEOUT;
        for given_up in state.waiting.extract_if(.., late).collect::<Vec<_>>() {
            self.give_up(state, given_up);
        }
        let waiting = !state.waiting.is_empty();
        let reevaluate = !state.reevaluate.is_empty();
        let again = self.is_long().then(|| {
            (
                state.endpoints.clone(),
                state.learned_map.cache.save(now).collect(),
            )
        });
        drop(guard);
        if waiting {
            self.request(ControlRequest::Identities);
        }
        if reevaluate {
            self.request(ControlRequest::Reevaluate);
        }
        if let Some(journal) = &self.journal {
            match again {
                Some((endpoints, all)) => journal.compact(endpoints, all),
                None => journal.append(lines),
            }
        }
        waiting
    }

    fn is_long(&self) -> bool {
        self.journal.as_ref().is_some_and(Journal::is_long)
    }

    /// Settles an answer: commits it, refuses it, or lets it wait for an identity.
    fn finish(
        &self,
        state: &mut State,
        pending: Pending,
        task: Option<CommitTask>,
        since: Option<Instant>,
        now: Millis,
        lines: &mut Vec<SavedName>,
    ) {
        let endpoint = pending.endpoint();
        let hits = |change: &&palisade_fqdn::Change| {
            change.kind == ChangeKind::Live && state.denied.contains(&(change.endpoint, change.selector))
        };
        let denied = !state.denied.is_empty() && pending.changes().iter().any(|change| hits(&change));
        if self.journal.is_some() {
            lines.extend(state.learned_map.cache.journal(&pending, now));
        }
        let view = Arc::clone(&state.view);
        let lease = pending.lease();
        let failures = state.learned_map.failures;
        let committed = match state
            .learned_map
            .settle(pending, since.is_some(), &view, &self.writer)
        {
            Outcome::Committed(proof) => {
                trace!(number = proof.number(), endpoint, "a DNS answer is committed");
                self.answers.committed.fetch_add(1, Ordering::Relaxed);
                if denied {
                    state.reevaluate.insert(endpoint);
                }
                true
            }
            Outcome::Refused => {
                self.answers.refused.fetch_add(1, Ordering::Relaxed);
                false
            }
            Outcome::Waits(pending) => {
                if since.is_none() {
                    self.answers.waited.fetch_add(1, Ordering::Relaxed);
                }
                if denied {
                    // An address of the answer matches a deny selector. The control thread first writes the address to
                    // the maps, and then evaluates the connections of the endpoint again.
                    state.reevaluate.insert(endpoint);
                }
                state.waiting.push(Waiting {
                    since: since.unwrap_or_else(Instant::now),
                    pending,
                    task,
                });
                return;
            }
        };
        if !committed || state.learned_map.failures != failures {
            self.end_epoch();
        }
        if let Some(task) = task {
            let epoch = self.epoch.get().map(Epoch::now);
            // An answer that has waited gets no lease: while it waited, one of its addresses can have been removed and
            // learned again for a shorter time.
            let lease = epoch.zip(lease).filter(|_| committed && since.is_none());
            task.done(
                committed,
                lease.map(|(epoch, good_for)| Lease { good_for, epoch }),
            );
        }
    }

    /// Settles the pending answers again, by the resolver that is now in use.
    fn finish_waiting(&self, state: &mut State) {
        let now = self.now();
        let mut lines = Vec::new();
        for waiting in std::mem::take(&mut state.waiting) {
            self.finish(
                state,
                waiting.pending,
                waiting.task,
                Some(waiting.since),
                now,
                &mut lines,
            );
        }
        if let Some(journal) = &self.journal {
            journal.append(lines);
        }
    }

    /// Learns an answer to a query of this daemon.
    pub(crate) fn learn_prefetched(&self, endpoints: &[EndpointId], answer: &Answer) {
        let now = self.now();
        let mut lines = Vec::new();
        let mut guard = self.lock();
        for endpoint in endpoints {
            let pending = self.learn(&mut guard, *endpoint, answer, now);
            self.note_names(&guard.learned_map.cache, *endpoint, answer, Source::Prefetch);
            self.finish(&mut guard, pending, None, None, now, &mut lines);
        }
        let waiting = !guard.waiting.is_empty();
        let reevaluate = !guard.reevaluate.is_empty();
        drop(guard);
        if waiting {
            self.request(ControlRequest::Identities);
        }
        if reevaluate {
            self.request(ControlRequest::Reevaluate);
        }
        if let Some(journal) = &self.journal {
            journal.append(lines);
        }
    }

    /// Notes the name by which the addresses of an answer were learned. Addresses that the cache has not accepted are
    /// left out, so that the limits of the cache also bound the memory of these notes.
    fn note_names(&self, cache: &Cache, endpoint: EndpointId, answer: &Answer, source: Source) {
        if let Some(question) = &answer.question
            && !answer.addresses.is_empty()
        {
            let addresses = answer.addresses.iter().map(|address| address.ip.to_canonical());
            let addresses = addresses.filter(|address| cache.has(endpoint, *address));
            self.known_as(endpoint, &question.name.to_string(), addresses, source);
        }
    }

    /// Sets the function that takes reports of addresses that are learned from now on. It must not wait.
    pub(crate) fn report_to(&self, on_learned: impl Fn(EndpointId, &str, IpAddr) + Send + Sync + 'static) {
        // A second call has no effect.
        let _ = self.on_learned.set(Box::new(on_learned));
    }

    /// Notes the latest name by which an endpoint has learned addresses, for reports.
    fn known_as(
        &self,
        endpoint: EndpointId,
        name: &str,
        addresses: impl Iterator<Item = IpAddr>,
        source: Source,
    ) {
        let mut shared: Option<Arc<[Arc<str>]>> = None;
        let mut known = self.known_as.write().unwrap_or_else(PoisonError::into_inner);
        for address in addresses {
            let entry = known.entry((endpoint, address));
            let names = || Arc::clone(shared.get_or_insert_with(|| [Arc::from(name)].into()));
            match entry {
                std::collections::hash_map::Entry::Occupied(mut known) => {
                    let known = known.get_mut();
                    known.source = source;
                    if known.names.first().is_none_or(|first| **first != *name) {
                        let mut names = names;
                        known.names = names();
                    }
                }
                std::collections::hash_map::Entry::Vacant(place) => {
                    let mut names = names;
                    if let Some(on_learned) = self.on_learned.get() {
                        on_learned(endpoint, name, address);
                    }
                    place.insert(KnownAs {
                        names: names(),
                        source,
                    });
                }
            }
        }
    }

    /// Returns the latest name by which an endpoint has learned an address; empty if there is none.
    pub(crate) fn names_of(&self, endpoint: EndpointId, address: IpAddr) -> Arc<[Arc<str>]> {
        let known = self.known_as.read().unwrap_or_else(PoisonError::into_inner);
        known
            .get(&(endpoint, address.to_canonical()))
            .map(|known| Arc::clone(&known.names))
            .unwrap_or_default()
    }

    /// Returns whether an endpoint has learned an address.
    pub(crate) fn has_learned(&self, endpoint: EndpointId, address: IpAddr) -> bool {
        let known = self.known_as.read().unwrap_or_else(PoisonError::into_inner);
        known.contains_key(&(endpoint, address.to_canonical()))
    }

    fn source_of(&self, endpoint: EndpointId, address: IpAddr) -> Source {
        let known = self.known_as.read().unwrap_or_else(PoisonError::into_inner);
        known
            .get(&(endpoint, address))
            .map_or(Source::Answer, |known| known.source)
    }

    /// Removes addresses that have expired and are not in use. `in_use`: learned addresses of live connections, by
    /// endpoint.
    pub(crate) fn sweep(&self, in_use: &HashMap<EndpointId, HashSet<IpAddr>>) {
        let endpoints = self.lock().learned_map.cache.endpoints();
        for endpoint in endpoints {
            // The lock is held for one endpoint at a time, so that an answer does not wait for the whole sweep.
            let mut guard = self.lock();
            let state = &mut *guard;
            let now = self.now();
            if let Some(addresses) = in_use.get(&endpoint) {
                state
                    .learned_map
                    .cache
                    .mark_in_use(endpoint, addresses.iter().copied());
            }
            let update = state.learned_map.cache.sweep(endpoint, now);
            let view = Arc::clone(&state.view);
            let failures = state.learned_map.failures;
            state.learned_map.update(update, &view, &self.writer);
            if state.learned_map.failures != failures {
                self.end_epoch();
            }
        }
        let mut guard = self.lock();
        let view = Arc::clone(&guard.view);
        guard.learned_map.retry(&view, &self.writer);
        if !guard.learned_map.missing(&view, false).is_empty() {
            self.request(ControlRequest::Identities);
        }
        self.forget_names(&guard);
        drop(guard);
        self.request(ControlRequest::Prune);
    }

    fn forget_names(&self, state: &State) {
        let mut known = self.known_as.write().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(endpoint, address), _| state.learned_map.cache.has(*endpoint, *address));
    }

    /// Removes the names that match `filter`, of one endpoint or of all, even if they are in use. Returns the number of
    /// removed addresses. The connections of endpoints that have lost an address are evaluated again.
    pub(crate) fn clean(&self, endpoint: Option<EndpointId>, filter: impl FnMut(&Name) -> bool) -> u64 {
        let mut guard = self.lock();
        let state = &mut *guard;
        let before = state.learned_map.cache.stats().cleaned;
        self.end_epoch();
        let update = state.learned_map.cache.clean(endpoint, filter);
        state
            .reevaluate
            .extend(update.changes().iter().map(|change| change.endpoint));
        let view = Arc::clone(&state.view);
        state.learned_map.update(update, &view, &self.writer);
        let cleaned = state.learned_map.cache.stats().cleaned - before;
        let reevaluate = !state.reevaluate.is_empty();
        self.forget_names(state);
        let all = state.learned_map.cache.save(self.now()).collect();
        let endpoints = state.endpoints.clone();
        drop(guard);
        if let Some(journal) = &self.journal {
            journal.compact(endpoints, all);
        }
        if reevaluate {
            self.request(ControlRequest::Reevaluate);
        }
        cleaned
    }

    /// Returns the endpoints whose connections must be evaluated again, and empties the list.
    pub(crate) fn take_reevaluated(&self) -> BTreeSet<EndpointId> {
        std::mem::take(&mut self.lock().reevaluate)
    }

    /// Returns the cached names, with the source of each address.
    pub(crate) fn list(&self, endpoint: Option<EndpointId>) -> Vec<(CachedName, Vec<Source>)> {
        let list = self.lock().learned_map.cache.list(endpoint, self.now());
        let with_source = |name: CachedName| {
            let sources = name
                .addresses
                .iter()
                .map(|address| self.source_of(name.endpoint, address.ip));
            let sources = sources.collect();
            (name, sources)
        };
        list.into_iter().map(with_source).collect()
    }

    /// Returns the identities in the map, by endpoint and address.
    pub(crate) fn identities(&self) -> BTreeMap<LearnedKey, Identity> {
        self.lock().learned_map.identities()
    }

    /// Waits, for a limited time, until the journal is on the disk.
    pub(crate) fn flush(&self) {
        if let Some(journal) = &self.journal {
            journal.flush();
        }
    }

    /// Returns why learned names can be lost at a restart; `None` if the journal can be written.
    pub(crate) fn journal_problem(&self) -> Option<String> {
        self.journal.as_ref().and_then(Journal::problem)
    }

    /// Returns the counters.
    pub(crate) fn counts(&self) -> Counts {
        let state = self.lock();
        let memory = state.learned_map.cache.memory();
        Counts {
            names: memory.names,
            addresses: memory.addresses,
            bytes: memory.bytes,
            in_map: state.learned_map.len(),
            unwritten: state.learned_map.unwritten(),
            failures: state.learned_map.failures,
            failure: state.learned_map.failure.clone(),
            stats: state.learned_map.cache.stats(),
            committed: self.answers.committed.load(Ordering::Relaxed),
            refused: self.answers.refused.load(Ordering::Relaxed),
            waited: self.answers.waited.load(Ordering::Relaxed),
            over_limit: self.answers.over_limit.load(Ordering::Relaxed),
        }
    }

    /// Replaces the resolver by the resolver of a policy with additional identities, and settles the pending answers.
    /// `full`: endpoints that get no further identities; their pending answers are refused.
    pub(crate) fn extended(&self, state: &mut State, view: View, full: &BTreeSet<EndpointId>) {
        state.view = view;
        let view = Arc::clone(&state.view);
        state.learned_map.retry(&view, &self.writer);
        self.finish_waiting(state);
        let given_up = state
            .waiting
            .extract_if(.., |waiting| full.contains(&waiting.pending.endpoint()));
        for waiting in given_up.collect::<Vec<_>>() {
            self.answers.over_limit.fetch_add(1, Ordering::Relaxed);
            self.give_up(state, waiting);
        }
    }

    /// Refuses a pending answer.
    fn give_up(&self, state: &mut State, waiting: Waiting) {
        state.learned_map.cache.abort(waiting.pending);
        self.answers.refused.fetch_add(1, Ordering::Relaxed);
        if let Some(task) = waiting.task {
            task.done(false, None);
        }
        self.end_epoch();
    }

    /// Begins a policy change. No answer is committed while the returned [`Change`] exists, because it holds the lock.
    /// `all`: whether the identity of an address can change even if its names do not.
    pub(crate) fn change(
        &self,
        policy: &Policy,
        endpoints: &BTreeMap<EndpointId, String>,
        all: bool,
    ) -> Change<'_> {
        let mut state = self.lock();
        self.end_epoch();
        let before = Policy {
            selectors: state.selectors.clone(),
            denied: std::mem::take(&mut state.denied),
            // A rollback does not restore the previous list of prefixes. Addresses that the failed policy has removed
            // are learned again from the next answer.
            listed: policy.listed.clone(),
        };
        let mut updates = Vec::new();
        state.set_policy(policy, &mut updates);
        for gone in state.learned_map.cache.endpoints() {
            if !endpoints.contains_key(&gone) {
                let update = state.learned_map.cache.remove_endpoint(gone);
                state.learned_map.note(update.changes());
                updates.push(update);
            }
        }
        if state.endpoints != *endpoints {
            state.endpoints.clone_from(endpoints);
            if let Some(journal) = &self.journal {
                journal.compact(
                    endpoints.clone(),
                    state.learned_map.cache.save(self.now()).collect(),
                );
            }
        }
        Change {
            names: self,
            state,
            updates,
            before,
            all,
        }
    }
}

impl State {
    fn set_policy(&mut self, policy: &Policy, updates: &mut Vec<Update>) {
        let none: Arc<Selectors> = Arc::default();
        let endpoints: BTreeSet<EndpointId> = self
            .selectors
            .keys()
            .chain(policy.selectors.keys())
            .copied()
            .collect();
        for endpoint in endpoints {
            // The prefixes that the policy lists are set before the selectors, because a special-purpose address gets a
            // selector only if one of these prefixes contains it.
            let listed = policy.listed.get(&endpoint).cloned().unwrap_or_default();
            let update = self.learned_map.cache.set_listed(endpoint, listed);
            if !update.changes().is_empty() {
                self.learned_map.note(update.changes());
                updates.push(update);
            }
            let (old, new) = (self.selectors.get(&endpoint), policy.selectors.get(&endpoint));
            if let (Some(old), Some(new)) = (old, new)
                && Arc::ptr_eq(old, new)
            {
                continue;
            }
            let update = match new {
                Some(new) => self.learned_map.cache.set_selectors(endpoint, Arc::clone(new)),
                None => self.learned_map.cache.set_selectors(endpoint, Arc::clone(&none)),
            };
            self.learned_map.note(update.changes());
            updates.push(update);
        }
        self.selectors.clone_from(&policy.selectors);
        self.denied.clone_from(&policy.denied);
    }
}

impl Change<'_> {
    /// Returns the learned addresses for which the new policy has no identity.
    pub(crate) fn missing(&self, resolver: &impl IdentityResolver) -> Vec<(EndpointId, IpAddr, Set)> {
        self.state.learned_map.missing(resolver, self.all)
    }

    /// Returns the changes that make the map conform to the new policy.
    pub(crate) fn plan(&self, resolver: &impl IdentityResolver) -> Transition {
        self.state.learned_map.plan(resolver, self.all)
    }

    /// Completes the change: the maps hold the new state.
    pub(crate) fn done(mut self, transition: &Transition, view: View) {
        let state = &mut *self.state;
        state.learned_map.committed(transition, &view, &self.names.writer);
        for update in self.updates.drain(..) {
            state.learned_map.written(update);
        }
        state.view = view;
        self.names.finish_waiting(state);
    }

    /// Aborts the change and returns to the selectors of the old policy. The maps can hold a part of the new state.
    pub(crate) fn failed(&mut self, transition: &Transition) {
        self.state.learned_map.aborted(transition);
        // The next sweep repeats the changes of these updates.
        self.updates.clear();
        let before = self.before.clone();
        let mut updates = Vec::new();
        self.state.set_policy(&before, &mut updates);
        self.updates = updates;
        self.all = false;
    }
}

/// Counters of learned names and answers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    pub names: usize,
    pub addresses: usize,
    pub bytes: usize,
    pub in_map: usize,
    pub unwritten: usize,
    pub failures: u64,
    pub failure: Option<String>,
    pub stats: Stats,
    pub committed: u64,
    pub refused: u64,
    pub waited: u64,
    pub over_limit: u64,
}
