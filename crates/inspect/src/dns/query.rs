//! Handles DNS queries: allows or denies them by name, tracks the allowed ones until their answer, and responds to the
//! denied ones with an error in the resolver's place.

use palisade_abi::{Reason, protocol};
use palisade_protocols::dns::{Limits, Name, Query, Rcode, reply, rtype};

use super::{
    Denial, Dns, flow, is_audit, records,
    types::{Note, QueryVerdict},
};
use crate::{
    DnsRules, PacketView, Route, Sink,
    context::Cx,
    packet_builder,
    record::{Record, What},
};

impl<F> Dns<F> {
    /// Returns the verdict on a query. A query that passes is tracked as an open question, unless it asks for a zone
    /// transfer over TCP.
    pub(crate) fn query<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        message: &[u8],
        cx: &mut Cx<'_, F, S>,
    ) -> QueryVerdict {
        let Some(rules) = cx.rules.dns(view.slot.ruleset) else {
            let reason = Reason::UnknownRuleset;
            let detail = reason.text();
            let record = Record::of(view, What::Unreadable { detail });
            return self.refuse_query(view, record, reason, None, cx);
        };
        let query = match Query::parse(message, &Limits::QUERY) {
            Ok(query) => query,
            Err(error) => {
                if let Some(count) = self.stats.malformed.get_mut(error as usize) {
                    *count += 1;
                }
                let detail = error.text();
                let record = Record::of(view, What::Unreadable { detail });
                return self.refuse_query(view, record, Reason::AppMalformed, error.rcode(), cx);
            }
        };
        self.stats.queries += 1;
        let mut record = Record::of(view, records::query(&query.question));
        let allowed = rules.evaluate(&query.question.name);
        if allowed.is_none() {
            self.stats.denied += 1;
            if !is_audit(view.slot) {
                let rcode = match self.limits.denial {
                    Denial::Refused if is_of_search_list(&query.question.name, rules) => Rcode::NxDomain,
                    Denial::Refused => Rcode::Refused,
                    Denial::NxDomain => Rcode::NxDomain,
                };
                return self.refuse_query(view, record, Reason::AppDenied, Some(rcode), cx);
            }
        }
        let rule = allowed.unwrap_or(view.slot.rule);
        let note = Note { rule };
        let is_transfer = view.packet.protocol == protocol::TCP
            && matches!(query.question.rtype, rtype::AXFR | rtype::IXFR);
        let passes = if is_transfer {
            QueryVerdict::Transfer(note)
        } else if (self.tracker)
            .asked(flow(view), query.id, &query.question, note, cx.now)
            .is_ok()
        {
            QueryVerdict::Pass
        } else {
            return self.too_many(view, record, cx);
        };
        if allowed.is_none() {
            // Reached in audit mode only.
            return match self.refuse_query(view, record, Reason::AppDenied, None, cx) {
                QueryVerdict::Pass => passes,
                refused => refused,
            };
        }
        record.rule = rule;
        cx.sink.record(&record);
        passes
    }

    /// Refuses a query that cannot be tracked, because its answer would count as unsolicited.
    pub(super) fn too_many<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        record: Record,
        cx: &mut Cx<'_, F, S>,
    ) -> QueryVerdict {
        self.stats.too_many += 1;
        self.refuse_query(view, record, Reason::InspectLimit, None, cx)
    }

    fn refuse_query<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        record: Record,
        reason: Reason,
        rcode: Option<Rcode>,
        cx: &mut Cx<'_, F, S>,
    ) -> QueryVerdict {
        if self.refused(is_audit(view.slot), record, reason, cx) {
            QueryVerdict::Refuse(reason, rcode)
        } else {
            QueryVerdict::Pass
        }
    }

    /// Responds to the client of a dropped query, if a response can be built.
    pub(super) fn reply<S: Sink<F>>(
        &mut self,
        view: &PacketView<'_>,
        query: &[u8],
        rcode: Rcode,
        cx: &mut Cx<'_, F, S>,
    ) {
        let mut message = [0; 512];
        if let Ok(length) = reply(query, rcode, &mut message)
            && let Some(message) = message.get(..length)
            && packet_builder::datagram_back(view, message, &mut self.out)
        {
            self.stats.replies += 1;
            let route = Route {
                ifindex: view.ifindex,
                hook: view.hook,
                back: true,
            };
            cx.sink.emit(&self.out, route);
        }
    }
}

/// Returns whether a message is a query that the rules allow. Does not track it.
pub(super) fn is_allowed<F, S>(view: &PacketView<'_>, message: &[u8], cx: &Cx<'_, F, S>) -> bool {
    Query::parse(message, &Limits::QUERY).is_ok_and(|query| {
        let rules = cx.rules.dns(view.slot.ruleset);
        rules.is_some_and(|rules| rules.evaluate(&query.question.name).is_some())
    })
}

/// Returns whether a name begins with a name that the rules allow, so that the rest is possibly a domain of a search
/// list (`search` in resolv.conf(5)). Some stub resolvers try the next domain, and at last the name itself, only after
/// NXDOMAIN.
fn is_of_search_list(name: &Name, rules: &DnsRules) -> bool {
    /// Maximum number of labels that are taken for a search domain.
    const MOST: usize = 8;
    let count = name.labels().count();
    (1..=MOST.min(count.saturating_sub(1))).any(|cut| {
        let length: usize = name.labels().take(count - cut).map(|label| label.len() + 1).sum();
        // The labels, and a zero for the root.
        let mut wire = [0; 256];
        let Some((kept, room)) = name.wire().get(..length).zip(wire.get_mut(..length)) else {
            return false;
        };
        room.copy_from_slice(kept);
        let prefix = wire.get(..=length).map(Name::from_wire);
        prefix.is_some_and(|name| name.is_ok_and(|name| rules.evaluate(&name).is_some()))
    })
}
