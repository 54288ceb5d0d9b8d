//! Filters: for each flag a flow that passes and one that does not, and the combination of flags.

use std::sync::Arc;

use crate::world::{DATABASE, OFFSET, address, denied, event, flow};
use palisade_abi::{Event, EventKind, Reason, TracePoint, event_flags, identity, protocol};
use palisade_flowlog::{
    FilterBuilder, FilterError, Filters, Flow, Timestamp,
    filter::{FLAGS, LabelSelector},
};
use proptest::prelude::*;

fn filters(flags: &[(&str, &str)]) -> Result<Filters, FilterError> {
    let mut builder = FilterBuilder::new(Timestamp(OFFSET));
    for (flag, value) in flags {
        builder.flag(flag, value)?;
    }
    builder.finish()
}

fn passes(flow: &Flow, flags: &[(&str, &str)]) -> bool {
    filters(flags)
        .unwrap_or_else(|e| panic!("{flags:?}: {e}"))
        .matches(flow)
}

/// Returns the letters of the flows of [`samples`] that pass, in their order.
fn passing(flags: &[(&str, &str)]) -> String {
    samples()
        .iter()
        .filter(|(_, flow)| passes(flow, flags))
        .map(|(name, _)| *name)
        .collect()
}

/// v: client -> web:80 verdict, allowed. t: the same, a trace of the answer. d: client -> world:80, a drop. n: client ->
/// world verdict, denied. u: client -> db-1:53/UDP audited. 6: ping over IPv6 to the node, dropped for its reason 212. l:
/// an LLDP frame.
fn samples() -> Vec<(char, Flow)> {
    let trace = Event {
        kind: EventKind::Trace as u8,
        trace_point: TracePoint::Start as u8,
        flags: event_flags::EGRESS | event_flags::REPLY,
        source: event().destination,
        destination: event().source,
        source_port: 80,
        destination_port: 54006,
        source_identity: event().destination_identity,
        destination_identity: event().source_identity,
        tcp_flags: 0x12,
        ..event()
    };
    let audited = Event {
        destination: address("10.0.9.5"),
        destination_identity: DATABASE,
        destination_port: 53,
        protocol: protocol::UDP,
        flags: denied(EventKind::PolicyVerdict).flags | event_flags::AUDIT,
        reason: Reason::Audited as u8,
        time: 1_000_000_000,
        ifindex: 6,
        ..denied(EventKind::PolicyVerdict)
    };
    let ping = Event {
        source: address("fd00::10"),
        destination: address("fd00::1"),
        destination_identity: identity::HOST,
        endpoint: 1,
        protocol: protocol::ICMPV6,
        source_port: 128,
        destination_port: 0,
        flags: event_flags::IPV6 | event_flags::REPLY_UNKNOWN,
        reason: Reason::NoHttpInspector as u8,
        kind: EventKind::Drop as u8,
        ..event()
    };
    let lldp = Event {
        kind: EventKind::Drop as u8,
        reason: Reason::UnsupportedL3 as u8,
        flags: event_flags::REPLY_UNKNOWN,
        ether_type: 0x88cc,
        protocol: 0,
        endpoint: 0,
        source_identity: 0,
        destination_identity: 0,
        ..event()
    };
    vec![
        ('v', flow(&event())),
        ('t', flow(&trace)),
        ('d', flow(&denied(EventKind::Drop))),
        ('n', flow(&denied(EventKind::PolicyVerdict))),
        ('u', flow(&audited)),
        ('6', flow(&ping)),
        ('l', flow(&lldp)),
    ]
}

#[test]
fn every_flag_matches_its_flows() {
    for (flag, value, expected) in [
        ("ip", "10.0.1.20", "vt"),
        ("ip", "10.0.0.0/8", "vtdnu"),
        ("ip", "fd00::/64", "6"),
        ("from-ip", "10.0.1.20", "t"),
        ("to-ip", "10.0.1.20", "v"),
        ("to-ip", "10.0.9.5,151.101.3.5", "dnu"),
        ("label", "app=web", "vt"),
        ("from-label", "app=web", "t"),
        ("to-label", "k8s:app in (web, database)", "vu"),
        ("to-label", "any:app", "vtu"),
        ("to-label", "reserved:host", "6"),
        ("to-label", "cidr:10.0.9.0/24", "u"),
        ("to-label", "!app,reserved:world", "dn"),
        ("from-label", "app=client,tier!=front", ""),
        ("identity", "world", "dn"),
        ("identity", "16777219", "u"),
        ("from-identity", "17513", "t"),
        ("to-identity", "reserved:host,17513", "v6"),
        ("endpoint", "shop/web", "vt"),
        ("endpoint", "internal", "vtdnu6"),
        ("endpoint", "12", "vt"),
        ("to-endpoint", "db-", "u"),
        ("pod", "shop/", "vt"),
        ("from-pod", "shop/internal", ""),
        ("to-pod", "default/internal-client", "t"),
        ("namespace", "shop", "vt"),
        ("from-namespace", "default", "vdnu6"),
        ("to-namespace", "default", "t"),
        ("port", "80", "vtdn"),
        ("from-port", "80", "t"),
        ("to-port", "53", "u"),
        ("to-port", "50-60,80", "vdnu"),
        ("protocol", "tcp", "vtdn"),
        ("protocol", "UDP", "u"),
        ("protocol", "icmp", "6"),
        ("protocol", "icmpv4", ""),
        ("protocol", "58,17", "u6"),
        ("verdict", "forwarded", "vt"),
        ("verdict", "DROPPED", "dn6l"),
        ("verdict", "audit", "u"),
        ("drop-reason-desc", "POLICY_DENIED", "dn"),
        ("drop-reason-desc", "212", "6"),
        ("drop-reason-desc", "unsupported l3 protocol", "l"),
        ("type", "drop", "d6l"),
        ("type", "drop:133", "d"),
        ("type", "drop:POLICY_DENIED,trace", "td"),
        ("type", "policy-verdict", "vnu"),
        ("type", "trace:to-stack", "t"),
        ("type", "trace:to-endpoint", ""),
        ("type", "l7", ""),
        ("traffic-direction", "egress", "dnu"),
        ("reply", "true", "t"),
        ("reply", "false", "v"),
        ("ip-version", "6", "6"),
        ("ip-version", "ipv4", "vtdnu"),
        ("tcp-flags", "SYN", "vtdn"),
        ("tcp-flags", "syn,ack", "t"),
        ("interface", "veth-client", "vtdn6l"),
        ("interface", "6", "u"),
        ("node-name", "node1", "vtdnu6l"),
        ("node-name", "n*e*", "vtdnu6l"),
        ("node-name", "*2", ""),
        ("since", "2026-04-28T01:04:17Z", "u"),
        ("until", "2026-04-28T01:04:16.656Z", "vtdn6l"),
        ("since", "1s", "vtdnu6l"),
        ("until", "1m30s", ""),
    ] {
        assert_eq!(passing(&[(flag, value)]), expected, "--{flag} {value}");
        if flag != "since" && flag != "until" {
            let others: String = samples()
                .iter()
                .map(|(n, _)| *n)
                .filter(|n| !expected.contains(*n))
                .collect();
            assert_eq!(
                passing(&[("not", ""), (flag, value)]),
                others,
                "--not --{flag} {value}"
            );
        }
    }
}

#[test]
fn every_flag_is_listed() {
    for flag in FLAGS {
        let mut builder = FilterBuilder::new(Timestamp(0));
        assert!(
            !matches!(builder.flag(flag.name, "!"), Err(FilterError::Unknown(_))),
            "{}",
            flag.name
        );
    }
    assert_eq!(
        filters(&[("colour", "red")]),
        Err(FilterError::Unknown("colour".into()))
    );
    assert_eq!(
        filters(&[("from-verdict", "audit")]),
        Err(FilterError::Unknown("from-verdict".into()))
    );
}

#[test]
fn flags_combine_by_or_and_and_not() {
    assert_eq!(passing(&[]), "vtdnu6l");
    // The same flag twice means or, different flags mean and.
    assert_eq!(passing(&[("verdict", "audit"), ("verdict", "forwarded")]), "vtu");
    assert_eq!(passing(&[("verdict", "forwarded"), ("type", "trace")]), "t");
    assert_eq!(passing(&[("label", "app=web"), ("label", "app=database")]), "vtu");
    // Flags without a side are independent: the address of the client with the port of the server.
    assert_eq!(passing(&[("ip", "10.0.1.10"), ("port", "80")]), "vtdn");
    assert_eq!(passing(&[("ip", "10.0.1.10"), ("from-port", "80")]), "t");
    assert_eq!(passing(&[("ip", "10.0.1.20"), ("from-ip", "10.0.1.10")]), "v");
    assert_eq!(passing(&[("from-ip", "10.0.1.10"), ("to-ip", "10.0.1.20")]), "v");
    // --not reverses only the next flag; each of several removes flows.
    assert_eq!(
        passing(&[("not", ""), ("type", "drop"), ("from-ip", "10.0.1.10")]),
        "vnu"
    );
    assert_eq!(
        passing(&[("not", ""), ("type", "drop"), ("not", ""), ("verdict", "audit")]),
        "vtn"
    );
    assert_eq!(
        passing(&[("verdict", "dropped"), ("not", ""), ("type", "drop")]),
        "n"
    );
}

#[test]
fn errors_name_a_valid_value() {
    for (flag, value, hint) in [
        ("ip", "10.0.0.0/33", "10.0.0.0/8"),
        ("ip", "localhost", "not an address"),
        ("label", "app in a", "key in (a,b)"),
        ("label", "app in (a", ") is missing"),
        ("label", "=x", "key=value"),
        ("label", "", "key=value"),
        ("identity", "wrold", "world"),
        ("port", "http", "0 to 65535"),
        ("port", "65536", "0 to 65535"),
        ("port", "90-80", "80-90"),
        ("port", "80,", "missing"),
        ("protocol", "memcached", "tcp, udp"),
        ("verdict", "denied", "DROPPED"),
        ("drop-reason-desc", "policy", "POLICY_DENIED"),
        ("type", "verdict", "policy-verdict"),
        ("type", "trace:endpoint", "to-endpoint"),
        ("type", "policy-verdict:x", "no sub-types"),
        ("traffic-direction", "in", "ingress"),
        ("reply", "yes", "true"),
        ("ip-version", "5", "4 nor 6"),
        ("tcp-flags", "SYNACK", "SYN"),
        ("since", "yesterday", "5m"),
        ("since", "5", "5m"),
    ] {
        let error = filters(&[(flag, value)]).expect_err(value).to_string();
        assert!(
            error.starts_with(&format!("--{flag} {value}: ")) && error.contains(hint),
            "{error}"
        );
    }
    assert_eq!(
        filters(&[("verdict", "audit"), ("not", "")]),
        Err(FilterError::DanglingNot)
    );
    assert_eq!(
        filters(&[("not", ""), ("not", ""), ("ip", "::1")]),
        Err(FilterError::DanglingNot)
    );
    assert!(matches!(
        filters(&[("not", ""), ("since", "5m")]),
        Err(FilterError::NotReversible(_))
    ));
}

#[test]
fn relative_times_are_before_now() {
    let second = 1_000_000_000;
    for (text, seconds) in [
        ("30s", 30),
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("2d", 172_800),
        ("2000ms", 2),
    ] {
        let since = filters(&[("since", text)]).expect(text).since;
        assert_eq!(since, Some(Timestamp(OFFSET - seconds * second)), "{text}");
    }
}

#[test]
fn filters_survive_json() {
    let sent = filters(&[
        ("ip", "10.0.0.0/8"),
        ("label", "k8s:app in (a,b),!x"),
        ("endpoint", "shop/web"),
        ("type", "drop:133"),
        ("tcp-flags", "SYN"),
        ("not", ""),
        ("verdict", "audit"),
        ("since", "5m"),
    ])
    .expect("filters");
    let text = serde_json::to_string(&sent).expect("JSON");
    assert_eq!(serde_json::from_str::<Filters>(&text).expect("filters"), sent);
}

#[test]
fn selectors_match_labels() {
    let labels: Vec<Arc<str>> = ["k8s:app=web", "k8s:env=", "cidr:10.0.0.0/8", "reserved:host"]
        .into_iter()
        .map(Arc::from)
        .collect();
    for (selector, holds) in [
        ("app", true),
        ("app=web", true),
        ("app==web", true),
        ("app = web", true),
        ("k8s:app=web", true),
        ("other:app=web", false),
        ("app!=web", false),
        ("app!=x", true),
        ("missing!=x", true),
        ("missing", false),
        ("!missing", true),
        ("!app", false),
        ("env=", true),
        ("app in (a,web)", true),
        ("app in (a,b)", false),
        ("app notin (a,b)", true),
        ("missing notin (a)", true),
        ("app=web,env", true),
        ("app=web,missing", false),
        ("app in (a,web),!missing,host", true),
        ("cidr:10.0.0.0/8", true),
    ] {
        assert_eq!(
            LabelSelector::parse(selector).expect(selector).matches(&labels),
            holds,
            "{selector}"
        );
    }
}

proptest! {
    /// Any text from a user or client gives a value or an error, never a panic.
    #[test]
    fn every_value_parses_or_is_an_error(flag in 0..FLAGS.len(), value in "\\PC{0,24}") {
        let mut builder = FilterBuilder::new(Timestamp(0));
        let _ = builder.flag(FLAGS[flag].name, &value);
    }

    #[test]
    fn every_selector_parses_or_is_an_error(text in "[a-z:=!,() ]{0,24}") {
        if let Ok(selector) = LabelSelector::parse(&text) {
            let _ = selector.matches(&["k8s:a=b", "c"]);
        }
    }
}
