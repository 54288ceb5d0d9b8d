//! How many frames of a connection are read per second. A client that sends more than any client needs waits, so that the
//! others get their share of the few threads that serve connections.

use std::{
    future::Future as _,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep};

/// Type of a HEADERS frame.
const HEADERS: u8 = 1;
/// Type of a SETTINGS frame.
const SETTINGS: u8 = 4;
/// Cost of a frame that begins a request or changes settings. All other frames cost 1.
const COSTLY: u32 = 40;
/// Cost of the frames that are read per second: 50 requests, or the 2,000 window updates of a reader of 60 MB/s.
const PER_SECOND: u32 = 2_000;
/// Cost of the frames that are read at once.
const BURST: u32 = 4_000;

/// Returns the cost of a frame of a type.
pub(crate) const fn cost(kind: u8) -> u32 {
    match kind {
        HEADERS | SETTINGS => COSTLY,
        _ => 1,
    }
}

/// What a connection may still send.
#[derive(Debug)]
pub(crate) struct Budget {
    bucket: Bucket,
    rest: Option<Pin<Box<Sleep>>>,
}

impl Budget {
    pub(crate) fn new() -> Self {
        Self {
            bucket: Bucket::new(Instant::now()),
            rest: None,
        }
    }

    /// Counts frames that were read.
    pub(crate) fn spend(&mut self, cost: u32) {
        let rest = self.bucket.spend(cost, Instant::now());
        if rest > Duration::ZERO {
            self.rest = Some(Box::pin(sleep(rest)));
        }
    }

    /// Waits until more frames may be read.
    pub(crate) fn poll_rest(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Some(rest) = &mut self.rest {
            std::task::ready!(rest.as_mut().poll(context));
            self.rest = None;
        }
        Poll::Ready(())
    }
}

/// Cost that may still be spent, at a time.
#[derive(Debug)]
struct Bucket {
    /// Below 0 if too much was spent.
    left: i64,
    filled: Instant,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self {
            left: BURST.into(),
            filled: now,
        }
    }

    /// Returns how long nothing may be spent afterwards.
    fn spend(&mut self, cost: u32, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.filled).as_micros();
        let gained = passed.saturating_mul(PER_SECOND.into()) / 1_000_000;
        // A part of a unit is not lost: the time stays until there is a whole one.
        if gained > 0 {
            self.filled = now;
            let gained = i64::try_from(gained).unwrap_or(i64::MAX);
            self.left = self.left.saturating_add(gained).min(BURST.into());
        }
        self.left = self.left.saturating_sub(cost.into());
        let owed = u64::try_from(self.left.saturating_neg()).unwrap_or_default();
        Duration::from_micros(owed.saturating_mul(1_000_000) / u64::from(PER_SECOND))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_sends_too_many_frames_waits_and_others_do_not() {
        let mut now = Instant::now();
        let mut bucket = Bucket::new(now);
        // A client that connects, makes 16 requests and then reads 60 MB/s.
        let cost_of_start = 17 * cost(HEADERS) + cost(SETTINGS);
        assert_eq!(bucket.spend(cost_of_start, now), Duration::ZERO);
        for _ in 0..1_000 {
            now += Duration::from_micros(50_001);
            assert_eq!(bucket.spend(100, now), Duration::ZERO);
        }
        // A flood of settings: 8 KiB at a time.
        let flood = 910 * cost(SETTINGS);
        for _ in 0..2 {
            let rest = bucket.spend(flood, now);
            assert!(rest >= Duration::from_secs(16), "{rest:?}");
            now += rest;
        }
        // Afterwards everything is as before.
        now += Duration::from_secs(60);
        assert_eq!(bucket.spend(BURST, now), Duration::ZERO);
        assert!(bucket.spend(10, now) > Duration::ZERO);
    }
}
