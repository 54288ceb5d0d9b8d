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
    flag("not", "", "Reverse the next filter: hide the flows that match it"),
    flag(
        "ip",
        "ADDRESS",
        "Flows from or to an address or prefix (10.0.1.10, fd00::/64)",
    ),
    flag("from-ip", "ADDRESS", "Flows from an address or prefix"),
    flag("to-ip", "ADDRESS", "Flows to an address or prefix"),
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
        "Flows from or to endpoints or peers by the beginning of their name, or an endpoint by number",
    ),
    flag("from-endpoint", "[NAMESPACE/]NAME", "Flows from endpoints"),
    flag("to-endpoint", "[NAMESPACE/]NAME", "Flows to endpoints"),
    flag("pod", "[NAMESPACE/]NAME", "The same as --endpoint"),
    flag("from-pod", "[NAMESPACE/]NAME", "The same as --from-endpoint"),
    flag("to-pod", "[NAMESPACE/]NAME", "The same as --to-endpoint"),
    short("namespace", 'n', "NAMESPACE", "Flows from or to a namespace"),
    flag("from-namespace", "NAMESPACE", "Flows from a namespace"),
    flag("to-namespace", "NAMESPACE", "Flows to a namespace"),
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
        "Flows of a protocol: tcp, udp, sctp, icmp, icmpv4, icmpv6, dns, http, kafka, tls, or a number",
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
    flag("ip-version", "VERSION", "Flows of IP version 4 or 6"),
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
        "since",
        "TIME",
        "Flows from a time on: RFC 3339, a date, or a duration before now (5m, 1h30m)",
    ),
    flag("until", "TIME", "Flows up to a time, written as for --since"),
];
