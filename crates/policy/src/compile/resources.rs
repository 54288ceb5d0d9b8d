//! Check that each resource is in one file only. If two files defined the same policy, both would be in force, and a
//! restriction added to one file would have no effect, because the other file still allows the traffic.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use palisade_model::{diagnostic::Diagnostic, rule::Location};

use super::{
    compiler::Compiler,
    resource_name::{ResourceName, already_there},
    spec::FileContent,
};

impl Compiler {
    /// Returns errors about resources in changed files that another file defines as well. If one of the files had the
    /// resource before, it keeps the resource; else the file whose name sorts first gets it.
    pub(super) fn resources_in_two_files(
        &self,
        changes: &BTreeMap<String, Option<Arc<FileContent>>>,
    ) -> Vec<Diagnostic> {
        let mut claimed: HashMap<ResourceName, &Location> = HashMap::new();
        let mut later = Vec::new();
        let changed = changes
            .iter()
            .filter_map(|(file, content)| Some((file, content.as_ref()?)));
        for (file, content) in changed {
            for (name, location) in content.resources() {
                match self.owners.get(&name) {
                    Some((owner, _)) if **owner == **file => {
                        claimed.insert(name, location);
                    }
                    _ => later.push((name, location)),
                }
            }
        }
        let mut errors = Vec::new();
        for (name, location) in later {
            let in_force = self
                .owners
                .get(&name)
                .filter(|(file, _)| !changes.contains_key(&**file));
            let first = claimed.get(&name).copied().or(in_force.map(|(_, first)| first));
            match first {
                Some(first) => errors.push(already_there(&name, location, first)),
                None => {
                    claimed.insert(name, location);
                }
            }
        }
        errors
    }

    /// Updates the owners of resources after files have been replaced.
    pub(super) fn own_resources(&mut self, replaced: &BTreeMap<String, Option<Arc<FileContent>>>) {
        for (file, before) in replaced {
            for (name, _) in before.iter().flat_map(|content| content.resources()) {
                if self.owners.get(&name).is_some_and(|(owner, _)| **owner == **file) {
                    self.owners.remove(&name);
                }
            }
        }
        for file in replaced.keys() {
            let Some(content) = self.files.get(file).map(Arc::clone) else {
                continue;
            };
            let file: Arc<str> = file.as_str().into();
            for (name, location) in content.resources() {
                self.owners.insert(name, (Arc::clone(&file), location.clone()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compile::{Changes, CompilerState},
        parse::parse,
    };

    fn file(name: &str, policies: &[&str]) -> (String, Option<FileContent>) {
        let policies: Vec<String> = policies
            .iter()
            .map(|policy| {
                format!(
                    "apiVersion: cilium.io/v2\nkind: {policy}\nspec: {{endpointSelector: {{}}, ingress: [{{}}]}}\n"
                )
            })
            .collect();
        let parsed = parse(name, &policies.join("---\n"));
        assert!(!parsed.has_errors(), "{:?}", parsed.diagnostics);
        let content = FileContent {
            policies: parsed.policies,
            cidr_groups: parsed.cidr_groups,
        };
        (name.to_owned(), Some(content))
    }

    const P: &str = "CiliumNetworkPolicy\nmetadata: {name: p}";
    const Q: &str = "CiliumNetworkPolicy\nmetadata: {name: q}";
    const OTHER_NAMESPACE: &str = "CiliumNetworkPolicy\nmetadata: {name: p, namespace: shop}";
    const OTHER_KIND: &str = "CiliumClusterwideNetworkPolicy\nmetadata: {name: p}";

    fn update(
        compiler: &mut Compiler,
        files: impl IntoIterator<Item = (String, Option<FileContent>)>,
    ) -> Result<(), Vec<String>> {
        let changes = Changes {
            inventory: None,
            files: files.into_iter().collect(),
        };
        match compiler.update(changes) {
            Ok(_) => Ok(()),
            Err(errors) => Err(errors.iter().map(ToString::to_string).collect()),
        }
    }

    #[test]
    fn a_resource_is_in_one_file() {
        let mut compiler = Compiler::new(&CompilerState::default());
        update(&mut compiler, [file("b", &[P, OTHER_NAMESPACE, OTHER_KIND])]).unwrap();
        // The resource in force remains, whatever the name of the other file is.
        let expected = "CiliumNetworkPolicy default/p is already in b:1:1, which stays in force; delete one of the \
                        two, or rename it";
        for name in ["a", "c"] {
            let refused = update(&mut compiler, [file(name, &[Q, P])]);
            assert_eq!(refused.unwrap_err(), [format!("{name}:6:1: {expected}")]);
        }
        let both = update(&mut compiler, [file("a", &[P]), file("b", &[P, Q])]);
        assert_eq!(both.unwrap_err(), [format!("a:1:1: {expected}")]);
        assert_eq!(compiler.files().map(|(name, _)| name).collect::<Vec<_>>(), ["b"]);
        // A resource moves with the name of its file, or if the first file drops it at the same time.
        update(&mut compiler, [file("a", &[P]), file("b", &[Q])]).unwrap();
        update(&mut compiler, [("a".into(), None), file("c", &[P])]).unwrap();
        assert!(update(&mut compiler, [file("a", &[P])]).is_err());
        update(&mut compiler, [("c".into(), None)]).unwrap();
        // Of two new files the first by name wins.
        let both = update(&mut compiler, [file("x", &[P]), file("y", &[P])]).unwrap_err();
        assert_eq!(both.len(), 1);
        assert!(
            both[0].starts_with("y:1:1: CiliumNetworkPolicy default/p is already in x:1:1"),
            "{both:?}"
        );
    }
}
