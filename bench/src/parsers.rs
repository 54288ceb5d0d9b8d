//! Cost of parsing: each parser against alternatives, and a whole exchange in the engine. Times side by side, and
//! instruction counts, which other load does not change.

use std::{hint::black_box, net::Ipv4Addr, process::Command, sync::Arc, time::Instant};

use anyhow::{Context, Result};
use hickory_proto::op::Message;
use palisade_abi::{Inspector, PuntRequest, punt_flags};
use palisade_inspect::{Engine, Limits, Rules, Stats};
use palisade_model::{
    rule::{FqdnPattern, HttpRule},
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_protocols::{dns, http1, tls};
use palisade_testbed::dns as messages;

use crate::{
    Effort, progress,
    report::{Goal, Measure, Samples, Table, number},
    wire::{self, End, Outcome, flags},
};

/// An operation that is repeated.
pub struct Work {
    /// Name of the input.
    pub what: &'static str,
    /// Name of the parser.
    pub who: &'static str,
    /// Length of the input, bytes.
    pub bytes: usize,
    /// Parses the input once.
    pub run: Box<dyn FnMut()>,
}

impl Work {
    /// Returns its name on the command line.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.what, self.who)
    }
}

const QUERY: &[u8] = include_bytes!("../../tests/fuzz/corpus/dns/query-edns");
const ADDRESS: &[u8] = include_bytes!("../../tests/fuzz/corpus/dns/answer-a");
const ALIAS: &[u8] = include_bytes!("../../tests/fuzz/corpus/dns/answer-cname");
/// Name of Palisade's parsers in tables.
const OURS: &str = "Palisade";

fn hickory(what: &'static str, message: &'static [u8]) -> Work {
    Work {
        what,
        who: "hickory-proto",
        bytes: message.len(),
        run: Box::new(move || {
            let message = Message::from_vec(black_box(message));
            black_box(message.map(|message| message.metadata.id).is_ok());
        }),
    }
}

fn answer(what: &'static str, message: &'static [u8]) -> Work {
    let mut answer = dns::Answer::default();
    Work {
        what,
        who: OURS,
        bytes: message.len(),
        run: Box::new(move || {
            black_box(answer.read(black_box(message), &dns::Limits::ANSWER).is_ok());
        }),
    }
}

fn copying(what: &'static str, bytes: Vec<u8>) -> Work {
    let mut into = vec![0; bytes.len()];
    Work {
        what,
        who: "memcpy",
        bytes: bytes.len(),
        run: Box::new(move || {
            into.copy_from_slice(black_box(&bytes));
            black_box(&mut into);
        }),
    }
}

const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 10);
const SERVER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);

/// Returns the rules of all exchanges, by the number of an inspector.
#[must_use]
pub fn rules() -> Rules {
    let pattern = || FqdnPattern::Pattern("*.bench.example".into());
    let set = |inspector: Inspector, matcher| {
        let set = RuleSet {
            reads: inspector as u8,
            alternatives: vec![Alternative { rule: 9, matcher }],
            ..RuleSet::default()
        };
        (inspector as u32, Arc::new(set))
    };
    let sets = [
        set(Inspector::Dns, Matcher::Dns(pattern())),
        set(Inspector::Tls, Matcher::ServerName(pattern())),
        set(
            Inspector::Http,
            Matcher::Http(HttpRule {
                method: Some("GET".into()),
                path: Some("/api/v1/items/[0-9]+(\\?.*)?".into()),
                ..HttpRule::default()
            }),
        ),
    ];
    Rules::prepare(&sets.into(), None)
}

/// Returns the punt request for a flow of an endpoint.
#[must_use]
pub fn slot(inspector: Inspector, reply: bool) -> PuntRequest {
    PuntRequest {
        rule: 9,
        ruleset: inspector as u32,
        remote_identity: 2,
        revision: 1,
        serial: 99,
        endpoint: 1,
        inspector: inspector as u8,
        flags: if reply {
            punt_flags::INGRESS | punt_flags::REPLY
        } else {
            0
        },
    }
}

/// Returns an engine with these rules.
#[must_use]
pub fn engine(limits: &Limits) -> Engine<()> {
    let mut engine = Engine::new(limits);
    engine.set_rules(Arc::new(rules()));
    engine
}

/// Returns an operation in which an engine inspects frames. `complete`: returns the number of exchanges that are complete.
fn reads(
    what: &'static str,
    inspector: Inspector,
    exchange: impl Fn(u16) -> Vec<(bool, Vec<u8>)>,
    complete: fn(&Stats) -> u64,
) -> Work {
    // Another port each time, so that each exchange is a flow of its own.
    let exchanges: Vec<_> = (20_000..20_256).map(exchange).collect();
    let bytes = exchanges[0].iter().map(|(_, frame)| frame.len()).sum();
    let (mut engine, mut outcome) = (engine(&Limits::default()), Outcome::default());
    let (mut turn, mut now) = (0, 1_000);
    Work {
        what,
        who: "engine",
        bytes,
        run: Box::new(move || {
            for (reply, frame) in &exchanges[turn % exchanges.len()] {
                wire::read(&mut engine, &mut outcome, now, &slot(inspector, *reply), frame);
            }
            turn += 1;
            if turn % exchanges.len() == 0 {
                // By then the engine has dropped all flows.
                now += 100_000;
                engine.tick(now, &mut outcome);
                assert_eq!(
                    complete(&engine.stats()),
                    turn as u64,
                    "each exchange is inspected"
                );
            }
            assert_eq!(outcome.discarded, 0, "everything is allowed");
        }),
    }
}

/// Returns a query from a port and its answer.
#[must_use]
pub fn dns_exchange(port: u16) -> Vec<(bool, Vec<u8>)> {
    let (client, server): (End, End) = ((CLIENT, port), (SERVER, 53));
    let query = messages::query(port, &[("www.bench.example", messages::rtype::A)]);
    let answer = messages::answer(
        port,
        "www.bench.example",
        messages::rtype::A,
        &["www.bench.example. 60 IN A 100.64.0.1"],
    );
    vec![
        (false, wire::udp(client, server, &query)),
        (true, wire::udp(server, client, &answer.expect("a record"))),
    ]
}

/// Returns a connection from its first packet until it is offloaded.
#[must_use]
pub fn tls_connection(client: End) -> Vec<(bool, Vec<u8>)> {
    let server = (SERVER, 443);
    let hello = wire::client_hello("www.bench.example");
    let (first, second) = hello.split_at(1_448);
    let end = 1 + hello.len() as u32;
    let there = |at, ack, flags, data: &[u8]| (false, wire::tcp(client, server, at, ack, flags, data));
    let back = |at, ack, flags, data: &[u8]| (true, wire::tcp(server, client, at, ack, flags, data));
    vec![
        there(0, 0, flags::SYN, b""),
        back(0, 1, flags::SYN | flags::ACK, b""),
        there(1, 1, flags::ACK, b""),
        there(1, 1, flags::ACK, first),
        there(1 + first.len() as u32, 1, flags::PUSH, second),
        back(1, end, flags::PUSH, &wire::server_hello()),
    ]
}

/// Number of packets of [`http_connection`] after which the connection is idle and persists.
pub const KEPT_ALIVE: usize = 6;

/// Returns a connection with one request and its response, from its first packet to its last.
#[must_use]
pub fn http_connection(client: End) -> Vec<(bool, Vec<u8>)> {
    let server = (SERVER, 80);
    let (request, response) = (wire::request("/api/v1/items/4711?page=2"), wire::response());
    let (asked, answered) = (1 + request.len() as u32, 1 + response.len() as u32);
    let there = |at, ack, flags, data: &[u8]| (false, wire::tcp(client, server, at, ack, flags, data));
    let back = |at, ack, flags, data: &[u8]| (true, wire::tcp(server, client, at, ack, flags, data));
    vec![
        there(0, 0, flags::SYN, b""),
        back(0, 1, flags::SYN | flags::ACK, b""),
        there(1, 1, flags::ACK, b""),
        there(1, 1, flags::PUSH, &request),
        back(1, asked, flags::PUSH, &response),
        there(asked, answered, flags::ACK, b""),
        there(asked, answered, flags::END, b""),
        back(answered, asked + 1, flags::END, b""),
        there(asked + 1, answered + 1, flags::ACK, b""),
    ]
}

/// Returns all operations. Those with the same input are adjacent, Palisade's first.
#[must_use]
pub fn works() -> Vec<Work> {
    let head = wire::request("/api/v1/items/4711?page=2");
    let hello = wire::client_hello("www.bench.example");
    let work = |what, who, bytes: &[u8], run: Box<dyn FnMut()>| Work {
        what,
        who,
        bytes: bytes.len(),
        run,
    };
    vec![
        work(
            "dns query",
            OURS,
            QUERY,
            Box::new(|| {
                black_box(dns::Query::parse(black_box(QUERY), &dns::Limits::QUERY).is_ok());
            }),
        ),
        hickory("dns query", QUERY),
        answer("dns answer", ADDRESS),
        hickory("dns answer", ADDRESS),
        answer("dns answer with aliases", ALIAS),
        hickory("dns answer with aliases", ALIAS),
        work("http request", OURS, &head, {
            let head = head.clone();
            Box::new(move || {
                let stream = black_box(&head[..]);
                let length = http1::Head::default().find(stream, &http1::Limits::default());
                let length = length.ok().flatten().unwrap_or_default();
                black_box(http1::Request::parse(&stream[..length], &mut http1::HeaderBuffer::new()).is_ok());
            })
        }),
        work("http request", "httparse", &head, {
            let head = head.clone();
            Box::new(move || {
                let mut fields = [httparse::EMPTY_HEADER; http1::MAX_HEADERS];
                let mut request = httparse::Request::new(&mut fields);
                black_box(request.parse(black_box(&head)).is_ok());
            })
        }),
        copying("http request", head),
        work("tls hello", OURS, &hello, {
            let hello = hello.clone();
            Box::new(move || {
                let mut stream = black_box(&hello[..]);
                let step = tls::ClientReader::default().next(&mut stream);
                black_box(matches!(step, Ok(tls::ClientStep::Hello(_))));
            })
        }),
        copying("tls hello", hello),
        reads("dns query and answer", Inspector::Dns, dns_exchange, |stats| {
            stats.dns.committed
        }),
        reads(
            "tls handshake of six packets",
            Inspector::Tls,
            |port| tls_connection((CLIENT, port)),
            |stats| stats.tls.tcp.offloaded,
        ),
        reads(
            "http exchange of nine packets",
            Inspector::Http,
            |port| http_connection((CLIENT, port)),
            |stats| stats.http.responses.min(stats.http.requests),
        ),
    ]
}

/// Runs one operation `times` times, to count instructions.
pub fn repeat(name: &str, times: u64) -> Result<()> {
    let mut works = works();
    let work = works.iter_mut().find(|work| work.name() == name);
    let work = work.with_context(|| format!("nothing is called {name}"))?;
    for _ in 0..times {
        (work.run)();
    }
    Ok(())
}

/// Returns the instructions of a whole run of this program, counted by valgrind.
fn instructions(name: &str, times: u64) -> Result<f64> {
    let out = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["--work", name, "--times", &times.to_string()])
        .output()
        .context("valgrind")?;
    let text = String::from_utf8_lossy(&out.stderr);
    let count = text
        .lines()
        .find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok());
    count.with_context(|| format!("valgrind: {text}"))
}

/// Returns the instructions of one repetition: the difference between many and few.
fn instructions_once(name: &str) -> Result<f64> {
    const TIMES: u64 = 1_000;
    // The first repetitions fill tables.
    let (few, many) = (instructions(name, 512)?, instructions(name, 512 + TIMES)?);
    Ok((many - few) / TIMES as f64)
}

/// Returns the time of one repetition, ns.
fn time(work: &mut Work, times: u32) -> f64 {
    let begin = Instant::now();
    for _ in 0..times {
        (work.run)();
    }
    begin.elapsed().as_nanos() as f64 / f64::from(times)
}

/// Runs the measure.
pub fn measure(effort: Effort) -> Result<Measure> {
    let rounds = effort.pick(15, 51);
    let mut works = works();
    progress(format_args!(
        "parsers: {rounds} rounds of {} variants, then their instructions",
        works.len()
    ));
    let mut samples = vec![Samples::new(); works.len()];
    for round in 0..=rounds {
        for (work, samples) in works.iter_mut().zip(&mut samples) {
            let ns = time(work, 5_000);
            if round > 0 {
                samples.push(ns);
            }
        }
    }
    let mut notes = Vec::new();
    let mut counts = vec![f64::NAN; works.len()];
    for (work, count) in works.iter().zip(&mut counts) {
        match instructions_once(&work.name()) {
            Ok(instructions) => *count = instructions,
            Err(problem) => {
                notes.push(format!("Instructions were not counted: {problem:#}."));
                break;
            }
        }
    }
    let mut table = Table::new(
        "Once, in memory",
        &[
            "input and parser",
            "bytes",
            "ns",
            "a second",
            "GB/s",
            "time against Palisade",
            "instructions",
        ],
    );
    let mut goals = Vec::new();
    let ours = |what: &str| {
        works
            .iter()
            .position(|work| work.what == what)
            .unwrap_or_default()
    };
    for (at, work) in works.iter().enumerate() {
        let (ns, first) = (samples[at].median(), ours(work.what));
        table.row(
            format!("{}, {}", work.what, work.who),
            &[
                work.bytes as f64,
                ns,
                1e9 / ns,
                work.bytes as f64 / ns,
                samples[at].against(&samples[first]).median(),
                counts[at],
            ],
        );
        let instructions = if counts[at].is_finite() {
            format!("{} instructions", number(counts[at]))
        } else {
            "instructions not counted".into()
        };
        if at == first {
            let against = works
                .iter()
                .zip(&samples)
                .filter(|(other, _)| other.what == work.what && other.who != work.who);
            let against: String = against
                .map(|(other, of)| {
                    let ratio = number(of.against(&samples[at]).median());
                    format!("; {} takes {ratio} × that time", other.who)
                })
                .collect();
            goals.push(Goal::reported(
                format!("reading one {}", work.what),
                format!(
                    "{} a second, {} GB/s, {instructions}{against}",
                    number(1e9 / ns),
                    number(work.bytes as f64 / ns)
                ),
            ));
        }
    }
    Ok(Measure {
        name: "parsers",
        title: "Reading",
        method: format!(
            "Messages of the fuzzing corpus (DNS), a browser's request head, and a ClientHello with a post-quantum key share, read again and again by this parser and by others, {rounds} rounds of 5,000 times in turn. \"Engine\": packets from decoding to the verdict, each exchange a flow of its own; what is to be learned is learned at once. Instructions are counted by valgrind."
        ),
        goals,
        tables: vec![table],
        plot: None,
        notes,
    })
}
