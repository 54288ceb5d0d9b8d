//! Expectations about the output of `palisade observe`.

use std::net::IpAddr;

use palisade_testbed::{Daemon, topology::FAMILIES};
use serde_json::Value;

use crate::World;

/// Returns the policies that a flow names as deciding, as `namespace/name`.
#[must_use]
pub fn deciding(flow: &Value) -> Vec<String> {
    let policies = flow["palisade"]["rule"]["policies"].as_array();
    policies
        .into_iter()
        .flatten()
        .filter_map(|p| p.as_str().map(str::to_owned))
        .collect()
}

/// Waits until `observe` shows, in both address families, a flow between two ends to a port with this verdict that names
/// `policy` as deciding.
///
/// # Panics
/// If the flow does not appear in time.
#[track_caller]
pub fn expect(
    daemon: &Daemon,
    world: &World,
    (from, to): (&str, &str),
    port: u16,
    verdict: &str,
    policy: Option<&str>,
) {
    for family in FAMILIES {
        let (source, destination) = (world.addr(from, family), world.addr(to, family));
        expect_between(daemon, source, destination, port, verdict, policy);
    }
}

/// Waits for such a flow between two addresses.
///
/// # Panics
/// If the flow does not appear in time.
#[track_caller]
pub fn expect_between(
    daemon: &Daemon,
    source: IpAddr,
    destination: IpAddr,
    port: u16,
    verdict: &str,
    policy: Option<&str>,
) {
    let (source, destination, port) = (source.to_string(), destination.to_string(), port.to_string());
    let filters = [
        "--from-ip",
        &source,
        "--to-ip",
        &destination,
        "--to-port",
        &port,
        "--verdict",
        verdict,
    ];
    let found = daemon.wait_flows(&filters, &filters.join(" "), |flows| {
        flows
            .iter()
            .any(|flow| policy.is_none_or(|p| deciding(flow).iter().any(|name| name == p)))
    });
    if let Err(error) = found {
        panic!("no flow that names {policy:?}: {error:#}\n{}", daemon.report());
    }
}

/// Asserts that no flow matches these filters.
///
/// # Panics
/// If a flow does.
#[track_caller]
pub fn expect_none(daemon: &Daemon, filters: &[&str]) {
    let flows = daemon.flows(filters).unwrap_or_else(|error| panic!("{error:#}"));
    assert!(flows.is_empty(), "{filters:?}: {flows:#?}");
}

/// Returns the id of an endpoint, by its name.
///
/// # Panics
/// If there is no such endpoint.
#[must_use]
#[track_caller]
pub fn endpoint_id(daemon: &Daemon, name: &str) -> String {
    let list = daemon
        .json(&["endpoint", "list"])
        .unwrap_or_else(|error| panic!("{error:#}"));
    let endpoints = list.as_array().map(Vec::as_slice).unwrap_or_default();
    let found = endpoints.iter().find(|e| e["name"] == name);
    found.map_or_else(|| panic!("no endpoint {name}: {list:#}"), |e| e["id"].to_string())
}
