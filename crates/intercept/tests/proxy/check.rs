//! The check of a server for people.

use std::net::SocketAddr;

use palisade_abi::Direction;
use palisade_inspect::stream::StreamContext;
use palisade_intercept::{CheckRequest, CheckStep};
use palisade_model::rule::FqdnPattern;
use rcgen::date_time_ymd;

use crate::world::{NAME, World, accept, http_rules, serve_http, server_config};

fn check(world: &World, server: SocketAddr, name: Option<&str>) -> (Vec<String>, Option<CheckStep>) {
    let request = CheckRequest {
        context: StreamContext {
            request: world.flows.request.lock().expect("the flows").expect("a flow"),
            direction: Direction::Egress,
            client: SocketAddr::from(([127, 0, 0, 1], 0)),
            server,
            ifindex: 0,
        },
        name: name.map(str::to_owned),
        protocols: vec!["h2".into(), "http/1.1".into()],
        from_node: true,
    };
    let steps = world.proxy.check(&request);
    let failed = steps.iter().find(|step| !step.is_ok).cloned();
    (steps.into_iter().map(|step| step.text).collect(), failed)
}

#[track_caller]
fn says(steps: &[String], words: &str) {
    assert!(
        steps.iter().any(|step| step.contains(words)),
        "{words}: {steps:#?}"
    );
}

#[test]
fn a_check_says_what_both_sides_get() {
    let mut set = http_rules(&["/.*"]);
    set.terminating_tls.as_mut().expect("terminating").secret = "ns/ca".into();
    let world = World::new(set);
    let mut config = server_config(world.server_ca.issue(NAME, |_| {}));
    config.alpn_protocols = vec![b"h2".to_vec()];
    let server = world.server(move |socket| serve_http(&mut accept(config.clone(), socket)));
    let (steps, failed) = check(&world, server, Some(NAME));
    assert_eq!(failed, None);
    says(
        &steps,
        "the client gets the certificate of secret ns/ca, made for the name: subject \"CN=api.example.test\"",
    );
    says(
        &steps,
        "ClientHello with server name api.example.test and application protocols h2, http/1.1",
    );
    says(&steps, "names api.example.test, issuer \"CN=server ca\"");
    says(&steps, "the certificate is valid for api.example.test");
    says(&steps, "TLSv1.3 with TLS13_");
    says(&steps, "application protocol h2");
}

#[test]
fn a_check_names_the_failure() {
    let mut set = http_rules(&["/.*"]);
    set.server_names = vec![FqdnPattern::Pattern("*.example.test".into())];
    let world = World::new(set);
    let expired = world.server_ca.issue(NAME, |params| {
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(2002, 1, 1);
    });
    let config = server_config(expired);
    let server = world.server(move |socket| serve_http(&mut accept(config.clone(), socket)));
    let (steps, failed) = check(&world, server, Some(NAME));
    says(&steps, "certificate from the server: subject");
    assert!(
        failed.is_some_and(|step| step.text.starts_with("certificate expired")),
        "{steps:#?}"
    );
    let (_, failed) = check(&world, server, Some("other.test"));
    assert!(failed.is_some_and(|step| step.text.starts_with("the rules refuse")));
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .expect("a listener")
        .local_addr();
    let (_, failed) = check(&world, closed.expect("an address"), Some(NAME));
    assert_eq!(failed.expect("a failure").text, "connection refused");
}
