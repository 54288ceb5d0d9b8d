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
fn a_retransmission_with_undecided_bytes_behind_acknowledged_ones_makes_no_record() {
    for (a, server) in AS.into_iter().zip(WORLDS) {
        let mut world = World::new(HTTP);
        let mut connection = Connection::open(&mut world, end(a, 4000), end(server, 80));
        connection.client(&mut world, GOOD);
        connection.server(&mut world, OK);
        // The acknowledgement of the whole request was lost on the way to the client, which sends the request again, and
        // with it the first bytes of the next one.
        let (piece, rest) = GOOD.split_at(7);
        connection.next[0] = connection.next[0].wrapping_sub(GOOD.len() as u32);
        connection.client(&mut world, &[GOOD, piece].concat());
        connection.client(&mut world, rest);
        connection.server(&mut world, OK);
        // Nothing is retransmitted to an end of a capture.
        world.wait(600);
        connection.segment(&mut world, From::Server, "A", b"");
        connection.client(&mut world, BAD);
        let reasons: Vec<Reason> = connection.records.iter().map(|record| record.reason).collect();
        let wanted = [
            Reason::Allowed,
            Reason::Allowed,
            Reason::Allowed,
            Reason::Allowed,
            Reason::AppDenied,
        ];
        assert_eq!(reasons, wanted, "{:?}", connection.seen());
        assert_eq!(world.replay.summary().records, [4, 0, 1]);
    }
}

#[test]
fn a_head_of_many_segments_that_are_acknowledged_one_by_one_makes_no_record() {
    for (a, server) in AS.into_iter().zip(WORLDS) {
        let mut world = World::new(HTTP);
        let mut connection = Connection::open(&mut world, end(a, 4000), end(server, 80));
        let long = format!(
            "GET /public/x HTTP/1.1\r\nHost: a.test\r\nx-filler: {}\r\n\r\n",
            "y".repeat(600)
        );
        for byte in long.as_bytes().chunks(1) {
            connection.client(&mut world, byte);
        }
        connection.server(&mut world, OK);
        let reasons: Vec<Reason> = connection.records.iter().map(|record| record.reason).collect();
        assert_eq!(reasons, [Reason::Allowed; 2], "{:?}", connection.seen());
    }
}

#[test]
fn a_head_that_is_longer_than_the_window_of_the_server_makes_no_record() {
    let mut world = World::new(HTTP);
    let mut connection = Connection::open(&mut world, end(AS[0], 4000), end(WORLDS[0], 80));
    // The ends have windows of 60,000 bytes without a scale, and acknowledge what the inspection still holds.
    let body = "z".repeat(1_400);
    connection.client(&mut world, b"GET /public/x HTTP/1.1\r\nHost: a.test\r\n");
    for n in 0..40 {
        connection.client(&mut world, format!("x-{n}: {body}\r\n").as_bytes());
    }
    connection.client(&mut world, b"\r\n");
    let reasons: Vec<Reason> = connection.records.iter().map(|record| record.reason).collect();
    assert!(
        !reasons.contains(&Reason::TcpOutOfWindow),
        "{:?}",
        connection.seen()
    );
}

#[test]
fn an_acknowledgement_of_bytes_that_the_capture_does_not_have_is_out_of_window() {
    let mut world = World::new(HTTP);
    let mut connection = Connection::open(&mut world, end(AS[0], 4000), end(WORLDS[0], 80));
    connection.next[0] = connection.next[0].wrapping_add(100);
    connection.segment(&mut world, From::Server, "A", b"x");
    let reasons: Vec<Reason> = connection.records.iter().map(|record| record.reason).collect();
    assert_eq!(reasons, [Reason::TcpOutOfWindow]);
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

#[test]
fn times_that_go_backwards_or_jump_by_years_change_no_verdict() {
    const YEAR: u64 = 365 * 86_400 * 1_000_000_000;
    let mut world = World::new(HTTP);
    let start = world.now;
    let times = [
        start,
        start - 30 * YEAR,
        0,
        start + 100 * YEAR,
        start,
        u64::MAX - 1_000_000_000,
        start + YEAR,
        1,
    ];
    for (port, time) in (4_000..).zip(times) {
        world.now = time;
        let mut connection = Connection::open(&mut world, end(AS[0], port), end(WORLDS[0], 80));
        connection.client(&mut world, GOOD);
        world.now = time / 2;
        connection.server(&mut world, OK);
        connection.client(&mut world, BAD);
        let reasons: Vec<Reason> = connection.records.iter().map(|record| record.reason).collect();
        assert_eq!(
            reasons,
            [Reason::Allowed, Reason::Allowed, Reason::AppDenied],
            "{time}: {:?}",
            connection.seen()
        );
    }
    let summary = world.replay.summary();
    assert!(summary.out_of_order > 0);
    assert_eq!(summary.records, [16, 0, 8]);
}

#[test]
fn a_flood_of_half_open_connections_is_bounded_and_hides_no_request() {
    let mut world = World::new(HTTP);
    for n in 0..100_000_u32 {
        let [_, a, b, c] = n.to_be_bytes();
        let server = (IpAddr::from([198, 18 | a & 1, b, c]), 80);
        let flood = Connection {
            client: end(AS[0], 1_024 + (n % 60_000) as u16),
            server,
            next: [n, n],
            records: Vec::new(),
        };
        let bytes = flood.frame(From::Client, "S", b"");
        assert!(world.send(&bytes).records.is_empty());
    }
    let mut connection = Connection::open(&mut world, end(AS[0], 1_000), end(WORLDS[0], 80));
    connection.client(&mut world, BAD);
    assert_eq!(connection.seen()[0].1, Reason::AppDenied);
    let summary = world.replay.summary();
    assert!(
        summary.open <= 1_000 && summary.evicted >= 99_000,
        "{} {}",
        summary.open,
        summary.evicted
    );
    assert_eq!(summary.held, 0);
}

#[test]
fn interleaved_syns_with_the_same_ends_hide_no_request() {
    for (a, server) in AS.into_iter().zip(WORLDS) {
        let mut world = World::new(HTTP);
        let ends = |next| Connection {
            client: end(a, 4_000),
            server: end(server, 80),
            next,
            records: Vec::new(),
        };
        let (mut first, mut second) = (ends([1_000, 5_000]), ends([900_000, 7_000_000]));
        for _ in 0..3 {
            let (one, other) = (
                first.frame(From::Client, "S", b""),
                second.frame(From::Client, "S", b""),
            );
            world.send(&one);
            world.send(&other);
        }
        // The server answers the second one.
        second.segment(&mut world, From::Client, "S", b"");
        second.segment(&mut world, From::Server, "SA", b"");
        second.segment(&mut world, From::Client, "A", b"");
        first.next[0] += 1;
        first.segment(&mut world, From::Client, "A", GOOD);
        second.client(&mut world, BAD);
        let allowed = first.records.iter().chain(&second.records);
        let denied = allowed
            .filter(|record| record.reason == Reason::AppDenied)
            .count();
        assert_eq!(denied, 1, "{:?} {:?}", first.seen(), second.seen());
    }
}

#[test]
fn packets_of_the_largest_size_are_inspected() {
    for (a, server) in AS.into_iter().zip(WORLDS) {
        let mut world = World::new(HTTP);
        let mut connection = Connection::open(&mut world, end(a, 4_000), end(server, 80));
        let head = |path: &str, length: usize| {
            format!("POST {path} HTTP/1.1\r\nHost: a.test\r\nContent-Length: {length}\r\n\r\n").into_bytes()
        };
        // With the headers, the longest IP packet that fits the windows of the connection.
        let room = 59_000;
        let mut message = head("/secret", room);
        message.resize(message.len() + room, b'x');
        connection.client(&mut world, &message);
        assert_eq!(
            connection.seen()[0].1,
            Reason::AppDenied,
            "{:?}",
            connection.seen()
        );
        let summary = world.replay.summary();
        assert_eq!(summary.held, 0);
    }
}

#[test]
fn a_request_in_ip_fragments_is_not_allowed() {
    let mut world = World::new(HTTP);
    let mut connection = Connection::open(&mut world, end(AS[0], 4_000), end(WORLDS[0], 80));
    let whole = connection.frame(From::Client, "A", BAD);
    let (ip, payload) = (14, &whole[34..]);
    // The first fragment has the TCP header and eight bytes of the request.
    let cut = 24 + 8 - 8;
    for (part, offset, more) in [(&payload[..cut], 0, true), (&payload[cut..], cut / 8, false)] {
        let mut frame = whole[..34].to_vec();
        frame.extend(part);
        let length = (frame.len() - ip) as u16;
        frame[ip + 2..ip + 4].copy_from_slice(&length.to_be_bytes());
        let flags = (offset as u16) | if more { 0x2000 } else { 0 };
        frame[ip + 6..ip + 8].copy_from_slice(&flags.to_be_bytes());
        frame[ip + 10..ip + 12].fill(0);
        let sum: u32 = frame[ip..ip + 20]
            .as_chunks::<2>()
            .0
            .iter()
            .map(|word| u32::from(u16::from_be_bytes(*word)))
            .sum();
        let sum = !(((sum >> 16) + (sum & 0xffff)) as u16);
        frame[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
        connection.records.extend(world.send(&frame).records);
    }
    let seen = connection.seen();
    assert!(
        seen.iter().all(|(verdict, ..)| *verdict == Verdict::Dropped),
        "{seen:?}"
    );
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
