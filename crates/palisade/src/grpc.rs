//! An HTTP/2 connection of `hyper` to a gRPC server, as `tonic` uses one.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use hyper::{Request, Response, body::Incoming, client::conn::http2::SendRequest};
use tonic::{body::Body, codegen::Service};

/// Sends the requests of a `tonic` client on one connection.
#[derive(Clone, Debug)]
pub(crate) struct Connection(pub(crate) SendRequest<Body>);

impl Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = hyper::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}
