//! Packets that came in by the queue of another worker than the one that owns their flow. They are copied, since a
//! frame belongs to its socket: full buffers go one way, empty ones come back.

use crossbeam_channel::{Receiver, Sender, bounded};

/// A copied packet.
#[derive(Debug)]
struct Parcel {
    bytes: Box<[u8]>,
    length: usize,
}

/// The end that hands on.
#[derive(Debug)]
pub struct Giver {
    full: Sender<Parcel>,
    empty: Receiver<Parcel>,
}

/// The end that takes.
#[derive(Debug)]
pub struct Taker {
    full: Receiver<Parcel>,
    empty: Sender<Parcel>,
}

/// A ring of `depth` buffers of `size` bytes from one worker to another.
#[must_use]
pub fn ring(depth: usize, size: usize) -> (Giver, Taker) {
    let (full, taken) = bounded(depth);
    let (returned, empty) = bounded(depth);
    for _ in 0..depth {
        // It has room for as many.
        let _ = returned.try_send(Parcel {
            bytes: vec![0; size].into(),
            length: 0,
        });
    }
    (
        Giver { full, empty },
        Taker {
            full: taken,
            empty: returned,
        },
    )
}

impl Giver {
    /// Hands a copy on. False: the other end has too many already, or the packet is larger than a buffer.
    pub fn give(&self, bytes: &[u8]) -> bool {
        let Ok(mut parcel) = self.empty.try_recv() else {
            return false;
        };
        let fits = parcel.bytes.get_mut(..bytes.len());
        parcel.length = fits.map_or(0, |room| {
            room.copy_from_slice(bytes);
            bytes.len()
        });
        let given = parcel.length != 0;
        // One that could not be filled goes the same way, so that none is lost. It has room for all there are.
        self.full.try_send(parcel).is_ok() && given
    }
}

impl Taker {
    /// Has a look at the next packet, if there is one.
    pub fn take(&self, look: impl FnOnce(&[u8])) -> bool {
        let Ok(parcel) = self.full.try_recv() else {
            return false;
        };
        if parcel.length != 0 {
            look(&parcel.bytes[..parcel.length]);
        }
        let _ = self.empty.try_send(parcel);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn buffers_go_round() {
        let (giver, taker) = ring(2, 4);
        for round in 0..10u8 {
            assert!(giver.give(&[round; 4]));
            assert!(giver.give(&[round]));
            assert!(!giver.give(&[9]), "full");
            let mut seen = Vec::new();
            assert!(taker.take(|bytes| seen.push(bytes.to_vec())));
            assert!(!giver.give(&[1; 5]), "too large");
            assert!(taker.take(|bytes| seen.push(bytes.to_vec())));
            assert!(taker.take(|_| panic!("nothing was given")));
            assert!(!taker.take(|_| {}));
            assert_eq!(seen, [vec![round; 4], vec![round]]);
        }
    }

    #[test]
    fn between_threads_nothing_is_lost_and_the_order_stays() {
        let (giver, taker) = ring(8, 4);
        let thread = thread::spawn(move || {
            for n in 0..100_000u32 {
                while !giver.give(&n.to_ne_bytes()) {
                    thread::yield_now();
                }
            }
        });
        let mut next = 0u32;
        while next < 100_000 {
            if !taker.take(|bytes| {
                assert_eq!(bytes, next.to_ne_bytes());
                next += 1;
            }) {
                thread::yield_now();
            }
        }
        thread.join().unwrap();
    }
}
