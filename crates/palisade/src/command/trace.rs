//! `palisade policy trace`, and packets that a command line describes.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use palisade_abi::protocol::{ICMP, ICMPV6, SCTP, TCP, UDP};
use palisade_policy::cases;
use palisade_protocols::kafka;

use super::{
    output::{EXIT_NO, EXIT_OK, load_config, show},
    policy::policy_files,
};
use crate::{
    cli::{Output, PacketArgs},
    control::{
        api::{Request, TraceAnswer, TraceHttp, TraceKafka, TraceRequest},
        client::ask,
    },
    daemon,
};

/// Identities of the world, one of each address family.
const WORLDS: [&str; 2] = ["world-ipv4", "world-ipv6"];

/// Runs `palisade policy trace`. With several requests, the packet passes if all pass.
pub(super) fn trace(
    config: &Path,
    socket: &Path,
    requests: Vec<TraceRequest>,
    policies: &[PathBuf],
    output: Output,
) -> anyhow::Result<u8> {
    let mut answers: Vec<TraceAnswer> = Vec::new();
    if policies.is_empty() {
        for request in requests {
            answers.push(ask(socket, &Request::PolicyTrace(request))?);
        }
    } else {
        let Some(config) = load_config(config) else {
            return Ok(EXIT_NO);
        };
        let files = policy_files(policies)?;
        for request in requests {
            answers.push(daemon::trace_offline(&config, files.clone(), &request)?);
        }
    }
    let passes = answers.iter().all(|answer| answer.passes);
    let traces: Vec<_> = answers.iter().map(|answer| &answer.trace).collect();
    match (output, &traces[..]) {
        (Output::Table, _) => show(&answers, output, |answers, out| {
            for (number, answer) in answers.iter().enumerate() {
                if number > 0 {
                    writeln!(out)?;
                }
                writeln!(out, "{}", answer.text)?;
            }
            Ok(())
        })?,
        (_, [one]) => show(one, output, |_, _| Ok(()))?,
        (_, several) => show(&several, output, |_, _| Ok(()))?,
    };
    Ok(if passes { EXIT_OK } else { EXIT_NO })
}

/// Returns the packet that the command line describes.
///
/// # Errors
/// An end is `world`, and nothing else says of which address family.
pub(super) fn trace_request(from: &str, to: Option<&str>, args: &PacketArgs) -> anyhow::Result<TraceRequest> {
    let mut requests = trace_requests(from, to, args)?;
    match requests.len() {
        1 => Ok(requests.remove(0)),
        _ => bail!("world is the identity of two families: write world-ipv4 or world-ipv6, or an address"),
    }
}

/// Returns the packet that the command line describes; if an end is `world`, which has an identity for each address family,
/// and the rest is no packet of one family, a packet for each.
pub(super) fn trace_requests(
    from: &str,
    to: Option<&str>,
    args: &PacketArgs,
) -> anyhow::Result<Vec<TraceRequest>> {
    let request = described(from, to.unwrap_or_default(), args)?;
    let is_world = |end: &str| matches!(end, "world" | "reserved:world");
    let ends = [&request.from, &request.to];
    if !ends.into_iter().any(|end| is_world(end)) {
        return Ok(vec![request]);
    }
    let address = ends.into_iter().find_map(|end| end.parse::<IpAddr>().ok());
    let worlds = match (address, request.protocol) {
        (Some(IpAddr::V4(_)), _) | (None, ICMP) => &WORLDS[..1],
        (Some(IpAddr::V6(_)), _) | (None, ICMPV6) => &WORLDS[1..],
        (None, _) => &WORLDS,
    };
    let with = |world: &str| {
        let mut request = request.clone();
        for end in [&mut request.from, &mut request.to] {
            if is_world(end) {
                world.clone_into(end);
            }
        }
        request
    };
    Ok(worlds.iter().map(|world| with(world)).collect())
}

fn described(from: &str, to: &str, args: &PacketArgs) -> anyhow::Result<TraceRequest> {
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
        to: to.to_owned(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_world_is_of_the_family_of_the_packet_or_of_both() {
        let ends = |from: &str, to: &str, protocol: &str| {
            let port = Some("8".to_owned());
            let args = PacketArgs {
                protocol: Some(protocol.to_owned()),
                port,
                ..PacketArgs::default()
            };
            let ends = trace_requests(from, Some(to), &args).unwrap().into_iter();
            ends.map(|request| format!("{} {}", request.from, request.to))
                .collect::<Vec<_>>()
        };
        assert_eq!(ends("a", "b", "tcp"), ["a b"]);
        assert_eq!(ends("world", "b", "tcp"), ["world-ipv4 b", "world-ipv6 b"]);
        assert_eq!(
            ends("a", "reserved:world", "udp"),
            ["a world-ipv4", "a world-ipv6"]
        );
        assert_eq!(ends("world", "10.0.0.1", "tcp"), ["world-ipv4 10.0.0.1"]);
        assert_eq!(ends("fd00::1", "world", "tcp"), ["fd00::1 world-ipv6"]);
        assert_eq!(ends("world", "b", "icmp"), ["world-ipv4 b"]);
        assert_eq!(ends("world", "b", "icmpv6"), ["world-ipv6 b"]);
        let args = PacketArgs {
            port: Some("80".to_owned()),
            ..PacketArgs::default()
        };
        assert!(trace_request("world", Some("b"), &args).is_err());
        assert_eq!(
            trace_request("world", Some("fd00::1"), &args).unwrap().from,
            "world-ipv6"
        );
    }

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
}
