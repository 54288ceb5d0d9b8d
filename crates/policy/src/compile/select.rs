//! Selectors: the identities that a peer of a rule selects.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;
use palisade_abi::Identity;
use palisade_model::{
    identity::cidr_of,
    labels::Labels,
    rule::{CidrGroup, CidrRule, Entity, FqdnPattern, Peer, Selector, Test},
};

/// Label with the name of the cluster: source, key, and the value of this cluster.
const CLUSTER_LABEL: (&str, &str, &str) = ("k8s", "io.cilium.k8s.policy.cluster", "default");

/// A peer with its groups of prefixes resolved.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum ResolvedSelector {
    Any,
    Labels(Selector),
    Nodes(Selector),
    Entity(Entity),
    Cidrs(Vec<CidrRule>),
    Fqdn(String),
}

impl ResolvedSelector {
    pub(super) fn of(peer: &Peer, groups: &[&CidrGroup]) -> Self {
        let expand = |group: &CidrGroup, except: &[IpNet]| -> Vec<CidrRule> {
            let cidrs = group.cidrs.iter();
            cidrs
                .map(|cidr| CidrRule {
                    cidr: *cidr,
                    except: except.to_vec(),
                })
                .collect()
        };
        match peer {
            Peer::Labels(selector) if selector.requirements.is_empty() => Self::Any,
            Peer::Labels(selector) => Self::Labels(selector.clone()),
            Peer::Nodes(selector) => Self::Nodes(selector.clone()),
            Peer::Entity(Entity::All) => Self::Any,
            Peer::Entity(entity) => Self::Entity(*entity),
            Peer::Cidr(rule) => Self::Cidrs(vec![rule.clone()]),
            Peer::CidrGroup { name, except } => {
                let named = groups.iter().filter(|group| group.name == *name);
                Self::Cidrs(named.flat_map(|group| expand(group, except)).collect())
            }
            Peer::CidrGroupSelector { selector, except } => {
                let selected = groups
                    .iter()
                    .filter(|group| selector.matches(&group_labels(group)));
                Self::Cidrs(selected.flat_map(|group| expand(group, except)).collect())
            }
            Peer::Fqdn(FqdnPattern::Name(name) | FqdnPattern::Pattern(name)) => Self::Fqdn(name.clone()),
        }
    }

    /// Returns the prefixes of the selector, including excluded ones.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = IpNet> + '_ {
        let rules = match self {
            Self::Cidrs(rules) => rules.as_slice(),
            _ => &[],
        };
        rules
            .iter()
            .flat_map(|rule| std::iter::once(rule.cidr).chain(rule.except.iter().copied()))
    }

    /// Returns whether the selector has a requirement with a key for which `is_known` returns true.
    pub(super) fn requires_key(&self, is_known: impl Fn(&str) -> bool) -> bool {
        match self {
            Self::Labels(selector) | Self::Nodes(selector) => selector
                .requirements
                .iter()
                .any(|requirement| is_known(&requirement.key)),
            _ => false,
        }
    }

    /// Returns whether the selector matches an identity with these labels.
    pub(super) fn matches(&self, labels: &Labels) -> bool {
        match self {
            Self::Any => true,
            Self::Labels(selector) => selector.matches(labels),
            Self::Nodes(selector) => {
                (labels.has_reserved("remote-node") || labels.has_reserved("host"))
                    && selector.matches(labels)
            }
            Self::Entity(entity) => entity_matches(*entity, labels),
            Self::Cidrs(rules) => rules.iter().any(|rule| {
                covers(rule.cidr, labels) && !rule.except.iter().any(|except| contains(*except, labels))
            }),
            Self::Fqdn(name) => labels
                .iter()
                .any(|label| label.source == "fqdn" && normal_name(&label.key) == *name),
        }
    }
}

/// Returns the labels of a group of prefixes in the form that selectors match.
fn group_labels(group: &CidrGroup) -> Labels {
    Labels::new(
        group
            .labels
            .iter()
            .map(|(key, value)| palisade_model::rule::Label {
                source: "cidrgroup".into(),
                key: key.clone(),
                value: value.clone(),
            }),
    )
}

fn normal_name(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// Returns whether a prefix contains the prefix of an identity.
fn contains(prefix: IpNet, labels: &Labels) -> bool {
    labels
        .iter()
        .any(|label| cidr_of(label).is_some_and(|cidr| prefix.contains(&cidr)))
}

/// Returns whether a prefix contains the addresses of an identity. Only `/0` contains a world identity without a
/// prefix.
fn covers(prefix: IpNet, labels: &Labels) -> bool {
    let own_world = match prefix {
        IpNet::V4(_) => "world-ipv4",
        IpNet::V6(_) => "world-ipv6",
    };
    contains(prefix, labels)
        || (prefix.prefix_len() == 0 && (labels.has_reserved("world") || labels.has_reserved(own_world)))
}

fn entity_matches(entity: Entity, labels: &Labels) -> bool {
    let has = |key| labels.has_reserved(key);
    match entity {
        Entity::All => true,
        Entity::World => has("world") || has("world-ipv4") || has("world-ipv6"),
        Entity::WorldIpv4 => has("world-ipv4"),
        Entity::WorldIpv6 => has("world-ipv6"),
        Entity::Cluster => {
            labels.iter().any(|label| match label.source.as_str() {
                "reserved" => matches!(
                    label.key.as_str(),
                    "host" | "remote-node" | "init" | "ingress" | "health" | "unmanaged" | "kube-apiserver"
                ),
                _ => false,
            }) || (is_labelled(labels)
                && labels
                    .get(CLUSTER_LABEL.0, CLUSTER_LABEL.1)
                    .is_none_or(|cluster| cluster == CLUSTER_LABEL.2))
        }
        Entity::Host => has("host"),
        Entity::RemoteNode => has("remote-node"),
        Entity::KubeApiserver => has("kube-apiserver"),
        Entity::Health => has("health"),
        Entity::Init => has("init"),
        Entity::Unmanaged => has("unmanaged"),
        Entity::Ingress => has("ingress"),
        Entity::None => false,
    }
}

/// Returns whether the labels are those of an endpoint or of a labelled peer outside the world.
fn is_labelled(labels: &Labels) -> bool {
    !entity_matches(Entity::World, labels)
        && labels
            .iter()
            .any(|label| !matches!(label.source.as_str(), "reserved" | "cidr" | "cidrgroup" | "fqdn"))
}

/// The existing identities, indexed by labels and prefixes.
#[derive(Clone, Debug, Default)]
pub(super) struct IdentityIndex {
    labels: BTreeMap<Identity, Labels>,
    by_label: HashMap<String, HashMap<String, BTreeSet<Identity>>>,
    /// Address family (whether IPv6), first address and length of each `cidr` label, with the identity that has the
    /// label.
    by_prefix: BTreeSet<(bool, u128, u8, Identity)>,
}

impl IdentityIndex {
    pub(super) fn labels(&self) -> &BTreeMap<Identity, Labels> {
        &self.labels
    }

    pub(super) fn add(&mut self, identity: Identity, labels: Labels) {
        for label in labels.iter() {
            self.by_label
                .entry(label.key.clone())
                .or_default()
                .entry(label.value.clone())
                .or_default()
                .insert(identity);
            if let Some(cidr) = cidr_of(label) {
                let (v6, first) = first_address(cidr);
                self.by_prefix.insert((v6, first, cidr.prefix_len(), identity));
            }
        }
        self.labels.insert(identity, labels);
    }

    pub(super) fn remove(&mut self, identity: Identity) {
        let Some(labels) = self.labels.remove(&identity) else {
            return;
        };
        for label in labels.iter() {
            if let Some(values) = self.by_label.get_mut(&label.key) {
                if let Some(identities) = values.get_mut(&label.value) {
                    identities.remove(&identity);
                    if identities.is_empty() {
                        values.remove(&label.value);
                    }
                }
                if values.is_empty() {
                    self.by_label.remove(&label.key);
                }
            }
            if let Some(cidr) = cidr_of(label) {
                let (v6, first) = first_address(cidr);
                self.by_prefix.remove(&(v6, first, cidr.prefix_len(), identity));
            }
        }
    }

    /// Returns the existing identities that a selector matches.
    pub(super) fn select(&self, resolved: &ResolvedSelector) -> BTreeSet<Identity> {
        let candidates: Option<BTreeSet<Identity>> = match resolved {
            ResolvedSelector::Labels(selector) => self.candidates(selector),
            ResolvedSelector::Nodes(_) => Some(
                ["remote-node", "host"]
                    .into_iter()
                    .flat_map(|key| self.with_label(key, ""))
                    .collect(),
            ),
            ResolvedSelector::Cidrs(rules) => {
                Some(rules.iter().flat_map(|rule| self.inside(rule.cidr)).collect())
            }
            ResolvedSelector::Any | ResolvedSelector::Entity(_) | ResolvedSelector::Fqdn(_) => None,
        };
        let matches = |identity: &Identity| {
            self.labels
                .get(identity)
                .is_some_and(|labels| resolved.matches(labels))
        };
        match candidates {
            Some(candidates) => candidates.into_iter().filter(matches).collect(),
            None => self.labels.keys().copied().filter(matches).collect(),
        }
    }

    fn with_label(&self, key: &str, value: &str) -> impl Iterator<Item = Identity> {
        self.by_label
            .get(key)
            .and_then(|values| values.get(value))
            .into_iter()
            .flatten()
            .copied()
    }

    /// Returns a superset of the identities that the selector matches: the identities that meet the positive
    /// requirement (`In` or `Exists`) with the fewest matches. `None` if the selector has no positive requirement.
    fn candidates(&self, selector: &Selector) -> Option<BTreeSet<Identity>> {
        let count = |key: &str, values: &[String]| -> usize {
            let Some(known) = self.by_label.get(key) else {
                return 0;
            };
            values
                .iter()
                .filter_map(|value| known.get(value))
                .map(BTreeSet::len)
                .sum()
        };
        let rarest = selector
            .requirements
            .iter()
            .filter_map(|requirement| match &requirement.test {
                Test::In(values) => Some((count(&requirement.key, values), requirement, Some(values))),
                Test::Exists => {
                    let known = self.by_label.get(&requirement.key);
                    let size = known.map_or(0, |values| values.values().map(BTreeSet::len).sum());
                    Some((size, requirement, None))
                }
                Test::NotIn(_) | Test::DoesNotExist => None,
            })
            .min_by_key(|(size, _, _)| *size)?;
        let (_, requirement, values) = rarest;
        Some(match values {
            Some(values) => values
                .iter()
                .flat_map(|value| self.with_label(&requirement.key, value))
                .collect(),
            None => self
                .by_label
                .get(&requirement.key)
                .into_iter()
                .flat_map(HashMap::values)
                .flatten()
                .copied()
                .collect(),
        })
    }

    fn inside(&self, prefix: IpNet) -> Vec<Identity> {
        let (v6, first) = first_address(prefix);
        let size = match prefix {
            IpNet::V4(net) => (1u128 << (32 - net.prefix_len())) - 1,
            IpNet::V6(net) => u128::MAX.checked_shr(u32::from(net.prefix_len())).unwrap_or(0),
        };
        let mut found: Vec<Identity> = self
            .by_prefix
            .range((v6, first, 0, 0)..=(v6, first | size, u8::MAX, Identity::MAX))
            .map(|(_, _, _, identity)| *identity)
            .collect();
        if prefix.prefix_len() == 0 {
            for key in ["world", "world-ipv4", "world-ipv6"] {
                found.extend(self.with_label(key, ""));
            }
        }
        found
    }
}

fn first_address(prefix: IpNet) -> (bool, u128) {
    match prefix.network() {
        IpAddr::V4(address) => (false, u128::from(u32::from(address))),
        IpAddr::V6(address) => (true, u128::from(address)),
    }
}

#[cfg(test)]
mod tests {
    use palisade_model::{
        labels::parse_label,
        rule::{LabelSource, Requirement},
    };

    use super::*;

    fn labels(texts: &[&str]) -> Labels {
        Labels::new(texts.iter().map(|text| parse_label(text)))
    }

    fn known() -> IdentityIndex {
        let mut known = IdentityIndex::default();
        for (number, texts) in [
            (1, vec!["reserved:host", "k8s:zone=a"]),
            (9, vec!["reserved:world-ipv4"]),
            (2, vec!["reserved:world"]),
            (300, vec!["k8s:app=a", "k8s:tier=x"]),
            (301, vec!["k8s:app=b"]),
            (20_000_000, vec!["cidr:10.0.0.0/8", "reserved:world-ipv4"]),
            (20_000_001, vec!["cidr:10.1.0.0/16", "reserved:world-ipv4"]),
            (20_000_002, vec!["cidr:2001-db8--0/32", "reserved:world-ipv6"]),
            (20_000_003, vec!["fqdn:*.example.com", "reserved:world"]),
        ] {
            known.add(number, labels(&texts));
        }
        known
    }

    fn cidrs(cidr: &str, except: &[&str]) -> ResolvedSelector {
        ResolvedSelector::Cidrs(vec![CidrRule {
            cidr: cidr.parse().unwrap(),
            except: except.iter().map(|text| text.parse().unwrap()).collect(),
        }])
    }

    fn found(resolved: &ResolvedSelector) -> Vec<Identity> {
        known().select(resolved).into_iter().collect()
    }

    #[test]
    fn prefixes_select_only_addresses_identified_by_a_prefix() {
        assert_eq!(found(&cidrs("10.0.0.0/8", &[])), [20_000_000, 20_000_001]);
        assert_eq!(found(&cidrs("10.0.0.0/8", &["10.1.0.0/16"])), [20_000_000]);
        assert_eq!(found(&cidrs("10.1.0.0/24", &[])), [] as [u32; 0]);
        assert_eq!(
            found(&cidrs("0.0.0.0/0", &["10.0.0.0/8"])),
            [2, 9, 20_000_003],
            "a bare world is in /0 whatever is excluded"
        );
        assert_eq!(found(&cidrs("::/0", &[])), [2, 20_000_002, 20_000_003]);
    }

    #[test]
    fn the_index_selects_what_selectors_match() {
        let selectors = [
            ("app", Test::In(vec!["a".into(), "b".into()])),
            ("app", Test::NotIn(vec!["a".into()])),
            ("app", Test::Exists),
            ("app", Test::DoesNotExist),
        ];
        for (key, test) in selectors {
            let resolved = ResolvedSelector::Labels(Selector {
                requirements: vec![Requirement {
                    source: LabelSource::Any,
                    key: key.into(),
                    test,
                }],
            });
            let known = known();
            let one_by_one: BTreeSet<Identity> = known
                .labels()
                .iter()
                .filter(|(_, labels)| resolved.matches(labels))
                .map(|(number, _)| *number)
                .collect();
            assert_eq!(known.select(&resolved), one_by_one);
            assert!(!one_by_one.is_empty());
        }
    }

    #[test]
    fn removed_identities_are_not_selected() {
        let mut known = known();
        known.remove(300);
        known.remove(20_000_001);
        assert_eq!(known.select(&cidrs("10.0.0.0/8", &[])).len(), 1);
        assert!(
            known
                .select(&ResolvedSelector::Entity(Entity::Cluster))
                .iter()
                .eq([1, 301].iter())
        );
    }

    #[test]
    fn fqdn_labels_compare_without_case_and_trailing_dot() {
        assert_eq!(
            found(&ResolvedSelector::Fqdn("*.example.com".into())),
            [20_000_003]
        );
    }
}
