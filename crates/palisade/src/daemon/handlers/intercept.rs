//! Requests about intercepted connections.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    ops::RangeInclusive,
    time::Duration,
};

use netlink_packet_route::{
    RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
};
use palisade_abi::{
    CtKey, Decision, Direction, INSIDE, Inspector, LearnedKey, ProxyPath, PuntRequest, identity, protocol,
    punt_flags,
};
use palisade_datapath::monotonic_coarse;
use palisade_inspect::stream::StreamContext;
use palisade_intercept::{CheckRequest, FailureKind, TlsView};
use palisade_model::{
    rule::{FqdnPattern, TlsContext},
    snapshot::{Matcher, inspector_name},
};

use super::{
    super::{dump_routing, interception::unix_time, message::ClientRequest, view::class_names},
    Handlers, map_error,
};
use crate::control::api::{
    CertificateRow, Certificates, CheckEnds, CheckStep as CheckRow, Endpoint, InterceptCheck, InterceptRow,
    InterceptStats, InterceptThread, InterceptedRow, TlsRow, UpstreamRow,
};

/// Ports from which checks connect: the last of the dynamic ports, which Linux does not assign by default.
const CHECK_PORTS: RangeInclusive<u16> = 65_500..=65_535;
/// Time for which the programs know the flow of a check.
const CHECK_LIFETIME: Duration = Duration::from_secs(60);
/// A port for finding a route, to which nothing is sent.
const DISCARD: u16 = 9;

impl Handlers {
    pub(super) fn intercept_config(&self) -> Result<Vec<InterceptRow>, String> {
        let endpoints = self.look_up(ClientRequest::Endpoints)?;
        let view = self.shared.get();
        let snapshot = &view.snapshot;
        let classes = class_names(&snapshot.classes);
        let mut rows = Vec::new();
        for (&endpoint, state) in &snapshot.endpoints {
            let name = endpoints
                .iter()
                .find(|known| known.id == endpoint)
                .map(|known| known.name.clone())
                .unwrap_or_default();
            let table = snapshot.tables.get(&state.policy);
            for (key, entry) in table.into_iter().flat_map(|table| &table.entries) {
                // Entries inside the node repeat those of the direction.
                if key.direction & INSIDE != 0
                    || Decision::from_u8(entry.decision) != Decision::Inspect
                    || entry.inspector != Inspector::TlsTerminate as u8
                {
                    continue;
                }
                let Some(set) = snapshot.rulesets.get(&entry.ruleset) else {
                    continue;
                };
                let secret = |tls: &Option<TlsContext>| tls.as_ref().map(|tls| tls.secret.clone());
                let name_of = |pattern: &FqdnPattern| match pattern {
                    FqdnPattern::Name(text) | FqdnPattern::Pattern(text) => text.clone(),
                };
                rows.push(InterceptRow {
                    endpoint,
                    endpoint_name: name.clone(),
                    direction: if key.direction == Direction::Ingress as u8 {
                        "ingress"
                    } else {
                        "egress"
                    }
                    .to_owned(),
                    peer: if key.identity == identity::ANY {
                        vec!["ANY".to_owned()]
                    } else {
                        view.labels(key.identity)
                    },
                    ports: classes
                        .get(&key.class)
                        .cloned()
                        .unwrap_or_else(|| vec![format!("class {}", key.class)]),
                    terminating: secret(&set.terminating_tls),
                    originating: secret(&set.originating_tls),
                    protocol: inspector_name(set.reads).to_owned(),
                    server_names: set
                        .server_names
                        .iter()
                        .chain(
                            set.alternatives
                                .iter()
                                .filter_map(|alternative| match &alternative.matcher {
                                    Matcher::ServerName(pattern) => Some(pattern),
                                    _ => None,
                                }),
                        )
                        .map(name_of)
                        .collect(),
                    rules: set.alternatives.len(),
                    decided_by: Some(view.rule(entry.rule)),
                    problem: self.interception.problem_of(set),
                });
            }
        }
        Ok(rows)
    }

    pub(super) fn intercept_certs(&self) -> Certificates {
        let secrets = self.interception.secrets();
        let now = unix_time();
        let mut problems: Vec<String> = secrets.problems.iter().map(ToString::to_string).collect();
        problems.extend(self.interception.unusable().iter().cloned());
        Certificates {
            dir: self.interception.dir.display().to_string(),
            certificates: secrets
                .store
                .certificates()
                .into_iter()
                .map(|certificate| CertificateRow {
                    remaining_seconds: certificate.not_after - now,
                    not_before: time_text(certificate.not_before),
                    not_after: time_text(certificate.not_after),
                    secret: certificate.secret,
                    key: certificate.key,
                    subject: certificate.subject,
                    sans: certificate.names,
                    issuer: certificate.issuer,
                    serial: certificate.serial,
                    fingerprint: certificate.fingerprint,
                    is_ca: certificate.is_ca,
                    file: certificate.file.display().to_string(),
                })
                .collect(),
            problems,
        }
    }

    pub(super) fn intercept_clusters(&self) -> Result<Vec<UpstreamRow>, String> {
        let mean_seconds = |sum_ms: u64, count: u64| {
            if count == 0 {
                0.0
            } else {
                sum_ms as f64 / 1e3 / count as f64
            }
        };
        let proxy = self.interception.proxy()?;
        let mut open: BTreeMap<SocketAddr, u64> = BTreeMap::new();
        for connection in proxy.connections(usize::MAX) {
            *open.entry(connection.server).or_default() += 1;
        }
        let mut rows: Vec<_> = proxy
            .upstreams()
            .into_iter()
            .map(|upstream| {
                let by_reason: BTreeMap<String, u64> = FailureKind::ALL
                    .iter()
                    .zip(upstream.failures)
                    .filter(|(_, count)| *count != 0)
                    .map(|(kind, count)| (kind.text().to_owned(), count))
                    .collect();
                UpstreamRow {
                    name: upstream.name,
                    address: upstream.address.to_string(),
                    successes: upstream.successes,
                    failures: by_reason.values().sum(),
                    failures_by_reason: by_reason,
                    last_failure: upstream.last_failure,
                    connect_seconds: mean_seconds(upstream.connect_ms, upstream.successes),
                    handshake_seconds: mean_seconds(upstream.handshake_ms, upstream.handshakes),
                    open: open.get(&upstream.address).copied().unwrap_or(0),
                }
            })
            .collect();
        rows.sort_by(|a, b| (&a.name, &a.address).cmp(&(&b.name, &b.address)));
        Ok(rows)
    }

    pub(super) fn intercept_connections(&self, limit: usize) -> Result<Vec<InterceptedRow>, String> {
        let tls = |view: TlsView| TlsRow {
            version: view.version.to_owned(),
            cipher: view.cipher,
            alpn: view.alpn,
        };
        let connections = self.interception.proxy()?.connections(limit);
        Ok(connections
            .into_iter()
            .map(|connection| InterceptedRow {
                endpoint: connection.endpoint,
                direction: match connection.direction {
                    Direction::Ingress => "ingress",
                    Direction::Egress => "egress",
                }
                .to_owned(),
                client: connection.client.to_string(),
                server: connection.server.to_string(),
                name: connection.name,
                state: match connection.failure {
                    Some(failure) => format!("{}: {failure}", connection.state),
                    None => connection.state.to_owned(),
                },
                protocol: connection.protocol.to_owned(),
                client_tls: connection.client_tls.map(tls),
                server_tls: connection.server_tls.map(tls),
                client_bytes: connection.bytes_from_client,
                server_bytes: connection.bytes_from_server,
                requests: connection.requests,
                age_seconds: connection.age / 1_000,
            })
            .collect())
    }

    /// Opens a connection to a server as an intercepted connection of an endpoint, or to an endpoint, would be opened.
    pub(super) fn intercept_check(
        &self,
        name: &str,
        port: u16,
        ends: CheckEnds,
    ) -> Result<InterceptCheck, String> {
        let proxy = self.interception.proxy()?;
        let mut check = InterceptCheck::default();
        let wanted = match ends {
            CheckEnds::From { endpoint, server } => {
                let endpoint = self.endpoint(endpoint)?;
                let server = match server {
                    Some(address) => Ok(address),
                    None => self.learned_address(&endpoint, name)?,
                };
                server.and_then(|server| {
                    let own = endpoint.address_of_family(&server)?;
                    check.pass("address", SocketAddr::new(server, port).to_string());
                    Ok((endpoint, Direction::Egress, own, server))
                })
            }
            CheckEnds::To { endpoint, client } => {
                let endpoint = self.endpoint(endpoint)?;
                endpoint.address_of_family(&client).map(|own| {
                    check.pass("address", SocketAddr::new(own, port).to_string());
                    (endpoint, Direction::Ingress, own, client)
                })
            }
        };
        let (endpoint, direction, own, peer) = match wanted {
            Ok(wanted) => wanted,
            Err(problem) => {
                check.fail("address", problem);
                return Ok(check);
            }
        };
        let view = self.shared.get();
        let learned = LearnedKey {
            addr: peer.into(),
            endpoint: endpoint.id.into(),
        };
        let learned = match direction {
            Direction::Egress => self.names.identities().get(&learned).copied(),
            Direction::Ingress => None,
        };
        let identity = learned.unwrap_or_else(|| view.snapshot.identity_of(peer).identity);
        let entry = view
            .snapshot
            .policy_entry(endpoint.id, direction, identity, protocol::TCP, Some(port));
        let Some(entry) = entry.filter(|entry| {
            Decision::from_u8(entry.decision) == Decision::Inspect
                && entry.inspector == Inspector::TlsTerminate as u8
        }) else {
            let way = match direction {
                Direction::Egress => format!("to {}", SocketAddr::new(peer, port)),
                Direction::Ingress => format!("from {peer} to port {port}"),
            };
            let name = &endpoint.name;
            check.fail(
                "policy",
                format!("the policy of {name} does not intercept connections {way}"),
            );
            return Ok(check);
        };
        check.pass("policy", view.rule(entry.rule));
        let path = self.check_path(&endpoint, direction, own, peer)?;
        let request = PuntRequest {
            rule: entry.rule,
            ruleset: entry.ruleset,
            remote_identity: identity,
            revision: endpoint.revision,
            serial: 0,
            endpoint: endpoint.id,
            inspector: entry.inspector,
            flags: match direction {
                Direction::Ingress => punt_flags::INGRESS,
                Direction::Egress => 0,
            },
        };
        let conntrack = self.datapath.conntrack();
        let expires = monotonic_coarse() + CHECK_LIFETIME.as_nanos() as u64;
        // A flow can use one of the ports already; the entry of that flow is not changed.
        for client_port in CHECK_PORTS {
            let (local_port, remote_port) = match direction {
                Direction::Egress => (client_port, port),
                Direction::Ingress => (port, client_port),
            };
            let (local, remote) = (
                SocketAddr::new(own, local_port),
                SocketAddr::new(peer, remote_port),
            );
            let (client, server) = match direction {
                Direction::Egress => (local, remote),
                Direction::Ingress => (remote, local),
            };
            let key = CtKey {
                local: own.into(),
                remote: peer.into(),
                local_port,
                remote_port,
                endpoint: endpoint.id,
                protocol: protocol::TCP,
                zero: 0,
            };
            if !conntrack
                .insert_intercepted(&key, direction, &request, path, expires)
                .map_err(map_error)?
            {
                continue;
            }
            let steps = proxy.check(&CheckRequest {
                context: StreamContext {
                    request,
                    direction,
                    client,
                    server,
                    ifindex: path.ifindex & !ProxyPath::RESOLVED,
                },
                name: Some(name.to_owned()),
                protocols: vec!["h2".to_owned(), "http/1.1".to_owned()],
                from_node: false,
            });
            for step in steps {
                check.steps.push(CheckRow {
                    step: "connection".to_owned(),
                    ok: step.is_ok,
                    text: step.text,
                });
            }
            check.ok = check.steps.iter().all(|step| step.ok);
            conntrack.remove(&key).map_err(map_error)?;
            return Ok(check);
        }
        Err("all ports of checks are in use; try again".to_owned())
    }

    /// Returns an address that an endpoint has learned by a name, or why there is none.
    fn learned_address(&self, endpoint: &Endpoint, name: &str) -> Result<Result<IpAddr, String>, String> {
        let learned = self.learned_names(Some(endpoint.id.to_string()))?;
        let wanted = name.trim_end_matches('.').to_ascii_lowercase();
        let found = learned
            .iter()
            .find(|row| row.name.trim_end_matches('.') == wanted);
        Ok(found.and_then(|row| row.address.parse().ok()).ok_or_else(|| {
            format!(
                "endpoint {} has learned no address of {wanted}; resolve the name in the endpoint, or give --address",
                endpoint.name
            )
        }))
    }

    /// Returns the interface at which the flow of a check is intercepted, with the MAC addresses of both sides. The MAC
    /// address of the far side is used only for frames to a workload.
    fn check_path(
        &self,
        endpoint: &Endpoint,
        direction: Direction,
        own: IpAddr,
        peer: IpAddr,
    ) -> Result<ProxyPath, String> {
        let Some(interface) = &endpoint.interface else {
            let (ifindex, near) = self.interface(&interface_of_route(peer)?)?;
            return Ok(ProxyPath {
                near,
                far: near,
                ifindex,
            });
        };
        let (ifindex, near) = self.interface(interface)?;
        let far = match direction {
            Direction::Egress => near,
            Direction::Ingress => neighbour(own)?,
        };
        Ok(ProxyPath {
            near,
            far,
            ifindex: ifindex | ProxyPath::RESOLVED,
        })
    }

    /// Returns the index and the MAC address of a configured interface.
    fn interface(&self, name: &str) -> Result<(u32, [u8; 6]), String> {
        let view = self.shared.get();
        let (index, _) = view
            .interfaces
            .iter()
            .find(|(_, known)| &***known == name)
            .ok_or_else(|| format!("there is no interface {name}"))?;
        // The address is read by a system call, because /sys/class/net can belong to another network namespace.
        let mac = nix::ifaddrs::getifaddrs()
            .map_err(|error| error.to_string())?
            .filter(|found| found.interface_name == name)
            .find_map(|found| found.address?.as_link_addr()?.addr())
            .ok_or_else(|| format!("{name} has no MAC address"))?;
        Ok((*index, mac))
    }

    pub(in crate::daemon) fn intercept_stats(&self) -> InterceptStats {
        let proxy = match self.interception.proxy() {
            Ok(proxy) => proxy,
            Err(problem) => {
                return InterceptStats {
                    problem: Some(problem),
                    ..InterceptStats::default()
                };
            }
        };
        let threads = proxy.threads().into_iter().enumerate();
        let stats = proxy.stats();
        let failures = FailureKind::ALL.iter().zip(stats.failures);
        let named = |counters: Vec<(&str, u64)>| {
            counters
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect()
        };
        let mut connections = stats.named();
        connections.push(("records_lost", self.interception.records_lost()));
        if let Ok(overflows) = proxy.accept_overflows() {
            connections.push(("accept_overflows", overflows));
        }
        InterceptStats {
            threads: threads
                .map(|(number, thread)| InterceptThread {
                    number,
                    state: if thread.is_running { "running" } else { "down" }.to_owned(),
                    connections: thread.connections,
                    restarts: thread.restarts,
                    problem: thread.failure,
                })
                .collect(),
            counters: [
                ("connections".to_owned(), named(connections)),
                (
                    "upstream failures".to_owned(),
                    named(failures.map(|(kind, count)| (kind.text(), count)).collect()),
                ),
            ]
            .into(),
            problem: None,
        }
    }
}

/// Returns a Unix time as text (RFC 3339).
fn time_text(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).map_or_else(|_| seconds.to_string(), |time| time.to_string())
}

impl Endpoint {
    /// Returns the first address of the same family as `other`, or that there is none. Link-local addresses do not
    /// count: their packets are not intercepted.
    fn address_of_family(&self, other: &IpAddr) -> Result<IpAddr, String> {
        self.addresses
            .iter()
            .filter_map(|address| address.parse::<IpAddr>().ok())
            .find(|own| own.is_ipv4() == other.is_ipv4() && !is_link_local(own))
            .ok_or_else(|| format!("endpoint {} has no address of this family", self.name))
    }
}

impl InterceptCheck {
    fn pass(&mut self, step: &str, text: String) {
        self.steps.push(CheckRow {
            step: step.to_owned(),
            ok: true,
            text,
        });
    }

    fn fail(&mut self, step: &str, text: String) {
        self.steps.push(CheckRow {
            step: step.to_owned(),
            ok: false,
            text,
        });
    }
}

/// Returns the name of the interface that has the address from which the node would send to `address`.
fn interface_of_route(address: IpAddr) -> Result<String, String> {
    let server = SocketAddr::new(address, DISCARD);
    let any: SocketAddr = if server.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let source = UdpSocket::bind(any)
        .and_then(|socket| {
            socket.connect(server)?;
            socket.local_addr()
        })
        .map_err(|error| format!("no route to {address}: {error}"))?;
    let addresses = nix::ifaddrs::getifaddrs().map_err(|error| error.to_string())?;
    addresses
        .filter_map(|found| {
            let address = found.address?;
            let ip: IpAddr = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
                (Some(v4), _) => v4.ip().into(),
                (None, Some(v6)) => v6.ip().into(),
                (None, None) => return None,
            };
            (ip == source.ip()).then_some(found.interface_name)
        })
        .next()
        .ok_or_else(|| format!("no interface has the address {}", source.ip()))
}

/// Returns the MAC address that the kernel knows for the address of a workload.
fn neighbour(address: IpAddr) -> Result<[u8; 6], String> {
    let wanted = match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    };
    let mut found = None;
    dump_routing(
        RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default()),
        |message| {
            let RouteNetlinkMessage::NewNeighbour(message) = message else {
                return;
            };
            let attributes = &message.attributes;
            if attributes.contains(&NeighbourAttribute::Destination(wanted.clone())) {
                found = found.or(attributes.iter().find_map(|attribute| match attribute {
                    NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice().try_into().ok(),
                    _ => None,
                }));
            }
        },
    )
    .map_err(|error| format!("the neighbours of the node cannot be listed: {error}"))?;
    found.ok_or_else(|| {
        format!(
            "the kernel does not know the MAC address of {address}; exchange a packet with the endpoint first"
        )
    })
}

/// Returns whether an address is unique only on its link, so that no packet of it is intercepted.
fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}
