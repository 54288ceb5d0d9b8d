//! What lies on the carrier: taken apart, made whole, put back. Run: `cargo +nightly fuzz run carrier` in tests/.
#![no_main]

use libfuzzer_sys::fuzz_target;
use palisade_abi::FlowCommand;
use palisade_inspect::Route;
use palisade_worker::{checksum, header};

/// Packets are ours: what nobody of ours carried is not looked at any further.
const COOKIE: u64 = 0x7061_6c69_7361_6465;

fuzz_target!(|bytes: &[u8]| {
    let _ = header::carried(bytes, COOKIE);
    let mut bytes = bytes.to_vec();
    if bytes.len() < 8 {
        return;
    }
    bytes[..8].copy_from_slice(&COOKIE.to_ne_bytes());
    let Ok(carried) = header::carried(&bytes, COOKIE) else { return };
    let length = bytes.len();
    let Ok(ready) = header::prepare(&mut bytes, &carried) else { return };
    // With a tag put back, the frame is by as much longer as the tag is.
    let tag = if carried.vlan_protocol == 0 { 0 } else { 4 };
    assert_eq!(ready.start + tag, header::CARRIED);
    let frame = bytes[ready.start..].to_vec();
    assert_eq!(frame.len(), length - header::CARRIED + tag);
    for slot in &carried.slots {
        let view = ready.view(slot, carried.ifindex, carried.hook, &frame);
        let (from, to) = view.payload;
        assert!(view.network <= view.transport && view.transport <= from || from == to);
        assert!(from <= to && to <= frame.len());
    }
    // What is right stays as it is.
    let mut again = frame.clone();
    checksum::complete_or_verify(&mut again, &ready.packet).expect("checksums are valid");
    assert_eq!(again, frame);
    for back in [false, true] {
        let route = Route {
            ifindex: carried.ifindex,
            hook: carried.hook,
            back,
        };
        let released = header::released(COOKIE, route, back);
        let command = FlowCommand::default();
        let mut room = frame.clone();
        assert_eq!(header::append(&mut room, frame.len(), &released, None), None);
        room.resize(frame.len() + header::TRAILER, 0);
        let whole = header::append(&mut room, frame.len(), &released, Some(&command));
        assert_eq!(whole, Some(room.len()));
        assert_eq!(room[..frame.len()], frame);
    }
});
