//! A world of names: who asks, who answers, and what is behind the answers.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::Result;
use palisade_testbed::{
    Daemon, Ns, Outcome, Topology,
    daemon::Settings,
    dns::{Asked, Dug, PORT, Said, Scripted, dig, query, rtype},
    probe::connect,
    server::Echo,
    topology::{Family, WorkloadSpec},
};

use serde_json::Value;

use crate::{CLOSED, OPEN};

/// The resolver on the internet.
pub const RESOLVER: (&str, &str) = ("192.0.2.53", "2001:db8:53::53");
/// Another one there.
pub const OTHER_RESOLVER: (&str, &str) = ("192.0.2.54", "2001:db8:53::54");
/// The port on which every site answers.
pub const WEB: u16 = 80;
/// The number of the address that no name leads to which anybody may ask for.
pub const EVIL: u8 = 66;
/// Sites that exist, by the last byte of their addresses.
const SITES: [u8; 15] = [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, EVIL];

/// A site's address, by its last byte.
#[must_use]
pub fn site(n: u8, family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(203, 0, 113, n).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, n.into()).into(),
    }
}

/// The resolver's address.
#[must_use]
pub fn resolver(family: Family) -> IpAddr {
    parse(RESOLVER, family)
}

/// The other resolver's address.
#[must_use]
pub fn other_resolver(family: Family) -> IpAddr {
    parse(OTHER_RESOLVER, family)
}

fn parse((v4, v6): (&str, &str), family: Family) -> IpAddr {
    let text = match family {
        Family::V4 => v4,
        Family::V6 => v6,
    };
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// An address record of a site, of the asked type.
fn record(name: &str, ttl: u32, n: u8, kind: u16) -> Option<String> {
    match kind {
        rtype::A => Some(format!("{name}. {ttl} IN A {}", site(n, Family::V4))),
        rtype::AAAA => Some(format!("{name}. {ttl} IN AAAA {}", site(n, Family::V6))),
        _ => None,
    }
}

/// An address of the many that `N.race.example` leads to, one each.
#[must_use]
pub fn racer(n: u32, family: Family) -> IpAddr {
    let [_, _, high, low] = n.to_be_bytes();
    match family {
        Family::V4 => Ipv4Addr::new(100, 64, high, low).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0xace, 0, 0, 0, 0, n as u16).into(),
    }
}

/// What all servers of this world say.
///
/// | name | answer |
/// |---|---|
/// | `www`, `mail`, `api` | sites 10, 19, 20 |
/// | `alias` | an alias of `target`, site 11 |
/// | `zero` | site 12, TTL 0 |
/// | `short` | site 22, TTL 1 |
/// | `service` | HTTPS with hints: site 13 |
/// | `cut` | truncated in datagrams; over TCP site 14 |
/// | `long` | site 15 and 4,000 bytes more |
/// | `twice` | site 16, and at once again with the evil site |
/// | `other-id`, `other-port`, `other-address`, `other-question` | the evil site in an answer that fits no question; then site 17 |
/// | `greedy` | site 18, and the evil site for other names and in other sections |
/// | `wild*` below `wild` | site 21 |
/// | `slow` | site 23, after 200 ms |
/// | `evil` | the evil site |
/// | `silent` | nothing |
/// | `N.race` | one address each, see [`racer`] |
/// | anything else | NXDOMAIN |
///
/// All end with `.example`.
#[must_use]
pub fn zone(asked: &Asked) -> Vec<Said> {
    let name = asked.name.as_str();
    let kind = asked.kind;
    let of = |n: u8| Said::records(&record(name, 60, n, kind).into_iter().collect::<Vec<_>>());
    let Some(label) = name.strip_suffix(".example") else {
        return vec![Said::rcode(3)];
    };
    let said = match label {
        "www" => of(10),
        "mail" => of(19),
        "api" => of(20),
        "alias" => {
            let mut records = vec!["alias.example. 60 IN CNAME target.example.".to_owned()];
            records.extend(record("target.example", 60, 11, kind));
            Said::records(&records)
        }
        "zero" => Said::records(&record(name, 0, 12, kind).into_iter().collect::<Vec<_>>()),
        "short" => Said::records(&record(name, 1, 22, kind).into_iter().collect::<Vec<_>>()),
        "service" if kind == rtype::HTTPS => Said::records(&[format!(
            "service.example. 60 IN HTTPS 1 . alpn=h2 ipv4hint={} ipv6hint={}",
            site(13, Family::V4),
            site(13, Family::V6)
        )]),
        "service" => Said::default(),
        "cut" if !asked.tcp => Said {
            truncated: true,
            ..Said::default()
        },
        "cut" => of(14),
        "long" => {
            let mut said = of(15);
            for n in 0..16 {
                said.additional
                    .push(format!("t{n}.example. 60 IN TXT {}", "x".repeat(250)));
            }
            said
        }
        "twice" => return vec![of(16), of(EVIL)],
        "other-id" => {
            return vec![
                Said {
                    id_xor: 0x55,
                    ..of(EVIL)
                },
                of(17),
            ];
        }
        "other-port" => {
            return vec![
                Said {
                    port: Some(5353),
                    ..of(EVIL)
                },
                of(17),
            ];
        }
        "other-address" => {
            let other = if asked.to.ip() == resolver(Family::V4) {
                other_resolver(Family::V4)
            } else if asked.to.ip() == resolver(Family::V6) {
                other_resolver(Family::V6)
            } else {
                asked.to.ip()
            };
            let wrong = Said {
                address: Some(other),
                port: Some(5300),
                ..of(EVIL)
            };
            return vec![wrong, of(17)];
        }
        "other-question" => {
            let wrong = Said {
                question: Some("www.example".into()),
                ..Said::records(
                    &record("www.example", 60, EVIL, kind)
                        .into_iter()
                        .collect::<Vec<_>>(),
                )
            };
            return vec![wrong, of(17)];
        }
        "greedy" => {
            let mut said = of(18);
            said.answer.extend(record("www.example", 60, EVIL, kind));
            said.authority
                .push("greedy.example. 60 IN NS ns.greedy.example.".into());
            said.authority.extend(record("greedy.example", 60, EVIL, kind));
            said.additional.extend(record("greedy.example", 60, EVIL, kind));
            said.additional
                .extend(record("ns.greedy.example", 60, EVIL, kind));
            said
        }
        "slow" => Said {
            delay: Duration::from_millis(200),
            ..of(23)
        },
        "evil" => of(EVIL),
        "silent" => return vec![],
        _ if label.ends_with(".wild") => of(21),
        _ => match label.strip_suffix(".race").and_then(|n| n.parse::<u32>().ok()) {
            Some(n) if kind == rtype::A => {
                Said::records(&[format!("{name}. 60 IN A {}", racer(n, Family::V4))])
            }
            Some(n) if kind == rtype::AAAA => {
                Said::records(&[format!("{name}. 60 IN AAAA {}", racer(n, Family::V6))])
            }
            _ => Said::rcode(3),
        },
    };
    vec![said]
}

/// Workloads `client` and `dns` (where a server answers), the node (where one answers too), and the internet: the
/// resolvers, and sites that answer on port 80.
#[derive(Debug)]
pub struct Names {
    /// Namespaces and veths.
    pub topology: Topology,
    /// The server of the internet, at both resolvers' addresses.
    pub resolver: Scripted,
    /// The server in the workload `dns`.
    pub workload: Scripted,
    /// The server on the node.
    pub node: Scripted,
    /// Everything that reached a site.
    pub sites: Echo,
}

impl Names {
    /// Everything in place and answering.
    pub fn new() -> Result<Self> {
        let families = [Family::V4, Family::V6];
        let mut addresses: Vec<IpAddr> = families
            .iter()
            .flat_map(|f| [resolver(*f), other_resolver(*f)])
            .collect();
        let sites: Vec<IpAddr> = SITES
            .iter()
            .flat_map(|n| families.map(|family| site(*n, family)))
            .collect();
        let resolvers = addresses.clone();
        addresses.extend(&sites);
        let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let topology = Topology::new()?
            .workload(WorkloadSpec::new("client").label("app", "client"))?
            .workload(WorkloadSpec::new("dns").label("app", "dns"))?
            .internet_addresses(&texts)?;
        // all racers at once
        topology
            .internet
            .ip("route add local 100.64.0.0/16 dev lo\nroute add local 2001:db8:ace::/112 dev lo\n")?;
        topology.meet()?;
        let own = |name: &str| families.map(|family| topology.addr(name, family));
        Ok(Self {
            resolver: Scripted::start(&topology.internet, &resolvers, zone)?,
            workload: Scripted::start(topology.ns("dns"), &own("dns"), zone)?,
            node: Scripted::start(&topology.node, &own("node"), zone)?,
            sites: Echo::start(&topology.internet, &sites, &[WEB, 443], &[WEB])?,
            topology,
        })
    }

    /// The daemon on this world's node.
    pub fn daemon(&self, settings: &Settings, policies: &[(&str, &str)]) -> Result<Daemon> {
        Daemon::start(&self.topology, settings, policies)
    }

    /// The namespace of a name.
    #[must_use]
    pub fn ns(&self, name: &str) -> &Ns {
        self.topology.ns(name)
    }

    /// Asks by `dig`.
    ///
    /// # Panics
    /// If dig cannot run.
    #[track_caller]
    #[must_use]
    pub fn dig(&self, from: &str, server: IpAddr, args: &[&str]) -> Dug {
        dig(self.ns(from), server, args).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// A site answers.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn reaches(&self, daemon: &Daemon, from: &str, n: u8, family: Family) {
        let to = SocketAddr::new(site(n, family), WEB);
        let outcome = connect(self.ns(from), to, OPEN);
        assert_eq!(outcome, Outcome::Open, "{from} -> {to}\n{}", daemon.report());
    }

    /// A site does not answer, and has heard nothing.
    ///
    /// # Panics
    /// If it does, or has.
    #[track_caller]
    pub fn does_not_reach(&self, daemon: &Daemon, from: &str, n: u8, family: Family) {
        let to = SocketAddr::new(site(n, family), WEB);
        let by = self.topology.addr(from, family);
        let before = self.heard(by, to);
        let outcome = connect(self.ns(from), to, CLOSED);
        assert_eq!(outcome, Outcome::TimedOut, "{from} -> {to}\n{}", daemon.report());
        assert_eq!(self.heard(by, to), before, "{from} -> {to}\n{}", daemon.report());
    }

    fn heard(&self, by: IpAddr, to: SocketAddr) -> usize {
        self.sites
            .contacts()
            .iter()
            .filter(|contact| contact.from.ip() == by && contact.to == to)
            .count()
    }

    /// Asks for an address by `dig` and expects it.
    ///
    /// # Panics
    /// If another answer comes, or none.
    #[track_caller]
    pub fn resolves(&self, daemon: &Daemon, from: &str, server: IpAddr, name: &str, address: IpAddr) {
        let kind = if address.is_ipv4() { "A" } else { "AAAA" };
        let dug = self.dig(from, server, &[name, kind]);
        let good = dug.status == "NOERROR" && dug.answers.last() == Some(&address.to_string());
        assert!(
            good,
            "{from} asks {server} for {name} {kind}: {}\n{}",
            dug.text,
            daemon.report()
        );
    }

    /// Asks by `dig` and expects REFUSED with the question, and that no server was asked.
    ///
    /// # Panics
    /// If another answer comes, or none, or if a server has heard the question.
    #[track_caller]
    pub fn is_refused(&self, daemon: &Daemon, from: &str, server: IpAddr, name: &str) {
        self.refused(daemon, from, server, name, "+notcp");
    }

    /// The same over TCP.
    ///
    /// # Panics
    /// As that.
    #[track_caller]
    pub fn is_refused_over_tcp(&self, daemon: &Daemon, from: &str, server: IpAddr, name: &str) {
        self.refused(daemon, from, server, name, "+tcp");
    }

    #[track_caller]
    fn refused(&self, daemon: &Daemon, from: &str, server: IpAddr, name: &str, how: &str) {
        let before = self.questions(name);
        for kind in ["A", "AAAA"] {
            let dug = self.dig(from, server, &[name, kind, how]);
            let said = (dug.status.as_str(), dug.question.as_str());
            let question = format!("{name}. IN {kind}");
            assert_eq!(
                said,
                ("REFUSED", question.as_str()),
                "{from} asks {server} for {name}: {}\n{}",
                dug.text,
                daemon.report()
            );
            assert!(dug.answers.is_empty(), "{}", dug.text);
            assert_eq!(dug.tcp, how == "+tcp", "{}", dug.text);
        }
        assert_eq!(
            self.questions(name),
            before,
            "{name} has reached a server\n{}",
            daemon.report()
        );
    }

    /// How often servers were asked for a name.
    #[must_use]
    pub fn questions(&self, name: &str) -> usize {
        [&self.resolver, &self.workload, &self.node]
            .iter()
            .map(|server| server.asked_for(name))
            .sum()
    }

    /// A server's socket address.
    #[must_use]
    pub fn server(&self, name: &str, family: Family) -> SocketAddr {
        let address = match name {
            "internet" => resolver(family),
            name => self.topology.addr(name, family),
        };
        SocketAddr::new(address, PORT)
    }
}

/// How many packets were dropped for a reason, by the programs and by the workers, as `status` counts them.
#[must_use]
pub fn counted(status: &Value, reason: u64) -> u64 {
    let by_workers = status["workers"]["workers"].as_array();
    let by_workers = by_workers.into_iter().flatten().map(|worker| &worker["drops"]);
    [&status["drops"]]
        .into_iter()
        .chain(by_workers)
        .filter_map(Value::as_array)
        .flatten()
        .filter(|drop| drop["reason"] == reason)
        .filter_map(|drop| drop["packets"].as_u64())
        .sum()
}

/// What came of a race.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Raced {
    /// Names that were asked for.
    pub asked: u32,
    /// Answers that did not come.
    pub unanswered: u32,
    /// Answers that came without an address.
    pub wrong: u32,
    /// Connections to what was answered that did not come about at the first attempt.
    pub unconnected: u32,
}

/// The port of the racers.
pub const RACE: u16 = 8081;

/// Accepts connections at the port [`RACE`] of every address that the internet has, until it is dropped.
#[derive(Debug)]
pub struct Finish {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Finish {
    /// Accepts from now on.
    pub fn start(names: &Names) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        for address in any {
            let listener = names
                .topology
                .internet
                .enter(|| -> std::io::Result<TcpListener> {
                    let at = SocketAddr::new(address, RACE);
                    let socket =
                        socket2::Socket::new(socket2::Domain::for_address(at), socket2::Type::STREAM, None)?;
                    if at.is_ipv6() {
                        socket.set_only_v6(true)?;
                    }
                    socket.set_reuse_address(true)?;
                    socket.bind(&at.into())?;
                    socket.listen(1024)?;
                    socket.set_nonblocking(true)?;
                    Ok(socket.into())
                })?;
            let stop = Arc::clone(&stop);
            threads.push(thread::spawn(move || {
                while !stop.load(Relaxed) {
                    if listener.accept().is_err() {
                        thread::sleep(Duration::from_millis(1));
                    }
                }
            }));
        }
        Ok(Self { stop, threads })
    }
}

impl Drop for Finish {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Names {
    /// Asks for `count` names from `first` on, `at_once` of them at the same time, and opens a connection to each
    /// address in the moment in which it is known.
    pub fn race(&self, family: Family, first: u32, count: u32, at_once: usize) -> Raced {
        let next = AtomicU32::new(first);
        let last = first + count;
        let total = Mutex::new(Raced::default());
        let client = self.ns("client");
        thread::scope(|scope| {
            for _ in 0..at_once {
                scope.spawn(|| {
                    let mut own = Raced::default();
                    if client.join().is_err() {
                        return; // nothing is asked, and the report says so
                    }
                    loop {
                        let n = next.fetch_add(1, Relaxed);
                        if n >= last {
                            break;
                        }
                        own.asked += 1;
                        race_one(n, family, &mut own);
                    }
                    let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
                    total.asked += own.asked;
                    total.unanswered += own.unanswered;
                    total.wrong += own.wrong;
                    total.unconnected += own.unconnected;
                });
            }
        });
        total.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

fn race_one(n: u32, family: Family, raced: &mut Raced) {
    let kind = match family {
        Family::V4 => rtype::A,
        Family::V6 => rtype::AAAA,
    };
    let address = racer(n, family);
    let any: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let answer = || -> std::io::Result<Vec<u8>> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(SocketAddr::new(resolver(family), PORT))?;
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        socket.send(&query(n as u16, &[(&format!("{n}.race.example"), kind)]))?;
        let mut buffer = vec![0; 1500];
        let length = socket.recv(&mut buffer)?;
        buffer.truncate(length);
        Ok(buffer)
    };
    let Ok(answer) = answer() else {
        raced.unanswered += 1;
        return;
    };
    let there = match address {
        IpAddr::V4(v4) => answer.ends_with(&v4.octets()),
        IpAddr::V6(v6) => answer.ends_with(&v6.octets()),
    };
    if !there {
        raced.wrong += 1;
        return;
    }
    // less than the second after which a lost SYN is sent again
    let patience = Duration::from_millis(900);
    if TcpStream::connect_timeout(&SocketAddr::new(address, RACE), patience).is_err() {
        raced.unconnected += 1;
    }
}

/// A world of names.
///
/// # Panics
/// If it cannot be made.
#[must_use]
pub fn names() -> Names {
    Names::new().unwrap_or_else(|error| panic!("{error:#}"))
}
