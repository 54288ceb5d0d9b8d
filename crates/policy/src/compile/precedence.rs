//! One subject's rules to its table: precedence resolved, so that the first key found is the verdict.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use palisade_abi::{
    CLASS_ANY, Class, Decision, Direction, Identity, Inspector, MatchKind, PolicyEntry, entry_flags, identity,
};
use palisade_model::snapshot::{Alternative, Matcher, RuleSet, TableKey};

use super::{
    l7_policy::L7Policy,
    learned_index::LearnedRows,
    numbers::RuleSetIds,
    table_rule::{DefaultVerdict, Member, Members, TablePorts, TableRule},
};
use crate::classes::PortSet;

/// The entries of one direction.
pub(super) struct Builder<'a> {
    pub(super) direction: Direction,
    pub(super) rules: &'a [&'a TableRule],
    /// Towards whom entries are made, beside those towards everybody; `None`: towards whom a rule names.
    pub(super) rows: Option<&'a BTreeSet<Identity>>,
    /// The learned identities that the subject can meet; none where it cannot (ingress).
    pub(super) learned: Option<&'a LearnedRows>,
    pub(super) default_verdict: DefaultVerdict,
    /// Whether denials pass and are reported, whoever causes them.
    pub(super) audit: bool,
    pub(super) rulesets: &'a mut RuleSetIds,
}

/// One way a packet can match: a rule and one of its port sets.
type Hit<'a> = (&'a TableRule, &'a TablePorts);

/// The verdicts towards everybody or towards one group of identities, by class.
#[derive(Default)]
struct Row<'a> {
    every_class: Vec<Hit<'a>>,
    by_class: BTreeMap<Class, Vec<Hit<'a>>>,
}

impl<'a> Row<'a> {
    fn add(&mut self, rule: &'a TableRule) {
        for ports in &rule.ports {
            match &ports.classes {
                None => self.every_class.push((rule, ports)),
                Some(classes) => {
                    for class in classes.iter() {
                        self.by_class.entry(*class).or_default().push((rule, ports));
                    }
                }
            }
        }
    }

    fn at(&self, class: Class) -> impl Iterator<Item = &Hit<'a>> {
        self.every_class
            .iter()
            .chain(self.by_class.get(&class).into_iter().flatten())
    }
}

impl Builder<'_> {
    pub(super) fn build(mut self, into: &mut Vec<(TableKey, PolicyEntry)>) {
        let direction = self.direction as u8;
        let mut put = |identity, class, entry| {
            into.push((
                TableKey {
                    direction,
                    identity,
                    class,
                },
                entry,
            ));
        };
        let rules = self.rules;

        // Towards everybody.
        let mut everybody = Row::default();
        for rule in rules
            .iter()
            .filter(|rule| matches!(rule.members, Members::Everybody))
        {
            everybody.add(rule);
        }
        let default = self.decide(&everybody.every_class.to_vec());
        put(identity::ANY, CLASS_ANY, default);
        let mut wild: BTreeMap<Class, PolicyEntry> = BTreeMap::new();
        // Classes whose verdict towards everybody a plain allow towards somebody would not settle.
        let mut delicate: Vec<Class> = Vec::new();
        for class in everybody.by_class.keys().copied() {
            let hits: Vec<Hit<'_>> = everybody.at(class).copied().collect();
            let entry = self.decide(&hits);
            if entry.decision != Decision::Allow as u8 {
                delicate.push(class);
            }
            wild.insert(class, entry);
            if entry != default {
                put(identity::ANY, class, entry);
            }
        }

        // Towards those that rules name; those that the same rules name have the same verdicts.
        let mut named: HashMap<Identity, Vec<u32>> = HashMap::new();
        for (number, rule) in rules.iter().enumerate() {
            let Members::Of(peers) = &rule.members else {
                continue;
            };
            if rule.ports.is_empty() {
                continue;
            }
            let mut name = |identity: Identity| {
                let list = named.entry(identity).or_default();
                if list.last() != Some(&(number as u32)) {
                    list.push(number as u32);
                }
            };
            for peer in peers {
                match (self.rows, self.learned) {
                    (None, learned) => {
                        peer.members.iter().for_each(|identity| name(*identity));
                        if let Some(learned) = learned {
                            peer.name_learned(learned, &mut name);
                        }
                    }
                    (Some(rows), learned) => {
                        for identity in rows {
                            let learned = learned.and_then(|learned| learned.identities.get(identity));
                            if peer.members.contains(identity)
                                || learned.is_some_and(|learned| peer.means(learned))
                            {
                                name(*identity);
                            }
                        }
                    }
                }
            }
        }
        let mut groups: HashMap<Vec<u32>, Vec<Identity>> = HashMap::new();
        for (identity, list) in named {
            groups.entry(list).or_default().push(identity);
        }
        let mut groups: Vec<(Vec<u32>, Vec<Identity>)> = groups.into_iter().collect();
        groups.sort_unstable();

        let with_exceptions = everybody
            .by_class
            .values()
            .flatten()
            .any(|(rule, _)| rule.except.is_some());
        for (list, identities) in groups {
            // Peers of one group are named by the same rules, so the same rules except them.
            let Some(first) = identities.first().copied() else {
                continue;
            };
            let counts = |hit: &&Hit<'_>| !with_exceptions || !hit.0.excepts(first);
            let mut row = Row::default();
            for number in &list {
                row.add(rules[*number as usize]);
            }
            let mut entries: Vec<(Class, PolicyEntry)> = Vec::new();
            let any_class = if row.every_class.is_empty() {
                None
            } else {
                let hits: Vec<Hit<'_>> = everybody
                    .every_class
                    .iter()
                    .filter(counts)
                    .chain(&row.every_class)
                    .copied()
                    .collect();
                let entry = self.decide(&hits);
                entries.push((CLASS_ANY, entry));
                Some(entry)
            };
            let everywhere = |class: &Class| row.by_class.contains_key(class);
            let mut classes: Vec<Class> = row.by_class.keys().copied().collect();
            match any_class.map(|entry| Decision::from_u8(entry.decision)) {
                // Without an entry for every class, the classes that only rules about everybody name fall through.
                None => {}
                // Final, unless a denial in audit mode hides another.
                Some(Decision::DenyExplicit)
                    if any_class.is_some_and(|entry| entry.flags & entry_flags::AUDIT == 0) => {}
                Some(Decision::Allow) => classes.extend(delicate.iter().filter(|class| !everywhere(class))),
                Some(_) => classes.extend(everybody.by_class.keys().filter(|class| !everywhere(class))),
            }
            if with_exceptions {
                let excepted = everybody
                    .by_class
                    .iter()
                    .filter(|(_, hits)| hits.iter().any(|(rule, _)| rule.excepts(first)));
                classes.extend(excepted.map(|(class, _)| *class));
                classes.sort_unstable();
                classes.dedup();
            }
            for class in classes {
                let hits: Vec<Hit<'_>> = everybody
                    .at(class)
                    .filter(counts)
                    .chain(row.at(class))
                    .copied()
                    .collect();
                let entry = self.decide(&hits);
                let default_verdict = any_class.or_else(|| wild.get(&class).copied()).unwrap_or(default);
                if entry != default_verdict {
                    entries.push((class, entry));
                }
            }
            for identity in identities {
                for (class, entry) in &entries {
                    put(identity, *class, *entry);
                }
            }
        }
    }

    /// The verdict on a packet that exactly these rules match.
    fn decide(&mut self, hits: &[Hit<'_>]) -> PolicyEntry {
        let denials = || hits.iter().filter(|(rule, _)| rule.denies);
        if let Some(hit) = narrowest(denials().filter(|(rule, _)| !rule.audit)) {
            return self.entry(Decision::DenyExplicit, hit, false);
        }
        let rest = self.decide_without_denials(hits);
        let Some(hit) = narrowest(denials()) else {
            return rest;
        };
        // Only policies in audit mode deny it. What it would come to without them decides what happens.
        let would_pass = rest.flags & entry_flags::AUDIT != 0 || rest.decision == Decision::Allow as u8;
        if would_pass {
            self.entry(Decision::DenyExplicit, hit, true)
        } else {
            rest
        }
    }

    fn decide_without_denials(&mut self, hits: &[Hit<'_>]) -> PolicyEntry {
        let allows = || hits.iter().filter(|(rule, _)| !rule.denies);
        if let Some(hit) = narrowest(allows().filter(|(rule, _)| rule.auth_required && !rule.audit)) {
            return self.entry(Decision::AuthRequired, hit, false);
        }
        if let Some(hit) = narrowest(allows().filter(|(rule, _)| rule.auth_required)) {
            return self.entry(Decision::AuthRequired, hit, true);
        }
        let best = allows()
            .filter_map(|(_, ports)| ports.l7.as_deref())
            .min_by_key(|l7| l7.priority);
        if let Some(best) = best {
            let same =
                |(_, ports): &&Hit<'_>| ports.l7.as_deref().is_some_and(|l7| l7.priority == best.priority);
            if let Some(hit) = narrowest(allows().filter(same)) {
                // What the application rules do not allow comes to what no rule allows, unless it is only policies
                // in audit mode that have it read at all.
                let only_audited = self.would_pass_unread(hits);
                let audit = only_audited || (self.default_verdict.audit && !self.default_verdict.allow);
                let (inspector, set) = merge(hits, best, self.default_verdict, only_audited);
                let mut entry = self.entry(Decision::Inspect, hit, audit);
                entry.inspector = inspector as u8;
                entry.ruleset = self.rulesets.number(set);
                return entry;
            }
        }
        if let Some(hit) = narrowest(allows()) {
            return self.entry(Decision::Allow, hit, false);
        }
        let DefaultVerdict {
            allow,
            unenforced,
            rule,
            audit,
        } = self.default_verdict;
        let mut flags = 0;
        if unenforced {
            flags |= entry_flags::UNENFORCED;
        }
        if !allow && (audit || self.audit) {
            flags |= entry_flags::AUDIT;
        }
        PolicyEntry {
            decision: if allow { Decision::Allow } else { Decision::Deny } as u8,
            flags,
            inspector: Inspector::None as u8,
            match_kind: MatchKind::None as u8,
            rule,
            ruleset: 0,
        }
    }

    /// Whether, without the policies in audit mode, nothing would be read and everything allowed.
    fn would_pass_unread(&self, hits: &[Hit<'_>]) -> bool {
        let enforced = || hits.iter().filter(|(rule, _)| !rule.denies && !rule.audit);
        enforced().all(|(_, ports)| ports.l7.is_none())
            && (self.default_verdict.allow || enforced().next().is_some())
    }

    fn entry(&self, decision: Decision, (rule, ports): &Hit<'_>, audit: bool) -> PolicyEntry {
        let may_deny = decision != Decision::Allow;
        let everybody = matches!(rule.members, Members::Everybody);
        let match_kind = match (everybody, ports.set) {
            (true, PortSet::All) => MatchKind::All,
            (true, PortSet::Protocol(_)) => MatchKind::ProtoOnly,
            (true, PortSet::Range { .. }) => MatchKind::L4Only,
            (false, PortSet::All) => MatchKind::L3Only,
            (false, PortSet::Protocol(_)) => MatchKind::L3Proto,
            (false, PortSet::Range { .. }) => MatchKind::L3L4,
        };
        PolicyEntry {
            decision: decision as u8,
            flags: if may_deny && (audit || self.audit) {
                entry_flags::AUDIT
            } else {
                0
            },
            inspector: Inspector::None as u8,
            match_kind: match_kind as u8,
            rule: rule.id,
            ruleset: 0,
        }
    }
}

/// The hit with the narrowest ports; of those one that names its peers; of those the first.
fn narrowest<'h, 'a: 'h>(hits: impl Iterator<Item = &'h Hit<'a>>) -> Option<&'h Hit<'a>> {
    let mut best: Option<(&Hit<'a>, (u8, bool))> = None;
    for hit in hits {
        let rank = (hit.1.set.rank(), matches!(hit.0.members, Members::Of(_)));
        if best.is_none_or(|(_, found)| rank > found) {
            best = Some((hit, rank));
        }
    }
    best.map(|(hit, _)| hit)
}

/// The application rules of an entry: those of every matching rule; a plain allow lets everything pass.
/// `audited`: what they do not allow passes all the same, and is reported.
fn merge(
    hits: &[Hit<'_>],
    best: &L7Policy,
    default_verdict: DefaultVerdict,
    audited: bool,
) -> (Inspector, RuleSet) {
    let mut set = RuleSet {
        reads: best.kind as u8,
        ..RuleSet::default()
    };
    let mut add = |rule: u32, matcher: &Matcher| {
        let known = set
            .alternatives
            .iter()
            .any(|alternative| alternative.rule == rule && alternative.matcher == *matcher);
        if !known {
            set.alternatives.push(Alternative {
                rule,
                matcher: matcher.clone(),
            });
        }
    };
    let allows = || hits.iter().filter(|(rule, _)| !rule.denies);
    for (rule, ports) in allows() {
        match &ports.l7 {
            Some(l7) => {
                for matcher in &l7.matchers {
                    add(rule.id, matcher);
                }
            }
            // Server names of a peer and port hold for everything that is allowed to the same peer and port:
            // "if any rule requires SNI, all traffic to that remote and port requires TLS". But a policy in audit
            // mode takes away nothing that another one allows.
            None if best.kind == Inspector::Tls
                && named_elsewhere(hits, rule, ports, audited || rule.audit) => {}
            None => add(rule.id, &Matcher::Everything),
        }
    }
    if default_verdict.allow {
        add(default_verdict.rule, &Matcher::Everything);
    }
    // What lets everything pass is named only where nothing else does.
    set.alternatives
        .sort_by_key(|alternative| alternative.matcher == Matcher::Everything);
    let l7s = || allows().filter_map(|(_, ports)| ports.l7.as_deref());
    for l7 in l7s().filter(|l7| l7.priority == best.priority) {
        for name in &l7.server_names {
            if !set.server_names.contains(name) {
                set.server_names.push(name.clone());
            }
        }
        set.listener = set.listener.or_else(|| l7.listener.clone());
    }
    for l7 in l7s() {
        set.terminating_tls = set.terminating_tls.or_else(|| l7.terminating_tls.clone());
        set.originating_tls = set.originating_tls.or_else(|| l7.originating_tls.clone());
    }
    let inspector = if set.terminating_tls.is_some() || set.originating_tls.is_some() {
        Inspector::TlsTerminate
    } else {
        best.kind
    };
    (inspector, set)
}

/// Whether another hit asks for server names on the same ports of one of the same peers. `by_audited`: also one of a
/// policy in audit mode.
fn named_elsewhere(hits: &[Hit<'_>], rule: &TableRule, ports: &TablePorts, by_audited: bool) -> bool {
    hits.iter().any(|(other, other_ports)| {
        let names = other_ports
            .l7
            .as_deref()
            .is_some_and(|l7| l7.kind == Inspector::Tls);
        names
            && (by_audited || !other.audit)
            && other_ports.set == ports.set
            && match (&other.members, &rule.members) {
                (Members::Everybody, Members::Everybody) => true,
                (Members::Of(a), Members::Of(b)) => {
                    a.iter().any(|one| b.iter().any(|other| other.peer == one.peer))
                }
                (Members::Everybody, Members::Of(some)) | (Members::Of(some), Members::Everybody) => {
                    some.iter().any(|member| member.peer == Member::EVERYBODY)
                }
            }
    })
}
