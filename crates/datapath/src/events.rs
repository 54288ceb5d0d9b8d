//! Reader of the event ring.

use std::os::fd::{AsFd, BorrowedFd};

use aya::maps::{MapData, MapError as AyaMapError, RingBuf};
use palisade_abi::Event;
use zerocopy::FromBytes as _;

use crate::{Datapath, MapError, SyscallError, sys::bpf};

/// Reads the events of the programs. There must be only one reader at a time, since reading consumes events.
pub struct EventReader {
    ring: RingBuf<MapData>,
    malformed: u64,
}

impl Datapath {
    /// Returns a reader of the event ring. Its descriptor can be polled for readability.
    ///
    /// # Errors
    /// [`MapError`] if the ring cannot be memory-mapped.
    pub fn events(&self) -> Result<EventReader, MapError> {
        let failed = |e: AyaMapError| {
            let source = SyscallError::new("mapping the ring", std::io::Error::other(e));
            MapError::Syscall {
                map: self.events.name.to_lowercase(),
                source,
            }
        };
        let fd = bpf::duplicate(&self.events.fd).map_err(|e| self.events.error(e))?;
        let data = MapData::from_fd(fd).map_err(failed)?;
        let map = aya::maps::Map::from_map_data(data).map_err(failed)?;
        Ok(EventReader {
            ring: map.try_into().map_err(failed)?,
            malformed: 0,
        })
    }
}

impl EventReader {
    /// Reads up to `limit` records and calls `each` for those that are events. Returns the number of records; less than
    /// `limit` means that the ring is empty.
    pub fn drain(&mut self, limit: usize, mut each: impl FnMut(&Event)) -> usize {
        let mut count = 0;
        while count < limit {
            let Some(record) = self.ring.next() else { break };
            // The event is read without a copy: records of a BPF ring buffer are aligned to 8 bytes, as `Event`
            // requires.
            match Event::ref_from_prefix(&record) {
                Ok((event, _)) => each(event),
                Err(_) => self.malformed += 1,
            }
            count += 1;
        }
        count
    }

    /// Returns the number of records that were too short for an event.
    #[must_use]
    pub fn malformed(&self) -> u64 {
        self.malformed
    }
}

impl AsFd for EventReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl std::fmt::Debug for EventReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventReader")
            .field("malformed", &self.malformed)
            .finish_non_exhaustive()
    }
}
