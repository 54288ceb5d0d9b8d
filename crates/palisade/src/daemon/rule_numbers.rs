//! Numbers of removed rules for new rules. A number must not name a new rule where it was recorded for the old one: so it is
//! given to a new rule only when no policy table, no conntrack entry and no flow record has it any more, and its counter is
//! zero. Numbers are reused once most of those with a counter were used; until then each rule has its own.
//!
//! Rule sets that no policy table has any more are forgotten by the same rule: when no conntrack entry has their number any
//! more, so that no packet can be inspected under them. Their numbers are hashes of their contents, and are in no flow record.
//!
//! The sweeper, which reads all conntrack entries anyway, collects their numbers and those of the flow ring when they are
//! wanted. Start at [`RuleNumbers::policies_changed`].

use std::{
    collections::{BTreeSet, HashSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use palisade_datapath::{Counters, MapError};
use palisade_policy::compile::Compiler;
use tracing::{error, info};

/// Time for which a number must be unused before the conntrack entries are read. Events and records that have it must be in
/// the flow ring by then, those of connections that an inspector gives up included.
const UNUSED_FOR: Duration = Duration::from_secs(30);

/// Unused rule sets that are kept. Fewer are not worth the work: a set has some KiB, and one that comes back soon is still
/// prepared for the inspectors.
const KEPT_RULE_SETS: usize = 64;

/// Numbers of conntrack entries and flow records, from the sweeper to the control thread.
#[derive(Debug, Default)]
pub(super) struct RecordedRules {
    is_wanted: AtomicBool,
    found: Mutex<Option<Recorded>>,
}

/// Numbers that conntrack entries and flow records have.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    /// Rules of entries and records.
    pub rules: HashSet<u32>,
    /// Rule sets of entries.
    pub rule_sets: HashSet<u32>,
}

#[derive(Debug)]
struct Recorded {
    /// Time before the first entry was read.
    since: Instant,
    numbers: Numbers,
}

impl RecordedRules {
    /// Returns whether the control thread wants the numbers.
    pub(super) fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Relaxed)
    }

    /// Passes on the numbers of all entries and records. `since`: time before the first entry was read.
    pub(super) fn report(&self, since: Instant, numbers: Numbers) {
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(Recorded { since, numbers });
    }

    fn take(&self) -> Option<Recorded> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Unused numbers.
#[derive(Debug)]
struct Unused {
    numbers: BTreeSet<u32>,
    since: Instant,
}

impl Unused {
    /// Notes which numbers are unused now: those that were not before, or were used meanwhile, wait with the next ones.
    fn note(known: &mut Option<Self>, unused: BTreeSet<u32>) {
        match known {
            Some(known) => known.numbers.retain(|number| unused.contains(number)),
            None => {
                *known = Some(Self {
                    numbers: unused,
                    since: Instant::now(),
                });
            }
        }
        *known = known.take().filter(|unused| !unused.numbers.is_empty());
    }

    /// Returns the numbers that nothing has any more, if they have waited for long enough. The others begin to wait again.
    fn due(known: &mut Option<Self>, since: Instant, recorded: &HashSet<u32>) -> BTreeSet<u32> {
        let is_due = |unused: &mut Self| since.saturating_duration_since(unused.since) >= UNUSED_FOR;
        let mut numbers = known
            .take_if(is_due)
            .map(|unused| unused.numbers)
            .unwrap_or_default();
        numbers.retain(|number| !recorded.contains(number));
        numbers
    }
}

/// What the compiler has been told to give up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Freed {
    /// Whether there are numbers for new rules.
    pub rules: bool,
    /// Whether rule sets were forgotten.
    pub rule_sets: bool,
}

/// Finds rule numbers that can be reused, and rule sets that can be forgotten.
#[derive(Debug)]
pub(super) struct RuleNumbers {
    recorded: Arc<RecordedRules>,
    /// Number from which on there are no counters.
    limit: u32,
    /// Numbers that have been unused without interruption.
    unused: Option<Unused>,
    /// Rule sets that have been unused without interruption.
    unused_sets: Option<Unused>,
}

impl RuleNumbers {
    pub(super) fn new(limit: u32) -> Self {
        Self {
            recorded: Arc::default(),
            limit,
            unused: None,
            unused_sets: None,
        }
    }

    /// Returns where the sweeper reports numbers.
    pub(super) const fn recorded(&self) -> &Arc<RecordedRules> {
        &self.recorded
    }

    /// Notes which numbers are unused now. Call it after each change of the policies that is in force completely.
    pub(super) fn policies_changed(&mut self, compiler: &Compiler) {
        let is_scarce = compiler.last_rule() >= self.limit / 4 * 3;
        let unused = if is_scarce {
            compiler.unused_rules()
        } else {
            BTreeSet::new()
        };
        let mut sets = compiler.unused_rule_sets();
        if sets.len() <= KEPT_RULE_SETS {
            sets.clear();
        }
        Unused::note(&mut self.unused, unused);
        Unused::note(&mut self.unused_sets, sets);
        let is_wanted = self.unused.is_some() || self.unused_sets.is_some();
        self.recorded.is_wanted.store(is_wanted, Ordering::Relaxed);
    }

    /// Returns the rule numbers and the rule sets that nothing has any more; `None` if that is not known.
    fn due(&mut self) -> Option<(BTreeSet<u32>, BTreeSet<u32>)> {
        let Recorded { since, numbers } = self.recorded.take()?;
        let rules = Unused::due(&mut self.unused, since, &numbers.rules);
        let sets = Unused::due(&mut self.unused_sets, since, &numbers.rule_sets);
        Some((rules, sets))
    }

    /// Lets the compiler reuse the numbers that nothing has any more, and forget such rule sets. Call it after each sweep.
    pub(super) fn swept(&mut self, compiler: &mut Compiler, counters: &Counters<'_>) -> Freed {
        let Some((numbers, sets)) = self.due() else {
            return Freed::default();
        };
        let freed = Freed {
            rules: !numbers.is_empty() && clear(counters, &numbers),
            rule_sets: !sets.is_empty(),
        };
        if freed.rules {
            info!(
                numbers = numbers.len(),
                "numbers of removed rules can be used for new ones"
            );
            compiler.reuse_rules(&numbers);
        }
        if freed.rule_sets {
            info!(
                rule_sets = sets.len(),
                "rule sets that are not used any more are forgotten"
            );
            compiler.forget_rule_sets(&sets);
        }
        self.policies_changed(compiler);
        freed
    }
}

fn clear(counters: &Counters<'_>, numbers: &BTreeSet<u32>) -> bool {
    let cleared: Result<(), MapError> = counters.clear_rules(numbers);
    if let Err(error) = &cleared {
        error!(%error, "the counters of removed rules cannot be set to zero");
    }
    cleared.is_ok()
}

#[cfg(test)]
mod tests {
    use palisade_model::{
        inventory::{Endpoint, Inventory, NamedPorts},
        labels::Labels,
    };
    use palisade_policy::{compile::Changes, parse::parse};

    use super::*;

    fn put(compiler: &mut Compiler, name: &str) {
        put_rule(compiler, name, "");
    }

    fn put_rule(compiler: &mut Compiler, name: &str, ports: &str) {
        let text = format!(
            "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
             nodeSelector: {{}}\n  ingress:\n  - fromEntities: [world]\n{ports}"
        );
        let parsed = parse("a.yaml", &text);
        let content = palisade_policy::compile::FileContent {
            policies: parsed.policies,
            cidr_groups: parsed.cidr_groups,
        };
        let files = [("a.yaml".to_owned(), Some(content))].into();
        let inventory = None;
        compiler.update(Changes { inventory, files }).unwrap();
    }

    #[test]
    fn numbers_wait_until_they_are_scarce_unused_for_long_and_nowhere_recorded() {
        let mut compiler = Compiler::default();
        compiler.limit_rules(16);
        let mut numbers = RuleNumbers::new(16);
        for n in 0..11 {
            put(&mut compiler, &format!("p{n}"));
            numbers.policies_changed(&compiler);
        }
        assert!(!numbers.recorded.is_wanted(), "numbers are not scarce yet");
        for n in 11..16 {
            put(&mut compiler, &format!("p{n}"));
            numbers.policies_changed(&compiler);
        }
        assert!(numbers.recorded.is_wanted());
        let since = numbers.unused.as_ref().unwrap().since;
        // A number that is used again for a moment waits anew: only what was unused all the time counts.
        put(&mut compiler, "p3");
        numbers.policies_changed(&compiler);
        put(&mut compiler, "p15");
        numbers.policies_changed(&compiler);
        let unused = numbers.unused.as_ref().unwrap();
        assert!(!unused.numbers.contains(&4) && unused.numbers.contains(&5));
        assert_eq!(unused.since, since);
        // The entries were read too early.
        numbers
            .recorded
            .report(since + UNUSED_FOR / 2, Numbers::default());
        assert_eq!(numbers.due(), Some((BTreeSet::new(), BTreeSet::new())));
        // Two numbers are still in an entry or a record.
        let recorded = Numbers {
            rules: [5, 7].into(),
            rule_sets: [6].into(),
        };
        numbers.recorded.report(since + UNUSED_FOR, recorded);
        let (due, _) = numbers.due().unwrap();
        assert!(
            due.contains(&6) && !due.contains(&5) && !due.contains(&7) && !due.contains(&4),
            "{due:?}"
        );
        compiler.reuse_rules(&due);
        put(&mut compiler, "new");
        let new = compiler
            .snapshot()
            .rules
            .iter()
            .find(|(_, rule)| rule.to_string().contains("new"));
        assert_eq!(new.map(|(number, _)| *number), due.first().copied());
        assert_eq!(numbers.due(), None);
    }

    #[test]
    fn rule_sets_are_forgotten_once_many_are_unused_for_long_and_in_no_conntrack_entry() {
        let node = Endpoint {
            id: 1,
            name: "node".to_owned(),
            namespace: String::new(),
            labels: Labels::reserved("host"),
            named_ports: NamedPorts::default(),
            addresses: Vec::new(),
            audit: false,
        };
        let inventory = Inventory {
            endpoints: vec![node],
            ..Inventory::default()
        };
        let mut compiler = Compiler::default();
        let files = std::collections::BTreeMap::new();
        compiler
            .update(Changes {
                inventory: Some(inventory),
                files,
            })
            .unwrap();
        let mut numbers = RuleNumbers::new(1 << 20);
        let put_path = |compiler: &mut Compiler, n: usize| {
            let ports = format!(
                "    toPorts:\n    - ports: [{{port: \"80\", protocol: TCP}}]\n      rules: {{http: [{{path: /{n}}}]}}\n"
            );
            put_rule(compiler, "p", &ports);
            let sets = &compiler.snapshot().rulesets;
            *sets
                .keys()
                .find(|id| !compiler.unused_rule_sets().contains(id))
                .unwrap()
        };
        let first = put_path(&mut compiler, 0);
        let second = put_path(&mut compiler, 1);
        for n in 2..=KEPT_RULE_SETS {
            put_path(&mut compiler, n);
            numbers.policies_changed(&compiler);
        }
        assert!(!numbers.recorded.is_wanted(), "few are unused");
        put_path(&mut compiler, KEPT_RULE_SETS + 1);
        numbers.policies_changed(&compiler);
        assert!(numbers.recorded.is_wanted());
        let since = numbers.unused_sets.as_ref().unwrap().since;
        // The entries were read too early.
        numbers
            .recorded
            .report(since + UNUSED_FOR / 2, Numbers::default());
        assert_eq!(numbers.due(), Some((BTreeSet::new(), BTreeSet::new())));
        // The third is used again, and stays although it is unused in the end.
        let third = put_path(&mut compiler, 2);
        numbers.policies_changed(&compiler);
        let last = put_path(&mut compiler, KEPT_RULE_SETS + 2);
        numbers.policies_changed(&compiler);
        // A conntrack entry has the first.
        let recorded = Numbers {
            rules: HashSet::new(),
            rule_sets: [first].into(),
        };
        numbers.recorded.report(since + UNUSED_FOR, recorded);
        let (rules, sets) = numbers.due().unwrap();
        assert!(rules.is_empty());
        assert!(
            sets.contains(&second) && ![first, third, last].iter().any(|id| sets.contains(id)),
            "{sets:?}"
        );
        compiler.forget_rule_sets(&sets);
        let left: Vec<u32> = compiler.snapshot().rulesets.keys().copied().collect();
        assert!(
            left.len() < 8 && [first, third, last].iter().all(|id| left.contains(id)),
            "{left:?}"
        );
        // A set that comes back has its number again.
        assert_eq!(put_path(&mut compiler, 1), second);
    }
}
