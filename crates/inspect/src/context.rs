//! Context of one call of the engine: everything but the packet.

use crate::{Millis, frames::Spare, rules::Rules};

/// Time, rules, and the sink of one call. Each inspector passes it on to the functions that it calls.
pub(crate) struct Cx<'a, F, S> {
    /// Time of the call, ms.
    pub(crate) now: Millis,
    pub(crate) rules: &'a Rules,
    /// Vectors for the frames of fragmented datagrams.
    pub(crate) spare: &'a mut Spare<F>,
    pub(crate) sink: &'a mut S,
}
