//! The frames that an inspector holds, by handle: the `slab` crate with a bound and with keys that can be used once.

/// A handle on a held frame. It cannot be cloned, and deciding about the frame consumes it, so there is one decision
/// per frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Handle(u32);

impl Handle {
    fn key(&self) -> usize {
        self.0 as usize
    }
}

/// A bounded slab whose keys are [`Handle`]s.
#[derive(Debug)]
pub struct Slab<T> {
    items: slab::Slab<T>,
    capacity: usize,
}

impl<T> Slab<T> {
    /// Creates a slab for `capacity` items; it never allocates again.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            items: slab::Slab::with_capacity(capacity),
            capacity,
        }
    }

    /// Returns the number of items.
    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Inserts an item and returns its handle.
    ///
    /// # Errors
    /// The slab is full. Returns the item.
    pub fn insert(&mut self, item: T) -> Result<Handle, T> {
        if self.items.len() >= self.capacity {
            return Err(item);
        }
        Ok(Handle(self.items.insert(item) as u32))
    }

    /// Returns the item of a handle.
    #[must_use]
    pub fn get(&self, handle: &Handle) -> Option<&T> {
        self.items.get(handle.key())
    }

    /// Returns the item of a handle.
    pub fn get_mut(&mut self, handle: &Handle) -> Option<&mut T> {
        self.items.get_mut(handle.key())
    }

    /// Removes and returns the item of a handle.
    pub fn remove(&mut self, handle: Handle) -> Option<T> {
        self.items.try_remove(handle.key())
    }
}
