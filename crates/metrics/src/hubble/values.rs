//! Values of labels.

use std::borrow::Cow;

use crate::identifier::Identifier;

/// Values of the labels of a time series.
#[derive(Debug)]
pub(super) struct Values<'a> {
    pub(super) texts: Vec<Cow<'a, str>>,
    /// What the last texts show.
    pub(super) shows: Vec<Option<Identifier>>,
}

impl<'a> From<Vec<Cow<'a, str>>> for Values<'a> {
    fn from(texts: Vec<Cow<'a, str>>) -> Self {
        Self {
            texts,
            shows: Vec::new(),
        }
    }
}

impl<'a> Values<'a> {
    /// Appends the value of a context label.
    pub(super) fn push(&mut self, shows: Option<Identifier>, text: Cow<'a, str>) {
        self.texts.push(text);
        self.shows.push(shows);
    }
}
