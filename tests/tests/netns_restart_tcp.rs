//! Inspected connections when the daemon dies: their state is lost, so both ends are reset, with sequence numbers that they
//! accept.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    topology::{FAMILIES, Family},
};
use palisade_tests::fixtures::apps::{Apps, OK, apps, policy};

const PORT: u16 = 80;
/// Longest time until an end learns that the connection is over: some retransmissions.
const SOON: Duration = Duration::from_secs(8);

const RULES: &str = "      rules:\n        http: [{method: \"GET|POST\", path: \"/.*\"}]\n";
const GET: &[u8] = b"GET /a HTTP/1.1\r\nHost: x.example\r\n\r\n";
/// Beginning of a response of unknown length.
const CHUNKED: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n";

struct Pair {
    client: TcpStream,
    server: TcpStream,
    /// For each end, whether a write or read has failed with a reset.
    told: [bool; 2],
}

impl Pair {
    /// Opens a connection on which a request has reached the server.
    fn open(apps: &Apps, listener: &TcpListener, request: &[u8]) -> Self {
        let at = listener.local_addr().expect("address");
        let mut client = apps
            .ns("client")
            .enter(|| TcpStream::connect_timeout(&at, SOON))
            .expect("connection");
        let (mut server, _) = listener.accept().expect("connection");
        for stream in [&client, &server] {
            stream.set_nodelay(true).expect("option");
            stream.set_read_timeout(Some(SOON)).expect("timeout");
        }
        client.write_all(request).expect("request");
        take(&mut server, request);
        Self {
            client,
            server,
            told: [false; 2],
        }
    }

    /// Sends from the client; the client may have been reset before.
    fn client_says(&mut self, bytes: &[u8]) {
        self.told[0] |= is_refused(self.client.write_all(bytes));
    }

    /// Sends from the server.
    fn server_says(&mut self, bytes: &[u8]) {
        self.told[1] |= is_refused(self.server.write_all(bytes));
    }
}

fn is_refused(said: io::Result<()>) -> bool {
    match said {
        Ok(()) => false,
        Err(error) if error.kind() == ErrorKind::ConnectionReset => true,
        Err(error) => panic!("{error}"),
    }
}

/// Reads exactly these bytes.
fn take(stream: &mut TcpStream, expected: &[u8]) {
    let mut got = vec![0; expected.len()];
    stream.read_exact(&mut got).expect("bytes");
    assert_eq!(got, expected);
}

/// Returns whether the stream ends with a reset in time.
fn is_reset(stream: &mut TcpStream) -> bool {
    let until = Instant::now() + SOON;
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(n) if n > 0 && Instant::now() < until => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => return other.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset),
        }
    }
}

fn listener(apps: &Apps, family: Family) -> TcpListener {
    let at = apps.at("internet", family, PORT);
    apps.ns("internet")
        .enter(|| TcpListener::bind(at))
        .expect("listener")
}

fn start(apps: &Apps) -> Daemon {
    apps.daemon(
        &Settings::default(),
        &[("p.yaml", &policy("client", "egress", &[PORT], RULES))],
    )
    .expect("daemon")
}

#[track_caller]
fn both_are_reset(what: &str, pair: &mut Pair, daemon: &Daemon) {
    let server = thread::scope(|scope| {
        let server = scope.spawn(|| pair.told[1] || is_reset(&mut pair.server));
        let client = pair.told[0] || is_reset(&mut pair.client);
        (client, server.join().expect("server"))
    });
    assert_eq!(
        server,
        (true, true),
        "{what}: client, server\n{}",
        daemon.report()
    );
}

#[test]
fn both_ends_of_a_keep_alive_connection_are_reset_after_a_restart() {
    let apps = apps();
    let mut daemon = start(&apps);
    for family in FAMILIES {
        let listener = listener(&apps, family);
        let mut by_client = Pair::open(&apps, &listener, GET);
        let mut by_server = Pair::open(&apps, &listener, GET);
        let mut chunked = Pair::open(&apps, &listener, GET);
        for pair in [&mut by_client, &mut by_server] {
            pair.server.write_all(OK).expect("answer");
            take(&mut pair.client, OK);
        }
        chunked.server.write_all(CHUNKED).expect("answer");
        take(&mut chunked.client, CHUNKED);
        // Until delayed acknowledgements have been sent.
        thread::sleep(Duration::from_millis(300));
        daemon.kill9().expect("kill -9");
        daemon.restart().expect("restart");
        by_client.client_says(GET);
        by_server.server_says(OK);
        chunked.server_says(b"5\r\nhello\r\n");
        both_are_reset("the client sends first", &mut by_client, &daemon);
        both_are_reset("the server sends first", &mut by_server, &daemon);
        both_are_reset("a chunked answer", &mut chunked, &daemon);
    }
}

#[test]
fn an_acknowledgement_lost_with_the_daemon_leaves_no_end_waiting() {
    let apps = apps();
    let mut daemon = start(&apps);
    for family in FAMILIES {
        let listener = listener(&apps, family);
        // The client has received the response, but the server has no acknowledgement of it.
        let mut answer = Pair::open(&apps, &listener, GET);
        // The same for the client.
        let post = b"POST /a HTTP/1.1\r\nHost: x.example\r\nContent-Length: 100\r\n\r\n0123456789";
        let mut upload = Pair::open(&apps, &listener, post);
        // Bare acknowledgements get lost until the delayed one is over.
        thread::sleep(Duration::from_millis(300));
        for (name, field) in [("client", "dport"), ("internet", "sport")] {
            apps.ns(name)
                .nft(&format!(
                    "table inet loss {{\nchain o {{\ntype filter hook output priority 0;\n\
                     tcp {field} {PORT} tcp flags & (fin | syn | rst | psh | ack) == ack drop;\n}}\n}}\n"
                ))
                .expect("nft");
        }
        answer.server.write_all(OK).expect("answer");
        take(&mut answer.client, OK);
        upload.client.write_all(b"0123456789").expect("body");
        take(&mut upload.server, b"0123456789");
        daemon.kill9().expect("kill -9");
        for name in ["client", "internet"] {
            apps.ns(name).nft("delete table inet loss\n").expect("nft");
        }
        daemon.restart().expect("restart");
        both_are_reset("the answer's acknowledgement", &mut answer, &daemon);
        both_are_reset("the body's acknowledgement", &mut upload, &daemon);
    }
}
