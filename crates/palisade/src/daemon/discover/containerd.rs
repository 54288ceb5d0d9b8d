//! A client of containerd's API. After each event of a container or task, and regularly, it lists the containers and tasks
//! of its namespaces: the lists have all that is needed, so no container is requested alone.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    time::{Duration, Instant},
};

use hyper::{Uri, client::conn::http2::handshake, http::uri::PathAndQuery};
use hyper_util::rt::{TokioExecutor, TokioIo};
use palisade_discover::{
    Workload,
    containerd::{self, Task},
};
use palisade_hubble::wire::{Codec, Encoded};
use tokio::{
    net::UnixStream,
    sync::mpsc::{Receiver, Sender, channel},
    task::JoinSet,
    time::timeout,
};
use tonic::client::Grpc;

use super::{
    engine::{DEADLINE, Engine, LIST_INTERVAL},
    place::{Described, Namespace},
};
use crate::grpc::Connection;

/// Longest list of containers or tasks, bytes: containerd sends no longer message.
const MAX_LIST: usize = 16 << 20;
/// Time between the first and the second list. The subscription to events is not confirmed before the first event, so a
/// change between the first list and the subscription is found by the second one.
const SECOND_LIST: Duration = Duration::from_secs(1);
/// Time for which further events are awaited after the first one, before the containers are listed.
const COLLECT: Duration = Duration::from_millis(5);
/// After a list, the next one begins after this many times the duration of the list at the earliest, so that events
/// without end use at most a quarter of a CPU.
const REST_FACTOR: u32 = 3;
/// Keys of labels with the name of a workload, if labels count: of the kubelet, and of nerdctl.
const NAMES: [&str; 2] = ["io.kubernetes.pod.name", "nerdctl/name"];
/// The header field with the namespace of a request.
const NAMESPACE: &str = "containerd-namespace";

/// Keeps the table up to date until the engine fails; `Ok` when the engine is no longer configured.
pub(super) async fn follow(engine: &Engine, image_labels: bool, namespaces: &[String]) -> Result<(), String> {
    let mut client = Client {
        grpc: connect(&engine.socket).await?,
        image_labels,
    };
    let (sender, mut events) = channel(1);
    // Dropping the set ends the task.
    let mut tasks = JoinSet::new();
    tasks.spawn(watch(client.grpc.clone(), namespaces.to_vec(), sender));
    let mut longest = SECOND_LIST;
    while !engine.is_ended() {
        let begun = Instant::now();
        let (containers, count) = client.list(engine, namespaces).await?;
        engine.listed(containers, count);
        tokio::time::sleep(begun.elapsed() * REST_FACTOR).await;
        next_event(&mut events, longest).await?;
        longest = LIST_INTERVAL;
    }
    Ok(())
}

/// Waits for an event, at most `longest`.
async fn next_event(events: &mut Receiver<Result<(), String>>, longest: Duration) -> Result<(), String> {
    match timeout(longest, events.recv()).await {
        Err(_) => Ok(()),
        Ok(None) => Err("the stream of events has ended".to_owned()),
        Ok(Some(event)) => {
            event?;
            tokio::time::sleep(COLLECT).await;
            Ok(())
        }
    }
}

/// Reports events of the namespaces, and why there are no more.
async fn watch(mut grpc: Grpc<Connection>, namespaces: Vec<String>, sender: Sender<Result<(), String>>) {
    let problem = match subscribe(&mut grpc, &namespaces, &sender).await {
        Ok(()) => "the engine has ended the stream of events".to_owned(),
        Err(problem) => format!("events: {problem}"),
    };
    // An error means that the receiver is dropped: [`follow`] has ended.
    let _ = sender.send(Err(problem)).await;
}

async fn subscribe(
    grpc: &mut Grpc<Connection>,
    namespaces: &[String],
    sender: &Sender<Result<(), String>>,
) -> Result<(), String> {
    grpc.ready().await.map_err(|error| error.to_string())?;
    let request = tonic::Request::new(Encoded(containerd::subscribe_request().into()));
    let path = PathAndQuery::from_static(containerd::SUBSCRIBE);
    let codec: Codec<Encoded, Encoded> = Codec::default();
    let response = grpc.server_streaming(request, path, codec).await;
    let mut stream = response.map_err(|status| status.to_string())?.into_inner();
    while let Some(event) = stream.message().await.map_err(|status| status.to_string())? {
        let namespace = containerd::namespace_of_event(&event.0)?;
        if namespaces.contains(&namespace) {
            // If the channel is full, an earlier event already leads to a new list.
            let _ = sender.try_send(Ok(()));
        }
    }
    Ok(())
}

async fn connect(socket: &Path) -> Result<Grpc<Connection>, String> {
    let stream = timeout(DEADLINE, UnixStream::connect(socket))
        .await
        .map_err(|_| "connecting takes too long".to_owned())?
        .map_err(|error| format!("connecting: {error}"))?;
    let (sender, connection) = timeout(DEADLINE, handshake(TokioExecutor::new(), TokioIo::new(stream)))
        .await
        .map_err(|_| "connecting takes too long".to_owned())?
        .map_err(|error| error.to_string())?;
    // The requests of the connection report its errors.
    tokio::spawn(async move { drop(connection.await) });
    let grpc = Grpc::with_origin(Connection(sender), Uri::from_static("http://localhost"));
    Ok(grpc.max_decoding_message_size(MAX_LIST))
}

struct Client {
    grpc: Grpc<Connection>,
    /// Whether labels that the image sets count.
    image_labels: bool,
}

impl Client {
    /// Returns the containers that run, or may still run, and have a network namespace of their own, at most [`Engine::limit`], by
    /// namespace and id, and their number without the limit.
    async fn list(
        &mut self,
        engine: &Engine,
        namespaces: &[String],
    ) -> Result<(BTreeMap<String, Described>, usize), String> {
        let known = engine.table().containers;
        let (mut old, mut new) = (BTreeMap::new(), BTreeMap::new());
        for namespace in namespaces {
            // Tasks come first: a container with a task is in the later list.
            let tasks = self.get(containerd::LIST_TASKS, namespace).await?;
            let tasks = containerd::tasks(&tasks)?;
            let containers = self.get(containerd::LIST_CONTAINERS, namespace).await?;
            for (id, container) in containerd::containers(&containers)? {
                let key = format!("{namespace}/{id}");
                let describe = |pid| self.described(&id, pid, container);
                let Some(described) = current(
                    tasks.get(&id).copied(),
                    known.get(&key),
                    describe,
                    Namespace::exists,
                ) else {
                    continue;
                };
                // Whoever starts containers chooses their ids, so known ones come first and keep their places.
                let list = if known.contains_key(&key) {
                    &mut old
                } else {
                    &mut new
                };
                list.insert(key, described);
            }
        }
        let count = old.len() + new.len();
        Ok((old.into_iter().chain(new).take(engine.limit).collect(), count))
    }

    fn described(&self, id: &str, pid: u32, container: containerd::Container) -> Option<Described> {
        if !container.has_network {
            return None;
        }
        // containerd does not say which labels come from the image. Those of a pod come from the kubelet.
        let labels = if self.image_labels || container.is_pod {
            container.labels
        } else {
            BTreeMap::new()
        };
        let name = NAMES.iter().find_map(|key| labels.get(*key));
        Some(Described {
            workload: Workload {
                name: name.map_or(id, String::as_str).to_owned(),
                container: Some(id.to_owned()),
                image: Some(container.image),
                labels,
                // containerd does not know them: those inside the network namespace count.
                addresses: None,
                problem: container.problem,
                ..Workload::default()
            },
            namespace: match container.netns {
                Some(path) => Namespace::File(path),
                None => Namespace::Process(pid, id.to_owned()),
            },
        })
    }

    /// Requests a list of a namespace.
    async fn get(&mut self, path: &'static str, namespace: &str) -> Result<Vec<u8>, String> {
        let mut request = tonic::Request::new(Encoded(Vec::new().into()));
        let value = namespace
            .parse()
            .map_err(|_| format!("'{namespace}' is no namespace"))?;
        request.metadata_mut().insert(NAMESPACE, value);
        let codec: Codec<Encoded, Encoded> = Codec::default();
        let answer = async {
            self.grpc.ready().await.map_err(|error| error.to_string())?;
            let answer = self
                .grpc
                .unary(request, PathAndQuery::from_static(path), codec)
                .await;
            answer.map_err(|status| status.to_string())
        };
        let answer = timeout(DEADLINE, answer)
            .await
            .map_err(|_| format!("{path}: no whole answer within {} s", DEADLINE.as_secs()))?;
        answer
            .map(|answer| answer.into_inner().0.to_vec())
            .map_err(|problem| format!("{path}: {problem}"))
    }
}

/// Returns the description of a listed container; `None` if it does not run. containerd lists a task with an unknown
/// status, or not at all, while its shim does not answer: a container that was known (`known`) then runs as long as its
/// network namespace `exists`. So does one with an unknown status that was not known, since the daemon can have started
/// after the container, if the specification names the namespace; otherwise the number of its process is missing.
fn current(
    task: Option<Task>,
    known: Option<&Described>,
    describe: impl FnOnce(u32) -> Option<Described>,
    exists: impl FnOnce(&Namespace) -> io::Result<bool>,
) -> Option<Described> {
    match task {
        Some(Task::Running(pid)) => describe(pid),
        Some(Task::Stopped) => None,
        Some(Task::Unknown) if known.is_none() => describe(0)
            .filter(|new| matches!(new.namespace, Namespace::File(_)))
            .filter(|new| exists(&new.namespace).unwrap_or(false)),
        // Without a task, the number of its process can be that of another one by now, which is an error too.
        Some(Task::Unknown) | None => known
            .filter(|known| exists(&known.namespace).unwrap_or(task.is_some()))
            .cloned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_container_without_a_reported_process_stays_while_its_network_namespace_exists() {
        let known = Described::refused("web", String::new(), None);
        let new = Described::refused("new", String::new(), None);
        let current = |task, known, exists| {
            let described = current(task, known, |_| Some(new.clone()), |_| exists);
            described.map(|described| described.workload.name)
        };
        for task in [None, Some(Task::Unknown)] {
            assert_eq!(
                current(task, Some(&known), Ok(true)).as_deref(),
                Some("web"),
                "{task:?}"
            );
            assert_eq!(current(task, Some(&known), Ok(false)), None, "{task:?}");
            assert_eq!(current(task, None, Ok(false)), None, "{task:?}");
        }
        assert_eq!(current(None, None, Ok(true)), None);
        let unknown = |new: &Described| {
            let described = super::current(Some(Task::Unknown), None, |_| Some(new.clone()), |_| Ok(true));
            described.map(|described| described.workload.name)
        };
        assert_eq!(unknown(&new).as_deref(), Some("new"), "the namespace is named");
        let of_process = Described {
            namespace: Namespace::Process(0, "new".to_owned()),
            ..new.clone()
        };
        assert_eq!(unknown(&of_process), None);
        let hidden = || Err(io::Error::other("hidden"));
        assert_eq!(current(None, Some(&known), hidden()), None);
        assert!(current(Some(Task::Unknown), Some(&known), hidden()).is_some());
        assert_eq!(current(Some(Task::Stopped), Some(&known), Ok(true)), None);
        let running = current(Some(Task::Running(7)), Some(&known), Ok(true));
        assert_eq!(running.as_deref(), Some("new"));
    }
}
