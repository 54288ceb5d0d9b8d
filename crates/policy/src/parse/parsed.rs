//! The output of the parser.

use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    rule::{CidrGroup, Policy},
};

/// What was read from a file.
///
/// A resource with an error is not among the policies; whether the others are used is the caller's decision
/// (a file with an error must not replace a good one).
#[derive(Clone, Debug, Default)]
pub struct Parsed {
    /// The policies without errors, in their order.
    pub policies: Vec<Policy>,
    /// The `CiliumCIDRGroup`s without errors, in their order.
    pub cidr_groups: Vec<CidrGroup>,
    /// Everything there is to say, in the order of the text.
    pub diagnostics: Vec<Diagnostic>,
}

impl Parsed {
    /// Whether something in it is wrong.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.diagnostics
            .iter()
            .any(|diagnostic| diagnostic.severity == Severity::Error)
    }
}
