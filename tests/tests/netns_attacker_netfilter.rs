//! Packets that no program can evaluate: those that NAT, TPROXY or a mark redirects to the node after the hooks, and those of
//! interfaces that are configured and not guarded.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use palisade_testbed::{
    Daemon, Outcome, Topology,
    daemon::{Hooks, Settings},
    ns::{Ns, wait_until},
    probe::udp,
    server::Echo,
    topology::{FAMILIES, Family, INNER, NIC, Workload},
};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};

/// The node accepts packets to these ports only.
const NODE: &str = r#"
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress:
  - fromEntities: [all]
    toPorts:
    - ports: [{port: "81", protocol: UDP}, {port: "8080", protocol: UDP}]
"#;

const DENY_CLIENT: &str = "
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: deny-all}
spec:
  endpointSelector: {matchLabels: {app: client}}
  ingress:
  - {}
  egress:
  - {}
";

const TIMEOUT: Duration = Duration::from_secs(8);
/// Time to wait before a test concludes that a packet does not arrive.
const SHORT: Duration = Duration::from_millis(400);

fn topology() -> Topology {
    let topology = Topology::new()
        .and_then(|topology| topology.apps(&["client"]))
        .unwrap_or_else(|error| panic!("{error:#}"));
    topology.meet().expect("the workload reaches the node");
    topology
}

fn daemon(topology: &Topology, policies: &[(&str, &str)]) -> Daemon {
    Daemon::start(topology, &Settings::default(), policies).unwrap_or_else(|error| panic!("{error:#}"))
}

fn both(topology: &Topology, name: &str) -> [IpAddr; 2] {
    FAMILIES.map(|family| topology.addr(name, family))
}

fn any(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => [0u16; 8].into(),
    }
}

/// Receives datagrams to a port of the node, including those that TPROXY redirects.
struct Sink(UdpSocket);

impl Sink {
    fn open(ns: &Ns, like: IpAddr, port: u16) -> Self {
        Self::at(ns, SocketAddr::new(any(like), port))
    }

    fn at(ns: &Ns, at: SocketAddr) -> Self {
        ns.enter(|| {
            let socket =
                Socket::new(Domain::for_address(at), Type::DGRAM, Some(Protocol::UDP)).expect("socket");
            if at.is_ipv4() {
                socket.set_ip_transparent_v4(true).expect("transparent");
            } else {
                socket.set_only_v6(true).expect("IPv6 only");
                socket.set_ip_transparent_v6(true).expect("transparent");
            }
            socket.bind(&at.into()).expect("bind");
            Self(socket.into())
        })
    }

    /// Returns the datagrams that arrive before the datagram `last`.
    fn until(&self, last: &str) -> Vec<String> {
        self.0.set_read_timeout(Some(TIMEOUT)).expect("timeout");
        let mut got = Vec::new();
        let mut buffer = [0; 64];
        loop {
            let (length, _) = self
                .0
                .recv_from(&mut buffer)
                .unwrap_or_else(|error| panic!("{last} does not come after {got:?}: {error}"));
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if text == last {
                return got;
            }
            got.push(text);
        }
    }

    /// Returns the datagrams that arrive within a moment.
    fn rest(&self) -> Vec<String> {
        self.0.set_read_timeout(Some(SHORT)).expect("timeout");
        let mut got = Vec::new();
        let mut buffer = [0; 64];
        while let Ok((length, _)) = self.0.recv_from(&mut buffer) {
            got.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        got
    }
}

fn send(from: &Ns, to: SocketAddr, text: &str) {
    from.enter(|| {
        let socket = UdpSocket::bind((any(to.ip()), 0)).expect("socket");
        socket.set_broadcast(true).expect("broadcast");
        socket
            .send_to(text.as_bytes(), to)
            .unwrap_or_else(|error| panic!("{to}: {error}"));
    });
}

/// Returns the daemon's nftables table as nft prints it; empty if there is none.
fn table(ns: &Ns) -> String {
    ns.run("nft", &["list", "table", "inet", "palisade"])
        .unwrap_or_default()
}

fn wait_table(daemon: &Daemon, ns: &Ns, what: &str, wanted: impl Fn(&str) -> bool) {
    wait_until(what, TIMEOUT, || wanted(&table(ns)))
        .unwrap_or_else(|error| panic!("{error:#}\n{}\n{}", table(ns), daemon.report()));
}

/// Returns how many packets the table has dropped for a reason, as `status` counts them.
fn dropped(daemon: &Daemon, reason: u64) -> u64 {
    let status = daemon.status().expect("status");
    let drops = status["drops"].as_array().expect("drops");
    drops
        .iter()
        .filter(|drop| drop["reason"] == reason)
        .map(|drop| drop["packets"].as_u64().expect("packets"))
        .sum()
}

fn services() -> [IpAddr; 2] {
    [
        "203.0.113.5".parse().expect("v4"),
        "2001:db8:5::5".parse().expect("v6"),
    ]
}

/// Sends datagrams from outside and from a workload to a service address that is redirected to the node. None may be
/// delivered while the node's ingress is enforced; all must be otherwise.
fn one_way(topology: &Topology, daemon: &Daemon, how: &str) {
    let node = both(topology, "node");
    let sinks = node.map(|own| [80, 81].map(|port| Sink::open(&topology.node, own, port)));
    let attempt = |n: u32| {
        for (service, own) in services().into_iter().zip(node) {
            for from in ["internet", "client"] {
                for port in [80, 81] {
                    let text = format!("{from} {port} {n}");
                    send(topology.ns(from), SocketAddr::new(service, port), &text);
                }
                // Arrives after them on the same path, to an allowed port.
                send(
                    topology.ns(from),
                    SocketAddr::new(own, 81),
                    &format!("{from} own {n}"),
                );
            }
        }
    };
    let before = dropped(daemon, 229);
    attempt(1);
    for [denied, allowed] in &sinks {
        let mut got = allowed.until("internet own 1");
        got.extend(allowed.until("client own 1"));
        got.extend(denied.rest());
        assert_eq!(
            got,
            [""; 0],
            "{how}\n{}\n{}",
            table(&topology.node),
            daemon.report()
        );
    }
    assert_eq!(dropped(daemon, 229) - before, 8, "{how}: {}", daemon.report());

    let audit = NODE.replace(
        "{name: node}",
        "{name: node, annotations: {palisade.io/audit: \"true\"}}",
    );
    for (n, policies) in [(2, vec![]), (3, vec![("audit.yaml", audit.as_str())])] {
        daemon.apply(&policies).expect("apply");
        attempt(n);
        for [other, _] in &sinks {
            other.until(&format!("internet 80 {n}"));
            other.until(&format!("client 80 {n}"));
        }
    }
    daemon.apply(&[("node.yaml", NODE)]).expect("apply");
}

fn routes_to_services(topology: &Topology) {
    let node = both(topology, "node");
    let [v4, v6] = services();
    topology
        .internet
        .ip(&format!(
            "route add {v4} via {}\nroute add {v6} via {}",
            node[0], node[1]
        ))
        .expect("routes");
}

#[test]
fn datagrams_redirected_to_the_node_by_dnat_are_dropped_while_its_ingress_is_enforced() {
    let topology = topology();
    // Prefixes of the node's local routing table.
    let (local4, local6): (IpAddr, IpAddr) = (
        "203.0.113.200".parse().expect("v4"),
        "2001:db8:6::6".parse().expect("v6"),
    );
    topology
        .node
        .ip("route add local 203.0.113.128/25 dev lo\nroute add local 2001:db8:6::/48 dev lo")
        .expect("local routes");
    topology
        .internet
        .ip(&format!(
            "route add {local4} via {}\nroute add {local6} via {}",
            topology.addr("node", Family::V4),
            topology.addr("node", Family::V6)
        ))
        .expect("routes");
    let daemon = daemon(&topology, &[("node.yaml", NODE)]);
    let ([v4, v6], [node4, node6]) = (services(), both(&topology, "node"));
    routes_to_services(&topology);
    // No rule makes the kernel track connections that it would not track otherwise.
    assert!(
        !table(&topology.node).contains("ct "),
        "{}",
        table(&topology.node)
    );
    topology
        .node
        .nft(&format!(
            "table inet services {{\n\
             chain before {{ type nat hook prerouting priority -100;\n\
             ip daddr {v4} dnat ip to {node4}\nip6 daddr {v6} dnat ip6 to {node6}\n\
             ip daddr {{ {node4}, {local4} }} udp dport 8080 redirect to :80\n\
             ip6 daddr {{ {node6}, {local6} }} udp dport 8080 redirect to :80\n\
             }}\n\
             chain out {{ type nat hook output priority -100;\n\
             ip daddr {v4} dnat ip to {0}\nip6 daddr {v6} dnat ip6 to {1}\n\
             }}\n\
             }}\n",
            topology.addr("internet", Family::V4),
            topology.addr("internet", Family::V6),
        ))
        .expect("nat");
    wait_table(&daemon, &topology.node, "the rules are noticed", |table| {
        table.contains("ct status")
    });
    one_way(&topology, &daemon, "DNAT");

    // A port of the node published under another number, and responses to the node's own packets after its DNAT.
    let _server = Echo::start(&topology.internet, &both(&topology, "internet"), &[], &[53]).expect("server");
    for ((own, local), service) in [(node4, local4), (node6, local6)].into_iter().zip([v4, v6]) {
        let sink = Sink::open(&topology.node, own, 80);
        for from in ["internet", "client"] {
            for to in [own, local] {
                send(topology.ns(from), SocketAddr::new(to, 8080), from);
                sink.until(from);
            }
        }
        let to = SocketAddr::new(service, 53);
        assert_eq!(udp(&topology.node, None, to, 20, TIMEOUT), Outcome::Open, "{to}");
    }
    topology.node.nft("delete table inet services").expect("no nat");
    wait_table(&daemon, &topology.node, "nothing is translated", |table| {
        !table.contains("ct ")
    });
}

#[test]
fn datagrams_redirected_to_the_node_by_tproxy_or_mark_are_dropped_while_its_ingress_is_enforced() {
    let topology = topology();
    let daemon = daemon(&topology, &[("node.yaml", NODE)]);
    let [v4, v6] = services();
    routes_to_services(&topology);
    for (family, all) in [("-4", "0.0.0.0/0"), ("-6", "::/0")] {
        for command in [
            "rule add fwmark 1 lookup 100".to_owned(),
            format!("route add local {all} dev lo table 100"),
        ] {
            let args: Vec<&str> = [family].into_iter().chain(command.split(' ')).collect();
            topology.node.run("ip", &args).expect("routing by mark");
        }
    }
    let chain = |rules: &str| {
        topology
            .node
            .nft(&format!(
                "table inet services {{ }}\ndelete table inet services\n\
                 table inet services {{ chain before {{ type filter hook prerouting priority -150;\n{rules}\n}}\n}}"
            ))
            .expect("rules");
    };
    chain(&format!(
        "ip daddr {v4} meta mark set 1\nip6 daddr {v6} meta mark set 1"
    ));
    one_way(&topology, &daemon, "mark");
    chain(&format!(
        "ip daddr {v4} udp dport 80-81 tproxy ip to :80 meta mark set 1\n\
         ip6 daddr {v6} udp dport 80-81 tproxy ip6 to :80 meta mark set 1"
    ));
    one_way(&topology, &daemon, "TPROXY");

    // Multicast, broadcast, link-local and newly added addresses belong to the node, whatever mark a packet has.
    chain("meta mark set 2");
    let (group4, group6) = (Ipv4Addr::new(239, 1, 1, 1), "ff05::123".parse().expect("group"));
    let sinks = both(&topology, "node").map(|own| Sink::open(&topology.node, own, 81));
    let nic = topology.node.ifindex(NIC).expect("index");
    let [four, six] = sinks.each_ref().map(|sink| socket2::SockRef::from(&sink.0));
    four.join_multicast_v4_n(&group4, &InterfaceIndexOrAddress::Index(nic))
        .expect("group");
    six.join_multicast_v6(&group6, nic).expect("group");
    topology
        .internet
        .ip(&format!(
            "route add {group4} dev {INNER}\nroute add {} dev {INNER}",
            Ipv4Addr::BROADCAST
        ))
        .expect("routes");
    for (n, to) in [
        IpAddr::from(group4),
        group6.into(),
        Ipv4Addr::BROADCAST.into(),
        "198.51.100.255".parse().expect("address"),
    ]
    .into_iter()
    .enumerate()
    {
        send(&topology.internet, SocketAddr::new(to, 81), &format!("group {n}"));
        sinks[usize::from(to.is_ipv6())].until(&format!("group {n}"));
    }
    for (n, to) in ["198.51.100.77", "2001:db8:f::77"].into_iter().enumerate() {
        let flags = ["", " nodad"][n];
        let length = [24, 64][n];
        topology
            .node
            .ip(&format!("addr add {to}/{length} dev {NIC}{flags}"))
            .expect("address");
        let to = SocketAddr::new(to.parse().expect("address"), 81);
        send(&topology.internet, to, "new");
        sinks[n].until("new");
    }
}

#[test]
fn a_service_address_routed_to_the_node_by_port_is_subject_to_its_policy() {
    let topology = topology();
    let daemon = daemon(&topology, &[("node.yaml", NODE)]);
    routes_to_services(&topology);
    for (family, all) in [("-4", "0.0.0.0/0"), ("-6", "::/0")] {
        for command in [
            "rule add ipproto udp dport 80-81 lookup 100".to_owned(),
            format!("route add local {all} dev lo table 100"),
        ] {
            let args: Vec<&str> = [family].into_iter().chain(command.split(' ')).collect();
            topology.node.run("ip", &args).expect("routing by port");
        }
    }
    for service in services() {
        let denied = Sink::open(&topology.node, service, 80);
        let to = SocketAddr::new(service, 81);
        let server = Sink::at(&topology.node, to);
        server.0.set_read_timeout(Some(TIMEOUT)).expect("timeout");
        for from in ["internet", "client"] {
            let ns = topology.ns(from);
            send(ns, SocketAddr::new(service, 80), from);
            let client = ns.enter(|| UdpSocket::bind((any(service), 0)).expect("socket"));
            client.set_read_timeout(Some(TIMEOUT)).expect("timeout");
            client.send_to(b"question", to).expect("send");
            let mut buffer = [0; 64];
            let came = server.0.recv_from(&mut buffer);
            let (_, peer) = came.unwrap_or_else(|error| panic!("{from}: {error}\n{}", daemon.report()));
            server.0.send_to(b"answer", peer).expect("answer");
            let answered = client.recv_from(&mut buffer);
            let (_, by) = answered.unwrap_or_else(|error| panic!("{from}: {error}\n{}", daemon.report()));
            assert_eq!(by, to);
        }
        assert_eq!(denied.rest(), [""; 0], "{}", daemon.report());
    }
}

#[test]
fn the_node_and_an_unguarded_interface_cannot_reach_each_other() {
    let mut topology = topology();
    let mut daemon = daemon(&topology, &[("deny.yaml", DENY_CLIENT)]);
    let inside = topology.ns("client").clone();
    let client = topology.get("client").clone();
    let node = topology.node.clone();
    let sinks = both(&topology, "node").map(|own| Sink::open(&node, own, 9));
    let into = both(&topology, "client").map(|own| Sink::open(&inside, own, 9));
    let to: Vec<IpAddr> = both(&topology, "node")
        .into_iter()
        .chain(FAMILIES.map(|family| client.gateway(family)))
        .collect();
    let nothing_passes = |when: &str| {
        for to in &to {
            // Sending may fail while an end has no neighbour entry, or because the node answers that it is prohibited.
            for (from, to) in [(&inside, *to), (&node, client.addr(family_of(*to)))] {
                from.enter(|| {
                    let socket = UdpSocket::bind((any(to), 0)).expect("socket");
                    for _ in 0..20 {
                        let _ = socket.send_to(b"x", (to, 9));
                    }
                });
            }
        }
        for sink in sinks.iter().chain(&into) {
            assert_eq!(sink.rest(), [""; 0], "{when}\n{}", table(&node));
        }
    };
    nothing_passes("guarded");
    daemon.kill9().expect("kill -9");
    nothing_passes("the daemon is dead");
    topology.unplug("client").expect("unplug");
    topology.plug("client").expect("plug");
    nothing_passes("made again, the daemon is dead");
    daemon.restart().expect("restart");
    nothing_passes("guarded again");
    assert!(dropped(&daemon, 219) > 0, "{}", daemon.report());
    daemon.apply(&[]).expect("apply");
    topology.meet().expect("the workload reaches the node");
    for (n, to) in to.iter().enumerate() {
        send(&inside, SocketAddr::new(*to, 9), &n.to_string());
        sinks[usize::from(to.is_ipv6())].until(&n.to_string());
        send(
            &node,
            SocketAddr::new(client.addr(family_of(*to)), 9),
            &n.to_string(),
        );
        into[usize::from(to.is_ipv6())].until(&n.to_string());
    }

    // An unconfigured interface stays open, except for the workload's address.
    node.ip(&format!(
        "link add extra0 type veth peer name extra1 netns {}\naddr add fd09::1/64 dev extra0 nodad\nlink set extra0 up",
        inside.name()
    ))
    .expect("link");
    inside
        .ip("addr add fd09::2/64 dev extra1 nodad\nlink set extra1 up")
        .expect("link");
    let by_extra = |from: IpAddr, text: &str| {
        inside.enter(|| {
            let socket = UdpSocket::bind((from, 0)).expect("socket");
            socket.send_to(text.as_bytes(), "[fd09::1]:9").expect("send");
        });
    };
    by_extra("fd09::2".parse().expect("address"), "hello");
    sinks[1].until("hello");
    by_extra(client.addr(Family::V6), "not here");
    by_extra("fd09::2".parse().expect("address"), "end");
    assert_eq!(sinks[1].until("end"), [""; 0]);
}

fn family_of(address: IpAddr) -> Family {
    if address.is_ipv4() { Family::V4 } else { Family::V6 }
}

#[test]
fn the_nftables_table_is_restored_and_detach_removes_it_and_no_other() {
    let (topology, other) = (topology(), topology());
    let policies = [("node.yaml", NODE)];
    let (mut daemon, mut beside) = (daemon(&topology, &policies), daemon(&other, &policies));
    let node = &topology.node;
    let whole = table(node);
    assert!(whole.contains("@names") && whole.contains("fib"), "{whole}");
    for (n, damage) in [
        "flush ruleset",
        "delete table inet palisade",
        "flush chain inet palisade input",
        "flush set inet palisade names",
        "add rule inet palisade input accept",
    ]
    .into_iter()
    .enumerate()
    {
        node.nft(damage).expect(damage);
        wait_table(&daemon, node, damage, |table| table == whole);
        let lines = daemon.log().matches("nftables-restored").count();
        assert_eq!(lines, n + 1, "{damage}: {}", daemon.log());
    }
    assert_eq!(beside.log().matches("nftables-restored").count(), 0);

    // A table of this name that another program made is left alone and reported.
    let foreign = "table inet palisade {\n chain mine { }\n}";
    node.nft(&format!("delete table inet palisade\n{foreign}"))
        .expect("foreign");
    let warns = |status: &serde_json::Value, wanted: bool| {
        let warnings = status["warnings"].to_string();
        warnings.contains("another program or daemon has created it") == wanted
    };
    daemon
        .wait_status("the foreign table is said", |status| warns(status, true))
        .expect("status");
    assert!(table(node).contains("chain mine"), "{}", table(node));
    node.nft("delete table inet palisade").expect("delete");
    wait_table(&daemon, node, "it is gone", |table| table == whole);
    daemon
        .wait_status("nothing is said", |status| warns(status, false))
        .expect("status");

    node.nft("table inet operator {\n chain c { type filter hook input priority 0; }\n}")
        .expect("operator");
    daemon.detach().expect("detach");
    let tables = |ns: &Ns| ns.run("nft", &["list", "tables"]).expect("tables");
    assert_eq!(tables(node), "table inet operator\n");
    assert!(table(&other.node).contains("@names"));

    // The command works without the daemon too.
    beside.kill9().expect("kill -9");
    assert!(table(&other.node).contains("@names"));
    beside.cli(&["stop", "--detach"]).expect("detach");
    assert_eq!(tables(&other.node), "");
}

#[test]
fn the_forward_hook_exists_only_while_an_interface_is_unguarded() {
    let mut topology = topology();
    let mut daemon = daemon(&topology, &[]);
    let (node, inside) = (topology.node.clone(), topology.ns("client").clone());
    let is_hooked = |table: &str| table.contains("hook forward");
    let wait_hook = |daemon: &Daemon, wanted: bool, when: &str| {
        wait_table(daemon, &node, when, |table| {
            !table.is_empty() && is_hooked(table) == wanted
        });
    };
    wait_hook(&daemon, false, "all interfaces are guarded");
    topology.unplug("client").expect("unplug");
    wait_hook(&daemon, true, "a configured interface is missing");
    topology.plug("client").expect("plug");
    wait_hook(&daemon, false, "the interface is guarded again");
    node.ip(&format!(
        "link add extra0 type veth peer name extra1 netns {}\n\
         addr add 10.9.0.1/24 dev extra0\naddr add fd09::1/64 dev extra0 nodad\nlink set extra0 up",
        topology.internet.name()
    ))
    .expect("link");
    topology
        .internet
        .ip("addr add 10.9.0.2/24 dev extra1\naddr add fd09::2/64 dev extra1 nodad\nlink set extra1 up")
        .expect("link");
    wait_hook(&daemon, true, "an interface is not configured");

    // Neither end of this path has programs once the workload's interface is made again without a daemon.
    let targets = ["10.9.0.2", "fd09::2"].map(|to| to.parse::<IpAddr>().expect("address"));
    let sinks = targets.map(|to| Sink::open(&topology.internet, to, 9));
    let arrives = |what: &str| {
        for (sink, to) in sinks.iter().zip(targets) {
            wait_until(what, TIMEOUT, || {
                send(&inside, SocketAddr::new(to, 9), "datagram");
                !sink.rest().is_empty()
            })
            .unwrap_or_else(|error| panic!("{to}: {error:#}\n{}", table(&node)));
        }
    };
    topology.meet().expect("the workload reaches the node");
    arrives("a guarded interface forwards to one that is not configured");
    daemon.terminate().expect("an orderly end");
    assert!(is_hooked(&table(&node)), "{}", table(&node));
    topology.unplug("client").expect("unplug");
    topology.plug("client").expect("plug");
    // The table drops neighbour solicitations that a workload sends from its own address by an unguarded interface.
    let veth = topology.get("client").interface.clone();
    let link = node
        .run("ip", &["-brief", "link", "show", "dev", &veth])
        .expect("link");
    let mac = link.split_whitespace().nth(2).expect("MAC address");
    let gateway = topology.get("client").gateway(Family::V6);
    inside
        .ip(&format!(
            "neigh replace {gateway} lladdr {mac} dev {INNER} nud permanent"
        ))
        .expect("neighbour");
    for to in targets {
        inside.enter(|| {
            let socket = UdpSocket::bind((any(to), 0)).expect("socket");
            for _ in 0..20 {
                // The node may answer that sending is prohibited.
                let _ = socket.send_to(b"datagram", (to, 9));
            }
        });
    }
    for sink in &sinks {
        assert_eq!(sink.rest(), [""; 0], "{}", table(&node));
    }
    // Without the rules of this hook the same datagrams arrive: nothing else has stopped them.
    node.nft("flush chain inet palisade forward").expect("flush");
    arrives("the forward chain is empty");

    daemon.restart().expect("restart");
    wait_hook(&daemon, true, "an interface is not configured, after a restart");
    node.ip("link del extra0").expect("delete");
    wait_hook(&daemon, false, "all interfaces are guarded, after a restart");
    // The daemon cannot know which interfaces are made while it does not run.
    daemon.terminate().expect("an orderly end");
    assert!(is_hooked(&table(&node)), "{}", table(&node));
}

/// Runs another program with a seccomp filter under which the kernel has no NETLINK_NETFILTER: socket(2) fails with
/// EPROTONOSUPPORT.
const WITHOUT_NETFILTER: &str = r#"
import ctypes, os, platform, struct, sys
number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
rules = [
    (LOAD, 0, 0, 0), (EQUAL, 0, 5, number),
    (LOAD, 0, 0, 16), (EQUAL, 0, 3, 16),
    (LOAD, 0, 0, 32), (EQUAL, 0, 1, 12),
    (RETURN, 0, 0, 0x00050000 | 93), (RETURN, 0, 0, 0x7fff0000),
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    raise OSError(ctypes.get_errno(), "prctl")
os.execvp(sys.argv[1], sys.argv[1:])
"#;

#[test]
fn a_kernel_without_nf_tables_is_reported_and_the_programs_enforce() {
    let topology = topology();
    let mut daemon =
        Daemon::prepare(&topology, &Settings::default(), &[("node.yaml", NODE)]).expect("a daemon");
    daemon.start_through(["python3", "-c", WITHOUT_NETFILTER].map(str::to_owned).into());
    daemon.restart().expect("start");
    assert_eq!(table(&topology.node), "");
    let status = daemon.status().expect("status");
    let warnings = status["warnings"].to_string();
    assert!(
        status["ready"] == true && warnings.contains("CONFIG_NF_TABLES"),
        "{status:#}"
    );
    for own in both(&topology, "node") {
        let [denied, allowed] = [80, 81].map(|port| Sink::open(&topology.node, own, port));
        for from in ["internet", "client"] {
            send(topology.ns(from), SocketAddr::new(own, 80), from);
            send(topology.ns(from), SocketAddr::new(own, 81), from);
            allowed.until(from);
        }
        assert_eq!(denied.rest(), [""; 0]);
    }
    // At the next start with nf_tables, the table is written.
    daemon.kill9().expect("kill -9");
    daemon.start_through(Vec::new());
    daemon.restart().expect("restart");
    assert!(table(&topology.node).contains("@names"));
    let status = daemon.status().expect("status");
    // The policy of the node allows no TCP, which is a warning of its own.
    let warnings: Vec<_> = status["warnings"].as_array().into_iter().flatten().collect();
    assert!(
        matches!(&warnings[..], [only] if only.to_string().contains("no TCP connection from outside")),
        "{status:#}"
    );
}

#[test]
fn a_recreated_bridge_port_reaches_neither_the_node_nor_other_ports() {
    let topology = Topology::new()
        .and_then(|topology| topology.apps(&["client", "server"]))
        .unwrap_or_else(|error| panic!("{error:#}"));
    let node = &topology.node;
    let (client, server) = (topology.get("client"), topology.get("server"));
    let peers = [(client, server), (server, client)];
    // Without an address of its own, a bridge takes that of a port, and another one when the port is removed.
    node.ip("link add br0 address 02:00:00:00:00:01 type bridge\nlink set br0 up")
        .expect("bridge");
    let join = |w: &Workload, other: &Workload| {
        node.ip(&format!("link set {0} master br0\nlink set {0} up", w.interface))
            .expect("port");
        // The other workload is on the same link.
        w.ns.ip(&format!(
            "route replace {}/32 dev {INNER}\nroute replace {}/128 dev {INNER}",
            other.v4, other.v6
        ))
        .expect("routes");
    };
    for (w, other) in peers {
        let (v4, v6) = (w.gateway_v4, w.gateway_v6);
        node.ip(&format!(
            "addr flush dev {}\naddr add {v4}/24 dev br0\naddr add {v6}/64 dev br0 nodad",
            w.interface
        ))
        .expect("addresses");
        join(w, other);
    }
    topology.meet().expect("the workloads reach the node");
    let mut daemon = daemon(&topology, &[("deny.yaml", DENY_CLIENT)]);
    let bridge = || node.run("nft", &["list", "table", "bridge", "palisade"]);
    assert!(bridge().expect("the table of bridges").contains("@names"));

    let namespaces = [&topology.internet, &client.ns, &server.ns, node];
    let sinks: Vec<Vec<Sink>> = namespaces
        .iter()
        .map(|ns| {
            FAMILIES
                .map(|family| Sink::open(ns, client.addr(family), 9))
                .into()
        })
        .collect();
    let nothing_passes = |when: &str| {
        for family in FAMILIES {
            for (from, to) in [
                (&client.ns, topology.addr("internet", family)),
                (&client.ns, server.addr(family)),
                (&client.ns, client.gateway(family)),
                (&server.ns, client.addr(family)),
                (node, client.addr(family)),
            ] {
                from.enter(|| {
                    let socket = UdpSocket::bind((any(to), 0)).expect("socket");
                    for _ in 0..20 {
                        let _ = socket.send_to(b"x", (to, 9));
                    }
                });
            }
        }
        for sink in sinks.iter().flatten() {
            assert_eq!(sink.rest(), [""; 0], "{when}\n{:?}", bridge());
        }
    };
    nothing_passes("guarded");
    daemon.kill9().expect("kill -9");
    node.ip(&format!("link del {}", client.interface))
        .expect("delete");
    node.ip(&format!(
        "link add {} type veth peer name {INNER} netns {}",
        client.interface,
        client.ns.name()
    ))
    .expect("make again");
    client
        .ns
        .ip(&format!(
            "addr add {}/24 dev {INNER}\naddr add {}/64 dev {INNER} nodad\nlink set {INNER} up\n\
             route add default via {}\nroute add default via {}",
            client.v4, client.v6, client.gateway_v4, client.gateway_v6
        ))
        .expect("addresses");
    join(client, server);
    nothing_passes("made again, the daemon is dead");
    daemon.restart().expect("restart");
    nothing_passes("guarded again");
    daemon.apply(&[]).expect("apply");
    topology.meet().expect("the workloads reach the node");
    for (n, family) in FAMILIES.into_iter().enumerate() {
        let to = SocketAddr::new(server.addr(family), 9);
        // The first datagram waits for neighbour resolution.
        wait_until("the other workload is reached", TIMEOUT, || {
            send(&client.ns, to, "hello");
            !sinks[2][n].rest().is_empty()
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    }
}

#[test]
fn a_failed_attachment_keeps_the_old_programs_and_an_unguarded_nic_open() {
    let topology = topology();
    let node = &topology.node;
    let settings = |tc| Settings {
        hooks: Hooks {
            tc,
            ..Hooks::default()
        },
        ..Settings::default()
    };
    // With this qdisc in place, a clsact qdisc cannot be added.
    let occupy = |interface: &str| {
        node.run("tc", &["qdisc", "add", "dev", interface, "ingress"])
            .expect("qdisc");
    };
    occupy(NIC);
    let auto = settings("auto");
    let mut daemon = Daemon::start(&topology, &auto, &[("node.yaml", NODE)]).expect("a daemon");
    occupy("veth-client");
    daemon
        .configure(&topology, &settings("clsact"))
        .expect("configuration");
    daemon.cli(&["reload"]).expect("reload");
    let fails = |status: &serde_json::Value| {
        let interfaces = status["interfaces"].as_array().expect("interfaces");
        interfaces
            .iter()
            .all(|interface| interface["problem"].is_string())
    };
    daemon
        .wait_status("nothing can be attached", fails)
        .expect("status");
    let sinks = both(&topology, "node").map(|own| [9, 81].map(|port| Sink::open(node, own, port)));
    for (sinks, own) in sinks.iter().zip(both(&topology, "node")) {
        for from in ["internet", "client"] {
            // The programs that were attached before still enforce.
            send(topology.ns(from), SocketAddr::new(own, 9), "denied");
            send(topology.ns(from), SocketAddr::new(own, 81), from);
            sinks[1].until(from);
        }
        assert_eq!(sinks[0].rest(), [""; 0]);
    }
    daemon.detach().expect("detach");

    // A NIC that never was guarded stays open, so that the operator can reach the node; a workload's interface does not.
    daemon.spawn().expect("spawn");
    wait_until("it runs", TIMEOUT * 4, || {
        daemon.status().is_ok_and(|status| fails(&status))
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.log()));
    for (sinks, own) in sinks.iter().zip(both(&topology, "node")) {
        topology.ns("client").enter(|| {
            let socket = UdpSocket::bind((any(own), 0)).expect("socket");
            for _ in 0..20 {
                let _ = socket.send_to(b"unguarded", (own, 81));
            }
        });
        // The daemon writes the table after its attempt to attach; until then the NIC's name may be closed.
        wait_until("a NIC that never was guarded is open", TIMEOUT, || {
            send(&topology.internet, SocketAddr::new(own, 9), "open");
            sinks[0].rest().iter().any(|text| text == "open")
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
        assert_eq!(sinks[1].rest(), [""; 0]);
    }
}
