//! Fragments. A first fragment must hold the whole transport header (RFC 1858, RFC 7112), and a later fragment must not
//! reach into it (RFC 3128). Otherwise a later fragment could overwrite the ports that the verdict was based on.

use palisade_abi::{Reason, protocol};

use crate::packet::{Packet, flags};

/// Checks a fragment and writes its fields into `packet`. `offset`: fragment offset, bytes. `payload`: length of the
/// fragment's payload, bytes.
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
    // The payload of each fragment except the last is a multiple of eight bytes (RFC 791, section 3.2; RFC 8200,
    // section 4.5). A datagram has at most 65,535 bytes, so a fragment that ends beyond that length is invalid.
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

/// Returns the minimum length of a transport header, bytes.
#[inline(always)]
const fn transport_header(protocol: u8) -> u32 {
    match protocol {
        protocol::TCP => 20,
        protocol::SCTP => 12,
        _ => 8,
    }
}
