//! Finds rules that translate addresses or redirect packets in this network namespace. With such rules the addresses of
//! a packet at the hook where policy decides can differ from those at its socket.

use std::{fs, io};

use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};

/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN` (linux/netfilter/nfnetlink.h, nf_tables.h).
const GET_CHAIN: u16 = 10 << 8 | 4;
/// `NFT_MSG_GETRULE`.
const GET_RULE: u16 = 10 << 8 | 7;
/// `RTM_GETRULE` (linux/rtnetlink.h).
const GET_ROUTING_RULE: u16 = 34;
/// `NFTA_CHAIN_USE`: number of rules in the chain and of jumps to the chain.
const CHAIN_USE: u16 = 6;
/// `NFTA_CHAIN_TYPE`.
const CHAIN_TYPE: u16 = 7;
/// `FRA_FWMARK` (linux/fib_rules.h).
const RULE_MARK: u16 = 10;
const NLM_F_DUMP_REQUEST: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `struct nlmsghdr`.
const HEADER: usize = 16;

/// Returns the number of nat chains of nftables that have rules.
pub(super) fn nft_chains() -> usize {
    let mut chains = 0;
    // A kernel without nf_tables answers with an error, and has no such chains.
    let _ = dump(NETLINK_NETFILTER, GET_CHAIN, 4, &mut |message| {
        let is_nat = attribute(message, CHAIN_TYPE).is_some_and(|kind| kind.starts_with(b"nat\0"));
        let used = attribute(message, CHAIN_USE).is_some_and(|used| used.iter().any(|byte| *byte != 0));
        chains += usize::from(is_nat && used);
    });
    chains
}

/// Returns the legacy iptables programs whose nat table is loaded. iptables-nft writes nftables rules and loads no such
/// table.
pub(super) fn legacy_tables() -> Vec<&'static str> {
    [
        ("iptables", "/proc/thread-self/net/ip_tables_names"),
        ("ip6tables", "/proc/thread-self/net/ip6_tables_names"),
    ]
    .into_iter()
    .filter(|(_, names)| {
        let tables = fs::read_to_string(names).unwrap_or_default();
        tables.lines().any(|table| table == "nat")
    })
    .map(|(family, _)| family)
    .collect()
}

/// Returns a text for each kind of rule that was found.
pub(crate) fn found() -> Vec<String> {
    let mut found = Vec::new();
    let chains = nft_chains();
    if chains > 0 {
        found.push(format!("nftables: nat chains with rules ({chains})"));
    }
    let mut transparent = 0;
    let _ = dump(NETLINK_NETFILTER, GET_RULE, 4, &mut |message| {
        let named = |name: &[u8]| message.windows(name.len()).any(|bytes| bytes == name);
        transparent += usize::from(named(b"tproxy\0") || named(b"TPROXY\0"));
    });
    if transparent > 0 {
        found.push(format!("nftables: tproxy rules ({transparent})"));
    }
    found.extend(
        legacy_tables()
            .into_iter()
            .map(|family| format!("{family}: the nat table")),
    );
    let mut marks = 0;
    for family in [nix::libc::AF_INET, nix::libc::AF_INET6] {
        // The family is the first byte of `struct fib_rule_hdr` (12 bytes).
        let _ = dump_of(
            NETLINK_ROUTE,
            GET_ROUTING_RULE,
            12,
            family as u8,
            &mut |message| {
                let mark = attribute_behind(message, 12, RULE_MARK);
                marks += usize::from(mark.is_some_and(|mark| mark.iter().any(|byte| *byte != 0)));
            },
        );
    }
    if marks > 0 {
        found.push(format!("ip rule: routing by fwmark ({marks})"));
    }
    found
}

fn dump(protocol: isize, kind: u16, header: usize, each: &mut dyn FnMut(&[u8])) -> io::Result<()> {
    dump_of(protocol, kind, header, 0, each)
}

/// Dumps all objects of a kind and passes each message to `each`, without its netlink header.
fn dump_of(
    protocol: isize,
    kind: u16,
    header: usize,
    family: u8,
    each: &mut dyn FnMut(&[u8]),
) -> io::Result<()> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut request = vec![0; HEADER + header];
    let length = u32::try_from(request.len()).unwrap_or(0);
    request[..4].copy_from_slice(&length.to_ne_bytes());
    request[4..6].copy_from_slice(&kind.to_ne_bytes());
    request[6..8].copy_from_slice(&NLM_F_DUMP_REQUEST.to_ne_bytes());
    request[HEADER] = family;
    socket.send(&request, 0)?;
    loop {
        let (received, _) = socket.recv_from_full()?;
        let mut rest = received.as_slice();
        while rest.len() >= HEADER {
            let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
            let kind = u16::from_ne_bytes([rest[4], rest[5]]);
            if kind == NLMSG_DONE {
                return Ok(());
            }
            if kind == NLMSG_ERROR || length < HEADER || length > rest.len() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            each(&rest[HEADER..length]);
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
    }
}

/// Returns an attribute of a netfilter message. The attributes follow `struct nfgenmsg`.
fn attribute(message: &[u8], wanted: u16) -> Option<&[u8]> {
    attribute_behind(message, 4, wanted)
}

fn attribute_behind(message: &[u8], header: usize, wanted: u16) -> Option<&[u8]> {
    find(message.get(header..)?, wanted)
}

/// Returns the value of the first attribute of a type.
pub(super) fn find(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]) & 0x3fff;
        let value = rest.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attribute_is_found_only_within_the_message() {
        let message = [
            0, 0, 0, 0, 5, 0, 3, 0, b'x', 0, 0, 0, 8, 0, 7, 0, b'n', b'a', b't', 0,
        ];
        assert_eq!(attribute(&message, CHAIN_TYPE), Some(&b"nat\0"[..]));
        for cut in 0..message.len() {
            assert_eq!(attribute(&message[..cut], CHAIN_TYPE), None, "{cut}");
        }
    }
}
