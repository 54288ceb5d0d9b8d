//! API keys, error codes and sizes of the protocol.

/// Length of the size field in front of each message, bytes.
pub const SIZE: usize = 4;
/// Longest message that is accepted, bytes: the default of the broker's `socket.request.max.bytes`. The first bytes of
/// TLS and HTTP, read as a length, are larger.
pub const MAX_REQUEST: usize = 100 << 20;
/// API key of Produce.
pub const PRODUCE: i16 = 0;
/// API key of Fetch.
pub const FETCH: i16 = 1;
/// API key of Metadata.
pub const METADATA: i16 = 3;
/// API key of SaslHandshake.
pub const SASL_HANDSHAKE: i16 = 17;
/// API key of ApiVersions.
pub const API_VERSIONS: i16 = 18;
/// API key of ConsumerGroupHeartbeat.
pub const CONSUMER_GROUP_HEARTBEAT: i16 = 68;
/// API key of DescribeTopicPartitions.
pub const DESCRIBE_TOPIC_PARTITIONS: i16 = 75;
/// API key of ControlledShutdown.
pub(super) const CONTROLLED_SHUTDOWN: i16 = 7;

/// Error code of a ConsumerGroupHeartbeat with a topic id without a name. Its response has no place for the error of a
/// topic, and clients end the membership on codes that they do not expect there. With this one they ask for the
/// coordinator and send the heartbeat again.
pub const NOT_COORDINATOR: i16 = 16;
/// Error code of a denied topic.
pub const TOPIC_AUTHORIZATION_FAILED: i16 = 29;
/// Error code of a denied request without topics.
pub const CLUSTER_AUTHORIZATION_FAILED: i16 = 31;
/// Error code of a fetch session that the inspector has not seen begin. The client then begins another one.
pub const FETCH_SESSION_ID_NOT_FOUND: i16 = 70;
/// Error code of a topic id without a name. The client then asks for the metadata again.
pub const UNKNOWN_TOPIC_ID: i16 = 100;
