//! The connections of the server, bounded in number.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
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
    /// Whether a request of the client is being answered.
    is_busy: Arc<AtomicBool>,
    task: AbortHandle,
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

    /// Serves a connection on a task of its own, if there is a place. `serve` gets a flag that it must set while a request
    /// is being answered.
    pub(super) fn admit<F>(self: &Arc<Self>, serve: impl FnOnce(Arc<AtomicBool>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        if !self.make_place() {
            return;
        }
        let is_busy = Arc::<AtomicBool>::default();
        let served = serve(Arc::clone(&is_busy));
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
            is_busy,
            task: task.abort_handle(),
        });
    }

    /// Makes a place for a connection: if there is none, by closing the oldest connection that has no request. Returns
    /// whether there is a place.
    fn make_place(&self) -> bool {
        let mut open = lock(&self.open);
        if open.len() < MAX_CLIENTS {
            return true;
        }
        let idle = open
            .iter()
            .position(|client| !client.is_busy.load(Ordering::SeqCst));
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
