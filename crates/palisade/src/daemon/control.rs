//! The control thread. It owns the compiler, changes the maps, and handles one message after the other.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use ipnet::IpNet;
use palisade_abi::{Config as DatapathConfig, Direction, EndpointState, identity, role};
use palisade_datapath::{Datapath, Rules, monotonic_coarse};
use palisade_hubble::agent::AgentEvent;
use palisade_model::inventory::Enforcement;
use palisade_policy::compile::CompilerState;
use signal_hook::consts::SIGHUP;
use tracing::{debug, error, info, warn};

use super::{
    changes::Changes as PolicyChanges,
    cuts,
    discover::Discovery,
    enforcer::{Enforcer, endpoint_names, inventory},
    export::Exports,
    failsafe,
    fqdn::{ControlRequest, FqdnManager, Prefetch, Targets, node_servers},
    handover::Program,
    hubble::AgentEvents,
    interception::{InspectorRules, Interception},
    interfaces::Interfaces,
    last_good,
    measured::Measured,
    message::{Message, Reply},
    netfilter,
    network::{self, Network},
    policies::{Event, PolicyFiles},
    proxy_link::{self, ProxyLink},
    rule_numbers::{Freed, RuleNumbers},
    state::{NODE, StateFile},
    sweeper::Interval,
    units::Units,
    view::{Shared, View},
    watchdog::ControlActivity,
    watcher::Changes,
    workers::Workers,
};
use crate::{
    config::{Config, WithoutPolicies},
    control::api::{RestartStatus, Restarting},
};

/// Time without a message after which the daemon checks that everything is still attached.
const ATTACH_CHECK_INTERVAL: Duration = Duration::from_secs(15);
/// Time without a message after which a failed operation is tried again.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// Time without a change after which the state is written.
const SAVE_DEBOUNCE: Duration = Duration::from_millis(500);
/// Time after the deadline of a change at which it is looked at: the clock of the deadline has milliseconds.
const DEADLINE_STEP: Duration = Duration::from_millis(1);
/// Longest time from the first unsaved change to the writing of the state.
const SAVE_MAX_DELAY: Duration = Duration::from_secs(10);

/// The data of the control thread.
pub(super) struct Control {
    pub(super) config: Config,
    pub(super) state: StateFile<CompilerState>,
    pub(super) enforcer: Enforcer,
    pub(super) files: PolicyFiles,
    /// Changes of the policies by commands, and the history.
    pub(super) policy_changes: PolicyChanges,
    pub(super) interfaces: Interfaces,
    pub(super) network: Network,
    pub(super) discovery: Discovery,
    pub(super) netfilter: netfilter::Keeper,
    /// Whether this node translates addresses.
    pub(super) translates: bool,
    /// Whether the data from which the nftables table is made can have changed since its last write.
    pub(super) netfilter_due: bool,
    pub(super) datapath: Arc<Datapath>,
    pub(super) names: Arc<FqdnManager>,
    pub(super) prefetch: Option<Prefetch>,
    pub(super) shared: Arc<Shared>,
    /// Units of the node's sockets.
    pub(super) units: Arc<Units>,
    pub(super) sweep: Interval,
    pub(super) rule_numbers: RuleNumbers,
    pub(super) workers: Workers,
    pub(super) proxy_link: ProxyLink,
    pub(super) inspectors: InspectorRules,
    pub(super) interception: Interception,
    pub(super) exports: Exports,
    pub(super) activity: Arc<ControlActivity>,
    pub(super) measured: Arc<Measured>,
    /// Takes the events that the flow API reports.
    pub(super) agent_events: AgentEvents,
    pub(super) started: Instant,
    /// Number of changes that were put in force.
    pub(super) changes: u64,
    pub(super) last_change: Duration,
    /// Whether the enforcement mode `default` is replaced by `always`, because policies cannot be read.
    pub(super) closed: bool,
    /// Time of the first and of the last change since the state was last written; `None` without a change.
    pub(super) unsaved: Option<(Instant, Instant)>,
    /// The program of this process, for a restart.
    pub(super) program: Program,
    /// The restart with which this process began; `None` without one.
    pub(super) restarted: Option<RestartStatus>,
    /// Why the last reload of the configuration failed.
    pub(super) reload_problem: Option<String>,
    /// Problems at the start, for `status`.
    pub(super) start_notes: Vec<String>,
    /// Options that the last reload has changed but that take effect only after a restart, for `status`.
    pub(super) notes: Vec<String>,
    /// Kinds of rules on this node that translate or redirect packets, as texts, and the time at which they were read.
    pub(super) translations: RefCell<Option<(Instant, Vec<String>)>>,
}

/// How the daemon ends.
pub(super) enum End {
    /// The programs stay attached.
    Stay,
    /// Everything is detached. The reply goes to the client that has requested this.
    Detach(Reply<()>),
    /// The process executes its program again and hands over the inspected connections. The reply goes to the client
    /// that has requested this.
    Restart(Reply<Restarting>),
}

impl Control {
    /// Handles messages until one of them ends the daemon.
    pub(super) fn serve(&mut self, messages: &Receiver<Message>) -> End {
        loop {
            // [`SAVE_MAX_DELAY`] is checked before each message, because under a continuous stream of messages `idle`,
            // which also saves the state, never runs.
            if self
                .unsaved
                .is_some_and(|(first, _)| first.elapsed() > SAVE_MAX_DELAY)
            {
                self.save();
            }
            // Also under a continuous stream of messages.
            self.check_deadline();
            self.activity.rest();
            let message = match messages.recv_timeout(self.timeout()) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => {
                    self.activity
                        .begin("checking attachments and retrying failed operations");
                    self.idle();
                    self.write_netfilter();
                    continue;
                }
                // This error cannot occur while the daemon runs, because the threads that answer clients hold senders.
                Err(RecvTimeoutError::Disconnected) => return End::Stay,
            };
            self.activity.begin(message.task());
            match message {
                Message::Policies(changes) => self.policies_changed(&changes),
                Message::Store(event) => self.store_event(event),
                Message::Network(network) => self.network_changed(network),
                Message::Workloads => self.workloads_reported(),
                Message::Netfilter(change) => {
                    if change.touched || change.may_be_touched {
                        self.netfilter.was_touched(change.touched);
                    }
                    self.translates = change.translates;
                    self.netfilter_due = true;
                }
                Message::Signal(SIGHUP) => {
                    // `reload` has logged the errors of the file.
                    if let Err(problem) = self.reload(&[]) {
                        warn!(error = problem, "the reload after SIGHUP failed");
                    }
                }
                Message::Signal(_) => return End::Stay,
                // A change that failed before is made with the identities. Live connections must follow that change.
                Message::Fqdn(ControlRequest::Identities) if self.enforcer.is_behind() => {
                    self.names.rearm(ControlRequest::Identities);
                    self.enforce(Instant::now());
                }
                Message::Fqdn(ControlRequest::Identities) => {
                    let Self {
                        inspectors,
                        workers,
                        interception,
                        ..
                    } = self;
                    self.enforcer.extend(&self.datapath, &self.names, |sets| {
                        inspectors.set_rules(sets, workers, interception);
                    });
                    self.check_secrets();
                    self.publish();
                    self.changed();
                }
                Message::Fqdn(ControlRequest::Reevaluate) => {
                    self.names.rearm(ControlRequest::Reevaluate);
                    let endpoints = self.names.take_reevaluated();
                    self.enforcer.compiler.reevaluate_flows(endpoints);
                    self.enforce(Instant::now());
                }
                Message::Fqdn(ControlRequest::Prune) => {
                    self.names.rearm(ControlRequest::Prune);
                    self.reuse_rule_numbers();
                    if self.enforcer.prune(&self.names) {
                        self.enforce(Instant::now());
                    }
                }
                Message::WorkerEnded => self.repair_links(),
                Message::Secrets(secrets) => {
                    self.interception.set_secrets(secrets);
                    let sets = Arc::clone(&self.enforcer.compiler.snapshot().rulesets);
                    self.inspectors
                        .set_rules(&sets, &self.workers, &mut self.interception);
                    self.check_secrets();
                }
                Message::Stop { detach: true, reply } => return End::Detach(reply),
                Message::Stop { detach: false, reply } => {
                    reply.send(Ok(()));
                    return End::Stay;
                }
                Message::Restart(reply) => match self.program.check() {
                    Ok(_) => return End::Restart(reply),
                    Err(problem) => reply.send(Err(problem)),
                },
                Message::Client(request) => self.answer(request),
            }
            self.write_netfilter();
        }
    }

    /// Returns how long to wait for the next message.
    fn timeout(&self) -> Duration {
        let save = self.unsaved.map(|(first, last)| {
            let quiet = SAVE_DEBOUNCE.saturating_sub(last.elapsed());
            quiet.min(SAVE_MAX_DELAY.saturating_sub(first.elapsed()))
        });
        let failed = self.enforcer.problem.is_some()
            || self.interfaces.has_failures()
            || self.netfilter.has_failed()
            || self.datapath.replacement_problem().is_some();
        let again = failed.then_some(RETRY_INTERVAL);
        // The wait does not count suspended time, the deadline does.
        let deadline = self
            .policy_changes
            .left()
            .map(|left| (left + DEADLINE_STEP).min(ATTACH_CHECK_INTERVAL));
        [save, again, deadline]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(ATTACH_CHECK_INTERVAL)
    }

    /// Marks the state as changed since it was last written.
    pub(super) fn changed(&mut self) {
        let now = Instant::now();
        self.unsaved = Some((self.unsaved.map_or(now, |(first, _)| first), now));
    }

    /// Does the periodic work: writes the state, retries failed operations, checks the attachments.
    fn idle(&mut self) {
        if self.unsaved.is_some() {
            self.save();
        }
        if self.enforcer.problem.is_some() {
            self.enforce(Instant::now());
            self.record_policies();
        }
        self.repair_links();
        self.interception.watch_limits();
        self.attach();
        self.retry_replacement();
    }

    /// Attaches the ordinary programs where that failed at the end of a capture. [`Self::attach`] does not replace the
    /// programs of a guarded interface.
    fn retry_replacement(&self) {
        let Some(known) = self.datapath.replacement_problem() else {
            return;
        };
        match self.datapath.retry_replacement() {
            Ok(()) => info!("the programs that a capture had left are replaced"),
            // The same failure is not logged at every attempt.
            Err(problem) if problem.to_string() == known => {}
            Err(problem) => error!(
                error = %problem,
                "the programs of a capture could not be replaced; they enforce the policy, and the replacement is retried"
            ),
        }
    }

    pub(super) fn policies_changed(&mut self, changes: &Changes) {
        let begun = Instant::now();
        let has_new = self.files.update(changes);
        let read = begun.elapsed();
        if self.closed && self.files.unknown().is_none() {
            info!("all policies can be read again; default deny follows [policy] enforcement");
            if let Err(problem) = self.update_inventory(begun) {
                error!(
                    error = format!("{problem:#}"),
                    "endpoints and peers cannot be put in force"
                );
            }
        }
        let before = self.enforcer.compiler.snapshot().endpoints.clone();
        if has_new {
            self.enforcer.compile(None, &mut self.files);
            let compiled = begun.elapsed();
            self.enforce(begun);
            self.warn_of_cut_sessions(&before);
            if self.enforcer.problem.is_none() {
                self.measured
                    .enforced_after(changes.since.unwrap_or(begun).elapsed());
            }
            debug!(
                ?read,
                compiled = ?compiled.saturating_sub(read),
                in_force = ?self.last_change,
                total = ?begun.elapsed(),
                "a change of policies is timed"
            );
        }
        self.log_policies(&before, begun);
        self.changed();
    }

    /// Logs the connections to the node that its changed policy denies: the operator's own session can be among them.
    fn warn_of_cut_sessions(&self, before: &BTreeMap<u16, EndpointState>) {
        let compiler = &self.enforcer.compiler;
        if before.get(&NODE) == compiler.snapshot().endpoints.get(&NODE) {
            return;
        }
        match cuts::cut_sessions(&self.datapath, compiler, monotonic_coarse()) {
            Ok((_, 0)) => {}
            Ok((sessions, connections)) => warn!(
                connections,
                sessions = sessions.join(", "),
                "the node's policy denies TCP connections to the node that are established"
            ),
            Err(problem) => warn!(%problem, "connections to the node cannot be listed"),
        }
    }

    /// Reports the policies of the start as agent events.
    pub(super) fn report_first_policies(&mut self) {
        let rules = self.enforcer.compiler.snapshot().rules.len() as u64;
        for news in self.files.take_news() {
            if news.event != Event::Refused {
                self.agent_events.report(AgentEvent::PolicyUpdated {
                    labels: news.policies.to_vec(),
                    revision: self.changes,
                    rules,
                });
            }
        }
    }

    /// Logs one line for each changed policy file. These lines are the audit trail of policy changes.
    pub(super) fn log_policies(&mut self, before: &BTreeMap<u16, EndpointState>, begun: Instant) {
        self.record_policies();
        let news = self.files.take_news();
        if news.is_empty() {
            return;
        }
        let endpoints = self.touched(before);
        let milliseconds = crate::text::milliseconds(begun.elapsed());
        let problem = self.enforcer.problem.as_deref();
        let rules = self.enforcer.compiler.snapshot().rules.len() as u64;
        for news in news {
            let labels = news.policies.to_vec();
            match (news.event, problem) {
                (Event::Applied | Event::Changed, None) => {
                    self.agent_events.report(AgentEvent::PolicyUpdated {
                        labels,
                        revision: self.changes,
                        rules,
                    });
                }
                (Event::Removed, None) => self.agent_events.report(AgentEvent::PolicyDeleted {
                    labels,
                    revision: self.changes,
                    rules,
                }),
                (Event::Refused, _) => {}
                (_, Some(problem)) => self.agent_events.failed(before.keys().copied(), problem),
            }
            let (file, policies) = (news.file, news.policies.join(","));
            let revision = self.changes;
            match (news.event, problem) {
                (Event::Refused, _) => info!(
                    event = news.event.name(),
                    file,
                    policy = policies,
                    revision,
                    "policy file refused; its last good content, if any, stays in force"
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

    /// Returns the names of at most 20 endpoints whose policy differs from that in `before`, and the number of further
    /// ones.
    pub(super) fn touched(&self, before: &BTreeMap<u16, EndpointState>) -> String {
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

    pub(super) fn network_changed(&mut self, network: Network) {
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
        self.repair_links();
        if !addresses && !links {
            return;
        }
        if addresses {
            // An address that the node has now can be that of a workload.
            self.drop_workloads();
            if let Err(problem) = self.update_inventory(begun) {
                error!(
                    error = format!("{problem:#}"),
                    "endpoints and peers cannot be put in force"
                );
            }
        } else {
            self.publish();
        }
        self.attach();
        self.find_workloads(false);
    }

    fn repair_links(&mut self) {
        let punt_link = self.workers.repair(&self.datapath, &self.network);
        let proxy_link = self
            .proxy_link
            .repair(&self.config, &self.datapath, &self.network);
        self.interception
            .repair(&self.datapath, self.proxy_link.links(), proxy_link);
        if (punt_link || proxy_link)
            && let Err(problem) = self.write_datapath_config()
        {
            error!(
                error = format!("{problem:#}"),
                "the punt link and the proxy links cannot be written into the datapath configuration"
            );
        }
    }

    /// Compiles the endpoints, peers and options of the configuration, and puts the result in force.
    pub(super) fn update_inventory(&mut self, begun: Instant) -> anyhow::Result<()> {
        let mut inventory = inventory(&self.config, &self.network, &mut self.state.state)?;
        self.closed =
            self.config.node.on_failure == WithoutPolicies::Closed && self.files.unknown().is_some();
        if self.closed && inventory.options.enforcement == Enforcement::Default {
            inventory.options.enforcement = Enforcement::Always;
        }
        let inventory = (inventory != *self.enforcer.compiler.inventory()).then_some(inventory);
        self.interfaces.configure(&self.config, &self.state.state);
        let has_closed = self.interfaces.close_failsafe(&self.datapath, &self.network)?;
        if has_closed {
            // A program that has read the open ports must not write a flow with the new revision.
            self.datapath.wait_for_programs()?;
        }
        self.enforcer.set_failsafe(failsafe::content(&self.config));
        self.enforcer.compile(inventory, &mut self.files);
        if has_closed {
            // The failsafe ports may be the same: the name of an interface can have changed.
            self.enforcer.compiler.reevaluate_flows([NODE]);
        }
        self.enforce(begun);
        Ok(())
    }

    pub(super) fn enforce(&mut self, begun: Instant) {
        let gone = self.gone_endpoints();
        let Self {
            inspectors,
            workers,
            interception,
            ..
        } = self;
        let changed = self.enforcer.enforce(&self.datapath, &self.names, |sets| {
            inspectors.set_rules(sets, workers, interception);
        });
        if changed {
            self.changes += 1;
            self.last_change = begun.elapsed();
        }
        self.forget_connections(&gone);
        self.workers.forget_endpoints(&gone);
        if !self.enforcer.is_behind() {
            self.rule_numbers.policies_changed(&self.enforcer.compiler);
        }
        self.check_secrets();
        self.publish();
        self.interception.recheck();
        self.prefetch();
        self.changed();
        self.netfilter_due = true;
    }

    /// Lets new rules have the numbers of removed rules that nothing has any more, and forgets unused rule sets.
    fn reuse_rule_numbers(&mut self) {
        // A state that is put back would use its numbers again.
        if self.enforcer.is_behind() {
            return;
        }
        let counters = self.datapath.counters();
        let freed = self.rule_numbers.swept(&mut self.enforcer.compiler, &counters);
        if freed.rule_sets {
            let sets = Arc::clone(&self.enforcer.compiler.snapshot().rulesets);
            self.inspectors
                .set_rules(&sets, &self.workers, &mut self.interception);
        }
        if freed != Freed::default() {
            self.publish();
            self.changed();
        }
    }

    /// Finds the secrets that the policies in force name and that cannot be used.
    fn check_secrets(&mut self) {
        let compiler = &self.enforcer.compiler;
        let files = compiler.files().map(|(_, content)| content);
        self.interception
            .check_secrets(&compiler.snapshot().rulesets, files);
    }

    /// Passes the names in `matchName` selectors and the DNS servers to the prefetcher, or no names if `[dns] prefetch`
    /// is off.
    fn prefetch(&mut self) {
        let dns = &self.config.dns;
        if self.prefetch.is_none() && dns.prefetch {
            match Prefetch::start(&self.names) {
                Ok(prefetch) => self.prefetch = Some(prefetch),
                Err(error) => error!(%error, "the thread of [dns] prefetch cannot be started"),
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

    /// Returns the endpoints of the published view that the compiler no longer has.
    fn gone_endpoints(&self) -> Vec<u16> {
        let view = self.shared.get();
        let wanted = &self.enforcer.compiler.snapshot().endpoints;
        let known = view.snapshot.endpoints.keys().copied();
        known.filter(|id| !wanted.contains_key(id)).collect()
    }

    /// Removes the conntrack entries of endpoints. Otherwise a new endpoint that gets one of their numbers would
    /// inherit them.
    pub(super) fn forget_connections(&self, endpoints: &[u16]) {
        if endpoints.is_empty() {
            return;
        }
        // A program that has read the state of an endpoint before it was removed can insert a flow after the walk, which
        // would count for the next endpoint of the same number.
        if let Err(problem) = self.datapath.wait_for_programs() {
            warn!(error = %problem, "running programs cannot be awaited before connections are removed");
        }
        let outcome = self
            .datapath
            .conntrack()
            .remove_if(|key, _| endpoints.contains(&key.endpoint), |_, _, _| {});
        if let Err(problem) = outcome {
            warn!(error = %problem, "connections of removed endpoints cannot be removed");
        }
    }

    /// Publishes the current state to the threads that answer clients and report flows.
    fn publish(&self) {
        self.shared.set(View::new(
            &self.config.node.name,
            self.enforcer.compiler.snapshot().clone(),
            self.enforcer.compiler.inventory(),
            &self.network.links,
            (Some(Arc::clone(&self.names)), Some(Arc::clone(&self.units))),
            self.changes,
        ));
        self.agent_events.view_published();
    }

    /// Attaches the programs to the configured interfaces, then detaches them from others. The nftables table is written
    /// between the two, so that an interface of a workload is closed by its name before it has no programs.
    pub(super) fn attach(&mut self) {
        let inventory = self.enforcer.compiler.inventory();
        let mut leftovers = self
            .interfaces
            .reconcile(&self.datapath, &self.network, &self.config, inventory);
        self.netfilter_due = true;
        let mut all_released = true;
        if !leftovers.is_empty() {
            self.write_netfilter();
            // The table that could not be replaced can list the interface of a workload as guarded, so the programs stay
            // attached. The write is tried again.
            if self.netfilter.has_failed() {
                let all = leftovers.len();
                leftovers.retain(|attached| attached.interface.role == role::HOST);
                all_released = leftovers.len() == all;
            }
            self.interfaces
                .release(&self.datapath, &self.network, &self.config, &leftovers);
        }
        // An interface that could not be attached or released keeps the programs and maps of the earlier version until
        // then.
        if all_released
            && !self.interfaces.has_failures()
            && let Err(problem) = self.datapath.retire_other_versions()
        {
            warn!(error = %problem, "maps of another version cannot be removed");
        }
        self.workers.set_attached(self.interfaces.attached());
    }

    /// Writes the nftables table for the current interfaces, addresses and node policy. Must run after the interfaces
    /// are attached: a table written earlier would lack them, and would replace the complete table of the previous
    /// daemon.
    pub(super) fn write_netfilter(&mut self) {
        if !std::mem::take(&mut self.netfilter_due) {
            return;
        }
        let enforced = |direction| self.enforcer.node_enforces(direction);
        let (ingress, egress) = (enforced(Direction::Ingress), enforced(Direction::Egress));
        let mut guarded = self
            .interfaces
            .rules(&self.network, &self.config, ingress || egress);
        // If a forwarded packet enters or leaves by an interface with programs, these programs check it (reason 219).
        // Only a packet between two interfaces without programs needs the forward chain, so the chain is written only
        // if an interface has no programs.
        let own_interfaces = proxy_link::own_interfaces(&self.config);
        guarded.forwards |= self.network.links.iter().any(|(name, ifindex)| {
            name != "lo" && !own_interfaces.contains(name) && !guarded.enforced.contains(ifindex)
        });
        let inventory = self.enforcer.compiler.inventory();
        let (nodes, workloads): (Vec<_>, Vec<_>) = inventory
            .endpoints
            .iter()
            .partition(|endpoint| endpoint.is_node());
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

    pub(super) fn write_datapath_config(&self) -> anyhow::Result<()> {
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
        self.proxy_link.fill_datapath_config(&mut datapath_config);
        self.datapath.set_config(&datapath_config)?;
        Ok(())
    }

    pub(super) fn save(&mut self) {
        self.unsaved = None;
        self.state.state.compiler = self.enforcer.compiler.state();
        self.state.save();
        self.state.keeper.policies(self.files.to_keep());
    }

    /// Stores a copy of the configuration, for a later start at which the file is broken.
    pub(super) fn keep_config(&self) {
        // After a failed reload the file is broken, and the copy must stay the last good one.
        if self.reload_problem.is_none() {
            let text = last_good::text(&self.config);
            self.state.keeper.config(text);
        }
    }

    pub(super) fn policy_count(&self) -> usize {
        self.enforcer
            .compiler
            .files()
            .map(|(_, content)| content.policies.len())
            .sum()
    }
}
