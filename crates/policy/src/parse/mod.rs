//! The text of policy files to validated policies.

mod node;
mod yaml;

use std::sync::Arc;

use crate::{
    diagnostic::{Diagnostic, Severity},
    rule::{CidrGroup, Location, Policy},
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

/// Reads the text of a YAML (or JSON) file; `file` is how messages name it.
#[must_use]
pub fn parse(file: &str, text: &str) -> Parsed {
    let (_documents, errors) = yaml::documents(text);
    let file: Arc<str> = file.into();
    Parsed {
        diagnostics: errors.into_iter().map(|error| error.diagnostic(&file)).collect(),
        ..Parsed::default()
    }
}

/// Reads what a case file holds: whole resources (`policies`) and bare specs (`rules`, to which no namespace
/// scoping is applied), each a list of objects. `case` is how messages name it.
#[must_use]
pub fn parse_rules_json(
    case: &str,
    policies: Option<&serde_json::Value>,
    rules: Option<&serde_json::Value>,
) -> Parsed {
    let _ = (case, policies, rules);
    Parsed::default()
}

/// The documents of a YAML text as JSON values, for files that are not policies (case files).
pub fn yaml_to_json(file: &str, text: &str) -> Result<Vec<serde_json::Value>, Vec<Diagnostic>> {
    let (documents, errors) = yaml::documents(text);
    if errors.is_empty() {
        return Ok(documents.iter().map(node::Node::to_json).collect());
    }
    let file: Arc<str> = file.into();
    Err(errors.into_iter().map(|error| error.diagnostic(&file)).collect())
}

impl yaml::YamlError {
    fn diagnostic(self, file: &Arc<str>) -> Diagnostic {
        Diagnostic {
            severity: Severity::Error,
            location: Location {
                file: Arc::clone(file),
                line: self.position.line,
                column: self.position.column,
            },
            message: self.message,
        }
    }
}
