//! HTTP/2 through the proxy. Client and server are made of frames here, so that the tests see each of them.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use palisade_inspect::record::What;
use palisade_protocols::http2::{
    Decoder, Fields, FrameHeader, Frames, PREFACE, Piece, encode, flags, fragment_of, headers_of, kind,
};

use crate::world::{NAME, PATIENCE, World, accept, http_rules, server_config};

/// One peer of an HTTP/2 connection.
struct Peer<S> {
    stream: S,
    frames: Frames,
    decoder: Decoder,
    input: Vec<u8>,
}

/// A frame with its payload.
type Frame = (FrameHeader, Vec<u8>);

impl<S: Read + Write> Peer<S> {
    fn new(stream: S) -> Self {
        Self {
            stream,
            frames: Frames::new(1 << 16),
            decoder: Decoder::lenient(),
            input: Vec::new(),
        }
    }

    fn client(stream: S) -> Self {
        let mut peer = Self::new(stream);
        let mut out = PREFACE.to_vec();
        header(kind::SETTINGS, 0, 0).write_with(&[], &mut out);
        peer.send(&out);
        peer
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("frames are sent");
        self.stream.flush().expect("frames are sent");
    }

    fn request(&mut self, stream: u32, method: &str, path: &str, more: &[(&str, &str)]) {
        let mut block = Vec::new();
        let fields = [
            (":method", method),
            (":scheme", "https"),
            (":authority", NAME),
            (":path", path),
        ];
        for (name, value) in fields.iter().chain(more) {
            encode::field(name.as_bytes(), value.as_bytes(), false, &mut block);
        }
        let mut out = Vec::new();
        headers_of(stream, true, None, &block, 16_384, &mut out);
        self.send(&out);
    }

    /// Returns the next frame; `None` at the end of the stream.
    fn next(&mut self) -> Option<Frame> {
        let mut data: Option<Frame> = None;
        loop {
            let mut rest = &self.input[..];
            let mut found = None;
            let all = rest.len();
            while let Some(piece) = self.frames.next(&mut rest).expect("frames") {
                match piece {
                    Piece::Frame(header, payload) => found = Some((header, payload.to_vec())),
                    Piece::Data { header, rest: 0, .. } => found = Some((header, Vec::new())),
                    Piece::Data { header, .. } => data = Some((header, Vec::new())),
                    Piece::Content { bytes, ends } => {
                        let (_, content) = data.as_mut().expect("a DATA frame");
                        content.extend_from_slice(bytes);
                        if ends {
                            found = data.take();
                        }
                    }
                    Piece::Unknown(_) => {}
                }
                if found.is_some() {
                    break;
                }
            }
            let used = all - rest.len();
            self.input.drain(..used);
            if found.is_some() {
                return found;
            }
            let mut part = [0; 4096];
            match self.stream.read(&mut part) {
                Ok(n) if n > 0 => self.input.extend_from_slice(&part[..n]),
                _ => return None,
            }
        }
    }

    /// Returns the fields of the next header block, and the number of its stream.
    fn headers(&mut self) -> Option<(u32, String)> {
        loop {
            let (header, payload) = self.next()?;
            if header.kind == kind::HEADERS {
                let (_, block) = fragment_of(header, &payload).expect("a block");
                let mut fields = Fields::default();
                self.decoder.decode(block, 1 << 16, &mut fields).expect("fields");
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                let lines = fields
                    .iter()
                    .map(|(name, value, _)| format!("{}: {}\n", text(name), text(value)));
                return Some((header.stream, lines.collect()));
            }
        }
    }

    /// Returns the content of the next DATA frame.
    fn content(&mut self) -> String {
        loop {
            let (header, payload) = self.next().expect("a frame");
            if header.kind == kind::DATA {
                return String::from_utf8_lossy(&payload).into_owned();
            }
        }
    }
}

fn header(kind: u8, flags: u8, stream: u32) -> FrameHeader {
    FrameHeader {
        length: 0,
        kind,
        flags,
        stream,
    }
}

/// Answers each request with its path.
fn serve(stream: impl Read + Write) {
    let mut peer = Peer::new(stream);
    let mut preface = [0; 24];
    peer.stream.read_exact(&mut preface).expect("a preface");
    assert_eq!(preface, PREFACE);
    let mut out = Vec::new();
    header(kind::SETTINGS, 0, 0).write_with(&[], &mut out);
    header(kind::SETTINGS, flags::ACK, 0).write_with(&[], &mut out);
    peer.send(&out);
    while let Some((stream, fields)) = peer.headers() {
        let path = fields
            .lines()
            .find_map(|line| line.strip_prefix(":path: "))
            .expect("a path");
        let (mut block, mut out) = (Vec::new(), Vec::new());
        encode::field(b":status", b"200", false, &mut block);
        headers_of(stream, false, None, &block, 16_384, &mut out);
        header(kind::DATA, flags::END_STREAM, stream).write_with(path.as_bytes(), &mut out);
        peer.send(&out);
    }
}

fn h2_server(world: &World) {
    let mut config = server_config(world.server_ca.issue(NAME, |_| {}));
    config.alpn_protocols = vec![b"h2".to_vec()];
    world.server(move |socket| serve(accept(config.clone(), socket)));
}

fn h2_client(world: &World) -> Peer<crate::world::TlsClient> {
    let mut config = world.client_config();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Peer::client(world.client_with(config, NAME))
}

#[test]
fn allowed_and_denied_streams_share_a_connection() {
    let world = World::new(http_rules(&["/a/.*"]));
    h2_server(&world);
    let mut client = h2_client(&world);
    for (stream, path, status) in [(1, "/a/1", 200), (3, "/b", 403), (5, "/a/2", 200)] {
        client.request(stream, "GET", path, &[]);
        let (of, fields) = client.headers().expect("a response");
        assert_eq!(of, stream);
        assert!(fields.starts_with(&format!(":status: {status}\n")), "{fields}");
        if status == 200 {
            assert_eq!(client.content(), path);
        }
    }
    let view = world
        .proxy
        .connections(10)
        .into_iter()
        .next()
        .expect("a connection");
    assert_eq!((view.protocol, view.requests), ("h2", 3));
    let stats = world.proxy.stats();
    assert_eq!((stats.requests, stats.denied), (3, 1));
    let record = world.record("the denied request", |record| {
        record.verdict != palisade_inspect::record::Verdict::Forwarded
    });
    assert!(
        matches!(record.what, What::HttpRequest { version: 2, url, .. } if url.bytes() == b"https://api.example.test/b")
    );
}

#[test]
fn a_server_that_cannot_be_reached_is_said_in_words() {
    let world = World::new(http_rules(&["/a", "/pkg.Service/Method"]));
    let closed = TcpListener::bind("127.0.0.1:0").expect("a listener").local_addr();
    world.set_server(closed.expect("an address"));
    let mut client = h2_client(&world);
    client.request(1, "GET", "/a", &[]);
    let (_, fields) = client.headers().expect("a response");
    assert!(
        fields.contains(":status: 503\n") && fields.contains("x-palisade-error: connection refused"),
        "{fields}"
    );
    assert!(client.content().contains("connection refused"));
    let mut client = h2_client(&world);
    client.request(
        1,
        "POST",
        "/pkg.Service/Method",
        &[("content-type", "application/grpc"), ("te", "trailers")],
    );
    let (_, fields) = client.headers().expect("a response");
    assert!(
        fields.contains("grpc-status: 14\ngrpc-message: connection refused"),
        "{fields}"
    );
    let mut client = h2_client(&world);
    client.request(1, "GET", "/denied", &[]);
    let (_, fields) = client.headers().expect("a response");
    assert!(fields.contains(":status: 403\n"), "{fields}");
}

#[test]
fn a_connection_that_is_no_longer_intercepted_gets_a_goaway() {
    let world = World::new(http_rules(&["/a"]));
    h2_server(&world);
    let mut client = h2_client(&world);
    client.request(1, "GET", "/a", &[]);
    client.headers().expect("a response");
    assert_eq!(client.content(), "/a");
    *world.flows.request.lock().expect("the flows") = None;
    world.proxy.recheck();
    let mut kinds = Vec::new();
    while let Some((header, _)) = client.next() {
        kinds.push(header.kind);
    }
    assert!(kinds.contains(&kind::GOAWAY), "{kinds:?}");
}

#[test]
fn http2_without_tls_is_known_by_its_preface() {
    let mut set = http_rules(&["/a"]);
    (set.terminating_tls, set.originating_tls) = (None, None);
    let world = World::new(set);
    world.server(serve);
    let mut client = Peer::client(world.socket());
    client.request(1, "GET", "/a", &[]);
    let (_, fields) = client.headers().expect("a response");
    assert!(fields.starts_with(":status: 200\n"), "{fields}");
    client.request(3, "GET", "/b", &[]);
    let (_, fields) = client.headers().expect("a response");
    assert!(fields.starts_with(":status: 403\n"), "{fields}");
}

#[test]
fn an_incomplete_preface_or_header_block_has_a_deadline() {
    let world = World::with(http_rules(&["/a"]), |_, options| {
        options.head = std::time::Duration::from_millis(200);
    });
    h2_server(&world);
    let mut config = world.client_config();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let mut client = Peer::new(world.client_with(config, NAME));
    client.send(&PREFACE[..10]);
    assert!(client.next().is_none());
    let mut client = h2_client(&world);
    let mut out = Vec::new();
    header(kind::HEADERS, 0, 1).write_with(&[0x82], &mut out);
    client.send(&out);
    while client.next().is_some() {}
    assert_eq!(world.proxy.stats().timeouts, 2);
}

#[test]
fn requests_without_a_response_are_answered_when_the_server_fails() {
    let world = World::new(http_rules(&["/.*"]));
    let mut config = server_config(world.server_ca.issue(NAME, |_| {}));
    config.alpn_protocols = vec![b"h2".to_vec()];
    world.server(move |socket| {
        let mut peer = Peer::new(accept(config.clone(), socket));
        peer.stream.read_exact(&mut [0; 24]).expect("a preface");
        let mut out = Vec::new();
        header(kind::SETTINGS, 0, 0).write_with(&[], &mut out);
        let mut block = Vec::new();
        encode::field(b":status", b"200", false, &mut block);
        // The first stream has its response, the others have none.
        for stream in [1, 3, 5] {
            assert_eq!(peer.headers().expect("a request").0, stream);
        }
        headers_of(1, true, None, &block, 16_384, &mut out);
        peer.send(&out);
        // The client confirms that the response has arrived.
        while peer.next().expect("a frame").0.kind != kind::PING {}
        let linger = socket2::SockRef::from(&peer.stream.sock).set_linger(Some(std::time::Duration::ZERO));
        linger.expect("the option");
    });
    let mut client = h2_client(&world);
    client.request(1, "GET", "/a", &[]);
    client.request(3, "GET", "/b", &[]);
    client.request(
        5,
        "POST",
        "/c",
        &[("content-type", "application/grpc"), ("te", "trailers")],
    );
    assert_eq!(
        client.headers().expect("a response"),
        (1, ":status: 200\n".to_owned())
    );
    let mut ping = Vec::new();
    header(kind::PING, 0, 0).write_with(&[0; 8], &mut ping);
    client.send(&ping);
    let (stream, fields) = client.headers().expect("an answer");
    assert_eq!(stream, 3);
    assert!(
        fields.contains(":status: 503\n") && fields.contains("x-palisade-error: reset before response"),
        "{fields}"
    );
    let (stream, fields) = client.headers().expect("an answer");
    assert_eq!(stream, 5);
    assert!(fields.contains("grpc-status: 14\n"), "{fields}");
    while client.next().is_some() {}
    let failures = world.proxy.stats().failures;
    assert_eq!(
        failures[palisade_intercept::FailureKind::ResponseReset as usize],
        1
    );
}

#[test]
fn streams_that_stall_are_answered_and_others_go_on() {
    const STALLED: u32 = 60;
    let world = World::with(http_rules(&["/.*"]), |_, options| {
        options.response = Duration::from_millis(500);
    });
    let mut config = server_config(world.server_ca.issue(NAME, |_| {}));
    config.alpn_protocols = vec![b"h2".to_vec()];
    world.server(move |socket| {
        let mut peer = Peer::new(accept(config.clone(), socket));
        peer.stream.read_exact(&mut [0; 24]).expect("a preface");
        let mut out = Vec::new();
        header(kind::SETTINGS, 0, 0).write_with(&[], &mut out);
        peer.send(&out);
        // A response of which nothing follows the head, requests without a response, and after each of them one with.
        let mut canceled = 0;
        while let Some((header, payload)) = peer.next() {
            if header.kind == kind::RST_STREAM {
                canceled += 1;
            }
            if header.kind != kind::HEADERS {
                continue;
            }
            let (_, block) = fragment_of(header, &payload).expect("a block");
            let mut fields = Fields::default();
            peer.decoder.decode(block, 1 << 16, &mut fields).expect("fields");
            let path = fields.value(b":path").expect("a path").to_vec();
            let (mut block, mut out) = (Vec::new(), Vec::new());
            encode::field(b":status", b"200", false, &mut block);
            encode::field(b"x-canceled", canceled.to_string().as_bytes(), false, &mut block);
            if path != b"/stall" {
                headers_of(header.stream, path != b"/open", None, &block, 16_384, &mut out);
                peer.send(&out);
            }
        }
    });
    let mut client = h2_client(&world);
    client.request(1, "GET", "/open", &[]);
    assert!(
        client
            .headers()
            .expect("a response")
            .1
            .starts_with(":status: 200\n")
    );
    for round in 0..2 {
        let first = 3 + round * 2 * (STALLED + 1);
        for stream in 0..STALLED {
            client.request(first + stream * 2, "GET", "/stall", &[]);
        }
        for stream in 0..STALLED {
            let (answered, fields) = client.headers().expect("an answer");
            assert_eq!(answered, first + stream * 2);
            let words = "x-palisade-error: response timeout: no head of a response within 500ms";
            assert!(
                fields.starts_with(":status: 504\n") && fields.contains(words),
                "{fields}"
            );
        }
        client.request(first + STALLED * 2, "GET", "/served", &[]);
        let (_, fields) = client.headers().expect("a response");
        let canceled = format!("x-canceled: {}\n", (round + 1) * STALLED);
        assert!(
            fields.starts_with(":status: 200\n") && fields.contains(&canceled),
            "{fields}"
        );
    }
    let failures = world.proxy.stats().failures;
    let kind = palisade_intercept::FailureKind::ResponseTimeout as usize;
    assert_eq!(failures[kind], u64::from(2 * STALLED));
    assert_eq!(world.proxy.upstreams()[0].failures[kind], u64::from(2 * STALLED));
}

#[test]
fn a_server_without_settings_is_late_for_all_streams() {
    let world = World::with(http_rules(&["/.*"]), |_, options| {
        options.response = Duration::from_millis(300);
    });
    let mut config = server_config(world.server_ca.issue(NAME, |_| {}));
    config.alpn_protocols = vec![b"h2".to_vec()];
    world.server(move |socket| {
        let _ = crate::world::read_to_end(&mut accept(config.clone(), socket));
    });
    let mut client = h2_client(&world);
    let grpc = [("content-type", "application/grpc"), ("te", "trailers")];
    client.request(1, "GET", "/a", &[]);
    client.request(3, "POST", "/b", &grpc);
    let (stream, fields) = client.headers().expect("an answer");
    assert!(stream == 1 && fields.contains(":status: 504\n"), "{fields}");
    let (stream, fields) = client.headers().expect("an answer");
    assert!(stream == 3 && fields.contains("grpc-status: 4\n"), "{fields}");
}

/// Returns a world whose server sends its SETTINGS, runs `stall` once it has the request of stream 3, and returns the type
/// and stream of each frame that it gets afterwards. The end of its bytes by a close_notify is `(255, 0)`.
fn stalling_world(
    change: impl FnOnce(&mut palisade_intercept::Options),
    stall: impl Fn(&mut dyn Write) + Send + Sync + 'static,
) -> (World, std::sync::mpsc::Receiver<(u8, u32)>) {
    let world = World::with(http_rules(&["/.*"]), |_, options| change(options));
    let mut config = server_config(world.server_ca.issue(NAME, |_| {}));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (seen, frames) = std::sync::mpsc::channel();
    world.server(move |socket| {
        let mut peer = Peer::new(accept(config.clone(), socket));
        peer.stream.read_exact(&mut [0; 24]).expect("a preface");
        let mut is_stalled = false;
        while let Some((header, _)) = peer.next() {
            if is_stalled {
                let _ = seen.send((header.kind, header.stream));
            } else if header.kind == kind::HEADERS && header.stream == 3 {
                stall(&mut peer.stream);
                peer.stream.flush().expect("bytes are sent");
                is_stalled = true;
            }
        }
        if peer.stream.read(&mut [0; 1]).is_ok_and(|n| n == 0) {
            let _ = seen.send((255, 0));
        }
    });
    (world, frames)
}

/// Appends SETTINGS, and the head of a response to stream 1.
fn begin_response(out: &mut Vec<u8>) {
    header(kind::SETTINGS, 0, 0).write_with(&[], out);
    let mut block = Vec::new();
    encode::field(b":status", b"200", false, &mut block);
    headers_of(1, false, None, &block, 16_384, out);
}

#[test]
fn a_server_that_stalls_within_the_content_of_a_stream_delays_no_answer_of_another() {
    let (world, frames) = stalling_world(
        |options| options.response = Duration::from_millis(300),
        |stream| {
            let mut out = Vec::new();
            begin_response(&mut out);
            let mut content = Vec::new();
            header(kind::DATA, flags::END_STREAM, 1).write_with(b"content", &mut content);
            out.extend_from_slice(&content[..12]);
            stream.write_all(&out).expect("bytes are sent");
            stream.flush().expect("bytes are sent");
            thread::sleep(Duration::from_millis(900));
            stream.write_all(&content[12..]).expect("bytes are sent");
        },
    );
    let mut client = h2_client(&world);
    client.request(1, "GET", "/content", &[]);
    client.request(3, "GET", "/stall", &[]);
    let (stream, fields) = client.headers().expect("a response");
    assert!(stream == 1 && fields.contains(":status: 200\n"), "{fields}");
    let mut content = Vec::new();
    let mut answered = false;
    while content != b"content" {
        let (header, payload) = client.next().expect("a frame");
        match (header.kind, header.stream) {
            (kind::DATA, 1) => content.extend(payload),
            (kind::HEADERS, 3) => {
                assert_eq!(content, b"con");
                answered = true;
            }
            _ => {}
        }
    }
    assert!(answered);
    let cancel = frames.recv_timeout(PATIENCE).expect("a frame");
    assert_eq!(cancel, (kind::RST_STREAM, 3));
}

#[test]
fn a_late_server_learns_that_its_streams_are_cancelled() {
    let short = Duration::from_millis(300);
    let nothing = |_: &mut dyn Write| {};
    // Within the header of a frame.
    let within_head = |stream: &mut dyn Write| {
        let mut out = Vec::new();
        begin_response(&mut out);
        out.extend_from_slice(&[0, 0, 9]);
        stream.write_all(&out).expect("bytes are sent");
    };
    let response = move |options: &mut palisade_intercept::Options| options.response = short;
    let head = move |options: &mut palisade_intercept::Options| options.head = short;
    let idle = move |options: &mut palisade_intercept::Options| {
        options.response = Duration::ZERO;
        options.idle = short;
    };
    let worlds = [
        (stalling_world(response, nothing), 1, "504"),
        (stalling_world(head, within_head), 3, "504"),
        (stalling_world(idle, nothing), 1, "504"),
        (stalling_world(idle, within_head), 3, "504"),
    ];
    for ((world, frames), first, status) in worlds {
        let mut client = h2_client(&world);
        client.request(1, "GET", "/a", &[]);
        client.request(3, "GET", "/b", &[]);
        if first == 3 {
            let (stream, fields) = client.headers().expect("a response");
            assert!(stream == 1 && fields.contains(":status: 200\n"), "{fields}");
        }
        for expected in (first..=3).step_by(2) {
            let (stream, fields) = client.headers().expect("an answer");
            assert!(
                stream == expected && fields.contains(&format!(":status: {status}\n")),
                "{stream} {fields}"
            );
        }
        let mut seen = Vec::new();
        while seen.last() != Some(&(255, 0))
            && let Ok(frame) = frames.recv_timeout(PATIENCE)
        {
            if frame.0 != kind::SETTINGS {
                seen.push(frame);
            }
        }
        let expected = [
            (kind::RST_STREAM, 1),
            (kind::RST_STREAM, 3),
            (kind::GOAWAY, 0),
            (255, 0),
        ];
        assert_eq!(seen, expected);
    }
}

/// Content that exceeds the buffers of all sockets between two peers, bytes.
const LARGE: usize = 32 << 20;
/// Length of the frames of [`LARGE`] bytes.
const PART: usize = 16_384;

/// Appends SETTINGS and a WINDOW_UPDATE that allow the other peer all content of a test.
fn open_windows(out: &mut Vec<u8>) {
    let setting = [0, 4, 0x7f, 0xff, 0xff, 0xff];
    header(kind::SETTINGS, 0, 0).write_with(&setting, out);
    FrameHeader::window_update(0, 0x7fff_0000, out);
}

/// Sends [`LARGE`] bytes of content. `sent`: number of bytes that the socket has taken.
fn send_large(stream: &mut impl Write, id: u32, sent: &AtomicUsize) {
    let mut frame = Vec::new();
    header(kind::DATA, 0, id).write_with(&[b'x'; PART], &mut frame);
    for _ in 0..LARGE / PART {
        stream.write_all(&frame).expect("content is sent");
        sent.fetch_add(PART, Ordering::SeqCst);
    }
    stream.flush().expect("content is sent");
}

/// Reads until [`LARGE`] bytes of content have arrived.
fn read_large(peer: &mut Peer<impl Read + Write>) {
    let mut left = LARGE;
    while left > 0 {
        let (header, _) = peer.next().expect("a frame");
        if header.kind == kind::DATA {
            left -= header.length as usize;
        }
    }
}

/// Waits until a sender can send no more. The result decides only about the strength of the test.
fn wait_for_stall(sent: &AtomicUsize) {
    let mut before = usize::MAX;
    while before != sent.load(Ordering::SeqCst) {
        before = sent.load(Ordering::SeqCst);
        thread::sleep(Duration::from_millis(200));
    }
}

/// Sends a POST whose content follows.
fn post<S: Read + Write>(peer: &mut Peer<S>) {
    let mut out = PREFACE.to_vec();
    open_windows(&mut out);
    let mut block = Vec::new();
    for (name, value) in [
        (":method", "POST"),
        (":scheme", "https"),
        (":authority", NAME),
        (":path", "/a"),
    ] {
        encode::field(name.as_bytes(), value.as_bytes(), false, &mut block);
    }
    headers_of(1, false, None, &block, 16_384, &mut out);
    peer.send(&out);
}

/// Reads the head of a POST, and sends the head of its response.
fn accept_post(peer: &mut Peer<TcpStream>) {
    peer.stream.read_exact(&mut [0; 24]).expect("a preface");
    let mut out = Vec::new();
    open_windows(&mut out);
    header(kind::SETTINGS, flags::ACK, 0).write_with(&[], &mut out);
    peer.headers().expect("a request");
    let mut block = Vec::new();
    encode::field(b":status", b"200", false, &mut block);
    headers_of(1, false, None, &block, 16_384, &mut out);
    peer.send(&out);
}

#[test]
fn a_server_that_writes_before_it_reads_is_read_meanwhile() {
    let mut set = http_rules(&["/a"]);
    (set.terminating_tls, set.originating_tls) = (None, None);
    let world = World::new(set);
    let uploaded = Arc::new(AtomicUsize::new(0));
    let sent = Arc::clone(&uploaded);
    world.server(move |socket| {
        let mut peer = Peer::new(socket);
        accept_post(&mut peer);
        wait_for_stall(&sent);
        peer.stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        send_large(&mut peer.stream, 1, &AtomicUsize::new(0));
        read_large(&mut peer);
        let mut out = Vec::new();
        header(kind::DATA, flags::END_STREAM, 1).write_with(b"all", &mut out);
        peer.send(&out);
        let _ = peer.next();
    });
    let socket = world.socket();
    let mut upload = socket.try_clone().expect("a socket");
    let mut client = Peer::new(socket);
    post(&mut client);
    // The server's windows have arrived with its response.
    client.headers().expect("a response");
    let upload = thread::spawn(move || send_large(&mut upload, 1, &uploaded));
    read_large(&mut client);
    assert_eq!(client.content(), "all");
    upload.join().expect("the content is sent");
}

#[test]
fn a_client_that_writes_before_it_reads_is_read_meanwhile() {
    let mut set = http_rules(&["/a"]);
    set.originating_tls = None;
    let world = World::new(set);
    world.server(|socket| {
        let mut download = socket.try_clone().expect("a socket");
        let mut peer = Peer::new(socket);
        accept_post(&mut peer);
        let sent = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&sent);
        let download = thread::spawn(move || {
            send_large(&mut download, 1, &count);
            download
        });
        wait_for_stall(&sent);
        read_large(&mut peer);
        let mut download = download.join().expect("the content is sent");
        let mut out = Vec::new();
        header(kind::DATA, flags::END_STREAM, 1).write_with(b"all", &mut out);
        download.write_all(&out).expect("frames are sent");
        let _ = peer.next();
    });
    let mut config = world.client_config();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let mut client = Peer::new(world.client_with(config, NAME));
    post(&mut client);
    // The server's windows have arrived with its response.
    client.headers().expect("a response");
    client
        .stream
        .sock
        .set_write_timeout(Some(PATIENCE))
        .expect("a timeout");
    send_large(&mut client.stream, 1, &AtomicUsize::new(0));
    read_large(&mut client);
    assert_eq!(client.content(), "all");
}

/// Returns the properties of the frames for stream 1, and of GOAWAY, up to the end of the stream of bytes.
fn rest(peer: &mut Peer<impl Read + Write>) -> Vec<(u8, u8, Vec<u8>)> {
    let mut all = Vec::new();
    while let Some((header, payload)) = peer.next() {
        if header.stream == 1 || header.kind == kind::GOAWAY {
            all.push((header.kind, header.flags, payload));
        }
    }
    all
}

/// Sends `count` full frames of content on stream 1.
fn send_parts(peer: &mut Peer<impl Read + Write>, count: usize, flags: u8) {
    let mut out = Vec::new();
    for _ in 0..count {
        header(kind::DATA, flags, 1).write_with(&[b'x'; PART], &mut out);
    }
    peer.send(&out);
}

/// Waits until the proxy has returned window for `bytes` bytes of content.
fn wait_for_windows(peer: &mut Peer<impl Read + Write>, mut bytes: usize) {
    while bytes > 0 {
        let (header, payload) = peer.next().expect("a frame");
        assert_ne!(header.kind, kind::RST_STREAM, "the stream is not reset");
        if header.kind == kind::WINDOW_UPDATE && header.stream == 1 {
            bytes -= u32::from_be_bytes(payload.try_into().expect("four bytes")) as usize;
        }
    }
}

#[test]
fn an_upload_that_is_answered_early_can_be_sent_to_its_end() {
    let world = World::new(http_rules(&["/a"]));
    let closed = TcpListener::bind("127.0.0.1:0").expect("a listener").local_addr();
    world.set_server(closed.expect("an address"));
    let mut config = world.client_config();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let mut client = Peer::new(world.client_with(config, NAME));
    post(&mut client);
    let (_, fields) = client.headers().expect("a response");
    assert!(fields.starts_with(":status: 503\n"), "{fields}");
    assert!(client.content().contains("connection refused"));
    for _ in 0..16 {
        send_parts(&mut client, 3, 0);
        wait_for_windows(&mut client, 3 * PART);
    }
    send_parts(&mut client, 1, flags::END_STREAM);
    let rest = rest(&mut client);
    let last: Vec<u8> = [1, 0]
        .iter()
        .flat_map(|number: &u32| number.to_be_bytes())
        .collect();
    assert_eq!(rest, [(kind::GOAWAY, 0, last)]);
}

#[test]
fn an_upload_whose_server_fails_can_be_sent_to_its_end() {
    let mut set = http_rules(&["/a"]);
    set.originating_tls = None;
    let world = World::new(set);
    world.server(|socket| {
        let mut peer = Peer::new(socket);
        peer.stream.read_exact(&mut [0; 24]).expect("a preface");
        let mut out = Vec::new();
        header(kind::SETTINGS, 0, 0).write_with(&[], &mut out);
        peer.headers().expect("a request");
        peer.send(&out);
        // The begin of a frame, whose rest comes after the failure.
        peer.stream.read_exact(&mut [0; 1000]).expect("content");
        let linger = socket2::SockRef::from(&peer.stream).set_linger(Some(Duration::ZERO));
        linger.expect("the option");
    });
    let mut config = world.client_config();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let mut client = Peer::new(world.client_with(config, NAME));
    post(&mut client);
    let mut frame = Vec::new();
    header(kind::DATA, 0, 1).write_with(&[b'x'; PART], &mut frame);
    let (begin, end) = frame.split_at(5000);
    assert_eq!(client.next().expect("a frame").0.kind, kind::SETTINGS);
    client.send(begin);
    let (_, fields) = client.headers().expect("a response");
    assert!(
        fields.contains("x-palisade-error: reset before response"),
        "{fields}"
    );
    client.content();
    client.send(end);
    send_parts(&mut client, 2, 0);
    wait_for_windows(&mut client, end.len() + 2 * PART);
    send_parts(&mut client, 1, flags::END_STREAM);
    let rest = rest(&mut client);
    assert_eq!(rest.len(), 1, "{rest:?}");
    assert_eq!(rest[0].0, kind::GOAWAY);
}

#[test]
fn answers_to_several_requests_announce_no_growing_last_stream() {
    let world = World::new(http_rules(&["/a"]));
    let closed = TcpListener::bind("127.0.0.1:0").expect("a listener").local_addr();
    world.set_server(closed.expect("an address"));
    let mut config = world.client_config();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let mut client = Peer::new(world.client_with(config, NAME));
    // One write, so that the requests arrive together.
    let mut out = PREFACE.to_vec();
    header(kind::SETTINGS, 0, 0).write_with(&[], &mut out);
    for stream in [1, 3, 5] {
        let mut block = Vec::new();
        for (name, value) in [
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", NAME),
            (":path", "/a"),
        ] {
            encode::field(name.as_bytes(), value.as_bytes(), false, &mut block);
        }
        headers_of(stream, true, None, &block, 16_384, &mut out);
    }
    client.send(&out);
    let mut lasts = Vec::new();
    let mut answered = 0;
    while let Some((header, payload)) = client.next() {
        if header.kind == kind::GOAWAY {
            let last: [u8; 4] = payload[..4].try_into().expect("four bytes");
            lasts.push(u32::from_be_bytes(last));
        }
        answered += u32::from(header.kind == kind::HEADERS);
    }
    assert_eq!((answered, lasts), (3, vec![5]));
}

#[test]
fn a_trickle_of_bytes_does_not_extend_the_deadline_of_a_header_block() {
    let world = World::with(http_rules(&["/a"]), |_, options| {
        options.head = Duration::from_secs(2);
    });
    h2_server(&world);
    let mut client = h2_client(&world);
    let mut out = Vec::new();
    header(kind::HEADERS, 0, 1).write_with(&[0; 10_000], &mut out);
    client.send(&out[..9]);
    let is_reset = out[9..].chunks(1).take(1000).any(|byte| {
        thread::sleep(Duration::from_millis(20));
        client
            .stream
            .write_all(byte)
            .and_then(|()| client.stream.flush())
            .is_err()
    });
    assert!(is_reset);
    assert_eq!(world.proxy.stats().timeouts, 1);
}
