//! Packets per second through a worker, against a bare AF_XDP forwarder on the same veth.
//!
//! Both run at the same end of the same veth pair, behind the same XDP program, with the same socket (one queue, as many
//! frames, the same waiting mode), and receive the same frames: DNS queries and answers with a punt header. They differ
//! only between receiving and sending. The bare forwarder sends each frame back unchanged. The worker parses the punt
//! header, decodes the packet, verifies its checksum, looks up rules, inspects the packet, and appends the reinject
//! trailer.
//!
//! The sender limits the number of frames in flight and counts those that come back: the rate is one that both sustain, and
//! the other frames are lost.

use std::{
    any::Any,
    fs::{self, File},
    io,
    net::Ipv4Addr,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::FileExt,
    },
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, XskMap},
    programs::{Xdp, xdp::XdpMode},
};
use palisade_abi::{
    Config as Told, Inspector, PuntHeader, PuntRequest, maps, programs, punt_flags, punt_hook,
};
use palisade_datapath::monotonic_coarse;
use palisade_inspect::{CommitResult, Engine, Limits, Millis, PacketView, Rules, Sink};
use palisade_model::{
    rule::FqdnPattern,
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_testbed::{Ns, dns};
use palisade_worker::{Counters, Handle, Inspect, Mode, Pool, Setup};
use palisade_xsk::{Config, Socket};
use zerocopy::IntoBytes;

use crate::{
    Effort, progress,
    report::{Goal, Measure, Samples, Table},
    traffic::{BATCH, Sender},
    wire,
};

/// Cookie of the punt header. The first byte on the wire would be a MAC address's, so it must not be a group address.
const COOKIE: u64 = 0x0102_0304_0506_0708 << 1;
const RULESET: u32 = 5;
/// Flows of the traffic.
const FLOWS: u16 = 64;
/// Frames in flight: less than half of the ring, above which a worker sheds packets.
const UNDER_WAY: u64 = 512;
/// The ends of the veth pair.
const NODE_END: &str = "a";
const WORKER_END: &str = "b";
const TIMEOUT: Duration = Duration::from_secs(10);

/// The program that receives the frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Receiver {
    /// The bare forwarder.
    Bare,
    /// A worker whose engine forwards everything.
    Forwards,
    /// A worker with the daemon's engine, which inspects DNS.
    Inspects,
}

impl Receiver {
    const ALL: [Self; 3] = [Self::Bare, Self::Forwards, Self::Inspects];

    const fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare forwarder",
            Self::Forwards => "worker, forwards",
            Self::Inspects => "worker, inspects DNS",
        }
    }
}

/// An engine that forwards everything.
struct Open;

impl Inspect for Open {
    type Rules = ();

    fn set_rules(&mut self, _: Arc<()>) {}

    fn knows(&self, _: u32) -> bool {
        true
    }

    fn packet(&mut self, _: Millis, _: &PacketView<'_>, frame: Handle, sink: &mut impl Sink<Handle>) {
        sink.release(frame);
    }

    fn committed(&mut self, _: Millis, _: CommitResult, _: &mut impl Sink<Handle>) {}

    fn tick(&mut self, _: Millis, _: &mut impl Sink<Handle>) {}

    fn deadline(&self) -> Option<Millis> {
        None
    }

    fn forget_endpoint(&mut self, _: u16, _: &mut impl Sink<Handle>) {}
}

/// Returns a query and its answer for each flow, with punt headers. The answer is NXDOMAIN, so that nothing is learned.
fn frames() -> Vec<Vec<u8>> {
    let (client, server) = (Ipv4Addr::new(10, 0, 1, 10), Ipv4Addr::new(198, 51, 100, 2));
    let slot = |flags| PuntRequest {
        rule: 9,
        ruleset: RULESET,
        remote_identity: 2,
        revision: 1,
        serial: 99,
        endpoint: 1,
        inspector: Inspector::Dns as u8,
        flags,
    };
    let carried = |slot, hook, frame: &[u8], hash| {
        let carried = PuntHeader {
            cookie: COOKIE,
            ifindex: 1,
            hash,
            hook,
            slots: [slot, PuntRequest::default()],
            ..PuntHeader::default()
        };
        [carried.as_bytes(), frame].concat()
    };
    (0..FLOWS)
        .flat_map(|n| {
            let query = dns::query(n, &[(&format!("h{n}.bench.example"), dns::rtype::A)]);
            let mut answer = query.clone();
            answer[2..4].copy_from_slice(&[0x84, 0x83]);
            let (at, to) = ((client, 20_000 + n), (server, dns::PORT));
            let there = wire::udp(at, to, &query);
            let back = wire::udp(to, at, &answer);
            [
                carried(slot(0), punt_hook::TC_INGRESS, &there, n.into()),
                carried(
                    slot(punt_flags::INGRESS | punt_flags::REPLY),
                    punt_hook::TC_EGRESS,
                    &back,
                    n.into(),
                ),
            ]
        })
        .collect()
}

fn rules() -> Rules {
    let set = RuleSet {
        reads: Inspector::Dns as u8,
        alternatives: vec![Alternative {
            rule: 9,
            matcher: Matcher::Dns(FqdnPattern::Pattern("*.bench.example".into())),
        }],
        ..RuleSet::default()
    };
    Rules::prepare(&[(RULESET, Arc::new(set))].into(), None)
}

/// A veth pair with the program that passes frames to the socket at the workers' end.
struct Veth {
    ns: Ns,
    ebpf: Ebpf,
    /// Interface counters of the namespace in which the file was opened.
    counters: File,
}

impl Veth {
    fn new() -> Result<Self> {
        let ns = Ns::new("punt")?;
        ns.sysctl("ipv6/conf/default/disable_ipv6", "1")?;
        ns.ip(&format!(
            "link add name {NODE_END} numtxqueues 1 numrxqueues 1 type veth peer name {WORKER_END} numtxqueues 1 numrxqueues 1\n\
             link set dev {NODE_END} up\nlink set dev {WORKER_END} up\n"
        ))?;
        let mut ebpf = EbpfLoader::new()
            .load(palisade_datapath::OBJECT)
            .context("loading the BPF object")?;
        let told = Told {
            cookie: COOKIE,
            ..Told::default()
        };
        let told: [u8; size_of::<Told>()] = told.as_bytes().try_into()?;
        let config = ebpf.map_mut(maps::CONFIG).context(maps::CONFIG)?;
        Array::<_, [u8; size_of::<Told>()]>::try_from(config)?.set(0, told, 0)?;
        let program: &mut Xdp = ebpf
            .program_mut(programs::PUNT)
            .context(programs::PUNT)?
            .try_into()?;
        program.load()?;
        ns.enter(|| program.attach(WORKER_END, XdpMode::Driver))?;
        let counters = ns.enter(|| File::open("/proc/thread-self/net/dev"))?;
        Ok(Self { ns, ebpf, counters })
    }

    fn insert(&mut self, socket: RawFd) -> Result<()> {
        let map = self.ebpf.map_mut(maps::XSKS).context(maps::XSKS)?;
        Ok(XskMap::try_from(map)?.set(0, socket, 0)?)
    }

    /// Returns the number of frames that came back.
    fn returned(&self) -> Result<u64> {
        let mut text = [0; 2_048];
        let length = self.counters.read_at(&mut text, 0)?;
        let text = std::str::from_utf8(&text[..length])?;
        let line = text
            .lines()
            .find_map(|line| line.trim_start().strip_prefix(NODE_END)?.strip_prefix(':'));
        let packets = line.and_then(|line| line.split_ascii_whitespace().nth(1)?.parse().ok());
        packets.context("no counter of the veth")
    }

    /// Sends the frames in turn and waits until they come back. Returns how many were sent and came back, and how long that
    /// took.
    fn drive(&self, frames: &[Vec<u8>], duration: Duration) -> Result<(u64, u64, Duration)> {
        self.ns.enter(|| {
            let sender = Sender::open(NODE_END)?;
            let mut batches = sender.batches();
            let start = self.returned()?;
            let (mut sent, mut back) = (0, 0);
            let mut at = 0;
            let begin = Instant::now();
            while begin.elapsed() < duration {
                if sent - back < UNDER_WAY {
                    let batch = &frames[at..(at + BATCH).min(frames.len())];
                    let count = batches.send(batch)?;
                    sent += count as u64;
                    at = (at + count) % frames.len();
                } else {
                    thread::yield_now();
                }
                back = self.returned()? - start;
            }
            let wait = Instant::now();
            while back < sent && wait.elapsed() < Duration::from_millis(200) {
                back = self.returned()? - start;
            }
            Ok((sent, back, begin.elapsed()))
        })
    }
}

/// CPU time of a thread.
#[derive(Clone, Default)]
struct Used(Arc<OnceLock<PathBuf>>);

impl Used {
    /// Selects the calling thread; any thread can then read its CPU time.
    fn here(&self) {
        if let Ok(path) = fs::read_link("/proc/thread-self") {
            let _ = self.0.set(PathBuf::from("/proc").join(path).join("schedstat"));
        }
    }

    fn read(&self) -> Result<Duration> {
        let path = self.0.get().context("a thread that has not begun")?;
        let text = fs::read_to_string(path)?;
        let ns = text.split_whitespace().next().and_then(|ns| ns.parse().ok());
        Ok(Duration::from_nanos(ns.context("schedstat")?))
    }
}

/// A receiver of the frames that sends them back.
struct BareForwarder {
    veth: Veth,
    used: Used,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    counters: Option<Arc<Counters>>,
    /// Its worker, and what must live as long.
    pool: Option<Box<dyn Any>>,
}

fn socket(mode: Mode) -> Config {
    Config {
        mode,
        ..Config::new(WORKER_END, 0)
    }
}

/// Starts a worker, and a thread that drains its records.
fn start<E: Inspect + 'static>(
    mode: Mode,
    port: impl Fn() -> io::Result<Socket> + Send + Sync + 'static,
    engine: impl Fn(usize) -> E + Send + Sync + 'static,
    rules: E::Rules,
    forwarder: &mut BareForwarder,
) -> Result<()> {
    let frames = socket(mode).frames as usize;
    let (pool, commits, records) = Pool::start(Setup {
        workers: 1,
        mode,
        cookie: COOKIE,
        clock: monotonic_coarse,
        max_handoff: 4_096,
        port: Arc::new(move |_| Ok((port()?, frames))),
        engine: Arc::new(engine),
        heartbeat: Arc::new(|_, _| {}),
        rules: Arc::new(rules),
        max_commits: 1_024,
        records: 2_048,
    })?;
    forwarder.counters = pool.counters().first().cloned();
    forwarder.pool = Some(Box::new((pool, commits)));
    let stop = Arc::clone(&forwarder.stop);
    forwarder.threads.push(thread::spawn(move || {
        while !stop.load(Relaxed) {
            // A timeout is no error: there may be no records.
            let _ = records.recv_timeout(Duration::from_millis(50));
        }
    }));
    Ok(())
}

/// Runs the bare forwarder until `stop`.
fn forward(mut socket: Socket, stop: &AtomicBool) -> io::Result<()> {
    let mut frames = Vec::with_capacity(64);
    while !stop.load(Relaxed) {
        if socket.receive(&mut frames, 64)? == 0 {
            socket.wait(Duration::from_millis(50))?;
            continue;
        }
        for frame in frames.drain(..) {
            // A frame that does not fit is lost; the sender counts it.
            let _ = socket.send(frame);
        }
        socket.flush()?;
    }
    Ok(())
}

impl BareForwarder {
    fn new(receiver: Receiver, mode: Mode) -> Result<Self> {
        let mut forwarder = Self {
            veth: Veth::new()?,
            used: Used::default(),
            stop: Arc::default(),
            threads: Vec::new(),
            counters: None,
            pool: None,
        };
        // The socket belongs to the thread; this thread inserts its descriptor into the map.
        let (tell, told) = mpsc::sync_channel(1);
        let enter = {
            let (ns, used) = (forwarder.veth.ns.clone(), forwarder.used.clone());
            move || -> io::Result<Socket> {
                ns.join().map_err(io::Error::other)?;
                used.here();
                let socket = Socket::new(&socket(mode))?;
                // The receiver may have given up.
                let _ = tell.try_send(socket.as_raw_fd());
                Ok(socket)
            }
        };
        match receiver {
            Receiver::Bare => {
                let stop = Arc::clone(&forwarder.stop);
                forwarder.threads.push(thread::spawn(move || {
                    if let Err(problem) = enter().and_then(|socket| forward(socket, &stop)) {
                        progress(format_args!("bare forwarder: {problem}"));
                    }
                }));
            }
            Receiver::Forwards => start(mode, enter, |_| Open, (), &mut forwarder)?,
            Receiver::Inspects => {
                let engine = |_| Engine::<Handle>::new(&Limits::default());
                start(mode, enter, engine, rules(), &mut forwarder)?;
            }
        }
        let fd = told.recv_timeout(TIMEOUT).context("no socket")?;
        forwarder.veth.insert(fd)?;
        Ok(forwarder)
    }

    /// Returns why frames did not come back.
    fn report(&self) -> String {
        self.counters.as_ref().map_or_else(String::new, |counters| {
            format!(
                "; the worker dropped {:?}, {:?}",
                counters.drops().collect::<Vec<_>>(),
                counters.ring()
            )
        })
    }
}

impl Drop for BareForwarder {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        self.pool = None;
        for thread in self.threads.drain(..) {
            // The thread has reported its errors already.
            let _ = thread.join();
        }
    }
}

/// Results of one receiver.
#[derive(Default)]
struct Figures {
    /// Frames per second.
    rate: Samples,
    /// Frames per CPU second of the thread that owns the socket.
    cheap: Samples,
    lost: u64,
    sent: u64,
}

impl Figures {
    fn take(&mut self, receiver: Receiver, mode: Mode, frames: &[Vec<u8>], duration: Duration) -> Result<()> {
        let forwarder = BareForwarder::new(receiver, mode)?;
        forwarder.veth.drive(frames, duration / 10)?;
        let used = forwarder.used.read()?;
        let (sent, back, took) = forwarder.veth.drive(frames, duration)?;
        let used = forwarder.used.read()?.saturating_sub(used);
        ensure!(
            back * 2 > sent,
            "{}: of {sent} frames {back} came back{}",
            receiver.name(),
            forwarder.report()
        );
        if back < sent {
            progress(format_args!(
                "{}: {} of {sent} frames were lost{}",
                receiver.name(),
                sent - back,
                forwarder.report()
            ));
        }
        self.rate.push(back as f64 / took.as_secs_f64());
        self.cheap.push(back as f64 / used.as_secs_f64());
        self.sent += sent;
        self.lost += sent - back;
        Ok(())
    }
}

/// Runs the measure.
pub fn measure(effort: Effort) -> Result<Measure> {
    let rounds = effort.pick(5, 15);
    let duration = effort.pick(Duration::from_millis(300), Duration::from_millis(600));
    let modes: &[(Mode, &str)] = effort.pick(
        &[(Mode::Poll, "poll")],
        &[
            (Mode::Poll, "poll"),
            (Mode::Spin, "spin"),
            (Mode::BusyPoll, "busy-poll"),
        ],
    );
    progress(format_args!(
        "punt: {rounds} rounds of {} ms, {} receivers, {} modes",
        duration.as_millis(),
        Receiver::ALL.len(),
        modes.len()
    ));
    let frames = frames();
    let mut table = Table::new(
        "Frames a second that come back, and frames for a second of the processor of the thread at the socket",
        &[
            "mode, receiver",
            "frames/s",
            "against bare",
            "spread",
            "frames for a CPU second",
            "against bare",
            "lost",
        ],
    );
    let mut goals = Vec::new();
    for &(mode, name) in modes {
        let mut figures: [Figures; Receiver::ALL.len()] = std::array::from_fn(|_| Figures::default());
        for _ in 0..rounds {
            for (receiver, figures) in Receiver::ALL.into_iter().zip(&mut figures) {
                figures.take(receiver, mode, &frames, duration)?;
            }
        }
        let [bare, ..] = &figures;
        for (receiver, of) in Receiver::ALL.into_iter().zip(&figures) {
            let against = of.rate.against(&bare.rate);
            table.row(
                format!("{name}, {}", receiver.name()),
                &[
                    of.rate.median(),
                    against.median(),
                    against.spread(),
                    of.cheap.median(),
                    of.cheap.against(&bare.cheap).median(),
                    of.lost as f64,
                ],
            );
            if receiver == Receiver::Bare {
                continue;
            }
            let what = format!(
                "packets/s, {} in {name} mode, against a bare AF_XDP forwarder",
                receiver.name()
            );
            goals.push(Goal::at_least(what, 0.8, against.median(), " ×"));
            goals.push(Goal::at_most(
                format!(
                    "frames lost at that rate, {} in {name} mode, of {}",
                    receiver.name(),
                    of.sent
                ),
                0.0,
                of.lost as f64,
                "",
            ));
        }
    }
    Ok(Measure {
        name: "punt",
        title: "Packets per second of a worker",
        method: format!(
            "A worker and a bare AF_XDP forwarder (receive, send back, flush) at the same end of the same veth pair, behind the same XDP program, with the same socket, get the same frames: DNS queries and answers of {FLOWS} flows. At most {UNDER_WAY} frames are under receiver; what has not come back 200 ms after the end is lost. {rounds} rounds of {} ms take the ways in turn, each with a fresh socket.",
            duration.as_millis()
        ),
        goals,
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}
