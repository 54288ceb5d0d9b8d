//! Compiled sets of `matchName` and `matchPattern`: [`NameSet`] finds which of thousands of patterns match a name.

use std::{
    collections::HashMap,
    fmt,
    hash::{Hash, Hasher},
};

use palisade_model::rule::FqdnPattern;

use super::name::{MAX_LABEL, Name, NameError};

/// The compiled names and patterns of a policy. A name is matched against thousands of them by a few hash lookups.
///
/// All patterns without a wildcard are checked by one lookup of the whole name. Patterns with wildcards form a tree of
/// labels from right to left. A literal label is found by one lookup, a label with wildcards by lookups of its literal
/// prefix or suffix. Only label patterns such as `*a*`, which have neither prefix nor suffix, are compared one by one.
///
/// ```
/// use palisade_model::rule::FqdnPattern;
/// use palisade_protocols::dns::NameSet;
///
/// let set = NameSet::new(&[
///     FqdnPattern::Name("example.com".into()),
///     FqdnPattern::Pattern("*.example.com".into()),
/// ])?;
/// assert_eq!(set.first(&"example.com".parse()?), Some(0));
/// assert_eq!(set.first(&"www.example.com".parse()?), Some(1));
/// assert_eq!(set.first(&"a.b.example.com".parse()?), None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct NameSet {
    len: usize,
    exact: HashMap<Box<[u8]>, Vec<u32>>,
    everything: Vec<u32>,
    nodes: Vec<Node>,
    /// Child nodes by node and literal label.
    literal: HashMap<Key, u32>,
    /// Branches with a wildcard label, by node, kind (`PREFIX` or `SUFFIX`) and the label's literal prefix or suffix.
    affixes: HashMap<Key, Vec<Branch>>,
}

/// One label position in the tree.
#[derive(Clone, Debug, Default)]
struct Node {
    /// Patterns whose leftmost label is this one.
    ends: Vec<u32>,
    /// Patterns that have `**.` to the left of this label.
    deep: Vec<u32>,
    /// The child for the label `*`.
    any: Option<u32>,
    /// Whether this node has children for literal labels.
    literals: bool,
    /// Bit `n` is set if this node has children whose label starts with `n` literal bytes followed by a wildcard.
    prefixes: u64,
    /// Bit `n` is set if this node has children whose label starts with a wildcard and ends with `n` literal bytes.
    suffixes: u64,
    /// Children whose label starts and ends with a wildcard.
    infixes: Vec<Branch>,
}

/// A label with wildcards, and the child node that it leads to.
#[derive(Clone, Debug)]
struct Branch {
    glob: Glob,
    node: u32,
}

/// A label with wildcards, as the literal parts between the wildcards. The first and the last part can be empty.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Glob(Vec<Box<[u8]>>);

impl Glob {
    fn new(label: &[u8]) -> Self {
        let mut parts: Vec<Box<[u8]>> = label.split(|&byte| byte == b'*').map(Into::into).collect();
        // Two adjacent wildcards match the same labels as one, so drop the empty part between them.
        let last = parts.len() - 1;
        let mut at = 0;
        parts.retain(|part| {
            at += 1;
            at == 1 || at == last + 1 || !part.is_empty()
        });
        Self(parts)
    }

    /// Returns whether the label matches. The caller has checked that all bytes of the label are [`is_plain`].
    fn matches(&self, label: &[u8]) -> bool {
        let [first, middle @ .., last] = &self.0[..] else {
            return false;
        };
        let Some(rest) = label.strip_prefix(&first[..]) else {
            return false;
        };
        let Some(mut rest) = rest.strip_suffix(&last[..]) else {
            return false;
        };
        middle.iter().all(|part| {
            // The leftmost occurrence leaves the longest rest for the parts that follow.
            match rest
                .windows(part.len().max(1))
                .position(|window| window == &part[..])
            {
                Some(at) => {
                    rest = rest.get(at + part.len()..).unwrap_or_default();
                    true
                }
                None => false,
            }
        })
    }
}

const LITERAL: u8 = 0;
const PREFIX: u8 = 1;
const SUFFIX: u8 = 2;

/// Key of a lookup in [`NameSet`]: a node, the kind (`LITERAL`, `PREFIX` or `SUFFIX`), and the bytes of a label or of
/// its literal prefix or suffix. The bytes are stored inline, so a lookup does not allocate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    node: u32,
    kind: u8,
    len: u8,
    bytes: [u8; MAX_LABEL],
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Bytes after the first `len` are zero in every key, so `Eq` can compare them and the hash can omit them.
        state.write_u64(u64::from(self.node) << 16 | u64::from(self.kind) << 8 | u64::from(self.len));
        state.write(self.bytes.get(..usize::from(self.len)).unwrap_or_default());
    }
}

impl Key {
    /// Creates a key. `bytes`: a label or a part of a label, so at most 63 bytes.
    fn new(node: u32, kind: u8, bytes: &[u8]) -> Self {
        let mut key = Self {
            node,
            kind,
            len: bytes.len() as u8,
            bytes: [0; MAX_LABEL],
        };
        if let Some(target) = key.bytes.get_mut(..bytes.len()) {
            target.copy_from_slice(bytes);
        }
        key
    }
}

/// Returns whether a wildcard matches the byte (in lower case). The set of bytes is that of Cilium's patterns.
const fn is_plain(byte: u8) -> bool {
    matches!(byte, b'-' | b'_' | b'0'..=b'9' | b'a'..=b'z')
}

/// A pattern that cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatternError {
    /// Index of the pattern in the input.
    pub index: usize,
    /// The pattern.
    pub pattern: String,
    /// The reason.
    pub reason: NameError,
}

impl fmt::Display for PatternError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DNS name or pattern \"{}\": {}", self.pattern, self.reason)
    }
}

impl std::error::Error for PatternError {}

impl NameSet {
    /// Compiles patterns. Matches are reported as indices into this input.
    ///
    /// # Errors
    /// [`PatternError`] for the first invalid name or pattern.
    pub fn new<'a>(patterns: impl IntoIterator<Item = &'a FqdnPattern>) -> Result<Self, PatternError> {
        let mut set = Self {
            nodes: vec![Node::default()],
            ..Self::default()
        };
        for (index, pattern) in patterns.into_iter().enumerate() {
            let text = match pattern {
                FqdnPattern::Name(text) | FqdnPattern::Pattern(text) => text,
            };
            let result = match pattern {
                FqdnPattern::Pattern(text) if text.contains('*') => set.add_pattern(text, index as u32),
                _ => text.parse().map(|name: Name| {
                    set.exact
                        .entry(name.wire().into())
                        .or_default()
                        .push(index as u32);
                }),
            };
            result.map_err(|reason| PatternError {
                index,
                pattern: text.clone(),
                reason,
            })?;
            set.len = index + 1;
        }
        Ok(set)
    }

    /// Returns the number of patterns.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the index of the first pattern that matches the name.
    #[must_use]
    pub fn first(&self, name: &Name) -> Option<usize> {
        let mut first = None;
        self.for_each(name, |index| {
            first = Some(first.map_or(index, |first: usize| first.min(index)))
        });
        first
    }

    /// Calls `f` once with the index of each pattern that matches the name, in no particular order.
    pub fn for_each(&self, name: &Name, mut f: impl FnMut(usize)) {
        let mut report = |indices: &[u32]| indices.iter().for_each(|&index| f(index as usize));
        report(&self.everything);
        if let Some(indices) = self.exact.get(name.wire()) {
            report(indices);
        }
        if self.nodes.iter().take(1).any(|root| root.has_children()) {
            let mut labels: [&[u8]; 127] = [&[]; 127];
            let mut count = 0;
            for (slot, label) in labels.iter_mut().zip(name.labels()) {
                *slot = label;
                count += 1;
            }
            let labels = labels.get(..count).unwrap_or_default();
            let plain = labels
                .iter()
                .take_while(|label| label.iter().copied().all(is_plain))
                .count();
            self.walk(0, labels, plain, &mut report);
        }
    }

    /// Descends the tree with the remaining labels, from right to left. `plain`: number of consecutive labels, from the
    /// left end of the name, that consist only of bytes that a wildcard matches. The nodes form a tree, so no node is
    /// visited twice.
    fn walk(&self, node: u32, labels: &[&[u8]], plain: usize, report: &mut impl FnMut(&[u32])) {
        let Some(here) = self.nodes.get(node as usize) else {
            return;
        };
        let Some((label, rest)) = labels.split_last() else {
            report(&here.ends);
            return;
        };
        if plain >= labels.len() {
            report(&here.deep);
        }
        if here.literals
            && let Some(&child) = self.literal.get(&Key::new(node, LITERAL, label))
        {
            self.walk(child, rest, plain, report);
        }
        let wild = here.any.is_some() || here.prefixes | here.suffixes != 0 || !here.infixes.is_empty();
        if !wild || !label.iter().copied().all(is_plain) {
            return;
        }
        if let Some(child) = here.any {
            self.walk(child, rest, plain, report);
        }
        for prefix in bits(here.prefixes).map_while(|len| label.get(..len)) {
            self.branches(Key::new(node, PREFIX, prefix), label, rest, plain, report);
        }
        for suffix in bits(here.suffixes).map_while(|len| label.get(label.len().checked_sub(len)?..)) {
            self.branches(Key::new(node, SUFFIX, suffix), label, rest, plain, report);
        }
        for branch in here.infixes.iter().filter(|branch| branch.glob.matches(label)) {
            self.walk(branch.node, rest, plain, report);
        }
    }

    fn branches(
        &self,
        key: Key,
        label: &[u8],
        rest: &[&[u8]],
        plain: usize,
        report: &mut impl FnMut(&[u32]),
    ) {
        for branch in self.affixes.get(&key).into_iter().flatten() {
            if branch.glob.matches(label) {
                self.walk(branch.node, rest, plain, report);
            }
        }
    }

    fn add_pattern(&mut self, pattern: &str, index: u32) -> Result<(), NameError> {
        let pattern = pattern.to_ascii_lowercase();
        let pattern = pattern.as_str();
        if pattern == "*" {
            self.everything.push(index);
            return Ok(());
        }
        let (deep, pattern) = match pattern.strip_prefix("**.") {
            Some(rest) => (true, rest),
            None => (false, pattern),
        };
        let mut length = 1;
        let mut node = 0;
        for label in pattern.rsplit('.') {
            let literal = label.bytes().filter(|&byte| byte != b'*').count();
            length += 1 + literal;
            if label.is_empty() {
                return Err(NameError::EmptyLabel);
            }
            if literal > MAX_LABEL {
                return Err(NameError::LabelTooLong);
            }
            node = self.child(node, label.as_bytes());
        }
        if length > super::name::MAX_NAME {
            return Err(NameError::TooLong);
        }
        if let Some(node) = self.nodes.get_mut(node as usize) {
            if deep { &mut node.deep } else { &mut node.ends }.push(index);
        }
        Ok(())
    }

    /// Returns the child of a node for one label of a pattern. Creates the child if it does not exist.
    fn child(&mut self, parent: u32, label: &[u8]) -> u32 {
        let new = self.nodes.len() as u32;
        let Some(node) = self.nodes.get_mut(parent as usize) else {
            return new;
        };
        let child = if !label.contains(&b'*') {
            node.literals = true;
            *self
                .literal
                .entry(Key::new(parent, LITERAL, label))
                .or_insert(new)
        } else if label.iter().all(|&byte| byte == b'*') {
            *node.any.get_or_insert(new)
        } else {
            let glob = Glob::new(label);
            let first = glob.0.first().map_or(&[][..], |part| part);
            let last = glob.0.last().map_or(&[][..], |part| part);
            let branches = if !first.is_empty() {
                node.prefixes |= 1 << first.len();
                self.affixes.entry(Key::new(parent, PREFIX, first)).or_default()
            } else if !last.is_empty() {
                node.suffixes |= 1 << last.len();
                self.affixes.entry(Key::new(parent, SUFFIX, last)).or_default()
            } else {
                &mut node.infixes
            };
            match branches.iter().find(|branch| branch.glob == glob) {
                Some(branch) => branch.node,
                None => {
                    branches.push(Branch { glob, node: new });
                    new
                }
            }
        };
        if child == new {
            self.nodes.push(Node::default());
        }
        child
    }
}

impl Node {
    fn has_children(&self) -> bool {
        self.literals
            || self.any.is_some()
            || self.prefixes | self.suffixes != 0
            || !self.infixes.is_empty()
            || !self.deep.is_empty()
    }
}

/// Returns the numbers of the bits that are set, in ascending order.
fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (bit < u64::BITS).then_some(bit as usize)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(text: &str) -> FqdnPattern {
        if text.contains('*') {
            FqdnPattern::Pattern(text.to_owned())
        } else {
            FqdnPattern::Name(text.to_owned())
        }
    }

    fn matching(patterns: &[&str], name: &str) -> Vec<usize> {
        let patterns: Vec<_> = patterns.iter().map(|text| pattern(text)).collect();
        let set = NameSet::new(&patterns).unwrap();
        let mut found = vec![];
        set.for_each(&name.parse().unwrap(), |index| found.push(index));
        found.sort_unstable();
        assert_eq!(set.first(&name.parse().unwrap()), found.first().copied());
        found
    }

    #[test]
    fn all_forms_of_patterns_match_as_documented() {
        let table: &[(&str, &[&str], &[&str])] = &[
            (
                "example.com",
                &["example.com", "EXAMPLE.com."],
                &["a.example.com", "com", "."],
            ),
            ("*", &[".", "com", "a.b.c.d", "x\\.y", "\\255"], &[]),
            (
                "*.example.com",
                &["a.example.com", "-_9.example.com"],
                &[
                    "example.com",
                    "a.b.example.com",
                    "a\\.b.example.com",
                    "a\\032b.example.com",
                ],
            ),
            (
                "**.example.com",
                &["a.example.com", "a.b.c.example.com"],
                &["example.com", "a.\\255.example.com", "aexample.com"],
            ),
            ("**.*.com", &["a.b.com", "a.b.c.com"], &["b.com", "com"]),
            (
                "api-*.example.com",
                &["api-.example.com", "api-1.example.com"],
                &["api.example.com", "xapi-1.example.com", "api-1\\.x.example.com"],
            ),
            (
                "*-api.example.com",
                &["-api.example.com", "x-api.example.com"],
                &["x-api2.example.com"],
            ),
            (
                "*a*b*.com",
                &["ab.com", "xaybz.com", "ab-ab.com"],
                &["ba.com", "a.com"],
            ),
            ("a*a.com", &["aa.com", "aba.com"], &["a.com"]),
            ("a*b*b.com", &["abb.com", "axbyb.com"], &["ab.com"]),
            ("a.*.c", &["a.b.c"], &["a.c", "a.b.b.c"]),
            ("example.*", &["example.com"], &["example.co.uk", "example"]),
            ("**", &["com"], &["a.com", "."]),
            ("*.**.com", &["a.b.com"], &["a.b.c.com", "b.com"]),
        ];
        for (pattern, yes, no) in table {
            for name in *yes {
                assert_eq!(matching(&[pattern], name), [0], "{pattern} {name}");
            }
            for name in *no {
                assert_eq!(matching(&[pattern], name), [0; 0], "{pattern} {name}");
            }
        }
    }

    #[test]
    fn all_matching_patterns_are_reported() {
        let patterns = [
            "*.example.com",
            "a.example.com",
            "*",
            "a.*.com",
            "b.example.com",
            "**.com",
            "a.example.com",
        ];
        assert_eq!(matching(&patterns, "a.example.com"), [0, 1, 2, 3, 5, 6]);
    }

    #[test]
    fn an_invalid_pattern_is_an_error() {
        for (text, reason) in [
            ("a..*", NameError::EmptyLabel),
            ("**.", NameError::EmptyLabel),
            (".*.com", NameError::EmptyLabel),
            ("a..b", NameError::EmptyLabel),
        ] {
            let error = NameSet::new(&[pattern("x.y"), pattern(text)]).unwrap_err();
            assert_eq!((error.index, error.reason), (1, reason), "{text}");
        }
        let long = format!("{}*.com", "a".repeat(64));
        assert_eq!(
            NameSet::new(&[pattern(&long)]).unwrap_err().reason,
            NameError::LabelTooLong
        );
    }

    /// Returns the regular expression that defines the meaning of a pattern.
    fn regex(pattern: &str) -> regex::Regex {
        let (deep, rest) = match pattern.strip_prefix("**.") {
            Some(rest) => ("([-a-zA-Z0-9_]+\\.)+", rest),
            None => ("", pattern),
        };
        let rest = rest.replace('.', "\\.").replace('*', "[-a-zA-Z0-9_]*");
        let everything = if pattern == "*" { "|.*" } else { "" };
        regex::Regex::new(&format!("^({deep}{rest}{everything})$")).unwrap()
    }

    fn label(wild: bool) -> impl Strategy<Value = String> {
        if wild {
            "[ab*]{1,4}|\\*|a\\*|\\*b".boxed()
        } else {
            "[ab]{1,4}|a|b".boxed()
        }
    }

    proptest! {
        #[test]
        fn a_set_matches_as_equivalent_regular_expressions_do(
            patterns in prop::collection::vec(
                (prop::bool::weighted(0.2), prop::collection::vec(label(true), 1..4)), 1..40),
            names in prop::collection::vec(prop::collection::vec(label(false), 1..5), 1..40),
        ) {
            let texts: Vec<String> = patterns.iter()
                .map(|(deep, labels)| format!("{}{}", if *deep { "**." } else { "" }, labels.join(".")))
                .collect();
            let compiled: Vec<_> = texts.iter().map(|text| pattern(text)).collect();
            let set = NameSet::new(&compiled).unwrap();
            let regexes: Vec<_> = texts.iter().map(|text| regex(text)).collect();
            for name in names {
                let name = name.join(".");
                let mut found = vec![];
                set.for_each(&name.parse().unwrap(), |index| found.push(index));
                found.sort_unstable();
                let expected: Vec<_> =
                    (0..texts.len()).filter(|&i| regexes[i].is_match(&name)).collect();
                prop_assert_eq!(found, expected, "{} in {:?}", name, texts);
            }
        }
    }
}
