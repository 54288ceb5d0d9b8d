//! Starts the workers and the punt link, and repairs the punt link.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::AsFd as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context as _;
use palisade_abi::{Config as DatapathConfig, Inspector, Reason, config_flags};
use palisade_datapath::{Attached, Datapath, HookKind, PuntLink, monotonic_coarse};
use palisade_inspect::{
    Denial, Engine, Limits, Millis, Rules, SniAddressIndex, TopicIds, commit::CommitReceiver,
    handover::Account,
};
use palisade_worker::{Counters, Handle, Metric, Mode, Pool, Receiver, Setup, State, TimedRecord};
use palisade_xsk::{Config as SocketConfig, Socket};
use tracing::{error, info};

use crate::{
    config::{Config, DenyAnswer, OnFailure, Worker as Wanted},
    control::api,
    text::count,
};

use super::{handover::Handover, network::Network, watchdog::WorkerHeartbeats};

/// Age of a worker's heartbeat at which the programs stop punting to it. A worker writes 20 heartbeats in this time.
const WORKER_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest wait for the sockets of all workers at the start. After this time the start continues without the missing
/// sockets.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest number of workers if `[worker] threads` is 0.
const MAX_DEFAULT_WORKERS: usize = 8;
/// Inspectors of the workers and of the proxy, as a bit mask: bit N is set for the [`Inspector`] with number N.
pub(super) const INSPECTORS: u32 = 1 << Inspector::Http as u32
    | 1 << Inspector::Dns as u32
    | 1 << Inspector::Tls as u32
    | 1 << Inspector::TlsTerminate as u32
    | 1 << Inspector::Kafka as u32;
/// Largest number of DNS answers of one worker that wait for their commit.
const MAX_QUEUED_COMMITS: usize = 1_024;
/// Largest number of records that wait to be read.
const MAX_QUEUED_RECORDS: usize = 2_048;

/// The workers, or why there are none.
#[derive(Debug)]
pub(super) struct Workers {
    wanted: Wanted,
    cookie: u64,
    mark: u32,
    running: Result<Running, String>,
    /// Why the punt link cannot be repaired.
    punt_link_problem: Option<String>,
    taken_over: Arc<TakenOver>,
}

/// Connections of the process before, and how many of them the workers have taken over.
#[derive(Debug, Default)]
struct TakenOver {
    /// State of each worker, by number, until the worker has taken it over.
    states: Mutex<Vec<Vec<u8>>>,
    connections: AtomicU64,
    refused: AtomicU64,
    /// Why no connection is taken over.
    problem: Option<String>,
}

impl TakenOver {
    /// Returns what the workers take over; `None`: there was no process before.
    fn new(states: Option<Vec<Vec<u8>>>, wanted: &Wanted) -> Arc<Self> {
        let workers = worker_count(wanted);
        let is_restart = states.is_some();
        let states = states.unwrap_or_default();
        let problem = if is_restart && wanted.on_failure == OnFailure::Pass {
            Some(
                "[worker] on_failure = \"pass\": what passes during a restart is missing to the inspectors"
                    .into(),
            )
        } else if !states.is_empty() && states.len() != workers {
            // A flow belongs to the worker whose number is the remainder of its hash.
            Some(format!(
                "there were {}, and there are {workers}",
                count(states.len(), "worker", "workers")
            ))
        } else {
            None
        };
        Arc::new(Self {
            states: Mutex::new(if problem.is_none() { states } else { Vec::new() }),
            problem,
            ..Self::default()
        })
    }

    /// Makes a new engine take over the connections of a worker. A worker that fails later begins without connections.
    fn give(&self, number: usize, engine: &mut Engine<Handle>) {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let state = states.get_mut(number).map(std::mem::take).unwrap_or_default();
        let Account { connections, cut } = engine.take_over(monotonic_coarse() / 1_000_000, &state);
        self.connections.fetch_add(connections, Ordering::Relaxed);
        self.refused.fetch_add(cut, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Running {
    pool: Pool<Rules>,
    /// Last punt link that existed; `None` before the first.
    punt_link: Option<PuntLink>,
    /// Whether workers are allowed to bind sockets to the interface that has the name of the punt link. False while the
    /// punt link cannot be made or repaired: an interface of that name can then be of another kind.
    usable: Arc<AtomicBool>,
    heartbeats: Arc<WorkerHeartbeats>,
    xdp: Vec<u32>,
}

/// Receiving ends of the queues to which workers write.
#[derive(Debug)]
pub(super) struct Output {
    /// DNS answers to be committed.
    pub commits: CommitReceiver,
    /// Records of inspected traffic.
    pub records: Receiver<TimedRecord>,
}

impl Workers {
    /// Makes the punt link and starts the workers. If the workers cannot be started, the daemon runs without them; only
    /// traffic that needs inspection is affected. `known`: index of learned addresses against which server names are
    /// checked. `handover`: connections of the process before, if it was restarted. `failed` is called whenever a worker
    /// ends.
    pub(super) fn start(
        config: &Config,
        datapath: &Datapath,
        known: Option<Arc<SniAddressIndex>>,
        handover: Option<Handover>,
        failed: impl Fn() + Send + Sync + 'static,
    ) -> anyhow::Result<(Self, Option<Output>)> {
        let wanted = &config.worker;
        let (states, (cookie, mark)) = match handover {
            Some(Handover { header, states }) => (Some(states), (header.cookie, header.mark)),
            None => (None, secrets().context("/dev/urandom")?),
        };
        let taken_over = TakenOver::new(states, wanted);
        let engines = engine_maker(limits(config), known, &taken_over);
        let started = start(wanted, engines, datapath, cookie, failed);
        let (running, output, punt_link_problem) = match started {
            Ok((running, output, problem)) => (Ok(running), Some(output), problem),
            Err(problem) => {
                let problem = format!("{problem:#}");
                error!(
                    error = problem,
                    "there are no workers; traffic that needs inspection is {}",
                    becomes(wanted.on_failure)
                );
                (Err(problem), None, None)
            }
        };
        let workers = Self {
            wanted: wanted.clone(),
            cookie,
            mark,
            running,
            punt_link_problem,
            taken_over,
        };
        Ok((workers, output))
    }

    /// Makes or repairs the punt link if a worker does not run or the node's end of the link is down: the link can have
    /// been deleted or set down, or could not be made at the start. Workers that do not run retry by themselves.
    /// Returns whether a new punt link was made; the datapath configuration must then be written.
    pub(super) fn repair(&mut self, datapath: &Datapath, network: &Network) -> bool {
        let Ok(running) = &mut self.running else {
            return false;
        };
        let counters = running.pool.counters();
        let all_run = counters.iter().all(|counters| counters.state() == State::Running);
        // Workers cannot see that the node's end of the punt link is down.
        let is_down = |punt_link: PuntLink| network.down.contains(&punt_link.ifindex());
        if all_run && !running.punt_link.is_some_and(is_down) {
            return false;
        }
        let found = datapath.punt_link(&self.wanted.interface, counters.len() as u32);
        let problem = found.as_ref().err().map(ToString::to_string);
        if let Some(problem) = &problem
            && self.punt_link_problem.as_ref() != Some(problem)
        {
            error!(
                interface = self.wanted.interface,
                error = problem,
                "the punt link cannot be repaired"
            );
        }
        self.punt_link_problem = problem;
        running.usable.store(found.is_ok(), Ordering::Release);
        let Ok(punt_link) = found else { return false };
        let name = &self.wanted.interface;
        match running.punt_link.replace(punt_link) {
            Some(former) if former.ifindex() == punt_link.ifindex() => return false,
            Some(_) => info!(
                interface = format!("{name}0"),
                "the punt link was gone and is made again"
            ),
            None => info!(interface = format!("{name}0"), "the punt link is made"),
        }
        true
    }

    /// Returns the counters of the workers.
    pub(super) fn counters(&self) -> Vec<Arc<Counters>> {
        match &self.running {
            Ok(running) => running.pool.counters().to_vec(),
            Err(_) => Vec::new(),
        }
    }

    /// Fills in the fields of the datapath configuration that concern the workers: secrets, timeout, punt link,
    /// inspectors.
    pub(super) fn fill_datapath_config(&self, config: &mut DatapathConfig) {
        config.cookie = self.cookie;
        config.mark = self.mark;
        config.worker_timeout = WORKER_TIMEOUT.as_nanos() as u64;
        if self.wanted.on_failure == OnFailure::Pass {
            config.flags |= config_flags::FAIL_OPEN;
        }
        if let Ok(running) = &self.running {
            config.punt_ifindex = running.punt_link.map_or(0, |punt_link| punt_link.ifindex());
            config.workers = running.pool.counters().len() as u32;
            config.inspectors = INSPECTORS & !(1 << Inspector::TlsTerminate as u32);
        }
    }

    /// Sets the treatment of traffic that needs inspection while no worker runs. The change takes effect with the next
    /// write of the datapath configuration.
    pub(super) fn set_on_failure(&mut self, on_failure: OnFailure) {
        self.wanted.on_failure = on_failure;
    }

    /// Gives the workers the rules of a policy state that is about to be put in force.
    pub(super) fn set_rules(&self, rules: &Arc<Rules>) {
        if let Ok(running) = &self.running {
            running.pool.set_rules(rules);
        }
    }

    /// Gives the workers the indices of the interfaces with XDP programs. A packet that is reinjected at the ingress of
    /// such an interface does not pass the XDP program again, and no other program would clear the mark of reinjected
    /// packets. Workers therefore send such a packet without the mark.
    pub(super) fn set_attached<'a>(&mut self, attached: impl Iterator<Item = &'a Attached>) {
        let Ok(running) = &mut self.running else { return };
        let is_xdp = |kind| matches!(kind, Some(HookKind::XdpNative | HookKind::XdpGeneric));
        let mut xdp: Vec<u32> = attached
            .filter(|attached| is_xdp(attached.ingress))
            .map(|attached| attached.ifindex)
            .collect();
        xdp.sort_unstable();
        if xdp != running.xdp {
            running.pool.set_xdp(&xdp);
            running.xdp = xdp;
        }
    }

    /// Returns the last heartbeats of the workers; `None` without workers.
    pub(super) fn heartbeats(&self) -> Option<Arc<WorkerHeartbeats>> {
        self.running
            .as_ref()
            .ok()
            .map(|running| Arc::clone(&running.heartbeats))
    }

    /// Drops all held packets of removed endpoints.
    pub(super) fn forget_endpoints(&self, endpoints: &[u16]) {
        if let Ok(running) = &self.running
            && !endpoints.is_empty()
        {
            running.pool.forget_endpoints(endpoints);
        }
    }

    /// Returns what prevents inspection; `None` if all workers run and write heartbeats.
    pub(super) fn missing(&self) -> Option<String> {
        match &self.running {
            Ok(running) => {
                let counters = running.pool.counters();
                let down = counters
                    .iter()
                    .filter(|counters| counters.state() != State::Running)
                    .count();
                let why = || {
                    let failure = counters.iter().find_map(|counters| counters.failure());
                    let failure = failure.map(|failure| failure.to_string());
                    self.punt_link_problem.clone().or(failure).unwrap_or_default()
                };
                if let Some((number, since)) = running.heartbeats.silent(monotonic_coarse()).first() {
                    return Some(format!(
                        "worker {number} has written no heartbeat for {since:.0?}: it hangs, and its traffic is {}",
                        becomes(self.wanted.on_failure)
                    ));
                }
                (down != 0).then(|| format!("{down} of {} workers do not run: {}", counters.len(), why()))
            }
            Err(problem) => Some(format!("no workers: {problem}")),
        }
    }

    /// Returns the part of `status` about the workers.
    pub(super) fn report(&self) -> api::Workers {
        let mut report = api::Workers {
            mode: match self.wanted.mode {
                Mode::Poll => "poll",
                Mode::Spin => "spin",
                Mode::BusyPoll => "busy-poll",
            }
            .to_owned(),
            on_failure: match self.wanted.on_failure {
                OnFailure::Drop => "drop",
                OnFailure::Pass => "pass",
            }
            .to_owned(),
            ..api::Workers::default()
        };
        match &self.running {
            Ok(running) => {
                report.punt_link = format!("{}0", self.wanted.interface);
                let counters = running.pool.counters().iter().enumerate();
                report.workers = counters
                    .map(|(number, counters)| worker(number, counters))
                    .collect();
                let numbers = running
                    .pool
                    .counters()
                    .iter()
                    .flat_map(|counters| counters.metrics());
                add_up(&mut report, numbers);
            }
            Err(problem) => report.problem = Some(problem.clone()),
        }
        report
    }

    /// Returns how many connections of the process before were taken over, and how many not; or why none.
    pub(super) fn taken_over(&self) -> Result<Account, String> {
        if let Some(problem) = &self.taken_over.problem {
            return Err(problem.clone());
        }
        Ok(Account {
            connections: self.taken_over.connections.load(Ordering::Relaxed),
            cut: self.taken_over.refused.load(Ordering::Relaxed),
        })
    }

    /// Ends the workers for a planned restart. Returns what the process hands over.
    pub(super) fn hand_over(&mut self, token: String) -> Handover {
        let secrets = (self.cookie, self.mark);
        let Ok(running) = &mut self.running else {
            return Handover::new(token, secrets, Account::default(), Vec::new());
        };
        let workers = running.pool.counters().len();
        let mut account = Account::default();
        let mut states = vec![Vec::new(); workers];
        for (number, handed_over) in running.pool.stop_for_restart() {
            account.connections += handed_over.account.connections;
            account.cut += handed_over.account.cut;
            if let Some(state) = states.get_mut(number) {
                *state = handed_over.state;
            }
        }
        // Until the restart is complete the packets of these connections pass without inspection, so their inspectors
        // would miss bytes.
        if self.wanted.on_failure == OnFailure::Pass {
            account.cut += std::mem::take(&mut account.connections);
            states = Vec::new();
        }
        Handover::new(token, secrets, account, states)
    }

    /// Ends the workers.
    pub(super) fn end(&mut self) {
        if let Ok(running) = &mut self.running {
            running.pool.stop();
        }
    }
}

/// Returns the limits and options of the inspectors.
pub(super) fn limits(config: &Config) -> Limits {
    let Config {
        dns,
        http,
        tls,
        kafka,
        ..
    } = config;
    let milliseconds = |duration: Duration| duration.as_millis().try_into().unwrap_or(Millis::MAX);
    let mut limits = Limits::default();
    limits.dns.denial = match dns.deny_answer {
        DenyAnswer::Refused => Denial::Refused,
        DenyAnswer::NxDomain => Denial::NxDomain,
    };
    limits.http.tcp.deadline = milliseconds(http.header_timeout);
    limits.http.head = http.head;
    limits.http.paths = http.paths;
    limits.http.get_bodies = http.get_bodies;
    limits.http.record_headers = http.record_headers.as_slice().into();
    limits.tls.tcp.deadline = milliseconds(tls.hello_timeout);
    limits.tls.ech = tls.ech;
    limits.kafka = limits.kafka.with_max_request(kafka.max_request);
    limits.kafka.share_topic_ids = kafka.share_topic_ids;
    limits.kafka.tcp.deadline = milliseconds(kafka.request_timeout);
    limits
}

/// Returns the number of workers.
fn worker_count(wanted: &Wanted) -> usize {
    match wanted.threads {
        0 => thread::available_parallelism().map_or(1, |n| n.get().min(MAX_DEFAULT_WORKERS)),
        threads => threads,
    }
}

/// Function that makes the engine of the worker with a number.
type EngineMaker = Arc<dyn Fn(usize) -> Engine<Handle> + Send + Sync>;

/// Returns the function that makes the engine of a worker. Its first engine takes over the connections of the process
/// before.
fn engine_maker(
    limits: Limits,
    known: Option<Arc<SniAddressIndex>>,
    taken_over: &Arc<TakenOver>,
) -> EngineMaker {
    let topic_ids = Arc::<TopicIds>::default();
    let taken_over = Arc::clone(taken_over);
    Arc::new(move |number| {
        let mut engine = Engine::new(&limits);
        engine.share_topic_ids(Arc::clone(&topic_ids));
        if let Some(known) = &known {
            engine.verify_server_names(Arc::clone(known));
        }
        taken_over.give(number, &mut engine);
        engine
    })
}

fn start(
    wanted: &Wanted,
    engines: EngineMaker,
    datapath: &Datapath,
    cookie: u64,
    failed: impl Fn() + Send + Sync + 'static,
) -> anyhow::Result<(Running, Output, Option<String>)> {
    let workers = worker_count(wanted);
    let found = datapath.punt_link(&wanted.interface, workers as u32);
    let problem = found.as_ref().err().map(ToString::to_string);
    if let Some(problem) = &problem {
        error!(
            interface = wanted.interface,
            error = problem,
            "the punt link cannot be made; until a retry succeeds, traffic that needs inspection is {}",
            becomes(wanted.on_failure)
        );
    }
    let punt_link = found.ok();
    let usable = Arc::new(AtomicBool::new(punt_link.is_some()));
    let socket_map = Arc::new(datapath.socket_map().context("the maps of the workers")?);
    let heartbeats = Arc::new(WorkerHeartbeats::new(workers));
    let (pool, commits, records) = Pool::start(Setup {
        workers,
        mode: wanted.mode,
        cookie,
        clock: monotonic_coarse,
        max_handoff: 4_096,
        port: socket_maker(wanted, &socket_map, &usable),
        engine: engines,
        heartbeat: {
            let (socket_map, heartbeats) = (Arc::clone(&socket_map), Arc::clone(&heartbeats));
            Arc::new(move |number, now| {
                socket_map.heartbeat(number as u32, now);
                heartbeats.heartbeat(number, now);
                if now == 0 {
                    failed();
                }
            })
        },
        rules: Arc::default(),
        max_commits: MAX_QUEUED_COMMITS,
        records: MAX_QUEUED_RECORDS,
    })
    .context("starting threads")?;
    if punt_link.is_none() {
        // Workers cannot run before there is a punt link.
    } else if pool.wait_until_running(READY_TIMEOUT) {
        info!(
            workers,
            interface = format!("{}1", wanted.interface),
            "the workers run"
        );
    } else {
        let mut failures = pool.counters().iter().filter_map(|counters| counters.failure());
        match failures.next_back() {
            Some(error) => error!(%error, "not all workers run"),
            None => error!(timeout = ?READY_TIMEOUT, "not all workers run in time"),
        }
    }
    let running = Running {
        pool,
        punt_link,
        heartbeats,
        usable,
        xdp: Vec::new(),
    };
    Ok((running, Output { commits, records }, problem))
}

/// Returns new random secrets: the cookie of packets on the punt link, and the mark of reinjected packets.
fn secrets() -> io::Result<(u64, u32)> {
    let mut random = File::open("/dev/urandom")?;
    let (mut cookie, mut mark) = ([0; 8], [0; 4]);
    random.read_exact(&mut cookie)?;
    random.read_exact(&mut mark)?;
    Ok((u64::from_ne_bytes(cookie).max(1), u32::from_ne_bytes(mark).max(1)))
}

/// Adds the metrics of all workers to the sums in the report.
fn add_up(report: &mut api::Workers, numbers: impl Iterator<Item = (Metric, u64)>) {
    for (number, value) in numbers {
        let keeps = &mut report.keeps;
        match number.name {
            "connections" if number.now => keeps.connections += value,
            "offloaded_flows" if number.now => keeps.remembered += value,
            "bytes" if number.now => keeps.bytes += value,
            "frames" | "held" if number.now => keeps.packets += value,
            _ => {}
        }
        let group = report.inspection.entry(number.group.to_owned()).or_default();
        *group.entry(number.name.to_owned()).or_default() += value;
    }
}

const fn becomes(on_failure: OnFailure) -> &'static str {
    match on_failure {
        OnFailure::Drop => "dropped",
        OnFailure::Pass => "passed without inspection",
    }
}

fn worker(number: usize, counters: &Counters) -> api::Worker {
    let ring = counters.ring();
    api::Worker {
        number,
        state: match counters.state() {
            State::Starting => "starting",
            State::Running => "running",
            State::Down => "down",
            State::Ended => "ended",
        }
        .to_owned(),
        problem: counters.failure().map(|failure| failure.to_string()),
        restarts: counters.restarts.get(),
        packets_in: counters.packets_in.get(),
        bytes_in: counters.bytes_in.get(),
        packets_out: counters.packets_out.get(),
        bytes_out: counters.bytes_out.get(),
        generated: counters.generated.get(),
        generated_lost: counters.generated_lost.get(),
        absorbed: counters.absorbed.get(),
        options_rewritten: counters.options_rewritten.get(),
        handoff_out: counters.handoff_out.get(),
        handoff_in: counters.handoff_in.get(),
        held: counters.held.get(),
        frames: counters.frames.get(),
        flows: counters.flows.get(),
        records_lost: counters.records_lost.get(),
        sleeps: counters.sleeps.get(),
        drops: counters
            .drops()
            .map(|(reason, packets)| api::WorkerDrops {
                reason,
                text: Reason::from_u8(reason).map_or_else(String::new, |reason| reason.text().to_owned()),
                packets,
            })
            .collect(),
        ring: api::WorkerRing {
            rx_dropped: ring.rx_dropped,
            rx_ring_full: ring.rx_ring_full,
            rx_fill_ring_empty: ring.rx_fill_ring_empty,
            invalid: ring.invalid,
        },
    }
}

/// Returns the function that makes the socket of a worker and enters the socket in the socket map.
fn socket_maker(
    wanted: &Wanted,
    socket_map: &Arc<palisade_datapath::SocketMap>,
    usable: &Arc<AtomicBool>,
) -> Arc<dyn Fn(usize) -> io::Result<(Socket, usize)> + Send + Sync> {
    let config = SocketConfig {
        frames: wanted.frames,
        mode: wanted.mode,
        ..SocketConfig::new(&format!("{}1", wanted.interface), 0)
    };
    let (socket_map, usable) = (Arc::clone(socket_map), Arc::clone(usable));
    Arc::new(move |number| {
        if !usable.load(Ordering::Acquire) {
            return Err(io::Error::other("there is no punt link"));
        }
        let config = SocketConfig {
            queue: number as u32,
            ..config.clone()
        };
        let socket = Socket::new(&config)?;
        socket_map
            .insert_socket(number as u32, socket.as_fd())
            .map_err(io::Error::other)?;
        Ok((socket, config.frames as usize))
    })
}

#[cfg(test)]
mod tests {
    use palisade_inspect::{DnsStats, HttpStats, Stats, TcpStats, TlsStats};

    use super::*;

    #[test]
    fn worker_metrics_are_added_up() {
        let tcp = TcpStats {
            opened: 5,
            connections: 2,
            bytes: 1_000,
            frames: 3,
            offloaded_flows: 4,
            ..TcpStats::default()
        };
        let stats = Stats {
            http: HttpStats {
                tcp,
                requests: 7,
                malformed: std::array::from_fn(|kind| kind as u64),
                ..HttpStats::default()
            },
            tls: TlsStats {
                tcp,
                ..TlsStats::default()
            },
            dns: DnsStats {
                tcp: TcpStats {
                    connections: 1,
                    ..TcpStats::default()
                },
                held: 1,
                ..DnsStats::default()
            },
            ..Stats::default()
        };
        let mut numbers = Vec::new();
        for _worker in 0..2 {
            stats.visit(&mut |number, value| numbers.push((number, value)));
        }
        let mut report = api::Workers::default();
        add_up(&mut report, numbers.into_iter());
        assert_eq!(report.inspection["http"]["requests"], 14);
        assert_eq!(report.inspection["http.malformed"]["HTTP/2 preface"], 2);
        assert_eq!(report.inspection["tls.tcp"]["opened"], 10);
        assert_eq!(report.inspection["dns"]["queries"], 0);
        let keeps = api::Keeps {
            connections: 10,
            remembered: 16,
            bytes: 4_000,
            packets: 14,
        };
        assert_eq!(report.keeps, keeps);
    }
}
