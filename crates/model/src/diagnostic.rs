//! Errors, warnings and notes about a policy file, each with its place.

use std::fmt;

use crate::rule::Location;

/// Severity of a diagnostic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// The file is rejected.
    Error,
    /// The file is accepted, but a part of it probably does not do what its author expects.
    Warning,
    /// Information that needs no action.
    Note,
}

/// One message about a place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Severity of the message.
    pub severity: Severity,
    /// Place in the file.
    pub location: Location,
    /// The problem and, if known, the remedy.
    pub message: String,
}

impl Diagnostic {
    /// Returns an error at a place.
    #[must_use]
    pub const fn error(location: Location, message: String) -> Self {
        Self {
            severity: Severity::Error,
            location,
            message,
        }
    }
}

impl fmt::Display for Diagnostic {
    /// Writes `FILE:LINE:COL: message`. Warnings and notes have their severity before the message.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.severity {
            Severity::Error => "",
            Severity::Warning => "warning: ",
            Severity::Note => "note: ",
        };
        write!(f, "{}: {kind}{}", self.location, self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_warnings_and_notes_name_their_severity() {
        let at = |severity| Diagnostic {
            severity,
            location: Location {
                file: "p.yaml".into(),
                line: 3,
                column: 9,
            },
            message: "what".into(),
        };
        assert_eq!(at(Severity::Error).to_string(), "p.yaml:3:9: what");
        assert_eq!(at(Severity::Warning).to_string(), "p.yaml:3:9: warning: what");
        assert_eq!(at(Severity::Note).to_string(), "p.yaml:3:9: note: what");
    }
}
