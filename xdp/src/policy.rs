//! Lookup in the policy table.

use palisade_abi::{
    CLASS_ANY, CLASS_SLOTS, Decision, INSIDE, Inspector, PolicyEntry, PolicyKey, Reason, entry_flags,
    identity, punt_flags,
};

use crate::maps::{CLASSES, CONFIG, POLICY};
use crate::packet_context::{PacketContext, hook_point};

/// Returns the port class of a slot.
#[inline(always)]
fn class(slot: u32) -> u16 {
    match CLASSES.get(0) {
        Some(classes) if (slot as usize) < CLASS_SLOTS => classes[slot as usize],
        _ => CLASS_ANY,
    }
}

/// Looks up the policy table of the endpoint. The first existing key decides: (identity, class), (identity, any), (any,
/// class), (any, any). Writes the verdict and the fields of the deciding entry into `pkt`.
#[inline(never)]
pub fn lookup(pkt: &mut PacketContext, identity: u32, slot: u32, direction: u32) {
    pkt.remote_identity = identity;
    pkt.set(Reason::NoPolicy);
    let policy = pkt.policy;
    if policy == 0 {
        return;
    }
    let class = class(slot);
    let direction = direction as u8;
    let mut key = PolicyKey {
        policy,
        identity,
        class,
        direction,
        zero: 0,
    };
    let Some(mut entry) = find(&mut key) else { return };
    // A failsafe port of the node is open towards NICs only, not towards the node's workloads.
    if entry.flags & entry_flags::FAILSAFE != 0
        && (pkt.no_failsafe != 0
            || pkt.hook_point != hook_point::NIC_IN && pkt.hook_point != hook_point::NIC_OUT)
    {
        key.identity = identity;
        key.class = class;
        key.direction = direction | INSIDE;
        let Some(inside) = find(&mut key) else { return };
        entry = inside;
    }
    pkt.rule = entry.rule;
    pkt.decision = entry.decision;
    pkt.match_kind = entry.match_kind;
    pkt.entry_flags = entry.flags;
    pkt.inspector = 0;
    pkt.ruleset = 0;
    pkt.punt_flags = 0;
    if entry.decision == Decision::Inspect as u8 && has_inspector(entry.inspector) {
        pkt.inspector = entry.inspector;
        pkt.ruleset = entry.ruleset;
        if entry.flags & entry_flags::AUDIT != 0 {
            pkt.punt_flags = punt_flags::AUDIT;
        }
        return pkt.set(Reason::Allowed);
    }
    let reason = reason(entry);
    pkt.set(reason);
}

/// Returns the deciding entry. Overwrites the key.
#[inline(always)]
fn find(key: &mut PolicyKey) -> Option<&'static PolicyEntry> {
    let class = key.class;
    // SAFETY: the value stays readable while the program runs (RCU), and an update of the map replaces the element
    // instead of writing to it.
    if let Some(entry) = unsafe { POLICY.get(&*key) } {
        return Some(entry);
    }
    key.class = CLASS_ANY;
    // SAFETY: the value stays readable while the program runs (RCU), and an update of the map replaces the element
    // instead of writing to it.
    if let Some(entry) = unsafe { POLICY.get(&*key) } {
        return Some(entry);
    }
    key.identity = identity::ANY;
    key.class = class;
    // SAFETY: the value stays readable while the program runs (RCU), and an update of the map replaces the element
    // instead of writing to it.
    if let Some(entry) = unsafe { POLICY.get(&*key) } {
        return Some(entry);
    }
    key.class = CLASS_ANY;
    // SAFETY: the value stays readable while the program runs (RCU), and an update of the map replaces the element
    // instead of writing to it.
    unsafe { POLICY.get(&*key) }
}

/// Returns whether the workers or the proxy have an inspector of this number.
#[inline(always)]
fn has_inspector(inspector: u8) -> bool {
    match CONFIG.get(0) {
        Some(config) => {
            // The proxy needs no worker, except for packets of an XDP hook.
            (config.workers != 0 || inspector == Inspector::TlsTerminate as u8)
                && config.inspectors >> (inspector & 31) & 1 != 0
        }
        None => false,
    }
}

/// Returns the reason for an entry that does not inspect, or whose inspector is not available.
#[inline(always)]
fn reason(entry: &PolicyEntry) -> Reason {
    let decision = Decision::from_u8(entry.decision);
    if decision == Decision::Allow {
        return if entry.flags & entry_flags::FAILSAFE == 0 {
            Reason::Allowed
        } else {
            Reason::Failsafe
        };
    }
    if entry.flags & entry_flags::AUDIT != 0 {
        return Reason::Audited;
    }
    match decision {
        Decision::DenyExplicit => Reason::PolicyDeniedByDenylist,
        Decision::AuthRequired => Reason::AuthRequired,
        Decision::DenyQuic => Reason::QuicIntercepted,
        Decision::Inspect => match entry.inspector {
            n if n == Inspector::Dns as u8 => Reason::NoDnsInspector,
            n if n == Inspector::Tls as u8 => Reason::NoTlsInspector,
            n if n == Inspector::Kafka as u8 => Reason::NoKafkaInspector,
            n if n == Inspector::Listener as u8 => Reason::NoListener,
            n if n == Inspector::TlsTerminate as u8 => Reason::NoTlsTermination,
            _ => Reason::NoHttpInspector,
        },
        _ => Reason::PolicyDenied,
    }
}
