//! What the cache wants changed in the maps, and the types that tie the release of an answer to those changes:
//! [`Pending`] until they are written, [`Committed`] afterwards.

use std::{fmt, net::IpAddr, sync::Arc};

use crate::{EndpointId, Millis, SelectorId};

/// What happens to a triple of endpoint, selector and address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChangeKind {
    /// The endpoint may reach the address by the selector.
    Live,
    /// No longer.
    Gone,
}

/// One change of what the maps must hold. Making it twice does no harm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Whose.
    pub endpoint: EndpointId,
    /// By which selector.
    pub selector: SelectorId,
    /// Which address.
    pub address: IpAddr,
    /// What happens.
    pub kind: ChangeKind,
    /// Number of the turn (to live, to gone) that the change belongs to. A repeated change has the same.
    pub(crate) turn: u64,
}

/// Changes that come from elsewhere than an answer: expiry, a policy, an operator.
///
/// Changes are written to the maps in the order in which the cache handed them out, those of answers and these
/// together. Then this goes to [`crate::Cache::written`]. If writing failed, it is dropped: what did not reach
/// the maps comes again with the next sweep.
#[derive(Debug, Default)]
#[must_use = "the maps do not hold what the cache says until these changes are written"]
pub struct Update {
    pub(crate) changes: Vec<Change>,
}

impl Update {
    /// The changes, in the order in which they are to be written.
    #[must_use]
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }
}

/// An answer that was learned and must not be released yet.
///
/// Write its changes (in the order in which the cache handed changes out), then [`crate::Cache::commit`]; or
/// [`crate::Cache::abort`], and the answer is dropped.
#[derive(Debug)]
#[must_use = "an answer is released only after what it implies is committed"]
pub struct Pending {
    pub(crate) number: u64,
    pub(crate) endpoint: EndpointId,
    pub(crate) changes: Vec<Change>,
    /// Everything the answer taught: name (as on the wire) and address.
    pub(crate) pairs: Vec<(Arc<[u8]>, IpAddr)>,
    pub(crate) refused: usize,
    /// How long they are kept at least, from when they were learned.
    pub(crate) lease: Millis,
}

impl Pending {
    /// The changes, in the order in which they are to be written. Often none: everything was known.
    #[must_use]
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// Number of the learning, for the report.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whose answer it is.
    #[must_use]
    pub fn endpoint(&self) -> EndpointId {
        self.endpoint
    }

    /// The addresses that it taught, known ones too; one may come several times.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.pairs.iter().map(|(_, address)| *address)
    }

    /// How many of the answer's addresses were not learned, because a limit is reached and everything is in use.
    #[must_use]
    pub fn refused(&self) -> usize {
        self.refused
    }

    /// For how long from its learning everything that it taught is kept, in milliseconds; none if not everything is, or
    /// there is nothing.
    #[must_use]
    pub fn lease(&self) -> Option<Millis> {
        (self.refused == 0 && !self.pairs.is_empty()).then_some(self.lease)
    }
}

/// Proof that the maps hold everything an answer implies. Only [`crate::Cache::commit`] makes one, for one answer.
#[derive(Debug)]
#[must_use = "the answer may be released now"]
pub struct Committed {
    pub(crate) number: u64,
}

impl Committed {
    /// Number of the learning: [`Pending::number`].
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }
}

/// Why an answer may not be released.
#[derive(Debug)]
pub enum Uncommitted {
    /// Since it was learned, something else came to be implied (a policy was loaded, another write failed). Its
    /// changes have been handed out anew: write them in their turn, commit again.
    Missing(Pending),
    /// An address of the answer has been removed since (a limit, an operator): drop the answer.
    Superseded,
}

impl fmt::Display for Uncommitted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing(pending) => {
                write!(f, "the answer implies {} more changes", pending.changes.len())
            }
            Self::Superseded => f.write_str("an address of the answer was removed before it was released"),
        }
    }
}

impl std::error::Error for Uncommitted {}
