//! The control thread.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    sync::{
        Arc,
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ipnet::IpNet;
use palisade_abi::{
    Config as DatapathConfig, Direction, EndpointState, MAX_PUNT_FRAME, MAX_PUNT_MSS, identity,
};
use palisade_datapath::{Datapath, Options, Rules, detach_all};
use palisade_flowlog::Ring;
use palisade_fqdn::{Cache, SniAddressIndex, Special};
use palisade_model::inventory::Enforcement;
use palisade_policy::compile::{Compiler, CompilerState};
use sd_notify::NotifyState;
use serde_json::Value;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};
use tracing::{debug, error, info, warn};

use super::{
    enforcer::{Enforcer, endpoint_names, world},
    events,
    fqdn::{ControlRequest, FqdnManager, Prefetch, Targets, node_servers},
    handlers::Handlers,
    interfaces::Interfaces,
    nat, netfilter,
    network::{self, Network},
    policies::{Event, PolicyFiles},
    private_dirs,
    state::{NODE, StateFile},
    sweeper::{self, Interval},
    view::{Shared, View},
    watchdog::{ControlActivity, feed_watchdog},
    watcher::{self, Changes},
    workers::Workers,
};
use crate::{
    config::{Config, Dns, WithoutPolicies, with_option},
    control::{
        api::{InterfaceStatus, PolicyFileState, Request, Status},
        server,
    },
    text::{chain, count},
};

/// Whether everything is still attached is looked at so often.
const ATTACH_CHECK_INTERVAL: Duration = Duration::from_secs(15);
/// Rules that translate addresses are looked at again no sooner than this.
const NAT_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// What failed is tried again so often.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// What outlives the daemon is written once nothing has changed for so long.
const SAVE_DEBOUNCE: Duration = Duration::from_millis(500);

/// And at the latest after so long.
const SAVE_MAX_DELAY: Duration = Duration::from_secs(10);

/// The answer to a request: what it is, or why there is none.
pub type Answer = Result<Value, String>;

/// What other threads tell the control thread.
pub enum Message {
    /// The folder of policies has changed.
    Policies(Changes),
    /// Interfaces or addresses have changed.
    Network(Network),
    /// Others have changed nftables.
    Netfilter(netfilter::Change),
    /// A signal.
    Signal(i32),
    /// Learned names need something.
    Fqdn(ControlRequest),
    /// A worker has ended; it starts again by itself.
    WorkerEnded,
    /// A request whose answer the compiler has, or that changes something.
    Ask(Request, SyncSender<Answer>),
}

impl Message {
    /// What the control thread does about it.
    const fn what(&self) -> &'static str {
        match self {
            Self::Policies(_) => "putting changed policies in force",
            Self::Network(_) => "following a change of interfaces or addresses",
            Self::Netfilter(_) => "following a change of nftables",
            Self::Signal(SIGHUP) | Self::Ask(Request::Reload, _) => "reading the configuration again",
            Self::Signal(_) | Self::Ask(Request::Stop { .. }, _) => "ending",
            Self::Fqdn(_) => "making identities of learned names",
            Self::WorkerEnded => "putting the punt link in order",
            Self::Ask(..) => "answering a command",
        }
    }
}

/// Everything that the control thread owns.
pub struct Control {
    pub config: Config,
    pub state: StateFile<CompilerState>,
    pub enforcer: Enforcer,
    pub files: PolicyFiles,
    pub interfaces: Interfaces,
    pub network: Network,
    netfilter: netfilter::Keeper,
    /// This node translates addresses.
    translates: bool,
    /// What the nftables table depends on may have changed.
    netfilter_due: bool,
    pub datapath: Arc<Datapath>,
    pub names: Arc<FqdnManager>,
    prefetch: Option<Prefetch>,
    shared: Arc<Shared>,
    sweep: Interval,
    pub workers: Workers,
    activity: Arc<ControlActivity>,
    started: Instant,
    /// Changes that were put in force.
    changes: u64,
    last_change: Duration,
    /// Every direction is denied by default, because policies cannot be had.
    closed: bool,
    /// When something was changed first and last that has to be saved; `None`: nothing.
    unsaved: Option<(Instant, Instant)>,
    /// Why the configuration could not be read again.
    reload_problem: Option<String>,
    /// What was not as it should be at the start.
    start_notes: Vec<String>,
    /// What an operator should look at since the configuration was read last.
    notes: Vec<String>,
    /// What translates addresses on this node, and when that was looked at.
    translations: RefCell<Option<(Instant, Vec<String>)>>,
}

/// Runs the daemon until it is told to end.
///
/// `replaced`: why this is not what the configuration file says now, but its last good copy.
pub fn run(config: Config, replaced: Option<String>) -> anyhow::Result<()> {
    let started = Instant::now();
    let (sender, messages) = mpsc::channel();
    // Before anything else: a signal that comes while everything is being set up ends the daemon in order, or has the
    // configuration read again, once everything is.
    forward_signals(sender.clone())?;
    let dirs = private_dirs::take(&config.node)?;

    let state = StateFile::<CompilerState>::load(&config.node.state_dir)
        .context("the thread that writes the state")?;
    let mut notes = Vec::new();
    if let Some(problem) = &dirs.state_problem {
        let note = format!("[node] state_dir: {problem}: nothing is known of what was kept there");
        error!("{note}");
        notes.push(note);
    }
    notes.extend(state.problem.clone());
    for problem in private_dirs::writable_by_others(&config) {
        warn!("{problem}");
        notes.push(problem);
    }
    let datapath = Arc::new(open(&config)?);
    if !datapath.resized().is_empty() {
        info!("maps of another size now: {}", datapath.resized().join(", "));
    }
    let enforcer = Enforcer::new(Compiler::new(&state.state.compiler), &datapath)?;
    if !datapath.is_fresh() {
        info!("a node that is guarded already: what is attached goes on enforcing the last policy");
    }

    // Watched first, read then: what changes in between is told.
    let mut files = PolicyFiles::new(&config.policy.dir, &config.node.state_dir);
    watch_policies(&config, sender.clone())?;
    files.load();
    let network = {
        let sender = sender.clone();
        network::watch(move |network| sender.send(Message::Network(network)).is_ok())
            .context("watching interfaces")?
    };

    let netfilter = netfilter::Keeper::new(netfilter::Place::new(&config));
    let translates = {
        let sender = sender.clone();
        netfilter
            .watch(move |change| sender.send(Message::Netfilter(change)).is_ok())
            .context("watching nftables")?
    };

    let mut state = state;
    let known = config
        .tls
        .verify_sni_address
        .then(Arc::<SniAddressIndex>::default);
    let names = {
        let sender = sender.clone();
        // The control thread has ended: nothing is released any more.
        let wish = move |wish| drop(sender.send(Message::Fqdn(wish)));
        let cache = Cache::new(names_config(&config));
        let cache = match &known {
            Some(known) => cache.with_sni_index(Arc::clone(known)),
            None => cache,
        };
        let mut names = FqdnManager::new(cache, datapath.learned()?, Arc::clone(&datapath), wish);
        let endpoints = endpoint_names(&world(&config, &network, &mut state.state)?);
        // A cache: its loss costs connections to learned addresses, not the start.
        if let Err(problem) = names.remember(&config.node.state_dir, endpoints) {
            let note = format!("learned names are not remembered: {problem}");
            error!("{note}");
            notes.push(note);
        }
        Arc::new(names)
    };
    let shared = Arc::new(Shared::default());
    let ring = Ring::new(config.limits.flows as usize);
    let sweep = Interval::new(config.timeouts.sweep);
    // Before any map says that a packet is to be read.
    let ended = {
        let sender = sender.clone();
        // The control thread has ended, and all workers do.
        move || drop(sender.send(Message::WorkerEnded))
    };
    let (workers, output) = Workers::start(&config, &datapath, known, ended)?;
    let (activity, heartbeats) = (Arc::<ControlActivity>::default(), workers.heartbeats());
    let mut control = Control {
        state,
        enforcer,
        files,
        interfaces: Interfaces::default(),
        network,
        netfilter,
        translates,
        netfilter_due: false,
        datapath: Arc::clone(&datapath),
        names: Arc::clone(&names),
        prefetch: None,
        shared: Arc::clone(&shared),
        sweep: sweep.clone(),
        workers,
        activity: Arc::clone(&activity),
        started,
        changes: 0,
        last_change: Duration::ZERO,
        closed: false,
        unsaved: None,
        reload_problem: replaced,
        start_notes: notes,
        notes: Vec::new(),
        translations: RefCell::new(None),
        config,
    };
    // The maps first, then the programs: nothing is ever judged by half a policy.
    control.write_datapath_config()?;
    control.new_world(Instant::now())?;
    if let Some(problem) = &control.enforcer.problem
        && datapath.is_fresh()
    {
        anyhow::bail!("the maps cannot be filled: {problem}");
    }
    // Before anything is attached that may have something to be learned.
    let records = match output {
        Some(output) => {
            names.serve(output.lessons)?;
            Some(output.records)
        }
        None => None,
    };
    control.attach();
    control.write_netfilter();
    for limited in control.limited_interfaces(&control.interfaces.report(&control.datapath)) {
        warn!("{limited}");
    }
    control.retire_old_maps();

    let read = events::read(datapath.events()?, Arc::clone(&ring), Arc::clone(&shared))?;
    if let Some(records) = records {
        events::records(records, Arc::clone(&ring), Arc::clone(&shared))?;
    }
    sweeper::run(
        Arc::clone(&datapath),
        sweep,
        Arc::clone(&ring),
        Arc::clone(&shared),
        Arc::clone(&names),
    )?;
    let clients = Handlers {
        control: sender,
        datapath,
        shared,
        names: Arc::clone(&names),
        ring,
        events: read,
        activity: Arc::clone(&activity),
        heartbeats: heartbeats.clone(),
        netfilter: netfilter::Place::new(&control.config),
        server: std::sync::OnceLock::new(),
    };
    let path = control.config.node.socket.clone();
    let clients = Arc::new(clients);
    let socket = server::listen(dirs.socket, Arc::clone(&clients))
        .with_context(|| format!("control socket {}", path.display()))?;
    // Nobody else sets it.
    let _ = clients.server.set(Arc::clone(&socket.counts));
    // Each of them is no news: the line counts them.
    control.files.take_news();
    info!(
        "running: {} in force, ready in {:?}",
        count(control.policy_count(), "policy", "policies"),
        started.elapsed()
    );
    notify(&[NotifyState::Ready]);
    feed_watchdog(activity, heartbeats).context("the thread that feeds the watchdog")?;
    // It has worked as a whole: this is what a start with a broken file goes back to.
    control.keep_config();
    let end = control.serve(&messages);
    notify(&[NotifyState::Stopping]);
    control.save();
    if let Err(problem) = control.state.keeper.flush() {
        error!("{problem}: what has changed since it was written last is lost");
    }
    names.flush();
    control.workers.end();
    if let End::Detach(answer) = end {
        let done = detach_all(&control.config.node.pin_dir).map_err(|problem| problem.to_string());
        // What is left of the table would stop interfaces that are made later.
        let table = netfilter::Place::new(&control.config)
            .remove()
            .map_err(|problem| problem.to_string());
        let done = done.and(table);
        match &done {
            Ok(()) => info!("everything is detached"),
            Err(problem) => error!("detaching: {problem}"),
        }
        // The client may have gone.
        let _ = answer.send(done.clone().map(|()| Value::Null));
        if let Err(problem) = done {
            anyhow::bail!("not everything could be detached: {problem}");
        }
    } else {
        // Interfaces that are made while no daemon runs are not guarded.
        control.netfilter.close_forwarding();
        info!("ended; what is attached goes on enforcing the last policy");
    }
    socket.close();
    Ok(())
}

/// How the daemon is to end.
enum End {
    /// What is attached stays.
    Stay,
    /// Nothing stays; the answer goes to whoever asked for that.
    Detach(SyncSender<Answer>),
}

fn forward_signals(sender: mpsc::Sender<Message>) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("signals")?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in &mut signals {
            if sender.send(Message::Signal(signal)).is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

fn watch_policies(config: &Config, sender: mpsc::Sender<Message>) -> anyhow::Result<()> {
    let (dir, debounce) = (config.policy.dir.clone(), config.policy.debounce);
    watcher::watch(dir, debounce, move |changes| {
        sender.send(Message::Policies(changes)).is_ok()
    })
    .context("watching policies")
}

fn open(config: &Config) -> anyhow::Result<Datapath> {
    let limits = palisade_datapath::Limits {
        conntrack_entries: config.limits.conntrack,
        fragment_entries: config.limits.fragments,
        policy_entries: config.limits.policy,
        ipcache_entries: config.limits.ipcache,
        learned_entries: config.limits.learned,
        prefix_entries: config.limits.ipcache,
        rules: config.limits.rules,
        ..palisade_datapath::Limits::default()
    };
    let options = Options {
        pin_dir: config.node.pin_dir.clone(),
        limits,
    };
    let error = match Datapath::open(&options) {
        Ok(datapath) => return Ok(datapath),
        Err(error) => error,
    };
    // The message has its end only: the whole log is what a report of the refusal needs.
    let Some(log) = error.verifier_log() else {
        return Err(anyhow::anyhow!(with_option(&error)));
    };
    let kept = keep_verifier_log(&config.node.state_dir, &log);
    Err(anyhow::Error::new(error).context(kept))
}

/// Keeps what the verifier said, and returns where it is, or why it is not.
fn keep_verifier_log(state_dir: &Path, log: &str) -> String {
    let path = state_dir.join("verifier.log");
    match std::fs::write(&path, log) {
        Ok(()) => format!("the verifier's whole log is in {}", path.display()),
        Err(problem) => format!(
            "the verifier's log cannot be kept in {}: {problem}",
            path.display()
        ),
    }
}

/// How much is learned, and for how long.
fn names_config(config: &Config) -> palisade_fqdn::Config {
    let (dns, learned) = (&config.dns, config.limits.learned as usize);
    let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    palisade_fqdn::Config {
        min_ttl: milliseconds(dns.min_ttl),
        max_ttl: milliseconds(dns.max_ttl),
        addresses_per_name: dns.addresses_per_name as usize,
        addresses_per_endpoint: dns.addresses_per_endpoint as usize,
        // An answer's addresses are written before what had to make room for them is removed: the map holds more than
        // the cache by the addresses of some answers (at most 4,095 A records fit into one).
        addresses_total: learned - (learned / 8).min(8192),
        aliases: dns.follow_cname,
        special: if dns.refuse_special {
            Special::Refuse(dns.allow_special.clone())
        } else {
            Special::Learn
        },
    }
}

/// Tells systemd, if it started us.
fn notify(states: &[NotifyState<'_>]) {
    if let Err(problem) = sd_notify::notify(states) {
        warn!("telling the service manager: {problem}");
    }
}

impl Control {
    /// Does what it is told until it is told to end.
    fn serve(&mut self, messages: &Receiver<Message>) -> End {
        loop {
            // Also when messages come without a pause.
            if self
                .unsaved
                .is_some_and(|(first, _)| first.elapsed() > SAVE_MAX_DELAY)
            {
                self.save();
            }
            self.activity.rest();
            let message = match messages.recv_timeout(self.patience()) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => {
                    self.activity.begin("looking after everything");
                    self.idle();
                    self.write_netfilter();
                    continue;
                }
                // The control thread itself holds no sender, but the clients do for as long as the daemon runs.
                Err(RecvTimeoutError::Disconnected) => return End::Stay,
            };
            self.activity.begin(message.what());
            match message {
                Message::Policies(changes) => self.policies_changed(&changes),
                Message::Network(network) => self.network_changed(network),
                Message::Netfilter(change) => {
                    if change.touched || change.may_be_touched {
                        self.netfilter.was_touched(change.touched);
                    }
                    self.translates = change.translates;
                    self.netfilter_due = true;
                }
                Message::Signal(SIGHUP) => {
                    // What is wrong with the file is in the log already.
                    if let Err(problem) = self.reload() {
                        warn!("SIGHUP: {problem}");
                    }
                }
                Message::Signal(_) => return End::Stay,
                Message::Fqdn(ControlRequest::Identities) => {
                    let workers = &mut self.workers;
                    self.enforcer
                        .extend(&self.datapath, &self.names, |sets| workers.set_rules(sets));
                    self.publish();
                    self.changed();
                }
                Message::Fqdn(ControlRequest::Rejudge) => {
                    self.names.rearm(ControlRequest::Rejudge);
                    let endpoints = self.names.take_rejudged();
                    self.enforcer.compiler.judge_again(endpoints);
                    self.enforce(Instant::now());
                }
                Message::Fqdn(ControlRequest::Prune) => {
                    self.names.rearm(ControlRequest::Prune);
                    if self.enforcer.prune(&self.names) {
                        self.enforce(Instant::now());
                    }
                }
                Message::WorkerEnded => self.repair_punt_link(),
                Message::Ask(Request::Stop { detach: true }, answer) => return End::Detach(answer),
                Message::Ask(Request::Stop { detach: false }, answer) => {
                    let _ = answer.send(Ok(Value::Null));
                    return End::Stay;
                }
                Message::Ask(request, answer) => {
                    // A client that has gone needs no answer.
                    let _ = answer.send(self.answer(request));
                }
            }
            self.write_netfilter();
        }
    }

    /// How long to wait for a message.
    fn patience(&self) -> Duration {
        let save = self.unsaved.map(|(first, last)| {
            let quiet = SAVE_DEBOUNCE.saturating_sub(last.elapsed());
            quiet.min(SAVE_MAX_DELAY.saturating_sub(first.elapsed()))
        });
        let failed =
            self.enforcer.problem.is_some() || self.interfaces.has_failures() || self.netfilter.has_failed();
        let again = failed.then_some(RETRY_INTERVAL);
        [save, again]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(ATTACH_CHECK_INTERVAL)
    }

    /// Something was changed that has to be saved.
    fn changed(&mut self) {
        let now = Instant::now();
        self.unsaved = Some((self.unsaved.map_or(now, |(first, _)| first), now));
    }

    /// Nothing has happened for a while.
    fn idle(&mut self) {
        if self.unsaved.is_some() {
            self.save();
        }
        if self.enforcer.problem.is_some() {
            self.enforce(Instant::now());
        }
        self.attach();
    }

    fn policies_changed(&mut self, changes: &Changes) {
        let begun = Instant::now();
        let offers = self.files.update(changes);
        let read = begun.elapsed();
        if self.closed && self.files.unknown().is_none() {
            info!("all policies can be had again: endpoints are denied by default as the configuration says");
            if let Err(problem) = self.new_world(begun) {
                error!("{problem:#}");
            }
        }
        let before = self.enforcer.compiler.snapshot().endpoints.clone();
        if offers {
            self.enforcer.compile(None, &mut self.files);
            let compiled = begun.elapsed();
            self.enforce(begun);
            debug!(
                "policies changed: read in {read:?}, compiled in {:?}, in force after {:?}, all done after {:?}",
                compiled.saturating_sub(read),
                self.last_change,
                begun.elapsed()
            );
        }
        self.log_policies(&before, begun);
        self.changed();
    }

    /// One line for each file that has changed: the audit trail of what was put in force and when.
    fn log_policies(&mut self, before: &BTreeMap<u16, EndpointState>, begun: Instant) {
        let news = self.files.take_news();
        if news.is_empty() {
            return;
        }
        let endpoints = self.touched(before);
        let milliseconds = begun.elapsed().as_secs_f64() * 1_000.0;
        let problem = self.enforcer.problem.as_deref();
        for news in news {
            let (file, policies) = (news.file, news.policies.join(","));
            let revision = self.changes;
            match (news.event, problem) {
                (Event::Refused, _) => info!(
                    event = news.event.name(),
                    file,
                    policy = policies,
                    revision,
                    "policy file refused, what it said before stays in force if it was good"
                ),
                (event, Some(problem)) => info!(
                    event = "rolled-back",
                    wanted = event.name(),
                    file,
                    policy = policies,
                    revision,
                    problem,
                    "policy change rolled back, the last state stays in force"
                ),
                (event, None) => info!(
                    event = event.name(),
                    file,
                    policy = policies,
                    revision,
                    endpoints,
                    enforced_after_ms = milliseconds,
                    "policy {}",
                    event.name()
                ),
            }
        }
    }

    /// Names of the endpoints that are judged by another policy than before.
    fn touched(&self, before: &BTreeMap<u16, EndpointState>) -> String {
        const MAX_NAMES_SHOWN: usize = 20;
        let now = &self.enforcer.compiler.snapshot().endpoints;
        let names = endpoint_names(self.enforcer.compiler.inventory());
        let ids = before
            .keys()
            .chain(now.keys().filter(|id| !before.contains_key(*id)));
        let touched: Vec<&str> = ids
            .filter(|id| before.get(*id) != now.get(*id))
            .map(|id| names.get(id).map_or("(gone)", String::as_str))
            .collect();
        let shown = touched[..touched.len().min(MAX_NAMES_SHOWN)].join(",");
        match touched.len().saturating_sub(MAX_NAMES_SHOWN) {
            0 => shown,
            more => format!("{shown} and {more} more"),
        }
    }

    fn network_changed(&mut self, network: Network) {
        let begun = Instant::now();
        let addresses = network.addresses != self.network.addresses;
        let others = |network: &Network| {
            (
                network.links.clone(),
                network.alternatives.clone(),
                network.masters.clone(),
                network.lowers.clone(),
            )
        };
        let links = others(&network) != others(&self.network);
        self.network = network;
        self.repair_punt_link();
        if !addresses && !links {
            return;
        }
        if addresses {
            if let Err(problem) = self.new_world(begun) {
                error!("{problem:#}");
            }
        } else {
            self.publish();
        }
        self.attach();
    }

    fn repair_punt_link(&mut self) {
        if self.workers.repair(&self.datapath, &self.network)
            && let Err(problem) = self.write_datapath_config()
        {
            error!("the programs cannot be told of the workers' punt link: {problem:#}");
        }
    }

    /// Has everything compiled that depends on endpoints, peers and options, and puts it in force.
    fn new_world(&mut self, begun: Instant) -> anyhow::Result<()> {
        let mut world = world(&self.config, &self.network, &mut self.state.state)?;
        self.closed =
            self.config.node.on_failure == WithoutPolicies::Closed && self.files.unknown().is_some();
        if self.closed && world.options.enforcement == Enforcement::Default {
            world.options.enforcement = Enforcement::Always;
        }
        let world = (world != *self.enforcer.compiler.inventory()).then_some(world);
        self.interfaces.configure(&self.config, &self.state.state);
        self.enforcer.compile(world, &mut self.files);
        self.enforce(begun);
        Ok(())
    }

    fn enforce(&mut self, begun: Instant) {
        let gone = self.gone_endpoints();
        let workers = &mut self.workers;
        if self
            .enforcer
            .enforce(&self.datapath, &self.names, |sets| workers.set_rules(sets))
        {
            self.changes += 1;
            self.last_change = begun.elapsed();
        }
        self.forget_connections(&gone);
        self.workers.forget_endpoints(&gone);
        self.publish();
        self.prefetch();
        self.changed();
        self.netfilter_due = true;
    }

    /// Has names resolved ahead, as the configuration and the policies want it.
    fn prefetch(&mut self) {
        let dns = &self.config.dns;
        if self.prefetch.is_none() && dns.prefetch {
            match Prefetch::start(&self.names) {
                Ok(prefetch) => self.prefetch = Some(prefetch),
                Err(problem) => error!("[dns] prefetch: {problem}"),
            }
        }
        let Some(prefetch) = &self.prefetch else { return };
        let mut targets = Targets::default();
        if dns.prefetch {
            targets.names = self.enforcer.full_names();
            targets.servers.clone_from(&dns.servers);
            if targets.servers.is_empty() {
                targets.servers = node_servers(Path::new("/etc/resolv.conf"));
            }
        }
        prefetch.set(targets);
    }

    /// Endpoints that are in force and will not be any more.
    fn gone_endpoints(&self) -> Vec<u16> {
        let view = self.shared.get();
        let wanted = &self.enforcer.compiler.snapshot().endpoints;
        let known = view.snapshot.endpoints.keys().copied();
        known.filter(|id| !wanted.contains_key(id)).collect()
    }

    /// Another endpoint may get the number one day; it must not inherit connections.
    fn forget_connections(&self, endpoints: &[u16]) {
        if endpoints.is_empty() {
            return;
        }
        let outcome = self
            .datapath
            .conntrack()
            .remove_if(|key, _| endpoints.contains(&key.endpoint));
        if let Err(problem) = outcome {
            warn!("forgetting connections of endpoints that are gone: {problem}");
        }
    }

    /// Lets everybody else see what is in force.
    fn publish(&self) {
        self.shared.set(View::new(
            &self.config.node.name,
            self.enforcer.compiler.snapshot().clone(),
            self.enforcer.compiler.inventory(),
            &self.network.links,
            Some(Arc::clone(&self.names)),
        ));
    }

    fn attach(&mut self) {
        let world = self.enforcer.compiler.inventory();
        self.interfaces
            .reconcile(&self.datapath, &self.network, &self.config, world);
        self.workers.set_attached(self.interfaces.attached());
        self.netfilter_due = true;
    }

    /// Makes the nftables table what interfaces, addresses and the node's policy want. Only after the interfaces were
    /// attached: the table of a daemon before this one knows which are guarded.
    fn write_netfilter(&mut self) {
        if !std::mem::take(&mut self.netfilter_due) {
            return;
        }
        let enforced = |direction| self.enforcer.node_enforces(direction);
        let (ingress, egress) = (enforced(Direction::Ingress), enforced(Direction::Egress));
        let mut guarded = self.interfaces.rules(&self.network, ingress || egress);
        // By an interface without programs, packets leave the node that entered it by another one. Where there is none, one
        // end of every forwarded packet is a guarded interface, whose programs drop what did not enter by one (219).
        let punt_link = [0, 1].map(|end| format!("{}{end}", self.config.worker.interface));
        guarded.forwards |= self.network.links.iter().any(|(name, ifindex)| {
            name != "lo" && !punt_link.contains(name) && !guarded.judged.contains(ifindex)
        });
        let world = self.enforcer.compiler.inventory();
        let (nodes, workloads): (Vec<_>, Vec<_>) =
            world.endpoints.iter().partition(|endpoint| endpoint.is_node());
        let own: BTreeSet<IpAddr> = nodes
            .iter()
            .flat_map(|node| node.addresses.iter().copied())
            .chain(self.network.addresses.iter().copied())
            .collect();
        let rules = Rules {
            endpoints: workloads
                .iter()
                .flat_map(|endpoint| endpoint.addresses.iter().copied())
                .filter(|address| !own.contains(address))
                .collect(),
            own: own
                .into_iter()
                .map(IpNet::from)
                .chain(network::local_routes())
                .collect(),
            is_enforced: ingress,
            has_nat: self.translates,
            ..guarded
        };
        self.netfilter.write(rules);
    }

    /// Maps of an older version serve until every interface has this version's programs.
    fn retire_old_maps(&self) {
        if !self.interfaces.has_failures()
            && let Err(problem) = self.datapath.retire_other_versions()
        {
            warn!("removing maps of another version: {problem}");
        }
    }

    fn write_datapath_config(&self) -> anyhow::Result<()> {
        let nanoseconds = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let timeouts = &self.config.timeouts;
        let mut datapath_config = DatapathConfig {
            tcp_opening: nanoseconds(timeouts.tcp_opening),
            tcp_established: nanoseconds(timeouts.tcp_established),
            tcp_closing: nanoseconds(timeouts.tcp_closing),
            udp: nanoseconds(timeouts.udp),
            other: nanoseconds(timeouts.other),
            fragment: nanoseconds(timeouts.fragment),
            trace_interval: nanoseconds(timeouts.trace_interval),
            events_per_second: u64::from(self.config.limits.events_per_second),
            host_endpoint: u32::from(NODE),
            world_ipv4: identity::WORLD_IPV4,
            world_ipv6: identity::WORLD_IPV6,
            rules: self.config.limits.rules,
            ..DatapathConfig::default()
        };
        self.workers.fill_datapath_config(&mut datapath_config);
        self.datapath.set_config(&datapath_config)?;
        Ok(())
    }

    /// Reads the configuration and the policies again.
    pub fn reload(&mut self) -> Result<(), String> {
        let begun = Instant::now();
        let mut config = Config::load(&self.config.path).map_err(|errors| {
            let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
            let problem = format!("the configuration stays as it was: {}", lines.join("; "));
            error!("{problem}");
            self.reload_problem = Some(problem.clone());
            problem
        })?;
        self.reload_problem = None;
        // What the process was started with stays until it is started again.
        let (old, new) = (&self.config, &mut config);
        let mut fixed: Vec<&str> = Vec::new();
        let mut keep = |changed: bool, what: &'static str| {
            if changed {
                fixed.push(what);
            }
        };
        keep(old.node.pin_dir != new.node.pin_dir, "[node] pin_dir");
        keep(old.node.state_dir != new.node.state_dir, "[node] state_dir");
        keep(old.node.socket != new.node.socket, "[node] socket");
        keep(old.policy.dir != new.policy.dir, "[policy] dir");
        keep(old.policy.debounce != new.policy.debounce, "[policy] debounce");
        let sizes = |limits: crate::config::Limits| crate::config::Limits {
            events_per_second: 0,
            ..limits
        };
        keep(
            names_config(old) != names_config(new),
            "[dns] min_ttl, max_ttl, addresses_per_name, addresses_per_endpoint, follow_cname, refuse_special, \
             allow_special",
        );
        keep(old.dns.deny_answer != new.dns.deny_answer, "[dns] deny_answer");
        keep(old.http != new.http, "[http]");
        keep(old.tls != new.tls, "[tls]");
        keep(sizes(old.limits) != sizes(new.limits), "[limits]");
        let started_with = |worker: &crate::config::Worker| crate::config::Worker {
            on_failure: crate::config::OnFailure::Drop,
            ..worker.clone()
        };
        keep(
            started_with(&old.worker) != started_with(&new.worker),
            "[worker] (but on_failure)",
        );
        self.notes.clear();
        if !fixed.is_empty() {
            let note = format!("changed, but only used after a restart: {}", fixed.join(", "));
            warn!("{note}");
            self.notes.push(note);
        }
        new.node.pin_dir.clone_from(&old.node.pin_dir);
        new.node.state_dir.clone_from(&old.node.state_dir);
        new.node.socket.clone_from(&old.node.socket);
        new.policy.dir.clone_from(&old.policy.dir);
        new.dns = Dns {
            prefetch: new.dns.prefetch,
            servers: std::mem::take(&mut new.dns.servers),
            ..old.dns.clone()
        };
        new.http.clone_from(&old.http);
        new.tls.clone_from(&old.tls);
        new.policy.debounce = old.policy.debounce;
        new.limits = crate::config::Limits {
            events_per_second: new.limits.events_per_second,
            ..old.limits
        };
        new.worker = crate::config::Worker {
            on_failure: new.worker.on_failure,
            ..old.worker.clone()
        };
        let (audit, enforcement) = (config.policy.audit, config.policy.enforcement);
        if audit != self.config.policy.audit {
            info!(
                event = "audit",
                endpoints = "all",
                audit,
                "[policy] audit was switched"
            );
        }
        if enforcement != self.config.policy.enforcement {
            let enforcement = super::handlers::enforcement_name(enforcement);
            info!(
                event = "enforcement",
                endpoints = "all",
                enforcement,
                "[policy] enforcement was changed"
            );
        }
        let before = self.enforcer.compiler.snapshot().endpoints.clone();
        self.config = config;
        self.workers.set_on_failure(self.config.worker.on_failure);
        self.sweep.set(self.config.timeouts.sweep);
        self.write_datapath_config().map_err(|problem| chain(&problem))?;
        self.files.update(&Changes::all());
        self.new_world(begun).map_err(|problem| chain(&problem))?;
        self.attach();
        self.log_policies(&before, begun);
        info!(
            event = "reload",
            revision = self.changes,
            endpoints = self.touched(&before),
            enforced_after_ms = begun.elapsed().as_secs_f64() * 1_000.0,
            "the configuration was read again"
        );
        self.keep_config();
        Ok(())
    }

    /// What of the configuration that was read last only counts after a restart.
    pub fn reload_notes(&self) -> &[String] {
        &self.notes
    }

    fn save(&mut self) {
        self.unsaved = None;
        self.state.state.compiler = self.enforcer.compiler.state();
        self.state.save();
        self.state.keeper.policies(self.files.to_keep());
    }

    /// Has the configuration kept for a start that finds its file broken.
    fn keep_config(&self) {
        // Not what was kept already, and not what is going to be mended.
        if self.reload_problem.is_none() {
            let text = super::last_good::text(&self.config);
            self.state.keeper.config(text);
        }
    }

    fn policy_count(&self) -> usize {
        self.enforcer
            .compiler
            .files()
            .map(|(_, content)| content.policies.len())
            .sum()
    }

    /// Sets audit mode of an endpoint.
    pub fn set_audit(&mut self, name: String, audit: bool) -> Result<(), String> {
        let begun = Instant::now();
        let changed = if audit {
            self.state.state.audit.insert(name.clone())
        } else {
            self.state.state.audit.remove(&name)
        };
        if changed {
            self.new_world(begun).map_err(|problem| chain(&problem))?;
            info!(
                event = "audit",
                endpoints = name,
                audit,
                revision = self.changes,
                enforced_after_ms = begun.elapsed().as_secs_f64() * 1_000.0,
                "PolicyAuditMode was switched"
            );
        }
        // Also if it was so already: an earlier attempt may not have been kept.
        self.save();
        self.state.keeper.flush().map_err(|problem| {
            format!(
                "{problem}: the option is in force now but NOT KEPT, so it is lost at the next start; it is written \
                 when that is possible, see `palisade status`"
            )
        })
    }

    /// What the punt link limits at interfaces whose packets may be longer than it takes, if anything is to be read.
    fn limited_interfaces(&self, interfaces: &[InterfaceStatus]) -> Vec<String> {
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
                    "interface {name}: its MTU of {mtu} is more than the workers are given ({MAX_PUNT_FRAME} bytes \
                     a frame): connections that are read agree on segments of {MAX_PUNT_MSS} bytes; what is longer \
                     and must be read is dropped (232)"
                )
            })
            .collect()
    }

    /// `palisade status`, as far as the control thread knows it.
    pub fn status(&self) -> Status {
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
        let mut warnings = self.notes.clone();
        warnings.extend(self.start_notes.iter().cloned());
        if let Some(problem) = self.state.keeper.problem() {
            warnings.push(format!(
                "{problem}: what has changed since is NOT KEPT and is lost at the next start; it is tried again"
            ));
        }
        warnings.extend(self.names.journal_problem());
        if let Some(problem) = self.files.unknown() {
            let meaning = match (self.closed, self.config.policy.enforcement) {
                (true, Enforcement::Default) => "closed: whatever no policy allows is denied",
                _ => "open: whatever no other policy denies passes",
            };
            missing.push(format!("{problem}; [node] on_failure = {meaning}"));
        }
        warnings.extend(self.reload_problem.clone());
        warnings.extend(self.files.folder_problem().map(ToOwned::to_owned));
        warnings.extend(self.translation_note());
        warnings.extend(self.netfilter.warnings());
        for file in &policy_files {
            match file.state {
                PolicyFileState::InForce => {}
                PolicyFileState::LastGood => {
                    warnings.push(format!("{}: broken; what it said before is in force", file.file));
                }
                PolicyFileState::Unused => {
                    missing.push(format!("{}: broken; nothing of it is in force", file.file));
                }
            }
        }
        warnings.extend(self.limited_interfaces(&interfaces));
        let remarks = &self.enforcer.compiler.snapshot().diagnostics;
        warnings.extend(remarks.iter().map(ToString::to_string));
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.config.node.name.clone(),
            pid: std::process::id(),
            uptime: self.started.elapsed().as_secs(),
            ready: missing.is_empty(),
            missing,
            warnings,
            enforcement: super::handlers::enforcement_name(self.config.policy.enforcement).to_owned(),
            audit: self.config.policy.audit,
            revision: self.changes,
            last_change_ms: self.last_change.as_secs_f64() * 1_000.0,
            endpoints: self.endpoints_with(&interfaces),
            interfaces,
            policy_dir: self.config.policy.dir.display().to_string(),
            policy_files,
            workers: self.workers.report(),
            ..Status::default()
        }
    }

    /// What an operator must know where this node translates addresses; none where it does not.
    pub fn translation_note(&self) -> Option<String> {
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
                "this node translates or redirects ({}): an incoming packet is judged by its addresses and ports before DNAT, \
                 an outgoing one by those after SNAT; `policy trace` does not know the rules",
                found.join("; ")
            )
        })
    }

    /// Returns the options of an endpoint, by their name: whether it is in audit mode.
    pub fn audit_options(&self, name: &str) -> BTreeMap<String, bool> {
        [(
            "PolicyAuditMode".to_owned(),
            self.state.state.audit.contains(name),
        )]
        .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_log_is_kept_and_the_message_says_where() {
        let dir = tempfile::tempdir().unwrap();
        let said = keep_verifier_log(dir.path(), "R1 invalid mem access\n");
        let path = dir.path().join("verifier.log");
        assert_eq!(said, format!("the verifier's whole log is in {}", path.display()));
        assert_eq!(std::fs::read_to_string(path).unwrap(), "R1 invalid mem access\n");
        let said = keep_verifier_log(&dir.path().join("gone"), "");
        assert!(
            said.starts_with("the verifier's log cannot be kept in ") && said.contains("No such file"),
            "{said}"
        );
    }
}
