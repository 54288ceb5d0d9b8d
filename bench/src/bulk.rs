//! Throughput of one TCP connection to and from a workload: with Palisade on its interface, and without a firewall.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palisade_testbed::{
    Topology,
    daemon::{Daemon, Settings},
    output,
    server::Iperf3,
    topology::WorkloadSpec,
};
use serde_json::Value;

use crate::{
    Effort, progress,
    report::{Goal, Measure, Samples, Table, number},
};

const PORT: u16 = 5_201;

const POLICY: &str = "\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: iperf3
spec:
  endpointSelector:
    matchLabels:
      app: server
  ingress:
  - fromCIDR: [198.51.100.2/32]
    toPorts:
    - ports:
      - port: \"5201\"
        protocol: TCP
";

struct Path {
    topology: Topology,
    _server: Iperf3,
    _daemon: Option<Daemon>,
}

impl Path {
    fn new(guarded: bool) -> Result<Self> {
        let topology = Topology::new()?.workload(WorkloadSpec::new("server").label("app", "server"))?;
        let workload = topology.get("server");
        let server = Iperf3::start(&workload.ns, PORT)?;
        let unguarded_nic = Settings {
            nic: false,
            ..Settings::default()
        };
        let daemon = guarded
            .then(|| Daemon::start(&topology, &unguarded_nic, &[("iperf3.yaml", POLICY)]))
            .transpose()?;
        Ok(Self {
            topology,
            _server: server,
            _daemon: daemon,
        })
    }

    /// Returns Gbit/s that arrived, and Gbit per CPU second of both iperf3 processes together.
    fn sample(&self, reverse: bool, seconds: u32) -> Result<(f64, f64)> {
        let address = self.topology.get("server").v4.to_string();
        let mut command = self.topology.internet.command("iperf3");
        command.args([
            "-J",
            "-c",
            &address,
            "-p",
            &PORT.to_string(),
            "-t",
            &seconds.to_string(),
        ]);
        if reverse {
            command.arg("-R");
        }
        let out = output(&mut command, Duration::from_secs(u64::from(seconds) + 20))?;
        let report: Value = serde_json::from_slice(&out.stdout).context("iperf3's report")?;
        let rate = report["end"]["sum_received"]["bits_per_second"].as_f64();
        ensure!(out.status.success() && rate.is_some(), "iperf3: {report}");
        let gbit = rate.unwrap_or(f64::NAN) / 1e9;
        let used = |side: &str| {
            report["end"]["cpu_utilization_percent"][side]
                .as_f64()
                .unwrap_or(f64::NAN)
        };
        Ok((gbit, gbit * 100.0 / (used("host_total") + used("remote_total"))))
    }
}

/// Runs the measure.
pub fn measure(effort: Effort) -> Result<Measure> {
    let (rounds, seconds) = effort.pick((5, 1), (11, 2));
    progress(format_args!(
        "bulk: {rounds} rounds of {seconds} s, both directions"
    ));
    let (open, guarded) = (Path::new(false)?, Path::new(true)?);
    let columns = [
        "direction",
        "no firewall",
        "Palisade",
        "Palisade / no firewall",
        "spread",
    ];
    let mut table = Table::new("Gbit/s", &columns);
    let mut costs = Table::new(
        "Gbit for a second of a processor, both iperf3s and what the kernel does in them",
        &columns,
    );
    let mut goals = Vec::new();
    for (name, reverse) in [("to the workload", false), ("from the workload", true)] {
        let [mut plain, mut filtered, mut cheap, mut cost] = [const { Samples::new() }; 4];
        for _ in 0..rounds {
            let (without, with) = (open.sample(reverse, seconds)?, guarded.sample(reverse, seconds)?);
            plain.push(without.0);
            filtered.push(with.0);
            cheap.push(without.1);
            cost.push(with.1);
        }
        let ratio = filtered.against(&plain);
        let quotient = ratio.median();
        table.row(
            name,
            &[plain.median(), filtered.median(), quotient, ratio.spread()],
        );
        let by_cost = cost.against(&cheap);
        costs.row(
            name,
            &[cheap.median(), cost.median(), by_cost.median(), by_cost.spread()],
        );
        goals.push(Goal::at_least(
            format!("TCP bulk {name} through an endpoint interface against no firewall"),
            0.9,
            quotient,
            " ×",
        ));
        goals.push(Goal::reported(
            format!("the same {name} by processor time"),
            format!("{} ×", number(by_cost.median())),
        ));
    }
    Ok(Measure {
        name: "bulk",
        title: "TCP bulk through an endpoint interface",
        method: format!(
            "iperf3, one connection, {rounds} runs of {seconds} s in each direction, between the network behind the NIC and a workload; the two nodes in turn."
        ),
        goals,
        tables: vec![table, costs],
        plot: None,
        notes: Vec::new(),
    })
}
