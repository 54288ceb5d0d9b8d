//! The configuration: `/etc/palisade/palisade.toml`.

mod discover;
mod export;
mod failsafe;
mod hubble;
mod labels;
mod limit_option;
mod metrics;
mod model;
mod read;
mod reader;
mod suggest;
mod view;

use std::{
    fs,
    path::{Path, PathBuf},
};

pub(crate) use discover::{Discover, EngineApi, Source as DiscoverSource};
pub(crate) use failsafe::{Failsafe, FailsafePort};
pub(crate) use hubble::Hubble;
pub(crate) use limit_option::{limit_hint, with_option};
pub(crate) use metrics::{CertificateFiles, Metrics};
pub(crate) use model::*;
use read::read;
pub(crate) use reader::ConfigError;
use reader::Reader;
use toml::de::DeTable;
pub(crate) use view::settings;

impl Config {
    /// Reads and validates a file.
    ///
    /// # Errors
    /// All errors of the file, in the order of their places.
    pub(crate) fn load(path: &Path) -> Result<Self, Vec<ConfigError>> {
        let text = fs::read_to_string(path).map_err(|error| {
            let hint = if error.kind() == std::io::ErrorKind::NotFound {
                "; name the file with --config, or start from the config/palisade.toml that comes with Palisade"
            } else {
                ""
            };
            vec![ConfigError {
                file: path.display().to_string(),
                line: 0,
                column: 0,
                message: format!("cannot be read: {error}{hint}"),
            }]
        })?;
        if palisade_policy::parse::is_blank(&text) {
            // A power failure can leave a newly written file empty. With an empty configuration no interface would be
            // guarded.
            return Err(vec![ConfigError {
                file: path.display().to_string(),
                line: 0,
                column: 0,
                message:
                    "is empty and would guard nothing; start from the config/palisade.toml that comes with Palisade"
                        .to_owned(),
            }]);
        }
        Self::parse(path, &text)
    }

    /// Returns a path option of `[node]` from a text that can have errors elsewhere; `None` unless the option is an
    /// absolute path.
    pub(crate) fn node_path(text: &str, key: &str) -> Option<PathBuf> {
        let (table, _) = DeTable::parse_recoverable(text);
        let node = table.get_ref().get("node")?.get_ref().as_table()?;
        let path = PathBuf::from(node.get(key)?.get_ref().as_str()?);
        path.is_absolute().then_some(path)
    }

    /// Validates a text. Errors name the file `path`, and a relative policy folder is relative to the directory of
    /// `path`.
    ///
    /// # Errors
    /// All errors of the text, in the order of their places.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self, Vec<ConfigError>> {
        let file = path.display().to_string();
        let reader = Reader::new(&file, text);
        let (table, syntax) = DeTable::parse_recoverable(text);
        if !syntax.is_empty() {
            for error in syntax {
                reader.error(error.span().map_or(0, |span| span.start), error.message());
            }
            return Err(reader.into_errors());
        }
        let mut config = read(path, &reader, table.get_ref());
        config.text = text.into();
        let errors = reader.into_errors();
        if errors.is_empty() {
            Ok(config)
        } else {
            Err(errors)
        }
    }
}

/// Returns every option that the configuration has, as `section.option`.
#[cfg(test)]
pub(crate) fn option_names() -> std::collections::BTreeSet<String> {
    let text = "[[namespace]]\n[[interface]]\n[[endpoint]]\n[[peer]]\n[[discover]]\n[[export]]\n";
    let reader = Reader::new("p.toml", text);
    let (table, _) = DeTable::parse_recoverable(text);
    read(Path::new("p.toml"), &reader, table.get_ref());
    let asked = reader.asked.into_inner();
    asked.into_iter().filter(|path| path.contains('.')).collect()
}

#[cfg(test)]
mod tests;
