//! Names of the metrics in the configuration.

/// A metric of the configuration: Cilium calls it a plugin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Plugin {
    Dns,
    Drop,
    Flow,
    FlowsToWorld,
    Http,
    HttpV2,
    Icmp,
    Kafka,
    Policy,
    PortDistribution,
    Tcp,
}

impl Plugin {
    pub(super) const ALL: [Self; 11] = [
        Self::Dns,
        Self::Drop,
        Self::Flow,
        Self::FlowsToWorld,
        Self::Http,
        Self::HttpV2,
        Self::Icmp,
        Self::Kafka,
        Self::Policy,
        Self::PortDistribution,
        Self::Tcp,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::Drop => "drop",
            Self::Flow => "flow",
            Self::FlowsToWorld => "flows-to-world",
            Self::Http => "http",
            Self::HttpV2 => "httpV2",
            Self::Icmp => "icmp",
            Self::Kafka => "kafka",
            Self::Policy => "policy",
            Self::PortDistribution => "port-distribution",
            Self::Tcp => "tcp",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|plugin| plugin.name() == name)
    }

    /// Returns the options of this metric alone, for messages.
    pub(super) const fn flags(self) -> &'static str {
        match self {
            Self::Dns => ", query, ignoreAAAA",
            Self::FlowsToWorld => ", any-drop, port, syn-only",
            _ => "",
        }
    }
}
