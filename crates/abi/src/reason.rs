//! Verdict reasons: why a packet was let through or dropped. Depends on nothing.
//!
//! Reasons below 130 let the packet pass. From 130 to 205 a number has the meaning and the text that it has in Cilium
//! 1.19 (`bpf/lib/drop_reasons.h`, Hubble's `DropReason`); a case that Cilium does not have gets a number of Palisade's own,
//! 210 to 252.

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// Reason of a verdict.
        #[repr(u8)]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
        pub enum Reason {
            $($(#[$doc])* $name = $number,)*
        }

        impl Reason {
            /// All of them, by number.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// From its number.
            #[must_use]
            pub const fn from_u8(n: u8) -> Option<Self> {
                match n { $($number => Some(Self::$name),)* _ => None }
            }

            /// The text that people and flow clients read.
            #[must_use]
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// Let through by a rule, or because nothing is enforced.
    Allowed = 0, "Allowed";
    /// Let through: an established flow, either direction.
    Established = 1, "Established";
    /// Let through: an ICMP error about an established flow.
    Related = 2, "Related";
    /// Let through: ARP, neighbour discovery, multicast listener reports, link control.
    LinkControl = 3, "Link control";
    /// Let through by audit mode.
    Audited = 4, "Audited";
    /// Let through: forwarded by this node, not for it; judged at the endpoint's interface if it has one.
    Forwarded = 5, "Forwarded";
    /// Let through unread, because no worker lives and the operator wants it so.
    FailedOpen = 6, "Failed open: not inspected";

    /// The source address is not one the sender may use.
    InvalidSourceIp = 132, "Invalid source ip";
    /// Nothing allows it.
    PolicyDenied = 133, "Policy denied";
    /// An ARP or neighbour discovery message that is cut short, longer than its type, or otherwise malformed.
    InvalidPacket = 134, "Invalid packet";
    /// A TCP or UDP header with a value that no sender produces: data offset, flags, length.
    CtInvalidHeader = 135, "CT: Truncated or invalid header";
    /// ICMPv6 in an IPv4 packet, or ICMP in an IPv6 packet.
    UnknownL4 = 137, "CT: Unknown L4 protocol";
    /// Neither IPv4, IPv6 nor one of the few link protocols that pass.
    UnsupportedL3 = 139, "Unsupported L3 protocol";
    /// The conntrack map took no entry.
    CtInsertionFailed = 155, "CT: Map insertion failed";
    /// IPv6 extension headers that are not accepted: too many or too long, out of order, of an unknown routing type, or a
    /// routing header with segments left.
    InvalidIpv6Extension = 156, "Invalid IPv6 extension header";
    /// A later fragment, its first fragment was not seen, and no rule covers every port.
    FragmentNotFound = 175, "First logical datagram fragment not found";
    /// A deny rule names it.
    PolicyDeniedByDenylist = 181, "Policy denied by denylist";
    /// The rule requires authentication, which Palisade does not implement.
    AuthRequired = 189, "Authentication required";

    /// The program runs on an interface that nobody configured.
    NoInterface = 210, "Interface not configured";
    /// The endpoint has no policy table yet.
    NoPolicy = 211, "No policy loaded";
    /// The policy wants the flow inspected as HTTP, and there is no inspector for it.
    NoHttpInspector = 212, "No inspector: HTTP";
    /// The policy wants the flow inspected as DNS, and there is no inspector for it.
    NoDnsInspector = 213, "No inspector: DNS";
    /// The policy wants the flow inspected as TLS, and there is no inspector for it.
    NoTlsInspector = 214, "No inspector: TLS";
    /// The policy wants the flow inspected as Kafka, and there is no inspector for it.
    NoKafkaInspector = 215, "No inspector: Kafka";
    /// The policy sends the flow to a listener, and there is none.
    NoListener = 216, "No listener";
    /// The policy wants TLS terminated, and nothing does that.
    NoTlsTermination = 217, "No inspector: TLS termination";
    /// Towards a workload, and to an address that is not the workload's.
    NotTheEndpoints = 218, "Destination is not the endpoint's";
    /// It entered, or would leave, by an interface that is not guarded: a workload's address, or an interface that the
    /// daemon has not looked at yet.
    Unguarded = 219, "Interface not guarded";
    /// IPv4 header: bad version, length, total length or options; a source route.
    InvalidIpv4 = 220, "Invalid IPv4 header";
    /// IPv6 header: bad version or payload length.
    InvalidIpv6 = 221, "Invalid IPv6 header";
    /// Transport header cut short.
    TruncatedL4 = 222, "Truncated transport header";
    /// More than two VLAN tags.
    TooManyVlans = 223, "Too many VLAN tags";
    /// Ethernet header cut short.
    TruncatedL2 = 224, "Truncated Ethernet header";
    /// Network header cut short.
    TruncatedL3 = 225, "Truncated network header";
    /// An ICMP error that quotes no flow of the endpoint, where no rule allows its type; or, about a connection that is
    /// read, one that quotes no segment that is under way.
    UnrelatedIcmp = 226, "ICMP error for no known flow";
    /// A reply-direction packet that no state of the connection explains.
    CtInvalidState = 227, "CT: Invalid state";
    /// The packet's headers could not be made readable.
    PullFailed = 228, "Packet data not accessible";
    /// The node made it and its source address is not the node's: an answer to what was translated (DNAT) or redirected
    /// (TPROXY) to the node behind its policy.
    Translated = 229, "Source is not the node's (DNAT or TPROXY)";
    /// It must be read, and no worker lives that could.
    NoWorker = 230, "No worker";
    /// A packet that must be read could not be put on the punt link, or not be sent on when it came back.
    PuntFailed = 231, "Punt failed";
    /// A packet that must be read has a length, VLAN tags or a device that the punt link does not take.
    PuntUnsupported = 232, "Cannot be punted";
    /// A frame on the punt link that nobody carried.
    PuntForeign = 233, "Foreign frame on the punt link";
    /// The worker has more to read than it can.
    WorkerOverload = 234, "Worker overloaded";
    /// The worker does not know the set of application rules.
    UnknownRuleset = 235, "Unknown application rules";
    /// The transport checksum is wrong; the receiver would drop it.
    BadChecksum = 236, "Invalid L4 checksum";
    /// Fragments of a packet that must be read whole did not all come.
    FragmentsIncomplete = 237, "Fragments incomplete";
    /// A limit of the inspection is reached.
    InspectLimit = 238, "Inspection limit reached";
    /// No verdict was possible in time, or the receiver did not acknowledge in time what Palisade delivers to it.
    InspectDeadline = 239, "No verdict in time";
    /// The application rules do not allow it.
    AppDenied = 240, "Denied by application rules";
    /// Not what the rules say that it is, or malformed.
    AppMalformed = 241, "Malformed application data";
    /// A DNS answer that no query asked for.
    DnsUnsolicited = 242, "Unsolicited DNS answer";
    /// A DNS answer whose addresses could not be made reachable.
    DnsUncommitted = 243, "DNS answer not committed";
    /// A TCP segment whose sequence or acknowledgement number is not acceptable (RFC 9293, 3.10.7.4).
    TcpOutOfWindow = 244, "TCP segment out of window";
    /// A TCP retransmission that says something else.
    TcpOverlap = 245, "TCP retransmission differs";
    /// A TCP segment that receivers could read differently.
    TcpInvalid = 246, "Ambiguous TCP segment";
    /// A TCP connection that the inspector does not know: older than the inspection, or forgotten (limits, restart, a change of
    /// rules or endpoints).
    TcpMidstream = 247, "TCP connection not known to the inspector";
    /// The application protocol has no reader yet.
    AppUnsupported = 248, "Application protocol not supported";
    /// A TCP segment that is not needed: its bytes are held for a verdict or delivered in packets made by the worker, or a
    /// reset made by the worker goes in its place.
    TcpHeld = 249, "TCP segment replaced by a held or generated one";
    /// The preface of HTTP/2 where HTTP/1 is read: its requests cannot be judged.
    AppHttp2 = 250, "HTTP/2 not supported";
    /// The address was not learned for the server name that TLS asks for.
    SniAddress = 251, "Address not learned for the server name";
    /// A fragment that hides or overlaps its transport header, or overlaps another fragment (RFC 1858, RFC 3128, RFC 5722).
    InvalidFragment = 252, "Invalid fragment: cut or overlapped header or data";
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

/// Numbers that a reason can have.
pub(crate) const REASONS: usize = 1 << u8::BITS;

/// Slots of the COUNTERS map: reason × direction, and [`counter_slot`].
pub const COUNTER_SLOTS: usize = 2 * REASONS;

/// Slots of the COUNTERS map that count something else than packets by reason. No reason has a number above 253.
pub mod counter_slot {
    /// `packets`: conntrack entries that user space made from the tables of the kernel.
    pub const CONNTRACK_SEEDED: u32 = 508;
    /// `packets`: conntrack entries that the programs deleted for a newer flow of the same share.
    pub const CONNTRACK_EVICTED: u32 = 509;
    /// `packets`: conntrack entries that the programs made.
    pub const CONNTRACK_CREATED: u32 = 510;
    /// `packets`: expired conntrack entries that user space deleted.
    pub const CONNTRACK_SWEPT: u32 = 511;
}
