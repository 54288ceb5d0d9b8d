//! `[tls] verify_sni_address`: a server name is accepted only towards the addresses that were learned for it.

use std::net::SocketAddr;

use palisade_testbed::{
    Daemon,
    daemon::Settings,
    tls::{Hello, server_hello},
    topology::{FAMILIES, Family},
    web::Talk,
};
use palisade_tests::{
    OPEN,
    fixtures::dns::{Names, counted, names, resolver, site},
    opaque_tls,
};

const TLS: u16 = 8443;
/// Reason of the counted and reported drops.
const NOT_LEARNED: u64 = 251;

/// Returns a policy that allows the whole world by some server names, and queries of all of its names.
fn policy(app: &str) -> String {
    format!(
        r#"
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: {app}}}
spec:
  endpointSelector: {{matchLabels: {{app: {app}}}}}
  egress:
  - toEntities: [world]
    toPorts:
    - ports: [{{port: "53", protocol: ANY}}]
      rules:
        dns: [{{matchPattern: "*"}}]
  - toEntities: [world]
    toPorts:
    - ports: [{{port: "{TLS}", protocol: TCP}}]
      serverNames: [www.example, alias.example, target.example, api.example]
"#
    )
}

fn start(names: &Names, tables: &str) -> Daemon {
    let settings = Settings {
        tables: tables.into(),
        ..Settings::default()
    };
    let policies = [("client.yaml", policy("client")), ("dns.yaml", policy("dns"))];
    let policies: Vec<(&str, &str)> = policies
        .iter()
        .map(|(name, text)| (*name, text.as_str()))
        .collect();
    names.daemon(&settings, &policies).expect("daemon")
}

/// Returns whether a site answers a hello with this name.
fn answers(names: &Names, from: &str, n: u8, family: Family, name: &str) -> bool {
    let at = SocketAddr::new(site(n, family), TLS);
    let mut talk = Talk::open(names.ns(from), at, OPEN).expect("connection");
    talk.send(&Hello::to(name).bytes()).expect("a hello");
    talk.receive(OPEN, |heard| heard.len() == server_hello().len())
        .is_ok()
}

#[test]
fn an_address_accepts_only_the_server_names_it_was_learned_for() {
    let names = names();
    let sites: Vec<_> = [10, 11, 19]
        .iter()
        .flat_map(|n| FAMILIES.map(|family| site(*n, family)))
        .collect();
    let server = opaque_tls::server(names.ns("internet"), &sites, &[TLS]).expect("server");
    let mut daemon = start(&names, "[tls]\nverify_sni_address = true\n");
    for family in FAMILIES {
        let asks = |daemon: &Daemon, from: &str, name: &str, n: u8| {
            names.resolves(daemon, from, resolver(family), name, site(n, family));
        };
        let gets = |from: &str, n: u8, name: &str| answers(&names, from, n, family, name);
        // No query yet.
        assert!(!gets("client", 10, "www.example"));
        asks(&daemon, "client", "www.example", 10);
        asks(&daemon, "client", "mail.example", 19);
        asks(&daemon, "client", "alias.example", 11);
        assert!(gets("client", 10, "www.example"), "{}", daemon.report());
        assert!(gets("client", 10, "WWW.example."), "{}", daemon.report());
        // An allowed name, but of another address.
        assert!(!gets("client", 19, "www.example"));
        assert!(!gets("client", 10, "api.example"));
        // The queried name counts, not the target of its CNAME.
        assert!(gets("client", 11, "alias.example"), "{}", daemon.report());
        assert!(!gets("client", 11, "target.example"));
        // Another endpoint does not use what this one has learned.
        assert!(!gets("dns", 10, "www.example"));
        asks(&daemon, "dns", "www.example", 10);
        assert!(gets("dns", 10, "www.example"), "{}", daemon.report());
    }
    // Five of them in each family.
    let wanted = |status: &serde_json::Value| {
        status["workers"]["inspection"]["tls"]["sni_mismatches"] == 10 && counted(status, NOT_LEARNED) >= 10
    };
    daemon.wait_status("ten refusals", wanted).expect("status");

    // The addresses survive a restart.
    daemon.restart().expect("restart");
    for family in FAMILIES {
        assert!(
            answers(&names, "client", 10, family, "www.example"),
            "{}",
            daemon.report()
        );
        assert!(!answers(&names, "client", 19, family, "www.example"));
    }
    drop(daemon);

    // The check is off by default.
    let daemon = start(&names, "");
    for family in FAMILIES {
        assert!(
            answers(&names, "client", 19, family, "www.example"),
            "{}",
            daemon.report()
        );
    }
    drop(server);
}
