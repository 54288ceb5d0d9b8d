//! A document as a tree whose every node knows its place. YAML and JSON values become the same tree.

/// Line and column from 1; 0 where there is no text behind a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Position {
    pub line: u32,
    pub column: u32,
}

/// A value and its place.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub position: Position,
    pub value: Value,
}

/// What a node holds.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Integer(i128),
    /// Any other number; the language has none, so only its text is of interest.
    Float(String),
    String {
        text: String,
        /// Written without quotes.
        plain: bool,
    },
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A member of a map.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub key: String,
    /// Of the key.
    pub position: Position,
    pub value: Node,
}

impl Node {
    /// What was found, for "expected ..., found ...".
    pub(super) fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing (null)".into(),
            Value::Bool(value) => format!("the boolean {value}"),
            Value::Integer(value) => format!("the number {value}"),
            Value::Float(text) => format!("the number {text}"),
            Value::String { text, .. } => format!("the string {}", quoted(text)),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "an object".into(),
        }
    }

    /// The member of a map by name.
    pub(super) fn get(&self, name: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(entries) => entries
                .iter()
                .find(|entry| entry.key == name)
                .map(|entry| &entry.value),
            _ => None,
        }
    }

    /// The text of a string.
    pub(super) fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String { text, .. } => Some(text),
            _ => None,
        }
    }

    pub(super) fn is_null(&self) -> bool {
        matches!(self.value, Value::Null)
    }

    /// The tree of a JSON value. It has no places.
    pub(super) fn from_json(json: &serde_json::Value) -> Self {
        let value = match json {
            serde_json::Value::Null => Value::Null,
            serde_json::Value::Bool(value) => Value::Bool(*value),
            serde_json::Value::Number(number) => match number.as_i64().map(i128::from) {
                Some(integer) => Value::Integer(integer),
                None => number
                    .as_u64()
                    .map_or_else(|| Value::Float(number.to_string()), |n| Value::Integer(n.into())),
            },
            serde_json::Value::String(text) => Value::String {
                text: text.clone(),
                plain: false,
            },
            serde_json::Value::Array(items) => Value::List(items.iter().map(Self::from_json).collect()),
            serde_json::Value::Object(members) => Value::Map(
                members
                    .iter()
                    .map(|(key, value)| Entry {
                        key: key.clone(),
                        position: Position::default(),
                        value: Self::from_json(value),
                    })
                    .collect(),
            ),
        };
        Self {
            position: Position::default(),
            value,
        }
    }

    /// The JSON value of a tree.
    pub(super) fn to_json(&self) -> serde_json::Value {
        match &self.value {
            Value::Null => serde_json::Value::Null,
            Value::Bool(value) => (*value).into(),
            Value::Integer(integer) => i64::try_from(*integer)
                .map(serde_json::Value::from)
                .or_else(|_| u64::try_from(*integer).map(serde_json::Value::from))
                .unwrap_or_else(|_| integer.to_string().into()),
            Value::Float(text) => text
                .parse::<f64>()
                .ok()
                .and_then(serde_json::Number::from_f64)
                .map_or_else(|| text.clone().into(), serde_json::Value::Number),
            Value::String { text, .. } => text.clone().into(),
            Value::List(items) => items.iter().map(Self::to_json).collect(),
            Value::Map(entries) => entries
                .iter()
                .map(|entry| (entry.key.clone(), entry.value.to_json()))
                .collect(),
        }
    }
}

/// Something from a file, safe and short enough for a message of one line.
pub(crate) fn quoted(text: &str) -> String {
    const LONGEST: usize = 60;
    let mut out = String::from("\"");
    for (index, character) in text.chars().enumerate() {
        if index == LONGEST {
            out.push('…');
            break;
        }
        out.extend(character.escape_debug());
    }
    out.push('"');
    out
}
