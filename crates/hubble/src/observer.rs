//! The observer service.

use std::{pin::Pin, sync::Arc, time::SystemTime};

use palisade_flowlog::Timestamp;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, async_trait};

use crate::{
    connection::ConnectionId,
    filter,
    mask::Mask,
    proto::{
        observer::{
            GetAgentEventsRequest, GetDebugEventsRequest, GetFlowsRequest, GetNamespacesRequest,
            GetNamespacesResponse, GetNodesRequest, GetNodesResponse, Namespace, Node, ServerStatusRequest,
            ServerStatusResponse, Tls,
        },
        relay::NodeState,
        services::observer_server::Observer,
    },
    range::Range,
    server::Api,
    stream::{AgentEvents, Events, Flows, NoEvents},
    wire::Encoded,
};

type EncodedStream = Pin<Box<dyn Stream<Item = Result<Encoded, Status>> + Send>>;

fn connection<T>(request: &Request<T>) -> Option<ConnectionId> {
    request.extensions().get().cloned()
}

#[async_trait]
impl Observer for Api {
    type GetFlowsStream = EncodedStream;

    async fn get_flows(&self, request: Request<GetFlowsRequest>) -> Result<Response<EncodedStream>, Status> {
        let connection = connection(&request);
        let request = request.into_inner();
        if request.extensions.is_some() {
            return Err(Status::invalid_argument(
                "extensions of GetFlowsRequest are not known to this server",
            ));
        }
        // The place comes first: regular expressions take memory and time while they are compiled, and it bounds how many
        // requests wait for the thread that compiles them.
        let place = self.readers().enter(connection)?;
        let range = Range::new(
            request.number,
            request.first,
            request.follow,
            request.since,
            request.until,
        )?;
        let (request, filters) = if filter::has_patterns(&request) {
            // Regular expressions take milliseconds to compile. Meanwhile this thread serves other connections.
            let compiled = tokio::task::spawn_blocking(move || {
                let filters = filter::filters(&request);
                (request, filters)
            });
            compiled
                .await
                .map_err(|_| Status::internal("the filters cannot be compiled"))?
        } else {
            let filters = filter::filters(&request);
            (request, filters)
        };
        let filters = filters?;
        let experimental = request.experimental.and_then(|more| more.field_mask);
        let asked = request.field_mask.filter(|mask| !mask.paths.is_empty());
        let paths = asked.or(experimental).unwrap_or_default().paths;
        let mask = Mask::new(&paths).map_err(Status::invalid_argument)?;
        let flows = Flows {
            filters,
            mask,
            node: Arc::clone(&self.node().name),
            namespaces: Arc::clone(self.namespaces()),
            shared: Arc::clone(self.shared_responses()),
        };
        let stream = Events::new(self.ring(), range, flows, place, self.wake());
        Ok(Response::new(Box::pin(stream)))
    }

    type GetAgentEventsStream = EncodedStream;

    async fn get_agent_events(
        &self,
        request: Request<GetAgentEventsRequest>,
    ) -> Result<Response<EncodedStream>, Status> {
        let connection = connection(&request);
        let GetAgentEventsRequest {
            number,
            first,
            follow,
            since,
            until,
        } = request.into_inner();
        let range = Range::new(number, first, follow, since, until)?;
        let place = self.readers().enter(connection)?;
        let stream = Events::new(self.agent_ring(), range, AgentEvents, place, self.wake());
        Ok(Response::new(Box::pin(stream)))
    }

    type GetDebugEventsStream = EncodedStream;

    async fn get_debug_events(
        &self,
        request: Request<GetDebugEventsRequest>,
    ) -> Result<Response<EncodedStream>, Status> {
        let connection = connection(&request);
        let GetDebugEventsRequest {
            number,
            first,
            follow,
            since,
            until,
        } = request.into_inner();
        let range = Range::new(number, first, follow, since, until)?;
        let place = self.readers().enter(connection)?;
        let stream = Events::new(&Arc::new(NoEvents), range, NoEvents, place, self.wake());
        Ok(Response::new(Box::pin(stream)))
    }

    async fn get_nodes(&self, _: Request<GetNodesRequest>) -> Result<Response<GetNodesResponse>, Status> {
        let (node, ring) = (self.node(), self.ring());
        Ok(Response::new(GetNodesResponse {
            nodes: vec![Node {
                name: node.name.to_string(),
                version: node.long_version(),
                address: node.address.clone(),
                state: NodeState::NodeConnected.into(),
                tls: Some(Tls {
                    enabled: node.tls_name.is_some(),
                    server_name: node.tls_name.clone().unwrap_or_default(),
                }),
                uptime_ns: self.uptime_ns(),
                num_flows: ring.len() as u64,
                max_flows: ring.capacity() as u64,
                seen_flows: ring.seen(),
            }],
        }))
    }

    async fn get_namespaces(
        &self,
        _: Request<GetNamespacesRequest>,
    ) -> Result<Response<GetNamespacesResponse>, Status> {
        self.find_namespaces().await;
        let now = Timestamp::from_system_time(SystemTime::now());
        let namespaces = self.namespaces().list(now).into_iter();
        Ok(Response::new(GetNamespacesResponse {
            namespaces: namespaces
                .map(|namespace| Namespace {
                    cluster: String::new(),
                    namespace,
                })
                .collect(),
        }))
    }

    async fn server_status(
        &self,
        _: Request<ServerStatusRequest>,
    ) -> Result<Response<ServerStatusResponse>, Status> {
        let ring = self.ring();
        let seen = ring.seen();
        Ok(Response::new(ServerStatusResponse {
            num_flows: ring.len() as u64,
            max_flows: ring.capacity() as u64,
            seen_flows: seen,
            uptime_ns: self.uptime_ns(),
            num_connected_nodes: Some(1),
            num_unavailable_nodes: Some(0),
            unavailable_nodes: Vec::new(),
            version: self.node().long_version(),
            flows_rate: self.wake().rate(seen),
        }))
    }
}
