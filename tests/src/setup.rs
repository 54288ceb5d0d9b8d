//! What many tests begin with: where the programs stand, web servers, and a daemon with its policies.

use std::{
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

/// Programs at tcx, but at the ingress of the NIC by XDP.
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
/// Programs by XDP at every ingress, and behind clsact at every egress.
pub const XDP_AND_CLSACT: Hooks = Hooks {
    endpoint: "xdp",
    host: "xdp",
    tc: "clsact",
};

/// The daemon with these policies.
///
/// # Panics
/// If it does not enforce them.
#[must_use]
#[track_caller]
pub fn daemon(topology: &Topology, policies: &[(&str, &str)]) -> Daemon {
    daemon_with(topology, &Settings::default(), policies)
}

/// The daemon with another configuration.
///
/// # Panics
/// If it does not enforce the policies.
#[must_use]
#[track_caller]
pub fn daemon_with(topology: &Topology, settings: &Settings, policies: &[(&str, &str)]) -> Daemon {
    Daemon::start(topology, settings, policies).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Settings with further tables of the configuration.
#[must_use]
pub fn tables(tables: &str) -> Settings {
    Settings {
        tables: tables.into(),
        ..Settings::default()
    }
}

/// The daemon with rules for what the workload `client` sends to these ports.
///
/// # Panics
/// If it does not enforce them.
#[must_use]
#[track_caller]
pub fn client_only(apps: &Apps, ports: &[u16], rules: &str) -> Daemon {
    client_only_with(apps, &Settings::default(), ports, rules)
}

/// The same with another configuration.
///
/// # Panics
/// As that.
#[must_use]
#[track_caller]
pub fn client_only_with(apps: &Apps, settings: &Settings, ports: &[u16], rules: &str) -> Daemon {
    let text = policy("client", "egress", ports, rules);
    daemon_with(&apps.topology, settings, &[("client.yaml", &text)])
}

/// The daemon with the same rules for all four ways: out of `client`, into `server`, into the node and out of it.
///
/// # Panics
/// If it does not enforce them.
#[must_use]
#[track_caller]
pub fn on_all_ways(apps: &Apps, hooks: Hooks, ports: &[u16], rules: &str) -> Daemon {
    let settings = Settings {
        hooks,
        ..Settings::default()
    };
    daemon_with(&apps.topology, &settings, &borrowed(&policies(ports, rules)))
}

/// nginx on ports of some of the world, in their order; it says `hello from NAME`.
///
/// # Panics
/// If one does not start.
#[must_use]
#[track_caller]
pub fn webs<const N: usize>(apps: &Apps, names: [&'static str; N], http: &[u16], https: &[u16]) -> [Web; N] {
    names.map(|name| {
        Web::start(apps.ns(name), name, http, https, &apps.certificate)
            .unwrap_or_else(|error| panic!("{name}: {error:#}"))
    })
}

/// The code that a question is answered with; `None`: it is not answered.
///
/// # Panics
/// If it cannot be asked.
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

/// The status of a request; `None`: it is not answered.
///
/// # Panics
/// If it cannot be asked.
#[must_use]
pub fn request(apps: &Apps, family: Family, path: &str) -> Option<u16> {
    let url = format!("http://{}{path}", apps.at("internet", family, 80));
    let curled = curl(apps.ns("client"), &[&url], Duration::from_millis(1_500)).expect("curl");
    (curled.status != 0).then_some(curled.status)
}
