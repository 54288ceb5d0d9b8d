//! Drop reasons: numbers, the names and texts of the flow API, and the names of Palisade's own reasons.

use std::borrow::Cow;

use palisade_abi::Reason;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Number of a drop reason; 0 if the packet was not dropped. In JSON, a drop reason is its name: that of the API, or
/// Palisade's own name, or its number if it has no name, as protobuf writes unknown enumeration values.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct DropReason(pub u8);

/// Number, name and text of the reasons of the flow API (`flow.DropReason`). The texts are those that Hubble prints.
const API_REASONS: &[(u8, &str, &str)] = &[
    (130, "INVALID_SOURCE_MAC", "Invalid source mac"),
    (131, "INVALID_DESTINATION_MAC", "Invalid destination mac"),
    (132, "INVALID_SOURCE_IP", "Invalid source ip"),
    (133, "POLICY_DENIED", "Policy denied"),
    (134, "INVALID_PACKET_DROPPED", "Invalid packet"),
    (
        135,
        "CT_TRUNCATED_OR_INVALID_HEADER",
        "CT: Truncated or invalid header",
    ),
    (136, "CT_MISSING_TCP_ACK_FLAG", "Fragmentation needed"),
    (137, "CT_UNKNOWN_L4_PROTOCOL", "CT: Unknown L4 protocol"),
    (
        138,
        "CT_CANNOT_CREATE_ENTRY_FROM_PACKET",
        "CT: Can't create entry from packet",
    ),
    (139, "UNSUPPORTED_L3_PROTOCOL", "Unsupported L3 protocol"),
    (140, "MISSED_TAIL_CALL", "Missed tail call"),
    (141, "ERROR_WRITING_TO_PACKET", "Error writing to packet"),
    (142, "UNKNOWN_L4_PROTOCOL", "Unknown L4 protocol"),
    (143, "UNKNOWN_ICMPV4_CODE", "Unknown ICMPv4 code"),
    (144, "UNKNOWN_ICMPV4_TYPE", "Unknown ICMPv4 type"),
    (145, "UNKNOWN_ICMPV6_CODE", "Unknown ICMPv6 code"),
    (146, "UNKNOWN_ICMPV6_TYPE", "Unknown ICMPv6 type"),
    (147, "ERROR_RETRIEVING_TUNNEL_KEY", "Error retrieving tunnel key"),
    (
        148,
        "ERROR_RETRIEVING_TUNNEL_OPTIONS",
        "Error retrieving tunnel options",
    ),
    (149, "INVALID_GENEVE_OPTION", "Invalid Geneve option"),
    (150, "UNKNOWN_L3_TARGET_ADDRESS", "Unknown L3 target address"),
    (151, "STALE_OR_UNROUTABLE_IP", "Stale or unroutable IP"),
    (
        152,
        "NO_MATCHING_LOCAL_CONTAINER_FOUND",
        "No matching local container found",
    ),
    (
        153,
        "ERROR_WHILE_CORRECTING_L3_CHECKSUM",
        "Error while correcting L3 checksum",
    ),
    (
        154,
        "ERROR_WHILE_CORRECTING_L4_CHECKSUM",
        "Error while correcting L4 checksum",
    ),
    (155, "CT_MAP_INSERTION_FAILED", "CT: Map insertion failed"),
    (
        156,
        "INVALID_IPV6_EXTENSION_HEADER",
        "Invalid IPv6 extension header",
    ),
    (
        157,
        "IP_FRAGMENTATION_NOT_SUPPORTED",
        "IP fragmentation not supported",
    ),
    (158, "SERVICE_BACKEND_NOT_FOUND", "Service backend not found"),
    (
        160,
        "NO_TUNNEL_OR_ENCAPSULATION_ENDPOINT",
        "No tunnel/encapsulation endpoint (datapath BUG!)",
    ),
    (161, "FAILED_TO_INSERT_INTO_PROXYMAP", "NAT 46/64 not enabled"),
    (
        162,
        "REACHED_EDT_RATE_LIMITING_DROP_HORIZON",
        "Reached EDT rate-limiting drop horizon",
    ),
    (
        163,
        "UNKNOWN_CONNECTION_TRACKING_STATE",
        "Unknown connection tracking state",
    ),
    (164, "LOCAL_HOST_IS_UNREACHABLE", "Local host is unreachable"),
    (
        165,
        "NO_CONFIGURATION_AVAILABLE_TO_PERFORM_POLICY_DECISION",
        "No configuration available to perform policy decision",
    ),
    (166, "UNSUPPORTED_L2_PROTOCOL", "Unsupported L2 protocol"),
    (
        167,
        "NO_MAPPING_FOR_NAT_MASQUERADE",
        "No mapping for NAT masquerade",
    ),
    (
        168,
        "UNSUPPORTED_PROTOCOL_FOR_NAT_MASQUERADE",
        "Unsupported protocol for NAT masquerade",
    ),
    (169, "FIB_LOOKUP_FAILED", "FIB lookup failed"),
    (
        170,
        "ENCAPSULATION_TRAFFIC_IS_PROHIBITED",
        "Encapsulation traffic is prohibited",
    ),
    (171, "INVALID_IDENTITY", "Invalid identity"),
    (172, "UNKNOWN_SENDER", "Unknown sender"),
    (173, "NAT_NOT_NEEDED", "NAT not needed"),
    (174, "IS_A_CLUSTERIP", "Is a ClusterIP"),
    (
        175,
        "FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND",
        "First logical datagram fragment not found",
    ),
    (176, "FORBIDDEN_ICMPV6_MESSAGE", "Forbidden ICMPv6 message"),
    (
        177,
        "DENIED_BY_LB_SRC_RANGE_CHECK",
        "Denied by LB src range check",
    ),
    (178, "SOCKET_LOOKUP_FAILED", "Socket lookup failed"),
    (179, "SOCKET_ASSIGN_FAILED", "Socket assign failed"),
    (
        180,
        "PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL",
        "Proxy redirection not supported for protocol",
    ),
    (181, "POLICY_DENY", "Policy denied by denylist"),
    (182, "VLAN_FILTERED", "VLAN traffic disallowed by VLAN filter"),
    (183, "INVALID_VNI", "Incorrect VNI from VTEP"),
    (184, "INVALID_TC_BUFFER", "Failed to update or lookup TC buffer"),
    (185, "NO_SID", "No SID was found for the IP address"),
    (
        186,
        "MISSING_SRV6_STATE",
        "SRv6 state was removed during tail call",
    ),
    (187, "NAT46", "L3 translation from IPv4 to IPv6 failed (NAT46)"),
    (188, "NAT64", "L3 translation from IPv6 to IPv4 failed (NAT64)"),
    (189, "AUTH_REQUIRED", "Authentication required"),
    (190, "CT_NO_MAP_FOUND", "No conntrack map found"),
    (191, "SNAT_NO_MAP_FOUND", "No nat map found"),
    (192, "INVALID_CLUSTER_ID", "Invalid ClusterID"),
    (
        193,
        "UNSUPPORTED_PROTOCOL_FOR_DSR_ENCAP",
        "Unsupported packet protocol for DSR encapsulation",
    ),
    (194, "NO_EGRESS_GATEWAY", "No egress gateway found"),
    (195, "UNENCRYPTED_TRAFFIC", "Traffic is unencrypted"),
    (196, "TTL_EXCEEDED", "TTL exceeded"),
    (197, "NO_NODE_ID", "No node ID found"),
    (198, "DROP_RATE_LIMITED", "Rate limited"),
    (199, "IGMP_HANDLED", "IGMP handled"),
    (200, "IGMP_SUBSCRIBED", "IGMP subscribed"),
    (201, "MULTICAST_HANDLED", "Multicast handled"),
    (202, "DROP_HOST_NOT_READY", "Host datapath not ready"),
    (203, "DROP_EP_NOT_READY", "Endpoint policy program not available"),
    (204, "DROP_NO_EGRESS_IP", "No Egress IP configured"),
    (205, "DROP_PUNT_PROXY", "Punt to proxy"),
];

/// Names of Palisade's own reasons, for which the API has none.
const OWN_NAMES: &[(Reason, &str)] = &[
    (Reason::SecretUnusable, "SECRET_NOT_USABLE"),
    (Reason::QuicIntercepted, "QUIC_TO_INTERCEPTED_PORT"),
    (Reason::InterceptFailed, "INTERCEPTION_FAILED"),
    (Reason::NoInterface, "INTERFACE_NOT_CONFIGURED"),
    (Reason::NoPolicy, "NO_POLICY_LOADED"),
    (Reason::NoHttpInspector, "NO_HTTP_INSPECTOR"),
    (Reason::NoDnsInspector, "NO_DNS_INSPECTOR"),
    (Reason::NoTlsInspector, "NO_TLS_INSPECTOR"),
    (Reason::NoKafkaInspector, "NO_KAFKA_INSPECTOR"),
    (Reason::NoListener, "NO_LISTENER"),
    (Reason::NoTlsTermination, "NO_TLS_TERMINATION"),
    (Reason::NotTheEndpoints, "DESTINATION_NOT_OF_ENDPOINT"),
    (Reason::Unguarded, "INTERFACE_NOT_GUARDED"),
    (Reason::InvalidIpv4, "INVALID_IPV4_HEADER"),
    (Reason::InvalidIpv6, "INVALID_IPV6_HEADER"),
    (Reason::TruncatedL4, "TRUNCATED_TRANSPORT_HEADER"),
    (Reason::TooManyVlans, "TOO_MANY_VLAN_TAGS"),
    (Reason::TruncatedL2, "TRUNCATED_ETHERNET_HEADER"),
    (Reason::TruncatedL3, "TRUNCATED_NETWORK_HEADER"),
    (Reason::UnrelatedIcmp, "ICMP_ERROR_FOR_NO_KNOWN_FLOW"),
    (Reason::CtInvalidState, "CT_INVALID_STATE"),
    (Reason::PullFailed, "PACKET_DATA_NOT_ACCESSIBLE"),
    (Reason::Translated, "SOURCE_NOT_OF_NODE"),
    (Reason::NoWorker, "NO_WORKER"),
    (Reason::PuntFailed, "PUNT_FAILED"),
    (Reason::PuntUnsupported, "PUNT_UNSUPPORTED"),
    (Reason::PuntForeign, "FOREIGN_FRAME_ON_PUNT_LINK"),
    (Reason::WorkerOverload, "OVERLOADED"),
    (Reason::UnknownRuleset, "UNKNOWN_APPLICATION_RULES"),
    (Reason::BadChecksum, "INVALID_L4_CHECKSUM"),
    (Reason::FragmentsIncomplete, "FRAGMENTS_INCOMPLETE"),
    (Reason::InspectLimit, "INSPECTION_LIMIT_REACHED"),
    (Reason::InspectDeadline, "NO_VERDICT_IN_TIME"),
    (Reason::AppDenied, "DENIED_BY_APPLICATION_RULES"),
    (Reason::AppMalformed, "MALFORMED_APPLICATION_DATA"),
    (Reason::DnsUnsolicited, "UNSOLICITED_DNS_ANSWER"),
    (Reason::DnsUncommitted, "DNS_ANSWER_NOT_COMMITTED"),
    (Reason::TcpOutOfWindow, "TCP_SEGMENT_OUT_OF_WINDOW"),
    (Reason::TcpOverlap, "TCP_RETRANSMISSION_DIFFERS"),
    (Reason::TcpInvalid, "AMBIGUOUS_TCP_SEGMENT"),
    (Reason::TcpMidstream, "TCP_CONNECTION_NOT_KNOWN"),
    (Reason::AppUnsupported, "APPLICATION_PROTOCOL_NOT_SUPPORTED"),
    (Reason::TcpHeld, "TCP_SEGMENT_REPLACED"),
    (Reason::AppHttp2, "HTTP2_NOT_SUPPORTED"),
    (Reason::SniAddress, "ADDRESS_NOT_LEARNED_FOR_SERVER_NAME"),
    (Reason::InvalidFragment, "INVALID_FRAGMENT"),
    (Reason::NoProxy, "NO_PROXY"),
];

impl DropReason {
    /// Returns the name: that of the API, or Palisade's own if the API has none.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        self.api_name().or_else(|| {
            OWN_NAMES
                .iter()
                .find(|(reason, _)| *reason as u8 == self.0)
                .map(|(_, name)| *name)
        })
    }

    /// Returns the name in the API, if there is one.
    #[must_use]
    pub fn api_name(self) -> Option<&'static str> {
        self.in_api().map(|(_, name, _)| *name)
    }

    /// Returns the text of the reason, or its number if the reason is unknown.
    #[must_use]
    pub fn text(self) -> Cow<'static, str> {
        match (Reason::from_u8(self.0), self.in_api()) {
            (Some(reason), _) => Cow::Borrowed(reason.text()),
            (None, Some((_, _, text))) => Cow::Borrowed(text),
            (None, None) => Cow::Owned(self.0.to_string()),
        }
    }

    /// Parses a number, a name, or the text of a drop reason.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        if let Ok(number) = name.parse() {
            return Some(Self(number));
        }
        Self::all().find(|reason| {
            reason
                .name()
                .is_some_and(|known| known.eq_ignore_ascii_case(name))
                || reason.text().eq_ignore_ascii_case(name)
        })
    }

    /// Returns the reasons for which Palisade drops packets.
    pub fn of_palisade() -> impl Iterator<Item = Self> {
        Reason::ALL
            .iter()
            .filter(|reason| reason.is_drop())
            .map(|reason| Self(*reason as u8))
    }

    fn all() -> impl Iterator<Item = Self> {
        let of_api = API_REASONS.iter().map(|(number, ..)| Self(*number));
        Self::of_palisade().chain(of_api)
    }

    fn in_api(self) -> Option<&'static (u8, &'static str, &'static str)> {
        API_REASONS.iter().find(|(number, ..)| *number == self.0)
    }
}

impl Serialize for DropReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.name() {
            Some(name) => serializer.serialize_str(name),
            None => serializer.serialize_u8(self.0),
        }
    }
}

/// Accepts names and numbers. A name that is not known, from a newer version of the API, becomes 0.
impl<'de> Deserialize<'de> for DropReason {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = DropReason;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the name or number of a drop reason")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<DropReason, E> {
                Ok(DropReason::from_name(name).unwrap_or_default())
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<DropReason, E> {
                Ok(DropReason(u8::try_from(number).unwrap_or_default()))
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_has_one_name_that_is_read_back() {
        let mut names = BTreeSet::new();
        for reason in DropReason::all() {
            let name = reason.name().expect("a name");
            names.insert((reason.0, name));
            assert_eq!(DropReason::from_name(name), Some(reason), "{name}");
            assert_eq!(DropReason::from_name(&reason.0.to_string()), Some(reason));
            let json = serde_json::to_string(&reason).expect("JSON");
            assert_eq!(json, format!("\"{name}\""));
            assert_eq!(
                serde_json::from_str::<DropReason>(&json).expect("a reason"),
                reason
            );
        }
        let distinct: BTreeSet<_> = names.iter().map(|(_, name)| *name).collect();
        assert_eq!(distinct.len(), names.len(), "two reasons with one name");
    }

    #[test]
    fn the_texts_of_shared_reasons_are_those_of_hubble() {
        for reason in DropReason::of_palisade() {
            if let Some((_, _, text)) = reason.in_api() {
                assert_eq!(reason.text(), *text);
            }
        }
    }

    #[test]
    fn reasons_of_newer_versions_are_accepted() {
        let read = |json| serde_json::from_str::<DropReason>(json).expect("a reason");
        assert_eq!(read("\"SOMETHING_NEW\""), DropReason(0));
        assert_eq!(read("206"), DropReason(206));
        assert_eq!(read("70000"), DropReason(0));
        assert_eq!(serde_json::to_string(&DropReason(206)).expect("JSON"), "206");
    }
}
