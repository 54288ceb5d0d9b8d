//! Events of the daemon for `palisade monitor`, in the form of `cilium monitor`.

use palisade_flowlog::Timestamp;
use palisade_hubble::proto::flow::{AgentEvent, AgentEventType, agent_event::Notification};
use serde_json::{Map, Value, json};

use crate::control::api::AgentNotice;

/// Returns an event with the kinds and member names of `cilium monitor`.
pub(super) fn notice(event: AgentEvent, time: Timestamp) -> AgentNotice {
    let kind = event.r#type();
    let subtype = match kind {
        AgentEventType::AgentStarted => "Palisade started",
        AgentEventType::PolicyUpdated => "Policy updated",
        AgentEventType::PolicyDeleted => "Policy deleted",
        AgentEventType::EndpointRegenerateSuccess => "Endpoint regenerated",
        AgentEventType::EndpointRegenerateFailure => "Failed endpoint regeneration",
        AgentEventType::EndpointCreated => "Endpoint created",
        AgentEventType::EndpointDeleted => "Endpoint deleted",
        AgentEventType::IpcacheUpserted => "IPCache entry upserted",
        AgentEventType::IpcacheDeleted => "IPCache entry deleted",
        _ => "Message",
    };
    let message = match event.notification {
        Some(Notification::AgentStart(_)) => json!({"time": time.to_string()}),
        Some(Notification::PolicyUpdate(update)) => members([
            ("labels", json!(update.labels)),
            ("revision", json!(update.revision)),
            ("rule_count", json!(update.rule_count)),
        ]),
        Some(Notification::EndpointRegenerate(update)) => members([
            ("id", json!(update.id)),
            ("labels", json!(update.labels)),
            ("error", json!(update.error)),
        ]),
        Some(Notification::EndpointUpdate(update)) => members([
            ("id", json!(update.id)),
            ("labels", json!(update.labels)),
            ("error", json!(update.error)),
            ("pod-name", json!(update.pod_name)),
            ("namespace", json!(update.namespace)),
        ]),
        Some(Notification::IpcacheUpdate(update)) => members([
            ("cidr", json!(update.cidr)),
            ("id", json!(update.identity)),
            ("old-id", json!(update.old_identity)),
            ("namespace", json!(update.namespace)),
            ("pod-name", json!(update.pod_name)),
        ]),
        Some(Notification::Unknown(unknown)) => json!(unknown.notification),
        _ => Value::Null,
    };
    AgentNotice {
        time,
        subtype: subtype.into(),
        message,
    }
}

/// Returns an object with the members that have a value.
fn members<const N: usize>(all: [(&str, Value); N]) -> Value {
    let has_value = |value: &Value| match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        _ => true,
    };
    let kept = all.into_iter().filter(|(_, value)| has_value(value));
    Value::Object(
        kept.map(|(name, value)| (name.to_owned(), value))
            .collect::<Map<_, _>>(),
    )
}

#[cfg(test)]
mod tests {
    use palisade_hubble::proto::flow::{IpCacheNotification, PolicyUpdateNotification};

    use super::*;

    fn text(kind: AgentEventType, notification: Notification) -> String {
        let event = AgentEvent {
            r#type: kind.into(),
            notification: Some(notification),
        };
        let notice = notice(event, Timestamp(0));
        format!("{}: {}", notice.subtype, notice.message)
    }

    #[test]
    fn events_have_the_members_of_cilium() {
        let update = PolicyUpdateNotification {
            labels: vec!["shop/web".into()],
            revision: 2,
            rule_count: 0,
        };
        assert_eq!(
            text(AgentEventType::PolicyDeleted, Notification::PolicyUpdate(update)),
            r#"Policy deleted: {"labels":["shop/web"],"revision":2,"rule_count":0}"#
        );
        let change = IpCacheNotification {
            cidr: "10.0.0.3/32".into(),
            identity: 256,
            old_identity: Some(2),
            ..IpCacheNotification::default()
        };
        assert_eq!(
            text(
                AgentEventType::IpcacheUpserted,
                Notification::IpcacheUpdate(change)
            ),
            r#"IPCache entry upserted: {"cidr":"10.0.0.3/32","id":256,"old-id":2}"#
        );
    }
}
