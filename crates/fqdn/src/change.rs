//! Changes to the maps, and the states of an answer: [`Pending`] until its changes are written to the maps, then
//! [`Committed`]. Only a committed answer is forwarded.

use std::{fmt, net::IpAddr, sync::Arc};

use crate::{EndpointId, Millis, SelectorId};

/// The new state of an (endpoint, selector, address) triple.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChangeKind {
    /// The selector allows the endpoint to reach the address.
    Live,
    /// The selector no longer allows the endpoint to reach the address.
    Gone,
}

/// A change to the maps. Writing a change twice has the effect of writing it once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The endpoint.
    pub endpoint: EndpointId,
    /// The selector.
    pub selector: SelectorId,
    /// The address.
    pub address: IpAddr,
    /// The new state.
    pub kind: ChangeKind,
    /// Number of the triple's transition to this state. A repeated change has the same number.
    pub(crate) turn: u64,
}

/// Changes whose cause is not an answer: for example expiry, a new policy or an operator.
///
/// The caller writes all changes, those of answers included, in the order in which the cache has returned them, and
/// then calls [`crate::Cache::written`]. If a write fails, the caller drops the update; the next sweep repeats its
/// changes.
#[derive(Debug, Default)]
#[must_use = "the maps do not hold what the cache says until these changes are written"]
pub struct Update {
    pub(crate) changes: Vec<Change>,
}

impl Update {
    /// Returns the changes in the order in which they must be written.
    #[must_use]
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }
}

/// An answer whose addresses were learned, and which must not be forwarded yet.
///
/// The caller writes the changes, in the order in which the cache has returned them, and calls
/// [`crate::Cache::commit`]; or it calls [`crate::Cache::abort`] and drops the answer.
#[derive(Debug)]
#[must_use = "an answer must be committed before it is forwarded"]
pub struct Pending {
    pub(crate) number: u64,
    pub(crate) endpoint: EndpointId,
    pub(crate) changes: Vec<Change>,
    /// The learned (name in wire form, address) pairs of the answer, including those that the cache already had.
    pub(crate) pairs: Vec<(Arc<[u8]>, IpAddr)>,
    pub(crate) refused: usize,
    /// Lifetime that the answer gives to its pairs, ms.
    pub(crate) lease: Millis,
}

impl Pending {
    /// Returns the changes in the order in which they must be written. Often there are none, because the cache already
    /// had all addresses.
    #[must_use]
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// Returns the number of the answer, for reports.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Returns the endpoint that receives the answer.
    #[must_use]
    pub fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    /// Returns the learned addresses of the answer, including those that the cache already had. An address can occur
    /// several times.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.pairs.iter().map(|(_, address)| *address)
    }

    /// Returns the number of (name, address) pairs that were not learned because of a limit.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.refused
    }

    /// Returns the lifetime that the answer gives to its addresses, ms; `None` if no address was learned, or if a limit
    /// excluded an address.
    #[must_use]
    pub fn lease(&self) -> Option<Millis> {
        (self.refused == 0 && !self.pairs.is_empty()).then_some(self.lease)
    }
}

/// Proof that the maps hold all changes of one answer. Only [`crate::Cache::commit`] creates it.
#[derive(Debug)]
#[must_use = "the answer may be forwarded now"]
pub struct Committed {
    pub(crate) number: u64,
}

impl Committed {
    /// Returns the number of the answer, see [`Pending::number`].
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }
}

/// The reason why an answer must not be forwarded, or not yet.
#[derive(Debug)]
pub enum Uncommitted {
    /// The maps lack addresses of the answer, for example because the policy was replaced after the answer was learned.
    /// The caller writes the changes of this [`Pending`] and commits again.
    Missing(Pending),
    /// An address of the answer was removed after the answer was learned. The caller drops the answer.
    Superseded,
}

impl fmt::Display for Uncommitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(pending) => {
                write!(f, "the maps lack {} changes of the answer", pending.changes.len())
            }
            Self::Superseded => f.write_str("an address of the answer was removed before the commit"),
        }
    }
}

impl std::error::Error for Uncommitted {}
