//! The loop of one thread: its listeners, its connections and their deadlines.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, Sender},
    },
    time::{Duration, Instant},
};

use mio::{Events, Interest, Poll, Token};
use palisade_abi::{Direction, Reason};
use palisade_inspect::{
    Millis, Side,
    record::{Verdict, What},
    stream::StreamContext,
};
use slab::Slab;
use socket2::SockRef;

use crate::{
    connection::{Connection, Cx, Next, of_token},
    listen::{Listener, Place, set_options},
    protocol::Scratch,
    settings::{Flows, Options, Reports, Settings},
    stats::{Counters, count},
    tls::Contexts,
    upstreams::{Upstream, Upstreams},
    view::ConnectionView,
};

/// Token of the waker.
pub(crate) const WAKER: Token = Token(usize::MAX);
/// Token of the first listener; the others have lower tokens.
const LISTENERS: usize = usize::MAX - 1;
/// Number of events of one poll.
const EVENTS: usize = 1024;
/// Maximum number of connections that are accepted at once, so that open connections are not delayed.
const ACCEPTS: usize = 256;
/// Time after which a listener is read again if the process has no file descriptor left, ms.
const ACCEPT_PAUSE: Millis = 100;
/// Size of the buffer for bytes from sockets.
const SCRATCH: usize = 128 << 10;
/// Maximum number of log lines per second.
const LOG_LINES: u32 = 10;
/// Maximum number of records per second about connections that a limit ends. A flood of connections must not displace
/// other records.
const LIMIT_RECORDS: u32 = 100;
/// Details of these records.
const SHARE_FULL: &str = "the endpoint has its share of the proxy's connections";
const TABLE_FULL: &str = "the proxy has no room for further connections";
const EVICTED: &str = "idle connection ended for one of another endpoint: the proxy has no room";

/// A request for the state of a thread. The thread sends the state through the sender in the request.
pub(crate) enum Show {
    /// At most this many connections.
    Connections(usize, Sender<Vec<ConnectionView>>),
    /// The results of connections to servers.
    Upstreams(Sender<Vec<Upstream>>),
}

/// What all threads of a proxy share.
pub(crate) struct Shared {
    pub(crate) options: Options,
    pub(crate) flows: Arc<dyn Flows>,
    pub(crate) reports: Arc<dyn Reports>,
    pub(crate) contexts: Contexts,
    pub(crate) settings: std::sync::Mutex<Arc<Settings>>,
    /// Raised with each replacement of the settings.
    pub(crate) generation: AtomicU64,
    /// Raised when the flows of all connections must be looked up.
    pub(crate) rechecks: AtomicU64,
    pub(crate) stop: AtomicBool,
    pub(crate) places: Vec<(Direction, Place)>,
}

impl Shared {
    fn settings(&self) -> Arc<Settings> {
        let settings = self.settings.lock();
        Arc::clone(&settings.unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

/// Registers the listeners of a thread, once for all of its runs: a registration ends only with the last descriptor of a
/// socket, and the listeners stay open when a run fails.
pub(crate) fn register(listeners: &mut [Listener], poll: &Poll) -> io::Result<()> {
    for (index, listener) in listeners.iter_mut().enumerate() {
        let token = Token(LISTENERS - index);
        poll.registry()
            .register(&mut listener.socket, token, Interest::READABLE)?;
    }
    Ok(())
}

/// One run of a thread.
pub(crate) struct Thread<'a> {
    shared: &'a Shared,
    number: usize,
    counters: &'a Counters,
    shows: &'a Receiver<Show>,
    listeners: &'a [Listener],
    connections: Slab<Connection>,
    /// Number of connections of each endpoint.
    of_endpoint: HashMap<u16, usize>,
    /// Deadlines of connections, with the connections' keys and numbers. An entry can be earlier than the deadline, but
    /// not later.
    deadlines: BTreeSet<(Millis, usize, u64)>,
    /// Connections that can work without an event.
    ready: Vec<(usize, u64)>,
    settings: Arc<Settings>,
    generation: u64,
    rechecks: u64,
    next_id: u64,
    /// Time at which the listeners are read again without an event.
    accept_at: Option<Millis>,
    /// Direction whose namespace the thread is in.
    entered: Option<Direction>,
    upstreams: Upstreams,
    started: Instant,
    scratch: Scratch,
    bytes: Box<[u8]>,
    /// Current second of the next two limits.
    second: Millis,
    /// Number of log lines that are left in the second.
    log: u32,
    /// Number of records about connections that a limit ends that are left in the second.
    limit_records: u32,
}

impl<'a> Thread<'a> {
    pub(crate) fn new(
        shared: &'a Shared,
        number: usize,
        counters: &'a Counters,
        shows: &'a Receiver<Show>,
        listeners: &'a [Listener],
    ) -> Self {
        Self {
            shared,
            number,
            counters,
            shows,
            listeners,
            connections: Slab::new(),
            of_endpoint: HashMap::new(),
            deadlines: BTreeSet::new(),
            ready: Vec::new(),
            settings: shared.settings(),
            generation: shared.generation.load(Ordering::Acquire),
            rechecks: shared.rechecks.load(Ordering::Acquire),
            next_id: 0,
            // Connections can wait since the thread's last run.
            accept_at: Some(0),
            entered: None,
            upstreams: Upstreams::new(),
            started: Instant::now(),
            scratch: Scratch::default(),
            bytes: vec![0; SCRATCH].into_boxed_slice(),
            second: 0,
            log: LOG_LINES,
            limit_records: LIMIT_RECORDS,
        }
    }

    fn now(&self) -> Millis {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Runs until the proxy stops.
    pub(crate) fn run(&mut self, poll: &mut Poll) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        while !self.shared.stop.load(Ordering::Acquire) {
            let timeout = self.timeout();
            match poll.poll(&mut events, timeout) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let now = self.now();
            if now / 1000 != self.second {
                self.second = now / 1000;
                (self.log, self.limit_records) = (LOG_LINES, LIMIT_RECORDS);
            }
            self.follow_settings(poll, now);
            self.show(now);
            let mut accepts = self.accept_at.is_some_and(|at| at <= now);
            for event in &events {
                if event.token() == WAKER {
                    continue;
                }
                if event.token().0 > LISTENERS - self.listeners.len() {
                    accepts = true;
                    continue;
                }
                let (key, side) = of_token(event.token());
                if let Some(connection) = self.connections.get_mut(key) {
                    if let Some(end) = connection.end(side) {
                        end.note(event);
                    }
                    let id = connection.id;
                    self.ready.push((key, id));
                }
            }
            for (key, id) in std::mem::take(&mut self.ready) {
                self.work(key, id, poll, now, Connection::drive);
            }
            if accepts {
                self.accept(poll, now);
            }
            self.expire(poll, now);
            debug_assert!(self.deadlines.len() <= self.connections.len());
        }
        Ok(())
    }

    /// Answers requests for the state of the thread.
    fn show(&self, now: Millis) {
        while let Ok(show) = self.shows.try_recv() {
            // An error means that the requester has given up.
            let _ = match show {
                Show::Connections(most, to) => {
                    let views = self.connections.iter().take(most);
                    to.send(views.map(|(_, one)| one.view(self.number, now)).collect())
                        .is_ok()
                }
                Show::Upstreams(to) => to.send(self.upstreams.all()).is_ok(),
            };
        }
    }

    fn timeout(&self) -> Option<Duration> {
        if !self.ready.is_empty() {
            return Some(Duration::ZERO);
        }
        let deadline = self.deadlines.first().map(|(at, ..)| *at);
        let next = [deadline, self.accept_at].into_iter().flatten().min()?;
        // Rounded up, so that the deadline has passed when the poll returns.
        Some(Duration::from_millis(next.saturating_sub(self.now()) + 1))
    }

    /// Takes new settings, and looks up the flows of all connections if that was requested.
    fn follow_settings(&mut self, poll: &Poll, now: Millis) {
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation != self.generation {
            self.generation = generation;
            self.settings = self.shared.settings();
        }
        let rechecks = self.shared.rechecks.load(Ordering::Acquire);
        if rechecks != self.rechecks {
            self.rechecks = rechecks;
            let all: Vec<(usize, u64)> = self.connections.iter().map(|(key, one)| (key, one.id)).collect();
            for (key, id) in all {
                self.work(key, id, poll, now, Connection::recheck);
            }
        }
    }

    /// Calls a connection, and handles the result.
    fn work(
        &mut self,
        key: usize,
        id: u64,
        poll: &Poll,
        now: Millis,
        call: impl FnOnce(&mut Connection, &mut Cx<'_>) -> Next,
    ) {
        let Some(connection) = self.connections.get_mut(key).filter(|one| one.id == id) else {
            return;
        };
        let mut cx = Cx {
            now,
            settings: Arc::clone(&self.settings),
            newest: &|| self.shared.settings(),
            flows: &*self.shared.flows,
            reports: &*self.shared.reports,
            options: &self.shared.options,
            contexts: &self.shared.contexts,
            counters: self.counters,
            bytes: &mut self.bytes,
            scratch: &mut self.scratch,
            registry: poll.registry(),
            upstreams: &mut self.upstreams,
            entered: &mut self.entered,
            log: &mut self.log,
        };
        match call(connection, &mut cx) {
            Next::Close => self.remove(key),
            next => {
                if next == Next::Again {
                    self.ready.push((key, id));
                }
                let deadline = connection.deadline(&self.shared.options);
                if deadline < connection.queued {
                    // The queue has one entry for each connection, or entries of closed connections would stay in it.
                    self.deadlines.remove(&(connection.queued, key, id));
                    connection.queued = deadline;
                    self.deadlines.insert((deadline, key, id));
                }
            }
        }
    }

    fn remove(&mut self, key: usize) {
        let Some(connection) = self.connections.try_remove(key) else {
            return;
        };
        self.deadlines.remove(&(connection.queued, key, connection.id));
        if let Some(number) = self.of_endpoint.get_mut(&connection.endpoint) {
            *number -= 1;
            if *number == 0 {
                self.of_endpoint.remove(&connection.endpoint);
            }
        }
        self.counters.open.fetch_sub(1, Ordering::Relaxed);
    }

    fn expire(&mut self, poll: &Poll, now: Millis) {
        while let Some(&(at, key, id)) = self.deadlines.first() {
            if at > now {
                return;
            }
            self.deadlines.pop_first();
            let Some(connection) = self.connections.get_mut(key).filter(|one| one.id == id) else {
                continue;
            };
            connection.queued = Millis::MAX;
            let is_due = connection.deadline(&self.shared.options) <= now;
            self.work(key, id, poll, now, |connection, cx| {
                if is_due { connection.expire(cx) } else { Next::Wait }
            });
        }
    }

    fn accept(&mut self, poll: &Poll, now: Millis) {
        self.accept_at = None;
        for index in 0..self.listeners.len() {
            for turn in 0.. {
                if turn == ACCEPTS {
                    self.accept_at = Some(now);
                    break;
                }
                let Some(listener) = self.listeners.get(index) else {
                    break;
                };
                match listener.socket.accept() {
                    Ok((socket, client)) => self.take(listener.direction, socket, client, poll, now),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error)
                        if matches!(
                            error.kind(),
                            io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                        ) => {}
                    Err(_) => {
                        // No file descriptor or memory is left, and no further event follows (edge-triggered).
                        count(&self.counters.limited);
                        self.accept_at = Some(now + ACCEPT_PAUSE);
                        break;
                    }
                }
            }
        }
    }

    /// Takes a connection that was accepted. The connection is reset if its flow is unknown or a limit is reached.
    fn take(
        &mut self,
        direction: Direction,
        socket: mio::net::TcpStream,
        client: std::net::SocketAddr,
        poll: &Poll,
        now: Millis,
    ) {
        count(&self.counters.accepted);
        let refuse = |socket: &mio::net::TcpStream| {
            let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
        };
        let place = self.shared.places.iter().find(|(other, _)| *other == direction);
        let found = place.and_then(|(_, place)| {
            let server = place.server(&socket, client)?;
            let flow = self.shared.flows.find(direction, client, server)?;
            Some((place, server, flow))
        });
        let Some((place, server, flow)) = found else {
            count(&self.counters.unknown);
            refuse(&socket);
            return;
        };
        // The policy can have changed since the thread last took new settings.
        if !self.settings.rules.knows(flow.request.ruleset) {
            self.settings = self.shared.settings();
        }
        let endpoint = flow.request.endpoint;
        let context = StreamContext {
            request: flow.request,
            direction,
            client,
            server,
            ifindex: flow.ifindex,
        };
        if let Err(detail) = self.make_room(endpoint) {
            self.report_limit(&context, detail);
            refuse(&socket);
            return;
        }
        let _ = set_options(SockRef::from(&socket), direction, Side::Client);
        self.next_id += 1;
        let id = self.next_id;
        if !self.settings.rules.knows(flow.request.ruleset) {
            let (reason, detail) = (Reason::UnknownRuleset, Reason::UnknownRuleset.text());
            let record = context.record(Verdict::Dropped, reason, What::Unreadable { detail });
            self.shared.reports.record(&record);
            count(&self.counters.unknown);
            refuse(&socket);
            return;
        }
        let entry = self.connections.vacant_entry();
        let key = entry.key();
        let connection = Connection::new(
            id,
            key,
            place.clone(),
            context,
            socket,
            poll.registry(),
            &self.settings,
            now,
        );
        let Some(connection) = connection else {
            count(&self.counters.unknown);
            return;
        };
        entry.insert(connection);
        *self.of_endpoint.entry(endpoint).or_default() += 1;
        count(&self.counters.open);
        // A connection whose client uses no TLS can begin before bytes of the client arrive.
        self.work(key, id, poll, now, Connection::drive);
    }

    /// Counts and records a connection that a limit ends.
    fn report_limit(&mut self, context: &StreamContext, detail: &'static str) {
        count(&self.counters.limited);
        if let Some(left) = self.limit_records.checked_sub(1) {
            self.limit_records = left;
            let what = What::Unreadable { detail };
            let record = context.record(Verdict::Dropped, Reason::InspectLimit, what);
            self.shared.reports.record(&record);
        }
    }

    /// Makes room for one more connection of an endpoint. If the table is full, the endpoint with the most connections
    /// loses the one that has been idle for the longest time, unless the new connection is of that endpoint.
    ///
    /// # Errors
    /// The limit that the new connection would exceed, in words.
    fn make_room(&mut self, endpoint: u16) -> Result<(), &'static str> {
        let options = &self.shared.options;
        let own = self.of_endpoint.get(&endpoint).copied().unwrap_or(0);
        if own >= options.endpoint_connections {
            return Err(SHARE_FULL);
        }
        if self.connections.len() < options.connections {
            return Ok(());
        }
        let largest = self.of_endpoint.iter().max_by_key(|(_, number)| **number);
        let (&largest, &number) = largest.ok_or(TABLE_FULL)?;
        if largest == endpoint || number <= own + 1 {
            return Err(TABLE_FULL);
        }
        let (key, oldest) = self
            .connections
            .iter()
            .filter(|(_, one)| one.endpoint == largest)
            .min_by_key(|(_, one)| one.idle_since())
            .ok_or(TABLE_FULL)?;
        oldest.reset();
        let context = *oldest.context();
        self.report_limit(&context, EVICTED);
        self.remove(key);
        Ok(())
    }
}

impl Drop for Thread<'_> {
    /// Resets all connections. Closing them would look like a clean end to peers without TLS.
    fn drop(&mut self) {
        for (_, connection) in &self.connections {
            connection.reset();
        }
        self.counters
            .open
            .fetch_sub(self.connections.len() as u64, Ordering::Relaxed);
    }
}
