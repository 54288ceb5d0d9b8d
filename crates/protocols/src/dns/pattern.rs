//! Sets of `matchName` and `matchPattern`, compiled: [`NameSet`] finds which of thousands of patterns match a name.

use std::{
    collections::HashMap,
    fmt,
    hash::{Hash, Hasher},
};

use palisade_policy::rule::FqdnPattern;

use super::name::{MAX_LABEL, Name, NameError};

/// Names and patterns of a policy, compiled: judges a name against thousands of them by a few hash look-ups.
///
/// Names without a wildcard are one look-up of the whole name. Patterns are a tree of labels from the right; a
/// literal label is a look-up, a label with wildcards is found by the length and bytes of its literal beginning
/// or end. Only labels like `*a*`, which have neither, are tried one by one.
#[derive(Clone, Debug, Default)]
pub struct NameSet {
    len: usize,
    exact: HashMap<Box<[u8]>, Vec<u32>>,
    everything: Vec<u32>,
    nodes: Vec<Node>,
    /// Node and literal label -> child.
    literal: HashMap<Key, u32>,
    /// Node, side and literal part -> wildcard labels that begin or end so.
    affixes: HashMap<Key, Vec<Branch>>,
}

/// One label position in the tree.
#[derive(Clone, Debug, Default)]
struct Node {
    /// Patterns whose leftmost label this is.
    ends: Vec<u32>,
    /// Patterns with `**.` to the left of this.
    deep: Vec<u32>,
    /// The child for a label that is `*` alone.
    any: Option<u32>,
    /// Whether there are children for literal labels.
    literals: bool,
    /// Bit `n`: there are children whose label begins with `n` literal bytes, then a wildcard.
    prefixes: u64,
    /// Bit `n`: there are children whose label begins with a wildcard and ends with `n` literal bytes.
    suffixes: u64,
    /// Children whose label begins and ends with a wildcard.
    infixes: Vec<Branch>,
}

/// A child behind a label with wildcards.
#[derive(Clone, Debug)]
struct Branch {
    glob: Glob,
    node: u32,
}

/// A label with wildcards: the literal parts between them. The first and the last may be empty.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Glob(Vec<Box<[u8]>>);

impl Glob {
    fn new(label: &[u8]) -> Self {
        let mut parts: Vec<Box<[u8]>> = label.split(|&byte| byte == b'*').map(Into::into).collect();
        // between two wildcards in a row is nothing to look for
        let last = parts.len() - 1;
        let mut at = 0;
        parts.retain(|part| {
            at += 1;
            at == 1 || at == last + 1 || !part.is_empty()
        });
        Self(parts)
    }

    /// Whether the label matches; all its bytes must be such as a wildcard takes.
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
            // the leftmost occurrence leaves the most for what follows
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

/// Key of a child: node, kind, bytes. In place, so that looking up allocates nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    node: u32,
    kind: u8,
    len: u8,
    bytes: [u8; MAX_LABEL],
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // what stands behind `len` is zero in every key
        state.write_u64(u64::from(self.node) << 16 | u64::from(self.kind) << 8 | u64::from(self.len));
        state.write(self.bytes.get(..usize::from(self.len)).unwrap_or_default());
    }
}

impl Key {
    /// `bytes` are a label or a part of one.
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

/// What a wildcard takes (in lower case).
const fn is_plain(byte: u8) -> bool {
    matches!(byte, b'-' | b'_' | b'0'..=b'9' | b'a'..=b'z')
}

/// Why a pattern cannot be compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PatternError {
    /// Which of the patterns it is.
    pub index: usize,
    /// The pattern.
    pub pattern: String,
    /// What is wrong with it.
    pub reason: NameError,
}

impl fmt::Display for PatternError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DNS name or pattern \"{}\": {}", self.pattern, self.reason)
    }
}

impl std::error::Error for PatternError {}

impl NameSet {
    /// Compiles patterns; what matches is told by their place in this order.
    ///
    /// # Errors
    /// If one of them is no name and no pattern.
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

    /// Number of patterns.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first pattern that matches.
    #[must_use]
    pub fn first(&self, name: &Name) -> Option<usize> {
        let mut first = None;
        self.for_each(name, |index| {
            first = Some(first.map_or(index, |first: usize| first.min(index)))
        });
        first
    }

    /// Calls `f` for every pattern that matches, once, in no particular order.
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

    /// Follows the labels from the right. Of `labels`, which are left to follow, the first `plain` are such as a
    /// wildcard takes (if it is more than there are, all). Every node has one way to it, so none is visited twice.
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

    /// The child of a node for one label of a pattern, made if it is not there.
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

/// The numbers of the bits that are set, ascending.
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
    fn the_forms_of_the_language() {
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
    fn all_that_match_are_told() {
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
    fn what_is_no_pattern_is_an_error() {
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

    /// The language by regular expressions, as its definition has it.
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
        fn a_set_matches_as_regular_expressions_do(
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
