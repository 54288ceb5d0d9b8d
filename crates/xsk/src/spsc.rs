//! A ring between two threads: one puts in, one takes out, neither ever waits for the other.
//!
//! The places of a ring are made once and used in place, so that what is large need not be moved. That there is one
//! of each end is a matter of types: the ends cannot be cloned, and using one takes it mutably.

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
    //! The interface of loom's cell, which sees whether two threads are in it.

    #[derive(Debug)]
    pub struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub fn new(value: T) -> Self {
            Self(std::cell::UnsafeCell::new(value))
        }

        #[inline]
        pub fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
            f(self.0.get())
        }
    }
}

/// What both ends share. Positions only grow (and wrap); a place is a position modulo the length.
struct Ring<P> {
    places: Box<[UnsafeCell<P>]>,
    /// Up to here it has been written.
    written: CachePadded<AtomicUsize>,
    /// Up to here it has been read.
    read: CachePadded<AtomicUsize>,
}

// SAFETY: a place is touched by one thread at a time: by the writer from `read` + length to `written`, which it alone
// moves, and by the reader from there. Each moves its position only after it is done with the place, with release, and
// the other reads it with acquire. What goes from thread to thread is `P`, so it has to be `Send`.
unsafe impl<P: Send> Sync for Ring<P> {}
// SAFETY: as above; a ring that goes to another thread as a whole takes its places with it.
unsafe impl<P: Send> Send for Ring<P> {}

impl<P> Ring<P> {
    fn place(&self, position: usize) -> &UnsafeCell<P> {
        // A power of two, see `ring`.
        &self.places[position & (self.places.len() - 1)]
    }
}

/// The end that puts in.
pub struct Writer<P> {
    ring: Arc<Ring<P>>,
    /// What `written` says; nobody else moves it.
    written: usize,
    /// What `read` said when it was last looked at: it is looked at only if the ring seems full.
    read: usize,
}

/// The end that takes out.
pub struct Reader<P> {
    ring: Arc<Ring<P>>,
    /// What `read` says; nobody else moves it.
    read: usize,
    /// What `written` said when it was last looked at: it is looked at only if the ring seems empty.
    written: usize,
}

/// A ring of at least `least` places, each made by `make`. There are as many as the next power of two.
#[must_use]
pub fn ring<P>(least: usize, mut make: impl FnMut() -> P) -> (Writer<P>, Reader<P>) {
    let length = least.max(1).next_power_of_two();
    let ring = Arc::new(Ring {
        places: (0..length).map(|_| UnsafeCell::new(make())).collect(),
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
    /// Has the next place written, which holds whatever the reader left there. None: the ring is full.
    #[inline]
    pub fn write<R>(&mut self, f: impl FnOnce(&mut P) -> R) -> Option<R> {
        let mut outcome = None;
        self.write_if(|place| {
            outcome = Some(f(place));
            true
        })?;
        outcome
    }

    /// As [`Writer::write`], but the place counts as written only if it is said to be.
    #[inline]
    pub fn write_if(&mut self, f: impl FnOnce(&mut P) -> bool) -> Option<bool> {
        if !self.has_room() {
            return None;
        }
        let good = self.ring.place(self.written).with_mut(|place| {
            // SAFETY: the position is not yet written and the reader is done with its place, see `Ring`; this end is
            // borrowed mutably, so nobody else writes.
            f(unsafe { &mut *place })
        });
        if good {
            self.written = self.written.wrapping_add(1);
            self.ring.written.store(self.written, Ordering::Release);
        }
        Some(good)
    }

    /// Whether there is a place.
    #[inline]
    pub fn has_room(&mut self) -> bool {
        let length = self.ring.places.len();
        if self.written.wrapping_sub(self.read) == length {
            self.read = self.ring.read.load(Ordering::Acquire);
        }
        self.written.wrapping_sub(self.read) != length
    }

    /// Whether nobody reads any more.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        Arc::strong_count(&self.ring) == 1
    }
}

impl<P> Reader<P> {
    /// Has the oldest place read, which the writer gets back as it is left. None: there is nothing.
    #[inline]
    pub fn read<R>(&mut self, f: impl FnOnce(&mut P) -> R) -> Option<R> {
        if self.waiting() == 0 {
            return None;
        }
        let outcome = self.ring.place(self.read).with_mut(|place| {
            // SAFETY: the position is written and the writer does not touch it until it is read, see `Ring`; this end
            // is borrowed mutably, so nobody else reads.
            f(unsafe { &mut *place })
        });
        self.read = self.read.wrapping_add(1);
        self.ring.read.store(self.read, Ordering::Release);
        Some(outcome)
    }

    /// As many wait, at least.
    #[inline]
    pub fn waiting(&mut self) -> usize {
        if self.read == self.written {
            self.written = self.ring.written.load(Ordering::Acquire);
        }
        self.written.wrapping_sub(self.read)
    }

    /// Whether nobody writes any more.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        Arc::strong_count(&self.ring) == 1
    }
}

impl<T> Writer<Option<T>> {
    /// Puts a value in.
    ///
    /// # Errors
    /// The ring is full: the value comes back.
    #[inline]
    pub fn push(&mut self, value: T) -> Result<(), T> {
        let mut value = Some(value);
        self.write(|place| *place = value.take());
        value.map_or(Ok(()), Err)
    }
}

impl<T> Reader<Option<T>> {
    /// Takes the oldest value out.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        self.read(Option::take).flatten()
    }
}

/// A ring of values.
#[must_use]
pub fn values<T>(least: usize) -> (Writer<Option<T>>, Reader<Option<T>>) {
    ring(least, || None)
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
