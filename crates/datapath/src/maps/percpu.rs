//! Arrays with one value for each CPU.

use std::{marker::PhantomData, os::fd::AsFd as _};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    error::MapError,
    raw::{RawMap, check_layout},
};
use crate::sys::bpf;

type Result<T> = std::result::Result<T, MapError>;

/// Array with one value for each CPU.
#[derive(Debug)]
pub(crate) struct PerCpuArray<V> {
    raw: RawMap,
    types: PhantomData<fn() -> V>,
}

impl<V: FromBytes + IntoBytes + Immutable + Copy> PerCpuArray<V> {
    pub(crate) fn new(raw: RawMap) -> Result<Self> {
        check_layout(&raw, size_of::<u32>(), size_of::<V>())?;
        Ok(Self {
            raw,
            types: PhantomData,
        })
    }

    pub(crate) fn len(&self) -> u32 {
        self.raw.info.max_entries
    }

    /// Returns the values of all CPUs at an index; empty beyond the end of the array.
    pub(crate) fn get(&self, index: u32) -> Result<Vec<V>> {
        let mut bytes = vec![0; self.raw.value_stride];
        let found =
            bpf::lookup(self.raw.fd.as_fd(), index.as_bytes(), &mut bytes).map_err(|e| self.raw.error(e))?;
        Ok(if found {
            self.split(&bytes).collect()
        } else {
            Vec::new()
        })
    }

    /// Stores `value` for the first CPU and zero for the others. Use it only for slots that no program writes.
    pub(crate) fn set(&self, index: u32, value: &V) -> Result<()> {
        let mut bytes = vec![0; self.raw.value_stride];
        bytes[..size_of::<V>()].copy_from_slice(value.as_bytes());
        self.raw
            .update(index.as_bytes(), &bytes, 0)
            .map_err(|e| self.raw.error(e))
    }

    /// Calls `each` for all slots.
    pub(crate) fn for_each(&self, mut each: impl FnMut(u32, &mut dyn Iterator<Item = V>)) -> Result<()> {
        self.raw.for_each(|key, value| {
            if let Ok(index) = u32::read_from_bytes(key) {
                each(index, &mut self.split(value));
            }
        })
    }

    fn split<'a>(&self, bytes: &'a [u8]) -> impl Iterator<Item = V> + 'a {
        let stride = size_of::<V>().next_multiple_of(8);
        bytes
            .chunks_exact(stride)
            .filter_map(|chunk| V::read_from_prefix(chunk).ok().map(|(value, _)| value))
    }
}
