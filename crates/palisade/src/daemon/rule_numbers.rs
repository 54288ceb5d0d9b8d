//! Numbers of removed rules for new rules. A number must not name a new rule where it was recorded for the old one: so it is
//! given to a new rule only when no policy table, no conntrack entry and no flow record has it any more, and its counter is
//! zero. Numbers are reused once most of those with a counter were used; until then each rule has its own.
//!
//! The sweeper, which reads all conntrack entries anyway, collects their rule numbers and those of the flow ring when they are
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

/// Rule numbers of conntrack entries and flow records, from the sweeper to the control thread.
#[derive(Debug, Default)]
pub(super) struct RecordedRules {
    is_wanted: AtomicBool,
    found: Mutex<Option<Recorded>>,
}

/// Rule numbers of conntrack entries and flow records.
#[derive(Debug)]
struct Recorded {
    /// Time before the first entry was read.
    since: Instant,
    rules: HashSet<u32>,
}

impl RecordedRules {
    /// Returns whether the control thread wants the numbers.
    pub(super) fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Relaxed)
    }

    /// Passes on the numbers of all entries and records. `since`: time before the first entry was read.
    pub(super) fn report(&self, since: Instant, rules: HashSet<u32>) {
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(Recorded { since, rules });
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

/// Finds numbers that can be reused.
#[derive(Debug)]
pub(super) struct RuleNumbers {
    recorded: Arc<RecordedRules>,
    /// Number from which on there are no counters.
    limit: u32,
    /// Numbers that have been unused without interruption.
    unused: Option<Unused>,
}

impl RuleNumbers {
    pub(super) fn new(limit: u32) -> Self {
        Self {
            recorded: Arc::default(),
            limit,
            unused: None,
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
        match &mut self.unused {
            Some(known) => known.numbers.retain(|number| unused.contains(number)),
            None => {
                self.unused = Some(Unused {
                    numbers: unused,
                    since: Instant::now(),
                });
            }
        }
        self.unused = self.unused.take().filter(|unused| !unused.numbers.is_empty());
        self.recorded
            .is_wanted
            .store(self.unused.is_some(), Ordering::Relaxed);
    }

    /// Returns the numbers that nothing has any more; `None` if they are not known yet. The others begin to wait again.
    fn due(&mut self) -> Option<BTreeSet<u32>> {
        let Recorded { since, rules } = self.recorded.take()?;
        let is_due = |unused: &mut Unused| since.saturating_duration_since(unused.since) >= UNUSED_FOR;
        let Unused { mut numbers, .. } = self.unused.take_if(is_due)?;
        numbers.retain(|number| !rules.contains(number));
        Some(numbers)
    }

    /// Lets the compiler reuse the numbers that nothing has any more. Call it after each sweep. Returns whether there is one.
    pub(super) fn swept(&mut self, compiler: &mut Compiler, counters: &Counters<'_>) -> bool {
        let Some(numbers) = self.due() else {
            return false;
        };
        let is_cleared = clear(counters, &numbers);
        if is_cleared && !numbers.is_empty() {
            info!(
                numbers = numbers.len(),
                "numbers of removed rules can be used for new ones"
            );
            compiler.reuse_rules(&numbers);
        }
        self.policies_changed(compiler);
        is_cleared && !numbers.is_empty()
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
    use palisade_policy::{compile::Changes, parse::parse};

    use super::*;

    fn put(compiler: &mut Compiler, name: &str) {
        let text = format!(
            "apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
             nodeSelector: {{}}\n  ingress:\n  - fromEntities: [world]\n"
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
        numbers.recorded.report(since + UNUSED_FOR / 2, HashSet::new());
        assert_eq!(numbers.due(), None);
        // Two numbers are still in an entry or a record.
        numbers.recorded.report(since + UNUSED_FOR, [5, 7].into());
        let due = numbers.due().unwrap();
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
}
