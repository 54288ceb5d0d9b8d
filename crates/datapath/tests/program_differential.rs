//! The BPF programs against the decoder in user space, on generated and mutated frames. The decoder itself is tested in
//! `crates/packet/tests/differential.rs`.

#[path = "../../packet/tests/frames/mod.rs"]
mod frames;
mod program;

use std::cell::{Cell, RefCell};

use frames::{decoded, frames, runner};
use palisade_abi::Reason;
use program::{HOST, Hook, NIC, World};
use proptest::prelude::*;

/// Number of frames for the kernel; each costs at least three system calls.
const FRAMES: u32 = 4_000;

/// Result of the programs for a frame: the reason if it is malformed, else the decoded fields of the event.
#[test]
fn programs_and_decoder_agree() {
    let world = RefCell::new(World::new(NIC, HOST));
    // Every packet reaches the policy, is dropped there with an event, and opens no flow.
    world.borrow().config(|config| {
        config.events_per_second = 1_000_000;
        config.fragment = 0;
    });
    let evaluated = Cell::new(0);
    runner(FRAMES)
        .run(&frames(), |frame| {
            let (packet, result) = decoded(&frame);
            for hook in [Hook::Xdp, Hook::TcIn] {
                // The kernel builds no socket buffer from a truncated network header.
                if hook == Hook::TcIn && frame.len() < 14 + 40 {
                    continue;
                }
                let got = world.borrow_mut().run(hook, &frame);
                if let Err(reason) = result {
                    prop_assert_eq!(got.reason, reason, "{:?}", hook);
                } else {
                    let malformed = matches!(
                        got.reason,
                        Reason::InvalidIpv4
                            | Reason::InvalidIpv6
                            | Reason::TruncatedL2
                            | Reason::TruncatedL3
                            | Reason::TruncatedL4
                            | Reason::TooManyVlans
                            | Reason::CtInvalidHeader
                            | Reason::InvalidIpv6Extension
                            | Reason::InvalidFragment
                            | Reason::UnknownL4
                            | Reason::PullFailed
                    );
                    prop_assert!(!malformed, "{:?}: {:?}", hook, got.reason);
                }
                for event in &got.events {
                    evaluated.set(evaluated.get() + 1);
                    prop_assert_eq!(
                        (event.source, event.destination),
                        (packet.source, packet.destination)
                    );
                    prop_assert_eq!(
                        (event.source_port, event.destination_port),
                        (packet.source_port, packet.destination_port)
                    );
                    prop_assert_eq!(
                        (event.protocol, event.tcp_flags),
                        (packet.protocol, packet.tcp_flags)
                    );
                    prop_assert_eq!(event.length, packet.length);
                }
            }
            Ok(())
        })
        .unwrap();
    assert!(evaluated.get() > FRAMES, "{evaluated:?}");
}
