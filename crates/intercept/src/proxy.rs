//! The threads of the proxy, their restarts, and their state for other threads.

use std::{
    any::Any,
    collections::{BTreeMap, btree_map::Entry},
    io,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use mio::{Poll, Waker};
use palisade_abi::Direction;
use tracing::{error, info};

use crate::{
    check::{CheckRequest, CheckStep, check},
    listen::{Listener, Place, Resolver, listen},
    overflow::overflows,
    settings::{Flows, Listeners, Namespace, Options, Reports, Settings},
    stats::{Counters, Stats},
    thread::{Shared, Show, Thread, WAKER, register},
    tls::Contexts,
    upstreams::Upstream,
    view::ConnectionView,
};

/// Delay before the first restart. The delay doubles with each further restart, up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(10);
/// Longest delay before a restart.
const MAX_BACKOFF: Duration = Duration::from_secs(1);
/// Run time after which the delay of the next restart is [`MIN_BACKOFF`] again.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);

/// Time for the threads to show their state.
const SHOW: Duration = Duration::from_secs(1);

/// The running threads. Dropping this value ends the threads and resets their connections.
pub struct Proxy {
    shared: Arc<Shared>,
    threads: Vec<Member>,
    /// Addresses of the listeners of the first thread.
    addresses: Vec<(Direction, SocketAddr)>,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxy")
            .field("threads", &self.threads.len())
            .finish_non_exhaustive()
    }
}

struct Member {
    handle: Option<JoinHandle<()>>,
    waker: Arc<Waker>,
    shows: Sender<Show>,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    counters: Counters,
    is_running: AtomicBool,
    /// Text of the last failure.
    failure: Mutex<Option<String>>,
}

/// State of one thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadState {
    /// Whether the thread accepts connections.
    pub is_running: bool,
    /// Number of open connections.
    pub connections: u64,
    /// Number of restarts.
    pub restarts: u64,
    /// Text of the last failure.
    pub failure: Option<String>,
}

impl Proxy {
    /// Creates the listeners, registers those of the first thread, and starts the threads.
    ///
    /// # Errors
    /// The error of a socket, a registration or a thread.
    pub fn start(
        options: Options,
        namespaces: Vec<Namespace>,
        listeners: &dyn Listeners,
        flows: Arc<dyn Flows>,
        reports: Arc<dyn Reports>,
        settings: Settings,
    ) -> io::Result<Self> {
        let places = namespaces.into_iter().map(Place::of).collect();
        Self::start_in(options, places, listeners, flows, reports, settings)
    }

    /// Starts a proxy in the namespace of the process, with one listener for each thread at a loopback address.
    /// `resolver` returns the server for the address of a client. For tests and benchmarks: the server sees the proxy's
    /// address.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_on_loopback(
        options: Options,
        direction: Direction,
        resolver: Resolver,
        flows: Arc<dyn Flows>,
        reports: Arc<dyn Reports>,
        settings: Settings,
    ) -> io::Result<Self> {
        struct Unregistered;
        impl Listeners for Unregistered {
            fn register(&self, _: Direction, _: std::os::fd::BorrowedFd<'_>, _: bool) -> io::Result<()> {
                Ok(())
            }
        }
        let places = vec![(direction, Place::Resolver(resolver))];
        Self::start_in(options, places, &Unregistered, flows, reports, settings)
    }

    fn start_in(
        options: Options,
        places: Vec<(Direction, Place)>,
        registry: &dyn Listeners,
        flows: Arc<dyn Flows>,
        reports: Arc<dyn Reports>,
        settings: Settings,
    ) -> io::Result<Self> {
        let lists = listen(&places, options.threads.max(1), registry)?;
        let mut addresses = Vec::new();
        for listener in lists.iter().flatten() {
            addresses.push((listener.direction, listener.socket.local_addr()?));
        }
        let shared = Arc::new(Shared {
            options,
            flows,
            reports,
            contexts: Contexts::new(),
            settings: Mutex::new(Arc::new(settings)),
            generation: AtomicU64::new(0),
            rechecks: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            places,
        });
        let mut proxy = Self {
            shared,
            threads: Vec::new(),
            addresses,
        };
        for (number, mut listeners) in lists.into_iter().enumerate() {
            let poll = Poll::new()?;
            register(&mut listeners, &poll)?;
            let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
            let state = Arc::new(State::default());
            let (shows, requests) = channel();
            let (shared, own) = (Arc::clone(&proxy.shared), Arc::clone(&state));
            let handle = thread::Builder::new()
                .name(format!("intercept-{number}"))
                .spawn(move || supervise(number, &shared, &own, &requests, &listeners, poll))?;
            proxy.threads.push(Member {
                handle: Some(handle),
                waker,
                shows,
                state,
            });
        }
        Ok(proxy)
    }

    /// Replaces the settings. Live connections use them from their next request on.
    pub fn update(&self, settings: Settings) {
        *self
            .shared
            .settings
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
        self.shared.generation.fetch_add(1, Ordering::Release);
        self.wake();
    }

    /// Looks up the flows of all connections after a change of policies, and resets those that are no longer
    /// intercepted.
    pub fn recheck(&self) {
        self.shared.rechecks.fetch_add(1, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        for thread in &self.threads {
            // An error means that the thread is woken already or has ended.
            let _ = thread.waker.wake();
        }
    }

    /// Returns the sums of the counters of all threads.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut stats = Stats::default();
        for thread in &self.threads {
            stats.add(&thread.state.counters);
        }
        stats
    }

    /// Returns the number of connections of clients that the kernel has dropped because the accept queue of their
    /// listener was full, since the namespaces of the proxy exist.
    ///
    /// # Errors
    /// The error of a namespace or of its counters.
    pub fn accept_overflows(&self) -> io::Result<u64> {
        overflows(&self.shared.places)
    }

    /// Returns at most `most` live connections of each thread. A thread that does not answer within a second is left out.
    #[must_use]
    pub fn connections(&self, most: usize) -> Vec<ConnectionView> {
        self.ask(|to| Show::Connections(most, to))
    }

    /// Returns the results of connections to servers. The number of servers is bounded; those whose last connection is
    /// longest ago are forgotten first.
    #[must_use]
    pub fn upstreams(&self) -> Vec<Upstream> {
        let mut sums: BTreeMap<(String, SocketAddr), Upstream> = BTreeMap::new();
        for one in self.ask(Show::Upstreams) {
            match sums.entry((one.name.clone(), one.address)) {
                Entry::Occupied(mut sum) => sum.get_mut().add(&one),
                Entry::Vacant(entry) => {
                    entry.insert(one);
                }
            }
        }
        sums.into_values().collect()
    }

    /// Asks all threads for a part of their state.
    fn ask<T>(&self, show: impl Fn(Sender<Vec<T>>) -> Show) -> Vec<T> {
        let (to, from) = channel();
        for thread in &self.threads {
            // An error means that the thread has ended.
            let _ = thread.shows.send(show(to.clone()));
        }
        drop(to);
        self.wake();
        let until = Instant::now() + SHOW;
        let mut all = Vec::new();
        for _ in &self.threads {
            match from.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(part) => all.extend(part),
                Err(_) => break,
            }
        }
        all
    }

    /// Opens a connection to a server as for an intercepted flow of an endpoint, and returns the result of each step.
    /// Blocks until the handshake has ended or the deadlines of [`Options`] have passed.
    ///
    /// Unless the node itself opens the connection, the programs must know the flow between the addresses of `request`.
    #[must_use]
    pub fn check(&self, request: &CheckRequest) -> Vec<CheckStep> {
        let settings = self
            .shared
            .settings
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let settings = Arc::clone(&settings);
        let place = self
            .shared
            .places
            .iter()
            .find(|(direction, _)| *direction == request.context.direction);
        let Some((_, place)) = place else {
            return vec![CheckStep::failed("no proxy for the direction")];
        };
        // Entering the namespace changes the thread.
        thread::scope(|scope| {
            let thread = thread::Builder::new().spawn_scoped(scope, || {
                check(
                    request,
                    place,
                    &self.shared.options,
                    &settings,
                    &self.shared.contexts,
                )
            });
            match thread {
                Ok(thread) => thread
                    .join()
                    .unwrap_or_else(|_| vec![CheckStep::failed("the check has failed")]),
                Err(_) => vec![CheckStep::failed("no thread can be started for the check")],
            }
        })
    }

    /// Returns the state of each thread.
    #[must_use]
    pub fn threads(&self) -> Vec<ThreadState> {
        self.threads
            .iter()
            .map(|thread| {
                let counters = &thread.state.counters;
                let failure = thread
                    .state
                    .failure
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                ThreadState {
                    is_running: thread.state.is_running.load(Ordering::Relaxed),
                    connections: counters.open.load(Ordering::Relaxed),
                    restarts: counters.restarts.load(Ordering::Relaxed),
                    failure: failure.clone(),
                }
            })
            .collect()
    }

    /// Returns the directions and addresses of all listeners.
    #[must_use]
    pub fn addresses(&self) -> &[(Direction, SocketAddr)] {
        &self.addresses
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.wake();
        for thread in &mut self.threads {
            if let Some(handle) = thread.handle.take() {
                let _ = handle.join();
            }
        }
    }
}

/// Runs a thread until the proxy stops, and restarts it when it fails. The listeners stay open, so that new connections
/// wait for the restart.
fn supervise(
    number: usize,
    shared: &Shared,
    state: &State,
    shows: &Receiver<Show>,
    listeners: &[Listener],
    mut poll: Poll,
) {
    let mut delay = MIN_BACKOFF;
    while !shared.stop.load(Ordering::Acquire) {
        let started = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let mut thread = Thread::new(shared, number, &state.counters, shows, listeners);
            state.is_running.store(true, Ordering::Relaxed);
            thread.run(&mut poll)
        }));
        state.is_running.store(false, Ordering::Relaxed);
        let failure = match outcome {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("panic: {}", panic_message(&*panic)),
        };
        if started.elapsed() > HEALTHY_AFTER {
            delay = MIN_BACKOFF;
        }
        let mut last = state.failure.lock().unwrap_or_else(PoisonError::into_inner);
        // Log a failure that repeats without a healthy run in between only once.
        if last.as_ref() != Some(&failure) {
            error!(
                thread = number,
                error = failure,
                "proxy thread failed, its connections are reset; restarting"
            );
        }
        *last = Some(failure);
        drop(last);
        state.counters.restarts.fetch_add(1, Ordering::Relaxed);
        let until = Instant::now() + delay;
        while !shared.stop.load(Ordering::Acquire) && Instant::now() < until {
            thread::sleep(MIN_BACKOFF.min(until.saturating_duration_since(Instant::now())));
        }
        delay = (delay * 2).min(MAX_BACKOFF);
        info!(thread = number, "proxy thread runs again");
    }
}

/// Returns the message of a panic.
fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
