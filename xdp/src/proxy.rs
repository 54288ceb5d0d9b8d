//! Intercepted flows (`palisade_abi::ProxyPath`): packets of both ends go to the proxy, and packets of the proxy
//! continue at the hook where the flow was intercepted.
//!
//! [`note_path`] and [`link_of`] run at guarded interfaces, [`from_proxy`] and [`only_redirected`] at the node's end of
//! a proxy link, [`assign_listener`] in the network namespaces of the proxy.

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC, sk_action};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_redirect_neigh, bpf_skb_store_bytes};
use aya_ebpf::programs::SkLookupContext;
use palisade_abi::{
    Addr, Direction, ID_SLOTS, Inspector, PROXY_IFINDEX, ProxyPath, PuntHeader, Reason, ct_flags,
    interface_flags, listener_slot, protocol, punt_flags, role,
};
use palisade_packet::{Bytes as _, flags};

use crate::calls::Calls;
use crate::conntrack;
use crate::counters;
use crate::entry::Entry;
use crate::hook::{Hook, Skb};
use crate::identity;
use crate::maps::{CONFIG, INTERFACES, PROXY_LISTENERS};
use crate::packet_context::{PacketContext, hook_point};
use crate::reinject;

/// Length of an Ethernet header without VLAN tags, bytes.
const ETHERNET: u8 = 14;
/// Number of the address family AF_INET6.
const AF_INET6: u32 = 10;

/// Stores in the conntrack entry at which interface a packet of an intercepted flow was seen, and its MAC addresses.
///
/// At ingress of a NIC only the first packet of a flow is noted: a later packet can have been forged by a host of the
/// link, and a packet that leaves has MAC addresses that the kernel has resolved ([`ProxyPath::RESOLVED`]). An ICMP
/// error is not noted, because any router can have sent it.
#[inline(never)]
pub fn note_path<H: Hook>(ctx: H, pkt: &PacketContext, entry: Entry) -> u32 {
    let bytes = ctx.bytes(false);
    let Some(mac) = bytes.array::<12>(0) else {
        return 0;
    };
    if pkt.layer3 != 0 || pkt.headers.is(flags::ICMP_ERROR) {
        return 0;
    }
    let word = |a: usize, b: usize| u32::from_ne_bytes([mac[a], mac[a + 1], mac[b], mac[b + 1]]);
    let resolved = if pkt.hook_point == hook_point::NIC_IN {
        0
    } else {
        ProxyPath::RESOLVED
    };
    let path = if pkt.egress != 0 {
        // Source and destination exchanged: the near side comes first.
        [word(6, 8), word(10, 0), word(2, 4), pkt.ifindex | resolved]
    } else {
        [word(0, 2), word(4, 6), word(8, 10), pkt.ifindex | resolved]
    };
    let old = entry.path();
    if old != path && (resolved != 0 || old[3] == 0) {
        entry.set_windows(path);
    }
    0
}

/// Returns the index of the proxy link for a packet whose punt header requests interception; 0 if no policy intercepts
/// the packet. Sets the reason of the drop if the packet cannot be intercepted; the result is then not 0.
#[inline(always)]
pub fn link_of<H: Hook>(ctx: H, pkt: &mut PacketContext, header: *mut PuntHeader) -> u32 {
    const TERMINATE: u8 = Inspector::TlsTerminate as u8;
    // SAFETY: `header` points to a value of a per-CPU map, which lives as long as the map. Only the programs of this
    // CPU use it, and none of them interrupts another (softirqs are off).
    let (first, second, request_flags) = unsafe {
        (
            (*header).slots[0].inspector,
            (*header).slots[1].inspector,
            (*header).slots[0].flags,
        )
    };
    if first != TERMINATE && (pkt.punt_requests < 2 || second != TERMINATE) {
        return 0;
    }
    let packet = &pkt.headers;
    // The packets of two policies would have to pass both the proxy and an inspector, or two proxies, at one hook. A
    // link-local address is unique only on its link, and the proxy's namespace has only one link.
    let unsupported = pkt.punt_requests > 1
        || packet.network_offset != u16::from(ETHERNET)
        || ctx.tags_removed() != 0
        || (!packet.is(flags::ICMP_ERROR)
            && (identity::is_link_local(&packet.source) || identity::is_link_local(&packet.destination)));
    if unsupported {
        pkt.set(Reason::PuntUnsupported);
        return 1;
    }
    if packet.protocol != protocol::TCP && !packet.is(flags::ICMP_ERROR) {
        pkt.set(Reason::NoTlsTermination);
        return 1;
    }
    // The flow has the direction of the packet unless the packet is a reply.
    let ingress = (request_flags & punt_flags::INGRESS != 0) == (request_flags & punt_flags::REPLY == 0);
    let link = match CONFIG.get(0) {
        Some(config) => config.proxy_ifindex[usize::from(!ingress)],
        None => 0,
    };
    if link == 0 {
        pkt.set(Reason::NoProxy);
        return 1;
    }
    link
}

/// Drops packets that no program has redirected to the proxy link, for example those of a socket that is bound to the
/// interface. A redirected packet has the secret mark.
#[inline(always)]
pub fn only_redirected(ctx: Skb) -> i32 {
    if reinject::is_reinjected(ctx) {
        return TC_ACT_UNSPEC;
    }
    counters::punt_drop(Reason::PuntForeign, ctx.bytes(false).len());
    TC_ACT_SHOT
}

/// Returns whether a packet at the egress of a NIC came from the proxy without a mark ([`from_proxy`] lets the kernel
/// resolve its MAC address). No other packet has entered the node by a proxy link, because [`from_proxy`] drops or
/// redirects every other packet. At a workload's interface the result is false: a bridge floods packets to ports for
/// which they are not meant.
#[inline(always)]
pub fn is_from_proxy(ctx: Skb) -> bool {
    let entered_by = ctx.entered_by();
    if entered_by == 0 {
        return false;
    }
    let Some(config) = CONFIG.get(0) else {
        return false;
    };
    if entered_by != config.proxy_ifindex[0] && entered_by != config.proxy_ifindex[1] {
        return false;
    }
    let ifindex = ctx.ifindex();
    match INTERFACES.get(ifindex & (ID_SLOTS as u32 - 1)) {
        Some(interface) => interface.ifindex == ifindex && interface.role == role::HOST,
        None => false,
    }
}

/// Returns the endpoint that has an address. The ipcache does not have a new address of the node at once, so an unknown
/// address counts as the node's. If it is another address, no conntrack entry exists for it.
#[inline(always)]
fn endpoint_of(addr: &Addr) -> u32 {
    match identity::exact(addr).endpoint() {
        0 => identity::host_endpoint(),
        endpoint => endpoint,
    }
}

/// Sends a packet of the proxy on from the hook at which its flow was intercepted. Drops a packet that belongs to no
/// intercepted flow.
#[inline(always)]
pub fn from_proxy(ctx: Skb) -> i32 {
    let mut pkt = PacketContext::new(ctx.ifindex());
    let egress = match CONFIG.get(0) {
        Some(config) => config.proxy_ifindex[Direction::Egress as usize] == pkt.ifindex,
        None => false,
    };
    pkt.direction = u8::from(egress);
    ctx.decode(&mut pkt);
    if pkt.reason != 0 && ctx.pull_headers() {
        ctx.decode(&mut pkt);
    }
    if pkt.reason == 0 {
        pkt.reason = forward(ctx, &mut pkt, egress);
    }
    if pkt.is_dropped() {
        counters::reason(
            u32::from(pkt.reason),
            u32::from(pkt.direction & 1),
            pkt.headers.length,
        );
        return TC_ACT_SHOT;
    }
    TC_ACT_REDIRECT
}

/// Returns the number of the [`Reason`] for the drop of a packet of the proxy, or 0 if the packet is redirected.
#[inline(always)]
fn forward(ctx: Skb, pkt: &mut PacketContext, egress: bool) -> u8 {
    const FOREIGN: u8 = Reason::NoProxy as u8;
    let packet = &pkt.headers;
    if packet.is(flags::NOT_IP | flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER)
        || packet.protocol != protocol::TCP
        || packet.network_offset != u16::from(ETHERNET)
    {
        return FOREIGN;
    }
    let source = endpoint_of(&pkt.headers.source);
    let destination = endpoint_of(&pkt.headers.destination);
    // The packet comes from the endpoint whose policy intercepts the flow, or goes to it.
    let mut to_endpoint = false;
    conntrack::write_key(&mut pkt.key, source, false, conntrack::ends(&pkt.headers));
    let mut found = intercepted(pkt, egress);
    if found.is_none() {
        to_endpoint = true;
        conntrack::write_key(&mut pkt.key, destination, true, conntrack::ends(&pkt.headers));
        found = intercepted(pkt, egress);
    }
    let (Some(entry), Some(config)) = (found, CONFIG.get(0)) else {
        return FOREIGN;
    };
    let path = entry.path();
    let ifindex = path[3] & !ProxyPath::RESOLVED;
    let Some(interface) = INTERFACES.get(ifindex & (ID_SLOTS as u32 - 1)) else {
        return FOREIGN;
    };
    let at = u32::from(interface.endpoint);
    let is_workload = interface.role == role::ENDPOINT;
    // The element can belong to another flow by now (LRU maps recycle elements at once), so the interface must be that
    // of one of the packet's endpoints.
    let fits = match interface.role {
        role::ENDPOINT => at == source || at == destination,
        role::HOST => u32::from(pkt.key.endpoint) == at,
        _ => false,
    };
    if ifindex == 0 || interface.ifindex != ifindex || !fits {
        return FOREIGN;
    }
    let leaves = to_endpoint == (is_workload && at == u32::from(pkt.key.endpoint));
    // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs. The helper
    // bpf_skb_store_bytes reads the first 12 of the 16 bytes of `path`.
    unsafe {
        if leaves && path[3] & ProxyPath::RESOLVED == 0 {
            if bpf_redirect_neigh(interface.link, core::ptr::null_mut(), 0, 0) != i64::from(TC_ACT_REDIRECT) {
                return Reason::PuntFailed as u8;
            }
            return 0;
        }
        // The near side's address comes first in `path`, and the destination's comes first in a frame.
        let mac = path.as_ptr().cast::<u8>();
        let failed = if leaves {
            bpf_skb_store_bytes(ctx.0, 0, mac.add(6).cast(), 6, 0) != 0
                || bpf_skb_store_bytes(ctx.0, 6, mac.cast(), 6, 0) != 0
        } else {
            bpf_skb_store_bytes(ctx.0, 0, mac.cast(), 12, 0) != 0
        };
        if failed {
            return Reason::PuntFailed as u8;
        }
        let marked = leaves || interface.flags & interface_flags::XDP == 0;
        (*ctx.0).mark = if marked { config.mark } else { 0 };
        let direction = if leaves { 0 } else { u64::from(BPF_F_INGRESS) };
        if bpf_redirect(ifindex, direction) != i64::from(TC_ACT_REDIRECT) {
            return Reason::PuntFailed as u8;
        }
    }
    0
}

/// Returns the entry of the flow `pkt.key`, live or expired, if it is an intercepted flow of this direction: an idle
/// connection outlives its entry's timeout.
#[inline(always)]
fn intercepted(pkt: &PacketContext, egress: bool) -> Option<Entry> {
    match conntrack::entry(&pkt.key) {
        Some(entry)
            if conntrack::is_intercepted(entry) && (entry.flags() & ct_flags::INGRESS == 0) == egress =>
        {
            Some(entry)
        }
        _ => None,
    }
}

/// Assigns a TCP packet without a socket of its own to the listener of its direction and address family, whatever its
/// destination. Drops other packets, and all packets while there is no listener.
#[inline(always)]
pub fn assign_listener(ctx: &SkLookupContext) -> u32 {
    // SAFETY: the kernel passed this context pointer to the program; it is valid while the program runs.
    let (transport, family, ifindex) = unsafe {
        let lookup = ctx.lookup;
        ((*lookup).protocol, (*lookup).family, (*lookup).ingress_ifindex)
    };
    let direction = match ifindex.wrapping_sub(PROXY_IFINDEX) {
        0 => Direction::Ingress,
        1 => Direction::Egress,
        _ => return sk_action::SK_DROP,
    };
    if transport != u32::from(protocol::TCP) {
        return sk_action::SK_DROP;
    }
    let slot = listener_slot(direction, family == AF_INET6);
    match PROXY_LISTENERS.redirect_sk_lookup(ctx, slot, 0) {
        Ok(()) => sk_action::SK_PASS,
        Err(_) => sk_action::SK_DROP,
    }
}
