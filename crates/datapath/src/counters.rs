//! Counters of the programs, summed over the CPUs.

use std::collections::{BTreeMap, BTreeSet};

use palisade_abi::{Counter, DIRECTIONS, Direction, EventKind, RateBudget, Reason, budget_of};

use crate::{Datapath, MapError, maps::PerCpuArray};

/// Counters of the programs.
#[derive(Debug)]
pub struct Counters<'a> {
    counters: &'a PerCpuArray<Counter>,
    rules: &'a PerCpuArray<Counter>,
    budgets: &'a PerCpuArray<RateBudget>,
}

/// Numbers of events that the programs did not send.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct EventBudget {
    /// Events beyond the rate limit.
    pub suppressed: u64,
    /// Events for which the ring had no space.
    pub lost: u64,
}

impl Datapath {
    /// Returns the counters.
    #[must_use]
    pub fn counters(&self) -> Counters<'_> {
        Counters {
            counters: &self.counters,
            rules: &self.rules,
            budgets: &self.budgets,
        }
    }
}

impl Counters<'_> {
    /// Returns packets and bytes by reason and direction. Counters that are zero are omitted.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn reasons(&self) -> Result<Vec<(Reason, Direction, Counter)>, MapError> {
        let mut found = Vec::new();
        self.counters.for_each(|slot, values| {
            let (number, direction) = (slot / 2, DIRECTIONS[slot as usize % 2]);
            let Some(reason) = u8::try_from(number).ok().and_then(Reason::from_u8) else {
                return;
            };
            let total = sum(values);
            if total.packets != 0 {
                found.push((reason, direction, total));
            }
        })?;
        found.sort_by_key(|&(reason, direction, _)| (reason, direction));
        Ok(found)
    }

    /// Returns packets and bytes of one rule; zero for a rule beyond the capacity of the map.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn rule(&self, rule: u32) -> Result<Counter, MapError> {
        if rule >= self.rules.len() {
            return Ok(Counter::default());
        }
        Ok(sum(&mut self.rules.get(rule)?.into_iter()))
    }

    /// Returns packets and bytes by rule. Counters that are zero are omitted. Number 0 stands for all rules beyond the
    /// capacity of the map.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn rules(&self) -> Result<BTreeMap<u32, Counter>, MapError> {
        by_rule(self.rules)
    }

    /// Sets the counters of rules to zero. No program may count at them meanwhile. Numbers beyond the capacity of the map are
    /// left out.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be written.
    pub fn clear_rules(&self, rules: &BTreeSet<u32>) -> Result<(), MapError> {
        let rules = rules.iter().filter(|rule| **rule < self.rules.len());
        rules
            .into_iter()
            .try_for_each(|rule| self.rules.set(*rule, &Counter::default()))
    }

    /// Returns how many events were suppressed or lost, by kind and reason. Pairs without such an event are omitted.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn unsent_events(&self) -> Result<Vec<(EventKind, Reason, EventBudget)>, MapError> {
        const KINDS: [EventKind; 3] = [EventKind::PolicyVerdict, EventKind::Drop, EventKind::Trace];
        let mut found = Vec::new();
        self.budgets.for_each(|slot, values| {
            let (kind, reason) = budget_of(slot);
            let (Some(&kind), Some(reason)) = (KINDS.get(kind as usize), Reason::from_u8(reason)) else {
                return;
            };
            let mut total = EventBudget::default();
            for budget in values {
                total.suppressed += budget.suppressed;
                total.lost += budget.lost;
            }
            if total != EventBudget::default() {
                found.push((kind, reason, total));
            }
        })?;
        Ok(found)
    }
}

pub(crate) fn by_rule(rules: &PerCpuArray<Counter>) -> Result<BTreeMap<u32, Counter>, MapError> {
    let mut found = BTreeMap::new();
    rules.for_each(|rule, values| {
        let total = sum(values);
        if total.packets != 0 {
            found.insert(rule, total);
        }
    })?;
    Ok(found)
}

pub(crate) fn sum(values: &mut dyn Iterator<Item = Counter>) -> Counter {
    values.fold(Counter::default(), |a, b| Counter {
        packets: a.packets.wrapping_add(b.packets),
        bytes: a.bytes.wrapping_add(b.bytes),
    })
}
