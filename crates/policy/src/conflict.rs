//! Rules about the same peer and port that ask for traffic to be read in ways that exclude each other.

use std::collections::{HashMap, HashSet};

use palisade_abi::Direction;

use crate::{
    compile::{problem, section_rules, sections_of},
    diagnostic::Diagnostic,
    rule::{L4Protocol, Location, Peer, Peers, Policy, PortSpec, Ports, Spec, Subject as SpecSubject},
    select::Meaning,
    table::Reading,
};

/// Ports as they are written, one protocol of them, and a peer (`None`: everybody): what L7 rules are merged by.
type Spot<'a> = (&'a PortSpec, L4Protocol, Option<&'a Peer>);

/// Finds what [`Reading::conflict`] finds, over several specs.
#[derive(Default)]
pub(crate) struct ConflictFinder<'a> {
    seen: HashMap<Spot<'a>, Vec<(Reading, String, &'a Location)>>,
    denied: HashSet<Spot<'a>>,
    errors: Vec<Diagnostic>,
}

impl<'a> ConflictFinder<'a> {
    pub(crate) fn add(&mut self, policy: &str, spec: &'a Spec, direction: Direction) {
        for section in sections_of(direction) {
            for rule in section_rules(spec, section) {
                let Ports::OneOf(entries) = &rule.ports else {
                    continue;
                };
                if !section.denies() && entries.iter().all(|entry| entry.l7.is_none()) {
                    continue;
                }
                let peers: Vec<Option<&Peer>> = match &rule.peers {
                    Peers::Nobody => continue,
                    Peers::Any => vec![None],
                    // Everybody is one peer, in whatever way it is written.
                    Peers::OneOf(peers) => peers
                        .iter()
                        .map(|peer| (Meaning::of(peer, &[]) != Meaning::Everybody).then_some(peer))
                        .collect(),
                };
                for entry in entries {
                    let reading = Reading::of(&entry.l7, false);
                    if reading.is_none() && !section.denies() {
                        continue;
                    }
                    for port in &entry.ports {
                        for protocol in each_protocol(port) {
                            for peer in &peers {
                                let key = (port, protocol, *peer);
                                match &reading {
                                    None => {
                                        self.denied.insert(key);
                                    }
                                    Some(reading) => self.check(key, reading, policy, &entry.location),
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    fn check(&mut self, key: Spot<'a>, reading: &Reading, policy: &str, location: &'a Location) {
        // Denied before it is read: nothing to disagree about.
        if self.denied.contains(&key) {
            return;
        }
        let seen = self.seen.entry(key).or_default();
        for (other, other_policy, other_location) in seen.iter() {
            if let Some(what) = reading.conflict(other) {
                self.errors.push(problem(
                    location.clone(),
                    format!(
                        "policy {policy} and policy {other_policy} ({other_location}) disagree about the same peer and \
                         port: {what}; give one of them other ports or peers"
                    ),
                ));
                return;
            }
        }
        if !seen.iter().any(|(other, _, _)| other == reading) {
            seen.push((reading.clone(), policy.to_owned(), location));
        }
    }

    pub(crate) fn finish(self) -> Result<(), Vec<Diagnostic>> {
        if self.errors.is_empty() {
            Ok(())
        } else {
            Err(self.errors)
        }
    }
}

/// The protocols of a port, so that the same port of `ANY` and of `TCP` is recognised.
fn each_protocol(port: &PortSpec) -> Vec<L4Protocol> {
    match port {
        PortSpec::Range { protocol, .. } | PortSpec::Named { protocol, .. } => match protocol {
            L4Protocol::Any => vec![L4Protocol::Tcp, L4Protocol::Udp, L4Protocol::Sctp],
            one => vec![*one],
        },
        PortSpec::Icmp { .. } => vec![L4Protocol::Other(0)],
    }
}

/// Conflicts between policies that are about the same subjects by the way they are written, whether or not anybody
/// here is such a subject. (The compiler finds those between all policies of each endpoint.)
pub fn conflicts(policies: &[Policy]) -> Vec<Diagnostic> {
    let mut errors = Vec::new();
    let mut subjects: Vec<&SpecSubject> = Vec::new();
    for spec in policies.iter().flat_map(|policy| &policy.specs) {
        if !subjects.contains(&&spec.subject) {
            subjects.push(&spec.subject);
        }
    }
    for subject in subjects {
        for direction in palisade_abi::DIRECTIONS {
            let mut finder = ConflictFinder::default();
            for policy in policies {
                let name = policy.qualified_name();
                for spec in policy.specs.iter().filter(|spec| spec.subject == *subject) {
                    finder.add(&name, spec, direction);
                }
            }
            if let Err(mut found) = finder.finish() {
                errors.append(&mut found);
            }
        }
    }
    errors
}
