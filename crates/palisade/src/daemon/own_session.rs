//! Commands that would deny the session in which they run: a reload, and the end of an endpoint's audit mode. Those that put
//! a set of policies in force are in [`super::handlers`], and the one that cancels a change in [`changes`].
//!
//! Depends on [`carriers`] for the interfaces of a session. Start at [`Control::sessions_denied_by_reload`].

use std::collections::BTreeSet;

use palisade_datapath::monotonic_coarse;
use palisade_model::inventory::Enforcement;
use palisade_policy::compile::{Changes, Compiler, FAILSAFE_FILE};

use super::{
    carriers::carriers, changes, control::Control, cuts, enforcer::inventory, failsafe, network::Network,
};
use crate::{
    config::{Config, WithoutPolicies},
    control::api::{DeniedSession, Session},
};

impl Control {
    /// Returns in words the sessions that a configuration denies with the policies in force. The present policy files
    /// count as soon as they are saved, whether there is a reload or not, so they are not read here.
    pub(super) fn sessions_denied_by_reload(&self, config: &Config, sessions: &[Session]) -> Option<String> {
        if sessions.is_empty() {
            return None;
        }
        let mut state = self.state.state.without_compiler();
        // The reload itself reports such an error.
        let mut inventory = inventory(config, &self.network, &mut state).ok()?;
        let is_closed = config.node.on_failure == WithoutPolicies::Closed && self.files.unknown().is_some();
        if is_closed && inventory.options.enforcement == Enforcement::Default {
            inventory.options.enforcement = Enforcement::Always;
        }
        let mut compiler = self.enforcer.compiler.clone();
        compiler
            .update(Changes {
                inventory: Some(inventory),
                files: [(FAILSAFE_FILE.to_owned(), Some(failsafe::content(config)))].into(),
            })
            .ok()?;
        let stricter = stricter_at(&self.config, config, &self.network);
        self.newly_denied(&compiler, sessions, |session| {
            uses_one_of(session, &stricter, &self.network)
        })
    }

    /// Returns in words the sessions that the end of an endpoint's audit mode would deny.
    pub(super) fn sessions_denied_without_audit(&self, name: &str, sessions: &[Session]) -> Option<String> {
        if sessions.is_empty() {
            return None;
        }
        let mut state = self.state.state.without_compiler();
        state.audit.remove(name);
        // The command itself reports such an error.
        let mut inventory = inventory(&self.config, &self.network, &mut state).ok()?;
        inventory.options.enforcement = self.enforcer.compiler.inventory().options.enforcement;
        let mut compiler = self.enforcer.compiler.clone();
        let changes = Changes {
            inventory: Some(inventory),
            files: Default::default(),
        };
        compiler.update(changes).ok()?;
        self.newly_denied(&compiler, sessions, |_| false)
    }

    /// Returns in words the sessions that `compiler` denies. One that the policies in force deny goes by an interface
    /// without programs, and will as before unless it `is_affected`.
    pub(super) fn newly_denied(
        &self,
        compiler: &Compiler,
        sessions: &[Session],
        is_affected: impl Fn(&Session) -> bool,
    ) -> Option<String> {
        let before: BTreeSet<Session> = self
            .denied(&self.enforcer.compiler, sessions)
            .iter()
            .map(|denied| denied.session)
            .collect();
        let rows: Vec<String> = self
            .denied(compiler, sessions)
            .iter()
            .filter(|denied| !before.contains(&denied.session) || is_affected(&denied.session))
            .map(|denied| format!("{} ({})", denied.session, denied.decided_by))
            .collect();
        (!rows.is_empty()).then(|| rows.join(", "))
    }

    fn denied(&self, compiler: &Compiler, sessions: &[Session]) -> Vec<DeniedSession> {
        let now = monotonic_coarse();
        changes::denied_sessions(compiler, sessions, |endpoint, session| {
            cuts::of_session(&self.datapath, &self.names, endpoint, session, now)
        })
    }
}

/// Returns the indices of the interfaces at which a configuration can deny what passed there whatever the policies said:
/// those that are guarded only then, and, if `[failsafe]` changes, all NICs.
fn stricter_at(running: &Config, new: &Config, network: &Network) -> BTreeSet<u32> {
    let guarded = |config: &Config| -> BTreeSet<u32> {
        let nics = config.interfaces.iter().map(|nic| &nic.name);
        let endpoints = config.endpoints.iter().map(|endpoint| &endpoint.interface);
        nics.chain(endpoints)
            .filter_map(|name| network.ifindex(name))
            .collect()
    };
    let mut all: BTreeSet<u32> = guarded(new).difference(&guarded(running)).copied().collect();
    if new.failsafe != running.failsafe {
        let nics = new.interfaces.iter();
        all.extend(nics.filter_map(|nic| network.ifindex(&nic.name)));
    }
    all
}

/// Returns whether a session uses one of the interfaces, or an interface that is stacked on one of them. If the kernel
/// does not say which interfaces it uses, the answer is yes.
fn uses_one_of(session: &Session, interfaces: &BTreeSet<u32>, network: &Network) -> bool {
    if interfaces.is_empty() {
        return false;
    }
    let stacked = network.above(interfaces);
    carriers(
        session.local.ip().to_canonical(),
        session.peer.ip().to_canonical(),
    )
    .is_none_or(|used| {
        used.iter()
            .any(|used| interfaces.contains(used) || stacked.contains(used))
    })
}
