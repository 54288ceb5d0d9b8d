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
