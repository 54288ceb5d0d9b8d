//! The waiting strategy of a worker that has nothing to do.
//!
//! A packet that arrives while the worker sleeps is delayed by the wake-up, but a worker that spins takes CPU time from
//! other threads. So a worker in [`Mode::Poll`] first spins for a short budget, during which it also yields the CPU,
//! and then sleeps. The budget doubles if spinning found work or longer spinning would have found it, and halves
//! otherwise.
//!
//! The strategy is a state machine over [`Host`], which has the clock and the system calls; the tests simulate a host.
//! Start at [`Idle::wait`]. This module depends on nothing else in this crate.

use std::{io, time::Duration};

use palisade_xsk::Mode;

/// Longest time that a worker spins before it sleeps.
const MAX_SPIN: Duration = Duration::from_micros(50);
/// Shortest time that a worker spins before it sleeps; also the budget at the start.
const MIN_SPIN: Duration = Duration::from_micros(2);
/// Polls between two `sched_yield` calls.
const POLLS_PER_YIELD: u32 = 16;
/// Yields to other threads after which a worker sleeps.
const MAX_YIELDS: u32 = 2;
/// A `sched_yield` that takes at most this time is assumed to have found no other runnable thread.
const IDLE_YIELD: Duration = Duration::from_micros(2);

/// Interval of heartbeats, and so the longest sleep.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(50);
/// Longest sleep while records or refreshes are queued whose reader has not been woken.
const MAX_FLUSH_DELAY: Duration = Duration::from_millis(4);
/// Longest sleep while the transmit ring has packets that the kernel did not take. The kernel does not wake the worker
/// when the device can send again.
const TX_RETRY: Duration = Duration::from_millis(1);
/// Shortest sleep before a deadline: the resolution of `epoll_wait`.
const MIN_SLEEP: Duration = Duration::from_millis(1);

/// The clock and the system calls that the strategy uses.
pub(crate) trait Host {
    /// Returns the time since a fixed point.
    fn now(&self) -> Duration;

    /// Returns whether there is work. The strategy calls this function in a tight loop, so it must take only a few
    /// loads.
    fn has_work(&mut self) -> bool;

    /// Relaxes the CPU for a moment (`PAUSE`).
    fn pause(&mut self);

    /// Yields the CPU to another runnable thread (`sched_yield`).
    fn yield_now(&mut self);

    /// Polls the driver in this thread and does the work that arrives. Returns whether there was work.
    ///
    /// # Errors
    /// The socket failed.
    fn busy_poll(&mut self) -> io::Result<bool>;

    /// Sleeps until the worker is woken, at most for [`sleep_timeout`].
    ///
    /// # Errors
    /// `epoll_wait` failed.
    fn sleep(&mut self) -> io::Result<()>;
}

/// The state of the strategy.
#[derive(Debug)]
pub(crate) struct Idle {
    mode: Mode,
    /// Time to spin before the next sleep, from [`MIN_SPIN`] to [`MAX_SPIN`].
    budget: Duration,
}

impl Idle {
    /// Creates the strategy of a mode.
    pub(crate) fn new(mode: Mode) -> Self {
        Self {
            mode,
            budget: MIN_SPIN,
        }
    }

    /// Waits for work, at most until the sleep timeout has passed; in [`Mode::Spin`] only relaxes the CPU for a moment.
    /// The caller does a turn after each wait.
    ///
    /// # Errors
    /// The socket or `epoll_wait` failed.
    pub(crate) fn wait<H: Host>(&mut self, host: &mut H) -> io::Result<()> {
        let since = host.now();
        let found = match self.mode {
            Mode::Spin => {
                host.pause();
                return Ok(());
            }
            Mode::Poll => self.spin(host, since),
            Mode::BusyPoll => self.busy_poll(host, since)?,
        };
        if found {
            self.double();
            return Ok(());
        }
        host.sleep()?;
        // If the whole wait was shorter than the longest spin, longer spinning would have found the work.
        if host.now().saturating_sub(since) < MAX_SPIN {
            self.double();
        } else {
            self.halve();
        }
        Ok(())
    }

    /// Spins until there is work, the budget is used up, or other threads have had the CPU [`MAX_YIELDS`] times.
    /// Returns whether there is work.
    ///
    /// The thread that runs after a yield is often the one that sends the packets that the worker waits for, so the
    /// worker yields more than once. After that it sleeps instead of waiting in the run queue: the kernel can wake a
    /// sleeping thread on an idle CPU, but it moves a runnable thread to another CPU only when it balances the load.
    fn spin<H: Host>(&self, host: &mut H, since: Duration) -> bool {
        let mut yields = 0;
        loop {
            if host.has_work() {
                return true;
            }
            let before = host.now();
            host.yield_now();
            let now = host.now();
            yields += u32::from(now.saturating_sub(before) > IDLE_YIELD);
            if yields >= MAX_YIELDS || now.saturating_sub(since) >= self.budget {
                return host.has_work();
            }
            for _ in 0..POLLS_PER_YIELD {
                host.pause();
                if host.has_work() {
                    return true;
                }
            }
        }
    }

    /// Polls the driver until a poll finds work or the budget is used up. Returns whether there was work.
    fn busy_poll<H: Host>(&self, host: &mut H, since: Duration) -> io::Result<bool> {
        while host.now().saturating_sub(since) < self.budget {
            if host.busy_poll()? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn double(&mut self) {
        self.budget = (self.budget * 2).min(MAX_SPIN);
    }

    fn halve(&mut self) {
        self.budget = (self.budget / 2).max(MIN_SPIN);
    }
}

/// The conditions that limit a sleep.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pending {
    /// The transmit ring has packets that the kernel did not take.
    pub unsent: bool,
    /// Records or refreshes are queued whose reader has not been woken.
    pub unflushed: bool,
    /// Time until the next deadline of an inspector.
    pub deadline: Option<Duration>,
}

/// Returns the longest time that a worker may sleep.
pub(crate) fn sleep_timeout(pending: &Pending) -> Duration {
    let mut timeout = if pending.unsent {
        TX_RETRY
    } else {
        HEARTBEAT_INTERVAL
    };
    if let Some(deadline) = pending.deadline {
        timeout = timeout.min(deadline.max(MIN_SLEEP));
    }
    if pending.unflushed {
        timeout = timeout.min(MAX_FLUSH_DELAY);
    }
    timeout
}

#[cfg(test)]
mod tests {
    use super::*;

    const NS: Duration = Duration::from_nanos(1);
    const US: Duration = Duration::from_micros(1);
    const MS: Duration = Duration::from_millis(1);

    /// A thread with a simulated clock. The fields of type `Duration` after `work_at` are the times that operations
    /// take.
    struct Simulated {
        now: Duration,
        /// Time at which work arrives. The work stays until the test sets another time.
        work_at: Option<Duration>,
        poll: Duration,
        pause: Duration,
        yielding: Duration,
        driver: Duration,
        polls: u32,
        pauses: u32,
        yields: u32,
        driver_polls: u32,
        sleeps: u32,
        fails: bool,
    }

    impl Simulated {
        fn new() -> Self {
            Self {
                now: Duration::from_secs(1),
                work_at: None,
                poll: 10 * NS,
                pause: 40 * NS,
                yielding: 300 * NS,
                driver: 2 * US,
                polls: 0,
                pauses: 0,
                yields: 0,
                driver_polls: 0,
                sleeps: 0,
                fails: false,
            }
        }

        /// Waits once, with work that arrives after `delay`. Returns whether the worker slept.
        fn wait(&mut self, idle: &mut Idle, delay: Duration) -> bool {
            self.work_at = Some(self.now + delay);
            let before = self.sleeps;
            idle.wait(self).unwrap();
            self.sleeps != before
        }

        fn is_work_there(&self) -> bool {
            self.work_at.is_some_and(|at| at <= self.now)
        }
    }

    impl Host for Simulated {
        fn now(&self) -> Duration {
            self.now
        }

        fn has_work(&mut self) -> bool {
            self.polls += 1;
            self.now += self.poll;
            self.is_work_there()
        }

        fn pause(&mut self) {
            self.pauses += 1;
            self.now += self.pause;
        }

        fn yield_now(&mut self) {
            self.yields += 1;
            self.now += self.yielding;
        }

        fn busy_poll(&mut self) -> io::Result<bool> {
            if self.fails {
                return Err(io::Error::other("the socket is gone"));
            }
            self.driver_polls += 1;
            self.now += self.driver;
            Ok(self.is_work_there())
        }

        fn sleep(&mut self) -> io::Result<()> {
            self.sleeps += 1;
            let timeout = self.now + sleep_timeout(&Pending::default());
            let wake_up = self.work_at.map_or(timeout, |at| at.max(self.now).min(timeout));
            self.now = wake_up;
            Ok(())
        }
    }

    #[test]
    fn spin_mode_pauses_once_and_never_yields_or_sleeps() {
        let (mut idle, mut host) = (Idle::new(Mode::Spin), Simulated::new());
        for _ in 0..1_000 {
            idle.wait(&mut host).unwrap();
        }
        assert_eq!((host.pauses, host.yields, host.sleeps), (1_000, 0, 0));
        assert_eq!((host.polls, host.driver_polls), (0, 0));
    }

    #[test]
    fn poll_mode_spins_for_its_budget_and_then_sleeps() {
        let (mut idle, mut host) = (Idle::new(Mode::Poll), Simulated::new());
        let since = host.now;
        assert!(host.wait(&mut idle, 10 * MS));
        assert_eq!(host.now - since, 10 * MS, "work ends the sleep");
        // 2 µs: a yield and 16 polls with pauses take 1.1 µs, so two rounds are complete and the third ends after its
        // yield.
        assert_eq!((host.yields, host.pauses), (2 + 1, 2 * POLLS_PER_YIELD));
    }

    #[test]
    fn poll_mode_returns_at_once_when_there_is_work() {
        let (mut idle, mut host) = (Idle::new(Mode::Poll), Simulated::new());
        assert!(!host.wait(&mut idle, Duration::ZERO));
        assert_eq!((host.polls, host.yields, host.pauses), (1, 0, 0));
    }

    #[test]
    fn poll_mode_polls_between_yields() {
        let (mut idle, mut host) = (Idle::new(Mode::Poll), Simulated::new());
        idle.budget = MAX_SPIN;
        assert!(!host.wait(&mut idle, 20 * US));
        let rounds = host.yields;
        assert!(rounds > 10, "{rounds}");
        assert!(host.pauses > (rounds - 1) * POLLS_PER_YIELD);
        assert!(host.pauses <= rounds * POLLS_PER_YIELD);
    }

    #[test]
    fn the_budget_doubles_up_to_its_limit_when_spinning_finds_work() {
        let (mut idle, mut host) = (Idle::new(Mode::Poll), Simulated::new());
        for expected in [4, 8, 16, 32, 50, 50] {
            assert!(!host.wait(&mut idle, US));
            assert_eq!(idle.budget, expected * US);
        }
    }

    #[test]
    fn the_budget_halves_down_to_its_limit_when_sleeps_are_long() {
        let (mut idle, mut host) = (Idle::new(Mode::Poll), Simulated::new());
        idle.budget = MAX_SPIN;
        for expected in [25_000, 12_500, 6_250, 3_125, 2_000, 2_000] {
            assert!(host.wait(&mut idle, 10 * MS));
            assert_eq!(idle.budget, expected * NS);
        }
    }

    #[test]
    fn the_budget_doubles_when_a_longer_spin_would_have_found_the_work() {
        let (mut idle, mut host) = (Idle::new(Mode::Poll), Simulated::new());
        assert!(host.wait(&mut idle, MAX_SPIN - US), "the budget is 2 µs");
        assert_eq!(idle.budget, 4 * US);
        assert!(host.wait(&mut idle, MAX_SPIN));
        assert_eq!(
            idle.budget,
            2 * US,
            "a spin of the longest budget would have missed it"
        );
    }

    #[test]
    fn a_worker_sleeps_after_two_yields_to_other_threads() {
        let (mut idle, mut host) = (Idle::new(Mode::Poll), Simulated::new());
        idle.budget = MAX_SPIN;
        host.yielding = 5 * US;
        assert!(host.wait(&mut idle, 10 * MS));
        assert_eq!(host.yields, MAX_YIELDS);
        assert_eq!(host.pauses, POLLS_PER_YIELD, "polls only between the two");
        // Work that arrives during the second yield is found without a sleep.
        idle.budget = MAX_SPIN;
        assert!(!host.wait(&mut idle, 10 * US));
        assert_eq!(host.yields, 2 * MAX_YIELDS);
    }

    #[test]
    fn yields_that_find_no_other_thread_do_not_count() {
        let (mut idle, mut host) = (Idle::new(Mode::Poll), Simulated::new());
        idle.budget = MAX_SPIN;
        host.yielding = IDLE_YIELD;
        assert!(host.wait(&mut idle, 10 * MS));
        assert!(host.yields > 10, "{}", host.yields);
    }

    #[test]
    fn busy_poll_mode_polls_the_driver_for_its_budget_and_then_sleeps() {
        let (mut idle, mut host) = (Idle::new(Mode::BusyPoll), Simulated::new());
        idle.budget = 8 * US;
        assert!(host.wait(&mut idle, 10 * MS));
        assert_eq!((host.driver_polls, host.yields, host.pauses), (4, 0, 0));
        assert_eq!(idle.budget, 4 * US);
        assert!(!host.wait(&mut idle, 3 * US), "the second poll finds it");
        assert_eq!((host.driver_polls, host.sleeps), (4 + 2, 1));
        assert_eq!(idle.budget, 8 * US);
    }

    #[test]
    fn busy_poll_mode_returns_the_error_of_a_failed_socket() {
        let (mut idle, mut host) = (Idle::new(Mode::BusyPoll), Simulated::new());
        host.fails = true;
        assert!(idle.wait(&mut host).is_err());
        assert_eq!(host.sleeps, 0);
    }

    #[test]
    fn a_sleep_ends_before_the_next_heartbeat_deadline_or_flush() {
        let pending = Pending::default();
        assert_eq!(sleep_timeout(&pending), 50 * MS);
        let deadline = |ms| Pending {
            deadline: Some(ms * MS),
            ..pending
        };
        assert_eq!(sleep_timeout(&deadline(70)), 50 * MS);
        assert_eq!(sleep_timeout(&deadline(7)), 7 * MS);
        assert_eq!(sleep_timeout(&deadline(0)), MS, "never zero, which would spin");
        let unflushed = Pending {
            unflushed: true,
            ..pending
        };
        assert_eq!(sleep_timeout(&unflushed), 4 * MS);
        let both = Pending {
            unflushed: true,
            ..deadline(2)
        };
        assert_eq!(sleep_timeout(&both), 2 * MS);
        let unsent = Pending { unsent: true, ..both };
        assert_eq!(sleep_timeout(&unsent), MS);
    }
}
