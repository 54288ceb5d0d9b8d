//! The output of the parser.

use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    rule::{CidrGroup, Policy},
};

/// The result of parsing a file.
///
/// Resources with errors are left out. If the file has an error, the caller must not replace the last good content of
/// the file with the remaining resources.
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
