//! `[failsafe]`: ports of the node that pass before the policy.

use std::{cell::Cell, fmt};

use ipnet::IpNet;
use palisade_abi::Direction;
use palisade_discover::InterfacePattern;
use palisade_model::rule::L4Protocol;

use super::reader::Section;

/// Largest number of entries of one direction, and of prefixes of one entry.
const MAX_ENTRIES: usize = 64;

/// Ports to the node that are open by default. SSH is how an operator repairs a wrong policy. Answers of a DHCP server
/// (RFC 2131 to port 68, RFC 8415 to port 546) do not belong to the flow of the request, which went to a group or to all;
/// without them the node loses its address when the lease ends.
const DEFAULT_INBOUND: [(L4Protocol, u16); 3] = [
    (L4Protocol::Tcp, 22),
    (L4Protocol::Udp, 68),
    (L4Protocol::Udp, 546),
];
/// Ports that are open to the node by default: DHCP servers. DNS, NTP, BGP and the API of a cluster are not among them: an
/// operator reaches the node without them, names in DNS queries can take data out, and failsafe ports are not inspected, so
/// `toFQDNs` of the node would learn nothing.
const DEFAULT_OUTBOUND: [(L4Protocol, u16); 2] = [(L4Protocol::Udp, 67), (L4Protocol::Udp, 547)];

/// `[failsafe]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Failsafe {
    /// Ports of the node.
    pub inbound: Vec<FailsafePort>,
    /// Ports of peers.
    pub outbound: Vec<FailsafePort>,
    /// Interfaces at which the ports are open; `None` for every `[[interface]]`.
    pub interfaces: Option<Vec<InterfacePattern>>,
}

/// A failsafe port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FailsafePort {
    /// TCP, UDP or SCTP.
    pub protocol: L4Protocol,
    /// The port.
    pub port: u16,
    /// Prefixes of the peers; empty for all peers.
    pub prefixes: Vec<IpNet>,
    /// Line in the configuration; 0 for a default.
    pub line: u32,
}

impl Failsafe {
    /// Returns the ports of a direction.
    pub(crate) fn ports(&self, direction: Direction) -> &[FailsafePort] {
        match direction {
            Direction::Ingress => &self.inbound,
            Direction::Egress => &self.outbound,
        }
    }

    /// Returns whether the ports are open at an `[[interface]]`.
    pub(crate) fn is_open_at(&self, interface: &str) -> bool {
        let patterns = self.interfaces.as_ref();
        patterns.is_none_or(|patterns| patterns.iter().any(|pattern| pattern.matches(interface)))
    }

    /// Returns a port as reports name it: `failsafe tcp/22 inbound from 10.0.0.0/8 at eth0`.
    pub(crate) fn name(&self, port: &FailsafePort, direction: Direction) -> String {
        let name = port.name(direction);
        let Some(interfaces) = &self.interfaces else {
            return name;
        };
        let patterns: Vec<String> = interfaces.iter().map(ToString::to_string).collect();
        format!("{name} at {}", patterns.join(","))
    }
}

impl FailsafePort {
    /// Returns `failsafe tcp/22 inbound from 10.0.0.0/8`.
    fn name(&self, direction: Direction) -> String {
        let (name, preposition) = match direction {
            Direction::Ingress => ("inbound", "from"),
            Direction::Egress => ("outbound", "to"),
        };
        let prefixes: Vec<String> = self.prefixes.iter().map(ToString::to_string).collect();
        match prefixes.as_slice() {
            [] => format!("failsafe {self} {name}"),
            prefixes => format!("failsafe {self} {name} {preposition} {}", prefixes.join(",")),
        }
    }
}

impl fmt::Display for FailsafePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            L4Protocol::Udp => "udp",
            L4Protocol::Sctp => "sctp",
            _ => "tcp",
        };
        write!(f, "{protocol}/{}", self.port)
    }
}

/// Reads the section. A missing list has its default; an empty list closes the direction. `nics` are the names of the
/// `[[interface]]` sections.
pub(super) fn read(section: Section<'_, '_>, nics: &[&str]) -> Failsafe {
    let default = |ports: &[(L4Protocol, u16)]| -> Vec<FailsafePort> {
        let ports = ports.iter();
        ports
            .map(|(protocol, port)| FailsafePort {
                protocol: *protocol,
                port: *port,
                prefixes: Vec::new(),
                line: 0,
            })
            .collect()
    };
    let failsafe = Failsafe {
        inbound: ports(&section, "inbound", "from").unwrap_or_else(|| default(&DEFAULT_INBOUND)),
        outbound: ports(&section, "outbound", "to").unwrap_or_else(|| default(&DEFAULT_OUTBOUND)),
        interfaces: interfaces(&section, nics),
    };
    section.finish();
    failsafe
}

/// Reads `interfaces`. A pattern without an interface is an error: the node could not be reached by these ports.
fn interfaces(section: &Section<'_, '_>, nics: &[&str]) -> Option<Vec<InterfacePattern>> {
    let is_wrong = Cell::new(false);
    let wanted = "a list of interface names or their beginnings: [\"eth0\", \"bond*\"]";
    let list = section.list("interfaces", wanted, |text| {
        let pattern = InterfacePattern::parse(text).and_then(|pattern| {
            let is_used = nics.iter().any(|name| pattern.matches(name));
            is_used
                .then_some(pattern)
                .ok_or_else(|| format!("'{text}' matches no [[interface]]"))
        });
        is_wrong.set(is_wrong.get() || pattern.is_err());
        pattern
    })?;
    if list.is_empty() && !is_wrong.get() {
        section.error(
            "failsafe.interfaces is empty: leave it out for every [[interface]], or close the ports by inbound = [] and \
             outbound = []",
        );
    }
    let mut patterns: Vec<InterfacePattern> = list.into_iter().map(|at| at.value).collect();
    patterns.sort_unstable();
    patterns.dedup();
    Some(patterns)
}

fn ports(
    section: &Section<'_, '_>,
    key: &'static str,
    preposition: &'static str,
) -> Option<Vec<FailsafePort>> {
    let wanted = format!("a list of ports: [\"tcp/22\", \"tcp/22 {preposition} 10.0.0.0/8\"]");
    let found = section.list(key, &wanted, |text| port(text, preposition))?;
    let mut ports: Vec<FailsafePort> = Vec::new();
    for at in found {
        let port = FailsafePort {
            line: section.line(at.offset),
            ..at.value
        };
        let same = |known: &FailsafePort| {
            FailsafePort {
                line: 0,
                ..known.clone()
            } == FailsafePort {
                line: 0,
                ..port.clone()
            }
        };
        if ports.iter().any(same) {
            section.error_at(at.offset, format!("failsafe.{key} has {port} twice"));
        } else if ports.len() == MAX_ENTRIES {
            section.error_at(
                at.offset,
                format!("failsafe.{key} has more than {MAX_ENTRIES} ports: write rules of a policy instead"),
            );
            break;
        } else {
            ports.push(port);
        }
    }
    Some(ports)
}

/// Parses `tcp/22` or `tcp/22 from 10.0.0.0/8,fd00::/8`.
fn port(text: &str, preposition: &str) -> Result<FailsafePort, String> {
    let wrong = || {
        format!(
            "'{text}' is not a failsafe port: write \"tcp/22\" or \"tcp/22 {preposition} 10.0.0.0/8,fd00::/8\""
        )
    };
    let mut words = text.split_ascii_whitespace();
    let (protocol, port) = words
        .next()
        .and_then(|word| word.split_once('/'))
        .ok_or_else(wrong)?;
    let protocol = match protocol {
        "tcp" => L4Protocol::Tcp,
        "udp" => L4Protocol::Udp,
        "sctp" => L4Protocol::Sctp,
        other => {
            return Err(format!(
                "'{other}' is no protocol of a failsafe port: it is one of tcp, udp, sctp"
            ));
        }
    };
    let port = match port.parse::<u16>() {
        Ok(port) if port != 0 => port,
        _ => return Err(format!("'{port}' is no port: it is a number from 1 to 65535")),
    };
    let mut prefixes = Vec::new();
    match words.next() {
        None => {}
        Some(word) if word == preposition => {
            let list: String = words.by_ref().collect();
            for prefix in list.split(',') {
                prefixes.push(self::prefix(prefix)?);
            }
        }
        Some(_) => return Err(wrong()),
    }
    if prefixes.len() > MAX_ENTRIES {
        return Err(format!("a failsafe port has at most {MAX_ENTRIES} prefixes"));
    }
    prefixes.sort_unstable();
    prefixes.dedup();
    Ok(FailsafePort {
        protocol,
        port,
        prefixes,
        line: 0,
    })
}

fn prefix(text: &str) -> Result<IpNet, String> {
    let address = text.parse::<std::net::IpAddr>().map(IpNet::from);
    let prefix = address
        .or_else(|_| text.parse::<IpNet>())
        .map_err(|_| format!("'{text}' is neither an IP address nor a prefix like 10.0.0.0/8"))?;
    if prefix.trunc() != prefix {
        return Err(format!(
            "'{text}' has bits set after the prefix: write {}",
            prefix.trunc()
        ));
    }
    Ok(prefix)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;

    fn parse(text: &str) -> Result<Failsafe, Vec<String>> {
        let text = format!("[node]\nname = \"n\"\n{text}");
        Config::parse(Path::new("p.toml"), &text)
            .map(|config| config.failsafe)
            .map_err(|errors| errors.iter().map(ToString::to_string).collect())
    }

    fn names(ports: &[FailsafePort], direction: Direction) -> Vec<String> {
        ports.iter().map(|port| port.name(direction)).collect()
    }

    #[test]
    fn without_the_section_ssh_and_dhcp_are_open() {
        let failsafe = parse("").unwrap();
        let inbound = names(failsafe.ports(Direction::Ingress), Direction::Ingress);
        assert_eq!(
            inbound,
            [
                "failsafe tcp/22 inbound",
                "failsafe udp/68 inbound",
                "failsafe udp/546 inbound"
            ]
        );
        let outbound = names(failsafe.ports(Direction::Egress), Direction::Egress);
        assert_eq!(
            outbound,
            ["failsafe udp/67 outbound", "failsafe udp/547 outbound"]
        );
        assert!(failsafe.inbound.iter().all(|port| port.line == 0));
    }

    #[test]
    fn an_empty_list_closes_one_direction_only() {
        let failsafe = parse("[failsafe]\ninbound = []\n").unwrap();
        assert_eq!((failsafe.inbound.len(), failsafe.outbound.len()), (0, 2));
    }

    #[test]
    fn ports_have_prefixes_and_the_line_of_the_file() {
        let failsafe = parse(
            "[failsafe]\ninbound = [\n  \"tcp/22 from 10.0.0.0/8, fd00::/8\",\n  \"sctp/9\",\n]\n\
             outbound = [\"udp/53 to 192.0.2.53\"]\n",
        )
        .unwrap();
        assert_eq!(
            names(&failsafe.inbound, Direction::Ingress),
            [
                "failsafe tcp/22 inbound from 10.0.0.0/8,fd00::/8",
                "failsafe sctp/9 inbound"
            ]
        );
        assert_eq!(
            names(&failsafe.outbound, Direction::Egress),
            ["failsafe udp/53 outbound to 192.0.2.53/32"]
        );
        let lines: Vec<u32> = failsafe.inbound.iter().map(|port| port.line).collect();
        assert_eq!(lines, [5, 6]);
    }

    #[test]
    fn ports_can_be_limited_to_interfaces() {
        let nics = "[[interface]]\nname = \"eth0\"\n[[interface]]\nname = \"bond7\"\n[[interface]]\nname = \"eth1\"\n";
        let failsafe = parse(&format!(
            "[failsafe]\ninbound = [\"tcp/22 from 10.0.0.0/8\"]\ninterfaces = [\"eth0\", \"bond*\"]\n{nics}"
        ))
        .unwrap();
        assert!(failsafe.is_open_at("eth0") && failsafe.is_open_at("bond7"));
        assert!(!failsafe.is_open_at("eth1"));
        assert_eq!(
            failsafe.name(&failsafe.inbound[0], Direction::Ingress),
            "failsafe tcp/22 inbound from 10.0.0.0/8 at eth0,bond*"
        );
        assert_eq!(
            failsafe.name(&failsafe.outbound[0], Direction::Egress),
            "failsafe udp/67 outbound at eth0,bond*"
        );
        for (list, expected) in [
            ("\"eth2\"", "'eth2' matches no [[interface]]"),
            ("\"b*d\"", "cannot be a pattern of interface names"),
            ("", "failsafe.interfaces is empty"),
        ] {
            let errors = parse(&format!("[failsafe]\ninterfaces = [{list}]\n{nics}")).unwrap_err();
            assert!(errors[0].contains(expected), "{list}: {errors:?}");
        }
    }

    #[test]
    fn errors_name_the_line_and_the_fix() {
        for (entry, expected) in [
            (
                "ssh",
                "p.toml:4:12: failsafe.inbound: 'ssh' is not a failsafe port: write \"tcp/22\"",
            ),
            (
                "icmp/8",
                "'icmp' is no protocol of a failsafe port: it is one of tcp, udp, sctp",
            ),
            ("tcp/0", "'0' is no port"),
            ("tcp/65536", "'65536' is no port"),
            ("tcp/22 to 10.0.0.0/8", "is not a failsafe port"),
            ("tcp/22 from", "'' is neither an IP address nor a prefix"),
            ("tcp/22 from 10.0.0.1/8", "write 10.0.0.0/8"),
        ] {
            let errors = parse(&format!("[failsafe]\ninbound = [\"{entry}\"]\n")).unwrap_err();
            assert!(errors[0].contains(expected), "{entry}: {errors:?}");
        }
        let errors = parse("[failsafe]\ninbound = [\"tcp/22\", \"tcp/22\"]\n").unwrap_err();
        assert!(errors[0].contains("has tcp/22 twice"), "{errors:?}");
        let many: Vec<String> = (1..=65).map(|port| format!("\"tcp/{port}\"")).collect();
        let errors = parse(&format!("[failsafe]\ninbound = [{}]\n", many.join(","))).unwrap_err();
        assert!(errors[0].contains("more than 64 ports"), "{errors:?}");
    }
}
