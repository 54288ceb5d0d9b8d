//! Evaluates requests that a case file or a command line describes, with the code that inspects traffic.

use std::{collections::BTreeMap, sync::Arc};

use palisade_abi::{Inspector, Reason};
use palisade_model::{
    request::{Denial, HttpOptions, HttpRequest, KafkaRequest, Request, RequestEvaluator},
    snapshot::RuleSet,
};
use palisade_protocols::{
    dns::Name,
    http1::{self, Head, HeaderBuffer, ParseError},
    kafka,
    tls::ServerName,
};

use crate::{
    KafkaVerdict, Rules,
    http::{has_refused_body, status_of},
    rules::HttpScratch,
    tls::evaluate_name,
};

/// Number of the only rule set that is prepared.
const SET: u32 = 1;

/// Evaluates described requests as the engine evaluates requests in traffic.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inspectors {
    /// Limits of a message head.
    pub head: http1::Limits,
}

impl RequestEvaluator for Inspectors {
    fn evaluate(
        &self,
        set: &Arc<RuleSet>,
        request: &Request,
        options: HttpOptions,
    ) -> Option<Result<u32, Denial>> {
        let is_read_as = |inspector: Inspector| set.reads == inspector as u8;
        let is_intercepted = set.terminating_tls.is_some() || set.originating_tls.is_some();
        let rules = Rules::prepare(&BTreeMap::from([(SET, set.clone())]), None);
        match request {
            Request { http: Some(http), .. } if is_read_as(Inspector::Http) => {
                Some(self.http_inside(set, &rules, http, request.tls.as_deref(), options))
            }
            Request { tls: Some(name), .. } if is_read_as(Inspector::Tls) => Some(server_name(&rules, name)),
            Request { dns: Some(name), .. } if is_read_as(Inspector::Dns) => Some(dns_name(&rules, name)),
            Request {
                kafka: Some(request), ..
            } if is_read_as(Inspector::Kafka) && !is_intercepted => Some(kafka_request(&rules, request)),
            _ => None,
        }
    }
}

fn server_name(rules: &Rules, name: &str) -> Result<u32, Denial> {
    let rules = rules.tls(SET).ok_or(Denial::NoRule)?;
    let name = match name {
        "" => ServerName::Missing,
        host => ServerName::of_host(host.as_bytes())
            .map_err(|refusal| refused(refusal.text(), "the connection is reset".into()))?,
    };
    // The endpoint is assumed to have learned the destination address by this server name.
    evaluate_name(&name, rules, true).map_err(|reason| match reason {
        Reason::AppDenied => Denial::NoRule,
        other => refused(other.text(), "the connection is reset".into()),
    })
}

fn dns_name(rules: &Rules, name: &str) -> Result<u32, Denial> {
    let rules = rules.dns(SET).ok_or(Denial::NoRule)?;
    let name: Name = name
        .parse()
        .map_err(|_| refused("not a valid DNS name", "no client can send it".into()))?;
    rules.evaluate(&name).ok_or(Denial::NoRule)
}

fn kafka_request(rules: &Rules, request: &KafkaRequest) -> Result<u32, Denial> {
    let rules = rules.kafka(SET).ok_or(Denial::NoRule)?;
    let version = request.api_version;
    let header = kafka::Header {
        key: request.api_key,
        version,
        correlation: 0,
        client: request.client_id.as_deref().map(str::as_bytes),
    };
    let allowed = match rules.evaluate(&header) {
        // The SASL tokens behind version 0 cannot be inspected.
        KafkaVerdict::Allowed {
            unrestricted: false, ..
        } if (request.api_key, version) == (kafka::SASL_HANDSHAKE, 0) => {
            return Err(Denial::NoRule);
        }
        KafkaVerdict::Allowed { rule, .. } => rule,
        KafkaVerdict::ByTopics(_)
            if request.topics.is_empty() && kafka::empty_means_all(request.api_key, version) =>
        {
            return Err(Denial::NoRule);
        }
        KafkaVerdict::ByTopics(rule) => {
            let mut topics = request.topics.iter();
            topics.try_fold(rule, |_, topic| {
                rules
                    .evaluate_topic(&header, topic.as_bytes())
                    .ok_or(Denial::NoRule)
            })?
        }
        KafkaVerdict::Denied => return Err(Denial::NoRule),
    };
    if request.api_key == kafka::PRODUCE && kafka::topics_of(kafka::PRODUCE, version).is_none() {
        return Err(refused(
            kafka::ParseError::Unknown.text(),
            "its connection is reset".into(),
        ));
    }
    Ok(allowed)
}

impl Inspectors {
    /// Evaluates a request that can be inside intercepted TLS. `name`: the server name of the connection, if it is
    /// described.
    fn http_inside(
        &self,
        set: &RuleSet,
        rules: &Rules,
        http: &HttpRequest,
        name: Option<&str>,
        options: HttpOptions,
    ) -> Result<u32, Denial> {
        let Some(name) = name else {
            return self.http(rules, http, options);
        };
        if set.terminating_tls.is_none() {
            return Err(refused(
                "the rules do not terminate TLS",
                "the client gets 400".into(),
            ));
        }
        let server = match name {
            "" => ServerName::Missing,
            host => ServerName::of_host(host.as_bytes())
                .map_err(|refusal| refused(refusal.text(), "the connection is reset".into()))?,
        };
        let is_allowed = match (rules.server_names(SET), &server) {
            (None, _) => true,
            (Some(names), ServerName::Name(name)) => names.first(name).is_some(),
            (Some(_), ServerName::Missing | ServerName::Address(_)) => false,
        };
        if is_allowed {
            self.http(rules, http, options)
        } else {
            Err(Denial::NoRule)
        }
    }

    fn http(&self, rules: &Rules, http: &HttpRequest, options: HttpOptions) -> Result<u32, Denial> {
        let rules = rules.http(SET).ok_or(Denial::NoRule)?;
        let malformed = |refusal: ParseError| {
            let effect = match status_of(refusal, false) {
                Some(status) => format!("the client gets {status}"),
                None => "the connection is reset".to_owned(),
            };
            refused(refusal.text(), effect)
        };
        let head = head_of(http).map_err(malformed)?;
        match Head::default().find(head.as_bytes(), &self.head) {
            Ok(Some(length)) if length == head.len() => {}
            Ok(_) => return Err(malformed(ParseError::BadStartLine)),
            Err(refusal) => return Err(malformed(refusal)),
        }
        let mut room = HeaderBuffer::new();
        let request = http1::Request::parse(head.as_bytes(), &mut room).map_err(malformed)?;
        let verdict = rules.evaluate(&request, options.paths, &mut HttpScratch::default());
        let rule = verdict.map_err(|_| Denial::NoRule)?.rule;
        if has_refused_body(&request, verdict, options.get_bodies) {
            return Err(malformed(ParseError::UnexpectedBody));
        }
        Ok(rule)
    }
}

fn refused(why: &'static str, effect: String) -> Denial {
    Denial::Refused { why, effect }
}

/// Returns the head of a described request.
///
/// # Errors
/// [`ParseError::ControlCharacter`] if a part contains a line end, which would add further header fields.
fn head_of(http: &HttpRequest) -> Result<String, ParseError> {
    use std::fmt::Write as _;

    let parts = [&http.method, &http.path, &http.host].into_iter();
    let fields = http.headers.iter().flat_map(|(name, value)| [name, value]);
    if parts.chain(fields).any(|part| part.contains(['\r', '\n'])) {
        return Err(ParseError::ControlCharacter);
    }
    let target = if http.path.is_empty() {
        &http.host
    } else {
        &http.path
    };
    let version = u8::from(!http.is_http10);
    let mut head = format!("{} {target} HTTP/1.{version}\r\n", http.method);
    let names_host = http
        .headers
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("host"));
    // HTTP/1.1 requires the Host field, even if its value is empty (RFC 9112, 3.2).
    if !http.host.is_empty() || !(names_host || http.is_http10) {
        let _ = write!(head, "Host: {}\r\n", http.host);
    }
    for (name, value) in &http.headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    head.push_str("\r\n");
    Ok(head)
}

#[cfg(test)]
mod tests {
    use palisade_model::{
        request::{GetBodies, Paths},
        rule::{FqdnPattern, HttpRule, KafkaRule, TlsContext},
        snapshot::{Alternative, Matcher},
    };

    use super::*;

    fn set(reads: Inspector, matcher: Matcher) -> Arc<RuleSet> {
        Arc::new(RuleSet {
            reads: reads as u8,
            alternatives: vec![Alternative { rule: 7, matcher }],
            ..RuleSet::default()
        })
    }

    fn evaluate(
        rule: HttpRule,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        bodies: GetBodies,
    ) -> Result<u32, Denial> {
        let http = HttpRequest {
            method: method.into(),
            path: path.into(),
            host: "a.test".into(),
            headers: headers
                .iter()
                .map(|(name, value)| ((*name).into(), (*value).into()))
                .collect(),
            ..HttpRequest::default()
        };
        let request = Request {
            http: Some(http),
            ..Request::default()
        };
        let options = HttpOptions {
            paths: Paths::Both,
            get_bodies: bodies,
        };
        Inspectors::default()
            .evaluate(&set(Inspector::Http, Matcher::Http(rule)), &request, options)
            .expect("the HTTP inspector reads it")
    }

    fn refusal(refusal: ParseError, status: u16) -> Result<u32, Denial> {
        Err(refused(refusal.text(), format!("the client gets {status}")))
    }

    #[test]
    fn a_described_request_is_refused_where_the_engine_refuses_it() {
        let plain = || HttpRule {
            path: Some("/.*".into()),
            ..HttpRule::default()
        };
        let with_headers =
            |headers: &[(&str, &str)]| evaluate(plain(), "GET", "/x", headers, GetBodies::Refuse);
        assert_eq!(with_headers(&[("X-A", "1")]), Ok(7));
        assert_eq!(
            with_headers(&[("Transfer_Encoding", "chunked")]),
            refusal(ParseError::DisguisedName, 400)
        );
        assert_eq!(
            with_headers(&[("Connection", "Content-Length")]),
            refusal(ParseError::BadConnection, 400)
        );
        assert_eq!(
            with_headers(&[("Expect", "tea")]),
            refusal(ParseError::BadExpect, 417)
        );
        assert_eq!(
            with_headers(&[("Host", "b.test")]),
            refusal(ParseError::SeveralHosts, 400)
        );
        assert_eq!(with_headers(&[("X A", "1")]), refusal(ParseError::BadName, 400));
        assert_eq!(
            with_headers(&[("X-A", "1\r\n\r\nGET /y HTTP/1.1")]),
            refusal(ParseError::ControlCharacter, 400)
        );
        let long = "x".repeat(20_000);
        assert_eq!(
            with_headers(&[("X-A", &long)]),
            refusal(ParseError::LineTooLong, 431)
        );
        assert_eq!(
            evaluate(plain(), "GET", "/x y", &[], GetBodies::Refuse),
            refusal(ParseError::BadStartLine, 400)
        );
        assert_eq!(
            evaluate(plain(), "", "/x", &[], GetBodies::Refuse),
            Err(refused(
                ParseError::NotHttp.text(),
                "the connection is reset".into()
            ))
        );
    }

    #[test]
    fn a_body_of_a_get_is_evaluated_by_the_option_and_the_rule() {
        let search = || HttpRule {
            path: Some("/x".into()),
            ..HttpRule::default()
        };
        let framed = HttpRule {
            headers: vec![("Content-Length".into(), None)],
            ..search()
        };
        let length = [("Content-Length", "3")];
        let with_body = |rule: HttpRule, method: &str, bodies| evaluate(rule, method, "/x", &length, bodies);
        assert_eq!(
            with_body(search(), "GET", GetBodies::Refuse),
            refusal(ParseError::UnexpectedBody, 400)
        );
        assert_eq!(with_body(search(), "POST", GetBodies::Refuse), Ok(7));
        assert_eq!(with_body(search(), "GET", GetBodies::Allow), Ok(7));
        assert_eq!(with_body(framed, "GET", GetBodies::Refuse), Ok(7));
    }

    #[test]
    fn a_header_does_not_match_beside_a_disguised_or_hop_by_hop_copy() {
        let rule = || HttpRule {
            headers: vec![("X-Role".into(), Some("admin".into()))],
            ..HttpRule::default()
        };
        let with_headers =
            |headers: &[(&str, &str)]| evaluate(rule(), "GET", "/", headers, GetBodies::Refuse);
        assert_eq!(with_headers(&[("x-role", "admin")]), Ok(7));
        assert_eq!(
            with_headers(&[("x-role", "admin"), ("X_Role", "guest")]),
            Err(Denial::NoRule)
        );
        assert_eq!(
            with_headers(&[("x-role", "admin"), ("Connection", "X-Role")]),
            Err(Denial::NoRule)
        );
    }

    #[test]
    fn names_are_evaluated_as_in_queries_and_hellos() {
        let pattern = FqdnPattern::Pattern("*.example.com".into());
        let with_rule = |reads: Inspector, matcher: Matcher, request: Request| {
            Inspectors::default()
                .evaluate(&set(reads, matcher), &request, HttpOptions::default())
                .expect("an inspector reads it")
        };
        let query = |name: &str| {
            let request = Request {
                dns: Some(name.into()),
                ..Request::default()
            };
            with_rule(Inspector::Dns, Matcher::Dns(pattern.clone()), request)
        };
        assert_eq!(query("API.example.com."), Ok(7));
        assert_eq!(query("a.b.example.com"), Err(Denial::NoRule));
        assert!(matches!(query("a..example.com"), Err(Denial::Refused { .. })));
        let hello = |name: &str| {
            let request = Request {
                tls: Some(name.into()),
                ..Request::default()
            };
            with_rule(Inspector::Tls, Matcher::ServerName(pattern.clone()), request)
        };
        assert_eq!(hello("API.example.com."), Ok(7));
        for name in ["", "192.0.2.1", "a.b.example.com"] {
            assert_eq!(hello(name), Err(Denial::NoRule), "{name:?}");
        }
        assert!(matches!(hello("a%.example.com"), Err(Denial::Refused { .. })));
    }

    #[test]
    fn kafka_requests_are_evaluated_by_key_and_topics() {
        let rule = KafkaRule {
            api_keys: vec![0, 3, 17, 18],
            topic: Some("orders".into()),
            ..KafkaRule::default()
        };
        let asks = |api_key: i16, api_version: i16, topics: &[&str]| {
            let request = Request {
                kafka: Some(KafkaRequest {
                    api_key,
                    api_version,
                    topics: topics.iter().map(|topic| (*topic).into()).collect(),
                    ..KafkaRequest::default()
                }),
                ..Request::default()
            };
            Inspectors::default()
                .evaluate(
                    &set(Inspector::Kafka, Matcher::Kafka(rule.clone())),
                    &request,
                    HttpOptions::default(),
                )
                .expect("the Kafka inspector reads it")
        };
        assert_eq!(asks(0, 9, &["orders"]), Ok(7));
        assert_eq!(asks(0, 9, &["orders", "secret"]), Err(Denial::NoRule));
        assert_eq!(asks(18, 3, &[]), Ok(7));
        assert_eq!(asks(1, 12, &["orders"]), Err(Denial::NoRule));
        assert_eq!(asks(3, 99, &["orders"]), Err(Denial::NoRule));
        // An empty list of topics stands for all of them in version 0. The tokens behind version 0 of SASL are not read.
        assert_eq!(asks(3, 1, &[]), Ok(7));
        assert_eq!(asks(3, 0, &[]), Err(Denial::NoRule));
        assert_eq!(asks(17, 1, &[]), Ok(7));
        assert_eq!(asks(17, 0, &[]), Err(Denial::NoRule));
    }

    #[test]
    fn requests_inside_tls_are_evaluated_by_http_rules_and_server_names() {
        let alternative = |rule, matcher| Alternative { rule, matcher };
        let intercepted = |names: &[&str], alternatives: Vec<Alternative>| {
            Arc::new(RuleSet {
                reads: Inspector::Http as u8,
                terminating_tls: Some(TlsContext::default()),
                server_names: names
                    .iter()
                    .map(|name| FqdnPattern::Name((*name).into()))
                    .collect(),
                alternatives,
                ..RuleSet::default()
            })
        };
        let get = HttpRule {
            method: Some("GET".into()),
            ..HttpRule::default()
        };
        let request = |method: &str, name: Option<&str>| Request {
            http: Some(HttpRequest {
                method: method.into(),
                path: "/".into(),
                host: "a.test".into(),
                ..HttpRequest::default()
            }),
            tls: name.map(Into::into),
            ..Request::default()
        };
        let evaluated = |set: &Arc<RuleSet>, method: &str, name: Option<&str>| {
            Inspectors::default()
                .evaluate(set, &request(method, name), HttpOptions::default())
                .expect("the HTTP inspector reads it")
        };
        let named = intercepted(&["a.test"], vec![alternative(7, Matcher::Http(get.clone()))]);
        assert_eq!(evaluated(&named, "GET", None), Ok(7));
        assert_eq!(evaluated(&named, "GET", Some("A.test")), Ok(7));
        assert_eq!(evaluated(&named, "PUT", Some("a.test")), Err(Denial::NoRule));
        for name in ["b.test", "", "192.0.2.1"] {
            assert_eq!(
                evaluated(&named, "GET", Some(name)),
                Err(Denial::NoRule),
                "{name}"
            );
        }
        // The proxy evaluates requests by http rules alone.
        let names = Matcher::ServerName(FqdnPattern::Pattern("*.b.test".into()));
        let mixed = intercepted(
            &[],
            vec![alternative(7, Matcher::Http(get.clone())), alternative(8, names)],
        );
        assert_eq!(evaluated(&mixed, "GET", Some("a.test")), Ok(7));
        assert_eq!(evaluated(&mixed, "PUT", Some("x.b.test")), Err(Denial::NoRule));
        // A hello is no HTTP request.
        let plain = set(Inspector::Http, Matcher::Http(get));
        assert!(matches!(
            evaluated(&plain, "GET", Some("a.test")),
            Err(Denial::Refused { .. })
        ));
    }
}
