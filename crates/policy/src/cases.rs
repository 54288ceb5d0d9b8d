//! Case files: unit tests for policies. Each case has policies, endpoints, peers and checks. The verdicts come from the
//! compiled policy tables, by the same lookups as in the BPF programs.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;
use palisade_abi::{Decision, Direction, Identity, PolicyEntry, entry_flags, protocol};
use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    inventory::{Endpoint, Enforcement, Inventory, NamedPort, NamedPorts, Options, Peer},
    labels::{Labels, parse_label},
    request::{Denial, GetBodies, HttpOptions, HttpRequest, KafkaRequest, Paths, Request, RequestEvaluator},
    snapshot::{Snapshot, inspector_name},
};
use palisade_protocols::kafka::{api_key, last_version};
use serde::Deserialize;

use crate::{
    compile::possible_conflicts,
    compile::{Changes, Compiler, CompilerState, FileContent},
    l7::{accepts_hello, decide},
    parse::{parse_rules_json, yaml_to_json},
};

/// Result of a case file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// A line for each check whose verdict differs from the expected one, and for each error of an invalid case.
    pub lines: Vec<String>,
    /// Number of checks with the expected verdict.
    pub passed: usize,
    /// Number of failed checks; an invalid case counts as at least one.
    pub failed: usize,
}

impl Report {
    /// Adds another report to this one.
    pub fn add(&mut self, other: Self) {
        self.lines.extend(other.lines);
        self.passed += other.passed;
        self.failed += other.failed;
    }

    /// Returns `N passed, M failed`.
    #[must_use]
    pub fn summary(&self) -> String {
        format!("{} passed, {} failed", self.passed, self.failed)
    }

    fn fail(&mut self, line: String) {
        self.lines.push(line);
        self.failed += 1;
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Case {
    #[serde(default)]
    id: String,
    #[serde(default)]
    config: CaseConfig,
    policies: Option<serde_json::Value>,
    rules: Option<serde_json::Value>,
    #[serde(default)]
    endpoints: BTreeMap<String, Named>,
    #[serde(default)]
    peers: BTreeMap<String, Named>,
    #[serde(default)]
    checks: Vec<Check>,
    #[serde(default)]
    error: bool,
    #[serde(default, rename = "description", alias = "comment")]
    _description: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CaseConfig {
    #[serde(default = "default_word")]
    enforcement: String,
    #[serde(default = "policy_word")]
    allow_localhost: String,
    #[serde(default = "yes")]
    dual_stack: bool,
    #[serde(default)]
    audit: bool,
    #[serde(default)]
    http: CaseHttp,
}

/// Settings of the section `[http]` of the configuration that affect verdicts.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CaseHttp {
    path_normalization: Option<String>,
    get_bodies: Option<String>,
    #[serde(default)]
    clear_text_http2: bool,
}

impl CaseHttp {
    fn options(&self) -> Result<HttpOptions, String> {
        Ok(HttpOptions {
            paths: match self.path_normalization.as_deref() {
                None | Some("both") => Paths::Both,
                Some("raw") => Paths::Raw,
                Some(other) => return Err(format!("pathNormalization {other:?} is neither both nor raw")),
            },
            get_bodies: match self.get_bodies.as_deref() {
                None | Some("refuse") => GetBodies::Refuse,
                Some("allow") => GetBodies::Allow,
                Some(other) => return Err(format!("getBodies {other:?} is neither refuse nor allow")),
            },
        })
    }
}

impl Default for CaseConfig {
    fn default() -> Self {
        Self {
            enforcement: default_word(),
            allow_localhost: policy_word(),
            dual_stack: true,
            audit: false,
            http: CaseHttp::default(),
        }
    }
}

fn default_word() -> String {
    "default".into()
}

fn policy_word() -> String {
    "policy".into()
}

const fn yes() -> bool {
    true
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Named {
    #[serde(default)]
    labels: Vec<String>,
    #[serde(default)]
    named_ports: BTreeMap<String, String>,
    #[serde(default)]
    addresses: Vec<String>,
    #[serde(default)]
    audit: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Check {
    subject: String,
    direction: String,
    peer: String,
    protocol: String,
    #[serde(default)]
    port: u16,
    expect: String,
    http: Option<HttpFacts>,
    dns: Option<NameFacts>,
    tls: Option<NameFacts>,
    kafka: Option<KafkaFacts>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HttpFacts {
    method: Option<String>,
    path: Option<String>,
    #[serde(default)]
    host: String,
    #[serde(default)]
    headers: BTreeMap<String, Values>,
    version: Option<String>,
}

/// The value of a header field, or the values of a repeated field.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Values {
    One(String),
    Several(Vec<String>),
}

impl Values {
    fn all(&self) -> &[String] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Several(values) => values,
        }
    }
}

/// A name, or an object with a name. Other members of the object are ignored.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum NameFacts {
    Name(String),
    Object {
        #[serde(alias = "query", alias = "serverName", alias = "sni", alias = "matchName")]
        name: String,
    },
}

impl NameFacts {
    fn name(&self) -> String {
        match self {
            Self::Name(name) | Self::Object { name } => name.clone(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct KafkaFacts {
    #[serde(default)]
    api_key: Number,
    api_version: Option<Number>,
    #[serde(alias = "clientID")]
    client_id: Option<String>,
    topic: Option<String>,
    #[serde(default)]
    topics: Vec<String>,
}

/// A number, a number as text, or a name.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Number {
    Number(i16),
    Text(String),
}

impl Default for Number {
    fn default() -> Self {
        Self::Number(0)
    }
}

impl Number {
    fn value(&self) -> Result<i16, String> {
        match self {
            Self::Number(number) => Ok(*number),
            Self::Text(text) => text
                .parse()
                .ok()
                .or_else(|| api_key(text))
                .ok_or_else(|| format!("{text:?} is not a number or an API key of Kafka")),
        }
    }
}

/// Runs the cases of a file: one JSON object per line, or YAML documents. `file` is the name of the file in messages;
/// `evaluator` decides the requests of checks.
#[must_use]
pub fn run(file: &str, text: &str, evaluator: &dyn RequestEvaluator) -> Report {
    let mut report = run_cases(file, text, evaluator);
    if report == Report::default() {
        report.fail(format!("{file}: there is no case in this file"));
    }
    report
}

fn run_cases(file: &str, text: &str, evaluator: &dyn RequestEvaluator) -> Report {
    let mut report = Report::default();
    if is_json_lines(text) {
        for (number, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let place = format!("{file}:{}", number + 1);
            match serde_json::from_str::<Case>(line) {
                Ok(case) => report.add(run_case(&place, &case, evaluator)),
                Err(error) => report.fail(format!("{place}:{}: {error}", error.column())),
            }
        }
        return report;
    }
    match yaml_to_json(file, text) {
        Ok(documents) => {
            for (number, document) in documents.into_iter().enumerate() {
                if document.is_null() {
                    continue;
                }
                let place = format!("{file}: document {}", number + 1);
                match serde_json::from_value::<Case>(document) {
                    Ok(case) => report.add(run_case(&place, &case, evaluator)),
                    Err(error) => report.fail(format!("{place}: {error}")),
                }
            }
        }
        Err(errors) => {
            for error in errors {
                report.fail(error.to_string());
            }
        }
    }
    report
}

/// Returns whether the first line that is not blank is a complete JSON object.
fn is_json_lines(text: &str) -> bool {
    text.lines()
        .find(|line| !line.trim().is_empty())
        .is_some_and(|line| serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(line).is_ok())
}

fn run_case(place: &str, case: &Case, evaluator: &dyn RequestEvaluator) -> Report {
    let mut report = Report::default();
    let place = if case.id.is_empty() {
        place.to_owned()
    } else {
        format!("{place}: {}", case.id)
    };
    if case.checks.is_empty() && !case.error {
        report.fail(format!(
            "{place}: the case checks nothing: it has neither checks nor error: true"
        ));
        return report;
    }
    let parsed = parse_rules_json(
        if case.id.is_empty() { &place } else { &case.id },
        case.policies.as_ref(),
        case.rules.as_ref(),
    );
    let mut errors: Vec<Diagnostic> = parsed
        .diagnostics
        .iter()
        .filter(|diagnostic| diagnostic.severity == Severity::Error)
        .cloned()
        .collect();
    if case.endpoints.is_empty() {
        // Without endpoints the compiler builds no tables and finds no conflicts, so compare all pairs of specs that
        // could select the same endpoint.
        errors.extend(possible_conflicts(&parsed.policies));
    }
    let (inventory, options) =
        match inventory(case).and_then(|inventory| Ok((inventory, case.config.http.options()?))) {
            Ok(read) => read,
            Err(error) => {
                report.fail(format!("{place}: {error}"));
                return report;
            }
        };
    let mut compiler = Compiler::new(&CompilerState::default());
    let content = FileContent {
        policies: parsed.policies,
        cidr_groups: parsed.cidr_groups,
    };
    let changes = Changes {
        inventory: Some(inventory),
        files: BTreeMap::from([(place.clone(), Some(content))]),
    };
    if errors.is_empty()
        && let Err(found) = compiler.update(changes)
    {
        errors = found;
    }
    if case.error {
        if errors.is_empty() {
            report.fail(format!(
                "{place}: expected the rules to be rejected, and they are valid"
            ));
        } else {
            report.passed += 1;
        }
        return report;
    }
    if !errors.is_empty() {
        for error in errors {
            report.lines.push(format!("{place}: {error}"));
        }
        report.failed += case.checks.len().max(1);
        return report;
    }

    let snapshot = compiler.snapshot();
    let names = CaseNames::new(compiler.inventory(), snapshot);
    for (number, check) in case.checks.iter().enumerate() {
        match run_check(snapshot, &names, check, options, evaluator) {
            Ok(None) => report.passed += 1,
            Ok(Some(difference)) => report.fail(format!(
                "{place}: check {}: {} {} {} {}/{}: {difference}",
                number + 1,
                check.subject,
                check.direction,
                check.peer,
                check.protocol,
                check.port,
            )),
            Err(error) => report.fail(format!("{place}: check {}: {error}", number + 1)),
        }
    }
    report
}

/// Endpoint numbers and identities by the names that a case uses.
struct CaseNames<'a> {
    endpoints: HashMap<&'a str, u16>,
    identities: HashMap<&'a str, Identity>,
}

impl<'a> CaseNames<'a> {
    fn new(inventory: &'a Inventory, snapshot: &Snapshot) -> Self {
        let numbers: HashMap<&Labels, Identity> = snapshot
            .identities
            .iter()
            .map(|(number, labels)| (labels, *number))
            .collect();
        let mut names = Self {
            endpoints: HashMap::new(),
            identities: HashMap::new(),
        };
        for peer in &inventory.peers {
            if let Some(number) = numbers.get(&peer.labels) {
                names.identities.insert(&peer.name, *number);
            }
        }
        for endpoint in &inventory.endpoints {
            names.endpoints.insert(&endpoint.name, endpoint.id);
            if let Some(state) = snapshot.endpoints.get(&endpoint.id) {
                names.identities.insert(&endpoint.name, state.identity);
            }
        }
        names
    }
}

/// Returns `None` if the verdict is as expected (where `allow` is expected, `audit` will do), else the actual verdict
/// and its cause. An error means that the check is invalid.
fn run_check(
    snapshot: &Snapshot,
    names: &CaseNames<'_>,
    check: &Check,
    options: HttpOptions,
    evaluator: &dyn RequestEvaluator,
) -> Result<Option<String>, String> {
    let subject = *names
        .endpoints
        .get(check.subject.as_str())
        .ok_or_else(|| format!("subject {:?} is not one of the endpoints", check.subject))?;
    let direction = match check.direction.to_ascii_lowercase().as_str() {
        "ingress" => Direction::Ingress,
        "egress" => Direction::Egress,
        other => return Err(format!("direction {other:?} is neither ingress nor egress")),
    };
    let peer = match names.identities.get(check.peer.as_str()) {
        Some(number) => *number,
        None => {
            let address: IpAddr = check.peer.parse().map_err(|_| {
                format!(
                    "peer {:?} is neither a name of the case nor an address",
                    check.peer
                )
            })?;
            snapshot.identity_of(address).identity
        }
    };
    let protocol = protocol_number(&check.protocol)?;
    let entry = snapshot
        .policy_entry(subject, direction, peer, protocol, Some(check.port))
        .ok_or("the compiled policy has no verdict")?;
    let request = request(check)?;
    let (got, rule, refused) = outcome(snapshot, &entry, &request, options, evaluator);
    let expected = check.expect.as_str();
    if !matches!(expected, "allow" | "deny" | "audit") && !expected.starts_with("l7:") {
        return Err(format!(
            "expect {expected:?} is none of allow, deny, audit, l7:http, l7:dns, l7:tls, l7:kafka"
        ));
    }
    if got == expected || (got == "audit" && expected == "allow") {
        return Ok(None);
    }
    let mut because = match snapshot.rules.get(&rule) {
        Some(info) => info.to_string(),
        None => format!("rule {rule}"),
    };
    if let Some(why) = refused {
        because = format!("{because}: {why}");
    }
    Ok(Some(format!("expected {expected}, got {got}: {because}")))
}

/// Returns the verdict, the id of the deciding rule, and the reason of a denial that does not come from a rule.
fn outcome(
    snapshot: &Snapshot,
    entry: &PolicyEntry,
    request: &Request,
    options: HttpOptions,
    evaluator: &dyn RequestEvaluator,
) -> (String, u32, Option<&'static str>) {
    let denied = || {
        let audited = entry.flags & entry_flags::AUDIT != 0;
        if audited {
            "audit".to_owned()
        } else {
            "deny".to_owned()
        }
    };
    match Decision::from_u8(entry.decision) {
        Decision::Allow => ("allow".into(), entry.rule, None),
        Decision::Deny | Decision::DenyExplicit | Decision::AuthRequired | Decision::DenyQuic => {
            (denied(), entry.rule, None)
        }
        Decision::Inspect => {
            let Some(set) = snapshot.rulesets.get(&entry.ruleset) else {
                return ("deny".into(), entry.rule, None);
            };
            if request.is_empty() {
                return (format!("l7:{}", inspector_name(set.reads)), entry.rule, None);
            }
            match accepts_hello(set, request) {
                Some(true) => return (format!("l7:{}", inspector_name(set.reads)), entry.rule, None),
                Some(false) => return (denied(), entry.rule, None),
                None => {}
            }
            if set.reads != request.inspector() {
                return (
                    denied(),
                    entry.rule,
                    Some("the traffic is inspected as another protocol"),
                );
            }
            match decide(evaluator, set, request, options) {
                Ok(rule) => ("allow".into(), rule, None),
                Err(Denial::NoRule) => (denied(), entry.rule, None),
                Err(Denial::Refused { why, .. }) => (denied(), entry.rule, Some(why)),
            }
        }
    }
}

fn request(check: &Check) -> Result<Request, String> {
    let version = check.http.as_ref().and_then(|http| http.version.as_deref());
    let is_http10 = match version {
        None | Some("1.1") => false,
        Some("1.0") => true,
        Some(other) => return Err(format!("version {other:?} is neither \"1.0\" nor \"1.1\"")),
    };
    let http = check.http.as_ref().map(|http| {
        let method = http.method.clone().unwrap_or_else(|| "GET".into());
        // CONNECT names a host and has no path.
        let no_path = if method == "CONNECT" { "" } else { "/" };
        let fields = http.headers.iter();
        HttpRequest {
            path: http.path.clone().unwrap_or_else(|| no_path.into()),
            method,
            host: http.host.clone(),
            is_http10,
            headers: fields
                .flat_map(|(name, values)| values.all().iter().map(|value| (name.clone(), value.clone())))
                .collect(),
        }
    });
    let kafka = match &check.kafka {
        None => None,
        Some(kafka) => {
            let api_key = kafka.api_key.value()?;
            let version = kafka.api_version.as_ref().map(Number::value).transpose()?;
            Some(KafkaRequest {
                api_key,
                api_version: version.or_else(|| last_version(api_key)).unwrap_or_default(),
                client_id: kafka.client_id.clone(),
                topics: kafka.topic.iter().chain(&kafka.topics).cloned().collect(),
            })
        }
    };
    Ok(Request {
        http,
        dns: check.dns.as_ref().map(NameFacts::name),
        tls: check.tls.as_ref().map(NameFacts::name),
        kafka,
    })
}

/// Parses an IP protocol: a name such as `TCP`, or a number.
pub fn protocol_number(name: &str) -> Result<u8, String> {
    Ok(match name.to_ascii_uppercase().as_str() {
        "TCP" => protocol::TCP,
        "UDP" => protocol::UDP,
        "SCTP" => protocol::SCTP,
        "ICMP" | "ICMPV4" => protocol::ICMP,
        "ICMPV6" => protocol::ICMPV6,
        "IGMP" => protocol::IGMP,
        "VRRP" => 112,
        "GRE" => 47,
        "ESP" => 50,
        "AH" => 51,
        other => other
            .parse()
            .map_err(|_| format!("protocol {name:?} is not known; a number (0 to 255) can be given"))?,
    })
}

fn inventory(case: &Case) -> Result<Inventory, String> {
    let options = Options {
        enforcement: match case.config.enforcement.as_str() {
            "default" => Enforcement::Default,
            "always" => Enforcement::Always,
            "never" => Enforcement::Never,
            other => return Err(format!("enforcement {other:?} is none of default, always, never")),
        },
        allow_localhost: match case.config.allow_localhost.as_str() {
            "policy" => false,
            "always" => true,
            other => return Err(format!("allowLocalhost {other:?} is neither policy nor always")),
        },
        dual_stack: case.config.dual_stack,
        audit: case.config.audit,
        clear_text_http2: case.config.http.clear_text_http2,
        some_nics_closed: false,
    };
    let labels = |named: &Named| Labels::new(named.labels.iter().map(|text| parse_label(text)));
    let mut endpoints = Vec::new();
    for (number, (name, named)) in case.endpoints.iter().enumerate() {
        let labels = labels(named);
        let addresses = named.addresses.iter().map(|text| {
            text.parse()
                .map_err(|_| format!("endpoint {name}: {text:?} is not an address"))
        });
        endpoints.push(Endpoint {
            id: u16::try_from(number + 1).map_err(|_| "too many endpoints".to_owned())?,
            name: name.clone(),
            namespace: labels
                .get("k8s", "io.kubernetes.pod.namespace")
                .unwrap_or_default()
                .to_owned(),
            labels,
            named_ports: named_ports(name, named)?,
            addresses: addresses.collect::<Result<_, _>>()?,
            audit: named.audit,
        });
    }
    let mut peers = Vec::new();
    for (name, named) in &case.peers {
        let prefixes = named.addresses.iter().map(|text| {
            text.parse::<IpNet>()
                .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
                .map_err(|_| format!("peer {name}: {text:?} is neither an address nor a prefix"))
        });
        peers.push(Peer {
            name: name.clone(),
            labels: labels(named),
            named_ports: named_ports(name, named)?,
            prefixes: prefixes.collect::<Result<_, _>>()?,
        });
    }
    Ok(Inventory {
        options,
        endpoints,
        peers,
    })
}

/// Parses named ports, as in `{"http": "8080/TCP"}`. Without a protocol the name applies to every protocol.
fn named_ports(whose: &str, named: &Named) -> Result<NamedPorts, String> {
    let mut ports = NamedPorts::new();
    for (name, text) in &named.named_ports {
        let (port, protocol) = match text.split_once('/') {
            Some((port, protocol)) => (port, protocol_number(protocol)?),
            None => (text.as_str(), 0),
        };
        let port = port
            .parse()
            .map_err(|_| format!("{whose}: named port {name}: {text:?} is not like \"8080/TCP\""))?;
        ports.insert(name.to_ascii_lowercase(), NamedPort { protocol, port });
    }
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::l7::Plain;

    fn run(file: &str, text: &str) -> Report {
        super::run(file, text, &Plain)
    }

    const YAML: &str = "\
id: web
policies:
- apiVersion: cilium.io/v2
  kind: CiliumNetworkPolicy
  metadata: {name: web, namespace: shop}
  spec:
    endpointSelector: {matchLabels: {app: web}}
    ingress:
    - fromEndpoints: [{matchLabels: {app: front}}]
      toPorts:
      - ports: [{port: http, protocol: TCP}]
        rules: {http: [{method: GET, path: /public/.*}]}
    egress:
    - toPorts:
      - ports: [{port: '53', protocol: ANY}]
        rules: {dns: [{matchPattern: '*.test'}]}
endpoints:
  web: {labels: ['k8s:app=web', 'k8s:io.kubernetes.pod.namespace=shop'], namedPorts: {http: 8080/TCP}}
peers:
  front: {labels: ['k8s:app=front', 'k8s:io.kubernetes.pod.namespace=shop']}
checks:
- {subject: web, direction: ingress, peer: front, protocol: TCP, port: 8080, expect: 'l7:http'}
- {subject: web, direction: ingress, peer: front, protocol: TCP, port: 8080, expect: allow,
   http: {method: GET, path: /public/a}}
- {subject: web, direction: ingress, peer: front, protocol: TCP, port: 8080, expect: deny,
   http: {method: PUT, path: /public/a}}
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: UDP, port: 53, expect: allow, dns: {name: a.test}}
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: UDP, port: 53, expect: deny, dns: b.other}
";

    #[test]
    fn cases_as_yaml_documents_with_requests() {
        let report = run("web.yaml", YAML);
        assert_eq!(report.lines, [] as [String; 0]);
        assert_eq!(report.summary(), "5 passed, 0 failed");
    }

    const NAMES: &str = "\
id: names
policies:
- apiVersion: cilium.io/v2
  kind: CiliumNetworkPolicy
  metadata: {name: names, namespace: shop}
  spec:
    endpointSelector: {matchLabels: {app: web}}
    egress:
    - toPorts:
      - ports: [{port: '443', protocol: TCP}]
        serverNames: ['api.test', '*.example.com']
    - toPorts:
      - ports: [{port: '80', protocol: TCP}]
        rules: {http: [{method: GET, host: 'a\\.test', headers: ['X-Team: blue']}, {path: /health}]}
endpoints:
  web: {labels: ['k8s:app=web', 'k8s:io.kubernetes.pod.namespace=shop']}
checks:
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: TCP, port: 443, expect: 'l7:tls'}
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: TCP, port: 443, expect: allow, tls: API.test.}
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: TCP, port: 443, expect: allow,
   tls: {serverName: a.example.com}}
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: TCP, port: 443, expect: deny,
   tls: {sni: a.b.example.com}}
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: TCP, port: 443, expect: deny, tls: ''}
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: TCP, port: 443, expect: deny, http: {path: /health}}
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: TCP, port: 80, expect: allow,
   http: {method: GET, path: /, host: a.test, headers: {x-team: blue}}}
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: TCP, port: 80, expect: deny,
   http: {method: GET, path: /, host: b.test, headers: {x-team: blue}}}
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: TCP, port: 80, expect: deny,
   http: {method: GET, path: /, host: a.test, headers: {x-team: red}}}
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: TCP, port: 80, expect: allow,
   http: {method: POST, path: /health}}
- {subject: web, direction: egress, peer: 192.0.2.1, protocol: TCP, port: 80, expect: deny, tls: api.test}
";

    #[test]
    fn requests_with_server_names_hosts_and_headers() {
        let report = run("names.yaml", NAMES);
        assert_eq!(report.lines, [] as [String; 0]);
        assert_eq!(report.summary(), "11 passed, 0 failed");
    }

    #[test]
    fn requests_that_no_rule_allows_pass_in_audit_mode() {
        let audited = NAMES.replace("id: names\n", "id: names\nconfig: {audit: true}\n");
        let report = run("names.yaml", &audited.replace("expect: deny", "expect: audit"));
        assert_eq!(report.lines, [] as [String; 0]);
        assert_eq!(report.summary(), "11 passed, 0 failed");
        let report = run("names.yaml", &audited);
        assert_eq!(report.failed, 6);
    }

    #[test]
    fn a_failed_check_names_the_deciding_rule() {
        let wrong = YAML.replace(
            "peer: front, protocol: TCP, port: 8080, expect: 'l7:http'",
            "peer: front, protocol: TCP, port: 81, expect: allow",
        );
        let report = run("web.yaml", &wrong);
        assert_eq!(report.summary(), "4 passed, 1 failed");
        assert!(
            report.lines[0].starts_with(
                "web.yaml: document 1: web: check 1: web ingress front TCP/81: expected allow, got deny: default deny of \
                 ingress by policy shop/web"
            ),
            "{}",
            report.lines[0]
        );
    }

    #[test]
    fn a_case_without_checks_is_an_error() {
        let empty = run("c.yaml", "id: a\nendpoints: {web: {labels: [app=web]}}\n");
        assert_eq!(empty.summary(), "0 passed, 1 failed");
        assert!(
            empty.lines[0].contains("the case checks nothing"),
            "{:?}",
            empty.lines
        );
        for text in ["", "\n", "# nothing\n", "---\n"] {
            let empty = run("c.yaml", text);
            assert_eq!(empty.lines, ["c.yaml: there is no case in this file"]);
        }
    }

    #[test]
    fn rejected_rules_and_invalid_cases() {
        let lines = concat!(
            r#"{"id":"a","rules":[{"endpointSelector":{}}],"error":true}"#,
            "\n",
            r#"{"id":"b","rules":[{"endpointSelector":{},"ingress":[{}]}],"error":true}"#,
            "\n\n",
            r#"{"id":"c","cheks":[]}"#,
            "\n",
        );
        let report = run("cases.jsonl", lines);
        assert_eq!(report.summary(), "1 passed, 2 failed");
        assert!(
            report.lines[0].contains("cases.jsonl:2: b: expected the rules to be rejected"),
            "{:?}",
            report.lines
        );
        assert!(
            report.lines[1].starts_with("cases.jsonl:4:"),
            "{:?}",
            report.lines
        );
    }
}
