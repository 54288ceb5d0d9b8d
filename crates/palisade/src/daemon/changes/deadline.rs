//! The deadline of a change that waits for its confirmation. Pure, except [`Now::read`].
//!
//! The deadline is a time of the boot clock (CLOCK_BOOTTIME), which no one can set and which counts suspended time, so
//! a jump of the wall clock neither extends nor shortens it. The clock starts anew at a boot; the boot id of the kernel
//! shows that, and the deadline has then passed.

use std::{fs, io, sync::OnceLock, time::Duration};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Identifier that the kernel draws at each boot (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// A reading of the boot clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::daemon) struct Now {
    /// Identifier of the boot; empty if it cannot be read.
    pub boot: String,
    /// Time since the boot, ms.
    pub since_boot: u64,
}

impl Now {
    /// Returns the current time.
    pub(in crate::daemon) fn read() -> Self {
        static BOOT: OnceLock<String> = OnceLock::new();
        let time = clock_gettime(ClockId::CLOCK_BOOTTIME).ok();
        let since_boot = time.map_or(0, |time| Duration::from(time).as_millis());
        Self {
            boot: kept(&BOOT, || fs::read_to_string(BOOT_ID)),
            since_boot: u64::try_from(since_boot).unwrap_or(u64::MAX),
        }
    }
}

/// Returns the boot id, which is read once: a later open(2) can fail (EMFILE), and without the boot id every deadline
/// has passed. An id that could not be read is empty and is not kept.
fn kept(known: &OnceLock<String>, read: impl FnOnce() -> io::Result<String>) -> String {
    if let Some(id) = known.get() {
        return id.clone();
    }
    let id = read().map(|id| id.trim().to_owned()).unwrap_or_default();
    if !id.is_empty() {
        // Another thread has set the same id if this fails.
        let _ = known.set(id.clone());
    }
    id
}

/// Time until which a change must be confirmed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::daemon) struct Deadline {
    boot: String,
    /// Time of the boot clock at which the change was begun, ms.
    begun: u64,
    /// Time of the boot clock at which the change is rolled back, ms.
    until: u64,
}

impl Deadline {
    /// Returns the deadline `wait` after `now`.
    pub(in crate::daemon) fn after(now: &Now, wait: Duration) -> Self {
        let wait = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        Self {
            boot: now.boot.clone(),
            begun: now.since_boot,
            until: now.since_boot.saturating_add(wait),
        }
    }

    /// Returns the time that is left; `None` if the deadline has passed, the node has booted since, or the clock
    /// cannot be compared.
    pub(in crate::daemon) fn left(&self, now: &Now) -> Option<Duration> {
        let comparable = !now.boot.is_empty() && now.boot == self.boot && now.since_boot >= self.begun;
        let left = self.until.saturating_sub(now.since_boot);
        (comparable && left > 0).then(|| Duration::from_millis(left))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn now(boot: &str, since_boot: u64) -> Now {
        Now {
            boot: boot.to_owned(),
            since_boot,
        }
    }

    #[test]
    fn the_clock_of_the_kernel_can_be_read() {
        let now = Now::read();
        assert_eq!((now.boot.len(), now.since_boot > 0), (36, true));
        assert_eq!(Now::read().boot, now.boot);
    }

    #[test]
    fn a_boot_id_that_was_read_once_is_kept() {
        let known = OnceLock::new();
        let fails = || Err(io::Error::other("EMFILE"));
        assert_eq!(kept(&known, fails), "");
        assert_eq!(kept(&known, || Ok("a\n".to_owned())), "a");
        assert_eq!(kept(&known, fails), "a");
    }

    #[test]
    fn another_boot_and_a_clock_that_runs_backwards_end_the_wait() {
        let deadline = Deadline::after(&now("a", 5_000), Duration::from_secs(60));
        assert_eq!(deadline.left(&now("a", 6_000)), Some(Duration::from_secs(59)));
        assert_eq!(deadline.left(&now("a", 64_999)), Some(Duration::from_millis(1)));
        for late in [
            now("a", 65_000),
            now("b", 6_000),
            now("a", 4_999),
            now("", 6_000),
            now("a", u64::MAX),
        ] {
            assert_eq!(deadline.left(&late), None, "{late:?}");
        }
        let unknown = Deadline::after(&now("", 5_000), Duration::from_secs(60));
        assert_eq!(unknown.left(&now("", 6_000)), None);
    }

    proptest! {
        /// The wall clock is not an input: jumps of it cannot change the result. What is left never grows.
        #[test]
        fn what_is_left_never_exceeds_the_wait_and_never_grows(
            begun in any::<u64>(), wait in 0_u64..1 << 40, first in any::<u64>(), second in any::<u64>(),
        ) {
            let deadline = Deadline::after(&now("a", begun), Duration::from_millis(wait));
            let (early, late) = (first.min(second), first.max(second));
            let left = |at| deadline.left(&now("a", at));
            for at in [early, late] {
                prop_assert!(left(at).is_none_or(|left| left <= Duration::from_millis(wait)));
            }
            if early >= begun {
                prop_assert!(left(late).unwrap_or_default() <= left(early).unwrap_or_default());
            }
        }
    }
}
