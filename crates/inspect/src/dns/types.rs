//! Types that the DNS inspector and its connections share.

use palisade_abi::{CtKey, Reason};
use palisade_fqdn::OpenQuestion;
use palisade_protocols::dns::{Answer, Question, Rcode};

use crate::{Millis, frames::Frames};

/// Data that is stored with an open question.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Note {
    /// Number of the rule that allowed the query.
    pub(super) rule: u32,
}

/// Location of a held answer.
pub(crate) enum Waiting<F> {
    /// The frames of a datagram.
    Datagram(Frames<F>),
    /// A message in a TCP stream.
    Stream(Place),
}

/// Location of an answer in a TCP stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(super) key: CtKey,
    /// Number of the connection, which distinguishes connections that use the same key one after the other.
    pub(super) number: u64,
    /// Offset of the end of the message from the first byte of the stream.
    pub(super) end: u64,
}

/// Verdict on a held answer in a TCP stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Resolved {
    /// Location of the answer.
    pub place: Place,
    /// `Ok` if the answer may be forwarded, else the reason of the drop.
    pub passes: Result<(), Reason>,
}

/// Verdict on a query.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum QueryVerdict {
    Pass,
    /// The query passes and asks for a zone transfer over TCP. A transfer has many answers, which are not tracked.
    Transfer(Note),
    /// The query is dropped. The client gets a response with this code, or no response.
    Refuse(Reason, Option<Rcode>),
}

/// Verdict on an answer.
#[derive(Debug)]
pub(crate) enum AnswerVerdict {
    Pass,
    Refuse(Reason),
    /// The answer has addresses for its question and is held until these addresses are committed.
    Commit(Box<Answer>, OpenQuestion<Note>),
}

/// Question for a zone transfer.
pub(crate) struct Transfer {
    pub(super) id: u16,
    pub(super) question: Question,
    pub(super) note: Note,
    /// Time of the question, ms.
    pub(super) at: Millis,
    /// Whether the first message of the transfer has arrived.
    pub(super) begun: bool,
}
