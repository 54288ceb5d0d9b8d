//! A client of the Docker Engine API: it lists and describes all containers, and then those that events name. A container
//! about which the engine does not answer leaves the others as they are.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1::{SendRequest, handshake},
    header::HOST,
};
use hyper_util::rt::TokioIo;
use palisade_discover::{Workload, docker};
use tokio::{net::UnixStream, time::timeout};

use super::{
    engine::{DEADLINE, Engine, LIST_INTERVAL, MAX_ANSWER},
    place::{Described, Namespace},
};

/// Longest time for the description of one container or image: Docker does not answer while another operation holds the
/// container's lock.
const DESCRIBE_DEADLINE: Duration = Duration::from_secs(5);
/// Number of containers whose description takes too long, among those of one list or one collection of events, beyond
/// which the engine counts as one that does not answer.
const MAX_STUCK: usize = 8;
/// Longest list of containers, bytes.
const MAX_LIST: usize = 64 << 20;
/// Time for which further events are collected after the first one, before the containers are described.
const COLLECT: Duration = Duration::from_millis(5);
/// Number of containers in collected events beyond which all are listed instead.
const MAX_COLLECTED: usize = 256;
/// Maximum number of images whose labels are remembered.
const MAX_IMAGES: usize = 4_096;
/// `GET /events?filters={"type":["container","network"]}`.
const EVENTS: &str = "/events?filters=%7B%22type%22%3A%5B%22container%22%2C%22network%22%5D%7D";

/// Keeps the table up to date until the engine fails; `Ok` when the engine is no longer configured.
pub(super) async fn follow(engine: &Engine, image_labels: bool) -> Result<(), String> {
    // Events are requested before the first list, so that no change is missed.
    let mut events = Events::open(&engine.socket).await?;
    let mut client = Client {
        sender: connect(&engine.socket).await?,
        images: HashMap::new(),
        image_labels,
        stuck: 0,
    };
    while !engine.is_ended() {
        let listed = Instant::now();
        let (status, answer) = client.get("/containers/json", MAX_LIST).await?;
        if status != StatusCode::OK {
            return Err(format!("/containers/json: {status}"));
        }
        let ids = docker::list(&answer)?;
        let count = ids.len();
        let mut containers = BTreeMap::new();
        let known = engine.table().containers;
        // The ids of new containers are random, so known containers come first and keep their places.
        let (old, new): (Vec<_>, Vec<_>) = ids.into_iter().partition(|id| known.contains_key(id));
        client.stuck = 0;
        for id in old.into_iter().chain(new).take(engine.limit) {
            if let Some(described) = client.describe(engine, &id, known.get(&id)).await? {
                containers.insert(id, described);
            }
        }
        engine.listed(containers, count);
        while !engine.is_ended() {
            let Some(left) = LIST_INTERVAL.checked_sub(listed.elapsed()) else {
                break;
            };
            let Some(ids) = events.collect(left).await? else {
                break;
            };
            if ids.len() > MAX_COLLECTED {
                break;
            }
            let mut containers = BTreeMap::clone(&engine.table().containers);
            client.stuck = 0;
            for id in ids {
                match client.describe(engine, &id, containers.get(&id)).await? {
                    Some(described) if containers.len() < engine.limit || containers.contains_key(&id) => {
                        containers.insert(id, described);
                    }
                    Some(_) => {}
                    None => drop(containers.remove(&id)),
                }
            }
            engine.change(|table| table.containers = Arc::new(containers));
        }
    }
    Ok(())
}

async fn connect(socket: &Path) -> Result<SendRequest<Empty<Bytes>>, String> {
    let stream = timeout(DEADLINE, UnixStream::connect(socket))
        .await
        .map_err(|_| "connecting takes too long".to_owned())?
        .map_err(|error| format!("connecting: {error}"))?;
    let (sender, connection) = handshake(TokioIo::new(stream))
        .await
        .map_err(|error| error.to_string())?;
    // An error of the connection arrives at its requests too.
    tokio::spawn(async move { drop(connection.await) });
    Ok(sender)
}

async fn request(sender: &mut SendRequest<Empty<Bytes>>, path: &str) -> Result<Response<Incoming>, String> {
    let request = Request::get(path)
        .header(HOST, "docker")
        .body(Empty::new())
        .map_err(|error| error.to_string())?;
    sender.ready().await.map_err(|error| format!("{path}: {error}"))?;
    sender
        .send_request(request)
        .await
        .map_err(|error| format!("{path}: {error}"))
}

struct Client {
    sender: SendRequest<Empty<Bytes>>,
    /// Labels of images, by their id.
    images: HashMap<String, BTreeMap<String, String>>,
    /// Whether labels that the image sets count.
    image_labels: bool,
    /// Number of descriptions that took too long, since the last list or collection of events.
    stuck: usize,
}

/// Answer to a request: status and body.
type Answer = (StatusCode, Bytes);

impl Client {
    async fn get(&mut self, path: &str, limit: usize) -> Result<Answer, String> {
        let whole = self.whole(path, limit);
        timeout(DEADLINE, whole)
            .await
            .map_err(|_| format!("{path}: no whole answer within {} s", DEADLINE.as_secs()))?
    }

    /// Requests the description of a container or image; `None` if the answer takes too long.
    async fn get_description(&mut self, engine: &Engine, path: &str) -> Result<Option<Answer>, String> {
        if let Ok(answer) = timeout(DESCRIBE_DEADLINE, self.whole(path, MAX_ANSWER)).await {
            return answer.map(Some);
        }
        self.stuck += 1;
        if self.stuck > MAX_STUCK {
            return Err(format!(
                "{path}: no whole answer within {} s, nor to {MAX_STUCK} requests before",
                DESCRIBE_DEADLINE.as_secs()
            ));
        }
        // The next answer on this connection would be the one that is missing.
        self.sender = connect(&engine.socket).await?;
        Ok(None)
    }

    async fn whole(&mut self, path: &str, limit: usize) -> Result<Answer, String> {
        let response = request(&mut self.sender, path).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), limit).collect().await;
        body.map(|body| (status, body.to_bytes()))
            .map_err(|error| format!("{path}: {error}"))
    }

    /// Returns the description of a container; `None` if it does not run or has no network namespace of its own.
    /// `known` is the last description.
    async fn describe(
        &mut self,
        engine: &Engine,
        id: &str,
        known: Option<&Described>,
    ) -> Result<Option<Described>, String> {
        let path = format!("/containers/{id}/json");
        let Some((status, answer)) = self.get_description(engine, &path).await? else {
            let late = || Described::refused(id, "the engine does not describe it in time".to_owned(), None);
            return Ok(Some(known.cloned().unwrap_or_else(late)));
        };
        match status {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(None),
            // Podman answers so while it removes a container. The others must not suffer from it.
            other if known.is_none() => {
                return Ok(Some(Described::refused(
                    id,
                    format!("the engine answers {other}"),
                    None,
                )));
            }
            _ => return Ok(known.cloned()),
        }
        let mut container = match docker::inspect(id, &answer) {
            Ok(container) => container,
            Err(message) => return Ok(Some(Described::refused(id, message, known))),
        };
        let mut problem = container.problem.take();
        if !container.has_network {
            return Ok(None);
        }
        if !self.image_labels && !container.labels.is_empty() {
            match self.labels_of_image(engine, &container.image_id).await? {
                Ok(of_image) => container.labels = docker::own_labels(&container.labels, &of_image),
                Err(message) => match known {
                    // The labels of a container do not change while it exists.
                    Some(known) if known.workload.problem.is_none() => {
                        container.labels.clone_from(&known.workload.labels);
                    }
                    _ => {
                        problem = Some(format!(
                            "its image cannot be inspected, so the labels of the image are not known: {message}"
                        ));
                    }
                },
            }
        }
        let namespace = match container.netns {
            Some(path) => Namespace::File(path),
            None => Namespace::Process(container.pid, container.id.clone()),
        };
        Ok(Some(Described {
            workload: Workload {
                name: container.name,
                container: Some(container.id),
                image: Some(container.image),
                labels: container.labels,
                addresses: Some(container.addresses),
                problem,
                ..Workload::default()
            },
            namespace,
        }))
    }

    /// Returns the labels of an image, or why they are not known.
    ///
    /// # Errors
    /// The engine does not answer.
    async fn labels_of_image(
        &mut self,
        engine: &Engine,
        image: &str,
    ) -> Result<Result<BTreeMap<String, String>, String>, String> {
        // A container of Podman that runs from a directory has no image.
        if image.is_empty() {
            return Ok(Ok(BTreeMap::new()));
        }
        // An id with other characters would change the path of the request.
        if !image.bytes().all(|b| b.is_ascii_alphanumeric() || b == b':') {
            return Ok(Err("its id is not made of letters and digits".to_owned()));
        }
        if let Some(known) = self.images.get(image) {
            return Ok(Ok(known.clone()));
        }
        let path = format!("/images/{image}/json");
        let Some((status, answer)) = self.get_description(engine, &path).await? else {
            return Ok(Err("the engine does not describe it in time".to_owned()));
        };
        if status != StatusCode::OK {
            return Ok(Err(format!("the engine answers {status}")));
        }
        let labels = match docker::image_labels(&answer) {
            Ok(labels) => labels,
            Err(message) => return Ok(Err(message)),
        };
        if self.images.len() >= MAX_IMAGES {
            self.images.clear();
        }
        self.images.insert(image.to_owned(), labels.clone());
        Ok(Ok(labels))
    }
}

/// The stream of events, one JSON object a line.
struct Events {
    body: Incoming,
    /// Beginning of the next line.
    rest: Vec<u8>,
    /// Keeps the connection open.
    _sender: SendRequest<Empty<Bytes>>,
}

impl Events {
    async fn open(socket: &Path) -> Result<Self, String> {
        let mut sender = connect(socket).await?;
        let response = timeout(DEADLINE, request(&mut sender, EVENTS))
            .await
            .map_err(|_| "/events: no answer".to_owned())??;
        if response.status() != StatusCode::OK {
            return Err(format!("/events: {}", response.status()));
        }
        Ok(Self {
            body: response.into_body(),
            rest: Vec::new(),
            _sender: sender,
        })
    }

    /// Returns the containers of the next events; `None` if there are none within `longest`.
    async fn collect(&mut self, longest: Duration) -> Result<Option<BTreeSet<String>>, String> {
        let mut ids = BTreeSet::new();
        let mut end = Instant::now() + longest;
        // The deadline is of all frames, so that a stream without end does not keep the containers from being described.
        // It is checked here too, because `timeout` returns a frame that is there already also after its deadline.
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            let Ok(frame) = timeout(left, self.body.frame()).await else {
                break;
            };
            let frame = frame
                .ok_or("/events: the engine has ended the stream")?
                .map_err(|error| format!("/events: {error}"))?;
            let Ok(data) = frame.into_data() else { continue };
            self.rest.extend_from_slice(&data);
            let had_none = ids.is_empty();
            while let Some(newline) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=newline).collect();
                if !line.trim_ascii().is_empty() {
                    ids.extend(docker::event(&line)?.map(|event| event.id));
                }
            }
            if self.rest.len() > MAX_ANSWER {
                return Err(format!("/events: an event of more than {MAX_ANSWER} bytes"));
            }
            if ids.len() > MAX_COLLECTED {
                break;
            }
            if had_none && !ids.is_empty() {
                end = end.min(Instant::now() + COLLECT);
            }
        }
        Ok((!ids.is_empty()).then_some(ids))
    }
}
