//! Frames of the punt link: parsed, prepared for inspection, and given a reinject trailer. Run: `cargo +nightly fuzz run
//! punt_header` in tests/.
#![no_main]

use libfuzzer_sys::fuzz_target;
use palisade_abi::{FlowCommand, MAX_ON_PUNT_LINK};
use palisade_inspect::Route;
use palisade_worker::{checksum, header};

/// The cookie of each input. Frames with another one are dropped by the parser, so they would reach nothing else.
const COOKIE: u64 = 0x7061_6c69_7361_6465;

fuzz_target!(|bytes: &[u8]| {
    let _ = header::parse(bytes, COOKIE);
    let mut bytes = bytes.to_vec();
    if bytes.len() < 8 {
        return;
    }
    bytes[..8].copy_from_slice(&COOKIE.to_ne_bytes());
    let Ok(carried) = header::parse(&bytes, COOKIE) else {
        return;
    };
    let length = bytes.len();
    let Ok(prepared) = header::prepare(&mut bytes, &carried) else {
        return;
    };
    // A VLAN tag that is put back makes the frame four bytes longer.
    let tag = if carried.vlan_protocol == 0 { 0 } else { 4 };
    assert_eq!(prepared.start + tag, header::PUNT_HEADER);
    let frame = bytes[prepared.start..].to_vec();
    assert_eq!(frame.len(), length - header::PUNT_HEADER + tag);
    for slot in &carried.slots {
        let view = prepared.view(slot, carried.ifindex, carried.hook, &frame);
        let (from, to) = view.payload;
        assert!(view.network <= view.transport && view.transport <= from || from == to);
        assert!(from <= to && to <= frame.len());
    }
    // A second run leaves valid checksums unchanged.
    let mut again = frame.clone();
    checksum::complete_or_verify(&mut again, &prepared.packet).expect("checksums are valid");
    assert_eq!(again, frame);
    for back in [false, true] {
        let route = Route {
            ifindex: carried.ifindex,
            hook: carried.hook,
            back,
        };
        let released = header::trailer(COOKIE, route, back);
        let command = FlowCommand::default();
        let mut room = frame.clone();
        assert_eq!(
            header::append_trailer(&mut room, frame.len(), &released, [None; 2]),
            None
        );
        room.resize(frame.len() + header::MAX_TRAILER_BYTES, 0);
        let whole = header::append_trailer(&mut room, frame.len(), &released, [Some(&command); 2]);
        let fits = room.len() <= MAX_ON_PUNT_LINK as usize;
        assert_eq!(whole, fits.then_some(room.len()));
        assert_eq!(room[..frame.len()], frame);
    }
});
