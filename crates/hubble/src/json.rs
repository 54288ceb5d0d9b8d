//! Messages of a client as JSON with the field names of the definitions, as Hubble's command line prints them.

use std::sync::LazyLock;

use prost::Message as _;
use prost_reflect::{DescriptorError, DescriptorPool, DynamicMessage, MessageDescriptor, SerializeOptions};
use serde_json::Value;

use crate::wire::Encoded;

static DEFINITIONS: LazyLock<Result<DescriptorPool, DescriptorError>> = LazyLock::new(|| {
    DescriptorPool::decode(&include_bytes!(concat!(env!("OUT_DIR"), "/definitions.bin"))[..])
});

/// Returns the message `name` (`observer.GetFlowsRequest`) with the content of `json`.
///
/// # Errors
/// The message has no such field, or a value is not of its type.
pub fn encode(name: &str, json: &Value) -> Result<Encoded, String> {
    let message = DynamicMessage::deserialize(definition(name)?, json).map_err(|error| error.to_string())?;
    Ok(Encoded(message.encode_to_vec().into()))
}

/// Returns the content of the message `name`. Fields that are not in the definitions are left out.
///
/// # Errors
/// The bytes are not such a message.
pub fn decode(name: &str, message: &Encoded) -> Result<Value, String> {
    let message =
        DynamicMessage::decode(definition(name)?, message.0.clone()).map_err(|error| error.to_string())?;
    let options = SerializeOptions::new().use_proto_field_name(true);
    message
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(|error| error.to_string())
}

fn definition(name: &str) -> Result<MessageDescriptor, String> {
    let pool = DEFINITIONS.as_ref().map_err(ToString::to_string)?;
    pool.get_message_by_name(name)
        .ok_or_else(|| format!("no definition of {name}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::proto::{
        flow::{Flow, Verdict},
        observer::{GetFlowsRequest, GetFlowsResponse, get_flows_response::ResponseTypes},
    };

    #[test]
    fn a_request_has_the_fields_of_its_json() {
        let json = json!({
            "number": 3,
            "since": "1970-01-01T00:00:01Z",
            "whitelist": [{"source_label": ["app=a"], "verdict": ["DROPPED"]}],
        });
        let encoded = encode("observer.GetFlowsRequest", &json).unwrap();
        let request = GetFlowsRequest::decode(encoded.0).unwrap();
        assert_eq!((request.number, request.since.unwrap().seconds), (3, 1));
        assert_eq!(request.whitelist[0].source_label, ["app=a"]);
        assert_eq!(request.whitelist[0].verdict, [Verdict::Dropped as i32]);
        let unknown = encode(
            "observer.GetFlowsRequest",
            &json!({"whitelist": [{"sni": ["a"]}]}),
        );
        assert!(unknown.unwrap_err().contains("sni"));
        assert!(encode("observer.Nothing", &json).is_err());
    }

    #[test]
    fn a_response_has_the_names_of_the_definitions() {
        let response = GetFlowsResponse {
            node_name: "node1".to_owned(),
            response_types: Some(ResponseTypes::Flow(Flow {
                verdict: Verdict::Dropped as i32,
                uuid: "1-2".to_owned(),
                ..Flow::default()
            })),
            ..GetFlowsResponse::default()
        };
        let encoded = Encoded(response.encode_to_vec().into());
        assert_eq!(
            decode("observer.GetFlowsResponse", &encoded).unwrap(),
            json!({"flow": {"uuid": "1-2", "verdict": "DROPPED"}, "node_name": "node1"})
        );
        assert!(decode("observer.GetFlowsResponse", &Encoded([0xff][..].into())).is_err());
    }
}
