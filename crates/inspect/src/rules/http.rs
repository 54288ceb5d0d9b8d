//! HTTP rules in the form that requests are judged by.

use std::sync::atomic::{AtomicU64, Ordering};

use palisade_model::{
    rule::{HttpRule, MismatchAction},
    snapshot::{Matcher, RuleSet},
};
use palisade_protocols::http1::{PathError, Request, resolved};

use super::patterns::{Memory, Numbered, Patterns};
use crate::Paths;

/// Rule sets of which a worker remembers how texts run through their expressions.
const SETS_REMEMBERED: usize = 16;

/// The requests that may be made.
#[derive(Debug, Default)]
pub struct HttpRules {
    /// Which rules these are: no others have the same number.
    id: u64,
    /// In the order of the rule set; only what may match an HTTP request.
    alternatives: Vec<Alternative>,
    /// The first alternative that lets everything pass.
    everything: Option<u32>,
    path: Field,
    method: Field,
    host: Field,
    /// The expressions for hosts once more, whatever the case of a letter.
    folded_host: Patterns,
    /// Alternatives without an expression.
    bare: Vec<u32>,
}

/// The expressions of a part of the request.
#[derive(Debug, Default)]
struct Field {
    patterns: Patterns,
    /// For each expression the alternatives that are looked at only if it matches, in their order.
    leads: Vec<Vec<u32>>,
}

#[derive(Debug, Default)]
struct Alternative {
    rule: u32,
    /// The number of each expression.
    path: Option<u32>,
    method: Option<u32>,
    host: Option<u32>,
    headers: Box<[HeaderTest]>,
    /// Requests that it allows may have a body whatever their method.
    takes_bodies: bool,
}

#[derive(Debug)]
struct HeaderTest {
    name: Box<str>,
    wanted: Wanted,
    /// A mismatch is reported, nothing else.
    log: bool,
}

#[derive(Debug)]
enum Wanted {
    Present,
    Value(Box<[u8]>),
    /// The value of a secret, which is not known.
    Unknown,
}

/// Memory that is used again from one request to the next. Of one worker.
#[derive(Debug, Default)]
pub struct HttpScratch {
    resolved: Vec<u8>,
    memories: Vec<OffloadVerdicts>,
    uses: u64,
    matched: Matched,
}

/// What is remembered of a rule set.
#[derive(Debug, Default)]
struct OffloadVerdicts {
    id: u64,
    used: u64,
    path: Memory,
    method: Memory,
    host: Memory,
    folded_host: Memory,
}

/// The numbers of the expressions that match, in their order.
#[derive(Debug, Default)]
struct Matched {
    path: Vec<u32>,
    method: Vec<u32>,
    host: Vec<u32>,
    folded_host: Vec<u32>,
}

/// How a request that may be made was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpVerdict {
    /// The rule that lets it pass.
    pub rule: u32,
    /// A headerMatches with mismatch LOG did not match.
    pub log: bool,
    /// The request may have a body whatever its method: a rule that allows the request names `Content-Length` or
    /// `Transfer-Encoding`, or allows every request.
    pub takes_bodies: bool,
}

/// Why a request may not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpDenial {
    /// No rule allows it.
    NoRule,
    /// Its path cannot be resolved, and only rules that look at paths would allow it.
    Path(PathError),
}

impl HttpRules {
    /// `problem` is told of each expression that cannot be compiled, and why. It matches nothing.
    pub(super) fn prepare(set: &RuleSet, mut problem: impl FnMut(&str, String)) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let mut rules = Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            ..Self::default()
        };
        let (mut paths, mut methods, mut hosts) =
            (Numbered::default(), Numbered::default(), Numbered::default());
        for alternative in &set.alternatives {
            let rule = alternative.rule;
            match &alternative.matcher {
                Matcher::Everything => {
                    rules.everything.get_or_insert(rules.alternatives.len() as u32);
                    rules.alternatives.push(Alternative {
                        rule,
                        takes_bodies: true,
                        ..Alternative::default()
                    });
                }
                Matcher::Http(http) => rules.alternatives.push(Alternative {
                    rule,
                    path: http.path.as_deref().map(|text| paths.number(text)),
                    method: http.method.as_deref().map(|text| methods.number(text)),
                    host: http.host.as_deref().map(|text| hosts.number(text)),
                    headers: header_tests(http),
                    takes_bodies: takes_bodies(http),
                }),
                _ => {}
            }
        }
        rules.path = Field::new(&paths.texts, &mut problem);
        rules.method = Field::new(&methods.texts, &mut problem);
        rules.host = Field::new(&hosts.texts, &mut problem);
        let folded: Vec<String> = hosts.texts.iter().map(|text| format!("(?i:{text})")).collect();
        rules.folded_host = Patterns::new(folded.iter().map(String::as_str), &mut problem);
        for (place, alternative) in rules.alternatives.iter().enumerate() {
            // By its rarest expression, so that few are looked at where many share one.
            let lead = [
                (alternative.path, &paths, &mut rules.path),
                (alternative.host, &hosts, &mut rules.host),
                (alternative.method, &methods, &mut rules.method),
            ]
            .into_iter()
            .filter_map(|(number, numbered, field)| {
                let number = number? as usize;
                Some((numbered.uses.get(number)?, field.leads.get_mut(number)?))
            })
            .min_by_key(|(uses, _)| *uses);
            let list = lead.map_or(&mut rules.bare, |(_, list)| list);
            list.push(place as u32);
        }
        rules
    }

    /// The rule that lets a request pass: that of the first alternative that matches.
    ///
    /// # Errors
    /// None does: the request is not to be made.
    pub fn judge(
        &self,
        request: &Request<'_>,
        paths: Paths,
        scratch: &mut HttpScratch,
    ) -> Result<HttpVerdict, HttpDenial> {
        let HttpScratch {
            resolved: other_path,
            memories,
            uses,
            matched,
        } = scratch;
        // Not reached: the caches are found or added.
        let Some(memories) = memories_of(self.id, memories, uses) else {
            return Err(HttpDenial::NoRule);
        };
        let facts = Facts { request, path: None };
        let host = facts.host().map_or(&b""[..], str::as_bytes);
        self.method.patterns.matching(
            request.method.as_bytes(),
            &mut memories.method,
            &mut matched.method,
        );
        // What is not there matches no expression, not even one that would match nothing at all.
        matched.host.clear();
        if !host.is_empty() {
            self.host
                .patterns
                .matching(host, &mut memories.host, &mut matched.host);
            // A server takes hosts in any case: no change of case may open a door that is otherwise closed.
            if host.iter().any(u8::is_ascii_uppercase) && !matched.host.is_empty() {
                self.folded_host
                    .matching(host, &mut memories.folded_host, &mut matched.folded_host);
                let folded = &matched.folded_host;
                matched.host.retain(|number| folded.binary_search(number).is_ok());
            }
        }
        matched.path.clear();
        let sent = request.path.as_bytes();
        if !sent.is_empty() {
            self.path
                .patterns
                .matching(sent, &mut memories.path, &mut matched.path);
        }
        let facts = Facts {
            request,
            path: (!sent.is_empty()).then_some(sent),
        };
        let found = self.first(&facts, matched).ok_or(HttpDenial::NoRule)?;
        let log = found.headers.iter().any(|test| test.log && !test.holds(&facts));
        let bodies = request.has_unexpected_body();
        let mut verdict = HttpVerdict {
            rule: found.rule,
            log,
            takes_bodies: !bodies || self.takes_bodies(&facts, matched),
        };
        if paths == Paths::Raw || found.ignores_paths() {
            return Ok(verdict);
        }
        match resolved(request.path, other_path) {
            Ok(()) if other_path == sent => Ok(verdict),
            Ok(()) => {
                self.path
                    .patterns
                    .matching(other_path, &mut memories.path, &mut matched.path);
                let facts = Facts {
                    request,
                    path: (!other_path.is_empty()).then_some(other_path),
                };
                self.first(&facts, matched).ok_or(HttpDenial::NoRule)?;
                verdict.takes_bodies &= !bodies || self.takes_bodies(&facts, matched);
                Ok(verdict)
            }
            Err(error) => {
                matched.path.clear();
                let facts = Facts { request, path: None };
                self.first(&facts, matched).ok_or(HttpDenial::Path(error))?;
                verdict.takes_bodies &= !bodies || self.takes_bodies(&facts, matched);
                Ok(verdict)
            }
        }
    }

    fn takes_bodies(&self, facts: &Facts<'_>, matched: &Matched) -> bool {
        self.alternatives
            .iter()
            .any(|alternative| alternative.takes_bodies && alternative.holds(facts, matched))
    }

    /// The rule that lets every request pass, whatever it says.
    #[must_use]
    pub fn anyone(&self) -> Option<u32> {
        let place = self.everything?;
        self.alternatives
            .get(place as usize)
            .map(|alternative| alternative.rule)
    }

    fn first(&self, facts: &Facts<'_>, matched: &Matched) -> Option<&Alternative> {
        let mut first: Option<u32> = None;
        let mut look = |places: &[u32]| {
            for &place in places {
                if first.is_some_and(|first| first <= place) {
                    break;
                }
                let Some(alternative) = self.alternatives.get(place as usize) else {
                    break;
                };
                if alternative.holds(facts, matched) {
                    first = Some(place);
                    break;
                }
            }
        };
        look(&self.bare);
        for (field, numbers) in [
            (&self.path, &matched.path),
            (&self.host, &matched.host),
            (&self.method, &matched.method),
        ] {
            for &number in numbers {
                look(field.leads.get(number as usize).map_or(&[], Vec::as_slice));
            }
        }
        self.alternatives.get(first? as usize)
    }
}

impl Field {
    fn new(texts: &[&str], problem: impl FnMut(&str, String)) -> Self {
        Self {
            patterns: Patterns::new(texts.iter().copied(), problem),
            leads: vec![Vec::new(); texts.len()],
        }
    }
}

impl Alternative {
    fn holds(&self, facts: &Facts<'_>, matched: &Matched) -> bool {
        let among = |number: Option<u32>, numbers: &[u32]| {
            number.is_none_or(|number| numbers.binary_search(&number).is_ok())
        };
        among(self.path, &matched.path)
            && among(self.method, &matched.method)
            && among(self.host, &matched.host)
            && self.headers.iter().all(|test| test.log || test.holds(facts))
    }

    /// Whether it says the same of every path.
    fn ignores_paths(&self) -> bool {
        self.path.is_none() && !self.headers.iter().any(|test| &*test.name == ":path")
    }
}

impl HeaderTest {
    /// Every value has to be the one that is wanted, else a server may use another than the one that was judged. For the
    /// same reason no other field may be one that some servers take for it.
    fn holds(&self, facts: &Facts<'_>) -> bool {
        let is_wanted = |value: &[u8]| match &self.wanted {
            Wanted::Present => true,
            Wanted::Value(wanted) => value == &**wanted,
            Wanted::Unknown => false,
        };
        let alone = match &*self.name {
            ":method" => Some(facts.request.method.as_bytes()),
            ":path" => facts.path,
            // As proxies have it: one field under two names, and the target's own host is what counts.
            ":authority" | "host" => facts.host().map(str::as_bytes),
            name if name.starts_with(':') => None,
            name => {
                let mut values = facts.request.headers.values(name).peekable();
                return values.peek().is_some()
                    && values.all(is_wanted)
                    && !facts.request.headers.is_doubtful(name);
            }
        };
        alone.is_some_and(is_wanted)
    }
}

/// What a request says, with the path in the form that is judged.
struct Facts<'a> {
    request: &'a Request<'a>,
    /// None if there is none or none is known.
    path: Option<&'a [u8]>,
}

impl<'a> Facts<'a> {
    fn host(&self) -> Option<&'a str> {
        Some(self.request.host).filter(|host| !host.is_empty())
    }
}

/// A rule that names a header of the framing is about requests with a body; behind one that allows every request,
/// nothing can be hidden in a body that is not allowed by itself.
fn takes_bodies(rule: &HttpRule) -> bool {
    let mut names = rule
        .headers
        .iter()
        .map(|(name, _)| name)
        .chain(rule.header_matches.iter().map(|wanted| &wanted.name));
    *rule == HttpRule::default()
        || names.any(|name| {
            ["content-length", "transfer-encoding"]
                .iter()
                .any(|framing| name.eq_ignore_ascii_case(framing))
        })
}

fn header_tests(rule: &HttpRule) -> Box<[HeaderTest]> {
    let value = |text: &str| Wanted::Value(text.as_bytes().into());
    let plain = rule.headers.iter().map(|(name, wanted)| HeaderTest {
        name: name.to_ascii_lowercase().into(),
        wanted: wanted.as_deref().map_or(Wanted::Present, value),
        log: false,
    });
    let others = rule.header_matches.iter().map(|wanted| HeaderTest {
        name: wanted.name.to_ascii_lowercase().into(),
        wanted: match (&wanted.value, &wanted.secret) {
            // Beside a secret, it is what counts as long as the secret cannot be read.
            (Some(text), _) => value(text),
            (None, Some(_)) => Wanted::Unknown,
            (None, None) => Wanted::Present,
        },
        // What would change the request cannot be done: then it does not match.
        log: wanted.mismatch == MismatchAction::Log,
    });
    plain.chain(others).collect()
}

/// Returns the DFA caches of a rule set. Evicts those of the least recently used set if there are too many.
fn memories_of<'m>(
    id: u64,
    memories: &'m mut Vec<OffloadVerdicts>,
    uses: &mut u64,
) -> Option<&'m mut OffloadVerdicts> {
    *uses += 1;
    let known = memories.iter().position(|memory| memory.id == id);
    let index = known.unwrap_or_else(|| {
        let fresh = OffloadVerdicts {
            id,
            ..OffloadVerdicts::default()
        };
        if memories.len() < SETS_REMEMBERED {
            memories.push(fresh);
            return memories.len() - 1;
        }
        let oldest = memories
            .iter_mut()
            .enumerate()
            .min_by_key(|(_, memory)| memory.used);
        oldest.map_or(0, |(index, oldest)| {
            *oldest = fresh;
            index
        })
    });
    let found = memories.get_mut(index)?;
    found.used = *uses;
    Some(found)
}
