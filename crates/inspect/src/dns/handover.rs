//! What a planned restart hands over of DNS beside connections: the open questions, so that their answers are accepted.

use std::net::SocketAddr;

use palisade_abi::Addr;
use palisade_fqdn::{Flow, HandedOverQuestion, OpenQuestion, QuestionKey};

use super::{Dns, types::Note};
use crate::{
    Millis,
    handover::{
        Entries, Kind,
        wire::{Reader, Wire},
    },
};

fn write_end(end: SocketAddr, out: &mut Vec<u8>) {
    (Addr::from(end.ip()), end.port()).write(out);
}

fn read_end(from: &mut Reader<'_>) -> Option<SocketAddr> {
    let (address, port) = <(Addr, u16)>::read(from)?;
    Some(SocketAddr::new(address.into(), port))
}

fn write(question: &HandedOverQuestion<Note>, out: &mut Vec<u8>) {
    question.flow.endpoint.write(out);
    question.flow.tcp.write(out);
    write_end(question.flow.client, out);
    write_end(question.flow.resolver, out);
    question.id.write(out);
    question.question.write(out);
    question.asked.at.write(out);
    question.asked.note.rule.write(out);
}

fn read(from: &mut Reader<'_>, now: Millis) -> Option<HandedOverQuestion<Note>> {
    Some(HandedOverQuestion {
        flow: Flow {
            endpoint: Wire::read(from)?,
            tcp: Wire::read(from)?,
            client: read_end(from)?,
            resolver: read_end(from)?,
        },
        id: Wire::read(from)?,
        question: Wire::read(from)?,
        asked: OpenQuestion {
            at: u64::read(from)?.min(now),
            note: Note {
                rule: Wire::read(from)?,
            },
        },
    })
}

impl<F> Dns<F> {
    /// Writes the open questions.
    pub(crate) fn hand_over(&self, into: &mut Entries) {
        let (key, questions) = self.tracker.hand_over();
        let mut questions = questions.peekable();
        if questions.peek().is_none() {
            return;
        }
        into.add(Kind::QUESTIONS, |out| {
            key.0[0].write(out);
            key.0[1].write(out);
            questions.for_each(|question| write(&question, out));
            true
        });
    }

    /// Takes open questions over, as many as the limits allow. Returns whether the bytes are questions.
    pub(crate) fn take_over(&mut self, bytes: &[u8], now: Millis) -> bool {
        let mut from = Reader::new(bytes);
        let (Some(a), Some(b)) = (u64::read(&mut from), u64::read(&mut from)) else {
            return false;
        };
        self.tracker.use_key(QuestionKey([a, b]));
        while !from.is_empty() {
            let Some(question) = read(&mut from, now) else {
                return false;
            };
            // A question beyond the limits is asked again by its client.
            let _ = self.tracker.take_over(&question);
        }
        true
    }
}
