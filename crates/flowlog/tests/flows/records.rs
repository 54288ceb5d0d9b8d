//! Text and JSON of the records of inspectors.

use palisade_abi::{Addr, EventKind, Reason, event_flags, identity, protocol};
use palisade_flowlog::{
    FilterBuilder, Flow, Timestamp, TrafficDirection,
    format::{Format, Printer, ReservedAs, Response, json, monitor},
};
use palisade_inspect::record::{Record, Text, Verdict, What};
use serde_json::Value;

use crate::world::{ALLOW_DNS, OFFSET, WEB, World, address, denied, event, passing};

/// Query from client:60700 to web:53 for `ifconfig.me`, A.
fn query() -> Record {
    Record {
        endpoint: 11,
        ingress: false,
        reply: false,
        source: (address("10.0.1.10"), 60700),
        destination: (address("10.0.1.20"), 53),
        protocol: protocol::UDP,
        remote_identity: WEB,
        ifindex: 5,
        verdict: Verdict::Forwarded,
        reason: Reason::Allowed,
        rule: ALLOW_DNS,
        latency: None,
        what: What::DnsQuery {
            name: Text::from(&b"ifconfig.me"[..]),
            kind: 1,
        },
    }
}

/// Response to [`query`].
fn answer() -> Record {
    Record {
        ingress: true,
        reply: true,
        source: query().destination,
        destination: query().source,
        latency: Some(12),
        what: answer_with(0, &["34.117.118.44"], ""),
        ..query()
    }
}

fn answer_with(rcode: u16, some: &[&str], cname: &str) -> What {
    let mut addresses = [Addr::UNSPECIFIED; 8];
    for (place, text) in addresses.iter_mut().zip(some) {
        *place = address(text);
    }
    What::DnsAnswer {
        name: Text::from(&b"ifconfig.me"[..]),
        kind: 1,
        rcode,
        addresses,
        count: some.len() as u8,
        ttl: 30,
        cname: Text::from(cname.as_bytes()),
    }
}

fn refused() -> Record {
    Record {
        verdict: Verdict::Dropped,
        reason: Reason::AppDenied,
        rule: 0,
        what: What::DnsQuery {
            name: Text::from(&b"evil.example"[..]),
            kind: 28,
        },
        ..query()
    }
}

fn flow(record: &Record) -> Flow {
    Flow::from_record(record, &World, Timestamp(OFFSET))
}

fn compact(record: &Record) -> String {
    Printer::default().flow(&flow(record))
}

#[test]
fn lines_of_queries_and_responses() {
    const START: &str = "Apr 28 01:04:16.656: default/internal-client:60700 (ID:23217)";
    assert_eq!(
        compact(&query()),
        format!("{START} -> shop/web:53 (ID:17513) dns-request proxy FORWARDED (DNS Query ifconfig.me. A)\n")
    );
    assert_eq!(
        compact(&answer()),
        format!(
            "{START} <- shop/web:53 (ID:17513) dns-response proxy FORWARDED (DNS Answer \"34.117.118.44\" TTL: 30 (Proxy ifconfig.me. A))\n"
        )
    );
    assert_eq!(
        compact(&refused()),
        format!(
            "{START} -> shop/web:53 (ID:17513) dns-request proxy DROPPED (DNS Query evil.example. AAAA)\n"
        )
    );
    let audited = Record {
        verdict: Verdict::Audit,
        ..refused()
    };
    assert!(compact(&audited).contains("dns-request proxy AUDIT (DNS Query evil.example. AAAA)"));
}

#[test]
fn texts_of_responses() {
    let said = |what: What| flow(&Record { what, ..answer() }).summary;
    assert_eq!(
        said(answer_with(0, &["192.0.2.1", "2001:db8::1"], "edge.example")),
        r#"DNS Answer "192.0.2.1,2001:db8::1" TTL: 30 CNAMEs: "edge.example." (Proxy ifconfig.me. A)"#
    );
    assert_eq!(
        said(answer_with(3, &[], "")),
        "DNS Answer RCode: Non-Existent Domain (Proxy ifconfig.me. A)"
    );
    assert_eq!(said(answer_with(0, &[], "")), "DNS Answer (Proxy ifconfig.me. A)");
    assert_eq!(
        said(answer_with(4000, &[], "")),
        "DNS Answer RCode: 4000 (Proxy ifconfig.me. A)"
    );
    let odd = What::DnsQuery {
        name: Text::from(&b"."[..]),
        kind: 65280,
    };
    assert_eq!(said(odd), "DNS Query . TYPE65280");
}

#[test]
fn unparsable_messages_are_shown() {
    let broken = Record {
        verdict: Verdict::Dropped,
        reason: Reason::AppMalformed,
        what: What::Unreadable {
            detail: "several questions",
        },
        ..query()
    };
    assert!(
        compact(&broken).ends_with("l7-request DROPPED (Unreadable: several questions)\n"),
        "{}",
        compact(&broken)
    );
    let value: Value = serde_json::from_str(&json(&flow(&broken))).expect("JSON");
    assert_eq!(value["flow"]["l7"], serde_json::json!({"type": "REQUEST"}));
}

#[test]
fn json_has_the_names_of_the_flow_api() {
    let value: Value = serde_json::from_str(&json(&flow(&answer()))).expect("JSON");
    let flow_of_answer = &value["flow"];
    assert_eq!(flow_of_answer["Type"], "L7");
    assert_eq!(flow_of_answer["event_type"], serde_json::json!({"type": 129}));
    assert_eq!(
        flow_of_answer["l7"],
        serde_json::json!({
            "type": "RESPONSE",
            "latency_ns": "12000000",
            "dns": {
                "query": "ifconfig.me.",
                "ips": ["34.117.118.44"],
                "ttl": 30,
                "observation_source": "proxy",
                "qtypes": ["A"],
                "rrtypes": ["A"],
            },
        })
    );
    assert_eq!(
        flow_of_answer["l4"],
        serde_json::json!({"UDP": {"source_port": 53, "destination_port": 60700}})
    );
    assert_eq!(flow_of_answer["is_reply"], true);
    assert_eq!(flow_of_answer["egress_allowed_by"][0]["name"], "names");

    let value: Value = serde_json::from_str(&json(&flow(&refused()))).expect("JSON");
    let refused = &value["flow"];
    assert_eq!(refused["verdict"], "DROPPED");
    assert_eq!(refused["drop_reason"], Reason::AppDenied as u8);
    assert_eq!(refused["palisade"]["reason"], Reason::AppDenied.text());
    assert_eq!(
        refused["l7"]["dns"],
        serde_json::json!({"query": "evil.example.", "observation_source": "proxy", "qtypes": ["AAAA"]})
    );

    for record in [query(), answer()] {
        let flow = flow(&record);
        let response: Response<Flow> = serde_json::from_str(&json(&flow)).expect("JSON");
        assert_eq!(response.flow, flow);
    }
}

#[test]
fn the_direction_is_that_of_the_connection() {
    // The same messages, as the ingress policy of the DNS server records them.
    let at_server = |record: Record| Record {
        endpoint: 12,
        ingress: !record.ingress,
        remote_identity: 23217,
        ..record
    };
    for (record, direction) in [
        (query(), TrafficDirection::Egress),
        (answer(), TrafficDirection::Egress),
        (at_server(query()), TrafficDirection::Ingress),
        (at_server(answer()), TrafficDirection::Ingress),
    ] {
        let flow = flow(&record);
        assert_eq!(flow.traffic_direction, direction, "{record:?}");
        let ends = (flow.source.identity, flow.destination.identity);
        let expected = if record.reply { (WEB, 23217) } else { (23217, WEB) };
        assert_eq!(ends, expected, "{record:?}");
    }
}

#[test]
fn addresses_have_their_resolved_names() {
    let to_world = palisade_abi::Event {
        destination: address("34.117.118.44"),
        destination_identity: identity::WORLD,
        ..denied(EventKind::Drop)
    };
    let flow_out = Flow::from_event(&to_world, &World, OFFSET);
    let line = Printer::default().flow(&flow_out);
    assert!(
        line.contains("<> ifconfig.me,other.example:80 (world) Policy denied"),
        "{line}"
    );
    let numeric = Printer {
        numeric: true,
        ..Printer::default()
    };
    assert!(numeric.flow(&flow_out).contains("<> 34.117.118.44:80"));
    let value: Value = serde_json::from_str(&json(&flow_out)).expect("JSON");
    assert_eq!(
        value["flow"]["destination_names"],
        serde_json::json!(["ifconfig.me", "other.example"])
    );
    // Another endpoint has not resolved the name.
    let of_another = palisade_abi::Event {
        endpoint: 12,
        ..to_world
    };
    assert!(
        Flow::from_event(&of_another, &World, OFFSET)
            .destination_names
            .is_empty()
    );
}

#[test]
fn filters_distinguish_the_records() {
    // q: the query, a: its response, r: a refused query, v: a policy verdict, n: to a learned address, f: from it
    let named = palisade_abi::Event {
        destination: address("34.117.118.44"),
        ..denied(EventKind::Drop)
    };
    let from_named = palisade_abi::Event {
        source: named.destination,
        destination: named.source,
        source_identity: identity::WORLD,
        destination_identity: named.source_identity,
        flags: event_flags::FLOW_EGRESS | event_flags::REPLY_UNKNOWN,
        ..named
    };
    let flows = [
        ('q', flow(&query())),
        ('a', flow(&answer())),
        ('r', flow(&refused())),
        ('v', Flow::from_event(&event(), &World, OFFSET)),
        ('n', Flow::from_event(&named, &World, OFFSET)),
        ('f', Flow::from_event(&from_named, &World, OFFSET)),
    ];
    for (flags, expected) in [
        (&[("type", "l7")][..], "qar"),
        (&[("not", ""), ("type", "l7")], "vnf"),
        (&[("protocol", "dns")], "qar"),
        (&[("protocol", "udp")], "qar"),
        (&[("protocol", "tcp,dns")], "qarvnf"),
        (&[("protocol", "tcp")], "vnf"),
        (&[("verdict", "dropped"), ("type", "l7")], "r"),
        (&[("dns-query", "^EVIL\\.")], "r"),
        (&[("dns-query", "ifconfig.me.$")], "qa"),
        (&[("dns-query", "evil"), ("dns-query", "me\\.$")], "qar"),
        (&[("drop-reason-desc", "240")], "r"),
        (&[("fqdn", "ifconfig.me")], "nf"),
        (&[("to-fqdn", "*.Example.")], "n"),
        (&[("from-fqdn", "*.Example.")], "f"),
        (&[("from-fqdn", "*")], "f"),
        (&[("from-fqdn", "absent.example")], ""),
        (&[("not", ""), ("from-fqdn", "ifconfig.me")], "qarvn"),
        (&[("reply", "true"), ("protocol", "dns")], "a"),
        (&[("to-port", "53")], "qr"),
    ] {
        assert_eq!(passing(&flows, flags), expected, "{flags:?}");
    }
    let mut builder = FilterBuilder::new(Timestamp(OFFSET));
    for (flag, value) in [
        ("dns-query", "("),
        ("dns-query", "(a{1000}){1000}"),
        ("fqdn", "."),
    ] {
        assert!(builder.flag(flag, value).is_err(), "{flag} {value}");
    }
}

#[test]
fn monitor_and_dict() {
    assert_eq!(
        monitor(&flow(&refused()), ReservedAs::Names),
        "-> dns-request proxy from endpoint 11 to endpoint 12, identity 23217->17513, verdict dropped (Denied by application rules), 10.0.1.10:60700 -> 10.0.1.20:53 udp: DNS Query evil.example. AAAA\n"
    );
    let dict = Printer {
        format: Format::Dict,
        rules: true,
        ..Printer::default()
    };
    let text = dict.flow(&flow(&query()));
    for line in [
        "       TYPE: dns-request proxy\n",
        "    VERDICT: FORWARDED\n",
        "    SUMMARY: DNS Query ifconfig.me. A\n",
        "       RULE: [policy shop/names egress rule 1, names.yaml:9]\n",
    ] {
        assert!(text.contains(line), "{line}{text}");
    }
}
