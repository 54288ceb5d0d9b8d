//! Whether a request passes the application rules of an entry. For case files and explanations; the workers that
//! read real traffic have their own prepared form of the same rules.

use std::{cell::RefCell, collections::HashMap};

use regex::bytes::Regex;

use crate::{
    parse::http_regex,
    rule::{FqdnPattern, HttpRule, KafkaRule, MismatchAction},
    snapshot::{Alternative, Matcher, RuleSet},
};

/// What is known of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// An HTTP request.
    pub http: Option<HttpRequest>,
    /// The name that a DNS query asks for.
    pub dns: Option<String>,
    /// The server name of a TLS ClientHello.
    pub tls: Option<String>,
    /// A Kafka request.
    pub kafka: Option<KafkaRequest>,
}

impl Request {
    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// An HTTP request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HttpRequest {
    /// Method.
    pub method: String,
    /// Path with query.
    pub path: String,
    /// Host or authority.
    pub host: String,
    /// Header fields.
    pub headers: Vec<(String, String)>,
}

/// A Kafka request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KafkaRequest {
    /// API key.
    pub api_key: i16,
    /// API version.
    pub api_version: Option<i16>,
    /// Client id.
    pub client_id: Option<String>,
    /// Topics that it is about; each must be allowed.
    pub topics: Vec<String>,
}

/// The first alternative that lets the request pass.
#[must_use]
pub fn passing<'a>(set: &'a RuleSet, request: &Request) -> Option<&'a Alternative> {
    if !set.server_names.is_empty()
        && let Some(name) = &request.tls
        && !set.server_names.iter().any(|pattern| name_matches(pattern, name))
    {
        return None;
    }
    if let Some(kafka) = &request.kafka
        && kafka.topics.len() > 1
    {
        // Every topic needs a rule, not necessarily the same.
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
            last = Some(first_match(set, &request)?);
        }
        return last;
    }
    first_match(set, request)
}

fn first_match<'a>(set: &'a RuleSet, request: &Request) -> Option<&'a Alternative> {
    set.alternatives
        .iter()
        .find(|alternative| matches(&alternative.matcher, request))
}

fn matches(matcher: &Matcher, request: &Request) -> bool {
    match matcher {
        Matcher::Everything => true,
        Matcher::Http(rule) => request.http.as_ref().is_some_and(|http| http_matches(rule, http)),
        Matcher::Dns(pattern) => request
            .dns
            .as_ref()
            .is_some_and(|name| name_matches(pattern, name)),
        Matcher::ServerName(pattern) => request
            .tls
            .as_ref()
            .is_some_and(|name| name_matches(pattern, name)),
        Matcher::Kafka(rule) => request
            .kafka
            .as_ref()
            .is_some_and(|kafka| kafka_matches(rule, kafka)),
        Matcher::Generic { .. } => false,
    }
}

fn http_matches(rule: &HttpRule, http: &HttpRequest) -> bool {
    let full = |pattern: &Option<String>, text: &str| pattern.as_ref().is_none_or(|p| full_match(p, text));
    full(&rule.path, &http.path)
        && full(&rule.method, &http.method)
        && full(&rule.host, &http.host)
        && rule.headers.iter().all(|(name, expected)| match expected {
            None => header(http, name).next().is_some(),
            Some(expected) => header(http, name).any(|value| value == expected),
        })
        && rule.header_matches.iter().all(|wanted| {
            wanted.mismatch != MismatchAction::Fail
                || match (&wanted.value, &wanted.secret) {
                    (Some(value), _) => header(http, &wanted.name).any(|found| found == value),
                    (None, None) => header(http, &wanted.name).next().is_some(),
                    // The secret's value is not known here.
                    (None, Some(_)) => false,
                }
        })
}

/// The values of a header field.
fn header<'a>(http: &'a HttpRequest, name: &'a str) -> impl Iterator<Item = &'a str> {
    http.headers
        .iter()
        .filter(move |(known, _)| known.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.as_str())
}

fn kafka_matches(rule: &KafkaRule, kafka: &KafkaRequest) -> bool {
    (rule.api_keys.is_empty() || rule.api_keys.contains(&kafka.api_key))
        && rule
            .api_version
            .is_none_or(|version| kafka.api_version == Some(version))
        && rule
            .client_id
            .as_ref()
            .is_none_or(|id| kafka.client_id.as_ref() == Some(id))
        && rule
            .topic
            .as_ref()
            .is_none_or(|topic| kafka.topics.first() == Some(topic))
}

/// Whether a DNS name is meant by a name or pattern. Case and a trailing dot do not matter.
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
            full_match(&format!("{labels}{}", rest.join("[-a-zA-Z0-9_]*")), &name)
        }
    }
}

thread_local! {
    static PATTERNS: RefCell<HashMap<String, Option<Regex>>> = RefCell::default();
}

/// Whether a pattern matches a text from its first to its last character. One that cannot be compiled matches nothing.
fn full_match(pattern: &str, text: &str) -> bool {
    const REMEMBERED: usize = 1024;
    PATTERNS.with_borrow_mut(|known| {
        if known.len() > REMEMBERED {
            known.clear();
        }
        known
            .entry(pattern.to_owned())
            .or_insert_with(|| http_regex(pattern).ok())
            .as_ref()
            .is_some_and(|regex| regex.is_match(text.as_bytes()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(matchers: Vec<Matcher>) -> RuleSet {
        RuleSet {
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
    }

    #[test]
    fn what_is_read_as_another_protocol_matches_only_what_lets_everything_pass() {
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
