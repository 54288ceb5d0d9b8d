//! Ports and protocols: `toPorts`, `icmps`, and the `ports` of a NetworkPolicy.

use palisade_model::rule::{L4Protocol, L7, L7Rules, PortRule, PortSpec};
use palisade_yaml::{Value, quoted};

use super::{
    l7,
    name_syntax::{is_service_name, port_number},
    reader::{At, Object, hint},
    section::Section,
};
use crate::suggest::nearest;

/// IP protocol numbers of `icmps`.
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Largest number of ports in an entry of `toPorts`, and of types in an entry of `icmps`.
const MAX_PORTS: usize = 40;

/// Protocols by name; protocols without ports are given by IP protocol number.
const PROTOCOLS: [(&str, L4Protocol); 11] = [
    ("ANY", L4Protocol::Any),
    ("TCP", L4Protocol::Tcp),
    ("UDP", L4Protocol::Udp),
    ("SCTP", L4Protocol::Sctp),
    ("VRRP", L4Protocol::Other(112)),
    ("IGMP", L4Protocol::Other(2)),
    ("GRE", L4Protocol::Other(47)),
    ("IPIP", L4Protocol::Other(4)),
    ("IPv6", L4Protocol::Other(41)),
    ("ESP", L4Protocol::Other(50)),
    ("AH", L4Protocol::Other(51)),
];

/// Parses an entry of `toPorts`.
pub(super) fn port_rule(at: At<'_>, section: Section<'_>) -> Option<PortRule> {
    let object = at.object()?;
    let (mut ports, mut given) = (Vec::new(), false);
    if let Some(list) = object.field("ports").and_then(|at| at.list()) {
        given = !list.is_empty();
        if list.len() > MAX_PORTS {
            at.error(format!(
                "{} ports in one entry; at most {MAX_PORTS} are allowed, use several entries",
                list.len()
            ));
        }
        ports = list.read(port_and_protocol);
    }
    let l7 = if section.deny {
        for name in [
            "rules",
            "serverNames",
            "terminatingTLS",
            "originatingTLS",
            "listener",
        ] {
            object.refuse(
                name,
                "cannot be part of a rule that denies; deny the ports as a whole",
            );
        }
        L7::default()
    } else {
        l7::read(&object, section)
    };
    let all_known = object.finish();
    check_l7_ports(&object, &l7, &ports, given);
    if !given && all_known {
        at.warning("an entry without ports matches nothing; for every port write port: \"0\"");
    }
    Some(PortRule {
        ports: ports.into_iter().map(|port| port.spec).collect(),
        l7,
        location: at.location(),
    })
}

/// Checks the ports of an entry with application rules.
fn check_l7_ports(object: &Object<'_>, l7: &L7, ports: &[Port], given: bool) {
    let dns = match &l7.rules {
        L7Rules::None => return,
        L7Rules::Dns(_) => true,
        // A parser without rules works on any ports.
        L7Rules::Generic { rules, .. } if rules.is_empty() => return,
        L7Rules::Http(_) | L7Rules::Kafka(_) | L7Rules::Generic { .. } => false,
    };
    if dns && !given {
        object.error_at_key("rules", "dns rules need a port; write port: \"53\"");
    }
    for port in ports {
        let reject = |message: &str| object.error_at_key("rules", message);
        match &port.spec {
            PortSpec::Range { protocol, .. } | PortSpec::Named { protocol, .. }
                if !dns && *protocol != L4Protocol::Tcp =>
            {
                reject(&format!(
                    "application rules other than dns need protocol: TCP, and a port of this entry has {}",
                    protocol_name(*protocol)
                ));
            }
            _ => {}
        }
        if port.is_zero {
            reject("application rules cannot be used with port 0");
        }
        if dns && port.is_range {
            reject("dns rules cannot be used with a range of ports");
        }
    }
}

fn protocol_name(protocol: L4Protocol) -> &'static str {
    PROTOCOLS
        .iter()
        .find(|(_, known)| *known == protocol)
        .map_or("another", |(name, _)| name)
}

/// A parsed port, with properties that later checks need.
pub(super) struct Port {
    pub spec: PortSpec,
    is_zero: bool,
    is_range: bool,
}

fn port_and_protocol(at: At<'_>) -> Option<Port> {
    let object = at.object()?;
    let protocol = match object.field("protocol") {
        Some(at) => protocol(at),
        None => Some(L4Protocol::Any),
    };
    let end = object.field("endPort");
    let written_last = match end {
        Some(at) => last_port(at),
        None => Some(0),
    };
    // Only a bare rule can have a number of more than 16 bits. Its lower 16 bits count, as in Cilium.
    let last = written_last.map(|last| last as u16);
    let port = object.field("port").filter(|port| port.node.as_str() != Some(""));
    object.finish();
    // For a protocol without ports, `port` can be absent.
    if let Some(protocol @ L4Protocol::Other(_)) = protocol {
        if let Some(port) = port.filter(|port| port.node.as_str() != Some("0")) {
            port.error(format!(
                "{} has no ports; leave port out",
                protocol_name(protocol)
            ));
            return None;
        }
        return Some(Port {
            spec: whole(protocol),
            is_zero: true,
            is_range: false,
        });
    }
    let Some(port) = port else {
        at.error("port is missing; for every port write port: \"0\"");
        return None;
    };
    if let Value::Integer(number) = &port.node.value {
        port.error(format!("port must be a string; write port: \"{number}\""));
        return None;
    }
    let text = port.string()?;
    if is_service_name(text) {
        if text.starts_with("0x") || text.starts_with("0b") || text.starts_with("0o") {
            port.warning(format!("{} is the name of a port, not a number", quoted(text)));
        }
        if let (Some(end), Some(1..)) = (end, last) {
            end.warning("the range begins at the port of that name, whichever it is");
        }
        let spec = PortSpec::Named {
            protocol: protocol?,
            name: text.to_ascii_lowercase(),
            last: last?,
        };
        return Some(Port {
            spec,
            is_zero: false,
            is_range: false,
        });
    }
    let first = number(port, text)?;
    let (protocol, last, written_last) = (protocol?, last?, written_last?);
    if let Some(end) = end
        && (1..first).contains(&last)
    {
        end.warning(format!(
            "endPort {last} is less than port {first}: only port {first} is meant"
        ));
    }
    let spec = match (first, last > first) {
        (0, false) => whole(protocol),
        (_, false) => PortSpec::Range {
            protocol,
            first,
            last: first,
        },
        (_, true) => PortSpec::Range {
            protocol,
            first,
            last,
        },
    };
    Some(Port {
        spec,
        is_zero: first == 0,
        is_range: written_last > i32::from(first),
    })
}

fn whole(protocol: L4Protocol) -> PortSpec {
    PortSpec::Range {
        protocol,
        first: 0,
        last: u16::MAX,
    }
}

/// Parses `endPort`. In a bare rule, any 32-bit number is accepted, as in Cilium.
fn last_port(at: At<'_>) -> Option<i32> {
    if !at.is_bare() {
        return at.integer(0..=65535).and_then(|port| i32::try_from(port).ok());
    }
    let port = at
        .integer(i64::from(i32::MIN)..=i64::from(i32::MAX))
        .and_then(|port| i32::try_from(port).ok())?;
    if u16::try_from(port).is_err() {
        at.warning(format!(
            "endPort {port} is read as {}, its lower 16 bits",
            port as u16
        ));
    }
    Some(port)
}

/// Parses a port number. A leading zero makes the number octal, as in Cilium.
fn number(at: At<'_>, text: &str) -> Option<u16> {
    match port_number(text) {
        Some((port, based)) => {
            if based {
                let octal = text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit());
                let what = if octal { "an octal number: port" } else { "port" };
                at.warning(format!("{} is read as {what} {port}", quoted(text)));
            }
            Some(port)
        }
        None => {
            at.error(format!(
                "{} is neither a port from 0 to 65535 nor the name of one",
                quoted(text)
            ));
            None
        }
    }
}

fn protocol(at: At<'_>) -> Option<L4Protocol> {
    let text = at.string()?;
    if text.is_empty() {
        return Some(L4Protocol::Any);
    }
    if let Some((_, protocol)) = PROTOCOLS.iter().find(|(name, _)| name.eq_ignore_ascii_case(text)) {
        return Some(*protocol);
    }
    if text.eq_ignore_ascii_case("ICMP") || text.eq_ignore_ascii_case("ICMPv6") {
        at.error(format!("{text} has no ports; use icmps in place of toPorts"));
    } else {
        at.error(format!(
            "unknown protocol {}{}",
            quoted(text),
            hint(text, &PROTOCOLS.map(|(name, _)| name))
        ));
    }
    None
}

/// Parses an element of `ports` in a NetworkPolicy rule.
pub(super) fn network_policy_port(at: At<'_>) -> Option<PortRule> {
    let object = at.object()?;
    let protocol = match object.field("protocol") {
        Some(at) => {
            let text = at.string()?;
            match text {
                "TCP" => Some(L4Protocol::Tcp),
                "UDP" => Some(L4Protocol::Udp),
                "SCTP" => Some(L4Protocol::Sctp),
                _ => {
                    at.error(format!(
                        "unknown protocol {}{}",
                        quoted(text),
                        hint(text, &["TCP", "UDP", "SCTP"])
                    ));
                    None
                }
            }
        }
        None => Some(L4Protocol::Tcp),
    };
    let end_port = object.field("endPort").map(|at| (at, at.integer(1..=65535)));
    let port = object.field("port");
    object.finish();
    let protocol = protocol?;
    let spec = match port {
        None => {
            if let Some((at, _)) = end_port {
                at.error("endPort needs port");
                return None;
            }
            whole(protocol)
        }
        Some(port) => match &port.node.value {
            Value::Integer(_) => {
                let first = u16::try_from(port.integer(1..=65535)?).ok()?;
                let last = match end_port {
                    Some((at, last)) => {
                        let last = u16::try_from(last?).ok()?;
                        if last < first {
                            at.error(format!("endPort {last} is less than port {first}"));
                            return None;
                        }
                        last
                    }
                    None => first,
                };
                PortSpec::Range {
                    protocol,
                    first,
                    last,
                }
            }
            Value::String { text, .. } => {
                if let Some((at, _)) = end_port {
                    at.error("endPort needs a port that is a number");
                    return None;
                }
                if !is_service_name(text) || text.bytes().any(|b| b.is_ascii_uppercase()) {
                    let number = if text.bytes().all(|b| b.is_ascii_digit()) {
                        "; a number has no quotes"
                    } else {
                        ""
                    };
                    port.error(format!("{} cannot be the name of a port{number}", quoted(text)));
                    return None;
                }
                PortSpec::Named {
                    protocol,
                    name: text.clone(),
                    last: 0,
                }
            }
            _ => {
                port.error(format!(
                    "port must be a number or a name, found {}",
                    port.node.describe()
                ));
                return None;
            }
        },
    };
    Some(PortRule {
        ports: vec![spec],
        l7: L7::default(),
        location: at.location(),
    })
}

/// Parses an entry of `icmps`.
pub(super) fn icmp_rule(at: At<'_>) -> Option<PortRule> {
    let object = at.object()?;
    let (mut ports, mut given) = (Vec::new(), false);
    if let Some(list) = object.field("fields").and_then(|at| at.list()) {
        given = !list.is_empty();
        if list.len() > MAX_PORTS {
            at.error(format!(
                "{} types in one entry; at most {MAX_PORTS} are allowed",
                list.len()
            ));
        }
        ports = list.read(icmp_field);
    }
    if object.finish() && !given {
        at.warning("an entry without fields matches nothing");
    }
    Some(PortRule {
        ports,
        l7: L7::default(),
        location: at.location(),
    })
}

fn icmp_field(at: At<'_>) -> Option<PortSpec> {
    let object = at.object()?;
    let v6 = match object.field("family") {
        Some(at) => match at.string()? {
            "" | "IPv4" => Some(false),
            "IPv6" => Some(true),
            other => {
                at.error(format!(
                    "unknown family {}{}",
                    quoted(other),
                    hint(other, &["IPv4", "IPv6"])
                ));
                None
            }
        },
        None => Some(false),
    };
    let kind = object.required("type");
    object.finish();
    let (v6, at) = (v6?, kind?);
    let kind = match &at.node.value {
        Value::Integer(number) if at.is_bare() && !(0..=255).contains(number) => {
            return odd_icmp_type(at, v6);
        }
        Value::Integer(_) => u8::try_from(at.integer(0..=255)?).ok()?,
        _ => icmp_type(at, v6)?,
    };
    Some(PortSpec::Icmp { v6, kind })
}

/// Returns the port specification for an ICMP type of a bare rule that is out of range. As in Cilium, a negative type
/// means every type; a type above 255 matches no packet (`None`).
fn odd_icmp_type(at: At<'_>, v6: bool) -> Option<PortSpec> {
    let number = at.integer(i64::from(i32::MIN)..=i64::from(i32::MAX))?;
    if number < 0 {
        at.warning(format!("type {number} is read as every type"));
        return Some(whole(L4Protocol::Other(if v6 { ICMPV6 } else { ICMP })));
    }
    at.warning(format!("there is no type {number}: it matches nothing"));
    None
}

/// Parses an ICMP type: a name, or a number in quotes.
fn icmp_type(at: At<'_>, v6: bool) -> Option<u8> {
    let text = at.string()?;
    let number = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if number && let Ok(kind) = text.parse() {
        return Some(kind);
    }
    let (types, other) = if v6 {
        (ICMPV6_TYPES, ICMP_TYPES)
    } else {
        (ICMP_TYPES, ICMPV6_TYPES)
    };
    if let Some((_, kind)) = types.iter().find(|(name, _)| *name == text) {
        return Some(*kind);
    }
    let family = if v6 { "IPv6" } else { "IPv4" };
    let hint = if other.iter().any(|(name, _)| *name == text) {
        format!(
            "; for the other family write family: {}",
            if v6 { "IPv4" } else { "IPv6" }
        )
    } else {
        match nearest(text, types.iter().map(|(name, _)| *name)) {
            Some(name) => format!(", did you mean \"{name}\"?"),
            None => "; a type is a number from 0 to 255 or a name like EchoRequest".into(),
        }
    };
    at.error(format!("{} is no ICMP type of {family}{hint}", quoted(text)));
    None
}

/// Names of ICMP types, as registered at IANA but without spaces.
const ICMP_TYPES: &[(&str, u8)] = &[
    ("EchoReply", 0),
    ("DestinationUnreachable", 3),
    ("Redirect", 5),
    ("Echo", 8),
    ("EchoRequest", 8),
    ("RouterAdvertisement", 9),
    // Cilium's misspelling of "solicitation", and the correct name.
    ("RouterSelection", 10),
    ("RouterSolicitation", 10),
    ("TimeExceeded", 11),
    ("ParameterProblem", 12),
    ("Timestamp", 13),
    ("TimestampReply", 14),
    ("Photuris", 40),
    ("ExtendedEchoRequest", 42),
    ("ExtendedEchoReply", 43),
];

/// Names of ICMPv6 types.
const ICMPV6_TYPES: &[(&str, u8)] = &[
    ("DestinationUnreachable", 1),
    ("PacketTooBig", 2),
    ("TimeExceeded", 3),
    ("ParameterProblem", 4),
    ("EchoRequest", 128),
    ("EchoReply", 129),
    ("MulticastListenerQuery", 130),
    ("MulticastListenerReport", 131),
    ("MulticastListenerDone", 132),
    ("RouterSolicitation", 133),
    ("RouterAdvertisement", 134),
    ("NeighborSolicitation", 135),
    ("NeighborAdvertisement", 136),
    ("RedirectMessage", 137),
    ("RouterRenumbering", 138),
    ("ICMPNodeInformationQuery", 139),
    ("ICMPNodeInformationResponse", 140),
    ("InverseNeighborDiscoverySolicitation", 141),
    ("InverseNeighborDiscoveryAdvertisement", 142),
    ("HomeAgentAddressDiscoveryRequest", 144),
    ("HomeAgentAddressDiscoveryReply", 145),
    ("MobilePrefixSolicitation", 146),
    ("MobilePrefixAdvertisement", 147),
    ("DuplicateAddressRequestCodeSuffix", 157),
    ("DuplicateAddressConfirmationCodeSuffix", 158),
    ("ExtendedEchoRequest", 160),
    ("ExtendedEchoReply", 161),
];
