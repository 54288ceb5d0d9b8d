//! Prepared HTTP rules, compared with the naive matcher of `palisade_policy::l7`.

use std::{collections::BTreeMap, sync::Arc};

use palisade_abi::Inspector;
use palisade_inspect::{HeaderEdit, HttpDenial, HttpScratch, HttpVerdict, Paths, Rules};
use palisade_model::{
    request::{self, HttpRequest},
    rule::{FqdnPattern, HeaderMatch, HttpRule, MismatchAction},
    secret_value::SecretValue,
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_policy::l7;
use palisade_protocols::http1::{HeaderBuffer, PathError, Request};
use proptest::{collection::vec, option, prelude::*, sample::select};

/// Prepares rule sets with numbers from 0 on. Their rules have numbers from 100 on.
fn prepare(sets: Vec<Vec<Matcher>>) -> (Rules, BTreeMap<u32, Arc<RuleSet>>) {
    let sets: BTreeMap<u32, Arc<RuleSet>> = (0..)
        .zip(sets)
        .map(|(id, matchers)| {
            let alternatives = (100..)
                .zip(matchers)
                .map(|(rule, matcher)| Alternative { rule, matcher })
                .collect();
            let set = RuleSet {
                reads: Inspector::Http as u8,
                alternatives,
                ..RuleSet::default()
            };
            (id, Arc::new(set))
        })
        .collect();
    (Rules::prepare(&sets, None), sets)
}

fn allowing(rules: Vec<HttpRule>) -> Rules {
    let (rules, _) = prepare(vec![rules.into_iter().map(Matcher::Http).collect()]);
    assert_eq!(rules.problems(), []);
    rules
}

fn evaluate(rules: &Rules, head: &str, paths: Paths) -> Result<HttpVerdict, HttpDenial> {
    let mut room = HeaderBuffer::new();
    let request = Request::parse(head.as_bytes(), &mut room).unwrap();
    rules
        .http(0)
        .unwrap()
        .evaluate(&request, paths, &mut HttpScratch::default())
}

fn passes(rule: u32) -> Result<HttpVerdict, HttpDenial> {
    Ok(HttpVerdict {
        rule,
        log: false,
        takes_bodies: true,
    })
}

fn get(target: &str, fields: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: a.test\r\n{fields}\r\n")
}

fn path(pattern: &str) -> HttpRule {
    HttpRule {
        path: Some(pattern.into()),
        ..HttpRule::default()
    }
}

#[test]
fn the_first_rule_that_matches_decides() {
    let rules = allowing(vec![
        HttpRule {
            method: Some("GET|HEAD".into()),
            ..path("/a/.*")
        },
        path("/a/b"),
        path("/a/.*"),
        HttpRule {
            host: Some(r"b\.test".into()),
            ..HttpRule::default()
        },
    ]);
    assert_eq!(evaluate(&rules, &get("/a/b", ""), Paths::Both), passes(100));
    let post = "POST /a/b HTTP/1.1\r\nHost: b.test\r\n\r\n";
    assert_eq!(evaluate(&rules, post, Paths::Both), passes(101));
    let post = "POST /a/c HTTP/1.1\r\nHost: b.test\r\n\r\n";
    assert_eq!(evaluate(&rules, post, Paths::Both), passes(102));
    let post = "POST /c HTTP/1.1\r\nHost: b.test\r\n\r\n";
    assert_eq!(evaluate(&rules, post, Paths::Both), passes(103));
    assert_eq!(
        evaluate(&rules, &get("/c", ""), Paths::Both),
        Err(HttpDenial::NoRule)
    );
    assert_eq!(rules.http(0).unwrap().allow_all(), None);
}

#[test]
fn no_form_of_a_path_bypasses_the_rules() {
    let rules = allowing(vec![path("/public/.*")]);
    for target in [
        "/public/../secret",
        "/public/%2e%2e/secret",
        "/public/%252e%252e/secret",
        "/public/..;/secret",
        "/public\\..\\..\\secret",
        "//public/a",
        "/secret?/public/",
        "http://a.test/secret/public/",
    ] {
        let verdict = evaluate(&rules, &get(target, ""), Paths::Both);
        assert_eq!(verdict, Err(HttpDenial::NoRule), "{target}");
    }
    let escape = evaluate(&rules, &get("/public/%zz", ""), Paths::Both);
    assert_eq!(escape, Err(HttpDenial::Path(PathError::BadEscape)));
    // A path that is not UTF-8 matches no expression.
    let other = evaluate(&rules, &get("/public/%c0%ae%c0%ae/x", ""), Paths::Both);
    assert_eq!(other, Err(HttpDenial::NoRule));
    assert_eq!(
        evaluate(&rules, &get("/public/../secret", ""), Paths::Raw),
        passes(100)
    );
    let inside = get("http://a.test/public/x/..?y=/../..", "");
    assert_eq!(evaluate(&rules, &inside, Paths::Both), passes(100));
    let connect = "CONNECT a.test:443 HTTP/1.1\r\nHost: a.test:443\r\n\r\n";
    let anywhere = allowing(vec![path(".*")]);
    assert_eq!(evaluate(&anywhere, connect, Paths::Both), Err(HttpDenial::NoRule));
    assert_eq!(evaluate(&anywhere, connect, Paths::Raw), Err(HttpDenial::NoRule));

    let rules = allowing(vec![path("/public/.*"), HttpRule::default()]);
    assert_eq!(
        evaluate(&rules, &get("/public/%zz", ""), Paths::Both),
        passes(100)
    );
    assert_eq!(evaluate(&rules, &get("/%zz", ""), Paths::Both), passes(101));
}

#[test]
fn a_mismatch_with_log_is_reported() {
    let wanted = HeaderMatch {
        name: "X-A".into(),
        value: Some("1".into()),
        secret: None,
        mismatch: MismatchAction::Log,
    };
    let rules = allowing(vec![HttpRule {
        header_matches: vec![wanted],
        ..HttpRule::default()
    }]);
    let logged = Ok(HttpVerdict {
        rule: 100,
        log: true,
        takes_bodies: true,
    });
    assert_eq!(
        evaluate(&rules, &get("/", "x-a: 1\r\n"), Paths::Both),
        passes(100)
    );
    assert_eq!(evaluate(&rules, &get("/", ""), Paths::Both), logged);
    assert_eq!(
        evaluate(&rules, &get("/", "x-a: 1\r\nX-A: 2\r\n"), Paths::Both),
        logged
    );
}

#[test]
fn the_rule_that_allows_everything_is_found() {
    let http = Matcher::Http(path("/a"));
    let (rules, _) = prepare(vec![
        vec![http, Matcher::Everything],
        vec![
            Matcher::Dns(FqdnPattern::Name("a".into())),
            Matcher::ServerName(FqdnPattern::Pattern("*".into())),
        ],
    ]);
    assert_eq!(rules.http(0).unwrap().allow_all(), Some(101));
    assert_eq!(evaluate(&rules, &get("/a", ""), Paths::Both), passes(100));
    assert_eq!(evaluate(&rules, &get("/%zz", ""), Paths::Both), passes(101));
    let request = get("/a", "");
    let mut room = HeaderBuffer::new();
    let request = Request::parse(request.as_bytes(), &mut room).unwrap();
    // Rules of other protocols do not allow any request.
    let other = rules.http(1).unwrap();
    assert_eq!(
        other.evaluate(&request, Paths::Raw, &mut HttpScratch::default()),
        Err(HttpDenial::NoRule)
    );
    assert!(rules.http(2).is_none());
}

#[test]
fn a_set_that_does_not_change_is_prepared_once() {
    let (before, sets) = prepare(vec![vec![Matcher::Http(path("/a.*"))]]);
    let after = Rules::prepare(&sets, Some(&before));
    assert!(std::ptr::eq(before.http(0).unwrap(), after.http(0).unwrap()));
}

fn matching(name: &str, value: Option<&str>, mismatch: MismatchAction) -> HeaderMatch {
    HeaderMatch {
        name: name.into(),
        value: value.map(Into::into),
        secret: None,
        mismatch,
    }
}

/// Returns the changes of a request, in words; `None` if it is denied.
fn changes(rules: &Rules, target: &str, fields: &str) -> Option<Vec<String>> {
    let head = get(target, fields);
    let mut room = HeaderBuffer::new();
    let request = Request::parse(head.as_bytes(), &mut room).unwrap();
    let mut scratch = HttpScratch::default();
    let verdict = rules
        .http(0)
        .unwrap()
        .evaluate(&request, Paths::Both, &mut scratch);
    let text = |value: &SecretValue| String::from_utf8(value.reveal().to_vec()).unwrap();
    let changes: Vec<String> = scratch
        .edits()
        .iter()
        .map(|edit| match edit {
            HeaderEdit::Add(name, value) => format!("add {name}: {}", text(value)),
            HeaderEdit::Remove(name) => format!("remove {name}"),
            HeaderEdit::Set(name, value) => format!("set {name}: {}", text(value)),
        })
        .collect();
    assert!(verdict.is_ok() || changes.is_empty());
    verdict.is_ok().then_some(changes)
}

#[test]
fn a_mismatch_changes_the_request() {
    let changing = |value: Option<&str>, mismatch| {
        allowing(vec![HttpRule {
            header_matches: vec![matching("X-A", value, mismatch)],
            ..HttpRule::default()
        }])
    };
    let none: &[&str] = &[];
    for (mismatch, value, fields, expected) in [
        (MismatchAction::Add, Some("1"), "", &["add x-a: 1"][..]),
        (MismatchAction::Add, Some("1"), "X-A: 2\r\n", &["add x-a: 1"]),
        (MismatchAction::Add, Some("1"), "X-A: 2\r\nX-A: 1\r\n", none),
        (MismatchAction::Add, None, "", &["add x-a: "]),
        (MismatchAction::Delete, Some("1"), "", none),
        (MismatchAction::Delete, None, "", none),
        (MismatchAction::Delete, Some("1"), "X-A: 1\r\n", none),
        (
            MismatchAction::Delete,
            Some("1"),
            "X-A: 1\r\nX-A: 2\r\n",
            &["remove x-a"],
        ),
        (MismatchAction::Replace, Some("1"), "", &["set x-a: 1"]),
        (MismatchAction::Replace, Some("1"), "X-A: 1\r\n", none),
        (
            MismatchAction::Replace,
            Some("1"),
            "X-A: 1\r\nX-A: 2\r\n",
            &["set x-a: 1"],
        ),
        (MismatchAction::Log, Some("1"), "", none),
    ] {
        let found = changes(&changing(value, mismatch), "/", fields).unwrap();
        assert_eq!(found, expected, "{mismatch:?} {value:?} {fields:?}");
        let log = evaluate(&changing(value, mismatch), &get("/", fields), Paths::Both)
            .unwrap()
            .log;
        let mismatches = match (value, fields) {
            (None, _) | (_, "") => true,
            (Some(_), fields) => fields.contains('2'),
        };
        assert_eq!(log, mismatches, "{mismatch:?} {value:?} {fields:?}");
    }
    // A field that servers could take for the changed one, and a field that the next proxy removes.
    for mismatch in [
        MismatchAction::Add,
        MismatchAction::Delete,
        MismatchAction::Replace,
    ] {
        for fields in ["X_A: 2\r\n", "Connection: X-A\r\n", "X-A: 1\r\nX_A: 2\r\n"] {
            assert_eq!(
                changes(&changing(Some("1"), mismatch), "/", fields),
                None,
                "{fields}"
            );
        }
    }
}

#[test]
fn changes_are_those_of_the_rule_that_decides() {
    let rule = |path: &str, value: &str| HttpRule {
        header_matches: vec![matching("X-A", Some(value), MismatchAction::Replace)],
        path: Some(path.into()),
        ..HttpRule::default()
    };
    let rules = allowing(vec![
        rule("/x/.*", "1"),
        rule("/public/.*", "2"),
        rule("/.*", "3"),
    ]);
    assert_eq!(changes(&rules, "/x/a", "").unwrap(), ["set x-a: 1"]);
    assert_eq!(changes(&rules, "/b", "").unwrap(), ["set x-a: 3"]);
    // Both forms of the path have a rule: the server can find either.
    assert_eq!(
        changes(&rules, "/x/../public/a", "").unwrap(),
        ["set x-a: 1", "set x-a: 2"]
    );
    let rules = allowing(vec![rule("/x/.*", "1")]);
    assert_eq!(changes(&rules, "/x/../a", ""), None);
}

#[test]
fn the_request_line_the_host_and_the_framing_are_never_changed() {
    for name in [
        ":path",
        ":authority",
        "Host",
        "Content-Length",
        "Transfer_Encoding",
        "Connection",
    ] {
        for mismatch in [
            MismatchAction::Add,
            MismatchAction::Delete,
            MismatchAction::Replace,
        ] {
            let rules = allowing(vec![HttpRule {
                header_matches: vec![matching(name, Some("other"), mismatch)],
                ..HttpRule::default()
            }]);
            assert_eq!(changes(&rules, "/", ""), None, "{name} {mismatch:?}");
        }
    }
}

#[test]
fn values_come_from_secrets() {
    let rule = |value: Option<&str>, mismatch| HttpRule {
        header_matches: vec![HeaderMatch {
            secret: Some("shop/token".into()),
            ..matching("X-A", value, mismatch)
        }],
        ..HttpRule::default()
    };
    let with = |rule: HttpRule, secret: Option<&str>, previous: Option<&Rules>| {
        let (_, sets) = prepare(vec![vec![Matcher::Http(rule)]]);
        let value = secret.map(|secret| SecretValue::new(secret.as_bytes().to_vec()));
        Rules::prepare_with(&sets, previous, &|name| {
            assert_eq!(name, "shop/token");
            value.clone()
        })
    };
    let failing = with(rule(None, MismatchAction::Fail), Some("s"), None);
    assert_eq!(changes(&failing, "/", "X-A: s\r\n"), Some(vec![]));
    assert_eq!(changes(&failing, "/", "X-A: t\r\n"), None);
    let setting = with(rule(Some("t"), MismatchAction::Replace), Some("s"), None);
    assert_eq!(changes(&setting, "/", "X-A: t\r\n").unwrap(), ["set x-a: s"]);
    // The value of the policy stands in for a missing secret.
    let setting = with(rule(Some("t"), MismatchAction::Replace), None, Some(&setting));
    assert_eq!(changes(&setting, "/", "").unwrap(), ["set x-a: t"]);
    assert_eq!(setting.problems(), []);
    // Without a value, the rule allows nothing, whatever the action is.
    for mismatch in [MismatchAction::Log, MismatchAction::Add, MismatchAction::Fail] {
        let rules = with(rule(None, mismatch), None, None);
        assert_eq!(changes(&rules, "/", "X-A: s\r\n"), None);
        assert!(rules.problems()[0].error.contains("secret shop/token"));
        assert_eq!(
            evaluate(&rules, &get("/", "X-A: s\r\n"), Paths::Both),
            Err(HttpDenial::Secret)
        );
    }
    // The secret is not the reason if another part of the rule does not match either.
    let other = HttpRule {
        path: Some("/a".into()),
        ..rule(None, MismatchAction::Add)
    };
    let rules = with(other, None, None);
    assert_eq!(
        evaluate(&rules, &get("/b", ""), Paths::Both),
        Err(HttpDenial::NoRule)
    );
    assert_eq!(
        evaluate(&rules, &get("/a", ""), Paths::Both),
        Err(HttpDenial::Secret)
    );
    // A value that would end the header field.
    let rules = with(rule(None, MismatchAction::Add), Some("s\r\nX-B: 1"), None);
    assert_eq!(changes(&rules, "/", ""), None);
    assert!(rules.problems()[0].error.contains("cannot be in a header"));
    assert_eq!(
        evaluate(&rules, &get("/", ""), Paths::Both),
        Err(HttpDenial::Secret)
    );
}

#[test]
fn a_set_is_prepared_again_when_its_secret_changes() {
    let (_, sets) = prepare(vec![vec![Matcher::Http(HttpRule {
        header_matches: vec![HeaderMatch {
            secret: Some("a/b".into()),
            ..matching("X-A", None, MismatchAction::Fail)
        }],
        ..HttpRule::default()
    })]]);
    let with = |secret: &str, previous| {
        let value = SecretValue::new(secret.as_bytes().to_vec());
        Rules::prepare_with(&sets, previous, &|_| Some(value.clone()))
    };
    let first = with("s", None);
    let same = with("s", Some(&first));
    let other = with("t", Some(&same));
    assert!(std::ptr::eq(first.http(0).unwrap(), same.http(0).unwrap()));
    assert!(!std::ptr::eq(first.http(0).unwrap(), other.http(0).unwrap()));
    assert_eq!(changes(&other, "/", "X-A: t\r\n"), Some(vec![]));
}

fn names() -> impl Strategy<Value = String> {
    select(&["X-A", "x-b", "Host", ":authority", ":path", ":method", ":scheme"][..]).prop_map(Into::into)
}

fn values() -> impl Strategy<Value = String> {
    select(&["1", "2", "a.test", "A.test", "/a", "/a/b", "GET", "b"][..]).prop_map(Into::into)
}

fn mismatches() -> impl Strategy<Value = MismatchAction> {
    prop_oneof![
        Just(MismatchAction::Fail),
        Just(MismatchAction::Log),
        Just(MismatchAction::Add),
        Just(MismatchAction::Delete),
        Just(MismatchAction::Replace),
    ]
}

prop_compose! {
    fn header_matches()(
        name in names(),
        value in option::of(values()),
        secret in option::weighted(0.3, Just("ns/name".to_owned())),
        mismatch in mismatches(),
    ) -> HeaderMatch {
        HeaderMatch { name, value, secret, mismatch }
    }
}

prop_compose! {
    fn http_rules()(
        path in option::of(select(&[
            "/a/.*", "/a", "/a/b", ".*", "/(a|b)", "/[^a].*", "/b/?.*", "^/a(/b)?$", "/%.*", r"/\w*", "/a.*[?]x=.*", r"\*",
        ][..])),
        method in option::weighted(0.4, select(&["GET", "GET|HEAD", "P.*", "(?i)get", "[^G].*"][..])),
        host in option::weighted(0.4, select(&[
            r"a\.test", r"A\.test", "(?i)a.*", "[^b].*", ".*", "[^B].*", r"a\.test(:\d+)?",
        ][..])),
        headers in vec((names(), option::of(values())), 0..2),
        header_matches in vec(header_matches(), 0..2),
    ) -> HttpRule {
        HttpRule {
            path: path.map(Into::into),
            method: method.map(Into::into),
            host: host.map(Into::into),
            headers,
            header_matches,
        }
    }
}

fn matchers() -> impl Strategy<Value = Matcher> {
    prop_oneof![
        12 => http_rules().prop_map(Matcher::Http),
        1 => Just(Matcher::Everything),
        1 => Just(Matcher::Dns(FqdnPattern::Name("a.test".into()))),
    ]
}

fn heads() -> impl Strategy<Value = String> {
    let segment = select(
        &[
            "a", "b", "..", ".", "%2e%2e", "%61", "%2f", "%zz", "%00", "%c3%a9", "%ff", "..;x", "", "A",
            "a%5c..",
        ][..],
    );
    let path = (
        vec(segment, 1..5),
        option::weighted(0.3, select(&["?x=1", "?", "?/../a"][..])),
    )
        .prop_map(|(segments, query)| format!("/{}{}", segments.join("/"), query.unwrap_or_default()));
    let host = select(&["a.test", "A.test", "b", "B", "a.test:80"][..]);
    let method = select(&["GET", "HEAD", "POST", "get"][..]);
    let fields = vec((select(&["X-A", "x-a", "X-B"][..]), values()), 0..4);
    (method, path, host, fields, 0..20_u8).prop_map(|(method, path, host, fields, kind)| {
        let fields: String = fields
            .iter()
            .map(|(name, value)| format!("{name}: {value}\r\n"))
            .collect();
        match kind {
            0 => format!("CONNECT {host}:443 HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n"),
            1 => format!("OPTIONS * HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n"),
            2 => format!("{method} {path} HTTP/1.0\r\n{fields}\r\n"),
            3 => format!("{method} http://{host}{path} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n"),
            _ => format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n"),
        }
    })
}

/// Returns the request of a case file.
fn facts(request: &Request<'_>) -> request::Request {
    let text = |value: &[u8]| String::from_utf8(value.to_vec()).unwrap();
    request::Request {
        http: Some(HttpRequest {
            method: request.method.into(),
            path: request.path.into(),
            host: request.host.into(),
            headers: request
                .headers
                .iter()
                .map(|(name, value)| (name.into(), text(value)))
                .collect(),
            is_http10: request.version == 0,
        }),
        ..request::Request::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// With the same buffers for all requests, as in a worker.
    #[test]
    fn both_forms_say_the_same(
        sets in vec(vec(matchers(), 0..8), 1..24),
        heads in vec(heads(), 1..24),
    ) {
        let (rules, sets) = prepare(sets);
        prop_assert!(rules.problems().iter().all(|problem| problem.error.contains("secret ns/name")));
        let mut scratch = HttpScratch::default();
        for head in &heads {
            let mut room = HeaderBuffer::new();
            let Ok(request) = Request::parse(head.as_bytes(), &mut room) else { continue };
            let facts = facts(&request);
            for (id, set) in &sets {
                for paths in [Paths::Both, Paths::Raw] {
                    let naive = l7::passing_as(set, &facts, paths).map(|alternative| alternative.rule);
                    let prepared = rules.http(*id).unwrap().evaluate(&request, paths, &mut scratch);
                    prop_assert_eq!(
                        prepared.ok().map(|verdict| verdict.rule), naive,
                        "{} by {:?}, {:?}", head, set.alternatives, paths
                    );
                }
            }
        }
    }
}
