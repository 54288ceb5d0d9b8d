//! `[[discover]]`: workloads that are found.

use std::{collections::HashMap, path::PathBuf};

use palisade_discover::{
    InterfacePattern, LabelTemplate, Rule, Template, Unknown, Wildcard, check_key, check_value,
};
use palisade_model::rule::Label;

use super::{
    labels::{label, namespace_labels, namespace_of},
    reader::Section,
};

/// Directory in which iproute2 mounts named network namespaces.
const NETNS_DIR: &str = "/run/netns";
/// Directory in which libcni keeps results.
const CNI_DIR: &str = "/var/lib/cni/results";
/// Socket of the Docker Engine.
const DOCKER_SOCKET: &str = "/var/run/docker.sock";
/// Socket of containerd.
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
/// Namespaces of containerd that Kubernetes, and ctr and nerdctl use.
const CONTAINERD_NAMESPACES: [&str; 2] = ["k8s.io", "default"];
/// Largest number of namespaces of containerd.
const MAX_NAMESPACES: usize = 16;

/// `[[discover]]`: a source of workloads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Discover {
    /// Where the workloads are found.
    pub source: Source,
    /// How a workload becomes an endpoint.
    pub rule: Rule,
}

/// Where workloads are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// Named network namespaces: the files of this directory.
    Netns(PathBuf),
    /// Results of CNI: the files of this directory.
    Cni(PathBuf),
    /// Containers of an engine.
    Engine {
        /// Socket of the API.
        socket: PathBuf,
        /// Which API, with its options.
        api: EngineApi,
    },
}

/// API of a container engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum EngineApi {
    /// Docker, or Podman.
    Docker {
        /// Whether labels that the image sets count.
        image_labels: bool,
    },
    /// containerd.
    Containerd {
        /// Whether labels of containers that are no pods count: they can be those of the image.
        image_labels: bool,
        /// Namespaces of containerd.
        namespaces: Vec<String>,
    },
}

impl EngineApi {
    /// Returns the kind as `kind` spells it.
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Docker { .. } => "docker",
            Self::Containerd { .. } => "containerd",
        }
    }
}

/// Returns the sections. `reserved` are interfaces that no pattern may match, with what they are.
pub(super) fn read(
    sections: Vec<Section<'_, '_>>,
    namespaces: &HashMap<String, Vec<Label>>,
    reserved: &[(String, String)],
) -> Vec<Discover> {
    sections
        .into_iter()
        .filter_map(|section| discover(section, namespaces, reserved))
        .collect()
}

fn discover(
    section: Section<'_, '_>,
    namespaces: &HashMap<String, Vec<Label>>,
    reserved: &[(String, String)],
) -> Option<Discover> {
    #[derive(Clone, Copy, PartialEq)]
    enum Kind {
        Netns,
        Docker,
        Containerd,
        Cni,
    }
    let kinds = [
        ("netns", Kind::Netns),
        ("docker", Kind::Docker),
        ("containerd", Kind::Containerd),
        ("cni", Kind::Cni),
    ];
    let is_given = section
        .required_string("kind", "\"netns\", \"docker\", \"containerd\" or \"cni\"")
        .is_some();
    let kind = is_given.then(|| section.choice("kind", &kinds)).flatten();
    let is_engine = matches!(kind, Some(Kind::Docker | Kind::Containerd));
    let is_container = kind.is_some_and(|kind| kind != Kind::Netns);
    let names = section.list("names", "a list of patterns: [\"web-*\"]", Wildcard::parse);
    if names.as_ref().map_or(kind == Some(Kind::Netns), Vec::is_empty) {
        section.error("[[discover]] needs names = [\"web-*\"]: the network namespaces that are workloads");
    }
    let names: Vec<Wildcard> = match names {
        Some(names) => names.into_iter().map(|at| at.value).collect(),
        None => Wildcard::parse("*").into_iter().collect(),
    };
    let stars = names.iter().map(Wildcard::stars).min().unwrap_or(0);
    let interfaces = interfaces(&section, reserved);
    let name = match section.string("name") {
        None => Template::parse("{name}", stars, is_container).ok(),
        Some(at) => Template::parse(&at.value, stars, is_container)
            .map_err(|message| section.error_at(at.offset, format!("discover.name: {message}")))
            .ok(),
    };
    let namespace = namespace_of(&section).unwrap_or_else(|| "default".to_owned());
    let labels = labels(&section, stars, is_container);
    let addresses = section.prefixes("addresses").unwrap_or_default();
    if addresses.is_empty() && kind == Some(Kind::Netns) {
        // Root in a network namespace can give itself any address, and with it would take the identity of another one.
        section.error(
            "[[discover]] needs addresses = [\"10.0.1.0/24\"]: the prefixes from which its workloads have their addresses; \
             others do not count, because a workload can give itself any",
        );
    }
    let unknown = section.choice("unknown", &[("deny", Unknown::Deny), ("init", Unknown::Init)]);
    let unknown = unknown.unwrap_or_default();
    if unknown == Unknown::Init && addresses.is_empty() && kind.is_some_and(|kind| kind != Kind::Netns) {
        section.error(
            "discover.unknown = \"init\" needs addresses = [\"10.0.1.0/24\"]: the prefixes from which workloads have their \
             addresses; before a workload is known, its addresses are those that it gives itself",
        );
    }
    let dir = section.absolute_path("dir");
    let socket = section.absolute_path("socket");
    let image_labels = section.boolean("image_labels");
    let container_labels = section.list(
        "container_labels",
        "a list of patterns of keys: [\"app\", \"com.example.*\"]",
        Wildcard::parse,
    );
    let containerd_namespaces = containerd_namespaces(&section);
    let unused = [
        ("dir", dir.is_some(), is_engine),
        ("socket", socket.is_some(), !is_engine),
        ("image_labels", image_labels.is_some(), !is_engine),
        (
            "containerd_namespaces",
            containerd_namespaces.is_some(),
            kind != Some(Kind::Containerd),
        ),
        ("container_labels", container_labels.is_some(), !is_container),
    ];
    for (option, is_given, is_unused) in unused {
        if kind.is_some() && is_given && is_unused {
            section.error(format!(
                "discover.{option} has no meaning for this kind: leave it out"
            ));
        }
    }
    section.finish();
    let source = match kind? {
        Kind::Netns => Source::Netns(dir.unwrap_or_else(|| NETNS_DIR.into())),
        Kind::Cni => Source::Cni(dir.unwrap_or_else(|| CNI_DIR.into())),
        Kind::Docker => Source::Engine {
            socket: socket.unwrap_or_else(|| DOCKER_SOCKET.into()),
            api: EngineApi::Docker {
                image_labels: image_labels.unwrap_or(false),
            },
        },
        Kind::Containerd => Source::Engine {
            socket: socket.unwrap_or_else(|| CONTAINERD_SOCKET.into()),
            api: EngineApi::Containerd {
                image_labels: image_labels.unwrap_or(false),
                namespaces: containerd_namespaces
                    .unwrap_or_else(|| CONTAINERD_NAMESPACES.map(str::to_owned).to_vec()),
            },
        },
    };
    Some(Discover {
        rule: Rule {
            kind: source.kind(),
            names,
            interfaces,
            name: name?,
            namespace_labels: namespace_labels(&namespace, namespaces),
            namespace,
            labels,
            container_labels: container_labels
                .unwrap_or_default()
                .into_iter()
                .map(|at| at.value)
                .collect(),
            addresses: addresses.into_iter().map(|at| at.value).collect(),
            unknown,
        },
        source,
    })
}

impl Source {
    /// Returns the kind as `kind` spells it.
    pub(crate) const fn kind(&self) -> &'static str {
        match self {
            Self::Netns(_) => "netns",
            Self::Cni(_) => "cni",
            Self::Engine { api, .. } => api.kind(),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Netns(place) | Self::Cni(place) | Self::Engine { socket: place, .. } => {
                write!(f, "{} {}", self.kind(), place.display())
            }
        }
    }
}

fn containerd_namespaces(section: &Section<'_, '_>) -> Option<Vec<String>> {
    // containerd's own rule for names of namespaces.
    let read = |text: &str| {
        let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        match (1..=76).contains(&text.len()) && text.bytes().all(fits) {
            true => Ok(text.to_owned()),
            false => Err(format!("'{text}' cannot be a namespace of containerd")),
        }
    };
    let list = section.list("containerd_namespaces", "a list of names: [\"k8s.io\"]", read)?;
    if !(1..=MAX_NAMESPACES).contains(&list.len()) {
        section.error(format!(
            "discover.containerd_namespaces has {} names: 1 to {MAX_NAMESPACES} are possible",
            list.len()
        ));
    }
    let mut names: Vec<String> = list.into_iter().map(|at| at.value).collect();
    names.sort_unstable();
    names.dedup();
    Some(names)
}

fn interfaces(section: &Section<'_, '_>, reserved: &[(String, String)]) -> Vec<InterfacePattern> {
    let wanted = "a list of interface names or their beginnings: [\"veth*\"]";
    let list = section.list("interfaces", wanted, |text| {
        let pattern = InterfacePattern::parse(text)?;
        match reserved.iter().find(|(name, _)| pattern.matches(name)) {
            Some((name, what)) => Err(format!(
                "'{text}' matches {name}, {what}, and would close it; write a narrower pattern"
            )),
            None => Ok(pattern),
        }
    });
    let is_empty = list.as_ref().is_some_and(Vec::is_empty);
    if is_empty {
        section.error("discover.interfaces is empty: without a pattern no interface belongs to a workload");
    }
    let Some(list) = list else {
        let default = InterfacePattern::Prefix("veth".to_owned());
        if let Some((name, what)) = reserved.iter().find(|(name, _)| default.matches(name)) {
            section.error(format!(
                "the default interfaces = [\"{default}\"] matches {name}, {what}, and would close it; write a narrower \
                 pattern"
            ));
        }
        return vec![default];
    };
    list.into_iter().map(|at| at.value).collect()
}

fn labels(section: &Section<'_, '_>, stars: usize, is_container: bool) -> Vec<LabelTemplate> {
    let mut list = Vec::new();
    for (name, value) in section.strings("labels") {
        let Some(label) = label(section, &name, &value) else {
            continue;
        };
        if let Err(message) = check_key(&label.key) {
            section.error_at(name.offset, message);
            continue;
        }
        // A placeholder is checked when it has its text.
        if !label.value.contains('{')
            && let Err(message) = check_value(&label.value)
        {
            section.error_at(value.offset, message);
        }
        match Template::parse(&label.value, stars, is_container) {
            Ok(template) => list.push(LabelTemplate {
                source: label.source,
                key: label.key,
                value: template,
            }),
            Err(message) => section.error_at(value.offset, message),
        }
    }
    list
}
