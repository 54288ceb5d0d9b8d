//! Regular expressions that are matched together, each against a whole text.

use std::collections::{BTreeMap, HashMap};

use palisade_protocols::http1::re2;
use regex_automata::{
    Anchored, Input, MatchKind,
    hybrid::dfa::{Cache, DFA},
    nfa::thompson::{self, NFA, WhichCaptures},
};
use regex_syntax::{
    ParserBuilder,
    hir::{Dot, Hir, HirKind, Look, literal},
};

/// Maximum size of one compiled expression, bytes. Validation has the same limit.
const ONE: usize = 1 << 20;
/// Maximum size of the compiled expressions for one field (path, method or host) of a rule set, bytes.
const TOGETHER: usize = 32 << 20;
/// Maximum size of a worker's cache of DFA states for one field, bytes. A full cache is cleared.
const CACHE: usize = 8 << 20;
/// Maximum number of texts to which an expression is expanded. An expression that matches more texts is compiled.
const LITERALS: usize = 64;

/// Expressions, numbered in the order in which they were given.
///
/// An expression that matches only a few texts (`GET|HEAD`, `/healthz`) is expanded to these texts, which are looked up
/// in a hash table. All other expressions are compiled to one automaton, which reads a text once for all of them.
/// Before that, a trailing `.*` is cut off some expressions ([`Part`]).
#[derive(Debug, Default)]
pub(super) struct Patterns {
    exact: HashMap<Box<[u8]>, Vec<u32>>,
    automaton: Option<Automaton>,
}

#[derive(Debug)]
struct Automaton {
    dfa: DFA,
    /// For each pattern of the DFA, its expression and the suffix that was cut off.
    parts: Vec<Part>,
}

/// An expression as it was compiled. If it ends with `.*`, and the part before that matches only a few texts
/// (`/api/.*`), the trailing `.*` is cut off before compilation. The automaton then stops early, and many such
/// expressions need few states.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// Number of the expression.
    number: u32,
    /// Suffix that was cut off. It is matched without the automaton.
    rest: Rest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// No suffix was cut off.
    None,
    /// `.*`
    Line,
    /// `(?s:.*)`
    Text,
}

/// DFA states of an automaton that a worker has computed so far.
#[derive(Debug, Default)]
pub(super) struct DfaCache(Option<Cache>);

impl Patterns {
    /// Compiles expressions. `problem` is called with each expression that cannot be compiled and with the error. Such
    /// an expression matches nothing. If the automaton of all compiled expressions cannot be built, `problem` is called
    /// once, and none of them matches.
    pub(super) fn new<'a>(
        expressions: impl IntoIterator<Item = &'a str>,
        mut problem: impl FnMut(&str, String),
    ) -> Self {
        let mut patterns = Self::default();
        let mut run: Vec<Hir> = Vec::new();
        let mut parts = Vec::new();
        let mut size = 0;
        for (number, expression) in expressions.into_iter().enumerate() {
            let number = number as u32;
            let parsed = match parse(expression) {
                Ok(parsed) => parsed,
                Err(error) => {
                    problem(expression, error);
                    continue;
                }
            };
            if let Some(texts) = texts_of(&parsed) {
                for text in texts {
                    let numbers = patterns.exact.entry(text).or_default();
                    if numbers.last() != Some(&number) {
                        numbers.push(number);
                    }
                }
                continue;
            }
            let (read, rest) = split(parsed);
            let end = if rest == Rest::None {
                Hir::look(Look::End)
            } else {
                Hir::empty()
            };
            let whole = Hir::concat(vec![Hir::look(Look::Start), read, end]);
            // The expression is compiled alone first, to know its size.
            match compile(std::slice::from_ref(&whole), ONE) {
                Ok(alone) if size + alone.memory_usage() <= TOGETHER => {
                    size += alone.memory_usage();
                    run.push(whole);
                    parts.push(Part { number, rest });
                }
                Ok(_) => problem(expression, "too large together with those before it".to_owned()),
                Err(error) => problem(expression, error),
            }
        }
        if run.is_empty() {
            return patterns;
        }
        match build(&run) {
            Ok(dfa) => patterns.automaton = Some(Automaton { dfa, parts }),
            Err(error) => problem("(all expressions together)", error),
        }
        patterns
    }

    /// Writes the numbers of the expressions that match the whole `text` to `out`, in ascending order. Clears `out`
    /// first.
    pub(super) fn matching(&self, text: &[u8], cache: &mut DfaCache, out: &mut Vec<u32>) {
        out.clear();
        if let Some(numbers) = self.exact.get(text) {
            out.extend_from_slice(numbers);
        }
        if let Some(automaton) = &self.automaton {
            let cache = cache.0.get_or_insert_with(|| automaton.dfa.create_cache());
            // The result is `None` in a dead state, in which no further expression can match. The search itself cannot
            // fail, because the DFA has no quit bytes and does not give up when its cache is full.
            let _ = automaton.run(text, cache, out);
            out.sort_unstable();
            out.dedup();
        }
    }
}

impl Automaton {
    fn run(&self, text: &[u8], cache: &mut Cache, out: &mut Vec<u32>) -> Option<()> {
        let dfa = &self.dfa;
        let input = Input::new(text).anchored(Anchored::Yes);
        let mut state = dfa.start_state_forward(cache, &input).ok()?;
        for (at, &byte) in text.iter().enumerate() {
            state = dfa.next_state(cache, state, byte).ok()?;
            if !state.is_tagged() {
                continue;
            }
            // The automaton reports a match one byte late. So the suffix begins at this byte.
            if state.is_match() {
                let rest = text.get(at..)?;
                let is_text = str::from_utf8(rest).is_ok();
                let is_line = is_text && !rest.contains(&b'\n');
                for index in 0..dfa.match_len(cache, state) {
                    let part = self
                        .parts
                        .get(dfa.match_pattern(cache, state, index).as_usize())?;
                    match part.rest {
                        Rest::Line if is_line => out.push(part.number),
                        Rest::Text if is_text => out.push(part.number),
                        _ => {}
                    }
                }
            } else if state.is_dead() || state.is_quit() {
                return None;
            }
        }
        state = dfa.next_eoi_state(cache, state).ok()?;
        if state.is_match() {
            for index in 0..dfa.match_len(cache, state) {
                let part = self
                    .parts
                    .get(dfa.match_pattern(cache, state, index).as_usize())?;
                out.push(part.number);
            }
        }
        Some(())
    }
}

fn parse(expression: &str) -> Result<Hir, String> {
    let translated = re2::translate(expression)?;
    // Texts can be invalid UTF-8, as for `regex::bytes`.
    let mut parser = ParserBuilder::new().utf8(false).build();
    parser.parse(&translated).map_err(|error| error.to_string())
}

/// Compiles all expressions into one NFA and returns a lazy DFA over it, which finds all matching expressions in one
/// pass.
fn build(expressions: &[Hir]) -> Result<DFA, String> {
    let config = DFA::config()
        .match_kind(MatchKind::All)
        .cache_capacity(CACHE)
        .skip_cache_capacity_check(true);
    DFA::builder()
        .configure(config)
        .build_from_nfa(compile(expressions, 2 * TOGETHER)?)
        .map_err(|error| error.to_string())
}

fn compile(expressions: &[Hir], size: usize) -> Result<NFA, String> {
    let config = thompson::Config::new()
        .utf8(false)
        .which_captures(WhichCaptures::None)
        .nfa_size_limit(Some(size));
    thompson::Compiler::new()
        .configure(config)
        .build_many_from_hir(expressions)
        .map_err(|error| error.to_string())
}

/// Returns all texts that an expression matches, or `None` if they cannot be listed within [`LITERALS`].
fn texts_of(expression: &Hir) -> Option<Vec<Box<[u8]>>> {
    // An expression with assertions (`^`, `\b`) depends on the surrounding text.
    if !expression.properties().look_set().is_empty() {
        return None;
    }
    let texts = literal::Extractor::new()
        .limit_total(LITERALS)
        .limit_literal_len(4096)
        .extract(expression);
    if !texts.is_exact() {
        return None;
    }
    let texts = texts.literals()?;
    Some(texts.iter().map(|text| text.as_bytes().into()).collect())
}

/// Cuts the suffix `.*` off an expression if the part before the suffix matches only a few texts, so that its matches
/// end at only a few positions.
fn split(expression: Hir) -> (Hir, Rest) {
    let HirKind::Concat(parts) = expression.kind() else {
        return (expression, Rest::None);
    };
    let [first @ .., last] = &parts[..] else {
        return (expression, Rest::None);
    };
    let rest = match last.kind() {
        HirKind::Repetition(repetition) if repetition.min == 0 && repetition.max.is_none() => {
            if *repetition.sub == Hir::dot(Dot::AnyCharExceptLF) {
                Rest::Line
            } else if *repetition.sub == Hir::dot(Dot::AnyChar) {
                Rest::Text
            } else {
                Rest::None
            }
        }
        _ => Rest::None,
    };
    if rest != Rest::None {
        let first = Hir::concat(first.to_vec());
        if texts_of(&first).is_some() {
            return (first, rest);
        }
    }
    (expression, Rest::None)
}

/// Numbers different texts in the order of their first use.
#[derive(Debug, Default)]
pub(super) struct Numbered<'a> {
    known: BTreeMap<&'a str, u32>,
    pub(super) texts: Vec<&'a str>,
    /// Number of uses of each text.
    pub(super) uses: Vec<u32>,
}

impl<'a> Numbered<'a> {
    pub(super) fn number(&mut self, text: &'a str) -> u32 {
        let next = self.texts.len() as u32;
        let number = *self.known.entry(text).or_insert(next);
        match self.uses.get_mut(number as usize) {
            Some(uses) => *uses += 1,
            None => {
                self.texts.push(text);
                self.uses.push(1);
            }
        }
        number
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn patterns(expressions: &[&str]) -> Patterns {
        Patterns::new(expressions.iter().copied(), |expression, error| {
            panic!("{expression}: {error}")
        })
    }

    fn matching(patterns: &Patterns, text: &str) -> Vec<u32> {
        let mut out = vec![7];
        patterns.matching(text.as_bytes(), &mut DfaCache::default(), &mut out);
        out
    }

    #[test]
    fn an_expression_for_a_few_texts_is_looked_up() {
        let some = patterns(&["GET|HEAD", "/healthz", "", "a(b|c)?", "GET"]);
        assert!(some.automaton.is_none());
        assert_eq!(matching(&some, "GET"), [0, 4]);
        assert_eq!(matching(&some, "HEAD"), [0]);
        assert_eq!(matching(&some, ""), [2]);
        assert_eq!(matching(&some, "ac"), [3]);
        assert_eq!(matching(&some, "HEA"), [0_u32; 0]);
        for expression in [r"a\b", "^a", "(?m)a$", "a*", "[a-z]b", "a{3,}"] {
            assert!(patterns(&[expression]).automaton.is_some(), "{expression}");
        }
    }

    #[test]
    fn all_expressions_that_match_are_returned_in_order() {
        let some = patterns(&["/a/.*", "/a/b", ".*", "/b/.*", "/a/[a-c]", "^/a/b$", "/a"]);
        assert_eq!(matching(&some, "/a/b"), [0, 1, 2, 4, 5]);
        assert_eq!(matching(&some, "/b/"), [2, 3]);
        assert_eq!(matching(&some, "/a/b\n"), [0_u32; 0], "a dot is no line feed");
    }

    #[test]
    fn a_suffix_that_matches_everything_is_not_compiled() {
        let some = patterns(&[
            "/a/.*",
            "(?s)/a/.*",
            "(/a|/a/b).*",
            "/a/[^x]",
            "(?s:/a.*)",
            "/a/.*?",
        ]);
        let automaton = some.automaton.as_ref().unwrap();
        let rests: Vec<Rest> = automaton.parts.iter().map(|part| part.rest).collect();
        use Rest::{Line, None, Text};
        assert_eq!(rests, [Line, Text, Line, None, Text, Line]);
        assert_eq!(matching(&some, "/a/b"), [0, 1, 2, 3, 4, 5]);
        assert_eq!(matching(&some, "/a/"), [0, 1, 2, 4, 5]);
        assert_eq!(matching(&some, "/a/\n"), [1, 3, 4]);
        assert_eq!(matching(&some, "/a/bc\n"), [1, 4]);
        let mut out = Vec::new();
        some.matching(b"/a/\xc0\xae", &mut DfaCache::default(), &mut out);
        assert_eq!(out, [0_u32; 0], "invalid UTF-8 matches no dot");
    }

    #[test]
    fn an_expression_that_is_invalid_or_too_large_is_reported_and_matches_nothing() {
        let mut problems = Vec::new();
        let expressions = ["(", "/a.*", "(((a{1000}){1000}){1000})"];
        let some = Patterns::new(expressions, |expression, _| problems.push(expression.to_owned()));
        assert_eq!(problems, [expressions[0], expressions[2]]);
        assert_eq!(matching(&some, "/ab"), [1]);
        assert_eq!(matching(&some, "("), [0_u32; 0]);

        // Each expression is within its limit, all together are not.
        let large: Vec<String> = (0..80)
            .map(|n| format!("/{n}/(abcdefghijklmnopqrstu[0-9]*){{1000}}"))
            .collect();
        let mut problems = 0;
        let some = Patterns::new(large.iter().map(String::as_str), |_, _| problems += 1);
        assert!((1..80).contains(&problems), "{problems}");
        assert_eq!(
            matching(&some, &format!("/0/{}", "abcdefghijklmnopqrstu1".repeat(1000))),
            [0]
        );
    }

    #[test]
    fn the_dfa_cache_is_bounded() {
        let some = patterns(&["(.*[ab].{14}c)", "/x.*"]);
        let mut cache = DfaCache::default();
        let mut out = Vec::new();
        let mut seed = 1_u32;
        for _ in 0..300 {
            let text: Vec<u8> = (0..400)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    b"abcd"[(seed >> 30) as usize]
                })
                .collect();
            some.matching(&text, &mut cache, &mut out);
            let wanted = text.len() >= 16 && text.ends_with(b"c") && b"ab".contains(&text[text.len() - 16]);
            assert_eq!(!out.is_empty(), wanted);
        }
        let cache = cache.0.unwrap();
        assert!(
            cache.memory_usage() <= CACHE + (1 << 20),
            "{}",
            cache.memory_usage()
        );
    }

    proptest! {
        #[test]
        fn each_expression_matches_as_it_does_alone(
            expressions in prop::collection::vec(expression(), 1..8),
            texts in prop::collection::vec("[ab/A.é\n]{0,6}", 1..8),
        ) {
            let alone: Vec<_> = expressions.iter().filter_map(|e| Some((e.as_str(), re2::compile(e).ok()?))).collect();
            let fit: Vec<&str> = alone.iter().map(|(expression, _)| *expression).collect();
            let together = patterns(&fit);
            let mut cache = DfaCache::default();
            let mut out = Vec::new();
            for text in &texts {
                together.matching(text.as_bytes(), &mut cache, &mut out);
                let wanted: Vec<u32> = (0..)
                    .zip(&alone)
                    .filter(|(_, (_, regex))| regex.is_match(text.as_bytes()))
                    .map(|(number, _)| number)
                    .collect();
                prop_assert_eq!(&out, &wanted, "{:?} in {:?}", text, fit);
            }
        }
    }

    fn expression() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            "[ab/]{1,3}",
            Just(".".to_owned()),
            Just("^".to_owned()),
            Just("$".to_owned()),
            Just(r"\b".to_owned()),
            Just("[^a]".to_owned()),
            Just("(?s:.)".to_owned()),
            Just("(?i:a)".to_owned()),
            Just(r"\.".to_owned()),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 2..4).prop_map(|parts| parts.concat()),
                prop::collection::vec(inner.clone(), 2..4).prop_map(|parts| format!("({})", parts.join("|"))),
                (inner.clone(), "[*+?]|\\{1,2\\}").prop_map(|(part, times)| format!("({part}){times}")),
                (inner.clone(), "[.][*][?]?").prop_map(|(part, rest)| part + &rest),
                inner.prop_map(|part| format!("(?s:{part}.*)")),
            ]
        })
    }
}
