//! nftables table for packets that escape the programs: packets of a configured interface without programs, and packets
//! that DNAT, TPROXY or a mark directs to the node after the programs have evaluated them as forwarded.
//!
//! The table has no owner socket (`NFT_TABLE_F_OWNER`), so it stays when the process ends, like the attached programs.
//! The table is replaced as a whole in one transaction: a packet meets the old rules or the new ones.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use palisade_abi::{Counter, Direction, Reason, protocol};

use crate::sys::{
    SyscallError,
    netlink::{self, Attributes, Request, Socket, find},
    nft::{
        self, COUNTER_BYTES, COUNTER_PACKETS, Comparison, Connection, Expression, Family, Hook, KeyType,
        Meta, OBJECT_DATA, OBJECT_NAME, TABLE_USERDATA, Table,
    },
};

/// `NF_IP_PRI_RAW`: before nf_conntrack.
const RAW: i32 = -300;
/// `NF_IP_PRI_CONNTRACK_HELPER`: after filters and NAT of other programs. A packet that IPVS takes over at the input
/// hook does not reach this priority.
const LATE: i32 = 300;
/// Interface index of the loopback (`LOOPBACK_IFINDEX`), the same in every network namespace.
const LOOPBACK: u32 = 1;
/// Maximum length of a comment that `nft` accepts, bytes.
const LONGEST_NOTE: usize = 120;

/// Comments of rules.
const DISCOVERY: &str = "neighbour discovery";
const UNGUARDED: &str = "219: configured and not guarded";
const UNFOUND: &str = "219: an interface of a workload that is not found";

const UNGUARDED_IN: &str = "unguarded_in";
const UNGUARDED_OUT: &str = "unguarded_out";
const TRANSLATED: &str = "translated";
/// Counters of the table, with the reason and direction that the programs use for the same drop.
const COUNTERS: [(&str, Reason, Direction); 3] = [
    (UNGUARDED_IN, Reason::Unguarded, Direction::Ingress),
    (UNGUARDED_OUT, Reason::Unguarded, Direction::Egress),
    (TRANSLATED, Reason::Translated, Direction::Ingress),
];

const ENFORCED: &str = "enforced";
const NAMES: &str = "names";
const WORKLOADS: &str = "workloads";
const ENDPOINTS_V4: &str = "endpoints4";
const ENDPOINTS_V6: &str = "endpoints6";
const OWN_V4: &str = "own4";
const OWN_V6: &str = "own6";

/// Contents of the table.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rules {
    /// Indexes of the interfaces with programs, and of the interfaces that are stacked on them (bridges, VRFs, VLANs).
    pub enforced: BTreeSet<u32>,
    /// Interfaces of `enforced` that belong to workloads or are stacked on an interface of a workload.
    pub workloads: BTreeSet<u32>,
    /// Names of configured interfaces. Packets of such an interface, except neighbour discovery, are dropped unless its
    /// index is in `enforced`.
    pub names: BTreeSet<String>,
    /// Names of interfaces that belong to workloads, whether these are known or not. Packets of such an interface,
    /// except neighbour discovery, are dropped unless its index is in `enforced`, also if they entered by an interface
    /// with programs.
    pub patterns: BTreeSet<NamePattern>,
    /// Addresses of workloads: the node accepts a packet with such a source only from an interface in `workloads` or
    /// from the loopback.
    pub endpoints: BTreeSet<IpAddr>,
    /// Destinations that the programs treat as the node: addresses, broadcast addresses and local routes.
    pub own: BTreeSet<IpNet>,
    /// Whether forwarded packets must be checked, because some of them can bypass all interfaces with programs. The
    /// check costs a lookup for every forwarded packet.
    pub forwards: bool,
    /// Whether the node's ingress policy is enforced. If it is, packets that reach the node without having been
    /// evaluated against that policy are dropped.
    pub is_enforced: bool,
    /// Whether the node has NAT rules. Only then do rules load conntrack state, since a rule that loads it makes the
    /// kernel track all connections.
    pub has_nat: bool,
    /// Whether an interface of `names` is, or was, a port of a bridge. Bridged frames meet only tables of the bridge
    /// family.
    pub has_bridge: bool,
}

/// Names of interfaces: one name, or all with the same beginning.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum NamePattern {
    /// This name.
    Name(String),
    /// Every name with this beginning.
    Prefix(String),
}

impl NamePattern {
    /// Returns the expression that compares the loaded name. The kernel pads names with zero bytes, and a comparison
    /// that is shorter than the register compares its beginning.
    fn expression(&self) -> Expression {
        let mut bytes = match self {
            Self::Name(text) | Self::Prefix(text) => text.as_bytes().to_vec(),
        };
        if matches!(self, Self::Name(_)) {
            bytes.push(0);
        }
        Expression::Compare(Comparison::Equal, bytes)
    }
}

impl Rules {
    /// Returns whether no table is needed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.patterns.is_empty() && self.endpoints.is_empty() && !self.is_enforced
    }

    /// Returns whether the table has a chain for forwarded packets.
    fn closes_forwarding(&self) -> bool {
        self.forwards && !(self.endpoints.is_empty() && self.patterns.is_empty())
    }
}

/// Error of reading or writing the table.
#[derive(Debug, thiserror::Error)]
pub enum NetfilterError {
    /// A request to the kernel failed.
    #[error(transparent)]
    Syscall(#[from] SyscallError),
    /// A table of this name exists that another program or daemon has created.
    #[error(
        "the nftables table '{family} {name}' exists and another program or daemon has created it ({note}): delete it, or give this daemon \
         another [worker] interface, by which the table is named"
    )]
    Foreign {
        /// Family of the table, inet or bridge.
        family: &'static str,
        /// Name of the table.
        name: String,
        /// Comment of the table.
        note: String,
    },
}

impl NetfilterError {
    /// Returns whether the kernel has no nf_tables.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        let Self::Syscall(error) = self else { return false };
        matches!(
            error.errno(),
            libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL
        )
    }
}

/// Parts of the table that need optional kernel features. The rest works without them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Base,
    Mark,
    Nat,
    Bridge,
}

impl Part {
    /// Returns the text about the packets that pass without this part.
    const fn lack(self) -> &'static str {
        match self {
            Self::Base => "",
            Self::Mark => {
                "one-way datagrams that TPROXY or routing by mark redirects to the node are delivered (the kernel \
                 option CONFIG_NFT_FIB_INET is needed)"
            }
            Self::Nat => {
                "one-way datagrams that DNAT redirects to the node are delivered (the kernel option CONFIG_NFT_CT is \
                 needed)"
            }
            Self::Bridge => {
                "a bridge forwards between its ports while one of them is not guarded (the kernel option \
                 CONFIG_NF_TABLES_BRIDGE is needed)"
            }
        }
    }
}

/// Family and name of tables.
type Tables = Vec<(Family, String)>;
/// Part, description and message of one request.
type Step = (Part, String, Request);

/// Returns family and name of every nftables table of this network namespace.
///
/// # Errors
/// [`SyscallError`] if the kernel refuses the request.
pub fn nftables() -> Result<Vec<String>, SyscallError> {
    let mut tables = Vec::new();
    Socket::open(libc::NETLINK_NETFILTER)?.query(
        nft::get_tables(),
        libc::NLM_F_DUMP,
        "listing the nftables tables",
        &mut |_, payload| {
            let name = find(payload.get(4..).unwrap_or_default(), nft::TABLE).map(netlink::text);
            let family = match payload.first() {
                Some(1) => "inet",
                Some(2) => "ip",
                Some(3) => "arp",
                Some(5) => "netdev",
                Some(7) => "bridge",
                Some(10) => "ip6",
                _ => "?",
            };
            tables.extend(name.map(|name| format!("{family} {name}")));
        },
    )?;
    Ok(tables)
}

/// Access to the nftables table of one daemon, in the network namespace of the thread that has called [`Self::open`].
pub struct Netfilter {
    name: String,
    owner: String,
    socket: Socket,
}

impl std::fmt::Debug for Netfilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Netfilter")
            .field("name", &self.name)
            .field("owner", &self.owner)
            .finish_non_exhaustive()
    }
}

impl Netfilter {
    /// Opens a socket for the table `name`. `owner` identifies the daemon and is the comment of the table; a table
    /// with another comment is never changed.
    ///
    /// # Errors
    /// [`NetfilterError::Syscall`] if the kernel has no netlink for netfilter.
    pub fn open(name: &str, owner: &str) -> Result<Self, NetfilterError> {
        let socket = Socket::open(libc::NETLINK_NETFILTER)?;
        socket.bind()?;
        Ok(Self {
            name: name.to_owned(),
            owner: note(owner),
            socket,
        })
    }

    /// Returns the port id of the socket. The kernel's notifications about changes that this value makes carry this id.
    ///
    /// # Errors
    /// [`NetfilterError::Syscall`] if getsockname fails.
    pub fn port(&self) -> Result<u32, NetfilterError> {
        Ok(self.socket.port()?)
    }

    /// Replaces the contents of the table in one transaction; counters keep their values. Returns a text for each part
    /// that the kernel does not support.
    ///
    /// # Errors
    /// [`NetfilterError`] if the kernel refuses a request, or if another daemon or program has created the table.
    pub fn write(&mut self, rules: &Rules) -> Result<Vec<String>, NetfilterError> {
        if rules.is_empty() {
            self.remove()?;
            return Ok(Vec::new());
        }
        let (found, foreign) = self.tables()?;
        if let Some(foreign) = foreign {
            return Err(foreign);
        }
        let counts = self.count(&found)?;
        let call = format!("the nftables table {}", self.name);
        let lacking = send_supported(
            || steps(&self.name, &self.owner, rules, &found, &counts),
            |requests| self.socket.batch(requests, nft::SUBSYSTEM, &call),
        );
        match lacking {
            Ok(lacking) => Ok(lacking.into_iter().map(|part| part.lack().to_owned()).collect()),
            Err((what, mut error)) => {
                error.call = format!("{call}: {what}");
                Err(error.into())
            }
        }
    }

    /// Returns the counters of dropped packets by reason and direction. Counters that are zero are omitted.
    ///
    /// # Errors
    /// [`NetfilterError::Syscall`] if the kernel refuses a request.
    pub fn counts(&mut self) -> Result<Vec<(Reason, Direction, Counter)>, NetfilterError> {
        let (found, _) = self.tables()?;
        let counts = self.count(&found)?;
        Ok(COUNTERS
            .into_iter()
            .zip(counts)
            .filter(|(_, count)| count.packets != 0)
            .map(|((_, reason, direction), count)| (reason, direction, count))
            .collect())
    }

    /// Returns family and name of each table that this daemon has created.
    ///
    /// # Errors
    /// [`NetfilterError::Syscall`] if the kernel refuses the request.
    pub fn present(&mut self) -> Result<Vec<String>, NetfilterError> {
        let (found, _) = self.tables()?;
        Ok(found
            .iter()
            .map(|(family, name)| format!("{} {name}", family.name()))
            .collect())
    }

    /// Removes the table. A table that does not exist, or that another daemon or program has created, is not an error.
    ///
    /// # Errors
    /// [`NetfilterError::Syscall`] if the kernel refuses a request.
    pub fn remove(&mut self) -> Result<(), NetfilterError> {
        let (found, _) = self.tables()?;
        let steps: Vec<Request> = found
            .iter()
            .map(|(family, name)| {
                Table {
                    family: *family,
                    name,
                }
                .delete()
            })
            .collect();
        if steps.is_empty() {
            return Ok(());
        }
        let call = format!("removing the nftables table {}", self.name);
        match self.socket.batch(steps, nft::SUBSYSTEM, &call) {
            Err((_, error)) if error.errno() != libc::ENOENT => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Returns the tables of this daemon, including those with earlier names, and an error if the table of the present
    /// name belongs to another daemon or program.
    fn tables(&mut self) -> Result<(Tables, Option<NetfilterError>), NetfilterError> {
        let mut tables = Vec::new();
        let call = "listing the nftables tables";
        self.socket
            .query(nft::get_tables(), libc::NLM_F_DUMP, call, &mut |_, payload| {
                let (Some(family), attributes) = (
                    payload.first().copied().and_then(Family::from_number),
                    payload.get(4..).unwrap_or_default(),
                ) else {
                    return;
                };
                let name = find(attributes, nft::TABLE)
                    .map(netlink::text)
                    .unwrap_or_default();
                // The comment follows one byte of type and one byte of length, and ends with a zero byte.
                let note = find(attributes, TABLE_USERDATA)
                    .and_then(|userdata| userdata.get(2..))
                    .map(netlink::text)
                    .unwrap_or_default();
                tables.push((family, name, note));
            })?;
        let foreign = tables
            .iter()
            .find(|(_, name, note)| *name == self.name && *note != self.owner)
            .map(|(family, name, note)| NetfilterError::Foreign {
                family: family.name(),
                name: name.clone(),
                note: if note.is_empty() {
                    "it has no comment".to_owned()
                } else {
                    format!("its comment: {note}")
                },
            });
        tables.retain(|(.., note)| *note == self.owner);
        let own = tables
            .into_iter()
            .map(|(family, name, _)| (family, name))
            .collect();
        Ok((own, foreign))
    }

    /// Returns the sums of the counters of these tables, in the order of [`COUNTERS`].
    fn count(&mut self, tables: &[(Family, String)]) -> Result<[Counter; 3], NetfilterError> {
        let mut counts = [Counter::default(); 3];
        for (family, name) in tables {
            let request = Table {
                family: *family,
                name,
            }
            .get_counters();
            let call = format!("reading the counters of the nftables table {}", self.name);
            let answer = self
                .socket
                .query(request, libc::NLM_F_DUMP, &call, &mut |_, payload| {
                    if let Some((name, count)) = counter(payload)
                        && let Some(at) = COUNTERS.iter().position(|(known, ..)| *known == name)
                    {
                        counts[at].packets = counts[at].packets.wrapping_add(count.packets);
                        counts[at].bytes = counts[at].bytes.wrapping_add(count.bytes);
                    }
                });
            match answer {
                Ok(()) => {}
                Err(error) if error.errno() == libc::ENOENT => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(counts)
    }
}

/// Sends the steps as one transaction, and repeats it without each optional part that the kernel refuses. Returns the
/// refused parts. An error contains the description of the refused step.
fn send_supported(
    steps: impl Fn() -> Vec<Step>,
    mut send: impl FnMut(Vec<Request>) -> Result<(), (Option<usize>, SyscallError)>,
) -> Result<Vec<Part>, (String, SyscallError)> {
    let mut lacking: Vec<Part> = Vec::new();
    loop {
        let (about, requests): (Vec<(Part, String)>, Vec<Request>) = steps()
            .into_iter()
            .filter(|(part, ..)| !lacking.contains(part))
            .map(|(part, what, request)| ((part, what), request))
            .unzip();
        let Err((number, error)) = send(requests) else {
            return Ok(lacking);
        };
        match number.and_then(|number| about.get(number)) {
            Some((Part::Base, what)) => return Err((what.clone(), error)),
            Some((part, _)) => lacking.push(*part),
            None => return Err(("the transaction".to_owned(), error)),
        }
    }
}

/// Returns the steps that replace the tables `found` by a table of these rules and counter values.
fn steps(
    name: &str,
    owner: &str,
    rules: &Rules,
    found: &[(Family, String)],
    counts: &[Counter; 3],
) -> Vec<Step> {
    let mut steps = Vec::new();
    let table = |family| Table { family, name };
    let inet = table(Family::Inet);
    let mut add = |part: Part, what: &str, request: Request| steps.push((part, what.to_owned(), request));
    for (family, name) in found {
        let old = Table {
            family: *family,
            name,
        };
        add(Part::Base, "the old table", old.delete());
    }
    add(Part::Base, "the table", inet.make(Some(owner)));
    for ((name, ..), count) in COUNTERS.iter().zip(counts) {
        let counter = inet.counter(name, count.packets, count.bytes);
        add(Part::Base, "a counter", counter);
    }
    let (endpoints4, endpoints6) = split(&rules.endpoints);
    let sets = [
        (ENFORCED, KeyType::InterfaceIndex, indexes(&rules.enforced)),
        (WORKLOADS, KeyType::InterfaceIndex, indexes(&rules.workloads)),
        (NAMES, KeyType::InterfaceName, names(&rules.names)),
        (ENDPOINTS_V4, KeyType::Ipv4, endpoints4),
        (ENDPOINTS_V6, KeyType::Ipv6, endpoints6),
    ];
    let mut id = 0;
    for (name, keys, elements) in &sets {
        id += 1;
        for request in inet.set(name, *keys, id, elements) {
            add(Part::Base, "a set", request);
        }
    }
    let (own4, own6) = ranges(&rules.own);
    for (name, keys, ranges) in [(OWN_V4, KeyType::Ipv4, own4), (OWN_V6, KeyType::Ipv6, own6)] {
        id += 1;
        for request in inet.ranges(name, keys, id, &ranges) {
            add(Part::Base, "a set of addresses", request);
        }
    }
    for (chain, hook) in [
        ("input", Hook::Input),
        ("forward", Hook::Forward),
        ("output", Hook::Output),
    ] {
        // A chain costs time for every packet, even if no rule matches. Only workloads have a policy for forwarded
        // packets.
        if hook != Hook::Forward || rules.closes_forwarding() {
            add(Part::Base, "a chain", inet.chain(chain, hook, LATE));
        }
    }
    for (part, chain, expressions, note) in inet_rules(rules) {
        let what = format!("a rule of {chain}");
        add(part, &what, inet.rule(chain, &expressions, note));
    }
    let bridge = table(Family::Bridge);
    if !rules.has_bridge {
        return steps;
    }
    add(Part::Bridge, "the table of bridges", bridge.make(Some(owner)));
    for (name, ..) in &COUNTERS[..2] {
        add(Part::Bridge, "a counter of bridges", bridge.counter(name, 0, 0));
    }
    for (name, keys, elements) in [&sets[0], &sets[2]] {
        id += 1;
        for request in bridge.set(name, *keys, id, elements) {
            add(Part::Bridge, "a set of bridges", request);
        }
    }
    for (chain, hook, priority) in [
        ("prerouting", Hook::Prerouting, RAW),
        ("postrouting", Hook::Postrouting, LATE),
    ] {
        add(
            Part::Bridge,
            "a chain of bridges",
            bridge.chain(chain, hook, priority),
        );
    }
    for (chain, expressions, note) in bridge_rules(&rules.patterns) {
        add(
            Part::Bridge,
            "a rule of bridges",
            bridge.rule(chain, &expressions, note),
        );
    }
    steps
}

/// Returns the rules of the inet table: part, chain, expressions, comment.
fn inet_rules(rules: &Rules) -> Vec<(Part, &'static str, Vec<Expression>, &'static str)> {
    use Expression::{
        Accept, And, Compare, Connection as Load, Count, DestinationType, Drop, In, Meta as Of, Network,
        NotIn,
    };
    let by = |index: u32| Compare(Comparison::Equal, index.to_ne_bytes().to_vec());
    let v4 = [Of(Meta::Family), Compare(Comparison::Equal, vec![2])];
    let v6 = [Of(Meta::Family), Compare(Comparison::Equal, vec![10])];
    let mut all = Vec::new();
    let mut input = |part: Part, expressions: Vec<Expression>, note: &'static str| {
        all.push((part, "input", expressions, note));
    };
    input(
        Part::Base,
        vec![Of(Meta::InIndex), by(LOOPBACK), Accept],
        "the node itself",
    );
    for (family, source, endpoints) in [
        (
            &v4,
            Network {
                offset: 12,
                length: 4,
            },
            ENDPOINTS_V4,
        ),
        (
            &v6,
            Network {
                offset: 8,
                length: 16,
            },
            ENDPOINTS_V6,
        ),
    ] {
        let is_used = rules
            .endpoints
            .iter()
            .any(|address| address.is_ipv4() == (endpoints == ENDPOINTS_V4));
        if !is_used {
            continue;
        }
        let mut expressions = family.to_vec();
        expressions.extend([
            source,
            In(endpoints),
            Of(Meta::InIndex),
            NotIn(WORKLOADS),
            Count(UNGUARDED_IN),
            Drop,
        ]);
        input(
            Part::Base,
            expressions,
            "219: an address of a workload by an interface that is not guarded",
        );
    }
    for (chain, expressions, note) in unguarded_rules(&rules.patterns, rules.closes_forwarding()) {
        all.push((Part::Base, chain, expressions, note));
    }
    if !rules.is_enforced {
        return all;
    }
    let mut input = |part: Part, expressions: Vec<Expression>, note: &'static str| {
        all.push((part, "input", expressions, note));
    };
    for (family, destination, own) in [
        (
            &v4,
            Network {
                offset: 16,
                length: 4,
            },
            OWN_V4,
        ),
        (
            &v6,
            Network {
                offset: 24,
                length: 16,
            },
            OWN_V6,
        ),
    ] {
        // The programs look up routes without the mark, so they have evaluated a packet that TPROXY or routing by mark
        // delivers to the node as a forwarded packet.
        let mut expressions = vec![
            Of(Meta::Mark),
            Compare(Comparison::NotEqual, vec![0; 4]),
            Of(Meta::InIndex),
            In(ENFORCED),
        ];
        expressions.extend_from_slice(family);
        expressions.extend([destination, NotIn(own), DestinationType]);
        // The set of own addresses can be outdated, so a destination that is local by the kernel's routing table
        // passes, too. 2 to 5 are RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST and RTN_MULTICAST.
        expressions
            .extend((2..=5_u32).map(|kind| Compare(Comparison::NotEqual, kind.to_ne_bytes().to_vec())));
        expressions.extend([Count(TRANSLATED), Drop]);
        input(
            Part::Mark,
            expressions,
            "229: redirected to the node by TPROXY or a mark",
        );
    }
    if !rules.has_nat {
        return all;
    }
    /// `IPS_DST_NAT`.
    const DESTINATION_CHANGED: u32 = 1 << 5;
    for (destination, own) in [
        (Connection::Destination4, OWN_V4),
        (Connection::Destination6, OWN_V6),
    ] {
        let expressions = vec![
            // The rule is only for the original direction. IPS_DST_NAT is a property of the connection, so replies to a
            // connection that the node has opened and DNAT has changed have this bit, too.
            Load(Connection::Direction),
            Compare(Comparison::Equal, vec![0]),
            Load(Connection::Status),
            And(DESTINATION_CHANGED),
            Compare(Comparison::NotEqual, vec![0; 4]),
            Of(Meta::InIndex),
            In(ENFORCED),
            Load(destination),
            NotIn(own),
            Count(TRANSLATED),
            Drop,
        ];
        input(Part::Nat, expressions, "229: redirected to the node by DNAT");
    }
    all
}

/// Returns rules that drop the frames of a bridge which enter or leave by a port that is a configured interface without
/// programs.
fn bridge_rules(patterns: &BTreeSet<NamePattern>) -> Vec<(&'static str, Vec<Expression>, &'static str)> {
    use Expression::{Accept, Count, Drop, In, Meta as Of};
    let mut all = Vec::new();
    for (chain, index, name, counter) in [
        ("prerouting", Meta::InIndex, Meta::InName, UNGUARDED_IN),
        ("postrouting", Meta::OutIndex, Meta::OutName, UNGUARDED_OUT),
    ] {
        all.push((chain, vec![Of(index), In(ENFORCED), Accept], ""));
        all.push((chain, vec![Of(name), In(NAMES), Count(counter), Drop], UNGUARDED));
        for pattern in patterns {
            all.push((
                chain,
                vec![Of(name), pattern.expression(), Count(counter), Drop],
                UNFOUND,
            ));
        }
    }
    all
}

/// Returns rules that drop packets which enter or leave by a configured interface without programs: packets that the
/// node receives or sends and, with `forwards`, packets that it forwards. For a packet that enters by an interface with
/// programs, the programs check the output interface (`xdp/src/link.rs`), so such a packet costs one lookup here.
fn unguarded_rules(
    patterns: &BTreeSet<NamePattern>,
    forwards: bool,
) -> Vec<(&'static str, Vec<Expression>, &'static str)> {
    use Expression::{Accept, Compare, Count, Drop, In, Meta as Of, Network, NotIn, Transport};
    // These rules accept neighbour solicitations and advertisements with hop limit 255, which no router has forwarded
    // (RFC 4861, section 7.1). Without the rules, the first packets of a new interface would wait a second for the next
    // solicitation. ARP packets do not pass these hooks.
    let discovery = |index: Meta, own: bool| {
        let mut expressions = vec![
            Of(Meta::Family),
            Compare(Comparison::Equal, vec![10]),
            Of(Meta::Protocol),
            Compare(Comparison::Equal, vec![protocol::ICMPV6]),
            Of(index),
            NotIn(ENFORCED),
            Transport { offset: 0, length: 1 },
            Compare(Comparison::GreaterOrEqual, vec![135]),
            Compare(Comparison::LessOrEqual, vec![136]),
            Network { offset: 7, length: 1 },
            Compare(Comparison::Equal, vec![255]),
        ];
        if own {
            expressions.extend([
                Network {
                    offset: 24,
                    length: 16,
                },
                In(OWN_V6),
            ]);
        }
        expressions.push(Accept);
        expressions
    };
    let unfound = |index: Meta, name: Meta, counter: &'static str, pattern: &NamePattern| {
        vec![
            Of(index),
            NotIn(ENFORCED),
            Of(name),
            pattern.expression(),
            Count(counter),
            Drop,
        ]
    };
    let unguarded = |index: Meta, name: Meta, counter: &'static str| {
        vec![
            Of(index),
            NotIn(ENFORCED),
            Of(name),
            In(NAMES),
            Count(counter),
            Drop,
        ]
    };
    let mut all = vec![
        ("input", discovery(Meta::InIndex, true), DISCOVERY),
        (
            "input",
            unguarded(Meta::InIndex, Meta::InName, UNGUARDED_IN),
            UNGUARDED,
        ),
        ("output", discovery(Meta::OutIndex, false), DISCOVERY),
        (
            "output",
            unguarded(Meta::OutIndex, Meta::OutName, UNGUARDED_OUT),
            UNGUARDED,
        ),
    ];
    for pattern in patterns {
        let enters = unfound(Meta::InIndex, Meta::InName, UNGUARDED_IN, pattern);
        let leaves = unfound(Meta::OutIndex, Meta::OutName, UNGUARDED_OUT, pattern);
        all.push(("input", enters, UNFOUND));
        all.push(("output", leaves, UNFOUND));
    }
    if forwards {
        // These rules come before the one that accepts what entered by an interface with programs, because the programs
        // do not know the addresses behind an interface of a workload that is not found.
        for pattern in patterns {
            let leaves = unfound(Meta::OutIndex, Meta::OutName, UNGUARDED_OUT, pattern);
            all.push(("forward", leaves, UNFOUND));
        }
        all.extend([
            ("forward", vec![Of(Meta::InIndex), In(ENFORCED), Accept], ""),
            (
                "forward",
                vec![Of(Meta::InName), In(NAMES), Count(UNGUARDED_IN), Drop],
                UNGUARDED,
            ),
            (
                "forward",
                unguarded(Meta::OutIndex, Meta::OutName, UNGUARDED_OUT),
                UNGUARDED,
            ),
        ]);
        for pattern in patterns {
            let enters = unfound(Meta::InIndex, Meta::InName, UNGUARDED_IN, pattern);
            all.push(("forward", enters, UNFOUND));
        }
    }
    all
}

/// Returns the comment of a daemon's table. A long `owner` is cut at its beginning, since it ends with the pin
/// directory, by which daemons differ.
fn note(owner: &str) -> String {
    let mut from = owner.len().saturating_sub(LONGEST_NOTE);
    while !owner.is_char_boundary(from) {
        from += 1;
    }
    owner[from..].to_owned()
}

/// Parses name and values of a counter object.
fn counter(payload: &[u8]) -> Option<(String, Counter)> {
    let attributes = payload.get(4..)?;
    let name = netlink::text(find(attributes, OBJECT_NAME)?);
    let number = |kind: u16| {
        Attributes(find(attributes, OBJECT_DATA)?)
            .find(|&(found, _)| found == kind)
            .and_then(|(_, value)| Some(u64::from_be_bytes(value.try_into().ok()?)))
    };
    let count = Counter {
        packets: number(COUNTER_PACKETS)?,
        bytes: number(COUNTER_BYTES)?,
    };
    Some((name, count))
}

fn indexes(indexes: &BTreeSet<u32>) -> Vec<Vec<u8>> {
    indexes.iter().map(|index| index.to_ne_bytes().to_vec()).collect()
}

fn names(names: &BTreeSet<String>) -> Vec<Vec<u8>> {
    /// `IFNAMSIZ`, with the zero byte at the end.
    const LENGTH: usize = 16;
    names
        .iter()
        .filter(|name| name.len() < LENGTH)
        .map(|name| {
            let mut key = name.as_bytes().to_vec();
            key.resize(LENGTH, 0);
            key
        })
        .collect()
}

fn split(addresses: &BTreeSet<IpAddr>) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for address in addresses {
        match address {
            IpAddr::V4(address) => v4.push(address.octets().to_vec()),
            IpAddr::V6(address) => v6.push(address.octets().to_vec()),
        }
    }
    (v4, v6)
}

/// First key of a range, and the first key after the range. The latter is `None` if the range contains the largest key.
type Range = (Vec<u8>, Option<Vec<u8>>);

/// Returns the prefixes of each family as disjoint ranges, together with the groups that the programs evaluate as
/// ingress of the node: 224.0.0.0/3 (multicast, broadcast) and ff00::/8.
fn ranges(prefixes: &BTreeSet<IpNet>) -> (Vec<Range>, Vec<Range>) {
    let mut v4 = vec![(
        u128::from(Ipv4Addr::new(224, 0, 0, 0).to_bits()),
        u128::from(u32::MAX),
    )];
    let mut v6 = vec![(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).to_bits(), u128::MAX)];
    for prefix in prefixes {
        match prefix {
            IpNet::V4(prefix) => v4.push((
                prefix.network().to_bits().into(),
                prefix.broadcast().to_bits().into(),
            )),
            IpNet::V6(prefix) => v6.push((prefix.network().to_bits(), prefix.broadcast().to_bits())),
        }
    }
    let v4 = merged(v4).into_iter().map(|(first, last)| {
        let key = |value: u128| u32::try_from(value).ok().map(|bits| bits.to_be_bytes().to_vec());
        (key(first).unwrap_or_default(), key(last + 1))
    });
    let v6 = merged(v6).into_iter().map(|(first, last)| {
        let key = |value: u128| value.to_be_bytes().to_vec();
        (key(first), last.checked_add(1).map(key))
    });
    (v4.collect(), v6.collect())
}

/// Returns the ranges (first, last) with overlapping and adjacent ones merged.
fn merged(mut ranges: Vec<(u128, u128)>) -> Vec<(u128, u128)> {
    ranges.sort_unstable();
    let mut all: Vec<(u128, u128)> = Vec::new();
    for (first, last) in ranges {
        match all.last_mut() {
            Some((_, end)) if *end == u128::MAX || first <= *end + 1 => *end = last.max(*end),
            _ => all.push((first, last)),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_and_adjacent_ranges_are_merged() {
        assert_eq!(
            merged(vec![(5, 6), (1, 2), (3, 3), (9, u128::MAX), (10, 11)]),
            [(1, 3), (5, 6), (9, u128::MAX)]
        );
        let own = [
            "10.0.0.0/8",
            "10.1.0.0/16",
            "11.0.0.1/32",
            "239.0.0.1/32",
            "fe80::1/128",
        ];
        let (v4, v6) = ranges(&own.into_iter().map(|prefix| prefix.parse().unwrap()).collect());
        let v4_wanted: [Range; 3] = [
            (vec![10, 0, 0, 0], Some(vec![11, 0, 0, 0])),
            (vec![11, 0, 0, 1], Some(vec![11, 0, 0, 2])),
            (vec![224, 0, 0, 0], None),
        ];
        assert_eq!(v4, v4_wanted);
        assert_eq!(v6.len(), 2);
        assert_eq!(v6[1].1, None);
    }

    #[test]
    fn a_comment_keeps_the_end_of_a_long_path() {
        assert_eq!(note("palisade"), "palisade");
        let long = format!("palisade {}", "é".repeat(100));
        assert!(note(&long).len() <= LONGEST_NOTE && long.ends_with(&note(&long)));
    }

    #[test]
    fn parts_that_the_kernel_lacks_are_left_out() {
        let rules = Rules {
            is_enforced: true,
            has_nat: true,
            has_bridge: true,
            ..Rules::default()
        };
        let all = || {
            steps(
                "t",
                "o",
                &rules,
                &[(Family::Bridge, "t".to_owned())],
                &Default::default(),
            )
        };
        let refused = || SyscallError::new("batch", std::io::Error::from_raw_os_error(libc::ENOENT));
        for missing in [Part::Mark, Part::Nat, Part::Bridge] {
            let first = all().iter().position(|(part, ..)| *part == missing).unwrap();
            let (mut lengths, whole) = (Vec::new(), all().len());
            let lacking = send_supported(all, |requests| {
                lengths.push(requests.len());
                if lengths.len() == 1 {
                    Err((Some(first), refused()))
                } else {
                    Ok(())
                }
            });
            assert_eq!(lacking.unwrap(), [missing]);
            let left = all().iter().filter(|(part, ..)| *part != missing).count();
            assert_eq!(lengths, [whole, left]);
            assert!(!missing.lack().is_empty());
        }
        for at in [Some(0), None] {
            send_supported(all, |_| Err((at, refused()))).unwrap_err();
        }
    }

    #[test]
    fn there_is_a_forward_chain_only_for_endpoints() {
        let chains = |forwards, endpoints: &[IpAddr]| {
            let rules = Rules {
                forwards,
                names: ["veth-a".to_owned()].into(),
                endpoints: endpoints.iter().copied().collect(),
                ..Rules::default()
            };
            let steps = steps("t", "a", &rules, &[], &[Counter::default(); 3]);
            let made = steps.iter().filter(|(_, what, _)| what == "a chain").count();
            let used: BTreeSet<_> = inet_rules(&rules).iter().map(|(_, chain, ..)| *chain).collect();
            assert_eq!(used.len(), made);
            used.contains("forward")
        };
        let endpoints = [IpAddr::from([10, 0, 0, 1])];
        assert!(chains(true, &endpoints));
        assert!(!chains(false, &endpoints));
        assert!(!chains(true, &[]));
    }

    #[test]
    fn without_nat_no_rule_loads_conntrack_state() {
        let mut rules = Rules {
            is_enforced: true,
            endpoints: [IpAddr::from([10, 0, 0, 1])].into(),
            ..Rules::default()
        };
        let asks = |rules: &Rules| {
            inet_rules(rules).iter().any(|(_, _, expressions, _)| {
                expressions.iter().any(|e| matches!(e, Expression::Connection(_)))
            })
        };
        assert!(!asks(&rules));
        rules.has_nat = true;
        assert!(asks(&rules));
        rules.is_enforced = false;
        assert!(!asks(&rules));
    }
}
