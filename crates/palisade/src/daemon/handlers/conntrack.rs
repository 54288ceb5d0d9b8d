//! The conntrack table: `palisade bpf ct list` and `palisade bpf ct flush`.

use std::{cell::RefCell, io, ops::ControlFlow};

use palisade_abi::{CtEntry, CtKey};
use palisade_datapath::{Fate, monotonic_coarse};
use palisade_policy::cuts::CutFinder;

use super::{Handlers, map_error};
use crate::{
    control::{
        api::{Answer, ConnectionFilter, ConnectionRow, Flushed},
        server::Sink,
    },
    daemon::{
        cuts,
        map_rows::{Selected, connection_row},
        message::ClientRequest,
    },
};

/// Largest number of connections in one line of an answer.
const ROWS_PER_LINE: usize = 512;

impl Handlers {
    fn selected<'f>(&self, filter: &'f ConnectionFilter) -> Result<Selected<'f>, String> {
        Ok(Selected {
            filter,
            endpoint: self.endpoint_number(filter.endpoint.clone())?,
        })
    }

    /// Sends the entries, in no particular order, while the table is read.
    pub(super) fn list_connections(&self, filter: &ConnectionFilter, sink: &mut dyn Sink) -> io::Result<()> {
        let selected = match self.selected(filter) {
            Ok(selected) => selected,
            Err(message) => return sink.send(&Answer::Error(message)),
        };
        let now = monotonic_coarse();
        let mut sent = Ok(());
        let walk = self.datapath.conntrack().for_each_chunk(|chunk| {
            let found = chunk.iter().filter(|(key, entry)| selected.has(key, entry));
            let rows: Vec<ConnectionRow> = found
                .map(|(key, entry)| connection_row(key, entry, now))
                .collect();
            for rows in rows.chunks(ROWS_PER_LINE) {
                sent = sink.queue(&Answer::Connections(rows.to_vec()));
                if sent.is_err() {
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        });
        sent?;
        sink.send(&match walk {
            Ok(()) => Answer::Ok(serde_json::Value::Null),
            Err(error) => Answer::Error(map_error(error)),
        })
    }

    /// Removes entries. Those of flows that the policies in force deny stay: without its entry such a flow would get a
    /// verdict in the direction of its next packet, which the policies may allow.
    pub(super) fn flush_connections(&self, filter: &ConnectionFilter) -> Result<Flushed, String> {
        let selected = self.selected(filter)?;
        let conntrack = self.datapath.conntrack();
        let states = self.datapath.endpoint_states();
        let is_unsettled = |key: &CtKey, entry: &CtEntry| {
            selected.has(key, entry) && cuts::is_unsettled(&states, key, entry)
        };
        let mut has_unsettled = false;
        conntrack
            .for_each_chunk(|chunk| {
                has_unsettled = chunk.iter().any(|(key, entry)| is_unsettled(key, entry));
                if has_unsettled {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })
            .map_err(map_error)?;
        let compiler = match has_unsettled {
            true => Some(self.look_up(ClientRequest::Compiler)?.compiler),
            false => None,
        };
        let finder = RefCell::new(compiler.as_ref().map(CutFinder::new));
        let is_denied = |key: &CtKey, entry: &CtEntry| {
            is_unsettled(key, entry)
                && match &mut *finder.borrow_mut() {
                    Some(finder) => cuts::is_denied(finder, &self.names, key, entry),
                    // It was settled a moment ago: the policies have changed since.
                    None => true,
                }
        };
        let mut kept = 0;
        let outcome = conntrack
            .remove_if(
                |key, entry| selected.has(key, entry) && !is_denied(key, entry),
                |fate, key, entry| kept += u64::from(fate == Fate::Stays && is_unsettled(key, entry)),
            )
            .map_err(map_error)?;
        Ok(Flushed {
            flushed: outcome.removed,
            kept,
        })
    }
}
