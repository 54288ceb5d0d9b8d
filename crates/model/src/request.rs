//! Requests that case files and command lines describe, and the trait with which an inspector evaluates them.

use std::sync::Arc;

use palisade_abi::Inspector;

use crate::snapshot::RuleSet;

/// A request of an application protocol. At most one field is set, except that `tls` beside another field is the server
/// name of the intercepted TLS connection that has the request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// HTTP request.
    pub http: Option<HttpRequest>,
    /// Name that a DNS query asks for.
    pub dns: Option<String>,
    /// Server name of a TLS ClientHello.
    pub tls: Option<String>,
    /// Kafka request.
    pub kafka: Option<KafkaRequest>,
}

impl Request {
    /// Returns the [`Inspector`] of the request's protocol.
    #[must_use]
    pub const fn inspector(&self) -> u8 {
        let inspector = match self {
            Self { http: Some(_), .. } => Inspector::Http,
            Self { tls: Some(_), .. } => Inspector::Tls,
            Self { dns: Some(_), .. } => Inspector::Dns,
            Self { kafka: Some(_), .. } => Inspector::Kafka,
            _ => Inspector::None,
        };
        inspector as u8
    }

    /// Returns whether no request is described.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// An HTTP request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HttpRequest {
    /// Method.
    pub method: String,
    /// Path with query.
    pub path: String,
    /// Host or authority.
    pub host: String,
    /// Header fields.
    pub headers: Vec<(String, String)>,
    /// Whether the request is HTTP/1.0 instead of HTTP/1.1.
    pub is_http10: bool,
}

/// A Kafka request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KafkaRequest {
    /// API key.
    pub api_key: i16,
    /// API version.
    pub api_version: i16,
    /// Client id.
    pub client_id: Option<String>,
    /// Topics of the request; each must be allowed.
    pub topics: Vec<String>,
}

/// Forms of a path that rules are matched against.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Paths {
    /// The path as sent and the path as a server would resolve it: rules must allow both.
    #[default]
    Both,
    /// Only the path as sent.
    Raw,
}

/// Handling of requests that have a body although their method usually has none (GET, HEAD, DELETE, TRACE, OPTIONS,
/// CONNECT). Many servers ignore such a body, and would then read its bytes as the next request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum GetBodies {
    /// Denied, unless the rule that allows the request names `Content-Length` or `Transfer-Encoding`.
    #[default]
    Refuse,
    /// Decided like requests of other methods.
    Allow,
}

/// Options of the configuration for HTTP requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HttpOptions {
    /// Forms of a path that rules are matched against.
    pub paths: Paths,
    /// Handling of requests that have a body although their method usually has none.
    pub get_bodies: GetBodies,
}

/// Cause of the denial of a described request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Denial {
    /// No rule allows the request.
    NoRule,
    /// The request is malformed or ambiguous, so the inspector refuses the request independently of the rules.
    Refused {
        /// Reason of the refusal.
        why: &'static str,
        /// Effect that the client sees, in words.
        effect: String,
    },
}

/// Evaluates described requests with the application rules of a policy table entry, as the inspector of real traffic
/// does.
pub trait RequestEvaluator {
    /// Returns the id of the rule of `set` that allows the request, or the cause of the denial; `None` if no inspector
    /// reads the protocol. The request must have the protocol that `set` reads.
    fn evaluate(
        &self,
        set: &Arc<RuleSet>,
        request: &Request,
        options: HttpOptions,
    ) -> Option<Result<u32, Denial>>;
}
