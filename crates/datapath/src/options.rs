//! Options of [`Datapath::open`](crate::Datapath::open).

use std::path::PathBuf;

use palisade_abi::maps as names;

use crate::OpenError;

/// Location and sizes of the maps.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory on a bpffs, `/sys/fs/bpf/palisade` by default; created if it does not exist. The part of the path that
    /// does not exist yet must not contain a dot.
    pub pin_dir: PathBuf,
    /// Sizes of the maps.
    pub limits: Limits,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            pin_dir: PathBuf::from("/sys/fs/bpf/palisade"),
            limits: Limits::default(),
        }
    }
}

/// Sizes of the maps, in entries unless noted otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Flows in conntrack. Each takes about 250 bytes; the memory is preallocated.
    pub conntrack_entries: u32,
    /// Fragmented datagrams that are tracked at the same time.
    pub fragment_entries: u32,
    /// Entries of all policy tables together.
    pub policy_entries: u32,
    /// Full-length addresses with an identity.
    pub ipcache_entries: u32,
    /// Prefixes with an identity.
    pub prefix_entries: u32,
    /// Learned addresses of all endpoints together.
    pub learned_entries: u32,
    /// Rules with a counter of their own.
    pub rules: u32,
    /// Size of the event ring, bytes: a power of two, at least a page.
    pub event_ring_bytes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            conntrack_entries: 262_144,
            fragment_entries: 8_192,
            policy_entries: 1_048_576,
            ipcache_entries: 262_144,
            prefix_entries: 262_144,
            learned_entries: 262_144,
            rules: 65_536,
            event_ring_bytes: 1_048_576,
        }
    }
}

impl Limits {
    pub(crate) fn of(&self, map: &str) -> Option<u32> {
        Some(match map {
            names::CONNTRACK => self.conntrack_entries,
            names::FRAGMENTS => self.fragment_entries,
            // A slot map has half as many slots as the map that it indexes has entries; `shares::shares` divides them.
            names::FLOW_SLOTS => (self.conntrack_entries / 2).max(1),
            names::FRAGMENT_SLOTS => (self.fragment_entries / 2).max(1),
            names::POLICY => self.policy_entries,
            names::IPCACHE => self.ipcache_entries,
            names::PREFIXES => self.prefix_entries,
            names::LEARNED => self.learned_entries,
            names::RULES => self.rules,
            names::EVENTS => self.event_ring_bytes,
            _ => return None,
        })
    }
}

pub(crate) fn check_limits(limits: &Limits) -> Result<(), OpenError> {
    let bad = |map: &str, value, why| {
        let map = map.to_lowercase();
        Err(OpenError::BadLimit { map, value, why })
    };
    for map in [
        names::CONNTRACK,
        names::FRAGMENTS,
        names::POLICY,
        names::IPCACHE,
        names::PREFIXES,
        names::LEARNED,
        names::RULES,
    ] {
        let value = limits.of(map).unwrap_or(1);
        if value == 0 {
            return bad(map, value, "it must have at least one entry");
        }
        if value > 1 << 28 {
            return bad(map, value, "the largest size is 268435456");
        }
    }
    let ring = limits.event_ring_bytes;
    // SAFETY: sysconf takes no pointers.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    if !ring.is_power_of_two() || i64::from(ring) < page {
        return bad(
            names::EVENTS,
            ring,
            "a power of two of at least a page (4096) is needed",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::OBJECT;

    #[test]
    fn limits_that_no_map_can_have_are_named() {
        let error = |limits| check_limits(&limits).unwrap_err().to_string();
        let ring = Limits {
            event_ring_bytes: 5000,
            ..Limits::default()
        };
        assert!(
            error(ring).starts_with("events map of size 5000: a power of two"),
            "{}",
            error(ring)
        );
        let none = Limits {
            policy_entries: 0,
            ..Limits::default()
        };
        assert!(error(none).starts_with("policy map of size 0"));
        check_limits(&Limits::default()).unwrap();
    }

    #[test]
    fn every_endpoint_and_every_interface_has_a_slot() {
        let object = aya_obj::Object::parse(OBJECT).unwrap();
        for name in [names::ENDPOINTS, names::INTERFACES] {
            assert_eq!(object.maps[name].max_entries(), 1 << 16, "{name}");
        }
    }

    #[test]
    fn the_default_limits_are_those_of_the_object() {
        let object = aya_obj::Object::parse(OBJECT).unwrap();
        for (name, definition) in &object.maps {
            if let Some(limit) = Limits::default().of(name) {
                assert_eq!(limit, definition.max_entries(), "{name}");
            }
        }
    }
}
