//! The labels that identities consist of: prefixes, entities, learned selectors.

use ipnet::IpNet;

use crate::{
    inventory::Options,
    labels::{Labels, reserved},
    rule::Label,
};

/// Returns whether labels are those of a learned address other than one selector on the bare world: of several selectors,
/// or of one on a prefix that a policy names.
#[must_use]
pub fn is_combined(labels: &Labels) -> bool {
    let names = labels.iter().filter(|label| label.source == "fqdn").count();
    names > 1
        || (names == 1
            && labels
                .iter()
                .any(|label| label.source != "fqdn" && label.source != "reserved"))
}

/// The label of a prefix: `cidr:10.0.0.0/8`.
#[must_use]
pub fn cidr_label(prefix: IpNet) -> Label {
    Label {
        source: "cidr".into(),
        key: prefix.trunc().to_string(),
        value: String::new(),
    }
}

/// The prefix of a `cidr` label. The dashed form of IPv6 (`2001-db8--0/32`) is understood too.
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

/// The labels of an address that is only known by its longest prefix among those that policies mention.
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

/// The labels of an entity that a peer of the configuration can be.
#[must_use]
pub fn entity_labels(name: &str) -> Labels {
    Labels::new([reserved(name)])
}
