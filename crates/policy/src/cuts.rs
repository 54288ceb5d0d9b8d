//! The live connections that a set of policies would cut, so that an operator sees a lock-out before it happens.
//!
//! Depends on the compiler and on the identities of learned names in `trace`. Start at [`cuts`].

use std::{
    borrow::Cow,
    net::{IpAddr, SocketAddr},
};

use palisade_abi::{Addr, Decision, Direction, Inspector, PolicyEntry, entry_flags, protocol};
use palisade_model::{rule::Location, snapshot::Snapshot};

use crate::{compile::Compiler, trace::learned_identity};

/// A live connection of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Number of the endpoint.
    pub endpoint: u16,
    /// Whether the peer (ingress) or the endpoint (egress) has opened the connection.
    pub direction: Direction,
    /// IP protocol number: TCP, UDP or SCTP.
    pub protocol: u8,
    /// The endpoint's address.
    pub local: IpAddr,
    /// The endpoint's port.
    pub local_port: u16,
    /// The peer's address.
    pub remote: IpAddr,
    /// The peer's port.
    pub remote_port: u16,
    /// [`Inspector`] that reads the connection, as a number; 0 for none.
    pub inspector: u8,
    /// DNS names by which the endpoint has learned the peer's address.
    pub names: Vec<String>,
}

impl Connection {
    /// Returns the port to which the connection was opened.
    #[must_use]
    pub const fn port(&self) -> u16 {
        match self.direction {
            Direction::Ingress => self.local_port,
            Direction::Egress => self.remote_port,
        }
    }

    /// Returns the end that opened the connection, then the other one.
    #[must_use]
    pub const fn opener_and_responder(&self) -> [SocketAddr; 2] {
        let local = SocketAddr::new(self.local, self.local_port);
        let remote = SocketAddr::new(self.remote, self.remote_port);
        match self.direction {
            Direction::Ingress => [remote, local],
            Direction::Egress => [local, remote],
        }
    }
}

/// Why a connection would be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutReason {
    /// The policy denies the connection: its packets are dropped.
    Denied,
    /// The policy inspects the connection from its middle on, where no inspector can begin: it is reset.
    Reset,
}

/// A connection that would be cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Index of the connection in the list that [`cuts`] was given.
    pub connection: usize,
    /// Why.
    pub reason: CutReason,
    /// The rule or policy that decides, with `FILE:LINE`; and the failsafe port, if the connection passes at the NICs that
    /// have it.
    pub decided_by: String,
    /// Place of that rule or policy.
    pub location: Option<Location>,
}

/// Returns the connections that the policies of `compiler` would cut, in the order of `connections`. A connection of an
/// endpoint that the compiler does not know is left out.
#[must_use]
pub fn cuts(compiler: &Compiler, connections: &[Connection]) -> Vec<Cut> {
    let mut finder = CutFinder::new(compiler);
    connections
        .iter()
        .enumerate()
        .filter_map(|(number, connection)| finder.find(number, connection))
        .collect()
}

/// Evaluates connections one by one, for callers that do not have all of them in memory.
#[derive(Debug)]
pub struct CutFinder<'c> {
    /// A copy once identities of learned names were added to it.
    compiler: Cow<'c, Compiler>,
}

impl<'c> CutFinder<'c> {
    /// Uses the policies of `compiler`.
    #[must_use]
    pub const fn new(compiler: &'c Compiler) -> Self {
        Self {
            compiler: Cow::Borrowed(compiler),
        }
    }

    /// Returns whether the policies would cut a connection.
    pub fn is_cut(&mut self, connection: &Connection) -> bool {
        deciding(&mut self.compiler, connection)
            .and_then(|deciding| reason(connection, deciding.entry))
            .is_some()
    }

    /// Returns why the policies would cut a connection; `None` if they would not. `number`: value of
    /// [`Cut::connection`].
    pub fn find(&mut self, number: usize, connection: &Connection) -> Option<Cut> {
        let deciding = deciding(&mut self.compiler, connection)?;
        let reason = reason(connection, deciding.entry)?;
        let rules = &self.compiler.snapshot().rules;
        let name = |rule| {
            rules
                .get(&rule)
                .map_or_else(|| format!("rule {rule}"), ToString::to_string)
        };
        let rule = deciding.entry.rule;
        Some(Cut {
            connection: number,
            reason,
            decided_by: match deciding.failsafe {
                None => name(rule),
                Some(failsafe) => format!("{}, except by {}", name(rule), name(failsafe)),
            },
            location: rules.get(&rule).and_then(|info| info.location.clone()),
        })
    }
}

/// What decides about a connection.
struct Deciding {
    entry: PolicyEntry,
    /// Rule of the failsafe port that decides at some NICs instead.
    failsafe: Option<u32>,
}

/// Returns the policy table entry for the first packet of the connection. Which NIC the packet would use is not known, so
/// a failsafe port that some NICs do not have does not count.
fn deciding(compiler: &mut Cow<'_, Compiler>, connection: &Connection) -> Option<Deciding> {
    let exact = compiler
        .snapshot()
        .addresses
        .get(&Addr::from(connection.remote))
        .map(|entry| entry.identity);
    let is_learned = connection.direction == Direction::Egress && !connection.names.is_empty();
    let identity = match exact {
        Some(identity) => identity,
        None if is_learned => {
            let names: Vec<&str> = connection.names.iter().map(String::as_str).collect();
            learned_identity(compiler, connection.endpoint, Some(connection.remote), &names).ok()?
        }
        None => compiler.snapshot().identity_of(connection.remote).identity,
    };
    let snapshot = compiler.snapshot();
    let is_local = snapshot.identity_of(connection.remote).endpoint != 0;
    let entry = |at_nic: bool| {
        let look_up = if at_nic {
            Snapshot::policy_entry
        } else {
            Snapshot::policy_entry_inside
        };
        look_up(
            snapshot,
            connection.endpoint,
            connection.direction,
            identity,
            connection.protocol,
            Some(connection.port()),
        )
    };
    if is_local {
        return entry(false).map(|entry| Deciding {
            entry,
            failsafe: None,
        });
    }
    let found = entry(true)?;
    let is_limited =
        compiler.inventory().options.some_nics_closed && found.flags & entry_flags::FAILSAFE != 0;
    Some(if is_limited {
        Deciding {
            entry: entry(false)?,
            failsafe: Some(found.rule),
        }
    } else {
        Deciding {
            entry: found,
            failsafe: None,
        }
    })
}

/// Returns why an entry cuts the connection; `None` if it does not.
fn reason(connection: &Connection, entry: PolicyEntry) -> Option<CutReason> {
    if entry.flags & entry_flags::AUDIT != 0 {
        return None;
    }
    match Decision::from_u8(entry.decision) {
        Decision::Allow => None,
        Decision::Deny | Decision::DenyExplicit | Decision::AuthRequired | Decision::DenyQuic => {
            Some(CutReason::Denied)
        }
        Decision::Inspect if connection.protocol != protocol::TCP => None,
        Decision::Inspect if connection.inspector == Inspector::None as u8 => Some(CutReason::Reset),
        // The proxy holds the two halves of an intercepted connection; a worker cannot continue it, nor the reverse.
        Decision::Inspect => {
            let proxied = |inspector| inspector == Inspector::TlsTerminate as u8;
            (proxied(connection.inspector) != proxied(entry.inspector)).then_some(CutReason::Reset)
        }
    }
}

#[cfg(test)]
mod tests {
    use palisade_model::{
        inventory::{Endpoint, Inventory},
        labels::{Labels, parse_label},
    };

    use super::*;
    use crate::{
        compile::{Changes, CompilerState, FileContent},
        parse::parse,
    };

    fn compiler(policies: &str) -> Compiler {
        let parsed = parse("p.yaml", policies);
        assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
        let file = FileContent {
            policies: parsed.policies,
            cidr_groups: parsed.cidr_groups,
        };
        let node = Endpoint {
            id: 1,
            name: "n1".into(),
            namespace: String::new(),
            labels: Labels::new(["reserved:host", "k8s:zone=a"].map(parse_label)),
            named_ports: Default::default(),
            addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            audit: false,
        };
        let mut compiler = Compiler::new(&CompilerState::default());
        compiler
            .update(Changes {
                inventory: Some(Inventory {
                    endpoints: vec![node],
                    ..Inventory::default()
                }),
                files: [("p.yaml".to_owned(), Some(file))].into(),
            })
            .unwrap();
        compiler
    }

    fn connection(direction: Direction, remote: &str, port: u16, names: &[&str]) -> Connection {
        let remote: IpAddr = remote.parse().unwrap();
        let local = match remote {
            IpAddr::V4(_) => "192.0.2.1",
            IpAddr::V6(_) => "2001:db8::1",
        };
        let (local_port, remote_port) = match direction {
            Direction::Ingress => (port, 40_000),
            Direction::Egress => (40_000, port),
        };
        Connection {
            endpoint: 1,
            direction,
            protocol: protocol::TCP,
            local: local.parse().unwrap(),
            local_port,
            remote,
            remote_port,
            inspector: 0,
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    const CLOSED: &str = "
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress:
  - fromCIDR: [198.51.100.0/24, '2001:db8:1::/48']
    toPorts: [{ports: [{port: '22', protocol: TCP}]}]
  - toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{method: GET}]}}]
  egress:
  - toFQDNs: [{matchName: example.com}]
";

    #[test]
    fn connections_that_no_rule_allows_are_cut_in_both_families_and_directions() {
        let connections = [
            connection(Direction::Ingress, "198.51.100.7", 22, &[]),
            connection(Direction::Ingress, "203.0.113.7", 22, &[]),
            connection(Direction::Ingress, "2001:db8:1::7", 22, &[]),
            connection(Direction::Ingress, "2001:db8:2::7", 22, &[]),
            connection(Direction::Egress, "203.0.113.8", 443, &[]),
            connection(Direction::Egress, "203.0.113.9", 443, &["example.com"]),
            connection(Direction::Egress, "203.0.113.9", 443, &["example.org"]),
        ];
        let cuts = cuts(&compiler(CLOSED), &connections);
        let numbers: Vec<usize> = cuts.iter().map(|cut| cut.connection).collect();
        assert_eq!(numbers, [1, 3, 4, 6]);
        assert!(cuts.iter().all(|cut| cut.reason == CutReason::Denied));
        assert!(cuts[0].decided_by.contains("node (p.yaml:"), "{cuts:?}");
        assert!(cuts[0].location.is_some());
    }

    #[test]
    fn a_connection_is_reset_if_its_inspection_would_begin_in_its_middle() {
        let mut read = connection(Direction::Ingress, "203.0.113.7", 80, &[]);
        read.inspector = Inspector::Http as u8;
        let unread = connection(Direction::Ingress, "203.0.113.7", 80, &[]);
        let cuts = cuts(&compiler(CLOSED), &[read, unread]);
        assert_eq!(cuts.len(), 1);
        assert_eq!((cuts[0].connection, cuts[0].reason), (1, CutReason::Reset));
    }

    #[test]
    fn nothing_is_cut_where_nothing_is_enforced_or_only_audited() {
        let connections = [connection(Direction::Ingress, "203.0.113.7", 22, &[])];
        assert_eq!(cuts(&compiler(""), &connections), []);
        let audited = CLOSED.replace(
            "metadata: {name: node}",
            "metadata: {name: node, annotations: {palisade.io/audit: 'true'}}",
        );
        assert_eq!(cuts(&compiler(&audited), &connections), []);
    }
}
