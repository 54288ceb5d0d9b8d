//! Workloads, hosts and servers to test policies with, and cases: policies with the expected results of connections.
//!
//! A case is a policy file below `cases/netns/` whose leading comments are checks, one per line:
//!
//! ```yaml
//! # front -> back tcp/80 open
//! # far   -> back tcp/80 drop
//! # 4 front -> back ping open       (IPv4 only; else both families)
//! apiVersion: cilium.io/v2
//! ```
//!
//! `open`: the destination answers. `drop`: no answer arrives, and the destination has received nothing.
//! Kinds of attempts: `tcp/PORT`, `udp/PORT` (echo), `udp/PORT/BYTES` (fragmented if large), `ping`,
//! `ping/BYTES`; and packets without an answer, which must arrive: `sctp/PORT`, `icmp/TYPE`, `proto/NUMBER`.
//!
//! Depends on `palisade-testbed`; runs the built binary. Start at a file of `tests/`.
#![forbid(unsafe_code)]

pub mod evasion;
pub mod fixtures;
pub mod flows;
pub mod guide;
pub mod opaque_tls;
pub mod setup;
pub mod tmux;

use std::{
    fmt::{self, Write as _},
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use palisade_testbed::{
    Daemon, Ns, Outcome, Topology,
    capture::Capture,
    daemon::Settings,
    ns::wait_until,
    packet,
    probe::{Kind, Probe, RawReceiver, run_all, send_raw},
    server::{Contact, Echo},
    topology::{FAMILIES, Family, INNER, WorkloadSpec},
};

/// Longest time until an allowed flow passes, also on a busy machine.
pub const OPEN: Duration = Duration::from_secs(20);
/// Time to wait before a test concludes that a packet does not arrive.
pub const CLOSED: Duration = Duration::from_millis(400);

/// TCP ports on which every host and workload answers.
pub const TCP: &[u16] = &[22, 80, 81, 443, 8080, 8085];
/// UDP ports on which every host and workload answers.
pub const UDP: &[u16] = &[53, 80, 8080];

/// Hosts behind the NIC: name, IPv4, IPv6.
pub const HOSTS: &[(&str, &str, &str)] = &[
    ("far", "203.0.113.10", "2001:db8:a::10"),
    ("near", "203.0.113.66", "2001:db8:a:ff::66"),
    ("remote-db", "192.0.2.5", "2001:db8:c::5"),
    ("node2", "192.0.2.20", "2001:db8:c::20"),
    ("api", "192.0.2.30", "2001:db8:c::30"),
];

/// The same hosts as `[[peer]]` tables of the configuration.
const PEERS: &str = r#"
[[namespace]]
name = "prod"
labels = { env = "production" }

[[peer]]
name = "remote-db"
addresses = ["192.0.2.5", "2001:db8:c::5"]
labels = { app = "db" }

[[peer]]
name = "node2"
addresses = ["192.0.2.20", "2001:db8:c::20"]
entity = "remote-node"
labels = { zone = "b" }

[[peer]]
name = "api"
addresses = ["192.0.2.30", "2001:db8:c::30"]
entity = "kube-apiserver"
"#;

/// Workloads, hosts and servers, without a daemon.
///
/// Workloads: `front` (app=front), `back` (app=back, named ports http and dns), `db` (app=db), and `pfront` (app=front, in
/// the namespace `prod`). All of them, the hosts and the node answer on [`TCP`] and [`UDP`].
#[derive(Debug)]
pub struct World {
    servers: Vec<(String, Echo)>,
    /// Namespaces and veths.
    pub topology: Topology,
}

impl World {
    /// Creates the namespaces and starts the servers.
    pub fn new() -> Result<Self> {
        let addresses: Vec<&str> = HOSTS.iter().flat_map(|(_, v4, v6)| [*v4, *v6]).collect();
        let topology = Topology::new()?
            .workload(
                WorkloadSpec::new("front")
                    .label("app", "front")
                    .label("tier", "web"),
            )?
            .workload(
                WorkloadSpec::new("back")
                    .label("app", "back")
                    .port("http", "80/TCP")
                    .port("dns", "53/UDP"),
            )?
            .workload(WorkloadSpec::new("db").label("app", "db").label("tier", "data"))?
            .workload(
                WorkloadSpec::new("pfront")
                    .namespace("prod")
                    .label("app", "front"),
            )?
            .internet_addresses(&addresses)?;
        let mut world = Self {
            servers: Vec::new(),
            topology,
        };
        for name in ["front", "back", "db", "pfront"] {
            let addresses = FAMILIES.map(|f| world.topology.addr(name, f));
            world.serve(name, &addresses)?;
        }
        // The node's addresses: on its NIC, and as the gateway of each workload.
        let mut own: Vec<IpAddr> = FAMILIES.iter().map(|f| world.topology.addr("node", *f)).collect();
        own.extend(world.topology.all().flat_map(|w| FAMILIES.map(|f| w.gateway(f))));
        world.serve("node", &own)?;
        let mut outside: Vec<IpAddr> = FAMILIES
            .iter()
            .map(|f| world.topology.addr("internet", *f))
            .collect();
        outside.extend(addresses.iter().filter_map(|a| a.parse::<IpAddr>().ok()));
        world.serve("internet", &outside)?;
        Ok(world)
    }

    fn serve(&mut self, name: &str, addresses: &[IpAddr]) -> Result<()> {
        let echo = Echo::start(self.ns(name), addresses, TCP, UDP)?;
        self.servers.push((name.to_owned(), echo));
        Ok(())
    }

    /// Returns the network namespace of a workload, a host or the node.
    #[must_use]
    pub fn ns(&self, name: &str) -> &Ns {
        if HOSTS.iter().any(|(host, ..)| *host == name) {
            &self.topology.internet
        } else {
            self.topology.ns(name)
        }
    }

    /// Returns the address of a workload, a host or the node.
    ///
    /// # Panics
    /// If there is none of this name.
    #[must_use]
    pub fn addr(&self, name: &str, family: Family) -> IpAddr {
        match HOSTS.iter().find(|(host, ..)| *host == name) {
            Some((_, v4, v6)) => {
                let text = if family == Family::V4 { v4 } else { v6 };
                text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
            }
            None => self.topology.addr(name, family),
        }
    }

    /// Returns an address and a port.
    #[must_use]
    pub fn at(&self, name: &str, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.addr(name, family), port)
    }

    /// Returns the source address towards `to`, for a sender with several addresses.
    fn source(&self, from: &str, to: &str, family: Family) -> IpAddr {
        match from {
            // The node sends to a workload from its address on that link.
            "node" if self.topology.all().any(|w| w.name == to) => self.topology.get(to).gateway(family),
            _ => self.addr(from, family),
        }
    }

    /// Returns the contacts of all servers after these counts.
    fn contacts_since(&self, counts: &[usize]) -> Vec<Contact> {
        let all = self.servers.iter().zip(counts);
        all.flat_map(|((_, echo), count)| echo.contacts().split_off(*count))
            .collect()
    }

    /// Starts the daemon on the node.
    pub fn daemon(&self, settings: Settings, policies: &[(&str, &str)]) -> Result<Daemon> {
        Daemon::start(&self.topology, &with_peers(settings), policies)
    }

    /// Makes all attempts at the same time. Returns one line for each that came out differently.
    pub fn check(&self, lines: &str) -> Result<Vec<String>> {
        self.run(&parse_checks(lines)?)
    }

    fn run(&self, checks: &[Check]) -> Result<Vec<String>> {
        let before: Vec<usize> = self
            .servers
            .iter()
            .map(|(_, echo)| echo.contacts().len())
            .collect();
        let mut probes = Vec::new();
        let mut arrivals = Vec::new();
        for check in checks {
            let from = self.ns(&check.from).clone();
            let source = self.source(&check.from, &check.to, check.family);
            let kind = match check.what {
                What::Tcp(_) => Kind::Tcp,
                What::Udp(_, size) => Kind::Udp(size),
                What::Ping(size) => Kind::Ping(size),
                What::Sctp(_) | What::Icmp(_) | What::Protocol(_) => {
                    arrivals.push(check);
                    continue;
                }
            };
            let port = check.what.port();
            let to = self.at(&check.to, check.family, port);
            let timeout = if check.open { OPEN } else { CLOSED };
            probes.push((
                check,
                (
                    Probe {
                        from,
                        source: Some(source),
                        to,
                        kind,
                    },
                    timeout,
                ),
            ));
        }
        let attempts: Vec<_> = probes.iter().map(|(_, probe)| probe.clone()).collect();
        // `neigh_update` marks a neighbour as valid before it has sent the packets that waited for the neighbour's
        // address. Later fragments of the same datagram can overtake the first fragment then, and the programs drop
        // them (175). So short datagrams resolve the neighbours before fragmented ones are sent.
        let short: Vec<_> = probes
            .iter()
            .filter(|(check, (probe, _))| {
                check.open && matches!(probe.kind, Kind::Udp(size) | Kind::Ping(size) if size > UNFRAGMENTED)
            })
            .map(|(_, (probe, timeout))| {
                let kind = match probe.kind {
                    Kind::Ping(_) => Kind::Ping(UNFRAGMENTED),
                    _ => Kind::Udp(UNFRAGMENTED),
                };
                (
                    Probe {
                        kind,
                        ..probe.clone()
                    },
                    *timeout,
                )
            })
            .collect();
        let _ = run_all(&short);
        let outcomes = run_all(&attempts);
        let mut failures = Vec::new();
        let contacts = self.contacts_since(&before);
        for ((check, (probe, _)), outcome) in probes.iter().zip(outcomes) {
            let expected = if check.open {
                Outcome::Open
            } else {
                Outcome::TimedOut
            };
            if outcome != expected {
                failures.push(format!("{check}: {outcome:?}"));
            }
            let tcp = matches!(check.what, What::Tcp(_));
            let reached = contacts
                .iter()
                .any(|c| Some(c.from.ip()) == probe.source && c.to == probe.to && c.tcp == tcp);
            if !check.open && reached {
                failures.push(format!("{check}: the packet reached its destination"));
            }
        }
        for check in arrivals {
            if self.arrives(check)? != check.open {
                failures.push(format!(
                    "{check}: {}",
                    if check.open { "did not arrive" } else { "arrived" }
                ));
            }
        }
        Ok(failures)
    }

    /// Sends a single packet that no server answers. Returns whether it arrived at its destination's interface.
    fn arrives(&self, check: &Check) -> Result<bool> {
        let source = self.source(&check.from, &check.to, check.family);
        let to = self.addr(&check.to, check.family);
        let (protocol, payload) = match check.what {
            What::Sctp(port) => (packet::protocol::SCTP, packet::sctp_init(5000, port)),
            What::Icmp(kind) if to.is_ipv4() => (packet::protocol::ICMP, packet::icmp(kind, 0, &[0; 16])),
            What::Icmp(kind) => (packet::protocol::ICMPV6, packet::icmp(kind, 0, &[0; 16])),
            What::Protocol(number) => (number, vec![0; 32]),
            _ => bail!("{check} is not about arrival"),
        };
        let wait = if check.open { OPEN } else { CLOSED };
        if check.to == "node" {
            // A capture on the node's own interface would see the packet before the tc program.
            let receiver = RawReceiver::start(self.ns(&check.to), to, protocol)?;
            send_raw(self.ns(&check.from), Some(source), to, protocol, &payload)?;
            return receiver.receives(source, payload[0], wait);
        }
        let wanted = payload.clone();
        let capture = Capture::start_where(self.ns(&check.to), INNER, move |p| {
            // The kernel fills in ICMPv6 checksums; type and code are the test's.
            !p.outgoing
                && p.source == source
                && p.destination == to
                && p.protocol == protocol
                && (protocol == packet::protocol::ICMPV6 || p.payload == wanted)
                && p.payload.first() == wanted.first()
        })?;
        send_raw(self.ns(&check.from), Some(source), to, protocol, &payload)?;
        Ok(wait_until("arrival", wait, || capture.count(|_| true) > 0).is_ok())
    }

    /// Makes all attempts.
    ///
    /// # Panics
    /// If one comes out differently; with what the daemon reports about it.
    #[track_caller]
    pub fn expect(&self, daemon: &Daemon, lines: &str) {
        let failures = self.check(lines).unwrap_or_else(|error| panic!("{error:#}"));
        assert!(
            failures.is_empty(),
            "{}\n{}",
            failures.join("\n"),
            daemon.report()
        );
    }
}

/// Returns the settings with the peers of this topology.
#[must_use]
pub fn with_peers(mut settings: Settings) -> Settings {
    settings.tables.push_str(PEERS);
    settings
}

/// Returns the number of attempts in some lines of checks.
///
/// # Errors
///
/// A line cannot be parsed.
pub fn count_checks(lines: &str) -> Result<usize> {
    parse_checks(lines).map(|checks| checks.len())
}

fn parse_checks(lines: &str) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    for line in lines.lines().map(str::trim).filter(|l| !l.is_empty()) {
        checks.extend(Check::parse(line).with_context(|| line.to_owned())?);
    }
    ensure!(!checks.is_empty(), "nothing to check");
    Ok(checks)
}

/// Payload of a datagram that needs no fragments, bytes.
const UNFRAGMENTED: usize = 64;

/// The kind of attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Tcp(u16),
    Udp(u16, usize),
    Ping(usize),
    Sctp(u16),
    Icmp(u8),
    Protocol(u8),
}

impl What {
    fn port(self) -> u16 {
        match self {
            Self::Tcp(port) | Self::Udp(port, _) | Self::Sctp(port) => port,
            Self::Ping(_) | Self::Icmp(_) | Self::Protocol(_) => 0,
        }
    }
}

/// One line of a case, for one address family.
#[derive(Clone, Debug)]
struct Check {
    family: Family,
    from: String,
    to: String,
    what: What,
    open: bool,
    text: String,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}", self.family, self.text)
    }
}

impl Check {
    /// Parses `[4|6] FROM -> TO WHAT open|drop`.
    fn parse(line: &str) -> Result<Vec<Self>> {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        let families: &[Family] = match words.first() {
            Some(&"4") => &[Family::V4],
            Some(&"6") => &[Family::V6],
            _ => &FAMILIES,
        };
        if families.len() == 1 {
            words.remove(0);
        }
        let [from, "->", to, what, verdict] = words[..] else {
            bail!("a check is written: [4|6] FROM -> TO WHAT open|drop");
        };
        let parts: Vec<&str> = what.split('/').collect();
        let what = match parts[..] {
            ["tcp", port] => What::Tcp(port.parse()?),
            ["udp", port] => What::Udp(port.parse()?, 64),
            ["udp", port, size] => What::Udp(port.parse()?, size.parse()?),
            ["ping"] => What::Ping(56),
            ["ping", size] => What::Ping(size.parse()?),
            ["sctp", port] => What::Sctp(port.parse()?),
            ["icmp", kind] => What::Icmp(kind.parse()?),
            ["proto", number] => What::Protocol(number.parse()?),
            _ => bail!("{what} is none of the things that can be tried"),
        };
        let open = match verdict {
            "open" => true,
            "drop" => false,
            _ => bail!("{verdict} is neither open nor drop"),
        };
        Ok(families
            .iter()
            .map(|family| Self {
                family: *family,
                from: from.into(),
                to: to.into(),
                what,
                open,
                text: line.into(),
            })
            .collect())
    }
}

/// A policy file and its checks.
#[derive(Clone, Debug)]
pub struct Case {
    /// The file's name without its extension.
    pub name: String,
    /// The whole file.
    pub policy: String,
    /// Its leading comments.
    pub checks: String,
}

/// Returns the cases of one folder below `cases/netns/`, by name.
pub fn cases(folder: &str) -> Result<Vec<Case>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("cases/netns")
        .join(folder);
    let mut files: Vec<PathBuf> = fs::read_dir(&dir)
        .with_context(|| dir.display().to_string())?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.sort();
    let cases: Vec<_> = files
        .iter()
        .map(|file| {
            let policy = fs::read_to_string(file).with_context(|| file.display().to_string())?;
            let checks = policy
                .lines()
                .map_while(|line| line.strip_prefix('#'))
                .filter(|line| line.contains("->"))
                .fold(String::new(), |all, line| all + line + "\n");
            let name = file
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            ensure!(!checks.is_empty(), "{} has no checks", file.display());
            Ok(Case { name, policy, checks })
        })
        .collect::<Result<_>>()?;
    ensure!(!cases.is_empty(), "{} has no cases", dir.display());
    Ok(cases)
}

/// Applies each case to a running daemon. Returns what came out differently, with the daemon's report.
pub fn run_cases(world: &World, daemon: &Daemon, cases: &[Case]) -> Result<String> {
    let only = std::env::var("PALISADE_CASE").unwrap_or_default();
    let mut report = String::new();
    for case in cases.iter().filter(|case| case.name.contains(&only)) {
        daemon
            .apply(&[("case.yaml", &case.policy)])
            .with_context(|| case.name.clone())?;
        let failures = world.check(&case.checks).with_context(|| case.name.clone())?;
        if !failures.is_empty() {
            let _ = writeln!(
                report,
                "{}:\n  {}\n{}",
                case.name,
                failures.join("\n  "),
                daemon.report()
            );
        }
    }
    Ok(report)
}

/// Returns the topology with its servers.
///
/// # Panics
/// If it cannot be made.
#[must_use]
pub fn world() -> World {
    World::new().unwrap_or_else(|error| panic!("{error:#}"))
}
