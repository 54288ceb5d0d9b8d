//! Limits: connections, time, memory, and threads that fail.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use palisade_abi::{Direction, Reason};
use palisade_inspect::record::{Verdict, What};
use palisade_intercept::{Flow, Flows, Options, Proxy};

use crate::world::{NAME, PATIENCE, World, get, http_rules, read_answer, read_to_end, send, serve_http};

/// Returns the endpoints of the connections that a limit has ended, and the details of their records.
fn limit_records(world: &World) -> Vec<(u16, &'static str)> {
    let records = world.reports.0.lock().expect("the records");
    let of_limits = records
        .iter()
        .filter(|record| (record.verdict, record.reason) == (Verdict::Dropped, Reason::InspectLimit));
    of_limits
        .map(|record| match record.what {
            What::Unreadable { detail } => (record.endpoint, detail),
            _ => panic!("{record:?}"),
        })
        .collect()
}

#[test]
fn one_endpoint_cannot_take_all_connections() {
    let world = World::with(http_rules(&["/.*"]), |_, options| {
        options.connections = 8;
        options.endpoint_connections = 4;
    });
    world.http_server();
    let flood: Vec<TcpStream> = (0..20).filter_map(|_| world.socket_or_reset()).collect();
    world.wait("the flood has its share", |world| {
        world.proxy.stats().limited == 16
    });
    assert_eq!(world.proxy.stats().open, 4);
    let records = limit_records(&world);
    assert!(
        records.len() == 16
            && records
                .iter()
                .all(|record| *record == (9, "the endpoint has its share of the proxy's connections")),
        "{records:?}"
    );
    // Another endpoint is served.
    let socket = connect_as(&world, 10);
    let name = rustls::pki_types::ServerName::try_from(NAME).expect("a name");
    let tls = rustls::ClientConnection::new(Arc::new(world.client_config()), name).expect("a client");
    let mut other = rustls::StreamOwned::new(tls, socket);
    assert_eq!(get(&mut other, "/a").status, 200);
    drop(flood);
}

#[test]
fn a_client_without_a_hello_is_reset_after_the_deadline() {
    let world = World::with(http_rules(&["/.*"]), |_, options| {
        options.handshake = Duration::from_millis(100);
    });
    world.http_server();
    let mut socket = world.socket();
    let (_, end) = read_to_end(&mut socket);
    end.expect_err("reset");
    assert_eq!(world.proxy.stats().timeouts, 1);
}

#[test]
fn an_incomplete_head_has_a_deadline_and_a_slow_response_has_none() {
    let world = World::with(http_rules(&["/.*"]), |_, options| {
        options.head = Duration::from_millis(200);
    });
    world.tls_server(|stream| {
        crate::world::read_head(stream).expect("a request");
        thread::sleep(Duration::from_millis(600));
        send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
        serve_http(stream);
    });
    let mut client = world.client();
    let request = format!("GET /a HTTP/1.1\r\nHost: {NAME}\r\n\r\n");
    send(&mut client, request.repeat(2));
    assert_eq!(read_answer(&mut client).body, "ok");
    assert_eq!(read_answer(&mut client).body, "GET /a 0");
    let mut client = world.client();
    send(&mut client, "GET /a HTTP/1.1\r\nHost: ");
    let (_, end) = read_to_end(&mut client);
    end.expect_err("reset");
}

#[test]
fn an_idle_connection_is_closed_after_its_time() {
    let world = World::with(http_rules(&["/.*"]), |_, options| {
        options.idle = Duration::from_millis(200);
    });
    world.http_server();
    let mut client = world.client();
    assert_eq!(get(&mut client, "/a").status, 200);
    let (_, end) = read_to_end(&mut client);
    end.expect_err("reset");
    world.wait("the connection is gone", |world| world.proxy.stats().open == 0);
}

#[test]
fn streams_that_are_not_tls_are_refused() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"[..],
        // A handshake record that announces a message of 16 MiB.
        &[22, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff],
        // Alerts and a ChangeCipherSpec in place of a hello.
        &[21, 3, 1, 0, 2, 1, 0],
        &[20, 3, 1, 0, 1, 1],
        &[0; 64],
    ] {
        let mut socket = world.socket();
        let _ = socket.write_all(bytes);
        let (answer, _) = read_to_end(&mut socket);
        assert!(answer.len() < 16, "{answer:?}");
    }
    assert_eq!(world.proxy.stats().hellos_refused, 5);
    assert_eq!(get(&mut world.client(), "/a").status, 200);
}

/// Sends records until the proxy resets the connection or `most` bytes are sent. Returns the number of bytes.
fn flood(socket: &mut TcpStream, record: &[u8], most: usize) -> usize {
    let block = record.repeat(1000);
    let mut sent = 0;
    while sent < most {
        match socket.write(&block) {
            Ok(n) => sent += n,
            Err(_) => break,
        }
    }
    sent
}

#[test]
fn floods_of_records_without_content_end_the_connection() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    // Records after a completed handshake must be encrypted, so these floods come within it.
    let config = Arc::new(world.client_config());
    let hello = || {
        let name = rustls::pki_types::ServerName::try_from(NAME).expect("a name");
        let mut tls = rustls::ClientConnection::new(config.clone(), name).expect("a client");
        let mut hello = Vec::new();
        tls.write_tls(&mut hello).expect("a hello");
        hello
    };
    for record in [
        // ChangeCipherSpec.
        &[20, 3, 3, 0, 1, 1][..],
        // The warning no_renegotiation.
        &[21, 3, 3, 0, 2, 1, 100],
        // Empty application data.
        &[23, 3, 3, 0, 0],
    ] {
        let mut socket = world.socket();
        socket.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        socket.write_all(&hello()).expect("the hello is sent");
        let sent = flood(&mut socket, record, 64 << 20);
        assert!(sent < 64 << 20, "{record:?}: the proxy has read {sent} bytes");
    }
    assert_eq!(get(&mut world.client(), "/a").status, 200);
}

#[test]
fn a_client_that_does_not_read_holds_up_only_itself() {
    let world = World::new(http_rules(&["/.*"]));
    world.tls_server(|stream| {
        while crate::world::read_head(stream).is_some() {
            let length = 64 << 20;
            if stream
                .write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n").as_bytes())
                .is_err()
            {
                return;
            }
            let part = vec![0; 1 << 20];
            for _ in 0..64 {
                if stream.write_all(&part).is_err() {
                    return;
                }
            }
        }
    });
    let mut lazy = world.client();
    send(&mut lazy, format!("GET /a HTTP/1.1\r\nHost: {NAME}\r\n\r\n"));
    crate::world::read_head(&mut lazy).expect("a response");
    // Wait until no more bytes arrive from the server.
    let mut last = 0;
    let mut same = 0;
    while same < 20 {
        let now = world.proxy.stats().bytes_from_servers;
        same = if now == last { same + 1 } else { 0 };
        last = now;
        thread::sleep(Duration::from_millis(10));
    }
    assert!(
        last < 64 << 20,
        "{last} bytes were read for a client that does not read"
    );
    let mut eager = world.client();
    send(&mut eager, format!("GET /b HTTP/1.1\r\nHost: {NAME}\r\n\r\n"));
    crate::world::read_head(&mut eager).expect("a response");
    let mut body = vec![0; 64 << 20];
    eager.read_exact(&mut body).expect("the body");
    // The lazy client gets all of its bytes in the end.
    lazy.read_exact(&mut body).expect("the body");
}

/// Flows that panic once.
struct Panicking {
    inner: Arc<crate::world::TestFlows>,
    panics: AtomicBool,
}

impl Flows for Panicking {
    fn removals(&self) -> u64 {
        self.inner.removals()
    }

    fn find(&self, direction: Direction, client: SocketAddr, server: SocketAddr) -> Option<Flow> {
        assert!(!self.panics.swap(false, Ordering::SeqCst), "a panic for the test");
        self.inner.find(direction, client, server)
    }
}

#[test]
fn a_thread_that_panics_is_restarted_and_its_connections_are_reset() {
    let world = World::new(http_rules(&["/.*"]));
    let server = world.http_server();
    let flows = Arc::new(Panicking {
        inner: world.flows.clone(),
        panics: AtomicBool::new(false),
    });
    let options = Options {
        threads: 1,
        ..Options::default()
    };
    let proxy = Proxy::start_on_loopback(
        options,
        Direction::Egress,
        Arc::new(move |_| Some(server)),
        flows.clone(),
        world.reports.clone(),
        world.settings.clone(),
    )
    .expect("the proxy starts");
    let connect = || {
        let socket = TcpStream::connect(proxy.addresses()[0].1).expect("the proxy accepts");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let name = rustls::pki_types::ServerName::try_from(NAME).expect("a name");
        let tls = rustls::ClientConnection::new(Arc::new(world.client_config()), name).expect("a client");
        rustls::StreamOwned::new(tls, socket)
    };
    let mut before = connect();
    assert_eq!(get(&mut before, "/a").status, 200);
    flows.panics.store(true, Ordering::SeqCst);
    let mut cause = connect();
    let _ = cause.write_all(b"GET");
    let (_, end) = read_to_end(&mut before);
    end.expect_err("the open connection is reset");
    assert_eq!(get(&mut connect(), "/a").status, 200, "the thread serves again");
    let state = &proxy.threads()[0];
    assert_eq!((state.restarts, state.is_running), (1, true));
    assert!(
        state
            .failure
            .as_ref()
            .is_some_and(|text| text.contains("a panic for the test"))
    );
}

/// Opens a connection of another endpoint, which the flows know by the port of the client.
fn connect_as(world: &World, endpoint: u16) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket
        .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
        .expect("an address");
    let address = socket.local_addr().expect("an address").as_socket();
    let port = address.expect("an address").port();
    world
        .flows
        .endpoints
        .lock()
        .expect("the endpoints")
        .insert(port, endpoint);
    socket
        .connect(&world.address().into())
        .expect("the proxy accepts");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    socket.into()
}

#[test]
fn a_full_table_takes_the_connection_that_is_idle_for_the_longest_time_from_the_largest_endpoint() {
    let world = World::with(http_rules(&["/.*"]), |_, options| {
        options.connections = 4;
        options.endpoint_connections = 4;
    });
    world.http_server();
    let mut oldest = world.socket();
    world.wait("the first is open", |world| world.proxy.stats().open == 1);
    thread::sleep(Duration::from_millis(20));
    let rest: Vec<TcpStream> = (0..3).map(|_| world.socket()).collect();
    world.wait("the table is full", |world| world.proxy.stats().open == 4);
    let other = connect_as(&world, 10);
    let (_, end) = read_to_end(&mut oldest);
    end.expect_err("the oldest is reset");
    world.wait("the other endpoint is in", |world| {
        world.proxy.stats().accepted == 5
    });
    let endpoints = world.proxy.connections(10);
    let endpoints: Vec<u16> = endpoints.iter().map(|view| view.endpoint).collect();
    assert_eq!(endpoints.iter().filter(|endpoint| **endpoint == 9).count(), 3);
    assert_eq!(endpoints.iter().filter(|endpoint| **endpoint == 10).count(), 1);
    // A further connection of the largest endpoint takes none from itself.
    if let Some(mut refused) = world.socket_or_reset() {
        let (_, end) = read_to_end(&mut refused);
        end.expect_err("refused");
    }
    assert_eq!(
        limit_records(&world),
        [
            (
                9,
                "idle connection ended for one of another endpoint: the proxy has no room"
            ),
            (9, "the proxy has no room for further connections")
        ]
    );
    drop((rest, other));
}

#[test]
fn a_flood_of_connections_beyond_a_limit_has_few_records() {
    let world = World::with(http_rules(&["/.*"]), |_, options| {
        options.connections = 2;
        options.endpoint_connections = 1;
    });
    let begun = std::time::Instant::now();
    let flood: Vec<TcpStream> = (0..300).filter_map(|_| world.socket_or_reset()).collect();
    world.wait("the flood is refused", |world| world.proxy.stats().limited == 299);
    let seconds = begun.elapsed().as_secs() as usize + 2;
    let records = limit_records(&world).len();
    assert!(
        (100..=100 * seconds).contains(&records),
        "{records} in {seconds} s"
    );
    drop(flood);
}

/// Returns the resident memory of the process, KiB.
fn memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("the status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    kib.and_then(|kib| kib.parse().ok()).expect("a number")
}

#[test]
fn key_updates_and_records_of_one_byte_take_no_memory() {
    let world = World::new(http_rules(&["/.*"]));
    world.tls_server(|stream| {
        let _ = stream.flush();
        let _ = stream.read(&mut [0; 1]);
        thread::sleep(PATIENCE);
    });
    let mut client = world.client();
    send(
        &mut client,
        format!("PUT /a HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: 4000000000\r\n\r\n"),
    );
    client.sock.set_nonblocking(true).expect("the option");
    let before = memory();
    let mut pending: Vec<u8> = Vec::new();
    let (mut sent, mut stuck) = (0_usize, 0);
    // The client never reads, so the answers to its key updates have nowhere to go.
    while sent < 4 << 20 && stuck < 200 {
        if pending.is_empty() {
            for _ in 0..50 {
                client.conn.refresh_traffic_keys().expect("a key update");
                client.conn.writer().write_all(b"x").expect("a byte");
                while client.conn.wants_write() {
                    client.conn.write_tls(&mut pending).expect("records");
                }
            }
        }
        match client.sock.write(&pending) {
            Ok(n) => {
                pending.drain(..n);
                sent += n;
                stuck = 0;
            }
            Err(_) => {
                stuck += 1;
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
    let grown = memory().saturating_sub(before);
    assert!(grown < 32 << 10, "{grown} KiB more after {sent} bytes");
    drop(client);
    world.wait("the connection is gone", |world| world.proxy.stats().open == 0);
    world.http_server();
    assert_eq!(get(&mut world.client(), "/a").status, 200);
}

#[test]
fn mutated_handshakes_end_no_thread() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    let mut config = world.client_config();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let name = rustls::pki_types::ServerName::try_from(NAME).expect("a name");
    let mut tls = rustls::ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut hello = Vec::new();
    tls.write_tls(&mut hello).expect("a hello");
    // Numerical Recipes' generator: the same mutations in each run.
    let mut state = 1_u32;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % below
    };
    for _ in 0..600 {
        let mut bytes = hello.clone();
        for _ in 0..=random(3) {
            let at = random(bytes.len());
            match random(4) {
                0 => bytes[at] = random(256) as u8,
                1 => bytes[at] ^= 1 << random(8),
                2 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, random(256) as u8),
            }
        }
        // Records after the hello, as they are or cut.
        bytes.extend((0..random(40)).map(|_| random(256) as u8));
        let mut socket = world.socket();
        let _ = socket.write_all(&bytes);
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let _ = read_to_end(&mut socket);
    }
    assert_eq!(world.proxy.threads()[0].restarts, 0);
    assert_eq!(get(&mut world.client(), "/a").status, 200);
}

#[test]
fn a_connection_has_one_deadline() {
    let mut set = http_rules(&["/.*"]);
    (set.terminating_tls, set.originating_tls) = (None, None);
    let world = World::with(set, |_, options| {
        options.connect = Duration::from_millis(100);
    });
    world.server(|mut socket| serve_http(&mut socket));
    let mut client = world.socket();
    assert_eq!(get(&mut client, "/a").status, 200);
    // The deadline of the connect passes, and that of the idle connection follows.
    std::thread::sleep(Duration::from_millis(300));
    // The deadline of the head is earlier.
    send(&mut client, "GET /b HTTP/1.1\r\n");
    std::thread::sleep(Duration::from_millis(100));
    send(&mut client, format!("Host: {NAME}\r\n\r\n"));
    assert_eq!(read_answer(&mut client).status, 200);
    // The thread checks that it has no second deadline.
    assert_eq!(world.proxy.stats().restarts, 0);
}
