//! Workers on their threads, with a port in memory: allocations per packet, and restarts after failures.
#![allow(unsafe_code, reason = "a counting allocator")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use palisade_abi::{Inspector, PuntHeader, PuntRequest, Reason, ReinjectTrailer, punt_hook};
use palisade_inspect::{CommitResult, Millis, PacketView, Sink, record::Record};
use palisade_worker::{Handle, Inspect, Mode, Pool, Port, PortStatistics, Setup, State};
use zerocopy::{FromBytes as _, IntoBytes as _};

thread_local! {
    static ALLOCATED: Cell<u64> = const { Cell::new(0) };
}

/// The system allocator with a count of each thread's allocations.
struct Counting;

// SAFETY: all calls are passed on to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Fails while a thread's locals are being dropped; those allocations are not counted.
        let _ = ALLOCATED.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller upholds the contract of this method, which is that of the system allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of this method, which is that of the system allocator.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let _ = ALLOCATED.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller upholds the contract of this method, which is that of the system allocator.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const COOKIE: u64 = 99;
const FRAMES: usize = 256;

/// A port that receives the same packets again and again.
struct Loop {
    chunks: Vec<[u8; 2_048]>,
    lengths: Vec<usize>,
    free: Vec<usize>,
    packets: Arc<Vec<Vec<u8>>>,
    next: usize,
    seen: Arc<Seen>,
    /// No more packets arrive.
    dry: Arc<AtomicBool>,
    fail_at: Option<u64>,
}

/// What a port has seen.
#[derive(Default)]
struct Seen {
    /// Sent packets.
    sent: AtomicU64,
    /// The sent packet from which on allocations are counted.
    warm: AtomicU64,
    /// Allocations of the thread since then.
    allocated: AtomicU64,
    /// Free frames.
    free: AtomicUsize,
    /// Sent packets without a valid trailer.
    wrong: AtomicU64,
}

impl Port for Loop {
    type Frame = usize;

    fn receive(&mut self, into: &mut VecDeque<usize>, most: usize) -> io::Result<usize> {
        let sent = self.seen.sent.load(Ordering::Relaxed);
        if self.fail_at.is_some_and(|at| sent >= at) {
            return Err(io::Error::other("the socket is gone"));
        }
        if self.dry.load(Ordering::Relaxed) {
            return Ok(0);
        }
        let mut got = 0;
        while got < most.min(32) {
            let Some(frame) = self.free.pop() else { break };
            let packet = &self.packets[self.next % self.packets.len()];
            self.next += 1;
            self.chunks[frame][..packet.len()].copy_from_slice(packet);
            self.lengths[frame] = packet.len();
            into.push_back(frame);
            got += 1;
        }
        Ok(got)
    }

    fn rx_available(&mut self) -> usize {
        0
    }

    fn rx_capacity(&self) -> usize {
        FRAMES
    }

    fn data<'a>(&'a self, frame: &'a usize) -> &'a [u8] {
        &self.chunks[*frame][..self.lengths[*frame]]
    }

    fn buffer_mut<'a>(&'a mut self, frame: &'a mut usize) -> &'a mut [u8] {
        &mut self.chunks[*frame]
    }

    fn set_length(&mut self, frame: &mut usize, length: usize) {
        self.lengths[*frame] = length;
    }

    fn alloc(&mut self) -> Option<usize> {
        self.free.pop()
    }

    fn free(&mut self, frame: usize) {
        self.free.push(frame);
    }

    fn transmit(&mut self, frame: usize, start: usize, length: usize) -> Result<(), usize> {
        let bytes = &self.chunks[frame][start..start + length];
        let right = ReinjectTrailer::read_from_suffix(bytes)
            .is_ok_and(|(_, released)| released.cookie == COOKIE && released.ifindex == 4);
        self.seen.wrong.fetch_add(u64::from(!right), Ordering::Relaxed);
        self.free.push(frame);
        let sent = self.seen.sent.fetch_add(1, Ordering::Relaxed) + 1;
        if sent == self.seen.warm.load(Ordering::Relaxed) {
            ALLOCATED.with(|count| count.set(0));
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<usize> {
        self.seen.free.store(self.free.len(), Ordering::Relaxed);
        self.seen
            .allocated
            .store(ALLOCATED.with(Cell::get), Ordering::Relaxed);
        Ok(0)
    }

    fn fd(&self) -> Option<std::os::fd::RawFd> {
        None
    }

    fn statistics(&mut self) -> io::Result<PortStatistics> {
        Ok(PortStatistics {
            rx_ring_full: 3,
            ..PortStatistics::default()
        })
    }
}

/// An engine that drops each tenth packet, releases some of the others later, and records all.
struct Script {
    held: VecDeque<Handle>,
    count: u64,
    panic_at: Option<u64>,
}

impl Inspect for Script {
    type Rules = ();

    fn set_rules(&mut self, _: Arc<()>) {}

    fn knows(&self, _: u32) -> bool {
        true
    }

    fn packet(&mut self, _: Millis, view: &PacketView<'_>, frame: Handle, sink: &mut impl Sink<Handle>) {
        self.count += 1;
        assert!(
            self.panic_at.is_none_or(|at| self.count < at),
            "panic of the test"
        );
        let what = palisade_inspect::record::What::Unreadable { detail: "in a test" };
        sink.record(&Record::of(view, what));
        match self.count % 10 {
            0 => sink.discard(frame, Reason::AppDenied),
            1..4 => self.held.push_back(frame),
            _ => sink.release(frame),
        }
        if self.held.len() > 50 {
            self.held.drain(..).for_each(|frame| sink.release(frame));
        }
    }

    fn committed(&mut self, _: Millis, _: CommitResult, _: &mut impl Sink<Handle>) {}

    fn tick(&mut self, _: Millis, sink: &mut impl Sink<Handle>) {
        self.held.drain(..).for_each(|frame| sink.release(frame));
    }

    fn deadline(&self) -> Option<Millis> {
        (!self.held.is_empty()).then_some(u64::MAX)
    }

    fn forget_endpoint(&mut self, _: u16, sink: &mut impl Sink<Handle>) {
        self.held
            .drain(..)
            .for_each(|frame| sink.discard(frame, Reason::NoPolicy));
    }
}

/// Returns a punted UDP datagram without a checksum.
fn packet(hash: u32, second: bool) -> Vec<u8> {
    let slot = PuntRequest {
        endpoint: 2,
        inspector: Inspector::Dns as u8,
        ..PuntRequest::default()
    };
    let punted = PuntHeader {
        cookie: COOKIE,
        ifindex: 4,
        hash,
        hook: punt_hook::TC_INGRESS,
        slots: [slot, if second { slot } else { PuntRequest::default() }],
        ..PuntHeader::default()
    };
    let mut bytes = punted.as_bytes().to_vec();
    bytes.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    bytes.extend([
        0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0x26, 0xcb, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    bytes.extend([0x30, 0x39, 0, 53, 0, 12, 0, 0, 1, 2, 3, 4]);
    bytes
}

fn clock() -> u64 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64 + 1
}

/// A pool of workers with ports in memory.
struct Bench {
    seen: Vec<Arc<Seen>>,
    dry: Arc<AtomicBool>,
    heartbeats: Arc<Vec<AtomicU64>>,
    /// Heartbeats that all workers have published.
    published: Arc<AtomicU64>,
    pool: Pool<()>,
    records: palisade_worker::Receiver<palisade_worker::TimedRecord>,
    starts: Arc<AtomicUsize>,
}

fn bench(workers: usize, warm: u64, fail_at: Option<u64>, panic_at: Option<u64>) -> Bench {
    let seen: Vec<Arc<Seen>> = (0..workers)
        .map(|_| {
            Arc::new(Seen {
                warm: warm.into(),
                ..Seen::default()
            })
        })
        .collect();
    let dry = Arc::new(AtomicBool::new(false));
    let starts = Arc::new(AtomicUsize::new(0));
    let packets = Arc::new((0..8).map(|n| packet(n, n % 3 == 0)).collect::<Vec<_>>());
    let heartbeats: Arc<Vec<AtomicU64>> = Arc::new((0..workers).map(|_| AtomicU64::new(0)).collect());
    let published = Arc::new(AtomicU64::new(0));
    let (pool, _, records) = Pool::start(Setup {
        workers,
        mode: Mode::Poll,
        cookie: COOKIE,
        clock,
        max_handoff: 2_048,
        port: {
            let (seen, dry, starts) = (seen.clone(), Arc::clone(&dry), Arc::clone(&starts));
            Arc::new(move |number| {
                // Only the first start gets a port that fails.
                let first = starts.fetch_add(1, Ordering::Relaxed) == 0;
                let port = Loop {
                    chunks: vec![[0; 2_048]; FRAMES],
                    lengths: vec![0; FRAMES],
                    free: (0..FRAMES).collect(),
                    packets: Arc::clone(&packets),
                    next: 0,
                    seen: Arc::clone(&seen[number]),
                    dry: Arc::clone(&dry),
                    fail_at: fail_at.filter(|_| first),
                };
                Ok((port, FRAMES))
            })
        },
        engine: {
            let starts = Arc::clone(&starts);
            Arc::new(move |_| Script {
                held: VecDeque::with_capacity(FRAMES),
                count: 0,
                panic_at: panic_at.filter(|_| starts.load(Ordering::Relaxed) == 1),
            })
        },
        heartbeat: {
            let (heartbeats, published) = (Arc::clone(&heartbeats), Arc::clone(&published));
            Arc::new(move |number, now| {
                heartbeats[number].store(now, Ordering::Relaxed);
                published.fetch_add(1, Ordering::Relaxed);
            })
        },
        rules: Arc::new(()),
        max_commits: 4,
        records: 64,
    })
    .unwrap();
    Bench {
        seen,
        dry,
        heartbeats,
        published,
        pool,
        records,
        starts,
    }
}

/// Waits for a condition.
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < Duration::from_secs(60), "{what}: not in time");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn packets_in_the_steady_state_allocate_nothing_and_every_frame_is_freed() {
    let mut bench = bench(2, 20_000, None, None);
    assert!(bench.pool.wait_until_running(Duration::from_secs(60)));
    for seen in &bench.seen {
        until("packets", || seen.sent.load(Ordering::Relaxed) > 60_000);
    }
    let mut records = 0;
    while bench.records.try_recv().is_ok() {
        records += 1;
    }
    assert!(records > 0);
    for (number, seen) in bench.seen.iter().enumerate() {
        // The count starts at the 20,000th packet.
        assert_eq!(seen.allocated.load(Ordering::Relaxed), 0, "worker {number}");
        assert_eq!(seen.wrong.load(Ordering::Relaxed), 0);
    }
    bench.dry.store(true, Ordering::Relaxed);
    for (seen, counters) in bench.seen.iter().zip(bench.pool.counters()) {
        until("frames", || {
            // The engine discards the packets that it holds when their endpoint is deleted.
            bench.pool.forget_endpoints(&[2]);
            seen.free.load(Ordering::Relaxed) == FRAMES && counters.held.get() == 0
        });
        assert!(counters.handoff_out.get() > 1_000 && counters.handoff_in.get() > 1_000);
        assert_eq!(counters.packets_out.get(), seen.sent.load(Ordering::Relaxed));
    }
    // Every received packet is forwarded or counted as dropped, once the hand-off rings are empty.
    let total = |f: &dyn Fn(&palisade_worker::Counters) -> u64| -> u64 {
        bench.pool.counters().iter().map(|counters| f(counters)).sum()
    };
    until("every packet", || {
        bench.pool.forget_endpoints(&[2]);
        let dropped = total(&|counters| counters.drops().map(|(_, count)| count).sum());
        let out = total(&|counters| counters.packets_out.get());
        total(&|counters| counters.packets_in.get()) == out + dropped
    });
    bench.pool.stop();
    for (counters, heartbeat) in bench.pool.counters().iter().zip(&*bench.heartbeats) {
        assert_eq!(counters.state(), State::Ended);
        assert_eq!(counters.held.get(), 0);
        assert_eq!(heartbeat.load(Ordering::Relaxed), 0, "the heartbeat is withdrawn");
    }
}

#[test]
fn a_sleeping_worker_publishes_heartbeats() {
    let bench = bench(1, 0, None, None);
    assert!(bench.pool.wait_until_running(Duration::from_secs(60)));
    bench.dry.store(true, Ordering::Relaxed);
    let sleeps = || bench.pool.counters()[0].sleeps.get();
    let published = || bench.published.load(Ordering::Relaxed);
    until("the worker is idle", || sleeps() > 2);
    let (first_sleep, first, started) = (sleeps(), published(), Instant::now());
    until("heartbeats", || published() >= first + 20);
    let (slept, beats) = (sleeps() - first_sleep, published() - first);
    // No upper bound on the time, because the machine may be busy. An idle worker sleeps once for each heartbeat, 50
    // ms.
    assert!(
        (beats / 2..=beats * 2).contains(&slept) && started.elapsed() > Duration::from_millis(100),
        "{slept} sleeps, {beats} heartbeats, {:?}",
        started.elapsed()
    );
}

#[test]
fn a_worker_that_panics_is_restarted() {
    let bench = bench(1, 0, None, Some(1_000));
    let counters = Arc::clone(&bench.pool.counters()[0]);
    until("a panic", || counters.restarts.get() == 1);
    until("running again", || counters.state() == State::Running);
    assert_eq!(bench.starts.load(Ordering::Relaxed), 2);
    let before = counters.packets_out.get();
    until("packets", || counters.packets_out.get() > before + 1_000);
    assert_ne!(bench.heartbeats[0].load(Ordering::Relaxed), 0);
}

#[test]
fn a_worker_whose_socket_fails_is_restarted_with_a_new_one() {
    let bench = bench(1, 0, Some(500), None);
    let counters = Arc::clone(&bench.pool.counters()[0]);
    let mut failure = None;
    until("a failure", || {
        failure = failure.take().or_else(|| counters.failure());
        failure.is_some()
    });
    assert_eq!(
        failure.map(|failure| failure.to_string()).as_deref(),
        Some("the socket is gone")
    );
    until("running again", || counters.state() == State::Running);
    assert_eq!(counters.restarts.get(), 1);
    assert!(counters.failure().is_none());
    let before = counters.packets_out.get();
    until("packets", || counters.packets_out.get() > before + 1_000);
    until("the ring losses", || counters.ring().rx_ring_full == 3);
}
