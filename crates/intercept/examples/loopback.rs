//! Measures the proxy on loopback against direct connections: full handshakes with one request each, requests on one
//! connection, and a large download. `cargo run --release -p palisade-intercept --example loopback`

#[allow(dead_code, reason = "only a part of the helpers of the tests is needed")]
#[path = "../tests/proxy/world.rs"]
mod world;

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::{ClientConfig, ClientConnection, StreamOwned, client::Resumption, pki_types::ServerName};
use world::{NAME, World, get, http_rules, read_head, send};

const TIME: Duration = Duration::from_secs(3);
const DOWNLOAD: usize = 1 << 30;

fn connect(config: &Arc<ClientConfig>, to: SocketAddr) -> world::TlsClient {
    let socket = TcpStream::connect(to).expect("a connection");
    socket.set_nodelay(true).expect("the option");
    let name = ServerName::try_from(NAME).expect("a name");
    let tls = ClientConnection::new(config.clone(), name).expect("a client");
    StreamOwned::new(tls, socket)
}

/// Returns the number of times per second that `once` runs.
fn rate(mut once: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut times = 0;
    while start.elapsed() < TIME {
        once();
        times += 1;
    }
    f64::from(times) / start.elapsed().as_secs_f64()
}

/// Returns the processor time of the proxy's thread so far, s.
fn processor_time() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("the threads");
    let ticks = tasks.flatten().filter_map(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        let (name, rest) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
        name.contains("(intercept-").then_some(ticks(11)? + ticks(12)?)
    });
    ticks.sum::<f64>() / 100.0
}

fn main() {
    let world = World::new(http_rules(&["/.*"]));
    let server = world.tls_server(|stream| {
        let part = vec![0; 1 << 20];
        while let Some(head) = read_head(stream) {
            if head.starts_with("GET /large") {
                send(
                    stream,
                    format!("HTTP/1.1 200 OK\r\nContent-Length: {DOWNLOAD}\r\n\r\n"),
                );
                for _ in 0..DOWNLOAD / part.len() {
                    if stream.write_all(&part).is_err() {
                        return;
                    }
                }
            } else {
                send(stream, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
            }
        }
    });
    let config = |roots| {
        let mut config = ClientConfig::builder_with_provider(world::provider())
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.resumption = Resumption::disabled();
        Arc::new(config)
    };
    let ways = [
        ("direct", config(world.server_ca.roots()), server),
        ("proxy", config(world.client_ca.roots()), world.address()),
    ];
    for (name, config, to) in &ways {
        let t0 = processor_time();
        let handshakes = rate(|| {
            assert_eq!(get(&mut connect(config, *to), "/a").status, 200);
        });
        let t1 = processor_time();
        let mut client = connect(config, *to);
        let requests = rate(|| assert_eq!(get(&mut client, "/a").status, 200));
        let t2 = processor_time();
        let mut client = connect(config, *to);
        send(
            &mut client,
            format!("GET /large HTTP/1.1\r\nHost: {NAME}\r\n\r\n"),
        );
        read_head(&mut client).expect("a response");
        let start = Instant::now();
        let mut part = vec![0; 1 << 18];
        let mut left = DOWNLOAD;
        while left > 0 {
            let n = client.read(&mut part).expect("the body");
            assert!(n > 0, "the body ends early");
            left -= n;
        }
        let speed = DOWNLOAD as f64 / start.elapsed().as_secs_f64() / 1e6;
        let t3 = processor_time();
        let seconds = TIME.as_secs_f64();
        println!(
            "{name}: processor time of the proxy: {:.0} us a connection, {:.1} us a request, {:.2} s a GiB",
            (t1 - t0) * 1e6 / (handshakes * seconds),
            (t2 - t1) * 1e6 / (requests * seconds),
            t3 - t2
        );
        println!("{name}: {handshakes:.0} handshakes/s, {requests:.0} requests/s, {speed:.0} MB/s");
    }
}
