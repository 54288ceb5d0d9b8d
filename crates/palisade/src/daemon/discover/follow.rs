//! The threads of container engines: each follows one engine by the client of its API. An engine that does not answer
//! leaves its table as it was, and is tried again.

use std::{
    io,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::sys::eventfd::EventFd;

use super::{containerd, docker, engine::Engine};
use crate::config::EngineApi;

/// Shortest and longest time between two attempts to connect.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// Starts the thread of an engine. It holds at most `limit` containers, and writes to `wake` at each change.
///
/// # Errors
/// The thread cannot be started.
pub(super) fn start(
    socket: PathBuf,
    api: EngineApi,
    limit: usize,
    wake: Arc<EventFd>,
) -> io::Result<Arc<Engine>> {
    let engine = Arc::new(Engine::new(socket, api, limit, wake));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let of_thread = Arc::clone(&engine);
    thread::Builder::new()
        .name(format!("discover-{}", engine.api.kind()))
        .spawn(move || runtime.block_on(run(&of_thread)))?;
    Ok(engine)
}

async fn run(engine: &Engine) {
    let mut wait = RECONNECT.0;
    while !engine.is_ended() {
        let begun = Instant::now();
        let followed = match &engine.api {
            EngineApi::Docker { image_labels } => docker::follow(engine, *image_labels).await,
            EngineApi::Containerd {
                image_labels,
                namespaces,
            } => containerd::follow(engine, *image_labels, namespaces).await,
        };
        let Err(problem) = followed else {
            return;
        };
        if begun.elapsed() > RECONNECT.1 {
            wait = RECONNECT.0;
        }
        engine.failed(problem);
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(RECONNECT.1);
    }
}
