//! Access to maps by bytes, with batch operations where the kernel has them.

use std::{
    ops::ControlFlow,
    os::fd::{AsFd as _, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use super::error::MapError;
use crate::sys::{
    SyscallError,
    bpf::{self, ENOTSUPP, map_type},
};

type Result<T> = std::result::Result<T, MapError>;

/// Number of elements per batch call: large enough to make the cost of the system call negligible, small enough to keep
/// the buffers of this process small.
pub(crate) const BATCH: usize = 4096;

/// Map whose key and value sizes are known only at run time.
#[derive(Debug)]
pub(crate) struct RawMap {
    pub fd: OwnedFd,
    pub name: String,
    pub info: bpf::MapInfo,
    /// Size of a value in system calls, bytes. A per-CPU map has one value per possible CPU, each rounded up to 8
    /// bytes.
    pub value_stride: usize,
    pub(super) batches: AtomicBool,
}

impl RawMap {
    pub(crate) fn new(name: &str, fd: OwnedFd) -> std::result::Result<Self, SyscallError> {
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

    pub(crate) fn key_size(&self) -> usize {
        self.info.key_size as usize
    }

    /// Adds the name of the map to an error. E2BIG and ENOSPC become [`MapError::Full`], unless the map is an `ARRAY`.
    pub(crate) fn error(&self, source: SyscallError) -> MapError {
        // A full hash map returns E2BIG, a full LPM trie ENOSPC. An array returns E2BIG for an index beyond its end.
        if matches!(source.errno(), libc::E2BIG | libc::ENOSPC) && self.info.map_type != map_type::ARRAY {
            return MapError::Full {
                map: self.name.to_lowercase(),
                present: self.count().unwrap_or(self.info.max_entries as usize),
                max_entries: self.info.max_entries,
            };
        }
        self.failed(source)
    }

    pub(crate) fn count(&self) -> Result<usize> {
        let mut count = 0;
        self.for_each(|_, _| count += 1)?;
        Ok(count)
    }

    pub(crate) fn update(
        &self,
        key: &[u8],
        value: &[u8],
        flags: u64,
    ) -> std::result::Result<(), SyscallError> {
        debug_assert_eq!((key.len(), value.len()), (self.key_size(), self.value_stride));
        // ENOMEM and EBUSY are transient: elements of maps without preallocation come from a per-CPU cache that is
        // refilled asynchronously, and `htab_lock_bucket` can fail instead of waiting.
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

    /// Writes elements from contiguous keys and values. An error contains the number of elements that were written
    /// before it.
    pub(crate) fn update_all(
        &self,
        keys: &[u8],
        values: &[u8],
    ) -> std::result::Result<(), (usize, SyscallError)> {
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

    /// Deletes contiguous keys. Keys without an element are ignored.
    pub(crate) fn delete_all(&self, keys: &[u8]) -> std::result::Result<(), SyscallError> {
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

    /// Calls `each` for all elements. During concurrent writes an element can be missed or visited twice.
    pub(crate) fn for_each(&self, mut each: impl FnMut(&[u8], &[u8])) -> Result<()> {
        self.for_each_chunk(|keys, values| {
            for (key, value) in elements(keys, values, self.key_size(), self.value_stride) {
                each(key, value);
            }
            Ok(ControlFlow::Continue(()))
        })
    }

    /// Passes all elements to `each` in chunks, contiguous keys and values, until it returns a break or an error. It may
    /// delete elements of the chunk, because no position depends on them. During concurrent writes an element can be missed
    /// or passed twice.
    pub(crate) fn for_each_chunk(
        &self,
        mut each: impl FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>>,
    ) -> Result<()> {
        if self.batches.load(Ordering::Relaxed) && self.walk_by_batches(&mut each)? {
            return Ok(());
        }
        self.walk_by_keys(&mut each)
    }

    /// Walks the map by batch lookups. Returns false, without a call of `each`, if the kernel has no batch operation
    /// for this map type.
    fn walk_by_batches(
        &self,
        each: &mut impl FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>>,
    ) -> Result<bool> {
        let (k, v) = (self.key_size(), self.value_stride);
        // Batch lookups of hash maps continue at a bucket number (4 bytes), batch lookups of other maps at a key.
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
                // One bucket has more elements than fit into the buffers.
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
                Some(source) => return Err(self.failed(source)),
            };
            let done = outcome.done.min(size);
            if each(&keys[..done * k], &values[..done * v])?.is_break() || end {
                return Ok(true);
            }
            std::mem::swap(&mut cursor, &mut next);
            first = false;
        }
    }

    fn walk_by_keys(&self, each: &mut impl FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>>) -> Result<()> {
        let mut key = vec![0; self.key_size()];
        let mut next = key.clone();
        let mut value = vec![0; self.value_stride];
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut have = false;
        loop {
            // The next key is read before `each` can delete the present one, because a walk begins again at a key that is
            // gone.
            let more = bpf::next_key(self.fd.as_fd(), have.then_some(key.as_slice()), &mut next)
                .map_err(|source| self.failed(source))?;
            if !more || values.len() >= BATCH * self.value_stride {
                if each(&keys, &values)?.is_break() || !more {
                    return Ok(());
                }
                keys.clear();
                values.clear();
            }
            if bpf::lookup(self.fd.as_fd(), &next, &mut value).map_err(|source| self.failed(source))? {
                keys.extend_from_slice(&next);
                values.extend_from_slice(&value);
            }
            std::mem::swap(&mut key, &mut next);
            have = true;
        }
    }

    fn failed(&self, source: SyscallError) -> MapError {
        MapError::Syscall {
            map: self.name.to_lowercase(),
            source,
        }
    }
}

/// Returns the elements of contiguous keys and values of these sizes.
pub(super) fn elements<'a>(
    keys: &'a [u8],
    values: &'a [u8],
    key_size: usize,
    value_size: usize,
) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
    keys.chunks_exact(key_size).zip(values.chunks_exact(value_size))
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
