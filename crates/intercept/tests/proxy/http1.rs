//! HTTP/1 requests through TLS on both sides.

use palisade_inspect::record::{Verdict, What};

use crate::world::{World, get, http_rules, read_to_end};

#[test]
fn an_allowed_request_passes_and_a_denied_one_gets_403() {
    let world = World::new(http_rules(&["/public/.*"]));
    world.http_server();
    let mut client = world.client();
    let answer = get(&mut client, "/public/a");
    assert_eq!((answer.status, &*answer.body), (200, "GET /public/a 0"));
    let answer = get(&mut client, "/secret");
    assert_eq!((answer.status, &*answer.body), (403, "Access denied\r\n"));
    let (rest, end) = read_to_end(&mut client);
    assert!(
        rest.is_empty() && end.is_ok(),
        "the 403 ends the connection with close_notify: {end:?}"
    );
    let record = world.record("the denied request", |record| record.verdict == Verdict::Dropped);
    assert!(
        matches!(record.what, What::HttpRequest { url, .. } if url.bytes() == b"https://api.example.test/secret")
    );
    assert_eq!((record.endpoint, record.rule, record.ifindex), (9, 5, 3));
    let stats = world.proxy.stats();
    assert_eq!((stats.requests, stats.denied), (2, 1));
}
