//! The rings between threads, at speed and against a model. All orders of few steps: `tests/loom.rs`.
#![cfg(not(loom))]

use std::{
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use palisade_xsk::{
    handoff::{self, NotGiven},
    spsc,
};
use proptest::prelude::*;

proptest! {
    #[test]
    fn a_ring_is_a_queue_that_can_be_full(
        least in 0usize..9,
        steps in prop::collection::vec(prop::option::weighted(0.6, any::<u16>()), 0..200),
    ) {
        let (mut writer, mut reader) = spsc::values(least);
        let length = least.max(1).next_power_of_two();
        let mut model = VecDeque::new();
        for step in steps {
            match step {
                Some(value) => {
                    prop_assert_eq!(writer.has_room(), model.len() < length);
                    let pushed = writer.push(value);
                    if model.len() < length {
                        prop_assert_eq!(pushed, Ok(()));
                        model.push_back(value);
                    } else {
                        prop_assert_eq!(pushed, Err(value));
                    }
                }
                None => prop_assert_eq!(reader.pop(), model.pop_front()),
            }
            prop_assert_eq!(reader.waiting() == 0, model.is_empty());
            prop_assert!(reader.waiting() <= model.len());
        }
    }
}

#[test]
fn between_threads_nothing_is_lost_and_the_order_stays() {
    const COUNT: u64 = 300_000;
    let (mut giver, mut taker) = handoff::ring(64, 128);
    let until = Instant::now() + Duration::from_secs(60);
    let thread = thread::spawn(move || {
        let mut packet = [0; 128];
        for n in 0..COUNT {
            let length = (n % 128) as usize + 1;
            packet[..length].fill(n as u8);
            while giver.give(n, &packet[..length]).is_err() {
                assert!(Instant::now() < until);
                thread::yield_now();
            }
        }
    });
    let mut next = 0;
    while next < COUNT {
        let taken = taker.take(|n, packet| {
            assert_eq!(*n, next);
            assert_eq!(packet.len(), (next % 128) as usize + 1);
            assert!(packet.iter().all(|byte| *byte == next as u8));
        });
        if taken.is_some() {
            next += 1;
        } else {
            assert!(Instant::now() < until);
            thread::yield_now();
        }
    }
    assert!(taker.take(|_, _| ()).is_none());
    thread.join().unwrap();
}

#[test]
fn what_cannot_be_handed_on_leaves_no_trace() {
    let (mut giver, mut taker) = handoff::ring(2, 4);
    assert_eq!(giver.give(1, &[1; 5]), Err(NotGiven::TooLarge));
    assert_eq!(giver.give(2, &[2; 4]), Ok(()));
    assert_eq!(giver.give(3, &[]), Ok(()));
    assert_eq!(giver.give(4, &[4; 4]), Err(NotGiven::Full));
    assert_eq!(
        taker.take(|header, packet| (*header, packet.to_vec())),
        Some((2, vec![2; 4]))
    );
    assert_eq!(taker.waiting(), 1);
    assert_eq!(
        taker.take(|header, packet| (*header, packet.to_vec())),
        Some((3, vec![]))
    );
    assert_eq!(taker.take(|header, _| *header), None);
}

#[test]
fn what_nobody_took_is_dropped() {
    let value = Rc::new(());
    let (mut writer, mut reader) = spsc::values(4);
    for _ in 0..4 {
        writer.push(Rc::clone(&value)).unwrap();
    }
    assert!(writer.push(Rc::clone(&value)).is_err());
    drop(reader.pop());
    assert_eq!(Rc::strong_count(&value), 4);
    drop(reader);
    assert!(writer.is_alone());
    drop(writer);
    assert_eq!(Rc::strong_count(&value), 1);
}

#[test]
fn a_panic_in_the_middle_leaves_the_place_where_it_was() {
    let (mut writer, mut reader) = spsc::ring(2, || Arc::new(0));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        writer.write(|_| panic!("of the test"));
    }));
    assert!(outcome.is_err());
    assert_eq!(reader.waiting(), 0);
    writer.write(|place| *place = Arc::new(1)).unwrap();
    assert_eq!(reader.read(|place| **place), Some(1));
}
