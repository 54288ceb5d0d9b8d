//! Filters: for each flag a flow that passes and one that does not, and the combination of flags.

use std::sync::Arc;

use crate::world::{DATABASE, OFFSET, address, denied, event, flow};
use palisade_abi::{Event, EventKind, Reason, TracePoint, event_flags, identity, protocol};
use palisade_flowlog::{
    FilterBuilder, FilterError, Filters, Flow, FlowFilter, Timestamp,
    filter::{ApiFilter, ApiFilters, FLAGS, LabelSelector},
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
        ("type", "5", "vnu"),
        ("type", "1:133", "d"),
        ("type", "capture", ""),
        ("type", "trace:to-stack", "t"),
        ("type", "trace:to-endpoint", ""),
        ("type", "l7", ""),
        ("traffic-direction", "egress", "dnu"),
        ("reply", "true", "t"),
        // The direction of dropped packets is unknown; allowed and audited ones are the first of their flow.
        ("reply", "false", "vu"),
        ("ip-version", "6", "6"),
        ("ip-version", "ipv4", "vtdnu"),
        ("ip-version", "none", "l"),
        ("ipv4", "", "vtdnu"),
        ("ipv6", "", "6"),
        ("all-namespaces", "", "vtdnu6"),
        ("to-all-namespaces", "", "vtu6"),
        ("pod", "internal", "vtdnu6"),
        ("pod", "web", ""),
        ("pod", "/web", "vt"),
        ("workload", "web", "vt"),
        ("from-workload", "Pod/internal-client", "vdnu6"),
        ("to-workload", "Deployment/web", ""),
        ("to-workload", "Pod/", "vtu"),
        ("node-label", "zone=a,worker", "vtdnu6l"),
        ("node-label", "zone=b", ""),
        ("trace-id", "0af7651916cd43dd8448eb211c80319c", ""),
        ("uuid", "ffffffff-ffff-8fff-bc00-000000000001", ""),
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
    // Flags without a side must match at the same end, as with Hubble.
    assert_eq!(passing(&[("ip", "10.0.1.10"), ("port", "80")]), "");
    assert_eq!(passing(&[("ip", "10.0.1.10"), ("port", "54006")]), "vtdnu");
    assert_eq!(passing(&[("ip", "10.0.1.10"), ("from-port", "80")]), "t");
    assert_eq!(passing(&[("pod", "shop/web"), ("ip", "10.0.1.20")]), "vt");
    assert_eq!(passing(&[("from-ip", "10.0.1.10"), ("to-ip", "10.0.1.20")]), "v");
    // --not reverses only the next flag; several remove the flows that match all of them, as with Hubble.
    assert_eq!(
        passing(&[("not", ""), ("type", "drop"), ("from-ip", "10.0.1.10")]),
        "vnu"
    );
    assert_eq!(
        passing(&[("not", ""), ("type", "drop"), ("not", ""), ("ip-version", "6")]),
        "vtdnul"
    );
    assert_eq!(
        passing(&[("not", ""), ("type", "drop"), ("not", ""), ("type", "trace")]),
        "vnu"
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
        ("service", "shop/web", "no Kubernetes services"),
        ("to-service", "shop/web", "no Kubernetes services"),
        ("cluster", "prod", "no cluster"),
        ("node-name", "prod/node1", "no cluster"),
        ("snat-ip", "192.0.2.1", "does not translate"),
        ("ip-trace-id", "7", "IP options"),
        ("cel-expression", "true", "CEL"),
        ("tcp-flags", "NS", "NS flag"),
        ("uuid", "7", "-o json"),
        ("allowlist", "{\"source_pd\":[]}", "unknown field `source_pd`"),
        ("allowlist", "{\"source_service\":[\"x\"]}", "source_service"),
        ("denylist", "{\"verdict\":[\"NO\"]}", "DROPPED"),
        ("denylist", "", "a filter is missing"),
        ("traffic-direction", "in", "ingress"),
        ("reply", "yes", "true"),
        ("ip-version", "5", "neither 4 nor 6"),
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

fn api(flags: &[(&str, &str)]) -> ApiFilters {
    let mut builder = FilterBuilder::new(Timestamp(OFFSET));
    for (flag, value) in flags {
        builder.flag(flag, value).expect(flag);
    }
    builder.finish_api().expect("filters")
}

#[test]
fn flags_become_filters_of_the_flow_api() {
    for (flags, expected) in [
        (
            &[("ip", "10.0.0.0/8"), ("verdict", "dropped")][..],
            r#"{"allowlist":[{"source_ip":["10.0.0.0/8"],"verdict":["DROPPED"]},{"destination_ip":["10.0.0.0/8"],"verdict":["DROPPED"]}]}"#,
        ),
        (
            &[("type", "drop:133"), ("tcp-flags", "syn"), ("ipv4", "")],
            r#"{"allowlist":[{"event_type":[{"type":1,"match_sub_type":true,"sub_type":133}],"tcp_flags":[{"SYN":true}],"ip_version":["IPv4"]}]}"#,
        ),
        (
            &[("namespace", "shop,other"), ("pod", "web"), ("pod", "other/db")],
            r#"{"allowlist":[{"source_pod":["shop/web","other/web","other/db"]},{"destination_pod":["shop/web","other/web","other/db"]}]}"#,
        ),
        (
            &[("from-namespace", "shop,home"), ("to-pod", "web")],
            r#"{"allowlist":[{"source_pod":["shop/","home/"],"destination_pod":["web"]}]}"#,
        ),
        (
            &[
                ("not", ""),
                ("identity", "world"),
                ("not", ""),
                ("to-endpoint", "12"),
            ],
            r#"{"denylist":[{"source_identity":[2],"palisade":{"destination_endpoint":["12"]}},{"destination_identity":[2],"palisade":{"destination_endpoint":["12"]}}]}"#,
        ),
        (
            &[
                ("drop-reason-desc", "no verdict in time"),
                ("interface", "eth0,7"),
                ("workload", "Pod/web"),
            ],
            r#"{"allowlist":[{"source_workload":[{"name":"web","kind":"Pod"}],"drop_reason_desc":["NO_VERDICT_IN_TIME"],"interface":[{"name":"eth0"},{"index":7}]},{"destination_workload":[{"name":"web","kind":"Pod"}],"drop_reason_desc":["NO_VERDICT_IN_TIME"],"interface":[{"name":"eth0"},{"index":7}]}]}"#,
        ),
        (
            &[
                ("allowlist", r#"{"verdict":[2]} {"reply":[true]}"#),
                ("denylist", r#"{"node_name":["n*"]}"#),
            ],
            r#"{"allowlist":[{"verdict":["2"]},{"reply":[true]}],"denylist":[{"node_name":["n*"]}]}"#,
        ),
    ] {
        let filters = api(flags);
        let text = serde_json::to_string(&filters).expect("JSON");
        assert_eq!(text, expected);
        assert_eq!(
            serde_json::from_str::<ApiFilters>(&text).expect("filters"),
            filters
        );
    }
}

#[test]
fn raw_filters_match_like_flags() {
    assert_eq!(
        passing(&[("allowlist", r#"{"verdict":[2],"protocol":["tcp"]}"#)]),
        "dn"
    );
    assert_eq!(
        passing(&[
            ("verdict", "audit"),
            ("allowlist", r#"{"event_type":[{"type":4}]}"#)
        ]),
        "tu"
    );
    assert_eq!(passing(&[("denylist", r#"{"event_type":[{}]}"#)]), "");
    assert_eq!(
        passing(&[(
            "denylist",
            r#"{"source_workload":[{}],"traffic_direction":["EGRESS"]}"#
        )]),
        "vt6l"
    );
}

#[test]
fn flags_for_either_end_exclude_those_for_one_end() {
    for flags in [
        [("ip", "10.0.1.20"), ("from-ip", "10.0.1.10")],
        [("to-pod", "shop/web"), ("pod", "shop/web")],
        // Which namespace would the name have?
        [("namespace", "shop"), ("from-pod", "web")],
        [("to-pod", "web"), ("all-namespaces", "")],
        [("namespace", "shop"), ("all-namespaces", "")],
        [("to-all-namespaces", ""), ("to-namespace", "shop")],
        // No flow can match both.
        [("namespace", "shop"), ("pod", "home/web")],
        [("from-pod", "home/web"), ("from-namespace", "shop,other")],
        [("to-namespace", "shop"), ("to-pod", "home/")],
        [("from-namespace", "shop"), ("pod", "home/web")],
    ] {
        let error = filters(&flags).expect_err("a conflict").to_string();
        assert!(error.contains("cannot be combined"), "{error}");
        assert!(
            flags
                .iter()
                .all(|(flag, _)| error.contains(flag) || error.contains("home/")),
            "{error}"
        );
    }
    for flags in [
        [("namespace", "shop,home"), ("pod", "home/web")],
        [("all-namespaces", ""), ("pod", "home/web")],
        [("namespace", "shop"), ("pod", "/web")],
        [("from-namespace", "shop"), ("to-pod", "home/web")],
        [("from-namespace", "shop"), ("to-all-namespaces", "")],
    ] {
        assert!(filters(&flags).is_ok(), "{flags:?}");
    }
    // With --not, they are in different filters.
    assert_eq!(
        passing(&[("ip", "10.0.1.20"), ("not", ""), ("from-ip", "10.0.1.10")]),
        "t"
    );
}

#[test]
fn the_regular_expressions_of_a_request_are_bounded() {
    let mut filters = ApiFilters::default();
    for _ in 0..2 {
        filters.denylist.push(ApiFilter {
            http_path: vec!["a".into(); 40],
            ..ApiFilter::default()
        });
    }
    let error = Filters::compile(&filters).expect_err("too many").to_string();
    assert!(error.contains("80") && error.contains("64"), "{error}");
    filters.denylist.pop();
    assert!(Filters::compile(&filters).is_ok());
}

#[test]
fn the_values_of_a_request_are_bounded() {
    let of = |filter: ApiFilter| ApiFilters {
        allowlist: vec![filter],
        ..ApiFilters::default()
    };
    let label = |count| {
        of(ApiFilter {
            source_label: vec![vec!["!a"; count].join(",")],
            ..ApiFilter::default()
        })
    };
    assert!(Filters::compile(&label(1_024)).is_ok());
    let mut filters = label(1_000);
    filters.denylist.push(ApiFilter {
        destination_port: vec!["80".into(); 25],
        ..ApiFilter::default()
    });
    for filters in [filters, label(1_025)] {
        let error = Filters::compile(&filters).expect_err("too many").to_string();
        assert!(error.contains("1025") && error.contains("1024"), "{error}");
    }
    for long in [
        ApiFilter {
            node_name: vec!["*a".repeat(128)],
            ..ApiFilter::default()
        },
        ApiFilter {
            source_fqdn: vec!["*a".repeat(128)],
            ..ApiFilter::default()
        },
    ] {
        let error = Filters::compile(&of(long)).expect_err("too long").to_string();
        assert!(error.contains("256") && error.contains("255"), "{error}");
    }
}

#[test]
fn a_regular_expression_is_bounded_and_errors_repeat_only_the_beginning_of_a_value() {
    let of = |pattern: &str| ApiFilters {
        allowlist: vec![ApiFilter {
            http_url: vec![pattern.into()],
            ..ApiFilter::default()
        }],
        ..ApiFilters::default()
    };
    assert!(Filters::compile(&of(r"^https?://[\w.-]+/(api|v[0-9]+)/\d+$")).is_ok());
    assert!(Filters::compile(&of("[a-z]{4000}")).is_err());
    let error = Filters::compile(&of(&"(".repeat(10_000))).expect_err("invalid");
    assert!(error.to_string().len() < 400, "{error}");
}

#[test]
fn fields_that_a_node_cannot_know_are_refused_by_name() {
    for (field, value) in [
        ("source_ip_xlated", r#"["192.0.2.1"]"#),
        ("source_service", r#"["x"]"#),
        ("destination_service", r#"["x"]"#),
        ("source_cluster_name", r#"["x"]"#),
        ("destination_cluster_name", r#"["x"]"#),
        ("ip_trace_id", "[7]"),
        ("ip_trace_option", "[136]"),
        ("encrypted", "[false]"),
        ("experimental", r#"{"cel_expression":["true"]}"#),
    ] {
        let filter: ApiFilter = serde_json::from_str(&format!("{{\"{field}\":{value}}}")).expect(field);
        let error = FlowFilter::compile(&filter).expect_err(field).to_string();
        assert!(error.contains(field), "{error}");
    }
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
