//! The parser of policy files: from text to validated policies.
//!
//! ```text
//! YAML text ── palisade_yaml ──┐                     ┌─ spec ── rules ──┬─ peers ── selector, cidr, fqdn
//!                              ├─> node ── resource ─┼─ network_policy  └─ ports ── l7 ── fqdn
//! JSON value ──────────────────┘          (metadata) └─ cidr_group
//! ```
//!
//! A document becomes a tree whose nodes have line and column. `reader` reads the tree: each member is requested by
//! name, and members that are never requested are unknown fields. After an error the parser continues, so that all
//! errors of a file are reported. Equivalent ways to write a policy have the same output (see
//! [`rule`](palisade_model::rule)).
//!
//! The parser reads the trees of `palisade_yaml` instead of using serde, because serde stops at the first error and
//! loses the places of fields and values.

mod cidr;
mod cidr_group;
mod fqdn;
mod l7;
mod metadata;
mod name_syntax;
mod network_policy;
mod parsed;
mod peers;
mod ports;
mod reader;
mod resource;
mod rules;
mod section;
mod selector;
mod spec;
#[cfg(test)]
mod tests;

use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    rule::{Policy, PolicyKind},
};
use palisade_yaml::Node;
pub use parsed::Parsed;
use reader::{At, Context};
use resource::Resources;

/// Decodes the bytes of a file, which must be UTF-8.
///
/// # Errors
/// An error at the place of the first byte that is not UTF-8.
pub fn decode(file: &str, bytes: Vec<u8>) -> Result<String, Diagnostic> {
    let utf16 = matches!(bytes.as_slice(), [0xff, 0xfe, ..] | [0xfe, 0xff, ..]);
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let before = str::from_utf8(&error.as_bytes()[..at]).unwrap_or_default();
        let message = if utf16 {
            "this is UTF-16; save it as UTF-8".to_owned()
        } else {
            format!(
                "the byte 0x{:02x} is no part of UTF-8 text; save the file as UTF-8",
                error.as_bytes()[at]
            )
        };
        Diagnostic {
            severity: Severity::Error,
            location: Context::new(file).location(palisade_yaml::position_at(before, before.len())),
            message,
        }
    })
}

/// Returns whether a text has neither a document nor a comment. Such a file was probably truncated, or is being
/// written.
#[must_use]
pub fn is_blank(text: &str) -> bool {
    text.lines().all(|line| {
        let line = line.trim_matches(|c: char| c.is_whitespace() || c.is_control() || c == '\u{feff}');
        matches!(line, "" | "---" | "...")
    })
}

/// Parses the text of a YAML or JSON file. `file` is the name of the file in messages.
#[must_use]
pub fn parse(file: &str, text: &str) -> Parsed {
    let context = Context::new(file);
    let documents = documents(&context, text);
    let mut resources = Resources::default();
    for document in &documents {
        resources.read(At::root(&context, document, ""));
    }
    resources.into_parsed(context)
}

/// Parses the policies of a case: resources (`policies`), and bare rules (`rules`), whose selectors are not limited to
/// a namespace. Both are lists of objects. `case` is the name of the case in messages.
#[must_use]
pub fn parse_rules_json(
    case: &str,
    policies: Option<&serde_json::Value>,
    rules: Option<&serde_json::Value>,
) -> Parsed {
    let context = Context::new(case);
    let mut resources = Resources::default();
    each(&context, "policies", policies, |_, at| resources.read(at));
    context.read_bare();
    each(&context, "rules", rules, |name, at| {
        let errors = context.errors();
        context.begin_policy();
        let spec = spec::read(at, PolicyKind::Raw, None);
        if let (Some(spec), true) = (spec, context.errors() == errors) {
            resources.policies.push(Policy {
                kind: PolicyKind::Raw,
                name: name.to_owned(),
                namespace: None,
                audit: false,
                location: spec.location.clone(),
                specs: vec![spec],
            });
        }
    });
    resources.into_parsed(context)
}

/// Calls `read` with the name and the node of each element of a list.
fn each(
    context: &Context,
    name: &'static str,
    list: Option<&serde_json::Value>,
    mut read: impl FnMut(&str, At<'_>),
) {
    match list {
        None | Some(serde_json::Value::Null) => {}
        Some(serde_json::Value::Array(items)) => {
            for (index, item) in items.iter().enumerate() {
                let name = format!("{name}[{index}]");
                read(&name, At::root(context, &Node::from_json(item), &name));
            }
        }
        Some(other) => {
            let found = Node::from_json(other).describe();
            let message = format!("{name} must be a list, found {found}");
            context.diagnose(Severity::Error, palisade_yaml::Position::default(), message);
        }
    }
}

/// Returns the documents of a YAML text as JSON values, for case files.
pub fn yaml_to_json(file: &str, text: &str) -> Result<Vec<serde_json::Value>, Vec<Diagnostic>> {
    let context = Context::new(file);
    let documents = documents(&context, text);
    if context.errors() == 0 {
        Ok(documents.iter().map(Node::to_json).collect())
    } else {
        Err(context.into_diagnostics())
    }
}

fn documents(context: &Context, text: &str) -> Vec<Node> {
    let (documents, errors) = palisade_yaml::documents(text);
    for error in errors {
        context.diagnose(Severity::Error, error.position, error.message);
    }
    documents
}
