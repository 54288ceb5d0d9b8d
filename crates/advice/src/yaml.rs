//! An emitter of YAML. Names, labels and paths in it can come from the network, so every text that is not a plain word
//! is emitted in double quotes with escapes (YAML 1.2.2, section 7.3.1), and comments have one line.

use std::fmt::Write as _;

/// A node of a document.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Yaml {
    /// A string, whatever it looks like.
    Text(String),
    /// A number.
    Number(u64),
    /// A boolean.
    Bool(bool),
    /// A list.
    List(Vec<Item>),
    /// A mapping, in the order of its entries.
    Map(Vec<(String, Self)>),
}

/// An element of a list.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Item {
    /// Comment in the line before the element; empty for none.
    pub comment: String,
    /// The element.
    pub value: Yaml,
}

impl From<&str> for Yaml {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Yaml {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// Returns a mapping.
pub fn map<const N: usize>(entries: [(&str, Yaml); N]) -> Yaml {
    Yaml::Map(
        entries
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect(),
    )
}

/// Returns a list without comments.
pub fn list(values: impl IntoIterator<Item = Yaml>) -> Yaml {
    Yaml::List(
        values
            .into_iter()
            .map(|value| Item {
                comment: String::new(),
                value,
            })
            .collect(),
    )
}

impl Yaml {
    /// Returns the document as text, which ends with a line break.
    #[must_use]
    pub fn emit(&self) -> String {
        let mut out = String::new();
        self.block(&mut out, 0, true);
        out
    }

    /// Appends the node. `fresh`: whether the output is at the indentation of the node, rather than after a key.
    fn block(&self, out: &mut String, indent: usize, fresh: bool) {
        match self {
            Self::Map(entries) if entries.is_empty() => scalar(out, "{}", fresh),
            Self::List(items) if items.is_empty() => scalar(out, "[]", fresh),
            Self::Map(entries) => {
                for (number, (key, value)) in entries.iter().enumerate() {
                    if number == 0 && !fresh {
                        out.push('\n');
                    }
                    if number > 0 || !fresh {
                        spaces(out, indent);
                    }
                    out.push_str(&text(key));
                    out.push(':');
                    // A list can begin at the indentation of its key.
                    let deeper = if matches!(value, Self::List(_)) {
                        indent
                    } else {
                        indent + 2
                    };
                    value.block(out, deeper, false);
                }
            }
            Self::List(items) => {
                if !fresh {
                    out.push('\n');
                }
                for (number, item) in items.iter().enumerate() {
                    let begin = number > 0 || !fresh;
                    if !item.comment.is_empty() {
                        if begin {
                            spaces(out, indent);
                        }
                        out.push_str(&comment(&item.comment));
                        spaces(out, indent);
                    } else if begin {
                        spaces(out, indent);
                    }
                    out.push_str("- ");
                    item.value.block(out, indent + 2, true);
                }
            }
            Self::Text(value) => scalar(out, &text(value), fresh),
            Self::Number(value) => scalar(out, &value.to_string(), fresh),
            Self::Bool(value) => scalar(out, &value.to_string(), fresh),
        }
    }
}

/// Returns a comment line. Control characters are escaped: a line break would end the comment.
#[must_use]
pub fn comment(what: &str) -> String {
    let mut out = String::from("# ");
    for character in what.chars() {
        if is_printable(character) {
            out.push(character);
        } else {
            out.extend(character.escape_unicode());
        }
    }
    out.push('\n');
    out
}

fn spaces(out: &mut String, count: usize) {
    out.extend(std::iter::repeat_n(' ', count));
}

fn scalar(out: &mut String, value: &str, fresh: bool) {
    if !fresh {
        out.push(' ');
    }
    out.push_str(value);
    out.push('\n');
}

const fn is_printable(character: char) -> bool {
    matches!(character, ' '..='~')
}

/// Returns a string as a scalar: plain if no YAML version gives it another type or meaning, else in double quotes.
fn text(value: &str) -> String {
    // YAML 1.1 has further words for booleans, and parsers of Kubernetes follow it.
    const RESERVED: [&str; 9] = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    let mut bytes = value.bytes();
    let plain = bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'/'))
        && !RESERVED.iter().any(|word| word.eq_ignore_ascii_case(value));
    if plain {
        return value.to_owned();
    }
    let mut out = String::from("\"");
    for character in value.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\t' => out.push_str("\\t"),
            _ if is_printable(character) => out.push(character),
            _ => {
                let number = u32::from(character);
                // Writing to a string does not fail.
                let _ = match number {
                    0..=0xff => write!(out, "\\x{number:02x}"),
                    0x100..=0xffff => write!(out, "\\u{number:04x}"),
                    _ => write!(out, "\\U{number:08x}"),
                };
            }
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn parsed(text: &str) -> Vec<Value> {
        let (nodes, errors) = palisade_yaml::documents(text);
        assert!(errors.is_empty(), "{errors:?}\n{text}");
        nodes.iter().map(palisade_yaml::Node::to_json).collect()
    }

    #[test]
    fn a_document_reads_as_written() {
        let document = map([
            ("kind", "CiliumNetworkPolicy".into()),
            ("empty", list([])),
            ("none", map([])),
            (
                "ports",
                Yaml::List(vec![
                    Item {
                        comment: "3 flows\n- evil: 1".into(),
                        value: map([("port", "80".into()), ("deep", list([list(["a".into()])]))]),
                    },
                    Item {
                        comment: String::new(),
                        value: Yaml::Number(8),
                    },
                ]),
            ),
            ("on", Yaml::Bool(true)),
        ]);
        let text = document.emit();
        assert_eq!(
            parsed(&text),
            [json!({
                "kind": "CiliumNetworkPolicy", "empty": [], "none": {},
                "ports": [{"port": "80", "deep": [["a"]]}, 8], "on": true
            })],
            "{text}"
        );
        assert!(
            text.contains("# 3 flows\\u{a}- evil: 1\n- port: \"80\"\n"),
            "{text}"
        );
    }

    #[test]
    fn words_of_other_types_stay_strings() {
        for word in [
            "true",
            "No",
            "null",
            "~",
            "1",
            "0x10",
            "1.5",
            "",
            "- a",
            "a: b",
            "#",
            "*a",
            "&a",
            "!a",
            "%",
            "|",
            "2001:db8::1",
        ] {
            let text = map([("key", word.into())]).emit();
            assert_eq!(parsed(&text), [json!({"key": word})], "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_breaks_out(key in "\\PC{1,8}|[\\x00-\\x7f]{1,12}", value in any::<String>(), remark in any::<String>()) {
            let document = map([(
                "list",
                Yaml::List(vec![Item {
                    comment: remark,
                    value: Yaml::Map(vec![(key.clone(), Yaml::Text(value.clone()))]),
                }]),
            )]);
            // The parser refuses characters that YAML cannot hold, even escaped: then nothing is accepted.
            let (nodes, errors) = palisade_yaml::documents(&document.emit());
            prop_assert!(errors.is_empty());
            prop_assert_eq!(nodes[0].to_json(), json!({"list": [{key: value}]}));
        }
    }
}
