//! Common setup of tests: hooks of the programs, web servers, and a daemon with its policies.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use palisade_testbed::{
    Daemon, Topology,
    daemon::{Hooks, Settings},
    dns::{PORT, ask, query, rcode, rtype},
    topology::Family,
    web::{Web, curl},
};

use crate::fixtures::apps::{Apps, borrowed, policies, policy};

/// Programs at tcx, but XDP at the ingress of the NIC.
pub const XDP_AT_THE_NIC: Hooks = Hooks {
    endpoint: "tc",
    host: "xdp",
    tc: "tcx",
};
/// Programs at tcx only.
pub const TCX: Hooks = Hooks {
    endpoint: "tc",
    host: "tc",
    tc: "tcx",
};
/// XDP at every ingress, and tc behind a clsact qdisc at every egress.
pub const XDP_AND_CLSACT: Hooks = Hooks {
    endpoint: "xdp",
    host: "xdp",
    tc: "clsact",
};

/// Starts the daemon with these policies.
///
/// # Panics
/// If the daemon does not enforce them.
#[must_use]
#[track_caller]
pub fn daemon(topology: &Topology, policies: &[(&str, &str)]) -> Daemon {
    daemon_with(topology, &Settings::default(), policies)
}

/// Starts the daemon with other settings.
///
/// # Panics
/// If the daemon does not enforce the policies.
#[must_use]
#[track_caller]
pub fn daemon_with(topology: &Topology, settings: &Settings, policies: &[(&str, &str)]) -> Daemon {
    Daemon::start(topology, settings, policies).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Returns settings with additional tables of the configuration.
#[must_use]
pub fn tables(tables: &str) -> Settings {
    Settings {
        tables: tables.into(),
        ..Settings::default()
    }
}

/// Removes a workload from the configuration of a running daemon.
///
/// # Panics
/// If the configuration does not have the workload, or the daemon does not use the configuration without it.
#[track_caller]
pub fn remove_endpoint(daemon: &Daemon, name: &str) {
    let config = fs::read_to_string(daemon.config()).expect("configuration");
    let (before, rest) = config
        .split_once(&format!("[[endpoint]]\nname = \"{name}\"\n"))
        .expect("the workload");
    let (_, after) = rest.split_once("\n\n").expect("further tables");
    fs::write(daemon.config(), format!("{before}{after}")).expect("written");
    daemon
        .cli(&["reload"])
        .unwrap_or_else(|error| panic!("{error:#}"));
}

/// Starts the daemon with rules for what the workload `client` sends to these ports.
///
/// # Panics
/// If the daemon does not enforce them.
#[must_use]
#[track_caller]
pub fn client_only(apps: &Apps, ports: &[u16], rules: &str) -> Daemon {
    client_only_with(apps, &Settings::default(), ports, rules)
}

/// Starts such a daemon with other settings.
///
/// # Panics
/// If the daemon does not enforce the policies.
#[must_use]
#[track_caller]
pub fn client_only_with(apps: &Apps, settings: &Settings, ports: &[u16], rules: &str) -> Daemon {
    let text = policy("client", "egress", ports, rules);
    daemon_with(&apps.topology, settings, &[("client.yaml", &text)])
}

/// Starts the daemon with the same rules for egress of `client`, ingress of `server`, and both directions of the node.
///
/// # Panics
/// If the daemon does not enforce them.
#[must_use]
#[track_caller]
pub fn on_all_pairs(apps: &Apps, hooks: Hooks, ports: &[u16], rules: &str) -> Daemon {
    let settings = Settings {
        hooks,
        ..Settings::default()
    };
    daemon_with(&apps.topology, &settings, &borrowed(&policies(ports, rules)))
}

/// Starts nginx on these ports, one instance for each name; it responds `hello from NAME`.
///
/// # Panics
/// If an instance does not start.
#[must_use]
#[track_caller]
pub fn webs<const N: usize>(apps: &Apps, names: [&'static str; N], http: &[u16], https: &[u16]) -> [Web; N] {
    names.map(|name| {
        Web::start(apps.ns(name), name, http, https, &apps.certificate)
            .unwrap_or_else(|error| panic!("{name}: {error:#}"))
    })
}

/// Returns the DNS response code to a query; `None` if there is no response.
///
/// # Panics
/// If the query cannot be sent.
#[must_use]
pub fn question(apps: &Apps, family: Family, name: &str) -> Option<u16> {
    let any: IpAddr = match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    let message = query(7, &[(name, rtype::A)]);
    let (source, server) = (SocketAddr::new(any, 0), apps.at("internet", family, PORT));
    let answers = ask(
        apps.ns("client"),
        source,
        server,
        &message,
        Duration::from_millis(100),
    );
    rcode(answers.expect("a question").first()?).map(u16::from)
}

/// Returns the HTTP status of a request; `None` if there is no response.
///
/// # Panics
/// If the request cannot be sent.
#[must_use]
pub fn request(apps: &Apps, family: Family, path: &str) -> Option<u16> {
    let url = format!("http://{}{path}", apps.at("internet", family, 80));
    let curled = curl(apps.ns("client"), &[&url], Duration::from_millis(1_500)).expect("curl");
    (curled.status != 0).then_some(curled.status)
}
