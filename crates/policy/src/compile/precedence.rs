//! Precedence: one policy table entry from all rules that match a packet.
//!
//! The order is that of Cilium 1.19. Of the rules that match a packet:
//!
//! 0. A failsafe port of the node wins over everything but a plain allow ([`Builder::decide`]). The programs apply it at NICs only; entries
//!    of [`palisade_abi::INSIDE`], made without failsafe ports, decide elsewhere.
//! 1. A deny wins over every allow: `DenyExplicit` ([`Builder::decide`]).
//! 2. An allow that requires authentication wins over other allows: `AuthRequired` ([`Builder::decide_allows`]).
//! 3. An allow with application rules wins over plain allows: `Inspect` ([`Builder::inspect`]). One protocol is
//!    inspected, the one with the lowest priority number. The application rules of all matching allows are merged
//!    ([`merge`]); a plain allow among them adds "every request passes".
//! 4. UDP to a port at which a rule intercepts TLS is denied unless an allow names the UDP port: `DenyQuic`
//!    ([`Builder::decide_by_policy`]). Cilium has no such step.
//! 5. Any other allow: `Allow`.
//! 6. No rule: the default verdict of the direction ([`Builder::default_entry`]).
//!
//! If several rules lead to the same decision, the entry names the rule with the narrowest ports, then a rule that
//! names its peers, then the first rule.
//!
//! Audit mode of single policies does not exist in Cilium. A policy in audit mode must not drop what the enforced
//! policies allow, so an entry of steps 1 to 3 that only such policies cause can have the `AUDIT` flag: the packet
//! passes and is reported.
//!
//! The programs look up four keys and take the first that exists: (identity, class), (identity, any class), (any
//! identity, class), (any identity, any class). An entry therefore hides all entries that follow it in this order. So
//! each entry results from the rules of its own key and of all keys that follow. An entry is left out if the programs
//! would find an equal entry without it.

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

/// Input for the entries of one direction of a subject.
pub(super) struct Builder<'a> {
    pub(super) direction: Direction,
    /// Added to the direction in keys: 0 or [`palisade_abi::INSIDE`].
    pub(super) layer: u8,
    pub(super) rules: &'a [&'a TableRule],
    /// Identities to make entries for, in addition to the entries for any identity. `None`: all identities that rules
    /// name.
    pub(super) rows: Option<&'a BTreeSet<Identity>>,
    /// Learned identities that the subject can meet; `None` for ingress.
    pub(super) learned: Option<&'a LearnedRows>,
    pub(super) default_verdict: DefaultVerdict,
    /// Whether the subject is in audit mode, or every endpoint is (`[policy] audit`). Every packet that would be denied
    /// then passes and is reported.
    pub(super) audit: bool,
    /// [`palisade_model::inventory::Options::clear_text_http2`].
    pub(super) clear_text_http2: bool,
    pub(super) rulesets: &'a mut RuleSetIds,
}

/// A rule that matches a packet, and the ports of the rule by which it matches.
type Hit<'a> = (&'a TableRule, &'a TablePorts);

/// The rules for any identity, or for one group of identities, by class.
#[derive(Default)]
struct Row<'a> {
    every_class: Vec<Hit<'a>>,
    by_class: BTreeMap<Class, Vec<Hit<'a>>>,
}

impl<'a> Row<'a> {
    fn add(&mut self, rule: &'a TableRule) {
        for ports in &rule.ports {
            let Some(classes) = &ports.classes else {
                self.every_class.push((rule, ports));
                continue;
            };
            for class in classes.iter() {
                self.by_class.entry(*class).or_default().push((rule, ports));
            }
        }
    }

    fn at(&self, class: Class) -> impl Iterator<Item = &Hit<'a>> {
        self.every_class
            .iter()
            .chain(self.by_class.get(&class).into_iter().flatten())
    }
}

/// The rules and entries for any identity.
struct Wildcard<'a> {
    row: Row<'a>,
    /// Entry for any class.
    every_class: PolicyEntry,
    /// Entries by class. Entries that equal `every_class` are not written to the table.
    by_class: BTreeMap<Class, PolicyEntry>,
    /// Whether a rule for any peer has exceptions.
    has_exceptions: bool,
}

impl Wildcard<'_> {
    /// Returns the classes for which an identity can need an entry of its own. `row`: the rules that name the identity;
    /// `every_class`: the entry of the identity for any class, if there is one.
    fn classes_to_decide(
        &self,
        row: &Row<'_>,
        every_class: Option<PolicyEntry>,
        identity: Identity,
    ) -> Vec<Class> {
        let is_new = |class: &&Class| !row.by_class.contains_key(class);
        let mut classes: Vec<Class> = row.by_class.keys().copied().collect();
        match every_class.map(|entry| (Decision::from_u8(entry.decision), entry.flags)) {
            // Without an entry for any class, the lookup continues with the entries for any identity.
            None => {}
            // Only a failsafe port can take precedence over an enforced denial.
            Some((Decision::DenyExplicit, flags)) if flags & entry_flags::AUDIT == 0 => {
                let decided = self.by_class.iter();
                let failsafe = decided.filter(|(_, entry)| entry.flags & entry_flags::FAILSAFE != 0);
                classes.extend(failsafe.map(|(class, _)| class).filter(is_new));
            }
            // The identity is allowed for any class. Classes that only the entries for any identity name need no entry
            // if those entries allow them. An entry of a failsafe port can hide a denial.
            Some((Decision::Allow, _)) => {
                let decided = self.by_class.iter();
                let restricted = decided.filter(|(_, entry)| {
                    entry.decision != Decision::Allow as u8 || entry.flags & entry_flags::FAILSAFE != 0
                });
                classes.extend(restricted.map(|(class, _)| class).filter(is_new));
            }
            Some(_) => classes.extend(self.by_class.keys().filter(is_new)),
        }
        if self.has_exceptions {
            let rules = self.row.by_class.iter();
            let excepted = rules.filter(|(_, hits)| hits.iter().any(|(rule, _)| rule.excepts(identity)));
            classes.extend(excepted.map(|(class, _)| *class));
            classes.sort_unstable();
            classes.dedup();
        }
        classes
    }
}

impl<'a> Builder<'a> {
    /// Appends the entries of the direction to `into`.
    pub(super) fn build(mut self, into: &mut Vec<(TableKey, PolicyEntry)>) {
        let direction = self.direction as u8 | self.layer;
        let mut put = |identity, class, entry| {
            let key = TableKey {
                direction,
                identity,
                class,
            };
            into.push((key, entry));
        };
        let wildcard = self.wildcard();
        put(identity::ANY, CLASS_ANY, wildcard.every_class);
        for (class, entry) in &wildcard.by_class {
            if *entry != wildcard.every_class {
                put(identity::ANY, *class, *entry);
            }
        }
        for (rules, identities) in self.groups() {
            // The same rules name all identities of a group, and the exceptions of rules for any peer contain all of
            // them or none. So all identities of the group have the entries of the first.
            let Some(first) = identities.first().copied() else {
                continue;
            };
            let entries = self.identity_row(&wildcard, &rules, first);
            for identity in identities {
                for (class, entry) in &entries {
                    put(identity, *class, *entry);
                }
            }
        }
    }

    /// Returns the rules and entries for any identity.
    fn wildcard(&mut self) -> Wildcard<'a> {
        let mut row = Row::default();
        let rules = self.rules.iter();
        for rule in rules.filter(|rule| matches!(rule.members, Members::Any)) {
            row.add(rule);
        }
        let every_class = self.decide(&row.every_class.clone());
        let mut by_class = BTreeMap::new();
        for class in row.by_class.keys().copied() {
            let hits: Vec<Hit<'_>> = row.at(class).copied().collect();
            by_class.insert(class, self.decide(&hits));
        }
        let mut hits = row.by_class.values().flatten();
        Wildcard {
            every_class,
            by_class,
            has_exceptions: hits.any(|(rule, _)| rule.except.is_some()),
            row,
        }
    }

    /// Returns the identities that rules name, grouped by the rules that name them (indices in `rules`). The identities
    /// of a group have the same entries.
    fn groups(&self) -> Vec<(Vec<u32>, Vec<Identity>)> {
        let mut named: HashMap<Identity, Vec<u32>> = HashMap::new();
        for (number, rule) in self.rules.iter().enumerate() {
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
            peers
                .iter()
                .for_each(|peer| self.name_identities(peer, &mut name));
        }
        let mut groups: HashMap<Vec<u32>, Vec<Identity>> = HashMap::new();
        for (identity, list) in named {
            groups.entry(list).or_default().push(identity);
        }
        let mut groups: Vec<(Vec<u32>, Vec<Identity>)> = groups.into_iter().collect();
        groups.sort_unstable();
        groups
    }

    /// Calls `name` with each identity of `peer` that needs entries, possibly several times with the same identity.
    fn name_identities(&self, peer: &Member, mut name: impl FnMut(Identity)) {
        let Some(rows) = self.rows else {
            peer.members.iter().for_each(|identity| name(*identity));
            if let Some(learned) = self.learned {
                peer.name_learned(learned, &mut name);
            }
            return;
        };
        for identity in rows {
            let learned = self.learned.and_then(|learned| learned.identities.get(identity));
            if peer.members.contains(identity) || learned.is_some_and(|learned| peer.means(learned)) {
                name(*identity);
            }
        }
    }

    /// Returns the entries of one identity. `rules`: indices of the rules that name the identity.
    fn identity_row(
        &mut self,
        wildcard: &Wildcard<'a>,
        rules: &[u32],
        identity: Identity,
    ) -> Vec<(Class, PolicyEntry)> {
        let counts = |hit: &&Hit<'_>| !wildcard.has_exceptions || !hit.0.excepts(identity);
        let mut row = Row::default();
        for number in rules {
            row.add(self.rules[*number as usize]);
        }
        let every_class = (!row.every_class.is_empty()).then(|| {
            let wild = wildcard.row.every_class.iter().filter(counts);
            let hits: Vec<Hit<'_>> = wild.chain(&row.every_class).copied().collect();
            self.decide(&hits)
        });
        let mut entries: Vec<(Class, PolicyEntry)> = Vec::new();
        entries.extend(every_class.map(|entry| (CLASS_ANY, entry)));
        for class in wildcard.classes_to_decide(&row, every_class, identity) {
            let wild = wildcard.row.at(class).filter(counts);
            let hits: Vec<Hit<'_>> = wild.chain(row.at(class)).copied().collect();
            let entry = self.decide(&hits);
            let found_without = every_class
                .or_else(|| wildcard.by_class.get(&class).copied())
                .unwrap_or(wildcard.every_class);
            if entry != found_without {
                entries.push((class, entry));
            }
        }
        entries
    }

    /// Returns the entry for packets that the rules in `hits`, and no others, match.
    fn decide(&mut self, hits: &[Hit<'_>]) -> PolicyEntry {
        let Some(hit) = narrowest(hits.iter().filter(|(rule, _)| rule.failsafe)) else {
            return self.decide_by_policy(hits);
        };
        let others: Vec<Hit<'_>> = hits.iter().filter(|(rule, _)| !rule.failsafe).copied().collect();
        let by_policy = self.decide_by_policy(&others);
        if by_policy.decision == Decision::Allow as u8 {
            return by_policy;
        }
        let mut entry = self.entry(Decision::Allow, hit, false);
        entry.flags |= entry_flags::FAILSAFE;
        entry
    }

    /// Returns the entry that [`Self::decide`] returns without failsafe ports.
    fn decide_by_policy(&mut self, hits: &[Hit<'_>]) -> PolicyEntry {
        if !hits.iter().any(|(_, ports)| ports.quic) {
            return self.decide_without_quic(hits);
        }
        let (quic, others): (Vec<Hit<'_>>, Vec<Hit<'_>>) =
            hits.iter().copied().partition(|(_, ports)| ports.quic);
        let entry = self.decide_without_quic(&others);
        let enforced = narrowest(quic.iter().filter(|(rule, _)| !rule.audit));
        let Some(hit) = enforced.or_else(|| narrowest(quic.iter())) else {
            return entry;
        };
        // A rule with this UDP port lifts the denial, and so does the one by which the node may always reach its workloads.
        // A rule for all ports does not, since it does not mean QUIC.
        let lifts = |(rule, ports): &Hit<'_>| {
            let names_port = ports.l7.is_none() && matches!(ports.set, PortSet::Range { .. });
            !rule.denies && (names_port || rule.members.is_localhost())
        };
        let is_audited = entry.flags & entry_flags::AUDIT != 0;
        let is_denied = match Decision::from_u8(entry.decision) {
            Decision::Allow => !others.iter().any(lifts),
            Decision::Deny => true,
            Decision::Inspect => entry.inspector == Inspector::TlsTerminate as u8,
            // A policy in audit mode must not open what another policy denies.
            Decision::DenyExplicit | Decision::AuthRequired => {
                is_audited && !self.audit && !others.iter().any(lifts)
            }
            Decision::DenyQuic => false,
        };
        // Where the default verdict is allow, application rules restrict nothing.
        if !is_denied || self.default_verdict.allow {
            return entry;
        }
        // Without the policies in audit mode, the packet passes if only these intercept TLS or deny by default.
        let passes = is_audited || entry.decision == Decision::Allow as u8;
        let audit = self.default_verdict.audit || (hit.0.audit && passes);
        self.entry(Decision::DenyQuic, hit, audit)
    }

    /// Returns the entry that [`Self::decide_by_policy`] returns if no rule intercepts TLS at the TCP port of this number.
    fn decide_without_quic(&mut self, hits: &[Hit<'_>]) -> PolicyEntry {
        let denials = || hits.iter().filter(|(rule, _)| rule.denies);
        if let Some(hit) = narrowest(denials().filter(|(rule, _)| !rule.audit)) {
            return self.entry(Decision::DenyExplicit, hit, false);
        }
        let rest = self.decide_allows(hits);
        let Some(hit) = narrowest(denials()) else {
            return rest;
        };
        // Only policies in audit mode deny. A packet that passes without these policies passes with them too, and is
        // reported.
        let would_pass = rest.flags & entry_flags::AUDIT != 0 || rest.decision == Decision::Allow as u8;
        if would_pass {
            self.entry(Decision::DenyExplicit, hit, true)
        } else {
            rest
        }
    }

    /// Returns the entry that [`Self::decide_without_quic`] would return if `hits` had no rules that deny.
    fn decide_allows(&mut self, hits: &[Hit<'_>]) -> PolicyEntry {
        let allows = || hits.iter().filter(|(rule, _)| !rule.denies);
        let authenticating = || allows().filter(|(rule, _)| rule.auth_required);
        if let Some(hit) = narrowest(authenticating().filter(|(rule, _)| !rule.audit)) {
            return self.entry(Decision::AuthRequired, hit, false);
        }
        if let Some(hit) = narrowest(authenticating()) {
            return self.entry(Decision::AuthRequired, hit, true);
        }
        if let Some(entry) = self.inspect(hits) {
            return entry;
        }
        match narrowest(allows()) {
            Some(hit) => self.entry(Decision::Allow, hit, false),
            None => self.default_entry(),
        }
    }

    /// Returns an `Inspect` entry if an allow has application rules.
    fn inspect(&mut self, hits: &[Hit<'_>]) -> Option<PolicyEntry> {
        let allows = || hits.iter().filter(|(rule, _)| !rule.denies);
        let best = allows()
            .filter_map(|(_, ports)| ports.l7.as_deref())
            .min_by_key(|l7| l7.priority)?;
        let hit = narrowest(allows().filter(|(_, ports)| {
            let l7 = ports.l7.as_deref();
            l7.is_some_and(|l7| l7.priority == best.priority)
        }))?;
        // A request that no application rule allows gets the default verdict. If the packet would pass uninspected
        // without the policies in audit mode, such a request passes and is reported.
        let only_audited = self.would_pass_uninspected(hits);
        let audit = only_audited || (self.default_verdict.audit && !self.default_verdict.allow);
        let (inspector, set) = merge(
            hits,
            best,
            self.default_verdict,
            only_audited,
            self.clear_text_http2,
        );
        let mut entry = self.entry(Decision::Inspect, hit, audit);
        entry.inspector = inspector as u8;
        entry.ruleset = self.rulesets.number(set);
        Some(entry)
    }

    /// Returns the entry for packets that no rule matches.
    fn default_entry(&self) -> PolicyEntry {
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

    /// Returns whether, without the policies in audit mode, the packet passes and is not inspected.
    fn would_pass_uninspected(&self, hits: &[Hit<'_>]) -> bool {
        let enforced = || hits.iter().filter(|(rule, _)| !rule.denies && !rule.audit);
        enforced().all(|(_, ports)| ports.l7.is_none())
            && (self.default_verdict.allow || enforced().next().is_some())
    }

    fn entry(&self, decision: Decision, (rule, ports): &Hit<'_>, audit: bool) -> PolicyEntry {
        let may_deny = decision != Decision::Allow;
        let any = matches!(rule.members, Members::Any);
        let match_kind = match (any, ports.set) {
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

/// Returns the hit with the narrowest ports. Among equally narrow hits, a rule that names its peers comes first, then
/// the order of the rules decides.
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

/// Merges the application rules of all matching allows. A plain allow adds an alternative that matches every request.
/// `audited`: whether requests that no alternative matches pass and are reported. `clear_text_http2`: see
/// [`palisade_model::inventory::Options`].
fn merge(
    hits: &[Hit<'_>],
    best: &L7Policy,
    default_verdict: DefaultVerdict,
    audited: bool,
    clear_text_http2: bool,
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
            // As in Cilium, server names for a peer and port apply to all traffic of that peer and port, so a plain
            // allow does not lift them. But `serverNames` of a policy in audit mode must not restrict what another
            // policy allows.
            None if best.kind == Inspector::Tls
                && named_elsewhere(hits, rule, ports, audited || rule.audit) => {}
            None => add(rule.id, &Matcher::Everything),
        }
    }
    if default_verdict.allow {
        add(default_verdict.rule, &Matcher::Everything);
    }
    // The first matching alternative names the rule, so alternatives that match every request come last.
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
    // Without a TLS context, the proxy reads and sends plain text.
    let edits =
        |alternative: &Alternative| matches!(&alternative.matcher, Matcher::Http(rule) if rule.needs_proxy());
    let needs_proxy =
        best.kind == Inspector::Http && (clear_text_http2 || set.alternatives.iter().any(edits));
    let inspector = if set.terminating_tls.is_some() || set.originating_tls.is_some() || needs_proxy {
        Inspector::TlsTerminate
    } else {
        best.kind
    };
    (inspector, set)
}

/// Returns whether another hit requires server names for the same ports and at least one common peer. `by_audited`:
/// whether rules of policies in audit mode count as well.
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
                (Members::Any, Members::Any) => true,
                (Members::Of(a), Members::Of(b)) => {
                    a.iter().any(|one| b.iter().any(|other| other.peer == one.peer))
                }
                (Members::Any, Members::Of(some)) | (Members::Of(some), Members::Any) => {
                    some.iter().any(|member| member.peer == Member::ANY)
                }
            }
    })
}
