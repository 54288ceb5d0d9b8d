//! The toFQDNs selectors of a policy, compiled into one [`NameSet`].

use palisade_model::rule::FqdnPattern;
use palisade_protocols::dns::{Name, NameSet, PatternError};

/// Number of a toFQDNs selector. The policy compiler assigns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct SelectorId(pub u32);

/// The compiled toFQDNs selectors of one policy. Endpoints with the same policy share them.
#[derive(Clone, Debug, Default)]
pub struct Selectors {
    names: NameSet,
    ids: Vec<SelectorId>,
}

impl Selectors {
    /// Compiles selectors. A selector with several patterns occurs once for each pattern.
    ///
    /// # Errors
    /// [`PatternError`] for the first pattern that is invalid.
    pub fn new<'a>(
        selectors: impl IntoIterator<Item = (SelectorId, &'a FqdnPattern)>,
    ) -> Result<Self, PatternError> {
        let (ids, patterns): (Vec<_>, Vec<_>) = selectors.into_iter().unzip();
        Ok(Self {
            names: NameSet::new(patterns)?,
            ids,
        })
    }

    /// Returns the selectors that a name matches, in ascending order and without duplicates.
    #[must_use]
    pub fn matching(&self, name: &Name) -> Box<[SelectorId]> {
        let mut found = Vec::new();
        self.names
            .for_each(name, |index| found.extend(self.ids.get(index)));
        found.sort_unstable();
        found.dedup();
        found.into_boxed_slice()
    }
}
