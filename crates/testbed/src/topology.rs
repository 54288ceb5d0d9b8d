//! A node with workloads behind veth pairs, and an internet namespace behind its NIC.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::{
    Outcome,
    ns::{Ns, temp_dir, wait_until},
    probe::ping,
};

/// Timeout of [`Topology::meet`]. It is long enough for a busy machine.
const MEET_TIMEOUT: Duration = Duration::from_secs(30);

/// Name of the node's NIC.
pub const NIC: &str = "nic0";
/// Name of the interface in workloads and in the internet.
pub const INNER: &str = "eth0";
/// The node's IPv4 address on its NIC.
pub const NODE_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The node's IPv6 address on its NIC.
pub const NODE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 1);
/// The internet's IPv4 address on the link to the node.
pub const INTERNET_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
/// The internet's IPv6 address on the link to the node.
pub const INTERNET_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 2);

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Both families, for loops.
pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// The description of a workload.
#[derive(Clone, Debug)]
pub struct WorkloadSpec {
    name: String,
    namespace: String,
    labels: BTreeMap<String, String>,
    named_ports: BTreeMap<String, String>,
}

impl WorkloadSpec {
    /// Creates a workload in the policy namespace `default` without labels.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            namespace: "default".into(),
            labels: BTreeMap::new(),
            named_ports: BTreeMap::new(),
        }
    }

    /// Sets the policy namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// Adds a named port: `("http", "80/TCP")`.
    #[must_use]
    pub fn port(mut self, name: &str, port: &str) -> Self {
        self.named_ports.insert(name.into(), port.into());
        self
    }
}

/// A workload in a network namespace.
#[derive(Clone, Debug)]
pub struct Workload {
    /// The network namespace.
    pub ns: Ns,
    /// The name.
    pub name: String,
    /// The policy namespace.
    pub namespace: String,
    /// The labels.
    pub labels: BTreeMap<String, String>,
    /// The named ports.
    pub named_ports: BTreeMap<String, String>,
    /// Name of the host side of the veth pair, in the node's namespace.
    pub interface: String,
    /// The IPv4 address.
    pub v4: Ipv4Addr,
    /// The IPv6 address.
    pub v6: Ipv6Addr,
    /// The node's IPv4 address on the link.
    pub gateway_v4: Ipv4Addr,
    /// The node's IPv6 address on the link.
    pub gateway_v6: Ipv6Addr,
}

impl Workload {
    /// Returns the address of a family.
    #[must_use]
    pub fn addr(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    /// Returns the node's address of a family on the link.
    #[must_use]
    pub fn gateway(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.gateway_v4.into(),
            Family::V6 => self.gateway_v6.into(),
        }
    }
}

/// The node, its workloads, and the internet.
#[derive(Debug)]
pub struct Topology {
    workloads: Vec<Workload>,
    declared: Vec<Workload>,
    /// The node's namespace. It forwards packets and has no firewall rules of its own.
    pub node: Ns,
    /// The namespace behind the NIC.
    pub internet: Ns,
    dir: TempDir,
}

impl Topology {
    /// Creates a node with its NIC, and the internet, without workloads.
    pub fn new() -> Result<Self> {
        let node = prepared("node")?;
        let internet = prepared("internet")?;
        for (key, value) in [
            ("ipv4/ip_forward", "1"),
            ("ipv6/conf/all/forwarding", "1"),
            ("ipv4/conf/all/rp_filter", "1"),
            ("ipv4/conf/default/rp_filter", "1"),
        ] {
            node.sysctl(key, value)?;
        }
        node.ip(&format!(
            "link add {NIC} type veth peer name {INNER} netns {}\n\
             addr add {NODE_V4}/24 dev {NIC}\n\
             addr add {NODE_V6}/64 dev {NIC} nodad\n\
             link set {NIC} up\n",
            internet.name()
        ))?;
        internet.ip(&format!(
            "addr add {INTERNET_V4}/24 dev {INNER}\n\
             addr add {INTERNET_V6}/64 dev {INNER} nodad\n\
             link set {INNER} up\n\
             route add 10.0.0.0/8 via {NODE_V4}\n\
             route add fd00::/16 via {NODE_V6}\n"
        ))?;
        node.ip(&format!(
            "route add default via {INTERNET_V4}\n\
             route add default via {INTERNET_V6}\n"
        ))?;
        let dir = temp_dir("topology")?;
        Ok(Self {
            workloads: Vec::new(),
            declared: Vec::new(),
            node,
            internet,
            dir,
        })
    }

    /// Adds a workload with its interface.
    pub fn workload(mut self, spec: WorkloadSpec) -> Result<Self> {
        let name = spec.name.clone();
        self.declare(spec)?;
        self.plug(&name)?;
        Ok(self)
    }

    /// Adds workloads with these names, each with the label `app: <name>`.
    pub fn apps(mut self, names: &[&str]) -> Result<Self> {
        for name in names {
            self = self.workload(WorkloadSpec::new(name).label("app", name))?;
        }
        Ok(self)
    }

    /// Adds a workload that has addresses and is part of the daemon's configuration, but has no interface yet.
    pub fn declare(&mut self, spec: WorkloadSpec) -> Result<()> {
        let n = self.workloads.len() + self.declared.len() + 1;
        let octet = u8::try_from(n).context("at most 255 workloads")?;
        let interface = format!("veth-{}", spec.name);
        ensure!(
            interface.len() <= 15,
            "{interface}: the kernel takes 15 characters"
        );
        let group = u16::from(octet);
        self.declared.push(Workload {
            ns: prepared(&spec.name)?,
            name: spec.name,
            namespace: spec.namespace,
            labels: spec.labels,
            named_ports: spec.named_ports,
            interface,
            v4: Ipv4Addr::new(10, 0, octet, 10),
            v6: Ipv6Addr::new(0xfd00, group, 0, 0, 0, 0, 0, 0x10),
            gateway_v4: Ipv4Addr::new(10, 0, octet, 1),
            gateway_v6: Ipv6Addr::new(0xfd00, group, 0, 0, 0, 0, 0, 1),
        });
        Ok(())
    }

    /// Creates the interface of a declared workload.
    pub fn plug(&mut self, name: &str) -> Result<()> {
        let at = self
            .declared
            .iter()
            .position(|w| w.name == name)
            .with_context(|| format!("no workload {name}"))?;
        let w = self.declared.remove(at);
        self.node.ip(&format!(
            "link add {0} type veth peer name {INNER} netns {1}\n\
             addr add {2}/24 dev {0}\n\
             addr add {3}/64 dev {0} nodad\n\
             link set {0} up\n",
            w.interface,
            w.ns.name(),
            w.gateway_v4,
            w.gateway_v6
        ))?;
        w.ns.ip(&format!(
            "addr add {}/24 dev {INNER}\n\
             addr add {}/64 dev {INNER} nodad\n\
             link set {INNER} up\n\
             route add default via {}\n\
             route add default via {}\n",
            w.v4, w.v6, w.gateway_v4, w.gateway_v6
        ))?;
        self.workloads.push(w);
        Ok(())
    }

    /// Removes a workload's interface; the workload stays declared.
    pub fn unplug(&mut self, name: &str) -> Result<()> {
        let at = self
            .workloads
            .iter()
            .position(|w| w.name == name)
            .with_context(|| format!("no workload {name}"))?;
        let w = self.workloads.remove(at);
        self.node.ip(&format!("link del {}", w.interface))?;
        self.declared.push(w);
        Ok(())
    }

    /// Waits until each namespace has resolved the MAC address of its router. On a new interface, IPv6 neighbour
    /// discovery can take a second (RETRANS_TIMER, RFC 4861, section 10).
    pub fn meet(&self) -> Result<()> {
        let links = self
            .workloads
            .iter()
            .map(|w| (&w.ns, FAMILIES.map(|f| w.gateway(f))));
        let links = links.chain([(&self.internet, [NODE_V4.into(), NODE_V6.into()])]);
        thread::scope(|scope| {
            let threads: Vec<_> = links
                .flat_map(|(ns, routers)| routers.map(|router| (ns, router)))
                .map(|(ns, router)| {
                    // `wait_until` repeats the ping, because the kernel drops a packet if the neighbour is not resolved
                    // in time.
                    let answers = move || ping(ns, None, router, 8, Duration::from_secs(2)) == Outcome::Open;
                    scope.spawn(move || wait_until(&format!("{router} answers"), MEET_TIMEOUT, answers))
                })
                .collect();
            for thread in threads {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            Ok(())
        })
    }

    /// Adds addresses to the internet namespace; the node reaches them through its NIC.
    pub fn internet_addresses(self, addresses: &[&str]) -> Result<Self> {
        let mut lines = String::new();
        for address in addresses {
            let ip: IpAddr = address.parse().with_context(|| (*address).to_owned())?;
            let (length, flag) = if ip.is_ipv4() { (32, "") } else { (128, " nodad") };
            let _ = writeln!(lines, "addr add {ip}/{length} dev lo{flag}");
        }
        self.internet.ip(&lines)?;
        Ok(self)
    }

    /// Enables the kernel's conntrack on the node, as a stateful firewall or NAT does. In a new namespace nf_conntrack
    /// tracks nothing until a netfilter rule uses it.
    pub fn track_connections(&self) -> Result<()> {
        self.node.nft(
            "table inet tracking {\n\
             chain forward { type filter hook forward priority 0; ct state established accept; }\n\
             chain input { type filter hook input priority 0; ct state established accept; }\n\
             chain output { type filter hook output priority 0; ct state established accept; }\n\
             }\n",
        )
    }

    /// Returns a workload that has an interface, by its name.
    ///
    /// # Panics
    /// Panics if no workload with an interface has this name.
    #[must_use]
    pub fn get(&self, name: &str) -> &Workload {
        self.workloads
            .iter()
            .find(|w| w.name == name)
            .unwrap_or_else(|| panic!("the testbed has no workload {name}"))
    }

    /// Returns all workloads, including those without an interface.
    pub fn all(&self) -> impl Iterator<Item = &Workload> {
        self.workloads.iter().chain(&self.declared)
    }

    /// Returns the namespace of a workload, `node` or `internet`.
    #[must_use]
    pub fn ns(&self, name: &str) -> &Ns {
        match name {
            "node" => &self.node,
            "internet" => &self.internet,
            _ => &self.get(name).ns,
        }
    }

    /// Returns the address of a workload, `node` (on its NIC) or `internet`.
    #[must_use]
    pub fn addr(&self, name: &str, family: Family) -> IpAddr {
        match (name, family) {
            ("node", Family::V4) => NODE_V4.into(),
            ("node", Family::V6) => NODE_V6.into(),
            ("internet", Family::V4) => INTERNET_V4.into(),
            ("internet", Family::V6) => INTERNET_V6.into(),
            _ => self.get(name).addr(family),
        }
    }

    /// Returns a temporary directory that is removed with the testbed.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// Creates a namespace in which IPv6 does no duplicate address detection and sends no router solicitations.
fn prepared(label: &str) -> Result<Ns> {
    let ns = Ns::new(label)?;
    for conf in ["all", "default"] {
        ns.sysctl(&format!("ipv6/conf/{conf}/accept_dad"), "0")?;
        ns.sysctl(&format!("ipv6/conf/{conf}/accept_ra"), "0")?;
        ns.sysctl(&format!("ipv6/conf/{conf}/router_solicitations"), "0")?;
    }
    Ok(ns)
}
