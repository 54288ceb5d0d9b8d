//! Where connections come from. When all places are taken, the origin with the most places makes room for a new one, so
//! that one client cannot keep others out.

use std::{collections::HashMap, net::IpAddr};

/// What connections have in common that belong to one client, as far as the server can tell.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Origin {
    /// Not known.
    #[default]
    Unknown,
    /// Process of this host.
    Process(i32),
    /// Address; of IPv6 its prefix of 64 bits, since a host can use all addresses of one.
    Address(IpAddr),
}

impl Origin {
    /// Returns the origin of a connection from an address.
    #[must_use]
    pub fn of_address(address: IpAddr) -> Self {
        Self::Address(match address.to_canonical() {
            IpAddr::V6(v6) if !v6.is_loopback() => {
                IpAddr::from((v6.to_bits() & !u128::from(u64::MAX)).to_be_bytes())
            }
            other => other,
        })
    }
}

/// Returns the origin that makes room for one more place of `newcomer`: the one with the most places. `None` if `newcomer`
/// would then have as many.
pub(crate) fn greediest(taken: impl Iterator<Item = Origin>, newcomer: Origin) -> Option<Origin> {
    let mut counts = HashMap::new();
    for origin in taken {
        *counts.entry(origin).or_insert(0_usize) += 1;
    }
    let own = counts.get(&newcomer).copied().unwrap_or_default();
    let (origin, most) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    (most > own + 1).then_some(origin)
}

/// Returns how many places the origin of each place has.
pub(crate) fn shares(taken: impl Iterator<Item = Origin> + Clone) -> Vec<usize> {
    let mut counts = HashMap::new();
    for origin in taken.clone() {
        *counts.entry(origin).or_insert(0_usize) += 1;
    }
    taken
        .map(|origin| counts.get(&origin).copied().unwrap_or_default())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Origin {
        Origin::of_address(text.parse().unwrap())
    }

    #[test]
    fn addresses_of_one_host_are_one_origin() {
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_ne!(of("::1"), of("::2"));
    }

    #[test]
    fn the_origin_with_the_most_places_makes_room_for_one_with_fewer() {
        let [a, b, c] = ["192.0.2.1", "192.0.2.2", "192.0.2.3"].map(of);
        assert_eq!(greediest([a, a, b].into_iter(), c), Some(a));
        assert_eq!(greediest([a, a, a, b].into_iter(), b), Some(a));
        // It would have as many afterwards.
        assert_eq!(greediest([a, a, b].into_iter(), b), None);
        assert_eq!(greediest([a, a, a].into_iter(), a), None);
        assert_eq!(greediest([a].into_iter(), b), None);
        assert_eq!(shares([a, b, a].into_iter()), [2, 1, 2]);
    }
}
