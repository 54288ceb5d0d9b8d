//! Memory-mapped arrays: read and written without system calls.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::AsRawFd as _,
    ptr::NonNull,
    sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering},
};

use palisade_abi::{CLASS_SLOTS, Class, EndpointState};

use super::{
    error::MapError,
    raw::{RawMap, check_layout},
};
use crate::sys::SyscallError;

type Result<T> = std::result::Result<T, MapError>;

/// Atomic types for access to map memory. Every bit pattern is a valid value, and other threads and programs can write
/// concurrently.
pub(crate) trait Atomic {}
impl Atomic for AtomicU16 {}
impl Atomic for AtomicU32 {}
impl Atomic for AtomicU64 {}

/// Memory of an array map, shared with the programs.
#[derive(Debug)]
pub(crate) struct Shared {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory is accessed only through atomics.
unsafe impl Send for Shared {}
// SAFETY: the memory is accessed only through atomics.
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn new(raw: &RawMap) -> Result<Self> {
        // The kernel rounds the size of an element up to 8 bytes.
        let length = (raw.info.value_size as usize).next_multiple_of(8) * raw.info.max_entries as usize;
        // SAFETY: the kernel chooses the address of the new mapping, so the call replaces no memory of this process.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                raw.fd.as_raw_fd(),
                0,
            )
        };
        let failed = || {
            let source = SyscallError::new(format!("mmap of {length} bytes"), io::Error::last_os_error());
            MapError::Syscall {
                map: raw.name.to_lowercase(),
                source,
            }
        };
        if base == libc::MAP_FAILED {
            return Err(failed());
        }
        Ok(Self {
            base: NonNull::new(base.cast()).ok_or_else(failed)?,
            length,
        })
    }

    /// Returns the atomic at a byte offset. Panics if the atomic is not inside the map or not aligned.
    pub(crate) fn at<A: Atomic>(&self, offset: usize) -> &A {
        assert!(offset + size_of::<A>() <= self.length && offset.is_multiple_of(align_of::<A>()));
        // SAFETY: the atomic is inside the mapping and aligned, since the mapping begins at a page boundary. This
        // process accesses the memory only through atomics, for which every bit pattern is valid, and the programs
        // write aligned words.
        unsafe { self.base.add(offset).cast::<A>().as_ref() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: `new` has mapped this address with this length, and no reference into the mapping outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// Heartbeats of the workers: the map WORKERS, memory-mapped.
#[derive(Debug)]
pub(crate) struct Heartbeats {
    memory: Shared,
    count: u32,
}

impl Heartbeats {
    pub(crate) fn new(raw: &RawMap) -> Result<Self> {
        check_layout(raw, size_of::<u32>(), size_of::<u64>())?;
        Ok(Self {
            memory: Shared::new(raw)?,
            count: raw.info.max_entries,
        })
    }

    /// Stores the time of a heartbeat, ns; does nothing for a queue without a slot.
    pub(crate) fn heartbeat(&self, queue: u32, now: u64) {
        if queue < self.count {
            self.memory
                .at::<AtomicU64>(queue as usize * size_of::<u64>())
                .store(now, Ordering::Relaxed);
        }
    }
}

/// States of the endpoints: the map ENDPOINTS, memory-mapped.
#[derive(Debug)]
pub(crate) struct Endpoints {
    raw: RawMap,
    memory: Shared,
}

impl Endpoints {
    /// Returns the states of endpoints, without those that are all zero.
    pub(crate) fn states(&self) -> BTreeMap<u16, EndpointState> {
        (0..=u16::MAX)
            .take(self.len() as usize)
            .map(|id| (id, self.get(id)))
            .filter(|(_, state)| *state != EndpointState::default())
            .collect()
    }

    pub(crate) fn new(raw: RawMap) -> Result<Self> {
        check_layout(&raw, size_of::<u32>(), size_of::<EndpointState>())?;
        Ok(Self {
            memory: Shared::new(&raw)?,
            raw,
        })
    }

    /// Stores a state. Policy and revision change together by one store, after identity and flags: a program that reads
    /// the new policy and then the identity gets the new identity.
    pub(crate) fn set(&self, endpoint: u16, state: EndpointState) {
        let offset = usize::from(endpoint) * size_of::<EndpointState>();
        self.memory
            .at::<AtomicU32>(offset + 8)
            .store(state.identity, Ordering::Relaxed);
        self.memory
            .at::<AtomicU32>(offset + 12)
            .store(state.flags, Ordering::Relaxed);
        self.memory
            .at::<AtomicU64>(offset)
            .store(policy_word(state.policy, state.revision), Ordering::Release);
    }

    pub(crate) fn get(&self, endpoint: u16) -> EndpointState {
        let offset = usize::from(endpoint) * size_of::<EndpointState>();
        let word = self
            .memory
            .at::<AtomicU64>(offset)
            .load(Ordering::Acquire)
            .to_ne_bytes();
        let identity = self.memory.at::<AtomicU32>(offset + 8).load(Ordering::Relaxed);
        let [p0, p1, p2, p3, r0, r1, r2, r3] = word;
        EndpointState {
            policy: u32::from_ne_bytes([p0, p1, p2, p3]),
            revision: u32::from_ne_bytes([r0, r1, r2, r3]),
            identity,
            flags: self.memory.at::<AtomicU32>(offset + 12).load(Ordering::Relaxed),
        }
    }

    pub(crate) fn len(&self) -> u32 {
        self.raw.info.max_entries
    }

    /// Returns the endpoints that have a policy.
    pub(crate) fn with_policy(&self) -> BTreeSet<u16> {
        (0..=u16::MAX)
            .filter(|&endpoint| u32::from(endpoint) < self.len() && self.get(endpoint).policy != 0)
            .collect()
    }
}

/// Returns the first eight bytes of an [`EndpointState`], in memory order, as one word.
fn policy_word(policy: u32, revision: u32) -> u64 {
    let ([p0, p1, p2, p3], [r0, r1, r2, r3]) = (policy.to_ne_bytes(), revision.to_ne_bytes());
    u64::from_ne_bytes([p0, p1, p2, p3, r0, r1, r2, r3])
}

/// Port classes: the map CLASSES, memory-mapped.
#[derive(Debug)]
pub(crate) struct Classes {
    memory: Shared,
}

impl Classes {
    pub(crate) fn new(raw: &RawMap) -> Result<Self> {
        check_layout(raw, size_of::<u32>(), CLASS_SLOTS * size_of::<Class>())?;
        Ok(Self {
            memory: Shared::new(raw)?,
        })
    }

    /// Stores the class of a slot. Returns whether the slot exists.
    pub(crate) fn set(&self, slot: u32, class: Class) -> bool {
        let slot = slot as usize;
        if slot >= CLASS_SLOTS {
            return false;
        }
        self.memory
            .at::<AtomicU16>(slot * size_of::<Class>())
            .store(class, Ordering::Release);
        true
    }

    pub(crate) fn all(&self) -> Vec<Class> {
        (0..CLASS_SLOTS)
            .map(|slot| self.memory.at::<AtomicU16>(slot * 2).load(Ordering::Acquire))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes as _;

    use super::*;

    #[test]
    fn the_policy_word_is_the_first_half_of_the_state() {
        let state = EndpointState {
            policy: 0x0102_0304,
            revision: 0x0506_0708,
            identity: 9,
            flags: 0,
        };
        assert_eq!(
            policy_word(state.policy, state.revision).to_ne_bytes(),
            state.as_bytes()[..8]
        );
        assert_eq!(9_u32.to_ne_bytes(), state.as_bytes()[8..12]);
    }
}
