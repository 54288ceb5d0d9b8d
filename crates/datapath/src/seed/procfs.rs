//! Parser of `/proc/net/nf_conntrack`.

use std::net::IpAddr;

use palisade_abi::protocol;

use super::connection::{Connection, End, Progress, both_views};

/// Parses one line of `/proc/net/nf_conntrack`. Returns the connection as the opener sees it and, if NAT translates it,
/// also as the responder sees it.
pub(super) fn parse_tracked(line: &str) -> Option<[Option<Connection>; 2]> {
    let mut words = line.split_ascii_whitespace().skip(3);
    let protocol: u8 = words.next()?.parse().ok()?;
    let rest: Vec<_> = words.collect();
    if protocol != protocol::TCP {
        return None;
    }
    let progress = tcp_progress(rest.get(1)?)?;
    let fields = |name: &'static str| {
        rest.iter()
            .filter_map(move |word| word.strip_prefix(name)?.strip_prefix('='))
            .collect::<Vec<_>>()
    };
    let (sources, destinations) = (fields("src"), fields("dst"));
    let (source_ports, destination_ports) = (fields("sport"), fields("dport"));
    let end = |addresses: &[&str], ports: &[&str], i: usize| -> Option<End> {
        let addr: IpAddr = addresses.get(i)?.parse().ok()?;
        Some(End {
            addr: addr.into(),
            port: ports.get(i)?.parse().ok()?,
        })
    };
    let original = (
        end(&sources, &source_ports, 0)?,
        end(&destinations, &destination_ports, 0)?,
    );
    let reply = (
        end(&sources, &source_ports, 1)?,
        end(&destinations, &destination_ports, 1)?,
    );
    Some(both_views(progress, original, reply))
}

fn tcp_progress(state: &str) -> Option<Progress> {
    Some(match state {
        "SYN_SENT" | "SYN_SENT2" => Progress::Opening,
        // The state does not show which end closed first.
        "SYN_RECV" | "ESTABLISHED" | "FIN_WAIT" | "CLOSE_WAIT" => Progress::Established,
        "LAST_ACK" | "TIME_WAIT" => Progress::Closed,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::connection::fixtures::{end, tcp};

    #[test]
    fn proc_lines_with_and_without_translation() {
        let plain = "ipv4     2 tcp      6 431999 ESTABLISHED src=10.0.0.1 dst=10.0.0.2 sport=4000 dport=80 \
                     src=10.0.0.2 dst=10.0.0.1 sport=80 dport=4000 [ASSURED] mark=0 zone=0 use=2";
        let [first, second] = parse_tracked(plain).unwrap();
        assert_eq!(first, Some(tcp("10.0.0.1:4000", "10.0.0.2:80")));
        assert_eq!(second, None);

        let nat = "ipv4     2 tcp      6 20 SYN_SENT src=10.0.1.10 dst=192.0.2.7 sport=5000 dport=53 packets=1 bytes=60 \
                   [UNREPLIED] src=192.0.2.7 dst=198.51.100.1 sport=53 dport=6000 packets=0 bytes=0 mark=0 use=2";
        let [first, second] = parse_tracked(nat).unwrap();
        let (first, second) = (first.unwrap(), second.unwrap());
        assert_eq!(first.progress, Progress::Opening);
        assert_eq!(
            (first.opener, first.responder),
            (end("10.0.1.10:5000"), end("192.0.2.7:53"))
        );
        assert_eq!(
            (second.opener, second.responder),
            (end("198.51.100.1:6000"), end("192.0.2.7:53"))
        );

        let v6 = "ipv6     10 tcp      6 5 SYN_SENT src=fd00::1 dst=fd00::2 sport=1 dport=2 [UNREPLIED] \
                  src=fd00::2 dst=fd00::1 sport=2 dport=1 mark=0 use=2";
        assert_eq!(parse_tracked(v6).unwrap()[0].unwrap().progress, Progress::Opening);

        for other in [
            "",
            "ipv4 2 icmp 1 29 src=1.2.3.4 dst=1.2.3.5 type=8 code=0 id=7",
            "ipv4 2 tcp 6 9 CLOSE",
            "ipv4 2 udp 17 20 src=10.0.0.1 dst=10.0.0.2 sport=4000 dport=53 src=10.0.0.2 dst=10.0.0.1 sport=53 dport=4000",
        ] {
            assert!(parse_tracked(other).is_none(), "{other}");
        }
    }
}
