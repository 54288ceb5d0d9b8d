//! Records of DNS queries and answers.

use palisade_abi::Addr;
use palisade_fqdn::OpenQuestion;
use palisade_protocols::dns::{Answer, Question};

use super::types::Note;
use crate::{
    Millis, PacketView,
    record::{Record, Text, What},
};

/// Returns the content of the record of a query.
pub(super) fn query(question: &Question) -> What {
    What::DnsQuery {
        name: Text::of(&question.name),
        kind: question.rtype,
    }
}

/// Returns the record of an answer that passes.
pub(super) fn of_answer(
    now: Millis,
    view: &PacketView<'_>,
    answer: &Answer,
    asked: OpenQuestion<Note>,
) -> Record {
    Record {
        rule: asked.note.rule,
        latency: u32::try_from(now.saturating_sub(asked.at)).ok(),
        ..Record::of(view, self::answer(answer))
    }
}

/// Returns the content of the record of an answer.
pub(super) fn answer(answer: &Answer) -> What {
    let mut addresses = [Addr::UNSPECIFIED; 8];
    let mut count = 0;
    for (slot, address) in addresses.iter_mut().zip(&answer.addresses) {
        *slot = address.ip.into();
        count += 1;
    }
    let question = answer.question.as_ref();
    What::DnsAnswer {
        name: question.map_or_else(Text::default, |question| Text::of(&question.name)),
        kind: question.map_or(0, |question| question.rtype),
        rcode: answer.rcode,
        addresses,
        count,
        ttl: answer.ttl.unwrap_or(0),
        cname: answer.aliases.last().map_or_else(Text::default, Text::of),
    }
}
