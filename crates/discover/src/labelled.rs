//! Interfaces that have led to a workload that a source lists. Its labels are known, so the interface is never again one
//! of a workload that is not known yet: a process could otherwise leave the network namespace of its container, or move
//! its end of the veth to another one, and exchange its policy for that of `reserved:init`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::workload::{Found, INIT, Interface, Workload};

/// Names of these interfaces, by index. While an interface exists, no other one has its index.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Labelled(BTreeMap<u32, String>);

impl Labelled {
    /// Adds the interfaces that lead to workloads.
    pub fn add_workloads(&mut self, workloads: &[Workload]) {
        let links = workloads.iter().flat_map(|workload| &workload.links);
        self.0
            .extend(links.map(|link| (link.ifindex, link.interface.clone())));
    }

    /// Adds the interfaces of endpoints, except those with `reserved:init`.
    pub fn add_found<'a>(&mut self, found: impl IntoIterator<Item = &'a Found>) {
        let labelled = found.into_iter().filter(|found| found.kind != INIT);
        self.0
            .extend(labelled.map(|found| (found.ifindex, found.interface.clone())));
    }

    /// Adds those of another set.
    pub fn add(&mut self, other: &Self) {
        self.0.extend(other.0.clone());
    }

    /// Forgets interfaces that are gone, and follows those that are renamed. `present`: the interfaces of the node.
    pub fn keep_present(&mut self, present: &BTreeMap<u32, String>) {
        self.0.retain(|ifindex, name| {
            let now = present.get(ifindex);
            if let Some(now) = now {
                name.clone_from(now);
            }
            now.is_some()
        });
    }

    /// Forgets interfaces that do not exist under their name. After a boot, others have the same indices.
    pub fn keep_same(&mut self, present: &BTreeMap<u32, String>) {
        self.0.retain(|ifindex, name| present.get(ifindex) == Some(name));
    }

    /// Returns the interfaces that are not in the set.
    #[must_use]
    pub fn others(&self, interfaces: &[Interface]) -> Vec<Interface> {
        let others = interfaces
            .iter()
            .filter(|interface| !self.0.contains_key(&interface.link.ifindex));
        others.cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Link;

    fn link(ifindex: u32, interface: &str) -> Link {
        Link {
            interface: interface.to_owned(),
            ifindex,
            inner: 2,
            addresses: Vec::new(),
        }
    }

    fn others(labelled: &Labelled) -> Vec<u32> {
        let interfaces = [7, 8].map(|ifindex| Interface {
            link: link(ifindex, "veth"),
            namespace: 1,
        });
        let others = labelled.others(&interfaces);
        others.iter().map(|interface| interface.link.ifindex).collect()
    }

    fn present(all: &[(u32, &str)]) -> BTreeMap<u32, String> {
        all.iter()
            .map(|(ifindex, name)| (*ifindex, (*name).to_owned()))
            .collect()
    }

    #[test]
    fn an_interface_of_a_listed_workload_counts_until_the_interface_is_gone() {
        let mut labelled = Labelled::default();
        assert_eq!(others(&labelled), [7, 8]);
        labelled.add_workloads(&[Workload {
            links: vec![link(7, "veth7")],
            ..Workload::default()
        }]);
        // No workload has the interface any more.
        labelled.add_workloads(&[]);
        labelled.keep_present(&present(&[(1, "lo"), (7, "veth7")]));
        assert_eq!(others(&labelled), [8]);
        // Another name does not make it another interface while the daemon runs.
        labelled.keep_present(&present(&[(7, "vethx")]));
        labelled.keep_same(&present(&[(7, "vethx")]));
        assert_eq!(others(&labelled), [8]);
        let mut rebooted = labelled.clone();
        rebooted.keep_same(&present(&[(7, "veth1")]));
        assert_eq!(others(&rebooted), [7, 8]);
        labelled.keep_present(&present(&[(8, "vethx")]));
        assert_eq!(others(&labelled), [7, 8]);
    }

    #[test]
    fn labelled_interfaces_survive_a_restart() {
        let mut labelled = Labelled::default();
        labelled.add_workloads(&[Workload {
            links: vec![link(7, "veth7")],
            ..Workload::default()
        }]);
        let text = serde_json::to_string(&labelled).unwrap();
        assert_eq!(serde_json::from_str::<Labelled>(&text).unwrap(), labelled);
    }

    #[test]
    fn endpoints_with_reserved_init_are_not_labelled() {
        let found = |kind: &str, ifindex: u32| Found {
            name: "web".to_owned(),
            namespace: "default".to_owned(),
            interface: format!("veth{ifindex}"),
            ifindex,
            addresses: Vec::new(),
            labels: palisade_model::labels::Labels::new(Vec::new()),
            kind: kind.to_owned(),
            origin: String::new(),
            id: "web".to_owned(),
            netns: 1,
        };
        let mut labelled = Labelled::default();
        labelled.add_found(&[found(INIT, 7), found("netns", 8)]);
        assert_eq!(others(&labelled), [7]);
    }
}
