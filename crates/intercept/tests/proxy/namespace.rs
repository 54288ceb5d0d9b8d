//! Sockets in a network namespace. Needs root; without it, the test does nothing.

use std::{fs::File, net::TcpStream, os::fd::BorrowedFd, process::Command, sync::Mutex, thread};

use nix::sched::{CloneFlags, unshare};
use palisade_abi::Direction;
use palisade_intercept::{Listeners, Namespace, Options, Proxy};

use crate::world::{World, http_rules, read_to_end};

/// Listeners that were registered: their direction and whether they are of IPv6.
#[derive(Default)]
struct Registered(Mutex<Vec<(Direction, bool)>>);

impl Listeners for Registered {
    fn register(&self, direction: Direction, _: BorrowedFd<'_>, is_v6: bool) -> std::io::Result<()> {
        self.0.lock().expect("the list").push((direction, is_v6));
        Ok(())
    }
}

#[test]
fn listeners_are_in_the_namespace_of_their_direction() {
    let world = World::new(http_rules(&["/.*"]));
    *world.flows.request.lock().expect("the flows") = None;
    let test = || {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            return;
        }
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
        if !up.is_ok_and(|status| status.success()) {
            return;
        }
        let fd = File::open("/proc/thread-self/ns/net").expect("the namespace");
        let namespace = Namespace {
            direction: Direction::Egress,
            fd: fd.into(),
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
