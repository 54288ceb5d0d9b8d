//! Kafka rules with a real broker and real clients.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
};

use palisade_testbed::{Daemon, daemon::Hooks, topology::FAMILIES};
use palisade_tests::{
    OPEN,
    fixtures::{
        apps::{Apps, PAIRS, apps, policy},
        kafka::{Broker, Mock, Teller, client, ids},
        python::packages,
    },
    setup::{XDP_AND_CLSACT, XDP_AT_THE_NIC, client_only, daemon_with, on_all_pairs, tables},
};

const PORT: u16 = 9092;

/// Allows one topic, in both roles.
const RULES: &str = "      rules:
        kafka:
        - {role: produce, topic: orders}
        - {role: consume, topic: orders}
";

/// Clients, and the name of the error that each shows for a denied topic.
const LIBRARIES: [(&str, &str); 2] = [
    ("confluent", "TOPIC_AUTHORIZATION_FAILED"),
    ("kafka-python", "TopicAuthorizationFailedError"),
];

fn run(apps: &Apps, daemon: &Daemon, library: &str, action: &str, at: SocketAddr, topic: &str) -> String {
    client(apps.ns("client"), library, action, at, topic, "hello")
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()))
}

/// Clients use the allowed topic and get an error for others.
fn allowed_and_denied((library, error): (&str, &str)) {
    packages().expect("the packages");
    let apps = apps();
    let brokers = FAMILIES.map(|family| {
        let at = apps.at("internet", family, PORT);
        let broker = Broker::start(apps.ns("internet"), at, &["orders", "secret"]).expect("broker");
        (at, broker)
    });
    let mut daemon = client_only(&apps, &[PORT], RULES);
    let check = |daemon: &Daemon, at: SocketAddr, action: &str, topic: &str, expected: &str| {
        assert_eq!(
            run(&apps, daemon, library, action, at, topic),
            expected,
            "{library} {at} {action} {topic}\n{}",
            daemon.report()
        );
    };
    for (at, _) in &brokers {
        for (action, topic, expected) in [
            ("produce", "orders", "ok"),
            ("consume", "orders", "hello"),
            ("produce", "secret", error),
            ("consume", "secret", error),
        ] {
            check(&daemon, *at, action, topic, expected);
        }
    }
    let filters = ["--protocol", "kafka", "--verdict", "dropped"];
    let flows = daemon.wait_flows(&filters, "denied Kafka requests", |flows| !flows.is_empty());
    let flows = flows.unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    for flow in &flows {
        let kafka = &flow["l7"]["kafka"];
        let (topic, error) = (kafka["topic"].as_str(), kafka["error_code"].as_i64());
        // librdkafka asks for telemetry, which is in no role.
        let is_telemetry =
            kafka["api_key"] == "gettelemetrysubscriptions" && (topic, error) == (None, Some(31));
        assert!(
            is_telemetry || (topic, error) == (Some("secret"), Some(29)),
            "{flow:#}"
        );
    }
    assert!(flows.iter().any(|flow| flow["l7"]["kafka"]["topic"] == "secret"));
    let status = daemon.status().expect("status");
    let counted = &status["workers"]["inspection"]["kafka"];
    assert!(
        counted["denied"].as_u64() > Some(0) && counted["requests"].as_u64() > Some(0),
        "{status:#}"
    );

    // Nothing of the denied topic has reached the broker: the topic is empty for a client that no rule concerns.
    for (at, _) in &brokers {
        let read = |topic: &str| client(apps.ns("internet"), "confluent", "consume", *at, topic, "");
        assert_eq!(read("orders").expect("consume"), "hello");
        assert_eq!(read("secret").expect("consume"), "nothing");
    }

    daemon.kill9().expect("kill");
    daemon.restart().expect("restart");
    for (at, _) in &brokers {
        check(&daemon, *at, "produce", "orders", "ok");
        check(&daemon, *at, "produce", "secret", error);
    }
}

#[test]
fn confluent_uses_the_allowed_topic_and_gets_an_error_for_others() {
    allowed_and_denied(LIBRARIES[0]);
}

#[test]
fn kafka_python_uses_the_allowed_topic_and_gets_an_error_for_others() {
    allowed_and_denied(LIBRARIES[1]);
}

/// With kcat's broker: the broker of the other tests lets the first member of a group wait.
#[test]
fn a_consumer_group_reads_the_allowed_topic_only() {
    packages().expect("the packages");
    let apps = apps();
    let places = FAMILIES.map(|family| apps.at("internet", family, PORT));
    let mock = Mock::start(apps.ns("internet"), &places).expect("broker");
    let daemon = client_only(&apps, &[PORT], RULES);
    for at in places {
        let asks = |action: &str, topic: &str| {
            mock.client(apps.ns("client"), Some(at), "confluent", action, topic)
                .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()))
        };
        assert_eq!(asks("produce", "orders"), "ok", "{at}\n{}", daemon.report());
        // The first message, and the offset behind it.
        assert_eq!(asks("group", "orders"), "hello 1", "{at}\n{}", daemon.report());
        assert_eq!(
            asks("group", "secret"),
            LIBRARIES[0].1,
            "{at}\n{}",
            daemon.report()
        );
    }
}

/// Rules for groups of both protocols, and for transactions, with one topic. All topics may be learned of, so that clients ask
/// for the denied one.
const GROUP_RULES: &str = "      rules:
        kafka:
        - {apiKey: metadata}
        - {role: produce, topic: orders}
        - {role: consume, topic: orders}
        - {apiKey: consumergroupheartbeat, topic: orders}
        - {apiKey: initproducerid}
        - {apiKey: addpartitionstotxn, topic: orders}
        - {apiKey: endtxn}
        - {apiKey: gettelemetrysubscriptions}
        - {apiKey: pushtelemetry}
";

/// The members of a group join, and one of them leaves, so that its partitions go to the other one, which commits an offset.
/// Nothing of another topic is read or written, and without a rule for the requests of groups there is no member.
#[test]
fn groups_and_transactions_of_real_clients_use_the_allowed_topic_only() {
    packages().expect("the packages");
    let apps = apps();
    let (internet, client) = (apps.ns("internet"), apps.ns("client"));
    let places = FAMILIES.map(|family| apps.at("internet", family, PORT));
    let mock = Mock::newest(internet, &places).expect("broker");
    let daemon = client_only(&apps, &[PORT], GROUP_RULES);
    let own = |action: &str, topic: &str| mock.client(internet, None, "confluent", action, topic);
    for topic in ["orders", "secret"] {
        assert_eq!(own("produce", topic).expect("produce"), "ok");
    }
    let asks = |daemon: &Daemon, at: SocketAddr, library: &str, action: &str, topic: &str| {
        mock.client(client, Some(at), library, action, topic)
            .unwrap_or_else(|error| panic!("{library} {action} {topic}: {error:#}\n{}", daemon.report()))
    };
    let confluent = "confluent";
    for at in places {
        for (library, action, expected) in [
            (confluent, "members", "2+2 4 hello 1"),
            (confluent, "next", "2+2 4 hello 1"),
            (LIBRARIES[1].0, "members", "2+2 4 hello 1"),
            (confluent, "transaction", "ok"),
            (LIBRARIES[1].0, "transaction", "ok"),
        ] {
            let got = asks(&daemon, at, library, action, "orders");
            // Each transaction adds a message, so the offset that is committed is that of the last one.
            let (got, _) = got.rsplit_once(' ').unwrap_or((&got, ""));
            let (expected, _) = expected.rsplit_once(' ').unwrap_or((expected, ""));
            assert_eq!(got, expected, "{library} {action} {at}\n{}", daemon.report());
            let got = asks(&daemon, at, library, action, "secret");
            assert!(
                !got.contains("hello") && got != "ok",
                "{library} {action} {at}: {got}\n{}",
                daemon.report()
            );
        }
    }
    // The message of the broker's own client is the only one.
    assert_eq!(own("end", "secret").expect("the offset"), "1");
    let without_groups = GROUP_RULES.replace(
        "{role: consume, topic: orders}",
        "{apiKey: fetch, topic: orders}\n        - {apiKey: offsets, topic: orders}",
    );
    let text = policy("client", "egress", &[PORT], &without_groups);
    daemon.apply(&[("client.yaml", &text)]).expect("policy");
    for at in places {
        for library in [confluent, LIBRARIES[1].0] {
            let got = asks(&daemon, at, library, "members", "orders");
            assert!(!got.contains("2+2"), "{library} {at}: {got}\n{}", daemon.report());
        }
    }
    for key in [
        "consumergroupheartbeat",
        "addpartitionstotxn",
        "findcoordinator",
        "offsetfetch",
    ] {
        let filters = ["--protocol", "kafka", "--verdict", "dropped"];
        let is_key = |flow: &serde_json::Value| flow["l7"]["kafka"]["api_key"] == key;
        daemon
            .wait_flows(&filters, "a denied request", |flows| flows.iter().any(is_key))
            .unwrap_or_else(|error| panic!("{key}: {error:#}\n{}", daemon.report()));
    }
}

/// Allows clients to learn of all topics, so that they send messages also to those that are denied.
const PRODUCE_RULES: &str =
    "      rules:\n        kafka: [{apiKey: metadata}, {role: produce, topic: orders}]\n";

/// Waits until there are records of `count` denied Produce requests of each family.
#[track_caller]
fn denied_messages_are_recorded(daemon: &Daemon, count: usize) {
    let filters = ["--protocol", "kafka", "--verdict", "dropped"];
    let flows = daemon.wait_flows(&filters, "denied messages of both families", |flows| {
        let produces = |flow: &&serde_json::Value| {
            let kafka = &flow["l7"]["kafka"];
            kafka["api_key"] == "produce" && kafka["topic"] == "secret"
        };
        ["IPv4", "IPv6"].iter().all(|version| {
            let of_family = flows.iter().filter(|flow| flow["IP"]["ipVersion"] == *version);
            of_family.filter(produces).count() >= count
        })
    });
    flows.unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
}

/// The brokers of these tests respond to messages without acknowledgement, which real brokers do not, and such a response
/// ends the connection. So only the connections of denied messages show something, which get no response.
#[test]
fn a_message_without_acknowledgement_for_a_denied_topic_ends_the_connection() {
    packages().expect("the packages");
    let apps = apps();
    let internet = apps.ns("internet");
    let brokers = FAMILIES.map(|family| {
        let at = apps.at("internet", family, PORT);
        let broker = Broker::start(internet, at, &["orders", "secret"]).expect("broker");
        (at, broker)
    });
    let daemon = client_only(&apps, &[PORT], PRODUCE_RULES);
    for (at, _) in &brokers {
        for (library, _) in LIBRARIES {
            assert_eq!(
                run(&apps, &daemon, library, "acks0", *at, "secret"),
                "closed",
                "{library} {at}\n{}",
                daemon.report()
            );
            run(&apps, &daemon, library, "acks0", *at, "orders");
        }
    }
    denied_messages_are_recorded(&daemon, LIBRARIES.len());
    for (at, _) in &brokers {
        let read = |topic: &str| client(internet, "confluent", "consume", *at, topic, "").expect("consume");
        assert_eq!(read("orders"), "hello");
        assert_eq!(read("secret"), "nothing");
    }
}

/// The broker of the other tests answers kcat's request for versions in a form that kcat's librdkafka (2.0.2) refuses.
#[test]
fn kcat_uses_the_allowed_topic_and_gets_an_error_for_others() {
    let apps = apps();
    let (internet, client) = (apps.ns("internet"), apps.ns("client"));
    let places = FAMILIES.map(|family| apps.at("internet", family, PORT));
    let mock = Mock::start(internet, &places).expect("broker");
    let daemon = client_only(&apps, &[PORT], RULES);
    let said = |at: SocketAddr, args: &[&str], input: &str| {
        mock.kcat(client, Some(at), args, input)
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()))
    };
    let consume = ["-C", "-o", "beginning", "-e", "-q", "-t"];
    for (count, at) in places.into_iter().enumerate() {
        assert_eq!(
            said(at, &["-P", "-t", "orders"], "hello\n"),
            "",
            "{at}\n{}",
            daemon.report()
        );
        assert_eq!(
            said(at, &[&consume[..], &["orders"]].concat(), ""),
            "hello\n".repeat(count + 1),
            "{at}\n{}",
            daemon.report()
        );
        for args in [&["-P", "-t", "secret"][..], &[&consume[..], &["secret"]].concat()] {
            let text = said(at, args, "hello\n");
            assert!(
                text.contains("Topic authorization failed") && !text.contains("hello"),
                "{at} {args:?}: {text}\n{}",
                daemon.report()
            );
        }
    }
    let filters = ["--protocol", "kafka", "--verdict", "dropped"];
    let flows = daemon.wait_flows(&filters, "denied requests of both families", |flows| {
        let of_secret = |flow: &&serde_json::Value| {
            let kafka = &flow["l7"]["kafka"];
            (kafka["topic"].as_str(), kafka["error_code"].as_i64()) == (Some("secret"), Some(29))
        };
        let of = |version: &str| {
            flows
                .iter()
                .filter(of_secret)
                .any(|flow| flow["IP"]["ipVersion"] == version)
        };
        of("IPv4") && of("IPv6")
    });
    flows.unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    // Nothing of the denied topic has reached the broker.
    let read = |topic: &str| mock.kcat(internet, None, &[&consume[..], &[topic]].concat(), "");
    assert_eq!(read("orders").expect("kcat"), "hello\nhello\n");
    assert!(!read("secret").expect("kcat").contains("hello"));
}

/// Returns a policy for egress of `client`: for each list of ports a rule that allows the topic `orders`.
fn rules_for(peers: &str, ports: &[&[u16]]) -> String {
    let rules: String = ports
        .iter()
        .map(|ports| {
            let ports: Vec<_> = ports
                .iter()
                .map(|port| format!("{{port: \"{port}\", protocol: TCP}}"))
                .collect();
            format!(
                "  - {peers}\n    toPorts:\n    - ports: [{}]\n{RULES}",
                ports.join(", ")
            )
        })
        .collect();
    format!(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: client}}\nspec:\n  endpointSelector: \
         {{matchLabels: {{app: client}}}}\n  egress:\n{rules}"
    )
}

#[test]
fn a_false_name_of_a_topic_id_does_not_allow_a_topic_of_another_broker() {
    const OTHER: u16 = 9093;
    const FALSE: u16 = 9094;
    packages().expect("the packages");
    let apps = apps();
    let internet = apps.ns("internet");
    let at = |port| apps.at("internet", FAMILIES[0], port);
    let _brokers =
        [PORT, OTHER].map(|port| Broker::start(internet, at(port), &["orders", "secret"]).expect("broker"));
    let id = |port, topic| ids(internet, "id", at(port), topic).expect("id");
    let [orders, others] = [PORT, OTHER].map(|port| id(port, "orders"));
    let secret = id(OTHER, "secret");
    assert_ne!(orders, others);
    let _false = Teller::start(internet, at(FALSE), "orders", &secret).expect("server");
    assert_eq!(ids(internet, "fetch", at(OTHER), &secret).expect("fetch"), "0");

    let (world, prefix) = ("toEntities: [all]", "toCIDR: [198.51.100.0/24]");
    let (one, two): (&[&[u16]], &[&[u16]]) = (&[&[PORT, OTHER, FALSE]], &[&[PORT, OTHER], &[FALSE]]);
    let strict = "[kafka]\nshare_topic_ids = false\n";
    for (peers, ports, options, fetched) in [
        (world, one, "", "100"),
        (prefix, two, "", "100"),
        (prefix, one, strict, "100"),
        // The rule names brokers that share their names, so the false name counts.
        (prefix, one, "", "0"),
    ] {
        let daemon = daemon_with(
            &apps.topology,
            &tables(options),
            &[("client.yaml", &rules_for(peers, ports))],
        );
        let asks = |action: &str, port, argument: &str| {
            ids(apps.ns("client"), action, at(port), argument)
                .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()))
        };
        let case = format!("{peers} {ports:?} {options}");
        assert_eq!(
            asks("fetch", OTHER, &secret),
            "100",
            "{case}: no server has told the name"
        );
        assert_eq!(asks("id", FALSE, "orders"), secret, "{case}");
        assert_eq!(
            asks("fetch", OTHER, &secret),
            fetched,
            "{case}\n{}",
            daemon.report()
        );
        for (port, id) in [(PORT, &orders), (OTHER, &others)] {
            assert_eq!(&asks("id", port, "orders"), id, "{case}");
            assert_eq!(asks("fetch", port, id), "0", "{case}\n{}", daemon.report());
        }
        assert_eq!(asks("id", OTHER, "secret"), "0".repeat(32), "{case}");
    }
}

/// Clients use the allowed topic on each path, by name and by id, and get an error for the other one.
fn all_pairs(hooks: Hooks) {
    packages().expect("the packages");
    let apps = apps();
    let topics = ["orders", "secret"];
    let brokers: Vec<_> = ["server", "node", "internet"]
        .into_iter()
        .flat_map(|name| FAMILIES.map(|family| (name, apps.at(name, family, PORT))))
        .map(|(name, at)| (at, Broker::start(apps.ns(name), at, &topics).expect("broker")))
        .collect();
    let daemon = on_all_pairs(&apps, hooks, &[PORT], RULES);
    for (from, to) in PAIRS {
        for at in FAMILIES.map(|family| apps.at(to, family, PORT)) {
            assert!(brokers.iter().any(|(broker, _)| *broker == at));
            let asks = |action: &str, argument: &str| {
                ids(apps.ns(from), action, at, argument)
                    .unwrap_or_else(|error| panic!("{from} -> {at}: {error:#}\n{}", daemon.report()))
            };
            let context = || format!("{from} -> {at}\n{}", daemon.report());
            let [orders, secret] = topics.map(|topic| ids(apps.ns(to), "id", at, topic).expect("id"));
            assert_eq!(asks("fetch", &orders), "100", "not told yet: {}", context());
            assert_eq!(asks("id", "orders"), orders, "{}", context());
            assert_eq!(asks("fetch", &orders), "0", "{}", context());
            assert_eq!(asks("id", "secret"), "0".repeat(32), "{}", context());
            // librdkafka sometimes asks for the metadata of no topic, and tansu then answers with all, so the name of the
            // id can be known.
            let denied = asks("fetch", &secret);
            assert!(
                ["100", "29"].contains(&denied.as_str()),
                "{denied}: {}",
                context()
            );
            let produces = |topic: &str| {
                client(apps.ns(from), "confluent", "produce", at, topic, "hello")
                    .unwrap_or_else(|error| panic!("{error:#}\n{}", context()))
            };
            assert_eq!(produces("orders"), "ok", "{}", context());
            assert_eq!(produces("secret"), LIBRARIES[0].1, "{}", context());
        }
    }
}

#[test]
fn rules_apply_on_all_paths_with_xdp_at_the_nic() {
    all_pairs(XDP_AT_THE_NIC);
}

#[test]
fn rules_apply_on_all_paths_with_xdp_and_clsact() {
    all_pairs(XDP_AND_CLSACT);
}

/// Returns a Metadata request of version 1 for one topic.
fn metadata(correlation: u8, topic: &str) -> Vec<u8> {
    let mut request = vec![0, 3, 0, 1, 0, 0, 0, correlation, 0, 5];
    request.extend(b"tests\0\0\0\x01\0");
    request.push(topic.len() as u8);
    request.extend(topic.as_bytes());
    [&(request.len() as u32).to_be_bytes()[..], &request].concat()
}

/// Reads one response. Returns its correlation id and whether it has this error for the topic; none at the end.
fn metadata_response(stream: &mut TcpStream, error: u8, topic: &str) -> Option<(u8, bool)> {
    let mut size = [0; 4];
    match stream.read(&mut size).expect("read") {
        0 => return None,
        count => stream.read_exact(&mut size[count..]).expect("read"),
    }
    let mut message = vec![0; u32::from_be_bytes(size) as usize];
    stream.read_exact(&mut message).expect("read");
    let expected = [&[0, error, 0, topic.len() as u8], topic.as_bytes()].concat();
    let is_told = message.windows(expected.len()).any(|part| part == expected);
    Some((message[3], is_told))
}

#[test]
fn requests_in_any_segments_and_after_a_change_of_the_policy_are_evaluated() {
    packages().expect("the packages");
    let apps = apps();
    for family in FAMILIES {
        let at = apps.at("internet", family, PORT);
        let _broker = Broker::start(apps.ns("internet"), at, &["orders", "secret"]).expect("broker");
        let daemon = client_only(&apps, &[PORT], RULES);
        let connect = || {
            let stream = apps
                .ns("client")
                .enter(|| TcpStream::connect(at))
                .expect("connect");
            stream.set_nodelay(true).expect("option");
            stream.set_read_timeout(Some(OPEN)).expect("option");
            stream
        };
        let (fine, denied) = (metadata(1, "orders"), metadata(2, "secret"));

        // Each byte in a segment of its own, and the end of the stream behind a denied request.
        let mut stream = connect();
        for request in [&fine, &denied] {
            for byte in request.chunks(1) {
                stream.write_all(byte).expect("write");
            }
        }
        stream.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(
            metadata_response(&mut stream, 0, "orders"),
            Some((1, true)),
            "{}",
            daemon.report()
        );
        assert_eq!(
            metadata_response(&mut stream, 29, "secret"),
            Some((2, true)),
            "{}",
            daemon.report()
        );
        assert_eq!(metadata_response(&mut stream, 0, ""), None, "{}", daemon.report());

        // Several requests in one segment, also with a correlation id that occurs twice.
        let mut stream = connect();
        let requests = [fine.clone(), fine.clone(), denied.clone(), fine.clone()].concat();
        stream.write_all(&requests).expect("write");
        for _ in 0..2 {
            assert_eq!(
                metadata_response(&mut stream, 0, "orders"),
                Some((1, true)),
                "{}",
                daemon.report()
            );
        }
        assert_eq!(
            metadata_response(&mut stream, 29, "secret"),
            Some((2, true)),
            "{}",
            daemon.report()
        );
        assert_eq!(metadata_response(&mut stream, 0, ""), None, "{}", daemon.report());

        let mut stream = connect();
        stream.write_all(&fine).expect("write");
        assert_eq!(
            metadata_response(&mut stream, 0, "orders"),
            Some((1, true)),
            "{}",
            daemon.report()
        );
        let other = policy("client", "egress", &[PORT], &RULES.replace("orders", "secret"));
        daemon.apply(&[("client.yaml", &other)]).expect("apply");
        stream.write_all(&fine).expect("write");
        assert_eq!(
            metadata_response(&mut stream, 29, "orders"),
            Some((1, true)),
            "{}",
            daemon.report()
        );
        assert_eq!(metadata_response(&mut stream, 0, ""), None, "{}", daemon.report());
    }
}
