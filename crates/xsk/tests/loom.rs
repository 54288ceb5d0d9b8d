//! The rings between threads, under every order that the memory model allows.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p palisade-xsk --test loom --target-dir target/loom`
#![cfg(loom)]

use loom::{model::Builder, thread};
use palisade_xsk::{handoff, spsc};

/// All orders with up to so many switches where neither thread has to wait: those without a bound take a quarter of
/// an hour, and found nothing either.
fn model(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(f);
}

/// Two places, three values: the ring is full, is empty, and wraps.
#[test]
fn values_come_out_once_and_in_order() {
    model(|| {
        let (mut writer, mut reader) = spsc::values(2);
        let thread = thread::spawn(move || {
            let mut next = 0;
            while next < 3 {
                match writer.push(next) {
                    Ok(()) => next += 1,
                    Err(back) => {
                        assert_eq!(back, next);
                        thread::yield_now();
                    }
                }
            }
        });
        let mut seen = 0;
        while seen < 3 {
            match reader.pop() {
                Some(value) => {
                    assert_eq!(value, seen);
                    seen += 1;
                }
                None => thread::yield_now(),
            }
        }
        assert_eq!(reader.pop(), None);
        thread.join().unwrap();
    });
}

/// Nobody waits here: what does not fit is shed, as a worker does.
#[test]
fn what_is_shed_was_not_handed_on() {
    model(|| {
        let (mut giver, mut taker) = handoff::ring(1, 4);
        let thread = thread::spawn(move || {
            let mut given = Vec::new();
            for n in 1..=3u8 {
                if giver.give(n, &[n; 3]).is_ok() {
                    given.push(n);
                }
            }
            given
        });
        let mut seen = Vec::new();
        for _ in 0..2 {
            taker.take(|header, packet| {
                assert_eq!(packet, [*header; 3], "torn");
                seen.push(*header);
            });
        }
        let given = thread.join().unwrap();
        while taker.take(|header, _| seen.push(*header)).is_some() {}
        assert_eq!(given, seen);
    });
}

/// Values that are left in a ring are dropped with it, by whichever end is the last.
#[test]
fn what_nobody_took_is_dropped_once() {
    model(|| {
        let value = loom::sync::Arc::new(());
        let (mut writer, mut reader) = spsc::values(2);
        let given = value.clone();
        let thread = thread::spawn(move || {
            writer.push(given).unwrap();
        });
        drop(reader.pop());
        drop(reader);
        thread.join().unwrap();
        assert_eq!(loom::sync::Arc::strong_count(&value), 1);
    });
}

#[test]
fn an_end_knows_when_it_is_alone() {
    model(|| {
        let (writer, reader) = spsc::values::<u8>(1);
        assert!(!writer.is_alone());
        let thread = thread::spawn(move || drop(writer));
        thread.join().unwrap();
        assert!(reader.is_alone());
    });
}
