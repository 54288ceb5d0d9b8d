//! Generated policies.

use std::fmt::Write as _;

/// Returns the n-th address of 172.16.0.0/12, which rules name and no host has.
#[must_use]
pub fn unused_address(n: usize) -> String {
    format!("172.{}.{}.{}", 16 + (n >> 16), (n >> 8) & 255, n & 255)
}

/// Returns a policy that allows an address to the workload `app` at a UDP port.
#[must_use]
pub fn allow(name: &str, app: &str, from: &str, port: u16) -> String {
    format!(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata:\n  name: {name}\nspec:\n  endpointSelector:\n    matchLabels:\n      app: {app}\n  ingress:\n  - fromCIDR:\n    - {from}/32\n    toPorts:\n    - ports:\n      - port: \"{port}\"\n        protocol: UDP\n"
    )
}

/// Returns `count` files with a policy each; the last allows `from`, the others allow addresses that no host has.
#[must_use]
pub fn files(count: usize, app: &str, from: &str, port: u16) -> Vec<(String, String)> {
    (0..count)
        .map(|n| {
            let from = if n + 1 == count {
                from.to_owned()
            } else {
                unused_address(n)
            };
            let name = format!("rule-{n}");
            (format!("{name}.yaml"), allow(&name, app, &from, port))
        })
        .collect()
}

/// Number of workloads that [`mixed`] policies select.
pub const APPS: usize = 200;

/// Returns `count` typical policies, a file each, about [`APPS`] workloads of four tiers: labels, ports and ranges,
/// prefixes with exceptions, the world, deny rules. The same in every run.
#[must_use]
pub fn mixed(count: usize) -> Vec<(String, String)> {
    (0..count)
        .map(|n| (format!("policy-{n}.yaml"), mixed_policy(n)))
        .collect()
}

fn mixed_policy(n: usize) -> String {
    let mut text = String::new();
    // Spread numbers that are the same in every run (Knuth's multiplicative hash).
    let pick = |salt: usize, below: usize| ((n * 31 + salt).wrapping_mul(2_654_435_761) >> 7) % below;
    let _ = write!(
        text,
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata:\n  name: policy-{n}\n  namespace: default\nspec:\n  endpointSelector:\n    matchLabels:\n      app: app-{}\n",
        n % APPS
    );
    let ports = |text: &mut String, port: usize| {
        let _ = write!(
            text,
            "    toPorts:\n    - ports:\n      - port: \"{port}\"\n        protocol: TCP\n"
        );
        if n.is_multiple_of(4) {
            let _ = write!(
                text,
                "      - port: \"{}\"\n        endPort: {}\n        protocol: UDP\n",
                port,
                port + 500
            );
        }
    };
    text.push_str("  ingress:\n");
    let _ = write!(
        text,
        "  - fromEndpoints:\n    - matchLabels:\n        app: app-{}\n",
        pick(1, APPS)
    );
    ports(&mut text, 1_000 + 10 * pick(2, 200));
    if n.is_multiple_of(3) {
        let _ = write!(
            text,
            "  - fromEndpoints:\n    - matchExpressions:\n      - key: tier\n        operator: In\n        values: [tier-{}, tier-{}]\n",
            pick(3, 4),
            pick(4, 4)
        );
        ports(&mut text, 80);
    }
    if n.is_multiple_of(5) {
        let _ = write!(
            text,
            "  - fromCIDRSet:\n    - cidr: 10.{}.0.0/16\n      except: [10.{}.{}.0/24]\n",
            100 + pick(5, 50),
            100 + pick(5, 50),
            pick(6, 256)
        );
        ports(&mut text, 443);
    }
    if n.is_multiple_of(7) {
        text.push_str("  egress:\n  - toEntities: [world]\n");
        ports(&mut text, 443);
    }
    if n.is_multiple_of(11) {
        let _ = write!(
            text,
            "  ingressDeny:\n  - fromEndpoints:\n    - matchLabels:\n        app: app-{}\n",
            pick(7, APPS)
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_policy_can_be_read() {
        let some = mixed(400)
            .into_iter()
            .chain(files(3, "server", "198.51.100.2", 5_000));
        for (name, text) in some {
            let parsed = palisade_policy::parse::parse(&name, &text);
            assert!(parsed.diagnostics.is_empty(), "{:?}\n{text}", parsed.diagnostics);
            assert_eq!(parsed.policies.len(), 1);
        }
    }

    #[test]
    fn unused_addresses_differ() {
        let all: std::collections::HashSet<_> = (0..100_000).map(unused_address).collect();
        assert_eq!(all.len(), 100_000);
        assert!(
            all.iter()
                .all(|address| address.parse::<std::net::Ipv4Addr>().is_ok())
        );
    }
}
