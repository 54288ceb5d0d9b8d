//! HTTP rules, prepared for matching.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use palisade_abi::Reason;
use palisade_model::{
    rule::{HeaderMatch, HttpRule, MismatchAction, is_editable_header, is_header_value},
    secret_value::SecretValue,
    snapshot::{Matcher, RuleSet},
};
use palisade_protocols::http1::{PathError, Request, TrailerNames, resolved};

use super::patterns::{DfaCache, Numbered, Patterns};
use crate::{
    Paths,
    record::About,
    steps::{self, Detail},
};

/// Number of alternatives that the debug log explains for one request.
const EXPLAINED: usize = 8;

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
    /// Names of the headers that the alternatives read or change.
    trailer_names: TrailerNames,
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
    mismatch: Mismatch,
}

#[derive(Debug)]
enum Wanted {
    Present,
    Value(SecretValue),
    /// The value of a secret that is missing, or a value that no header can have.
    Unknown,
}

/// What happens if a header does not have the wanted value.
#[derive(Debug)]
enum Mismatch {
    /// The alternative does not match.
    Fail,
    /// The alternative matches; the mismatch is recorded.
    Log,
    /// The alternative matches; the mismatch is recorded and the request is changed.
    Edit(HeaderEdit),
}

/// A change of a request by the rule that allows it. Names are in lower case, as HTTP/2 requires (RFC 9113, section
/// 8.2.1). `Debug` prints no values, because they can come from secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HeaderEdit {
    /// Append a field.
    Add(Arc<str>, SecretValue),
    /// Remove all fields of the name.
    Remove(Arc<str>),
    /// Remove all fields of the name, and append one.
    Set(Arc<str>, SecretValue),
}

/// Buffers and DFA caches of one worker, kept from one request to the next.
#[derive(Debug, Default)]
pub struct HttpScratch {
    resolved: Vec<u8>,
    caches: Vec<SetCaches>,
    uses: u64,
    matched: Matched,
    edits: Vec<HeaderEdit>,
}

impl HttpScratch {
    /// Returns the changes that the rule requires which allowed the last evaluated request, in their order; an empty
    /// slice if the request was denied. If different rules allow the two forms of the path, both change the request.
    #[must_use]
    pub fn edits(&self) -> &[HeaderEdit] {
        &self.edits
    }
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
    /// Whether a `headerMatches` entry with a `mismatch` action did not match.
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
    /// A rule would allow the request if the secret of a `headerMatches` entry were usable.
    Secret,
}

impl HttpDenial {
    /// Returns the reason of the verdict.
    pub(crate) const fn reason(self) -> Reason {
        match self {
            Self::NoRule | Self::Path(_) => Reason::AppDenied,
            Self::Secret => Reason::SecretUnusable,
        }
    }
}

impl HttpRules {
    /// Prepares the HTTP rules of a rule set. `problem` gets each expression that cannot be compiled, and the error.
    /// Such an expression matches nothing. `secrets` returns the value of a secret; a rule without its value matches
    /// nothing.
    pub(super) fn prepare(
        set: &RuleSet,
        secrets: &Secrets<'_>,
        mut problem: impl FnMut(&str, String),
    ) -> Self {
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
                    headers: header_tests(http, secrets),
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
        let tests = rules
            .alternatives
            .iter()
            .flat_map(|alternative| &alternative.headers);
        let names = tests.map(|test| &*test.name);
        rules.trailer_names = TrailerNames::new(names.filter(|name| !name.starts_with(':')));
        rules
    }

    /// Returns the names that the trailers of a request must not have.
    pub(crate) const fn trailer_names(&self) -> &TrailerNames {
        &self.trailer_names
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
            edits,
        } = scratch;
        edits.clear();
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
        let found = self
            .first(&facts, matched)
            .ok_or_else(|| self.denial(&facts, matched, HttpDenial::NoRule))?;
        let bodies = request.has_unexpected_body();
        let mut verdict = HttpVerdict {
            rule: found.rule,
            log: found.record_mismatches(&facts, edits),
            takes_bodies: !bodies || self.takes_bodies(&facts, matched),
        };
        if paths == Paths::Raw || found.ignores_paths() {
            return Ok(verdict);
        }
        let (path, denial) = match resolved(request.path, other_path) {
            Ok(()) if other_path == sent => return Ok(verdict),
            Ok(()) => {
                self.path
                    .patterns
                    .matching(other_path, &mut caches.path, &mut matched.path);
                let path = (!other_path.is_empty()).then_some(&other_path[..]);
                (path, HttpDenial::NoRule)
            }
            Err(error) => {
                matched.path.clear();
                (None, HttpDenial::Path(error))
            }
        };
        let facts = Facts { request, path };
        let Some(other) = self.first(&facts, matched) else {
            edits.clear();
            return Err(self.denial(&facts, matched, denial));
        };
        if !std::ptr::eq(found, other) {
            verdict.log |= other.record_mismatches(&facts, edits);
        }
        verdict.takes_bodies &= !bodies || self.takes_bodies(&facts, matched);
        Ok(verdict)
    }

    /// Takes a step of the debug log for each of the first alternatives: whether the last evaluated request matches it,
    /// and what does not. `set`: the rule set of these rules.
    pub(crate) fn explain(
        &self,
        request: &Request<'_>,
        about: &About,
        set: Option<&Arc<RuleSet>>,
        scratch: &HttpScratch,
    ) {
        if !steps::is_on(Detail::Debug) {
            return;
        }
        let path = request.path.as_bytes();
        let facts = Facts {
            request,
            path: (!path.is_empty()).then_some(path),
        };
        // `prepare` takes the alternatives of these kinds in the same order.
        let sources = set.into_iter().flat_map(|set| &set.alternatives);
        let sources =
            sources.filter(|source| matches!(source.matcher, Matcher::Everything | Matcher::Http(_)));
        for (alternative, source) in self.alternatives.iter().zip(sources).take(EXPLAINED) {
            steps::of(about, Detail::Debug, Some(alternative.rule), || {
                alternative.explain(&source.matcher, &facts, &scratch.matched)
            });
        }
        if let Some(more) = self.alternatives.len().checked_sub(EXPLAINED + 1) {
            steps::of(about, Detail::Debug, None, || {
                format!("{} further rules are not listed", more + 1)
            });
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

    /// Returns why no alternative allows a request: `other`, unless only an unusable secret prevents it.
    fn denial(&self, facts: &Facts<'_>, matched: &Matched, other: HttpDenial) -> HttpDenial {
        let lacks_secret = self.alternatives.iter().any(|alternative| {
            alternative.headers.iter().any(HeaderTest::lacks_secret)
                && alternative.holds_with(matched, |test| test.lacks_secret() || test.accepts(facts))
        });
        if lacks_secret { HttpDenial::Secret } else { other }
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
    /// Returns a text about the requirements of the alternative that a request does not fulfil. `source` is its form in
    /// the policy. Values of headers are not in the text, because they can be secrets.
    fn explain(&self, source: &Matcher, facts: &Facts<'_>, matched: &Matched) -> String {
        let Matcher::Http(rule) = source else {
            return "the rule matches: it allows every request".to_owned();
        };
        let parts = [
            ("path", self.path, &matched.path, &rule.path),
            ("method", self.method, &matched.method, &rule.method),
            ("host", self.host, &matched.host, &rule.host),
        ];
        let failed_parts = parts
            .into_iter()
            .filter(|(_, number, matched, _)| number.is_some_and(|number| !matched.contains(&number)))
            .map(|(part, _, _, pattern)| format!("{part} {:?}", pattern.as_deref().unwrap_or_default()));
        let failed_headers = self
            .headers
            .iter()
            .filter(|test| !test.accepts(facts))
            .map(|test| format!("header {}", test.name));
        let failed: Vec<String> = failed_parts.chain(failed_headers).collect();
        if failed.is_empty() {
            "the rule matches the request".to_owned()
        } else {
            format!(
                "the rule does not match the request: it requires {}",
                failed.join(", ")
            )
        }
    }

    fn holds(&self, facts: &Facts<'_>, matched: &Matched) -> bool {
        self.holds_with(matched, |test| test.accepts(facts))
    }

    /// As [`Self::holds`], with another test of the headers.
    fn holds_with(&self, matched: &Matched, accepts: impl Fn(&HeaderTest) -> bool) -> bool {
        let among = |number: Option<u32>, numbers: &[u32]| {
            number.is_none_or(|number| numbers.binary_search(&number).is_ok())
        };
        among(self.path, &matched.path)
            && among(self.method, &matched.method)
            && among(self.host, &matched.host)
            && self.headers.iter().all(accepts)
    }

    /// Appends the changes of the headers that mismatch. Returns whether one mismatches.
    fn record_mismatches(&self, facts: &Facts<'_>, edits: &mut Vec<HeaderEdit>) -> bool {
        let mut any = false;
        for test in self.headers.iter().filter(|test| !test.holds(facts)) {
            any = true;
            if let Mismatch::Edit(edit) = &test.mismatch
                && !edits.contains(edit)
                && test.needs_edit(facts)
            {
                edits.push(edit.clone());
            }
        }
        any
    }

    /// Returns whether the alternative matches every path.
    fn ignores_paths(&self) -> bool {
        self.path.is_none() && !self.headers.iter().any(|test| &*test.name == ":path")
    }
}

impl HeaderTest {
    /// Returns whether the wanted value comes from a secret that cannot be used.
    const fn lacks_secret(&self) -> bool {
        matches!(self.wanted, Wanted::Unknown)
    }

    /// Returns whether the alternative can match.
    fn accepts(&self, facts: &Facts<'_>) -> bool {
        match (&self.wanted, &self.mismatch) {
            (Wanted::Unknown, _) => false,
            (_, Mismatch::Log) => true,
            (_, Mismatch::Fail) => self.holds(facts),
            // The change would not be the last word about a doubtful header: servers could use the other field, and
            // proxies remove what `Connection` names.
            (_, Mismatch::Edit(_)) => !facts.request.headers.is_doubtful(&self.name),
        }
    }

    /// Returns whether a mismatching header needs a change.
    fn needs_edit(&self, facts: &Facts<'_>) -> bool {
        let mut values = facts.request.headers.values(&self.name);
        match (&self.mismatch, &self.wanted) {
            // One of several values is enough.
            (Mismatch::Edit(HeaderEdit::Add(..)), Wanted::Value(wanted)) => {
                !values.any(|value| wanted.is(value))
            }
            (Mismatch::Edit(HeaderEdit::Remove(_)), _) => values.next().is_some(),
            (Mismatch::Edit(_), _) => true,
            (Mismatch::Fail | Mismatch::Log, _) => false,
        }
    }

    /// Returns whether the header has the wanted value. All fields with this name must have it, because a server can
    /// use any of them. For the same reason there must be no field with a different name that some servers treat as
    /// this name.
    fn holds(&self, facts: &Facts<'_>) -> bool {
        let is_wanted = |value: &[u8]| match &self.wanted {
            Wanted::Present => true,
            Wanted::Value(wanted) => wanted.is(value),
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

/// Returns the value of a secret by `namespace/name`.
pub(super) type Secrets<'a> = dyn Fn(&str) -> Option<SecretValue> + 'a;

fn header_tests(rule: &HttpRule, secrets: &Secrets<'_>) -> Box<[HeaderTest]> {
    let value = |text: &str| Wanted::Value(SecretValue::new(text.as_bytes().to_vec()));
    let plain = rule.headers.iter().map(|(name, wanted)| HeaderTest {
        name: name.to_ascii_lowercase().into(),
        wanted: wanted.as_deref().map_or(Wanted::Present, value),
        mismatch: Mismatch::Fail,
    });
    let others = rule
        .header_matches
        .iter()
        .map(|header| header_test(header, secrets));
    plain.chain(others).collect()
}

fn header_test(header: &HeaderMatch, secrets: &Secrets<'_>) -> HeaderTest {
    let from_secret = header.secret.as_deref().and_then(secrets);
    let is_unusable = from_secret
        .as_ref()
        .is_some_and(|value| !is_header_value(value.reveal()));
    let text = || {
        header
            .value
            .as_ref()
            .map(|text| SecretValue::new(text.as_bytes().to_vec()))
    };
    let value = from_secret.or_else(text);
    let name: Arc<str> = header.name.to_ascii_lowercase().into();
    // Without a value, the header must be present; an added header is then empty.
    let edit = |make: fn(Arc<str>, SecretValue) -> HeaderEdit| {
        let value = value.clone().unwrap_or_else(|| SecretValue::new(Vec::new()));
        let fits = is_editable_header(&name) && is_header_value(value.reveal());
        if fits {
            Mismatch::Edit(make(name.clone(), value))
        } else {
            Mismatch::Fail
        }
    };
    let mismatch = match header.mismatch {
        MismatchAction::Fail => Mismatch::Fail,
        MismatchAction::Log => Mismatch::Log,
        MismatchAction::Add => edit(HeaderEdit::Add),
        MismatchAction::Delete => edit(|name, _| HeaderEdit::Remove(name)),
        MismatchAction::Replace => edit(HeaderEdit::Set),
    };
    HeaderTest {
        name: (*name).into(),
        mismatch,
        wanted: match value {
            _ if is_unusable => Wanted::Unknown,
            Some(value) => Wanted::Value(value),
            None if header.secret.is_some() => Wanted::Unknown,
            None => Wanted::Present,
        },
    }
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
