//! `palisade replay`: policies and configuration without a daemon, as the packet path and the inspectors use them.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use anyhow::bail;
use palisade_flowlog::{FlowResolver, Owner, RuleInfo};
use palisade_inspect::Rules;
use palisade_model::{inventory::Inventory, snapshot::Snapshot};
use palisade_policy::compile::{Changes, Compiler, CompilerState, FAILSAFE_FILE};
use palisade_replay::{Interface, NamePolicy, Replay, Role, Settings, Timeouts};
use palisade_secrets::Store;

use super::{
    enforcer::{inventory, names_policy},
    failsafe,
    network::Network,
    policies::ParsedFiles,
    startup::fqdn_config,
    state::{NODE, State},
    view::{EventNames, View},
    workers::{INSPECTORS, limits},
};
use crate::config::Config;

/// Policies and configuration for a replay.
pub(crate) struct Offline {
    node: String,
    inventory: Inventory,
    /// Index of every configured interface, by name.
    links: BTreeMap<String, u32>,
    names: EventNames,
    snapshot: Snapshot,
}

impl Offline {
    /// Compiles the policies in `files` with the endpoints and peers of `config`. `node_addresses`: addresses of the
    /// node besides those of the configuration. Returns the names for reports, and the replay.
    ///
    /// # Errors
    /// The policies cannot be compiled.
    pub(crate) fn new(
        config: &Config,
        files: ParsedFiles,
        node_addresses: &[IpAddr],
    ) -> anyhow::Result<(Self, Replay)> {
        let network = Network {
            addresses: node_addresses.iter().copied().collect(),
            ..Network::default()
        };
        let mut state = State::<()>::default();
        let inventory = inventory(config, &network, &mut state)?;
        let mut compiler = Compiler::new(&CompilerState::default());
        let mut files = files;
        files.insert(FAILSAFE_FILE.to_owned(), Some(failsafe::content(config)));
        let changes = Changes {
            inventory: Some(inventory.clone()),
            files,
        };
        if let Err(problems) = compiler.update(changes) {
            let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
            bail!("{}", lines.join("\n"));
        }
        let interfaces = interfaces(config, &inventory);
        let links: BTreeMap<String, u32> = interfaces
            .iter()
            .map(|interface| (interface.name.clone(), interface.index))
            .collect();
        let settings = settings(config, &compiler, interfaces);
        let snapshot = compiler.snapshot().clone();
        let names = EventNames::new(Arc::new(View::new(
            &config.node.name,
            snapshot.clone(),
            &inventory,
            &links,
            (None, None),
            1,
        )));
        let (secrets, _) = Store::load(&config.tls.secrets_dir, None);
        let prepare = Box::new(move |sets: &_, previous: Option<&Rules>| {
            Rules::prepare_with(sets, previous, &|name| secrets.value(name))
        });
        let offline = Self {
            node: config.node.name.clone(),
            inventory,
            links,
            names,
            snapshot,
        };
        Ok((offline, Replay::new(compiler, prepare, settings)))
    }

    /// Returns the names for the numbers in the reports of the replay.
    pub(crate) fn names<'a>(&'a mut self, replay: &'a Replay) -> ReplayNames<'a> {
        let now = replay.snapshot();
        if !Arc::ptr_eq(&now.identities, &self.snapshot.identities) {
            self.snapshot = now.clone();
            let view = View::new(
                &self.node,
                now.clone(),
                &self.inventory,
                &self.links,
                (None, None),
                1,
            );
            self.names = EventNames::new(Arc::new(view));
        }
        ReplayNames {
            names: &self.names,
            replay,
        }
    }
}

/// Names for the numbers in the reports of a replay.
pub(crate) struct ReplayNames<'a> {
    names: &'a EventNames,
    replay: &'a Replay,
}

impl FlowResolver for ReplayNames<'_> {
    fn node(&self) -> Arc<str> {
        self.names.node()
    }

    fn node_labels(&self) -> Arc<[Arc<str>]> {
        self.names.node_labels()
    }

    fn labels(&self, identity: u32) -> Option<Arc<[Arc<str>]>> {
        self.names.labels(identity)
    }

    fn endpoint(&self, id: u16) -> Option<Owner> {
        self.names.endpoint(id)
    }

    fn address(&self, address: IpAddr) -> Option<Owner> {
        self.names.address(address)
    }

    fn rule(&self, id: u32) -> Option<RuleInfo> {
        self.names.rule(id)
    }

    fn interface(&self, ifindex: u32) -> Option<Arc<str>> {
        self.names.interface(ifindex)
    }

    fn dns_names(&self, endpoint: u16, address: IpAddr) -> Arc<[Arc<str>]> {
        let name = self.replay.name_of(endpoint, address);
        name.map(|name| [Arc::from(name)].into()).unwrap_or_default()
    }
}

/// Returns the interfaces of the configuration, numbered from 1.
fn interfaces(config: &Config, inventory: &Inventory) -> Vec<Interface> {
    let nics = config.interfaces.iter().map(|nic| {
        let no_failsafe = !config.failsafe.is_open_at(&nic.name);
        (nic.name.clone(), Role::Nic, nic.ether_types, no_failsafe)
    });
    let workloads = config.endpoints.iter().filter_map(|endpoint| {
        let known = inventory
            .endpoints
            .iter()
            .find(|known| known.name == endpoint.name && known.namespace == endpoint.namespace)?;
        let role = Role::Workload(known.id);
        Some((endpoint.interface.clone(), role, <_>::default(), true))
    });
    nics.chain(workloads)
        .zip(1..)
        .map(|((name, role, ether_types, no_failsafe), index)| Interface {
            name,
            index,
            role,
            ether_types,
            no_failsafe,
        })
        .collect()
}

fn settings(config: &Config, compiler: &Compiler, interfaces: Vec<Interface>) -> Settings {
    let nanoseconds = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let timeouts = &config.timeouts;
    let (policy, _) = names_policy(compiler, &Default::default());
    Settings {
        host: NODE,
        timeouts: Timeouts {
            tcp_opening: nanoseconds(timeouts.tcp_opening),
            tcp_established: nanoseconds(timeouts.tcp_established),
            tcp_closing: nanoseconds(timeouts.tcp_closing),
            udp: nanoseconds(timeouts.udp),
            other: nanoseconds(timeouts.other),
            fragment: nanoseconds(timeouts.fragment),
            trace_interval: nanoseconds(timeouts.trace_interval),
            sweep: nanoseconds(timeouts.sweep),
        },
        max_flows: config.limits.conntrack as usize,
        max_fragments: config.limits.fragments as usize,
        inspectors: INSPECTORS,
        interfaces,
        inspect: limits(config),
        fqdn: fqdn_config(config),
        names: NamePolicy {
            selectors: policy.selectors,
            denied: policy.denied,
            listed: policy.listed,
        },
        verify_server_names: config.tls.verify_sni_address,
    }
}
