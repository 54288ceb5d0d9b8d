//! Debug log of the inspection of single connections, step by step, for `palisade log set inspect=debug`.
//!
//! The inspectors run on the worker and proxy threads, which must not wait. So they put [`Step`]s into the bounded queue
//! of a [`Watch`], and a thread of the caller writes them. While no watch is set, a step costs one relaxed atomic load:
//! its text is a closure, which then does not run. With a watch, the number of steps between two calls of
//! [`Watch::refill`] is bounded, so that a peer cannot make the threads format texts without end.
//!
//! Steps contain what flow records contain, redacted in the same way, and the texts of policies. They contain no other
//! bytes of peers.

use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use palisade_abi::Direction;

use crate::record::{About, Record, Verdict, What};

/// No steps are taken.
const OFF: u8 = 0;
/// Steps of [`Detail::Debug`] are taken.
const DEBUG: u8 = 1;
/// All steps are taken.
const TRACE: u8 = 2;

/// [`OFF`], [`DEBUG`] or [`TRACE`]. Read before any step; a thread that has an older value takes or omits a few steps.
static TAKEN: AtomicU8 = AtomicU8::new(OFF);
/// The watch in force; `None` while [`TAKEN`] is [`OFF`].
static WATCH: RwLock<Option<Arc<Watch>>> = RwLock::new(None);

/// How much of an inspection a watch takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Detail {
    /// What was read, compared and decided.
    Debug,
    /// Also each call of an inspector that decides nothing.
    Trace,
}

/// A step of the inspection of a connection or datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Number of the endpoint whose policy requires the inspection.
    pub endpoint: u16,
    /// Direction of the connection, as the endpoint sees it.
    pub direction: Direction,
    /// Address and port of the client.
    pub client: SocketAddr,
    /// Address and port of the server.
    pub server: SocketAddr,
    /// Number of the rule that the text is about; `None` if it is about no rule.
    pub rule: Option<u32>,
    /// What happened.
    pub text: String,
}

/// Which connections are watched, and where their steps go.
#[derive(Debug)]
pub struct Watch {
    detail: Detail,
    endpoint: Option<u16>,
    address: Option<IpAddr>,
    queue: SyncSender<Step>,
    /// Number of steps that may still be taken until [`Watch::refill`].
    budget: AtomicU32,
    suppressed: AtomicU64,
}

impl Watch {
    /// Returns a watch, and the queue of its steps with at most `capacity` steps. `endpoint`, `address`: only connections
    /// of this endpoint and with this address as client or server. No step is taken before the first call of
    /// [`Watch::refill`].
    #[must_use]
    pub fn new(
        detail: Detail,
        endpoint: Option<u16>,
        address: Option<IpAddr>,
        capacity: usize,
    ) -> (Arc<Self>, Receiver<Step>) {
        let (queue, steps) = sync_channel(capacity);
        let watch = Self {
            detail,
            endpoint,
            address: address.map(|address| address.to_canonical()),
            queue,
            budget: AtomicU32::new(0),
            suppressed: AtomicU64::new(0),
        };
        (Arc::new(watch), steps)
    }

    /// Allows `steps` more steps, instead of those that are left.
    pub fn refill(&self, steps: u32) {
        self.budget.store(steps, Ordering::Relaxed);
    }

    /// Returns how many steps were not taken, because too many came or the queue was full.
    #[must_use]
    pub fn suppressed(&self) -> u64 {
        self.suppressed.load(Ordering::Relaxed)
    }

    fn wants(&self, endpoint: u16, client: SocketAddr, server: SocketAddr) -> bool {
        self.endpoint.is_none_or(|wanted| wanted == endpoint)
            && self.address.is_none_or(|wanted| {
                [client, server]
                    .map(|at| at.ip().to_canonical())
                    .contains(&wanted)
            })
    }

    fn take(&self, about: &Subject, rule: Option<u32>, text: impl FnOnce() -> String) {
        if !self.wants(about.endpoint, about.client, about.server) {
            return;
        }
        let spent = self
            .budget
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        let step = |text| Step {
            endpoint: about.endpoint,
            direction: about.direction,
            client: about.client,
            server: about.server,
            rule,
            text,
        };
        if spent.is_err() || self.queue.try_send(step(text())).is_err() {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Puts a watch in force, or none.
pub fn set(watch: Option<Arc<Watch>>) {
    let taken = match watch.as_ref().map(|watch| watch.detail) {
        None => OFF,
        Some(Detail::Debug) => DEBUG,
        Some(Detail::Trace) => TRACE,
    };
    *WATCH.write().unwrap_or_else(PoisonError::into_inner) = watch;
    TAKEN.store(taken, Ordering::Relaxed);
}

/// Returns whether a watch is in force that takes steps of this detail.
#[must_use]
#[inline]
pub fn is_on(detail: Detail) -> bool {
    TAKEN.load(Ordering::Relaxed)
        >= match detail {
            Detail::Debug => DEBUG,
            Detail::Trace => TRACE,
        }
}

/// The connection of a step.
struct Subject {
    endpoint: u16,
    direction: Direction,
    client: SocketAddr,
    server: SocketAddr,
}

/// Takes a step of the connection of a packet of the client. `rule`: number of the rule that the text is about.
#[inline]
pub(crate) fn of(about: &About, detail: Detail, rule: Option<u32>, text: impl FnOnce() -> String) {
    if is_on(detail) {
        take(&about.subject(), rule, text);
    }
}

/// Takes a step for a record: a message that was read, and its verdict.
#[inline]
pub fn record(record: &Record) {
    if is_on(Detail::Debug) {
        let socket = |(address, port): (palisade_abi::Addr, u16)| SocketAddr::new(address.into(), port);
        let (source, destination) = (socket(record.source), socket(record.destination));
        let (client, server) = if record.reply {
            (destination, source)
        } else {
            (source, destination)
        };
        let about = Subject {
            endpoint: record.endpoint,
            direction: direction(record.ingress != record.reply),
            client,
            server,
        };
        take(&about, Some(record.rule), || record_text(record));
    }
}

const fn direction(ingress: bool) -> Direction {
    if ingress {
        Direction::Ingress
    } else {
        Direction::Egress
    }
}

impl About {
    fn subject(&self) -> Subject {
        let (client, server) = self.client_and_server();
        Subject {
            endpoint: self.endpoint(),
            direction: direction(self.is_flow_ingress()),
            client,
            server,
        }
    }
}

/// Takes a step. Not inlined: the code of an inspector has only the check before it.
#[cold]
fn take(about: &Subject, rule: Option<u32>, text: impl FnOnce() -> String) {
    let watch = WATCH.read().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(watch) = watch {
        watch.take(about, rule, text);
    }
}

fn record_text(record: &Record) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut said = match &record.what {
        What::DnsQuery { name, kind } => format!("DNS query for {}, type {kind}", text(name.bytes())),
        What::DnsAnswer {
            name,
            kind,
            rcode,
            count,
            ..
        } => format!(
            "DNS answer for {}, type {kind}: code {rcode}, {count} addresses",
            text(name.bytes())
        ),
        What::TlsHello { name, ech, .. } if name.bytes().is_empty() => {
            format!("ClientHello without a server name{}", ech_text(*ech))
        }
        What::TlsHello { name, ech, .. } => {
            format!(
                "ClientHello for server name {}{}",
                text(name.bytes()),
                ech_text(*ech)
            )
        }
        What::HttpRequest { method, url, .. } => {
            format!("HTTP request {} {}", text(method.bytes()), text(url.bytes()))
        }
        What::HttpResponse { status, url, .. } => format!("HTTP response {status} of {}", text(url.bytes())),
        What::Kafka {
            key,
            version,
            error,
            topic,
            ..
        } => {
            let what = if record.reply { "response" } else { "request" };
            format!(
                "Kafka {what}, API key {key}, version {version}, topic {:?}, error {error}",
                text(topic.bytes())
            )
        }
        What::Intercept { name, error } => format!(
            "the interception for server name {:?} failed: {}",
            text(name.bytes()),
            text(error.bytes())
        ),
        What::Unreadable { detail } => format!("cannot be inspected: {detail}"),
    };
    let verdict = match record.verdict {
        Verdict::Forwarded => "forwarded",
        Verdict::Dropped => "denied",
        Verdict::Audit => "forwarded by audit mode, otherwise denied",
    };
    let _ = write!(said, ": {verdict}");
    if record.verdict != Verdict::Forwarded {
        let _ = write!(said, " ({})", record.reason.text());
    }
    said
}

const fn ech_text(ech: bool) -> &'static str {
    if ech { ", with an encrypted hello" } else { "" }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use palisade_abi::Reason;

    use super::*;
    use crate::record::{Text, Word};

    fn request(endpoint: u16, client: &str) -> Record {
        let address: IpAddr = client.parse().unwrap();
        let server: IpAddr = "10.0.0.2".parse().unwrap();
        Record {
            endpoint,
            ingress: true,
            reply: false,
            source: (address.into(), 4711),
            destination: (server.into(), 80),
            protocol: 6,
            remote_identity: 1,
            ifindex: 1,
            verdict: Verdict::Dropped,
            reason: Reason::AppDenied,
            rule: 7,
            latency: None,
            what: What::HttpRequest {
                method: Word::from(&b"POST"[..]),
                version: 1,
                url: Text::from(&b"http://back/x"[..]),
                headers: Text::default(),
                mismatch: false,
            },
        }
    }

    // One test, because the watch is one for the process.
    #[test]
    fn only_watched_connections_have_steps_and_their_number_is_bounded() {
        let made = Cell::new(0);
        let subject = Subject {
            endpoint: 1,
            direction: Direction::Ingress,
            client: "10.0.0.1:4711".parse().unwrap(),
            server: "10.0.0.2:80".parse().unwrap(),
        };
        let text = || {
            made.set(made.get() + 1);
            String::new()
        };
        // Without a watch no text is made.
        assert!(!is_on(Detail::Debug));
        take(&subject, None, text);
        assert_eq!(made.get(), 0);

        let (watch, steps) = Watch::new(Detail::Debug, Some(1), Some("10.0.0.1".parse().unwrap()), 2);
        watch.refill(3);
        set(Some(Arc::clone(&watch)));
        assert!(is_on(Detail::Debug) && !is_on(Detail::Trace));
        record(&request(2, "10.0.0.1")); // another endpoint
        record(&request(1, "10.0.0.9")); // another address
        record(&request(1, "10.0.0.1"));
        let step = steps.try_recv().unwrap();
        assert_eq!(
            (step.endpoint, step.direction, step.client, step.rule),
            (1, Direction::Ingress, subject.client, Some(7))
        );
        assert_eq!(
            step.text,
            format!(
                "HTTP request POST http://back/x: denied ({})",
                Reason::AppDenied.text()
            )
        );
        assert!(steps.try_recv().is_err());
        // A reply is a step of the same connection.
        let reply = Record {
            ingress: false,
            reply: true,
            source: request(1, "10.0.0.1").destination,
            destination: request(1, "10.0.0.1").source,
            ..request(1, "10.0.0.1")
        };
        record(&reply);
        let step = steps.try_recv().unwrap();
        assert_eq!(
            (step.direction, step.client),
            (Direction::Ingress, subject.client)
        );
        // The budget has one step left.
        record(&reply);
        record(&reply);
        assert_eq!(watch.suppressed(), 1);
        watch.refill(10);
        record(&reply);
        record(&reply);
        assert_eq!(watch.suppressed(), 2, "the queue is full");
        set(None);
        record(&reply);
        assert_eq!(steps.try_iter().count(), 2);
        assert!(!is_on(Detail::Debug));
    }
}
