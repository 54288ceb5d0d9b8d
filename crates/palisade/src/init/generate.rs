//! Texts of the first configuration and policy.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::IpAddr,
};

use ipnet::IpNet;

use super::facts::{Engine, Listener, NodeFacts, Transport};
use crate::survey::{Link, is_link_local};

/// Name of the policy file.
pub(crate) const POLICY_FILE: &str = "node.yaml";
/// Characters of a comment that comes from names of other software.
const MAX_NAME: usize = 64;
/// Characters of a comment with a rule of other software.
const MAX_RULE: usize = 200;
/// Number of network namespaces and routes that are listed.
const MAX_LISTED: usize = 20;

/// The texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Generated {
    /// The configuration.
    pub config: String,
    /// The policy.
    pub policy: String,
    /// Number of interfaces that are guarded.
    pub interfaces: usize,
    /// Number of ports that are open.
    pub ports: usize,
}

/// Use of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// Guards the node.
    Host,
    /// Possibly the node's end of a workload's veth pair.
    Workload,
    /// None of its own, for this reason.
    None(&'static str),
}

/// Returns configuration and policy. `policy_dir`: folder of the policy file. `egress`: whether the policy also restricts
/// what the node sends.
pub(crate) fn generate(facts: &NodeFacts, policy_dir: &str, egress: bool) -> Generated {
    let (config, interfaces) = configuration(facts, policy_dir);
    let (policy, ports) = policy(facts, egress);
    Generated {
        config,
        policy,
        interfaces,
        ports,
    }
}

/// Returns a text from the system for a comment: without control characters, which could end the comment, and bounded.
fn shown(name: &str) -> String {
    shown_within(name, MAX_NAME)
}

fn shown_within(text: &str, length: usize) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .take(length)
        .collect()
}

fn usage(link: &Link, links: &[Link]) -> Use {
    let master = |kind: &str| {
        let master = links.iter().find(|master| Some(master.index) == link.master);
        master.is_some_and(|master| master.kind == kind)
    };
    match link.kind.as_str() {
        _ if link.loopback => Use::None("the loopback is never guarded"),
        _ if master("bond") => Use::None("a port of a bond, which is guarded instead"),
        "" | "bond" => Use::Host,
        "veth" | "macvlan" | "ipvlan" | "netkit" if link.default_route => Use::Host,
        "veth" | "netkit" => Use::Workload,
        "wireguard" | "tun" | "ipip" | "sit" | "gre" | "ip6gre" | "ip6tnl" | "ppp"
            if link.has_addresses() =>
        {
            Use::Host
        }
        "vlan" | "macvlan" | "ipvlan" => {
            Use::None("its frames pass the interface below, where they get their verdict")
        }
        "bridge" => Use::None("its frames pass its ports, where they get their verdict"),
        "vrf" => Use::None("a VRF: its packets pass its ports, where they get their verdict"),
        _ => Use::None("without an address, or of a kind that is not guarded by itself"),
    }
}

fn addresses(link: &Link) -> String {
    let list: Vec<String> = link
        .addresses
        .iter()
        .map(|(address, length)| format!("{address}/{length}"))
        .collect();
    match list.as_slice() {
        [] => "no addresses".to_owned(),
        list => list.join(", "),
    }
}

fn describe(link: &Link) -> String {
    let mut text = if link.kind.is_empty() {
        "NIC".to_owned()
    } else {
        shown(&link.kind)
    };
    let _ = write!(text, ", {}", addresses(link));
    if link.default_route {
        text += ", default route";
    }
    if !link.up {
        text += ", down";
    }
    text
}

/// Returns a TOML string.
fn quoted(text: &str) -> String {
    format!("{text:?}")
}

fn configuration(facts: &NodeFacts, policy_dir: &str) -> (String, usize) {
    let mut text = String::from(
        "# Palisade's configuration, written by `palisade init` from what was in use on this node.\n\
         # All options: config/palisade.toml. Check: palisade run --check-config\n\n[node]\n",
    );
    let _ = writeln!(
        text,
        "# Name in flow records. Default: the host name, {}.\n# name = \"node1\"\n\
         # The policy {POLICY_FILE} selects the node by this label.\n\
         labels = {{ role = \"server\" }}\n",
        shown(&facts.hostname)
    );
    let _ = writeln!(
        text,
        "[policy]\ndir = {}\n\
         # Audit mode: nothing is dropped. What the policy would drop is reported:\n\
         #   palisade observe --follow --verdict audit\n\
         # Once nothing that you need is reported, remove this line and run `palisade reload`.\n\
         audit = true\n",
        quoted(policy_dir)
    );
    let mut guarded = 0;
    for link in &facts.links {
        if usage(link, &facts.links) != Use::Host {
            continue;
        }
        guarded += 1;
        let _ = writeln!(
            text,
            "# {}\n[[interface]]\nname = {}\nrole = \"host\"\n",
            describe(link),
            quoted(&link.name)
        );
    }
    if guarded == 0 {
        text += "# No NIC was found. Without one the node is not guarded.\n\
                 # [[interface]]\n# name = \"eth0\"\n# role = \"host\"\n\n";
    }
    let mut others = facts
        .links
        .iter()
        .filter(|link| !link.loopback)
        .filter_map(|link| match usage(link, &facts.links) {
            Use::None(reason) => Some((link, reason)),
            Use::Host | Use::Workload => None,
        });
    if let Some(first) = others.next() {
        text += "# Interfaces that need no section:\n";
        for (link, reason) in std::iter::once(first).chain(others) {
            let _ = writeln!(text, "#   {} ({}): {reason}", shown(&link.name), describe(link));
        }
        text.push('\n');
    }
    workloads(facts, &mut text);
    sources(facts, &mut text);
    environment(facts, &mut text);
    (text.trim_end().to_owned() + "\n", guarded)
}

/// Adds proposals for workloads behind veths, as comments: the addresses in another network namespace are unknown.
fn workloads(facts: &NodeFacts, text: &mut String) {
    let mut first = true;
    for link in &facts.links {
        if usage(link, &facts.links) != Use::Workload {
            continue;
        }
        if first {
            *text += "# Node's ends of veth pairs. To guard a workload, remove the # and set its name, addresses and labels. Without\n\
                      # a section no policy applies to the workload.\n";
            first = false;
        }
        let _ = writeln!(
            text,
            "# {}\n# [[endpoint]]\n# name = \"workload\"\n# interface = {}\n# addresses = [\"10.0.1.10\"]\n\
             # labels = {{ app = \"workload\" }}\n",
            describe(link),
            quoted(&shown(&link.name))
        );
    }
}

/// Adds proposals for workloads that the daemon can find, as comments: a section closes interfaces.
fn sources(facts: &NodeFacts, text: &mut String) {
    let named: Vec<String> = facts
        .namespaces
        .iter()
        .filter(|name| is_plain(name))
        .take(MAX_LISTED)
        .map(|name| quoted(name))
        .collect();
    let engines: Vec<&Engine> = facts
        .engines
        .iter()
        .filter(|engine| {
            engine
                .socket
                .split('/')
                .all(|part| part.is_empty() || is_plain(part))
        })
        .collect();
    if named.is_empty() && engines.is_empty() {
        return;
    }
    *text += "# Workloads that the daemon can find by itself (docs/DISCOVERY.md). Remove the # of the sections that you want. While a\n\
              # section is there, interfaces that its `interfaces` match (default: veth*) pass nothing until their workload is found.\n";
    for engine in engines {
        let _ = writeln!(
            text,
            "# Containers of {}. container_labels: keys of their labels by which policies select them.\n\
             # [[discover]]\n# kind = {}\n# socket = {}",
            shown(&engine.name),
            quoted(engine.kind),
            quoted(&engine.socket)
        );
        if engine.kind == "containerd" {
            *text += "# addresses = [\"10.0.0.0/8\", \"fd00::/8\"]\n";
        }
        *text += "# container_labels = [\"app\"]\n\n";
    }
    if !named.is_empty() {
        let networks: BTreeSet<IpNet> = facts
            .links
            .iter()
            .filter(|link| usage(link, &facts.links) == Use::Workload)
            .flat_map(|link| &link.addresses)
            .filter(|(address, _)| !is_link_local(*address))
            .filter_map(|(address, length)| IpNet::new(*address, *length).ok())
            .map(|network| network.trunc())
            .collect();
        let networks: Vec<String> = networks
            .iter()
            .map(|network| quoted(&network.to_string()))
            .collect();
        let networks = if networks.is_empty() {
            "\"10.0.1.0/24\", \"fd00:1::/64\"".to_owned()
        } else {
            networks.join(", ")
        };
        let _ = writeln!(
            text,
            "# Named network namespaces. addresses: the prefixes of their addresses.\n\
             # [[discover]]\n# kind = \"netns\"\n# names = [{}]\n# addresses = [{networks}]\n\
             # labels = {{ app = \"{{name}}\" }}\n",
            named.join(", ")
        );
    }
}

/// Returns whether a name has only characters that mean themselves in a pattern and in a path.
fn is_plain(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(is_plain)
}

/// Adds what else was found, as comments.
fn environment(facts: &NodeFacts, text: &mut String) {
    let mut lines = Vec::new();
    for rule in &facts.firewall {
        lines.push(format!("firewall: {}", shown(rule)));
    }
    if !facts.firewall.is_empty() {
        lines.push(
            "  These rules stay, and a packet must pass them and Palisade. Where they translate addresses, the verdict"
                .to_owned(),
        );
        lines.push("  follows the addresses on the wire (docs/OPERATIONS.md, Limits).".to_owned());
    }
    for engine in &facts.engines {
        lines.push(format!(
            "containers: {} ({}). A published port gets its verdict at the NIC, as a port of the node",
            shown(&engine.name),
            shown(&engine.socket)
        ));
    }
    for route in facts.routes.iter().take(MAX_LISTED) {
        let by = facts.links.iter().find(|link| link.index == route.interface);
        let by = by.map_or_else(
            || format!("interface {}", route.interface),
            |link| shown(&link.name),
        );
        let gateway = route
            .gateway
            .map_or_else(String::new, |gateway| format!(" by {gateway}"));
        lines.push(format!("route: {}{gateway} at {by}", route.network));
    }
    if facts.routes.len() > MAX_LISTED {
        lines.push(format!("and {} more routes", facts.routes.len() - MAX_LISTED));
    }
    if !facts.routes.is_empty() {
        lines.push(
            "  Hosts behind a route are `world` for policies, unless a rule names their prefix or they are a [[peer]]."
                .to_owned(),
        );
    }
    if !facts.namespaces.is_empty() {
        let names: Vec<String> = facts
            .namespaces
            .iter()
            .take(MAX_LISTED)
            .map(|name| shown(name))
            .collect();
        lines.push(format!("network namespaces: {}", names.join(", ")));
    }
    if lines.is_empty() {
        return;
    }
    *text += "# Also found:\n";
    for line in lines {
        let _ = writeln!(text, "#   {line}");
    }
}

/// A port with the sockets that are bound to it.
#[derive(Debug, Default)]
struct Port {
    processes: BTreeSet<String>,
    addresses: BTreeSet<IpAddr>,
}

/// Returns the ports of the sockets that `wanted` selects.
fn ports(facts: &NodeFacts, wanted: impl Fn(&Listener) -> bool) -> BTreeMap<(Transport, u16), Port> {
    let mut ports = BTreeMap::<_, Port>::new();
    for listener in facts.listeners.iter().filter(|listener| wanted(listener)) {
        let port = ports.entry((listener.transport, listener.port)).or_default();
        port.processes
            .extend(listener.processes.iter().map(|name| shown(name)));
        port.addresses.insert(listener.address);
    }
    ports
}

/// Returns the network that an operator would write for a peer: the prefix of an interface that contains it, else the
/// usual size of a site's network.
fn network_of(address: IpAddr, links: &[Link]) -> Option<IpNet> {
    let on_link = links
        .iter()
        .flat_map(|link| &link.addresses)
        .filter_map(|(own, length)| IpNet::new(*own, *length).ok())
        .find(|net| net.contains(&address) && net.prefix_len() > 0);
    let usual = match address {
        IpAddr::V4(_) => 24,
        IpAddr::V6(_) => 64,
    };
    on_link
        .or_else(|| IpNet::new(address, usual).ok())
        .map(|net| net.trunc())
}

fn policy(facts: &NodeFacts, egress: bool) -> (String, usize) {
    let is_ephemeral = |listener: &Listener| {
        listener.transport == Transport::Udp && listener.port >= facts.first_ephemeral_port
    };
    let reachable = |listener: &Listener| !listener.address.to_canonical().is_loopback();
    // DHCP has a rule of its own.
    let is_dhcp =
        |listener: &Listener| listener.transport == Transport::Udp && matches!(listener.port, 68 | 546);
    let open = ports(facts, |one| reachable(one) && !is_ephemeral(one) && !is_dhcp(one));
    let mut text = format!(
        "# The node's policy, written by `palisade init` from what was in use. It selects the node by the label role=server\n\
         # of palisade.toml. Check: palisade policy validate {POLICY_FILE}; try: palisade policy trace --from 192.0.2.7 --to\n\
         # host --port 22. A change is in force as soon as the file is written.\n\
         #\n\
         # What no rule allows is denied (in audit mode: reported). Replies to what the node sends need no rule, nor do ARP,\n\
         # neighbour discovery and the loopback.\n"
    );
    if !facts.accept_rules.is_empty() {
        text += "#\n# What nftables accepts. These rules stay, and are not translated: compare them with the ports below.\n";
        for rule in &facts.accept_rules {
            let _ = writeln!(text, "#   {}", shown_within(rule, MAX_RULE));
        }
    }
    text.push_str(
        "apiVersion: cilium.io/v2\n\
         kind: CiliumClusterwideNetworkPolicy\n\
         metadata:\n  name: node\n\
         spec:\n  nodeSelector:\n    matchLabels:\n      role: server\n  ingress:\n",
    );
    let session_port = facts.session.as_ref().map(|session| session.port);
    let mut written = 0;
    for ((transport, number), port) in &open {
        written += 1;
        let processes: Vec<&str> = port.processes.iter().map(String::as_str).collect();
        let who = match processes.as_slice() {
            [] => "an unknown process".to_owned(),
            names => names.join(", "),
        };
        let at: Vec<String> = port.addresses.iter().map(ToString::to_string).collect();
        let _ = writeln!(text, "  # {who}, at {}", at.join(", "));
        if let Some(session) = &facts.session
            && *transport == Transport::Tcp
            && session_port == Some(*number)
        {
            let _ = writeln!(
                text,
                "  # Your ssh session comes from {} by this port. Before you replace `fromEntities` by a network, see that it\n\
                 \x20 # contains that address, for example:\n\
                 \x20 #   fromCIDR: [\"{}\"]",
                session.client,
                network_of(session.client, &facts.links).map_or_else(String::new, |net| net.to_string())
            );
        }
        let _ = writeln!(
            text,
            "  - fromEntities: [all]\n    toPorts:\n    - ports:\n      - {{port: \"{number}\", protocol: {}}}",
            transport.name()
        );
    }
    // The port of the session is open even if the socket was not found, for example in another mount namespace.
    if let Some(session) = &facts.session
        && !open.contains_key(&(Transport::Tcp, session.port))
    {
        written += 1;
        let _ = writeln!(
            text,
            "  # Your ssh session from {} comes by this port.\n  - fromEntities: [all]\n    toPorts:\n    - ports:\n      \
             - {{port: \"{}\", protocol: TCP}}",
            session.client, session.port
        );
    }
    text += "  # ping, with which others find out whether the node lives\n\
             \x20 - fromEntities: [all]\n    icmps:\n    - fields:\n\
             \x20     - {type: EchoRequest, family: IPv4}\n\
             \x20     - {type: EchoRequest, family: IPv6}\n\
             \x20 # DHCP: an offer does not come from the address that the node has asked\n\
             \x20 - fromEntities: [all]\n    toPorts:\n    - ports:\n\
             \x20     - {port: \"68\", protocol: UDP}\n\
             \x20     - {port: \"546\", protocol: UDP}\n";
    let ephemeral = ports(facts, |one| reachable(one) && is_ephemeral(one));
    if !ephemeral.is_empty() {
        let list: Vec<String> = ephemeral
            .iter()
            .take(20)
            .map(|((_, number), port)| {
                let names: Vec<&str> = port.processes.iter().map(String::as_str).collect();
                format!("{number} ({})", names.join(", "))
            })
            .collect();
        let _ = writeln!(
            text,
            "  # Not opened: UDP ports that the kernel has chosen, which clients use for their replies: {}",
            list.join(", ")
        );
    }
    if egress {
        egress_rules(facts, &mut text);
    } else {
        text +=
            "  # Egress is open: the policy has no egress section. `palisade init --egress` proposes one.\n";
    }
    (text, written)
}

fn egress_rules(facts: &NodeFacts, text: &mut String) {
    *text += "  # What the node may send. Ports without a rule are denied; look at the reports of audit mode before you enforce\n\
              \x20 # this section.\n\
              \x20 egress:\n";
    let servers: Vec<String> = facts
        .dns_servers
        .iter()
        .filter(|server| !server.is_loopback())
        .map(|server| format!("\"{}\"", IpNet::from(*server)))
        .collect();
    let dns_ports = "    toPorts:\n    - ports:\n      - {port: \"53\", protocol: ANY}";
    if servers.is_empty() {
        let _ = writeln!(
            text,
            "  # DNS. /etc/resolv.conf names no server outside of the node, so every server is allowed.\n  \
             - toEntities: [all]\n{dns_ports}"
        );
    } else {
        let _ = writeln!(
            text,
            "  # DNS: the servers of /etc/resolv.conf\n  - toCIDR: [{}]\n{dns_ports}",
            servers.join(", ")
        );
    }
    *text += "  # NTP and DHCP\n\
              \x20 - toEntities: [all]\n    toPorts:\n    - ports:\n\
              \x20     - {port: \"123\", protocol: UDP}\n\
              \x20     - {port: \"67\", protocol: UDP}\n\
              \x20     - {port: \"547\", protocol: UDP}\n\
              \x20 # ping\n\
              \x20 - toEntities: [all]\n    icmps:\n    - fields:\n\
              \x20     - {type: EchoRequest, family: IPv4}\n\
              \x20     - {type: EchoRequest, family: IPv6}\n";
    let mut ports = BTreeMap::<(Transport, u16), BTreeSet<String>>::new();
    for outgoing in &facts.outgoing {
        if outgoing.port != 53 {
            let processes = ports.entry((outgoing.transport, outgoing.port)).or_default();
            processes.extend(outgoing.processes.iter().map(|name| shown(name)));
        }
    }
    for ((transport, number), processes) in ports {
        let names: Vec<&str> = processes.iter().map(String::as_str).collect();
        let who = if names.is_empty() {
            "an unknown process".to_owned()
        } else {
            names.join(", ")
        };
        let _ = writeln!(
            text,
            "  # a connection of {who}\n  - toEntities: [all]\n    toPorts:\n    - ports:\n      \
             - {{port: \"{number}\", protocol: {}}}",
            transport.name()
        );
    }
}

#[cfg(test)]
mod tests;
