//! Changes of the policy while connections are open.

use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read as _, Write as _},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use palisade_abi::{Inspector, punt_flags};
use palisade_inspect::{Rules, record::Verdict};
use palisade_intercept::Settings;
use palisade_model::{
    rule::FqdnPattern,
    snapshot::{Alternative, Matcher, RuleSet},
};

use crate::world::{NAME, TlsClient, World, get, http_rules, read_head, read_to_end, send};

#[test]
fn the_next_request_of_an_open_connection_gets_the_verdict_of_the_new_rules() {
    let world = World::new(http_rules(&["/a"]));
    world.http_server();
    let mut client = world.client();
    assert_eq!(get(&mut client, "/a").status, 200);
    let mut sets = world.sets.clone();
    sets.insert(2, Arc::new(http_rules(&["/b"])));
    let rules = Arc::new(Rules::prepare(&sets, Some(&world.settings.rules)));
    world.proxy.update(Settings {
        rules,
        ..world.settings.clone()
    });
    assert_eq!(
        get(&mut client, "/a").status,
        200,
        "the flow still has the first rule set"
    );
    world
        .flows
        .request
        .lock()
        .expect("the flows")
        .as_mut()
        .expect("a flow")
        .ruleset = 2;
    // As the daemon does after each change of the maps. The request comes right after it, without a wait.
    world.proxy.recheck();
    assert_eq!(get(&mut client, "/b").status, 200);
    assert_eq!(get(&mut client, "/a").status, 403);
}

#[test]
fn a_connection_that_is_no_longer_intercepted_is_reset() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    let mut idle = world.client();
    assert_eq!(get(&mut idle, "/a").status, 200);
    *world.flows.request.lock().expect("the flows") = None;
    world.proxy.recheck();
    let (_, end) = read_to_end(&mut idle);
    end.expect_err("the connection is reset");
    world.wait("the connection is gone", |world| world.proxy.stats().open == 0);
    assert_eq!(world.proxy.stats().cut, 1);
    let mut refused = world.client();
    refused
        .write_all(b"GET")
        .expect_err("a new connection is reset too");
    assert!(world.proxy.stats().unknown >= 1);
}

#[test]
fn a_flow_is_looked_up_for_the_first_request_and_after_a_removal_of_flows() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    let mut client = world.client();
    // A request a second after the last lookup makes another one, which a busy machine can reach.
    let begun = Instant::now();
    let has_looked_up = |times, when| {
        let lookups = world.flows.lookups.load(Ordering::SeqCst);
        assert!(
            lookups == times || begun.elapsed() > Duration::from_millis(900),
            "{lookups} lookups, {when}"
        );
    };
    for path in ["/1", "/2", "/3"] {
        assert_eq!(get(&mut client, path).status, 200);
    }
    has_looked_up(2, "one for the connection and one for the first request");
    world.flows.removals.fetch_add(1, Ordering::SeqCst);
    send(
        &mut client,
        format!("PUT /4 HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: 100000\r\n\r\n"),
    );
    for _ in 0..100 {
        send(&mut client, [b'x'; 1000]);
    }
    assert_eq!(crate::world::read_answer(&mut client).body, "PUT /4 100000");
    has_looked_up(3, "one for the request after the removal, none for its body");
    world.flows.is_stale.store(true, Ordering::SeqCst);
    world.proxy.recheck();
    for path in ["/5", "/6"] {
        assert_eq!(get(&mut client, path).status, 200);
    }
    has_looked_up(
        6,
        "one for the recheck, and one for each request until the programs have evaluated the flow",
    );
    *world.flows.request.lock().expect("the flows") = None;
    send(&mut client, format!("GET /7 HTTP/1.1\r\nHost: {NAME}\r\n\r\n"));
    let (_, end) = read_to_end(&mut client);
    end.expect_err("the flow was removed");
}

#[test]
fn a_tunnel_ends_when_its_rule_set_changes() {
    let world = World::new(http_rules(&["/ws"]));
    world.tls_server(|stream| {
        read_head(stream).expect("a request");
        send(
            stream,
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        );
        let _ = stream.read(&mut [0]);
    });
    let mut client = world.client();
    send(
        &mut client,
        format!("GET /ws HTTP/1.1\r\nHost: {NAME}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"),
    );
    assert!(
        read_head(&mut client)
            .expect("a response")
            .starts_with("HTTP/1.1 101")
    );
    world.proxy.recheck();
    let rules = BTreeMap::from([
        (1, world.sets[&1].clone()),
        (2, Arc::new(http_rules(&["/other"]))),
    ]);
    world.proxy.update(Settings {
        rules: Arc::new(Rules::prepare(&rules, None)),
        ..world.settings.clone()
    });
    world
        .flows
        .request
        .lock()
        .expect("the flows")
        .as_mut()
        .expect("a flow")
        .ruleset = 2;
    world.proxy.recheck();
    let (_, end) = read_to_end(&mut client);
    end.expect_err("the tunnel is reset");
}

#[test]
fn audit_mode_forwards_what_the_rules_deny() {
    let world = World::new(http_rules(&["/a"]));
    world.http_server();
    world
        .flows
        .request
        .lock()
        .expect("the flows")
        .as_mut()
        .expect("a flow")
        .flags = punt_flags::AUDIT;
    let mut client = world.client();
    assert_eq!(get(&mut client, "/b").body, "GET /b 0");
    let record = world.record("the request", |record| record.verdict == Verdict::Audit);
    assert_eq!(record.reason, palisade_abi::Reason::AppDenied);
}

#[test]
fn a_flow_with_an_unknown_rule_set_is_reset_with_a_record() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    world
        .flows
        .request
        .lock()
        .expect("the flows")
        .as_mut()
        .expect("a flow")
        .ruleset = 99;
    world.client().write_all(b"GET").expect_err("reset");
    let record = world.record("the flow", |record| record.verdict == Verdict::Dropped);
    assert_eq!(record.reason, palisade_abi::Reason::UnknownRuleset);
}

/// Replaces the rule set of the flow by another one.
fn replace_rules(world: &World, set: RuleSet) {
    let rules = BTreeMap::from([(1, world.sets[&1].clone()), (2, Arc::new(set))]);
    world.proxy.update(Settings {
        rules: Arc::new(Rules::prepare(&rules, None)),
        ..world.settings.clone()
    });
    let mut request = world.flows.request.lock().expect("the flows");
    request.as_mut().expect("a flow").ruleset = 2;
    drop(request);
    world.proxy.recheck();
}

fn name_rules(name: &str) -> RuleSet {
    RuleSet {
        reads: Inspector::Tls as u8,
        alternatives: vec![Alternative {
            rule: 7,
            matcher: Matcher::ServerName(FqdnPattern::Pattern(name.into())),
        }],
        ..http_rules(&[])
    }
}

/// Returns an open connection to a server that returns each byte.
fn echo(world: &World) -> TlsClient {
    world.tls_server(|stream| {
        let mut byte = [0];
        while let Ok(1) = stream.read(&mut byte) {
            send(stream, byte);
        }
    });
    let mut client = world.client();
    send_and_read(&mut client);
    client
}

fn send_and_read(client: &mut TlsClient) {
    send(client, "x");
    client.read_exact(&mut [0]).expect("the byte");
}

#[test]
fn a_connection_whose_server_name_the_new_rules_deny_is_reset() {
    let mut other_ca = name_rules("*.example.test");
    other_ca.originating_tls.as_mut().expect("a context").secret = "ns/other".into();
    for set in [name_rules("*.other.test"), http_rules(&["/a"]), other_ca] {
        let world = World::new(name_rules("*.example.test"));
        let mut client = echo(&world);
        // These rules allow the name too.
        replace_rules(&world, name_rules("api.*.test"));
        send_and_read(&mut client);
        replace_rules(&world, set);
        let (_, end) = read_to_end(&mut client);
        assert_eq!(end.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    }
}

#[test]
fn a_connection_that_only_audit_mode_allowed_ends_with_audit_mode() {
    let set_flags = |world: &World, flags| {
        let mut request = world.flows.request.lock().expect("the flows");
        request.as_mut().expect("a flow").flags = flags;
    };
    let world = World::new(name_rules("*.other.test"));
    set_flags(&world, punt_flags::AUDIT);
    let mut client = echo(&world);
    world.proxy.recheck();
    send_and_read(&mut client);
    set_flags(&world, 0);
    world.proxy.recheck();
    let (_, end) = read_to_end(&mut client);
    assert_eq!(end.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
}
