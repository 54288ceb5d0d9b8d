//! Conversion of YAML texts to trees of nodes.
//!
//! Accepts YAML 1.2 and the extensions that the YAML parser of Kubernetes accepts: merge keys (`<<`) and concatenated
//! JSON objects. The text is untrusted: nesting is bounded, and so is the number of nodes that aliases copy ("billion
//! laughs"). Control characters (except tab, LF and CR), and characters that only some parsers treat as a line break,
//! are refused before parsing. Otherwise rules after such a character could be lost without an error.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
};

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Span, Tag};

use crate::node::{Entry, Node, Position, Value, quoted};

/// Deepest nesting of lists and objects. Policies need about 15.
const MAX_DEPTH: usize = 64;

/// Maximum number of nodes that are copied for the anchors and aliases of a file, over all its documents.
pub const MAX_ALIASED_NODES: usize = 100_000;

/// An error of the text, with its place.
#[derive(Debug)]
pub struct YamlError {
    /// Place of the error.
    pub position: Position,
    /// The problem and, if known, the remedy.
    pub message: String,
}

/// Returns the documents of a text, and its errors. A syntax error ends the parsing; the documents before the error are
/// returned. A text with a forbidden character has no documents.
#[must_use]
pub fn documents(text: &str) -> (Vec<Node>, Vec<YamlError>) {
    let mut loader = Loader::default();
    // A file from Windows can begin with a byte order mark, which is not part of the document.
    let text = match without_marks(text.strip_prefix('\u{feff}').unwrap_or(text)) {
        Ok(text) => text,
        Err(error) => return (Vec::new(), vec![error]),
    };
    if let Some(error) = forbidden_character(&text) {
        return (Vec::new(), vec![error]);
    }
    for (start, part) in json_values(&text) {
        loader.start = start;
        if loader.read(part).is_err() {
            break;
        }
    }
    (loader.documents, loader.errors)
}

/// Returns an error about the first forbidden character; `None` if the text contains none.
///
/// YAML 1.2.2, section 5.1, excludes control characters except tab, LF, CR (and NEL). The YAML parser ends at NUL, so
/// the rest of the file would be lost without an error; files full of NULs occur after power failures. U+0085, U+2028
/// and U+2029 end a line, and so a comment, in YAML 1.1 (Kubernetes) but not in 1.2.
fn forbidden_character(text: &str) -> Option<YamlError> {
    let is_forbidden = |c: char| match c {
        '\t' | '\n' | '\r' => false,
        '\u{2028}' | '\u{2029}' => true,
        other => other.is_control(),
    };
    let at = text.find(is_forbidden)?;
    let character = text[at..].chars().next()?;
    let number = u32::from(character);
    let message = match character {
        '\0' => "a NUL byte: the file is damaged (a power failure may leave such files)".to_owned(),
        '\u{85}' | '\u{2028}' | '\u{2029}' => format!(
            "the character U+{number:04X} ends a line for some readers of YAML and not for others; remove it, or write \
             it as an escape in double quotes"
        ),
        _ => format!(
            "the control character U+{number:04X} cannot stand in a policy file; in double quotes write it as an escape"
        ),
    };
    Some(YamlError {
        position: position_at(text, at),
        message,
    })
}

/// Removes byte order marks where a document begins (YAML 1.2.2, section 5.2), as in two concatenated files.
///
/// # Errors
/// An error if a mark is elsewhere: the mark would become an invisible part of a key or value.
fn without_marks(text: &str) -> Result<Cow<'_, str>, YamlError> {
    if !text.contains('\u{feff}') {
        return Ok(Cow::Borrowed(text));
    }
    let mut out = String::with_capacity(text.len());
    // Whether the current document has no content yet: only blank lines, comments, directives and a lone `---`.
    let mut between = true;
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        let rest = line.strip_prefix('\u{feff}').unwrap_or(line);
        let is_marker = |marker: &str| {
            rest.strip_prefix(marker)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
        };
        let begins_document = between || is_marker("---");
        let marks = if begins_document { rest } else { line };
        if let Some(inside) = marks.find('\u{feff}') {
            return Err(YamlError {
                position: position_at(text, at + (line.len() - marks.len()) + inside),
                message: "a byte order mark (U+FEFF) in the middle of a document; if two files were joined here, put a \
                          line \"---\" before the second one"
                    .into(),
            });
        }
        out.push_str(rest);
        between = is_marker("...")
            || (is_marker("---") && rest[3..].trim().is_empty())
            || (between && (rest.trim().is_empty() || rest.starts_with(['#', '%'])));
        at += line.len();
    }
    Ok(Cow::Owned(out))
}

/// Splits a text of concatenated JSON values into the values with their places. A text that is not entirely JSON is
/// one part.
fn json_values(text: &str) -> Vec<(Position, &str)> {
    let whole = vec![(Position { line: 1, column: 1 }, text)];
    if !text.trim_start().starts_with('{') {
        return whole;
    }
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<serde::de::IgnoredAny>();
    let mut parts = Vec::new();
    let (mut start, mut place) = (0, (1, 1));
    while let Some(value) = values.next() {
        if value.is_err() {
            return whole;
        }
        let part = &text[start..values.byte_offset()];
        let (line, column) = place;
        parts.push((Position { line, column }, part));
        place = advance(place, part);
        start = values.byte_offset();
    }
    if parts.len() > 1 { parts } else { whole }
}

/// Returns line and column, from 1, of a byte of a text.
#[must_use]
pub fn position_at(text: &str, byte: usize) -> Position {
    let (line, column) = advance((1, 1), &text[..byte]);
    Position { line, column }
}

/// Returns line and column after a text that begins at the given place. LF, CR and CR LF end a line.
fn advance((mut line, mut column): (u32, u32), text: &str) -> (u32, u32) {
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == '\n' || (character == '\r' && characters.peek() != Some(&'\n')) {
            line = line.saturating_add(1);
            column = 1;
        } else {
            column = column.saturating_add(1);
        }
    }
    (line, column)
}

/// Signal that parsing ends. The error is in `Loader::errors`.
struct Stop;

/// Counts nodes: tests bound the work by this number, as the time depends on the load of the machine.
#[cfg(any(test, feature = "count"))]
pub mod work {
    use std::cell::Cell;

    thread_local! {
        /// Nodes that this thread has created or copied.
        static NODES: Cell<usize> = const { Cell::new(0) };
    }

    pub(super) fn count(nodes: usize) {
        NODES.set(NODES.get() + nodes);
    }

    /// Returns the count and resets it.
    pub fn take() -> usize {
        NODES.take()
    }
}

/// A list or object that is not complete yet.
struct Open {
    position: Position,
    /// Number of the anchor; 0 for none.
    anchor: usize,
    value: OpenValue,
}

enum OpenValue {
    List(Vec<Node>),
    Map {
        entries: Vec<Entry>,
        /// Names of the members, to find duplicates in large objects.
        names: HashSet<String>,
        /// Key whose value comes next.
        key: Option<(String, Position)>,
        /// Members of merge keys (`<<`).
        merged: Vec<Entry>,
        /// Whether the next value is skipped, because its key was invalid.
        skip: bool,
    },
}

#[derive(Default)]
struct Loader {
    /// Place at which the current part of the text begins.
    start: Position,
    documents: Vec<Node>,
    errors: Vec<YamlError>,
    open: Vec<Open>,
    anchors: HashMap<usize, (Node, usize)>,
    aliased: usize,
}

impl Loader {
    fn read(&mut self, text: &str) -> Result<(), Stop> {
        let mut parser = Parser::new_from_str(text);
        while let Some(next) = parser.next_event() {
            match next {
                Ok((event, span)) => self.event(event, span)?,
                Err(error) => {
                    let marker = *error.marker();
                    let line = text
                        .lines()
                        .nth(marker.line().saturating_sub(1))
                        .unwrap_or_default();
                    let here = line.char_indices().nth(marker.col());
                    let here = here.map_or("", |(byte, _)| &line[byte..]);
                    // In the first column, missing quotes are not the cause: `%`, for example, begins a directive
                    // there.
                    let here = if marker.col() == 0 { "" } else { here };
                    self.error(self.position(marker), in_plain_words(error.info(), here));
                    return Err(Stop);
                }
            }
        }
        Ok(())
    }

    /// Converts a place in the current part to the place in the whole text.
    fn position(&self, marker: Marker) -> Position {
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        // The parser counts lines from 1 and columns from 0.
        let (line, column) = (number(marker.line()).max(1), number(marker.col()));
        Position {
            line: self.start.line.saturating_add(line - 1),
            column: if line == 1 {
                self.start.column.saturating_add(column)
            } else {
                column.saturating_add(1)
            },
        }
    }

    fn error(&mut self, position: Position, message: String) {
        self.errors.push(YamlError { position, message });
    }

    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), Stop> {
        let position = self.position(span.start);
        match event {
            // Anchors are valid within one document (YAML 1.2.2, section 3.2.2.2).
            Event::DocumentStart(_) => self.anchors.clear(),
            Event::Scalar(text, style, anchor, tag) => {
                let value = self.scalar(&text, style, tag.as_deref(), position);
                return self.complete(Node { position, value }, anchor);
            }
            Event::SequenceStart(anchor, tag) => {
                self.collection_tag(tag.as_deref(), "seq", position);
                return self.start(position, anchor, OpenValue::List(Vec::new()));
            }
            Event::MappingStart(anchor, tag) => {
                self.collection_tag(tag.as_deref(), "map", position);
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
                "this alias is inside the value of its own anchor"
            } else {
                "this alias has no anchor in this document"
            };
            self.error(position, message.into());
            return Err(Stop);
        };
        let (node, size) = (node, *size);
        #[cfg(any(test, feature = "count"))]
        work::count(size);
        self.aliased = self.aliased.saturating_add(size);
        if self.aliased > MAX_ALIASED_NODES || self.open.len() + depth(node) > MAX_DEPTH {
            self.error(position, format!("the aliases of this file expand to more than {MAX_ALIASED_NODES} values or {MAX_DEPTH} levels"));
            return Err(Stop);
        }
        let node = node.clone();
        self.complete(node, 0)
    }

    /// Adds a complete node to the list or object that contains it, or to the documents. Keeps a copy for aliases
    /// unless `anchor` is 0.
    fn complete(&mut self, node: Node, anchor: usize) -> Result<(), Stop> {
        #[cfg(any(test, feature = "count"))]
        work::count(1);
        if anchor != 0 {
            // The copy for aliases counts towards the bound as well.
            let size = size(&node);
            #[cfg(any(test, feature = "count"))]
            work::count(size);
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
                        problem = Some((position, format!("{} occurs twice", quoted(&key))));
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

    /// Reports a tag on a list or object, unless the tag is `!` or the standard tag of the collection. Another parser
    /// could interpret the value differently.
    fn collection_tag(&mut self, tag: Option<&Tag>, expected: &str, position: Position) {
        let known = tag.is_none_or(|tag| {
            (tag.handle.is_empty() && tag.suffix == "!")
                || (tag.is_yaml_core_schema() && tag.suffix == expected)
        });
        if !known && let Some(tag) = tag {
            self.error(
                position,
                format!("the tag {} is not known", quoted(&tag.to_string())),
            );
        }
    }

    fn scalar(&mut self, text: &str, style: ScalarStyle, tag: Option<&Tag>, position: Position) -> Value {
        let string = || Value::String {
            text: text.to_owned(),
            plain: style == ScalarStyle::Plain,
        };
        match tag {
            None if style == ScalarStyle::Plain => plain_scalar(text),
            None => string(),
            // The tag "!" alone forces a string (YAML 1.2.2, section 6.9.1).
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
                // Explicit members win over merged ones; of merged ones, the first wins.
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

/// Returns the parser's message, with the likely cause if `here`, the text at the error, begins with a character that
/// needs quotes.
fn in_plain_words(message: &str, here: &str) -> String {
    match here.chars().next() {
        Some('*') => {
            let ends = |c: char| c.is_whitespace() || matches!(c, ',' | ']' | '}');
            let word = here.split(ends).next().unwrap_or_default();
            format!(
                "a value that begins with * must be quoted, like {}; without quotes it is an alias ({message})",
                quoted(word)
            )
        }
        Some(character @ ('%' | '@' | '`')) => {
            format!("a value that begins with {character} must be quoted ({message})")
        }
        _ => message.to_owned(),
    }
}

/// Adds the members of the value of `<<`, which is an object or a list of objects.
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

/// Returns a key as text; `None` for null, a list or an object. `1: x` and `true: x` have the keys "1" and "true", as
/// in Kubernetes.
fn key_text(node: &Node) -> Option<String> {
    match &node.value {
        Value::String { text, .. } | Value::Float(text) => Some(text.clone()),
        Value::Bool(value) => Some(value.to_string()),
        Value::Integer(value) => Some(value.to_string()),
        Value::Null | Value::List(_) | Value::Map(_) => None,
    }
}

/// Parses a plain scalar by the core schema (YAML 1.2.2, section 10.3.2).
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
    // A leading zero means octal in YAML 1.1 (Kubernetes) and decimal in 1.2, so such a text is not parsed as an
    // integer.
    let digits = text.trim_start_matches(['+', '-']);
    if digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
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
    // `f64::from_str` also accepts "inf", "nan" and "infinity", which are strings in YAML.
    text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.'))
        && text.bytes().any(|b| b.is_ascii_digit())
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || matches!(b, b'+' | b'-' | b'.' | b'e' | b'E'))
        && text.parse::<f64>().is_ok()
}

/// Returns the number of nodes of a tree. Recursion is safe, as trees are at most [`MAX_DEPTH`] deep.
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
