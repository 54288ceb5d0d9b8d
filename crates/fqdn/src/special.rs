//! Special-purpose addresses (RFC 6890), to which public names should not resolve.
//!
//! The owner of a name decides to which addresses the name resolves. If a name that a policy allows resolved to
//! 169.254.169.254, to a loopback address or to a LAN address, learning that address would let the name's owner open
//! the node's own network to the workload (DNS rebinding). With [`Special::Refuse`], such an address is learned only if
//! the configuration or a rule lists it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::SelectorId;

/// Whether special-purpose addresses in answers are learned.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Special {
    /// Special-purpose addresses are learned like all others.
    #[default]
    Learn,
    /// Special-purpose addresses are learned only if they are in one of these prefixes, or in a prefix that a rule of
    /// the endpoint lists ([`crate::Cache::set_listed`]).
    Refuse(Vec<IpNet>),
}

/// The special-purpose addresses that the policy of an endpoint lists.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ListedPrefixes {
    /// Prefixes in egress rules of the endpoint.
    pub prefixes: Vec<IpNet>,
    /// Selectors of egressDeny rules. Addresses of names that match one of these selectors are always learned, because
    /// an egressDeny rule can deny only addresses that were learned.
    pub denied: Vec<SelectorId>,
}

impl ListedPrefixes {
    /// Returns whether an address of a name with these selectors is learned although it is special-purpose.
    pub(crate) fn takes(&self, address: IpAddr, selectors: &[SelectorId]) -> bool {
        lists(&self.prefixes, address) || selectors.iter().any(|selector| self.denied.contains(selector))
    }
}

const fn v4(a: u8, b: u8, c: u8, length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), length)
}

const fn v6(a: u16, b: u16, c: u16, length: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0), length)
}

/// Blocks of the IANA registry of special-purpose IPv4 addresses (RFC 6890) to which public names should not resolve,
/// and multicast (RFC 5771).
const IPV4: &[Ipv4Net] = &[
    v4(0, 0, 0, 8),
    v4(10, 0, 0, 8),
    v4(100, 64, 0, 10),
    v4(127, 0, 0, 8),
    v4(169, 254, 0, 16),
    v4(172, 16, 0, 12),
    v4(192, 0, 0, 24),
    v4(192, 0, 2, 24),
    v4(192, 88, 99, 24),
    v4(192, 168, 0, 16),
    v4(198, 18, 0, 15),
    v4(198, 51, 100, 24),
    v4(203, 0, 113, 24),
    v4(224, 0, 0, 4),
    v4(240, 0, 0, 4),
];

/// Blocks of the IANA registry of special-purpose IPv6 addresses (RFC 6890) to which public names should not resolve,
/// multicast (RFC 4291, section 2.7), and the deprecated site-local prefix (RFC 3879), which some stacks still route.
/// `::/96` contains the unspecified address, the loopback address and the IPv4-compatible addresses (RFC 4291, section
/// 2.5.5.1).
const IPV6: &[Ipv6Net] = &[
    v6(0, 0, 0, 96),
    v6(0x64, 0xff9b, 1, 48),
    v6(0x100, 0, 0, 63),
    v6(0x2001, 0, 0, 23),
    v6(0x2001, 0xdb8, 0, 32),
    v6(0x3fff, 0, 0, 20),
    v6(0x5f00, 0, 0, 16),
    v6(0xfc00, 0, 0, 7),
    v6(0xfe80, 0, 0, 10),
    v6(0xfec0, 0, 0, 10),
    v6(0xff00, 0, 0, 8),
];

/// Returns whether an address is special-purpose. A NAT64 or 6to4 address (RFC 6052, section 2.1; RFC 3056) is
/// special-purpose if its embedded IPv4 address is special-purpose.
#[must_use]
pub fn is_special(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => IPV4.iter().any(|net| net.contains(&address)),
        IpAddr::V6(address) => {
            let [a, b, c, d, e, f, g, h] = address.segments();
            let embedded = match [a, b, c, d, e, f] {
                [0x64, 0xff9b, 0, 0, 0, 0] => Some((g, h)),
                [0x2002, ..] => Some((b, c)),
                _ => None,
            };
            match embedded {
                Some((high, low)) => {
                    let v4 = Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low));
                    is_special(v4.into())
                }
                None => IPV6.iter().any(|net| net.contains(&address)),
            }
        }
    }
}

/// Returns whether a prefix lies within a special-purpose block. A prefix that is wider than the block, such as
/// `0.0.0.0/0` in a rule for the whole internet, does not list the addresses of the block.
#[must_use]
pub fn is_special_prefix(prefix: &IpNet) -> bool {
    match prefix {
        IpNet::V4(net) => IPV4.iter().any(|block| block.contains(net)),
        IpNet::V6(net) => {
            let (first, length) = (net.network().segments(), net.prefix_len());
            // The IPv4 address that is embedded in a NAT64 or 6to4 prefix, and the number of bits of that address that
            // the prefix fixes.
            let embedded = match first {
                [0x64, 0xff9b, 0, 0, 0, 0, high, low] if length >= 96 => Some((high, low, length - 96)),
                [0x2002, high, low, ..] if length >= 16 => Some((high, low, (length - 16).min(32))),
                _ => None,
            };
            match embedded {
                Some((high, low, length)) => {
                    let network = Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low));
                    Ipv4Net::new(network, length).is_ok_and(|net| is_special_prefix(&net.into()))
                }
                None => IPV6.iter().any(|block| block.contains(net)),
            }
        }
    }
}

/// Returns whether a special-purpose address is in one of the prefixes, not counting prefixes that are wider than a
/// special-purpose block ([`is_special_prefix`]).
pub(crate) fn lists(prefixes: &[IpNet], address: IpAddr) -> bool {
    prefixes
        .iter()
        .any(|net| net.contains(&address) && is_special_prefix(net))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(texts: &[&str], expected: bool) {
        for text in texts {
            assert_eq!(is_special(text.parse().unwrap()), expected, "{text}");
        }
    }

    #[test]
    fn special_addresses_of_both_families_in_every_form() {
        all(
            &[
                "0.0.0.0",
                "10.1.2.3",
                "100.64.0.1",
                "127.0.0.1",
                "169.254.169.254",
                "172.31.255.255",
                "192.168.1.1",
                "224.0.0.251",
                "255.255.255.255",
                "::",
                "::1",
                "::ffff:127.0.0.1",
                "::10.0.0.1",
                "64:ff9b::169.254.169.254",
                "64:ff9b:1::1",
                "2002:7f00:1::1",
                "2001:0:1::1",
                "fd00::1",
                "fe80::1",
                "fec0::1",
                "ff02::1",
            ],
            true,
        );
        all(
            &[
                "9.255.255.255",
                "11.0.0.0",
                "100.63.255.255",
                "100.128.0.0",
                "128.0.0.1",
                "172.15.255.255",
                "172.32.0.0",
                "192.31.196.1",
                "198.17.255.255",
                "198.20.0.0",
                "223.255.255.255",
                "2606:4700::1111",
                "64:ff9b::8.8.8.8",
                "2002:808:808::1",
                "2001:200::1",
            ],
            false,
        );
    }

    #[test]
    fn a_prefix_lists_a_special_address_only_if_it_lies_within_the_special_block() {
        let nets = |texts: &[&str]| {
            texts
                .iter()
                .map(|text| text.parse().unwrap())
                .collect::<Vec<IpNet>>()
        };
        let metadata: IpAddr = "169.254.169.254".parse().unwrap();
        assert!(!lists(&nets(&["0.0.0.0/0", "168.0.0.0/6", "::/0"]), metadata));
        assert!(lists(&nets(&["169.254.0.0/16"]), metadata));
        assert!(lists(&nets(&["169.254.169.254/32"]), metadata));
        assert!(!lists(&nets(&["169.254.169.253/32"]), metadata));
        let nat64: IpAddr = "64:ff9b::10.0.0.1".parse().unwrap();
        assert!(lists(&nets(&["64:ff9b::a00:0/104"]), nat64));
        assert!(!lists(&nets(&["64:ff9b::/32", "64:ff9b::/96"]), nat64));
        let tunnel: IpAddr = "2002:a00:1::1".parse().unwrap();
        assert!(lists(&nets(&["2002:a00::/24"]), tunnel));
        assert!(!lists(&nets(&["2002::/16"]), tunnel));
    }
}
