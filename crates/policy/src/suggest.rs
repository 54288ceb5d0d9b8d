//! "Did you mean": the name that an unknown word resembles, for policies and for the configuration.

/// Maximum length of a word for which a suggestion is computed, in characters. The time for the edit distance grows
/// with the product of the lengths of the word and the name.
const MAX_WORD: usize = 64;

/// Returns the name that `written` resembles most, if it differs in letter case only or by few letters (inserted,
/// removed, replaced, or swapped with their neighbour).
///
/// ```
/// use palisade_policy::suggest::nearest;
///
/// assert_eq!(nearest("ingres", ["ingress", "egress"]), Some("ingress"));
/// assert_eq!(nearest("colour", ["ingress", "egress"]), None);
/// ```
#[must_use]
pub fn nearest<'n>(written: &str, names: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    let written = written.to_lowercase();
    if written.chars().count() > MAX_WORD {
        return None;
    }
    names
        .into_iter()
        .map(|name| (strsim::osa_distance(&written, &name.to_lowercase()), name))
        .filter(|(distance, name)| *distance <= (name.len() / 3).clamp(1, 4))
        .min()
        .map(|(_, name)| name)
}
