//! Conversion of events of the BPF programs to flow records: numbers are resolved to names.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use palisade_abi::{Event, EventKind, Reason, TracePoint as AbiTracePoint, event_flags, identity, protocol};

use crate::{
    DropReason, Timestamp,
    flow::{
        Endpoint, Ethernet, EventType, Extra, Flow, FlowType, Ip, IpVersion, Layer4, Mac, Moment,
        NetworkInterface, Policy, Progress, Rule, TcpFlags, TracePoint, TrafficDirection, Verdict, Workload,
        event_type,
    },
};

/// Owner of an address: an endpoint of this node, the node itself included, or a named peer.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Owner {
    /// Number of the endpoint; 0 if the owner is not an endpoint of this node.
    pub endpoint: u16,
    /// Identity.
    pub identity: u32,
    /// Namespace; empty if there is none.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
    /// Workloads, as [`Workload::of_endpoint`] makes them.
    pub workloads: Arc<[Workload]>,
}

/// Description of a rule.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RuleInfo {
    /// Policy of the rule, or the policies that cause the default deny; empty if no policy applies.
    pub policies: Arc<[Policy]>,
    /// Text of the rule without its location: `policy shop/web ingress rule 2`.
    pub text: Arc<str>,
    /// `FILE:LINE` of the rule; empty if it is not in a file.
    pub location: Arc<str>,
    /// Whether this is the default deny.
    pub default_deny: bool,
}

/// Resolves the numbers in an event. The methods are called for every event, so implementations should return clones of
/// shared strings instead of new strings.
pub trait FlowResolver {
    /// Returns the name of this node.
    fn node(&self) -> Arc<str>;
    /// Returns the labels of this node, `key=value`.
    fn node_labels(&self) -> Arc<[Arc<str>]> {
        Arc::default()
    }
    /// Returns the labels of an identity, `source:key=value`, sorted.
    fn labels(&self, identity: u32) -> Option<Arc<[Arc<str>]>>;
    /// Returns an endpoint of this node by its number.
    fn endpoint(&self, id: u16) -> Option<Owner>;
    /// Returns the owner of exactly this address.
    fn address(&self, address: IpAddr) -> Option<Owner>;
    /// Returns a rule by its number. A rule that was replaced recently should still be found, since its last events can
    /// arrive after the policy change.
    fn rule(&self, id: u32) -> Option<RuleInfo>;
    /// Returns the name of an interface.
    fn interface(&self, ifindex: u32) -> Option<Arc<str>>;
    /// Returns the names that an endpoint of this node has resolved to an address.
    fn dns_names(&self, _endpoint: u16, _address: IpAddr) -> Arc<[Arc<str>]> {
        Arc::default()
    }
    /// Returns the systemd unit of the node's socket with these ends, as a workload; empty if it is not known.
    fn unit(&self, _protocol: u8, _local: SocketAddr, _remote: SocketAddr) -> Arc<[Workload]> {
        Arc::default()
    }
}

impl Flow {
    /// Returns the flow record of an event.
    ///
    /// `clock_offset`: the wall clock (ns since 1970) minus the monotonic clock of [`Event::time`], ns.
    #[must_use]
    pub fn from_event(event: &Event, names: &(impl FlowResolver + ?Sized), clock_offset: i64) -> Self {
        let flag = |bit| event.flags & bit != 0;
        let egress = flag(event_flags::EGRESS);
        let flow_egress = flag(event_flags::FLOW_EGRESS);
        let kind = kind_of(event.kind);
        let reason = Reason::from_u8(event.reason);
        let dropped = kind == EventKind::Drop || reason.is_some_and(Reason::is_drop);
        let audit = flag(event_flags::AUDIT);
        let verdict = match kind {
            EventKind::Drop => Verdict::Dropped,
            EventKind::PolicyVerdict if audit => Verdict::Audit,
            EventKind::PolicyVerdict if dropped => Verdict::Dropped,
            EventKind::PolicyVerdict | EventKind::Trace => Verdict::Forwarded,
        };
        let is_reply = is_reply(kind, verdict, event.flags);
        let is_ip = event.ether_type == 0;
        let own = names.endpoint(event.endpoint);
        let own_is_host = own.as_ref().is_some_and(|o| o.identity == identity::HOST);
        let (own_source, own_destination) = if egress { (own, None) } else { (None, own) };
        let trace_point = match (kind, egress, own_is_host) {
            (EventKind::PolicyVerdict | EventKind::Drop, ..) => TracePoint::Unknown,
            (EventKind::Trace, true, true) => TracePoint::ToNetwork,
            (EventKind::Trace, true, false) => TracePoint::ToStack,
            (EventKind::Trace, false, true) => TracePoint::ToHost,
            (EventKind::Trace, false, false) => TracePoint::ToEndpoint,
        };
        let drop_reason = DropReason(if dropped { event.reason } else { 0 });
        let rule = (event.rule != 0).then(|| names.rule(event.rule).unwrap_or_default());
        let mut flow = Self {
            time: Timestamp(
                i64::try_from(event.time)
                    .unwrap_or(i64::MAX)
                    .saturating_add(clock_offset),
            ),
            verdict,
            drop_reason: drop_reason.0.into(),
            ethernet: (event.source_mac != [0; 6] || event.destination_mac != [0; 6]).then_some(Ethernet {
                source: Mac(event.source_mac),
                destination: Mac(event.destination_mac),
            }),
            ip: is_ip.then(|| Ip {
                source: event.source.into(),
                destination: event.destination.into(),
                version: if flag(event_flags::IPV6) {
                    IpVersion::V6
                } else {
                    IpVersion::V4
                },
            }),
            l4: layer4(event),
            source: end(names, is_ip, event.source, event.source_identity, own_source),
            destination: end(
                names,
                is_ip,
                event.destination,
                event.destination_identity,
                own_destination,
            ),
            flow_type: FlowType::L3L4,
            node_name: names.node(),
            node_labels: names.node_labels(),
            is_reply,
            event_type: match kind {
                EventKind::Drop => EventType {
                    kind: event_type::DROP,
                    sub_type: event.reason.into(),
                },
                EventKind::Trace => EventType {
                    kind: event_type::TRACE,
                    sub_type: trace_point.sub_type(),
                },
                EventKind::PolicyVerdict => EventType {
                    kind: event_type::POLICY_VERDICT,
                    sub_type: 0,
                },
            },
            traffic_direction: if flow_egress {
                TrafficDirection::Egress
            } else {
                TrafficDirection::Ingress
            },
            policy_match_type: match kind {
                EventKind::PolicyVerdict => event.match_kind.into(),
                EventKind::Drop | EventKind::Trace => 0,
            },
            trace_observation_point: trace_point,
            drop_reason_desc: drop_reason,
            interface: (event.ifindex != 0).then(|| NetworkInterface {
                index: event.ifindex,
                name: names.interface(event.ifindex).unwrap_or_default(),
            }),
            palisade: Extra {
                reason: reason.map_or_else(|| event.reason.to_string().into(), |r| r.text().into()),
                rule: rule.as_ref().map(|info| rule_of(event.rule, info)),
                audit,
                protocol: event.protocol,
                ether_type: event.ether_type,
                length: event.length,
                fragment: flag(event_flags::FRAGMENT),
                related: flag(event_flags::RELATED),
                reply: is_reply.is_none() && flag(event_flags::REPLY),
                progress: progress(event, kind),
                ..Extra::default()
            },
            ..Self::default()
        };
        if let Some(info) = rule {
            flow.decided_by(info.policies, dropped || audit);
        }
        if is_ip && event.endpoint != 0 {
            flow.name_remote_end(names, event.endpoint, egress);
        }
        if own_is_host {
            flow.name_unit(names, egress);
        }
        flow.summary = summary(&flow);
        flow
    }

    /// Stores the deciding policies in the field for the direction of the connection and the verdict.
    pub(crate) fn decided_by(&mut self, policies: Arc<[Policy]>, denied: bool) {
        let egress = self.traffic_direction == TrafficDirection::Egress;
        let list = match (egress, denied) {
            (true, true) => &mut self.egress_denied_by,
            (true, false) => &mut self.egress_allowed_by,
            (false, true) => &mut self.ingress_denied_by,
            (false, false) => &mut self.ingress_allowed_by,
        };
        *list = policies;
    }

    /// Adds the names that the endpoint has resolved to the address of the peer. `from_endpoint`: whether the endpoint
    /// sent the packet.
    pub(crate) fn name_remote_end(
        &mut self,
        names: &(impl FlowResolver + ?Sized),
        endpoint: u16,
        from_endpoint: bool,
    ) {
        let Some(ip) = self.ip else { return };
        let (address, list) = if from_endpoint {
            (ip.destination, &mut self.destination_names)
        } else {
            (ip.source, &mut self.source_names)
        };
        *list = names.dns_names(endpoint, address);
    }
}

impl Flow {
    /// Adds the systemd unit of the node's own socket. `from_node`: whether the node sent the packet.
    pub(crate) fn name_unit(&mut self, names: &(impl FlowResolver + ?Sized), from_node: bool) {
        let (Some(ip), Some((source_port, destination_port))) = (self.ip, self.l4.and_then(Layer4::ports))
        else {
            return;
        };
        let source = SocketAddr::new(ip.source, source_port);
        let destination = SocketAddr::new(ip.destination, destination_port);
        let protocol = self.protocol();
        if from_node {
            self.source.workloads = names.unit(protocol, source, destination);
        } else {
            self.destination.workloads = names.unit(protocol, destination, source);
        }
    }
}

/// Returns whether the packet is of the reply direction, as Hubble reports it: the direction of a dropped or denied
/// packet counts as unknown. A packet that a policy allows is of the original direction unless the event has the flag
/// REPLY.
const fn is_reply(kind: EventKind, verdict: Verdict, flags: u8) -> Option<bool> {
    match (kind, verdict) {
        (EventKind::Drop, _) | (EventKind::PolicyVerdict, Verdict::Dropped) => None,
        (EventKind::PolicyVerdict | EventKind::Trace, _) => Some(flags & event_flags::REPLY != 0),
    }
}

pub(crate) fn rule_of(id: u32, info: &RuleInfo) -> Rule {
    Rule {
        id,
        text: Arc::clone(&info.text),
        location: Arc::clone(&info.location),
        default_deny: info.default_deny,
        policies: info.policies.iter().map(Policy::qualified_name).collect(),
    }
}

/// Returns the kind of an event. An unknown kind is treated as a trace.
const fn kind_of(kind: u8) -> EventKind {
    match kind {
        k if k == EventKind::PolicyVerdict as u8 => EventKind::PolicyVerdict,
        k if k == EventKind::Drop as u8 => EventKind::Drop,
        _ => EventKind::Trace,
    }
}

pub(crate) fn end(
    names: &(impl FlowResolver + ?Sized),
    is_ip: bool,
    address: palisade_abi::Addr,
    seen_identity: u32,
    endpoint: Option<Owner>,
) -> Endpoint {
    let by_endpoint = endpoint.is_some();
    let owner = endpoint
        .or_else(|| is_ip.then(|| names.address(address.into())).flatten())
        .unwrap_or_default();
    // The identity that the program looked up is shown even if the address has another owner by now. If the program
    // looked up no identity, only the endpoint of the interface is certain.
    let identity = match seen_identity {
        0 if by_endpoint => owner.identity,
        seen => seen,
    };
    Endpoint {
        id: owner.endpoint.into(),
        identity,
        namespace: owner.namespace,
        labels: if identity == 0 {
            Arc::default()
        } else {
            names.labels(identity).unwrap_or_default()
        },
        cluster_name: Arc::default(),
        pod_name: owner.name,
        workloads: owner.workloads,
    }
}

fn layer4(event: &Event) -> Option<Layer4> {
    if event.ether_type != 0 || event.flags & event_flags::FRAGMENT != 0 {
        return None;
    }
    let (source_port, destination_port) = (event.source_port, event.destination_port);
    // For ICMP, the port fields of an event are type and code, one byte each.
    let (kind, code) = (source_port as u8, destination_port as u8);
    Some(match event.protocol {
        protocol::TCP => Layer4::Tcp {
            source_port,
            destination_port,
            flags: TcpFlags(event.tcp_flags),
        },
        protocol::UDP => Layer4::Udp {
            source_port,
            destination_port,
        },
        protocol::SCTP => Layer4::Sctp {
            source_port,
            destination_port,
        },
        protocol::ICMP => Layer4::Icmpv4 { kind, code },
        protocol::ICMPV6 => Layer4::Icmpv6 { kind, code },
        _ => return None,
    })
}

fn progress(event: &Event, kind: EventKind) -> Option<Progress> {
    if kind != EventKind::Trace {
        return None;
    }
    let at = match event.trace_point {
        p if p == AbiTracePoint::Start as u8 => Moment::Start,
        p if p == AbiTracePoint::Interval as u8 => Moment::Interval,
        p if p == AbiTracePoint::End as u8 => Moment::End,
        _ => return None,
    };
    Some(Progress {
        at,
        forward_packets: event.forward_packets,
        forward_bytes: event.forward_bytes,
        reply_packets: event.reply_packets,
        reply_bytes: event.reply_bytes,
    })
}

fn summary(flow: &Flow) -> String {
    match flow.l4 {
        Some(Layer4::Tcp { flags, .. }) => {
            let names: Vec<_> = flags.names().collect();
            format!("TCP Flags: {}", names.join(", "))
        }
        Some(Layer4::Udp { .. }) => "UDP".into(),
        Some(Layer4::Sctp { .. }) => "SCTP".into(),
        Some(Layer4::Icmpv4 { kind, code }) => format!("ICMPv4 {}", icmpv4_text(kind, code)),
        Some(Layer4::Icmpv6 { kind, code }) => format!("ICMPv6 {}", icmpv6_text(kind, code)),
        None if flow.ip.is_none() => ether_type_text(flow.palisade.ether_type),
        None if flow.palisade.fragment => format!("{} fragment", protocol_text(flow.palisade.protocol)),
        None => protocol_text(flow.palisade.protocol),
    }
}

fn ether_type_text(number: u16) -> String {
    // IANA registry "IEEE 802 Numbers".
    match number {
        0x0806 => "ARP".into(),
        0x8100 | 0x88a8 => "VLAN".into(),
        0x88cc => "LLDP".into(),
        0x8847 | 0x8848 => "MPLS".into(),
        other => format!("EtherType {other:#06x}"),
    }
}

/// Returns the name of a protocol as Hubble and IANA write it.
fn protocol_text(number: u8) -> String {
    match number {
        protocol::TCP => "TCP",
        protocol::UDP => "UDP",
        protocol::SCTP => "SCTP",
        protocol::ICMP => "ICMPv4",
        protocol::ICMPV6 => "ICMPv6",
        protocol::IGMP => "IGMP",
        4 => "IPIP",
        41 => "IPv6-in-IP",
        47 => "GRE",
        50 => "ESP",
        51 => "AH",
        112 => "VRRP",
        other => return format!("IP protocol {other}"),
    }
    .into()
}

/// Returns the name that Hubble uses for type and code of an ICMP message; `None` for other protocols.
#[must_use]
pub fn icmp_text(l4: Layer4) -> Option<String> {
    match l4 {
        Layer4::Icmpv4 { kind, code } => Some(icmpv4_text(kind, code)),
        Layer4::Icmpv6 { kind, code } => Some(icmpv6_text(kind, code)),
        Layer4::Tcp { .. } | Layer4::Udp { .. } | Layer4::Sctp { .. } => None,
    }
}

/// Returns the name that Hubble uses for type and code of ICMP: `EchoRequest`, `DestinationUnreachable(Port)` (RFC
/// 792).
fn icmpv4_text(kind: u8, code: u8) -> String {
    const UNREACHABLE: [&str; 16] = [
        "Net",
        "Host",
        "Protocol",
        "Port",
        "FragmentationNeeded",
        "SourceRoutingFailed",
        "NetUnknown",
        "HostUnknown",
        "SourceIsolated",
        "NetAdminProhibited",
        "HostAdminProhibited",
        "NetTOS",
        "HostTOS",
        "CommAdminProhibited",
        "HostPrecedence",
        "PrecedenceCutoff",
    ];
    let (name, codes): (&str, &[&str]) = match kind {
        0 => ("EchoReply", &[]),
        3 => ("DestinationUnreachable", &UNREACHABLE),
        4 => ("SourceQuench", &[]),
        5 => ("Redirect", &["Net", "Host", "TOS+Net", "TOS+Host"]),
        8 => ("EchoRequest", &[]),
        9 => ("RouterAdvertisement", &[]),
        10 => ("RouterSolicitation", &[]),
        11 => ("TimeExceeded", &["TTLExceeded", "FragmentReassemblyTimeExceeded"]),
        12 => (
            "ParameterProblem",
            &["PointerIndicatesError", "MissingOption", "BadLength"],
        ),
        13 => ("TimestampRequest", &[]),
        14 => ("TimestampReply", &[]),
        _ => return format!("{kind}({code})"),
    };
    with_code(name, codes, code)
}

/// Returns the name that Hubble uses for type and code of ICMPv6 (RFC 4443, RFC 4861, RFC 3810).
fn icmpv6_text(kind: u8, code: u8) -> String {
    const UNREACHABLE: [&str; 7] = [
        "NoRouteToDst",
        "AdminProhibited",
        "BeyondScopeOfSrc",
        "Address",
        "Port",
        "SrcAddressFailedPolicy",
        "RejectRouteToDst",
    ];
    let (name, codes): (&str, &[&str]) = match kind {
        1 => ("DestinationUnreachable", &UNREACHABLE),
        2 => ("PacketTooBig", &[]),
        3 => (
            "TimeExceeded",
            &["HopLimitExceeded", "FragmentReassemblyTimeExceeded"],
        ),
        4 => (
            "ParameterProblem",
            &[
                "ErroneousHeader",
                "UnrecognizedNextHeader",
                "UnrecognizedIPv6Option",
            ],
        ),
        128 => ("EchoRequest", &[]),
        129 => ("EchoReply", &[]),
        130 => ("MLDv1MulticastListenerQueryMessage", &[]),
        131 => ("MLDv1MulticastListenerReportMessage", &[]),
        132 => ("MLDv1MulticastListenerDoneMessage", &[]),
        133 => ("RouterSolicitation", &[]),
        134 => ("RouterAdvertisement", &[]),
        135 => ("NeighborSolicitation", &[]),
        136 => ("NeighborAdvertisement", &[]),
        137 => ("Redirect", &[]),
        143 => ("MLDv2MulticastListenerReportMessageV2", &[]),
        _ => return format!("{kind}({code})"),
    };
    with_code(name, codes, code)
}

fn with_code(name: &str, codes: &[&str], code: u8) -> String {
    match codes.get(usize::from(code)) {
        Some(text) => format!("{name}({text})"),
        None if codes.is_empty() && code == 0 => name.into(),
        None => format!("{name}(Code: {code})"),
    }
}
