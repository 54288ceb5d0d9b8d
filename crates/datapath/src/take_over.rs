//! The step of an upgrade that changes which maps count: flows of the earlier table are copied, and the new directory gets
//! its final name.
//!
//! Depends on [`crate::open`] and [`crate::upgrade`]. Start at [`Datapath::commit`].

use std::{fs, time::Instant};

use crate::{
    Datapath, MapError, OpenError,
    pin::{TAKEN, taken_pins, version_dir},
    sys::bpf,
    upgrade::{OldConntrack, OldFlows, staging_dir},
};

impl Datapath {
    /// Returns the earlier version whose maps the pin directory has besides those of this version; `None` if there was
    /// no earlier version, or if its maps have been removed.
    #[must_use]
    pub fn earlier_version(&self) -> Option<u32> {
        self.earlier
    }

    /// Copies the flows of the conntrack table that programs of an earlier start use, if there is such a table and its
    /// layout is known. Returns the number of copied flows; `None` if there is no such table.
    ///
    /// Call it before the first attachment; [`Self::attach`] copies what has changed since. After an attachment that has
    /// failed, old programs stay attached and refresh flows only in their table: call it before expired flows are removed.
    ///
    /// # Errors
    /// [`MapError`] if a map cannot be read or written.
    pub fn take_over_flows(&self) -> Result<Option<usize>, MapError> {
        let mut taken = None;
        for old in self.old_conntrack().iter_mut() {
            taken = Some(taken.unwrap_or(0) + self.take_over(old)?);
        }
        Ok(taken)
    }

    /// Makes the maps permanent: from now on an earlier version refuses to start, and a later start of this version
    /// finds these maps. [`Self::attach`] calls it, so that no program is attached before.
    ///
    /// # Errors
    /// [`OpenError::Io`] if the directory cannot be renamed.
    pub fn commit(&self) -> Result<(), OpenError> {
        let mut staged = self
            .staged
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if *staged {
            let from = staging_dir(&self.pin_dir);
            fs::rename(&from, version_dir(&self.pin_dir))
                .map_err(|source| OpenError::Io { path: from, source })?;
            *staged = false;
        }
        Ok(())
    }

    /// Copies flows that the old programs have opened since the last call. Called after each attachment; with a large
    /// table and many interfaces at most half of the time is spent in it.
    pub(crate) fn follow_old_conntrack(&self) -> Result<(), MapError> {
        for old in self.old_conntrack().iter_mut() {
            if old.last.is_none_or(|(end, took)| end.elapsed() >= took) {
                self.take_over(old)?;
            }
        }
        Ok(())
    }

    /// Copies the last flows of the old conntrack tables and closes the tables.
    pub(crate) fn leave_old_conntrack(&self) -> Result<(), MapError> {
        let mut old = self.old_conntrack();
        for flows in old.iter_mut() {
            self.take_over(flows)?;
        }
        old.clear();
        Ok(())
    }

    fn old_conntrack(&self) -> std::sync::MutexGuard<'_, Vec<OldConntrack>> {
        self.old_conntrack
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn take_over(&self, old: &mut OldConntrack) -> Result<usize, MapError> {
        let start = Instant::now();
        let now = crate::monotonic_coarse();
        let mut taken = 0;
        for (key, mut entry) in old.flows()? {
            if entry.expires <= now {
                continue;
            }
            match self.conntrack.get(&key)? {
                // A flow that was copied by an earlier call and is missing now has ended.
                None if entry.created < old.taken_until => continue,
                // The old programs have seen packets of the flow after the copy, which has expired meanwhile.
                Some(known) if known.expires <= now => {
                    entry.protected = known.protected;
                    self.conntrack.insert(&key, &entry)?;
                    continue;
                }
                Some(_) => continue,
                None => {}
            }
            if matches!(old.flows, OldFlows::Earlier(..)) {
                // The shares of the new maps count from zero.
                entry.protected = u8::from(entry.protected != 0 && self.shares.protect(&key, &entry));
            }
            taken += usize::from(self.conntrack.insert_new(&key, &entry)?);
        }
        if matches!(old.flows, OldFlows::Earlier(..)) {
            self.conntrack().count_seeded(taken)?;
        }
        // The coarse clock of another CPU can lag by a tick, and a program can write an entry some time after it has
        // read the clock.
        const SLACK: u64 = 1_000_000_000;
        old.taken_until = now.saturating_sub(SLACK);
        old.last = Some((Instant::now(), start.elapsed()));
        if matches!(old.flows, OldFlows::Earlier(..)) {
            self.record_taken(old.taken_until);
        }
        Ok(taken)
    }

    /// Writes the time for [`crate::pin::taken_until`]. An error does not stop the upgrade: without the pin, a start after
    /// a crash copies ended flows once more.
    fn record_taken(&self, until: u64) {
        let is_staged = *self
            .staged
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let dir = if is_staged {
            staging_dir(&self.pin_dir)
        } else {
            version_dir(&self.pin_dir)
        };
        let path = dir.join(format!("{TAKEN}{until}"));
        let mut known = taken_pins(&dir);
        let _ = match known.pop() {
            Some(known) => fs::rename(known, &path).is_ok(),
            None => bpf::pin(self.conntrack.fd(), &path).is_ok(),
        };
        known.into_iter().for_each(|other| {
            let _ = fs::remove_file(other);
        });
    }

    /// Removes the pin of [`crate::pin::taken_until`] once there are no maps of an earlier version.
    pub(crate) fn forget_taken(&self) {
        taken_pins(&version_dir(&self.pin_dir))
            .into_iter()
            .for_each(|path| {
                // A pin that is left is used only while there are maps of an earlier version.
                let _ = fs::remove_file(path);
            });
    }
}
