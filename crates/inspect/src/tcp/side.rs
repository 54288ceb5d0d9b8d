//! The two ends of a connection.

use std::ops::{Index, IndexMut};

use palisade_abi::{PuntRequest, punt_flags};

use crate::handover::wire::{Reader, Wire};

/// End of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// The end that has sent the first SYN.
    Client,
    /// The other end.
    Server,
}

impl Side {
    /// Both ends, the client first.
    pub const BOTH: [Self; 2] = [Self::Client, Self::Server];

    /// Returns the sender of a packet.
    pub(crate) const fn of(slot: &PuntRequest) -> Self {
        if slot.flags & punt_flags::REPLY == 0 {
            Self::Client
        } else {
            Self::Server
        }
    }

    /// Returns the opposite end of the connection.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// One value for each end. Indexed by [`Side`], so that no index can be out of range.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct PerSide<T> {
    pub(super) client: T,
    pub(super) server: T,
}

impl<T> PerSide<T> {
    pub(super) const fn new(client: T, server: T) -> Self {
        Self { client, server }
    }

    /// Returns the value of `side` and that of the other end.
    pub(super) const fn pair_mut(&mut self, side: Side) -> (&mut T, &mut T) {
        match side {
            Side::Client => (&mut self.client, &mut self.server),
            Side::Server => (&mut self.server, &mut self.client),
        }
    }

    /// Returns both values, the client's first.
    pub(super) const fn both(&self) -> [&T; 2] {
        [&self.client, &self.server]
    }

    /// Returns both values, the client's first.
    pub(super) const fn both_mut(&mut self) -> [&mut T; 2] {
        [&mut self.client, &mut self.server]
    }
}

impl<T> Index<Side> for PerSide<T> {
    type Output = T;
    fn index(&self, side: Side) -> &T {
        match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
        }
    }
}

impl<T> IndexMut<Side> for PerSide<T> {
    fn index_mut(&mut self, side: Side) -> &mut T {
        match side {
            Side::Client => &mut self.client,
            Side::Server => &mut self.server,
        }
    }
}

impl<T: Wire> Wire for PerSide<T> {
    fn write(&self, out: &mut Vec<u8>) {
        self.client.write(out);
        self.server.write(out);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self::new(Wire::read(from)?, Wire::read(from)?))
    }
}
