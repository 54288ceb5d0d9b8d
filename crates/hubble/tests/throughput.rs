//! Measure: flows per second through the API over a unix socket, to one reader and to ten.
//!
//! `cargo test --release -p palisade-hubble --test throughput -- --ignored --nocapture`
#![allow(clippy::unwrap_used, reason = "a failed expectation fails the measure")]

use std::{io, sync::Arc, time::Instant};

use palisade_flowlog::{
    Flow, Policy, Ring, Timestamp,
    flow::{
        Endpoint, Ethernet, EventType, FlowType, Ip, IpVersion, Layer4, Mac, NetworkInterface, TcpFlags,
        TracePoint, TrafficDirection, Verdict,
    },
};
use palisade_hubble::{Api, Connection, ConnectionId, Limits, Node, proto::observer::GetFlowsRequest, serve};
use prost::Message as _;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::ReceiverStream;

const FLOWS: u32 = 131_072;

fn endpoint(id: u32, name: &str) -> Endpoint {
    Endpoint {
        id,
        identity: 300 + id,
        namespace: "shop".into(),
        labels: [
            format!("k8s:app={name}"),
            "k8s:io.kubernetes.pod.namespace=shop".to_owned(),
            "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=shop".to_owned(),
        ]
        .into_iter()
        .map(Into::into)
        .collect(),
        pod_name: name.into(),
        ..Endpoint::default()
    }
}

fn flow(number: u32) -> Flow {
    let policy = Policy {
        name: "frontend".into(),
        namespace: "shop".into(),
        kind: "CiliumNetworkPolicy".into(),
        revision: 3,
        ..Policy::default()
    };
    Flow {
        time: Timestamp(i64::from(number) * 1_000),
        verdict: Verdict::Forwarded,
        flow_type: FlowType::L3L4,
        node_name: "node1".into(),
        ethernet: Some(Ethernet {
            source: Mac([2, 0, 0, 0, 0, 1]),
            destination: Mac([2, 0, 0, 0, 0, 2]),
        }),
        ip: Some(Ip {
            source: "10.0.1.10".parse().unwrap(),
            destination: "10.0.2.10".parse().unwrap(),
            version: IpVersion::V4,
        }),
        l4: Some(Layer4::Tcp {
            source_port: u16::try_from(number & 0xffff).unwrap(),
            destination_port: 8080,
            flags: TcpFlags(2),
        }),
        source: endpoint(3, "frontend"),
        destination: endpoint(4, "backend"),
        event_type: EventType { kind: 4, sub_type: 3 },
        traffic_direction: TrafficDirection::Egress,
        trace_observation_point: TracePoint::ToStack,
        is_reply: Some(false),
        interface: Some(NetworkInterface {
            index: 7,
            name: "veth-front".into(),
        }),
        egress_allowed_by: [policy].into(),
        summary: "TCP Flags: SYN".into(),
        ..Flow::default()
    }
}

/// Reads all flows. Returns the number of messages and of bytes.
async fn read(path: &std::path::Path) -> (u32, u64) {
    let stream = UnixStream::connect(path).await.unwrap();
    let (mut client, connection) = h2::client::Builder::new()
        .initial_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .handshake::<_, bytes::Bytes>(stream)
        .await
        .unwrap();
    let driver = tokio::spawn(connection);
    let request = http::Request::post("http://localhost/observer.Observer/GetFlows")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let message = GetFlowsRequest::default().encode_to_vec();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let (response, mut body) = client.send_request(request, false).unwrap();
    body.send_data(bytes::Bytes::from([&[0][..], &length, &message].concat()), true)
        .unwrap();
    let mut body = response.await.unwrap().into_body();
    let (mut messages, mut bytes) = (0, 0);
    // Bytes of the current message, or of its head, that have not arrived yet.
    let (mut left, mut head) = (0, Vec::new());
    while let Some(data) = body.data().await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        bytes += data.len() as u64;
        let mut rest = &data[..];
        while !rest.is_empty() {
            let skip = left.min(rest.len());
            left -= skip;
            rest = &rest[skip..];
            while head.len() < 5 && left == 0 {
                let Some((first, after)) = rest.split_first() else {
                    break;
                };
                head.push(*first);
                rest = after;
            }
            if head.len() == 5 {
                left = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
                head.clear();
                messages += 1;
            }
        }
    }
    driver.abort();
    (messages, bytes)
}

#[test]
#[ignore = "a measure; run it in release mode"]
fn flows_per_second() {
    let ring = Ring::new(FLOWS as usize);
    for number in 0..FLOWS {
        ring.push(flow(number));
    }
    let api = Api::new(ring, Node::default(), Limits { readers: 16 }).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hubble.sock");
    // As in the daemon: two threads serve. The clients have threads of their own.
    let runtime = |threads| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .enable_all()
            .build()
            .unwrap()
    };
    let (server, clients) = (runtime(2), runtime(2));
    let place = path.clone();
    let (ready, bound) = std::sync::mpsc::channel();
    server.spawn(async move {
        let listener = UnixListener::bind(place).unwrap();
        ready.send(()).unwrap();
        let (sender, receiver) = tokio::sync::mpsc::channel(4);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let connection = Connection::new(stream, ConnectionId::default(), None);
                let _ = sender.send(io::Result::Ok(connection)).await;
            }
        });
        serve(api, ReceiverStream::new(receiver), std::future::pending())
            .await
            .unwrap();
    });
    bound.recv().unwrap();
    for readers in [1, 10] {
        let begun = Instant::now();
        let path: Arc<std::path::Path> = path.as_path().into();
        let results = clients.block_on(async {
            let tasks: Vec<_> = (0..readers)
                .map(|_| Arc::clone(&path))
                .map(|path| tokio::spawn(async move { read(&path).await }))
                .collect();
            let mut results = Vec::new();
            for task in tasks {
                results.push(task.await.unwrap());
            }
            results
        });
        let seconds = begun.elapsed().as_secs_f64();
        let flows: u64 = results.iter().map(|(messages, _)| u64::from(*messages)).sum();
        let bytes: u64 = results.iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(flows, u64::from(FLOWS) * readers);
        println!(
            "{readers} readers: {:.0} flows/s each, {:.0} flows/s together, {} bytes per flow",
            flows as f64 / seconds / readers as f64,
            flows as f64 / seconds,
            bytes / flows,
        );
    }
}
