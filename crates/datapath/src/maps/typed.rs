//! Maps with typed keys and values.

use std::{
    marker::PhantomData,
    ops::ControlFlow,
    os::fd::{AsFd as _, BorrowedFd},
};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    error::MapError,
    raw::{BATCH, RawMap, check_layout, elements},
};
use crate::sys::bpf;

type Result<T> = std::result::Result<T, MapError>;

/// Map with typed keys and values.
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
    pub(crate) fn new(raw: RawMap) -> Result<Self> {
        check_layout(&raw, size_of::<K>(), size_of::<V>())?;
        Ok(Self {
            raw,
            types: PhantomData,
        })
    }

    /// Returns the same map with a descriptor of its own.
    pub(crate) fn duplicate(&self) -> Result<Self> {
        let fd = bpf::duplicate(&self.raw.fd).map_err(|source| MapError::Syscall {
            map: self.raw.name.to_lowercase(),
            source,
        })?;
        Self::new(RawMap::new(&self.raw.name, fd).map_err(|e| self.raw.error(e))?)
    }

    pub(crate) fn max_entries(&self) -> u32 {
        self.raw.info.max_entries
    }

    /// Returns the number of entries. Walks the map.
    pub(crate) fn count(&self) -> Result<usize> {
        self.raw.count()
    }

    pub(crate) fn get(&self, key: &K) -> Result<Option<V>> {
        let mut value = V::new_zeroed();
        let found =
            bpf::lookup(self.fd(), key.as_bytes(), value.as_mut_bytes()).map_err(|e| self.raw.error(e))?;
        Ok(found.then_some(value))
    }

    /// Reads and deletes an entry in one system call. With two calls, an entry that a program inserts between them
    /// would be deleted unread.
    pub(crate) fn take(&self, key: &K) -> Result<Option<V>> {
        let mut value = V::new_zeroed();
        let found = bpf::lookup_and_delete(self.fd(), key.as_bytes(), value.as_mut_bytes())
            .map_err(|e| self.raw.error(e))?;
        Ok(found.then_some(value))
    }

    pub(crate) fn insert(&self, key: &K, value: &V) -> Result<()> {
        self.raw
            .update(key.as_bytes(), value.as_bytes(), 0)
            .map_err(|e| self.raw.error(e))
    }

    /// Inserts an entry unless the key exists. Returns whether the entry was inserted.
    pub(crate) fn insert_new(&self, key: &K, value: &V) -> Result<bool> {
        match self
            .raw
            .update(key.as_bytes(), value.as_bytes(), bpf::BPF_NOEXIST)
        {
            Ok(()) => Ok(true),
            Err(e) if e.errno() == libc::EEXIST => Ok(false),
            Err(e) => Err(self.raw.error(e)),
        }
    }

    pub(crate) fn insert_all(&self, entries: &[(K, V)]) -> Result<()> {
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

    pub(crate) fn remove_all(&self, keys: &[K]) -> Result<()> {
        for chunk in keys.chunks(BATCH) {
            let mut bytes = Vec::with_capacity(std::mem::size_of_val(chunk));
            for key in chunk {
                bytes.extend_from_slice(key.as_bytes());
            }
            self.raw.delete_all(&bytes).map_err(|e| self.raw.error(e))?;
        }
        Ok(())
    }

    pub(crate) fn for_each(&self, mut each: impl FnMut(K, V)) -> Result<()> {
        self.raw.for_each(|key, value| {
            // The conversions never fail: the sizes were compared when the map was opened.
            if let (Ok(key), Ok(value)) = (K::read_from_bytes(key), V::read_from_bytes(value)) {
                each(key, value);
            }
        })
    }

    /// Passes all entries to `each` in chunks of bounded size, until it returns a break or an error. It may delete entries
    /// of the chunk.
    pub(crate) fn for_each_chunk(
        &self,
        mut each: impl FnMut(&[(K, V)]) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        let mut chunk = Vec::new();
        self.raw.for_each_chunk(|keys, values| {
            chunk.clear();
            chunk.extend(
                elements(keys, values, size_of::<K>(), size_of::<V>()).filter_map(|(key, value)| {
                    K::read_from_bytes(key).ok().zip(V::read_from_bytes(value).ok())
                }),
            );
            each(&chunk)
        })
    }

    pub(crate) fn entries(&self) -> Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        self.for_each(|key, value| entries.push((key, value)))?;
        Ok(entries)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.raw.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::sys::bpf::map_type;

    #[test]
    fn running_programs_can_be_awaited_again_and_again() {
        for _ in 0..3 {
            bpf::wait_for_programs().unwrap();
        }
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
        // Remove every third key, and keys without an element.
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
    fn a_walk_in_chunks_can_delete_what_it_has_been_given() {
        for batches in [true, false] {
            let fd = bpf::map_create("T", map_type::HASH, 4, 8, 20_000, 1).unwrap();
            let map = Map::<u32, u64>::new(RawMap::new("POLICY", fd).unwrap()).unwrap();
            map.raw.batches.store(batches, Ordering::Relaxed);
            let entries: Vec<_> = (0..10_000_u32).map(|i| (i, u64::from(i))).collect();
            map.insert_all(&entries).unwrap();
            let (mut seen, mut largest) = (Vec::new(), 0);
            map.for_each_chunk(|chunk| {
                largest = largest.max(chunk.len());
                seen.extend(chunk.iter().map(|(key, _)| *key));
                map.remove_all(&chunk.iter().map(|(key, _)| *key).collect::<Vec<_>>())?;
                Ok(ControlFlow::Continue(()))
            })
            .unwrap();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(
                (seen.len(), map.entries().unwrap().len()),
                (10_000, 0),
                "{batches}"
            );
            assert!(largest <= BATCH, "{batches}: {largest}");

            map.insert_all(&entries).unwrap();
            let mut chunks = 0;
            map.for_each_chunk(|_| {
                chunks += 1;
                Ok(ControlFlow::Break(()))
            })
            .unwrap();
            assert_eq!(chunks, 1, "{batches}");
        }
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
