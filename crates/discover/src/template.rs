//! Texts with placeholders: `{name}`, `{1}`, `{id}`, `{image}`, `{label:KEY}`.

use std::collections::BTreeMap;

/// A text with placeholders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template(Vec<Piece>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Name,
    Id,
    Image,
    /// Text of the star of this number, from 1.
    Star(usize),
    /// Value of the workload's own label with this key.
    Label(String),
}

/// The texts that placeholders stand for.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// `{name}`: name of the namespace or container.
    pub name: &'a str,
    /// `{id}`: id of the container.
    pub id: Option<&'a str>,
    /// `{image}`: image of the container.
    pub image: Option<&'a str>,
    /// `{1}`, `{2}`: texts of the stars of the name pattern.
    pub stars: &'a [&'a str],
    /// `{label:KEY}`: labels of the container.
    pub labels: &'a BTreeMap<String, String>,
}

impl Template {
    /// Parses a text. `stars`: number of stars that every name pattern has. `is_container`: whether the source knows
    /// ids, images and labels.
    ///
    /// # Errors
    /// A brace is not closed, or the source does not know the placeholder.
    pub fn parse(text: &str, stars: usize, is_container: bool) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            if !before.is_empty() {
                pieces.push(Piece::Text(before.to_owned()));
            }
            let Some((inside, after)) = after.split_once('}') else {
                return Err(format!("'{text}': '{{' without '}}'"));
            };
            pieces.push(match inside {
                "name" => Piece::Name,
                "id" if is_container => Piece::Id,
                "image" if is_container => Piece::Image,
                _ => match (inside.strip_prefix("label:"), inside.parse::<usize>()) {
                    (Some(key), _) if is_container && !key.is_empty() => Piece::Label(key.to_owned()),
                    (None, Ok(n)) if (1..=stars).contains(&n) => Piece::Star(n),
                    (None, Ok(n)) => {
                        return Err(format!("'{{{n}}}' is no star of every pattern of names"));
                    }
                    _ => {
                        let known = if is_container {
                            "{name}, {id}, {image}, {label:KEY} and {1}"
                        } else {
                            "{name} and {1}"
                        };
                        return Err(format!("'{{{inside}}}' is not known here; there are {known}"));
                    }
                },
            });
            rest = after;
        }
        if rest.contains('}') {
            return Err(format!("'{text}': '}}' without '{{'"));
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(Self(pieces))
    }

    /// Returns the text for a workload; `None` if the workload lacks what a placeholder stands for.
    #[must_use]
    pub fn render(&self, subject: &Subject<'_>) -> Option<String> {
        let mut text = String::new();
        for piece in &self.0 {
            text.push_str(match piece {
                Piece::Text(text) => text,
                Piece::Name => subject.name,
                Piece::Id => subject.id?,
                Piece::Image => subject.image?,
                Piece::Star(n) => subject.stars.get(n.checked_sub(1)?)?,
                Piece::Label(key) => subject.labels.get(key)?,
            });
        }
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_stand_for_the_texts_of_the_workload() {
        let labels = BTreeMap::from([("team".to_owned(), "red".to_owned())]);
        let subject = Subject {
            name: "web-1",
            id: Some("0123"),
            image: Some("nginx:1"),
            stars: &["1"],
            labels: &labels,
        };
        let render = |text| Template::parse(text, 1, true).unwrap().render(&subject);
        assert_eq!(
            render("{label:team}/{name}:{id}{1} {image}").unwrap(),
            "red/web-1:01231 nginx:1"
        );
        assert_eq!(render("{label:none}"), None);
        assert_eq!(render("").unwrap(), "");
    }

    #[test]
    fn unknown_placeholders_are_errors() {
        for (text, message) in [
            ("{", "without '}'"),
            ("}", "without '{'"),
            ("{x}", "there are {name}, {id}"),
            ("{label:}", "not known"),
            ("{2}", "no star"),
            ("{0}", "no star"),
        ] {
            let error = Template::parse(text, 1, true).unwrap_err();
            assert!(error.contains(message), "{text}: {error}");
        }
        assert!(
            Template::parse("{id}", 1, false)
                .unwrap_err()
                .contains("{name} and {1}")
        );
    }
}
