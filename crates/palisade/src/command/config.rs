//! `palisade config view`.

use std::{io, path::Path};

use super::output::{EXIT_NO, load_config, show};
use crate::{cli::Output, config::settings};

/// Runs `palisade config view`.
pub(super) fn view(path: &Path, output: Output) -> anyhow::Result<u8> {
    let Some(config) = load_config(path) else {
        return Ok(EXIT_NO);
    };
    show(&settings(&config), output, |settings, out| {
        for setting in settings {
            let name = &setting.name;
            match &setting.value {
                Some(value) if setting.set => writeln!(out, "{name} = {value}")?,
                Some(value) => writeln!(out, "{name} = {value}    # default")?,
                None => writeln!(out, "# {name} is not set")?,
            }
        }
        io::Result::Ok(())
    })
}
