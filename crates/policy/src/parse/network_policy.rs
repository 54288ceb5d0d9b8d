//! Kubernetes `NetworkPolicy` (networking.k8s.io/v1).

use palisade_model::rule::{Entity, Peer, Peers, PolicyKind, Ports, Rule, Selector, Spec, Subject};
use palisade_yaml::quoted;

use super::{
    cidr::ip_block,
    ports::network_policy_port,
    reader::{At, Object, hint},
    selector::{self, Keys, Scope},
};

/// Parses the spec of a NetworkPolicy.
pub(super) fn spec(at: At<'_>, namespace: &str) -> Option<Spec> {
    let object = at.object()?;
    let scope = Scope {
        kind: PolicyKind::Knp,
        namespace: Some(namespace),
        selects_init: false,
    };
    let subject = match object.field("podSelector") {
        Some(at) => scope.subject(at, Keys::Of("k8s")),
        None => Some(Selector {
            requirements: vec![selector::in_namespace(namespace)],
        }),
    };
    let rules = |name, peers| {
        object
            .field(name)
            .and_then(|at| at.list())
            .map(|list| list.read(|at| rule(at, peers, namespace)))
            .unwrap_or_default()
    };
    let (ingress, egress) = (rules("ingress", "from"), rules("egress", "to"));
    let types = object
        .field("policyTypes")
        .and_then(|at| at.list())
        .filter(|list| !list.is_empty());
    let (is_ingress, is_egress) = match types {
        Some(list) => {
            let types = list.read(policy_type);
            (types.contains(&"Ingress"), types.contains(&"Egress"))
        }
        // The default of `policyTypes`: ingress always, and egress if there are egress rules.
        None => (true, !egress.is_empty()),
    };
    object.finish();
    Some(Spec {
        subject: Subject::Endpoints(subject?),
        ingress: section(&object, "ingress", is_ingress, ingress),
        ingress_deny: None,
        egress: section(&object, "egress", is_egress, egress),
        egress_deny: None,
        default_deny_ingress: None,
        default_deny_egress: None,
        description: String::new(),
        location: at.location(),
    })
}

fn policy_type(at: At<'_>) -> Option<&'static str> {
    let text = at.string()?;
    match text {
        "Ingress" => Some("Ingress"),
        "Egress" => Some("Egress"),
        _ => {
            at.error(format!(
                "unknown policy type {}{}",
                quoted(text),
                hint(text, &["Ingress", "Egress"])
            ));
            None
        }
    }
}

/// Converts the rules of a direction; `None` if the policy does not apply to the direction. `concerned`: whether it
/// applies. If it applies and the file has no rule, the result is one rule that matches no peer, so that the policy
/// denies everything in this direction.
fn section(object: &Object<'_>, name: &'static str, concerned: bool, rules: Vec<Rule>) -> Option<Vec<Rule>> {
    match (concerned, rules.is_empty()) {
        (true, false) => Some(rules),
        (true, true) => {
            let location = object
                .field(name)
                .map_or_else(|| object.at.location(), |at| at.location());
            Some(vec![Rule {
                peers: Peers::None,
                ports: Ports::Any,
                requires: Vec::new(),
                auth_required: false,
                location,
            }])
        }
        (false, empty) => {
            if !empty && let Some(at) = object.field(name) {
                at.warning(format!(
                    "these rules do nothing: policyTypes does not name {name}"
                ));
            }
            None
        }
    }
}

fn rule(at: At<'_>, peers_name: &'static str, namespace: &str) -> Option<Rule> {
    let object = at.object()?;
    let peers = object.field(peers_name).and_then(|at| at.list());
    let peers = match peers {
        Some(list) if !list.is_empty() => Peers::OneOf(list.read(|at| peer(at, namespace))),
        // No list of peers, or an empty one, selects every peer.
        _ => Peers::OneOf(vec![Peer::Entity(Entity::All)]),
    };
    let ports = match object.field("ports").and_then(|at| at.list()) {
        Some(list) if !list.is_empty() => Ports::OneOf(list.read(network_policy_port)),
        _ => Ports::Any,
    };
    object.warn_null(&[peers_name, "ports"]);
    object.finish();
    Some(Rule {
        peers,
        ports,
        requires: Vec::new(),
        auth_required: false,
        location: at.location(),
    })
}

fn peer(at: At<'_>, namespace: &str) -> Option<Peer> {
    let object = at.object()?;
    let (pods, namespaces) = (object.field("podSelector"), object.field("namespaceSelector"));
    let block = object.field("ipBlock");
    object.finish();
    match (pods, namespaces, block) {
        (None, None, Some(block)) => ip_block(block),
        (_, _, Some(block)) => {
            block.error("ipBlock cannot be combined with a selector; write a peer for each");
            None
        }
        (None, None, None) => {
            at.error("one of podSelector, namespaceSelector and ipBlock is needed");
            None
        }
        (pods, namespaces, None) => {
            let mut requirements = Vec::new();
            match namespaces {
                Some(at) => {
                    requirements.extend(selector::read(at, Keys::Namespace)?.requirements);
                    // `namespaceSelector` selects pods, and each pod has a namespace. Without this requirement, a
                    // selector that only excludes labels would also match the world.
                    requirements.push(selector::has_namespace());
                }
                None => requirements.push(selector::in_namespace(namespace)),
            }
            if let Some(at) = pods {
                requirements.extend(selector::read(at, Keys::Of("k8s"))?.requirements);
            }
            Some(Peer::Labels(Selector { requirements }))
        }
    }
}
