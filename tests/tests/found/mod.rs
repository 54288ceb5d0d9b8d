//! Workloads that no configuration names, for tests of `[[discover]]`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use palisade_testbed::{Daemon, Ns, Topology, ns::wait_until, server::Program, topology::INNER, web::curl};
use serde_json::Value;

/// Longest time until a workload is found or gone.
pub const WAIT: Duration = Duration::from_secs(20);

/// A workload that no configuration names.
pub struct Workload {
    /// Its network namespace.
    pub ns: Ns,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Workload {
    /// Creates a namespace `…-app-NAME` without an interface.
    pub fn new(name: &str, octet: u8) -> Self {
        let ns = Ns::new(&format!("app-{name}")).unwrap_or_else(|error| panic!("{error:#}"));
        for conf in ["all", "default"] {
            ns.sysctl(&format!("ipv6/conf/{conf}/accept_dad"), "0")
                .expect("sysctl");
            ns.sysctl(&format!("ipv6/conf/{conf}/router_solicitations"), "0")
                .expect("sysctl");
        }
        Self {
            ns,
            v4: Ipv4Addr::new(10, 0, octet, 10),
            v6: Ipv6Addr::new(0xfd00, octet.into(), 0, 0, 0, 0, 0, 0x10),
        }
    }

    /// Connects the workload to the node.
    pub fn plug(&self, topology: &Topology, interface: &str) {
        let (v4, v6) = self.gateways();
        topology
            .node
            .ip(&format!(
                "link add {interface} type veth peer name {INNER} netns {}\n\
                 addr add {v4}/24 dev {interface}\n\
                 addr add {v6}/64 dev {interface} nodad\n\
                 link set {interface} up\n",
                self.ns.name()
            ))
            .unwrap_or_else(|error| panic!("{error:#}"));
        self.ns
            .ip(&format!(
                "addr add {}/24 dev {INNER}\n\
                 addr add {}/64 dev {INNER} nodad\n\
                 link set {INNER} up\n\
                 route add default via {v4}\n\
                 route add default via {v6}\n",
                self.v4, self.v6
            ))
            .unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// Returns the addresses of the node at the link.
    pub fn gateways(&self) -> (Ipv4Addr, Ipv6Addr) {
        let [a, b, c, _] = self.v4.octets();
        let [s0, s1, ..] = self.v6.segments();
        (Ipv4Addr::new(a, b, c, 1), Ipv6Addr::new(s0, s1, 0, 0, 0, 0, 0, 1))
    }

    /// Returns both addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

/// Returns the endpoint `default/NAME` as `endpoint list` shows it.
pub fn endpoint(daemon: &Daemon, name: &str) -> Option<Value> {
    let all = daemon.json(&["endpoint", "list"]).ok()?;
    let all = all.as_array()?.clone();
    all.into_iter()
        .find(|endpoint| endpoint["name"] == format!("default/{name}"))
}

/// Waits until an endpoint is found with these addresses and its interface is guarded.
pub fn wait_found(daemon: &Daemon, name: &str, workload: &Workload) -> Value {
    let mut found = None;
    wait_until(&format!("{name} is found"), WAIT, || {
        found = endpoint(daemon, name).filter(|endpoint| {
            let has = |address: IpAddr| {
                endpoint["addresses"]
                    .as_array()
                    .is_some_and(|all| all.contains(&address.to_string().into()))
            };
            endpoint["state"] == "ready" && workload.addresses().into_iter().all(has)
        });
        found.is_some()
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    found.expect("found")
}

/// Waits until there is no endpoint `default/NAME`.
pub fn wait_gone(daemon: &Daemon, name: &str) {
    wait_until(&format!("{name} is gone"), WAIT, || {
        endpoint(daemon, name).is_none()
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

/// Removes a workload, and waits until the kernel has removed its interface, which it does later.
pub fn unplugged(topology: &Topology, workload: Workload, interface: &str) {
    drop(workload);
    wait_until("the interface is gone", WAIT, || {
        topology.node.ifindex(interface).is_err()
    })
    .unwrap_or_else(|error| panic!("{error:#}"));
}

/// Starts a web server at port 8000.
pub fn web(server: &Ns) -> Program {
    let at = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 8000);
    Program::start(
        server,
        "python3",
        &["-m", "http.server", "8000", "--bind", "::"],
        Some(at),
    )
    .unwrap_or_else(|error| panic!("{error:#}"))
}

/// Returns the HTTP status of a request to port 8000; 0 without an answer.
pub fn status_of(from: &Ns, to: IpAddr, timeout: Duration) -> u16 {
    let url = format!("http://{}/", SocketAddr::new(to, 8000));
    curl(from, &[&url], timeout).expect("curl").status
}
