//! Attaches the programs to the configured interfaces and keeps them attached. An interface is *guarded* while programs
//! are attached to it in both directions.

use std::collections::{BTreeMap, BTreeSet};

use palisade_abi::{Addr, ETHER_TYPES, role};
use palisade_datapath::{
    Attached, Attachment, Datapath, Hook, HookKind, LocalEndpoints, MapError, NamePattern, Role, Rules,
    TcMode, XdpMode, connections, connections_of_netns, monotonic_coarse, seeds,
};
use palisade_discover::InterfacePattern;
use palisade_model::inventory::Inventory;
use tracing::{error, info, warn};

use super::{
    network::Network,
    state::{NODE, State},
};
use crate::{
    config::{self, Config},
    control::api::InterfaceStatus,
};

/// A configured interface.
#[derive(Clone, Debug)]
struct Wanted {
    role: Role,
    endpoint: u16,
    /// Index of the interface of a found workload. An interface of the same name and another index is another one.
    ifindex: Option<u32>,
    ether_types: [u16; ETHER_TYPES],
    no_failsafe: bool,
    how: config::Attachment,
}

/// Result of the last attempt to attach an interface.
#[derive(Clone, Debug)]
enum Outcome {
    Guarded(Attachment, Attached),
    Failed(String),
}

/// The configured interfaces, by name.
#[derive(Debug, Default)]
pub(super) struct Interfaces {
    wanted: BTreeMap<String, Wanted>,
    outcomes: BTreeMap<String, Outcome>,
    /// Index of each interface at the last check; absent if the interface did not exist.
    present: BTreeMap<String, u32>,
    /// Whether seeding is over: the existing connections were seeded, or must no longer be seeded.
    seeded: bool,
    /// Indices of the interfaces that are not configured, as last written to the programs' interface table. The value
    /// is whether the interface is stacked on an interface of a workload. `None` before the first write.
    others: Option<BTreeMap<u32, bool>>,
    /// Index of each interface at which the last attempt to attach failed, but the programs of an earlier attachment
    /// are still attached.
    kept: BTreeMap<String, u32>,
    /// Whether one of the guarded interfaces is or was a port of a bridge.
    had_bridge: bool,
}

impl Interfaces {
    /// Replaces the list of configured interfaces by that of `config`. Must be called after the endpoints have received
    /// their numbers.
    pub(super) fn configure<C>(&mut self, config: &Config, state: &State<C>) {
        self.wanted.clear();
        for interface in &config.interfaces {
            let wanted = Wanted {
                role: Role::Host,
                endpoint: NODE,
                ifindex: None,
                ether_types: interface.ether_types,
                no_failsafe: !config.failsafe.is_open_at(&interface.name),
                how: interface.attachment,
            };
            self.wanted.insert(interface.name.clone(), wanted);
        }
        for endpoint in &config.endpoints {
            let Some(id) = state.endpoints.get(&endpoint.qualified_name()) else {
                continue;
            };
            let wanted = Wanted {
                role: Role::Endpoint,
                endpoint: *id,
                ifindex: None,
                ether_types: [0; ETHER_TYPES],
                no_failsafe: false,
                how: endpoint.attachment,
            };
            self.wanted.insert(endpoint.interface.clone(), wanted);
        }
        for (name, found) in &state.discovered {
            let Some(id) = state.endpoints.get(name) else {
                continue;
            };
            let wanted = Wanted {
                role: Role::Endpoint,
                endpoint: *id,
                ifindex: Some(found.ifindex),
                ether_types: [0; ETHER_TYPES],
                no_failsafe: false,
                how: config::Attachment::AUTO,
            };
            self.wanted.insert(found.interface.clone(), wanted);
        }
    }

    /// Closes the failsafe ports at the configured interfaces that the configuration no longer opens. Returns whether an
    /// interface had them open.
    ///
    /// # Errors
    /// The interface table cannot be read or written.
    pub(super) fn close_failsafe(&self, datapath: &Datapath, network: &Network) -> Result<bool, MapError> {
        let mut has_closed = false;
        for (name, ifindex) in self.find(network, &attached(datapath)) {
            if self.wanted.get(&name).is_some_and(|wanted| wanted.no_failsafe) {
                has_closed |= datapath.close_failsafe(ifindex)?;
            }
        }
        Ok(has_closed)
    }

    /// Attaches the programs to configured interfaces. Interfaces that are attached as configured are left alone; failed
    /// attempts are repeated. Returns the attachments of interfaces that are no longer configured. [`Self::release`]
    /// detaches them, after the nftables table is written: as long as the table lists an interface as guarded, it drops
    /// nothing of that interface, so an interface without programs would be open.
    pub(super) fn reconcile(
        &mut self,
        datapath: &Datapath,
        network: &Network,
        config: &Config,
        inventory: &Inventory,
    ) -> Vec<Attached> {
        if let Err(problem) = datapath.forget_dead() {
            warn!(error = %problem, "pins of removed interfaces cannot be removed");
        }
        let kernel = attached(datapath);
        let found = self.find(network, &kernel);
        self.outcomes.retain(|name, _| self.wanted.contains_key(name));
        self.kept.retain(|name, _| self.wanted.contains_key(name));
        self.present.retain(|name, _| self.wanted.contains_key(name));
        self.update_others(datapath, network, config, &found);
        if !self.seeded {
            self.seeded = true;
            // The packets of an existing connection do not show which end opened it, so existing connections are seeded
            // before the programs see the first packet. There is no second seeding while the maps exist: every later
            // connection begins under the policy, and workloads can forge the socket lists from which seeds are made.
            // For the same reason the flows of an earlier version are taken over, and if their layout is not known,
            // only the node's own tables are read.
            match datapath.take_over_flows() {
                Ok(Some(flows)) => info!(flows, "flows are taken over"),
                Ok(None) if datapath.is_fresh() => {
                    let earlier = datapath.earlier_version();
                    if let Some(version) = earlier {
                        warn!(
                            version,
                            "flows of an earlier version cannot be read; connections continue if the node's own tables \
                             have them, or if the policy allows the direction of their next packet"
                        );
                    }
                    seed(datapath, config, inventory, earlier.is_none());
                }
                Ok(None) => {}
                Err(error) => warn!(%error, "flows of an earlier start cannot be taken over"),
            }
        }
        // Workload interfaces come first, because the programs of a NIC do not forward packets that entered by an
        // unguarded workload interface.
        let mut order: Vec<_> = self.wanted.iter().collect();
        order.sort_by_key(|(_, wanted)| wanted.role == Role::Host);
        for (name, wanted) in order {
            let Some(ifindex) = found.get(name).copied() else {
                self.outcomes.remove(name);
                self.kept.remove(name);
                if self.present.remove(name).is_some() {
                    info!(
                        event = "interface-gone",
                        interface = name,
                        "the interface is gone; it is guarded again when it comes back"
                    );
                }
                continue;
            };
            self.present.insert(name.clone(), ifindex);
            let attachment = attachment(ifindex, wanted, network);
            let in_kernel = kernel.iter().find(|attached| attached.ifindex == ifindex);
            if let Some(Outcome::Guarded(known, _)) = self.outcomes.get(name)
                && *known == attachment
            {
                if in_kernel.is_some_and(is_whole) {
                    continue;
                }
                error!(
                    interface = name,
                    "another process has removed the programs; they are attached again"
                );
            }
            self.kept.remove(name);
            let outcome = match datapath.attach(&attachment) {
                Ok(attached) => {
                    info!(
                        event = "interface-guarded",
                        interface = name,
                        role = role_name(wanted.role),
                        ingress = hook_text(attached.ingress),
                        egress = hook_text(attached.egress),
                        "the interface is guarded"
                    );
                    if let Some(note) = &attached.note {
                        warn!(
                            interface = name,
                            note, "the interface is guarded in another way than the first choice"
                        );
                    }
                    if attached.name != *name {
                        warn!(
                            interface = name,
                            new_name = attached.name,
                            "the interface was renamed; it stays guarded"
                        );
                    }
                    Outcome::Guarded(attachment, attached)
                }
                Err(problem) => {
                    let text = problem.to_string();
                    // Do not log the same failure at every attempt.
                    if !matches!(self.outcomes.get(name), Some(Outcome::Failed(known)) if *known == text) {
                        error!(interface = name, error = text, "the interface is NOT guarded");
                    }
                    if in_kernel.is_some_and(is_whole) {
                        self.kept.insert(name.clone(), ifindex);
                    }
                    Outcome::Failed(text)
                }
            };
            self.outcomes.insert(name.clone(), outcome);
        }
        let wanted: BTreeSet<u32> = found.values().copied().collect();
        let is_leftover = |attached: &Attached| !wanted.contains(&attached.ifindex);
        kernel.into_iter().filter(is_leftover).collect()
    }

    /// Returns the index of every configured interface that exists, found by its name or an alternative name. A guarded
    /// interface that was renamed is found by its attachment, unless another interface has the configured name.
    fn find(&self, network: &Network, kernel: &[Attached]) -> BTreeMap<String, u32> {
        let mut found: BTreeMap<String, u32> = self
            .wanted
            .iter()
            .filter_map(|(name, wanted)| match wanted.ifindex {
                None => Some((name.clone(), network.ifindex(name)?)),
                Some(ifindex) => (network.links.get(name) == Some(&ifindex)).then(|| (name.clone(), ifindex)),
            })
            .collect();
        let mut taken: BTreeSet<u32> = found.values().copied().collect();
        for (name, wanted) in &self.wanted {
            if found.contains_key(name) || wanted.ifindex.is_some() {
                continue;
            }
            let known = match self.outcomes.get(name) {
                Some(Outcome::Guarded(attachment, _)) => Some(attachment.ifindex),
                _ => None,
            };
            // Before the first write of `others`, the attachment can have been made by a previous daemon; it is
            // recognised by role and endpoint. Later, `outcomes` has the index of each attachment.
            if known.is_none() && self.others.is_some() {
                continue;
            }
            let renamed = kernel.iter().find(|attached| {
                let is_same = attached.interface.role == role_number(wanted.role)
                    && attached.interface.endpoint == wanted.endpoint;
                !taken.contains(&attached.ifindex)
                    && is_same
                    && known.is_none_or(|known| known == attached.ifindex)
            });
            if let Some(renamed) = renamed {
                taken.insert(renamed.ifindex);
                found.insert(name.clone(), renamed.ifindex);
            }
        }
        found
    }

    /// Writes the list of interfaces that are not configured to the programs' interface table. Configured interfaces
    /// that are not guarded yet are not in the list, so the programs forward nothing that enters by them.
    fn update_others(
        &mut self,
        datapath: &Datapath,
        network: &Network,
        config: &Config,
        found: &BTreeMap<String, u32>,
    ) {
        // No packet of a proxy link is forwarded unless `palisade_proxy` has redirected it.
        let proxy_links = palisade_datapath::proxy_link_names(&config.worker.interface);
        let wanted: BTreeSet<u32> = found.values().copied().collect();
        let workloads: BTreeSet<u32> = found
            .iter()
            .filter(|(name, _)| self.wanted.get(*name).is_some_and(|w| w.role == Role::Endpoint))
            .map(|(_, ifindex)| *ifindex)
            .collect();
        let above = network.above(&workloads);
        let others: BTreeMap<u32, bool> = network
            .links
            .iter()
            .filter(|(name, ifindex)| !wanted.contains(ifindex) && !proxy_links.contains(name))
            // An interface of a workload that is not found yet stays outside the table, so nothing is forwarded from it.
            .filter(|(name, _)| !is_of_workload(config, name))
            .map(|(_, ifindex)| (*ifindex, above.contains(ifindex)))
            .collect();
        if self.others.as_ref() == Some(&others) {
            return;
        }
        match datapath.set_others(self.others.as_ref(), &others) {
            Ok(()) => self.others = Some(others),
            Err(problem) => error!(
                error = %problem,
                "the list of unguarded interfaces cannot be written; packets that enter by new ones are dropped"
            ),
        }
    }

    /// Detaches the programs from `leftovers`, interfaces that [`Self::reconcile`] has found to be no longer configured.
    pub(super) fn release(
        &mut self,
        datapath: &Datapath,
        network: &Network,
        config: &Config,
        leftovers: &[Attached],
    ) {
        for attached in leftovers {
            match datapath.detach(attached.ifindex) {
                Ok(()) => info!(
                    interface = attached.name,
                    "the interface is not configured and no longer guarded"
                ),
                Err(error) => {
                    error!(interface = attached.name, %error, "the programs cannot be detached");
                }
            }
            // Detaching has cleared the interface's entry of the interface table. Without an entry in `others` too, the
            // next write adds the interface to the table as an unguarded one.
            if let Some(others) = &mut self.others {
                others.remove(&attached.ifindex);
            }
        }
        let found = self.present.clone();
        self.update_others(datapath, network, config, &found);
    }

    /// Returns the attachments of all guarded interfaces.
    pub(super) fn attached(&self) -> impl Iterator<Item = &Attached> {
        self.outcomes.values().filter_map(|outcome| match outcome {
            Outcome::Guarded(_, attached) => Some(attached),
            Outcome::Failed(_) => None,
        })
    }

    /// Returns the part of the nftables rules that depends on interfaces. `nics`: whether the table stops traffic of
    /// unguarded NICs.
    ///
    /// The table does not stop traffic of a NIC at which attaching failed, so that an operator can still reach the
    /// node; `status` reports the failure.
    pub(super) fn rules(&mut self, network: &Network, config: &Config, nics: bool) -> Rules {
        let (mut enforced, mut workloads) = (BTreeSet::new(), BTreeSet::new());
        let mut names = BTreeSet::new();
        let mut forwards = false;
        for (name, wanted) in &self.wanted {
            let outcome = self.outcomes.get(name);
            let guarded = match outcome {
                Some(Outcome::Guarded(attachment, _)) => Some(attachment.ifindex),
                Some(Outcome::Failed(_)) => self.kept.get(name).copied(),
                None => None,
            };
            forwards |= guarded.is_none();
            if let Some(ifindex) = guarded {
                enforced.insert(ifindex);
                if wanted.role == Role::Endpoint {
                    workloads.insert(ifindex);
                }
                self.had_bridge |= network.bridge_ports.contains(&ifindex);
            }
            let is_closed = match wanted.role {
                Role::Endpoint => true,
                Role::Host => nics && !matches!(outcome, Some(Outcome::Failed(_))),
            };
            if !is_closed {
                continue;
            }
            // nftables does not match alternative names, so the primary name is added.
            let index = network.alternatives.get(name);
            let first = network.links.iter().find(|(_, link)| Some(*link) == index);
            names.extend(first.map(|(first, _)| first.clone()));
            // The names of found workloads match a pattern.
            if wanted.ifindex.is_none() {
                names.insert(name.clone());
            }
        }
        let patterns: BTreeSet<NamePattern> = patterns(config)
            .map(|pattern| match pattern {
                InterfacePattern::Name(name) => NamePattern::Name(name.clone()),
                InterfacePattern::Prefix(prefix) => NamePattern::Prefix(prefix.clone()),
            })
            .collect();
        // An interface of a workload can appear, also as a port of a bridge, while no daemon runs or before the daemon
        // is notified, so the chains for forwarded packets and for bridges exist before it.
        let has_patterns = !patterns.is_empty();
        forwards |= has_patterns;
        enforced.extend(network.above(&enforced));
        workloads.extend(network.above(&workloads));
        Rules {
            enforced,
            workloads,
            names,
            patterns,
            forwards,
            has_bridge: self.had_bridge || has_patterns,
            ..Rules::default()
        }
    }

    /// Returns whether attaching an interface failed and is to be tried again.
    pub(super) fn has_failures(&self) -> bool {
        self.outcomes
            .values()
            .any(|outcome| matches!(outcome, Outcome::Failed(_)))
    }

    /// Returns for `status` the attachment of each configured interface, or the problem if it is not guarded. The
    /// interface of a found workload is left out once it is gone, since the workload itself can remove it and the next
    /// report of the sources removes the endpoint.
    pub(super) fn report(&self, datapath: &Datapath) -> Vec<InterfaceStatus> {
        let kernel = datapath.attachments();
        let wanted = self.wanted.iter();
        let wanted =
            wanted.filter(|(name, wanted)| wanted.ifindex.is_none() || self.present.contains_key(*name));
        let report = wanted.map(|(name, wanted)| {
            let mut status = InterfaceStatus {
                name: name.clone(),
                ifindex: self.present.get(name).copied().unwrap_or(0),
                role: role_name(wanted.role).to_owned(),
                endpoint: wanted.endpoint,
                ..InterfaceStatus::default()
            };
            match self.outcomes.get(name) {
                Some(Outcome::Guarded(_, attached)) => {
                    let now = kernel
                        .as_ref()
                        .map(|all| all.iter().find(|now| now.ifindex == attached.ifindex));
                    status.problem = match now {
                        Ok(now) if now.is_some_and(is_whole) => None,
                        Ok(_) => Some("its programs were removed by another process".to_owned()),
                        Err(problem) => Some(format!(
                            "the attachments cannot be read from the kernel: {problem}"
                        )),
                    };
                    status.ingress = attached.ingress.map(hook_name);
                    status.egress = attached.egress.map(hook_name);
                    status.note.clone_from(&attached.note);
                }
                Some(Outcome::Failed(problem)) => status.problem = Some(problem.clone()),
                None => status.problem = Some("there is no such interface yet".to_owned()),
            }
            status
        });
        report.collect()
    }
}

/// Returns the patterns of the interfaces that belong to workloads.
fn patterns(config: &Config) -> impl Iterator<Item = &InterfacePattern> {
    config
        .discover
        .iter()
        .flat_map(|section| &section.rule.interfaces)
}

/// Returns whether an interface of this name belongs to a workload that can be found.
fn is_of_workload(config: &Config, name: &str) -> bool {
    patterns(config).any(|pattern| pattern.matches(name))
}

/// Returns the attachments that the kernel has.
fn attached(datapath: &Datapath) -> Vec<Attached> {
    datapath.attachments().unwrap_or_else(|problem| {
        warn!(error = %problem, "the attachments cannot be read from the kernel");
        Vec::new()
    })
}

const fn role_number(role: Role) -> u8 {
    match role {
        Role::Host => role::HOST,
        Role::Endpoint => role::ENDPOINT,
    }
}

fn attachment(ifindex: u32, wanted: &Wanted, network: &Network) -> Attachment {
    Attachment {
        ifindex,
        role: wanted.role,
        endpoint: wanted.endpoint,
        ingress: match wanted.how.ingress {
            config::IngressHook::Auto => Hook::Auto,
            config::IngressHook::Xdp => Hook::Xdp,
            config::IngressHook::Tc => Hook::Tc,
        },
        xdp_mode: match wanted.how.xdp_mode {
            config::XdpMode::Native => XdpMode::Native,
            config::XdpMode::Auto => XdpMode::NativeOrGeneric,
            config::XdpMode::Skb => XdpMode::Generic,
        },
        tc: match wanted.how.tc {
            config::TcHook::Auto => TcMode::Auto,
            config::TcHook::Tcx => TcMode::Tcx,
            config::TcHook::Clsact => TcMode::Clsact,
        },
        link: network.masters.get(&ifindex).copied().unwrap_or(0),
        ether_types: wanted.ether_types,
        no_failsafe: wanted.no_failsafe,
    }
}

/// Returns whether programs are attached in both directions.
const fn is_whole(attached: &Attached) -> bool {
    attached.ingress.is_some() && attached.egress.is_some()
}

const fn role_name(role: Role) -> &'static str {
    match role {
        Role::Host => "host",
        Role::Endpoint => "endpoint",
    }
}

/// Returns the name of a hook for `status` and the log.
fn hook_name(kind: HookKind) -> String {
    match kind {
        HookKind::XdpNative => "xdp (native)",
        HookKind::XdpGeneric => "xdp (skb)",
        HookKind::Tcx => "tcx",
        HookKind::Clsact => "clsact",
    }
    .to_owned()
}

fn hook_text(kind: Option<HookKind>) -> String {
    kind.map_or_else(|| "nothing".to_owned(), hook_name)
}

/// Makes conntrack entries from the connections of the kernel's own tables. `workloads`: also from those of the network
/// namespaces of workloads, which root in a workload can forge.
fn seed(datapath: &Datapath, config: &Config, inventory: &Inventory, workloads: bool) {
    let mut found = connections(NODE).unwrap_or_else(|problem| {
        warn!(error = %problem, "existing connections of the node are not seeded; their next packet decides");
        Vec::new()
    });
    for endpoint in config.endpoints.iter().filter(|_| workloads) {
        let Some(netns) = &endpoint.netns else { continue };
        let same = |known: &&palisade_model::inventory::Endpoint| {
            (&known.name, &known.namespace) == (&endpoint.name, &endpoint.namespace)
        };
        let Some(known) = inventory.endpoints.iter().find(same) else {
            continue;
        };
        match connections_of_netns(netns, known.id) {
            Ok(more) => found.extend(more),
            Err(problem) => warn!(
                endpoint = endpoint.qualified_name(),
                error = %problem,
                "existing connections of an endpoint are not seeded; their next packet decides"
            ),
        }
    }
    let addresses = inventory.endpoints.iter().flat_map(|endpoint| {
        let id = endpoint.id;
        endpoint
            .addresses
            .iter()
            .map(move |address| (Addr::from(*address), id))
    });
    let local = LocalEndpoints {
        addresses: addresses.collect(),
        host: NODE,
    };
    let seeded = datapath.config().and_then(|config| {
        let Some(config) = config else { return Ok(0) };
        let entries = seeds(&found, &local, &config, monotonic_coarse());
        datapath.conntrack().seed(&entries)
    });
    match seeded {
        Ok(0) => {}
        Ok(connections) => info!(connections, "existing connections are seeded"),
        Err(error) => warn!(%error, "existing connections cannot be seeded"),
    }
}
