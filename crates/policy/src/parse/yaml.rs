//! YAML text to trees of nodes.
//!
//! Of YAML 1.2 with what Kubernetes' own reader takes beyond it: merge keys (`<<`). The text is hostile: nesting
//! is bounded, and so is what aliases may multiply ("billion laughs").

use std::collections::{HashMap, HashSet};

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Span, Tag};

use super::node::{Entry, Node, Position, Value, quoted};

/// How deep lists and objects may nest. The language itself needs about 15.
const MAX_DEPTH: usize = 64;

/// How many nodes aliases may add to a file, counted over all of its documents.
const MAX_ALIASED_NODES: usize = 100_000;

/// Something wrong with the text itself.
#[derive(Debug)]
pub(crate) struct YamlError {
    pub position: Position,
    pub message: String,
}

/// The documents of a text, and what is wrong with it.
///
/// After an error of syntax nothing more can be read; the documents before it are there.
pub(crate) fn documents(text: &str) -> (Vec<Node>, Vec<YamlError>) {
    let mut loader = Loader::default();
    // Text that comes from Windows may begin with a byte order mark; it is no part of the document.
    let mut parser = Parser::new_from_str(text.strip_prefix('\u{feff}').unwrap_or(text));
    while let Some(next) = parser.next_event() {
        let (event, span) = match next {
            Ok(next) => next,
            Err(error) => {
                loader.error(position(*error.marker()), error.info().to_owned());
                break;
            }
        };
        if loader.event(event, span).is_err() {
            break;
        }
    }
    (loader.documents, loader.errors)
}

fn position(marker: Marker) -> Position {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    // The parser counts columns from 0.
    Position {
        line: number(marker.line()),
        column: number(marker.col()).saturating_add(1),
    }
}

/// Reading cannot go on; the error has been noted.
struct Stop;

/// A list or object that is not at its end yet.
struct Open {
    position: Position,
    /// Number of its anchor; 0 for none.
    anchor: usize,
    value: OpenValue,
}

enum OpenValue {
    List(Vec<Node>),
    Map {
        entries: Vec<Entry>,
        /// For objects too large to look through.
        names: HashSet<String>,
        /// The key whose value comes next.
        key: Option<(String, Position)>,
        /// What `<<` brought in, if it did.
        merged: Vec<Entry>,
        /// A key that cannot be one was read: its value is to be skipped.
        skip: bool,
    },
}

#[derive(Default)]
struct Loader {
    documents: Vec<Node>,
    errors: Vec<YamlError>,
    open: Vec<Open>,
    anchors: HashMap<usize, (Node, usize)>,
    aliased: usize,
}

impl Loader {
    fn error(&mut self, position: Position, message: String) {
        self.errors.push(YamlError { position, message });
    }

    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), Stop> {
        let position = position(span.start);
        match event {
            // An anchor belongs to its document (YAML 1.2.2, 3.2.2.2).
            Event::DocumentStart(_) => self.anchors.clear(),
            Event::Scalar(text, style, anchor, tag) => {
                let value = self.scalar(&text, style, tag.as_deref(), position);
                return self.complete(Node { position, value }, anchor);
            }
            Event::SequenceStart(anchor, _) => {
                return self.start(position, anchor, OpenValue::List(Vec::new()));
            }
            Event::MappingStart(anchor, _) => {
                let value = OpenValue::Map {
                    entries: Vec::new(),
                    names: HashSet::new(),
                    key: None,
                    merged: Vec::new(),
                    skip: false,
                };
                return self.start(position, anchor, value);
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(open) = self.open.pop() {
                    return self.complete(
                        Node {
                            position: open.position,
                            value: open.value.close(),
                        },
                        open.anchor,
                    );
                }
            }
            Event::Alias(anchor) => return self.alias(anchor, position),
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => {}
        }
        Ok(())
    }

    fn start(&mut self, position: Position, anchor: usize, value: OpenValue) -> Result<(), Stop> {
        if self.open.len() >= MAX_DEPTH {
            self.error(position, format!("nested deeper than {MAX_DEPTH} levels"));
            return Err(Stop);
        }
        self.open.push(Open {
            position,
            anchor,
            value,
        });
        Ok(())
    }

    fn alias(&mut self, anchor: usize, position: Position) -> Result<(), Stop> {
        let Some((node, size)) = self.anchors.get(&anchor) else {
            let message = if self.open.iter().any(|open| open.anchor == anchor) {
                "this alias is inside of what it stands for"
            } else {
                "this alias has no anchor in this document"
            };
            self.error(position, message.into());
            return Err(Stop);
        };
        let (node, size) = (node, *size);
        self.aliased = self.aliased.saturating_add(size);
        if self.aliased > MAX_ALIASED_NODES || self.open.len() + depth(node) > MAX_DEPTH {
            self.error(position, format!("the aliases of this file expand to more than {MAX_ALIASED_NODES} values or {MAX_DEPTH} levels"));
            return Err(Stop);
        }
        let node = node.clone();
        self.complete(node, 0)
    }

    /// A node is complete: it goes to where it belongs.
    fn complete(&mut self, node: Node, anchor: usize) -> Result<(), Stop> {
        if anchor != 0 {
            // Keeping it costs a copy, so it counts as well.
            let size = size(&node);
            self.aliased = self.aliased.saturating_add(size);
            if self.aliased > MAX_ALIASED_NODES {
                self.error(
                    node.position,
                    format!("the anchors of this file hold more than {MAX_ALIASED_NODES} values"),
                );
                return Err(Stop);
            }
            self.anchors.insert(anchor, (node.clone(), size));
        }
        let Some(open) = self.open.last_mut() else {
            self.documents.push(node);
            return Ok(());
        };
        let mut problem = None;
        match &mut open.value {
            OpenValue::List(items) => items.push(node),
            OpenValue::Map {
                entries,
                names,
                key,
                merged,
                skip,
            } => {
                if std::mem::take(skip) {
                } else if let Some((key, position)) = key.take() {
                    if key == "<<" {
                        problem = merge(node, merged).err();
                    } else if names.contains(&key) {
                        problem = Some((position, format!("{} is given twice", quoted(&key))));
                    } else {
                        names.insert(key.clone());
                        entries.push(Entry {
                            key,
                            position,
                            value: node,
                        });
                    }
                } else {
                    match key_text(&node) {
                        Some(text) => *key = Some((text, node.position)),
                        None => {
                            *skip = true;
                            problem = Some((
                                node.position,
                                format!("a key must be a string, found {}", node.describe()),
                            ));
                        }
                    }
                }
            }
        }
        if let Some((position, message)) = problem {
            self.error(position, message);
        }
        Ok(())
    }

    fn scalar(&mut self, text: &str, style: ScalarStyle, tag: Option<&Tag>, position: Position) -> Value {
        let string = || Value::String {
            text: text.to_owned(),
            plain: style == ScalarStyle::Plain,
        };
        match tag {
            None if style == ScalarStyle::Plain => plain_scalar(text),
            None => string(),
            // "!" alone: not to be resolved (YAML 1.2.2, 6.9.1).
            Some(tag) if tag.handle.is_empty() && tag.suffix == "!" => string(),
            Some(tag) if tag.is_yaml_core_schema() && tag.suffix == "str" => string(),
            Some(tag)
                if tag.is_yaml_core_schema()
                    && matches!(tag.suffix.as_str(), "int" | "bool" | "null" | "float") =>
            {
                plain_scalar(text)
            }
            Some(tag) => {
                self.error(
                    position,
                    format!("the tag {} is not known", quoted(&tag.to_string())),
                );
                string()
            }
        }
    }
}

impl OpenValue {
    fn close(self) -> Value {
        match self {
            Self::List(items) => Value::List(items),
            Self::Map {
                mut entries,
                mut names,
                merged,
                ..
            } => {
                // What is written out wins over what is merged in; of that, the first.
                for entry in merged {
                    if names.insert(entry.key.clone()) {
                        entries.push(entry);
                    }
                }
                Value::Map(entries)
            }
        }
    }
}

/// The value of `<<`: an object, or a list of objects.
fn merge(node: Node, merged: &mut Vec<Entry>) -> Result<(), (Position, String)> {
    match node.value {
        Value::Map(entries) => merged.extend(entries),
        Value::List(items) => {
            for item in items {
                match item.value {
                    Value::Map(entries) => merged.extend(entries),
                    _ => {
                        return Err((
                            item.position,
                            format!("only an object can be merged by <<, found {}", item.describe()),
                        ));
                    }
                }
            }
        }
        _ => {
            return Err((
                node.position,
                format!("only an object can be merged by <<, found {}", node.describe()),
            ));
        }
    }
    Ok(())
}

/// A key as text. `1: x` and `true: x` have the keys "1" and "true", as in Kubernetes' reader.
fn key_text(node: &Node) -> Option<String> {
    match &node.value {
        Value::String { text, .. } | Value::Float(text) => Some(text.clone()),
        Value::Bool(value) => Some(value.to_string()),
        Value::Integer(value) => Some(value.to_string()),
        Value::Null | Value::List(_) | Value::Map(_) => None,
    }
}

/// The core schema (YAML 1.2.2, 10.3.2).
fn plain_scalar(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    if let Some(integer) = integer(text) {
        return Value::Integer(integer);
    }
    if is_float(text) {
        Value::Float(text.to_owned())
    } else {
        Value::String {
            text: text.to_owned(),
            plain: true,
        }
    }
}

fn integer(text: &str) -> Option<i128> {
    if let Some(digits) = text.strip_prefix("0x") {
        return (!digits.starts_with(['+', '-'])).then(|| i128::from_str_radix(digits, 16).ok())?;
    }
    if let Some(digits) = text.strip_prefix("0o") {
        return (!digits.starts_with(['+', '-'])).then(|| i128::from_str_radix(digits, 8).ok())?;
    }
    text.parse().ok()
}

fn is_float(text: &str) -> bool {
    if matches!(text.trim_start_matches(['+', '-']), ".inf" | ".Inf" | ".INF")
        || matches!(text, ".nan" | ".NaN" | ".NAN")
    {
        return true;
    }
    // Rust's own reader takes "inf", "nan" and "infinity" too, which are words in YAML.
    text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.'))
        && text.bytes().any(|b| b.is_ascii_digit())
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || matches!(b, b'+' | b'-' | b'.' | b'e' | b'E'))
        && text.parse::<f64>().is_ok()
}

/// How many nodes a tree has. Trees are at most [`MAX_DEPTH`] deep, so recursion is safe.
fn size(node: &Node) -> usize {
    1 + match &node.value {
        Value::List(items) => items.iter().map(size).sum(),
        Value::Map(entries) => entries.iter().map(|entry| size(&entry.value)).sum(),
        _ => 0,
    }
}

fn depth(node: &Node) -> usize {
    match &node.value {
        Value::List(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Map(entries) => 1 + entries.iter().map(|entry| depth(&entry.value)).max().unwrap_or(0),
        _ => 0,
    }
}
