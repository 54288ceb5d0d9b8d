//! Places of the connections of a listener: their number is bounded, and a new connection takes the place of one that is
//! not used, or of one of the client that has the most.

use std::{
    collections::VecDeque,
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    connection::ConnectionId,
    origin::{greediest, shares},
};

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

    /// Returns the place of a new connection. If there is none, a connection is closed: of those without an open stream
    /// the oldest one of the origin with the most connections, or else the oldest one of the origin with the most
    /// connections. An origin with fewer connections than the new one's loses none. `None` if no connection can be closed.
    pub fn enter(self: &Arc<Self>, connection: &ConnectionId, client: T) -> Option<ConnectionPlace<T>> {
        let mut list = self.list();
        if list.len() >= self.most {
            let origins = list.iter().map(|(connection, _)| connection.origin());
            let shares = shares(origins.clone());
            let own = origins
                .clone()
                .filter(|other| *other == connection.origin())
                .count();
            let idle = list.iter().zip(shares).enumerate();
            // A connection without a stream can be one whose first request is on its way.
            let idle = idle.filter(|(_, ((connection, _), share))| connection.is_idle() && *share >= own);
            // The first of those with the largest share.
            let idle = idle.rev().max_by_key(|(_, (_, share))| *share).map(|(at, _)| at);
            let from = idle.or_else(|| {
                let origin = greediest(origins.clone(), connection.origin())?;
                origins.clone().position(|other| other == origin)
            })?;
            if let Some((connection, _)) = list.remove(from) {
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
    use crate::origin::Origin;

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
    fn the_origin_with_the_most_connections_makes_room() {
        let places = Places::new(4);
        let from = |number: i32| ConnectionId::new(Origin::Process(number));
        let ids = [from(1), from(1), from(1), from(2)];
        let mut held: Vec<_> = ids.iter().map(|id| places.enter(id, ())).collect();
        let closed = || ids.iter().map(ConnectionId::is_closed).collect::<Vec<_>>();
        let used: Vec<_> = ids.iter().map(ConnectionId::open).collect();
        // The oldest one of the first process.
        let third = from(3);
        held.push(places.enter(&third, ()));
        let _third = third.open();
        assert_eq!(closed(), [true, false, false, false]);
        // No process has two more than the first one would have.
        assert!(places.enter(&from(1), ()).is_none());
        assert!(places.enter(&from(2), ()).is_none());
        assert!(places.enter(&from(4), ()).is_some());
        assert_eq!(closed(), [true, true, false, false]);
        // Of connections without a stream, one of the process that has more connections.
        drop(used);
        let places = Places::new(3);
        let ids = [from(1), from(2), from(2)];
        let _held: Vec<_> = ids.iter().map(|id| places.enter(id, ())).collect();
        assert!(places.enter(&from(1), ()).is_some());
        assert_eq!(
            ids.iter().map(ConnectionId::is_closed).collect::<Vec<_>>(),
            [false, true, false]
        );
    }

    #[test]
    fn an_origin_with_fewer_connections_keeps_one_whose_request_is_on_its_way() {
        let places = Places::new(3);
        let from = |number: i32| ConnectionId::new(Origin::Process(number));
        let ids = [from(1), from(2), from(2)];
        let _used: Vec<_> = ids[1..].iter().map(ConnectionId::open).collect();
        let _held: Vec<_> = ids.iter().map(|id| places.enter(id, ())).collect();
        assert!(places.enter(&from(2), ()).is_none());
        assert!(!ids[0].is_closed());
        assert!(places.enter(&from(3), ()).is_some());
        assert!(ids[0].is_closed());
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
