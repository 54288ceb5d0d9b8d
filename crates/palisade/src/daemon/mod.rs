//! The daemon.

mod files;
mod network;
mod policies;
mod watcher;
