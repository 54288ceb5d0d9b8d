//! The live connections that the policies in force deny, and those that a change of policy files would cut. The client's
//! own thread compiles the change with a copy of the compiler: neither the control thread nor the packet path waits.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, PoisonError},
};

use palisade_datapath::monotonic_coarse;
use palisade_model::diagnostic::Severity;
use palisade_policy::{
    compile::{Changes, Compiler, FileContent},
    parse::parse,
};

use super::{Handlers, explain::ONE_AT_A_TIME, map_error};
use crate::{
    control::api::{DeniedConnections, WouldCut, WouldCutRequest},
    daemon::{cuts, message::ClientRequest},
};

/// Largest number of connections that [`Handlers::denied_connections`] lists.
const MAX_DENIED: usize = 10;

/// Locked by the thread that lists denied connections, so that the lists of several clients are not in memory at once.
/// [`ONE_AT_A_TIME`] stays free: a client that polls `status` would make changes of the policies fail.
static ONE_LIST: Mutex<()> = Mutex::new(());

impl Handlers {
    /// Returns the live connections that the policies in force deny: their packets are dropped, and no
    /// reset is sent, so the connections stay open at both ends until the timeouts there.
    pub(super) fn denied_connections(&self) -> Result<DeniedConnections, String> {
        let _turn = ONE_LIST.lock().unwrap_or_else(PoisonError::into_inner);
        let mut denied = cuts::denied(
            &self.datapath,
            &self.names,
            &self.shared.get(),
            || Ok(Box::new(self.look_up(ClientRequest::Compiler)?.compiler)),
            monotonic_coarse(),
        )?;
        denied.connections.truncate(MAX_DENIED);
        Ok(DeniedConnections {
            connections: denied.connections,
            total: denied.total,
        })
    }

    pub(super) fn would_cut(&self, request: WouldCutRequest) -> Result<WouldCut, String> {
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = self.look_up(ClientRequest::Compiler)?;
        let before = copy.compiler;
        let mut compiler = before.clone();
        let shown = |name: &str| copy.policy_dir.join(name).display().to_string();
        let mut warnings = update(&mut compiler, request, shown)?;
        let mut cut = cuts::would_cut(
            &self.datapath,
            &self.names,
            &self.shared.get(),
            [&before, &compiler],
            monotonic_coarse(),
        )
        .map_err(map_error)?;
        warnings.append(&mut cut.warnings);
        cut.warnings = warnings;
        Ok(cut)
    }
}

/// Applies the change to the compiler. Returns the warnings of the parser about the new texts. `shown`: the path of a file,
/// as messages name it.
///
/// # Errors
/// The errors of the new texts, one in each line.
fn update(
    compiler: &mut Compiler,
    request: WouldCutRequest,
    shown: impl Fn(&str) -> String,
) -> Result<Vec<String>, String> {
    let mut files: BTreeMap<String, Option<FileContent>> = BTreeMap::new();
    if request.replace_all {
        let known: BTreeSet<&str> = compiler.files().map(|(name, _)| name).collect();
        files.extend(known.into_iter().map(|name| (name.to_owned(), None)));
    }
    let mut diagnostics = Vec::new();
    for (name, text) in request.files {
        let content = text.map(|text| {
            let parsed = parse(&shown(&name), &text);
            diagnostics.extend(parsed.diagnostics);
            FileContent {
                policies: parsed.policies,
                cidr_groups: parsed.cidr_groups,
            }
        });
        files.insert(name, content);
    }
    let lines = |of: Severity| -> Vec<String> {
        let some = diagnostics.iter().filter(|diagnostic| diagnostic.severity == of);
        some.map(ToString::to_string).collect()
    };
    let errors = lines(Severity::Error);
    if !errors.is_empty() {
        return Err(errors.join("\n"));
    }
    let changes = Changes {
        inventory: None,
        files,
    };
    match compiler.update(changes) {
        Ok(_) => Ok(lines(Severity::Warning)),
        Err(problems) => {
            let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
            Err(lines.join("\n"))
        }
    }
}

#[cfg(test)]
mod tests {
    use palisade_policy::compile::CompilerState;

    use super::*;

    fn request(files: &[(&str, Option<&str>)], replace_all: bool) -> WouldCutRequest {
        WouldCutRequest {
            files: files
                .iter()
                .map(|(name, text)| ((*name).to_owned(), text.map(str::to_owned)))
                .collect(),
            replace_all,
        }
    }

    fn policy(name: &str) -> String {
        format!(
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata:\n  name: {name}\n\
             spec:\n  endpointSelector: {{}}\n  ingress:\n  - fromEndpoints:\n    - {{}}\n"
        )
    }

    fn names(compiler: &Compiler) -> Vec<&str> {
        compiler.files().map(|(name, _)| name).collect()
    }

    #[test]
    fn a_change_replaces_adds_and_removes_files() {
        let mut compiler = Compiler::new(&CompilerState::default());
        let shown = |name: &str| format!("/p/{name}");
        let two = request(
            &[("a.yaml", Some(&policy("a"))), ("b.yaml", Some(&policy("b")))],
            false,
        );
        assert_eq!(update(&mut compiler, two, shown), Ok(Vec::new()));
        assert_eq!(names(&compiler), ["a.yaml", "b.yaml"]);
        update(&mut compiler, request(&[("a.yaml", None)], false), shown).unwrap();
        assert_eq!(names(&compiler), ["b.yaml"]);
        let only = request(&[("c.yaml", Some(&policy("c")))], true);
        update(&mut compiler, only, shown).unwrap();
        assert_eq!(names(&compiler), ["c.yaml"]);
    }

    #[test]
    fn errors_name_file_and_line() {
        let mut compiler = Compiler::new(&CompilerState::default());
        let broken = request(
            &[(
                "a.yaml",
                Some("apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: [\n"),
            )],
            false,
        );
        let problem = update(&mut compiler, broken, |name| format!("/p/{name}")).unwrap_err();
        assert!(problem.contains("/p/a.yaml:"), "{problem}");
    }
}
