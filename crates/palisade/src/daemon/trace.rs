//! `palisade policy trace`: the verdict on a packet that the operator describes.

use palisade_inspect::Inspectors;
use palisade_model::request::{self, HttpOptions};
use palisade_policy::{
    compile::Compiler,
    trace::{self, Outcome, Question},
};

use super::workers::INSPECTORS;
use crate::{
    config::{self, Config},
    control::api::{TraceAnswer, TraceRequest},
};

/// Explains the verdict that the policies of a compiler give a packet.
///
/// # Errors
/// The request names an endpoint, a peer or a name that does not exist, or is contradictory.
pub(super) fn trace(
    compiler: &Compiler,
    config: &Config,
    request: &TraceRequest,
) -> Result<TraceAnswer, String> {
    let trace = trace::trace(
        compiler,
        &question(&config.http, request),
        &inspectors(&config.http),
    )?;
    Ok(TraceAnswer {
        passes: trace.verdict != Outcome::Denied,
        text: trace.to_string(),
        trace: serde_json::to_value(&trace).map_err(|error| error.to_string())?,
    })
}

/// Returns the settings for HTTP requests.
pub(super) const fn http_options(http: &config::Http) -> HttpOptions {
    HttpOptions {
        paths: http.paths,
        get_bodies: http.get_bodies,
    }
}

/// Returns the inspectors that decide about requests.
pub(super) const fn inspectors(http: &config::Http) -> Inspectors {
    Inspectors { head: http.head }
}

/// Returns the question about a packet that the operator describes.
pub(super) fn question(http: &config::Http, request: &TraceRequest) -> Question {
    Question {
        source: request.from.clone(),
        destination: request.to.clone(),
        to_fqdn: request.to_fqdn.clone(),
        more_names: Vec::new(),
        request: application_request(request),
        http: http_options(http),
        readers: Some(INSPECTORS),
        protocol: request.protocol,
        port: request.port,
    }
}

/// Converts the application request of the packet to the type that the compiler uses.
fn application_request(request: &TraceRequest) -> request::Request {
    request::Request {
        http: request.http.as_ref().map(|http| request::HttpRequest {
            method: http.method.clone(),
            path: http.path.clone(),
            host: http.host.clone(),
            headers: http.headers.clone(),
            is_http10: http.is_http10,
        }),
        dns: request.dns.clone(),
        tls: request.tls.clone(),
        kafka: request.kafka.as_ref().map(|kafka| request::KafkaRequest {
            api_key: kafka.api_key,
            api_version: kafka.api_version,
            client_id: kafka.client_id.clone(),
            topics: kafka.topics.clone(),
        }),
    }
}
