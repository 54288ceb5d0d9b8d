//! Peers of rules as short texts.

use ipnet::IpNet;
use palisade_model::rule::{Entity, FqdnPattern, LabelSource, Peer, Requirement, Selector, Test};

/// Returns a peer as text: `k8s:app=web,tier in (a, b)`, `cidr:10.0.0.0/8 except 10.1.0.0/16`, `entity:world`.
pub(super) fn peer_text(peer: &Peer) -> String {
    match peer {
        Peer::Labels(selector) => selector_text(selector),
        Peer::Nodes(selector) => format!("nodes:{}", selector_text(selector)),
        Peer::Entity(entity) => format!("entity:{}", entity_name(*entity)),
        Peer::Cidr(rule) => format!("cidr:{}{}", rule.cidr, except_text(&rule.except)),
        Peer::CidrGroup { name, except } => format!("cidrgroup:{name}{}", except_text(except)),
        Peer::CidrGroupSelector { selector, except } => {
            format!("cidrgroups:{}{}", selector_text(selector), except_text(except))
        }
        Peer::Fqdn(FqdnPattern::Name(name) | FqdnPattern::Pattern(name)) => format!("fqdn:{name}"),
    }
}

fn except_text(except: &[IpNet]) -> String {
    if except.is_empty() {
        return String::new();
    }
    let list: Vec<String> = except.iter().map(ToString::to_string).collect();
    format!(" except {}", list.join(", "))
}

fn selector_text(selector: &Selector) -> String {
    if selector.requirements.is_empty() {
        return "everything".to_owned();
    }
    let list: Vec<String> = selector.requirements.iter().map(requirement_text).collect();
    list.join(",")
}

fn requirement_text(requirement: &Requirement) -> String {
    let source = match &requirement.source {
        LabelSource::Any => String::new(),
        LabelSource::Named(source) => format!("{source}:"),
    };
    let key = format!("{source}{}", requirement.key);
    match &requirement.test {
        Test::In(values) => match values.as_slice() {
            [value] if value.is_empty() => key,
            [value] => format!("{key}={value}"),
            values => format!("{key} in ({})", values.join(", ")),
        },
        Test::NotIn(values) => match values.as_slice() {
            [value] => format!("{key}!={value}"),
            values => format!("{key} notin ({})", values.join(", ")),
        },
        Test::Exists => format!("{key} exists"),
        Test::DoesNotExist => format!("!{key}"),
    }
}

const fn entity_name(entity: Entity) -> &'static str {
    match entity {
        Entity::All => "all",
        Entity::World => "world",
        Entity::WorldIpv4 => "world-ipv4",
        Entity::WorldIpv6 => "world-ipv6",
        Entity::Cluster => "cluster",
        Entity::Host => "host",
        Entity::RemoteNode => "remote-node",
        Entity::KubeApiserver => "kube-apiserver",
        Entity::Health => "health",
        Entity::Init => "init",
        Entity::Unmanaged => "unmanaged",
        Entity::Ingress => "ingress",
        Entity::None => "none",
    }
}

#[cfg(test)]
mod tests {
    use palisade_model::rule::CidrRule;

    use super::*;

    #[test]
    fn selectors_have_the_syntax_of_kubernetes() {
        let requirement = |source: Option<&str>, key: &str, test| Requirement {
            source: source.map_or(LabelSource::Any, |source| LabelSource::Named(source.into())),
            key: key.into(),
            test,
        };
        let list = |values: &[&str]| values.iter().map(ToString::to_string).collect::<Vec<_>>();
        let selector = Selector {
            requirements: vec![
                requirement(None, "app", Test::In(list(&["web"]))),
                requirement(Some("k8s"), "tier", Test::In(list(&["a", "b"]))),
                requirement(None, "old", Test::DoesNotExist),
                requirement(None, "zone", Test::NotIn(list(&["x"]))),
            ],
        };
        assert_eq!(
            peer_text(&Peer::Labels(selector)),
            "app=web,k8s:tier in (a, b),!old,zone!=x"
        );
        assert_eq!(peer_text(&Peer::Labels(Selector::default())), "everything");
        let net = |text: &str| text.parse().unwrap();
        let rule = CidrRule {
            cidr: net("10.0.0.0/8"),
            except: vec![net("10.1.0.0/16")],
        };
        assert_eq!(peer_text(&Peer::Cidr(rule)), "cidr:10.0.0.0/8 except 10.1.0.0/16");
        assert_eq!(peer_text(&Peer::Entity(Entity::RemoteNode)), "entity:remote-node");
    }
}
