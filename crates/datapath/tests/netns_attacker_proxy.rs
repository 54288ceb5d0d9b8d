//! Attacks on the proxy links and on intercepted connections.
#![allow(unsafe_code, reason = "socket options that std does not have")]

mod proxy;

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd as _,
    time::Duration,
};

use palisade_abi::{DIRECTIONS, PROXY_MAC, Reason, tcp_flags as flags};
use palisade_datapath::Hook;
use palisade_testbed::{
    forge::{Tcp, Wire, frame, ip},
    ns::wait_until,
};
use proxy::*;

/// Time in which a packet that passes would have arrived.
const SHORT: Duration = Duration::from_millis(500);

fn accepted(listener: &TcpListener) -> bool {
    listener.set_nonblocking(true).unwrap();
    listener.accept().is_ok()
}

/// Returns how many packets have entered the proxy's end of a link.
fn received(links: &palisade_datapath::ProxyLinks) -> u64 {
    DIRECTIONS
        .map(|direction| {
            in_namespace(&links.namespaces[direction as usize], || {
                // Columns of a line of /proc/net/dev: name, bytes received, packets received.
                let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
                let line = table.lines().find(|line| line.trim_start().starts_with("px0:"));
                let numbers = line.unwrap().split(':').nth(1).unwrap();
                numbers.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
            })
        })
        .iter()
        .sum()
}

/// SO_BINDTODEVICE needs no privilege on a socket without a device.
fn send_by(interface: &str, to: SocketAddr) -> io::Result<usize> {
    let any: IpAddr = if to.is_ipv6() {
        [0u16; 8].into()
    } else {
        [0u8; 4].into()
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_broadcast(true)?;
    // SAFETY: the name is valid for its length.
    let answer = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_BINDTODEVICE,
            interface.as_ptr().cast(),
            interface.len() as libc::socklen_t,
        )
    };
    assert_eq!(answer, 0, "{}", io::Error::last_os_error());
    socket.send_to(b"not for you", to)
}

#[test]
fn packets_from_local_sockets_do_not_enter_a_proxy_link() {
    let mut world = World::new(Hook::Tc, Hook::Tc, &[(HOST, EGRESS), (HOST, INGRESS)]);
    let links = world.links();
    let _relay = Relay::start(&links, flows(&world));
    let before = received(&links);
    for interface in palisade_datapath::proxy_link_names(LINK) {
        for to in [
            "192.0.2.1:9",
            "224.0.0.251:9",
            "255.255.255.255:9",
            "169.254.0.1:9",
        ] {
            let sent = send_by(&interface, to.parse().unwrap());
            eprintln!("{interface} {to}: {sent:?}");
        }
        // A connection to the world by the link. It needs no route.
        let packet: IpAddr = Place::World.address(false);
        let wire = Tcp::new(4000, PORT).flags(flags::SYN);
        let bytes = ip(
            Place::Node.address(false),
            packet,
            6,
            64,
            &wire.bytes(Place::Node.address(false), packet),
        );
        let index = world.node.ifindex(&interface).unwrap();
        send_raw(index, &frame([2, 0, 0, 0, 0, 1], PROXY_MAC, &bytes));
    }
    assert_eq!(received(&links), before);
    assert!(world.drops(Reason::PuntForeign) >= 4);
}

/// Sends a frame by a packet socket, as a program with CAP_NET_RAW can.
fn send_raw(ifindex: u32, frame: &[u8]) {
    // SAFETY: the address and the frame are valid for their lengths; the descriptor is closed here.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        let mut to: libc::sockaddr_ll = std::mem::zeroed();
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_protocol = 0x0800_u16.to_be();
        to.sll_ifindex = ifindex as i32;
        to.sll_halen = 6;
        // The result does not matter: the filter can make the call fail.
        libc::sendto(
            fd,
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of_val(&to) as libc::socklen_t,
        );
        libc::close(fd);
    }
}

/// A host of the NIC's link sends a SYN with a foreign source address and its own MAC address. The answer goes to the
/// owner of the address, not to the sender.
#[test]
fn the_sender_of_a_foreign_source_address_gets_no_answer() {
    for nic in [Hook::Tc, Hook::Xdp] {
        let mut world = World::new(Hook::Tc, nic, &[(HOST, INGRESS)]);
        let _pool = world.worker();
        let links = world.links();
        let _relay = Relay::start(&links, flows(&world));
        let _listener = world.listen(Place::Node, false);
        let node = Place::Node.address(false);
        let wire = Wire::open(&world.world, "eth0", node).unwrap();
        let foreign: IpAddr = [10, 0, 0, 77].into();
        let server = SocketAddr::new(node, PORT);
        let syn = Tcp::new(4000, PORT).flags(flags::SYN);
        wire.tcp(foreign, node, &syn).unwrap();
        let heard = wire.wait_tcp(SHORT, server, SocketAddr::new(foreign, 4000), |_| true);
        assert!(heard.is_none(), "{heard:?}");
        // The owner of an address gets it.
        let own = Place::World.address(false);
        wire.tcp(own, node, &syn).unwrap();
        let heard = wire.wait_tcp(TIMEOUT, server, SocketAddr::new(own, 4000), |heard| {
            heard.flags & flags::SYN != 0
        });
        assert!(heard.is_some());
    }
}

/// Sources that no host can have, and destination MAC addresses of others, reach neither proxy nor server.
#[test]
fn invalid_addresses_reach_no_proxy() {
    let mut world = World::new(Hook::Tc, Hook::Tc, &[(HOST, INGRESS), (A, EGRESS)]);
    let links = world.links();
    let relay = Relay::start(&links, flows(&world));
    let listener = world.listen(Place::Node, false);
    let node = Place::Node.address(false);
    let wire = Wire::open(&world.world, "eth0", node).unwrap();
    for source in [
        "127.0.0.1",
        "224.0.0.1",
        "0.0.0.0",
        "255.255.255.255",
        "10.0.0.1",
        "10.0.1.2",
    ] {
        for port in 0..8 {
            let syn = Tcp::new(4000 + port, PORT).flags(flags::SYN);
            wire.tcp(source.parse().unwrap(), node, &syn).unwrap();
        }
    }
    // From a workload, to the addresses of the namespaces.
    let from_a = Wire::open(&world.a, "eth0", [10, 0, 1, 1].into()).unwrap();
    for to in ["169.254.0.1", "127.0.0.1", "224.0.0.1", "255.255.255.255"] {
        let syn = Tcp::new(4100, PORT).flags(flags::SYN);
        from_a
            .tcp(Place::A.address(false), to.parse().unwrap(), &syn)
            .unwrap();
    }
    // With the MAC address of the proxy's end, which the node does not have, and with foreign source addresses.
    for source in [Place::A, Place::B, Place::World, Place::Node] {
        let (from, to) = (source.address(false), Place::World.address(false));
        let syn = Tcp::new(4200, PORT).flags(flags::SYN);
        let packet = ip(from, to, 6, 64, &syn.bytes(from, to));
        let to_proxy = frame(from_a.own, PROXY_MAC, &packet);
        if source != Place::A {
            from_a.send_frame(&to_proxy).unwrap();
        }
    }
    std::thread::sleep(SHORT);
    assert_eq!(relay.take(), []);
    assert!(!accepted(&listener));
    // The proxy still works.
    drop(listener);
    check(
        &world,
        &relay,
        (Place::World, Place::Node, &[(HOST, INGRESS)]),
        false,
        1000,
    );
}

/// In the namespaces nothing can be reached but the ends of intercepted connections.
#[test]
fn sockets_in_the_namespaces_reach_nothing_else() {
    let mut world = World::new(Hook::Tc, Hook::Tc, &[(A, EGRESS)]);
    let links = world.links();
    let relay = Relay::start(&links, flows(&world));
    let listeners = [Place::World, Place::Node, Place::B].map(|place| world.listen(place, false));
    for direction in DIRECTIONS {
        for to in [Place::World, Place::Node, Place::B] {
            for from in [Place::A, Place::Node, Place::World] {
                let to = SocketAddr::new(to.address(false), PORT);
                let from = SocketAddr::new(from.address(false), 4000);
                in_namespace(&links.namespaces[direction as usize], || {
                    start_connection(from, to)
                });
            }
        }
    }
    wait_until("the SYN of each connection is dropped", TIMEOUT, || {
        world.drops(Reason::NoProxy) >= 18
    })
    .unwrap();
    assert!(listeners.iter().all(|listener| !accepted(listener)));
    drop(relay);
}

/// Sends the SYN of a connection and does not wait.
fn start_connection(from: SocketAddr, to: SocketAddr) {
    std::thread::spawn(move || {
        let _ = connect_from(from, to);
    });
}

#[test]
fn a_flood_of_opens_cuts_no_intercepted_connection() {
    let mut world = World::new(Hook::Tc, Hook::Tc, &[(A, EGRESS), (B, EGRESS)]);
    let links = world.links();
    let relay = Relay::start(&links, flows(&world));
    let listener = world.listen(Place::World, false);
    let client = world.connect(Place::A, Place::World, false).unwrap();
    let (server, _) = listener.accept().unwrap();
    let ping = |client: &TcpStream, server: &TcpStream| {
        let (mut client, mut server) = (client, server);
        server.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut got = [0; 4];
        client.write_all(b"ping").unwrap();
        server.read_exact(&mut got).unwrap();
        server.write_all(b"pong").unwrap();
        client.read_exact(&mut got).unwrap();
    };
    ping(&client, &server);
    let wire = Wire::open(&world.a, "eth0", [10, 0, 1, 1].into()).unwrap();
    // More than the conntrack map has entries.
    for port in 0..20_000_u16 {
        let syn = Tcp::new(10_000 + port, 9_999).flags(flags::SYN);
        wire.tcp(Place::A.address(false), Place::World.address(false), &syn)
            .unwrap();
    }
    ping(&client, &server);
    // Another workload still opens connections.
    drop(listener);
    relay.take();
    check(
        &world,
        &relay,
        (Place::B, Place::World, &[(B, EGRESS)]),
        false,
        1000,
    );
    ping(&client, &server);
}

#[test]
fn a_client_uses_its_port_again_at_once() {
    for ipv6 in [false, true] {
        let mut world = World::new(Hook::Tc, Hook::Tc, &[(A, EGRESS)]);
        let links = world.links();
        let relay = Relay::start(&links, flows(&world));
        let listener = world.listen(Place::World, ipv6);
        let from = SocketAddr::new(Place::A.address(ipv6), 40_000);
        let to = SocketAddr::new(Place::World.address(ipv6), PORT);
        for turn in 0..20_u8 {
            let mut client = world.a.enter(|| connect_from(from, to)).unwrap();
            client.set_read_timeout(Some(TIMEOUT)).unwrap();
            let (mut server, peer) = listener.accept().unwrap();
            assert_eq!(peer, from);
            server.set_read_timeout(Some(TIMEOUT)).unwrap();
            // The server closes first, so the client's side of the proxy and not the client waits for late segments.
            server.write_all(&[turn]).unwrap();
            drop(server);
            let mut got = Vec::new();
            client.read_to_end(&mut got).unwrap();
            assert_eq!(got, [turn]);
        }
        assert_eq!(relay.take().len(), 20);
    }
}

/// A connection from before its interception is reset at both ends.
#[test]
fn a_connection_that_is_intercepted_from_now_on_is_reset() {
    let mut world = World::new(Hook::Tc, Hook::Tc, &[]);
    let links = world.links();
    let relay = Relay::start(&links, flows(&world));
    let listener = world.listen(Place::World, false);
    let mut client = world.connect(Place::A, Place::World, false).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(TIMEOUT)).unwrap();
    client.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
    world.policy(2, &[(A, EGRESS)]);
    let is_reset = |mut stream: &TcpStream| {
        let _ = stream.write_all(b"secret");
        let error = stream.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    };
    is_reset(&client);
    is_reset(&server);
    assert_eq!(relay.take(), []);
}

/// After a policy change that denies the flow no byte passes in either direction, although the proxy's sockets are
/// open.
#[test]
fn a_denied_connection_passes_no_more_bytes() {
    let mut world = World::new(Hook::Tc, Hook::Tc, &[(A, EGRESS)]);
    let links = world.links();
    let found = flows(&world);
    let relay = Relay::start(&links, found.clone());
    let listener = world.listen(Place::World, false);
    let mut client = world.connect(Place::A, Place::World, false).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    client.write_all(b"x").unwrap();
    server.set_read_timeout(Some(TIMEOUT)).unwrap();
    server.read_exact(&mut [0]).unwrap();
    let relayed = relay.take()[0];
    let key = relayed.key();
    assert!(found.find(&key).unwrap().is_some());
    world.deny(2, A);
    client.write_all(b"secret").unwrap();
    let _ = server.write_all(b"secret");
    client.set_read_timeout(Some(SHORT)).unwrap();
    server.set_read_timeout(Some(SHORT)).unwrap();
    assert!(client.read(&mut [0]).is_err());
    assert!(server.read(&mut [0]).is_err());
    // So the proxy can see that the connection is to be cut.
    wait_until("the flow's verdict", TIMEOUT, || {
        found.find(&key).unwrap().is_none()
    })
    .unwrap();
}
