//! A rate limit as a token bucket.

use super::config::Rate;
use crate::Millis;

/// Tokens per event, so that a rate below one event per millisecond is exact.
const TOKENS: u64 = 1_000;

#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    rate: Rate,
    tokens: u64,
    /// Time of the last refill; `None` before the first event.
    last: Option<Millis>,
}

impl Budget {
    pub(super) fn new(rate: Rate) -> Self {
        Self {
            rate,
            tokens: u64::from(rate.burst) * TOKENS,
            last: None,
        }
    }

    /// Counts an event. Returns whether it is within the rate.
    pub(super) fn take(&mut self, now: Millis) -> bool {
        let since = now.saturating_sub(self.last.unwrap_or(now));
        self.last = Some(now);
        self.add(since.saturating_mul(self.rate.per_second.into()));
        match self.tokens.checked_sub(TOKENS) {
            Some(left) => {
                self.tokens = left;
                true
            }
            None => false,
        }
    }

    /// Permits `events` more events, up to the burst.
    pub(super) fn credit(&mut self, events: u64) {
        self.add(events * TOKENS);
    }

    fn add(&mut self, tokens: u64) {
        let most = u64::from(self.rate.burst) * TOKENS;
        self.tokens = self.tokens.saturating_add(tokens).min(most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_beyond_burst_and_rate_are_refused() {
        let mut budget = Budget::new(Rate {
            burst: 3,
            per_second: 10,
        });
        let mut taken = |now| (0..10).filter(|_| budget.take(now)).count();
        assert_eq!(taken(1_000), 3);
        assert_eq!(taken(1_099), 0);
        assert_eq!(taken(1_100), 1);
        assert_eq!(taken(99_000), 3);
        // A clock that steps back refills nothing.
        assert_eq!(taken(5), 0);
        budget.credit(1);
        assert!(budget.take(5) && !budget.take(5));
    }
}
