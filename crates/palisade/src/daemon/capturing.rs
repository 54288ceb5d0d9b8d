//! State of the capture that runs, for `status` and the metrics. The thread of its client writes it
//! (`handlers/capture.rs`).

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use crate::control::api::CaptureStatus;

/// The place of the one capture that can run.
#[derive(Debug, Default)]
pub(super) struct CapturePlace {
    running: Mutex<Option<CaptureStatus>>,
    /// Packets of all captures that have ended.
    ended_packets: AtomicU64,
}

impl CapturePlace {
    /// Takes the place. Returns whether it was free.
    pub(super) fn take(&self, status: CaptureStatus) -> bool {
        let mut running = self.lock();
        let is_free = running.is_none();
        if is_free {
            *running = Some(status);
        }
        is_free
    }

    /// Notes the progress of the capture.
    pub(super) fn note(&self, (packets, bytes): (u64, u64), lost: u64) {
        if let Some(status) = self.lock().as_mut() {
            (status.packets, status.bytes, status.lost) = (packets, bytes, lost);
        }
    }

    /// Frees the place.
    pub(super) fn free(&self) {
        if let Some(status) = self.lock().take() {
            self.ended_packets.fetch_add(status.packets, Ordering::Relaxed);
        }
    }

    /// Returns the state of the capture that runs.
    pub(super) fn status(&self) -> Option<CaptureStatus> {
        self.lock().clone()
    }

    /// Returns the number of packets of all captures since the start of the daemon.
    pub(super) fn packets(&self) -> u64 {
        let running = self.lock();
        let of_running = running.as_ref().map_or(0, |status| status.packets);
        self.ended_packets.load(Ordering::Relaxed) + of_running
    }

    fn lock(&self) -> MutexGuard<'_, Option<CaptureStatus>> {
        // No panic can leave the value inconsistent.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_capture_has_the_place_and_its_packets_stay_counted() {
        let place = CapturePlace::default();
        assert!(place.take(CaptureStatus::default()));
        assert!(!place.take(CaptureStatus::default()));
        place.note((3, 300), 1);
        assert_eq!(place.packets(), 3);
        let shown = place.status().unwrap();
        assert_eq!((shown.packets, shown.bytes, shown.lost), (3, 300, 1));
        place.free();
        assert_eq!((place.status(), place.packets()), (None, 3));
    }
}
