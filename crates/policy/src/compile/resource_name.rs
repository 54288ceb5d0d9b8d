//! Names of resources. Only one file is allowed to define a resource.

use std::fmt;

use palisade_model::{
    diagnostic::Diagnostic,
    rule::{Location, PolicyKind},
};

use super::spec::FileContent;

/// Unique name of a resource: kind, namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceName {
    kind: &'static str,
    name: String,
}

impl fmt::Display for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

impl FileContent {
    /// Returns the resources of the file with their places. Bare rules of case files have no names and are left out.
    pub fn resources(&self) -> impl Iterator<Item = (ResourceName, &Location)> {
        let policies = self.policies.iter().filter_map(|policy| {
            let kind = match policy.kind {
                PolicyKind::Cnp => "CiliumNetworkPolicy",
                PolicyKind::Ccnp => "CiliumClusterwideNetworkPolicy",
                PolicyKind::Knp => "NetworkPolicy",
                PolicyKind::Raw | PolicyKind::Failsafe => return None,
            };
            let name = policy.qualified_name();
            Some((ResourceName { kind, name }, &policy.location))
        });
        let groups = self.cidr_groups.iter().map(|group| {
            let name = group.name.clone();
            let kind = "CiliumCIDRGroup";
            (ResourceName { kind, name }, &group.location)
        });
        policies.chain(groups)
    }
}

/// Returns the error about a resource that another file already has.
#[must_use]
pub fn already_there(name: &ResourceName, location: &Location, first: &Location) -> Diagnostic {
    Diagnostic::error(
        location.clone(),
        format!("{name} is already in {first}, which stays in force; delete one of the two, or rename it"),
    )
}
