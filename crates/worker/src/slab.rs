//! Frames that an engine has a handle on.

/// A handle on a frame: whoever has it decides about the frame, once.
#[derive(Debug, PartialEq, Eq)]
pub struct Handle(u32);

impl Handle {
    fn index(&self) -> usize {
        self.0 as usize
    }
}

/// Frames by handle.
#[derive(Debug)]
pub struct Slab<T> {
    places: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    /// Room for so many.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            places: (0..capacity).map(|_| None).collect(),
            free: (0..capacity as u32).rev().collect(),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }

    /// Puts one in. It comes back if there is no room.
    pub fn put(&mut self, item: T) -> Result<Handle, T> {
        match self.free.pop() {
            Some(index) => {
                self.places[index as usize] = Some(item);
                Ok(Handle(index))
            }
            None => Err(item),
        }
    }

    /// Looks at one.
    #[must_use]
    pub fn get(&self, handle: &Handle) -> Option<&T> {
        self.places.get(handle.index())?.as_ref()
    }

    /// Changes one.
    pub fn get_mut(&mut self, handle: &Handle) -> Option<&mut T> {
        self.places.get_mut(handle.index())?.as_mut()
    }

    /// Takes one out.
    pub fn take(&mut self, handle: Handle) -> Option<T> {
        let item = self.places.get_mut(handle.index())?.take();
        if item.is_some() {
            self.free.push(handle.0);
        }
        item
    }
}
