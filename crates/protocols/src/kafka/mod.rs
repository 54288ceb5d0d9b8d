//! Parser of Kafka requests, and writer of responses that deny them.
//!
//! [`Request::parse`] reads the header of a request. [`Request::walk`] reads its body and reports the topics that it
//! names. [`deny`] writes a response of the same type and version with an error code. The tables of messages are in
//! `table`; a version that the tables do not have is refused, because its fields are not known.
//!
//! The specifications are the message definitions of Apache Kafka 4.1, KIP-482 (flexible versions) and KIP-511
//! (`ApiVersions`).

mod error;
mod numbers;
mod reader;
mod request;
mod respond;
mod table;
mod walk;

pub use error::ParseError;
pub use numbers::{
    API_VERSIONS, CLUSTER_AUTHORIZATION_FAILED, CONSUMER_GROUP_HEARTBEAT, DESCRIBE_TOPIC_PARTITIONS, FETCH,
    FETCH_SESSION_ID_NOT_FOUND, MAX_REQUEST, METADATA, NOT_COORDINATOR, PRODUCE, SASL_HANDSHAKE, SIZE,
    TOPIC_AUTHORIZATION_FAILED, UNKNOWN_TOPIC_ID,
};
pub use request::{Header, Request, message_length};
pub use respond::{Broker, Denied, Outcome, denial_error, deny, outcome};
pub use table::{Topics, api_key, api_name, api_names, empty_means_all, last_version, topics_of};
pub use walk::{Item, TopicId, learned_topics};

#[cfg(test)]
mod tests;
