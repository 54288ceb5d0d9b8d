//! Puts the workloads that are found in force: the control thread's part of [`super::discover`].

use std::{net::IpAddr, time::Instant};

use tracing::{error, info};

use super::{
    control::Control,
    discover::{labelled, resolve, same_runs},
    state::NODE,
};

impl Control {
    /// Takes the report of the sources.
    pub(super) fn workloads_reported(&mut self) {
        if self.discovery.take() {
            self.find_workloads(false);
        }
    }

    /// Removes endpoints that the configuration or the sources no longer allow, without putting that in force.
    pub(super) fn drop_workloads(&mut self) {
        let outcome = resolve(&self.config, &self.network, &self.discovery, &self.state.state);
        self.state.state.discovered = same_runs(&outcome, &self.state.state.discovered);
    }

    /// Makes endpoints of the workloads that are found, and puts them in force. `is_start`: whether this is the first time.
    pub(super) fn find_workloads(&mut self, is_start: bool) {
        let begun = Instant::now();
        let labelled = labelled(&self.discovery, &self.state.state);
        if self.state.state.labelled != labelled {
            self.state.state.labelled = labelled;
            self.changed();
        }
        let outcome = resolve(&self.config, &self.network, &self.discovery, &self.state.state);
        for problem in self.discovery.set_problems(&outcome.problems) {
            if !problem.is_pending {
                error!(
                    workload = problem.source,
                    problem = problem.message,
                    "a workload is not guarded as an endpoint and stays denied"
                );
            }
        }
        let before = self.state.state.discovered.clone();
        if outcome.found == before {
            return;
        }
        let kept = same_runs(&outcome, &before);
        for (name, found) in before.iter().filter(|(name, _)| !kept.contains_key(*name)) {
            info!(
                event = "workload-gone",
                endpoint = name,
                source = found.source(),
                interface = found.interface,
                "a workload is gone"
            );
        }
        // What is gone is removed first, so that its connections and learned names are forgotten before another endpoint,
        // or another run under the same name, can get its number.
        if kept.len() != before.len() {
            self.state.state.discovered.clone_from(&kept);
            self.put_workloads_in_force(begun, false);
        }
        if outcome.found == self.state.state.discovered {
            return;
        }
        for (name, found) in outcome.found.iter().filter(|(name, _)| !kept.contains_key(*name)) {
            info!(
                event = "workload-found",
                endpoint = name,
                source = found.source(),
                interface = found.interface,
                addresses = list(&found.addresses),
                labels = %found.labels,
                "a workload is found"
            );
        }
        self.state.state.discovered = outcome.found;
        self.put_workloads_in_force(begun, is_start);
    }

    /// Compiles the found workloads and attaches the programs. With `is_start`, the connections of all found endpoints
    /// that the state file did not have are forgotten before the programs are attached: a daemon that was killed can
    /// have given the number to a workload, without saving it, that is gone.
    fn put_workloads_in_force(&mut self, begun: Instant, is_start: bool) {
        let known = self.state.state.endpoints.clone();
        if let Err(problem) = self.update_inventory(begun) {
            error!(
                error = format!("{problem:#}"),
                "the found workloads cannot be put in force"
            );
        }
        if is_start {
            let numbers = &self.state.state.endpoints;
            let found = self.state.state.discovered.keys();
            let new = found.filter(|name| !known.contains_key(*name));
            let new: Vec<u16> = new.filter_map(|name| numbers.get(name)).copied().collect();
            self.forget_connections(&new);
        }
        self.attach();
    }

    /// Returns where an endpoint comes from: `config`, `netns:NAME`.
    pub(super) fn source_of(&self, id: u16, name: &str) -> String {
        match self.state.state.discovered.get(name) {
            Some(found) if id != NODE => found.source(),
            _ => "config".to_owned(),
        }
    }
}

fn list(addresses: &[IpAddr]) -> String {
    let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    texts.join(",")
}
