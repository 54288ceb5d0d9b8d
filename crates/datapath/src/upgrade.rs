//! Maps of an earlier version of `palisade_abi`: which version a pin directory has, and what is taken over from its maps.
//!
//! ```text
//! <pin_dir>/v6/        maps of the earlier version; its programs use them until they are replaced
//! <pin_dir>/v7_new/    maps of this version while they are filled; no program is attached that uses them
//! <pin_dir>/v7/        the same directory after `Datapath::commit`, which precedes the first attachment
//! ```
//!
//! A directory `v<number>` is therefore never half filled, also at the first start, and a crash at any step leaves at
//! each hook either the old program with the old maps or the new program with the new maps. The policy maps are not
//! taken over: the daemon compiles them from the policies. Flows, interfaces and counters of rules have no other source.
//!
//! Depends on [`crate::pin`] and [`crate::maps`]. Start at [`Pinned::find`]. A change of `palisade_abi::VERSION` needs
//! an entry in [`EARLIER`], with a copy of the former layout if the layout of CONNTRACK has changed.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use palisade_abi::{CtEntry, CtKey, VERSION, maps as names};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    MapError, OpenError,
    maps::{Map, RawMap},
    pin::{STAGED, remove_dir_of_pins, staging_dirs, version_dir, versions},
    sys::bpf,
};

/// Returns the flow in the bytes of a key and a value of CONNTRACK; `None` if the sizes differ.
pub(crate) type Decode = fn(&[u8], &[u8]) -> Option<(CtKey, CtEntry)>;

/// An earlier version whose flows this version can read.
struct Earlier {
    version: u32,
    /// Maps whose layout and meaning are those of this version.
    same: &'static [&'static str],
    decode: Decode,
}

/// Earlier versions whose maps this version can read.
const EARLIER: [Earlier; 2] = [
    Earlier {
        version: 5,
        same: &[names::INTERFACES, names::RULES],
        decode: decode_flow_5,
    },
    Earlier {
        version: 6,
        same: &[names::INTERFACES, names::RULES],
        decode: decode_flow_5,
    },
];

/// Value of CONNTRACK in versions 5 to 7.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Flow5 {
    expires: u64,
    created: u64,
    reported: u64,
    forward_packets: u64,
    forward_bytes: u64,
    reply_packets: u64,
    reply_bytes: u64,
    revision: u32,
    rule: u32,
    remote_identity: u32,
    ifindex: u32,
    flags: u8,
    forward_tcp: u8,
    reply_tcp: u8,
    match_kind: u8,
    serial: u32,
    ruleset: u32,
    inspector: u8,
    punt_flags: u8,
    over: u8,
    protected: u8,
    windows: [u32; 4],
    decided: u64,
}

fn decode_flow_5(key: &[u8], value: &[u8]) -> Option<(CtKey, CtEntry)> {
    let key = CtKey::read_from_bytes(key).ok()?;
    let flow = Flow5::read_from_bytes(value).ok()?;
    let entry = CtEntry {
        expires: flow.expires,
        created: flow.created,
        reported: flow.reported,
        forward_packets: flow.forward_packets,
        forward_bytes: flow.forward_bytes,
        reply_packets: flow.reply_packets,
        reply_bytes: flow.reply_bytes,
        revision: flow.revision,
        rule: flow.rule,
        remote_identity: flow.remote_identity,
        ifindex: flow.ifindex,
        flags: flow.flags,
        forward_tcp: flow.forward_tcp,
        reply_tcp: flow.reply_tcp,
        match_kind: flow.match_kind,
        serial: flow.serial,
        ruleset: flow.ruleset,
        inspector: flow.inspector,
        punt_flags: flow.punt_flags,
        over: flow.over,
        protected: flow.protected,
        windows: flow.windows,
        decided: flow.decided,
    };
    Some((key, entry))
}

/// What a pin directory has.
#[derive(Debug)]
pub(crate) struct Pinned {
    /// Directory in which the maps of this version are opened or made.
    pub map_dir: PathBuf,
    /// Whether `map_dir` is to be renamed to the directory of this version before the first attachment.
    pub staged: bool,
    /// Newest earlier version that has maps.
    pub earlier: Option<u32>,
}

impl Pinned {
    /// Looks for maps of this version and of others. Removes a directory of maps that an earlier process did not
    /// finish.
    ///
    /// # Errors
    /// [`OpenError::Newer`] if there are maps of a later version: their meaning is not known, and programs of a later
    /// version must not be replaced by programs that understand less of the policy. [`OpenError::Io`] if a directory
    /// cannot be read or removed.
    pub(crate) fn find(pin_dir: &Path) -> Result<Self, OpenError> {
        let found = versions(pin_dir)?;
        if let Some(&version) = found.last()
            && version > VERSION
        {
            return Err(OpenError::Newer {
                path: pin_dir.join(format!("v{version}")),
                version,
            });
        }
        let (own, staging) = (version_dir(pin_dir), staging_dir(pin_dir));
        for dir in staging_dirs(pin_dir)? {
            // No program uses these maps. Those of another version can have entries that this version does not know;
            // they take memory, and do not prevent the start.
            match remove_dir_of_pins(&dir) {
                Err(error) if dir == staging => return Err(error),
                _ => {}
            }
        }
        let earlier = found.iter().rev().copied().find(|&version| version < VERSION);
        // Also without an earlier version: after a crash in the middle of the first start, the next start is the first
        // one again, and seeds the connections that are older than Palisade.
        let staged = !own.exists();
        Ok(Self {
            map_dir: if staged { staging } else { own },
            staged,
            earlier,
        })
    }
}

/// Returns the directory of the maps of this version until they are filled.
pub(crate) fn staging_dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join(format!("v{VERSION}{STAGED}"))
}

/// Copies a map whose layout and meaning have not changed since an earlier version, if that version has it. A map that
/// has changed is left empty.
pub(crate) fn copy_from_earlier(pin_dir: &Path, version: u32, to: &RawMap) -> Result<(), OpenError> {
    let Some(earlier) = earlier(version) else {
        return Ok(());
    };
    if !earlier.same.contains(&to.name.as_str()) {
        return Ok(());
    }
    let Some(from) = pinned(pin_dir, version, &to.name)? else {
        return Ok(());
    };
    let is_same = |a: &RawMap, b: &RawMap| {
        (a.info.map_type, a.info.key_size, a.info.value_size)
            == (b.info.map_type, b.info.key_size, b.info.value_size)
    };
    if !is_same(&from, to) {
        return Ok(());
    }
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    from.for_each(|key, value| {
        let fits = key
            .try_into()
            .is_ok_and(|key| u32::from_ne_bytes(key) < to.info.max_entries);
        if fits {
            keys.extend_from_slice(key);
            values.extend_from_slice(value);
        }
    })?;
    to.update_all(&keys, &values).map_err(|(_, e)| to.error(e))?;
    Ok(())
}

/// Returns the conntrack table of an earlier version; `None` if it does not exist or its layout is not known.
pub(crate) fn earlier_flows(pin_dir: &Path, version: u32) -> Result<Option<OldConntrack>, OpenError> {
    let Some(earlier) = earlier(version) else {
        return Ok(None);
    };
    let map = pinned(pin_dir, version, names::CONNTRACK)?;
    Ok(map.map(|map| OldConntrack::new(OldFlows::Earlier(map, earlier.decode))))
}

fn earlier(version: u32) -> Option<&'static Earlier> {
    EARLIER.iter().find(|earlier| earlier.version == version)
}

fn pinned(pin_dir: &Path, version: u32, name: &str) -> Result<Option<RawMap>, OpenError> {
    let path = pin_dir.join(format!("v{version}")).join(name);
    match bpf::get_pinned(&path)? {
        Some(fd) => Ok(Some(RawMap::new(name, fd)?)),
        None => Ok(None),
    }
}

/// A conntrack table that programs attached before this process write to, until their interface is attached again.
#[derive(Debug)]
pub(crate) struct OldConntrack {
    pub(crate) flows: OldFlows,
    /// Time of the coarse monotonic clock before which every flow in the table has been taken over.
    pub(crate) taken_until: u64,
    /// End and duration of the last walk.
    pub(crate) last: Option<(Instant, Duration)>,
}

#[derive(Debug)]
pub(crate) enum OldFlows {
    /// The same version, another size.
    Resized(Map<CtKey, CtEntry>),
    Earlier(RawMap, Decode),
}

impl OldConntrack {
    fn new(flows: OldFlows) -> Self {
        Self {
            flows,
            taken_until: 0,
            last: None,
        }
    }

    pub(crate) fn resized(map: Map<CtKey, CtEntry>) -> Self {
        Self::new(OldFlows::Resized(map))
    }

    /// Returns all flows. A flow of an earlier version gets revision 0, so that it is evaluated again: the number counts the
    /// policies of the old maps and would be valid by accident. The next packet of the flow gets its verdict from the
    /// policy of the new maps, in the direction in which the flow was opened.
    pub(crate) fn flows(&self) -> Result<Vec<(CtKey, CtEntry)>, MapError> {
        match &self.flows {
            OldFlows::Resized(map) => map.entries(),
            OldFlows::Earlier(map, decode) => {
                let mut flows = Vec::new();
                map.for_each(|key, value| {
                    if let Some((key, entry)) = decode(key, value) {
                        flows.push((key, CtEntry { revision: 0, ..entry }));
                    }
                })?;
                Ok(flows)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_change_of_version_says_what_becomes_of_the_flows_of_the_version_before() {
        assert!(
            earlier(VERSION - 1).is_some(),
            "upgrade.rs: EARLIER has no entry for version {}",
            VERSION - 1
        );
        assert!(EARLIER.iter().all(|earlier| earlier.version < VERSION));
    }

    #[test]
    fn a_flow_of_version_5_is_decoded_field_by_field() {
        // Each byte of the value is different from its neighbours, so that exchanged fields show.
        let bytes: Vec<u8> = (0..size_of::<Flow5>()).map(|n| n as u8 ^ 0x5a).collect();
        let key: Vec<u8> = (0..size_of::<CtKey>()).map(|n| n as u8).collect();
        let (read_key, entry) = decode_flow_5(&key, &bytes).unwrap();
        assert_eq!(read_key.as_bytes(), key);
        // The layout of version 7 is the same, so the decoded entry has the same bytes.
        assert_eq!(entry.as_bytes(), bytes);
        assert!(decode_flow_5(&key, &bytes[1..]).is_none());
        assert!(decode_flow_5(&key[1..], &bytes).is_none());
    }

    #[test]
    fn maps_of_a_later_version_are_refused_with_the_reason() {
        let dir = std::env::temp_dir().join(format!("palisade-upgrade-{}", std::process::id()));
        let later = dir.join(format!("v{}", VERSION + 1));
        fs::create_dir_all(&later).unwrap();
        fs::create_dir_all(version_dir(&dir)).unwrap();
        let error = Pinned::find(&dir).unwrap_err().to_string();
        fs::remove_dir_all(&dir).unwrap();
        for part in ["later version", "stays enforced", "stop --detach"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    #[test]
    fn maps_of_this_version_are_staged_until_they_exist() {
        let dir = std::env::temp_dir().join(format!("palisade-staging-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let find = || Pinned::find(&dir).unwrap();
        let fresh = find();
        assert_eq!((fresh.staged, fresh.earlier), (true, None));
        for version in [VERSION - 2, VERSION - 1] {
            fs::create_dir(dir.join(format!("v{version}"))).unwrap();
        }
        // Left by processes that did not finish, one of them of a later version.
        let later = dir.join(format!("v{}_new", VERSION + 1));
        for left in [&staging_dir(&dir), &later] {
            fs::create_dir(left).unwrap();
        }
        let upgrade = find();
        assert_eq!((upgrade.staged, upgrade.earlier), (true, Some(VERSION - 1)));
        assert!(!staging_dir(&dir).exists() && !later.exists());
        fs::create_dir(version_dir(&dir)).unwrap();
        let half_attached = find();
        assert_eq!(
            (half_attached.staged, half_attached.earlier),
            (false, Some(VERSION - 1))
        );
        assert_eq!(half_attached.map_dir, version_dir(&dir));
        fs::remove_dir_all(&dir).unwrap();
    }
}
