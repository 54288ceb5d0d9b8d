//! Errors with their places. A snippet is part of a policy; its first line is line 6.

use super::{cnp, diagnostics_of};
use crate::parse::parse;

/// Asserts the diagnostics of a snippet of a spec.
#[track_caller]
fn assert_diagnostics(snippet: &str, expected: &[&str]) {
    assert_eq!(diagnostics_of(&cnp(snippet)), expected, "{snippet}");
}

/// Asserts the one error of the one rule of `egress`, which begins in line 7, column 5.
#[track_caller]
fn assert_egress(rule: &str, expected: &str) {
    assert_diagnostics(&format!("  egress:\n  - {rule}\n"), &[expected]);
}

#[track_caller]
fn assert_ingress(rule: &str, expected: &str) {
    assert_diagnostics(&format!("  ingress:\n  - {rule}\n"), &[expected]);
}

#[track_caller]
fn assert_deny(rule: &str, expected: &str) {
    assert_diagnostics(&format!("  egressDeny:\n  - {rule}\n"), &[expected]);
}

/// Asserts the one error of an entry of `toPorts`, which begins in column 15. The default port is TCP 80.
#[track_caller]
fn assert_entry(entry: &str, expected: &str) {
    assert_egress(&format!("toPorts: [{entry}]"), expected);
}

/// Asserts the one error of an http rule.
#[track_caller]
fn assert_http(rule: &str, expected: &str) {
    let rule = format!("toPorts: [{{ports: [{{port: '80', protocol: TCP}}], rules: {{http: [{rule}]}}}}]");
    assert_diagnostics(&format!("  egress:\n  - {rule}\n"), &[expected]);
}

/// Asserts the one error of a Kafka rule.
#[track_caller]
fn assert_kafka(rule: &str, expected: &str) {
    let rule = format!("toPorts: [{{ports: [{{port: '80', protocol: TCP}}], rules: {{kafka: [{rule}]}}}}]");
    assert_diagnostics(&format!("  egress:\n  - {rule}\n"), &[expected]);
}

#[test]
fn every_error_of_a_file_is_reported() {
    let text = "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: p}
spec:
  endpointSelector: {matchLabel: {app: a}}
  ingress:
  - fromEntities: [wrold]
    toPorts:
    - ports:
      - {port: 80}
      - {port: '99999', protocol: TPC}
---
kind: NetworkPolicy
apiVersion: networking.k8s.io/v1
metadata: {name: Q}
spec:
  podSelector: {}
  policyTypes: [ingress]
";
    assert_eq!(
        diagnostics_of(text),
        [
            "5:22: unknown field \"matchLabel\", did you mean \"matchLabels\"?",
            "7:20: unknown entity \"wrold\", did you mean \"world\"?",
            "10:16: port must be a string; write port: \"80\"",
            "11:16: \"99999\" is neither a port from 0 to 65535 nor the name of one",
            "11:35: unknown protocol \"TPC\", did you mean \"TCP\"?",
            "15:18: \"Q\" cannot be a name: it must be a DNS name in lower case",
            "18:17: unknown policy type \"ingress\", did you mean \"Ingress\"?",
        ]
    );
    assert!(parse("f", text).policies.is_empty());
}

#[test]
fn a_policy_with_an_error_leaves_the_others() {
    let good = cnp("  ingress: [{}]\n");
    let bad = good.replace("name: p", "name: q").replace("[{}]", "[{x: 1}]");
    let parsed = parse("f", &format!("{bad}---\n{good}"));
    assert!(parsed.has_errors());
    assert_eq!(
        parsed
            .policies
            .iter()
            .map(|policy| policy.name.as_str())
            .collect::<Vec<_>>(),
        ["p"]
    );
}

#[test]
fn subjects_and_sections() {
    let head = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p}\nspec:\n";
    let spec = |spec: &str| diagnostics_of(&format!("{head}{spec}"));
    assert_eq!(
        spec("  ingress: [{}]\n"),
        ["5:3: one of endpointSelector and nodeSelector is needed; {} selects every endpoint"]
    );
    assert_eq!(
        spec("  endpointSelector: null\n  ingress: [{}]\n"),
        ["5:3: one of endpointSelector and nodeSelector is needed; {} selects every endpoint"]
    );
    assert_eq!(
        spec("  endpointSelector: {}\n  nodeSelector: {}\n  ingress: [{}]\n"),
        [
            "6:17: endpointSelector and nodeSelector cannot be combined in one spec; write a spec for each (specs)"
        ]
    );
    assert_eq!(
        spec("  nodeSelector: {}\n  ingress: [{}]\n"),
        ["5:17: nodeSelector is for a CiliumClusterwideNetworkPolicy: nodes have no namespace"]
    );
    let nothing = "5:3: one of ingress, ingressDeny, egress and egressDeny must hold a rule; \
                   to deny everything of a direction write the empty rule, as in ingress: [{}]";
    assert_diagnostics("", &[nothing]);
    assert_diagnostics("  egress: []\n", &[nothing]);
    let null = "6:3: warning: egress is null, which is the same as absent";
    assert_diagnostics("  egress: null\n  ingressDeny: []\n", &[nothing, null]);
    assert_diagnostics("  enableDefaultDeny: {ingress: true}\n", &[nothing]);
    assert_diagnostics(
        "  egress: {}\n",
        &["6:11: egress must be a list, found an object"],
    );
    assert_diagnostics(
        "  ingress: [null]\n",
        &["6:13: this element must be an object, found nothing (null)"],
    );
    assert_diagnostics(
        "  ingress: [{}]\n  enableDefaultDeny: {ingress: maybe, egres: true}\n",
        &[
            "7:32: ingress must be true or false, found the string \"maybe\"",
            "7:39: unknown field \"egres\", did you mean \"egress\"?",
        ],
    );
}

#[test]
fn unknown_fields_everywhere() {
    assert_diagnostics(
        "  ingres: []\n",
        &["6:3: unknown field \"ingres\", did you mean \"ingress\"?"],
    );
    assert_ingress(
        "podSelector: {}",
        "7:5: unknown field \"podSelector\"; known here: authentication, fromCIDR, fromCIDRSet, fromEndpoints, \
         fromEntities, fromGroups, fromNodes, fromRequires, icmps, toPorts",
    );
    assert_egress(
        "toPort: []",
        "7:5: unknown field \"toPort\", did you mean \"toPorts\"?",
    );
    assert_entry(
        "{port: []}",
        "7:16: unknown field \"port\", did you mean \"ports\"?",
    );
    assert_egress(
        "toPorts: [{ports: [{port: '1', endport: 2}]}]",
        "7:36: unknown field \"endport\", did you mean \"endPort\"?",
    );
    assert_egress(
        "toCIDRSet: [{cidr: 10.0.0.0/8, expect: []}]",
        "7:36: unknown field \"expect\", did you mean \"except\"?",
    );
    assert_egress(
        "toFQDNs: [{matchname: a.b}]",
        "7:16: unknown field \"matchname\", did you mean \"matchName\"?",
    );
}

#[test]
fn selectors() {
    let from =
        |selector: &str, expected: &str| assert_ingress(&format!("fromEndpoints: [{selector}]"), expected);
    from(
        "null",
        "7:21: this element must be an object, found nothing (null)",
    );
    from(
        "{matchLabels: {app: 1}}",
        "7:41: app must be a string, found the number 1; put it in quotes: \"1\"",
    );
    from(
        "{matchLabels: {app: true}}",
        "7:41: app must be a string, found the boolean true; put it in quotes: \"true\"",
    );
    from(
        "{matchLabels: {app: }}",
        "7:39: a label's value must be a string; for the empty one write \"\"",
    );
    from(
        "{matchLabels: {app: a b}}",
        "7:41: \"a b\" cannot be a label's value: only letters, digits, \"-\", \"_\" and \".\" are allowed in it, \
         a letter or digit at both ends",
    );
    from(
        &format!("{{matchLabels: {{app: {}}}}}", "a".repeat(64)),
        &format!(
            "7:41: \"{}…\" cannot be a label's value: it is longer than 63 characters",
            "a".repeat(60)
        ),
    );
    from(
        "{matchLabels: {-app: a}}",
        "7:36: \"-app\" cannot be a label's key: only letters, digits, \"-\", \"_\" and \".\" are allowed in it, \
         a letter or digit at both ends",
    );
    from(
        "{matchLabels: {Example.com/app: a}}",
        "7:36: \"Example.com/app\" cannot be a label's key: the part before the \"/\" must be a DNS name in lower case",
    );
    from(
        "{matchLabels: {'k8s:a:b': a}}",
        "7:36: \"k8s:a:b\" cannot be a label's key: only letters, digits, \"-\", \"_\" and \".\" are allowed in it, \
         a letter or digit at both ends",
    );
    from(
        "{matchLabels: {':a': a}}",
        "7:36: \":a\" cannot be a label's key: the part before the \":\" is not a source",
    );
    from(
        "{matchLabels: {'k8s:': a}}",
        "7:36: \"k8s:\" cannot be a label's key: it has no name",
    );
    from(
        "{matchLabels: [a]}",
        "7:35: matchLabels must be an object, found a list",
    );
    from("{matchExpressions: [{operator: Exists}]}", "7:41: key is missing");
    from("{matchExpressions: [{key: a}]}", "7:41: operator is missing");
    from(
        "{matchExpressions: [{key: a, operator: in, values: [b]}]}",
        "7:60: unknown operator \"in\", did you mean \"In\"?",
    );
    from(
        "{matchExpressions: [{key: a, operator: In}]}",
        "7:41: In needs values",
    );
    from(
        "{matchExpressions: [{key: a, operator: NotIn, values: []}]}",
        "7:41: NotIn needs values",
    );
    from(
        "{matchExpressions: [{key: a, operator: Exists, values: [b]}]}",
        "7:76: Exists takes no values",
    );
    from(
        "{matchExpressions: [{key: a, operator: In, values: [ok, not ok]}]}",
        "7:77: \"not ok\" cannot be a label's value: only letters, digits, \"-\", \"_\" and \".\" are allowed in it, \
         a letter or digit at both ends",
    );
}

#[test]
fn peers() {
    assert_egress(
        "{toCIDR: [10.0.0.0/8], toEntities: [world]}",
        "7:28: toEntities and toCIDR cannot be combined in one rule; write a rule for each",
    );
    assert_deny(
        "{toCIDRSet: [{cidr: 10.0.0.0/8}], toCIDR: [1.0.0.0/8]}",
        "7:6: toCIDRSet and toCIDR cannot be combined in one rule; write a rule for each",
    );
    assert_ingress(
        "{fromEndpoints: [{}], fromNodes: [{}]}",
        "7:27: fromNodes and fromEndpoints cannot be combined in one rule; write a rule for each",
    );
    assert_egress(
        "{toFQDNs: [{matchName: a.b}], toEndpoints: [{}]}",
        "7:6: toFQDNs and toEndpoints cannot be combined in one rule; write a rule for each",
    );
    assert_egress(
        "toEntities: [World]",
        "7:18: unknown entity \"World\", did you mean \"world\"?",
    );
    assert_ingress(
        "fromRequires: [{matchLabel: {a: b}}]",
        "7:21: unknown field \"matchLabel\", did you mean \"matchLabels\"?",
    );
    assert_deny(
        "toServices: [{k8sService: {serviceName: a}}]",
        "7:5: toServices cannot be resolved here, so it cannot deny: there are no services to look up",
    );
    assert_deny(
        "toGroups: [{aws: {region: x}}]",
        "7:5: toGroups cannot be resolved here, so it cannot deny: there are no groups of a cloud provider to look up",
    );
    assert_egress(
        "toServices: [{k8sService: {serviceName: a}}]",
        "7:17: warning: toServices selects no peer: there are no services to look up",
    );
}

#[test]
fn prefixes() {
    let cidr = |text: &str, expected: &str| assert_egress(&format!("toCIDR: ['{text}']"), expected);
    cidr("300.1.1.1/32", "7:14: \"300.1.1.1/32\" has no valid address");
    cidr(
        "10.0.0.0/33",
        "7:14: \"10.0.0.0/33\" has no valid length; it must be a number from 0 to 32",
    );
    cidr(
        "10.0.0.0/08",
        "7:14: \"10.0.0.0/08\" has no valid length; it must be a number from 0 to 32",
    );
    cidr(
        "10.0.0.0/+8",
        "7:14: \"10.0.0.0/+8\" has no valid length; it must be a number from 0 to 32",
    );
    cidr(
        "10.0.0.0/255.0.0.0",
        "7:14: \"10.0.0.0/255.0.0.0\" has no valid length; it must be a number from 0 to 32",
    );
    cidr(
        "::/129",
        "7:14: \"::/129\" has no valid length; it must be a number from 0 to 128",
    );
    cidr("010.0.0.0/8", "7:14: \"010.0.0.0/8\" has no valid address");
    cidr("", "7:14: \"\" is neither an address nor a prefix");
    cidr("host", "7:14: \"host\" is neither an address nor a prefix");
    cidr(
        "fe80::1%eth0",
        "7:14: \"fe80::1%eth0\" is neither an address nor a prefix",
    );

    let set = |entry: &str, expected: &str| assert_egress(&format!("toCIDRSet: [{entry}]"), expected);
    set(
        "{}",
        "7:17: one of cidr, cidrGroupRef and cidrGroupSelector is needed",
    );
    set(
        "{cidr: ''}",
        "7:17: one of cidr, cidrGroupRef and cidrGroupSelector is needed",
    );
    set(
        "{cidr: 10.0.0.0/8, cidrGroupRef: g}",
        "7:17: only one of cidr, cidrGroupRef and cidrGroupSelector can be given",
    );
    set(
        "{cidr: 10.0.0.1}",
        "7:24: \"10.0.0.1\" is not a prefix; write ADDRESS/LENGTH",
    );
    set(
        "{cidr: 10.0.0.0/8, except: [11.0.0.0/16]}",
        "7:45: \"11.0.0.0/16\" is not inside of 10.0.0.0/8",
    );
    set(
        "{cidr: 10.0.0.0/8, except: ['::/16']}",
        "7:45: \"::/16\" is not inside of 10.0.0.0/8",
    );
    set(
        "{cidrGroupRef: g, except: [10.0.0.1]}",
        "7:44: \"10.0.0.1\" is not a prefix; write ADDRESS/LENGTH",
    );
    set(
        "{cidrGroupRef: G}",
        "7:32: \"G\" cannot be the name of a CiliumCIDRGroup",
    );
    set(
        "{cidrGroupSelector: {matchLabels: {'k8s:a': b}}}",
        "7:52: \"k8s:a\" cannot be a label's key: only letters, digits, \"-\", \"_\" and \".\" are allowed in it, \
         a letter or digit at both ends",
    );
}

#[test]
fn ports() {
    let port =
        |port: &str, expected: &str| assert_egress(&format!("toPorts: [{{ports: [{{{port}}}]}}]"), expected);
    port("port: 80", "7:31: port must be a string; write port: \"80\"");
    port(
        "port: '65536'",
        "7:31: \"65536\" is neither a port from 0 to 65535 nor the name of one",
    );
    port(
        "port: '-1'",
        "7:31: \"-1\" is neither a port from 0 to 65535 nor the name of one",
    );
    port(
        "port: '+1'",
        "7:31: \"+1\" is neither a port from 0 to 65535 nor the name of one",
    );
    port(
        "port: '80-90'",
        "7:31: \"80-90\" is neither a port from 0 to 65535 nor the name of one",
    );
    port(
        "port: ' 80'",
        "7:31: \" 80\" is neither a port from 0 to 65535 nor the name of one",
    );
    port(
        "port: '09'",
        "7:31: \"09\" is neither a port from 0 to 65535 nor the name of one",
    );
    port(
        "port: a--b",
        "7:31: \"a--b\" is neither a port from 0 to 65535 nor the name of one",
    );
    port(
        "port: sixteen-letters1",
        "7:31: \"sixteen-letters1\" is neither a port from 0 to 65535 nor the name of one",
    );
    port(
        "protocol: TCP",
        "7:24: port is missing; for every port write port: \"0\"",
    );
    port(
        "port: ''",
        "7:24: port is missing; for every port write port: \"0\"",
    );
    port(
        "port: '80', endPort: 65536",
        "7:46: endPort must be a number from 0 to 65535, found 65536",
    );
    port(
        "port: '80', endPort: -1",
        "7:46: endPort must be a number from 0 to 65535, found -1",
    );
    port(
        "port: '80', endPort: '90'",
        "7:46: endPort must be a number, found the string \"90\"",
    );
    port(
        "port: '80', protocol: HTTP",
        "7:47: unknown protocol \"HTTP\"; known: ANY, TCP, UDP, SCTP, VRRP, IGMP, GRE, IPIP, IPv6, ESP, AH",
    );
    port(
        "port: '8', protocol: ICMP",
        "7:46: ICMP has no ports; use icmps in place of toPorts",
    );
    port(
        "port: '8', protocol: icmpv6",
        "7:46: icmpv6 has no ports; use icmps in place of toPorts",
    );
    port(
        "port: '80', protocol: VRRP",
        "7:31: VRRP has no ports; leave port out",
    );
    // Valid, but surprising.
    port(
        "port: '050'",
        "7:31: warning: \"050\" is read as an octal number: port 40",
    );
    port(
        "port: '0x50'",
        "7:31: warning: \"0x50\" is the name of a port, not a number",
    );
    port(
        "port: '80', endPort: 79",
        "7:46: warning: endPort 79 is less than port 80: only port 80 is meant",
    );
    port(
        "port: http, endPort: 90",
        "7:46: warning: the range begins at the port of that name, whichever it is",
    );
    assert_entry(
        "{}",
        "7:15: warning: an entry without ports matches nothing; for every port write port: \"0\"",
    );

    let many = vec!["{port: '80'}"; 41].join(", ");
    assert_entry(
        &format!("{{ports: [{many}]}}"),
        "7:15: 41 ports in one entry; at most 40 are allowed, use several entries",
    );
}

#[test]
fn icmp() {
    let field =
        |field: &str, expected: &str| assert_egress(&format!("icmps: [{{fields: [{{{field}}}]}}]"), expected);
    field(
        "type: 256",
        "7:30: type must be a number from 0 to 255, found 256",
    );
    field("type: -1", "7:30: type must be a number from 0 to 255, found -1");
    field("family: IPv4", "7:23: type is missing");
    field(
        "family: ipv4, type: 8",
        "7:32: unknown family \"ipv4\", did you mean \"IPv4\"?",
    );
    field(
        "type: EchoRequst",
        "7:30: \"EchoRequst\" is no ICMP type of IPv4, did you mean \"EchoRequest\"?",
    );
    field(
        "type: PacketTooBig",
        "7:30: \"PacketTooBig\" is no ICMP type of IPv4; for the other family write family: IPv6",
    );
    field(
        "type: '08'",
        "7:30: \"08\" is no ICMP type of IPv4; a type is a number from 0 to 255 or a name like EchoRequest",
    );
    assert_egress(
        "{toPorts: [{ports: [{port: '80'}]}], icmps: [{fields: [{type: 8}]}]}",
        "7:42: icmps and toPorts cannot be combined in one rule; write a rule for each",
    );
    let many = vec!["{type: 8}"; 41].join(", ");
    assert_egress(
        &format!("icmps: [{{fields: [{many}]}}]"),
        "7:13: 41 types in one entry; at most 40 are allowed",
    );
}

#[test]
fn application_rules_and_their_ports() {
    let http = |ports: &str, expected: &str| {
        let rule = format!("toPorts: [{{rules: {{http: [{{method: GET}}]}}, ports: [{ports}]}}]");
        assert_diagnostics(&format!("  egress:\n  - {rule}\n"), &[expected]);
    };
    http(
        "{port: '80', protocol: UDP}",
        "7:16: application rules other than dns need protocol: TCP, and a port of this entry has UDP",
    );
    http(
        "{port: '80'}",
        "7:16: application rules other than dns need protocol: TCP, and a port of this entry has ANY",
    );
    http(
        "{port: '0', protocol: TCP}",
        "7:16: application rules cannot be used with port 0",
    );

    let dns = |rest: &str, expected: &str| {
        let rule = format!("toPorts: [{{rules: {{dns: [{{matchPattern: '*'}}]}}{rest}}}]");
        assert_diagnostics(&format!("  egress:\n  - {rule}\n"), &[expected]);
    };
    dns(
        ", ports: [{port: '53', endPort: 54}]",
        "7:16: dns rules cannot be used with a range of ports",
    );
    dns(
        ", ports: [{port: '0'}]",
        "7:16: application rules cannot be used with port 0",
    );
    assert_diagnostics(
        "  egress:\n  - toPorts: [{rules: {dns: [{matchPattern: '*'}]}}]\n",
        &[
            "7:15: warning: an entry without ports matches nothing; for every port write port: \"0\"",
            "7:16: dns rules need a port; write port: \"53\"",
        ],
    );
    assert_diagnostics(
        "  ingress:\n  - toPorts: [{rules: {dns: [{matchPattern: '*'}]}, ports: [{port: '53'}]}]\n",
        &["7:24: dns rules are for egress only"],
    );
    assert_diagnostics(
        "  egress:\n  - toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{}], kafka: [{}]}}]\n",
        &["7:74: kafka and http cannot be combined in one entry; write an entry for each"],
    );
    assert_entry(
        "{ports: [{port: '80', protocol: TCP}], rules: {l7: [{a: b}]}}",
        "7:62: l7 needs l7proto, the name of the parser",
    );
    assert_diagnostics(
        "  egress:\n  - toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {l7proto: x, l7: [{'': b}]}}]\n",
        &[
            "7:61: warning: there is no such parser yet; until then the traffic of these ports is dropped, \
             with a reason of its own",
            "7:80: a key must not be empty",
        ],
    );
    assert_deny(
        "toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{}]}}]",
        "7:54: rules cannot be part of a rule that denies; deny the ports as a whole",
    );
    assert_deny(
        "authentication: {mode: required}",
        "7:5: authentication cannot be part of a rule that denies",
    );
}

#[test]
fn http_rules() {
    assert_http(
        "{path: '*'}",
        "7:76: \"*\" is no valid regular expression: repetition operator missing expression",
    );
    assert_http(
        "{method: '('}",
        "7:78: \"(\" is no valid regular expression: a \"(\" without its \")\"",
    );
    assert_http(
        "{host: '(?=a)'}",
        "7:76: \"(?=a)\" is no valid regular expression: unknown group \"(?\"; look-around is not part of RE2",
    );
    assert_http(
        "{paths: a}",
        "7:70: unknown field \"paths\", did you mean \"path\"?",
    );
    assert_http(
        "{headers: [': a']}",
        "7:80: \": a\" names no header; write \"Name: value\", or \"Name\"",
    );
    assert_http("{headerMatches: [{value: a}]}", "7:86: name is missing");
    assert_http(
        "{headerMatches: [{name: a b}]}",
        "7:93: \"a b\" cannot be the name of a header",
    );
    for action in ["ADD", "DELETE", "REPLACE"] {
        assert_http(
            &format!("{{headerMatches: [{{name: Host, mismatch: {action}}}]}}"),
            &format!(
                "7:109: mismatch: {action} cannot change Host: the request line, the host and the framing of a message \
                 stay as the client has sent them"
            ),
        );
    }
    assert_http(
        "{headerMatches: [{name: a, value: \"b\\r\\nc\", mismatch: ADD}]}",
        "7:103: \"b\\r\\nc\" cannot be the value of a header",
    );
    assert_http(
        "{headerMatches: [{name: a, mismatch: log}]}",
        "7:106: unknown action \"log\", did you mean \"LOG\"?",
    );
    assert_http(
        "{headerMatches: [{name: a, secret: {}}]}",
        "7:104: name is missing",
    );
}

#[test]
fn kafka_rules() {
    assert_kafka(
        "{role: produce, apiKey: fetch}",
        "7:70: role and apiKey cannot be given together",
    );
    assert_kafka(
        "{role: producer}",
        "7:77: unknown role \"producer\", did you mean \"produce\"?",
    );
    assert_kafka(
        "{apiKey: fetsh}",
        "7:79: unknown API key \"fetsh\", did you mean \"fetch\"?",
    );
    assert_kafka(
        "{apiVersion: '-1'}",
        "7:83: apiVersion must be a number from 0 to 32767, found \"-1\"",
    );
    assert_kafka(
        "{apiVersion: '40000'}",
        "7:83: apiVersion must be a number from 0 to 32767, found \"40000\"",
    );
    assert_kafka(
        "{topic: a/b}",
        "7:78: \"a/b\" cannot be a topic: only letters, digits, \".\", \"_\" and \"-\" are allowed",
    );
    assert_kafka(
        &format!("{{topic: {}}}", "a".repeat(256)),
        "7:78: a topic is at most 255 characters long",
    );
}

#[test]
fn names_of_hosts() {
    let fqdn = |entry: &str, expected: &str| assert_egress(&format!("toFQDNs: [{entry}]"), expected);
    fqdn("{}", "7:15: one of matchName and matchPattern is needed");
    fqdn(
        "{matchName: a.b, matchPattern: '*.b'}",
        "7:15: only one of matchName and matchPattern can be given; write an element for each",
    );
    fqdn(
        "{matchName: '*.b'}",
        "7:27: \"*.b\" cannot be a matchName: \"*\" is allowed in matchPattern only",
    );
    fqdn(
        "{matchName: a b}",
        "7:27: \"a b\" cannot be a matchName: only letters, digits, \"-\", \"_\" and \".\" are allowed in it",
    );
    fqdn(
        "{matchPattern: a+.io}",
        "7:30: \"a+.io\" cannot be a matchPattern: only letters, digits, \"-\", \"_\", \".\" and \"*\" are allowed in it",
    );
    fqdn(
        "{matchName: a..b}",
        "7:27: \"a..b\" cannot be a matchName: a name between two dots is empty",
    );
    fqdn(
        "{matchName: .}",
        "7:27: \".\" cannot be a matchName: a name between two dots is empty",
    );
    let long = ["a"; 128].join(".");
    fqdn(
        &format!("{{matchName: {long}.a}}"),
        &format!(
            "7:27: \"{}…\" cannot be a matchName: it is longer than 255 characters",
            &long[..60]
        ),
    );
}

#[test]
fn tls_and_listeners() {
    let entry = |rest: &str| {
        diagnostics_of(&cnp(&format!(
            "  egress:\n  - toPorts: [{{ports: [{{port: '1', protocol: TCP}}], {rest}}}]\n"
        )))
    };
    assert_eq!(
        entry("serverNames: ['']"),
        ["7:67: a server name must not be empty"]
    );
    assert_eq!(
        entry("serverNames: ['a', b c]"),
        [
            "7:72: \"b c\" cannot be a server name: only letters, digits, \"-\", \"_\", \".\" and \"*\" are allowed in it"
        ]
    );
    assert_eq!(
        entry("serverNames: [a.b], rules: {http: [{}]}")[0],
        "7:53: serverNames together with rules need terminatingTLS: else the traffic is encrypted"
    );
    assert_eq!(entry("terminatingTLS: {}"), ["7:69: secret is missing"]);
    assert_eq!(
        entry("originatingTLS: {secret: {namespace: a}}"),
        ["7:78: name is missing"]
    );
    assert_eq!(
        entry("listener: {envoyConfig: {name: c}, name: l}, rules: {http: [{}]}"),
        [
            "7:63: listener and rules cannot be combined in one entry",
            "7:63: warning: there are no listeners yet; until then the traffic of these ports is dropped, \
             with a reason of its own"
        ]
    );
    assert_eq!(entry("listener: {name: l}"), ["7:63: envoyConfig is missing"]);
    assert_eq!(
        entry("listener: {envoyConfig: {name: c}, name: l, priority: 101}"),
        ["7:107: priority must be a number from 1 to 100, found 101"]
    );
    assert_eq!(
        entry("listener: {envoyConfig: {name: c, kind: EnvoyConfig}, name: l}")[1],
        "7:87: unknown kind \"EnvoyConfig\"; known: CiliumEnvoyConfig, CiliumClusterwideEnvoyConfig"
    );
    assert_eq!(
        diagnostics_of(&cnp(
            "  ingress:\n  - toPorts: [{listener: {envoyConfig: {name: c}, name: l}, ports: [{port: '1'}]}]\n"
        ))[0],
        "7:26: listener is for egress only"
    );
}

#[test]
fn authentication() {
    assert_egress(
        "{toEntities: [all], authentication: {mode: required}}",
        "7:41: warning: authentication is not implemented; this traffic is dropped (reason 189)",
    );
    assert_diagnostics(
        "  egress:\n  - {toEntities: [all], authentication: {mode: disabled}}\n",
        &[],
    );
    assert_egress(
        "{toEntities: [all], authentication: {mode: require}}",
        "7:42: unknown mode \"require\", did you mean \"required\"?",
    );
    assert_egress("{toEntities: [all], authentication: {}}", "7:41: mode is missing");
}
