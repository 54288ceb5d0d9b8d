//! `palisade reload`. The table [`RULES`] lists which options a reload applies and which need a restart.

use std::time::Instant;

use tracing::{error, info, warn};

use super::{control::Control, watcher::Changes};
use crate::{
    config::{Config, enforcement_name},
    control::api::{PolicyFile, PolicyFileState, ReloadAnswer, Session},
    text::{chain, milliseconds},
};

/// When a changed option takes effect.
#[derive(Clone, Copy)]
enum Effect {
    /// At a reload.
    Reload,
    /// At a restart. The function puts the running value into the new configuration and returns whether the new value
    /// differed.
    Restart(fn(&Config, &mut Config) -> bool),
}

/// Returns the [`Effect::Restart`] for the option in the given field of [`Config`].
macro_rules! restart {
    ($($field:ident).+) => {
        Effect::Restart(|running, new| {
            let differs = running.$($field).+ != new.$($field).+;
            new.$($field).+.clone_from(&running.$($field).+);
            differs
        })
    };
}

/// Section, name and effect of every option. An option needs a restart if it is used only when the daemon starts, for
/// example to size a map, to open a file or a socket, or to configure the inspectors.
const RULES: &[(&str, &str, Effect)] = &[
    ("node", "name", Effect::Reload),
    ("node", "labels", Effect::Reload),
    ("node", "addresses", Effect::Reload),
    ("node", "pin_dir", restart!(node.pin_dir)),
    ("node", "state_dir", restart!(node.state_dir)),
    ("node", "socket", restart!(node.socket)),
    ("node", "on_failure", Effect::Reload),
    ("failsafe", "inbound", Effect::Reload),
    ("failsafe", "outbound", Effect::Reload),
    ("failsafe", "interfaces", Effect::Reload),
    ("policy", "dir", restart!(policy.dir)),
    ("policy", "enforcement", Effect::Reload),
    ("policy", "audit", Effect::Reload),
    ("policy", "allow_localhost", Effect::Reload),
    ("policy", "debounce", restart!(policy.debounce)),
    ("limits", "conntrack", restart!(limits.conntrack)),
    ("limits", "policy", restart!(limits.policy)),
    ("limits", "ipcache", restart!(limits.ipcache)),
    ("limits", "learned", restart!(limits.learned)),
    ("limits", "rules", restart!(limits.rules)),
    ("limits", "fragments", restart!(limits.fragments)),
    ("limits", "events_per_second", Effect::Reload),
    ("limits", "flows", restart!(limits.flows)),
    ("limits", "discovered", Effect::Reload),
    ("timeouts", "tcp_opening", Effect::Reload),
    ("timeouts", "tcp_established", Effect::Reload),
    ("timeouts", "tcp_closing", Effect::Reload),
    ("timeouts", "udp", Effect::Reload),
    ("timeouts", "other", Effect::Reload),
    ("timeouts", "fragment", Effect::Reload),
    ("timeouts", "trace_interval", Effect::Reload),
    ("timeouts", "sweep", Effect::Reload),
    ("dns", "min_ttl", restart!(dns.min_ttl)),
    ("dns", "max_ttl", restart!(dns.max_ttl)),
    ("dns", "addresses_per_name", restart!(dns.addresses_per_name)),
    (
        "dns",
        "addresses_per_endpoint",
        restart!(dns.addresses_per_endpoint),
    ),
    ("dns", "follow_cname", restart!(dns.follow_cname)),
    ("dns", "deny_answer", restart!(dns.deny_answer)),
    ("dns", "prefetch", Effect::Reload),
    ("dns", "servers", Effect::Reload),
    ("dns", "refuse_special", restart!(dns.refuse_special)),
    ("dns", "allow_special", restart!(dns.allow_special)),
    ("http", "path_normalization", restart!(http.paths)),
    ("http", "get_bodies", restart!(http.get_bodies)),
    ("http", "clear_text_http2", Effect::Reload),
    ("http", "header_timeout", restart!(http.header_timeout)),
    ("http", "max_head", restart!(http.head.block)),
    ("http", "max_line", restart!(http.head.line)),
    ("http", "record_headers", restart!(http.record_headers)),
    ("kafka", "max_request", restart!(kafka.max_request)),
    ("kafka", "request_timeout", restart!(kafka.request_timeout)),
    ("kafka", "share_topic_ids", restart!(kafka.share_topic_ids)),
    ("tls", "ech", restart!(tls.ech)),
    ("tls", "hello_timeout", restart!(tls.hello_timeout)),
    ("tls", "verify_sni_address", restart!(tls.verify_sni_address)),
    ("tls", "secrets_dir", restart!(tls.secrets_dir)),
    ("tls", "interception_ca", restart!(tls.interception_ca)),
    ("tls", "no_sni", restart!(tls.no_sni)),
    ("tls", "handshake_timeout", restart!(tls.handshake_timeout)),
    ("tls", "connect_timeout", restart!(tls.connect_timeout)),
    ("tls", "response_timeout", restart!(tls.response_timeout)),
    ("tls", "idle_timeout", restart!(tls.idle_timeout)),
    ("tls", "proxy_threads", restart!(tls.proxy_threads)),
    ("tls", "max_connections", restart!(tls.max_connections)),
    (
        "tls",
        "max_connections_per_endpoint",
        restart!(tls.max_connections_per_endpoint),
    ),
    ("worker", "threads", restart!(worker.threads)),
    ("worker", "mode", restart!(worker.mode)),
    ("worker", "on_failure", Effect::Reload),
    ("worker", "frames", restart!(worker.frames)),
    ("worker", "interface", restart!(worker.interface)),
    ("metrics", "listen", restart!(metrics.listen)),
    ("metrics", "tls_certificate", restart!(metrics.tls)),
    ("metrics", "tls_key", restart!(metrics.tls)),
    ("metrics", "client_ca", restart!(metrics.tls)),
    ("metrics", "hubble", restart!(metrics.hubble)),
    (
        "metrics",
        "series_per_metric",
        restart!(metrics.series_per_metric),
    ),
    ("metrics", "series_grace", restart!(metrics.series_grace)),
    ("hubble", "socket", restart!(hubble.socket)),
    ("hubble", "group", restart!(hubble.group)),
    ("hubble", "listen", restart!(hubble.listen)),
    ("hubble", "tls_certificate", restart!(hubble.tls_certificate)),
    ("hubble", "tls_key", restart!(hubble.tls_key)),
    ("hubble", "client_ca", restart!(hubble.client_ca)),
    ("hubble", "max_readers", restart!(hubble.max_readers)),
    ("namespace", "name", Effect::Reload),
    ("namespace", "labels", Effect::Reload),
    ("interface", "name", Effect::Reload),
    ("interface", "role", Effect::Reload),
    ("interface", "ingress", Effect::Reload),
    ("interface", "xdp_mode", Effect::Reload),
    ("interface", "tc", Effect::Reload),
    ("interface", "allow_ethertypes", Effect::Reload),
    ("endpoint", "name", Effect::Reload),
    ("endpoint", "namespace", Effect::Reload),
    ("endpoint", "interface", Effect::Reload),
    ("endpoint", "addresses", Effect::Reload),
    ("endpoint", "labels", Effect::Reload),
    ("endpoint", "named_ports", Effect::Reload),
    ("endpoint", "netns", Effect::Reload),
    ("endpoint", "ingress", Effect::Reload),
    ("endpoint", "xdp_mode", Effect::Reload),
    ("endpoint", "tc", Effect::Reload),
    ("peer", "name", Effect::Reload),
    ("peer", "addresses", Effect::Reload),
    ("peer", "entity", Effect::Reload),
    ("peer", "namespace", Effect::Reload),
    ("peer", "labels", Effect::Reload),
    ("discover", "kind", Effect::Reload),
    ("discover", "names", Effect::Reload),
    ("discover", "interfaces", Effect::Reload),
    ("discover", "name", Effect::Reload),
    ("discover", "namespace", Effect::Reload),
    ("discover", "labels", Effect::Reload),
    ("discover", "addresses", Effect::Reload),
    ("discover", "dir", Effect::Reload),
    ("discover", "socket", Effect::Reload),
    ("discover", "container_labels", Effect::Reload),
    ("discover", "containerd_namespaces", Effect::Reload),
    ("discover", "unknown", Effect::Reload),
    ("discover", "image_labels", Effect::Reload),
    ("export", "name", Effect::Reload),
    ("export", "file", Effect::Reload),
    ("export", "allow", Effect::Reload),
    ("export", "deny", Effect::Reload),
    ("export", "field_mask", Effect::Reload),
    ("export", "max_size", Effect::Reload),
    ("export", "max_backups", Effect::Reload),
    ("export", "end", Effect::Reload),
];

/// Puts the running value of each option that only a restart changes into a new configuration. Returns the names of the
/// options that differed, for example `[limits] conntrack`.
fn keep_running_values(running: &Config, new: &mut Config) -> Vec<String> {
    let mut kept = Vec::new();
    for (section, option, effect) in RULES {
        if let Effect::Restart(keep) = effect
            && keep(running, new)
        {
            kept.push(format!("[{section}] {option}"));
        }
    }
    kept
}

/// Returns the diagnostics of broken policy files, each file followed by what is in force instead of its content.
fn broken_files(files: &[PolicyFile]) -> Vec<String> {
    let mut lines = Vec::new();
    for file in files {
        let instead = match file.state {
            PolicyFileState::InForce => continue,
            PolicyFileState::LastGood => "its last good content stays in force",
            PolicyFileState::Unused => "it never was good, and nothing of it is in force",
        };
        lines.extend(file.diagnostics.iter().cloned());
        lines.push(format!("{} is broken: {instead}", file.file));
    }
    lines
}

impl Control {
    /// Reads the configuration and the policies again. Returns the changed options that need a restart, and the errors
    /// of broken policy files. `sessions`: TCP sessions that the new configuration must not deny.
    ///
    /// # Errors
    /// The configuration has errors or denies a session, and nothing has changed; or the new configuration could not be
    /// put in force.
    pub(super) fn reload(&mut self, sessions: &[Session]) -> Result<ReloadAnswer, String> {
        let begun = Instant::now();
        let mut config = Config::load(&self.config.path).map_err(|errors| {
            let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
            let problem = format!("the configuration stays as it was: {}", lines.join("; "));
            error!(
                error = lines.join("; "),
                "the new configuration has errors; the running one stays in force"
            );
            self.reload_problem = Some(problem.clone());
            problem
        })?;
        let fixed = keep_running_values(&self.config, &mut config);
        if let Some(refusal) = self.denies_sessions(&config, sessions) {
            warn!(error = refusal, "the reload was refused");
            // A start would use the file, so `status` must say that it differs from what is in force.
            self.reload_problem = Some(refusal.clone());
            return Err(refusal);
        }
        self.reload_problem = None;
        self.notes.clear();
        if !fixed.is_empty() {
            let note = format!("changed, but only used after a restart: {}", fixed.join(", "));
            warn!(
                options = fixed.join(", "),
                "changed options are only used after a restart"
            );
            self.notes.push(note);
        }
        let (audit, enforcement) = (config.policy.audit, config.policy.enforcement);
        if audit != self.config.policy.audit {
            info!(
                event = "audit",
                endpoints = "all",
                audit,
                "[policy] audit was switched"
            );
        }
        if enforcement != self.config.policy.enforcement {
            let enforcement = enforcement_name(enforcement);
            info!(
                event = "enforcement",
                endpoints = "all",
                enforcement,
                "[policy] enforcement was changed"
            );
        }
        let before = self.enforcer.compiler.snapshot().endpoints.clone();
        self.config = config;
        self.workers.set_on_failure(self.config.worker.on_failure);
        self.sweep.set(self.config.timeouts.sweep);
        self.exports.update(&self.config.exports, &self.config.node.name);
        self.write_datapath_config().map_err(|problem| chain(&problem))?;
        self.files.update(&Changes::all());
        self.discovery
            .configure(&self.config.discover, self.config.limits.discovered as usize)
            .map_err(|problem| format!("the workloads of [[discover]] cannot be followed: {problem}"))?;
        self.drop_workloads();
        self.update_inventory(begun).map_err(|problem| chain(&problem))?;
        self.attach();
        // After the interfaces of workloads are closed to what the new configuration does not find.
        self.find_workloads(false);
        self.log_policies(&before, begun);
        info!(
            event = "reload",
            revision = self.changes,
            endpoints = self.touched(&before),
            enforced_after_ms = milliseconds(begun.elapsed()),
            "the configuration was read again"
        );
        self.keep_config();
        Ok(ReloadAnswer {
            notes: self.notes.clone(),
            broken: broken_files(&self.files.report()),
        })
    }

    /// Returns why a configuration is not used: with it the policies in force deny sessions of the client; `None` if they
    /// deny none.
    fn denies_sessions(&self, config: &Config, sessions: &[Session]) -> Option<String> {
        let denied = self.sessions_denied_by_reload(config, sessions)?;
        Some(format!(
            "the configuration stays as it was: {} would DENY YOUR OWN SESSION {denied}; allow the session in a policy or by \
             [failsafe], keep [policy] audit, or use --force",
            config.path.display()
        ))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use super::*;
    use crate::config::option_names;

    #[test]
    fn every_option_has_a_rule_and_every_rule_an_option() {
        let rules: BTreeSet<String> = RULES
            .iter()
            .map(|(section, option, _)| format!("{section}.{option}"))
            .collect();
        assert_eq!(rules.len(), RULES.len());
        assert_eq!(rules, option_names());
    }

    #[test]
    fn options_of_a_restart_keep_their_running_value_and_are_named() {
        let parse = |text: &str| Config::parse(Path::new("/p.toml"), text).unwrap();
        let text = "[node]\nname = \"n\"\n[limits]\nconntrack = 100\n[tls]\nech = \"deny\"\n";
        let running = parse(text);
        let mut new = parse("[node]\nname = \"m\"\n[limits]\nconntrack = 200\n[timeouts]\nudp = \"5s\"\n");
        assert_eq!(
            keep_running_values(&running, &mut new),
            ["[limits] conntrack", "[tls] ech"]
        );
        assert_eq!((new.limits, &new.tls), (running.limits, &running.tls));
        assert_eq!((new.node.name.as_str(), new.timeouts.udp.as_secs()), ("m", 5));
        assert!(keep_running_values(&running, &mut new).is_empty());
    }
}
