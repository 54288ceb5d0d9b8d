//! The interface between a connection and the inspector of its protocol.

use palisade_abi::Reason;

use super::side::Side;
use crate::{
    Sink,
    context::Cx,
    handover::wire::{Reader, Wire},
    record::About,
    steps::{self, Detail},
};

/// Decision of an inspector about the bytes that it was shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    /// The inspector needs more bytes for a verdict on the first byte. It is called again when either side has sent
    /// more.
    NeedMore,
    /// As `NeedMore`, but no deadline runs, because the other side has to send first.
    AwaitPeer,
    /// The first `n` bytes are forwarded before their verdict and are shown to the inspector again. Used for a message
    /// that gets a verdict only as a whole: only the end of the message is held.
    ForwardUndecided(usize),
    /// The first `n` bytes are allowed and forwarded.
    Forward(usize),
    /// The next `n` bytes are forwarded without inspection, and their retransmissions need not be compared with an
    /// earlier copy. `n` can exceed the number of bytes that have arrived.
    Bypass(u64),
    /// From now on neither side is inspected.
    Offload,
    /// No further byte is forwarded. Both ends are reset.
    Abort(Reason),
    /// No further byte of this side is forwarded. This side gets the given bytes and a FIN, as if the other side had
    /// sent both after the bytes that it has sent so far. The other side gets a FIN too.
    Respond(Reason, Vec<u8>),
    /// As `Respond`, but the FIN follows the bytes some time later. For clients that read until the end of the
    /// connection and then drop what they have read.
    RespondThenEnd(Reason, Vec<u8>),
}

/// State that an inspector keeps for a connection while the connection is inspected.
pub(crate) trait Offloadable {
    /// State that is kept after the offload, to decide after a change of the rules whether the connection may continue.
    /// The default is for a connection that audit mode let pass without inspection.
    type OffloadVerdict: Default;
    /// Returns the state to keep, and removes it from `self`.
    fn remember(&mut self) -> Self::OffloadVerdict;
}

/// State of an inspector that a planned restart hands over.
pub(crate) trait Transferable: Offloadable<OffloadVerdict: Wire> + Sized {
    /// Appends the state. Returns false if the state cannot be handed over. The bytes without a verdict that are held
    /// are not handed over; the sender repeats them, and they are shown to the inspector again.
    fn write(&self, out: &mut Vec<u8>) -> bool;
    /// Reads a state that [`Transferable::write`] has written; `None` if the bytes are no such state.
    fn read(from: &mut Reader<'_>) -> Option<Self>;
}

/// Inspects the streams of both sides of a connection.
pub(crate) trait StreamInspector<F> {
    /// Inspects the bytes of one side that have arrived and have no verdict yet. `end` is true if the stream ends after
    /// these bytes. With `end` and no bytes, `Forward(0)` forwards the end of the stream.
    fn read<S: Sink<F>>(&mut self, side: Side, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action;

    /// Reports, before each `read`, how many bytes of the stream of `side` have been forwarded.
    fn sent(&mut self, _side: Side, _to: u64) {}
}

/// Takes a step for the decision of an inspector about the bytes of one side.
#[inline]
pub(crate) fn log_action(about: &About, side: Side, bytes: usize, action: &Action) {
    let detail = match action {
        Action::NeedMore | Action::AwaitPeer | Action::ForwardUndecided(_) => Detail::Trace,
        _ => Detail::Debug,
    };
    steps::of(about, detail, None, || action_text(side, bytes, action));
}

fn action_text(side: Side, bytes: usize, action: &Action) -> String {
    let side = match side {
        Side::Client => "client",
        Side::Server => "server",
    };
    let decision = match action {
        Action::NeedMore => "held, more are needed for a verdict".to_owned(),
        Action::AwaitPeer => "held until the other side has sent".to_owned(),
        Action::ForwardUndecided(n) => format!("{n} forwarded, the rest held for a verdict"),
        Action::Forward(0) if bytes == 0 => return format!("the end of the {side}'s stream is forwarded"),
        Action::Forward(n) => format!("{n} forwarded"),
        Action::Bypass(n) if *n > u64::from(u32::MAX) => {
            "everything forwarded without inspection until the connection ends".to_owned()
        }
        Action::Bypass(n) => format!("the next {n} forwarded without inspection"),
        Action::Offload => "the inspection ends, the rest is forwarded".to_owned(),
        Action::Abort(reason) => format!("the connection is reset ({})", reason.text()),
        Action::Respond(reason, response) | Action::RespondThenEnd(reason, response) => format!(
            "the {side} gets a response of {} bytes in the other side's place ({})",
            response.len(),
            reason.text()
        ),
    };
    format!("{bytes} bytes of the {side} to inspect: {decision}")
}
