//! Makes and repairs the proxy links, over which the packets of intercepted connections go to the proxy.

use std::sync::Arc;

use palisade_abi::{Config as DatapathConfig, Inspector};
use palisade_datapath::{Datapath, ProxyLinks, proxy_link_names};
use tracing::{error, info, warn};

use super::network::Network;
use crate::config::Config;

/// Largest MTU of the links, bytes: every Ethernet network carries packets of this size.
const MAX_MTU: u32 = 1_500;

/// Returns the names of Palisade's own interfaces: both ends of the punt link, and the node's ends of the proxy links.
pub(super) fn own_interfaces(config: &Config) -> [String; 4] {
    let name = &config.worker.interface;
    let [ingress, egress] = proxy_link_names(name);
    [format!("{name}0"), format!("{name}1"), ingress, egress]
}

/// The proxy links of the daemon.
#[derive(Debug, Default)]
pub(super) struct ProxyLink {
    /// Name of the punt link without the digit of its end.
    name: String,
    links: Option<Arc<ProxyLinks>>,
    problem: Option<String>,
}

impl ProxyLink {
    /// Makes the links. If that fails, [`Self::repair`] tries again; until then the programs drop
    /// packets of intercepted flows.
    pub(super) fn start(config: &Config, datapath: &Datapath, network: &Network) -> Self {
        let mut made = Self {
            name: config.worker.interface.clone(),
            ..Self::default()
        };
        made.make(config, datapath, network);
        made
    }

    /// Makes the links anew if one of them was deleted or moved, or could not be made before, and sets an end up that
    /// was set down. Returns whether the links are new: their indexes must then be written into the datapath
    /// configuration, and the proxy needs listeners in the new namespaces.
    pub(super) fn repair(&mut self, config: &Config, datapath: &Datapath, network: &Network) -> bool {
        if let Some(links) = &self.links {
            // The kernel is asked, because `network` can be older than the links: it is updated by netlink messages
            // that wait in a queue.
            match links.repair() {
                Ok(Some(0)) => return false,
                Ok(Some(ends)) => {
                    info!(ends, "ends of the proxy links were down and are set up");
                    return false;
                }
                Ok(None) => {}
                Err(problem) => {
                    warn!(error = %problem, "the proxy links cannot be checked");
                    return false;
                }
            }
            // The namespaces of the former links must be gone before new links can have the same names.
            self.links = None;
        }
        self.make(config, datapath, network)
    }

    /// Makes the links. Returns whether that succeeded.
    fn make(&mut self, config: &Config, datapath: &Datapath, network: &Network) -> bool {
        let name = &self.name;
        match datapath.proxy_links(name, mtu(config, network)) {
            Ok(links) => {
                info!(
                    interfaces = proxy_link_names(name).join(", "),
                    "the proxy links are made"
                );
                self.links = Some(Arc::new(links));
                self.problem = None;
                true
            }
            Err(problem) => {
                let problem = problem.to_string();
                if self.problem.as_ref() != Some(&problem) {
                    error!(
                        error = problem,
                        "the proxy links cannot be made; intercepted connections are dropped"
                    );
                }
                self.problem = Some(problem);
                false
            }
        }
    }

    /// Fills in the fields of the datapath configuration that concern the proxy: the links, and that TLS termination is
    /// available. Without links it is still available, and the packets are dropped with their own reason (253).
    pub(super) fn fill_datapath_config(&self, config: &mut DatapathConfig) {
        config.inspectors |= 1 << Inspector::TlsTerminate as u32;
        config.proxy_ifindex = self.links.as_ref().map_or([0; 2], |links| links.ifindexes());
    }

    /// Returns the links, for the proxy.
    pub(super) fn links(&self) -> Option<Arc<ProxyLinks>> {
        self.links.clone()
    }

    /// Returns why there are no links; `None` if there are.
    pub(super) fn missing(&self) -> Option<String> {
        let problem = self.problem.as_ref()?;
        Some(format!(
            "no proxy links, intercepted connections are dropped: {problem}"
        ))
    }
}

/// Returns the largest MTU that every configured interface has.
fn mtu(config: &Config, network: &Network) -> u32 {
    let names = config
        .interfaces
        .iter()
        .map(|interface| &interface.name)
        .chain(config.endpoints.iter().map(|endpoint| &endpoint.interface));
    names
        .filter_map(|name| network.mtus.get(&network.ifindex(name)?))
        .copied()
        .min()
        .unwrap_or(MAX_MTU)
        .min(MAX_MTU)
}
