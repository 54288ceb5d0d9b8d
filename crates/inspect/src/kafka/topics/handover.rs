//! What a planned restart hands over of the names of topic ids. Without them, a connection that goes on would be refused a
//! request that names an allowed topic by its id.

use std::{collections::VecDeque, net::SocketAddr, sync::PoisonError, sync::atomic::Ordering};

use palisade_abi::Addr;
use palisade_protocols::kafka::TopicId;

use super::{Known, MAX_IDS, MAX_NAME, MAX_PER_OWNER, MAX_SERVERS, Names, Owned, Owner, TopicIds, Word};
use crate::handover::wire::{Reader, Wire, wire};

/// An address and a port.
struct End(SocketAddr);

impl Wire for End {
    fn write(&self, out: &mut Vec<u8>) {
        (Addr::from(self.0.ip()), self.0.port()).write(out);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let (address, port) = <(Addr, u16)>::read(from)?;
        Some(Self(SocketAddr::new(address.into(), port)))
    }
}

impl Wire for Owner {
    fn write(&self, out: &mut Vec<u8>) {
        self.endpoint.write(out);
        self.ruleset.write(out);
        self.is_server.write(out);
        self.only.map(End).write(out);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            endpoint: Wire::read(from)?,
            ruleset: Wire::read(from)?,
            is_server: Wire::read(from)?,
            only: Option::<End>::read(from)?.map(|end| end.0),
        })
    }
}

impl Wire for Word {
    fn write(&self, out: &mut Vec<u8>) {
        End(self.server).write(out);
        self.name.to_vec().write(out);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        let word = Self {
            server: End::read(from)?.0,
            name: Vec::read(from)?.into(),
        };
        (word.name.len() <= MAX_NAME).then_some(word)
    }
}

/// A topic id with its names.
struct Entry {
    id: TopicId,
    names: VecDeque<Word>,
}

impl Wire for TopicId {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        from.bytes(size_of::<Self>())?.try_into().ok()
    }
}

wire!(Entry { id, names });

impl TopicIds {
    /// Appends the names. All workers share them, so only the first call does. Returns whether it has appended any.
    pub(super) fn hand_over(&self, out: &mut Vec<u8>) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        if known.owners.is_empty() || self.is_handed_over.swap(true, Ordering::Relaxed) {
            return false;
        }
        for (owner, owned) in &known.owners {
            owner.write(out);
            (owned.order.len() as u32).write(out);
            for id in &owned.order {
                id.write(out);
                let words = owned.ids.get(id).into_iter().flat_map(Names::words);
                (words.clone().count() as u32).write(out);
                words.for_each(|word| word.write(out));
            }
        }
        true
    }

    /// Takes names over, as many as the limits allow. Returns whether the bytes are names.
    pub(super) fn take_over(&self, bytes: &[u8]) -> bool {
        let mut from = Reader::new(bytes);
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        while !from.is_empty() {
            let owner = Owner::read(&mut from);
            let (Some(owner), Some(entries)) = (owner, VecDeque::<Entry>::read(&mut from)) else {
                return false;
            };
            known.take_over(owner, entries);
        }
        self.generation.fetch_add(1, Ordering::Release);
        true
    }
}

impl Known {
    fn take_over(&mut self, owner: Owner, entries: VecDeque<Entry>) {
        let mut owned = Owned::default();
        for Entry { id, mut names } in entries {
            let length = names.len();
            let Some(first) = names.pop_front() else { continue };
            if length > MAX_SERVERS
                || self.count + length > MAX_IDS
                || owned.order.len() >= MAX_PER_OWNER
                || owned.ids.contains_key(&id)
            {
                continue;
            }
            let others = names.into();
            owned.ids.insert(id, Names { first, others });
            owned.order.push_back(id);
            self.count += length;
        }
        if owned.ids.is_empty() {
            return;
        }
        if let Some(former) = self.owners.insert(owner, owned) {
            self.count -= former.ids.values().map(Names::len).sum::<usize>();
        }
    }
}
