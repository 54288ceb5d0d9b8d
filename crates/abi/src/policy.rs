//! The policy table: identities, key and entry. [`PolicyKey`] defines the order of the lookups in `xdp/src/policy.rs`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Class;

/// A numeric security identity.
pub type Identity = u32;

/// Reserved identities, and the ranges of the others.
pub mod identity {
    use super::Identity;
    /// In a policy key: any identity. Of an address: unknown.
    pub const ANY: Identity = 0;
    /// The node itself.
    pub const HOST: Identity = 1;
    /// The world, both address families.
    pub const WORLD: Identity = 2;
    /// A workload that is not managed (Cilium's `unmanaged`).
    pub const UNMANAGED: Identity = 3;
    /// The node's health endpoint.
    pub const HEALTH: Identity = 4;
    /// An endpoint whose labels are not known yet.
    pub const INIT: Identity = 5;
    /// Another node.
    pub const REMOTE_NODE: Identity = 6;
    /// The API server of a cluster.
    pub const KUBE_APISERVER: Identity = 7;
    /// An ingress proxy.
    pub const INGRESS: Identity = 8;
    /// The world's IPv4 addresses, in dual stack.
    pub const WORLD_IPV4: Identity = 9;
    /// The world's IPv6 addresses, in dual stack.
    pub const WORLD_IPV6: Identity = 10;
    /// First identity of a label set.
    pub const FIRST_LABELS: Identity = 256;
    /// Last identity of a label set.
    pub const LAST_LABELS: Identity = 65_535;
    /// First identity of a prefix or a set of learned selectors; these identities are local to the node.
    pub const FIRST_LOCAL: Identity = (1 << 24) + 1;
    /// Last identity of a prefix or a set of learned selectors.
    pub const LAST_LOCAL: Identity = (1 << 25) - 1;
}

/// The direction of a flow or a packet, seen from an endpoint.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Direction {
    /// Towards the endpoint.
    Ingress = 0,
    /// From the endpoint.
    Egress = 1,
}

/// Both directions, in the order of their numbers.
pub const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// Key of the policy table.
///
/// The programs look up four keys in this order: (identity, class), (identity, any class), (any identity, class), (any
/// identity, any class). The first key that exists decides, because the compiler has resolved the precedence of the
/// rules. The last key exists for each policy and direction; if none of the four exists, the packet is dropped
/// ([`crate::Reason::NoPolicy`]).
#[repr(C)]
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct PolicyKey {
    /// Number of the policy table, which endpoints with equal tables share. Never 0.
    pub policy: u32,
    /// Identity of the peer; [`identity::ANY`] for any.
    pub identity: Identity,
    /// Class of protocol and destination port; [`crate::CLASS_ANY`] for any.
    pub class: Class,
    /// [`Direction`] of the flow.
    pub direction: u8,
    /// Zero.
    pub zero: u8,
}

/// Decision of a policy table entry about a flow.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Decision {
    /// Drop: no rule allows the flow (reason 133).
    Deny = 0,
    /// Drop: a deny rule matches (reason 181).
    DenyExplicit = 1,
    /// Pass.
    Allow = 2,
    /// Punt to a worker, which inspects the flow by [`PolicyEntry::inspector`] and [`PolicyEntry::ruleset`].
    Inspect = 3,
    /// Drop: the rule requires authentication (reason 189).
    AuthRequired = 4,
    /// Drop: UDP to a port at which the proxy intercepts TLS; QUIC would not be inspected (reason 208).
    DenyQuic = 5,
}

impl Decision {
    /// Returns the decision of this number; [`Self::Deny`] for an unknown number.
    #[inline(always)]
    #[must_use]
    pub const fn from_u8(n: u8) -> Self {
        match n {
            2 => Self::Allow,
            3 => Self::Inspect,
            4 => Self::AuthRequired,
            5 => Self::DenyQuic,
            1 => Self::DenyExplicit,
            _ => Self::Deny,
        }
    }
}

/// The inspector of a flow.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Inspector {
    /// Not inspected.
    None = 0,
    /// HTTP/1.
    Http = 1,
    /// DNS.
    Dns = 2,
    /// TLS server names.
    Tls = 3,
    /// Kafka.
    Kafka = 4,
    /// Redirect to a listener of an external proxy; not implemented.
    Listener = 5,
    /// TLS termination.
    TlsTerminate = 6,
}

/// Flags of a [`PolicyEntry`].
pub mod entry_flags {
    /// Audit mode: a packet that this entry denies passes and is reported as AUDIT.
    pub const AUDIT: u8 = 1;
    /// No policy enforces this direction; the entry allows all peers and ports.
    pub const UNENFORCED: u8 = 2;
    /// A failsafe port of the node: the entry allows before the policy, but only at a NIC. At other hooks the entry of
    /// [`INSIDE`](super::INSIDE) decides.
    pub const FAILSAFE: u8 = 4;
}

/// Added to the direction in a [`PolicyKey`]: entries of the node's table that decide at hooks other than those of a NIC,
/// where failsafe ports do not apply. They are looked up only after an entry with [`entry_flags::FAILSAFE`].
pub const INSIDE: u8 = 2;

/// Value of the policy table.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PolicyEntry {
    /// [`Decision`].
    pub decision: u8,
    /// [`entry_flags`].
    pub flags: u8,
    /// [`Inspector`], if the decision is [`Decision::Inspect`].
    pub inspector: u8,
    /// [`crate::MatchKind`]: specificity of the deciding rule.
    pub match_kind: u8,
    /// Number of the deciding rule, or of the default deny. Never 0.
    pub rule: u32,
    /// Number of the rule set, if the decision is [`Decision::Inspect`]; otherwise 0.
    pub ruleset: u32,
}
