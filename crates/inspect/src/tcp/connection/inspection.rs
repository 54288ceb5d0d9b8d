//! Shows the reassembled streams to the inspector, and forwards the bytes that it allows.

use palisade_abi::Reason;

use super::{
    super::{
        half::{OffloadWindow, START},
        inspector::{Action, StreamInspector, log_action},
        shared::{Shared, TcpCx},
        side::Side,
    },
    Connection, Phase, WINDOW_AGE,
    phase::Response,
};
use crate::Sink;

/// Maximum length of an offload window, bytes. Sequence numbers have 32 bits, so a comparison is valid only within 2^31
/// bytes.
const LONGEST_WINDOW: u64 = 1 << 30;
/// If at most this many bytes of a bypassed range have not arrived, the range is kept and its retransmissions are
/// compared with it. If more have not arrived, the range is skipped.
const SMALL: u64 = 4096;

impl<F> Connection<F> {
    /// Calls the inspector until it needs more bytes, and forwards the packets that it allows.
    pub(super) fn inspect<S: Sink<F>>(
        &mut self,
        inspector: &mut impl StreamInspector<F>,
        cx: &mut TcpCx<'_, F, S>,
    ) {
        if matches!(self.phase, Phase::Responding(_)) {
            self.send_allowed_starts(cx);
            self.respond_when_due(cx);
            return;
        }
        self.remove_old_windows();
        let allowed = (self.halves.client.allowed, self.halves.server.allowed);
        let mut again = true;
        while std::mem::take(&mut again) {
            for side in Side::BOTH {
                while matches!(self.phase, Phase::Open) && self.inspect_once(side, inspector, cx) {
                    again = true;
                }
                self.open_window(side);
                self.flush(side, cx);
                self.offer_window(side, cx);
            }
        }
        self.send_allowed_starts(cx);
        self.note_progress();
        for (half, allowed) in self.halves.both_mut().into_iter().zip([allowed.0, allowed.1]) {
            if half.undecided().is_empty() {
                half.since = None;
            } else if half.since.is_none() || half.allowed > allowed {
                half.since = Some(cx.now);
            }
        }
    }

    /// Forwards the allowed bytes of a segment that stays held after the inspector has seen it.
    fn send_allowed_starts<S: Sink<F>>(&mut self, cx: &mut TcpCx<'_, F, S>) {
        for side in Side::BOTH {
            self.send_allowed_start(side, cx);
        }
    }

    /// Removes offload windows before their sequence numbers wrap around (2^32 bytes). The command is repeated every
    /// [`WINDOW_AGE`] bytes, in case the packet that carries it is lost.
    fn remove_old_windows(&mut self) {
        for side in Side::BOTH {
            if let Some(end) = self.window_ends[side]
                && self.halves[side].allowed > end
            {
                self.windows[side] = [0; 2];
                self.codes[side] = 0;
                self.command = true;
                self.window_ends[side] = Some(end + WINDOW_AGE);
            }
        }
    }

    /// Calls the inspector once for one side. Returns whether a further call can decide about more bytes.
    fn inspect_once<S: Sink<F>>(
        &mut self,
        side: Side,
        inspector: &mut impl StreamInspector<F>,
        cx: &mut TcpCx<'_, F, S>,
    ) -> bool {
        let half = &mut self.halves[side];
        let is_whole = half.is_whole();
        let bytes = half.undecided();
        let available = bytes.len();
        if available == 0 && (!is_whole || half.end_read || half.allowed > half.next) {
            return false;
        }
        let action = match std::mem::take(&mut self.rest[side]) {
            0 => {
                inspector.sent(side, half.sent.saturating_sub(START + 1));
                inspector.read(side, bytes, is_whole, &mut cx.engine())
            }
            rest => Action::Bypass(rest),
        };
        log_action(&self.about, side, available, &action);
        // If two policies inspect the connection, the allowed part of a held packet is not forwarded in a packet of its
        // own. The other side can be waiting for that part, so the deadline must run.
        half.awaits_peer = matches!(action, Action::AwaitPeer) && !(self.is_shared && half.part().is_some());
        match action {
            Action::NeedMore | Action::AwaitPeer => false,
            Action::ForwardUndecided(n) => {
                half.ahead = half.allowed + n.min(available) as u64;
                false
            }
            Action::Forward(n) => {
                half.pass(n.min(available) as u64);
                if available == 0 {
                    half.end_read = true;
                    half.allowed += 1;
                    return true;
                }
                n > 0
            }
            Action::Bypass(n) => {
                self.skip(side, n, available as u64, cx.shared);
                n > 0
            }
            Action::Offload => {
                cx.shared.stats.offloaded += 1;
                self.phase = Phase::Offloaded;
                false
            }
            Action::Abort(reason) => {
                self.flush(side, cx);
                self.split(side, cx);
                self.abort(reason, cx);
                false
            }
            Action::Respond(reason, bytes) => {
                self.begin_response(side, reason, bytes, false, cx);
                false
            }
            Action::RespondThenEnd(reason, bytes) => {
                self.begin_response(side, reason, bytes, true, cx);
                false
            }
        }
    }

    /// Forwards what is allowed, and responds to `side` once the other end's earlier bytes have arrived.
    fn begin_response<S: Sink<F>>(
        &mut self,
        side: Side,
        reason: Reason,
        bytes: Vec<u8>,
        holds_fin: bool,
        cx: &mut TcpCx<'_, F, S>,
    ) {
        self.flush(side, cx);
        self.split(side, cx);
        let until = cx.now.saturating_add(cx.shared.limits.deadline / 2);
        self.phase = Phase::Responding(Box::new(Response::new(reason, side, bytes, until, holds_fin)));
        self.respond_when_due(cx);
    }

    /// Marks the next `n` bytes of one side as allowed, of which `available` have arrived. Sets an offload window, if
    /// possible, when at least `TcpLimits::window` of them have not arrived.
    fn skip(&mut self, side: Side, n: u64, available: u64, shared: &Shared) {
        let half = &mut self.halves[side];
        // Bytes that were acknowledged on behalf of the receiver must be kept until they are delivered.
        let undelivered = half.proxy_acked.saturating_sub(half.allowed).min(n);
        if undelivered > 0 {
            half.pass(undelivered);
            self.rest[side] = n - undelivered;
            return;
        }
        let taken = n.min(LONGEST_WINDOW);
        if n <= available + SMALL {
            half.pass(n);
            return;
        }
        let (from, was_limited) = (half.allowed, half.limit.is_some());
        let is_skipped = half.skip(taken);
        self.rest[side] = n - taken;
        // Acknowledgements of bytes in an offload window are not punted, so no window is set while bytes acknowledged
        // on behalf of the receiver wait for one.
        if is_skipped
            && n - available >= shared.limits.window
            && self.is_drained()
            && let Some(code) = self.limit_sender(side, n - available, shared)
        {
            let window = OffloadWindow {
                from,
                end: self.halves[side].allowed,
                code,
            };
            self.offers[side] = code != 0;
            self.put_off[side] = (was_limited && code != 0).then_some(window);
            if self.put_off[side].is_none() {
                self.set_window(side, &window);
            }
        }
    }

    /// Sets an offload window of `side`.
    pub(super) fn set_window(&mut self, side: Side, window: &OffloadWindow) {
        let half = &self.halves[side];
        self.windows[side] = [half.seq(window.from), half.seq(window.end)];
        self.codes[side] = window.code;
        self.window_ends[side] = Some(window.end + WINDOW_AGE);
        self.command = true;
    }

    /// Forwards the held packets of `side` that may be forwarded; after an offload, those of both sides.
    pub(super) fn flush<S: Sink<F>>(&mut self, side: Side, cx: &mut TcpCx<'_, F, S>) {
        if matches!(self.phase, Phase::Offloaded) {
            self.flush_all(cx);
            return;
        }
        self.deliver(side, cx);
        while let Some(held) = self.halves[side].releasable() {
            self.release(held.frame, cx);
        }
        let half = &self.halves[side];
        // The allowed part of a held packet is forwarded on its own only under this condition. Otherwise the rest of
        // the message is expected soon, or the packet is soon acknowledged on behalf of the receiver.
        if half.awaits_peer || !half.is_contiguous() {
            self.split(side, cx);
        }
    }

    /// Forwards all held packets of a connection that was just offloaded.
    fn flush_all<S: Sink<F>>(&mut self, cx: &mut TcpCx<'_, F, S>) {
        for side in Side::BOTH {
            let half = &mut self.halves[side];
            half.allowed = half.allowed.max(half.proxy_acked);
            self.deliver(side, cx);
        }
        let is_drained = self.is_drained();
        // The last packet carries the command, so that packets which the BPF programs forward from then on do not
        // overtake the held ones.
        let mut rest = self.halves.client.held.len() + self.halves.server.held.len();
        for side in Side::BOTH {
            while let Some(held) = self.halves[side].held.pop_front() {
                rest -= 1;
                self.command = rest == 0 && is_drained;
                self.release(held.frame, cx);
            }
        }
        if is_drained {
            self.close(Reason::Allowed, cx);
        }
    }
}
