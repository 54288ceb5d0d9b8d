//! What there is to say about a file: errors, warnings, notes, each with its place.

use std::fmt;

use crate::rule::Location;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// The file cannot be used.
    Error,
    /// The file can be used, but something in it does not do what one may expect.
    Warning,
    /// Worth knowing, nothing to do about it.
    Note,
}

/// One remark about a place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// Where.
    pub location: Location,
    /// What, and where it can be said, what to write instead.
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
    /// `FILE:LINE:COL: message` for an error; the others say what they are before the message.
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
    fn only_the_milder_kinds_are_named() {
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
