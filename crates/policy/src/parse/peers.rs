//! Peers of a rule: the `from*` and `to*` members.

use palisade_model::rule::{CidrRule, Entity, Peer, Peers, Selector};
use palisade_yaml::quoted;

use super::{
    cidr::{cidr_set_entry, net_or_address},
    fqdn::fqdn_selector,
    reader::{At, List, Object, hint},
    section::{Direction, Section},
    selector::{self, Keys},
};

/// Names of the members that depend on the direction.
struct MemberNames {
    endpoints: &'static str,
    nodes: &'static str,
    cidr: &'static str,
    cidr_set: &'static str,
    entities: &'static str,
    groups: &'static str,
    requires: &'static str,
}

const INGRESS: MemberNames = MemberNames {
    endpoints: "fromEndpoints",
    nodes: "fromNodes",
    cidr: "fromCIDR",
    cidr_set: "fromCIDRSet",
    entities: "fromEntities",
    groups: "fromGroups",
    requires: "fromRequires",
};

const EGRESS: MemberNames = MemberNames {
    endpoints: "toEndpoints",
    nodes: "toNodes",
    cidr: "toCIDR",
    cidr_set: "toCIDRSet",
    entities: "toEntities",
    groups: "toGroups",
    requires: "toRequires",
};

/// Parses the peers of a rule; `None` if the rule has no member about peers.
pub(super) fn read(object: &Object<'_>, section: Section<'_>) -> Option<Peers> {
    let egress = section.direction == Direction::Egress;
    let names = if egress { EGRESS } else { INGRESS };
    let mut members = Members {
        object,
        first: None,
        any: false,
        empty: false,
        peers: Vec::new(),
    };

    members.read(names.endpoints, |at| section.scope.peer(at).map(Peer::Labels));
    members.read(names.nodes, |at| {
        selector::read(at, Keys::Sourced).map(Peer::Nodes)
    });
    members.read(names.cidr, |at| {
        net_or_address(at).map(|cidr| {
            Peer::Cidr(CidrRule {
                cidr,
                except: Vec::new(),
            })
        })
    });
    members.read(names.cidr_set, cidr_set_entry);
    members.read(names.entities, |at| entity(at).map(Peer::Entity));
    if egress {
        // Palisade accepts toFQDNs in deny rules. Bare rules follow Cilium, which refuses toFQDNs there.
        if section.deny && object.at.is_bare() {
            object.refuse(
                "toFQDNs",
                "cannot be part of a bare rule that denies: Cilium refuses it; resources may have it",
            );
        } else {
            members.read("toFQDNs", |at| {
                fqdn_selector(at, false)?.into_iter().next().map(Peer::Fqdn)
            });
        }
    }
    members.unresolvable(names.groups, section, "groups of a cloud provider", group);
    if egress {
        members.unresolvable("toServices", section, "services", service);
    }
    members.finish()
}

/// Parses `fromRequires` or `toRequires`: requirements that are added to the endpoint selectors of rules.
///
/// Resources can have requirements, as before Cilium 1.19. Bare rules follow Cilium 1.19, which refuses requirements.
pub(super) fn requirements(object: &Object<'_>, section: Section<'_>) -> Vec<Selector> {
    let name = if section.direction == Direction::Egress {
        EGRESS.requires
    } else {
        INGRESS.requires
    };
    if object.at.is_bare() {
        object.refuse(
            name,
            "must be empty: Cilium removed it in 1.19; put its labels into the selectors of the rule",
        );
        return Vec::new();
    }
    let Some(list) = object.field(name).and_then(|at| at.list()) else {
        return Vec::new();
    };
    list.read(|at| section.scope.peer(at))
}

/// The members of a rule that have been parsed so far.
struct Members<'o> {
    object: &'o Object<'o>,
    /// First member with at least one element; a rule must not have a second such member.
    first: Option<&'static str>,
    any: bool,
    empty: bool,
    peers: Vec<Peer>,
}

impl<'o> Members<'o> {
    /// Returns the list of a member; `None` if the member is absent or without elements. Reports an error if an earlier
    /// member has elements as well.
    fn list(&mut self, name: &'static str) -> Option<List<'o>> {
        self.object.warn_null(&[name]);
        let list = self.object.field(name)?.list()?;
        self.any = true;
        if list.is_empty() {
            self.empty = true;
            return None;
        }
        match self.first {
            Some(first) => self.object.error_at_key(
                name,
                format!("{name} and {first} cannot be combined in one rule; write a rule for each"),
            ),
            None => self.first = Some(name),
        }
        Some(list)
    }

    fn read(&mut self, name: &'static str, element: impl FnMut(At<'_>) -> Option<Peer>) {
        if let Some(list) = self.list(name) {
            self.peers.extend(list.read(element));
        }
    }

    /// Parses a member that only a cluster or a cloud provider could resolve. In an allow rule it selects no peer; in
    /// a deny rule it is an error.
    fn unresolvable(
        &mut self,
        name: &'static str,
        section: Section<'_>,
        what: &str,
        element: impl FnMut(At<'_>) -> Option<()>,
    ) {
        let Some(list) = self.list(name) else {
            return;
        };
        list.read(element);
        if section.deny {
            let message =
                format!("{name} cannot be resolved here, so it cannot deny: there are no {what} to look up");
            self.object.error_at_key(name, message);
        } else if let Some(at) = self.object.field(name) {
            at.warning(format!("{name} selects no peer: there are no {what} to look up"));
        }
    }

    /// Returns the peers. A rule with an empty list selects no peer, whatever its other members are.
    fn finish(self) -> Option<Peers> {
        match (self.any, self.empty || self.peers.is_empty()) {
            (false, _) => None,
            (true, true) => Some(Peers::None),
            (true, false) => Some(Peers::OneOf(self.peers)),
        }
    }
}

const ENTITIES: [(&str, Entity); 13] = [
    ("all", Entity::All),
    ("world", Entity::World),
    ("world-ipv4", Entity::WorldIpv4),
    ("world-ipv6", Entity::WorldIpv6),
    ("cluster", Entity::Cluster),
    ("host", Entity::Host),
    ("remote-node", Entity::RemoteNode),
    ("kube-apiserver", Entity::KubeApiserver),
    ("health", Entity::Health),
    ("init", Entity::Init),
    ("unmanaged", Entity::Unmanaged),
    ("ingress", Entity::Ingress),
    ("none", Entity::None),
];

fn entity(at: At<'_>) -> Option<Entity> {
    let text = at.string()?;
    let entity = ENTITIES
        .iter()
        .find(|(name, _)| *name == text)
        .map(|(_, entity)| *entity);
    if entity.is_none() {
        at.error(format!(
            "unknown entity {}{}",
            quoted(text),
            hint(text, &ENTITIES.map(|(name, _)| name))
        ));
    }
    entity
}

/// Parses an element of `fromGroups` or `toGroups`.
fn group(at: At<'_>) -> Option<()> {
    let object = at.object()?;
    if let Some(aws) = object.field("aws").and_then(|at| at.object()) {
        aws.ignore(&["labels", "securityGroupsIds", "securityGroupsNames", "region"]);
        aws.finish();
    }
    object.finish();
    Some(())
}

/// Parses an element of `toServices`.
fn service(at: At<'_>) -> Option<()> {
    let object = at.object()?;
    if let Some(by_name) = object.field("k8sService").and_then(|at| at.object()) {
        by_name.text("serviceName");
        by_name.text("namespace");
        by_name.finish();
    }
    if let Some(by_labels) = object.field("k8sServiceSelector").and_then(|at| at.object()) {
        by_labels
            .required("selector")
            .and_then(|at| selector::read(at, Keys::Sourced));
        by_labels.text("namespace");
        by_labels.finish();
    }
    object.finish();
    Some(())
}
