//! Adds the `[limits]` option to errors about a map that is too small. `palisade-datapath` does not know the
//! configuration, so its errors name only the map.

use std::fmt::Display;

use palisade_abi::maps;
use palisade_datapath::{ApplyError, MapError, OpenError};

/// An error that can be due to a map that is too small.
pub(crate) trait SizeError: Display {
    /// Returns the name of the map that is too small; `None` if the error has another cause.
    fn too_small(&self) -> Option<&str>;
}

impl SizeError for MapError {
    fn too_small(&self) -> Option<&str> {
        MapError::too_small(self)
    }
}

impl SizeError for ApplyError {
    fn too_small(&self) -> Option<&str> {
        ApplyError::too_small(self)
    }
}

impl SizeError for OpenError {
    fn too_small(&self) -> Option<&str> {
        OpenError::too_small(self)
    }
}

/// Returns the option of `[limits]` that sets the size of a map; `None` if no option does. The case of the name is
/// ignored.
pub(super) fn limit_option(map: &str) -> Option<&'static str> {
    Some(match map.to_uppercase().as_str() {
        maps::CONNTRACK => "conntrack",
        maps::FRAGMENTS => "fragments",
        maps::POLICY => "policy",
        // One option sizes the maps of addresses and of prefixes.
        maps::IPCACHE | maps::PREFIXES => "ipcache",
        maps::LEARNED => "learned",
        maps::RULES => "rules",
        _ => return None,
    })
}

/// Returns `; raise [limits] OPTION` for a map; empty if no option sets its size.
pub(crate) fn limit_hint(map: &str) -> String {
    limit_option(map).map_or_else(String::new, |option| format!("; raise [limits] {option}"))
}

/// Returns the text of an error; if a map is too small, with the `[limits]` option to raise.
pub(crate) fn with_option(error: &impl SizeError) -> String {
    let hint = error.too_small().map(limit_hint).unwrap_or_default();
    format!("{error}{hint}")
}
