//! Answers of the Docker Engine API, and of Podman's, which has the same form. Whoever may start containers is as
//! powerful as root, so the socket's owner is trusted; the images that it runs are not.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::PathBuf,
};

use serde::{Deserialize, de::DeserializeOwned};

/// Maximum number of bytes of all keys and values of the labels of one container or image.
pub const MAX_LABEL_BYTES: usize = 64 << 10;

/// A container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    /// Id: 64 hexadecimal digits.
    pub id: String,
    /// Name without the slash.
    pub name: String,
    /// Name of the image.
    pub image: String,
    /// Id of the image.
    pub image_id: String,
    /// Labels, also those that the image has set.
    pub labels: BTreeMap<String, String>,
    /// Addresses in all networks.
    pub addresses: Vec<IpAddr>,
    /// File of the network namespace; `None` if the engine does not say.
    pub netns: Option<PathBuf>,
    /// First process.
    pub pid: u32,
    /// Whether the container runs, and has a network namespace of its own.
    pub has_network: bool,
    /// Why it must stay denied: its labels are too long, and then there are none here.
    pub problem: Option<String>,
}

/// An event that concerns a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Id of the container.
    pub id: String,
}

/// Parses the answer to `GET /containers/json`: the ids of the containers.
///
/// # Errors
/// The answer is not of this form.
pub fn list(answer: &[u8]) -> Result<BTreeSet<String>, String> {
    #[derive(Deserialize)]
    struct Entry {
        #[serde(rename = "Id")]
        id: String,
    }
    let entries: Vec<Entry> = parse(answer, "the list of containers")?;
    entries
        .into_iter()
        .map(|entry| checked_id(entry.id))
        .collect::<Result<_, _>>()
}

/// Parses the answer to `GET /containers/ID/json`.
///
/// # Errors
/// The answer is not of this form, or describes another container than `id`.
pub fn inspect(id: &str, answer: &[u8]) -> Result<Container, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        id: String,
        name: String,
        #[serde(default)]
        image: String,
        state: State,
        config: Config,
        #[serde(default)]
        host_config: HostConfig,
        network_settings: NetworkSettings,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct State {
        running: bool,
        #[serde(default)]
        pid: u32,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Config {
        #[serde(default)]
        image: String,
        labels: Option<BTreeMap<String, String>>,
    }
    #[derive(Deserialize, Default)]
    #[serde(rename_all = "PascalCase", default)]
    struct HostConfig {
        network_mode: String,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct NetworkSettings {
        #[serde(default)]
        sandbox_key: String,
        #[serde(flatten)]
        addresses: Addresses,
        networks: Option<BTreeMap<String, Option<Addresses>>>,
    }
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Addresses {
        #[serde(rename = "IPAddress")]
        v4: Option<String>,
        #[serde(rename = "GlobalIPv6Address")]
        v6: Option<String>,
    }
    let answer: Answer = parse(answer, "the description of a container")?;
    if checked_id(answer.id)? != id {
        return Err("the description is that of another container".to_owned());
    }
    let settings = answer.network_settings;
    let networks = settings
        .networks
        .into_iter()
        .flatten()
        .filter_map(|(_, network)| network);
    let mut addresses = BTreeSet::new();
    for network in networks.chain([settings.addresses]) {
        for text in [network.v4, network.v6]
            .into_iter()
            .flatten()
            .filter(|text| !text.is_empty())
        {
            addresses.insert(
                text.parse::<IpAddr>()
                    .map_err(|_| "an address of the container is no IP address".to_owned())?,
            );
        }
    }
    let mode = answer.host_config.network_mode;
    let shares = ["host", "none"].contains(&mode.as_str())
        || mode.starts_with("container:")
        || mode.starts_with("ns:");
    let netns = PathBuf::from(settings.sandbox_key);
    let (labels, problem) = labels_or_problem(answer.config.labels);
    Ok(Container {
        id: id.to_owned(),
        name: answer.name.strip_prefix('/').unwrap_or(&answer.name).to_owned(),
        image: answer.config.image,
        image_id: answer.image,
        labels,
        addresses: addresses.into_iter().collect(),
        netns: netns.is_absolute().then_some(netns),
        pid: answer.state.pid,
        has_network: answer.state.running && !shares,
        problem,
    })
}

/// Parses the answer to `GET /images/ID/json`: the labels that the image sets.
///
/// # Errors
/// The answer is not of this form, or has more than [`MAX_LABEL_BYTES`] of labels.
pub fn image_labels(answer: &[u8]) -> Result<BTreeMap<String, String>, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        config: Option<Config>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Config {
        labels: Option<BTreeMap<String, String>>,
    }
    let answer: Answer = parse(answer, "the description of an image")?;
    bounded(answer.config.and_then(|config| config.labels))
}

/// Parses a line of `GET /events`; `None` if the event concerns no container.
///
/// # Errors
/// The line is not of this form.
pub fn event(line: &[u8]) -> Result<Option<Event>, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Line {
        #[serde(default)]
        r#type: String,
        #[serde(default)]
        actor: Actor,
    }
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Actor {
        #[serde(rename = "ID")]
        id: String,
        #[serde(rename = "Attributes")]
        attributes: Option<BTreeMap<String, String>>,
    }
    let line: Line = parse(line, "an event")?;
    let id = match line.r#type.as_str() {
        "container" => Some(line.actor.id),
        "network" => line
            .actor
            .attributes
            .and_then(|mut attributes| attributes.remove("container")),
        _ => None,
    };
    id.map(|id| checked_id(id).map(|id| Event { id })).transpose()
}

/// Returns the labels of a container that its image has not set. A label that the container sets to the very value of
/// the image cannot be told from the image's.
#[must_use]
pub fn own_labels(
    labels: &BTreeMap<String, String>,
    of_image: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let own = labels
        .iter()
        .filter(|(key, value)| of_image.get(*key) != Some(value));
    own.map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Returns the labels unless they are longer than [`MAX_LABEL_BYTES`]. The daemon keeps the labels of every container,
/// and whoever makes an image can set any number of them.
fn bounded(labels: Option<BTreeMap<String, String>>) -> Result<BTreeMap<String, String>, String> {
    let labels = labels.unwrap_or_default();
    let bytes: usize = labels.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > MAX_LABEL_BYTES {
        return Err(format!(
            "its labels have {bytes} bytes, more than {MAX_LABEL_BYTES}"
        ));
    }
    Ok(labels)
}

/// Returns the labels, or no labels and why they are refused.
pub(crate) fn labels_or_problem(
    labels: Option<BTreeMap<String, String>>,
) -> (BTreeMap<String, String>, Option<String>) {
    match bounded(labels) {
        Ok(labels) => (labels, None),
        Err(problem) => (BTreeMap::new(), Some(problem)),
    }
}

fn parse<T: DeserializeOwned>(answer: &[u8], what: &str) -> Result<T, String> {
    serde_json::from_slice(answer).map_err(|error| format!("{what} cannot be parsed: {error}"))
}

/// Returns an id unless it has other characters than hexadecimal digits, which could change the path of a request.
fn checked_id(id: String) -> Result<String, String> {
    let is_hex = id.len() == 64
        && id
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    is_hex
        .then_some(id)
        .ok_or_else(|| "the id of a container is not 64 hexadecimal digits".to_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn description(network_mode: &str) -> String {
        format!(
            r#"{{"Id":"{ID}","Created":"2026-01-01T00:00:00Z","Name":"/web-1","Image":"sha256:aa","State":{{"Status":
            "running","Running":true,"Pid":4711}},"Config":{{"Image":"nginx:1.27","Labels":{{"app":"web","maintainer":"x"}}}},
            "HostConfig":{{"NetworkMode":"{network_mode}"}},"NetworkSettings":{{"SandboxKey":"/var/run/docker/netns/1f",
            "IPAddress":"172.17.0.2","GlobalIPv6Address":"","Networks":{{"bridge":{{"IPAddress":"172.17.0.2",
            "GlobalIPv6Address":"fd00:17::2","MacAddress":"02:42:ac:11:00:02"}},"none":null}}}}}}"#
        )
    }

    #[test]
    fn a_description_of_docker_is_read() {
        let container = inspect(ID, description("bridge").as_bytes()).unwrap();
        assert_eq!((container.name.as_str(), container.pid), ("web-1", 4711));
        let addresses: Vec<String> = container.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["172.17.0.2", "fd00:17::2"]);
        assert_eq!(
            container.netns.as_deref(),
            Some("/var/run/docker/netns/1f".as_ref())
        );
        assert!(container.has_network);
        assert_eq!(container.labels.len(), 2);
        let of_image =
            image_labels(br#"{"Id":"sha256:aa","Config":{"Labels":{"maintainer":"x","app":"y"}}}"#);
        let own = own_labels(&container.labels, &of_image.unwrap());
        assert_eq!(own, BTreeMap::from([("app".to_owned(), "web".to_owned())]));
    }

    #[test]
    fn a_container_in_the_namespace_of_another_has_no_network_of_its_own() {
        for mode in ["host", "none", "container:0123", "ns:/run/netns/x"] {
            assert!(
                !inspect(ID, description(mode).as_bytes()).unwrap().has_network,
                "{mode}"
            );
        }
    }

    #[test]
    fn labels_have_bounded_length() {
        let image = |bytes: usize| {
            let value = "x".repeat(bytes - 1);
            image_labels(format!(r#"{{"Config":{{"Labels":{{"a":"{value}"}}}}}}"#).as_bytes())
        };
        assert_eq!(image(MAX_LABEL_BYTES).unwrap().len(), 1);
        assert!(image(MAX_LABEL_BYTES + 1).unwrap_err().contains("65537 bytes"));
        let long = format!(r#""app":"{}""#, "x".repeat(MAX_LABEL_BYTES));
        let container = description("bridge").replace(r#""app":"web""#, &long);
        // The place is known, so its interface stays denied.
        let container = inspect(ID, container.as_bytes()).unwrap();
        assert!(container.problem.unwrap().contains("its labels have"));
        assert!(container.labels.is_empty() && container.has_network);
        assert!(container.netns.is_some());
    }

    #[test]
    fn ids_that_would_change_a_request_are_refused() {
        assert_eq!(list(format!(r#"[{{"Id":"{ID}"}}]"#).as_bytes()).unwrap().len(), 1);
        for id in [
            "",
            "../images/x",
            "0123",
            &ID.to_uppercase(),
            &format!("{ID} HTTP/1.1"),
        ] {
            assert!(list(format!(r#"[{{"Id":"{id}"}}]"#).as_bytes()).is_err(), "{id}");
        }
        let other = ID.replacen('0', "1", 1);
        assert!(
            inspect(&other, description("bridge").as_bytes())
                .unwrap_err()
                .contains("another")
        );
    }

    #[test]
    fn events_of_containers_and_of_their_networks_are_read() {
        let of = |text: String| event(text.as_bytes()).unwrap().map(|event| event.id);
        let container =
            format!(r#"{{"Type":"container","Action":"start","Actor":{{"ID":"{ID}","Attributes":{{}}}}}}"#);
        assert_eq!(of(container).as_deref(), Some(ID));
        let network = format!(
            r#"{{"Type":"network","Action":"connect","Actor":{{"ID":"x","Attributes":{{"container":"{ID}"}}}}}}"#
        );
        assert_eq!(of(network).as_deref(), Some(ID));
        assert_eq!(of(r#"{"Type":"image","Actor":{"ID":"x"}}"#.to_owned()), None);
        assert!(event(b"{").is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), cut in 0..700_usize) {
            let _ = (list(&bytes), inspect(ID, &bytes), image_labels(&bytes), event(&bytes));
            let text = description("bridge");
            let _ = inspect(ID, text.as_bytes().get(..cut).unwrap_or_default());
        }
    }
}
