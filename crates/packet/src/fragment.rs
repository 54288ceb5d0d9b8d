//! Fragments. A first fragment must hold the whole transport header (RFC 1858, RFC 7112), and a later one
//! must not reach into it (RFC 3128): then nobody can change what was judged.

use palisade_abi::{Reason, protocol};

use crate::packet::{Packet, flags};

/// Takes note of a fragment.
///
/// `offset` is in bytes, `payload` is the length of what the fragment carries.
#[inline(always)]
pub(crate) fn note(
    packet: &mut Packet,
    id: u32,
    protocol: u8,
    offset: u32,
    more: bool,
    payload: u32,
) -> Result<(), Reason> {
    packet.fragment_id = id;
    // All but the last carry a multiple of eight bytes (RFC 791, 3.2; RFC 8200, 4.5). No datagram is longer
    // than 65,535 bytes, so no fragment ends behind that.
    if payload == 0 || (more && !payload.is_multiple_of(8)) || offset + payload > 65_535 {
        packet.flags |= if offset == 0 {
            flags::FRAGMENT_FIRST
        } else {
            flags::FRAGMENT_LATER
        };
        return Err(Reason::InvalidFragment);
    }
    if offset == 0 {
        packet.flags |= flags::FRAGMENT_FIRST;
        return Ok(());
    }
    packet.flags |= flags::FRAGMENT_LATER;
    if offset < transport_header(protocol) {
        return Err(Reason::InvalidFragment);
    }
    Ok(())
}

/// The least a transport header is long.
#[inline(always)]
const fn transport_header(protocol: u8) -> u32 {
    match protocol {
        protocol::TCP => 20,
        protocol::SCTP => 12,
        _ => 8,
    }
}
