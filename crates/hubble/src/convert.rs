//! Flows in the form of the API.

use bytes::{Bytes, BytesMut};
use palisade_flowlog::{
    Flow, Lost, LostSource, Policy, Timestamp,
    flow::{Dns, Endpoint, Http, Kafka, Layer4, Layer7, Moment, TcpFlags, TracePoint},
};

use crate::{
    mask::Mask,
    proto::{
        flow::{self as pb, layer4::Protocol, layer7::Record},
        observer::{GetFlowsResponse, get_flows_response::ResponseTypes},
    },
    schema::parts,
    wire::Encoded,
};

/// Returns the encoded response with a flow.
pub(crate) fn response(flow: &Flow) -> Encoded {
    encode(&GetFlowsResponse {
        response_types: Some(ResponseTypes::Flow(message(flow))),
        node_name: flow.node_name.to_string(),
        time: Some(time(flow.time)),
    })
}

/// Returns the encoded response that says how many flows were lost, and where.
pub(crate) fn lost(lost: Lost, node: &str, now: Timestamp) -> Encoded {
    let source = match lost.source {
        LostSource::PerfEventRingBuffer => pb::LostEventSource::PerfEventRingBuffer,
        LostSource::ObserverEventsQueue => pb::LostEventSource::ObserverEventsQueue,
        LostSource::HubbleRingBuffer => pb::LostEventSource::HubbleRingBuffer,
    };
    encode(&GetFlowsResponse {
        response_types: Some(ResponseTypes::LostEvents(pb::LostEvent {
            source: source.into(),
            num_events_lost: lost.count,
            ..pb::LostEvent::default()
        })),
        node_name: node.to_owned(),
        time: Some(time(now)),
    })
}

/// Returns a response with only the wanted fields of its flow.
pub(crate) fn masked(response: &Encoded, mask: &Mask) -> Encoded {
    const FLOW: u32 = 1;
    let mut to = BytesMut::with_capacity(response.0.len());
    // The response was encoded by this server, so no part is broken.
    for part in parts(&response.0).map_while(Result::ok) {
        match part.content {
            Some(content) if part.number == FLOW => {
                let mut flow = BytesMut::with_capacity(content.len());
                mask.apply(content, &mut flow);
                prost::encoding::bytes::encode(FLOW, &flow.freeze(), &mut to);
            }
            _ => to.extend_from_slice(part.whole),
        }
    }
    Encoded(to.freeze())
}

/// Encodes a message.
pub(crate) fn encode(message: &impl prost::Message) -> Encoded {
    Encoded(Bytes::from(message.encode_to_vec()))
}

/// Returns a time in the form of protobuf.
pub(crate) fn time(time: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp {
        seconds: time.0.div_euclid(1_000_000_000),
        // No truncation: the remainder is less than 10^9.
        nanos: time.0.rem_euclid(1_000_000_000) as i32,
    }
}

fn message(flow: &Flow) -> pb::Flow {
    pb::Flow {
        time: Some(time(flow.time)),
        uuid: flow.uuid.to_string(),
        verdict: flow.verdict as i32,
        drop_reason: flow.drop_reason,
        ethernet: flow.ethernet.as_ref().map(|ethernet| pb::Ethernet {
            source: ethernet.source.to_string(),
            destination: ethernet.destination.to_string(),
        }),
        ip: flow.ip.map(|ip| pb::Ip {
            source: ip.source.to_string(),
            destination: ip.destination.to_string(),
            ip_version: ip.version as i32,
            ..pb::Ip::default()
        }),
        l4: flow.l4.map(layer4),
        source: Some(endpoint(&flow.source)),
        destination: Some(endpoint(&flow.destination)),
        r#type: flow.flow_type as i32,
        node_name: flow.node_name.to_string(),
        node_labels: texts(&flow.node_labels),
        source_names: texts(&flow.source_names),
        destination_names: texts(&flow.destination_names),
        l7: flow.l7.as_deref().map(layer7),
        reply: flow.is_reply.unwrap_or(false),
        event_type: Some(pb::CiliumEventType {
            r#type: flow.event_type.kind,
            sub_type: flow.event_type.sub_type,
        }),
        traffic_direction: flow.traffic_direction as i32,
        policy_match_type: flow.policy_match_type,
        trace_observation_point: flow.trace_observation_point as i32,
        trace_reason: trace_reason(flow).into(),
        trace_context: flow.trace_id().map(|trace_id| pb::TraceContext {
            parent: Some(pb::TraceParent {
                trace_id: trace_id.to_owned(),
            }),
        }),
        drop_reason_desc: flow.drop_reason_desc.0.into(),
        is_reply: flow.is_reply,
        interface: flow.interface.as_ref().map(|interface| pb::NetworkInterface {
            index: interface.index,
            name: interface.name.to_string(),
        }),
        summary: flow.summary.clone(),
        egress_allowed_by: policies(&flow.egress_allowed_by),
        ingress_allowed_by: policies(&flow.ingress_allowed_by),
        egress_denied_by: policies(&flow.egress_denied_by),
        ingress_denied_by: policies(&flow.ingress_denied_by),
        ..pb::Flow::default()
    }
}

fn texts<T: AsRef<str>>(texts: &[T]) -> Vec<String> {
    texts.iter().map(|text| text.as_ref().to_owned()).collect()
}

fn endpoint(end: &Endpoint) -> pb::Endpoint {
    pb::Endpoint {
        id: end.id,
        identity: end.identity,
        namespace: end.namespace.to_string(),
        labels: texts(&end.labels),
        pod_name: end.pod_name.to_string(),
        cluster_name: end.cluster_name.to_string(),
        workloads: end
            .workloads
            .iter()
            .map(|workload| pb::Workload {
                name: workload.name.to_string(),
                kind: workload.kind.to_string(),
            })
            .collect(),
    }
}

/// Returns the state of the connection at a trace, which the API calls the reason of the trace.
fn trace_reason(flow: &Flow) -> pb::TraceReason {
    let at = flow.palisade.progress.map(|progress| progress.at);
    match flow.is_reply {
        _ if flow.trace_observation_point == TracePoint::Unknown => pb::TraceReason::Unknown,
        _ if flow.palisade.related => pb::TraceReason::Related,
        _ if at == Some(Moment::Start) => pb::TraceReason::New,
        Some(true) => pb::TraceReason::Reply,
        Some(false) => pb::TraceReason::Established,
        None => pb::TraceReason::Unknown,
    }
}

fn layer4(l4: Layer4) -> pb::Layer4 {
    let protocol = match l4 {
        Layer4::Tcp {
            source_port,
            destination_port,
            flags,
        } => Protocol::Tcp(pb::Tcp {
            source_port: source_port.into(),
            destination_port: destination_port.into(),
            flags: Some(tcp_flags(flags)),
        }),
        Layer4::Udp {
            source_port,
            destination_port,
        } => Protocol::Udp(pb::Udp {
            source_port: source_port.into(),
            destination_port: destination_port.into(),
        }),
        Layer4::Sctp {
            source_port,
            destination_port,
        } => Protocol::Sctp(pb::Sctp {
            source_port: source_port.into(),
            destination_port: destination_port.into(),
        }),
        Layer4::Icmpv4 { kind, code } => Protocol::IcmPv4(pb::IcmPv4 {
            r#type: kind.into(),
            code: code.into(),
        }),
        Layer4::Icmpv6 { kind, code } => Protocol::IcmPv6(pb::IcmPv6 {
            r#type: kind.into(),
            code: code.into(),
        }),
    };
    pb::Layer4 {
        protocol: Some(protocol),
    }
}

const fn tcp_flags(TcpFlags(bits): TcpFlags) -> pb::TcpFlags {
    pb::TcpFlags {
        fin: bits & 0x01 != 0,
        syn: bits & 0x02 != 0,
        rst: bits & 0x04 != 0,
        psh: bits & 0x08 != 0,
        ack: bits & 0x10 != 0,
        urg: bits & 0x20 != 0,
        ece: bits & 0x40 != 0,
        cwr: bits & 0x80 != 0,
        ns: false,
    }
}

fn layer7(l7: &Layer7) -> pb::Layer7 {
    let dns = l7.dns.as_ref().map(|dns| Record::Dns(dns_message(dns)));
    let http = || l7.http.as_ref().map(|http| Record::Http(http_message(http)));
    let kafka = || l7.kafka.as_ref().map(|kafka| Record::Kafka(kafka_message(kafka)));
    pb::Layer7 {
        r#type: l7.kind as i32,
        latency_ns: l7.latency_ns,
        record: dns.or_else(http).or_else(kafka),
    }
}

fn dns_message(dns: &Dns) -> pb::Dns {
    pb::Dns {
        query: dns.query.clone(),
        ips: dns.ips.iter().map(ToString::to_string).collect(),
        ttl: dns.ttl,
        cnames: dns.cnames.clone(),
        observation_source: dns.observation_source.to_string(),
        rcode: dns.rcode,
        qtypes: texts(&dns.qtypes),
        rrtypes: texts(&dns.rrtypes),
    }
}

fn http_message(http: &Http) -> pb::Http {
    pb::Http {
        code: http.code,
        method: http.method.clone(),
        url: http.url.clone(),
        protocol: http.protocol.to_string(),
        headers: http
            .headers
            .iter()
            .map(|header| pb::HttpHeader {
                key: header.key.clone(),
                value: header.value.clone(),
            })
            .collect(),
    }
}

fn kafka_message(kafka: &Kafka) -> pb::Kafka {
    pb::Kafka {
        error_code: kafka.error_code,
        api_version: kafka.api_version,
        api_key: kafka.api_key.to_string(),
        correlation_id: kafka.correlation_id,
        topic: kafka.topic.clone(),
    }
}

fn policies(policies: &[Policy]) -> Vec<pb::Policy> {
    policies
        .iter()
        .map(|policy| pb::Policy {
            name: policy.name.to_string(),
            namespace: policy.namespace.to_string(),
            labels: texts(&policy.labels),
            revision: policy.revision,
            kind: policy.kind.to_string(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use palisade_flowlog::{
        DropReason, TrafficDirection, Uuid,
        flow::{
            Ethernet, EventType, Extra, FlowType, HttpHeader, Ip, IpVersion, L7Type, Mac, NetworkInterface,
            Progress, TraceContext, TraceParent, Verdict, Workload,
        },
    };
    use prost::Message as _;

    use super::*;

    fn policy(name: &str) -> Policy {
        Policy {
            name: name.into(),
            namespace: "shop".into(),
            labels: ["k8s:team=a".into()].into(),
            revision: 7,
            kind: "CiliumNetworkPolicy".into(),
        }
    }

    fn policy_message(name: &str) -> pb::Policy {
        pb::Policy {
            name: name.to_owned(),
            namespace: "shop".to_owned(),
            labels: vec!["k8s:team=a".to_owned()],
            revision: 7,
            kind: "CiliumNetworkPolicy".to_owned(),
        }
    }

    fn end(id: u32, pod_name: &str) -> Endpoint {
        Endpoint {
            id,
            identity: 1_000 + id,
            cluster_name: "prod".into(),
            namespace: "shop".into(),
            labels: ["k8s:app=a".into(), "k8s:tier=b".into()].into(),
            pod_name: pod_name.into(),
            workloads: [Workload {
                name: pod_name.into(),
                kind: "Deployment".into(),
            }]
            .into(),
        }
    }

    fn end_message(id: u32, pod_name: &str) -> pb::Endpoint {
        pb::Endpoint {
            id,
            identity: 1_000 + id,
            cluster_name: "prod".to_owned(),
            namespace: "shop".to_owned(),
            labels: vec!["k8s:app=a".to_owned(), "k8s:tier=b".to_owned()],
            pod_name: pod_name.to_owned(),
            workloads: vec![pb::Workload {
                name: pod_name.to_owned(),
                kind: "Deployment".to_owned(),
            }],
        }
    }

    /// Returns a flow whose every field differs from its default, and the message that clients must get.
    fn filled() -> (Flow, pb::Flow) {
        let flow = Flow {
            time: Timestamp(1_777_338_256_656_000_001),
            uuid: Uuid::from("01234567-89ab-8cde-bc00-00000000001c"),
            verdict: Verdict::Dropped,
            drop_reason: 240,
            ethernet: Some(Ethernet {
                source: Mac([2, 0, 0x5e, 0, 0x53, 1]),
                destination: Mac([2, 0, 0x5e, 0, 0x53, 2]),
            }),
            ip: Some(Ip {
                source: "2001:db8::1".parse().unwrap(),
                destination: "2001:db8::2".parse().unwrap(),
                version: IpVersion::V6,
            }),
            l4: Some(Layer4::Tcp {
                source_port: 60_700,
                destination_port: 9_092,
                flags: TcpFlags(0x12),
            }),
            source: end(11, "client"),
            destination: end(12, "broker"),
            source_names: ["client.example".into()].into(),
            destination_names: ["broker.example".into(), "kafka.example".into()].into(),
            l7: Some(Box::new(Layer7 {
                kind: L7Type::Response,
                latency_ns: 12_000_000,
                dns: None,
                http: None,
                kafka: Some(Kafka {
                    error_code: 29,
                    api_version: 9,
                    api_key: "produce".into(),
                    correlation_id: 4_711,
                    topic: "orders".to_owned(),
                }),
            })),
            flow_type: FlowType::L7,
            node_name: "node1".into(),
            node_labels: ["zone=a".into()].into(),
            event_type: EventType {
                kind: 129,
                sub_type: 3,
            },
            traffic_direction: TrafficDirection::Egress,
            policy_match_type: 2,
            trace_observation_point: TracePoint::ToStack,
            drop_reason_desc: DropReason(240),
            is_reply: Some(true),
            interface: Some(NetworkInterface {
                index: 5,
                name: "veth-client".into(),
            }),
            trace_context: Some(Box::new(TraceContext {
                parent: Some(TraceParent {
                    trace_id: "0af7651916cd43dd8448eb211c80319c".to_owned(),
                }),
            })),
            egress_allowed_by: [policy("egress-allow")].into(),
            ingress_allowed_by: [policy("ingress-allow"), policy("second")].into(),
            egress_denied_by: [policy("egress-deny")].into(),
            ingress_denied_by: [policy("ingress-deny")].into(),
            palisade: Extra::default(),
            summary: "Kafka response".to_owned(),
        };
        let message = pb::Flow {
            time: Some(prost_types::Timestamp {
                seconds: 1_777_338_256,
                nanos: 656_000_001,
            }),
            uuid: "01234567-89ab-8cde-bc00-00000000001c".to_owned(),
            verdict: pb::Verdict::Dropped.into(),
            drop_reason: 240,
            ethernet: Some(pb::Ethernet {
                source: "02:00:5e:00:53:01".to_owned(),
                destination: "02:00:5e:00:53:02".to_owned(),
            }),
            ip: Some(pb::Ip {
                source: "2001:db8::1".to_owned(),
                destination: "2001:db8::2".to_owned(),
                ip_version: pb::IpVersion::IPv6.into(),
                ..pb::Ip::default()
            }),
            l4: Some(pb::Layer4 {
                protocol: Some(Protocol::Tcp(pb::Tcp {
                    source_port: 60_700,
                    destination_port: 9_092,
                    flags: Some(pb::TcpFlags {
                        syn: true,
                        ack: true,
                        ..pb::TcpFlags::default()
                    }),
                })),
            }),
            source: Some(end_message(11, "client")),
            destination: Some(end_message(12, "broker")),
            source_names: vec!["client.example".to_owned()],
            destination_names: vec!["broker.example".to_owned(), "kafka.example".to_owned()],
            l7: Some(pb::Layer7 {
                r#type: pb::L7FlowType::Response.into(),
                latency_ns: 12_000_000,
                record: Some(Record::Kafka(pb::Kafka {
                    error_code: 29,
                    api_version: 9,
                    api_key: "produce".to_owned(),
                    correlation_id: 4_711,
                    topic: "orders".to_owned(),
                })),
            }),
            r#type: pb::FlowType::L7.into(),
            node_name: "node1".to_owned(),
            node_labels: vec!["zone=a".to_owned()],
            reply: true,
            event_type: Some(pb::CiliumEventType {
                r#type: 129,
                sub_type: 3,
            }),
            traffic_direction: pb::TrafficDirection::Egress.into(),
            policy_match_type: 2,
            trace_observation_point: pb::TraceObservationPoint::ToStack.into(),
            trace_reason: pb::TraceReason::Reply.into(),
            drop_reason_desc: 240,
            is_reply: Some(true),
            interface: Some(pb::NetworkInterface {
                index: 5,
                name: "veth-client".to_owned(),
            }),
            trace_context: Some(pb::TraceContext {
                parent: Some(pb::TraceParent {
                    trace_id: "0af7651916cd43dd8448eb211c80319c".to_owned(),
                }),
            }),
            summary: "Kafka response".to_owned(),
            egress_allowed_by: vec![policy_message("egress-allow")],
            ingress_allowed_by: vec![policy_message("ingress-allow"), policy_message("second")],
            egress_denied_by: vec![policy_message("egress-deny")],
            ingress_denied_by: vec![policy_message("ingress-deny")],
            // The fields of clusters, tunnels, services and sockets.
            ..pb::Flow::default()
        };
        (flow, message)
    }

    #[test]
    fn every_field_of_a_flow_is_in_its_message() {
        let (flow, wanted) = filled();
        assert_eq!(message(&flow), wanted);
    }

    #[test]
    fn every_field_of_dns_and_http_messages_is_in_their_records() {
        let dns = layer7(&Layer7 {
            kind: L7Type::Response,
            latency_ns: 3,
            dns: Some(Dns {
                query: "www.example.".to_owned(),
                ips: vec!["192.0.2.9".parse().unwrap(), "2001:db8::9".parse().unwrap()],
                ttl: 30,
                cnames: vec!["target.example.".to_owned()],
                observation_source: "proxy".into(),
                rcode: 2,
                qtypes: vec!["A".into()],
                rrtypes: vec!["CNAME".into(), "A".into()],
            }),
            ..Layer7::default()
        });
        let text = |text: &str| text.to_owned();
        assert_eq!(
            dns.record,
            Some(Record::Dns(pb::Dns {
                query: text("www.example."),
                ips: vec![text("192.0.2.9"), text("2001:db8::9")],
                ttl: 30,
                cnames: vec![text("target.example.")],
                observation_source: text("proxy"),
                rcode: 2,
                qtypes: vec![text("A")],
                rrtypes: vec![text("CNAME"), text("A")],
            }))
        );
        let http = layer7(&Layer7 {
            kind: L7Type::Request,
            http: Some(Http {
                code: 204,
                method: text("GET"),
                url: text("http://web/"),
                protocol: "HTTP/1.1".into(),
                headers: vec![HttpHeader {
                    key: text("user-agent"),
                    value: text("curl"),
                }],
            }),
            ..Layer7::default()
        });
        assert_eq!(http.r#type, i32::from(pb::L7FlowType::Request));
        assert_eq!(
            http.record,
            Some(Record::Http(pb::Http {
                code: 204,
                method: text("GET"),
                url: text("http://web/"),
                protocol: text("HTTP/1.1"),
                headers: vec![pb::HttpHeader {
                    key: text("user-agent"),
                    value: text("curl"),
                }],
            }))
        );
    }

    #[test]
    fn the_reason_of_a_trace_is_the_state_of_its_connection() {
        let at = |at| {
            Some(Progress {
                at,
                forward_packets: 1,
                forward_bytes: 60,
                reply_packets: 0,
                reply_bytes: 0,
            })
        };
        for (is_reply, progress, related, reason) in [
            (Some(false), at(Moment::Start), false, pb::TraceReason::New),
            (
                Some(false),
                at(Moment::Interval),
                false,
                pb::TraceReason::Established,
            ),
            (Some(true), at(Moment::End), false, pb::TraceReason::Reply),
            (Some(true), None, true, pb::TraceReason::Related),
            (None, None, false, pb::TraceReason::Unknown),
        ] {
            let flow = Flow {
                trace_observation_point: TracePoint::ToStack,
                is_reply,
                palisade: Extra {
                    progress,
                    related,
                    ..Extra::default()
                },
                ..Flow::default()
            };
            assert_eq!(message(&flow).trace_reason(), reason, "{flow:?}");
            let no_trace = Flow {
                trace_observation_point: TracePoint::Unknown,
                ..flow
            };
            assert_eq!(message(&no_trace).trace_reason(), pb::TraceReason::Unknown);
        }
    }

    #[test]
    fn each_source_of_losses_has_its_number() {
        for (source, number) in [
            (
                LostSource::PerfEventRingBuffer,
                pb::LostEventSource::PerfEventRingBuffer,
            ),
            (
                LostSource::ObserverEventsQueue,
                pb::LostEventSource::ObserverEventsQueue,
            ),
            (
                LostSource::HubbleRingBuffer,
                pb::LostEventSource::HubbleRingBuffer,
            ),
        ] {
            let response = lost(Lost { source, count: 12 }, "node1", Timestamp(1_000_000_000));
            let response = GetFlowsResponse::decode(response.0).unwrap();
            let Some(ResponseTypes::LostEvents(event)) = response.response_types else {
                panic!("{response:?}");
            };
            assert_eq!((event.source(), event.num_events_lost), (number, 12));
            assert_eq!(response.node_name, "node1");
        }
    }
}
