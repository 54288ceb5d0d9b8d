//! Forged packets reach the other end unchanged, and its responses are received.

use std::{
    io::Read,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    time::Duration,
};

use palisade_testbed::{
    Topology,
    capture::Capture,
    forge::{self, Checksum, Forged, ReceivedSegment, Tcp, Wire, option},
    packet::{Packet, protocol},
    rawtcp::{self, flags},
    topology::{FAMILIES, Family, INNER},
};

const LONG: Duration = Duration::from_secs(5);

fn wire(t: &Topology, family: Family) -> Wire {
    let front = t.get("front");
    rawtcp::prepare(&front.ns).expect("prepare");
    Wire::open(&front.ns, INNER, front.gateway(family)).expect("wire")
}

#[test]
fn a_forged_connection_delivers_its_options_and_bytes() {
    let t = Topology::new()
        .and_then(|t| t.apps(&["front"]))
        .expect("topology");
    for family in FAMILIES {
        let server = t.addr("internet", family);
        let listener = t
            .internet
            .enter(|| TcpListener::bind((server, 80)))
            .expect("listener");
        let remote = SocketAddr::new(server, 80);
        let local = SocketAddr::new(t.addr("front", family), 20_100);
        let seen = Capture::start(&t.internet, INNER).expect("capture");
        let own = Forged::open(
            wire(&t, family),
            local,
            remote,
            &[option::mss(1400), option::mp_capable(&[], None)].concat(),
            |_| option::any(30, &[0x20, 0]),
        )
        .expect("open");
        assert!(own.syn_ack.option(2).is_some(), "{:?}", own.syn_ack);
        let dss = option::dss(Some(7), 9, 1, 5, true);
        own.send(&own.segment(1).option(&dss).payload(b"hello"))
            .expect("data");
        // A receiver ignores a wrong checksum.
        own.send(&own.segment(6).payload(b"not").checksum(Checksum::Wrong))
            .expect("data");
        own.send(&own.segment(6).payload(b" there")).expect("data");
        let (mut stream, from) = listener.accept().expect("connection");
        assert_eq!(from, local);
        let mut bytes = [0; 11];
        stream.read_exact(&mut bytes).expect("bytes");
        assert_eq!(&bytes, b"hello there");
        let isn = own.isn;
        own.wait(LONG, |heard| heard.ack == isn.wrapping_add(12))
            .expect("acknowledgement");
        let wanted = |packet: &Packet| {
            ReceivedSegment::read(packet)
                .filter(|heard| heard.from == local)
                .and_then(|heard| heard.option(30).map(<[u8]>::to_vec))
        };
        seen.wait("the mapping", LONG, |packet| {
            wanted(packet).is_some_and(|option| option == dss[2..])
        })
        .expect("the mapping");
        let options: Vec<Vec<u8>> = seen.packets().iter().filter_map(wanted).collect();
        assert_eq!(options[0], [1, 1]);
        assert_eq!(options[options.len() - 1], dss[2..]);
    }
}

#[test]
fn datagrams_and_icmp_messages_can_have_any_address_and_mac() {
    let t = Topology::new()
        .and_then(|t| t.apps(&["front"]))
        .expect("topology");
    for family in FAMILIES {
        let wire = wire(&t, family);
        let node = t.addr("node", family);
        let own = t.addr("front", family);
        let spoofed: IpAddr = match family {
            Family::V4 => [10, 0, 1, 77].into(),
            Family::V6 => "fd00:1::77".parse().expect("address"),
        };
        let socket = t.node.enter(|| UdpSocket::bind((node, 53))).expect("socket");
        socket.set_read_timeout(Some(LONG)).expect("timeout");
        let to = SocketAddr::new(node, 53);
        wire.udp(SocketAddr::new(spoofed, 4000), to, b"wrong", Checksum::Wrong)
            .expect("datagram");
        wire.udp(SocketAddr::new(spoofed, 4000), to, b"right", Checksum::Right)
            .expect("datagram");
        let mut buffer = [0; 16];
        let (n, from) = socket.recv_from(&mut buffer).expect("datagram");
        assert_eq!(
            (&buffer[..n], from),
            (&b"right"[..], SocketAddr::new(spoofed, 4000))
        );

        // The node answers an echo request from the namespace's own address.
        let (request, reply) = if family == Family::V4 { (8, 0) } else { (128, 129) };
        let message = forge::icmp(own, node, request, 0, &[0, 1, 0, 1, 9, 9], Checksum::Right);
        wire.icmp(own, node, &message).expect("echo");
        let answered = wire.wait(LONG, |packet| {
            packet
                .icmp
                .filter(|icmp| *icmp == (reply, 0) && packet.source == node)
        });
        assert!(answered.is_some());

        // A frame with another source MAC address arrives unchanged.
        let seen = Capture::start(&t.node, "veth-front").expect("capture");
        let segment = Tcp::new(20_200, 9).flags(flags::SYN).seq(1).bytes(own, node);
        let packet = forge::ip(own, node, protocol::TCP, 9, &segment);
        wire.send_frame(&forge::frame([2, 0, 0, 0, 0, 9], wire.gateway, &packet))
            .expect("frame");
        seen.wait("the SYN", LONG, |p| !p.outgoing && p.ports == Some((20_200, 9)))
            .expect("seen");
        // The node has no listener there.
        let refused = wire.wait_tcp(
            LONG,
            SocketAddr::new(node, 9),
            SocketAddr::new(own, 20_200),
            |heard| heard.flags & flags::RST != 0 && heard.ack == 2,
        );
        assert!(refused.is_some(), "{family:?}");
    }
}
