//! The state of one packet in the programs.
//!
//! Every function of the pipeline gets a [`PacketContext`], reads what earlier steps wrote into it, and writes its own
//! result.

use palisade_abi::{CtKey, Decision, MatchKind, Reason};
use palisade_packet::Packet;

/// Place of a program: the role of the interface, the hook, and the endpoint whose policy is looked up.
pub mod hook_point {
    /// Ingress of a NIC.
    pub const NIC_IN: u8 = 0;
    /// Egress of a NIC.
    pub const NIC_OUT: u8 = 1;
    /// Ingress of a workload's interface: the packet comes from the workload.
    pub const FROM_WORKLOAD: u8 = 2;
    /// Egress of a workload's interface: the packet goes to the workload.
    pub const TO_WORKLOAD: u8 = 3;
    /// At a workload's interface, while the node's own policy is looked up.
    pub const NODE: u8 = 4;
}

/// The state of one packet in the pipeline.
///
/// Functions store their results in these fields and do not return them. The verifier tracks a returned constant, and
/// walks all code after the call once for each value. It does not track most bytes that are stored at an offset other
/// than a multiple of eight.
#[repr(C)]
pub struct PacketContext {
    /// The decoded headers.
    pub headers: Packet,
    /// Key of the flow, as the endpoint whose policy is looked up sees it.
    pub key: CtKey,
    /// Coarse monotonic clock, ns.
    pub now: u64,
    /// Exact ipcache entry of the peer, see [`crate::identity::IpcacheHit`].
    pub ipcache_hit: u64,
    /// Index of the interface.
    pub ifindex: u32,
    /// The endpoint whose policy is looked up.
    pub endpoint: u32,
    /// The endpoint's policy table.
    pub policy: u32,
    /// The endpoint's revision.
    pub revision: u32,
    /// The rule that decided.
    pub rule: u32,
    /// Identity of the peer; 0: not looked up.
    pub remote_identity: u32,
    /// The rule set, if the flow needs inspection; otherwise 0.
    pub ruleset: u32,
    /// [`palisade_abi::CtEntry::serial`] of the flow.
    pub serial: u32,
    /// [`palisade_abi::PuntHeader::hash`], once a policy requests a punt.
    pub hash: u32,
    /// Highest window field that the segment may have; 0: any. See `offload::limit_window`.
    pub window_limit: u16,
    /// [`palisade_abi::event_flags`] known so far.
    pub event_flags: u8,
    /// The verdict so far: [`Reason`].
    pub reason: u8,
    /// Direction of the packet, seen from the endpoint: [`palisade_abi::Direction`].
    pub direction: u8,
    /// See [`hook_point`].
    pub hook_point: u8,
    /// [`palisade_abi::ct_flags`] of the flow.
    pub flow_flags: u8,
    /// First header of the frame: 0: Ethernet, 1: network.
    pub layer3: u8,
    /// Not 0: the ingress hook of the interface is XDP in generic mode.
    pub generic: u8,
    /// Not 0: failsafe ports do not pass at the interface.
    pub no_failsafe: u8,
    /// Not 0: the hook is the egress of the interface.
    pub egress: u8,
    /// Whether the packet is a later fragment whose ports are unknown, because those of the first one are not stored.
    pub ports_unknown: bool,
    /// Whether the packet can match or create a conntrack entry.
    pub stateful: bool,
    /// Whether the decoder compares lengths with the whole frame rather than with its linear part.
    pub full_length: bool,
    /// [`Decision`] of the policy entry.
    pub decision: u8,
    /// [`MatchKind`] of the policy entry.
    pub match_kind: u8,
    /// The [`palisade_abi::Inspector`] of the flow; 0: none.
    pub inspector: u8,
    /// [`palisade_abi::entry_flags`] of the policy entry.
    pub entry_flags: u8,
    /// Number of policies that request a punt.
    pub punt_requests: u8,
    /// Whether a worker must get this packet: a policy requests a punt, and the offload windows of that policy's flow
    /// do not exempt the packet.
    pub must_punt: bool,
    /// Not 0: the endpoint's policy selects peers by DNS name, so learned addresses are looked up.
    pub learns: u8,
    /// [`palisade_abi::punt_flags::AUDIT`] if the flow's application rules only audit.
    pub punt_flags: u8,
    /// [`opposite`]: result of the lookup of the same flow in the opposite direction.
    pub opposite: u8,
    /// Whether the packet creates a flow and is in the reply direction of that flow.
    pub reversed: bool,
    /// Whether the capture buffer of this CPU has the packet.
    #[cfg(feature = "capture")]
    pub captured: bool,
}

/// Results of the policy lookup for a flow in the direction opposite to that in which it is evaluated.
pub mod opposite {
    /// Allowed, denied by default, or not looked up.
    pub const NONE: u8 = 0;
    /// The flow would be inspected.
    pub const INSPECTED: u8 = 1;
    /// A deny rule matches.
    pub const DENIED: u8 = 2;
}

impl PacketContext {
    #[inline(always)]
    pub fn new(ifindex: u32) -> Self {
        Self {
            headers: Packet::default(),
            key: CtKey::default(),
            now: 0,
            ipcache_hit: 0,
            ifindex,
            endpoint: 0,
            policy: 0,
            revision: 0,
            rule: 0,
            remote_identity: 0,
            ruleset: 0,
            serial: 0,
            hash: 0,
            window_limit: 0,
            event_flags: 0,
            reason: Reason::Allowed as u8,
            direction: 0,
            hook_point: 0,
            flow_flags: 0,
            layer3: 0,
            generic: 0,
            no_failsafe: 0,
            egress: 0,
            ports_unknown: false,
            stateful: false,
            full_length: false,
            decision: Decision::Deny as u8,
            match_kind: MatchKind::None as u8,
            inspector: 0,
            entry_flags: 0,
            punt_requests: 0,
            must_punt: false,
            learns: 0,
            punt_flags: 0,
            opposite: opposite::NONE,
            reversed: false,
            #[cfg(feature = "capture")]
            captured: false,
        }
    }

    /// Returns whether the packet goes to the endpoint whose policy is looked up.
    #[inline(always)]
    pub fn is_ingress(&self) -> bool {
        self.direction == 0
    }

    /// Returns whether the verdict so far is a drop.
    #[inline(always)]
    pub fn is_dropped(&self) -> bool {
        Reason::is_drop_number(self.reason)
    }

    /// Clears the result of an earlier policy lookup.
    #[inline(always)]
    pub fn clear_decision(&mut self) {
        self.rule = 0;
        self.remote_identity = 0;
        self.decision = Decision::Deny as u8;
        self.match_kind = MatchKind::None as u8;
        self.inspector = 0;
        self.ruleset = 0;
        self.punt_flags = 0;
        self.entry_flags = 0;
        self.reversed = false;
    }

    /// Sets the verdict.
    #[inline(always)]
    pub fn set(&mut self, reason: Reason) {
        self.reason = reason as u8;
    }
}
