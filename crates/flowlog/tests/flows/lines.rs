//! Exact output of all formats.

use crate::world::{CLIENT, DATABASE, UNENFORCED, WEB, address, denied, event, flow};
use palisade_abi::{Event, EventKind, MatchKind, Reason, TracePoint, event_flags, identity, protocol};
use palisade_flowlog::{
    Flow,
    format::{Format, Printer, ReservedAs, Response, json, monitor},
};

fn compact(event: &Event) -> String {
    Printer::default().flow(&flow(event))
}

#[test]
fn policy_verdicts_and_drops() {
    assert_eq!(
        compact(&denied(EventKind::PolicyVerdict)),
        "Apr 28 01:04:16.656: default/internal-client:54006 (ID:23217) <> 151.101.3.5:80 (world) policy-verdict:none EGRESS DENIED (TCP Flags: SYN)\n"
    );
    assert_eq!(
        compact(&denied(EventKind::Drop)),
        "Apr 28 01:04:16.656: default/internal-client:54006 (ID:23217) <> 151.101.3.5:80 (world) Policy denied DROPPED (TCP Flags: SYN)\n"
    );
    assert_eq!(
        compact(&event()),
        "Apr 28 01:04:16.656: default/internal-client:54006 (ID:23217) -> shop/web:80 (ID:17513) policy-verdict:L3-L4 INGRESS ALLOWED (TCP Flags: SYN)\n"
    );
    let audited = Event {
        flags: denied(EventKind::PolicyVerdict).flags | event_flags::AUDIT,
        reason: Reason::Audited as u8,
        destination: address("10.0.9.5"),
        destination_identity: DATABASE,
        ..denied(EventKind::PolicyVerdict)
    };
    assert_eq!(
        compact(&audited),
        "Apr 28 01:04:16.656: default/internal-client:54006 (ID:23217) -> db-1:80 (ID:16777219) policy-verdict:none EGRESS AUDITED (TCP Flags: SYN)\n"
    );
    let own_reason = Event {
        reason: Reason::NoHttpInspector as u8,
        ..denied(EventKind::Drop)
    };
    assert!(compact(&own_reason).ends_with("(world) No inspector: HTTP DROPPED (TCP Flags: SYN)\n"));
    let deny_rule = Event {
        reason: Reason::PolicyDeniedByDenylist as u8,
        match_kind: MatchKind::L3Only as u8,
        ..denied(EventKind::PolicyVerdict)
    };
    assert!(compact(&deny_rule).ends_with("policy-verdict:L3-Only EGRESS DENIED (TCP Flags: SYN)\n"));
}

#[test]
fn a_packet_with_a_foreign_source_shows_that_address_and_who_has_sent_it() {
    for (source, shown) in [
        ("10.9.9.9", "10.9.9.9:54006"),
        ("fd00:9::9", "[fd00:9::9]:54006"),
        // The address of another endpoint.
        ("10.0.1.20", "10.0.1.20:54006"),
    ] {
        let spoofed = flow(&Event {
            reason: Reason::InvalidSourceIp as u8,
            source: address(source),
            ..denied(EventKind::Drop)
        });
        let begin = format!("Apr 28 01:04:16.656: {shown} ");
        let line = Printer::default().flow(&spoofed);
        assert_eq!(
            line,
            format!(
                "{begin}sent by default/internal-client (ID:23217) <> 151.101.3.5:80 (world) Invalid source ip DROPPED (TCP \
                 Flags: SYN)\n"
            )
        );
        let numeric = Printer {
            numeric: true,
            ..Printer::default()
        };
        assert!(numeric.flow(&spoofed).starts_with(&format!("{begin}(ID:")));
    }
}

#[test]
fn traces_show_the_direction_of_the_connection() {
    let forward = Event {
        kind: EventKind::Trace as u8,
        trace_point: TracePoint::Start as u8,
        ..event()
    };
    assert_eq!(
        compact(&forward),
        "Apr 28 01:04:16.656: default/internal-client:54006 (ID:23217) -> shop/web:80 (ID:17513) to-endpoint FORWARDED (TCP Flags: SYN)\n"
    );
    // A reply of the server is shown with its ends swapped, so that a connection looks the same in both directions.
    let reply = Event {
        source: address("10.0.1.20"),
        destination: address("10.0.1.10"),
        source_port: 80,
        destination_port: 54006,
        source_identity: WEB,
        destination_identity: CLIENT,
        flags: event_flags::EGRESS | event_flags::REPLY,
        tcp_flags: 0x12,
        ..forward
    };
    assert_eq!(
        compact(&reply),
        "Apr 28 01:04:16.656: default/internal-client:54006 (ID:23217) <- shop/web:80 (ID:17513) to-stack FORWARDED (TCP Flags: SYN, ACK)\n"
    );
    let to_node = Event {
        destination: address("10.0.0.1"),
        destination_identity: identity::HOST,
        endpoint: 1,
        ..forward
    };
    assert!(compact(&to_node).ends_with("-> node1:80 (host) to-host FORWARDED (TCP Flags: SYN)\n"));
    let from_node = Event {
        source: address("10.0.0.1"),
        source_identity: identity::HOST,
        destination: address("192.0.2.1"),
        destination_identity: identity::WORLD_IPV4,
        endpoint: 1,
        flags: event_flags::EGRESS | event_flags::FLOW_EGRESS,
        ..forward
    };
    assert!(compact(&from_node).ends_with(
        "node1:54006 (host) -> 192.0.2.1:80 (world-ipv4) to-network FORWARDED (TCP Flags: SYN)\n"
    ));
}

#[test]
fn other_protocols() {
    let ping = Event {
        source: address("fd00::10"),
        destination: address("2001:db8::1"),
        destination_identity: identity::WORLD_IPV6,
        protocol: protocol::ICMPV6,
        source_port: 128,
        destination_port: 0,
        flags: denied(EventKind::Drop).flags | event_flags::IPV6,
        ..denied(EventKind::Drop)
    };
    assert!(compact(&ping).contains(
        ": default/internal-client (ID:23217) <> 2001:db8::1 (world-ipv6) Policy denied DROPPED (ICMPv6 EchoRequest)"
    ));
    let udp6 = Event {
        protocol: protocol::UDP,
        source_port: 53,
        destination_port: 5353,
        ..ping
    };
    assert!(compact(&udp6).contains("internal-client:53 (ID:23217) <> [2001:db8::1]:5353 (world-ipv6)"));
    let unreachable = Event {
        protocol: protocol::ICMP,
        source_port: 3,
        destination_port: 3,
        flags: event_flags::RELATED,
        kind: EventKind::Trace as u8,
        ..event()
    };
    assert!(compact(&unreachable).ends_with("(ICMPv4 DestinationUnreachable(Port))\n"));
    let gre = Event {
        protocol: 47,
        ..event()
    };
    assert!(compact(&gre).contains("shop/web (ID:17513) policy-verdict:L3-L4 INGRESS ALLOWED (GRE)"));
    let fragment = Event {
        protocol: protocol::UDP,
        flags: event_flags::FRAGMENT,
        ..event()
    };
    assert!(compact(&fragment).contains("shop/web (ID:17513)"));
    assert!(compact(&fragment).ends_with("(UDP fragment)\n"));
    let lldp = Event {
        kind: EventKind::Drop as u8,
        reason: Reason::UnsupportedL3 as u8,
        ether_type: 0x88cc,
        protocol: 0,
        source: palisade_abi::Addr::UNSPECIFIED,
        destination: palisade_abi::Addr::UNSPECIFIED,
        source_identity: 0,
        destination_identity: 0,
        endpoint: 0,
        rule: 0,
        flags: event_flags::REPLY_UNKNOWN,
        ..event()
    };
    assert_eq!(
        compact(&lldp),
        "Apr 28 01:04:16.656: 02:00:00:00:00:10 (unknown) <> 02:00:00:00:00:20 (unknown) Unsupported L3 protocol DROPPED (LLDP)\n"
    );
}

#[test]
fn the_rule_is_written_on_request() {
    let with_rules = Printer {
        rules: true,
        ..Printer::default()
    };
    assert!(
        with_rules
            .flow(&flow(&event()))
            .ends_with("(TCP Flags: SYN) [policy shop/allow-web ingress rule 1, shop.yaml:12]\n")
    );
    assert!(with_rules.flow(&flow(&denied(EventKind::Drop))).ends_with(
        "(TCP Flags: SYN) [default deny of egress by policy shop/allow-web and 1 other, shop.yaml:1]\n"
    ));
    let unenforced = Event {
        rule: UNENFORCED,
        ..event()
    };
    assert!(
        with_rules
            .flow(&flow(&unenforced))
            .ends_with("(TCP Flags: SYN) [no policy enforces ingress]\n")
    );
    let forgotten = Event {
        rule: 4711,
        ..event()
    };
    assert!(
        with_rules
            .flow(&flow(&forgotten))
            .ends_with("(TCP Flags: SYN) [rule 4711]\n")
    );
    let no_rule = Event { rule: 0, ..event() };
    assert!(with_rules.flow(&flow(&no_rule)).ends_with("(TCP Flags: SYN)\n"));
}

#[test]
fn node_numbers_and_colours() {
    let printer = Printer {
        node: true,
        numeric: true,
        ..Printer::default()
    };
    assert!(
        printer.flow(&flow(&event())).starts_with(
            "Apr 28 01:04:16.656 [node1]: 10.0.1.10:54006 (ID:23217) -> 10.0.1.20:80 (ID:17513)"
        )
    );
    let coloured = Printer {
        colour: true,
        ..Printer::default()
    }
    .flow(&flow(&denied(EventKind::Drop)));
    assert!(coloured.contains("\x1b[31mDROPPED\x1b[0m"), "{coloured}");
    assert!(!compact(&denied(EventKind::Drop)).contains('\x1b'));
}

#[test]
fn dict() {
    let printer = Printer {
        format: Format::Dict,
        rules: true,
        ..Printer::default()
    };
    assert_eq!(
        printer.flow(&flow(&denied(EventKind::Drop))),
        "  TIMESTAMP: Apr 28 01:04:16.656
     SOURCE: default/internal-client:54006
DESTINATION: 151.101.3.5:80
       TYPE: Policy denied
    VERDICT: DROPPED
    SUMMARY: TCP Flags: SYN
       RULE: [default deny of egress by policy shop/allow-web and 1 other, shop.yaml:1]
"
    );
}

#[test]
fn json_of_a_verdict() {
    assert_eq!(
        json(&flow(&event())),
        concat!(
            r#"{"flow":{"time":"2026-04-28T01:04:16.656Z","verdict":"FORWARDED","#,
            r#""ethernet":{"source":"02:00:00:00:00:10","destination":"02:00:00:00:00:20"},"#,
            r#""IP":{"source":"10.0.1.10","destination":"10.0.1.20","ipVersion":"IPv4"},"#,
            r#""l4":{"TCP":{"source_port":54006,"destination_port":80,"flags":{"SYN":true}}},"#,
            r#""source":{"ID":11,"identity":23217,"namespace":"default","labels":["k8s:app=client","k8s:io.kubernetes.pod.namespace=default","k8s:tier=front"],"pod_name":"internal-client","workloads":[{"name":"internal-client","kind":"Pod"}]},"#,
            r#""destination":{"ID":12,"identity":17513,"namespace":"shop","labels":["k8s:app=web","k8s:io.kubernetes.pod.namespace=shop"],"pod_name":"web","workloads":[{"name":"web","kind":"Pod"}]},"#,
            r#""Type":"L3_L4","node_name":"node1","node_labels":["zone=a","worker="],"event_type":{"type":5},"traffic_direction":"INGRESS","policy_match_type":2,"#,
            r#""is_reply":false,"interface":{"index":5,"name":"veth-client"},"#,
            r#""ingress_allowed_by":[{"name":"allow-web","namespace":"shop","revision":"3","kind":"CiliumNetworkPolicy"}],"#,
            r#""palisade":{"reason":"Allowed","rule":{"id":7,"text":"policy shop/allow-web ingress rule 1","location":"shop.yaml:12","policies":["shop/allow-web"]},"protocol":6,"length":60},"#,
            r#""Summary":"TCP Flags: SYN"},"node_name":"node1","time":"2026-04-28T01:04:16.656Z"}"#,
            "\n"
        )
    );
}

#[test]
fn json_of_drops_and_traces() {
    let drop: serde_json::Value = serde_json::from_str(&json(&flow(&denied(EventKind::Drop)))).expect("JSON");
    let flow_of = |value: &serde_json::Value, key: &str| value["flow"][key].clone();
    assert_eq!(flow_of(&drop, "verdict"), "DROPPED");
    assert_eq!(flow_of(&drop, "drop_reason"), 133);
    assert_eq!(flow_of(&drop, "drop_reason_desc"), "POLICY_DENIED");
    assert_eq!(
        flow_of(&drop, "event_type"),
        serde_json::json!({"type": 1, "sub_type": 133})
    );
    assert_eq!(flow_of(&drop, "egress_denied_by")[0]["name"], "allow-web");
    assert_eq!(flow_of(&drop, "egress_denied_by")[1]["name"], "isolate");
    assert_eq!(flow_of(&drop, "palisade")["rule"]["default_deny"], true);
    assert_eq!(flow_of(&drop, "is_reply"), serde_json::Value::Null);

    // A reason without a name in the flow API has a name of Palisade's own.
    let own = Event {
        reason: Reason::NoTlsInspector as u8,
        ..denied(EventKind::Drop)
    };
    let own: serde_json::Value = serde_json::from_str(&json(&flow(&own))).expect("JSON");
    assert_eq!(flow_of(&own, "drop_reason_desc"), "NO_TLS_INSPECTOR");
    assert_eq!(flow_of(&own, "drop_reason"), 214);
    assert_eq!(flow_of(&own, "palisade")["reason"], "No inspector: TLS");

    let trace = Event {
        kind: EventKind::Trace as u8,
        trace_point: TracePoint::End as u8,
        forward_packets: 4,
        forward_bytes: 400,
        reply_packets: 3,
        reply_bytes: u64::MAX,
        ..event()
    };
    let trace: serde_json::Value = serde_json::from_str(&json(&flow(&trace))).expect("JSON");
    assert_eq!(flow_of(&trace, "trace_observation_point"), "TO_ENDPOINT");
    assert_eq!(flow_of(&trace, "event_type"), serde_json::json!({"type": 4}));
    assert_eq!(flow_of(&trace, "palisade")["progress"]["at"], "end");
    assert_eq!(flow_of(&trace, "palisade")["progress"]["reply_bytes"], u64::MAX);
}

#[test]
fn json_round_trip() {
    for event in [event(), denied(EventKind::PolicyVerdict), denied(EventKind::Drop)] {
        let flow = flow(&event);
        let response: Response<Flow> = serde_json::from_str(&json(&flow)).expect("JSON");
        assert_eq!(response.flow, flow);
        assert_eq!(response.time, flow.time);
    }
    let foreign = r#"{"flow":{"verdict":"FORWARDED","uuid":"x","l4":{"TCP":{"flags":{"NS":true}}}},"time":"2026-04-28T01:04:16Z"}"#;
    assert!(
        serde_json::from_str::<Response<Flow>>(foreign).is_ok(),
        "members that are not known are passed over"
    );
}

#[test]
fn monitor_lines() {
    let audited = Event {
        source: address("192.0.2.7"),
        source_identity: identity::WORLD,
        flags: event_flags::AUDIT,
        reason: Reason::Audited as u8,
        match_kind: MatchKind::None as u8,
        ..event()
    };
    assert_eq!(
        monitor(&flow(&audited), ReservedAs::Names),
        "Policy verdict log: flow 0xb5ebcf85 local EP ID 12, remote ID 2, proto 6, ingress, action audit, auth: disabled, match none, 192.0.2.7:54006 -> 10.0.1.20:80 tcp SYN\n"
    );
    assert_eq!(
        monitor(&flow(&denied(EventKind::PolicyVerdict)), ReservedAs::Names),
        "Policy verdict log: flow 0x7bdf660 local EP ID 11, remote ID 2, proto 6, egress, action deny, auth: disabled, match none, 10.0.1.10:54006 -> 151.101.3.5:80 tcp SYN\n"
    );
    assert_eq!(
        monitor(&flow(&denied(EventKind::Drop)), ReservedAs::Names),
        "xx drop (Policy denied) flow 0x7bdf660 to endpoint 0, ifindex 5, identity 23217->world: 10.0.1.10:54006 -> 151.101.3.5:80 tcp SYN\n"
    );
    // A denied answer: the local end is still the web server.
    let answer = Event {
        source: event().destination,
        destination: event().source,
        source_identity: event().destination_identity,
        destination_identity: event().source_identity,
        flags: event_flags::EGRESS | event_flags::REPLY,
        reason: Reason::PolicyDenied as u8,
        ..event()
    };
    assert!(flow(&answer).is_reply.is_none() && flow(&answer).palisade.reply);
    assert!(monitor(&flow(&answer), ReservedAs::Names).contains("local EP ID 12, remote ID 23217"));
    let trace = Event {
        kind: EventKind::Trace as u8,
        trace_point: TracePoint::Start as u8,
        ..event()
    };
    assert_eq!(
        monitor(&flow(&trace), ReservedAs::Names),
        "-> endpoint 12 flow 0xd70f4af3, identity 23217->17513 state new ifindex veth-client: 10.0.1.10:54006 -> 10.0.1.20:80 tcp SYN\n"
    );
}

#[test]
fn an_event_with_unknown_values_is_shown() {
    let unknown = (1..=u8::MAX)
        .find(|number| Reason::from_u8(*number).is_none())
        .expect("a number that is no reason");
    let odd = Event {
        kind: 99,
        reason: unknown,
        flags: 0xff,
        trace_point: 77,
        match_kind: 200,
        endpoint: 999,
        rule: 4_000_000,
        time: u64::MAX,
        ..event()
    };
    assert!(!compact(&odd).is_empty());
    assert!(!monitor(&flow(&odd), ReservedAs::Names).is_empty());
    let of_flow = flow(&odd);
    assert_eq!(of_flow.palisade.reason, unknown.to_string());
}
