//! The policy table: identities, key and entry. [`PolicyKey`] states the order of the lookups; `xdp/src/policy.rs` makes them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Class;

/// A numeric security identity.
pub type Identity = u32;

/// The numbers that have a fixed meaning, and the ranges of the others.
pub mod identity {
    use super::Identity;
    /// In a policy key: any identity. As the identity of an address: not known.
    pub const ANY: Identity = 0;
    /// The node itself.
    pub const HOST: Identity = 1;
    /// Everything outside, either family.
    pub const WORLD: Identity = 2;
    /// A workload that nobody manages.
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
    /// The IPv4 part of the world, in dual stack.
    pub const WORLD_IPV4: Identity = 9;
    /// The IPv6 part of the world, in dual stack.
    pub const WORLD_IPV6: Identity = 10;
    /// First identity given to a set of labels.
    pub const FIRST_LABELS: Identity = 256;
    /// Last identity given to a set of labels.
    pub const LAST_LABELS: Identity = 65_535;
    /// First identity given to a prefix or a learned name, local to this node.
    pub const FIRST_LOCAL: Identity = (1 << 24) + 1;
    /// Last identity given to a prefix or a learned name.
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
/// A packet is judged by the first key that exists, in this order:
/// (identity, class), (identity, any class), (any identity, class), (any identity, any class).
/// The compiler has resolved precedence so that the first hit is the verdict; the last key exists for every
/// policy id and direction. If none exists the packet is dropped ([`crate::Reason::NoPolicy`]).
#[repr(C)]
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
pub struct PolicyKey {
    /// The policy: one compiled table, shared by the endpoints it is the same for. Never 0.
    pub policy: u32,
    /// Identity of the other end; [`identity::ANY`] for every one.
    pub identity: Identity,
    /// Class of protocol and destination port; [`crate::CLASS_ANY`] for every one.
    pub class: Class,
    /// [`Direction`] of the flow.
    pub direction: u8,
    /// Zero.
    pub zero: u8,
}

/// What is to be done with a flow.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Decision {
    /// Dropped, because nothing allows it (reason 133).
    Deny = 0,
    /// Dropped, because a deny rule names it (reason 181).
    DenyExplicit = 1,
    /// Let through.
    Allow = 2,
    /// Let through once user space has read it, by [`PolicyEntry::inspector`] and [`PolicyEntry::ruleset`].
    Inspect = 3,
    /// Dropped until the ends have authenticated (reason 189).
    AuthRequired = 4,
}

impl Decision {
    /// From its number; an unknown number is a denial.
    #[inline(always)]
    #[must_use]
    pub const fn from_u8(n: u8) -> Self {
        match n {
            2 => Self::Allow,
            3 => Self::Inspect,
            4 => Self::AuthRequired,
            1 => Self::DenyExplicit,
            _ => Self::Deny,
        }
    }
}

/// Which reader a flow goes to.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Inspector {
    /// Not inspected.
    None = 0,
    /// HTTP/1 (and HTTP/2 when an inspector for it exists).
    Http = 1,
    /// DNS.
    Dns = 2,
    /// TLS server names.
    Tls = 3,
    /// Kafka.
    Kafka = 4,
    /// A redirect to a listener of somebody else's proxy.
    Listener = 5,
    /// TLS termination.
    TlsTerminate = 6,
}

/// Flags of a [`PolicyEntry`].
pub mod entry_flags {
    /// What would be dropped by this entry passes, and is reported as AUDIT.
    pub const AUDIT: u8 = 1;
    /// The entry stands for "no policy enforces this direction".
    pub const UNENFORCED: u8 = 2;
}

/// Value of the policy table.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PolicyEntry {
    /// [`Decision`].
    pub decision: u8,
    /// [`entry_flags`].
    pub flags: u8,
    /// [`Inspector`], when the decision is [`Decision::Inspect`].
    pub inspector: u8,
    /// How specific the rule was that decided: a [`crate::MatchKind`].
    pub match_kind: u8,
    /// The deciding rule or default-deny. Never 0.
    pub rule: u32,
    /// The set of application rules, when the decision is [`Decision::Inspect`]; else 0.
    pub ruleset: u32,
}
