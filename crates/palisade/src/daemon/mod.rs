//! The daemon. One thread, the control thread, owns the compiler and writes the compiled policy to the maps. Other
//! threads send it messages or read the view that it publishes.
//!
//! ```text
//! policies (inotify) ─┐
//! network (rtnetlink) ┤
//! nftables (netlink) ─┼─ Message ─> control thread ─ publishes ─> View <─ events, clients
//! signals, clients  ──┘              compile, plan, apply, attach
//! events (BPF ring) ──> flow ring <── clients (observe, flow API), exports        sweeper ──> conntrack map
//! workers (punt link) ──> records ─> flow ring; rules <── control thread
//! ```

mod capture;
mod capturing;
mod carriers;
mod certificate_files;
mod changes;
mod checked_file;
mod control;
mod cuts;
mod discover;
mod enforcer;
mod events;
mod explain;
mod export;
mod failsafe;
mod files;
mod fqdn;
mod handlers;
mod handover;
mod hubble;
mod interception;
mod interfaces;
mod keeper;
mod last_good;
mod log_control;
mod losses;
mod map_rows;
mod measured;
mod message;
mod metrics;
mod nat;
mod netfilter;
mod network;
mod own_session;
mod pinned;
mod policies;
mod private_dirs;
mod proxy_link;
mod record_queue;
mod reload;
mod replay;
mod rule_numbers;
mod selector_text;
mod startup;
mod state;
mod status;
mod sweeper;
mod trace;
mod units;
mod view;
mod watchdog;
mod watcher;
mod workers;
mod workloads;

use anyhow::bail;
use changes::{PolicyBase, Texts};
pub(crate) use explain::{explain_offline, explain_record};
pub(crate) use export::backups as export_backups;
pub(crate) use last_good::find as last_good_config;
pub(crate) use nat::found as translations;
pub(crate) use netfilter::Place as NetfilterTable;
use network::Network;
pub(crate) use network::dump as dump_routing;
use palisade_model::{diagnostic::Diagnostic, inventory::Inventory};
use palisade_policy::compile::{Compiler, FAILSAFE_FILE};
pub(crate) use pinned::Pinned;
use policies::ParsedFiles;
pub(crate) use private_dirs::{check as check_dirs, take_for_detaching};
pub(crate) use replay::Offline;
use state::State;
pub(crate) use watcher::{policy_file_names, subfolder_names};

use crate::{
    config::Config,
    control::api::{PolicyPlan, PolicySet, TraceAnswer, TraceRequest},
};

/// Runs the daemon until a signal or a client ends it.
///
/// `replaced`: why `config` was read from the last good copy; `None` if it was read from the file itself.
pub(crate) fn run(config: Config, replaced: Option<String>) -> anyhow::Result<()> {
    startup::run(config, replaced)
}

/// Explains which verdict the policies in `files` would give a packet, with the endpoints and peers of `config`. The
/// policies are not put in force.
pub(crate) fn trace_offline(
    config: &Config,
    files: ParsedFiles,
    request: &TraceRequest,
) -> anyhow::Result<TraceAnswer> {
    let compiler = match compile_offline(config, files)? {
        Ok(compiler) => compiler,
        Err(problems) => {
            let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
            bail!("{}", lines.join("\n"));
        }
    };
    trace::trace(&compiler, config, request).map_err(anyhow::Error::msg)
}

/// Returns the diagnostics from compiling the policies in `files` with the endpoints and peers of `config`.
pub(crate) fn remarks_offline(config: &Config, files: ParsedFiles) -> anyhow::Result<Vec<Diagnostic>> {
    Ok(match compile_offline(config, files)? {
        Ok(compiler) => compiler.snapshot().diagnostics.clone(),
        Err(problems) => problems,
    })
}

/// Returns the endpoints, peers and options of `config`.
pub(crate) fn inventory_offline(config: &Config) -> anyhow::Result<Inventory> {
    enforcer::inventory(config, &Network::default(), &mut State::<()>::default())
}

/// Returns what differs between two sets of policy files for the endpoints and peers of `config`.
///
/// # Errors
/// The endpoints and peers cannot be compiled.
pub(crate) fn diff_offline(config: &Config, from: &PolicySet, to: &PolicySet) -> anyhow::Result<PolicyPlan> {
    let lines =
        |problems: Vec<Diagnostic>| -> Vec<String> { problems.iter().map(Diagnostic::to_string).collect() };
    let compiler = compile_offline(config, ParsedFiles::new())?
        .map_err(|problems| anyhow::anyhow!("{}", lines(problems).join("\n")))?;
    let base = PolicyBase {
        compiler,
        http: config.http.clone(),
        texts: Texts::new(),
        broken: Vec::new(),
        refusal: None,
    };
    let stored = |number| Err(format!("set {number} of the history is known to the daemon only"));
    let compiled = |set| changes::compile(&base, set, &stored);
    Ok(match (compiled(from), compiled(to)) {
        (Ok(from), Ok(to)) => changes::differences(&from, &to),
        (from, to) => PolicyPlan {
            errors: [from.err(), to.err()].into_iter().flatten().flatten().collect(),
            ..PolicyPlan::default()
        },
    })
}

fn compile_offline(config: &Config, files: ParsedFiles) -> anyhow::Result<Result<Compiler, Vec<Diagnostic>>> {
    let mut state = State::<()>::default();
    let inventory = enforcer::inventory(config, &Network::default(), &mut state)?;
    let mut compiler = Compiler::default();
    let mut files = files;
    files.insert(FAILSAFE_FILE.to_owned(), Some(failsafe::content(config)));
    let changes = palisade_policy::compile::Changes {
        inventory: Some(inventory),
        files,
    };
    let problems = compiler.update(changes).err();
    Ok(problems.map_or(Ok(compiler), Err))
}
