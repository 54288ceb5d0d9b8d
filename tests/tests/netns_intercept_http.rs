//! HTTP requests that the proxy evaluates, over TLS and in clear text: changes of headers, and flow records.

use std::net::SocketAddr;

use palisade_testbed::{
    Daemon,
    topology::FAMILIES,
    web::{Curl, curl},
};
use palisade_tests::{
    OPEN,
    fixtures::{
        intercept::{Lab, RULES, lab},
        python::NodeServer,
    },
    setup::XDP_AT_THE_NIC,
};
use serde_json::Value;

const CLEAR: u16 = 80;
const HTTPS: u16 = 443;
const H2C: u16 = 8080;
const NAME: &str = "www.web.example";

/// Starts the server at a name.
fn server_at(lab: &Lab, name: &str) -> NodeServer {
    let ports = [CLEAR, HTTPS, H2C];
    NodeServer::start(lab.apps.ns(name), ports, &lab.apps.both(name), &lab.server).expect("server")
}

/// Requests a URL with curl: over TLS on port [`HTTPS`], else in clear text.
fn ask(lab: &Lab, from: &str, at: SocketAddr, path: &str, more: &[&str]) -> Curl {
    if at.port() == HTTPS {
        return lab.ask(from, NAME, at, path, more);
    }
    let url = format!("http://{at}{path}");
    curl(lab.apps.ns(from), &[more, &[&url]].concat(), OPEN).expect("curl")
}

// --- changes of headers ------------------------------------------------------------------------------------------------

/// All actions, and a secret with and without one.
const ACTIONS: &str = "path: \"/allowed.*\", headerMatches: [{name: X-Added, value: by-policy, mismatch: ADD}, \
                       {name: X-Token, secret: {namespace: default, name: token}, mismatch: REPLACE}, \
                       {name: X-Gone, value: never, mismatch: DELETE}, \
                       {name: X-Key, secret: {namespace: default, name: key}}]}]";
/// Values of the secrets.
const SECRETS: [&str; 2] = ["token of the secret", "key of the secret"];

/// Returns the values of a header that the server has got.
fn values<'a>(request: &'a Value, name: &str) -> Vec<&'a str> {
    let all = request["headers"].as_array().into_iter().flatten();
    all.filter(|pair| pair[0].as_str().is_some_and(|n| n.eq_ignore_ascii_case(name)))
        .filter_map(|pair| pair[1].as_str())
        .collect()
}

/// Out of a workload, into one, and between two, where the proxy changes the request at both ends. With each `version`, an
/// option of curl and the version that the server sees.
fn headers_are_changed(port: u16, rules: &str, tables: &str, versions: &[(&str, &str)]) {
    let lab = lab();
    let [token, key] = SECRETS;
    for (name, value) in [("token", token), ("key", key)] {
        lab.secrets
            .write(name, "value", value.as_bytes())
            .expect("secret");
    }
    let servers = ["internet", "server"].map(|name| (name, server_at(&lab, name)));
    let rules = rules.replace("path: \"/allowed.*\"}]", ACTIONS);
    let daemon = lab.on_all_paths_with(XDP_AT_THE_NIC, tables, &[port], &rules);
    let given = |name: &str, value: &str| ["-H".to_owned(), format!("{name}: {value}")];
    for (from, to) in [
        ("client", "internet"),
        ("internet", "server"),
        ("client", "server"),
    ] {
        let (_, server) = servers.iter().find(|(name, _)| *name == to).expect("a server");
        for family in FAMILIES {
            for (option, version) in versions {
                let at = lab.apps.at(to, family, port);
                let case = format!("{from} -> {at} {option}");
                let send = |path: &str, headers: &[[String; 2]]| {
                    let path = format!("/allowed/{from}/{family:?}/{version}/{path}");
                    let headers = headers.iter().flatten().map(String::as_str);
                    let args: Vec<&str> = std::iter::once(*option).chain(headers).collect();
                    let got = ask(&lab, from, at, &path, &args);
                    let requests = server.requests();
                    let request = requests.into_iter().find(|request| request["path"] == *path);
                    (got, request)
                };
                let passes = |path: &str, headers: &[[String; 2]]| {
                    let (got, request) = send(path, headers);
                    assert_eq!(got.status, 200, "{case}: {got:?}\n{}", daemon.report());
                    let request = request.unwrap_or_else(|| panic!("{case}: {got:?}"));
                    assert_eq!(request["version"], *version, "{case}: {request}");
                    request
                };

                // Every header has another value than the rule says.
                let request = passes(
                    "other",
                    &[
                        given("X-Token", "of the client"),
                        given("X-Gone", "secret"),
                        given("X-Gone", "never"),
                        given("X-Kept", "kept"),
                        given("X-Key", key),
                    ],
                );
                assert_eq!(values(&request, "x-added"), ["by-policy"], "{case}: {request}");
                assert_eq!(values(&request, "x-token"), [token], "{case}: {request}");
                assert_eq!(values(&request, "x-gone"), [""; 0], "{case}: {request}");
                assert_eq!(values(&request, "x-kept"), ["kept"], "{case}: {request}");
                assert_eq!(values(&request, "x-key"), [key], "{case}: {request}");

                // Headers that the rule does not change, and one to which it adds a value.
                let request = passes(
                    "equal",
                    &[
                        given("X-Added", "by-policy"),
                        given("X-Token", token),
                        given("X-Gone", "never"),
                        given("X-Key", key),
                    ],
                );
                assert_eq!(values(&request, "x-added"), ["by-policy"], "{case}: {request}");
                assert_eq!(values(&request, "x-token"), [token], "{case}: {request}");
                assert_eq!(values(&request, "x-gone"), ["never"], "{case}: {request}");
                let headers = [given("X-Added", "by-client"), given("X-Key", key)];
                let request = passes("missing", &headers);
                assert_eq!(
                    values(&request, "x-added"),
                    ["by-client", "by-policy"],
                    "{case}: {request}"
                );
                assert_eq!(values(&request, "x-token"), [token], "{case}: {request}");

                // A secret without an action denies other values.
                for headers in [&[][..], &[given("X-Key", "of the client")]] {
                    let (got, request) = send("denied", headers);
                    assert_eq!(got.status, 403, "{case}: {got:?}\n{}", daemon.report());
                    assert_eq!(request, None, "{case}");
                }
            }
        }
    }
    for text in [
        daemon.log(),
        daemon.cli(&["observe", "-o", "json", "--all"]).expect("flows"),
    ] {
        assert!(!text.contains("of the secret"), "{text}");
    }
}

/// Contents of an entry of `toPorts` without TLS.
const CLEAR_RULES: &str = "      rules:\n        http: [{method: \"GET\", path: \"/allowed.*\"}]\n";

#[test]
fn header_actions_reach_the_server_over_tls() {
    headers_are_changed(HTTPS, RULES, "", &[("--http1.1", "1.1"), ("--http2", "2.0")]);
}

#[test]
fn header_actions_reach_the_server_on_port_80() {
    headers_are_changed(CLEAR, CLEAR_RULES, "", &[("--http1.1", "1.1")]);
}

#[test]
fn header_actions_reach_the_server_over_http2_in_clear_text() {
    let tables = "[http]\nclear_text_http2 = true\n";
    headers_are_changed(H2C, CLEAR_RULES, tables, &[("--http2-prior-knowledge", "2.0")]);
}

// --- flow records ------------------------------------------------------------------------------------------------------

/// Waits for a flow record of the application that satisfies `wanted`.
#[track_caller]
fn wait(daemon: &Daemon, filters: &[&str], what: &str, wanted: &dyn Fn(&Value) -> bool) {
    let filters = [&["--type", "l7"], filters].concat();
    daemon
        .wait_flows(&filters, what, |flows| flows.iter().any(wanted))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

#[test]
fn flow_records_of_intercepted_requests_name_request_response_verdict_and_rule() {
    let lab = lab();
    let _server = server_at(&lab, "internet");
    let daemon = lab.client_only(&[HTTPS], RULES);
    for family in FAMILIES {
        let at = lab.apps.at("internet", family, HTTPS);
        let from = lab.apps.topology.addr("client", family).to_string();
        let to = at.ip().to_string();
        for (option, protocol) in [("--http1.1", "HTTP/1.1"), ("--http2", "HTTP/2")] {
            let what = |part: &str| format!("the {part} of {protocol} to {at}");
            let options = [option, "-H", "Authorization: Bearer hidden"];
            let path = "/allowed/slow?token=hidden&n=1";
            let shown = format!("https://{NAME}/allowed/slow?token=[redacted]&n=1");
            assert_eq!(
                ask(&lab, "client", at, path, &options).status,
                200,
                "{}",
                what("request")
            );
            let got = ask(&lab, "client", at, "/denied/flow?n=1&api_key=hidden", &options);
            assert_eq!(got.status, 403, "{got:?}");
            let filters = ["--from-ip", &from, "--to-ip", &to, "--verdict"];
            let allowed = [&filters[..], &["FORWARDED"]].concat();
            wait(&daemon, &allowed, &what("request"), &|flow| {
                let http = &flow["l7"]["http"];
                flow["l7"]["type"] == "REQUEST"
                    && http["method"] == "GET"
                    && http["protocol"] == protocol
                    && http["url"] == *shown
                    && flow["egress_allowed_by"][0]["name"] == "client-egress"
            });
            let reply = ["--from-ip", &to, "--to-ip", &from, "--reply", "true"];
            wait(&daemon, &reply, &what("response"), &|flow| {
                let http = &flow["l7"]["http"];
                let latency = &flow["l7"]["latency_ns"];
                let latency = latency.as_u64().or_else(|| latency.as_str()?.parse().ok());
                flow["l7"]["type"] == "RESPONSE"
                    && (&http["code"], &http["method"]) == (&Value::from(200), &Value::from("GET"))
                    && http["protocol"] == protocol
                    && http["url"] == *shown
                    // The server waits for 0.3 seconds.
                    && latency.is_some_and(|ns| ns >= 250_000_000)
            });
            let denied = [&filters[..], &["DROPPED"]].concat();
            wait(&daemon, &denied, &what("refusal"), &|flow| {
                let http = &flow["l7"]["http"];
                flow["drop_reason"] == 240
                    && http["protocol"] == protocol
                    && http["url"] == format!("https://{NAME}/denied/flow?n=1&api_key=[redacted]")
                    && flow["egress_denied_by"][0]["name"] == "client-egress"
            });
        }
    }
    let observed = daemon.cli(&["observe", "-o", "json", "--all"]).expect("flows");
    for text in [observed, daemon.log()] {
        assert!(!text.contains("hidden"), "{text}");
    }
}
