//! Secrets as read from files, before their content is checked.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use zeroize::Zeroizing;

use crate::problem::Problem;

/// One value of a secret.
#[derive(Clone)]
pub(crate) struct Item {
    pub bytes: Zeroizing<Vec<u8>>,
    pub file: Arc<Path>,
    /// Line of the value in the file.
    pub line: u32,
    /// Whether the file contains nothing but the value, so that the lines of the value are those of the file.
    pub whole_file: bool,
}

impl Item {
    /// Returns the line of the file for a line of the value.
    pub(crate) fn line(&self, of_value: u32) -> u32 {
        if self.whole_file { of_value } else { self.line }
    }
}

/// A secret with its values.
#[derive(Clone)]
pub(crate) struct Raw {
    /// `namespace/name`.
    pub name: String,
    /// The YAML file, or the folder of the values.
    pub source: Arc<Path>,
    pub items: BTreeMap<String, Item>,
}

/// What a file or folder contains. An error without the name of a secret means that secrets of that file may be
/// missing from the list.
#[derive(Default)]
pub(crate) struct Found {
    pub secrets: Vec<Raw>,
    pub problems: Vec<Problem>,
}

/// Returns whether a text can be a namespace or the name of a secret (RFC 1123 subdomain).
pub(crate) fn is_name(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.len() <= 253
        && text.split('.').all(|label| {
            label.bytes().all(|byte| inner(byte) || byte == b'-')
                && label.bytes().next().is_some_and(inner)
                && label.bytes().last().is_some_and(inner)
        })
}

/// Returns whether a text can be the key of a value.
pub(crate) fn is_key(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !text.is_empty() && text.len() <= 253 && !text.starts_with('.') && text.bytes().all(known)
}

/// Largest number of values of a secret.
pub(crate) const MAX_ITEMS: usize = 64;
