//! Which addresses can be those of a section's endpoints.

use std::{collections::BTreeSet, net::IpAddr};

use crate::workload::{MAX_ADDRESSES, Rule};

/// Returns those of the addresses that can be addresses of the section's endpoints.
///
/// # Errors
/// There are more than [`MAX_ADDRESSES`].
pub(crate) fn own_addresses(rule: &Rule, reported: &[IpAddr]) -> Result<Vec<IpAddr>, String> {
    let fits = |address: &IpAddr| {
        is_unicast(address)
            && (rule.addresses.is_empty() || rule.addresses.iter().any(|prefix| prefix.contains(address)))
    };
    let unique: BTreeSet<IpAddr> = reported
        .iter()
        .map(IpAddr::to_canonical)
        .filter(|address| fits(address))
        .collect();
    if unique.len() > MAX_ADDRESSES {
        return Err(format!(
            "it has {} addresses, at most {MAX_ADDRESSES} are possible",
            unique.len()
        ));
    }
    Ok(unique.into_iter().collect())
}

/// Returns whether an address can identify one workload: it is neither a loopback, link-local, unspecified, multicast
/// nor broadcast address.
fn is_unicast(address: &IpAddr) -> bool {
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !is_link_local && !address.is_loopback() && !address.is_unspecified() && !address.is_multicast()
}
