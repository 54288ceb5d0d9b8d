//! A client that writes its own segments, against a server that records every byte: in every segmentation, the server
//! receives what the policy allows, unchanged, and nothing else.

use std::{
    io::Read,
    net::TcpListener,
    thread,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    rawtcp::{Delivered, RawTcp, Segment, pieces},
    recorder::Recorder,
    tls::{Hello, retry_request, server_hello},
    topology::{FAMILIES, Family},
};
use palisade_tests::{
    OPEN,
    evasion::{AttackPath, Streams},
    fixtures::apps::{Apps, OK, answers_requests, apps, borrowed, packets_read, policies},
};

const PORT: u16 = 443;

const NAMES: &str = "      serverNames: [good.example]\n";
const PATHS: &str = "      rules:\n        http: [{path: /good.*}]\n";

/// Returns what the server responds to the bytes that it has received.
type Answers = fn(&mut usize, &[u8]) -> Vec<u8>;

fn hello(name: &str) -> Vec<u8> {
    Hello::to(name).with(16, b"\x00\x09\x08http/1.1").bytes()
}

/// Two hellos that differ in the name only.
fn hellos() -> (Streams, Answers) {
    let streams = Streams::new(hello("good.example"), hello("evil.example"), server_hello()).ends_reading();
    let answers: Answers = |dealt_with, all| {
        if *dealt_with == 0 && all.len() >= hello("good.example").len() {
            *dealt_with = all.len();
            return server_hello();
        }
        Vec::new()
    };
    (streams, answers)
}

/// A hello and a second one after a HelloRetryRequest, with another name or the same.
fn second_hellos() -> (Streams, Answers) {
    let good = hello("good.example");
    // The allowed hello at the beginning of the bad stream also continues the good stream.
    let third = good.repeat(3);
    let streams = Streams::new(
        [&good[..], &good].concat(),
        [good, hello("evil.example")].concat(),
        [retry_request(), server_hello()].concat(),
    )
    .ends_reading()
    .also(third);
    let answers: Answers = |dealt_with, all| {
        let one = hello("good.example").len();
        let before = std::mem::replace(dealt_with, all.len() / one);
        [retry_request(), server_hello()][before.min(2)..(*dealt_with).min(2)].concat()
    };
    (streams, answers)
}

fn request(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: x.example\r\nX-More: 0123456789\r\n\r\n").into()
}

/// Two requests that differ in the path only.
fn requests() -> (Streams, Answers) {
    let streams = Streams::new(request("/good"), request("/evil"), OK.into());
    (streams, answers_requests)
}

/// A request after another one.
fn second_requests() -> (Streams, Answers) {
    let streams = Streams::new(
        [request("/good/1"), request("/good")].concat(),
        [request("/good/1"), request("/evil")].concat(),
        OK.repeat(2),
    );
    // The first of the two may be repeated after them.
    let third = [request("/good/1"), request("/good"), request("/good/1")].concat();
    (streams.also(third), answers_requests)
}

/// A request in the body of another one, or after it, depending on the length.
fn post(length: usize) -> Vec<u8> {
    let head = format!("POST /good HTTP/1.1\r\nHost: x.example\r\nContent-Length: {length}\r\n\r\n");
    [head.into_bytes(), request("/evil")].concat()
}

fn lengths() -> (Streams, Answers) {
    let length = request("/evil").len();
    let (good, bad) = (post(length), post(10));
    // The digits of both lengths can be mixed to a third length: then the bytes after the body are no request.
    let shorter = [10, 10 + length % 10, length / 10 * 10];
    let cut = |n: usize| -> Vec<u8> {
        let whole = post(n);
        whole[..whole.len() - (length - n)].to_vec()
    };
    let shorter: Vec<Vec<u8>> = shorter.into_iter().map(cut).collect();
    let mut streams = Streams::new(good.clone(), bad, OK.to_vec());
    for short in shorter {
        let again = [&good[..], &short].concat();
        streams = streams.also(short).also(again);
    }
    (streams, answers_requests)
}

struct Setup {
    // Dropped in this order: the daemon ends before the namespaces are removed.
    daemon: Daemon,
    recorders: Vec<(&'static str, Recorder)>,
    apps: Apps,
    streams: Streams,
}

impl Setup {
    fn new(rules: &str, (streams, answers): (Streams, Answers)) -> Self {
        let apps = apps();
        let recorders = ["server", "node", "internet"]
            .into_iter()
            .map(|name| {
                let recorder = Recorder::start(apps.ns(name), &apps.both(name), &[PORT], answers);
                (name, recorder.expect("recorder"))
            })
            .collect();
        let daemon = apps
            .daemon(&Settings::default(), &borrowed(&policies(&[PORT], rules)))
            .expect("daemon");
        Self {
            daemon,
            recorders,
            apps,
            streams,
        }
    }

    fn path(&self, from: &str, to: &str, family: Family) -> AttackPath<'_> {
        let recorder = self.recorders.iter().find(|(name, _)| *name == to);
        AttackPath {
            ns: self.apps.ns(from),
            source: self.apps.source(from, to, family),
            to: self.apps.at(to, family, PORT),
            recorder: &recorder.expect("recorder").1,
            streams: &self.streams,
        }
    }

    /// Runs `attack` on several paths at the same time, in both families. Returns the failures.
    fn outcome(&self, pairs: &[(&str, &str)], attack: fn(&AttackPath<'_>) -> Vec<String>) -> Vec<String> {
        thread::scope(|scope| {
            let threads: Vec<_> = pairs
                .iter()
                .flat_map(|(from, to)| FAMILIES.map(|family| (*from, *to, family)))
                .map(|(from, to, family)| scope.spawn(move || attack(&self.path(from, to, family))))
                .collect();
            threads
                .into_iter()
                .flat_map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        })
    }

    #[track_caller]
    fn run(&self, pairs: &[(&str, &str)], attack: fn(&AttackPath<'_>) -> Vec<String>) {
        let failures = self.outcome(pairs, attack);
        assert!(
            failures.is_empty(),
            "{} failures\n{}\n{}",
            failures.len(),
            failures.join("\n"),
            self.daemon.report()
        );
    }
}

/// Out of a workload and into one, into the node and out of it.
const FOUR: &[(&str, &str)] = &[
    ("client", "internet"),
    ("internet", "server"),
    ("internet", "node"),
    ("node", "internet"),
];

#[test]
fn a_hello_in_any_segmentation_gets_the_same_verdict() {
    Setup::new(NAMES, hellos()).run(FOUR, |path| path.cuts());
}

#[test]
fn a_hello_split_at_any_byte_gets_the_same_verdict() {
    Setup::new(NAMES, hellos()).run(&[("client", "internet"), ("internet", "node")], |path| {
        path.splits()
    });
}

#[test]
fn overlapping_segments_cannot_smuggle_a_denied_hello() {
    Setup::new(NAMES, hellos()).run(FOUR, |path| path.mixes());
}

#[test]
fn a_second_hello_in_any_segmentation_gets_the_same_verdict() {
    let setup = Setup::new(NAMES, second_hellos());
    setup.run(FOUR, |path| path.cuts());
    setup.run(FOUR, |path| path.mixes());
}

#[test]
fn a_request_in_any_segmentation_gets_the_same_verdict() {
    let setup = Setup::new(PATHS, requests());
    setup.run(FOUR, |path| path.cuts());
    setup.run(&FOUR[1..3], |path| path.splits());
}

#[test]
fn overlapping_segments_cannot_smuggle_a_denied_first_request() {
    Setup::new(PATHS, requests()).run(FOUR, |path| path.mixes());
}

#[test]
fn a_second_request_in_any_segmentation_gets_the_same_verdict() {
    let setup = Setup::new(PATHS, second_requests());
    setup.run(FOUR, |path| path.cuts());
    setup.run(&FOUR[..1], |path| path.splits());
}

#[test]
fn overlapping_segments_cannot_smuggle_a_denied_request() {
    Setup::new(PATHS, second_requests()).run(FOUR, |path| path.mixes());
}

#[test]
fn overlapping_content_lengths_cannot_smuggle_a_request() {
    let setup = Setup::new(PATHS, lengths());
    setup.run(FOUR, |path| path.cuts());
    setup.run(FOUR, |path| path.mixes());
}

#[test]
fn without_rules_overlapping_segments_deliver_both_hellos() {
    // Otherwise the other tests would prove nothing.
    let failures = Setup::new("", hellos()).outcome(&FOUR[..1], |path| path.mixes());
    assert!(
        failures.len() > 60,
        "{} of them\n{}",
        failures.len(),
        failures.join("\n")
    );
}

#[test]
fn bytes_after_a_hello_are_offloaded_and_arrive_complete() {
    let setup = Setup::new(NAMES, hellos());
    let data: Vec<u8> = (0..120_000_u32).map(|n| (n / 3) as u8).collect();
    for (from, to) in FOUR {
        for family in FAMILIES {
            let path = setup.path(from, to, family);
            let mut client = RawTcp::connect(path.ns, path.source, path.to).expect("connection");
            let hello = &setup.streams.good;
            let at = hello.len() as i64;
            let outcome = client.deliver_pieces(0, hello, 50, OPEN).expect("hello");
            assert_eq!(outcome, Delivered::Whole);
            let answered = client.listen(OPEN, |c| c.received() == setup.streams.answer);
            assert!(answered.expect("answer"), "{}", setup.daemon.report());
            // With this acknowledgement the flow is offloaded.
            client.send(&Segment::data(at, b"")).expect("acknowledgement");
            thread::sleep(Duration::from_millis(50));
            let before = packets_read(&setup.daemon).expect("status");
            let mut all = pieces(at, &data, 1_400);
            // Some of the segments fragmented, and some reordered.
            for segment in all.iter_mut().step_by(9) {
                *segment = segment.clone().fragments(504);
            }
            for pair in all.chunks_mut(2) {
                pair.reverse();
            }
            let end = at + data.len() as i64;
            let outcome = client.deliver(&all, end, OPEN).expect("data");
            assert_eq!(
                outcome,
                Delivered::Whole,
                "{from} -> {to}\n{}",
                setup.daemon.report()
            );
            let whole = [hello, &data[..]].concat();
            let heard = path
                .recorder
                .wait(client.local(), "all is there", OPEN, |h| {
                    h.bytes.len() >= whole.len()
                })
                .expect("bytes")
                .bytes;
            let differs = heard.iter().zip(&whole).position(|(a, b)| a != b);
            assert!(
                heard == whole,
                "{from} -> {to}: {} bytes of {}, other ones from {differs:?} on",
                heard.len(),
                whole.len()
            );
            let read = packets_read(&setup.daemon).expect("status") - before;
            assert!(
                read <= 4,
                "{from} -> {to}: {read} packets\n{}",
                setup.daemon.report()
            );
        }
    }
}

#[test]
fn a_server_with_a_small_window_receives_everything() {
    let apps = apps();
    let policies = policies(&[PORT], NAMES);
    let daemon = apps
        .daemon(&Settings::default(), &borrowed(&policies))
        .expect("daemon");
    let hello = Hello::to("good.example").padded(12_000).bytes();
    for (from, to) in FOUR {
        for family in FAMILIES {
            let at = apps.at(to, family, PORT);
            let listener: TcpListener = apps
                .ns(to)
                .enter(|| -> std::io::Result<TcpListener> {
                    let socket =
                        socket2::Socket::new(socket2::Domain::for_address(at), socket2::Type::STREAM, None)?;
                    socket.set_recv_buffer_size(24 << 10)?;
                    socket.set_reuse_address(true)?;
                    socket.bind(&at.into())?;
                    socket.listen(4)?;
                    Ok(socket.into())
                })
                .expect("listener");
            let heard = thread::scope(|scope| {
                let server = scope.spawn(|| {
                    let (mut stream, _) = listener.accept().expect("accept");
                    stream.set_read_timeout(Some(OPEN)).expect("timeout");
                    let (mut heard, mut buffer) = (Vec::new(), [0; 700]);
                    while heard.len() < hello.len() {
                        let n = stream.read(&mut buffer).unwrap_or(0);
                        if n == 0 {
                            break;
                        }
                        heard.extend_from_slice(&buffer[..n]);
                        thread::sleep(Duration::from_millis(5));
                    }
                    heard
                });
                let source = apps.source(from, to, family);
                let mut client = RawTcp::connect(apps.ns(from), source, at).expect("connection");
                let begin = Instant::now();
                let outcome = client.deliver_pieces(0, &hello, 600, OPEN * 2).expect("hello");
                assert_eq!(
                    outcome,
                    Delivered::Whole,
                    "{from} -> {to}, after {:?}\n{}",
                    begin.elapsed(),
                    daemon.report()
                );
                server.join().expect("server")
            });
            assert!(heard == hello, "{} of {} bytes", heard.len(), hello.len());
        }
    }
}
