//! Flows per second through the flow API, and a client of its `GetFlows` for the soak. The client is not that of the
//! server's library: it counts messages without decoding them, so that the rate is that of the server.

use std::{
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::{Buf as _, Bytes, BytesMut};
use h2::RecvStream;
use palisade_hubble::proto::observer::GetFlowsRequest;
use palisade_testbed::{daemon::Daemon, topology::INNER};
use prost::Message as _;
use tokio::{net::UnixStream, runtime, task::JoinHandle};

use super::{Forwarding, NEW_FLOWS, status_number};
use crate::{
    Effort, progress,
    report::{Goal, Measure, Samples, Table, number},
    traffic::Sender,
};

/// Flows in the ring, which each reader gets.
const FLOWS: u32 = 131_072;
/// Numbers of readers.
const READERS: [u32; 2] = [1, 10];
/// Threads of the clients.
const CLIENT_THREADS: usize = 2;
/// HTTP/2 windows of a client that reads as fast as possible: of a stream and of the connection, bytes.
pub(super) const WIDE_WINDOWS: (u32, u32) = (4 << 20, 16 << 20);
/// Bytes before a gRPC message: a flag for compression and the length.
const HEAD: usize = 5;
/// Longest message that a client accepts, bytes.
const MAX_MESSAGE: usize = 4 << 20;

/// Returns the path of the API's socket.
pub(super) fn socket(daemon: &Daemon) -> PathBuf {
    daemon.socket().with_file_name("hubble.sock")
}

/// The responses to one `GetFlows`.
pub(super) struct Responses {
    body: RecvStream,
    buffer: BytesMut,
    connection: JoinHandle<Result<(), h2::Error>>,
}

impl Drop for Responses {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Responses {
    /// Connects and sends the request. `windows`: as [`WIDE_WINDOWS`].
    pub(super) async fn open(path: &Path, request: &GetFlowsRequest, windows: (u32, u32)) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .await
            .with_context(|| path.display().to_string())?;
        let (mut client, connection) = h2::client::Builder::new()
            .initial_window_size(windows.0)
            .initial_connection_window_size(windows.1)
            .handshake::<_, Bytes>(stream)
            .await?;
        let connection = tokio::spawn(connection);
        let head = http::Request::post("http://localhost/observer.Observer/GetFlows")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let message = request.encode_to_vec();
        let length = u32::try_from(message.len())?.to_be_bytes();
        let (response, mut body) = client.send_request(head, false)?;
        body.send_data(Bytes::from([&[0][..], &length, &message].concat()), true)?;
        Ok(Self {
            body: response.await?.into_body(),
            buffer: BytesMut::new(),
            connection,
        })
    }

    /// Returns the next message; `None` after the last one. What is not read here occupies the window.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            if let Some(head) = self.buffer.first_chunk::<HEAD>() {
                let [_, length @ ..] = *head;
                let length = u32::from_be_bytes(length) as usize;
                ensure!(length <= MAX_MESSAGE, "a message of {length} bytes");
                if self.buffer.len() >= HEAD + length {
                    self.buffer.advance(HEAD);
                    return Ok(Some(self.buffer.split_to(length).freeze()));
                }
            }
            let Some(data) = self.body.data().await else {
                ensure!(self.buffer.is_empty(), "the stream ends within a message");
                return Ok(None);
            };
            let data = data?;
            self.body.flow_control().release_capacity(data.len())?;
            self.buffer.extend_from_slice(&data);
        }
    }

    /// Returns the status code with which the stream has ended (`grpc-status`).
    pub(super) async fn status(&mut self) -> Result<String> {
        let trailers = self.body.trailers().await?.context("no trailers")?;
        let status = trailers.get("grpc-status").context("no grpc-status")?;
        Ok(status.to_str()?.to_owned())
    }
}

/// Reads all flows of the ring. Returns the number of messages and of their bytes.
async fn read_all(path: PathBuf) -> Result<(u64, u64)> {
    let mut responses = Responses::open(&path, &GetFlowsRequest::default(), WIDE_WINDOWS).await?;
    let (mut messages, mut bytes) = (0, 0);
    while let Some(message) = responses.next().await? {
        messages += 1;
        bytes += message.len() as u64;
    }
    let status = responses.status().await?;
    ensure!(status == "0", "GetFlows has ended with status {status}");
    Ok((messages, bytes))
}

/// Sends packets until the ring is full.
fn fill(node: &Forwarding) -> Result<()> {
    let events = || status_number(&node.daemon.status()?, "/events/read");
    let before = events()?;
    node.topology.internet.enter(|| {
        let sender = Sender::open(INNER)?;
        for frames in node.frames.chunks(1_000).cycle() {
            if events()? >= before + f64::from(FLOWS) {
                break;
            }
            sender.send(frames)?;
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    })
}

/// Measures flows per second through the API to one reader and to ten.
pub fn measure(effort: Effort) -> Result<Measure> {
    let rounds = effort.pick(3, 9);
    progress(format_args!("hubble: {rounds} rounds of {FLOWS} flows"));
    let limits = format!("[limits]\nevents_per_second = 1000000\nflows = {FLOWS}\nconntrack = 4096\n");
    let node = Forwarding::configured(NEW_FLOWS, limits)?;
    fill(&node)?;
    let path = socket(&node.daemon);
    let clients = runtime::Builder::new_multi_thread()
        .worker_threads(CLIENT_THREADS)
        .enable_all()
        .build()?;
    let mut rates = [const { Samples::new() }; READERS.len()];
    let mut size = 0.0;
    for round in 0..=rounds {
        for (readers, rates) in READERS.into_iter().zip(&mut rates) {
            let begin = Instant::now();
            let (messages, bytes) = clients.block_on(async {
                let tasks: Vec<_> = (0..readers)
                    .map(|_| tokio::spawn(read_all(path.clone())))
                    .collect();
                let mut sum = (0, 0);
                for task in tasks {
                    let (messages, bytes) = task.await??;
                    sum = (sum.0 + messages, sum.1 + bytes);
                }
                Ok::<_, anyhow::Error>(sum)
            })?;
            let took = begin.elapsed().as_secs_f64();
            // A report of lost flows takes the place of a flow in the ring, or of several.
            ensure!(
                messages * 100 >= u64::from(readers) * u64::from(FLOWS) * 99,
                "{readers} readers of {FLOWS} flows got {messages} messages"
            );
            size = bytes as f64 / messages as f64;
            if round > 0 {
                rates.push(messages as f64 / took);
            }
        }
    }
    let mut table = Table::new(
        "GetFlows",
        &["readers", "flows/s of each", "flows/s of all", "spread"],
    );
    for (readers, rates) in READERS.into_iter().zip(&rates) {
        let all = rates.median();
        table.row(
            readers.to_string(),
            &[all / f64::from(readers), all, rates.spread()],
        );
    }
    let [one, ten] = rates.each_ref().map(Samples::median);
    Ok(Measure {
        name: "hubble",
        title: "Flows through the flow API",
        method: format!(
            "The ring of the daemon has {FLOWS} flow records of allowed UDP packets; a message has {} bytes on average. Readers: `GetFlows` without filters over the unix socket, each on a connection of its own, {CLIENT_THREADS} threads for all; they count messages and do not decode them. Daemon and readers run on the same CPUs. {rounds} rounds.",
            number(size)
        ),
        goals: vec![
            Goal::at_least("flows/s through the API to one reader", 1e5, one, ""),
            Goal::reported(
                "flows/s through the API to each of ten readers, and to all of them",
                format!("{} and {}", number(ten / 10.0), number(ten)),
            ),
        ],
        tables: vec![table],
        plot: None,
        notes: Vec::new(),
    })
}
