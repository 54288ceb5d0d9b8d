//! TLS on both sides: names, versions, application protocols, certificates.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::{Arc, Mutex},
};

use palisade_abi::{Inspector, Reason};
use palisade_inspect::record::{Verdict, What};
use palisade_intercept::{Settings, Trust};
use palisade_model::{
    rule::FqdnPattern,
    snapshot::{Alternative, Matcher, RuleSet},
};
use rustls::{
    ClientConnection, ProtocolVersion, StreamOwned, pki_types::ServerName, server::WebPkiClientVerifier,
};

use crate::world::{Ca, NAME, World, accept, get, http_rules, provider, send, serve_http, server_config};

#[test]
fn each_side_negotiates_its_own_version() {
    let world = World::new(http_rules(&["/.*"]));
    let own = world.server_ca.issue(NAME, |_| {});
    for (client_version, server_version) in [
        (&rustls::version::TLS12, &rustls::version::TLS13),
        (&rustls::version::TLS13, &rustls::version::TLS12),
        (&rustls::version::TLS12, &rustls::version::TLS12),
    ] {
        let config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[server_version])
            .expect("a version")
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(own.clone())));
        world.server(move |socket| serve_http(&mut accept(config.clone(), socket)));
        let config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[client_version])
            .expect("a version")
            .with_root_certificates(world.client_ca.roots())
            .with_no_client_auth();
        let mut client = world.client_with(config, NAME);
        assert_eq!(get(&mut client, "/a").body, "GET /a 0");
        assert_eq!(client.conn.protocol_version(), Some(client_version.version));
        let views = world.proxy.connections(10);
        let view = views.iter().max_by_key(|view| view.id).expect("a connection");
        let text = |version| {
            if version == ProtocolVersion::TLSv1_3 {
                "TLSv1.3"
            } else {
                "TLSv1.2"
            }
        };
        let versions = [&view.client_tls, &view.server_tls].map(|tls| tls.as_ref().map(|tls| tls.version));
        assert_eq!(
            versions,
            [client_version, server_version].map(|version| Some(text(version.version)))
        );
        assert_eq!(
            (view.requests, view.state, view.protocol),
            (1, "open", "http/1.1")
        );
    }
}

#[test]
fn the_server_gets_the_name_that_the_client_has_sent() {
    let world = World::new(http_rules(&["/.*"]));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let names = seen.clone();
    world.tls_server(move |stream| {
        let _ = stream.flush();
        serve_http(stream);
        names
            .lock()
            .expect("the names")
            .push(stream.conn.server_name().map(str::to_owned));
    });
    let mut client = world.client();
    assert_eq!(get(&mut client, "/a").status, 200);
    drop(client);
    world.wait("the server sees a name", |_| {
        !seen.lock().expect("the names").is_empty()
    });
    assert_eq!(*seen.lock().expect("the names"), [Some(NAME.to_owned())]);
}

#[test]
fn without_a_server_name_the_certificate_is_checked_for_the_address() {
    let world = World::new(http_rules(&["/.*"]));
    let config = server_config(world.server_ca.issue("127.0.0.1", |_| {}));
    world.server(move |socket| serve_http(&mut accept(config.clone(), socket)));
    let mut settings = world.settings.clone();
    let mut secrets = world.secrets.clone();
    secrets
        .identities
        .insert("ns/shown".into(), world.client_ca.issue("127.0.0.1", |_| {}));
    settings.secrets = Arc::new(secrets);
    world.proxy.update(settings.clone());
    let mut client = world.client_with(world.client_config(), "127.0.0.1");
    assert_eq!(get(&mut client, "/a").body, "GET /a 0");
    world.http_server();
    let mut client = world.client_with(world.client_config(), "127.0.0.1");
    let answer = get(&mut client, "/a");
    assert_eq!(answer.status, 503);
    assert!(
        answer.body.contains("certificate for another name"),
        "{}",
        answer.body
    );
    settings.refuse_nameless = true;
    world.proxy.update(settings);
    let mut client = world.client_with(world.client_config(), "127.0.0.1");
    let error = client.write_all(b"GET").expect_err("refused");
    assert!(error.to_string().contains("AccessDenied"), "{error}");
}

#[test]
fn the_client_gets_the_application_protocol_that_the_server_has_chosen() {
    let world = World::new(http_rules(&["/.*"]));
    for (offered, supported, chosen) in [
        (&["h2", "http/1.1"][..], &["http/1.1"][..], Some("http/1.1")),
        (&["http/1.1", "h2"], &["h2", "http/1.1"], Some("h2")),
        (&["http/1.1"], &[], None),
        (&[], &["http/1.1"], None),
    ] {
        let bytes = |names: &[&str]| {
            names
                .iter()
                .map(|name| name.as_bytes().to_vec())
                .collect::<Vec<_>>()
        };
        let mut config = server_config(world.server_ca.issue(NAME, |_| {}));
        config.alpn_protocols = bytes(supported);
        world.server(move |socket| {
            let mut stream = accept(config.clone(), socket);
            let _ = stream.flush();
            let _ = stream.read(&mut [0; 1024]);
        });
        let mut config = world.client_config();
        config.alpn_protocols = bytes(offered);
        let mut client = world.client_with(config, NAME);
        client.flush().expect("the handshake");
        while client.conn.is_handshaking() {
            client.conn.complete_io(&mut client.sock).expect("the handshake");
        }
        assert_eq!(
            client.conn.alpn_protocol(),
            chosen.map(str::as_bytes),
            "{offered:?} {supported:?}"
        );
    }
}

#[test]
fn a_ca_signs_certificates_for_the_names_of_clients() {
    let mut set = http_rules(&["/.*"]);
    set.terminating_tls.as_mut().expect("terminating").secret = "ns/ca".into();
    let world = World::new(set);
    for name in ["one.example.test", "two.example.test", "one.example.test"] {
        let config = server_config(world.server_ca.issue(name, |_| {}));
        world.server(move |socket| serve_http(&mut accept(config.clone(), socket)));
        let mut client = world.client_with(world.client_config(), name);
        assert_eq!(get(&mut client, "/a").body, "GET /a 0");
    }
}

#[test]
fn a_client_certificate_of_the_policy_is_shown_to_the_server() {
    let world = World::new(http_rules(&["/.*"]));
    let clients = Ca::new("clients");
    let verifier = WebPkiClientVerifier::builder_with_provider(clients.roots(), provider())
        .build()
        .expect("a verifier");
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(rustls::ALL_VERSIONS)
        .expect("versions")
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(
            world.server_ca.issue(NAME, |_| {}),
        )));
    world.server(move |socket| serve_http(&mut accept(config.clone(), socket)));
    let answer = get(&mut world.client(), "/a");
    assert_eq!(answer.status, 503, "without a certificate: {}", answer.body);
    assert!(
        answer.body.contains("alert received: certificate_required"),
        "{}",
        answer.body
    );
    let mut secrets = world.secrets.clone();
    secrets.trusts.insert(
        "ns/trusted".into(),
        Trust {
            client: Some(clients.issue("workload", |_| {})),
            ..world.server_ca.trust()
        },
    );
    world.proxy.update(Settings {
        secrets: Arc::new(secrets),
        ..world.settings.clone()
    });
    assert_eq!(get(&mut world.client(), "/a").body, "GET /a 0");
}

#[test]
fn sessions_are_resumed_on_both_sides() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    let config = world.client_config();
    assert_eq!(
        get(&mut world.client_with(config.clone(), NAME), "/a").status,
        200
    );
    let mut client = world.client_with(config, NAME);
    assert_eq!(get(&mut client, "/a").status, 200);
    assert_eq!(client.conn.handshake_kind(), Some(rustls::HandshakeKind::Resumed));
    let view = world.proxy.connections(10).into_iter().max_by_key(|view| view.id);
    let tls = view
        .and_then(|view| view.server_tls)
        .expect("TLS with the server");
    assert!(tls.is_resumed);
}

#[test]
fn no_early_data_is_sent_to_a_server_that_takes_it() {
    let world = World::new(http_rules(&["/.*"]));
    let mut config = server_config(world.server_ca.issue(NAME, |_| {}));
    config.max_early_data_size = 16_384;
    let connections = Arc::new(Mutex::new(Vec::new()));
    let noted = connections.clone();
    let address = world.server(move |socket| {
        let mut stream = accept(config.clone(), socket);
        stream.conn.complete_io(&mut stream.sock).expect("the handshake");
        let early = stream.conn.early_data().map(|mut data| {
            let mut bytes = Vec::new();
            let _ = data.read_to_end(&mut bytes);
            String::from_utf8(bytes).expect("text")
        });
        let kind = stream.conn.handshake_kind();
        noted.lock().expect("the connections").push((kind, early));
        serve_http(&mut stream);
    });
    for _ in 0..3 {
        assert_eq!(get(&mut world.client(), "/a").status, 200);
    }
    let resumed = Some(rustls::HandshakeKind::Resumed);
    {
        let connections = connections.lock().expect("the connections");
        assert_eq!(connections.len(), 3);
        assert!(
            connections[1..].iter().all(|(kind, _)| *kind == resumed),
            "{connections:?}"
        );
        assert!(
            connections.iter().all(|(_, early)| early.is_none()),
            "{connections:?}"
        );
    }

    // A client that sends early data to the same server: the server takes it.
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(rustls::ALL_VERSIONS)
        .expect("versions")
        .with_root_certificates(world.server_ca.roots())
        .with_no_client_auth();
    config.enable_early_data = true;
    let config = Arc::new(config);
    let connect = || {
        let name = ServerName::try_from(NAME).expect("a name");
        let tls = ClientConnection::new(config.clone(), name).expect("a client");
        StreamOwned::new(tls, TcpStream::connect(address).expect("the server accepts"))
    };
    assert_eq!(get(&mut connect(), "/a").status, 200);
    let mut client = connect();
    let mut early = client.conn.early_data().expect("a ticket that allows early data");
    early.write_all(b"early").expect("early data");
    client.conn.complete_io(&mut client.sock).expect("the handshake");
    assert!(client.conn.is_early_data_accepted());
    world.wait("the server has the early data", |_| {
        let connections = connections.lock().expect("the connections");
        connections.last() == Some(&(resumed, Some("early".into())))
    });
}

#[test]
fn secrets_are_replaced_while_connections_are_open() {
    let world = World::new(http_rules(&["/.*"]));
    world.http_server();
    let mut before = world.client();
    assert_eq!(get(&mut before, "/a").status, 200);
    let (other_client_ca, other_server_ca) = (Ca::new("other client ca"), Ca::new("other server ca"));
    let mut secrets = world.secrets.clone();
    secrets
        .identities
        .insert("ns/shown".into(), other_client_ca.issue(NAME, |_| {}));
    secrets
        .trusts
        .insert("ns/trusted".into(), other_server_ca.trust());
    world.proxy.update(Settings {
        secrets: Arc::new(secrets),
        ..world.settings.clone()
    });
    assert_eq!(get(&mut before, "/b").status, 200, "an open connection continues");
    let mut config = world.client_config();
    config = rustls::ClientConfig::builder_with_provider(config.crypto_provider().clone())
        .with_protocol_versions(rustls::ALL_VERSIONS)
        .expect("versions")
        .with_root_certificates(other_client_ca.roots())
        .with_no_client_auth();
    let answer = get(&mut world.client_with(config.clone(), NAME), "/a");
    assert_eq!(
        answer.status, 503,
        "the server's certificate is no longer trusted"
    );
    let own = server_config(other_server_ca.issue(NAME, |_| {}));
    world.server(move |socket| serve_http(&mut accept(own.clone(), socket)));
    assert_eq!(get(&mut world.client_with(config, NAME), "/a").status, 200);
}

/// A rule set that reads server names only.
fn name_rules(pattern: &str) -> RuleSet {
    RuleSet {
        reads: Inspector::Tls as u8,
        alternatives: vec![Alternative {
            rule: 7,
            matcher: Matcher::ServerName(FqdnPattern::Pattern(pattern.into())),
        }],
        ..http_rules(&[])
    }
}

#[test]
fn with_rules_for_names_only_bytes_pass_after_the_handshakes() {
    let world = World::new(name_rules("*.example.test"));
    world.tls_server(|stream| {
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes).expect("bytes");
        send(stream, [&b"echo "[..], &bytes].concat());
        let _ = stream.read(&mut [0]);
    });
    let mut client = world.client();
    send(&mut client, "hello");
    let mut bytes = [0; 10];
    client.read_exact(&mut bytes).expect("bytes");
    assert_eq!(&bytes, b"echo hello");
    let record = world.record("the hello", |record| matches!(record.what, What::TlsHello { .. }));
    assert_eq!((record.verdict, record.rule), (Verdict::Forwarded, 7));
}

#[test]
fn a_name_that_no_rule_allows_is_refused_with_an_alert() {
    let mut with_names = http_rules(&["/.*"]);
    with_names.server_names = vec![FqdnPattern::Pattern("*.other.test".into())];
    for set in [name_rules("*.other.test"), with_names] {
        let world = World::new(set);
        world.http_server();
        let mut client = world.client();
        let error = client.write_all(b"GET / HTTP/1.1\r\n\r\n").expect_err("refused");
        assert!(error.to_string().contains("AccessDenied"), "{error}");
        let record = world.record("the hello", |record| matches!(record.what, What::TlsHello { .. }));
        assert_eq!(
            (record.verdict, record.reason),
            (Verdict::Dropped, Reason::AppDenied)
        );
        assert_eq!(world.proxy.stats().upstream_handshakes, 0);
    }
}
