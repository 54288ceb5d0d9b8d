//! Requests as case files and command lines describe them, and the trait by which an inspector judges one.

use std::sync::Arc;

use palisade_abi::Inspector;

use crate::snapshot::RuleSet;

/// What is known of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// An HTTP request.
    pub http: Option<HttpRequest>,
    /// The name that a DNS query asks for.
    pub dns: Option<String>,
    /// The server name of a TLS ClientHello.
    pub tls: Option<String>,
    /// A Kafka request.
    pub kafka: Option<KafkaRequest>,
}

impl Request {
    /// The [`Inspector`] that reads such a request.
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

    /// Whether nothing is known.
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
    /// HTTP/1.0; else HTTP/1.1.
    pub is_http10: bool,
}

/// A Kafka request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KafkaRequest {
    /// API key.
    pub api_key: i16,
    /// API version.
    pub api_version: Option<i16>,
    /// Client id.
    pub client_id: Option<String>,
    /// Topics that it is about; each must be allowed.
    pub topics: Vec<String>,
}

/// In which form the path of a request is judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Paths {
    /// As sent, and as a server would resolve it: a rule must allow both.
    #[default]
    Both,
    /// As sent only.
    Raw,
}

/// What becomes of a request whose method has no body for many servers (GET, HEAD, DELETE, TRACE, OPTIONS, CONNECT), and
/// which has one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum GetBodies {
    /// Refused, unless a rule that allows the request names `Content-Length` or `Transfer-Encoding`.
    #[default]
    Refuse,
    /// Judged like any other.
    Allow,
}

/// What the configuration says about the judgement of HTTP requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HttpOptions {
    /// In which form a path is judged.
    pub paths: Paths,
    /// Whether a GET may have a body.
    pub get_bodies: GetBodies,
}

/// Why a described request does not pass.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Denial {
    /// No rule allows it.
    NoRule,
    /// Whatever the rules say: it is malformed, or two receivers could read it differently.
    Refused {
        /// What is wrong with it.
        why: &'static str,
        /// What its sender sees.
        becomes: String,
    },
}

/// Judges described requests by the application rules of an entry, as the inspector of the traffic does.
pub trait Judge {
    /// Returns the rule of `set` that allows the request, or why it is denied; `None` if no inspector reads such
    /// traffic. The request is of the protocol that `set` reads.
    fn judge(
        &self,
        set: &Arc<RuleSet>,
        request: &Request,
        options: HttpOptions,
    ) -> Option<Result<u32, Denial>>;
}
