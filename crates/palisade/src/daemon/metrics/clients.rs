//! The connections of the server, bounded in number.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use tokio::task::AbortHandle;

use super::super::measured::lock;

/// Largest number of connections.
const MAX_CLIENTS: usize = 64;

/// The connections of the server.
#[derive(Debug, Default)]
pub(super) struct Clients {
    /// Connections from the oldest to the newest.
    open: Mutex<VecDeque<Client>>,
    serial: AtomicU64,
    evicted: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug)]
struct Client {
    serial: u64,
    activity: Arc<Activity>,
    task: AbortHandle,
}

/// What a connection does at present; decides which connection makes a place for a new one.
#[derive(Debug, Default)]
pub(super) struct Activity {
    /// Whether the TLS handshake is complete; true at once without TLS.
    pub(super) is_established: AtomicBool,
    /// Whether a request is being answered, until the peer has accepted the whole answer.
    pub(super) is_busy: AtomicBool,
    /// Since when the peer has not accepted the rest of an answer.
    pub(super) stalled_since: Mutex<Option<Instant>>,
}

impl Clients {
    /// Returns the number of connections.
    pub(super) fn connected(&self) -> usize {
        lock(&self.open).len()
    }

    /// Returns how many connections were closed in favour of newer ones, and how many were refused.
    pub(super) fn ended(&self) -> (u64, u64) {
        (
            self.evicted.load(Ordering::Relaxed),
            self.refused.load(Ordering::Relaxed),
        )
    }

    /// Serves a connection on a task of its own, if there is a place. `serve` must keep the given
    /// activity up to date.
    pub(super) fn admit<F>(self: &Arc<Self>, serve: impl FnOnce(Arc<Activity>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if !self.make_place() {
            return;
        }
        let activity = Arc::<Activity>::default();
        let served = serve(Arc::clone(&activity));
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let place = Place {
            clients: Arc::clone(self),
            serial,
        };
        // Held until the connection is in the list, so that its task cannot end, and try to remove it, before that.
        let mut open = lock(&self.open);
        let task = tokio::spawn(async move {
            let _place = place;
            served.await;
        });
        open.push_back(Client {
            serial,
            activity,
            task: task.abort_handle(),
        });
    }

    /// Makes a place for a connection: if there is none, by closing the oldest connection whose TLS handshake is not
    /// complete, or else the oldest connection that has no request, or else the one whose peer has not read its answer
    /// for the longest time. So peers without a certificate close each other's connections first. Returns whether there
    /// is a place.
    fn make_place(&self) -> bool {
        let mut open = lock(&self.open);
        if open.len() < MAX_CLIENTS {
            return true;
        }
        let first = |matches: fn(&Activity) -> bool| open.iter().position(|client| matches(&client.activity));
        let idle = first(|activity| !activity.is_established.load(Ordering::SeqCst))
            .or_else(|| first(|activity| !activity.is_busy.load(Ordering::SeqCst)))
            .or_else(|| {
                let stalled = open.iter().enumerate();
                let stalled = stalled.filter_map(|(at, client)| {
                    Some((lock(&client.activity.stalled_since).as_ref().copied()?, at))
                });
                stalled.min().map(|(_, at)| at)
            });
        match idle.and_then(|index| open.remove(index)) {
            Some(client) => {
                client.task.abort();
                self.evicted.fetch_add(1, Ordering::Relaxed);
                true
            }
            None => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }

    fn remove(&self, serial: u64) {
        lock(&self.open).retain(|client| client.serial != serial);
    }
}

/// Removes a connection from the list when its task ends or is aborted.
struct Place {
    clients: Arc<Clients>,
    serial: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clients.remove(self.serial);
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, time::Duration};

    use super::*;

    #[test]
    fn a_new_connection_takes_the_place_of_a_useless_one() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let _entered = runtime.enter();
        let clients = Arc::<Clients>::default();
        let now = Instant::now();
        // All have a request; the peer of the third one has not read its answer for the longest time.
        for number in 0..MAX_CLIENTS as u64 {
            clients.admit(|activity| {
                activity.is_established.store(true, Ordering::SeqCst);
                activity.is_busy.store(true, Ordering::SeqCst);
                let since = [
                    None,
                    Some(now),
                    now.checked_sub(Duration::from_secs(2)),
                    Some(now),
                ];
                *lock(&activity.stalled_since) = since.get(number as usize).copied().flatten();
                pending()
            });
        }
        let serials = || {
            lock(&clients.open)
                .iter()
                .map(|client| client.serial)
                .collect::<Vec<_>>()
        };
        let admit = || {
            clients.admit(|activity| {
                activity.is_established.store(true, Ordering::SeqCst);
                activity.is_busy.store(true, Ordering::SeqCst);
                pending()
            });
        };
        for (gone, evicted) in [(2, 1), (1, 2), (3, 3)] {
            assert!(serials().contains(&gone));
            admit();
            assert!(!serials().contains(&gone), "{:?}", serials());
            assert_eq!(clients.ended(), (evicted, 0));
        }
        // The others wait for their answers.
        admit();
        assert_eq!((clients.connected(), clients.ended()), (MAX_CLIENTS, (3, 1)));
        lock(&clients.open)[0]
            .activity
            .is_busy
            .store(false, Ordering::SeqCst);
        admit();
        assert_eq!((serials().contains(&0), clients.ended()), (false, (4, 1)));
    }
}
