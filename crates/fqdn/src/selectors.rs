//! The toFQDNs selectors of a policy, compiled to one [`NameSet`].

use palisade_policy::rule::FqdnPattern;
use palisade_protocols::dns::{Name, NameSet, PatternError};

/// Number of a toFQDNs selector, given by whoever compiles the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct SelectorId(pub u32);

/// The toFQDNs selectors of one policy, compiled. Endpoints with the same policy share one.
#[derive(Clone, Debug, Default)]
pub struct Selectors {
    names: NameSet,
    ids: Vec<SelectorId>,
}

impl Selectors {
    /// Compiles selectors. An id may have several patterns.
    ///
    /// # Errors
    /// If one of them is no name and no pattern.
    pub fn new<'a>(
        selectors: impl IntoIterator<Item = (SelectorId, &'a FqdnPattern)>,
    ) -> Result<Self, PatternError> {
        let (ids, patterns): (Vec<_>, Vec<_>) = selectors.into_iter().unzip();
        Ok(Self {
            names: NameSet::new(patterns)?,
            ids,
        })
    }

    /// The selectors that a name matches, ascending, each once.
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
