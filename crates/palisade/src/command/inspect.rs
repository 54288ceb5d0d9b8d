//! Commands that list the state of the daemon.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write as _},
    path::Path,
};

use anyhow::bail;
use serde::Serialize;

use super::{
    output::{EXIT_OK, show},
    pinned::or_pinned,
    session::sessions,
};
use crate::{
    cli::{Output, PolicyOutput},
    control::{
        api::{
            Endpoint, FqdnRow, IdentityRow, IpcacheRow, PolicyRow, PolicySummary, Request, SelectorRow,
            Status,
        },
        client::{ClientError, ask},
    },
    daemon::Pinned,
    table::Table,
};

/// Options of an endpoint.
pub(super) const OPTIONS: [&str; 1] = ["PolicyAuditMode"];

/// Maximum number of endpoints that a row of the policy list names.
const ENDPOINTS_SHOWN: usize = 3;

pub(super) fn policies(socket: &Path, name: Option<&str>, output: PolicyOutput) -> anyhow::Result<u8> {
    let request = Request::PolicyGet {
        name: name.map(ToOwned::to_owned),
    };
    let mut answer: Vec<PolicySummary> = ask(socket, &request)?;
    let one = name.is_some();
    let output = match output {
        PolicyOutput::Table => Output::Table,
        PolicyOutput::Json => {
            // In JSON the text is left out, because the resource has the same content.
            for policy in &mut answer {
                policy.text = None;
            }
            Output::Json
        }
        PolicyOutput::Yaml if !one => bail!("-o yaml shows one policy: name it"),
        PolicyOutput::Yaml => {
            let mut out = io::stdout().lock();
            for (at, policy) in answer.iter().enumerate() {
                let text = policy.text.as_deref().unwrap_or_default();
                let separator = if at == 0 { "" } else { "---\n" };
                writeln!(out, "{separator}{}", text.trim_end_matches('\n'))?;
            }
            return Ok(EXIT_OK);
        }
    };
    show(&answer, output, |policies, out| {
        if one {
            for policy in policies {
                writeln!(out, "Policy:     {} ({})", policy.name, policy.kind)?;
                writeln!(out, "Written in: {}", policy.location)?;
                if policy.file_broken {
                    writeln!(
                        out,
                        "            the file is BROKEN now; its last good content is in force (-o yaml shows it)"
                    )?;
                }
                writeln!(
                    out,
                    "Selects:    {}",
                    list_or(&policy.endpoints, "no endpoint of this node")
                )?;
                if policy.audit {
                    writeln!(out, "Audit:      what it would drop passes and is reported")?;
                }
                writeln!(out)?;
                let mut table = Table::new(&["ID", "RULE", "PACKETS", "BYTES"]);
                for rule in &policy.rules {
                    table.row([
                        rule.id.to_string(),
                        rule.rule.clone(),
                        rule.packets.to_string(),
                        rule.bytes.to_string(),
                    ]);
                }
                write!(out, "{table}")?;
            }
            return Ok(());
        }
        let mut table = Table::new(&["POLICY", "KIND", "RULES", "ENDPOINTS", "WRITTEN IN"]);
        for policy in policies {
            let audit = if policy.audit { " (audit)" } else { "" };
            table.row([
                policy.name.clone(),
                format!("{}{audit}", policy.kind),
                policy.rules.len().to_string(),
                some_of(&policy.endpoints),
                policy.location.clone(),
            ]);
        }
        write!(out, "{table}")
    })
}

pub(super) fn selectors(socket: &Path, output: Output) -> anyhow::Result<u8> {
    let answer: Vec<SelectorRow> = ask(socket, &Request::PolicySelectors)?;
    show(&answer, output, |rows, out| {
        let mut table = Table::new(&["SELECTOR", "LABELS", "USERS", "IDENTITIES"]);
        for row in rows {
            table.row([
                row.selector.clone(),
                row.policies.join("\n"),
                row.users.to_string(),
                lines(&row.identities),
            ]);
        }
        write!(out, "{table}")
    })
}

pub(super) fn names(socket: &Path, endpoint: Option<&str>, output: Output) -> anyhow::Result<u8> {
    let request = Request::FqdnCacheList {
        endpoint: endpoint.map(ToOwned::to_owned),
    };
    let answer: Vec<FqdnRow> = ask(socket, &request)?;
    show(&answer, output, |rows, out| {
        let mut table = Table::new(&[
            "ENDPOINT",
            "NAME",
            "ADDRESS",
            "SELECTORS",
            "IDENTITY",
            "TTL",
            "STATE",
            "SOURCE",
        ]);
        for row in rows {
            table.row([
                row.endpoint_name.clone(),
                row.name.clone(),
                row.address.clone(),
                list_or(&row.selectors, "-"),
                row.identity.to_string(),
                row.ttl_seconds.to_string(),
                row.state.clone(),
                row.source.clone(),
            ]);
        }
        write!(out, "{table}")
    })
}

pub(super) fn clean_names(
    socket: &Path,
    endpoint: Option<String>,
    name: Option<String>,
    pattern: Option<String>,
) -> anyhow::Result<u8> {
    let request = Request::FqdnCacheClean {
        endpoint,
        name,
        pattern,
    };
    let cleaned: u64 = ask(socket, &request)?;
    println!("{cleaned} addresses were removed");
    Ok(EXIT_OK)
}

/// Runs `palisade endpoint list`. `labels`: requirements that the labels of a listed endpoint meet.
pub(super) fn endpoints(
    socket: &Path,
    labels: &[String],
    no_headers: bool,
    output: Output,
) -> anyhow::Result<u8> {
    let mut answer: Vec<Endpoint> = ask(socket, &Request::EndpointList)?;
    answer.retain(|endpoint| labels.iter().all(|wanted| meets(&endpoint.labels, wanted)));
    show(&answer, output, |endpoints, out| {
        write!(out, "{}", endpoint_table(endpoints).hide_header(no_headers))
    })
}

/// Returns whether labels (`source:key=value`) meet a requirement in the syntax of `kubectl -l`: `key`, `!key`,
/// `key=value`, `key==value` or `key!=value`. A key without a source is that of any source.
fn meets(labels: &[String], wanted: &str) -> bool {
    let has = |key: &str, value: Option<&str>| {
        labels.iter().any(|label| {
            let (name, content) = label.split_once('=').unwrap_or((label, ""));
            let bare = name.split_once(':').map_or(name, |(_, bare)| bare);
            (name == key || bare == key) && value.is_none_or(|value| value == content)
        })
    };
    if let Some(key) = wanted.strip_prefix('!') {
        return !has(key, None);
    }
    if let Some((key, value)) = wanted.split_once("!=") {
        return !has(key, Some(value));
    }
    match wanted.split_once("==").or_else(|| wanted.split_once('=')) {
        Some((key, value)) => has(key, Some(value)),
        None => has(wanted, None),
    }
}

/// Returns the table of `endpoint list` and `status`.
pub(super) fn endpoint_table(endpoints: &[Endpoint]) -> Table {
    let mut table = Table::new(&[
        "ENDPOINT",
        "POLICY (ingress) ENFORCEMENT",
        "POLICY (egress) ENFORCEMENT",
        "IDENTITY",
        "LABELS (source:key[=value])",
        "IPv6",
        "IPv4",
        "STATUS",
        "NAME",
        "SOURCE",
    ]);
    for endpoint in endpoints {
        let (v6, v4): (Vec<_>, Vec<_>) = endpoint
            .addresses
            .iter()
            .partition(|address| address.contains(':'));
        table.row([
            endpoint.id.to_string(),
            endpoint.ingress_enforcement.clone(),
            endpoint.egress_enforcement.clone(),
            endpoint.identity.to_string(),
            endpoint.labels.join("\n"),
            lines(&without_link_local(&v6)),
            lines(&v4),
            endpoint.state.clone(),
            endpoint.name.clone(),
            endpoint.source.clone(),
        ]);
    }
    table
}

/// Returns addresses without the link-local ones, of which the node has one at each interface; all if there are no
/// others. `endpoint get` and JSON have all of them.
fn without_link_local<'a>(addresses: &[&'a String]) -> Vec<&'a String> {
    let others: Vec<&String> = addresses
        .iter()
        .copied()
        .filter(|address| !address.starts_with("fe80:"))
        .collect();
    if others.is_empty() {
        addresses.iter().copied().take(1).collect()
    } else {
        others
    }
}

pub(super) fn endpoint(socket: &Path, endpoint: &str, output: Output) -> anyhow::Result<u8> {
    let request = Request::EndpointGet {
        endpoint: endpoint.to_owned(),
    };
    let answer: Endpoint = ask(socket, &request)?;
    show(&answer, output, |endpoint, out| {
        writeln!(out, "Endpoint:    {}", endpoint.id)?;
        writeln!(out, "Name:        {}", endpoint.name)?;
        writeln!(out, "Source:      {}", endpoint.source)?;
        writeln!(out, "Status:      {}", endpoint.state)?;
        writeln!(
            out,
            "Interface:   {}",
            endpoint.interface.as_deref().unwrap_or("-")
        )?;
        writeln!(out, "Addresses:   {}", list_or(&endpoint.addresses, "-"))?;
        writeln!(out, "Identity:    {}", endpoint.identity)?;
        for label in &endpoint.labels {
            writeln!(out, "             {label}")?;
        }
        writeln!(out, "Ingress:     {}", endpoint.ingress_enforcement)?;
        writeln!(out, "Egress:      {}", endpoint.egress_enforcement)?;
        writeln!(
            out,
            "Policy:      table {}, revision {}",
            endpoint.policy, endpoint.revision
        )?;
        writeln!(out, "Selected by: {}", list_or(&endpoint.policies, "no policy"))?;
        for (name, enabled) in &endpoint.options {
            writeln!(out, "{name}: {}", on_off(*enabled))?;
        }
        Ok(())
    })
}

pub(super) fn endpoint_config(
    socket: &Path,
    endpoint: &str,
    options: &[String],
    force: bool,
    output: Output,
) -> anyhow::Result<u8> {
    let mut wanted = BTreeMap::new();
    for option in options {
        let Some((name, value)) = option.split_once('=') else {
            bail!("'{option}': write OPTION=Enabled or OPTION=Disabled");
        };
        let Some(name) = OPTIONS.iter().find(|known| known.eq_ignore_ascii_case(name)) else {
            bail!("there is no option '{name}'; there is {}", OPTIONS.join(", "));
        };
        let enabled = match value.to_ascii_lowercase().as_str() {
            "enabled" | "enable" | "true" | "on" => true,
            "disabled" | "disable" | "false" | "off" => false,
            _ => bail!("{name} is Enabled or Disabled, not '{value}'"),
        };
        wanted.insert((*name).to_owned(), enabled);
    }
    let request = Request::EndpointConfig {
        endpoint: endpoint.to_owned(),
        options: wanted,
        sessions: sessions(),
        force,
    };
    let answer: BTreeMap<String, bool> = ask(socket, &request)?;
    let code = show(&answer, output, |options, out| {
        for (name, enabled) in options {
            writeln!(out, "{name} : {}", on_off(*enabled))?;
        }
        Ok(())
    })?;
    if ask::<Status>(socket, &Request::Status).is_ok_and(|status| status.audit) {
        eprintln!(
            "palisade: [policy] audit = true: every endpoint is in audit mode, whatever its PolicyAuditMode says"
        );
    }
    Ok(code)
}

pub(super) fn identities(socket: &Path, output: Output) -> anyhow::Result<u8> {
    let answer: Vec<IdentityRow> = ask(socket, &Request::IdentityList)?;
    show(&answer, output, |rows, out| {
        write!(out, "{}", identity_table(rows))
    })
}

/// Prints an identity by number, or a reserved one by name: `host`, `reserved:world-ipv4`.
pub(super) fn identity(socket: &Path, identity: &str, output: Output) -> anyhow::Result<u8> {
    let number = match identity.parse::<u32>() {
        Ok(number) => number,
        Err(_) => {
            let label = format!(
                "reserved:{}",
                identity.strip_prefix("reserved:").unwrap_or(identity)
            );
            let rows: Vec<IdentityRow> = ask(socket, &Request::IdentityList)?;
            let found = rows.iter().filter(|row| row.labels.contains(&label));
            match found.min_by_key(|row| row.id) {
                Some(row) => row.id,
                None => bail!(
                    "'{identity}' is neither the number of an identity nor a reserved one that is in use; see `palisade \
                     identity list`"
                ),
            }
        }
    };
    let answer: IdentityRow = ask(socket, &Request::IdentityGet { identity: number })?;
    show(&answer, output, |row, out| {
        write!(out, "{}", identity_table(std::slice::from_ref(row)))
    })
}

fn identity_table(rows: &[IdentityRow]) -> Table {
    let mut table = Table::new(&["ID", "LABELS"]);
    for row in rows {
        table.row([row.id.to_string(), row.labels.join("\n")]);
    }
    table
}

/// Runs `palisade bpf policy get`. `endpoint`: `None` for the tables of all endpoints. `numeric`: identities in place of
/// labels.
pub(super) fn policy_table(
    socket: &Path,
    config: &Path,
    endpoint: Option<&str>,
    numeric: bool,
    output: Output,
) -> anyhow::Result<u8> {
    let asked = |endpoint: &str| {
        let request = Request::BpfPolicyGet {
            endpoint: endpoint.to_owned(),
        };
        ask::<Vec<PolicyRow>>(socket, &request)
    };
    if let Some(endpoint) = endpoint {
        let rows = or_pinned(config, asked(endpoint), |pinned| pinned.policy_table(endpoint))?;
        return show(&rows, output, |rows, out| {
            write!(out, "{}", policy_rows(rows, numeric))
        });
    }
    let all = || {
        let endpoints: Vec<Endpoint> = ask(socket, &Request::EndpointList)?;
        let tables = endpoints.into_iter().map(|endpoint| {
            Ok(EndpointTable {
                endpoint: endpoint.id,
                entries: asked(&endpoint.id.to_string())?,
                name: endpoint.name,
            })
        });
        tables.collect::<Result<Vec<_>, ClientError>>()
    };
    let answer = or_pinned(config, all(), |pinned| {
        let tables = pinned.endpoints().into_iter().map(|(endpoint, name)| {
            Ok(EndpointTable {
                endpoint,
                entries: pinned.policy_table(&endpoint.to_string())?,
                name,
            })
        });
        tables.collect()
    })?;
    show(&answer, output, |tables, out| {
        for (place, table) in tables.iter().enumerate() {
            let before = if place == 0 { "" } else { "\n" };
            writeln!(out, "{before}Endpoint {} ({}):", table.endpoint, table.name)?;
            write!(out, "{}", policy_rows(&table.entries, numeric))?;
        }
        Ok(())
    })
}

/// Policy table of an endpoint, for `bpf policy get --all -o json`.
#[derive(Debug, Serialize)]
struct EndpointTable {
    /// Number of the endpoint.
    endpoint: u16,
    /// Name of the endpoint.
    name: String,
    /// Entries of the table.
    entries: Vec<PolicyRow>,
}

fn policy_rows(rows: &[PolicyRow], numeric: bool) -> Table {
    let labels = (!numeric).then_some("LABELS (source:key[=value])");
    let mut header = vec!["POLICY", "DIRECTION", "IDENTITY"];
    header.extend(labels);
    header.extend([
        "PORT/PROTO",
        "PROXY PORT",
        "AUTH TYPE",
        "RULE BYTES",
        "RULE PACKETS",
        "DECIDED BY",
    ]);
    let mut table = Table::new(&header);
    // A rule has one counter for all its entries. The counter is shown only in the first row of the rule.
    let mut counted = BTreeSet::new();
    for row in rows {
        let first = counted.insert(row.rule);
        let count = |number: u64| if first { number.to_string() } else { String::new() };
        let audit = if row.audit { " (Audit)" } else { "" };
        let mut cells = vec![
            format!("{}{audit}", row.policy),
            row.direction.clone(),
            row.identity.to_string(),
        ];
        cells.extend(labels.map(|_| row.labels.join("\n")));
        cells.extend([
            row.ports.join("\n"),
            row.inspector.clone().unwrap_or_else(|| "NONE".to_owned()),
            if row.auth { "required" } else { "disabled" }.to_owned(),
            count(row.bytes),
            count(row.packets),
            row.decided_by.clone(),
        ]);
        table.row(cells);
    }
    table
}

/// Runs `palisade bpf ipcache list`.
pub(super) fn ipcache(socket: &Path, config: &Path, output: Output) -> anyhow::Result<u8> {
    let asked = ask::<Vec<IpcacheRow>>(socket, &Request::BpfIpcacheList);
    let answer = or_pinned(config, asked, Pinned::ipcache)?;
    show(&answer, output, |rows, out| {
        let mut table = Table::new(&["IP PREFIX/ADDRESS", "IDENTITY", "ENDPOINT", "LABELS"]);
        for row in rows {
            let endpoint = if row.endpoint == 0 {
                "-".to_owned()
            } else {
                row.endpoint.to_string()
            };
            table.row([
                row.prefix.clone(),
                row.identity.to_string(),
                endpoint,
                row.labels.join(","),
            ]);
        }
        write!(out, "{table}")
    })
}

fn on_off(enabled: bool) -> &'static str {
    if enabled { "Enabled" } else { "Disabled" }
}

fn list_or(list: &[String], nothing: &str) -> String {
    if list.is_empty() {
        nothing.to_owned()
    } else {
        list.join(", ")
    }
}

/// Returns the first names of a list and the number of the others.
fn some_of(list: &[String]) -> String {
    match list.len().checked_sub(ENDPOINTS_SHOWN) {
        None | Some(0) => list_or(list, "-"),
        Some(more) => format!("{} and {more} more", list[..ENDPOINTS_SHOWN].join(", ")),
    }
}

fn lines<T: ToString>(list: &[T]) -> String {
    list.iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The programs count by rule, not by entry. Repeated in each row the counter would suggest that each port was
    /// used.
    #[test]
    fn a_rule_counter_is_shown_in_one_row() {
        let row = |rule: u32, ports: &str, packets: u64| PolicyRow {
            policy: "Allow".into(),
            direction: "Ingress".into(),
            labels: vec!["ANY".into()],
            ports: vec![ports.into()],
            rule,
            decided_by: format!("rule {rule}"),
            packets,
            bytes: packets * 100,
            ..PolicyRow::default()
        };
        let rows = [row(7, "80/TCP", 12), row(7, "443/TCP", 12), row(8, "53/UDP", 3)];
        let text = policy_rows(&rows, true).to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].contains("RULE BYTES  RULE PACKETS"), "{text}");
        let numbers = |line: &str| -> Vec<u64> {
            line.split_whitespace()
                .filter_map(|word| word.parse().ok())
                .collect()
        };
        // The first number is the identity.
        assert_eq!(numbers(lines[1]), [0, 1200, 12, 7]);
        assert_eq!(numbers(lines[2]), [0, 7], "{text}");
        assert_eq!(numbers(lines[3]), [0, 300, 3, 8]);
        assert!(!text.contains("ANY") && policy_rows(&rows, false).to_string().contains("ANY"));
    }

    #[test]
    fn labels_meet_requirements_with_and_without_a_source() {
        let labels = ["k8s:app=web", "reserved:host", "k8s:tier="].map(str::to_owned);
        for wanted in [
            "app",
            "app=web",
            "k8s:app==web",
            "app!=db",
            "!role",
            "host",
            "tier=",
            "role!=x",
        ] {
            assert!(meets(&labels, wanted), "{wanted}");
        }
        for wanted in ["ap", "app=we", "app!=web", "!app", "any:app", "k8s:host", "!host"] {
            assert!(!meets(&labels, wanted), "{wanted}");
        }
    }

    #[test]
    fn a_list_of_addresses_leaves_out_link_local_ones() {
        let addresses = ["fe80::1", "2001:db8::1", "fe80::2"].map(str::to_owned);
        let all: Vec<&String> = addresses.iter().collect();
        assert_eq!(without_link_local(&all), ["2001:db8::1"]);
        assert_eq!(without_link_local(&[&addresses[0], &addresses[2]]), ["fe80::1"]);
        assert_eq!(without_link_local(&[]), [""; 0]);
    }
}
