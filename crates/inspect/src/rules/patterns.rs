//! Regular expressions that are matched together, each against the whole of a text.

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

/// What one expression may take once it is compiled, in bytes, as validation has it too.
const ONE: usize = 1 << 20;
/// What the expressions of one field of one rule set may take together.
const TOGETHER: usize = 32 << 20;
/// What a worker remembers of how texts run through the expressions of one field. Taken as it is needed, begun anew
/// when it is full.
const REMEMBERED: usize = 8 << 20;
/// Texts that an expression may stand for to be looked up instead of run.
const LITERALS: usize = 64;

/// Expressions, by the order in which they were given.
///
/// What stands for a few texts only (`GET|HEAD`, `/healthz`) is looked up. All others are one automaton: a text runs
/// through it once, however many they are.
#[derive(Debug, Default)]
pub(super) struct Patterns {
    exact: HashMap<Box<[u8]>, Vec<u32>>,
    automaton: Option<Automaton>,
}

#[derive(Debug)]
struct Automaton {
    dfa: DFA,
    /// What each of its patterns is.
    parts: Vec<Part>,
}

/// What the automaton reads of an expression.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// Which expression.
    number: u32,
    /// What may follow what it reads. The run ends early where nothing but this is left of the expressions; so do
    /// expressions like `/api/.*`, the most common ones, and as many of them as there may be take no more room.
    rest: Rest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// Nothing: the expression is read to its end.
    None,
    /// `.*`
    Line,
    /// `(?s:.*)`
    Text,
}

/// What a worker remembers of an automaton.
#[derive(Debug, Default)]
pub(super) struct Memory(Option<Cache>);

impl Patterns {
    /// Compiles expressions. Those that cannot be match nothing and are told.
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
            // Alone first, to know what it takes.
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
        // Together they take less than each alone: there is one way in, and most texts leave it early.
        let dfa = compile(&run, 2 * TOGETHER).and_then(|nfa| {
            let config = DFA::config()
                .match_kind(MatchKind::All)
                .cache_capacity(REMEMBERED)
                .skip_cache_capacity_check(true);
            DFA::builder()
                .configure(config)
                .build_from_nfa(nfa)
                .map_err(|error| error.to_string())
        });
        match dfa {
            Ok(dfa) => patterns.automaton = Some(Automaton { dfa, parts }),
            Err(error) => problem("(all expressions together)", error),
        }
        patterns
    }

    /// Writes the numbers of those that match the whole of `text` into `out`, in their order. `out` is cleared first.
    pub(super) fn matching(&self, text: &[u8], memory: &mut Memory, out: &mut Vec<u32>) {
        out.clear();
        if let Some(numbers) = self.exact.get(text) {
            out.extend_from_slice(numbers);
        }
        if let Some(automaton) = &self.automaton {
            let cache = memory.0.get_or_insert_with(|| automaton.dfa.create_cache());
            // It does not give up and there is no byte that it does not read; if it did, nothing would match.
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
            // The automaton is one byte late: what matches did so before this one. All that goes to the end of the
            // text is known only there.
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
    // As the `regex` crate reads it for texts of any bytes.
    let mut parser = ParserBuilder::new().utf8(false).build();
    parser.parse(&translated).map_err(|error| error.to_string())
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

/// The texts that an expression stands for, if they are few.
fn texts_of(expression: &Hir) -> Option<Vec<Box<[u8]>>> {
    // What depends on its surroundings is no text.
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

/// What has to be read of an expression, and what may follow. Only what stands for a few texts is split off: it can
/// match in a few places of a text at most.
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

/// Gives each different text a number, in the order in which they come.
#[derive(Debug, Default)]
pub(super) struct Numbered<'a> {
    known: BTreeMap<&'a str, u32>,
    pub(super) texts: Vec<&'a str>,
    /// How often each came.
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
        patterns.matching(text.as_bytes(), &mut Memory::default(), &mut out);
        out
    }

    #[test]
    fn what_stands_for_a_few_texts_is_looked_up() {
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
    fn all_that_match_the_whole_text_are_told_in_order() {
        let some = patterns(&["/a/.*", "/a/b", ".*", "/b/.*", "/a/[a-c]", "^/a/b$", "/a"]);
        assert_eq!(matching(&some, "/a/b"), [0, 1, 2, 4, 5]);
        assert_eq!(matching(&some, "/b/"), [2, 3]);
        assert_eq!(matching(&some, "/a/b\n"), [0_u32; 0], "a dot is no line feed");
    }

    #[test]
    fn whatever_may_follow_is_not_read() {
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
        some.matching(b"/a/\xc0\xae", &mut Memory::default(), &mut out);
        assert_eq!(out, [0_u32; 0], "what is no text matches nothing");
    }

    #[test]
    fn what_cannot_be_compiled_or_is_too_much_matches_nothing_and_is_told() {
        let mut told = Vec::new();
        let expressions = ["(", "/a.*", "(((a{1000}){1000}){1000})"];
        let some = Patterns::new(expressions, |expression, _| told.push(expression.to_owned()));
        assert_eq!(told, [expressions[0], expressions[2]]);
        assert_eq!(matching(&some, "/ab"), [1]);
        assert_eq!(matching(&some, "("), [0_u32; 0]);

        // Each is fit to be used, all together are not.
        let large: Vec<String> = (0..80)
            .map(|n| format!("/{n}/(abcdefghijklmnopqrstu[0-9]*){{1000}}"))
            .collect();
        let mut told = 0;
        let some = Patterns::new(large.iter().map(String::as_str), |_, _| told += 1);
        assert!((1..80).contains(&told), "{told}");
        assert_eq!(
            matching(&some, &format!("/0/{}", "abcdefghijklmnopqrstu1".repeat(1000))),
            [0]
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let some = patterns(&["(.*[ab].{14}c)", "/x.*"]);
        let mut memory = Memory::default();
        let mut out = Vec::new();
        let mut seed = 1_u32;
        for _ in 0..300 {
            let text: Vec<u8> = (0..400)
                .map(|_| {
                    seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    b"abcd"[(seed >> 30) as usize]
                })
                .collect();
            some.matching(&text, &mut memory, &mut out);
            let wanted = text.len() >= 16 && text.ends_with(b"c") && b"ab".contains(&text[text.len() - 16]);
            assert_eq!(!out.is_empty(), wanted);
        }
        let cache = memory.0.unwrap();
        assert!(
            cache.memory_usage() <= REMEMBERED + (1 << 20),
            "{}",
            cache.memory_usage()
        );
    }

    proptest! {
        #[test]
        fn each_matches_as_it_does_alone(
            expressions in prop::collection::vec(expression(), 1..8),
            texts in prop::collection::vec("[ab/A.é\n]{0,6}", 1..8),
        ) {
            let alone: Vec<_> = expressions.iter().filter_map(|e| Some((e.as_str(), re2::compile(e).ok()?))).collect();
            let fit: Vec<&str> = alone.iter().map(|(expression, _)| *expression).collect();
            let together = patterns(&fit);
            let mut memory = Memory::default();
            let mut out = Vec::new();
            for text in &texts {
                together.matching(text.as_bytes(), &mut memory, &mut out);
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
