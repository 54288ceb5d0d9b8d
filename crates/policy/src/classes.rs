//! Port classes: sets of (protocol, port) pairs that no rule distinguishes, and their numbers.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, OnceLock},
};

use palisade_abi::{
    CLASS_SLOTS, CLASS_UNKNOWN, Class, FIRST_DYNAMIC_CLASS, class_slot, class_slot_unknown_port, protocol,
};

/// Classes that always exist: for each protocol with ports or types, one class for all ports that no rule names. The
/// slot for an unknown port (later fragments) has this class as well: rules for specific ports match neither those
/// ports nor an unknown port.
const BASE: [(u8, Class); 5] = [
    (protocol::TCP, FIRST_DYNAMIC_CLASS),
    (protocol::UDP, FIRST_DYNAMIC_CLASS + 1),
    (protocol::SCTP, FIRST_DYNAMIC_CLASS + 2),
    (protocol::ICMP, FIRST_DYNAMIC_CLASS + 3),
    (protocol::ICMPV6, FIRST_DYNAMIC_CLASS + 4),
];

/// Class of the protocols outside `BASE` that no rule names.
const OTHER: Class = FIRST_DYNAMIC_CLASS + BASE.len() as Class;

/// First class that is assigned on demand.
const FIRST_FREE: Class = OTHER + 1;

/// The ports of a rule, with names resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortSet {
    /// Every packet.
    All,
    /// Every packet of one protocol.
    Protocol(u8),
    /// Some ports of TCP, UDP or SCTP, or some types of ICMP or ICMPv6.
    Range {
        /// IP protocol number.
        protocol: u8,
        /// First port or type.
        first: u16,
        /// Last port or type, inclusive.
        last: u16,
    },
}

impl PortSet {
    /// Returns whether the set contains a packet of this protocol and destination port (or ICMP type). `port` is `None`
    /// if the port is unknown, as for a later fragment.
    #[must_use]
    pub fn contains(&self, packet_protocol: u8, port: Option<u16>) -> bool {
        match *self {
            Self::All => true,
            Self::Protocol(p) => p == packet_protocol,
            Self::Range {
                protocol,
                first,
                last,
            } => protocol == packet_protocol && port.is_some_and(|port| (first..=last).contains(&port)),
        }
    }

    /// Returns how narrow the set is; a higher rank is narrower. Of the rules that lead to a decision, the policy table
    /// entry names the one with the narrowest ports.
    #[must_use]
    pub fn rank(&self) -> u8 {
        match *self {
            Self::All => 0,
            Self::Protocol(_) => 1,
            // From 2 (65,536 ports) to 18 (one port).
            Self::Range { first, last, .. } => {
                let size = u32::from(last - first) + 1;
                18u8.saturating_sub((u32::BITS - 1 - size.leading_zeros()) as u8)
            }
        }
    }

    /// Returns whether the set needs classes of its own: it is a range, or a protocol outside `BASE`.
    fn cuts(&self) -> bool {
        match *self {
            Self::All => false,
            Self::Protocol(p) => base(p).is_none(),
            Self::Range { .. } => true,
        }
    }
}

fn base(protocol: u8) -> Option<Class> {
    BASE.iter().find(|(p, _)| *p == protocol).map(|(_, class)| *class)
}

/// Error: the rules distinguish more port sets than there are class numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the policies distinguish more than {} sets of ports; use fewer distinct ports and ranges", Class::MAX - FIRST_FREE)]
pub struct TooManyClasses;

/// Assigns class numbers. A class consists of the ports that belong to the same combination of port sets. It keeps its
/// number while it has ports. The search for a free number begins after the last assigned number, so that a number is
/// reused late.
#[derive(Clone, Debug)]
pub struct Classes {
    /// Port sets in use, with the number of their users.
    cuts: HashMap<PortSet, u32>,
    /// Ports at which the combination of port sets changes, by protocol.
    boundaries: BTreeMap<u8, BTreeMap<u32, Boundary>>,
    /// Ports that rules name, by protocol: first, last, class; sorted, without overlap.
    intervals: BTreeMap<u8, Vec<(u16, u16, Class)>>,
    /// Classes by protocol and combination of port sets.
    numbers: HashMap<(u8, u128), Class>,
    /// Numbers in use.
    taken: HashSet<Class>,
    /// Protocols whose boundaries have changed since the last refresh.
    stale: Vec<u8>,
    next: Class,
    slots: Arc<Vec<Class>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Boundary {
    cover: u128,
    users: u32,
}

/// Class of every slot if there are no rules; computed once.
static SLOTS: OnceLock<Arc<Vec<Class>>> = OnceLock::new();

fn slots_without_rules() -> Vec<Class> {
    let mut slots = vec![CLASS_UNKNOWN; CLASS_SLOTS];
    for number in 0..=u8::MAX {
        match base(number) {
            None => slots[class_slot(number, 0) as usize] = OTHER,
            Some(class) => {
                for port in 0..=u16::MAX {
                    slots[class_slot(number, port) as usize] = class;
                }
                slots[class_slot_unknown_port(number) as usize] = class;
            }
        }
    }
    // Slots that no packet uses, such as the last one, get a class as well.
    for slot in &mut slots {
        if *slot == CLASS_UNKNOWN {
            *slot = OTHER;
        }
    }
    slots
}

impl Default for Classes {
    fn default() -> Self {
        Self {
            cuts: HashMap::new(),
            boundaries: BTreeMap::new(),
            intervals: BTreeMap::new(),
            numbers: HashMap::new(),
            taken: HashSet::new(),
            stale: Vec::new(),
            next: FIRST_FREE,
            slots: Arc::clone(SLOTS.get_or_init(|| Arc::new(slots_without_rules()))),
        }
    }
}

impl Classes {
    /// Adds a user to each of the port sets.
    pub fn retain(&mut self, sets: &[PortSet]) {
        for set in sets.iter().filter(|set| set.cuts()) {
            let users = self.cuts.entry(*set).or_insert(0);
            *users += 1;
            if *users == 1 {
                self.toggle(*set, true);
            }
        }
    }

    /// Removes a user from each of the port sets.
    pub fn release(&mut self, sets: &[PortSet]) {
        for set in sets.iter().filter(|set| set.cuts()) {
            if let Some(users) = self.cuts.get_mut(set) {
                *users -= 1;
                if *users == 0 {
                    self.cuts.remove(set);
                    self.toggle(*set, false);
                }
            }
        }
    }

    fn toggle(&mut self, set: PortSet, add: bool) {
        let (protocol, first, last) = match set {
            PortSet::Range {
                protocol,
                first,
                last,
            } => (protocol, u32::from(first), u32::from(last)),
            PortSet::Protocol(protocol) => (protocol, 0, 0),
            PortSet::All => return,
        };
        let hash = cover_hash(protocol, first, last);
        let boundaries = self.boundaries.entry(protocol).or_default();
        for at in [first, last + 1] {
            let boundary = boundaries.entry(at).or_default();
            boundary.cover ^= hash;
            if add {
                boundary.users += 1;
            } else {
                boundary.users -= 1;
                if boundary.users == 0 {
                    boundaries.remove(&at);
                }
            }
        }
        if !self.stale.contains(&protocol) {
            self.stale.push(protocol);
        }
    }

    /// Recomputes classes and slots. Returns the protocols in which the class of a slot has changed.
    pub fn refresh(&mut self) -> Result<Vec<u8>, TooManyClasses> {
        let mut changed = Vec::new();
        for protocol in std::mem::take(&mut self.stale) {
            let mut covers = Vec::new();
            if let Some(boundaries) = self.boundaries.get(&protocol) {
                let mut cover = 0u128;
                let mut from = 0u32;
                for (&at, boundary) in boundaries {
                    if cover != 0 {
                        covers.push((from as u16, (at - 1) as u16, cover));
                    }
                    cover ^= boundary.cover;
                    from = at;
                }
            }
            self.forget_unused(protocol, &covers);
            let mut intervals = Vec::with_capacity(covers.len());
            for (first, last, cover) in covers {
                match self.number(protocol, cover) {
                    Ok(class) => intervals.push((first, last, class)),
                    Err(error) => {
                        self.stale.push(protocol);
                        return Err(error);
                    }
                }
            }
            let before = self.intervals.insert(protocol, intervals).unwrap_or_default();
            let after = &self.intervals[&protocol];
            if before == *after {
                continue;
            }
            changed.push(protocol);
            let slots = Arc::make_mut(&mut self.slots);
            let rest = base(protocol).unwrap_or(OTHER);
            for (first, last, _) in before {
                for port in first..=last {
                    slots[class_slot(protocol, port) as usize] = rest;
                }
            }
            for &(first, last, class) in after {
                for port in first..=last {
                    slots[class_slot(protocol, port) as usize] = class;
                }
            }
        }
        Ok(changed)
    }

    fn forget_unused(&mut self, protocol: u8, covers: &[(u16, u16, u128)]) {
        let used: HashSet<u128> = covers.iter().map(|(_, _, cover)| *cover).collect();
        let taken = &mut self.taken;
        self.numbers.retain(|(p, cover), class| {
            let keep = *p != protocol || used.contains(cover);
            if !keep {
                taken.remove(class);
            }
            keep
        });
    }

    fn number(&mut self, protocol: u8, cover: u128) -> Result<Class, TooManyClasses> {
        if let Some(&class) = self.numbers.get(&(protocol, cover)) {
            return Ok(class);
        }
        let range = usize::from(Class::MAX - FIRST_FREE);
        if self.numbers.len() >= range {
            return Err(TooManyClasses);
        }
        let mut class = self.next;
        while self.taken.contains(&class) {
            class = if class >= Class::MAX - 1 {
                FIRST_FREE
            } else {
                class + 1
            };
        }
        self.next = if class >= Class::MAX - 1 {
            FIRST_FREE
        } else {
            class + 1
        };
        self.numbers.insert((protocol, cover), class);
        self.taken.insert(class);
        Ok(class)
    }

    /// Returns the classes of a port set; `None` for [`PortSet::All`]. The set must have been retained before the last
    /// refresh: only then do the ports of the set have classes of their own.
    #[must_use]
    pub fn of(&self, set: PortSet) -> Option<Arc<[Class]>> {
        let (protocol, first, last) = match set {
            PortSet::All => return None,
            PortSet::Protocol(protocol) => match base(protocol) {
                Some(class) => {
                    let named = self.intervals.get(&protocol).into_iter().flatten();
                    let mut classes: Vec<Class> = named.map(|(_, _, class)| *class).chain([class]).collect();
                    classes.sort_unstable();
                    classes.dedup();
                    return Some(classes.into());
                }
                None => (protocol, 0, 0),
            },
            PortSet::Range {
                protocol,
                first,
                last,
            } => (protocol, first, last),
        };
        let mut classes = Vec::new();
        if let Some(intervals) = self.intervals.get(&protocol) {
            let from = intervals.partition_point(|(_, end, _)| *end < first);
            classes.extend(
                intervals[from..]
                    .iter()
                    .take_while(|(start, _, _)| *start <= last)
                    .map(|(_, _, class)| *class),
            );
            classes.sort_unstable();
            classes.dedup();
        }
        Some(classes.into())
    }

    /// Returns the class of every slot.
    #[must_use]
    pub fn slots(&self) -> &Arc<Vec<Class>> {
        &self.slots
    }
}

/// Returns the hash of a port set. The exclusive-or of several hashes identifies their combination.
fn cover_hash(protocol: u8, first: u32, last: u32) -> u128 {
    let seed = u64::from(protocol) << 40 | u64::from(first) << 20 | u64::from(last);
    u128::from(mix(seed)) << 64 | u128::from(mix(seed ^ 0x5851_f42d_4c95_7f2d))
}

/// Mixes the bits of a number (the finaliser of SplitMix64).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(first: u16, last: u16) -> PortSet {
        PortSet::Range {
            protocol: protocol::TCP,
            first,
            last,
        }
    }

    fn class(classes: &Classes, number: u8, port: u16) -> Class {
        classes.slots()[class_slot(number, port) as usize]
    }

    #[test]
    fn ports_that_the_same_rules_cover_share_a_class() {
        let mut classes = Classes::default();
        classes.retain(&[tcp(1, 1000), tcp(80, 80)]);
        assert_eq!(classes.refresh(), Ok(vec![protocol::TCP]));
        assert_eq!(class(&classes, 6, 1), class(&classes, 6, 1000));
        assert_ne!(class(&classes, 6, 80), class(&classes, 6, 81));
        assert_eq!(class(&classes, 6, 1001), FIRST_DYNAMIC_CLASS);
        assert_eq!(classes.of(tcp(1, 1000)).map(|all| all.len()), Some(2));
        assert_eq!(classes.of(tcp(80, 80)).map(|all| all.len()), Some(1));
        assert_eq!(classes.of(PortSet::Protocol(6)).map(|all| all.len()), Some(3));
        assert_eq!(classes.of(PortSet::All), None);
        assert_eq!(
            classes.slots()[class_slot_unknown_port(6) as usize],
            FIRST_DYNAMIC_CLASS
        );
    }

    #[test]
    fn a_class_number_is_stable_while_used_and_reused_late() {
        let mut classes = Classes::default();
        classes.retain(&[tcp(1, 1000)]);
        classes.refresh().unwrap();
        let wide = class(&classes, 6, 500);
        classes.retain(&[tcp(80, 80)]);
        classes.refresh().unwrap();
        assert_eq!(class(&classes, 6, 500), wide);
        let narrow = class(&classes, 6, 80);
        classes.release(&[tcp(80, 80)]);
        assert_eq!(classes.refresh(), Ok(vec![6]));
        assert_eq!(class(&classes, 6, 80), wide);
        classes.retain(&[tcp(443, 443)]);
        classes.refresh().unwrap();
        assert_ne!(class(&classes, 6, 443), narrow);
        classes.release(&[tcp(443, 443), tcp(1, 1000)]);
        classes.refresh().unwrap();
        assert_eq!(class(&classes, 6, 443), FIRST_DYNAMIC_CLASS);
    }

    #[test]
    fn protocols_without_ports_have_one_slot() {
        let mut classes = Classes::default();
        assert_eq!(class(&classes, 47, 0), OTHER);
        classes.retain(&[PortSet::Protocol(47), PortSet::Protocol(protocol::TCP)]);
        assert_eq!(classes.refresh(), Ok(vec![47]));
        assert_ne!(class(&classes, 47, 0), OTHER);
        assert_eq!(class(&classes, 50, 0), OTHER);
        assert_eq!(classes.of(PortSet::Protocol(47)).map(|all| all.len()), Some(1));
    }

    #[test]
    fn port_65535_and_icmp_type_255_have_classes() {
        let mut classes = Classes::default();
        let echo = PortSet::Range {
            protocol: protocol::ICMP,
            first: 8,
            last: 8,
        };
        classes.retain(&[tcp(65_535, 65_535), echo]);
        classes.refresh().unwrap();
        assert_ne!(class(&classes, 6, 65_535), class(&classes, 6, 65_534));
        assert_ne!(class(&classes, 1, 8), class(&classes, 1, 0));
    }
}
