//! Kafka through policy: produced and fetched bytes and requests, against no firewall and against a policy without Kafka
//! rules.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::socket::{setsockopt, sockopt::TcpCongestion};
use palisade_testbed::{
    Ns, Topology,
    daemon::{Daemon, Settings},
    topology::WorkloadSpec,
};

use crate::{
    Effort, progress,
    report::{Goal, Measure, Samples, Table, number},
};

const PORT: u16 = 9_092;
/// Allowed topics.
const TOPICS: [&str; 2] = ["orders", "bills"];
/// API keys.
const PRODUCE: i16 = 0;
const FETCH: i16 = 1;
/// Error code of a denied topic.
const DENIED: i16 = 29;
/// Longest wait for bytes of the other side.
const WAIT: Duration = Duration::from_secs(10);

/// The broker's policy as far as the programs alone enforce it.
const PORT_POLICY: &str = "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: broker}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEntities: [world, host]
    toPorts:
    - ports: [{port: \"9092\", protocol: TCP}]
";
/// What the broker's policy has besides [`PORT_POLICY`].
const KAFKA_RULES: &str = "      rules:
        kafka:
        - {role: produce, topic: orders}
        - {role: consume, topic: orders}
        - {role: produce, topic: bills}
";

/// Requests of one kind.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    key: i16,
    /// Records of a request or a response, bytes.
    bytes: usize,
    /// Topics among which the records are divided.
    topics: usize,
    connections: usize,
    /// Requests of a connection without a response.
    in_flight: usize,
    /// Congestion control of the client; `None`: that of the machine. BBR paces its segments and hardly reacts to a
    /// loss, so it shows less of what an inspected connection loses than Linux's default does.
    congestion: Option<&'static str>,
    /// Whether the goal is a part of the throughput without a firewall.
    is_goal: bool,
}

const LOADS: [Load; 7] = [
    Load {
        name: "produce, 1 MiB to a topic",
        key: PRODUCE,
        bytes: 1 << 20,
        topics: 1,
        connections: 1,
        in_flight: 5,
        congestion: None,
        is_goal: true,
    },
    Load {
        name: "produce, 1 MiB to a topic, cubic",
        key: PRODUCE,
        bytes: 1 << 20,
        topics: 1,
        connections: 1,
        in_flight: 5,
        congestion: Some("cubic"),
        is_goal: false,
    },
    Load {
        name: "produce, 1 MiB to two topics",
        key: PRODUCE,
        bytes: 1 << 20,
        topics: 2,
        connections: 1,
        in_flight: 5,
        congestion: None,
        is_goal: false,
    },
    Load {
        name: "produce, 16 KiB to a topic",
        key: PRODUCE,
        bytes: 16 << 10,
        topics: 1,
        connections: 1,
        in_flight: 5,
        congestion: None,
        is_goal: false,
    },
    Load {
        name: "fetch, 1 MiB",
        key: FETCH,
        bytes: 1 << 20,
        topics: 1,
        connections: 1,
        in_flight: 1,
        congestion: None,
        is_goal: true,
    },
    Load {
        name: "produce, 100 bytes, 16 connections",
        key: PRODUCE,
        bytes: 100,
        topics: 1,
        connections: 16,
        in_flight: 1,
        congestion: None,
        is_goal: false,
    },
    Load {
        name: "fetch, 100 bytes, 16 connections",
        key: FETCH,
        bytes: 100,
        topics: 1,
        connections: 16,
        in_flight: 1,
        congestion: None,
        is_goal: false,
    },
];

/// Writes a message.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn i16(mut self, n: i16) -> Self {
        self.0.extend(n.to_be_bytes());
        self
    }

    fn i32(mut self, n: i32) -> Self {
        self.0.extend(n.to_be_bytes());
        self
    }

    fn fill(mut self, n: usize, byte: u8) -> Self {
        self.0.resize(self.0.len() + n, byte);
        self
    }

    fn text(mut self, text: &str) -> Self {
        self = self.i16(text.len() as i16);
        self.0.extend(text.as_bytes());
        self
    }

    /// Returns the message with its size in front.
    fn framed(self) -> Vec<u8> {
        let mut framed = (self.0.len() as i32).to_be_bytes().to_vec();
        framed.extend(self.0);
        framed
    }
}

/// Returns a request: Produce of version 7, or Fetch of version 11 without a session.
fn request(key: i16, bytes: usize, topics: &[&str]) -> Vec<u8> {
    let version = if key == PRODUCE { 7 } else { 11 };
    let head = Message::default().i16(key).i16(version).i32(0).text("bench");
    let head = if key == PRODUCE {
        // No transaction, acks 1, timeout.
        head.i16(-1).i16(1).i32(1_000)
    } else {
        // No replica, no wait, the length of the response, isolation, no session.
        head.i32(-1)
            .i32(0)
            .i32(0)
            .i32(bytes as i32)
            .fill(1, 0)
            .i32(0)
            .i32(-1)
    };
    let head = head.i32(topics.len() as i32);
    let body = topics.iter().fold(head, |body, topic| {
        let partition = body.text(topic).i32(1).i32(0);
        if key == PRODUCE {
            let records = bytes / topics.len();
            partition.i32(records as i32).fill(records, b'r')
        } else {
            // Epoch, offset, start of the log.
            partition.i32(-1).fill(16, 0).i32(bytes as i32)
        }
    });
    if key == PRODUCE {
        body.framed()
    } else {
        body.i32(0).text("").framed()
    }
}

/// Returns the response to a request of `request`.
fn response(key: i16, correlation: i32, bytes: usize) -> Vec<u8> {
    let head = Message::default().i32(correlation);
    if key == PRODUCE {
        // Partition, error, offset, time, start of the log; throttle time.
        let body = head.i32(1).text(TOPICS[0]).i32(1).i32(0).i16(0).fill(24, 0);
        return body.i32(0).framed();
    }
    // Throttle time, error, session.
    let topic = head.i32(0).i16(0).i32(0).i32(1).text(TOPICS[0]);
    // Partition, error, offsets, no aborted transactions, no replica.
    let partition = topic.i32(1).i32(0).i16(0).fill(24, 0).i32(-1).i32(-1);
    partition.i32(bytes as i32).fill(bytes, b'r').framed()
}

/// Reads a message into `buffer`, without its size. Returns false at the end of the stream.
fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Result<bool> {
    let mut size = [0; 4];
    match stream.read_exact(&mut size) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(false),
        read => read?,
    }
    buffer.resize(i32::from_be_bytes(size).try_into()?, 0);
    stream.read_exact(buffer)?;
    Ok(true)
}

fn number_at<const N: usize>(message: &[u8], at: usize) -> Result<[u8; N]> {
    let found = message.get(at..).and_then(|rest| rest.first_chunk());
    found.copied().context("a short message")
}

/// Responds to the requests of one connection.
fn serve(mut stream: TcpStream) -> Result<()> {
    // Position of the length of the response in a Fetch request: behind header, replica, wait and least length.
    const LENGTH: usize = 8 + 2 + 5 + 12;
    stream.set_nodelay(true)?;
    let (mut message, mut answer, mut answered) = (Vec::new(), Vec::new(), None);
    while read(&mut stream, &mut message)? {
        let key = i16::from_be_bytes(number_at(&message, 0)?);
        let bytes = match key {
            FETCH => i32::from_be_bytes(number_at(&message, LENGTH)?).try_into()?,
            _ => 0,
        };
        if answered != Some((key, bytes)) {
            answer = response(key, 0, bytes);
            answered = Some((key, bytes));
        }
        answer[4..8].copy_from_slice(&number_at::<4>(&message, 4)?);
        stream.write_all(&answer)?;
    }
    Ok(())
}

/// A broker that keeps nothing.
struct Broker {
    stop: Arc<AtomicBool>,
    at: SocketAddr,
    ns: Ns,
    thread: Option<JoinHandle<()>>,
}

impl Broker {
    fn start(ns: &Ns, address: Ipv4Addr) -> Result<Self> {
        let at = SocketAddr::new(address.into(), PORT);
        let listener = ns.enter(|| TcpListener::bind(at))?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                while let Ok((stream, _)) = listener.accept() {
                    if stop.load(Relaxed) {
                        break;
                    }
                    // A connection that breaks is an error of the client.
                    thread::spawn(|| serve(stream));
                }
            }
        });
        Ok(Self {
            stop,
            at,
            ns: ns.clone(),
            thread: Some(thread),
        })
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let at = self.at;
        // Wakes the accepting thread.
        let woken = self
            .ns
            .enter(|| TcpStream::connect_timeout(&at, Duration::from_secs(1)).is_ok());
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

/// Sends requests until a time. Returns the number of responses.
fn drive(mut stream: TcpStream, load: Load, until: Instant) -> Result<u64> {
    let mut request = request(load.key, load.bytes, &TOPICS[..load.topics]);
    let (mut sent, mut received, mut message) = (0_u64, 0_u64, Vec::new());
    while Instant::now() < until {
        while sent < received + load.in_flight as u64 {
            request[8..12].copy_from_slice(&(sent as i32).to_be_bytes());
            stream.write_all(&request)?;
            sent += 1;
        }
        ensure!(read(&mut stream, &mut message)?, "the connection has ended");
        let correlation = i32::from_be_bytes(number_at(&message, 0)?);
        ensure!(correlation == received as i32, "a response out of order");
        let expected = if load.key == FETCH { load.bytes } else { 0 };
        ensure!(message.len() >= expected, "a response without its records");
        received += 1;
    }
    Ok(received)
}

/// What guards the broker.
#[derive(Clone, Copy, PartialEq)]
enum Guard {
    None,
    /// Palisade, with a policy for the port only: nothing is inspected.
    Port,
    /// Palisade, with rules for topics.
    Kafka,
}

/// A client behind the NIC, a broker in a workload, and perhaps Palisade on the interface of the workload.
struct Path {
    guard: Guard,
    topology: Topology,
    broker: Broker,
    daemon: Option<Daemon>,
}

impl Path {
    fn new(guard: Guard) -> Result<Self> {
        let topology = Topology::new()?.workload(WorkloadSpec::new("server").label("app", "server"))?;
        topology.meet()?;
        let workload = topology.get("server");
        let broker = Broker::start(&workload.ns, workload.v4)?;
        let unguarded_nic = Settings {
            nic: false,
            ..Settings::default()
        };
        let rules = match guard {
            Guard::None => None,
            Guard::Port => Some(""),
            Guard::Kafka => Some(KAFKA_RULES),
        };
        let daemon = rules
            .map(|rules| {
                let policy = format!("{PORT_POLICY}{rules}");
                Daemon::start(&topology, &unguarded_nic, &[("broker.yaml", &policy)])
            })
            .transpose()?;
        let path = Self {
            guard,
            topology,
            broker,
            daemon,
        };
        path.check().with_context(|| path.report())?;
        Ok(path)
    }

    fn report(&self) -> String {
        self.daemon.as_ref().map_or_else(String::new, Daemon::report)
    }

    fn connect(&self, congestion: Option<&str>) -> Result<TcpStream> {
        let at = self.broker.at;
        let stream = self
            .topology
            .internet
            .enter(|| TcpStream::connect_timeout(&at, WAIT))?;
        stream.set_nodelay(true)?;
        if let Some(congestion) = congestion {
            setsockopt(&stream, TcpCongestion, &congestion.into())?;
        }
        stream.set_read_timeout(Some(WAIT))?;
        stream.set_write_timeout(Some(WAIT))?;
        Ok(stream)
    }

    /// Fails unless a request for another topic is denied by the firewall, and by nothing else.
    fn check(&self) -> Result<()> {
        let mut stream = self.connect(None)?;
        stream.write_all(&request(PRODUCE, 100, &["other"]))?;
        let mut message = Vec::new();
        ensure!(read(&mut stream, &mut message)?, "no response");
        // Correlation id, number of topics, name, number of partitions, partition.
        let at = message.len() - (2 + 24 + 4);
        let error = i16::from_be_bytes(number_at(&message, at)?);
        let expected = if self.guard == Guard::Kafka { DENIED } else { 0 };
        ensure!(error == expected, "a denied topic has error {error}");
        Ok(())
    }

    /// Returns requests per second.
    fn rate(&self, load: Load, seconds: u64) -> Result<f64> {
        let streams: Vec<_> = (0..load.connections)
            .map(|_| self.connect(load.congestion))
            .collect::<Result<_>>()?;
        let begin = Instant::now();
        let until = begin + Duration::from_secs(seconds);
        let threads: Vec<_> = streams
            .into_iter()
            .map(|stream| thread::spawn(move || drive(stream, load, until)))
            .collect();
        let mut sum = 0;
        for thread in threads {
            let count = thread.join().map_err(|_| anyhow!("a client has panicked"))?;
            sum += count.with_context(|| format!("{}: {}", load.name, self.report()))?;
        }
        Ok(sum as f64 / begin.elapsed().as_secs_f64())
    }
}

/// Runs the measure.
pub fn measure(effort: Effort) -> Result<Measure> {
    let (rounds, seconds) = effort.pick((5, 1), (9, 2));
    progress(format_args!(
        "kafka: {rounds} rounds of {seconds} s, {} loads, 3 variants",
        LOADS.len()
    ));
    let paths = [
        Path::new(Guard::None)?,
        Path::new(Guard::Port)?,
        Path::new(Guard::Kafka)?,
    ];
    let columns = [
        "load",
        "no firewall",
        "port only",
        "Kafka rules",
        "against none",
        "spread",
        "against port only",
    ];
    let mut bytes = Table::new("MB/s", &columns);
    let mut requests = Table::new("Requests/s", &columns);
    let mut goals = Vec::new();
    for load in LOADS {
        let mut samples = [const { Samples::new() }; 3];
        for round in 0..=rounds {
            for (path, samples) in paths.iter().zip(&mut samples) {
                let rate = path.rate(load, seconds)?;
                if round > 0 {
                    samples.push(rate);
                }
            }
        }
        let [none, port, ours] = &samples;
        let against = ours.against(none);
        let (ratio, spread) = (against.median(), against.spread());
        let row = |unit: f64| {
            let [none, port, kafka] = [none, port, ours].map(|samples| samples.median() * unit);
            [
                none,
                port,
                kafka,
                ratio,
                spread,
                ours.against(&samples[1]).median(),
            ]
        };
        requests.row(load.name, &row(1.0));
        if load.connections == 1 {
            bytes.row(load.name, &row(load.bytes as f64 / 1e6));
        }
        goals.push(if load.is_goal {
            let what = format!("Kafka MB/s through policy against none: {}", load.name);
            Goal::at_least(what, 0.9, ratio, " ×")
        } else {
            Goal::reported(
                format!("Kafka requests/s through policy against none: {}", load.name),
                format!("{} ×", number(ratio)),
            )
        });
    }
    Ok(Measure {
        name: "kafka",
        title: "Kafka through policy",
        method: format!(
            "A client behind the NIC produces to and fetches from a broker in a workload, which keeps nothing: Produce of version 7 with five requests in flight on one connection, Fetch of version 11 with one; of short requests each connection has one in flight. The policy for the broker's interface has a topic for each role, and it is checked that another topic is denied. {rounds} rounds of {seconds} s, in turn with a node without a firewall and with a policy that has no Kafka rules, whose packets the programs alone forward."
        ),
        goals,
        tables: vec![bytes, requests],
        plot: None,
        notes: vec![format!(
            "Congestion control of the machine: {}.",
            fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control")?.trim()
        )],
    })
}
