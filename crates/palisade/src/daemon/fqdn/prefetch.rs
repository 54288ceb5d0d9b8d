//! Resolves the names in `matchName` selectors before clients query them. A client that has the answer in its own cache
//! sends no query, so without this module the addresses would not be learned. The node sends the queries.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Arc, Weak},
    thread,
    time::Duration,
};

use hickory_resolver::{
    Resolver, TokioResolver,
    config::{
        ConnectionConfig, NameServerConfig, ProtocolConfig, ResolveHosts, ResolverConfig, ResolverOpts,
    },
    net::runtime::TokioRuntimeProvider,
    proto::rr::{RData, RecordType},
};
use palisade_fqdn::EndpointId;
use palisade_protocols::dns::{Address, Answer, CLASS_IN, Name, Question, Source, rtype};
use tokio::{sync::watch, task::JoinSet, time::Instant};
use tracing::{debug, warn};

use super::manager::FqdnManager;

/// Largest number of names that are resolved at the same time.
const MAX_CONCURRENT_QUERIES: usize = 16;
/// Shortest time between two queries for a name, whatever its TTL.
const MIN_REFRESH_INTERVAL: Duration = Duration::from_secs(5);
/// Longest time between two queries for a name. It limits how long the refresh waits for a long TTL, because an address
/// can change before the TTL ends.
const MAX_REFRESH_INTERVAL: Duration = Duration::from_secs(3_600);
/// Delay after the first failed query for a name; it doubles with each further failure.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Longest delay after failed queries.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(300);
/// Time after which the resolver gives up a query.
const QUERY_TIMEOUT: Duration = Duration::from_secs(3);

/// Names to resolve, and servers to query.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Targets {
    /// Names, each with the endpoints that learn its addresses.
    pub names: BTreeMap<String, BTreeSet<EndpointId>>,
    /// DNS servers; without any, nothing is resolved.
    pub servers: Vec<SocketAddr>,
}

/// Handle of the thread that resolves names.
#[derive(Debug)]
pub(crate) struct Prefetch(watch::Sender<Targets>);

impl Prefetch {
    /// Starts the thread, without targets.
    pub(crate) fn start(names: &Arc<FqdnManager>) -> io::Result<Self> {
        let (sender, targets) = watch::channel(Targets::default());
        let names = Arc::downgrade(names);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        thread::Builder::new().name("prefetch".into()).spawn(move || {
            runtime.block_on(run(targets, &names));
        })?;
        Ok(Self(sender))
    }

    /// Replaces the targets.
    pub(crate) fn set(&self, targets: Targets) {
        self.0.send_if_modified(|now| {
            let other = *now != targets;
            *now = targets;
            other
        });
    }
}

/// Returns the DNS servers of the node's own resolver configuration.
pub(crate) fn node_servers(resolv_conf: &Path) -> Vec<SocketAddr> {
    let text = fs::read_to_string(resolv_conf).unwrap_or_default();
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = (words.next() == Some("nameserver"))
            .then(|| words.next())
            .flatten()?;
        address.parse::<IpAddr>().ok()
    });
    servers.map(|address| SocketAddr::new(address, 53)).collect()
}

/// Schedule of one name.
struct Plan {
    due: Instant,
    failures: u32,
    in_progress: bool,
}

/// Answers of one round of queries for a name.
struct Resolution {
    name: String,
    answers: Vec<Answer>,
}

async fn run(mut targets: watch::Receiver<Targets>, names: &Weak<FqdnManager>) {
    let mut plans: BTreeMap<String, Plan> = BTreeMap::new();
    let mut lookups: JoinSet<Resolution> = JoinSet::new();
    let mut resolver: Option<(Vec<SocketAddr>, TokioResolver)> = None;
    loop {
        let wanted = targets.borrow_and_update().clone();
        if resolver
            .as_ref()
            .is_none_or(|(servers, _)| *servers != wanted.servers)
        {
            resolver = resolver_of(&wanted.servers).map(|resolver| (wanted.servers.clone(), resolver));
        }
        plans.retain(|name, plan| plan.in_progress || wanted.names.contains_key(name));
        for name in wanted.names.keys() {
            plans.entry(name.clone()).or_insert_with(|| Plan {
                due: Instant::now(),
                failures: 0,
                in_progress: false,
            });
        }
        // Runs until the targets change.
        loop {
            let now = Instant::now();
            if let Some((_, resolver)) = &resolver {
                let due = plans.iter_mut().filter(|(name, plan)| {
                    !plan.in_progress && plan.due <= now && wanted.names.contains_key(*name)
                });
                for (name, plan) in due.take(MAX_CONCURRENT_QUERIES.saturating_sub(lookups.len())) {
                    plan.in_progress = true;
                    lookups.spawn(resolve(resolver.clone(), name.clone()));
                }
            }
            let next = if lookups.len() < MAX_CONCURRENT_QUERIES && resolver.is_some() {
                let waiting = plans.values().filter(|plan| !plan.in_progress);
                waiting.map(|plan| plan.due).min()
            } else {
                None
            };
            let next = next.unwrap_or(now + MAX_REFRESH_INTERVAL);
            tokio::select! {
                changed = targets.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    break;
                }
                Some(resolution) = lookups.join_next(), if !lookups.is_empty() => {
                    let (Ok(resolution), Some(names)) = (resolution, names.upgrade()) else { continue };
                    learned(&names, &wanted, &mut plans, &resolution);
                }
                () = tokio::time::sleep_until(next) => {}
            }
        }
    }
}

fn resolver_of(servers: &[SocketAddr]) -> Option<TokioResolver> {
    let servers = servers.iter().map(|server| {
        let connections = [ProtocolConfig::Udp, ProtocolConfig::Tcp].map(|protocol| {
            let mut connection = ConnectionConfig::new(protocol);
            connection.port = server.port();
            connection
        });
        NameServerConfig::new(server.ip(), true, connections.into())
    });
    let servers: Vec<_> = servers.collect();
    if servers.is_empty() {
        return None;
    }
    let config = ResolverConfig::from_parts(None, Vec::new(), servers);
    let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
    let options: &mut ResolverOpts = builder.options_mut();
    // The resolver has no cache, because each refresh must query a server.
    options.cache_size = 0;
    options.use_hosts_file = ResolveHosts::Never;
    options.timeout = QUERY_TIMEOUT;
    match builder.build() {
        Ok(resolver) => Some(resolver),
        Err(problem) => {
            warn!(error = %problem, "the resolver of [dns] prefetch cannot be made");
            None
        }
    }
}

async fn resolve(resolver: TokioResolver, name: String) -> Resolution {
    let full = format!("{name}.");
    let (v4, v6) = tokio::join!(
        resolver.lookup(full.as_str(), RecordType::A),
        resolver.lookup(full.as_str(), RecordType::AAAA)
    );
    let mut answers = Vec::new();
    for (lookup, kind) in [(v4, rtype::A), (v6, rtype::AAAA)] {
        match lookup {
            Ok(lookup) => answers.extend(answer_of(&name, kind, lookup.answers())),
            Err(error) => debug!(name, %error, "a name cannot be resolved ahead"),
        }
    }
    Resolution { name, answers }
}

/// Converts the records of a lookup to the form of an answer that was parsed from a packet; `None` if there is no
/// address.
fn answer_of(name: &str, kind: u16, records: &[hickory_resolver::proto::rr::Record]) -> Option<Answer> {
    let mut answer = Answer {
        question: Some(Question {
            name: name.parse::<Name>().ok()?,
            rtype: kind,
            class: CLASS_IN,
        }),
        ..Answer::default()
    };
    let mut least = u32::MAX;
    for record in records {
        let ip = match &record.data {
            RData::A(address) => IpAddr::from(address.0),
            RData::AAAA(address) => IpAddr::from(address.0),
            RData::CNAME(alias) => {
                least = least.min(record.ttl);
                answer.aliases.extend(alias.0.to_ascii().parse::<Name>());
                continue;
            }
            _ => continue,
        };
        least = least.min(record.ttl);
        answer.addresses.push(Address {
            ip,
            ttl: record.ttl,
            source: Source::Record,
        });
    }
    answer.ttl = (least < u32::MAX).then_some(least);
    (!answer.addresses.is_empty()).then_some(answer)
}

fn learned(
    names: &FqdnManager,
    wanted: &Targets,
    plans: &mut BTreeMap<String, Plan>,
    resolution: &Resolution,
) {
    let Some(plan) = plans.get_mut(&resolution.name) else {
        return;
    };
    plan.in_progress = false;
    let Some(ttl) = resolution.answers.iter().filter_map(|answer| answer.ttl).min() else {
        let again = RETRY_INTERVAL
            .saturating_mul(1 << plan.failures.min(8))
            .min(MAX_RETRY_INTERVAL);
        plan.failures += 1;
        plan.due = Instant::now() + again;
        return;
    };
    plan.failures = 0;
    plan.due =
        Instant::now() + Duration::from_secs(ttl.into()).clamp(MIN_REFRESH_INTERVAL, MAX_REFRESH_INTERVAL);
    let Some(endpoints) = wanted.names.get(&resolution.name) else {
        return;
    };
    let endpoints: Vec<EndpointId> = endpoints.iter().copied().collect();
    for answer in &resolution.answers {
        names.learn_prefetched(&endpoints, answer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_servers_are_read_from_resolv_conf() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        let text = "# x\nsearch a.test\nnameserver 192.0.2.1\n nameserver  2001:db8::1 \nnameserver x\noptions ndots:5\n";
        fs::write(&path, text).unwrap();
        let servers: Vec<String> = node_servers(&path).iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.1:53", "[2001:db8::1]:53"]);
        assert!(node_servers(&dir.path().join("none")).is_empty());
    }
}
