//! Context of one call of the engine: everything but the packet.

use crate::{Millis, frames::Spare, rules::Rules};

/// Time, rules and sink of one call, passed down to all functions of the call.
pub(crate) struct Cx<'a, F, S> {
    /// Time of the call, ms.
    pub(crate) now: Millis,
    pub(crate) rules: &'a Rules,
    /// Vectors for the frames of fragmented datagrams.
    pub(crate) spare: &'a mut Spare<F>,
    pub(crate) sink: &'a mut S,
}
