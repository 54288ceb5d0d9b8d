//! Requests, queries and hellos: the inspectors over connections of a capture.

mod common;

use std::net::IpAddr;

use common::{A, AS, End, WORLDS, World, end};
use etherparse::PacketBuilder;
use palisade_abi::Reason;
use palisade_inspect::record::{Record, Verdict, What};
use palisade_protocols::dns;
use palisade_replay::capture::{Captured, LinkType, PathHint};

fn frame(source: End, destination: End) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    match (source.0, destination.0) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            ethernet.ipv4(source.octets(), destination.octets(), 64)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            ethernet.ipv6(source.octets(), destination.octets(), 64)
        }
        _ => panic!("two families"),
    }
}

fn udp(source: End, destination: End, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let step = frame(source, destination).udp(source.1, destination.1);
    step.write(&mut bytes, payload).unwrap();
    bytes
}

/// Both ends of a TCP connection, as a capture shows them.
struct Connection {
    client: End,
    server: End,
    /// Next sequence numbers of client and server.
    next: [u32; 2],
    records: Vec<Record>,
}

#[derive(Clone, Copy, PartialEq)]
enum From {
    Client,
    Server,
}

impl Connection {
    fn open(world: &mut World, client: End, server: End) -> Self {
        let mut connection = Self {
            client,
            server,
            next: [1_000, u32::MAX - 5],
            records: Vec::new(),
        };
        connection.segment(world, From::Client, "S", b"");
        connection.segment(world, From::Server, "SA", b"");
        connection.segment(world, From::Client, "A", b"");
        connection
    }

    /// Sends a segment with the flags S, A, F and R.
    fn segment(&mut self, world: &mut World, from: From, flags: &str, payload: &[u8]) {
        let bytes = self.frame(from, flags, payload);
        let side = usize::from(from == From::Server);
        let space = payload.len() + flags.matches(['S', 'F']).count();
        self.next[side] = self.next[side].wrapping_add(space as u32);
        self.records.extend(world.send(&bytes).records);
    }

    fn frame(&self, from: From, flags: &str, payload: &[u8]) -> Vec<u8> {
        let (source, destination, seq, ack) = match from {
            From::Client => (self.client, self.server, self.next[0], self.next[1]),
            From::Server => (self.server, self.client, self.next[1], self.next[0]),
        };
        let mut step = frame(source, destination).tcp(source.1, destination.1, seq, 60_000);
        if flags.contains('S') {
            step = step.syn();
        }
        if flags.contains('F') {
            step = step.fin();
        }
        if flags.contains('R') {
            step = step.rst();
        }
        if flags.contains('A') {
            step = step.ack(ack);
        }
        let mut bytes = Vec::new();
        step.write(&mut bytes, payload).unwrap();
        bytes
    }

    fn client(&mut self, world: &mut World, payload: &[u8]) {
        self.segment(world, From::Client, "A", payload);
        self.segment(world, From::Server, "A", b"");
    }

    fn server(&mut self, world: &mut World, payload: &[u8]) {
        self.segment(world, From::Server, "A", payload);
        self.segment(world, From::Client, "A", b"");
    }

    /// Returns verdict, reason and a text of each record.
    fn seen(&self) -> Vec<(Verdict, Reason, String)> {
        self.records.iter().map(seen).collect()
    }
}

fn seen(record: &Record) -> (Verdict, Reason, String) {
    let text = match &record.what {
        What::HttpRequest { method, url, .. } => {
            format!(
                "{} {}",
                String::from_utf8_lossy(method.bytes()),
                String::from_utf8_lossy(url.bytes())
            )
        }
        What::HttpResponse { status, .. } => format!("{status}"),
        What::DnsQuery { name, .. } => format!("query {}", String::from_utf8_lossy(name.bytes())),
        What::DnsAnswer { name, count, .. } => {
            format!("answer {} {count}", String::from_utf8_lossy(name.bytes()))
        }
        What::TlsHello { name, .. } => format!("hello {}", String::from_utf8_lossy(name.bytes())),
        What::Unreadable { detail } => (*detail).to_owned(),
        other => format!("{other:?}"),
    };
    (record.verdict, record.reason, text)
}

const HTTP: &[(&str, &str, &str)] = &[(
    "http",
    "a",
    "  egress: [{toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{method: GET, path: '/public/.*'}]}}]}]",
)];

const GOOD: &[u8] = b"GET /public/x HTTP/1.1\r\nHost: a.test\r\n\r\n";
const BAD: &[u8] = b"GET /secret HTTP/1.1\r\nHost: a.test\r\n\r\n";
const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

fn allowed(text: &str) -> (Verdict, Reason, String) {
    (Verdict::Forwarded, Reason::Allowed, text.to_owned())
}

#[test]
fn requests_of_a_connection_get_their_verdicts() {
    for (a, server) in AS.into_iter().zip(WORLDS) {
        let mut world = World::new(HTTP);
        let mut connection = Connection::open(&mut world, end(a, 4000), end(server, 80));
        for _ in 0..2 {
            connection.client(&mut world, GOOD);
            connection.server(&mut world, OK);
        }
        let url = connection.seen()[0].2.clone();
        assert!(url.starts_with("GET http://a.test/public/x"), "{url}");
        assert_eq!(
            connection.seen(),
            [allowed(&url), allowed("200"), allowed(&url), allowed("200")]
        );
        // The request is denied. The capture contains the response of the server nevertheless: it changes nothing.
        connection.client(&mut world, BAD);
        connection.server(&mut world, OK);
        connection.client(&mut world, GOOD);
        let records = connection.seen();
        assert_eq!(records.len(), 5, "{records:?}");
        assert_eq!(
            (records[4].0, records[4].1),
            (Verdict::Dropped, Reason::AppDenied)
        );
        let summary = world.replay.summary();
        assert_eq!((summary.records, summary.held), ([4, 0, 1], 0));
        assert_eq!(summary.flows, [1, 0, 0]);
    }
}

#[test]
fn a_request_in_pieces_is_acknowledged_before_its_verdict() {
    let mut world = World::new(HTTP);
    let mut connection = Connection::open(&mut world, end(AS[0], 4000), end(WORLDS[0], 80));
    // Each piece is acknowledged by the server before the next one is sent: nothing was held when the capture was made.
    for piece in GOOD.chunks(7) {
        connection.client(&mut world, piece);
    }
    for piece in OK.chunks(5) {
        connection.server(&mut world, piece);
    }
    assert_eq!(connection.seen().len(), 2, "{:?}", connection.seen());
    for piece in BAD.chunks(7) {
        connection.client(&mut world, piece);
    }
    let records = connection.seen();
    assert_eq!(records.len(), 3, "{records:?}");
    assert_eq!(records[2].1, Reason::AppDenied);
}

#[test]
fn a_reset_with_the_number_of_a_held_segment_does_not_hide_it() {
    for (a, server) in AS.into_iter().zip(WORLDS) {
        let mut world = World::new(HTTP);
        let mut connection = Connection::open(&mut world, end(a, 4000), end(server, 80));
        let (piece, rest) = GOOD.split_at(7);
        // The piece has no verdict yet.
        connection.segment(&mut world, From::Client, "A", piece);
        // The client has closed its socket: it answers an older segment of the server with a reset that has the
        // acknowledgment number of that segment.
        let next = connection.next[0];
        connection.next[0] = next.wrapping_sub(7);
        connection.segment(&mut world, From::Client, "R", b"");
        connection.next[0] = next;
        // What follows on the wire acknowledges the held piece.
        connection.segment(&mut world, From::Server, "A", b"");
        connection.segment(&mut world, From::Client, "A", rest);
        connection.segment(&mut world, From::Server, "A", b"");
        let records = connection.seen();
        assert_eq!(records.len(), 1, "{records:?}");
        assert_eq!(records[0].1, Reason::Allowed);
    }
}

#[test]
fn the_own_response_in_a_capture_is_recognised() {
    let mut world = World::new(HTTP);
    let mut connection = Connection::open(&mut world, end(AS[0], 4000), end(WORLDS[0], 80));
    connection.client(&mut world, BAD);
    assert_eq!(connection.seen().len(), 1);
    let before = world.replay.summary();
    assert!(before.built > 0);
    assert_eq!(before.inspected.generated, 0);
    // A file made while Palisade enforced contains the 403 that the worker has sent.
    let forbidden = b"HTTP/1.1 403 Forbidden";
    connection.segment(&mut world, From::Server, "FA", forbidden);
    assert_eq!(connection.seen().len(), 1, "{:?}", connection.seen());
}

#[test]
fn the_own_fin_in_a_capture_is_recognised_by_its_sequence_number() {
    let mut world = World::new(HTTP);
    let mut connection = Connection::open(&mut world, end(AS[0], 4000), end(WORLDS[0], 80));
    let begin = connection.next[0];
    connection.client(&mut world, BAD);
    // The client's own FIN follows the request. The worker's FIN takes the place of the request, which the server does
    // not get.
    let own = connection.frame(From::Client, "FA", b"");
    world.send(&own);
    assert_eq!(world.replay.summary().inspected.generated, 0);
    connection.next[0] = begin;
    let built = connection.frame(From::Client, "FA", b"");
    world.send(&built);
    assert_eq!(world.replay.summary().inspected.generated, 1);
}

#[test]
fn a_connection_is_not_inspected_from_its_middle_or_beyond_a_truncated_packet() {
    let mut world = World::new(HTTP);
    let mut middle = Connection {
        client: end(AS[0], 4000),
        server: end(WORLDS[0], 80),
        next: [5, 6],
        records: Vec::new(),
    };
    middle.client(&mut world, BAD);
    middle.client(&mut world, BAD);
    assert_eq!(middle.seen(), []);
    let mut cut = Connection::open(&mut world, end(AS[0], 4001), end(WORLDS[0], 80));
    let frame = cut.frame(From::Client, "A", GOOD);
    let outcome = world.packet(&Captured {
        time: Some(world.now),
        interface: 0,
        interface_name: "",
        link: LinkType::ETHERNET,
        hint: PathHint::Unknown,
        data: &frame[..60],
        length: frame.len() as u32,
    });
    assert!(outcome.records.is_empty());
    cut.next[0] += GOOD.len() as u32;
    cut.client(&mut world, BAD);
    assert_eq!(cut.seen(), []);
    let summary = world.replay.summary();
    assert_eq!(summary.inspected.undecided_flows, 2);
    assert_eq!(summary.midstream, 1);
    assert!(summary.inspected.midstream > 0 && summary.inspected.truncated == 1);
    // A new connection with the same ports is inspected again.
    let mut again = Connection::open(&mut world, end(AS[0], 4001), end(WORLDS[0], 80));
    again.next[0] = again.next[0].wrapping_add(0);
    again.client(&mut world, GOOD);
    assert_eq!(again.seen().len(), 1, "{:?}", again.seen());
}

fn query(id: u16, name: &str, kind: u16) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend(kind.to_be_bytes());
    message.extend([0, 1]);
    message
}

fn answer(query: &[u8], kind: u16, address: IpAddr, ttl: u32) -> Vec<u8> {
    let mut message = query.to_vec();
    message[2] = 0x81;
    message[3] = 0x80;
    message[7] = 1;
    message.extend([0xc0, 12]);
    message.extend(kind.to_be_bytes());
    message.extend([0, 1]);
    message.extend(ttl.to_be_bytes());
    let bytes = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    message.extend((bytes.len() as u16).to_be_bytes());
    message.extend(bytes);
    message
}

const NAMES: &[(&str, &str, &str)] = &[(
    "names",
    "a",
    "  egress:\n  - toCIDR: [192.0.2.53/32, '2001:db8::53/128']\n    toPorts: [{ports: [{port: '53', protocol: UDP}], \
     rules: {dns: [{matchPattern: '*.test'}]}}]\n  - toFQDNs: [{matchName: a.test}, {matchPattern: '*.wild.test'}]\n    \
     toPorts: [{ports: [{port: '443', protocol: TCP}]}]",
)];

#[test]
fn answers_of_the_capture_are_learned_and_expire() {
    for (family, (a, server)) in AS.into_iter().zip(["192.0.2.53", "2001:db8::53"]).enumerate() {
        let kind = [dns::rtype::A, dns::rtype::AAAA][family];
        let address: IpAddr = ["198.51.100.7", "2001:db8:9::7"][family].parse().unwrap();
        let mut world = World::new(NAMES);
        let connect = |world: &mut World, port: u16| {
            let connection = Connection {
                client: end(a, port),
                server: (address, 443),
                next: [1, 1],
                records: Vec::new(),
            };
            world.send(&connection.frame(From::Client, "S", b"")).drops()
        };
        assert_eq!(connect(&mut world, 4000), [(A, Reason::PolicyDenied)]);
        let question = query(7, "a.test", kind);
        let asked = world.send(&udp(end(a, 5000), end(server, 53), &question));
        assert_eq!(
            asked.records.iter().map(seen).collect::<Vec<_>>(),
            [allowed("query a.test")]
        );
        let reply = answer(&question, kind, address, 60);
        let answered = world.send(&udp(end(server, 53), end(a, 5000), &reply));
        assert_eq!(
            answered.records.iter().map(seen).collect::<Vec<_>>(),
            [allowed("answer a.test 1")]
        );
        assert_eq!(world.replay.name_of(A, address).as_deref(), Some("a.test"));
        assert_eq!(connect(&mut world, 4001), []);
        // The answer counts for the client of its query and for the answered name only.
        let other = query(8, "b.test", kind);
        world.send(&udp(end(a, 5000), end(server, 53), &other));
        let elsewhere = ["198.51.100.8", "2001:db8:9::8"][family].parse().unwrap();
        world.send(&udp(
            end(server, 53),
            end(a, 5000),
            &answer(&other, kind, elsewhere, 60),
        ));
        assert_eq!(world.replay.summary().answers, [2, 0]);
        // Time to live and flows are over.
        world.wait(3_600);
        assert_eq!(connect(&mut world, 4002), [(A, Reason::PolicyDenied)]);
    }
}

#[test]
fn denied_and_unsolicited_dns_is_reported() {
    let mut world = World::new(NAMES);
    let (client, server) = (end(AS[0], 5000), end("192.0.2.53", 53));
    let question = query(7, "example.org", 1);
    let denied = world.send(&udp(client, server, &question));
    assert_eq!(
        denied.records.iter().map(seen).collect::<Vec<_>>(),
        [(
            Verdict::Dropped,
            Reason::AppDenied,
            "query example.org".to_owned()
        )]
    );
    // REFUSED, as the worker has sent it: not an answer of the server.
    let mut refused = question.clone();
    refused[2] = 0x81;
    refused[3] = 0x85;
    let own = world.send(&udp(server, client, &refused));
    let summary = world.replay.summary();
    assert_eq!(
        (own.records.len(), summary.inspected.generated),
        (0, 1),
        "{own:?}"
    );
    // An unsolicited answer.
    let stray = answer(&query(9, "a.test", 1), 1, "198.51.100.7".parse().unwrap(), 60);
    let stray = world.send(&udp(server, client, &stray));
    assert_eq!(stray.records[0].verdict, Verdict::Dropped);
}

#[test]
fn a_checksum_that_the_device_completes_is_accepted_and_a_wrong_one_is_not() {
    let mut world = World::new(NAMES);
    let (client, server) = (end(AS[0], 5000), end("192.0.2.53", 53));
    let mut partial = udp(client, server, &query(7, "a.test", 1));
    let length = partial.len() - 34;
    // The sum of the pseudo header (RFC 768), not inverted, as Linux leaves it for the device.
    let mut sum = 17 + length as u32;
    sum += partial[26..34]
        .as_chunks::<2>()
        .0
        .iter()
        .map(|word| u32::from(u16::from_be_bytes(*word)))
        .sum::<u32>();
    let sum = (sum >> 16) + (sum & 0xffff);
    partial[40..42].copy_from_slice(&(sum as u16).to_be_bytes());
    assert_eq!(seen(&world.send(&partial).records[0]), allowed("query a.test"));
    let mut wrong = udp(client, server, &query(8, "a.test", 1));
    wrong[40] ^= 0x55;
    let outcome = world.send(&wrong);
    assert_eq!(
        (outcome.records[0].verdict, outcome.records[0].reason),
        (Verdict::Dropped, Reason::BadChecksum)
    );
}
