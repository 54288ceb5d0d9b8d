//! A terminal for programs that need one: tmux(1) with a server of its own.

use std::{
    path::Path,
    process::{Command, Output},
    time::Duration,
};

use palisade_testbed::{ns::wait_until, process::output};

/// Longest time until a text appears.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A tmux server with one terminal. It ends with this value.
#[derive(Debug)]
pub struct Tmux {
    socket: String,
}

impl Tmux {
    /// Starts a shell script in a terminal of 80 columns and 24 lines. `dir`: directory for the socket of the server.
    ///
    /// # Panics
    /// If tmux cannot be started.
    #[must_use]
    pub fn start(dir: &Path, script: &str) -> Self {
        let tmux = Self {
            socket: dir.join("tmux").display().to_string(),
        };
        let begun = tmux.run(&["new-session", "-d", "-x", "80", "-y", "24", script]);
        assert!(begun.status.success(), "{begun:?}");
        tmux
    }

    /// Returns the program and the arguments of a command as words of a shell script.
    #[must_use]
    pub fn words(command: &Command) -> String {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let quoted: Vec<String> = words
            .map(|word| format!("'{}'", word.to_string_lossy()))
            .collect();
        quoted.join(" ")
    }

    /// Runs a command of tmux.
    ///
    /// # Panics
    /// If tmux does not run.
    pub fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new("tmux");
        command.args(["-S", &self.socket, "-f", "/dev/null"]).args(args);
        output(&mut command, TIMEOUT).expect("tmux")
    }

    /// Returns what the terminal shows.
    #[must_use]
    pub fn screen(&self) -> String {
        String::from_utf8_lossy(&self.run(&["capture-pane", "-p"]).stdout).into_owned()
    }

    /// Waits until the terminal shows a text.
    ///
    /// # Panics
    /// If it does not appear in time.
    #[track_caller]
    pub fn wait(&self, what: &str, part: &str) {
        wait_until(what, TIMEOUT, || self.screen().contains(part))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", self.screen()));
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        self.run(&["kill-server"]);
    }
}
