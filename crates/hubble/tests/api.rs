//! The observer service over a ring of flows, without a network.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed expectation fails the test"
)]

use std::{sync::Arc, time::Duration};

use palisade_flowlog::{
    Flow, Lost, LostSource, Ring, Timestamp,
    flow::{Endpoint, EventType, FlowType, Ip, IpVersion, Layer4, TcpFlags, Verdict},
};
use palisade_hubble::{
    Api, Limits, Node,
    agent::AgentEvent,
    proto::{
        flow::{FlowFilter, LostEventSource, layer4::Protocol},
        grpc::health::v1::HealthCheckRequest,
        observer::{
            GetAgentEventsRequest, GetAgentEventsResponse, GetFlowsRequest, GetFlowsResponse,
            GetNamespacesRequest, get_flows_request::Experimental, get_flows_response::ResponseTypes,
        },
        services::{health_server::Health, observer_server::Observer},
    },
    wire::Encoded,
};
use prost::Message as _;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request, Status};

fn api(capacity: usize, readers: usize) -> (Arc<Ring>, Api) {
    let ring = Ring::new(capacity);
    let node = Node {
        name: "node1".into(),
        version: "1.2.3".into(),
        ..Node::default()
    };
    let api = Api::new(Arc::clone(&ring), node, Limits { readers }).unwrap();
    (ring, api)
}

/// A flow whose source port and time, s, are `number`.
fn flow(number: u16) -> Flow {
    Flow {
        time: Timestamp(i64::from(number) * 1_000_000_000),
        verdict: if number.is_multiple_of(2) {
            Verdict::Forwarded
        } else {
            Verdict::Dropped
        },
        flow_type: FlowType::L3L4,
        node_name: "node1".into(),
        ip: Some(Ip {
            source: "2001:db8::1".parse().unwrap(),
            destination: "2001:db8::2".parse().unwrap(),
            version: IpVersion::V6,
        }),
        l4: Some(Layer4::Tcp {
            source_port: number,
            destination_port: 80,
            flags: TcpFlags(0x12),
        }),
        event_type: EventType { kind: 4, sub_type: 3 },
        is_reply: Some(false),
        summary: format!("flow {number}"),
        ..Flow::default()
    }
}

type Responses = std::pin::Pin<Box<dyn Stream<Item = Result<Encoded, Status>> + Send>>;

async fn get(api: &Api, request: GetFlowsRequest) -> Responses {
    api.get_flows(Request::new(request)).await.unwrap().into_inner()
}

fn decode(encoded: &Encoded) -> GetFlowsResponse {
    GetFlowsResponse::decode(encoded.0.clone()).unwrap()
}

/// Returns the source port of each flow of a stream that ends.
async fn ports(api: &Api, request: GetFlowsRequest) -> Vec<u32> {
    let responses: Vec<_> = get(api, request).await.collect().await;
    responses
        .into_iter()
        .map(|response| port(&decode(&response.unwrap())))
        .collect()
}

fn port(response: &GetFlowsResponse) -> u32 {
    let Some(ResponseTypes::Flow(flow)) = &response.response_types else {
        panic!("{response:?}");
    };
    match flow.l4.as_ref().unwrap().protocol.as_ref().unwrap() {
        Protocol::Tcp(tcp) => tcp.source_port,
        other => panic!("{other:?}"),
    }
}

const LONG: Duration = Duration::from_secs(60);

async fn next(stream: &mut Responses) -> GetFlowsResponse {
    let next = tokio::time::timeout(LONG, stream.next()).await.unwrap();
    decode(&next.unwrap().unwrap())
}

#[tokio::test]
async fn ranges_and_filters_choose_the_flows() {
    let (ring, api) = api(64, 8);
    for number in 1..=20 {
        ring.push(flow(number));
    }
    let all: Vec<u32> = (1..=20).collect();
    assert_eq!(ports(&api, GetFlowsRequest::default()).await, all);
    let last = GetFlowsRequest {
        number: 3,
        ..GetFlowsRequest::default()
    };
    assert_eq!(ports(&api, last.clone()).await, [18, 19, 20]);
    let first = GetFlowsRequest {
        first: true,
        ..last.clone()
    };
    assert_eq!(ports(&api, first).await, [1, 2, 3]);
    let dropped = FlowFilter {
        verdict: vec![2],
        ..FlowFilter::default()
    };
    let only = GetFlowsRequest {
        whitelist: vec![dropped.clone()],
        ..last.clone()
    };
    assert_eq!(ports(&api, only).await, [15, 17, 19]);
    let without = GetFlowsRequest {
        blacklist: vec![dropped],
        ..last
    };
    assert_eq!(ports(&api, without).await, [16, 18, 20]);
    let second = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
    let between = GetFlowsRequest {
        since: second(5),
        until: second(8),
        ..GetFlowsRequest::default()
    };
    assert_eq!(ports(&api, between).await, [5, 6, 7, 8]);
}

#[tokio::test]
async fn a_follower_gets_flows_as_they_happen_and_every_reader_the_same() {
    let (ring, api) = api(64, 8);
    ring.push(flow(1));
    let follow = GetFlowsRequest {
        follow: true,
        ..GetFlowsRequest::default()
    };
    let mut one = get(&api, follow.clone()).await;
    let mut other = get(&api, GetFlowsRequest { number: 1, ..follow }).await;
    assert_eq!(port(&next(&mut other).await), 1);
    ring.push(flow(2));
    let (a, b) = (next(&mut one).await, next(&mut other).await);
    assert_eq!(a, b);
    assert_eq!(port(&a), 2);
    assert_eq!(a.node_name, "node1");
    assert_eq!(a.time.unwrap().seconds, 2);
}

#[tokio::test]
async fn a_slow_reader_is_told_how_many_flows_it_lost() {
    let (ring, api) = api(16, 8);
    let mut slow = get(
        &api,
        GetFlowsRequest {
            follow: true,
            ..GetFlowsRequest::default()
        },
    )
    .await;
    for number in 1..=50 {
        ring.push(flow(number));
    }
    let said = next(&mut slow).await;
    let Some(ResponseTypes::LostEvents(lost)) = said.response_types else {
        panic!("{said:?}");
    };
    assert_eq!(lost.source(), LostEventSource::HubbleRingBuffer);
    assert_eq!(lost.num_events_lost, 34);
    assert!(said.time.is_some() && said.node_name == "node1");
    assert_eq!(port(&next(&mut slow).await), 35);
    assert_eq!(api.counts().lost, 34);
}

#[tokio::test]
async fn losses_before_the_ring_reach_every_reader_with_their_source() {
    let (ring, api) = api(16, 8);
    let only_dropped = FlowFilter {
        verdict: vec![2],
        ..FlowFilter::default()
    };
    let following = |whitelist| GetFlowsRequest {
        follow: true,
        whitelist,
        ..GetFlowsRequest::default()
    };
    let mut follower = get(&api, following(Vec::new())).await;
    let mut filtered = get(&api, following(vec![only_dropped])).await;
    ring.push(flow(2));
    for (source, count) in [
        (LostSource::PerfEventRingBuffer, 7),
        (LostSource::ObserverEventsQueue, 9),
    ] {
        ring.push_lost(Lost { source, count }, Timestamp(2_500_000_000));
    }
    ring.push(flow(3));
    let mut later = get(&api, GetFlowsRequest::default()).await;
    for (stream, flows) in [
        (&mut follower, &[2, 3][..]),
        (&mut filtered, &[3]),
        (&mut later, &[2, 3]),
    ] {
        let (mut ports, mut losses) = (Vec::new(), Vec::new());
        while ports.last() != Some(&3) {
            let said = next(stream).await;
            match said.response_types {
                Some(ResponseTypes::LostEvents(lost)) => losses.push((lost.source(), lost.num_events_lost)),
                _ => ports.push(port(&said)),
            }
        }
        assert_eq!(ports, flows);
        let wanted = [
            (LostEventSource::PerfEventRingBuffer, 7),
            (LostEventSource::ObserverEventsQueue, 9),
        ];
        assert_eq!(losses, wanted);
    }
    // No reader was slow.
    assert_eq!(api.counts().lost, 0);
}

#[tokio::test]
async fn a_field_mask_leaves_out_the_other_fields() {
    let (ring, api) = api(16, 8);
    ring.push(flow(7));
    let mask = Some(prost_types::FieldMask {
        paths: vec!["l4.TCP.source_port".into(), "verdict".into()],
    });
    let new = GetFlowsRequest {
        field_mask: mask.clone(),
        ..GetFlowsRequest::default()
    };
    let old = GetFlowsRequest {
        experimental: Some(Experimental { field_mask: mask }),
        ..GetFlowsRequest::default()
    };
    for request in [new, old] {
        let said = next(&mut get(&api, request).await).await;
        assert_eq!(port(&said), 7);
        let Some(ResponseTypes::Flow(flow)) = said.response_types else {
            unreachable!()
        };
        assert_eq!(flow.verdict, 2);
        assert!(flow.summary.is_empty() && flow.ip.is_none() && flow.uuid.is_empty());
    }
    let bad = GetFlowsRequest {
        field_mask: Some(prost_types::FieldMask {
            paths: vec!["colour".into()],
        }),
        ..GetFlowsRequest::default()
    };
    let refused = api.get_flows(Request::new(bad)).await.err().unwrap();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("'colour'"), "{refused}");
}

#[tokio::test]
async fn too_many_readers_are_refused() {
    let (_ring, api) = api(16, 2);
    let follow = GetFlowsRequest {
        follow: true,
        ..GetFlowsRequest::default()
    };
    let one = get(&api, follow.clone()).await;
    let _two = get(&api, follow.clone()).await;
    let refused = api.get_flows(Request::new(follow.clone())).await.err().unwrap();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    drop(one);
    let _three = get(&api, follow).await;
}

#[tokio::test]
async fn agent_events_are_sent_in_order() {
    let (_ring, api) = api(16, 2);
    api.report(AgentEvent::Started);
    api.report(AgentEvent::PolicyUpdated {
        labels: vec!["shop/web".into()],
        revision: 3,
        rules: 5,
    });
    let request = GetAgentEventsRequest::default();
    let stream = api.get_agent_events(Request::new(request)).await.unwrap();
    let events: Vec<_> = stream.into_inner().collect().await;
    let kinds: Vec<i32> = events
        .into_iter()
        .map(|event| GetAgentEventsResponse::decode(event.unwrap().0).unwrap())
        .map(|response| response.agent_event.unwrap().r#type)
        .collect();
    assert_eq!(kinds, [2, 3]);
}

#[tokio::test]
async fn errors_repeat_only_the_beginning_of_a_request() {
    let (_ring, api) = api(16, 2);
    let bad = GetFlowsRequest {
        field_mask: Some(prost_types::FieldMask {
            paths: vec!["x".repeat(10_000)],
        }),
        ..GetFlowsRequest::default()
    };
    let refused = api.get_flows(Request::new(bad)).await.err().unwrap();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().len() < 400, "{refused}");
    let service = "x".repeat(10_000);
    let unknown = Request::new(HealthCheckRequest { service });
    let refused = api.check(unknown).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert!(refused.message().len() < 400, "{refused}");
}

#[tokio::test]
async fn a_refused_reader_is_refused_before_its_filters_are_compiled() {
    let (_ring, api) = api(16, 1);
    let _one = get(&api, GetFlowsRequest::default()).await;
    let bad = FlowFilter {
        http_path: vec!["(".into()],
        ..FlowFilter::default()
    };
    let request = GetFlowsRequest {
        whitelist: vec![bad],
        ..GetFlowsRequest::default()
    };
    let refused = api.get_flows(Request::new(request)).await.err().unwrap();
    assert_eq!(refused.code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn the_ring_is_searched_for_namespaces_once_in_a_while() {
    let (ring, api) = api(16, 2);
    let of = |namespace: &str| Flow {
        source: Endpoint {
            namespace: namespace.into(),
            ..Endpoint::default()
        },
        time: Timestamp::from_system_time(std::time::SystemTime::now()),
        ..flow(1)
    };
    let names = async || -> Vec<String> {
        let response = api
            .get_namespaces(Request::new(GetNamespacesRequest::default()))
            .await;
        let namespaces = response.unwrap().into_inner().namespaces.into_iter();
        namespaces.map(|namespace| namespace.namespace).collect()
    };
    ring.push(of("shop"));
    assert_eq!(names().await, ["shop"]);
    ring.push(of("db"));
    assert_eq!(names().await, ["shop"]);
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(names().await, ["db", "shop"]);
}
