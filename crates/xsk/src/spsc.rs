//! A wait-free ring between one writing and one reading thread. This module depends on nothing else in this crate;
//! start at [`ring`].
//!
//! Slots are allocated once and used in place, so a packet is copied once and never moved. The ends cannot be cloned
//! and their methods take `&mut self`, so the type system guarantees a single writer and a single reader.
//!
//! The queues of `crossbeam` and `rtrb` move values in and out, but a packet slot must be filled and read in place.
//! Also, this ring is model-checked with loom (`tests/loom.rs`), which requires loom's atomics in the implementation.

#[cfg(loom)]
use loom::{
    cell::UnsafeCell,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
#[cfg(not(loom))]
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use crossbeam_utils::CachePadded;

#[cfg(not(loom))]
use plain::UnsafeCell;

#[cfg(not(loom))]
mod plain {
    //! An `UnsafeCell` with the interface of `loom::cell::UnsafeCell`.

    #[derive(Debug)]
    pub(super) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(super) fn new(value: T) -> Self {
            Self(std::cell::UnsafeCell::new(value))
        }

        #[inline]
        pub(super) fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
            f(self.0.get())
        }
    }
}

/// The state that both ends share. Positions count slots since the start and wrap at `usize::MAX`; the index of a
/// position's slot is the position modulo the number of slots.
struct Ring<P> {
    slots: Box<[UnsafeCell<P>]>,
    /// Position of the next slot to write.
    written: CachePadded<AtomicUsize>,
    /// Position of the next slot to read.
    read: CachePadded<AtomicUsize>,
}

// SAFETY: one thread accesses a slot at a time. The slots of positions from `read` up to `written` belong to the
// reader, all others to the writer. Each end advances its own position only after its last access to the slot, with
// release ordering, and the other end loads that position with acquire ordering. Values of `P` cross threads, hence `P:
// Send`.
unsafe impl<P: Send> Sync for Ring<P> {}
// SAFETY: a ring owns its slots, so sending it to another thread sends values of `P` and nothing else; hence `P: Send`.
unsafe impl<P: Send> Send for Ring<P> {}

impl<P> Ring<P> {
    /// Returns the slot of a position. Every position has a slot, so this does not return `None`.
    #[inline]
    fn slot(&self, position: usize) -> Option<&UnsafeCell<P>> {
        // The number of slots is a power of two, see `ring`.
        self.slots.get(position & (self.slots.len() - 1))
    }
}

/// The writing end of a ring.
pub struct Writer<P> {
    ring: Arc<Ring<P>>,
    /// Copy of the shared `written`, which only this end changes.
    written: usize,
    /// Cached value of the shared `read`. It is reloaded only when the ring seems full, because each load takes the
    /// cache line from the reader's CPU.
    read: usize,
}

/// The reading end of a ring.
pub struct Reader<P> {
    ring: Arc<Ring<P>>,
    /// Copy of the shared `read`, which only this end changes.
    read: usize,
    /// Cached value of the shared `written`. It is reloaded only when the ring seems empty, because each load takes the
    /// cache line from the writer's CPU.
    written: usize,
}

/// Returns the ends of a ring with at least `min_slots` slots (rounded up to a power of two), each made by `make`.
#[must_use]
pub fn ring<P>(min_slots: usize, mut make: impl FnMut() -> P) -> (Writer<P>, Reader<P>) {
    let length = min_slots.max(1).next_power_of_two();
    let ring = Arc::new(Ring {
        slots: (0..length).map(|_| UnsafeCell::new(make())).collect(),
        written: CachePadded::new(AtomicUsize::new(0)),
        read: CachePadded::new(AtomicUsize::new(0)),
    });
    (
        Writer {
            ring: Arc::clone(&ring),
            written: 0,
            read: 0,
        },
        Reader {
            ring,
            read: 0,
            written: 0,
        },
    )
}

impl<P> Writer<P> {
    /// Calls `f` with the next slot, which still has the contents that the reader left, and publishes the slot. Returns
    /// `None` if the ring is full.
    #[inline]
    pub fn write<R>(&mut self, f: impl FnOnce(&mut P) -> R) -> Option<R> {
        let mut outcome = None;
        self.write_if(|slot| {
            outcome = Some(f(slot));
            true
        })?;
        outcome
    }

    /// Like [`Writer::write`], but publishes the slot only if `f` returns true.
    #[inline]
    pub fn write_if(&mut self, f: impl FnOnce(&mut P) -> bool) -> Option<bool> {
        if !self.has_room() {
            return None;
        }
        let publish = self.ring.slot(self.written)?.with_mut(|slot| {
            // SAFETY: the position is not published, so the reader does not access its slot (see `Ring`), and this end
            // is borrowed mutably, so there is no other writer.
            f(unsafe { &mut *slot })
        });
        if publish {
            self.written = self.written.wrapping_add(1);
            self.ring.written.store(self.written, Ordering::Release);
        }
        Some(publish)
    }

    /// Returns whether a slot is free.
    #[inline]
    pub fn has_room(&mut self) -> bool {
        let length = self.ring.slots.len();
        if self.written.wrapping_sub(self.read) == length {
            self.read = self.ring.read.load(Ordering::Acquire);
        }
        self.written.wrapping_sub(self.read) != length
    }

    /// Returns whether the reading end has been dropped.
    #[must_use]
    pub fn is_disconnected(&self) -> bool {
        Arc::strong_count(&self.ring) == 1
    }
}

impl<P> Reader<P> {
    /// Calls `f` with the oldest slot and then returns the slot to the writer. Returns `None` if the ring is empty.
    #[inline]
    pub fn read<R>(&mut self, f: impl FnOnce(&mut P) -> R) -> Option<R> {
        if self.available() == 0 {
            return None;
        }
        let outcome = self.ring.slot(self.read)?.with_mut(|slot| {
            // SAFETY: the position is published, so the writer does not access its slot until `read` has passed it (see
            // `Ring`), and this end is borrowed mutably, so there is no other reader.
            f(unsafe { &mut *slot })
        });
        self.read = self.read.wrapping_add(1);
        self.ring.read.store(self.read, Ordering::Release);
        Some(outcome)
    }

    /// Returns a lower bound of the number of filled slots; zero only if the ring is empty.
    #[inline]
    pub fn available(&mut self) -> usize {
        if self.read == self.written {
            self.written = self.ring.written.load(Ordering::Acquire);
        }
        self.written.wrapping_sub(self.read)
    }

    /// Returns whether the writing end has been dropped.
    #[must_use]
    pub fn is_disconnected(&self) -> bool {
        Arc::strong_count(&self.ring) == 1
    }
}

impl<T> Writer<Option<T>> {
    /// Appends a value.
    ///
    /// # Errors
    /// The ring is full. Returns the value.
    #[inline]
    pub fn push(&mut self, value: T) -> Result<(), T> {
        let mut value = Some(value);
        self.write(|slot| *slot = value.take());
        value.map_or(Ok(()), Err)
    }
}

impl<T> Reader<Option<T>> {
    /// Removes and returns the oldest value.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        self.read(Option::take).flatten()
    }
}

/// Returns the ends of a ring with at least `min_slots` slots, into and out of which values are moved.
#[must_use]
pub fn values<T>(min_slots: usize) -> (Writer<Option<T>>, Reader<Option<T>>) {
    ring(min_slots, || None)
}

impl<P> std::fmt::Debug for Writer<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writer at {}", self.written)
    }
}

impl<P> std::fmt::Debug for Reader<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Reader at {}", self.read)
    }
}
