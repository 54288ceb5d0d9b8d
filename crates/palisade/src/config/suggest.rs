//! "Did you mean": the known word that an unknown one resembles.

use palisade_policy::suggest::nearest;

/// Returns `; did you mean 'WORD'?`, or an empty text if no word is similar.
pub(super) fn suggestion<'a>(wrong: &str, words: impl IntoIterator<Item = &'a str>) -> String {
    nearest(wrong, words).map_or_else(String::new, |word| format!("; did you mean '{word}'?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_word_is_suggested_and_a_far_one_is_not() {
        let words = ["enforcement", "audit", "dir"];
        assert_eq!(suggestion("enforcment", words), "; did you mean 'enforcement'?");
        assert_eq!(suggestion("aduit", words), "; did you mean 'audit'?");
        assert_eq!(suggestion("colour", words), "");
    }
}
