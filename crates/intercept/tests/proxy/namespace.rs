//! Sockets in a network namespace. Needs root; without it, the tests do nothing.

use std::{
    fs::File,
    net::TcpStream,
    os::fd::BorrowedFd,
    process::Command,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, unshare};
use palisade_abi::Direction;
use palisade_intercept::{FailureKind, Listeners, Namespace, Options, Proxy};
use rustls::{ClientConnection, StreamOwned, pki_types::ServerName};

use crate::world::{NAME, PATIENCE, World, field, get, http_rules, read_to_end};

/// Listeners that were registered: their direction and whether they are of IPv6.
#[derive(Default)]
struct Registered(Mutex<Vec<(Direction, bool)>>);

impl Listeners for Registered {
    fn register(&self, direction: Direction, _: BorrowedFd<'_>, is_v6: bool) -> std::io::Result<()> {
        self.0.lock().expect("the list").push((direction, is_v6));
        Ok(())
    }
}

/// Moves the calling thread to a new namespace. Returns `None` without root.
fn own_namespace() -> Option<Namespace> {
    unshare(CloneFlags::CLONE_NEWNET).ok()?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    if !up.is_ok_and(|status| status.success()) {
        return None;
    }
    let fd = File::open("/proc/thread-self/ns/net").expect("the namespace");
    Some(Namespace {
        direction: Direction::Egress,
        fd: fd.into(),
    })
}

#[test]
fn listeners_are_in_the_namespace_of_their_direction() {
    let world = World::new(http_rules(&["/.*"]));
    *world.flows.request.lock().expect("the flows") = None;
    let test = || {
        let Some(namespace) = own_namespace() else {
            return;
        };
        let registered = Registered::default();
        let options = Options {
            threads: 3,
            ..Options::default()
        };
        let start = |listeners: &Registered| {
            Proxy::start(
                options,
                vec![namespace],
                listeners,
                world.flows.clone(),
                world.reports.clone(),
                world.settings.clone(),
            )
        };
        // The proxy starts from a thread in another namespace.
        let proxy = thread::scope(|scope| {
            scope
                .spawn(|| {
                    unshare(CloneFlags::CLONE_NEWNET).expect("another namespace");
                    start(&registered)
                })
                .join()
                .expect("the thread ends")
        })
        .expect("the proxy starts");
        let expected = [(Direction::Egress, false), (Direction::Egress, true)];
        assert_eq!(*registered.0.lock().expect("the list"), expected);
        for address in ["127.0.0.1:1", "[::1]:1"] {
            let (_, end) = read_to_end(&mut TcpStream::connect(address).expect("a listener"));
            end.expect_err("no flow is known, so the connection is reset");
        }
        assert_eq!(proxy.stats().unknown, 2);
    };
    thread::scope(|scope| scope.spawn(test).join().expect("the test passes"));
}

/// In the proxy's own namespace, the connection to the server has the addresses and ports of the client's own socket.
#[test]
fn a_port_that_stays_in_use_is_a_failure_of_its_own() {
    let world = World::new(http_rules(&["/.*"]));
    let test = || {
        let Some(namespace) = own_namespace() else {
            return;
        };
        let options = Options {
            threads: 1,
            connect: Duration::from_millis(300),
            ..Options::default()
        };
        let proxy = Proxy::start(
            options,
            vec![namespace],
            &Registered::default(),
            world.flows.clone(),
            world.reports.clone(),
            world.settings.clone(),
        )
        .expect("the proxy starts");
        for address in ["127.0.0.1:1", "[::1]:1"] {
            let socket = TcpStream::connect(address).expect("a listener");
            socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            let name = ServerName::try_from(NAME).expect("a name");
            let tls = ClientConnection::new(Arc::new(world.client_config()), name).expect("a client");
            let answer = get(&mut StreamOwned::new(tls, socket), "/a");
            assert_eq!(answer.status, 503, "{}", answer.head);
            let header = field(&answer.head, "x-palisade-error").expect("the field");
            let kind = FailureKind::PortInUse.text();
            assert!(
                header.starts_with(kind) && header.contains(address) && header.ends_with("is not closed yet"),
                "{header}"
            );
        }
        assert_eq!(proxy.stats().failures[FailureKind::PortInUse as usize], 2);
    };
    thread::scope(|scope| scope.spawn(test).join().expect("the test passes"));
}
