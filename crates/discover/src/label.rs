//! Which texts can be keys and values of the labels of a workload.
//!
//! The text of a label set (`k8s:app=web,k8s:tier=1`) stands for the set in the state file and in reports. A key with
//! `=`, or a value with `,`, would give two different sets the same text.

/// Longest key: a DNS name, `/`, and a name of 63 bytes, as in Kubernetes.
pub const MAX_KEY_BYTES: usize = 253 + 1 + 63;
/// Longest value, bytes.
pub const MAX_VALUE_BYTES: usize = 253;

/// Checks the key of a label.
///
/// # Errors
/// The key is empty, too long, or has other characters than letters, digits, `.`, `_`, `-` and `/`.
pub fn check_key(key: &str) -> Result<(), String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    if key.is_empty() || key.len() > MAX_KEY_BYTES || !key.chars().all(fits) {
        return Err(format!(
            "'{}' cannot be the key of a label (letters, digits, '.', '_', '-' and '/', at most {MAX_KEY_BYTES})",
            shown(key)
        ));
    }
    Ok(())
}

/// Checks the value of a label.
///
/// # Errors
/// The value is too long, or has a character that separates labels, a quote, a space or a control character.
pub fn check_value(value: &str) -> Result<(), String> {
    let fits = |c: char| c.is_ascii_graphic() && !",='\"\\`".contains(c);
    if value.len() > MAX_VALUE_BYTES || !value.chars().all(fits) {
        return Err(format!(
            "'{}' cannot be the value of a label (printable ASCII without space, ',', '=', quotes and '\\', at most \
             {MAX_VALUE_BYTES} bytes)",
            shown(value)
        ));
    }
    Ok(())
}

/// Returns whether a text can be a name in `namespace/name`.
pub(crate) fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=253).contains(&name.len()) && name.chars().all(fits)
}

/// Returns a text from outside for a message: at most 40 characters, without control characters.
pub(crate) fn shown(text: &str) -> String {
    const LONGEST: usize = 40;
    let cut: String = text.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if text.chars().nth(LONGEST).is_some() {
        format!("{cut}…")
    } else {
        cut
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_would_separate_labels_are_refused() {
        assert!(check_key("com.example/app_1-x").is_ok());
        for key in [
            "",
            "a=b",
            "a,b",
            "reserved:host",
            "a b",
            "ä",
            &"x".repeat(MAX_KEY_BYTES + 1),
        ] {
            assert!(check_key(key).is_err(), "{key}");
        }
        assert!(check_value("").is_ok() && check_value("nginx:1.27@sha256:ab").is_ok());
        for value in [
            "a,k8s:role=admin",
            "a=b",
            "a b",
            "a\n",
            "ä",
            &"x".repeat(MAX_VALUE_BYTES + 1),
        ] {
            assert!(check_value(value).is_err(), "{value}");
        }
        assert_eq!(shown("a\u{1b}[2J").len(), "a\\u{1b}[2J".len());
        assert_eq!(shown(&"x".repeat(50)).chars().count(), 41);
    }
}
