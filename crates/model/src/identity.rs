//! Label sets of identities: prefixes, entities, learned selectors.

use ipnet::IpNet;

use crate::{
    inventory::Options,
    labels::{Labels, reserved},
    rule::Label,
};

/// Returns whether the labels belong to a combined learned identity: they hold several `fqdn` labels, or one `fqdn`
/// label and a label that is neither `fqdn` nor `reserved`, such as that of a prefix. An identity with one `fqdn` label
/// and the label of the world is not combined.
#[must_use]
pub fn is_combined(labels: &Labels) -> bool {
    let names = labels.iter().filter(|label| label.source == "fqdn").count();
    names > 1
        || (names == 1
            && labels
                .iter()
                .any(|label| label.source != "fqdn" && label.source != "reserved"))
}

/// Returns the label of a prefix, such as `cidr:10.0.0.0/8`.
#[must_use]
pub fn cidr_label(prefix: IpNet) -> Label {
    Label {
        source: "cidr".into(),
        key: prefix.trunc().to_string(),
        value: String::new(),
    }
}

/// Returns the prefix of a `cidr` label; `None` if the label is not a valid `cidr` label. In an IPv6 prefix, dashes can
/// replace the colons (`2001-db8--0/32`).
#[must_use]
pub fn cidr_of(label: &Label) -> Option<IpNet> {
    if label.source != "cidr" {
        return None;
    }
    label
        .key
        .parse()
        .or_else(|_| label.key.replace('-', ":").parse())
        .ok()
}

/// Returns the labels of an address that only a prefix of a policy identifies: the label of the world and the label of
/// the prefix. A prefix of length 0 has only the label of the world.
#[must_use]
pub fn prefix_labels(prefix: IpNet, options: &Options) -> Labels {
    let v6 = matches!(prefix, IpNet::V6(_));
    if prefix.prefix_len() == 0 {
        return options.world_labels(v6);
    }
    Labels::new(
        options
            .world_labels(v6)
            .iter()
            .cloned()
            .chain([cidr_label(prefix)]),
    )
}

/// Returns the labels of a peer that the configuration declares as an entity.
#[must_use]
pub fn entity_labels(name: &str) -> Labels {
    Labels::new([reserved(name)])
}
