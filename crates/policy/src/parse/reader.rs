//! Access to trees of nodes: a cursor with the path to its node, objects whose members are requested by name, and
//! diagnostics.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    fmt,
    ops::RangeInclusive,
    sync::Arc,
};

use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    rule::Location,
};
use palisade_protocols::http1::re2;

use crate::suggest::nearest;
use palisade_yaml::{Entry, Node, Position, Value, quoted};

/// Bound on the cost of all regular expressions of one policy, in automaton states ([`re2::cost`]).
pub(super) const MAX_POLICY_COST: usize = 250_000;
/// Bound on the cost of all regular expressions of one file, in automaton states.
const MAX_FILE_COST: usize = 2_000_000;

/// State of the parsing of one file, such as its name and the diagnostics so far.
pub(super) struct Context {
    file: Arc<str>,
    diagnostics: RefCell<Vec<Diagnostic>>,
    errors: Cell<usize>,
    /// Whether a bare rule of a case file is being parsed. No schema of Kubernetes validates bare rules, so they are
    /// interpreted as by Cilium's agent, and violations of the schema of resources are only warnings.
    bare: Cell<bool>,
    expressions: RefCell<Expressions>,
}

/// Regular expressions of the file so far.
#[derive(Default)]
struct Expressions {
    /// Result of the check of each expression.
    known: HashMap<String, Result<(), String>>,
    /// Cost of all expressions of the file, and of the current policy, in automaton states.
    of_file: usize,
    of_policy: usize,
}

impl Context {
    pub(super) fn new(file: &str) -> Self {
        Self {
            expressions: RefCell::default(),
            file: file.into(),
            bare: Cell::new(false),
            diagnostics: RefCell::default(),
            errors: Cell::new(0),
        }
    }

    /// Returns the number of errors so far, to find out whether an element was parsed without error.
    pub(super) fn errors(&self) -> usize {
        self.errors.get()
    }

    /// Declares that bare rules follow.
    pub(super) fn read_bare(&self) {
        self.bare.set(true);
    }

    /// Declares that a policy begins, which resets the cost of its expressions.
    pub(super) fn begin_policy(&self) {
        self.expressions.borrow_mut().of_policy = 0;
    }

    /// Checks a regular expression. Before it is compiled, the cost of this expression, of its policy and of its file
    /// is compared with the bounds. Without bounds a small file could occupy the daemon for minutes.
    pub(super) fn check_expression(&self, pattern: &str) -> Result<(), String> {
        let mut expressions = self.expressions.borrow_mut();
        if let Some(known) = expressions.known.get(pattern) {
            return known.clone();
        }
        // Once a bound is exceeded, not even the cost of further expressions is computed.
        let used_up = expressions.of_policy > MAX_POLICY_COST || expressions.of_file > MAX_FILE_COST;
        let cost = if used_up { Ok(1) } else { re2::cost(pattern) };
        if cost.is_err() {
            expressions.of_policy = expressions.of_policy.saturating_add(2_000);
            expressions.of_file = expressions.of_file.saturating_add(2_000);
        }
        let checked = cost.and_then(|cost| {
            expressions.of_policy = expressions.of_policy.saturating_add(cost);
            expressions.of_file = expressions.of_file.saturating_add(cost);
            for (sum, most, whose) in [
                (expressions.of_policy, MAX_POLICY_COST, "policy"),
                (expressions.of_file, MAX_FILE_COST, "file"),
            ] {
                if sum > most {
                    return Err(format!(
                        "the expressions of this {whose} up to here are too large together: they need about {sum} \
                         states, of at most {most}"
                    ));
                }
            }
            #[cfg(test)]
            compiled::count(cost);
            re2::compile(pattern).map(drop)
        });
        expressions.known.insert(pattern.to_owned(), checked.clone());
        checked
    }

    pub(super) fn location(&self, position: Position) -> Location {
        Location {
            file: Arc::clone(&self.file),
            line: position.line,
            column: position.column,
        }
    }

    pub(super) fn diagnose(&self, severity: Severity, position: Position, message: String) {
        if severity == Severity::Error {
            self.errors.set(self.errors.get() + 1);
        }
        let location = self.location(position);
        self.diagnostics.borrow_mut().push(Diagnostic {
            severity,
            location,
            message,
        });
    }

    /// Returns the diagnostics in the order of the text.
    pub(super) fn into_diagnostics(self) -> Vec<Diagnostic> {
        let mut diagnostics = self.diagnostics.into_inner();
        diagnostics.sort_by_key(|diagnostic| (diagnostic.location.line, diagnostic.location.column));
        diagnostics
    }
}

/// Counts the states of compiled expressions: tests bound the work by this number, as the time depends on the load of
/// the machine.
#[cfg(test)]
pub(super) mod compiled {
    use std::cell::Cell;

    thread_local! {
        static STATES: Cell<usize> = const { Cell::new(0) };
    }

    pub(super) fn count(states: usize) {
        STATES.set(STATES.get().saturating_add(states));
    }

    /// Returns the sum and resets it.
    pub(in crate::parse) fn take() -> usize {
        STATES.take()
    }
}

/// One step of the path to a node.
#[derive(Clone, Copy)]
enum Step<'a> {
    /// Root of the tree: a document, or an element of a list of resources.
    Root(&'a str),
    Member(&'a str),
    Index(usize),
}

/// A node, with the path to it.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub context: &'a Context,
    pub node: &'a Node,
    parent: Option<&'a At<'a>>,
    step: Step<'a>,
}

impl fmt::Display for At<'_> {
    /// Writes the path, as in `spec.egress[0].toPorts[1].ports[0].port`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        match self.step {
            Step::Root(name) => f.write_str(name),
            Step::Index(index) => write!(f, "[{index}]"),
            Step::Member(name) => {
                let first = self
                    .parent
                    .is_none_or(|parent| matches!(parent.step, Step::Root("")));
                write!(f, "{}{name}", if first { "" } else { "." })
            }
        }
    }
}

impl<'a> At<'a> {
    /// Returns the root of a tree. `name` precedes the path in messages without a line; `name` can be empty.
    pub(super) fn root(context: &'a Context, node: &'a Node, name: &'a str) -> Self {
        At {
            context,
            node,
            parent: None,
            step: Step::Root(name),
        }
    }

    pub(super) fn location(&self) -> Location {
        self.context.location(self.node.position)
    }

    fn diagnose(&self, severity: Severity, position: Position, message: &str) {
        // Without a line the message gives the path.
        let way = if position.line == 0 {
            self.to_string()
        } else {
            String::new()
        };
        let message = if way.is_empty() {
            message.to_owned()
        } else {
            format!("{way}: {message}")
        };
        self.context.diagnose(severity, position, message);
    }

    pub(super) fn error(&self, message: impl AsRef<str>) {
        self.diagnose(Severity::Error, self.node.position, message.as_ref());
    }

    pub(super) fn warning(&self, message: impl AsRef<str>) {
        self.diagnose(Severity::Warning, self.node.position, message.as_ref());
    }

    /// Returns whether the node is part of a bare rule of a case file.
    pub(super) fn is_bare(&self) -> bool {
        self.context.bare.get()
    }

    /// Reports something that only the schema of resources forbids: an error in a resource, a warning in a bare rule.
    pub(super) fn unfit(&self, message: impl AsRef<str>) {
        if self.is_bare() {
            self.warning(message);
        } else {
            self.error(message);
        }
    }

    pub(super) fn note(&self, message: impl AsRef<str>) {
        self.diagnose(Severity::Note, self.node.position, message.as_ref());
    }

    fn expected<T>(&self, what: &str) -> Option<T> {
        self.error(format!(
            "{} must be {what}, found {}",
            self.name(),
            self.node.describe()
        ));
        None
    }

    /// Returns the name of the node in messages.
    fn name(&self) -> &str {
        match self.step {
            Step::Root(_) => "this",
            Step::Member(name) => name,
            Step::Index(_) => match self.parent {
                Some(At {
                    step: Step::Member(_),
                    ..
                }) => "this element",
                _ => "this",
            },
        }
    }

    pub(super) fn object(&self) -> Option<Object<'a>> {
        match &self.node.value {
            Value::Map(entries) => Some(Object {
                at: *self,
                entries,
                known: RefCell::default(),
            }),
            Value::Null if self.is_bare() => Some(Object {
                at: *self,
                entries: &[],
                known: RefCell::default(),
            }),
            _ => self.expected("an object"),
        }
    }

    pub(super) fn list(&self) -> Option<List<'a>> {
        match &self.node.value {
            Value::List(items) => Some(List { at: *self, items }),
            _ => self.expected("a list"),
        }
    }

    /// Returns whether the node is an empty list.
    pub(super) fn is_empty_list(&self) -> bool {
        matches!(&self.node.value, Value::List(items) if items.is_empty())
    }

    pub(super) fn string(&self) -> Option<&'a str> {
        match &self.node.value {
            Value::String { text, .. } => Some(text),
            Value::Bool(_) | Value::Integer(_) | Value::Float(_) => {
                let value = match &self.node.value {
                    Value::Bool(value) => value.to_string(),
                    Value::Integer(value) => value.to_string(),
                    Value::Float(text) => text.clone(),
                    _ => String::new(),
                };
                self.error(format!(
                    "{} must be a string, found {}; put it in quotes: \"{value}\"",
                    self.name(),
                    self.node.describe()
                ));
                None
            }
            _ => self.expected("a string"),
        }
    }

    pub(super) fn boolean(&self) -> Option<bool> {
        match &self.node.value {
            Value::Bool(value) => Some(*value),
            // Booleans of YAML 1.1, which the YAML parser of Kubernetes still accepts.
            Value::String { text, plain: true } => match text.to_ascii_lowercase().as_str() {
                "yes" | "on" | "y" => Some(true),
                "no" | "off" | "n" => Some(false),
                _ => self.expected("true or false"),
            },
            _ => self.expected("true or false"),
        }
    }

    pub(super) fn integer(&self, range: RangeInclusive<i64>) -> Option<i64> {
        let Value::Integer(value) = &self.node.value else {
            if let Value::Float(text) = &self.node.value
                && let Some(digits) = text.strip_prefix('0')
                && digits.bytes().all(|byte| byte.is_ascii_digit())
            {
                self.error(format!(
                    "{} must be a number without leading zeros, found {text}: some readers take it for an octal number",
                    self.name()
                ));
                return None;
            }
            return self.expected("a number");
        };
        match i64::try_from(*value) {
            Ok(value) if range.contains(&value) => Some(value),
            _ => {
                self.error(format!(
                    "{} must be a number from {} to {}, found {value}",
                    self.name(),
                    range.start(),
                    range.end()
                ));
                None
            }
        }
    }
}

/// A list with the path to it.
pub(super) struct List<'a> {
    at: At<'a>,
    items: &'a [Node],
}

impl<'a> List<'a> {
    pub(super) fn len(&self) -> usize {
        self.items.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Calls `element` for each element of the list. Elements for which `element` returns `None` are left out;
    /// `element` must have reported the cause.
    pub(super) fn read<T>(&self, mut element: impl FnMut(At<'_>) -> Option<T>) -> Vec<T> {
        let at = self.at;
        self.items
            .iter()
            .enumerate()
            .filter_map(|(index, node)| {
                element(At {
                    context: at.context,
                    node,
                    parent: Some(&at),
                    step: Step::Index(index),
                })
            })
            .collect()
    }
}

/// An object whose members are requested by name. Members that are never requested are unknown fields.
pub(super) struct Object<'a> {
    pub at: At<'a>,
    entries: &'a [Entry],
    known: RefCell<Vec<&'static str>>,
}

impl<'a> Object<'a> {
    /// Returns the member `name`, unless it is absent or null.
    pub(super) fn field(&self, name: &'static str) -> Option<At<'_>> {
        self.field_or_null(name).filter(|at| !at.node.is_null())
    }

    /// Returns the member `name`, unless it is absent.
    pub(super) fn field_or_null(&self, name: &'static str) -> Option<At<'_>> {
        self.known.borrow_mut().push(name);
        self.entry(name).map(|entry| At {
            context: self.at.context,
            node: &entry.value,
            parent: Some(&self.at),
            step: Step::Member(name),
        })
    }

    /// Returns a mandatory member, or reports its absence.
    pub(super) fn required(&self, name: &'static str) -> Option<At<'_>> {
        let field = self.field(name);
        if field.is_none() {
            self.at.error(format!("{name} is missing"));
        }
        field
    }

    /// Returns a string member; an empty string counts as absent.
    pub(super) fn text(&self, name: &'static str) -> Option<&'a str> {
        self.field(name)?.string()?;
        self.entry(name)?.value.as_str().filter(|text| !text.is_empty())
    }

    /// Returns a mandatory string member that must not be empty.
    pub(super) fn required_text(&self, name: &'static str) -> Option<&'a str> {
        let field = self.required(name)?;
        if field.string()?.is_empty() {
            field.error(format!("{name} must not be empty"));
            return None;
        }
        self.entry(name)?.value.as_str()
    }

    /// Reports an error if a forbidden member is present. Null and an empty list are accepted.
    pub(super) fn refuse(&self, name: &'static str, why: &str) {
        self.known.borrow_mut().push(name);
        if let Some(entry) = self.entry(name) {
            let says_nothing = match &entry.value.value {
                Value::Null => true,
                Value::List(items) => items.is_empty(),
                _ => false,
            };
            if !says_nothing {
                self.at
                    .diagnose(Severity::Error, entry.position, &format!("{name} {why}"));
            }
        }
    }

    /// Warns of null members among `names`, except in bare rules: such a member restricts nothing, and often the author
    /// only forgot the value.
    pub(super) fn warn_null(&self, names: &[&'static str]) {
        if self.at.is_bare() {
            return;
        }
        for entry in self.entries.iter().filter(|entry| entry.value.is_null()) {
            if names.contains(&entry.key.as_str()) {
                let message = format!("{} is null, which is the same as absent", entry.key);
                self.at.diagnose(Severity::Warning, entry.position, &message);
            }
        }
    }

    /// Accepts members that Palisade does not use.
    pub(super) fn ignore(&self, names: &[&'static str]) {
        self.known.borrow_mut().extend(names);
    }

    fn entry(&self, name: &str) -> Option<&'a Entry> {
        self.entries.iter().find(|entry| entry.key == name)
    }

    /// Returns all members.
    pub(super) fn members(&self) -> impl Iterator<Item = (&'a str, At<'_>)> {
        self.entries.iter().map(|entry| {
            let at = At {
                context: self.at.context,
                node: &entry.value,
                parent: Some(&self.at),
                step: Step::Member(&entry.key),
            };
            (entry.key.as_str(), at)
        })
    }

    /// Reports an error at the name of a member.
    pub(super) fn error_at_key(&self, key: &str, message: impl AsRef<str>) {
        let position = self
            .entry(key)
            .map_or(self.at.node.position, |entry| entry.position);
        self.at.diagnose(Severity::Error, position, message.as_ref());
    }

    /// Reports an error at the value of a member.
    pub(super) fn error_at_value(&self, key: &str, message: impl AsRef<str>) {
        let position = self
            .entry(key)
            .map_or(self.at.node.position, |entry| entry.value.position);
        self.at.diagnose(Severity::Error, position, message.as_ref());
    }

    /// Reports as unknown fields all members that were not requested. Returns false if there are any. Must be called
    /// after all known members have been requested.
    pub(super) fn finish(&self) -> bool {
        let known = self.known.borrow();
        let mut all_known = true;
        for entry in self
            .entries
            .iter()
            .filter(|entry| !known.contains(&entry.key.as_str()))
        {
            all_known = false;
            let mut message = format!("unknown field {}", quoted(&entry.key));
            match nearest(&entry.key, known.iter().copied()) {
                Some(name) => message.push_str(&format!(", did you mean \"{name}\"?")),
                None if !known.is_empty() => {
                    let mut names = known.to_vec();
                    names.sort_unstable();
                    names.dedup();
                    message.push_str(&format!("; known here: {}", names.join(", ")));
                }
                None => {}
            }
            self.at.diagnose(Severity::Error, entry.position, &message);
        }
        all_known
    }
}

/// Returns `, did you mean "X"?`, or else the list of known names.
pub(super) fn hint(written: &str, names: &[&str]) -> String {
    match nearest(written, names.iter().copied()) {
        Some(name) => format!(", did you mean \"{name}\"?"),
        None => format!("; known: {}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_bounded_by_policy_and_by_file() {
        let context = Context::new("f");
        context.begin_policy();
        context.check_expression("/a.*").unwrap();
        context.expressions.borrow_mut().of_policy = MAX_POLICY_COST;
        let error = context.check_expression("/b.*").unwrap_err();
        assert!(
            error.contains("of this policy up to here are too large together"),
            "{error}"
        );
        // A known expression costs nothing more. The next policy begins at zero, but the sum of the file stays.
        context.check_expression("/a.*").unwrap();
        context.begin_policy();
        context.check_expression("/c.*").unwrap();
        context.expressions.borrow_mut().of_file = MAX_FILE_COST;
        let error = context.check_expression("/d.*").unwrap_err();
        assert!(
            error.contains("of this file up to here are too large together"),
            "{error}"
        );
    }
}
