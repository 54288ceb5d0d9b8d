//! Which events of a ring a request gets, and in which order: the rules of the observer service for `number`, `first`,
//! `follow`, `since` and `until`.
//!
//! - `first`: from the oldest event on. Excludes `follow`.
//! - `follow` alone: only new events.
//! - otherwise a reader goes back from the newest event, until `number` events match, or until the events are older
//!   than `since`; without both, to the oldest event.
//! - A reader that does not follow ends after `number` events, or at the event that was the newest at the request.
//! - `since` has precedence over `number` and `first` for the event at which a reader begins.

use std::time::{Duration, Instant};

use palisade_flowlog::Timestamp;
use tonic::Status;

/// Largest difference by which events can be out of order, ns. Several threads write to the ring.
const DISORDER_NS: i64 = 1_000_000_000;

/// Ring of numbered events.
pub(crate) trait Source {
    /// An event.
    type Event;
    /// Returns the number of the oldest event in the ring.
    fn first(&self) -> u64;
    /// Returns the number of the next event.
    fn next(&self) -> u64;
    /// Returns an event; `None` if it was overwritten.
    fn get(&self, number: u64) -> Option<Self::Event>;
    /// Returns the time of an event.
    fn time(event: &Self::Event) -> Timestamp;
    /// Returns whether the event counts for `number`; false for reports about lost events.
    fn counts(_: &Self::Event) -> bool {
        true
    }
}

/// What a request asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Range {
    pub(crate) number: u64,
    pub(crate) first: bool,
    pub(crate) follow: bool,
    pub(crate) since: Option<Timestamp>,
    pub(crate) until: Option<Timestamp>,
}

impl Range {
    /// Returns the range of a request.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT` if the fields contradict each other, or a time is not valid.
    pub(crate) fn new(
        number: u64,
        first: bool,
        follow: bool,
        since: Option<prost_types::Timestamp>,
        until: Option<prost_types::Timestamp>,
    ) -> Result<Self, Status> {
        if first && follow {
            return Err(Status::invalid_argument("first cannot be specified with follow"));
        }
        Ok(Self {
            number,
            first,
            follow,
            since: since.map(|time| timestamp("since", time)).transpose()?,
            until: until.map(|time| timestamp("until", time)).transpose()?,
        })
    }
}

/// Converts a time of a request. Times outside the range of [`Timestamp`] become its first or last time.
fn timestamp(field: &str, time: prost_types::Timestamp) -> Result<Timestamp, Status> {
    // The range that protobuf allows: the years 1 to 9999.
    const SECONDS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;
    if !SECONDS.contains(&time.seconds) || !(0..1_000_000_000).contains(&time.nanos) {
        return Err(Status::invalid_argument(format!(
            "{field}: {} s and {} ns is not a valid time",
            time.seconds, time.nanos
        )));
    }
    let ns = time.seconds.saturating_mul(1_000_000_000);
    Ok(Timestamp(ns.saturating_add(time.nanos.into())))
}

/// Result of a step of a [`Reader`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step<E> {
    /// The next event.
    Event(E),
    /// Number of events that were overwritten before this reader read them.
    Lost(u64),
    /// No more events now.
    Wait,
    /// No more events.
    End,
    /// The turn is over.
    Busy,
}

/// Work that a reader may do before it lets other tasks run.
pub(crate) struct Turn {
    events: usize,
    end: Instant,
    begun: bool,
}

impl Turn {
    /// Returns a turn that ends after `events` events, or after `time` if at least one event was read.
    pub(crate) fn new(events: usize, time: Duration) -> Self {
        Self {
            events,
            end: Instant::now() + time,
            begun: false,
        }
    }

    /// Returns whether the turn includes another event.
    fn goes_on(&mut self) -> bool {
        if self.events == 0 || (self.begun && Instant::now() >= self.end) {
            return false;
        }
        self.begun = true;
        self.events -= 1;
        true
    }
}

/// Position of a request in a ring.
pub(crate) struct Reader {
    range: Range,
    /// Number of the next event.
    at: u64,
    /// Number at which a reader that does not follow ends.
    end: u64,
    /// Matching events found on the way back; `None` once the first event to return is known.
    back: Option<u64>,
    /// Events that were returned.
    sent: u64,
}

impl Reader {
    pub(crate) fn new<S: Source>(source: &S, range: Range) -> Self {
        let end = source.next();
        let (at, back) = match range {
            Range {
                first: true,
                since: None,
                ..
            } => (source.first(), None),
            Range {
                follow: true,
                number: 0,
                since: None,
                ..
            } => (end, None),
            _ => (end, Some(0)),
        };
        Self {
            range,
            at,
            end,
            back,
            sent: 0,
        }
    }

    /// Returns the next event that matches; [`Step::Busy`] if the turn ends before one is found.
    pub(crate) fn step<S: Source>(
        &mut self,
        source: &S,
        now: Timestamp,
        mut turn: Turn,
        matches: impl Fn(&S::Event) -> bool,
    ) -> Step<S::Event> {
        while let Some(found) = self.back {
            if !turn.goes_on() {
                return Step::Busy;
            }
            self.back = self.step_back(source, found, &matches);
        }
        let late = |time: Timestamp, until: Timestamp| time.0 > until.0.saturating_add(DISORDER_NS);
        loop {
            if !self.range.follow
                && (self.at >= self.end || (self.range.number > 0 && self.sent >= self.range.number))
            {
                return Step::End;
            }
            if self.at >= source.next() {
                let over = self.range.until.is_some_and(|until| late(now, until));
                return if over { Step::End } else { Step::Wait };
            }
            if !turn.goes_on() {
                return Step::Busy;
            }
            let first = source.first();
            if self.at < first {
                let lost = first - self.at;
                self.at = first;
                return Step::Lost(lost);
            }
            // If the event was overwritten after `first` was read, the next turn finds the new first event.
            let Some(event) = source.get(self.at) else {
                continue;
            };
            self.at += 1;
            let time = S::time(&event);
            if let Some(until) = self.range.until
                && time > until
            {
                if late(time, until) {
                    return Step::End;
                }
                continue;
            }
            if self.range.since.is_some_and(|since| time < since) || !matches(&event) {
                continue;
            }
            self.sent += u64::from(S::counts(&event));
            return Step::Event(event);
        }
    }

    /// Goes back by one event. Returns the number of matching events so far; `None` once the first event to
    /// return is known.
    fn step_back<S: Source>(
        &mut self,
        source: &S,
        found: u64,
        matches: impl Fn(&S::Event) -> bool,
    ) -> Option<u64> {
        if self.at <= source.first() {
            return None;
        }
        let event = source.get(self.at - 1)?;
        if !S::counts(&event) || !matches(&event) {
            self.at -= 1;
            return Some(found);
        }
        let old = |since: Timestamp| S::time(&event).0 < since.0.saturating_sub(DISORDER_NS);
        if self.range.since.is_some_and(old) {
            return None;
        }
        self.at -= 1;
        let enough = self.range.since.is_none() && found + 1 == self.range.number;
        (!enough).then_some(found + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring of events whose number and time are equal; every third one matches.
    struct Numbers {
        first: u64,
        next: u64,
    }

    impl Source for Numbers {
        type Event = u64;
        fn first(&self) -> u64 {
            self.first
        }
        fn next(&self) -> u64 {
            self.next
        }
        fn get(&self, number: u64) -> Option<u64> {
            (self.first..self.next).contains(&number).then_some(number)
        }
        fn time(event: &u64) -> Timestamp {
            second(*event)
        }
    }

    fn second(number: u64) -> Timestamp {
        Timestamp(i64::try_from(number).unwrap() * 1_000_000_000)
    }

    fn read(ring: &Numbers, range: Range) -> (Vec<u64>, Step<u64>) {
        let mut reader = Reader::new(ring, range);
        let mut events = Vec::new();
        loop {
            let turn = Turn::new(2, Duration::from_secs(60));
            match reader.step(ring, second(100), turn, |event| event % 3 == 0) {
                Step::Event(event) => events.push(event),
                Step::Busy => {}
                other => return (events, other),
            }
        }
    }

    const RING: Numbers = Numbers { first: 10, next: 30 };

    #[test]
    fn without_a_range_all_matching_events_are_sent() {
        assert_eq!(
            read(&RING, Range::default()),
            (vec![12, 15, 18, 21, 24, 27], Step::End)
        );
    }

    #[test]
    fn a_number_alone_means_the_last_events() {
        let last = |number| {
            read(
                &RING,
                Range {
                    number,
                    ..Range::default()
                },
            )
            .0
        };
        assert_eq!(last(1), [27]);
        assert_eq!(last(2), [24, 27]);
        assert_eq!(last(99), [12, 15, 18, 21, 24, 27]);
    }

    #[test]
    fn first_means_the_oldest_events() {
        let range = Range {
            number: 2,
            first: true,
            ..Range::default()
        };
        assert_eq!(read(&RING, range).0, [12, 15]);
    }

    #[test]
    fn times_bound_the_events_and_since_goes_before_number() {
        let between = |since, until, number| Range {
            number,
            since: Some(second(since)),
            until: Some(second(until)),
            ..Range::default()
        };
        assert_eq!(read(&RING, between(15, 24, 0)).0, [15, 18, 21, 24]);
        assert_eq!(read(&RING, between(16, 23, 0)).0, [18, 21]);
        assert_eq!(read(&RING, between(15, 24, 2)).0, [15, 18]);
        assert_eq!(read(&RING, between(40, 50, 0)).0, [0_u64; 0]);
    }

    #[test]
    fn a_follower_gets_new_events_only_and_waits() {
        let follow = Range {
            follow: true,
            ..Range::default()
        };
        assert_eq!(read(&RING, follow), (vec![], Step::Wait));
        let last = Range { number: 1, ..follow };
        assert_eq!(read(&RING, last), (vec![27], Step::Wait));
        // The clock of `read` shows 100 s.
        let over = Range {
            until: Some(second(20)),
            ..follow
        };
        assert_eq!(read(&RING, over), (vec![], Step::End));
    }

    #[test]
    fn a_late_reader_is_told_how_many_events_it_lost() {
        let mut reader = Reader::new(
            &RING,
            Range {
                first: true,
                ..Range::default()
            },
        );
        let later = Numbers { first: 25, next: 45 };
        let mut steps = Vec::new();
        loop {
            let turn = Turn::new(9, Duration::from_secs(60));
            match reader.step(&later, second(100), turn, |_| true) {
                Step::End => break,
                step => steps.push(step),
            }
        }
        // The reader does not follow, so it ends at the event that was the newest at the request.
        let wanted = [
            Step::Lost(15),
            Step::Event(25),
            Step::Event(26),
            Step::Event(27),
            Step::Event(28),
            Step::Event(29),
        ];
        assert_eq!(steps, wanted);
    }

    #[test]
    fn contradictions_and_impossible_times_are_refused() {
        let time = |seconds, nanos| Some(prost_types::Timestamp { seconds, nanos });
        assert!(Range::new(0, true, true, None, None).is_err());
        for bad in [time(1, -1), time(1, 1_000_000_000), time(i64::MAX, 0)] {
            let error = Range::new(0, false, false, bad, None).unwrap_err();
            assert!(error.message().starts_with("since: "), "{error}");
            assert!(Range::new(0, false, false, None, bad).is_err());
        }
        let far = Range::new(0, false, false, time(253_402_300_799, 0), None).unwrap();
        assert_eq!(far.since, Some(Timestamp::MAX));
    }

    #[test]
    fn a_turn_ends_by_time_too_but_not_without_progress() {
        let range = Range::new(0, false, false, None, None).unwrap();
        let mut reader = Reader::new(&RING, range);
        let looked = std::cell::Cell::new(0);
        let none = |_: &u64| {
            looked.set(looked.get() + 1);
            false
        };
        let turn = Turn::new(1_000, Duration::ZERO);
        assert_eq!(reader.step(&RING, second(100), turn, none), Step::Busy);
        assert_eq!(looked.get(), 1);
    }
}
