//! Packets a second through a node: plain forwarding, Palisade, nftables.

use std::{fmt::Write as _, fs, time::Duration};

use anyhow::{Context, Result};
use palisade_testbed::{
    Ns, Topology,
    topology::{INNER, INTERNET_V4, NIC, WorkloadSpec},
};

use crate::{
    Effort, progress,
    report::{Goal, Measure, Plot, Samples, Table},
    traffic::{Sender, Stream, mac},
};

/// Port of the traffic.
const PORT: u16 = 5_000;
/// Flows of the traffic.
const FLOWS: u16 = 64;

/// A way to filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filter {
    /// None at all.
    None,
    /// One rule with a set of N (address, port) pairs.
    NftSet,
    /// N rules, the last of which matches.
    NftLinear,
}

impl Filter {
    const fn name(self) -> &'static str {
        match self {
            Self::None => "kernel forward",
            Self::NftSet => "nft set",
            Self::NftLinear => "nft linear",
        }
    }
}

/// The n-th of the addresses that rules name and nobody has: 172.16.0.0/12.
fn other_address(n: usize) -> String {
    format!("172.{}.{}.{}", 16 + (n >> 16), (n >> 8) & 255, n & 255)
}

/// nftables rules that allow the traffic by the last of `n` rules or elements and drop everything else.
fn nft_rules(filter: Filter, n: usize) -> String {
    let sources = (0..n - 1).map(other_address).chain([INTERNET_V4.to_string()]);
    let mut script = String::from("table ip bench {\n");
    let mut rules = String::new();
    match filter {
        Filter::None => {}
        Filter::NftSet => {
            script.push_str("set allowed { type ipv4_addr . inet_service; elements = {\n");
            for source in sources {
                let _ = writeln!(script, "{source} . {PORT},");
            }
            script.push_str("} }\n");
            rules.push_str("ip saddr . udp dport @allowed accept\n");
        }
        Filter::NftLinear => {
            for source in sources {
                let _ = writeln!(rules, "ip saddr {source} udp dport {PORT} accept");
            }
        }
    }
    let _ = write!(
        script,
        "chain forward {{ type filter hook forward priority 0; policy drop;\n{rules}}}\n}}\n"
    );
    script
}

/// A node between the internet and one workload, and the traffic from the one to the other.
struct Path {
    topology: Topology,
    frames: Vec<[u8; 60]>,
}

impl Path {
    fn new() -> Result<Self> {
        let topology = Topology::new()?.workload(WorkloadSpec::new("server").label("app", "server"))?;
        let server = topology.get("server");
        let stream = Stream {
            from_mac: mac(&topology.internet, INNER)?,
            to_mac: mac(&topology.node, NIC)?,
            from: INTERNET_V4,
            to: server.v4,
            port: PORT,
            first_source_port: 20_000,
            flows: FLOWS,
        };
        // The server is sent frames for a neighbour: it counts and drops them before it would answer.
        topology.node.ip(&format!(
            "neigh replace {} lladdr 02:00:5e:00:53:ff dev {} nud permanent\n",
            server.v4, server.interface
        ))?;
        Ok(Self {
            topology,
            frames: (0..FLOWS).map(|flow| stream.frame(flow)).collect(),
        })
    }

    fn received(&self) -> Result<u64> {
        packets_received(&self.topology.get("server").ns, INNER)
    }

    /// Packets that arrived in a second.
    fn sample(&self, duration: Duration) -> Result<f64> {
        let before = self.received()?;
        let (sent, took) = self
            .topology
            .internet
            .enter(|| Sender::open(INNER)?.send_for(&self.frames, duration))?;
        std::thread::sleep(Duration::from_millis(20));
        let arrived = self.received()? - before;
        anyhow::ensure!(
            arrived * 10 >= sent * 9,
            "{sent} packets were sent and {arrived} arrived: the filter does not let the traffic through"
        );
        Ok(arrived as f64 / took.as_secs_f64())
    }
}

fn packets_received(ns: &Ns, interface: &str) -> Result<u64> {
    let table = ns.enter(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
    let packets = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    packets.with_context(|| format!("no packet counter of {interface}"))
}

/// Runs it.
pub fn measure(effort: Effort) -> Result<Measure> {
    let sizes: &[usize] = effort.pick(&[10, 1_000, 10_000], &[10, 100, 1_000, 10_000]);
    let rounds = effort.pick(3, 7);
    let duration = effort.pick(Duration::from_millis(300), Duration::from_secs(1));
    let path = Path::new()?;
    let filters = [Filter::None, Filter::NftSet, Filter::NftLinear];
    let mut table = Table::new(
        "Packets a second",
        &["rules", "kernel forward", "nft set", "nft linear"],
    );
    for &n in sizes {
        progress(format_args!("forward: {n} rules"));
        let mut samples = filters.map(|_| Samples::default());
        for _ in 0..rounds {
            for (filter, samples) in filters.iter().zip(&mut samples) {
                let node = &path.topology.node;
                node.nft("flush ruleset")?;
                if *filter != Filter::None {
                    node.nft(&nft_rules(*filter, n))?;
                }
                samples.push(path.sample(duration)?);
            }
        }
        table.row(n.to_string(), &samples.each_ref().map(Samples::median));
    }
    let _ = Filter::name;
    Ok(Measure {
        name: "forward",
        title: "Packets a second through namespaces",
        method: String::new(),
        goals: Vec::<Goal>::new(),
        tables: vec![table],
        plot: None::<Plot>,
        notes: Vec::new(),
    })
}
