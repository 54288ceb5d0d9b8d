//! Endpoints with the label `reserved:init`: interfaces whose workload is not known yet, of sections with
//! `unknown = "init"`.

use std::collections::{BTreeMap, BTreeSet};

use palisade_model::identity::entity_labels;

use crate::{
    label::is_name,
    own_address::own_addresses,
    workload::{Found, INIT, Interface, Rule, Unknown, Workload},
};

/// Returns the claims of interfaces that lead to no workload of a source. An interface without an address of its section
/// has none. The labels of a workload that is listed with its interfaces are known, so it has no claim here, also if it
/// cannot be an endpoint. Any interface can be that of a workload that its source cannot describe and whose network
/// namespace is not found ([`has_unknown_place`]), so no interface has a claim as long as there is one.
pub(crate) fn claims(
    rules: &[Rule],
    workloads: &[Workload],
    interfaces: &[Interface],
    before: &BTreeMap<String, Found>,
) -> Vec<(usize, Found)> {
    if workloads.iter().any(has_unknown_place) {
        return Vec::new();
    }
    let known: BTreeSet<u32> = workloads
        .iter()
        .flat_map(|workload| &workload.links)
        .map(|link| link.ifindex)
        .collect();
    let unknown = interfaces
        .iter()
        .filter(|interface| !known.contains(&interface.link.ifindex));
    let mut claims: Vec<(usize, Found)> = unknown
        .filter_map(|interface| {
            let rules = rules.iter().enumerate();
            let mut matching = rules
                .filter(|(_, rule)| is_for(rule, interface))
                // A section with `unknown = "deny"` closes the interface for the sections behind it.
                .take_while(|(_, rule)| rule.unknown == Unknown::Init);
            matching.find_map(|(n, rule)| claim(rule, interface).map(|found| (n, found)))
        })
        .collect();
    let is_new = |found: &Found| {
        !before
            .get(&found.qualified_name())
            .is_some_and(|known| known.is_same_run(found))
    };
    claims.sort_by_cached_key(|(rule, found)| (is_new(found), *rule, found.ifindex));
    claims
}

/// Returns whether a workload is refused and its network namespace, so its interface, is not known.
pub(crate) fn has_unknown_place(workload: &Workload) -> bool {
    workload.problem.is_some() && workload.netns == 0
}

fn is_for(rule: &Rule, interface: &Interface) -> bool {
    let mut patterns = rule.interfaces.iter();
    patterns.any(|pattern| pattern.matches(&interface.link.interface))
}

fn claim(rule: &Rule, interface: &Interface) -> Option<Found> {
    let link = &interface.link;
    // Without prefixes, a workload without labels could give itself the address of any peer, which would then be unknown
    // to the policies.
    if rule.addresses.is_empty() {
        return None;
    }
    let name = format!("init-{}", link.interface);
    let addresses = own_addresses(rule, &link.addresses).ok()?;
    (is_name(&name) && !addresses.is_empty()).then(|| Found {
        name,
        namespace: rule.namespace.clone(),
        interface: link.interface.clone(),
        ifindex: link.ifindex,
        addresses,
        labels: entity_labels("init"),
        kind: INIT.to_owned(),
        // No source has reported it, so no source that does not answer keeps it.
        origin: INIT.to_owned(),
        id: link.interface.clone(),
        netns: u64::from(interface.namespace.unsigned_abs()),
    })
}
