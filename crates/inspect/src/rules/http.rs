//! HTTP rules, prepared for matching.

use std::sync::atomic::{AtomicU64, Ordering};

use palisade_model::{
    rule::{HttpRule, MismatchAction},
    snapshot::{Matcher, RuleSet},
};
use palisade_protocols::http1::{PathError, Request, resolved};

use super::patterns::{DfaCache, Numbered, Patterns};
use crate::Paths;

/// Maximum number of rule sets for which a worker keeps DFA caches.
const SETS_CACHED: usize = 16;

/// Requests that clients may make.
#[derive(Debug, Default)]
pub struct HttpRules {
    /// Unique number of these rules, by which a worker finds its DFA caches.
    id: u64,
    /// Alternatives that can match an HTTP request, in the order of the rule set.
    alternatives: Vec<Alternative>,
    /// Index of the first alternative that allows everything.
    everything: Option<u32>,
    path: Field,
    method: Field,
    host: Field,
    /// The expressions of `host`, compiled to ignore case.
    folded_host: Patterns,
    /// Indexes of the alternatives without an expression for path, host or method.
    bare: Vec<u32>,
}

/// Expressions for one part of a request.
#[derive(Debug, Default)]
struct Field {
    patterns: Patterns,
    /// For each expression, indexes of the alternatives that are checked only if the expression matches.
    leads: Vec<Vec<u32>>,
}

#[derive(Debug, Default)]
struct Alternative {
    rule: u32,
    /// Number of the expression in `HttpRules::path`. The next two fields are the numbers for method and host.
    path: Option<u32>,
    method: Option<u32>,
    host: Option<u32>,
    headers: Box<[HeaderTest]>,
    /// Whether the requests that the alternative allows may have a body even if their method usually has none.
    takes_bodies: bool,
}

#[derive(Debug)]
struct HeaderTest {
    name: Box<str>,
    wanted: Wanted,
    /// Whether a mismatch is only recorded.
    log: bool,
}

#[derive(Debug)]
enum Wanted {
    Present,
    Value(Box<[u8]>),
    /// A value from a Kubernetes secret, which is not available here.
    Unknown,
}

/// Buffers and DFA caches of one worker, kept from one request to the next.
#[derive(Debug, Default)]
pub struct HttpScratch {
    resolved: Vec<u8>,
    caches: Vec<SetCaches>,
    uses: u64,
    matched: Matched,
}

/// DFA caches of one rule set.
#[derive(Debug, Default)]
struct SetCaches {
    id: u64,
    /// Value of [`HttpScratch::uses`] at the last use.
    used: u64,
    path: DfaCache,
    method: DfaCache,
    host: DfaCache,
    folded_host: DfaCache,
}

/// Numbers of the expressions that match, in ascending order.
#[derive(Debug, Default)]
struct Matched {
    path: Vec<u32>,
    method: Vec<u32>,
    host: Vec<u32>,
    folded_host: Vec<u32>,
}

/// Verdict of an allowed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HttpVerdict {
    /// Number of the rule that allows the request.
    pub rule: u32,
    /// Whether a `headerMatches` entry with `mismatch: LOG` did not match.
    pub log: bool,
    /// False if the request has a body that its method usually does not have, and no rule permits that. A rule permits
    /// it if it allows the request and either names `Content-Length` or `Transfer-Encoding`, or allows every request.
    pub takes_bodies: bool,
}

/// Reason for which a request is denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpDenial {
    /// No rule allows the request.
    NoRule,
    /// The path cannot be resolved, and no rule allows the request without a path.
    Path(PathError),
}

impl HttpRules {
    /// Prepares the HTTP rules of a rule set. `problem` gets each expression that cannot be compiled, and the error.
    /// Such an expression matches nothing.
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
            // An alternative is found by its rarest expression, so that few alternatives are checked if many share an
            // expression.
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

    /// Returns the verdict on a request, with the rule of the first alternative that allows the request as sent. Unless
    /// `paths` is [`Paths::Raw`], the request must also be allowed with its resolved path.
    ///
    /// # Errors
    /// [`HttpDenial`] if the request is not allowed in every required form.
    pub fn evaluate(
        &self,
        request: &Request<'_>,
        paths: Paths,
        scratch: &mut HttpScratch,
    ) -> Result<HttpVerdict, HttpDenial> {
        let HttpScratch {
            resolved: other_path,
            caches,
            uses,
            matched,
        } = scratch;
        // Not reached: the caches are found or added.
        let Some(caches) = caches_of(self.id, caches, uses) else {
            return Err(HttpDenial::NoRule);
        };
        let sent = request.path.as_bytes();
        self.match_parts(request, caches, matched);
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
                    .matching(other_path, &mut caches.path, &mut matched.path);
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

    /// Matches the method, the host and the path as sent.
    fn match_parts(&self, request: &Request<'_>, caches: &mut SetCaches, matched: &mut Matched) {
        self.method
            .patterns
            .matching(request.method.as_bytes(), &mut caches.method, &mut matched.method);
        // A missing host or path matches no expression, not even one that matches the empty text.
        matched.host.clear();
        let host = request.host.as_bytes();
        if !host.is_empty() {
            self.host
                .patterns
                .matching(host, &mut caches.host, &mut matched.host);
            // Hosts are case-insensitive (RFC 9110, 4.2.3). An expression like `[^a].*` matches `A.test`, which the
            // server treats as `a.test`. So a host with upper-case letters must match case-insensitively too.
            if host.iter().any(u8::is_ascii_uppercase) && !matched.host.is_empty() {
                self.folded_host
                    .matching(host, &mut caches.folded_host, &mut matched.folded_host);
                let folded = &matched.folded_host;
                matched.host.retain(|number| folded.binary_search(number).is_ok());
            }
        }
        matched.path.clear();
        let path = request.path.as_bytes();
        if !path.is_empty() {
            self.path
                .patterns
                .matching(path, &mut caches.path, &mut matched.path);
        }
    }

    fn takes_bodies(&self, facts: &Facts<'_>, matched: &Matched) -> bool {
        self.alternatives
            .iter()
            .any(|alternative| alternative.takes_bodies && alternative.holds(facts, matched))
    }

    /// Returns the rule that allows every request.
    #[must_use]
    pub fn allow_all(&self) -> Option<u32> {
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

    /// Returns whether the alternative matches every path.
    fn ignores_paths(&self) -> bool {
        self.path.is_none() && !self.headers.iter().any(|test| &*test.name == ":path")
    }
}

impl HeaderTest {
    /// Returns whether the header has the wanted value. All fields with this name must have it, because a server can
    /// use any of them. For the same reason there must be no field with a different name that some servers treat as
    /// this name.
    fn holds(&self, facts: &Facts<'_>) -> bool {
        let is_wanted = |value: &[u8]| match &self.wanted {
            Wanted::Present => true,
            Wanted::Value(wanted) => value == &**wanted,
            Wanted::Unknown => false,
        };
        let alone = match &*self.name {
            ":method" => Some(facts.request.method.as_bytes()),
            ":path" => facts.path,
            // Envoy treats both names as one field. A host in the request target takes precedence (RFC 9112, 3.2.2).
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

/// A request with its path in the form that is matched.
struct Facts<'a> {
    request: &'a Request<'a>,
    /// Path; `None` if the request has no path or the path cannot be resolved.
    path: Option<&'a [u8]>,
}

impl<'a> Facts<'a> {
    fn host(&self) -> Option<&'a str> {
        Some(self.request.host).filter(|host| !host.is_empty())
    }
}

/// Returns whether the requests that a rule allows may have a body even if their method usually has none. They may if the
/// rule names a framing header, because such a rule is meant for requests with a body. They may also if the rule allows
/// every request, because a request smuggled in the body would be allowed anyway.
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
            // Kubernetes secrets are not available here. If the entry also has a value, that value is used instead.
            (Some(text), _) => value(text),
            (None, Some(_)) => Wanted::Unknown,
            (None, None) => Wanted::Present,
        },
        // The mismatch actions ADD, DELETE and REPLACE are treated as FAIL, the default: the engine never changes a
        // request.
        log: wanted.mismatch == MismatchAction::Log,
    });
    plain.chain(others).collect()
}

/// Returns the DFA caches of a rule set. Evicts those of the least recently used set if there are too many.
fn caches_of<'c>(id: u64, caches: &'c mut Vec<SetCaches>, uses: &mut u64) -> Option<&'c mut SetCaches> {
    *uses += 1;
    let known = caches.iter().position(|set| set.id == id);
    let index = known.unwrap_or_else(|| {
        let fresh = SetCaches {
            id,
            ..SetCaches::default()
        };
        if caches.len() < SETS_CACHED {
            caches.push(fresh);
            return caches.len() - 1;
        }
        let oldest = caches.iter_mut().enumerate().min_by_key(|(_, set)| set.used);
        oldest.map_or(0, |(index, oldest)| {
            *oldest = fresh;
            index
        })
    });
    let found = caches.get_mut(index)?;
    found.used = *uses;
    Some(found)
}
