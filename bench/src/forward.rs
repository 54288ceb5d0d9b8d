//! Packets per second forwarded through a node to a workload: plain forwarding, Palisade, nftables.

use std::{fmt::Write as _, fs, time::Duration};

use anyhow::{Context, Result, ensure};
use palisade_testbed::{
    Ns, Topology,
    daemon::{Daemon, Hooks, Settings},
    ns::wait_until,
    topology::{INNER, INTERNET_V4, NIC, WorkloadSpec},
};

use crate::{
    Effort,
    policies::{files, unused_address},
    progress,
    report::{Goal, Measure, Plot, Samples, Table, number},
    traffic::{Frame, Sender, Stream, mac},
};

/// Port of the traffic.
const PORT: u16 = 5_000;
/// Flows of the traffic.
const FLOWS: u16 = 64;

/// A packet filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Filter {
    /// No filter.
    None,
    /// Palisade on the workload's interface.
    Palisade,
    /// Palisade on the workload's interface, and on the NIC by tc.
    PalisadeNicTc,
    /// Palisade on the workload's interface, and on the NIC by XDP.
    PalisadeNicXdp,
    /// One rule with a set of N (address, port) pairs.
    NftSet,
    /// The same, after a rule that accepts established connections by conntrack.
    NftSetConntrack,
    /// N rules, the last of which matches.
    NftLinear,
}

impl Filter {
    const ALL: [Self; 7] = [
        Self::None,
        Self::Palisade,
        Self::PalisadeNicTc,
        Self::PalisadeNicXdp,
        Self::NftSet,
        Self::NftSetConntrack,
        Self::NftLinear,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::None => "kernel forward",
            Self::Palisade => "Palisade",
            Self::PalisadeNicTc => "Palisade, NIC too (tc)",
            Self::PalisadeNicXdp => "Palisade, NIC too (XDP)",
            Self::NftSet => "nft set",
            Self::NftSetConntrack => "nft set, conntrack",
            Self::NftLinear => "nft linear",
        }
    }
}

/// Returns nftables rules that allow the traffic by the last of `n` rules or elements and drop everything else.
fn nft_rules(filter: Filter, n: usize) -> String {
    let sources = (0..n - 1).map(unused_address).chain([INTERNET_V4.to_string()]);
    let (mut sets, mut rules) = (String::new(), String::new());
    if filter == Filter::NftLinear {
        for source in sources {
            let _ = writeln!(rules, "ip saddr {source} udp dport {PORT} accept");
        }
    } else {
        let elements: Vec<_> = sources.map(|source| format!("{source} . {PORT}")).collect();
        sets = format!(
            "set allowed {{ type ipv4_addr . inet_service; elements = {{ {} }} }}\n",
            elements.join(", ")
        );
        if filter == Filter::NftSetConntrack {
            rules.push_str("ct state established,related accept\n");
        }
        rules.push_str("ip saddr . udp dport @allowed accept\n");
    }
    // All filters allow the reverse direction, as Palisade does for replies.
    let _ = writeln!(rules, "ip daddr {INTERNET_V4} accept");
    format!(
        "table ip bench {{\n{sets}chain forward {{ type filter hook forward priority 0; policy drop;\n{rules}}}\n}}\n"
    )
}

/// A node with one filter between the internet and one workload, and the traffic from the internet.
struct Path {
    filter: Filter,
    topology: Topology,
    frames: Vec<Frame>,
    answers: Vec<Frame>,
    daemon: Option<Daemon>,
}

impl Path {
    fn new(filter: Filter) -> Result<Self> {
        let topology = Topology::new()?.workload(WorkloadSpec::new("server").label("app", "server"))?;
        let server = topology.get("server");
        let there = Stream {
            from_mac: mac(&topology.internet, INNER)?,
            to_mac: mac(&topology.node, NIC)?,
            from: INTERNET_V4,
            to: server.v4,
        };
        let back = Stream {
            from_mac: mac(&server.ns, INNER)?,
            to_mac: mac(&topology.node, &server.interface)?,
            from: server.v4,
            to: INTERNET_V4,
        };
        // The server receives frames with the MAC address of another host: its kernel counts and drops them at once.
        topology.node.ip(&format!(
            "neigh replace {} lladdr 02:00:5e:00:53:ff dev {} nud permanent\n",
            server.v4, server.interface
        ))?;
        let ports = 20_000..20_000 + FLOWS;
        Ok(Self {
            filter,
            frames: ports.clone().map(|port| there.frame(port, PORT)).collect(),
            answers: ports.map(|port| back.frame(PORT, port)).collect(),
            topology,
            daemon: None,
        })
    }

    /// Sets the filter up for `n` rules, and establishes all flows.
    fn prepare(&mut self, n: usize) -> Result<()> {
        let node = &self.topology.node;
        let (nic, host) = match self.filter {
            Filter::None => return Ok(()),
            Filter::NftSet | Filter::NftSetConntrack | Filter::NftLinear => {
                node.nft("flush ruleset")?;
                node.nft(&nft_rules(self.filter, n))?;
                return self.establish();
            }
            Filter::Palisade => (false, "auto"),
            Filter::PalisadeNicTc => (true, "tc"),
            Filter::PalisadeNicXdp => (true, "xdp"),
        };
        self.daemon = None; // The old daemon ends first.
        let files = files(n, "server", &INTERNET_V4.to_string(), PORT);
        let policies: Vec<_> = files
            .iter()
            .map(|(name, text)| (name.as_str(), text.as_str()))
            .collect();
        let hooks = Hooks {
            host,
            ..Hooks::default()
        };
        let settings = Settings {
            nic,
            hooks,
            ..Settings::default()
        };
        self.daemon = Some(Daemon::start(&self.topology, &settings, &policies)?);
        self.establish()
    }

    /// Sends a packet in each direction for every flow.
    fn establish(&self) -> Result<()> {
        let server = self.topology.get("server");
        let before = self.received()?;
        self.topology
            .internet
            .enter(|| Sender::open(INNER)?.send(&self.frames))?;
        let every_flow = || self.received().is_ok_and(|now| now >= before + u64::from(FLOWS));
        wait_until(
            "the first packet of every flow arrives",
            Duration::from_secs(2),
            every_flow,
        )?;
        server.ns.enter(|| Sender::open(INNER)?.send(&self.answers))
    }

    fn received(&self) -> Result<u64> {
        packets_received(&self.topology.get("server").ns, INNER)
    }

    /// Returns packets that arrived per CPU second of the sender.
    fn sample(&self, duration: Duration) -> Result<f64> {
        let before = self.received()?;
        let (sent, took) = self
            .topology
            .internet
            .enter(|| Sender::open(INNER)?.send_for(&self.frames, duration))?;
        std::thread::sleep(Duration::from_millis(20));
        let arrived = self.received()? - before;
        ensure!(
            arrived * 10 >= sent * 9,
            "{}: {sent} packets were sent and {arrived} arrived",
            self.filter.name()
        );
        Ok(arrived as f64 / took.as_secs_f64())
    }
}

pub(crate) fn packets_received(ns: &Ns, interface: &str) -> Result<u64> {
    let table = ns.enter(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
    let line = table
        .lines()
        .find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
    let packets = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    packets.with_context(|| format!("no packet counter of {interface}"))
}

/// Runs the measure.
pub fn measure(effort: Effort) -> Result<Measure> {
    let sizes: &[usize] = effort.pick(&[10, 10_000], &[10, 100, 1_000, 10_000]);
    let rounds = effort.pick(5, 11);
    let duration = effort.pick(Duration::from_millis(200), Duration::from_millis(500));
    let mut paths = Filter::ALL
        .into_iter()
        .map(Path::new)
        .collect::<Result<Vec<_>>>()?;
    let columns: Vec<_> = std::iter::once("rules")
        .chain(Filter::ALL.map(Filter::name))
        .collect();
    let mut table = Table::new("Packets that arrive, a second of one processor", &columns);
    let mut parts = Table::new(
        "The same as a part of plain forwarding in the same round",
        &columns,
    );
    let mut curves: Vec<_> = Filter::ALL
        .iter()
        .map(|f| (f.name().to_owned(), Vec::new()))
        .collect();
    let mut spread: f64 = 0.0;
    let mut flat = Samples::new();
    let [mut ahead, mut ahead_of_conntrack] = [f64::INFINITY; 2];
    for &n in sizes {
        progress(format_args!(
            "forward: {n} rules, {rounds} rounds of {} variants",
            paths.len()
        ));
        for path in &mut paths {
            path.prepare(n)
                .with_context(|| format!("{}, {n} rules", path.filter.name()))?;
        }
        let mut samples = vec![Samples::new(); paths.len()];
        for _ in 0..rounds {
            for (path, samples) in paths.iter().zip(&mut samples) {
                samples.push(path.sample(duration)?);
            }
        }
        let of = |filter: Filter| &samples[Filter::ALL.iter().position(|f| *f == filter).unwrap_or(0)];
        let plain = of(Filter::None);
        let ours = of(Filter::Palisade);
        flat.push(ours.against(plain).median());
        ahead = ahead.min(ours.against(of(Filter::NftSet)).median());
        ahead_of_conntrack = ahead_of_conntrack.min(ours.against(of(Filter::NftSetConntrack)).median());
        let relative: Vec<_> = samples.iter().map(|s| s.against(plain)).collect();
        spread = relative.iter().map(Samples::spread).fold(spread, f64::max);
        for (curve, samples) in curves.iter_mut().zip(&samples) {
            curve.1.push((n as f64, samples.median()));
        }
        table.row(
            number(n as f64),
            &samples.iter().map(Samples::median).collect::<Vec<_>>(),
        );
        parts.row(
            number(n as f64),
            &relative.iter().map(Samples::median).collect::<Vec<_>>(),
        );
    }
    let flat = flat.quantile(0.0) / flat.quantile(1.0);
    let goals = vec![
        Goal::at_least(
            "packets/s, Palisade flat in the number of rules: slowest size against fastest, as parts of plain forwarding",
            0.9,
            flat,
            " ×",
        ),
        Goal::at_least(
            "packets/s, Palisade ahead of nft set (no connection tracking), at every size",
            1.0,
            ahead,
            " ×",
        ),
        Goal::at_least(
            "packets/s, Palisade ahead of nft set with connection tracking, at every size",
            1.0,
            ahead_of_conntrack,
            " ×",
        ),
    ];
    Ok(Measure {
        name: "forward",
        title: "Packets a second through namespaces",
        method: format!(
            "{FLOWS} UDP flows of 60-byte frames from a packet socket behind the node's NIC, forwarded by the node to a workload, which counts them. All of it runs in the sender's thread, so packets per CPU time of the thread are the whole cost of a packet: making it, two veths, forwarding, and the filter. Each variant has a node of its own; {rounds} rounds of {} ms take them in turn. The matching rule is the last of N; Palisade has N policies, each a file. Samples, as parts of plain forwarding in their round, lie within {:.0} % of their medians (half the distance of the quartiles, worst case).",
            duration.as_millis(),
            spread * 100.0
        ),
        goals,
        tables: vec![table, parts],
        plot: Some(Plot {
            x: "rules",
            y: "packets a second",
            curves,
        }),
        notes: Vec::new(),
    })
}
