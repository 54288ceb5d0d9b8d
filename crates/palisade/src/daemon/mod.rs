//! The daemon. One thread, the control thread, owns the compiler and changes the maps; all others send it messages
//! or read what it has published.
//!
//! ```text
//! policies (inotify) ─┐
//! network (rtnetlink) ┼─ Message ─> control thread ─ publishes ─> View <─ events, clients
//! signals, clients  ──┘              compile, plan, apply, attach
//! events (BPF ring) ──> flow ring <── clients (observe)        sweeper ──> conntrack map
//! workers (carrier) ──> records ─> flow ring; rules <── control thread
//! ```

mod answers;
mod control;
mod engine;
mod events;
mod files;
mod guard;
mod kept;
mod names;
mod network;
mod policies;
mod selector_text;
mod state;
mod sweeper;
mod view;
mod watcher;
mod workers;

use std::{
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use network::Network;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use palisade_policy::compile::Compiler;
use policies::Offers;
pub use policies::policy_file_names;
use state::State;

use crate::{
    config::Config,
    control::api::{TraceAnswer, TraceRequest},
};

/// A daemon that was just told to end may hold its lock for a moment still.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// Runs the daemon until it is told to end.
pub fn run(config: Config) -> anyhow::Result<()> {
    control::run(config)
}

/// Explains a packet by policies that are not in force, with the endpoints and peers of a configuration.
pub fn trace_offline(config: &Config, files: Offers, request: &TraceRequest) -> anyhow::Result<TraceAnswer> {
    let mut state = State::<()>::default();
    let world = engine::world(config, &Network::default(), &mut state)?;
    let mut compiler = Compiler::default();
    let changes = palisade_policy::compile::Changes {
        world: Some(world),
        files,
    };
    if let Err(problems) = compiler.update(changes) {
        let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
        bail!("{}", lines.join("\n"));
    }
    answers::trace(&compiler, config, request).map_err(anyhow::Error::msg)
}

/// The right to be the only one who changes the maps of a node. Lasts as long as the value.
pub fn lock(state_dir: &Path) -> anyhow::Result<Flock<File>> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(state_dir)
        .with_context(|| state_dir.display().to_string())?;
    let path = state_dir.join("lock");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| path.display().to_string())?;
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((same, Errno::EWOULDBLOCK)) if Instant::now() < until => {
                file = same;
                thread::sleep(Duration::from_millis(10));
            }
            Err((_, Errno::EWOULDBLOCK)) => bail!(
                "{}: another palisade daemon runs with this state directory; end it with `palisade stop`",
                path.display()
            ),
            Err((_, error)) => {
                return Err(io::Error::from(error)).with_context(|| path.display().to_string());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_daemon_for_a_state_directory() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let first = lock(&state).unwrap();
        let error = lock(&state).unwrap_err().to_string();
        assert!(error.contains("another palisade daemon"), "{error}");
        drop(first);
        lock(&state).unwrap();
    }
}
