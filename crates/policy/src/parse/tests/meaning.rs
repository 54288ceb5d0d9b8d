//! Meaning of snippets of policies.

use palisade_model::rule::{
    CidrRule, Entity, FqdnPattern, HeaderMatch, HttpRule, KafkaRule, L4Protocol, L7, L7Rules, Listener,
    MismatchAction, Peer, Peers, PortRule, PortSpec, Ports, Requirement, Selector, Spec, Subject, Test,
    TlsContext,
};

use super::{all, cnp, egress, in_namespace, is, port_rule, ports, requirement, spec};
use crate::parse::parse;

fn ccnp(rest: &str) -> Spec {
    spec(&format!(
        "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {{name: p}}\nspec:\n{rest}"
    ))
}

#[track_caller]
fn subject(spec: Spec) -> Vec<Requirement> {
    match spec.subject {
        Subject::Endpoints(selector) | Subject::Node(selector) => selector.requirements,
    }
}

/// Returns the selector of the only element of `toEndpoints`.
#[track_caller]
fn peer(peers: Peers) -> Selector {
    match peers {
        Peers::OneOf(mut peers) if peers.len() == 1 => match peers.remove(0) {
            Peer::Labels(selector) => selector,
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
}

fn somewhere() -> Requirement {
    requirement("k8s", "io.kubernetes.pod.namespace", Test::Exists)
}

#[test]
fn keys_of_selectors() {
    let selector = peer(
        egress(
            "toEndpoints: [{matchLabels: {a: '1', 'any:b': '2', 'k8s:c': '', 'x.y/z': v}, matchExpressions: [
               {key: 'container:d', operator: In, values: [p, q]}, {key: e, operator: NotIn, values: [r]},
               {key: f, operator: Exists}, {key: 'k8s:g', operator: DoesNotExist}]}]",
        )
        .peers,
    );
    assert_eq!(
        selector.requirements,
        [
            is("any", "a", "1"),
            is("any", "b", "2"),
            is("k8s", "c", ""),
            is("any", "x.y/z", "v"),
            requirement("container", "d", Test::In(vec!["p".into(), "q".into()])),
            requirement("any", "e", Test::NotIn(vec!["r".into()])),
            requirement("any", "f", Test::Exists),
            requirement("k8s", "g", Test::DoesNotExist),
            in_namespace("shop"),
        ]
    );
    for key in ["$host", "'reserved:host'", "reserved.host"] {
        let selector = peer(egress(&format!("toEndpoints: [{{matchLabels: {{{key}: ''}}}}]")).peers);
        assert_eq!(selector.requirements, [is("reserved", "host", "")], "{key}");
    }
}

#[test]
fn a_namespaced_policy_selects_in_its_namespace() {
    let selector = |selector: &str| {
        let text = cnp("  ingress: [{}]\n")
            .replace("endpointSelector: {}", &format!("endpointSelector: {selector}"));
        subject(spec(&text))
    };
    assert_eq!(selector("{}"), [in_namespace("shop")]);
    assert_eq!(
        selector("{matchLabels: {a: b}}"),
        [is("any", "a", "b"), in_namespace("shop")]
    );
    assert_eq!(
        selector("{matchLabels: {'k8s:io.kubernetes.pod.namespace': x}}"),
        [in_namespace("shop")]
    );
    // A requirement of another source than k8s is added to the namespace, and can contradict it.
    assert_eq!(
        selector("{matchLabels: {io.kubernetes.pod.namespace: x}}"),
        [
            is("any", "io.kubernetes.pod.namespace", "x"),
            in_namespace("shop")
        ]
    );
}

#[test]
fn peers_are_in_the_namespace_of_the_policy_by_default() {
    let scoped = |selector: &str| peer(egress(&format!("toEndpoints: [{selector}]")).peers).requirements;
    assert_eq!(scoped("{}"), [in_namespace("shop")]);
    assert_eq!(
        scoped("{matchLabels: {a: b}}"),
        [is("any", "a", "b"), in_namespace("shop")]
    );
    for other in [
        "{matchLabels: {io.kubernetes.pod.namespace: x}}",
        "{matchLabels: {'k8s:io.kubernetes.pod.namespace': x}}",
        "{matchExpressions: [{key: 'k8s:io.kubernetes.pod.namespace', operator: Exists}]}",
        "{matchLabels: {io.cilium.k8s.namespace.labels.team: x}}",
        "{matchLabels: {'k8s:io.cilium.k8s.namespace.labels.team': x}}",
        "{matchLabels: {'reserved:remote-node': ''}}",
    ] {
        assert_eq!(scoped(other).len(), 1, "{other}");
    }
    // A namespace label of another source is an ordinary label.
    assert_eq!(
        scoped("{matchLabels: {'container:io.kubernetes.pod.namespace': x}}").len(),
        2
    );
}

#[test]
fn a_clusterwide_policy_is_unscoped_and_its_peers_have_a_namespace() {
    let policy = |subject: &str, peer: &str| {
        ccnp(&format!(
            "  endpointSelector: {subject}\n  ingress: [{{fromEndpoints: [{peer}]}}]\n"
        ))
    };
    let of = |spec: &Spec| peer(spec.ingress.as_ref().expect("a section")[0].peers.clone()).requirements;
    let everywhere = policy("{}", "{}");
    assert_eq!(of(&everywhere), [somewhere()]);
    assert_eq!(subject(everywhere), []);
    assert_eq!(
        of(&policy("{}", "{matchLabels: {a: b}}")),
        [is("any", "a", "b"), somewhere()]
    );
    assert_eq!(
        of(&policy(
            "{}",
            "{matchLabels: {'k8s:io.kubernetes.pod.namespace': x}}"
        )),
        [in_namespace("x")]
    );
    assert_eq!(
        of(&policy(
            "{}",
            "{matchLabels: {io.cilium.k8s.namespace.labels.t: x}}"
        ))
        .len(),
        2
    );
    // Endpoints without labels (`reserved:init`) have no namespace yet, so neither these endpoints nor their peers get
    // a requirement for a namespace.
    assert_eq!(of(&policy("{matchLabels: {'reserved:init': ''}}", "{}")), []);
}

#[test]
fn empty_forms_of_peers() {
    let peers = |rule: &str| egress(rule).peers;
    assert_eq!(peers("{}"), Peers::None);
    assert_eq!(peers("{toPorts: []}"), Peers::None);
    assert_eq!(peers("{toPorts: null, icmps: []}"), Peers::None);
    assert_eq!(peers("{toEndpoints: []}"), Peers::None);
    assert_eq!(
        peers("{toFQDNs: [], toPorts: [{ports: [{port: '1'}]}]}"),
        Peers::None
    );
    assert_eq!(
        peers("{toEndpoints: [{}], toCIDR: []}"),
        Peers::None,
        "an empty list cancels its siblings"
    );
    assert_eq!(
        peers("{toServices: [{k8sService: {serviceName: a}}]}"),
        Peers::None
    );
    assert_eq!(peers("{toGroups: [{aws: {region: a}}]}"), Peers::None);
    assert_eq!(
        peers("{toEndpoints: null, toEntities: [all]}"),
        Peers::OneOf(vec![Peer::Entity(Entity::All)])
    );
    assert_eq!(
        peers("{toRequires: [], toEntities: [all]}"),
        Peers::OneOf(vec![Peer::Entity(Entity::All)])
    );
    assert_eq!(peers("{toPorts: [{}]}"), Peers::Any);
    assert_eq!(peers("{icmps: [{fields: [{type: 8}]}]}"), Peers::Any);
}

#[test]
fn empty_forms_of_ports() {
    let ports = |rule: &str| egress(rule).ports;
    for rule in [
        "{toEntities: [all]}",
        "{toEntities: [all], toPorts: []}",
        "{toEntities: [all], toPorts: null, icmps: []}",
    ] {
        assert_eq!(ports(rule), Ports::Any, "{rule}");
    }
    for rule in [
        "{toPorts: [{}]}",
        "{toPorts: [{ports: []}]}",
        "{icmps: [{}]}",
        "{icmps: [{fields: []}]}",
    ] {
        let Ports::OneOf(rules) = ports(rule) else {
            panic!("{rule}")
        };
        assert!(
            matches!(rules.as_slice(), [PortRule { ports, .. }] if ports.is_empty()),
            "{rule}"
        );
    }
}

#[test]
fn sections() {
    let spec = spec(&cnp(
        "  ingress: [{}, {}]\n  ingressDeny: []\n  egressDeny: [{}]\n  enableDefaultDeny: {egress: false}\n  description: why\n  labels: [{key: a}]\n",
    ));
    assert_eq!(spec.ingress.as_ref().map(Vec::len), Some(2));
    assert_eq!((spec.ingress_deny, spec.egress), (None, None));
    assert_eq!(
        spec.egress_deny.map(|rules| rules[0].peers.clone()),
        Some(Peers::None)
    );
    assert_eq!(
        (spec.default_deny_ingress, spec.default_deny_egress),
        (None, Some(false))
    );
    assert_eq!(
        (
            spec.description.as_str(),
            spec.location.line,
            spec.location.column
        ),
        ("why", 5, 3)
    );
    assert_eq!(spec.ingress.expect("a section")[1].location.column, 17);
}

#[test]
fn every_kind_of_peer() {
    let net = |text: &str| text.parse().expect("a prefix");
    let cidr = |cidr: &str, except: &[&str]| CidrRule {
        cidr: net(cidr),
        except: except.iter().map(|e| net(e)).collect(),
    };
    assert_eq!(
        egress("toCIDR: [10.1.2.3/8, 10.0.0.1, '::1', '0.0.0.5/0']").peers,
        Peers::OneOf(
            ["10.0.0.0/8", "10.0.0.1/32", "::1/128", "0.0.0.0/0"]
                .map(|text| Peer::Cidr(cidr(text, &[])))
                .to_vec()
        )
    );
    assert_eq!(
        egress(
            "toCIDRSet: [{cidr: 10.1.2.3/8, except: [10.1.2.3/16]}, {cidrGroupRef: g, except: [10.9.0.0/16]}, \
             {cidrGroupSelector: {matchLabels: {a: b}}}]"
        )
        .peers,
        Peers::OneOf(vec![
            Peer::Cidr(cidr("10.0.0.0/8", &["10.1.0.0/16"])),
            Peer::CidrGroup { name: "g".into(), except: vec![net("10.9.0.0/16")] },
            Peer::CidrGroupSelector { selector: all([is("cidrgroup", "a", "b")]), except: vec![] },
        ])
    );
    assert_eq!(
        egress("toNodes: [{matchLabels: {a: b}}]").peers,
        Peers::OneOf(vec![Peer::Nodes(all([is("any", "a", "b")]))]),
        "nodes are not of a namespace"
    );
    assert_eq!(
        egress(
            "toFQDNs: [{matchName: WWW.Example.com.}, {matchPattern: '**.Example.com'}, {matchPattern: '*'}]"
        )
        .peers,
        Peers::OneOf(vec![
            Peer::Fqdn(FqdnPattern::Name("www.example.com".into())),
            Peer::Fqdn(FqdnPattern::Pattern("**.example.com".into())),
            Peer::Fqdn(FqdnPattern::Pattern("*".into())),
        ])
    );
    let entities = "all, world, world-ipv4, world-ipv6, cluster, host, remote-node, kube-apiserver, health, init, \
                    unmanaged, ingress, none";
    use Entity::*;
    assert_eq!(
        egress(&format!("toEntities: [{entities}]")).peers,
        Peers::OneOf(
            [
                All,
                World,
                WorldIpv4,
                WorldIpv6,
                Cluster,
                Host,
                RemoteNode,
                KubeApiserver,
                Health,
                Init,
                Unmanaged,
                Ingress,
                None
            ]
            .map(Peer::Entity)
            .to_vec()
        )
    );
}

#[test]
fn ports_and_protocols() {
    let one = |port: &str| ports(port_rule(&format!("{{ports: [{{{port}}}]}}"))).remove(0);
    let range = |protocol, first, last| PortSpec::Range {
        protocol,
        first,
        last,
    };
    use L4Protocol::{Any, Other, Sctp, Tcp, Udp};
    assert_eq!(one("port: '80'"), range(Any, 80, 80));
    assert_eq!(one("port: '80', protocol: ''"), range(Any, 80, 80));
    assert_eq!(one("port: '80', protocol: tcp"), range(Tcp, 80, 80));
    assert_eq!(one("port: '80', protocol: UDP, endPort: 90"), range(Udp, 80, 90));
    assert_eq!(
        one("port: '80', protocol: SCTP, endPort: 80"),
        range(Sctp, 80, 80)
    );
    assert_eq!(one("port: '80', endPort: 70"), range(Any, 80, 80));
    assert_eq!(one("port: '80', endPort: 0"), range(Any, 80, 80));
    assert_eq!(one("port: '0', protocol: ANY"), range(Any, 0, 65535));
    assert_eq!(
        one("port: '0', endPort: 65535, protocol: TCP"),
        range(Tcp, 0, 65535)
    );
    assert_eq!(one("port: '0', endPort: 10"), range(Any, 0, 10));
    assert_eq!(one("port: '050'"), range(Any, 40, 40));
    assert_eq!(
        one("port: HTTP-2, protocol: TCP"),
        PortSpec::Named {
            protocol: Tcp,
            name: "http-2".into(),
            last: 0,
        }
    );
    assert_eq!(
        one("port: '0x50'"),
        PortSpec::Named {
            protocol: Any,
            name: "0x50".into(),
            last: 0,
        }
    );
    assert_eq!(one("protocol: VRRP"), range(Other(112), 0, 65535));
    assert_eq!(one("port: '0', protocol: igmp"), range(Other(2), 0, 65535));

    let Ports::OneOf(rules) = egress(
        "icmps: [{fields: [{type: 8}, {type: EchoRequest, family: IPv6}, {type: '3'}]}, {fields: [{type: Redirect}]}]",
    )
    .ports
    else {
        panic!()
    };
    let icmp = |v6, kind| PortSpec::Icmp { v6, kind };
    assert_eq!(rules[0].ports, [icmp(false, 8), icmp(true, 128), icmp(false, 3)]);
    assert_eq!(rules[1].ports, [icmp(false, 5)]);
}

/// Returns the application rules of an entry for TCP port 80.
#[track_caller]
fn l7(rest: &str) -> L7 {
    port_rule(&format!("{{ports: [{{port: '80', protocol: TCP}}], {rest}}}")).l7
}

#[test]
fn application_rules() {
    assert_eq!(
        l7(
            "rules: {http: [{method: GET, path: '/a.*', host: ''}, {headers: ['X-A: b c', X-B, 'X-C d'], \
            headerMatches: [{name: X-D, value: e, mismatch: LOG}, {name: X-F, secret: {name: s}}]}]}"
        )
        .rules,
        L7Rules::Http(vec![
            HttpRule {
                method: Some("GET".into()),
                path: Some("/a.*".into()),
                ..HttpRule::default()
            },
            HttpRule {
                headers: vec![
                    ("X-A".into(), Some("b c".into())),
                    ("X-B".into(), None),
                    ("X-C".into(), Some("d".into())),
                ],
                header_matches: vec![
                    HeaderMatch {
                        name: "X-D".into(),
                        value: Some("e".into()),
                        secret: None,
                        mismatch: MismatchAction::Log,
                    },
                    HeaderMatch {
                        name: "X-F".into(),
                        value: None,
                        secret: Some("shop/s".into()),
                        mismatch: MismatchAction::Fail,
                    },
                ],
                ..HttpRule::default()
            },
        ])
    );
    assert_eq!(
        l7("rules: {kafka: [{role: Produce, topic: t}, {apiKey: Fetch, apiVersion: '3', clientID: c}, {}]}")
            .rules,
        L7Rules::Kafka(vec![
            KafkaRule {
                api_keys: vec![0, 3, 18],
                topic: Some("t".into()),
                ..KafkaRule::default()
            },
            KafkaRule {
                api_keys: vec![1],
                api_version: Some(3),
                client_id: Some("c".into()),
                topic: None,
            },
            KafkaRule::default(),
        ])
    );
    assert_eq!(
        port_rule(
            "{ports: [{port: '53'}], rules: {dns: [{matchName: A.b}, {matchName: c, matchPattern: '*.c'}]}}"
        )
        .l7
        .rules,
        L7Rules::Dns(vec![
            FqdnPattern::Name("a.b".into()),
            FqdnPattern::Name("c".into()),
            FqdnPattern::Pattern("*.c".into()),
        ])
    );
    assert_eq!(
        l7("rules: {l7proto: x, l7: [{a: b, c: d}]}").rules,
        L7Rules::Generic {
            parser: "x".into(),
            rules: vec![vec![("a".into(), "b".into()), ("c".into(), "d".into())]]
        }
    );
}

#[test]
fn empty_lists_of_application_rules_restrict_nothing() {
    for rest in [
        "rules: {}",
        "rules: null",
        "rules: {http: []}",
        "rules: {kafka: null, dns: []}",
        "serverNames: []",
    ] {
        assert!(l7(rest).is_none(), "{rest}");
    }
    // Without rules there are no restrictions on the ports.
    let rule = port_rule("{ports: [{port: '0'}, {port: '1024', protocol: UDP}], rules: {http: []}}");
    assert!(rule.l7.is_none() && rule.ports.len() == 2);
}

#[test]
fn tls_and_listeners() {
    let read = l7(
        "serverNames: [A.b, '*.c'], rules: {http: [{}]}, terminatingTLS: {secret: {namespace: n, name: s}, \
                   certificate: c, privateKey: k}, originatingTLS: {secret: {name: t}, trustedCA: ca}",
    );
    assert_eq!(
        read.server_names,
        [
            FqdnPattern::Name("a.b".into()),
            FqdnPattern::Pattern("*.c".into())
        ]
    );
    assert_eq!(
        read.terminating_tls,
        Some(TlsContext {
            secret: "n/s".into(),
            trusted_ca: String::new(),
            certificate: "c".into(),
            private_key: "k".into()
        })
    );
    assert_eq!(
        read.originating_tls,
        Some(TlsContext {
            secret: "shop/t".into(),
            trusted_ca: "ca".into(),
            ..TlsContext::default()
        })
    );
    assert_eq!(
        l7("listener: {envoyConfig: {name: c}, name: l, priority: 3}").listener,
        Some(Listener {
            kind: "CiliumEnvoyConfig".into(),
            resource: "c".into(),
            name: "l".into(),
            priority: 3
        })
    );
}

#[test]
fn host_policies_may_have_application_rules() {
    let spec = ccnp(
        "  nodeSelector: {}\n  ingress: [{fromEntities: [all], toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{}]}}]}]\n",
    );
    let Ports::OneOf(rules) = &spec.ingress.expect("a section")[0].ports else {
        panic!()
    };
    assert!(matches!(rules[0].l7.rules, L7Rules::Http(_)));
}

#[test]
fn authentication() {
    for (mode, required) in [
        ("disabled", false),
        ("required", true),
        ("test-always-fail", true),
    ] {
        let rule = egress(&format!(
            "{{toEntities: [all], authentication: {{mode: {mode}}}}}"
        ));
        assert_eq!(rule.auth_required, required, "{mode}");
    }
}

#[test]
fn yaml_1_1_booleans_are_accepted_for_boolean_fields() {
    let parsed = parse(
        "f",
        &cnp("  ingress: [{}]\n  enableDefaultDeny: {ingress: no, egress: 'no'}\n"),
    );
    assert_eq!(
        super::errors_of(&parsed),
        ["f:7:44: egress must be true or false, found the string \"no\""]
    );
}
