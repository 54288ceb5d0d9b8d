//! Attacks of local users on the punt link, the pair of interfaces between the programs and the workers.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    thread,
    time::Duration,
};

use palisade_tests::{
    fixtures::apps::{Apps, apps},
    fixtures::dns::counted,
    setup::daemon,
};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

/// Drop reason of frames on the punt link that the programs did not put there.
const FOREIGN: u64 = 233;
const ENDS: [&str; 2] = ["palisade0", "palisade1"];

/// Returns how many frames an end of the punt link has sent.
fn sent(apps: &Apps, end: &str) -> u64 {
    let shown = apps
        .ns("node")
        .run("ip", &["-j", "-s", "link", "show", "dev", end])
        .expect("ip link");
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    shown[0]["stats64"]["tx"]["packets"].as_u64().expect("packets")
}

/// Sends a datagram by an interface. SO_BINDTODEVICE needs no privilege on a socket without a device.
fn send_by(interface: &str, to: SocketAddr) -> std::io::Result<usize> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM, None)?;
    socket.bind_device(Some(interface.as_bytes()))?;
    socket.set_broadcast(true)?;
    socket.send_to(b"not for you", &to.into())
}

#[test]
fn an_idle_node_has_no_frames_on_the_punt_link() {
    let apps = apps();
    // A node that forwards IPv6 reports the all-routers groups on every interface (RFC 3810).
    apps.ns("node")
        .sysctl("ipv6/conf/all/forwarding", "1")
        .expect("sysctl");
    let daemon = daemon(&apps.topology, &[]);
    thread::sleep(Duration::from_secs(6));
    let status = daemon.status().expect("status");
    assert_eq!(counted(&status, FOREIGN), 0, "{:#}", status["drops"]);
    for end in ENDS {
        assert_eq!(sent(&apps, end), 0, "{end}");
    }
}

#[test]
fn packets_from_local_sockets_do_not_enter_the_punt_link() {
    let apps = apps();
    let daemon = daemon(&apps.topology, &[]);
    let mut tried = 0;
    for end in ENDS {
        let index = apps.ns("node").ifindex(end).expect("index");
        let link_local = |address: Ipv6Addr| SocketAddr::V6(SocketAddrV6::new(address, 9, 0, index));
        let targets = [
            SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 9),
            SocketAddr::new(IpAddr::V4(Ipv4Addr::new(224, 0, 0, 251)), 9),
            SocketAddr::new(IpAddr::V4(Ipv4Addr::BROADCAST), 9),
            link_local("ff02::1".parse().expect("address")),
            link_local("fe80::1".parse().expect("address")),
        ];
        for to in targets {
            for _ in 0..20 {
                let result = apps.ns("node").enter(|| send_by(end, to));
                tried += u32::from(result.is_ok());
                eprintln!("{end} {to}: {result:?}");
            }
        }
        assert_eq!(sent(&apps, end), 0, "{end}");
    }
    let status = daemon.status().expect("status");
    eprintln!(
        "{tried} were taken, {} dropped as foreign",
        counted(&status, FOREIGN)
    );
    assert!(
        counted(&status, FOREIGN) > 0,
        "the test sends nothing: {:#}",
        status["drops"]
    );
}
