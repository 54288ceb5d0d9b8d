//! Commands about intercepted connections.

use std::path::Path;

use anyhow::bail;

use super::output::{EXIT_NO, EXIT_OK, show};
use crate::{
    cli::{CheckArgs, Output},
    control::{
        api::{
            Certificates, CheckEnds, InterceptCheck, InterceptRow, InterceptStats, InterceptedRow, Request,
            TlsRow, UpstreamRow,
        },
        client::ask,
    },
    table::Table,
};

/// Port of a server whose port is not given.
const HTTPS: u16 = 443;
/// Number of seconds of a day.
const SECONDS_PER_DAY: i64 = 86_400;

pub(super) fn config(socket: &Path, output: Output) -> anyhow::Result<u8> {
    let answer: Vec<InterceptRow> = ask(socket, &Request::InterceptConfig)?;
    show(&answer, output, |rows, out| {
        let mut table = Table::new(&[
            "ENDPOINT",
            "DIRECTION",
            "PEER",
            "PORTS",
            "TERMINATING",
            "ORIGINATING",
            "PROTOCOL",
            "SERVER NAMES",
            "RULES",
            "STATE",
        ]);
        for row in rows {
            table.row([
                row.endpoint_name.clone(),
                row.direction.clone(),
                row.peer.join("\n"),
                row.ports.join("\n"),
                row.terminating.clone().unwrap_or_else(|| "clear text".to_owned()),
                row.originating.clone().unwrap_or_else(|| "clear text".to_owned()),
                row.protocol.clone(),
                if row.server_names.is_empty() {
                    "any".to_owned()
                } else {
                    row.server_names.join("\n")
                },
                row.rules.to_string(),
                row.problem
                    .as_ref()
                    .map_or_else(|| "in force".to_owned(), |problem| format!("DENIED: {problem}")),
            ]);
        }
        write!(out, "{table}")
    })
}

pub(super) fn clusters(socket: &Path, output: Output) -> anyhow::Result<u8> {
    let answer: Vec<UpstreamRow> = ask(socket, &Request::InterceptClusters)?;
    show(&answer, output, |rows, out| {
        let mut table = Table::new(&[
            "NAME",
            "ADDRESS",
            "OPEN",
            "SUCCESSES",
            "FAILURES",
            "CONNECT",
            "HANDSHAKE",
            "REASONS",
        ]);
        for row in rows {
            let reasons: Vec<String> = row
                .failures_by_reason
                .iter()
                .map(|(reason, count)| format!("{count} {reason}"))
                .collect();
            table.row([
                if row.name.is_empty() { "-" } else { &row.name }.to_owned(),
                row.address.clone(),
                row.open.to_string(),
                row.successes.to_string(),
                row.failures.to_string(),
                format!("{:.1} ms", row.connect_seconds * 1e3),
                format!("{:.1} ms", row.handshake_seconds * 1e3),
                reasons.join("\n"),
            ]);
        }
        write!(out, "{table}")
    })
}

pub(super) fn certs(socket: &Path, output: Output) -> anyhow::Result<u8> {
    let answer: Certificates = ask(socket, &Request::InterceptCerts)?;
    show(&answer, output, |answer, out| {
        let mut table = Table::new(&[
            "SECRET", "KEY", "SUBJECT", "NAMES", "ISSUER", "CA", "EXPIRES", "FILE",
        ]);
        for row in &answer.certificates {
            let left = match row.remaining_seconds.div_euclid(SECONDS_PER_DAY) {
                days @ ..0 => format!("{} (EXPIRED {} days ago)", row.not_after, -days),
                days => format!("{} ({days} days)", row.not_after),
            };
            table.row([
                row.secret.clone(),
                row.key.clone(),
                row.subject.clone(),
                row.sans.join("\n"),
                row.issuer.clone(),
                if row.is_ca { "yes" } else { "no" }.to_owned(),
                left,
                row.file.clone(),
            ]);
        }
        write!(out, "{table}")?;
        if !answer.problems.is_empty() {
            writeln!(out, "\nProblems in {}:", answer.dir)?;
            for problem in &answer.problems {
                writeln!(out, "  {problem}")?;
            }
        }
        Ok(())
    })
}

pub(super) fn stats(socket: &Path, output: Output) -> anyhow::Result<u8> {
    let answer: InterceptStats = ask(socket, &Request::InterceptStats)?;
    show(&answer, output, |stats, out| {
        if let Some(problem) = &stats.problem {
            writeln!(out, "Nothing is intercepted: {problem}\n")?;
        }
        let mut table = Table::new(&["THREAD", "STATE", "CONNECTIONS", "RESTARTS", "LAST FAILURE"]);
        for thread in &stats.threads {
            table.row([
                thread.number.to_string(),
                thread.state.clone(),
                thread.connections.to_string(),
                thread.restarts.to_string(),
                thread.problem.clone().unwrap_or_default(),
            ]);
        }
        write!(out, "{table}")?;
        writeln!(out)?;
        let mut table = Table::new(&["GROUP", "COUNTER", "VALUE"]);
        for (group, counters) in &stats.counters {
            for (name, value) in counters {
                table.row([group.clone(), name.clone(), value.to_string()]);
            }
        }
        write!(out, "{table}")
    })
}

pub(super) fn connections(socket: &Path, limit: usize, output: Output) -> anyhow::Result<u8> {
    let answer: Vec<InterceptedRow> = ask(socket, &Request::InterceptConnections { limit })?;
    show(&answer, output, |rows, out| {
        let mut table = Table::new(&[
            "ENDPOINT",
            "DIRECTION",
            "CLIENT",
            "SERVER",
            "NAME",
            "STATE",
            "CLIENT TLS",
            "SERVER TLS",
            "REQUESTS",
            "BYTES OUT",
            "BYTES IN",
            "AGE",
        ]);
        for row in rows {
            table.row([
                row.endpoint.to_string(),
                row.direction.clone(),
                row.client.clone(),
                row.server.clone(),
                row.name.clone(),
                row.state.clone(),
                tls_text(row.client_tls.as_ref()),
                tls_text(row.server_tls.as_ref()),
                row.requests.to_string(),
                row.client_bytes.to_string(),
                row.server_bytes.to_string(),
                format!("{} s", row.age_seconds),
            ]);
        }
        write!(out, "{table}")
    })
}

/// Returns the TLS parameters of one side in one cell.
fn tls_text(tls: Option<&TlsRow>) -> String {
    match tls {
        None => "clear text".to_owned(),
        Some(tls) => {
            let alpn = if tls.alpn.is_empty() { "no ALPN" } else { &tls.alpn };
            format!("{} {} {alpn}", tls.version, tls.cipher)
        }
    }
}

pub(super) fn check(socket: &Path, server: &str, ends: &CheckArgs, output: Output) -> anyhow::Result<u8> {
    let ends = match ends.clone() {
        CheckArgs {
            from: Some(endpoint),
            address: server,
            ..
        } => CheckEnds::From { endpoint, server },
        CheckArgs {
            to: Some(endpoint),
            client: Some(client),
            ..
        } => CheckEnds::To { endpoint, client },
        _ => bail!("write --from ENDPOINT, or --to ENDPOINT with --client ADDRESS"),
    };
    let (name, port) = match server.rsplit_once(':') {
        Some((name, port)) => match port.parse::<u16>() {
            Ok(port @ 1..) => (name, port),
            _ => bail!("{port:?} is no port; write NAME or NAME:PORT"),
        },
        None => (server, HTTPS),
    };
    let request = Request::InterceptCheck {
        name: name.to_owned(),
        port,
        ends,
    };
    let answer: InterceptCheck = ask(socket, &request)?;
    show(&answer, output, |answer, out| {
        let mut table = Table::new(&["STEP", "RESULT", "DETAILS"]);
        for step in &answer.steps {
            table.row([
                step.step.clone(),
                if step.ok { "ok" } else { "FAILED" }.to_owned(),
                step.text.clone(),
            ]);
        }
        write!(out, "{table}")
    })?;
    Ok(if answer.ok { EXIT_OK } else { EXIT_NO })
}
