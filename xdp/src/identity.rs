//! Who an address is, and whether an address is this node's.

use aya_ebpf::bindings::bpf_fib_lookup;
use aya_ebpf::btf_maps::lpm_trie::Key;
use palisade_abi::identity::FIRST_LOCAL;
use palisade_abi::{Addr, IpcacheEntry, LearnedKey, protocol};
use palisade_packet::flags;

use crate::ctx::Context;
use crate::maps::{CONFIG, IPCACHE, LEARNED, PREFIXES};
use crate::packet_context::PacketContext;

/// What the ipcache knows of an address.
#[derive(Clone, Copy)]
pub struct IpcacheHit(u64);

impl IpcacheHit {
    /// Of an address that it does not know.
    pub const NONE: Self = Self(0);

    #[inline(always)]
    fn new(entry: &IpcacheEntry) -> Self {
        Self((u64::from(entry.endpoint) << 32) | u64::from(entry.identity))
    }

    /// The endpoint of this node that owns it; 0 if none does.
    #[inline(always)]
    pub fn endpoint(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Its identity; 0 if the ipcache does not know it.
    #[inline(always)]
    pub fn identity(self) -> u32 {
        self.0 as u32
    }
}

/// The node's own endpoint; 0 if nobody said which it is.
#[inline(always)]
pub fn host_endpoint() -> u32 {
    match CONFIG.get(0) {
        Some(config) => config.host_endpoint,
        None => 0,
    }
}

/// The exact address.
#[inline(always)]
pub fn exact(addr: &Addr) -> IpcacheHit {
    IpcacheHit(exact_word(addr))
}

// Returns one word: an aggregate would come back through memory, which the verifier follows less well.
#[inline(never)]
fn exact_word(addr: &Addr) -> u64 {
    exact_here(addr).0
}

/// [`exact`] without a call, where the stack has room for the key.
#[inline(always)]
pub fn exact_here(addr: &Addr) -> IpcacheHit {
    // On the stack: the verifier of Linux 6.1 takes no map key from the memory of a global function's parameter.
    let key = *addr;
    // SAFETY: user space replaces an element, it never changes one in place; the copy is taken at once.
    match unsafe { IPCACHE.get(&key) } {
        Some(entry) => IpcacheHit::new(entry),
        None => IpcacheHit::NONE,
    }
}

/// The identity of the other end of a flow that `endpoint` opens: what it has learned by a name goes before prefixes,
/// but not before what has labels of its own.
#[inline(never)]
pub fn learned(addr: &Addr, known: u64, endpoint: u32) -> u32 {
    let exact = IpcacheHit(known).identity();
    if exact == 0 || exact >= FIRST_LOCAL {
        let key = LearnedKey {
            addr: *addr,
            endpoint,
        };
        // SAFETY: user space replaces an element, it never changes one in place; the copy is taken at once.
        if let Some(identity) = unsafe { LEARNED.get(&key) } {
            return *identity;
        }
    }
    identity(addr, known)
}

/// The identity of an address whose exact entry is `known`: that, or the longest prefix, or the world.
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

/// See [`route`].
pub const NOWHERE: u32 = u32::MAX;

/// Whether an address is unique on its link only (RFC 4291, 2.5.6). IPv4 has no such scope in Linux: an address of
/// 169.254.0.0/16 is the node's on every link.
#[inline(always)]
pub fn is_link_local(addr: &Addr) -> bool {
    addr.0[0] & u32::from_ne_bytes([0xff, 0xc0, 0, 0]) == u32::from_ne_bytes([0xfe, 0x80, 0, 0])
}

/// Whether the kernel would send the packet on rather than take it itself. Multicast and broadcast it takes.
///
/// The ipcache knows the addresses of the node that the configuration and the daemon know; the routing table
/// knows all, also one that appeared a moment ago. Anything but a clear answer counts as "takes it".
#[inline(always)]
pub fn is_forwarded<C: Context>(ctx: C, frame: &PacketContext) -> bool {
    route(ctx, frame) != 0
}

/// The interface by which the kernel would send the packet on; [`NOWHERE`] if it would refuse to; 0 if it takes it itself.
#[inline(always)]
pub fn route<C: Context>(ctx: C, frame: &PacketContext) -> u32 {
    ask_route(ctx, frame, false)
}

/// The same for a packet that goes back to the source of this one.
#[inline(always)]
pub fn route_back<C: Context>(ctx: C, frame: &PacketContext) -> u32 {
    ask_route(ctx, frame, true)
}

#[inline(never)]
fn ask_route<C: Context>(ctx: C, frame: &PacketContext, back: bool) -> u32 {
    let packet = &frame.packet;
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
    // SAFETY: the parameter block is plain integers and arrays of them, for which zero is a value.
    let mut question: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    question.family = if ipv6 { AF_INET6 } else { AF_INET };
    question.l4_protocol = packet.protocol;
    question.ifindex = frame.ifindex;
    // `ip rule` may choose by ports. Of a fragment the kernel does not know them here.
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
    // BPF_FIB_LKUP_RET_*: 0 a route, 1 to 3 the kernel refuses, 4 for this machine, 5 forwarding is off,
    // 6 an encapsulating route, 7 a route whose neighbour is not resolved, 8 too long for the next link.
    match ctx.route(&mut question) {
        0 | 7 if question.ifindex != 0 => question.ifindex,
        0..=3 | 6..=8 => NOWHERE,
        _ => 0,
    }
}
