//! A world of applications: who calls, who serves, and the four ways between them.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
};

use anyhow::{Context, Result};
use palisade_testbed::{
    Daemon, Ns, Topology,
    daemon::Settings,
    rawtcp,
    tls::{Certificate, certificate},
    topology::{FAMILIES, Family, INNER, NIC},
};
use serde_json::Value;

/// Who calls whom: out of a workload, into one, both, into the node, out of it, and between node and workload.
pub const WAYS: &[(&str, &str)] = &[
    ("client", "internet"),
    ("internet", "server"),
    ("client", "server"),
    ("internet", "node"),
    ("node", "internet"),
    ("client", "node"),
    ("node", "server"),
];

/// Workloads `client` and `server`, the node and the internet; no servers yet.
#[derive(Debug)]
pub struct Apps {
    /// Namespaces and veths.
    pub topology: Topology,
    /// For all servers.
    pub certificate: Certificate,
}

impl Apps {
    /// Everything in place.
    pub fn new() -> Result<Self> {
        let topology = Topology::new()?.apps(&["client", "server"])?;
        for name in ["client", "node", "internet"] {
            rawtcp::prepare(topology.ns(name))?;
        }
        topology.meet()?;
        let certificate = certificate(topology.dir(), &["*.example", "testbed.example"])?;
        Ok(Self {
            topology,
            certificate,
        })
    }

    /// The daemon on this world's node.
    pub fn daemon(&self, settings: &Settings, policies: &[(&str, &str)]) -> Result<Daemon> {
        Daemon::start(&self.topology, settings, policies)
    }

    /// The namespace of a name.
    #[must_use]
    pub fn ns(&self, name: &str) -> &Ns {
        self.topology.ns(name)
    }

    /// Somebody's address and a port.
    #[must_use]
    pub fn at(&self, name: &str, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.topology.addr(name, family), port)
    }

    /// Both addresses of somebody.
    #[must_use]
    pub fn both(&self, name: &str) -> [IpAddr; 2] {
        FAMILIES.map(|family| self.topology.addr(name, family))
    }

    /// The address from which somebody speaks to somebody.
    #[must_use]
    pub fn source(&self, from: &str, to: &str, family: Family) -> IpAddr {
        if from == "node" && self.topology.all().any(|w| w.name == to) {
            return self.topology.get(to).gateway(family);
        }
        self.topology.addr(from, family)
    }
}

/// A world of applications.
///
/// # Panics
/// If it cannot be made.
#[must_use]
pub fn apps() -> Apps {
    Apps::new().unwrap_or_else(|error| panic!("{error:#}"))
}

/// A policy that has what some ports carry read. `subject`: the workload `client` or `server`, or `node`.
///
/// `rules` stands below `toPorts: - ports: ...`, indented by six.
#[must_use]
pub fn policy(subject: &str, direction: &str, ports: &[u16], rules: &str) -> String {
    let (kind, selector) = if subject == "node" {
        ("CiliumClusterwideNetworkPolicy", "nodeSelector: {}".to_owned())
    } else {
        (
            "CiliumNetworkPolicy",
            format!("endpointSelector: {{matchLabels: {{app: {subject}}}}}"),
        )
    };
    let peers = if direction == "egress" {
        "toEntities"
    } else {
        "fromEntities"
    };
    let ports: Vec<String> = ports
        .iter()
        .map(|port| format!("{{port: \"{port}\", protocol: TCP}}"))
        .collect();
    format!(
        "apiVersion: cilium.io/v2\nkind: {kind}\nmetadata: {{name: {subject}-{direction}}}\nspec:\n  {selector}\n  \
         {direction}:\n  - {peers}: [all]\n    toPorts:\n    - ports: [{}]\n{rules}",
        ports.join(", ")
    )
}

/// The same rules for all four ways: out of `client`, into `server`, into the node and out of it.
#[must_use]
pub fn policies(ports: &[u16], rules: &str) -> Vec<(String, String)> {
    [
        ("client", "egress"),
        ("server", "ingress"),
        ("node", "ingress"),
        ("node", "egress"),
    ]
    .map(|(subject, direction)| {
        (
            format!("{subject}-{direction}.yaml"),
            policy(subject, direction, ports, rules),
        )
    })
    .into()
}

/// As the daemon wants them.
#[must_use]
pub fn borrowed(policies: &[(String, String)]) -> Vec<(&str, &str)> {
    policies.iter().map(|(n, c)| (n.as_str(), c.as_str())).collect()
}

/// What a server that is asked by bytes says: a few bytes to each request, once its body is there.
#[must_use]
pub fn answers_requests(dealt_with: &mut usize, all: &[u8]) -> Vec<u8> {
    let mut said = Vec::new();
    while let Some(length) = request_length(&all[*dealt_with..]) {
        *dealt_with += length;
        said.extend_from_slice(OK);
    }
    said
}

/// How long the first request is, if it is whole. Its chunks have no empty lines in them.
fn request_length(bytes: &[u8]) -> Option<usize> {
    let block = |from: usize| -> Option<usize> {
        let end = bytes.get(from..)?.windows(4).position(|w| w == b"\r\n\r\n")?;
        Some(from + end + 4)
    };
    let head = block(0)?;
    let text = String::from_utf8_lossy(&bytes[..head]).to_ascii_lowercase();
    if text.contains("transfer-encoding: chunked") {
        return block(head);
    }
    let length = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok())
        .unwrap_or(0);
    Some(head + length).filter(|whole: &usize| *whole <= bytes.len())
}

/// Each of these answers.
pub const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

/// Packets that workers have taken in so far.
pub fn packets_read(daemon: &Daemon) -> Result<u64> {
    let status = daemon.status()?;
    let workers = status["workers"]["workers"].as_array().context("workers")?;
    Ok(workers.iter().filter_map(|w| w["packets_in"].as_u64()).sum())
}

/// The conntrack entries of connections to a port.
pub fn tracked(daemon: &Daemon, port: u16) -> Result<Vec<Value>> {
    let all = daemon.json(&["bpf", "ct", "list"])?;
    Ok(all
        .as_array()
        .into_iter()
        .flatten()
        .filter(|entry| entry.to_string().contains(&port.to_string()))
        .cloned()
        .collect())
}

/// Calls `attempt` in a loop on a thread of its own until it is stopped.
#[derive(Debug)]
pub struct Loop<T> {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: thread::JoinHandle<Vec<T>>,
}

impl<T: Send + 'static> Loop<T> {
    /// Starts it.
    pub fn start(mut attempt: impl FnMut(usize) -> T + Send + 'static) -> Self {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            let mut results = Vec::new();
            while !stopped.load(std::sync::atomic::Ordering::Relaxed) {
                results.push(attempt(results.len()));
            }
            results
        });
        Self { stop, thread }
    }

    /// Stops it; what came of each attempt.
    ///
    /// # Panics
    /// If the attempt has panicked.
    #[must_use]
    pub fn finish(self) -> Vec<T> {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Whoever sends leaves checksums to its interface, as programs find it. (Large packets too, where no XDP program
/// stands at the other end of the veth: the kernel takes that away then.)
///
/// # Panics
/// If somebody's interface has that switched off.
#[track_caller]
pub fn has_default_offloads(apps: &Apps) {
    for (name, interface) in [
        ("client", INNER),
        ("server", INNER),
        ("internet", INNER),
        ("node", NIC),
    ] {
        let features = apps
            .ns(name)
            .run("ethtool", &["-k", interface])
            .unwrap_or_else(|error| panic!("{error:#}"));
        assert!(features.contains("tx-checksumming: on"), "{name}: {features}");
    }
}
