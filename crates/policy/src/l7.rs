//! Evaluation of requests that a case file or an operator describes, by the application rules of a policy table entry.
//!
//! Case files and `policy trace` use the inspector of the protocol through [`RequestEvaluator`]. [`passing_as`] is a
//! plain evaluation of the rules. It serves protocols without an inspector, and is the reference model in tests of the
//! inspectors.

use std::{cell::RefCell, collections::HashMap, net::IpAddr, sync::Arc};

use palisade_abi::Inspector;
use palisade_model::{
    request::{Denial, HttpOptions, HttpRequest, KafkaRequest, Paths, Request, RequestEvaluator},
    rule::{FqdnPattern, HttpRule, KafkaRule, MismatchAction, is_editable_header, is_header_value},
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_protocols::{
    http1::{re2, resolved},
    kafka::{SASL_HANDSHAKE, Topics, api_name, empty_means_all, topics_of},
};
use regex::bytes::Regex;

/// A [`RequestEvaluator`] without inspectors: every request is evaluated by [`passing_as`], and malformed requests are
/// not recognised.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

impl RequestEvaluator for Plain {
    fn evaluate(&self, _: &Arc<RuleSet>, _: &Request, _: HttpOptions) -> Option<Result<u32, Denial>> {
        None
    }
}

/// Returns the rule that allows a request: by `evaluator`, or by [`passing_as`] if `evaluator` has no inspector for the
/// protocol.
///
/// # Errors
/// The cause of the denial.
pub(crate) fn decide(
    evaluator: &dyn RequestEvaluator,
    set: &Arc<RuleSet>,
    request: &Request,
    options: HttpOptions,
) -> Result<u32, Denial> {
    evaluator.evaluate(set, request, options).unwrap_or_else(|| {
        passing_as(set, request, options.paths)
            .map(|alternative| alternative.rule)
            .ok_or(Denial::NoRule)
    })
}

/// Returns the result of [`passing_as`] for both forms of the path: as sent and resolved.
#[must_use]
pub fn passing<'a>(set: &'a RuleSet, request: &Request) -> Option<&'a Alternative> {
    passing_as(set, request, Paths::Both)
}

/// Returns an alternative that allows the request; `None` if the request is denied. `paths` selects the forms of the
/// path to match: as sent, or also resolved (`http1::resolved`). If both forms are matched, each needs an alternative,
/// not necessarily the same; the result is the alternative for the path as sent.
#[must_use]
pub fn passing_as<'a>(set: &'a RuleSet, request: &Request, paths: Paths) -> Option<&'a Alternative> {
    if let Some(name) = &request.tls
        && !allows_server_name(set, name)
    {
        return None;
    }
    if let Some(kafka) = &request.kafka
        && kafka.topics.len() > 1
    {
        // Each topic needs an alternative, not necessarily the same.
        let mut last = None;
        for topic in &kafka.topics {
            let alone = KafkaRequest {
                topics: vec![topic.clone()],
                ..kafka.clone()
            };
            let request = Request {
                kafka: Some(alone),
                ..request.clone()
            };
            last = Some(first_match(set, &request, None)?);
        }
        return last;
    }
    let sent = request.http.as_ref().map(|http| http.path.as_bytes());
    let found = first_match(set, request, sent)?;
    if let Some(http) = &request.http
        && paths == Paths::Both
    {
        let mut path = Vec::new();
        let path = resolved(&http.path, &mut path).is_ok().then_some(&path[..]);
        first_match(set, request, path)?;
    }
    Some(found)
}

/// Returns whether `serverNames` beside rules of another protocol allow a name.
fn allows_server_name(set: &RuleSet, name: &str) -> bool {
    set.server_names.is_empty()
        || set
            .server_names
            .iter()
            .any(|pattern| server_name_matches(pattern, name))
}

/// Returns whether the proxy accepts a ClientHello of which only the server name is described, to inspect the requests
/// inside TLS; `None` if the request is another one or the rule set does not inspect requests inside TLS.
pub(crate) fn accepts_hello(set: &RuleSet, request: &Request) -> Option<bool> {
    let inside = set.terminating_tls.is_some() && set.reads != Inspector::Tls as u8;
    match request {
        Request {
            http: None,
            dns: None,
            kafka: None,
            tls: Some(name),
        } if inside => Some(allows_server_name(set, name)),
        _ => None,
    }
}

/// Returns the first alternative that matches the request. `path` replaces the path of the request; `None` if there is
/// no path or it cannot be resolved.
fn first_match<'a>(set: &'a RuleSet, request: &Request, path: Option<&[u8]>) -> Option<&'a Alternative> {
    set.alternatives.iter().find(|alternative| {
        applies(&alternative.matcher, set) && matches(&alternative.matcher, request, path)
    })
}

/// Returns whether a matcher applies to the protocol that the inspector reads. The merged rules of a port can belong to
/// several protocols, but only one protocol is read.
fn applies(matcher: &Matcher, set: &RuleSet) -> bool {
    let read = |inspector: Inspector| set.reads == inspector as u8;
    match matcher {
        Matcher::Everything => true,
        Matcher::Http(_) => read(Inspector::Http),
        Matcher::Dns(_) => read(Inspector::Dns),
        // Inside TLS, the rules for the protocol decide alone.
        Matcher::ServerName(_) => read(Inspector::Tls),
        Matcher::Kafka(_) => read(Inspector::Kafka),
        Matcher::Generic { .. } => read(Inspector::Listener),
    }
}

fn matches(matcher: &Matcher, request: &Request, path: Option<&[u8]>) -> bool {
    match matcher {
        Matcher::Everything => true,
        Matcher::Http(rule) => request
            .http
            .as_ref()
            .is_some_and(|http| http_matches(rule, http, path)),
        Matcher::Dns(pattern) => request
            .dns
            .as_ref()
            .is_some_and(|name| name_matches(pattern, name)),
        Matcher::ServerName(pattern) => request
            .tls
            .as_ref()
            .is_some_and(|name| server_name_matches(pattern, name)),
        Matcher::Kafka(rule) => request
            .kafka
            .as_ref()
            .is_some_and(|kafka| kafka_matches(rule, kafka)),
        Matcher::Generic { .. } => false,
    }
}

fn http_matches(rule: &HttpRule, http: &HttpRequest, path: Option<&[u8]>) -> bool {
    // An absent path or host matches no expression. CONNECT has no path.
    let path = path.filter(|path| !path.is_empty());
    let host = Some(http.host.as_bytes()).filter(|host| !host.is_empty());
    let full = |pattern: &str, text: Option<&[u8]>| text.is_some_and(|text| full_match(pattern, text));
    let values = |name: &str| -> Vec<&[u8]> {
        match name.to_ascii_lowercase().as_str() {
            ":method" => vec![http.method.as_bytes()],
            ":path" => path.into_iter().collect(),
            // As in Envoy, `:authority` is the host, from the Host field or from the request target.
            ":authority" | "host" => host.into_iter().collect(),
            name if name.starts_with(':') => Vec::new(),
            name => http
                .headers
                .iter()
                .filter(|(known, _)| known.eq_ignore_ascii_case(name))
                .map(|(_, value)| value.as_bytes())
                .collect(),
        }
    };
    // If a header occurs twice, servers differ in which value they use, so each value must match.
    let header = |name: &str, wanted: Option<&str>| {
        let values = values(name);
        let all = |wanted: &str| values.iter().all(|value| *value == wanted.as_bytes());
        !values.is_empty() && wanted.is_none_or(all)
    };
    rule.path.as_ref().is_none_or(|pattern| full(pattern, path))
        && rule
            .method
            .as_ref()
            .is_none_or(|pattern| full(pattern, Some(http.method.as_bytes())))
        && rule.host.as_ref().is_none_or(|pattern| {
            // Servers ignore the letter case of hosts, so upper case must not allow a request that is denied in lower
            // case.
            full(pattern, host)
                && (!http.host.bytes().any(|byte| byte.is_ascii_uppercase())
                    || full(&format!("(?i:{pattern})"), host))
        })
        && rule
            .headers
            .iter()
            .all(|(name, wanted)| header(name, wanted.as_deref()))
        && rule.header_matches.iter().all(|wanted| {
            let value = match (&wanted.value, &wanted.secret) {
                // The value of the secret is not known here. Without the other value the rule never matches, as if the
                // secret were missing.
                (None, Some(_)) => return false,
                (value, _) => value.as_deref(),
            };
            let changes =
                || is_editable_header(&wanted.name) && is_header_value(value.unwrap_or_default().as_bytes());
            match wanted.mismatch {
                MismatchAction::Log => true,
                MismatchAction::Add | MismatchAction::Delete | MismatchAction::Replace if changes() => true,
                _ => header(&wanted.name, value),
            }
        })
}

fn kafka_matches(rule: &KafkaRule, kafka: &KafkaRequest) -> bool {
    if *rule == KafkaRule::default() {
        return true;
    }
    let topic = rule.topic.as_ref().is_none_or(|topic| {
        match topics_of(kafka.api_key, kafka.api_version) {
            // Requests that cannot name a topic are not evaluated by it.
            Some(Topics::None) => true,
            Some(Topics::Admin) => rule.api_keys.contains(&kafka.api_key),
            Some(Topics::Read) => match kafka.topics.first() {
                Some(named) => named == topic,
                None => !empty_means_all(kafka.api_key, kafka.api_version),
            },
            Some(Topics::Unread) | None => false,
        }
    });
    // A rule with a condition does not allow requests whose API key is not known.
    topic
        && api_name(kafka.api_key).is_some()
        // The SASL tokens behind version 0 cannot be inspected.
        && (kafka.api_key, kafka.api_version) != (SASL_HANDSHAKE, 0)
        && (rule.api_keys.is_empty() || rule.api_keys.contains(&kafka.api_key))
        && rule
            .api_version
            .is_none_or(|version| kafka.api_version == version)
        && rule
            .client_id
            .as_ref()
            .is_none_or(|id| kafka.client_id.as_ref() == Some(id))
}

/// Returns whether a pattern matches a server name. No pattern matches a ClientHello without a name (`name` is empty),
/// or with an address as its name (not allowed by RFC 6066, section 3).
fn server_name_matches(pattern: &FqdnPattern, name: &str) -> bool {
    !name.is_empty() && name.parse::<IpAddr>().is_err() && name_matches(pattern, name)
}

/// Returns whether a name or pattern matches a DNS name. The letter case and a trailing dot of `name` are ignored.
#[must_use]
pub fn name_matches(pattern: &FqdnPattern, name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    if name.len() > 255 {
        return false;
    }
    match pattern {
        FqdnPattern::Name(wanted) => *wanted == name,
        FqdnPattern::Pattern(pattern) => {
            if pattern == "*" {
                return true;
            }
            let (labels, rest) = match pattern.strip_prefix("**.") {
                Some(rest) => ("([-a-zA-Z0-9_]+[.])+", rest),
                None => ("", pattern.as_str()),
            };
            let rest: Vec<String> = rest.split('*').map(regex::escape).collect();
            full_match(
                &format!("{labels}{}", rest.join("[-a-zA-Z0-9_]*")),
                name.as_bytes(),
            )
        }
    }
}

thread_local! {
    static PATTERNS: RefCell<HashMap<String, Option<Regex>>> = RefCell::default();
}

/// Returns whether a pattern matches the whole text. An invalid pattern matches nothing.
fn full_match(pattern: &str, text: &[u8]) -> bool {
    const REMEMBERED: usize = 1024;
    PATTERNS.with_borrow_mut(|known| {
        if known.len() > REMEMBERED {
            known.clear();
        }
        known
            .entry(pattern.to_owned())
            .or_insert_with(|| re2::compile(pattern).ok())
            .as_ref()
            .is_some_and(|regex| regex.is_match(text))
    })
}

#[cfg(test)]
mod tests {
    use palisade_model::rule::HeaderMatch;

    use super::*;

    fn set(matchers: Vec<Matcher>) -> RuleSet {
        let reads = match matchers.first() {
            Some(Matcher::Kafka(_)) => Inspector::Kafka,
            Some(Matcher::ServerName(_)) => Inspector::Tls,
            _ => Inspector::Http,
        };
        RuleSet {
            reads: reads as u8,
            alternatives: matchers
                .into_iter()
                .map(|matcher| Alternative { rule: 1, matcher })
                .collect(),
            ..RuleSet::default()
        }
    }

    fn get(path: &str, headers: &[(&str, &str)]) -> Request {
        Request {
            http: Some(HttpRequest {
                method: "GET".into(),
                path: path.into(),
                host: "a.test".into(),
                headers: headers.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect(),
                ..HttpRequest::default()
            }),
            ..Request::default()
        }
    }

    #[test]
    fn http_patterns_match_the_whole_text() {
        let rules = set(vec![Matcher::Http(HttpRule {
            method: Some("GET|HEAD".into()),
            path: Some("/public/.*".into()),
            headers: vec![("X-A".into(), Some("1".into())), ("X-B".into(), None)],
            ..HttpRule::default()
        })]);
        let headers = [("x-a", "1"), ("x-b", "")];
        assert!(passing(&rules, &get("/public/x?y=1", &headers)).is_some());
        assert!(passing(&rules, &get("/private?/public/", &headers)).is_none());
        assert!(passing(&rules, &get("/public/x", &headers[..1])).is_none());
        assert!(passing(&rules, &get("/public/x", &[("x-a", "2"), ("x-b", "")])).is_none());
    }

    fn allowing(rules: Vec<HttpRule>) -> RuleSet {
        set(rules.into_iter().map(Matcher::Http).collect())
    }

    fn path(pattern: &str) -> HttpRule {
        HttpRule {
            path: Some(pattern.into()),
            ..HttpRule::default()
        }
    }

    #[test]
    fn rules_match_a_path_as_sent_and_as_resolved() {
        let rules = allowing(vec![path("/public/.*")]);
        for there in [
            "/public/../secret",
            "/public/%2e%2e/secret",
            "/public/%zz",
            "/x/../public/a",
        ] {
            assert!(passing(&rules, &get(there, &[])).is_none(), "{there}");
        }
        assert!(passing_as(&rules, &get("/public/../secret", &[]), Paths::Raw).is_some());
        assert!(passing(&rules, &get("/public/x/../a", &[])).is_some());
        // Different rules can allow the two forms of a path.
        let rules = allowing(vec![path("/x/.*"), path("/public/.*")]);
        assert!(passing(&rules, &get("/x/../public/a", &[])).is_some());
        // A rule without a path ignores malformed paths.
        let rules = allowing(vec![path("/public/.*"), HttpRule::default()]);
        assert!(passing(&rules, &get("/%zz", &[])).is_some());
        // CONNECT has no path.
        assert!(passing(&allowing(vec![path(".*")]), &get("", &[])).is_none());
    }

    #[test]
    fn a_header_that_occurs_twice_matches_only_if_every_value_does() {
        let header = |value: Option<&str>| HttpRule {
            headers: vec![("X-A".into(), value.map(Into::into))],
            ..HttpRule::default()
        };
        let rules = allowing(vec![header(Some("1"))]);
        assert!(passing(&rules, &get("/", &[("x-a", "1"), ("X-A", "1")])).is_some());
        assert!(passing(&rules, &get("/", &[("x-a", "1"), ("X-A", "2")])).is_none());
        assert!(passing(&rules, &get("/", &[("x-a", "2"), ("X-A", "1")])).is_none());
        let rules = allowing(vec![header(None)]);
        assert!(passing(&rules, &get("/", &[("x-a", "2"), ("X-A", "1")])).is_some());
    }

    #[test]
    fn every_action_but_the_default_accepts_a_mismatch() {
        for (mismatch, passes) in [
            (MismatchAction::Fail, false),
            (MismatchAction::Log, true),
            (MismatchAction::Add, true),
            (MismatchAction::Delete, true),
            (MismatchAction::Replace, true),
        ] {
            let wanted = |name: &str, value: Option<&str>, secret: Option<&str>| {
                allowing(vec![HttpRule {
                    header_matches: vec![HeaderMatch {
                        name: name.into(),
                        value: value.map(Into::into),
                        secret: secret.map(Into::into),
                        mismatch,
                    }],
                    ..HttpRule::default()
                }])
            };
            let passes_with =
                |rules: &RuleSet, value: &str| passing(rules, &get("/", &[("x-a", value)])).is_some();
            assert!(passes_with(&wanted("X-A", Some("1"), None), "1"));
            assert_eq!(passes_with(&wanted("X-A", Some("1"), None), "2"), passes);
            assert!(passes_with(&wanted("X-A", Some("1"), Some("a/b")), "1"));
            // A secret without a value matches nothing.
            assert!(!passes_with(&wanted("X-A", None, Some("a/b")), "2"));
            // The host is never changed.
            let log = mismatch == MismatchAction::Log;
            assert_eq!(passes_with(&wanted("Host", Some("b.test"), None), "1"), log);
        }
    }

    #[test]
    fn a_host_in_another_case_allows_no_more() {
        let host = |pattern: &str, host: &str| {
            let rules = allowing(vec![HttpRule {
                host: Some(pattern.into()),
                ..HttpRule::default()
            }]);
            let mut request = get("/", &[]);
            if let Some(http) = &mut request.http {
                http.host = host.into();
            }
            passing(&rules, &request).is_some()
        };
        assert!(host(r"a\.test", "a.test"));
        assert!(!host(r"a\.test", "A.test") && !host(r"a\.test", "a.test:8080"));
        assert!(host(r"A\.test", "A.test") && host(r"(?i)a\.test(:\d+)?", "A.TEST:80"));
        assert!(host("[^x].*", "a.test") && !host("[^x].*", "X.test"));
        assert!(!host(".*", ""), "a host that is not there matches no expression");
    }

    #[test]
    fn patterns_of_names_do_not_cross_dots() {
        let pattern = |text: &str| FqdnPattern::Pattern(text.into());
        assert!(name_matches(&pattern("*.example.com"), "API.example.com."));
        assert!(!name_matches(&pattern("*.example.com"), "a.b.example.com"));
        assert!(!name_matches(&pattern("*.example.com"), "example.com"));
        assert!(name_matches(&pattern("**.example.com"), "a.b.example.com"));
        assert!(!name_matches(&pattern("**.example.com"), "example.com"));
        assert!(name_matches(&pattern("*"), "anything.at.all"));
        assert!(!name_matches(&pattern("a.example.com"), "axexample.com"));
        assert!(name_matches(&FqdnPattern::Name("a.test".into()), "A.test."));
    }

    #[test]
    fn no_pattern_means_a_hello_without_a_name() {
        let hello = |name: &str| Request {
            tls: Some(name.into()),
            ..Request::default()
        };
        let any = Matcher::ServerName(FqdnPattern::Pattern("*".into()));
        let rules = set(vec![any.clone()]);
        assert!(passing(&rules, &hello("a.b.test")).is_some());
        for name in ["", "192.0.2.1", "2001:db8::1"] {
            assert!(passing(&rules, &hello(name)).is_none(), "{name:?}");
        }
        assert!(passing(&set(vec![any, Matcher::Everything]), &hello("")).is_some());
    }

    #[test]
    fn every_topic_of_a_kafka_request_needs_a_rule() {
        let topic = |name: &str| {
            Matcher::Kafka(KafkaRule {
                topic: Some(name.into()),
                ..KafkaRule::default()
            })
        };
        let request = |topics: &[&str]| Request {
            kafka: Some(KafkaRequest {
                topics: topics.iter().map(|t| (*t).into()).collect(),
                ..KafkaRequest::default()
            }),
            ..Request::default()
        };
        let rules = set(vec![topic("a"), topic("b")]);
        assert!(passing(&rules, &request(&["a", "b"])).is_some());
        assert!(passing(&rules, &request(&["a", "c"])).is_none());
        // A request that names no topic, an API key without topics, and one whose topics are not read.
        let of_version = |api_key: i16, api_version: i16| Request {
            kafka: Some(KafkaRequest {
                api_key,
                api_version,
                ..KafkaRequest::default()
            }),
            ..Request::default()
        };
        let of_key = |api_key: i16| of_version(api_key, 0);
        assert!(passing(&rules, &of_version(3, 1)).is_some());
        assert!(passing(&rules, &of_key(12)).is_some());
        // An empty list of topics stands for all of them in version 0 of Metadata.
        assert!(passing(&rules, &of_key(3)).is_none());
        assert!(passing(&rules, &of_version(17, 1)).is_some());
        assert!(passing(&rules, &of_key(17)).is_none());
        assert!(passing(&rules, &of_key(43)).is_none());
        // One that is about all topics, and one that administers the cluster.
        assert!(passing(&rules, &of_key(75)).is_none());
        assert!(passing(&rules, &of_key(51)).is_none());
        assert!(passing(&rules, &of_key(200)).is_none());
        let all = set(vec![Matcher::Kafka(KafkaRule::default())]);
        assert!(passing(&all, &of_key(200)).is_some());
    }

    #[test]
    fn requests_of_another_protocol_match_only_everything() {
        assert!(
            passing(
                &set(vec![Matcher::Http(HttpRule::default())]),
                &Request::default()
            )
            .is_none()
        );
        assert!(passing(&set(vec![Matcher::Everything]), &Request::default()).is_some());
    }
}
