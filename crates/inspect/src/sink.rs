//! The interface through which an engine returns frames to its caller, and sends packets, flow commands, commit
//! requests and records.

use palisade_abi::{FlowCommand, Reason};

use crate::{commit::CommitRequest, packet::Route, record::Record};

/// Receives the effects of the engine, in the order in which they must happen.
pub trait Sink<F> {
    /// Forwards the packet unchanged.
    fn release(&mut self, frame: F);
    /// Forwards the packet unchanged, together with a flow command for the BPF programs.
    fn release_with(&mut self, frame: F, command: &FlowCommand);
    /// Lowers the window field of a TCP segment that the engine forwards later, and corrects its checksum. The field
    /// is not changed if it has this value or a lower one.
    fn limit_window(&mut self, _frame: &F, _window: u16) {}
    /// Sends a flow command to the BPF programs without a packet.
    fn command(&mut self, _command: &FlowCommand) {}
    /// Consumes a packet whose bytes the engine has acknowledged to the sender and delivers itself, or an ICMP error
    /// about packets that the engine has built.
    fn absorb(&mut self, frame: F) {
        self.discard(frame, Reason::TcpHeld);
    }
    /// Drops the packet.
    fn discard(&mut self, frame: F, reason: Reason);
    /// Sends a packet that the engine has built: a whole Ethernet frame with valid checksums.
    fn emit(&mut self, frame: &[u8], route: Route);
    /// Requests that the addresses of an answer are written to the maps. [`crate::Engine::committed`] handles the
    /// result.
    ///
    /// # Errors
    /// Returns the request if it could not be queued. No result follows.
    fn commit(&mut self, learn: CommitRequest) -> Result<(), CommitRequest>;
    /// Requests a new lease for an answer whose addresses are in the maps already. [`crate::Engine::committed`] handles
    /// the result, which returns the allocation of the answer for reuse.
    ///
    /// # Errors
    /// Returns the request if it could not be queued. No result follows.
    fn refresh(&mut self, learn: CommitRequest) -> Result<(), CommitRequest> {
        Err(learn)
    }
    /// Returns the current epoch, which changes whenever a learned address leaves the maps before its lease ends.
    fn epoch(&self) -> u64 {
        0
    }
    /// Reports a record.
    fn record(&mut self, record: &Record);
}
