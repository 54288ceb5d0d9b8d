//! The rings between threads, model-checked with loom.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p palisade-xsk --test loom --target-dir target/loom`
#![cfg(loom)]

use loom::{model::Builder, thread};
use palisade_xsk::{handoff, spsc};

/// Explores all interleavings with at most two preemptions. Without a bound the tests take fifteen minutes; one such
/// run found nothing either.
fn model(f: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(f);
}

/// Two slots and three values, so the ring gets full, gets empty and wraps.
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

/// Neither thread waits: the sender drops what does not fit, as a worker does.
#[test]
fn the_receiver_gets_exactly_the_packets_whose_send_succeeded() {
    model(|| {
        let (mut sender, mut receiver) = handoff::ring(1, 4);
        let thread = thread::spawn(move || {
            let mut sent = Vec::new();
            for n in 1..=3u8 {
                if sender.send(n, &[n; 3]).is_ok() {
                    sent.push(n);
                }
            }
            sent
        });
        let mut seen = Vec::new();
        for _ in 0..2 {
            receiver.receive(|header, packet| {
                assert_eq!(packet, [*header; 3], "torn");
                seen.push(*header);
            });
        }
        let sent = thread.join().unwrap();
        while receiver.receive(|header, _| seen.push(*header)).is_some() {}
        assert_eq!(sent, seen);
    });
}

/// Values that are left in a ring are dropped with its last end.
#[test]
fn values_left_in_a_ring_are_dropped_once() {
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
fn an_end_notices_that_the_other_was_dropped() {
    model(|| {
        let (writer, reader) = spsc::values::<u8>(1);
        assert!(!writer.is_disconnected());
        let thread = thread::spawn(move || drop(writer));
        thread.join().unwrap();
        assert!(reader.is_disconnected());
    });
}
