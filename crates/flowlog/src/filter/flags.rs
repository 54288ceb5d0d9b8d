//! The command-line flags of which filters are made, with their help texts.

/// A flag of `palisade observe` that adds to the filters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flag {
    /// Long name, without dashes.
    pub name: &'static str,
    /// Short name.
    pub short: Option<char>,
    /// Placeholder of the value in the help; empty if the flag takes no value.
    pub value: &'static str,
    /// Help text.
    pub help: &'static str,
}

const fn flag(name: &'static str, value: &'static str, help: &'static str) -> Flag {
    Flag {
        name,
        short: None,
        value,
        help,
    }
}

const fn short(name: &'static str, short: char, value: &'static str, help: &'static str) -> Flag {
    Flag {
        name,
        short: Some(short),
        value,
        help,
    }
}

/// Every flag that [`FilterBuilder::flag`](super::FilterBuilder::flag) accepts.
pub const FLAGS: &[Flag] = &[
    flag(
        "not",
        "",
        "Reverse the next filter: hide the flows that match it; several hide those that match all of them",
    ),
    flag(
        "ip",
        "ADDRESS",
        "Flows from or to an address or prefix (10.0.1.10, fd00::/64)",
    ),
    flag("from-ip", "ADDRESS", "Flows from an address or prefix"),
    flag("to-ip", "ADDRESS", "Flows to an address or prefix"),
    flag(
        "snat-ip",
        "ADDRESS",
        "Not supported: Palisade does not translate addresses",
    ),
    short("ipv4", '4', "", "IPv4 flows"),
    short("ipv6", '6', "", "IPv6 flows"),
    flag(
        "ip-version",
        "VERSION",
        "Flows of IP version 4 or 6, or frames that are not IP (none)",
    ),
    short(
        "label",
        'l',
        "SELECTOR",
        "Flows from or to labels (app=web, k8s:app in (a,b), !tier, reserved:world)",
    ),
    flag("from-label", "SELECTOR", "Flows from labels"),
    flag("to-label", "SELECTOR", "Flows to labels"),
    flag(
        "identity",
        "IDENTITY",
        "Flows from or to a numeric identity or a reserved one (world)",
    ),
    flag("from-identity", "IDENTITY", "Flows from an identity"),
    flag("to-identity", "IDENTITY", "Flows to an identity"),
    flag(
        "endpoint",
        "[NAMESPACE/]NAME",
        "Flows from or to endpoints or peers of any namespace by the beginning of their name, or an endpoint by number",
    ),
    flag("from-endpoint", "[NAMESPACE/]NAME", "Flows from endpoints"),
    flag("to-endpoint", "[NAMESPACE/]NAME", "Flows to endpoints"),
    flag(
        "pod",
        "[NAMESPACE/]NAME",
        "Flows from or to endpoints or peers by the beginning of their name. Without a namespace: those of --namespace, \
         or else of the namespace default. /NAME: of any namespace",
    ),
    flag(
        "from-pod",
        "[NAMESPACE/]NAME",
        "Flows from endpoints, as in --pod",
    ),
    flag("to-pod", "[NAMESPACE/]NAME", "Flows to endpoints, as in --pod"),
    short("namespace", 'n', "NAMESPACE", "Flows from or to a namespace"),
    flag("from-namespace", "NAMESPACE", "Flows from a namespace"),
    flag("to-namespace", "NAMESPACE", "Flows to a namespace"),
    short(
        "all-namespaces",
        'A',
        "",
        "Flows from or to any namespace; names in --pod without a namespace mean any",
    ),
    flag(
        "from-all-namespaces",
        "",
        "Flows from any namespace; names in --from-pod without a namespace mean any",
    ),
    flag(
        "to-all-namespaces",
        "",
        "Flows to any namespace; names in --to-pod without a namespace mean any",
    ),
    flag(
        "workload",
        "[KIND/]NAME",
        "Flows from or to a workload: an endpoint or peer by its whole name, of kind Pod",
    ),
    flag("from-workload", "[KIND/]NAME", "Flows from a workload"),
    flag("to-workload", "[KIND/]NAME", "Flows to a workload"),
    flag(
        "service",
        "[NAMESPACE/]NAME",
        "Not supported: Palisade has no Kubernetes services",
    ),
    flag("from-service", "[NAMESPACE/]NAME", "Not supported, as --service"),
    flag("to-service", "[NAMESPACE/]NAME", "Not supported, as --service"),
    flag(
        "cluster",
        "NAME",
        "Not supported: a node of Palisade belongs to no cluster",
    ),
    flag("from-cluster", "NAME", "Not supported, as --cluster"),
    flag("to-cluster", "NAME", "Not supported, as --cluster"),
    flag(
        "port",
        "PORT",
        "Flows from or to a port or a range (80, 8000-8999)",
    ),
    flag("from-port", "PORT", "Flows from a port"),
    flag("to-port", "PORT", "Flows to a port"),
    flag(
        "protocol",
        "PROTOCOL",
        "Flows of a protocol: tcp, udp, sctp, icmp, icmpv4, icmpv6, igmp, vrrp, dns, http, kafka, tls, or a number",
    ),
    flag(
        "verdict",
        "VERDICT",
        "Flows with a verdict: forwarded, dropped, audit, ...",
    ),
    flag(
        "drop-reason-desc",
        "REASON",
        "Drops with a reason, by name, text or number (POLICY_DENIED)",
    ),
    short(
        "type",
        't',
        "TYPE[:SUBTYPE]",
        "Events of a type: trace, drop, policy-verdict, l7; trace:to-endpoint, drop:133",
    ),
    flag(
        "traffic-direction",
        "DIRECTION",
        "Flows of ingress or egress connections",
    ),
    flag(
        "reply",
        "true|false",
        "Packets of the reply direction, or of the original one",
    ),
    flag(
        "tcp-flags",
        "FLAGS",
        "Packets with all of these TCP flags (SYN,ACK)",
    ),
    flag(
        "interface",
        "NAME",
        "Flows seen on an interface, by name or index",
    ),
    flag(
        "dns-query",
        "REGEX",
        "DNS messages about a name that matches ('example\\.com\\.?$')",
    ),
    flag(
        "http-status",
        "STATUS",
        "HTTP answers with a status, or with its first digits and a + (404, 5+, 40+)",
    ),
    flag(
        "http-method",
        "METHOD",
        "HTTP requests with a method, and their answers",
    ),
    flag(
        "http-path",
        "REGEX",
        "HTTP requests whose path, without its query, matches, and their answers ('^/page/[0-9]+$')",
    ),
    flag(
        "http-url",
        "REGEX",
        "HTTP requests whose URL matches, and their answers ('^http://[^/]*example\\.com/')",
    ),
    flag(
        "http-header",
        "NAME:VALUE",
        "HTTP messages with a header field, if [http] record_headers names it",
    ),
    flag(
        "trace-id",
        "ID",
        "HTTP messages of a distributed trace, if [http] record_headers names traceparent",
    ),
    flag(
        "ip-trace-id",
        "ID",
        "Not supported: Palisade does not record IP options",
    ),
    flag("ip-trace-option", "NUMBER", "Not supported, as --ip-trace-id"),
    flag(
        "sni",
        "NAME",
        "TLS hellos for a server name; * stands for any text",
    ),
    flag(
        "fqdn",
        "NAME",
        "Flows from or to an address that was learned for a name; * stands for any text",
    ),
    flag(
        "from-fqdn",
        "NAME",
        "Flows from an address that was learned for a name",
    ),
    flag(
        "to-fqdn",
        "NAME",
        "Flows to an address that was learned for a name",
    ),
    flag(
        "node-name",
        "NAME",
        "Flows that a node recorded; * stands for any text",
    ),
    flag(
        "node-label",
        "SELECTOR",
        "Flows that nodes with labels recorded (zone=a)",
    ),
    flag("uuid", "UUID", "The flow with an identifier, which -o json shows"),
    flag(
        "encrypted",
        "",
        "Not supported: Palisade does not know whether packets are encrypted",
    ),
    flag("unencrypted", "", "Not supported, as --encrypted"),
    flag(
        "cel-expression",
        "EXPRESSION",
        "Not supported: Palisade does not evaluate CEL expressions",
    ),
    flag(
        "since",
        "TIME",
        "Flows from a time on: how long ago (5m, 1h30m), RFC 3339, a date, or a time as it is printed ('Apr 28 03:04:16.656')",
    ),
    flag("until", "TIME", "Flows up to a time, written as for --since"),
    flag(
        "allowlist",
        "JSON",
        "Flows that match a filter of the flow API, as --print-raw-filters prints it",
    ),
    flag(
        "denylist",
        "JSON",
        "Hide the flows that match a filter of the flow API",
    ),
];
