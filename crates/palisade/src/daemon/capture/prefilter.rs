//! Conditions of the programs: the part of the filters that a program can check before it copies a packet.
//!
//! Every packet that the filters accept satisfies one of the conditions; what they let through in addition, the filters
//! reject later. So a filter that is not understood here only costs copies.

use std::net::IpAddr;

use ipnet::IpNet;
use palisade_abi::{Addr, CaptureCondition, CaptureEnd, capture_flags, protocol};
use palisade_flowlog::filter::{ApiFilter, ApiFilters};

/// Returns the conditions that follow from filters. `ifindex`: returns the index of an interface.
pub(crate) fn conditions(
    filters: &ApiFilters,
    ifindex: impl Fn(&str) -> Option<u32>,
) -> [CaptureCondition; 2] {
    match &filters.allowlist[..] {
        [only] => [condition(only, ifindex); 2],
        [first, second] => [condition(first, &ifindex), condition(second, &ifindex)],
        _ => [CaptureCondition::ANY; 2],
    }
}

fn condition(filter: &ApiFilter, ifindex: impl Fn(&str) -> Option<u32>) -> CaptureCondition {
    let mut condition = CaptureCondition {
        source: end(&filter.source_ip, &filter.source_port),
        destination: end(&filter.destination_ip, &filter.destination_port),
        ..CaptureCondition::ANY
    };
    // Several values of a field are alternatives.
    if let [only] = &filter.protocol[..]
        && let Some(number) = protocol_number(only)
    {
        condition.protocol = u32::from(number) + 1;
    }
    if let [only] = &filter.verdict[..]
        && only.0.eq_ignore_ascii_case("dropped")
    {
        condition.flags |= capture_flags::DROPS_ONLY;
    }
    if let [only] = &filter.interface[..] {
        condition.ifindex = match (only.index, &*only.name) {
            (0, "") => 0,
            (0, name) => ifindex(name).unwrap_or(0),
            (index, _) => index,
        };
    }
    condition
}

fn end(addresses: &[String], ports: &[String]) -> CaptureEnd {
    let mut end = CaptureEnd::ANY;
    if let [only] = addresses
        && let Some(net) = net(only)
    {
        // The programs compare IPv6 addresses; IPv4 addresses are mapped.
        let length = match net {
            IpNet::V4(net) => u32::from(net.prefix_len()) + 96,
            IpNet::V6(net) => u32::from(net.prefix_len()),
        };
        let bits = u128::MAX.checked_shl(128 - length).unwrap_or(0);
        end.mask = Addr::from(IpAddr::from(bits.to_be_bytes()));
        end.addr = Addr::from(net.network());
    }
    if let [only] = ports
        && let Some((first, last)) = range(only)
    {
        (end.first_port, end.last_port) = (first, last);
    }
    end
}

/// Returns an address or a prefix. An IPv4 prefix in the form of an IPv6 one is left to the filters.
fn net(text: &str) -> Option<IpNet> {
    let net = text
        .parse::<IpNet>()
        .ok()
        .or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))?;
    match net {
        IpNet::V6(net) if net.addr().to_ipv4_mapped().is_some() => None,
        net => Some(net),
    }
}

fn range(text: &str) -> Option<(u16, u16)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
}

fn protocol_number(name: &str) -> Option<u8> {
    Some(match name.to_ascii_lowercase().as_str() {
        "tcp" => protocol::TCP,
        "udp" => protocol::UDP,
        "sctp" => protocol::SCTP,
        "icmpv4" => protocol::ICMP,
        "icmpv6" => protocol::ICMPV6,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use palisade_flowlog::{FilterBuilder, Timestamp};

    use super::*;

    fn of(flags: &[(&str, &str)]) -> [CaptureCondition; 2] {
        let mut builder = FilterBuilder::new(Timestamp(0));
        for (flag, value) in flags {
            builder.flag(flag, value).unwrap();
        }
        conditions(&builder.finish_api().unwrap(), |name| {
            (name == "eth0").then_some(7)
        })
    }

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn addresses_and_prefixes_of_both_families_become_conditions() {
        let [first, second] = of(&[("from-ip", "10.1.2.3/8"), ("to-ip", "2001:db8::1")]);
        assert_eq!(first, second);
        assert!(first.source.has_addr(&addr("10.200.0.1")));
        assert!(!first.source.has_addr(&addr("11.0.0.1")));
        assert!(!first.source.has_addr(&addr("2001:db8::1")));
        assert!(first.destination.has_addr(&addr("2001:db8::1")));
        assert!(!first.destination.has_addr(&addr("2001:db8::2")));
        // The prefix of length 0 accepts its own family only.
        let [all, _] = of(&[("from-ip", "0.0.0.0/0")]);
        assert!(all.source.has_addr(&addr("192.0.2.1")) && !all.source.has_addr(&addr("2001:db8::1")));
        let [all, _] = of(&[("from-ip", "::/0")]);
        assert!(all.source.has_addr(&addr("2001:db8::1")));
    }

    #[test]
    fn a_filter_for_either_end_becomes_two_conditions() {
        let [first, second] = of(&[("ip", "10.0.0.1"), ("port", "80")]);
        assert_eq!(first.source, second.destination);
        assert_eq!(
            (first.destination, second.source),
            (CaptureEnd::ANY, CaptureEnd::ANY)
        );
        assert!(first.source.has_addr(&addr("10.0.0.1")) && !first.source.has_addr(&addr("10.0.0.2")));
        assert!(first.source.has_port(80) && !first.source.has_port(81));
    }

    #[test]
    fn ports_protocol_interface_and_verdict_become_conditions() {
        let [condition, _] = of(&[
            ("to-port", "8000-8999"),
            ("protocol", "TCP"),
            ("interface", "eth0"),
            ("verdict", "dropped"),
        ]);
        assert!(condition.destination.has_port(8_000) && !condition.destination.has_port(9_000));
        assert_eq!(condition.protocol, 7);
        assert_eq!(condition.ifindex, 7);
        assert_eq!(condition.flags, capture_flags::DROPS_ONLY);
    }

    #[test]
    fn alternatives_reversed_and_unknown_filters_are_left_to_the_filters() {
        let any = [CaptureCondition::ANY; 2];
        assert_eq!(of(&[]), any);
        assert_eq!(of(&[("from-ip", "10.0.0.1"), ("from-ip", "10.0.0.2")]), any);
        assert_eq!(of(&[("not", ""), ("from-ip", "10.0.0.1")]), any);
        assert_eq!(of(&[("to-label", "app=web"), ("protocol", "http")]), any);
        assert_eq!(of(&[("verdict", "forwarded"), ("interface", "gone")]), any);
        assert_eq!(of(&[("verdict", "forwarded,dropped")]), any);
    }
}
