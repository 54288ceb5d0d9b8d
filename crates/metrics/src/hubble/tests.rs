//! Tests of the metrics of flow records: labels, contexts, limits, and what is counted.

use std::{net::IpAddr, sync::Arc};

use palisade_abi::{Decision, Event, EventKind, MatchKind, Reason, event_flags, protocol};
use palisade_flowlog::{Flow, FlowResolver, Owner, RuleInfo, Timestamp};
use palisade_inspect::record::{Record, Text, Verdict as Seen, What, Word};

use super::*;
use crate::{Value, table::OVERFLOW};

/// Resolves: endpoint 7 is `shop/web-5d4f8c7b9-x2x4z` with identity 300, identity 2 is the world.
struct Names;

impl FlowResolver for Names {
    fn node(&self) -> Arc<str> {
        "node1".into()
    }

    fn labels(&self, identity: u32) -> Option<Arc<[Arc<str>]>> {
        match identity {
            300 => Some(["k8s:app=web".into(), "k8s:env=prod".into()].into()),
            2 => Some(["reserved:world".into()].into()),
            10 => Some(["reserved:world-ipv6".into()].into()),
            1 => Some(["reserved:host".into()].into()),
            _ => None,
        }
    }

    fn endpoint(&self, id: u16) -> Option<Owner> {
        (id == 7).then(|| Owner {
            endpoint: 7,
            identity: 300,
            namespace: "shop".into(),
            name: "web-5d4f8c7b9-x2x4z".into(),
            workloads: palisade_flowlog::flow::Workload::of_endpoint(&"web-5d4f8c7b9-x2x4z".into()),
        })
    }

    fn address(&self, _: IpAddr) -> Option<Owner> {
        None
    }

    fn rule(&self, _: u32) -> Option<RuleInfo> {
        None
    }

    fn interface(&self, _: u32) -> Option<Arc<str>> {
        None
    }

    fn dns_names(&self, _: u16, _: IpAddr) -> Arc<[Arc<str>]> {
        ["a.example".into(), "b.example".into()].into()
    }
}

fn address(text: &str) -> palisade_abi::Addr {
    text.parse::<IpAddr>().unwrap().into()
}

/// An event about a packet that endpoint 7 sends to the world.
fn event(kind: EventKind, reason: Reason, protocol: u8) -> Event {
    Event {
        time: 0,
        source: address("10.0.0.1"),
        destination: address("192.0.2.1"),
        source_port: 40_000,
        destination_port: 443,
        source_identity: 300,
        destination_identity: 2,
        rule: 0,
        ifindex: 0,
        length: 60,
        endpoint: 7,
        kind: kind as u8,
        reason: reason as u8,
        flags: event_flags::EGRESS | event_flags::FLOW_EGRESS,
        protocol,
        tcp_flags: 0x02,
        match_kind: MatchKind::L3L4 as u8,
        trace_point: 0,
        decision: Decision::Allow as u8,
        ether_type: 0,
        source_mac: [0; 6],
        destination_mac: [0; 6],
        forward_packets: 0,
        forward_bytes: 0,
        reply_packets: 0,
        reply_bytes: 0,
    }
}

fn flow(event: &Event) -> Flow {
    Flow::from_event(event, &Names, 0)
}

/// A record about a packet between endpoint 7 and a server in the world.
fn record(reply: bool, what: What) -> Record {
    let (client, server) = ((address("10.0.0.1"), 40_000), (address("2001:db8::1"), 80));
    let (source, destination) = if reply { (server, client) } else { (client, server) };
    Record {
        endpoint: 7,
        ingress: reply,
        reply,
        source,
        destination,
        protocol: protocol::TCP,
        remote_identity: 2,
        ifindex: 0,
        verdict: Seen::Forwarded,
        reason: Reason::Allowed,
        rule: 0,
        latency: reply.then_some(30),
        what,
    }
}

fn text(text: &str) -> Text {
    Text::from(text.as_bytes())
}

fn query(name: &str, kind: u16) -> What {
    What::DnsQuery {
        name: text(name),
        kind,
    }
}

fn answer(name: &str, rcode: u16, cname: &str) -> What {
    let mut addresses = [address("0.0.0.0"); 8];
    addresses[0] = address("192.0.2.1");
    addresses[1] = address("2001:db8::1");
    What::DnsAnswer {
        name: text(name),
        kind: 1,
        rcode,
        addresses,
        count: 2,
        ttl: 60,
        cname: text(cname),
    }
}

fn request(method: &str) -> What {
    What::HttpRequest {
        method: Word::from(method.as_bytes()),
        version: 1,
        url: text("http://a/b"),
        headers: text(""),
        mismatch: false,
    }
}

fn response(status: u16) -> What {
    What::HttpResponse {
        method: Word::from(&b"GET"[..]),
        url: text("http://a/b"),
        version: 1,
        status,
        length: None,
        headers: text(""),
    }
}

fn kafka(error: i16) -> What {
    What::Kafka {
        key: 1,
        version: 3,
        correlation: 9,
        error,
        topic: text("orders"),
        client: text("c"),
    }
}

fn hubble(configured: &[&str], limit: usize) -> Hubble {
    let metrics: Vec<HubbleMetric> = configured.iter().map(|text| text.parse().unwrap()).collect();
    check(&metrics).unwrap();
    Hubble::new(metrics, limit)
}

/// Returns the time series as `name{label="value",...} count`.
fn series(hubble: &Hubble) -> Vec<String> {
    let mut lines = Vec::new();
    for family in hubble.families() {
        for row in &family.rows {
            let labels: Vec<String> = family
                .labels
                .iter()
                .zip(&row.labels)
                .map(|(name, value)| format!("{name}={value}"))
                .collect();
            let name = family.definition.name.trim_start_matches("hubble_");
            let value = match &row.value {
                Value::Count(count) => count.to_string(),
                Value::Number(number) => number.to_string(),
                Value::Histogram(histogram) => format!("{} {:.3}", histogram.count(), histogram.sum()),
            };
            lines.push(format!("{name}{{{}}} {value}", labels.join(",")));
        }
    }
    lines
}

fn counted(configured: &[&str], flows: &[Flow]) -> Vec<String> {
    let mut hubble = hubble(configured, 100);
    for flow in flows {
        hubble.count(&Sample::of_flow(flow));
    }
    series(&hubble)
}

fn of_records(configured: &[&str], records: &[Record]) -> Vec<String> {
    let mut hubble = hubble(configured, 100);
    assert!(!hubble.needs_names());
    for record in records {
        hubble.count(&Sample::of_record(record));
    }
    series(&hubble)
}

#[test]
fn the_sample_of_a_record_is_that_of_its_flow() {
    let mut records = vec![
        record(false, query("www.example", 1)),
        record(false, query("", 28)),
        record(false, query("x.example", 65_000)),
        record(true, answer("www.example", 0, "cdn.example")),
        record(true, answer("www.example", 3, "")),
        record(false, request("GET")),
        record(false, request("\u{fffd}\u{1}")),
        record(true, response(404)),
        record(false, kafka(29)),
        record(true, kafka(0)),
        record(
            false,
            What::TlsHello {
                name: text("a"),
                version: 0x0304,
                ech: false,
            },
        ),
        record(false, What::Unreadable { detail: "x" }),
    ];
    let mut denied = record(false, request("PUT"));
    denied.verdict = Seen::Dropped;
    denied.reason = Reason::PolicyDenied;
    let mut udp = record(false, query("www.example", 1));
    (udp.protocol, udp.ingress, udp.verdict) = (protocol::UDP, true, Seen::Audit);
    records.extend([denied, udp]);
    for record in &records {
        let flow = Flow::from_record(record, &Names, Timestamp(0));
        let mut of_flow = Sample::of_flow(&flow);
        assert!(of_flow.flow.take().is_some());
        assert_eq!(Sample::of_record(record), of_flow, "{record:?}");
    }
}

#[test]
fn flows_are_counted_by_protocol_type_and_verdict() {
    let mut reply = event(EventKind::Trace, Reason::Allowed, protocol::UDP);
    reply.flags = 0;
    let mut sctp = event(EventKind::PolicyVerdict, Reason::PolicyDenied, protocol::SCTP);
    sctp.flags |= event_flags::AUDIT;
    let flows = [
        flow(&event(EventKind::Drop, Reason::PolicyDenied, protocol::TCP)),
        flow(&event(EventKind::Drop, Reason::PolicyDenied, protocol::TCP)),
        flow(&event(EventKind::PolicyVerdict, Reason::Allowed, protocol::TCP)),
        flow(&sctp),
        flow(&reply),
        flow(&event(EventKind::Drop, Reason::UnknownL4, 250)),
        Flow::from_record(&record(false, kafka(0)), &Names, Timestamp(0)),
        Flow::from_record(
            &record(false, What::Unreadable { detail: "x" }),
            &Names,
            Timestamp(0),
        ),
    ];
    assert_eq!(
        counted(&["flow"], &flows),
        [
            "flows_processed_total{protocol=Kafka,type=L7,subtype=Kafka,verdict=FORWARDED} 1",
            "flows_processed_total{protocol=SCTP,type=PolicyVerdict,subtype=,verdict=AUDIT} 1",
            "flows_processed_total{protocol=TCP,type=Drop,subtype=,verdict=DROPPED} 2",
            "flows_processed_total{protocol=TCP,type=PolicyVerdict,subtype=,verdict=FORWARDED} 1",
            "flows_processed_total{protocol=UDP,type=Trace,subtype=to-endpoint,verdict=FORWARDED} 1",
            "flows_processed_total{protocol=Unknown L4,type=Drop,subtype=,verdict=DROPPED} 1",
            "flows_processed_total{protocol=Unknown L7,type=L7,subtype=,verdict=FORWARDED} 1",
        ]
    );
}

#[test]
fn drops_are_counted_by_reason_and_protocol() {
    let flows = [
        flow(&event(EventKind::Drop, Reason::PolicyDenied, protocol::TCP)),
        flow(&event(
            EventKind::PolicyVerdict,
            Reason::PolicyDenied,
            protocol::TCP,
        )),
        flow(&event(EventKind::PolicyVerdict, Reason::Allowed, protocol::TCP)),
        flow(&event(EventKind::Drop, Reason::UnknownL4, 250)),
    ];
    assert_eq!(
        counted(&["drop"], &flows),
        [
            "drop_total{reason=CT_UNKNOWN_L4_PROTOCOL,protocol=Unknown L4} 1",
            "drop_total{reason=POLICY_DENIED,protocol=TCP} 2",
        ]
    );
}

#[test]
fn dns_is_counted_with_and_without_names() {
    let mut denied = record(false, query("evil.example", 1));
    (denied.verdict, denied.reason) = (Seen::Dropped, Reason::PolicyDenied);
    let records = [
        record(false, query("www.example", 1)),
        record(false, query("www.example", 28)),
        record(true, answer("www.example", 0, "cdn.example")),
        record(true, answer("www.example", 3, "")),
        record(true, answer("www.example", 4_000, "")),
        denied,
    ];
    assert_eq!(
        of_records(&["dns"], &records),
        [
            "dns_queries_total{rcode=,qtypes=A,ips_returned=0} 1",
            "dns_queries_total{rcode=,qtypes=AAAA,ips_returned=0} 1",
            "dns_queries_total{rcode=Policy denied,qtypes=A,ips_returned=0} 1",
            "dns_responses_total{rcode=,qtypes=A,ips_returned=2} 1",
            "dns_responses_total{rcode=No Error,qtypes=A,ips_returned=2} 1",
            "dns_responses_total{rcode=Non-Existent Domain,qtypes=A,ips_returned=2} 1",
            "dns_response_types_total{type=A,qtypes=A} 3",
            "dns_response_types_total{type=AAAA,qtypes=A} 3",
            "dns_response_types_total{type=CNAME,qtypes=A} 1",
        ]
    );
    assert_eq!(
        of_records(&["dns:query;ignoreAAAA"], &records[..3]),
        [
            "dns_queries_total{rcode=,qtypes=A,ips_returned=0,query=www.example.} 1",
            "dns_responses_total{rcode=No Error,qtypes=A,ips_returned=2,query=www.example.} 1",
            "dns_response_types_total{type=A,qtypes=A,query=www.example.} 1",
            "dns_response_types_total{type=AAAA,qtypes=A,query=www.example.} 1",
            "dns_response_types_total{type=CNAME,qtypes=A,query=www.example.} 1",
        ]
    );
}

#[test]
fn http_is_counted_by_requests_and_responses_or_by_responses_alone() {
    let records = [
        record(false, request("GET")),
        record(false, request("PUT")),
        record(true, response(200)),
        record(true, response(503)),
    ];
    assert_eq!(
        of_records(&["http"], &records),
        [
            "http_requests_total{method=GET,protocol=HTTP/1.1,reporter=client} 1",
            "http_requests_total{method=PUT,protocol=HTTP/1.1,reporter=client} 1",
            "http_responses_total{method=GET,protocol=HTTP/1.1,status=200,reporter=client} 1",
            "http_responses_total{method=GET,protocol=HTTP/1.1,status=503,reporter=client} 1",
            "http_request_duration_seconds{method=GET,reporter=client} 2 0.060",
        ]
    );
    // The source of the metric is the client, though the response is counted.
    assert_eq!(
        of_records(
            &["httpV2:sourceContext=ip;labelsContext=destination_ip,traffic_direction"],
            &records
        ),
        [
            "http_requests_total{method=GET,protocol=HTTP/1.1,reporter=client,status=200,\
             destination_ip=2001:db8::1,traffic_direction=egress,source=10.0.0.1} 1",
            "http_requests_total{method=GET,protocol=HTTP/1.1,reporter=client,status=503,\
             destination_ip=2001:db8::1,traffic_direction=egress,source=10.0.0.1} 1",
            "http_request_duration_seconds{method=GET,reporter=client,\
             destination_ip=2001:db8::1,traffic_direction=egress,source=10.0.0.1} 2 0.060",
        ]
    );
}

#[test]
fn kafka_is_counted_by_topic_and_error() {
    let records = [
        record(false, kafka(0)),
        record(false, kafka(29)),
        record(true, kafka(0)),
    ];
    assert_eq!(
        of_records(&["kafka"], &records),
        [
            "kafka_requests_total{topic=orders,api_key=fetch,error_code=0,reporter=client} 1",
            "kafka_requests_total{topic=orders,api_key=fetch,error_code=29,reporter=client} 1",
            "kafka_request_duration_seconds{topic=orders,api_key=fetch,reporter=client} 1 0.030",
        ]
    );
}

#[test]
fn packets_are_counted_by_flag_port_and_icmp_type() {
    let with = |flags: u8, protocol| {
        let mut event = event(EventKind::Trace, Reason::Allowed, protocol);
        event.tcp_flags = flags;
        event
    };
    let mut reply = with(0x12, protocol::TCP);
    reply.flags |= event_flags::REPLY;
    let mut ping = with(0, protocol::ICMP);
    (ping.source_port, ping.destination_port) = (8, 0);
    let mut ping6 = with(0, protocol::ICMPV6);
    (ping6.source_port, ping6.destination_port) = (128, 0);
    (ping6.source, ping6.destination) = (address("2001:db8::1"), address("2001:db8::2"));
    ping6.flags |= event_flags::IPV6;
    let flows: Vec<Flow> = [
        with(0x02, protocol::TCP),
        with(0x11, protocol::TCP),
        with(0x14, protocol::TCP),
        with(0, protocol::UDP),
        with(0, protocol::SCTP),
        reply,
        ping,
        ping6,
        event(EventKind::Drop, Reason::PolicyDenied, protocol::TCP),
    ]
    .iter()
    .map(flow)
    .collect();
    assert_eq!(
        counted(&["tcp", "port-distribution", "icmp"], &flows),
        [
            "tcp_flags_total{flag=FIN,family=IPv4} 1",
            "tcp_flags_total{flag=RST,family=IPv4} 1",
            "tcp_flags_total{flag=SYN,family=IPv4} 1",
            "tcp_flags_total{flag=SYN-ACK,family=IPv4} 1",
            "port_distribution_total{protocol=ICMPv4,port=0} 1",
            "port_distribution_total{protocol=ICMPv6,port=0} 1",
            "port_distribution_total{protocol=SCTP,port=443} 1",
            "port_distribution_total{protocol=TCP,port=443} 3",
            "port_distribution_total{protocol=UDP,port=443} 1",
            "icmp_total{family=IPv4,type=EchoRequest} 1",
            "icmp_total{family=IPv6,type=EchoRequest} 1",
        ]
    );
}

#[test]
fn policy_verdicts_are_counted_by_direction_match_and_action() {
    let mut from_host = event(EventKind::PolicyVerdict, Reason::Allowed, protocol::TCP);
    from_host.source_identity = 1;
    let mut denied = record(false, request("GET"));
    (denied.verdict, denied.reason) = (Seen::Dropped, Reason::PolicyDenied);
    let flows = [
        flow(&event(EventKind::PolicyVerdict, Reason::Allowed, protocol::TCP)),
        flow(&event(
            EventKind::PolicyVerdict,
            Reason::PolicyDenied,
            protocol::TCP,
        )),
        flow(&event(EventKind::Drop, Reason::PolicyDenied, protocol::TCP)),
        flow(&from_host),
        Flow::from_record(&denied, &Names, Timestamp(0)),
        Flow::from_record(&record(false, query("a", 1)), &Names, Timestamp(0)),
    ];
    assert_eq!(
        counted(&["policy"], &flows),
        [
            "policy_verdicts_total{direction=egress,match=l3-l4,action=dropped} 1",
            "policy_verdicts_total{direction=egress,match=l3-l4,action=forwarded} 1",
            "policy_verdicts_total{direction=egress,match=l7/dns,action=forwarded} 1",
            "policy_verdicts_total{direction=egress,match=l7/http,action=dropped} 1",
        ]
    );
}

#[test]
fn flows_to_the_world_leave_out_replies_and_faults() {
    let mut inside = event(EventKind::Trace, Reason::Allowed, protocol::TCP);
    inside.destination_identity = 300;
    let mut reply = event(EventKind::Trace, Reason::Allowed, protocol::TCP);
    reply.flags |= event_flags::REPLY;
    let mut ack = event(EventKind::Trace, Reason::Allowed, protocol::TCP);
    ack.tcp_flags = 0x10;
    let flows = [
        flow(&event(EventKind::Trace, Reason::Allowed, protocol::TCP)),
        flow(&ack),
        flow(&event(EventKind::Drop, Reason::PolicyDenied, protocol::UDP)),
        flow(&event(EventKind::Drop, Reason::InvalidPacket, protocol::UDP)),
        flow(&inside),
        flow(&reply),
    ];
    assert_eq!(
        counted(&["flows-to-world:port"], &flows),
        [
            "flows_to_world_total{protocol=TCP,verdict=FORWARDED,port=443} 2",
            "flows_to_world_total{protocol=UDP,verdict=DROPPED,port=443} 1",
        ]
    );
    assert_eq!(
        counted(&["flows-to-world:any-drop"], &flows),
        [
            "flows_to_world_total{protocol=TCP,verdict=FORWARDED} 2",
            "flows_to_world_total{protocol=UDP,verdict=DROPPED} 2",
        ]
    );
    assert_eq!(
        counted(&["flows-to-world:syn-only"], &flows),
        ["flows_to_world_total{protocol=TCP,verdict=FORWARDED} 1"]
    );
    let mut by_version = event(EventKind::Trace, Reason::Allowed, protocol::TCP);
    by_version.destination_identity = 10;
    assert_eq!(
        counted(&["flows-to-world"], &[flow(&by_version)]),
        ["flows_to_world_total{protocol=TCP,verdict=FORWARDED} 1"]
    );
    assert!(hubble(&["flows-to-world"], 1).needs_names());
}

#[test]
fn contexts_show_the_ends_of_a_flow() {
    let flows = [flow(&event(EventKind::Drop, Reason::PolicyDenied, protocol::TCP))];
    for (context, wanted) in [
        ("identity", "k8s:app=web,k8s:env=prod"),
        ("namespace", "shop"),
        ("workload", "shop/web-5d4f8c7b9-x2x4z"),
        ("workload-name", "web-5d4f8c7b9-x2x4z"),
        ("pod", "shop/web-5d4f8c7b9-x2x4z"),
        ("pod-short", "shop/web"),
        ("pod-name", "web-5d4f8c7b9-x2x4z"),
        ("ip", "10.0.0.1"),
        ("app", "web"),
        ("dns|reserved-identity|IP", "10.0.0.1"),
        ("dns|namespace|ip", "shop"),
    ] {
        assert_eq!(
            counted(&[&format!("drop:sourceContext={context}")], &flows),
            [format!(
                "drop_total{{reason=POLICY_DENIED,protocol=TCP,source={wanted}}} 1"
            )],
            "{context}"
        );
    }
    for (context, wanted) in [
        ("reserved-identity", "reserved:world"),
        ("dns", "a.example,b.example"),
        ("pod|workload-name|app|namespace", ""),
    ] {
        assert_eq!(
            counted(&[&format!("drop:destinationContext={context}")], &flows),
            [format!(
                "drop_total{{reason=POLICY_DENIED,protocol=TCP,destination={wanted}}} 1"
            )],
            "{context}"
        );
    }
    // A context for one direction replaces the general one in this direction only.
    assert_eq!(
        counted(
            &[
                "drop:sourceContext=ip;sourceEgressContext=app;destinationContext=ip;destinationIngressContext=app"
            ],
            &flows
        ),
        ["drop_total{reason=POLICY_DENIED,protocol=TCP,source=web,destination=192.0.2.1} 1"]
    );
    assert_eq!(
        counted(
            &[
                "drop:labelsContext=traffic_direction,source_ip,source_pod,source_namespace,source_workload,source_workload_kind,source_app,destination_ip,destination_pod"
            ],
            &flows
        ),
        [
            "drop_total{reason=POLICY_DENIED,protocol=TCP,source_ip=10.0.0.1,source_pod=web-5d4f8c7b9-x2x4z,\
             source_namespace=shop,source_workload=web-5d4f8c7b9-x2x4z,source_workload_kind=Pod,source_app=web,destination_ip=192.0.2.1,destination_pod=,traffic_direction=egress} 1"
        ]
    );
}

#[test]
fn only_names_need_flow_records() {
    for (configured, needs_names) in [
        ("drop", false),
        (
            "http:sourceContext=ip;labelsContext=traffic_direction,destination_ip",
            false,
        ),
        ("http:sourceContext=ip|pod", true),
        ("http:labelsContext=source_pod", true),
        ("http:destinationEgressContext=dns", true),
    ] {
        assert_eq!(
            hubble(&[configured], 1).needs_names(),
            needs_names,
            "{configured}"
        );
    }
}

#[test]
fn values_that_a_peer_chooses_are_bounded_and_those_from_lists_remain() {
    let mut hubble = hubble(&["dns:query", "http", "port-distribution", "icmp"], 3);
    for n in 0..1_000_u16 {
        hubble.count(&Sample::of_record(&record(
            false,
            query(&format!("{n}.example"), n),
        )));
        hubble.count(&Sample::of_record(&record(false, request(&format!("M{n}")))));
        let mut packet = event(EventKind::Trace, Reason::Allowed, protocol::UDP);
        packet.destination_port = n;
        hubble.count(&Sample::of_flow(&flow(&packet)));
        let mut icmp = event(EventKind::Trace, Reason::Allowed, protocol::ICMP);
        (icmp.source_port, icmp.destination_port) = (n & 0xff, n >> 8);
        hubble.count(&Sample::of_flow(&flow(&icmp)));
    }
    let lines = series(&hubble);
    assert!(lines.len() < 20, "{lines:#?}");
    for wanted in [
        format!("dns_queries_total{{rcode=,qtypes={OVERFLOW},ips_returned=0,query={OVERFLOW}}} 997"),
        format!("http_requests_total{{method={OVERFLOW},protocol=HTTP/1.1,reporter=client}} 997"),
        format!("icmp_total{{family=IPv4,type={OVERFLOW}}} 997"),
    ] {
        assert!(lines.contains(&wanted), "{wanted} is not in {lines:#?}");
    }
    let overflows: Vec<_> = hubble.overflows().filter(|(_, count)| *count > 0).collect();
    assert_eq!(
        overflows.iter().map(|(name, _)| *name).collect::<Vec<_>>(),
        [
            "hubble_dns_queries_total",
            "hubble_http_requests_total",
            "hubble_port_distribution_total",
            "hubble_icmp_total"
        ]
    );
}

#[test]
fn lost_events_are_counted_by_source() {
    let family = Lost {
        perf_event_ring_buffer: 1,
        observer_events_queue: 2,
        hubble_ring_buffer: 3,
    }
    .family();
    let rows: Vec<_> = family
        .rows
        .iter()
        .map(|row| (row.labels.join(""), row.value.clone()))
        .collect();
    assert_eq!(
        rows,
        [
            ("hubble_ring_buffer".to_owned(), Value::Count(3)),
            ("observer_events_queue".to_owned(), Value::Count(2)),
            ("perf_event_ring_buffer".to_owned(), Value::Count(1)),
        ]
    );
}

/// Returns ends with these names (namespace, name, labels) and addresses.
fn ends(hubble: &Hubble, names: &[(&str, &str, &[&str])], addresses: &[&str]) -> Ends {
    let mut ends = hubble.ends();
    for (namespace, name, labels) in names {
        ends.add(&palisade_flowlog::flow::Endpoint {
            namespace: (*namespace).into(),
            pod_name: (*name).into(),
            workloads: palisade_flowlog::flow::Workload::of_endpoint(&(*name).into()),
            labels: labels.iter().map(|label| Arc::from(*label)).collect(),
            ..Default::default()
        });
    }
    for address in addresses {
        ends.add_address(address.parse().unwrap());
    }
    ends
}

const GRACE: Duration = Duration::from_secs(10);

/// Returns the time series that remain when the ends of [`event`] are removed, and how many have ended.
fn after_removal(configured: &str) -> (Vec<String>, u64) {
    let mut hubble = hubble(&[configured], 100);
    let web = event(EventKind::Drop, Reason::PolicyDenied, protocol::TCP);
    hubble.count(&Sample::of_flow(&flow(&web)));
    let web = [(
        "shop",
        "web-5d4f8c7b9-x2x4z",
        &["k8s:app=web", "k8s:env=prod"][..],
    )];
    let existing = ends(&hubble, &web, &["10.0.0.1"]);
    let mut none = ends(&hubble, &[], &[]);
    none.follow(existing.clone());
    let at = Duration::from_secs;
    hubble.end(&existing, at(5), GRACE);
    hubble.end(&existing, at(50), GRACE);
    // Removed, and the final value remains for the grace time, which begins again if the end exists again.
    hubble.end(&none, at(60), GRACE);
    hubble.end(&existing, at(69), GRACE);
    hubble.end(&none, at(70), GRACE);
    hubble.end(&none, at(79), GRACE);
    assert_eq!(series(&hubble).len(), 1);
    hubble.end(&none, at(80), GRACE);
    (series(&hubble), hubble.ended().map(|(_, ended)| ended).sum())
}

#[test]
fn series_end_after_their_endpoint_or_identity() {
    for context in [
        "sourceContext=pod",
        "sourceContext=pod-name",
        "sourceContext=pod-short",
        "sourceContext=workload",
        "sourceContext=workload-name",
        "sourceContext=namespace",
        "sourceContext=identity",
        "sourceContext=app",
        "sourceContext=ip",
        "sourceContext=reserved-identity|pod",
        "sourceContext=ip;destinationContext=dns",
        "destinationContext=reserved-identity;labelsContext=source_pod",
        "labelsContext=source_app,traffic_direction",
        "labelsContext=source_ip",
    ] {
        let ended = after_removal(&format!("drop:{context}"));
        assert_eq!(ended, (Vec::new(), 1), "{context}");
    }
}

#[test]
fn series_of_the_world_and_without_ends_remain() {
    for context in [
        "",
        "destinationContext=ip",
        "destinationContext=dns",
        "destinationContext=reserved-identity",
        "destinationContext=pod|ip",
        "destinationContext=identity",
        "labelsContext=destination_ip,destination_pod,destination_workload,source_workload_kind,traffic_direction",
    ] {
        let (remaining, ended) = after_removal(&format!("drop:{context}"));
        assert_eq!((remaining.len(), ended), (1, 0), "{context}");
    }
    assert!(!hubble(&["drop:destinationContext=dns|reserved-identity"], 1).shows_ends());
    assert!(hubble(&["drop", "flow:labelsContext=source_ip"], 1).shows_ends());
}

#[test]
fn ended_series_make_room_for_others_and_the_overflow_remains() {
    let mut hubble = hubble(&["drop:sourceContext=ip"], 2);
    let count = |hubble: &mut Hubble, from: u8| {
        let mut packet = event(EventKind::Drop, Reason::PolicyDenied, protocol::TCP);
        packet.source = address(&format!("10.0.0.{from}"));
        hubble.count(&Sample::of_flow(&flow(&packet)));
    };
    for from in 1..=4 {
        count(&mut hubble, from);
    }
    let existing = ends(&hubble, &[], &["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    let mut fewer = ends(&hubble, &[], &["10.0.0.2"]);
    fewer.follow(existing);
    hubble.end(&fewer, Duration::ZERO, GRACE);
    hubble.end(&fewer, GRACE, GRACE);
    count(&mut hubble, 3);
    let of =
        |from: &str, count| format!("drop_total{{reason=POLICY_DENIED,protocol=TCP,source={from}}} {count}");
    let wanted = [of("10.0.0.2", 1), of("10.0.0.3", 1), of(OVERFLOW, 2)];
    assert_eq!(series(&hubble), wanted);
}
