//! Documents as trees of nodes with line and column. YAML and JSON values become the same tree.

/// Line and column, from 1; 0 for a node without text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Position {
    /// Line.
    pub line: u32,
    /// Column, in characters.
    pub column: u32,
}

/// A value with its place.
#[derive(Clone, Debug)]
pub struct Node {
    /// Start of the value.
    pub position: Position,
    /// The value.
    pub value: Value,
}

/// Value of a node.
#[derive(Clone, Debug)]
pub enum Value {
    /// No value: `null`, `~`, or nothing.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// An integer.
    Integer(i128),
    /// A number that is not an integer. Neither policies nor secrets have such numbers, so only the text is kept.
    Float(String),
    /// A text.
    String {
        /// The text.
        text: String,
        /// Whether the string is written without quotes.
        plain: bool,
    },
    /// A list.
    List(Vec<Node>),
    /// An object, in the order of the text. No two members have one name.
    Map(Vec<Entry>),
}

/// A member of a map.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Name of the member.
    pub key: String,
    /// Place of the key.
    pub position: Position,
    /// Value of the member.
    pub value: Node,
}

impl Node {
    /// Returns a description of the value, for "expected ..., found ...".
    #[must_use]
    pub fn describe(&self) -> String {
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

    /// Returns the member of a map by name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(entries) => entries
                .iter()
                .find(|entry| entry.key == name)
                .map(|entry| &entry.value),
            _ => None,
        }
    }

    /// Returns the text of a string.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String { text, .. } => Some(text),
            _ => None,
        }
    }

    /// Returns whether the value is `null` or missing.
    #[must_use]
    pub fn is_null(&self) -> bool {
        matches!(self.value, Value::Null)
    }

    /// Creates the tree of a JSON value. Its nodes have no places.
    #[must_use]
    pub fn from_json(json: &serde_json::Value) -> Self {
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

    /// Returns the tree as a JSON value.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
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

/// Quotes a text of a file for a message: shortened, on one line, without control characters.
#[must_use]
pub fn quoted(text: &str) -> String {
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
