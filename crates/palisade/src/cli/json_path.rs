//! Templates of `-o jsonpath=TEMPLATE`, the part of kubectl's that selects values: text, `{.a.b}`, `{.a['b.c']}`,
//! `{[0].a}`, `{[*].a}`, `{[?(@.a.b=="x")].c}` and `{"\n"}`.

use serde_json::Value;

/// A template.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct JsonPath(Vec<Part>);

#[derive(Clone, Debug, PartialEq)]
enum Part {
    Text(String),
    Path(Vec<Step>),
}

#[derive(Clone, Debug, PartialEq)]
enum Step {
    /// A member of an object.
    Member(String),
    /// An element of an array; a negative number counts from the end.
    Element(i64),
    /// All elements or members.
    All,
    /// The elements at which a path has this value, or does not have it.
    Where { path: Vec<Step>, is: bool, value: Value },
}

impl JsonPath {
    /// Parses a template.
    ///
    /// # Errors
    /// The text is no template, with the place that cannot be understood.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            if !before.is_empty() {
                parts.push(Part::Text(before.to_owned()));
            }
            let mut reader = Reader(after.trim_start());
            parts.push(match reader.0.starts_with(['"', '\'']) {
                true => Part::Text(reader.quoted()?),
                false => Part::Path(reader.steps()?),
            });
            reader.skip("}")?;
            rest = reader.0;
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        Ok(Self(parts))
    }

    /// Returns the text for a value. The values of one path are separated by spaces.
    pub(crate) fn render(&self, value: &Value) -> String {
        let parts = self.0.iter().map(|part| match part {
            Part::Text(text) => text.clone(),
            Part::Path(steps) => {
                let found = select(value, steps);
                found.into_iter().map(shown).collect::<Vec<_>>().join(" ")
            }
        });
        parts.collect()
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn select<'a>(value: &'a Value, steps: &[Step]) -> Vec<&'a Value> {
    let mut found = vec![value];
    for step in steps {
        found = found.into_iter().flat_map(|value| next(value, step)).collect();
    }
    found
}

fn next<'a>(value: &'a Value, step: &Step) -> Vec<&'a Value> {
    let elements = value.as_array().map(Vec::as_slice).unwrap_or_default();
    match step {
        Step::Member(name) => value.get(name).into_iter().collect(),
        Step::Element(at) => {
            let at = usize::try_from(*at).ok().or_else(|| {
                elements
                    .len()
                    .checked_sub(usize::try_from(at.unsigned_abs()).ok()?)
            });
            at.and_then(|at| elements.get(at)).into_iter().collect()
        }
        Step::All => match value {
            Value::Object(members) => members.values().collect(),
            _ => elements.iter().collect(),
        },
        Step::Where { path, is, value } => {
            let matches = |element: &&Value| (select(element, path).first() == Some(&value)) == *is;
            elements.iter().filter(matches).collect()
        }
    }
}

/// The rest of a template.
struct Reader<'a>(&'a str);

impl Reader<'_> {
    fn skip(&mut self, text: &str) -> Result<(), String> {
        let rest = self.0.trim_start();
        self.0 = rest.strip_prefix(text).ok_or_else(|| match rest {
            "" => format!("'{text}' is missing at the end"),
            rest => format!("'{text}' is missing before '{rest}'"),
        })?;
        Ok(())
    }

    fn steps(&mut self) -> Result<Vec<Step>, String> {
        self.0 = self.0.strip_prefix(['$', '@']).unwrap_or(self.0);
        let mut steps = Vec::new();
        loop {
            if let Some(rest) = self.0.strip_prefix('[') {
                self.0 = rest;
                steps.push(self.bracket()?);
                self.skip("]")?;
            } else if let Some(rest) = self.0.strip_prefix(".[") {
                self.0 = rest;
                steps.push(self.bracket()?);
                self.skip("]")?;
            } else if let Some(rest) = self.0.strip_prefix('.') {
                let is_part = |c: char| c.is_alphanumeric() || "_-*/".contains(c);
                let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
                let (name, rest) = rest.split_at(end);
                self.0 = rest;
                match name {
                    // `{.}` is the whole value.
                    "" => {}
                    "*" => steps.push(Step::All),
                    name => steps.push(Step::Member(name.to_owned())),
                }
            } else {
                return Ok(steps);
            }
        }
    }

    fn bracket(&mut self) -> Result<Step, String> {
        self.0 = self.0.trim_start();
        if let Some(rest) = self.0.strip_prefix('*') {
            self.0 = rest;
            return Ok(Step::All);
        }
        if self.0.starts_with(['"', '\'']) {
            return self.quoted().map(Step::Member);
        }
        if self.0.starts_with('?') {
            self.skip("?(")?;
            self.0 = self.0.trim_start();
            let path = self.steps()?;
            self.0 = self.0.trim_start();
            let is = !self.0.starts_with('!');
            self.skip(if is { "==" } else { "!=" })?;
            let value = self.value()?;
            self.skip(")")?;
            return Ok(Step::Where { path, is, value });
        }
        let end = self.0.find(']').unwrap_or(self.0.len());
        let (number, rest) = self.0.split_at(end);
        let at = number.trim().parse().map_err(|_| {
            format!("'[{number}]' selects nothing: write [0], [*], ['name'] or [?(@.name==\"value\")]")
        })?;
        self.0 = rest;
        Ok(Step::Element(at))
    }

    /// Reads a text in quotes, or a number, `true`, `false` or `null`.
    fn value(&mut self) -> Result<Value, String> {
        self.0 = self.0.trim_start();
        if self.0.starts_with(['"', '\'']) {
            return self.quoted().map(Value::String);
        }
        let end = self.0.find([')', ' ']).unwrap_or(self.0.len());
        let (text, rest) = self.0.split_at(end);
        self.0 = rest;
        serde_json::from_str(text).map_err(|_| format!("'{text}' is no value: texts have quotes"))
    }

    /// Reads a text in quotes, with the escapes of JSON.
    fn quoted(&mut self) -> Result<String, String> {
        let quote = self.0.chars().next().unwrap_or('"');
        let inside = self.0.strip_prefix(quote).unwrap_or(self.0);
        let mut escaped = false;
        let end = inside.find(|c| {
            let is_end = c == quote && !escaped;
            escaped = c == '\\' && !escaped;
            is_end
        });
        let (text, rest) = end
            .and_then(|end| Some((inside.get(..end)?, inside.get(end + 1..)?)))
            .ok_or_else(|| format!("{quote} is missing at the end of {quote}{inside}"))?;
        self.0 = rest;
        let text = if quote == '\'' {
            text.replace("\\'", "'").replace('"', "\\\"")
        } else {
            text.to_owned()
        };
        serde_json::from_str(&format!("\"{text}\"")).map_err(|error| format!("'{text}': {error}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn rendered(template: &str) -> String {
        let value = json!([
            {"id": 1, "identity": 1, "labels": ["reserved:host"], "status": {"identity": {"id": 1}}},
            {"id": 7, "identity": 256, "labels": ["k8s:app=web", "k8s:tier=1"], "a.b": "x", "status": {"identity": {"id": 256}}},
            {"id": 9, "identity": 256, "labels": [], "name": "it's", "status": {"identity": {"id": 256}}},
        ]);
        JsonPath::parse(template).unwrap().render(&value)
    }

    #[test]
    fn values_are_selected_as_kubectl_does() {
        for (template, expected) in [
            ("{[?(@.status.identity.id==1)].id}", "1"),
            ("{[?(@.identity==256)].id}", "7 9"),
            ("{[?(@.identity!=1)].id}", "7 9"),
            ("{[ ?( @.identity == 3 ) ].id}", ""),
            ("{[*].id}", "1 7 9"),
            ("{$[0].id}", "1"),
            ("{[-1].id} last{\"\\n\"}", "9 last\n"),
            ("{[1]['a.b']}", "x"),
            ("{[1].labels}", "[\"k8s:app=web\",\"k8s:tier=1\"]"),
            ("{[*].labels[*]}", "reserved:host k8s:app=web k8s:tier=1"),
            ("{[?(@.name=='it\\'s')].id}", "9"),
            ("{[?(@.name==\"it's\")].id}", "9"),
            ("{[9].id}{.x.y}", ""),
            ("id", "id"),
        ] {
            assert_eq!(rendered(template), expected, "{template}");
        }
    }

    #[test]
    fn errors_name_the_place() {
        for (template, expected) in [
            ("{.a", "'}' is missing at the end"),
            ("{a}", "'}' is missing before 'a}'"),
            ("{[x]}", "'[x]' selects nothing"),
            ("{[?(@.a==x)]}", "'x' is no value: texts have quotes"),
            ("{[?(@.a>1)]}", "'==' is missing before '>1)]}'"),
            ("{\"a}", "\" is missing at the end"),
        ] {
            let error = JsonPath::parse(template).unwrap_err();
            assert!(error.contains(expected), "{template}: {error}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_templates_do_not_panic(template in "[{}\\[\\]\\.\\?\\(\\)@='\"\\\\a0é -]{0,24}") {
            let _ = JsonPath::parse(&template).map(|path| path.render(&json!([{"a": [0]}])));
        }
    }
}
