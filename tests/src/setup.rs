//! What many tests begin with: where the programs stand, web servers, and a daemon with its policies.

use palisade_testbed::{
    Daemon, Topology,
    daemon::{Hooks, Settings},
    web::Web,
};

use crate::apps::{Apps, borrowed, policies, policy};

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
