//! Regular expressions of HTTP rules.
//!
//! Cilium's HTTP rules have the syntax of RE2. The `regex` crate has nearly the same syntax, but gives some parts a
//! different meaning, so this module translates the expressions. In RE2, classes such as `\d` are ASCII, `&&` and `[`
//! have no special meaning within a class, `\<` is `<`, a `{` that begins no repetition is a literal, and a repetition
//! of a repetition is an error.

use regex::bytes::{Regex, RegexBuilder};
use regex_syntax::{
    ParserBuilder,
    hir::{Class, Hir, HirKind},
};

/// Maximum size of a compiled expression, bytes.
const SIZE_LIMIT: usize = 1 << 20;
/// Maximum count of a counted repetition, as in RE2.
const MAX_REPEAT: u32 = 1000;

/// Maximum length of an expression, bytes. The time to parse an expression can grow with the square of its length.
const MAX_LENGTH: usize = 8 << 10;
/// Maximum cost of one expression, see [`cost`].
pub const MAX_COST: usize = 40_000;

/// Estimates the cost of parsing an expression, in the unit of [`cost`], without parsing it. Unicode classes cost most,
/// and `(?i)` multiplies the cost.
fn cost_of_reading(pattern: &str) -> usize {
    let folds = pattern.contains("(?") && pattern.contains('i');
    let classes = pattern.matches(r"\p").count() + pattern.matches(r"\P").count();
    let cost = pattern.len() / 8 + pattern.matches('[').count() * 8 + classes * 64;
    cost * if folds { 8 } else { 1 }
}

/// Returns the cost to parse, compile and match an expression. The unit is one state of its automaton. Estimates the
/// cost without compiling, because compiling `\pL{1000}` takes milliseconds and megabytes.
///
/// # Errors
/// The expression is not valid RE2 syntax, or its cost exceeds [`MAX_COST`]. The error is a text for the operator.
pub fn cost(pattern: &str) -> Result<usize, String> {
    if pattern.len() > MAX_LENGTH {
        return Err(format!("it is longer than {MAX_LENGTH} bytes"));
    }
    let reading = cost_of_reading(pattern);
    let too_much = |cost: usize| {
        format!(
            "it is too large: it needs about {cost} states, of at most {MAX_COST}; repeat less, or smaller classes"
        )
    };
    if reading > MAX_COST {
        return Err(too_much(reading));
    }
    let translated = translate(pattern)?;
    let hir = ParserBuilder::new()
        .utf8(false)
        .build()
        .parse(&translated)
        .map_err(|error| last_line(&error.to_string()))?;
    let cost = reading.saturating_add(states(&hir));
    if cost > MAX_COST {
        Err(too_much(cost))
    } else {
        Ok(cost)
    }
}

/// Returns the approximate number of states of an expression. The recursion is as deep as the groups are nested, which
/// the parser limits.
fn states(hir: &Hir) -> usize {
    match hir.kind() {
        HirKind::Empty | HirKind::Look(_) => 1,
        HirKind::Literal(literal) => literal.0.len(),
        // A range of characters compiles to several ranges of byte sequences.
        HirKind::Class(Class::Unicode(class)) => class.ranges().len() * 2,
        HirKind::Class(Class::Bytes(class)) => class.ranges().len(),
        HirKind::Repetition(repetition) => {
            let times = repetition.max.unwrap_or(repetition.min.saturating_add(1)).max(1);
            states(&repetition.sub)
                .saturating_add(1)
                .saturating_mul(times as usize)
        }
        HirKind::Capture(capture) => states(&capture.sub).saturating_add(2),
        HirKind::Concat(parts) | HirKind::Alternation(parts) => parts.iter().fold(1, |sum: usize, part| {
            sum.saturating_add(states(part)).saturating_add(1)
        }),
    }
}

/// Returns the last line of an error text of the `regex` crate; that line states the reason.
fn last_line(error: &str) -> String {
    let last = error.lines().last().unwrap_or_default();
    last.trim_start_matches("error: ").trim().to_owned()
}

/// Translates an expression into the syntax of the `regex` crate.
///
/// # Errors
/// The expression is not valid RE2 syntax. The error is a text for the operator.
pub fn translate(pattern: &str) -> Result<String, String> {
    Translator::new(pattern).translate()
}

/// Compiles an expression that must match the whole text.
///
/// # Errors
/// The expression is not valid RE2 syntax, or its compiled form is too large. The error is a text for the operator.
pub fn compile(pattern: &str) -> Result<Regex, String> {
    let translated = translate(pattern)?;
    RegexBuilder::new(&format!(r"\A(?:{translated})\z"))
        .size_limit(SIZE_LIMIT)
        .build()
        .map_err(|error| match error {
            regex::Error::CompiledTooBig(_) => "it is too large".to_owned(),
            error => last_line(&error.to_string()),
        })
}

/// Whether the item before the current position is a repetition.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    /// The item is not a repetition, so it may be repeated.
    Other,
    /// The item is a repetition; a `?` makes it lazy.
    Repetition,
    /// The item is a lazy repetition.
    Lazy,
}

struct Translator<'p> {
    rest: &'p str,
    out: String,
    depth: usize,
    before: Before,
}

impl<'p> Translator<'p> {
    fn new(pattern: &'p str) -> Self {
        Self {
            rest: pattern,
            out: String::with_capacity(pattern.len()),
            depth: 0,
            before: Before::Other,
        }
    }

    fn next(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let next = chars.next();
        self.rest = chars.as_str();
        next
    }

    fn translate(mut self) -> Result<String, String> {
        while let Some(character) = self.next() {
            let repeats = match character {
                '*' | '+' | '?' => {
                    self.repetition(character)?;
                    true
                }
                '{' => self.counted_repetition()?,
                _ => false,
            };
            if repeats {
                continue;
            }
            self.before = Before::Other;
            match character {
                '\\' => self.escape()?,
                '[' => self.class()?,
                '(' => self.group()?,
                ')' => {
                    self.depth = self.depth.checked_sub(1).ok_or("a \")\" without its \"(\"")?;
                    self.out.push(')');
                }
                '{' | '}' | ']' => self.out.extend(['\\', character]),
                other => self.out.push(other),
            }
        }
        if self.depth > 0 {
            return Err("a \"(\" without its \")\"".into());
        }
        Ok(self.out)
    }

    fn repetition(&mut self, operator: char) -> Result<(), String> {
        self.before = match (self.before, operator) {
            (Before::Other, _) => Before::Repetition,
            (Before::Repetition, '?') => Before::Lazy,
            _ => return Err(format!("\"{operator}\" repeats a repetition")),
        };
        self.out.push(operator);
        Ok(())
    }

    /// Translates the rest of `{n}`, `{n,}` or `{n,m}` after the opening brace. Returns false if that brace is a
    /// literal.
    fn counted_repetition(&mut self) -> Result<bool, String> {
        let Some((inside, rest)) = self.rest.split_once('}') else {
            return Ok(false);
        };
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let (least, most) = inside.split_once(',').unwrap_or((inside, ""));
        if !digits(least) || !(most.is_empty() || digits(most)) {
            return Ok(false);
        }
        let too_many = |text: &str| !text.is_empty() && text.parse().map_or(true, |n: u32| n > MAX_REPEAT);
        if too_many(least) || too_many(most) {
            return Err(format!("more than {MAX_REPEAT} repetitions"));
        }
        if self.before != Before::Other {
            return Err("\"{\" repeats a repetition".into());
        }
        self.before = Before::Repetition;
        self.out.push('{');
        self.out.push_str(inside);
        self.out.push('}');
        self.rest = rest;
        Ok(true)
    }

    fn escape(&mut self) -> Result<(), String> {
        match self.next() {
            None => return Err("a \"\\\" at the end".into()),
            Some('Q') => {
                let (literal, rest) = self.rest.split_once(r"\E").unwrap_or((self.rest, ""));
                self.out.push_str(&regex::escape(literal));
                self.rest = rest;
            }
            Some(class) if ascii_class(class).is_some() => {
                self.out.push_str(ascii_class(class).unwrap_or_default());
            }
            Some(boundary @ ('b' | 'B')) => self.out.push_str(&format!(r"(?-u:\{boundary})")),
            Some(letter @ ('C' | 'E' | 'u' | 'U')) => return Err(format!("unknown escape \"\\{letter}\"")),
            Some(letter) if letter.is_ascii_alphanumeric() => self.out.extend(['\\', letter]),
            Some(other) => self.out.push_str(&regex::escape(other.encode_utf8(&mut [0; 4]))),
        }
        Ok(())
    }

    fn group(&mut self) -> Result<(), String> {
        self.depth += 1;
        self.out.push('(');
        let Some(rest) = self.rest.strip_prefix('?') else {
            return Ok(());
        };
        if rest.starts_with("P<")
            || rest.starts_with('<') && !rest.starts_with("<=") && !rest.starts_with("<!")
        {
            self.out.push('?');
            self.rest = rest;
            return Ok(());
        }
        let end = rest
            .find(|c: char| !matches!(c, 'i' | 'm' | 's' | 'U' | '-'))
            .unwrap_or(rest.len());
        let (flags, rest) = rest.split_at(end);
        match rest.chars().next() {
            Some(close @ (':' | ')')) if close == ':' || !flags.is_empty() => {
                self.out.push('?');
                self.out.push_str(flags);
                self.out.push(close);
                self.depth -= usize::from(close == ')');
                self.rest = rest.get(1..).unwrap_or_default();
                Ok(())
            }
            _ => Err("unknown group \"(?\"; look-around is not part of RE2".into()),
        }
    }

    fn class(&mut self) -> Result<(), String> {
        const OPEN: &str = "a \"[\" without its \"]\"";
        self.out.push('[');
        if let Some(rest) = self.rest.strip_prefix('^') {
            self.out.push('^');
            self.rest = rest;
        }
        // At the start of a class, "]" and "-" are literals.
        let mut start = true;
        let mut after_hyphen = false;
        loop {
            let character = self.next().ok_or(OPEN)?;
            let hyphen = character == '-' && !start && !after_hyphen;
            match character {
                ']' if !start => break,
                '[' => match self.rest.strip_prefix(':').and_then(|rest| rest.split_once(":]")) {
                    Some((name, rest)) => {
                        self.out.push_str(&format!("[:{name}:]"));
                        self.rest = rest;
                    }
                    None => self.out.push_str(r"\["),
                },
                '\\' => match self.next().ok_or(OPEN)? {
                    class if ascii_class(class).is_some() => {
                        self.out.push_str(ascii_class(class).unwrap_or_default());
                    }
                    other => self.out.extend(['\\', other]),
                },
                '-' if hyphen => self.out.push('-'),
                ']' | '-' | '&' | '~' => self.out.extend(['\\', character]),
                other => self.out.push(other),
            }
            after_hyphen = hyphen;
            start = false;
        }
        self.out.push(']');
        Ok(())
    }
}

/// Returns the ASCII class of an escape; `None` if the escape is not a class.
fn ascii_class(letter: char) -> Option<&'static str> {
    Some(match letter {
        'd' => "[0-9]",
        'D' => "[^0-9]",
        's' => r"[\t\n\f\r ]",
        'S' => r"[^\t\n\f\r ]",
        'w' => "[0-9A-Za-z_]",
        'W' => "[^0-9A-Za-z_]",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn matches(pattern: &str, text: &str) -> bool {
        compile(pattern)
            .unwrap_or_else(|error| panic!("{pattern}: {error}"))
            .is_match(text.as_bytes())
    }

    #[test]
    fn an_expression_must_match_the_whole_text() {
        assert!(matches("/api/.*", "/api/x?y=1"));
        assert!(!matches("/api", "/api/x"));
        assert!(!matches("GET|HEAD", "GETS"));
        assert!(matches("GET|HEAD", "HEAD"));
    }

    #[test]
    fn syntax_that_differs_from_rusts_has_the_meaning_of_re2() {
        assert!(!matches(r"\d", "٣"), "digits are ASCII");
        assert!(matches(r"[\d]", "3") && matches(r"[^\D]", "3"));
        assert!(matches("[a&&b]+", "a&b") && !matches("[a&&b]", "c"));
        assert!(matches("[[a]+", "[a") && matches("[]a]+", "]a"));
        assert!(matches("[--/]+", "./-"));
        assert!(matches(r"\<a\>", "<a>"));
        assert!(matches("/{id}", "/{id}") && matches("a{2}", "aa") && matches("a{,2}", "a{,2}"));
        assert!(matches(r"\Q/a.b*\E+", "/a.b*"));
        assert!(matches(r"(?i)get", "GET") && matches(r"(?P<n>a)(?:b)", "ab"));
        assert!(matches(r"a\b.*", "a b"));
        assert!(matches("[[:alpha:]-]+", "a-b"));
        assert!(matches("a*?", "aa"));
    }

    #[test]
    fn invalid_expressions_have_specific_errors() {
        for (pattern, message) in [
            ("*", "missing expression"),
            ("a**", "repeats a repetition"),
            ("a*+", "repeats a repetition"),
            ("a{2}{3}", "repeats a repetition"),
            ("a{1001}", "more than 1000 repetitions"),
            ("(", "without its"),
            ("a)(b", "without its"),
            ("[a", "without its"),
            ("[a--]", "invalid character class range"),
            ("(?=a)", "look-around"),
            ("(?<=a)", "look-around"),
            ("(?x)a", "look-around"),
            (r"a\", "at the end"),
            (r"\C", "unknown escape"),
            (r"\1", "backreferences"),
            ("(((a{1000}){1000}){1000})", "too large"),
        ] {
            let error = compile(pattern).expect_err(pattern);
            assert!(error.contains(message), "{pattern}: {error}");
        }
    }
}
