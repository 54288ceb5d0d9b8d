//! Name patterns with `*`.

/// A pattern in which each `*` stands for any text, also for none. The rest is compared byte by byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wildcard {
    /// The texts between the stars; a pattern without a star has one.
    parts: Vec<String>,
}

impl Wildcard {
    /// Parses a pattern.
    ///
    /// # Errors
    /// The pattern is empty or longer than 253 bytes.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() || text.len() > 253 {
            return Err(format!(
                "'{text}' cannot be a pattern (1 to 253 bytes): write for example \"web-*\""
            ));
        }
        Ok(Self {
            parts: text.split('*').map(str::to_owned).collect(),
        })
    }

    /// Returns the text for which each star stands, the shortest one for all stars but the last; `None` if the name
    /// does not match.
    #[must_use]
    pub fn captures<'a>(&self, name: &'a str) -> Option<Vec<&'a str>> {
        let (first, rest) = self.parts.split_first()?;
        let mut text = name.strip_prefix(first.as_str())?;
        let Some((last, middle)) = rest.split_last() else {
            return text.is_empty().then(Vec::new);
        };
        let mut captures = Vec::with_capacity(rest.len());
        for part in middle {
            let at = text.find(part.as_str())?;
            captures.push(text.get(..at)?);
            text = text.get(at + part.len()..)?;
        }
        captures.push(text.strip_suffix(last.as_str())?);
        Some(captures)
    }

    /// Returns whether the name matches.
    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        self.captures(name).is_some()
    }

    /// Returns the number of stars.
    #[must_use]
    pub fn stars(&self) -> usize {
        self.parts.len().saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Matches by trying every text for each star.
    fn naive(pattern: &[u8], name: &[u8]) -> bool {
        match (pattern.split_first(), name.split_first()) {
            (None, None) => true,
            (Some((b'*', rest)), _) => (0..=name.len()).any(|n| naive(rest, &name[n..])),
            (Some((p, rest)), Some((n, name))) => p == n && naive(rest, name),
            _ => false,
        }
    }

    #[test]
    fn stars_capture_the_shortest_text_from_the_left() {
        let pattern = Wildcard::parse("pal-*-*").unwrap();
        assert_eq!(pattern.captures("pal-1-web-2"), Some(vec!["1", "web-2"]));
        assert_eq!(pattern.captures("pal-1"), None);
        assert_eq!(pattern.stars(), 2);
        assert!(Wildcard::parse("web").unwrap().matches("web"));
        assert!(!Wildcard::parse("web").unwrap().matches("web1"));
        assert!(Wildcard::parse("").is_err());
    }

    proptest! {
        #[test]
        fn matching_equals_a_search_of_all_texts(pattern in "[ab*]{1,8}", name in "[ab]{0,10}") {
            let fast = Wildcard::parse(&pattern).unwrap();
            prop_assert_eq!(fast.matches(&name), naive(pattern.as_bytes(), name.as_bytes()));
            if let Some(captures) = fast.captures(&name) {
                let mut whole = String::new();
                for (n, part) in fast.parts.iter().enumerate() {
                    whole.push_str(part);
                    whole.push_str(captures.get(n).copied().unwrap_or_default());
                }
                prop_assert_eq!(whole, name);
            }
        }
    }
}
