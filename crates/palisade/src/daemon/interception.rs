//! Interception: the proxy threads, the secrets that policies name, and the state of both for the control socket.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use palisade_abi::{Decision, Direction, Inspector, ProxiedKey, entry_flags, protocol, punt_flags};
use palisade_datapath::{Datapath, ProxiedFlows, ProxyLinks};
use palisade_inspect::{Limits, Rules, SniAddressIndex, record::Record};
use palisade_intercept::{Flow, Flows, Listeners, Namespace, Options, Proxy, Reports, Settings, ThreadState};
use palisade_model::snapshot::RuleSet;
use palisade_policy::compile::FileContent;
use palisade_secrets::{Problem, Store, check_policies, check_rule_set, expires_within};
use palisade_worker::TimedRecord;
use tracing::{error, info, warn};

use super::{
    record_queue::{Receiver, Sender, queue},
    state::NODE,
    view::Shared,
    workers::{Workers, limits},
};
use crate::config::{Config, NoSni};

/// Number of records of the proxy threads that wait to be read.
const MAX_QUEUED_RECORDS: usize = 2_048;
/// Interval at which the secrets folder is read again. A secret consists of several files that are replaced one after
/// the other, or by a symbolic link, so reading the whole folder is simpler and safer than following inotify events.
const SECRETS_INTERVAL: Duration = Duration::from_secs(2);
/// Number of file descriptors that are reserved for the rest of the daemon: programs, maps, control connections and
/// policy files. Intercepted connections never use them.
const RESERVED_FILES: usize = 1_024;
/// File descriptors of a terminated connection: one socket for each side.
const FILES_PER_CONNECTION: usize = 2;
/// Limit on open files if the kernel does not report it.
const DEFAULT_FILES: u64 = 1_024;
/// Time for which the status reports that the proxy had no room for connections.
const LIMIT_WARNING: Duration = Duration::from_mins(1);
/// Remaining validity below which a certificate is reported, days.
const EXPIRY_WARNING_DAYS: u32 = 30;

/// Secrets of the folder, and their problems.
#[derive(Debug, Default)]
pub(super) struct Secrets {
    pub(super) store: Arc<Store>,
    pub(super) problems: Vec<Problem>,
}

/// Rules of the policy state in force, prepared for the workers and the proxy threads.
#[derive(Debug, Default)]
pub(super) struct InspectorRules(Arc<Rules>);

impl InspectorRules {
    /// Prepares the rule sets of a policy state that is about to be put in force, and gives them to the workers and the
    /// proxy threads.
    pub(super) fn set_rules(
        &mut self,
        sets: &BTreeMap<u32, Arc<RuleSet>>,
        workers: &Workers,
        interception: &mut Interception,
    ) {
        let secrets = interception.view.secrets();
        let rules = Rules::prepare_with(sets, Some(&self.0), &|name| secrets.store.value(name));
        for problem in rules.problems() {
            error!(ruleset = problem.ruleset, error = %problem.error, "a rule set cannot be prepared for the inspectors");
        }
        self.0 = Arc::new(rules);
        workers.set_rules(&self.0);
        interception.set_rules(Arc::clone(&self.0));
    }
}

/// Part of the interception that other threads read.
pub(super) struct View {
    /// `[tls] secrets_dir`.
    pub(super) dir: PathBuf,
    proxy: RwLock<Result<Arc<Proxy>, String>>,
    secrets: RwLock<Arc<Secrets>>,
    records_lost: Arc<AtomicU64>,
    /// `[tls] interception_ca`.
    interception_ca: Option<String>,
    /// Secrets that the policies in force name and that cannot be used, in words, with the places in the policies.
    unusable: RwLock<Arc<BTreeSet<String>>>,
}

impl View {
    /// Returns the proxy, or why there is none.
    pub(super) fn proxy(&self) -> Result<Arc<Proxy>, String> {
        self.proxy.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn secrets(&self) -> Arc<Secrets> {
        Arc::clone(&self.secrets.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns the number of records that were lost because the queue was full.
    pub(super) fn records_lost(&self) -> u64 {
        self.records_lost.load(Ordering::Relaxed)
    }

    /// Returns why intercepted traffic with this rule set is denied; `None` if nothing prevents the interception.
    pub(super) fn problem_of(&self, set: &RuleSet) -> Option<String> {
        let problems: Vec<String> = self
            .proxy()
            .err()
            .into_iter()
            .chain(self.unusable_secrets(set))
            .collect();
        (!problems.is_empty()).then(|| problems.join("; "))
    }

    /// Returns why secrets of a rule set cannot be used.
    fn unusable_secrets(&self, set: &RuleSet) -> Vec<String> {
        check_rule_set(set, &self.secrets().store, self.interception_ca.as_deref())
    }

    /// Returns the secrets that the policies in force name and that cannot be used, in words.
    pub(super) fn unusable(&self) -> Arc<BTreeSet<String>> {
        Arc::clone(&self.unusable.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The proxy threads with their settings.
pub(super) struct Interception {
    view: Arc<View>,
    limits: Limits,
    known: Option<Arc<SniAddressIndex>>,
    options: Options,
    refuse_nameless: bool,
    rules: Arc<Rules>,
    shared: Arc<Shared>,
    links: Option<Arc<ProxyLinks>>,
    /// Connections that ended because of a limit of the proxy threads, and overflows of their accept queues.
    limited: Rise,
    overflows: Rise,
    reports: Arc<Records>,
    checked: SecretCheck,
}

/// What the last check of secrets was about, so that answers of DNS servers, which change policy tables many times a
/// second, cause no further check. The objects are kept, so an equal address means the same object.
#[derive(Default)]
struct SecretCheck(Option<Checked>);

struct Checked {
    sets: Arc<BTreeMap<u32, Arc<RuleSet>>>,
    files: Vec<Arc<FileContent>>,
    store: Arc<Store>,
}

impl SecretCheck {
    /// Returns whether the check is not that of the last call.
    fn is_due(
        &mut self,
        sets: &Arc<BTreeMap<u32, Arc<RuleSet>>>,
        files: &[Arc<FileContent>],
        store: &Arc<Store>,
    ) -> bool {
        let is_same = self.0.as_ref().is_some_and(|last| {
            Arc::ptr_eq(&last.sets, sets)
                && Arc::ptr_eq(&last.store, store)
                && last.files.len() == files.len()
                && last
                    .files
                    .iter()
                    .zip(files)
                    .all(|(old, new)| Arc::ptr_eq(old, new))
        });
        if !is_same {
            self.0 = Some(Checked {
                sets: Arc::clone(sets),
                files: files.to_vec(),
                store: Arc::clone(store),
            });
        }
        !is_same
    }
}

impl Interception {
    /// Reads the secrets and starts the proxy threads in the namespaces of the proxy links. If that fails, the daemon
    /// runs without the threads, and intercepted traffic is dropped. Also returns the queue of the threads' records.
    pub(super) fn start(
        config: &Config,
        datapath: &Datapath,
        links: Option<Arc<ProxyLinks>>,
        known: Option<Arc<SniAddressIndex>>,
        shared: &Arc<Shared>,
    ) -> (Self, Receiver<TimedRecord>) {
        let (sender, receiver) = queue(MAX_QUEUED_RECORDS);
        let tls = &config.tls;
        let records_lost = Arc::<AtomicU64>::default();
        let (store, problems) = Store::load(&tls.secrets_dir, None);
        let view = Arc::new(View {
            dir: tls.secrets_dir.clone(),
            proxy: RwLock::new(Err("the proxy threads are not started yet".to_owned())),
            secrets: RwLock::new(Arc::new(Secrets {
                store: Arc::new(store),
                problems,
            })),
            records_lost: Arc::clone(&records_lost),
            interception_ca: tls.interception_ca.clone(),
            unusable: RwLock::default(),
        });
        let mut interception = Self {
            view,
            limits: limits(config),
            known,
            options: options(config),
            refuse_nameless: tls.no_sni == NoSni::Refuse,
            rules: Arc::default(),
            shared: Arc::clone(shared),
            links,
            limited: Rise::default(),
            overflows: Rise::default(),
            reports: Arc::new(Records {
                queue: sender,
                lost: records_lost,
            }),
            checked: SecretCheck::default(),
        };
        interception.log_problems(&[]);
        interception.start_proxy(datapath);
        (interception, receiver)
    }

    pub(super) fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// Starts the proxy threads.
    fn start_proxy(&mut self, datapath: &Datapath) {
        let started = self.try_start(datapath);
        let before = self.view.proxy();
        match (&started, &before) {
            (Ok(_), _) => info!(threads = self.options.threads, "the proxy threads run"),
            (Err(problem), Err(known)) if problem == known => {}
            (Err(problem), _) => error!(
                error = problem,
                "there are no proxy threads; traffic that must be intercepted is dropped"
            ),
        }
        *self.view.proxy.write().unwrap_or_else(PoisonError::into_inner) = started.map(Arc::new);
    }

    fn try_start(&self, datapath: &Datapath) -> Result<Proxy, String> {
        let links = self.links.as_ref().ok_or("there are no proxy links")?;
        let namespaces = [Direction::Ingress, Direction::Egress]
            .into_iter()
            .map(|direction| {
                Ok(Namespace {
                    direction,
                    fd: links.namespaces[direction as usize].try_clone()?,
                })
            })
            .collect::<io::Result<Vec<_>>>()
            .map_err(|error| format!("a namespace of the proxy cannot be used: {error}"))?;
        let flows = datapath
            .proxied_flows(NODE)
            .map_err(|error| format!("the map of intercepted flows: {error}"))?;
        let proxy = Proxy::start(
            self.options.clone(),
            namespaces,
            &Registry(links),
            Arc::new(FlowTable {
                flows,
                shared: Arc::clone(&self.shared),
            }),
            Arc::clone(&self.reports) as Arc<dyn Reports>,
            self.settings(),
        )
        .map_err(|error| format!("the proxy threads cannot be started: {error}"))?;
        Ok(proxy)
    }

    fn settings(&self) -> Settings {
        Settings {
            rules: Arc::clone(&self.rules),
            secrets: Arc::clone(&self.view.secrets().store) as Arc<dyn palisade_intercept::Secrets>,
            interception_ca: self.view.interception_ca.clone(),
            http: self.limits.http.clone(),
            ech: self.limits.tls.ech,
            names: self.known.clone(),
            refuse_nameless: self.refuse_nameless,
        }
    }

    /// Replaces rules or secrets of the proxy threads.
    fn update(&self) {
        if let Ok(proxy) = self.view.proxy() {
            proxy.update(self.settings());
        }
    }

    /// Gives the proxy threads the rules of a policy state that is about to be put in force.
    pub(super) fn set_rules(&mut self, rules: Arc<Rules>) {
        self.rules = rules;
        self.update();
    }

    /// Finds the secrets that rule sets name and that cannot be used, with their places in the policies of `files`, and
    /// logs those that were usable before. The traffic that needs them is denied. Policies whose rules no rule set has are
    /// not reported. Does nothing if neither rule sets, policies nor secrets have changed.
    pub(super) fn check_secrets<'a>(
        &mut self,
        sets: &Arc<BTreeMap<u32, Arc<RuleSet>>>,
        files: impl Iterator<Item = &'a Arc<FileContent>>,
    ) {
        let files: Vec<Arc<FileContent>> = files.map(Arc::clone).collect();
        if !self.checked.is_due(sets, &files, &self.view.secrets().store) {
            return;
        }
        let policies = files.iter().flat_map(|content| &content.policies);
        let messages: BTreeSet<String> = sets
            .values()
            .flat_map(|set| self.view.unusable_secrets(set))
            .collect();
        let mut unusable = BTreeSet::new();
        if !messages.is_empty() {
            let ca = self.view.interception_ca.as_deref();
            let found = check_policies(policies, &self.view.secrets().store, ca);
            let found = found
                .iter()
                .filter(|diagnostic| messages.contains(&diagnostic.message));
            unusable.extend(found.map(ToString::to_string));
        }
        for problem in unusable.difference(&self.view.unusable()) {
            error!(problem, "a policy names a secret that cannot be used");
        }
        *self.view.unusable.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(unusable);
    }

    /// Ends the connections that the policy in force does not intercept any more.
    pub(super) fn recheck(&self) {
        if let Ok(proxy) = self.view.proxy() {
            proxy.recheck();
        }
    }

    /// Replaces the secrets.
    pub(super) fn set_secrets(&mut self, secrets: Secrets) {
        let before = self.view.secrets();
        *self.view.secrets.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(secrets);
        info!(dir = %self.view.dir.display(), "the secrets have changed");
        self.log_problems(&before.problems);
        self.update();
    }

    /// Logs the problems that are not in `known`.
    fn log_problems(&self, known: &[Problem]) {
        for problem in &self.view.secrets().problems {
            if known.contains(problem) {
                continue;
            }
            if problem.is_error() {
                error!(%problem, "a secret cannot be used");
            } else {
                warn!(%problem, "a secret has a problem");
            }
        }
    }

    /// Starts the proxy threads if they could not be started before, and starts them again in the namespaces of new links.
    /// `renewed`: whether the links are new.
    pub(super) fn repair(&mut self, datapath: &Datapath, links: Option<Arc<ProxyLinks>>, renewed: bool) {
        if self.view.proxy().is_ok() && !renewed {
            return;
        }
        // The threads in the former namespaces end before the new threads begin, and their connections are reset.
        if self.view.proxy().is_ok() {
            *self.view.proxy.write().unwrap_or_else(PoisonError::into_inner) =
                Err("the proxy links are made again".to_owned());
        }
        self.links = links;
        self.start_proxy(datapath);
    }

    /// Looks whether the proxy has dropped connections for lack of room, and logs it.
    pub(super) fn watch_limits(&mut self) {
        let Ok(proxy) = self.view.proxy() else {
            return;
        };
        if self.limited.update(proxy.stats().limited) {
            warn!(total = self.limited.count, "{LIMITED}");
        }
        // Without the counters of a namespace its links are gone, which is reported elsewhere.
        if let Ok(count) = proxy.accept_overflows()
            && self.overflows.update(count)
        {
            warn!(total = count, "{OVERFLOWED}");
        }
    }

    /// Returns what prevents interception.
    pub(super) fn missing(&self) -> Option<String> {
        match self.view.proxy() {
            Err(problem) => Some(format!("no proxy threads: {problem}")),
            Ok(proxy) => threads_down(&proxy.threads()),
        }
    }

    /// Returns problems of secrets, and certificates that expire soon.
    pub(super) fn warnings(&self) -> Vec<String> {
        let secrets = self.view.secrets();
        let now = unix_time();
        let expiring = secrets
            .store
            .certificates()
            .into_iter()
            .filter_map(|certificate| {
                let days = (certificate.not_after - now).div_euclid(86_400);
                expires_within(certificate.not_after, now, EXPIRY_WARNING_DAYS).then(|| {
                    let state = match days {
                        ..0 => "has expired".to_owned(),
                        0 => "expires in less than a day".to_owned(),
                        1 => "expires in 1 day".to_owned(),
                        _ => format!("expires in {days} days"),
                    };
                    format!(
                        "the certificate {} of secret {} {state}",
                        certificate.key, certificate.secret
                    )
                })
            });
        let limits = [(&self.limited, LIMITED), (&self.overflows, OVERFLOWED)]
            .into_iter()
            .filter(|(rise, _)| rise.is_recent())
            .map(|(rise, text)| format!("{text} ({} in total)", rise.count));
        let unusable = self.view.unusable();
        unusable
            .iter()
            .cloned()
            .chain(limits)
            .chain(secrets.problems.iter().map(ToString::to_string))
            .chain(expiring)
            .collect()
    }
}

const LIMITED: &str = "the proxy has reset connections for lack of room: see [tls] max_connections and \
                       max_connections_per_endpoint, the flows with the reason 238, and the limit on open files";
const OVERFLOWED: &str = "clients could not connect because the accept queues of the proxy were full: more [tls] \
                          proxy_threads accept faster";

/// A counter, and when it was last found to have risen.
#[derive(Debug, Default)]
struct Rise {
    count: u64,
    at: Option<Instant>,
}

impl Rise {
    /// Takes the counter's value. Returns whether the counter has risen, and had not for [`LIMIT_WARNING`].
    fn update(&mut self, count: u64) -> bool {
        // New threads and namespaces begin at 0.
        let has_risen = count > self.count;
        self.count = count;
        let is_new = has_risen && !self.is_recent();
        if has_risen {
            self.at = Some(Instant::now());
        }
        is_new
    }

    /// Returns whether the counter has risen within [`LIMIT_WARNING`].
    fn is_recent(&self) -> bool {
        self.at.is_some_and(|at| at.elapsed() < LIMIT_WARNING)
    }
}

/// Returns how many threads do not run, and why; `None` if all run.
fn threads_down(threads: &[ThreadState]) -> Option<String> {
    let down: Vec<_> = threads.iter().filter(|thread| !thread.is_running).collect();
    let why = down.iter().find_map(|thread| thread.failure.as_deref());
    (!down.is_empty()).then(|| {
        format!(
            "{} of {} proxy threads do not run: {}",
            down.len(),
            threads.len(),
            why.unwrap_or("starting")
        )
    })
}

/// Returns the time since 1970, s.
pub(super) fn unix_time() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

/// Raises the limit on open files as far as the system allows, and returns the limit.
fn raise_open_files() -> usize {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((DEFAULT_FILES, DEFAULT_FILES));
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    };
    usize::try_from(limit).unwrap_or(usize::MAX)
}

fn options(config: &Config) -> Options {
    let tls = &config.tls;
    let threads = match tls.proxy_threads {
        0 => thread::available_parallelism().map_or(1, |n| n.get().min(8)),
        threads => threads,
    };
    let open_files = raise_open_files();
    let room = open_files.saturating_sub(RESERVED_FILES) / FILES_PER_CONNECTION / threads.max(1);
    if room < tls.max_connections {
        warn!(
            open_files,
            connections = room,
            configured = tls.max_connections,
            "the limit on open files allows fewer connections of each proxy thread than [tls] max_connections"
        );
    }
    let connections = tls.max_connections.min(room.max(1));
    Options {
        connections,
        // Where open files allow fewer connections, an endpoint keeps its part of them.
        endpoint_connections: (connections * tls.max_connections_per_endpoint / tls.max_connections.max(1))
            .max(1),
        threads,
        connect: tls.connect_timeout,
        handshake: tls.handshake_timeout,
        head: config.http.header_timeout,
        response: tls.response_timeout,
        idle: tls.idle_timeout,
    }
}

/// Watches the secrets folder: calls `changed` with the new secrets whenever they have changed, until `changed` returns
/// false.
pub(super) fn watch(view: &View, changed: impl Fn(Secrets) -> bool + Send + 'static) -> io::Result<()> {
    let (dir, before) = (view.dir.clone(), view.secrets());
    thread::Builder::new().name("secrets".into()).spawn(move || {
        let mut store = Arc::clone(&before.store);
        let mut problems = before.problems.clone();
        drop(before);
        loop {
            thread::sleep(SECRETS_INTERVAL);
            let (new, found) = Store::load(&dir, Some(&store));
            if new.is_same(&store) && found == problems {
                continue;
            }
            store = Arc::new(new);
            problems.clone_from(&found);
            if !changed(Secrets {
                store: Arc::clone(&store),
                problems: found,
            }) {
                return;
            }
        }
    })?;
    Ok(())
}

/// Intercepted flows in the maps of the programs.
struct FlowTable {
    flows: ProxiedFlows,
    shared: Arc<Shared>,
}

impl Flows for FlowTable {
    fn removals(&self) -> u64 {
        self.flows.removals()
    }

    fn find(&self, direction: Direction, client: SocketAddr, server: SocketAddr) -> Option<Flow> {
        let key = ProxiedKey {
            client: client.ip().into(),
            server: server.ip().into(),
            client_port: client.port(),
            server_port: server.port(),
            direction,
        };
        let flow = self.flows.find(&key).ok()??;
        let mut request = flow.request;
        let view = self.shared.get();
        let snapshot = &view.snapshot;
        let state = snapshot.endpoints.get(&request.endpoint)?;
        // The programs evaluate a flow after a change of policies only with the flow's next packet. Until then the proxy
        // evaluates it, because a connection whose bytes are relayed without inspection is looked up only at the change.
        // If the peer's identity no longer exists, only the programs can find the new one, and the connection ends.
        let is_evaluated = request.revision >= state.revision;
        if !is_evaluated {
            if !snapshot.identities.contains_key(&request.remote_identity) {
                return None;
            }
            let entry = snapshot.policy_entry(
                request.endpoint,
                direction,
                request.remote_identity,
                protocol::TCP,
                Some(server.port()),
            )?;
            if Decision::from_u8(entry.decision) != Decision::Inspect
                || entry.inspector != Inspector::TlsTerminate as u8
            {
                return None;
            }
            (request.rule, request.ruleset) = (entry.rule, entry.ruleset);
            request.flags &= !punt_flags::AUDIT;
            if entry.flags & entry_flags::AUDIT != 0 {
                request.flags |= punt_flags::AUDIT;
            }
        }
        Some(Flow {
            request,
            ifindex: flow.ifindex,
            is_evaluated,
        })
    }
}

struct Registry<'a>(&'a ProxyLinks);

impl Listeners for Registry<'_> {
    fn register(&self, direction: Direction, listener: BorrowedFd<'_>, is_v6: bool) -> io::Result<()> {
        self.0
            .register(direction, is_v6, listener)
            .map_err(io::Error::other)
    }
}

/// Queue from the proxy threads to the flow ring, for records.
struct Records {
    queue: Sender<TimedRecord>,
    lost: Arc<AtomicU64>,
}

impl Reports for Records {
    fn record(&self, record: &Record) {
        palisade_inspect::steps::record(record);
        if self.queue.push((SystemTime::now(), *record)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_do_not_run_are_told_with_the_last_failure() {
        let thread = |is_running, failure: Option<&str>| ThreadState {
            is_running,
            connections: 0,
            restarts: 1,
            failure: failure.map(ToOwned::to_owned),
        };
        // A failure before the last restart is none now.
        assert_eq!(threads_down(&[thread(true, Some("before"))]), None);
        assert_eq!(
            threads_down(&[
                thread(true, Some("before")),
                thread(false, None),
                thread(false, Some("panic: why"))
            ])
            .as_deref(),
            Some("2 of 3 proxy threads do not run: panic: why")
        );
        assert_eq!(
            threads_down(&[thread(false, None)]).as_deref(),
            Some("1 of 1 proxy threads do not run: starting")
        );
    }

    #[test]
    fn secrets_are_checked_once_for_each_change() {
        let mut check = SecretCheck::default();
        let mut sets = Arc::default();
        let mut files = vec![Arc::<FileContent>::default()];
        let mut store = Arc::default();
        assert!(check.is_due(&sets, &files, &store));
        assert!(!check.is_due(&sets, &files, &store));
        // A change makes another object of the one that the check keeps, even with equal content.
        Arc::make_mut(&mut sets).insert(1, Arc::<RuleSet>::default());
        assert!(check.is_due(&sets, &files, &store) && !check.is_due(&sets, &files, &store));
        files[0] = Arc::default();
        assert!(check.is_due(&sets, &files, &store) && !check.is_due(&sets, &files, &store));
        files.push(Arc::default());
        assert!(check.is_due(&sets, &files, &store) && !check.is_due(&sets, &files, &store));
        store = Arc::default();
        assert!(check.is_due(&sets, &files, &store) && !check.is_due(&sets, &files, &store));
    }

    #[test]
    fn a_counter_that_rises_is_recent_and_new_only_once() {
        let mut rise = Rise::default();
        assert!(!rise.update(0) && !rise.is_recent());
        assert!(rise.update(3) && rise.is_recent());
        assert!(!rise.update(5) && !rise.update(5) && rise.is_recent());
        // New threads begin at 0.
        assert!(!rise.update(0));
        assert_eq!(rise.count, 0);
        rise.at = Instant::now().checked_sub(LIMIT_WARNING);
        assert!(!rise.is_recent() && rise.update(1));
    }
}
