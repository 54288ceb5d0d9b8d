//! The flow API, read by a client in another language that has the public definitions.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    io::Write as _,
    net::{IpAddr, TcpStream, UdpSocket},
    path::Path,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use palisade_testbed::{
    Daemon,
    daemon::Settings,
    dns::{self, query, rtype},
    ns::wait_until,
    output,
    process::Process,
    tls::Certificate,
    topology::{FAMILIES, Family},
    web::curl,
};
use palisade_tests::{
    World,
    fixtures::{
        apps::{Apps, apps},
        dns::{EVIL, names, resolver, site},
        hubble::{Reply, call, calls, credentials, replies, socket, start},
        pki::{Authority, Validity},
        python::{self, Script},
    },
    setup::{daemon_with, question, remove_endpoint, request, tables, webs},
    world,
};
use serde_json::{Value, json};

const LONG: Duration = Duration::from_secs(60);

const POLICIES: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: allow-front}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: front}}]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}, {port: \"53\", protocol: UDP}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: no-db}
spec:
  endpointSelector: {matchLabels: {app: back}}
  ingressDeny:
  - fromEndpoints: [{matchLabels: {app: db}}]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}]
";

/// Makes calls to the unix socket of a daemon.
#[track_caller]
fn ask(daemon: &Daemon, ns: &palisade_testbed::Ns, list: &[Value]) -> HashMap<String, Reply> {
    calls(ns, &socket(daemon), None, list).unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()))
}

/// A value at a path such as `source.labels`; the JSON form leaves out default values.
fn at<'a>(flow: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(flow, |value, key| &value[key])
}

fn text<'a>(flow: &'a Value, path: &str) -> &'a str {
    at(flow, path).as_str().unwrap_or_default()
}

fn number(flow: &Value, path: &str) -> u64 {
    at(flow, path).as_u64().unwrap_or_default()
}

fn list<'a>(flow: &'a Value, path: &str) -> Vec<&'a str> {
    let values = at(flow, path).as_array();
    values.into_iter().flatten().filter_map(Value::as_str).collect()
}

fn port(flow: &Value, end: &str) -> u64 {
    let key = format!("{end}_port");
    let l4 = flow["l4"].as_object();
    l4.and_then(|l4| l4.values().next())
        .and_then(|transport| transport[&key].as_u64())
        .unwrap_or_default()
}

fn uuids<'a>(flows: impl IntoIterator<Item = &'a Value>) -> BTreeSet<String> {
    flows
        .into_iter()
        .map(|flow| text(flow, "uuid").to_owned())
        .collect()
}

type Predicate = Box<dyn Fn(&Value) -> bool>;

/// A filter, and what its flows have in common.
fn case(filter: Value, wanted: impl Fn(&Value) -> bool + 'static) -> (Value, Predicate) {
    (filter, Box::new(wanted))
}

/// Checks that the server chooses, by each filter, exactly the flows that the predicate chooses among all flows.
#[track_caller]
fn check_filters(daemon: &Daemon, ns: &palisade_testbed::Ns, cases: &[(Value, Predicate)]) {
    let all = &ask(daemon, ns, &[call("all", "GetFlows", json!({}))])["all"];
    assert_eq!(all.code, "OK", "{all:?}");
    let last = all
        .responses
        .last()
        .map(|last| last["time"].clone())
        .expect("flows");
    // Later flows do not count.
    let until = json!({"until": last});
    let mut list = vec![call("all", "GetFlows", until.clone())];
    for (index, (filter, _)) in cases.iter().enumerate() {
        for side in ["whitelist", "blacklist"] {
            let mut asked = until.clone();
            asked[side] = json!([filter]);
            list.push(call(&format!("{side} {index}"), "GetFlows", asked));
        }
    }
    let said = ask(daemon, ns, &list);
    let all = said["all"].flows();
    for (index, (filter, wanted)) in cases.iter().enumerate() {
        let (chosen, others): (Vec<&Value>, Vec<&Value>) = all.iter().partition(|flow| wanted(flow));
        assert!(!chosen.is_empty(), "no flow for {filter}: {all:#?}");
        assert!(!others.is_empty(), "{filter} chooses every flow");
        for (side, flows) in [("whitelist", chosen), ("blacklist", others)] {
            let reply = &said[&format!("{side} {index}")];
            assert_eq!(reply.code, "OK", "{filter}: {}", reply.details);
            let (have, want) = (uuids(reply.flows()), uuids(flows));
            let wrong: Vec<_> = have.symmetric_difference(&want).collect();
            let shown: Vec<_> = all
                .iter()
                .filter(|flow| wrong.contains(&&text(flow, "uuid").to_owned()))
                .collect();
            assert!(wrong.is_empty(), "{side} {filter}: {shown:#?}");
        }
    }
}

fn daemon_of(world: &World, settings: Settings) -> Daemon {
    world
        .daemon(settings, &[("p.yaml", POLICIES)])
        .unwrap_or_else(|error| panic!("{error:#}"))
}

const TRAFFIC: &str = "front -> back tcp/80 open
     front -> back udp/53 open
     db -> back tcp/80 drop
     far -> back tcp/80 drop
     far -> back ping drop
     front -> far tcp/80 open
     pfront -> far ping open";

#[test]
fn every_filter_of_packets_chooses_its_flows() {
    let world = world();
    let daemon = daemon_of(&world, Settings::default());
    world.expect(&daemon, TRAFFIC);
    let flows = daemon.wait_flows(&["--protocol", "icmp"], "pings", |flows| !flows.is_empty());
    flows.expect("flows");
    let back = world.addr("back", Family::V4).to_string();
    let far = world.addr("far", Family::V6).to_string();
    let all = &ask(&daemon, world.ns("node"), &[call("all", "GetFlows", json!({}))])["all"];
    let one = (*all.flows().first().expect("flows")).clone();
    let identity = |flow: &Value| number(flow, "source.identity");
    let front = all
        .flows()
        .into_iter()
        .find(|flow| text(flow, "source.pod_name") == "front");
    let front = identity(front.expect("a flow of front"));
    let interface = text(&one, "interface.name").to_owned();
    let named = interface.clone();
    let uuid = text(&one, "uuid").to_owned();
    let cases = vec![
        case(json!({"uuid": [&uuid]}), move |flow| text(flow, "uuid") == uuid),
        case(json!({"source_ip": [&back]}), {
            let back = back.clone();
            move |flow| text(flow, "IP.source") == back
        }),
        case(json!({"destination_ip": [format!("{far}/128")]}), move |flow| {
            text(flow, "IP.destination") == far
        }),
        case(json!({"source_pod": ["default/fro"]}), |flow| {
            text(flow, "source.pod_name").starts_with("fro") && text(flow, "source.namespace") == "default"
        }),
        case(json!({"destination_pod": ["default/back"]}), |flow| {
            text(flow, "destination.pod_name") == "back"
        }),
        case(json!({"source_pod": ["prod/"]}), |flow| {
            text(flow, "source.namespace") == "prod"
        }),
        case(json!({"source_label": ["app in (front)"]}), |flow| {
            list(flow, "source.labels").contains(&"k8s:app=front")
        }),
        case(json!({"destination_label": ["k8s:app=back"]}), |flow| {
            list(flow, "destination.labels").contains(&"k8s:app=back")
        }),
        case(json!({"source_workload": [{"name": "db"}]}), |flow| {
            flow["source"]["workloads"][0]["name"] == "db"
        }),
        case(
            json!({"destination_workload": [{"name": "back", "kind": "Pod"}]}),
            |flow| flow["destination"]["workloads"][0]["name"] == "back",
        ),
        case(json!({"source_identity": [front]}), move |flow| {
            identity(flow) == front
        }),
        case(json!({"destination_identity": [front]}), move |flow| {
            number(flow, "destination.identity") == front
        }),
        case(json!({"traffic_direction": [2]}), |flow| {
            number(flow, "traffic_direction") == 2
        }),
        case(json!({"verdict": [2]}), |flow| number(flow, "verdict") == 2),
        case(json!({"drop_reason_desc": [181]}), |flow| {
            number(flow, "drop_reason_desc") == 181
        }),
        case(json!({"event_type": [{"type": 5}]}), |flow| {
            number(flow, "event_type.type") == 5
        }),
        case(
            json!({"event_type": [{"type": 1, "match_sub_type": true, "sub_type": 133}]}),
            |flow| number(flow, "event_type.type") == 1 && number(flow, "event_type.sub_type") == 133,
        ),
        case(json!({"protocol": ["udp"]}), |flow| {
            flow["l4"].get("UDP").is_some()
        }),
        case(json!({"protocol": ["icmp"]}), |flow| {
            flow["l4"].get("ICMPv4").is_some() || flow["l4"].get("ICMPv6").is_some()
        }),
        case(json!({"source_port": ["80"]}), |flow| port(flow, "source") == 80),
        case(json!({"destination_port": ["53", "81"]}), |flow| {
            [53, 81].contains(&port(flow, "destination"))
        }),
        case(json!({"reply": [true]}), |flow| flow["is_reply"] == true),
        case(json!({"tcp_flags": [{"FIN": true, "ACK": true}]}), |flow| {
            at(flow, "l4.TCP.flags.FIN") == true && at(flow, "l4.TCP.flags.ACK") == true
        }),
        case(json!({"ip_version": [2]}), |flow| {
            number(flow, "IP.ipVersion") == 2
        }),
        case(json!({"interface": [{"name": named}]}), move |flow| {
            text(flow, "interface.name") == interface
        }),
        // All fields of one filter must match, and one value of each.
        case(
            json!({"source_pod": ["front", "db"], "destination_port": ["80"], "ip_version": [1], "verdict": [1, 2]}),
            |flow| {
                ["front", "db"].contains(&text(flow, "source.pod_name"))
                    && text(flow, "source.namespace") == "default"
                    && port(flow, "destination") == 80
                    && number(flow, "IP.ipVersion") == 1
                    && [1, 2].contains(&number(flow, "verdict"))
            },
        ),
    ];
    check_filters(&daemon, world.ns("node"), &cases);
}

const L7_RULES: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEntities: [all]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}]
      rules:
        http: [{method: GET, path: /public.*}]
  - toEntities: [all]
    toPorts:
    - ports: [{port: \"53\", protocol: UDP}]
      rules:
        dns: [{matchPattern: \"*.example\"}]
";

/// Header fields in records, those of a distributed trace and with a secret among them.
const HEADERS: &str =
    "[http]\nrecord_headers = [\"user-agent\", \"traceparent\", \"authorization\", \"cookie\"]\n";

fn l7_daemon(apps: &Apps) -> Daemon {
    daemon_with(&apps.topology, &tables(HEADERS), &[("web.yaml", L7_RULES)])
}

/// Returns the status of a request with header fields; 0 if there is no response.
fn request_with(apps: &Apps, family: Family, path: &str, fields: &[&str]) -> u16 {
    let url = format!("http://{}{path}", apps.at("internet", family, 80));
    let mut args: Vec<&str> = fields.iter().flat_map(|field| ["-H", field]).collect();
    args.push(&url);
    curl(apps.ns("client"), &args, LONG).expect("curl").status
}

/// Identifier of a distributed trace.
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

#[test]
fn every_filter_of_messages_chooses_its_flows_and_messages_have_all_fields() {
    let apps = apps();
    let _webs = webs(&apps, ["internet"], &[80], &[]);
    let daemon = l7_daemon(&apps);
    for family in FAMILIES {
        wait_until("an allowed request", LONG, || {
            request(&apps, family, "/public/a?x=1") == Some(200)
        })
        .expect("200");
        assert_eq!(request(&apps, family, "/secret"), Some(403));
        let traced = format!("traceparent: 00-{TRACE}-b7ad6b7169203331-01");
        assert_eq!(request_with(&apps, family, "/public/traced", &[&traced]), 200);
        let _ = question(&apps, family, "www.denied.test");
        let _ = question(&apps, family, "api.web.example");
    }
    for protocol in ["http", "dns"] {
        let filters = ["--protocol", protocol, "--verdict", "dropped"];
        daemon
            .wait_flows(&filters, protocol, |flows| flows.len() >= 2)
            .expect("records");
    }
    let all = &ask(&daemon, apps.ns("node"), &[call("all", "GetFlows", json!({}))])["all"];
    let headers = all
        .flows()
        .into_iter()
        .filter_map(|flow| flow["l7"]["http"]["headers"].as_array());
    let agent = headers.flatten().find(|header| header["key"] == "user-agent");
    let agent = agent.expect("a user agent")["value"].clone();
    let same_agent = agent.clone();
    let http = |flow: &Value| flow["l7"].get("http").cloned().unwrap_or_default();
    let cases = vec![
        case(json!({"protocol": ["http"]}), move |flow| http(flow).is_object()),
        case(json!({"protocol": ["dns"]}), |flow| {
            flow["l7"].get("dns").is_some()
        }),
        case(json!({"dns_query": ["^www\\.denied"]}), |flow| {
            text(flow, "l7.dns.query").starts_with("www.denied")
        }),
        case(json!({"http_status_code": ["200"]}), |flow| {
            number(flow, "l7.http.code") == 200
        }),
        case(json!({"http_status_code": ["2+"]}), |flow| {
            number(flow, "l7.http.code") / 100 == 2
        }),
        case(json!({"http_method": ["get"]}), |flow| {
            text(flow, "l7.http.method") == "GET"
        }),
        case(json!({"http_path": ["^/public/[a-z]$"]}), |flow| {
            text(flow, "l7.http.url").contains("/public/a")
        }),
        case(json!({"http_url": ["/secret$"]}), |flow| {
            text(flow, "l7.http.url").ends_with("/secret")
        }),
        case(
            json!({"http_header": [{"key": "User-Agent", "value": agent}]}),
            move |flow| {
                let headers = flow["l7"]["http"]["headers"].as_array();
                let mut headers = headers.into_iter().flatten();
                headers.any(|header| header["key"] == "user-agent" && header["value"] == same_agent)
            },
        ),
        case(json!({"trace_id": [TRACE]}), |flow| {
            text(flow, "trace_context.parent.trace_id") == TRACE
        }),
        case(json!({"event_type": [{"type": 129}]}), |flow| {
            number(flow, "Type") == 2
        }),
    ];
    check_filters(&daemon, apps.ns("node"), &cases);
    let all = &ask(&daemon, apps.ns("node"), &[call("all", "GetFlows", json!({}))])["all"];
    let denied = all
        .flows()
        .into_iter()
        .find(|flow| text(flow, "l7.http.url").ends_with("/secret") && number(flow, "l7.type") == 1);
    let denied = denied.expect("the denied request");
    assert_eq!(number(denied, "verdict"), 2, "{denied:#}");
    assert_eq!(text(denied, "l7.http.protocol"), "HTTP/1.1", "{denied:#}");
    assert_eq!(denied["egress_denied_by"][0]["name"], "web", "{denied:#}");
    assert!(text(denied, "Summary").contains("GET"), "{denied:#}");
    let answer = all
        .flows()
        .into_iter()
        .find(|flow| number(flow, "l7.http.code") == 200)
        .expect("the response");
    assert!(text(answer, "Summary").contains(" 200 "), "{answer:#}");
    assert_eq!(answer["is_reply"], true, "{answer:#}");
    assert_eq!(answer["egress_allowed_by"][0]["name"], "web", "{answer:#}");
    assert_eq!(
        answer["egress_allowed_by"][0]["namespace"], "default",
        "{answer:#}"
    );
    let query = all
        .flows()
        .into_iter()
        .find(|flow| text(flow, "l7.dns.query") == "api.web.example.");
    assert_eq!(list(query.expect("the query"), "l7.dns.qtypes"), ["A"]);
}

#[test]
fn packets_have_all_fields_and_the_other_methods_answer() {
    let world = world();
    let daemon = daemon_of(&world, Settings::default());
    world.expect(&daemon, TRAFFIC);
    let mut status = call("status", "ServerStatus", json!({}));
    status["metadata"] = json!(true);
    let mut watch = call("watch", "Watch", json!({"service": ""}));
    let mut peers = call("peers", "Notify", json!({}));
    (watch["count"], peers["count"]) = (json!(1), json!(1));
    let said = ask(
        &daemon,
        world.ns("node"),
        &[
            call("flows", "GetFlows", json!({})),
            status,
            call("nodes", "GetNodes", json!({})),
            call("namespaces", "GetNamespaces", json!({})),
            call("events", "GetAgentEvents", json!({})),
            call("debug", "GetDebugEvents", json!({})),
            call("health", "Check", json!({"service": "hubble.server.Observer"})),
            call("unknown service", "Check", json!({"service": "x"})),
            watch,
            peers,
            call("nonsense", "Nonsense", json!({})),
        ],
    );
    assert_eq!(said["flows"].code, "OK", "{:?}", said["flows"]);
    let flows = said["flows"].flows();
    for family in FAMILIES {
        let (source, destination) = (
            world.addr("db", family).to_string(),
            world.addr("back", family).to_string(),
        );
        let of = |event: u64| {
            let mut flows = flows.iter().filter(|flow| {
                text(flow, "IP.source") == source
                    && text(flow, "IP.destination") == destination
                    && number(flow, "event_type.type") == event
                    && number(flow, "drop_reason_desc") == 181
            });
            *flows
                .next()
                .unwrap_or_else(|| panic!("no event {event} of {source} in {flows:#?}"))
        };
        assert_eq!(number(of(1), "policy_match_type"), 0);
        assert_eq!(number(of(5), "policy_match_type"), 2);
        for flow in [of(1), of(5)] {
            assert_eq!(number(flow, "verdict"), 2, "{flow:#}");
            assert_eq!(number(flow, "drop_reason"), 181, "{flow:#}");
            assert_eq!(flow["node_name"], "node1", "{flow:#}");
            assert_eq!(flow["ingress_denied_by"][0]["name"], "no-db", "{flow:#}");
            assert_eq!(flow["ingress_denied_by"][0]["namespace"], "default", "{flow:#}");
            assert_eq!(
                flow["ingress_denied_by"][0]["kind"], "CiliumNetworkPolicy",
                "{flow:#}"
            );
            assert_eq!(number(flow, "traffic_direction"), 1, "{flow:#}");
            assert_eq!(port(flow, "destination"), 80, "{flow:#}");
            assert_eq!(at(flow, "l4.TCP.flags"), &json!({"SYN": true}), "{flow:#}");
            assert_eq!(text(flow, "source.pod_name"), "db", "{flow:#}");
            assert!(list(flow, "source.labels").contains(&"k8s:app=db"), "{flow:#}");
            assert!(
                number(flow, "destination.ID") > 0 && number(flow, "source.identity") > 255,
                "{flow:#}"
            );
            assert!(
                !text(flow, "ethernet.source").is_empty() && !text(flow, "interface.name").is_empty(),
                "{flow:#}"
            );
            assert_eq!(text(flow, "Summary"), "TCP Flags: SYN", "{flow:#}");
            assert_eq!(text(flow, "uuid").len(), 36, "{flow:#}");
        }
        let verdict = flows.iter().find(|flow| {
            text(flow, "IP.source") == world.addr("front", family).to_string()
                && number(flow, "event_type.type") == 5
                && number(flow, "traffic_direction") == 1
                && port(flow, "destination") == 80
        });
        let verdict = verdict.expect("a policy verdict");
        assert_eq!(number(verdict, "verdict"), 1, "{verdict:#}");
        // PEER_AND_PORT: the rule names the peer and the port.
        assert_eq!(number(verdict, "policy_match_type"), 2, "{verdict:#}");
        let by = &verdict["ingress_allowed_by"][0];
        assert_eq!(
            (text(by, "name"), text(by, "namespace"), text(by, "kind")),
            ("allow-front", "default", "CiliumNetworkPolicy"),
            "{verdict:#}"
        );
        assert_ne!(text(by, "revision"), "", "{verdict:#}");
        let trace = flows.iter().find(|flow| {
            text(flow, "IP.source") == world.addr("front", family).to_string()
                && number(flow, "event_type.type") == 4
                && port(flow, "destination") == 80
        });
        let trace = trace.expect("a trace");
        assert_eq!(
            (number(trace, "verdict"), &trace["is_reply"]),
            (1, &json!(false)),
            "{trace:#}"
        );
        assert!(
            number(trace, "trace_observation_point") > 0 && number(trace, "trace_reason") > 0,
            "{trace:#}"
        );
    }
    let status = &said["status"];
    assert_eq!(
        status.metadata["hubble-server-version"],
        env!("CARGO_PKG_VERSION")
    );
    let counts = &status.responses[0];
    let count = |key: &str| text(counts, key).parse::<usize>().unwrap_or_default();
    assert!(
        count("num_flows") >= flows.len() && count("seen_flows") >= flows.len(),
        "{counts}"
    );
    assert_eq!(count("max_flows"), 16_384, "{counts}");
    assert!(
        count("uptime_ns") > 0 && counts["flows_rate"].as_f64().unwrap_or_default() > 0.0,
        "{counts}"
    );
    assert_eq!(counts["num_connected_nodes"], 1, "{counts}");
    assert!(text(counts, "version").starts_with("palisade v"), "{counts}");
    let address = socket(&daemon).replace("unix:", "unix://");
    let node = &said["nodes"].responses[0]["nodes"][0];
    assert_eq!((text(node, "name"), text(node, "address")), ("node1", &*address));
    assert_eq!(node["tls"], json!({}), "{node}");
    let namespaces = &said["namespaces"].responses[0]["namespaces"];
    assert_eq!(
        namespaces,
        &json!([{"namespace": "default"}, {"namespace": "prod"}])
    );
    let kinds: Vec<u64> = said["events"]
        .responses
        .iter()
        .map(|response| number(response, "agent_event.type"))
        .collect();
    for kind in [2, 3, 5, 7, 9] {
        assert!(
            kinds.contains(&kind),
            "no event of type {kind}: {:#?}",
            said["events"].responses
        );
    }
    let created = said["events"]
        .responses
        .iter()
        .find(|response| text(response, "agent_event.endpoint_update.pod_name") == "back");
    assert!(created.is_some(), "{:#?}", said["events"].responses);
    assert!(said["debug"].responses.is_empty() && said["debug"].code == "OK");
    assert_eq!(said["health"].responses[0]["status"], 1);
    assert_eq!(said["unknown service"].code, "NOT_FOUND");
    assert_eq!(said["watch"].responses[0]["status"], 1);
    assert_eq!(said["peers"].responses[0]["name"], "node1");
    assert_eq!(said["peers"].responses[0]["type"], 1);
    assert_eq!(said["peers"].responses[0]["address"], *address);
    assert!(said["peers"].responses[0].get("tls").is_none());
    assert_eq!(said["nonsense"].code, "UNIMPLEMENTED");
}

/// The client may query one name, and connect to its addresses; nothing may connect to the client.
const NAMES: &str = "apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: by-name}
spec:
  endpointSelector: {matchLabels: {app: client}}
  ingress:
  - fromEntities: [host]
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{port: \"53\", protocol: ANY}]
      rules:
        dns: [{matchName: www.example}]
  - toFQDNs: [{matchName: www.example}]
    toPorts:
    - ports: [{port: \"80\", protocol: TCP}]
";

#[test]
fn filters_by_dns_name_choose_the_flows_of_learned_addresses() {
    const SITE: u8 = 10;
    let names = names();
    let daemon = daemon_with(&names.topology, &Settings::default(), &[("p.yaml", NAMES)]);
    for family in FAMILIES {
        let address = site(SITE, family);
        names.resolves(&daemon, "client", resolver(family), "www.example", address);
        names.reaches(&daemon, "client", SITE, family);
        names.does_not_reach(&daemon, "client", EVIL, family);
        // From the learned address to the client, which denies it.
        let client = (names.topology.addr("client", family), 9_000);
        names.ns("internet").enter(|| {
            let socket = UdpSocket::bind((address, 0)).expect("socket");
            socket.send_to(b"x", client).expect("send");
        });
    }
    for filter in ["--from-fqdn", "--to-fqdn"] {
        daemon
            .wait_flows(&[filter, "www.example"], filter, |flows| {
                let versions: BTreeSet<&str> = flows.iter().map(|flow| text(flow, "IP.ipVersion")).collect();
                versions.len() == 2
            })
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    }
    let cases = vec![
        case(json!({"source_fqdn": ["www.example"]}), |flow| {
            list(flow, "source_names").contains(&"www.example")
        }),
        case(json!({"destination_fqdn": ["www.example"]}), |flow| {
            list(flow, "destination_names").contains(&"www.example")
        }),
        case(
            json!({"destination_fqdn": ["absent.example", "*.example"]}),
            |flow| !list(flow, "destination_names").is_empty(),
        ),
    ];
    let ns = names.ns("node");
    check_filters(&daemon, ns, &cases);
    let all = &ask(&daemon, ns, &[call("all", "GetFlows", json!({}))])["all"];
    let flows = all.flows();
    for family in FAMILIES {
        let (client, site) = (
            names.topology.addr("client", family).to_string(),
            site(SITE, family).to_string(),
        );
        let find = |source: &str, destination: &str, event: u64| {
            let mut flows = flows.iter().filter(|flow| {
                text(flow, "IP.source") == source
                    && text(flow, "IP.destination") == destination
                    && number(flow, "event_type.type") == event
            });
            *flows.next().expect("a flow")
        };
        let allowed = find(&client, &site, 5);
        assert_eq!(
            (number(allowed, "verdict"), number(allowed, "policy_match_type")),
            (1, 2),
            "{allowed:#}"
        );
        assert_eq!(list(allowed, "destination_names"), ["www.example"], "{allowed:#}");
        assert_eq!(allowed["egress_allowed_by"][0]["name"], "by-name", "{allowed:#}");
        let denied = find(&site, &client, 5);
        assert_eq!(list(denied, "source_names"), ["www.example"], "{denied:#}");
        assert_eq!(
            (number(denied, "verdict"), number(denied, "policy_match_type")),
            (2, 0),
            "{denied:#}"
        );
        assert_eq!(denied["ingress_denied_by"][0]["name"], "by-name", "{denied:#}");
    }
}

#[test]
fn removed_policies_endpoints_and_addresses_and_learned_names_are_agent_events() {
    let names = names();
    let other = NAMES
        .replace("by-name", "other")
        .replace("app: client", "app: dns");
    let policies = [("p.yaml", NAMES), ("other.yaml", &*other)];
    let daemon = daemon_with(&names.topology, &Settings::default(), &policies);
    let address = site(10, Family::V6);
    names.resolves(&daemon, "client", resolver(Family::V6), "www.example", address);
    let gone = FAMILIES.map(|family| names.topology.addr("dns", family));
    // The workload first: without its policy the endpoint would change once more.
    remove_endpoint(&daemon, "dns");
    fs::remove_file(daemon.policies().join("other.yaml")).expect("removed");
    daemon.settle().expect("the policies in force");
    let ns = names.ns("node");
    let events = || {
        let said = ask(&daemon, ns, &[call("events", "GetAgentEvents", json!({}))]);
        let responses = said["events"].responses.iter();
        responses
            .map(|response| response["agent_event"].clone())
            .collect::<Vec<_>>()
    };
    wait_until("the removed policy", LONG, || {
        events().iter().any(|event| number(event, "type") == 4)
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{:#?}", events()));
    let events = events();
    let of = |kind: u64| events.iter().filter(move |event| number(event, "type") == kind);
    let removed = of(4).next().expect("a removed policy");
    assert_eq!(
        list(removed, "policy_update.labels"),
        ["default/other"],
        "{removed:#}"
    );
    let revision = |event: &Value| {
        text(event, "policy_update.revision")
            .parse::<u64>()
            .unwrap_or_default()
    };
    assert!(
        of(3).all(|updated| revision(updated) < revision(removed)),
        "{events:#?}"
    );
    let deleted: Vec<&Value> = of(8).collect();
    assert_eq!(deleted.len(), 1, "{events:#?}");
    assert_eq!(text(deleted[0], "endpoint_update.pod_name"), "dns");
    assert_eq!(text(deleted[0], "endpoint_update.namespace"), "default");
    assert!(list(deleted[0], "endpoint_update.labels").contains(&"k8s:app=dns"));
    for address in gone {
        let cidr = ipnet_text(address);
        let change = of(10).find(|event| text(event, "ipcache_update.cidr") == cidr);
        let change = change.unwrap_or_else(|| panic!("{cidr}: {events:#?}"));
        assert_eq!(text(change, "ipcache_update.pod_name"), "dns", "{change:#}");
        assert!(number(change, "ipcache_update.identity") > 255, "{change:#}");
    }
    let mut learned = events
        .iter()
        .filter(|event| text(event, "unknown.type") == "name-learned");
    let learned = learned.next().expect("a learned name");
    let notice = text(learned, "unknown.notification");
    assert!(
        notice.ends_with(&format!("has learned {address} by the name www.example")),
        "{notice}"
    );
}

/// Returns a prefix that contains only this address.
fn ipnet_text(address: IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

#[test]
fn no_response_has_what_redaction_removed() {
    let apps = apps();
    let _webs = webs(&apps, ["internet"], &[80], &[]);
    let daemon = l7_daemon(&apps);
    // The last one is the user information of a URL, as curl encodes it in the field Authorization.
    let secrets = ["token4711", "bearer4711", "cookie4711", "dXNlcjQ3MTE6cHc"];
    for family in FAMILIES {
        wait_until("an allowed request", LONG, || {
            request(&apps, family, "/public/a") == Some(200)
        })
        .expect("200");
        let fields = ["Authorization: Bearer bearer4711", "Cookie: session=cookie4711"];
        for (path, status) in [
            ("/public/b?token=token4711", 200),
            ("/secret?token=token4711", 403),
        ] {
            assert_eq!(request_with(&apps, family, path, &fields), status);
        }
        let url = format!("http://user4711:pw@{}/public/c", apps.at("internet", family, 80));
        assert_eq!(curl(apps.ns("client"), &[&url], LONG).expect("curl").status, 200);
    }
    let shown = ["--http-url", "token=", "--verdict", "dropped"];
    daemon
        .wait_flows(&shown, "the denied requests", |flows| flows.len() >= 2)
        .expect("records");
    let whitelist = |filter: Value| json!({"whitelist": [filter]});
    let header = |value: &str| whitelist(json!({"http_header": [{"key": "authorization", "value": value}]}));
    let said = ask(
        &daemon,
        apps.ns("node"),
        &[
            call("flows", "GetFlows", json!({})),
            call("masked", "GetFlows", json!({"field_mask": "l7,verdict"})),
            call("events", "GetAgentEvents", json!({})),
            call("debug", "GetDebugEvents", json!({})),
            call("status", "ServerStatus", json!({})),
            call("redacted header", "GetFlows", header("[redacted]")),
            call("header", "GetFlows", header("Bearer bearer4711")),
            call(
                "url",
                "GetFlows",
                whitelist(json!({"http_url": ["token4711|user4711"]})),
            ),
            call("path", "GetFlows", whitelist(json!({"http_path": ["4711"]}))),
        ],
    );
    for (id, reply) in &said {
        assert_eq!(reply.code, "OK", "{id}: {reply:?}");
        let all = format!("{:?}", reply.responses);
        for secret in secrets {
            assert!(!all.contains(secret), "{id}: {secret} in {all}");
        }
    }
    // The fields are there, without their values, and a client cannot find the values by filters either.
    let flows = format!("{:?}", said["masked"].responses);
    assert!(flows.contains("token=[redacted]"), "{flows}");
    assert!(!said["redacted header"].flows().is_empty());
    for id in ["header", "url", "path"] {
        assert!(said[id].flows().is_empty(), "{id}: {:?}", said[id]);
    }
}

#[test]
fn ranges_masks_and_errors_are_those_of_the_api() {
    let world = world();
    let daemon = daemon_of(&world, Settings::default());
    world.expect(&daemon, TRAFFIC);
    let ns = world.ns("node");
    let all = &ask(&daemon, ns, &[call("all", "GetFlows", json!({}))])["all"];
    let (flows, count) = (all.flows(), all.responses.len());
    assert!(count > 10, "{all:?}");
    let (since, until) = (&flows[3]["time"], &flows[8]["time"]);
    let mask = json!({"paths": "verdict,source.pod_name"});
    let filter = |field: &str, value: Value| json!({"whitelist": [{field: value}]});
    let said = ask(
        &daemon,
        ns,
        &[
            call("first", "GetFlows", json!({"number": "4", "first": true})),
            call("last", "GetFlows", json!({"number": "4"})),
            call("between", "GetFlows", json!({"since": since, "until": until})),
            call(
                "since and number",
                "GetFlows",
                json!({"since": since, "number": "2"}),
            ),
            call(
                "masked",
                "GetFlows",
                json!({"number": "1", "first": true, "field_mask": "verdict,source.podName"}),
            ),
            call(
                "whole",
                "GetFlows",
                json!({"number": "1", "first": true, "field_mask": "source,time"}),
            ),
            call(
                "experimental",
                "GetFlows",
                json!({"number": "1", "first": true, "experimental": {"field_mask": "verdict"}}),
            ),
            call("bad mask", "GetFlows", json!({"field_mask": "colour"})),
            call(
                "first and follow",
                "GetFlows",
                json!({"first": true, "follow": true}),
            ),
            call(
                "later filter",
                "GetFlows",
                filter("of_a_later_version", json!(["x"])),
            ),
            call("later field", "GetFlows", json!({"of_a_later_version": "x"})),
            call("node", "GetFlows", filter("node_name", json!(["nod*"]))),
            call("other node", "GetFlows", filter("node_name", json!(["x*"]))),
            call(
                "node labels",
                "GetFlows",
                filter("node_labels", json!(["!absent"])),
            ),
            call("service", "GetFlows", filter("source_service", json!(["x"]))),
            call("address", "GetFlows", filter("source_ip", json!(["10.0.0"]))),
            call("regex", "GetFlows", filter("dns_query", json!(["("]))),
        ],
    );
    let same = |id: &str, want: &[&Value]| {
        assert_eq!(said[id].flows(), want, "{id}: {:?}", said[id]);
    };
    same("first", &flows[..4]);
    same("last", &flows[count - 4..]);
    let time = |flow: &Value| text(flow, "time").to_owned();
    // Flows can be out of order by some microseconds.
    let within: Vec<&Value> = flows
        .iter()
        .copied()
        .filter(|flow| time(flow) >= time(flows[3]) && time(flow) <= time(flows[8]))
        .collect();
    same("between", &within);
    assert_eq!(said["since and number"].flows().len(), 2);
    let masked = said["masked"].flows()[0];
    let keys: Vec<&String> = masked.as_object().expect("an object").keys().collect();
    assert!(
        keys.iter()
            .all(|key| ["verdict", "source"].contains(&key.as_str())),
        "{masked} {mask}"
    );
    assert_eq!(masked["verdict"], flows[0]["verdict"]);
    let whole = said["whole"].flows()[0];
    assert_eq!(
        (&whole["source"], whole.get("Summary")),
        (&flows[0]["source"], None)
    );
    assert_eq!(
        said["experimental"].flows()[0],
        &json!({"verdict": flows[0]["verdict"]})
    );
    assert!(said["node"].flows().len() >= count && said["node labels"].flows().len() >= count);
    assert_eq!(
        (&*said["other node"].code, said["other node"].flows().len()),
        ("OK", 0)
    );
    for (id, named) in [
        ("bad mask", "'colour'"),
        ("first and follow", "follow"),
        ("later filter", "field 900 of flow.FlowFilter"),
        ("later field", "field 900 of observer.GetFlowsRequest"),
        ("service", "source_service"),
        ("address", "source_ip"),
        ("regex", "dns_query"),
    ] {
        let reply = &said[id];
        assert_eq!(reply.code, "INVALID_ARGUMENT", "{id}: {reply:?}");
        assert!(reply.details.contains(named), "{id}: {reply:?}");
    }
}

#[test]
fn followers_get_every_flow_while_slow_ones_are_told_their_losses_and_stopped_ones_hurt_nobody() {
    let world = world();
    let daemon = daemon_of(
        &world,
        tables("[limits]\nflows = 64\nevents_per_second = 100000\n"),
    );
    let (ns, target) = (world.ns("node"), socket(&daemon));
    let follow =
        json!({"follow": true, "whitelist": [{"destination_port": ["80"], "tcp_flags": [{"SYN": true}]}]});
    let fast = start(ns, &target, None, &[call("fast", "GetFlows", follow)]).expect("client");
    let stopped = start(
        ns,
        &target,
        None,
        &[call(
            "stopped",
            "GetFlows",
            json!({"follow": true, "number": "1"}),
        )],
    )
    .expect("client");
    let slow = start(
        ns,
        &target,
        None,
        &[call("slow", "GetFlows", json!({"follow": true, "number": "1"}))],
    )
    .expect("client");
    let heard = |script: &Script, id: &str| replies(&script.log()).remove(id).unwrap_or_default();
    wait_until("readers", LONG, || {
        world
            .check("front -> back tcp/80 open")
            .is_ok_and(|wrong| wrong.is_empty())
            && [(&fast, "fast"), (&stopped, "stopped"), (&slow, "slow")]
                .into_iter()
                .all(|(script, id)| !heard(script, id).responses.is_empty())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    let signal = |script: &Script, signal| {
        kill(
            Pid::from_raw(i32::try_from(script.pid()).expect("a process id")),
            signal,
        )
        .expect("a signal");
    };
    signal(&stopped, Signal::SIGSTOP);
    signal(&slow, Signal::SIGSTOP);
    // Much more than the ring and the buffers of a connection have room for.
    let before = heard(&fast, "fast").responses.len();
    let flood = format!(
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nfor p in range(1, 60000): s.sendto(b'x', ('{}', p))",
        world.addr("far", Family::V4)
    );
    let out = output(world.ns("front").command("python3").args(["-c", &flood]), LONG).expect("python3");
    assert!(out.status.success(), "{out:?}");
    for family in FAMILIES {
        let (source, line) = (
            world.addr("front", family).to_string(),
            "front -> back tcp/80 open",
        );
        wait_until("the fast reader's flow", LONG, || {
            assert!(world.check(line).is_ok_and(|wrong| wrong.is_empty()));
            let said = heard(&fast, "fast");
            said.flows()
                .iter()
                .skip(before)
                .any(|flow| text(flow, "IP.source") == source)
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{:?}", heard(&fast, "fast")));
    }
    signal(&slow, Signal::SIGCONT);
    wait_until("the report of losses", LONG, || {
        heard(&slow, "slow").responses.iter().any(|response| {
            number(response, "lost_events.source") == 3
                && text(response, "lost_events.num_events_lost")
                    .parse::<u64>()
                    .is_ok_and(|lost| lost > 0)
        })
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", slow.log()));
    let status = daemon.status().expect("status");
    assert!(
        number(&status, "hubble.readers") >= 2 && number(&status, "hubble.lost") > 0,
        "{status:#}"
    );
    signal(&stopped, Signal::SIGCONT);
}

#[test]
fn events_that_the_programs_could_not_send_are_reported_to_readers_and_counted() {
    let world = world();
    let daemon = daemon_of(
        &world,
        tables("[limits]\nevents_per_second = 1000000\n[metrics]\nlisten = \"127.0.0.1:9965\"\n"),
    );
    let ns = world.ns("node");
    let whitelist = json!({"follow": true, "whitelist": [{"source_port": ["1"]}]});
    let mut follow = call("follower", "GetFlows", whitelist);
    follow["timeout"] = json!(600);
    let follower = start(ns, &socket(&daemon), None, &[follow]).expect("client");
    let reads = |status: &Value| number(status, "hubble.readers") == 1;
    daemon.wait_status("the follower", reads).expect("a reader");
    let process = Pid::from_raw(i32::try_from(daemon.pid().expect("a daemon")).expect("a process id"));
    kill(process, Signal::SIGSTOP).expect("a signal");
    // Several times as many events as the ring buffer of the programs has room for.
    let flood = format!(
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nfor p in range(1, 60000): s.sendto(b'x', ('{}', p))",
        world.addr("back", Family::V4)
    );
    let out = output(world.ns("db").command("python3").args(["-c", &flood]), LONG);
    kill(process, Signal::SIGCONT).expect("a signal");
    assert!(out.expect("python3").status.success());
    let lost = |responses: &[Value]| -> u64 {
        let lost = responses
            .iter()
            .filter(|response| number(response, "lost_events.source") == 1);
        lost.filter_map(|response| text(response, "lost_events.num_events_lost").parse::<u64>().ok())
            .sum()
    };
    let counted = || {
        let got = curl(ns, &["http://127.0.0.1:9965/metrics"], LONG).expect("curl");
        let name = "hubble_lost_events_total{source=\"perf_event_ring_buffer\"} ";
        let value = got.body.lines().find_map(|line| line.strip_prefix(name));
        value.expect("a value").parse::<f64>().expect("a number")
    };
    let mut found = (0, 0.0);
    wait_until("the same number everywhere", LONG, || {
        let all = replies(&follower.log()).remove("follower").unwrap_or_default();
        found = (lost(&all.responses), counted());
        found.0 > 10_000 && found.0 as f64 == found.1
    })
    .unwrap_or_else(|error| panic!("{error:#}: {found:?}\n{}", daemon.report()));
    // A reader that comes later is told, too, with flows that the ring still has.
    let said = ask(&daemon, ns, &[call("later", "GetFlows", json!({}))]);
    assert!(lost(&said["later"].responses) > 0, "{}", daemon.report());
    assert!(
        daemon.log().contains("flows are lost before the flow ring"),
        "{}",
        daemon.log()
    );
}

/// Stops threads of a process until it ends (ptrace(2)), and says so.
const STOP_THREADS: &str = "
import ctypes, os, sys, time
ptrace = ctypes.CDLL(None).ptrace
ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
SEIZE, INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000
for thread in map(int, sys.argv[1:]):
    assert ptrace(SEIZE, thread, None, None) == 0
    assert ptrace(INTERRUPT, thread, None, None) == 0
    os.waitpid(thread, WALL)
print('stopped', flush=True)
time.sleep(600)
";

#[test]
fn records_that_the_queue_had_no_room_for_are_reported_to_readers_and_counted() {
    let names = names();
    let settings = tables("[worker]\nthreads = 1\n[metrics]\nlisten = \"127.0.0.1:9965\"\n");
    let daemon = daemon_with(&names.topology, &settings, &[("p.yaml", NAMES)]);
    let (node, dir) = (names.ns("node"), names.topology.dir());
    for family in FAMILIES {
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "www.example",
            site(10, family),
        );
    }
    // Readers that get no flow get the reports.
    let whitelist = json!({"follow": true, "whitelist": [{"source_port": ["1"]}]});
    let mut follow = call("follower", "GetFlows", whitelist);
    follow["timeout"] = json!(600);
    let follower = start(node, &socket(&daemon), None, &[follow]).expect("client");
    let reads = |status: &Value| number(status, "hubble.readers") == 1;
    daemon.wait_status("the follower", reads).expect("a reader");
    let observe = Process::spawn(
        "observe",
        daemon.command(&["observe", "--follow", "--from-port", "1", "-o", "json"]),
        dir,
    )
    .expect("observe");
    let metric = |name: &str| {
        let got = curl(node, &["http://127.0.0.1:9965/metrics"], LONG).expect("curl");
        let value = got.body.lines().find_map(|line| line.strip_prefix(name));
        value.expect("a value").trim().parse::<u64>().expect("a number")
    };
    wait_until("the command follows", LONG, || {
        metric("palisade_control_clients{kind=\"following\"}") == 1
    })
    .expect("a follower");

    // The threads that take records out of the queues stand still, and everything else goes on.
    let tasks = format!("/proc/{}/task", daemon.pid().expect("a daemon"));
    let threads: Vec<String> = fs::read_dir(tasks)
        .expect("threads")
        .map(|task| task.expect("a thread").path())
        .filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "records\n"))
        .filter_map(|task| Some(task.file_name()?.to_str()?.to_owned()))
        .collect();
    assert_eq!(threads.len(), 2, "{}", daemon.report());
    let mut command = node.command("python3");
    command.args(["-c", STOP_THREADS]).args(&threads);
    let mut stopper = Process::spawn("stopper", command, dir).expect("python3");
    wait_until("the threads stand", LONG, || stopper.log().contains("stopped"))
        .unwrap_or_else(|error| panic!("{error:#}: {}", stopper.log()));
    // More queries than the queue has room for, each with a record.
    let mut sent = 0;
    let lost_so_far = |status: &Value| number(&status["workers"]["workers"][0], "records_lost");
    wait_until("the queue is full", LONG, || {
        for family in FAMILIES {
            let any: IpAddr = match family {
                Family::V4 => [0; 4].into(),
                Family::V6 => [0; 16].into(),
            };
            let message = query(7, &[("evil.example", rtype::A)]);
            names.ns("client").enter(|| {
                let socket = UdpSocket::bind((any, 0)).expect("socket");
                for _ in 0..100 {
                    socket
                        .send_to(&message, (resolver(family), dns::PORT))
                        .expect("send");
                }
            });
            sent += 100;
        }
        lost_so_far(&daemon.status().expect("status")) > 500
    })
    .unwrap_or_else(|error| panic!("{error:#}: {sent} sent\n{}", daemon.report()));
    // Inspection goes on without its records.
    assert_eq!(names.resolver.requests_for("evil.example"), 0);
    for family in FAMILIES {
        names.resolves(
            &daemon,
            "client",
            resolver(family),
            "www.example",
            site(10, family),
        );
    }
    stopper.terminate(LONG).expect("the end of python3");

    let by_api = || -> u64 {
        let all = replies(&follower.log()).remove("follower").unwrap_or_default();
        let reports = all.responses.iter();
        reports
            .filter(|response| number(response, "lost_events.source") == 2)
            .filter_map(|response| text(response, "lost_events.num_events_lost").parse::<u64>().ok())
            .sum()
    };
    let by_command = || -> u64 {
        let lines: Vec<Value> = observe
            .log()
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect();
        lines
            .iter()
            .filter(|line| line["lost_events"]["source"] == "OBSERVER_EVENTS_QUEUE")
            .filter_map(|line| {
                let count = &line["lost_events"]["num_events_lost"];
                count.as_u64().or_else(|| count.as_str()?.parse().ok())
            })
            .sum()
    };
    let mut found = [0; 4];
    wait_until("the same number everywhere", LONG, || {
        let lost = lost_so_far(&daemon.status().expect("status"));
        let counted = metric("hubble_lost_events_total{source=\"observer_events_queue\"}");
        found = [lost, by_api(), by_command(), counted];
        lost > 500 && found == [lost; 4]
    })
    .unwrap_or_else(|error| panic!("{error:#}: {found:?}\n{}\n{}", observe.log(), daemon.report()));
    // The queue is read again: the records that it had room for, and those of new queries.
    let denied = daemon
        .flows(&["--protocol", "dns", "--verdict", "DROPPED"])
        .expect("flows");
    assert!(denied.len() > 1_000, "{}", denied.len());
}

#[test]
fn only_root_and_the_group_can_use_the_socket() {
    const GROUP: &str = "daemon";
    let world = world();
    let connects = |daemon: &Daemon, who: &[&str]| {
        let path = daemon.socket().with_file_name("hubble.sock");
        let script = format!(
            "import socket; socket.socket(socket.AF_UNIX).connect('{}')",
            path.display()
        );
        let mut command = world.ns("node").command("setpriv");
        command.args(who).args(["/usr/bin/python3", "-c", &script]);
        let out = output(&mut command, LONG).expect("setpriv");
        let refused = String::from_utf8_lossy(&out.stderr).contains("PermissionError");
        assert!(out.status.success() || refused, "{who:?}: {out:?}");
        out.status.success()
    };
    let root = ["--reuid=0"];
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let member = ["--reuid=65534", "--regid=65534", &format!("--groups={GROUP}")];
    for (section, group) in [
        (String::new(), false),
        (format!("[hubble]\ngroup = \"{GROUP}\"\n"), true),
    ] {
        let mut daemon = daemon_of(&world, tables(&section));
        // The directory of the testbed is private.
        let dir = daemon.socket();
        let dir = dir.parent().expect("a directory");
        fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("open");
        let path = daemon.socket().with_file_name("hubble.sock");
        wait_until("the socket", LONG, || path.exists()).expect("the socket");
        assert!(connects(&daemon, &root));
        assert!(!connects(&daemon, &nobody));
        assert_eq!(connects(&daemon, &member), group);
        daemon.terminate().expect("the end of the daemon");
        assert!(!path.exists());
    }
}

#[test]
fn tcp_needs_tls_off_the_loopback_and_clients_a_certificate_if_configured() {
    let world = world();
    let dir = tempfile::tempdir().expect("a directory");
    let ca = Authority::root(dir.path(), "ca").expect("an authority");
    let other = Authority::root(dir.path(), "other").expect("an authority");
    let own = ca
        .server("node1", &["node1"], Validity::Now, true)
        .expect("a certificate");
    let client = ca
        .server("client", &["client"], Validity::Now, true)
        .expect("a certificate");
    let stranger = other
        .server("client", &["client"], Validity::Now, true)
        .expect("a certificate");
    let (cert, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
    let install = |from: (&Path, &Path)| {
        fs::copy(from.0, &cert).expect("copied");
        fs::copy(from.1, &key).expect("copied");
        fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("private");
    };
    install((&own.cert, &own.key));
    let (v4, v6) = (
        world.at("node", Family::V4, 4244),
        world.at("node", Family::V6, 4244),
    );
    let section = format!(
        "[hubble]\nlisten = \"[::]:4244\"\ntls_certificate = {cert:?}\ntls_key = {key:?}\nclient_ca = {:?}\n",
        ca.cert
    );
    let daemon = daemon_of(&world, tables(&section));
    let ask = |at: std::net::SocketAddr, ca: &Path, own: Option<(&Path, &Path)>| {
        let credentials = credentials("node1", ca, own);
        let list = [call("status", "ServerStatus", json!({}))];
        calls(world.ns("far"), &at.to_string(), Some(&credentials), &list).expect("the client")["status"]
            .clone()
    };
    let mine = Some((&*client.cert, &*client.key));
    wait_until("the listener", LONG, || ask(v4, &ca.cert, mine).code == "OK")
        .unwrap_or_else(|error| panic!("{error:#}\n{:?}\n{}", ask(v4, &ca.cert, mine), daemon.report()));
    // The node's address for other nodes, and the name in its certificate.
    let mut notify = call("peers", "Notify", json!({}));
    notify["count"] = json!(1);
    let about = calls(
        world.ns("far"),
        &v4.to_string(),
        Some(&credentials("node1", &ca.cert, mine)),
        &[call("nodes", "GetNodes", json!({})), notify],
    )
    .expect("the client");
    let node = &about["nodes"].responses[0]["nodes"][0];
    assert_eq!(node["address"], "node1:4244", "{node}");
    assert_eq!(
        node["tls"],
        json!({"enabled": true, "server_name": "node1"}),
        "{node}"
    );
    let peer = &about["peers"].responses[0];
    assert_eq!(peer["address"], "node1:4244", "{peer}");
    assert_eq!(peer["tls"], json!({"server_name": "node1"}), "{peer}");
    assert_eq!(ask(v6, &ca.cert, mine).code, "OK");
    for own in [None, Some((&*stranger.cert, &*stranger.key))] {
        assert_eq!(ask(v4, &ca.cert, own).code, "UNAVAILABLE");
    }
    let plain = calls(
        world.ns("far"),
        &v4.to_string(),
        None,
        &[call("x", "ServerStatus", json!({}))],
    )
    .expect("client");
    assert_eq!(plain["x"].code, "UNAVAILABLE");

    // A new certificate, of another authority.
    let new = other
        .server("node1", &["node1"], Validity::Now, true)
        .expect("a certificate");
    install((&new.cert, &new.key));
    wait_until("the new certificate", LONG, || {
        ask(v4, &other.cert, mine).code == "OK"
    })
    .expect("read again");
    // A broken one: the last good one stays, with a warning.
    fs::write(
        &cert,
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .expect("written");
    let status = daemon.wait_status("a warning", |status| {
        list(status, "warnings")
            .iter()
            .any(|warning| warning.contains("tls_certificate"))
    });
    let status = status.expect("the warning");
    assert_eq!(ask(v4, &other.cert, mine).code, "OK");
    assert_eq!(status["hubble"]["tls"], true);
    assert_eq!(status["ready"], true);

    // Without TLS.
    let config = dir.path().join("plain.toml");
    for (address, valid) in [
        ("127.0.0.1:4245", true),
        ("[::1]:4245", true),
        ("0.0.0.0:4245", false),
        ("[::]:4245", false),
    ] {
        fs::write(&config, format!("[hubble]\nlisten = \"{address}\"\n")).expect("written");
        let mut command = daemon.command(&["run", "--check-config"]);
        let position = command
            .get_args()
            .position(|argument| argument == "--config")
            .expect("--config");
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let mut again = std::process::Command::new(command.get_program());
        for (index, argument) in arguments.iter().enumerate() {
            again.arg(if index == position + 1 {
                config.as_os_str()
            } else {
                argument
            });
        }
        command = again;
        let out = command.output().expect("palisade");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.success(), valid, "{address}: {said}");
        assert!(
            valid || said.contains("plain.toml:2:") && said.contains("without TLS"),
            "{said}"
        );
    }
}

#[test]
fn idle_clients_take_no_place_and_clients_of_a_removed_authority_are_cut() {
    let world = world();
    let dir = tempfile::tempdir().expect("a directory");
    let [ours, theirs] =
        ["ours", "theirs"].map(|name| Authority::root(dir.path(), name).expect("an authority"));
    let made = |authority: &Authority, name: &str| {
        authority
            .server(name, &[name], Validity::Now, true)
            .expect("a certificate")
    };
    let own = made(&ours, "node1");
    fs::set_permissions(&own.key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("private");
    let (old, new) = (made(&ours, "client"), made(&theirs, "client"));
    let client_ca = dir.path().join("clients.crt");
    let admit = |authority: &Authority| {
        let beside = dir.path().join("new");
        fs::copy(&authority.cert, &beside).expect("copied");
        fs::rename(&beside, &client_ca).expect("renamed");
    };
    admit(&ours);
    let section = format!(
        "[hubble]\nlisten = \"[::]:4244\"\ntls_certificate = {:?}\ntls_key = {:?}\nclient_ca = {client_ca:?}\n",
        own.cert, own.key
    );
    let daemon = daemon_of(&world, tables(&section));
    let target = world.at("node", Family::V4, 4244).to_string();
    let of = |client: &Certificate| credentials("node1", &ours.cert, Some((&client.cert, &client.key)));
    let ask = |client: &Certificate| {
        let list = [call("status", "ServerStatus", json!({}))];
        calls(world.ns("far"), &target, Some(&of(client)), &list).expect("the client")["status"].clone()
    };
    wait_until("the listener", LONG, || ask(&old).code == "OK")
        .unwrap_or_else(|error| panic!("{error:#}\n{:?}\n{}", ask(&old), daemon.report()));
    world.expect(&daemon, "front -> back tcp/80 open");
    let mut follow = call("follower", "GetFlows", json!({"follow": true, "number": "1"}));
    follow["timeout"] = json!(600);
    let follower = start(world.ns("far"), &target, Some(&of(&old)), &[follow]).expect("client");
    let followed = || replies(&follower.log()).remove("follower").unwrap_or_default();
    wait_until("the follower", LONG, || !followed().responses.is_empty())
        .unwrap_or_else(|error| panic!("{error:#}\n{}", follower.log()));

    // More handshakes that are not finished, and then more connections without a request, than there are places for.
    for family in FAMILIES {
        let at = world.at("node", family, 4244);
        let unfinished: Vec<TcpStream> = world.ns("far").enter(|| {
            let begin = || {
                let mut stream = TcpStream::connect(at)?;
                // The header of a record with a ClientHello of 508 bytes, and its first bytes.
                stream.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")?;
                std::io::Result::Ok(stream)
            };
            (0..200).map(|_| begin().expect("a connection")).collect()
        });
        let idle = python::idle(world.ns("far"), "node1", &ours.cert, &old, at, 200).expect("python3");
        idle.line("open 200")
            .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
        assert_eq!(ask(&old).code, "OK", "{family:?}\n{}", daemon.report());
        drop(unfinished);
    }
    // The follower keeps its place.
    let before = followed().responses.len();
    wait_until("another flow", LONG, || {
        world
            .check("front -> back tcp/80 open")
            .is_ok_and(|wrong| wrong.is_empty())
            && followed().responses.len() > before
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", follower.log()));

    admit(&theirs);
    wait_until("the end of the follower", LONG, || !followed().code.is_empty())
        .unwrap_or_else(|error| panic!("{error:#}\n{}", daemon.report()));
    assert_ne!(followed().code, "OK");
    assert!(
        daemon
            .log()
            .contains("certificates of their clients are no longer accepted"),
        "{}",
        daemon.log()
    );
    assert_eq!(ask(&old).code, "UNAVAILABLE");
    assert_eq!(ask(&new).code, "OK");
}
