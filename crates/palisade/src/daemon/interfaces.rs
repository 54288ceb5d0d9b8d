//! Which interfaces are to be guarded, and which are.

use std::collections::{BTreeMap, BTreeSet};

use palisade_abi::{Addr, ETHER_TYPES, role};
use palisade_datapath::{
    Attached, Attachment, Datapath, Hook, HookKind, LocalEndpoints, Role, Rules, TcMode, XdpMode,
    connections, connections_of_netns, monotonic_coarse, seeds,
};
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

/// An interface that is to be guarded.
#[derive(Clone, Debug)]
struct Wanted {
    role: Role,
    endpoint: u16,
    ether_types: [u16; ETHER_TYPES],
    how: config::Attachment,
}

/// What came of it.
#[derive(Clone, Debug)]
enum Outcome {
    Guarded(Attachment, Attached),
    Failed(String),
}

/// The guarded interfaces, by name.
#[derive(Debug, Default)]
pub(super) struct Interfaces {
    wanted: BTreeMap<String, Wanted>,
    outcomes: BTreeMap<String, Outcome>,
    /// Index of each as it was when it was looked at last; none: it was not there.
    present: BTreeMap<String, u32>,
    /// Whether the connections of the kernel's tables have been taken over, or must not be any more.
    seeded: bool,
    /// What the programs were told of interfaces that are not guarded; none: nothing yet.
    others: Option<BTreeMap<u32, bool>>,
    /// Index of each to which the programs could not be attached and that keeps what was attached before: those programs
    /// go on.
    kept: BTreeMap<String, u32>,
    /// Whether one of them is or was a port of a bridge.
    had_bridge: bool,
}

impl Interfaces {
    /// Takes over what the configuration wants. The endpoints have their numbers already.
    pub(super) fn configure<C>(&mut self, config: &Config, state: &State<C>) {
        self.wanted.clear();
        for interface in &config.interfaces {
            let wanted = Wanted {
                role: Role::Host,
                endpoint: NODE,
                ether_types: interface.ether_types,
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
                ether_types: [0; ETHER_TYPES],
                how: endpoint.attachment,
            };
            self.wanted.insert(endpoint.interface.clone(), wanted);
        }
    }

    /// Guards what is there and wanted, and nothing else. What is guarded as it should be is left alone; what
    /// failed before is tried again. Answers whether anything is different now.
    pub(super) fn reconcile(
        &mut self,
        datapath: &Datapath,
        network: &Network,
        config: &Config,
        world: &Inventory,
    ) -> bool {
        let kernel = attached(datapath);
        let found = self.find(network, &kernel);
        let (guarded, mut changed) = self.release(datapath, kernel, &found);
        if let Err(problem) = self.tell_of_others(datapath, network, &found) {
            error!(
                "the programs cannot be told which interfaces there are; what enters by new ones is dropped: {problem}"
            );
        }
        if !self.seeded {
            self.seeded = true;
            // Once, before the first program of this boot judges a packet: which end opened an existing connection
            // does not show in its packets. Never again while the maps exist: from then on every connection begins
            // under the policy, and the socket lists that the seeds come from are in the hands of the workloads.
            if datapath.is_fresh() {
                seed(datapath, config, world);
            }
        }
        // Workloads first: what comes from a workload whose interface is not guarded is not forwarded by a NIC that is.
        let mut order: Vec<_> = self.wanted.iter().collect();
        order.sort_by_key(|(_, wanted)| wanted.role == Role::Host);
        for (name, wanted) in order {
            let Some(ifindex) = found.get(name).copied() else {
                changed |= self.outcomes.remove(name).is_some();
                self.kept.remove(name);
                if self.present.remove(name).is_some() {
                    info!(
                        event = "interface-gone",
                        interface = name,
                        "{name}: gone; guarded again when it comes back"
                    );
                }
                continue;
            };
            self.present.insert(name.clone(), ifindex);
            let attachment = attachment(ifindex, wanted, network);
            let in_kernel = guarded.iter().find(|attached| attached.ifindex == ifindex);
            if let Some(Outcome::Guarded(known, _)) = self.outcomes.get(name)
                && *known == attachment
            {
                if in_kernel.is_some_and(is_whole) {
                    continue;
                }
                error!("{name}: somebody has removed our programs; putting them back");
            }
            self.kept.remove(name);
            let outcome = match datapath.attach(&attachment) {
                Ok(attached) => {
                    info!(
                        event = "interface-guarded",
                        interface = name,
                        "{name}: guarded as {}, ingress by {}, egress by {}",
                        role_name(wanted.role),
                        hook_text(attached.ingress),
                        hook_text(attached.egress)
                    );
                    if let Some(note) = &attached.note {
                        warn!("{name}: {note}");
                    }
                    changed = true;
                    if attached.name != *name {
                        warn!(
                            "{name}: the interface is called {} now; it stays guarded",
                            attached.name
                        );
                    }
                    Outcome::Guarded(attachment, attached)
                }
                Err(problem) => {
                    let text = problem.to_string();
                    // The same failure is not told again at every try.
                    if !matches!(self.outcomes.get(name), Some(Outcome::Failed(known)) if *known == text) {
                        error!("{name}: NOT guarded: {text}");
                        changed = true;
                    }
                    if in_kernel.is_some_and(is_whole) {
                        self.kept.insert(name.clone(), ifindex);
                    }
                    Outcome::Failed(text)
                }
            };
            self.outcomes.insert(name.clone(), outcome);
        }
        changed
    }

    /// The index of every interface that is wanted and there: by its name, by an alternative name, or, if it was renamed
    /// while it was guarded and no other has its name, as the one that was guarded by that name.
    fn find(&self, network: &Network, kernel: &[Attached]) -> BTreeMap<String, u32> {
        let mut found: BTreeMap<String, u32> = self
            .wanted
            .keys()
            .filter_map(|name| Some((name.clone(), network.ifindex(name)?)))
            .collect();
        let mut taken: BTreeSet<u32> = found.values().copied().collect();
        for (name, wanted) in &self.wanted {
            if found.contains_key(name) {
                continue;
            }
            let known = match self.outcomes.get(name) {
                Some(Outcome::Guarded(attachment, _)) => Some(attachment.ifindex),
                _ => None,
            };
            // A daemon before this one may have guarded it: a NIC or a workload of that number whose name is gone. Later it
            // is known which name an interface was guarded by.
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

    /// Tells the programs which interfaces there are that are not to be guarded. What is to be guarded and is not yet is
    /// none of them: nothing that enters by it is forwarded.
    fn tell_of_others(
        &mut self,
        datapath: &Datapath,
        network: &Network,
        found: &BTreeMap<String, u32>,
    ) -> Result<(), palisade_datapath::AttachError> {
        let wanted: BTreeSet<u32> = found.values().copied().collect();
        let workloads: BTreeSet<u32> = found
            .iter()
            .filter(|(name, _)| self.wanted.get(*name).is_some_and(|w| w.role == Role::Endpoint))
            .map(|(_, ifindex)| *ifindex)
            .collect();
        let above = network.above(&workloads);
        let others: BTreeMap<u32, bool> = network
            .links
            .values()
            .filter(|ifindex| !wanted.contains(ifindex))
            .map(|ifindex| (*ifindex, above.contains(ifindex)))
            .collect();
        if self.others.as_ref() != Some(&others) {
            datapath.set_others(self.others.as_ref(), &others)?;
            self.others = Some(others);
        }
        Ok(())
    }

    /// Stops guarding what is no longer wanted, and forgets interfaces that are gone. Answers what the kernel has
    /// now, and whether that is different.
    fn release(
        &mut self,
        datapath: &Datapath,
        guarded: Vec<Attached>,
        found: &BTreeMap<String, u32>,
    ) -> (Vec<Attached>, bool) {
        if let Err(problem) = datapath.forget_dead() {
            warn!("forgetting interfaces that are gone: {problem}");
        }
        let wanted: BTreeSet<u32> = found.values().copied().collect();
        let mut changed = false;
        for attached in &guarded {
            if !wanted.contains(&attached.ifindex) {
                match datapath.detach(attached.ifindex) {
                    Ok(()) => info!("{}: no longer guarded: it is not configured", attached.name),
                    Err(problem) => error!("{}: cannot be released: {problem}", attached.name),
                }
                // Else the programs would not be told of it again.
                if let Some(others) = &mut self.others {
                    others.remove(&attached.ifindex);
                }
                changed = true;
            }
        }
        self.outcomes.retain(|name, _| self.wanted.contains_key(name));
        self.kept.retain(|name, _| self.wanted.contains_key(name));
        self.present.retain(|name, _| self.wanted.contains_key(name));
        (guarded, changed)
    }

    /// The interfaces that are guarded, as they are.
    pub(super) fn attached(&self) -> impl Iterator<Item = &Attached> {
        self.outcomes.values().filter_map(|outcome| match outcome {
            Outcome::Guarded(_, attached) => Some(attached),
            Outcome::Failed(_) => None,
        })
    }

    /// What the nftables table has to know of interfaces. `nics`: whether nothing passes a NIC that is not guarded.
    ///
    /// A NIC to which the programs cannot be attached is left out, so that the node can be reached to mend that; `status`
    /// says so.
    pub(super) fn rules(&mut self, network: &Network, nics: bool) -> Rules {
        let (mut judged, mut workloads) = (BTreeSet::new(), BTreeSet::new());
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
                judged.insert(ifindex);
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
            // nftables knows no alternative names.
            let index = network.alternatives.get(name);
            let first = network.links.iter().find(|(_, link)| Some(*link) == index);
            names.extend(first.map(|(first, _)| first.clone()));
            names.insert(name.clone());
        }
        judged.extend(network.above(&judged));
        workloads.extend(network.above(&workloads));
        Rules {
            judged,
            workloads,
            names,
            forwards,
            has_bridge: self.had_bridge,
            ..Rules::default()
        }
    }

    /// Whether something has to be tried again.
    pub(super) fn has_failures(&self) -> bool {
        self.outcomes
            .values()
            .any(|outcome| matches!(outcome, Outcome::Failed(_)))
    }

    /// For `status`: what was attached, and whether the kernel still has it.
    pub(super) fn report(&self, datapath: &Datapath) -> Vec<InterfaceStatus> {
        let kernel = datapath.attachments();
        let report = self.wanted.iter().map(|(name, wanted)| {
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
                        Err(problem) => Some(format!("what is attached cannot be read: {problem}")),
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

/// What is guarded, as the kernel has it.
fn attached(datapath: &Datapath) -> Vec<Attached> {
    datapath.attachments().unwrap_or_else(|problem| {
        warn!("what is guarded cannot be read: {problem}");
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
    }
}

/// Whether something judges packets in both directions.
const fn is_whole(attached: &Attached) -> bool {
    attached.ingress.is_some() && attached.egress.is_some()
}

const fn role_name(role: Role) -> &'static str {
    match role {
        Role::Host => "host",
        Role::Endpoint => "endpoint",
    }
}

/// The names of the configuration.
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

/// Takes over the connections that the kernel knows of already.
fn seed(datapath: &Datapath, config: &Config, world: &Inventory) {
    let mut found = connections(NODE).unwrap_or_else(|problem| {
        warn!("{problem}; connections of the node that exist already are judged by their next packet");
        Vec::new()
    });
    for endpoint in &config.endpoints {
        let Some(netns) = &endpoint.netns else { continue };
        let same = |known: &&palisade_model::inventory::Endpoint| {
            (&known.name, &known.namespace) == (&endpoint.name, &endpoint.namespace)
        };
        let Some(known) = world.endpoints.iter().find(same) else {
            continue;
        };
        match connections_of_netns(netns, known.id) {
            Ok(more) => found.extend(more),
            Err(problem) => warn!(
                "endpoint {}: {problem}; its connections that exist already are judged by their next packet",
                endpoint.qualified_name()
            ),
        }
    }
    let addresses = world.endpoints.iter().flat_map(|endpoint| {
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
        Ok(count) => info!("{count} connections that exist already were taken over"),
        Err(problem) => warn!("connections that exist already: {problem}"),
    }
}
