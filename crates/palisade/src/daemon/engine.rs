//! From policies and a world to what the maps hold, and from one such state to the next.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::Context as _;
use palisade_datapath::{Datapath, Dump};
use palisade_policy::{
    compile::{Changes, Compiler},
    labels::{Labels, reserved},
    plan::{MapContents, plan},
    snapshot::Snapshot,
    world::{Endpoint, NamedPorts, Options, Peer, World},
};
use tracing::error;

use super::{
    network::Network,
    policies::PolicyFiles,
    state::{NODE, State},
};
use crate::config::Config;

/// The compiler, and what of its results is in the maps.
#[derive(Debug)]
pub struct Engine {
    /// The compiler.
    pub compiler: Compiler,
    /// What the maps hold.
    in_maps: Snapshot,
    /// Why they do not hold what the compiler says.
    pub problem: Option<String>,
}

impl Engine {
    /// Goes on from what the maps of a running node hold.
    pub fn new(mut compiler: Compiler, datapath: &Datapath) -> anyhow::Result<Self> {
        let in_maps = found(datapath.dump()?);
        compiler.avoid(&in_maps);
        Ok(Self {
            compiler,
            in_maps,
            problem: None,
        })
    }

    /// Has the compiler take a new world and everything new of the files. If it does not take all of it at once,
    /// then each file by itself, so that one bad file does not keep out the others.
    pub fn compile(&mut self, world: Option<World>, files: &mut PolicyFiles) {
        let offers = files.offers();
        let names: Vec<String> = offers.keys().cloned().collect();
        let Err(problems) = self.compiler.update(Changes {
            world: world.clone(),
            files: offers,
        }) else {
            for name in names {
                files.accepted(&name);
            }
            return;
        };
        if world.is_some()
            && let Err(problems) = self.compiler.update(Changes {
                world,
                files: BTreeMap::new(),
            })
        {
            for problem in problems {
                error!("endpoints and peers: {}", problem.message);
            }
        }
        match names.as_slice() {
            [name] => self.refuse(name, problems, files),
            _ => self.one_by_one(&names, files),
        }
    }

    fn one_by_one(&mut self, names: &[String], files: &mut PolicyFiles) {
        let offers = names.iter().map(|name| (name, files.offered(name)));
        // What goes first may make room for what comes.
        let (gone, here): (Vec<_>, Vec<_>) = offers.partition(|(_, content)| content.is_none());
        for (name, content) in gone.into_iter().chain(here) {
            let changes = Changes {
                world: None,
                files: [(name.clone(), content)].into(),
            };
            match self.compiler.update(changes) {
                Ok(_) => files.accepted(name),
                Err(problems) => self.refuse(name, problems, files),
            }
        }
    }

    /// What a file says cannot be taken: what it said before may be, if it is not in force anyway.
    fn refuse(
        &mut self,
        name: &str,
        problems: Vec<palisade_policy::diagnostic::Diagnostic>,
        files: &mut PolicyFiles,
    ) {
        let Some(kept) = files.rejected(name, problems) else {
            return;
        };
        let changes = Changes {
            world: None,
            files: [(name.to_owned(), Some(kept))].into(),
        };
        match self.compiler.update(changes) {
            Ok(_) => files.accepted(name),
            Err(problems) => drop(files.rejected(name, problems)),
        }
    }

    /// Makes the maps hold what the compiler says, without a packet noticing. Answers whether anything changed.
    /// If that fails, what the maps hold then is where the next try begins.
    pub fn enforce(&mut self, datapath: &Datapath) -> bool {
        let wanted = self.compiler.snapshot();
        let steps = plan(&self.in_maps, wanted);
        match datapath.apply(&steps) {
            Ok(()) => {
                self.problem = None;
                self.in_maps = wanted.clone();
            }
            Err(problem) => {
                error!("the change is not in force, the last state stays: {problem}");
                self.problem = Some(problem.to_string());
                match datapath.dump() {
                    Ok(dump) => self.in_maps = found(dump),
                    Err(problem) => error!("reading the maps back: {problem}"),
                }
            }
        }
        !steps.is_empty()
    }
}

/// The state that the maps hold.
fn found(dump: Dump) -> Snapshot {
    Snapshot::from_maps(MapContents {
        addresses: dump.addresses.into_iter().collect(),
        prefixes: dump.prefixes.into_iter().collect(),
        classes: dump.classes,
        policy: dump.policy,
        endpoints: dump.endpoints.into_iter().collect(),
        world_ipv4: dump.config.map_or(0, |config| config.world_ipv4),
        world_ipv6: dump.config.map_or(0, |config| config.world_ipv6),
    })
}

/// What the node knows besides its policies.
pub fn world<C>(config: &Config, network: &Network, state: &mut State<C>) -> anyhow::Result<World> {
    let names: BTreeSet<String> = config
        .endpoints
        .iter()
        .map(crate::config::Endpoint::qualified_name)
        .collect();
    let mut endpoints = Vec::new();
    for endpoint in &config.endpoints {
        let name = endpoint.qualified_name();
        let id = state
            .endpoint(&name, |known| names.contains(known))
            .context("there are more endpoints than numbers for them (65,534)")?;
        endpoints.push(Endpoint {
            id,
            name: endpoint.name.clone(),
            namespace: endpoint.namespace.clone(),
            labels: endpoint.labels.clone(),
            named_ports: endpoint.named_ports.clone(),
            addresses: endpoint.addresses.clone(),
            audit: state.audit.contains(&name),
        });
    }
    // Whoever is configured with an address has it, also if an interface of the node says otherwise.
    let taken: BTreeSet<IpAddr> = endpoints
        .iter()
        .flat_map(|endpoint| endpoint.addresses.iter().copied())
        .collect();
    let own = network.addresses.iter().chain(&config.node.addresses).copied();
    let addresses: BTreeSet<IpAddr> = own.filter(|address| !taken.contains(address)).collect();
    endpoints.insert(
        0,
        Endpoint {
            id: NODE,
            name: config.node.name.clone(),
            namespace: String::new(),
            labels: Labels::new(config.node.labels.iter().cloned().chain([reserved("host")])),
            named_ports: NamedPorts::new(),
            addresses: addresses.into_iter().collect(),
            audit: state.audit.contains(&config.node.name),
        },
    );
    let peers = config.peers.iter().map(|peer| Peer {
        name: peer.name.clone(),
        labels: peer.labels.clone(),
        named_ports: NamedPorts::new(),
        prefixes: peer.addresses.clone(),
    });
    Ok(World {
        options: Options {
            enforcement: config.policy.enforcement,
            allow_localhost: config.policy.allow_localhost,
            dual_stack: true,
            audit: config.policy.audit,
        },
        endpoints,
        peers: peers.collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_node_has_what_its_interfaces_have_and_no_workload() {
        let text = "[node]\nname = \"n1\"\naddresses = [\"192.0.2.9\"]\nlabels = { zone = \"a\" }\n\
                    [[endpoint]]\nname = \"web\"\ninterface = \"v\"\naddresses = [\"10.0.0.2\"]\n";
        let config = Config::parse(Path::new("/x"), text).unwrap();
        let network = Network {
            addresses: ["192.0.2.1", "10.0.0.2", "fe80::1"]
                .map(|a| a.parse().unwrap())
                .into(),
            ..Network::default()
        };
        let mut state = State::<()>::default();
        state.audit.insert("default/web".into());
        let world = world(&config, &network, &mut state).unwrap();
        let node = &world.endpoints[0];
        assert_eq!((node.id, node.is_node()), (NODE, true));
        assert_eq!(node.labels.to_string(), "k8s:zone=a,reserved:host");
        let addresses: Vec<String> = node.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["192.0.2.1", "192.0.2.9", "fe80::1"]);
        assert!(world.endpoints[1].audit && !node.audit);
        assert_eq!(world.endpoints[1].id, state.endpoints["default/web"]);
    }
}
