//! The copy of the last good configuration. The daemon starts with it if the configuration file is broken or missing.
//! Without the copy no interface would be guarded, because only the configuration names interfaces and endpoints.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use super::{checked_file, keeper::CONFIG};
use crate::{
    config::{Config, DEFAULT_STATE_DIR},
    trusted_path::private_dir,
};

/// Start of the copy's first line; the path of the original file follows.
const COPY_PREFIX: &str = "# last good content of ";

/// Returns the content of the copy of a configuration.
pub(super) fn text(config: &Config) -> String {
    format!("{COPY_PREFIX}{}\n{}", config.path.display(), config.text)
}

/// Returns the last good copy of a configuration file that is broken or missing, and the path of the copy.
///
/// # Errors
/// A text for each state directory that was searched.
pub(crate) fn find(path: &Path) -> Result<(Config, PathBuf), Vec<String>> {
    let broken = fs::read(path).unwrap_or_default();
    let mut problems = Vec::new();
    for dir in state_dirs(&String::from_utf8_lossy(&broken)) {
        match read(&dir, path) {
            Ok(config) => return Ok((config, dir.join(CONFIG))),
            Err(problem) => problems.push(problem),
        }
    }
    Err(problems)
}

/// Returns the possible state directories: the `state_dir` of the broken file, if that line can be read; the state
/// directory that the service manager has made (systemd.exec(5), `StateDirectory=`); the default one.
fn state_dirs(broken: &str) -> Vec<PathBuf> {
    let managed = env::var_os("STATE_DIRECTORY")
        .map(PathBuf::from)
        .filter(|dir| dir.is_absolute());
    let mut dirs = Vec::new();
    for dir in [
        Config::node_path(broken, "state_dir"),
        managed,
        Some(DEFAULT_STATE_DIR.into()),
    ]
    .into_iter()
    .flatten()
    {
        if !dirs.contains(&dir) {
            dirs.push(dir);
        }
    }
    dirs
}

fn read(dir: &Path, path: &Path) -> Result<Config, String> {
    let copy = dir.join(CONFIG);
    let shown = copy.display();
    if !dir.is_dir() {
        return Err(format!("{shown}: no last good configuration is kept there"));
    }
    // A copy that a user other than root and the user of this process can have written must not configure the daemon.
    private_dir(dir, "[node] state_dir").map_err(|refusal| refusal.to_string())?;
    let content = checked_file::read(&copy).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("{shown}: no last good configuration is kept there"),
        _ => format!("{shown}: cannot be used: {error}"),
    })?;
    let of = content
        .lines()
        .next()
        .and_then(|line| line.strip_prefix(COPY_PREFIX));
    if of != Some(&*path.display().to_string()) {
        return Err(format!(
            "{shown}: is kept of another file ({})",
            of.unwrap_or("which is not named")
        ));
    }
    // The first line is removed, so that line numbers in errors are those of the original file.
    let text = content.split_once('\n').map_or("", |(_, text)| text);
    Config::parse(path, text).map_err(|errors| {
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        format!("{shown}: this version cannot read it: {}", lines.join("; "))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[node]\nname = \"n\"\n[[interface]]\nname = \"eth0\"\nrole = \"host\"\n";

    #[test]
    fn the_last_good_configuration_is_found_despite_a_broken_file() {
        let root = tempfile::tempdir().unwrap();
        let (path, dir) = (root.path().join("palisade.toml"), root.path().join("state"));
        fs::create_dir(&dir).unwrap();
        let config = Config::parse(&path, GOOD).unwrap();
        let keep = |text: &str| fs::write(dir.join(CONFIG), checked_file::seal(text)).unwrap();
        keep(&text(&config));
        for broken in [
            format!("[node]\nstate_dir = {dir:?}\n[[interface]]\nnam = \"eth0\"\n"),
            format!("[node]\nstate_dir = {dir:?}\n[[interface\n"),
        ] {
            fs::write(&path, broken).unwrap();
            let (found, from) = find(&path).unwrap();
            assert_eq!((found, from), (config.clone(), dir.join(CONFIG)));
        }
        // A copy of another file, a copy that this version cannot read, and a truncated copy are not used. Each has its
        // own error.
        keep(&text(&config).replace("palisade.toml", "other.toml"));
        assert!(find(&path).unwrap_err()[0].contains("of another file"));
        keep(&text(&config).replace("role", "roll"));
        assert!(find(&path).unwrap_err()[0].contains("this version cannot read it"));
        let whole = fs::read(dir.join(CONFIG)).unwrap();
        fs::write(dir.join(CONFIG), &whole[..whole.len() - 3]).unwrap();
        assert!(find(&path).unwrap_err()[0].contains("truncated"));
        fs::remove_file(dir.join(CONFIG)).unwrap();
        assert!(find(&path).unwrap_err()[0].contains("no last good configuration"));
    }
}
