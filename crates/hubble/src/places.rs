//! Places of the connections of a listener: their number is bounded, and a new connection takes the place of one that is
//! not used.

use std::{
    collections::VecDeque,
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::connection::ConnectionId;

/// Places of connections, each with a value about the client.
#[derive(Debug)]
pub struct Places<T> {
    most: usize,
    /// The oldest connection first.
    list: Mutex<VecDeque<(ConnectionId, T)>>,
}

/// The place of a connection; given back when the value is dropped.
#[derive(Debug)]
pub struct ConnectionPlace<T: Send + Debug> {
    places: Arc<Places<T>>,
    connection: ConnectionId,
}

impl<T: Send + Debug> Places<T> {
    /// Returns a table of at most `most` connections.
    #[must_use]
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            list: Mutex::default(),
        })
    }

    /// Returns the place of a new connection. If there is none, the oldest connection without an open stream is closed;
    /// `None` if each has one.
    pub fn enter(self: &Arc<Self>, connection: &ConnectionId, client: T) -> Option<ConnectionPlace<T>> {
        let mut list = self.list();
        if list.len() >= self.most {
            let idle = list.iter().position(|(connection, _)| connection.is_idle())?;
            if let Some((connection, _)) = list.remove(idle) {
                connection.close();
            }
        }
        list.push_back((connection.clone(), client));
        drop(list);
        Some(ConnectionPlace {
            places: Arc::clone(self),
            connection: connection.clone(),
        })
    }

    /// Closes the connections of all clients that are not to be kept. Returns their number.
    pub fn close_unless(&self, keep: impl Fn(&T) -> bool) -> usize {
        let mut list = self.list();
        let before = list.len();
        list.retain(|(connection, client)| {
            let kept = keep(client);
            if !kept {
                connection.close();
            }
            kept
        });
        before - list.len()
    }

    fn list(&self) -> MutexGuard<'_, VecDeque<(ConnectionId, T)>> {
        // A poisoned lock is used all the same: no code under it leaves the list half changed if it panics.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Send + Debug> Drop for ConnectionPlace<T> {
    fn drop(&mut self) {
        let mut list = self.places.list();
        list.retain(|(connection, _)| !connection.is(&self.connection));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_connection_takes_the_place_of_the_oldest_one_without_a_stream() {
        let places = Places::new(3);
        let ids: Vec<_> = (0..6).map(|_| ConnectionId::default()).collect();
        let used = ids[0].open();
        let mut held: Vec<_> = ids[..3].iter().map(|id| places.enter(id, ())).collect();
        held.push(places.enter(&ids[3], ()));
        assert!(held.iter().all(Option::is_some));
        let closed = |ids: &[ConnectionId]| ids.iter().map(ConnectionId::is_closed).collect::<Vec<_>>();
        assert_eq!(closed(&ids[..4]), [false, true, false, false]);
        // Each connection has a stream.
        let _others = [ids[2].open(), ids[3].open()];
        assert!(places.enter(&ids[4], ()).is_none());
        drop(used);
        assert!(places.enter(&ids[4], ()).is_some());
        assert!(ids[0].is_closed());
        // That place was given back at once, and the place of a closed connection is given back only once.
        held.remove(1);
        assert!(places.enter(&ids[5], ()).is_some());
        assert!(!ids[2].is_closed() && !ids[3].is_closed());
    }

    #[test]
    fn connections_of_clients_that_are_not_kept_are_closed() {
        let places = Places::new(3);
        let ids: Vec<_> = (0..3).map(|_| ConnectionId::default()).collect();
        let _held: Vec<_> = (0..3)
            .zip(&ids)
            .map(|(client, id)| places.enter(id, client))
            .collect();
        assert_eq!(places.close_unless(|client| *client != 1), 1);
        assert!(!ids[0].is_closed() && ids[1].is_closed() && !ids[2].is_closed());
    }
}
