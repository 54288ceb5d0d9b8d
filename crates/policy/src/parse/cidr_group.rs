//! `CiliumCIDRGroup`: a named group of prefixes.

use palisade_model::rule::CidrGroup;

use super::{cidr::net, metadata::Metadata, reader::At};

/// Parses the spec of a group.
pub(super) fn read(document: At<'_>, spec: At<'_>, metadata: Metadata<'_>) -> Option<CidrGroup> {
    let object = spec.object()?;
    let cidrs = object
        .required("externalCIDRs")
        .and_then(|at| at.list())
        .map(|list| list.read(net));
    object.finish();
    Some(CidrGroup {
        name: metadata.name.to_owned(),
        labels: metadata.labels,
        cidrs: cidrs?,
        location: document.location(),
    })
}
