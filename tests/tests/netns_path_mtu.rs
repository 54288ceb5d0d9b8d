//! Paths that take smaller packets than the links at both ends: what Palisade has acknowledged, it delivers.

use std::{
    io::Write,
    net::{IpAddr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use palisade_testbed::{Ns, daemon::Settings, recorder::Recorder, topology::FAMILIES};
use palisade_tests::apps::{answers_requests, apps, policy};

const PORT: u16 = 80;
const RULES: &str = "      rules:\n        http: [{method: GET, path: \"/.*\"}]\n";

#[test]
fn what_is_acknowledged_here_arrives_over_paths_with_a_small_mtu() {
    let apps = apps();
    let far = Ns::new("far").expect("namespace");
    let internet = apps.ns("internet");
    for (key, value) in [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")] {
        internet.sysctl(key, value).expect("forwarding");
    }
    internet
        .ip(&format!(
            "link add far0 type veth peer name eth0 netns {}\n\
             addr add 203.0.113.1/24 dev far0\n\
             addr add 2001:db8:a::1/64 dev far0 nodad\n\
             link set far0 up\n",
            far.name()
        ))
        .expect("link");
    far.ip("addr add 203.0.113.10/24 dev eth0\n\
         addr add 2001:db8:a::10/64 dev eth0 nodad\n\
         link set eth0 up\n\
         route add default via 203.0.113.1\n\
         route add default via 2001:db8:a::1\n")
        .expect("link");
    let addresses: [IpAddr; 2] = [
        [203, 0, 113, 10].into(),
        "2001:db8:a::10".parse().expect("address"),
    ];
    let recorder = Recorder::start(&far, &addresses, &[PORT], answers_requests).expect("recorder");
    let daemon = apps
        .daemon(
            &Settings::default(),
            &[("p.yaml", &policy("client", "egress", &[PORT], RULES))],
        )
        .expect("daemon");
    // The router says that packets are too big, or does not.
    for silent in [false, true] {
        if silent {
            internet
                .nft(
                    "table inet silent {\nchain o {\ntype filter hook output priority 0;\n\
                     icmp type destination-unreachable drop;\nicmpv6 type packet-too-big drop;\n}\n}\n",
                )
                .expect("nft");
        }
        for mtu in [1_280, 1_420, 1_492] {
            internet.ip(&format!("link set far0 mtu {mtu}\n")).expect("mtu");
            for (address, family) in addresses.iter().zip(FAMILIES) {
                let at = SocketAddr::new(*address, PORT);
                let mut stream = apps
                    .ns("client")
                    .enter(|| TcpStream::connect_timeout(&at, Duration::from_secs(5)))
                    .expect("connection");
                stream.set_nodelay(true).expect("option");
                let filler = "X-Filler: 0123456789012345678901234567890123456789\r\n".repeat(100);
                let head = format!("GET /a HTTP/1.1\r\nHost: x.example\r\n{filler}\r\n");
                let (begin, end) = head.as_bytes().split_at(head.len() - 4);
                // Held until its end is there, so it is acknowledged here.
                stream.write_all(begin).expect("head");
                thread::sleep(Duration::from_millis(100));
                stream.write_all(end).expect("head");
                let since = Instant::now();
                let own = stream.local_addr().expect("address");
                let heard = recorder.wait(own, "the head", Duration::from_secs(6), |heard| {
                    heard.bytes.len() >= head.len()
                });
                let heard = heard.unwrap_or_else(|error| {
                    panic!(
                        "{family:?}, MTU {mtu}, silent {silent}: {error:#}\n{}",
                        daemon.report()
                    )
                });
                assert!(heard.bytes == head.as_bytes());
                println!("{family:?}, MTU {mtu}, silent {silent}: {:?}", since.elapsed());
            }
        }
    }
}
