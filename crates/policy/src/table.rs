//! One subject's rules to its table: precedence resolved, so that the first key found is the verdict.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use palisade_abi::{
    CLASS_ANY, Class, Decision, Direction, Identity, Inspector, MatchKind, PolicyEntry, entry_flags, identity,
};
use palisade_model::{
    learned_identities::SelectorNumber,
    rule::{FqdnPattern, L7, L7Rules, Listener, TlsContext},
    snapshot::{Alternative, Matcher, RuleSet, TableKey},
};

use crate::{
    classes::PortSet,
    compile::{LearnedIdentity, LearnedRows},
    select::ResolvedSelector,
};

/// What is read on a port, ready to be merged.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct L7Policy {
    /// What the traffic is read as.
    pub(crate) kind: Inspector,
    /// Of several kinds the one with the lower number wins.
    priority: u8,
    /// What passes.
    matchers: Vec<Matcher>,
    /// `serverNames` beside rules of another protocol.
    server_names: Vec<FqdnPattern>,
    terminating_tls: Option<TlsContext>,
    originating_tls: Option<TlsContext>,
    listener: Option<Listener>,
}

impl L7Policy {
    /// What an entry of toPorts asks for. Whether requests that no rule matches pass is not decided here but by the
    /// default of the endpoint and direction ([`merge`]): a policy without default deny takes nothing away where
    /// everything is allowed by default, and its rules restrict where anything else denies by default.
    pub(crate) fn of(l7: &L7) -> Option<Self> {
        if l7.is_none() {
            return None;
        }
        let names = || l7.server_names.iter().cloned().map(Matcher::ServerName);
        let (kind, mut matchers): (Inspector, Vec<Matcher>) = match &l7.rules {
            L7Rules::Http(rules) => (
                Inspector::Http,
                rules.iter().cloned().map(Matcher::Http).collect(),
            ),
            L7Rules::Kafka(rules) => (
                Inspector::Kafka,
                rules.iter().cloned().map(Matcher::Kafka).collect(),
            ),
            L7Rules::Dns(rules) => (Inspector::Dns, rules.iter().cloned().map(Matcher::Dns).collect()),
            L7Rules::Generic { parser, rules } => (
                Inspector::Listener,
                rules
                    .iter()
                    .map(|rule| Matcher::Generic {
                        parser: parser.clone(),
                        rule: rule.clone(),
                    })
                    .collect(),
            ),
            L7Rules::None => (Inspector::Tls, names().collect()),
        };
        let alone = l7.rules == L7Rules::None;
        if matchers.is_empty() {
            matchers.push(Matcher::Everything);
        }
        let mut priority = match kind {
            Inspector::Http => 101,
            Inspector::Kafka => 106,
            Inspector::Tls | Inspector::TlsTerminate => 116,
            Inspector::Dns => 121,
            Inspector::None | Inspector::Listener => 111,
        };
        let mut kind = kind;
        if let Some(listener) = &l7.listener {
            kind = Inspector::Listener;
            priority = if listener.priority == 0 {
                126
            } else {
                listener.priority
            };
        }
        Some(Self {
            kind,
            priority,
            matchers,
            server_names: if alone {
                Vec::new()
            } else {
                l7.server_names.clone()
            },
            terminating_tls: l7.terminating_tls.clone(),
            originating_tls: l7.originating_tls.clone(),
            listener: l7.listener.clone(),
        })
    }

    /// What of a rule's reading cannot be combined with another's on the same peer and port, in words.
    pub(crate) fn conflict(&self, other: &Self) -> Option<String> {
        let name = |l7: &Self| palisade_model::snapshot::inspector_name(l7.kind as u8);
        // Server names can stand beside rules about what is inside, if that can be seen.
        let names = |l7: &Self| {
            let names = l7
                .matchers
                .iter()
                .any(|matcher| matches!(matcher, Matcher::ServerName(_)));
            names || !l7.server_names.is_empty()
        };
        let can_join = |outer: &Self, inner: &Self| {
            outer.kind == Inspector::Tls
                && matches!(inner.kind, Inspector::Http | Inspector::Kafka)
                && (outer.terminating_tls.is_some()
                    || inner.terminating_tls.is_some()
                    || !(names(outer) || names(inner)))
        };
        if self.kind != other.kind && !can_join(self, other) && !can_join(other, self) {
            return Some(format!("{} and {} cannot both be read", name(self), name(other)));
        }
        if let (Some(a), Some(b)) = (&self.listener, &other.listener)
            && self.priority == other.priority
            && (&a.kind, &a.resource, &a.name) != (&b.kind, &b.resource, &b.name)
        {
            return Some(format!(
                "listeners {} and {} have the same priority",
                a.name, b.name
            ));
        }
        if let (Matcher::Generic { parser: a, .. }, Matcher::Generic { parser: b, .. }) =
            (self.matchers.first()?, other.matchers.first()?)
            && a != b
        {
            return Some(format!("{a} and {b} cannot both be read"));
        }
        let differ = |a: &Option<TlsContext>, b: &Option<TlsContext>| a.is_some() && b.is_some() && a != b;
        if differ(&self.terminating_tls, &other.terminating_tls) {
            return Some("two different terminatingTLS".into());
        }
        if differ(&self.originating_tls, &other.originating_tls) {
            return Some("two different originatingTLS".into());
        }
        None
    }
}

/// Whom a rule is about, looked up.
#[derive(Clone, Debug)]
pub(crate) enum Members {
    /// Everybody, known or not.
    Everybody,
    /// Whom one of its peers means.
    Of(Vec<Member>),
}

impl Members {
    /// Those of the members that are among some identities.
    pub(crate) fn among(&self, identities: &Arc<BTreeSet<Identity>>) -> Self {
        Self::Of(match self {
            Self::Everybody => vec![Member {
                peer: Member::EVERYBODY,
                members: Arc::clone(identities),
                learned: Learned::Base,
            }],
            Self::Of(peers) => peers
                .iter()
                .map(|peer| Member {
                    peer: peer.peer,
                    members: Arc::new(peer.members.intersection(identities).copied().collect()),
                    learned: Learned::Base,
                })
                .filter(|peer| !peer.members.is_empty())
                .collect(),
        })
    }

    /// The members without some identities. Of everybody these cannot be taken away, see [`TableRule::except`].
    pub(crate) fn without(&self, identities: &BTreeSet<Identity>) -> Self {
        match self {
            Self::Everybody => Self::Everybody,
            Self::Of(peers) => Self::Of(
                peers
                    .iter()
                    .map(|peer| Member {
                        members: Arc::new(peer.members.difference(identities).copied().collect()),
                        ..peer.clone()
                    })
                    .collect(),
            ),
        }
    }
}

/// A peer of a rule, looked up.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    /// Names the peer, so that equal peers can be recognised.
    pub(crate) peer: u32,
    /// The ordinary identities that it means.
    pub(crate) members: Arc<BTreeSet<Identity>>,
    /// Which identities of learned addresses it means.
    pub(crate) learned: Learned,
}

/// Which identities of learned addresses a peer means.
#[derive(Clone, Debug)]
pub(crate) enum Learned {
    /// Those whose base it means.
    Base,
    /// Those of a selector, and those whose base it means.
    Selector(SelectorNumber),
    /// Those that meet the requirements of a label selector; they may ask for names.
    Labels(Arc<ResolvedSelector>),
}

impl Member {
    pub(crate) fn means(&self, identity: &LearnedIdentity) -> bool {
        match &self.learned {
            Learned::Base => self.members.contains(&identity.base),
            Learned::Selector(selector) => {
                identity.selectors.binary_search(selector).is_ok() || self.members.contains(&identity.base)
            }
            Learned::Labels(resolved) => resolved.matches(&identity.labels),
        }
    }

    /// Who of everybody has a port of some name: stands for everybody where peers are compared.
    pub(crate) const EVERYBODY: u32 = u32::MAX - 1;

    /// The same for all that a subject can meet.
    fn name_learned(&self, rows: &LearnedRows, mut name: impl FnMut(Identity)) {
        let mut by_base = || {
            for (base, identities) in &rows.by_base {
                if self.members.contains(base) {
                    identities.iter().for_each(|identity| name(*identity));
                }
            }
        };
        match &self.learned {
            Learned::Base => by_base(),
            Learned::Selector(selector) => {
                by_base();
                let identities = rows.by_selector.get(selector).into_iter().flatten();
                identities.for_each(|identity| name(*identity));
            }
            Learned::Labels(resolved) if !resolved.asks_for(|key| rows.texts.contains(key)) => by_base(),
            Learned::Labels(resolved) => {
                for (number, identity) in &rows.identities {
                    if resolved.matches(&identity.labels) {
                        name(*number);
                    }
                }
            }
        }
    }
}

/// A rule (of one direction) with everything looked up.
#[derive(Clone, Debug)]
pub(crate) struct TableRule {
    pub(crate) id: u32,
    pub(crate) denies: bool,
    /// The policy is in audit mode.
    pub(crate) audit: bool,
    pub(crate) auth_required: bool,
    pub(crate) members: Members,
    /// Of everybody, those that the rule is not about: peers with a port of the name that the rule asks for under
    /// another number, for which there is a rule of its own.
    pub(crate) except: Option<Arc<BTreeSet<Identity>>>,
    pub(crate) ports: Vec<TablePorts>,
}

impl TableRule {
    /// Whether the rule is not about an identity although it is about everybody.
    pub(crate) fn excepts(&self, identity: Identity) -> bool {
        self.except
            .as_ref()
            .is_some_and(|except| except.contains(&identity))
    }
}

/// Some ports of a rule.
#[derive(Clone, Debug)]
pub(crate) struct TablePorts {
    pub(crate) set: PortSet,
    /// `None`: whatever the class.
    pub(crate) classes: Option<Arc<[Class]>>,
    pub(crate) l7: Option<Arc<L7Policy>>,
}

/// What holds where no rule matches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct DefaultVerdict {
    pub(crate) allow: bool,
    /// Nothing is enforced in this direction.
    pub(crate) unenforced: bool,
    /// The id that names the cause.
    pub(crate) rule: u32,
    /// All policies that cause the denial are in audit mode.
    pub(crate) audit: bool,
}

/// Gives a number to a rule set.
pub(crate) trait RuleSets {
    fn number(&mut self, set: RuleSet) -> u32;
}

/// The entries of one direction.
pub(crate) struct Builder<'a> {
    pub(crate) direction: Direction,
    pub(crate) rules: &'a [&'a TableRule],
    /// Towards whom entries are made, beside those towards everybody; `None`: towards whom a rule names.
    pub(crate) rows: Option<&'a BTreeSet<Identity>>,
    /// The learned identities that the subject can meet; none where it cannot (ingress).
    pub(crate) learned: Option<&'a LearnedRows>,
    pub(crate) default_verdict: DefaultVerdict,
    /// Whether denials pass and are reported, whoever causes them.
    pub(crate) audit: bool,
    pub(crate) rulesets: &'a mut dyn RuleSets,
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
    pub(crate) fn build(mut self, into: &mut Vec<(TableKey, PolicyEntry)>) {
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
