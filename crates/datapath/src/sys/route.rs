//! Routes and rules of rtnetlink, for the network namespaces of the proxy.

use std::net::IpAddr;

use super::{
    SyscallError,
    netlink::{Request, Socket},
};

type Result<T> = std::result::Result<T, SyscallError>;

const FRA_IIFNAME: u16 = 3;
const FRA_PRIORITY: u16 = 6;
const FR_ACT_TO_TBL: u8 = 1;
const RTA_GATEWAY: u16 = 5;
const RTA_OIF: u16 = 4;
const RTNH_F_ONLINK: u32 = 4;
const RTN_LOCAL: u8 = 2;
const RTN_UNICAST: u8 = 1;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_HOST: u8 = 254;
const RT_SCOPE_UNIVERSE: u8 = 0;
/// Number of the main routing table.
pub(crate) const MAIN: u8 = 254;

fn family_of(ipv6: bool) -> u8 {
    (if ipv6 { libc::AF_INET6 } else { libc::AF_INET }) as u8
}

fn add(request: Request, call: &str) -> Result<()> {
    Socket::open(libc::NETLINK_ROUTE)?.execute(request, call)
}

fn new(kind: u16) -> Request {
    Request::new(kind, libc::NLM_F_CREATE | libc::NLM_F_EXCL)
}

/// struct rtmsg of a default route.
fn default_route(ipv6: bool, table: u8, scope: u8, kind: u8, flags: u32) -> [u8; 12] {
    let mut message = [
        family_of(ipv6),
        0,
        0,
        0,
        table,
        RTPROT_STATIC,
        scope,
        kind,
        0,
        0,
        0,
        0,
    ];
    message[8..].copy_from_slice(&flags.to_ne_bytes());
    message
}

/// Adds a default route by a gateway that need not be in a prefix of the interface.
pub(crate) fn add_default(gateway: IpAddr, ifindex: u32) -> Result<()> {
    let message = default_route(
        gateway.is_ipv6(),
        MAIN,
        RT_SCOPE_UNIVERSE,
        RTN_UNICAST,
        RTNH_F_ONLINK,
    );
    let request = new(libc::RTM_NEWROUTE).fixed(&message);
    let request = match gateway {
        IpAddr::V4(gateway) => request.attr(RTA_GATEWAY, &gateway.octets()),
        IpAddr::V6(gateway) => request.attr(RTA_GATEWAY, &gateway.octets()),
    };
    add(
        request.attr(RTA_OIF, &ifindex.to_ne_bytes()),
        &format!("RTM_NEWROUTE of default via {gateway}"),
    )
}

/// Adds a route to a table by which every address is local. `loopback`: index of the loopback interface.
pub(crate) fn add_local_default(ipv6: bool, table: u8, loopback: u32) -> Result<()> {
    let message = default_route(ipv6, table, RT_SCOPE_HOST, RTN_LOCAL, 0);
    let request = new(libc::RTM_NEWROUTE)
        .fixed(&message)
        .attr(RTA_OIF, &loopback.to_ne_bytes());
    add(request, "RTM_NEWROUTE of local default")
}

/// Adds a rule by which packets that enter by an interface use a table.
pub(crate) fn add_input_rule(ipv6: bool, interface: &str, table: u8, priority: u32) -> Result<()> {
    // struct fib_rule_hdr.
    let message = [family_of(ipv6), 0, 0, 0, table, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0];
    let mut name = interface.as_bytes().to_vec();
    name.push(0);
    let request = new(libc::RTM_NEWRULE)
        .fixed(&message)
        .attr(FRA_IIFNAME, &name)
        .attr(FRA_PRIORITY, &priority.to_ne_bytes());
    add(request, "RTM_NEWRULE")
}
