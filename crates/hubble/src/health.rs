//! The health service.

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status, async_trait};

use crate::{
    proto::{
        grpc::health::v1::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus},
        services::health_server::Health,
    },
    server::{Api, Held},
};

/// Services that a client can ask about; the empty name is the whole server.
const SERVICES: [&str; 4] = ["", "hubble.server.Observer", "observer.Observer", "peer.Peer"];

#[async_trait]
impl Health for Api {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        if !SERVICES.contains(&&*service) {
            return Err(Status::not_found(format!(
                "service '{}' is not known",
                crate::echo(&service)
            )));
        }
        Ok(Response::new(HealthCheckResponse {
            status: ServingStatus::Serving.into(),
        }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let held = self.watcher(request.extensions().get().cloned())?;
        let known = SERVICES.contains(&&*request.into_inner().service);
        let status = if known {
            ServingStatus::Serving
        } else {
            ServingStatus::ServiceUnknown
        };
        let first = HealthCheckResponse {
            status: status.into(),
        };
        Ok(Response::new(Box::pin(Held::new(first, held))))
    }
}
