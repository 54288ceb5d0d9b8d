//! The output of the parser.

use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    rule::{CidrGroup, Policy},
};

/// The result of parsing a file.
///
/// A resource with an error is not among the policies. The caller decides whether to use the others: a file with an
/// error must not replace its last good content.
#[derive(Clone, Debug, Default)]
pub struct Parsed {
    /// Policies without errors, in the order of the file.
    pub policies: Vec<Policy>,
    /// `CiliumCIDRGroup`s without errors, in the order of the file.
    pub cidr_groups: Vec<CidrGroup>,
    /// Errors, warnings and notes, in the order of the text.
    pub diagnostics: Vec<Diagnostic>,
}

impl Parsed {
    /// Returns whether the file has an error.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.diagnostics
            .iter()
            .any(|diagnostic| diagnostic.severity == Severity::Error)
    }
}
