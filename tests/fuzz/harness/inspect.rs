//! Whole packets through the decoder and the DNS inspector: run by the fuzzer, and by a test with mutations of its corpus.
//!
//! The input is a list of steps: flags (one byte), the length of a frame (two bytes), the frame. For every input, the
//! engine returns each handle exactly once, forwards a held answer only after it is committed, and the decoder accepts each
//! frame that the engine makes.
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use palisade_abi::{FlowCommand, Inspector, PuntRequest, Reason, punt_flags, punt_hook};
use palisade_inspect::{CommitRequest, Engine, Limits, PacketView, Route, Rules, Sink, record::Record};
use palisade_model::{
    rule::FqdnPattern,
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_packet::{Packet, Start, decode};

/// Bits of the first byte of a step.
mod what {
    pub const INGRESS: u8 = 1;
    pub const REPLY: u8 = 2;
    pub const AUDIT: u8 = 4;
    pub const COMMIT: u8 = 8;
    pub const ABORT: u8 = 16;
    pub const WAIT: u8 = 32;
    pub const FORGET: u8 = 64;
    pub const OTHER_SERIAL: u8 = 128;
}

#[derive(Default)]
struct Checked {
    returned: HashMap<usize, bool>,
    learns: Vec<CommitRequest>,
}

impl Checked {
    fn back(&mut self, frame: usize, released: bool) {
        assert!(
            self.returned.insert(frame, released).is_none(),
            "{frame} came back twice"
        );
    }
}

impl Sink<usize> for Checked {
    fn release(&mut self, frame: usize) {
        self.back(frame, true);
    }

    fn release_with(&mut self, frame: usize, _command: &FlowCommand) {
        self.back(frame, true);
    }

    fn discard(&mut self, frame: usize, reason: Reason) {
        assert!(reason.is_drop());
        self.back(frame, false);
    }

    fn emit(&mut self, frame: &[u8], _route: Route) {
        let made = decode(frame, Start::Ethernet { tags_removed: 0 }, &mut Packet::default());
        assert!(made.is_ok(), "{made:?}");
    }

    fn commit(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        assert!(!learn.answer.addresses.is_empty());
        self.learns.push(learn);
        Ok(())
    }

    fn record(&mut self, _record: &Record) {}
}

thread_local! {
    static RULES: Arc<Rules> = {
        let pattern = Matcher::Dns(FqdnPattern::Pattern("*.test".into()));
        let set = RuleSet {
            reads: Inspector::Dns as u8,
            alternatives: vec![Alternative { rule: 1, matcher: pattern }],
            ..RuleSet::default()
        };
        Arc::new(Rules::prepare(&BTreeMap::from([(1, Arc::new(set))]), None))
    };
}

/// Runs one list of steps.
pub fn run(bytes: &[u8]) {
    let mut engine = Engine::new(&Limits::default());
    RULES.with(|rules| engine.set_rules(rules.clone()));
    let mut sink = Checked::default();
    let (mut now, mut sent, mut rest) = (0, 0, bytes);
    while let Some((&[happens, length0, length1], after)) = rest.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes([length0, length1])).min(after.len());
        let (frame, after) = after.split_at(length);
        rest = after;
        let is = |bit| happens & bit != 0;
        let flag = |bit, flag| if is(bit) { flag } else { 0 };
        let slot = PuntRequest {
            rule: 9,
            ruleset: 1,
            serial: u32::from(is(what::OTHER_SERIAL)),
            endpoint: 1,
            inspector: Inspector::Dns as u8,
            flags: flag(what::INGRESS, punt_flags::INGRESS)
                | flag(what::REPLY, punt_flags::REPLY)
                | flag(what::AUDIT, punt_flags::AUDIT),
            ..PuntRequest::default()
        };
        let mut packet = Packet::default();
        let decoded = decode(frame, Start::Ethernet { tags_removed: 0 }, &mut packet);
        // The programs punt only packets that the decoder accepts.
        if decoded.is_ok() && !packet.is(palisade_packet::flags::NOT_IP) {
            let transport = usize::from(packet.transport_offset);
            let network = usize::from(packet.network_offset);
            let end = network + packet.length as usize;
            let byte = |at: usize| frame.get(transport + at).copied().unwrap_or(0);
            let header = match packet.protocol {
                6 => usize::from(byte(12) >> 4) * 4,
                _ => 8,
            };
            let view = PacketView {
                slot: &slot,
                ifindex: 1,
                hook: punt_hook::TC_EGRESS,
                packet: &packet,
                frame,
                network,
                transport,
                payload: ((transport + header).min(end), end),
            };
            let learns = sink.learns.len();
            engine.packet(now, &view, sent, &mut sink);
            if sink.learns.len() > learns
                && packet.protocol == palisade_abi::protocol::UDP
                && !is(what::AUDIT)
            {
                assert!(
                    !sink.returned.contains_key(&sent),
                    "released before it is committed"
                );
            }
            sent += 1;
        }
        if (is(what::COMMIT) || is(what::ABORT))
            && let Some(learn) = sink.learns.pop()
        {
            let learned = learn.done(is(what::COMMIT), None);
            engine.committed(now, learned, &mut sink);
        }
        if is(what::WAIT) {
            now += 1500;
            engine.tick(now, &mut sink);
        }
        if is(what::FORGET) && is(what::WAIT) && is(what::ABORT) {
            engine.forget_endpoint(1, &mut sink);
        }
    }
    engine.drain(&mut sink);
    assert_eq!(sink.returned.len(), sent);
}
