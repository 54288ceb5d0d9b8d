//! Inventories, policies and packets from a tape of random bytes. A shorter tape or smaller numbers give simpler
//! results, so that proptest can shrink.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use palisade_abi::Direction;
use palisade_model::{
    inventory::{self, Endpoint, Enforcement, Inventory, NamedPort, Options},
    labels::{Labels, parse_label},
    rule::{
        CidrGroup, CidrRule, Entity, FqdnPattern, HttpRule, L4Protocol, L7, L7Rules, LabelSource, Location,
        Peer, Peers, Policy, PolicyKind, PortRule, PortSpec, Ports, Requirement, Rule, Selector, Spec,
        Subject, Test,
    },
};
use palisade_policy::compile::FileContent;

pub struct Tape<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Tape<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Returns a number below `n`; 0 at the end of the tape.
    pub fn pick(&mut self, n: usize) -> usize {
        let byte = self.bytes.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        usize::from(byte) % n
    }

    fn one<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.pick(of.len())].clone()
    }

    /// Returns true with probability 1/`n`.
    fn once_in(&mut self, n: usize) -> bool {
        self.pick(n) == n - 1
    }

    fn some<T>(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.pick(most + 1)).map(|_| make(self)).collect()
    }
}

fn labels(texts: &[&str]) -> Labels {
    Labels::new(texts.iter().map(|text| parse_label(text)))
}

const PREFIXES: [&str; 11] = [
    "::/1",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.2.3/32",
    "0.0.0.0/0",
    "10.0.0.0/8",
    "192.0.2.0/25",
    "2001:db8::/32",
    "2001:db8:1::/48",
    "::/0",
    "10.9.0.5/32",
];

pub const ADDRESSES: [&str; 14] = [
    "10.0.0.1",
    "10.0.0.2",
    "fd00::1",
    "fd00::3",
    "10.1.2.3",
    "10.1.2.4",
    "10.1.3.1",
    "10.9.0.5",
    "10.9.0.6",
    "192.0.2.1",
    "198.51.100.1",
    "2001:db8:1::1",
    "2001:db8:2::1",
    "10.0.0.9",
];

const PORTS: [u16; 7] = [80, 443, 81, 1, 65_535, 8080, 53];

pub fn inventory(tape: &mut Tape<'_>) -> Inventory {
    let options = Options {
        enforcement: match tape.pick(8) {
            6 => Enforcement::Always,
            7 => Enforcement::Never,
            _ => Enforcement::Default,
        },
        allow_localhost: tape.once_in(3),
        dual_stack: !tape.once_in(4),
        audit: tape.once_in(8),
        clear_text_http2: false,
        some_nics_closed: false,
    };
    let mut endpoints = Vec::new();
    for id in 1..=4u16 {
        if id > 1 && tape.once_in(4) {
            continue;
        }
        let all = match tape.pick(7) {
            0 | 1 => labels(&["k8s:app=a", "k8s:ns=x"]),
            2 => labels(&["k8s:app=b", "k8s:ns=x"]),
            3 => labels(&["k8s:app=b", "container:app=a", "k8s:ns=y"]),
            4 => labels(&["reserved:init"]),
            _ => labels(&[
                "k8s:app=c",
                "k8s:ns=y",
                "k8s:io.cilium.k8s.policy.cluster=default",
            ]),
        };
        let named_ports = tape.some(2, |tape| {
            let port = NamedPort {
                protocol: tape.one(&[6, 17, 0]),
                port: tape.one(&PORTS),
            };
            (tape.one(&["http", "dns"]).to_owned(), port)
        });
        endpoints.push(Endpoint {
            id,
            name: format!("e{id}"),
            namespace: "default".into(),
            labels: all,
            named_ports: named_ports.into_iter().collect(),
            addresses: vec![
                format!("10.0.0.{id}").parse().unwrap(),
                format!("fd00::{id}").parse().unwrap(),
            ],
            audit: tape.once_in(8),
        });
    }
    if !tape.once_in(3) {
        endpoints.push(Endpoint {
            id: 9,
            name: "node".into(),
            namespace: String::new(),
            labels: labels(tape.one(&[&["reserved:host"][..], &["reserved:host", "k8s:zone=a"][..]])),
            named_ports: BTreeMap::new(),
            addresses: vec!["10.0.0.9".parse().unwrap()],
            audit: false,
        });
    }
    let mut peers = Vec::new();
    for (number, kinds) in [
        &["k8s:app=a", "k8s:ns=y"][..],
        &["k8s:app=d"],
        &["reserved:remote-node", "k8s:zone=a"],
        &["reserved:kube-apiserver", "reserved:world-ipv4"],
        &["fqdn:*.example.com", "reserved:world"],
    ]
    .into_iter()
    .enumerate()
    {
        if tape.pick(2) == 1 {
            peers.push(inventory::Peer {
                name: format!("p{number}"),
                labels: labels(kinds),
                named_ports: tape
                    .some(1, |tape| {
                        let port = NamedPort {
                            protocol: tape.one(&[6, 17, 0]),
                            port: tape.one(&PORTS),
                        };
                        (tape.one(&["http", "dns"]).to_owned(), port)
                    })
                    .into_iter()
                    .collect(),
                prefixes: tape.some(2, |tape| {
                    tape.one(&["10.9.0.5/32", "10.9.0.0/24", "10.1.2.0/24"])
                        .parse()
                        .unwrap()
                }),
            });
        }
    }
    // Two peers cannot have the same prefix.
    let mut seen: Vec<IpNet> = Vec::new();
    for peer in &mut peers {
        peer.prefixes.retain(|prefix| {
            let new = !seen.contains(prefix);
            seen.push(*prefix);
            new
        });
    }
    Inventory {
        options,
        endpoints,
        peers,
    }
}

pub fn files(tape: &mut Tape<'_>) -> BTreeMap<String, FileContent> {
    (0..=tape.pick(4))
        .map(|number| {
            let name = format!("{number}.yaml");
            (name.clone(), file(tape, &name))
        })
        .collect()
}

pub fn file(tape: &mut Tape<'_>, name: &str) -> FileContent {
    let location = |line| Location {
        file: name.into(),
        line,
        column: 1,
    };
    FileContent {
        policies: vec![Policy {
            kind: tape.one(&[PolicyKind::Ccnp, PolicyKind::Ccnp, PolicyKind::Raw]),
            name: name.to_owned(),
            namespace: None,
            audit: tape.once_in(3),
            specs: (0..=tape.pick(2))
                .map(|n| spec(tape, &location(n as u32 * 10)))
                .collect(),
            location: location(1),
        }],
        cidr_groups: tape.some(1, |tape| CidrGroup {
            // The group of one file is referenced by name, the others by their labels.
            name: if name == "0.yaml" {
                "group".to_owned()
            } else {
                format!("group-of-{name}")
            },
            labels: vec![("kind".into(), tape.one(&["office", "lab"]).into())],
            cidrs: tape.some(2, prefix),
            location: location(1),
        }),
    }
}

fn spec(tape: &mut Tape<'_>, location: &Location) -> Spec {
    let subject = if tape.once_in(5) {
        Subject::Node(selector(tape))
    } else if tape.pick(2) == 0 {
        Subject::Endpoints(Selector::default())
    } else {
        Subject::Endpoints(selector(tape))
    };
    let mut section = |readable| {
        if tape.pick(3) == 0 {
            return None;
        }
        Some(tape.some(3, |tape| rule(tape, location, readable)))
    };
    let (ingress, ingress_deny, egress, egress_deny) =
        (section(true), section(false), section(true), section(false));
    Spec {
        subject,
        ingress,
        ingress_deny,
        egress,
        egress_deny,
        default_deny_ingress: tape.one(&[None, None, Some(true), Some(false)]),
        default_deny_egress: tape.one(&[None, None, Some(true), Some(false)]),
        description: String::new(),
        location: location.clone(),
    }
}

fn rule(tape: &mut Tape<'_>, location: &Location, allows: bool) -> Rule {
    let ports = if tape.pick(3) == 0 {
        Ports::Any
    } else {
        Ports::OneOf(tape.some(3, |tape| PortRule {
            ports: tape.some(3, port),
            l7: if allows && tape.once_in(2) {
                l7(tape)
            } else {
                L7::default()
            },
            location: location.clone(),
        }))
    };
    let peers = match tape.pick(8) {
        0 | 1 => Peers::Any,
        2 => Peers::None,
        _ => Peers::OneOf((0..=tape.pick(2)).map(|_| peer(tape)).collect()),
    };
    Rule {
        peers,
        ports,
        requires: if tape.once_in(12) {
            vec![selector(tape)]
        } else {
            Vec::new()
        },
        auth_required: allows && tape.once_in(16),
        location: location.clone(),
    }
}

fn l7(tape: &mut Tape<'_>) -> L7 {
    let mut l7 = L7::default();
    match tape.pick(4) {
        0 => l7.rules = L7Rules::Http(tape.some(1, |_| HttpRule::default())),
        1 => l7.rules = L7Rules::Dns(vec![FqdnPattern::Pattern("*".into())]),
        2 => l7.rules = L7Rules::Kafka(Vec::new()),
        _ => l7.server_names = vec![FqdnPattern::Name("a.test".into())],
    }
    l7
}

fn port(tape: &mut Tape<'_>) -> PortSpec {
    let protocol = tape.one(&[
        L4Protocol::Tcp,
        L4Protocol::Any,
        L4Protocol::Udp,
        L4Protocol::Sctp,
    ]);
    match tape.pick(8) {
        0..=2 => {
            let port = tape.one(&PORTS);
            PortSpec::Range {
                protocol,
                first: port,
                last: port,
            }
        }
        3 => PortSpec::Range {
            protocol,
            first: tape.one(&[1, 79, 80, 443]),
            last: tape.one(&[443, 8080, 65_535]),
        },
        4 => PortSpec::Range {
            protocol,
            first: 0,
            last: u16::MAX,
        },
        5 => PortSpec::Named {
            protocol,
            name: tape.one(&["http", "dns", "nobody"]).into(),
            last: tape.one(&[0, 0, 60, 9000]),
        },
        6 => PortSpec::Icmp {
            v6: tape.pick(2) == 1,
            kind: tape.one(&[8, 0, 128]),
        },
        _ => PortSpec::Range {
            protocol: L4Protocol::Other(tape.one(&[47, 1, 58])),
            first: 0,
            last: u16::MAX,
        },
    }
}

fn prefix(tape: &mut Tape<'_>) -> IpNet {
    tape.one(&PREFIXES).parse().unwrap()
}

fn peer(tape: &mut Tape<'_>) -> Peer {
    match tape.pick(13) {
        0..=3 => Peer::Labels(selector(tape)),
        4 => Peer::Nodes(selector(tape)),
        5 => Peer::Entity(tape.one(&[
            Entity::World,
            Entity::All,
            Entity::Cluster,
            Entity::Host,
            Entity::RemoteNode,
            Entity::KubeApiserver,
            Entity::WorldIpv4,
            Entity::Init,
            Entity::None,
        ])),
        6 | 7 => {
            let cidr = prefix(tape);
            let except = tape.some(2, prefix);
            Peer::Cidr(CidrRule {
                cidr,
                except: except
                    .into_iter()
                    .filter(|inner| cidr.contains(inner) && *inner != cidr)
                    .collect(),
            })
        }
        8 => {
            if tape.pick(2) == 0 {
                Peer::CidrGroup {
                    name: "group".into(),
                    except: tape.some(1, prefix),
                }
            } else {
                Peer::CidrGroupSelector {
                    selector: Selector {
                        requirements: vec![Requirement {
                            source: LabelSource::Named("cidrgroup".into()),
                            key: "kind".into(),
                            test: Test::In(vec!["lab".into()]),
                        }],
                    },
                    except: Vec::new(),
                }
            }
        }
        _ => Peer::Fqdn(tape.one(&[
            FqdnPattern::Pattern("*.example.com".into()),
            FqdnPattern::Name("api.example.com".into()),
            FqdnPattern::Name("a.test".into()),
            FqdnPattern::Pattern("*".into()),
        ])),
    }
}

fn selector(tape: &mut Tape<'_>) -> Selector {
    let requirements = tape.some(2, |tape| {
        let values: Vec<String> = (0..=tape.pick(2))
            .map(|_| tape.one(&["a", "b", "x", "y"]).into())
            .collect();
        Requirement {
            source: tape.one(&[
                LabelSource::Any,
                LabelSource::Named("k8s".into()),
                LabelSource::Named("container".into()),
            ]),
            key: tape.one(&["app", "ns", "zone", "world"]).into(),
            test: match tape.pick(5) {
                0 | 1 => Test::In(values),
                2 => Test::NotIn(values),
                3 => Test::Exists,
                _ => Test::DoesNotExist,
            },
        }
    });
    Selector { requirements }
}

/// A DNS answer for an endpoint: a name has an address.
#[derive(Clone, Debug, PartialEq)]
pub struct Fact {
    pub endpoint: u16,
    pub address: IpAddr,
    pub name: &'static str,
}

pub fn fact(tape: &mut Tape<'_>) -> Fact {
    Fact {
        endpoint: tape.one(&[1, 2, 9]),
        address: tape.one(&ADDRESSES).parse().unwrap(),
        name: tape.one(&["api.example.com", "www.example.com", "a.test", "b.c.example.com"]),
    }
}

/// A packet, seen from an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub endpoint: u16,
    pub direction: Direction,
    pub remote: IpAddr,
    pub protocol: u8,
    pub port: Option<u16>,
}

/// Returns packets between all endpoints and addresses.
pub fn packets() -> Vec<Packet> {
    let mut packets = Vec::new();
    for endpoint in [1, 2, 3, 4, 9] {
        for direction in palisade_abi::DIRECTIONS {
            for address in ADDRESSES {
                for (protocol, port) in [
                    (6, Some(80)),
                    (6, Some(443)),
                    (6, Some(8000)),
                    (6, None),
                    (17, Some(80)),
                    (1, Some(8)),
                    (47, Some(0)),
                ] {
                    packets.push(Packet {
                        endpoint,
                        direction,
                        remote: address.parse().unwrap(),
                        protocol,
                        port,
                    });
                }
            }
        }
    }
    packets
}
