//! Makes endpoints of workloads. What conflicts is left out, so its interface stays closed.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use palisade_model::{labels::Labels, rule::Label};

use crate::{
    initial,
    label::{check_key, check_value, is_name, shown},
    own_address::own_addresses,
    template::Subject,
    workload::{Found, INIT, Interface, Link, MAX_LABELS, Rule, Unknown, Workload},
};

/// Names, interfaces and addresses that belong to the configuration, or to endpoints that stay because their source does
/// not answer. The values say to what, for messages.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    /// `namespace/name` of these endpoints.
    pub names: BTreeSet<String>,
    /// Interfaces.
    pub interfaces: BTreeMap<String, String>,
    /// Addresses of the node and of these endpoints.
    pub addresses: BTreeMap<IpAddr, String>,
    /// Prefixes of peers.
    pub networks: Vec<(IpNet, String)>,
}

/// Why a workload is no endpoint. Its interfaces stay closed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Source of the workload: `netns:web`.
    pub source: String,
    /// Description.
    pub message: String,
    /// Whether the workload is only incomplete, for example without an address, which is normal while it starts.
    pub is_pending: bool,
    /// Whether it claims a name, an interface or an address that belongs to another.
    pub is_conflict: bool,
}

/// Result of [`find`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Endpoints, by `namespace/name`.
    pub found: BTreeMap<String, Found>,
    /// Workloads that are no endpoints.
    pub problems: BTreeSet<Problem>,
}

/// Returns the endpoints that result from `workloads`, at most `limit`.
///
/// `before` is the previous result. An endpoint in it keeps its name, interface and addresses against a workload that
/// claims them later; otherwise a new workload could take the address, and so the identity, of a running one. Among
/// the others the order of the rules counts, then that of the names. The configuration (`taken`) always wins.
/// `interfaces` are those of which a rule may make endpoints with `reserved:init`; every workload wins against these.
#[must_use]
pub fn find(
    rules: &[Rule],
    workloads: &[Workload],
    interfaces: &[Interface],
    taken: &Taken,
    before: &BTreeMap<String, Found>,
    limit: usize,
) -> Outcome {
    let mut outcome = Outcome::default();
    let mut claims = Vec::new();
    let has_init = rules.iter().any(|rule| rule.unknown == Unknown::Init);
    for workload in workloads {
        let Some(rule) = rules.get(workload.rule) else {
            continue;
        };
        match claims_of(rule, workload) {
            Ok(of_workload) => claims.extend(of_workload.into_iter().map(|found| (workload.rule, found))),
            Err((mut message, is_pending)) => {
                if has_init && initial::has_unknown_place(workload) {
                    message += "; its interface is not known, so no interface has reserved:init";
                }
                outcome.problems.insert(Problem {
                    source: source(rule, workload),
                    message,
                    is_pending,
                    is_conflict: false,
                });
            }
        }
    }
    let holds = |found: &Found| {
        before
            .get(&found.qualified_name())
            .is_some_and(|known| known.is_same_run(found))
    };
    claims.sort_by(|(a_rule, a), (b_rule, b)| {
        let key = |rule: &usize, found: &Found| (!holds(found), *rule, found.qualified_name(), found.ifindex);
        key(a_rule, a).cmp(&key(b_rule, b))
    });
    // A running workload can add the address of another one, so it is not enough that endpoints come before newcomers.
    let mut held: BTreeMap<IpAddr, String> = BTreeMap::new();
    for (_, found) in claims.iter().filter(|(_, found)| holds(found)) {
        let name = found.qualified_name();
        let had = before.get(&name).map(|known| known.addresses.as_slice());
        let kept = found.addresses.iter();
        let kept = kept.filter(|address| had.is_some_and(|had| had.contains(address)));
        held.extend(kept.map(|address| (*address, name.clone())));
    }
    // An endpoint with `reserved:init` does not hold an address: the workload that gets labels later must get it.
    claims.extend(initial::claims(rules, workloads, interfaces, before));
    let mut interfaces: BTreeMap<String, String> = BTreeMap::new();
    let mut addresses: BTreeMap<IpAddr, String> = BTreeMap::new();
    for (_, found) in claims {
        let name = found.qualified_name();
        let conflict = with_taken(&found, &name, taken)
            .or_else(|| with_accepted(&found, &name, &outcome.found, &interfaces, &addresses));
        let conflict = conflict.or_else(|| {
            let of_another = |address: &&IpAddr| held.get(*address).is_some_and(|by| *by != name);
            let address = found.addresses.iter().find(of_another)?;
            let by = held.get(address)?;
            Some(belongs_to("address", address, by))
        });
        let is_conflict = conflict.is_some() && found.kind != INIT;
        let conflict = conflict.or_else(|| {
            (outcome.found.len() >= limit).then(|| {
                format!("there are {limit} endpoints of this kind already: raise [limits] discovered")
            })
        });
        if let Some(message) = conflict {
            outcome.problems.insert(Problem {
                source: found.source(),
                message: format!("{message}; {} stays denied", found.interface),
                is_pending: found.kind == INIT,
                is_conflict,
            });
            continue;
        }
        let by = format!("{name} ({})", found.source());
        interfaces.insert(found.interface.clone(), by.clone());
        addresses.extend(found.addresses.iter().map(|address| (*address, by.clone())));
        outcome.found.insert(name, found);
    }
    outcome
}

/// Returns why a workload conflicts with what it must not get.
fn with_taken(found: &Found, name: &str, taken: &Taken) -> Option<String> {
    if taken.names.contains(name) {
        return Some(format!(
            "the configuration, or a source that does not answer, has another {name}"
        ));
    }
    if let Some(other) = taken.interfaces.get(&found.interface) {
        return Some(belongs_to("interface", &found.interface, other));
    }
    found.addresses.iter().find_map(|address| {
        let mut networks = taken.networks.iter();
        let other = taken.addresses.get(address).or_else(|| {
            let (_, by) = networks.find(|(network, _)| network.contains(address))?;
            Some(by)
        })?;
        Some(belongs_to("address", address, other))
    })
}

/// Returns why a workload conflicts with the endpoints that were found before it.
fn with_accepted(
    found: &Found,
    name: &str,
    accepted: &BTreeMap<String, Found>,
    interfaces: &BTreeMap<String, String>,
    addresses: &BTreeMap<IpAddr, String>,
) -> Option<String> {
    if let Some(other) = accepted.get(name) {
        return Some(format!("the name {name} belongs to {} already", other.source()));
    }
    if let Some(other) = interfaces.get(&found.interface) {
        return Some(belongs_to("interface", &found.interface, other));
    }
    found.addresses.iter().find_map(|address| {
        let other = addresses.get(address)?;
        Some(belongs_to("address", address, other))
    })
}

fn belongs_to(what: &str, name: impl std::fmt::Display, other: &str) -> String {
    format!("{what} {name} belongs to {other} already")
}

fn source(rule: &Rule, workload: &Workload) -> String {
    let id = workload.container.as_deref().unwrap_or(&workload.name);
    let id = match rule.kind {
        "netns" => shown(id),
        _ => shown(id.get(..12).unwrap_or(id)),
    };
    format!("{}:{id}", rule.kind)
}

/// Returns the endpoints of one workload: one for each interface that leads to it. The error says why there is none,
/// and whether that is normal while a workload starts.
fn claims_of(rule: &Rule, workload: &Workload) -> Result<Vec<Found>, (String, bool)> {
    if let Some(problem) = &workload.problem {
        return Err((problem.clone(), false));
    }
    let refused = |message: String| (message, false);
    let pattern = rule.names.iter().find_map(|names| names.captures(&workload.name));
    let stars = pattern.ok_or_else(|| refused("no pattern of names matches".to_owned()))?;
    let subject = Subject {
        name: &workload.name,
        id: workload.container.as_deref(),
        image: workload.image.as_deref(),
        stars: &stars,
        labels: &workload.labels,
    };
    let name = rule
        .name
        .render(&subject)
        .ok_or_else(|| refused("the container lacks a label that its name is made of".to_owned()))?;
    if !is_name(&name) {
        return Err(refused(format!(
            "'{}' cannot be a name: letters, digits, '-', '_' and '.', at most 253 of them",
            shown(&name)
        )));
    }
    let labels = labels(rule, workload, &subject).map_err(refused)?;
    let (inside, outside): (Vec<&Link>, Vec<&Link>) = workload.links.iter().partition(|link| {
        rule.interfaces
            .iter()
            .any(|pattern| pattern.matches(&link.interface))
    });
    if let Some(link) = outside.first() {
        let patterns: Vec<String> = rule.interfaces.iter().map(ToString::to_string).collect();
        return Err(refused(format!(
            "interface {} is not among interfaces = [{}]: what it sends before the workload is found would pass; rename it \
             or add it there",
            link.interface,
            patterns.join(", ")
        )));
    }
    if inside.is_empty() {
        return Err(("no interface of the node leads to it".to_owned(), true));
    }
    let mut links = inside;
    links.sort_by_key(|link| link.inner);
    let mut found = Vec::new();
    for (n, link) in links.iter().enumerate() {
        let addresses = addresses(rule, workload, link, links.len() == 1).map_err(refused)?;
        if addresses.is_empty() {
            continue;
        }
        let name = match n {
            0 => name.clone(),
            _ => format!("{name}.if{}", link.inner),
        };
        found.push(Found {
            name,
            namespace: rule.namespace.clone(),
            interface: link.interface.clone(),
            ifindex: link.ifindex,
            addresses,
            labels: labels.clone(),
            kind: rule.kind.to_owned(),
            origin: workload.origin.clone(),
            id: workload
                .container
                .clone()
                .unwrap_or_else(|| workload.name.clone()),
            netns: workload.netns,
        });
    }
    if found.is_empty() {
        let of = if rule.addresses.is_empty() {
            ""
        } else {
            " in `addresses` of its [[discover]]"
        };
        return Err((format!("it has no address{of} yet"), true));
    }
    Ok(found)
}

fn labels(rule: &Rule, workload: &Workload, subject: &Subject<'_>) -> Result<Labels, String> {
    let mut all = rule.namespace_labels.clone();
    let own = workload
        .labels
        .iter()
        .filter(|(key, _)| rule.container_labels.iter().any(|keys| keys.matches(key)));
    for (n, (key, value)) in own.enumerate() {
        if n >= MAX_LABELS {
            return Err(format!(
                "it has more than {MAX_LABELS} labels that container_labels matches"
            ));
        }
        check_key(key)?;
        check_value(value)?;
        // The source is fixed, so a container cannot give itself labels of another source.
        all.push(Label {
            source: "container".to_owned(),
            key: key.clone(),
            value: value.clone(),
        });
    }
    for label in &rule.labels {
        let Some(value) = label.value.render(subject) else {
            continue;
        };
        check_value(&value).map_err(|problem| format!("label {}: {problem}", label.key))?;
        all.push(Label {
            source: label.source.clone(),
            key: label.key.clone(),
            value,
        });
    }
    Ok(Labels::new(all))
}

/// Returns the addresses of the endpoint at one link.
fn addresses(rule: &Rule, workload: &Workload, link: &Link, is_only: bool) -> Result<Vec<IpAddr>, String> {
    let reported = match &workload.addresses {
        None => link.addresses.clone(),
        Some(reported) if is_only => reported.clone(),
        Some(reported) => reported
            .iter()
            .copied()
            .filter(|address| link.addresses.contains(address))
            .collect(),
    };
    own_addresses(rule, &reported)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{InterfacePattern, LabelTemplate, Template, Wildcard};

    fn rule(kind: &'static str, name: &str) -> Rule {
        let is_container = kind != "netns";
        Rule {
            kind,
            names: vec![Wildcard::parse("*").unwrap()],
            interfaces: vec![InterfacePattern::parse("veth*").unwrap()],
            name: Template::parse(name, 1, is_container).unwrap(),
            namespace: "default".to_owned(),
            namespace_labels: Vec::new(),
            labels: vec![LabelTemplate {
                source: "k8s".to_owned(),
                key: "app".to_owned(),
                value: Template::parse("{name}", 1, is_container).unwrap(),
            }],
            container_labels: vec![Wildcard::parse("*").unwrap()],
            addresses: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
            unknown: Unknown::Deny,
        }
    }

    fn workload(name: &str, ifindex: u32, addresses: &[&str]) -> Workload {
        Workload {
            name: name.to_owned(),
            netns: u64::from(ifindex),
            links: vec![Link {
                interface: format!("veth{ifindex}"),
                ifindex,
                inner: 2,
                addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            }],
            ..Workload::default()
        }
    }

    fn run(rules: &[Rule], workloads: &[Workload], before: &Outcome) -> Outcome {
        find(rules, workloads, &[], &Taken::default(), &before.found, 100)
    }

    fn message(outcome: &Outcome) -> String {
        let all: Vec<&str> = outcome.problems.iter().map(|p| p.message.as_str()).collect();
        all.join("\n")
    }

    #[test]
    fn a_namespace_becomes_an_endpoint_with_mapped_labels() {
        let web = workload(
            "web",
            7,
            &["10.0.0.2", "fe80::1", "192.0.2.1", "::ffff:10.0.0.3", "fd00::2"],
        );
        let outcome = run(&[rule("netns", "{name}-x")], &[web], &Outcome::default());
        let found = &outcome.found["default/web-x"];
        assert_eq!(found.labels.to_string(), "k8s:app=web");
        assert_eq!((found.interface.as_str(), found.ifindex), ("veth7", 7));
        let addresses: Vec<String> = found.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.0.0.2", "10.0.0.3", "fd00::2"]);
        assert_eq!(found.source(), "netns:web");
        assert!(outcome.problems.is_empty());
    }

    #[test]
    fn a_running_workload_keeps_its_address_against_a_later_one() {
        let rules = [rule("netns", "{name}")];
        let old = workload("zzz", 7, &["10.0.0.2"]);
        let before = run(&rules, std::slice::from_ref(&old), &Outcome::default());
        let claimant = workload("aaa", 8, &["10.0.0.3", "10.0.0.2"]);
        let outcome = run(&rules, &[claimant.clone(), old], &before);
        assert_eq!(outcome.found, before.found);
        assert!(
            message(&outcome)
                .contains("10.0.0.2 belongs to default/zzz (netns:zzz) already; veth8 stays denied")
        );
        // Once the holder is gone, the address is free.
        let outcome = run(&rules, &[claimant], &outcome);
        assert_eq!(outcome.found.keys().collect::<Vec<_>>(), ["default/aaa"]);
    }

    #[test]
    fn a_running_workload_cannot_add_the_address_of_another_one() {
        let rules = [rule("netns", "{name}")];
        let victim = workload("b", 7, &["10.0.0.2"]);
        let honest = [workload("a", 8, &["10.0.0.3"]), victim.clone()];
        let before = run(&rules, &honest, &Outcome::default());
        let outcome = run(
            &rules,
            &[workload("a", 8, &["10.0.0.3", "10.0.0.2"]), victim],
            &before,
        );
        assert_eq!(outcome.found.keys().collect::<Vec<_>>(), ["default/b"]);
        assert!(message(&outcome).contains("10.0.0.2 belongs to default/b already; veth8 stays denied"));
    }

    #[test]
    fn another_run_under_the_same_name_does_not_hold_the_address() {
        let rules = [rule("netns", "{name}")];
        let before = run(&rules, &[workload("web", 7, &["10.0.0.2"])], &Outcome::default());
        let again = run(&rules, &[workload("web", 9, &["10.0.0.2"])], &before);
        assert!(!again.found["default/web"].is_same_run(&before.found["default/web"]));
    }

    #[test]
    fn the_configuration_wins_against_workloads() {
        let taken = Taken {
            names: ["default/a".to_owned()].into(),
            interfaces: [("veth2".to_owned(), "endpoint x".to_owned())].into(),
            addresses: [("10.0.0.3".parse().unwrap(), "the node".to_owned())].into(),
            networks: vec![("10.9.0.0/16".parse().unwrap(), "peer db".to_owned())],
        };
        let workloads = [
            workload("a", 1, &["10.0.0.1"]),
            workload("b", 2, &["10.0.0.2"]),
            workload("c", 3, &["10.0.0.3"]),
            workload("d", 4, &["10.9.0.4"]),
            workload("e", 5, &["10.0.0.5"]),
        ];
        let rules = [rule("netns", "{name}")];
        let free = run(&rules, &workloads, &Outcome::default());
        assert_eq!(free.found.len(), 5);
        // Even if they were there before.
        let outcome = find(&rules, &workloads, &[], &taken, &free.found, 100);
        assert_eq!(outcome.found.keys().collect::<Vec<_>>(), ["default/e"]);
        for part in [
            "another default/a",
            "veth2 belongs to endpoint x",
            "the node",
            "peer db",
        ] {
            assert!(message(&outcome).contains(part), "{part}: {outcome:?}");
        }
    }

    #[test]
    fn labels_of_a_container_have_the_source_container_whatever_their_key() {
        let mut web = workload("web", 7, &["10.0.0.2"]);
        web.container = Some("0123456789abcdef".to_owned());
        web.labels = [("k8s/app", "db"), ("host", "")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        let rules = [rule("docker", "{name}")];
        let outcome = run(&rules, &[web.clone()], &Outcome::default());
        let found = &outcome.found["default/web"];
        assert_eq!(
            found.labels.to_string(),
            "container:host,container:k8s/app=db,k8s:app=web"
        );
        assert_eq!(found.source(), "docker:0123456789ab");
        for (key, value) in [
            ("reserved:host", ""),
            ("app", "x,k8s:role=admin"),
            ("a=b", "c"),
            ("", "x"),
        ] {
            web.labels = [(key.to_owned(), value.to_owned())].into();
            let outcome = run(&rules, &[web.clone()], &Outcome::default());
            assert!(outcome.found.is_empty(), "{key}={value}");
            assert!(message(&outcome).contains("of a label"), "{outcome:?}");
        }
        web.labels = (0..=MAX_LABELS)
            .map(|n| (format!("l{n}"), String::new()))
            .collect();
        let outcome = run(&rules, &[web], &Outcome::default());
        assert!(message(&outcome).contains("more than 64 labels"));
    }

    #[test]
    fn a_workload_without_interface_or_address_is_pending() {
        let rules = [rule("netns", "{name}")];
        let mut bare = workload("bare", 7, &["fe80::1", "127.0.0.1"]);
        let pending = |workload: &Workload| {
            let outcome = run(&rules, std::slice::from_ref(workload), &Outcome::default());
            outcome.problems.iter().all(|p| p.is_pending) && outcome.problems.len() == 1
        };
        assert!(pending(&bare));
        bare.links.clear();
        assert!(pending(&bare));
        bare.links = workload("x", 1, &["10.0.0.1"]).links;
        bare.links[0].interface = "eth9".to_owned();
        let outcome = run(&rules, &[bare], &Outcome::default());
        assert!(message(&outcome).contains("interfaces = [veth*]"));
    }

    #[test]
    fn each_further_interface_is_an_endpoint_of_its_own() {
        let mut web = workload("web", 7, &["10.0.0.2"]);
        web.links.push(Link {
            interface: "veth3".to_owned(),
            ifindex: 3,
            inner: 5,
            addresses: vec!["10.1.0.2".parse().unwrap()],
        });
        web.addresses = Some(vec!["10.1.0.2".parse().unwrap(), "10.0.0.2".parse().unwrap()]);
        let outcome = run(&[rule("docker", "{name}")], &[web], &Outcome::default());
        let found: Vec<(&str, &str)> = outcome
            .found
            .iter()
            .map(|(name, found)| (name.as_str(), found.interface.as_str()))
            .collect();
        assert_eq!(found, [("default/web", "veth7"), ("default/web.if5", "veth3")]);
        assert_eq!(outcome.found["default/web"].addresses.len(), 1);
    }

    #[test]
    fn the_number_of_endpoints_is_limited_and_those_that_run_stay() {
        let rules = [rule("netns", "{name}")];
        let of = |n: u32| workload(&format!("w{n}"), n, &[&format!("10.0.{}.{}", n / 256, n % 256)]);
        let some: Vec<_> = (50..60).map(of).collect();
        let before = find(&rules, &some, &[], &Taken::default(), &BTreeMap::new(), 10);
        let all: Vec<_> = (1..=10_000).map(of).collect();
        let outcome = find(&rules, &all, &[], &Taken::default(), &before.found, 10);
        assert_eq!(outcome.found, before.found);
        assert!(message(&outcome).contains("raise [limits] discovered"));
    }

    fn veth(ifindex: u32, addresses: &[&str]) -> Interface {
        Interface {
            link: workload("", ifindex, addresses).links.remove(0),
            namespace: 3,
        }
    }

    #[test]
    fn an_interface_without_a_known_workload_is_an_init_endpoint_if_its_section_says_so() {
        let mut rules = [rule("netns", "{name}")];
        let both = [
            veth(7, &["10.0.0.2", "192.0.2.1", "fe80::1", "fd00::2"]),
            veth(8, &["192.0.2.2"]),
        ];
        let found = |rules: &[Rule], workloads: &[Workload], before: &Outcome| {
            find(rules, workloads, &both, &Taken::default(), &before.found, 100)
        };
        assert!(found(&rules, &[], &Outcome::default()).found.is_empty());
        rules[0].unknown = Unknown::Init;
        let initial = found(&rules, &[], &Outcome::default());
        // Addresses outside of `addresses` do not count.
        assert_eq!(initial.found.keys().collect::<Vec<_>>(), ["default/init-veth7"]);
        let endpoint = &initial.found["default/init-veth7"];
        assert_eq!(endpoint.labels.to_string(), "reserved:init");
        assert_eq!(endpoint.source(), "init:veth7");
        assert_eq!(endpoint.addresses.len(), 2);
        // With the labels, the interface and its address belong to the workload.
        let labelled = found(&rules, &[workload("web", 7, &["10.0.0.2"])], &initial);
        assert_eq!(labelled.found.keys().collect::<Vec<_>>(), ["default/web"]);
        // A workload that cannot be an endpoint stays denied: its labels are known.
        let mut refused = workload("web", 7, &["10.0.0.2"]);
        refused.problem = Some("x".to_owned());
        assert!(found(&rules, &[refused], &initial).found.is_empty());
        // Without prefixes the addresses of any peer could be taken.
        rules[0].addresses.clear();
        assert!(found(&rules, &[], &initial).found.is_empty());
    }

    #[test]
    fn no_interface_is_an_init_endpoint_while_the_place_of_a_refused_workload_is_not_known() {
        let mut rules = [rule("netns", "{name}")];
        rules[0].unknown = Unknown::Init;
        let interfaces = [veth(7, &["10.0.0.2"])];
        let found = |workloads: &[Workload], before: &BTreeMap<String, Found>| {
            find(&rules, workloads, &interfaces, &Taken::default(), before, 100)
        };
        let before = found(&[], &BTreeMap::new()).found;
        assert_eq!(before.len(), 1);
        let mut refused = Workload {
            name: "db".to_owned(),
            problem: Some("x".to_owned()),
            ..Workload::default()
        };
        let outcome = found(std::slice::from_ref(&refused), &before);
        assert!(outcome.found.is_empty());
        assert!(message(&outcome).contains("no interface has reserved:init"));
        // Its network namespace is found, and no interface leads there yet.
        refused.netns = 4;
        assert_eq!(found(&[refused], &before).found, before);
    }

    #[test]
    fn a_section_that_denies_unknown_workloads_wins_against_those_behind_it() {
        let mut rules = [rule("netns", "{name}"), rule("docker", "{name}")];
        rules[1].unknown = Unknown::Init;
        let found = |rules: &[Rule]| {
            let interfaces = [veth(7, &["10.0.0.2"])];
            let none = BTreeMap::new();
            find(rules, &[], &interfaces, &Taken::default(), &none, 100)
                .found
                .len()
        };
        assert_eq!(found(&rules), 0);
        rules.swap(0, 1);
        assert_eq!(found(&rules), 1);
        // The addresses of a section decide only whether it is that one or a later one with `init`.
        rules[0].addresses = vec!["192.0.2.0/24".parse().unwrap()];
        assert_eq!(found(&rules), 0);
        rules[1].unknown = Unknown::Init;
        assert_eq!(found(&rules), 1);
        // Sections for other interfaces do not count.
        rules[0].interfaces = vec![InterfacePattern::parse("tap*").unwrap()];
        rules[0].unknown = Unknown::Deny;
        assert_eq!(found(&rules), 1);
    }

    #[test]
    fn a_workload_gets_its_address_from_an_init_endpoint_that_has_it() {
        let mut rules = [rule("netns", "{name}")];
        rules[0].unknown = Unknown::Init;
        let taken = Taken::default();
        let claimant = [veth(7, &["10.0.0.2"])];
        let before = find(&rules, &[], &claimant, &taken, &BTreeMap::new(), 100);
        assert_eq!(before.found.len(), 1);
        let owner = [workload("web", 8, &["10.0.0.2"])];
        let outcome = find(&rules, &owner, &claimant, &taken, &before.found, 100);
        assert_eq!(outcome.found.keys().collect::<Vec<_>>(), ["default/web"]);
        assert!(message(&outcome).contains("10.0.0.2 belongs to default/web"));
        // Between two of them, the first one keeps it, and the configuration wins against both.
        let two = [veth(6, &["10.0.0.2"]), veth(7, &["10.0.0.2"])];
        let outcome = find(&rules, &[], &two, &taken, &before.found, 100);
        assert_eq!(outcome.found, before.found);
        let taken = Taken {
            addresses: [("10.0.0.2".parse().unwrap(), "the node".to_owned())].into(),
            ..Taken::default()
        };
        assert!(
            find(&rules, &[], &two, &taken, &before.found, 100)
                .found
                .is_empty()
        );
    }

    fn any_workload() -> impl Strategy<Value = Workload> {
        (0..3_usize, "[ab.:]{1,3}", 1..5_u32, 1..5_u8).prop_map(|(rule, name, ifindex, address)| Workload {
            rule,
            ..workload(&name, ifindex, &[&format!("10.0.0.{address}")])
        })
    }

    proptest! {
        /// Whatever sources report: no name, interface or address belongs to two endpoints, and an endpoint that is
        /// still reported unchanged is never lost to another one.
        #[test]
        fn nothing_belongs_to_two_endpoints(
            first in prop::collection::vec(any_workload(), 0..6),
            second in prop::collection::vec(any_workload(), 0..6),
        ) {
            let rules = [rule("netns", "{name}"), rule("docker", "x{1}")];
            let before = run(&rules, &first, &Outcome::default());
            let mut all = second;
            all.extend(first);
            let outcome = run(&rules, &all, &before);
            let interfaces: BTreeSet<&str> = outcome.found.values().map(|f| f.interface.as_str()).collect();
            let addresses: BTreeSet<IpAddr> = outcome.found.values().flat_map(|f| f.addresses.clone()).collect();
            prop_assert_eq!(interfaces.len(), outcome.found.len());
            prop_assert_eq!(addresses.len(), outcome.found.len());
            for (name, found) in &before.found {
                let now = outcome.found.get(name);
                prop_assert!(now.is_some_and(|now| now.ifindex == found.ifindex), "{name}");
            }
        }
    }
}
