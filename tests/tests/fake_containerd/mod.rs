//! containerd's API over a Unix socket, as far as Palisade uses it: HTTP/2 and gRPC frames without a library, so that the
//! engine can also send malformed answers.

use std::{
    fs,
    future::pending,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use h2::{RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::{net::UnixListener, runtime::Runtime};

/// A container with a task.
#[derive(Clone)]
pub struct Container {
    pub namespace: &'static str,
    pub id: String,
    pub labels: Vec<(&'static str, String)>,
    /// First process of the task; `None` if the container does not run.
    pub pid: Option<u32>,
    /// `linux.namespaces[]` of type `network` in the runtime specification.
    pub network: String,
    pub is_pod: bool,
}

/// How the engine answers.
#[derive(Clone, Copy, PartialEq)]
pub enum Mode {
    Right,
    /// Nothing.
    Hanging,
    /// Messages that are none.
    Garbage,
    /// A message of 1 GiB.
    Endless,
    /// An error of gRPC.
    Refusing,
}

struct State {
    mode: Mode,
    containers: Vec<Container>,
    /// Number of changes.
    version: u32,
}

/// The engine. Dropping it ends all connections.
pub struct Containerd {
    socket: PathBuf,
    state: Arc<Mutex<State>>,
    runtime: Option<Runtime>,
}

impl Containerd {
    pub fn start(socket: &Path, mode: Mode, containers: &[Container]) -> Self {
        let _ = fs::remove_file(socket);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("runtime");
        let state = Arc::new(Mutex::new(State {
            mode,
            containers: containers.to_vec(),
            version: 0,
        }));
        let listener = runtime
            .block_on(async { UnixListener::bind(socket) })
            .expect("socket");
        runtime.spawn(accept(listener, Arc::clone(&state)));
        Self {
            socket: socket.to_owned(),
            state,
            runtime: Some(runtime),
        }
    }

    /// Replaces the containers, and sends an event.
    pub fn set(&self, containers: &[Container]) {
        let mut state = lock(&self.state);
        state.containers = containers.to_vec();
        state.version += 1;
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("the state")
}

async fn accept(listener: UnixListener, state: Arc<Mutex<State>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let Ok(mut connection) = h2::server::handshake(stream).await else {
                return;
            };
            while let Some(Ok((request, respond))) = connection.accept().await {
                tokio::spawn(answer(request, respond, Arc::clone(&state)));
            }
        });
    }
}

async fn answer(
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
    state: Arc<Mutex<State>>,
) -> Option<()> {
    let mode = lock(&state).mode;
    let namespace = request.headers().get("containerd-namespace").cloned();
    let namespace = namespace
        .as_ref()
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let of_namespace = || -> Vec<Container> {
        let all = lock(&state).containers.clone();
        all.into_iter()
            .filter(|container| container.namespace == namespace)
            .collect()
    };
    let message = match (mode, request.uri().path()) {
        (Mode::Hanging, _) => return pending().await,
        (Mode::Right, "/containerd.services.events.v1.Events/Subscribe") => {
            return events(respond, &state).await;
        }
        (Mode::Right, "/containerd.services.containers.v1.Containers/List") => {
            of_namespace().iter().flat_map(described).collect()
        }
        (Mode::Right, "/containerd.services.tasks.v1.Tasks/List") => {
            of_namespace().iter().flat_map(task).collect()
        }
        _ => vec![0xff; 64],
    };
    let mut stream = begin(respond)?;
    match mode {
        Mode::Refusing => {}
        Mode::Endless => {
            let mut frame = vec![0];
            frame.extend((1_u32 << 30).to_be_bytes());
            frame.extend([0; 4_096]);
            stream.send_data(frame.into(), false).ok()?;
            return pending().await;
        }
        _ => send(&mut stream, &message)?,
    }
    let mut trailers = HeaderMap::new();
    let status = if mode == Mode::Refusing { "14" } else { "0" };
    trailers.insert("grpc-status", HeaderValue::from_static(status));
    stream.send_trailers(trailers).ok()
}

/// Sends an event after each change. The header comes with the first event, as from a server in Go.
async fn events(respond: SendResponse<Bytes>, state: &Mutex<State>) -> Option<()> {
    let mut known = lock(state).version;
    let mut respond = Some(respond);
    let mut stream = None;
    loop {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let now = lock(state).version;
        if now == known {
            continue;
        }
        known = now;
        if let Some(respond) = respond.take() {
            stream = Some(begin(respond)?);
        }
        for namespace in ["default", "k8s.io", "moby"] {
            let event = [field(2, namespace.as_bytes()), field(3, b"/tasks/start")].concat();
            send(stream.as_mut()?, &event)?;
        }
    }
}

fn begin(mut respond: SendResponse<Bytes>) -> Option<SendStream<Bytes>> {
    let head = Response::builder()
        .header("content-type", "application/grpc")
        .body(())
        .ok()?;
    respond.send_response(head, false).ok()
}

fn send(stream: &mut SendStream<Bytes>, message: &[u8]) -> Option<()> {
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).ok()?.to_be_bytes());
    frame.extend(message);
    stream.send_data(frame.into(), false).ok()
}

fn described(container: &Container) -> Vec<u8> {
    let spec = format!(
        r#"{{"ociVersion":"1.0.2","linux":{{"namespaces":[{{"type":"pid"}}{}]}}}}"#,
        container.network
    );
    let any = |value: &[u8]| [field(1, b"types.containerd.io/x"), field(2, value)].concat();
    let mut message = [
        field(1, container.id.as_bytes()),
        field(3, b"docker.io/library/web:1"),
        field(5, &any(spec.as_bytes())),
    ]
    .concat();
    for (key, value) in &container.labels {
        message.extend(field(
            2,
            &[field(1, key.as_bytes()), field(2, value.as_bytes())].concat(),
        ));
    }
    if container.is_pod {
        let key = field(1, b"io.cri-containerd.sandbox.metadata");
        message.extend(field(10, &[key, field(2, &any(b"{}"))].concat()));
    }
    field(1, &message)
}

fn task(container: &Container) -> Vec<u8> {
    const STATUS_RUNNING: u64 = 2;
    let Some(pid) = container.pid else {
        return Vec::new();
    };
    let process = [
        field(2, container.id.as_bytes()),
        vec![3 << 3],
        varint(pid.into()),
        vec![4 << 3],
        varint(STATUS_RUNNING),
    ];
    field(1, &process.concat())
}

/// A field of a protobuf message with a length.
fn field(number: u8, value: &[u8]) -> Vec<u8> {
    [vec![number << 3 | 2], varint(value.len() as u64), value.to_vec()].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value > 0x7f {
        bytes.push(value as u8 & 0x7f | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}
