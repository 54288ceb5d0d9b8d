//! Commands about policy files, most of which need no daemon.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use palisade_inspect::Inspectors;
use palisade_model::{
    diagnostic::{Diagnostic, Severity},
    rule::{L7, Location, Policy, Ports},
};
use palisade_policy::{
    cases::{self, Report},
    compile::{FileContent, ResourceName, already_there, conflicts},
    parse::{Parsed, decode, parse},
};
use palisade_protocols::kafka;
use palisade_secrets::{Store, check_policies};

use super::output::{EXIT_NO, EXIT_OK, load_config, show};
use crate::{
    cli::{Output, PacketArgs},
    config::Config,
    control::{
        api::{Request, TraceAnswer, TraceHttp, TraceKafka, TraceRequest},
        client::ask,
    },
    daemon::{self, policy_file_names, subfolder_names},
};

/// What is wrong with policy files.
#[derive(Debug)]
pub(super) struct Diagnosis {
    /// Number of files.
    pub files: usize,
    /// Number of policies.
    pub policies: usize,
    /// Number of CIDR groups.
    pub groups: usize,
    /// Errors, warnings and notes.
    pub diagnostics: Vec<Diagnostic>,
    /// Remarks about the paths.
    pub notes: Vec<String>,
    /// Paths that cannot be read.
    pub problems: Vec<String>,
    /// Whether a rule needs inspection.
    pub inspects: bool,
}

/// Returns what is wrong with the policy files at these paths. With a configuration the policies are also compiled for its
/// endpoints and peers.
pub(super) fn diagnose(paths: &[PathBuf], config: Option<&Config>) -> anyhow::Result<Diagnosis> {
    let sources = read(paths);
    let mut diagnosis = Diagnosis {
        files: sources.files.len(),
        policies: 0,
        groups: 0,
        diagnostics: Vec::new(),
        notes: sources.notes,
        problems: sources.problems,
        inspects: false,
    };
    for (_, parsed) in &sources.files {
        diagnosis.policies += parsed.policies.len();
        diagnosis.groups += parsed.cidr_groups.len();
        diagnosis.diagnostics.extend(parsed.diagnostics.iter().cloned());
    }
    let contents = contents(&sources.files);
    let all: Vec<Policy> = contents
        .iter()
        .flat_map(|(_, content)| content.policies.iter().cloned())
        .collect();
    diagnosis.inspects = all.iter().any(needs_inspection);
    let mut together = conflicts(&all);
    let doubles = doubles(&contents);
    let compiles = together.is_empty() && doubles.is_empty();
    together.extend(doubles);
    if let Some(config) = config {
        if compiles {
            let parsed = contents
                .into_iter()
                .map(|(path, content)| (path.display().to_string(), Some(content)));
            together.extend(daemon::remarks_offline(config, parsed.collect())?);
        }
        together.extend(secrets(config, &all));
    }
    diagnosis.diagnostics.extend(together);
    Ok(diagnosis)
}

/// Returns whether a rule of the policy has application rules.
fn needs_inspection(policy: &Policy) -> bool {
    let rules = policy.specs.iter().flat_map(|spec| spec.all_rules());
    rules.into_iter().any(|rule| match &rule.ports {
        Ports::OneOf(entries) => entries.iter().any(|entry| entry.l7 != L7::default()),
        Ports::Any => false,
    })
}

/// Runs `palisade policy validate`. With a configuration the policies are also compiled for its endpoints and peers.
pub(super) fn validate(paths: &[PathBuf], quiet: bool, config: Option<&Path>) -> anyhow::Result<u8> {
    let config = match config.map(load_config) {
        Some(None) => return Ok(EXIT_NO),
        Some(config) => config,
        None => None,
    };
    let found = diagnose(paths, config.as_ref())?;
    let mut out = io::stdout().lock();
    let count = |severity| {
        let all = found.diagnostics.iter();
        all.filter(|diagnostic| diagnostic.severity == severity).count()
    };
    for diagnostic in &found.diagnostics {
        if !quiet || diagnostic.severity == Severity::Error {
            writeln!(out, "{diagnostic}")?;
        }
    }
    let errors = count(Severity::Error);
    if !quiet {
        for note in &found.notes {
            writeln!(out, "{note}")?;
        }
        writeln!(
            out,
            "{}, {}, {}: {}, {}",
            plural(found.files, "file"),
            plural(found.policies, "policy"),
            plural(found.groups, "CIDR group"),
            plural(errors, "error"),
            plural(count(Severity::Warning), "warning"),
        )?;
    }
    if !found.problems.is_empty() {
        bail!("{}", found.problems.join("\n"));
    }
    Ok(if errors == 0 { EXIT_OK } else { EXIT_NO })
}

/// Returns the problems of the secrets that the policies name. Without such a secret, the folder is not read: it can be
/// readable by root alone.
fn secrets(config: &Config, policies: &[Policy]) -> Vec<Diagnostic> {
    let interception_ca = config.tls.interception_ca.as_deref();
    if check_policies(policies, &Store::default(), interception_ca).is_empty() {
        return Vec::new();
    }
    let (store, problems) = Store::load(&config.tls.secrets_dir, None);
    let mut found: Vec<Diagnostic> = problems.iter().map(Diagnostic::from).collect();
    found.extend(check_policies(policies, &store, interception_ca));
    found
}

/// Runs `palisade policy test`.
pub(super) fn test(paths: &[PathBuf]) -> anyhow::Result<u8> {
    let mut out = io::stdout().lock();
    let mut total = Report::default();
    for path in paths {
        let shown = path.display().to_string();
        let bytes = fs::read(path).with_context(|| shown.clone())?;
        let report = match decode(&shown, bytes) {
            Ok(text) => cases::run(&shown, &text, &Inspectors::default()),
            Err(problem) => Report {
                lines: vec![problem.to_string()],
                passed: 0,
                failed: 1,
            },
        };
        for line in &report.lines {
            writeln!(out, "{line}")?;
        }
        total.passed += report.passed;
        total.failed += report.failed;
    }
    writeln!(out, "{}", total.summary())?;
    Ok(if total.failed == 0 { EXIT_OK } else { EXIT_NO })
}

/// Returns the packet that the command line describes.
pub(super) fn trace_request(from: &str, to: Option<&str>, args: &PacketArgs) -> anyhow::Result<TraceRequest> {
    for end in [Some(from), to].into_iter().flatten() {
        if matches!(end, "world" | "reserved:world") {
            bail!("world is the identity of two families: write world-ipv4 or world-ipv6, or an address");
        }
    }
    let usual = match (&args.dns, &args.http, &args.sni, &args.kafka) {
        _ if args.protocol.is_some() => None,
        (Some(_), ..) => Some("53/udp"),
        (_, Some(_), Some(_), _) => Some("443/tcp"),
        (_, Some(line), ..) if line.contains(" https://") => Some("443/tcp"),
        (_, Some(_), ..) => Some("80/tcp"),
        (_, _, Some(_), _) => Some("443/tcp"),
        (.., Some(_)) => Some("9092/tcp"),
        (None, None, None, None) => None,
    };
    let (protocol, port) = protocol_and_port(args.protocol.as_deref(), args.port.as_deref().or(usual))?;
    Ok(TraceRequest {
        from: from.to_owned(),
        to: to.unwrap_or_default().to_owned(),
        to_fqdn: args.to_fqdn.clone(),
        dns: args.dns.clone(),
        http: args
            .http
            .as_ref()
            .map(|line| http_request(line, &args.headers))
            .transpose()?,
        tls: args.sni.clone(),
        kafka: args
            .kafka
            .as_ref()
            .map(|text| kafka_request(text, args.client_id.clone()).map(Box::new))
            .transpose()?,
        protocol,
        port,
    })
}

/// Returns the protocol and the port that `--protocol` and `--port` give. The default protocol is TCP.
fn protocol_and_port(protocol: Option<&str>, port: Option<&str>) -> anyhow::Result<(u8, u16)> {
    let (port, with_port) = match port.map(|port| port.split_once('/').unwrap_or((port, ""))) {
        None => (None, None),
        Some((port, protocol)) => (Some(port), Some(protocol).filter(|name| !name.is_empty())),
    };
    let name = match (protocol, with_port) {
        (Some(one), Some(other)) if !one.eq_ignore_ascii_case(other) => {
            bail!("--protocol {one} and --port .../{other}: say one of them")
        }
        (Some(name), _) | (None, Some(name)) => name,
        (None, None) => "TCP",
    };
    let protocol = cases::protocol_number(&name.to_ascii_uppercase()).map_err(anyhow::Error::msg)?;
    let port = match port {
        Some(port) => port
            .parse()
            .with_context(|| format!("--port {port}: write a number, like 8080 or 53/udp"))?,
        None => {
            use palisade_abi::protocol::{ICMP, ICMPV6, SCTP, TCP, UDP};
            if [TCP, UDP, SCTP, ICMP, ICMPV6].contains(&protocol) {
                bail!("{name} needs --port (for ICMP the type: 8 is an IPv4 ping, 128 an IPv6 one)");
            }
            0
        }
    };
    Ok((protocol, port))
}

/// Returns the request of `--kafka` and `--client-id`.
fn kafka_request(text: &str, client_id: Option<String>) -> anyhow::Result<TraceKafka> {
    let wrong = || {
        format!("--kafka '{text}': write an API key and topics, like 'metadata' or 'fetch/12 orders bills'")
    };
    let mut words = text.split_ascii_whitespace();
    let first = words.next().with_context(wrong)?;
    let (key, version) = match first.split_once('/') {
        Some((key, version)) => (key, Some(version)),
        None => (first, None),
    };
    let api_key = key
        .parse()
        .ok()
        .or_else(|| kafka::api_key(key))
        .with_context(wrong)?;
    let version = version
        .map(|version| version.parse().with_context(wrong))
        .transpose()?;
    Ok(TraceKafka {
        api_key,
        api_version: version
            .or_else(|| kafka::last_version(api_key))
            .unwrap_or_default(),
        client_id,
        topics: words.map(str::to_owned).collect(),
    })
}

/// Returns the request of `--http` and `--header`.
pub(super) fn http_request(line: &str, headers: &[String]) -> anyhow::Result<TraceHttp> {
    let wrong =
        || format!("--http '{line}': write METHOD and path or URL, like 'GET /x' or 'GET http://host/x'");
    let is_token = |text: &str| {
        let all = text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte));
        all && !text.is_empty()
    };
    let bare = [" HTTP/1.1", " HTTP/1.0"]
        .iter()
        .find_map(|version| line.strip_suffix(version));
    let (method, target) = bare.unwrap_or(line).split_once(' ').with_context(wrong)?;
    if !is_token(method) || !target.bytes().all(|byte| byte.is_ascii_graphic()) {
        bail!(wrong());
    }
    let mut request = TraceHttp {
        method: method.to_owned(),
        is_http10: line.ends_with(" HTTP/1.0"),
        ..TraceHttp::default()
    };
    let scheme = ["http://", "https://"].into_iter().find(|scheme| {
        target
            .get(..scheme.len())
            .is_some_and(|begin| begin.eq_ignore_ascii_case(scheme))
    });
    if let Some(scheme) = scheme {
        let rest = &target[scheme.len()..];
        let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if host.is_empty() || host.contains('?') {
            bail!(wrong());
        }
        host.clone_into(&mut request.host);
        if path.is_empty() { "/" } else { path }.clone_into(&mut request.path);
    } else if method == "CONNECT" {
        // The target is only a host, so the path is empty.
        target.clone_into(&mut request.host);
    } else if target.starts_with('/') || target == "*" {
        target.clone_into(&mut request.path);
    } else {
        bail!(wrong());
    }
    for header in headers {
        let (name, value) = header
            .split_once(':')
            .filter(|(name, _)| is_token(name))
            .with_context(|| format!("--header '{header}': write NAME: VALUE"))?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("host") {
            if !request.host.is_empty() && !request.host.eq_ignore_ascii_case(value) {
                bail!("--header '{header}': the request names {} already", request.host);
            }
            value.clone_into(&mut request.host);
        } else {
            request.headers.push((name.to_owned(), value.to_owned()));
        }
    }
    Ok(request)
}

/// Runs `palisade policy trace`.
pub(super) fn trace(
    config: &Path,
    socket: &Path,
    request: TraceRequest,
    policies: &[PathBuf],
    output: Output,
) -> anyhow::Result<u8> {
    let answer: TraceAnswer = if policies.is_empty() {
        ask(socket, &Request::PolicyTrace(request))?
    } else {
        let Some(config) = load_config(config) else {
            return Ok(EXIT_NO);
        };
        daemon::trace_offline(&config, policy_files(policies)?, &request)?
    };
    let passes = answer.passes;
    match output {
        Output::Table => show(&answer, output, |answer, out| writeln!(out, "{}", answer.text))?,
        _ => show(&answer.trace, output, |_, _| Ok(()))?,
    };
    Ok(if passes { EXIT_OK } else { EXIT_NO })
}

/// Returns the contents of the policy files at these paths. Prints the diagnostics of the files.
///
/// # Errors
/// A file cannot be read, or has errors.
pub(super) fn policy_files(paths: &[PathBuf]) -> anyhow::Result<BTreeMap<String, Option<FileContent>>> {
    let sources = read(paths);
    for (_, parsed) in &sources.files {
        for diagnostic in &parsed.diagnostics {
            eprintln!("{diagnostic}");
        }
    }
    for problem in &sources.problems {
        eprintln!("{problem}");
    }
    if sources.has_errors() {
        bail!("the policies have errors; a packet is only explained by policies that could be in force");
    }
    let files = contents(&sources.files).into_iter();
    Ok(files
        .map(|(path, content)| (path.display().to_string(), Some(content)))
        .collect())
}

fn plural(count: usize, what: &str) -> String {
    match (count, what.strip_suffix('y')) {
        (1, _) => format!("1 {what}"),
        (_, Some(stem)) => format!("{count} {stem}ies"),
        (_, None) => format!("{count} {what}s"),
    }
}

/// Policy files at the paths of a command line.
#[derive(Debug, Default)]
struct Sources {
    files: Vec<(PathBuf, Parsed)>,
    /// Paths without a readable policy file.
    problems: Vec<String>,
    /// Files that were skipped.
    notes: Vec<String>,
}

impl Sources {
    fn has_errors(&self) -> bool {
        !self.problems.is_empty() || self.files.iter().any(|(_, parsed)| parsed.has_errors())
    }

    fn add(&mut self, path: PathBuf, bytes: io::Result<Vec<u8>>) {
        let shown = path.display().to_string();
        match bytes.map(|bytes| decode(&shown, bytes)) {
            Ok(Ok(text)) => self.files.push((path, parse(&shown, &text))),
            Ok(Err(problem)) => {
                let parsed = Parsed {
                    diagnostics: vec![problem],
                    ..Parsed::default()
                };
                self.files.push((path, parsed));
            }
            Err(error) => self.problems.push(format!("{shown}: {error}")),
        }
    }

    fn add_folder(&mut self, path: &Path) {
        let shown = path.display();
        let names = match policy_file_names(path) {
            Ok(names) => names,
            Err(error) => return self.problems.push(format!("{shown}: {error}")),
        };
        if names.is_empty() {
            self.problems.push(format!(
                "{shown}: there is no policy file (*.yaml, *.yml, *.json) in this folder"
            ));
        }
        for name in names {
            let file = path.join(name);
            // A directory that is named like a policy file counts as a broken policy file, as in the daemon.
            self.add(file.clone(), fs::read(file));
        }
        let folders: Vec<String> = subfolder_names(path).into_iter().collect();
        if !folders.is_empty() {
            self.notes.push(format!(
                "{shown}: note: subfolders are not read: {}",
                folders.join(", ")
            ));
        }
    }
}

/// Reads and parses files, the policy files of folders, and for `-` the standard input. After a path that cannot be
/// read, the other paths are still read.
fn read(paths: &[PathBuf]) -> Sources {
    let mut sources = Sources::default();
    for path in paths {
        if path.as_os_str() == "-" {
            let mut bytes = Vec::new();
            let read = io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes);
            sources.add("<stdin>".into(), read);
        } else if path.is_dir() {
            sources.add_folder(path);
        } else {
            sources.add(path.clone(), fs::read(path));
        }
    }
    sources
}

fn contents(files: &[(PathBuf, Parsed)]) -> Vec<(PathBuf, FileContent)> {
    let content = |parsed: &Parsed| FileContent {
        policies: parsed.policies.clone(),
        cidr_groups: parsed.cidr_groups.clone(),
    };
    files
        .iter()
        .map(|(path, parsed)| (path.clone(), content(parsed)))
        .collect()
}

/// Returns an error for each resource that several files contain. The daemon takes the first file and refuses the
/// others.
fn doubles(files: &[(PathBuf, FileContent)]) -> Vec<Diagnostic> {
    let mut seen: BTreeMap<ResourceName, &Location> = BTreeMap::new();
    let mut found = Vec::new();
    for (resource, location) in files.iter().flat_map(|(_, content)| content.resources()) {
        match seen.get(&resource) {
            Some(first) => found.push(already_there(&resource, location, first)),
            None => {
                seen.insert(resource, location);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_described_in_several_ways() {
        let read = protocol_and_port;
        assert_eq!(read(None, Some("80")).unwrap(), (6, 80));
        assert_eq!(read(None, Some("53/udp")).unwrap(), (17, 53));
        assert_eq!(read(Some("icmp"), Some("8")).unwrap(), (1, 8));
        assert_eq!(read(Some("112"), None).unwrap(), (112, 0));
        assert!(read(None, None).is_err());
        assert!(read(Some("tcp"), Some("53/udp")).is_err());
        assert!(read(None, Some("http")).is_err());
        assert!(read(Some("quic"), Some("443")).is_err());
    }

    #[test]
    fn requests_are_described_in_several_ways() {
        let read = |line: &str, headers: &[&str]| {
            let headers: Vec<String> = headers.iter().map(ToString::to_string).collect();
            http_request(line, &headers).map(|http| (http.method, http.host, http.path, http.headers))
        };
        let is = |method: &str, host: &str, path: &str, headers: &[(&str, &str)]| {
            let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
            (
                method.to_owned(),
                host.to_owned(),
                path.to_owned(),
                headers.collect(),
            )
        };
        assert_eq!(read("GET /x?y=1", &[]).unwrap(), is("GET", "", "/x?y=1", &[]));
        assert_eq!(
            read("PUT HTTP://a.test:8080/x", &["X-A: 1", "X-B:"]).unwrap(),
            is("PUT", "a.test:8080", "/x", &[("X-A", "1"), ("X-B", "")])
        );
        assert_eq!(
            read("GET http://a.test", &[]).unwrap(),
            is("GET", "a.test", "/", &[])
        );
        assert_eq!(
            read("GET /x", &["Host: a.test"]).unwrap(),
            is("GET", "a.test", "/x", &[])
        );
        assert_eq!(read("GET /x HTTP/1.1", &[]).unwrap(), is("GET", "", "/x", &[]));
        assert_eq!(read("GET /x HTTP/1.0", &[]).unwrap(), is("GET", "", "/x", &[]));
        assert!(http_request("GET /x HTTP/1.0", &[]).unwrap().is_http10);
        assert!(!http_request("GET /x HTTP/1.1", &[]).unwrap().is_http10);
        assert_eq!(read("OPTIONS *", &[]).unwrap(), is("OPTIONS", "", "*", &[]));
        assert_eq!(
            read("CONNECT a.test:443", &[]).unwrap(),
            is("CONNECT", "a.test:443", "", &[])
        );
        for (line, headers) in [
            ("/x", &[][..]),
            ("GET", &[]),
            ("GET x", &[]),
            ("GET  /x", &[]),
            ("GET /x y", &[]),
            (" /x", &[]),
            ("GET http:///x", &[]),
            ("GET /x", &["X-A 1"]),
            ("GET /x", &["X A: 1"]),
            ("GET http://a.test/", &["host: b.test"]),
        ] {
            assert!(read(line, headers).is_err(), "{line} {headers:?}");
        }
    }

    #[test]
    fn kafka_requests_have_a_key_a_version_and_topics() {
        let read = |text: &str| {
            kafka_request(text, None).map(|kafka| (kafka.api_key, kafka.api_version, kafka.topics.join(",")))
        };
        let last = |key: i16| kafka::last_version(key).unwrap();
        assert_eq!(read("metadata").unwrap(), (3, last(3), String::new()));
        assert_eq!(read("Produce orders").unwrap(), (0, last(0), "orders".into()));
        assert_eq!(read("fetch/12 a  b.c").unwrap(), (1, 12, "a,b.c".into()));
        assert_eq!(read("200").unwrap(), (200, 0, String::new()));
        for text in ["", " ", "unknown", "fetch/", "fetch/x", "/1", "70000"] {
            assert!(read(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nouns_follow_their_number() {
        assert_eq!(plural(1, "policy"), "1 policy");
        assert_eq!(plural(2, "policy"), "2 policies");
        assert_eq!(plural(0, "file"), "0 files");
    }
}
