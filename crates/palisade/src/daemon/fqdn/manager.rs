//! Learned names: no answer is released before the maps hold everything that it implies.
//!
//! ```text
//! workers ── CommitRequest ──> names thread: cache ─ changes ─> identities ─> LEARNED ─> commit ── CommitResult ──> workers
//!                          │ an identity that nobody has needed yet         ▲
//!                          └─> control thread: compile, plan, apply ────────┘
//! ```
//!
//! Everything is behind one lock. The names thread takes it for an answer, the control thread for the time from
//! planning a change of the maps to its end, so that every answer finds either the policy before or the one after.

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

/// Answers that are dealt with under one lock.
const MAX_BATCH: usize = 64;
/// How long an answer may wait for an identity. Whoever holds the packet gives up at about that time too.
const IDENTITY_TIMEOUT: Duration = Duration::from_secs(2);
/// How often it is looked whether one has waited too long.
const TIMEOUT_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// And how long the thread sleeps when nothing waits.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);

/// Who a learned address is, by the policy in force.
pub(super) type View = Arc<dyn IdentityResolver + Send + Sync>;

/// From where it is known that a name has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// From an answer that the endpoint got.
    Answer,
    /// Asked ahead by this daemon.
    Prefetch,
    /// From before a restart.
    Restored,
}

impl Source {
    /// As listings say it.
    pub(crate) const fn text(self) -> &'static str {
        match self {
            Self::Answer => "answer",
            Self::Prefetch => "prefetch",
            Self::Restored => "restored",
        }
    }
}

/// What the names thread wants of the control thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ControlRequest {
    /// Answers wait for identities that the policy in force does not have.
    Identities,
    /// Connections of endpoints have to be judged again: see [`FqdnManager::take_rejudged`].
    Rejudge,
    /// A sweep has ended: identities that no learned address has any more can be dropped.
    Prune,
}

/// What the endpoints have learned. One for the daemon; all threads share it.
pub(crate) struct FqdnManager {
    state: Mutex<State>,
    writer: Box<dyn Writer + Send + Sync>,
    on_request: Box<dyn Fn(ControlRequest) + Send + Sync>,
    /// One of each kind on its way is enough.
    requested: [AtomicBool; 3],
    journal: Option<Journal>,
    known_as: RwLock<HashMap<(EndpointId, IpAddr), KnownAs>>,
    start: Instant,
    answers: Answers,
    /// Of those who answer by what was committed before.
    epoch: OnceLock<Epoch>,
}

/// Counts.
#[derive(Debug, Default)]
struct Answers {
    committed: AtomicU64,
    refused: AtomicU64,
    waited: AtomicU64,
    /// Refused because their endpoint has as many identities of learned addresses as it may.
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

/// What is behind the lock.
pub(crate) struct State {
    /// Names, addresses, and what of them is in the map.
    pub learned_map: LearnedMap,
    /// By the policy in force.
    pub view: View,
    /// Selectors of the policy in force.
    selectors: BTreeMap<EndpointId, Arc<Selectors>>,
    /// Selectors that a deny rule of the endpoint has.
    denied: HashSet<(EndpointId, SelectorId)>,
    /// Names of endpoints by number.
    endpoints: BTreeMap<EndpointId, String>,
    waiting: Vec<Waiting>,
    rejudge: BTreeSet<EndpointId>,
}

/// An answer that waits for an identity.
struct Waiting {
    since: Instant,
    pending: Pending,
    /// `None`: asked ahead, nobody waits.
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

/// What the control thread knows of a policy's names.
#[derive(Clone, Debug, Default)]
pub(crate) struct Policy {
    /// Selectors by endpoint; endpoints without any may be missing.
    pub selectors: BTreeMap<EndpointId, Arc<Selectors>>,
    /// Selectors that a deny rule of the endpoint has.
    pub denied: HashSet<(EndpointId, SelectorId)>,
    /// Special-purpose addresses that the policy of an endpoint with selectors lists.
    pub listed: BTreeMap<EndpointId, Arc<ListedPrefixes>>,
}

/// A change of the policy under way; see [`FqdnManager::change`].
pub(crate) struct Change<'a> {
    names: &'a FqdnManager,
    /// What is locked.
    pub state: MutexGuard<'a, State>,
    updates: Vec<Update>,
    before: Policy,
    all: bool,
}

impl FqdnManager {
    /// What is remembered from before, with the map as `found`.
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
                rejudge: BTreeSet::new(),
            }),
            writer: Box::new(writer),
            on_request: Box::new(on_request),
            requested: Default::default(),
            journal: None,
            known_as: RwLock::default(),
            start: Instant::now(),
            answers: Answers::default(),
            epoch: OnceLock::new(),
        }
    }

    /// Brings back what was learned before a restart, and keeps what is learned from now on.
    pub(crate) fn remember(&mut self, dir: &Path, endpoints: BTreeMap<EndpointId, String>) -> io::Result<()> {
        let found = journal::read(dir, &endpoints).unwrap_or_else(|problem| {
            error!(dir = %dir.display(), error = %problem, "the journal of learned names cannot be read");
            Default::default()
        });
        let now = self.now();
        let all = {
            let mut state = self.lock();
            for (name, ago) in &found.names {
                // No endpoint has selectors yet: nothing changes in the map by that.
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

    /// The clock of the cache.
    pub(crate) fn now(&self) -> Millis {
        Millis::try_from(self.start.elapsed().as_millis()).unwrap_or(Millis::MAX)
    }

    /// The lock.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn request(&self, request: ControlRequest) {
        if !self.requested[request as usize].swap(true, Ordering::AcqRel) {
            (self.on_request)(request);
        }
    }

    /// A wish is being looked after: what comes from now on is another one.
    pub(crate) fn rearm(&self, request: ControlRequest) {
        self.requested[request as usize].store(false, Ordering::Release);
    }

    /// Answers the workers' questions until there is nobody left to ask.
    pub(crate) fn serve(self: &Arc<Self>, lessons: CommitReceiver) -> io::Result<()> {
        self.tell_epochs(lessons.epoch());
        let names = Arc::clone(self);
        thread::Builder::new().name("names".into()).spawn(move || {
            let mut batch = Vec::with_capacity(MAX_BATCH);
            let mut waiting = false;
            loop {
                match lessons.wait(if waiting {
                    TIMEOUT_CHECK_INTERVAL
                } else {
                    IDLE_INTERVAL
                }) {
                    Ok(first) => batch.extend(first),
                    Err(_) => return,
                }
                while batch.len() < MAX_BATCH
                    && let Some(next) = lessons.next_waiting()
                {
                    batch.push(next);
                }
                waiting = names.commit_answers(&mut batch);
            }
        })?;
        Ok(())
    }

    /// Ends epochs of this from now on.
    fn tell_epochs(&self, epoch: Epoch) {
        // There is one queue of lessons in the life of a daemon.
        let _ = self.epoch.set(epoch);
    }

    /// Something that was committed is about to be taken out of the map before its time, or may have been.
    fn end_epoch(&self) {
        if let Some(epoch) = self.epoch.get() {
            epoch.end();
        }
    }

    /// Learns an answer, without writing anything yet.
    fn learn(&self, state: &mut State, endpoint: EndpointId, answer: &Answer, now: Millis) -> Pending {
        let before = state.learned_map.cache.stats().evicted;
        let pending = state.learned_map.cache.learn(endpoint, answer, now);
        if state.learned_map.cache.stats().evicted != before {
            self.end_epoch();
        }
        pending
    }

    /// Commits a batch of answers. Returns whether some of them, or of earlier ones, are still pending.
    pub(crate) fn commit_answers(&self, batch: &mut Vec<CommitTask>) -> bool {
        let now = self.now();
        let mut lines = Vec::new();
        let mut guard = self.lock();
        let state = &mut *guard;
        for task in batch.drain(..) {
            let endpoint = task.request.endpoint;
            let pending = self.learn(state, endpoint, &task.request.answer, now);
            self.tell_name(
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
        let rejudge = !state.rejudge.is_empty();
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
        if rejudge {
            self.request(ControlRequest::Rejudge);
        }
        if let Some(journal) = &self.journal {
            match again {
                Some((endpoints, all)) => journal.begin_anew(endpoints, all),
                None => journal.append(lines),
            }
        }
        waiting
    }

    fn is_long(&self) -> bool {
        self.journal.as_ref().is_some_and(Journal::is_long)
    }

    /// Takes an answer as far as it goes.
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
                    state.rejudge.insert(endpoint);
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
                    // Once the maps have it, which the control thread sees to next.
                    state.rejudge.insert(endpoint);
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
            // Of one that has waited, something may have been taken out meanwhile, and learned again for less long.
            let lease = epoch.zip(lease).filter(|_| committed && since.is_none());
            task.done(
                committed,
                lease.map(|(epoch, good_for)| Lease { good_for, epoch }),
            );
        }
    }

    /// Tries again what waits. Called when there may be identities for it.
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

    /// Learns what the daemon itself asked for.
    pub(crate) fn asked_ahead(&self, endpoints: &[EndpointId], answer: &Answer) {
        let now = self.now();
        let mut lines = Vec::new();
        let mut guard = self.lock();
        for endpoint in endpoints {
            let pending = self.learn(&mut guard, *endpoint, answer, now);
            self.tell_name(&guard.learned_map.cache, *endpoint, answer, Source::Prefetch);
            self.finish(&mut guard, pending, None, None, now, &mut lines);
        }
        let waiting = !guard.waiting.is_empty();
        let rejudge = !guard.rejudge.is_empty();
        drop(guard);
        if waiting {
            self.request(ControlRequest::Identities);
        }
        if rejudge {
            self.request(ControlRequest::Rejudge);
        }
        if let Some(journal) = &self.journal {
            journal.append(lines);
        }
    }

    /// Only of addresses that the cache has taken: its limits bound this too.
    fn tell_name(&self, cache: &Cache, endpoint: EndpointId, answer: &Answer, source: Source) {
        if let Some(question) = &answer.question
            && !answer.addresses.is_empty()
        {
            let addresses = answer.addresses.iter().map(|address| address.ip.to_canonical());
            let addresses = addresses.filter(|address| cache.has(endpoint, *address));
            self.known_as(endpoint, &question.name.to_string(), addresses, source);
        }
    }

    /// For reports: by which name an endpoint learned an address last.
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
                    place.insert(KnownAs {
                        names: names(),
                        source,
                    });
                }
            }
        }
    }

    /// The name by which an endpoint learned an address last.
    pub(crate) fn names_of(&self, endpoint: EndpointId, address: IpAddr) -> Arc<[Arc<str>]> {
        let known = self.known_as.read().unwrap_or_else(PoisonError::into_inner);
        known
            .get(&(endpoint, address.to_canonical()))
            .map(|known| Arc::clone(&known.names))
            .unwrap_or_default()
    }

    fn source_of(&self, endpoint: EndpointId, address: IpAddr) -> Source {
        let known = self.known_as.read().unwrap_or_else(PoisonError::into_inner);
        known
            .get(&(endpoint, address))
            .map_or(Source::Answer, |known| known.source)
    }

    /// Removes what has expired and is not in use. `in_use`: every address that a live connection of an endpoint has.
    pub(crate) fn sweep(&self, in_use: &HashMap<EndpointId, HashSet<IpAddr>>) {
        let endpoints = self.lock().learned_map.cache.endpoints();
        for endpoint in endpoints {
            // The lock for each: an answer does not wait for all of them.
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

    /// Forgets names, in use or not; answers how many addresses. Their connections are judged again.
    pub(crate) fn clean(&self, endpoint: Option<EndpointId>, filter: impl FnMut(&Name) -> bool) -> u64 {
        let mut guard = self.lock();
        let state = &mut *guard;
        let before = state.learned_map.cache.stats().cleaned;
        self.end_epoch();
        let update = state.learned_map.cache.clean(endpoint, filter);
        state
            .rejudge
            .extend(update.changes().iter().map(|change| change.endpoint));
        let view = Arc::clone(&state.view);
        state.learned_map.update(update, &view, &self.writer);
        let cleaned = state.learned_map.cache.stats().cleaned - before;
        let rejudge = !state.rejudge.is_empty();
        self.forget_names(state);
        let all = state.learned_map.cache.save(self.now()).collect();
        let endpoints = state.endpoints.clone();
        drop(guard);
        if let Some(journal) = &self.journal {
            journal.begin_anew(endpoints, all);
        }
        if rejudge {
            self.request(ControlRequest::Rejudge);
        }
        cleaned
    }

    /// The endpoints whose connections have to be judged again.
    pub(crate) fn take_rejudged(&self) -> BTreeSet<EndpointId> {
        std::mem::take(&mut self.lock().rejudge)
    }

    /// What is cached, with the source of each address.
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

    /// The identities that addresses have in the map.
    pub(crate) fn identities(&self) -> BTreeMap<LearnedKey, Identity> {
        self.lock().learned_map.identities()
    }

    /// Has everything on the disk.
    pub(crate) fn flush(&self) {
        if let Some(journal) = &self.journal {
            journal.flush();
        }
    }

    /// Why what is learned now may not outlive a restart, if that is so.
    pub(crate) fn journal_problem(&self) -> Option<String> {
        self.journal.as_ref().and_then(Journal::problem)
    }

    /// How much there is, and what became of answers.
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

    /// The policy in force has identities that it did not have. Endpoints that are `full` get no more: what they still
    /// wait for is given up.
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

    /// Withholds an answer that has waited in vain.
    fn give_up(&self, state: &mut State, waiting: Waiting) {
        state.learned_map.cache.abort(waiting.pending);
        self.answers.refused.fetch_add(1, Ordering::Relaxed);
        if let Some(task) = waiting.task {
            task.done(false, None);
        }
        self.end_epoch();
    }

    /// Begins a change of what the maps hold: nothing is committed until it is brought to its end. `all`: the
    /// identities of addresses may be others afterwards, not only what names they belong to.
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
            // What a policy that fails has had forgotten is learned again by the next answer.
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
                journal.begin_anew(
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
            // Before the selectors: special-purpose addresses that are not listed must not get one.
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
    /// What of the learned addresses has no identity by the new policy.
    pub(crate) fn missing(&self, resolver: &impl IdentityResolver) -> Vec<(EndpointId, IpAddr, Set)> {
        self.state.learned_map.missing(resolver, self.all)
    }

    /// The way of the map.
    pub(crate) fn plan(&self, resolver: &impl IdentityResolver) -> Transition {
        self.state.learned_map.plan(resolver, self.all)
    }

    /// The maps hold everything.
    pub(crate) fn done(mut self, transition: &Transition, view: View) {
        let state = &mut *self.state;
        state.learned_map.committed(transition, &view, &self.names.writer);
        for update in self.updates.drain(..) {
            state.learned_map.written(update);
        }
        state.view = view;
        self.names.finish_waiting(state);
    }

    /// The maps hold some of it: what the policy before said counts on.
    pub(crate) fn failed(&mut self, transition: &Transition) {
        self.state.learned_map.aborted(transition);
        // What they said comes again with the next sweep.
        self.updates.clear();
        let before = self.before.clone();
        let mut updates = Vec::new();
        self.state.set_policy(&before, &mut updates);
        self.updates = updates;
        self.all = false;
    }
}

/// See [`FqdnManager::counts`].
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
