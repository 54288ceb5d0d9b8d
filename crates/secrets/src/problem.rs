//! Messages about files of the folder.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use palisade_model::diagnostic::Severity;

/// One message about a place in the folder of secrets. The text contains no content of a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// An error: the secret or file is not used. A warning: it is used.
    pub severity: Severity,
    /// File or folder.
    pub file: PathBuf,
    /// Line, from 1; 0 for the file as a whole.
    pub line: u32,
    /// `namespace/name` of the secret, if known.
    pub secret: Option<String>,
    /// The problem and, if known, the remedy.
    pub text: String,
}

impl Problem {
    pub(crate) fn error(file: &Path, line: u32, text: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            file: file.to_owned(),
            line,
            secret: None,
            text: text.into(),
        }
    }

    pub(crate) fn warning(file: &Path, line: u32, text: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warning,
            ..Self::error(file, line, text)
        }
    }

    pub(crate) fn of(self, secret: &str) -> Self {
        Self {
            secret: Some(secret.to_owned()),
            ..self
        }
    }

    /// Returns whether the problem keeps the secret or file from being used.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }
}

impl fmt::Display for Problem {
    /// Writes `FILE:LINE: text`, without a line `FILE: text`. A warning has `warning: ` before the text.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.line != 0 {
            write!(f, ":{}", self.line)?;
        }
        let kind = if self.is_error() { "" } else { "warning: " };
        write!(f, ": {kind}{}", self.text)
    }
}
