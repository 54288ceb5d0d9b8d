//! Access to the maps: by bytes where sizes are known at run time only, by type everywhere else.
//!
//! Sizes are checked once, when a map is opened; after that a buffer of the wrong size cannot be made.

use std::{
    collections::BTreeSet,
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use palisade_abi::{CLASS_SLOTS, Class, EndpointState};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::sys::{
    SyscallError,
    bpf::{self, ENOTSUPP, map_type},
};

/// Elements per batch call: large enough that the call's cost vanishes, small enough that a bucket lock or the
/// copies of keys and values do not matter.
const BATCH: usize = 4096;

/// An operation on a map that failed.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// No room for another entry.
    #[error("{map} map full: {present} of {max_entries} entries")]
    Full {
        /// The map, in lower case.
        map: String,
        /// Entries in it.
        present: usize,
        /// Its size.
        max_entries: u32,
    },
    /// The kernel refused.
    #[error("{map} map: {source}")]
    Syscall {
        /// The map.
        map: String,
        /// What it said.
        #[source]
        source: SyscallError,
    },
    /// The object and this code do not agree about a map.
    #[error(
        "{map} map has keys of {key_size} and values of {value_size} bytes, this program wants {want_key} and \
         {want_value}: the BPF object and the daemon are of different versions"
    )]
    Layout {
        /// The map.
        map: String,
        /// Its size of keys.
        key_size: u32,
        /// Its size of values.
        value_size: u32,
        /// What the type has.
        want_key: usize,
        /// What the type has.
        want_value: usize,
    },
}

type Result<T> = std::result::Result<T, MapError>;

impl MapError {
    /// Returns the map that has to be larger for the operation to succeed, if that is the cause.
    #[must_use]
    pub fn too_small(&self) -> Option<&str> {
        match self {
            Self::Full { map, .. } => Some(map),
            Self::Syscall { .. } | Self::Layout { .. } => None,
        }
    }
}

/// A map whose sizes are known at run time.
#[derive(Debug)]
pub(crate) struct RawMap {
    pub fd: OwnedFd,
    pub name: String,
    pub info: bpf::MapInfo,
    /// Bytes of a value as the system call moves it: per-CPU maps have one value per possible CPU, each rounded up to 8.
    pub value_stride: usize,
    batches: AtomicBool,
}

impl RawMap {
    pub fn new(name: &str, fd: OwnedFd) -> std::result::Result<Self, SyscallError> {
        let info = bpf::map_info(fd.as_fd())?;
        let value_stride = if info.map_type == map_type::PERCPU_ARRAY {
            (info.value_size as usize).next_multiple_of(8) * possible_cpus()?
        } else {
            info.value_size as usize
        };
        Ok(Self {
            fd,
            name: name.to_owned(),
            info,
            value_stride,
            batches: AtomicBool::new(true),
        })
    }

    pub fn key_size(&self) -> usize {
        self.info.key_size as usize
    }

    /// Puts the map's name to an error; a refusal for want of room becomes [`MapError::Full`].
    pub fn error(&self, source: SyscallError) -> MapError {
        // Hash and LRU maps and tries: E2BIG, ENOSPC.
        if matches!(source.errno(), libc::E2BIG | libc::ENOSPC) && self.info.map_type != map_type::ARRAY {
            return MapError::Full {
                map: self.name.to_lowercase(),
                present: self.count().unwrap_or(self.info.max_entries as usize),
                max_entries: self.info.max_entries,
            };
        }
        MapError::Syscall {
            map: self.name.to_lowercase(),
            source,
        }
    }

    pub fn count(&self) -> Result<usize> {
        let mut count = 0;
        self.for_each(|_, _| count += 1)?;
        Ok(count)
    }

    pub fn update(&self, key: &[u8], value: &[u8], flags: u64) -> std::result::Result<(), SyscallError> {
        debug_assert_eq!((key.len(), value.len()), (self.key_size(), self.value_stride));
        // Without preallocation an element comes from a per-CPU cache that is refilled asynchronously (ENOMEM), and
        // a bucket may be locked by a program on this CPU (EBUSY): both pass in no time.
        let mut tries = 0;
        loop {
            match bpf::update(self.fd.as_fd(), key, value, flags) {
                Err(e) if transient(&e) && tries < 20 => {
                    tries += 1;
                    std::thread::sleep(Duration::from_micros(50 * tries));
                }
                other => return other,
            }
        }
    }

    /// Writes elements that lie one after another; answers how many were written before the error.
    pub fn update_all(&self, keys: &[u8], values: &[u8]) -> std::result::Result<(), (usize, SyscallError)> {
        let (k, v) = (self.key_size(), self.value_stride);
        let total = keys.len() / k;
        let mut done = 0;
        let mut tries = 0;
        while self.batches.load(Ordering::Relaxed) && done < total {
            let count = (total - done).min(BATCH);
            let outcome = bpf::update_batch(
                self.fd.as_fd(),
                &keys[done * k..],
                &values[done * v..],
                count as u32,
            );
            done += outcome.done.min(count);
            match outcome.error {
                None => tries = 0,
                Some(e) if no_batches(&e) => self.batches.store(false, Ordering::Relaxed),
                Some(e) if transient(&e) && tries < 20 => {
                    tries += 1;
                    std::thread::sleep(Duration::from_micros(50 * tries));
                }
                Some(e) => return Err((done, e)),
            }
        }
        for i in done..total {
            self.update(&keys[i * k..][..k], &values[i * v..][..v], 0)
                .map_err(|e| (i, e))?;
        }
        Ok(())
    }

    /// Deletes keys that lie one after another; those that do not exist are no error.
    pub fn delete_all(&self, keys: &[u8]) -> std::result::Result<(), SyscallError> {
        let k = self.key_size();
        let total = keys.len() / k;
        let mut done = 0;
        let mut tries = 0;
        while self.batches.load(Ordering::Relaxed) && done < total {
            let count = (total - done).min(BATCH);
            let outcome = bpf::delete_batch(self.fd.as_fd(), &keys[done * k..], count as u32);
            done += outcome.done.min(count);
            match outcome.error {
                None => tries = 0,
                Some(e) if no_batches(&e) => self.batches.store(false, Ordering::Relaxed),
                Some(e) if e.errno() == libc::ENOENT => done += 1,
                Some(e) if transient(&e) && tries < 20 => {
                    tries += 1;
                    std::thread::sleep(Duration::from_micros(50 * tries));
                }
                Some(e) => return Err(e),
            }
        }
        for key in keys[done.min(total) * k..].chunks_exact(k) {
            bpf::delete(self.fd.as_fd(), key)?;
        }
        Ok(())
    }

    /// Walks all elements. While others write, an element may be missed or seen twice.
    pub fn for_each(&self, mut each: impl FnMut(&[u8], &[u8])) -> Result<()> {
        if self.batches.load(Ordering::Relaxed) && self.walk_by_batches(&mut each)? {
            return Ok(());
        }
        self.walk_by_keys(&mut each)
    }

    /// False if the kernel has no batches for this map; then nothing was given to `each`.
    fn walk_by_batches(&self, each: &mut impl FnMut(&[u8], &[u8])) -> Result<bool> {
        let (k, v) = (self.key_size(), self.value_stride);
        // The cursor of a hash map is a bucket number, that of others is a key.
        let mut cursor = vec![0_u8; k.max(8)];
        let mut next = vec![0_u8; k.max(8)];
        let mut first = true;
        let mut size = BATCH.min(self.info.max_entries as usize).max(1);
        let (mut keys, mut values) = (vec![0_u8; size * k], vec![0_u8; size * v]);
        loop {
            let position = if first { None } else { Some(cursor.as_slice()) };
            let outcome = bpf::lookup_batch(
                self.fd.as_fd(),
                position,
                &mut next,
                &mut keys,
                &mut values,
                size as u32,
            );
            let end = match outcome.error {
                None => false,
                Some(e) if e.errno() == libc::ENOENT => true,
                // One bucket alone holds more than fits.
                Some(e) if e.errno() == libc::ENOSPC => {
                    size *= 2;
                    keys.resize(size * k, 0);
                    values.resize(size * v, 0);
                    continue;
                }
                Some(e) if first && no_batches(&e) => {
                    self.batches.store(false, Ordering::Relaxed);
                    return Ok(false);
                }
                Some(source) => {
                    return Err(MapError::Syscall {
                        map: self.name.to_lowercase(),
                        source,
                    });
                }
            };
            let done = outcome.done.min(size);
            for (key, value) in keys.chunks_exact(k).zip(values.chunks_exact(v)).take(done) {
                each(key, value);
            }
            if end {
                return Ok(true);
            }
            std::mem::swap(&mut cursor, &mut next);
            first = false;
        }
    }

    fn walk_by_keys(&self, each: &mut impl FnMut(&[u8], &[u8])) -> Result<()> {
        let fail = |source| MapError::Syscall {
            map: self.name.to_lowercase(),
            source,
        };
        let mut key = vec![0; self.key_size()];
        let mut next = key.clone();
        let mut value = vec![0; self.value_stride];
        let mut have = false;
        while bpf::next_key(self.fd.as_fd(), have.then_some(key.as_slice()), &mut next).map_err(fail)? {
            if bpf::lookup(self.fd.as_fd(), &next, &mut value).map_err(fail)? {
                each(&next, &value);
            }
            std::mem::swap(&mut key, &mut next);
            have = true;
        }
        Ok(())
    }
}

fn transient(e: &SyscallError) -> bool {
    matches!(e.errno(), libc::ENOMEM | libc::EBUSY | libc::EAGAIN | libc::EINTR)
}

fn no_batches(e: &SyscallError) -> bool {
    matches!(e.errno(), ENOTSUPP | libc::EOPNOTSUPP | libc::EINVAL)
}

pub(crate) fn possible_cpus() -> std::result::Result<usize, SyscallError> {
    aya::util::nr_cpus().map_err(|(path, e)| SyscallError::new(format!("reading {path}"), e))
}

/// A map with typed keys and values.
#[derive(Debug)]
pub(crate) struct Map<K, V> {
    raw: RawMap,
    types: PhantomData<fn() -> (K, V)>,
}

impl<K, V> Map<K, V>
where
    K: FromBytes + IntoBytes + Immutable + Copy,
    V: FromBytes + IntoBytes + Immutable + Copy,
{
    pub fn new(raw: RawMap) -> Result<Self> {
        check_layout(&raw, size_of::<K>(), size_of::<V>())?;
        Ok(Self {
            raw,
            types: PhantomData,
        })
    }

    pub fn max_entries(&self) -> u32 {
        self.raw.info.max_entries
    }

    /// Entries in the map. Walks it.
    pub fn count(&self) -> Result<usize> {
        self.raw.count()
    }

    pub fn get(&self, key: &K) -> Result<Option<V>> {
        let mut value = V::new_zeroed();
        let found =
            bpf::lookup(self.fd(), key.as_bytes(), value.as_mut_bytes()).map_err(|e| self.raw.error(e))?;
        Ok(found.then_some(value))
    }

    /// Reads and deletes in one step, so that nothing that was written in between is lost unseen.
    pub fn take(&self, key: &K) -> Result<Option<V>> {
        let mut value = V::new_zeroed();
        let found = bpf::lookup_and_delete(self.fd(), key.as_bytes(), value.as_mut_bytes())
            .map_err(|e| self.raw.error(e))?;
        Ok(found.then_some(value))
    }

    pub fn insert(&self, key: &K, value: &V) -> Result<()> {
        self.raw
            .update(key.as_bytes(), value.as_bytes(), 0)
            .map_err(|e| self.raw.error(e))
    }

    /// Writes only where there is nothing; says whether it did.
    pub fn insert_new(&self, key: &K, value: &V) -> Result<bool> {
        match self
            .raw
            .update(key.as_bytes(), value.as_bytes(), bpf::BPF_NOEXIST)
        {
            Ok(()) => Ok(true),
            Err(e) if e.errno() == libc::EEXIST => Ok(false),
            Err(e) => Err(self.raw.error(e)),
        }
    }

    pub fn insert_all(&self, entries: &[(K, V)]) -> Result<()> {
        for chunk in entries.chunks(BATCH) {
            let mut keys = Vec::with_capacity(std::mem::size_of_val(chunk));
            let mut values = Vec::with_capacity(std::mem::size_of_val(chunk));
            for (key, value) in chunk {
                keys.extend_from_slice(key.as_bytes());
                values.extend_from_slice(value.as_bytes());
            }
            self.raw
                .update_all(&keys, &values)
                .map_err(|(_, e)| self.raw.error(e))?;
        }
        Ok(())
    }

    pub fn remove_all(&self, keys: &[K]) -> Result<()> {
        for chunk in keys.chunks(BATCH) {
            let mut bytes = Vec::with_capacity(std::mem::size_of_val(chunk));
            for key in chunk {
                bytes.extend_from_slice(key.as_bytes());
            }
            self.raw.delete_all(&bytes).map_err(|e| self.raw.error(e))?;
        }
        Ok(())
    }

    pub fn for_each(&self, mut each: impl FnMut(K, V)) -> Result<()> {
        self.raw.for_each(|key, value| {
            // The sizes were checked when the map was opened.
            if let (Ok(key), Ok(value)) = (K::read_from_bytes(key), V::read_from_bytes(value)) {
                each(key, value);
            }
        })
    }

    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        self.for_each(|key, value| entries.push((key, value)))?;
        Ok(entries)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.raw.fd.as_fd()
    }
}

/// An array with a value per CPU.
#[derive(Debug)]
pub(crate) struct PerCpuArray<V> {
    raw: RawMap,
    types: PhantomData<fn() -> V>,
}

impl<V: FromBytes + IntoBytes + Immutable + Copy> PerCpuArray<V> {
    pub fn new(raw: RawMap) -> Result<Self> {
        check_layout(&raw, size_of::<u32>(), size_of::<V>())?;
        Ok(Self {
            raw,
            types: PhantomData,
        })
    }

    pub fn len(&self) -> u32 {
        self.raw.info.max_entries
    }

    /// The values of all CPUs at an index; none beyond the end.
    pub fn get(&self, index: u32) -> Result<Vec<V>> {
        let mut bytes = vec![0; self.raw.value_stride];
        let found =
            bpf::lookup(self.raw.fd.as_fd(), index.as_bytes(), &mut bytes).map_err(|e| self.raw.error(e))?;
        Ok(if found {
            self.split(&bytes).collect()
        } else {
            Vec::new()
        })
    }

    /// Puts `value` on the first CPU and zero on the others. Only for slots that no program writes.
    pub fn set(&self, index: u32, value: &V) -> Result<()> {
        let mut bytes = vec![0; self.raw.value_stride];
        bytes[..size_of::<V>()].copy_from_slice(value.as_bytes());
        self.raw
            .update(index.as_bytes(), &bytes, 0)
            .map_err(|e| self.raw.error(e))
    }

    /// Walks all slots.
    pub fn for_each(&self, mut each: impl FnMut(u32, &mut dyn Iterator<Item = V>)) -> Result<()> {
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

pub(crate) fn check_layout(raw: &RawMap, want_key: usize, want_value: usize) -> Result<()> {
    let (key_size, value_size) = (raw.info.key_size, raw.info.value_size);
    if key_size as usize == want_key && value_size as usize == want_value {
        return Ok(());
    }
    Err(MapError::Layout {
        map: raw.name.to_lowercase(),
        key_size,
        value_size,
        want_key,
        want_value,
    })
}

/// What the memory of a map may be seen as: every bit pattern is a value, and others may write it meanwhile.
pub(crate) trait Atomic {}
impl Atomic for AtomicU16 {}
impl Atomic for AtomicU32 {}
impl Atomic for AtomicU64 {}

/// A map's memory, shared with the programs.
#[derive(Debug)]
pub(crate) struct Shared {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory is only touched through atomics.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub fn new(raw: &RawMap) -> Result<Self> {
        // The kernel rounds an element up to 8 bytes.
        let length = (raw.info.value_size as usize).next_multiple_of(8) * raw.info.max_entries as usize;
        // SAFETY: a new mapping at an address of the kernel's choice.
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

    /// The atomic of type `A` at a byte offset.
    pub fn at<A: Atomic>(&self, offset: usize) -> &A {
        assert!(offset + size_of::<A>() <= self.length && offset.is_multiple_of(align_of::<A>()));
        // SAFETY: inside the mapping and aligned (the mapping begins at a page); callers use atomics only, for
        // which every bit pattern is a value, and everybody else (programs) writes whole words.
        unsafe { self.base.add(offset).cast::<A>().as_ref() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length, and no reference outlives self.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

/// WORKERS, memory-mapped.
#[derive(Debug)]
pub(crate) struct Heartbeats {
    memory: Shared,
    count: u32,
}

impl Heartbeats {
    pub fn new(raw: &RawMap) -> Result<Self> {
        check_layout(raw, size_of::<u32>(), size_of::<u64>())?;
        Ok(Self {
            memory: Shared::new(raw)?,
            count: raw.info.max_entries,
        })
    }

    /// Nothing for a queue that the map has no slot for.
    pub fn heartbeat(&self, queue: u32, now: u64) {
        if queue < self.count {
            self.memory
                .at::<AtomicU64>(queue as usize * size_of::<u64>())
                .store(now, Ordering::Relaxed);
        }
    }
}

/// ENDPOINTS, memory-mapped.
#[derive(Debug)]
pub(crate) struct Endpoints {
    raw: RawMap,
    memory: Shared,
}

impl Endpoints {
    pub fn new(raw: RawMap) -> Result<Self> {
        check_layout(&raw, size_of::<u32>(), size_of::<EndpointState>())?;
        Ok(Self {
            memory: Shared::new(&raw)?,
            raw,
        })
    }

    /// Policy and revision change by one store, after the identity and flags: whoever sees the new policy sees the identity too.
    pub fn set(&self, endpoint: u16, state: EndpointState) {
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

    pub fn get(&self, endpoint: u16) -> EndpointState {
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

    pub fn len(&self) -> u32 {
        self.raw.info.max_entries
    }

    /// The endpoints that have a policy.
    pub fn with_policy(&self) -> BTreeSet<u16> {
        (0..=u16::MAX)
            .filter(|&endpoint| u32::from(endpoint) < self.len() && self.get(endpoint).policy != 0)
            .collect()
    }
}

/// The first eight bytes of an [`EndpointState`] as one word in memory order.
fn policy_word(policy: u32, revision: u32) -> u64 {
    let ([p0, p1, p2, p3], [r0, r1, r2, r3]) = (policy.to_ne_bytes(), revision.to_ne_bytes());
    u64::from_ne_bytes([p0, p1, p2, p3, r0, r1, r2, r3])
}

/// CLASSES, memory-mapped.
#[derive(Debug)]
pub(crate) struct Classes {
    memory: Shared,
}

impl Classes {
    pub fn new(raw: &RawMap) -> Result<Self> {
        check_layout(raw, size_of::<u32>(), CLASS_SLOTS * size_of::<Class>())?;
        Ok(Self {
            memory: Shared::new(raw)?,
        })
    }

    /// False if there is no such slot.
    pub fn set(&self, slot: u32, class: Class) -> bool {
        let slot = slot as usize;
        if slot >= CLASS_SLOTS {
            return false;
        }
        self.memory
            .at::<AtomicU16>(slot * size_of::<Class>())
            .store(class, Ordering::Release);
        true
    }

    pub fn all(&self) -> Vec<Class> {
        (0..CLASS_SLOTS)
            .map(|slot| self.memory.at::<AtomicU16>(slot * 2).load(Ordering::Acquire))
            .collect()
    }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn entries_beyond_4096_come_back_whole() {
        let fd = bpf::map_create("T", map_type::HASH, 4, 8, 20_000, 1).unwrap();
        let map = Map::<u32, u64>::new(RawMap::new("POLICY", fd).unwrap()).unwrap();
        let entries: Vec<_> = (0..10_000_u32).map(|i| (i, u64::from(i) << 32)).collect();
        map.insert_all(&entries).unwrap();
        let mut read = map.entries().unwrap();
        read.sort_unstable();
        assert_eq!(read, entries);
        // Every third, and some that are not there.
        let gone: Vec<_> = (0..15_000_u32).step_by(3).collect();
        map.remove_all(&gone).unwrap();
        let mut read = map.entries().unwrap();
        read.sort_unstable();
        assert_eq!(
            read,
            entries
                .iter()
                .copied()
                .filter(|(k, _)| k % 3 != 0)
                .collect::<Vec<_>>()
        );
    }

    #[test]
    fn walking_by_keys_sees_the_same() {
        let fd = bpf::map_create("T", map_type::HASH, 4, 8, 1000, 1).unwrap();
        let map = Map::<u32, u64>::new(RawMap::new("POLICY", fd).unwrap()).unwrap();
        map.raw.batches.store(false, Ordering::Relaxed);
        let entries: Vec<_> = (0..500_u32).map(|i| (i, u64::from(i))).collect();
        map.insert_all(&entries).unwrap();
        map.remove_all(&[1, 2, 1000]).unwrap();
        let mut read = map.entries().unwrap();
        read.sort_unstable();
        assert_eq!(read.len(), 498);
        assert_eq!(read[1], (3, 3));
    }

    #[test]
    fn a_full_map_names_itself_and_its_size() {
        let fd = bpf::map_create("T", map_type::HASH, 4, 8, 100, 1).unwrap();
        let map = Map::<u32, u64>::new(RawMap::new("POLICY", fd).unwrap()).unwrap();
        let entries: Vec<_> = (0..101_u32).map(|i| (i, 0)).collect();
        let error = map.insert_all(&entries).unwrap_err();
        assert_eq!(error.to_string(), "policy map full: 100 of 100 entries");
        assert_eq!(error.too_small(), Some("policy"));
        assert_eq!(map.entries().unwrap().len(), 100);
    }

    #[test]
    fn tries_take_batches_too() {
        use palisade_abi::{Addr, IpcacheEntry, PrefixKey};
        let fd = bpf::map_create("T", map_type::LPM_TRIE, 20, 8, 10_000, 1).unwrap();
        let map = Map::<PrefixKey, IpcacheEntry>::new(RawMap::new("PREFIXES", fd).unwrap()).unwrap();
        let entries: Vec<_> = (0..5000_u32)
            .map(|i| {
                let [_, _, b, c] = i.to_be_bytes();
                let key = PrefixKey {
                    length: 96 + 24,
                    addr: Addr::from_v4([10, b, c, 0]),
                };
                (
                    key,
                    IpcacheEntry {
                        identity: i + 1,
                        endpoint: 0,
                        flags: 0,
                    },
                )
            })
            .collect();
        map.insert_all(&entries).unwrap();
        assert_eq!(map.entries().unwrap().len(), 5000);
        let keys: Vec<_> = entries.iter().map(|&(k, _)| k).take(4999).collect();
        map.remove_all(&keys).unwrap();
        assert_eq!(map.entries().unwrap().len(), 1);
    }

    #[test]
    fn a_map_of_another_layout_is_refused() {
        let fd = bpf::map_create("T", map_type::HASH, 4, 8, 100, 1).unwrap();
        let error = Map::<u64, u64>::new(RawMap::new("POLICY", fd).unwrap()).unwrap_err();
        assert!(
            matches!(
                error,
                MapError::Layout {
                    key_size: 4,
                    want_key: 8,
                    ..
                }
            ),
            "{error}"
        );
    }
}
