//! Reasons of verdicts: why a packet passed or was dropped.
//!
//! Packets with a reason below 130 pass. Numbers from 130 to 205 have the meaning and the text of Cilium 1.19
//! (`bpf/lib/drop_reasons.h`, Hubble's `DropReason`). Numbers from 207 to 253 are Palisade's own.

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// Reason of a verdict.
        #[repr(u8)]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        pub enum Reason {
            $($(#[$doc])* $name = $number,)*
        }

        impl Reason {
            /// All reasons, by number.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Returns the reason of this number.
            #[must_use]
            pub const fn from_u8(n: u8) -> Option<Self> {
                match n { $($number => Some(Self::$name),)* _ => None }
            }

            /// Returns the text for operators and Hubble clients.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// Passed: a rule allows the packet, or no policy enforces the direction.
    Allowed = 0, "Allowed";
    /// Passed: a packet of a live flow, in either direction.
    Established = 1, "Established";
    /// Passed: an ICMP error about a live flow.
    Related = 2, "Related";
    /// Passed: ARP, neighbour discovery, multicast listener reports, link control.
    LinkControl = 3, "Link control";
    /// Passed by audit mode.
    Audited = 4, "Audited";
    /// Passed: this node forwards the packet. A packet to an endpoint gets its verdict at the endpoint's interface.
    Forwarded = 5, "Forwarded";
    /// Passed without inspection: no worker runs, and the node is configured to fail open.
    FailedOpen = 6, "Failed open: not inspected";
    /// Passed before the policy: a failsafe port of the node (`[failsafe]`).
    Failsafe = 7, "Failsafe port";

    /// The sender must not use this source address.
    InvalidSourceIp = 132, "Invalid source ip";
    /// Default deny: no rule allows the packet.
    PolicyDenied = 133, "Policy denied";
    /// A malformed ARP packet or neighbour discovery message.
    InvalidPacket = 134, "Invalid packet";
    /// A TCP or UDP header with an invalid data offset, combination of flags, or length.
    CtInvalidHeader = 135, "CT: Truncated or invalid header";
    /// ICMPv6 in an IPv4 packet, or ICMP in an IPv6 packet.
    UnknownL4 = 137, "CT: Unknown L4 protocol";
    /// A frame that is neither IPv4 nor IPv6, and not of an allowed link protocol.
    UnsupportedL3 = 139, "Unsupported L3 protocol";
    /// The conntrack entry of a new flow could not be created.
    CtInsertionFailed = 155, "CT: Map insertion failed";
    /// IPv6 extension headers that are not accepted: for example too many, out of order, or a routing header with
    /// segments left.
    InvalidIpv6Extension = 156, "Invalid IPv6 extension header";
    /// A later fragment whose first fragment was not seen and that no rule for all ports allows.
    FragmentNotFound = 175, "First logical datagram fragment not found";
    /// A deny rule matches.
    PolicyDeniedByDenylist = 181, "Policy denied by denylist";
    /// The rule requires authentication, which Palisade does not implement.
    AuthRequired = 189, "Authentication required";

    /// The policy requires a secret that is missing or cannot be used.
    SecretUnusable = 207, "Secret not usable";
    /// UDP to a port at which the policy intercepts TLS: QUIC would not be inspected, and its clients then use TCP.
    QuicIntercepted = 208, "QUIC to an intercepted port";
    /// An intercepted connection failed: the server cannot be reached, or a TLS handshake failed.
    InterceptFailed = 209, "Interception failed";
    /// The program runs on an interface that is not configured.
    NoInterface = 210, "Interface not configured";
    /// The endpoint has no policy table, or the table has no entry for the packet.
    NoPolicy = 211, "No policy loaded";
    /// The policy requires HTTP inspection, which is not available.
    NoHttpInspector = 212, "No inspector: HTTP";
    /// The policy requires DNS inspection, which is not available.
    NoDnsInspector = 213, "No inspector: DNS";
    /// The policy requires TLS inspection, which is not available.
    NoTlsInspector = 214, "No inspector: TLS";
    /// The policy requires Kafka inspection, which is not available.
    NoKafkaInspector = 215, "No inspector: Kafka";
    /// The policy redirects the flow to a listener, which is not implemented.
    NoListener = 216, "No listener";
    /// The policy requires interception, which is not available, or the flow is not TCP.
    NoTlsTermination = 217, "No inspector: TLS termination";
    /// The packet goes to a workload's interface, but its destination is neither an address of the workload nor a
    /// multicast or broadcast address.
    NotTheEndpoints = 218, "Destination is not the endpoint's";
    /// A packet with a workload's address entered, or would leave, by an interface that is not guarded; or a packet
    /// entered by an interface that the daemon does not know yet.
    Unguarded = 219, "Interface not guarded";
    /// IPv4 header with an invalid version, length, total length or option, or with a source route.
    InvalidIpv4 = 220, "Invalid IPv4 header";
    /// IPv6 header with an invalid version or payload length.
    InvalidIpv6 = 221, "Invalid IPv6 header";
    /// The transport header is truncated.
    TruncatedL4 = 222, "Truncated transport header";
    /// More than two VLAN tags.
    TooManyVlans = 223, "Too many VLAN tags";
    /// The Ethernet header is truncated.
    TruncatedL2 = 224, "Truncated Ethernet header";
    /// The network header is truncated.
    TruncatedL3 = 225, "Truncated network header";
    /// An ICMP error that quotes no live flow of the endpoint, and whose type no rule allows. Or an ICMP error about an
    /// inspected flow, if the programs or the worker do not accept the error.
    UnrelatedIcmp = 226, "ICMP error for no known flow";
    /// A packet that the state of the connection does not allow, such as a SYN+ACK without a SYN.
    CtInvalidState = 227, "CT: Invalid state";
    /// The kernel could not make the packet's headers readable.
    PullFailed = 228, "Packet data not accessible";
    /// The node generated the packet with a source address that the node does not have. Such a packet replies to one
    /// that DNAT or TPROXY redirected to the node, and the node's policy has not allowed that flow.
    Translated = 229, "Source is not the node's (DNAT or TPROXY)";
    /// The packet needs inspection, and no worker runs.
    NoWorker = 230, "No worker";
    /// The punt or the reinjection of a packet failed.
    PuntFailed = 231, "Punt failed";
    /// The packet cannot be punted because of its length, its VLAN tags or its device.
    PuntUnsupported = 232, "Cannot be punted";
    /// A frame on the punt link that was sent by neither a program nor a worker.
    PuntForeign = 233, "Foreign frame on the punt link";
    /// The worker is overloaded.
    WorkerOverload = 234, "Worker overloaded";
    /// The worker does not know the rule set.
    UnknownRuleset = 235, "Unknown application rules";
    /// The transport checksum is wrong, so the receiver would discard the packet.
    BadChecksum = 236, "Invalid L4 checksum";
    /// A packet that needs inspection was not reassembled in time: fragments are missing.
    FragmentsIncomplete = 237, "Fragments incomplete";
    /// A limit of the inspection is reached.
    InspectLimit = 238, "Inspection limit reached";
    /// No verdict was possible in time, or the receiver did not acknowledge in time the held bytes that a worker had
    /// delivered.
    InspectDeadline = 239, "No verdict in time";
    /// The application rules do not allow the request.
    AppDenied = 240, "Denied by application rules";
    /// The data is malformed, or not of the protocol that the rules name.
    AppMalformed = 241, "Malformed application data";
    /// A DNS answer without an open question.
    DnsUnsolicited = 242, "Unsolicited DNS answer";
    /// A DNS answer whose addresses could not be written to the maps.
    DnsUncommitted = 243, "DNS answer not committed";
    /// A TCP segment whose sequence or acknowledgement number is not acceptable (RFC 9293, section 3.10.7.4).
    TcpOutOfWindow = 244, "TCP segment out of window";
    /// A TCP retransmission whose data differs from that of the first transmission.
    TcpOverlap = 245, "TCP retransmission differs";
    /// A TCP segment that receivers could interpret differently.
    TcpInvalid = 246, "Ambiguous TCP segment";
    /// A TCP connection that the inspector does not know: the connection began before its inspection, or its state was
    /// discarded (limits, restart, change of rules or endpoints).
    TcpMidstream = 247, "TCP connection not known to the inspector";
    /// No inspector exists for the application protocol.
    AppUnsupported = 248, "Application protocol not supported";
    /// A TCP segment that the worker replaces: the worker holds the bytes for a verdict, delivers them in segments of
    /// its own, or resets the connection.
    TcpHeld = 249, "TCP segment replaced by a held or generated one";
    /// The connection preface of HTTP/2 on a connection that the proxy does not terminate.
    AppHttp2 = 250, "HTTP/2 not supported";
    /// The destination address of the TLS connection is not a learned address of the server name that the client
    /// requests.
    SniAddress = 251, "Address not learned for the server name";
    /// An invalid fragment: for example one that cuts or overlaps the transport header (RFC 1858, RFC 3128), or
    /// overlaps another fragment (RFC 5722).
    InvalidFragment = 252, "Invalid fragment: cut or overlapped header or data";
    /// An intercepted flow without a proxy link; or a packet on a proxy link that belongs to no intercepted flow.
    NoProxy = 253, "No proxy for the flow";
}

/// The lowest number of a reason that drops the packet.
const FIRST_DROP: u8 = 130;

impl Reason {
    /// Returns whether packets with this reason are dropped.
    #[must_use]
    pub const fn is_drop(self) -> bool {
        Self::is_drop_number(self as u8)
    }

    /// Returns whether packets with the reason of this number are dropped.
    #[inline(always)]
    #[must_use]
    pub const fn is_drop_number(n: u8) -> bool {
        n >= FIRST_DROP
    }
}

/// Number of values of a `u8`, the type of a reason's number.
pub(crate) const REASONS: usize = 1 << u8::BITS;

/// Number of slots of the COUNTERS map: reason × direction. The last slots are those of [`counter_slot`].
pub const COUNTER_SLOTS: usize = 2 * REASONS;

/// Slots of the COUNTERS map that do not count packets by reason. They come after the slots of the highest reason, 253.
pub mod counter_slot {
    /// In `packets`: number of conntrack entries that user space made from the tables of the kernel.
    pub const CONNTRACK_SEEDED: u32 = 508;
    /// In `packets`: number of conntrack entries that the programs deleted for a newer flow of the same share.
    pub const CONNTRACK_EVICTED: u32 = 509;
    /// In `packets`: number of conntrack entries that the programs made.
    pub const CONNTRACK_CREATED: u32 = 510;
    /// In `packets`: number of expired conntrack entries that user space deleted.
    pub const CONNTRACK_SWEPT: u32 = 511;
}
