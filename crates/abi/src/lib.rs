//! Interface between the BPF programs (`xdp/`) and user space.
//!
//! Plain data with fixed layouts: map keys and values, event records, verdicts and reasons. The types derive `zerocopy`
//! traits, so a type with implicit padding does not compile. Padding has no defined value, but the verifier of Linux
//! 6.1 rejects a map key on the stack that is not fully initialized, and a hash map compares all bytes of a key.
//!
//! [`VERSION`] changes with every change of a layout or of its meaning; pinned maps of another version are never
//! reused.
//!
//! Depends on no other crate of Palisade. Start at [`PolicyKey`], [`CtKey`] and [`Reason`]; [`maps`] lists the maps
//! with their keys and values.
#![no_std]
#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![warn(unreachable_pub)]

mod capture;
mod class;
mod conntrack;
mod event;
mod interface;
mod ipcache;
mod policy;
mod proxy;
mod punt;
mod reason;

pub use capture::{
    CaptureCondition, CaptureEnd, CaptureHeader, CaptureSettings, MAX_CAPTURED, capture_flags, captured_flags,
};
pub use class::{
    CLASS_ANY, CLASS_SLOTS, CLASS_UNKNOWN, Class, FIRST_DYNAMIC_CLASS, ICMP_SLOTS, PORT_SLOTS,
    PROTOCOL_SLOTS, class_slot, class_slot_unknown_port,
};
pub use conntrack::{
    CtEntry, CtKey, FlowSlot, FragmentKey, FragmentPorts, FragmentSlot, SEND_LIMIT_DISTANCE, SHARE_SLOTS,
    SHARE_WAYS, Share, ct_flags, limited_window, send_limit_code,
};
pub use event::{BUDGET_SLOTS, Event, EventKind, MatchKind, TracePoint, budget_of, budget_slot, event_flags};
pub use interface::{
    Clock, Config, Counter, ETHER_TYPE_LLC, ETHER_TYPES, EndpointState, Interface, RateBudget, config_flags,
    endpoint_flags, interface_flags, role,
};
pub use ipcache::{Addr, IpcacheEntry, LearnedKey, PrefixKey};
pub use policy::{
    DIRECTIONS, Decision, Direction, INSIDE, Identity, Inspector, PolicyEntry, PolicyKey, entry_flags,
    identity,
};
pub use proxy::{PROXY_IFINDEX, PROXY_MAC, ProxiedFlow, ProxiedKey, ProxyPath, listener_slot};
pub use punt::{
    FlowCommand, MAX_ON_PUNT_LINK, MAX_PUNT_FRAME, MAX_PUNT_MSS, MAX_SEGMENT_HEADERS, MAX_TRAILER,
    MAX_WORKERS, PUNT_MTU, PuntHeader, PuntRequest, ReinjectTrailer, flow_op, punt_flags, punt_hook,
    reinject_flags, reinject_path,
};
pub use reason::{COUNTER_SLOTS, Reason, counter_slot};

/// Version of the layouts in this crate; part of the pin directory's name.
pub const VERSION: u32 = 7;

/// Number of slots of the arrays that are indexed by an endpoint id or by the low 16 bits of an interface index.
pub const ID_SLOTS: usize = 1 << 16;

/// TCP flags (RFC 9293, section 3.1).
pub mod tcp_flags {
    /// The sender has no more data.
    pub const FIN: u8 = 1;
    /// Synchronizes sequence numbers.
    pub const SYN: u8 = 2;
    /// Resets the connection.
    pub const RST: u8 = 4;
    /// Pushes buffered data to the application.
    pub const PSH: u8 = 8;
    /// The acknowledgment field is valid.
    pub const ACK: u8 = 16;
    /// The urgent pointer is valid.
    pub const URG: u8 = 32;
}

/// IP protocol numbers (IANA).
pub mod protocol {
    /// Internet Control Message Protocol, RFC 792.
    pub const ICMP: u8 = 1;
    /// Internet Group Management Protocol, RFC 3376.
    pub const IGMP: u8 = 2;
    /// Transmission Control Protocol, RFC 9293.
    pub const TCP: u8 = 6;
    /// User Datagram Protocol, RFC 768.
    pub const UDP: u8 = 17;
    /// ICMP for IPv6, RFC 4443.
    pub const ICMPV6: u8 = 58;
    /// Stream Control Transmission Protocol, RFC 9260.
    pub const SCTP: u8 = 132;
}

/// Names of the BPF maps, as they are declared in `xdp/` and pinned by `datapath`.
pub mod maps {
    /// `ARRAY[ID_SLOTS]` slot `ifindex & 0xffff` -> [`crate::Interface`].
    pub const INTERFACES: &str = "INTERFACES";
    /// `ARRAY[ID_SLOTS]`, memory-mapped, endpoint id -> [`crate::EndpointState`].
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// `HASH` [`crate::Addr`] -> [`crate::IpcacheEntry`]: full-length addresses.
    pub const IPCACHE: &str = "IPCACHE";
    /// `LPM_TRIE` [`crate::PrefixKey`] -> [`crate::IpcacheEntry`]: prefixes.
    pub const PREFIXES: &str = "PREFIXES";
    /// `ARRAY[1]`, memory-mapped: [`crate::CLASS_SLOTS`] × `u16`, see [`crate::class_slot`].
    pub const CLASSES: &str = "CLASSES";
    /// `HASH` [`crate::PolicyKey`] -> [`crate::PolicyEntry`].
    pub const POLICY: &str = "POLICY";
    /// `LRU_HASH` [`crate::CtKey`] -> [`crate::CtEntry`]. The shares are sized so that the map never becomes full.
    /// [`crate::counter_slot::CONNTRACK_CREATED`] counts the entries that the programs add.
    pub const CONNTRACK: &str = "CONNTRACK";
    /// `ARRAY[SHARE_SLOTS]`, memory-mapped, endpoint × 2 + direction -> [`crate::Share`].
    pub const SHARES: &str = "SHARES";
    /// `ARRAY` of [`crate::FlowSlot`], half as many as CONNTRACK has entries.
    pub const FLOW_SLOTS: &str = "FLOW_SLOTS";
    /// `ARRAY` of [`crate::FragmentSlot`], half as many as FRAGMENTS has entries.
    pub const FRAGMENT_SLOTS: &str = "FRAGMENT_SLOTS";
    /// `LRU_HASH` [`crate::FragmentKey`] -> [`crate::FragmentPorts`].
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// `RINGBUF` of [`crate::Event`].
    pub const EVENTS: &str = "EVENTS";
    /// `PERCPU_ARRAY[BUDGET_SLOTS]` [`crate::budget_slot`] -> [`crate::RateBudget`].
    pub const BUDGETS: &str = "BUDGETS";
    /// `PERCPU_ARRAY[1]` [`crate::Clock`].
    pub const CLOCK: &str = "CLOCK";
    /// `PERCPU_ARRAY[COUNTER_SLOTS]` reason × 2 + direction -> [`crate::Counter`]. The last slots are those of
    /// [`crate::counter_slot`].
    pub const COUNTERS: &str = "COUNTERS";
    /// `PERCPU_ARRAY` rule number -> [`crate::Counter`]; a rule whose number exceeds the array is counted in slot 0.
    pub const RULES: &str = "RULES";
    /// `ARRAY[1]` [`crate::Config`].
    pub const CONFIG: &str = "CONFIG";
    /// `HASH` [`crate::LearnedKey`] -> `u32`: identity of a learned address.
    pub const LEARNED: &str = "LEARNED";
    /// `ARRAY[MAX_WORKERS]`, memory-mapped, queue -> `u64`: last heartbeat of the queue's worker, ns of the coarse
    /// monotonic clock.
    pub const WORKERS: &str = "WORKERS";
    /// `PERCPU_ARRAY[1]` [`crate::PuntHeader`]: the punt header of the packet that a program on this CPU processes.
    pub const PUNT: &str = "PUNT";
    /// `XSKMAP[MAX_WORKERS]` queue of the punt link -> socket.
    pub const XSKS: &str = "XSKS";
    /// `SOCKMAP[4]` [`crate::listener_slot`] -> listening socket of the proxy.
    pub const PROXY_LISTENERS: &str = "PROXY_LISTENERS";

    /// `ARRAY[1]` [`crate::CaptureSettings`]. This map and the following ones exist only while a capture runs, and are
    /// not pinned.
    pub const CAPTURE: &str = "CAPTURE";
    /// `ARRAY` CPU -> [`crate::CaptureHeader`] and [`crate::MAX_CAPTURED`] bytes: the copy of the packet that a program
    /// on this CPU processes.
    pub const CAPTURE_BUFFERS: &str = "CAPTURE_BUFFERS";
    /// `RINGBUF` of [`crate::CaptureHeader`], each followed by bytes of the packet.
    pub const CAPTURED: &str = "CAPTURED";
    /// `PERCPU_ARRAY[1]` `u64`: packets that did not fit in the ring.
    pub const CAPTURE_LOST: &str = "CAPTURE_LOST";
}

/// Names of the programs in the object.
pub mod programs {
    /// XDP, ingress of a NIC or of a workload's interface.
    pub const XDP_INGRESS: &str = "palisade_xdp";
    /// tc classifier (tcx or clsact), ingress of a NIC or of a workload's interface.
    pub const TC_INGRESS: &str = "palisade_in";
    /// tc classifier (tcx or clsact), egress of a NIC or of a workload's interface.
    pub const TC_EGRESS: &str = "palisade_out";
    /// XDP at the workers' end of the punt link: redirects packets to the sockets.
    pub const PUNT: &str = "palisade_punt";
    /// tc, ingress of the node's end of the punt link: reinjects packets from the workers.
    pub const REINJECT: &str = "palisade_reinject";
    /// tc, egress of both ends of the punt link: drops frames that are not punted, for example those of a packet
    /// socket. Frames that an XDP program redirects or a worker sends by AF_XDP do not pass this hook.
    pub const PUNT_FILTER: &str = "palisade_punt_filter";
    /// XDP at the node's end of the punt link: passes every frame. Attached only on kernels that panic unless veth
    /// copies the frames of AF_XDP sockets.
    pub const PASS: &str = "palisade_pass";
    /// tc, ingress of the node's end of a proxy link: sends packets of the proxy on from the hook where their flow was
    /// intercepted.
    pub const PROXY: &str = "palisade_proxy";
    /// tc, egress of the node's end of a proxy link: drops packets that no program has redirected to the link.
    pub const PROXY_FILTER: &str = "palisade_proxy_filter";
    /// sk_lookup, in the network namespaces of the proxy: assigns packets without a socket to a listener.
    pub const LOOKUP: &str = "palisade_lookup";
    /// All programs of the object.
    pub const ALL: [&str; 10] = [
        XDP_INGRESS,
        TC_INGRESS,
        TC_EGRESS,
        PUNT,
        REINJECT,
        PUNT_FILTER,
        PASS,
        PROXY,
        PROXY_FILTER,
        LOOKUP,
    ];
}
