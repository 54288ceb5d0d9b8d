//! Monotonic clocks of the programs, and their conversion to wall-clock time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

fn read(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid for writing during the call. The call cannot fail, since every Linux has these clocks.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Returns the coarse monotonic time, ns: the clock of conntrack entries (`bpf_ktime_get_coarse_ns`).
#[must_use]
pub fn monotonic_coarse() -> u64 {
    read(libc::CLOCK_MONOTONIC_COARSE)
}

/// Returns whether the kernel's clock is synchronised with a time server; `None` if adjtimex(2) fails.
#[must_use]
pub fn is_clock_synchronised() -> Option<bool> {
    // SAFETY: `timex` consists of integers, for which zero is a valid value. Mode 0 changes nothing.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: `state` is valid for writing during the call.
    let answer = unsafe { libc::adjtimex(&raw mut state) };
    (answer >= 0).then_some(state.status & libc::STA_UNSYNC == 0)
}

/// Difference between the monotonic and the wall clock at one moment.
///
/// The difference must be read again periodically: the wall clock can be set, and CLOCK_MONOTONIC stops while the
/// machine is suspended.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    wall_at_zero: u128,
}

impl Clock {
    /// Returns the current difference.
    #[must_use]
    pub fn now() -> Self {
        let monotonic = u128::from(read(libc::CLOCK_MONOTONIC));
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos());
        Self {
            wall_at_zero: wall.saturating_sub(monotonic),
        }
    }

    /// Converts a monotonic time (coarse or not), ns, to wall-clock time.
    #[must_use]
    pub fn wall(&self, monotonic: u64) -> SystemTime {
        let nanos = self.wall_at_zero + u128::from(monotonic);
        UNIX_EPOCH + Duration::new((nanos / 1_000_000_000) as u64, (nanos % 1_000_000_000) as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coarse_now_is_now_on_the_wall() {
        let wall = Clock::now().wall(monotonic_coarse());
        let difference = SystemTime::now().duration_since(wall).unwrap_or_default();
        assert!(difference < Duration::from_secs(1), "{difference:?}");
    }
}
