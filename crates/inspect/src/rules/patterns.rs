//! Regular expressions that are matched together, each against the whole of a text.

use std::collections::{BTreeMap, HashMap};

use palisade_policy::parse::http_pattern;
use regex_automata::{
    Anchored, Input, MatchKind,
    hybrid::dfa::{Cache, DFA},
    nfa::thompson::{self, NFA, WhichCaptures},
};
use regex_syntax::{
    ParserBuilder,
    hir::{Hir, Look, literal},
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
    /// Which expression each of its patterns is.
    numbers: Vec<u32>,
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
        let mut numbers = Vec::new();
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
            // Alone first, to know what it takes.
            let whole = Hir::concat(vec![Hir::look(Look::Start), parsed, Hir::look(Look::End)]);
            match compile(std::slice::from_ref(&whole), ONE) {
                Ok(alone) if size + alone.memory_usage() <= TOGETHER => {
                    size += alone.memory_usage();
                    run.push(whole);
                    numbers.push(number);
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
            Ok(dfa) => patterns.automaton = Some(Automaton { dfa, numbers }),
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
        }
    }
}

impl Automaton {
    fn run(&self, text: &[u8], cache: &mut Cache, out: &mut Vec<u32>) -> Option<()> {
        let dfa = &self.dfa;
        let input = Input::new(text).anchored(Anchored::Yes);
        let mut state = dfa.start_state_forward(cache, &input).ok()?;
        for &byte in text {
            state = dfa.next_state(cache, state, byte).ok()?;
            if state.is_tagged() && (state.is_dead() || state.is_quit()) {
                return None;
            }
        }
        // Each of them is bound to both ends: what matches is known at the end, and only there.
        state = dfa.next_eoi_state(cache, state).ok()?;
        if state.is_match() {
            for index in 0..dfa.match_len(cache, state) {
                out.push(
                    *self
                        .numbers
                        .get(dfa.match_pattern(cache, state, index).as_usize())?,
                );
            }
        }
        Some(())
    }
}

fn parse(expression: &str) -> Result<Hir, String> {
    let translated = http_pattern(expression)?;
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
        if number == next {
            self.texts.push(text);
            self.uses.push(0);
        }
        self.uses[number as usize] += 1;
        number
    }
}

#[cfg(test)]
mod tests {
    use palisade_policy::parse::http_regex;
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
            texts in prop::collection::vec("[ab/A.\n]{0,6}", 1..8),
        ) {
            let alone: Vec<_> = expressions.iter().filter_map(|e| Some((e.as_str(), http_regex(e).ok()?))).collect();
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
            Just("(?i:a)".to_owned()),
            Just(r"\.".to_owned()),
        ];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 2..4).prop_map(|parts| parts.concat()),
                prop::collection::vec(inner.clone(), 2..4).prop_map(|parts| format!("({})", parts.join("|"))),
                (inner, "[*+?]|\\{1,2\\}").prop_map(|(part, times)| format!("({part}){times}")),
            ]
        })
    }
}
