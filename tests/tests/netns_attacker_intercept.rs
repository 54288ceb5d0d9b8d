//! Attackers behind HTTP rules whose connections are intercepted: each request that a real server parses must be one that was
//! inspected.

use palisade_testbed::{topology::FAMILIES, web::Web};
use palisade_tests::fixtures::{
    intercept::{RULES, lab},
    nasty::{http1, http2},
    python::{NodeServer, raw},
};

const NGINX: u16 = 443;
const NODE: u16 = 8443;
const NAME: &str = "www.web.example";

#[test]
fn every_request_of_an_intercepted_connection_that_a_server_parses_was_inspected() {
    let lab = lab();
    let internet = lab.apps.ns("internet");
    let nginx = Web::start_http2(internet, "nginx", &[], &[NGINX], &lab.server).expect("nginx");
    let addresses = lab.apps.both("internet");
    let node = NodeServer::start(internet, [8_080, NODE, 8_081], &addresses, &lab.server).expect("node");
    let rules = RULES.replace("path:", "host: \"www\\\\.web\\\\.example\", path:");
    let daemon = lab.client_only(&[NGINX, NODE], &rules);
    let (old, new) = (http1(NAME), http2(NAME));
    let fine = format!("GET /allowed/fine HTTP/1.1\r\nHost: {NAME}\r\nConnection: close\r\n\r\n");
    let mut streams: Vec<(Option<&str>, &[u8])> = vec![(None, fine.as_bytes())];
    streams.extend(old.iter().map(|bytes| (None, &bytes[..])));
    streams.extend(new.iter().map(|bytes| (Some("h2"), &bytes[..])));
    // Bytes of another protocol than the one that was chosen.
    streams.extend(new.iter().map(|bytes| (Some("http/1.1"), &bytes[..])));
    streams.extend(old.iter().map(|bytes| (Some("h2"), &bytes[..])));
    for family in FAMILIES {
        for port in [NGINX, NODE] {
            let at = lab.apps.at("internet", family, port);
            let got = raw(lab.apps.ns("client"), NAME, &lab.ours.cert, at, &streams);
            let got = got.unwrap_or_else(|error| panic!("{at}: {error:#}\n{}", daemon.report()));
            assert_eq!(got.len(), streams.len());
            assert!(got[0] > 0, "{at}: {}", daemon.report());
        }
    }
    let of_nginx = nginx.seen();
    let paths = of_nginx
        .iter()
        .map(|seen| seen.request.split(' ').nth(1).unwrap_or_default().to_owned());
    let of_node = node.requests();
    let more = of_node
        .iter()
        .map(|request| request["path"].as_str().unwrap_or_default().to_owned());
    let paths: Vec<String> = paths.chain(more).collect();
    assert!(
        paths.iter().filter(|path| *path == "/allowed/fine").count() == 4,
        "{paths:?}"
    );
    for path in &paths {
        assert!(
            path.starts_with("/allowed/"),
            "{path}: {paths:?}\n{}",
            daemon.report()
        );
    }
    for request in &of_node {
        let hosts = request["headers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|field| {
                let name = field[0].as_str().unwrap_or_default();
                [":authority", "host"]
                    .iter()
                    .any(|host| name.eq_ignore_ascii_case(host))
            });
        for host in hosts {
            let host = host[1].as_str().unwrap_or_default();
            assert!(host.eq_ignore_ascii_case(NAME), "{request}\n{}", daemon.report());
        }
    }
}
