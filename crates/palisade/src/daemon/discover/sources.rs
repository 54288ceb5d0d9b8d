//! Sources that are directories: named network namespaces, and the results that CNI runtimes keep.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use nix::fcntl::OFlag;
use palisade_discover::{Wildcard, Workload, cni};

use super::place::{Described, Namespace};

/// Maximum number of names of one directory that are read.
const MAX_NAMES: usize = 65_536;
/// Longest file with a result of CNI, bytes.
const MAX_RESULT: u64 = 1 << 20;

/// Returns the named network namespaces of a directory that match `names`, by name.
///
/// # Errors
/// The directory exists and cannot be read, so that the namespaces that it has are not known.
pub(super) fn namespaces(dir: &Path, names: &[Wildcard]) -> io::Result<BTreeMap<String, Described>> {
    let all = files(dir)?
        .into_iter()
        .filter(|name| names.iter().any(|pattern| pattern.matches(name)));
    Ok(all
        .map(|name| {
            let described = Described {
                workload: Workload {
                    name: name.clone(),
                    ..Workload::default()
                },
                namespace: Namespace::File(dir.join(&name)),
            };
            (name, described)
        })
        .collect())
}

/// Returns the containers of the results in a directory, by id, and problems with files.
///
/// # Errors
/// The directory exists and cannot be read.
pub(super) fn results(dir: &Path) -> io::Result<(BTreeMap<String, Described>, Vec<String>)> {
    let mut containers: BTreeMap<String, Described> = BTreeMap::new();
    let mut problems = Vec::new();
    for name in files(dir)? {
        let path = dir.join(&name);
        let attached = match result(&path) {
            Ok(Some(attached)) => attached,
            Ok(None) => continue,
            Err(problem) => {
                problems.push(format!("{}: {problem}", path.display()));
                continue;
            }
        };
        let described = containers
            .entry(attached.container.clone())
            .or_insert_with(|| Described {
                workload: Workload {
                    name: attached
                        .arguments
                        .get("K8S_POD_NAME")
                        .unwrap_or(&attached.container)
                        .clone(),
                    container: Some(attached.container.clone()),
                    addresses: Some(Vec::new()),
                    ..Workload::default()
                },
                namespace: Namespace::File(attached.netns.clone()),
            });
        if described.namespace != Namespace::File(attached.netns) {
            described.workload.problem = Some("its results name several network namespaces".to_owned());
        }
        described
            .workload
            .addresses
            .get_or_insert_default()
            .extend(attached.addresses);
        described.workload.labels.extend(attached.arguments);
    }
    Ok((containers, problems))
}

/// Returns the names in a directory, those that are no UTF-8 left out.
fn files(dir: &Path) -> io::Result<BTreeSet<String>> {
    let failed = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", dir.display()));
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        // The first workload makes the directory.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = BTreeSet::new();
    for entry in entries {
        names.extend(entry.map_err(failed)?.file_name().into_string());
        if names.len() > MAX_NAMES {
            return Err(failed(io::Error::other(format!(
                "it has more than {MAX_NAMES} names"
            ))));
        }
    }
    Ok(names)
}

/// Reads a result; `None` if the file is gone or is no regular file.
fn result(path: &Path) -> Result<Option<cni::Attached>, String> {
    let opened = OpenOptions::new()
        .read(true)
        // Another file than a regular one must neither block nor lead elsewhere.
        .custom_flags((OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits())
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Ok(None);
    }
    let mut text = Vec::new();
    file.take(MAX_RESULT + 1)
        .read_to_end(&mut text)
        .map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_RESULT {
        return Err(format!("is longer than {MAX_RESULT} bytes"));
    }
    cni::parse(&text).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(container: &str, netns: &str, address: &str) -> String {
        format!(
            r#"{{"kind":"cniCacheV1","containerId":"{container}","ifName":"eth0","netns":"{netns}","cniArgs":
            [["K8S_POD_NAME","web"]],"result":{{"ips":[{{"address":"{address}"}}]}}}}"#
        )
    }

    #[test]
    fn attachments_of_one_container_are_one_workload() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("a-eth0"),
            text("c1", "/run/netns/x", "10.0.0.2/24"),
        )
        .unwrap();
        fs::write(
            dir.path().join("b-eth1"),
            text("c1", "/run/netns/x", "10.1.0.2/24"),
        )
        .unwrap();
        fs::write(
            dir.path().join("c-eth0"),
            text("c2", "/run/netns/y", "10.0.0.3/24"),
        )
        .unwrap();
        fs::write(
            dir.path().join("d-eth0"),
            text("c2", "/run/netns/z", "10.0.0.4/24"),
        )
        .unwrap();
        fs::write(dir.path().join("broken"), "{").unwrap();
        fs::write(dir.path().join("long"), vec![b' '; MAX_RESULT as usize + 1]).unwrap();
        std::os::unix::fs::symlink("a-eth0", dir.path().join("link")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (containers, problems) = results(dir.path()).unwrap();
        assert_eq!(containers.keys().collect::<Vec<_>>(), ["c1", "c2"]);
        assert_eq!(containers["c1"].workload.addresses.as_ref().unwrap().len(), 2);
        assert_eq!(containers["c1"].workload.name, "web");
        assert!(containers["c2"].workload.problem.is_some());
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(results(&dir.path().join("none")).unwrap().0.is_empty());
    }
}
