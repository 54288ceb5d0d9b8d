//! Encoding of the state that a planned restart hands over.
//!
//! Numbers are little-endian, a sequence has its length in front. A reader takes no length for granted: each element of
//! a sequence needs at least one byte, so a false length allocates nothing beyond the input.

use std::collections::VecDeque;

use palisade_abi::{CtKey, PuntRequest, Reason};
use zerocopy::{FromBytes as _, IntoBytes as _};

/// Reads values from the front of a slice.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Removes the next `n` bytes.
    pub(crate) fn bytes(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Removes the length of a sequence whose elements have at least one byte each.
    fn length(&mut self) -> Option<usize> {
        let length = usize::try_from(u32::read(self)?).ok()?;
        (length <= self.0.len()).then_some(length)
    }
}

/// A value that is handed over.
pub(crate) trait Wire: Sized {
    /// Appends the value.
    fn write(&self, out: &mut Vec<u8>);
    /// Removes the value from the front; `None` if the bytes are no such value.
    fn read(from: &mut Reader<'_>) -> Option<Self>;
}

/// Implements [`Wire`] for a struct: its fields in the given order.
macro_rules! wire {
    ($type:ty { $($field:ident),* $(,)? }) => {
        impl $crate::handover::wire::Wire for $type {
            fn write(&self, out: &mut Vec<u8>) {
                $($crate::handover::wire::Wire::write(&self.$field, out);)*
            }
            fn read(from: &mut $crate::handover::wire::Reader<'_>) -> Option<Self> {
                $(let $field = $crate::handover::wire::Wire::read(from)?;)*
                Some(Self { $($field),* })
            }
        }
    };
}
pub(crate) use wire;

macro_rules! number {
    ($($type:ty),*) => {$(
        impl Wire for $type {
            fn write(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn read(from: &mut Reader<'_>) -> Option<Self> {
                let bytes = from.bytes(size_of::<Self>())?;
                Some(Self::from_le_bytes(bytes.try_into().ok()?))
            }
        }
    )*};
}
number!(u8, u16, u32, u64, i16, i32);

/// A length in memory.
impl Wire for usize {
    fn write(&self, out: &mut Vec<u8>) {
        (*self as u64).write(out);
    }
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        u64::read(from)?.try_into().ok()
    }
}

impl Wire for bool {
    fn write(&self, out: &mut Vec<u8>) {
        u8::from(*self).write(out);
    }
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        match u8::read(from)? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }
}

impl<T: Wire> Wire for Option<T> {
    fn write(&self, out: &mut Vec<u8>) {
        self.is_some().write(out);
        if let Some(value) = self {
            value.write(out);
        }
    }
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(if bool::read(from)? {
            Some(T::read(from)?)
        } else {
            None
        })
    }
}

impl Wire for () {
    fn write(&self, _: &mut Vec<u8>) {}
    fn read(_: &mut Reader<'_>) -> Option<Self> {
        Some(())
    }
}

impl<A: Wire, B: Wire> Wire for (A, B) {
    fn write(&self, out: &mut Vec<u8>) {
        self.0.write(out);
        self.1.write(out);
    }
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some((A::read(from)?, B::read(from)?))
    }
}

impl Wire for [u32; 2] {
    fn write(&self, out: &mut Vec<u8>) {
        (self[0], self[1]).write(out);
    }
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let (a, b) = Wire::read(from)?;
        Some([a, b])
    }
}

impl<T: Wire> Wire for VecDeque<T> {
    fn write(&self, out: &mut Vec<u8>) {
        (self.len() as u32).write(out);
        for value in self {
            value.write(out);
        }
    }
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        (0..from.length()?).map(|_| T::read(from)).collect()
    }
}

/// Writes bytes with their length in front.
pub(crate) fn write_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    (bytes.len() as u32).write(out);
    out.extend_from_slice(bytes);
}

/// Reads what [`write_bytes`] has written.
pub(crate) fn read_bytes<'a>(from: &mut Reader<'a>) -> Option<&'a [u8]> {
    let length = from.length()?;
    from.bytes(length)
}

impl Wire for Box<[u8]> {
    fn write(&self, out: &mut Vec<u8>) {
        write_bytes(self, out);
    }
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        read_bytes(from).map(Into::into)
    }
}

impl Wire for Vec<u8> {
    fn write(&self, out: &mut Vec<u8>) {
        write_bytes(self, out);
    }
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        read_bytes(from).map(Into::into)
    }
}

/// Layouts that the BPF programs use too: as in memory. The reader is on the same machine.
macro_rules! plain {
    ($($type:ty),*) => {$(
        impl Wire for $type {
            fn write(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(self.as_bytes());
            }
            fn read(from: &mut Reader<'_>) -> Option<Self> {
                Self::read_from_bytes(from.bytes(size_of::<Self>())?).ok()
            }
        }
    )*};
}
plain!(palisade_abi::Addr, CtKey, PuntRequest);

impl Wire for Reason {
    fn write(&self, out: &mut Vec<u8>) {
        (*self as u8).write(out);
    }
    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Self::from_u8(u8::read(from)?)
    }
}
