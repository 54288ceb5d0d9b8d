//! Packets for the engine, and the effects that the engine produces.

use std::{collections::HashMap, sync::Arc};

use palisade_abi::{FlowCommand, Inspector, PuntRequest, Reason, flow_op, punt_hook};
use palisade_inspect::{CommitRequest, Engine, PacketView, Route, Rules, Sink, record::Record};
use palisade_model::{
    rule::{FqdnPattern, HttpRule},
    snapshot::{Alternative, Matcher, RuleSet},
};
use palisade_packet::{Packet, Start, decode};

/// Number of the HTTP rule set that allows paths with the prefix `/good`.
pub const HTTP: u32 = 1;
/// Number of an HTTP rule set that allows none of these paths.
pub const OTHER_HTTP: u32 = 2;
/// Number of the rule set that allows the server name `good.test`.
pub const TLS: u32 = 3;
/// Number of a rule set that does not allow that name.
pub const OTHER_TLS: u32 = 4;

thread_local! {
    static RULES: Arc<Rules> = {
        let set = |id: u32, reads: Inspector, matcher: Matcher| {
            let set = RuleSet {
                reads: reads as u8,
                alternatives: vec![Alternative { rule: 1, matcher }],
                ..RuleSet::default()
            };
            (id, Arc::new(set))
        };
        let path = |path: &str| {
            Matcher::Http(HttpRule {
                path: Some(path.into()),
                ..HttpRule::default()
            })
        };
        let name = |name: &str| Matcher::ServerName(FqdnPattern::Name(name.into()));
        let sets = [
            set(HTTP, Inspector::Http, path("/good.*")),
            set(OTHER_HTTP, Inspector::Http, path("/other")),
            set(TLS, Inspector::Tls, name("good.test")),
            set(OTHER_TLS, Inspector::Tls, name("other.test")),
        ];
        Arc::new(Rules::prepare(&sets.into_iter().collect(), None))
    };
}

/// Loads the rule sets into an engine.
pub fn prepare(engine: &mut Engine<usize>) {
    RULES.with(|rules| engine.set_rules(rules.clone()));
}

/// Returns the inspector of a rule set.
pub fn inspector(ruleset: u32) -> u8 {
    (if ruleset < TLS {
        Inspector::Http
    } else {
        Inspector::Tls
    }) as u8
}

/// Effects of the engine.
#[derive(Default)]
pub struct Done {
    /// Handles that the engine has returned, and whether it forwarded their packets.
    pub returned: HashMap<usize, bool>,
    /// Forwarded packets, in order.
    pub passed: Vec<Passed>,
    /// Whether the engine has offloaded the flow.
    pub offloaded: bool,
}

/// A forwarded packet by its handle, or a frame that the engine made.
#[allow(dead_code, reason = "some users only count handles")]
pub enum Passed {
    Packet(usize),
    Made(Vec<u8>),
}

impl Done {
    fn back(&mut self, frame: usize, released: bool) {
        let before = self.returned.insert(frame, released);
        assert!(before.is_none(), "{frame} came back twice");
        if released {
            self.passed.push(Passed::Packet(frame));
        }
    }
}

impl Sink<usize> for Done {
    fn release(&mut self, frame: usize) {
        self.back(frame, true);
    }

    fn release_with(&mut self, frame: usize, command: &FlowCommand) {
        self.offloaded |= command.op == flow_op::OFFLOAD;
        self.back(frame, true);
    }

    fn command(&mut self, command: &FlowCommand) {
        self.offloaded |= command.op == flow_op::OFFLOAD;
    }

    fn discard(&mut self, frame: usize, reason: Reason) {
        assert!(reason.is_drop());
        self.back(frame, false);
    }

    fn emit(&mut self, frame: &[u8], _route: Route) {
        let made = decode(frame, Start::Ethernet { tags_removed: 0 }, &mut Packet::default());
        assert!(made.is_ok(), "{made:?}");
        self.passed.push(Passed::Made(frame.to_vec()));
    }

    fn commit(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        Err(learn)
    }

    fn record(&mut self, _record: &Record) {}
}

/// Passes a frame to the engine if the programs would punt it. Returns whether they would.
pub fn give(
    engine: &mut Engine<usize>,
    now: u64,
    slot: &PuntRequest,
    frame: &[u8],
    handle: usize,
    done: &mut Done,
) -> bool {
    let mut packet = Packet::default();
    let decoded = decode(frame, Start::Ethernet { tags_removed: 0 }, &mut packet);
    // The programs punt only packets that the decoder accepts.
    if decoded.is_err() || packet.is(palisade_packet::flags::NOT_IP) {
        return false;
    }
    let transport = usize::from(packet.transport_offset);
    let network = usize::from(packet.network_offset);
    let end = network + packet.length as usize;
    let is_tcp = packet.protocol == palisade_abi::protocol::TCP && transport + 20 <= end;
    let payload = if is_tcp && !packet.is(palisade_packet::flags::FRAGMENT_LATER) {
        transport + usize::from(frame[transport + 12] >> 4) * 4
    } else {
        transport
    };
    let view = PacketView {
        slot,
        ifindex: 1,
        hook: punt_hook::TC_EGRESS,
        packet: &packet,
        frame,
        network,
        transport,
        payload: (payload.min(end), end),
    };
    engine.packet(now, &view, handle, done);
    true
}
