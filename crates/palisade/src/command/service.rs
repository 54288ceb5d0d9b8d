//! `palisade run`, `status`, `reload`, `restart` and `stop`.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::unistd::geteuid;
use palisade_flowlog::duration;
use tracing::{Level, error};

use super::{
    inspect::endpoint_table,
    output::{EXIT_FAILED, EXIT_NO, EXIT_OK, alarming, load_config, show},
    session::sessions,
};
use crate::{
    cli::Output,
    config::{Config, DEFAULT_PIN_DIR},
    control::{
        api::{
            CaptureStatus, DeniedConnections, HubbleStatus, PolicyFile, PolicyFileState, ReloadAnswer,
            Request, Restarting, Status, Workers,
        },
        client::{Client, ClientError, ask, ask_within},
    },
    daemon,
    installation::Installation,
    log,
    table::Table,
    text::count,
};

/// Maximum number of policy files for which `status` lists every file. If there are more, `status` lists only files
/// with something to report.
const MAX_FILES_SHOWN: usize = 50;
/// Interval between two requests of `status --wait`.
const STATUS_POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Longest wait for the end of the daemon.
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// Runs `palisade run`.
pub(super) fn run(path: &Path) -> anyhow::Result<u8> {
    let level = std::env::var("PALISADE_LOG")
        .ok()
        .and_then(|level| level.parse().ok());
    log::start(level.unwrap_or(Level::INFO));
    if !geteuid().is_root() {
        bail!("the daemon must run as root to load and attach BPF programs: use sudo or the systemd unit");
    }
    let Some((config, replaced)) = config_to_run(path) else {
        return Ok(EXIT_NO);
    };
    daemon::run(config, replaced)?;
    Ok(EXIT_OK)
}

/// Runs `palisade run --check-config`.
pub(super) fn check_config(path: &Path) -> anyhow::Result<u8> {
    let Some(config) = load_config(path) else {
        return Ok(EXIT_NO);
    };
    let (refused, warnings) = daemon::check_dirs(&config);
    for warning in warnings {
        eprintln!("{}: warning: {warning}", path.display());
    }
    if !refused.is_empty() {
        for problem in refused {
            eprintln!("{}: {problem}", path.display());
        }
        return Ok(EXIT_NO);
    }
    writeln!(
        io::stdout(),
        "{}: valid: {}, {}, {}",
        path.display(),
        count(config.interfaces.len(), "interface", "interfaces"),
        count(config.endpoints.len(), "endpoint", "endpoints"),
        count(config.peers.len(), "peer", "peers")
    )?;
    Ok(EXIT_OK)
}

/// Returns the configuration. If the file is broken, returns the last good copy with a text for `status`; `None` if
/// there is no usable copy either.
fn config_to_run(path: &Path) -> Option<(Config, Option<String>)> {
    let errors = match Config::load(path) {
        Ok(config) => return Some((config, None)),
        Err(errors) => errors,
    };
    for error in &errors {
        error!(%error, "the configuration has an error");
    }
    match daemon::last_good_config(path) {
        Ok((config, copy)) => {
            let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
            let text = format!(
                "the configuration is BROKEN, its last good content is in force (kept in {}): {}",
                copy.display(),
                lines.join("; ")
            );
            error!(copy = %copy.display(), "the configuration is BROKEN; its last good content is in force");
            Some((config, Some(text)))
        }
        Err(problems) => {
            for problem in problems {
                error!(error = problem, "a last good copy cannot be used");
            }
            error!(
                file = %path.display(),
                "there is no usable configuration; `palisade run --check-config` shows its errors. What was attached before \
                 goes on enforcing; on a node that has just booted EVERYTHING PASSES"
            );
            None
        }
    }
}

/// Runs `palisade status`.
pub(super) fn status(
    config: &Path,
    socket: &Path,
    wait: Option<Duration>,
    output: Output,
) -> anyhow::Result<u8> {
    with_remark(config, status_of(socket, wait, output))
}

/// Runs `palisade status --brief`.
pub(super) fn brief_status(config: &Path, socket: &Path) -> anyhow::Result<u8> {
    let status = with_remark(
        config,
        ask::<Status>(socket, &Request::Status).map_err(Into::into),
    )?;
    if status.ready {
        writeln!(io::stdout(), "OK")?;
        return Ok(EXIT_OK);
    }
    for missing in &status.missing {
        writeln!(io::stdout(), "{missing}")?;
    }
    Ok(EXIT_NO)
}

/// Prints what is enforced if the outcome says that no daemon runs.
fn with_remark<T>(config: &Path, outcome: anyhow::Result<T>) -> anyhow::Result<T> {
    if let Err(error) = &outcome
        && let Some(ClientError::NotRunning { .. }) = error.downcast_ref()
    {
        eprintln!("palisade: {}", enforced_without_daemon(config));
    }
    outcome
}

/// Returns a text about the programs that a daemon has left attached.
fn enforced_without_daemon(config: &Path) -> String {
    let text = fs::read_to_string(config).unwrap_or_default();
    let pins = Config::node_path(&text, "pin_dir").unwrap_or_else(|| DEFAULT_PIN_DIR.into());
    let shown = pins.display();
    match fs::read_dir(pins.join("links")).map(Iterator::count) {
        Ok(0) => format!("nothing is attached (by {shown})"),
        Ok(interfaces) => format!(
            "its last policy is STILL ENFORCED at {} (pinned in {shown}); `palisade stop --detach` ends that",
            count(interfaces, "interface", "interfaces")
        ),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            format!("nothing is pinned in {shown}: nothing is enforced")
        }
        Err(error) => format!("whether its last policy is still enforced is unknown: {shown}: {error}"),
    }
}

fn status_of(socket: &Path, wait: Option<Duration>, output: Output) -> anyhow::Result<u8> {
    let Some(wait) = wait else {
        return show(
            &with_denied(socket, ask(socket, &Request::Status)?),
            output,
            write_status,
        );
    };
    let until = Instant::now() + wait;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let answer = ask_within::<Status>(socket, &Request::Status, left);
        let late = Instant::now() >= until;
        match answer {
            Ok(status) if status.ready => {
                return show(&with_denied(socket, status), output, write_status);
            }
            Ok(status) if late => {
                eprintln!(
                    "palisade: not everything is attached and enforced after {}:",
                    duration::format(wait)
                );
                for missing in &status.missing {
                    eprintln!("  {missing}");
                }
                return Ok(EXIT_NO);
            }
            // The daemon can be starting, or recovering from a hang.
            Err(ClientError::NotRunning { .. } | ClientError::Broken(_) | ClientError::Hangs { .. })
            | Err(ClientError::Refused(_))
                if !late => {}
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        thread::sleep(STATUS_POLL_INTERVAL.min(until.saturating_duration_since(Instant::now())));
    }
}

/// Adds the live connections that are denied. Without an answer they are not known, which is no error of the status: a
/// daemon of an earlier version has no such request.
fn with_denied(socket: &Path, status: Status) -> Status {
    Status {
        denied_connections: ask(socket, &Request::DeniedConnections).ok(),
        ..status
    }
}

fn write_denied(denied: Option<&DeniedConnections>, out: &mut dyn Write) -> io::Result<()> {
    let Some(denied) = denied else {
        return writeln!(out, "\nLive connections that the policies deny: not known");
    };
    if denied.total == 0 {
        return Ok(());
    }
    writeln!(out, "\nLive connections that the policies deny:")?;
    for row in &denied.connections {
        writeln!(
            out,
            "  {} {} {} -> {} ({}, {} by {})",
            row.endpoint_name,
            row.protocol,
            row.source,
            row.destination,
            row.direction,
            row.effect,
            row.decided_by
        )?;
    }
    let more = denied.total.saturating_sub(denied.connections.len());
    if more > 0 {
        writeln!(out, "  and {more} more")?;
    }
    Ok(())
}

/// Runs `palisade reload`.
pub(super) fn reload(config: &Path, socket: &Path, force: bool) -> anyhow::Result<u8> {
    // Usually the daemon reads this file too. If the file has errors, the command shows all of them, one per line, and
    // sends no request.
    if config.exists() && load_config(config).is_none() {
        return Ok(EXIT_NO);
    }
    let sessions = sessions();
    match ask::<ReloadAnswer>(socket, &Request::Reload { sessions, force }) {
        Ok(answer) => {
            for note in answer.notes {
                eprintln!("palisade: {note}");
            }
            for problem in &answer.broken {
                eprintln!("{problem}");
            }
            Ok(if answer.broken.is_empty() {
                EXIT_OK
            } else {
                EXIT_NO
            })
        }
        Err(ClientError::Refused(problem)) => {
            eprintln!("palisade: {problem}");
            Ok(EXIT_NO)
        }
        Err(error) => Err(error.into()),
    }
}

/// Runs `palisade restart`.
pub(super) fn restart(config: &Path, socket: &Path, force: bool) -> anyhow::Result<u8> {
    // A restart puts the configuration in force, so it has the checks of a reload.
    if config.exists() && load_config(config).is_none() {
        return Ok(EXIT_NO);
    }
    let sessions = sessions();
    let outcome = ask::<ReloadAnswer>(socket, &Request::Reload { sessions, force })
        .and_then(|_| ask::<Restarting>(socket, &Request::Restart));
    match outcome {
        Ok(Restarting { token }) => report_restart(&restarted(socket, &token)?, &token),
        Err(ClientError::Refused(problem)) => {
            eprintln!("palisade: not restarted: {problem}");
            Ok(EXIT_NO)
        }
        Err(error) => Err(error.into()),
    }
}

/// Waits until the daemon answers again.
fn restarted(socket: &Path, token: &str) -> anyhow::Result<Status> {
    let until = Instant::now() + STOP_DEADLINE;
    let is_again = |status: &Status| {
        status
            .restarted
            .as_ref()
            .is_some_and(|restart| restart.token == token)
    };
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let answer = ask_within::<Status>(socket, &Request::Status, left);
        let late = Instant::now() >= until;
        match answer {
            // The daemon before answers until it closes its socket.
            Ok(status) if is_again(&status) || late => return Ok(status),
            Err(error) if late => return Err(error).context("the daemon has not begun again; see its log"),
            Ok(_) | Err(_) => {}
        }
        thread::sleep(STATUS_POLL_INTERVAL);
    }
}

fn report_restart(status: &Status, token: &str) -> anyhow::Result<u8> {
    let Some(restart) = status.restarted.as_ref().filter(|restart| restart.token == token) else {
        eprintln!("palisade: the daemon runs, but was started otherwise: inspected connections are reset");
        return Ok(EXIT_NO);
    };
    let connections = |n| {
        count(
            usize::try_from(n).unwrap_or(usize::MAX),
            "connection",
            "connections",
        )
    };
    writeln!(
        io::stdout(),
        "palisade {} runs: the inspection of {} goes on, {} cut",
        status.version,
        connections(restart.connections),
        connections(restart.cut)
    )?;
    if let Some(problem) = &restart.problem {
        eprintln!("palisade: the inspected connections were not taken over: {problem}");
    }
    for missing in &status.missing {
        eprintln!("palisade: {missing}");
    }
    Ok(if restart.problem.is_none() {
        EXIT_OK
    } else {
        EXIT_NO
    })
}

/// Runs `palisade stop`.
pub(super) fn stop(config: &Path, socket: &Path, detach: bool) -> anyhow::Result<u8> {
    match Client::send(socket, &Request::Stop { detach }) {
        Ok(client) => {
            client.answer::<serde_json::Value>()?;
            let code = daemon_ended(socket)?;
            if code == EXIT_OK {
                let text = if detach {
                    "the daemon has ended, and everything is detached: nothing is enforced any more"
                } else {
                    "the daemon has ended; what it attached GOES ON ENFORCING the last policy (`palisade stop --detach` \
                     ends that too)"
                };
                writeln!(io::stdout(), "{text}")?;
            }
            Ok(code)
        }
        Err(error @ ClientError::NotRunning { .. }) if !detach => Err(error.into()),
        Err(ClientError::NotRunning { .. }) => {
            let installation = Installation::find(config);
            if let Some(note) = &installation.note {
                eprintln!("palisade: note: {note}");
            }
            detach_without_daemon(&installation)
        }
        Err(error) => Err(error.into()),
    }
}

/// Waits for the removal of the socket, which is the last action of the daemon.
pub(super) fn daemon_ended(socket: &Path) -> anyhow::Result<u8> {
    let until = Instant::now() + STOP_DEADLINE;
    while socket.exists() {
        if Instant::now() >= until {
            eprintln!("palisade: the daemon has accepted the request to end but still runs");
            return Ok(EXIT_FAILED);
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(EXIT_OK)
}

fn detach_without_daemon(installation: &Installation) -> anyhow::Result<u8> {
    // The directories are locked until this function returns, so that no daemon can start meanwhile.
    let _dirs = daemon::take_for_detaching(&installation.node)?;
    let pins = &installation.node.pin_dir;
    let table = daemon::NetfilterTable::of(&installation.interface, pins)
        .remove()
        .context("the nftables table");
    if !pins.exists() {
        table?;
        writeln!(
            io::stdout(),
            "the daemon is not running, and nothing is pinned in {}",
            pins.display()
        )?;
        return Ok(EXIT_OK);
    }
    palisade_datapath::detach_all(pins).with_context(|| pins.display().to_string())?;
    table?;
    writeln!(
        io::stdout(),
        "the daemon is not running; everything that {} kept attached is detached",
        pins.display()
    )?;
    Ok(EXIT_OK)
}

fn write_status(status: &Status, out: &mut dyn Write) -> io::Result<()> {
    let ready = if status.ready && status.warnings.is_empty() {
        "ready: everything is attached and enforced".to_owned()
    } else if status.ready {
        "ready: everything is attached and enforced; see Warnings".to_owned()
    } else {
        alarming("NOT READY")
    };
    writeln!(out, "Node:        {} ({ready})", status.node)?;
    writeln!(
        out,
        "Daemon:      palisade {}, process {}, up {}",
        status.version,
        status.pid,
        duration::format(Duration::from_secs(status.uptime_seconds))
    )?;
    let audit = if status.audit {
        ", audit: what would be dropped passes"
    } else {
        ""
    };
    writeln!(out, "Enforcement: {}{audit}", status.enforcement)?;
    writeln!(
        out,
        "Changes:     {} put in force, the last one in {:.1} ms",
        status.revision,
        status.last_change_seconds * 1e3
    )?;
    if let Some(change) = &status.pending_change {
        let who = change.author.sudo_user.as_ref().unwrap_or(&change.author.user);
        writeln!(
            out,
            "To confirm:  change {} by {who} is ROLLED BACK in {} unless you run: palisade policy confirm {0}",
            change.number,
            duration::format(Duration::from_secs(change.remaining_seconds))
        )?;
    }
    for (title, list) in [
        ("Missing", &status.missing),
        ("Warnings", &status.warnings),
        ("Notes", &status.notes),
    ] {
        if !list.is_empty() {
            writeln!(out, "\n{title}:")?;
            for line in list {
                writeln!(out, "  {line}")?;
            }
        }
    }
    write_denied(status.denied_connections.as_ref(), out)?;
    let mut table = Table::new(&["INTERFACE", "ROLE", "ENDPOINT", "INGRESS", "EGRESS", "REMARK"]);
    for interface in &status.interfaces {
        let hook = |hook: &Option<String>| hook.clone().unwrap_or_else(|| "-".to_owned());
        table.row([
            interface.name.clone(),
            interface.role.clone(),
            interface.endpoint.to_string(),
            hook(&interface.ingress),
            hook(&interface.egress),
            interface
                .problem
                .clone()
                .or_else(|| interface.note.clone())
                .unwrap_or_default(),
        ]);
    }
    section(out, "Interfaces", &table, "none configured")?;
    section(out, "Endpoints", &endpoint_table(&status.endpoints), "none")?;
    let mut table = Table::new(&["FILE", "POLICIES", "STATE"]);
    let quiet = |file: &&PolicyFile| file.state == PolicyFileState::InForce && file.diagnostics.is_empty();
    let (files, policies) = status
        .policy_files
        .iter()
        .filter(quiet)
        .fold((0, 0), |(files, policies), file| {
            (files + 1, policies + file.policies)
        });
    let summed = status.policy_files.len() > MAX_FILES_SHOWN;
    if summed && files > 0 {
        table.row([
            format!("({})", count(files, "file", "files")),
            policies.to_string(),
            "in force".to_owned(),
        ]);
    }
    for file in status.policy_files.iter().filter(|file| !summed || !quiet(file)) {
        let state = match file.state {
            PolicyFileState::InForce => "in force".to_owned(),
            PolicyFileState::LastGood => format!("{}: its last good content is in force", alarming("BROKEN")),
            PolicyFileState::Unused => format!("{}: nothing of it is in force", alarming("BROKEN")),
        };
        let mut cell = state;
        for diagnostic in &file.diagnostics {
            cell += &format!("\n{diagnostic}");
        }
        table.row([file.file.clone(), file.policies.to_string(), cell]);
    }
    section(
        out,
        &format!("Policy files in {}", status.policy_dir),
        &table,
        "none",
    )?;
    if !status.missing_inspectors.is_empty() {
        writeln!(
            out,
            "\nInspectors that policies need and that do not exist (their traffic is dropped):"
        )?;
        for missing in &status.missing_inspectors {
            writeln!(out, "  {}: {}", missing.inspector, missing.policies.join(", "))?;
        }
    }
    workers(out, &status.workers)?;
    let mut table = Table::new(&["MAP", "ENTRIES", "CAPACITY", "FULL"]);
    for map in &status.maps {
        table.row([
            map.map.clone(),
            map.entries.to_string(),
            map.capacity.to_string(),
            format!("{}%", (map.entries * 100).checked_div(map.capacity).unwrap_or(0)),
        ]);
    }
    section(out, "Maps", &table, "none")?;
    if !status.exports.is_empty() {
        let mut table = Table::new(&[
            "EXPORT",
            "FILE",
            "STATE",
            "LINES",
            "LOST",
            "FAILED WRITES",
            "ROTATIONS",
        ]);
        for export in &status.exports {
            table.row([
                export.name.clone(),
                export.file.clone(),
                export.state.clone(),
                export.written.to_string(),
                export.lost.to_string(),
                export.failed_writes.to_string(),
                export.rotations.to_string(),
            ]);
        }
        section(out, "Flow exports", &table, "none")?;
    }
    let conntrack = &status.conntrack;
    writeln!(
        out,
        "\nConnections: {} present, {} of them protected, {} made, {} seeded, {} swept, {} evicted by newer ones",
        conntrack.entries,
        conntrack.protected,
        conntrack.made,
        conntrack.seeded,
        conntrack.swept,
        conntrack.evicted
    )?;
    let events = &status.events;
    writeln!(
        out,
        "Events:      {} read, {} suppressed by the rate limit, {} lost because the ring was full, {} slow clients cut off",
        events.read, events.suppressed, events.lost, events.slow_clients
    )?;
    writeln!(out, "{}", hubble_text(&status.hubble))?;
    if let Some(capture) = &status.capture {
        writeln!(out, "{}", capture_text(capture))?;
    }
    let names = &status.names;
    writeln!(
        out,
        "Names:       {} learned with {} addresses, {} in the map, {} of memory{}; {} answers committed, {} withheld; \
         {} addresses expired, {} evicted, {} over the limit, {} special ones refused",
        names.names,
        names.addresses,
        names.in_map,
        bytes_text(names.bytes as u64),
        each_text(names.bytes as u64, names.addresses as u64, "an address"),
        names.committed,
        names.refused,
        names.expired,
        names.evicted,
        names.over_limit,
        names.special
    )?;
    let mut table = Table::new(&["REASON", "DIRECTION", "PACKETS", "BYTES"]);
    for drop in &status.drops {
        table.row([
            format!("{} ({})", drop.text, drop.reason),
            drop.direction.clone(),
            drop.packets.to_string(),
            drop.bytes.to_string(),
        ]);
    }
    section(out, "Drops", &table, "none")
}

/// Returns a size as `12.3 MB`.
fn bytes_text(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")];
    let unit = UNITS.iter().find(|(size, _)| bytes >= *size);
    unit.map_or_else(
        || format!("{bytes} B"),
        |(size, name)| format!("{}.{} {name}", bytes / size, bytes % size * 10 / size),
    )
}

/// Returns ` (123 B an address)`; empty for a count of zero.
fn each_text(bytes: u64, count: u64, what: &str) -> String {
    bytes
        .checked_div(count)
        .map_or_else(String::new, |each| format!(" ({} {what})", bytes_text(each)))
}

/// Prints the inspection state of all workers, and one line with the inspection metrics of each group. Metrics that are
/// zero are left out.
fn inspection(out: &mut dyn Write, workers: &Workers) -> io::Result<()> {
    let keeps = &workers.keeps;
    writeln!(
        out,
        "\nInspection:  {} connections, {} offloaded; {} packets held; {} buffered{}",
        keeps.connections,
        keeps.remembered,
        keeps.packets,
        bytes_text(keeps.bytes),
        each_text(keeps.bytes, keeps.connections, "a connection"),
    )?;
    for (group, numbers) in &workers.inspection {
        let line: Vec<String> = numbers
            .iter()
            .filter(|(_, value)| **value != 0)
            .map(|(name, value)| format!("{} {value}", name.replace('_', " ")))
            .collect();
        if !line.is_empty() {
            writeln!(out, "  {group}: {}", line.join(", "))?;
        }
    }
    Ok(())
}

fn section(out: &mut dyn Write, title: &str, table: &Table, nothing: &str) -> io::Result<()> {
    if table.is_empty() {
        return writeln!(out, "\n{title}: {nothing}");
    }
    writeln!(out, "\n{title}:")?;
    for line in table.to_string().lines() {
        writeln!(out, "  {line}")?;
    }
    Ok(())
}

/// Returns the line about the capture that runs.
fn capture_text(capture: &CaptureStatus) -> String {
    let filters = match capture.filters.as_str() {
        "" => "all packets",
        filters => filters,
    };
    format!(
        "Capture:     running since {}, {filters}; {} packets in {} bytes, {} lost",
        capture.since, capture.packets, capture.bytes, capture.lost
    )
}

fn hubble_text(hubble: &HubbleStatus) -> String {
    let tls = if hubble.tls { " (TLS)" } else { "" };
    let listen = hubble.listen.as_ref().map(|listen| format!("{listen}{tls}"));
    let places: Vec<String> = hubble.socket.clone().into_iter().chain(listen).collect();
    let places = if places.is_empty() {
        "not served".to_owned()
    } else {
        places.join(", ")
    };
    format!(
        "Flow API:    {places}; {}, {} flows lost by slow ones, {} refused, {} cut off",
        count(hubble.readers, "reader", "readers"),
        hubble.lost,
        hubble.refused,
        hubble.cut
    )
}

/// Prints the state of the workers.
fn workers(out: &mut dyn Write, workers: &Workers) -> io::Result<()> {
    if let Some(problem) = &workers.problem {
        writeln!(out, "\nNo workers: {problem}")?;
        return Ok(());
    }
    let mut table = Table::new(&[
        "WORKER",
        "STATE",
        "IN",
        "OUT",
        "GENERATED",
        "DROPPED",
        "HELD",
        "FLOWS",
        "HANDED OFF",
        "RESTARTS",
        "RING LOST",
    ]);
    for worker in &workers.workers {
        let ring = &worker.ring;
        let state = match &worker.problem {
            Some(problem) => format!("{}: {problem}", worker.state),
            None => worker.state.clone(),
        };
        table.row([
            worker.number.to_string(),
            state,
            worker.packets_in.to_string(),
            worker.packets_out.to_string(),
            worker.generated.to_string(),
            worker
                .drops
                .iter()
                .map(|drop| drop.packets)
                .sum::<u64>()
                .to_string(),
            format!("{}/{}", worker.held, worker.frames),
            worker.flows.to_string(),
            format!("{}/{}", worker.handoff_out, worker.handoff_in),
            worker.restarts.to_string(),
            (ring.rx_dropped + ring.rx_ring_full + ring.invalid).to_string(),
        ]);
    }
    let title = format!(
        "Workers ({}, on failure {}) at {}",
        workers.mode, workers.on_failure, workers.punt_link
    );
    section(out, &title, &table, "none")?;
    let mut reasons = BTreeMap::new();
    for drop in workers.workers.iter().flat_map(|worker| &worker.drops) {
        *reasons.entry((drop.reason, drop.text.as_str())).or_insert(0u64) += drop.packets;
    }
    for ((reason, text), packets) in reasons {
        writeln!(out, "  dropped: {text} ({reason}): {packets}")?;
    }
    inspection(out, workers)
}

#[cfg(test)]
mod tests {
    use crate::control::api::Keeps;

    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(bytes_text(0), "0 B");
        assert_eq!(bytes_text(999), "999 B");
        assert_eq!(bytes_text(1_050), "1.0 kB");
        assert_eq!(bytes_text(12_345_678), "12.3 MB");
        assert_eq!(bytes_text(2_900_000_000), "2.9 GB");
        assert_eq!(each_text(1_000, 0, "an address"), "");
        assert_eq!(each_text(1_000, 4, "an address"), " (250 B an address)");
    }

    #[test]
    fn metrics_that_are_zero_are_not_shown() {
        let numbers = |list: &[(&str, u64)]| {
            list.iter()
                .map(|(name, value)| ((*name).to_owned(), *value))
                .collect()
        };
        let workers = Workers {
            inspection: BTreeMap::from([
                ("dns".to_owned(), numbers(&[("queries", 0)])),
                (
                    "http".to_owned(),
                    numbers(&[("denied", 2), ("requests", 12), ("unsolicited", 0)]),
                ),
                ("tls.tcp".to_owned(), numbers(&[("out_of_window", 3)])),
            ]),
            keeps: Keeps {
                connections: 2,
                remembered: 1,
                bytes: 4_096,
                packets: 5,
            },
            ..Workers::default()
        };
        let mut out = Vec::new();
        inspection(&mut out, &workers).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "\nInspection:  2 connections, 1 offloaded; 5 packets held; 4.0 kB buffered (2.0 kB a \
             connection)\n  http: denied 2, requests 12\n  tls.tcp: out of window 3\n"
        );
    }
}
