//! Commands about policies that need no daemon.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use palisade_policy::{
    cases::{self, Report},
    compile::{FileContent, conflicts},
    diagnostic::{Diagnostic, Severity},
    parse::{Parsed, parse},
    rule::Policy,
};

use super::{DONE, NO, load_config, show};
use crate::{
    cli::{Output, TraceArgs},
    control::{
        api::{Request, TraceAnswer, TraceHttp, TraceRequest},
        client::ask,
    },
    daemon::{self, policy_file_names},
};

/// `palisade policy validate`.
pub fn validate(paths: &[PathBuf], quiet: bool) -> anyhow::Result<u8> {
    let files = read(paths)?;
    let mut counts: BTreeMap<Severity, usize> = BTreeMap::new();
    let (mut policies, mut groups) = (0, 0);
    let mut out = io::stdout().lock();
    for (_, parsed) in &files {
        policies += parsed.policies.len();
        groups += parsed.cidr_groups.len();
        for diagnostic in &parsed.diagnostics {
            *counts.entry(diagnostic.severity).or_default() += 1;
            if !quiet || diagnostic.severity == Severity::Error {
                writeln!(out, "{diagnostic}")?;
            }
        }
    }
    let all: Vec<Policy> = files
        .iter()
        .flat_map(|(_, parsed)| parsed.policies.iter().cloned())
        .collect();
    for diagnostic in conflicts(&all) {
        *counts.entry(diagnostic.severity).or_default() += 1;
        writeln!(out, "{diagnostic}")?;
    }
    for diagnostic in doubles(&files) {
        *counts.entry(diagnostic.severity).or_default() += 1;
        if !quiet {
            writeln!(out, "{diagnostic}")?;
        }
    }
    let count = |severity| counts.get(&severity).copied().unwrap_or(0);
    let errors = count(Severity::Error);
    if !quiet {
        writeln!(
            out,
            "{}, {}, {}: {}, {}",
            plural(files.len(), "file"),
            plural(policies, "policy"),
            plural(groups, "CIDR group"),
            plural(errors, "error"),
            plural(count(Severity::Warning), "warning"),
        )?;
    }
    Ok(if errors == 0 { DONE } else { NO })
}

/// `palisade policy test`.
pub fn test(paths: &[PathBuf]) -> anyhow::Result<u8> {
    let mut out = io::stdout().lock();
    let mut total = Report::default();
    for path in paths {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let report = cases::run(&path.display().to_string(), &text);
        for line in &report.lines {
            writeln!(out, "{line}")?;
        }
        total.passed += report.passed;
        total.failed += report.failed;
    }
    writeln!(out, "{}", total.summary())?;
    Ok(if total.failed == 0 { DONE } else { NO })
}

/// The packet that is asked about.
pub fn trace_request(args: &TraceArgs) -> anyhow::Result<TraceRequest> {
    let usual = match (&args.dns, &args.http, &args.sni) {
        _ if args.protocol.is_some() => None,
        (Some(_), ..) => Some("53/udp"),
        (_, Some(_), _) => Some("80/tcp"),
        (.., Some(_)) => Some("443/tcp"),
        (None, None, None) => None,
    };
    let (protocol, port) = protocol_and_port(args.protocol.as_deref(), args.port.as_deref().or(usual))?;
    Ok(TraceRequest {
        from: args.from.clone(),
        to: args.to.clone().unwrap_or_default(),
        to_fqdn: args.to_fqdn.clone(),
        dns: args.dns.clone(),
        http: args
            .http
            .as_ref()
            .map(|line| http_request(line, &args.headers))
            .transpose()?,
        tls: args.sni.clone(),
        protocol,
        port,
    })
}

/// What `--protocol` and `--port` say. Without a protocol it is TCP.
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

/// The request of `--http` and `--header`.
pub fn http_request(line: &str, headers: &[String]) -> anyhow::Result<TraceHttp> {
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
        // It names a host and has no path.
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

/// `palisade policy trace`.
pub fn trace(
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
            return Ok(NO);
        };
        let mut errors = 0;
        let mut files = BTreeMap::new();
        for (path, parsed) in read(policies)? {
            for diagnostic in &parsed.diagnostics {
                eprintln!("{diagnostic}");
            }
            errors += usize::from(parsed.has_errors());
            let content = FileContent {
                policies: parsed.policies,
                cidr_groups: parsed.cidr_groups,
            };
            files.insert(path.display().to_string(), Some(content));
        }
        if errors > 0 {
            bail!("the policies have errors; a packet is only explained by policies that could be in force");
        }
        daemon::trace_offline(&config, files, &request)?
    };
    let passes = answer.passes;
    match output {
        Output::Json => show(&answer.trace, output, |_, _| Ok(()))?,
        Output::Table => show(&answer, output, |answer, out| writeln!(out, "{}", answer.text))?,
    };
    Ok(if passes { DONE } else { NO })
}

fn plural(count: usize, what: &str) -> String {
    match (count, what.strip_suffix('y')) {
        (1, _) => format!("1 {what}"),
        (_, Some(stem)) => format!("{count} {stem}ies"),
        (_, None) => format!("{count} {what}s"),
    }
}

/// Reads and parses files, and the policy files of folders.
pub fn read(paths: &[PathBuf]) -> anyhow::Result<Vec<(PathBuf, Parsed)>> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            let names = policy_file_names(path).with_context(|| path.display().to_string())?;
            for name in names {
                files.push(read_file(path.join(name))?);
            }
        } else {
            files.push(read_file(path.clone())?);
        }
    }
    Ok(files)
}

fn read_file(path: PathBuf) -> anyhow::Result<(PathBuf, Parsed)> {
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let parsed = parse(&path.display().to_string(), &text);
    Ok((path, parsed))
}

/// Resources of which there are two: both count, but it is hardly meant.
fn doubles(files: &[(PathBuf, Parsed)]) -> Vec<Diagnostic> {
    let mut seen = BTreeMap::new();
    let mut found = Vec::new();
    for (_, parsed) in files {
        let policies = parsed.policies.iter().map(|policy| {
            let what = format!("{:?} {}", policy.kind, policy.qualified_name());
            (
                what,
                format!("policy {}", policy.qualified_name()),
                &policy.location,
            )
        });
        let groups = parsed.cidr_groups.iter().map(|group| {
            let what = format!("CiliumCIDRGroup {}", group.name);
            (what.clone(), what, &group.location)
        });
        for (key, what, location) in policies.chain(groups) {
            match seen.get(&key) {
                Some(first) => found.push(Diagnostic {
                    severity: Severity::Warning,
                    location: location.clone(),
                    message: format!("{what} is in {first} already; both are in force"),
                }),
                None => {
                    seen.insert(key, location.clone());
                }
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
    fn words_are_counted() {
        assert_eq!(plural(1, "policy"), "1 policy");
        assert_eq!(plural(2, "policy"), "2 policies");
        assert_eq!(plural(0, "file"), "0 files");
    }
}
