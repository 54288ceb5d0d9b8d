//! The peer service. A node without a cluster has no peer but itself.

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status, async_trait};

use crate::{
    proto::{
        peer::{ChangeNotification, ChangeNotificationType, NotifyRequest, Tls},
        services::peer_server::Peer,
    },
    server::{Api, Held},
};

#[async_trait]
impl Peer for Api {
    type NotifyStream = Pin<Box<dyn Stream<Item = Result<ChangeNotification, Status>> + Send>>;

    async fn notify(&self, request: Request<NotifyRequest>) -> Result<Response<Self::NotifyStream>, Status> {
        let held = self.watcher(request.extensions().get().cloned())?;
        let node = self.node();
        let itself = ChangeNotification {
            name: node.name.to_string(),
            address: node.address.clone(),
            r#type: ChangeNotificationType::PeerAdded.into(),
            tls: node.tls_name.clone().map(|server_name| Tls { server_name }),
        };
        Ok(Response::new(Box::pin(Held::new(itself, held))))
    }
}
