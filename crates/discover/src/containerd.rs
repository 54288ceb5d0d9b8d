//! Answers of containerd's API (gRPC over a Unix socket): containers, their tasks, and events. As with Docker, whoever
//! can use the socket is as powerful as root, and the images are not trusted.
//!
//! The messages have only the fields that are used, with the names and numbers of containerd's definitions
//! (`containerd.services.containers.v1`, `containerd.services.tasks.v1`, `containerd.services.events.v1`).

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

use prost::Message;
use serde::Deserialize;

use crate::docker::labels_or_problem;

/// `containerd.services.containers.v1.Containers/List`.
pub const LIST_CONTAINERS: &str = "/containerd.services.containers.v1.Containers/List";
/// `containerd.services.tasks.v1.Tasks/List`.
pub const LIST_TASKS: &str = "/containerd.services.tasks.v1.Tasks/List";
/// `containerd.services.events.v1.Events/Subscribe`.
pub const SUBSCRIBE: &str = "/containerd.services.events.v1.Events/Subscribe";

/// Extension of the containers that the CRI plugin makes for pods. Images can set labels, but no extensions.
const SANDBOX: &str = "io.cri-containerd.sandbox.metadata";
/// Longest id of a container, bytes (containerd: `pkg/identifiers`).
const MAX_ID: usize = 76;
/// Maximum number of containers or tasks of one list. One that is decoded needs far more memory than the two bytes of an
/// empty one in the answer.
const MAX_ENTRIES: usize = 65_536;
/// Events after which the containers can be others.
const TOPICS: &str = r#"topic~="^/(containers/|tasks/(create|start|exit|delete))""#;

/// A container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Name of the image.
    pub image: String,
    /// Labels, also those that the image has set.
    pub labels: BTreeMap<String, String>,
    /// Whether it is the container of a pod, made by the CRI plugin. Its labels are those of the pod.
    pub is_pod: bool,
    /// Whether it has a network namespace of its own.
    pub has_network: bool,
    /// File of that namespace; `None` if only its processes show it.
    pub netns: Option<PathBuf>,
    /// Why it must stay denied: its labels are too long, or its runtime specification cannot be read.
    pub problem: Option<String>,
}

/// The task of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// It has this first process, by the node's number.
    Running(u32),
    /// Its first process has ended.
    Stopped,
    /// containerd cannot say, for example because the container's shim does not answer.
    Unknown,
}

#[derive(Clone, PartialEq, Message)]
struct ListContainersResponse {
    #[prost(message, repeated, tag = "1")]
    containers: Vec<ContainerMessage>,
}

#[derive(Clone, PartialEq, Message)]
struct ContainerMessage {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(map = "string, string", tag = "2")]
    labels: HashMap<String, String>,
    #[prost(string, tag = "3")]
    image: String,
    #[prost(message, optional, tag = "5")]
    spec: Option<Any>,
    #[prost(map = "string, message", tag = "10")]
    extensions: HashMap<String, Any>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
struct ListTasksResponse {
    #[prost(message, repeated, tag = "1")]
    tasks: Vec<Process>,
}

#[derive(Clone, PartialEq, Message)]
struct Process {
    #[prost(string, tag = "1")]
    container_id: String,
    #[prost(string, tag = "2")]
    id: String,
    #[prost(uint32, tag = "3")]
    pid: u32,
    #[prost(enumeration = "Status", tag = "4")]
    status: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
enum Status {
    Unknown = 0,
    Created = 1,
    Running = 2,
    Stopped = 3,
    Paused = 4,
    Pausing = 5,
}

#[derive(Clone, PartialEq, Message)]
struct SubscribeRequest {
    #[prost(string, repeated, tag = "1")]
    filters: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct Envelope {
    #[prost(string, tag = "2")]
    namespace: String,
}

/// Parses the answer to [`LIST_CONTAINERS`]: containers by their id.
///
/// # Errors
/// The answer is not of this form, or has an impossible id.
pub fn containers(answer: &[u8]) -> Result<BTreeMap<String, Container>, String> {
    check_entries(answer, "the list of containers")?;
    let answer: ListContainersResponse = decode(answer, "the list of containers")?;
    let containers = answer.containers.into_iter().map(|message| {
        let id = checked_id(&message.id)?.to_owned();
        Ok((id, container(message)))
    });
    containers.collect()
}

fn container(message: ContainerMessage) -> Container {
    let spec = message.spec.unwrap_or_default();
    let (labels, too_long) = labels_or_problem(Some(message.labels.into_iter().collect()));
    let (network, unreadable) = match network(&spec.value) {
        Ok(network) => (network, None),
        // Its processes show where it is.
        Err(problem) => (Some(PathBuf::new()), Some(problem)),
    };
    Container {
        has_network: network.is_some(),
        netns: network.filter(|path| path.is_absolute()),
        is_pod: message.extensions.contains_key(SANDBOX),
        labels,
        image: message.image,
        problem: unreadable.or(too_long),
    }
}

/// Returns the file of the network namespace in an OCI runtime specification, an empty path if the runtime makes the
/// namespace, and `None` if the container has none of its own. The namespace of another container is named by a process
/// of that container (`/proc/PID/ns/net`).
fn network(spec: &[u8]) -> Result<Option<PathBuf>, String> {
    #[derive(Deserialize)]
    struct Spec {
        linux: Option<Linux>,
    }
    #[derive(Deserialize)]
    struct Linux {
        #[serde(default)]
        namespaces: Vec<Namespace>,
    }
    #[derive(Deserialize)]
    struct Namespace {
        r#type: String,
        #[serde(default)]
        path: String,
    }
    let spec: Spec = serde_json::from_slice(spec)
        .map_err(|error| format!("its runtime specification cannot be parsed: {error}"))?;
    let namespaces = spec.linux.map(|linux| linux.namespaces).unwrap_or_default();
    let network = namespaces
        .into_iter()
        .find(|namespace| namespace.r#type == "network")
        .filter(|network| !network.path.starts_with("/proc/"));
    Ok(network.map(|network| network.path.into()))
}

/// Parses the answer to [`LIST_TASKS`]: tasks by the id of their container.
///
/// # Errors
/// The answer is not of this form, or has an impossible id.
pub fn tasks(answer: &[u8]) -> Result<BTreeMap<String, Task>, String> {
    check_entries(answer, "the list of tasks")?;
    let answer: ListTasksResponse = decode(answer, "the list of tasks")?;
    let mut tasks = BTreeMap::new();
    for task in answer.tasks {
        // Releases differ in which of both fields has the id.
        let id = match task.container_id.as_str() {
            "" => &task.id,
            id => id,
        };
        let id = checked_id(id)?;
        let state = match (task.status(), task.pid) {
            (Status::Stopped, _) => Task::Stopped,
            (Status::Unknown, _) | (_, 0) => Task::Unknown,
            (_, pid) => Task::Running(pid),
        };
        tasks.insert(id.to_owned(), state);
    }
    Ok(tasks)
}

/// Returns the request of [`SUBSCRIBE`].
#[must_use]
pub fn subscribe_request() -> Vec<u8> {
    let filters = vec![TOPICS.to_owned()];
    SubscribeRequest { filters }.encode_to_vec()
}

/// Returns the namespace of containerd that an event belongs to.
///
/// # Errors
/// The message is no event.
pub fn namespace_of_event(event: &[u8]) -> Result<String, String> {
    decode::<Envelope>(event, "an event").map(|event| event.namespace)
}

/// Refuses a message with more than [`MAX_ENTRIES`] fields, before memory is allocated for them.
fn check_entries(mut message: &[u8], what: &str) -> Result<(), String> {
    let malformed = || format!("{what} cannot be parsed");
    let mut entries = 0;
    while !message.is_empty() {
        entries += 1;
        if entries > MAX_ENTRIES {
            return Err(format!("{what} has more than {MAX_ENTRIES} entries"));
        }
        let mut varint = || prost::decode_length_delimiter(&mut message).map_err(|_| malformed());
        let length = match varint()? & 7 {
            0 => varint().map(|_| 0)?,
            1 => 8,
            2 => varint()?,
            5 => 4,
            _ => return Err(malformed()),
        };
        message = message.get(length..).ok_or_else(malformed)?;
    }
    Ok(())
}

fn decode<T: Message + Default>(bytes: &[u8], what: &str) -> Result<T, String> {
    T::decode(bytes).map_err(|error| format!("{what} cannot be parsed: {error}"))
}

/// Returns an id if it can be one: letters, digits, `.`, `_` and `-`. Another one could match the cgroup of another
/// container.
fn checked_id(id: &str) -> Result<&str, String> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if !(1..=MAX_ID).contains(&id.len()) || !id.bytes().all(fits) {
        return Err(
            "the id of a container has other characters than letters, digits, '.', '_' and '-'".to_owned(),
        );
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::docker::MAX_LABEL_BYTES;

    fn spec(namespaces: &str) -> String {
        format!(
            r#"{{"ociVersion":"1.1.0","process":{{"args":["sh"]}},"linux":{{"namespaces":[{namespaces}]}}}}"#
        )
    }

    const OWN: &str = r#"{"type":"pid"},{"type":"network"}"#;

    fn message(id: &str, spec: &str) -> ContainerMessage {
        ContainerMessage {
            id: id.to_owned(),
            labels: [("app".to_owned(), "web".to_owned())].into(),
            image: "docker.io/library/web:1".to_owned(),
            spec: Some(Any {
                value: spec.as_bytes().to_vec(),
            }),
            extensions: HashMap::new(),
        }
    }

    fn list(containers: Vec<ContainerMessage>) -> Vec<u8> {
        ListContainersResponse { containers }.encode_to_vec()
    }

    #[test]
    fn containers_are_read_with_their_labels() {
        let mut pod = message("0123abcd", &spec(OWN));
        pod.extensions.insert(SANDBOX.to_owned(), Any::default());
        let found = containers(&list(vec![message("web-1", &spec(OWN)), pod])).unwrap();
        let web = &found["web-1"];
        assert_eq!(
            (web.image.as_str(), web.is_pod),
            ("docker.io/library/web:1", false)
        );
        assert_eq!(web.labels["app"], "web");
        assert!(web.has_network && found["0123abcd"].is_pod);
    }

    #[test]
    fn a_container_in_the_namespace_of_the_node_or_of_another_container_has_no_network_of_its_own() {
        for (namespaces, own) in [
            (OWN, Some(None)),
            (
                r#"{"type":"network","path":"/var/run/netns/cni-1"}"#,
                Some(Some("/var/run/netns/cni-1".into())),
            ),
            (r#"{"type":"network","path":"/proc/4711/ns/net"}"#, None),
            (r#"{"type":"pid"}"#, None),
        ] {
            let found = containers(&list(vec![message("a", &spec(namespaces))])).unwrap();
            let found = &found["a"];
            assert_eq!(
                found.has_network.then(|| found.netns.clone()),
                own,
                "{namespaces}"
            );
        }
    }

    #[test]
    fn a_container_that_cannot_be_described_leaves_the_others_as_they_are() {
        let mut long = message("long", &spec(r#"{"type":"network","path":"/run/netns/x"}"#));
        long.labels.insert("x".to_owned(), "x".repeat(MAX_LABEL_BYTES));
        let mut without = message("without", "");
        without.spec = None;
        let all = list(vec![
            long,
            without,
            message("broken", "{"),
            message("good", &spec(OWN)),
        ]);
        let found = containers(&all).unwrap();
        let problem = |id: &str| found[id].problem.clone().unwrap_or_default();
        assert!(found["good"].problem.is_none());
        // The place of each is known, so its interface stays denied.
        assert!(problem("long").contains("its labels have"));
        assert_eq!(found["long"].netns, Some("/run/netns/x".into()));
        for id in ["without", "broken"] {
            assert!(problem(id).contains("runtime specification"));
            assert!(found[id].has_network && found[id].netns.is_none());
        }
    }

    #[test]
    fn ids_that_could_match_another_cgroup_are_refused() {
        for id in ["", "a/b", "..\n", "ä", &"x".repeat(MAX_ID + 1)] {
            assert!(containers(&list(vec![message(id, &spec(OWN))])).is_err(), "{id}");
        }
    }

    #[test]
    fn lists_with_too_many_entries_are_refused_before_they_are_decoded() {
        let empty = b"\x0a\x00".repeat(MAX_ENTRIES);
        assert!(tasks(&empty).unwrap_err().contains("the id of a container"));
        let more = [empty.as_slice(), b"\x0a\x00"].concat();
        for problem in [tasks(&more).unwrap_err(), containers(&more).unwrap_err()] {
            assert!(problem.contains("more than 65536 entries"), "{problem}");
        }
        // Fields that are not known, of each type, pass; those that are cut off do not.
        let unknown = b"\x10\x96\x01\x19aaaaaaaa\x22\x01b\x2dcccc";
        assert_eq!(tasks(unknown).unwrap().len(), 0);
        for cut in [1, 2, 5, 13, 14, 16] {
            assert!(tasks(&unknown[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn a_task_that_has_ended_is_told_from_one_whose_status_is_not_known() {
        let task = |container_id: &str, id: &str, pid: u32, status: Status| Process {
            container_id: container_id.to_owned(),
            id: id.to_owned(),
            pid,
            status: status as i32,
        };
        let answer = ListTasksResponse {
            tasks: vec![
                task("a", "a", 7, Status::Running),
                task("", "b", 8, Status::Created),
                task("c", "c", 9, Status::Stopped),
                task("d", "d", 0, Status::Running),
                task("e", "e", 10, Status::Paused),
                task("f", "f", 11, Status::Unknown),
                task("g", "g", 0, Status::Stopped),
            ],
        };
        let found = tasks(&answer.encode_to_vec()).unwrap();
        let expected = [
            ("a", Task::Running(7)),
            ("b", Task::Running(8)),
            ("c", Task::Stopped),
            ("d", Task::Unknown),
            ("e", Task::Running(10)),
            ("f", Task::Unknown),
            ("g", Task::Stopped),
        ];
        assert_eq!(found, expected.map(|(id, task)| (id.to_owned(), task)).into());
        assert!(tasks(b"\xff\xff").is_err());
    }

    #[test]
    fn an_event_has_the_namespace_that_it_belongs_to() {
        let event = Envelope {
            namespace: "k8s.io".to_owned(),
        };
        assert_eq!(namespace_of_event(&event.encode_to_vec()).unwrap(), "k8s.io");
        assert!(namespace_of_event(b"\x12\x7f").is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0..400_usize) {
            let _ = (containers(&bytes), tasks(&bytes), namespace_of_event(&bytes));
            let whole = list(vec![message("a", &spec(OWN)), message("b", &spec(OWN))]);
            let _ = containers(whole.get(..cut).unwrap_or_default());
        }
    }
}
