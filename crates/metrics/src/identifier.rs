//! What a context label shows of an end of a flow.

/// What a context label shows of an end of a flow.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Identifier {
    Identity,
    Namespace,
    Pod,
    PodShort,
    PodName,
    Dns,
    Ip,
    ReservedIdentity,
    Workload,
    WorkloadName,
    App,
}

impl Identifier {
    pub(crate) const ALL: [(&str, Self); 11] = [
        ("identity", Self::Identity),
        ("namespace", Self::Namespace),
        ("pod", Self::Pod),
        ("pod-short", Self::PodShort),
        ("pod-name", Self::PodName),
        ("dns", Self::Dns),
        ("ip", Self::Ip),
        ("reserved-identity", Self::ReservedIdentity),
        ("workload", Self::Workload),
        ("workload-name", Self::WorkloadName),
        ("app", Self::App),
    ];

    /// Returns whether the daemon knows when the shown end ceases to exist: for its endpoints, peers and identities and
    /// their addresses, but not for names of hosts in the world, and never for reserved identities.
    pub(crate) const fn can_end(self) -> bool {
        !matches!(self, Self::Dns | Self::ReservedIdentity)
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        let mut all = Self::ALL.iter();
        all.find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, it)| *it)
    }
}
