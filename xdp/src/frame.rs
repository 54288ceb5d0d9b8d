//! The state of one packet on its way through the programs.
//!
//! Every function of the pipeline gets a [`Frame`], reads what earlier steps wrote into it, and writes its own result.

use palisade_abi::{CtKey, Decision, MatchKind, Reason};
use palisade_packet::Packet;

/// Where a packet is: role of the interface, hook, and whose policy is asked.
pub mod place {
    /// Enters by a NIC.
    pub const NIC_IN: u8 = 0;
    /// Leaves by a NIC.
    pub const NIC_OUT: u8 = 1;
    /// Enters by a workload's interface: comes from the workload.
    pub const FROM_WORKLOAD: u8 = 2;
    /// Leaves by a workload's interface: goes to the workload.
    pub const TO_WORKLOAD: u8 = 3;
    /// On a workload's interface, when the node's own policy is asked.
    pub const NODE: u8 = 4;
}

/// One packet on its way through the verdict function.
///
/// The functions hand on what they find in the bytes below, not by their results. A byte that is not at a
/// multiple of eight is one whose value the verifier forgets when it is stored; a result that is a constant it
/// remembers, and walks everything behind once for every reason there is.
#[repr(C)]
pub struct Frame {
    /// What was decoded.
    pub packet: Packet,
    /// Its connection, as the asked endpoint sees it.
    pub key: CtKey,
    /// Coarse monotonic clock, ns.
    pub now: u64,
    /// The other end's exact ipcache entry, see [`crate::identity::Known`].
    pub known: u64,
    /// The interface.
    pub ifindex: u32,
    /// The endpoint whose policy is asked.
    pub endpoint: u32,
    /// The endpoint's policy table.
    pub policy: u32,
    /// The endpoint's revision.
    pub revision: u32,
    /// The rule that decided.
    pub rule: u32,
    /// Identity of the other end, 0 if not looked up.
    pub remote_identity: u32,
    /// The set of application rules, if the flow is to be read.
    pub ruleset: u32,
    /// [`palisade_abi::CtEntry::serial`] of the flow.
    pub serial: u32,
    /// [`palisade_abi::PuntHeader::hash`], once somebody asks.
    pub hash: u32,
    /// [`palisade_abi::event_flags`] known so far.
    pub event_flags: u8,
    /// Why the packet is let through or dropped: [`Reason`].
    pub reason: u8,
    /// Direction of the packet, seen from the endpoint: [`palisade_abi::Direction`].
    pub direction: u8,
    /// See [`place`].
    pub place: u8,
    /// [`palisade_abi::ct_flags`] of the flow.
    pub flow_flags: u8,
    /// Where the frame starts: 0 with Ethernet, 1 with the network header.
    pub layer3: u8,
    /// Not 0: an XDP program in generic mode judges what enters the interface.
    pub generic: u8,
    /// Not 0: the program stands at the egress of the interface.
    pub egress: u8,
    /// A later fragment whose ports nobody knows.
    pub ports_unknown: bool,
    /// Whether the packet may begin a flow.
    pub stateful: bool,
    /// Decode by the frame's true length, not that of its readable part.
    pub whole: bool,
    /// [`Decision`] of the policy entry.
    pub decision: u8,
    /// [`MatchKind`] of the policy entry.
    pub match_kind: u8,
    /// [`palisade_abi::Inspector`] that is to read the flow; 0: none.
    pub inspector: u8,
    /// [`palisade_abi::entry_flags`] of the policy entry.
    pub entry_flags: u8,
    /// How many policies want the packet read.
    pub asks: u8,
    /// Whether one of those who ask needs this packet.
    pub needed: bool,
    /// The endpoint has learned addresses by name.
    pub learns: u8,
    /// [`palisade_abi::punt_flags::AUDIT`] if the flow's application rules only audit.
    pub punt_flags: u8,
    /// What the policy says of the same flow in the other direction: see [`other`].
    pub other: u8,
    /// The packet begins a flow of which it is an answer.
    pub turned: bool,
}

/// What matters of the verdict on a flow in the direction that is not the packet's.
pub mod other {
    /// Nothing: allowed, or not allowed by any rule, or not asked for.
    pub const NOTHING: u8 = 0;
    /// It would be read.
    pub const READ: u8 = 1;
    /// A rule denies it by name.
    pub const DENIED: u8 = 2;
}

impl Frame {
    #[inline(always)]
    pub fn new(ifindex: u32) -> Self {
        Self {
            packet: Packet::default(),
            key: CtKey::default(),
            now: 0,
            known: 0,
            ifindex,
            endpoint: 0,
            policy: 0,
            revision: 0,
            rule: 0,
            remote_identity: 0,
            ruleset: 0,
            serial: 0,
            hash: 0,
            event_flags: 0,
            reason: Reason::Allowed as u8,
            direction: 0,
            place: 0,
            flow_flags: 0,
            layer3: 0,
            generic: 0,
            egress: 0,
            ports_unknown: false,
            stateful: false,
            whole: false,
            decision: Decision::Deny as u8,
            match_kind: MatchKind::None as u8,
            inspector: 0,
            entry_flags: 0,
            asks: 0,
            needed: false,
            learns: 0,
            punt_flags: 0,
            other: other::NOTHING,
            turned: false,
        }
    }

    /// Whether the packet goes to the endpoint whose policy is asked.
    #[inline(always)]
    pub fn is_ingress(&self) -> bool {
        self.direction == 0
    }

    /// Whether the packet is dropped, as far as is known.
    #[inline(always)]
    pub fn is_dropped(&self) -> bool {
        self.reason >= 130
    }

    /// Forgets what another endpoint's policy said.
    #[inline(always)]
    pub fn forget_decision(&mut self) {
        self.rule = 0;
        self.remote_identity = 0;
        self.decision = Decision::Deny as u8;
        self.match_kind = MatchKind::None as u8;
        self.inspector = 0;
        self.ruleset = 0;
        self.punt_flags = 0;
        self.entry_flags = 0;
        self.turned = false;
    }

    /// Sets the verdict.
    #[inline(always)]
    pub fn set(&mut self, reason: Reason) {
        self.reason = reason as u8;
    }
}
