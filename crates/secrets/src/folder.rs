//! The files of the folder of secrets, with their permissions.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{fcntl::OFlag, unistd::geteuid};
use zeroize::Zeroizing;

use crate::{
    kubernetes, pem,
    problem::Problem,
    raw::{Found, Item, MAX_ITEMS, Raw, is_key, is_name},
};

/// Largest value, bytes. Kubernetes has the same limit for a Secret.
const MAX_VALUE: u64 = 1 << 20;
/// Largest YAML file, bytes.
const MAX_YAML: u64 = 4 << 20;
/// Largest sum of all files, bytes.
const MAX_TOTAL: u64 = 64 << 20;
/// Largest number of secrets.
const MAX_SECRETS: usize = 1024;

/// Reads the folder. A missing folder has no secrets.
pub(crate) fn read(dir: &Path) -> Found {
    let mut found = Found::default();
    let root = match fs::canonicalize(dir) {
        Ok(root) => root,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return found,
        Err(error) => {
            found.problems.push(Problem::error(dir, 0, error.to_string()));
            return found;
        }
    };
    match reachable(&root) {
        Ok(reachable) => {
            let mut folder = Folder {
                dir,
                root,
                reachable,
                left: MAX_TOTAL,
                found,
            };
            folder.read();
            folder.found
        }
        Err(text) => {
            found.problems.push(Problem::error(dir, 0, text));
            found
        }
    }
}

/// Checks that no other user can replace the folder, and returns whether all users can search it.
fn reachable(root: &Path) -> Result<bool, String> {
    let mut reachable = true;
    for above in root.ancestors().skip(1) {
        let metadata =
            fs::symlink_metadata(above).map_err(|error| format!("{}: {error}", above.display()))?;
        let (mode, sticky) = (metadata.mode(), metadata.mode() & 0o1000 != 0);
        let by_group = mode & 0o020 != 0 && metadata.gid() != 0;
        if !is_own(&metadata) || (!sticky && (by_group || mode & 0o002 != 0)) {
            let path = above.display();
            return Err(format!(
                "other users can replace the folder, because user {} owns {path} with mode {:04o}; move the folder, or \
                 `chown root {path} && chmod go-w {path}`",
                metadata.uid(),
                mode & 0o7777,
            ));
        }
        reachable &= mode & 0o001 != 0;
    }
    Ok(reachable)
}

/// Returns whether root or the user of this process owns a file.
fn is_own(metadata: &Metadata) -> bool {
    metadata.uid() == 0 || metadata.uid() == geteuid().as_raw()
}

/// Checks that only root and the user of this process can change a file or folder.
fn check(path: &Path, metadata: &Metadata) -> Result<(), String> {
    if !is_own(metadata) {
        return Err(format!(
            "belongs to user {}, not to root; `chown root {}`",
            metadata.uid(),
            path.display()
        ));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(format!(
            "other users can write it (mode {:04o}); `chmod go-w {}`",
            metadata.mode() & 0o7777,
            path.display()
        ));
    }
    Ok(())
}

/// Content of a file.
struct Content {
    bytes: Zeroizing<Vec<u8>>,
    /// Mode, if all users can read the file.
    public: Option<u32>,
}

impl Content {
    /// Checks that only certificates are readable by all users.
    fn check_private(&self, path: &Path) -> Result<(), Problem> {
        let Some(mode) = self.public else {
            return Ok(());
        };
        // This search finds a key in a malformed file too, so that the permissions are reported first.
        let has_key = self.bytes.windows(11).any(|window| window == b"PRIVATE KEY");
        if pem::is_pem(&self.bytes) && !has_key {
            return Ok(());
        }
        Err(Problem::error(
            path,
            0,
            format!(
                "all users can read this secret (mode {:04o}); `chmod o-r {}`, and replace the secret if others had access",
                mode & 0o7777,
                path.display()
            ),
        ))
    }
}

struct Folder<'a> {
    /// The folder as configured, for messages.
    dir: &'a Path,
    /// The folder without symbolic links.
    root: PathBuf,
    /// Whether all users can search the folders above.
    reachable: bool,
    /// Bytes that can still be read.
    left: u64,
    found: Found,
}

impl Folder<'_> {
    fn read(&mut self) {
        let Some(names) = self.list(self.dir) else {
            return;
        };
        for name in names {
            let path = self.dir.join(&name);
            let text = name.to_string_lossy();
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() => {
                    if is_name(&text) {
                        self.namespace(&path, &text);
                    } else {
                        self.unused(&path, "no namespace has this name: not used");
                    }
                }
                Ok(_) if [".yaml", ".yml", ".json"].iter().any(|end| text.ends_with(end)) => self.yaml(&path),
                Ok(_) => self.unused(
                    &path,
                    "not used: Secrets are in *.yaml, *.yml or *.json, values in NAMESPACE/NAME/KEY",
                ),
                Err(error) => self.failed(&path, &error),
            }
        }
    }

    fn namespace(&mut self, dir: &Path, namespace: &str) {
        let Some(names) = self.list(dir) else {
            return;
        };
        for name in names {
            let path = dir.join(&name);
            let name = name.to_string_lossy();
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() && is_name(&name) => {
                    let secret = format!("{namespace}/{name}");
                    if !self.has_space(&path) {
                        return;
                    }
                    if let Some(items) = self.values(&path, &secret) {
                        self.found.secrets.push(Raw {
                            name: secret,
                            source: Arc::from(path),
                            items,
                        });
                    }
                }
                Ok(_) => self.unused(&path, "not used: values are in NAMESPACE/NAME/KEY"),
                Err(error) => self.failed(&path, &error),
            }
        }
    }

    /// Returns the values of a secret; `None` after a problem with one of them.
    fn values(&mut self, dir: &Path, secret: &str) -> Option<BTreeMap<String, Item>> {
        let before = self.found.problems.len();
        let mut items = BTreeMap::new();
        for name in self.list(dir).unwrap_or_default() {
            let path = dir.join(&name);
            let key = name.to_string_lossy();
            if !is_key(&key) {
                self.unused(&path, "not used: no key has this name");
                continue;
            }
            if items.len() == MAX_ITEMS {
                self.problem(Problem::error(
                    dir,
                    0,
                    format!("more than {MAX_ITEMS} values in a secret"),
                ));
                break;
            }
            match self.content(&path, MAX_VALUE) {
                Ok(content) => {
                    if let Err(problem) = content.check_private(&path) {
                        self.problem(problem);
                    }
                    let item = Item {
                        bytes: content.bytes,
                        file: Arc::from(path),
                        line: 1,
                        whole_file: true,
                    };
                    items.insert(key.into_owned(), item);
                }
                Err(problem) => self.problem(problem),
            }
        }
        let problems = self.found.problems.get_mut(before..).unwrap_or_default();
        for problem in &mut *problems {
            problem.secret = Some(secret.to_owned());
        }
        problems
            .iter()
            .all(|problem| !problem.is_error())
            .then_some(items)
    }

    fn yaml(&mut self, path: &Path) {
        if !self.has_space(path) {
            return;
        }
        let content = match self.content(path, MAX_YAML) {
            Ok(content) => content,
            Err(problem) => return self.problem(problem),
        };
        // The values are in base64, so `check_private` would not recognize a key.
        if let Some(mode) = content.public {
            return self.problem(Problem::error(
                path,
                0,
                format!(
                    "all users can read this secret (mode {:04o}); `chmod o-r {}`, and replace the secret if others had access",
                    mode & 0o7777,
                    path.display()
                ),
            ));
        }
        let found = kubernetes::read(path, &content.bytes);
        self.found.problems.extend(found.problems);
        for secret in found.secrets {
            if !self.has_space(path) {
                return;
            }
            self.found.secrets.push(secret);
        }
    }

    fn has_space(&mut self, path: &Path) -> bool {
        let has = self.found.secrets.len() < MAX_SECRETS;
        if !has {
            self.problem(Problem::error(
                path,
                0,
                format!("more than {MAX_SECRETS} secrets: this file is not used"),
            ));
        }
        has
    }

    /// Returns the names in a folder in order. Names that begin with a dot are left out: Kubernetes keeps the versions
    /// of a volume in such folders (`..data`).
    fn list(&mut self, dir: &Path) -> Option<Vec<OsString>> {
        let read = || -> io::Result<Result<Vec<OsString>, String>> {
            if let Err(text) = self.inside(dir)? {
                return Ok(Err(text));
            }
            let mut names = Vec::new();
            for entry in fs::read_dir(dir)? {
                let name = entry?.file_name();
                if !name.to_string_lossy().starts_with('.') {
                    names.push(name);
                }
                if names.len() > MAX_SECRETS * 4 {
                    return Ok(Err(format!("more than {} entries", MAX_SECRETS * 4)));
                }
            }
            names.sort();
            Ok(Ok(names))
        };
        match read() {
            Ok(Ok(names)) => Some(names),
            Ok(Err(text)) => {
                self.problem(Problem::error(dir, 0, text));
                None
            }
            Err(error) => {
                self.failed(dir, &error);
                None
            }
        }
    }

    /// Resolves the links of a path, which must not leave the folder, and checks each folder on it. Returns the path
    /// and whether all users can search its folders.
    fn inside(&self, path: &Path) -> io::Result<Result<(PathBuf, bool), String>> {
        let real = fs::canonicalize(path)?;
        let Ok(below) = real.strip_prefix(&self.root) else {
            return Ok(Err(format!(
                "a link to {}, outside of {}: copy the file, or mount its folder",
                real.display(),
                self.dir.display()
            )));
        };
        let mut reachable = self.reachable;
        let mut here = self.root.clone();
        let mut components = below.components();
        loop {
            let metadata = fs::symlink_metadata(&here)?;
            if let Err(text) = check(&here, &metadata) {
                return Ok(Err(if here == real {
                    text
                } else {
                    format!("its folder {} {text}", here.display())
                }));
            }
            let Some(next) = components.next() else {
                break;
            };
            reachable &= metadata.mode() & 0o001 != 0;
            here.push(next);
        }
        Ok(Ok((real, reachable)))
    }

    fn content(&mut self, path: &Path, most: u64) -> Result<Content, Problem> {
        let error = |text: String| Problem::error(path, 0, text);
        let (real, reachable) = self
            .inside(path)
            .map_err(|failed| error(failed.to_string()))?
            .map_err(error)?;
        // NONBLOCK: opening a FIFO would wait for a writer.
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).bits())
            .open(&real)
            .and_then(|file| Ok((file.metadata()?, file)));
        let (metadata, file): (Metadata, File) = opened.map_err(|failed| error(failed.to_string()))?;
        if !metadata.is_file() {
            return Err(error("not a regular file".into()));
        }
        check(&real, &metadata).map_err(error)?;
        let most = most.min(self.left);
        if metadata.len() > most {
            return Err(error(if most == self.left {
                format!(
                    "the files of {} hold more than {} MiB",
                    self.dir.display(),
                    MAX_TOTAL >> 20
                )
            } else {
                format!("larger than {} MiB", most >> 20)
            }));
        }
        // The capacity keeps `read_to_end` from moving the bytes, which would leave copies in freed memory.
        let capacity = usize::try_from(most.min(metadata.len()) + 64).unwrap_or_default();
        let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
        let read = file.take(metadata.len() + 1).read_to_end(&mut bytes);
        let read = read.map_err(|failed| error(failed.to_string()))? as u64;
        if read != metadata.len() {
            return Err(error(
                "changed while it was read; write a file under another name and rename it".into(),
            ));
        }
        self.left -= read;
        Ok(Content {
            bytes,
            public: (reachable && metadata.mode() & 0o004 != 0).then_some(metadata.mode()),
        })
    }

    fn problem(&mut self, problem: Problem) {
        self.found.problems.push(problem);
    }

    fn unused(&mut self, path: &Path, text: &str) {
        self.problem(Problem::warning(path, 0, text));
    }

    fn failed(&mut self, path: &Path, error: &io::Error) {
        self.problem(Problem::error(path, 0, error.to_string()));
    }
}
