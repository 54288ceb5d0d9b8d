//! The interface between a connection and the inspector of its protocol.

use palisade_abi::Reason;

use super::side::Side;
use crate::{Sink, context::Cx};

/// Decision of an inspector about the bytes that it was shown.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    /// The first byte cannot be judged yet. The inspector is called again when either side has sent more.
    NeedMore,
    /// As `NeedMore`, but no deadline runs, because the other side has to send first.
    AwaitPeer,
    /// The first bytes, this many, are forwarded but stay unjudged and are shown again. For messages that can be
    /// judged only as a whole: their end is held.
    ForwardUnjudged(usize),
    /// The first bytes, this many, are judged and forwarded.
    Forward(usize),
    /// The next bytes, this many, are forwarded without inspection, and retransmissions of them are not compared. The
    /// number may exceed the bytes that have arrived.
    Bypass(u64),
    /// From now on neither side is inspected.
    Offload,
    /// No further byte is forwarded. Both ends are reset.
    Abort(Reason),
    /// No further byte of this side is forwarded. This side gets these bytes and a FIN, as if from the other side and
    /// behind the bytes that the other side has sent so far. The other side gets a FIN too.
    Respond(Reason, Vec<u8>),
}

/// State that an inspector keeps for a connection while the connection is inspected.
pub(crate) trait Offloadable {
    /// State that is kept after the offload, to judge the connection again if its rules change. The default stands
    /// for a connection that audit mode let pass without inspection.
    type OffloadVerdict: Default;
    /// Takes that state out.
    fn remember(&mut self) -> Self::OffloadVerdict;
}

/// Inspects the streams of both sides of a connection.
pub(crate) trait StreamInspector<F> {
    /// Judges the bytes of one side that have arrived and are not judged yet. `end`: the stream ends behind them. With
    /// `end` and no bytes, `Forward(0)` forwards the end of the stream.
    fn read<S: Sink<F>>(&mut self, side: Side, bytes: &[u8], end: bool, cx: &mut Cx<'_, F, S>) -> Action;

    /// Reports, before each `read`, how many bytes of the stream of `side` have been forwarded.
    fn sent(&mut self, _side: Side, _to: u64) {}
}
