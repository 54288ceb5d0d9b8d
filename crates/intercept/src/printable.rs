//! Texts that quote what a peer has sent.

/// Maximum number of characters of details.
const LONGEST: usize = 512;

/// Returns a text without control characters, cut at [`LONGEST`] characters. Details can quote a certificate of any
/// server, and logs and terminals show them.
pub(crate) fn printable(text: &str) -> String {
    let shown = text.chars().take(LONGEST);
    shown
        .map(|letter| if letter.is_control() { '?' } else { letter })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_and_long_texts_do_not_reach_a_terminal() {
        assert_eq!(printable("a\n\u{1b}[31mb"), "a??[31mb");
        assert_eq!(printable(&"x".repeat(1000)).len(), LONGEST);
    }
}
