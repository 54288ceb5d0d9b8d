//! Application rules: the members other than `ports` in an entry of `toPorts`.

use palisade_model::rule::{
    FqdnPattern, HeaderMatch, HttpRule, KafkaRule, L7, L7Rules, Listener, MismatchAction, PolicyKind,
    TlsContext, is_editable_header, is_header_value,
};
use palisade_protocols::kafka;
use palisade_yaml::quoted;

use super::{
    fqdn::fqdn_selector,
    name_syntax::{host_name, names_no_host},
    reader::{At, Object, hint},
    section::{Direction, Section},
};

/// Parses the application rules of an entry in an allow section.
pub(super) fn read(object: &Object<'_>, section: Section<'_>) -> L7 {
    let rules = object
        .field("rules")
        .map_or(L7Rules::None, |at| l7_rules(at, section));
    let server_names = object.field("serverNames").map(server_names).unwrap_or_default();
    let terminating_tls = object
        .field("terminatingTLS")
        .and_then(|at| tls_context(at, section));
    let originating_tls = object
        .field("originatingTLS")
        .and_then(|at| tls_context(at, section));
    let listener = object.field("listener").and_then(|at| listener(at, section));

    object.warn_null(&["rules", "serverNames"]);
    let has_rules = rules_of_its_own(&rules);
    if has_rules && !server_names.is_empty() && object.field("terminatingTLS").is_none() {
        object.error_at_key(
            "serverNames",
            "serverNames together with rules need terminatingTLS: else the traffic is encrypted",
        );
    }
    if let Some(at) = object.field("listener") {
        if section.direction == Direction::Ingress {
            at.error("listener is for egress only");
        }
        if has_rules {
            at.error("listener and rules cannot be combined in one entry");
        }
    }
    let l7 = L7 {
        rules,
        server_names,
        terminating_tls,
        originating_tls,
        listener,
    };
    if let Some((name, what)) = not_inspected(&l7)
        && let Some(at) = object.field(name)
    {
        at.warning(format!(
            "{what}; until then the traffic of these ports is dropped, with a reason of its own"
        ));
    }
    l7
}

/// Returns the member of an entry that no inspector implements yet, with a description for a warning.
fn not_inspected(l7: &L7) -> Option<(&'static str, &'static str)> {
    if l7.listener.is_some() {
        return Some(("listener", "there are no listeners yet"));
    }
    let is_terminated = l7.terminating_tls.is_some() || l7.originating_tls.is_some();
    match l7.rules {
        L7Rules::Generic { .. } => Some(("rules", "there is no such parser yet")),
        L7Rules::Kafka(_) | L7Rules::Dns(_) if is_terminated => {
            Some(("rules", "inside TLS only http rules are inspected"))
        }
        L7Rules::Http(_) | L7Rules::Dns(_) | L7Rules::Kafka(_) | L7Rules::None => None,
    }
}

fn l7_rules(at: At<'_>, section: Section<'_>) -> L7Rules {
    let Some(object) = at.object() else {
        return L7Rules::None;
    };
    let mut kinds = Vec::new();
    let empty: Vec<&str> = ["http", "kafka", "dns"]
        .into_iter()
        .filter(|name| object.field(name).is_some_and(|at| at.is_empty_list()))
        .collect();
    // An empty list is the same as no list: `rules: {http: []}` restricts nothing.
    if let Some(list) = object
        .field("http")
        .and_then(|at| at.list())
        .filter(|list| !list.is_empty())
    {
        kinds.push(("http", L7Rules::Http(list.read(|at| http_rule(at, section)))));
    }
    if let Some(list) = object
        .field("kafka")
        .and_then(|at| at.list())
        .filter(|list| !list.is_empty())
    {
        kinds.push(("kafka", L7Rules::Kafka(list.read(kafka_rule))));
    }
    if let Some(list) = object
        .field("dns")
        .and_then(|at| at.list())
        .filter(|list| !list.is_empty())
    {
        if section.direction == Direction::Ingress {
            object.error_at_key("dns", "dns rules are for egress only");
        }
        let patterns = list.read(|at| fqdn_selector(at, true));
        kinds.push(("dns", L7Rules::Dns(patterns.into_iter().flatten().collect())));
    }
    object.warn_null(&["http", "kafka", "dns"]);
    let parser = object.text("l7proto");
    let generic = object.field("l7").and_then(|at| at.list());
    if parser.is_none() && generic.as_ref().is_some_and(|list| !list.is_empty()) {
        object.error_at_key("l7", "l7 needs l7proto, the name of the parser");
    }
    if let Some(parser) = parser {
        let rules = generic.map(|list| list.read(generic_rule)).unwrap_or_default();
        kinds.push((
            "l7proto",
            L7Rules::Generic {
                parser: parser.to_owned(),
                rules,
            },
        ));
    }
    object.finish();
    if let [(first, _), (second, _), ..] = kinds.as_slice() {
        object.error_at_key(
            second,
            format!("{second} and {first} cannot be combined in one entry; write an entry for each"),
        );
    }
    // An empty list of one kind together with rules of another kind is still an error.
    if let ([(first, rules), ..], [second, ..]) = (kinds.as_slice(), empty.as_slice())
        && rules_of_its_own(rules)
    {
        object.error_at_key(
            second,
            format!(
                "{second} and {first} cannot be combined in one entry, even without rules; leave {second} out"
            ),
        );
    }
    kinds.into_iter().next().map_or(L7Rules::None, |(_, rules)| rules)
}

/// Returns whether there is at least one rule. A parser can be named without rules.
fn rules_of_its_own(rules: &L7Rules) -> bool {
    match rules {
        L7Rules::None => false,
        L7Rules::Generic { rules, .. } => !rules.is_empty(),
        L7Rules::Http(_) | L7Rules::Dns(_) | L7Rules::Kafka(_) => true,
    }
}

fn generic_rule(at: At<'_>) -> Option<Vec<(String, String)>> {
    let object = at.object()?;
    let mut pairs = Vec::new();
    for (key, value) in object.members() {
        if key.is_empty() {
            object.error_at_key(key, "a key must not be empty");
        }
        if let Some(text) = value.string() {
            pairs.push((key.to_owned(), text.to_owned()));
        }
    }
    Some(pairs)
}

fn http_rule(at: At<'_>, section: Section<'_>) -> Option<HttpRule> {
    let object = at.object()?;
    let pattern = |name| {
        let text = object.text(name)?;
        if let (Err(why), Some(at)) = (at.context.check_expression(text), object.field(name)) {
            let message = format!("{} is no valid regular expression: {why}", quoted(text));
            if name == "host" {
                at.unfit(message);
            } else {
                at.error(message);
            }
        }
        Some(text.to_owned())
    };
    let rule = HttpRule {
        path: pattern("path"),
        method: pattern("method"),
        host: pattern("host"),
        headers: object
            .field("headers")
            .and_then(|at| at.list())
            .map(|list| list.read(header))
            .unwrap_or_default(),
        header_matches: object
            .field("headerMatches")
            .and_then(|at| at.list())
            .map(|list| list.read(|at| header_match(at, section)))
            .unwrap_or_default(),
    };
    object.finish();
    Some(rule)
}

/// Parses `Name: value`, `Name value`, or `Name`.
fn header(at: At<'_>) -> Option<(String, Option<String>)> {
    let text = at.string()?;
    let (name, value) = match text.split_once([':', ' ']) {
        Some((name, value)) => (name, Some(value.trim())),
        None => (text, None),
    };
    if !is_header_name(name) {
        at.unfit(format!(
            "{} names no header; write \"Name: value\", or \"Name\"",
            quoted(text)
        ));
    }
    Some((
        name.to_owned(),
        value.filter(|value| !value.is_empty()).map(str::to_owned),
    ))
}

/// Returns whether the name is a token (RFC 9110, section 5.6.2) or a pseudo-header of HTTP/2.
fn is_header_name(name: &str) -> bool {
    let token = name.strip_prefix(':').unwrap_or(name);
    !token.is_empty()
        && token
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn header_match(at: At<'_>, section: Section<'_>) -> Option<HeaderMatch> {
    let object = at.object()?;
    let name = object.required_text("name").map(str::to_owned);
    if let Some(name) = &name
        && !is_header_name(name)
        && let Some(at) = object.field("name")
    {
        at.unfit(format!("{} cannot be the name of a header", quoted(name)));
    }
    let value = object.text("value").map(str::to_owned);
    if let (Some(value), Some(at)) = (&value, object.field("value"))
        && !is_header_value(value.as_bytes())
    {
        at.unfit(format!("{} cannot be the value of a header", quoted(value)));
    }
    let secret = object.field("secret").and_then(|at| secret(at, section));
    let mismatch = match object.field("mismatch") {
        None => Some(MismatchAction::Fail),
        Some(at) => match at.string()? {
            "" => Some(MismatchAction::Fail),
            "LOG" => Some(MismatchAction::Log),
            action @ ("ADD" | "DELETE" | "REPLACE") => {
                if let Some(name) = &name
                    && is_header_name(name)
                    && !is_editable_header(name)
                {
                    at.unfit(format!(
                        "mismatch: {action} cannot change {name}: the request line, the host and the framing of a \
                         message stay as the client has sent them"
                    ));
                }
                Some(match action {
                    "ADD" => MismatchAction::Add,
                    "DELETE" => MismatchAction::Delete,
                    _ => MismatchAction::Replace,
                })
            }
            other => {
                at.error(format!(
                    "unknown action {}{}",
                    quoted(other),
                    hint(other, &["LOG", "ADD", "DELETE", "REPLACE"])
                ));
                None
            }
        },
    };
    object.finish();
    Some(HeaderMatch {
        name: name?,
        value,
        secret,
        mismatch: mismatch?,
    })
}

/// API keys of the role `produce`: produce, metadata, apiversions.
const PRODUCE: [i16; 3] = [0, 3, 18];
/// API keys of the role `consume`: fetch, offsets, metadata, the requests of a consumer group, apiversions.
const CONSUME: [i16; 11] = [1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 18];

fn kafka_rule(at: At<'_>) -> Option<KafkaRule> {
    let object = at.object()?;
    let (role, key) = (object.text("role"), object.text("apiKey"));
    if role.is_some() && key.is_some() {
        at.error("role and apiKey cannot be given together");
    }
    let mut api_keys = Vec::new();
    if let (Some(role), Some(at)) = (role, object.field("role")) {
        match role.to_ascii_lowercase().as_str() {
            "produce" => api_keys.extend(PRODUCE),
            "consume" => api_keys.extend(CONSUME),
            _ => at.error(format!(
                "unknown role {}{}",
                quoted(role),
                hint(role, &["produce", "consume"])
            )),
        }
    }
    if let (Some(key), Some(at)) = (key, object.field("apiKey")) {
        match kafka::api_key(key) {
            Some(number) => api_keys.push(number),
            None => at.error(format!(
                "unknown API key {}{}",
                quoted(key),
                hint(key, &kafka::api_names().collect::<Vec<_>>())
            )),
        }
    }
    let mut api_version = None;
    if let (Some(text), Some(at)) = (object.text("apiVersion"), object.field("apiVersion")) {
        match text.parse::<i16>() {
            Ok(version) if version >= 0 => api_version = Some(version),
            _ => at.error(format!(
                "apiVersion must be a number from 0 to {}, found {}",
                i16::MAX,
                quoted(text)
            )),
        }
    }
    let topic = object.text("topic");
    if let (Some(topic), Some(at)) = (topic, object.field("topic")) {
        if topic.len() > 255 {
            at.error("a topic is at most 255 characters long");
        } else if !topic
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        {
            at.error(format!(
                "{} cannot be a topic: only letters, digits, \".\", \"_\" and \"-\" are allowed",
                quoted(topic)
            ));
        }
    }
    let client_id = object.text("clientID");
    object.finish();
    Some(KafkaRule {
        api_keys,
        api_version,
        client_id: client_id.map(str::to_owned),
        topic: topic.map(str::to_owned),
    })
}

fn server_names(at: At<'_>) -> Vec<FqdnPattern> {
    let Some(list) = at.list() else {
        return Vec::new();
    };
    list.read(|at| {
        let text = at.string()?;
        if text.is_empty() {
            at.error("a server name must not be empty");
            return None;
        }
        let (name, why) = match host_name(text, true) {
            Ok(name) => (name, names_no_host(text)),
            Err(why) => (text.to_ascii_lowercase(), Some(why)),
        };
        if let Some(why) = why {
            at.unfit(format!("{} cannot be a server name: {why}", quoted(text)));
        }
        Some(if name.contains('*') {
            FqdnPattern::Pattern(name)
        } else {
            FqdnPattern::Name(name)
        })
    })
}

/// Parses a reference to a secret, as `namespace/name`.
fn secret(at: At<'_>, section: Section<'_>) -> Option<String> {
    let object = at.object()?;
    let namespace = object
        .text("namespace")
        .or(section.scope.namespace)
        .unwrap_or("default");
    let name = object.required_text("name");
    object.finish();
    Some(format!("{namespace}/{}", name?))
}

fn tls_context(at: At<'_>, section: Section<'_>) -> Option<TlsContext> {
    let object = at.object()?;
    let secret = object.required("secret").and_then(|at| secret(at, section));
    let text = |name| object.text(name).unwrap_or_default().to_owned();
    let (trusted_ca, certificate, private_key) = (text("trustedCA"), text("certificate"), text("privateKey"));
    object.finish();
    Some(TlsContext {
        secret: secret?,
        trusted_ca,
        certificate,
        private_key,
    })
}

fn listener(at: At<'_>, section: Section<'_>) -> Option<Listener> {
    const KINDS: [&str; 2] = ["CiliumEnvoyConfig", "CiliumClusterwideEnvoyConfig"];
    let object = at.object()?;
    let config = object.required("envoyConfig").and_then(|at| {
        let object = at.object()?;
        let kind = match object.text("kind") {
            Some(kind) => {
                if !KINDS.contains(&kind) {
                    object.error_at_key(
                        "kind",
                        format!("unknown kind {}{}", quoted(kind), hint(kind, &KINDS)),
                    );
                }
                kind
            }
            None if section.scope.kind == PolicyKind::Ccnp => KINDS[1],
            None => KINDS[0],
        };
        let name = object.required_text("name");
        object.finish();
        Some((kind.to_owned(), name?.to_owned()))
    });
    let name = object.required_text("name").map(str::to_owned);
    let priority = match object.field("priority") {
        Some(at) => at
            .integer(1..=100)
            .and_then(|priority| u8::try_from(priority).ok()),
        None => Some(0),
    };
    object.finish();
    let (kind, resource) = config?;
    Some(Listener {
        kind,
        resource,
        name: name?,
        priority: priority?,
    })
}
