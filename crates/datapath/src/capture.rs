//! Captures: while one runs, the programs that give verdicts are replaced by those of
//! [`CAPTURE_OBJECT`](crate::CAPTURE_OBJECT), which copy packets and their verdicts to a ring.
//!
//! The programs are replaced in place at the hooks, as for an upgrade, so every packet meets a program. Both objects use
//! the same pinned maps; the maps of the capture itself are not pinned and go with its programs. Start at
//! [`Datapath::prepare_capture`].

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aya::{
    EbpfLoader,
    maps::{Map as AyaMap, MapData, RingBuf},
};
use palisade_abi::{CaptureHeader, CaptureSettings, Direction, maps as names, programs};
use zerocopy::FromBytes as _;

use crate::{
    AttachError, Datapath, MapError, OpenError, SyscallError,
    hook::{AttachPoint, find_device},
    maps::{Map, PerCpuArray, RawMap, possible_cpus},
    object::CAPTURE_OBJECT,
    pin::{pinned_link, version_dir},
    present::{present, recorded_interfaces},
    programs::{VerdictPrograms, load_named},
    sys::{bpf, clsact, link::Device},
};

/// The loaded programs of a capture, for [`Datapath::begin_capture`].
#[derive(Clone, Debug)]
pub struct CapturePrograms(Arc<VerdictPrograms>);

/// A loaded capture. Its programs are attached by [`Datapath::begin_capture`].
pub struct Capture {
    programs: Arc<VerdictPrograms>,
    settings: Map<u32, CaptureSettings>,
    lost: PerCpuArray<u64>,
    ring: RingBuf<MapData>,
}

impl Datapath {
    /// Loads the programs and maps of a capture, which takes the verifier's time, and attaches nothing. `ring_bytes`:
    /// size of the ring, a power of two of at least a page.
    ///
    /// # Errors
    /// [`OpenError`] if the programs cannot be loaded.
    pub fn prepare_capture(&self, settings: &CaptureSettings, ring_bytes: u32) -> Result<Capture, OpenError> {
        let pins = pinned_maps(&version_dir(&self.pin_dir))?;
        let mut loader = EbpfLoader::new();
        for (name, path, entries) in &pins {
            loader.map_pin_path(name, path).map_max_entries(name, *entries);
        }
        loader.map_max_entries(names::CAPTURED, ring_bytes);
        loader.map_max_entries(
            names::CAPTURE_BUFFERS,
            u32::try_from(possible_cpus()?).unwrap_or(u32::MAX),
        );
        let mut ebpf = loader.load(CAPTURE_OBJECT)?;
        let wanted = [programs::XDP_INGRESS, programs::TC_INGRESS, programs::TC_EGRESS];
        let mut loaded = load_named(&mut ebpf, &wanted)?;
        let mut program = |name: &'static str| {
            loaded.remove(name).ok_or_else(|| OpenError::Missing {
                what: format!("program {name}"),
            })
        };
        let programs = Arc::new(VerdictPrograms {
            xdp: program(programs::XDP_INGRESS)?,
            tc_ingress: program(programs::TC_INGRESS)?,
            tc_egress: program(programs::TC_EGRESS)?,
        });
        let mut map = |name: &str| {
            ebpf.take_map(name).ok_or_else(|| OpenError::Missing {
                what: format!("map {name}"),
            })
        };
        let settings_map = Map::new(raw(names::CAPTURE, &map(names::CAPTURE)?)?)?;
        let lost = PerCpuArray::new(raw(names::CAPTURE_LOST, &map(names::CAPTURE_LOST)?)?)?;
        let ring = map(names::CAPTURED)?.try_into().map_err(|error| {
            OpenError::Syscall(SyscallError::new(
                "mapping the ring of the capture",
                std::io::Error::other::<aya::maps::MapError>(error),
            ))
        })?;
        settings_map.insert(&0, settings)?;
        Ok(Capture {
            programs,
            settings: settings_map,
            lost,
            ring,
        })
    }

    /// Attaches the programs of a capture in place of the ordinary ones, at every interface. Interfaces that
    /// [`Self::attach`] adds later get them too.
    ///
    /// # Errors
    /// [`AttachError`]. The ordinary programs are attached again then. If that fails too,
    /// [`Self::replacement_problem`] returns the second error.
    pub fn begin_capture(&self, programs: CapturePrograms) -> Result<(), AttachError> {
        *self.capturing() = Some(programs.0);
        self.replace_programs().inspect_err(|_| {
            // The caller gets the first error; the second one is kept until a replacement succeeds.
            let _ = self.end_capture();
        })
    }

    /// Attaches the ordinary programs again. Does nothing if no capture runs and no earlier replacement has failed.
    ///
    /// # Errors
    /// [`AttachError`] of the first interface at which that failed; the others have their programs.
    /// [`Self::retry_replacement`] tries again.
    pub fn end_capture(&self) -> Result<(), AttachError> {
        let ended = self.capturing().take();
        if ended.is_some() {
            return self.replace_programs();
        }
        self.retry_replacement()
    }

    /// Replaces the programs again if the last replacement has failed at a hook.
    ///
    /// # Errors
    /// [`AttachError`] of the first interface at which that failed; the others have their programs.
    pub fn retry_replacement(&self) -> Result<(), AttachError> {
        if self.replacement_problem().is_none() {
            return Ok(());
        }
        self.replace_programs()
    }

    /// Returns the error of the last replacement of programs at the begin or end of a capture, or `None`. After an
    /// error, programs of a capture that has ended can still be attached; they enforce the policy.
    #[must_use]
    pub fn replacement_problem(&self) -> Option<String> {
        lock(&self.replacement_problem).clone()
    }

    /// Returns the programs to attach: those of the capture that runs, or `None` for the ordinary ones.
    pub(crate) fn capturing(&self) -> MutexGuard<'_, Option<Arc<VerdictPrograms>>> {
        lock(&self.capture)
    }

    /// Replaces the programs at all hooks by those that [`Self::attach`] would attach now.
    fn replace_programs(&self) -> Result<(), AttachError> {
        let replaced = recorded_interfaces(&self.pin_dir).and_then(|found| {
            first_error(found.into_iter().map(|ifindex| match find_device(ifindex)? {
                Some(device) => self.replace_at(&device),
                None => Ok(()),
            }))
        });
        *lock(&self.replacement_problem) = replaced.as_ref().err().map(ToString::to_string);
        replaced
    }

    fn replace_at(&self, device: &Device) -> Result<(), AttachError> {
        let dir = self.link_dir(device.ifindex);
        let syscall = |source| AttachError::Syscall {
            name: device.name.clone(),
            source,
        };
        let capturing = self.capturing().clone();
        let ours = &self.programs;
        let (xdp, tc_ingress, tc_egress) = capturing
            .as_deref()
            .map_or((&ours.xdp, &ours.tc_ingress, &ours.tc_egress), |capture| {
                (&capture.xdp, &capture.tc_ingress, &capture.tc_egress)
            });
        first_error(AttachPoint::ALL.into_iter().map(|point| {
            if present(&dir, device, point)?.is_none() {
                return Ok(());
            }
            let program = match (point, point.direction()) {
                (AttachPoint::Xdp, _) => xdp,
                (_, Direction::Ingress) => tc_ingress,
                (_, Direction::Egress) => tc_egress,
            };
            match point {
                AttachPoint::Clsact(direction) => {
                    clsact::set_filter(device.ifindex, direction, program.fd(), program.name).map_err(syscall)
                }
                AttachPoint::Xdp | AttachPoint::Tcx(_) => {
                    match pinned_link(&dir.join(point.file()), device.ifindex)? {
                        Some((link, _)) => bpf::link_update(link.as_fd(), program.fd()).map_err(syscall),
                        None => Ok(()),
                    }
                }
            }
        }))
    }
}

impl Capture {
    /// Returns the programs.
    #[must_use]
    pub fn programs(&self) -> CapturePrograms {
        CapturePrograms(Arc::clone(&self.programs))
    }

    /// Reads up to `limit` records and calls `each` with the header and the copied bytes. Returns the number of
    /// records; less than `limit` means that the ring is empty.
    pub fn drain(&mut self, limit: usize, mut each: impl FnMut(&CaptureHeader, &[u8])) -> usize {
        let mut count = 0;
        while count < limit {
            let Some(record) = self.ring.next() else { break };
            if let Ok((header, bytes)) = CaptureHeader::ref_from_prefix(&record) {
                let captured = usize::try_from(header.captured).unwrap_or(usize::MAX);
                each(header, &bytes[..captured.min(bytes.len())]);
            }
            count += 1;
        }
        count
    }

    /// Returns the number of packets that did not fit in the ring so far.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be read.
    pub fn lost(&self) -> Result<u64, MapError> {
        Ok(self.lost.get(0)?.iter().sum())
    }

    /// Changes which packets are copied. A time in the past stops the copies.
    ///
    /// # Errors
    /// [`MapError`] if the map cannot be written.
    pub fn set(&self, settings: &CaptureSettings) -> Result<(), MapError> {
        self.settings.insert(&0, settings)
    }
}

impl AsFd for Capture {
    /// Returns the descriptor of the ring, which can be polled for readability.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl std::fmt::Debug for Capture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Capture")
            .field("programs", &self.programs)
            .finish_non_exhaustive()
    }
}

/// Returns the first error of the results, all of which are computed: an error at one hook must not keep the programs
/// at the others from being replaced.
fn first_error<E>(results: impl Iterator<Item = Result<(), E>>) -> Result<(), E> {
    results.fold(Ok(()), Result::and)
}

/// Locks the mutex. A poisoned mutex is used too, because each value is replaced as a whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns name, path and number of entries of every pinned map.
fn pinned_maps(dir: &Path) -> Result<Vec<(String, std::path::PathBuf, u32)>, OpenError> {
    let io = |source| OpenError::Io {
        path: dir.to_owned(),
        source,
    };
    let mut maps = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        if let Some(fd) = bpf::get_pinned(&path)? {
            let map = RawMap::new(name, fd)?;
            maps.push((name.to_owned(), path, map.info.max_entries));
        }
    }
    Ok(maps)
}

/// Returns a map of aya as a map of this crate.
fn raw(name: &str, map: &AyaMap) -> Result<RawMap, OpenError> {
    let (AyaMap::Array(data) | AyaMap::PerCpuArray(data)) = map else {
        return Err(OpenError::Missing {
            what: format!("array {name}"),
        });
    };
    Ok(RawMap::new(name, bpf::duplicate(data.fd())?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_at_one_hook_does_not_end_the_replacement_at_the_others() {
        let mut replaced = Vec::new();
        let results = [Ok(()), Err("second"), Ok(()), Err("fourth"), Ok(())];
        let first = first_error(results.into_iter().enumerate().map(|(hook, result)| {
            replaced.push(hook);
            result
        }));
        assert_eq!(first, Err("second"));
        assert_eq!(replaced, [0, 1, 2, 3, 4]);
    }
}
