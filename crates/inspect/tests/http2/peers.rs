//! The filter between a client and a server of an independent implementation (crate `h2`), with their own header
//! compression, flow control and settings.

use std::{future::poll_fn, pin::Pin};

use h2::{RecvStream, client, server};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    runtime::Builder,
    task::LocalSet,
};

use crate::link::Link;

/// Number of requests of a connection.
const REQUESTS: usize = 120;

/// Moves bytes between both peers until one of them closes, in parts of at most `part` bytes.
async fn relay(mut link: Link, client: DuplexStream, server: DuplexStream, part: usize) -> Link {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_server, mut to_server) = tokio::io::split(server);
    let (mut client_bytes, mut server_bytes) = (vec![0; part], vec![0; part]);
    loop {
        tokio::select! {
            read = from_client.read(&mut client_bytes) => match read {
                Ok(length @ 1..) => link.client(&client_bytes[..length]).unwrap(),
                _ => return link,
            },
            read = from_server.read(&mut server_bytes) => match read {
                Ok(length @ 1..) => link.server(&server_bytes[..length]).unwrap(),
                _ => return link,
            },
        }
        to_server
            .write_all(&std::mem::take(&mut link.out.to_server))
            .await
            .unwrap();
        to_client
            .write_all(&std::mem::take(&mut link.out.to_client))
            .await
            .unwrap();
    }
}

async fn content(stream: &mut RecvStream) -> Result<Vec<u8>, h2::Error> {
    let mut content = Vec::new();
    while let Some(part) = stream.data().await {
        let part = part?;
        content.extend_from_slice(&part);
        stream.flow_control().release_capacity(part.len())?;
    }
    Ok(content)
}

/// Sends `content`, as far as the peer takes it.
async fn send(stream: &mut h2::SendStream<bytes::Bytes>, mut content: bytes::Bytes) -> Result<(), h2::Error> {
    while !content.is_empty() {
        stream.reserve_capacity(content.len());
        match poll_fn(|cx| stream.poll_capacity(cx)).await {
            Some(capacity) => {
                let part = content.split_to(capacity?.min(content.len()));
                let ends = content.is_empty();
                stream.send_data(part, ends)?;
            }
            None => return Ok(()),
        }
    }
    Ok(())
}

/// Echoes each request: its content as content, its number as a field.
async fn serve(io: DuplexStream) -> usize {
    let mut connection = server::handshake(io).await.unwrap();
    let mut count = 0;
    while let Some(request) = connection.accept().await {
        let Ok((request, mut respond)) = request else {
            return count;
        };
        count += 1;
        assert!(request.uri().path().starts_with("/public/"), "{}", request.uri());
        assert_eq!(request.headers()["x-long"].len(), 300);
        tokio::task::spawn_local(async move {
            let number = request.headers()["x-number"].clone();
            let mut body = request.into_body();
            let Ok(content) = content(&mut body).await else {
                return;
            };
            let response = http::Response::builder()
                .header("x-number", number)
                .header("x-server", "s".repeat(100))
                .body(())
                .unwrap();
            let Ok(mut stream) = respond.send_response(response, content.is_empty()) else {
                return;
            };
            let _ = send(&mut stream, content.into()).await;
        });
    }
    count
}

async fn call(mut sender: client::SendRequest<bytes::Bytes>, number: usize) {
    let denied = number.is_multiple_of(3);
    let length = [0, 10, 100_000][number % 3 * usize::from(!denied) + number / 3 % 2 * usize::from(denied)];
    let path = if denied { "secret" } else { "public" };
    let request = http::Request::builder()
        .method("POST")
        .uri(format!("https://a.test/{path}/{number}"))
        .header("x-number", number.to_string())
        .header("x-long", "l".repeat(300))
        .body(())
        .unwrap();
    sender = sender.ready().await.unwrap();
    let (response, mut stream) = sender.send_request(request, length == 0).unwrap();
    let sent = vec![number as u8; length];
    let upload = bytes::Bytes::from(sent.clone());
    tokio::task::spawn_local(async move {
        let _ = send(&mut stream, upload).await;
    });
    let response = response.await.unwrap();
    let status = response.status().as_u16();
    assert_eq!(status, if denied { 403 } else { 200 }, "{number}");
    if denied {
        return;
    }
    assert_eq!(response.headers()["x-number"], number.to_string());
    let mut body = response.into_body();
    assert_eq!(content(&mut body).await.unwrap(), sent, "{number}");
}

fn exchange(part: usize) -> Link {
    let runtime = Builder::new_current_thread().build().unwrap();
    let local = LocalSet::new();
    local.block_on(&runtime, async move {
        let (client_io, client_end) = duplex(20_000);
        let (server_io, server_end) = duplex(20_000);
        let relay = tokio::task::spawn_local(relay(
            Link::fresh(&Default::default()),
            client_end,
            server_end,
            part,
        ));
        let server = tokio::task::spawn_local(serve(server_io));
        let (sender, connection) = client::handshake(client_io).await.unwrap();
        let mut connection = Box::pin(connection);
        let driver = tokio::task::spawn_local(async move { Pin::new(&mut connection).await });
        let calls: Vec<_> = (0..REQUESTS)
            .map(|number| tokio::task::spawn_local(call(sender.clone(), number)))
            .collect();
        for call in calls {
            call.await.unwrap();
        }
        drop(sender);
        driver.await.unwrap().unwrap();
        let link = relay.await.unwrap();
        assert_eq!(server.await.unwrap(), REQUESTS - REQUESTS / 3);
        link
    })
}

#[test]
fn allowed_and_denied_requests_of_real_peers_share_a_connection() {
    for part in [16_384, 1_000, 13] {
        let link = exchange(part);
        let denied = REQUESTS as u64 / 3;
        assert_eq!(
            (link.stats.requests, link.stats.denied),
            (REQUESTS as u64, denied)
        );
        assert_eq!(link.stats.responses, REQUESTS as u64 - denied);
        assert_eq!(
            (link.filter.streams(), link.stats.malformed.iter().sum::<u64>()),
            (0, 0)
        );
    }
}
