//! Hand-over of inspected connections at a planned restart: the engine of the old process writes them
//! ([`crate::Engine::hand_over`]), that of the new process reads them ([`crate::Engine::take_over`]).
//!
//! Both processes are on the same machine and in the same boot, and the maps with the flows stay. What is handed over
//! belongs to a flow by its serial, so a connection whose flow is gone or was replaced meanwhile is not inspected by it.
//! Verdicts are not handed over: the next request of a connection is evaluated by the rules in force then.
//!
//! Start at `Entries`.

pub(crate) mod wire;

use wire::{Reader, Wire as _, read_bytes};

/// Version of the encoding. To be raised with each change of what is written; a test compares an example.
pub const VERSION: u32 = 5;

/// Maximum size of what one engine hands over, bytes.
const MAX_SIZE: usize = 256 << 20;

/// What one engine hands over.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HandedOver {
    /// Encoded connections.
    pub state: Vec<u8>,
    /// Number of connections.
    pub account: Account,
}

/// Numbers of connections that are inspected. Offloaded connections, and connections whose SYN has no answer, do not count:
/// they survive a restart in any case.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Account {
    /// Connections that are handed over.
    pub connections: u64,
    /// Connections that cannot be handed over, and are reset after the restart.
    pub cut: u64,
}

/// Kinds of the entries of one inspector.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) open: u8,
    pub(crate) offloaded: u8,
}

impl Kind {
    pub(crate) const HTTP: Self = Self::of(1);
    pub(crate) const TLS: Self = Self::of(2);
    pub(crate) const KAFKA: Self = Self::of(3);
    pub(crate) const DNS: Self = Self::of(4);
    /// Kind of the entry of the open DNS questions.
    pub(crate) const QUESTIONS: u8 = 1;
    /// Kind of the entry of the names of Kafka's topic ids.
    pub(crate) const TOPIC_IDS: u8 = 11;

    const fn of(number: u8) -> Self {
        Self {
            open: 2 * number,
            offloaded: 2 * number + 1,
        }
    }
}

/// Entries that are written: of each, its kind and its bytes with their length in front.
#[derive(Default)]
pub(crate) struct Entries {
    bytes: Vec<u8>,
    pub(crate) account: Account,
}

impl Entries {
    /// Adds an entry that `write` appends. Without effect if `write` returns false, or if there is no room.
    pub(crate) fn add(&mut self, kind: u8, write: impl FnOnce(&mut Vec<u8>) -> bool) -> bool {
        let start = self.bytes.len();
        kind.write(&mut self.bytes);
        0_u32.write(&mut self.bytes);
        let first = self.bytes.len();
        let is_written = write(&mut self.bytes) && self.bytes.len() <= MAX_SIZE;
        let length = (self.bytes.len() - first) as u32;
        match self.bytes.get_mut(start + 1..first) {
            Some(place) if is_written => place.copy_from_slice(&length.to_le_bytes()),
            _ => self.bytes.truncate(start),
        }
        is_written
    }

    pub(crate) fn finish(self) -> HandedOver {
        HandedOver {
            state: self.bytes,
            account: self.account,
        }
    }
}

/// Calls `take` with the kind and the bytes of each entry, up to the first one that is incomplete.
pub(crate) fn for_each(state: &[u8], mut take: impl FnMut(u8, &[u8])) {
    let mut from = Reader::new(state);
    while let Some(kind) = u8::read(&mut from)
        && let Some(bytes) = read_bytes(&mut from)
    {
        take(kind, bytes);
    }
}
