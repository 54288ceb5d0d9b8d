//! What another set of policies would change: errors, files, policies, verdicts, sessions. Runs on the thread of a
//! client, with a copy of the compiler. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use palisade_abi::{Direction, protocol};
use palisade_flowlog::Timestamp;
use palisade_model::diagnostic::{Diagnostic, Severity};
use palisade_policy::{
    compile::{Changes, Compiler, FileContent},
    cuts::{Connection, cuts},
    parse::{is_blank, parse, yaml_to_json},
};
use serde_json::Value;

use super::{Texts, compare::compare, history::History};
use crate::{
    config,
    control::api::{
        CandidateFile, DeniedSession, FileChanges, HistoryRow, PolicyChanges, PolicyPlan, PolicySet, Session,
    },
    daemon::{state::NODE, watcher::is_policy_file},
};

/// Longest name of a policy file; a temporary file has a longer one.
const MAX_NAME: usize = 200;
/// Largest number of diagnostics that are listed.
const MAX_ERRORS: usize = 100;

/// The policies in force.
pub(in crate::daemon) struct PolicyBase {
    /// The compiler with the policies in force.
    pub compiler: Compiler,
    /// Settings for HTTP requests.
    pub http: config::Http,
    /// Texts of the files in force.
    pub texts: Texts,
    /// Files whose present content is not in force.
    pub broken: Vec<String>,
    /// Why no change can be made now.
    pub refusal: Option<String>,
}

/// A compiled set.
pub(in crate::daemon) struct Candidate {
    /// Texts of its files.
    pub texts: Texts,
    /// Modes of files from the history.
    pub modes: BTreeMap<String, u32>,
    /// The compiler with the set.
    pub compiler: Compiler,
}

/// Returns texts and modes of a set of the history.
pub(in crate::daemon) type Stored<'s> = &'s dyn Fn(u64) -> Result<(Texts, BTreeMap<String, u32>), String>;

/// Compiles a set.
///
/// # Errors
/// Errors of the files, `FILE:LINE:COL: MESSAGE`, or why there is no such set.
pub(in crate::daemon) fn compile(
    base: &PolicyBase,
    set: &PolicySet,
    stored: Stored<'_>,
) -> Result<Candidate, Vec<String>> {
    let mut paths = BTreeMap::new();
    let mut modes = BTreeMap::new();
    let mut take = |files: &BTreeMap<String, CandidateFile>| -> Texts {
        let files = files.iter();
        files
            .map(|(name, file)| {
                paths.insert(name.clone(), file.path.clone());
                (name.clone(), Arc::from(file.text.as_str()))
            })
            .collect()
    };
    let texts = match set {
        PolicySet::Current => base.texts.clone(),
        PolicySet::Only(files) => take(files),
        PolicySet::With(files) => {
            let mut texts = base.texts.clone();
            texts.extend(take(files));
            texts
        }
        PolicySet::Number(number) => {
            let (texts, stored) = stored(*number).map_err(|problem| vec![problem])?;
            modes = stored;
            texts
        }
    };
    let compiler = compile_texts(base, &texts, &paths)?;
    Ok(Candidate {
        texts,
        modes,
        compiler,
    })
}

/// Compiles the texts of files. `paths`: names of files in errors.
///
/// # Errors
/// Errors of the files, `FILE:LINE:COL: MESSAGE`.
pub(in crate::daemon) fn compile_texts(
    base: &PolicyBase,
    texts: &Texts,
    paths: &BTreeMap<String, String>,
) -> Result<Compiler, Vec<String>> {
    let mut errors = Vec::new();
    let mut files: BTreeMap<String, Option<FileContent>> = BTreeMap::new();
    for name in base.texts.keys().filter(|name| !texts.contains_key(*name)) {
        files.insert(name.clone(), None);
    }
    for (name, text) in texts {
        if base.texts.get(name) == Some(text) {
            continue;
        }
        let shown = paths.get(name).unwrap_or(name);
        if !is_policy_file(name) || name.contains('/') || name.len() > MAX_NAME {
            errors.push(format!(
                "{shown}: not a name of a policy file: use NAME.yaml, NAME.yml or NAME.json, at most {MAX_NAME} bytes"
            ));
            continue;
        }
        // The daemon takes such a file for one that was truncated.
        let had_policies = base
            .compiler
            .files()
            .any(|(known, content)| known == name && !content.policies.is_empty());
        if is_blank(text) && had_policies {
            errors.push(format!(
                "{shown}:1:1: the file is empty, and held policies before; to take them away remove the file, or leave a comment in it"
            ));
            continue;
        }
        let parsed = parse(shown, text);
        let of_file = parsed
            .diagnostics
            .iter()
            .filter(|found| found.severity == Severity::Error);
        errors.extend(of_file.map(ToString::to_string));
        let content = FileContent {
            policies: parsed.policies,
            cidr_groups: parsed.cidr_groups,
        };
        files.insert(name.clone(), Some(content));
    }
    let mut compiler = base.compiler.clone();
    if errors.is_empty() {
        let changes = Changes {
            inventory: None,
            files,
        };
        if let Err(problems) = compiler.update(changes) {
            errors.extend(problems.iter().map(Diagnostic::to_string));
        }
    }
    if errors.is_empty() {
        Ok(compiler)
    } else {
        errors.truncate(MAX_ERRORS);
        Err(errors)
    }
}

/// Returns what differs between two sets.
pub(in crate::daemon) fn differences(from: &Candidate, to: &Candidate) -> PolicyPlan {
    let comparison = compare(&from.compiler, &to.compiler);
    PolicyPlan {
        files: changed_files(&from.texts, &to.texts),
        policies: changed_policies(&from.texts, &to.texts),
        verdicts: comparison.rows,
        not_listed: comparison.not_listed,
        incomplete: comparison.incomplete,
        ..PolicyPlan::default()
    }
}

/// Returns the names of files that differ.
pub(in crate::daemon) fn changed_files(from: &Texts, to: &Texts) -> FileChanges {
    let mut files = FileChanges::default();
    for (name, text) in to {
        match from.get(name) {
            None => files.added.push(name.clone()),
            Some(old) if old != text => files.changed.push(name.clone()),
            Some(_) => {}
        }
    }
    files.removed = from
        .keys()
        .filter(|name| !to.contains_key(*name))
        .cloned()
        .collect();
    files
}

/// Returns why a change could not be rolled back: a file that it changes is empty before it; `None` if there is no such
/// file. A start of the daemon after the rollback would take the empty file for one that was truncated, and would
/// enforce the last good copy of the file.
pub(in crate::daemon) fn blank_before(from: &Texts, to: &Texts) -> Option<String> {
    let changed = changed_files(from, to).changed;
    let blank = changed
        .iter()
        .find(|name| from.get(*name).is_some_and(|text| is_blank(text)))?;
    Some(format!(
        "{blank} is empty: a change cannot be rolled back to it; put a comment in it or remove it"
    ))
}

/// Returns the policies that differ.
fn changed_policies(from: &Texts, to: &Texts) -> PolicyChanges {
    let of = |texts: &Texts, others: &Texts| -> BTreeMap<String, Value> {
        let mut policies = BTreeMap::new();
        for (name, text) in texts
            .iter()
            .filter(|(name, text)| others.get(*name) != Some(text))
        {
            for (number, document) in yaml_to_json(name, text)
                .unwrap_or_default()
                .into_iter()
                .enumerate()
            {
                resources(&format!("{name}[{number}]"), document, &mut policies);
            }
        }
        policies
    };
    let (old, new) = (of(from, to), of(to, from));
    let mut changes = PolicyChanges::default();
    for (name, spec) in &new {
        match old.get(name) {
            None => changes.added.push(name.clone()),
            Some(before) if before != spec => changes.changed.push(name.clone()),
            Some(_) => {}
        }
    }
    changes.removed = old
        .keys()
        .filter(|name| !new.contains_key(*name))
        .cloned()
        .collect();
    let mut renamed = Vec::new();
    for gone in &changes.removed {
        let twin = changes.added.iter().find(|added| {
            old.get(gone) == new.get(*added) && !renamed.iter().any(|(_, known)| known == *added)
        });
        if let Some(twin) = twin {
            renamed.push((gone.clone(), twin.clone()));
        }
    }
    let old_names: BTreeSet<&String> = renamed.iter().map(|(old, _)| old).collect();
    changes.removed.retain(|name| !old_names.contains(name));
    let new_names: BTreeSet<&String> = renamed.iter().map(|(_, new)| new).collect();
    changes.added.retain(|name| !new_names.contains(name));
    changes.renamed = renamed;
    changes
}

/// Adds the resources of a document: kind and name, with everything that has a meaning.
fn resources(place: &str, document: Value, found: &mut BTreeMap<String, Value>) {
    let Value::Object(mut object) = document else {
        if !document.is_null() {
            found.insert(format!("rules in {place}"), document);
        }
        return;
    };
    if let Some(Value::Array(items)) = object.remove("items") {
        for (number, item) in items.into_iter().enumerate() {
            resources(&format!("{place}[{number}]"), item, found);
        }
        return;
    }
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    let metadata = object.remove("metadata").unwrap_or_default();
    let (kind, name) = (text(object.get("kind")), text(metadata.get("name")));
    let namespace = match (text(metadata.get("namespace")), kind.contains("Clusterwide")) {
        (_, true) => String::new(),
        (namespace, false) if namespace.is_empty() => "default/".to_owned(),
        (namespace, false) => format!("{namespace}/"),
    };
    if let Some(audit) = metadata
        .get("annotations")
        .and_then(|all| all.get("palisade.io/audit"))
    {
        object.insert("audit".to_owned(), audit.clone());
    }
    object.remove("status");
    let key = match name.as_str() {
        "" => format!("rules in {place}"),
        name => format!("{kind} {namespace}{name}"),
    };
    found.insert(key, Value::Object(object));
}

/// Returns the sessions that a set would cut. A session with an address of no endpoint counts as one of the node. `known`
/// returns the connection of a session of an endpoint as the programs know it.
pub(in crate::daemon) fn denied_sessions(
    compiler: &Compiler,
    sessions: &[Session],
    known: impl Fn(u16, &Session) -> Option<Connection>,
) -> Vec<DeniedSession> {
    let connections: Vec<Connection> = sessions
        .iter()
        .map(|session| {
            let (local, remote) = (
                session.local.ip().to_canonical(),
                session.peer.ip().to_canonical(),
            );
            let endpoint = match compiler.snapshot().identity_of(local).endpoint {
                0 => NODE,
                endpoint => endpoint,
            };
            if let Some(known) = known(endpoint, session) {
                return known;
            }
            Connection {
                endpoint,
                // The packets of both directions belong to one flow, whose verdict is that of the opener's direction.
                direction: match session.outgoing {
                    false => Direction::Ingress,
                    true => Direction::Egress,
                },
                protocol: protocol::TCP,
                local,
                local_port: session.local.port(),
                remote,
                remote_port: session.peer.port(),
                inspector: 0,
                names: Vec::new(),
            }
        })
        .collect();
    let cut = cuts(compiler, &connections).into_iter();
    cut.filter_map(|cut| {
        let direction = connections.get(cut.connection)?.direction;
        Some(DeniedSession {
            session: Session {
                outgoing: direction == Direction::Egress,
                ..*sessions.get(cut.connection)?
            },
            decided_by: cut.decided_by,
        })
    })
    .collect()
}

/// Returns the history as rows, oldest first.
pub(in crate::daemon) fn rows(history: &History) -> Vec<HistoryRow> {
    let last = history.last().map(|entry| entry.number);
    let entries = history.entries().iter();
    entries
        .map(|entry| HistoryRow {
            number: entry.number,
            time: Timestamp(entry.time).to_string(),
            kind: entry.kind,
            author: entry.author.clone(),
            message: entry.message.clone(),
            of: entry.of,
            files: entry.files.clone(),
            revision: entry.revision,
            state: entry.state,
            in_force: Some(entry.number) == last,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use palisade_model::{
        inventory::{Endpoint, Inventory},
        labels::{Labels, parse_label},
    };

    use super::*;

    const CLOSED: &str = "apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: node}
spec:
  nodeSelector: {}
  ingress:
  - fromCIDR: [198.51.100.0/24, '2001:db8:1::/48']
    toPorts: [{ports: [{port: '22', protocol: TCP}]}]
";

    fn base(files: &[(&str, &str)]) -> PolicyBase {
        let node = Endpoint {
            id: NODE,
            name: "n1".into(),
            namespace: String::new(),
            labels: Labels::new(["reserved:host"].map(parse_label)),
            named_ports: std::collections::BTreeMap::default(),
            addresses: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            audit: false,
        };
        let mut compiler = Compiler::default();
        compiler
            .update(Changes {
                inventory: Some(Inventory {
                    endpoints: vec![node],
                    ..Inventory::default()
                }),
                files: BTreeMap::new(),
            })
            .unwrap();
        let empty = PolicyBase {
            compiler,
            http: crate::config::Config::parse(std::path::Path::new("/p.toml"), "[node]\nname = \"n\"\n")
                .unwrap()
                .http,
            texts: Texts::new(),
            broken: Vec::new(),
            refusal: None,
        };
        let set = PolicySet::Only(candidates(files));
        let candidate =
            compile(&empty, &set, &|_| Err("none".into())).unwrap_or_else(|errors| panic!("{errors:?}"));
        PolicyBase {
            compiler: candidate.compiler,
            texts: candidate.texts,
            ..empty
        }
    }

    fn candidates(files: &[(&str, &str)]) -> BTreeMap<String, CandidateFile> {
        let files = files.iter().map(|(name, text)| {
            let file = CandidateFile {
                path: format!("/new/{name}"),
                text: (*text).to_owned(),
            };
            ((*name).to_owned(), file)
        });
        files.collect()
    }

    fn none(_: u64) -> Result<(Texts, BTreeMap<String, u32>), String> {
        Err("there is no set".into())
    }

    fn plan(base: &PolicyBase, set: &PolicySet) -> PolicyPlan {
        let from = compile(base, &PolicySet::Current, &none).unwrap_or_else(|errors| panic!("{errors:?}"));
        let to = compile(base, set, &none).unwrap_or_else(|errors| panic!("{errors:?}"));
        differences(&from, &to)
    }

    #[test]
    fn verdicts_are_compared_by_peer_and_port_across_new_prefixes_and_classes() {
        let base = base(&[("node.yaml", CLOSED)]);
        // A narrower prefix, and another port: identities and classes that the first set does not have.
        let new = CLOSED
            .replace("198.51.100.0/24", "198.51.100.0/25")
            .replace("'22'", "'2222'");
        let plan = plan(&base, &PolicySet::With(candidates(&[("node.yaml", &new)])));
        let find = |to: &str, peer: &str, port: &str| {
            plan.verdicts.iter().any(|row| {
                row.to == to
                    && row.direction == "ingress"
                    && row.peers.iter().any(|known| known.contains(peer))
                    && row.ports.iter().any(|known| known == port)
            })
        };
        assert!(find("deny", "198.51.100.0/25", "22/TCP"), "{:#?}", plan.verdicts);
        assert!(find("deny", "198.51.100.0/24", "22/TCP"), "{:#?}", plan.verdicts);
        assert!(
            find("allow", "198.51.100.0/25", "2222/TCP"),
            "{:#?}",
            plan.verdicts
        );
        assert!(
            find("allow", "2001:db8:1::/48", "2222/TCP"),
            "{:#?}",
            plan.verdicts
        );
        assert!(
            !find("allow", "198.51.100.0/24", "2222/TCP"),
            "{:#?}",
            plan.verdicts
        );
        assert!(
            plan.verdicts.iter().all(|row| row.direction == "ingress"),
            "{:#?}",
            plan.verdicts
        );
        assert_eq!(plan.policies.changed, ["CiliumClusterwideNetworkPolicy node"]);
        // Another text with the same meaning changes no verdict.
        let comment = format!("# a comment\n{CLOSED}");
        let plan = self::plan(&base, &PolicySet::With(candidates(&[("node.yaml", &comment)])));
        assert_eq!((plan.verdicts.len(), plan.files.changed.len()), (0, 1));
        assert_eq!(plan.policies, PolicyChanges::default());
    }

    #[test]
    fn without_its_policy_the_node_is_open_and_a_renamed_policy_is_named() {
        let base = base(&[("node.yaml", CLOSED)]);
        let other = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: x}\nspec:\n  endpointSelector: {}\n  ingress: [{}]\n";
        let plan = plan(&base, &PolicySet::Only(candidates(&[("x.yaml", other)])));
        assert_eq!(
            (plan.files.added, plan.files.removed),
            (vec!["x.yaml".to_owned()], vec!["node.yaml".to_owned()])
        );
        assert!(
            plan.verdicts
                .iter()
                .any(|row| row.to == "allow" && row.peers.iter().any(|peer| peer.contains("world")))
        );
        let renamed = CLOSED.replace("name: node", "name: host");
        let plan = self::plan(&base, &PolicySet::Only(candidates(&[("node.yaml", &renamed)])));
        let names = plan.policies.renamed;
        assert_eq!(names.len(), 1, "{names:?}");
        assert!(
            names[0].0.ends_with("node") && names[0].1.ends_with("host"),
            "{names:?}"
        );
        assert_eq!(plan.verdicts, []);
    }

    #[test]
    fn a_session_is_denied_unless_a_rule_allows_it_in_both_families() {
        let base = base(&[("node.yaml", CLOSED)]);
        let session = |peer: &str, local: &str| Session {
            peer: peer.parse().unwrap(),
            local: local.parse().unwrap(),
            outgoing: false,
        };
        let sessions = [
            session("198.51.100.7:40000", "192.0.2.1:22"),
            session("203.0.113.7:40000", "192.0.2.1:22"),
            session("[2001:db8:1::7]:40000", "[2001:db8::1]:22"),
            session("[2001:db8:2::7]:40000", "[2001:db8::1]:22"),
            session("[::ffff:203.0.113.8]:40000", "[::ffff:192.0.2.1]:22"),
        ];
        let denied =
            |sessions: &[Session], known: &dyn Fn(u16, &Session) -> Option<Connection>| -> Vec<Session> {
                let denied = denied_sessions(&base.compiler, sessions, known).into_iter();
                denied.map(|denied| denied.session).collect()
            };
        assert_eq!(
            denied(&sessions, &|_, _| None),
            [sessions[1], sessions[3], sessions[4]]
        );

        // The policy says nothing about connections from the node.
        let outgoing = sessions.map(|session| Session {
            outgoing: true,
            ..session
        });
        assert_eq!(denied(&outgoing, &|_, _| None), []);
        assert_eq!(outgoing[1].to_string(), "192.0.2.1:22 -> 203.0.113.7:40000");
        // The direction of the programs' entry counts more than that of the client.
        let flow = |direction| {
            move |endpoint, session: &Session| {
                Some(Connection {
                    endpoint,
                    direction,
                    protocol: protocol::TCP,
                    local: session.local.ip().to_canonical(),
                    local_port: session.local.port(),
                    remote: session.peer.ip().to_canonical(),
                    remote_port: session.peer.port(),
                    inspector: 0,
                    names: Vec::new(),
                })
            }
        };
        assert_eq!(denied(&sessions, &flow(Direction::Egress)), []);
        let incoming = [sessions[1], sessions[3], sessions[4]];
        assert_eq!(denied(&outgoing, &flow(Direction::Ingress)), incoming);
    }

    #[test]
    fn a_change_of_an_empty_file_cannot_be_rolled_back() {
        let texts = |list: &[(&str, &str)]| -> Texts {
            let files = list.iter();
            files
                .map(|(name, text)| ((*name).to_owned(), (*text).into()))
                .collect()
        };
        let from = texts(&[("a.yaml", "---\n"), ("b.yaml", "# nothing"), ("c.yaml", "")]);
        // A removed file is made again as it was.
        let to = texts(&[("a.yaml", "---\n"), ("b.yaml", CLOSED), ("d.yaml", CLOSED)]);
        assert_eq!(blank_before(&from, &to), None);
        let problem = blank_before(&from, &texts(&[("a.yaml", CLOSED)])).unwrap();
        assert!(problem.starts_with("a.yaml is empty"), "{problem}");
    }

    #[test]
    fn errors_name_the_path_of_the_candidate() {
        let base = base(&[("node.yaml", CLOSED)]);
        let errors = |files: &[(&str, &str)]| {
            compile(&base, &PolicySet::With(candidates(files)), &none)
                .err()
                .unwrap_or_default()
                .join("\n")
        };
        assert!(errors(&[("a.yaml", "kind: [\n")]).starts_with("/new/a.yaml:"));
        assert!(
            errors(&[("b.yaml", CLOSED)]).contains("/new/b.yaml:"),
            "a policy of the same name"
        );
        assert!(errors(&[("node.yaml", "")]).contains("the file is empty"));
        for name in ["../a.yaml", "a.txt", ".a.yaml"] {
            assert!(
                errors(&[(name, CLOSED)]).contains("not a name of a policy file"),
                "{name}"
            );
        }
        assert!(compile(&base, &PolicySet::Number(7), &none).is_err());
    }
}
