//! The phases of the daemon: [`open`] takes over the state file and the maps of the previous process, [`watch`] reads
//! and watches policies, interfaces and nftables, [`fill`] writes the maps, [`attach`] attaches the programs, [`serve`]
//! starts the remaining threads; then the control thread handles messages until [`shut_down`].
//!
//! The order keeps two invariants. No change is missed: each source is watched before it is read, and a later change
//! arrives as a message. No packet meets a half-filled map or an inspector that does not run: workers start before the
//! maps refer to inspectors, and the programs are attached last.

use std::{
    cell::RefCell,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use palisade_datapath::{Datapath, Options, detach_all, monotonic_coarse};
use palisade_flowlog::Ring;
use palisade_fqdn::{Cache, SniAddressIndex, Special};
use palisade_hubble::agent::AgentEvent;
use palisade_policy::compile::{Compiler, CompilerState};
use palisade_worker::{Receiver, TimedRecord};
use sd_notify::NotifyState;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
    iterator::Signals,
};
use tracing::{error, info, warn};

use super::{
    capturing::CapturePlace,
    changes::{Changes as PolicyChanges, Store},
    control::{Control, End},
    discover::{self, Discovery},
    enforcer::{Enforcer, endpoint_names, inventory},
    events,
    export::Exports,
    fqdn::FqdnManager,
    handlers::Handlers,
    handover::{self, Program, Received},
    hubble::{AgentEvents, AgentQueue, Hubble},
    interception::{self, InspectorRules, Interception},
    interfaces::Interfaces,
    log_control::LogControl,
    losses,
    measured::Measured,
    message::{Message, Reply},
    metrics, netfilter,
    network::{self, Network},
    policies::PolicyFiles,
    private_dirs,
    proxy_link::ProxyLink,
    record_queue,
    rule_numbers::RuleNumbers,
    state::StateFile,
    sweeper::{self, Interval},
    view::Shared,
    watchdog::{self, ControlActivity, feed_watchdog, notify},
    watcher,
    workers::Workers,
};
use crate::{
    config::{Config, with_option},
    control::{
        api::Restarting,
        server::{self, Socket},
    },
    text::{count, milliseconds},
};

/// Runs the daemon until a signal or a client ends it. `replaced`: why `config` is the last good copy of the file;
/// `None` if it is the file itself.
///
/// # Errors
/// A phase of the start failed, or not everything could be detached at the end.
pub(super) fn run(config: Config, replaced: Option<String>) -> anyhow::Result<()> {
    let started = Instant::now();
    let program = Program::of_this_process();
    let received = handover::receive();
    let (sender, messages) = mpsc::channel();
    // The signal handlers are installed first, so that a signal during the start is queued and handled after the start.
    let end_signals = EndSignals::register().context("signals")?;
    forward_signals(sender.clone())?;
    let dirs = private_dirs::take(&config.node)?;
    let opened = open(&config, dirs.state_problem.as_deref())?;
    let watched = watch(&config, &sender)?;
    let (agent_events, agent_queue) = AgentEvents::new();
    let (mut control, records) = fill(
        config,
        opened,
        watched,
        (started, program, received),
        &sender,
        agent_events,
    )?;
    control.reload_problem = replaced;
    attach(&mut control);
    let (socket, hubble) = serve(&mut control, records, dirs.socket, sender, agent_queue)?;
    control.report_first_policies(); // The next line counts them.
    info!(
        ready_after_ms = milliseconds(started.elapsed()),
        "the daemon runs with {} in force",
        count(control.policy_count(), "policy", "policies"),
    );
    notify(&[NotifyState::Ready]);
    feed_watchdog(Arc::clone(&control.activity), control.workers.heartbeats())
        .context("the thread that feeds the watchdog")?;
    // The start has succeeded with this configuration, so it is kept for a later start that finds the file broken.
    control.keep_config();
    let end = control.serve(&messages);
    hubble.close();
    shut_down(control, &messages, socket, end, &end_signals)
}

/// State file and pinned maps of the previous process.
struct Opened {
    state: StateFile<CompilerState>,
    datapath: Arc<Datapath>,
    enforcer: Enforcer,
    /// Problems for `palisade status`.
    notes: Vec<String>,
}

fn open(config: &Config, state_problem: Option<&str>) -> anyhow::Result<Opened> {
    let state = StateFile::<CompilerState>::load(&config.node.state_dir)
        .context("the thread that writes the state")?;
    let mut notes = Vec::new();
    if let Some(problem) = state_problem {
        let note = format!("[node] state_dir: {problem}: the state of earlier runs is not available");
        error!(dir = %config.node.state_dir.display(), error = problem, "the state directory cannot be used");
        notes.push(note);
    }
    notes.extend(state.problem.clone());
    for problem in private_dirs::writable_by_others(config) {
        warn!(%problem, "another user can change what is enforced");
        notes.push(problem);
    }
    let datapath = Arc::new(open_datapath(config)?);
    if !datapath.resized().is_empty() {
        info!(maps = datapath.resized().join(", "), "maps are resized");
    }
    let mut compiler = Compiler::new(&state.state.compiler);
    compiler.limit_rules(config.limits.rules);
    let enforcer = Enforcer::new(compiler, &datapath)?;
    if let Some(version) = datapath.earlier_version() {
        info!(
            from = version,
            to = palisade_abi::VERSION,
            "the layout of the maps is upgraded; the programs of the earlier version enforce until they are replaced"
        );
    } else if !datapath.is_fresh() {
        info!("found programs of a previous run; they enforce the last policy until the first update");
    }
    Ok(Opened {
        state,
        datapath,
        enforcer,
        notes,
    })
}

/// Policies, interfaces and nftables as first read. A thread watches each source and sends a message when the source
/// changes.
struct Watched {
    files: PolicyFiles,
    policy_changes: PolicyChanges,
    network: Network,
    discovery: Discovery,
    netfilter: netfilter::Keeper,
    /// Whether this node translates addresses.
    translates: bool,
}

fn watch(config: &Config, sender: &Sender<Message>) -> anyhow::Result<Watched> {
    let mut files = PolicyFiles::new(&config.policy.dir, &config.node.state_dir);
    // Before the folder is read: a change that was not confirmed in time must not be enforced again.
    let events = sender.clone();
    let (store, recovered) = Store::start(&config.node.state_dir, &config.policy.dir, move |event| {
        // Sending fails only while the daemon ends.
        drop(events.send(Message::Store(event)));
    })
    .context("the thread of the policy history")?;
    files.pin(recovered.unwritten.clone());
    let policy_changes = PolicyChanges::new(store, recovered);
    let policies = sender.clone();
    watcher::watch(
        config.policy.dir.clone(),
        config.policy.debounce,
        move |changes| policies.send(Message::Policies(changes)).is_ok(),
    )
    .context("watching policies")?;
    files.load();
    let links = sender.clone();
    let network = network::watch(move |network| links.send(Message::Network(network)).is_ok())
        .context("watching interfaces")?;
    let workloads = sender.clone();
    let discovery = Discovery::start(&config.discover, config.limits.discovered as usize, move || {
        workloads.send(Message::Workloads).is_ok()
    })
    .context("watching workloads")?;
    let netfilter = netfilter::Keeper::new(netfilter::Place::new(config));
    let rules = sender.clone();
    let translates = netfilter
        .watch(move |change| rules.send(Message::Netfilter(change)).is_ok())
        .context("watching nftables")?;
    Ok(Watched {
        files,
        policy_changes,
        network,
        discovery,
        netfilter,
        translates,
    })
}

/// Starts the FQDN manager and the workers, and writes all maps. Returns the data of the control thread, and the
/// receivers of the records of the workers, if there are workers, and of the proxy threads.
fn fill(
    config: Config,
    opened: Opened,
    watched: Watched,
    (started, program, received): (Instant, Program, Received),
    sender: &Sender<Message>,
    agent_events: AgentEvents,
) -> anyhow::Result<(Control, RecordQueues)> {
    let Opened {
        mut state,
        datapath,
        enforcer,
        mut notes,
    } = opened;
    let sni_index = config
        .tls
        .verify_sni_address
        .then(Arc::<SniAddressIndex>::default);
    let cache = Cache::new(fqdn_config(&config));
    let cache = match &sni_index {
        Some(index) => cache.with_sni_index(Arc::clone(index)),
        None => cache,
    };
    let fqdn = sender.clone();
    // Sending fails only while the daemon ends, when no DNS answer is forwarded any more.
    let request = move |request| drop(fqdn.send(Message::Fqdn(request)));
    let mut names = FqdnManager::new(cache, datapath.learned()?, Arc::clone(&datapath), request);
    // Workloads that are gone, or run again, since the last run of the daemon leave first, so that no endpoint gets the
    // connections and learned names of another one.
    let gone = discover::take_over(&config, &watched.network, &watched.discovery, &mut state.state);
    let endpoints = endpoint_names(&inventory(&config, &watched.network, &mut state.state)?);
    // Learned names are a cache. Without the journal, connections to learned addresses fail until clients resolve the
    // names again, but the daemon can start.
    if let Err(problem) = names.remember(&config.node.state_dir, endpoints) {
        let note = format!("learned names will not survive a restart: {problem}");
        error!(error = %problem, "the journal of learned names cannot be begun");
        notes.push(note);
    }
    let learned = agent_events.clone();
    names.report_to(move |endpoint, name, address| {
        learned.report(AgentEvent::NameLearned {
            endpoint,
            name: name.to_owned(),
            address,
        });
    });
    let names = Arc::new(names);
    let ended = sender.clone();
    let shared = Arc::<Shared>::default();
    let sni_index_of_proxy = sni_index.clone();
    let (restarted, handover) = received.accept(state.problem.is_some());
    let (workers, output) = Workers::start(&config, &datapath, sni_index, handover, move || {
        drop(ended.send(Message::WorkerEnded));
    })?;
    let restarted = restarted.map(|restarted| restarted.finish(workers.taken_over()));
    let proxy_link = ProxyLink::start(&config, &datapath, &watched.network);
    let (interception, intercepted) = Interception::start(
        &config,
        &datapath,
        proxy_link.links(),
        sni_index_of_proxy,
        &shared,
    );
    let secrets = sender.clone();
    interception::watch(interception.view(), move |found| {
        secrets.send(Message::Secrets(found)).is_ok()
    })
    .context("watching secrets")?;
    let mut control = Control {
        state,
        enforcer,
        files: watched.files,
        policy_changes: watched.policy_changes,
        interfaces: Interfaces::default(),
        network: watched.network,
        discovery: watched.discovery,
        netfilter: watched.netfilter,
        translates: watched.translates,
        netfilter_due: false,
        datapath,
        names,
        prefetch: None,
        shared,
        units: Arc::default(),
        sweep: Interval::new(config.timeouts.sweep),
        rule_numbers: RuleNumbers::new(config.limits.rules),
        workers,
        proxy_link,
        inspectors: InspectorRules::default(),
        interception,
        exports: Exports::default(),
        activity: Arc::<ControlActivity>::default(),
        measured: Arc::<Measured>::default(),
        agent_events,
        started,
        changes: 0,
        last_change: Duration::ZERO,
        closed: false,
        unsaved: None,
        program,
        restarted,
        reload_problem: None,
        start_notes: notes,
        notes: Vec::new(),
        translations: RefCell::new(None),
        config,
    };
    control.write_datapath_config()?;
    control.update_inventory(Instant::now())?;
    // At an upgrade the flows are still in the old table: without this step, those of workloads that are gone would be
    // copied after they were to be removed. The first attachment copies what has changed since, and reports errors.
    if let Err(error) = control.datapath.take_over_flows() {
        warn!(%error, "the flows of the earlier version cannot be copied yet");
    }
    control.forget_connections(&gone);
    control.record_start();
    if let Some(problem) = &control.enforcer.problem
        && control.datapath.is_fresh()
    {
        bail!("the maps cannot be filled: {problem}");
    }
    let Some(output) = output else {
        return Ok((control, (None, intercepted)));
    };
    // The names thread must run before the first program can punt a DNS answer.
    control.names.serve(output.commits)?;
    Ok((control, (Some(output.records), intercepted)))
}

/// Records of the workers, and of the proxy threads.
type RecordQueues = (Option<Receiver<TimedRecord>>, record_queue::Receiver<TimedRecord>);

/// Attaches the programs to all configured interfaces and writes the nftables table.
fn attach(control: &mut Control) {
    control.attach();
    control.find_workloads(true);
    control.write_netfilter();
    for limited in control.limited_interfaces(&control.interfaces.report(&control.datapath)) {
        warn!(%limited, "the MTU of an interface exceeds the longest punted frame");
    }
}

/// Starts the threads that read events and records, sweep connections and answer clients.
fn serve(
    control: &mut Control,
    (records, intercepted): RecordQueues,
    claim: server::Claim,
    sender: Sender<Message>,
    agent_queue: AgentQueue,
) -> anyhow::Result<(Socket, Arc<Hubble>)> {
    let ring = Ring::new(control.config.limits.flows as usize);
    let datapath = Arc::clone(&control.datapath);
    let (shared, names) = (Arc::clone(&control.shared), Arc::clone(&control.names));
    let events = events::read(datapath.events()?, Arc::clone(&ring), Arc::clone(&shared))?;
    if let Some(records) = records {
        events::records(records, Arc::clone(&ring), Arc::clone(&shared))?;
    }
    events::records(intercepted, Arc::clone(&ring), Arc::clone(&shared))?;
    losses::watch(
        Arc::clone(&ring),
        Arc::clone(&datapath),
        control.workers.counters(),
        Arc::clone(control.interception.view()),
    )?;
    control.exports = Exports::new(Arc::clone(&ring));
    let (exports, node_name) = (&control.config.exports, &control.config.node.name);
    control.exports.update(exports, node_name);
    sweeper::run(
        Arc::clone(&datapath),
        control.sweep.clone(),
        Arc::clone(&ring),
        Arc::clone(&shared),
        Arc::clone(&names),
        Arc::clone(control.rule_numbers.recorded()),
    )?;
    let hubble = Arc::new(Hubble::start(&control.config, &ring, &shared, agent_queue));
    let api = Arc::clone(&hubble);
    let handlers = Arc::new(Handlers {
        hubble,
        control: sender,
        datapath,
        shared,
        names,
        ring,
        events,
        activity: Arc::clone(&control.activity),
        heartbeats: control.workers.heartbeats(),
        interception: Arc::clone(control.interception.view()),
        netfilter: netfilter::Place::new(&control.config),
        log: LogControl::new(Arc::clone(&control.shared)),
        capturing: CapturePlace::default(),
        server: OnceLock::new(),
        policy_store: Arc::clone(&control.policy_changes.store),
        measured: Arc::clone(&control.measured),
    });
    let socket = server::listen(claim, Arc::clone(&handlers))
        .with_context(|| format!("control socket {}", control.config.node.socket.display()))?;
    // The cell is new, so it cannot be set already.
    let _ = handlers.server.set(Arc::clone(&socket.counts));
    metrics::start(&control.config.metrics, handlers).context("the threads of the metrics")?;
    Ok((socket, api))
}

/// Ends a change of the policies, writes the state and ends the workers. The programs stay attached, unless a client has
/// requested to detach them.
fn shut_down(
    mut control: Control,
    messages: &mpsc::Receiver<Message>,
    socket: Socket,
    end: End,
    end_signals: &EndSignals,
) -> anyhow::Result<()> {
    // The service manager would wait for the end of the process after the notification.
    if !matches!(end, End::Restart(_)) {
        notify(&[NotifyState::Stopping]);
    }
    control.end_change(messages);
    if let Err(problem) = control.datapath.end_capture() {
        error!(error = %problem, "the programs of a capture could not be replaced; they enforce the policy");
    }
    control.save();
    if let Err(problem) = control.state.keeper.flush() {
        error!(
            error = problem,
            "the state cannot be written; changes since the last write are lost"
        );
    }
    control.policy_changes.store.flush();
    control.names.flush();
    let end = match end {
        End::Restart(reply) if end_signals.act_at_once() => {
            reply.send(Err("the daemon ends, because of a signal".to_owned()));
            notify(&[NotifyState::Stopping]);
            End::Stay
        }
        End::Restart(reply) => return restart(control, reply, socket),
        other => other,
    };
    control.workers.end();
    control.exports.end();
    if let End::Detach(reply) = end {
        let done = detach_all(&control.config.node.pin_dir).map_err(|problem| problem.to_string());
        // The nftables table must not stay: it would drop traffic of interfaces that appear later.
        let table = netfilter::Place::new(&control.config)
            .remove()
            .map_err(|problem| problem.to_string());
        let done = done.and(table);
        match &done {
            Ok(()) => info!("everything is detached"),
            Err(error) => error!(error, "not everything could be detached"),
        }
        reply.send(done.clone());
        if let Err(problem) = done {
            bail!("not everything could be detached: {problem}");
        }
    } else {
        // No daemon will guard interfaces that are made from now on.
        control.netfilter.close_forwarding();
        info!("the daemon has ended; what is attached goes on enforcing the last policy");
    }
    socket.close();
    Ok(())
}

/// Executes the program again. The workers end last, because what needs inspection is dropped until the new ones run.
/// Returns only if that fails.
fn restart(mut control: Control, reply: Reply<Restarting>, socket: Socket) -> anyhow::Result<()> {
    let token = format!("{}-{}", std::process::id(), monotonic_coarse());
    reply.send(Ok(Restarting { token: token.clone() }));
    socket.close();
    control.exports.end();
    control.netfilter.close_forwarding();
    let program = control.program.clone();
    info!("the daemon ends, and its program is executed again");
    let handover = control.workers.hand_over(token);
    watchdog::allow_for_restart();
    let problem = handover::execute(&program, &handover);
    bail!(
        "the program cannot be executed again: {problem}; what is attached goes on enforcing the last policy"
    );
}

/// The signals that end the daemon, beside their messages to the control thread: no message is handled during a planned
/// restart, and the program that is executed does not get the signals of the one before.
struct EndSignals {
    /// Whether a signal has its default action.
    at_once: Arc<AtomicBool>,
    /// Whether a signal has arrived.
    arrived: Arc<AtomicBool>,
}

impl EndSignals {
    fn register() -> std::io::Result<Self> {
        let signals = Self {
            at_once: Arc::default(),
            arrived: Arc::default(),
        };
        for signal in [SIGTERM, SIGINT] {
            flag::register_conditional_default(signal, Arc::clone(&signals.at_once))?;
            flag::register(signal, Arc::clone(&signals.arrived))?;
        }
        Ok(signals)
    }

    /// Lets a further signal end the process at once, as if it were killed: what is attached goes on enforcing the last
    /// policy. Returns whether a signal has arrived before.
    fn act_at_once(&self) -> bool {
        self.at_once.store(true, Ordering::SeqCst);
        self.arrived.load(Ordering::SeqCst)
    }
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

fn open_datapath(config: &Config) -> anyhow::Result<Datapath> {
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
    // The error contains only the end of the verifier's log, but a bug report needs all of it.
    let Some(log) = error.verifier_log() else {
        return Err(anyhow::anyhow!(with_option(&error)));
    };
    let kept = keep_verifier_log(&config.node.state_dir, &log);
    Err(anyhow::Error::new(error).context(kept))
}

/// Writes the verifier's log into the state directory. Returns where the log is, or why it could not be written.
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

/// Returns the limits and lifetimes of learned names.
pub(super) fn fqdn_config(config: &Config) -> palisade_fqdn::Config {
    let (dns, learned) = (&config.dns, config.limits.learned as usize);
    let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    palisade_fqdn::Config {
        min_ttl: milliseconds(dns.min_ttl),
        max_ttl: milliseconds(dns.max_ttl),
        addresses_per_name: dns.addresses_per_name as usize,
        addresses_per_endpoint: dns.addresses_per_endpoint as usize,
        // The addresses of an answer are written before the addresses that they evict are removed, so the map can hold
        // more addresses than the cache for a moment. An eighth of the map, at most 8,192 entries, is reserved for
        // them: the addresses of two answers (at most 4,095 A records fit into one answer).
        addresses_total: learned - (learned / 8).min(8192),
        aliases: dns.follow_cname,
        special: if dns.refuse_special {
            Special::Refuse(dns.allow_special.clone())
        } else {
            Special::Learn
        },
    }
}

#[cfg(test)]
mod tests {
    use super::keep_verifier_log;

    #[test]
    fn the_error_names_the_file_of_the_verifier_log() {
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
