//! What a planned restart hands over of an HTTP/1 connection.

use std::collections::VecDeque;

use palisade_protocols::http1::{Boundary, Chunks, TrailerNames};

use super::{Announced, Exchange, Flow, Left, Place};
use crate::{
    handover::wire::{Reader, Wire, wire},
    tcp::Transferable,
};

/// Number of each [`Place`].
mod place {
    pub(super) const HEAD: u8 = 0;
    pub(super) const BODY: u8 = 1;
    pub(super) const CHUNKS: u8 = 2;
    pub(super) const CONTENT: u8 = 3;
    pub(super) const REST: u8 = 4;
}

wire!(Left { ruleset, audit });

wire!(Exchange {
    url,
    method,
    since,
    may_switch,
    upgrades
});

impl Wire for Announced {
    fn write(&self, out: &mut Vec<u8>) {
        (*self as u8).write(out);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        [Self::No, Self::Waits, Self::Late]
            .get(usize::from(u8::read(from)?))
            .copied()
    }
}

impl Wire for TrailerNames {
    fn write(&self, out: &mut Vec<u8>) {
        self.hashes()
            .iter()
            .copied()
            .collect::<VecDeque<u64>>()
            .write(out);
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self::from_hashes(VecDeque::read(from)?.into()))
    }
}

wire!(Boundary {
    is_answer,
    is_behind_content,
    guarded
});

/// Appends a place. Returns false if it is within the framing of a chunk.
fn write_place(place: &Place, out: &mut Vec<u8>) -> bool {
    let (number, length, chunks) = match place {
        // The bytes of an incomplete head are searched again from its beginning.
        Place::Head(_) => (place::HEAD, 0, None),
        Place::Body(length) => (place::BODY, *length, None),
        Place::Chunks(chunks) => (place::CHUNKS, 0, Some(chunks)),
        Place::Content(chunks, length) => (place::CONTENT, *length, Some(chunks)),
        Place::Rest => (place::REST, 0, None),
    };
    let at = chunks.and_then(Chunks::boundary);
    number.write(out);
    length.write(out);
    at.write(out);
    chunks.is_some() == at.is_some()
}

fn read_place(from: &mut Reader<'_>) -> Option<Place> {
    let (number, length) = (u8::read(from)?, u64::read(from)?);
    let chunks = Option::<Boundary>::read(from)?.map(Chunks::at_boundary);
    Some(match (number, chunks) {
        (place::HEAD, None) => Place::default(),
        (place::BODY, None) => Place::Body(length),
        (place::CHUNKS, Some(chunks)) => Place::Chunks(chunks),
        (place::CONTENT, Some(chunks)) => Place::Content(chunks, length),
        (place::REST, None) => Place::Rest,
        _ => return None,
    })
}

impl Transferable for Flow {
    fn write(&self, out: &mut Vec<u8>) -> bool {
        let is_written = write_place(&self.client, out) && write_place(&self.server, out);
        self.current.write(out);
        self.behind.write(out);
        self.announced.write(out);
        self.begun.write(out);
        self.ended.write(out);
        self.left.write(out);
        self.about.write(out);
        // A refused request is answered by the process that has refused it.
        is_written && self.refused.is_none() && !self.secure
    }

    fn read(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            client: read_place(from)?,
            server: read_place(from)?,
            current: Wire::read(from)?,
            behind: Wire::read(from)?,
            announced: Wire::read(from)?,
            refused: None,
            begun: Wire::read(from)?,
            ended: Wire::read(from)?,
            left: Wire::read(from)?,
            about: Wire::read(from)?,
            secure: false,
        })
    }
}
