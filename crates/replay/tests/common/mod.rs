//! A node with two workloads, policies for them, and a replay of frames.
#![allow(dead_code, reason = "not every test uses all of it")]

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use palisade_abi::{Event, EventKind, Reason};
use palisade_fqdn::{SelectorId, Selectors};
use palisade_inspect::{Limits, Rules, record::Record};
use palisade_model::{
    inventory::{Endpoint, Inventory},
    labels::{Labels, parse_label},
};
use palisade_policy::{
    compile::{Changes, Compiler, CompilerState, FileContent},
    parse::parse,
};
use palisade_replay::{
    Interface, NamePolicy, Replay, Report, Role, Settings, Timeouts,
    capture::{Captured, LinkType, PathHint},
};

/// Endpoint of the node.
pub const HOST: u16 = 1;
/// Endpoint of a workload with the label `app=a`.
pub const A: u16 = 2;
/// Endpoint of a workload with the label `app=b`.
pub const B: u16 = 3;

/// Addresses by family, IPv4 and IPv6.
pub const HOSTS: [&str; 2] = ["10.0.0.1", "fd00::1"];
pub const AS: [&str; 2] = ["10.0.1.10", "fd00:1::10"];
pub const BS: [&str; 2] = ["10.0.1.20", "fd00:1::20"];
pub const WORLDS: [&str; 2] = ["192.0.2.7", "2001:db8::7"];

const SECOND: u64 = 1_000_000_000;

/// Returns the compiled policies. `rules`: name, subject (`a` or `b`) and the lines of a spec.
pub fn compile(rules: &[(&str, &str, &str)]) -> Compiler {
    let endpoint = |id, name: &str, labels: &[&str], addresses: [&str; 2]| Endpoint {
        id,
        name: name.into(),
        namespace: if id == HOST {
            String::new()
        } else {
            "default".into()
        },
        labels: Labels::new(labels.iter().map(|text| parse_label(text))),
        named_ports: BTreeMap::new(),
        addresses: addresses.map(|text| text.parse().unwrap()).into(),
        audit: false,
    };
    let namespace = "k8s:io.kubernetes.pod.namespace=default";
    let mut inventory = Inventory {
        endpoints: vec![
            endpoint(HOST, "node", &["reserved:host"], HOSTS),
            endpoint(A, "a", &["k8s:app=a", namespace], AS),
            endpoint(B, "b", &["k8s:app=b", namespace], BS),
        ],
        ..Inventory::default()
    };
    inventory.options.dual_stack = true;
    let files = rules.iter().map(|(name, app, rules)| {
        let text = format!(
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: {name}, namespace: default}}\nspec:\n  \
             endpointSelector: {{matchLabels: {{app: {app}}}}}\n{rules}\n"
        );
        let parsed = parse(name, &text);
        assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
        let content = FileContent {
            policies: parsed.policies,
            cidr_groups: parsed.cidr_groups,
        };
        ((*name).to_owned(), Some(content))
    });
    let mut compiler = Compiler::new(&CompilerState::default());
    compiler
        .update(Changes {
            inventory: Some(inventory),
            files: files.collect(),
        })
        .unwrap();
    compiler
}

/// Returns the settings of a replay with the defaults of the configuration.
pub fn settings(compiler: &Compiler) -> Settings {
    let selectors = compiler.snapshot().fqdn.iter().map(|(endpoint, list)| {
        let list = list
            .iter()
            .map(|(number, pattern)| (SelectorId(*number), pattern));
        (*endpoint, Arc::new(Selectors::new(list).unwrap()))
    });
    let interface = |name: &str, index, role| Interface {
        name: name.into(),
        index,
        role,
        ether_types: [0; palisade_abi::ETHER_TYPES],
        no_failsafe: false,
    };
    Settings {
        host: HOST,
        timeouts: Timeouts {
            tcp_opening: 60 * SECOND,
            tcp_established: 8_000 * SECOND,
            tcp_closing: 10 * SECOND,
            udp: 60 * SECOND,
            other: 30 * SECOND,
            fragment: 5 * SECOND,
            trace_interval: 0,
            sweep: 10 * SECOND,
        },
        max_flows: 1_000,
        max_fragments: 100,
        inspectors: 0xff,
        interfaces: vec![
            interface("eth0", 1, Role::Nic),
            interface("veth-a", 2, Role::Workload(A)),
            interface("veth-b", 3, Role::Workload(B)),
        ],
        inspect: Limits::default(),
        fqdn: palisade_fqdn::Config::default(),
        names: NamePolicy {
            selectors: selectors.collect(),
            ..NamePolicy::default()
        },
        verify_server_names: false,
    }
}

/// Returns a replay under policies.
pub fn replay(rules: &[(&str, &str, &str)]) -> Replay {
    replay_with(rules, |_| {})
}

pub fn replay_with(rules: &[(&str, &str, &str)], change: impl FnOnce(&mut Settings)) -> Replay {
    let compiler = compile(rules);
    let mut settings = settings(&compiler);
    change(&mut settings);
    let prepare = Box::new(|sets: &_, previous: Option<&Rules>| Rules::prepare(sets, previous));
    Replay::new(compiler, prepare, settings)
}

/// A replay with a clock.
pub struct World {
    pub replay: Replay,
    /// Time of the next packet, ns.
    pub now: u64,
}

/// What a packet has led to.
#[derive(Debug, Default)]
pub struct Outcome {
    pub events: Vec<Event>,
    pub records: Vec<Record>,
}

impl Outcome {
    /// Returns the events of a kind: endpoint and reason.
    pub fn of(&self, kind: EventKind) -> Vec<(u16, Reason)> {
        let events = self.events.iter().filter(|event| event.kind == kind as u8);
        events
            .map(|event| (event.endpoint, Reason::from_u8(event.reason).unwrap()))
            .collect()
    }

    pub fn verdicts(&self) -> Vec<(u16, Reason)> {
        self.of(EventKind::PolicyVerdict)
    }

    pub fn drops(&self) -> Vec<(u16, Reason)> {
        self.of(EventKind::Drop)
    }
}

impl World {
    pub fn new(rules: &[(&str, &str, &str)]) -> Self {
        Self::of(replay(rules))
    }

    pub const fn of(replay: Replay) -> Self {
        Self {
            replay,
            now: 1_700_000_000 * SECOND,
        }
    }

    pub fn wait(&mut self, seconds: u64) {
        self.now += seconds * SECOND;
    }

    /// Replays an Ethernet frame at an unknown interface.
    pub fn send(&mut self, frame: &[u8]) -> Outcome {
        self.send_at("", PathHint::Unknown, frame)
    }

    /// Replays an Ethernet frame at an interface.
    pub fn send_at(&mut self, interface: &str, hint: PathHint, frame: &[u8]) -> Outcome {
        self.now += 1_000_000;
        let number = ["", "eth0", "veth-a", "veth-b", "eth1"]
            .iter()
            .position(|name| *name == interface)
            .unwrap();
        self.packet(&Captured {
            time: Some(self.now),
            interface: number,
            interface_name: interface,
            link: LinkType::ETHERNET,
            hint,
            data: frame,
            length: frame.len() as u32,
        })
    }

    pub fn packet(&mut self, captured: &Captured<'_>) -> Outcome {
        self.replay.packet(captured, None);
        let mut outcome = Outcome::default();
        for report in self.replay.reports() {
            match report {
                Report::Event(event) => outcome.events.push(event),
                Report::Record { record, .. } => outcome.records.push(*record),
            }
        }
        outcome
    }
}

/// An end of a TCP connection or a UDP flow.
pub type End = (IpAddr, u16);

pub fn end(address: &str, port: u16) -> End {
    (address.parse().unwrap(), port)
}
