//! Memory, counted at the allocator: of a learned address, a flow with held packets, and an idle flow.

use std::{net::Ipv4Addr, sync::Arc};

use anyhow::{Result, ensure};
use palisade_abi::Inspector;
use palisade_fqdn::{Cache, Config, SelectorId, Selectors};
use palisade_inspect::Limits;
use palisade_model::rule::FqdnPattern;
use palisade_protocols::dns::{Address, Answer, Question, Source, rtype};

use crate::{
    Effort,
    memory::count,
    parsers, progress,
    report::{Goal, Measure, Table, number},
    wire::{self, End, Outcome},
};

/// Number of learned addresses.
const ADDRESSES: u32 = 100_000;

fn address(n: u32) -> Answer {
    Answer {
        question: Some(Question {
            name: format!("h{n}.bench.example").parse().expect("a name"),
            rtype: rtype::A,
            class: 1,
        }),
        addresses: vec![Address {
            ip: Ipv4Addr::from(0x6440_0000 + n).into(),
            ttl: 60,
            source: Source::Record,
        }],
        ttl: Some(60),
        ..Answer::default()
    }
}

/// Returns bytes of the cache per address, each with a name of its own.
fn learned() -> Result<f64> {
    let pattern = FqdnPattern::Pattern("*.bench.example".into());
    let selectors = Selectors::new([(SelectorId(1), &pattern)]).expect("the pattern is right");
    let mut cache = Cache::new(Config {
        addresses_per_endpoint: ADDRESSES as usize,
        ..Config::default()
    });
    let update = cache.set_selectors(1, Arc::new(selectors));
    cache.written(update);
    let (refused, bytes, _) = count(|| {
        let answers = (0..ADDRESSES).map(address);
        answers
            .filter(|answer| {
                let pending = cache.learn(1, answer, 0);
                cache.commit(pending).is_err()
            })
            .count()
    });
    ensure!(refused == 0, "{refused} answers were not learned");
    Ok(bytes / f64::from(ADDRESSES))
}

fn client(n: u32) -> End {
    let port = 1_024 + (n % 60_000) as u16;
    let [.., a, b] = (n / 60_000).to_be_bytes();
    (Ipv4Addr::new(10, 9, a, b), port)
}

/// The packets of a flow that the engine receives: a part of those with which a connection begins.
struct Kind {
    name: &'static str,
    inspector: Inspector,
    connection: fn(End) -> Vec<(bool, Vec<u8>)>,
    /// Number of its packets that arrive.
    packets: usize,
    /// Number of them that are held.
    held: u64,
}

const KINDS: [Kind; 5] = [
    Kind {
        name: "TLS, open, nothing sent yet",
        inspector: Inspector::Tls,
        connection: parsers::tls_connection,
        packets: 3,
        held: 0,
    },
    Kind {
        name: "TLS, the first half of a hello held",
        inspector: Inspector::Tls,
        connection: parsers::tls_connection,
        packets: 4,
        held: 1,
    },
    Kind {
        name: "TLS, after its hello is allowed",
        inspector: Inspector::Tls,
        connection: parsers::tls_connection,
        packets: 6,
        held: 0,
    },
    Kind {
        name: "HTTP, open, nothing sent yet",
        inspector: Inspector::Http,
        connection: parsers::http_connection,
        packets: 3,
        held: 0,
    },
    Kind {
        name: "HTTP, kept alive between two requests",
        inspector: Inspector::Http,
        connection: parsers::http_connection,
        packets: parsers::KEPT_ALIVE,
        held: 0,
    },
];

/// Returns bytes of the engine per flow.
fn flows(kind: &Kind, flows: u32) -> Result<f64> {
    let mut limits = Limits::default();
    // More connections than a worker's limits allow.
    for tcp in [&mut limits.tls.tcp, &mut limits.http.tcp] {
        tcp.frames = flows as usize;
        tcp.bytes = usize::MAX / 2;
    }
    let mut engine = parsers::engine(&limits);
    let mut outcome = Outcome::default();
    let (made, bytes, _) = count(|| {
        let mut made = 0;
        for n in 0..flows {
            // Frees what the bench itself allocates for a flow.
            for (reply, frame) in &(kind.connection)(client(n))[..kind.packets] {
                let slot = parsers::slot(kind.inspector, *reply);
                wire::read(&mut engine, &mut outcome, 1_000, &slot, frame);
                made += 1;
            }
        }
        made
    });
    ensure!(
        outcome.discarded == 0 && made - outcome.released == kind.held * u64::from(flows),
        "{}: of {made} packets {} went on and {} were dropped",
        kind.name,
        outcome.released,
        outcome.discarded
    );
    let http = engine.stats().http;
    let answered = u64::from(flows) * u64::from(kind.inspector == Inspector::Http && kind.packets > 3);
    ensure!(
        http.responses == answered,
        "{}: {} requests were answered",
        kind.name,
        http.responses
    );
    Ok(bytes / f64::from(flows))
}

/// Runs the measure.
pub fn measure(effort: Effort) -> Result<Measure> {
    const FLOWS: u32 = 100_000;
    progress(format_args!("footprint: {ADDRESSES} addresses, {FLOWS} flows"));
    let sizes: &[u32] = effort.pick(&[1_000, FLOWS], &[1_000, 10_000, FLOWS]);
    let mut goals = vec![Goal::reported(
        "memory for a learned address with a name of its own, of 100,000",
        format!("{} bytes", number(learned()?)),
    )];
    let columns: Vec<_> = std::iter::once("flow".to_owned())
        .chain(
            sizes
                .iter()
                .map(|size| format!("of {}", number(f64::from(*size)))),
        )
        .collect();
    let columns: Vec<_> = columns.iter().map(String::as_str).collect();
    let mut table = Table::new("Bytes for a flow in a worker's engine", &columns);
    for kind in &KINDS {
        let bytes = sizes
            .iter()
            .map(|size| flows(kind, *size))
            .collect::<Result<Vec<_>>>()?;
        goals.push(Goal::reported(
            format!("memory for a flow, of 100,000: {}", kind.name),
            format!("{} bytes", number(bytes.last().copied().unwrap_or(f64::NAN))),
        ));
        table.row(kind.name, &bytes);
    }
    Ok(Measure {
        name: "footprint",
        title: "Memory of names and flows",
        method: "What the cache of names and a worker's engine take from the allocator. A flow that is held has a packet in a frame of the socket besides, which is there anyway: how many can be held is bounded by the number of frames. What has been seen is kept until it is acknowledged, and counts here.".into(),
        goals,
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}
