//! Conntrack keys of inspected connections, and flow commands about them.

use palisade_abi::{Addr, CtKey, FlowCommand, PuntRequest, protocol, punt_flags};

use crate::PacketView;

/// Returns the conntrack key of a packet, as the endpoint of the punt request sees it.
pub(crate) fn key(view: &PacketView<'_>) -> CtKey {
    let packet = view.packet;
    let source = (packet.source, packet.source_port);
    let destination = (packet.destination, packet.destination_port);
    if view.slot.flags & punt_flags::INGRESS != 0 {
        key_of(destination, source, view.slot.endpoint)
    } else {
        key_of(source, destination, view.slot.endpoint)
    }
}

/// Returns the conntrack key of a connection of `endpoint`.
pub(super) const fn key_of(local: (Addr, u16), remote: (Addr, u16), endpoint: u16) -> CtKey {
    CtKey {
        local: local.0,
        remote: remote.0,
        local_port: local.1,
        remote_port: remote.1,
        endpoint,
        protocol: protocol::TCP,
        zero: 0,
    }
}

/// Returns a flow command ([`palisade_abi::flow_op`]) with the serial of the punt request and no offload window.
pub(super) fn flow_command(key: CtKey, slot: &PuntRequest, op: u32) -> FlowCommand {
    FlowCommand {
        key,
        serial: slot.serial,
        op,
        ruleset: slot.ruleset,
        punt_flags: u32::from(slot.flags & punt_flags::AUDIT),
        windows: [0; 4],
    }
}
