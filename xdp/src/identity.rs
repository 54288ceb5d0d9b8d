//! Lookup of the identity of an address: exact ipcache entry, learned address, longest prefix, world. Also lookups in
//! the routing table.

use aya_ebpf::bindings::bpf_fib_lookup;
use aya_ebpf::btf_maps::lpm_trie::Key;
use palisade_abi::identity::FIRST_LOCAL;
use palisade_abi::{Addr, IpcacheEntry, LearnedKey, protocol};
use palisade_packet::flags;

use crate::hook::Hook;
use crate::maps::{CONFIG, IPCACHE, LEARNED, PREFIXES};
use crate::packet_context::PacketContext;

/// The ipcache entry of an address: identity and endpoint in one word.
#[derive(Clone, Copy)]
pub struct IpcacheHit(u64);

impl IpcacheHit {
    /// The address has no entry.
    pub const NONE: Self = Self(0);

    #[inline(always)]
    fn new(entry: &IpcacheEntry) -> Self {
        Self((u64::from(entry.endpoint) << 32) | u64::from(entry.identity))
    }

    /// Returns the endpoint of this node that has the address; 0 if no endpoint has it.
    #[inline(always)]
    pub fn endpoint(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Returns the identity of the address; 0 if the address has no entry.
    #[inline(always)]
    pub fn identity(self) -> u32 {
        self.0 as u32
    }
}

/// Returns the node's own endpoint; 0 before user space has configured it.
#[inline(always)]
pub fn host_endpoint() -> u32 {
    match CONFIG.get(0) {
        Some(config) => config.host_endpoint,
        None => 0,
    }
}

/// Returns the exact ipcache entry of an address.
#[inline(always)]
pub fn exact(addr: &Addr) -> IpcacheHit {
    IpcacheHit(exact_word(addr))
}

// The function returns one word, because LLVM returns an aggregate through memory, which the verifier tracks less
// precisely.
#[inline(never)]
fn exact_word(addr: &Addr) -> u64 {
    exact_here(addr).0
}

/// Returns the exact ipcache entry of an address: [`exact`] inlined, for callers whose stack has room for the key.
#[inline(always)]
pub fn exact_here(addr: &Addr) -> IpcacheHit {
    // Copy the address to the stack: it can be part of the packet context, and the verifier of Linux 6.1 rejects a map
    // key in memory that is a parameter of a global function.
    let key = *addr;
    // SAFETY: the value stays readable while the program runs (RCU), and an update of the map replaces the element
    // instead of writing to it. The value is copied at once.
    match unsafe { IPCACHE.get(&key) } {
        Some(entry) => IpcacheHit::new(entry),
        None => IpcacheHit::NONE,
    }
}

/// Returns the identity of the peer of a flow that `endpoint` opens. A learned address takes precedence over prefixes,
/// but not over a reserved identity or an identity of a label set. `known`: the exact ipcache entry.
#[inline(never)]
pub fn learned(addr: &Addr, known: u64, endpoint: u32) -> u32 {
    let exact = IpcacheHit(known).identity();
    if exact == 0 || exact >= FIRST_LOCAL {
        let key = LearnedKey {
            addr: *addr,
            endpoint,
        };
        // SAFETY: the value stays readable while the program runs (RCU), and an update of the map replaces the element
        // instead of writing to it. The value is copied at once.
        if let Some(identity) = unsafe { LEARNED.get(&key) } {
            return *identity;
        }
    }
    identity(addr, known)
}

/// Returns the identity of an address whose exact ipcache entry is `known`: the identity of that entry, else of the
/// longest prefix, else of the world.
#[inline(always)]
pub fn identity(addr: &Addr, known: u64) -> u32 {
    match IpcacheHit(known).identity() {
        0 => by_prefix(addr),
        identity => identity,
    }
}

#[inline(never)]
fn by_prefix(addr: &Addr) -> u32 {
    if let Some(entry) = PREFIXES.get(&Key::new(128, *addr)) {
        return entry.identity;
    }
    match CONFIG.get(0) {
        Some(config) if addr.is_v4() => config.world_ipv4,
        Some(config) => config.world_ipv6,
        None => 0,
    }
}

impl From<IpcacheHit> for u64 {
    #[inline(always)]
    fn from(known: IpcacheHit) -> Self {
        known.0
    }
}

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Result of [`route`]: the kernel would not deliver the packet locally, and the lookup names no interface by which the
/// packet would leave.
pub const NOWHERE: u32 = u32::MAX;

/// Returns whether an address is link-local and thus unique only on its link (RFC 4291, section 2.5.6). An IPv4 address
/// of 169.254.0.0/16 is not treated as link-local: Linux accepts packets to such an address of the node on every link.
#[inline(always)]
pub fn is_link_local(addr: &Addr) -> bool {
    addr.0[0] & u32::from_ne_bytes([0xff, 0xc0, 0, 0]) == u32::from_ne_bytes([0xfe, 0x80, 0, 0])
}

/// Returns whether the kernel would forward the packet rather than deliver it locally. Multicast and broadcast count as
/// local delivery.
///
/// The function asks the routing table, which contains a new address of the node at once; the ipcache contains the
/// address only after the daemon has seen it. An unclear result counts as local delivery.
#[inline(always)]
pub fn is_forwarded<H: Hook>(ctx: H, pkt: &PacketContext) -> bool {
    route(ctx, pkt) != 0
}

/// Returns the index of the interface by which the kernel would forward the packet; [`NOWHERE`] if there is no such
/// interface; 0 if the kernel would deliver the packet locally or the result is unclear.
#[inline(always)]
pub fn route<H: Hook>(ctx: H, pkt: &PacketContext) -> u32 {
    ask_route(ctx, pkt, false)
}

/// Returns the result of [`route`] for a packet with source and destination of this packet exchanged.
#[inline(always)]
pub fn route_back<H: Hook>(ctx: H, pkt: &PacketContext) -> u32 {
    ask_route(ctx, pkt, true)
}

#[inline(never)]
fn ask_route<H: Hook>(ctx: H, pkt: &PacketContext, back: bool) -> u32 {
    let packet = &pkt.headers;
    let (from, to) = if back {
        (&packet.destination, &packet.source)
    } else {
        (&packet.source, &packet.destination)
    };
    let ipv6 = packet.is(flags::IPV6);
    let first = to.bytes()[if ipv6 { 0 } else { 12 }];
    if if ipv6 { first == 0xff } else { first >= 224 } {
        return 0;
    }
    // SAFETY: the parameter block consists of integers and arrays of integers, for which zero is a valid value.
    let mut question: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    question.family = if ipv6 { AF_INET6 } else { AF_INET };
    question.l4_protocol = packet.protocol;
    question.ifindex = pkt.ifindex;
    // `ip rule` can select by ports. The kernel does not know the ports of a fragment.
    if matches!(packet.protocol, protocol::TCP | protocol::UDP | protocol::SCTP)
        && !packet.is(flags::FRAGMENT_FIRST | flags::FRAGMENT_LATER)
    {
        let (source, destination) = (packet.source_port.to_be(), packet.destination_port.to_be());
        (question.sport, question.dport) = if back {
            (destination, source)
        } else {
            (source, destination)
        };
    }
    if ipv6 {
        question.__bindgen_anon_3.ipv6_src = from.0;
        question.__bindgen_anon_4.ipv6_dst = to.0;
    } else {
        question.__bindgen_anon_3.ipv4_src = from.0[3];
        question.__bindgen_anon_4.ipv4_dst = to.0[3];
    }
    // BPF_FIB_LKUP_RET_*: 0 route found, 1 to 3 refused, 4 local delivery, 5 forwarding off, 6 encapsulating route,
    // 7 neighbour not resolved, 8 packet exceeds the MTU of the next link.
    match ctx.route(&mut question) {
        0 | 7 if question.ifindex != 0 => question.ifindex,
        0..=3 | 6..=8 => NOWHERE,
        _ => 0,
    }
}
