//! Answers from the pinned maps, while no daemon runs.

use std::{fs, path::Path};

use crate::{
    config::{Config, DEFAULT_PIN_DIR, DEFAULT_STATE_DIR},
    control::client::ClientError,
    daemon::Pinned,
};

/// Returns the answer of the daemon; if no daemon runs, that of `read` from the maps that are pinned, and says so.
///
/// # Errors
/// Those of the daemon and of `read`. Without pinned maps the error is that no daemon runs.
pub(super) fn or_pinned<T>(
    config: &Path,
    answer: Result<T, ClientError>,
    read: impl FnOnce(&Pinned) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let error = match answer {
        Err(error @ ClientError::NotRunning { .. }) => error,
        other => return Ok(other?),
    };
    let text = fs::read_to_string(config).unwrap_or_default();
    let dir = |key, default: &str| Config::node_path(&text, key).unwrap_or_else(|| default.into());
    let pinned = Pinned::open(
        &dir("pin_dir", DEFAULT_PIN_DIR),
        &dir("state_dir", DEFAULT_STATE_DIR),
    )?;
    let Some(pinned) = pinned else {
        return Err(error.into());
    };
    eprintln!("palisade: {}", pinned.remark());
    read(&pinned)
}
