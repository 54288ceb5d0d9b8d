//! The rings between threads: under load, and against a model. `tests/loom.rs` explores their interleavings.
#![cfg(not(loom))]

use std::{
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use palisade_xsk::{
    handoff::{self, SendError},
    spsc,
};
use proptest::prelude::*;

proptest! {
    #[test]
    fn a_ring_behaves_like_a_bounded_queue(
        min_slots in 0usize..9,
        steps in prop::collection::vec(prop::option::weighted(0.6, any::<u16>()), 0..200),
    ) {
        let (mut writer, mut reader) = spsc::values(min_slots);
        let length = min_slots.max(1).next_power_of_two();
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
            prop_assert_eq!(reader.available() == 0, model.is_empty());
            prop_assert!(reader.available() <= model.len());
        }
    }
}

#[test]
fn packets_between_threads_arrive_complete_and_in_order() {
    const COUNT: u64 = 300_000;
    let (mut sender, mut receiver) = handoff::ring(64, 128);
    let until = Instant::now() + Duration::from_secs(60);
    let thread = thread::spawn(move || {
        let mut packet = [0; 128];
        for n in 0..COUNT {
            let length = (n % 128) as usize + 1;
            packet[..length].fill(n as u8);
            while sender.send(n, &packet[..length]).is_err() {
                assert!(Instant::now() < until);
                thread::yield_now();
            }
        }
    });
    let mut next = 0;
    while next < COUNT {
        let received = receiver.receive(|n, packet| {
            assert_eq!(*n, next);
            assert_eq!(packet.len(), (next % 128) as usize + 1);
            assert!(packet.iter().all(|byte| *byte == next as u8));
        });
        if received.is_some() {
            next += 1;
        } else {
            assert!(Instant::now() < until);
            thread::yield_now();
        }
    }
    assert!(receiver.receive(|_, _| ()).is_none());
    thread.join().unwrap();
}

#[test]
fn a_packet_that_does_not_fit_leaves_the_ring_unchanged() {
    let (mut sender, mut receiver) = handoff::ring(2, 4);
    assert_eq!(sender.send(1, &[1; 5]), Err(SendError::TooLarge));
    assert_eq!(sender.send(2, &[2; 4]), Ok(()));
    assert_eq!(sender.send(3, &[]), Ok(()));
    assert_eq!(sender.send(4, &[4; 4]), Err(SendError::Full));
    assert_eq!(
        receiver.receive(|header, packet| (*header, packet.to_vec())),
        Some((2, vec![2; 4]))
    );
    assert_eq!(receiver.available(), 1);
    assert_eq!(
        receiver.receive(|header, packet| (*header, packet.to_vec())),
        Some((3, vec![]))
    );
    assert_eq!(receiver.receive(|header, _| *header), None);
}

#[test]
fn values_left_in_a_ring_are_dropped_with_it() {
    let value = Rc::new(());
    let (mut writer, mut reader) = spsc::values(4);
    for _ in 0..4 {
        writer.push(Rc::clone(&value)).unwrap();
    }
    assert!(writer.push(Rc::clone(&value)).is_err());
    drop(reader.pop());
    assert_eq!(Rc::strong_count(&value), 4);
    drop(reader);
    assert!(writer.is_disconnected());
    drop(writer);
    assert_eq!(Rc::strong_count(&value), 1);
}

#[test]
fn a_panic_while_writing_leaves_the_slot_unpublished() {
    let (mut writer, mut reader) = spsc::ring(2, || Arc::new(0));
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        writer.write(|_| panic!("in the test"));
    }));
    assert!(outcome.is_err());
    assert_eq!(reader.available(), 0);
    writer.write(|slot| *slot = Arc::new(1)).unwrap();
    assert_eq!(reader.read(|slot| **slot), Some(1));
}
