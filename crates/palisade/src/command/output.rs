//! Exit codes, and how commands print answers and configuration errors.

use std::{
    io::{self, BufRead as _, IsTerminal as _, Write as _},
    path::Path,
};

use anyhow::bail;
use serde::Serialize;

use crate::{
    cli::Output,
    config::{Config, ConfigError},
};

/// The command is done, or the answer is yes.
pub(super) const EXIT_OK: u8 = 0;
/// The answer is no.
pub(super) const EXIT_NO: u8 = 1;
/// The daemon does not answer.
pub(super) const EXIT_NO_DAEMON: u8 = 3;
/// Any other failure.
pub(super) const EXIT_FAILED: u8 = 4;

/// Returns the configuration. If it has errors, prints all of them and returns `None`.
pub(super) fn load_config(path: &Path) -> Option<Config> {
    Config::load(path).map_err(|errors| print_errors(&errors)).ok()
}

fn print_errors(errors: &[ConfigError]) {
    for error in errors {
        eprintln!("{error}");
    }
}

/// Returns a text in red if the standard output is a terminal and NO_COLOR (no-color.org) is not set.
pub(super) fn alarming(text: &str) -> String {
    let has_colours = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    if has_colours {
        format!("\x1b[31m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// Asks a question on the terminal. Returns whether the answer is yes.
///
/// # Errors
/// There is no terminal. `instead`: what --yes is for, in the error.
pub(super) fn confirmed(question: &str, instead: &str) -> anyhow::Result<bool> {
    if !io::stdin().is_terminal() {
        bail!("there is no terminal to ask on: use --yes {instead}");
    }
    eprint!("{question} [y/N] ");
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    Ok(matches!(line.trim(), "y" | "Y" | "yes"))
}

/// Prints an answer as JSON, or with `table`. Returns [`EXIT_OK`].
pub(super) fn show<T: Serialize>(
    answer: &T,
    output: Output,
    table: impl FnOnce(&T, &mut dyn io::Write) -> io::Result<()>,
) -> anyhow::Result<u8> {
    let mut out = io::stdout().lock();
    match output {
        Output::Json => {
            // An error of the writer is returned as such, so that a closed pipe is recognised.
            serde_json::to_writer_pretty(&mut out, answer).map_err(io::Error::from)?;
            writeln!(out)?;
        }
        Output::JsonPath(template) => {
            let value = serde_json::to_value(answer)?;
            writeln!(out, "{}", template.render(&value))?;
        }
        Output::Table => table(answer, &mut out)?,
    }
    Ok(EXIT_OK)
}
