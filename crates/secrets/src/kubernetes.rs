//! Secrets in YAML or JSON, in the form of Kubernetes. Messages never quote a value.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use palisade_yaml::{Entry, Node, Value, documents, quoted};
use zeroize::{Zeroize as _, Zeroizing};

use crate::{
    problem::Problem,
    raw::{Found, Item, MAX_ITEMS, Raw, is_key, is_name},
};

/// Returns the Secrets of a file. Documents of other kinds are skipped with a warning.
pub(crate) fn read(file: &Path, bytes: &[u8]) -> Found {
    let mut reader = Reader {
        file: Arc::from(file),
        found: Found::default(),
    };
    let Ok(text) = str::from_utf8(bytes) else {
        reader.problem(0, "the file is not UTF-8 text");
        return reader.found;
    };
    let (mut nodes, errors) = documents(text);
    for error in &errors {
        reader.problem(error.position.line, without_values(&error.message));
    }
    // After an error, the values of the file are not certain.
    if errors.is_empty() {
        nodes.iter().for_each(|node| reader.document(node));
        if nodes.iter().all(Node::is_null) && text.lines().all(|line| line.trim().is_empty()) {
            reader.problem(0, "the file is empty");
        }
    }
    nodes.iter_mut().for_each(wipe);
    reader.found
}

/// Removes the quoted text from a message of the YAML reader, because it can be a part of a value. A quoted key is
/// kept.
fn without_values(message: &str) -> String {
    match (message.split_once('"'), message.rsplit_once('"')) {
        (Some((before, _)), Some((_, after))) if !after.ends_with("occurs twice") => {
            format!("{before}\"…\"{after}")
        }
        _ => message.to_owned(),
    }
}

/// Overwrites the texts of a tree.
fn wipe(node: &mut Node) {
    match &mut node.value {
        Value::String { text, .. } | Value::Float(text) => text.zeroize(),
        Value::List(items) => items.iter_mut().for_each(wipe),
        Value::Map(entries) => entries.iter_mut().for_each(|entry| wipe(&mut entry.value)),
        Value::Null | Value::Bool(_) | Value::Integer(_) => {}
    }
}

struct Reader {
    file: Arc<Path>,
    found: Found,
}

impl Reader {
    fn problem(&mut self, line: u32, text: impl Into<String>) {
        self.found.problems.push(Problem::error(&self.file, line, text));
    }

    fn document(&mut self, node: &Node) {
        let line = node.position.line;
        let Value::Map(entries) = &node.value else {
            if !node.is_null() {
                self.problem(line, "a Secret must be an object");
            }
            return;
        };
        match node.get("kind").and_then(Node::as_str) {
            Some("Secret") => match node.get("apiVersion").and_then(Node::as_str) {
                Some("v1") => self.secret(node, entries),
                _ => self.problem(line, "apiVersion of a Secret must be v1"),
            },
            Some("List" | "SecretList") => {
                if let Some(Value::List(items)) = node.get("items").map(|items| &items.value) {
                    items.iter().for_each(|item| self.document(item));
                }
            }
            Some(kind) => {
                let text = format!("{} is no Secret: skipped", quoted(kind));
                self.found.problems.push(Problem::warning(&self.file, line, text));
            }
            None => self.problem(line, "kind is missing: this is no resource"),
        }
    }

    fn secret(&mut self, node: &Node, entries: &[Entry]) {
        let line = node.position.line;
        let metadata = node.get("metadata");
        let text = |key| metadata.and_then(|metadata| metadata.get(key));
        let name = text("name").and_then(Node::as_str);
        let namespace = match text("namespace") {
            None => Some("default"),
            Some(node) if node.is_null() => Some("default"),
            Some(node) => node.as_str(),
        };
        let (Some(name), Some(namespace)) = (name, namespace) else {
            self.problem(line, "metadata.name and metadata.namespace must be strings");
            return;
        };
        if !is_name(name) || !is_name(namespace) {
            let text = format!(
                "{} cannot be the namespace and name of a Secret",
                quoted(&format!("{namespace}/{name}"))
            );
            self.problem(line, text);
            return;
        }
        let name = format!("{namespace}/{name}");
        match self.items(entries) {
            Ok(items) => self.found.secrets.push(Raw {
                name,
                source: Arc::clone(&self.file),
                items,
            }),
            Err(problem) => self.found.problems.push(problem.of(&name)),
        }
    }

    fn items(&self, entries: &[Entry]) -> Result<BTreeMap<String, Item>, Problem> {
        let error = |line, text| Err(Problem::error(&self.file, line, text));
        let mut items = BTreeMap::new();
        let members = |name| entries.iter().filter(move |entry| entry.key == name);
        // `stringData` after `data`: it replaces values of the same key, as in Kubernetes.
        for section in members("data").chain(members("stringData")) {
            let values = match &section.value.value {
                Value::Map(values) => values,
                Value::Null => continue,
                _ => {
                    return error(
                        section.position.line,
                        format!("{} must be an object", section.key),
                    );
                }
            };
            for entry in values {
                let (line, key) = (entry.position.line, &entry.key);
                if !is_key(key) {
                    return error(line, format!("{} cannot be the key of a value", quoted(key)));
                }
                let Some(text) = entry.value.as_str() else {
                    return error(line, format!("the value of {key} must be a string"));
                };
                let bytes = if section.key == "data" {
                    decode(text)
                } else {
                    Some(Zeroizing::new(text.as_bytes().to_vec()))
                };
                let Some(bytes) = bytes else {
                    return error(
                        line,
                        format!("the value of {key} is no valid base64; plain text belongs into stringData"),
                    );
                };
                items.insert(
                    key.clone(),
                    Item {
                        bytes,
                        file: Arc::clone(&self.file),
                        line,
                        whole_file: false,
                    },
                );
                if items.len() > MAX_ITEMS {
                    return error(line, format!("more than {MAX_ITEMS} values in a Secret"));
                }
            }
        }
        const KNOWN: [&str; 7] = [
            "apiVersion",
            "kind",
            "metadata",
            "type",
            "immutable",
            "data",
            "stringData",
        ];
        match entries.iter().find(|entry| !KNOWN.contains(&entry.key.as_str())) {
            Some(entry) => error(
                entry.position.line,
                format!(
                    "unknown field {}; known here: {}",
                    quoted(&entry.key),
                    KNOWN.join(", ")
                ),
            ),
            None => Ok(items),
        }
    }
}

/// Decodes base64 that may be folded over several lines.
fn decode(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let mut folded = Zeroizing::new(Vec::with_capacity(text.len()));
    folded.extend(text.bytes().filter(|byte| !byte.is_ascii_whitespace()));
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len()));
    STANDARD.decode_vec(&**folded, &mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
mod tests {
    use super::*;

    fn of(text: &str) -> Found {
        read(Path::new("f"), text.as_bytes())
    }

    fn problems(text: &str) -> Vec<String> {
        let found = of(text);
        found.problems.iter().map(ToString::to_string).collect()
    }

    fn secret(rest: &str) -> String {
        format!("apiVersion: v1\nkind: Secret\nmetadata: {{name: a, namespace: shop}}\n{rest}")
    }

    #[test]
    fn data_is_decoded_and_string_data_replaces_it() {
        let other = "data: {x: aGVsbG8=}\nstringData:\n  x: plain\n";
        let found = of(&format!(
            "{}---\n{}",
            secret("type: Opaque\ndata: {token: aGVsbG8=}\n"),
            secret(other).replace("name: a, namespace: shop", "name: b")
        ));
        assert!(found.problems.is_empty(), "{:?}", found.problems);
        let [a, b] = &found.secrets[..] else { panic!() };
        assert_eq!(
            (a.name.as_str(), &**a.items["token"].bytes),
            ("shop/a", &b"hello"[..])
        );
        assert_eq!(
            (b.name.as_str(), &**b.items["x"].bytes),
            ("default/b", &b"plain"[..])
        );
        assert_eq!(b.items["x"].line, 12);
    }

    #[test]
    fn folded_base64_is_decoded() {
        let found = of(&secret("data:\n  token: |\n    aGVs\n    bG8=\n"));
        assert_eq!(&**found.secrets[0].items["token"].bytes, b"hello");
    }

    #[test]
    fn one_broken_secret_leaves_the_others_of_its_file() {
        let text = format!(
            "{}---\n{}",
            secret("data: {x: '*'}\n"),
            secret("data: {x: aGVsbG8=}\n").replace("name: a", "name: b")
        );
        let found = of(&text);
        assert_eq!(found.secrets.len(), 1);
        assert_eq!(found.problems[0].secret.as_deref(), Some("shop/a"));
        assert!(
            found.problems[0]
                .to_string()
                .starts_with("f:4: the value of x is no valid base64")
        );
    }

    #[test]
    fn malformed_files_name_their_line() {
        assert_eq!(problems(&secret("stringdata: {}\n")).len(), 1);
        assert!(problems(&secret("stringdata: {}\n"))[0].starts_with("f:4: unknown field \"stringdata\""));
        assert!(problems("kind: ConfigMap\n")[0].contains("warning: \"ConfigMap\" is no Secret"));
        assert!(problems("kind: Secret\n")[0].contains("apiVersion"));
        assert!(problems("[]\n")[0].contains("must be an object"));
        assert!(problems(&secret("data: {x: 5}\n"))[0].contains("must be a string"));
        assert!(problems(&secret("data: [x]\n"))[0].contains("must be an object"));
        assert!(problems(&secret("data: {'a/b': ''}\n"))[0].contains("cannot be the key"));
        assert!(problems(&secret("").replace("name: a", "name: A"))[0].contains("cannot be the namespace"));
        assert_eq!(problems("\n\n"), ["f: the file is empty"]);
        assert!(problems("# none\n").is_empty());
    }

    #[test]
    fn no_message_quotes_a_value() {
        for rest in [
            "stringData:\n  <<: hunter2\n",
            "stringData:\n  x: *hunter2\n",
            "stringData:\n  x: @hunter2\n",
            "stringData:\n  x: !hunter2 y\n",
            "stringData: hunter2\n",
            "data: {x: hunter2!}\n",
            "stringData:\n  x: [hunter2]\n",
        ] {
            let problems = problems(&secret(rest));
            assert!(!problems.is_empty(), "{rest}");
            assert!(!problems.concat().contains("hunter2"), "{problems:?}");
        }
    }
}
