//! Changes of the policy while connections are open.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    sync::{Arc, atomic::Ordering},
};

use palisade_abi::punt_flags;
use palisade_inspect::{Rules, record::Verdict};
use palisade_intercept::Settings;

use crate::world::{NAME, World, get, http_rules, read_head, read_to_end, send};

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
fn a_flow_is_looked_up_for_each_request_and_not_for_its_body() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    let mut client = world.client();
    for path in ["/1", "/2", "/3"] {
        assert_eq!(get(&mut client, path).status, 200);
    }
    assert_eq!(
        world.flows.lookups.load(Ordering::SeqCst),
        4,
        "one for the connection and one for each request"
    );
    send(
        &mut client,
        format!("PUT /4 HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: 100000\r\n\r\n"),
    );
    for _ in 0..100 {
        send(&mut client, [b'x'; 1000]);
    }
    assert_eq!(crate::world::read_answer(&mut client).body, "PUT /4 100000");
    assert_eq!(world.flows.lookups.load(Ordering::SeqCst), 5);
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
