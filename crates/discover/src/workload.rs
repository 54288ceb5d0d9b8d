//! Workloads as sources report them, the mapping of a `[[discover]]` section, and the endpoints that result.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use palisade_model::{labels::Labels, rule::Label};
use serde::{Deserialize, Serialize};

use crate::{InterfacePattern, Template, Wildcard};

/// Maximum number of addresses of one endpoint.
pub const MAX_ADDRESSES: usize = 64;
/// Maximum number of labels that one workload has by itself.
pub const MAX_LABELS: usize = 64;
/// Kind, in [`Found`], of endpoints whose workload is not known yet.
pub(crate) const INIT: &str = "init";

/// A workload that a source reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// Number of the [`Rule`].
    pub rule: usize,
    /// Kind and place of the source: `docker /var/run/docker.sock`.
    pub origin: String,
    /// Name of the namespace or container.
    pub name: String,
    /// Id of the container.
    pub container: Option<String>,
    /// Image of the container.
    pub image: Option<String>,
    /// Labels of the container.
    pub labels: BTreeMap<String, String>,
    /// Addresses by the source; `None` if the source does not know them, and those of the links count.
    pub addresses: Option<Vec<IpAddr>>,
    /// Number of the network namespace (inode); 0 if it is not found.
    pub netns: u64,
    /// Interfaces of the node that lead into the network namespace.
    pub links: Vec<Link>,
    /// Why the source cannot describe the workload, for `status`. Such a workload stays denied.
    pub problem: Option<String>,
}

/// Host side of a veth, with what is inside the network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Name on the node.
    pub interface: String,
    /// Index on the node.
    pub ifindex: u32,
    /// Index inside.
    pub inner: u32,
    /// Addresses inside.
    pub addresses: Vec<IpAddr>,
}

/// The mapping of a `[[discover]]` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// `netns`, `docker`, `containerd` or `cni`.
    pub kind: &'static str,
    /// Names of the workloads that the section is for.
    pub names: Vec<Wildcard>,
    /// Interfaces that belong to workloads.
    pub interfaces: Vec<InterfacePattern>,
    /// Name of the endpoint.
    pub name: Template,
    /// Namespace of the endpoint.
    pub namespace: String,
    /// Labels by the namespace of the endpoint.
    pub namespace_labels: Vec<Label>,
    /// Labels by the configuration.
    pub labels: Vec<LabelTemplate>,
    /// Keys of the container's labels that the endpoint has, with source `container`.
    pub container_labels: Vec<Wildcard>,
    /// Prefixes from which the addresses are; empty for any.
    pub addresses: Vec<IpNet>,
    /// What an interface may do before its workload is known.
    pub unknown: Unknown,
}

/// What an interface may do before the labels of its workload are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unknown {
    /// Nothing.
    #[default]
    Deny,
    /// What policies that select `reserved:init` allow.
    Init,
}

/// An interface of the node that leads into another network namespace, for [`Unknown::Init`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// The interface, with the addresses inside.
    pub link: Link,
    /// Number by which the kernel names the network namespace of the other side.
    pub namespace: i32,
}

/// A label whose value has placeholders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelTemplate {
    /// Source of the label.
    pub source: String,
    /// Key of the label.
    pub key: String,
    /// Value of the label.
    pub value: Template,
}

/// A found endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Name of the endpoint.
    pub name: String,
    /// Namespace of the endpoint.
    pub namespace: String,
    /// Host side of the veth.
    pub interface: String,
    /// Index of the host side.
    pub ifindex: u32,
    /// Addresses of the endpoint.
    pub addresses: Vec<IpAddr>,
    /// Labels, including those of the namespace.
    pub labels: Labels,
    /// Kind of the source.
    pub kind: String,
    /// Kind and place of the source. Two sections can have sources of one kind at different places.
    #[serde(default)]
    pub origin: String,
    /// Name of the namespace or id of the container.
    pub id: String,
    /// Number of the network namespace (inode).
    pub netns: u64,
}

impl Found {
    /// Returns `namespace/name`.
    #[must_use]
    pub fn qualified_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Returns the source for reports: `netns:web`, `docker:0123456789ab`.
    #[must_use]
    pub fn source(&self) -> String {
        format!("{}:{}", self.kind, short(&self.kind, &self.id))
    }

    /// Returns whether both are the same run of the same workload at the same interface. State of an earlier run
    /// (connections, learned names) must not be inherited.
    #[must_use]
    pub fn is_same_run(&self, other: &Self) -> bool {
        (&self.kind, &self.id, self.ifindex, self.netns)
            == (&other.kind, &other.id, other.ifindex, other.netns)
    }
}

/// Returns the first twelve characters of a container's id, and the whole name of a namespace or an interface.
fn short<'a>(kind: &str, id: &'a str) -> &'a str {
    match kind {
        "netns" | INIT => id,
        _ => id.get(..12).unwrap_or(id),
    }
}
