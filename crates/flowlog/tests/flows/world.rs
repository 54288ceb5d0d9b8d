//! Endpoints and events of the tests: a client, a web server, a database on another node, and the node.

use std::{net::IpAddr, sync::Arc};

use palisade_abi::{Addr, Event, EventKind, MatchKind, Reason, event_flags, identity, protocol};
use palisade_flowlog::{
    FilterBuilder, Filters, Flow, FlowResolver, Owner, Policy, RuleInfo, Timestamp, filter::ApiFilters,
    flow::Workload,
};

pub const CLIENT: u32 = 23217;
pub const WEB: u32 = 17513;
pub const DATABASE: u32 = 16777219;

pub const ALLOW_WEB: u32 = 7;
pub const DEFAULT_DENY: u32 = 8;
pub const UNENFORCED: u32 = 9;
pub const ALLOW_DNS: u32 = 10;

/// Offset of the monotonic clock: 2026-04-28T01:04:16.656Z.
pub const OFFSET: i64 = 1_777_338_256_656_000_000;

pub struct World;

fn owner(endpoint: u16, identity: u32, namespace: &str, name: &str) -> Owner {
    Owner {
        endpoint,
        identity,
        namespace: namespace.into(),
        name: name.into(),
        workloads: match identity {
            identity::HOST => Arc::default(),
            _ => Workload::of_endpoint(&name.into()),
        },
    }
}

impl FlowResolver for World {
    fn node(&self) -> Arc<str> {
        "node1".into()
    }

    fn node_labels(&self) -> Arc<[Arc<str>]> {
        ["zone=a".into(), "worker=".into()].into()
    }

    fn labels(&self, identity: u32) -> Option<Arc<[Arc<str>]>> {
        let labels: &[&str] = match identity {
            CLIENT => &[
                "k8s:app=client",
                "k8s:io.kubernetes.pod.namespace=default",
                "k8s:tier=front",
            ],
            WEB => &["k8s:app=web", "k8s:io.kubernetes.pod.namespace=shop"],
            DATABASE => &["cidr:10.0.9.0/24", "k8s:app=database"],
            identity::HOST => &["reserved:host"],
            identity::WORLD => &["reserved:world"],
            _ => return None,
        };
        Some(labels.iter().map(|label| Arc::from(*label)).collect())
    }

    fn endpoint(&self, id: u16) -> Option<Owner> {
        Some(match id {
            1 => owner(1, identity::HOST, "", "node1"),
            11 => owner(11, CLIENT, "default", "internal-client"),
            12 => owner(12, WEB, "shop", "web"),
            _ => return None,
        })
    }

    fn address(&self, address: IpAddr) -> Option<Owner> {
        match address.to_string().as_str() {
            "10.0.0.1" => self.endpoint(1),
            "10.0.1.10" | "fd00::10" => self.endpoint(11),
            "10.0.1.20" | "fd00::20" => self.endpoint(12),
            "10.0.9.5" => Some(owner(0, DATABASE, "", "db-1")),
            _ => None,
        }
    }

    fn rule(&self, id: u32) -> Option<RuleInfo> {
        let policy = |name: &str| Policy {
            name: name.into(),
            namespace: "shop".into(),
            labels: Arc::default(),
            revision: 3,
            kind: "CiliumNetworkPolicy".into(),
        };
        Some(match id {
            ALLOW_WEB => RuleInfo {
                policies: [policy("allow-web")].into(),
                text: "policy shop/allow-web ingress rule 1".into(),
                location: "shop.yaml:12".into(),
                default_deny: false,
            },
            DEFAULT_DENY => RuleInfo {
                policies: [policy("allow-web"), policy("isolate")].into(),
                text: "default deny of egress by policy shop/allow-web and 1 other".into(),
                location: "shop.yaml:1".into(),
                default_deny: true,
            },
            ALLOW_DNS => RuleInfo {
                policies: [policy("names")].into(),
                text: "policy shop/names egress rule 1".into(),
                location: "names.yaml:9".into(),
                default_deny: false,
            },
            UNENFORCED => RuleInfo {
                text: "no policy enforces ingress".into(),
                ..RuleInfo::default()
            },
            _ => return None,
        })
    }

    fn interface(&self, ifindex: u32) -> Option<Arc<str>> {
        (ifindex == 5).then(|| "veth-client".into())
    }

    fn dns_names(&self, endpoint: u16, address: IpAddr) -> Arc<[Arc<str>]> {
        match (endpoint, address.to_string().as_str()) {
            (11, "34.117.118.44") => [Arc::from("ifconfig.me"), Arc::from("other.example")].into(),
            _ => Arc::default(),
        }
    }
}

/// First packet from client to web:80, allowed by the policy of the web server.
pub fn event() -> Event {
    Event {
        time: 0,
        source: address("10.0.1.10"),
        destination: address("10.0.1.20"),
        source_port: 54006,
        destination_port: 80,
        source_identity: CLIENT,
        destination_identity: WEB,
        rule: ALLOW_WEB,
        ifindex: 5,
        length: 60,
        endpoint: 12,
        kind: EventKind::PolicyVerdict as u8,
        reason: Reason::Allowed as u8,
        flags: 0,
        protocol: protocol::TCP,
        tcp_flags: 0x02,
        match_kind: MatchKind::L3L4 as u8,
        trace_point: 0,
        decision: 2,
        ether_type: 0,
        source_mac: [2, 0, 0, 0, 0, 0x10],
        destination_mac: [2, 0, 0, 0, 0, 0x20],
        forward_packets: 0,
        forward_bytes: 0,
        reply_packets: 0,
        reply_bytes: 0,
    }
}

/// Packet from client to world, denied by the egress policy of the client.
pub fn denied(kind: EventKind) -> Event {
    Event {
        destination: address("151.101.3.5"),
        destination_identity: identity::WORLD,
        rule: DEFAULT_DENY,
        endpoint: 11,
        kind: kind as u8,
        reason: Reason::PolicyDenied as u8,
        flags: event_flags::EGRESS | event_flags::FLOW_EGRESS | event_flags::REPLY_UNKNOWN,
        match_kind: MatchKind::None as u8,
        decision: 0,
        ..event()
    }
}

pub fn address(text: &str) -> Addr {
    text.parse::<IpAddr>().expect("an address").into()
}

pub fn flow(event: &Event) -> Flow {
    Flow::from_event(event, &World, OFFSET)
}

/// Returns the letters of the flows that pass the filters of these flags, after the filters were sent as JSON.
pub fn passing(flows: &[(char, Flow)], flags: &[(&str, &str)]) -> String {
    let mut builder = FilterBuilder::new(Timestamp(OFFSET));
    for (flag, value) in flags {
        builder
            .flag(flag, value)
            .unwrap_or_else(|error| panic!("{flags:?}: {error}"));
    }
    let filters = builder.finish_api().expect("filters");
    let text = serde_json::to_string(&filters).expect("JSON");
    let filters: ApiFilters = serde_json::from_str(&text).expect("read back");
    let filters = Filters::compile(&filters).expect("compiled filters");
    flows
        .iter()
        .filter(|(_, flow)| filters.matches(flow))
        .map(|(name, _)| *name)
        .collect()
}
