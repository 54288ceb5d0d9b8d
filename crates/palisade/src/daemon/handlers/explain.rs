//! `palisade explain`. The explanation compiles an addition, so the client's own thread makes it, with a copy of the
//! compiler: neither the control thread nor the packet path waits for it.

use std::sync::{Mutex, PoisonError};

use palisade_advice::record::Recorded;

use super::Handlers;
use crate::{
    control::api::{ExplainAnswer, ExplainRequest},
    daemon::{explain, message::ClientRequest},
};

/// Allows one copy of the compiler at a time, which bounds the memory of the copies.
pub(super) static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

impl Handlers {
    pub(super) fn explain(&self, request: ExplainRequest) -> Result<ExplainAnswer, String> {
        let request = match request {
            ExplainRequest::Flow(uuid) => ExplainRequest::Record(self.recorded(&uuid)?),
            other => other,
        };
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = self.look_up(ClientRequest::Compiler)?;
        explain::answer(&copy.compiler, &copy.http, &request)
    }

    /// Returns a flow of the ring as JSON.
    fn recorded(&self, uuid: &str) -> Result<String, String> {
        let flow = self.ring.get_by_uuid(uuid).ok_or_else(|| {
            format!(
                "there is no flow {uuid}: the ring keeps only the most recent flows; for older ones name an exported file \
                 (--input-file)"
            )
        })?;
        Recorded::of_flow(&flow)?;
        serde_json::to_string(&*flow).map_err(|error| error.to_string())
    }
}
